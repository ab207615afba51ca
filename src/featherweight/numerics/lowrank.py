"""Low-rank fronts: a matrix or a convolution kernel as a product of smaller ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values of ``matrix`` [o, i], float64, descending, exact to 1e-8 of the largest.

    Roots of the eigenvalues of the smaller Gram matrix: many times faster than a decomposition where one side is long.
    """
    wide = matrix.detach().double()
    wide = wide if wide.shape[0] <= wide.shape[1] else wide.T
    values: Tensor = torch.linalg.eigvalsh(wide @ wide.T)
    return values.flip(0).clamp_min(0).sqrt()


def unfold(kernel: Tensor, mode: int) -> Tensor:
    """``kernel`` as a matrix with axis ``mode`` as rows: [o, i, h, w], mode 1 -> [i, o*h*w]."""
    return kernel.movedim(mode, 0).reshape(kernel.shape[mode], -1)


def rank_by_energy(values: Tensor, energy: float) -> int:
    """The smallest rank (at least 1) whose singular values keep ``energy`` (0..1) of the sum of all squares.

    By Eckart and Young 1936 what is not kept is the squared error of the best approximation of that rank, so
    ``energy`` = 1 - relative squared error. ``values``: singular values, descending.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy {energy}; expected more than 0, at most 1")
    squares = values.double() ** 2
    lost = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])  # lost[r]: the squares beyond rank r
    return max(1, int((lost > (1 - energy) * lost[0]).sum()))


def split(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``matrix`` [o, i] ~ B [o, r] @ A [r, i]; returns (A, B), in the dtype of ``matrix``.

    The singular value decomposition cut at ``rank`` is the best of that rank (Eckart and Young 1936); each factor takes
    the root of the singular values, so that both are of one size and train at one rate.
    """
    u, s, vh = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
    u, vh = _signed(u, vh)
    root = s[:rank].sqrt()
    a, b = (root[:, None] * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous()
    return a.to(matrix.dtype), b.to(matrix.dtype)


def _signed(u: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """The decomposition with the largest entry of each column of ``u`` positive: one answer, not one of many."""
    peak = torch.gather(u, 0, u.abs().argmax(0, keepdim=True)).squeeze(0)
    sign = torch.where(peak < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, vh * sign[:, None]


def tucker2(kernel: Tensor, rank_o: int, rank_i: int, rounds: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """``kernel`` [o, i, ...] ~ core [p, q, ...] times B [o, p] on axis 0 and A [q, i] on axis 1; returns (A, core, B).

    Tucker decomposition on the channel modes alone (Kim et al. 2016, eq. 4): a convolution becomes 1x1 (A), core,
    1x1 (B). Started from the truncated higher-order SVD, whose squared error is at most what both unfoldings lose (De
    Lathauwer et al. 2000), and refined by ``rounds`` of orthogonal iteration (tensorly); the first brings nearly all
    there is to gain. B and A have orthonormal columns and rows; float64 inside, results in the dtype of ``kernel``.
    """
    import tensorly  # with scipy behind it, as costly to import as half of torch
    from tensorly.decomposition import partial_tucker

    with tensorly.backend_context("pytorch", local_threadsafe=True), torch.no_grad():
        (core, (out, into)), _ = partial_tucker(kernel.detach().double(), rank=[rank_o, rank_i], modes=[0, 1],
                                                init="svd", svd=_leading, n_iter_max=rounds)
    return (into.T.contiguous().to(kernel.dtype), core.contiguous().to(kernel.dtype), out.contiguous().to(kernel.dtype))


def _leading(matrix: Tensor, n_eigenvecs: int, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The leading left singular vectors by the Gram matrix, for tensorly, which uses no others."""
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    u = vectors.flip(1)[:, :n_eigenvecs]
    return u, values.flip(0)[:n_eigenvecs].clamp_min(0).sqrt(), u.T @ matrix
