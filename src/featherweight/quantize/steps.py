"""Quantize: weights stored as whole numbers, values rounded to a grid between the operators."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from featherweight import deploy
from featherweight.errors import PlanError, RecipeError, did_you_mean
from featherweight.network import Network, fold_batch_norm
from featherweight.network.surgery import TRANSPOSED, WEIGHTED, insert_call, node_name, weight_name
from featherweight.numerics import grids
from featherweight.numerics.grids import Spec
from featherweight.quantize.placement import Placement, place
from featherweight.quantize.ranges import activation_grids, check_method
from featherweight.quantize.rules import ONNX_RUNTIME, RULES
from featherweight.steps import Plan, Rewrite, Skipped, Stage
from featherweight.task import Task

decomposed = torch.ops.quantized_decomposed

WEIGHTS: dict[str, Spec] = {"int8": Spec(8, signed=True, symmetric=True)}
ACTIVATIONS: dict[str, Spec] = {"uint8": Spec(8, signed=False, symmetric=False)}
#: bytes of graph that a rounded value and a stored weight bring along, about, in the larger of the two files
POINT_BYTES = 900
WEIGHT_BYTES = 900


@dataclass(frozen=True)
class Point:
    """A value rounded to a grid: ``node`` gives it, ``readers`` (calls) take the rounded one."""

    node: str
    scale: float
    zero_point: int
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Stored:
    """A weight stored as whole numbers with a scale per channel of ``axis`` (in the plan's tensors: "NAME_scale")."""

    weight: str
    axis: int


@dataclass(frozen=True)
class QuantizePlan(Plan):
    """Which weights are stored how, and which values are rounded to which grid. Biases stay float: a target whose
    kernels want whole ones rounds them to (input scale times weight scale) when it exports."""

    weights: str
    activations: str | None
    stored: tuple[Stored, ...]
    points: tuple[Point, ...]
    fold_batch_norm: bool = True

    def summary(self) -> str:
        text = f"{len(self.stored)} weights as {self.weights} per channel"
        return f"{text}, {len(self.points)} values as {self.activations}" if self.activations else text

    def apply(self, network: Network) -> Network:
        """A copy with batch norm folded, the named weights stored as whole numbers, the named values rounded."""
        if not self.stored and not self.points:
            return network.copy()
        result = fold_batch_norm(network) if self.fold_batch_norm else network.copy()
        for stored in self.stored:
            scale = self.tensors.get(scale_name(stored.weight))
            if scale is None:
                raise PlanError(f"the plan lacks the tensor {scale_name(stored.weight)!r}; "
                                "load it with the tensors that lie beside it")
            store_weight(result, stored, scale, WEIGHTS[self.weights])
        for point in self.points:
            round_value(result, point, ACTIVATIONS[str(self.activations)])
        result.changed()
        return result


@dataclass(frozen=True)
class Quantize(Rewrite):
    """Stores weights as whole numbers per output channel and rounds values to whole numbers between operators.

    weights: "int8" (symmetric, -127..127, a scale per output channel).
    activations: "uint8" (affine, a grid per value), or None: values stay float and weights are read back to float.
    ranges: how a value's grid is chosen from calibration data: "minmax" or "mse" (least squared error).
    weight_ranges: the same for weights.
    ignore: patterns (``*`` and ``?``) of module paths, weight names or node names that stay float.
    calibration_batches: at most so many batches of the calibration split; None takes all.
    target: the runtime whose whole-number kernels decide where values are rounded (``rules.RULES``); None takes
    the job's, or "onnxruntime". The network runs in any runtime, if not always as fast.

    With ``activations=None`` files shrink, and runtimes differ. ONNX Runtime reads the weights of convolutions and of
    linear calls on [n, i] back to float at every run (seen: 1.3 to 1.7 times the float time); those on [n, length, i]
    get faster. OpenVINO reads the weights of convolutions back once, and rounds what linear calls read to 8 bits, in
    groups and anew at every run. On x86 without VNNI instructions, uint8 times int8 sums may saturate.
    """

    stage: ClassVar[Stage] = Stage.PRECISION
    weights: str = "int8"
    activations: str | None = "uint8"
    ranges: str = "minmax"
    weight_ranges: str = "minmax"
    ignore: tuple[str, ...] = ()
    calibration_batches: int | None = None
    target: str | None = None

    def plan(self, network: Network, task: Task) -> QuantizePlan:
        """Raises RecipeError for unknown options, ExportError for an unknown target and TaskError where calibration
        data is needed and missing."""
        self._check()
        folded = fold_batch_norm(network).eval()
        readers, skipped = _weights(folded, self.ignore)
        placed = Placement()
        if self.activations is not None:
            rules = RULES.get(self.target or "onnxruntime", ONNX_RUNTIME)
            kernels = {n.name for nodes in readers.values() for n in nodes if rules.multiplies(n)}
            placed = place(folded, kernels, rules)
            skipped += placed.skipped
            for name in [w for w, nodes in readers.items() if not all(n.name in kernels for n in nodes)]:
                skipped.append(Skipped(name, "stored as whole numbers, but its call has a kernel for floats only"))
        stored, tensors = self._store(folded, readers)
        points = self._points(folded, task, placed)
        small = sum(folded.tensor(s.weight).numel() * 3 for s in stored) < (
            POINT_BYTES * len(points) + WEIGHT_BYTES * len(stored))
        return QuantizePlan(self.weights, self.activations, stored, points, bool(stored), skipped=tuple(skipped),
                            grows=("bytes",) if small else (), tensors=tensors)

    def _check(self) -> None:
        if self.weights not in WEIGHTS:
            raise RecipeError(f"weights={self.weights!r} is not known; {did_you_mean(str(self.weights), WEIGHTS)}")
        if self.activations is not None and self.activations not in ACTIVATIONS:
            raise RecipeError(f"activations={self.activations!r} is not known; "
                              f"{did_you_mean(str(self.activations), ACTIVATIONS)}, or None")
        check_method("ranges", self.ranges)
        check_method("weight_ranges", self.weight_ranges)
        if self.target is not None:
            deploy.target(self.target)

    def _store(self, network: Network, readers: dict[str, list[Node]]) -> tuple[tuple[Stored, ...], dict[str, Tensor]]:
        choose = grids.least_squares if self.weight_ranges == "mse" else grids.minmax
        stored, tensors = [], {}
        for name, nodes in readers.items():
            spec = WEIGHTS[self.weights]
            axis = weight_axis(nodes[0])
            weight = network.tensor(name).detach().cpu()
            scale, _ = choose(weight, Spec(spec.bits, spec.signed, spec.symmetric, axis))
            stored.append(Stored(name, axis))
            tensors[scale_name(name)] = scale
        return tuple(stored), tensors

    def _points(self, network: Network, task: Task, placed: Placement) -> tuple[Point, ...]:
        if not placed.points:
            return ()
        groups: dict[str, list[str]] = {}
        for name, leader in placed.points.items():
            groups.setdefault(leader, []).append(name)
        chosen = activation_grids(network, task, groups, ACTIVATIONS[str(self.activations)], self.ranges,
                                  self.calibration_batches)
        return tuple(Point(name, *chosen[leader], placed.readers[name]) for name, leader in placed.points.items())


def scale_name(weight: str) -> str:
    return f"{weight}_scale"


def zero_name(weight: str) -> str:
    """Zero points are stored although they are zero: runtimes find a whole-number kernel only where they are."""
    return f"{weight}_zero_point"


def weight_axis(node: Node) -> int:
    """The axis of a call's weight along which every channel gets a scale of its own."""
    return 1 if node.target in TRANSPOSED else 0


def _weights(network: Network, ignore: tuple[str, ...]) -> tuple[dict[str, list[Node]], list[Skipped]]:
    """Weight name -> the calls that read it, where it can be stored as whole numbers; and the others, with why."""
    found: dict[str, list[Node]] = {}
    skipped: list[Skipped] = []
    first: dict[int, str] = {}
    for node in network.calls(*WEIGHTED):
        name = weight_name(node)
        reasons = list(_reasons(network, node, name, ignore))
        if reasons:
            skipped.append(Skipped(name or node.meta.get("module") or node.name, reasons[0]))
        elif name is not None:
            found.setdefault(first.setdefault(id(network.tensor(name)), name), []).append(node)
    refused = {s.path for s in skipped}
    for pattern in ignore:
        if not any(_matches(n, weight_name(n), (pattern,)) for n in network.calls(*WEIGHTED)):
            skipped.append(Skipped(pattern, "this ignore pattern matched no layer"))
    return {n: nodes for n, nodes in found.items() if not refused & set(network.tied_names(n))}, skipped


def _reasons(network: Network, node: Node, name: str | None, ignore: tuple[str, ...]) -> Iterator[str]:
    if _matches(node, name, ignore):
        yield "named in ignore"
    if name is None:
        yield "its weight is computed, or stored in another form already"
        return
    weight = network.tensor(name)
    if weight.dtype != torch.float32:
        yield f"its weight is {str(weight.dtype).removeprefix('torch.')}; expected float32"
    elif not weight.numel() or not torch.isfinite(weight).all():
        yield "its weight is empty or not finite"
    for reader in network.users_of(name):
        if reader.target not in WEIGHTED or weight_name(reader) not in network.tied_names(name):
            yield f"its weight is read by {reader.target} too, which would read it back to float at every run"
        elif weight_axis(reader) != weight_axis(node):
            yield "its weight is read along different axes"


def _matches(node: Node, name: str | None, ignore: tuple[str, ...]) -> bool:
    known = [node.name, node.meta.get("module") or "", name or ""]
    return any(fnmatch(k, pattern) for k in known for pattern in ignore)


# ---- doing

def store_weight(network: Network, stored: Stored, scale: Tensor, spec: Spec) -> None:
    """Puts whole numbers in the place of a weight; its readers read them back through a scale per channel."""
    name = stored.weight
    try:
        weight = network.tensor(name).detach()
    except KeyError as error:
        raise PlanError(f"the plan stores {name!r}, which the network has not; plan again for this network") from error
    if not weight.is_floating_point() or weight.shape[stored.axis] != len(scale):
        raise PlanError(f"the plan stores {name!r} with {len(scale)} scales along axis {stored.axis}; it is "
                        f"{list(weight.shape)} {weight.dtype}: plan again for this network")
    scale = scale.to(weight.device)
    spec = Spec(spec.bits, spec.signed, spec.symmetric, stored.axis)
    numbers = grids.quantize(weight.double(), scale, torch.zeros_like(scale, dtype=torch.int32), spec)
    names = network.tied_names(name)
    patterns = {n: network.patterns[n] for n in names if n in network.patterns}
    for known in names:
        network.remove_tensor(known)
    for known in names:
        network.add_tensor(known, numbers, buffer=True)
    network.patterns.update(patterns)
    network.add_tensor(scale_name(name), scale, buffer=True)
    network.add_tensor(zero_name(name), torch.zeros_like(scale, dtype=spec.dtype), buffer=True)
    nodes = [n for n in network.graph.nodes if n.op == "get_attr" and n.target in names]
    with network.graph.inserting_before(nodes[0]):
        scales, zeros = (network.graph.create_node("get_attr", t, name=node_name(t))
                         for t in (scale_name(name), zero_name(name)))
    for node in nodes:
        readers = list(node.users)
        whole = insert_call(network, decomposed.dequantize_per_channel.default,
                            (node, scales, zeros, stored.axis, spec.lowest, spec.highest, spec.dtype),
                            after=node, like=readers[0])
        for reader in readers:
            reader.replace_input_with(node, whole)


def round_value(network: Network, point: Point, spec: Spec) -> None:
    """Puts a quantize/dequantize pair after a node; the point's readers read the rounded value."""
    try:
        node = network.node(point.node)
        readers = [network.node(r) for r in point.readers]
    except KeyError as error:
        raise PlanError(f"the plan names a node that the network has not ({error.args[0]}); "
                        "plan again for this network") from error
    grid: tuple[Any, ...] = (point.scale, point.zero_point, spec.lowest, spec.highest, spec.dtype)
    whole = insert_call(network, decomposed.quantize_per_tensor.default, (node, *grid), after=node, like=node)
    back = insert_call(network, decomposed.dequantize_per_tensor.default, (whole, *grid), after=whole, like=node)
    for reader in readers:
        if node not in reader.all_input_nodes:
            raise PlanError(f"the plan says that {reader.name!r} reads {node.name!r}, which it does not; "
                            "plan again for this network")
        reader.replace_input_with(node, back)


__all__ = ["ACTIVATIONS", "WEIGHTS", "Point", "Quantize", "QuantizePlan", "Stored"]
