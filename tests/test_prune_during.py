"""Channels that go during training: what each schedule adds, what is held, and that the cut changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import featherweight as fw
from featherweight.axes.cut import kept_atoms
from featherweight.errors import RecipeError
from featherweight.measure.macs import macs
from featherweight.network.file.digest import digest
from featherweight.prune import ChannelPlan, Channels, axis_groups
from featherweight.prune.channels.held import HeldChannels
from featherweight.prune.channels.schedules import SCHEDULES, ChannelDriver
from featherweight.prune.weights.schedules import cubic
from featherweight.steps import Context
from featherweight.task import call
from problems import PROBLEMS, first_tensor, network, task, tensors_of

torch.set_num_threads(1)
NOTHING = fw.Task()
FAMILIES = ["mlp", "residual", "depthwise", "grouped", "concat", "squeeze_excite", "attention", "tied_linear",
            "no_momentum"]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def outputs(net: fw.Network, batch: int = 4) -> list[Tensor]:
    args, kwargs = net.example_inputs(batch, seed=3)
    with torch.no_grad():
        return tensors_of(net(*args, **kwargs))


def assert_equal(a: fw.Network, b: fw.Network, tolerance: float = 1e-5) -> None:
    for x, y in zip(outputs(a), outputs(b), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def half(net: fw.Network) -> dict[str, tuple[int, ...]]:
    """Every second channel of every group."""
    return {g.name: tuple(range(0, len(g), 2)) for g in axis_groups(net).groups}


def driven(net: fw.Network, driver: ChannelDriver, first: int, last: int, steps: int, name: str,
           lr: float = 0.05) -> None:
    """Training as Train does it, in the open."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr, momentum=0.9)
    for i in range(first, last):
        driver.update(i / max(1, steps - 1))
        inputs = PROBLEMS[name].example(16, seed=500 + i)
        output = first_tensor(call(net, inputs))
        optimizer.zero_grad()
        F.cross_entropy(output, output.detach().roll(1, 0).argmax(1)).backward()
        driver.after_backward()
        optimizer.step()


# ---- all schedules

