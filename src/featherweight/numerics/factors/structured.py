"""Structured matrices: of each kind the nearest to a given matrix [o, i], in closed form or by turns that only gain."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from featherweight.numerics.factors.forms import times_root, without_root
from featherweight.numerics.lowrank import split

TURNS = 10  #: of what is fitted by turns


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


def fourier(size: int) -> tuple[Tensor, Tensor]:
    """The real Fourier transform as matrices, float64: there [2 f, size], the real and the imaginary part of each of
    the f = size // 2 + 1 frequencies; and back [size, 2 f]."""
    frequencies, places = torch.arange(size // 2 + 1).double(), torch.arange(size).double()
    angles = 2 * torch.pi * frequencies[:, None] * places / size
    there = torch.stack([angles.cos(), -angles.sin()], 1).flatten(0, 1)
    twice = torch.where((frequencies == 0) | (2 * frequencies == size), 1.0, 2.0).double() / size
    return there, (twice.repeat_interleave(2)[:, None] * there).T.contiguous()


def displaced(matrix: Tensor, size: int, terms: int) -> tuple[Tensor, Tensor]:
    """Blocks of ``size`` x ``size`` of low displacement rank: the sum over t of Z_1(g_t) Z_-1(h_t), a circulant times a
    skew-circulant matrix (Sindhwani et al. 2015, "Structured transforms", eq. 6; of two terms every Toeplitz matrix).

    Begins with the singular vectors of Z_1 M - M Z_-1 (theorem 3.1); then g and h by turns are the least squares for
    the other, which under Fourier transforms are equations of ``terms`` unknowns each, one for every frequency. Near,
    not always nearest. Returns g and h, [o / size, i / size, terms, size], of the same norms: a training moves both.
    """
    o, i = matrix.shape
    blocks = matrix.double().reshape(o // size, size, i // size, size).transpose(1, 2)
    moved = torch.cat([blocks[..., 1:], -blocks[..., :1]], -1)
    u, values, v = torch.linalg.svd(blocks.roll(1, -2) - moved)
    g = (u * values[..., None, :] / 2).mT[..., :terms, :].contiguous()
    h = v[..., :terms, :].flip(-1).contiguous()
    turn = torch.exp(torch.arange(size) * (1j * torch.pi / size)).to(matrix.device)
    for _ in range(TURNS):
        g = _by_frequency(blocks, _f_circulant(h, -1), torch.ones_like(turn))
        mirrored = _by_frequency(blocks.mT, _f_circulant(g, 1).mT, turn)
        h = torch.cat([mirrored[..., :1], -mirrored[..., 1:].flip(-1)], -1)
    scale = (h.norm(dim=-1, keepdim=True) / g.norm(dim=-1, keepdim=True).clamp_min(1e-300)).sqrt()
    return (g * scale).to(matrix.dtype), (h / scale.clamp_min(1e-300)).to(matrix.dtype)


def _by_frequency(blocks: Tensor, factors: Tensor, turn: Tensor) -> Tensor:
    """v [..., t, n] for which the sum over t of Z(v_t) ``factors`` [..., t, n, n] is nearest to ``blocks`` [..., n, n],
    Z being circulant or, with D = diag(``turn``), powers of the n-th root of -1, skew-circulant: F D Z(v) =
    diag(F D v) F D."""
    wanted = torch.fft.fft(turn[:, None] * blocks, dim=-2)
    rows = torch.fft.fft(turn[:, None] * factors, dim=-2).movedim(-3, -1)  # [..., frequency, column, t]
    square = rows.mH @ rows
    ridge = 1e-12 * square.diagonal(dim1=-2, dim2=-1).real.amax((-1, -2), keepdim=True)[..., None].clamp_min(1e-300)
    eye = torch.eye(square.shape[-1], device=blocks.device)
    found = torch.linalg.solve(square + ridge * eye, rows.mH @ wanted[..., None])[..., 0]
    real: Tensor = (turn.conj() * torch.fft.ifft(found.mT, dim=-1)).real
    return real


def _f_circulant(columns: Tensor, sign: int) -> Tensor:
    """[..., n, n] with the first columns [..., n]; what is wrapped around has this sign."""
    size = columns.shape[-1]
    signs = torch.where(torch.ones(size, size).triu(1) > 0, sign, 1).to(columns)
    return columns[..., wrapped(size).to(columns.device)] * signs


def of_displaced(g: Tensor, h: Tensor) -> Tensor:
    """The matrix [o, i] of the sums of circulant times skew-circulant blocks."""
    blocks = (_f_circulant(g, 1) @ _f_circulant(h, -1)).sum(2)
    size = g.shape[-1]
    return blocks.transpose(1, 2).reshape(g.shape[0] * size, g.shape[1] * size)


def sparse(matrix: Tensor, rank: int, share: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A matrix of low rank and single weights beside it: A B + S (GoDec: Zhou and Tao 2011, eq. 4, by turns).

    Returns B [rank, i], A [o, rank], the places [k] of the ``share`` of the weights that S has, in row-major order, and
    what stands there. The error never rises from that of the nearest matrix of this rank.
    """
    wide = matrix.double()
    count = max(1, round(share * wide.numel()))
    rest = torch.zeros_like(wide)
    for _ in range(TURNS):
        b, a = split(wide - rest, rank)
        left = (wide - a @ b).flatten()
        place = left.abs().topk(count).indices.sort().values
        rest = torch.zeros_like(left).scatter(0, place, left[place]).view(wide.shape)
    return b.to(matrix.dtype), a.to(matrix.dtype), place.to(torch.int32), left[place].to(matrix.dtype)


def of_sparse(b: Tensor, a: Tensor, place: Tensor, rest: Tensor) -> Tensor:
    """The matrix [o, i] of low rank and single weights."""
    whole = (a @ b).flatten()
    return whole.scatter_add(0, place.long(), rest.to(whole)).view(a.shape[0], b.shape[1])


def closer(make: Callable[[Sequence[Tensor]], Tensor], parts: Sequence[Tensor], matrix: Tensor, gram: Tensor,
           steps: int = 60) -> list[Tensor]:
    """The ``parts`` (of floats; others stay) after ``steps`` of L-BFGS on tr((W' - W) gram (W' - W)^T), the squared
    error of the outputs for inputs with the second moments ``gram`` [i, i]; W' = make(parts) [o, i]. Never worse than
    before."""
    given = [p.double().clone().requires_grad_() if p.is_floating_point() else p for p in parts]
    wide, moments = matrix.double(), gram.double()
    norm = ((wide @ moments) * wide).sum().clamp_min(1e-300)
    learned = [p for p in given if p.requires_grad]
    optimizer = torch.optim.LBFGS(learned, max_iter=steps, line_search_fn="strong_wolfe")

    def lost() -> Tensor:
        away = make(given) - wide
        return ((away @ moments) * away).sum() / norm

    def closure() -> Tensor:
        optimizer.zero_grad()
        error = lost()
        error.backward()  # type: ignore[no-untyped-call]
        return error

    with torch.enable_grad():
        before = float(lost().detach())
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    kept = float(lost().detach()) <= before
    return [g.detach().to(p.dtype) if kept else p for g, p in zip(given, parts, strict=True)]


__all__ = ["circulant", "closer", "displaced", "fourier", "kronecker", "monarch", "of_circulant", "of_displaced",
           "of_kronecker", "of_monarch", "of_sparse", "sparse", "wrapped"]
