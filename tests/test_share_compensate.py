"""Codebooks whose errors other weights make up for: the sweep against one that inverts a matrix for every column."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import featherweight as fw
from featherweight.errors import PlanError, RecipeError
from featherweight.numerics.obs import damped
from featherweight.numerics.sharing.compensated import DAMP, SWEEPS, best_entries, compensated
from featherweight.share import Codebook
from featherweight.steps import Plan


def drawn(groups: int, o: int, i: int, k: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Weights, second moments of correlated inputs, entries of which the first is zero, and any index."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, o, i, generator=generator).double()
    x = torch.randn(groups, 4 * i, i, generator=generator).double() @ torch.randn(i, i, generator=generator).double()
    entries = torch.cat([torch.zeros(1), torch.randn(k - 1, generator=generator)]).double()
    return weight, x.mT @ x / x.shape[1], entries, torch.randint(0, k, weight.shape, generator=generator)


def slowly(aim: torch.Tensor, gram: torch.Tensor, entries: torch.Tensor, index: torch.Tensor, price: float,
           held: torch.Tensor | None) -> torch.Tensor:
    """The index by optimal brain surgery as its papers write it: a fresh inverse for the columns that are left."""
    full = damped(gram, DAMP)
    order = gram.diagonal(dim1=-2, dim2=-1).mean(0).sort(descending=True, stable=True).indices.tolist()
    for _ in range(SWEEPS):
        counts = [max(int((index == j).sum()), 0.5) for j in range(len(entries))]
        lengths = [-torch.log2(torch.tensor(c / index.numel(), dtype=torch.float64)) for c in counts]
        work, index = aim.clone(), torch.zeros_like(index)
        for g, r in [(g, r) for g in range(aim.shape[0]) for r in range(aim.shape[1])]:
            left = list(order)
            while left:
                j, *others = left
                inverse = torch.linalg.inv(full[g][left][:, left])
                costs = [float((work[g, r, j] - e) ** 2 / inverse[0, 0] + price * b)
                         for e, b in zip(entries, lengths, strict=True)]
                best = costs.index(min(costs)) if held is None or not held[g, r, j] else 0
                index[g, r, j] = best
                missing = (work[g, r, j] - entries[best]) / inverse[0, 0]
                for place, other in enumerate(others, 1):
                    work[g, r, other] -= missing * inverse[0, place]
                left = others
    return index


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 2), st.integers(1, 4), st.integers(1, 6), st.integers(2, 5), st.integers(0, 99),
       st.sampled_from([0.0, 0.3]), st.booleans())
def test_the_sweep_is_brain_surgery_column_by_column(groups, o, i, k, seed, price, hold):
    aim, gram, entries, index = drawn(groups, o, i, k, seed)
    held = torch.rand(aim.shape, generator=torch.Generator().manual_seed(seed)) < 0.3 if hold else None
    _, found = compensated(aim, gram, entries, index, price, held)
    assert torch.equal(found, slowly(aim, gram, entries, index, price, held))
    assert held is None or not found[held].any()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 2), st.integers(1, 4), st.integers(1, 6), st.integers(2, 5), st.integers(0, 99), st.booleans())
def test_entries_are_those_of_the_least_error(groups, o, i, k, seed, hold):
    aim, gram, entries, index = drawn(groups, o, i, k, seed)
    full = damped(gram, DAMP)
    found = best_entries(aim, full, entries, index, hold)
    root = torch.linalg.cholesky(full)  # tr(E gram E^T) = |E root|^2
    free = [j for j in range(k) if (index == j).any() and not (hold and j == 0)]
    columns = torch.stack([((index == j).double() @ root).reshape(-1) for j in free], 1) if free else None
    want = entries.clone()
    if columns is not None:
        want[free] = torch.linalg.lstsq(columns, (aim @ root).reshape(-1, 1)).solution[:, 0]
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


# ---- the step

class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3), nn.ConvTranspose2d(12, 32, 2, groups=2, bias=False)
        self.twice = nn.Linear(32, 32)
        self.head = nn.Linear(32, 40)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)) + 0.5
        return self.head(torch.relu(self.twice(self.twice(x))))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.head.weight[model.head.weight.abs() < 0.03] = 0
    return fw.capture(model, torch.zeros(2, 3, 6, 6))


@pytest.fixture(scope="module")
def task():
    x = torch.rand(64, 3, 6, 6, generator=torch.Generator().manual_seed(0)) + torch.linspace(0, 1, 6)
    return fw.Task(calibration=lambda: iter([(x, torch.zeros(64, dtype=torch.int64))]), loss=F.cross_entropy)


def test_weights_and_biases_make_up_for_what_codebooks_lose(network, task):
    x = next(iter(task.batches("calibration", None)))[0]

    def lost(step: Codebook) -> float:
        return float((step.plan(network, task).apply(network)(x) - network(x)).detach().square().mean())

    plain = lost(Codebook(bits=2, min_size=0, importance="inputs"))
    assert lost(Codebook(bits=2, min_size=0, compensate="obs")) < 0.2 * plain
    plan = Codebook(bits=2, min_size=0, compensate="obs").plan(network, task)
    assert {n for n in plan.tensors if n.startswith("bias")} == {"bias.first.weight", "bias.head.weight"}
    after = plan.apply(network)
    assert not torch.equal(after.tensor("first.bias"), network.tensor("first.bias"))
    assert torch.equal(after.tensor("twice.bias"), network.tensor("twice.bias"))  # two calls add it
    again = Plan.from_json(plan.to_json(), plan.tensors).apply(network)
    assert torch.equal(again(x), after(x))
    zeros = network.tensor("head.weight") == 0
    assert not plan.tensors["index.head.weight"][zeros].any()
    assert not after.tensor("head.weight_codebook").eq(0).any()  # the zero is a constant
    # the mean that the head gives stays what it was, whatever comes to it
    torch.testing.assert_close(after(x).mean(0), network(x).mean(0), rtol=1e-3, atol=1e-4)


def test_a_rate_makes_the_made_up_codes_cheaper(network, task):
    sizes = [fw.codec.archive_bytes(Codebook(bits=4, min_size=0, rate=rate, compensate="obs").plan(
        network, task).apply(network)) for rate in (0.0, 0.03, 0.3)]
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_bias_that_fits_nothing_is_refused(network, task):
    plan = Codebook(bits=2, min_size=0, compensate="obs").plan(network, task)
    wrong = {**plan.tensors, "bias.first.weight": torch.zeros(5)}
    with pytest.raises(PlanError, match="make the plan on this very network"):
        Plan.from_json(plan.to_json(), wrong).apply(network)


def test_batch_norms_become_part_of_what_is_shared():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 64, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(),
                           nn.Linear(1024, 4))
    with torch.no_grad():
        module(torch.rand(32, 3, 6, 6))
        module[0].weight[:, 1] = 0
    network = fw.capture(module.eval(), torch.rand(2, 3, 6, 6))
    x = torch.rand(64, 3, 6, 6)
    task = fw.Task(calibration=lambda: iter([(x, torch.zeros(64, dtype=torch.int64))]), loss=F.cross_entropy)
    step = Codebook(bits=4, min_size=0, compensate="obs")
    plain, plan = (fold.plan(network, task) for fold in (step, replace(step, fold_batch_norm=True)))
    again = Plan.from_json(plan.to_json(), plan.tensors)
    kept, folded = plain.apply(network), again.apply(network)
    assert kept.calls(torch.ops.aten.batch_norm.default)
    assert not folded.calls(torch.ops.aten.batch_norm.default)
    assert fw.codec.archive_bytes(folded) < fw.codec.archive_bytes(kept)
    assert "bias.0.weight" in plan.tensors
    assert "bias.0.weight" not in plain.tensors
    assert not plan.tensors["index.0.weight"][:, 1].any()  # zeros are held
    assert (folded(x) - network(x)).square().mean() < 0.1 * network(x).square().mean()
    with pytest.raises(RecipeError, match="fold_batch_norm=False"):
        replace(step, fold_batch_norm=True, compensate="none").check_training()


def test_families_share_the_weights_that_a_network_has():
    network = fw.capture(nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)).eval(), torch.rand(2, 64))
    step = Codebook(bits=4, min_size=0, fold_batch_norm=True)
    for family in (fw.share.Bits(options=(4,), step=step), fw.share.Rates(options=(0.01,), step=step)):
        (found,) = family.candidates(network, fw.Task())
        assert not found.plan().fold_batch_norm
