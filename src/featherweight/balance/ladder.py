"""Ladder: post-training quantization that helps itself, from what is cheap to what is costly."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from featherweight.errors import RecipeError
from featherweight.judge.candidates import judged
from featherweight.judge.damage import Judge, scored
from featherweight.network import Network, fold_batch_norm
from featherweight.numerics.formats import value_bits, weight_bits
from featherweight.quantize.candidates import candidates_of
from featherweight.quantize.layers import LayerForm, layers
from featherweight.quantize.plan import QuantizePlan, Rung
from featherweight.quantize.step import Quantize
from featherweight.seeds import generators_kept
from featherweight.steps import Rewrite, Skipped, Stage
from featherweight.steps.options import Numbers, check_batches, check_known, check_number, check_split
from featherweight.task import Task

aten = torch.ops.aten
ATTENDING = (aten.scaled_dot_product_attention.default, aten.layer_norm.default)


@dataclass(frozen=True)
class Change:
    """A rung: what it changes of a ``Quantize``, whether it reads calibration data, and which networks it is for."""

    options: Mapping[str, Any]
    reads: bool = True
    suits: Callable[[Network], bool] = field(default=lambda network: True)


#: name -> rung; add one of your own under a new name, and name it in ``rungs``
RUNGS: dict[str, Change] = {
    "minmax": Change({"ranges": "minmax", "weight_ranges": "minmax"}, reads=False),
    "mse": Change({"ranges": "mse", "weight_ranges": "mse"}, reads=False),
    "percentile": Change({"ranges": "percentile", "weight_ranges": "mse"}, reads=False),
    "kl": Change({"ranges": "kl", "weight_ranges": "mse"}, reads=False),
    "correct_bias": Change({"correct_bias": True}),
    "equalize": Change({"equalize": True}),
    "equalize and correct_bias": Change({"equalize": True, "correct_bias": True}),
    "smooth": Change({"smooth": 0.5}, suits=lambda network: bool(network.calls(*ATTENDING))),
    "rescale": Change({"rescale": True}),
    "gptq": Change({"rounding": "gptq"}),
    "adaround": Change({"rounding": "adaround"}),
    "blocks": Change({"rounding": "blocks"}),
}
#: the rungs that are climbed where none are named, in this order
CLIMB = ("mse", "equalize", "correct_bias", "equalize and correct_bias", "smooth", "rescale", "gptq", "blocks")


@dataclass(frozen=True)
class Ladder(Rewrite):
    """Post-training quantization that looks for its options: ``step`` as it is given, and then costlier methods until
    the score of the quantized network is within ``score_drop`` of the float one's.

    step: the ``Quantize`` that it begins with.
    score_drop: points of the task's score, on ``split``, of which at most ``batches`` are read (None: all).
    rungs: names of RUNGS in the order in which they are tried; None takes CLIMB: ranges by squared error, cross-layer
        equalization, bias correction, both at once, SmoothQuant where there is attention, rescaling, GPTQ, block
        reconstruction. Each is tried with all that were kept before, and is kept only if the score rises.
    widen: whether at last the layers whose rounding moves the outputs most get 8 bits, if they had fewer, and then
        stay float: 1, 2, 4, ... of them until that suffices, and of these no more than needed.

    The plan's ``trail`` says what was tried, and with which score. Where the score is not reached, the best that was
    found is taken, which ``skipped`` then says. The score is that of the network with rounded weights and activations
    in PyTorch.

    Example:
        >>> ladder = fw.balance.Ladder(fw.quantize.Quantize("int4"), score_drop=1.0)
        >>> ladder.plan(network, task).trail[0].name
        'float'
    """

    stage: ClassVar[Stage] = Stage.PRECISION
    step: Quantize = field(default_factory=Quantize)
    score_drop: float = 0.5
    rungs: tuple[str, ...] | None = None
    widen: bool = True
    split: str = "validation"
    batches: int | None = None

    def plan(self, network: Network, task: Task) -> QuantizePlan:
        """Climbs. Raises RecipeError for options that make no sense and TaskError for what the task lacks."""
        self.check()
        task.require("score", self.split)
        return _Climb(self, network, task).climbed()

    def check_training(self) -> None:
        """Raises RecipeError: a ladder is for networks that are trained no more."""
        raise RecipeError("Ladder cannot be used during training, which learns its rounding; write "
                          "Train(during=(Quantize(...),)), or put Ladder into the recipe as a step of its own")

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        check_step("Ladder", self.step)
        check_number("Ladder", "score_drop", self.score_drop, Numbers(0.5, least=0, noun="points of the score"))
        for name in self.rungs or ():
            check_known("Ladder", "rung", name, RUNGS, f"rungs={CLIMB}")
        check_split("Ladder", self.split)
        check_batches("Ladder", self.batches)


class _Climb:
    """One network on its way up."""

    def __init__(self, ladder: Ladder, network: Network, task: Task) -> None:
        self.ladder, self.task = ladder, task
        self.network = network.copy().eval()
        self.trail: list[Rung] = []
        self.skipped: list[Skipped] = []
        self.step = ladder.step
        self.seen: list[Quantize] = []
        self.plan: QuantizePlan | None = None
        self.score = self.whole = -float("inf")

    def climbed(self) -> QuantizePlan:
        began = time.monotonic()
        self.whole = self._scored(self.network)
        self.trail.append(Rung("float", self.whole, True, time.monotonic() - began))
        self.tried("as given", self.step)
        for name in CLIMB if self.ladder.rungs is None else self.ladder.rungs:
            if self.reached(self.score):
                break
            self._rung(name)
        if self.ladder.widen and not self.reached(self.score):
            self._widened()
        if not self.reached(self.score):
            self.skipped.append(Skipped("", f"score_drop={self.ladder.score_drop} was not reached: {self.score:.6g} "
                                            f"against {self.whole:.6g} of the float network; this is the best found"))
        assert self.plan is not None
        return replace(self.plan, trail=tuple(self.trail), skipped=(*self.plan.skipped, *self.skipped))

    def reached(self, score: float) -> bool:
        return self.whole - score <= self.ladder.score_drop + 1e-9

    def _scored(self, network: Network) -> float:
        return scored(network, self.task, self.ladder.split, self.ladder.batches)

    def _rung(self, name: str) -> None:
        change = RUNGS[name]
        if not change.suits(self.network):
            return
        if change.reads and not self.task.has("calibration"):
            self.skipped.append(Skipped("", f"the rung {name!r} needs the task's calibration split and none was given"))
            return
        step = replace(self.step, **change.options)
        if step not in self.seen:
            self.tried(name, step)

    def tried(self, name: str, step: Quantize) -> bool:
        """Plans and scores ``step``, and keeps it if it is better, or as good as needed while less was enough before;
        gives whether its score is good enough."""
        began = time.monotonic()
        self.seen.append(step)
        plan = step.plan(self.network, self.task)
        score = self.score if self.plan is not None and _same(plan, self.plan) else self._scored(
            plan.apply(self.network).eval())
        kept = self.plan is None or score > self.score
        if self.plan is not None and self.reached(self.score):
            kept = self.reached(score)
        if kept:
            self.step, self.plan, self.score = step, plan, score
        self.trail.append(Rung(name, score, kept, time.monotonic() - began))
        return self.reached(score)

    # ---- layers left wider
    def _widened(self) -> None:
        few = [layer for layer in self._layers() if _bits(layer) < 8]
        if not few or not self._most("8 bits", few, _eight):
            self._most("float", self._layers(), _whole)

    def _layers(self) -> list[LayerForm]:
        return layers(fold_batch_norm(self.network), self.step.request())[0]

    def _most(self, what: str, found: list[LayerForm],
              wider: Callable[[Quantize, Sequence[LayerForm]], Quantize]) -> bool:
        """Leaves as few of the layers wider as is enough, the most sensitive first; whether it was enough."""
        order, base, first = self._by_damage(found), self.step, len(self.trail)

        def enough(count: int) -> bool:
            names = ", ".join(layer.stored.weight.removesuffix(".weight") for layer in order[:count])
            done = self.tried(f"{what} for {names}", wider(base, order[:count]))
            if self.trail[-1].kept:  # in the place of those that left more, or fewer, wider
                self.trail[first:-1] = [replace(r, kept=False) for r in self.trail[first:-1]]
            return done

        low, high = 0, min(1, len(order))
        while high > low and not enough(high):
            low, high = high, min(2 * high, len(order))
        if high == low:
            return False
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return True

    def _by_damage(self, found: list[LayerForm]) -> list[LayerForm]:
        """The layers whose rounding alone moves the outputs most, first."""
        split = "calibration" if self.task.has("calibration") else self.ladder.split
        with generators_kept():
            folded = fold_batch_norm(self.network).eval()
            forms = candidates_of(folded, self.task, [("", layer) for layer in found], self.step)
            damage = {c.layer: float(c.damage or 0.0) for c in judged(folded, self.task, forms, Judge("output", split))}
        return sorted(found, key=lambda layer: -damage[layer.stored.weight])


def check_step(name: str, step: Quantize) -> None:
    """Raises RecipeError where ``step`` is no ``Quantize``, or its options make no sense."""
    if not isinstance(step, Quantize):
        raise RecipeError(f"{name} was given the step {step!r}; expected a Quantize, as in "
                          f"fw.balance.{name}(fw.quantize.Quantize(...))")
    step.check()


def _same(a: QuantizePlan, b: QuantizePlan) -> bool:
    return a == b and a.tensors.keys() == b.tensors.keys() and all(
        torch.equal(t, b.tensors[n]) for n, t in a.tensors.items())


def _bits(layer: LayerForm) -> int:
    return min(weight_bits(layer.stored.kind), value_bits(layer.activations))


def _eight(step: Quantize, chosen: Sequence[LayerForm]) -> Quantize:
    kinds = {layer.stored.weight: f"int8/{'uint8' if layer.on_grid else layer.activations or 'float'}"
             for layer in chosen}
    return replace(step, mixed={**step.mixed, **kinds})


def _whole(step: Quantize, chosen: Sequence[LayerForm]) -> Quantize:
    return replace(step, ignore=(*step.ignore, *(layer.stored.weight for layer in chosen)))


__all__ = ["CLIMB", "RUNGS", "Change", "Ladder", "check_step"]
