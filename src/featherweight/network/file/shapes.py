"""What flows through a file's graph, by shapes alone: every call is tried without data before any is computed.

Tensors on torch's ``meta`` device have shapes and number types and no memory; operators on them check their arguments
and give the shapes of their results. Calls with arguments that are alike are tried once. Free sizes are tried in turn
until some fit; a result that depends on the numbers in a tensor is unknown, and so is all that is computed from it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.errors import FileError
from featherweight.network.file.allowed import FUNCTIONS, target_name
from featherweight.network.file.arguments import LARGEST
from featherweight.network.operators import has_schema
from featherweight.network.program import resolve
from featherweight.network.recurrent import checked
from featherweight.network.signature import Input
from featherweight.network.snapshot import Snapshot

META = torch.device("meta")
BYTES = 1 << 40  #: no tensor of a graph is larger
PIECES = 1 << 12  #: no call gives more results
READ = 1 << 17  #: no graph passes on more results of such calls, all together
POWER = 64  #: no number is raised to a higher power
#: (batch, other free sizes) that are tried in turn; None: the sizes of the examples at capture
SIZES: tuple[tuple[int, int | None], ...] = ((2, None), (2, 64), (6, 224), (24, 240), (1, 1), (2, 2048))
UNKNOWN = object()
aten = torch.ops.aten
#: operator -> what is tried in its place, of the same shapes: how results lie in memory is known when they are there
#: (torch 2.11 has attention's otherwise on ``meta``), and whoever cannot take that says so then
TRIED: dict[Any, Any] = {aten.view.default: aten.reshape.default}
#: operator -> how many results it gives, of the size of the axis that is cut and the arguments by name
CUTS: dict[Any, Callable[[int, Mapping[str, Any]], float]] = {
    aten.unbind.int: lambda size, given: size,
    **dict.fromkeys((aten.split.Tensor, aten.unsafe_split.Tensor),
                    lambda size, given: size / max(1, given["split_size"])),
    **dict.fromkeys((aten.chunk.default, aten.unsafe_chunk.default), lambda size, given: min(size, given["chunks"])),
    **dict.fromkeys((aten.tensor_split.sections, aten.hsplit.int, aten.vsplit.int, aten.dsplit.int),
                    lambda size, given: given["sections"]),
}


def check(snapshot: Snapshot) -> None:
    """Raises FileError where no sizes of the inputs make every call of the graph fit what it is given."""
    first: FileError | None = None
    free = any(None in i.shape for i in snapshot.signature.inputs)
    for sizes in SIZES if free else SIZES[:1]:
        try:
            _Trial(snapshot).run(*sizes)
        except FileError as error:
            first = first or error
        else:
            return
    assert first is not None
    raise first


class _Trial:
    """One pass over the graph."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.results: dict[Any, Any] = {}
        self.read = 0  # results in lists, so far

    def run(self, batch: int, other: int | None) -> None:
        waiting = iter(self.snapshot.signature.inputs)
        found: dict[Node, Any] = {}
        with torch.no_grad():
            for node in self.snapshot.graph.nodes:
                if node.op == "placeholder":
                    found[node] = _input(next(waiting), batch, other)
                elif node.op == "get_attr":
                    name = str(node.target)
                    found[node] = _empty(self.snapshot.tensors[self.snapshot.ties.get(name, name)])
                elif node.op == "call_function":
                    found[node] = self._call(node, found)

    def _call(self, node: Node, found: Mapping[Node, Any]) -> Any:
        several = [found[n] for n in node.all_input_nodes if isinstance(found[n], (list, tuple))]
        if node.target is operator.getitem and several:
            return _picked(node, several[0])
        self.read += sum(map(len, several))
        if self.read > READ:
            raise FileError(f"call {node.name!r} reads more results of other calls than a graph may ({READ} in all)")
        args = [_on_meta(resolve(a, found.__getitem__)) for a in node.args]
        kwargs = {k: _on_meta(resolve(v, found.__getitem__)) for k, v in node.kwargs.items()}
        if _has_unknown([*args, *kwargs.values()]):
            return UNKNOWN
        key = (node.target, _key(args), _key(list(kwargs.items())))
        if key not in self.results:
            self.results[key] = _tried(node, args, kwargs)
        return self.results[key]


def _picked(node: Node, several: Any) -> Any:
    """One of several results."""
    place: Any = node.args[1]
    if not -len(several) <= place < len(several):
        raise FileError(f"call {node.name!r} picks result {place} of {len(several)}")
    return several[place]


