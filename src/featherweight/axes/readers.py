"""Who reads a group's channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch.fx import Node

from featherweight.axes.groups import AxisGroup
from featherweight.axes.labels import Ints
from featherweight.network import Network
from featherweight.network.edit import CONVOLUTIONS, WEIGHTED, out_axis, weight_name
from featherweight.network.operators import schema_argument


@dataclass(frozen=True)
class Reader:
    """A convolution or linear call that reads a group's channels.

    call: its node; weight: the tensor; node: the node of the value that it reads, whose ``axis`` holds channel c at the
    positions ``index[c]``, [n_channels, k].
    """

    call: str
    weight: str
    node: str
    axis: int
    index: Ints


def readers(network: Network, groups: Sequence[AxisGroup]) -> list[list[Reader]]:
    """Who reads every group's channels. Readers that take whole groups of channels count where their result is read."""
    calls: dict[str, list[Node]] = {}
    for node in network.calls(*WEIGHTED):
        name = weight_name(node)
        for tied in network.tied_names(name) if name is not None else ():
            calls.setdefault(tied, []).append(node)
    found = []
    for group in groups:
        mine = []
        for m in group.members:
            for n in calls.get(m.tensor, ()):
                if m.dim != 1 - out_axis(n):
                    continue
                blocks = np.arange(int(schema_argument(n, "groups")) if n.target in CONVOLUTIONS and m.dim else 1)
                width = network.tensor(m.tensor).shape[m.dim]
                index = (m.index[:, :, None] + blocks * width).reshape(len(group), -1)
                axis = 1 if n.target in CONVOLUTIONS else -1
                mine.append(Reader(n.name, m.tensor, str(n.args[0]), axis, index))
        found.append(mine)
    return found
