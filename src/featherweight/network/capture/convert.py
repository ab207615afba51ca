"""From torch's exported program to a Network: the graph copied node by node, the tensors adopted under their names."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from featherweight.errors import CaptureError, FileError
from featherweight.network.capture.export import limits
from featherweight.network.capture.graphs import inline_regions, module_path, source_line, tidy
from featherweight.network.capture.memory import Memory
from featherweight.network.capture.public import PUBLIC
from featherweight.network.capture.source import training_branches
from featherweight.network.file.allowed import written
from featherweight.network.network import Input, Network, Signature
from featherweight.network.operators import is_free, mutates, written_by

aten = torch.ops.aten
#: modules whose training behaviour leaves no trace in a graph captured for evaluation
TRAINING_ONLY = ("StochasticDepth", "DropPath", "DropBlock")


def convert(program: ExportedProgram, model: nn.Module) -> Network:
    """The network that computes what ``program``, exported from ``model``, does. Raises CaptureError."""
    for spec in program.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(f"the model writes into {spec.target!r} in evaluation mode ({spec.kind.name.lower()}); "
                               "a network's forward must not change its buffers or inputs")
    inline_regions(program.graph, lambda name: getattr(program.graph_module, name))
    copier = _Copier(program)
    for node in program.graph.nodes:
        copier.copy(node)
    tidy(copier.graph, copier.constants, _untied(model))
    for node in copier.graph.nodes:
        node.meta.pop("val", None)
    spec = program.call_spec
    network = Network(copier.graph, Signature(spec.in_spec, spec.out_spec, tuple(copier.inputs), copier.fixed))
    _adopt_tensors(network, model, copier.constants)
    _mark_counters(network, model)
    network.notes += _notes(network, model)
    return network


def _untied(model: nn.Module) -> set[str]:
    """The parameters that have one name."""
    named = list(model.named_parameters(remove_duplicate=False))
    times = Counter(id(parameter) for _, parameter in named)
    return {name for name, parameter in named if times[id(parameter)] == 1}


class _Copier:
    """Copies an exported graph into a plain one: inputs become placeholders, tensors names; calls stay as they are."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.specs: dict[str, InputSpec] = {s.arg.name: s for s in program.graph_signature.input_specs}
        self.graph = Graph()
        self.values: dict[Node, Node] = {}
        self.inputs: list[Input] = []
        self.constants: dict[str, Tensor] = {}
        self.fixed: dict[int, Any] = {}
        self.position = 0

    def copy(self, node: Node) -> None:
        if node.op == "placeholder":
            self._placeholder(node, self.specs[node.name])
        elif node.op == "output":
            self.graph.output(tuple(map_arg(node.args[0], self.values.__getitem__)))  # type: ignore[arg-type]
        elif node.op == "call_function":
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                raise CaptureError(f"{source_line(node)}: control flow ({node.target}) cannot be captured")
            _check_known(node)
            made = self.graph.node_copy(node, self.values.__getitem__)
            made.meta = {"module": module_path(node), "source": source_line(node), "val": node.meta.get("val")}
            self.values[node] = made
        elif node.users:
            raise CaptureError(f"a node of kind {node.op} ({node.target}) cannot be captured")

    def _placeholder(self, node: Node, spec: InputSpec) -> None:
        value, target = node.meta.get("val"), str(spec.target)
        if spec.kind is InputKind.USER_INPUT:
            if isinstance(value, Tensor):
                self.values[node] = self.graph.placeholder(node.name)
                self.values[node].meta["val"] = value
                self.inputs.append(_input(node, self.program))
            else:
                self.fixed[self.position] = getattr(spec.arg, "value", value)
                if node.users:
                    raise CaptureError(f"input {node.name!r} is no tensor but is read at run time")
            self.position += 1
            return
        if spec.kind is InputKind.CONSTANT_TENSOR:
            self.constants[target] = self.program.constants[target].detach().clone()
        elif spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
            raise CaptureError(f"input {node.name!r} of kind {spec.kind.name.lower()} is not supported")
        self.values[node] = self.graph.create_node("get_attr", target)
        self.values[node].meta["val"] = value


