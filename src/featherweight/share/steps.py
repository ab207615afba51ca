"""Weight sharing: a layer's weights become indices into a small codebook of values that they share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.fx import Node

from featherweight.errors import PlanError, RecipeError, did_you_mean
from featherweight.judge.costs import alone, file_bytes
from featherweight.network import Network
from featherweight.network.edit import WEIGHTED, clear_dead, insert_call, node_name, read_tensors, readers_of
from featherweight.network.layers import not_finite, select
from featherweight.network.operators import mutates
from featherweight.numerics.kmeans import kmeans
from featherweight.steps import Plan, Rewrite, Skipped, Stage
from featherweight.steps.options import Numbers, check_numbers
from featherweight.task import Task

aten = torch.ops.aten
NUMBERS = {"bits": Numbers(5, least=1, whole=True, none="the number of clusters"),
           "clusters": Numbers(32, least=2, whole=True, none="the number of bits"),
           "min_size": Numbers(1024, least=0, whole=True)}


@dataclass(frozen=True)
class Shared:
    """One weight that gets a codebook. ``zeros``: entry 0 is the constant 0.0, held out of training."""

    weight: str
    clusters: int
    zeros: bool


@dataclass(frozen=True)
class CodebookPlan(Plan):
    """Which weights get codebooks of how many entries. The k-means itself is done by ``apply``: it needs no data.

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
            codebook, index = kmeans(weight, item.clusters, hold_zero=item.zeros)
            _put(changed, item.weight, codebook, index, item.zeros)
        clear_dead(changed, before)
        return changed

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

    def entries(self) -> int:
        """Entries of a codebook."""
        return self.clusters if self.clusters is not None else 2 ** (5 if self.bits is None else self.bits)

    def plan(self, network: Network, task: Task) -> CodebookPlan:
        """Reads no data. Raises RecipeError as said above."""
        self.check()
        entries = self.entries()
        selected = select(network, self.ignore)
        shared: list[Shared] = []
        skipped = list(selected.skipped)
        for layer in selected.layers:
            weight = network.tensor(layer.weight)
            reason = self._refusal(network, layer.weight, weight, entries)
            if reason:
                skipped.append(Skipped(layer.weight, reason))
            else:
                shared.append(Shared(layer.weight, entries, self._holds_zero(weight)))
        return CodebookPlan(shared=tuple(shared), skipped=tuple(skipped))

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


def growth_of(network: Network, name: str, entries: int, zeros: bool) -> int:
    """By how many bytes the file grows where a weight gets a codebook; negative where it shrinks. Counted on the layer
    alone, with all entries used."""
    layer = alone(network, name)
    weight, after = layer.tensor(name).detach(), layer.copy()
    index = (torch.arange(weight.numel()) % entries).to(torch.uint8).view(weight.shape)
    _put(after, name, weight.new_zeros(entries), index, zeros)
    return file_bytes(after) - file_bytes(layer)


def _put(network: Network, name: str, codebook: Tensor, index: Tensor, zeros: bool) -> None:
    """Puts a lookup in the place of every reading of a weight, and a codebook and an index in the place of it."""
    weight = network.tensor(name)
    trains = isinstance(weight, nn.Parameter) and weight.requires_grad
    values = codebook[int(zeros):]
    names = network.tied_names(name)
    table, rows = f"{name}_codebook", f"{name}_index"
    network.add_tensor(table, nn.Parameter(values.clone(), requires_grad=trains))
    network.add_tensor(rows, index, buffer=True)
    reads = [n for n in network.graph.nodes if n.op == "get_attr" and n.target in names]
    looked_up = _lookup(network, table, rows, zeros, reads[0])
    for node in reads:
        node.replace_all_uses_with(looked_up)
        network.graph.erase_node(node)
    for name in names:
        network.remove_tensor(name)


def _lookup(network: Network, table: str, rows: str, zeros: bool, before: Node) -> Node:
    """The calls that give the weight: an embedding, since that is what a runtime's Gather takes over as it is."""
    graph, like = network.graph, next(iter(before.users))
    with graph.inserting_before(before):
        values = graph.create_node("get_attr", table, name=node_name(table))
        index = graph.create_node("get_attr", rows, name=node_name(rows))

    def call(target: object, *args: object) -> Node:
        return insert_call(network, target, args, before=before, like=like)

    if zeros:
        values = call(aten.constant_pad_nd.default, values, [1, 0], 0.0)
    column = call(aten.unsqueeze.default, values, 1)
    wide = call(aten.to.dtype, index, torch.int32)
    return call(aten.squeeze.dim, call(aten.embedding.default, column, wide), -1)

