"""The ``.fw`` file: a safetensors file whose header carries the graph as JSON.

Layout, byte by byte
    0..7      length N of the header, unsigned little-endian (safetensors)
    8..8+N    the header, JSON: per tensor its dtype, shape and place; ``__metadata__`` with the strings "format"
              ("featherweight 1"), "graph" (JSON, below) and "sha256" (of graph, tensor names, dtypes, shapes and bytes)
    the rest  the tensors' bytes, read by the safetensors library, which checks that they fill the file exactly

The graph: ``nodes`` [{name, op: input|tensor|call|output, target, args, kwargs, module, source, ...}], ``inputs``,
``in_spec``, ``out_spec``, ``tensors`` {name: kind}, ``ties`` {name: name it shares}, ``patterns``, ``notes``.
Arguments are JSON literals or tagged objects: {"node": name}, {"dtype": ..}, {"device": ..}, {"layout": ..},
{"memory": ..}, {"float": "inf"}, {"slice": [..]}, {"complex": ..} is refused.

How each byte is read: ``json.loads``, then checks of every field. A call's operator is looked up by name among the
operators that torch has registered in ALLOWED_NAMESPACES and the few Python functions in FUNCTIONS; nothing is imported,
unpickled or evaluated because a file says so. A damaged or hostile file is a FileError.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed  # noqa: F401
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.fx import Graph, Node

from featherweight.errors import FileError, did_you_mean
from featherweight.network import trees
from featherweight.network.assembly import Assembly, put
from featherweight.network.network import Input, Network, Signature

FORMAT = "featherweight 1"
ASSEMBLY_FORMAT = "featherweight assembly 1"
HEADER_LIMIT = 100_000_000  #: bytes; as safetensors has it
ALLOWED_NAMESPACES = ("aten", "quantized_decomposed", "torchvision", "featherweight")
#: operators of the allowed namespaces that reach outside of tensors
REFUSED = ("from_file", "save", "_foobar", "record_stream", "set_data", "resize_as_", "data_ptr")
FUNCTIONS = {f"operator.{name}": getattr(operator, name) for name in (
    "getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "eq", "ne", "lt", "le", "gt", "ge")}
FUNCTIONS |= {"math.ceil": math.ceil, "math.floor": math.floor, "torch.sym_int": torch.sym_int,
              "torch.sym_float": torch.sym_float, "torch.sym_max": torch.sym_max, "torch.sym_min": torch.sym_min,
              "torch.sym_not": torch.sym_not, "torch.sym_ite": torch.sym_ite}
FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}
NODE_META = ("module", "source", "counter", "cumulative")
OPS = {"placeholder": "input", "get_attr": "tensor", "call_function": "call", "output": "output"}


# ---- writing

def save(network: Network, path: str | Path) -> int:
    """Writes ``network`` to ``path``, whole or not at all; gives the file's length in bytes."""
    description, tensors = describe(network)
    return _write(path, tensors, FORMAT, description)


def save_assembly(assembly: Assembly, path: str | Path) -> int:
    """Writes an Assembly: every part as a graph, and the tensors of what stayed Python."""
    parts, tensors = {}, {}
    for name, network in assembly.parts.items():
        parts[name], own = describe(network)
        tensors |= {f"{name}/{k}": v for k, v in own.items()}
    inside = tuple(f"{name}." for name in assembly.parts)
    rest = {k: v for k, v in assembly.model.state_dict().items() if not k.startswith(inside)}
    tensors |= {f"/{k}": v for k, v in rest.items()}
    return _write(path, tensors, ASSEMBLY_FORMAT, {"parts": parts, "notes": assembly.notes})


