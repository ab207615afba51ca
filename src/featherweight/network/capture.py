"""``capture``: a model becomes a Network, whole where it can, in parts where it cannot."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from featherweight.errors import CaptureError
from featherweight.network import trees
from featherweight.network.assembly import Assembly
from featherweight.network.graphs import inline_regions, module_path, source_line, tidy
from featherweight.network.network import Input, Network, Signature

aten = torch.ops.aten
#: modules whose training behaviour leaves no trace in a graph captured for evaluation
TRAINING_ONLY = ("StochasticDepth", "DropPath", "DropBlock")


def capture(model: nn.Module, example_inputs: Any, *, kwargs: Mapping[str, Any] | None = None,
            parts: bool | None = None, tolerance: float = 1e-4) -> Network | Assembly:
    """Captures ``model`` as a graph that runs, trains, saves and exports without the model's class.

    example_inputs: a tensor, a tuple (positions) or a dict (keywords) that ``model`` can be called with.
    kwargs: keyword inputs beside positional ones.
    parts: None captures whole and falls back to parts; True goes to parts at once; False never does.
    tolerance: largest difference allowed between the graph's and the model's outputs on the examples, relative to the
        largest output.

    The model is captured in evaluation mode and left as it was. Axis 0 of the inputs stays free (the batch) unless the
    model fixes it, which ``notes`` then says. Raises CaptureError with module path, source line and the parts that
    could be captured.
    """
    args, keywords = _arguments(example_inputs, kwargs)
    if isinstance(model, (Network, Assembly)):
        raise CaptureError("this model is captured already; use it as it is")
    with _evaluating(model):
        try:
            with torch.no_grad():
                expected = model(*args, **keywords)
        except Exception as error:
            raise CaptureError(
                f"the model does not run on the example inputs: {type(error).__name__}: {error}; "
                "pass inputs that model(*example_inputs) takes"
            ) from error
        trees.register_dataclasses(expected)
        if parts is not True:
            try:
                return _capture_whole(model, args, keywords, expected, tolerance)
            except CaptureError as error:
                if parts is False:
                    raise
                whole_error = error
        else:
            whole_error = CaptureError("parts were asked for")
        return _capture_parts(model, args, keywords, expected, tolerance, whole_error)


def _arguments(example: Any, kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
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


# ---- whole

def _capture_whole(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], expected: Any,
                   tolerance: float, spatial: bool = False) -> Network:
    program = _export(model, args, kwargs, spatial)
    network = _convert(program, model)
    difference = compare(expected, network, args, kwargs)
    if not difference <= tolerance:
        raise CaptureError(f"the captured graph gives other outputs than the model (relative difference {difference:.2e}, "
                           f"allowed {tolerance:.0e}); is the model random in evaluation mode?")
    return network


def compare(expected: Any, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Largest relative difference between ``expected`` and what ``network`` gives; inf where the nests differ."""
    with torch.no_grad():
        wanted, spec = trees.flatten(expected)
        given, other = trees.flatten(network(*args, **kwargs))
    if spec != other:
        return float("inf")
    worst = 0.0
    for want, got in zip(wanted, given, strict=True):
        if not isinstance(want, Tensor):
            worst = max(worst, 0.0 if want == got else float("inf"))
        elif want.shape != got.shape or want.dtype != got.dtype:
            return float("inf")
        elif want.numel():
            scale = want.abs().max().double().clamp_min(1e-12) if want.is_floating_point() else 1.0
            both = torch.nan_to_num(want.double()), torch.nan_to_num(got.double())
            worst = max(worst, float(((both[0] - both[1]).abs().max() / scale)))
    return worst


