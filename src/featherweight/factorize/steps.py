"""``LowRank``: layers become chains of smaller ones, in one of several forms, at ranks by a rule or by a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from featherweight import deploy
from featherweight.errors import RecipeError, did_you_mean
from featherweight.factorize.choose import BUDGETS, ERROR, Goal, chosen
from featherweight.factorize.fit import fitted
from featherweight.factorize.layers import CHOICES, Factorable, factorable
from featherweight.factorize.plan import LowRankPlan, Split
from featherweight.factorize.ranks import RULES, by_energy, by_error, by_rule, fixed, spectrum
from featherweight.judge.damage import MEASURES
from featherweight.network import Network
from featherweight.numerics.factors.forms import FORMS, Ranks
from featherweight.steps import Rewrite, Skipped, Stage
from featherweight.steps.options import (
    COUNT,
    REMAINS,
    Numbers,
    check_batches,
    check_known,
    check_number,
    check_numbers,
    check_times,
)
from featherweight.task import Task

ENERGY, GAIN = Numbers(0.95, above=0, most=1), Numbers(0.1, below=1)
NUMBERS = {**dict.fromkeys(BUDGETS, REMAINS), "round_to": COUNT,
           "error": Numbers(0.2, above=0, below=1, none="another rule")}
ENERGY_RULE = "energy"


@dataclass(frozen=True)
class LowRank(Rewrite):
    """Splits layers into thinner ones: plain convolutions and linear layers, one after another.

    form: which. "svd", singular value decomposition: k x k to few channels, 1 x 1 (Denton et al. 2014). "spatial":
        k x 1, 1 x k (Jaderberg et al. 2014). "tucker2": 1 x 1, k x k, 1 x 1 (Kim et al. 2016); a factor of full rank
        stays in the core. "cp": 1 x 1, one filter a channel, 1 x 1, its norm bounded (Phan et al. 2020). "tt", tensor
        train: 1 x 1, k x 1, 1 x k, 1 x 1. "grouped": "svd" of parts of the input channels (ALDS: Liebenwein et al.
        2021). "auto": for each layer the best of "svd", "spatial", "tucker2" and "grouped", with a budget also of "cp"
        for kernels of at most 150,000 numbers (its fit takes long). Compact filters:
        "separable", filters of each channel by itself, as many a channel as the rank, 1 x 1 (MobileNet's layer; the
        nearest in closed form: a singular value decomposition a channel); "squeeze", 1 x 1 to few channels, k x k
        (SqueezeNet). Linear layers and 1 x 1 convolutions have one form, "svd".

    How far; for each layer by itself:
    energy: part of the sum of squared singular values that the rank keeps, for a kernel on each channel axis;
        1 - energy is then the squared error of a matrix (Eckart and Young 1936), of Tucker-2 at most twice that.
    rank: the rule: "energy"; "evbmf", what stands out of noise (Nakajima et al. 2013); "stable", |W|_F^2 / |W|_2^2.
    error: instead, the largest |W' - W| / |W| (Frobenius norms), the error itself rather than a bound of it.
    ranks: instead, the rank by module path or weight's name (on every axis that has one); other layers stay.
    Or for all layers together, of least total damage, as a fraction 0..1 that is to remain of the whole network's; one
    or several, which hold together:
    macs, params, bytes: counted. latency: the sum of all convolution and linear calls, each measured alone in the
        runtime ``target`` (None: the one that is compressed for), less what a call of next to nothing takes, on this
        machine or on the device of the folder ``times`` (``featherweight bench-table``).
    how: damage for these: "output", "loss", "score" or "hessian" (``fw.sensitivity``), measured once a layer on
        ``batches`` of calibration data (None: all) and scaled by the squared error; or "error", these errors alone.
    round_to: ranks are multiples of this, where there is a budget.

    data: the factors are fit to calibration data, layer after layer: to what the whole network gives, from what the
        compressed one gives, biases too (a layer without one gets one, unless another call reads it).
    min_gain: part of its MACs and of its params, each, that a layer must lose to be split at all, where each layer is
        chosen by itself. Never larger, unless ``min_gain`` is negative; then the plan says what grows.
    ignore: patterns of layers to leave alone (``network/layers``).

    Raises RecipeError for options that make no sense. A budget that cannot be met is approached, as ``skipped`` says.

    Example:
        >>> wide = fw.capture(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.zeros(2, 64))
        >>> plan = fw.factorize.LowRank(energy=0.5).plan(wide, fw.Task())
        >>> fw.measure.params(plan.apply(wide)) < fw.measure.params(wide)
        True
        >>> smaller = fw.factorize.LowRank(params=0.9, form="auto", data=True).plan(network, task).apply(network)
    """

    energy: float = 0.95
    ranks: Mapping[str, int] | None = None
    min_gain: float = 0.1
    ignore: tuple[str, ...] = ()
    form: str = "tucker2"
    rank: str = ENERGY_RULE
    error: float | None = None
    macs: float | None = None
    params: float | None = None
    bytes: float | None = None
    latency: float | None = None
    data: bool = False
    how: str = "output"
    batches: int | None = 2
    round_to: int = 1
    target: str | None = None
    times: str | None = None
    stage: ClassVar[Stage] = Stage.STRUCTURE

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        check_number("LowRank", "min_gain", self.min_gain, GAIN)
        if not ENERGY.hold(self.energy):
            raise RecipeError(f"LowRank(energy={self.energy}); expected more than 0, at most 1: write energy=0.95")
        for path, rank in (self.ranks or {}).items():
            if not COUNT.hold(rank):
                raise RecipeError(f"LowRank(ranks={{{path!r}: {rank}}}); expected a rank of at least 1")
        check_numbers(self, NUMBERS)
        check_batches("LowRank", self.batches)
        check_known("LowRank", "form", self.form, CHOICES)
        check_known("LowRank", "rank", self.rank, (ENERGY_RULE, *RULES))
        check_known("LowRank", "how", self.how, (*MEASURES, ERROR))
        budgets = " and ".join(n for n in BUDGETS if getattr(self, n) is not None)
        given = [n for n in ("ranks", "error") if getattr(self, n) is not None] + [budgets] * bool(budgets)
        given += [f"rank={self.rank!r}"] if self.rank != ENERGY_RULE else []
        if len(given) > 1:
            raise RecipeError(f"LowRank was given {' and '.join(given)}; expected one of them: write "
                              "LowRank(macs=0.5) for all layers together, or LowRank(energy=0.95) for each by itself")
        if self.target is not None:
            deploy.target(self.target)
        check_times(self)

    def plan(self, network: Network, task: Task) -> LowRankPlan:
        """Reads data for a budget (unless how="error") and for ``data``. Raises RecipeError as said above, TaskError
        for what the task lacks."""
        self.check()
        if self.data:
            task.require("calibration")
        layers, skipped, seen = factorable(network, self.ignore)
        goal = self._goal()
        if goal is not None:
            splits, left = chosen(goal, network, task, layers)
            grows: set[str] = set()
        else:
            splits, left, grows = self._each(layers)
        skipped += left
        known = [layer.layer.path for layer in layers]
        skipped += [Skipped(path, f"a rank was given, but there is no such layer; {did_you_mean(path, known)}")
                    for path in self.ranks or {} if not any(path in names for names in seen)]
        tensors: dict[str, Tensor] = {}
        if self.data and splits:
            splits, tensors, said = fitted(network, task, layers, splits)
            skipped += said
        split = {s.weight for s in splits}
        drawn = tuple(spectrum(layer) for layer in layers if layer.layer.weight in split)
        return LowRankPlan(splits=tuple(splits), skipped=tuple(skipped), grows=tuple(sorted(grows)), tensors=tensors,
                           spectra=drawn)

    def _goal(self) -> Goal | None:
        shares = {name: getattr(self, name) for name in BUDGETS if getattr(self, name) is not None}
        if not shares:
            return None
        return Goal(shares, self.form, self.round_to, self.how, self.batches, self.data, self.target,
                    self.times)

    def _each(self, layers: Sequence[Factorable]) -> tuple[list[Split], list[Skipped], set[str]]:
        """The splits of the layers by the rule, each by itself; those that stay; the measures that grow."""
        splits: list[Split] = []
        skipped: list[Skipped] = []
        grows: set[str] = set()
        for layer in layers:
            given = next((r for path, r in (self.ranks or {}).items() if path in layer.layer.known), None)
            if self.ranks is not None and given is None:
                skipped.append(Skipped(layer.layer.weight, "no rank was given for it"))
                continue
            asked = [self._judged(layer, form, self._ranks(layer, form, given)) for form in layer.forms(self.form)]
            best = min(asked, key=lambda found: (bool(found.reason), found.macs))
            if best.reason:
                skipped.append(Skipped(layer.layer.weight, best.reason))
            else:
                splits.append(best.split)
                grows |= best.grows
        return splits, skipped, grows

    def _ranks(self, layer: Factorable, form: str, given: int | None) -> Ranks:
        if given is not None:
            return fixed(layer, form, given)
        if self.error is not None:
            return by_error(layer, form, self.error)
        if self.rank != ENERGY_RULE:
            return by_rule(layer, form, RULES[self.rank])
        if FORMS[form].most is not None:
            return by_error(layer, form, max(1 - self.energy, 1e-9) ** 0.5)
        return by_rule(layer, form, by_energy(self.energy))

    def _judged(self, layer: Factorable, form: str, ranks: Ranks) -> Judged:
        before, after = layer.whole, layer.cost(form, ranks, self.data)
        pairs = {"params": (before.params, after.params), "macs": (before.macs, after.macs)}
        shape = tuple(layer.network.tensor(layer.layer.weight).shape)
        grows = {n for n, (old, new) in pairs.items() if new > old}
        told = (f"at ranks {'x'.join(map(str, ranks))} its params would go {before.params} -> {after.params}, "
                f"its MACs {before.macs} -> {after.macs}")
        allowed, reason = 1 - self.min_gain, ""
        if any(new > allowed * old for old, new in pairs.values()):
            reason = f"{told}; min_gain={self.min_gain} asks for {self.min_gain:.0%} less of both"
        elif self.min_gain >= 0 and any(new >= old for old, new in pairs.values()):
            reason = f"{told}: no gain"
        else:
            biased = self.data and layer.own_bias
            if layer.growth(form, ranks, biased) >= 0:
                grows = grows | {"bytes"}
                calls = len(FORMS[form].sizes(layer.shape, ranks)) - 1
                reason = (f"{told}; the {calls} more calls take more bytes in the file than that saves"
                          if self.min_gain >= 0 else "")
        return Judged(Split(layer.layer.weight, shape, ranks, form), after.macs, frozenset(grows), reason)


@dataclass(frozen=True)
class Judged:
    """A split that a layer might have: its MACs, the measures that grow by it, and why it is not to be ("": it is)."""

    split: Split
    macs: int
    grows: frozenset[str]
    reason: str


__all__ = ["LowRank"]
