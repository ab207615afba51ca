"""What damage is measured by: how far outputs moved, and the curvature of a loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def relative_change(after: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """|after - before|^2 / |before|^2 over all tensors together, summed in float64."""
    away = sum(float((a - b).double().square().sum()) for a, b in zip(after, before, strict=True))
    return away / max(sum(float(b.double().square().sum()) for b in before), 1e-30)


def traces(loss: Tensor, tensors: Sequence[Tensor], generator: torch.Generator, probes: int = 32) -> list[float]:
    """The trace of the Hessian of ``loss`` over each of ``tensors`` alone, as estimated from ``probes`` vectors.

    Hutchinson's estimator (Avron and Toledo 2011; Dong et al. 2020, "HAWQ-V2", eq. 5): the mean of v^T H v over vectors
    of random signs. All tensors are probed at once: the blocks between two of them have mean zero in v_i^T (H v)_i and
    add to its variance only.

    loss: [] with a graph that reaches the tensors, twice differentiable. generator: on the CPU.
    """
    first = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
    found = [0.0] * len(tensors)
    used = [i for i, g in enumerate(first) if g is not None and g.requires_grad]
    for _ in range(probes if used else 0):
        signs = [torch.randint(0, 2, t.shape, generator=generator).mul_(2).sub_(1).to(t) for t in tensors]
        second = torch.autograd.grad([first[i] for i in used], tensors, [signs[i] for i in used], retain_graph=True,
                                     allow_unused=True)
        for i, (sign, product) in enumerate(zip(signs, second, strict=True)):
            if product is not None:
                found[i] += float((sign * product).double().sum()) / probes
    return found


__all__ = ["relative_change", "traces"]
