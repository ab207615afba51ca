"""The whole and the compressed network side by side, held against running each of them from its beginning."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
import problems
from featherweight.calibrate import portions, walk
from featherweight.calibrate.pair import Pair
from featherweight.calibrate.walk import Flow, Order
from featherweight.network import Network
from featherweight.network.edit import WEIGHTED, weight_name
from featherweight.network.matrices import as_matrix, from_matrix
from featherweight.numerics.gptq import towards
from featherweight.numerics.lowrank import split
from featherweight.numerics.obs import damped

aten = torch.ops.aten
Batches = list[tuple[Tensor, None]]


def recorded(network: Network, inputs: Tensor, names: set[str]) -> dict[str, Tensor]:
    """The slow way: what these nodes give, each run from the beginning."""
    found: dict[str, Tensor] = {}
    for name in names:
        with torch.no_grad(), network.taps({name: lambda value, n=name: found.__setitem__(n, value)}):
            fw.task.call(network, inputs)
    return found


@pytest.mark.parametrize("name", problems.PROBLEMS)
@torch.no_grad()
def test_each_call_reads_what_it_reads_in_a_run_and_no_more_is_held_than_was_said(name: str) -> None:
    problem = problems.PROBLEMS[name]
    network = problems.network(problem)
    data = [problem.example(problem.batch or 3, seed=s) for s in range(2)]
    flow = Flow(network, Order.of(network))
    for inputs in data:
        flow.add(inputs)
    given = set(flow.batches[0])
    calls = [n for n in network.calls() if n.target in WEIGHTED]
    wanted = [recorded(network, inputs, {str(n.args[0]) for n in calls}) for inputs in data]
    for node in calls:
        flow.go_to(node.name)
        for read, want in zip(flow.reads(node.name), wanted, strict=True):
            assert torch.equal(read, want[str(node.args[0])])
        for values, inputs in zip(flow.batches, data, strict=True):
            held = sum(v.numel() * v.element_size() for n, v in values.items()
                       if isinstance(v, Tensor) and n not in given)
            assert held == pytest.approx(flow.order.held[flow.order.number[node.name]] * fw.task.batch_size(inputs))


def chain(seed: int = 0) -> tuple[Network, Callable[[int], Tensor]]:
    """A perceptron whose inputs and hidden units hang together, and inputs for a seed."""
    torch.manual_seed(seed)
    mix = torch.randn(6, 24)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()

    def inputs(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(64, 6, generator=generator) @ mix + 0.1 * torch.randn(64, 24, generator=generator)

    return fw.capture(model, inputs(0)), inputs


def test_values_that_are_set_hold_for_what_comes_after() -> None:
    network, inputs = chain()
    batches: Batches = [(inputs(s), None) for s in range(3)]
    pair = Pair.of(network, batches)
    assert pair.samples == 0
    assert pair.admit() == ""
    assert pair.samples == 192
    other = network.copy()
    generator = torch.Generator().manual_seed(0)
    before = {n: t.clone() for n, t in network.tensors().items()}
    with torch.no_grad():
        for node in network.calls(aten.linear.default):
            pair.go_to(node.name)
            x, z = pair.rows(node)
            for rows, net in ((x, other), (z, network)):
                want = torch.cat([recorded(net, b, {str(node.args[0])})[str(node.args[0])] for b, _ in batches])
                assert sorted(rows[0].tolist()) == sorted(want.tolist())  # all rows, in another order
            assert torch.equal(x, z) == (node is network.calls(aten.linear.default)[0])
            name = str(weight_name(node))
            value = network.tensor(name) + 0.1 * torch.randn(network.tensor(name).shape, generator=generator)
            pair.set(name, value.double())
            other.set_tensor(name, value)
    assert all(torch.equal(t, before[n]) for n, t in network.tensors().items())
    assert pair.compressed.network.tensor("0.weight").dtype == torch.float32


def test_a_matrix_that_is_stored_with_its_inputs_first_is_read_as_it_was_set() -> None:
    network, inputs = chain()
    for node in network.calls(aten.linear.default):
        name = str(weight_name(node))
        network.set_tensor(name, network.tensor(name).t().contiguous())
        with network.graph.inserting_before(node):
            node.update_arg(1, network.graph.call_function(aten.t.default, (node.args[1],)))
    network.changed()
    pair = Pair.of(network, [(inputs(0), None)])
    pair.admit()
    other = network.copy()
    with torch.no_grad():
        for name, node in zip(("0.weight", "2.weight", "4.weight"), network.calls(aten.linear.default), strict=True):
            pair.go_to(node.name)
            want = recorded(other, inputs(0), {str(node.args[0])})[str(node.args[0])]
            assert torch.equal(pair.compressed.reads(node.name)[0], want)
            pair.set(name, network.tensor(name) * 0.9)
            other.set_tensor(name, network.tensor(name) * 0.9)


def test_few_rows_are_the_same_places_of_both_networks() -> None:
    network, inputs = chain()
    pair = Pair.of(network, [(inputs(s), None) for s in range(3)])
    pair.admit()
    node = network.calls(aten.linear.default)[0]
    x, z = pair.rows(node, 30, seed=1)
    assert x.shape == z.shape == (1, 30, 24)
    assert torch.equal(x, z)
    assert not torch.equal(x, pair.rows(node, 30, seed=2)[0])


def test_kept_activations_stay_until_they_are_released() -> None:
    network, inputs = chain()
    pair = Pair.of(network, [(inputs(0), None)], taps={"relu": lambda value: value.round()})
    pair.keep(["relu"])
    pair.keep(["relu", "linear"])
    pair.admit()
    with torch.no_grad():
        pair.go_past("linear_1")
        for flow, round_ in ((pair.whole, lambda v: v), (pair.compressed, torch.round)):
            want = network.tensor("0.weight") @ inputs(0).T + network.tensor("0.bias")[:, None]
            torch.testing.assert_close(flow.gave("relu")[0], round_(want.relu().T))
            torch.testing.assert_close(flow.gave("linear")[0], want.T)
    pair.release(["relu", "linear"])
    assert set(pair.whole.batches[0]) == {"relu", "linear_1"}
    pair.release(["relu"])
    assert set(pair.compressed.batches[0]) == {"linear_1"}
    ahead = pair.ahead()
    ahead.go_past("relu_1")
    assert [set(p.whole.batches[0]) for p in (ahead, pair)] == [{"relu_1"}, {"linear_1"}]


def test_batches_come_in_where_there_is_room_and_the_others_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    network, inputs = chain()
    monkeypatch.setattr(walk, "BUDGET", 64 * 2 * 100)
    pair = Pair.of(network, [(inputs(s), None) for s in range(3)])
    assert pair.admit(200).startswith("only the first 64 samples were read")
    with torch.no_grad():
        pair.go_to("linear_1")
        assert pair.admit(100).startswith("only the first 128 samples were read")
        assert pair.admit(1) == ""
        assert pair.samples == 192
        want = [recorded(network, inputs(s), {"relu"})["relu"] for s in range(3)]
        assert all(torch.equal(a, b) for a, b in zip(pair.whole.reads("linear_1"), want, strict=True))


class Norm(nn.Module):
    """A linear layer and a batch norm; together: the mean of the batch is taken off the outputs."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        self.layer, self.norm, self.together = nn.Linear(24, 8), nn.BatchNorm1d(8), together

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.layer(x))
        return y - y.mean(0) if self.together else y


