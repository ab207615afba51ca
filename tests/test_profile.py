"""The runtimes' own profiles, kernel by kernel, given to the calls of the network that the kernels stand for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
from featherweight.deploy.onnx.profile import kernels
from featherweight.deploy.profile import PROFILERS, KernelTime
from featherweight.measure.deployed import Deployed
from featherweight.measure.layers import profiled


def event(name: str, operator: str, microseconds: int) -> dict[str, Any]:
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": microseconds, "args": {"op_name": operator}}


def test_kernels_are_named_after_nodes_and_values() -> None:
    calls = {"node_Conv_7": ("conv2d", "Conv_7"), "node_Conv_78": ("conv2d_1",), "relu_1": ("relu_1", "conv2d_2"),
             "relu": ("relu", "conv2d")}
    rows = [event("node_Conv_78_token_1", "QLinearConv", 4), event("relu_1_nchwc", "Conv", 6),
            event("ReorderOutput", "ReorderOutput", 2), {"cat": "Session", "name": "model_run", "dur": 99},
            event("node_Conv_7", "Conv", 3)]
    found = kernels(rows * 10, calls)
    assert [(k.name, k.calls) for k in found] == [
        ("node_Conv_78_token_1", ("conv2d_1",)), ("relu_1_nchwc", ("relu_1", "conv2d_2")), ("ReorderOutput", ()),
        ("node_Conv_7", ("conv2d", "Conv_7"))]
    assert [k.seconds for k in found] == pytest.approx([4e-6, 6e-6, 2e-6, 3e-6])


def test_a_slow_run_now_and_then_does_not_count() -> None:
    rows = [event("a", "Conv", 5)] * 40 + [event("a", "Conv", 5000)] * 8
    assert kernels(rows, {})[0].seconds == pytest.approx(5e-6)


class Mixed(nn.Module):
    """Convolutions down and up, a sum, a recurrent layer, a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.side, self.up = nn.Conv2d(16, 16, 3, 1, 1), nn.ConvTranspose2d(16, 16, 2, 2)
        self.time, self.head = nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.down(x)))
        y = self.up(torch.relu(y + self.side(y)))
        found, _ = self.time(y.mean(3).transpose(1, 2))
        return self.head(found[:, -1])


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("quantized", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_layer_gets_its_time(quantized: bool, target: str, tmp_path: Path) -> None:
    pytest.importorskip(target)
    images = torch.randn(8, 1, 16, 16)
    task = fw.Task.classification([(images, torch.arange(8) % 4)], [(images, torch.arange(8) % 4)])
    network: Any = fw.capture(Mixed().eval(), images[:2], dynamic={})
    if quantized:
        network = fw.quantize.Quantize(target=target).plan(network, task).apply(network)
    one = Deployed(network, task, fw.deploy.target(target), tmp_path)
    one.export()
    found = profiled(network, one.profiled("validation", 0.02))
    timed = {row.path: row.seconds for row in found.layers}
    assert {path for path, seconds in timed.items() if seconds} == {"down", "side", "up", "time", "head"}
    assert all(seconds is None or 0 < seconds < 1 for seconds in timed.values())
    assert found.between_s > 0
    assert timed.get("norm") is None


def test_a_target_without_a_profile_tells_none(tmp_path: Path) -> None:
    images = torch.randn(4, 4)
    network: Any = fw.capture(nn.Sequential(nn.Linear(4, 4)), images[:2])
    target: Any = SimpleNamespace(name="another", suffix=".another")
    assert {"onnxruntime", "openvino", "openvino-bf16"} <= set(PROFILERS)
    task = fw.Task.classification([(images, torch.arange(4))], [(images, torch.arange(4))])
    assert Deployed(network, task, target, tmp_path).profiled("validation", 0.01) == ()
    assert profiled(network, ()).layers[0].seconds is None
    other = KernelTime("Add", "Add", 1e-6, ("linear",))
    assert profiled(network, [other]).between_s == 1e-6, "a sum does no layer's work"


def test_kernels_go_to_the_layers_whose_weights_they_read() -> None:
    """A runtime that renames operators: by weights, each layer once; and what JSON gives back is the same."""
    network: Any = fw.capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.zeros(2, 4))
    rows = [KernelTime("FullyConnected.2", "FullyConnected", 2e-6, ("another",), ("2.weight", "2.bias")),
            KernelTime("FullyConnected.1", "FullyConnected", 1e-6, (), ("0.weight",)),
            KernelTime("Reorder.1", "Reorder", 5e-7, (), ("0.weight",))]
    found = profiled(network, [KernelTime.of(json.loads(json.dumps(dataclasses.asdict(row)))) for row in rows])
    assert {row.path: row.seconds for row in found.layers} == {"0": 1e-6, "2": 2e-6}
    assert found.between_s == 5e-7
