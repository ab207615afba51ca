"""Weights made of fewer numbers: hashed ones and blocks, against slow second implementations, in both runtimes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
from featherweight.errors import PlanError, RecipeError
from featherweight.numerics.sharing.blocks import block_codes
from featherweight.numerics.sharing.hashing import drawn, hashed, of_hashed, places, prime_below
from featherweight.share import BlockCodebook, Hashed
from featherweight.task import Task
from problems import agrees_in_runtimes

torch.set_num_threads(1)
STEPS = {"hashed": Hashed(share=1 / 8, min_size=500), "blocks": BlockCodebook(size=4, bits=4, min_size=500)}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- hashing

def test_primes() -> None:
    primes = [n for n in range(2, 200) if all(n % k for k in range(2, n))]
    for number in range(2, 200):
        assert prime_below(number) == max(p for p in primes if p <= number)


def test_hashed_numbers_are_the_means_of_what_shares_them() -> None:
    matrix, prime = randn(12, 30), 53
    a, b = drawn(12, 30, prime, 3)
    base = hashed(matrix, a, b, prime)
    sums, counts = [0.0] * 27, [0] * 27
    for i, j in itertools.product(range(12), range(30)):
        place = int(a[i]) * int(b[j]) % prime
        sums[place % 27] += float(matrix[i, j]) * (1 if place < 27 else -1)
        counts[place % 27] += 1
    torch.testing.assert_close(base, torch.tensor([s / max(c, 1) for s, c in zip(sums, counts, strict=True)]).double())
    made = of_hashed(base, a, b, prime)
    for i, j in itertools.product(range(12), range(30)):
        place = int(a[i]) * int(b[j]) % prime
        assert float(made[i, j]) == float(base[place]) if place < 27 else float(made[i, j]) == -float(base[place - 27])


@pytest.mark.parametrize("share", [1 / 8, 1 / 64, 0.3])
def test_a_hash_spreads_evenly(share: float) -> None:
    """As many weights share a number as a fair draw would have it, within six deviations of its counts."""
    prime = prime_below(2 * round(share * 300 * 400) - 1)
    counts = torch.bincount(places(*drawn(300, 400, prime, 0), prime).flatten(), minlength=prime)[1:].double()
    mean = 300 * 400 / (prime - 1)
    assert 0.8 < float(counts.var()) / mean < 1.6
    assert float(counts.max()) < mean + 6 * mean ** 0.5 + 6


# ---- blocks

def test_blocks_settle_where_no_vector_and_no_entry_can_gain() -> None:
    x, h = randn(60, 3), randn(60, 3, seed=1).square() + 0.1
    table, index = block_codes(x, 6, h)
    assert len(table) == 6
    for n, vector in enumerate(x):
        costs = [float((h[n] * (vector - entry).square()).sum()) for entry in table]
        assert costs[index[n]] == pytest.approx(min(costs), rel=1e-9)
    for k, entry in enumerate(table):
        mine = index == k
        torch.testing.assert_close(entry, (h[mine] * x[mine]).sum(0) / h[mine].sum(0))


def test_few_vectors_are_kept_as_they_are() -> None:
    few = randn(5, 4)
    table, index = block_codes(few[torch.tensor([0, 1, 2, 3, 4, 0, 1, 4])], 8)
    assert len(table) == 5
    torch.testing.assert_close(table[index], few[torch.tensor([0, 1, 2, 3, 4, 0, 1, 4])])


def test_more_entries_and_smaller_blocks_are_nearer() -> None:
    rows = randn(512, 8)

    def error(size: int, bits: int) -> float:
        vectors = rows.reshape(-1, size)
        table, index = block_codes(vectors, 2 ** bits)
        return float((table[index] - vectors).square().sum())

    assert error(8, 4) > error(8, 6) > error(4, 6) > error(2, 6)


# ---- the steps

class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, stride=2)
        self.out = nn.Linear(32, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))


def images(count: int) -> Tensor:
    return randn(count, 3, 12, 12, seed=count).float()


@pytest.fixture(scope="module")
def network() -> fw.Network:
    torch.manual_seed(0)
    return fw.capture(Net().eval(), images(2))  # type: ignore[return-value]


@pytest.mark.parametrize("name", STEPS)
def test_the_graph_makes_the_weights_and_both_runtimes_take_it(network: fw.Network, name: str, tmp_path: Path) -> None:
    plan = STEPS[name].plan(network, Task())
    small, slow = plan.apply(network), network.copy()
    items = plan.hashed if name == "hashed" else plan.blocked
    assert [one.weight for one in items] == ["second.weight", "out.weight"]
    for one in items:
        own = {part.removeprefix(f"{one.weight}_"): t for part, t in plan.tensors.items() if one.weight in part}
        made = of_hashed(own["base"], own["rows"], own["columns"], one.prime) if name == "hashed" else \
            own["table"][own["blocks"].long()]
        weight = network.tensor(one.weight).detach()
        slow.set_tensor(one.weight, made.reshape(weight.shape))
        lost = (slow.tensor(one.weight) - weight).detach().square().sum() / weight.square().sum()
        assert one.error == pytest.approx(float(lost), rel=1e-3)
    torch.testing.assert_close(small(images(5)), slow(images(5)), rtol=1e-4, atol=1e-5)
    agrees_in_runtimes(small, images(1), tmp_path)


@pytest.mark.parametrize("name", STEPS)
def test_what_is_shared_is_trained(network: fw.Network, name: str) -> None:
    data = [(images(8), torch.zeros(8, 40))]
    task = Task(train=data, loss=nn.functional.mse_loss, validation=data, score=lambda net, batches: 0.0)
    small = STEPS[name].plan(network, Task()).apply(network)
    trained = fw.recover.Train(epochs=3, lr=0.05).fit(small, task, fw.steps.Context())
    for key, value in small.tensors().items():
        if key.endswith(("_rows", "_columns", "_blocks")):
            assert torch.equal(value, trained.tensor(key))
        elif key.endswith(("_base", "_table")):
            assert not torch.equal(value, trained.tensor(key))
    with torch.no_grad():
        assert float(trained(images(8)).square().mean()) < float(small(images(8)).square().mean())


@pytest.mark.parametrize("name", STEPS)
def test_steps_train_where_products_are_in_bfloat16(network: fw.Network, name: str) -> None:
    small = STEPS[name].plan(network, Task()).apply(network)
    with torch.autocast("cpu", torch.bfloat16):
        small(images(2)).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters() if p.requires_grad)


def test_what_stays_is_named_and_what_is_wrong_refused(network: fw.Network) -> None:
    skipped = {s.path: s.reason for s in BlockCodebook(size=5, min_size=1).plan(network, Task()).skipped}
    assert skipped["out.weight"] == "size=5 does not divide the 32 weights that one output reads"
    assert "fewer than min_size=500" in {s.path: s.reason for s in STEPS["hashed"].plan(network, Task()).skipped}[
        "first.weight"]
    for step, message in ((Hashed(share=1.5), "share=1.5"), (BlockCodebook(bits=9), "bits=9"),
                          (BlockCodebook(size=0), "size=0"), (BlockCodebook(importance="much"), "importance")):
        with pytest.raises(RecipeError, match=message):
            step.check()
    plan = STEPS["hashed"].plan(network, Task())
    with pytest.raises(PlanError, match="which this network does not have"):
        plan.apply(plan.apply(network))
