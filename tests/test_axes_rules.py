"""Every operator that has a rule for channels, once: between two layers, half of the channels cut and zeroed.

The tests run over the table of rules itself: a rule without a row here is not finished.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.fx.proxy import GraphAppendingTracer

import featherweight as fw
from featherweight import measure
from featherweight.axes.cut import cut, kept_atoms
from featherweight.axes.rules.basics import RULES
from featherweight.axes.zero import zero
from featherweight.prune import axis_groups

torch.set_num_threads(1)
aten = torch.ops.aten
CHANNELS = 12
LAYERS = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


@functools.cache
def template(rank: int) -> fw.Network:
    """A layer that makes channels, and an activation."""
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[rank](3, CHANNELS, *[1] * (rank > 2)), nn.Sigmoid())
    found = fw.capture(model.eval(), torch.randn(2, 3, *[6] * (rank - 2)))
    assert isinstance(found, fw.Network)
    return found


class Graph:
    """The graph being written: what a row's call is given beside the operator and the value that it works on."""

    def __init__(self, rank: int) -> None:
        self.network = template(rank).copy()
        self.tracer = GraphAppendingTracer(self.network.graph)
        torch.manual_seed(1)

    def stored(self, *shape: int, of: Tensor | None = None) -> Proxy:
        """A stored tensor, random and positive where ``of`` does not give it."""
        name = f"stored{len(self.network.tensors())}"
        self.network.add_tensor(name, torch.rand(shape) + 0.1 if of is None else of, buffer=of is not None)
        return Proxy(self.network.graph.create_node("get_attr", name), self.tracer)

    def call(self, op: Any, *args: Any) -> Proxy:
        """For calls that are given numbers only."""
        return self.tracer.create_proxy("call_function", op, args, {})

    def write(self, row: Row, op: Any) -> fw.Network:
        """Puts the row's call, and a layer that reads its result, behind the activation."""
        graph = self.network.graph
        start, end = next(iter(self.network.calls(aten.sigmoid.default))), next(iter(reversed(graph.nodes)))
        with graph.inserting_before(end):
            result = row.call(op, Proxy(start, self.tracer), self)
            end.replace_input_with(start, result.node)
            self.network.changed()
            width = self.network.values()[result.node.name].shape[1]
            read = aten.linear.default(last(result), self.stored(4, width))
        end.replace_input_with(result.node, read.node)
        self.network.changed()
        return self.network


@dataclass(frozen=True)
class Row:
    """How an operator is called on a value [n, 12, 6, ...] of so many axes, channels along axis 1 of the result."""

    call: Callable[..., Any]
    rank: int = 4
    #: whether its MACs are counted for one sample
    counted: bool = True


def plain(*args: Any, **kwargs: Any) -> Row:
    """op(y, ...)"""
    return Row(lambda op, y, g: op(y, *args, **kwargs))


def first(*args: Any, rank: int = 4, **kwargs: Any) -> Row:
    """The first of several results."""
    return Row(lambda op, y, g: op(y, *args, **kwargs)[0], rank)


def as_float(y: Proxy) -> Any:
    return aten._to_copy.default(y, dtype=torch.float32)


def numbers(*args: Any) -> Row:
    """A result that is no float."""
    return Row(lambda op, y, g: as_float(op(y, *args)))


def reduced(*args: Any, dims: Callable[[int], Any] = lambda d: [d], of: Callable[[Any], Any] = lambda v: v,
            **kwargs: Any) -> Row:
    """Over space, and over channels."""
    return Row(lambda op, y, g: aten.add.Tensor(of(op(y, *args, dims(2), keepdim=True, **kwargs)),
                                                of(op(y, *args, dims(1), keepdim=True, **kwargs))))


def added(*args: Any, **kwargs: Any) -> Row:
    """Beside the value itself, lest nothing is left of it."""
    return Row(lambda op, y, g: aten.add.Tensor(op(aten.clone.default(y), *args, **kwargs), y))


def length(y: Proxy) -> Any:
    return aten.sym_size.int(y, 0)


