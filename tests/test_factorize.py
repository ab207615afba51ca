"""Low rank: the error is the energy that was dropped, nothing grows in silence, all that stays is named."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import featherweight as fw
from featherweight import Task
from featherweight.errors import PlanError, RecipeError
from featherweight.factorize import LowRank
from featherweight.numerics import lowrank
from featherweight.steps import Plan

quick = settings(max_examples=30, deadline=None)
FORCE = -100.0  #: a min_gain that lets anything grow


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low(o: int, i: int, rank: int, kernel: int = 1, seed: int = 0) -> torch.Tensor:
    """A kernel [o, i, k, k] whose channel axes both have this rank."""
    core = randn(rank, rank, kernel, kernel, seed=seed)
    out, into = randn(o, rank, seed=seed + 1), randn(rank, i, seed=seed + 2)
    return torch.einsum("op,pqhw,qi->oihw", out.double(), core.double(), into.double()) / rank


class Net(nn.Module):
    """Every kind of layer that is split, and several that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.conv = nn.Conv2d(32, 64, 3, stride=2, padding=2, dilation=2, bias=False)
        self.point = nn.Conv2d(64, 96, 1, stride=2, padding=1)
        self.depth = nn.Conv2d(96, 96, 3, groups=96)
        self.same = nn.Conv2d(96, 64, 3, padding="same")
        self.up = nn.ConvTranspose2d(64, 32, 2)
        self.twice = nn.Linear(32, 32)
        self.head = nn.Linear(32, 100)
        with torch.no_grad():
            self.conv.weight.copy_(low(64, 32, 8, 3))
            self.point.weight.copy_(low(96, 64, 12))
            self.same.weight.copy_(low(64, 96, 10, 3))
            self.head.weight.copy_(low(100, 32, 5)[..., 0, 0])

    def forward(self, x):
        x = torch.relu(self.conv(torch.relu(self.norm(self.first(x)))))
        x = self.up(self.same(self.depth(self.point(x)))).mean((2, 3))
        return self.head(self.twice(torch.relu(self.twice(x))))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return fw.capture(Net(), torch.randn(2, 3, 24, 24))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.detach().abs().max()))


# ---- numerics

