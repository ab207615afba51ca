"""Calls ``torch.export`` on a model: which sizes stay free, and what a failure means in the user's words."""

from __future__ import annotations

import inspect
import io
import logging
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.modules import transformer

from featherweight.errors import CaptureError
from featherweight.network import trees
from featherweight.network.operators import is_free

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Attempt:
    """One way to export: the example inputs, and which of their sizes are free (leaf by leaf: axis -> Dim)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    free: tuple[dict[int, Any] | None, ...]

    @property
    def dynamic(self) -> bool:
        return any(self.free)


def attempts(args: tuple[Any, ...], kwargs: dict[str, Any], spatial: bool) -> list[Attempt]:
    """What to try, best first: height, width and batch free (``spatial``), the batch free, nothing free.

    The batch is the leading size that most inputs have. An example batch of one is doubled, since export takes sizes of
    one as constants.
    """
    leaves, spec = trees.flatten((args, kwargs))
    sizes = Counter(leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim())
    nothing: tuple[dict[int, Any] | None, ...] = tuple({} if isinstance(leaf, Tensor) else None for leaf in leaves)
    if not sizes:
        return [Attempt(args, kwargs, nothing)]
    batch = sizes.most_common(1)[0][0]
    batched = [isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch for leaf in leaves]
    if batch == 1:
        leaves = [torch.cat([leaf, leaf]) if own else leaf for own, leaf in zip(batched, leaves, strict=True)]
    free = [{0: Dim.AUTO} if own else none for own, none in zip(batched, nothing, strict=True)]
    more_args, more_kwargs = trees.unflatten(leaves, spec)
    found = [Attempt(more_args, more_kwargs, tuple(free)), Attempt(args, kwargs, nothing)]
    if spatial and any(own and leaf.dim() == 4 for own, leaf in zip(batched, leaves, strict=True)):
        wide = tuple({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO} if own and leaf.dim() == 4 else f
                     for own, leaf, f in zip(batched, leaves, free, strict=True))
        found.insert(0, Attempt(more_args, more_kwargs, wide))
    return found


def export(model: nn.Module, attempt: Attempt) -> ExportedProgram:
    """The exported program, in training form (no decomposition). Raises CaptureError with module path and line."""
    spec = trees.flatten((attempt.args, attempt.kwargs))[1]
    watch = _Watch(model)
    try:
        args, kwargs = trees.unflatten(attempt.free, spec)
        shapes = inspect.signature(model.forward).bind(*args, **kwargs).arguments if attempt.dynamic else None
        with watch, torch.enable_grad(), _plain():
            return torch.export.export(model, attempt.args, attempt.kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise CaptureError(watch.explain(error)) from error


def hopeless(error: BaseException) -> bool:
    """Whether a failed export would fail with fixed sizes too: it needed to know a value, not a size."""
    return "DataDependent" in type(error.__cause__).__name__


def limits(program: ExportedProgram, value: Any) -> tuple[tuple[int, int, int | None], ...]:
    """(axis, least, most) of the free axes of an input beyond which the model does something else; most is None where
    there is no end. A size of one counts as any other unless the least is above two."""
    found = []
    for axis, size in enumerate(value.shape):
        bound = program.range_constraints.get(size.node.expr) if is_free(size) else None
        if bound is None:
            continue
        most = int(bound.upper) if bound.upper.is_Integer and int(bound.upper) < 2**31 else None
        least = int(bound.lower) if bound.lower.is_Integer and int(bound.lower) > 2 else 1
        if most is not None or least > 1:
            found.append((axis, least, most))
    return tuple(found)


@contextmanager
def slow_attention() -> Iterator[None]:
    """Attention as a graph has it, for a while: torch's fast path is one opaque operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _plain() -> Iterator[None]:
    """Keeps torch from printing whole graphs when an export fails (the error says what is needed), from taking an
    attention or a whole encoder layer as one opaque operator, and from looking whether a mask happens to be causal
    (which only chooses a faster kernel)."""
    names = ("torch.fx.experimental.symbolic_shapes", "torch._export.non_strict_utils", "torch.export._trace",
             "torch.fx.experimental.proxy_tensor")
    before = [(log, log.level) for log in map(logging.getLogger, names)]
    for log, _ in before:
        log.setLevel(logging.CRITICAL)
    said = io.StringIO()
    looks = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
    try:
        with redirect_stderr(said), slow_attention(), warnings.catch_warnings():
            # the capture compares outputs, which is what the warning is about
            warnings.filterwarnings("ignore", "The tensor attributes? .* assigned during export", UserWarning)
            yield
        sys.stderr.write(said.getvalue())
    finally:
        transformer._detect_is_causal_mask = looks
        for log, level in before:
            log.setLevel(level)


class _Watch:
    """Follows which module is running, so that a failed export can be told by path and line."""

    def __init__(self, model: nn.Module) -> None:
        self.paths = {id(m): name for name, m in model.named_modules()}
        self.stack: list[str] = []
        self.handles: list[Any] = []

    def __enter__(self) -> _Watch:
        from torch.nn.modules import module as hooks

        self.handles.append(hooks.register_module_forward_pre_hook(self._enter))
        self.handles.append(hooks.register_module_forward_hook(self._leave))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self.stack.append(self.paths.get(id(module), self.stack[-1] if self.stack else ""))

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.stack:
            self.stack.pop()

    def explain(self, error: BaseException) -> str:
        where = self.stack[-1] if self.stack else ""
        frames = [f for f in traceback.extract_tb(error.__traceback__)
                  if "/torch/" not in f.filename and "featherweight/network" not in f.filename]
        file = frames[-1].filename.rpartition("site-packages/")[2] if frames else ""
        line = f"{file}:{frames[-1].lineno} ({frames[-1].line})" if frames else "unknown line"
        reason = next((t for t in str(error).splitlines() if t.strip()), type(error).__name__)
        return f"cannot be captured whole: in module {where or '(the model itself)'!r}, {line}: " \
               f"{type(error).__name__}: {reason[:300]}"
