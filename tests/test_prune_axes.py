"""Axis groups: which channels live and die together, found by labels and proved by zeroing and by cutting."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import featherweight as fw
from featherweight.axes.cut import cut, kept_atoms, zero
from featherweight.axes.labels import Field, Labels
from featherweight.axes.rules.reshapes import reshape
from featherweight.axes.trace import Trace
from featherweight.axes.unions import resolve_grids, solve
from featherweight.network.edit import WEIGHTED, weight_name
from featherweight.prune import AxisGroup, AxisGroups, axis_groups
from problems import PROBLEMS, Problem, images, network, tensors_of, unsettle

torch.set_num_threads(1)
every_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=str)


def halves(axes: AxisGroups, seed: int = 0) -> dict[str, list[int]]:
    rng = np.random.default_rng(seed)
    return {g.name: sorted(rng.permutation(len(g))[: max(1, len(g) // 2)].tolist()) for g in axes.groups}


def outputs(net: fw.Network, batch: int = 4) -> list[Tensor]:
    args, kwargs = net.example_inputs(batch)
    with torch.no_grad():
        return tensors_of(net(*args, **kwargs))


def assert_same(a: fw.Network, b: fw.Network) -> None:
    for x, y in zip(outputs(a), outputs(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def assert_cutting_is_zeroing(net: fw.Network, axes: AxisGroups, keep: dict[str, list[int]]) -> fw.Network:
    kept = kept_atoms(axes, keep)
    small = cut(net, axes, kept)
    assert_same(small, zero(net, axes, kept))
    return small


def without(group: AxisGroup, channel: int) -> dict[str, list[int]]:
    return {group.name: [c for c in range(len(group)) if c != channel]}


# ---- the problems

@every_problem
def test_half_of_every_group_cut_is_half_of_every_group_zeroed(problem: Problem) -> None:
    net = network(problem)
    axes = axis_groups(net)
    small = assert_cutting_is_zeroing(net, axes, halves(axes))
    if axes.groups:
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
        assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(outputs(net), outputs(small), strict=True))


@every_problem
def test_every_channel_may_go_alone(problem: Problem) -> None:
    net = network(problem)
    axes = axis_groups(net)
    for group in axes.groups:
        for channel in (0, len(group) - 1):
            assert_cutting_is_zeroing(net, axes, without(group, channel))


@every_problem
def test_zeroing_a_channel_silences_exactly_the_labelled_positions_that_others_read(problem: Problem) -> None:
    """The oracle: run the network with one channel's weights zero and look which positions every weighted call reads as
    zero for all samples; they are those that carry the channel's label, and no others. (ReLUs leak here, lest one
    that happens to be dead is taken for a cut.)"""
    assert_silenced(network(problem))


def assert_silenced(net: fw.Network) -> None:
    for node in net.calls(torch.ops.aten.relu.default, torch.ops.aten.relu_.default):
        node.target = torch.ops.aten.leaky_relu.default
    net.changed()
    axes = axis_groups(net)
    before = silent(net)
    for group in axes.groups:
        channel = len(group) // 2
        gone = ~kept_atoms(axes, without(group, channel))
        for name, now in silent(zero(net, axes, ~gone)).items():
            node = net.node(name)
            labels = axes.values[node.args[0].name]
            assert isinstance(labels, Labels)
            field = labels.field(axis_read(node, labels))
            mine = gone[field.atoms] if field is not None and len(field.dims) == 1 else np.zeros_like(now)
            assert not (mine & ~now).any(), f"{group.name}[{channel}] is still heard by {name}"
            assert not (now & ~before[name] & ~mine).any(), f"{group.name}[{channel}] silences others in {name}"


def axis_read(node: torch.fx.Node, labels: Labels) -> int:
    return len(labels.shape) - 1 if node.target is torch.ops.aten.linear.default else 1


def silent(net: fw.Network) -> dict[str, np.ndarray]:
    """Weighted call -> which positions of the axis it sums over are zero everywhere."""
    found: dict[str, np.ndarray] = {}
    seen: dict[str, Tensor] = {}
    names = {n.args[0].name for n in net.calls(*WEIGHTED)}
    args, kwargs = net.example_inputs(32, seed=3)
    with net.taps({n: (lambda v, n=n: seen.update({n: v.detach()})) for n in names}), torch.no_grad():
        net(*args, **kwargs)
    for node in net.calls(*WEIGHTED):
        value = seen[node.args[0].name]
        axis = value.dim() - 1 if node.target is torch.ops.aten.linear.default else 1
        found[node.name] = (value == 0).all(dim=tuple(d for d in range(value.dim()) if d != axis)).numpy() \
            if value.dim() > 1 else (value == 0).numpy()
    return found


@every_problem
def test_every_weight_that_makes_channels_is_in_a_group_or_named(problem: Problem) -> None:
    net = network(problem)
    axes = axis_groups(net)
    makers = {m.tensor for g in axes.groups for m in g.members if m.makes}
    named = {s.path for s in axes.frozen}
    assert all(s.reason for s in axes.frozen)
    for node in net.calls(*WEIGHTED):
        names = net.tied_names(str(weight_name(node)))
        assert makers & set(names) or named & {n.rpartition(".")[0] for n in names} | {node.meta["module"]}, names


@every_problem
def test_finding_groups_leaves_the_network_alone_and_survives_the_file(problem: Problem, tmp_path: Any) -> None:
    net = network(problem)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    nodes = [str(n) for n in net.graph.nodes]
    axes = axis_groups(net)
    assert nodes == [str(n) for n in net.graph.nodes]
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in state.items())
    net.save(tmp_path / "net.fw")
    again = axis_groups(fw.load(tmp_path / "net.fw"))
    assert again.names() == axes.names()
    assert again.frozen == axes.frozen
    small = cut(net, axes, kept_atoms(axes, halves(axes)))
    small.save(tmp_path / "small.fw")
    assert_same(small, fw.load(tmp_path / "small.fw"))


def test_padding_shortcuts_follow_what_they_are_added_to() -> None:
    axes = axis_groups(network(PROBLEMS["residual"]))
    stream, wider = axes["stem.0"], axes["layer2.0.conv2"]
    assert (len(stream), len(wider)) == (8, 8)
    assert stream.residual
    assert wider.residual
    assert not axes["layer2.0.conv1"].residual
    second = next(m for m in stream.members if m.tensor == "layer2.0.conv2.weight" and m.dim == 0)
    assert second.index[:, 0].tolist() == list(range(4, 12))
    rest = next(m for m in wider.members if m.tensor == "layer2.0.conv2.weight" and m.dim == 0)
    assert rest.index[:, 0].tolist() == [0, 1, 2, 3, 12, 13, 14, 15]


def test_a_flattened_channel_is_several_columns() -> None:
    axes = axis_groups(network(PROBLEMS["conv_bn"]))
    columns = next(m for m in axes["1.0"].members if m.tensor == "4.weight")
    assert columns.index.tolist() == [[4 * c + i for i in range(4)] for c in range(24)]


def test_shared_and_tied_weights_are_one_tensor() -> None:
    net = network(PROBLEMS["tied"])
    axes = axis_groups(net)
    small = cut(net, axes, kept_atoms(axes, halves(axes)))
    assert small.tensor("embedding.weight") is small.tensor("output.weight")
    assert small.tensor("embedding.weight").shape == (20, 8)


# ---- one construction each

class Lambda(nn.Module):
    """Named layers, and a function that calls them."""

    def __init__(self, call: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def c(i: int, o: int, k: int = 1, groups: int = 1) -> nn.Module:
    return nn.Conv2d(i, o, k, padding=k // 2, groups=groups)


def attend(m: Any, x: Tensor) -> Tensor:
    """Attention written out, as Swin has it: fused projection, heads by reshape and permute, a learned bias."""
    n, length, _ = x.shape
    q, k, v = m.qkv(x).reshape(n, length, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q * 6 ** -0.5) @ k.transpose(-2, -1) + m.bias.weight.T[:, None, :]
    return m.out((weights.softmax(-1) @ v).transpose(1, 2).reshape(n, length, 24)).sum(1)


def sdpa(m: Any, x: Tensor) -> Tensor:
    q, k, v = (f(x).unflatten(-1, (4, 6)).transpose(1, 2) for f in (m.q, m.k, m.v))
    return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).sum(1)


def shuffle(x: Tensor, groups: int) -> Tensor:
    n, ch, h, w = x.shape
    return x.view(n, groups, ch // groups, h, w).transpose(1, 2).reshape(n, ch, h, w)


def rows(n: int = 2) -> Tensor:
    return torch.randn(n, 7, 12)


def pooled_heads(m: Any, x: Tensor) -> Tensor:
    """Heads that become a batch, under one small convolution and one norm for all of them (as MViT has them)."""
    n, length, _ = x.shape
    q = m.q(x).reshape(n, length, 4, 6).transpose(1, 2)
    pooled = m.pool(q.transpose(2, 3).reshape(n * 4, 6, length)).reshape(n, 4, 6, -1).transpose(2, 3)
    return m.out(m.norm(torch.cat([q[:, :, :1], pooled], 2)).transpose(1, 2).reshape(n, -1, 24)).mean(1)


def windows(m: Any, x: Tensor) -> Tensor:
    """Windows shifted by rolling, cosine attention with a learned scale and bias per head, patches merged (as Swin)."""
    x = m.a(x.permute(0, 2, 3, 1))
    n, h, w, ch = x.shape
    y = torch.roll(F.pad(m.n(x), (0, 0, 0, 0, 0, 0)), (-1, -1), (1, 2)).view(n, h // 2, 2, w // 2, 2, ch)
    y = y.permute(0, 1, 3, 2, 4, 5).reshape(n * (h // 2) * (w // 2), 4, ch)
    q, k, v = m.qkv(y).reshape(-1, 4, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
    weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * m.scale.weight.view(4, 1, 1).exp()
    weights = weights + 16 * m.bias.weight.T.reshape(4, 4, 4).sigmoid()
    y = m.out((weights.softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, 24))
    y = y.view(n, h // 2, w // 2, 2, 2, ch).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, ch)
    x = x + torch.roll(y, (1, 1), (1, 2))
    x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
    return m.b(m.merge(x)).mean((1, 2))


#: name -> (module, inputs, sizes of the groups)
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], list[int]]] = {
    "slice of channels": (lambda: Lambda(lambda m, x: m.b(m.a(x)[:, 3:9]) + m.d(m.a(x)[:, 1::3]), a=c(3, 12), b=c(6, 4),
                                         d=c(4, 4)), images, [2, 2, 4, 4]),
    "split in parts": (lambda: Lambda(lambda m, x: m.b(torch.cat([p.relu() for p in m.a(x).split([4, 2, 6], 1)[::-1]],
                                                                 1)), a=c(3, 12), b=c(12, 4)), images, [12]),
    "uneven chunks": (lambda: Lambda(lambda m, x: sum(f(p).mean((2, 3)) for f, p in zip(
        (m.b, m.d, m.e), m.a(x).chunk(3, 1), strict=True)), a=c(3, 11), b=c(4, 4), d=c(4, 4), e=c(3, 4)), images,
        [4, 4, 3]),
    "shuffle": (lambda: Lambda(lambda m, x: m.b(shuffle(m.a(x).relu(), 3)), a=c(3, 12), b=c(12, 4)), images, [12]),
    "shuffle between grouped": (lambda: Lambda(lambda m, x: m.d(m.b(shuffle(m.a(x).relu(), 2)).relu()), a=c(4, 16),
                                               b=c(16, 16, 3, 2), d=c(16, 4)), lambda: images(channels=4), [8, 8]),
    "pixel shuffle": (lambda: Lambda(lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2)), a=c(3, 24), b=c(6, 4)), images, [6]),
    "depth multiplier": (lambda: Lambda(lambda m, x: m.d(m.b(m.a(x).relu()).relu()), a=c(3, 6), b=c(6, 12, 3, 6),
                                        d=c(12, 4)), images, [6]),
    "group norm": (lambda: Lambda(lambda m, x: m.b(m.n(m.a(x)).relu()), a=c(3, 12), n=nn.GroupNorm(4, 12), b=c(12, 4)),
                   images, [4]),
    "gated linear unit": (lambda: Lambda(lambda m, x: m.b(F.glu(m.a(x), 1)), a=c(3, 12), b=c(6, 4)), images, [6]),
    "prelu": (lambda: Lambda(lambda m, x: m.b(m.p(m.a(x))), a=c(3, 12), p=nn.PReLU(12), b=c(12, 4)), images, [12]),
    "channels last": (lambda: Lambda(lambda m, x: m.b(F.gelu(m.a(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2),
                                     a=nn.Linear(3, 12), b=nn.Linear(12, 4)), images, [12]),
    "resize and pool": (lambda: Lambda(lambda m, x: m.b(F.avg_pool2d(F.interpolate(m.a(x), scale_factor=2.0,
                                                                                   mode="bilinear"), 2)),
                                       a=c(3, 12), b=c(12, 4)), images, [12]),
    "written attention": (lambda: Lambda(attend, qkv=nn.Linear(12, 72), bias=nn.Linear(4, 7, bias=False),
                                         out=nn.Linear(24, 5)), rows, [4]),
    "attention": (lambda: Lambda(sdpa, q=nn.Linear(12, 24), k=nn.Linear(12, 24), v=nn.Linear(12, 24),
                                 out=nn.Linear(24, 5)), rows, [4]),
    "multihead attention": (lambda: Lambda(lambda m, x: m.a(x, x, x, need_weights=False)[0].sum(1),
                                           a=nn.MultiheadAttention(12, 3, batch_first=True)), rows, [3]),
    "transposed by groups": (lambda: Lambda(lambda m, x: m.d(m.b(m.a(x).relu()).relu()), a=c(3, 8),
                                            b=nn.ConvTranspose2d(8, 16, 2, 2, groups=4), d=c(16, 4)), images, [4]),
    "image beside channels": (lambda: Lambda(lambda m, x: m.b(torch.cat([x, m.a(x)], 1)), a=c(3, 12), b=c(15, 4)),
                              images, [12]),
    "one gate for all": (lambda: Lambda(lambda m, x: m.b(m.a(x) * torch.sigmoid(m.g(x))), a=c(3, 12), g=c(3, 1),
                                        b=c(12, 4)), images, [12]),
    "layer norm": (lambda: Lambda(lambda m, x: m.b(m.n(m.a(x))), a=nn.Linear(12, 8), n=nn.LayerNorm(8),
                                  b=nn.Linear(8, 4)), rows, [8]),
    "layer norm after layer norm": (lambda: Lambda(lambda m, x: m.b(m.n(m.m(m.a(x)) + 1)), a=nn.Linear(12, 8),
                                                   m=nn.LayerNorm(8), n=nn.LayerNorm(8, bias=False),
                                                   b=nn.Linear(8, 4)), rows, [8]),
    "root mean square": (lambda: Lambda(lambda m, x: m.b(m.n(m.a(x))), a=nn.Linear(12, 8), n=nn.RMSNorm(8, 1e-6),
                                        b=nn.Linear(8, 4)), rows, [8]),
    "root mean square written out": (lambda: Lambda(lambda m, x: m.b(m.a(x) * torch.rsqrt(
        m.a(x).pow(2).mean(-1, keepdim=True) + 1e-6)), a=nn.Linear(12, 8), b=nn.Linear(8, 4)), rows, [8]),
    "group norm of one group": (lambda: Lambda(lambda m, x: m.b(m.n(m.a(x))), a=c(3, 8), n=nn.GroupNorm(1, 8),
                                               b=c(8, 4)), images, [8]),
    "group norm of two": (lambda: Lambda(lambda m, x: m.b(m.n(m.a(x))), a=c(3, 12), n=nn.GroupNorm(2, 12), b=c(12, 4)),
                          images, [6]),
    "mean over channels": (lambda: Lambda(lambda m, x: m.a(x).sigmoid().mean(1), a=c(3, 8)), images, [8]),
    "spatial attention": (lambda: Lambda(lambda m, x: m.b(m.a(x) * m.g(torch.cat(
        [m.a(x).mean(1, True), m.a(x).amax(1, True)], 1)).sigmoid()), a=c(3, 12), g=c(2, 1, 3), b=c(12, 4)), images,
        [12]),
    "unit length": (lambda: Lambda(lambda m, x: m.b(F.normalize(m.a(x), dim=-1)), a=nn.Linear(12, 8),
                                   b=nn.Linear(8, 4)), rows, [8]),
    "single head": (lambda: Lambda(lambda m, x: m.b(m.q(x).sigmoid() @ m.k(x).sigmoid().transpose(1, 2)),
                                   q=nn.Linear(12, 8), k=nn.Linear(12, 8), b=nn.Linear(7, 4)), rows, [8]),
    "single head fused": (lambda: Lambda(lambda m, x: m.b(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x))),
                                         q=nn.Linear(12, 8), k=nn.Linear(12, 8), v=nn.Linear(12, 6), b=nn.Linear(6, 4)),
                          rows, [6, 8]),
    "correlation": (lambda: Lambda(lambda m, x: m.b((m.a(x).flatten(2).transpose(1, 2) @ m.a(x).flatten(2)).view(
        -1, 64, 8, 8)), a=c(3, 12), b=c(64, 4)), images, [12]),
    "pooled heads": (lambda: Lambda(pooled_heads, q=nn.Linear(12, 24), pool=nn.Conv1d(6, 6, 3, 2, 1, groups=6),
                                    norm=nn.LayerNorm(6), out=nn.Linear(24, 5)), rows, [4]),
    "shifted windows": (lambda: Lambda(windows, a=nn.Linear(3, 12), n=nn.LayerNorm(12), qkv=nn.Linear(12, 72),
                                       bias=nn.Linear(4, 16, bias=False), scale=nn.Linear(4, 1, bias=False),
                                       out=nn.Linear(24, 12), merge=nn.LayerNorm(48), b=nn.Linear(48, 5)), images,
                        [4, 12]),
    "channels written into": (lambda: Lambda(lambda m, x: m.b(torch.slice_scatter(m.a(x), m.d(x), 1, 4, 8)), a=c(3, 12),
                                             b=c(12, 4), d=c(3, 4)), images, [4, 8]),
    "sampled at places": (lambda: Lambda(lambda m, x: m.b(F.grid_sample(m.a(x), m.g(x).permute(0, 2, 3, 1).tanh(),
                                                                        align_corners=False)), a=c(3, 12), g=c(3, 2),
                                         b=c(12, 4)), images, [12]),
}


@functools.cache
def captured(name: str) -> fw.Network:
    """One of CASES; do not write into it."""
    build, inputs, _ = CASES[name]
    torch.manual_seed(0)
    model = build().eval()
    unsettle(model)
    return fw.capture(model, inputs(), parts=False)


@pytest.mark.parametrize("name", CASES)
def test_construction(name: str) -> None:
    net, sizes = captured(name), CASES[name][2]
    axes = axis_groups(net)
    assert sorted(map(len, axes.groups)) == sorted(sizes), [(g.name, len(g)) for g in axes.groups]
    for seed in range(3):
        small = assert_cutting_is_zeroing(net, axes, halves(axes, seed))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", [
    "slice of channels", "split in parts", "shuffle", "shuffle between grouped", "pixel shuffle", "depth multiplier",
    "written attention", "shifted windows", "layer norm after layer norm", "channels written into"])
def test_zeroing_a_channel_of_a_construction_silences_what_carries_its_label(name: str) -> None:
    assert_silenced(captured(name).copy())


FROZEN: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str]] = {
    "softmax": (lambda: Lambda(lambda m, x: m.b(m.a(x).softmax(1)), a=c(3, 8), b=c(8, 4)), images, "softmax: it mixes"),
    "output": (lambda: Lambda(lambda m, x: m.a(x), a=c(3, 8)), images, "the network's output"),
    "added to the image": (lambda: Lambda(lambda m, x: m.b(m.a(x) + x), a=c(3, 3), b=c(3, 4)), images, "never cut"),
    "unknown": (lambda: Lambda(lambda m, x: m.b(torch.fft.rfft2(m.a(x)).abs()), a=c(3, 8), b=c(8, 4)), images,
                "fft_rfft2: no rule for this operator"),
    "one by its position": (lambda: Lambda(lambda m, x: m.b(m.a(x)) + m.a(x)[:, 2].unsqueeze(1), a=c(3, 3), b=c(3, 1)),
                            images, "select: one channel is taken"),
    "padded by ones": (lambda: Lambda(lambda m, x: m.b(F.pad(m.a(x), (0, 0, 0, 0, 2, 2), value=1.0)), a=c(3, 8),
                                      b=c(12, 4)), images, "something else than zeros"),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_cannot_be_cut_is_named_with_the_reason(name: str) -> None:
    build, inputs, reason = FROZEN[name]
    net = fw.capture(build().eval(), inputs(), parts=False)
    axes = axis_groups(net)
    assert any(s.path in ("a", "q") and reason in s.reason for s in axes.frozen), axes.frozen
    assert_cutting_is_zeroing(net, axes, halves(axes))


def test_grouped_convolutions_say_why_channels_are_blocks() -> None:
    axes = axis_groups(network(PROBLEMS["grouped"]))
    assert axes["0.0"].constraints == ("1.0: whole groups of 4",)
    assert axes["2.0"].constraints == ("3.0: the same positions in each of 2 groups",)


def test_cut_grouped_convolution_has_fewer_groups() -> None:
    net = network(PROBLEMS["grouped"])
    axes = axis_groups(net)
    small = cut(net, axes, kept_atoms(axes, {"0.0": [1, 2]}))
    assert small.tensor("1.0.weight").shape == (8, 4, 3, 3)
    assert [n.args[6] for n in small.calls(torch.ops.aten.conv2d.default) if len(n.args) > 6] == [2, 2]


def test_cutting_keeps_type_and_gradient_flag() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)).double().eval()
    model[0].weight.requires_grad_(False)
    net = fw.capture(model, torch.randn(2, 12, dtype=torch.float64))
    axes = axis_groups(net)
    small = cut(net, axes, kept_atoms(axes, {"0": [0, 5]}))
    assert small.tensor("0.weight").dtype is torch.float64
    assert not small.tensor("0.weight").requires_grad
    assert small.tensor("2.weight").requires_grad
    assert torch.equal(small.tensor("2.weight"), model[2].weight[:, [0, 5]])


# ---- the pieces

def spread(x: Labels) -> list[np.ndarray]:
    """Element by element: the atom that every element carries, one array per field."""
    found = []
    for f in x.fields:
        shape = [x.shape[d] if d in f.dims else 1 for d in range(len(x.shape))]
        found.append(np.broadcast_to(f.atoms.reshape(shape), x.shape))
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_reshaped_labels_are_the_reshaped_elements(shape: list[int], random: Any) -> None:
    """Against the elements themselves: split, permute, reshape again."""
    net = network(PROBLEMS["mlp"])
    trace, node = Trace(net), next(iter(net.graph.nodes))
    dim = random.randrange(len(shape))
    atoms = trace.fresh(shape[dim])
    x = Labels(tuple(shape), (Field((dim,), atoms),))
    plain = spread(x)[0]
    for _ in range(4):
        if random.random() < 0.5 and len(x.shape) > 1:
            order = list(range(len(x.shape)))
            random.shuffle(order)
            x, plain = x.moved([x.shape[d] for d in order], order.index), plain.transpose(order)
        else:
            shape = factors(int(np.prod(x.shape)), random)
            x, plain = reshape(trace, x, tuple(shape), node), plain.reshape(shape)
        if not x.fields:
            assert (plain == plain.flat[0]).all()
            return
        assert np.array_equal(spread(x)[0], plain)


def factors(size: int, random: Any) -> list[int]:
    found = []
    while size > 1:
        f = random.choice([d for d in range(2, size + 1) if size % d == 0])
        found.append(f)
        size //= f
    return found or [1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30))
def test_components_are_those_of_a_slow_search(edges: list[tuple[int, int]]) -> None:
    pairs = [(np.array([a]), np.array([b])) for a, b in edges]
    found = solve(np.arange(20), pairs)
    label = list(range(20))
    for _ in range(20):
        for a, b in edges:
            label[a] = label[b] = min(label[a], label[b])
    assert found.tolist() == label


def test_a_grid_is_cut_along_its_longest_axis() -> None:
    grid = np.arange(12).reshape(3, 4)
    found = resolve_grids(np.arange(12), [grid])
    assert found.reshape(3, 4).tolist() == [[0, 1, 2, 3]] * 3
    rows_united = solve(np.arange(12), [(grid, np.broadcast_to(grid[:, :1], grid.shape))])
    assert resolve_grids(rows_united, [grid]).reshape(3, 4).tolist() == [[0] * 4, [4] * 4, [8] * 4]


def test_a_rule_of_ones_own() -> None:
    """The table is open: an operator without a rule freezes; with one it does not."""
    from featherweight.axes.rules.basics import RULES, same

    net = fw.capture(Lambda(lambda m, x: m.b(torch.tril(m.a(x))), a=c(3, 8), b=c(8, 4)).eval(), images())
    assert not axis_groups(net).groups
    RULES[torch.ops.aten.tril.default] = same
    try:
        axes = axis_groups(net)
        assert axes.names() == ("a",)
        assert_cutting_is_zeroing(net, axes, halves(axes))
    finally:
        operator.delitem(RULES, torch.ops.aten.tril.default)


def test_weights_that_are_computed_are_named() -> None:
    """A quantized network has no channels to cut, which is said of every layer rather than of none."""
    net = network(PROBLEMS["conv_bn"])
    rounded = fw.quantize.Quantize(activations=None).plan(net, fw.Task()).apply(net)
    axes = axis_groups(rounded)
    assert not axes.groups
    assert {s.path for s in axes.frozen} == {n.meta["module"] for n in rounded.calls(*WEIGHTED)}
    assert all("cut channels first" in s.reason for s in axes.frozen)


#: name -> sizes of the groups where the width of the heads goes
WIDTHS = {"written attention": [6], "attention": [6, 6], "multihead attention": [4], "pooled heads": [6],
          "shifted windows": [6, 12], "single head": [8]}


@pytest.mark.parametrize("name", WIDTHS)
def test_the_width_of_heads(name: str) -> None:
    """Every head loses the same number of positions, and the scale of attention stays."""
    net = captured(name)
    axes = axis_groups(net, heads="width")
    assert sorted(map(len, axes.groups)) == sorted(WIDTHS[name]), [(g.name, len(g)) for g in axes.groups]
    if name != "single head":
        assert any("the same positions in each of" in text for g in axes.groups for text in g.constraints)
    for seed in range(3):
        assert_cutting_is_zeroing(net, axes, halves(axes, seed))


def test_heads_are_whole_or_cut_in_width() -> None:
    with pytest.raises(fw.errors.PlanError, match=r"heads='half'.*write axis_groups"):
        axis_groups(network(PROBLEMS["attention"]), heads="half")


def test_time_grows_with_the_nodes() -> None:
    """Four times the blocks, about four times the time: far from sixteen."""
    import time

    def seconds(count: int) -> float:
        block = [nn.Sequential(c(16, 16, 3, groups=4), nn.GroupNorm(4, 16), nn.ReLU()) for _ in range(count)]
        net = fw.capture(nn.Sequential(c(3, 16), *block, c(16, 4)).eval(), images())
        axis_groups(net)
        start = time.process_time()
        axis_groups(net)
        return time.process_time() - start

    assert seconds(64) < min(9 * seconds(16), 3)
