"""``Structured``: linear layers and 1 x 1 convolutions as structured matrices, which have fewer parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Node

from featherweight.errors import PlanError, did_you_mean
from featherweight.factorize.surgery import AXES, PLAIN, groups_of, stem
from featherweight.judge.costs import alone, growth
from featherweight.network import Network
from featherweight.network.edit import (
    TRANSPOSED,
    clear_dead,
    insert_call,
    read_tensors,
    readers_of,
    tensor_node,
    turned,
)
from featherweight.network.layers import Layer, not_finite, select
from featherweight.network.operators import schema_argument
from featherweight.numerics.factors import structured as matrices
from featherweight.steps import Plan, Rewrite, Skipped, Stage
from featherweight.steps.options import COUNT, check_known, check_numbers
from featherweight.task import Task

aten = torch.ops.aten
#: (network, call, stem of the names, matrix [o, i], the plan's numbers) -> the node that gives what the call gave
Build = Callable[[Network, Node, str, Tensor, "Shaped"], Node]


@dataclass(frozen=True)
class Shaped:
    """One layer as a structured matrix. error: |W' - W|^2 / |W|^2."""

    weight: str
    shape: tuple[int, ...]
    form: str
    blocks: int
    terms: int
    error: float


@dataclass(frozen=True)
class StructuredPlan(Plan):
    """Which layers become structured matrices. The nearest ones are computed by ``apply``: they need no data.

    Example:
        >>> wide = fw.capture(nn.Linear(64, 64), torch.zeros(2, 64))
        >>> [layer.form for layer in fw.factorize.Structured("monarch", blocks=4).plan(wide, fw.Task()).layers]
        ['monarch']
    """

    kind: ClassVar[str] = "factorize.structured/1"
    layers: tuple[Shaped, ...] = ()

    def apply(self, network: Network) -> Network:
        """A copy with these layers in their forms; PlanError where a layer is not as planned."""
        changed = network.copy()
        before = read_tensors(changed)
        known = {layer.weight: layer for layer in select(changed).layers}
        for shaped in self.layers:
            if shaped.weight not in known:
                raise PlanError(f"the plan shapes {shaped.weight!r}, which no linear or convolution call here reads; "
                                f"{did_you_mean(shaped.weight, known)}")
            weight = changed.tensor(shaped.weight)
            if tuple(weight.shape) != shaped.shape or refusal(changed, known[shaped.weight], shaped.blocks):
                raise PlanError(f"the plan shapes {shaped.weight!r} of shape {list(shaped.shape)}; it is "
                                f"{list(weight.shape)} here, or read in another way: plan again on this network")
            put(changed, known[shaped.weight], shaped)
        clear_dead(changed, before)
        return changed

    def summary(self) -> str:
        shown = ", ".join(f"{stem(s.weight).rstrip('.')} {s.form}" for s in self.layers)
        return f"structured matrices: {len(self.layers)} layers" + (f" ({shown})" if shown else "")


