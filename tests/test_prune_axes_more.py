"""Axis groups through what timm's and transformers' models are made of: products, rotary positions, computed weights,
recurrent layers. Every construction is cut, zeroed and counted; the odd ones are held against a model written small."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight as fw
from featherweight import measure
from featherweight.axes.cut import cut, kept_atoms
from featherweight.axes.rules.products import equation_terms, matmul_terms
from featherweight.axes.zero import zero
from featherweight.prune import AxisGroups, axis_groups
from problems import unsettle

torch.set_num_threads(1)


class Lambda(nn.Module):
    """Named layers and tensors, and a function that calls them."""

    def __init__(self, call: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.call = call
        for name, part in parts.items():
            if isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            elif isinstance(part, Tensor):
                self.register_buffer(name, part)
            else:
                self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def p(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * 0.4)


def rows() -> Tensor:
    return torch.randn(2, 7, 12)


def images() -> Tensor:
    return torch.randn(2, 3, 6, 6)


def many_channels() -> Tensor:
    return torch.randn(2, 8, 6, 6)


def halves(axes: AxisGroups, seed: int) -> dict[str, list[int]]:
    rng = np.random.default_rng(seed)
    return {g.name: sorted(rng.permutation(len(g))[: max(1, len(g) // 2)].tolist()) for g in axes.groups}


def heads(m: Any, x: Tensor, name: str, count: int = 4) -> Tensor:
    return getattr(m, name)(x).unflatten(-1, (count, -1)).transpose(1, 2)


def joined(m: Any, x: Tensor) -> Tensor:
    return m.out(x.transpose(1, 2).flatten(2)).mean(1)


def projections(q: int = 24, kv: int = 24, out: int = 24) -> dict[str, nn.Module]:
    return {"q": nn.Linear(12, q), "k": nn.Linear(12, kv), "v": nn.Linear(12, kv), "out": nn.Linear(out, 5)}


def squares() -> Tensor:
    return torch.randn(2, 16, 12)


def mixed_tokens(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b(F.relu(h.transpose(1, 2) + m.t(h.transpose(1, 2))).transpose(1, 2))


def selective(m: Any, x: Tensor) -> Tensor:
    """Two branches weighed against one another by a softmax (selective kernels)."""
    h = m.c(x).unflatten(1, (2, 6))
    weight = m.f(h.sum(1).mean((2, 3))).view(x.shape[0], 2, 6, 1, 1).softmax(1)
    return m.o((h * weight).sum(1).mean((2, 3)))


def deformable(m: Any, x: Tensor) -> Tensor:
    """Heads laid beside the samples, each read at places of its own (deformable attention)."""
    count = x.shape[0]
    values = m.v(x).transpose(1, 2).reshape(count * 4, 3, 4, 4)
    places = m.g(x).tanh().view(count, 16, 4, 3, 2).transpose(1, 2).flatten(0, 1)
    found = F.grid_sample(values, places, align_corners=False).sum(-1)
    return m.o(found.view(count, 12, 16).transpose(1, 2))


def block_attention(m: Any, x: Tensor) -> Tensor:
    """A gate from the mean and the maximum over channels (CBAM)."""
    h = F.relu(m.c(x))
    seen = torch.cat([h.mean(1, keepdim=True), torch.max(h, 1, keepdim=True)[0]], 1)
    return m.o(h * m.s(seen).sigmoid()).mean((2, 3))


# ---- attention in many hands

def by_einsum(m: Any, x: Tensor) -> Tensor:
    q, k, v = (torch.einsum("nld,hde->nhle", x, w) for w in (m.q, m.k, m.v))
    weights = torch.einsum("nhle,nhme->nhlm", q, k).softmax(-1)
    return torch.einsum("nhle,hed->nld", torch.einsum("nhlm,nhme->nhle", weights, v), m.out).mean(1)


def by_baddbmm(m: Any, x: Tensor) -> Tensor:
    """Heads and samples in one axis, a learned bias per head and pair of positions."""
    n, length, _ = x.shape
    q, k, v = (heads(m, x, name).reshape(n * 4, length, 6) for name in "qkv")
    bias = m.bias.expand(n, 4, length, length).reshape(n * 4, length, length)
    weights = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=6 ** -0.5).softmax(-1)
    return joined(m, torch.bmm(weights, v).view(n, 4, length, 6))


def grouped(m: Any, x: Tensor) -> Tensor:
    q, k, v = heads(m, x, "q"), heads(m, x, "k", 2), heads(m, x, "v", 2)
    return joined(m, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def repeated(m: Any, x: Tensor) -> Tensor:
    q, k, v = heads(m, x, "q"), heads(m, x, "k", 2), heads(m, x, "v", 2)
    k, v = (t[:, :, None].expand(-1, 2, 2, 7, 6).reshape(-1, 4, 7, 6) for t in (k, v))
    return joined(m, F.scaled_dot_product_attention(q, k, v))


def interleaved_keys(m: Any, x: Tensor) -> Tensor:
    q, k, v = heads(m, x, "q"), *(heads(m, x, name, 2).repeat_interleave(2, 1) for name in "kv")
    return joined(m, F.scaled_dot_product_attention(q, k, v))


def cosine(m: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(m, x, name) for name in "qkv")
    weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * m.scale.exp()
    return joined(m, weights.softmax(-1) @ v)


def turned(x: Tensor, table: Tensor) -> Tensor:
    """Rotary positions, the two halves of a head's width as pairs; ``table`` [2, position, width]."""
    half = x.shape[-1] // 2
    return x * table[0] + torch.cat([-x[..., half:], x[..., :half]], -1) * table[1]


