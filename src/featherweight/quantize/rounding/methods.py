"""Weights on their grids: rounding that looks at data.

The weights that are found lie exactly on the grids, so that storing them rounds nothing any more.

Measured on ResNet-20 and CIFAR-10, three-bit weights and eight-bit activations, 1,024 images to round by, one core: the
divergence of the outputs from the float ones, on training images that were not used, is 0.845 after rounding to
nearest, 0.0107 after "gptq" (40 s), 0.0081 after "adaround" (110 s), 0.0076 after "blocks" (160 s). Layer by layer
neither "gptq" nor "adaround" always wins (tests/test_quantize_rounding.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from featherweight.errors import TaskError
from featherweight.network import Network
from featherweight.quantize.layers import LayerForm
from featherweight.quantize.rounding.blocks import reconstructed
from featherweight.quantize.rounding.layerwise import adaround, gptq
from featherweight.quantize.rounding.state import Rounding, rounding
from featherweight.quantize.store import Point
from featherweight.steps import Skipped
from featherweight.task import Task

#: (both networks, at their beginning) -> weight's name -> its values on its grid
Method = Callable[[Rounding], dict[str, Tensor]]
#: name -> what rounds a network's layers; "nearest" looks at no data
METHODS: dict[str, Method | None] = {"nearest": None, "gptq": gptq, "adaround": adaround, "blocks": reconstructed}


def rounded(method: str, network: Network, task: Task, found: list[LayerForm], scales: Mapping[str, Tensor],
            points: tuple[Point, ...], batches: int | None,
            ) -> tuple[dict[str, Tensor], tuple[Point, ...], list[Skipped]]:
    """Weight's name -> its values on its grid; the points, some of their scales learned; what is rounded to nearest
    although more was asked for, and why.

    network: batch norm folded, the values of the weights as they shall be rounded. scales: weight's name -> those of
    its grid. batches: of the calibration split, at most. The same data give the same values, bit for bit.
    """
    chosen = METHODS[method]
    if chosen is None or not scales:
        return {}, points, []
    task.require("calibration")
    with torch.no_grad():
        work, skipped = rounding(network, found, scales, points, task.batches("calibration", batches))
        if not work.layers:
            return {}, points, skipped
        # of both networks, and once more for what is kept in between
        said = work.pair.admit(3 * max(work.pair.whole.order.held))
        if not work.pair.samples:
            raise TaskError("the calibration split is empty; rounding that looks at data needs it: "
                            "Task(calibration=lambda: my_batches, ...)")
        skipped += [Skipped("calibration", f"weights are rounded by a part of it: {said}")] if said else []
        values = chosen(work)
    made = {p.node: p for p in work.points.values()}
    return values, tuple(made[p.node] for p in points), skipped


__all__ = ["METHODS", "rounded"]
