"""A graph without hidden effects: what depends on constants alone is stored, in-place calls become functional ones."""

from __future__ import annotations

import hashlib
import operator
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from featherweight.network.operators import functional_form, has_schema, is_random, mutates, returns_view, written_by

aten = torch.ops.aten
FOLD_LIMIT = 64 << 20  #: bytes; a constant larger than this is computed at every run rather than stored
#: view -> the operator that puts a changed view back: scatter(base, changed, *the view's other arguments)
SCATTER: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
    aten.diagonal.default: aten.diagonal_scatter.default,
}


class Memory:
    """Which values may share memory. ``bases(node)``: the calls, inputs and tensors whose memory a value may lie in."""

    def __init__(self, graph: Graph) -> None:
        self._bases: dict[Node, frozenset[Node]] = {}
        self._members: dict[Node, dict[Node, None]] = {}
        for node in graph.nodes:
            self._place(node)

    def bases(self, node: Node) -> frozenset[Node]:
        return self._bases[node]

    def sharing(self, node: Node) -> set[Node]:
        """All values that may share memory with ``node``'s, itself among them."""
        return {member for base in self._bases[node] for member in self._members[base]}

    def update(self, nodes: list[Node]) -> None:
        """To be called after the operators or arguments of ``nodes`` changed: their views follow."""
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            before = self._bases.get(node)
            self._place(node)
            if before != self._bases[node]:
                waiting += [u for u in node.users if u.op == "call_function" and returns_view(u)]

    def _place(self, node: Node) -> None:
        for base in self._bases.get(node, ()):
            self._members[base].pop(node, None)
        bases = frozenset({node})
        if node.op == "call_function" and returns_view(node):
            bases = frozenset(b for used in node.all_input_nodes for b in self._bases[used]) or bases
        self._bases[node] = bases
        for base in bases:
            self._members.setdefault(base, {})[node] = None


def make_functional(graph: Graph) -> None:
    """Replaces in-place calls by functional ones wherever all who can see the memory they write are known.

    ``y = op_(x)`` becomes ``y = op(x)``, and all later readers of ``x`` read ``y``. Where ``x`` is a slice or selection
    of ``b``, later readers of ``b`` read ``scatter(b, y)``. A call stays in place where it writes into a stored tensor,
    where a view made earlier in another way is read later, or where the operator has no functional form. An input is
    never written into: the caller's tensor stays as it was.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    memory = Memory(graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and mutates(node):
            _functional(graph, node, order, memory)
    _spare_inputs(graph, Memory(graph))


def _functional(graph: Graph, node: Node, order: dict[Node, int], memory: Memory) -> None:
    target, written = functional_form(node.target), node.args[0] if node.args else None
    if target is None or not isinstance(written, Node) or any(b.op == "get_attr" for b in memory.bases(written)):
        return
    chain = [written]
    while chain[-1].op == "call_function" and chain[-1].target in SCATTER:
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    now = order[node]
    for other in memory.sharing(written) - set(chain) - {node}:
        if order.get(other, now) < now and any(order.get(u, now) > now for u in other.users):
            return
    later = {view: [u for u in view.users if u is not node and order.get(u, now + 1) > now] for view in chain}
    own = written.meta.get("val")
    node.target = target
    result, place = node, node
    if isinstance(own, Tensor) and _promotes(node, own.dtype):
        with graph.inserting_after(node):
            result = place = graph.call_function(aten.to.dtype, (node, own.dtype))
        result.meta = {**node.meta, "val": own}
        order[result] = now
    changed = [node, result]
    for below, view in zip([None, *chain], chain, strict=False):
        if below is not None:
            with graph.inserting_after(place):
                place = graph.call_function(SCATTER[below.target], (view, result, *below.args[1:]), dict(below.kwargs))
            place.meta = {**node.meta, "val": view.meta.get("val")}
            order[place] = now
            result = place
            changed.append(place)
        for user in later[view]:
            user.replace_input_with(view, result)
            changed.append(user)
    users = [u for u in node.users if u is not result and order[u] > now]
    if changed[1] is not node:
        for user in users:
            user.replace_input_with(node, changed[1])
            changed.append(user)
    memory.update(changed)


def _promotes(node: Node, dtype: torch.dtype) -> bool:
    """Whether the functional operator would give another dtype than the tensor that was written into has."""
    values = [n.meta.get("val") for n in node.all_input_nodes]
    if all(isinstance(v, Tensor) and v.dtype == dtype for v in values) and \
            not any(isinstance(a, (float, complex)) for a in node.args) or dtype.is_complex:
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
                values[node] = node.target(*map_arg(node.args, values.__getitem__),  # type: ignore[operator]
                                           **map_arg(node.kwargs, values.__getitem__))
            writes.update(b for w in written_by(node) for b in memory.bases(w))
        else:
            for used in node.all_input_nodes:
                value = values.get(used)
                if not isinstance(value, Tensor) or value.numel() * value.element_size() > FOLD_LIMIT:
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