@every_schedule
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_held_is_what_the_cut_network_computes(name: str, schedule: str) -> None:
    net = network(PROBLEMS[name]).train()
    driver = Channels(macs=0.6, schedule=schedule, end=0.5, frequency=0.25).start(net, task(PROBLEMS[name]))
    driven(net, driver, 0, 4, 4, name, lr=0.01)
    net.eval()
    seen = net.copy()
    kept = outputs(net)
    plan = driver.finish()
    assert isinstance(plan, ChannelPlan)
    assert not net._taps
    small = plan.apply(net)
    for x, y in zip(kept, outputs(small), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    assert macs(small).total == plan.macs_after <= macs(seen).total
    assert plan.keep or plan.skipped


@every_schedule
def test_in_the_training_loop_it_ends_in_a_smaller_network(schedule: str, tmp_path: Path) -> None:
    row = PROBLEMS["residual"]
    net = network(row)
    before = digest(net)
    step = Channels(macs=0.5, schedule=schedule, end=0.6)
    fitted = fw.recover.Train(epochs=3, lr=0.01, during=(step,)).fit(net, task(row), Context(workdir=tmp_path))
    assert digest(net) == before
    assert macs(fitted).total / macs(net).total == pytest.approx(0.5, abs=0.05)
    assert not fitted._taps
    fitted.save(tmp_path / "net.fw")
    assert_equal(fw.load(tmp_path / "net.fw"), fitted, 0.0)


class Killed(KeyboardInterrupt):
    pass


@every_schedule
@pytest.mark.parametrize("after", [4, 7])
def test_a_killed_run_goes_on_alike(schedule: str, after: int, tmp_path: Path) -> None:
    """Killed before and after the channels are fixed, taken up from the checkpoint: the same file, bit for bit."""
    row = PROBLEMS["residual"]
    work = task(row)
    fit = fw.recover.Train(epochs=3, lr=0.02, checkpoint_every=0.0,
                           during=(Channels(macs=0.6, schedule=schedule, end=0.6, score="taylor"),))
    whole = fit.fit(network(row), work, Context())
    count = 0

    def dying() -> Iterator[Any]:
        nonlocal count
        for batch in work.batches("train"):
            count += 1
            if count > after + 3:  # the pass that counts batches is not training
                raise Killed("now")
            yield batch

    with pytest.raises(Killed, match="now"):
        fit.fit(network(row), dataclasses.replace(work, train=dying), Context(workdir=tmp_path))
    again = fit.fit(network(row), work, Context(workdir=tmp_path))
    assert digest(again) == digest(whole)


@every_schedule
def test_training_that_stopped_early_still_cuts_to_the_target(schedule: str) -> None:
    net = network(PROBLEMS["conv_bn"])
    driver = Channels(ratio=0.5, schedule=schedule).start(net, NOTHING)
    driver.update(0.1)
    small = driver.finish().apply(net)
    assert sum(len(k) for k in driver.finish().keep.values()) == 20
    assert macs(small).total < 0.5 * macs(net).total


def test_a_decision_draws_nothing_from_the_generators_of_the_training() -> None:
    def calibration() -> Iterator[Any]:
        np.random.rand()
        yield torch.randn(4, 3, 8, 8), torch.randint(0, 5, (4,))

    work = fw.Task(calibration=calibration, loss=F.cross_entropy)
    driver = Channels(macs=0.5, score="taylor").start(network(PROBLEMS["conv_bn"]), work)
    torch.manual_seed(0)
    np.random.seed(0)
    wanted = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    driver.update(0.5)
    assert (torch.rand(1), np.random.rand()) == wanted


@pytest.mark.parametrize(("step", "message"), [
    (Channels(macs=0.5, schedule="slimmin"), "did you mean 'slimming'"),
    (Channels(macs=0.5, begin=0.8), r"0 <= begin < end <= 1.*Channels\(begin=0.0, end=0.75\)"),
    (Channels(macs=0.5, frequency=0.0), "frequency above 0"),
    (Channels(macs=0.5, schedule="growing", strength=-1.0), r"strength=-1.0; .*the schedule's own \(1\)"),
])
def test_senseless_options_are_answered_with_the_line_to_write(step: Channels, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        step.start(network(PROBLEMS["mlp"]), NOTHING)


# ---- held channels

@pytest.mark.parametrize("name", FAMILIES)
def test_held_is_cut_in_training_too(name: str) -> None:
    """Output, gradients of what is left, and running statistics, against the network that was cut."""
    net = network(PROBLEMS[name])
    axes = axis_groups(net)
    keep = half(net)
    shapes = {n: tuple(t.shape) for n, t in net.tensors().items()}
    small = ChannelPlan(keep, shapes, 0, 0).apply(net).train()
    held = HeldChannels(net, axes, axes.groups)
    held.hold(kept_atoms(axes, keep))
    net.train()
    args = PROBLEMS[name].example(8, seed=9)
    results = []
    for each in (net, small):
        torch.manual_seed(0)
        total = first_tensor(call(each, args))
        total.square().mean().backward()
        results.append(total.detach())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    wanted = {n: p.grad for n, p in small.named_parameters() if p.grad is not None}
    for n, p in net.named_parameters():
        if n in wanted:
            assert p.grad is not None
            assert float(p.grad.norm()) == pytest.approx(float(wanted[n].norm()), rel=1e-3, abs=1e-5), n
    held.close()
    after = ChannelPlan(keep, shapes, 0, 0).apply(net)
    for n, b in small.named_buffers():
        torch.testing.assert_close(after.tensor(n), b, rtol=1e-4, atol=1e-4)


def test_what_is_let_go_is_what_it_was() -> None:
    """Statistics that drifted while their channel was held are put back."""
    net = network(PROBLEMS["residual"])
    axes = axis_groups(net)
    held = HeldChannels(net, axes, axes.groups)
    before = net.copy()
    held.hold(kept_atoms(axes, half(net)))
    with torch.no_grad():
        net.train()(PROBLEMS["residual"].example(8, seed=4))
    running = net.tensor("layer1.0.bn1.running_mean")
    assert float(running[1]) != float(before.tensor("layer1.0.bn1.running_mean")[1])
    free = held.free()
    assert float(free.tensor("layer1.0.bn1.running_mean")[1]) == float(before.tensor("layer1.0.bn1.running_mean")[1])
    held.hold(np.ones(axes.component.shape, dtype=bool))
    assert torch.equal(running[1::2], before.tensor("layer1.0.bn1.running_mean")[1::2])
    assert not torch.equal(running[::2], before.tensor("layer1.0.bn1.running_mean")[::2])
    held.close()
    assert not net._taps


# ---- gradual

def test_gradual_takes_what_the_cubic_schedule_says() -> None:
    net = network(PROBLEMS["residual"])
    total = macs(net).total
    driver = Channels(macs=0.4, end=0.8, frequency=0.1).start(net, NOTHING)
    for i in range(11):
        driver.update(i / 10)
        assert driver.plan is not None
        wanted = 1 - cubic(min(i / 10, 0.8), 0, 0.8, 0.6)
        assert driver.plan.macs_after / total == pytest.approx(wanted, abs=0.06)
    assert driver.fixed


def test_gradual_gives_back_a_channel_that_proves_itself_until_the_end() -> None:
    net = network(PROBLEMS["conv_bn"])
    driver = Channels(ratio=0.5, end=0.8, frequency=0.1, allocation="uniform").start(net, NOTHING)
    driver.update(0.5)
    assert driver.plan is not None
    gone = sorted(set(range(16)) - set(driver.plan.keep["0.0"]))[0]
    with torch.no_grad():
        net.tensor("0.0.weight")[gone] *= 100
    driver.update(0.6)
    assert gone in driver.plan.keep["0.0"]
    driver.update(0.8)
    with torch.no_grad():
        net.tensor("0.0.weight")[gone] *= 0
    driver.update(0.9)
    assert gone in driver.finish().keep["0.0"]


# ---- penalties, against autograd over sums written out

def slices(net: fw.Network, roles: tuple[str, ...] = ()) -> dict[tuple[str, int], list[Tensor]]:
    """(group, channel) -> every piece of a parameter that is coupled to it."""
    found: dict[tuple[str, int], list[Tensor]] = {}
    for g in axis_groups(net).groups:
        for i in range(len(g)):
            found[g.name, i] = [net.tensor(m.tensor).select(m.dim, int(k)) for m in g.members
                                if (m.role in roles if roles else m.role != "statistic") for k in m.index[i]]
    return found


def slopes(net: fw.Network, penalty: Tensor) -> dict[str, Tensor]:
    for p in net.parameters():
        p.grad = None
    penalty.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}


def added(net: fw.Network, driver: ChannelDriver) -> dict[str, Tensor]:
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    driver.after_backward()
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["mlp", "residual", "depthwise", "attention"])
def test_growing_is_the_slope_of_an_l2_penalty_that_grows_by_steps(name: str) -> None:
    net = network(PROBLEMS[name])
    driver = Channels(ratio=0.5, schedule="growing", strength=0.8, end=0.8, frequency=0.2).start(net, NOTHING)
    for progress, share in ((0.0, 0.25), (0.1, 0.25), (0.45, 0.75), (0.79, 1.0)):
        driver.update(progress)
        assert driver.plan is not None
        pieces = slices(net)
        keep = driver.plan.keep
        total = sum((p.square().sum() / 2 for (g, i), each in pieces.items() if g in keep and i not in keep[g]
                     for p in each), start=torch.zeros(()))
        wanted = slopes(net, 0.8 * share * total)
        for n, grad in added(net, driver).items():
            torch.testing.assert_close(grad, wanted[n], rtol=1e-4, atol=1e-6)
    driver.update(0.8)
    assert not any(bool(g.any()) for g in added(net, driver).values()), "held channels need no penalty"


