"""Which sizes of the inputs may stay free beside the batch: named by the user, or asked of the model."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from featherweight.errors import CaptureError, did_you_mean
from featherweight.network import trees
from featherweight.network.capture.run import run

#: leaf by leaf of the inputs: axis -> its name, "" where the capture is to find one
Names = tuple[dict[int, str], ...]
#: input name -> axis -> name of the size
Dynamic = Mapping[str, Mapping[int, str]]
IMAGE = 4  #: axes of an input from which on it counts as an image or a video
RESAMPLING = ("interpolate", "_interpolate", "upsample_bilinear2d", "upsample_nearest2d", "upsample_bicubic2d")
HALF_FROM = 8  #: a size of at least so many is tried at its half first


def leaf_names(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """What each leaf of the inputs is called: "input_ids", and within a nest "images_0"."""
    try:
        positions = [p.name for p in inspect.signature(model.forward).parameters.values()
                     if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    except (TypeError, ValueError):
        positions = []
    tops = [positions[i] if i < len(positions) else f"args_{i - len(positions)}" for i in range(len(args))]
    names = []
    for top, value in [*zip(tops, args, strict=True), *kwargs.items()]:
        for path, _ in pytree.tree_flatten_with_path(value)[0]:
            steps = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path]
            names.append("_".join([top, *steps]))
    return names


def named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Dynamic) -> Names:
    """The axes that ``dynamic`` names, leaf by leaf. Raises CaptureError for inputs and axes that there are not."""
    known, leaves = leaf_names(model, args, kwargs), trees.flatten((args, kwargs))[0]
    found: list[dict[int, str]] = [{} for _ in leaves]
    for name, axes in dynamic.items():
        mine = [i for i, own in enumerate(known) if own == name or own.startswith(f"{name}_")]
        if not mine:
            raise CaptureError(f"dynamic names the input {name!r}; {did_you_mean(name, known)}")
        for i in mine:
            for axis, label in axes.items():
                found[i][_checked(name, leaves[i], axis, label)] = label
    return tuple(found)


def _checked(name: str, leaf: Any, axis: Any, label: Any) -> int:
    """The axis, counted from the front."""
    example = f'write dynamic={{{name!r}: {{1: "tokens"}}}}'
    if not isinstance(leaf, Tensor) or not isinstance(axis, int) or not -leaf.dim() <= axis < leaf.dim():
        given = f"a tensor of {leaf.dim()} axes" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
        raise CaptureError(f"dynamic names axis {axis!r} of the input {name!r}, which is {given}; {example}")
    if not isinstance(label, str) or not label.isidentifier():
        raise CaptureError(f"dynamic calls axis {axis} of the input {name!r} {label!r}; expected a name of letters, "
                           f"digits and underscores: {example}")
    place: int = axis % leaf.dim()
    if place and leaf.shape[place] < 2:
        raise CaptureError(f"axis {axis} of the example input {name!r} is {leaf.shape[place]} long; torch.export takes "
                           "such a size for a constant: pass an example of at least 2")
    return place


def found(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batched: list[bool]) -> Names:
    """The axes along which ``model`` runs on another size. Axes of one length are changed together first, then those
    at one place in the shape. Of images and videos, the axes along which it makes the same calls with the same numbers,
    so that no shape or mask that it computes is one of a size."""
    leaves, spec = trees.flatten((args, kwargs))
    free: list[dict[int, str]] = [{} for _ in leaves]

    def calls(axes: list[tuple[int, int]], size: int) -> list[Any] | None:
        return _calls(model, trees.unflatten(resized(leaves, axes, size), spec))

    def runs(axes: list[tuple[int, int]]) -> bool:
        size = leaves[axes[0][0]].shape[axes[0][1]]
        others = [size // 2] * (size >= HALF_FROM) + [size * 2]
        if all(leaves[i].dim() < IMAGE for i, _ in axes):
            return any(calls(axes, other) is not None for other in others)
        return any((made := calls(axes, other)) is not None and made == calls(axes, size) for other in others)

    for axes in _alike(leaves, batched):
        several = sorted({axis for _, axis in axes})
        parts = [axes] if runs(axes) else [[a for a in axes if a[1] == one] for one in several if len(several) > 1]
        for part in parts:
            if part is axes or runs(part):
                for i, axis in part:
                    free[i][axis] = ""
    return tuple(free)


def _alike(leaves: list[Any], batched: list[bool]) -> list[list[tuple[int, int]]]:
    """(leaf, axis) of the axes beside the batch, those of one length together; axes of length 1 are left out."""
    groups: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for i, (leaf, own) in enumerate(zip(leaves, batched, strict=True)):
        for axis in range(int(own), leaf.dim() if isinstance(leaf, Tensor) else 0):
            if leaf.shape[axis] > 1:
                groups[leaf.shape[axis]].append((i, axis))
    return list(groups.values())


def resized(leaves: list[Any], axes: list[tuple[int, int]], size: int) -> list[Any]:
    """The leaves with other sizes along (leaf, axis): shortened, or repeated."""
    changed = list(leaves)
    for i, axis in axes:
        index = torch.arange(size, device=changed[i].device) % changed[i].shape[axis]
        changed[i] = changed[i].index_select(axis, index)
    return changed


class _Recorder(TorchFunctionMode):
    """Notes every call of torch with the numbers it is given. Sizes to resample to are no part of a graph's form."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", str(function))
        given = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, (bool, int, float, str))]
        self.calls.append((name, () if name in RESAMPLING else tuple(given)))
        return function(*args, **(kwargs or {}))


def _calls(model: nn.Module, call: Any) -> list[Any] | None:
    """The calls that a model makes on these inputs; None where it does not run."""
    recorder = _Recorder()
    try:
        with recorder:
            run(model, *call)
    except Exception:
        return None
    return recorder.calls


__all__ = ["Dynamic", "Names", "found", "leaf_names", "named", "resized"]
