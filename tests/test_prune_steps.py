"""``Channels``, ``Weights`` and ``Layers``: options, targets, plans and what they do to a network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight as fw
from featherweight.errors import PlanError, RecipeError, TaskError
from featherweight.measure.macs import macs
from featherweight.prune import ChannelPlan, Channels, Layers, Weights, axis_groups
from featherweight.prune.channels.scores.table import SCORES
from featherweight.steps import Rewrite
from featherweight.task import call
from problems import PROBLEMS, ShortcutA, conv, images, network, task, tensors_of, unsettle

torch.set_num_threads(1)
NOTHING = fw.Task()


def outputs(net: fw.Network, batch: int = 4) -> list[Tensor]:
    args, kwargs = net.example_inputs(batch)
    with torch.no_grad():
        return tensors_of(net(*args, **kwargs))


def assert_equal(a: fw.Network, b: fw.Network, tolerance: float = 0.0) -> None:
    for x, y in zip(outputs(a), outputs(b), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def wide() -> fw.Network:
    """A residual network of two stages with room for rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 32), ShortcutA(32, 32, 1), ShortcutA(32, 64, 2), ShortcutA(64, 64, 1),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5))
    unsettle(model)
    return fw.capture(model.eval(), images())


@pytest.fixture(scope="module")
def residual() -> fw.Network:
    return wide()


def images_task() -> fw.Task:
    return task(PROBLEMS["conv_bn"])


# ---- channels

@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("fraction", [0.8, 0.5, 0.25])
def test_macs_target_is_met(residual: fw.Network, allocation: str, fraction: float) -> None:
    plan = Channels(macs=fraction, allocation=allocation).plan(residual, NOTHING)
    assert macs(plan.apply(residual)).total / macs(residual).total == pytest.approx(fraction, abs=0.02)


