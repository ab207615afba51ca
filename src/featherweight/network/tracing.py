"""Shapes while torch traces, of calls whose own kernels take every time step in turn or fix a free size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey

from featherweight.network.recurrent import GATES, results

aten = torch.ops.aten
KEYS = (DispatchKey.CompositeImplicitAutograd, DispatchKey.Autograd)


def _pooled(given: Tensor, kernel_size: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,),
            dilation: Sequence[int] = (1,), ceil_mode: bool = False) -> Tensor:
    """Max pooling of [n, c, t] (or [c, t]) as that of images one pixel high; torch's own kernel fixes t."""
    steps = [1, *stride] if stride else []
    return torch.max_pool2d(given.unsqueeze(-2), [1, *kernel_size], steps, [0, *padding], [1, *dilation],
                            ceil_mode).squeeze(-2)


#: operator -> what torch runs in its place while it traces
TRACED: dict[Any, Callable[..., Any]] = {**dict.fromkeys(GATES, results), aten.max_pool1d.default: _pooled}


@contextmanager
def by_shape() -> Iterator[None]:
    """While torch traces, TRACED replaces its own kernels, and what it writes calls with where a size is free."""
    from torch._decomp import decomposition_table

    before = {target: dict(target.py_kernels) for target in TRACED}
    written = {target: decomposition_table[target] for target in TRACED if target in decomposition_table}
    try:
        decomposition_table.update({target: TRACED[target] for target in written})
        for target, kernel in TRACED.items():
            target.py_kernels.update(dict.fromkeys([*target.py_kernels, *KEYS], kernel))
            target._dispatch_cache.clear()
        yield
    finally:
        decomposition_table.update(written)
        for target, kernels in before.items():
            target.py_kernels.clear()
            target.py_kernels.update(kernels)
            target._dispatch_cache.clear()


__all__ = ["by_shape"]
