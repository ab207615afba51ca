"""Chains: a convolution kernel as several smaller ones, called one after another.

A kernel is [o, i, *k]; a matrix is a kernel without axes of space. No two links of a chain may both be longer than 1
along one axis of space: the kernel of the whole chain is then the product of theirs, summed over the channels between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from featherweight.numerics.least_squares import refit


@dataclass(frozen=True)
class Link:
    """One smaller kernel: ``weight`` [o, i / groups, *k]."""

    name: str
    weight: Tensor
    groups: int = 1


def dense(link: Link) -> Tensor:
    """The kernel of a link as one of a single group, [o, i, *k]: zero between groups."""
    weight, g = link.weight, link.groups
    if g == 1:
        return weight
    parts = weight.reshape(g, weight.shape[0] // g, *weight.shape[1:])
    found = weight.new_zeros(g, parts.shape[1], g, *weight.shape[1:])
    each = torch.arange(g)
    found[each, :, each] = parts
    return found.reshape(weight.shape[0], g * weight.shape[1], *weight.shape[2:])


def composed(links: Sequence[Link]) -> Tensor:
    """The kernel [o, i, *k] that the links, the first of them called first, make together."""
    found = dense(links[0])
    for link in links[1:]:
        found = torch.einsum("or...,ri...->oi...", dense(link), found)
    return found


def of_groups(links: Sequence[Link], groups: int) -> list[list[Link]]:
    """The chain of a grouped layer as one chain a group."""
    parts = [link.weight.chunk(groups) for link in links]
    return [[Link(link.name, mine[g], link.groups // groups) for link, mine in zip(links, parts, strict=True)]
            for g in range(groups)]


def side_by_side(chains: Sequence[Sequence[Link]]) -> list[Link]:
    """Chains of one shape, for the groups of a layer, as one chain of grouped links."""
    return [Link(same[0].name, torch.cat([link.weight for link in same]), sum(link.groups for link in same))
            for same in zip(*chains, strict=True)]


def refit_last(links: Sequence[Link], gram: Tensor, cross: Tensor, ridge: float = 1e-6) -> list[Link]:
    """The chain with the last link's weights those of the least squares sum |y - K x|^2, the others as they are.

    gram: sum of x x^T [i * k, i * k], cross: of x y^T [i * k, o], over the rows x that the kernel of the whole chain is
    multiplied with (He et al. 2017, section 3.2). The last link must have one group.
    """
    *before, last = links
    width = last.weight[0].numel()
    unit = torch.eye(width, dtype=gram.dtype).view(width, *last.weight.shape[1:])
    features = composed([replace(link, weight=link.weight.double()) for link in (*before, Link("", unit))]).flatten(1)
    found = refit(features @ gram @ features.T, features @ cross, last.weight.flatten(1), ridge)
    return [*before, replace(last, weight=found.view(last.weight.shape).to(last.weight.dtype))]


__all__ = ["Link", "composed", "dense", "of_groups", "refit_last", "side_by_side"]
