"""A model captured whole: exported one way after the other, until the graph gives what the model gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import CaptureError, InputError
from featherweight.network import trees
from featherweight.network.capture.computed import store_computed_weights
from featherweight.network.capture.convert import convert
from featherweight.network.capture.export import Arguments, Attempt, attempts, export, hopeless, slow_attention
from featherweight.network.capture.products import write_linear
from featherweight.network.capture.public import make_public
from featherweight.network.network import Network
from featherweight.network.traced import forgotten


def run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``model`` gives without gradients, on copies of the inputs and with its buffers put back: it may write into
    both. Attention goes the way that a graph has, not torch's fast path, which gives zeros at padded tokens."""
    leaves, spec = trees.flatten((args, kwargs))
    own_args, own_kwargs = trees.unflatten([v.clone() if isinstance(v, Tensor) else v for v in leaves], spec)
    with torch.no_grad(), buffers_kept(model), slow_attention():
        return model(*own_args, **own_kwargs)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Puts every buffer of ``model`` back as it was: the same tensor with the same values."""
    before = [(module, name, buffer, buffer.detach().clone()) for module in model.modules()
              for name, buffer in module._buffers.items() if isinstance(buffer, Tensor)]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in before:
                module._buffers[name] = buffer
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def capture_whole(model: nn.Module, calls: list[Arguments], expected: Any, tolerance: float, keep: bool,
                   spatial: bool = False) -> Network:
    """The first attempt whose network gives what the model gives, on all ``calls`` and on other sizes of the first.

    expected: what the model gives on the first call.
    """
    failure: CaptureError | None = None
    trees.register_dataclasses(expected)
    wanted = [expected, *(run(model, *call) for call in calls[1:])]
    for attempt in attempts(*calls[0], spatial=spatial):
        try:
            network = _converted(model, attempt)
            if not keep:
                store_computed_weights(network)
            write_linear(network)
            make_public(network)
            if attempt.dynamic and not any(None in i.shape for i in network.signature.inputs):
                continue  # the model fixes the sizes, and those of this attempt may be doubled
            _agree(network, calls, wanted, tolerance)
            _agree_elsewhere(model, network, tolerance, attempt)
        except CaptureError as error:
            failure = failure or error
            if hopeless(error):
                break
            continue
        if failure is not None and not attempt.dynamic:
            network.notes.append(f"why the batch size is fixed: {failure}")
        return network
    raise failure or CaptureError("nothing could be exported")


def _converted(model: nn.Module, attempt: Attempt) -> Network:
    with forgotten() as programs:
        programs.append(export(model, attempt))
        return convert(programs[0], model)


def _agree(network: Network, calls: list[Arguments], wanted: list[Any], tolerance: float) -> None:
    """Raises CaptureError where the network gives anything else than what is wanted."""
    for (args, kwargs), expected in zip(calls, wanted, strict=True):
        apart = difference(expected, network, args, kwargs)
        if not apart <= tolerance:
            raise CaptureError(f"the captured graph gives other outputs than the model (relative difference "
                               f"{apart:.2e}, allowed {tolerance:.0e}); is the model random in evaluation mode?")


def _agree_elsewhere(model: nn.Module, network: Network, tolerance: float, attempt: Attempt) -> None:
    """Raises CaptureError where the network gives anything else than the model on inputs of other sizes."""
    for what, needed, (args, kwargs) in _other_sizes(network, attempt):
        try:
            expected = run(model, args, kwargs)
        except Exception as error:
            if needed:
                raise CaptureError(f"the model does not take {what}: {type(error).__name__}: {error}") from error
            continue
        apart = difference(expected, network, args, kwargs)
        if apart <= tolerance:
            continue
        if needed:
            raise CaptureError(f"for {what} the captured graph gives other outputs than the model (relative difference "
                               f"{apart:.2e}, allowed {tolerance:.0e}): the model decides by its inputs' sizes")
        network.notes.append(f"for {what} the model gives other outputs (relative difference {apart:.2e}): it "
                             "decides by the batch size, and the network does what it does for larger ones")


def _other_sizes(network: Network, attempt: Attempt) -> Iterator[tuple[str, bool, Arguments]]:
    """Inputs of other sizes, made from an attempt's: (what they are, whether the model has to agree, inputs)."""
    leaves, spec = trees.flatten((attempt.args, attempt.kwargs))
    wanted = iter(network.signature.inputs)
    shapes = [next(wanted).shape if i not in network.signature.constants else () for i in range(len(leaves))]

    def resized(axes: tuple[int, ...], size: Any) -> Arguments:
        changed = []
        for leaf, shape in zip(leaves, shapes, strict=True):
            for axis in axes:
                if axis < len(shape) and shape[axis] is None:
                    index = torch.arange(size(leaf.shape[axis]), device=leaf.device) % leaf.shape[axis]
                    leaf = leaf.index_select(axis, index)
            changed.append(leaf)
        args, kwargs = trees.unflatten(changed, spec)
        return args, kwargs

    if any(s[:1] == (None,) for s in shapes):
        yield "a batch of another size", True, resized((0,), lambda n: 2 if n == 3 else 3)
        yield "a batch of one", False, resized((0,), lambda n: 1)
    if any(len(s) == 4 and None in s[2:] for s in shapes):
        yield "half the height and width", True, resized((2, 3), lambda n: max(n // 2, 1))
        yield "height and width smaller by one", True, resized((2, 3), lambda n: max(n - 1, 1))


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
