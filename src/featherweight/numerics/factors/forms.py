"""The forms that a kernel [o, i, *k] may take as a chain of smaller ones: spectra for the ranks, sizes, factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.numerics import lowrank
from featherweight.numerics.factors.chains import Link
from featherweight.numerics.factors.cp import cp
from featherweight.numerics.least_squares import factor

Ranks = tuple[int, ...]
Shape = tuple[int, ...]
#: of one link: its name, the shape of its weight, its groups
Size = tuple[str, Shape, int]
#: share of the mean of a gram's diagonal that is added to it before its root is taken
RIDGE = 1e-4


@dataclass(frozen=True)
class Decomposition:
    """One form of a chain.

    matrices: for each rank the unfolded kernel, in one part or several, whose singular values say what the rank keeps.
    sizes: the links of the chain for a kernel's shape. factors: their weights, in that order, for a kernel and ranks.
    ``matrices`` and ``factors`` take the gram [i * k, i * k] of what the kernel is multiplied with (None: all inputs
    are alike), by which the error is that of the outputs. exact: without a gram, the squared error is the energy that
    the one spectrum loses. lower: the ranks that others of them allow. most: the full ranks of a kernel's
    shape, where ``matrices`` do not say them.
    """

    matrices: Callable[[Tensor, Tensor | None], list[list[Tensor]]]
    sizes: Callable[[Shape, Ranks], list[Size]]
    factors: Callable[[Tensor, Ranks, Tensor | None], list[Tensor]]
    exact: bool = False
    most: Callable[[Shape], Ranks] | None = None
    lower: Callable[[Shape, Ranks], Ranks] = lambda shape, ranks: ranks

    def links(self, kernel: Tensor, ranks: Ranks, gram: Tensor | None = None) -> list[Link]:
        """The chain that takes the kernel's place, in the dtype of ``kernel``."""
        made = self.factors(kernel, ranks, gram)
        return [Link(name, weight.reshape(shape).to(kernel.dtype).contiguous(), groups)
                for (name, shape, groups), weight in zip(self.sizes(tuple(kernel.shape), ranks), made, strict=True)]

    def full(self, shape: Shape) -> Ranks:
        """The full ranks of a kernel of this shape: its chain is then the kernel itself."""
        if self.most is not None:
            return self.most(shape)
        return tuple(min(parts[0].shape) for parts in self.matrices(torch.empty(shape, device="meta"), None))

    def within(self, shape: Shape, ranks: Ranks) -> Ranks:
        """The ranks, lowered where a kernel of this shape, or the other ranks, allow no more."""
        return self.lower(shape, tuple(max(1, min(r, most)) for r, most in zip(ranks, self.full(shape), strict=True)))

    def spectra(self, kernel: Tensor, gram: Tensor | None = None) -> list[Tensor]:
        """For each rank the singular values, float64, descending; of several parts the root of the sum of squares."""
        return [torch.stack([lowrank.singular_values(part) for part in parts]).square().sum(0).sqrt()
                for parts in self.matrices(kernel, gram)]


def pointwise(shape: Shape) -> bool:
    """Whether a kernel is 1x1 (or a matrix): every form is then the singular value decomposition."""
    return math.prod(shape[2:]) == 1


