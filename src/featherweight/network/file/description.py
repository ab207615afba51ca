"""A network as JSON and back. Every field is checked; nothing is imported, unpickled or evaluated on its word."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from featherweight.errors import FileError, did_you_mean
from featherweight.network import trees
from featherweight.network.file import allowed, arguments, shapes
from featherweight.network.signature import FreeAxis, Input, Signature
from featherweight.network.snapshot import Snapshot

#: what is kept of a node beside its call, and the type each must have
NODE_META: dict[str, type] = {"module": str, "source": str, "counter": str, "cumulative": bool}
OPS = {"placeholder": "input", "get_attr": "tensor", "call_function": "call", "output": "output"}
KINDS = ("parameter", "frozen", "buffer", "temporary")
TAGS: dict[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory": torch.memory_format,
                         "device": torch.device}
AXES = 64  #: of an input
LARGEST = 1 << 40  #: no axis of an input is longer
NESTED = 64  #: lists that an argument lies in; how deep Python itself goes depends on its version
DEPTH = 64  #: steps in a tensor's dotted name


# ---- writing

def describe(snapshot: Snapshot) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The graph as JSON-able values, and the tensors it needs, each once."""
    signature = snapshot.signature
    description = {
        "torch": torch.__version__,
        "in_spec": trees.to_json(signature.in_spec),
        "out_spec": trees.to_json(signature.out_spec),
        "inputs": [{"name": i.name, "shape": list(i.shape), "dtype": _plain_name(i.dtype), "batched": i.batched,
                    **({"limits": [list(limit) for limit in i.limits]} if i.limits else {}),
                    **({"axes": [_axis(a) for a in i.axes]} if i.axes else {})}
                   for i in signature.inputs],
        "constants": [[i, _argument(v)] for i, v in signature.constants.items()],
        "nodes": [_node(n) for n in snapshot.graph.nodes],
        "tensors": dict(snapshot.kinds), "ties": dict(snapshot.ties), "order": list(snapshot.order),
        "patterns": dict(snapshot.patterns), "notes": list(snapshot.notes),
    }
    return description, dict(snapshot.tensors)


def _axis(free: FreeAxis) -> list[Any]:
    return [free.axis, free.name, free.example, free.period, list(free.remainders)]


def _node(node: Node) -> dict[str, Any]:
    found: dict[str, Any] = {"name": node.name, "op": OPS[node.op]}
    if node.op == "get_attr":
        found["target"] = node.target
    elif node.op == "output":
        found["args"] = [_argument(a) for a in node.args[0]]  # type: ignore[union-attr]
    elif node.op == "call_function":
        found["target"] = allowed.written(node.target)
        found["args"] = [_argument(a) for a in node.args]
        if node.kwargs:
            found["kwargs"] = {k: _argument(v) for k, v in node.kwargs.items()}
        found |= {k: node.meta[k] for k in NODE_META if node.meta.get(k) is not None}
    return found


def _plain_name(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _argument(value: Any) -> Any:
    if isinstance(value, Node):
        return {"node": value.name}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, (list, tuple)):
        return [_argument(v) for v in value]
    if isinstance(value, slice):
        return {"slice": [_argument(v) for v in (value.start, value.stop, value.step)]}
    for tag, cls in TAGS.items():
        if isinstance(value, cls):
            return {tag: _plain_name(value)}
    raise FileError(f"an argument of type {type(value).__name__} ({value!r}) cannot be written")


# ---- reading

def rebuild(description: Any, tensors: Mapping[str, Tensor], types: Mapping[str, type] | None = None,
            operators: Collection[str] = ()) -> Snapshot:
    """What ``describe`` described. Every wrong field is a FileError, and every call that does not fit what it is given.

    operators: names of operators that may be called although they are not in the table."""
    try:
        graph = _graph(description["nodes"], operators)
        ties = {_text(k): _text(v) for k, v in description["ties"].items()}
        _check_tensors(graph, description["tensors"], ties, tensors)
        kinds = {_tensor_name(k): _kind(k, v) for k, v in description["tensors"].items()}
        found = Snapshot(graph, _signature(description, graph, types), tensors, kinds, ties,
                         tuple(_tensor_name(path) for path in _list(description.get("order", []))),
                         {_text(k): _text(v) for k, v in description["patterns"].items()},
                         tuple(_text(n) for n in description["notes"]))
        shapes.check(found)
        return found
    except FileError:
        raise
    except Exception as error:
        raise FileError(f"the graph is malformed: {type(error).__name__}: {str(error)[:200]}") from error


