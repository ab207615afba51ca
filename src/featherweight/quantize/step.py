"""Quantize: weights stored as integers, activations rounded to a grid between the operators."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from featherweight import deploy
from featherweight.calibrate.distilled import CALIBRATIONS, calibrated
from featherweight.errors import RecipeError, TaskError
from featherweight.network import Network, fold_batch_norm
from featherweight.numerics.formats import ACTIVATIONS, DYNAMIC, GRIDS, HALVES
from featherweight.quantize.grids import prepared, value_grids, weight_scales
from featherweight.quantize.layers import LayerForm, layers
from featherweight.quantize.placement import Placement, integer_calls
from featherweight.quantize.plan import QuantizePlan, announced
from featherweight.quantize.prepare.biases import corrected, nearer
from featherweight.quantize.prepare.expand_activations import gated, write_out
from featherweight.quantize.prepare.rescale import Product, rescaled
from featherweight.quantize.prepare.uneven import UNEVEN, evenly_placed, unevenness
from featherweight.quantize.ranges import METHODS as RANGES
from featherweight.quantize.ranges import Tops
from featherweight.quantize.request import Request, split
from featherweight.quantize.rounding.methods import METHODS, rounded
from featherweight.quantize.store import scale_name
from featherweight.quantize.sums import DEVICES, channel_axes, unsaturated
from featherweight.quantize.training.driver import Learning, Training
from featherweight.quantize.training.learners import LEARNERS, check_learner
from featherweight.steps import ALONE, Context, Rewrite, Skipped, Stage
from featherweight.steps.options import BATCH_LIMIT, Numbers, check_known, check_numbers
from featherweight.task import Task

#: batches by which biases are corrected, and that is judged, where nobody asked for it
FEW = 2
#: options of which None takes the usual one
USUAL = {"ranges": RANGES, "weight_ranges": ("minmax", "mse")}
NUMBERS = {"smooth": Numbers(0.5, least=0, most=1, none="none"), "calibration_batches": BATCH_LIMIT}


@dataclass(frozen=True)
class _Ready:
    """A plan before weights are rounded. folded: the network that it is made on; even: a copy, towards which biases are
    corrected; values: what was changed to prepare it; unevenness: of the worst call (``prepare/uneven``)."""

    plan: QuantizePlan
    folded: Network
    even: Network
    found: list[LayerForm]
    scales: dict[str, Tensor]
    values: dict[str, Tensor]
    unevenness: float


@dataclass(frozen=True)
class Quantize(Rewrite):
    """Stores weights as integers and rounds activations to integers between operators.

    weights: "int8" to "int3" (symmetric), "ternary", "int2" (four levels, none of them zero), "binary" (signs); a scale
        per output channel. "apot3" to "apot5": additive powers of two. "fp16", "bf16": two bytes a weight, computed as
        float32.
    activations: "uint8" to "uint1" (affine, a grid per activation), "int8" to "int2" (symmetric, signed only where
        activations lie below zero), or None: activations stay float and weights are read back to float. "dynamic":
        linear calls round what they read to 8 bits when they run, to a grid over the range of all that is read, so
        that no data is needed; what else has a weight reads floats. The samples of a batch share that grid.
    ranges: how a value's grid is chosen from calibration data: "minmax", "mse" (least squared error), "percentile",
        "kl"; None takes "minmax" for 8 bits and "mse" for fewer. weight_ranges: "minmax", "mse" or None.
    granularity: what has a scale of its own: "channel", "tensor", or a number of weights (a group of one row).
    rounding: "nearest", "gptq", "adaround" or "blocks" (``rounding.methods.METHODS``).
    equalize: cross-layer equalization before; None: where channels of an activation differ so much that its grid loses
        four bits on them, and equalization halves that (``prepare/uneven``).
    smooth: SmoothQuant's alpha (0.5 as the paper has it), None for none.
    rescale: where the channels of a value differ too much for one grid, and no neighbour absorbs a scale for each of
        them (as equalize and smooth need), products with vectors are put in before and after it.
    correct_bias: shifts biases so that the mean of every channel stays what it was; None: where activations are rounded
        to fixed grids, and the outputs on two batches of calibration data get nearer to the float ones by it.
    mixed: pattern -> another form for what it fits: {"blocks.3.*": "int8"}, with activations: {"head": "int8/uint8"} or
        {"stem": "int8/float"}. The last pattern that fits holds.
    ends: the same for the calls that see the input or give the output, where fewer than 8 bits are asked for; None
        treats them like the others.
    learn: how rounding is trained when the step is used during training, ``learners.LEARNERS``: "lsq" (learned scales),
        "ste", "pact", "dorefa"; "apot" for weights of "apot3" to "apot5"; "ttq" for weights="ternary"; "balanced" and
        "react" for weights="binary". Where activations have one bit too, "balanced" needs Train(clip=1.0), as
        gradients grow with every layer towards its end, and AdamW at lr=0.01 without weight decay goes further than
        SGD (benchmarks/low_bit_training.py, "lsq": 82.22 % against 80.52).
    progressive: forms that the training passes through, in equal shares of it, before it ends with the form above:
        ("int8", "int6/uint6") are weights, and activations as well. A layer keeps its own form where that is the finer
        one.
    ignore: patterns of layers that stay float (``network/layers``).
    calibration: "data", the task's calibration split, or "distilled": inputs made from the network's batch-norm
        statistics (``distilled_data``), so that no data is needed.
    calibration_batches: at most so many batches of the calibration split; None takes all (4 where they are made).
    target: the runtime whose integer kernels decide where values are rounded (``rules.RULES``); None takes
        the job's, or "onnxruntime". The network runs in any runtime, if not always as fast.
    device: "any": scales of weights are chosen so that kernels saturate nowhere on calibration data, in a plain session
        on any processor (x86 ones without VNNI instructions add two products of 8 bits in 16 bits; ``quantize/sums``).
        "vnni": for processors known to have VNNI, or other sums of 32 bits; scales are not limited.

    With ``activations=None`` files shrink, and runtimes differ. ONNX Runtime reads the weights of convolutions back
    once, when it loads (as fast as in float), and rounds what linear calls read to 8 bits, which makes them faster the
    larger they are (4096 to 4096, one row: 9 times with 4 bits, 3 times with 8). OpenVINO reads the weights of
    convolutions back once, and rounds what linear calls read to 8 bits, in groups and anew at every run; so it does
    for "dynamic" too, with which ONNX Runtime is two to three times as fast where linear calls read many rows. Values
    of fewer than 8 bits are simulated: no runtime here has kernels for them.

    Example:
        >>> plan = fw.quantize.Quantize(weights="int8", activations="uint8").plan(network, task)
        >>> stored = plan.apply(network)
        >>> stored.save("int8.fw") < network.save("float.fw")
        True
    """

    stage: ClassVar[Stage] = Stage.PRECISION
    weights: str = "int8"
    activations: str | None = "uint8"
    ranges: str | None = None
    weight_ranges: str | None = None
    granularity: str | int = "channel"
    rounding: str = "nearest"
    equalize: bool | None = None
    smooth: float | None = None
    rescale: bool = False
    correct_bias: bool | None = None
    mixed: Mapping[str, str] = field(default_factory=dict)
    ends: str | None = "int8/uint8"
    learn: str = "lsq"
    progressive: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    calibration: str = "data"
    calibration_batches: int | None = None
    target: str | None = None
    device: str = "any"

    def plan(self, network: Network, task: Task) -> QuantizePlan:
        """Raises RecipeError for unknown options, ExportError for an unknown target and TaskError where calibration
        data is needed and missing."""
        self.check()
        task, said = calibrated(self.calibration, network, task, self.calibration_batches)
        ready = self._ready(network, task, bool(self.equalize))
        if self.equalize is None and ready.unevenness > UNEVEN:
            even = self._ready(network, task, True)
            ready = even if even.unevenness < ready.unevenness / 2 else ready
        made = self._rounded(ready, task, said)
        if self.correct_bias:
            made = corrected(made, network, task, self.calibration_batches, ready.even)
        elif self.correct_bias is None and any(point.kind != DYNAMIC for point in made.points):
            few = min(self.calibration_batches or FEW, FEW)
            moved = corrected(made, network, task, few, ready.even)
            if nearer(moved, made, network, task, few):
                made = replace(moved, skipped=made.skipped)
        _check_finite(made)
        if not ready.found:
            return announced(made, network)
        made.round(ready.folded)
        return announced(made, network, ready.folded)

    def _ready(self, network: Network, task: Task, equalize: bool) -> _Ready:
        """The network prepared, and its grids."""
        folded = fold_batch_norm(network).eval()
        request, batches = self.request(), self.calibration_batches
        found, skipped = layers(folded, request)
        values, more = prepared(folded, task, self.smooth, equalize, batches)
        gates = gated(folded, integer_calls(found, request.rules()), request.rules())
        write_out(folded, gates)
        placed = evenly_placed(folded, task, found, request)
        vectors: dict[str, Tensor] = {}
        products: tuple[Product, ...] = ()
        if self.rescale and placed.points:
            new, vectors, products = rescaled(folded, task, placed, batches)
            values |= new
            found, _ = layers(folded, request)
            placed = evenly_placed(folded, task, found, request)
        skipped = [*skipped, *placed.skipped, *self._left_float(found, placed), *self._halves(placed)]
        scales, tops = weight_scales(folded, found, self.weight_ranges), Tops(channel_axes(folded, found, placed))
        points = value_grids(folded, task, placed, found, self.activations, self.ranges, batches, tops)
        if not DEVICES[self.device]:
            scales = unsaturated(folded.tensor, found, scales, placed, points, tops)
        weights = [(n, folded.tensor(f.stored.weight)) for f in found for n in f.nodes if n.name in placed.kernels]
        start = QuantizePlan(tuple(f.stored for f in found), points, (), bool(found), products=products, gates=gates,
                             tensors=vectors, skipped=tuple(dict.fromkeys([*skipped, *more])))
        even = folded.copy() if self.correct_bias else folded  # what biases are corrected towards
        return _Ready(start, folded, even, found, scales, values, unevenness(weights, tops))

    def _rounded(self, ready: _Ready, task: Task, said: list[Skipped]) -> QuantizePlan:
        new, points, rest = rounded(self.rounding, ready.folded, task, ready.found, ready.scales, ready.plan.points,
                                    self.calibration_batches)
        values, scales = ready.values | new, {scale_name(name): scale for name, scale in ready.scales.items()}
        return replace(ready.plan, points=points, changed=tuple(sorted(values)),
                       tensors=scales | values | dict(ready.plan.tensors),
                       skipped=tuple(dict.fromkeys([*ready.plan.skipped, *said, *rest])))

    def check(self) -> None:
        """Raises RecipeError, or ExportError, for options that make no sense."""
        self.request().check()
        names: dict[str, Collection[str]] = {"rounding": METHODS, "learn": LEARNERS, "calibration": CALIBRATIONS,
                                             "device": DEVICES}
        names |= {option: known for option, known in USUAL.items() if getattr(self, option) is not None}
        for option, known in names.items():
            check_known(type(self).__name__, option, getattr(self, option), known)
        check_numbers(self, NUMBERS)
        for text in self.progressive:
            weights, values = split(text, self.activations)
            if weights not in GRIDS or (values is not None and values not in ACTIVATIONS):
                raise RecipeError(f"progressive={self.progressive!r}: {text!r} is no form to train; expected weights "
                                  f"of {', '.join(GRIDS)}, with activations or without, as in ('int8/uint8', "
                                  "'int6/uint6')")
        if self.target is not None:
            deploy.target(self.target)

    def start(self, network: Network, task: Task, context: Context = ALONE) -> Training:
        """Used during training: weights and activations are rounded in every step, gradients pass. Scales start where
        calibration puts them."""
        self.check()
        self.check_training()
        task, _ = calibrated(self.calibration, network, task, self.calibration_batches)
        learning = Learning(self.learn, self.progressive, self.ranges, self.weight_ranges, self.calibration_batches,
                            self.device)
        return Training(self.request(), learning, network, task)

    def request(self) -> Request:
        return Request(self.weights, self.activations, self.granularity, self.mixed, self.ends, self.ignore,
                       self.target)

    def check_training(self) -> None:
        """Raises RecipeError for options that have no meaning during training."""
        for name, given, plain in (("rounding", self.rounding, "nearest"), ("equalize", self.equalize or False, False),
                                   ("smooth", self.smooth, None), ("rescale", self.rescale, False),
                                   ("correct_bias", self.correct_bias or False, False)):
            if given != plain:
                raise RecipeError(f"{name}={given!r} is for networks that are trained no more; leave it out, or put "
                                  "Quantize after Train")
        if isinstance(self.granularity, int):
            raise RecipeError(f"granularity={self.granularity} cannot be used during training; write "
                              "granularity='channel' or 'tensor', or put Quantize after Train")
        ends = () if self.ends is None else (self.ends,)
        check_learner(self.learn, {split(text, None)[0] for text in (self.weights, *self.mixed.values(), *ends)})
        if self.progressive and not LEARNERS[self.learn].progressive:
            raise RecipeError(f"learn={self.learn!r} has no other number of bits to come from; leave out progressive")

    def _halves(self, placed: Placement) -> list[Skipped]:
        """What is said of halves whose calls read rounded activations."""
        if self.weights not in HALVES or not placed.points:
            return []
        return [Skipped("", f"weights={self.weights!r} are read back to float, and activations are rounded all the "
                            f"same (activations={self.activations!r}); for halves alone write "
                            f"Quantize(weights={self.weights!r}, activations=None)")]

    def _left_float(self, found: list[LayerForm], placed: Placement) -> list[Skipped]:
        if self.activations is None:
            return []
        return [Skipped(layer.stored.weight, "stored as integers, but its call has a kernel for floats only")
                for layer in found if layer.activations is not None
                and not all(n.name in placed.kernels for n in layer.nodes)]


def _check_finite(plan: QuantizePlan) -> None:
    """Raises TaskError where a plan would write numbers that are not finite."""
    for name in plan.changed:
        if not bool(plan.tensors[name].isfinite().all()):
            raise TaskError(f"the calibration data makes {name!r} infinite or NaN; look at that data")


__all__ = ["Quantize"]
