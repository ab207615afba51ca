"""Mixed: every layer gets the kind that it bears, within a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.network import Network, fold_batch_norm
from featherweight.network.layers import fits, known_by
from featherweight.numerics.budget import choose
from featherweight.numerics.formats import HALVES, weight_bits
from featherweight.quantize.damage import FLOAT, Judge, check_forms, damages, forms, together
from featherweight.quantize.latency import seconds
from featherweight.quantize.layers import LayerForm, ends, layers
from featherweight.quantize.plan import SCALE_BYTES, QuantizePlan
from featherweight.quantize.request import of_ends
from featherweight.quantize.search import plain
from featherweight.quantize.step import Quantize
from featherweight.quantize.training.driver import Training
from featherweight.seeds import generators_kept
from featherweight.steps import Skipped, Stage
from featherweight.steps.options import REMAINS, Numbers, check_numbers, check_one
from featherweight.task import Task

#: what a ``Mixed`` may have a budget of
TARGETS = ("bytes", "bits", "latency")
NUMBERS = {"bytes": REMAINS, "latency": REMAINS,
           "bits": Numbers(4, above=0, most=32, unit=" bits", none="another target")}
#: weight's name -> kind -> what it costs
Costs = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Mixed(Quantize):
    """A ``Quantize`` whose ``mixed`` is chosen: for every layer one of ``kinds``, the damages summing to the least that
    the budget allows. The other options are those of ``Quantize``.

    Give one of
    bytes: of the stored tensors, as a fraction 0..1 of what is there; numbers of few bits count as they are packed in
        our own file. bits: of one weight, on average over all that are on a grid or could be. latency: of the whole
        network's in ``target`` (None: the one that is compressed for), as a fraction; every layer in every other kind
        is timed inside the network, all others being of the first kind. Kinds that the runtime has no kernels for
        (those below 8 bits, mostly) are no faster there than float: use kinds=("int8", "float").

    kinds: what a layer may be, as in ``mixed``: "int4", with values "int4/uint4", or "float".
    how: what damage is: "output", "score" or "hessian" (see ``sensitivity``); damages are measured one layer at a time
        on ``batches`` of ``split``, rounded to nearest, and taken to add up; what comes out is held against the same
        kind for all, measured as a whole ("hessian": by the outputs). probes, seed: for "hessian".
    mixed, ends: layers that are settled beforehand; what they cost counts.

    A budget that cannot be met is approached as far as the kinds go, which ``skipped`` then says. Also works during
    training: the kinds are chosen at its start.
    """

    stage: ClassVar[Stage] = Stage.PRECISION
    ends: str | None = None
    bytes: float | None = None
    bits: float | None = None
    latency: float | None = None
    kinds: tuple[str, ...] = ("int8", "int6", "int4", "int3", "ternary")
    how: str = "output"
    split: str = "calibration"
    batches: int | None = 2
    probes: int = 32
    seed: int = 0

    def plan(self, network: Network, task: Task) -> QuantizePlan:
        """Chooses, and plans what was chosen. Raises RecipeError for options that make no sense and TaskError for what
        the task lacks."""
        step, said = self.chosen(network, task)
        made = step.plan(network, task)
        return replace(made, skipped=(*made.skipped, *said))

    def start(self, network: Network, task: Task) -> Training:
        """Used during training: chooses, and trains on the grids that were chosen."""
        step, said = self.chosen(network, task)
        driver = step.start(network, task)
        driver.skipped += said
        return driver

    def check_training(self) -> None:
        """Raises RecipeError for options that have no meaning during training, whichever kinds are chosen."""
        plain(self, mixed={**self.mixed, **{k: k for k in self.kinds if k != FLOAT}}).check_training()

    def chosen(self, network: Network, task: Task) -> tuple[Quantize, list[Skipped]]:
        """The ``Quantize`` that meets the budget, and what is to be said of it."""
        self.check()
        with generators_kept():
            folded = fold_batch_norm(network).eval()
            settled = self._settled(folded)
            options = {n: mine for n, mine in forms(folded, self, self.kinds).items() if n not in settled}
            judge = Judge(self.how, self.split, self.batches, self.probes, self.seed)
            found = damages(folded, task, options, self, judge) if options else {}
            budget, costs = self._budget(network, task, folded, options, settled)
        damage: Costs = {n: {k: 0.0 if k == FLOAT else found[n][k] for k in c} for n, c in costs.items()}
        least = sum(min(c.values()) for c in costs.values())
        said = []
        if least > budget + 1e-9 * abs(budget):
            goal = self._goal()
            said.append(Skipped("", f"{goal}={getattr(self, goal)} cannot be reached with kinds={self.kinds}; the "
                                    "cheapest were taken: allow cheaper ones, or ask for less"))
        budget = max(budget, least)
        made = choose([list(d.values()) for d in damage.values()], [list(c.values()) for c in costs.values()], budget)
        picks = [{n: list(d)[k] for (n, d), k in zip(damage.items(), made.picks, strict=True)}]
        picks += [dict.fromkeys(options, k) for k in self.kinds
                  if all(k in c for c in costs.values()) and sum(c[k] for c in costs.values()) <= budget]
        if options and len(picks) > 1:
            with generators_kept():
                real = together(folded, task, options, self, judge, picks)
            picks = [picks[real.index(min(real))]]
        return self._as_step(picks[0], settled), said

    def _as_step(self, picked: Mapping[str, str], settled: Mapping[str, str]) -> Quantize:
        whole = tuple(n for n, kind in picked.items() if kind == FLOAT)
        kinds = {n: kind for n, kind in picked.items() if kind != FLOAT}
        first = next(kind for kind in (*self.kinds, self.weights) if kind != FLOAT)
        return plain(self, weights=first.partition("/")[0], mixed={**self.mixed, **settled, **kinds}, ends=None,
                     ignore=(*self.ignore, *whole))

    def _settled(self, folded: Network) -> dict[str, str]:
        """Weight's name -> the kind that ``mixed`` or ``ends`` gives it."""
        outer = ends(folded) if self.ends is not None else set()
        found: dict[str, str] = {}
        for layer in layers(folded, plain(self, ends=None).request())[0]:
            name = layer.stored.weight
            fit = [kind for p, kind in self.mixed.items() if fits(known_by((name,), layer.nodes), p)]
            if self.ends is not None and outer & set(layer.nodes):
                weights, values = of_ends(self.ends, self.activations)
                fit = fit or [f"{weights}/{values or FLOAT}"]
            found |= {name: fit[-1]} if fit else {}
        return found

    # ---- budgets
    def _goal(self) -> str:
        return next(t for t in TARGETS if getattr(self, t) is not None)

    def _budget(self, network: Network, task: Task, folded: Network, options: Mapping[str, Mapping[str, LayerForm]],
                settled: Mapping[str, str]) -> tuple[float, Costs]:
        """What the free layers may cost, and what each does in each kind."""
        base = plain(self, mixed={**self.mixed, **settled}, ends=None)
        if self.latency is not None:
            return seconds(network, task, base, options, self.kinds, self.latency)
        count = _bits if self.bits is not None else _bytes
        fixed = [layer for layer in layers(folded, base.request())[0] if layer.stored.weight in settled]
        spent = sum(count(folded.tensor(layer.stored.weight), layer) for layer in fixed)
        names = (*options, *(layer.stored.weight for layer in fixed))
        if self.bits is not None:
            budget = self.bits * sum(folded.tensor(n).numel() for n in names)
        else:
            rest = _stored(folded) - sum(_bytes(folded.tensor(n), None) for n in names)
            budget = float(self.bytes or 0) * _stored(network) - rest
        costs = {n: {k: count(folded.tensor(n), mine.get(k)) for k in self.kinds if k == FLOAT or k in mine}
                 for n, mine in options.items()}
        return budget - spent, costs

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        super().check()
        check_one(self, TARGETS, "Mixed(bytes=0.15) to keep that share of the bytes, or Mixed(bits=4)")
        check_numbers(self, NUMBERS)
        if self.weights != "int8":
            raise RecipeError(f"Mixed was given weights={self.weights!r}, but chooses them; write "
                              f'kinds=("{self.weights}", ...)')
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise RecipeError(f"Mixed was given kinds={self.kinds}; expected different ones, as in "
                              'kinds=("int8", "int4")')
        check_forms("kinds", self.kinds, self.activations)
        Judge(self.how, self.split, self.batches, self.probes, self.seed).check("Mixed")


def _stored(network: Network) -> float:
    """Bytes of all tensors, tied ones once."""
    return float(sum({id(t): t.numel() * t.element_size() for t in network.tensors().values()}.values()))


def _bits(weight: Tensor, layer: LayerForm | None) -> float:
    return weight.numel() * float(32 if layer is None else weight_bits(layer.stored.kind))


def _bytes(weight: Tensor, layer: LayerForm | None) -> float:
    """Bytes of a weight with its scales, packed; as it is if there is no layer."""
    if layer is None:
        return float(weight.numel() * weight.element_size())
    stored = layer.stored
    one = stored.kind in HALVES or (stored.axis is None and stored.group is None)
    return weight.numel() * weight_bits(stored.kind) / 8 + SCALE_BYTES * (0 if one else stored.scales(weight.shape))


__all__ = ["TARGETS", "Mixed"]
