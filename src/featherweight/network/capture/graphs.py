"""From an exported program to a clean graph: regions put in place, identities and the dead removed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from featherweight.errors import CaptureError
from featherweight.network.capture.functional import fold_constants, free_factories, make_functional
from featherweight.network.edit import remove_dead
from featherweight.network.operators import ASSERTIONS

aten = torch.ops.aten
#: operators that give an axis another place
TURNS: set[Any] = {aten.permute.default, aten.transpose.int, aten.t.default, aten.swapaxes.default,
                   aten.movedim.int, aten.movedim.intlist}


def _gradients(node: Node) -> tuple[bool, Node, list[Any]]:
    enabled, body, *args = node.args
    return bool(enabled), body, list(args)  # type: ignore[return-value]


def _autocast(node: Node) -> tuple[bool, Node, list[Any]]:
    device, dtype, enabled, _, body, *args = node.args
    if enabled:
        raise CaptureError(f"{source_line(node) or 'in forward'}: autocast to {dtype} on {device} inside a model "
                           "cannot be captured; take it out of forward (a network runs in any autocast around it)")
    return True, body, list(args)  # type: ignore[return-value]


#: operator that runs a region -> (whether gradients pass, the region's graph, its inputs)
REGIONS: dict[Any, Callable[[Node], tuple[bool, Node, list[Any]]]] = {
    torch.ops.higher_order.wrap_with_set_grad_enabled: _gradients,
    torch.ops.higher_order.wrap_with_autocast: _autocast,
}


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


def inline_regions(graph: Graph, submodule: Callable[[str], Any]) -> None:
    """Puts the bodies of ``torch.no_grad`` / ``enable_grad`` regions in place, and those of switched-off autocast; what
    no-grad ones give is detached. Raises CaptureError for autocast that is on."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in REGIONS:
            continue
        enabled, body_node, args = REGIONS[node.target](node)
        body = submodule(str(body_node.target)).graph
        inline_regions(body, lambda name, b=body_node: getattr(submodule(str(b.target)), name))  # type: ignore[misc]
        values: dict[Node, Node] = {}
        rest = iter(args)
        results: Any = ()
        with graph.inserting_before(node):
            for inner in body.nodes:
                if inner.op == "placeholder":
                    values[inner] = next(rest)
                elif inner.op == "output":
                    results = map_arg(inner.args[0], values.__getitem__)
                else:
                    values[inner] = graph.node_copy(inner, values.__getitem__)
            if not enabled:
                results = [graph.call_function(aten.detach.default, (r,)) if isinstance(r, Node) else r
                           for r in results]
        for user in list(node.users):
            if user.target is operator.getitem:
                user.replace_all_uses_with(results[user.args[1]])
                graph.erase_node(user)
        graph.erase_node(node)
        if not body_node.users:
            graph.erase_node(body_node)


def drop_identities(graph: Graph) -> None:
    """Removes slices that take everything, and copies and detachments of fresh constants."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        whole = (node.target is aten.slice.Tensor and len(node.args) >= 3 and node.args[2] in (0, None)
                 and (len(node.args) < 4 or node.args[3] in (None, 2**63 - 1))
                 and (len(node.args) < 5 or node.args[4] == 1))
        if whole or node.target is aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def loosen_views(graph: Graph) -> None:
    """A view of what was turned around becomes a reshape. The exporter leaves a ``contiguous()`` out where the memory
    of its example is in order, which depends on the kernel that an attention happened to run, and so on sizes."""
    for node in graph.nodes:
        if node.target is aten.view.default and node.args[0].target in TURNS:
            node.target = aten.reshape.default


def tidy(graph: Graph, constants: dict[str, Tensor], parameters: Collection[str]) -> None:
    """All of the above in order, constants folded and in-place calls made functional between them, also those that
    write into these ``parameters``."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in ASSERTIONS:
            graph.erase_node(node)
    drop_identities(graph)
    remove_dead(graph)
    free_factories(graph)
    fold_constants(graph, constants)
    make_functional(graph, parameters)
    loosen_views(graph)
    remove_dead(graph)
