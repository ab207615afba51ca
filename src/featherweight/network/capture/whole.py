"""A model captured whole: exported one way after the other, until the graph gives what the model gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from featherweight.errors import CaptureError
from featherweight.network import trees
from featherweight.network.capture.cells import write_cells
from featherweight.network.capture.computed import store_computed_weights
from featherweight.network.capture.convert import convert, size_notes
from featherweight.network.capture.export import Arguments, Attempt, attempts, export, hopeless
from featherweight.network.capture.products import write_linear
from featherweight.network.capture.public import make_public
from featherweight.network.capture.run import difference, integers_as_numbers, run
from featherweight.network.capture.sizes.admissible import Sizes, free_sizes
from featherweight.network.capture.sizes.asked import Dynamic, leaf_names
from featherweight.network.capture.sizes.constants import from_sizes
from featherweight.network.capture.sizes.proved import Proof, prove
from featherweight.network.network import Network
from featherweight.network.operators import pools_by_size
from featherweight.network.traced import forgotten


def capture_whole(model: nn.Module, calls: list[Arguments], expected: Any, tolerance: float, keep: bool,
                  dynamic: Dynamic | None = None, costly: bool = True) -> Network:
    """The first attempt whose network gives what the model gives, on all ``calls`` and on other sizes of the first.

    expected: what the model gives on the first call. dynamic: as ``capture`` takes it. costly: images and videos may
    be of any size even where the graph then computes at every run what a fixed size makes a constant of (the masks of
    windows).
    """
    failure: CaptureError | None = None
    fixed = ""
    trees.register_dataclasses(expected)
    wanted = [expected, *(run(model, *call) for call in calls[1:])]
    for attempt in attempts(model, *calls[0], dynamic):
        try:
            network, sizes = _converted(model, attempt)
            if attempt.wide and not sizes:
                continue  # the model fixes them
            if not keep:
                store_computed_weights(network)
            write_cells(network)
            write_linear(network)
            make_public(network)
            if attempt.dynamic and not any(None in i.shape for i in network.signature.inputs):
                continue  # the model fixes the sizes, and those of this attempt may be doubled
            cells = [n.name for n in network.calls() if pools_by_size(n)]
            if cells and attempt.wide and not attempt.asked:
                raise CaptureError(f"{', '.join(cells)} pools to a fixed number of cells, which no runtime does for "
                                   f"any size; for PyTorch alone, write {_naming(network)}")
            if not costly and attempt.wide and not attempt.asked and (computed := from_sizes(network)):
                raise CaptureError(f"with free sizes the graph computes {computed} at every run, which is a constant "
                                   f"for a fixed size; to have them free all the same, write {_naming(network)}")
            _agree(network, calls, wanted, tolerance)
            _agree_elsewhere(model, network, tolerance, attempt)
            prove(Proof(model, network, attempt, tolerance), sizes)
        except CaptureError as error:
            fixed = fixed or (str(error) if attempt.wide else "")
            if attempt.asked:
                raise
            failure = failure if attempt.wide else failure or error
            if hopeless(error):
                failure = failure or error
                break
            continue
        if failure is not None and not attempt.dynamic:
            network.notes.append(f"why the batch size is fixed: {failure}")
        network.notes += size_notes(network)
        if fixed and not attempt.wide:
            network.notes.append(f"why all sizes but the batch are fixed: {fixed}")
        return network
    raise failure or CaptureError("nothing could be exported")


def _converted(model: nn.Module, attempt: Attempt) -> tuple[Network, list[Sizes]]:
    """The network of an attempt, and the sizes beside the batch that stayed free."""
    with forgotten() as programs:
        program, read = _exported(model, attempt)
        programs.append(program)
        sizes = free_sizes(program, attempt)
        _check_asked(model, attempt, sizes)
        network = convert(program, model)
    if read:
        network.notes.append(f"the model decides by numbers in buffers, which are fixed from now on: {', '.join(read)}")
    return network, sizes


def _exported(model: nn.Module, attempt: Attempt) -> tuple[ExportedProgram, list[str]]:
    """The exported program, and the buffers of one integer that had to be read as numbers."""
    try:
        return export(model, attempt), []
    except CaptureError as error:
        if not hopeless(error):
            raise
        with integers_as_numbers(model) as read:
            if not read:
                raise
            try:
                return export(model, attempt), [name for name, was in read.items() if was]
            except CaptureError as second:  # what Python computes of a free size is no number; of a fixed one it is
                raise CaptureError(str(second)) from (second if attempt.dynamic else second.__cause__)


def _naming(network: Network) -> str:
    """What names the free sizes of a network."""
    named = {i.name: {a: f"size_{a}" for a, s in enumerate(i.shape) if s is None and (a or not i.batched)}
             for i in network.signature.inputs}
    return f"capture(..., dynamic={ {name: axes for name, axes in named.items() if axes} })"


def _check_asked(model: nn.Module, attempt: Attempt, sizes: list[Sizes]) -> None:
    """Raises CaptureError where the model fixes a size that the user wants free."""
    free = {place for one in sizes for place in one.places}
    known = leaf_names(model, attempt.args, attempt.kwargs)
    for leaf, axes in enumerate(attempt.names if attempt.asked else ()):
        for axis, name in axes.items():
            if (leaf, axis) not in free:
                raise CaptureError(f"the model fixes axis {axis} of the input {known[leaf]!r}, which dynamic calls "
                                   f"{name!r}: leave it out")


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


__all__ = ["capture_whole"]
