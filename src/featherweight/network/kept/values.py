"""What flows through a graph, as tensors without data.

Operators are asked for shapes and number types only, which takes about as long for a small call as for a large one. A
deep network asks the same again and again: each operator is asked once for arguments that are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node

from featherweight.network.kept.most import most
from featherweight.network.operators import has_schema
from featherweight.network.program import resolve


def values(graph: Graph, tensor: Callable[[str], Tensor], inputs: Sequence[Tensor], alike: Alike) -> dict[str, Any]:
    """Node name -> what it gives for these inputs, as tensors without data; numbers are plain numbers. Where a size
    depends on the data (``h[mask]``), it is the largest that there can be.

    tensor: looks stored tensors up by name. Values that are alike may be one tensor, of these and of other inputs that
    were asked for with the same ``alike``.
    """
    waiting = iter(inputs)
    found: dict[Node, Any] = {}
    value = found.__getitem__
    with alike.mode, torch.no_grad():
        for node in graph.nodes:
            if node.op == "placeholder":
                found[node] = alike.empty(next(waiting))
            elif node.op == "get_attr":
                found[node] = alike.empty(tensor(str(node.target)))
            elif node.op == "call_function":
                args = [resolve(a, value) for a in node.args]
                found[node] = alike.call(node.target, args, {k: resolve(v, value) for k, v in node.kwargs.items()})
    return {node.name: given for node, given in found.items()}


def _of_metadata(node: Node) -> bool:
    """Whether a call's result follows from its arguments' shapes, and the call changes none of these shapes."""
    if node.op != "call_function" or not has_schema(node.target):
        return True
    return torch.Tag.inplace_view not in node.target.tags and "as_strided" not in str(node.target)  # type: ignore[union-attr]


class Alike:
    """One tensor without data for all that are alike, and one result for all calls with arguments that are alike."""

    def __init__(self, graph: Graph) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.merge = all(_of_metadata(n) for n in graph.nodes)  # or else everything is kept apart
        self.tensors: dict[Any, Tensor] = {}
        self.results: dict[Any, Any] = {}
        self.known: set[int] = set()  # ids of ``tensors``

    def empty(self, tensor: Tensor) -> Tensor:
        """The form without data of a tensor; tied ones stay one."""
        key = self._look(tensor) or id(tensor)
        if key not in self.tensors:
            self._keep(key, tensor if isinstance(tensor, FakeTensor) else self.mode.from_tensor(tensor))
        return self.tensors[key]

    def call(self, target: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """What an operator gives."""
        if not self.merge:
            return most(target, args, kwargs)
        try:
            key = (target, self._key(args), tuple((k, self._key(v)) for k, v in kwargs.items()))
            known = key in self.results
        except TypeError:  # an argument that cannot be looked up
            return most(target, args, kwargs)
        if not known:
            self.results[key] = self._merged(most(target, args, kwargs))
        return self.results[key]

    def _look(self, tensor: Tensor) -> Any:
        """What tells a tensor without data from others; None where it is to stay by itself."""
        plain = type(tensor) in (Tensor, nn.Parameter, FakeTensor) and tensor.layout is torch.strided
        if not self.merge or not plain or tensor.is_conj() or tensor.is_neg():
            return None
        return (isinstance(tensor, nn.Parameter), tensor.requires_grad, tensor.dtype, tensor.device, tensor.shape,
                tensor.stride(), tensor.storage_offset())

    def _keep(self, key: Any, tensor: Tensor) -> None:
        self.tensors[key] = tensor
        self.known.add(id(tensor))

    def _merged(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)([self._merged(v) for v in value])
        if not isinstance(value, FakeTensor) or value.constant is not None:
            return value
        key = self._look(value)
        if key is not None and key not in self.tensors:
            self._keep(key, value)
        return value if key is None else self.tensors[key]

    def _key(self, argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return tuple(map(self._key, argument))
        if isinstance(argument, Tensor):
            if id(argument) not in self.known:
                raise TypeError("a tensor by itself")
            return Tensor, id(argument)
        return type(argument), argument
