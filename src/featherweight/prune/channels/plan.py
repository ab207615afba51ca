"""``ChannelPlan``: which channels of a network stay, and the values that make up for those that go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from featherweight.axes.cut import cut, kept_atoms, kept_positions
from featherweight.axes.groups import AxisGroups, axis_groups
from featherweight.axes.zero import zero
from featherweight.errors import PlanError, did_you_mean
from featherweight.network import Network
from featherweight.prune.channels.sensitivity import Curve
from featherweight.steps import Plan
from featherweight.steps.plan import Kept


@dataclass(frozen=True)
class ChannelPlan(Plan):
    """Channels to keep, by name of the axis group, and the shapes of the tensors that they were chosen on.

    ``macs_before`` and ``macs_after`` are counted for one sample. The channels of a group are numbered as
    ``axis_groups(network, heads)[name]`` numbers them. ``sensitivity``: the curves they were chosen by, where they were
    measured. ``tensors`` are new values, in the shapes before the cut, of tensors
    that make up for the channels lost.

    Example:
        >>> plan = fw.prune.Channels(ratio=0.5).plan(network, task)
        >>> {group: len(kept) for group, kept in plan.keep.items()}
        {'0': 4, '3': 8}
    """

    kind: ClassVar[str] = "prune.channels/1"
    keep: dict[str, tuple[int, ...]]
    shapes: dict[str, tuple[int, ...]]
    macs_before: int
    macs_after: int
    sensitivity: tuple[Curve, ...] = ()
    heads: str = "whole"

    def apply(self, network: Network) -> Network:
        """A copy without the channels that are not kept. Raises PlanError if the network is not the one planned on."""
        axes = self._fit(network)
        return cut(filled(network, self.tensors), axes, kept_atoms(axes, self.keep))

    def zero(self, network: Network) -> Network:
        """A copy of the same shapes in which all weights of the channels that ``apply`` cuts are zero: it computes
        what the cut network computes."""
        axes = self._fit(network)
        return zero(filled(network, self.tensors), axes, kept_atoms(axes, self.keep))

    def kept(self, network: Network) -> dict[str, Kept]:
        axes = self._fit(network)
        return kept_positions(network, axes, kept_atoms(axes, self.keep))

    def after(self, earlier: Plan, network: Network) -> Plan:
        """The plan itself after one that keeps all shapes. Raises PlanError after another cut."""
        if isinstance(earlier, ChannelPlan) or earlier.kept(network).keys() & self.shapes.keys():
            raise PlanError("two plans cut channels of one network, and the second counts those that the first left; "
                            "write one prune.Channels, or two trainings one after the other")
        return self

    def _fit(self, network: Network) -> AxisGroups:
        known = network.tensors()
        for name, shape in {**self.shapes, **{n: tuple(t.shape) for n, t in self.tensors.items()}}.items():
            if name not in known:
                raise PlanError(f"the plan cuts {name!r}, which this network does not have; "
                                f"{did_you_mean(name, known)}; make the plan on this very network")
            if tuple(known[name].shape) != shape:
                raise PlanError(f"the plan was made for {name!r} of shape {list(shape)}; here it has "
                                f"{list(known[name].shape)}: make the plan on this very network")
        return axis_groups(network, self.heads)

    def summary(self) -> str:
        share = self.macs_after / self.macs_before if self.macs_before else 1.0
        return (f"cut channels in {len(self.keep)} axis groups: {self.macs_before} -> {self.macs_after} MACs "
                f"({share:.0%} remain)")


def filled(network: Network, tensors: Mapping[str, Tensor]) -> Network:
    """A copy with these values, on the devices where the old ones lay; the network itself where there are none."""
    if not tensors:
        return network
    other = network.copy()
    for name, value in tensors.items():
        old = other.tensor(name)
        other.set_tensor(name, value.to(old.device, old.dtype))
    return other
