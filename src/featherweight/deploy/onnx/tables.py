"""What torch's ONNX exporter does anew where once is enough: at every call the table of ONNX forms of operators, and the
one of decompositions, which take more than half of the time of the export of a small network (torch 2.13); at every
node a walk over the whole graph, which takes minutes where there are 20,000 (onnxscript 0.7)."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

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
def halves_at_slices() -> Iterator[None]:
    """For a while, onnxscript's rule that joins two slices to a split is tried at slices of what is sliced twice alone;
    it compares whatever node with all others. Where onnxscript has no such rule, nothing happens."""
    rule = getattr(_module("onnxscript.rewriter.rules.common"), "slice_split_rule", None)
    given = getattr(rule, "try_rewrite", None)
    if rule is None or given is None:
        yield
        return

    def at_slices(model: Any, graph: Any, node: Any, **options: Any) -> Any:
        sliced = node.inputs[0] if node.op_type == "Slice" else None
        twice = sliced is not None and sum(user.op_type == "Slice" for user, _ in sliced.uses()) > 1
        return given(model, graph, node, **options) if twice else None

    rule.try_rewrite = at_slices
    try:
        yield
    finally:
        del rule.try_rewrite


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


__all__ = ["halves_at_slices", "kept_tables"]
