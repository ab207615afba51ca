"""How labels pass normalizations and sums over channels: more rules for the table of ``axes_rules``.

A mean or a variance over channels runs over the channels that are there. A network in which some are zero instead of
cut must be told so: ``prune/zero.py`` writes its form.
"""

from __future__ import annotations

import operator

from torch.fx import Node

from featherweight.axes.labels import Labels, Value
from featherweight.axes.rules.basics import aten, broadcast, first, rule, wrap
from featherweight.axes.rules.weights import whole_groups
from featherweight.axes.trace import Trace, path_of
from featherweight.network.operators import schema_argument as argument


@rule("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def batch_norm(trace: Trace, node: Node) -> Value:
    """Every channel by itself."""
    x = first(trace, node)
    own = trace.axis(x, 1, node)
    for position, role in zip(node.args[1:5], ("norm", "bias", "statistic", "statistic"), strict=True):
        p = trace.of(position)
        if p is not None:
            trace.role(position, role, node)
            trace.tie(own, trace.axis(p, 0, node), node, "it normalises an axis that is never cut")
    fields = trace.untouchable(x, [d for d in range(len(x.shape)) if d != 1], node, "it is averaged over")
    made, plain = Labels(x.shape, tuple(f for f in fields if f.dims == (1,))), trace.plain(node)
    return [made, *plain[1:]] if isinstance(plain, list) else made  # and statistics, which nothing is left of


@rule("prelu")
def prelu(trace: Trace, node: Node) -> Value:
    x, w = first(trace, node), trace.of(node.args[1])
    slopes = trace.axis(w, 0, node) if w is not None and w.shape != (1,) else None
    if slopes is not None:
        trace.tie(trace.axis(x, 1, node), slopes, node, "it meets an axis that is never cut")
    return Labels(x.shape, x.fields)


@rule("layer_norm", "rms_norm")
def layer_norm(trace: Trace, node: Node) -> Value:
    """Its statistics are taken over the channels that are kept."""
    x = first(trace, node)
    inputs = [x]
    for name, role in (("weight", "norm"), ("bias", "bias")):
        if any(a.name == name for a in node.target._schema.arguments):  # type: ignore[union-attr]
            trace.role(argument(node, name), role, node)
            p = trace.of(argument(node, name))
            inputs += [p] if p is not None else []
    return Labels(x.shape, tuple(broadcast(trace, inputs, x.shape, node)))


@rule("group_norm")
def group_norm(trace: Trace, node: Node) -> Value:
    """Many small groups: whole ones go, and the others' statistics stay. Few large ones: each loses the same
    positions, and the statistics are taken over those that are kept."""
    x, groups = first(trace, node), int(argument(node, "num_groups"))
    own = trace.axis(x, 1, node)
    for name, role in (("weight", "norm"), ("bias", "bias")):
        p = trace.of(argument(node, name))
        if p is not None:
            trace.role(argument(node, name), role, node)
            trace.tie(own, trace.axis(p, 0, node), node, "it normalises an axis that is never cut")
    if own is not None and groups > 1:
        whole = whole_groups(own.size, groups)
        trace.unite_along(own.reshape(groups, -1), int(whole))
        note = f"whole groups of {own.size // groups}" if whole else f"the same positions in each of {groups} groups"
        trace.blocks.append((own, f"{path_of(node)}: {note}"))
    trace.untouchable(x, [d for d in range(len(x.shape)) if d != 1], node, "it is averaged over")
    return Labels(trace.shape(node), tuple(f for f in x.fields if f.dims == (1,)))


#: what gives a channel's own number, or its place in an order, which has no meaning once others are gone
BY_NUMBER = {getattr(aten, name).default for name in ("argmax", "argmin")}
#: what gives such numbers second, which nobody needs to read
NUMBERED = {aten.max.dim, aten.min.dim}


def _numbers(node: Node) -> bool:
    """Whether a call's result tells positions along the axis that it reduces."""
    return node.target in BY_NUMBER or (node.target in NUMBERED and any(
        user.target is not operator.getitem or user.args[1] == 1 for user in node.users))


REDUCTIONS = (
    "mean", "mean.dim", "sum", "sum.dim_IntList", "amax", "amin", "max.dim", "min.dim", "var.correction", "var.dim",
    "std.dim", "std.correction", "var_mean.correction", "linalg_vector_norm", "logsumexp", "prod.dim_int",
    "norm.ScalarOpt_dim", "argmax", "argmin", "all.dim", "any.dim")


@rule(*REDUCTIONS)
def reduced(trace: Trace, node: Node) -> Value:
    """Taken over the channels that are kept, where it is taken over channels."""
    x = first(trace, node)
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    gone = reduced_dims(node, x)
    keep = bool(argument(node, "keepdim")) if "keepdim" in names else False
    if _numbers(node):
        x = Labels(x.shape, trace.untouchable(x, gone, node, "it numbers channels"), x.stored)
    left = x
    for dim in gone:
        left = trace.summed(left, dim, node)

    def moved(shape: tuple[int, ...]) -> Labels:
        return left.moved(shape, lambda d: d if keep else d - sum(g < d for g in gone))

    plain = trace.plain(node)
    return [moved(p.shape) for p in plain] if isinstance(plain, list) else moved(trace.shape(node))


def reduced_dims(node: Node, x: Labels) -> list[int]:
    """The axes over which a reduction runs."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    dims = argument(node, "dim") if "dim" in names else None
    found = [wrap(int(d), x) for d in (dims if isinstance(dims, (list, tuple)) else [dims]) if d is not None]
    return found or list(range(len(x.shape)))
