"""Networks as ONNX models: what is exported of them, and what their inputs and outputs are called."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from featherweight.deploy.onnx import dynamic
from featherweight.deploy.onnx.bags import equal_bags
from featherweight.deploy.onnx.decomposed import decompose_where_needed
from featherweight.deploy.onnx.passes import Passes, suit
from featherweight.deploy.onnx.ready import cut_off, four_axes, slices_of_batch
from featherweight.deploy.onnx.recurrent import plain
from featherweight.deploy.onnx.recurrent.projected import unprojected
from featherweight.deploy.onnx.tables import kept_tables, no_stack_traces, parameters_once, rules_where_they_apply
from featherweight.errors import ExportError
from featherweight.network import Input, Network, trees
from featherweight.network.operators import pools_by_size
from featherweight.network.program import Program
from featherweight.network.traced import by_shape, forgotten

#: how names of tensors begin while they are exported
HELD = "held_tensor_"


class _Flat(nn.Module):
    """The network as a function from tensors to tensors: each output tensor once, numbers as tensors, constants out.

    It holds the tensors itself, without modules between: torch compares each tensor's module with all beside it, which
    takes the square of the layers.
    """

    def __init__(self, network: Network, tell: Callable[[list[dict[str, Any]]], None]) -> None:
        super().__init__()
        self.graph, self.signature, self.tell = network.graph, network.signature, tell
        self.names: dict[str, str] = {}  # name here -> the network's
        persistent = set(network.state_dict(keep_vars=True))
        for name, tensor in network.tensors().items():
            own = f"{HELD}{len(self.names)}"
            self.names[own] = name
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(own, tensor)
            else:
                self.register_buffer(own, tensor, persistent=name in persistent)
        self.held = {name: own for own, name in self.names.items()}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        program = Program(self.graph, training=False)
        given = program.run(lambda name: getattr(self, self.held[name]), list(tensors), {})
        leaves, spec = trees.flatten(trees.unflatten(given, self.signature.out_spec))
        found: dict[int, tuple[str, Tensor]] = {}
        outputs: list[dict[str, Any]] = []
        for leaf, name in zip(leaves, output_names(spec, {i.name for i in self.signature.inputs}), strict=True):
            if isinstance(leaf, Tensor):
                # an input handed through must become a value of its own
                known = found.setdefault(id(leaf), (name, leaf.clone() if any(leaf is t for t in tensors) else leaf))
                outputs.append({"tensor": known[0]})
            elif isinstance(leaf, torch.SymInt):
                found[id(leaf)] = (name, torch.scalar_tensor(leaf, dtype=torch.int64))  # type: ignore[arg-type]
                outputs.append({"number": name})
            elif leaf is None or isinstance(leaf, (bool, int, float, str)):
                outputs.append({"constant": leaf})
            else:
                raise ExportError(f"output {name!r} is a {type(leaf).__name__}; "
                                  "a file can give tensors, numbers and text")
        if not found:
            raise ExportError("the network gives no tensor; there is nothing to run")
        self.tell(outputs)
        return tuple(value for _, value in found.values())


def output_names(spec: trees.Spec, taken: set[str]) -> list[str]:
    """One name per output leaf, after its place in the nest: "output", "output_1", "logits", "boxes_0"."""
    from torch.utils._pytree import tree_flatten_with_path

    names: list[str] = []
    for path, _ in tree_flatten_with_path(trees.unflatten(range(spec.num_leaves), spec))[0]:
        steps = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path]
        name = re.sub(r"\W", "_", "_".join(steps)) or "output"
        name = f"output_{name}" if name[0].isdigit() else name
        while name in taken or name in names:
            name += "_out"
        names.append(name)
    return names


def to_onnx(network: Network, passes: Passes, store: Callable[[Any], None]) -> tuple[Any, list[dict[str, Any]]]:
    """The network as an ``onnx_ir`` model, rewritten by ``passes``, its weights by ``store``; and how the leaves of its
    outputs are found in it. Changes ``network``."""
    for ready in (four_axes, slices_of_batch, equal_bags, cut_off, unprojected):
        ready(network)
    _check_pools(network)
    told: list[list[dict[str, Any]]] = []
    flat = _Flat(network, told.append).eval()
    args, kwargs = network.example_inputs(batch=2)
    inputs = network.signature.inputs
    leaves = trees.flatten((args, kwargs))[0]
    tensors = tuple(v for i, v in enumerate(leaves) if i not in network.signature.constants)
    shapes = tuple({axis: Dim.DYNAMIC for axis, size in enumerate(i.shape) if size is None} for i in inputs)
    try:
        with (_quiet(), parameters_once(), kept_tables(), rules_where_they_apply(), no_stack_traces(), by_shape(),
              torch.no_grad(), forgotten() as programs):
            program = torch.export.export(flat, tensors, dynamic_shapes=(shapes,), strict=False)
            outputs = told[-1]
            programs.append(program)
            decompose_where_needed(program)
            onnx_program = torch.onnx.export(program, dynamo=True, verbose=False, optimize=True,
                                             custom_translation_table=dynamic.TRANSLATIONS | plain.TRANSLATIONS)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(_explain(network, error)) from error
    assert onnx_program is not None
    model = onnx_program.model
    for name, value in list(model.graph.initializers.items()):
        if name in flat.names:
            value.name = f"network.{flat.names[name]}"
    suit(model, passes)
    store(model)
    named = list(dict.fromkeys(o.get("tensor") or o["number"] for o in outputs if "constant" not in o))
    _name_values(model, inputs, named)
    return model, outputs


def _check_pools(network: Network) -> None:
    """Raises ExportError for pooling to a fixed number of cells where sizes beside the batch are free: ONNX has the
    cells of one size alone."""
    pools = [n.meta.get("module") or n.name for n in network.calls() if pools_by_size(n)]
    if pools and any(i.axes for i in network.signature.inputs):
        raise ExportError(f"{', '.join(pools)} pools to a fixed number of cells, which ONNX has for one size of the "
                          "inputs only; capture with fixed sizes: capture(..., dynamic={})")


def _name_values(model: Any, inputs: Sequence[Input], outputs: list[str]) -> None:
    """Gives inputs and outputs the network's names, and their free sizes; and the weights theirs."""
    import onnx_ir

    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if name.startswith("network."):
            value.name = name.removeprefix("network.")
    wanted = {id(v): n for v, n in zip([*graph.inputs, *graph.outputs], [*(i.name for i in inputs), *outputs],
                                              strict=True)}
    clashing = set(wanted.values())
    for node in graph:
        for value in node.outputs:
            if id(value) not in wanted and value.name in clashing:
                value.name = f"{value.name}_inner"
    for value in [*graph.inputs, *graph.outputs]:
        value.name = f"__{wanted[id(value)]}"  # first out of one another's way
    named = {str(value.shape[a.axis]): a.name for value, i in zip(graph.inputs, inputs, strict=True) for a in i.axes}
    for value in [*graph.inputs, *graph.outputs]:
        value.name = wanted[id(value)]
        if value.shape is not None:
            value.shape = onnx_ir.Shape([_axis_name(i, d, named) for i, d in enumerate(value.shape)])


