"""Quantization-aware training: a network trains as the integer network that it will be.

Batch norm stays in the graph while weights are rounded before it: at the end it is folded, and a channel's scale takes
its factor, so that the numbers stay those that were trained. The first and last calls train on the grids of ``ends``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from featherweight.network import Network, fold_batch_norm
from featherweight.network.edit import TRANSPOSED, insert_call, out_axis
from featherweight.network.fold import norm_scale
from featherweight.network.matrices import along_outputs
from featherweight.network.operators import schema_argument
from featherweight.numerics.formats import ACTIVATIONS, DYNAMIC, GRIDS
from featherweight.numerics.grids import SMALLEST_SCALE, Spec
from featherweight.quantize.grids import value_grids
from featherweight.quantize.layers import LayerForm, layers
from featherweight.quantize.placement import Placement, integer_calls
from featherweight.quantize.plan import QuantizePlan, announced
from featherweight.quantize.prepare.expand_activations import gated, write_out
from featherweight.quantize.prepare.uneven import evenly_placed
from featherweight.quantize.ranges import Tops, usual_method
from featherweight.quantize.request import Request, split
from featherweight.quantize.store import Point, Stored, chosen_scale, scale_name
from featherweight.quantize.sums import DEVICES, channel_axes
from featherweight.quantize.training.learners import LEARNERS, Learner, check_learner
from featherweight.quantize.training.quantizers import Dynamic, Quantizer
from featherweight.quantize.training.rounded_once import rounded_once
from featherweight.quantize.training.safe_scales import CHECKS, SafeScales
from featherweight.seeds import generators_kept
from featherweight.steps import Companion, Skipped
from featherweight.task import Task

aten = torch.ops.aten


@dataclass(frozen=True)
class Learning:
    """The options of ``Quantize`` that say how rounding is trained, under the same names."""

    learn: str
    progressive: tuple[str, ...]
    ranges: str | None
    weight_ranges: str | None
    calibration_batches: int | None
    device: str


@dataclass(frozen=True)
class Phase:
    """A share of the training. kinds: weight's name -> key of ``GRIDS``. points: the grids that calibration gave."""

    kinds: Mapping[str, str]
    points: Mapping[str, Point]