@pytest.mark.parametrize("name", ["mlp", "residual", "depthwise", "attention"])
def test_group_lasso_is_the_slope_of_weighted_norms_of_channels(name: str) -> None:
    """DepGraph's weights, one channel at a time: 16 for the smallest of a group, 1 for the largest."""
    net = network(PROBLEMS[name])
    driver = Channels(ratio=0.5, schedule="group_lasso", strength=0.01).start(net, NOTHING)
    driver.update(0.0)
    total = torch.zeros(())
    norms: dict[str, list[Tensor]] = {}
    for (g, _), each in slices(net).items():
        norms.setdefault(g, []).append(torch.cat([p.reshape(-1) for p in each]).norm())
    for each in norms.values():
        squares = [float(n.detach()) ** 2 for n in each]
        for norm, square in zip(each, squares, strict=True):
            total = total + norm * 2 ** (4 * (max(squares) - square) / (max(squares) - min(squares)))
    wanted = slopes(net, 0.01 * total)
    for n, grad in added(net, driver).items():
        torch.testing.assert_close(grad, wanted[n], rtol=1e-4, atol=1e-6)


def test_slimming_is_the_slope_of_l1_on_scales_and_cuts_the_smallest() -> None:
    net = network(PROBLEMS["residual"])
    driver = Channels(ratio=0.5, schedule="slimming", strength=0.01).start(net, NOTHING)
    driver.update(0.0)
    total = torch.stack([p.abs() for each in slices(net, ("norm",)).values() for p in each]).sum()
    wanted = slopes(net, 0.01 * total)
    for n, grad in added(net, driver).items():
        torch.testing.assert_close(grad, wanted[n])
    with torch.no_grad():
        net.tensor("layer1.0.bn1.weight")[:3] = torch.tensor([1e-3, -1e-3, -5.0])
    keep = driver.finish().keep["layer1.0.conv1"]
    assert 2 in keep
    assert not {0, 1} & set(keep)


