"""How labels pass an index: positions along an axis taken by number."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.axes.labels import Labels, Value
from featherweight.axes.rules.basics import first, rule, unknown, wrap
from featherweight.axes.rules.views import taken
from featherweight.axes.trace import Trace
from featherweight.network import Network
from featherweight.network.operators import schema_argument as argument

aten = torch.ops.aten


def index_along(network: Network, node: Node) -> tuple[int, Tensor | None]:
    """The axis along which a call takes positions by one stored index [n], and that index; None where it does not."""
    given = node.args[1] if node.target is aten.index.Tensor else [None]
    if node.target is aten.index_select.default:
        dim, at = int(argument(node, "dim")), argument(node, "index")
    else:
        places = [(d, i) for d, i in enumerate(given) if i is not None]  # type: ignore[arg-type]
        dim, at = places[0] if len(places) == 1 else (0, None)
    if not isinstance(at, Node) or at.op != "get_attr":
        return dim, None
    index = network.tensor(str(at.target)).detach().cpu()
    return dim, index if index.dim() == 1 and index.dtype in (torch.int64, torch.int32) and bool((index >= 0).all()) \
        else None


@rule("index.Tensor", "index_select")
def indexed(trace: Trace, node: Node) -> Value:
    """Rows taken by a stored or computed index along one axis; the other axes keep their labels."""
    x, shape = first(trace, node), trace.shape(node)
    dim, index = index_along(trace.network, node)
    if index is not None and (f := x.field(dim)) is not None and len(f.dims) == 1:
        return taken(trace, x, dim, index.numpy(), shape, node)
    if node.target is aten.index_select.default:
        at, rank = [wrap(int(argument(node, "dim")), x)], 1
    else:
        given = [(d, i) for d, i in enumerate(node.args[1]) if i is not None]  # type: ignore[arg-type]
        at, rank = [d for d, _ in given], len(trace.shape(given[0][1]))
    if len(at) != 1:
        return unknown(trace, node)
    fields = trace.untouchable(x, at, node, "channels are taken by a computed position")
    return Labels(x.shape, fields, x.stored).moved(shape, lambda d: d + (rank - 1) * (d > at[0]))