class Training(Companion):
    """A ``Quantize`` at work in a Fit: taps on weights, and on copies of the activations that kernels read."""

    def __init__(self, request: Request, learning: Learning, network: Network, task: Task) -> None:
        self.request, self.learning, self.network, self.origin = request, learning, network, network.copy()
        learner, rules = LEARNERS[learning.learn], request.rules()
        with generators_kept(), torch.no_grad():
            folded = fold_batch_norm(network).eval()
            self.norms = folded_norms(network, folded)
            self.found, self.skipped = self._found(folded)
            self.gates = gated(folded, integer_calls(self.found, rules), rules)
            write_out(folded, self.gates)
            write_out(network, self.gates)
            placed = evenly_placed(folded, task, self.found, request)
            self.skipped += placed.skipped
            self.safe, self.tops = SafeScales(self.found, placed), Tops(channel_axes(folded, self.found, placed))
            self.phases = [self._phase(text, folded, task, placed) for text in (*learning.progressive, None)]
            self.phase, self.checked, self.task = 0, 0, task
            first = self.phases[0]
            self.weights = {f.stored.weight: self._weight(f, first, learner) for f in self.found}
        self.leaders = {**placed.points, **{name: name for name in placed.dynamic}}
        self.values: dict[str, Quantizer] = {}
        self.taps: list[Callable[[], None]] = []
        for layer in self.found:
            self._hold(layer)
        copies = {self._copy(point): point for point in first.points.values()}
        for name in rounded_once(network, copies):
            self._round(name, copies[name], learner)
        network.changed()

    def _found(self, folded: Network) -> tuple[list[LayerForm], list[Skipped]]:
        """The layers that are trained, and what is left alone."""
        found, skipped = layers(folded, self.request)
        kept = []
        for layer in found:
            stored = layer.stored
            if stored.kind not in GRIDS:
                skipped.append(Skipped(stored.weight, f"{stored.kind} is not trained; write Quantize after Train"))
            elif stored.group is not None:
                skipped.append(Skipped(stored.weight, "scales of groups are not trained; write Quantize after Train"))
            elif self._mixes(layer):
                skipped.append(Skipped(stored.weight, "a scale per channel cannot take the factors of the batch norm "
                                       "after its groups; write Quantize after Train"))
            else:
                kept.append(layer)
        check_learner(self.learning.learn, {f.stored.kind for f in kept})
        return kept, skipped

    def _mixes(self, layer: LayerForm) -> bool:
        node = layer.nodes[0]
        return node.target in TRANSPOSED and node.name in self.norms and int(schema_argument(node, "groups")) > 1

    def _phase(self, text: str | None, folded: Network, task: Task, placed: Placement) -> Phase:
        """The grids of a form that the training passes through (None: the one that it ends with)."""
        activations, found = self.request.activations, self.found
        if text is not None:
            weights, values = split(text, activations)
            found = [replace(f, stored=replace(f.stored, kind=str(finer(f.stored.kind, weights, GRIDS))),
                             activations=finer(f.activations, values, ACTIVATIONS)) for f in found]
            activations = finer(activations, values, ACTIVATIONS)
        points = value_grids(folded, task, placed, found, activations, self.learning.ranges,
                             self.learning.calibration_batches, self.tops)
        return Phase({f.stored.weight: f.stored.kind for f in found}, {p.node: p for p in points})

    def _scale(self, layer: LayerForm, kind: str) -> Tensor:
        """The scale of a weight as it is now, shaped to meet it."""
        weight = self.network.tensor(layer.stored.weight).detach()
        method = self.learning.weight_ranges or usual_method(GRIDS[kind].bits)
        stored = replace(layer.stored, kind=kind)
        return stored.spread(chosen_scale(weight.cpu(), stored, method), weight.shape).to(weight.device)

    def _weight(self, layer: LayerForm, phase: Phase, learner: Learner) -> Quantizer:
        stored, kind = layer.stored, phase.kinds[layer.stored.weight]
        made = learner.of_weight(stored.kind)(GRIDS[kind], self._scale(layer, kind))
        made.begin(self.network.tensor(stored.weight).detach())
        return made

    def _hold(self, layer: LayerForm) -> None:
        names = self.network.tied_names(layer.stored.weight)
        quantizer = self.weights[layer.stored.weight]
        for node in self.network.graph.nodes:
            if node.op == "get_attr" and node.target in names:
                self.taps.append(self.network.add_tap(node.name, quantizer))

    def _copy(self, point: Point) -> str:
        """Puts a copy of the point's activation before its readers; its name. In the training graph a batch norm gives
        what the call before it gives in the folded one."""
        node = self.network.node(self.norms.get(point.node, point.node))
        copy = insert_call(self.network, aten.alias.default, (node,), after=node, like=node)
        for reader in point.readers:
            self.network.node(reader).replace_input_with(node, copy)
        return copy.name

    def _round(self, copy: str, point: Point, learner: Learner) -> None:
        """Taps the copy of a point's activation; points on one grid share one quantizer."""
        leader = self.leaders[point.node]
        if leader not in self.values:
            device = next(iter(self.network.tensors().values())).device
            made = Dynamic if point.kind == DYNAMIC else learner.values
            self.values[leader] = made(point.spec, torch.tensor(point.scale, device=device), point.zero_point,
                                       values=True)
        self.taps.append(self.network.add_tap(copy, self.values[leader]))

    # ---- Companion
    def update(self, progress: float) -> None:
        phase = min(int(progress * len(self.phases)), len(self.phases) - 1)
        if phase != self.phase:
            self._enter(phase)
        due = sum(progress >= share for share in CHECKS)
        if due > self.checked and not DEVICES[self.learning.device]:
            self._hold_scales(due == len(CHECKS))
            self.checked = due
        for quantizer in self._quantizers():
            quantizer.progress(progress)

    def _hold_scales(self, last: bool) -> None:
        """Scales become as large as sums ask for; at the ``last`` time so do those of activations as they are now."""
        with torch.no_grad(), generators_kept():
            tops = self.safe.reach(self.network, self.task, self.norms, self.learning.calibration_batches) if last \
                else self.tops
            self.safe.hold(self.network, self.weights, self._points(), tops)

    def _points(self) -> tuple[Point, ...]:
        """The grids of activations as they are now."""
        return tuple(replace(p, scale=float(self.values[self.leaders[p.node]].scale(torch.empty(0))))
                     for p in self.phases[self.phase].points.values())

    def _quantizers(self) -> list[Quantizer]:
        return [*self.weights.values(), *self.values.values()]

    def _enter(self, index: int) -> None:
        """Goes over to other grids. Scales of weights are chosen anew; those of activations keep what training made of
        them, as a factor on what calibration gave."""
        old, new = self.phases[self.phase], self.phases[index]
        self.phase = index
        with torch.no_grad():
            for layer in self.found:
                name = layer.stored.weight
                if old.kinds[name] != new.kinds[name]:
                    self.weights[name].change(GRIDS[new.kinds[name]], self._scale(layer, new.kinds[name]))
                    self.weights[name].begin(self.network.tensor(name).detach())
            for leader, quantizer in self.values.items():
                before, after = old.points[leader], new.points[leader]
                if before != after:
                    scale = quantizer.scale(torch.empty(0)) * (after.scale / before.scale)
                    quantizer.change(after.spec, scale, after.zero_point)

    def after_backward(self) -> None:
        for quantizer in self._quantizers():
            quantizer.after_backward()

    def parameters(self) -> list[Tensor]:
        return [t for q in self._quantizers() for t in q.own]

    def state(self) -> dict[str, Tensor]:
        known = {f"least/{i}": q.least for i, q in enumerate(self._quantizers()) if q.least is not None}
        known["checked"] = torch.tensor(self.checked)
        if len(self.phases) > 1:
            known |= {"phase": torch.tensor(self.phase),
                      **{f"start/{i}": q.start for i, q in enumerate(self._quantizers())}}
        return known

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.checked = int(state.get("checked", self.checked))
        for index, quantizer in enumerate(self._quantizers()):
            quantizer.least = state.get(f"least/{index}")
        if "phase" not in state:
            return
        self.phase = int(state["phase"])
        now = self.phases[self.phase]
        for name, quantizer in self.weights.items():
            quantizer.spec = GRIDS[now.kinds[name]]
        for leader, quantizer in self.values.items():
            quantizer.spec, quantizer.zero = now.points[leader].spec, now.points[leader].zero_point
        for index, quantizer in enumerate(self._quantizers()):
            quantizer.start.copy_(state[f"start/{index}"])

    def finish(self) -> QuantizePlan:
        """The numbers that were trained, on the grids that were trained, with batch norm folded into the scales."""
        self.update(1.0)
        self.close()
        tensors: dict[str, Tensor] = {}
        stored = []
        with torch.no_grad():
            for layer in self.found:
                made, value, scale = self._settled(layer)
                stored.append(made)
                tensors |= {made.weight: value, scale_name(made.weight): scale}
        plan = QuantizePlan(tuple(stored), self._points(), tuple(sorted(s.weight for s in stored)), bool(stored),
                            gates=self.gates, skipped=tuple(dict.fromkeys(self.skipped)), tensors=tensors)
        return announced(plan, self.origin)

    def close(self) -> None:
        for remove in self.taps:
            remove()
        self.taps.clear()

    def _settled(self, layer: LayerForm) -> tuple[Stored, Tensor, Tensor]:
        """How a weight is stored, its values and its scales, once batch norm is folded."""
        quantizer = self.weights[layer.stored.weight]
        stored = replace(layer.stored, kind=quantizer.stored_as or layer.stored.kind)
        weight = self.network.tensor(stored.weight).detach()
        value, scale = quantizer(weight).double(), quantizer.scale(weight).double()
        norm = self.norms.get(layer.nodes[0].name)
        if norm is None:
            return stored, value.float(), scale.reshape(-1 if stored.axis is not None else ()).float()
        stored = replace(stored, axis=out_axis(layer.nodes[0]))
        channel = norm_scale(self.network, self.network.node(norm))
        factor = along_outputs(layer.nodes[0], channel, weight)
        return stored, (value * factor).float(), self._per_channel(stored, scale * factor.abs(), weight)

    def _per_channel(self, stored: Stored, scale: Tensor, weight: Tensor) -> Tensor:
        whole = scale.expand(weight.shape)
        return whole.movedim(int(stored.axis or 0), 0).flatten(1)[:, 0].clamp(min=SMALLEST_SCALE).float()


def folded_norms(network: Network, folded: Network) -> dict[str, str]:
    """Call's name -> the batch norm that is folded into it."""
    left = {n.name for n in folded.calls(aten.batch_norm.default)}
    return {str(n.args[0]): n.name for n in network.calls(aten.batch_norm.default) if n.name not in left}


def finer(kind: str | None, other: str | None, table: Mapping[str, Spec]) -> str | None:
    """Whichever of two kinds has more bits; ``kind`` itself where one is no grid of the table."""
    one, two = table.get(str(kind)), table.get(str(other))
    return other if one is not None and two is not None and two.bits > one.bits else kind
