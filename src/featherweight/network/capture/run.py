"""Runs of a model that leave it as it was, and what they give compared with what a network gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from featherweight.errors import InputError
from featherweight.network import trees


def run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``model`` gives without gradients, on copies of the inputs; it is put back as it was. Attention goes the way
    that a graph has, not torch's fast path, which gives zeros at padded tokens."""
    leaves, spec = trees.flatten((args, kwargs))
    own_args, own_kwargs = trees.unflatten([v.clone() if isinstance(v, Tensor) else v for v in leaves], spec)
    with torch.no_grad(), kept(model), _unwritten(model), slow_attention():
        return model(*own_args, **own_kwargs)


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Puts ``model`` back as it was: every attribute of its modules, lists and dicts (of caches) one level deep, and
    every buffer, the same tensor with the same values."""
    modules = [m for m in model.modules() if not any(p is not None and is_lazy(p) for p in m._parameters.values())]
    state = [(module, {name: _shallow(value) for name, value in vars(module).items()}) for module in modules]
    originals = [(module, dict(vars(module))) for module in modules]
    buffers = [(b, b.detach().clone()) for module in modules for b in module._buffers.values()
               if isinstance(b, Tensor)]
    try:
        yield
    finally:
        for (module, copies), (_, before) in zip(state, originals, strict=True):
            vars(module).clear()
            vars(module).update({name: _refilled(value, copies[name]) for name, value in before.items()})
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _shallow(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list, set)) else value


def _refilled(value: Any, copy: Any) -> Any:
    """The same list, dict or set with the items that it had."""
    if isinstance(value, list):
        value[:] = copy
    elif isinstance(value, (dict, set)):
        value.clear()
        value.update(copy)
    return value


@contextmanager
def _unwritten(model: nn.Module) -> Iterator[None]:
    """Puts back the parameters that ``model`` writes into when it evaluates (RWKV rescales its weights)."""
    watch = _Writes({p.untyped_storage().data_ptr(): p for p in model.parameters() if not is_lazy(p)})
    try:
        with watch:
            yield
    finally:
        with torch.no_grad():
            for parameter, value in watch.before.values():
                parameter.copy_(value)


class _Writes(TorchFunctionMode):
    """Keeps, before an in-place call writes into a parameter (by its address), what that holds."""

    def __init__(self, parameters: dict[int, nn.Parameter]) -> None:
        super().__init__()
        self.parameters = parameters
        self.before: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        writes = name.endswith("_") if not name.endswith("__") else name.startswith("__i") or name == "__setitem__"
        if writes and args and isinstance(args[0], Tensor):
            address = args[0].untyped_storage().data_ptr()
            if address in self.parameters and address not in self.before:
                self.before[address] = self.parameters[address], self.parameters[address].detach().clone()
        return function(*args, **(kwargs or {}))


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


def difference(expected: Any, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """``compare``, but infinite where the network does not run."""
    try:
        return compare(expected, network, args, kwargs)
    except (InputError, RuntimeError, ValueError, IndexError, TypeError):
        return float("inf")


def compare(expected: Any, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Largest relative difference between ``expected`` and what ``network`` gives; inf where the nests differ."""
    wanted, spec = trees.flatten(expected)
    given, other = trees.flatten(run(network, args, kwargs))
    if spec != other:
        return float("inf")
    worst = 0.0
    for want, got in zip(wanted, given, strict=True):
        if isinstance(want, Tensor) and isinstance(got, Tensor):
            worst = max(worst, _apart(want, got))
        elif isinstance(want, Tensor) or isinstance(got, Tensor) or want != got:
            return float("inf")
    return worst


def _apart(want: Tensor, got: Tensor) -> float:
    """Largest difference relative to the largest finite value; inf where shapes, dtypes, nans or infs differ."""
    if want.shape != got.shape or want.dtype != got.dtype:
        return float("inf")
    wide = torch.complex128 if want.is_complex() else torch.float64
    a, b = want.detach().to(wide), got.detach().to(wide)
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)) or not torch.equal(
            torch.nan_to_num(a[~finite]), torch.nan_to_num(b[~finite])):
        return float("inf")
    a, b = a[finite], b[finite]
    if not a.numel():
        return 0.0
    scale = a.abs().max().clamp_min(1e-12) if want.is_floating_point() or want.is_complex() else 1.0
    return float((a - b).abs().max() / scale)
