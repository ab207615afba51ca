"""Pruning: channels, weights and layers."""

from featherweight.prune.axes import AxisGroup, AxisGroups, Member, axis_groups
from featherweight.prune.channel_plan import ChannelPlan
from featherweight.prune.layers import LayerPlan, Layers
from featherweight.prune.sensitivity import Curve, sensitivity
from featherweight.prune.steps import Channels
from featherweight.prune.weights import WeightPlan, Weights

__all__ = ["AxisGroup", "AxisGroups", "ChannelPlan", "Channels", "Curve", "LayerPlan", "Layers", "Member", "WeightPlan",
           "Weights", "axis_groups", "sensitivity"]
