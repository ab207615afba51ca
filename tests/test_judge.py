"""What a change costs: forms on a bench against plans applied, damage by the book, costs by writing files, budgets by
trying everything, and figures that several processes keep in one file."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import featherweight as fw
from featherweight.balance import Mixed, MixedPlan
from featherweight.codec import archive_bytes
from featherweight.errors import FileError, RecipeError, TaskError
from featherweight.judge.bench import Bench, Form, standing
from featherweight.judge.candidates import FAMILIES, Candidate, Family, family_of, judged, priced, register
from featherweight.judge.costs import COSTS, alone, growth
from featherweight.judge.damage import Judge, damages, together
from featherweight.judge.figures import Figures
from featherweight.judge.in_network import InNetwork
from featherweight.network.file.digest import digest
from featherweight.numerics.budget import choose_jointly, reachable
from featherweight.quantize import Quantize
from featherweight.share import Codebook
from featherweight.steps import Plan, Rewrite, Stage
from featherweight.task import call
from problems import PROBLEMS, network, task, tensors_of

WEIGHTS = Quantize(activations=None, ends=None)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "cache"))


#: every family with a few options that all problems have layers for
SMALL: dict[str, Family] = {
    "quantize": fw.quantize.Kinds(("int8", "int4/float")),
    "share": fw.share.Bits((2,), Codebook(min_size=1)),
    "share.rates": fw.share.Rates((0.02,), Codebook(bits=3, min_size=1, importance="inputs")),
    "factorize": fw.factorize.Energies((0.5,)),
    "prune.channels": fw.prune.Shares((0.5,)),
    "prune.weights": fw.prune.Sparsities((0.5,)),
    "prune.depth": fw.prune.Drops(),
}
#: groups whose channels a normalization mixes: what is left of it is defined over those that stay, so that a silenced
#: channel still counts in it, and a cut one does not
MIXED_CHANNELS = {("attention", "patch"), ("no_momentum", "6")}


def outputs(net: fw.Network, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return [t for t in tensors_of(call(net, inputs)) if t.is_floating_point()]


def offered(family: str, problem: str) -> tuple[fw.Network, tuple[Candidate, ...]]:
    row, source = PROBLEMS[problem], SMALL[family]
    ready = source.prepared(network(row).copy().eval())
    return ready, source.candidates(ready, task(row))


# ---- forms

def test_every_family_is_here() -> None:
    family_of("quantize")
    assert {name for name, f in FAMILIES.items() if type(f).__module__.startswith("featherweight.")} == set(SMALL)
    assert all(type(FAMILIES[name]) is type(family) for name, family in SMALL.items())


@pytest.mark.parametrize("problem", ["mlp", "conv_bn", "residual", "attention", "tied_linear", "shared", "transposed",
                                     "concat", "no_momentum", "conv1d"])
def test_what_stands_on_the_bench_is_what_the_plan_makes(problem: str) -> None:
    """For every family: tapped forms and applied plans give the same, and the bench is as it was afterwards."""
    row = PROBLEMS[problem]
    inputs, seen = row.example(row.batch or 3, seed=5), 0
    for family in SMALL:
        ready, found = offered(family, problem)
        before = digest(ready)
        bench = Bench(ready, task(row), "calibration", 1, [c.form for c in found])
        whole = outputs(bench.network, inputs)
        for c in found:
            with bench.put(c.form):
                put = outputs(bench.network, inputs)
            if (problem, c.layer) not in MIXED_CHANNELS:
                for a, b in zip(put, outputs(c.plan().apply(ready), inputs), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(b.abs().max())))
            assert any(bool((a != b).any()) for a, b in zip(put, whole, strict=True)) or family == "prune.depth"
            seen += 1
        assert all(torch.equal(a, b) for a, b in zip(outputs(bench.network, inputs), whole, strict=True))
        assert not bench.network._taps
        assert digest(ready) == before
    assert seen > 5


def test_forms_stand_upon_one_another_and_are_computed_once() -> None:
    net, row = network(PROBLEMS["mlp"]), PROBLEMS["mlp"]
    name, calls = "0.weight", [0]
    weight = net.tensor(name).detach()

    def doubled(w: Tensor) -> Tensor:
        calls[0] += 1
        return 2 * w

    inputs = row.example(3, seed=1)
    other = net.copy()
    other.set_tensor(name, 2 * weight + 1)
    with standing(net, Form({name: doubled}), Form({name: lambda w: w + 1})):
        found = [outputs(net, inputs) for _ in range(3)]
    assert calls == [1]
    assert all(torch.equal(a, b) for once in found for a, b in zip(once, outputs(other, inputs), strict=True))


def test_inputs_are_changed_for_one_call_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + 2 * self.b(x)

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(5, 4)
    net = fw.capture(model, x)
    name = next(n.name for n in net.calls(torch.ops.aten.linear.default) if n.meta["module"] == "b")
    form = Form(inputs={name: lambda value: value * 0})
    bench = Bench(net, fw.Task(calibration=lambda: [(x, None)]), "calibration", 1, [form])
    with bench.put(form), torch.no_grad():
        torch.testing.assert_close(bench.network(x), model.a(x) + 2 * model.b(x * 0))


# ---- damage

def by_the_book(net: fw.Network, made: fw.Network, work: fw.Task, measure: str, batches: int) -> float:
    total = []
    with torch.no_grad():
        for x, y in list(work.batches("calibration", batches)):
            before, after = call(net, x), call(made, x)
            total.append(float((after - before).double().square().sum() / before.double().square().sum())
                         if measure == "output" else float(F.cross_entropy(after, y) - F.cross_entropy(before, y)))
    return sum(total) / len(total)


@pytest.mark.parametrize("measure", ["output", "loss"])
@pytest.mark.parametrize("family", ["quantize", "share", "prune.weights", "prune.channels"])
def test_damage_is_that_of_the_plan_applied(family: str, measure: str) -> None:
    work = replace(task(PROBLEMS["conv_bn"]), loss=F.cross_entropy)
    ready, found = offered(family, "conv_bn")
    for c in judged(ready, work, found, Judge(measure)):
        wanted = by_the_book(ready, c.plan().apply(ready), work, measure, 2)
        assert c.damage == pytest.approx(wanted, rel=1e-3, abs=1e-5), c.layer


def test_damage_by_score_is_the_points_lost_and_many_at_once_are_measured_as_one() -> None:
    row = PROBLEMS["conv_bn"]
    work = replace(task(row), score=lambda predict, data: 7.0 * sum(float(predict(x).abs().mean()) for x, _ in data))
    ready, found = offered("quantize", "conv_bn")
    few = [c for c in found if c.option == "int4/float"]

    def score(net: fw.Network) -> float:
        with torch.no_grad():
            return float(work.score(net, list(work.batches("calibration", 2))))  # type: ignore[misc]

    made = ready
    for c in few:
        made = c.plan().apply(made)
    alone_, all_ = together(ready, work, [[few[0].form], [c.form for c in few]], Judge("score"))
    assert alone_ == pytest.approx(score(ready) - score(few[0].plan().apply(ready)), rel=1e-3, abs=1e-5)
    assert all_ == pytest.approx(score(ready) - score(made), rel=1e-3, abs=1e-5)
    assert abs(all_) > 0


def test_what_damage_lacks_is_said() -> None:
    net, work = network(PROBLEMS["mlp"]), task(PROBLEMS["mlp"])
    with pytest.raises(TaskError, match="the task's loss"):
        damages(net, replace(work, loss=None), [Form()], Judge("loss"))
    with pytest.raises(TaskError, match="calibration split is empty"):
        damages(net, replace(work, calibration=list), [Form()], Judge())
    with pytest.raises(RecipeError, match="these forms change other values"):
        damages(net, work, [Form(nodes={net.calls()[0].name: lambda v: v})], Judge("hessian"))


# ---- sensitivity

def test_sensitivity_names_layer_family_and_option_and_changes_nothing() -> None:
    net, work = network(PROBLEMS["conv_bn"]), task(PROBLEMS["conv_bn"])
    before, state = digest(net), torch.get_rng_state()
    for name, family in SMALL.items():
        found = fw.sensitivity(net, work, family, batches=1)
        assert found == fw.sensitivity(net, work, family, batches=1)
        assert all(type(d) is fw.Sensitivity and d.family == name and d.option in family.options for d in found)
        assert found or name == "prune.depth"
    assert digest(net) == before
    assert torch.equal(state, torch.get_rng_state())
    one = fw.sensitivity(net, work, "quantize", options=("int8", "int4"), layer="0.0.weight")
    assert [(d.layer, d.option) for d in one] == [("0.0.weight", "int8"), ("0.0.weight", "int4")]


def test_sensitivity_agrees_with_the_old_spellings() -> None:
    net, work = network(PROBLEMS["conv_bn"]), replace(task(PROBLEMS["conv_bn"]), loss=F.cross_entropy)
    with pytest.warns(DeprecationWarning, match=r"is now fw\.sensitivity"):
        old = fw.quantize.sensitivity(net, work, ("int8", "float", "int3"))
    new = fw.sensitivity(net, work, options=("int8", "int3"))
    assert [(d.layer, d.kind, d.damage) for d in old] == [(d.layer, d.option, d.damage) for d in new]
    axes = fw.prune.axis_groups(net)
    scores = [torch.arange(len(g)).double().numpy() for g in axes.groups]
    with pytest.warns(DeprecationWarning, match=r"is now fw\.sensitivity"):
        curves = fw.prune.sensitivity(net, work, axes, axes.groups, scores, shares=(0.5,), kind="loss")
    assert [c.group for c in curves] == [d.layer for d in fw.sensitivity(net, work, fw.prune.Shares((0.5,)))]


@pytest.mark.parametrize(("options", "message"), [
    ({"family": "quantise"}, "no family 'quantise'; did you mean 'quantize'"),
    ({"measure": "outputs"}, "did you mean 'output'"),
    ({"options": ("int9",)}, "did you mean 'int8'"),
    ({"family": "share", "options": (9,)}, "expected 2 to 256"),
    ({"family": "factorize", "options": (1.5,)}, "energy=1.5"),
    ({"family": "prune.weights", "options": (1.0,)}, "sparsity=1.0"),
    ({"layer": "0.wieght"}, "offers nothing; did you mean '0.weight'"),
    ({"split": "test"}, "chooses nothing"),
    ({"batches": 0}, "batches=0"),
])
def test_wrong_questions_are_answered(options: dict[str, Any], message: str) -> None:
    net, work = network(PROBLEMS["mlp"]), task(PROBLEMS["mlp"])
    with pytest.raises(RecipeError, match=message):
        fw.sensitivity(net, work, **options)


# ---- costs

@pytest.mark.parametrize("problem", PROBLEMS)
def test_lengths_are_those_of_the_files(problem: str, tmp_path: Path) -> None:
    net = network(PROBLEMS[problem])
    for made in (net, Quantize("int4", None, ends=None).plan(net, task(PROBLEMS[problem])).apply(net)):
        size = made.save(tmp_path / "net.fw")
        assert COSTS["file_bytes"](made) == size
        with (tmp_path / "net.fw").open("rb") as file:
            assert COSTS["tensor_bytes"](made) == size - 8 - int.from_bytes(file.read(8), "little")


@pytest.mark.parametrize("family", ["quantize", "share", "factorize", "prune.weights"])
@pytest.mark.parametrize("problem", ["mlp", "conv_bn", "residual", "attention", "tied_linear", "shared", "grouped"])
def test_a_change_costs_alone_what_it_costs_in_the_network(family: str, problem: str) -> None:
    ready, found = offered(family, problem)
    for c in priced(ready, found, ("params", "macs", "tensor_bytes", "file_bytes")):
        after = c.plan().apply(ready)
        for name in ("params", "macs", "tensor_bytes"):
            assert c.costs[name] == COSTS[name](after) - COSTS[name](ready), (c.layer, name)
        assert c.costs["file_bytes"] == pytest.approx(COSTS["file_bytes"](after) - COSTS["file_bytes"](ready), abs=64)


def test_costs_of_many_layers_add_up() -> None:
    ready, found = offered("quantize", "residual")
    few = [c for c in found if c.option == "int4/float"]
    after = ready
    for c in few:
        after = c.plan().apply(after)
    summed = {n: sum(c.costs[n] for c in priced(ready, few, (n,))) for n in ("tensor_bytes", "archive_bytes")}
    assert summed["tensor_bytes"] == COSTS["tensor_bytes"](after) - COSTS["tensor_bytes"](ready)
    assert summed["archive_bytes"] == pytest.approx(archive_bytes(after) - archive_bytes(ready), rel=0.1)


def test_groups_are_priced_on_the_whole_network() -> None:
    ready, found = offered("prune.channels", "conv_bn")
    for c in priced(ready, found, ("macs", "params")):
        after = c.plan().apply(ready)
        assert c.costs["macs"] == COSTS["macs"](after) - COSTS["macs"](ready) < 0
        assert c.costs["params"] == COSTS["params"](after) - COSTS["params"](ready) < 0


def test_a_layer_alone_computes_what_it_computes() -> None:
    net, row = network(PROBLEMS["residual"]), PROBLEMS["residual"]
    values: dict[str, Tensor] = {}
    names = {n.name for c in net.calls() for n in [c, *c.all_input_nodes]}
    with torch.no_grad(), net.taps({n: partial(values.__setitem__, n) for n in names}):
        call(net, row.example(1, seed=3))
    for weight in ("stem.0.weight", "fc.weight"):
        layer = alone(net, weight)
        (output,) = (n for n in layer.graph.nodes if n.op == "output")
        (node,) = output.args[0]
        with torch.no_grad():
            (found,) = layer(*(values[i.name] for i in layer.signature.inputs))
        torch.testing.assert_close(found, values[node.name])


@pytest.mark.parametrize("step", [Quantize(), Quantize("int3", None), Quantize(correct_bias=True, rescale=True),
                                  Codebook(bits=3, min_size=1), fw.factorize.LowRank(energy=0.7, min_gain=-1.0)])
@pytest.mark.parametrize("problem", ["mlp", "conv_bn", "depthwise", "attention", "silent", "gated", "static_batch"])
def test_a_plan_says_that_the_file_grows_exactly_when_it_does(step: Rewrite, problem: str, tmp_path: Path) -> None:
    net, work = network(PROBLEMS[problem]), task(PROBLEMS[problem])
    plan = step.plan(net, work)
    grown = plan.apply(net).save(tmp_path / "after.fw") > net.save(tmp_path / "before.fw")
    if isinstance(step, fw.factorize.LowRank):  # says it of every layer by itself
        assert ("bytes" in plan.grows) >= grown
    else:
        assert ("bytes" in plan.grows) == grown
    assert set(growth(net, plan.apply(net))) <= set(plan.grows)


# ---- figures in a file

def test_no_figure_of_several_processes_is_lost(tmp_path: Path) -> None:
    path, count = tmp_path / "figures.json", 40
    code = ("import sys; from pathlib import Path; from featherweight.judge.figures import Figures\n"
            "figures = Figures(Path(sys.argv[1]))\n"
            f"for i in range({count}): figures.add({{f'{{sys.argv[2]}} {{i}}': float(i)}})\n")
    running = [subprocess.Popen([sys.executable, "-c", code, str(path), str(i)]) for i in range(3)]
    assert [p.wait(120) for p in running] == [0, 0, 0]
    known = Figures(path).known
    assert known == {f"{i} {k}": float(k) for i in range(3) for k in range(count)}
    assert json.loads(path.read_text()) == known


def test_a_kill_keeps_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    code = ("import sys; from pathlib import Path; from featherweight.judge.figures import Figures\n"
            "figures = Figures(Path(sys.argv[1])); i = 0\n"
            "while True: figures.add({str(i): float(i)}); i += 1\n")
    running = subprocess.Popen([sys.executable, "-c", code, str(path)])
    end = time.monotonic() + 120
    while time.monotonic() < end and not (path.exists() and len(Figures(path).known) > 5):
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGKILL)
    running.wait(60)
    known = Figures(path).known
    assert len(known) > 5
    assert set(known) == {str(i) for i in range(len(known))}
    Figures(path).add({"after": 1.0})
    assert Figures(path).known == known | {"after": 1.0}


def test_a_file_that_holds_no_figures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "figures.json").write_text('{"a": "b"}')
    with pytest.raises(FileError, match="remove it to have them measured again"):
        Figures(tmp_path / "figures.json")


def test_networks_are_timed_once_beside_the_first(tmp_path: Path) -> None:
    net, row = network(PROBLEMS["mlp"]), PROBLEMS["mlp"]
    small = Quantize("int8", None).plan(net, task(row)).apply(net)
    asked: list[tuple[str, ...]] = []
    speed = [1.0]

    def clock(networks: Any) -> dict[str, float]:
        asked.append(tuple(networks))
        return {name: speed[0] * (3.0 if digest(n) == digest(net) else 1.5) for name, n in networks.items()}

    def found() -> dict[str, float]:
        timer = InNetwork(task(row), path=tmp_path / "times.json", clock=clock)
        return timer.seconds(net, {"same": lambda: net, "small": lambda: small})

    assert found() == {"": 3.0, "same": 3.0, "small": 1.5}
    assert asked == [("", "same", "small")]
    speed[0] = 100.0
    assert found() == {"": 3.0, "same": 3.0, "small": 1.5}
    assert len(asked) == 1
    many = {str(i): partial(Quantize(f"int{i}", None, ends=None).plan(net, task(row)).apply, net) for i in range(3, 8)}
    speed[0] = 2.0  # a slower hour: what counts is what each takes of the first in the same rounds
    timer = InNetwork(task(row), path=tmp_path / "times.json", clock=clock)
    assert timer.seconds(net, many) == {"": 3.0, **dict.fromkeys(many, 1.5)}
    InNetwork(task(row), threads=2, path=tmp_path / "times.json", clock=clock).seconds(net, {})
    assert asked[-1] == ("",)


# ---- several budgets

def brute(damage: Any, costs: Any, budgets: Sequence[float]) -> float | None:
    """The least damage within the budgets, by trying everything."""
    best = None
    for picks in itertools.product(*[range(len(d)) for d in damage]):
        sums = [sum(c[i][k] for i, k in enumerate(picks)) for c in costs]
        if all(s <= b for s, b in zip(sums, budgets, strict=True)):
            total = sum(damage[i][k] for i, k in enumerate(picks))
            best = total if best is None else min(best, total)
    return best


numbers = st.one_of(st.integers(0, 6), st.floats(-1, 100, width=32))
items = st.lists(st.lists(st.tuples(numbers, *[st.integers(0, 12)] * 3), min_size=1, max_size=4), max_size=4)


@settings(max_examples=150, deadline=None)
@given(items, st.lists(st.integers(0, 30), min_size=1, max_size=3))
def test_the_choice_within_several_budgets_is_the_one_that_trying_everything_finds(options: Any, budgets: Any) -> None:
    damage = [[o[0] for o in mine] for mine in options]
    costs = [[[o[1 + j] for o in mine] for mine in options] for j in range(len(budgets))]
    wanted = brute(damage, costs, budgets)
    if wanted is None:
        with pytest.raises(ValueError, match="budget"):
            choose_jointly(damage, costs, budgets)
        raised = reachable(costs, budgets)
        assert all(r >= b for r, b in zip(raised, budgets, strict=True))
        assert any(r > b for r, b in zip(raised, budgets, strict=True))
        assert brute(damage, costs, raised) is not None
        return
    found = choose_jointly(damage, costs, budgets)
    assert all(c <= b for c, b in zip(found.costs, budgets, strict=True))
    assert found.damage == pytest.approx(sum(d[k] for d, k in zip(damage, found.picks, strict=True)))
    assert found.damage == pytest.approx(wanted, abs=1e-4)
    assert found.damage - found.gap <= wanted + 1e-6
    assert reachable(costs, budgets) == tuple(budgets)


# ---- Mixed over families

class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
                                  nn.Conv2d(24, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
                                  nn.Conv2d(32, 48, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.wide, self.head = nn.Linear(192, 96), nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wide(self.body(x)).relu())


@pytest.fixture(scope="module")
def net() -> fw.Network:
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():  # one layer that is of low rank, one with few values
        model.wide.weight.copy_(torch.randn(96, 5) @ torch.randn(5, 192) / 15)
        second = model.body[3].weight
        second.copy_(torch.tensor([-0.3, -0.05, 0.1, 0.4])[torch.randint(0, 4, second.shape)] / 4)
    return fw.capture(model, torch.randn(2, 3, 8, 8))


@pytest.fixture(scope="module")
def work() -> fw.Task:
    generator = torch.Generator().manual_seed(1)
    data = [(torch.randn(16, 3, 8, 8, generator=generator), torch.arange(16) % 10) for _ in range(2)]
    return fw.Task(train=lambda: data, calibration=lambda: data, validation=lambda: data, loss=F.cross_entropy,
                   score=fw.scores.top1)


def test_a_budget_of_damage_gives_the_fewest_bytes_within_it(net: fw.Network, work: fw.Task) -> None:
    kinds = ("int8", "int4", "int3", "float")
    found = {(d.layer, d.option): d.damage for d in
             fw.sensitivity(net, work, fw.quantize.Kinds(kinds[:3], WEIGHTS))}
    names = list(dict.fromkeys(n for n, _ in found))
    folded = fw.network.fold_batch_norm(net)
    cost = {(c.layer, c.option): c.costs["tensor_bytes"] for c in priced(
        folded, fw.quantize.Kinds(kinds[:3], WEIGHTS).candidates(folded, work), ("tensor_bytes",))}
    limit = 0.3 * sum(found[n, "int3"] for n in names)
    best = min((sum(cost.get((n, k), 0.0) for n, k in zip(names, picks, strict=True)), picks)
                for picks in itertools.product(kinds, repeat=len(names))
                if sum(found.get((n, k), 0.0) for n, k in zip(names, picks, strict=True)) <= limit)
    plan = Mixed(WEIGHTS, damage=limit, kinds=kinds).plan(net, work)
    chosen = {s.weight: s.kind for s in plan.stored}
    assert sum(cost[n, k] for n, k in chosen.items()) == best[0]
    assert sum(found[n, k] for n, k in chosen.items()) <= limit


@pytest.mark.parametrize(("step", "message"), [
    (Mixed(bytes=0.5, families=("shares",)), "no family 'shares'; did you mean 'share'"),
    (Mixed(bytes=0.5, families=("prune.channels",)), "changes several tensors at once"),
    (Mixed(bytes=0.5, families=("prune.depth",)), "put its step into the recipe before Mixed"),
    (Mixed(bytes=0.5, families=("quantize",)), "whose forms are its kinds"),
    (Mixed(bits=4, families=("share",)), r"write Mixed\(bytes=0\.15\) with families"),
    (Mixed(damage=0.0), "damage=0"),
    (Mixed("int4", bytes=0.5), r"expected a Quantize, as in fw\.balance\.Mixed\(fw\.quantize\.Quantize"),
    (fw.balance.Ladder("int4"), r"expected a Quantize, as in fw\.balance\.Ladder\(fw\.quantize\.Quantize"),
])
def test_what_cannot_be_chosen_is_refused_before_work_starts(step: Rewrite, message: str) -> None:
    def read() -> Iterator[Any]:
        raise AssertionError("data is read")

    with pytest.raises(RecipeError, match=message):
        step.plan(network(PROBLEMS["mlp"]), fw.Task(calibration=read, validation=read))
    with pytest.raises(RecipeError, match=message):
        step.check()


def test_families_are_refused_during_training(net: fw.Network, work: fw.Task) -> None:
    with pytest.raises(RecipeError, match="not trained beside integers"):
        fw.Recipe([fw.recover.Train(during=(Mixed(bytes=0.5, families=("share",)),))])


def test_a_recipe_holds_and_runs_it(net: fw.Network, work: fw.Task, tmp_path: Path) -> None:
    recipe = fw.Recipe([Mixed(WEIGHTS, bytes=0.3, macs=0.9, kinds=("int8", "float"), families=("factorize", "share"))])
    assert fw.Recipe.from_toml(recipe.to_toml()) == recipe
    assert 'step = {kind = "quantize.Quantize"' in recipe.to_toml()
    result = fw.compress(net, work, recipe, out=tmp_path, seconds=0.02)
    assert isinstance(result.plans[0].plan, MixedPlan)
    assert "low rank" in (tmp_path / "report.html").read_text()
    again = fw.compress(net, work, recipe, out=tmp_path, seconds=0.02)
    assert digest(again.network) == digest(result.network)


def test_a_target_is_handed_on_to_the_step_inside() -> None:
    from featherweight.recipe.recipe import aimed

    assert aimed(Mixed(bytes=0.5), "openvino") == Mixed(Quantize(ends=None, target="openvino"), bytes=0.5)
    assert aimed(fw.balance.Ladder(Quantize(target="openvino")), "x") == fw.balance.Ladder(Quantize(target="openvino"))


def test_training_after_a_ladder_is_refused_as_after_what_it_is_around() -> None:
    with pytest.raises(RecipeError, match="leaves integers, not to be trained"):
        fw.Recipe([fw.balance.Ladder(), fw.recover.Train(epochs=1)])


# ---- a family of one's own

@dataclass(frozen=True)
class SignsPlan(Plan):
    """Weights that become the mean of their magnitudes, with their signs."""

    kind: ClassVar[str] = "test.signs/1"
    weights: tuple[str, ...]

    def apply(self, network: fw.Network) -> fw.Network:
        other = network.copy()
        for name in self.weights:
            other.set_tensor(name, signs(other.tensor(name).detach()))
        return other

    def summary(self) -> str:
        return f"signs: {len(self.weights)} layers"


def signs(weight: Tensor) -> Tensor:
    return weight.sign() * weight.abs().mean()


@dataclass(frozen=True)
class Signs(Family):
    name: ClassVar[str] = "test.signs"
    stage: ClassVar[Stage] = Stage.PRECISION
    options: tuple[str, ...] = ("sign",)

    def candidates(self, network: fw.Network, task: fw.Task, layer: str | None = None) -> tuple[Candidate, ...]:
        return tuple(Candidate(n, self.name, "sign", Form({n: signs}), partial(SignsPlan, (n,)))
                     for n, t in network.tensors().items() if t.dim() > 1 and layer in (None, n))


def test_a_family_in_a_test_file_is_known_to_sensitivity_and_mixed(net: fw.Network, work: fw.Task) -> None:
    register(Signs())
    try:
        found = fw.sensitivity(net, work, "test.signs")
        assert [d.layer for d in found] == ["body.0.weight", "body.3.weight", "body.6.weight", "wide.weight",
                                            "head.weight"]
        assert all(d.damage > 0 for d in found)
        plan = Mixed(WEIGHTS, archive=0.25, kinds=("float",), families=("test.signs",)).plan(net, work)
        assert isinstance(plan, MixedPlan)
        assert {p.kind for p in plan.plans()} == {"test.signs/1"}
        made = plan.apply(net)
        assert archive_bytes(made) <= 0.27 * archive_bytes(net)
        assert len(plan.plans()) < 5, "only as many layers as the budget asks for"
    finally:
        del FAMILIES["test.signs"]