def last(y: Proxy) -> Any:
    """Channels along the last axis, or back."""
    return aten.transpose.int(y, 1, -1)


def filled(*value: float, new: bool = False) -> Row:
    """A tensor of given size, which follows what it is added to."""
    def call(op: Any, y: Proxy, g: Graph) -> Any:
        size = [length(y), CHANNELS, 6, 6]
        return aten.add.Tensor(g.call(op, *[y] * new, size, *value), y)

    return Row(call)


def sampled(n: int) -> Row:
    def call(op: Any, y: Proxy, g: Graph) -> Any:
        return op(y, aten.expand.default(g.stored(1, *[6] * n, n), [length(y), *[6] * n, n]), 0, 0, False)

    return Row(call, n + 2)


def convolved(n: int, *args: Any) -> Row:
    return Row(lambda op, y, g: op(y, g.stored(CHANNELS, CHANNELS, *[3] * n), g.stored(CHANNELS), *args), n + 2)


def normalized(*args: Any, **kwargs: Any) -> Row:
    """Over the last axis, with a weight."""
    return Row(lambda op, y, g: last(op(last(y), [CHANNELS], g.stored(CHANNELS), *args, **kwargs)), 3)


def parted(*args: Any) -> Row:
    """Two parts, joined in the other order."""
    return Row(lambda op, y, g: aten.cat.default([(parts := op(y, *args))[1], parts[0]], 1))


def spatial(n: int) -> dict[str, Row]:
    """Pooling, resizing and convolving over n axes."""
    def rank(row: Row) -> Row:
        return Row(row.call, n + 2)

    by, size = [2] * n, [4] * n
    linear = {1: "linear", 2: "bilinear", 3: "trilinear"}[n]
    found = {f"avg_pool{n}d": plain(by), f"max_pool{n}d": plain(by), f"adaptive_avg_pool{n}d": plain(by),
             f"adaptive_max_pool{n}d": first(by), f"max_pool{n}d_with_indices": first(by)}
    for name, corners in ((f"upsample_nearest{n}d", ()), (f"_upsample_nearest_exact{n}d", ()),
                          (f"upsample_{linear}{n}d", (False,)), ("upsample_bicubic2d", (False,)),
                          ("_upsample_bilinear2d_aa", (False,)), ("_upsample_bicubic2d_aa", (False,))):
        if f"{n}d" not in name:
            continue
        found |= {name: plain(size, *corners), f"{name}.vec": plain(None, *corners, [2.0] * n)}
    return {name: rank(row) for name, row in found.items()} | {
        f"conv{n}d": convolved(n), f"conv{n}d.padding": convolved(n, [1] * n, "same"),
        f"conv_transpose{n}d{'.input' * (n > 1)}": convolved(n, by)}


def rnn(op: Any, y: Proxy, g: Graph) -> Any:
    """Channels read step by step; the first state is zero."""
    gates = {"lstm": 4, "gru": 3}.get(str(op).split(".")[1], 1)
    start = aten.new_zeros.default(y, [1, length(y), CHANNELS])
    weights = [g.stored(gates * CHANNELS, CHANNELS) for _ in range(2)] + [g.stored(gates * CHANNELS) for _ in range(2)]
    return last(op(last(y), [start, start] if gates == 4 else start, weights, True, 1, 0.0, False, False, True)[0])


PLAIN = [
    "contiguous", "clone", "detach", "alias", "lift_fresh_copy", "positive", "mT", "adjoint", "relu", "relu6",
    "hardtanh", "hardswish", "hardsigmoid", "silu", "mish", "gelu", "elu", "selu", "celu", "leaky_relu", "softplus",
    "softshrink", "hardshrink", "log_sigmoid"]
