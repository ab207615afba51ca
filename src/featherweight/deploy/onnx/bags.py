"""Bags of embeddings: of equal lengths as rows that are summed, averaged or maximized; ONNX has a loop over bags."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from featherweight.network import Network
from featherweight.network.edit import insert_call
from featherweight.network.operators import schema_argument

aten = torch.ops.aten
#: the overload that leaves entries of one index out
PADDED = aten.embedding_bag.padding_idx
#: modes of the operator, by their numbers
SUM, MEAN, MAX = range(3)


def equal_bags(network: Network) -> None:
    """Bags that are the rows of one tensor [n, length] (``nn.EmbeddingBag`` without offsets) become calls on axes: the
    exporter writes a loop over them, in which ONNX Runtime is slow and which OpenVINO does not take."""
    bags = network.calls(PADDED, aten.embedding_bag.default)
    values = network.values() if bags else {}
    for node in bags:
        indices, weights = schema_argument(node, "indices"), schema_argument(node, "per_sample_weights")
        rows = _rows(indices, values)
        weighted = None if weights is None else _rows(weights, values)
        if rows is None or (weights is not None and weighted is None) or schema_argument(node, "include_last_offset"):
            continue
        if not _starts(schema_argument(node, "offsets"), (rows, weighted), values[rows.name].shape[1]):
            continue
        readers = list(node.users)
        if not readers or any(r.target is not operator.getitem or r.args[1] != 0 for r in readers):
            continue
        made = _Bags(network, node, values[readers[0].name].dtype).made(rows, weighted)
        for reader in readers:
            reader.replace_all_uses_with(made)
            network.graph.erase_node(reader)
        network.graph.erase_node(node)
    if bags:
        network.graph.eliminate_dead_code()
        network.changed()


def _rows(flat: Any, values: dict[str, Any]) -> Node | None:
    """What [n, length] was flattened to ``flat``, or None."""
    if flat.target not in (aten.reshape.default, aten.view.default) or list(flat.args[1]) != [-1]:
        return None
    given: Node = flat.args[0]
    return given if values[given.name].dim() == 2 else None


def _starts(offsets: Any, rows: tuple[Node | None, ...], length: int) -> bool:
    """Whether a bag begins at every one of ``rows``, tensors of one shape."""
    if offsets.target is not aten.arange.start_step or offsets.args[0] != 0:
        return False
    step: Any = offsets.args[2]
    if isinstance(step, Node):
        return step.target is aten.sym_size.int and step.args[0] in rows and bool(step.args[1] == 1)
    return bool(step == length)


class _Bags:
    """The calls that take one's place. dtype: of what it gives."""

    def __init__(self, network: Network, node: Node, dtype: torch.dtype) -> None:
        self.network, self.node, self.dtype = network, node, dtype

    def call(self, target: Any, *args: Any) -> Node:
        return insert_call(self.network, target, args, before=self.node)

    def made(self, rows: Node, weighted: Node | None) -> Node:
        """[n, width]. weighted: the factor of each entry [n, length]."""
        mode = schema_argument(self.node, "mode")
        padding = schema_argument(self.node, "padding_idx") if self.node.target is PADDED else None
        entries = self.call(aten.embedding.default, schema_argument(self.node, "weight"), rows)
        if weighted is not None:
            entries = self.call(aten.mul.Tensor, entries, self.call(aten.unsqueeze.default, weighted, -1))
        if padding is None or padding < 0:
            target = {SUM: aten.sum.dim_IntList, MEAN: aten.mean.dim, MAX: aten.amax.default}[mode]
            return self.call(target, entries, [1])
        counts = self.call(aten.unsqueeze.default, self.call(aten.ne.Scalar, rows, padding), -1)
        if mode == MAX:
            away = self.call(aten.logical_not.default, counts)
            most = self.call(aten.amax.default, self.call(aten.masked_fill.Scalar, entries, away, -float("inf")), [1])
            empty = self.call(aten.logical_not.default, self.call(aten.any.dim, counts, 1))
            return self.call(aten.masked_fill.Scalar, most, empty, 0.0)
        factors = self.call(aten.to.dtype, counts, self.dtype)
        total = self.call(aten.sum.dim_IntList, self.call(aten.mul.Tensor, entries, factors), [1])
        if mode == SUM:
            return total
        number = self.call(aten.clamp.default, self.call(aten.sum.dim_IntList, factors, [1]), 1.0)
        return self.call(aten.div.Tensor, total, number)


__all__ = ["equal_bags"]
