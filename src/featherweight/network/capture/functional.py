"""A graph without hidden effects: what depends on constants alone is stored, in-place calls become functional ones."""

from __future__ import annotations

import hashlib
import operator
from collections import Counter
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from featherweight.network.capture.memory import Memory
from featherweight.network.operators import (
    functional_form,
    has_schema,
    is_free,
    is_random,
    mutates,
    schema_argument,
    written_by,
)

aten = torch.ops.aten
FOLD_LIMIT = 64 << 20  #: bytes; a constant larger than this is computed at every run rather than stored
#: view -> the operator that puts a changed view back: scatter(base, changed, *the view's other arguments)
SCATTER: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
    aten.diagonal.default: aten.diagonal_scatter.default,
}
#: operators that give a view always, and so may be called again when what they view has changed
VIEWS: set[Any] = {
    *SCATTER, operator.getitem, aten.alias.default, aten.chunk.default, aten.detach.default, aten.expand.default,
    aten.narrow.default, aten.permute.default, aten.split.Tensor, aten.split_with_sizes.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.swapaxes.default, aten.t.default, aten.transpose.int, aten.unbind.int,
    aten.unsqueeze.default, aten.view.default, aten.view_as.default,
}
#: what makes a tensor in the likeness of another, by its size and type alone -> the value it is filled with, or the
#: position of that value among the arguments
FILLED: dict[Any, int] = {aten.new_zeros.default: 0, aten.zeros_like.default: 0, aten.new_empty.default: 0,
                          aten.empty_like.default: 0, aten.new_ones.default: 1, aten.ones_like.default: 1}
FILLED_BY: dict[Any, int] = {aten.new_full.default: 2, aten.full_like.default: 1}
SMALL = 64 << 10  #: bytes; a larger tensor that one call makes from nothing is not worth its place in a file