def _check_known(node: Node) -> None:
    """Raises CaptureError for an operator that no file may name: the network could never be saved."""
    if str(node.target) in PUBLIC:
        return
    try:
        written(node.target)
    except FileError as error:
        place = f"{source_line(node) or 'in forward'}, module {module_path(node) or '(the model itself)'!r}"
        raise CaptureError(f"{place}: {error}; write it with operators of torch") from error


def _input(node: Node, program: ExportedProgram) -> Input:
    value = node.meta["val"]
    shape = tuple(None if is_free(s) else int(s) for s in value.shape)
    return Input(node.name, shape, value.dtype, bool(shape) and shape[0] is None, limits(program, value))


def _adopt_tensors(network: Network, model: nn.Module, constants: dict[str, Tensor]) -> None:
    """Copies of the model's tensors under their own names and in their own order, ties kept; constants beside them,
    outside the state dict."""
    memo: dict[int, Any] = {}
    persistent = set(model.state_dict(keep_vars=True))
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                network.add_tensor(prefix + leaf, copy.deepcopy(parameter, memo),
                                   buffer=not isinstance(parameter, nn.Parameter))
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                network.add_tensor(prefix + leaf, copy.deepcopy(buffer, memo), buffer=True,
                                   persistent=prefix + leaf in persistent)
    for name in sorted({str(n.target) for n in network.graph.nodes if n.op == "get_attr"} & set(constants)):
        network.add_tensor(name, constants[name], buffer=True, persistent=False)
    network.changed()


def _mark_counters(network: Network, model: nn.Module) -> None:
    """Tells batch norms which batch counter is theirs, and whether they average over all batches (no momentum)."""
    known, modules = network.tensors(), dict(model.named_modules(remove_duplicate=False))
    for node in network.calls(aten.batch_norm.default):
        mean = node.args[3]
        if isinstance(mean, Node) and mean.op == "get_attr":
            counter = str(mean.target).removesuffix("running_mean") + "num_batches_tracked"
            if counter in known:
                node.meta["counter"] = counter
                owner = modules.get(counter.rpartition(".")[0])
                if owner is not None and getattr(owner, "momentum", 0.1) is None:
                    node.meta["cumulative"] = True


def _notes(network: Network, model: nn.Module) -> list[str]:
    """What was lost or assumed."""
    notes = []
    notes += [f"asks for self.training in {place}: the graph has what it does in evaluation"
              for place in training_branches(model)]
    lost = sorted(p for p, m in model.named_modules() if type(m).__name__ in TRAINING_ONLY
                  and getattr(m, "p", getattr(m, "drop_prob", True)))
    if lost:
        notes.append(f"acts in training only and is not in the graph: {', '.join(lost)}")
    memory = Memory(network.graph)
    written = sorted({str(b.target) for n in network.calls() if mutates(n) for w in written_by(n)
                      for b in memory.bases(w) if b.op == "get_attr"})
    if written:
        notes.append(f"is written into whenever the network runs: {', '.join(written)}")
    return notes


def size_notes(network: Network) -> list[str]:
    """Which sizes are free, and which are fixed though a user may expect otherwise."""
    inputs = network.signature.inputs
    notes = []
    if not network.signature.dynamic_batch:
        notes.append("the batch size is fixed by the model: inputs must have exactly the examples' shapes")
    notes += [f"the model takes another branch at other sizes: the graph is right for axis {axis} of input {i.name!r} "
              f"{f'from {least}' if least > 1 else ''}{' ' if least > 1 and most else ''}"
              f"{f'up to {most}' if most is not None else ''} alone"
              for i in inputs for axis, least, most in i.limits]
    free: dict[str, list[str]] = {}
    for i in inputs:
        for a in i.axes:
            free.setdefault(f"{a.name} ({a.rule()})", []).append(f"axis {a.axis} of {i.name!r}")
    return notes + [f"is free beside the batch: {name}: {', '.join(places)}" for name, places in free.items()]
