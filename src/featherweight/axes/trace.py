"""One walk over a graph, and the bookkeeping that says which elements of axes live and die together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.fx import Node

from featherweight.axes.labels import Cost, Field, Frozen, Ints, Labels, Shuffle, Value
from featherweight.network import Network


class Trace:
    """One walk over a graph: atoms handed out, unions, freezes and costs collected; solved once at the end."""

    def __init__(self, network: Network, batch: int = 3, heads: str = "whole") -> None:
        self.network, self.heads = network, heads
        self.batch = batch if network.signature.dynamic_batch else 1
        self.shapes = network.values(batch)
        self.values: dict[str, Value] = {}
        self.count = 0
        self.pairs: list[tuple[Ints, Ints]] = []
        self.frozen: list[Frozen] = []
        self.grids: list[Ints] = []
        #: tensor (canonical name) -> one array of atoms per axis, None for axes of length 1
        self.tensors: dict[str, tuple[Ints | None, ...]] = {}
        #: (tensor, axis) that make channels -> the module paths that use them so, in order
        self.producers: dict[tuple[str, int], list[str]] = {}
        #: tensor -> "weight", "norm", "bias" or "statistic"
        self.roles: dict[str, str] = {}
        #: stored tensor -> the node of the weight that is computed from it, where both have one shape
        self.computed: dict[str, str] = {}
        self.joined: list[Ints] = []
        self.blocks: list[tuple[Ints, str]] = []
        self.costs: list[Cost] = []
        #: last node of a chain of views -> the reordering that it is
        self.shuffles: dict[str, Shuffle] = {}
        self._canonical: dict[int, str] = {}

    # ---- atoms
    def fresh(self, count: int) -> Ints:
        self.count += count
        return np.arange(self.count - count, self.count, dtype=np.int64)

    def unite(self, a: Ints, b: Ints) -> None:
        """Positions of ``a`` live and die with the positions of ``b`` (shapes broadcast)."""
        a, b = np.broadcast_arrays(a, b)
        self.pairs.append((a.ravel(), b.ravel()))

    def unite_along(self, atoms: Ints, axis: int) -> Ints:
        """All positions along ``axis`` live and die together; gives the first of each."""
        first = atoms.take([0], axis=axis)
        self.unite(atoms, first)
        return first.squeeze(axis)

    def freeze(self, what: Labels | Field | Ints | None, node: Node, reason: str) -> None:
        """These positions are never cut, because of ``reason`` at ``node``."""
        if isinstance(what, Labels):
            for f in what.fields:
                self.freeze(f.atoms, node, reason)
        elif isinstance(what, Field):
            self.freeze(what.atoms, node, reason)
        elif what is not None:
            text = reason if node.op == "output" else f"{operator_name(node)}: {reason}"
            self.frozen.append(Frozen(what.ravel(), path_of(node), text))

    # ---- values
    def of(self, argument: Any) -> Labels | None:
        """The labels of an argument; None if it is no tensor."""
        found = self.values.get(argument.name) if isinstance(argument, Node) else None
        return found if isinstance(found, Labels) else None

    def shape(self, node: Node) -> tuple[int, ...]:
        return tuple(int(s) for s in self.shapes[node.name].shape)

    def plain(self, node: Node) -> Value:
        """What ``node`` gives, without any labels."""
        value = self.shapes[node.name]
        if isinstance(value, Tensor):
            return Labels(tuple(int(s) for s in value.shape))
        if isinstance(value, (tuple, list)):
            return [Labels(tuple(map(int, v.shape))) if isinstance(v, Tensor) else Labels(()) for v in value]
        return None

    def stored(self, name: str) -> Labels:
        """The labels of a stored tensor: the same under all its names, every axis longer than 1 labelled."""
        tensor = self.network.tensor(name)
        known = self._canonical.setdefault(id(tensor), name)
        if known not in self.tensors:
            self.tensors[known] = tuple(self.fresh(s) if s > 1 else None for s in tensor.shape)
        fields = tuple(Field((d,), a) for d, a in enumerate(self.tensors[known]) if a is not None)
        return Labels(tuple(tensor.shape), fields, stored=True)

    def canonical(self, argument: Any) -> str | None:
        """The name under which the tensor read by a ``get_attr`` node is kept here."""
        if isinstance(argument, Node) and argument.op == "get_attr":
            return self._canonical[id(self.network.tensor(str(argument.target)))]
        return None

    def role(self, argument: Any, role: str, node: Node, out: int | None = None, computed: bool = False) -> None:
        """Notes what a stored tensor is for, and which of its axes makes channels. computed: also where inputs of the
        network have a share in the value (a weight for each sample)."""
        name = self.canonical(argument)
        if name is None:
            name, out = self._source(argument, out, computed)
            value = self.of(argument)
            if name and value is not None and value.stored and value.shape == self.network.tensor(name).shape:
                self.computed.setdefault(name, argument.name)
        if name is None:
            return
        self.roles.setdefault(name, role)
        if out is not None:
            path, owner = path_of(node), name.rpartition(".")[0]
            path = owner if owner and owner.startswith(path) else path or name
            self.producers.setdefault((name, out), []).append(path)

    def _source(self, argument: Any, out: int | None, computed: bool) -> tuple[str | None, int | None]:
        """The stored tensor and its axis that become axis ``out`` of a value computed from stored tensors."""
        x = self.of(argument)
        f = x.field(out) if x is not None and (x.stored or computed) and out is not None else None
        if f is not None:
            low, high = int(f.atoms.min()), int(f.atoms.max())
            for name, axes in self.tensors.items():
                for d, own in enumerate(axes):
                    if own is not None and own[0] <= low and high <= own[-1]:
                        return name, d
        return None, None

    def axis(self, x: Labels | None, dim: int, node: Node) -> Ints | None:
        """The atoms along one axis; a field over several axes is frozen there."""
        if x is None:
            return None
        f = x.field(dim % max(len(x.shape), 1))
        if f is None:
            return None
        if len(f.dims) == 1:
            return f.atoms
        self.freeze(f, node, "the axis is one of several that a view made of one")
        return None

    def rest(self, x: Labels, dims: Sequence[int]) -> tuple[Field, ...]:
        """The fields that touch none of ``dims``."""
        return tuple(f for f in x.fields if not set(f.dims) & set(dims))

    def untouchable(self, x: Labels, dims: Sequence[int], node: Node, reason: str) -> tuple[Field, ...]:
        """Freezes the fields that touch ``dims``; gives the others."""
        for f in x.fields:
            if set(f.dims) & set(dims):
                self.freeze(f, node, reason)
        return self.rest(x, dims)

    def part(self, x: Labels, dim: int, node: Node) -> Labels:
        """Axes that a view split off one another (heads and their width) part ways at axis ``dim``. Heads that go whole
        leave ``dim`` as it is; where the width goes, every head loses the same positions."""
        fields: list[Field | None] = []
        for f in x.fields:
            if dim not in f.dims or len(f.dims) == 1:
                fields.append(f)
            elif self.heads == "whole":
                fields.append(self._together(f, dim, node))
            else:
                rows = f.atoms.reshape(-1, f.atoms.shape[-1])
                self.blocks.append((rows.ravel(), f"{path_of(node)}: the same positions in each of {len(rows)} heads"))
                fields.append(simplify(self, Field(f.dims[-1:], self.unite_along(rows, 0)), node))
        return Labels(x.shape, tuple(f for f in fields if f is not None), x.stored)

    def whole(self, x: Labels, dim: int, node: Node, reason: str) -> Labels:
        """Axis ``dim`` stays as it is: of axes that a view split off one another all positions along it go together;
        channels of its own are frozen, because of ``reason``."""
        fields: list[Field | None] = []
        for f in x.fields:
            if dim not in f.dims:
                fields.append(f)
            elif len(f.dims) == 1:
                self.freeze(f, node, reason)
            else:
                fields.append(self._together(f, dim, node))
        return Labels(x.shape, tuple(f for f in fields if f is not None), x.stored)

    def _together(self, f: Field, dim: int, node: Node) -> Field | None:
        """The field without axis ``dim``, along which all positions go together."""
        i = f.dims.index(dim)
        return simplify(self, Field(f.dims[:i] + f.dims[i + 1:], self.unite_along(f.atoms, i)), node)

    def summed(self, x: Labels, dim: int, node: Node) -> Labels:
        """The labels of what is left when axis ``dim`` is summed over: what is cut away counts for nothing."""
        x = self.part(x, dim, node)
        return Labels(x.shape, tuple(f for f in x.fields if dim not in f.dims), x.stored)

    def tie(self, atoms: Ints | None, other: Ints | None, node: Node, reason: str) -> None:
        """Unites two axes; where only one is labelled, it is frozen."""
        if atoms is not None and other is not None and atoms.shape == other.shape:
            self.unite(atoms, other)
        else:
            self.freeze(atoms, node, reason)
            self.freeze(other, node, reason)


def path_of(node: Node) -> str:
    """Dotted path of the module that made a call, "" for the network itself."""
    return str(node.meta.get("module", ""))


def operator_name(node: Node) -> str:
    """An operator's name without its overload: "linear"."""
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]


def simplify(trace: Trace, f: Field, node: Node) -> Field | None:
    """Drops the axes along which the atoms do not vary; None if they are one and the same everywhere."""
    dims, atoms = list(f.dims), f.atoms
    for i in reversed(range(len(dims))):
        first = atoms.take([0], axis=i)
        if atoms.shape[i] == 1 or bool((atoms == first).all()):
            atoms = first.squeeze(i)
            del dims[i]
    if not dims:
        trace.freeze(f, node, "there is one channel only")
        return None
    if len(dims) > 1:
        trace.grids.append(atoms)
    return Field(tuple(dims), atoms)
