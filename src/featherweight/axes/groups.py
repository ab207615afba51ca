"""Which channels live and die together: labels on the elements of axes, carried through the graph.

The idea of dependency groups is that of DepGraph (Fang et al. 2023); here it is worked out per element, so that
concatenations, splits, shuffles and reshapes need no special case: a channel is a connected component of positions,
and a group is a set of channels that sit in the same axes of the same tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch.fx import Node

from featherweight.axes.labels import AtomSets, Cost, Ints, Labels, Shuffle, Value
from featherweight.axes.rules import computed, indexing, norms, products, recurrent, shuffles, views, weights, windows
from featherweight.axes.rules.basics import PLACED, RULES, has_computed_options, pointwise, unknown
from featherweight.axes.trace import Trace, path_of
from featherweight.axes.unions import resolve_grids, solve
from featherweight.errors import PlanError
from featherweight.network import Network
from featherweight.network.edit import WEIGHTED, constant_nodes, weight_name
from featherweight.network.kept.most import depends_on_data
from featherweight.network.operators import has_schema
from featherweight.steps import Skipped

#: what goes where attention splits an axis into heads and their width
HEADS = ("whole", "width")
#: the files that fill the table of rules
FILES = (views, weights, norms, products, recurrent, computed, indexing, shuffles, windows)


@dataclass(frozen=True)
class Member:
    """One axis of one stored tensor in which a group's channels sit: ``index`` [n_channels, k] are their positions.

    Example:
        >>> member = fw.prune.axis_groups(network).groups[0].members[0]
        >>> member.tensor, member.dim, member.makes
        ('0.weight', 0, True)
    """

    tensor: str
    dim: int
    index: Ints
    #: "weight", "norm", "bias" or "statistic", "" if unknown
    role: str
    #: it makes the channels (rather than reading them)
    makes: bool
    #: the node of the weight that is computed from the tensor and others (masks, gains), "" where it is the tensor
    computed: str = ""


@dataclass(frozen=True)
class AxisGroup:
    """Channels that sit in the same axes. Channel i goes from all members at once; each may go by itself.

    name: module path of the first producer. constraints: why a channel here is a block of several positions.

    Example:
        >>> group = fw.prune.axis_groups(network).groups[0]
        >>> group.name, [(member.tensor, member.dim) for member in group.members if member.makes]
        ('0', [('0.weight', 0)])
    """

    name: str
    members: tuple[Member, ...]
    constraints: tuple[str, ...] = ()
    #: the channels are the sum of several paths (a residual stream)
    residual: bool = False
    #: the component of each channel, as ``AxisGroups`` counts them
    components: Ints = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.components)

    @property
    def width(self) -> int:
        """Positions of one channel in the first producer's axis."""
        return next((m.index.shape[1] for m in self.members if m.makes), 1)


@dataclass(frozen=True)
class AxisGroups:
    """All groups of a network, what is frozen and why, and the labels of every value for who rewrites the graph.

    ``component[atom]`` numbers the channels; ``values`` holds every value's labels; ``tensors`` the atoms of every
    stored tensor's axes.

    Example:
        >>> axes = fw.prune.axis_groups(network)
        >>> axes.names()
        ('0', '3')
    """

    groups: tuple[AxisGroup, ...]
    frozen: tuple[Skipped, ...]
    component: Ints
    values: Mapping[str, Value]
    tensors: Mapping[str, tuple[Ints | None, ...]]
    costs: tuple[Cost, ...]
    #: last node of a chain of views -> the reordering that it is
    shuffles: Mapping[str, Shuffle] = field(default_factory=dict)

    def __getitem__(self, name: str) -> AxisGroup:
        return next(g for g in self.groups if g.name == name)

    def names(self) -> tuple[str, ...]:
        return tuple(g.name for g in self.groups)

    def macs(self, kept: np.ndarray) -> float:
        """Multiply-accumulates for one sample of what is left: ``kept`` says which atoms stay."""
        counts = iter(self._cost_axes.count(kept))
        return sum(c.factor * float(math.prod(next(counts) for _ in c.axes)) for c in self.costs)

    @cached_property
    def _cost_axes(self) -> AtomSets:
        return AtomSets([a for c in self.costs for a in c.axes])


