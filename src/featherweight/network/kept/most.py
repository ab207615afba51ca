"""Calls whose results are as long as the data say (``h[mask]``, ``nonzero``): for shapes, as long as they can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.network.operators import has_schema
from featherweight.network.recurrent import GATES, results

aten = torch.ops.aten


def _nonzero(given: Tensor) -> Tensor:
    return given.new_empty((given.numel(), given.dim()), dtype=torch.int64)


def _all_true(masks: Tensor) -> list[Tensor]:
    """The positions that a mask of ones takes, axis by axis."""
    return list(_nonzero(masks).unbind(1))


def _index(given: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """Masks as positions: all of them."""
    whole: list[Tensor | None] = []
    for index in indices:
        masks = index is not None and index.dtype in (torch.bool, torch.uint8)
        whole += _all_true(index) if masks else [index]  # type: ignore[arg-type]
    found: Tensor = aten.index.Tensor(given, whole)
    return found


def _masked_select(given: Tensor, mask: Tensor) -> Tensor:
    return given.new_empty((given * mask).numel())


def _repeated(repeats: Tensor, **_: Any) -> Tensor:
    return repeats.new_empty(repeats.numel())


def _unique(given: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    count = torch.empty(given.numel(), dtype=torch.int64, device=given.device)
    return given.new_empty(given.numel()), torch.empty(given.shape, dtype=torch.int64, device=given.device), count


#: operator -> what it gives where every element counts
MOST: dict[Any, Callable[..., Any]] = {
    aten.nonzero.default: _nonzero, aten.index.Tensor: _index, aten.masked_select.default: _masked_select,
    aten.argwhere.default: _nonzero, aten.repeat_interleave.Tensor: _repeated, aten._unique2.default: _unique,
    aten.nonzero_numpy.default: _all_true,
}


def depends_on_data(node: Node, values: Callable[[Node], Any]) -> bool:
    """Whether how long a call's result is depends on the numbers in a tensor. ``values`` gives what flows, as tensors
    without data."""
    if node.target not in MOST:
        return False
    if node.target is not aten.index.Tensor:
        return True
    indices: Any = node.args[1]
    return any(isinstance(i, Node) and values(i).dtype in (torch.bool, torch.uint8) for i in indices)


def most(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What ``target`` gives, on tensors without data; where that depends on the data, as much as it can be."""
    if target in GATES:
        return results(*args, **kwargs)
    if has_schema(target) and target in MOST:
        masks = target is not aten.index.Tensor or any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if masks:
            return MOST[target](*args, **kwargs)
    return target(*args, **kwargs)


__all__ = ["MOST", "depends_on_data", "most"]
