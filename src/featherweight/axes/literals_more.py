"""More numbers in the graph that speak of channels (``axes/literals.py``), and more calls that mix them
(``axes/zero.py``): products, standardized weights, filled tensors, convolutions over channels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.fx import Node

from featherweight.axes import literals
from featherweight.axes.literals import MENDS, Cut
from featherweight.axes.rules.basics import operators
from featherweight.axes.rules.products import FACTORS, factors, letters
from featherweight.axes.rules.weights import over_channels
from featherweight.axes.zero import Place, mixes
from featherweight.network.edit import insert_call
from featherweight.network.operators import schema_argument as argument
from featherweight.network.operators import set_schema_argument

aten = torch.ops.aten

MENDS.update(dict.fromkeys(operators("zeros", "ones", "full", "new_zeros", "new_ones", "new_full"), literals.sizes))


@mixes("baddbmm", "addmm", "mv", "dot")
def product(cut: Cut, node: Node) -> list[Place]:
    names = FACTORS.get(str(node.target).split(".")[1].rstrip("_"), tuple(
        a.name for a in node.target._schema.arguments[:2]))  # type: ignore[union-attr]
    terms, result = letters(node, [len(cut.labels(n).shape) for n in factors(node)])
    return [(name, term.index(c), None) for name, term in zip(names, terms, strict=True) for c in term
            if c not in result]


@mixes("batch_norm")
def standardized(cut: Cut, node: Node) -> list[Place]:
    x = cut.labels(node.args[0])
    if not x.stored or argument(node, "running_mean") is not None:
        return []
    return [("input", d, d) for f in x.fields for d in f.dims if d != 1]


@mixes("_weight_norm")
def weight_norm(cut: Cut, node: Node) -> list[Place]:
    v, g = (cut.labels(n) for n in node.args[:2])
    return [(name, d, d) for name, x in (("v", v), ("g", g)) for f in x.fields for d in f.dims]


@mixes("div.Tensor", "reciprocal", "rsqrt", "log")
def not_of_zero(cut: Cut, node: Node) -> list[Place]:
    """What has no value at zero is taken of the kept channels alone."""
    found: list[Place] = []
    rank, last = len(cut.labels(node).shape), cut.labels(node.args[-1]) if isinstance(node.args[-1], Node) else None
    for f in last.fields if last is not None else ():
        for d in (f.dims[i] + rank - len(last.shape) for i in range(len(f.dims))):  # type: ignore[union-attr]
            for name, given in zip(("self", "other"), node.args, strict=False):
                x = cut.labels(given)
                own = d - (rank - len(x.shape))
                if own >= 0 and x.shape[own] > 1:
                    found.append((name, own, d))
    return found


@literals.mend("gather")
def gathered(cut: Cut, node: Node) -> None:
    """An index that is one position repeated is repeated for the channels that are left."""
    x, index = cut.labels(node.args[0]), argument(node, "index")
    alone = [d for d in range(len(x.shape)) if cut.labels(index).field(d) is None and not cut.stays(x, d).all()]
    for dim in alone:
        index = insert_call(cut.network, aten.slice.Tensor, (index, dim, 0, cut.size(x, dim)), before=node)
        set_schema_argument(node, "index", index)


@literals.mend("conv1d")
def convolution(cut: Cut, node: Node) -> None:
    """A convolution over neighbouring channels reads zeros where channels were cut, and what it makes there goes."""
    literals.convolution(cut, node)
    x, w = cut.labels(node.args[0]), cut.labels(node.args[1])
    if not over_channels(node, x, w):
        return
    stays = cut.stays(x, 2)
    if stays.all():
        return
    back = literals.stored(cut, node, "spread", np.where(stays, np.cumsum(stays) - 1, stays.sum()))
    padded = insert_call(cut.network, aten.constant_pad_nd.default, (node.args[0], [0, 1], 0), before=node)
    node.update_arg(0, insert_call(cut.network, aten.index_select.default, (padded, 2, back), before=node))
    index, users = literals.stored(cut, node, "kept", np.flatnonzero(stays)), list(node.users)
    chosen = insert_call(cut.network, aten.index_select.default, (node, 2, index), after=node)
    for user in users:
        user.replace_input_with(node, chosen)
