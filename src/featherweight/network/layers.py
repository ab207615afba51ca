"""The layers of a network: every stored weight with the calls that read it, and the one way to name layers.

Patterns (``ignore=(...)`` of every step, keys of ``mixed``) are those of file names: ``*`` stands for any letters, dots
too. A pattern fits a layer by

- a name of its weight: "features.0.weight" (any of the names that tied weights share),
- the path of its module, or of any module around it: "features.0", "features", "feat*" (all of it),
- the name of a call's node in the graph: "conv2d_3".

"features" therefore means all that lies under ``features``, as "features.*" does. Where a step chooses something larger
than a layer (channels that several layers make, blocks), a pattern fits it by any layer in it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import Parameter

from featherweight.network.edit import CONVOLUTIONS, readers_of, weight_name
from featherweight.network.network import Network

aten = torch.ops.aten

#: recurrent calls, and which of their arguments lists the weights (matrices) and biases
RECURRENT = {aten.lstm.input: 2, aten.gru.input: 2, aten.rnn_tanh.input: 2, aten.rnn_relu.input: 2}
#: products that read matrices, most of them stacked (experts, [g, i, o]), and which of their arguments may be stored
STACKED: dict[Any, tuple[int, ...]] = {
    aten.bmm.default: (0, 1), aten.baddbmm.default: (1, 2), aten.matmul.default: (0, 1), aten.mv.default: (0,),
    aten.einsum.default: (1,), aten.index.Tensor: (0,), aten.index_select.default: (0,), aten.bilinear.default: (2,),
}
#: operator -> the kind of the layers that it computes
KINDS: dict[Any, str] = {
    aten.linear.default: "linear",
    **dict.fromkeys(CONVOLUTIONS, "convolution"),
    aten.embedding.default: "embedding",
    aten.embedding_bag.padding_idx: "embedding",
    **dict.fromkeys(RECURRENT, "recurrent"),
    **dict.fromkeys(STACKED, "stacked"),
}
#: those that have one matrix, [g, o, i] (``network/matrices``)
DENSE = ("linear", "convolution")
EVERY = (*DENSE, "embedding", "recurrent")
#: all whose weights can be stored in another form, or be partly zero
STORABLE = (*EVERY, "stacked")

COMPUTED = "its weight is computed, not stored (or stored in another form already)"
APART = "its weight is read along different axes"
NOT_FINITE = "its weight is empty or not finite"


@dataclass(frozen=True)
class Skipped:
    """Something that a plan left as it was, and why: nothing is skipped in silence.

    Example:
        >>> plan = fw.prune.Channels(macs=0.5, ignore=("3",)).plan(network, task)
        >>> [str(skipped.path) for skipped in plan.skipped]
        [...]
    """

    path: str
    reason: str


@dataclass(frozen=True)
class Layer:
    """A stored weight and the calls that read it.

    weight: its name; names: all of them, where it is tied. calls: in graph order. path: of its module. kind: a value of
    ``KINDS``, of the first call. known: what a pattern may fit (see above).
    """

    weight: str
    names: tuple[str, ...]
    calls: tuple[Node, ...]
    path: str
    kind: str
    known: frozenset[str]

    def fits(self, pattern: str) -> bool:
        """Whether ``pattern`` names this layer."""
        return fits(self.known, pattern)


@dataclass(frozen=True)
class Selection:
    """The layers that a step may work on, in graph order; ``skipped``: all others, with why.

    seen: what each of both is known by.
    """

    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]
    seen: tuple[frozenset[str], ...]

    def unmatched(self, patterns: Iterable[str], option: str) -> list[Skipped]:
        """The patterns of a step's ``option`` that fit nothing."""
        return [unmatched(p, option, "layer") for p in patterns if not any(fits(known, p) for known in self.seen)]


def select(network: Network, ignore: Sequence[str] = (), kinds: Sequence[str] = DENSE) -> Selection:
    """The layers of these ``kinds`` whose weight is stored in floating point and that no pattern of ``ignore`` names.

    Skipped are, by the name of the weight: layers that ``ignore`` names, integer weights, and parameters of two or more
    axes that no call of these kinds reads; by module path: calls whose weight is computed; and patterns that fit
    nothing.
    """
    layers, computed = _layers(network, kinds)
    known = [_Known(layer.weight, layer.known, _unusable(layer, network.tensor(layer.weight))) for layer in layers]
    known += [_Known(path_of(node), known_by((), [node]), COMPUTED) for node in computed]
    known += _matrices(network, {name for layer in layers for name in layer.names}, kinds)
    reasons = [ignored(one.names, ignore) or one.reason for one in known]
    found = Selection(tuple(layer for layer, reason in zip(layers, reasons, strict=False) if not reason), (),
                      tuple(one.names for one in known))
    skipped = [Skipped(one.path, reason) for one, reason in zip(known, reasons, strict=True) if reason]
    return replace(found, skipped=tuple(dict.fromkeys([*skipped, *found.unmatched(ignore, "ignore")])))


@dataclass(frozen=True)
class _Known:
    """A weighted call, or a parameter: what it is called, what a pattern may fit, why it is no layer ("": it is)."""

    path: str
    names: frozenset[str]
    reason: str