def _operators(items: Any, also: Collection[str]) -> dict[str, Any]:
    """The operators that a graph calls, by name."""
    found: dict[str, Any] = {}
    for item in items:
        if item["op"] == "call" and str(item["target"]) not in found:
            found[str(item["target"])] = allowed.read(item["target"])
    allowed.check_table(found, also)
    return found


def _graph(items: Any, also: Collection[str]) -> Graph:
    graph = Graph()
    nodes: dict[str, Node] = {}
    operators = _operators(items, also)
    for item in items:
        name, op = item["name"], item["op"]
        if not isinstance(name, str) or not name.isidentifier() or name in nodes:
            raise FileError(f"node name {str(name)[:80]!r} is no fresh identifier")
        if op == "input":
            node = graph.create_node("placeholder", name, name=name)
        elif op == "tensor":
            node = graph.create_node("get_attr", _tensor_name(item["target"]), name=name)
        elif op == "call":
            args = tuple(_value(a, nodes) for a in _list(item.get("args", [])))
            kwargs = {_text(k): _value(v, nodes) for k, v in item.get("kwargs", {}).items()}
            target = operators[item["target"]]
            arguments.check(name, item["target"], target, args, kwargs)
            node = graph.create_node("call_function", target, args, kwargs, name=name)
            node.meta = {k: item[k] for k in NODE_META if k in item}
            if not all(isinstance(v, NODE_META[k]) for k, v in node.meta.items()):
                raise FileError(f"the origin of node {name!r} is of a wrong type")
        elif op == "output":
            results = tuple(_value(a, nodes) for a in _list(item["args"]))
            node = graph.create_node("output", "output", (results,), name=name)
        else:
            raise FileError(f"node {name!r} is of kind {str(op)[:80]!r}; expected one of {', '.join(OPS.values())}")
        if node.name != name:
            raise FileError(f"node name {name!r} is reserved")
        nodes[name] = node
    if [n.op for n in nodes.values()].count("output") != 1 or next(reversed(nodes.values())).op != "output":
        raise FileError("the graph has no single output at its end")
    return graph


def _signature(description: Any, graph: Graph, types: Mapping[str, type] | None) -> Signature:
    inputs = tuple(_input(i) for i in description["inputs"])
    if len(inputs) != sum(n.op == "placeholder" for n in graph.nodes):
        raise FileError("the graph has another number of inputs than its signature")
    constants = {_integer(i): _value(v, {}) for i, v in description["constants"]}
    in_spec, out_spec = trees.from_json(description["in_spec"]), trees.from_json(description["out_spec"], types)
    leaves = in_spec.num_leaves
    if len(inputs) + len(constants) != leaves or not all(0 <= i < leaves for i in constants):
        raise FileError(f"the nest of inputs has {leaves} leaves for {len(inputs)} tensors and {len(constants)} "
                        "constants")
    if in_spec.type is not tuple or [c.type for c in in_spec.children()] != [tuple, dict]:
        raise FileError("the nest of inputs is no pair of positions (a tuple) and keywords (a dict)")
    results = len(next(n for n in graph.nodes if n.op == "output").args[0])
    if out_spec.num_leaves != results:
        raise FileError(f"the nest of outputs has {out_spec.num_leaves} leaves for {results} results")
    return Signature(in_spec, out_spec, inputs, constants)


def _input(item: Any) -> Input:
    shape = tuple(None if s is None else _integer(s) for s in _list(item["shape"]))
    fits = len(shape) <= AXES and all(s is None or 0 <= s < LARGEST for s in shape)
    if not fits or not isinstance(item["batched"], bool):
        raise FileError(f"input {str(item['name'])[:80]!r} has the shape {str(shape)[:80]}")
    limits = tuple(_limit(limit, shape) for limit in _list(item.get("limits", [])))
    return Input(_text(item["name"]), shape, _tagged("dtype", item["dtype"]), item["batched"], limits,
                 tuple(_free_axis(axis, shape) for axis in _list(item.get("axes", []))))


