"""``capture``: a model becomes a Network, whole where it can, in parts where it cannot."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import CaptureError, InputError
from featherweight.network import trees
from featherweight.network.assembly import Assembly, put
from featherweight.network.capture.computed import store_computed_weights
from featherweight.network.capture.convert import convert
from featherweight.network.capture.export import Arguments, Attempt, attempts, export, hopeless
from featherweight.network.network import Network

CALLS = 8  #: calls of one child, of different shapes, that its capture is compared on


def capture(model: nn.Module, example_inputs: Any, *, kwargs: Mapping[str, Any] | None = None,
            parts: bool | None = None, tolerance: float = 1e-4,
            keep_parametrizations: bool = False) -> Network | Assembly:
    """Captures ``model`` as a graph that runs, trains, saves and exports without the model's class.

    example_inputs: a tensor, a tuple (positions) or a dict (keywords) that ``model`` can be called with.
    kwargs: keyword inputs beside positional ones.
    parts: None captures whole and falls back to parts; True goes to parts at once; False never does.
    tolerance: largest difference allowed between the graph's and the model's outputs, relative to the largest output;
        compared on the examples and, where the batch is free, on batches of other sizes made from them.
    keep_parametrizations: weights that the model computes from parameters (weight_norm, spectral_norm, orthogonal,
        ``torch.nn.utils.prune``, LoRA) go on being computed. By default they are stored as they are in evaluation,
        which ``notes`` then says, so that every technique treats them like other weights.

    The model is captured in evaluation mode and left as it was. Axis 0 of the inputs stays free (the batch) unless the
    model fixes it, which ``notes`` then says. Raises CaptureError with module path, source line and the parts that
    could be captured.
    """
    args, keywords = _arguments(example_inputs, kwargs)
    if isinstance(model, (Network, Assembly)):
        raise CaptureError("this model is captured already; use it as it is")
    with _evaluating(model):
        try:
            expected = run(model, args, keywords)
        except Exception as error:
            raise CaptureError(
                f"the model does not run on the example inputs: {type(error).__name__}: {error}; "
                "pass inputs that model(*example_inputs) takes"
            ) from error
        trees.register_dataclasses(expected)
        if parts is not True:
            try:
                return _capture_whole(model, [(args, keywords)], expected, tolerance, keep_parametrizations)
            except CaptureError as error:
                if parts is False:
                    raise
                whole_error = error
        else:
            whole_error = CaptureError("parts were asked for")
        return _capture_parts(model, args, keywords, expected, tolerance, keep_parametrizations, whole_error)


def _arguments(example: Any, kwargs: Mapping[str, Any] | None) -> Arguments:
    keywords = dict(kwargs or {})
    if isinstance(example, Tensor):
        return (example,), keywords
    if isinstance(example, Mapping):
        return (), {**example, **keywords}
    if isinstance(example, (tuple, list)):
        return tuple(example), keywords
    raise CaptureError(f"example inputs are a {type(example).__name__}; expected a tensor, a tuple or a dict, e.g. "
                       "capture(model, torch.randn(1, 3, 224, 224))")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``model`` gives without gradients, on copies of the inputs (it may write into them)."""
    leaves, spec = trees.flatten((args, kwargs))
    own_args, own_kwargs = trees.unflatten([v.clone() if isinstance(v, Tensor) else v for v in leaves], spec)
    with torch.no_grad():
        return model(*own_args, **own_kwargs)


# ---- whole

def _capture_whole(model: nn.Module, calls: list[Arguments], expected: Any, tolerance: float, keep: bool,
                   spatial: bool = False) -> Network:
    """The first attempt whose network gives what the model gives, on all ``calls`` and on other sizes of the first.

    expected: what the model gives on the first call.
    """
    failure: CaptureError | None = None
    trees.register_dataclasses(expected)
    wanted = [expected, *(run(model, *call) for call in calls[1:])]
    for attempt in attempts(*calls[0], spatial=spatial):
        try:
            network = convert(export(model, attempt), model)
            if not keep:
                store_computed_weights(network)
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


def _agree(network: Network, calls: list[Arguments], wanted: list[Any], tolerance: float) -> None:
    """Raises CaptureError where the network gives anything else than what is wanted."""
    for (args, kwargs), expected in zip(calls, wanted, strict=True):
        difference = _difference(expected, network, args, kwargs)
        if not difference <= tolerance:
            raise CaptureError(f"the captured graph gives other outputs than the model (relative difference "
                               f"{difference:.2e}, allowed {tolerance:.0e}); is the model random in evaluation mode?")


def _agree_elsewhere(model: nn.Module, network: Network, tolerance: float, attempt: Attempt) -> None:
    """Raises CaptureError where the network gives anything else than the model on inputs of other sizes."""
    for what, needed, (args, kwargs) in _other_sizes(network, attempt):
        try:
            expected = run(model, args, kwargs)
        except Exception as error:
            if needed:
                raise CaptureError(f"the model does not take {what}: {type(error).__name__}: {error}") from error
            continue
        difference = _difference(expected, network, args, kwargs)
        if difference <= tolerance:
            continue
        if needed:
            raise CaptureError(f"for {what} the captured graph gives other outputs than the model (relative difference "
                               f"{difference:.2e}, allowed {tolerance:.0e}): the model decides by its inputs' sizes")
        network.notes.append(f"for {what} the model gives other outputs (relative difference {difference:.2e}): it "
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


def _difference(expected: Any, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
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


# ---- parts

def _capture_parts(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], expected: Any, tolerance: float,
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
                if where not in calls:
                    raise CaptureError("it was not called (or by another method than forward)")
                given = run(child, *calls[where][0])
                network = _capture_whole(child, calls[where], given, tolerance, keep, spatial=True)
            except CaptureError as error:
                left[where] = str(error)
                visit(child, where)
                continue
            parts[where] = network
            put(outer, where, network)

    visit(outer, "")
    if not parts:
        raise CaptureError(f"{whole}; no part of it could be captured either" + "".join(
            f"\n  {path}: {reason}" for path, reason in left.items()))
    notes = [str(whole), *(f"{path} stays Python: {reason}" for path, reason in left.items())]
    notes += _torn_ties(model, parts)
    assembly = Assembly(outer, parts, notes)
    difference = _difference(expected, assembly, args, kwargs)
    if not difference <= tolerance:
        raise CaptureError(f"{whole}; captured in parts ({', '.join(parts)}) it gives other outputs (relative "
                           f"difference {difference:.2e}, allowed {tolerance:.0e})")
    return assembly


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