def rotary(m: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(m, x, name) for name in "qkv")
    angles = torch.outer(torch.arange(7.0), m.frequencies)
    table = torch.stack([torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()])
    return joined(m, F.scaled_dot_product_attention(turned(q, table), turned(k, table), v))


def one_rotary(m: Any, x: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(7.0), m.frequencies)
    table = [torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()]
    q, k = (turned(f(x), table) for f in (m.q, m.k))
    return m.out((q @ k.transpose(1, 2) * 8 ** -0.5).softmax(-1) @ m.v(x)).mean(1)


def interleaved(m: Any, x: Tensor) -> Tensor:
    """Rotary positions on neighbours as pairs, and none on the first position, as EVA has it."""

    def turn(t: Tensor) -> Tensor:
        rest = t[:, :, 1:]
        other = torch.stack([-rest[..., 1::2], rest[..., ::2]], -1).reshape(rest.shape)
        return torch.cat([t[:, :, :1], rest * m.cos + other * m.sin], 2)

    q, k, v = (heads(m, x, name) for name in "qkv")
    return joined(m, F.scaled_dot_product_attention(turn(q), turn(k), v))


def over_channels(m: Any, x: Tensor) -> Tensor:
    """Cross-covariance attention: tokens are summed over, a head's channels look at one another."""
    q, k, v = (heads(m, x, name).transpose(-2, -1) for name in "qkv")
    weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return joined(m, (weights.softmax(-1) @ v).transpose(-2, -1))


# ---- normalizations, gates, computed weights