def _doubled(leaf: Any) -> Any:
    return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == 1 else leaf


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], spatial: bool) -> ExportedProgram:
    """Exports with a free batch where possible: an example batch of one is doubled, since export takes 1 as a constant."""
    leaves, spec = trees.flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    sizes = {t.shape[0] for t in tensors if t.dim()}
    batch = next((t.shape[0] for t in tensors if t.dim()), None)
    attempts: list[tuple[list[Any], list[Any]]] = []

    def free(leaf: Any, size: int) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return None
        dims = {0: Dim.AUTO} if leaf.shape[0] == size else {}
        if spatial and leaf.dim() == 4:
            dims |= {2: Dim.AUTO, 3: Dim.AUTO}
        return dims

    if batch == 1 and sizes == {1}:
        twice = [_doubled(leaf) for leaf in leaves]
        attempts.append((twice, [free(leaf, 2) for leaf in twice]))
    elif batch is not None:
        attempts.append((leaves, [free(leaf, batch) for leaf in leaves]))
    attempts.append((leaves, [{} if isinstance(leaf, Tensor) else None for leaf in leaves]))
    failure: CaptureError | None = None
    for values, dims in attempts:
        (a, k), (da, dk) = trees.unflatten(values, spec), trees.unflatten(dims, spec)
        watch = _Watch(model)
        try:
            with watch, torch.enable_grad():
                program = torch.export.export(model, a, k, dynamic_shapes=tuple(da) if not dk else
                                              {**_by_name(model, da, a), **dk}, strict=False)
            if values is leaves or any(_is_free(s) for n in program.graph.nodes if n.op == "placeholder"
                                       for s in getattr(n.meta.get("val"), "shape", ())):
                return program
        except Exception as error:
            failure = failure or CaptureError(watch.explain(error))
            failure.__cause__ = failure.__cause__ or error
    assert failure is not None
    raise failure


def _by_name(model: nn.Module, dims: tuple[Any, ...], args: tuple[Any, ...]) -> dict[str, Any]:
    import inspect

    names = list(inspect.signature(model.forward).parameters)
    return dict(zip(names, dims[: len(args)], strict=False))


class _Watch:
    """Follows which module is running, so that a failed export can be told by path and line."""

    def __init__(self, model: nn.Module) -> None:
        self.paths = {id(m): name for name, m in model.named_modules()}
        self.stack: list[str] = []
        self.handles: list[Any] = []

    def __enter__(self) -> _Watch:
        from torch.nn.modules import module as hooks

        self.handles.append(hooks.register_module_forward_pre_hook(self._enter))
        self.handles.append(hooks.register_module_forward_hook(self._leave))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self.stack.append(self.paths.get(id(module), self.stack[-1] if self.stack else ""))

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.stack:
            self.stack.pop()

    def explain(self, error: BaseException) -> str:
        where = self.stack[-1] if self.stack else ""
        frames = [f for f in traceback.extract_tb(error.__traceback__)
                  if "/torch/" not in f.filename and "featherweight/network" not in f.filename]
        line = f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else "unknown line"
        reason = next((t for t in str(error).splitlines() if t.strip()), type(error).__name__)
        return f"cannot be captured whole: in module {where or '(the model itself)'!r}, {line}: " \
               f"{type(error).__name__}: {reason[:300]}"


# ---- conversion

def _convert(program: ExportedProgram, model: nn.Module) -> Network:
    signature = program.graph_signature
    inline_regions(program.graph, lambda name: getattr(program.graph_module, name))
    kinds = {spec.arg.name: spec for spec in signature.input_specs}
    for spec in signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(f"the model writes into {spec.target!r} in evaluation mode ({spec.kind.name.lower()}); "
                               "a network's forward must not change its buffers or inputs")
    graph, values = Graph(), {}
    inputs: list[Input] = []
    constants: dict[str, Tensor] = {}
    fixed: dict[int, Any] = {}
    position = 0
    outputs: Any = ()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = kinds[node.name]
            if spec.kind is InputKind.USER_INPUT:
                if isinstance(node.meta.get("val"), Tensor):
                    values[node] = graph.placeholder(node.name)
                    inputs.append(_input(node))
                else:
                    fixed[position] = getattr(spec.arg, "value", node.meta.get("val"))
                    if node.users:
                        raise CaptureError(f"input {node.name!r} is no tensor but is read at run time")
                position += 1
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                values[node] = graph.create_node("get_attr", str(spec.target))
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                constants[str(spec.target)] = program.constants[str(spec.target)].detach().clone()
                values[node] = graph.create_node("get_attr", str(spec.target))
            else:
                raise CaptureError(f"input {node.name!r} of kind {spec.kind.name.lower()} is not supported")
        elif node.op == "output":
            outputs = map_arg(node.args[0], lambda n: values[n])
            graph.output(tuple(outputs))
        elif node.op == "call_function":
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                raise CaptureError(f"{source_line(node)}: control flow ({node.target}) cannot be captured")
            copied = graph.node_copy(node, lambda n: values[n])
            copied.meta = {"module": module_path(node), "source": source_line(node)}
            values[node] = copied
        elif not node.users:
            continue
        else:
            raise CaptureError(f"a node of kind {node.op} ({node.target}) cannot be captured")
    tidy(graph, constants)
    network = Network(graph, Signature(program.call_spec.in_spec, program.call_spec.out_spec, tuple(inputs), fixed))
    _adopt_tensors(network, model, constants)
    _mark_counters(network, model)
    if not network.signature.dynamic_batch:
        network.notes.append("the batch size is fixed by the model: inputs must have exactly the examples' shapes")
    lost = sorted(p for p, m in model.named_modules() if type(m).__name__ in TRAINING_ONLY and getattr(m, "p", getattr(
        m, "drop_prob", 1)))
    if lost:
        network.notes.append(f"acts in training only and is not in the graph: {', '.join(lost)}")
    return network