ROWS: dict[str, Row] = {
    **dict.fromkeys(PLAIN, plain()),
    **{f"{kind}dropout": plain(0.5, False) for kind in ("", "feature_", "alpha_", "feature_alpha_")},
    "to.dtype": plain(torch.float32), "to.dtype_layout": plain(dtype=torch.float32), "_to_copy": plain(),
    "to.device": plain(torch.device("cpu"), torch.float32), "threshold": plain(0.6, 0.1), "rrelu": plain(0.1, 0.2),
    **dict.fromkeys(["to.other", "type_as", "view_as", "reshape_as"], Row(lambda op, y, g: op(y, y))),
    **dict.fromkeys(["zero", "zeros_like", "ones_like"], added()), "full_like": added(0.5), "fill.Scalar": added(0.5),
    "zeros": filled(), "ones": filled(), "full": filled(0.5), "new_zeros": filled(new=True),
    "new_ones": filled(new=True), "new_full": filled(0.5, new=True),
    **spatial(1), **spatial(2), **spatial(3),
    "where.ScalarOther": Row(lambda op, y, g: op(aten.gt.Scalar(y, 0), y, 0.5)),
    "where.ScalarSelf": Row(lambda op, y, g: op(aten.gt.Scalar(y, 0), 0.5, y)),
    "where.Scalar": Row(lambda op, y, g: op(aten.gt.Scalar(y, 0), 0.5, -0.5)),
    "softmax.int": plain(2), "_softmax": plain(2, False), "log_softmax.int": plain(2), "_log_softmax": plain(2, False),
    "cumsum": plain(2), "cumprod": plain(2), "flip": plain([2]), "roll": plain([1], [2]), "sort": first(2),
    "topk": first(4, 2), "argsort": numbers(2), "argmax": numbers(2), "argmin": numbers(2),
    "grid_sampler": sampled(2), "grid_sampler_2d": sampled(2), "grid_sampler_3d": sampled(3), "glu": plain(1),
    "linear": Row(lambda op, y, g: last(op(last(y), g.stored(8, CHANNELS), g.stored(8)))),
    "embedding": Row(lambda op, y, g: aten.add.Tensor(op(g.stored(5, CHANNELS), g.stored(of=torch.tensor([3]))), y), 2),
    "scaled_dot_product_attention": Row(lambda op, y, g: last(op(last(y), last(y), last(y))), 3),
    "sym_size.int": Row(lambda op, y, g: aten.view.default(y, [op(y, 0), CHANNELS, 36])),
    "batch_norm": Row(lambda op, y, g: op(y, *(g.stored(CHANNELS) for _ in range(4)), False, 0.1, 1e-5, False)),
    "_native_batch_norm_legit_no_training": Row(lambda op, y, g: op(y, *(g.stored(CHANNELS) for _ in range(4)), 0.1,
                                                                    1e-5)[0]),
    "instance_norm": Row(lambda op, y, g: op(y, g.stored(CHANNELS), g.stored(CHANNELS), None, None, True, 0.1, 1e-5,
                                             False)),
    "prelu": Row(lambda op, y, g: op(aten.sub.Tensor(y, g.stored(1)), g.stored(CHANNELS))),
    "layer_norm": normalized(None, 1e-5, False), "rms_norm": normalized(1e-5),
    "group_norm": Row(lambda op, y, g: op(y, 6, g.stored(CHANNELS), g.stored(CHANNELS), 1e-5, False)),
    "_weight_norm": Row(lambda op, y, g: aten.conv2d.default(y, op(g.stored(8, CHANNELS, 1, 1), g.stored(8, 1, 1, 1)))),
    "mean": added(), "sum": added(), "amax": reduced(), "amin": reduced(), "logsumexp": reduced(),
    **dict.fromkeys(["mean.dim", "sum.dim_IntList", "var.dim", "std.dim"], reduced()),
    **dict.fromkeys(["var.correction", "std.correction"], reduced(correction=1)),
    "var_mean.correction": reduced(correction=1, of=lambda v: v[0]), "linalg_vector_norm": reduced(2),
    "norm.ScalarOpt_dim": reduced(2), "prod.dim_int": reduced(dims=int),
    **dict.fromkeys(["max.dim", "min.dim"], first(2)),
    **dict.fromkeys(["all.dim", "any.dim"], reduced(dims=int, of=as_float)),
    "matmul": Row(lambda op, y, g: last(op(last(y), g.stored(CHANNELS, 8))), 3),
    "mm": Row(lambda op, y, g: op(y, g.stored(CHANNELS, 8)), 2),
    "mv": Row(lambda op, y, g: aten.unsqueeze.default(op(y, g.stored(CHANNELS)), 1), 2),
    "dot": Row(lambda op, y, g: aten.add.Tensor(y, op(aten.select.int(y, 0, 0), g.stored(CHANNELS))), 2, False),
    "outer": Row(lambda op, y, g: aten.add.Tensor(y, aten.sum.dim_IntList(op(aten.select.int(y, 0, 0), g.stored(8)),
                                                                          [1])), 2),
    "bmm": Row(lambda op, y, g: op(y, op(last(y), y)), 3),
    "baddbmm": Row(lambda op, y, g: op(aten.clone.default(y), y, aten.bmm.default(last(y), y)), 3),
    "addmm": Row(lambda op, y, g: op(aten.clone.default(y), y, g.stored(CHANNELS, CHANNELS)), 2),
    "embedding_bag": Row(lambda op, y, g: aten.add.Tensor(op(
        g.stored(5, CHANNELS), g.stored(of=torch.tensor([3, 1])), g.stored(of=torch.tensor([0])))[0], y), 2),
    "einsum": Row(lambda op, y, g: op("nchw,cd->ndhw", [y, g.stored(CHANNELS, 8)])),
    **{f"{name}.input": Row(rnn, 3) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
    **dict.fromkeys(["view", "reshape", "_unsafe_view"], Row(lambda op, y, g: op(y, [length(y), CHANNELS, 36]))),
    "flatten.using_ints": plain(2), "unflatten.int": plain(2, [2, 3]), "unsqueeze": plain(2),
    "squeeze": Row(lambda op, y, g: op(aten.unsqueeze.default(y, 2))),
    "squeeze.dim": Row(lambda op, y, g: op(aten.unsqueeze.default(y, 2), 2)),
    "squeeze.dims": Row(lambda op, y, g: op(aten.unsqueeze.default(y, 2), [2])),
    "permute": plain([0, 1, 3, 2]),
    **dict.fromkeys(["transpose.int", "swapaxes", "swapdims", "movedim.int"], plain(2, 3)),
    "t": Row(lambda op, y, g: aten.add.Tensor(aten.clone.default(op(op(aten.clone.default(y)))), y), 2),
    "numpy_T": Row(lambda op, y, g: op(op(y))),
    **dict.fromkeys(["expand", "broadcast_to"], Row(lambda op, y, g: op(aten.unsqueeze.default(y, 2),
                                                                        [-1, -1, 2, -1, -1]))),
    "expand_as": Row(lambda op, y, g: aten.add.Tensor(op(aten.narrow.default(y, 2, 0, 1), y), y)),
    "repeat": plain([1, 1, 2, 1]), "slice.Tensor": plain(1, 2, 10), "narrow": plain(1, 2, 8), "select.int": plain(2, 0),
    # truth values, and the bits of integers
    **{f"__{word}__.Tensor": Row(lambda op, y, g: as_float(op(aten.gt.Scalar(y, 0.5), aten.gt.Scalar(
        aten.flip.default(y, [2]), 0.5)))) for word in ("and", "or", "xor")},
    **{f"__{word}__.Scalar": Row(lambda op, y, g: as_float(op(aten._to_copy.default(
        aten.mul.Tensor(y, 100.0), dtype=torch.int64), 13))) for word in ("and", "or", "xor")},
    "select_scatter": Row(lambda op, y, g: op(y, aten.select.int(y, 2, 3), 2, 1)),
    "slice_scatter": Row(lambda op, y, g: op(y, aten.narrow.default(y, 1, 0, 4), 1, 4, 8)),
    "unbind.int": first(2), "split.Tensor": parted(6, 1), "unsafe_split.Tensor": parted(6, 1), "chunk": parted(2, 1),
    "unsafe_chunk": parted(2, 1), "split.sizes": parted([4, 8], 1), "split_with_sizes": parted([4, 8], 1),
    "tensor_split.sections": parted(2, 1), "tensor_split.indices": parted([4], 1),
    operator.getitem.__name__: Row(lambda op, y, g: op(aten.unbind.int(y, 2), 1)),
    **dict.fromkeys(["cat", "concat"], Row(lambda op, y, g: op([y, aten.neg.default(y)], 1))),
    "stack": Row(lambda op, y, g: op([y, aten.neg.default(y)], 2)),
    "pad": plain([1, 1, 0, 0, 2, 0]), "constant_pad_nd": plain([1, 1, 0, 0, 2, 0]),
    **{f"{kind}_pad{n}d": Row(lambda op, y, g, n=n: op(y, [1, 1] * n), n + 2)
       for kind in ("reflection", "replication") for n in (1, 2)},
    "pixel_shuffle": plain(2), "pixel_unshuffle": plain(2), "repeat_interleave.self_int": plain(2, 1),
    "index.Tensor": Row(lambda op, y, g: op(y, [None, None, g.stored(of=torch.tensor([3, 0]))])),
    "index_select": Row(lambda op, y, g: op(y, 2, g.stored(of=torch.tensor([3, 0])))),
    "gather": Row(lambda op, y, g: op(y, 2, aten.expand.default(g.stored(of=torch.tensor([3, 0]).view(1, 1, 2, 1)),
                                                                [length(y), CHANNELS, 2, 6]))),
    "im2col": plain([2, 2], [1, 1], [0, 0], [2, 2]),
    "col2im": Row(lambda op, y, g: op(aten.im2col.default(y, [2, 2], [1, 1], [0, 0], [2, 2]), [6, 6], [2, 2], [1, 1],
                                      [0, 0], [2, 2])),
    "bilinear": Row(lambda op, y, g: last(op(last(y), last(y), g.stored(8, CHANNELS, CHANNELS), g.stored(8)))),
    "channel_shuffle": plain(3), "native_channel_shuffle": plain(3),
}
#: what cannot be run here, and why
ABSENT = {"aten.cudnn_batch_norm.default": "on a GPU only",
          "torchvision.deform_conv2d.default": "of a package that need not be there: test_prune_axes_more.py",
          "aten.unsqueeze_.default": "gives the value that it was given its own shape; captures turn it"}


def name_of(op: Any) -> str:
    """Its row: "relu" for aten.relu.default and aten.relu_.default, "max.dim" for aten.max.dim."""
    packet, _, overload = str(op).removeprefix("aten.").partition(".")
    packet = packet if packet.startswith("_") else packet.removesuffix("_")
    return getattr(op, "__name__", "") if op is operator.getitem else packet + f".{overload}" * (overload != "default")


def test_every_rule_has_a_row_and_every_row_a_rule() -> None:
    assert {name_of(op) for op in RULES if str(op) not in ABSENT} == ROWS.keys()
    assert ABSENT.keys() <= {str(op) for op in RULES}


@pytest.mark.parametrize("op", [op for op in RULES if str(op) not in ABSENT], ids=str)
def test_half_of_the_channels_cut_is_half_of_them_zeroed(op: Any) -> None:
    row = ROWS[name_of(op)]
    net = Graph(row.rank).write(row, op)
    assert op in {n.target for n in net.graph.nodes}
    axes = axis_groups(net)
    assert any(m.tensor == "0.weight" for g in axes.groups for m in g.members), axes.frozen
    rng = np.random.default_rng(0)
    kept = kept_atoms(axes, {g.name: sorted(rng.permutation(len(g))[:len(g) // 2].tolist()) for g in axes.groups})
    small = cut(net, axes, kept)
    assert small.tensor("0.weight").shape[0] < CHANNELS
    args, _ = net.example_inputs(4)
    with torch.no_grad():
        given, wanted, whole = small(*args), zero(net, axes, kept)(*args), net(*args)
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(given, whole, atol=1e-4)
    if row.counted:
        assert axes.macs(kept) == pytest.approx(measure.macs(small).total)