# ---- what the inputs say
def channel_gram(kernel: Tensor, gram: Tensor | None) -> Tensor | None:
    """The gram of a kernel's input channels [i, i], summed over the places that it looks at."""
    if gram is None:
        return None
    i = kernel.shape[1]
    found: Tensor = gram.view(i, gram.shape[0] // i, i, -1).diagonal(dim1=1, dim2=3).sum(-1)
    return found


def times_root(matrix: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``matrix`` [..., i] times the root S of the gram = S S^T (its errors are then those of outputs), and S."""
    if gram is None:
        return matrix, None
    root = factor(gram, RIDGE)
    return matrix.double() @ root, root


def without_root(matrix: Tensor, root: Tensor | None) -> Tensor:
    """Undoes ``times_root`` in the first link [..., i]."""
    return matrix if root is None else torch.linalg.solve_triangular(root, matrix.double(), upper=False, left=False)


def weighed(kernel: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A kernel [o, i, *k] with the root of its input channels' gram multiplied into it, and that root."""
    made, root = times_root(kernel.movedim(1, -1), channel_gram(kernel, gram))
    return made.movedim(-1, 1), root


def _first(weight: Tensor, root: Tensor | None) -> Tensor:
    """Undoes ``weighed`` in the first link [r, i, *k]."""
    return weight if root is None else without_root(weight.movedim(1, -1), root).movedim(-1, 1)


# ---- singular values: of the matrix [o, i * k], as k x k and 1 x 1
def _svd_sizes(shape: Shape, ranks: Ranks) -> list[Size]:
    return [("reduce", (ranks[0], *shape[1:]), 1), ("expand", (shape[0], ranks[0], *_ones(shape)), 1)]


def _svd(kernel: Tensor, ranks: Ranks, gram: Tensor | None) -> list[Tensor]:
    made, root = times_root(kernel.flatten(1), gram)
    a, b = lowrank.split(made, ranks[0])
    return [without_root(a, root), b]


def _flat(kernel: Tensor, gram: Tensor | None) -> list[list[Tensor]]:
    return [[times_root(kernel.flatten(1), gram)[0]]]


# ---- the same in parts of the input channels, each of the same rank (Liebenwein et al. 2021, "Compressing neural
# ---- networks: towards determining the optimal layer-wise decomposition", section 2)
def in_parts(count: int | None) -> Decomposition:
    """The grouped form of this many parts, which must divide the input channels; None: one part a channel."""

    def sizes(shape: Shape, ranks: Ranks) -> list[Size]:
        parts = count or shape[1]
        whole = parts * ranks[0]
        return [("reduce", (whole, shape[1] // parts, *shape[2:]), parts),
                ("expand", (shape[0], whole, *_ones(shape)), 1)]

    def split(kernel: Tensor, gram: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        parts = count or kernel.shape[1]
        width = kernel[0].numel() // parts
        own = [slice(p * width, (p + 1) * width) for p in range(parts)]
        return [(kernel.flatten(1)[:, mine], None if gram is None else gram[mine, mine]) for mine in own]

    def factors(kernel: Tensor, ranks: Ranks, gram: Tensor | None) -> list[Tensor]:
        pairs = [_svd(part, ranks, mine) for part, mine in split(kernel, gram)]
        return [torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1)]

    return Decomposition(lambda kernel, gram: [[times_root(*part)[0] for part in split(kernel, gram)]], sizes, factors,
                         exact=True)


# ---- spatial: k x 1 and 1 x k (Jaderberg et al. 2014, scheme 2; the closed form of Tai et al. 2016)
def _unfold_space(kernel: Tensor) -> Tensor:
    """[(i, first axis), (o, other axes)]."""
    o, i = kernel.shape[:2]
    return kernel.reshape(o, i, kernel.shape[2], -1).permute(1, 2, 0, 3).reshape(i * kernel.shape[2], -1)


def _spatial_sizes(shape: Shape, ranks: Ranks) -> list[Size]:
    o, i, first, *rest = shape
    return [("reduce", (ranks[0], i, first, *[1] * len(rest)), 1), ("expand", (o, ranks[0], 1, *rest), 1)]


def _spatial(kernel: Tensor, ranks: Ranks, gram: Tensor | None) -> list[Tensor]:
    o, i, first = kernel.shape[:3]
    made, root = weighed(kernel, gram)
    right, left = lowrank.split(_unfold_space(made), ranks[0])
    reduce = _first(left.T.reshape(ranks[0], i, first), root)
    return [reduce, right.reshape(ranks[0], o, -1).transpose(0, 1)]


# ---- Tucker-2 (Kim et al. 2016): a factor of full rank is multiplied into the core, unless both are
def left_out(shape: Shape, ranks: Ranks) -> str:
    """Which of "reduce" and "expand" is not needed: its rank is full and the other's is not; "" for none."""
    if (ranks[0] == shape[0]) == (ranks[1] == shape[1]):
        return ""
    return "expand" if ranks[0] == shape[0] else "reduce"


def _tucker_sizes(shape: Shape, ranks: Ranks) -> list[Size]:
    (o, i), (p, q), ones = shape[:2], ranks, _ones(shape)
    whole = [("reduce", (q, i, *ones), 1), ("core", (p, q, *shape[2:]), 1), ("expand", (o, p, *ones), 1)]
    return [size for size in whole if size[0] != left_out(shape, ranks)]


def _tucker_matrices(kernel: Tensor, gram: Tensor | None) -> list[list[Tensor]]:
    made = weighed(kernel, gram)[0]
    return [[lowrank.unfold(made, 0)], [lowrank.unfold(made, 1)]]


def _tucker(kernel: Tensor, ranks: Ranks, gram: Tensor | None) -> list[Tensor]:
    made, root = weighed(kernel, gram)
    a, core, b = lowrank.tucker2(made, *ranks)
    a, missing = without_root(a, root).to(core.dtype), left_out(tuple(kernel.shape), ranks)
    if missing == "expand":
        return [a, torch.einsum("op,p...->o...", b, core)]
    return [torch.einsum("pq...,qi->pi...", core, a), b] if missing else [a, core, b]


# ---- CP (Lebedev et al. 2015; the axes of space as one): 1 x 1, one k x k filter a channel, 1 x 1
def _cp_sizes(shape: Shape, ranks: Ranks) -> list[Size]:
    (o, i), r, ones = shape[:2], ranks[0], _ones(shape)
    return [("reduce", (r, i, *ones), 1), ("core", (r, 1, *shape[2:]), r), ("expand", (o, r, *ones), 1)]


def _cp_most(shape: Shape) -> Ranks:
    o, i, k = shape[0], shape[1], math.prod(shape[2:])
    return (min(o * i, i * k, o * k),)


def _cp(kernel: Tensor, ranks: Ranks, gram: Tensor | None) -> list[Tensor]:
    made, root = weighed(kernel, gram)
    b, a, core = cp(made.flatten(2), ranks[0])
    return [without_root(a.T, root), core.T, b]


# ---- tensor train (Oseledets 2011) along i, the axes of space, o: 1 x 1, k x 1, 1 x k, 1 x 1
def _train(kernel: Tensor) -> Tensor:
    """The kernel with its output channels last: [i, *k, o]."""
    return kernel.movedim(0, -1)


def _train_matrices(kernel: Tensor, gram: Tensor | None) -> list[list[Tensor]]:
    turned = _train(weighed(kernel, gram)[0])
    return [[turned.flatten(0, d).flatten(1)] for d in range(turned.dim() - 1)]


def _train_sizes(shape: Shape, ranks: Ranks) -> list[Size]:
    (o, i), space = shape[:2], shape[2:]
    cores = [(f"core{d}", (ranks[d], ranks[d - 1], *[k if e == d - 1 else 1 for e in range(len(space))]), 1)
             for d, k in enumerate(space, 1)]
    return [("reduce", (ranks[0], i, *_ones(shape)), 1), *cores, ("expand", (o, ranks[-1], *_ones(shape)), 1)]


def _train_lower(shape: Shape, ranks: Ranks) -> Ranks:
    """Behind an axis of length k the rank is at most k times the one before it."""
    found = [ranks[0]]
    for size, rank in zip(shape[2:], ranks[1:], strict=True):
        found.append(min(rank, found[-1] * size))
    return tuple(found)


def _train_factors(kernel: Tensor, ranks: Ranks, gram: Tensor | None) -> list[Tensor]:
    made, root = weighed(kernel, gram)
    rest, before, found = _train(made), 1, []
    for size, rank in zip(rest.shape[:-1], ranks, strict=True):
        rest, core = lowrank.split(rest.reshape(before * size, -1), rank)
        found.append(core.reshape(before, size, rank).permute(2, 0, 1))  # [rank, before, size]
        before = rank
    return [without_root(found[0][:, 0], root), *found[1:], rest.T]


def _ones(shape: Sequence[int]) -> list[int]:
    return [1] * (len(shape) - 2)


# ---- 1 x 1 to few channels, k x k (the squeeze of Iandola et al. 2016, "SqueezeNet")
def _squeeze_sizes(shape: Shape, ranks: Ranks) -> list[Size]:
    return [("reduce", (ranks[0], shape[1], *_ones(shape)), 1), ("core", (shape[0], ranks[0], *shape[2:]), 1)]


def _squeeze(kernel: Tensor, ranks: Ranks, gram: Tensor | None) -> list[Tensor]:
    made, root = weighed(kernel, gram)
    right, left = lowrank.split(lowrank.unfold(made, 1), ranks[0])  # [i, (o, k)]
    core = right.reshape(ranks[0], made.shape[0], *made.shape[2:]).transpose(0, 1)
    return [without_root(left.T, root), core]


SVD = Decomposition(_flat, _svd_sizes, _svd, exact=True)
#: parts that the grouped form is tried in
PARTS = (2, 3, 4, 5)
#: name -> form
FORMS: dict[str, Decomposition] = {
    "svd": SVD,
    "spatial": Decomposition(lambda kernel, gram: [[_unfold_space(weighed(kernel, gram)[0])]], _spatial_sizes, _spatial,
                             exact=True),
    "tucker2": Decomposition(_tucker_matrices, _tucker_sizes, _tucker),
    "cp": Decomposition(lambda kernel, gram: [[weighed(kernel, gram)[0].flatten(1)]], _cp_sizes, _cp, most=_cp_most),
    "tt": Decomposition(_train_matrices, _train_sizes, _train_factors, lower=_train_lower),
    "squeeze": Decomposition(lambda kernel, gram: [[lowrank.unfold(weighed(kernel, gram)[0], 1)]], _squeeze_sizes,
                             _squeeze, exact=True),
    "separable": in_parts(None),
    **{f"grouped{parts}": in_parts(parts) for parts in PARTS},
}
