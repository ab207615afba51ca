"""Nests of tensors and arrays, as batches hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def described(value: Any) -> str:
    """What a value is, shortly: "float32[16, 3]" for a tensor, else its type, with the value where that is plain."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if value is None:
        return "None"
    plain = isinstance(value, (bool, int, float, str))
    return f"{value!r} ({type(value).__name__})" if plain else f"of type {type(value).__name__}"


def tensors(value: Any) -> Any:
    """The same nest with arrays of numpy as tensors."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.astype(np.float32) if value.dtype == np.float64 else value)
    if isinstance(value, Mapping):
        return {k: tensors(v) for k, v in value.items()} if any(map(_holds_arrays, value.values())) else value
    if isinstance(value, (tuple, list)) and any(map(_holds_arrays, value)):
        return type(value)(map(tensors, value))
    return value


def _holds_arrays(value: Any) -> bool:
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return isinstance(value, np.ndarray) or any(map(_holds_arrays, items))


def has_nan(inputs: Any) -> bool:
    """Whether a tensor in the nest holds NaN."""
    if isinstance(inputs, Tensor):
        return inputs.is_floating_point() and bool(inputs.isnan().any())
    items = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, (tuple, list)) else ()
    return any(map(has_nan, items))


__all__ = ["described", "has_nan", "tensors"]
