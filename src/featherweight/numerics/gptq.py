"""GPTQ: weights rounded to their grids one column after another, those not yet rounded making up for it.

Frantar et al. 2023, "GPTQ: accurate post-training quantization", algorithm 1: the sweep of ``obs`` with rounding for a
decision. Scales are chosen beforehand, so columns may be taken in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.numerics.grids import Spec, fake_quantize
from featherweight.numerics.obs import Decide, Rule, damped, sweep

DAMP = 0.01  #: share of the mean diagonal that is added to the second moments, as the paper has it


def to_grid(scale: Tensor, spec: Spec, kept: Tensor | None, aims: Tensor) -> Decide:
    """Every column goes to the nearest level of its grid. scale: [..., o, i], one per weight. kept: bool, the same
    shape: weights that are not stay zero (None: all are). aims: gets the columns as they are before, same shape."""
    zero = torch.zeros((), dtype=torch.int32, device=scale.device)

    def decide(first: int, weights: Tensor, spread: Tensor) -> Rule:
        def rule(column: int, values: Tensor) -> Tensor:
            at = first + column
            aims[..., at] = values
            found = fake_quantize(values, scale[..., at], zero, spec)
            return found if kept is None else found * kept[..., at]

        return rule

    return decide


def towards(weight: Tensor, gram: Tensor, cross: Tensor, damp: float = DAMP) -> Tensor:
    """The weights W* that make of inputs x what ``weight`` made of the inputs z that they once were.

    argmin over W* of sum |W* x - W z|^2 + d |W* - W|^2 = W + W (sum z x^T - sum x x^T) (sum x x^T + d)^-1: what the
    sweep then rounds aims at the outputs of the network whose weights were not rounded (the asymmetric calibration of
    Li et al. 2025, "GPTAQ", solved at once). weight: [..., o, i]; gram: sum x x^T [..., i, i]; cross: sum x z^T; d:
    ``damp`` times the mean of gram's diagonal. In the dtype of ``gram``.
    """
    work = weight.to(gram.dtype)
    missing = work @ (cross.mT - gram)
    lower = torch.linalg.cholesky(damped(gram, damp))
    return work + torch.cholesky_solve(missing.mT, lower).mT


def gptq(weight: Tensor, gram: Tensor, scale: Tensor, spec: Spec, *, kept: Tensor | None = None, damp: float = DAMP,
         ordered: bool = True) -> tuple[Tensor, Tensor]:
    """``weight`` [..., o, i] on the grids of ``scale`` (one per weight, the same shape); and what each weight was to be
    when it was rounded. Both in the dtype of ``gram``.

    gram: sum of x x^T over the inputs [..., i, i]. ordered: columns with the largest inputs are rounded first (the
    authors' "act-order"); otherwise from left to right.
    """
    shape = weight.shape
    scale = scale.to(gram.dtype)
    order = torch.arange(shape[-1], device=gram.device).expand(gram.shape[:-1])
    if ordered:
        order = gram.diagonal(dim1=-2, dim2=-1).sort(dim=-1, descending=True, stable=True).indices
    columns = order[..., None, :].expand(shape)

    def turned(matrix: Tensor) -> Tensor:
        return matrix.gather(-1, columns)

    sorted_gram = gram.gather(-1, order[..., None, :].expand(gram.shape))
    sorted_gram = sorted_gram.gather(-2, order[..., :, None].expand(gram.shape))
    aims = torch.empty(shape, dtype=gram.dtype, device=gram.device)
    decide = to_grid(turned(scale), spec, None if kept is None else turned(kept), aims)
    found = sweep(turned(weight.to(gram.dtype)), sorted_gram, decide, damp=damp)
    return torch.empty_like(found).scatter_(-1, columns, found), torch.empty_like(aims).scatter_(-1, columns, aims)


def descend(found: Tensor, weight: Tensor, gram: Tensor, scale: Tensor, spec: Spec, *, kept: Tensor | None = None,
            damp: float = DAMP, passes: int = 2) -> tuple[Tensor, Tensor]:
    """Coordinate descent from ``found``, on the grids, towards what ``weight`` gives; gives what ``gptq`` gives.

    Nair & Suggala 2024, "CDQuant: greedy coordinate descent for quantization", section 3, column after column: each
    goes to the level that is best while the others stay, so that the error never rises.
    """
    full = damped(gram, damp)
    levels = scale.to(gram.dtype)
    zero = torch.zeros((), dtype=torch.int32, device=scale.device)
    work, aims = found.clone(), found.clone()
    slope = (work - weight.to(gram.dtype)) @ full
    for _ in range(passes):
        for j in range(work.shape[-1]):
            aims[..., j] = work[..., j] - slope[..., j] / full[..., j, j, None]
            new = fake_quantize(aims[..., j], levels[..., j], zero, spec)
            new = new if kept is None else new * kept[..., j]
            slope += (new - work[..., j])[..., None] * full[..., j, None, :]
            work[..., j] = new
    return work, aims


__all__ = ["descend", "gptq", "to_grid", "towards"]
