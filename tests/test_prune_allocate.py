"""Allocations, costs, sensitivity curves and the table of latencies."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import featherweight as fw
from featherweight.axes.cut import cut, kept_atoms
from featherweight.axes.groups import AxisGroup, AxisGroups, axis_groups
from featherweight.axes.zero import zero
from featherweight.errors import ExportError, FileError, RecipeError, TaskError
from featherweight.judge.layer_times import One, TimedLayer, time_all
from featherweight.judge.widths import LatencyTable, timed_chains
from featherweight.measure.macs import macs
from featherweight.prune.channels.allocate import ALLOCATIONS, Allocation, Case, Keep, quantiles, slopes
from featherweight.prune.channels.costs import COSTS, everything, saved_each
from featherweight.prune.channels.scores.table import SCORES
from featherweight.prune.channels.sensitivity import Curve, sensitivity, silenced
from problems import PROBLEMS, Problem, ShortcutA, conv, first_tensor, images, network, task, unsettle

torch.set_num_threads(1)
every_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=str)


@pytest.fixture(scope="module")
def residual() -> fw.Network:
    """Two stages; the second's stream is the first's channels and as many new ones."""
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 32), ShortcutA(32, 32, 1), ShortcutA(32, 64, 2), ShortcutA(64, 64, 1),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5))
    unsettle(model)
    return fw.capture(model.eval(), images())


def kept(axes: AxisGroups, groups: Sequence[AxisGroup], keep: Keep) -> np.ndarray:
    return kept_atoms(axes, {g.name: k.tolist() for g, k in zip(groups, keep, strict=True)})


def case(net: fw.Network, work: fw.Task, axes: AxisGroups, score: str = "l2") -> Case:
    scores = SCORES[score](net, work, axes.groups, 0)
    return Case(net, work, axes, axes.groups, scores, saved_each(axes, axes.groups, COSTS["macs"](net, axes)))


# ---- costs
@every_problem
def test_costs_are_those_of_the_network_that_was_cut(problem: Problem) -> None:
    net = network(problem)
    axes = axis_groups(net)
    keep = [np.arange(len(g) - len(g) // 3) for g in axes.groups]
    small = cut(net, axes, kept(axes, axes.groups, keep))
    measured: dict[str, Callable[[fw.Network], float]] = {
        "macs": lambda n: macs(n).total,
        "params": lambda n: sum(p.numel() for p in n.parameters()),
        "bytes": lambda n: stored(n, set(net.tensors())),
    }
    for name, slow in measured.items():
        cost = COSTS[name](net, axes)
        assert cost(everything(axes)) == pytest.approx(slow(net)), name
        assert cost(kept(axes, axes.groups, keep)) == pytest.approx(slow(small)), name


def stored(net: fw.Network, names: set[str]) -> int:
    """Bytes of the tensors of these names; an index that a cut had to add is not the channels' affair."""
    tensors = {id(t): t for n, t in net.tensors().items() if n in names}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def test_what_a_channel_saves(residual: fw.Network) -> None:
    axes = axis_groups(residual)
    groups = [axes["1.conv1"], axes["3.conv1"]]
    saved = saved_each(axes, groups, COSTS["params"](residual, axes))
    assert saved == [2 * 32 * 9 + 2, 2 * 64 * 9 + 2]


# ---- allocations
@pytest.mark.parametrize("name", ALLOCATIONS)
@pytest.mark.parametrize("target", ["macs", "params", "bytes"])
def test_targets_are_met(residual: fw.Network, name: str, target: str) -> None:
    axes = axis_groups(residual)
    cost = COSTS[target](residual, axes)
    priorities = ALLOCATIONS[name](case(residual, task(PROBLEMS["conv_bn"]), axes))
    allocation = Allocation(axes.groups, priorities, 1, 1, axes)
    keep = allocation.to_target(lambda k: cost(kept(axes, axes.groups, k)), 0.5 * cost(everything(axes)))
    assert cost(kept(axes, axes.groups, keep)) / cost(everything(axes)) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_inside_a_group_the_lowest_scores_go_first(residual: fw.Network, name: str) -> None:
    axes = axis_groups(residual)
    given = case(residual, task(PROBLEMS["conv_bn"]), axes)
    for scores, priorities in zip(given.scores, ALLOCATIONS[name](given), strict=True):
        assert (np.diff(priorities[np.argsort(scores, kind="stable")]) >= 0).all()


