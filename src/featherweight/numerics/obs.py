"""Optimal brain surgery for one layer: what is decided about some weights, the others make up for.

A layer gives y = W x; its error on calibration data is tr((W' - W) H (W' - W)^T) with H = sum of x x^T [i, i] over the
inputs. SparseGPT (Frantar & Alistarh 2023, algorithm 1) and GPTQ (Frantar et al. 2023, algorithm 1) are the same sweep
over columns and differ in what they decide of a column, which is an argument here. Leading axes are independent layers
(the groups of a convolution).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: (column inside the decided ones, its values [..., o]) -> the values it gets
Rule = Callable[[int, Tensor], Tensor]
#: (first column, weights as they stand [..., o, b], spread [..., b]) -> a rule for these b columns. Taking the weight w
#: of column j away raises the error by (w / spread[j])^2
Decide = Callable[[int, Tensor, Tensor], Rule]
#: columns after which what was decided is passed on to all the others
LAZY = 128
#: numbers that ``least_squares`` may hold in its systems at once
HELD = 1 << 25


def damped(hessian: Tensor, damp: float) -> Tensor:
    """``hessian`` [..., i, i] with ``damp`` times the mean of its diagonal added there (1 where it is all zero)."""
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)
    extra = torch.where(mean > 0, damp * mean, 1.0)
    return hessian + extra[..., None, None] * torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """Upper triangular U [..., i, i] with U^T U = inverse of the damped hessian.

    Its row j, from column j on, is row 0 of the inverse of H[j:, j:] divided by U[j, j]; U[j, j]^2 is that inverse's
    first element: all that a sweep from left to right needs.
    """
    turned = damped(hessian, damp).flip(-1, -2)
    lower: Tensor = torch.linalg.cholesky(turned)
    one = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device).expand_as(hessian)
    upper: Tensor = torch.linalg.solve_triangular(lower.flip(-1, -2), one, upper=True)
    return upper


def sweep(weight: Tensor, hessian: Tensor, decide: Decide, every: int = LAZY, damp: float = 0.01) -> Tensor:
    """New values of ``weight`` [..., o, i]: columns are decided from left to right, those right of one make up for it.

    hessian: [..., i, i], sum of x x^T over the inputs; its scale does not matter. decide: called at every ``every``-th
    column with the weights as they then stand. damp: share of the hessian's mean diagonal that is added to it.

    Computed and given in the hessian's dtype. A ``decide`` that gives columns back unchanged gives ``weight`` back.
    """
    work = weight.to(hessian.dtype).clone()
    upper = inverse_factor(hessian, damp)
    spread = upper.diagonal(dim1=-2, dim2=-1)
    width, lazy = work.shape[-1], every * max(1, LAZY // every)
    for start in range(0, width, lazy):
        stop = min(start + lazy, width)
        errors = torch.empty_like(work[..., start:stop])
        for j in range(start, stop):
            if (j - start) % every == 0:
                first, last = j, min(j + every, width)
                rule = decide(first, work[..., first:last], spread[..., first:last])
            chosen = rule(j - first, work[..., j])
            error = (work[..., j] - chosen) / spread[..., j, None]
            work[..., j] = chosen
            work[..., j + 1:stop] -= error[..., None] * upper[..., j, None, j + 1:stop]
            errors[..., j - start] = error
        work[..., stop:] -= errors @ upper[..., start:stop, stop:]
    return work


def least_squares(weight: Tensor, hessian: Tensor, mask: Tensor, damp: float = 0.01) -> Tensor:
    """The values at ``mask`` [..., o, i] (bool, True = kept; zero elsewhere) that come nearest to ``weight``'s outputs.

    Every row solves H[k, k] v = (H w)[k] over its kept columns k. This is where exact OBS ends (Frantar & Alistarh
    2022), removing one weight after another by the full inverse; it costs o i^3 / 3, a sweep i^3.
    """
    work, full = weight.to(hessian.dtype), damped(hessian, damp)
    kept = mask.to(hessian.dtype)
    wanted = (work @ full) * kept
    width, rows = full.shape[-1], work.shape[-2]
    layers = max(1, full.numel() // (width * width))
    step = max(1, HELD // (layers * width * width))
    found = torch.empty_like(work)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        own = kept[..., part, :]
        system = full[..., None, :, :] * (own[..., :, None] * own[..., None, :])
        system.diagonal(dim1=-2, dim2=-1).add_(1 - own)
        lower = torch.linalg.cholesky(system)
        found[..., part, :] = torch.cholesky_solve(wanted[..., part, :, None], lower)[..., 0]
    return found
