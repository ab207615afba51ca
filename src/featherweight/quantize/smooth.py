"""SmoothQuant."""

from __future__ import annotations

from torch import Tensor

from featherweight.network import Network
from featherweight.steps import Skipped
from featherweight.task import Task


def smoothed(network: Network, task: Task, alpha: float, batches: int | None) -> tuple[dict[str, Tensor],
                                                                                        list[Skipped]]:
    raise NotImplementedError