def test_erk_keeps_shares_in_proportion_to_its_densities(residual: fw.Network) -> None:
    axes = axis_groups(residual)
    given = case(residual, fw.Task(), axes)
    keep = Allocation(axes.groups, ALLOCATIONS["erk"](given), 1, 1).keep(120)
    shares = {g.name: len(k) / len(g) for g, k in zip(axes.groups, keep, strict=True)}
    wanted = [np.sqrt((i + o + 6) / (i * o * 9)) for i, o in ((32, 32), (64, 64))]
    assert shares["1.conv1"] / shares["3.conv1"] == pytest.approx(wanted[0] / wanted[1], rel=0.1)


def test_uniform_takes_the_same_share(residual: fw.Network) -> None:
    axes = axis_groups(residual)
    given = case(residual, fw.Task(), axes)
    keep = Allocation(axes.groups, ALLOCATIONS["uniform"](given), 1, 1).keep(sum(len(g) for g in axes.groups) // 2)
    assert [len(k) for k in keep] == [len(g) // 2 for g in axes.groups]


def test_sensitivity_spares_the_groups_that_matter() -> None:
    """Of two hidden layers side by side one is hardly heard: it goes first, though its own weights are larger."""

    class Sides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quiet, self.loud, self.out = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(32, 5)
            with torch.no_grad():
                self.quiet.weight.mul_(10)
                self.out.weight[:, :16] *= 1e-3

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.cat([self.quiet(x).relu(), self.loud(x).relu()], 1))

    torch.manual_seed(0)
    net = fw.capture(Sides().eval(), torch.randn(2, 12))
    axes = axis_groups(net)
    given = case(net, task(PROBLEMS["mlp"]), axes, "l1")
    for name, spared in (("sensitivity", True), ("global", False)):
        keep = Allocation(axes.groups, ALLOCATIONS[name](given), 1, 1).keep(14)
        left = {g.name: len(k) for g, k in zip(axes.groups, keep, strict=True)}
        assert (left["loud"] == 16) == spared, name
        assert spared == (left["quiet"] == 2)


@pytest.mark.parametrize("seed", range(5))
def test_slopes_are_those_of_the_greatest_convex_function_below(seed: int) -> None:
    """Against the hull found by trying all chords."""
    rng = np.random.default_rng(seed)
    shares, changes = (0.2, 0.4, 0.6, 0.8), np.cumsum(rng.random(4))
    x, y = np.array([0.0, *shares]), np.array([0.0, *changes])
    found = slopes(Curve("g", shares, tuple(changes), "output", 20), np.arange(20.0))

    def below(at: float) -> float:
        chords = [y[i] + (y[j] - y[i]) * (at - x[i]) / (x[j] - x[i]) for i in range(5) for j in range(i + 1, 5)
                  if x[i] <= at <= x[j]]
        return float(min(chords))

    wanted = [below(0.05 * (c + 1)) - below(0.05 * c) for c in range(16)]
    np.testing.assert_allclose(found[:16], wanted, rtol=1e-4)
    assert found[16:].min() > 1e6 * found[:16].max()


# ---- rounding
@pytest.mark.parametrize(("count", "size", "least", "step", "wanted"), [
    (13, 32, 1, 8, 16), (3, 32, 1, 8, 8), (31, 32, 1, 8, 32), (5, 6, 1, 8, 6), (0, 9, 1, 1, 1), (0, 64, 9, 8, 16)])
def test_rounding_of_one_group(count: int, size: int, least: int, step: int, wanted: int) -> None:
    net = fw.capture(nn.Sequential(nn.Linear(4, size), nn.ReLU(), nn.Linear(size, 3)).eval(), torch.randn(2, 4))
    axes = axis_groups(net)
    allocation = Allocation(axes.groups, [np.arange(float(size))], least, step, axes)
    assert allocation.rounded(np.array([count])).tolist() == [wanted]


@pytest.mark.parametrize("removed", [20, 70, 110, 160])
def test_widths_that_layers_read_and_make_are_multiples(residual: fw.Network, removed: int) -> None:
    axes = axis_groups(residual)
    given = case(residual, fw.Task(), axes)
    keep = Allocation(axes.groups, given.scores, 1, 16, axes).keep(removed)
    small = cut(residual, axes, kept(axes, axes.groups, keep))
    assert {s % 16 for n, p in small.named_parameters() if p.dim() == 4 and n != "0.0.weight"
            for s in p.shape[:2]} == {0}


def test_rounding_counts_what_else_sits_in_the_axis() -> None:
    """Three coordinates that are never cut are read beside the channels: 13 + 3 = 16."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.out = nn.Linear(3, 40), nn.Linear(43, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.cat([x, self.first(x).relu()], 1))

    net = fw.capture(Beside().eval(), torch.randn(2, 3))
    axes = axis_groups(net)
    steps = {("out.weight", 1): 16}
    allocation = Allocation(axes.groups, [np.arange(40.0)], 1, 1, axes, steps)
    assert [len(k) + 3 for k in allocation.keep(25)] == [16]
    assert [len(k) + 3 for k in allocation.keep(12)] == [32]


def test_a_stream_of_two_groups_is_rounded_as_a_whole() -> None:
    """12 + 20 channels read side by side, made by calls whose own width no kernel minds: only the sum is a multiple."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, 12), nn.Linear(4, 20), nn.Linear(32, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.cat([self.a(x).relu(), self.b(x).relu()], 1))

    net = fw.capture(Pair().eval(), torch.randn(2, 4))
    axes = axis_groups(net)
    scores = [np.arange(float(len(g))) for g in axes.groups]
    keep = Allocation(axes.groups, scores, 1, 1, axes, {("out.weight", 1): 8}).keep(13)
    assert sum(len(k) for k in keep) in (16, 24)
    assert [len(k) for k in Allocation(axes.groups, scores, 1, 1, axes).keep(13)] != [len(k) for k in keep]


# ---- sensitivity
@pytest.mark.parametrize("name", ["conv_bn", "mlp", "residual", "depthwise", "grouped", "concat"])
def test_silenced_channels_are_what_a_cut_leaves(name: str) -> None:
    problem = PROBLEMS[name]
    net = network(problem)
    axes = axis_groups(net)
    args, kwargs = net.example_inputs(4)
    for group in axes.groups:
        gone = np.arange(0, len(group), 2)
        keep = np.setdiff1d(np.arange(len(group)), gone)
        with torch.no_grad(), silenced(net, group, gone):
            found = first_tensor(net(*args, **kwargs))
        with torch.no_grad():
            wanted = first_tensor(zero(net, axes, kept(axes, [group], [keep]))(*args, **kwargs))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_curves_begin_with_nothing_and_leave_the_network_alone(residual: fw.Network) -> None:
    axes, work = axis_groups(residual), task(PROBLEMS["conv_bn"])
    scores = SCORES["l2"](residual, work, axes.groups, 0)
    state = {k: v.clone() for k, v in residual.state_dict().items()}
    for kind in ("output", "loss"):
        curves = sensitivity(residual, work, axes, axes.groups, scores, shares=(0.0, 0.5, 1.0), kind=kind)
        assert [c.group for c in curves] == [g.name for g in axes.groups]
        assert all(c.changes[0] == 0 and c.kind == kind and c.channels == len(axes[c.group]) for c in curves)
        assert kind == "loss" or all(c.changes[1] > 0 and c.changes[2] > 0 for c in curves)
    assert all(torch.equal(v, residual.state_dict()[k]) for k, v in state.items())


def test_curves_ask_for_what_they_need(residual: fw.Network) -> None:
    axes = axis_groups(residual)
    with pytest.raises(TaskError, match="calibration"):
        sensitivity(residual, fw.Task(), axes, (), ())
    with pytest.raises(TaskError, match="loss"):
        sensitivity(residual, fw.Task(calibration=list), axes, (), (), kind="loss")
    with pytest.raises(RecipeError, match="did you mean 'output'"):
        sensitivity(residual, fw.Task(), axes, (), (), kind="outputs")


# ---- latency
def sixteens(layers: Sequence[TimedLayer], target: str, threads: int) -> list[float]:
    """A runtime that pads widths to multiples of 16."""
    return [1e-6 + 1e-9 * np.prod([-(-s // 16) for s in layer.weight[:2]]) for layer in layers]


def table(net: fw.Network, path: Path, timer: Callable[..., list[float]] = sixteens) -> LatencyTable:
    return LatencyTable.measure(net, axis_groups(net), path=path, timer=timer)


def test_table_gives_what_was_measured_and_lies_between_it(residual: fw.Network, tmp_path: Path) -> None:
    found = table(residual, tmp_path / "latency.json")
    axes = found.axes
    nodes = [n for n in residual.calls() if "conv2d" in str(n.target) or "linear" in str(n.target)]
    assert [t.node for t in found.timings] == [n.name for n in nodes]
    whole = sum(sixteens([TimedLayer("", tuple(p.shape), (), False)], "", 1)[0]
                for p in residual.parameters() if p.dim() > 1)
    assert found.cost(everything(axes)) == pytest.approx(whole)
    costs = [found.cost(kept(axes, axes.groups, [np.arange(len(g) * i // 8) for g in axes.groups]))
             for i in range(1, 9)]
    assert costs == sorted(costs)
    assert 0 < costs[0] < costs[-1]


def test_widths_that_are_faster_are_found_and_chosen(residual: fw.Network, tmp_path: Path) -> None:
    found = table(residual, tmp_path / "latency.json")
    assert {v for (name, _), v in found.steps().items() if name != "6.weight"} == {16}
    axes = found.axes
    allocation = Allocation(axes.groups, case(residual, fw.Task(), axes).scores, 1, 1, axes, found.steps())
    keep = allocation.to_target(lambda k: found.cost(kept(axes, axes.groups, k)), 0.5 * found.cost(everything(axes)))
    assert all(len(k) % 16 == 0 for k in keep)

    def smooth(layers: Sequence[TimedLayer], target: str, threads: int) -> list[float]:
        return [1e-9 * float(np.prod(layer.weight[:2])) for layer in layers]

    assert set(table(residual, tmp_path / "smooth.json", smooth).steps().values()) == {1}


def test_nothing_is_measured_twice(residual: fw.Network, tmp_path: Path) -> None:
    asked: list[TimedLayer] = []

    def counting(layers: Sequence[TimedLayer], target: str, threads: int) -> list[float]:
        asked.extend(layers)
        return sixteens(layers, target, threads)

    path = tmp_path / "latency.json"
    first = table(residual, path, counting)
    assert len(asked) == len(set(asked)) == len(json.loads(path.read_text()))
    again = table(residual, path, counting)
    assert len(asked) == len(json.loads(path.read_text()))
    assert all((a.seconds == b.seconds).all() and a.step == b.step
               for a, b in zip(first.timings, again.timings, strict=True))
    LatencyTable.measure(residual, axis_groups(residual), threads=2, path=path, timer=counting)
    assert len(json.loads(path.read_text())) == len(asked) > len(set(asked))


def test_a_killed_table_keeps_every_layer_that_it_timed(residual: fw.Network, tmp_path: Path) -> None:
    """Kills at every second call of the timer never lose what the calls before them gave."""
    path, asked = tmp_path / "latency.json", list[TimedLayer]()

    class Killed(BaseException):
        """Stands for SIGKILL."""

    def killed(layers: Sequence[TimedLayer], target: str, threads: int) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Killed
        asked.extend(layers)
        return sixteens(layers, target, threads)

    kills, found = 0, None
    while found is None:
        calls = 0
        try:
            found = table(residual, path, killed)
        except Killed:
            kills += 1
            assert len(json.loads(path.read_text())) == len(asked)
    assert kills > 2
    assert len(asked) == len(set(asked)), "nothing was timed twice"
    whole = table(residual, tmp_path / "whole.json")
    assert [t.seconds.tolist() for t in found.timings] == [t.seconds.tolist() for t in whole.timings]
    assert found.steps() == whole.steps()


def test_damaged_table_and_unknown_target_are_refused(residual: fw.Network, tmp_path: Path) -> None:
    (tmp_path / "latency.json").write_text("[1, 2")
    with pytest.raises(FileError, match="remove it to have them measured again"):
        table(residual, tmp_path / "latency.json")
    with pytest.raises(ExportError, match="did you mean 'onnxruntime'"):
        LatencyTable.measure(residual, axis_groups(residual), "onnxruntim", path=tmp_path / "new.json", timer=sixteens)


@every_problem
def test_every_network_has_a_table(problem: Problem, tmp_path: Path) -> None:
    """Also layers that are grouped, transposed or read three axes: each resized layer can be built and run."""
    built: set[TimedLayer] = set()

    def running(layers: Sequence[TimedLayer], target: str, threads: int) -> list[float]:
        for layer in set(layers) - built:
            with torch.no_grad():
                assert One(layer)(torch.zeros(layer.input(1))).numel()
        built.update(layers)
        return sixteens(layers, target, threads)

    net = network(problem)
    found = table(net, tmp_path / "latency.json", running)
    groups = found.axes.groups
    half = kept(found.axes, groups, [np.arange(len(g) - len(g) // 2) for g in groups])
    assert found.cost(half) <= found.cost(everything(found.axes))


def test_layers_run_in_a_runtime() -> None:
    layers = [TimedLayer("aten.linear.default", (3, 4), (1,), True),
              TimedLayer("aten.conv2d.default", (4, 1, 3, 3), (5, 5), False,
                    (("stride", (1, 1)), ("padding", (1, 1)), ("dilation", (1, 1)), ("groups", 4)))]
    chain = replace(layers[1], then=(replace(layers[1], weight=(2, 4, 1, 1), options=(("stride", (2, 2)),)),))
    assert all(s > 0 for s in time_all([*layers, chain], "onnxruntime", 1))
    assert chain.key() != layers[1].key()


class Forked(nn.Module):
    """Two convolutions and no more between them than a value; a third that reads an activation; a value read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(i, o, 1) for i, o in ((3, 4), (4, 5), (5, 6), (6, 6)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.c(torch.relu(self.b(self.a(x))))
        return self.d(y) + y


def test_calls_that_only_read_one_another_are_timed_as_one() -> None:
    net = fw.capture(Forked().eval(), images())
    found = [[layer.weight[:2] for layer in (chain, *chain.then)] for chain in timed_chains(net)]
    assert found == [[(4, 3), (5, 4)], [(6, 5)], [(6, 6)]]


def test_quantiles_are_ranks() -> None:
    assert quantiles(np.array([3.0, 1.0, 2.0, 9.0])).tolist() == [0.625, 0.125, 0.375, 0.875]


def test_errors_count_by_the_cost_that_they_save(residual: fw.Network) -> None:
    axes = axis_groups(residual)
    given = case(residual, fw.Task(), axes)
    for scores, saved, found in zip(given.scores, given.saved, ALLOCATIONS["global"](replace(given, per_cost=True)),
                                    strict=True):
        np.testing.assert_allclose(found, scores / saved)


def test_a_real_table_is_measured(tmp_path: Path) -> None:
    """One small network through the runtime, end to end."""
    net = fw.capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(2, 4))
    axes = axis_groups(net)
    found = LatencyTable.measure(net, axes, path=tmp_path / "latency.json", shares=(1.0,))
    assert 0 < found.cost(everything(axes)) < 1
    assert all(t.seconds.min() > 0 for t in found.timings)