def _write(path: str | Path, tensors: dict[str, Tensor], kind: str, description: Any) -> int:
    text = json.dumps(description, separators=(",", ":"))
    plain = {k: v.detach().contiguous().cpu().clone() for k, v in tensors.items()}
    whole = Path(path)
    part = whole.with_name(whole.name + ".part")
    save_file(plain, part, {"format": kind, "graph": text, "sha256": _digest(text, plain)})
    part.replace(whole)
    return whole.stat().st_size


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def describe(network: Network) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The graph as JSON-able values, and the tensors it needs, each once."""
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    kinds: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    persistent = set(network.state_dict())
    for name, tensor in network.tensors().items():
        kinds[name] = ("parameter" if tensor.requires_grad else "frozen") if isinstance(tensor, nn.Parameter) else (
            "buffer" if name in persistent else "temporary")
        if id(tensor) in first:
            ties[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor
    signature = network.signature
    description = {
        "torch": torch.__version__,
        "in_spec": trees.to_json(signature.in_spec),
        "out_spec": trees.to_json(signature.out_spec),
        "inputs": [{"name": i.name, "shape": list(i.shape), "dtype": _dtype(i.dtype), "batched": i.batched}
                   for i in signature.inputs],
        "constants": [[i, _argument(v)] for i, v in signature.constants.items()],
        "nodes": [_node(n) for n in network.graph.nodes],
        "tensors": kinds, "ties": ties, "patterns": network.patterns, "notes": network.notes,
    }
    return description, tensors


def _node(node: Node) -> dict[str, Any]:
    found: dict[str, Any] = {"name": node.name, "op": OPS[node.op]}
    if node.op == "get_attr":
        found["target"] = node.target
    elif node.op == "output":
        found["args"] = [_argument(a) for a in node.args[0]]  # type: ignore[union-attr]
    elif node.op == "call_function":
        found["target"] = target_name(node.target)
        found["args"] = [_argument(a) for a in node.args]
        if node.kwargs:
            found["kwargs"] = {k: _argument(v) for k, v in node.kwargs.items()}
        found |= {k: node.meta[k] for k in NODE_META if node.meta.get(k)}
    return found


def target_name(target: Any) -> str:
    """The name of an operator as files and tables have it: "aten.conv2d.default", "operator.getitem"."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if target in FUNCTION_NAMES:
        return FUNCTION_NAMES[target]
    raise FileError(f"the graph calls {target}, which a file cannot name; known: operators of {ALLOWED_NAMESPACES} and "
                    f"{', '.join(FUNCTIONS)}")


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
            return {tag: str(value).removeprefix("torch.")}
    raise FileError(f"an argument of type {type(value).__name__} ({value!r}) cannot be written")


