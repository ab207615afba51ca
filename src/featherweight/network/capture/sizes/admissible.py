"""Which sizes an exported graph is right for: torch.export's guards, evaluated for every size that a call may have."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from featherweight.errors import CaptureError
from featherweight.network import trees
from featherweight.network.capture.export import Attempt
from featherweight.network.operators import formula, is_free

Bools = npt.NDArray[np.bool_]
WINDOW = 4096  #: sizes up to which a guard is evaluated, at least; twice the example's where that is more
PERIOD = 1024  #: the longest pattern of sizes that fit
#: sympy's relations and joins by the names of their classes: sympy itself is imported when something is captured
RELATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "Equality": np.equal, "Unequality": np.not_equal, "StrictLessThan": np.less, "LessThan": np.less_equal,
    "StrictGreaterThan": np.greater, "GreaterThan": np.greater_equal,
}
JOINS: dict[str, Any] = {"And": np.logical_and, "Or": np.logical_or}


@dataclass(frozen=True)
class Sizes:
    """Sizes along the axes of one symbol. ``allowed[n]``: whether the graph is right at size n; ``certain[n]``: whether
    torch says so too, which takes any guard that a size is not 1 for a limit.

    places: (leaf of the inputs, axis) that have it. end: no guard ends the sizes within the window.
    """

    symbol: Any
    places: tuple[tuple[int, int], ...]
    example: int
    allowed: Bools
    certain: Bools
    end: bool

    def nearest(self, size: int, step: int) -> int | None:
        """The first allowed size from ``size`` on, upwards (step 1) or downwards (-1); None if there is none."""
        stop = len(self.allowed) if step > 0 else 0
        return next((n for n in range(max(size, 1), stop, step) if n < len(self.allowed) and self.allowed[n]), None)


def free_sizes(program: ExportedProgram, attempt: Attempt) -> list[Sizes]:
    """The free sizes beside the batch. Raises CaptureError where one follows from another in a way that no rule for one
    axis can say."""
    given = _user_values(program)
    leaves = trees.flatten((attempt.args, attempt.kwargs))[0]
    places: dict[Any, list[tuple[int, int]]] = {}
    batches: set[Any] = set()
    for i, value in enumerate(given):
        for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if is_free(size) and axis in attempt.names[i]:
                places.setdefault(formula(size), []).append((i, axis))
            elif is_free(size):
                batches.add(formula(size))
    for expression in places:
        if not expression.is_Symbol or expression in batches:
            raise CaptureError(f"a size of the inputs follows from another one ({expression}): torch.export names no "
                               "rule for it alone")
    if not places:
        return []
    env = _environment(given)
    guards = list(dict.fromkeys(g.expr.xreplace(env.replacements) for g in env.guards))
    found = [_sizes(program, symbol, tuple(where), leaves[where[0][0]].shape[where[0][1]], guards)
             for symbol, where in places.items()]
    _check_apart(found, guards)
    return found


def _user_values(program: ExportedProgram) -> list[Any]:
    """What export made of each leaf of the inputs: a tensor of symbolic shape, or a plain value."""
    kinds = {s.arg.name: s.kind for s in program.graph_signature.input_specs}
    return [n.meta.get("val") for n in program.graph.nodes
            if n.op == "placeholder" and kinds[n.name] is InputKind.USER_INPUT]


def _environment(given: list[Any]) -> Any:
    """Torch's record of what it asked of the sizes."""
    free: list[Any] = [size for value in given if isinstance(value, Tensor) for size in value.shape if is_free(size)]
    return free[0].node.shape_env


