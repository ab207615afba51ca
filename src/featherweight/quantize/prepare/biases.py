"""Bias correction: rounding moves the mean of what a layer gives, and the bias moves it back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.calibrate.pair import Pair
from featherweight.errors import TaskError
from featherweight.network import Network, fold_batch_norm, trees
from featherweight.network.edit import WEIGHTED, bias_name
from featherweight.quantize.plan import QuantizePlan
from featherweight.steps import Skipped
from featherweight.task import Task
from featherweight.task.batches import call as run


def corrected(plan: QuantizePlan, network: Network, task: Task, batches: int | None,
              whole: Network | None = None) -> QuantizePlan:
    """The plan with biases that give every channel of every linear and convolution call the mean that it has in floats.

    Nagel et al. 2019, section 4.2, with means taken from calibration data (appendix D): b += E[y] - E[y_quantized],
    call by call in graph order, each seeing what the corrected calls before it give. whole: the float network to
    compare with (equalized or smoothed as the plan's is); None takes ``network`` with batch norm folded. Every batch
    runs once, as many batches as memory holds: the shift of a bias is added to the activation that its call gave.
    Calls without a bias are named. Raises TaskError where calibration data is missing.
    """
    if not plan.stored and not plan.points:
        return plan
    whole = (fold_batch_norm(network) if whole is None else whole).eval()
    rounded = plan.apply(network).eval()
    calls, skipped = find_biased_calls(whole, rounded)
    found: dict[str, Tensor] = {}
    if calls:
        with torch.no_grad():
            found, said = _biases(Pair.of(whole, task.batches("calibration", batches), rounded), calls)
        skipped += [Skipped("calibration", f"biases are corrected by a part of it: {said}")] if said else []
    return replace(plan, changed=tuple(sorted({*plan.changed, *found})), tensors={**plan.tensors, **found},
                   skipped=tuple(dict.fromkeys([*plan.skipped, *skipped])))


def nearer(plan: QuantizePlan, other: QuantizePlan, network: Network, task: Task, batches: int | None) -> bool:
    """Whether the outputs of ``plan`` on calibration data are nearer to those of the network than those of ``other``,
    by the sum of squared differences."""
    whole, *rounded = (made.eval() for made in (network.copy(), plan.apply(network), other.apply(network)))
    apart = [0.0, 0.0]
    with torch.no_grad():
        for inputs, _ in task.batches("calibration", batches):
            wanted = trees.flatten(run(whole, inputs))[0]
            for i, made in enumerate(rounded):
                given = trees.flatten(run(made, inputs))[0]
                apart[i] += sum(float((w.double() - g.double()).square().sum())
                                for w, g in zip(wanted, given, strict=True)
                                if isinstance(w, Tensor) and w.is_floating_point())
    return apart[0] < apart[1]


aten_linear = torch.ops.aten.linear.default


@dataclass(frozen=True)
class BiasedCall:
    """A call by its name in both networks, its bias, and the axis, from the end, that its channels lie along."""

    name: str
    bias: str
    axis: int


def find_biased_calls(whole: Network, rounded: Network) -> tuple[list[BiasedCall], list[Skipped]]:
    """The calls whose bias can be corrected, in graph order, and the others with why."""
    there = {n.name: n for n in rounded.calls(*WEIGHTED)}
    found, skipped = [], []
    for node in whole.calls(*WEIGHTED):
        name, other = bias_name(node), there.get(node.name)
        if other is None:
            continue
        if name is not None and len(whole.users_of(name)) == 1 and bias_name(other) == name:
            found.append(BiasedCall(node.name, name, -1 if node.target is aten_linear else -1 - _kernel_axes(node)))
        else:
            why = "its bias is read by several calls" if name is not None else "it has no bias"
            skipped.append(Skipped(node.meta.get("module") or node.name, f"not corrected: {why}"))
    return found, skipped


def _kernel_axes(node: Node) -> int:
    """Number of places' axes of a convolution call."""
    return next(axes for axes in (1, 2, 3) if f"{axes}d" in str(node.target))


def _biases(pair: Pair, calls: list[BiasedCall]) -> tuple[dict[str, Tensor], str]:
    """The corrected biases by name; and what is to be said of the calibration data that was left out."""
    places = [[f.order.held[f.order.number[c.name] + 1] for c in calls] for f in (pair.whole, pair.compressed)]
    said = pair.admit(max(map(sum, zip(*places, strict=True))))
    if not pair.samples:
        raise TaskError("the calibration split is empty; bias correction needs calibration data: "
                        "Task(calibration=lambda: my_batches, ...)")
    found = {}
    for call in calls:
        pair.keep([call.name])
        pair.go_past(call.name)
        shift = _shift(call, pair.whole.gave(call.name), pair.compressed.gave(call.name))
        bias = pair.compressed.network.tensor(call.bias).detach()
        found[call.bias] = (bias.double() + shift.to(bias.device)).to(bias.dtype)
        pair.compressed.change(call.name, partial(_moved, shift.view([-1, *[1] * (-1 - call.axis)])))
        pair.release([call.name])
    return found, said


def _shift(call: BiasedCall, wanted: list[Tensor], given: list[Tensor]) -> Tensor:
    """[c] float64: mean of what the rounded network's call lost, per channel, over all batches."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for want, have in zip(wanted, given, strict=True):
        lost = (want.double() - have.double()).movedim(call.axis, 0).flatten(1)
        total, count = total.to(lost.device) + lost.sum(1), count + lost.shape[1]
    return total / max(count, 1)


def _moved(shift: Tensor, given: Tensor) -> Tensor:
    return given + shift.to(given)


__all__ = ["corrected", "find_biased_calls"]
