"""Bias correction: rounding moves the mean of what a layer gives, and the bias moves it back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.calibrate.walk import Half, Order, fitting, input_values
from featherweight.errors import TaskError
from featherweight.network import Network, fold_batch_norm
from featherweight.network.edit import WEIGHTED, bias_name
from featherweight.quantize.plan import QuantizePlan
from featherweight.steps import Skipped
from featherweight.task import Task


def corrected(plan: QuantizePlan, network: Network, task: Task, batches: int | None,
              whole: Network | None = None) -> QuantizePlan:
    """The plan with biases that give every channel of every linear and convolution call the mean that it has in floats.

    Nagel et al. 2019, section 4.2, with means taken from calibration data (appendix D): b += E[y] - E[y_quantized],
    call by call in graph order, each seeing what the corrected calls before it give. whole: the float network to
    compare with (equalized or smoothed as the plan's is); None takes ``network`` with batch norm folded. Both networks
    walk side by side over all batches, as many as fit in memory: a bias's shift is added to what its call gave,
    and nothing is computed twice. Calls without a bias are named. Raises TaskError where calibration data is missing.
    """
    if not plan.stored and not plan.points:
        return plan
    whole = (fold_batch_norm(network) if whole is None else whole).eval()
    rounded = plan.apply(network).eval()
    sites, skipped = find_sites(whole, rounded)
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        walk = _Walk(whole, rounded, task, batches) if sites else None
        if walk is not None and walk.said:
            skipped.append(Skipped("calibration", f"biases are corrected by a part of it: {walk.said}"))
        for site in sites:
            assert walk is not None
            bias = rounded.tensor(site.bias).detach()
            found[site.bias] = (bias.double() + walk.shift(site).to(bias.device)).to(bias.dtype)
    return replace(plan, changed=tuple(sorted({*plan.changed, *found})), tensors={**plan.tensors, **found},
                   skipped=tuple(dict.fromkeys([*plan.skipped, *skipped])))


@dataclass(frozen=True)
class BiasedCall:
    """A call by its name in both networks, its bias, and the axis, from the end, that its channels lie along."""

    name: str
    bias: str
    axis: int


def find_sites(whole: Network, rounded: Network) -> tuple[list[BiasedCall], list[Skipped]]:
    """The calls whose bias can be corrected, in graph order, and the others with why."""
    there = {n.name: n for n in rounded.calls(*WEIGHTED)}
    sites, skipped = [], []
    for node in whole.calls(*WEIGHTED):
        name, other = bias_name(node), there.get(node.name)
        if other is None:
            continue
        if name is not None and len(whole.users_of(name)) == 1 and bias_name(other) == name:
            sites.append(BiasedCall(node.name, name, -1 if node.target is aten_linear else -1 - _kernel_axes(node)))
        else:
            why = "its bias is read by several calls" if name is not None else "it has no bias"
            skipped.append(Skipped(node.meta.get("module") or node.name, f"not corrected: {why}"))
    return sites, skipped


aten_linear = torch.ops.aten.linear.default


def _kernel_axes(node: Node) -> int:
    """Number of places' axes of a convolution call."""
    return next(axes for axes in (1, 2, 3) if f"{axes}d" in str(node.target))


class _Walk:
    """The float and the rounded network, batch by batch at the same call."""

    def __init__(self, whole: Network, rounded: Network, task: Task, batches: int | None) -> None:
        self.orders = Order(whole), Order(rounded)
        inputs_kept, self.said = fitting(task.batches("calibration", batches), self._load())
        self.states: list[tuple[Half, Half]] = []
        for inputs in inputs_kept:
            halves = [Half(n, o, dict(input_values(n, inputs))) for n, o in zip((whole, rounded), self.orders,
                                                                                 strict=True)]
            self.states.append((halves[0], halves[1]))
        if not self.states:
            raise TaskError("the calibration split is empty; bias correction needs calibration data: "
                            "Task(calibration=lambda: my_batches, ...)")

    def _load(self) -> float:
        """Bytes of one sample that are held at the fullest place."""
        first, second = self.orders
        calls = [n.name for n in first.calls if n.target in WEIGHTED and n.name in second.number]
        return max((o.held(o.number[c] + 1) for o in self.orders for c in calls), default=1.0) * 2

    def _values(self, site: BiasedCall) -> Iterator[tuple[Tensor, Tensor]]:
        for whole, rounded in self.states:
            for half in (whole, rounded):
                half.advance(half.order.number[site.name] + 1, {site.name})
            yield whole.values[site.name], rounded.values[site.name]

    def shift(self, site: BiasedCall) -> Tensor:
        """[c] float64: what the call's bias gets too; the rounded network goes on with it."""
        total, count = torch.zeros((), dtype=torch.float64), 0
        for want, given in self._values(site):
            lost = (want.double() - given.double()).movedim(site.axis, 0).flatten(1)
            total, count = total.to(lost.device) + lost.sum(1), count + lost.shape[1]
        shift = total / max(count, 1)
        for whole, rounded in self.states:
            value = rounded.values[site.name]
            rounded.values[site.name] = value + shift.to(value).view([-1, *[1] * (-1 - site.axis)])
            for half in (whole, rounded):
                half.forget(site.name)
        return shift


__all__ = ["corrected", "find_sites"]
