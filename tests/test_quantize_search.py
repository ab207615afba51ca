"""Options of Quantize that are found, not given: damage layer by layer, bits within a budget, the ladder."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import featherweight as fw
from featherweight.balance import Ladder, Mixed
from featherweight.errors import RecipeError, TaskError
from featherweight.judge.in_network import InNetwork
from featherweight.network.file.digest import digest
from featherweight.numerics.budget import choose
from featherweight.numerics.damage import traces
from featherweight.quantize import Damage, Quantize, sensitivity
from featherweight.steps import Plan


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "cache"))


# ---- layers trained on real data


class Separable(nn.Module):
    """A plain convolution, then three depthwise separable ones (Howard et al. 2017)."""

    def __init__(self, width=16):
        super().__init__()

        def part(i, o, kernel, groups=1, stride=1):
            return nn.Sequential(nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False),
                                 nn.BatchNorm2d(o), nn.ReLU())

        self.parts = nn.Sequential(part(1, width, 3), part(width, width, 3, width), part(width, 2 * width, 1),
                                   part(2 * width, 2 * width, 3, 2 * width, 2), part(2 * width, 2 * width, 1),
                                   part(2 * width, 2 * width, 3, 2 * width), part(2 * width, 2 * width, 1))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x):
        return self.head(self.parts(x).mean((2, 3)))


@functools.cache
def digits():
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(found.images, dtype=torch.float32)[order, None] / 16
    return x, torch.tensor(found.target)[order]


def split(start, stop, size=300):
    x, y = digits()
    return lambda: list(zip(x[start:stop].split(size), y[start:stop].split(size), strict=True))


def digits_task(**changed):
    return fw.Task(**{"calibration": split(0, 300, 100), "validation": split(1197, 1497), "test": split(1497, 1797),
                      "loss": F.cross_entropy, "score": fw.scores.top1, **changed})


@functools.cache
def trained():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Separable()
        x, y = (t[:1197] for t in digits())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=100)
        for _ in range(100):
            chosen = torch.randint(0, len(y), (64,))
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@functools.cache
def network():
    return fw.capture(trained(), digits()[0][:2])


@functools.cache
def scaled():
    """The same function with badly scaled channels: each channel times a factor from 1/30 to 30 after its batch norm,
    and divided by it where it is read."""
    import copy

    model = copy.deepcopy(trained())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for first, second in itertools.pairwise(model.parts):
            norm, reader = first[1], second[0]
            factor = torch.exp((2 * torch.rand(norm.num_features, generator=generator) - 1) * math.log(30))
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)
            reader.weight.div_(factor.view(-1, 1, 1, 1) if reader.groups > 1 else factor.view(1, -1, 1, 1))
    made = fw.capture(model, digits()[0][:2])
    x = digits()[0][:100]
    torch.testing.assert_close(made(x), network()(x), rtol=1e-3, atol=1e-3)
    return made


def score_of(net, task, name="validation"):
    return task.score(net, task.batches(name))


# ---- the budgeted choice

def brute(damages, costs, budget):
    """The least (damage, cost) within the budget, by trying everything."""
    every = itertools.product(*[range(len(d)) for d in damages])
    sums = [(sum(d[k] for d, k in zip(damages, p, strict=True)), sum(c[k] for c, k in zip(costs, p, strict=True)))
            for p in every]
    return min((s for s in sums if s[1] <= budget), default=None)


items = st.lists(st.lists(st.tuples(st.one_of(st.integers(0, 6), st.floats(-1, 100, width=32)), st.integers(0, 12)),
                          min_size=1, max_size=4), max_size=5)


@settings(max_examples=300, deadline=None)
@given(items, st.integers(0, 40), st.sampled_from([4, 1 << 16]))
def test_the_choice_is_the_one_that_trying_everything_finds(options, budget, held):
    damages, costs = [[d for d, _ in o] for o in options], [[c for _, c in o] for o in options]
    wanted = brute(damages, costs, budget)
    if wanted is None:
        with pytest.raises(ValueError, match="above the budget"):
            choose(damages, costs, budget)
        return
    found = choose(damages, costs, budget, held)
    assert found.cost <= budget
    assert found.damage == pytest.approx(sum(d[k] for d, k in zip(damages, found.picks, strict=True)))
    if found.gap == 0:
        assert found.damage == pytest.approx(wanted[0], abs=1e-6)
    assert held == 4 or found.gap == 0
    assert found.damage - found.gap <= wanted[0] + 1e-6  # the gap is no lie where sums were left out


def test_two_hundred_layers_are_chosen_exactly():
    generator = torch.Generator().manual_seed(0)
    size = torch.randint(100, 300000, (200,), generator=generator).double()
    bits = torch.tensor([2.0, 3, 4, 6, 8])
    harm = torch.randn(200, generator=generator).mul(2).exp()[:, None].double() * 4.0**-bits
    found = choose(harm.tolist(), (size[:, None] * bits).tolist(), float(4 * size.sum()))
    assert found.gap == 0
    assert 0.999 <= found.cost / float(4 * size.sum()) <= 1
    assert found.damage < 0.7 * float(harm[:, 2].sum())  # against 4 bits for all


# ---- damage

def test_traces_are_those_of_the_exact_hessian():
    torch.manual_seed(0)
    x, y = torch.randn(20, 3), torch.randint(0, 4, (20,))
    first, second = torch.randn(5, 3, dtype=torch.double), torch.randn(4, 5, dtype=torch.double)

    def loss(a, b):
        return F.cross_entropy(torch.tanh(x.double() @ a.T) @ b.T, y)

    blocks = torch.autograd.functional.hessian(loss, (first, second))
    exact = [float(blocks[i][i].reshape(t.numel(), -1).trace()) for i, t in enumerate((first, second))]
    leaves = [first.requires_grad_(), second.requires_grad_(), torch.zeros(2, requires_grad=True)]
    found = traces(loss(*leaves[:2]), leaves, torch.Generator().manual_seed(1), probes=1000)
    assert found[:2] == pytest.approx(exact, rel=0.1)
    assert found[2] == 0  # no part of the loss


def test_damage_by_hessian_is_the_mean_trace_times_the_rounding_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(30, 4), torch.randint(0, 3, (30,))
    net = fw.capture(model, x[:2])
    task = fw.Task(calibration=lambda: [(x, y)], loss=F.cross_entropy)
    found = sensitivity(net, task, ("int4", "ternary"), "hessian", Quantize(activations=None), probes=700)
    weights = [model[0].weight.detach(), model[2].weight.detach()]

    def loss(a, b):
        return F.cross_entropy(F.linear(torch.tanh(F.linear(x, a, model[0].bias)), b, model[2].bias), y)

    blocks = torch.autograd.functional.hessian(loss, tuple(weights))
    for i, (name, weight) in enumerate(zip(("0.weight", "2.weight"), weights, strict=True)):
        trace = float(blocks[i][i].reshape(weight.numel(), -1).trace())
        for kind in ("int4", "ternary"):
            rounded = Quantize(kind, None, ends=None).plan(net, task).apply(net)
            values = rounded.tensor(name).float() * rounded.tensor(f"{name}_scale")[:, None]
            wanted = trace / weight.numel() * float((values - weight).square().sum())
            given = next(d.damage for d in found if (d.layer, d.kind) == (name, kind))
            assert given == pytest.approx(wanted, rel=0.2)


@pytest.mark.parametrize(("kind", "activations"), [("int3", None), ("int4/uint4", "uint8"), ("ternary/int4", None)])
def test_damage_is_what_quantizing_that_layer_alone_does(kind, activations):
    net, task = network(), digits_task()
    step = Quantize(activations=activations)
    found = {d.layer: d.damage for d in sensitivity(net, task, (kind,), step=step, batches=None)}
    assert len(found) == 8
    weights, _, values = kind.partition("/")
    for name in ("parts.1.0.weight", "head.weight"):
        others = tuple(n for n in found if n != name)
        step = Quantize(weights, values or None, ignore=others, ends=None, correct_bias=False)
        alone = step.plan(net, task).apply(net)
        with torch.no_grad():
            moved = [float((alone(x) - net(x)).square().sum() / net(x).square().sum()) for x, _ in task.calibration()]
        assert found[name] == pytest.approx(sum(moved) / len(moved), rel=1e-3)


def test_damage_by_score_is_the_drop():
    net, task = network(), digits_task()
    found = sensitivity(net, task, ("binary",), "score", Quantize(activations=None), split="validation", batches=None)
    drops = {d.layer: d.damage for d in found}
    name = max(drops, key=drops.get)
    others = tuple(n for n in drops if n != name)
    alone = Quantize("binary", None, ignore=others, ends=None).plan(net, task).apply(net)
    assert drops[name] == pytest.approx(score_of(net, task) - score_of(alone, task))
    assert drops[name] > 5


def test_sensitivity_leaves_everything_as_it_was_and_is_measured_again_alike():
    net, task = network(), digits_task()
    before, state = digest(net), torch.get_rng_state()
    for how in ("output", "score", "hessian"):
        found = sensitivity(net, task, ("int4",), how, batches=1, probes=2)
        assert found == sensitivity(net, task, ("int4",), how, batches=1, probes=2)
        assert all(isinstance(d, Damage) for d in found)
    assert digest(net) == before
    assert not net._taps
    assert torch.equal(state, torch.get_rng_state())


# ---- bits within a budget

WEIGHTS = Quantize(activations=None, ends=None)  #: weights alone
UNEVEN = Quantize(equalize=False)  #: scales of channels stay as uneven as they are


def error(net, made, task):
    """How far the outputs move on images that chose nothing."""
    with torch.no_grad():
        return sum(float((made(x) - net(x)).square().sum() / net(x).square().sum()) for x, _ in task.test())


def mixed_and_even(bits, how):
    net, task = network(), digits_task()
    even = Quantize(f"int{bits}", None, ends=None).plan(net, task)
    kinds = ("int8", "int6", "int5", "int4", "int3", "ternary")
    step = Mixed(WEIGHTS, bits=bits, how=how, kinds=kinds, batches=None, probes=8)
    return net, task, even, step.plan(net, task)


class Uneven(nn.Module):
    """Residual layers of which each adds less than the one before: the last ones bear any rounding."""

    SHARES = (1.0, 0.3, 0.1, 0.03, 0.01)

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(32, 64), nn.Linear(64, 8)
        self.parts = nn.ModuleList(nn.Linear(64, 64) for _ in self.SHARES)

    def forward(self, x):
        h = self.stem(x)
        for share, part in zip(self.SHARES, self.parts, strict=True):
            h = h + share * F.relu(part(h))
        return self.head(h)


@pytest.mark.parametrize(("how", "bits"), [("output", 3), ("output", 4), ("output", 6), ("hessian", 3), ("hessian", 5)])
def test_mixed_bits_beat_equal_bits_at_the_same_size(how, bits, tmp_path):
    """By much, where layers matter differently; how much that is does not depend on a training or a processor."""
    torch.manual_seed(0)
    net = fw.capture(Uneven().eval(), torch.randn(2, 32), parts=False)
    data = [(x, net(x).detach().argmax(1)) for x in torch.randn(6, 100, 32)]
    task = fw.Task(calibration=lambda: data[:3], test=lambda: data[3:], loss=F.cross_entropy)
    kinds = ("int8", "int6", "int5", "int4", "int3", "ternary")
    mixed = Mixed(WEIGHTS, bits=bits, how=how, kinds=kinds, batches=None, probes=8).plan(net, task)
    assert len(mixed.stored) == 7
    assert len({s.kind for s in mixed.stored}) > 2
    one, other = (p.apply(net) for p in (mixed, Quantize(f"int{bits}", None, ends=None).plan(net, task)))
    assert one.save(tmp_path / "mixed.fw") <= other.save(tmp_path / "even.fw") + 512  # packed in whole bytes
    assert error(net, one, task) < 0.2 * error(net, other, task)


def test_equal_bits_are_taken_where_they_do_less_damage():
    """Damages that do not add up: the choice is held against the same kind for all, each measured as a whole."""
    net, task, even, mixed = mixed_and_even(4, "output")
    one, other = (p.apply(net) for p in (mixed, even))
    task = digits_task(test=task.calibration)
    assert error(net, one, task) <= error(net, other, task) * (1 + 1e-6)


def test_a_budget_of_bytes_is_what_the_tensors_take():
    net, task = network(), digits_task()
    whole = sum(t.numel() * t.element_size() for t in net.tensors().values())
    for share in (0.25, 0.3, 0.4):
        step = Mixed(WEIGHTS, bytes=share, kinds=("int8", "int4", "int3", "float"))
        plan = step.plan(net, task)
        assert not [s for s in plan.skipped if "cannot be reached" in s.reason]
        kinds = {s.weight: int(s.kind[-1]) for s in plan.stored}
        size = 0.0
        for name, t in plan.apply(net).tensors().items():
            size += t.numel() * (kinds[name] / 8 if name in kinds else t.element_size())
        assert 0.9 * share * whole < size <= share * whole


def test_layers_that_are_settled_stay_so_and_count():
    net, task = network(), digits_task()
    inner = Quantize(activations=None, mixed={"head": "int8"}, ends="int8")
    step = Mixed(inner, bits=4, kinds=("int8", "int4", "int3"))
    plan = step.plan(net, task)
    kinds = {s.weight: s.kind for s in plan.stored}
    assert kinds["head.weight"] == kinds["parts.0.0.weight"] == "int8"
    sizes = {n: net.tensor(n).numel() for n in kinds}
    bits = sum(int(k[-1]) * sizes[n] for n, k in kinds.items()) / sum(sizes.values())
    assert 3.7 < bits <= 4


def test_a_budget_that_cannot_be_met_is_said():
    net, task = network(), digits_task()
    plan = Mixed(WEIGHTS, bytes=0.01, kinds=("int4", "ternary")).plan(net, task)
    packed = {s.kind for s in plan.stored if net.tensor(s.weight).numel() >= 256}
    assert packed == {"ternary"}  # fewer numbers lie in the file as whole bytes: four bits are no dearer there
    assert any("bytes=0.01 cannot be reached" in s.reason for s in plan.skipped)


def test_a_budget_of_latency_leaves_float_what_is_cheap_to_leave_so(monkeypatch):
    """With a clock that says what each layer takes: 10 each, and 1 as integers (the head 9)."""
    net, task = network(), digits_task()
    layers = [n for n in net.tensors() if net.tensor(n).dim() > 1]

    def clock(self, networks):
        taken = {}
        for name, timed in networks.items():
            whole = {n for n, t in timed.tensors().items() if t.dtype == torch.int8 and n.endswith("weight")}
            taken[name] = sum(10 if n not in whole else 9 if n == "head.weight" else 1 for n in layers)
        return taken

    monkeypatch.setattr(InNetwork, "_timed", clock)
    assert len(layers) == 8
    plan = Mixed(latency=0.5, kinds=("int8", "float")).plan(net, task)  # 24 are left: 1 + 9 + 9
    left = set(layers) - {s.weight for s in plan.stored}
    assert len(left) == 3
    assert "head.weight" in left
    plan = Mixed(latency=0.1, kinds=("int8", "float")).plan(net, task)
    assert {s.weight for s in plan.stored} == set(layers)
    assert any("latency=0.1 cannot be reached" in s.reason for s in plan.skipped)


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
    return fw.capture(model.eval(), digits()[0][:2]), digits_task()


def test_latency_is_measured_in_the_runtime():
    plan = Mixed(latency=1.0, kinds=("int8", "float")).plan(*small())
    named = {s.weight for s in plan.stored} | {s.path for s in plan.skipped}
    assert {"1.weight", "3.weight"} <= named


def test_mixed_bits_train():
    net, task = network(), digits_task(train=split(0, 200, 100))
    step = Mixed(bits=3, kinds=("int8", "int4", "ternary"))
    fitted = fw.recover.Train(epochs=1, lr=0.001, during=(step,)).fit(net, task, fw.steps.Context(original=net))
    assert sum(t.dtype == torch.int8 for n, t in fitted.tensors().items() if n.endswith("weight")) == 8


# ---- the ladder

def test_the_ladder_brings_back_what_plain_rounding_wrecks():
    """W8A8 of a depthwise network with badly scaled channels loses many points; the ladder finds out what to do."""
    net, task = scaled(), digits_task()
    float_score = score_of(net, task)
    plain = UNEVEN.plan(net, task).apply(net)
    assert score_of(plain, task) < float_score - 5
    assert score_of(Quantize().plan(net, task).apply(net), task) > float_score - 1  # equalized where it is that bad
    plan = Ladder(UNEVEN, score_drop=1.0).plan(net, task)
    made = plan.apply(net)
    assert score_of(made, task) >= float_score - 1
    assert score_of(made, task, "test") >= score_of(net, task, "test") - 2
    assert not any("was not reached" in s.reason for s in plan.skipped)
    first, given, *rest = plan.trail
    assert (first.name, given.name) == ("float", "as given")
    assert first.score == float_score
    assert given.score == pytest.approx(score_of(plain, task))
    kept = [r for r in rest if r.kept]
    assert kept[-1].score == pytest.approx(score_of(made, task))
    assert "equalize" in {r.name for r in kept}
    assert all(f"{r.name}: {r.score:.4g}" in str(plan) for r in plan.trail)
    assert kept[-1].name in plan.summary()
    assert len(plan.stored) == 8  # no layer had to be left float
    assert Plan.from_json(plan.to_json(), plan.tensors) == plan == Ladder(UNEVEN, score_drop=1.0).plan(net, task)


def test_the_ladder_stops_where_nothing_is_wrong():
    net, task = network(), digits_task()
    plan = Ladder(score_drop=1.0).plan(net, task)
    assert [r.name for r in plan.trail] == ["float", "as given"]
    plain = Quantize().plan(net, task)
    assert digest(plan.apply(net)) == digest(plain.apply(net))


def test_the_most_sensitive_layers_are_left_wider_and_no_more_than_needed():
    net, task = network(), digits_task()
    step = Ladder(Quantize("int3", None, ends=None), score_drop=1.0, rungs=())
    plan = step.plan(net, task)
    made = plan.apply(net)
    assert score_of(made, task) >= score_of(net, task) - 1
    wide = [s.weight for s in plan.stored if s.kind == "int8"]
    assert 0 < len(wide) < 8
    damage = {d.layer: d.damage for d in sensitivity(net, task, ("int3",), step=Quantize(activations=None))}
    order = sorted(damage, key=lambda n: -damage[n])
    assert sorted(wide) == sorted(order[:len(wide)])
    fewer = Quantize("int3", None, ends=None, mixed=dict.fromkeys(order[:len(wide) - 1], "int8"))
    assert score_of(fewer.plan(net, task).apply(net), task) < score_of(net, task) - 1
    assert sum(r.kept for r in plan.trail) == 3  # float, as given, and the one that is in the end


def test_eight_bits_go_on_to_float():
    net, task = scaled(), digits_task()
    plan = Ladder(UNEVEN, score_drop=0.5, rungs=("mse",)).plan(net, task)
    assert len(plan.stored) < 8
    assert plan.trail[-1].name.startswith("float for") or any(r.kept and r.name.startswith("float for")
                                                             for r in plan.trail)
    assert score_of(plan.apply(net), task) >= score_of(net, task) - 0.5


def test_a_score_that_is_not_reached_is_said_and_the_best_is_taken():
    net, task = scaled(), digits_task()
    plan = Ladder(UNEVEN, score_drop=0.0, rungs=("mse", "percentile"), widen=False).plan(net, task)
    assert any(s.reason.startswith("score_drop=0.0 was not reached") for s in plan.skipped)
    assert score_of(plan.apply(net), task) == max(r.score for r in plan.trail[1:])


def test_rungs_that_need_calibration_data_are_named_where_there_is_none():
    net, task = network(), digits_task(calibration=None)
    plan = Ladder(Quantize("ternary", None, ends=None), rungs=("mse", "gptq"), widen=False,
                  score_drop=0).plan(net, task)
    assert any("'gptq' needs the task's calibration split" in s.reason for s in plan.skipped)


def test_only_so_many_batches_are_read():
    net, seen = network(), []

    def validation():
        for i, batch in enumerate(split(1197, 1497, 50)()):
            seen.append(i)
            yield batch

    Ladder(batches=2).plan(net, digits_task(validation=validation))
    assert max(seen) <= 2


def test_the_recipe_file_names_them():
    recipe = fw.Recipe.from_toml("""
        [[steps]]
        kind = "balance.Ladder"
        score_drop = 1.0
        step = {kind = "quantize.Quantize", weights = "int4"}
        rungs = ["mse", "gptq"]
    """)
    assert recipe.steps == (Ladder(Quantize("int4"), score_drop=1.0, rungs=("mse", "gptq")),)
    assert fw.Recipe.from_toml(recipe.to_toml()) == recipe
    mixed = fw.Recipe([Mixed(Quantize(mixed={"head": "int8"}), bytes=0.2, kinds=("int8", "int4"))])
    assert fw.Recipe.from_toml(mixed.to_toml()) == mixed


def test_the_recipe_file_of_version_0_1_names_them_without_a_step_inside():
    recipe = fw.Recipe.from_toml("""
        [[steps]]
        kind = "quantize.Ladder"
        score_drop = 1.0
        weights = "int4"
        rungs = ["mse", "gptq"]
    """)
    with pytest.warns(DeprecationWarning, match=r"fw\.balance\.Ladder\(fw\.quantize\.Quantize"):
        old = fw.quantize.Ladder
    assert recipe.steps == (old(score_drop=1.0, weights="int4", rungs=("mse", "gptq")),)
    assert recipe.steps == (Ladder(Quantize("int4"), score_drop=1.0, rungs=("mse", "gptq")),)
    assert old("int4", "uint4", batches=3) == Ladder(Quantize("int4", "uint4"), batches=3)
    recipe = fw.Recipe.from_toml('[[steps]]\nkind = "quantize.Mixed"\nbytes = 0.2\nmixed = {head = "int8"}')
    assert recipe.steps == (fw.quantize.Mixed(bytes=0.2, mixed={"head": "int8"}),)
    assert recipe.steps == (Mixed(Quantize(ends=None, mixed={"head": "int8"}), bytes=0.2),)
    assert fw.Recipe.from_toml(recipe.to_toml()) == recipe
    with pytest.raises(TypeError, match="each once"):
        old("int4", weights="int4")
    with pytest.raises(RecipeError, match="did you mean 'score_drop'"):
        fw.Recipe.from_toml('[[steps]]\nkind = "quantize.Ladder"\nscore_dorp = 1.0')


def test_a_job_reports_what_was_tried(tmp_path):
    net, task = small()
    result = fw.compress(net, task, [Ladder(score_drop=100.0)], out=tmp_path, seconds=0.02)
    assert "; as given: " in result.plans[0].summary
    assert "as given" in (tmp_path / "report.html").read_text()
    assert [r.name for r in result.plans[0].plan.trail] == ["float", "as given"]


# ---- errors

@pytest.mark.parametrize(("step", "message"), [
    (Ladder(score_drop=-1), "expected points of the score from 0"),
    (Ladder(rungs=("gtpq",)), "did you mean 'gptq'"),
    (Ladder(split="test"), "chooses nothing"),
    (Ladder(split="valid"), "did you mean 'validation'"),
    (Ladder(batches=0), "batches=0"),
    (Ladder(Quantize("int9")), "did you mean"),
    (Mixed(), "none of bytes, bits, latency"),
    (Mixed(bytes=1.5), "fraction that remains"),
    (Mixed(bits=0), "up to 32 bits"),
    (Mixed(bits=4, kinds=("int44",)), "did you mean 'int4'"),
    (Mixed(bits=4, kinds=()), "expected different ones"),
    (Mixed(Quantize("int4"), bits=4), "but chooses them"),
    (Mixed(bits=4, how="lost"), "has no how 'lost'"),
    (Mixed(bits=4, probes=0), "probes=0"),
    (Mixed(bits=4, how="hessian", kinds=("int8/uint8", "int4/uint4")), "judges weights alone"),
])
def test_options_that_make_no_sense_are_answered(step, message):
    with pytest.raises(RecipeError, match=message):
        step.plan(network(), digits_task())


def test_what_the_task_lacks_is_said():
    net = network()
    with pytest.raises(TaskError, match="the task's score"):
        Ladder().plan(net, digits_task(score=None))
    with pytest.raises(TaskError, match="the task's validation"):
        Ladder().plan(net, digits_task(validation=None))
    with pytest.raises(TaskError, match="the task's loss"):
        Mixed(bits=4, how="hessian").plan(net, digits_task(loss=None))
    with pytest.raises(TaskError, match="the task's calibration"):
        Mixed(bits=4).plan(net, digits_task(calibration=None))
    with pytest.raises(TaskError, match="calibration split is empty"):
        sensitivity(net, digits_task(calibration=list), step=Quantize(activations=None))
    with pytest.raises(RecipeError, match="cannot be used during training"):
        Ladder().start(net, digits_task())