def make_functional(graph: Graph, parameters: Collection[str] = ()) -> None:
    """Replaces in-place calls by functional ones wherever all who can see the memory they write are known.

    ``y = op_(x)`` becomes ``y = op(x)``, and all later readers of ``x`` read ``y``. Where ``x`` is a slice or a
    selection of ``b``, later readers of ``b`` read ``scatter(b, y)``; other views that are read later are made again.
    A call stays in place where it writes into a stored tensor that is none of ``parameters``, where something that may
    or may not be a view (a reshape) is read later, or where the operator has no functional form. An input is never
    written into: the caller's tensor stays as it was.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    memory = Memory(graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and mutates(node):
            _functional(graph, node, order, memory, parameters)
    _spare_inputs(graph, Memory(graph))


def _functional(graph: Graph, node: Node, order: dict[Node, int], memory: Memory,
                parameters: Collection[str]) -> None:
    target, written = functional_form(node.target), node.args[0] if node.args else None
    if target is None or not isinstance(written, Node) or any(
            b.op == "get_attr" and b.target not in parameters for b in memory.bases(written)):
        return
    chain = [written]  # what is written into, what that is a view of, and so on
    while chain[-1].op == "call_function" and chain[-1].target in SCATTER:
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    now = order[node]
    later = {n: [u for u in n.users if order[u] > now] for n in memory.sharing(written) if order[n] < now}
    again = [n for n in sorted(later, key=lambda n: order[n]) if later[n] and n not in chain]
    if not all(_comes_from(n, chain) for n in again):
        return
    made = _Maker(graph, node, order)
    own = written.meta.get("val")
    value, before = node, _copied(graph, node, written, order) if node.target is aten.copy_.default else []
    if not before:
        node.target = target
    if isinstance(own, Tensor) and _promotes(node, own.dtype):
        value = made.call(aten.to.dtype, (node, own.dtype), {}, own)
        node.replace_all_uses_with(value, delete_user_cb=lambda user: user is not value)
    instead = {written: value}
    for below, above in pairwise(chain):
        instead[above] = _put_back(made, below, above, instead[below])
    for view in again:
        _remake(view, instead, made)
    for old, new in instead.items():
        for user in later.get(old, ()):
            user.replace_input_with(old, new)
    memory.update([*before, node, *made.nodes, *(u for users in later.values() for u in users), *value.users])


def _copied(graph: Graph, node: Node, written: Node, order: dict[Node, int]) -> list[Node]:
    """Makes ``copy_(x, source)`` a clone of the source in ``x``'s size and type (``aten.copy`` has no gradient). Gives
    the new nodes."""
    want, given = written.meta.get("val"), node.args[1].meta.get("val")  # type: ignore[union-attr]
    new: list[Node] = []
    with graph.inserting_before(node):
        if not (isinstance(want, Tensor) and isinstance(given, Tensor) and want.dtype == given.dtype):
            new.append(graph.call_function(aten.type_as.default, (node.args[1], written)))
        new.append(graph.call_function(aten.expand_as.default, (new[-1] if new else node.args[1], written)))
    for made in new:
        made.meta = {k: v for k, v in node.meta.items() if k != "val"}
        order[made] = order[node]
    node.target, node.args, node.kwargs = aten.clone.default, (new[-1],), {}
    return new


class _Maker:
    """Makes calls one after another behind a node, with its origin and its place in the order."""

    def __init__(self, graph: Graph, node: Node, order: dict[Node, int]) -> None:
        self.graph, self.origin, self.order, self.nodes, self.place = graph, node, order, list[Node](), node

    def call(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], value: Any) -> Node:
        with self.graph.inserting_after(self.place):
            self.place = self.graph.call_function(target, args, dict(kwargs))
        self.place.meta = {**self.origin.meta, "val": value}
        self.order[self.place] = self.order[self.origin]
        self.nodes.append(self.place)
        return self.place


def _put_back(made: _Maker, view: Node, base: Node, changed: Node) -> Node:
    """``base`` with ``changed`` where ``view`` shows it. Of complex numbers, whose slices torch puts back without a
    gradient, as pairs of real ones."""
    value = base.meta.get("val")
    if not (isinstance(value, Tensor) and value.is_complex() and view.target is not aten.diagonal.default):
        return made.call(SCATTER[view.target], (base, changed, *view.args[1:]), view.kwargs, value)
    dim, rest = int(schema_argument(view, "dim")) % value.dim(), view.args[2:]
    pairs = [made.call(aten.view_as_real.default, (whole,), {}, torch.view_as_real(whole.meta["val"]))
             for whole in (base, changed)]
    kwargs = {name: given for name, given in view.kwargs.items() if name != "dim"}
    put = made.call(SCATTER[view.target], (*pairs, dim, *rest), kwargs, pairs[0].meta["val"])
    return made.call(aten.view_as_complex.default, (put,), {}, value)


def _comes_from(node: Node, chain: list[Node]) -> bool:
    """Whether ``node`` is a view, and nothing but a view, of something in ``chain``."""
    while node not in chain:
        if node.op != "call_function" or node.target not in VIEWS:
            return False
        node = node.args[0]  # type: ignore[assignment]
    return True


def _remake(view: Node, instead: dict[Node, Node], made: _Maker) -> None:
    """Makes ``view`` again, of what stands instead of that which it is a view of."""
    path = [view]
    while path[-1] not in instead:
        path.append(path[-1].args[0])  # type: ignore[arg-type]
    for above, below in pairwise(reversed(path)):
        instead[below] = made.call(below.target, (instead[above], *below.args[1:]), below.kwargs, below.meta.get("val"))


def _promotes(node: Node, dtype: torch.dtype) -> bool:
    """Whether the functional operator would give another dtype than the tensor that was written into has."""
    values = [n.meta.get("val") for n in node.all_input_nodes]
    if dtype.is_floating_point and all(v.dtype == dtype for v in values if isinstance(v, Tensor)):
        return False
    try:
        meta = map_arg((node.args, node.kwargs), lambda n: _meta(n.meta["val"]))
        return bool(node.target(*meta[0], **meta[1]).dtype != dtype)  # type: ignore[operator]
    except Exception:
        return True  # a cast too many does no harm


def _meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty([1] * value.dim(), dtype=value.dtype, device="meta")
    return 1 if isinstance(value, torch.SymInt) else value


def _spare_inputs(graph: Graph, memory: Memory) -> None:
    """Puts a copy between an input and the calls, if some had to stay in place on its memory."""
    hit = {b for n in graph.nodes if n.op == "call_function" and mutates(n)
           for w in written_by(n) for b in memory.bases(w) if b.op == "placeholder"}
    for node in hit:
        users = list(node.users)
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
        with graph.inserting_after(last):
            spare = graph.call_function(aten.clone.default, (node,))
        spare.meta = {k: v for k, v in users[0].meta.items() if k in ("module", "source")}
        for user in users:
            user.replace_input_with(node, spare)


def free_factories(graph: Graph) -> None:
    """Makes ``new_zeros(x, sizes)`` and its like independent of ``x`` where their sizes are known numbers."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in FILLED.keys() | FILLED_BY.keys():
            continue
        value = node.meta.get("val")
        fill = FILLED.get(node.target)
        if fill is None:
            fill = node.kwargs.get("fill_value", (*node.args, None, None, None)[FILLED_BY[node.target]])
        if not isinstance(value, Tensor) or isinstance(fill, Node) or fill is None:
            continue
        if value.layout is not torch.strided or any(is_free(s) for s in value.shape):
            continue
        node.target = aten.full.default
        node.args = ([int(s) for s in value.shape], bool(fill) if value.dtype is torch.bool else fill)
        node.kwargs = {"dtype": value.dtype, "device": value.device, "pin_memory": False}


