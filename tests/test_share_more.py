"""Codebooks under importances and a price of bits, at work in a training, within a budget; vectors in bfloat16."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import featherweight as fw
from featherweight.errors import PlanError, RecipeError
from featherweight.numerics.kmeans import kmeans
from featherweight.numerics.sharing.codebooks import coded
from featherweight.numerics.sharing.mixture import components, surprise
from featherweight.share import Codebook, Rates, Vectors


def drawn(count: int, seed: int, zeros: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Values, some of them zero, and how much each matters."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator).double() * (torch.rand(count, generator=generator) >= zeros)
    return values, torch.rand(count, generator=generator).double() + 0.01


# ---- the codebooks

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(2, 12), st.integers(0, 99), st.sampled_from([0.0, 0.01, 0.2]), st.booleans(),
       st.sampled_from(["linear", "density"]))
def test_entries_are_the_means_of_what_took_them(count, k, seed, price, hold, start):
    values, h = drawn(count, seed, 0.5 if hold else 0)
    found = coded(values, k, importance=h, price=price, start=start, hold_zero=hold)
    assert len(found.codebook) <= k
    damage = 0.0
    for j, entry in enumerate(found.codebook.tolist()):
        mine = [i for i, code in enumerate(found.index.tolist()) if code == j]
        if mine and not (hold and j == 0):
            mean = sum(float(h[i] * values[i]) for i in mine) / sum(float(h[i]) for i in mine)
            assert entry == pytest.approx(mean, abs=1e-9)
        damage += sum(float(h[i]) * (float(values[i]) - entry) ** 2 for i in mine)
    shares = [found.index.tolist().count(j) / count for j in range(len(found.codebook))]
    assert found.damage == pytest.approx(damage, abs=1e-9)
    assert found.bits == pytest.approx(-count * sum(p * math.log2(p) for p in shares if p), abs=1e-6)
    if hold:
        assert float(found.codebook[0]) == 0.0
        assert all(code == 0 for code, value in zip(found.index.tolist(), values.tolist(), strict=True) if value == 0)


def test_a_price_saves_bits_and_pays_with_damage():
    values, h = drawn(4000, 0)
    costs = []
    for price in (0.0, 0.02, 0.1):
        found = coded(values, 16, importance=h, price=price)
        costs.append((found.bits, found.damage))
    assert costs[0][0] > 1.05 * costs[1][0] > 1.1 * costs[2][0]
    assert costs[0][1] < costs[1][1] < costs[2][1]
    plain, priced = coded(values, 8), coded(values, 16, price=0.05)
    assert priced.bits < plain.bits
    assert priced.damage < plain.damage


def test_what_matters_more_is_met_more_closely():
    values, h = drawn(3000, 1)
    h = torch.where(values > 0, 50.0, 0.01).double()
    codebook, index = kmeans(values, 8)
    blind = float((h * (codebook[index.long()] - values).square()).sum())
    assert coded(values, 8, importance=h, start="density").damage < 0.5 * blind


# ---- the step

class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(20, 64), nn.Linear(64, 10)

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return fw.capture(Net().eval(), torch.zeros(2, 20))


@pytest.fixture(scope="module")
def task():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 20, generator=generator) * torch.linspace(0.1, 3, 20)
    y = (x @ torch.randn(20, 10, generator=generator)).argmax(1)
    return fw.Task(train=lambda: zip(x.split(32), y.split(32), strict=True), calibration=lambda: iter([(x, y)]),
                   validation=lambda: iter([(x, y)]), loss=F.cross_entropy, score=fw.scores.top1, score_name="top-1 %")


@pytest.mark.parametrize("importance", ["inputs", "fisher"])
def test_importances_lessen_what_the_outputs_lose(network, task, importance):
    x = next(iter(task.batches("calibration", None)))[0]

    def lost(step: Codebook) -> float:
        plan = step.plan(network, task)
        after = plan.apply(network)
        assert fw.steps.Plan.from_json(plan.to_json(), plan.tensors).apply(network)(x).equal(after(x))
        return float((after(x) - network(x)).detach().square().mean())

    assert lost(Codebook(bits=2, min_size=0, importance=importance)) < lost(Codebook(bits=2, min_size=0))


@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_a_codebook_for_each_channel_is_what_each_channel_would_get(task, rate):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.ConvTranspose2d(64, 6, 3), nn.Flatten(),
                          nn.Linear(216, 10))
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-2, 1, 64).view(-1, 1, 1, 1))
        model[4].weight[model[4].weight.abs() < 0.02] = 0
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    network = fw.capture(model.eval(), x)
    step = Codebook(bits=2, min_size=0, per="channel", rate=rate)
    plan = step.plan(network, task)
    after = plan.apply(network)
    expected = network.copy()
    for item in plan.shared:
        weight = network.tensor(item.weight).detach()
        price = [rate * float(w.square().mean()) for w in weight.unbind(item.axis)]
        made = [coded(w, 4, price=p, hold_zero=item.zeros)
                for w, p in zip(weight.unbind(item.axis), price, strict=True)]
        expected.set_tensor(item.weight, torch.stack([c.codebook[c.index.long()] for c in made], item.axis))
    assert [(s.weight, s.axis) for s in plan.shared] == [("0.weight", 0), ("2.weight", 1), ("4.weight", 0)]
    torch.testing.assert_close(after(x), expected(x))
    with torch.no_grad():
        whole = (Codebook(bits=2, min_size=0, rate=rate).plan(network, task).apply(network)(x) - network(x)).norm()
        assert (after(x) - network(x)).norm() < whole
    for candidate in fw.share.Bits(options=(2,), step=step).candidates(network, task):
        found = candidate.form.weights[candidate.layer](network.tensor(candidate.layer).detach())
        assert torch.equal(found, expected.tensor(candidate.layer))


def test_a_rate_makes_the_archive_smaller(network, task):
    sizes = [fw.codec.archive_bytes(Codebook(bits=5, min_size=0, rate=rate).plan(network, task).apply(network))
             for rate in (0.0, 0.01, 0.1)]
    assert sizes[0] > sizes[1] > sizes[2]


def test_the_budget_of_an_archive_is_met_by_prices(network, task):
    family = Rates(options=(0.001, 0.01, 0.1), step=Codebook(bits=5, min_size=0, importance="inputs"))
    offered = family.candidates(network, task)
    assert [c.option for c in offered] == [0.001, 0.01, 0.1] * 2
    for candidate in offered:
        name, plan = candidate.layer, candidate.plan()
        instead = candidate.form.weights[name](network.tensor(name))
        assert len(instead.unique()) <= 32
        table, index = plan.tensors[f"codebook.{name}"], plan.tensors[f"index.{name}"]
        assert torch.equal(table[index.long()], instead)
    whole = fw.codec.archive_bytes(network)
    mixed = fw.balance.Mixed(archive=0.35, kinds=("float",), families=("share.rates",))
    rates = fw.judge.candidates.FAMILIES["share.rates"]
    fw.judge.candidates.FAMILIES["share.rates"] = family
    try:
        assert fw.codec.archive_bytes(mixed.plan(network, task).apply(network)) <= 0.36 * whole
    finally:
        fw.judge.candidates.FAMILIES["share.rates"] = rates


def test_a_network_of_codebooks_alone_is_trained(network, task):
    shared = Codebook(bits=3, min_size=0).plan(network, task).apply(network)
    index = shared.tensor("one.weight_index").clone()
    trained = fw.recover.Train(epochs=3, lr=0.05).fit(shared, task, fw.steps.Context())
    assert torch.equal(trained.tensor("one.weight_index"), index)
    assert not torch.equal(trained.tensor("one.weight_codebook"), shared.tensor("one.weight_codebook"))
    batch = list(task.batches("validation", None))
    assert task.score(trained, batch) > task.score(shared, batch)


@pytest.mark.parametrize("rate", [0.0, 0.01])
@pytest.mark.parametrize("sparse", [False, True])
def test_codebooks_settle_beside_masks_in_a_training(network, task, rate, sparse):
    beside = (Codebook(bits=3, min_size=0, begin=0.3, end=0.6, frequency=0.1, rate=rate),)
    if sparse:
        beside = (fw.prune.Weights(sparsity=0.7, end=0.5), *beside)
    trained = fw.recover.Train(epochs=8, lr=0.05, beside=beside).fit(network, task, fw.steps.Context())
    batch = list(task.batches("validation", None))
    assert task.score(trained, batch) > 60
    weights = [torch.cat([torch.zeros(1), trained.tensor(f"{n}.weight_codebook").detach()])[
        trained.tensor(f"{n}.weight_index").long()] for n in ("one", "two")]
    assert all(len(w.unique()) <= 8 for w in weights)
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert zeros >= 0.69 if sparse else rate or zeros == 0


def test_what_comes_out_of_a_training_computes_what_was_trained(network, task):
    work = network.copy()
    companion = Codebook(bits=3, min_size=0, frequency=0.5).start(work, task)
    x = torch.randn(4, 20, generator=torch.Generator().manual_seed(3))
    companion.update(0.0)
    with torch.no_grad():
        for book in companion.parameters():
            book[1:] += 0.01
        before = work(x)  # assigns, to entries found now
        for book in companion.parameters():
            book[1:] += 0.01
        trained = work(x)
    assert not torch.equal(before, trained)
    state = companion.state()
    plan = companion.finish()
    torch.testing.assert_close(plan.apply(network)(x), trained)
    assert torch.equal(state["index.one.weight"] == 0, network.tensor("one.weight") == 0)


def test_an_entry_moves_as_the_mean_of_its_weights_does(network, task):
    work = network.copy()
    companion = Codebook(bits=2, min_size=0).start(work, task)
    companion.update(0.0)
    work(torch.randn(4, 20, generator=torch.Generator().manual_seed(3))).square().sum().backward()
    companion.after_backward()
    index = companion.state()
    for name, book in zip(("one.weight", "two.weight"), companion.parameters(), strict=True):
        grads = work.tensor(name).grad.flatten().tolist()
        for k in range(1, len(book)):
            mine = [g for g, i in zip(grads, index[f"index.{name}"].flatten().tolist(), strict=True) if i == k]
            assert math.isclose(float(book.grad[k]), sum(mine) / max(len(mine), 1), rel_tol=1e-4, abs_tol=1e-6)
        assert not book.grad[0]


def test_options_that_make_no_sense_are_refused(network, task):
    for step, match in ((Codebook(importance="hessian"), 'write importance="none"'),
                        (Codebook(spacing="even"), 'write spacing="linear"'),
                        (Codebook(rate=-1.0), r"expected a number from 0"),
                        (Codebook(begin=0.9), "begin=0.9")):
        with pytest.raises(RecipeError, match=match):
            step.plan(network, task)
    with pytest.raises(RecipeError, match=r'write importance="none" in Train'):
        fw.recover.Train(during=(Codebook(importance="inputs"),)).fit(network, task, fw.steps.Context())
    plan = Codebook(min_size=0, rate=0.01).plan(network, task)
    wrong = fw.steps.Plan.from_json(plan.to_json(), {**plan.tensors, "index.one.weight": torch.zeros(2, 2).byte()})
    with pytest.raises(PlanError, match="make the plan on this very network"):
        wrong.apply(network)
    short = {**plan.tensors, "codebook.one.weight": plan.tensors["codebook.one.weight"][:3]}
    with pytest.raises(PlanError, match="which its index does not fit"):
        fw.steps.Plan.from_json(plan.to_json(), short).apply(network)
    alone = Codebook(min_size=0, bits=2, per="channel").plan(network, task).to_json()
    with pytest.raises(PlanError, match="load it with its tensors"):
        fw.steps.Plan.from_json(alone).apply(network)
    with pytest.raises(RecipeError, match="not during training"):
        fw.recover.Train(during=(Codebook(per="channel"),)).fit(network, task, fw.steps.Context())


# ---- vectors

def test_vectors_keep_the_bits_of_bfloat16_and_matrices_keep_all(network, task):
    plan = Vectors(ignore=("two",)).plan(network, task)
    after = plan.apply(network)
    assert {s.path: s.reason for s in plan.skipped} == {
        "one.weight": "no vector: Codebook and Quantize are for tensors of several axes",
        "two.weight": "named in ignore='two'", "two.bias": "named in ignore='two'"}
    assert torch.equal(after.tensor("two.bias"), network.tensor("two.bias"))
    assert torch.equal(after.tensor("one.weight"), network.tensor("one.weight"))
    bits = after.tensor("one.bias").detach().view(torch.int32)
    assert not (bits & 0xFFFF).any()
    torch.testing.assert_close(after.tensor("one.bias"), network.tensor("one.bias"), rtol=1 / 256, atol=0)
    shared = Codebook(bits=3, min_size=0).plan(network, task).apply(network)
    rounded = Vectors().plan(shared, task).apply(shared)
    assert fw.codec.archive_bytes(rounded) < fw.codec.archive_bytes(shared) - 2 * 64  # two bytes of every bias


# ---- soft sharing

def test_the_mixture_is_the_sum_over_its_components():
    values, _ = drawn(30, 2)
    means, scales, logits = torch.tensor([-1.0, 0.5]).double(), torch.tensor([0.1, 0.4, 0.2]).double(), torch.zeros(2)
    shares, centres = [0.8, 0.1, 0.1], [0.0, -1.0, 0.5]
    total, most = 0.0, []
    for value in values.tolist():
        each = [p / (s * math.sqrt(2 * math.pi)) * math.exp(-0.5 * ((value - m) / s) ** 2)
                for p, m, s in zip(shares, centres, scales.tolist(), strict=True)]
        total -= math.log(sum(each)) / 30
        most.append(each.index(max(each)))
    found = surprise(values, means, scales.log(), logits.double(), 0.8)
    assert float(found) == pytest.approx(total)
    assert components(values, means, scales.log(), logits.double(), 0.8).tolist() == most


def test_a_prior_draws_weights_together_and_leaves_codebooks(network, task):
    def lost(strength: float) -> float:
        """How far the weights are from their entries at the end of a training, of their norm."""
        work = network.copy()
        prior = fw.share.SoftSharing(clusters=8, strength=strength, zero_share=0.5, min_size=0).start(work, task)
        optimizer = torch.optim.Adam([*work.parameters(), *prior.parameters()], lr=0.01)
        prior.update(0.0)
        for _ in range(12):
            for x, y in task.train():
                loss = F.cross_entropy(work(x), y) + prior.loss(x, None, y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        plan, far = prior.finish(), 0.0
        for item in plan.shared:
            weight, book, index = (work.tensor(item.weight).detach(), *plan.codes(item, work.tensor(item.weight)))
            assert float(book[0]) == 0
            assert len(book) <= 8
            far += float((book[index.long()] - weight).norm() / weight.norm())
        after = plan.apply(work)
        assert task.score(after, list(task.batches("validation", None))) > 50
        return far

    assert lost(1.0) < 0.6 * lost(1e-4)


def test_soft_sharing_works_in_a_training_alone(network, task):
    with pytest.raises(RecipeError, match=r"write Train\(beside=\(SoftSharing"):
        fw.share.SoftSharing().plan(network, task)
    with pytest.raises(RecipeError, match=r"zero_share=1\.0"):
        fw.share.SoftSharing(zero_share=1.0).start(network, task)