@dataclass(frozen=True)
class Structured(Rewrite):
    """Linear layers and 1 x 1 convolutions as the nearest structured matrices; retraining is to follow.

    form: "monarch", two block-diagonal matrices with a shuffle between, as two grouped convolutions (Dao et al. 2022).
        "kronecker", a sum of ``terms`` Kronecker products, as two small linear layers (linear layers alone).
        "circulant", circulant blocks (Ding et al. 2017): fewer parameters, as many MACs, since the whole matrix is made
        of them.
    blocks: monarch: blocks of each factor; kronecker: rows and columns of the first factor; circulant: size of a block.
        Must divide both widths of a layer.
    ignore: patterns of layers to leave alone (``network/layers``).

    A layer that would not become smaller is left and named. Raises RecipeError for options that make no sense.

    Example:
        >>> wide = fw.capture(nn.Linear(64, 64), torch.zeros(2, 64))
        >>> small = fw.factorize.Structured("monarch", blocks=4).plan(wide, fw.Task()).apply(wide)
        >>> fw.measure.params(small) < fw.measure.params(wide) / 6
        True
    """

    form: str = "monarch"
    blocks: int = 4
    terms: int = 1
    ignore: tuple[str, ...] = ()
    stage: ClassVar[Stage] = Stage.STRUCTURE

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        check_known("Structured", "form", self.form, FORMS)
        check_numbers(self, {"blocks": COUNT, "terms": COUNT})

    def plan(self, network: Network, task: Task) -> StructuredPlan:
        """Reads no data."""
        self.check()
        selected = select(network, self.ignore)
        found, skipped = [], list(selected.skipped)
        for layer in selected.layers:
            reason, shaped = self._judged(network, layer)
            if shaped is None:
                skipped.append(Skipped(layer.weight, reason))
            else:
                found.append(shaped)
        return StructuredPlan(tuple(found), skipped=tuple(skipped))

    def _judged(self, network: Network, layer: Layer) -> tuple[str, Shaped | None]:
        """Why a layer stays, or ("", what it becomes)."""
        if reason := refusal(network, layer, self.blocks):
            return reason, None
        weight = network.tensor(layer.weight).detach()
        if self.form == "kronecker" and layer.calls[0].target is not aten.linear.default:
            return "a convolution takes no Kronecker product", None
        terms = min(self.terms, self.blocks ** 2, weight.numel() // self.blocks ** 2)
        away = nearest(self.form, weight.flatten(1), self.blocks, terms) - weight.flatten(1)
        error = float(away.double().square().sum() / weight.double().square().sum())
        shaped = Shaped(layer.weight, tuple(weight.shape), self.form, self.blocks, terms, error)
        before = alone(network, layer.weight)
        after = StructuredPlan((shaped,)).apply(before)
        grown = growth(before, after)
        return (f"as {self.form} its {', '.join(grown)} would grow", None) if grown else ("", shaped)


def refusal(network: Network, layer: Layer, blocks: int) -> str:
    """Why a layer takes no structured matrix; "" if it does."""
    call, weight = layer.calls[0], network.tensor(layer.weight)
    if call.target in TRANSPOSED or groups_of(call) > 1 or weight[0, 0].numel() > 1 or turned(call):
        return "neither a linear layer nor a 1 x 1 convolution"
    if len(layer.calls) > 1 or len(layer.names) > 1 or len(readers_of(network, layer.weight)) > 1:
        return "its weight is shared or tied"
    if isinstance(schema_argument(call, "padding") if call.target in AXES else 0, str):
        return "its padding is a word"
    if any(size % blocks for size in weight.shape[:2]):
        return f"blocks={blocks} does not divide its widths {list(weight.shape[:2])}"
    if reason := not_finite(weight):
        return reason
    if not weight.any():
        return "its weight is all zero"
    if layer.weight in network.patterns:
        return f"its zeros are kept ({network.patterns[layer.weight]}); factors would fill them"
    taken = [n for part in ("reduce", "expand", "columns") if (n := f"{stem(layer.weight)}{part}.weight")
             in network.tensors()]
    return f"the name {taken[0]} is taken" if taken else ""


def nearest(form: str, matrix: Tensor, blocks: int, terms: int) -> Tensor:
    """The structured matrix [o, i] that is nearest to a matrix."""
    wide = matrix.double()
    if form == "monarch":
        return matrices.of_monarch(*matrices.monarch(wide, blocks)).to(matrix.dtype)
    if form == "kronecker":
        return matrices.of_kronecker(*matrices.kronecker(wide, blocks, blocks, terms)).to(matrix.dtype)
    return matrices.of_circulant(matrices.circulant(wide, blocks)).to(matrix.dtype)


# ---- the graph
def put(network: Network, layer: Layer, shaped: Shaped) -> None:
    """Puts a structured matrix in the place of a layer."""
    call = layer.calls[0]
    matrix = network.tensor(layer.weight).detach().flatten(1).double()
    made = FORMS[shaped.form](network, call, stem(layer.weight), matrix, shaped)
    call.replace_all_uses_with(made)
    network.graph.erase_node(call)


def _stored(network: Network, call: Node, name: str, value: Tensor) -> Node:
    """The node of a new tensor in the place of the call's weight, trained if that is."""
    old = network.tensor(str(call.args[1].target))  # type: ignore[union-attr]
    value = value.to(old.dtype).contiguous()
    trains = isinstance(old, nn.Parameter) and old.requires_grad
    network.add_tensor(name, nn.Parameter(value, requires_grad=trains) if isinstance(old, nn.Parameter) else value,
                       buffer=not isinstance(old, nn.Parameter))
    return tensor_node(network, name, call)


def _monarch(network: Network, call: Node, name: str, matrix: Tensor, shaped: Shaped) -> Node:
    """Two grouped 1 x 1 convolutions with a shuffle of channels between; of a linear layer on [samples, i, 1]."""
    axes = AXES.get(call.target, 0)
    ones = [1] * max(axes, 1)
    right, left = matrices.monarch(matrix, shaped.blocks)
    first = _stored(network, call, f"{name}reduce.weight", right.view(*right.shape, *ones))
    second = _stored(network, call, f"{name}expand.weight", left.view(*left.shape, *ones))

    def make(target: Any, *args: Any) -> Node:
        return insert_call(network, target, args, before=call, like=call)

    blocks, bias = shaped.blocks, schema_argument(call, "bias")
    x, convolution = call.args[0], PLAIN[max(axes, 1)]
    if axes:
        options = [_list(schema_argument(call, o), axes) for o in ("stride", "padding", "dilation")]
        x = make(convolution, x, first, None, *options, blocks)
        x = make(aten.channel_shuffle.default, x, blocks)
        return make(convolution, x, second, bias, ones, [0] * axes, ones, blocks)
    whole = make(aten.unsqueeze.default, make(aten.reshape.default, x, [-1, matrix.shape[1]]), -1)
    x = make(convolution, whole, first, None, [1], [0], [1], blocks)
    x = make(aten.transpose.int, make(aten.reshape.default, x, [-1, blocks, blocks]), 1, 2)
    x = make(aten.reshape.default, x, [-1, blocks * blocks, 1])
    x = make(convolution, x, second, bias, [1], [0], [1], blocks)
    return _shaped_as(network, call, x, matrix.shape[0])


def _shaped_as(network: Network, call: Node, x: Node, width: int) -> Node:
    """[samples, width, 1] in the axes of what a linear call gave."""
    value = network.values(1)[call.name]
    inner = list(value.shape[1:-1])  # all but the samples are fixed
    lead = [-1, *inner, width] if value.dim() > 1 else [width]
    return insert_call(network, aten.reshape.default, (x, lead), before=call, like=call)


def _kronecker(network: Network, call: Node, name: str, matrix: Tensor, shaped: Shaped) -> Node:
    """y = sum over t of A_t X B_t^T with X the input as [blocks, i / blocks]: two small linear layers."""
    a, b = matrices.kronecker(matrix, shaped.blocks, shaped.blocks, shaped.terms)
    terms, rows, columns = a.shape
    outputs = b.shape[1]
    first = _stored(network, call, f"{name}reduce.weight", b.reshape(terms * outputs, -1))
    second = _stored(network, call, f"{name}expand.weight", a.permute(1, 2, 0).reshape(rows, columns * terms))

    def make(target: Any, *args: Any) -> Node:
        return insert_call(network, target, args, before=call, like=call)

    x = make(aten.reshape.default, call.args[0], [-1, columns, matrix.shape[1] // columns])
    x = make(aten.linear.default, x, first)
    x = make(aten.reshape.default, x, [-1, columns * terms, outputs])
    x = make(aten.linear.default, make(aten.transpose.int, x, 1, 2), second)
    x = make(aten.transpose.int, x, 1, 2)
    x = _shaped_as(network, call, x, matrix.shape[0])
    bias = schema_argument(call, "bias")
    return x if bias is None else make(aten.add.Tensor, x, bias)


def _circulant(network: Network, call: Node, name: str, matrix: Tensor, shaped: Shaped) -> Node:
    """The same call, its weight made of the first columns."""
    columns = matrices.circulant(matrix, shaped.blocks)
    own = _stored(network, call, f"{name}columns.weight", columns)
    place = f"{name}columns.place"
    network.add_tensor(place, matrices.wrapped(shaped.blocks).flatten(), buffer=True)

    def make(target: Any, *args: Any) -> Node:
        return insert_call(network, target, args, before=call, like=call)

    size = shaped.blocks
    blocks = make(aten.index_select.default, own, 2, tensor_node(network, place, call))
    blocks = make(aten.reshape.default, blocks, [*columns.shape[:2], size, size])
    turned_ = make(aten.permute.default, blocks, [0, 2, 1, 3])
    weight = make(aten.reshape.default, turned_, list(shaped.shape))
    return make(call.target, call.args[0], weight, *call.args[2:])


def _list(value: Any, axes: int) -> list[int]:
    found: Sequence[int] = [value] if isinstance(value, int) else list(value)
    return list(found) * (axes // len(found))


#: name -> what puts it into a graph
FORMS: dict[str, Build] = {"monarch": _monarch, "kronecker": _kronecker, "circulant": _circulant}

__all__ = ["Shaped", "Structured", "StructuredPlan"]
