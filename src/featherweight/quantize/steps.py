"""Quantize: weights stored as whole numbers, values rounded to a grid between the operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from featherweight import deploy
from featherweight.errors import PlanError, RecipeError
from featherweight.network import Network, fold_batch_norm
from featherweight.network.devices import device_of
from featherweight.quantize import post, rounding
from featherweight.quantize.biases import corrected
from featherweight.quantize.distilled import CALIBRATIONS, calibrated
from featherweight.quantize.formats import ACTIVATIONS, DYNAMIC, value_bits, weight_bits
from featherweight.quantize.gates import gated, write_out
from featherweight.quantize.layers import Layer, Wish, layers
from featherweight.quantize.learners import LEARNERS
from featherweight.quantize.placement import Placement, place
from featherweight.quantize.ranges import check_method
from featherweight.quantize.rescale import Product, multiply, rescaled
from featherweight.quantize.rules import FEW_BITS, ONNX_RUNTIME, RULES, Rules
from featherweight.quantize.store import Point, Stored, round_value, scale_name, store_weight
from featherweight.quantize.training import Training
from featherweight.steps import Plan, Rewrite, Skipped, Stage
from featherweight.task import Task

#: bytes of graph that a rounded value and a stored weight bring along, about, in the larger of the two files
POINT_BYTES = 900
WEIGHT_BYTES = 900
#: bytes of a scale and its zero point
SCALE_BYTES = 5


@dataclass(frozen=True)
class Rung:
    """One attempt of a ``Ladder``: its name, the score with it, and whether it stayed. seconds are not compared."""

    name: str
    score: float
    kept: bool
    seconds: float = field(default=0.0, compare=False)

    def __str__(self) -> str:
        return f"{self.name}: {self.score:.4g}{'' if self.kept else ', dropped'} ({self.seconds:.1f} s)"


@dataclass(frozen=True)
class QuantizePlan(Plan):
    """Which weights are stored how, and which values are rounded to which grid.

    changed: tensors of the network (batch norm folded) that get new values first, which lie in the plan's tensors under
    their names: equalized or rounded weights, corrected biases. Biases stay float: a target whose kernels want whole
    ones rounds them to (input scale times weight scale) when it exports. trail: what a ``Ladder`` tried, in order.
    gates: activations that are written out as products first. products: with vectors that are put in first, by which
    values are divided before they are rounded, or multiplied after; the vectors lie in the plan's tensors.
    """

    stored: tuple[Stored, ...]
    points: tuple[Point, ...]
    changed: tuple[str, ...] = ()
    fold_batch_norm: bool = True
    trail: tuple[Rung, ...] = ()
    products: tuple[Product, ...] = ()
    gates: tuple[str, ...] = ()

    def summary(self) -> str:
        kinds = Counter(s.kind for s in self.stored)
        values = Counter(p.kind for p in self.points)
        parts = [f"{n} weights as {kind}" for kind, n in kinds.items()] or ["0 weights"]
        stayed = [r.name for r in self.trail if r.kept]
        names = " + ".join(stayed[2:] or stayed[1:])
        climbed = f"; {names}: {self.trail[0].score:.4g} -> {self._reached():.4g}" if stayed else ""
        return ", ".join([*parts, *(f"{n} values as {kind}" for kind, n in values.items())]) + climbed

    def _reached(self) -> float:
        return [r.score for r in self.trail if r.kept][-1]

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *(f"  {rung}" for rung in self.trail)])

    def apply(self, network: Network) -> Network:
        """A copy with batch norm folded, the named weights stored as whole numbers, the named values rounded."""
        if not self.stored and not self.points:
            return network.copy()
        result = fold_batch_norm(network) if self.fold_batch_norm else network.copy()
        write_out(result, self.gates)
        for product in self.products:
            multiply(result, product, self._tensor(product.factor).to(device_of(result)))
        for name in self.changed:
            self._change(result, name)
        for stored in self.stored:
            store_weight(result, stored, self.tensors.get(scale_name(stored.weight)))
        for point in self.points:
            round_value(result, point)
        result.changed()
        return result

    def _change(self, network: Network, name: str) -> None:
        new, known = self._tensor(name), network.tensors().get(name)
        if known is None or known.shape != new.shape:
            raise PlanError(f"the plan changes {name!r} of {list(new.shape)}, which the network "
                            f"{'has not' if known is None else f'has as {list(known.shape)}'}; plan again for it")
        network.set_tensor(name, new.to(known))

    def _tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise PlanError(f"the plan lacks the tensor {name!r}; load it with the tensors that lie beside it")
        return self.tensors[name]


@dataclass(frozen=True)
class Quantize(Rewrite):
    """Stores weights as whole numbers and rounds values to whole numbers between operators.

    weights: "int8" to "int3" (symmetric), "ternary", "int2" (four levels, none of them zero), "binary" (signs); a scale
        per output channel. "apot3" to "apot5": additive powers of two. "fp16", "bf16": two bytes a weight, computed as
        float32.
    activations: "uint8" to "uint1" (affine, a grid per value), "int8" to "int2" (symmetric, signed only where values
        lie below zero), or None: values stay float and weights are read back to float. "dynamic": linear calls round
        what they read to 8 bits when they run, to a grid over the range of all that is read, so that no data is
        needed; what else has a weight reads floats. The samples of a batch share that grid.
    ranges: how a value's grid is chosen from calibration data: "minmax", "mse" (least squared error), "percentile",
        "kl"; None takes "minmax" for 8 bits and "mse" for fewer. weight_ranges: "minmax", "mse" or None.
    granularity: what has a scale of its own: "channel", "tensor", or a number of weights (a group of one row).
    rounding: "nearest", "gptq", "adaround" or "blocks" (``rounding.METHODS``).
    equalize: cross-layer equalization before; smooth: SmoothQuant's alpha (0.5 as the paper has it), None for none.
    rescale: where the channels of a value differ too much for one grid, and no neighbour absorbs a scale for each of
        them (as equalize and smooth need), products with vectors are put in before and after it.
    correct_bias: shifts biases so that the mean of every channel stays what it was.
    mixed: pattern -> another form for what it fits: {"blocks.3.*": "int8"}, with values: {"head": "int8/uint8"} or
        {"stem": "int8/float"}. The last pattern that fits holds.
    ends: the same for the calls that see the input or give the output, where fewer than 8 bits are asked for; None
        treats them like the others.
    learn: how rounding is trained when the step is used during training, ``learners.LEARNERS``: "lsq" (learned scales),
        "ste", "pact", "dorefa"; "apot" for weights of "apot3" to "apot5"; "ttq" for weights="ternary"; "balanced" and
        "react" for weights="binary". Where values have one bit too, "balanced" needs Train(clip=1.0), as
        gradients grow with every layer towards its end, and AdamW at lr=0.01 without weight decay goes further than
        SGD (benchmarks/low_bit_training.py, "lsq": 82.22 % against 80.52).
    progressive: forms that the training passes through, in equal shares of it, before it ends with the form above:
        ("int8", "int6/uint6") are weights, and values as well. A layer keeps its own form where that is the finer one.
    ignore: patterns (``*`` and ``?``) of module paths, weight names or node names that stay float.
    calibration: "data", the task's calibration split, or "distilled": inputs made from the network's batch-norm
        statistics (``distilled_data``), so that no data is needed.
    calibration_batches: at most so many batches of the calibration split; None takes all (4 where they are made).
    target: the runtime whose whole-number kernels decide where values are rounded (``rules.RULES``); None takes
        the job's, or "onnxruntime". The network runs in any runtime, if not always as fast.

    With ``activations=None`` files shrink, and runtimes differ. ONNX Runtime reads the weights of convolutions back
    once, when it loads (as fast as in float), and rounds what linear calls read to 8 bits, which makes them faster the
    larger they are (4096 to 4096, one row: 9 times with 4 bits, 3 times with 8). OpenVINO reads the weights of
    convolutions back once, and rounds what linear calls read to 8 bits, in groups and anew at every run; so it does
    for "dynamic" too, with which ONNX Runtime is two to three times as fast where linear calls read many rows. On x86
    without VNNI instructions, kernels cut off sums of products of uint8 and int8 at 16 bits. ONNX Runtime does not if
    the session's entry "session.x64quantprecision" is "1", as in ours: write it into yours. OpenVINO has no such entry;
    there, write Quantize("int7", ends=None), whose sums fit. Values of fewer than 8 bits are simulated: no runtime here
    has kernels for them.
    """

    stage: ClassVar[Stage] = Stage.PRECISION
    weights: str = "int8"
    activations: str | None = "uint8"
    ranges: str | None = None
    weight_ranges: str | None = None
    granularity: str | int = "channel"
    rounding: str = "nearest"
    equalize: bool = False
    smooth: float | None = None
    rescale: bool = False
    correct_bias: bool = False
    mixed: Mapping[str, str] = field(default_factory=dict)
    ends: str | None = "int8/uint8"
    learn: str = "lsq"
    progressive: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    calibration: str = "data"
    calibration_batches: int | None = None
    target: str | None = None

    def plan(self, network: Network, task: Task) -> QuantizePlan:
        """Raises RecipeError for unknown options, ExportError for an unknown target and TaskError where calibration
        data is needed and missing."""
        self.check()
        folded = fold_batch_norm(network).eval()
        task, said = calibrated(self.calibration, network, task, self.calibration_batches)
        found, skipped = layers(folded, self.wish())
        values, more = post.prepared(self, folded, task)
        gates = self.gates(folded, found)
        write_out(folded, gates)
        placed = self.placed(folded, found)
        vectors: dict[str, Tensor] = {}
        products: tuple[Product, ...] = ()
        if self.rescale and placed.points:
            new, vectors, products = rescaled(folded, task, placed, self.calibration_batches)
            values |= new
            found, _ = layers(folded, self.wish())
            placed = self.placed(folded, found)
        skipped = [*skipped, *placed.skipped, *self._left_float(found, placed)]
        even = folded.copy()  # what biases are corrected towards
        scales = post.weight_scales(folded, found, self.weight_ranges)
        points = post.points(self, folded, task, placed, found)
        new, points, rest = rounding.rounded(self.rounding, folded, task, found, scales, points,
                                             self.calibration_batches)
        values |= new
        tensors = {scale_name(name): scale for name, scale in scales.items()} | values | vectors
        made = QuantizePlan(tuple(f.stored for f in found), points, tuple(sorted(values)), bool(found),
                            products=products, gates=gates, tensors=tensors,
                            skipped=tuple(dict.fromkeys([*skipped, *said, *more, *rest])),
                            grows=self.grows(folded, found, points))
        return corrected(made, network, task, self.calibration_batches, even) if self.correct_bias else made

    def check(self) -> None:
        """Raises RecipeError, or ExportError, for unknown options."""
        self.wish().check()
        if self.ranges is not None:
            check_method("ranges", self.ranges)
        if self.weight_ranges is not None:
            check_method("weight_ranges", self.weight_ranges, ("minmax", "mse"))
        check_method("rounding", self.rounding, rounding.METHODS)
        check_method("learn", self.learn, LEARNERS)
        check_method("calibration", self.calibration, CALIBRATIONS)
        if self.smooth is not None and not 0 <= self.smooth <= 1:
            raise RecipeError(f"smooth={self.smooth}; expected a number from 0 to 1, as in smooth=0.5")
        if self.target is not None:
            deploy.target(self.target)

    def start(self, network: Network, task: Task) -> Training:
        """Used during training: weights and values are rounded in every step, gradients pass. Scales start where
        calibration puts them."""
        self.check()
        return Training(self, network, calibrated(self.calibration, network, task, self.calibration_batches)[0])

    def wish(self) -> Wish:
        return Wish(self.weights, self.activations, self.granularity, self.mixed, self.ends, self.ignore)

    def rules(self) -> Rules:
        return FEW_BITS if value_bits(self.activations) < 8 else RULES.get(self.target or "onnxruntime", ONNX_RUNTIME)

    def _kernels(self, found: list[Layer]) -> set[str]:
        """The calls that multiply whole numbers."""
        rules = self.rules()
        return {n.name for layer in found if layer.on_grid for n in layer.nodes if rules.multiplies(n)}

    def gates(self, folded: Network, found: list[Layer]) -> tuple[str, ...]:
        """The activations that are to be written out as products before values are rounded."""
        return gated(folded, self._kernels(found), self.rules())

    def placed(self, folded: Network, found: list[Layer]) -> Placement:
        """Where values are rounded: around the calls of ``found`` that compute on whole numbers."""
        rules, placed = self.rules(), Placement()
        if self.activations in ACTIVATIONS or any(layer.on_grid for layer in found):
            placed = place(folded, self._kernels(found), rules)
        return placed.at_run_time([n for layer in found if layer.activations == DYNAMIC and layer.stored.group is None
                                   for n in layer.nodes if rules.takes(n, DYNAMIC)])

    def _left_float(self, found: list[Layer], placed: Placement) -> list[Skipped]:
        if self.activations is None:
            return []
        return [Skipped(layer.stored.weight, "stored as whole numbers, but its call has a kernel for floats only")
                for layer in found if layer.activations is not None
                and not all(n.name in placed.kernels for n in layer.nodes)]

    def grows(self, folded: Network, found: list[Layer], points: tuple[Point, ...]) -> tuple[str, ...]:
        """A very small network's file grows: the graph gets longer than the weights get shorter."""
        saved = sum(folded.tensor(f.stored.weight).numel() * (4 - weight_bits(f.stored.kind) / 8)
                    - SCALE_BYTES * f.stored.scales(folded.tensor(f.stored.weight).shape) for f in found)
        grouped = sum(f.stored.group is not None for f in found)
        return ("bytes",) if saved < POINT_BYTES * len(points) + WEIGHT_BYTES * (len(found) + grouped) else ()


__all__ = ["Quantize", "QuantizePlan", "Rung"]
