"""How labels pass through operators that hold no weights: a table operator -> rule, open to extension.

A rule takes ``(trace, node)`` and gives the labels of the result. An operator that is not in ``RULES`` and is not
pointwise freezes what it reads, and is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from featherweight.axes.labels import Field, Labels, Value
from featherweight.axes.trace import Trace
from featherweight.network.operators import has_schema
from featherweight.network.operators import schema_argument as argument

aten = torch.ops.aten
Rule = Callable[[Trace, Node], Value]
#: operator -> rule; those of packages that need not be there by name
RULES: dict[Any, Rule] = {}


def operators(*names: str) -> list[Any]:
    """The overloads of aten called so, in-place forms included, as far as this torch has them: "conv2d.padding"."""
    found = []
    for name in names:
        packet, _, overload = name.partition(".")
        for form in (packet, f"{packet}_"):  # in-place calls that a capture could not turn are labelled alike
            op = getattr(getattr(aten, form, None), overload or "default", None)
            if op is not None:
                found.append(op)
    return found


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enters a rule into the table for these operators."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators(*names), function))
        return function

    return enter


def wrap(dim: int, x: Labels) -> int:
    """An axis counted from the front."""
    return dim % max(len(x.shape), 1)


def first(trace: Trace, node: Node) -> Labels:
    """The labels of the first argument."""
    x = trace.of(node.args[0])
    return x if x is not None else Labels(())


#: operators whose rules understand sizes and places that the graph computes
PLACED = set(operators("slice.Tensor", "slice_scatter", "narrow", "select.int", "select_scatter", "sym_size.int",
                       *(f"conv{n}d" for n in (1, 2, 3)), "topk"))


def has_computed_options(trace: Trace, node: Node) -> bool:
    """Whether a number that says what a call does (its groups, an axis) is computed; sizes in lists may be."""
    given = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, Node) and a.op != "get_attr"]
    return has_schema(node.target) and any(isinstance(trace.shapes.get(a.name), (int, torch.SymInt)) for a in given)


def unknown(trace: Trace, node: Node, reason: str = "no rule for this operator") -> Value:
    """What is not understood is frozen."""
    for used in node.all_input_nodes:
        value = trace.values.get(used.name)
        for labels in value if isinstance(value, list) else [value]:
            trace.freeze(labels, node, reason)
    return trace.plain(node)


# ---- the same shape, the same labels
@rule("contiguous", "clone", "detach", "alias", "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout",
      "to.dtype", "to.dtype_layout", "to.device", "to.other", "_to_copy", "type_as", "lift_fresh_copy", "relu", "relu6",
      "hardtanh", "hardswish", "hardsigmoid", "silu", "mish", "gelu", "elu", "selu", "celu", "leaky_relu", "softplus",
      "softsign", "softshrink", "hardshrink", "tanhshrink", "log_sigmoid", "threshold", "rrelu", "positive",
      "zero", "fill.Scalar", "zeros_like", "ones_like", "full_like")
def same(trace: Trace, node: Node) -> Value:
    x = first(trace, node)
    return Labels(x.shape, x.fields, x.stored)


def pointwise(trace: Trace, node: Node) -> Value:
    """Element by element over any number of tensors, with broadcasting."""
    inputs = [x for x in map(trace.of, node.all_input_nodes) if x is not None]
    shape = trace.shape(node)
    kept = broadcast(trace, inputs, shape, node)
    if node.target in JOINS:
        paths = [x for x in inputs if not x.stored]
        trace.joined.extend(f.atoms.ravel() for f in kept
                            if sum(_labelled(x, shape, f.dims[0]) for x in paths) > 1)
    return Labels(shape, tuple(kept), all(x.stored for x in inputs))


RULES.update(dict.fromkeys(operators("where.ScalarOther", "where.ScalarSelf", "where.Scalar", *(
    f"__{name}__.{form}" for name in ("and", "or", "xor") for form in ("Tensor", "Scalar"))), pointwise))


def broadcast(trace: Trace, inputs: Sequence[Labels], shape: tuple[int, ...], node: Node) -> list[Field]:
    """The fields of a value of this shape into which all ``inputs`` are broadcast, united axis by axis."""
    fields: list[Field] = []
    inputs = [apart(trace, x, inputs, shape, node) for x in inputs]
    for x in inputs:
        shift = len(shape) - len(x.shape)
        for f in x.moved(shape, lambda d, s=shift: d + s).fields:  # type: ignore[misc]
            if any(n == 1 and shape[d] > 1 for d, n in zip(f.dims, f.atoms.shape, strict=True)):
                trace.freeze(f, node, "one channel is spread over many")
            else:
                _merge(trace, fields, f, node)
    kept = []
    for f in fields:
        if all(_covered(x, shape, d) for x in inputs for d in f.dims):
            kept.append(f)
        else:
            trace.freeze(f, node, "it meets an axis that is never cut")
    return kept


def apart(trace: Trace, x: Labels, inputs: Sequence[Labels], shape: tuple[int, ...], node: Node) -> Labels:
    """Of axes that a view split off one another (heads and their width) those stay whole that meet, by themselves, an
    axis that is never cut or a stored table (a rotary embedding's), so that the others can go."""
    shift = len(shape) - len(x.shape)
    for f in x.fields:
        stay = [d for d in f.dims if any(_fixes(y, shape, d + shift, [e + shift for e in f.dims]) for y in inputs)]
        if len(stay) < len(f.dims):
            for d in stay:
                x = trace.part(x, d, node)
    return x


def _fixes(y: Labels, shape: tuple[int, ...], dim: int, dims: Sequence[int]) -> bool:
    alone = y.stored and _labelled(y, shape, dim) and not any(_labelled(y, shape, d) for d in dims if d != dim)
    return alone or not _covered(y, shape, dim)


def _labelled(x: Labels, shape: tuple[int, ...], dim: int) -> bool:
    own = dim - (len(shape) - len(x.shape))
    return own >= 0 and x.field(own) is not None


def _covered(x: Labels, shape: tuple[int, ...], dim: int) -> bool:
    own = dim - (len(shape) - len(x.shape))
    return own < 0 or x.shape[own] == 1 or x.field(own) is not None


def _merge(trace: Trace, fields: list[Field], f: Field, node: Node) -> None:
    """Puts ``f`` beside ``fields``, united with those that share axes with it."""
    for i, g in enumerate(fields):
        if not set(g.dims) & set(f.dims):
            continue
        big, small = (g, f) if set(f.dims) <= set(g.dims) else (f, g)
        if not set(small.dims) <= set(big.dims):
            trace.freeze(f, node, "it meets axes that were split in another way")
            trace.freeze(g, node, "it meets axes that were split in another way")
            return
        shape = [n if d in small.dims else 1 for d, n in zip(big.dims, big.atoms.shape, strict=True)]
        trace.unite(big.atoms, small.atoms.reshape(shape))
        fields[i] = big
        return
    fields.append(f)


JOINS = set(operators("add.Tensor", "sub.Tensor"))


# ---- over space, over an axis
def spatial(count: int) -> Rule:
    """Pooling and resizing over the last ``count`` axes."""

    def pooled(trace: Trace, node: Node) -> Value:
        x = first(trace, node)
        dims = range(len(x.shape) - count, len(x.shape))
        fields = trace.untouchable(x, dims, node, "it pools over channels")
        plain = trace.plain(node)
        if isinstance(plain, list):
            return [Labels(p.shape, fields) for p in plain]
        return Labels(trace.shape(node), fields)

    return pooled


for _n in (1, 2, 3):
    _pools = [f"{p}_pool{_n}d" for p in ("avg", "max", "adaptive_avg", "adaptive_max", "lp")]
    _pools.append(f"max_pool{_n}d_with_indices")
    _sizers = [f"upsample_nearest{_n}d", f"_upsample_nearest_exact{_n}d"] + {
        1: ["upsample_linear1d"], 2: ["upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa",
                                      "_upsample_bicubic2d_aa"], 3: ["upsample_trilinear3d"]}[_n]
    for _op in operators(*_pools, *(f"{s}.{o}" for s in _sizers for o in ("vec", "default"))):
        RULES[_op] = spatial(_n)


@rule("softmax.int", "_softmax", "log_softmax.int", "_log_softmax", "cumsum", "cumprod", "flip", "sort", "argsort",
      "roll", "topk")
def along(trace: Trace, node: Node) -> Value:
    """Mixes positions along its axes, and keeps the shape."""
    x = first(trace, node)
    name = "dims" if node.target in operators("flip", "roll") else "dim"
    dims = argument(node, name)
    dims = [wrap(int(d), x) for d in (dims if isinstance(dims, (list, tuple)) else [dims])] or range(len(x.shape))
    for dim in dims:
        x = trace.whole(x, dim, node, "it mixes channels")
    plain = trace.plain(node)
    return [Labels(p.shape, x.fields) for p in plain] if isinstance(plain, list) else x  # sorted, and where from


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def sampled(trace: Trace, node: Node) -> Value:
    """Channel by channel, at places that another value names for each sample: heads that lie beside the samples go from
    the image and from its coordinates."""
    x, grid = first(trace, node), trace.of(node.args[1])
    assert grid is not None
    for dim in range(1, len(grid.shape)):
        grid = trace.whole(grid, dim, node, "coordinates")
    for dim in range(2, len(x.shape)):
        x = trace.whole(x, dim, node, "it is sampled over")
    x = trace.part(x, 1, node)
    trace.tie(trace.axis(x, 0, node), trace.axis(grid, 0, node), node, "it is sampled where no head is")
    return Labels(trace.shape(node), tuple(f for f in x.fields if f.dims in ((0,), (1,))))


@rule("glu")
def gated(trace: Trace, node: Node) -> Value:
    x = first(trace, node)
    dim = wrap(int(argument(node, "dim")), x)
    atoms, shape = trace.axis(x, dim, node), trace.shape(node)
    if atoms is None:
        return Labels(shape, trace.rest(x, [dim]))
    half = len(atoms) // 2
    trace.unite(atoms[:half], atoms[half:])
    return Labels(shape, (*trace.rest(x, [dim]), Field((dim,), atoms[:half])))
