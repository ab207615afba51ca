"""A network layer by layer: who holds the weights, who does the work."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from featherweight.deploy.profile import KernelTime, works
from featherweight.measure.macs import macs
from featherweight.measure.weights import Weight, weights
from featherweight.network import Network
from featherweight.network.edit import constant_nodes

#: a runtime's operator whose kernels the exporter names otherwise than the call -> in the name of the call's operator
KINDS = {"ConvTranspose": "conv_transpose", "LSTM": "lstm", "GRU": "gru", "RNN": "rnn"}


@dataclass(frozen=True)
class LayerFigures:
    """One call of an operator that holds weights or does MACs.

    ``path`` is the module it came from, ``weight`` the stored tensor behind its largest weight. ``params``,
    ``nonzeros`` and ``bytes`` (as stored, scales and codebooks included) sum over all its weights; a weight that
    several calls read stands with the first of them. ``macs`` is per sample; None where the operator is not counted.
    ``output`` is the shape for a batch of one. ``seconds``: of its kernels in a deployed file, where that was profiled.

    Example:
        >>> layer = fw.measure.layers(network)[0]
        >>> layer.path, layer.shape, layer.dtype
        ('0', (8, 1, 3, 3), 'float32')
    """

    path: str
    operator: str
    weight: str | None
    shape: tuple[int, ...] | None
    params: int
    nonzeros: int
    macs: int | None
    bytes: int
    dtype: str | None
    output: tuple[int, ...] | None
    node: str
    seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def layers(network: Network) -> tuple[LayerFigures, ...]:
    """The calls that hold weights or do MACs, in the order in which they run.

    Example:
        >>> [(layer.path, layer.params, layer.macs) for layer in fw.measure.layers(network) if layer.macs]
        [('0', 72, 4608), ('3', 1168, 73728), ('7', 260, 256)]
    """
    counted = macs(network)
    uncounted = set(counted.uncounted)
    constant = constant_nodes(network)
    values = network.values(1)
    order = {node: i for i, node in enumerate(network.graph.nodes)}
    held: dict[Node, list[Weight]] = {}
    for weight in weights(network):
        readers = _readers(weight.node, constant)
        if readers:
            held.setdefault(min(readers, key=order.__getitem__), []).append(weight)
    rows = []
    for node in network.calls():
        unknown = f"{node.meta.get('module') or node.name} ({node.target})" in uncounted
        if node in held or node.name in counted.by_node or unknown:
            rows.append(_row(node, held.get(node, []), None if unknown else counted.by_node.get(node.name, 0), values))
    return tuple(rows)


def _readers(node: Node, constant: set[Node]) -> list[Node]:
    """The calls on data that read a constant, directly or through other constants."""
    found: list[Node] = []
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if user in constant:
                stack.append(user)
            elif user.op == "call_function":
                found.append(user)
    return found


def _row(node: Node, held: list[Weight], counted: int | None, values: dict[str, Any]) -> LayerFigures:
    main = max(held, key=lambda w: w.numel, default=None)
    result = values.get(node.name)
    if isinstance(result, (tuple, list)):
        result = next((r for r in result if isinstance(r, Tensor)), None)
    return LayerFigures(
        path=str(node.meta.get("module") or ""), operator=str(node.target),
        weight=main.name if main else None, shape=main.shape if main else None,
        params=sum(w.numel for w in held), nonzeros=sum(w.nonzeros for w in held), macs=counted,
        bytes=sum(w.bytes for w in held), dtype=main.dtype if main else None,
        output=tuple(map(int, result.shape)) if isinstance(result, Tensor) else None, node=node.name)


@dataclass(frozen=True)
class Profile:
    """How long the kernels of a deployed file take by the runtime's own profile: the layers' figures with ``seconds``,
    and those of kernels between layers (sums, pools, roundings, changes of layout)."""

    layers: tuple[LayerFigures, ...]
    between_s: float


def profiled(network: Network, kernels: Sequence[KernelTime]) -> Profile:
    """Every kernel's time, given to the layer that it stands for, if its operator is one that holds weights or does
    MACs: one of the kernel's calls, else the next layer whose weight it reads; of kernels in KINDS the next layer of
    that kind."""
    rows = {row.node: row for row in layers(network)}
    seconds: dict[str, float] = {}
    between = 0.0
    for kernel in kernels:
        call = None
        if works(kernel.operator):
            reading = (n for n, row in rows.items() if row.weight in kernel.weights and n not in seconds)
            call = next((name for name in kernel.calls if name in rows), next(reading, None))
        kind = next((own for name, own in KINDS.items() if name in kernel.operator), None)
        if call is None and kind is not None:
            call = next((name for name, row in rows.items() if kind in row.operator and name not in seconds), None)
        if call is None:
            between += kernel.seconds
        else:
            seconds[call] = seconds.get(call, 0.0) + kernel.seconds
    return Profile(tuple(dataclasses.replace(row, seconds=seconds.get(name)) for name, row in rows.items()), between)
