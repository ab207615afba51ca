"""Low rank: SVD of linear layers and 1x1 convolutions, Tucker-2 of larger kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import Node

from featherweight.errors import PlanError, RecipeError, did_you_mean
from featherweight.factorize.surgery import SPLIT, Ranks, blank, cost, pointwise, replace, stem
from featherweight.judge.costs import alone, file_bytes
from featherweight.network import Network
from featherweight.network.edit import clear_dead, read_tensors, readers_of, weight_name
from featherweight.network.layers import Layer, not_finite, select
from featherweight.network.matrices import outputs_first
from featherweight.network.operators import schema_argument
from featherweight.numerics import lowrank
from featherweight.steps import Plan, Rewrite, Skipped, Stage
from featherweight.steps.options import COUNT, Numbers, check_number
from featherweight.task import Task

ENERGY, GAIN = Numbers(0.95, above=0, most=1), Numbers(0.1, below=1)


@dataclass(frozen=True)
class Split:
    """One layer that becomes several. ``ranks``: (r,) for a matrix, (rank of o, rank of i) for a kernel."""

    weight: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class LowRankPlan(Plan):
    """Which layers are split, at which ranks. The factors are computed by ``apply``: they need no data.

    Example:
        >>> wide = fw.capture(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.zeros(2, 64))
        >>> plan = fw.factorize.LowRank(energy=0.5).plan(wide, fw.Task())
        >>> [split.weight for split in plan.splits]
        ['0.weight']
    """

    kind: ClassVar[str] = "factorize.low_rank/1"
    splits: tuple[Split, ...] = ()

    def apply(self, network: Network) -> Network:
        """A copy with two or three calls in the place of each layer; PlanError where a layer is not as planned."""
        changed = network.copy()
        before = read_tensors(changed)
        calls = {weight_name(call): call for call in changed.calls(*SPLIT)}
        for split in self.splits:
            if split.weight not in calls:
                raise PlanError(f"the plan splits {split.weight!r}, which no linear or convolution call here "
                                f"reads; {did_you_mean(split.weight, [c for c in calls if c])}")
            shape = tuple(changed.tensor(split.weight).shape)
            fits = (len(split.ranks) in (1, 2) and all(1 <= r <= n for r, n in zip(split.ranks, shape, strict=False))
                    and (len(split.ranks) == 2 or (split.ranks[0] <= min(shape[:2])
                                                   and pointwise(changed.tensor(split.weight)))))
            if shape != split.shape or not fits:
                raise PlanError(f"the plan splits {split.weight!r} of shape {list(split.shape)} at ranks "
                                f"{list(split.ranks)}; it is {list(shape)} here: plan again on this network")
            replace(changed, calls[split.weight], split.ranks)
        clear_dead(changed, before)
        return changed

    def summary(self) -> str:
        shown = ", ".join(f"{stem(s.weight).rstrip('.')} {list(s.shape)} -> {'x'.join(map(str, s.ranks))}"
                          for s in self.splits)
        return f"low rank: {len(self.splits)} layers" + (f" ({shown})" if shown else "")


@dataclass(frozen=True)
class LowRank(Rewrite):
    """Splits layers into thinner ones.

    Linear layers and 1x1 convolutions: singular value decomposition, two calls of rank r (Denton et al. 2014). Larger
    kernels: Tucker-2, three convolutions 1x1, k x k, 1x1 (Kim et al. 2016); a factor of full rank stays in the core.

    energy: part of the sum of squared singular values that the rank keeps, for a kernel on each channel axis;
        1 - energy is then the squared error of a matrix (Eckart and Young 1936), of a kernel at most twice that.
    ranks: instead, the rank by module path or weight's name (for a kernel, on both axes); other layers stay.
    min_gain: part of its MACs and of its params, each, that a layer must lose to be split at all. Never larger, unless
        ``min_gain`` is negative; then the plan says what grows.
    ignore: patterns of layers to leave alone (``network/layers``).

    Raises RecipeError for an energy out of 0..1 or a rank below 1.

    Example:
        >>> wide = fw.capture(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.zeros(2, 64))
        >>> plan = fw.factorize.LowRank(energy=0.5).plan(wide, fw.Task())
        >>> fw.measure.params(plan.apply(wide)) < fw.measure.params(wide)
        True
    """

    energy: float = 0.95
    ranks: Mapping[str, int] | None = None
    min_gain: float = 0.1
    ignore: tuple[str, ...] = ()
    stage: ClassVar[Stage] = Stage.STRUCTURE

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        check_number("LowRank", "min_gain", self.min_gain, GAIN)
        if not ENERGY.hold(self.energy):
            raise RecipeError(f"LowRank(energy={self.energy}); expected more than 0, at most 1: write energy=0.95")
        for path, rank in (self.ranks or {}).items():
            if not COUNT.hold(rank):
                raise RecipeError(f"LowRank(ranks={{{path!r}: {rank}}}); expected a rank of at least 1")

    def plan(self, network: Network, task: Task) -> LowRankPlan:
        """Reads no data. Raises RecipeError as said above."""
        self.check()
        selected, values = select(network, self.ignore), network.values(batch=1)
        splits: list[Split] = []
        skipped = list(selected.skipped)
        grows: set[str] = set()
        for layer in selected.layers:
            reason, found = _refusal(network, layer), None
            if not reason:
                reason, found = self._choose(network, layer, values)
            if found is None:
                skipped.append(Skipped(layer.weight, reason))
            else:
                splits.append(found[0])
                grows |= found[1]
        skipped += [Skipped(path, f"a rank was given, but there is no such layer; "
                                  f"{did_you_mean(path, [layer.path for layer in selected.layers])}")
                    for path in self.ranks or {} if not any(path in known for known in selected.seen)]
        return LowRankPlan(splits=tuple(splits), skipped=tuple(skipped), grows=tuple(sorted(grows)))

    def _choose(self, network: Network, layer: Layer,
                values: Mapping[str, Any]) -> tuple[str, tuple[Split, set[str]] | None]:
        """Why the layer stays, or ("", the split and the measures that grow by it)."""
        name, call = layer.weight, layer.calls[0]
        weight = outputs_first(call, network.tensor(name).detach())
        rank = None if self.ranks is None else next((r for path, r in self.ranks.items() if path in layer.known), None)
        if self.ranks is not None and rank is None:
            return "no rank was given for it", None
        ranks = self._ranks(weight, rank)
        places_in = values[call.args[0].name].numel() // weight.shape[1]  # type: ignore[union-attr,index]
        places_out = values[call.name].numel() // weight.shape[0]
        params, macs, _ = cost(weight, None, places_in, places_out)
        params_after, macs_after, calls = cost(weight, ranks, places_in, places_out)
        grows = {n for n, a, b in (("params", params, params_after), ("macs", macs, macs_after)) if b > a}
        allowed = 1 - self.min_gain
        told = (f"at ranks {'x'.join(map(str, ranks))} its params would go {params} -> {params_after}, "
                f"its MACs {macs} -> {macs_after}")
        if params_after > allowed * params or macs_after > allowed * macs:
            return f"{told}; min_gain={self.min_gain} asks for {self.min_gain:.0%} less of both", None
        if self.min_gain >= 0 and (params_after >= params or macs_after >= macs):
            return f"{told}: no gain", None
        larger = growth_of(network, call, ranks) >= 0
        if self.min_gain >= 0 and larger:
            return f"{told}; the {calls - 1} more calls take more bytes in the file than that saves", None
        return "", (Split(name, tuple(network.tensor(name).shape), ranks), grows | ({"bytes"} if larger else set()))

    def _ranks(self, weight: Tensor, rank: int | None) -> Ranks:
        o, i = weight.shape[:2]
        if rank is not None:
            inner = weight[0, 0].numel()
            return (min(rank, o, i),) if pointwise(weight) else (min(rank, o, i * inner), min(rank, i, o * inner))
        modes = (0,) if pointwise(weight) else (0, 1)
        return tuple(min(lowrank.rank_by_energy(lowrank.singular_values(lowrank.unfold(weight, mode)), self.energy),
                         weight.shape[mode]) for mode in modes)


def growth_of(network: Network, call: Node, ranks: Ranks) -> int:
    """By how many bytes the file grows where a layer is split; negative where it shrinks; of the layer alone."""
    layer = alone(network, str(weight_name(call)))
    after = layer.copy()
    before = read_tensors(after)
    replace(after, after.node(call.name), ranks, blank)
    clear_dead(after, before)
    return file_bytes(after) - file_bytes(layer)


def _refusal(network: Network, layer: Layer) -> str:
    """Why this layer cannot be split, whatever its ranks; "" if it can."""
    name, call = layer.weight, layer.calls[0]
    weight = network.tensor(name)
    if call.target not in SPLIT:
        return f"{call.target} (transposed) is not split"
    if SPLIT[call.target] and int(schema_argument(call, "groups")) != 1:
        return f"a convolution of {schema_argument(call, 'groups')} groups is not split"
    if len(readers_of(network, name)) != 1 or len(layer.names) != 1:
        return "its weight is shared or tied"
    if reason := not_finite(weight):
        return reason
    if not weight.any():
        return "its weight is all zero"
    if name in network.patterns:
        return f"its zeros are kept ({network.patterns[name]}); factors would fill them"
    modules = dict(network.named_modules())
    taken = [n for part in ("reduce", "core", "expand") if (n := f"{stem(name)}{part}") in modules]
    return f"the name {taken[0]} is taken" if taken else ""
