"""How labels pass what computes a weight from stored tensors: weight normalization, weight standardization.

The channels of a computed weight are those of the stored one, which the cut makes smaller. Standardized weights take
their mean and variance over the input channels that are there (``prune/zero.py`` has the form with zeros).
"""

from __future__ import annotations

from torch.fx import Node

from featherweight.axes.labels import Labels, Value
from featherweight.axes.rules import norms as axes_norms
from featherweight.axes.rules.basics import first, pointwise, rule
from featherweight.axes.trace import Trace
from featherweight.network.operators import schema_argument as argument


@rule("_weight_norm")
def weight_norm(trace: Trace, node: Node) -> Value:
    """v g / |v|, the length taken over all axes of v but one. What is zero adds nothing to it."""
    trace.role(node.args[0], "weight", node)
    trace.role(node.args[1], "norm", node)
    return pointwise(trace, node)


@rule("batch_norm")
def standardized(trace: Trace, node: Node) -> Value:
    """A batch norm of a stored weight [1, o, i h w] by its own statistics standardizes it."""
    x = first(trace, node)
    if not x.stored or argument(node, "running_mean") is not None:
        return axes_norms.batch_norm(trace, node)
    own = trace.axis(x, 1, node)
    for name, role in (("weight", "norm"), ("bias", "bias")):
        p = trace.of(argument(node, name))
        if p is not None:
            trace.role(argument(node, name), role, node, out=None)
            trace.tie(own, trace.axis(p, 0, node), node, "it normalises an axis that is never cut")
    return Labels(x.shape, x.fields, stored=True)
