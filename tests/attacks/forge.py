"""Files as an attacker would write them: any graph, any tensors, under a right checksum."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from featherweight.network.file.file import FORMAT, _digest

#: tensors of many shapes and number types, with places that lie outside of anything
TENSORS: dict[str, Tensor] = {
    "scalar": torch.tensor(2.0), "none": torch.zeros(0), "empty": torch.zeros(2, 0, 3), "one": torch.ones(1),
    "row": torch.linspace(-1, 1, 3), "matrix": torch.linspace(-2, 2, 6).reshape(2, 3), "square": torch.eye(3),
    "wide": torch.ones(3, 3000), "cube": torch.linspace(-1, 1, 24).reshape(2, 3, 4),
    "image": torch.linspace(-1, 1, 384).reshape(2, 3, 8, 8), "kernel": torch.linspace(-1, 1, 81).reshape(3, 3, 3, 3),
    "volume": torch.linspace(-1, 1, 128).reshape(2, 1, 4, 4, 4), "nan": torch.tensor([float("nan"), float("inf"), 0.0]),
    "half": torch.ones(2, 3, dtype=torch.float16), "brain": torch.ones(3, dtype=torch.bfloat16),
    "double": torch.ones(3, 3, dtype=torch.float64), "int8": torch.tensor([-128, 0, 127], dtype=torch.int8),
    "uint8": torch.tensor([[0, 1, 255], [2, 3, 4]], dtype=torch.uint8), "places": torch.tensor([0, 1, 2]),
    "outside": torch.tensor([5, -7, 2**40]), "pairs": torch.tensor([[0, 1, 2], [2, -1, 9]]),
    "int32": torch.tensor([0, 3, 2**30], dtype=torch.int32), "flags": torch.tensor([True, False, True]),
    "mask": torch.tensor([[True, False, True], [False, False, True]]), "int_scalar": torch.tensor(3),
    "eight": torch.ones(3, dtype=torch.float8_e4m3fn),
}


def graph_of(calls: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor], shape: Sequence[int | None] = (None, 3),
             **more: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A description whose result is that of the last call; ``x`` is the input, ``t_NAME`` reads tensor NAME."""
    nodes = [{"name": "x", "op": "input"}, *({"name": f"t_{k}", "op": "tensor", "target": k} for k in tensors), *calls,
             {"name": "output", "op": "output", "args": [{"node": calls[-1]["name"]}]}]
    spec = {"kind": "tuple", "items": [{"kind": "tuple", "items": [0]}, {"kind": "dict", "items": []}]}
    return {"in_spec": spec, "out_spec": 0, "constants": [], "nodes": nodes, "ties": {}, "order": [], "patterns": {},
            "inputs": [{"name": "x", "shape": list(shape), "dtype": "float32", "batched": True}],
            "tensors": dict.fromkeys(tensors, "buffer"), "notes": [], **more}, dict(tensors)


def one_call(operator: str, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None,
             tensors: Mapping[str, Tensor] | None = None, shape: Sequence[int | None] = (None, 3),
             **more: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A description of one call ``c``."""
    call = {"name": "c", "op": "call", "target": operator, "args": list(args), "kwargs": dict(kwargs or {})}
    return graph_of([call], tensors or {}, shape, **more)


def written(path: Path, description: Any, tensors: Mapping[str, Tensor], kind: str = FORMAT) -> Path:
    """Writes a file of this description, its checksum made anew."""
    plain = {k: v.detach().contiguous().clone() for k, v in tensors.items()}
    text = json.dumps(description)
    save_file(plain, path, {"format": kind, "graph": text, "sha256": _digest(text, plain)})
    return path
