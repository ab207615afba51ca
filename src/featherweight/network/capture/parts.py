"""A model captured in parts: the largest children that capture become networks, the rest stays Python."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import CaptureError
from featherweight.network import trees
from featherweight.network.assembly import Assembly, put
from featherweight.network.capture.export import Arguments
from featherweight.network.capture.run import difference, run
from featherweight.network.capture.whole import capture_whole
from featherweight.network.network import Network

CALLS = 8  #: calls of one child, of different shapes, that its capture is compared on


def capture_parts(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], expected: Any, tolerance: float,
                   keep: bool, whole: CaptureError) -> Assembly:
    """Replaces the largest children that do capture, on a copy of the model."""
    outer = copy.deepcopy(model)
    calls = _record_calls(outer, args, kwargs)
    parts: dict[str, Network] = {}
    left: dict[str, str] = {}

    def visit(module: nn.Module, path: str) -> None:
        for name, child in list(module.named_children()):
            where = f"{path}.{name}" if path else name
            if isinstance(child, Network) or not any(True for _ in child.parameters()):
                continue
            try:
                if isinstance(child, torch.jit.ScriptModule):
                    raise CaptureError("it is TorchScript, whose Python is gone")
                if where not in calls:
                    raise CaptureError("it was not called (or by another method than forward)")
                given = _given(child, calls[where][0])
                network = capture_whole(child, calls[where], given, tolerance, keep)
                put(outer, where, network)
                _still_runs(outer, args, kwargs, where, child)
            except CaptureError as error:
                left[where] = str(error)
                visit(child, where)
                continue
            parts[where] = network

    visit(outer, "")
    if not parts:
        raise CaptureError(f"{whole}; no part of it could be captured either" + "".join(
            f"\n  {path}: {reason}" for path, reason in left.items()))
    notes = [str(whole), *(f"{path} stays Python: {reason}" for path, reason in left.items())]
    notes += _torn_ties(model, parts)
    assembly = Assembly(outer, parts, notes)
    apart = difference(expected, assembly, args, kwargs)
    if not apart <= tolerance:
        raise CaptureError(f"{whole}; captured in parts ({', '.join(parts)}) it gives other outputs (relative "
                           f"difference {apart:.2e}, allowed {tolerance:.0e})")
    return assembly


def _given(child: nn.Module, call: Arguments) -> Any:
    try:
        return run(child, *call)
    except Exception as error:
        raise CaptureError(f"by itself it does not run on the inputs it gets there ({type(error).__name__}: "
                           f"{error})") from error


def _still_runs(outer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str, child: nn.Module) -> None:
    """Puts ``child`` back and raises CaptureError where the Python around it needs more of it than its outputs."""
    try:
        run(outer, args, kwargs)
    except Exception as error:
        put(outer, path, child)
        raise CaptureError(f"the Python around it needs the module itself ({type(error).__name__}: {error})") from error


def _torn_ties(model: nn.Module, parts: Mapping[str, Network]) -> list[str]:
    """Names the weights that lie in a part and somewhere else too: they are copies from now on."""
    places: dict[int, dict[str, str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = next((p for p in parts if name.startswith(f"{p}.")), "")
        places.setdefault(id(parameter), {}).setdefault(owner, name)
    twins = {p: id(m) for p, m in model.named_modules(remove_duplicate=False)}
    return [f"tied weights are apart now: {', '.join(names.values())}" for names in places.values()
            if len({twins.get(p, p) for p in names}) > 1]


def _record_calls(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, list[Arguments]]:
    """Module path -> the (args, kwargs) of its calls, one per set of shapes, while the model runs on the examples."""
    calls: dict[str, dict[str, Arguments]] = {}
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
            continue

        def hook(_: nn.Module, a: Any, k: Any, path: str = path) -> None:
            found = calls.setdefault(path, {})
            leaves = trees.flatten((a, k))[0]
            shapes = str([list(v.shape) if isinstance(v, Tensor) else v for v in leaves])
            if len(found) < CALLS:
                found.setdefault(shapes, (a, k))

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        run(model, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {path: list(found.values()) for path, found in calls.items()}
