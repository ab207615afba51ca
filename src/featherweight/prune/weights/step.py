"""``Weights``: sets single weights, N of every M, or blocks to zero, at once or little by little in a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.errors import PlanError, RecipeError, did_you_mean
from featherweight.network import Network
from featherweight.network.layers import APART, DENSE, STORABLE, select
from featherweight.network.matrices import as_matrix, from_matrix, layout
from featherweight.prune.weights.masks import ALLOCATIONS, Pattern, masks_of, pattern_of
from featherweight.prune.weights.refit import COMPENSATIONS, compensated
from featherweight.prune.weights.schedules import CURVES, REGROW, Grow, MaskSchedule
from featherweight.prune.weights.scores import NEEDS, READ_INPUTS, WEIGHT_SCORES, matrix
from featherweight.steps import ALONE, Context, Plan, Rewrite, Skipped, Stage
from featherweight.steps.joined import narrowed
from featherweight.steps.options import SEED, Numbers, check_known, check_numbers, check_pace
from featherweight.task import Task

Masks = dict[str, Tensor]
Calls = Mapping[str, list[Node]]
KEPT = "all of it is kept: others have lower scores"
#: sparsity where none is given and the pattern does not say it
SPARSITY = 0.8
NUMBERS = {"sparsity": Numbers(SPARSITY, least=0, below=1, noun="the fraction of zeros,", none="the usual"),
           "seed": SEED}


@dataclass(frozen=True)
class WeightPlan(Plan):
    """Which weights stay: ``tensors["mask.NAME"]`` is a mask (bool, the weight's shape, True = kept), ``zeros[NAME]``
    counts the others; ``tensors["value.NAME"]`` holds new values of the kept ones, where they make up for the others.

    Example:
        >>> plan = fw.prune.Weights(sparsity=0.75).plan(network, task)
        >>> plan.masks()["3.weight"].dtype
        torch.bool
    """

    kind: ClassVar[str] = "prune.weights/1"
    zeros: dict[str, int]
    pattern: str = "single"

    def apply(self, network: Network) -> Network:
        """A copy with the masked weights zero, which ``patterns`` asks whoever trains it to keep so."""
        other = network.copy()
        known = other.tensors()
        for name in self.zeros:
            mask = self.tensors.get(f"mask.{name}")
            if mask is None:
                raise PlanError(f"the plan has no mask for {name!r}; load it with its tensors: Plan.load(path)")
            if name not in known:
                raise PlanError(f"the plan masks {name!r}, which this network does not have; "
                                f"{did_you_mean(name, known)}")
            weight = known[name].detach()
            if weight.shape != mask.shape:
                raise PlanError(f"the mask of {name!r} has shape {list(mask.shape)}; the weight has "
                                f"{list(weight.shape)}: make the plan on this very network")
            value = self.tensors.get(f"value.{name}", weight).to(weight)
            other.set_tensor(name, value.masked_fill(~mask.to(weight.device, torch.bool), 0))
            for tied in network.tied_names(name):
                other.patterns[tied] = self.pattern
        other.changed()
        return other

    def after(self, earlier: Plan, network: Network) -> WeightPlan:
        """The plan with its masks and values where ``earlier`` cuts the weights."""
        kept = earlier.kept(network)
        tensors = {key: narrowed(t, kept.get(key.partition(".")[2], ())) for key, t in self.tensors.items()}
        zeros = {n: int((~tensors[f"mask.{n}"]).sum()) for n in self.zeros}
        return replace(self, zeros=zeros, tensors=tensors)

    def masks(self) -> Masks:
        """Weight's name -> mask."""
        return {n: self.tensors[f"mask.{n}"] for n in self.zeros}

    def summary(self) -> str:
        total = sum(t.numel() for n, t in self.tensors.items() if n.startswith("mask."))
        zeros = sum(self.zeros.values())
        kind = "" if self.pattern == "single" else f" by the pattern {self.pattern}"
        others = ", others make up for it" if any(n.startswith("value.") for n in self.tensors) else ""
        return (f"set {zeros} of {total} weights in {len(self.zeros)} tensors to zero ({zeros / max(total, 1):.0%})"
                f"{kind}{others}")


@dataclass(frozen=True)
class Weights(Rewrite):
    """Sets weights to zero: of convolutions and linear layers, and with the pattern "single" of recurrent layers,
    embeddings and stacked matrices (experts) too. Zeros in a dense tensor save no time by themselves.

    sparsity: fraction of zeros, 0..1 (1 left out), among the weights that the pattern covers; 0.8 if not given. An N:M
        pattern has its own, 1 - N/M.
    score: which weights matter: "magnitude", "random"; from calibration data "wanda", "obs"; from the loss on it
        "taylor", "fisher" (see ``prune/weights/scores.py``). "wanda" and "obs" score what convolutions and linear
        layers are given, and leave all others alone.
    pattern: "single" weights; "N:M", N kept of every M in a row, "2:4" being what tensor cores run; "block:RxC", blocks
        of R outputs x C inputs. A row holds what one output reads: [o, i] of a linear layer; of a convolution
        [o, i * h * w], kernel positions innermost. Ends that do not fill a group or block stay, and are named.
    allocation: "global" ranks all weights together; "layer" takes the same share of every tensor, "output" of every
        row, "erk" more of the larger tensors (Evci et al. 2020).
    compensate: how the weights that stay make up for the others on calibration data, layer by layer in the order of
        the graph: "none"; "obs", a sweep over columns (SparseGPT: Frantar & Alistarh 2023; with ``score="obs"`` masks
        too are chosen in the sweep); "least_squares", the best values for the mask, o / 3 times the work.
    ignore: patterns of layers to leave alone (``network/layers``). seed: for ``score="random"``.

    During training (in a Fit's ``during=(...)``) zeros grow by ``schedule`` from progress ``begin`` to ``end``, new
    masks every ``frequency`` of the way: "gradual", cubic (Zhu & Gupta 2017, eq. 1); "iterative", the same share of
    what is left each time (Han et al. 2015); "constant", all at ``begin``. Masks are chosen by ``score`` again each
    time, from the network as it then stands: scores from data read the calibration split each time.
    regrow: "none", what is zero stays so; "surgery", masked weights are trained on and come back once they matter
        (Dynamic Network Surgery: Guo et al. 2016, eq. 3 and 4; by magnitude); masks settle halfway between ``end``
        and 1. Give it a ``frequency`` of few steps, or many weights come back at one blow and upset the training.

    Example:
        >>> plan = fw.prune.Weights(sparsity=0.5, pattern="2:4").plan(network, task)
        >>> sparse = plan.apply(network)
    """

    sparsity: float | None = None
    score: str = "magnitude"
    pattern: str = "single"
    allocation: str = "global"
    compensate: str = "none"
    ignore: tuple[str, ...] = ()
    seed: int = 0
    schedule: str = "gradual"
    regrow: str = "none"
    begin: float = 0.0
    end: float = 0.75
    frequency: float = 0.01

    stage: ClassVar[Stage] = Stage.SPARSITY

    def needs(self) -> tuple[str, ...]:
        """What the score reads."""
        return NEEDS.get(self.score, ())

    def plan(self, network: Network, task: Task) -> WeightPlan:
        """Chooses the weights. Raises RecipeError for options that make no sense, TaskError for data not given."""
        self.check()
        calls, left = self._candidates(network)
        masks = self._masks(network, task, calls, self._sparsity())
        values: Masks = {}
        if self.compensate != "none":
            masks, values, apart = compensated(network, task, calls, masks, pattern_of(self.pattern), self.compensate,
                                               adaptive=self.score == "obs", rows=self.allocation == "output")
            left = (*left, *apart)
        return plan_of(masks, self.pattern, left, values)

    def start(self, network: Network, task: Task, context: Context = ALONE) -> MaskSchedule:
        """The masks at work in a training. Raises RecipeError where ``compensate`` is not "none"."""
        self.check()
        self.check_training()
        calls, left = self._candidates(network)
        grow = Grow(self.schedule, self.regrow, self.begin, self.end, self.frequency, self._sparsity())

        def choose(net: Network, sparsity: float, favour: Mapping[str, Tensor]) -> Masks:
            found = select(net, kinds=self._kinds()).layers
            mine = {layer.weight: list(layer.calls) for layer in found if layer.weight in calls}
            return self._masks(net, task, mine, sparsity, favour)

        def finish(masks: Masks) -> WeightPlan:
            return plan_of(masks, self.pattern, left, {})

        return MaskSchedule(network, list(calls), grow, choose, finish)

    def _sparsity(self) -> float:
        pattern = pattern_of(self.pattern)
        if pattern.of:
            return 1 - pattern.keep / pattern.of
        return SPARSITY if self.sparsity is None else self.sparsity

    def _masks(self, network: Network, task: Task, calls: Calls, sparsity: float,
               favour: Mapping[str, Tensor] | None = None) -> Masks:
        """Masks in the weights' shapes, on the CPU. What is zero already goes first; ``favour`` multiplies scores."""
        scores = WEIGHT_SCORES[self.score](network, task, calls, self.seed)
        for name, own in scores.items():
            if favour is not None:
                own = own * as_matrix(calls[name][0], favour[name].cpu()).flatten(0, 1)
            scores[name] = own.masked_fill(matrix(network, name, calls) == 0, -torch.inf)
        dims = {n: sum(network.tensor(n).shape) for n in calls}
        found = masks_of(scores, dims, pattern_of(self.pattern), sparsity, self.allocation)
        groups = {n: len(as_matrix(mine[0], network.tensor(n))) for n, mine in calls.items()}
        return {n: from_matrix(calls[n][0], m.unflatten(0, (groups[n], -1)), network.tensor(n).shape).clone()  # type: ignore[no-untyped-call]
                for n, m in found.items()}

    def _kinds(self) -> tuple[str, ...]:
        """The kinds of layers whose weights may go: what reads data has it of linear and convolution calls alone, and a
        pattern is for what computes with it."""
        if self.score in READ_INPUTS:
            return DENSE
        return STORABLE if self.pattern == "single" else (*DENSE, "recurrent")

    def _candidates(self, network: Network) -> tuple[Calls, tuple[Skipped, ...]]:
        """The weights that may go, each tied one once, with their calls; and what is left alone."""
        selected, pattern = select(network, self.ignore, self._kinds()), pattern_of(self.pattern)
        found = {layer.weight: list(layer.calls) for layer in selected.layers}
        apart = [n for n, mine in found.items() if self.score == "obs" and len({layout(call) for call in mine}) > 1]
        for name in apart:
            del found[name]
        shapes = {n: as_matrix(mine[0], network.tensor(n)).flatten(0, 1).shape for n, mine in found.items()}
        left = [*selected.skipped, *(Skipped(n, APART) for n in apart),
                *(s for n, shape in shapes.items() for s in self._ends(n, tuple(shape), pattern))]
        if not found and not left:
            left.append(Skipped("", "the network has no convolution and no linear layer"))
        return found, tuple(left)

    def _ends(self, name: str, shape: tuple[int, ...], pattern: Pattern) -> list[Skipped]:
        o, i = pattern.whole((shape[0], shape[1]))
        if (o, i) == shape:
            return []
        if not o * i:
            return [Skipped(name, f"its matrix {list(shape)} holds no whole unit of the pattern {self.pattern}")]
        ends = [f"the last {n} of its {of} {what}" for n, of, what in
                ((shape[0] - o, shape[0], "rows"), (shape[1] - i, shape[1], "columns")) if n]
        return [Skipped(name, f"{' and '.join(ends)} fill no unit of the pattern {self.pattern} and stay")]

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        pattern = pattern_of(self.pattern)
        check_numbers(self, NUMBERS)
        if pattern.of and self.sparsity is not None and abs(self.sparsity - self._sparsity()) > 1e-6:
            raise RecipeError(f"Weights was given sparsity={self.sparsity} and pattern={self.pattern!r}, which has "
                              f"sparsity {self._sparsity():g}; write Weights(pattern={self.pattern!r})")
        for name, known in {"score": WEIGHT_SCORES, "allocation": ALLOCATIONS, "compensate": COMPENSATIONS,
                            "schedule": CURVES, "regrow": REGROW}.items():
            check_known("Weights", name, getattr(self, name), known)
        if self.regrow != "none" and self.score not in ("magnitude", "random"):
            raise RecipeError(f"Weights was given regrow={self.regrow!r} and score={self.score!r}, which says nothing "
                              "about weights that are masked now; write score=\"magnitude\"")
        check_pace(self)

    def check_training(self) -> None:
        """Raises RecipeError for options that have no meaning during training."""
        if self.compensate != "none":
            raise RecipeError(f"Weights(compensate={self.compensate!r}) works at once, the training makes up for the "
                              "zeros itself; write compensate=\"none\" in Train(during=...), or put Weights into the "
                              "recipe as a step of its own")


def plan_of(masks: Mapping[str, Tensor], pattern: str, skipped: tuple[Skipped, ...],
            values: Mapping[str, Tensor]) -> WeightPlan:
    """The plan of these masks: weights that lose none are left out."""
    zeros = {n: int(m.numel() - m.sum()) for n, m in masks.items()}
    changed = {n: z for n, z in zeros.items() if z}
    skipped = (*skipped, *(Skipped(n, KEPT) for n in zeros if n not in changed and n not in {s.path for s in skipped}))
    tensors = {f"mask.{n}": masks[n] for n in changed} | {f"value.{n}": v for n, v in values.items() if n in changed}
    return WeightPlan(changed, pattern, tensors=tensors, skipped=skipped)
