"""``Compact``: convolutions as compact filters, fitted to what they replace: shifts, Fire modules, Ghost modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.errors import PlanError, RecipeError, did_you_mean
from featherweight.factorize.form_fit import Fitted, fitted
from featherweight.factorize.graph.builder import Builder, options
from featherweight.factorize.graph.compact import PARTS, put_fire, put_ghost, put_shift
from featherweight.factorize.surgery import groups_of, stem
from featherweight.judge.costs import alone, growth
from featherweight.network import Network
from featherweight.network.edit import (
    CONVOLUTIONS,
    TRANSPOSED,
    clear_dead,
    read_tensors,
    readers_of,
)
from featherweight.network.layers import Layer, not_finite, select
from featherweight.network.operators import schema_argument
from featherweight.numerics.factors import compact
from featherweight.steps import Plan, Rewrite, Skipped, Stage
from featherweight.steps.options import COUNT, Numbers, check_known, check_numbers
from featherweight.task import Task

aten = torch.ops.aten
SHARE = Numbers(0.5, above=0, below=1)


@dataclass(frozen=True)
class Compacted:
    """One convolution as compact filters. tensors: their names in the plan and, behind the layer's path, in the result.
    error: |W' - W|^2 / |W|^2, or of the outputs on calibration data where these were read; of "ghost" the part that the
    small filters leave."""

    weight: str
    shape: tuple[int, ...]
    form: str
    tensors: tuple[str, ...]
    error: float


@dataclass(frozen=True)
class CompactPlan(Plan):
    """Which convolutions become compact filters; these lie in ``tensors``.

    Example:
        >>> plan = fw.factorize.Compact("shift").plan(network, task)
        >>> {layer.form for layer in plan.layers} <= {"shift"}
        True
    """

    kind: ClassVar[str] = "factorize.compact/1"
    layers: tuple[Compacted, ...] = ()

    def apply(self, network: Network) -> Network:
        """A copy with these convolutions replaced; PlanError where a layer is not as planned."""
        changed = network.copy()
        before = read_tensors(changed)
        known = {layer.weight: layer for layer in select(changed).layers}
        for made in self.layers:
            if made.weight not in known:
                raise PlanError(f"the plan replaces {made.weight!r}, which no convolution here reads; "
                                f"{did_you_mean(made.weight, known)}")
            layer, shape = known[made.weight], tuple(changed.tensor(made.weight).shape)
            missing = [name for name in made.tensors if f"{stem(made.weight)}{name}" not in self.tensors]
            if shape != made.shape or refusal(changed, layer, made.form) or missing:
                raise PlanError(f"the plan replaces {made.weight!r} of shape {list(made.shape)} by filters in its "
                                f"tensors; here it is {list(shape)}, and {missing or 'none'} are missing: plan again "
                                "on this network, and load plans with their tensors: Plan.load(path)")
            call = layer.calls[0]
            at = Builder(changed, call, made.weight, made.shape, self.tensors)
            call.replace_all_uses_with(FORMS[made.form].build(at))
            changed.graph.erase_node(call)
        clear_dead(changed, before)
        return changed

    def summary(self) -> str:
        shown = ", ".join(f"{stem(m.weight).rstrip('.')} {m.form} (error {m.error ** 0.5:.1%})" for m in self.layers)
        return f"compact filters: {len(self.layers)} layers" + (f" ({shown})" if shown else "")


@dataclass(frozen=True)
class Compact(Rewrite):
    """Convolutions as compact filters, each fitted to the one that it replaces; a training is to follow.

    form: "ghost": ``share`` of the filters stay, and every other output is made of one of theirs by a small filter of
        ``size`` x ``size`` (Han et al. 2020). "fire": 1 x 1 to ``share`` of the input channels, then k x k for half of
        the outputs and 1 x 1 for the others (Iandola et al. 2016). "shift": every input channel moved by ``terms``
        offsets, then 1 x 1 (Wu et al. 2018). Depthwise separable filters and a squeeze before k x k are forms of
        ``LowRank``.
    data: errors are those of outputs on calibration data, layer after layer, from what the network that is compressed
        so far gives to what the whole one gives; biases make up for the change of means.
    ignore: patterns of layers to leave alone (``network/layers``).

    Layers that cannot take the form, or would not become smaller, are left and named. Raises RecipeError for options
    that make no sense.

    Example:
        >>> wide = fw.capture(nn.Conv2d(16, 32, 3, padding=1), torch.zeros(2, 16, 8, 8))
        >>> small = fw.factorize.Compact("ghost").plan(wide, fw.Task()).apply(wide)
        >>> fw.measure.params(small) < 0.6 * fw.measure.params(wide)
        True
    """

    form: str = "ghost"
    share: float = 0.5
    size: int = 3
    terms: int = 1
    data: bool = False
    ignore: tuple[str, ...] = ()
    stage: ClassVar[Stage] = Stage.STRUCTURE

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        check_known("Compact", "form", self.form, FORMS)
        check_numbers(self, {"share": SHARE, "terms": COUNT, "size": COUNT})
        if self.size % 2 == 0:
            raise RecipeError(f"Compact(size={self.size}) has no middle; write size={self.size + 1}")

    def plan(self, network: Network, task: Task) -> CompactPlan:
        """Reads calibration data where ``data`` asks for it. Raises TaskError where that is missing."""
        self.check()
        if self.data:
            task.require("calibration")
        selected = select(network, self.ignore)
        chosen, skipped = [], list(selected.skipped)
        for layer in selected.layers:
            reason = refusal(network, layer, self.form) or self._no_gain(network, layer)
            if reason:
                skipped.append(Skipped(layer.weight, reason))
            else:
                chosen.append(layer)
        found, said = fitted(network, task if self.data else None, chosen, self.fit)
        skipped += said
        layers: list[Compacted] = []
        tensors: dict[str, Tensor] = {}
        for layer, one in zip(chosen, found, strict=True):
            layers.append(self._as_plan(network, layer, one))
            tensors |= {f"{stem(layer.weight)}{name}": value for name, value in one.tensors.items()}
        return CompactPlan(tuple(layers), skipped=tuple(skipped), tensors=tensors)

    def fit(self, call: Node, kernel: Tensor, gram: Tensor | None) -> Fitted:
        """The form of one kernel [o, i, *k]."""
        return FORMS[self.form].fit(self, call, kernel, gram)

    def _as_plan(self, network: Network, layer: Layer, one: Fitted) -> Compacted:
        return Compacted(layer.weight, tuple(network.tensor(layer.weight).shape), self.form, tuple(one.tensors),
                         one.error)

    def _no_gain(self, network: Network, layer: Layer) -> str:
        """Why a layer would not become smaller in this form; "" if it would."""
        inside = alone(network, layer.weight)
        one = self.fit(layer.calls[0], inside.tensor(layer.weight).detach(), None)
        tensors = {f"{stem(layer.weight)}{name}": value for name, value in one.tensors.items()}
        after = CompactPlan((self._as_plan(network, layer, one),), tensors=tensors).apply(inside)
        grown = growth(inside, after)
        return f"as {self.form} its {', '.join(grown)} would grow" if grown else ""


def refusal(network: Network, layer: Layer, form: str) -> str:
    """Why a layer cannot take a form; "" if it can."""
    call, weight = layer.calls[0], network.tensor(layer.weight)
    if call.target not in CONVOLUTIONS or call.target in TRANSPOSED or groups_of(call) > 1 or weight[0, 0].numel() == 1:
        return "no convolution of one group with a window of more than one place"
    if len(layer.calls) > 1 or len(layer.names) > 1 or len(readers_of(network, layer.weight)) > 1:
        return "its weight is shared or tied"
    if reason := not_finite(weight):
        return reason
    if not weight.any():
        return "its weight is all zero"
    if layer.weight in network.patterns:
        return f"its zeros are kept ({network.patterns[layer.weight]}); other filters would fill them"
    if len(weight) < 2 or weight.shape[1] < 2:
        return "fewer than two channels"
    taken = [n for part in PARTS if (n := f"{stem(layer.weight)}{part}") in network.tensors()]
    return f"the name {taken[0]} is taken" if taken else FORMS[form].refusal(call, weight)


# ---- the forms
def _any(call: Node, weight: Tensor) -> str:
    return "its padding is a word" if isinstance(schema_argument(call, "padding"), str) else ""


def _centred(call: Node, weight: Tensor) -> str:
    if reason := _any(call, weight):
        return reason
    found = options(call)
    wanted = [d * (k - 1) for d, k in zip(found["dilation"], weight.shape[2:], strict=True)]
    even = any(k % 2 == 0 for k in weight.shape[2:])
    return "" if not even and [2 * p for p in found["padding"]] == wanted else (
        "its padding is not half of its window, by which 1 x 1 filters would see the same places")


def _undilated(call: Node, weight: Tensor) -> str:
    return _any(call, weight) or ("" if set(options(call)["dilation"]) == {1} else "its window is dilated")


def _shift(step: Compact, call: Node, kernel: Tensor, gram: Tensor | None) -> Fitted:
    made = compact.shift(kernel, step.terms, gram)
    return Fitted({"moves.weight": made.moves, "point.weight": made.point},
                  compact.of_shift(made, kernel.shape[1]))


def _fire(step: Compact, call: Node, kernel: Tensor, gram: Tensor | None) -> Fitted:
    made = compact.fire(kernel, max(1, round(step.share * kernel.shape[1])), gram=gram)
    order = torch.cat([made.few, made.many]).argsort()
    return Fitted({"squeeze.weight": made.squeeze, "point.weight": made.point, "wide.weight": made.wide,
                   "order": order}, compact.of_fire(made))


def _ghost(step: Compact, call: Node, kernel: Tensor, gram: Tensor | None) -> Fitted:
    count = max(1, min(len(kernel) - 1, round(step.share * len(kernel))))
    made = compact.ghost(kernel, count, step.size, tuple(options(call)["stride"]), gram)
    order = torch.cat([made.primary, made.ghosts]).argsort()
    return Fitted({"primary.weight": kernel[made.primary], "base": made.base, "cheap.weight": made.cheap,
                   "order": order}, kernel, made)


@dataclass(frozen=True)
class CompactForm:
    """A form: how a kernel is fitted, why a call cannot take it, and its graph."""

    fit: Callable[[Compact, Node, Tensor, Tensor | None], Fitted]
    refusal: Callable[[Node, Tensor], str]
    build: Callable[[Builder], Node]


FORMS: dict[str, CompactForm] = {
    "ghost": CompactForm(_ghost, _undilated, put_ghost),
    "fire": CompactForm(_fire, _centred, put_fire),
    "shift": CompactForm(_shift, _any, put_shift),
}
__all__ = ["Compact", "CompactPlan", "Compacted"]