def axis_groups(network: Network, heads: str = "whole") -> AxisGroups:
    """The groups of channels of ``network`` that can be cut. Reads shapes only, no data.

    heads: what goes where attention splits an axis into heads and their width: "whole" heads, or "width", the same
    positions in every head. A single head loses in width either way.

    Example:
        >>> axes = fw.prune.axis_groups(network)
        >>> [group.name for group in axes.groups], [skipped.path for skipped in axes.frozen]
        (['0', '3'], ['7'])
    """
    if heads not in HEADS:
        raise PlanError(f"axis_groups has no heads={heads!r}; expected \"whole\" (heads go as they are) or \"width\" "
                        "(every head keeps the same share); write axis_groups(network, heads=\"width\")")
    key = ("axis groups", heads, tuple(RULES.items()))  # the table of rules is open
    found: AxisGroups = network.fact(key, lambda: _found(walk(network, heads)))
    return found


def _found(trace: Trace) -> AxisGroups:
    parent = solve(np.arange(trace.count, dtype=np.int64), trace.pairs)
    parent = resolve_grids(parent, trace.grids)
    return _collect(trace, parent)


def walk(network: Network, heads: str = "whole") -> Trace:
    """Carries labels through the graph, once, in order."""
    trace = Trace(network, heads=heads)
    trace.shuffles = {s.last: s for s in shuffles.shuffles(network, trace)}
    inner = {name for s in trace.shuffles.values() for name in s.inner}
    for node in network.graph.nodes:
        if node.op == "placeholder":
            trace.values[node.name] = trace.plain(node)
        elif node.op == "get_attr":
            trace.values[node.name] = trace.stored(str(node.target))
        elif node.name in trace.shuffles:
            trace.values[node.name] = shuffles.reordered(trace, trace.shuffles[node.name], node)
        elif node.name in inner:
            trace.values[node.name] = trace.plain(node)
        elif node.op == "call_function":
            trace.values[node.name] = _step(trace, node)
        else:
            for used in node.all_input_nodes:
                value = trace.values.get(used.name)
                for labels in value if isinstance(value, list) else [value]:
                    trace.freeze(labels, node, "its channels are the network's output")
    constant = constant_nodes(network)
    trace.costs = [c for c in trace.costs if network.node(c.node) not in constant]
    return trace


def _step(trace: Trace, node: Node) -> Value:
    if depends_on_data(node, lambda n: trace.shapes[n.name]):
        return unknown(trace, node, "how many there are depends on the data")
    known = RULES.get(node.target, RULES.get(str(node.target)))
    if known is None and has_schema(node.target) and torch.Tag.pointwise in node.target.tags:  # type: ignore[union-attr]
        known = pointwise
    if known is None or (node.target not in PLACED and has_computed_options(trace, node)):
        return unknown(trace, node)
    value = known(trace, node)
    shape = trace.shapes[node.name]
    if isinstance(value, Labels) and tuple(shape.shape) != value.shape:
        raise AssertionError(f"the rule for {node.target} gave labels of shape {value.shape} for {tuple(shape.shape)}")
    return value


def _collect(trace: Trace, parent: Ints) -> AxisGroups:
    roots, component = np.unique(parent, return_inverse=True)
    component = component.astype(np.int64)
    reason_of = np.full(len(roots), -1, dtype=np.int64)
    for i in reversed(range(len(trace.frozen))):
        reason_of[component[trace.frozen[i].atoms]] = i
    sites = [(name, dim, atoms) for name, axes in trace.tensors.items() for dim, atoms in enumerate(axes)
             if atoms is not None]
    groups = _group(trace, component, sites, reason_of)
    alone = {int(c) for g in groups if len(g) == 1 for c in g.components}
    whole = tuple(g for g in groups if len(g) > 1)
    return AxisGroups(whole, _report(trace, component, reason_of, alone), component, trace.values, trace.tensors,
                      tuple(trace.costs), trace.shuffles)


def _group(trace: Trace, component: Ints, sites: list[tuple[str, int, Ints]], reason_of: Ints) -> list[AxisGroup]:
    """Components that are not frozen, grouped by the axes they sit in and how often."""
    if not sites:
        return []
    atoms = np.concatenate([a for _, _, a in sites])
    site = np.concatenate([np.full(a.size, i) for i, (_, _, a) in enumerate(sites)])
    position = np.concatenate([np.arange(a.size) for _, _, a in sites])
    comp = component[atoms]
    free = reason_of[comp] < 0
    comp, site, position = comp[free], site[free], position[free]
    order = np.lexsort((position, site, comp))
    comp, site, position = comp[order], site[order], position[order]
    starts = np.flatnonzero(np.r_[True, comp[1:] != comp[:-1]]) if comp.size else np.zeros(0, np.int64)
    ends = np.r_[starts[1:], comp.size][:len(starts)]
    producing = {i for i, (name, dim, _) in enumerate(sites) if (name, dim) in trace.producers}
    rows: dict[bytes, list[tuple[int, int]]] = {}
    for s, e in zip(starts.tolist(), ends.tolist(), strict=True):
        rows.setdefault(site[s:e].tobytes(), []).append((s, e))
    joined = np.zeros(len(reason_of), dtype=bool)
    for found in trace.joined:
        joined[component[found]] = True
    groups: list[AxisGroup] = []
    notes = _Notes(trace, component)
    for spans in rows.values():
        mine = site[spans[0][0]:spans[0][1]]
        if not producing & set(mine.tolist()):
            continue
        table = np.stack([position[s:e] for s, e in spans])
        rank = np.lexsort((table[:, next(i for i, m in enumerate(mine) if int(m) in producing)],))
        table, comps = table[rank], np.array([comp[s] for s, _ in spans], dtype=np.int64)[rank]
        members = tuple(
            Member(sites[i][0], sites[i][1], table[:, mine == i], trace.roles.get(sites[i][0], ""), i in producing,
                   trace.computed.get(sites[i][0], ""))
            for i in dict.fromkeys(mine.tolist()))
        groups.append(AxisGroup("", members, notes.of(comps), bool(joined[comps].any()), comps))
    return _named(trace, groups)


class _Notes:
    """Why channels are blocks: looked up by component, so that many blocks cost no more than they hold."""

    def __init__(self, trace: Trace, component: Ints) -> None:
        self.texts = [text for _, text in trace.blocks]
        found = [np.unique(component[atoms]) for atoms, _ in trace.blocks]
        block = np.repeat(np.arange(len(found)), [len(f) for f in found])
        comp = np.concatenate([*found, np.zeros(0, np.int64)])
        order = np.argsort(comp, kind="stable")
        self.comp, self.block = comp[order], block[order]

    def of(self, comps: Ints) -> tuple[str, ...]:
        low, high = (np.searchsorted(self.comp, comps, side=s) for s in ("left", "right"))
        blocks = sorted({b for i, j in zip(low, high, strict=True) for b in self.block[i:j].tolist()})
        return tuple(dict.fromkeys(self.texts[b] for b in blocks))


def _named(trace: Trace, groups: list[AxisGroup]) -> list[AxisGroup]:
    """Names by first producer, in graph order; several groups of one producer are numbered."""
    order = {key: i for i, key in enumerate(trace.producers)}
    firsts = [min(((m.tensor, m.dim) for m in g.members if m.makes), key=order.__getitem__) for g in groups]
    ranked = sorted(range(len(groups)), key=lambda i: (order[firsts[i]], int(groups[i].components[0])))
    seen: dict[str, int] = {}
    found = []
    for i in ranked:
        base = trace.producers[firsts[i]][0]
        seen[base] = seen.get(base, 0) + 1
        name = base if seen[base] == 1 else f"{base}:{seen[base]}"
        g = groups[i]
        found.append(AxisGroup(name, g.members, g.constraints, g.residual, g.components))
    return found


def _report(trace: Trace, component: Ints, reason_of: Ints, alone: set[int]) -> tuple[Skipped, ...]:
    """How many channels of every producer are frozen, with the first reason; and calls without a stored weight."""
    found: dict[tuple[str, str], None] = {}
    for (name, dim), paths in trace.producers.items():
        atoms = trace.tensors[name][dim]
        if atoms is None:
            found[paths[0], "it makes one channel only"] = None
            continue
        reasons = reason_of[component[atoms]]
        count = int((reasons >= 0).sum())
        single = sum(1 for c in component[atoms].tolist() if c in alone)
        if count:
            why = trace.frozen[int(reasons[reasons >= 0].min())]
            share = "" if count == len(atoms) else f"{count} of {len(atoms)} channels: "
            place = f"{why.path}, " if why.path and why.path != paths[0] else ""
            found[paths[0], f"{share}{place}{why.reason}"] = None
        if single:
            share = "" if single == len(atoms) else f"{single} of {len(atoms)} channels: "
            found[paths[0], f"{share}they can only go all together"] = None
    for node in trace.network.calls(*WEIGHTED):
        weight = trace.of(node.args[1])
        if weight_name(node) is None and (weight is None or not weight.fields):
            found[path_of(node) or node.name, "its weight is computed (quantized or shared): cut channels first"] = None
    return tuple(Skipped(path, reason) for path, reason in found)
