"""``Snapshot``: all that a network is, as plain data, so that files need not know the class that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import Graph

from featherweight.network.signature import Signature


@dataclass(frozen=True)
class Snapshot:
    """A network's graph, signature and tensors; nothing is copied.

    tensors: name -> tensor, each once, under its first name. kinds: every name -> "parameter", "frozen" (a parameter
    that is not trained), "buffer" or "temporary" (a buffer outside the state dict). ties: further name -> first name.
    order: module paths in the order that the state dict follows.
    """

    graph: Graph
    signature: Signature
    tensors: Mapping[str, Tensor]
    kinds: Mapping[str, str]
    ties: Mapping[str, str] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    patterns: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


__all__ = ["Snapshot"]
