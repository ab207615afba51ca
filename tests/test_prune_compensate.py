"""Compensation after a cut: refits held against explicit least squares, exactness, and every small network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight as fw
import problems
from featherweight.axes.cut import cut, kept_atoms
from featherweight.axes.groups import AxisGroups
from featherweight.axes.zero import zero
from featherweight.calibrate import walk
from featherweight.calibrate.pair import Pair
from featherweight.errors import RecipeError, TaskError
from featherweight.network import Network
from featherweight.network.edit import WEIGHTED, weight_name
from featherweight.network.matrices import count_rows, rows, rows_at
from featherweight.numerics.least_squares import Moments, backward_selection, reconstruction_errors, refit
from featherweight.prune import axis_groups
from featherweight.prune.channels import refit as compensate
from featherweight.prune.channels.refit import compensated, left_out
from featherweight.prune.channels.refit_calls import find_refit_calls


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- numerics
def test_moments_of_batches_are_those_of_all_rows() -> None:
    x, y = normal(3, 50, 4) + 100, normal(3, 50, 2, seed=1) - 7
    moments = Moments()
    for part in (slice(0, 10), slice(10, 37), slice(37, 50)):
        moments.add(x[:, part], y[:, part])
    xc, yc = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    for (gram, cross), (a, b) in ((moments.products(), (xc, yc)), (moments.products(centred=False), (x, y))):
        torch.testing.assert_close(gram, a.mT @ a / 50)
        torch.testing.assert_close(cross, a.mT @ b / 50)
    torch.testing.assert_close(moments.means()[0], x.mean(1))


def test_moments_in_single_precision_bear_a_large_mean() -> None:
    x = (normal(400, 3) + 1000).float()
    moments = Moments()
    for part in x.split(100):
        moments.add(part, part)
    torch.testing.assert_close(moments.products()[0], torch.cov(x.double().T, correction=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ridge", [1e-4, 0.3])
def test_refit_is_the_explicit_least_squares(ridge: float) -> None:
    x, y, w = normal(2, 60, 5), normal(2, 60, 3, seed=1), normal(2, 3, 5, seed=2)
    gram, cross = x.mT @ x, x.mT @ y
    pull = (ridge * gram.diagonal(dim1=1, dim2=2).mean(1)).sqrt()[:, None, None] * torch.eye(5, dtype=torch.float64)
    rows, made = torch.cat([x, pull], 1), torch.cat([y, pull @ w.mT], 1)
    torch.testing.assert_close(refit(gram, cross, w, ridge), torch.linalg.lstsq(rows, made).solution.mT)


def test_refit_keeps_weights_of_which_the_rows_say_nothing() -> None:
    x = normal(60, 4)
    x[:, 2] = 0
    w = normal(3, 4, seed=2)
    new = refit(x.T @ x, x.T @ normal(60, 3, seed=1), w, 1e-4)
    torch.testing.assert_close(new[:, 2], w[:, 2])
    torch.testing.assert_close(refit(torch.zeros(4, 4).double(), torch.zeros(4, 3).double(), w, 1e-4), w)


def residue(x: Tensor, y: Tensor, columns: list[int]) -> float:
    if not columns:
        return float(y.square().sum())
    return float((y - x[:, columns] @ torch.linalg.lstsq(x[:, columns], y).solution).square().sum())


@pytest.mark.parametrize("size", [1, 3])
def test_reconstruction_errors_are_those_of_removing_each_channel_and_fitting_again(size: int) -> None:
    x, y = normal(80, 4 * size) @ normal(4 * size, 4 * size, seed=5), normal(80, 3, seed=1)
    found = reconstruction_errors(x.T @ x, x.T @ y, size, ridge=0)
    every = list(range(4 * size))
    wanted = [residue(x, y, [i for i in every if i // size != c]) - residue(x, y, every) for c in range(4)]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2])
def test_backward_selection_takes_the_cheapest_channel_each_time(size: int) -> None:
    x, y = normal(80, 5 * size) @ normal(5 * size, 5 * size, seed=5), normal(80, 3, seed=1)
    order, costs = backward_selection(x.T @ x, x.T @ y, size, ridge=0)
    left = list(range(5))

    def loss(channels: list[int]) -> float:
        return residue(x, y, [c * size + i for c in channels for i in range(size)])

    for channel, cost in zip(order.tolist(), costs.tolist(), strict=True):
        rises = {c: loss([o for o in left if o != c]) - loss(left) for c in left}
        assert channel == min(rises, key=rises.__getitem__)
        assert cost == pytest.approx(rises[channel], rel=1e-6, abs=1e-6)
        left.remove(channel)


def test_a_channel_that_others_make_up_for_costs_nothing() -> None:
    x = normal(80, 4)
    x[:, 3] = x[:, 0] - 2 * x[:, 1]
    costs = reconstruction_errors(x.T @ x, x.T @ x @ normal(4, 3, seed=1), 1)
    assert costs[2] > 1
    assert costs[[0, 1, 3]].max() < 1e-3


# ---- what a call reads
CALLS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear on tokens": (lambda: nn.Linear(6, 4), (3, 5, 6)),
    "conv": (lambda: nn.Conv2d(6, 4, 3, padding=1), (3, 6, 5, 7)),
    "strided, dilated": (lambda: nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(1, 2)), (3, 6, 8, 7)),
    "same": (lambda: nn.Conv2d(6, 4, (4, 3), padding="same"), (3, 6, 5, 7)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (3, 6, 5, 7)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1), (3, 6, 5, 7)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, stride=2, padding=1), (3, 6, 9)),
    "conv3d": (lambda: nn.Conv3d(6, 4, 2, padding=1), (3, 6, 3, 4, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1), (3, 6, 4, 5)),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(6, 4, 3, stride=(1, 2), groups=2, dilation=2), (3, 6, 4, 5)),
}


@pytest.mark.parametrize("name", CALLS)
def test_rows_times_weights_are_what_the_call_gives(name: str) -> None:
    build, shape = CALLS[name]
    layer: Any = build()
    layer.bias.data.zero_()
    convs: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}

    def mix(i: int, o: int) -> nn.Module:
        return nn.Linear(i, o) if isinstance(layer, nn.Linear) else convs[len(shape)](i, o, 1)

    model = nn.Sequential(mix(6, 6), nn.ReLU(), layer, nn.ReLU(), mix(len(layer.bias), 2)).double().eval()
    network = fw.capture(model, normal(*shape))
    axes = axis_groups(network)
    kept = kept_atoms(axes, {axes.groups[0].name: range(1, len(axes.groups[0]))})
    site = find_refit_calls(network, axes, kept)[0][0]
    assert site.weight == "2.weight"
    x = normal(*shape, seed=3)
    axis = -1 if "linear" in name else 1
    lost = [i for i in range(6) if not kept[axes.tensors["0.weight"][0]][i]]
    x.index_fill_(axis, torch.tensor(lost), 0)
    y = layer(x).detach()
    places = torch.randperm(site.places(y))
    rows, made = site.read(x, places), site.made(y, places)
    again = rows @ site.kept(layer.weight.detach()).mT
    torch.testing.assert_close(again, made)
    assert made.shape[1] == y.numel() // y.shape[axis]
    assert len(site.groups) < 6 if name == "depthwise" else len(site.ins) * len(site.groups) < 6


@pytest.mark.parametrize("name", CALLS)
def test_rows_at_some_places_are_those_of_all_rows(name: str) -> None:
    build, shape = CALLS[name]
    network = fw.capture(build().eval(), normal(*shape).float())
    node, x = network.calls(*WEIGHTED)[0], normal(*shape, seed=3).float()
    weight = network.tensor(str(weight_name(node)))
    whole = rows(node, weight, x)
    assert count_rows(node, weight, x) == whole.shape[1]
    for chosen in (torch.randperm(whole.shape[1])[:7], torch.tensor([0, 0]), torch.arange(whole.shape[1])):
        torch.testing.assert_close(rows_at(node, weight, x, chosen), whole[:, chosen], rtol=0, atol=0)


def nearest(made: Tensor, y: Tensor, level: Tensor) -> Tensor:
    """The allowed output next to ``made``, number by number."""
    found = torch.empty_like(y)
    for i, (m, wanted, bound) in enumerate(zip(made, y, level, strict=True)):
        if bound.isnan():
            found[i] = wanted
        elif wanted > bound:
            found[i] = max(m, bound)
        else:
            found[i] = min(m, bound) if wanted < bound else m
    return found


def test_what_is_allowed_is_the_target_or_all_beyond_the_level() -> None:
    y, made = normal(200), normal(200, seed=1)
    level = torch.where(normal(200, seed=2) > 0.5, torch.nan, normal(200, seed=3))
    level[:9] = y[:9]
    low, high = compensate.allowed(y, level)
    assert torch.equal(made.clamp(low, high), nearest(made, y, level))
    assert compensate.allowed(y, None) == (y, y)


@pytest.mark.parametrize("constant", [True, False])
def test_fits_with_saturated_targets_are_those_of_the_plain_loop(constant: bool) -> None:
    """Every round: the allowed output next to the last fit's for target, and the explicit least squares."""
    weight, parts = normal(2, 3, 5), []
    for seed in range(3):
        x, y = normal(2, 40, 5, seed=10 + seed) + 1, normal(2, 40, 3, seed=20 + seed)
        parts.append(compensate.Observations(x, y, torch.where(y > 0, torch.nan, torch.zeros(()).double())))
    new, shift = compensate.least_squares(weight, parts, constant)
    x, y, level = (torch.cat([getattr(p, name) for p in parts], 1) for name in ("x", "y", "level"))
    middle = x.mean(1, keepdim=True) * constant
    target = y
    for _ in range(compensate.ROUNDS + 1):
        aim = target.mean(1, keepdim=True) * constant
        gram, cross = (x - middle).mT @ (x - middle) / 120, (x - middle).mT @ (target - aim) / 120
        fit = refit(gram, cross, weight, compensate.RIDGE)
        constants = (aim - middle @ fit.mT) * constant
        target = nearest((x @ fit.mT + constants).flatten(), y.flatten(), level.flatten()).view_as(y)
    torch.testing.assert_close(new, fit)
    torch.testing.assert_close(shift, constants[:, 0])