def _layers(network: Network, kinds: Sequence[str]) -> tuple[list[Layer], list[Node]]:
    """The stored weights that calls of these kinds read, in graph order; and the calls that compute theirs."""
    names = names_of(network)
    first: dict[tuple[str, ...], str] = {}
    calls: dict[str, list[Node]] = {}
    computed: dict[Node, None] = {}
    for node in network.calls(*(target for target, kind in KINDS.items() if kind in kinds)):
        for name in read_weights(network, node):
            if name is None:
                computed[node] = None
            else:
                calls.setdefault(first.setdefault(names[name], name), []).append(node)
    layers = [Layer(name, names[name], tuple(mine), name.rpartition(".")[0] or path_of(mine[0]),
                    KINDS[mine[0].target], known_by(names[name], mine)) for name, mine in calls.items()]
    return layers, list(computed)


def _matrices(network: Network, taken: Collection[str], kinds: Sequence[str]) -> list[_Known]:
    """The parameters of two or more axes that are not ``taken``."""
    found = []
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1 and name not in taken:
            readers = readers_of(network, name)
            found.append(_Known(name, known_by(network.tied_names(name), readers), _no_layer(readers, kinds)))
    return found


def calls_of(network: Network) -> dict[str, list[Node]]:
    """Weight's name -> the linear and convolution calls that read it, in order; a tied one under its first."""
    return {layer.weight: list(layer.calls) for layer in select(network).layers}


def names_of(network: Network) -> dict[str, tuple[str, ...]]:
    """Tensor's name -> all names of the tensor."""
    tied: dict[int, list[str]] = {}
    tensors = network.tensors()
    for name, tensor in tensors.items():
        tied.setdefault(id(tensor), []).append(name)
    return {name: tuple(tied[id(tensor)]) for name, tensor in tensors.items()}


def read_weights(network: Network, node: Node) -> list[str | None]:
    """The names of the stored weights of a call that is in ``KINDS``, None where one is computed: one, but of a
    recurrent call, which has several matrices, and of a call of ``STACKED``, which may have none."""
    if node.target in RECURRENT:
        listed: Any = node.args[RECURRENT[node.target]]
        stored = [str(n.target) if n.op == "get_attr" else None for n in listed]
        return [name for name in stored if name is None or network.tensor(name).dim() == 2]
    if KINDS[node.target] == "embedding":
        table = node.args[0]
        return [str(table.target) if isinstance(table, Node) and table.op == "get_attr" else None]
    if node.target in STACKED:
        return list(_stacked(network, node))
    return [weight_name(node)]


def _stacked(network: Network, node: Node) -> Iterator[str]:
    """The parameters of two or more axes that a product with stacked matrices reads, or takes some of them from."""
    for index in STACKED[node.target]:
        given: Any = node.args[index]
        for one in given if isinstance(given, (list, tuple)) else [given]:
            if isinstance(one, Node) and one.op == "get_attr":
                tensor = network.tensor(str(one.target))
                if isinstance(tensor, Parameter) and tensor.dim() > 1:
                    yield str(one.target)


def path_of(node: Node) -> str:
    """The path of the module that a call came from; the node's name where that is the network itself."""
    return str(node.meta.get("module") or node.name)


# ---- patterns
def known_by(names: Iterable[str], calls: Iterable[Node]) -> frozenset[str]:
    """What a pattern may fit of a layer with these names of its weight and these calls."""
    names, calls = list(names), list(calls)
    stems = [n.removesuffix("weight").rstrip(".") for n in names]  # of "attention.in_proj_weight" as well
    paths = [*(n.rpartition(".")[0] for n in names), *(str(c.meta.get("module", "")) for c in calls)]
    return frozenset([*names, *stems, *(c.name for c in calls), *(p for path in paths for p in around(path))]) - {""}


def around(path: str) -> list[str]:
    """A module's path and the paths of the modules around it: "a.b.c", "a.b", "a"."""
    steps = path.split(".")
    return [".".join(steps[:i]) for i in range(len(steps), 0, -1)]


def fits(known: Iterable[str], pattern: str) -> bool:
    """Whether ``pattern`` fits one of the names that something is known by."""
    return any(fnmatchcase(name, pattern) for name in known)


# ---- why not
def ignored(known: Iterable[str], patterns: Iterable[str]) -> str:
    """"" where no pattern of ``ignore`` fits; else the reason."""
    hit = next((p for p in patterns if fits(known, p)), None)
    return "" if hit is None else f"named in ignore={hit!r}"


def unmatched(pattern: str, option: str, what: str) -> Skipped:
    """What is said of a pattern that fits nothing."""
    return Skipped(pattern, f"this pattern of {option} matched no {what}")


def _unusable(layer: Layer, weight: Tensor) -> str:
    if layer.kind == "linear" and weight.dim() != 2:
        return f"its weight has {weight.dim()} axes: expected 2"
    return no_float(weight)


def no_float(weight: Tensor, expected: torch.dtype | None = None) -> str:
    """Why a weight holds no floating-point numbers (of the type ``expected``, if one is); "" where it does."""
    if weight.is_floating_point() if expected is None else weight.dtype == expected:
        return ""
    wanted = "floating point" if expected is None else str(expected).removeprefix("torch.")
    return f"its weight holds {str(weight.dtype).removeprefix('torch.')} values: expected {wanted}"


def not_finite(weight: Tensor) -> str:
    """Why a weight has no values to work with; "" where it has."""
    return "" if weight.numel() and bool(torch.isfinite(weight).all()) else NOT_FINITE


def _no_layer(readers: Sequence[Node], kinds: Sequence[str]) -> str:
    """Why a parameter is the weight of no layer of these kinds: who reads it instead."""
    if not readers:
        return "no call reads it"
    others = ", ".join(sorted({str(n.target) for n in readers}))
    return f"it is read by {others}, by no {', '.join(kinds[:-1])} or {kinds[-1]} call"