def test_slimming_leaves_channels_without_a_scale_and_says_so() -> None:
    net = network(PROBLEMS["mlp"])
    plan = Channels(ratio=0.5, schedule="slimming").start(net, NOTHING).finish()
    assert plan.keep == {}
    assert {s.path for s in plan.skipped if "no normalization scales" in s.reason} == {"0", "2"}


# ---- what the schedules are for

def settle(net: fw.Network, driver: ChannelDriver, steps: int) -> None:
    driven(net, driver, 0, steps, steps, "residual")


@pytest.mark.parametrize(("schedule", "left"), [("growing", 0.05), ("group_lasso", 0.5)])
def test_penalised_channels_fade(schedule: str, left: float) -> None:
    """What is cut has faded before: the norm of everything coupled to it, beside what it was."""
    net = network(PROBLEMS["residual"]).train()
    start_norms = {k: float(torch.cat([p.detach().reshape(-1) for p in v]).norm())
                   for k, v in slices(net).items()}
    strength = {"growing": 1.0, "group_lasso": 0.02}[schedule]
    driver = Channels(macs=0.6, schedule=schedule, strength=strength, end=1.0).start(net, NOTHING)
    settle(net, driver, 60)
    ends = {k: float(torch.cat([p.detach().reshape(-1) for p in v]).norm())
            for k, v in slices(net).items()}
    keep = driver.finish().keep
    gone = [k for k in ends if k[0] in keep and k[1] not in keep[k[0]]]
    assert gone
    assert max(ends[k] / start_norms[k] for k in gone) < left


@pytest.mark.parametrize("schedule", ["growing", "gradual"])
def test_the_loss_after_the_cut_is_that_before(schedule: str) -> None:
    """Without any training after the cut; the same cut made at once moves the outputs much further."""
    net = network(PROBLEMS["residual"]).train()
    driver = Channels(macs=0.5, schedule=schedule, end=1.0).start(net, NOTHING)
    settle(net, driver, 60)
    net.eval()
    before = outputs(net, 64)[0]
    plan = driver.finish()
    after = outputs(plan.apply(net), 64)[0]
    at_once = network(PROBLEMS["residual"])
    moved = [float((a - b).norm() / b.norm()) for a, b in (
        (after, before), (outputs(plan.apply(at_once), 64)[0], outputs(at_once, 64)[0]))]
    assert moved[0] < 0.1 * moved[1]
