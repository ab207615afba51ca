"""The plan of weight sharing: which weights get codebooks, and where they lie."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from featherweight.errors import PlanError, did_you_mean
from featherweight.network import Network, fold_batch_norm
from featherweight.network.edit import bias_name, clear_dead, read_tensors, readers_of
from featherweight.numerics.kmeans import kmeans
from featherweight.share.lookup import put
from featherweight.steps import Plan
from featherweight.steps.joined import narrowed


@dataclass(frozen=True)
class Shared:
    """One weight that gets a codebook. ``zeros``: entry 0 is the constant 0.0, held out of training. axis: of the
    weight, each position of which has a codebook of its own; None: there is one for all."""

    weight: str
    clusters: int
    zeros: bool
    axis: int | None = None


@dataclass(frozen=True)
class CodebookPlan(Plan):
    """Which weights get codebooks of how many entries: ``tensors["codebook.NAME"]`` [k] or [c, k] and
    ``tensors["index.NAME"]`` (uint8, the weight's shape). Where a weight has none there, ``apply`` does k-means, which
    needs no data. ``tensors["bias.NAME"]``: of the call that reads the weight, where the bias makes up for something.
    fold_batch_norm: whether batch norms are folded first, as they were when the plan was made.

    Example:
        >>> plan = fw.share.Codebook(bits=4, min_size=100).plan(network, task)
        >>> [(shared.weight, shared.clusters) for shared in plan.shared]
        [('3.weight', 16)]
    """

    kind: ClassVar[str] = "share.codebook/1"
    shared: tuple[Shared, ...] = ()
    fold_batch_norm: bool = False

    def apply(self, network: Network) -> Network:
        """A copy whose ``shared`` weights are looked up in ``NAME_codebook`` (parameter) by ``NAME_index`` (uint8)."""
        changed = self._folded(network)
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
            codebook, index = self.codes(item, weight)
            if (bias := self.tensors.get(f"bias.{item.weight}")) is not None:
                self._mend(changed, item.weight, bias)
            put(changed, item.weight, codebook, index, item.zeros, item.axis)
        clear_dead(changed, before)
        return changed

    def _folded(self, network: Network) -> Network:
        """A copy in the form that the plan was made on."""
        return fold_batch_norm(network) if self.fold_batch_norm else network.copy()

    def _mend(self, network: Network, weight: str, bias: Tensor) -> None:
        """Sets the bias of the call that reads the weight. Raises PlanError where there is none of this shape."""
        name = bias_of(network, weight)
        if name is None or network.tensor(name).shape != bias.shape:
            raise PlanError(f"the plan has a bias of shape {list(bias.shape)} for what reads {weight!r}, which has no "
                            "such bias: make the plan on this very network")
        network.set_tensor(name, bias.to(network.tensor(name)))

    def codes(self, item: Shared, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The codebook and the index of one of the ``shared`` weights. Raises PlanError where they do not fit it."""
        codebook, index = (self.tensors.get(f"{what}.{item.weight}") for what in ("codebook", "index"))
        if codebook is None or index is None:
            if item.axis is not None:
                raise PlanError(f"the plan has no codebooks for {item.weight!r}; load it with its tensors: "
                                "Plan.load(path)")
            return kmeans(weight, item.clusters, hold_zero=item.zeros)
        if index.shape != weight.shape:
            raise PlanError(f"the index of {item.weight!r} has shape {list(index.shape)}; the weight has "
                            f"{list(weight.shape)}: make the plan on this very network")
        books = () if item.axis is None else (weight.shape[item.axis],)
        if codebook.shape[:-1] != books or index.dtype != torch.uint8 or int(index.max()) >= codebook.shape[-1]:
            raise PlanError(f"the codebook of {item.weight!r} has shape {list(codebook.shape)}, which its index does "
                            "not fit; load the plan with its own tensors: Plan.load(path)")
        return codebook.to(weight), index.to(weight.device)

    def only(self, weight: str) -> CodebookPlan:
        """The part of the plan that is about one weight."""
        return replace(self, shared=tuple(s for s in self.shared if s.weight == weight), skipped=(),
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
            if (key := f"bias.{item.weight}") in tensors and (name := bias_of(network, item.weight)) is not None:
                tensors[key] = narrowed(tensors[key], kept.get(name, ()))
        return replace(self, tensors=tensors)

    def summary(self) -> str:
        if not self.shared:
            return "codebooks: no layer"
        sizes = sorted({s.clusters for s in self.shared})
        held = sum(s.zeros for s in self.shared)
        return (f"codebooks: {len(self.shared)} layers, {'-'.join(map(str, sizes))} values each"
                + (f", zeros held in {held}" if held else ""))


def bias_of(network: Network, weight: str) -> str | None:
    """The name of the bias that the one call of a weight adds, and nobody else reads; None where there is none."""
    calls = readers_of(network, weight)
    name = bias_name(calls[0]) if len(calls) == 1 else None
    return name if name is not None and len(readers_of(network, name)) == 1 else None


__all__ = ["CodebookPlan", "Shared", "bias_of"]
