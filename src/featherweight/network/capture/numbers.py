"""Buffers of one integer (a stride, a padding) read as numbers while a model is traced: Python may decide by them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


@contextmanager
def integers_as_numbers(model: nn.Module) -> Iterator[dict[str, bool]]:
    """Names of the model's buffers of one integer, or truth value, and whether each has been read. Meanwhile each is a
    constant, which torch follows through what Python computes of it, where a buffer is a tensor of unknown content."""
    classes: list[tuple[nn.Module, type[nn.Module]]] = []
    read: dict[str, bool] = {}
    try:
        for path, module in model.named_modules():
            found = {name: buffer for name, buffer in module._buffers.items() if buffer is not None and _whole(buffer)}
            if not found or isinstance(module, (torch.jit.ScriptModule, _NormBase)):  # a norm's counter of batches
                continue
            cls = type(module)
            classes.append((module, cls))
            module.__class__ = type(cls.__name__, (cls,), {
                "__module__": cls.__module__, "__qualname__": cls.__qualname__,
                **{name: _constant(buffer, f"{path}.{name}" if path else name, read)
                   for name, buffer in found.items()}})
        yield read
    finally:
        for module, cls in classes:
            module.__class__ = cls


def _whole(buffer: Tensor) -> bool:
    return buffer.numel() == 1 and not (buffer.is_floating_point() or buffer.is_complex())


def _constant(buffer: Tensor, name: str, read: dict[str, bool]) -> property:
    number, dtype, device = buffer.tolist(), buffer.dtype, buffer.device
    read[name] = False

    def get(module: nn.Module) -> Tensor:
        read[name] = True
        return torch.tensor(number, dtype=dtype, device=device)

    return property(get)


__all__ = ["integers_as_numbers"]
