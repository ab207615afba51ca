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
from featherweight.network.capture.run import kept, slow_attention
from featherweight.network.capture.sizes import asked
from featherweight.network.capture.sizes.asked import Dynamic, Names
from featherweight.network.operators import formula, is_free
from featherweight.network.traced import by_shape

INVOLVED = 200  #: operations in a size's formula, above which torch.export takes minutes
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Attempt:
    """One way to export: the example inputs, which of their sizes are free (leaf by leaf: axis -> Dim), and what those
    beside the batch are called.

    asked: the user named these axes, so that they must stay free.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    free: tuple[dict[int, Any] | None, ...]
    names: Names
    asked: bool = False

    @property
    def dynamic(self) -> bool:
        return any(self.free)

    @property
    def wide(self) -> bool:
        """Whether more than the batch is free."""
        return any(self.names)


def attempts(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
             dynamic: Dynamic | None) -> Iterator[Attempt]:
    """What to try, best first: the batch and other axes free, the batch alone, nothing.

    The batch is the leading size that most inputs have. An example batch of one is doubled, since export takes sizes of
    one as constants. Other axes are those that ``dynamic`` names, and no less then; None: those along which the model
    runs on other sizes.
    """
    leaves, spec = trees.flatten((args, kwargs))
    sizes = Counter(leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim())
    nothing: tuple[dict[int, Any] | None, ...] = tuple({} if isinstance(leaf, Tensor) else None for leaf in leaves)
    unnamed: Names = tuple({} for _ in leaves)
    batch = sizes.most_common(1)[0][0] if sizes else 0
    batched = [isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch for leaf in leaves]
    if batch == 1:
        leaves = [torch.cat([leaf, leaf]) if own else leaf for own, leaf in zip(batched, leaves, strict=True)]
    more_args, more_kwargs = trees.unflatten(leaves, spec)
    free = tuple({0: Dim.AUTO} if own else none for own, none in zip(batched, nothing, strict=True))
    names = (asked.found(model, more_args, more_kwargs, batched) if dynamic is None
             else asked.named(model, more_args, more_kwargs, dynamic))
    names = tuple({a: n for a, n in own.items() if a or not batched[i]} for i, own in enumerate(names))
    if any(names):
        wide = tuple({**(f or {}), **dict.fromkeys(own, Dim.AUTO)} if own else f
                     for f, own in zip(free, names, strict=True))
        yield Attempt(more_args, more_kwargs, wide, names, bool(dynamic))
        if dynamic:
            return
    if sizes:
        yield Attempt(more_args, more_kwargs, free, unnamed)
    yield Attempt(args, kwargs, nothing, unnamed)


def export(model: nn.Module, attempt: Attempt) -> ExportedProgram:
    """The exported program, in training form (no decomposition). Raises CaptureError with module path and line."""
    spec = trees.flatten((attempt.args, attempt.kwargs))[1]
    watch = _Watch(model)
    try:
        args, kwargs = trees.unflatten(attempt.free, spec)
        shapes = inspect.signature(model.forward).bind(*args, **kwargs).arguments if attempt.dynamic else None
        with watch, torch.enable_grad(), kept(model), by_shape(), _plain():
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
        bound = program.range_constraints.get(formula(size)) if is_free(size) else None
        if bound is None:
            continue
        most = int(bound.upper) if bound.upper.is_Integer and int(bound.upper) < 2**31 else None
        least = int(bound.lower) if bound.lower.is_Integer and int(bound.lower) > 2 else 1
        if most is not None or least > 1:
            found.append((axis, least, most))
    return tuple(found)


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
        for tensor in inputs if isinstance(inputs, tuple) else ():
            for size in tensor.shape if isinstance(tensor, Tensor) else ():
                if is_free(size) and formula(size).count_ops() > INVOLVED:
                    raise CaptureError("sizes follow from the inputs' in ways that are too involved")
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
