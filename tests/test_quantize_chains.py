"""Values carried from one rounding to the next: training rounds them once, and gradients reach what was before."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featherweight.quantize import Quantize
from featherweight.quantize.training import driver as training
from featherweight.quantize.training.rounded_once import rounded_once
from test_quantize import prepared, relative_error
from test_quantize_training import driven


class Pooled(nn.Sequential):
    """A rounded value goes through a pool, and that of the next through a pool and flattened."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(),
            nn.Linear(16 * 2 * 2, 12), nn.ReLU(), nn.Linear(12, 5))


class Twice(nn.Module):
    """A value that a pool and another call read, and a pool that is read as a float too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other, self.last = (nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(3))

    def forward(self, x):
        value = F.relu(self.first(x))
        pooled = F.max_pool2d(value, 2)
        return self.last(pooled).sum((2, 3)) + self.other(value).sum((2, 3)) + pooled.tanh().sum((2, 3))


class Joined(nn.Module):
    """Two values on one grid, joined and pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.third = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        joined = torch.cat([F.relu(self.first(x)), F.relu(self.second(x))], 1)
        return self.third(F.max_pool2d(joined, 2))


class Cut(nn.Sequential):
    """A pooled value that is cut off above, which may be no number of its grid."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Hardtanh(0, 0.7), nn.Conv2d(8, 4, 3))


def started(model, step):
    """The network in training, its driver, and an input."""
    network, task, x = prepared(model, 3, 12, 12)
    work = network.copy()
    work.train()
    return work, step.start(work, task), x


def values_rounded(model, step, monkeypatch):
    """The points of the plan, and those of them that training rounds."""
    seen = {}

    def spy(network, copies):
        found = rounded_once(network, copies)
        seen["all"], seen["rounded"] = [p.node for p in copies.values()], [copies[name].node for name in found]
        return found

    monkeypatch.setattr(training, "rounded_once", spy)
    started(model, step)
    return seen["all"], seen["rounded"]


@pytest.mark.parametrize("learn", ["lsq", "react", "balanced"])
def test_gradients_reach_all_that_is_before_a_pool(learn):
    work, driver, x = started(Pooled(), Quantize("binary", "uint1", learn=learn))
    work(x).square().mean().backward()
    for name, parameter in work.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.norm() > 1e-5, name
    assert all(p.grad is not None for p in driver.parameters())


def test_the_gradient_is_that_of_rounding_what_the_pool_took():
    torch.manual_seed(0)
    work, driver, x = started(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                                            nn.Linear(100, 3)), Quantize("int8", "uint1", ends=None))
    work(x).square().mean().backward()
    tensors, weights = work.tensors(), driver.weights
    first, last = (weights[name](tensors[name]) for name in ("0.weight", "4.weight"))
    seen, rounded = (q for name, q in driver.values.items())
    value = F.conv2d(seen(x), first, tensors["0.bias"]).relu()
    out = F.linear(rounded(F.max_pool2d(value, 2)).flatten(1), last, tensors["4.bias"])
    names = ["0.weight", "0.bias", "4.weight"]
    wanted = torch.autograd.grad(out.square().mean(), [tensors[name] for name in names])
    for name, gradient in zip(names, wanted, strict=True):
        torch.testing.assert_close(tensors[name].grad, gradient)


@pytest.mark.parametrize("form", ["binary/uint1", "int2/uint2", "int4/int4", "int8/uint8"])
@pytest.mark.parametrize("model", [Pooled, Twice, Joined, Cut])
def test_the_plan_gives_what_the_training_graph_gave(model, form):
    network, task, x = prepared(model(), 3, 12, 12)
    weights, values = form.split("/")
    want, _, result = driven(Quantize(weights, values, ends=None), network, task, x, steps=2)
    assert want.abs().max() > 1e-3
    assert relative_error(result(x), want) < 1e-4


def test_a_value_is_rounded_behind_the_pool_that_alone_reads_it(monkeypatch):
    points, rounded = values_rounded(Pooled(), Quantize("int2", "uint2"), monkeypatch)
    assert points == ["input_1", "relu", "max_pool2d", "relu_1", "max_pool2d_1", "flatten", "relu_2"]
    assert rounded == ["input_1", "max_pool2d", "max_pool2d_1", "relu_2"]


def test_a_value_that_others_read_is_rounded_before_the_pool(monkeypatch):
    points, rounded = values_rounded(Twice(), Quantize("int2", "uint2"), monkeypatch)
    assert {"relu", "max_pool2d"} <= set(points)
    assert "relu" in rounded
    assert "max_pool2d" not in rounded


def test_joined_values_of_one_grid_are_not_rounded_again(monkeypatch):
    points, rounded = values_rounded(Joined(), Quantize(), monkeypatch)
    assert {"relu", "relu_1", "cat", "max_pool2d"} <= set(points)
    assert {"relu", "relu_1"} <= set(rounded)
    assert not {"cat", "max_pool2d"} & set(rounded)


def test_what_is_cut_off_above_is_rounded_anew(monkeypatch):
    points, rounded = values_rounded(Cut(), Quantize(), monkeypatch)
    assert {"relu", "max_pool2d", "hardtanh"} <= set(points)
    assert "hardtanh" in rounded
