"""Weight sharing: a layer's weights become indices into a small codebook of values that they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from featherweight.errors import PlanError, RecipeError, did_you_mean
from featherweight.network import Network
from featherweight.network.edit import WEIGHTED, clear_dead, read_tensors, readers_of
from featherweight.network.layers import Layer, not_finite, select
from featherweight.network.operators import mutates
from featherweight.numerics.codebooks import STARTS, coded
from featherweight.numerics.kmeans import kmeans
from featherweight.share.importance import IMPORTANCES
from featherweight.share.lookup import growth_of, put
from featherweight.share.training import Sharing
from featherweight.steps import ALONE, Context, Plan, Rewrite, Skipped, Stage
from featherweight.steps.joined import narrowed
from featherweight.steps.options import Numbers, check_known, check_numbers, check_pace
from featherweight.task import Task

NUMBERS = {"bits": Numbers(5, least=1, whole=True, none="the number of clusters"),
           "clusters": Numbers(32, least=2, whole=True, none="the number of bits"),
           "min_size": Numbers(1024, least=0, whole=True), "rate": Numbers(0.01, least=0)}


@dataclass(frozen=True)
class Shared:
    """One weight that gets a codebook. ``zeros``: entry 0 is the constant 0.0, held out of training."""

    weight: str
    clusters: int
    zeros: bool


@dataclass(frozen=True)
class CodebookPlan(Plan):
    """Which weights get codebooks of how many entries: ``tensors["codebook.NAME"]`` [k] and ``tensors["index.NAME"]``
    (uint8, the weight's shape). Where a weight has none there, ``apply`` does k-means, which needs no data.

    Example:
        >>> plan = fw.share.Codebook(bits=4, min_size=100).plan(network, task)
        >>> [(shared.weight, shared.clusters) for shared in plan.shared]
        [('3.weight', 16)]
    """

    kind: ClassVar[str] = "share.codebook/1"
    shared: tuple[Shared, ...] = ()

    def apply(self, network: Network) -> Network:
        """A copy whose ``shared`` weights are looked up in ``NAME_codebook`` (parameter) by ``NAME_index`` (uint8)."""
        changed = network.copy()
        before = read_tensors(changed)
        for item in self.shared:
            try:
                weight = changed.tensor(item.weight)
            except KeyError:
                raise PlanError(f"the plan shares the weights of {item.weight!r}, which this network does not have; "
                                f"{did_you_mean(item.weight, changed.tensors())}") from None
            if not weight.is_floating_point():
                raise PlanError(f"the plan shares the weights of {item.weight!r}, which is {weight.dtype}, no float; "
                                "plan again on this network")
            codebook, index = self._codes(item, weight)
            put(changed, item.weight, codebook, index, item.zeros)
        clear_dead(changed, before)
        return changed

    def _codes(self, item: Shared, weight: Tensor) -> tuple[Tensor, Tensor]:
        codebook, index = (self.tensors.get(f"{what}.{item.weight}") for what in ("codebook", "index"))
        if codebook is None or index is None:
            return kmeans(weight, item.clusters, hold_zero=item.zeros)
        if index.shape != weight.shape:
            raise PlanError(f"the index of {item.weight!r} has shape {list(index.shape)}; the weight has "
                            f"{list(weight.shape)}: make the plan on this very network")
        return codebook.to(weight), index.to(weight.device)

    def only(self, weight: str) -> CodebookPlan:
        """The part of the plan that is about one weight."""
        return CodebookPlan(tuple(s for s in self.shared if s.weight == weight),
                            tensors={n: t for n, t in self.tensors.items() if n.partition(".")[2] == weight})

    def after(self, earlier: Plan, network: Network) -> CodebookPlan:
        """The plan with its indices where ``earlier`` cuts the weights, and 0 where it made weights that hold zeros
        zero."""
        kept, left = earlier.kept(network), earlier.apply(network)
        tensors = dict(self.tensors)
        for item in self.shared:
            key = f"index.{item.weight}"
            if key in tensors and item.weight in left.tensors():
                index = narrowed(tensors[key], kept.get(item.weight, ()))
                zero = left.tensor(item.weight).detach().to(index.device) == 0
                tensors[key] = index.masked_fill(zero, 0) if item.zeros else index
        return replace(self, tensors=tensors)

    def summary(self) -> str:
        if not self.shared:
            return "codebooks: no layer"
        sizes = sorted({s.clusters for s in self.shared})
        held = sum(s.zeros for s in self.shared)
        return (f"codebooks: {len(self.shared)} layers, {'-'.join(map(str, sizes))} values each"
                + (f", zeros held in {held}" if held else ""))


@dataclass(frozen=True)
class Codebook(Rewrite):
    """Weight sharing by k-means in each layer (Han et al. 2016, Deep Compression, section 3).

    bits or clusters: entries in a codebook, 2^bits or as given, at most 256; 5 bits if neither is said. A zero that is
        held is one of them.
    per: "layer", the only kind so far: a codebook for each weight.
    keep_zeros: exact zeros (pruned weights) stay exact zeros, in training too: entry 0 is a constant.
    min_size: smaller weights are left alone.
    ignore: patterns of layers to leave alone (``network/layers``).
    spacing: where entries start, "linear" or by "density" (section 3.2).
    importance: what errors are weighed by: "none"; from calibration data "inputs", the squares of what a weight is
        multiplied with; from the loss on it "fisher", the squares of its gradient (Choi et al. 2017, section 3).
    rate: the price of a bit in the archive. 0: the nearest entry. Above, a weight takes a cheaper entry where its
        relative error costs less than the bits: the cost of a weight is importance * error^2 / mean(importance *
        weight^2) + rate * bits (entropy-constrained: Chou et al. 1989), 0.01 being worth about 3 bits a weight.

    During training (in a Fit's ``during=(...)``) from progress ``begin`` on the network computes with the codebook:
    weights are assigned anew every ``frequency`` of the way until ``end``, by gradients that pass to weights and
    entries alike; from ``end`` on the indices are fixed and the entries alone are trained. Masks that stand before
    (``prune.Weights``) are kept.

    The weight leaves the network; what is stored is one byte per weight and the codebook, a parameter: fine-tuning it
    is the paper's centroid training (eq. 3), by autograd. Computed as float: it saves bytes, not time. Raises
    RecipeError for bits and clusters together, or out of range.

    Example:
        >>> plan = fw.share.Codebook(bits=4, min_size=100).plan(network, task)
        >>> shared = plan.apply(network)
        >>> fw.codec.archive_bytes(shared) < fw.codec.archive_bytes(network)
        True
    """

    bits: int | None = None
    clusters: int | None = None
    per: Literal["layer"] = "layer"
    keep_zeros: bool = True
    min_size: int = 1024
    ignore: tuple[str, ...] = ()
    spacing: str = "linear"
    importance: str = "none"
    rate: float = 0.0
    begin: float = 0.0
    end: float = 0.75
    frequency: float = 0.05
    stage: ClassVar[Stage] = Stage.PRECISION

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        check_numbers(self, NUMBERS)
        if self.bits is not None and self.clusters is not None:
            raise RecipeError(f"Codebook got bits={self.bits} and clusters={self.clusters}; write one of them, "
                              f"e.g. Codebook(bits={self.bits})")
        entries = self.entries() if (self.bits or 0) < 64 else math.inf
        if not 2 <= entries <= 256:
            raise RecipeError(f"Codebook of {entries} entries; expected 2 to 256: write Codebook(bits=1..8) or "
                              "Codebook(clusters=2..256)")
        if self.per != "layer":
            raise RecipeError(f"Codebook(per={self.per!r}) is not known; write Codebook(per='layer')")
        check_known("Codebook", "spacing", self.spacing, STARTS)
        check_known("Codebook", "importance", self.importance, IMPORTANCES)
        check_pace(self)

    def check_training(self) -> None:
        """Raises RecipeError for options that have no meaning during training."""
        if self.importance != "none":
            raise RecipeError(f"Codebook(importance={self.importance!r}) reads calibration data once; in training the "
                              "loss itself says what matters: write importance=\"none\" in Train(during=...)")

    def entries(self) -> int:
        """Entries of a codebook."""
        return self.clusters if self.clusters is not None else 2 ** (5 if self.bits is None else self.bits)

    def plan(self, network: Network, task: Task) -> CodebookPlan:
        """Reads no data, unless ``importance`` does. Raises RecipeError as said above."""
        self.check()
        layers, skipped = self._layers(network)
        shared = tuple(Shared(layer.weight, self.entries(), self._holds_zero(network.tensor(layer.weight)))
                       for layer in layers)
        return CodebookPlan(shared=shared, skipped=skipped, tensors=self._decided(network, task, layers))

    def start(self, network: Network, task: Task, context: Context = ALONE) -> Sharing:
        """The codebooks at work in a training."""
        self.check()
        self.check_training()
        layers, skipped = self._layers(network)

        def finish(codes: dict[str, tuple[Tensor, Tensor]]) -> CodebookPlan:
            shared = tuple(Shared(n, len(codebook), self.keep_zeros) for n, (codebook, _) in codes.items())
            tensors = {f"{what}.{n}": t.cpu() for n, found in codes.items()
                       for what, t in zip(("codebook", "index"), found, strict=True)}
            return CodebookPlan(shared=shared, skipped=skipped, tensors=tensors)

        return Sharing(network, [layer.weight for layer in layers], self.code, self, finish)

    def code(self, weight: Tensor, hold_zero: bool, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The codebook and the index of a weight. importance: in its shape; None: alike."""
        h = torch.ones_like(weight, dtype=torch.float64) if importance is None else importance
        price = self.rate * float((h * weight.detach().double().square()).mean())
        found = coded(weight, self.entries(), importance=importance, price=price, start=self.spacing,
                      hold_zero=hold_zero)
        return found.codebook, found.index

    def _decided(self, network: Network, task: Task, layers: Sequence[Layer]) -> dict[str, Tensor]:
        """Codebooks and indices where ``apply`` could not find them itself."""
        measure = IMPORTANCES[self.importance]
        if not layers or (measure is None and not self.rate and self.spacing == "linear"):
            return {}
        found = measure(network, task, {layer.weight: list(layer.calls) for layer in layers}) if measure else {}
        tensors: dict[str, Tensor] = {}
        for layer in layers:
            weight = network.tensor(layer.weight).detach()
            codes = self.code(weight, self._holds_zero(weight), found.get(layer.weight))
            tensors[f"codebook.{layer.weight}"], tensors[f"index.{layer.weight}"] = codes
        return tensors

    def _layers(self, network: Network) -> tuple[list[Layer], tuple[Skipped, ...]]:
        """The layers that can have a codebook, and the others with why not."""
        selected = select(network, self.ignore)
        taken, skipped = [], list(selected.skipped)
        for layer in selected.layers:
            reason = self._refusal(network, layer.weight, network.tensor(layer.weight), self.entries())
            if reason:
                skipped.append(Skipped(layer.weight, reason))
            else:
                taken.append(layer)
        return taken, tuple(skipped)

    def _refusal(self, network: Network, name: str, weight: Tensor, entries: int) -> str:
        """Why ``weight`` cannot have a codebook; "" if it can."""
        others = sorted({str(u.target) for u in readers_of(network, name) if u.target not in WEIGHTED or mutates(u)})
        if reason := not_finite(weight):
            return reason
        if others:
            return f"its weight is also read by {', '.join(others)}"
        if weight.numel() < self.min_size:
            return f"only {weight.numel()} weights, fewer than min_size={self.min_size}"
        taken = [n for n in (f"{name}_codebook", f"{name}_index") if n in network.tensors()]
        if taken:
            return f"the name {taken[0]} is taken"
        grown = growth_of(network, name, entries, self._holds_zero(weight))
        return f"a codebook for its {weight.numel()} weights makes the file {grown} bytes larger" if grown >= 0 else ""

    def _holds_zero(self, weight: Tensor) -> bool:
        return self.keep_zeros and bool((weight == 0).any())


__all__ = ["Codebook", "CodebookPlan", "Shared"]
