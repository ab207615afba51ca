"""Structured matrices: the nearest of each kind to a given matrix [o, i], all in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.numerics.factors.forms import times_root, without_root
from featherweight.numerics.lowrank import split


def monarch(matrix: Tensor, blocks: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Two block-diagonal matrices with a shuffle between (Dao et al. 2022, "Monarch", section 3.2).

    matrix[(s, q), (k, j)] ~ L[s, q, k] R[k, s, j] with k, s < ``blocks``: every block (s, k) is the nearest matrix of
    rank one. Returns R [blocks * blocks, i / blocks] (k, then s) and L [o, blocks], the weights of two grouped 1 x 1
    convolutions. gram: of the inputs [i, i]; each block's error is then that of its part of the outputs.
    """
    o, i = matrix.shape
    parts = matrix.reshape(blocks, o // blocks, blocks, i // blocks)
    right = matrix.new_zeros(blocks, blocks, i // blocks)
    left = matrix.new_zeros(blocks, o // blocks, blocks)
    for k in range(blocks):
        mine = slice(k * (i // blocks), (k + 1) * (i // blocks))
        for s in range(blocks):
            made, root = times_root(parts[s, :, k], None if gram is None else gram[mine, mine])
            a, b = split(made, 1)
            right[k, s], left[s, :, k] = without_root(a, root)[0], b[:, 0]
    return right.flatten(0, 1), left.flatten(0, 1)


def of_monarch(right: Tensor, left: Tensor) -> Tensor:
    """The matrix [o, i] of two such factors."""
    blocks = left.shape[1]
    r, m = right.view(blocks, blocks, -1), left.view(blocks, -1, blocks)
    return torch.einsum("sqk,ksj->sqkj", m, r).reshape(left.shape[0], -1)


def kronecker(matrix: Tensor, rows: int, columns: int, terms: int) -> tuple[Tensor, Tensor]:
    """Sum over t of A_t [rows, columns] x B_t [o / rows, i / columns], Kronecker products: the nearest of ``terms`` of
    them (Van Loan and Pitsianis 1993); of several terms a tensor train of two matrices (Novikov et al. 2015).

    Returns A [terms, rows, columns] and B [terms, o / rows, i / columns].
    """
    o, i = matrix.shape
    parts = matrix.reshape(rows, o // rows, columns, i // columns).permute(0, 2, 1, 3)
    b, a = split(parts.reshape(rows * columns, -1), terms)
    return a.T.reshape(terms, rows, columns), b.reshape(terms, o // rows, i // columns)


def of_kronecker(a: Tensor, b: Tensor) -> Tensor:
    """The matrix [o, i] of the sum of Kronecker products."""
    found = torch.einsum("trc,tpq->rpcq", a, b)
    return found.reshape(a.shape[1] * b.shape[1], a.shape[2] * b.shape[2])


def circulant(matrix: Tensor, size: int) -> Tensor:
    """Blocks of ``size`` x ``size`` that are circulant, the nearest: the means of their wrapped diagonals (Ding et al.
    2017, "CirCNN"). Returns the first columns [o / size, i / size, size]."""
    o, i = matrix.shape
    blocks = matrix.reshape(o // size, size, i // size, size).permute(0, 2, 1, 3)
    place = wrapped(size).to(matrix.device)
    found = matrix.new_zeros(o // size, i // size, size)
    return found.index_add_(2, place.flatten(), blocks.flatten(2)) / size


def wrapped(size: int) -> Tensor:
    """[size, size]: which entry of its first column stands at (row, column) of a circulant matrix."""
    steps = torch.arange(size)
    return (steps[:, None] - steps) % size


def of_circulant(columns: Tensor) -> Tensor:
    """The matrix [o, i] of block-circulant first columns."""
    size = columns.shape[2]
    blocks = columns[:, :, wrapped(size).to(columns.device)]
    return blocks.permute(0, 2, 1, 3).reshape(columns.shape[0] * size, columns.shape[1] * size)


__all__ = ["circulant", "kronecker", "monarch", "of_circulant", "of_kronecker", "of_monarch", "wrapped"]