TAGS: dict[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory": torch.memory_format, "device": torch.device}


# ---- reading

def load(path: str | Path, into: nn.Module | None = None, types: Mapping[str, type] | None = None) -> Network | Assembly:
    """Reads what ``save`` wrote.

    into: for a model saved in parts, a fresh instance of its class; its parts are replaced and its tensors set.
    types: classes (by qualified name) that named outputs are rebuilt as; without, they come back as dicts.

    Raises FileError for anything that is not such a file: truncated, damaged, of another kind, or hostile.
    """
    kind, description, tensors = _read(Path(path))
    if kind == FORMAT:
        if into is not None:
            raise FileError(f"{path} holds a whole network, no class is needed: write fw.load({str(path)!r})")
        return rebuild(description, tensors, types)
    if into is None:
        raise FileError(f"{path} holds a model in parts ({', '.join(description.get('parts', {}))}): write "
                        f"fw.load({str(path)!r}, into=YourModel())")
    return _rebuild_assembly(description, tensors, into, types)


def _read(path: Path) -> tuple[str, Any, dict[str, Tensor]]:
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    with path.open("rb") as raw:
        head = raw.read(8)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        raise FileError(f"{path} holds a pickle (a torch.save file?), which can run code when read; it was not opened. "
                        "Save a network with network.save(path)")
    size = path.stat().st_size
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > HEADER_LIMIT or length + 8 > size:
        raise FileError(f"{path} is no featherweight file or is truncated: its header claims {length} of {size} bytes")
    try:
        with safetensors.safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise FileError(f"{path} is damaged or truncated: {error}") from error
    kind = meta.get("format")
    if kind not in (FORMAT, ASSEMBLY_FORMAT):
        raise FileError(f"{path} is of format {str(kind)[:80]!r}; expected {FORMAT!r} (written by network.save)")
    text = meta.get("graph", "")
    if _digest(text, tensors) != meta.get("sha256"):
        raise FileError(f"{path} is damaged: its bytes do not match its checksum")
    try:
        return kind, json.loads(text), tensors
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: its graph is no JSON: {error}") from error


def rebuild(description: Any, tensors: Mapping[str, Tensor], types: Mapping[str, type] | None = None) -> Network:
    """The network that ``describe`` described. Every wrong field is a FileError."""
    try:
        return _rebuild(description, tensors, types)
    except FileError:
        raise
    except Exception as error:
        raise FileError(f"the graph is malformed: {type(error).__name__}: {error}") from error


def _rebuild(description: Any, tensors: Mapping[str, Tensor], types: Mapping[str, type] | None) -> Network:
    graph, nodes = Graph(), {}
    for item in description["nodes"]:
        name, op = item["name"], item["op"]
        if not isinstance(name, str) or not name.isidentifier() or name in nodes:
            raise FileError(f"node name {str(name)[:80]!r} is no fresh identifier")
        if op == "input":
            node = graph.create_node("placeholder", name, name=name)
        elif op == "tensor":
            node = graph.create_node("get_attr", _tensor_name(item["target"]), name=name)
        elif op == "call":
            args = tuple(_value(a, nodes) for a in item.get("args", []))
            kwargs = {str(k): _value(v, nodes) for k, v in item.get("kwargs", {}).items()}
            node = graph.create_node("call_function", _target(item["target"]), args, kwargs, name=name)
            node.meta = {k: item[k] for k in NODE_META if k in item}
        elif op == "output":
            node = graph.create_node("output", "output", (tuple(_value(a, nodes) for a in item["args"]),), name=name)
        else:
            raise FileError(f"node {name!r} is of kind {str(op)[:80]!r}; expected one of {', '.join(OPS.values())}")
        if node.name != name:
            raise FileError(f"node name {name!r} is reserved")
        nodes[name] = node
    if [n.op for n in graph.nodes].count("output") != 1 or next(reversed(graph.nodes)).op != "output":
        raise FileError("the graph has no single output at its end")
    inputs = tuple(Input(str(i["name"]), tuple(None if s is None else int(s) for s in i["shape"]),
                         _tagged("dtype", i["dtype"]), bool(i["batched"])) for i in description["inputs"])
    if len(inputs) != sum(n.op == "placeholder" for n in graph.nodes):
        raise FileError("the graph has another number of inputs than its signature")
    constants = {int(i): _value(v, {}) for i, v in description["constants"]}
    network = Network(graph, Signature(trees.from_json(description["in_spec"]),
                                       trees.from_json(description["out_spec"], types), inputs, constants))
    kinds, ties = description["tensors"], description["ties"]
    if set(kinds) != set(tensors) | set(ties) or set(ties) & set(tensors):
        raise FileError("the tensors in the file are not those its graph lists")
    placed: dict[str, Tensor] = {}
    for name, kind in kinds.items():
        tensor = placed.get(ties[name]) if name in ties else tensors[name]
        if tensor is None:
            raise FileError(f"tensor {name!r} is tied to {str(ties[name])[:80]!r}, which does not come before it")
        if kind in ("parameter", "frozen") and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=kind == "parameter")
        placed[name] = tensor
        _tensor_name(name)
        network.add_tensor(name, tensor, buffer=kind in ("buffer", "temporary") or not tensor.is_floating_point(),
                           persistent=kind != "temporary")
        if name not in ties and not isinstance(tensor, nn.Parameter):
            placed[name] = network.tensor(name)
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in kinds:
            raise FileError(f"node {node.name!r} reads the tensor {node.target!r}, which is not in the file")
        if node.meta.get("counter") is not None and node.meta["counter"] not in kinds:
            raise FileError(f"node {node.name!r} counts in {node.meta['counter']!r}, which is not in the file")
    network.patterns = {str(k): str(v) for k, v in description["patterns"].items()}
    network.notes = [str(n) for n in description["notes"]]
    return network


