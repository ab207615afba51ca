"""What torch keeps of an export, let go: without this every capture and every ONNX export stays in memory for good."""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from contextlib import contextmanager

from torch.export import ExportedProgram
from torch.fx import graph_module


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
