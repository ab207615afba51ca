"""How much it matters to outputs or loss that a weight is off: what the error of a codebook is weighed by."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from featherweight.calibrate.moments import Calls, input_norms
from featherweight.network import Network
from featherweight.network.devices import device_of
from featherweight.task import Task, call, move

#: gives weight's name -> importances [the weight's shape], for the weights that are read by these calls
Importance = Callable[[Network, Task, Calls], Mapping[str, Tensor]]
BATCHES = 8  #: of the calibration split that are read


def by_inputs(network: Network, task: Task, calls: Calls) -> dict[str, Tensor]:
    """The mean square of the input that each weight is multiplied with: the diagonal of the Hessian of the layer's
    squared output error (as OBS takes it: Hassibi and Stork 1993, eq. 2, layer by layer)."""
    task.require("calibration")
    norms = input_norms(network.copy().eval(), task.batches("calibration", BATCHES), calls)
    found = {}
    for name in calls:
        squares = norms.pop(name).square()
        found[name] = squares / squares.mean().clamp_min(1e-300)
    return found


def by_fisher(network: Network, task: Task, calls: Calls) -> dict[str, Tensor]:
    """The mean square of the loss's gradient by each weight over batches: the diagonal of the empirical Fisher matrix,
    which stands for the Hessian's (Choi et al. 2017, section 3.3)."""
    task.require("calibration", "loss")
    assert task.loss is not None
    work, device = network.copy().eval(), device_of(network)
    weights = [work.tensor(name).requires_grad_() for name in calls]
    sums = [torch.zeros_like(w, dtype=torch.float64) for w in weights]
    for x, y in task.batches("calibration", BATCHES):
        with torch.enable_grad():
            loss = task.loss(call(work, move(x, device)), move(y, device))
            grads = torch.autograd.grad(loss, weights, allow_unused=True)
        for total, grad in zip(sums, grads, strict=True):
            if grad is not None:
                total += grad.double().square()
    return {n: s / s.mean().clamp_min(1e-300) + 1e-3 for n, s in zip(calls, sums, strict=True)}


#: name -> importance; add one of your own under a new name
IMPORTANCES: dict[str, Importance | None] = {"none": None, "inputs": by_inputs, "fisher": by_fisher}
#: name -> what of the task it reads
NEEDS: dict[str, tuple[str, ...]] = {"inputs": ("calibration",), "fisher": ("calibration", "loss")}

__all__ = ["IMPORTANCES", "NEEDS", "Importance", "by_fisher", "by_inputs"]
