"""How a network is called: its tensor inputs, and the nests that inputs and outputs come in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import InputError
from featherweight.network import trees


@dataclass(frozen=True)
class Input:
    """One tensor that a network takes. ``shape`` has None where any size goes; axis 0 is the batch if ``batched``.

    limits: (axis, least, most) of free axes beyond which the model does something else than the graph; most is None
    where there is no end.

    Example:
        >>> fw.network.Input("image", (None, 3, 32, 32), torch.float32, batched=True).shape[1:]
        (3, 32, 32)
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype
    batched: bool
    limits: tuple[tuple[int, int, int | None], ...] = ()


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
            for axis, least, most in want.limits:
                if given.shape[axis] < least or (most is not None and given.shape[axis] > most):
                    raise InputError(f"input {want.name!r} has {given.shape[axis]} along axis {axis}; the graph holds "
                                     f"{_span(least, most)}, and the model does something else beyond: capture it "
                                     "again with an example of that size")
        return tensors

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


def _span(least: int, most: int | None) -> str:
    return f"from {least}" if most is None else f"up to {most}" if least <= 2 else f"from {least} to {most}"


def _short(spec: trees.Spec) -> str:
    return repr(trees.unflatten(["*"] * spec.num_leaves, spec)).replace("'*'", "*")
