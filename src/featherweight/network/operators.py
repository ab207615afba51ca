"""Facts about operators that the graph machinery needs: one table each, open to extension."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten


def schema_argument(node: Node, name: str) -> Any:
    """The value of the schema argument ``name`` of a call to an operator, its default where it was not given."""
    for index, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            if argument.name in node.kwargs:
                return node.kwargs[name]
            return node.args[index] if index < len(node.args) else argument.default_value
    raise KeyError(f"{node.target} has no argument {name!r}")


def set_schema_argument(node: Node, name: str, value: Any) -> None:
    """Sets the schema argument ``name`` of a call, by position where earlier ones are given so, else by keyword."""
    for index, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            if index < len(node.args) and name not in node.kwargs:
                node.update_arg(index, value)
            else:
                node.update_kwarg(name, value)
            return
    raise KeyError(f"{node.target} has no argument {name!r}")


def has_schema(target: Any) -> bool:
    """Whether a call's target is an operator of torch's dispatcher, not a Python function."""
    return isinstance(target, torch._ops.OpOverload)


def is_free(size: Any) -> bool:
    """Whether a size stayed free: one that the model fixed is still a SymInt, of a known number."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def formula(size: Any) -> Any:
    """A free size as torch's symbols."""
    return size.node.expr


def pools_by_size(node: Node) -> bool:
    """Whether a call pools to a fixed number of cells: runtimes take the cells of one size of its input for all."""
    sizes = node.args[1] if "adaptive_" in str(node.target) and len(node.args) > 1 else 1
    return any(size != 1 for size in (sizes if isinstance(sizes, (list, tuple)) else [sizes]))


def mutates(node: Node) -> bool:
    """Whether the call writes into one of its arguments."""
    return has_schema(node.target) and bool(node.target._schema.is_mutable)  # type: ignore[union-attr]


def written_by(node: Node) -> list[Node]:
    """The arguments that a call writes into."""
    if node.op != "call_function" or not mutates(node):
        return []
    found: list[Node] = []
    for index, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.kwargs.get(argument.name, node.args[index] if index < len(node.args) else None)
            found += [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Node)]
    return found


def is_random(node: Node) -> bool:
    """Whether a call draws from torch's generator."""
    return has_schema(node.target) and torch.Tag.nondeterministic_seeded in node.target.tags  # type: ignore[union-attr]


#: operator -> the schema argument that says "training"; captured False, it follows ``Network.train()``
TRAINING_FLAGS: dict[Any, str] = {
    aten.batch_norm.default: "training",
    aten.instance_norm.default: "use_input_stats",
    aten.dropout.default: "train",
    aten.dropout_.default: "train",
    aten.feature_dropout.default: "train",
    aten.feature_dropout_.default: "train",
    aten.alpha_dropout.default: "train",
    aten.feature_alpha_dropout.default: "train",
    aten.rrelu.default: "training",
    aten.rrelu_.default: "training",
    aten.lstm.input: "train",
    aten.gru.input: "train",
    aten.rnn_tanh.input: "train",
    aten.rnn_relu.input: "train",
}

#: dropouts give back their very input when they do not train, so their result may share its memory
MAY_ALIAS: set[Any] = {
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.feature_alpha_dropout.default,
    operator.getitem,
}

#: assertions that a capture leaves behind; they compute nothing
ASSERTIONS: set[Any] = {
    aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten._assert_async.msg,
    aten.sym_constrain_range_for_size.default, aten.sym_constrain_range.default,
}


def returns_view(node: Node) -> bool:
    """Whether a call's result may share memory with an argument (by its schema, or by ``MAY_ALIAS``)."""
    if node.target in MAY_ALIAS:
        return True
    if not has_schema(node.target):
        return False
    return any(r.alias_info is not None for r in node.target._schema.returns)  # type: ignore[union-attr]


def functional_form(target: Any) -> Callable[..., Any] | None:
    """The operator that computes what an in-place one leaves in its first argument: ``relu_`` -> ``relu``."""
    name, _, overload = str(target).removeprefix("aten.").partition(".")
    if not name.endswith("_") or not str(target).startswith("aten."):
        return None
    packet = getattr(aten, name[:-1], None)
    found = getattr(packet, overload or "default", None) if packet is not None else None
    if found is None or found._schema.is_mutable:
        return None
    given = [a.name for a in target._schema.arguments]
    same = [a.name for a in found._schema.arguments][1: len(given)] == given[1:]
    return found if same else None


def contracted(terms: Sequence[Collection[str]], result: Collection[str]) -> Iterator[set[str]]:
    """The letters of an einsum's products, two by two from the left: those of each pair that sums over a shared one."""
    current = set(terms[0])
    for index, other in enumerate(terms[1:], start=2):
        both = current.union(other)
        kept = both.intersection(set(result).union(*terms[index:]))
        if current.intersection(other) - kept:
            yield both
        current = kept
