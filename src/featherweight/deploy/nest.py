"""How a loaded file is called like the network it came from: the inputs by name, the outputs back in their nest."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featherweight.errors import InputError
from featherweight.network import Signature, trees

#: what to write where a runtime does not know a number type
FLOAT32 = "capture the model in float32: fw.capture(model.float(), inputs.float())"


def feed(like: Signature, read: Collection[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name -> array of the inputs that the file reads. Raises InputError for a call in another nest, of another number
    type, or of a size that the graph is not right for."""
    leaves, spec = trees.flatten((args, kwargs))
    if spec != like.in_spec:
        names = ", ".join(i.name for i in like.inputs)
        raise InputError(f"called with {len(args)} positional and {sorted(kwargs)} keyword inputs; the network "
                         f"takes ({names}): call it as the example inputs were")
    tensors = [leaf for i, leaf in enumerate(leaves) if i not in like.constants]
    found = {}
    for item, tensor in zip(like.inputs, tensors, strict=True):
        if not isinstance(tensor, Tensor) or tensor.dtype != item.dtype:
            given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(f"input {item.name!r} is a {given}; expected a tensor of {item.dtype}")
        if tensor.dtype is torch.bfloat16:
            raise InputError(f"input {item.name!r} is a bfloat16, of which the runtimes take no arrays; {FLOAT32}")
        if item.name in read:
            found[item.name] = tensor.detach().cpu().contiguous().numpy()
    if all(tensor.dim() == len(item.shape) for item, tensor in zip(like.inputs, tensors, strict=True)):
        like.check_sizes(tensors)
    return found


def nested(like: Signature, outputs: Sequence[Mapping[str, Any]], values: Mapping[str, np.ndarray]) -> Any:
    """The network's nest of outputs from the file's: ``outputs`` says of every leaf what it is."""
    return trees.unflatten([_leaf(o, values) for o in outputs], like.out_spec)


def given(arrays: Mapping[str, Any]) -> str:
    """The inputs of a call with their shapes, for a message."""
    return ", ".join(f"{name} {list(value.shape)}" for name, value in arrays.items())


def _leaf(described: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    if "tensor" in described:
        return torch.from_numpy(values[described["tensor"]])
    if "number" in described:
        return values[described["number"]].item()
    return described["constant"]
