"""Scores of channels: each against its formula written out slowly, and against networks whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
from featherweight.axes.groups import axis_groups
from featherweight.errors import TaskError
from featherweight.prune.channels.scores import reconstruction as scores_fit
from featherweight.prune.channels.scores.table import COMPARABLE, SCORES, normalised
from featherweight.prune.channels.sensitivity import sensitivity
from problems import PROBLEMS, Problem, images, network, task, unsettle

torch.set_num_threads(1)
READ_DATA = ("taylor", "fisher", "activation", "reconstruction")
MLP, CONV = PROBLEMS["mlp"], PROBLEMS["conv_bn"]


def scored(name: str, net: fw.Network, work: fw.Task, group: str, seed: int = 0) -> Tensor:
    return torch.from_numpy(SCORES[name](net, work, [axis_groups(net)[group]], seed)[0])


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=str)
def test_every_score_gives_a_finite_number_for_every_channel(problem: Problem) -> None:
    net = network(problem)
    groups = axis_groups(net).groups
    state = {k: v.clone() for k, v in net.state_dict().items()}
    for name, score in SCORES.items():
        found = score(net, task(problem), groups, 0)
        assert [s.shape for s in found] == [(len(g),) for g in groups], name
        assert all(np.isfinite(s).all() and (s >= 0).all() and s.any() for s in found), name
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in state.items())
    assert not any(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("name", READ_DATA)
def test_scores_of_data_ask_for_it_and_take_no_groups(name: str) -> None:
    net = network(MLP)
    with pytest.raises(TaskError, match="calibration"):
        SCORES[name](net, fw.Task(), axis_groups(net).groups, 0)
    assert SCORES[name](net, task(MLP), [], 0) == []


@pytest.mark.parametrize("name", [n for n in SCORES if n not in ("random", "fpgm")])
def test_dead_channels_have_the_lowest_score(name: str) -> None:
    """Channels that are nothing and are not read."""
    net = network(CONV)
    dead = [1, 5, 6]
    for tensor in ("0.0.weight", "0.1.weight", "0.1.bias"):
        net.set_tensor(tensor, net.tensor(tensor).detach().index_fill(0, torch.tensor(dead), 0))
    net.set_tensor("1.0.weight", net.tensor("1.0.weight").detach().index_fill(1, torch.tensor(dead), 0))
    found = scored(name, net, task(CONV), "0.0")
    assert set(found.argsort()[:3].tolist()) == set(dead)
    assert found[dead].max() < 1e-6 * found.max()


def test_fpgm_sums_distances_to_all_other_channels() -> None:
    net = network(CONV)
    made, read = (net.tensor(n).detach().double() for n in ("0.0.weight", "1.0.weight"))
    slow = [sum(float((made[i] - made[j]).norm() + (read[:, i] - read[:, j]).norm()) for j in range(16))
            for i in range(16)]
    torch.testing.assert_close(scored("fpgm", net, fw.Task(), "0.0"), torch.tensor(slow, dtype=torch.float64))


def test_bn_is_the_scale_of_the_norm_or_the_gain_where_there_is_none() -> None:
    net = network(CONV)
    torch.testing.assert_close(scored("bn", net, fw.Task(), "0.0"), net.tensor("0.1.weight").detach().abs().double())
    net = network(MLP)
    gain = net.tensor("0.weight").detach().double().norm(dim=1)
    torch.testing.assert_close(scored("bn", net, fw.Task(), "0"), gain)


def test_fisher_is_the_squared_first_order_change_of_projected_outputs() -> None:
    """Sample by sample, against a difference quotient along the line that takes the reading weights to zero."""
    net, work = network(MLP), task(MLP)
    found = scored("fisher", net, work, "2", seed=3)
    double = net.copy().double()
    weight, h = double.tensor("4.weight").detach().clone(), 1e-6
    generator = torch.Generator().manual_seed(3)
    slow, batches = torch.zeros(24, dtype=torch.float64), 0
    for inputs, _ in work.batches("calibration"):
        with torch.no_grad():
            ways = torch.randn(net(inputs).shape, generator=generator).double()
            for c in range(24):
                line = torch.zeros_like(weight)
                line[:, c] = weight[:, c]
                outputs = []
                for sign in (1, -1):
                    double.set_tensor("4.weight", weight + sign * h * line)
                    outputs.append((double(inputs.double()) * ways).sum(1))
                slow[c] += ((outputs[0] - outputs[1]) / (2 * h)).square().mean()
        batches += 1
    torch.testing.assert_close(found, slow / batches, rtol=1e-3, atol=1e-9)


def test_activation_is_wanda_summed_over_the_readers() -> None:
    net, work = network(MLP), task(MLP)
    with torch.no_grad():
        inner = torch.cat([torch.relu(x @ net.tensor("0.weight").T + net.tensor("0.bias"))
                           for x, _ in work.batches("calibration")]).double()
    slow = net.tensor("2.weight").detach().double().abs().sum(0) * inner.norm(dim=0)
    torch.testing.assert_close(scored("activation", net, work, "0"), slow, rtol=1e-5, atol=1e-8)


def test_reconstruction_is_the_greedy_least_squares_error() -> None:
    """Channels taken out one by one, the best fit of the reader's outputs solved anew each time, mean included."""
    net, work = network(MLP), many_rows()
    found = scored("reconstruction", net, work, "0")
    with torch.no_grad():
        x = torch.cat([torch.relu(b @ net.tensor("0.weight").T + net.tensor("0.bias"))
                       for b, _ in work.batches("calibration")]).double()
    x = x - x.mean(0)
    y = x @ net.tensor("2.weight").detach().double().T
    left, before, slow = list(range(x.shape[1])), 0.0, torch.zeros(x.shape[1], dtype=torch.float64)
    highest = 0.0
    while left:
        errors = [fit_error(x[:, [i for i in left if i != c]], y) for c in left]
        best = int(np.argmin(errors))
        highest = max(highest, errors[best] - before)
        before = errors[best]
        slow[left.pop(best)] = highest / float(y.square().sum())
    torch.testing.assert_close(found, slow, rtol=0.02, atol=1e-3)