# ---- compensation
def task_of(*inputs: Any) -> fw.Task:
    return fw.Task(calibration=lambda: iter([(x, None) for x in inputs]))


def decided(network: Network, share: float = 0.5, **keep: list[int]) -> tuple[AxisGroups, np.ndarray]:
    """Half of every group's channels, or those that are listed."""
    axes = axis_groups(network)
    chosen = {g.name: list(range(len(g)))[: max(1, round(share * len(g)))] for g in axes.groups}
    if keep:
        chosen = {name.replace("_", "."): channels for name, channels in keep.items()}
    return axes, kept_atoms(axes, chosen)


def with_tensors(network: Network, tensors: dict[str, Tensor]) -> Network:
    other = network.copy()
    for name, value in tensors.items():
        assert value.shape == network.tensor(name).shape
        other.set_tensor(name, value)
    return other


def outputs(network: Network, x: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = network(x)
    return found


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain least squares: next to no pull towards the old weights, targets before the ReLU."""
    monkeypatch.setattr(compensate, "RIDGE", 1e-10)
    monkeypatch.setattr(compensate, "ROUNDS", 0)


@pytest.mark.usefixtures("bare")
def test_the_refit_of_a_reader_is_the_explicit_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = normal(200, 5)
    network = fw.capture(model.eval(), x)
    axes, kept = decided(network, **{"0": [0, 2, 3, 5, 6]})
    new = compensated(network, task_of(x[:120], x[120:]), axes, kept, "least_squares")
    assert set(new) == {"2.weight", "2.bias", "4.weight", "4.bias"}
    hidden = model[:2](x)[:, [0, 2, 3, 5, 6]]
    ones = torch.ones(200, 1, dtype=torch.float64)
    best = torch.linalg.lstsq(torch.cat([hidden, ones], 1), model[:3](x)).solution
    torch.testing.assert_close(new["2.weight"][:, [0, 2, 3, 5, 6]], best[:-1].T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(new["2.bias"], best[-1], rtol=1e-5, atol=1e-5)
    after = F.relu(hidden @ new["2.weight"][:, [0, 2, 3, 5, 6]].T + new["2.bias"])  # what the last layer reads now
    best = torch.linalg.lstsq(torch.cat([after, ones], 1), model(x)).solution
    torch.testing.assert_close(new["4.weight"], best[:-1].T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 0.7)])
def test_every_round_comes_closer_to_what_the_activation_leaves(act: nn.Module,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 8), act, nn.Linear(8, 3)).double()
    model[2].weight.data *= 4
    x = normal(400, 5)
    network = fw.capture(model.eval(), x)
    axes, kept = decided(network, **{"0": list(range(5))})
    monkeypatch.setattr(compensate, "RIDGE", 1e-8)
    errors = []
    for rounds in (0, 1, 2, 4, 16):
        monkeypatch.setattr(compensate, "ROUNDS", rounds)
        new = compensated(network, task_of(x), axes, kept, "least_squares")
        made = model[1](model[0](x))[:, :5] @ new["2.weight"][:, :5].T + new["2.bias"]
        wanted, low, high = model[:3](x), getattr(act, "min_val", 0.0), getattr(act, "max_val", torch.inf)
        missing = made - wanted
        missing[(wanted <= low) & (made <= low) | (wanted >= high) & (made >= high)] = 0
        beyond = (wanted <= low) & (made > low)
        missing[beyond] = (made - low)[beyond]
        beyond = (wanted >= high) & (made < high)
        missing[beyond] = (made - high)[beyond]
        errors.append(float(missing.detach().square().sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.95 * errors[0]


class Stack(nn.Module):
    def __init__(self, norm: bool = True, padding: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=padding)
        self.second = nn.Conv2d(8, 6, 3, padding=padding, bias=not norm)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.second(F.relu(self.first(x)))))
        return self.last(x.mean((2, 3)))


def stack(norm: bool = True, padding: int = 1) -> Stack:
    torch.manual_seed(0)
    model = Stack(norm, padding)
    problems.unsettle(model)
    return model.double().eval()


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("norm", [False, True])
def test_channels_that_kept_ones_make_up_for_are_cut_without_a_trace(norm: bool) -> None:
    model = stack(norm)
    with torch.no_grad():
        for copy, scale in ((4, 2.0), (5, 0.5), (6, 1.0)):  # multiples of others after a ReLU
            model.first.weight[copy] = scale * model.first.weight[copy - 4]
            model.first.bias[copy] = scale * model.first.bias[copy - 4]
    x = normal(40, 3, 6, 6)
    network = fw.capture(model, x)
    axes, kept = decided(network, first=[0, 1, 2, 3, 7])
    new = compensated(network, task_of(x), axes, kept, "least_squares")
    fresh = normal(7, 3, 6, 6, seed=9)
    wanted = outputs(network, fresh)
    torch.testing.assert_close(outputs(cut(with_tensors(network, new), axes, kept), fresh), wanted, rtol=0, atol=1e-5)
    assert (outputs(cut(network, axes, kept), fresh) - wanted).abs().max() > 0.02


@pytest.mark.parametrize("method", ["bias", "least_squares"])
@pytest.mark.parametrize("norm", [False, True])
def test_constant_channels_are_cut_without_a_trace(method: str, norm: bool) -> None:
    model = stack(norm, padding=0)
    with torch.no_grad():
        model.first.weight[3:] = 0
        model.first.bias[3:] = torch.arange(5) - 1.0
    x = normal(40, 3, 6, 6)
    network = fw.capture(model, x)
    axes, kept = decided(network, first=[0, 1, 2])
    new = compensated(network, task_of(x), axes, kept, method)
    assert ("norm.running_mean" in new) == norm
    fresh = normal(7, 3, 6, 6, seed=9)
    torch.testing.assert_close(outputs(cut(with_tensors(network, new), axes, kept), fresh), outputs(network, fresh),
                               rtol=0, atol=1e-6)


@pytest.mark.usefixtures("bare")
def test_the_last_branch_makes_up_for_the_error_of_the_whole_sum() -> None:
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 6)
            self.scale = nn.Parameter(torch.rand(6) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            shortcut = self.a(F.relu(self.into(x)))
            return self.scale * self.b(F.relu(shortcut)) + shortcut

    model, x = Block().double().eval(), normal(300, 5)
    network = fw.capture(model, x)
    axes, kept = decided(network, into=[0, 1, 2, 3])
    new = compensated(network, task_of(x), axes, kept, "least_squares")
    with torch.no_grad():
        shortcut = F.relu(model.into(x))[:, :4] @ new["a.weight"][:, :4].T + new["a.bias"]
        rows = torch.cat([F.relu(shortcut), torch.ones(300, 1, dtype=torch.float64)], 1)
        best = torch.linalg.lstsq(rows, (model(x) - shortcut) / model.scale).solution
    torch.testing.assert_close(new["b.weight"], best[:-1].T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(new["b.bias"], best[-1], rtol=1e-5, atol=1e-5)


def test_dead_norm_channels_do_not_blow_up_the_refit() -> None:
    network = problems.network(problems.PROBLEMS["residual"])
    for name in [n for n in network.tensors() if n.endswith("bn2.weight")]:
        gamma = network.tensor(name).detach().clone()
        gamma[:2] = torch.tensor([0.0, 1e-9])
        network.set_tensor(name, gamma)
    axes, kept = decided(network)
    new = compensated(network, task_of(problems.images(16)), axes, kept, "least_squares")
    assert all(t.isfinite().all() and t.abs().max() < 100 for t in new.values())


@pytest.mark.parametrize("method", compensate.METHODS)
@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_every_problem(name: str, method: str) -> None:
    """Shapes hold, the network stays as it was, cutting equals zeroing, and what is not refit is named."""
    problem = problems.PROBLEMS[name]
    network = problems.network(problem)
    before = {n: t.clone() for n, t in network.tensors().items()}
    axes, kept = decided(network)
    task = problems.task(problem)
    new = compensated(network, task, axes, kept, method, batches=2)
    again = compensated(network, task, axes, kept, method, batches=2)
    assert all(torch.equal(t, network.tensor(n)) for n, t in before.items())
    assert all(torch.equal(new[n], again[n]) and new[n].isfinite().all() for n in new)
    assert new or not kept.size or kept.all() or left_out(network, axes, kept)
    ready = with_tensors(network, new)
    inputs = next(iter(task.batches("calibration")))[0]
    for a, b in zip(*(flat(fw.task.call(form(ready, axes, kept), inputs)) for form in (cut, zero)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def flat(value: Any) -> list[Tensor]:
    return [t.detach() for t in problems.pytree.tree_leaves(value) if isinstance(t, Tensor)]


@pytest.mark.parametrize("name", ["mlp", "conv_bn", "residual", "depthwise", "grouped", "concat", "transposed"])
def test_least_squares_beats_the_constant_and_that_beats_nothing(name: str) -> None:
    """On fresh data, by the squared error of the output."""
    problem = problems.PROBLEMS[name]
    network = problems.network(problem)
    axes, kept = decided(network, 0.6)
    data = [problem.example(128, seed=s) for s in range(4)]
    fresh = problem.example(128, seed=77)
    wanted = outputs(network, fresh)
    errors = [float((outputs(cut(network, axes, kept), fresh) - wanted).square().mean())]
    for method in ("bias", "least_squares"):
        ready = with_tensors(network, compensated(network, task_of(*data), axes, kept, method))
        errors.append(float((outputs(cut(ready, axes, kept), fresh) - wanted).square().mean()))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.6 * errors[0]


def test_samples_wait_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    network = problems.network(problems.PROBLEMS["conv_bn"])
    axes, kept = decided(network)
    data = [problems.images(16, seed=s) for s in range(6)]
    calls, _ = find_refit_calls(network, axes, kept)

    def pair() -> Pair:
        return Pair.of(network, task_of(*data).batches("calibration"), zero(network, axes, kept))

    room = [walk.BUDGET / load for load in compensate.loads(pair(), calls)]
    assert room == sorted(room)
    full = compensated(network, task_of(*data), axes, kept, "least_squares")
    monkeypatch.setattr(walk, "BUDGET", walk.BUDGET * 40 / room[0])  # two batches at first
    tight = pair()
    with torch.no_grad():
        short = compensate.refitted(tight, calls, compensate.METHODS["least_squares"])
    assert 32 < tight.samples <= 96
    part = compensated(network, task_of(*data[:2]), axes, kept, "least_squares")
    first = next(iter(full))
    torch.testing.assert_close(short[first], part[first])
    assert not torch.equal(short[first], full[first])


def test_nothing_cut_is_nothing_to_do() -> None:
    network = problems.network(problems.PROBLEMS["conv_bn"])
    axes, kept = decided(network, 1.0)
    assert compensated(network, problems.task(problems.PROBLEMS["conv_bn"]), axes, kept, "least_squares") == {}


def test_what_is_not_refit_is_named() -> None:
    network = problems.network(problems.PROBLEMS["shared"])
    axes, kept = decided(network)
    assert any("read elsewhere" in s.reason for s in left_out(network, axes, kept))


def test_errors() -> None:
    network = problems.network(problems.PROBLEMS["mlp"])
    axes, kept = decided(network)
    with pytest.raises(RecipeError, match=r"no compensation 'least_square'.*did you mean"):
        compensated(network, task_of(), axes, kept, "least_square")
    with pytest.raises(TaskError, match="needs the task's calibration"):
        compensated(network, fw.Task(), axes, kept, "bias")
    with pytest.raises(RecipeError, match="gave no batches"):
        compensated(network, task_of(), axes, kept, "bias")