def _tried(node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """What a call gives; UNKNOWN where that depends on numbers in tensors, or torch cannot tell."""
    name = target_name(node.target)
    try:
        if node.target in CUTS:
            _check_count(node.target, args, kwargs)
        if name in FUNCTIONS:
            _check_numbers(name, args)
        target = TRIED.get(node.target, node.target)
        given = checked(target)(*args, **_placed(target, args, kwargs))
        _check_result(given)
        return given
    except NotImplementedError:
        return UNKNOWN
    except Exception as error:
        if "meta tensor" in str(error):  # its numbers were asked for
            return UNKNOWN
        shapes = ", ".join(_text(a) for a in [*args, *kwargs.values()])
        raise FileError(f"call {node.name!r} of {name} does not fit what it is given ({shapes[:200]}): "
                        f"{type(error).__name__}: {str(error)[:200]}") from error


def _placed(target: Any, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords, with the device where the operator takes one and was given none: new tensors have no memory."""
    declared = target._schema.arguments if has_schema(target) else []
    if any(a.name == "device" for a in declared[len(args):]):
        return {**kwargs, "device": META}
    return kwargs


def _check_numbers(name: str, args: list[Any]) -> None:
    """Raises ValueError for a Python function of anything but numbers, or of a power that takes long to compute."""
    if name == "operator.getitem":
        raise ValueError("it picks from several results, and is given one")
    if not all(isinstance(a, (int, float)) for a in args):
        raise ValueError("it computes with numbers, not with tensors")
    if name == "operator.pow" and abs(args[1]) > POWER:
        raise ValueError(f"a number is raised to {str(args[1])[:20]}, more than {POWER}")


def _check_count(target: Any, args: list[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError for a call that would give too many results."""
    given = {**dict(zip((a.name for a in target._schema.arguments), args, strict=False)), **kwargs}
    shape, axis = given["self"].shape, given.get("dim", 0)
    size = shape[axis] if -len(shape) <= axis < len(shape) else 0
    if CUTS[target](size, given) > PIECES:
        raise ValueError(f"it would give more than {PIECES} results")


def _check_result(given: Any) -> None:
    """Raises ValueError where a result is larger than anything that is computed."""
    for item in given if isinstance(given, (list, tuple)) else [given]:
        if isinstance(item, Tensor) and item.numel() * item.element_size() > BYTES:
            raise ValueError(f"it would give a tensor {list(item.shape)}, more than {BYTES} bytes")
        if isinstance(item, int) and abs(item) >= LARGEST:
            raise ValueError("it gives a number of more than 63 bits")


def _input(item: Input, batch: int, other: int | None) -> Tensor:
    """A tensor without data for an input; free sizes as asked for, within the input's limits."""
    shape = item.sizes(batch, other)
    for axis, least, most in item.limits:
        shape[axis] = max(least, shape[axis] if most is None else min(most, shape[axis]))
    if math.prod(shape) * item.dtype.itemsize > BYTES:
        raise FileError(f"input {item.name[:80]!r} has the shape {str(item.shape)[:80]}, which is more than {BYTES} "
                        "bytes")
    return torch.empty(shape, dtype=item.dtype, device=META)


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)


def _on_meta(argument: Any) -> Any:
    """An argument, its devices replaced: what is tried has no memory on any."""
    if isinstance(argument, list):
        return [_on_meta(a) for a in argument]
    return META if isinstance(argument, torch.device) else argument


def _has_unknown(arguments: list[Any]) -> bool:
    return any(a is UNKNOWN or (isinstance(a, list) and _has_unknown(a)) for a in arguments)


def _key(argument: Any) -> Any:
    """What tells arguments apart: tensors by number type, shape and strides, all else by type and value."""
    if isinstance(argument, (list, tuple)):
        return tuple(map(_key, argument))
    if isinstance(argument, Tensor):
        return Tensor, argument.dtype, tuple(argument.shape), argument.stride()
    return type(argument), repr(argument) if isinstance(argument, float) else argument


def _text(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return f"{str(argument.dtype).removeprefix('torch.')} {list(argument.shape)}"
    if isinstance(argument, list):
        return f"[{', '.join(map(_text, argument[:8]))}{', ...' if len(argument) > 8 else ''}]"
    return str(argument)[:80]


__all__ = ["check"]
