"""``BlockCodebook``: weights cut into vectors, each an index into a codebook of vectors (product quantization)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from featherweight.network import Network
from featherweight.network.layers import Layer, select
from featherweight.numerics.sharing.blocks import block_codes
from featherweight.share.importance import IMPORTANCES, NEEDS
from featherweight.share.made import Made, applied, planned, stays
from featherweight.steps import Plan, Rewrite, Stage
from featherweight.steps.options import COUNT, Numbers, check_known, check_numbers
from featherweight.task import Task

aten = torch.ops.aten
#: what is stored for a layer, behind its weight's name
PARTS = ("table", "blocks")


@dataclass(frozen=True)
class BlockedWeight:
    """One weight of blocks. error: |W' - W|^2 / |W|^2."""

    weight: str
    shape: tuple[int, ...]
    error: float


@dataclass(frozen=True)
class BlockCodebookPlan(Plan):
    """Which weights are looked up block by block: ``tensors["NAME_table"]`` [k, size], ``NAME_blocks`` the indices.

    Example:
        >>> wide = fw.capture(nn.Linear(64, 64), torch.zeros(2, 64))
        >>> plan = fw.share.BlockCodebook(size=4, bits=5).plan(wide, fw.Task())
        >>> list(plan.tensors["weight_table"].shape)
        [32, 4]
    """

    kind: ClassVar[str] = "share.block_codebook/1"
    blocked: tuple[BlockedWeight, ...] = ()

    def apply(self, network: Network) -> Network:
        """A copy whose weights are looked up in ``NAME_table``, a parameter."""
        return applied(network, self.blocked, self.tensors, PARTS, self._put)

    def _put(self, at: Made, one: BlockedWeight) -> None:
        table, index = (at.stored(part, self.tensors[f"{one.weight}_{part}"]) for part in PARTS)
        rows = at.make(aten.embedding.default, table, at.make(aten.to.dtype, index, torch.int32))
        at.in_place(at.make(aten.reshape.default, rows, list(one.shape)))

    def summary(self) -> str:
        shown = ", ".join(f"{b.weight} (error {b.error ** 0.5:.1%})" for b in self.blocked)
        return f"blocks of weights: {len(self.blocked)} layers" + (f" ({shown})" if shown else "")


@dataclass(frozen=True)
class BlockCodebook(Rewrite):
    """Product quantization: blocks of ``size`` weights that one output reads side by side share a codebook of 2^bits
    vectors (Gong et al. 2014; Stock et al. 2020). A bit a weight and less; a training is to follow.

    size: weights of a block. A row of a convolution is [i, *k], so that 9 takes the windows of 3 x 3 whole. It must
        divide what one output reads.
    bits: of the index, 1 to 8.
    importance: what errors are weighed by: "none", "inputs", "fisher", as in ``Codebook``.
    min_size: smaller weights are left alone.
    ignore: patterns of layers to leave alone (``network/layers``).

    Computed as before, the weight being looked up when the file is loaded: it saves bytes, not time. What would not
    become smaller is left and named. Raises RecipeError for options that make no sense.

    Example:
        >>> wide = fw.capture(nn.Linear(64, 64), torch.zeros(2, 64))
        >>> small = fw.share.BlockCodebook(size=4, bits=5).plan(wide, fw.Task()).apply(wide)
        >>> fw.codec.archive_bytes(small) < fw.codec.archive_bytes(wide) / 3
        True
    """

    size: int = 4
    bits: int = 8
    importance: str = "none"
    min_size: int = 1024
    ignore: tuple[str, ...] = ()
    stage: ClassVar[Stage] = Stage.PRECISION

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        check_numbers(self, {"size": COUNT, "bits": Numbers(8, least=1, most=8, whole=True), "min_size": COUNT})
        check_known("BlockCodebook", "importance", self.importance, IMPORTANCES)

    def needs(self) -> tuple[str, ...]:
        """What the importance reads."""
        return NEEDS.get(self.importance, ())

    def plan(self, network: Network, task: Task) -> BlockCodebookPlan:
        """Reads no data, unless ``importance`` does."""
        self.check()
        selected, measure = select(network, self.ignore), IMPORTANCES[self.importance]
        calls = {layer.weight: list(layer.calls) for layer in selected.layers if not self._refusal(network, layer)}
        importances = measure(network, task, calls) if measure and calls else {}
        return planned(
            network, selected, lambda layer: self._fitted(network, layer, importances.get(layer.weight)),
            lambda layer: self._refusal(network, layer), lambda blocked, own: BlockCodebookPlan(blocked, tensors=own))

    def _fitted(self, network: Network, layer: Layer, importance: Tensor | None) -> tuple[BlockedWeight,
                                                                                         dict[str, Tensor]]:
        weight = network.tensor(layer.weight).detach()
        rows = weight.reshape(-1, self.size)
        table, index = block_codes(rows, 2 ** self.bits, None if importance is None else importance.reshape(rows.shape))
        away = (table[index] - rows).double().square().sum() / rows.double().square().sum()
        tensors = {f"{layer.weight}_table": table,
                   f"{layer.weight}_blocks": index.to(torch.uint8).view(len(weight), -1)}
        return BlockedWeight(layer.weight, tuple(weight.shape), float(away)), tensors

    def _refusal(self, network: Network, layer: Layer) -> str:
        weight = network.tensor(layer.weight)
        if weight.numel() < self.min_size:
            return f"only {weight.numel()} weights, fewer than min_size={self.min_size}"
        if weight[0].numel() % self.size:
            return f"size={self.size} does not divide the {weight[0].numel()} weights that one output reads"
        return stays(network, layer, PARTS)


__all__ = ["BlockCodebook", "BlockCodebookPlan", "BlockedWeight"]
