"""Weight sharing: a layer's weights become indices into a small codebook of values that they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.network import Network, fold_batch_norm
from featherweight.network.edit import WEIGHTED, out_axis, readers_of
from featherweight.network.layers import Layer, not_finite, select
from featherweight.network.operators import mutates
from featherweight.numerics.sharing.codebooks import STARTS, Coded, coded
from featherweight.share.compensate import COMPENSATIONS, codes_of
from featherweight.share.importance import IMPORTANCES, NEEDS
from featherweight.share.lookup import growth_of
from featherweight.share.plan import CodebookPlan, Shared
from featherweight.share.training import Sharing
from featherweight.steps import ALONE, Context, Rewrite, Skipped, Stage
from featherweight.steps.options import Numbers, check_known, check_numbers, check_pace
from featherweight.task import Task

PER = ("layer", "channel")
NUMBERS = {"bits": Numbers(5, least=1, whole=True, none="the number of clusters"),
           "clusters": Numbers(32, least=2, whole=True, none="the number of bits"),
           "min_size": Numbers(1024, least=0, whole=True), "rate": Numbers(0.01, least=0)}


@dataclass(frozen=True)
class Codebook(Rewrite):
    """Weight sharing by k-means in each layer (Han et al. 2016, Deep Compression, section 3).

    bits or clusters: entries in a codebook, 2^bits or as given, at most 256; 5 bits if neither is said. A zero that is
        held is one of them.
    per: "layer": a codebook for each weight. "channel": one for each of its output channels (not in training); worth it
        where channels differ in scale and few bits are given.
    keep_zeros: exact zeros (pruned weights) stay exact zeros, in training too: entry 0 is a constant.
    min_size: smaller weights are left alone.
    ignore: patterns of layers to leave alone (``network/layers``).
    spacing: where entries start, "linear" or by "density" (section 3.2).
    importance: what errors are weighed by: "none"; from calibration data "inputs", the squares of what a weight is
        multiplied with; from the loss on it "fisher", the squares of its gradient (Choi et al. 2017, section 3).
    rate: the price of a bit in the archive. 0: the nearest entry. Above, a weight takes a cheaper entry where its
        relative error costs less than the bits: the cost of a weight is importance * error^2 / mean(importance *
        weight^2) + rate * bits (entropy-constrained: Chou et al. 1989), 0.01 being worth about 3 bits a weight.
    compensate: "none"; "obs": on calibration data, layer by layer in the order of the graph, weights make up for those
        whose entries are settled, and biases for means (``share/compensate``; not in training). Then a rate of 0.03
        is worth about 3 bits a weight. It weighs errors itself: leave ``importance`` out.
    fold_batch_norm: batch norms become part of the weights first, which leaves one vector of each instead of four in
        the archive, and biases that can make up for means (not in training; leave it out where one follows).

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
    per: Literal["layer", "channel"] = "layer"
    keep_zeros: bool = True
    min_size: int = 1024
    ignore: tuple[str, ...] = ()
    spacing: str = "linear"
    importance: str = "none"
    rate: float = 0.0
    begin: float = 0.0
    end: float = 0.75
    frequency: float = 0.05
    compensate: str = "none"
    fold_batch_norm: bool = False
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
        if self.per not in PER:
            raise RecipeError(f"Codebook(per={self.per!r}) is not known; write Codebook(per='layer') or "
                              "Codebook(per='channel')")
        check_known("Codebook", "spacing", self.spacing, STARTS)
        check_known("Codebook", "importance", self.importance, IMPORTANCES)
        check_known("Codebook", "compensate", self.compensate, COMPENSATIONS)
        if self.compensate != "none" and (self.per, self.importance) != ("layer", "none"):
            raise RecipeError(f"Codebook(compensate={self.compensate!r}, per={self.per!r}, importance="
                              f"{self.importance!r}): it weighs errors itself, by one codebook a layer; write "
                              f"Codebook(compensate={self.compensate!r})")
        check_pace(self)

    def check_training(self) -> None:
        """Raises RecipeError for options that have no meaning during training."""
        if self.importance != "none":
            raise RecipeError(f"Codebook(importance={self.importance!r}) reads calibration data once; in training the "
                              "loss itself says what matters: write importance=\"none\" in Train(during=...)")
        if self.per != "layer":
            raise RecipeError("Codebook(per='channel') works at once, not during training; write Codebook(per='layer') "
                              "in Train(during=...), or put Codebook into the recipe as a step of its own")
        if self.compensate != "none":
            raise RecipeError(f"Codebook(compensate={self.compensate!r}) works at once, a training makes up for errors "
                              'itself; write compensate="none" in Train(during=...)')
        if self.fold_batch_norm:
            raise RecipeError("Codebook(fold_batch_norm=True) works at once, a training needs its batch norms; write "
                              "fold_batch_norm=False in Train(during=...)")

    def entries(self) -> int:
        """Entries of a codebook."""
        return self.clusters if self.clusters is not None else 2 ** (5 if self.bits is None else self.bits)

    def needs(self) -> tuple[str, ...]:
        """What the importance and the compensation read."""
        return NEEDS.get(self.importance, ()) + (() if self.compensate == "none" else ("calibration",))

    def plan(self, network: Network, task: Task) -> CodebookPlan:
        """Reads no data, unless ``importance`` does. Raises RecipeError as said above."""
        self.check()
        network = fold_batch_norm(network) if self.fold_batch_norm else network
        layers, skipped = self.layers(network)
        shared = tuple(Shared(layer.weight, self.entries(), self._holds_zero(network.tensor(layer.weight)),
                              self._axis(layer)) for layer in layers)
        return CodebookPlan(shared=shared, fold_batch_norm=self.fold_batch_norm, skipped=skipped,
                            tensors=self._decided(network, task, layers))

    def start(self, network: Network, task: Task, context: Context = ALONE) -> Sharing:
        """The codebooks at work in a training."""
        self.check()
        self.check_training()
        layers, skipped = self.layers(network)

        def finish(codes: dict[str, tuple[Tensor, Tensor]]) -> CodebookPlan:
            shared = tuple(Shared(n, len(codebook), self.keep_zeros) for n, (codebook, _) in codes.items())
            tensors = {f"{what}.{n}": t.cpu() for n, found in codes.items()
                       for what, t in zip(("codebook", "index"), found, strict=True)}
            return CodebookPlan(shared=shared, skipped=skipped, tensors=tensors)

        return Sharing(network, [layer.weight for layer in layers], self.code, self, finish)

    def code(self, weight: Tensor, hold_zero: bool, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The codebook and the index of a weight. importance: in its shape; None: alike."""
        found, _ = self._priced(weight, hold_zero, importance)
        return found.codebook, found.index

    def _priced(self, weight: Tensor, hold_zero: bool, importance: Tensor | None) -> tuple[Coded, float]:
        """The code of a weight, and what a bit of it costs."""
        h = torch.ones_like(weight, dtype=torch.float64) if importance is None else importance
        price = self.rate * float((h * weight.detach().double().square()).mean())
        return coded(weight, self.entries(), importance=importance, price=price, start=self.spacing,
                     hold_zero=hold_zero), price

    def _by_channel(self, weight: Tensor, hold_zero: bool, importance: Tensor | None,
                    axis: int) -> tuple[Tensor, Tensor]:
        """Codebooks [c, k] and the index: each channel by itself, the last entry repeated where it needs fewer."""
        parts = [self.code(w, hold_zero, h) for w, h in zip(
            weight.unbind(axis), [None] * weight.shape[axis] if importance is None else importance.unbind(axis),
            strict=True)]
        longest = max(len(book) for book, _ in parts)
        books = [torch.cat([book, book[-1:].expand(longest - len(book))]) for book, _ in parts]
        return torch.stack(books), torch.stack([index for _, index in parts], axis)

    def _axis(self, layer: Layer) -> int | None:
        return out_axis(layer.calls[0]) if self.per == "channel" else None

    def _decided(self, network: Network, task: Task, layers: Sequence[Layer]) -> dict[str, Tensor]:
        """Codebooks and indices where ``apply`` could not find them itself."""
        measure = IMPORTANCES[self.importance]
        if layers and self.compensate != "none":
            return codes_of(network, task, layers, self._priced, self._holds_zero)
        if not layers or (measure is None and not self.rate and self.spacing == "linear" and self.per == "layer"):
            return {}
        found = measure(network, task, {layer.weight: list(layer.calls) for layer in layers}) if measure else {}
        tensors: dict[str, Tensor] = {}
        for layer in layers:
            weight = network.tensor(layer.weight).detach()
            axis, zero, h = self._axis(layer), self._holds_zero(weight), found.get(layer.weight)
            codes = self.code(weight, zero, h) if axis is None else self._by_channel(weight, zero, h, axis)
            tensors[f"codebook.{layer.weight}"], tensors[f"index.{layer.weight}"] = codes
        return tensors

    def layers(self, network: Network) -> tuple[list[Layer], tuple[Skipped, ...]]:
        """The layers that can have a codebook, and the others with why not."""
        selected = select(network, self.ignore)
        taken, skipped = [], list(selected.skipped)
        for layer in selected.layers:
            reason = self._refusal(network, layer, network.tensor(layer.weight))
            if reason:
                skipped.append(Skipped(layer.weight, reason))
            else:
                taken.append(layer)
        return taken, tuple(skipped)

    def _refusal(self, network: Network, layer: Layer, weight: Tensor) -> str:
        """Why the layer's ``weight`` cannot have a codebook; "" if it can."""
        name = layer.weight
        others = sorted({str(u.target) for u in readers_of(network, name) if u.target not in WEIGHTED or mutates(u)})
        if reason := not_finite(weight):
            return reason
        if others:
            return f"its weight is also read by {', '.join(others)}"
        if weight.numel() < self.min_size:
            return f"only {weight.numel()} weights, fewer than min_size={self.min_size}"
        taken = [n for n in (f"{name}_codebook", f"{name}_index", f"{name}_places") if n in network.tensors()]
        if taken:
            return f"the name {taken[0]} is taken"
        grown = growth_of(network, name, self.entries(), self._holds_zero(weight), self._axis(layer))
        return f"a codebook for its {weight.numel()} weights makes the file {grown} bytes larger" if grown >= 0 else ""

    def _holds_zero(self, weight: Tensor) -> bool:
        return self.keep_zeros and bool((weight == 0).any())


__all__ = ["Codebook", "CodebookPlan", "Shared"]