def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def root_mean_square(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    x = x + m.down(F.silu(m.gate(rms(x, m.first))) * m.up(rms(x, m.first)))
    return m.head(rms(x, m.last)).mean(1)


def efficient_gate(m: Any, x: Tensor) -> Tensor:
    x = m.a(x).relu()
    gate = m.g(x.mean((2, 3)).unsqueeze(1)).sigmoid()
    return m.b(x * gate.view(-1, 10, 1, 1)).mean((2, 3))


def squeeze(m: Any, x: Tensor) -> Tensor:
    x = m.a(x).relu()
    return m.b(x * m.up(m.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid() * m.scale).mean((2, 3))


def standardized(weight: Tensor, gain: Tensor) -> Tensor:
    """Weight standardization (Qiao et al. 2019) as a batch norm over the stored weight."""
    flat = weight.reshape(1, weight.shape[0], -1)
    return F.batch_norm(flat, None, None, weight=gain * 0.3, training=True, momentum=0.0, eps=1e-6).reshape_as(weight)


def standard_layers(m: Any, x: Tensor) -> Tensor:
    x = F.conv2d(x, standardized(m.w, m.g), m.b, padding=1).relu()
    return m.head(F.conv2d(x, standardized(m.w2, m.g2)).relu().mean((2, 3)))


def stacked_tokens(m: Any, x: Tensor) -> Tensor:
    """Tokens of three paths weighed by a convolution that is one channel wide, as CoaT has it."""
    tokens = torch.stack([m.a(x[:, 0]), m.b(x[:, 1]), m.c(x[:, 2])], 1)
    return m.head(m.mix(tokens).squeeze(1))


def recurrent(m: Any, x: Tensor) -> Tensor:
    return m.head(m.r(m.a(x))[0]).mean(1)


def last_state(m: Any, x: Tensor) -> Tensor:
    return m.head(m.r(x)[1][-1])


def ws() -> dict[str, nn.Parameter]:
    return {"w": p(10, 3, 3, 3), "g": p(10), "b": p(10), "w2": p(8, 10, 1, 1), "g2": p(8)}


def gate() -> nn.Module:
    return nn.Conv1d(1, 1, 3, padding=1, bias=False)


def hooked(call: Callable[..., Tensor], **more: Any) -> Callable[[], nn.Module]:
    return lambda: Lambda(call, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 4, 1), **more)


def modulated(m: Any, x: Tensor) -> Tensor:
    """Every sample has filters of its own, as StyleGAN2 and CondConv do it: the batch is a convolution's groups."""
    count, gain, y = x.shape[0], m.r(x.mean((2, 3))), m.a(x)
    weight = (gain[:, None, :, None, None] * m.w[None]).reshape(count * 8, 6, 3, 3)
    made = F.conv2d(y.reshape(1, count * 6, *x.shape[2:]), weight, padding=1, groups=count)
    return m.b(made.reshape(count, 8, *x.shape[2:]))


def chosen_tokens(m: Any, x: Tensor) -> Tensor:
    """The tokens that a gate ranks highest, all channels of each."""
    y = F.relu(m.a(x))
    at = m.g(y)[..., 0].topk(3, 1)[1]
    return m.b(torch.gather(y, 1, at[..., None].expand(-1, -1, 10)))


def cells(m: Any, x: Tensor) -> Tensor:
    """Recurrent cells called step by step: one with a cell's memory, one without."""
    h, c, s = (x.new_zeros(x.shape[0], size) for size in (8, 8, 6))
    for step in range(3):
        h, c = m.lstm(x[:, step], (h, c))
        s = m.gru(h, s)
    return m.head(s)


def of_three(m: Any, x: Tensor) -> Tensor:
    """Two matrices around what a layer makes."""
    made = torch.einsum("ab,cd,nlac->nlbd", m.m, m.k, m.a(x).unflatten(-1, (3, 4)))
    return m.out(made.flatten(-2)).mean(1)


Built = tuple[Callable[[], nn.Module], Callable[[], Tensor], list[int]]
#: name -> (module, inputs, sizes of the groups)
CASES: dict[str, Built] = {
    "einsum attention": (lambda: Lambda(by_einsum, q=p(4, 12, 6), k=p(4, 12, 6), v=p(4, 12, 6), out=p(4, 6, 5)), rows,
                         [4, 6]),
    "einsum of three": (lambda: Lambda(of_three, m=p(3, 5), k=p(4, 6), a=nn.Linear(12, 12), out=nn.Linear(30, 5)), rows,
                        [3]),
    "baddbmm attention": (lambda: Lambda(by_baddbmm, bias=p(4, 7, 7), **projections()), rows, [4]),
    "grouped queries": (lambda: Lambda(grouped, **projections(kv=12)), rows, [2]),
    "repeated keys": (lambda: Lambda(repeated, **projections(kv=12)), rows, [2]),
    "interleaved keys": (lambda: Lambda(interleaved_keys, **projections(kv=12)), rows, [2]),
    "cosine attention": (lambda: Lambda(cosine, scale=p(4, 1, 1), **projections()), rows, [4]),
    "rotary": (lambda: Lambda(rotary, frequencies=torch.rand(3), **projections()), rows, [4]),
    "rotary, one head": (lambda: Lambda(one_rotary, frequencies=torch.rand(4), **projections(8, 8, 8)), rows, [4, 8]),
    "interleaved rotary": (lambda: Lambda(interleaved, cos=torch.rand(6, 6), sin=torch.rand(6, 6), **projections()),
                           rows, [4]),
    "attention over channels": (lambda: Lambda(over_channels, **projections()), rows, [4]),
    "written root mean square": (lambda: Lambda(root_mean_square, stem=nn.Linear(12, 8), gate=nn.Linear(8, 20),
                                                up=nn.Linear(8, 20), down=nn.Linear(20, 8), head=nn.Linear(8, 4),
                                                first=p(8), last=p(8)), rows, [8, 20]),
    "depthwise on an input": (lambda: nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, groups=8), nn.BatchNorm2d(16),
                                                    nn.ReLU6(), nn.Conv2d(16, 4, 1)), many_channels, [8]),
    "groups transposed on an input": (lambda: nn.Sequential(nn.ConvTranspose2d(8, 12, 2, 2, groups=4), nn.ReLU(),
                                                            nn.Conv2d(12, 4, 1)), many_channels, [4]),
    "efficient channel gate": (lambda: Lambda(efficient_gate, a=nn.Conv2d(3, 10, 1), g=gate(), b=nn.Conv2d(10, 4, 1)),
                               images, [10]),
    "squeeze and layer scale": (lambda: Lambda(squeeze, a=nn.Conv2d(3, 10, 1), down=nn.Conv2d(10, 6, 1),
                                               up=nn.Conv2d(6, 10, 1), scale=p(10, 1, 1), b=nn.Conv2d(10, 4, 1)),
                                images, [6, 10]),
    "standardized weights": (lambda: Lambda(standard_layers, head=nn.Linear(8, 4), **ws()), images, [8, 10]),
    "normalized weights": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 10, 3)), nn.ReLU(),
                                                 nn.utils.parametrizations.weight_norm(nn.Conv2d(10, 8, 1), dim=1),
                                                 nn.ReLU(), nn.Conv2d(8, 4, 1)), images, [8, 10]),
    "pixels in channels": (lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.PixelUnshuffle(2), nn.Conv2d(24, 4, 1)), images,
                           [6]),
    "stacked tokens": (lambda: Lambda(stacked_tokens, a=nn.Linear(12, 8), b=nn.Linear(12, 8), c=nn.Linear(12, 8),
                                      mix=nn.Conv1d(3, 1, 1), head=nn.Linear(8, 4)), rows, [8]),
    "two matrices multiplied": (lambda: Lambda(lambda m, x: (torch.addmm(m.bias, x[:, 0], m.w) @ m.w2), bias=p(9),
                                               w=p(12, 9), w2=p(9, 4)), rows, [9]),
    "lstm": (lambda: Lambda(recurrent, a=nn.Linear(12, 6), r=nn.LSTM(6, 8, batch_first=True), head=nn.Linear(8, 4)),
             rows, [6, 8]),
    "deep lstm, both ways": (lambda: Lambda(recurrent, a=nn.Linear(12, 6), head=nn.Linear(16, 4), r=nn.LSTM(
        6, 8, num_layers=2, bidirectional=True, batch_first=True)), rows, [6, 8]),
    "gru": (lambda: Lambda(recurrent, a=nn.Linear(12, 6), r=nn.GRU(6, 8, batch_first=True), head=nn.Linear(8, 4)), rows,
            [6, 8]),
    "a linear layer across tokens": (lambda: Lambda(mixed_tokens, a=nn.Linear(12, 20), t=nn.Linear(7, 7),
                                                    b=nn.Linear(20, 4)), rows, [20]),
    "an expanded weight in baddbmm": (lambda: Lambda(lambda m, x: torch.baddbmm(
        m.c.view(1, 1, -1), m.a(x), m.w.unsqueeze(0).expand(x.shape[0], -1, -1)) @ m.v, a=nn.Linear(12, 8), w=p(8, 10),
        c=p(10), v=p(10, 4)), rows, [8, 10]),
    "weights of two stored tensors": (lambda: Lambda(lambda m, x: F.relu(x @ (m.w @ m.u)) @ m.v, w=p(12, 6), u=p(6, 10),
                                                     v=p(10, 4)), rows, [10]),
    "a table projected": (lambda: Lambda(lambda m, x: m.o(F.relu(m.a(x)) @ m.p(m.n(m.t.weight)).t()),
                                         a=nn.Linear(12, 10), t=nn.Embedding(6, 8), n=nn.LayerNorm(8),
                                         p=nn.Linear(8, 10), o=nn.Linear(6, 4)), rows, [10]),
    "where with a number": (lambda: Lambda(lambda m, x: m.b(torch.where(m.a(x) > 0, m.a(x), 0.0)), a=nn.Linear(12, 10),
                                           b=nn.Linear(10, 4)), rows, [10]),
    "softmax over branches": (lambda: Lambda(selective, c=nn.Conv2d(3, 12, 1), f=nn.Linear(6, 12), o=nn.Linear(6, 4)),
                              images, [6]),
    "heads sampled at computed places": (lambda: Lambda(deformable, v=nn.Linear(12, 12), g=nn.Linear(12, 24),
                                                        o=nn.Linear(12, 4)), squares, [4]),
    "a maximum over channels": (lambda: Lambda(block_attention, c=nn.Conv2d(3, 10, 1), s=nn.Conv2d(2, 1, 3, padding=1),
                                               o=nn.Conv2d(10, 4, 1)), images, [10]),
    "a stored permutation": (lambda: Lambda(lambda m, x: m.b(m.a(x).index_select(2, m.i) + m.a(x)[:, :, m.j]),
                                            a=nn.Linear(12, 10), b=nn.Linear(10, 4), i=torch.arange(10).flip(0),
                                            j=torch.arange(10).roll(3)), rows, [2, 4]),
    "sorted beside": (lambda: Lambda(lambda m, x: m.b(F.relu(m.a(x))) * torch.sort(m.g(x), -1)[0][..., :1],
                                     a=nn.Linear(12, 10), g=nn.Linear(12, 3), b=nn.Linear(10, 4)), rows, [10]),
    "patches unfolded": (hooked(lambda m, x: m.b(F.fold(F.unfold(m.a(x), 2, stride=2), 6, 2, stride=2))), images, [8]),
    "tokens chosen by a gate": (lambda: Lambda(chosen_tokens, a=nn.Linear(12, 10), g=nn.Linear(10, 1),
                                               b=nn.Linear(10, 4)), rows, [10]),
    "groups that the batch makes": (lambda: Lambda(modulated, a=nn.Conv2d(3, 6, 1), w=p(8, 6, 3, 3), r=nn.Linear(3, 6),
                                                   b=nn.Conv2d(8, 4, 1)), images, [6, 8]),
    "a projected lstm": (lambda: Lambda(recurrent, a=nn.Linear(12, 6), head=nn.Linear(5, 4), r=nn.LSTM(
        6, 8, proj_size=5, batch_first=True)), rows, [5, 6, 8]),
    "cells": (lambda: Lambda(cells, lstm=nn.LSTMCell(12, 8), gru=nn.GRUCell(8, 6), head=nn.Linear(6, 4)), rows, [6, 8]),
    "two values in a bilinear layer": (lambda: Lambda(lambda m, x: m.o(m.b(m.a(x), m.c(x))), a=nn.Linear(12, 8),
                                                      c=nn.Linear(12, 6), b=nn.Bilinear(8, 6, 10),
                                                      o=nn.Linear(10, 4)), rows, [6, 8, 10]),
    "one token written over": (lambda: Lambda(lambda m, x: m.b(torch.select_scatter(m.a(x), m.c(x[:, 0]), 1, 2)),
                                              a=nn.Linear(12, 8), c=nn.Linear(12, 8), b=nn.Linear(8, 4)), rows, [8]),
    "masks joined": (lambda: Lambda(lambda m, x: m.b(torch.where((m.a(x) > 0) & (m.a(x) < 1), m.a(x), 0.5 * m.a(x))),
                                    a=nn.Linear(12, 8), b=nn.Linear(8, 4)), rows, [8]),
    "attention with learned keys": (lambda: Lambda(
        lambda m, x: m.o(m.a(m.i(x), m.i(x), m.i(x), need_weights=False)[0].sum(1)), i=nn.Linear(12, 12),
        a=nn.MultiheadAttention(12, 3, add_bias_kv=True, batch_first=True), o=nn.Linear(12, 4)), rows, [3, 12, 12]),
    "last state of an rnn": (lambda: Lambda(last_state, r=nn.RNN(12, 8, batch_first=True), head=nn.Linear(8, 4)), rows,
                             [8]),
}