def test_uniform_takes_the_same_share_of_every_group(residual: fw.Network) -> None:
    plan = Channels(ratio=0.5, allocation="uniform").plan(residual, NOTHING)
    axes = axis_groups(residual)
    assert {g.name: len(g) // 2 for g in axes.groups} == {n: len(k) for n, k in plan.keep.items()}


def test_everything_kept_is_no_change(residual: fw.Network) -> None:
    plan = Channels(macs=1.0).plan(residual, NOTHING)
    assert plan.keep == {}
    assert plan.macs_after == plan.macs_before == macs(residual).total
    assert_equal(plan.apply(residual), residual)


def test_widths_are_multiples(residual: fw.Network) -> None:
    plan = Channels(macs=0.5, round_to=8).plan(residual, NOTHING)
    assert all(len(k) % 8 == 0 for k in plan.keep.values())
    small = plan.apply(residual)
    assert all(n.shape[0] % 8 == 0 for k, n in small.named_parameters() if k.endswith("conv1.weight"))


def test_lowest_scores_go(residual: fw.Network) -> None:
    """Against the sum written out: the channels of one group by all weights that make, scale and read them."""
    plan = Channels(ratio=0.5, allocation="uniform", score="l1").plan(residual, NOTHING)
    t = residual.tensor
    size = t("1.conv1.weight").abs().sum((1, 2, 3)) + t("1.bn1.weight").abs() + t("1.conv2.weight").abs().sum((0, 2, 3))
    assert set(plan.keep["1.conv1"]) == set(size.topk(16).indices.tolist())


def test_dead_channels_go_first_and_cost_nothing(residual: fw.Network) -> None:
    """A network of which every second channel is zero: the norms find them, chance does not."""
    axes = axis_groups(residual)
    alive = {g.name: tuple(range(1, len(g), 2)) for g in axes.groups}
    shapes = {n: tuple(residual.tensor(n).shape) for n in ("0.0.weight",)}
    net = ChannelPlan(alive, shapes, 0, 0).zero(residual)
    for score in ("l1", "l2"):
        plan = Channels(ratio=0.5, allocation="uniform", score=score).plan(net, NOTHING)
        assert plan.keep == alive, score
        assert_equal(plan.apply(net), net, 1e-5)
    assert Channels(ratio=0.5, score="random", allocation="uniform").plan(net, NOTHING).keep != alive


@pytest.mark.parametrize(("name", "group", "reader", "width"), [("mlp", "2", "4.weight", 24),
                                                                 ("conv_bn", "1.0", "4.weight", 24)])
def test_taylor_is_the_squared_first_order_change_of_the_loss(name: str, group: str, reader: str, width: int) -> None:
    """Sample by sample, against the loss's own slope along the line that takes a channel's reading weights to zero."""
    problem = PROBLEMS[name]
    net, work = network(problem), task(problem)
    axes = axis_groups(net)
    found = SCORES["taylor"](net, work, [axes[group]], 0)[0]
    weight, slow, samples = net.tensor(reader).detach(), torch.zeros(width, dtype=torch.float64), 0
    each = weight.shape[1] // width
    for inputs, target in work.batches("calibration"):
        for x, y in zip(inputs.split(1), target.split(1), strict=True):
            for c in range(width):
                line = torch.zeros_like(weight)
                line[:, c * each:(c + 1) * each] = weight[:, c * each:(c + 1) * each]
                slow[c] += (slope(net, reader, line.double(), x, y) / len(inputs)) ** 2
            samples += 1
    torch.testing.assert_close(torch.from_numpy(found), slow / samples, rtol=1e-3, atol=1e-9)


def slope(net: fw.Network, name: str, step: Tensor, inputs: Tensor, target: Tensor, h: float = 1e-5) -> float:
    """d loss / d t of weight + t step at 0, by a central difference in double precision."""
    double = net.copy().double()
    losses = []
    weight = double.tensor(name).detach().clone()
    for sign in (1, -1):
        double.set_tensor(name, weight + sign * h * step)
        with torch.no_grad():
            losses.append(F.cross_entropy(double(inputs.double()), target).item())
    return (losses[0] - losses[1]) / (2 * h)


def test_random_depends_on_the_seed_only(residual: fw.Network) -> None:
    plans = [Channels(macs=0.5, score="random", seed=s).plan(residual, NOTHING) for s in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]


def test_ignored_and_residual_channels_stay(residual: fw.Network) -> None:
    plan = Channels(macs=0.7, ignore=("1.*", "nowhere.*"), residual=False).plan(residual, NOTHING)
    assert set(plan.keep) <= {"2.conv1", "3.conv1"}
    reasons = {s.path: s.reason for s in plan.skipped}
    assert "ignore='1.*'" in reasons["1.conv1"]
    assert "matched no channels" in reasons["nowhere.*"]
    assert "residual=False" in reasons["2.conv2"]
    assert "network's output" in reasons["6"]


def test_target_out_of_reach_is_said() -> None:
    net = network(PROBLEMS["shuffle"])
    plan = Channels(macs=0.05).plan(net, NOTHING)
    assert any("macs=0.05 cannot be reached" in s.reason for s in plan.skipped)
    assert macs(plan.apply(net)).total < macs(net).total


def test_network_without_channels_to_cut_gives_a_plan_that_does_nothing() -> None:
    net = fw.capture(nn.Linear(4, 3).eval(), torch.randn(2, 4))
    for step in (Channels(macs=0.5), Channels(ratio=0.5, score="taylor"), Layers(count=1)):
        plan = step.plan(net, task(PROBLEMS["mlp"]))
        assert_equal(plan.apply(net), net)
        assert plan.skipped


def test_plan_of_another_network_is_refused(residual: fw.Network) -> None:
    plan = Channels(macs=0.5).plan(residual, NOTHING)
    with pytest.raises(PlanError, match="make the plan on this very network"):
        plan.apply(plan.apply(residual))
    with pytest.raises(PlanError, match="which this network does not have"):
        plan.apply(network(PROBLEMS["mlp"]))
    with pytest.raises(PlanError, match=r"axis group '1.convl' .* did you mean '1.conv1'"):
        ChannelPlan({"1.convl": (0,)}, {}, 0, 0).apply(residual)
    with pytest.raises(PlanError, match="which has 32"):
        ChannelPlan({"1.conv1": (0, 32)}, {}, 0, 0).apply(residual)


@pytest.mark.parametrize(("step", "message"), [
    (Channels(), r"none of macs, params.* write Channels\(macs=0.5\)"),
    (Channels(macs=0.5, ratio=0.5), "given macs and ratio of macs"),
    (Channels(macs=0.0), "the fraction that remains"),
    (Channels(ratio=1.5), r"ratio=1.5; .* as in Channels\(ratio=0.5\)"),
    (Channels(macs=0.5, score="l3"), "did you mean 'l"),
    (Channels(macs=0.5, allocation="globl"), "did you mean 'global'"),
    (Channels(macs=0.5, round_to=0), "round_to=0; expected a whole number"),
])
def test_senseless_options_are_answered_with_the_line_to_write(step: Rewrite, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        step.plan(network(PROBLEMS["mlp"]), NOTHING)


def test_scores_that_read_data_ask_for_it(residual: fw.Network) -> None:
    with pytest.raises(TaskError, match="calibration"):
        Channels(macs=0.5, score="taylor").plan(residual, NOTHING)


# ---- together

def test_layers_then_channels_then_weights_and_training_between(residual: fw.Network) -> None:
    net = Layers(count=1, score="norm").plan(residual, NOTHING).apply(residual)
    net = Channels(macs=0.5).plan(net, NOTHING).apply(net)
    net = Weights(sparsity=0.5).plan(net, NOTHING).apply(net)
    again = Channels(macs=0.8).plan(net, NOTHING)
    small = again.apply(net)
    assert small.patterns == net.patterns
    assert_equal(small, again.zero(net), 1e-5)


def test_a_cut_in_parts_meets_the_target_and_scores_again() -> None:
    """With scores that change once others are gone, the parts choose otherwise than one cut; both meet the target."""
    net, data = network(PROBLEMS["residual"]), task(PROBLEMS["residual"])
    step = Channels(ratio=0.4, score="reconstruction", allocation="global")
    plans = [replace(step, iterations=n).plan(net, data) for n in (1, 4)]
    for plan in plans:
        left = sum(map(len, plan.keep.values()))
        assert left <= 0.5 * sum(len(g) for g in axis_groups(net).groups if g.name in plan.keep)
    assert plans[0].keep != plans[1].keep


def test_compensation_brings_the_outputs_closer_and_needs_no_data_to_apply() -> None:
    net, data = network(PROBLEMS["residual"]), task(PROBLEMS["residual"])
    inputs = [x for x, _ in data.batches("calibration")]

    def error(compensate: str) -> float:
        plan = Channels(macs=0.5, compensate=compensate).plan(net, data)
        assert (plan.tensors == {}) == (compensate == "none")
        cut = plan.apply(net)
        with torch.no_grad():
            pairs = [(tensors_of(call(cut, x))[0], tensors_of(call(net, x))[0]) for x in inputs]
        return sum(float((a - b).square().sum()) for a, b in pairs)

    errors = [error(c) for c in ("none", "bias", "least_squares")]
    assert errors[2] < 0.7 * errors[1] < errors[0]


def test_options_that_work_at_once_are_refused_in_training() -> None:
    with pytest.raises(RecipeError, match="works at once"):
        Channels(macs=0.5, compensate="bias").start(network(PROBLEMS["residual"]), NOTHING)
