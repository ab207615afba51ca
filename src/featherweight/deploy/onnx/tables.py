"""What torch's ONNX exporter does again and again where once, or never, is enough: at every call the tables of ONNX
forms of operators and of decompositions (more than half of the time of the export of a small network, torch 2.13), for
each parameter the tables of all, and at every node rules of rewriting, one of which walks over the whole graph
(onnxscript 0.7)."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.export import exported_program

#: torch's modules of the exporter
HOME = "torch.onnx._internal.exporter"
#: what was built, by its arguments and by how many operators torch knew then
KEPT: dict[Any, Any] = {}


@contextlib.contextmanager
def kept_tables() -> Iterator[None]:
    """For a while, torch's exporter takes copies of tables that it built before. Where torch has these functions no
    more, nothing happens."""
    registration, decompositions = (_module(f"{HOME}.{name}") for name in ("_registration", "_decomp"))
    registry = getattr(registration, "ONNXRegistry", None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(registry, "from_torchlib", lambda build: staticmethod(_once(build, _of_forms))))
        stack.enter_context(_replaced(decompositions, "create_onnx_friendly_decomposition_table",
                                      lambda build: _once(build, dict)))
        yield


@contextlib.contextmanager
def parameters_once() -> Iterator[None]:
    """torch 2.13 makes the tables of a program's parameters and buffers anew for every parameter, which takes minutes
    for 10,000 of them; here they are made once."""

    def build(given: Callable[..., Any]) -> Callable[..., Any]:
        def once(metadata: Any, module: Any, signature: Any) -> None:
            given(metadata, module, SimpleNamespace(inputs_to_parameters=dict(signature.inputs_to_parameters),
                                                    inputs_to_buffers=dict(signature.inputs_to_buffers)))

        return once

    with _replaced(exported_program, "_populate_param_buffer_metadata_to_new_gm", build):
        yield


@contextlib.contextmanager
def no_stack_traces() -> Iterator[None]:
    """torch looks up the Python lines that each call was traced from, which no file keeps; for a while it does not,
    where it can be told so."""
    with _replaced(torch.fx.config, "do_not_emit_stack_traces", lambda given: True):
        yield


@contextlib.contextmanager
def rules_where_they_apply() -> Iterator[None]:
    """For a while, onnxscript tries each of its rules for rewriting at nodes of the operator alone that the rule begins
    with; and the rule that makes a split of two slices, for which it compares any node with all others, at slices of
    what is sliced twice. Where onnxscript has no such rules, nothing happens."""
    known = vars(_module("onnxscript.rewriter.rules.common") or object)
    rules = [rule for rule in known.values() if callable(getattr(rule, "try_rewrite", None)) and _begins_with(rule)]
    for rule in rules:
        rule.try_rewrite = _where(_begins_with(rule), rule is known.get("slice_split_rule"), rule.try_rewrite)
    try:
        yield
    finally:
        for rule in rules:
            del rule.try_rewrite


def _begins_with(rule: Any) -> str | None:
    """The operator of the node that a rule's pattern is first compared with; None where it takes several."""
    ends = getattr(getattr(rule, "_target_pattern", None), "output_nodes", None) or [None]
    found = getattr(ends[0], "op_identifier", lambda: None)()
    return None if found is None else str(found[1])


def _where(operator: str | None, twice: bool, given: Callable[..., Any]) -> Callable[..., Any]:
    """``given`` (a rule's ``try_rewrite``) at nodes of one operator; twice: whose input other such nodes read too."""

    def tried(model: Any, graph: Any, node: Any, **options: Any) -> Any:
        here = node.op_type == operator and (not twice or sum(
            user.op_type == operator for user, _ in node.inputs[0].uses()) > 1)
        return given(model, graph, node, **options) if here else None

    return tried


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _of_forms(registry: Any) -> Any:
    """A copy of the exporter's registry, to which operators may be added."""
    made = copy.copy(registry)
    made.functions = {target: list(forms) for target, forms in registry.functions.items()}
    return made


def _once(build: Callable[..., Any], copied: Callable[[Any], Any]) -> Callable[..., Any]:
    def kept(*args: Any, **kwargs: Any) -> Any:
        known = len(torch._C._dispatch_get_all_op_names())
        given = (frozenset(a) if isinstance(a, set) else a for a in args)
        key = (build.__name__, known, *given, *sorted(kwargs.items()))
        if key not in KEPT:
            KEPT[key] = build(*args, **kwargs)
        return copied(KEPT[key])

    return kept


@contextlib.contextmanager
def _replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    old = None if owner is None else vars(owner).get(name)
    if old is None:
        yield
        return
    setattr(owner, name, make(getattr(owner, name)))
    try:
        yield
    finally:
        setattr(owner, name, old)


__all__ = ["kept_tables", "no_stack_traces", "parameters_once", "rules_where_they_apply"]
