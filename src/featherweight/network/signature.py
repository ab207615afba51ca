"""How a network is called: its tensor inputs, and the nests that inputs and outputs come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import InputError
from featherweight.network import trees


@dataclass(frozen=True)
class FreeAxis:
    """A size of an input, beside the batch, that every call chooses: a length, a height.

    name: free axes of one name have one size, in all inputs. example: the size at capture, which costs are counted at.
    period, remainders: a size fits if it leaves one of ``remainders`` when divided by ``period``.

    Example:
        >>> fw.network.FreeAxis(1, "tokens", example=16).fits(5)
        True
        >>> fw.network.FreeAxis(2, "height", example=64, period=32).fits(48)
        False
    """

    axis: int
    name: str
    example: int
    period: int = 1
    remainders: tuple[int, ...] = (0,)

    def fits(self, size: int) -> bool:
        return size % self.period in self.remainders

    def rule(self) -> str:
        """Which sizes fit, in words: "a multiple of 32"."""
        if self.period == 1:
            return "any size"
        if self.remainders == (0,):
            return f"a multiple of {self.period}"
        rests = " or ".join(str(rest) for rest in self.remainders)
        return f"a size that leaves {rests} when divided by {self.period}"


@dataclass(frozen=True)
class Input:
    """One tensor that a network takes. ``shape`` has None where any size goes; axis 0 is the batch if ``batched``.

    limits: (axis, least, most) of free axes beyond which the model does something else than the graph; most is None
    where there is no end. axes: what is known of the free axes beside the batch.

    Example:
        >>> fw.network.Input("image", (None, 3, 32, 32), torch.float32, batched=True).shape[1:]
        (3, 32, 32)
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype
    batched: bool
    limits: tuple[tuple[int, int, int | None], ...] = ()
    axes: tuple[FreeAxis, ...] = ()

    def sizes(self, batch: int, other: int | None = None) -> list[int]:
        """A shape that fits: ``batch`` samples; other free sizes as at capture, or ``other`` if that is given or a file
        does not say."""
        known = {} if other is not None else {a.axis: a.example for a in self.axes}
        unknown = 64 if other is None else other
        return [s if s is not None else known.get(axis, unknown) if axis else batch
                for axis, s in enumerate(self.shape)]


@dataclass(frozen=True)
class Signature:
    """How a network is called: the nest of ``(args, kwargs)``, the nest it returns, and its tensor inputs.

    ``constants`` are the leaves of the inputs that are no tensors (by position); they were fixed at capture.

    Example:
        >>> network.signature.dynamic_batch
        True
        >>> [(given.name, given.shape) for given in network.signature.inputs]
        [('input', (None, 1, 8, 8))]
    """

    in_spec: trees.Spec
    out_spec: trees.Spec
    inputs: tuple[Input, ...]
    constants: Mapping[int, Any]

    @property
    def dynamic_batch(self) -> bool:
        return any(i.batched for i in self.inputs)

    def leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensor inputs of a call, checked. Raises InputError for a call that does not fit."""
        order = self.in_spec.child(1).context
        if set(order) == kwargs.keys():
            kwargs = {name: kwargs[name] for name in order}
        leaves, spec = trees.flatten((args, kwargs))
        if spec != self.in_spec:
            names = ", ".join(i.name for i in self.inputs)
            raise InputError(
                f"called with {len(args)} positional and {sorted(kwargs)} keyword inputs nested as {_short(spec)}; "
                f"captured with ({names}) nested as {_short(self.in_spec)}: call it as the example inputs were"
            )
        tensors = [leaf for i, leaf in enumerate(leaves) if i not in self.constants]
        for i, fixed in self.constants.items():
            if leaves[i] != fixed:
                raise InputError(f"input {i} is {leaves[i]!r}; it was {fixed!r} at capture and is part of the graph "
                                 "now: capture again with the other value")
        for given, want in zip(tensors, self.inputs, strict=True):
            if not isinstance(given, Tensor):
                raise InputError(f"input {want.name!r} is a {type(given).__name__}; expected a tensor "
                                 f"{shape_text(want)}")
            fits = given.dim() == len(want.shape) and all(
                w is None or w == g for g, w in zip(given.shape, want.shape, strict=True))
            if not fits:
                raise InputError(f"input {want.name!r} has shape {list(given.shape)}; expected {shape_text(want)}")
        self.check_sizes(tensors)
        return tensors

    def check_sizes(self, tensors: Sequence[Tensor]) -> None:
        """Raises InputError for inputs of a free size that the graph is not right for."""
        named: dict[str, tuple[str, int]] = {}
        for given, want in zip(tensors, self.inputs, strict=True):
            for axis, least, most in want.limits:
                if given.shape[axis] < least or (most is not None and given.shape[axis] > most):
                    raise InputError(f"input {want.name!r} has {given.shape[axis]} along axis {axis}; the graph holds "
                                     f"{_span(least, most)}, and the model takes another branch at other sizes: "
                                     "capture it again with an example of that size")
            for free in want.axes:
                _check_axis(want.name, free, given.shape[free.axis], named)

    def nest(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` from the tensor inputs in order."""
        rest = iter(tensors)
        constants = self.constants
        leaves = [constants[i] if i in constants else next(rest) for i in range(self.in_spec.num_leaves)]
        args, kwargs = trees.unflatten(leaves, self.in_spec)
        return args, kwargs


def shape_text(item: Input) -> str:
    """An input's shape and number type in words: "[any, 3, 32, 32] float32"."""
    sizes = ", ".join("any" if s is None else str(s) for s in item.shape)
    return f"[{sizes}] {str(item.dtype).removeprefix('torch.')}"


def _check_axis(name: str, free: FreeAxis, size: int, named: dict[str, tuple[str, int]]) -> None:
    """Raises InputError for a size that does not fit; ``named`` has the sizes of other axes by name."""
    if not free.fits(size):
        raise InputError(f"input {name!r} has {size} along axis {free.axis}; the graph takes {free.rule()} there: pad "
                         "or crop the input")
    other, known = named.setdefault(free.name, (name, size))
    if known != size:
        raise InputError(f"input {name!r} has {size} along axis {free.axis} and input {other!r} has {known}; both are "
                         f"{free.name!r} and must be equal")


def _span(least: int, most: int | None) -> str:
    return f"from {least}" if most is None else f"up to {most}" if least <= 2 else f"from {least} to {most}"


def _short(spec: trees.Spec) -> str:
    return repr(trees.unflatten(["*"] * spec.num_leaves, spec)).replace("'*'", "*")