@quick
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99), st.data())
def test_the_split_of_a_matrix_is_the_best_of_its_rank(o, i, seed, data):
    matrix = randn(o, i, seed=seed).double()
    rank = data.draw(st.integers(1, min(o, i)))
    a, b = lowrank.split(matrix, rank)
    assert a.shape == (rank, i)
    assert b.shape == (o, rank)
    dropped = torch.linalg.svdvals(matrix)[rank:].square().sum()  # Eckart-Young
    torch.testing.assert_close((matrix - b @ a).square().sum(), dropped, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(a @ a.T, b.T @ b, rtol=1e-9, atol=1e-9)  # balanced


def test_rank_by_energy_is_the_smallest_that_keeps_it():
    for seed in range(20):
        values = randn(30, seed=seed).abs().sort(descending=True).values.double()
        for energy in (0.1, 0.5, 0.9, 0.99, 1.0):
            rank = lowrank.rank_by_energy(values, energy)
            kept = [float(values[:r].square().sum() / values.square().sum()) for r in range(31)]
            assert kept[rank] >= energy - 1e-12
            assert rank == 1 or kept[rank - 1] < energy
    assert lowrank.rank_by_energy(torch.tensor([2.0, 1.0, 0.0]), 1.0) == 2
    assert lowrank.rank_by_energy(torch.zeros(3), 0.9) == 1
    with pytest.raises(ValueError, match="energy 0"):
        lowrank.rank_by_energy(torch.ones(3), 0)


def test_singular_values_of_long_and_wide_matrices():
    for shape in ((5, 70), (70, 5), (20, 20)):
        matrix = randn(*shape)
        torch.testing.assert_close(lowrank.singular_values(matrix), torch.linalg.svdvals(matrix.double()))


def rebuilt(kernel: torch.Tensor, p: int, q: int, rounds: int = 1) -> torch.Tensor:
    a, core, b = lowrank.tucker2(kernel, p, q, rounds)
    return torch.einsum("op,pqhw,qi->oihw", b, core, a)


def test_tucker_of_full_rank_is_exact_and_below_it_within_what_both_axes_lose():
    kernel = randn(24, 16, 3, 3).double()
    torch.testing.assert_close(rebuilt(kernel, 24, 16), kernel)
    last = float("inf")
    for p, q in ((4, 4), (10, 6), (16, 12), (24, 15)):
        error = float((rebuilt(kernel, p, q) - kernel).square().sum())
        lost = [float(lowrank.singular_values(lowrank.unfold(kernel, mode))[rank:].square().sum())
                for mode, rank in ((0, p), (1, q))]
        assert max(lost) - 1e-9 <= error <= sum(lost) + 1e-9
        assert error <= float((rebuilt(kernel, p, q, 0) - kernel).square().sum()) + 1e-9  # the round helps
        assert error < last
        last = error


def test_tucker_finds_the_rank_that_is_there():
    kernel = low(40, 30, 6, 3)
    ranks = [lowrank.rank_by_energy(lowrank.singular_values(lowrank.unfold(kernel, m)), 1 - 1e-12) for m in (0, 1)]
    assert ranks == [6, 6]
    torch.testing.assert_close(rebuilt(kernel, 6, 6), kernel)


# ---- the step

def test_what_has_low_rank_is_split_without_loss(network):
    plan = LowRank(energy=1 - 1e-10).plan(network, Task())
    assert [(s.weight, s.ranks) for s in plan.splits] == [
        ("conv.weight", (8, 8)), ("point.weight", (12,)), ("same.weight", (10, 10)), ("head.weight", (5,))]
    assert plan.grows == ()
    small = plan.apply(network)
    x = torch.randn(3, 3, 24, 24)
    close(small(x), network(x))
    names = set(small.tensors())
    assert {"conv.reduce.weight", "conv.core.weight", "conv.expand.weight", "point.reduce.weight",
            "point.expand.weight", "point.expand.bias", "head.reduce.weight", "head.expand.weight",
            "head.expand.bias"} <= names
    assert not {"conv.weight", "point.weight", "point.bias", "head.weight", "head.bias"} & names
    made = {n.meta["module"] for n in small.calls() if any("reduce" in str(a) for a in n.all_input_nodes)}
    assert made == {"conv", "point", "same", "head"}


def test_everything_that_stays_is_named(network):
    skipped = {s.path: s.reason for s in LowRank(energy=0.5, ignore=("he*", "nothing")).plan(network, Task()).skipped}
    assert skipped["depth.weight"].startswith("at ranks 1x1 its params would go 864 -> 1056")  # one input a group
    assert not {"up.weight", "twice.weight"} & skipped.keys()  # transposed; read twice
    assert skipped["head.weight"] == "named in ignore='he*'"
    assert skipped["nothing"] == "this pattern of ignore matched no layer"
    plan = LowRank(energy=1.0).plan(network, Task())
    reason = next(s.reason for s in plan.skipped if s.path == "first.weight")
    assert "params would go 864 ->" in reason
    assert "MACs 497664 ->" in reason


def test_full_rank_is_the_same_function_and_says_that_it_grows(network):
    plan = LowRank(energy=1.0, min_gain=FORCE, ignore=("point",)).plan(network, Task())
    assert {"params", "macs", "bytes"} == set(plan.grows)
    x = torch.randn(3, 3, 24, 24)
    close(plan.apply(network)(x), network(x))
    forced = LowRank(ranks={"conv": 99, "first": 99, "head": 99}, min_gain=FORCE).plan(network, Task())
    assert [s.ranks for s in forced.splits] == [(27, 3), (64, 32), (32,)]
    close(forced.apply(network)(x), network(x))


def test_nothing_grows_unasked(network, tmp_path):
    for energy in (0.3, 0.6, 0.8, 0.9, 0.99, 1.0):
        plan = LowRank(energy=energy, min_gain=0.0).plan(network, Task())
        small = plan.apply(network)
        sizes = [sum(p.numel() for p in n.parameters()) for n in (network, small)]
        assert plan.grows == ()
        assert sizes[1] < sizes[0] or not plan.splits
        assert small.save(tmp_path / "b.fw") <= network.save(tmp_path / "a.fw")


def test_counted_macs_are_those_of_the_calls(network):
    """The MACs in a reason against a count over the calls of the network that the same ranks give."""
    from featherweight.network.edit import weight_name

    def macs(net, path):
        values = net.values(batch=1)
        return sum(net.tensor(str(weight_name(n)))[0].numel() * values[n.name].numel()
                   for n in net.calls() if str(weight_name(n) or "").startswith(path + "."))

    for path, rank in (("first", 20), ("conv", 30), ("point", 60), ("same", 60), ("head", 31)):
        reason = next(s.reason for s in LowRank(ranks={path: rank}, min_gain=0.999).plan(network, Task()).skipped
                      if s.path == f"{path}.weight")
        told = reason.split("MACs ")[1].split(";")[0]
        forced = LowRank(ranks={path: rank}, min_gain=FORCE).plan(network, Task()).apply(network)
        assert told == f"{macs(network, path)} -> {macs(forced, path)}"


def test_the_error_of_a_linear_layer_is_its_dropped_energy():
    torch.manual_seed(0)
    layer = nn.Linear(60, 80)
    network = fw.capture(layer, torch.randn(2, 60))
    small = LowRank(energy=0.7).plan(network, Task()).apply(network)
    x = torch.eye(60)
    with torch.no_grad():
        error = (small(x) - network(x)).double().square().sum() / layer.weight.double().square().sum()
    values = torch.linalg.svdvals(layer.weight.double())
    rank = small.tensor("reduce.weight").shape[0]
    torch.testing.assert_close(error, values[rank:].square().sum() / values.square().sum(), rtol=1e-4, atol=0)
    assert error <= 0.3 < values[rank - 1:].square().sum() / values.square().sum()


def test_convolutions_of_one_and_three_axes_are_split():
    class Spaces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv1d(32, 48, 5, stride=2, padding=3)
            self.three = nn.Conv3d(24, 32, 3, padding=1)
            with torch.no_grad():
                self.one.weight.copy_(low(48, 32, 4, 5)[..., 0])
                self.three.weight.copy_(low(32, 24, 4, 3)[:, :, None] * torch.tensor([1.0, 2.0, 3.0])[:, None, None])

        def forward(self, x, y):
            return self.one(x).mean() + self.three(y)

    x, y = torch.randn(2, 32, 20), torch.randn(2, 24, 6, 5, 4)
    network = fw.capture(Spaces(), (x, y))
    plan = LowRank(energy=1 - 1e-10).plan(network, Task())
    assert [s.ranks for s in plan.splits] == [(4, 4), (4, 4)]
    close(plan.apply(network)(x, y), network(x, y))


def test_plans_survive_json_and_apply_alike(network, tmp_path):
    before = {k: v.clone() for k, v in network.tensors().items()}
    plan = LowRank(energy=0.8).plan(network, Task())
    again = Plan.from_json(plan.to_json())
    assert again == plan
    one, two = plan.apply(network), again.apply(network)
    assert all(torch.equal(one.tensors()[k], v) for k, v in two.tensors().items())
    assert all(torch.equal(network.tensors()[k], v) for k, v in before.items())
    one.save(tmp_path / "a.fw")
    x = torch.randn(2, 3, 24, 24)
    assert torch.equal(fw.load(tmp_path / "a.fw")(x), one(x))


def test_a_split_network_trains(network):
    small = LowRank(energy=0.8).plan(network, Task()).apply(network).train()
    small(torch.randn(4, 3, 24, 24)).square().mean().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_frozen_weights_patterns_and_zeros():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.copy_(low(64, 64, 3)[..., 0, 0])
        model[2].weight.zero_()
    model[0].weight.requires_grad_(False)
    network = fw.capture(model, torch.randn(2, 64))
    network.patterns["1.weight"] = "unstructured"
    plan = LowRank().plan(network, Task())
    assert {s.path: s.reason for s in plan.skipped} == {
        "1.weight": "its zeros are kept (unstructured); factors would fill them", "2.weight": "its weight is all zero"}
    small = plan.apply(network)
    assert [small.tensor(f"0.{part}").requires_grad for part in ("reduce.weight", "expand.weight", "expand.bias")] == [
        False, False, True]


def test_errors_say_what_to_write(network):
    with pytest.raises(RecipeError, match=r"energy=1.5.*write energy=0.95"):
        LowRank(energy=1.5).plan(network, Task())
    with pytest.raises(RecipeError, match="rank of at least 1"):
        LowRank(ranks={"conv": 0}).plan(network, Task())
    named = LowRank(ranks={"coonv": 4}).plan(network, Task())
    assert any(s.path == "coonv" and "did you mean 'conv'" in s.reason for s in named.skipped)
    other = fw.capture(nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8))
    plan = LowRank(ranks={"conv": 8}).plan(network, Task())
    with pytest.raises(PlanError, match=r"splits 'conv.weight', which no linear or convolution"):
        plan.apply(other)
    small = plan.apply(network)
    with pytest.raises(PlanError, match="no linear or convolution"):
        plan.apply(small)
    bad = Plan.from_json(plan.to_json().replace("[8, 8]", "[8, 99]"))
    with pytest.raises(PlanError, match="plan again"):
        bad.apply(network)


def test_a_network_without_layers_gives_an_empty_plan():
    network = fw.capture(nn.ReLU(), torch.randn(2, 3))
    plan = LowRank().plan(network, Task())
    assert plan.splits == ()
    assert plan.summary() == "low rank: 0 layers"
    x = torch.randn(4, 3)
    assert torch.equal(plan.apply(network)(x), network(x))
