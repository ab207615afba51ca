"""Pruning: channels, weights and layers."""

from featherweight.axes.groups import AxisGroup, AxisGroups, Member, axis_groups
from featherweight.prune.channels.candidates import Shares
from featherweight.prune.channels.plan import ChannelPlan
from featherweight.prune.channels.sensitivity import Curve, sensitivity
from featherweight.prune.channels.step import Channels
from featherweight.prune.depth.candidates import Drops
from featherweight.prune.depth.step import LayerPlan, Layers
from featherweight.prune.weights.candidates import Sparsities
from featherweight.prune.weights.step import WeightPlan, Weights

__all__ = ["AxisGroup", "AxisGroups", "ChannelPlan", "Channels", "Curve", "Drops", "LayerPlan", "Layers", "Member",
           "Shares", "Sparsities", "WeightPlan", "Weights", "axis_groups", "sensitivity"]
