"""Pruning: channels, weights and layers."""

from featherweight.prune.axes import AxisGroup, AxisGroups, Member, axis_groups
from featherweight.prune.layers import LayerPlan, Layers
from featherweight.prune.steps import ChannelPlan, Channels
from featherweight.prune.weights import WeightPlan, Weights

__all__ = ["AxisGroup", "AxisGroups", "ChannelPlan", "Channels", "LayerPlan", "Layers", "Member", "WeightPlan",
           "Weights", "axis_groups"]
