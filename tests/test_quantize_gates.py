"""SiLU and Hardswish on integers: written out as products where the runtime has kernels for those only."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import featherweight as fw
from featherweight.errors import PlanError
from featherweight.quantize import Quantize
from featherweight.quantize.prepare.expand_activations import write_out
from test_quantize import kernels, prepared, relative_error
from test_quantize_training import driven

SHAPE = (3, 8, 8)


class Inverted(nn.Module):
    """An inverted residual with squeeze-excite, as MobileNetV3 and EfficientNet have them; and a linear SiLU."""

    def __init__(self, act=F.silu) -> None:
        super().__init__()
        self.act = act
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.down, self.hidden, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        y = self.act(self.deep(x))
        y = y * self.excite(self.act(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        return self.head(self.act(self.hidden((x + self.down(y)).mean((2, 3)))))


def test_silu_runs_on_whole_numbers(tmp_path):
    network, task, x = prepared(Inverted(), *SHAPE)
    plan = Quantize().plan(network, task)
    assert plan.gates == ("silu", "silu_1", "silu_2")  # the last one reads a linear call's float
    counts = kernels(plan.apply(network), tmp_path, x, network)
    assert counts["QLinearSigmoid"] == 4
    assert counts["QLinearMul"] == 4
    assert counts["QLinearGlobalAveragePool"] == 2
    assert counts["Transpose"] <= 2
    assert counts["Sigmoid"] + counts["QuickGelu"] == 1


def test_hardswish_is_multiplied_as_whole_numbers(tmp_path):
    network, task, x = prepared(Inverted(F.hardswish), *SHAPE)
    counts = kernels(Quantize().plan(network, task).apply(network), tmp_path, x, network)
    assert counts["QLinearMul"] == 4
    assert counts["QLinearGlobalAveragePool"] == 2


@pytest.mark.parametrize("act", [F.silu, F.hardswish])
@pytest.mark.parametrize("options", [{}, {"rescale": True}, {"equalize": True}, {"correct_bias": True},
                                     {"rounding": "gptq"}])
def test_the_function_stays(act, options):
    network, task, x = prepared(Inverted(act), *SHAPE)
    plan = Quantize(**options).plan(network, task)
    assert plan.gates
    assert relative_error(plan.apply(network)(x), network(x)) < 0.05


def test_training_gives_what_its_plan_makes():
    network, task, x = prepared(Inverted(), *SHAPE)
    want, plan, result = driven(Quantize(), network, task, x, steps=2)
    assert plan.gates == ("silu", "silu_1", "silu_2")
    assert relative_error(result(x), want) < 1e-4


@pytest.mark.parametrize("step", [Quantize(target="openvino"), Quantize("int4", "uint4"), Quantize(activations=None),
                                  Quantize(ignore=("*",))])
def test_activations_stay_whole_elsewhere(step):
    network, task, _ = prepared(Inverted(), *SHAPE)
    plan = step.plan(network, task)
    assert plan.gates == ()
    assert len(plan.apply(network).calls(torch.ops.aten.silu.default)) == 4


def test_what_an_ignored_layer_gives_is_not_written_out():
    network, task, _ = prepared(Inverted(), *SHAPE)
    assert Quantize(ignore=("deep",)).plan(network, task).gates == ("silu", "silu_2")


def test_writing_out_changes_no_value_and_is_done_once(tmp_path):
    network, _, x = prepared(Inverted(), *SHAPE)
    made = network.copy()
    for _ in range(2):
        write_out(made, ("silu", "silu_1"))
        torch.testing.assert_close(made(x), network(x))
    assert len(made.calls(torch.ops.aten.silu.default)) == 2
    made.save(tmp_path / "net.fw")
    torch.testing.assert_close(fw.load(tmp_path / "net.fw")(x), network(x))
    with pytest.raises(PlanError, match="writes 'silu_9' out"):
        write_out(made, ("silu_9",))
