"""What works beside a Fit while it trains: drivers of rewrites, objectives that add to the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from featherweight.network import Network
from featherweight.steps.plan import Plan
from featherweight.task import Inputs


@dataclass(frozen=True)
class Context:
    """What surrounds a Fit: the untouched original (a teacher), a place for checkpoints, a listener for progress."""

    original: Network | None = None
    workdir: Path | None = None
    seed: int = 0
    #: called with (what, done, total, figures) as work goes on
    progress: Callable[[str, float, float, Mapping[str, float]], None] = lambda what, done, total, figures: None


class Driver(ABC):
    """A rewrite at work during a Fit: holds temporary state as taps on the network, folded away at the end."""

    @abstractmethod
    def update(self, progress: float) -> None:
        """Called before every optimizer step with the Fit's progress, 0..1."""

    def after_backward(self) -> None:  # noqa: B027  (most drivers add nothing)
        """Called between the backward pass and the optimizer's step: may add to the parameters' gradients."""

    @abstractmethod
    def finish(self) -> Plan:
        """Takes the taps off; the plan that makes the final state permanent."""

    def parameters(self) -> list[Tensor]:
        """Tensors of the driver's own that the optimizer shall train too (learned step sizes, thresholds)."""
        return []

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep so that a resumed Fit goes on alike."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027  (most drivers have nothing to keep)
        """Takes up what ``state`` gave."""


class Objective(Protocol):
    """A term that a Fit adds to the task's loss (distillation, penalties). Implementations are frozen dataclasses.

    Where one has a method ``check()``, as steps have, a Recipe calls it."""

    def begin(self, network: Network, context: Context) -> Criterion: ...


class Criterion(Protocol):
    """An objective at work: taps set, teacher ready."""

    def __call__(self, inputs: Inputs, output: Any, target: Any, loss: Tensor | None) -> Tensor:
        """The whole loss of this batch, given the task's own (None where the task has no loss)."""
        ...

    def close(self) -> None:
        """Takes the taps off."""
