"""From an exported program to a clean graph: constants folded, in-place calls made functional, the dead removed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from featherweight.network.operators import (
    ASSERTIONS,
    functional_form,
    has_schema,
    is_random,
    mutates,
    returns_view,
)

aten = torch.ops.aten
FOLD_LIMIT = 64 << 20  #: bytes; a constant larger than this is computed at every run rather than stored


def source_line(node: Node) -> str:
    """"file:line" of the innermost line of the user's (or a library's) code that made this call, "" if unknown."""
    lines = [line.strip() for line in node.meta.get("stack_trace", "").splitlines() if line.strip().startswith("File ")]
    for line in reversed(lines):
        file, _, rest = line.removeprefix('File "').partition('", line ')
        if "/torch/" not in file and not file.startswith("torch/"):
            return f"{file.rsplit('/', 1)[-1]}:{rest.split(',')[0]}"
    return ""


def module_path(node: Node) -> str:
    """Dotted path of the innermost module whose forward made this call."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values() if isinstance(entry, tuple) and len(entry) == 2]
    path = paths[-1] if paths else ""
    return "" if "_empty_nn_module_stack" in path else path.split("@")[0]


def roots(graph: Graph) -> Callable[[Node], set[Node]]:
    """A function giving the nodes whose memory a node's value may share (itself among them)."""
    found: dict[Node, set[Node]] = {}
    for node in graph.nodes:
        mine = {node}
        if node.op == "call_function" and returns_view(node):
            for used in node.all_input_nodes:
                mine |= found[used]
        found[node] = mine
    return lambda node: found[node]


def inline_regions(graph: Graph, submodule: Callable[[str], Any]) -> None:
    """Puts the bodies of ``torch.no_grad`` / ``enable_grad`` regions in place; results of no-grad regions are detached."""
    wrap = torch.ops.higher_order.wrap_with_set_grad_enabled
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not wrap:
            continue
        enabled, body_node, *args = node.args
        body = submodule(str(body_node.target)).graph  # type: ignore[union-attr]
        inline_regions(body, lambda name, b=body_node: getattr(submodule(str(b.target)), name))  # type: ignore[misc]
        values: dict[Node, Node] = {}
        rest = iter(args)
        results: Any = ()
        with graph.inserting_before(node):
            for inner in body.nodes:
                if inner.op == "placeholder":
                    values[inner] = next(rest)  # type: ignore[assignment]
                elif inner.op == "output":
                    results = map_arg(inner.args[0], lambda n: values[n])
                else:
                    values[inner] = graph.node_copy(inner, lambda n: values[n])
            if not enabled:
                results = [graph.call_function(aten.detach.default, (r,)) if isinstance(r, Node) else r for r in results]
        for user in list(node.users):
            if user.target is operator.getitem:
                user.replace_all_uses_with(results[user.args[1]])
                graph.erase_node(user)
        graph.erase_node(node)
        if not body_node.users:  # type: ignore[union-attr]
            graph.erase_node(body_node)  # type: ignore[arg-type]


def remove_dead(graph: Graph) -> None:
    """Removes calls that nobody reads and that write nothing, and tensors that nobody reads."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("placeholder", "output") or node.users:
            continue
        if node.op == "call_function" and node.target not in ASSERTIONS and mutates(node):
            continue
        graph.erase_node(node)


def drop_identities(graph: Graph) -> None:
    """Removes slices that take everything, and copies and detachments of fresh constants."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        whole = (node.target is aten.slice.Tensor and len(node.args) >= 3 and node.args[2] in (0, None)
                 and (len(node.args) < 4 or node.args[3] in (None, 2**63 - 1)) and (len(node.args) < 5 or node.args[4] == 1))
        if whole or node.target is aten.alias.default:
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            graph.erase_node(node)


def make_functional(graph: Graph) -> None:
    """Replaces in-place calls by functional ones wherever nothing else can see the memory they write.

    ``y = op_(x)`` becomes ``y = op(x)``, and all later readers of ``x`` read ``y``. It stays in place where ``x`` is an
    input or a stored tensor, shares memory with a view that is read later, or has no functional form.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    family = roots(graph)
    for node in list(graph.nodes):
        if node.op != "call_function" or not mutates(node) or not node.args or not isinstance(node.args[0], Node):
            continue
        target = functional_form(node.target)
        written = node.args[0]
        if target is None or any(n.op != "call_function" for n in family(written)):
            continue
        shared = {n for n in order if family(n) & family(written)} - {written, node}
        seen_later = any(order[user] > order[node] for n in shared if not _flows_from(n, node) for user in n.users)
        if seen_later:
            continue
        for user in list(written.users):
            if order[user] > order[node]:
                user.replace_input_with(written, node)
        node.target = target
        order = {n: i for i, n in enumerate(graph.nodes)}
        family = roots(graph)


def _flows_from(node: Node, source: Node) -> bool:
    """Whether ``node`` is computed from ``source`` through views."""
    while node is not source:
        inputs = node.all_input_nodes
        if not returns_view(node) or not inputs:
            return False
        node = inputs[0]
    return True


def fold_constants(graph: Graph, constants: dict[str, Tensor]) -> None:
    """Runs, once, whatever depends on constants alone, and stores what the rest of the graph reads of it.

    Parameters, buffers and random numbers are no constants. A constant that somebody else writes into is left alone,
    with all that shares its memory.
    """
    family = roots(graph)
    fixed: set[Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in constants:
            fixed.add(node)
        elif node.op == "call_function" and has_schema(node.target) and not is_random(node) and \
                all(n in fixed for n in node.all_input_nodes):
            fixed.add(node)
        elif node.op == "call_function" and node.target is operator.getitem and node.args[0] in fixed:
            fixed.add(node)
    while spoilt := {n for n in fixed for w in graph.nodes if w not in fixed and w.op == "call_function" and mutates(w)
                     for a in w.args[:1] if isinstance(a, Node) and family(a) & family(n)}:
        fixed -= spoilt
        fixed = {n for n in fixed if all(i in fixed for i in n.all_input_nodes)}
    values: dict[Node, Any] = {}
    for node in graph.nodes:
        if node in fixed and node.op == "get_attr":
            values[node] = constants[str(node.target)].clone()
        elif node in fixed:
            with torch.no_grad():
                values[node] = node.target(*map_arg(node.args, values.__getitem__), **map_arg(node.kwargs, values.__getitem__))
    names: Iterator[str] = (f"constant_{i}" for i in range(len(fixed)))
    for node in [n for n in graph.nodes if n in fixed]:
        value = values[node]
        outside = [u for u in node.users if u not in fixed]
        if not outside or not isinstance(value, Tensor) or value.numel() * value.element_size() > FOLD_LIMIT:
            continue
        name = next(n for n in names if n not in constants)
        constants[name] = value.detach().clone().contiguous()
        with graph.inserting_before(node):
            stored = graph.create_node("get_attr", name)
        for user in outside:
            user.replace_input_with(node, stored)
    for node in reversed(list(graph.nodes)):
        if node in fixed and not node.users:
            graph.erase_node(node)


def tidy(graph: Graph, constants: dict[str, Tensor]) -> None:
    """All of the above in order."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in ASSERTIONS:
            graph.erase_node(node)
    drop_identities(graph)
    remove_dead(graph)
    fold_constants(graph, constants)
    make_functional(graph)
    remove_dead(graph)