@functools.cache
def captured(name: str) -> tuple[nn.Module, fw.Network, Tensor]:
    build, inputs, _ = CASES[name]
    torch.manual_seed(0)
    model = build().eval()
    unsettle(model)
    x = inputs()
    return model, fw.capture(model, x, parts=False, keep_parametrizations=True), x


@pytest.mark.parametrize("name", CASES)
def test_half_cut_is_half_zeroed_and_costs_what_was_said(name: str) -> None:
    _, net, x = captured(name)
    axes = axis_groups(net)
    assert sorted(map(len, axes.groups)) == sorted(CASES[name][2]), [(g.name, len(g)) for g in axes.groups]
    with torch.no_grad():
        before = net(x)
        for seed in range(3):
            kept = kept_atoms(axes, halves(axes, seed))
            small = cut(net, axes, kept)
            after = small(x)
            torch.testing.assert_close(after, zero(net, axes, kept)(x), rtol=1e-5, atol=1e-5)
            assert not torch.allclose(before, after, atol=1e-4)
            assert axes.macs(kept) == pytest.approx(measure.macs(small).total)
            torch.testing.assert_close(small(x[:1]), after[:1], rtol=1e-4, atol=1e-5)
    assert sum(q.numel() for q in small.parameters()) < sum(q.numel() for q in net.parameters())