def _tensor_name(name: Any) -> str:
    if not isinstance(name, str) or not all(name.split(".")):
        raise FileError(f"{str(name)[:80]!r} is no tensor name")
    return name


def _target(name: Any) -> Any:
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    namespace, _, rest = str(name).partition(".")
    packet, _, overload = rest.partition(".")
    if namespace not in ALLOWED_NAMESPACES or packet in REFUSED or "." in overload or packet.startswith("__"):
        raise FileError(f"the graph calls {str(name)[:80]!r}; a file may call operators of "
                        f"{', '.join(ALLOWED_NAMESPACES)} and {', '.join(FUNCTIONS)} only")
    library = getattr(torch.ops, namespace)
    operator_packet = getattr(library, packet, None)
    if not isinstance(operator_packet, torch._ops.OpOverloadPacket) or overload not in operator_packet.overloads():
        raise FileError(f"this torch ({torch.__version__}) has no operator {str(name)[:80]!r}")
    return getattr(operator_packet, overload)


def _tagged(tag: str, text: Any) -> Any:
    if tag == "device":
        return torch.device(str(text))
    value = getattr(torch, str(text), None)
    if not isinstance(value, TAGS[tag]):
        raise FileError(f"{str(text)[:80]!r} is no {tag}")
    return value


def _value(value: Any, nodes: Mapping[str, Node]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_value(v, nodes) for v in value]
    if isinstance(value, dict) and len(value) == 1:
        tag, inner = next(iter(value.items()))
        if tag == "node":
            if inner not in nodes:
                raise FileError(f"an argument names the node {str(inner)[:80]!r}, which does not come before it")
            return nodes[inner]
        if tag == "float" and inner in ("inf", "-inf", "nan"):
            return float(inner)
        if tag == "slice":
            return slice(*(_value(v, nodes) for v in inner))
        if tag in TAGS:
            return _tagged(tag, inner)
    raise FileError(f"an argument is described by {str(value)[:80]!r}, which is no known form; "
                    f"{did_you_mean(next(iter(value), '') if isinstance(value, dict) else '', ['node', 'float', 'slice', *TAGS])}")


def _rebuild_assembly(description: Any, tensors: Mapping[str, Tensor], into: nn.Module,
                      types: Mapping[str, type] | None) -> Assembly:
    parts = {}
    for path, graph in description["parts"].items():
        own = {k.removeprefix(f"{path}/"): v for k, v in tensors.items() if k.startswith(f"{path}/")}
        parts[str(path)] = rebuild(graph, own, types)
        try:
            put(into, path, parts[path])
        except (KeyError, AttributeError) as error:
            raise FileError(f"the file holds a part at {path!r}, but {type(into).__name__} has no module there; "
                            "pass a fresh instance of the class that was captured") from error
    rest = {k.removeprefix("/"): v for k, v in tensors.items() if k.startswith("/")}
    missing, unexpected = into.load_state_dict(rest, strict=False)
    inside = tuple(f"{name}." for name in parts)
    missing = [m for m in missing if not m.startswith(inside)]
    if missing or unexpected:
        raise FileError(f"{type(into).__name__} does not fit the file: missing {missing[:3]}, unexpected {unexpected[:3]}")
    return Assembly(into.eval(), parts, [str(n) for n in description["notes"]])
