"""Network: a captured graph that is itself the model, and runs, trains, copies and exports without the user's class."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from featherweight.network import trees
from featherweight.network.file.file import save
from featherweight.network.kept.about import about
from featherweight.network.kept.facts import Facts, Structure
from featherweight.network.kept.names import Part, Ties, copy_tensors, holder, lookup, named, remove
from featherweight.network.kept.reads import Reads
from featherweight.network.kept.replay import Replay
from featherweight.network.kept.values import Alike, values
from featherweight.network.program import Program, Tap
from featherweight.network.signature import FreeAxis, Input, Signature, shape_text
from featherweight.network.snapshot import Snapshot

Parameters = dict[str, Tensor]


class Network(nn.Module):
    """A captured model: a graph of operators over named tensors.

    ``graph`` has nodes of four kinds: ``placeholder`` (a tensor input), ``get_attr`` (a parameter, buffer or constant
    by its dotted name), ``call_function`` (an operator) and one ``output``. ``node.meta["module"]`` is the module path
    a call came from, ``node.meta["source"]`` the line. After an edit of the graph, call ``changed()``.

    ``patterns`` names the weights whose zeros are to be kept by whoever trains the network (name -> kind of pattern);
    ``notes`` says what was lost or assumed on the way here.

    Example:
        >>> [node.name for node in network.calls(torch.ops.aten.conv2d.default)]
        ['conv2d', 'conv2d_1']
        >>> with network.taps({"conv2d": torch.relu}):
        ...     changed = network(images)
        >>> half = network.copy()
        >>> half.set_tensor("0.weight", network.tensor("0.weight") / 2)
    """

    def __init__(self, graph: Graph, signature: Signature) -> None:
        super().__init__()
        self._graph = graph
        self._signature = signature
        self._taps: dict[str, list[Tap]] = {}
        self._program: Program | None = None
        self._nodes: dict[str, Node] = {}
        self._facts = Facts()
        self._ties, self._reads = Ties(), Reads()
        self.patterns: dict[str, str] = {}
        self.notes: list[str] = []
        self.training = False

    # ---- the graph
    @property
    def graph(self) -> Graph:
        return self._graph

    @property
    def signature(self) -> Signature:
        return self._signature

    @signature.setter
    def signature(self, new: Signature) -> None:
        self._signature = new
        self.changed()

    def changed(self) -> None:
        """To be called after the graph or the tensors' names changed."""
        self._program, self._nodes, self._facts = None, {}, Facts()
        self._ties, self._reads = Ties(), Reads()

    def fact(self, key: Hashable, find: Callable[[], Any]) -> Any:
        """What ``find()`` gives: asked once for each key, until the graph or the tensors' shapes change.

        It is to follow from these alone, and to speak of nodes and tensors by name: copies of the network share it.
        """
        return self._facts.get(self._form(), key, find)

    def _form(self) -> Structure:
        return Structure.of(self._graph, self.tensors())

    def node(self, name: str) -> Node:
        found = self._nodes.get(name)
        if found is None or found._erased or found.name != name:
            self._nodes = {n.name: n for n in self._graph.nodes}
        if name not in self._nodes:
            raise KeyError(f"no node named {name!r}")
        return self._nodes[name]

    def calls(self, *targets: Any) -> list[Node]:
        """The call nodes (of these operators, if any are named), in order."""
        return [n for n in self._graph.nodes if n.op == "call_function" and (not targets or n.target in targets)]

    def paths(self) -> dict[str, list[Node]]:
        """Module path -> the calls that came from it, in order: the module view of the graph."""
        view: dict[str, list[Node]] = {}
        for node in self.calls():
            view.setdefault(node.meta.get("module", ""), []).append(node)
        return view

    def users_of(self, name: str) -> list[Node]:
        """The calls that read the tensor ``name`` (under any of its tied names)."""
        return [user for node in self.reads_of(name) for user in node.users]

    def reads_of(self, name: str) -> list[Node]:
        """The ``get_attr`` nodes of the tensor ``name`` (under any of its tied names), in order."""
        return self._reads.nodes(self._graph, self.tied_names(name))

    # ---- tensors by dotted name
    def tensor(self, name: str) -> Tensor:
        """The parameter, buffer or constant with this dotted name."""
        return lookup(self, name)

    def tensors(self) -> Parameters:
        """Every tensor by name, tied ones under each name, buffers left out of the state dict too."""
        return named(self)

    def tied_names(self, name: str) -> list[str]:
        """All names under which the tensor ``name`` is known."""
        return self._ties.names(self, name)

    def set_tensor(self, name: str, value: Tensor) -> None:
        """Puts ``value`` where the tensor ``name`` is, under all its tied names; a parameter stays one."""
        old = self.tensor(name)
        value = value.detach()
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=old.requires_grad and value.is_floating_point())
        for owner, leaf in (holder(self, known) for known in self.tied_names(name)):
            table = owner._parameters if leaf in owner._parameters else owner._buffers
            table[leaf] = value  # type: ignore[assignment]
        self._ties.moved(old, value)

    def add_tensor(self, name: str, value: Tensor, *, buffer: bool = False, persistent: bool = True) -> None:
        """Adds a parameter (or buffer) under a new dotted name."""
        owner, leaf = holder(self, name, create=True)
        if leaf in owner._parameters or leaf in owner._buffers or leaf in owner._modules:
            raise KeyError(f"there is something named {name!r} already")
        if buffer or not value.is_floating_point():
            plain = isinstance(value, nn.Parameter) or not value.requires_grad
            owner._buffers[leaf] = value if plain else value.detach()  # the tensor itself: ties hold
            if not persistent:
                owner._non_persistent_buffers_set.add(leaf)
        else:
            owner._parameters[leaf] = value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach())
        self._ties.came(self.tensor(name))

    def remove_tensor(self, name: str) -> None:
        """Removes one name of a tensor; containers left empty go with it."""
        self._ties.gone(name, self.tensor(name))
        remove(self, name)
        self.patterns.pop(name, None)

    # ---- running
    def train(self, mode: bool = True) -> Self:
        """Training mode flips the flags of batch norm, dropout and their like in the graph; eval flips them back."""
        super().train(mode)
        self._program = None
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._program is None:
            self._program = Program(self._graph, self.training)
        outputs = self._program.run(self.tensor, self._signature.leaves(args, kwargs), self._taps)
        return trees.unflatten(outputs, self._signature.out_spec)

    def add_tap(self, name: str, tap: Tap) -> Callable[[], None]:
        """Calls ``tap(value)`` whenever node ``name`` has computed; what it returns (if not None) is passed on instead.

        Weights are nodes too: a tap on a ``get_attr`` node is a parametrisation. Returns the function that removes it.
        """
        self.node(name)
        taps = self._taps.setdefault(name, [])
        taps.append(tap)

        def remove() -> None:
            if tap in taps:
                taps.remove(tap)
            if not taps:
                self._taps.pop(name, None)

        return remove

    def replay(self) -> Replay:
        """The network to be called on the same inputs again and again, with other taps each time: what no tap reaches
        is computed once. In evaluation mode, whatever this network's is; its graph and tensors are to stay."""
        return Replay(self._graph, self._signature, self.tensor, self._taps)

    @contextmanager
    def taps(self, taps: Mapping[str, Tap]) -> Iterator[None]:
        """``add_tap`` for a while."""
        removers = [self.add_tap(name, tap) for name, tap in taps.items()]
        try:
            yield
        finally:
            for remove in removers:
                remove()

    # ---- what flows
    def example_inputs(self, batch: int = 2, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` that fit, on the weights' device: normal noise for floats, zeros for integers.

        Free sizes other than the batch are those of the examples at capture (64 in files that do not say).
        """
        generator = torch.Generator().manual_seed(seed)

        def example(shape: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
            value = torch.zeros(shape, dtype=dtype)
            if dtype.is_floating_point:
                value = torch.randn(shape, generator=generator).to(dtype)
            return value.to(device)

        return self.nest(self._examples(batch, example))

    def _examples(self, batch: int, make: Callable[[list[int], torch.dtype, torch.device], Tensor]) -> list[Tensor]:
        """``make(shape, dtype, device)`` of every input."""
        device = next((t.device for t in self.tensors().values()), torch.device("cpu"))
        return [make(item.sizes(batch), item.dtype, device) for item in self._signature.inputs]

    def nest(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` from the tensor inputs in order."""
        return self._signature.nest(tensors)

    def values(self, batch: int = 2) -> dict[str, Any]:
        """Node name -> what it gives for a batch of this size, as tensors without data (shapes and dtypes only).

        Numbers that depend on the batch come as plain ints. A graph of fixed batch ignores ``batch``.
        """
        alike = self.fact("alike values", lambda: Alike(self._graph))
        with alike.mode:
            examples = self._examples(batch, lambda shape, dtype, at: torch.empty(shape, dtype=dtype, device=at))
        args, kwargs = self.nest(examples)
        leaves = self._signature.leaves(args, kwargs)
        return dict(self.fact(("values", batch), lambda: values(self._graph, self.tensor, leaves, alike)))

    # ---- copies and files
    def copy(self) -> Network:
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        other = Network(copy.deepcopy(self._graph), self._signature)
        copy_tensors(self, other, memo)
        other.patterns, other.notes = dict(self.patterns), list(self.notes)
        other._facts = self._facts.carried(self._form(), other._form())
        memo[id(self)] = other
        return other

    def save(self, path: str | Path) -> int:
        """Writes the network as one file (see ``network/file.py``) and gives its length in bytes."""
        return save(self.snapshot(), path)

    def snapshot(self) -> Snapshot:
        """All that this network is, as plain data; the tensors are not copied."""
        first: dict[int, str] = {}
        ties: dict[str, str] = {}
        kinds: dict[str, str] = {}
        tensors: dict[str, Tensor] = {}
        persistent = set(self.state_dict(keep_vars=True))
        for name, tensor in self.tensors().items():
            kinds[name] = ("parameter" if tensor.requires_grad else "frozen") if isinstance(tensor, nn.Parameter) else (
                "buffer" if name in persistent else "temporary")
            if first.setdefault(id(tensor), name) == name:
                tensors[name] = tensor
            else:
                ties[name] = first[id(tensor)]
        order = tuple(name for name, _ in self.named_modules(remove_duplicate=False) if name)
        return Snapshot(self._graph, self._signature, tensors, kinds, ties, order, dict(self.patterns),
                        tuple(self.notes))

    @classmethod
    def of(cls, snapshot: Snapshot) -> Network:
        """The network, in evaluation mode, that a snapshot describes."""
        network = cls(snapshot.graph, snapshot.signature)
        for path in snapshot.order:
            holder(network, f"{path}.leaf", create=True)
        for name, kind in snapshot.kinds.items():
            tensor = network.tensor(snapshot.ties[name]) if name in snapshot.ties else snapshot.tensors[name]
            trained = kind in ("parameter", "frozen")
            if trained and not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=kind == "parameter")
            network.add_tensor(name, tensor, buffer=not trained, persistent=kind != "temporary")
        network.patterns, network.notes = dict(snapshot.patterns), list(snapshot.notes)
        return network.eval()

    def __repr__(self) -> str:
        return about(self._graph, self._signature, self.tensors(), self.notes)

    def extra_repr(self) -> str:
        return ", ".join(f"{i.name}: {shape_text(i)}" for i in self._signature.inputs)


__all__ = ["FreeAxis", "Input", "Network", "Part", "Signature", "shape_text"]
