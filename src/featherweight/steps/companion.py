"""``Companion``: what works beside a Fit while it trains, and leaves a plan that makes its work permanent."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from featherweight.network import Network
from featherweight.steps.plan import Plan
from featherweight.task import Inputs, Task


@dataclass(frozen=True)
class Context:
    """What surrounds a Fit: the untouched original (a teacher), a place for checkpoints, a listener for progress.

    Example:
        >>> context = fw.steps.Context(original=network, seed=1)
        >>> trained = fw.recover.Train(epochs=1).fit(network, task, context)
    """

    original: Network | None = None
    workdir: Path | None = None
    seed: int = 0
    #: called with (what, done, total, figures) as work goes on
    progress: Callable[[str, float, float, Mapping[str, float]], None] = lambda what, done, total, figures: None
    #: the plans that made the network that is fitted of the original, in order
    plans: tuple[Plan, ...] = ()


#: a context without an original, a folder or a listener
ALONE = Context()


class Companion:
    """A rewrite or an objective at work during a Fit: it may hold taps on the network and add a term to the loss.

    Every method has a default that does nothing, so a companion says only what it does. For one optimizer step the Fit
    calls ``update``, then ``loss`` after the forward pass, then ``after_backward``.

    Example:
        >>> class Calm(fw.steps.Companion):
        ...     def loss(self, inputs, output, target):
        ...         return 0.01 * output.square().mean()
        >>> Calm().loss(None, torch.ones(2, 3), None)
        tensor(0.0100)
    """

    @property
    def task_weight(self) -> float:
        """Factor on the task's own loss, 0..1; the factors of several companions are multiplied."""
        return 1.0

    def follow(self, earlier: Sequence[Companion]) -> None:
        """Told once, before the first step, which companions leave plans that are applied before this one's."""

    def update(self, progress: float) -> None:
        """Called before every optimizer step with the Fit's progress, 0..1."""

    def loss(self, inputs: Inputs, output: Any, target: Any) -> Tensor | None:
        """This companion's term (scalar) of the batch's loss; None for no term."""
        return None

    def after_backward(self) -> None:
        """Called between the backward pass and the optimizer's step: may add to the parameters' gradients."""

    def parameters(self) -> list[Tensor]:
        """Tensors of the companion's own that the optimizer shall train too (learned step sizes, thresholds)."""
        return []

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep so that a resumed Fit goes on alike, beside ``parameters``."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what ``state`` gave."""

    @property
    def notes(self) -> Sequence[str]:
        """What the finished network's ``notes`` shall say of this companion's work."""
        return ()

    @property
    def settled(self) -> bool:
        """Whether the plan that ``now`` gives can change no more."""
        return True

    def now(self) -> Plan | None:
        """The plan as it is decided at this point of the Fit; None where nothing is decided yet."""
        return None

    def finish(self) -> Plan | None:
        """The plan that makes the final state permanent; None where nothing is to be changed. May take the taps off.

        The plan is made on the network that is trained, as if this companion were alone: ``steps.joined`` carries it
        through the plans of the others.
        """
        return None

    def close(self) -> None:
        """Takes the taps off; called at the end of a Fit in any case, after ``finish`` or where the Fit failed."""


class Beside(Protocol):
    """What can stand beside a training: a Rewrite, or an objective such as ``distill.Logits()``.

    Implementations are frozen dataclasses. ``start(network, task)`` without a context, and ``begin(network, context)``
    giving a function for the whole loss, are what version 0.1 asked for; both are taken in versions 0.2 and 0.3.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Calm(fw.steps.Companion):
        ...     weight: float
        ...     def loss(self, inputs, output, target):
        ...         return self.weight * output.square().mean()
        >>> @dataclass(frozen=True)
        ... class Calming:
        ...     weight: float = 0.01
        ...     def start(self, network, task, context):
        ...         return Calm(self.weight)
        >>> trained = fw.recover.Train(beside=(Calming(),)).fit(network, task, fw.steps.Context())
    """

    def start(self, network: Network, task: Task, context: Context) -> Companion: ...


def gives_companions(cls: type) -> bool:
    """Whether objects of a class can stand beside a training."""
    return callable(getattr(cls, "start", None)) or _is_old(cls)


def is_beside(thing: Any) -> bool:
    """Whether an object can stand beside a training; a class cannot."""
    return not isinstance(thing, type) and gives_companions(type(thing))


def started(thing: Any, network: Network, task: Task, context: Context) -> Companion:
    """The companion of ``thing`` on a network that is about to be trained, whichever signature its class has."""
    if _is_old(type(thing)):
        return WholeLoss(thing.begin(network, context), task)
    few = len(inspect.signature(thing.start).parameters) < 3
    companion: Companion = thing.start(network, task) if few else thing.start(network, task, context)
    return companion


def beside(step: Any) -> tuple[Any, ...]:
    """All that a Fit lets work beside it: its ``during``, ``beside`` and ``distill``.

    The place of each in this order names its plan (``during_I.plan``) and its state in a checkpoint.
    """
    last = getattr(step, "distill", None)
    return (*getattr(step, "during", ()), *getattr(step, "beside", ()), *(() if last is None else (last,)))


class WholeLoss(Companion):
    """A criterion as version 0.1 knew it: given the task's loss (or None), it gives the whole loss of a batch."""

    def __init__(self, criterion: Any, task: Task) -> None:
        self.criterion, self.task = criterion, task

    @property
    def task_weight(self) -> float:
        return 0.0

    def loss(self, inputs: Inputs, output: Any, target: Any) -> Tensor | None:
        known = self.task.loss is not None and target is not None
        whole: Tensor = self.criterion(inputs, output, target, self.task.loss(output, target) if known else None)  # type: ignore[misc]
        return whole

    def close(self) -> None:
        self.criterion.close()


def _is_old(cls: type) -> bool:
    return callable(getattr(cls, "begin", None))
