"""Compact filters: each is the best of its kind that a slow search finds, its graph is its kernel, runtimes take it."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight as fw
from featherweight.errors import PlanError, RecipeError
from featherweight.factorize import Compact
from featherweight.factorize.compact import FORMS
from featherweight.numerics.factors import compact
from featherweight.task import Task
from problems import agrees_in_runtimes


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the kernels
@pytest.mark.parametrize("terms", [1, 2, 9])
def test_shifts_are_the_strongest_offsets_and_all_of_them_are_the_kernel(terms: int) -> None:
    kernel, x = randn(5, 4, 3, 3), randn(2, 4, 7, 7, seed=1)
    made = compact.shift(kernel, terms)
    found = compact.of_shift(made, 4)
    moved = F.conv2d(x, made.moves.double(), padding=1, groups=4)
    torch.testing.assert_close(F.conv2d(moved, made.point[:, :, None, None]), F.conv2d(x, found, padding=1))
    wanted = kernel.square().sum(0).flatten(1).sort(1, descending=True).values[:, terms:].sum()
    assert float((found - kernel).square().sum()) == pytest.approx(float(wanted), abs=1e-9)


def test_shifts_fit_what_is_looked_at_by_least_squares() -> None:
    """No other weights on the chosen offsets give a smaller error of the outputs."""
    kernel, rows = randn(5, 4, 3, 3), randn(300, 36, seed=2) @ randn(36, 36, seed=3)
    made = compact.shift(kernel, 1, rows.T @ rows)
    place = made.moves.flatten(1).argmax(1) + 9 * torch.arange(4)
    best = np.linalg.lstsq(rows[:, place].numpy(), (rows @ kernel.flatten(1).T).numpy(), rcond=None)[0]
    np.testing.assert_allclose(made.point.numpy(), best.T, rtol=1e-3, atol=1e-4)


def test_fire_of_full_rank_is_the_kernel_and_of_few_the_best_of_its_kind() -> None:
    kernel = randn(8, 6, 3, 3)
    torch.testing.assert_close(compact.of_fire(compact.fire(kernel, 6, 0.0)), kernel)
    made = compact.fire(kernel, 3)
    off = (kernel.square().sum((1, 2, 3)) - kernel[:, :, 1, 1].square().sum(1)).tolist()
    assert sorted(off[j] for j in made.few.tolist()) == sorted(off)[:4]
    rows = torch.cat([kernel[made.few][:, :, 1, 1], kernel[made.many].permute(0, 2, 3, 1).flatten(0, 2)])
    left = torch.linalg.svdvals(rows)[3:].square().sum() + sum(sorted(off)[:4])
    assert float((compact.of_fire(made) - kernel).square().sum()) == pytest.approx(float(left))


def slow_ghost(one: Tensor, other: Tensor, stride: int) -> float:
    """Squared error of ``other`` [i, 3, 3] as a 3 x 3 filter on the outputs, ``stride`` apart, of ``one``: by columns
    of the kernel that both make together, written out place by place."""
    reach = 3 + 2 * stride
    columns = np.zeros((9, one.shape[0], reach, reach))
    for t, (dy, dx) in enumerate(itertools.product(range(3), repeat=2)):
        columns[t, :, dy * stride:dy * stride + 3, dx * stride:dx * stride + 3] = one.numpy()
    wanted = np.zeros((one.shape[0], reach, reach))
    wanted[:, stride:stride + 3, stride:stride + 3] = other.numpy()
    a, b = columns.reshape(9, -1).T, wanted.ravel()
    return float(((a @ np.linalg.lstsq(a, b, rcond=None)[0] - b) ** 2).sum())


@pytest.mark.parametrize("stride", [1, 2])
def test_ghosts_are_made_of_the_filter_that_does_it_best(stride: int) -> None:
    kernel = randn(7, 3, 3, 3)
    made = compact.ghost(kernel, 3, 3, (stride, stride))
    lost = [[slow_ghost(kernel[p], kernel[j], stride) for j in made.ghosts.tolist()] for p in made.primary.tolist()]
    assert made.base.tolist() == np.argmin(lost, 0).tolist()
    assert made.error * float(kernel.square().sum()) == pytest.approx(np.min(lost, 0).sum(), rel=1e-4)


def test_outputs_that_are_small_filters_of_others_are_found() -> None:
    kernel = torch.zeros(6, 4, 3, 3, dtype=torch.float64)
    kernel[:2, :, 1, 1] = randn(2, 4)
    for j, base in ((2, 0), (3, 0), (4, 1), (5, 1)):
        kernel[j] = kernel[base][:, 1:2, 1:2] * randn(3, 3, seed=j)
    made = compact.ghost(kernel, 2)
    assert (made.primary.tolist(), made.base.tolist()) == ([0, 1], [0, 0, 1, 1])
    assert made.error < 1e-5


# ---- the graph
class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.second, self.third = nn.Conv2d(12, 16, 3, 2, 1), nn.Conv2d(16, 8, 5, padding=2)
        self.dilated, self.out = nn.Conv2d(8, 8, 3, dilation=2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.out(self.dilated(torch.relu(self.third(x))).mean((2, 3)))


def images(count: int, seed: int = 0) -> Tensor:
    return randn(count, 3, 14, 14, seed=seed).float()


@pytest.fixture(scope="module")
def network() -> fw.Network:
    torch.manual_seed(0)
    return fw.capture(Net().eval(), images(2))  # type: ignore[return-value]


TASK = Task(calibration=lambda: [(images(16, seed), None) for seed in range(3)])


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_graph_computes_with_the_filters_and_both_runtimes_take_it(network: fw.Network, form: str, data: bool,
                                                                      tmp_path: Path) -> None:
    plan = Compact(form, data=data).plan(network, TASK)
    small = plan.apply(network)
    assert {layer.weight for layer in plan.layers} >= {"second.weight", "third.weight"}
    assert fw.measure.params(small) < 0.75 * fw.measure.params(network)
    loaded = type(plan).from_json(plan.to_json(), plan.tensors)
    x = images(4, 9)
    torch.testing.assert_close(loaded.apply(network)(x), small(x))  # type: ignore[attr-defined]
    if data:
        agrees_in_runtimes(small, x, tmp_path)


@pytest.mark.parametrize("form", ["shift", "fire"])
def test_kernels_that_are_said_are_those_that_run(network: fw.Network, form: str) -> None:
    plan, slow = Compact(form).plan(network, Task()), network.copy()
    for layer in plan.layers:
        given = {n: plan.tensors[layer.weight.removesuffix("weight") + n] for n in layer.tensors}
        kernel = compact.of_shift(compact.Shift(given["moves.weight"], given["point.weight"]), layer.shape[1]) \
            if form == "shift" else compact.of_fire(compact.Fire(
                given["squeeze.weight"], given["point.weight"], given["wide.weight"],
                *given["order"].argsort().split([len(given["point.weight"]), len(given["wide.weight"])])))
        slow.set_tensor(layer.weight, kernel)
        weight = network.tensor(layer.weight).detach()
        assert layer.error == pytest.approx(float((kernel - weight).square().sum() / weight.square().sum()), rel=1e-4)
    torch.testing.assert_close(plan.apply(network)(images(4)), slow(images(4)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_data_lower_the_error_of_the_outputs(form: str) -> None:
    """Inputs whose channels hang together, for which the nearest weights are not the nearest outputs."""
    torch.manual_seed(1)
    mix = torch.randn(12, 4) @ torch.randn(4, 12)
    layer = fw.capture(nn.Conv2d(12, 16, 3, padding=1).eval(), torch.randn(2, 12, 8, 8))

    def given(seed: int) -> Tensor:
        x = torch.randn(8, 12, 8, 8, generator=torch.Generator().manual_seed(seed))
        return F.avg_pool2d(torch.einsum("oi,nihw->nohw", mix, x), 3, 1, 1) + 0.05 * x

    task = Task(calibration=lambda: [(given(s), None) for s in range(4)])
    x = given(9)
    lost = [float((Compact(form, data=data).plan(layer, task).apply(layer)(x) - layer(x)).square().mean().detach())
            for data in (True, False)]
    assert lost[0] < 0.8 * lost[1]


def test_what_stays_is_named_and_what_is_wrong_refused(network: fw.Network) -> None:
    reasons = {form: {s.path: s.reason for s in Compact(form).plan(network, Task()).skipped} for form in FORMS}
    assert "padding" in reasons["fire"]["dilated.weight"]
    assert reasons["ghost"]["dilated.weight"] == "its window is dilated"
    assert reasons["shift"]["out.weight"] == "no convolution of one group with a window of more than one place"
    for step, message in ((Compact("slim"), "expected one of 'ghost'"), (Compact(share=1.0), "share=1.0"),
                          (Compact(size=4), "write size=5"), (Compact(terms=0), "terms=0")):
        with pytest.raises(RecipeError, match=message):
            step.check()
    plan = Compact("shift").plan(network, Task())
    with pytest.raises(PlanError, match="which no convolution here reads"):
        plan.apply(plan.apply(network))