def _sizes(program: ExportedProgram, symbol: Any, places: tuple[tuple[int, int], ...], example: int,
           guards: list[Any]) -> Sizes:
    sizes = np.arange(max(WINDOW, 2 * example) + 1)
    allowed = sizes > 0
    bound = program.range_constraints.get(symbol)
    if bound is not None:
        least = int(bound.lower) if bound.lower.is_Integer else 1
        most = int(bound.upper) if bound.upper.is_Integer else 2**31
        allowed &= (sizes >= (least if least > 2 else 1)) & (sizes <= most)
    certain = allowed & (sizes > 1)
    for guard in guards:
        if guard.free_symbols != {symbol}:
            continue
        holds = _holds(guard, symbol, sizes)
        certain &= holds
        if not (_kind(guard) == "Unequality" and 1 in guard.args):  # torch takes sizes of one for constants
            allowed &= holds
    ends = np.flatnonzero(allowed)
    if not len(ends) or example >= len(allowed) or not allowed[example]:
        raise CaptureError(f"torch.export's guards on {symbol} do not hold for the example's own size {example}")
    gap = int(np.diff(ends).max()) if len(ends) > 1 else 1
    return Sizes(symbol, places, example, allowed, certain, bool(len(allowed) - 1 - ends[-1] < gap))


def _holds(guard: Any, symbol: Any, sizes: npt.NDArray[np.int64]) -> Bools:
    """Whether a guard holds, for every size; it does nowhere where it cannot be evaluated."""
    kind = _kind(guard)
    if kind in JOINS:
        return np.asarray(JOINS[kind].reduce([_holds(part, symbol, sizes) for part in guard.args]))
    if kind == "Not":
        return ~_holds(guard.args[0], symbol, sizes)
    if kind not in RELATIONS:
        return np.full(len(sizes), kind == "BooleanTrue")
    left, right = (_numbers(side, symbol, sizes) for side in (guard.lhs, guard.rhs))
    return np.broadcast_to(RELATIONS[kind](left, right), sizes.shape)


def _kind(guard: Any) -> str:
    return type(guard).__name__


def _evaluated(expression: Any, symbol: Any, size: Any) -> Any:
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    return sympy_interp(PythonReferenceAnalysis, {symbol: size}, expression)


def _numbers(expression: Any, symbol: Any, sizes: npt.NDArray[np.int64]) -> Any:
    """An expression at every size: all at once where its functions take arrays, else one by one."""
    with _quiet(), np.errstate(all="ignore"):
        try:
            return _evaluated(expression, symbol, sizes)
        except Exception:
            return np.array([_number(expression, symbol, int(n)) for n in sizes])


def _number(expression: Any, symbol: Any, size: int) -> float:
    try:
        return float(_evaluated(expression, symbol, size))
    except Exception:
        return float("nan")


@contextmanager
def _quiet() -> Iterator[None]:
    log = logging.getLogger("torch.utils._sympy.interp")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _check_apart(found: list[Sizes], guards: list[Any]) -> None:
    """Raises CaptureError for an equality between several sizes that some of the allowed ones break. Inequalities are
    about the order of strides, and no matter but where a size is 1."""
    known = {s.symbol: s for s in found}
    for guard in guards:
        mine = [known[s] for s in guard.free_symbols if s in known]
        if len(guard.free_symbols) < 2 or not mine or _kind(guard) != "Equality":
            continue
        tries = [[n for n in (s.nearest(s.example // 2, -1), s.example, s.nearest(s.example + 1, 1)) if n is not None]
                 for s in mine]
        batches = sorted(guard.free_symbols - known.keys(), key=str)
        for several in itertools.product(*tries, *[(2, 3, 5)] * len(batches)):
            at = dict(zip([*(s.symbol for s in mine), *batches], several, strict=True))
            if _kind(guard.subs(at)) != "BooleanTrue":
                raise CaptureError(f"free sizes depend on one another: {str(guard)[:200]} is to hold")


def pattern(allowed: Bools) -> tuple[int, tuple[int, ...]] | None:
    """(period, remainders) of the sizes allowed from the first to the last of them; None if they follow no pattern."""
    ends = np.flatnonzero(allowed)
    inside = allowed[ends[0]:ends[-1] + 1]
    for period in range(1, min(PERIOD, max(len(inside) // 2, 1)) + 1):
        if np.array_equal(inside[period:], inside[:len(inside) - period]):
            fits = {int((ends[0] + i) % period) for i in range(min(period, len(inside))) if inside[i]}
            return period, tuple(sorted(fits))
    return None


__all__ = ["Sizes", "free_sizes", "pattern"]
