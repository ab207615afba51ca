"""Codebooks: k-means is no worse than a grid, zeros stay, the codebook trains, the index stays small."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import featherweight as fw
from featherweight import Task
from featherweight.errors import PlanError, RecipeError
from featherweight.numerics.kmeans import kmeans
from featherweight.share import Codebook
from featherweight.steps import Plan

quick = settings(max_examples=50, deadline=None)


def values(count: int, seed: int, zeros: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, generator=generator) ** 3
    return drawn * (torch.rand(count, generator=generator) >= zeros)


def slow_lloyd(points: list[float], k: int) -> list[float]:
    """k-means by the book: every point to the nearest of k centroids, every centroid to its points' mean."""
    low, high = min(points), max(points)
    centroids = [low + (high - low) * j / (k - 1) for j in range(k)]
    while True:
        groups: list[list[float]] = [[] for _ in centroids]
        for point in points:
            groups[min(range(k), key=lambda j: abs(point - centroids[j]))].append(point)
        moved = [sum(g) / len(g) if g else c for g, c in zip(groups, centroids, strict=True)]
        if max(abs(a - b) for a, b in zip(moved, centroids, strict=True)) < 1e-13:
            assert all(groups)
            return moved
        centroids = moved


# ---- k-means

@quick
@given(st.integers(1, 300), st.integers(2, 40), st.integers(0, 99), st.booleans())
def test_kmeans_is_never_worse_than_a_uniform_grid(count, k, seed, zeros):
    points = values(count, seed, 0.5 if zeros else 0).double()
    codebook, index = kmeans(points, k)
    assert len(codebook) <= k
    assert index.dtype == torch.uint8
    grid = torch.linspace(float(points.min()), float(points.max()), k, dtype=torch.float64)
    uniform = (points[:, None] - grid).abs().min(1).values.square().sum()
    assert float((codebook[index.long()] - points).square().sum()) <= float(uniform) * (1 + 1e-12) + 1e-15
    nearest = (points[:, None] - codebook).abs().min(1).values
    torch.testing.assert_close((codebook[index.long()] - points).abs(), nearest)


