"""Curvature of a loss: the traces of the diagonal blocks of its Hessian."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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


__all__ = ["traces"]
