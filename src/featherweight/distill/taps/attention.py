"""Attention maps, where a network's attention is one fused call or a softmax over keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.distill.taps.places import Place
from featherweight.network import Network
from featherweight.network.operators import schema_argument

aten = torch.ops.aten
FUSED = aten.scaled_dot_product_attention.default
SOFTMAX = (aten.softmax.int, aten._softmax.default)


@dataclass(frozen=True)
class AttentionPlace(Place):
    """The map [n, heads, queries, keys] of a fused call, which gives no map itself.

    query, key: the nodes that it reads; mask: the node of its mask, "" if it has none that an input reaches.
    """

    query: str = ""
    key: str = ""
    mask: str = ""
    causal: bool = False
    scale: float | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(name for name in (self.query, self.key, self.mask) if name)

    def of(self, seen: Mapping[str, Tensor]) -> Tensor:
        """softmax(q k^T * scale + mask) over the keys, as torch.nn.functional.scaled_dot_product_attention has it."""
        query, key = seen[self.query].float(), seen[self.key].float()
        scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if self.scale is None else self.scale)
        if self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        if self.mask:
            mask = seen[self.mask]
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1).nan_to_num()


def attentions(network: Network) -> list[Place]:
    """The attention maps, in order: of fused calls, and of softmaxes of four axes over the last of them."""
    values, order = network.values(), list(network.graph.nodes)
    found: list[Place] = []
    for index, node in enumerate(order):
        path, depth = str(node.meta.get("module", "")), index / len(order)
        if node.target == FUSED:
            found += _fused(node, values, path, depth)
        elif node.target in SOFTMAX and values[node.name].dim() == 4 and schema_argument(node, "dim") in (3, -1):
            found.append(Place(node.name, path, tuple(map(int, values[node.name].shape[1:])), 1, depth))
    return found


def _fused(node: Node, values: Mapping[str, Any], path: str, depth: float) -> list[Place]:
    query, key, mask = node.args[0], node.args[1], schema_argument(node, "attn_mask")
    assert isinstance(query, Node)
    assert isinstance(key, Node)
    if values[query.name].dim() != 4:
        return []
    _, heads, count, _ = values[query.name].shape
    scale = schema_argument(node, "scale")
    return [AttentionPlace(node.name, path, (int(heads), int(count), int(values[key.name].shape[2])), 1, depth,
                           query.name, key.name, mask.name if isinstance(mask, Node) else "",
                           bool(schema_argument(node, "is_causal")), None if scale is None else float(scale))]


__all__ = ["AttentionPlace", "attentions"]
