"""Filters as images of few: each row is a scale times a base filter, turned by one of a group of permutations.

Rows are [n, c, k]: n filters of c channels with windows of k places, or n windows with c = 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 20  #: of assigning and averaging at most


@dataclass(frozen=True)
class Orbits:
    """Row j is ``scale[j] * base[:, :, turns[t]]`` with ``t * len(base) + b = place[j]``.

    base: [m, c, k], of norm 1; place: [n], int64; scale: [n], negative where the image is the negative of its base.
    error: squared, over the square of all rows.
    """

    base: Tensor
    place: Tensor
    scale: Tensor
    error: float

    def rows(self, turns: Tensor) -> Tensor:
        """The rows [n, c, k] that it stands for."""
        return self.scale[:, None, None] * images(self.base, turns)[self.place]


def images(base: Tensor, turns: Tensor) -> Tensor:
    """The base filters [m, c, k] under every permutation of ``turns`` [g, k], one after another: [g * m, c, k]."""
    return base[:, :, turns].permute(2, 0, 1, 3).flatten(0, 1)


def orbits(rows: Tensor, count: int, turns: Tensor) -> Orbits:
    """``count`` base filters by turns: each row takes the image that it has the largest part of, each base becomes the
    first singular vector of the rows that took it, turned back; until nothing changes. The first ones are the rows that
    those before leave the most of. The error falls with every round.
    """
    wide, back = rows.double(), turns.argsort(1)
    turned = images(wide, back).view(len(turns), len(wide), -1)  # every row turned back in every way
    base = _first(wide, count, turns)
    place = torch.full((len(wide),), -1)
    for _ in range(ROUNDS):
        parts = images(base, turns).flatten(1) @ wide.flatten(1).T  # [g * m, n]
        new = parts.abs().argmax(0)
        if torch.equal(new, place):
            break
        place = new
        for b in range(len(base)):
            mine = (place % len(base) == b).nonzero().flatten()
            if len(mine):
                members = turned[place[mine] // len(base), mine]
                base[b] = torch.linalg.svd(members, full_matrices=False).Vh[0].view(base[b].shape)
    parts = images(base, turns).flatten(1) @ wide.flatten(1).T
    scale = parts.gather(0, parts.abs().argmax(0)[None])[0]
    energy = float(wide.square().sum())
    lost = max(energy - float(scale.square().sum()), 0.0) / max(energy, 1e-300)
    return Orbits(base.to(rows.dtype), parts.abs().argmax(0), scale.to(rows.dtype), lost)


def _first(rows: Tensor, count: int, turns: Tensor) -> Tensor:
    left = rows.flatten(1).square().sum(1)
    chosen: list[Tensor] = []
    for _ in range(count):
        best = rows[int(left.argmax())]
        norm = best.norm()
        chosen.append(best / norm if float(norm) > 0 else torch.ones_like(best) / best.numel() ** 0.5)
        parts = images(chosen[-1][None], turns).flatten(1) @ rows.flatten(1).T
        left = torch.minimum(left, rows.flatten(1).square().sum(1) - parts.square().amax(0))
    return torch.stack(chosen)


# ---- the groups
def turns_of(group: str, window: Sequence[int]) -> Tensor:
    """The permutations [g, k] of the places of a window: of "scale" the one that moves nothing; "flips" along every
    axis; "rotations" by quarters of two equal axes; "dihedral", both."""
    places = torch.arange(torch.Size(window).numel()).view(*window)
    every = range(len(window))
    flips = [places.flip(axes) for n in range(len(window) + 1) for axes in itertools.combinations(every, n)]
    groups: dict[str, Callable[[], list[Tensor]]] = {
        "scale": lambda: [places], "flips": lambda: flips,
        "rotations": lambda: [places.rot90(k) for k in range(4)],
        "dihedral": lambda: [turned for k in range(4) for turned in (places.rot90(k), places.rot90(k).flip(0))]}
    return torch.tensor(sorted({tuple(found.flatten().tolist()) for found in groups[group]()}))


GROUPS = ("scale", "flips", "rotations", "dihedral")

__all__ = ["GROUPS", "Orbits", "images", "orbits", "turns_of"]