@pytest.mark.parametrize("name", CASES)
def test_every_channel_may_go_alone_and_the_rest_learns(name: str) -> None:
    _, net, x = captured(name)
    axes = axis_groups(net)
    for group in axes.groups:
        kept = kept_atoms(axes, {group.name: [c for c in range(len(group)) if c != len(group) // 2]})
        small = cut(net, axes, kept)
        torch.testing.assert_close(small(x), zero(net, axes, kept)(x), rtol=1e-5, atol=1e-5)
        small(x).square().mean().backward()
        assert any(q.grad is not None and bool(q.grad.any()) for q in small.parameters())


# ---- against models written small

@pytest.mark.parametrize(("name", "gates"), [("lstm", 4), ("gru", 3)])
def test_a_cut_recurrent_layer_is_the_narrow_one(name: str, gates: int) -> None:
    model, net, x = captured(name)
    axes, keep = axis_groups(net), [0, 3, 4, 7]
    small = cut(net, axes, kept_atoms(axes, {"r": keep}))
    narrow = type(model.r)(6, 4, batch_first=True)
    at = [g * 8 + i for g in range(gates) for i in keep]
    with torch.no_grad():
        for own, wide in zip(narrow.parameters(), model.r.parameters(), strict=True):
            own.copy_(wide[at][:, keep] if wide.shape == (8 * gates, 8) else wide[at])
        wanted = F.linear(narrow(model.a(x))[0], model.head.weight[:, keep], model.head.bias).mean(1)
        torch.testing.assert_close(small(x), wanted, rtol=1e-5, atol=1e-6)


def test_cut_standardized_weights_are_standardized_over_what_is_left() -> None:
    model, net, x = captured("standardized weights")
    axes, keep = axis_groups(net), [1, 2, 5, 9]
    group = next(g for g in axes.groups if len(g) == 10)
    small = cut(net, axes, kept_atoms(axes, {group.name: keep}))
    with torch.no_grad():
        h = F.conv2d(x, standardized(model.w[keep], model.g[keep]), model.b[keep], padding=1).relu()
        wanted = model.head(F.conv2d(h, standardized(model.w2[:, keep], model.g2)).relu().mean((2, 3)))
        torch.testing.assert_close(small(x), wanted, rtol=1e-5, atol=1e-6)


def test_a_gate_over_neighbours_reads_zeros_where_channels_were_cut() -> None:
    model, net, x = captured("efficient channel gate")
    axes, keep = axis_groups(net), [0, 1, 4, 5, 9]
    small = cut(net, axes, kept_atoms(axes, {"a": keep}))
    with torch.no_grad():
        h = model.a(x).relu()
        gone = torch.ones(10)
        gone[keep] = 0
        h = h * (1 - gone).view(-1, 1, 1)
        wanted = model.b(h * model.g(h.mean((2, 3)).unsqueeze(1)).sigmoid().view(-1, 10, 1, 1)).mean((2, 3))
        torch.testing.assert_close(small(x), wanted, rtol=1e-5, atol=1e-6)


# ---- what is not cut

FROZEN: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str, str]] = {
    "a gate of even width": (hooked(lambda m, x: m.b(m.a(x) * m.g(F.pad(m.a(x).mean((2, 3)), (1, 0)).unsqueeze(1))
                                                     .transpose(1, 2).unsqueeze(-1)), g=nn.Conv1d(1, 1, 2)), images,
                             "a", "convolved over"),
    "a fourier transform": (hooked(lambda m, x: m.b(torch.fft.rfft2(m.a(x)).abs())), images, "a",
                            "fft_rfft2: no rule for this operator"),
    "gathered channels": (hooked(lambda m, x: m.b(m.a(x).gather(1, m.i.expand(x.shape[0], 8, 6, 6))),
                                 i=torch.arange(8).flip(0).view(1, 8, 1, 1)), images, "a",
                          "gather: channels are taken by a"),
    "a diagonal": (hooked(lambda m, x: torch.einsum("ncii->nc", m.a(x)) @ m.w, w=p(8, 4)), images, "a",
                   "einsum: no rule"),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_cannot_be_cut_is_named_with_the_reason(name: str) -> None:
    build, inputs, path, reason = FROZEN[name]
    net = fw.capture(build().eval(), inputs(), parts=False)
    axes = axis_groups(net)
    assert any(s.path == path and reason in s.reason for s in axes.frozen), axes.frozen
    kept = kept_atoms(axes, halves(axes, 0))
    x = inputs()
    torch.testing.assert_close(cut(net, axes, kept)(x), zero(net, axes, kept)(x), rtol=1e-5, atol=1e-5)


# ---- letters

@pytest.mark.parametrize(("equation", "shapes"), [
    ("ij,jk->ik", [(2, 3), (3, 4)]), ("ij,jk", [(2, 3), (3, 4)]), ("...ij,jk->...ik", [(5, 6, 2, 3), (3, 4)]),
    ("b...i,...i->b...", [(2, 5, 3), (5, 3)]), ("n h l d, n h m d -> n h l m", [(2, 3, 4, 5), (2, 3, 6, 5)]),
    ("...a,...b", [(4, 2), (3, 4, 5)])])
def test_letters_name_the_axes_that_einsum_makes(equation: str, shapes: list[tuple[int, ...]]) -> None:
    terms, result = equation_terms(equation, [len(s) for s in shapes])
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for letter, size in zip(term, shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    assert tuple(sizes[c] for c in result) == tuple(torch.einsum(equation, *(torch.ones(s) for s in shapes)).shape)


@pytest.mark.parametrize(("a", "b"), [((3,), (3,)), ((2, 3), (3,)), ((3,), (3, 4)), ((5, 2, 3), (3, 4)),
                                      ((2, 3), (6, 5, 3, 4)), ((6, 1, 2, 3), (5, 3, 4))])
def test_letters_name_the_axes_that_matmul_makes(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    terms, result = matmul_terms(len(a), len(b))
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, (a, b), strict=True):
        for letter, size in zip(term, shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    assert tuple(sizes[c] for c in result) == tuple((torch.ones(a) @ torch.ones(b)).shape)


def test_a_deformable_convolution_loses_its_channels_and_keeps_its_places() -> None:
    ops = pytest.importorskip("torchvision").ops
    torch.manual_seed(0)
    model = Lambda(lambda m, x: m.b(ops.deform_conv2d(m.a(x).relu(), m.p(m.a(x).relu()), m.w, m.c, padding=1)),
                   a=nn.Conv2d(3, 8, 1), p=nn.Conv2d(8, 18, 3, padding=1), w=p(10, 8, 3, 3), c=p(10),
                   b=nn.Conv2d(10, 4, 1)).eval()
    x = images()
    net = fw.capture(model, x, parts=False)
    axes = axis_groups(net)
    assert sorted(map(len, axes.groups)) == [8, 10]
    assert any(s.path == "p" and "coordinates" in s.reason for s in axes.frozen)
    kept = kept_atoms(axes, halves(axes, 0))
    small = cut(net, axes, kept)
    torch.testing.assert_close(small(x), zero(net, axes, kept)(x), rtol=1e-5, atol=1e-5)
    assert axes.macs(kept) == pytest.approx(measure.macs(small).total)
