"""Which weights stay: patterns (single weights, N:M, blocks), and how a sparsity is shared out over tensors.

Weights are seen as matrices [o, i]: o outputs, i = all that one output reads (inputs x kernel positions,
the latter innermost).
Scores: higher = keep; -inf goes before all others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.errors import RecipeError

ALLOCATIONS = ("global", "layer", "erk", "output")


@dataclass(frozen=True)
class Pattern:
    """The units that go as one: blocks of ``rows`` x ``columns`` weights, from the matrix's first corner.

    of: 0, or the length M of the groups along the inputs in an n:m pattern, of which the same number is kept
    everywhere, ``keep`` in the end. What is left over at the matrix's ends belongs to no unit and always stays.
    """

    rows: int = 1
    columns: int = 1
    keep: int = 0
    of: int = 0

    def whole(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns [o', i'] of a matrix of ``shape`` [o, i] that lie in units."""
        width = self.of or self.columns
        return shape[0] // self.rows * self.rows, shape[1] // width * width

    def units(self, scores: Tensor) -> Tensor:
        """[o, i] -> the mean score of each unit [o / rows, i / columns], ends left out."""
        o, i = self.whole((scores.shape[0], scores.shape[1]))
        if self.rows == self.columns == 1:
            return scores[:o, :i]
        return scores[:o, :i].reshape(o // self.rows, self.rows, i // self.columns, self.columns).mean((1, 3))

    def spread(self, units: Tensor, shape: tuple[int, int]) -> Tensor:
        """The mask [o, i] of the weights, given that of the units; True at the ends."""
        mask = torch.ones(shape, dtype=torch.bool, device=units.device)
        o, i = self.whole(shape)
        mask[:o, :i] = units.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)
        return mask


def pattern_of(text: str) -> Pattern:
    """ "single", "N:M" (N kept of each M) or "block:RxC". Raises RecipeError for anything else."""
    if text == "single":
        return Pattern()
    if found := re.fullmatch(r"(\d+):(\d+)", text):
        keep, of = int(found[1]), int(found[2])
        if 0 < keep < of:
            return Pattern(keep=keep, of=of)
    if (found := re.fullmatch(r"block:(\d+)x(\d+)", text)) and int(found[1]) and int(found[2]):
        return Pattern(rows=int(found[1]), columns=int(found[2]))
    raise RecipeError(f"Weights has no pattern {text!r}; expected \"single\", \"N:M\" with N kept of each M, as in "
                      "pattern=\"2:4\", or \"block:RxC\", as in pattern=\"block:4x1\"")


def lowest(scores: Tensor, count: int) -> Tensor:
    """A mask of the shape of ``scores``: False at the ``count`` lowest, of equal ones the first."""
    if count <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    limit = flat.kthvalue(count).values
    below, equal = flat < limit, flat == limit
    first = equal & (equal.cumsum(0) <= count - below.sum())
    return ~(below | first).view(scores.shape)


def lowest_of_rows(scores: Tensor, count: int) -> Tensor:
    """The same in each row [..., k] by itself."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    return mask.scatter_(-1, scores.argsort(dim=-1, stable=True)[..., :count], False)


def of_groups(scores: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """The mask [o, i'] of an n:m pattern: in each group of M along the inputs the same number goes."""
    groups = scores.unflatten(1, (-1, pattern.of))  # type: ignore[no-untyped-call]
    gone = min(round(sparsity * pattern.of), pattern.of - pattern.keep)
    return lowest_of_rows(groups, gone).flatten(1)


def masks_of(scores: Mapping[str, Tensor], dims: Mapping[str, int], pattern: Pattern, sparsity: float,
             allocation: str) -> dict[str, Tensor]:
    """Masks of the matrices ``scores`` [o, i]: of the weights in whole units, ``sparsity`` of them zero.

    dims: the sum of each weight's sizes, for "erk". allocation: "global" ranks all units together, "layer" takes the
    same share of every matrix, "output" of every row of units, "erk" the shares of ``erk``. An n:m pattern takes the
    same of every group, whatever the allocation.
    """
    units = {n: pattern.units(s) for n, s in scores.items()}
    if pattern.of:
        chosen = {n: of_groups(u, pattern, sparsity) if u.numel() else u.bool() for n, u in units.items()}
    else:
        chosen = SHARES[allocation](units, dims, sparsity)
    return {n: pattern.spread(chosen[n], (s.shape[0], s.shape[1])) for n, s in scores.items()}


Units = Mapping[str, Tensor]


def _global(units: Units, dims: Mapping[str, int], sparsity: float) -> dict[str, Tensor]:
    if not units:
        return {}
    flat = torch.cat([u.flatten() for u in units.values()])
    parts = torch.split(lowest(flat, round(sparsity * len(flat))), [u.numel() for u in units.values()])
    return {n: p.view(u.shape) for (n, u), p in zip(units.items(), parts, strict=True)}


def _layer(units: Units, dims: Mapping[str, int], sparsity: float) -> dict[str, Tensor]:
    return {n: lowest(u, round(sparsity * u.numel())) for n, u in units.items()}


def _output(units: Units, dims: Mapping[str, int], sparsity: float) -> dict[str, Tensor]:
    return {n: lowest_of_rows(u, round(sparsity * u.shape[1])) for n, u in units.items()}


def _erk(units: Units, dims: Mapping[str, int], sparsity: float) -> dict[str, Tensor]:
    shares = erk({n: u.numel() for n, u in units.items()}, dims, sparsity)
    return {n: lowest(u, round(shares[n] * u.numel())) for n, u in units.items()}


SHARES: dict[str, Callable[[Units, Mapping[str, int], float], dict[str, Tensor]]] = {
    "global": _global, "layer": _layer, "output": _output, "erk": _erk}


def erk(sizes: Mapping[str, int], dims: Mapping[str, int], sparsity: float) -> dict[str, float]:
    """Sparsity 0..1 of every tensor, ``sparsity`` all together, by Erdős–Rényi kernel (Evci et al. 2020, section 3).

    sizes: how many can go of each tensor; dims: the sum of its sizes o + i + h + w. The density of a tensor is
    proportional to dims / size; one that would come above 1 is left dense, and the others make up for it.
    """
    dense: set[str] = {n for n, size in sizes.items() if not size}
    kept = (1 - sparsity) * sum(sizes.values())
    while True:
        rest = [n for n in sizes if n not in dense]
        scale = (kept - sum(sizes[n] for n in dense)) / max(sum(dims[n] for n in rest), 1)
        over = {n for n in rest if scale * dims[n] > sizes[n]}
        if not over:
            return {n: 0.0 if n in dense else 1 - scale * dims[n] / sizes[n] for n in sizes}
        dense |= over
