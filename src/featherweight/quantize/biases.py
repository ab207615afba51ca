"""Bias correction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from featherweight.network import Network
from featherweight.task import Task

if TYPE_CHECKING:
    from featherweight.quantize.steps import QuantizePlan


def corrected(plan: QuantizePlan, network: Network, task: Task, batches: int | None) -> QuantizePlan:
    raise NotImplementedError