def _is_free(size: Any) -> bool:
    """Whether a size stayed free: one that the model fixed is still a SymInt, of a known number."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def _input(node: Node) -> Input:
    value = node.meta["val"]
    shape = tuple(None if _is_free(s) else int(s) for s in value.shape)
    return Input(node.name, shape, value.dtype, bool(shape) and shape[0] is None)


def _adopt_tensors(network: Network, model: nn.Module, constants: dict[str, Tensor]) -> None:
    """Copies of the model's tensors under their own names, ties kept; constants beside them, outside the state dict."""
    memo: dict[int, Any] = {}
    persistent = set(model.state_dict(keep_vars=True))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        network.add_tensor(name, copy.deepcopy(parameter, memo), buffer=not isinstance(parameter, nn.Parameter))
    for name, buffer in model.named_buffers(remove_duplicate=False):
        network.add_tensor(name, copy.deepcopy(buffer, memo), buffer=True, persistent=name in persistent)
    for name in {str(n.target) for n in network.graph.nodes if n.op == "get_attr"} & set(constants):
        network.add_tensor(name, constants[name], buffer=True, persistent=False)
    network.changed()


def _mark_counters(network: Network, model: nn.Module) -> None:
    """Tells batch norms which batch counter is theirs, and whether they average over all batches (no momentum)."""
    known = network.tensors()
    for node in network.calls(aten.batch_norm.default):
        mean = node.args[3]
        if isinstance(mean, Node) and mean.op == "get_attr":
            counter = str(mean.target).removesuffix("running_mean") + "num_batches_tracked"
            if counter in known:
                node.meta["counter"] = counter
                owner = dict(model.named_modules()).get(counter.rpartition(".")[0])
                if owner is not None and getattr(owner, "momentum", 0.1) is None:
                    node.meta["cumulative"] = True


# ---- parts

def _capture_parts(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], expected: Any, tolerance: float,
                   whole: CaptureError) -> Assembly:
    """Replaces the largest children that do capture, on a copy of the model."""
    outer = copy.deepcopy(model)
    calls = _record_calls(outer, args, kwargs)
    parts: dict[str, Network] = {}
    left: dict[str, str] = {}

    def visit(module: nn.Module, path: str) -> None:
        for name, child in list(module.named_children()):
            where = f"{path}.{name}" if path else name
            if not any(True for _ in child.parameters()) or where.startswith(tuple(f"{p}." for p in parts)):
                continue
            try:
                if where not in calls:
                    raise CaptureError("it was not called (or by another method than forward)")
                network = _capture_part(child, *calls[where], tolerance)
            except CaptureError as error:
                left[where] = str(error)
                visit(child, where)
                continue
            parts[where] = network
            module._modules[name] = network

    visit(outer, "")
    if not parts:
        raise CaptureError(f"{whole}; no part of it could be captured either" + "".join(
            f"\n  {path}: {reason}" for path, reason in left.items()))
    assembly = Assembly(outer, parts, [str(whole), *(f"{path} stays Python: {reason}" for path, reason in left.items())])
    difference = compare(expected, assembly, args, kwargs)
    if not difference <= tolerance:
        raise CaptureError(f"{whole}; captured in parts ({', '.join(parts)}) it gives other outputs (relative "
                           f"difference {difference:.2e}, allowed {tolerance:.0e})")
    return assembly


def _capture_part(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tolerance: float) -> Network:
    with torch.no_grad():
        expected = child(*args, **kwargs)
    trees.register_dataclasses(expected)
    try:
        return _capture_whole(child, args, kwargs, expected, tolerance, spatial=True)
    except CaptureError:
        return _capture_whole(child, args, kwargs, expected, tolerance)


def _record_calls(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Module path -> the (args, kwargs) of its first call while the model runs on the examples."""
    calls: dict[str, Any] = {}
    handles = []
    for path, module in model.named_modules():
        def hook(_: nn.Module, a: Any, k: Any, path: str = path) -> None:
            calls.setdefault(path, (a, k))

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls
