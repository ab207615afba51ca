"""Cutting channels out of a network, given which atoms stay (``axes/zero.py`` zeroes them instead)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from featherweight.axes.groups import AxisGroups
from featherweight.axes.labels import Ints
from featherweight.axes.literals import MENDS, Cut, reorder
from featherweight.axes.zero import zero
from featherweight.errors import PlanError, did_you_mean
from featherweight.network import Network
from featherweight.network.edit import clear_dead, read_tensors
from featherweight.steps.plan import Kept

__all__ = ["cut", "kept_atoms", "kept_positions", "zero"]


def kept_atoms(axes: AxisGroups, keep: Mapping[str, Sequence[int] | Ints]) -> np.ndarray:
    """[atoms] bool: what stays when each named group keeps the channels listed."""
    stays = np.ones(int(axes.component.max(initial=-1)) + 1, dtype=bool)
    known = {g.name: g for g in axes.groups}
    for name, channels in keep.items():
        if name not in known:
            raise PlanError(f"the plan cuts an axis group {name!r} that this network does not have; "
                            f"{did_you_mean(name, known) if known else 'it has none'}")
        group = known[name]
        mask = np.zeros(len(group), dtype=bool)
        index = np.asarray(channels, dtype=np.int64)
        if not len(index) or index.min() < 0 or index.max() >= len(group):
            raise PlanError(f"the plan keeps channels {list(channels)[:4]}... of {name!r}, which has {len(group)}; "
                            "make the plan on this very network")
        mask[index] = True
        stays[group.components[~mask]] = False
    kept: np.ndarray = stays[axes.component]
    return kept



def kept_positions(network: Network, axes: AxisGroups, kept: np.ndarray) -> dict[str, Kept]:
    """What ``Plan.kept`` says of a cut: every tensor that loses something, by all its names -> what stays of its axes.

    kept [atoms] bool says what stays.
    """
    known = network.tensors()
    found: dict[str, Kept] = {}
    for name, atoms in axes.tensors.items():
        if any(own is not None and not kept[own].all() for own in atoms):
            stays = tuple(None if own is None else torch.from_numpy(np.flatnonzero(kept[own])) for own in atoms)
            found |= {tied: stays for tied, tensor in known.items() if tensor is known[name]}
    return found


def cut(network: Network, axes: AxisGroups, kept: np.ndarray) -> Network:
    """A copy without the atoms that do not stay: tensors sliced (ties kept), numbers in the graph mended."""
    smaller = network.copy()
    before = read_tensors(smaller)
    for name, atoms in axes.tensors.items():
        tensor = smaller.tensor(name)
        value: Tensor = tensor.detach()
        for dim, own in enumerate(atoms):
            if own is not None and not kept[own].all():
                value = value.index_select(dim, torch.from_numpy(np.flatnonzero(kept[own])).to(value.device))
        if value.shape != tensor.shape:
            smaller.set_tensor(name, value.contiguous())
    work = Cut(smaller, axes, kept)
    for node in list(smaller.graph.nodes):
        if node.name in axes.shuffles:
            s = axes.shuffles[node.name]
            reorder(work, node, s.source, s.dim, s.order)
        elif node.op == "call_function" and node.target in MENDS:
            MENDS[node.target](work, node)
    clear_dead(smaller, before)
    smaller.changed()
    _check(network, smaller)
    return smaller


def _check(network: Network, smaller: Network) -> None:
    """Shapes flow through the cut graph, and the outputs have the shapes they had."""
    try:
        seen, wanted = smaller.values(), network.values()
    except Exception as error:
        raise PlanError(f"the cut graph does not run: {error}; name the module in ignore=(...) to leave it alone, and "
                        "please report it") from error
    outputs = next(n for n in network.graph.nodes if n.op == "output").all_input_nodes
    for node in outputs:
        if isinstance(wanted[node.name], Tensor) and wanted[node.name].shape != seen[node.name].shape:
            raise PlanError(f"the cut graph gives {node.name} of shape {list(seen[node.name].shape)}; "
                            f"it was {list(wanted[node.name].shape)}")