def fold_constants(graph: Graph, constants: dict[str, Tensor]) -> None:
    """Runs, once, whatever depends on constants alone, and stores what the rest of the graph reads of it.

    Parameters, buffers and random numbers are no constants. A constant that somebody else writes into is left alone,
    with all that shares its memory.
    """
    fixed = _fixed(graph, constants)
    if not fixed:
        return
    memory = Memory(graph)
    values: dict[Node, Any] = {}
    writes: Counter[Node] = Counter()  # how often the memory of a base was written into so far
    stored: dict[Any, Node] = {}
    same: dict[str, str] = {}
    for node in list(graph.nodes):
        if node in fixed and node.op == "get_attr":
            values[node] = constants[str(node.target)].clone()
        elif node in fixed:
            with torch.no_grad():
                values[node] = node.target(*map_arg(node.args, values.__getitem__),
                                           **map_arg(node.kwargs, values.__getitem__))
            writes.update(b for w in written_by(node) for b in memory.bases(w))
        else:
            for used in node.all_input_nodes:
                value = values.get(used)
                limit = FOLD_LIMIT if used.all_input_nodes or used.op == "get_attr" or writes[used] else SMALL
                if not isinstance(value, Tensor) or value.numel() * value.element_size() > limit:
                    continue
                key = (used, tuple(sorted((b.name, writes[b]) for b in memory.bases(used))))
                if key not in stored:
                    with graph.inserting_before(node):
                        stored[key] = graph.create_node("get_attr", _store(value, constants, same))
                    stored[key].meta["val"] = value
                node.replace_input_with(used, stored[key])
    for node in reversed(list(graph.nodes)):
        if node in fixed and not node.users:
            graph.erase_node(node)


def _fixed(graph: Graph, constants: dict[str, Tensor]) -> set[Node]:
    """The nodes that depend on constants alone and share no memory that another node writes into."""
    memory = Memory(graph)
    spoilt: set[Node] = set()
    while True:
        fixed: set[Node] = set()
        for node in graph.nodes:
            if node.op == "get_attr":
                alone = node.target in constants
            else:
                alone = (node.op == "call_function" and (node.target is operator.getitem or has_schema(node.target))
                         and not is_random(node) and all(n in fixed for n in node.all_input_nodes))
            if alone and not (memory.bases(node) & spoilt):
                fixed.add(node)
        written = {b for w in graph.nodes if w not in fixed for u in written_by(w) for b in memory.bases(u)}
        if written <= spoilt:
            return fixed
        spoilt |= written


def _store(value: Tensor, constants: dict[str, Tensor], same: dict[str, str]) -> str:
    """The name of a stored constant of this value: equal ones are stored once."""
    value = value.detach().clone().contiguous()
    if value.layout is not torch.strided or value.is_quantized:
        key = f"{len(same)}"
    else:
        raw = value.cpu().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        key = f"{value.dtype}{tuple(value.shape)}{value.device}{hashlib.sha256(raw).hexdigest()}"
    if key not in same:
        same[key] = next(n for n in (f"constant_{i}" for i in range(len(constants) + 1)) if n not in constants)
        constants[same[key]] = value
    return same[key]