@pytest.mark.parametrize(("seed", "k"), [(0, 4), (1, 7), (2, 2), (3, 9)])
def test_kmeans_agrees_with_the_slow_one(seed, k):
    points = torch.rand(400, generator=torch.Generator().manual_seed(seed)).double()
    slow = slow_lloyd(points.tolist(), k)
    torch.testing.assert_close(kmeans(points, k)[0], torch.tensor(slow, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@quick
@given(st.integers(1, 300), st.integers(2, 20), st.integers(0, 99))
def test_held_zeros_are_code_0_and_nothing_else_is(count, k, seed):
    points = values(count, seed, 0.6)
    codebook, index = kmeans(points, k, hold_zero=True)
    assert float(codebook[0]) == 0.0
    assert torch.equal(index == 0, points == 0)
    assert len(codebook) <= k


def test_a_hole_around_zero_costs_no_entries():
    points = values(3000, 0)
    points = points[points.abs() > 1]
    codebook, index = kmeans(points, 16)
    assert len(codebook) == 16
    even = torch.linspace(float(points.min()), float(points.max()), 16)
    uniform = (points[:, None] - even).abs().min(1).values.square().sum()
    assert float((codebook[index.long()] - points).square().sum()) < 0.5 * float(uniform)


def test_few_values_are_kept_exactly():
    points = torch.tensor([[3.0, -1.0, 3.0], [0.5, 0.5, -1.0]])
    codebook, index = kmeans(points, 5)
    assert torch.equal(codebook[index.long()], points)
    assert codebook.tolist() == [-1.0, 0.5, 3.0]
    assert kmeans(torch.full((4,), 2.0), 1)[0].tolist() == [2.0]
    assert kmeans(torch.zeros(4), 3, hold_zero=True)[0].tolist() == [0.0]
    assert kmeans(torch.arange(1000.0), 300)[1].dtype == torch.int16
    with pytest.raises(ValueError, match="not finite"):
        kmeans(torch.tensor([1.0, float("nan")]), 2)
    with pytest.raises(ValueError, match="1 clusters; expected 2"):
        kmeans(points, 1, hold_zero=True)


# ---- the step

class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 32, 3, bias=False)
        self.small = nn.Conv2d(32, 4, 1)
        self.twice = nn.Linear(64, 64)
        self.embed = nn.Embedding(80, 64)
        self.tied = nn.Linear(64, 80, bias=False)
        self.tied.weight = self.embed.weight
        self.head = nn.Linear(64, 50)

    def forward(self, x, ids):
        x = self.small(torch.relu(self.conv(x))).flatten(1)
        x = self.twice(self.twice(x)) + self.embed(ids)
        return self.head(x), self.tied(x)


INPUTS = (torch.randn(2, 8, 6, 6), torch.tensor([3, 4]))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.head.weight[model.head.weight.abs() < 0.08] = 0
    return fw.capture(model, INPUTS)


def test_weights_become_looked_up_values(network, tmp_path):
    plan = Codebook(bits=5).plan(network, Task())
    assert [(s.weight, s.clusters, s.zeros) for s in plan.shared] == [
        ("conv.weight", 32, False), ("twice.weight", 32, False), ("head.weight", 32, True)]
    assert {s.path: s.reason for s in plan.skipped} == {
        "small.weight": "only 128 weights, fewer than min_size=1024",
        "tied.weight": "its weight is also read by aten.embedding.default"}
    shared = plan.apply(network)
    names = shared.tensors()
    assert not {"conv.weight", "twice.weight", "head.weight"} & set(names)
    assert names["conv.weight_codebook"].shape == (32,)
    assert names["head.weight_codebook"].shape == (31,)  # the zero is a constant
    assert names["conv.weight_index"].dtype == torch.uint8
    assert names["conv.weight_index"].shape == (32, 8, 3, 3)
    expected = network.copy()
    for item in plan.shared:
        weight = network.tensor(item.weight)
        codebook, index = kmeans(weight, 32, hold_zero=item.zeros)
        expected.set_tensor(item.weight, codebook[index.long()])
    for given_, want in zip(shared(*INPUTS), expected(*INPUTS), strict=True):
        torch.testing.assert_close(given_, want)
    assert shared.save(tmp_path / "b.fw") < network.save(tmp_path / "a.fw")
    for given_, want in zip(fw.load(tmp_path / "b.fw")(*INPUTS), shared(*INPUTS), strict=True):
        assert torch.equal(given_, want)


def head_weight(network) -> torch.Tensor:
    codebook, index = network.tensor("head.weight_codebook").detach(), network.tensor("head.weight_index")
    return torch.cat([codebook.new_zeros(1), codebook])[index.long()]


def test_the_codebook_trains_and_the_zeros_stay(network):
    shared = Codebook().plan(network, Task()).apply(network)
    zeros = network.tensor("head.weight") == 0
    before = head_weight(shared)
    optimizer = torch.optim.Adam(shared.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = sum(o.square().mean() for o in shared(*INPUTS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in shared.parameters())
    after = head_weight(shared)
    assert torch.equal(after == 0, zeros)
    assert (after != before).any()
    assert len(after.unique()) <= 32


def test_the_gradient_of_an_entry_is_the_sum_over_its_weights(network):
    """Han et al. 2016, eq. 3."""
    shared = Codebook().plan(network, Task()).apply(network)
    plain = network.copy()
    for name in ("conv.weight", "twice.weight"):
        plain.set_tensor(name, shared.tensor(f"{name}_codebook").detach()[shared.tensor(f"{name}_index").long()])
    plain.set_tensor("head.weight", head_weight(shared))
    for net in (shared, plain):
        sum(o.square().sum() for o in net(*INPUTS)).backward()
    index, gradient = shared.tensor("twice.weight_index"), plain.tensor("twice.weight").grad
    want = torch.stack([gradient[index == j].sum() for j in range(32)])
    torch.testing.assert_close(shared.tensor("twice.weight_codebook").grad, want, rtol=1e-4, atol=1e-4)


def test_zeros_are_values_like_others_unless_kept(network):
    plan = Codebook(keep_zeros=False).plan(network, Task())
    assert not any(s.zeros for s in plan.shared)
    assert plan.apply(network).tensor("head.weight_codebook").shape == (32,)


def test_plans_survive_json_and_apply_alike(network):
    before = {k: v.clone() for k, v in network.tensors().items()}
    plan = Codebook(clusters=100).plan(network, Task())
    again = Plan.from_json(plan.to_json())
    assert again == plan
    one, two = plan.apply(network), again.apply(network)
    assert all(torch.equal(one.tensors()[k], v) for k, v in two.tensors().items())
    assert all(torch.equal(network.tensors()[k], v) for k, v in before.items())
    repeated = Codebook().plan(one, Task())
    assert repeated.shared == ()
    assert {s.path for s in repeated.skipped} == {"small.weight", "tied.weight", "conv", "twice", "head"}
    assert any("computed, not stored" in s.reason for s in repeated.skipped)


def test_tied_and_frozen_weights_are_shared_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50))
    model[1].weight = model[0].weight
    model[0].weight.requires_grad_(False)
    network = fw.capture(model, torch.randn(2, 50))
    shared = Codebook().plan(network, Task()).apply(network)
    assert not [n for n in shared.tensors() if n.endswith("weight")]
    (name,) = [n for n in shared.tensors() if "codebook" in n]
    assert not shared.tensor(name).requires_grad
    assert torch.allclose(shared(torch.eye(50)), network(torch.eye(50)), atol=0.02)


def test_errors_say_what_to_write(network):
    with pytest.raises(RecipeError, match=r"bits=4 and clusters=16; write one of them"):
        Codebook(bits=4, clusters=16).plan(network, Task())
    with pytest.raises(RecipeError, match=r"512 entries; expected 2 to 256"):
        Codebook(bits=9).plan(network, Task())
    with pytest.raises(RecipeError, match=r"per='row'"):
        Codebook(per="row").plan(network, Task())
    ignored = Codebook(ignore=("conv", "x*")).plan(network, Task()).skipped
    assert {s.path: s.reason for s in ignored if s.path in ("conv.weight", "x*")} == {
        "conv.weight": "named in ignore='conv'", "x*": "this pattern of ignore matched no layer"}
    other = fw.capture(nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8))
    with pytest.raises(PlanError, match=r"'conv.weight', which this network does not have"):
        Codebook().plan(network, Task()).apply(other)
    assert Codebook().plan(other, Task()).summary() == "codebooks: no layer"


def test_the_exported_index_stays_bytes(tmp_path):
    """torch.onnx folds constants of up to 8192 bytes; beyond them the file keeps one byte a weight."""
    torch.manual_seed(0)
    network = fw.capture(nn.Sequential(nn.Linear(128, 128), nn.ReLU()), torch.randn(2, 128))
    shared = Codebook().plan(network, Task()).apply(network)

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = shared

        def forward(self, x):
            return self.inner(x)

    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(Bare().eval(), (torch.randn(2, 128),), dynamo=True, verbose=False)
        program.save(tmp_path / "a.onnx")
    logging.disable(logging.NOTSET)
    assert (tmp_path / "a.onnx").stat().st_size < 128 * 128 + 8000  # as float32: 65536 and more
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    x = torch.randn(2, 128)
    given_ = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(given_), shared(x).detach(), rtol=1e-4, atol=1e-5)
