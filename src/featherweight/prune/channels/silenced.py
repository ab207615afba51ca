"""Channels of a network in training: held at zero by taps, and the numbers that penalties on them need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from featherweight.axes.groups import AxisGroup, AxisGroups, Member
from featherweight.axes.literals import MENDS, Cut
from featherweight.axes.zero import MIXES, Place
from featherweight.network import Network
from featherweight.network.operators import schema_argument


class SilencedChannels:
    """Channels that nobody computes, scales or reads while they are held; let go, they are what they were.

    Taps multiply every stored tensor that the graph reads by zero at the positions of the held atoms, so that the
    network computes what the cut one would, in training too, and held positions get no gradient. Calls that mix
    channels without a weight (a layer norm's mean) are computed over the others, as ``zero.py`` defines them. The
    running statistics of a held channel drift to those of zeros; they are kept aside and put back when it is let go.
    """

    def __init__(self, network: Network, axes: AxisGroups, groups: Sequence[AxisGroup]) -> None:
        self.network, self.axes = network, axes
        touched = {m.tensor: m.role for g in groups for m in g.members}
        self.statistics = [n for n, role in touched.items() if role == "statistic"]
        self.factors: dict[str, Tensor] = {}
        self.aside = {n: network.tensor(n).detach().clone() for n in self.statistics}
        self.kept = np.ones(axes.component.shape, dtype=bool)
        self.removers: list[Callable[[], None]] = []
        self.mixers: list[Callable[[], None]] = []
        for name in touched:
            if name not in self.aside and network.tensor(name).is_floating_point():
                for node in network.reads_of(name):
                    self.removers.append(network.add_tap(node.name, self._tap(name)))

    def _tap(self, name: str) -> Callable[[Tensor], Tensor | None]:
        def masked(value: Tensor) -> Tensor | None:
            factor = self.factors.get(name)
            return None if factor is None else value * factor

        return masked

    def hold(self, kept: np.ndarray) -> None:
        """Holds the atoms that are not ``kept`` ([atoms] bool), and lets all others go."""
        with torch.no_grad():
            for name in self.statistics:
                value, aside = self.network.tensor(name), self.aside[name]
                before, after = self._held(name, value.device), self._held(name, value.device, kept)
                aside[after & ~before] = value[after & ~before]
                value[before & ~after] = aside[before & ~after]
        self.take(kept)

    def take(self, kept: np.ndarray) -> None:
        """``hold`` without a look at the statistics: after a restore."""
        self.kept = kept
        self.factors.clear()
        for name, atoms in self.axes.tensors.items():
            if name in self.aside:
                continue
            value = self.network.tensor(name)
            for dim, own in enumerate(atoms):
                if own is not None and not kept[own].all():
                    factor = along(torch.from_numpy(kept[own]).to(value.device, value.dtype), value, dim)
                    self.factors[name] = self.factors[name] * factor if name in self.factors else factor
        self._mix()

    def _mix(self) -> None:
        """Taps on the calls that mix channels."""
        for remove in self.mixers:
            remove()
        self.mixers.clear()
        cut = Cut(self.network, self.axes, self.kept)
        found = {n.name: _short(cut, n) for n in self.network.calls(*MIXES)}
        if any(found.values()):
            cut = Cut(self.network.copy(), self.axes, self.kept)
            for node in cut.network.calls(*MIXES):
                if found[node.name]:
                    if node.target in MENDS:
                        MENDS[node.target](cut, node)
                    mixer = Mixer(node, found[node.name])
                    taps = {n.name: partial(mixer.see, n.name) for n in node.all_input_nodes}
                    self.mixers += [self.network.add_tap(n, t) for n, t in taps.items()]
                    self.mixers.append(self.network.add_tap(node.name, mixer.instead))

    def _held(self, name: str, device: torch.device, kept: np.ndarray | None = None) -> Tensor:
        (own,) = self.axes.tensors[name]
        assert own is not None
        return torch.from_numpy(~(self.kept if kept is None else kept)[own]).to(device)

    def free(self) -> Network:
        """A copy of the network in which no channel is held, for a look at what each is worth."""
        copy = self.network.copy().eval()
        with torch.no_grad():
            for name in self.statistics:
                value = copy.tensor(name)
                held = self._held(name, value.device)
                value[held] = self.aside[name][held]
        return copy

    def close(self) -> None:
        """Takes the taps off."""
        for remove in (*self.removers, *self.mixers):
            remove()
        self.removers.clear()
        self.mixers.clear()


def _short(cut: Cut, node: Node) -> list[tuple[Place, np.ndarray]]:
    """The axes that a call mixes and of which some positions are held, with those that stay."""
    found = [(p, cut.stays(cut.labels(schema_argument(node, p[0])), p[1])) for p in MIXES[node.target](cut, node)]
    return [(p, stays) for p, stays in found if not stays.all()]


class Mixer:
    """A call that mixes channels, computed over those that stay, its result spread over all positions.

    node: the call with its literal arguments as they are in the cut network.
    """

    def __init__(self, node: Node, places: Sequence[tuple[Place, np.ndarray]]) -> None:
        self.node = node
        self.places = [(p, torch.from_numpy(np.flatnonzero(stays)), len(stays)) for p, stays in places]
        self.seen: dict[str, Any] = {}

    def see(self, name: str, value: Any) -> None:
        self.seen[name] = value

    def instead(self, value: Tensor) -> Tensor:
        names = [a.name for a in self.node.target._schema.arguments]  # type: ignore[union-attr]
        given = {n: schema_argument(self.node, n) for n in names}
        given = {n: self.seen[a.name] if isinstance(a, Node) else a for n, a in given.items()}
        for (name, dim, _), index, _ in self.places:
            given[name] = given[name].index_select(dim, index.to(value.device))
        self.seen.clear()
        result: Tensor = self.node.target(**given)  # type: ignore[operator]
        for (_, _, there), index, size in self.places:
            if there is not None and result.shape[there] != size:
                shape = [size if d == there else s for d, s in enumerate(result.shape)]
                result = result.new_zeros(shape).index_copy(there, index.to(value.device), result)
        return result


def along(values: Tensor, like: Tensor, dim: int) -> Tensor:
    """``values`` [length of axis ``dim``] shaped to multiply ``like``."""
    return values.view(*(-1 if d == dim else 1 for d in range(like.dim())))


class Coupled:
    """The parameters behind one axis group, and what each channel has in them."""

    def __init__(self, network: Network, group: AxisGroup, roles: Sequence[str] = ()) -> None:
        self.network = network
        self.size = len(group)
        self.members = [m for m in group.members if (m.role in roles if roles else m.role != "statistic")
                        and network.tensor(m.tensor).requires_grad]
        self._places: dict[int, Tensor] = {}

    def _place(self, i: int, device: torch.device) -> Tensor:
        """[n_channels, k] positions of member i."""
        if i not in self._places:
            self._places[i] = torch.from_numpy(self.members[i].index.copy()).to(device)
        return self._places[i]

    def _tensors(self) -> list[tuple[int, Member, Tensor]]:
        return [(i, m, self.network.tensor(m.tensor)) for i, m in enumerate(self.members)]

    def total(self, what: Callable[[Tensor], Tensor]) -> Tensor:
        """[n_channels] the sum of ``what(tensor)``, element by element, over all positions of each channel."""
        found: Tensor | None = None
        for i, m, tensor in self._tensors():
            rest = [d for d in range(tensor.dim()) if d != m.dim]
            values = what(tensor.detach())
            own = (values.sum(rest) if rest else values)[self._place(i, tensor.device)].sum(1)
            found = own if found is None else found + own
        return found if found is not None else torch.zeros(self.size)

    def pull(self, strength: Tensor, direction: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """Adds ``strength`` [n_channels] times ``direction(tensor)`` to the gradients of each channel's positions."""
        for i, m, tensor in self._tensors():
            if tensor.grad is None:
                continue
            own = tensor.new_zeros(tensor.shape[m.dim])
            own[self._place(i, tensor.device)] = strength.to(tensor)[:, None].expand(-1, m.index.shape[1])
            tensor.grad.addcmul_(along(own, tensor, m.dim), direction(tensor.detach()))


def channels_gone(group: AxisGroup, keep: Mapping[str, Sequence[int]]) -> Tensor:
    """[n_channels] 1 for the channels of ``group`` that are not in ``keep``, 0 for the others."""
    gone = torch.ones(len(group))
    gone[list(keep.get(group.name, range(len(group))))] = 0
    return gone
