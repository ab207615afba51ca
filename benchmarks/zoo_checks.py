"""What the pruning zoo asks of a network: does zeroing equal cutting, does it train, does its ONNX file agree."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx.node import map_aggregate

from featherweight import deploy, measure
from featherweight.network import Network

#: positional and keyword inputs
Given = tuple[tuple[Any, ...], dict[str, Any]]


class Clock:
    """Seconds of each stage: on the wall, and of the processor."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.processor: dict[str, float] = {}

    def __call__(self, stage: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter(), time.process_time()
        result = work()
        self.seconds[stage] = round(time.perf_counter() - start[0], 3)
        self.processor[stage] = round(time.process_time() - start[1], 3)
        return result


def roughened(model: torch.nn.Module) -> torch.nn.Module:
    """The model without parameters of one value (biases of 0, scales of 1 or 1e-6), which would hide mistakes."""
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and p.numel() > 1 and bool((p == p.flatten()[0]).all()):
                if bool(p.flatten()[0] == 0):
                    p.normal_(std=0.1)
                else:
                    p.uniform_(0.5, 1.5)
    return model


def floats(output: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def in_double(network: Network, given: Given) -> list[Tensor]:
    """The network's outputs computed in double precision; the network is changed to it for good."""
    network.double().eval()
    for node in network.graph.nodes:
        node.args, node.kwargs = (map_aggregate(v, lambda a: torch.float64 if a is torch.float32 else a)
                                  for v in (node.args, node.kwargs))
    network.changed()
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, given)
    with torch.no_grad():
        return floats(network(*args, **kwargs))


def difference(wanted: list[Tensor], given: list[Tensor]) -> float:
    """Largest difference relative to the largest value of each output; nan where an output is not finite or all 0."""
    worst = 0.0
    for a, b in zip(wanted, given, strict=True):
        largest = float(a.abs().max()) if a.numel() else 1.0
        found = float((a - b).abs().max()) / largest if a.numel() and largest else math.nan if a.numel() else 0.0
        worst = found if math.isnan(found) else max(worst, found)
    return worst


def one_step(network: Network, given: Given, rate: float = 1e-3) -> bool:
    """One step of plain SGD on the outputs' mean squares: the loss is finite, and the values changed."""
    network.train()
    outputs = [t for t in floats(network(*given[0], **given[1])) if t.requires_grad]
    loss = torch.stack([t.float().square().mean() for t in outputs]).sum()
    loss.backward()
    changed = 0
    with torch.no_grad():
        for p in network.parameters():
            if p.grad is not None:
                changed += int(not torch.equal(p, p - rate * p.grad))
                p.sub_(rate * p.grad)
                p.grad = None
    network.eval()
    return bool(loss.isfinite()) and changed > 0 and all(bool(p.isfinite().all()) for p in network.parameters())


def exported(network: Network, given: Given) -> deploy.Agreement:
    """The network's agreement with its ONNX file in ONNX Runtime."""
    with tempfile.TemporaryDirectory() as folder:
        target = deploy.target("onnxruntime")
        target.export(network, Path(folder) / "model.onnx")
        runner = target.load(Path(folder) / "model.onnx", like=network.signature)
        try:
            return deploy.verify(network, runner, *given)
        finally:
            runner.close()


def counted(network: Network, given: Given | None) -> measure.Macs:
    """MACs of one sample, or of one call with these inputs (a part of a detector may get hundreds of boxes)."""
    if given is None:
        return measure.macs(network)
    network.changed()  # the shapes of other inputs are forgotten
    network.__dict__["example_inputs"] = lambda batch=2, seed=0: given
    try:
        return measure.macs(network)
    finally:
        network.__dict__.pop("example_inputs", None)
        network.changed()