def _axis_name(axis: int, size: Any, named: dict[str, str]) -> Any:
    """A free size of the batch axis is called so, of another by its place, and a number where several sizes have that
    place: a runtime takes sizes of one name for equal. ``named`` holds the names given so far; fixed sizes stay."""
    if isinstance(size, int) or axis == 0:
        return size if isinstance(size, int) else "batch"
    others = sum(name.startswith(f"size_{axis}") for name in named.values())
    return named.setdefault(str(size), f"size_{axis}_{others + 1}" if others else f"size_{axis}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter from printing and warning; what fails is still raised."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _explain(network: Network, error: BaseException) -> str:
    """Which operator of which module could not be exported."""
    causes: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(re.sub(r"\x1b\[\d+m", "", str(cause)))
        cause = cause.__cause__ or cause.__context__
    text = "\n".join(causes)
    reason = next((c.splitlines()[0] for c in reversed(causes) if c.strip()), type(error).__name__)[:300]
    found = re.findall(r"op='([\w.:]+)', overload='(\w+)'", text)
    why = "ONNX has no form of"
    if not found:
        found = re.findall(r"Error when translating node .*target=torch\.ops\.([\w.]+)\.(\w+)\]", text)
        why = f"ONNX does not take ({reason})"
    for op, overload in found:
        name = f"{op.replace('::', '.')}.{overload}"
        nodes = [n for n in network.calls() if str(n.target) == name]
        bare = re.split(r"::|\.", op)[-1].strip("_")  # what the exporter broke a call into often keeps its name
        nodes = nodes or [n for n in network.calls() if bare in str(n.target)]
        if nodes:
            name = str(nodes[0].target)
            places = ", ".join(sorted({n.meta.get("module") or "(top)" for n in nodes})[:5])
            lines = ", ".join(sorted({n.meta["source"] for n in nodes if n.meta.get("source")})[:3])
            return (f"{why} the operator {name}, called in module {places} (at {lines or 'an unknown line'}); "
                    "replace it by operators that ONNX has, or deploy elsewhere")
        return f"{why} the operator {name}; replace it by operators that ONNX has"
    return f"the network cannot be exported to ONNX: {type(error).__name__}: {reason}"