def test_wide_calls_are_taken_in_rounds_or_as_uncorrelated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both come close to the order of the exact selection."""
    net, work = network(MLP), many_rows()
    exact = scored("reconstruction", net, work, "0").argsort().argsort().double()
    monkeypatch.setattr(scores_fit, "STEPWISE", 0)
    rounds = scored("reconstruction", net, work, "0").argsort().argsort().double()
    monkeypatch.setattr(scores_fit, "FITTED", 0)
    apart = scored("reconstruction", net, work, "0").argsort().argsort().double()
    for other, least in ((rounds, 0.9), (apart, 0.5)):
        assert float(torch.corrcoef(torch.stack([exact, other]))[0, 1]) > least


def fit_error(x: Tensor, y: Tensor) -> float:
    if not x.shape[1]:
        return float(y.square().sum())
    return float((y - x @ torch.linalg.lstsq(x, y).solution).square().sum())


def many_rows() -> fw.Task:
    generator = torch.Generator().manual_seed(5)
    data = [(torch.randn(64, 12, generator=generator), None) for _ in range(12)]
    return fw.Task(calibration=lambda: data)


def test_reconstruction_knows_a_channel_that_others_can_stand_in_for() -> None:
    """A loud channel that is the sum of two others: its neighbours take over all that it did. L1 does not see it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(6 * 36, 5))
    with torch.no_grad():
        model[0].weight[4] = 3 * (model[0].weight[0] + model[0].weight[1])
        model[0].bias[4] = 1.0
    net = fw.capture(model.eval(), images())
    found = {n: scored(n, net, task(CONV), "0") for n in ("l1", "reconstruction")}
    assert int(found["l1"].argmax()) == 4
    # three inputs span eight linear channels: five cost nothing, which the channels' norms cannot tell
    assert int((found["reconstruction"] < 1e-2 * found["reconstruction"].max()).sum()) == 5


def test_readers_that_are_grouped_are_fitted_group_by_group() -> None:
    """In each group of the grouped convolution the same positions go together: copies in all groups cost nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 3, groups=2),
                          nn.Flatten(), nn.Linear(8 * 16, 5))
    unsettle(model)
    with torch.no_grad():
        for g in range(2):  # position 1 of each group is half of position 0
            model[0].weight[16 * g + 1], model[0].bias[16 * g + 1] = model[0].weight[16 * g], model[0].bias[16 * g]
            for t in (model[1].running_mean, model[1].running_var):
                t[16 * g + 1] = t[16 * g]
            for t in (model[1].weight, model[1].bias):
                t[16 * g + 1] = t[16 * g] / 2
    net = fw.capture(model.eval(), images())
    found = scored("reconstruction", net, task(CONV), "0")
    assert len(found) == 16
    assert min(found[0], found[1]) < 1e-2 * found.median()


def test_normalised_groups_have_mean_one_and_dead_ones_stay() -> None:
    found = normalised([np.array([1.0, 3.0]), np.zeros(3)])
    assert found[0].tolist() == [0.5, 1.5]
    assert found[1].tolist() == [0, 0, 0]
    assert set(SCORES) >= COMPARABLE


def test_better_scores_lose_less_than_chance() -> None:
    """The claim of the scores of data: the half of the channels that they keep says more of the outputs."""
    net, work = network(CONV), task(CONV)
    axes = axis_groups(net)
    def change(name: str, seed: int) -> float:
        scores = SCORES[name](net, work, axes.groups, seed)
        return sum(c.changes[0] for c in sensitivity(net, work, axes, axes.groups, scores, shares=(0.5,)))

    chance = np.mean([change("random", s) for s in range(8)])
    for name in READ_DATA[:3]:
        assert change(name, 0) < 0.8 * chance, name


def test_seeds_change_only_what_is_drawn() -> None:
    net, work = network(MLP), task(MLP)
    for name in SCORES:
        assert torch.equal(scored(name, net, work, "0", 0), scored(name, net, work, "0", 0)), name
    assert not torch.equal(scored("random", net, work, "0", 0), scored("random", net, work, "0", 1))
