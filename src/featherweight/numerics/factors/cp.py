"""The CP decomposition of a kernel, a sum of products of three vectors, kept from terms that cancel each other.

Least squares alone end in huge terms of opposite sign, and training from there fails (Lebedev et al. 2015). Phan et al.
2020, "Stable low-rank tensor decomposition for compression of convolutional neural network", section 3: of all
decompositions whose error is within a bound, that of the least norm of its terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: sweeps of least squares, sweeps that lessen the norm, and by how much of itself the squared error may rise for that
SWEEPS, CORRECTIONS, SLACK = 60, 10, 0.01
Factors = list[Tensor]


def cp(tensor: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """``tensor`` [o, i, k] ~ sum over r of A[:, r] x B[:, r] x C[:, r]; returns (A, B, C), every term's norm spread
    evenly over its three vectors; deterministic; in the dtype of ``tensor``.

    Least squares by tensorly, then sweeps of ``bounded``.
    """
    wide = tensor.detach().double()
    factors = least_squares(wide, rank)
    error = (wide - rebuilt(factors)).square().sum()
    bound = float((1 + SLACK) * error + 1e-12 * wide.square().sum())
    for _ in range(CORRECTIONS):
        for mode in range(3):
            factors = bounded(wide, factors, mode, bound)
    return tuple(f.to(tensor.dtype).contiguous() for f in balanced(factors))  # type: ignore[return-value]


def least_squares(tensor: Tensor, rank: int) -> Factors:
    """The factors by alternating least squares alone, started at the singular vectors of each unfolding, and at random
    beyond those that there are."""
    import tensorly
    from tensorly.decomposition import parafac

    generator, start = torch.Generator().manual_seed(0), []
    for mode, size in enumerate(tensor.shape):
        found = torch.linalg.svd(tensor.movedim(mode, 0).reshape(size, -1), full_matrices=False).U[:, :rank]
        more = torch.randn(size, rank - found.shape[1], generator=generator, dtype=tensor.dtype).to(tensor.device)
        start.append(torch.cat([found, more / size ** 0.5], 1))
    with tensorly.backend_context("pytorch", local_threadsafe=True), torch.no_grad():
        ridge = 1e-9 * float(tensor.square().sum()) ** (2 / 3)  # the normal equations may have no inverse
        weights, factors = parafac(tensor, rank, n_iter_max=SWEEPS, init=(tensor.new_ones(rank), start), tol=1e-7,
                                   l2_reg=ridge)
    return [factors[0] * weights, *factors[1:]]


def rebuilt(factors: Factors) -> Tensor:
    """The tensor [o, i, k] that the factors stand for."""
    return torch.einsum("or,ir,kr->oik", *factors)


def sensitivity(factors: Factors) -> float:
    """Sum over terms of the squares of their norms: what cancelling terms make large."""
    return float(torch.stack([f.square().sum(0) for f in factors]).prod(0).sum())


def balanced(factors: Factors) -> Factors:
    """The same terms, the three vectors of each of one length."""
    norms = torch.stack([f.norm(dim=0) for f in factors]).clamp_min(1e-150)
    size = norms.prod(0) ** (1 / 3)
    return [f / n * size for f, n in zip(factors, norms, strict=True)]


def bounded(tensor: Tensor, factors: Factors, mode: int, bound: float) -> Factors:
    """The factors with that of one mode the smallest whose squared error is at most ``bound`` (Phan et al., eq. 8).

    With the other factors' columns of length 1 the norm of a column is that of its term. min |A|^2 with |T - A Z^T|^2
    <= bound is ridge regression, the ridge as large as the bound allows. Where no ridge meets it, all stays.
    """
    others = [f / f.norm(dim=0).clamp_min(1e-150) for m, f in enumerate(factors) if m != mode]
    unfolded = tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)
    products = (others[0][:, None] * others[1][None]).reshape(-1, others[0].shape[1])
    values, vectors = torch.linalg.eigh(products.T @ products)
    values = values.clamp_min(0)
    target = unfolded @ products @ vectors
    total, squares = float(tensor.square().sum()), target.square().sum(0)

    def error(ridge: float) -> float:
        return total - float((squares * (values + 2 * ridge) / (values + ridge) ** 2).sum())

    low, high = 1e-12 * float(values.max()), float(values.max()) * 1e3
    if error(low) > bound:
        return factors
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if error(middle) <= bound else (low, middle)
    found = (target / (values + low)) @ vectors.T
    result = list(others)
    result.insert(mode, found)
    return result


__all__ = ["balanced", "bounded", "cp", "rebuilt", "sensitivity"]
