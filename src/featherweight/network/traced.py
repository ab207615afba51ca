"""While torch traces: what it would take too long over, or keep for good, without this."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.export import ExportedProgram
from torch.fx import graph_module

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


@contextmanager
def forgotten() -> Iterator[list[ExportedProgram]]:
    """Lets go, at the end, of what torch 2.13 keeps of the exports made meanwhile: the source text of every graph on
    the way, and what the programs that were put into the list hold in a circle (about 80 kB each)."""
    programs: list[ExportedProgram] = []
    sources = graph_module._loader.eval_cache
    before = set(sources)
    try:
        yield programs
    finally:
        for name in sources.keys() - before:
            del sources[name]
            linecache.cache.pop(name, None)
        for program in programs:
            _open_circle(program)
        from torch.fx.experimental.symbolic_shapes import ShapeEnv  # brings sympy

        for method in vars(ShapeEnv).values():  # each holds the last ShapeEnvs that it was called on
            if callable(getattr(method, "cache_clear", None)):
                method.cache_clear()


def _open_circle(program: ExportedProgram) -> None:
    """A ShapeEnv lists its fake inputs, whose sizes live in C++ and hold the ShapeEnv again, where Python's collector
    cannot see it."""
    for node in program.graph.nodes:
        env = getattr(getattr(node.meta.get("val"), "fake_mode", None), "shape_env", None)
        if env is not None:
            env.tracked_fakes = None


__all__ = ["by_shape", "forgotten"]
