"""Weights on their grids."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from featherweight.network import Network
from featherweight.quantize.layers import Layer
from featherweight.quantize.store import Point
from featherweight.steps import Skipped
from featherweight.task import Task

METHODS = ("nearest", "gptq", "adaround", "blocks")


def rounded(method: str, network: Network, task: Task, found: list[Layer], scales: Mapping[str, Tensor],
            points: tuple[Point, ...], batches: int | None) -> tuple[dict[str, Tensor], list[Skipped]]:
    if method == "nearest":
        return {}, []
    raise NotImplementedError