def _limit(item: Any, shape: tuple[int | None, ...]) -> tuple[int, int, int | None]:
    axis, least, most = _list(item)
    found = (_integer(axis), _integer(least), None if most is None else _integer(most))
    fits = 0 <= found[1] < LARGEST and (found[2] is None or found[1] <= found[2] < LARGEST)
    if not fits or not 0 <= found[0] < len(shape) or shape[found[0]] is not None:
        raise FileError(f"an input is limited along axis {str(axis)[:20]}, which is not free, or by no sizes")
    return found


def _free_axis(item: Any, shape: tuple[int | None, ...]) -> FreeAxis:
    axis, name, example, period, remainders = _list(item)
    found = FreeAxis(_integer(axis), _text(name), _integer(example), _integer(period),
                     tuple(_integer(r) for r in _list(remainders)))
    if not 0 <= found.axis < len(shape) or shape[found.axis] is not None:
        raise FileError(f"an input names axis {str(axis)[:20]}, which is not free")
    if not 0 < found.period < LARGEST or not 0 < found.example < LARGEST or not found.fits(found.example):
        raise FileError(f"the sizes of the free axis {found.name[:80]!r} make no sense")
    return found


def _check_tensors(graph: Graph, kinds: Mapping[str, str], ties: Mapping[str, str],
                   tensors: Mapping[str, Tensor]) -> None:
    if set(kinds) != set(tensors) | set(ties) or set(ties) & set(tensors):
        raise FileError("the tensors in the file are not those its graph lists")
    seen: set[str] = set()
    for name in kinds:
        if name in ties and ties[name] not in seen:
            raise FileError(f"tensor {name[:80]!r} is tied to {ties[name][:80]!r}, which does not come before it")
        seen.add(name)
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in kinds:
            raise FileError(f"node {node.name!r} reads the tensor {node.target!r}, which is not in the file")
        if node.meta.get("counter") is not None and node.meta["counter"] not in kinds:
            raise FileError(f"node {node.name!r} counts in {node.meta['counter']!r}, which is not in the file")


def _kind(name: str, kind: Any) -> str:
    if kind not in KINDS:
        raise FileError(f"tensor {name[:80]!r} is of kind {str(kind)[:80]!r}; expected one of {', '.join(KINDS)}")
    return str(kind)


def _tensor_name(name: Any) -> str:
    if not isinstance(name, str) or not all(name.split(".")) or name.count(".") > DEPTH:
        raise FileError(f"{str(name)[:80]!r} is no tensor name")
    return name


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise FileError(f"{str(value)[:80]!r} is no text")
    return value


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise FileError(f"{str(value)[:80]!r} is no integer")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise FileError(f"{str(value)[:80]!r} is no list")
    return value


def _tagged(tag: str, text: Any) -> Any:
    if tag == "device":
        return torch.device(_text(text))
    value = vars(torch).get(_text(text))
    if not isinstance(value, TAGS[tag]):
        raise FileError(f"{text[:80]!r} is no {tag}")
    return value


def _value(value: Any, nodes: Mapping[str, Node], depth: int = 0) -> Any:
    if depth > NESTED:
        raise FileError(f"the graph is malformed: an argument lies in more than {NESTED} lists")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_value(v, nodes, depth + 1) for v in value]
    if isinstance(value, dict) and len(value) == 1:
        tag, inner = next(iter(value.items()))
        if tag == "node" and isinstance(inner, str):
            if inner not in nodes:
                raise FileError(f"an argument names the node {inner[:80]!r}, which does not come before it")
            return nodes[inner]
        if tag == "float" and inner in ("inf", "-inf", "nan"):
            return float(inner)
        if tag == "slice" and len(_list(inner)) == 3:
            return slice(*(_value(v, nodes, depth + 1) for v in inner))
        if tag in TAGS:
            return _tagged(tag, inner)
    raise FileError(f"an argument is described by {str(value)[:80]!r}, which is no known form; {_nearest(value)}")


def _nearest(value: Any) -> str:
    given: Iterable[Any] = value if isinstance(value, dict) else ()
    return did_you_mean(str(next(iter(given), "")), ["node", "float", "slice", *TAGS])
