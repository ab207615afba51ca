"""``Vectors``: what has one axis (biases, scales, statistics, codebooks) with the precision of bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from featherweight.errors import PlanError, did_you_mean
from featherweight.network import Network
from featherweight.network.layers import Skipped, ignored, known_by
from featherweight.steps import Plan, Rewrite, Stage
from featherweight.task import Task

#: why tensors of several axes stay
MATRIX = "no vector: Codebook and Quantize are for tensors of several axes"


@dataclass(frozen=True)
class VectorsPlan(Plan):
    """Which tensors are rounded to the nearest bfloat16.

    Example:
        >>> fw.share.Vectors().plan(network, task).summary()
        'bfloat16: 6 vectors rounded'
    """

    kind: ClassVar[str] = "share.vectors/1"
    names: tuple[str, ...] = ()

    def apply(self, network: Network) -> Network:
        """A copy with these tensors rounded; their type, and what the graph computes with, stays."""
        changed = network.copy()
        for name in self.names:
            if name not in changed.tensors():
                raise PlanError(f"the plan rounds {name!r}, which this network does not have; "
                                f"{did_you_mean(name, changed.tensors())}")
            tensor = changed.tensor(name).detach()
            changed.set_tensor(name, tensor.to(torch.bfloat16).to(tensor.dtype))
        changed.changed()
        return changed

    def summary(self) -> str:
        return f"bfloat16: {len(self.names)} vectors rounded"


@dataclass(frozen=True)
class Vectors(Rewrite):
    """Rounds every float32 tensor of one axis to the nearest bfloat16, in place.

    The tensors stay float32 and the runtime computes as before; the archive, which codes numbers byte by byte, needs
    half as much for them. A small network keeps a large part of its archive in biases. Put it last in a recipe:
    training brings all bits back.

    ignore: patterns of tensors to leave alone, by their names or modules around them.

    Example:
        >>> bias = fw.share.Vectors().plan(network, task).apply(network).tensor("3.bias")
        >>> torch.equal(bias, bias.bfloat16().float())
        True
    """

    ignore: tuple[str, ...] = ()
    stage: ClassVar[Stage] = Stage.PRECISION

    def plan(self, network: Network, task: Task) -> VectorsPlan:
        """Reads no data."""
        names, skipped = [], []
        for name, tensor in network.tensors().items():
            if tensor.dim() == 0 or tensor.dtype != torch.float32:
                continue
            reason = ignored(known_by((name,), ()), self.ignore) or (tensor.dim() > 1 and MATRIX)
            if reason:
                skipped.append(Skipped(name, reason))
            else:
                names.append(name)
        return VectorsPlan(tuple(names), skipped=tuple(skipped))


__all__ = ["Vectors", "VectorsPlan"]