@pytest.mark.parametrize("together", [False, True])
def test_large_batches_are_run_in_portions_where_samples_do_not_know_of_one_another(
        together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 24)
    network = fw.capture(Norm(together).eval(), x)
    network.train()
    before = {name: tensor.clone() for name, tensor in network.tensors().items()}
    monkeypatch.setattr(portions, "LARGEST", 20 * 24 * 4)  # the inputs of 20 samples
    pair = Pair.of(network, [(x, None)])
    pair.admit()
    with torch.no_grad():
        pair.go_to("linear")
        assert [len(part) for part in pair.whole.reads("linear")] == ([64] if together else [20, 20, 20, 4])
        assert torch.equal(torch.cat(pair.compressed.reads("linear")), x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.tensors().items())


# ---- a family of one's own
def low_rank(weight: Tensor, x: Tensor, z: Tensor, rank: int) -> Tensor:
    """The matrix M [g, o, i] of this rank for which M x comes next to W z: with S S^T = sum of x x^T, the best of that
    rank (Eckart and Young 1936) of what makes of x what W makes of z, times S; then S^-1."""
    gram, cross = (x.mT @ x).double(), (x.mT @ z).double()
    root = torch.linalg.cholesky(damped(gram, 1e-4))
    a, b = split((towards(weight.double(), gram, cross, 1e-4) @ root)[0], rank)
    return torch.linalg.solve_triangular(root, (b @ a)[None], upper=False, left=False)


def test_a_factorization_that_looks_at_data_is_a_caller() -> None:
    network, inputs = chain()
    pair = Pair.of(network, [(inputs(s), None) for s in range(4)])
    pair.admit()
    plain = network.copy()
    with torch.no_grad():
        for node in network.calls(aten.linear.default):
            name = str(weight_name(node))
            weight = as_matrix(node, network.tensor(name))
            pair.go_to(node.name)
            pair.set(name, from_matrix(node, low_rank(weight, *pair.rows(node), rank=5), network.tensor(name).shape))
            a, b = split(weight[0], 5)
            plain.set_tensor(name, b @ a)
        fresh, aware = inputs(99), pair.compressed.network
        assert all(int(torch.linalg.matrix_rank(t, rtol=1e-4)) == 5 for t in aware.parameters() if t.dim() == 2)
        lost = [float((net(fresh) - network(fresh)).square().mean()) for net in (aware, plain)]
    assert lost[0] < lost[1] / 3
