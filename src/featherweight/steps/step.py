"""A step: a frozen dataclass whose fields are its options; a Rewrite decides and then does, a Fit changes values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import IntEnum
from typing import ClassVar

from featherweight.errors import RecipeError
from featherweight.network import Network
from featherweight.steps.companion import ALONE, Companion, Context
from featherweight.steps.plan import Plan
from featherweight.task import Batch, Task


class Stage(IntEnum):
    """Order of rewrites in a recipe: a later stage never comes before an earlier one.

    Example:
        >>> fw.prune.Channels.stage < fw.quantize.Quantize.stage
        True
    """

    STRUCTURE = 1  #: axes, ranks, layers: shapes change
    SPARSITY = 2  #: zero patterns: values change, shapes do not
    PRECISION = 3  #: number types and codebooks


class Rewrite(ABC):
    """A step that changes structure, zero pattern or number type.

    Example:
        >>> step = fw.prune.Channels(macs=0.5)                   # options, and nothing else
        >>> plan = step.plan(network, task)                      # may read data, changes nothing
        >>> small = plan.apply(network)                          # reads no data
    """

    stage: ClassVar[Stage]

    def check(self) -> None:  # noqa: B027  (many steps have nothing to check)
        """Raises RecipeError (ExportError for a runtime) for options that make no sense, whatever the network.

        A Recipe calls it when it is made, so that nothing wrong waits until its step is reached; so should ``plan`` and
        ``start``. The default finds nothing wrong."""

    def needs(self) -> tuple[str, ...]:
        """What of the task ``plan`` cannot do without: names of splits, "loss", "score". A job asks for it before its
        first step. The default is nothing."""
        return ()

    def check_on(self, network: Network, task: Task, batch: Batch) -> None:  # noqa: B027  (most have nothing to check)
        """Raises RecipeError, TaskError or FileError for what cannot work, as far as the original network and one batch
        (on its device) tell. A job calls it before its first step. The default finds nothing wrong."""

    def check_training(self) -> None:
        """Raises RecipeError for options that have no meaning during training; called beside ``check`` where the step
        is at work during a Fit. The default refuses a step that has no ``start`` of its own."""
        if type(self).start is Rewrite.start:
            raise _not_in_training(self)

    @abstractmethod
    def plan(self, network: Network, task: Task) -> Plan:
        """Decides. May read the task's calibration or validation data; leaves the network as it was."""

    def start(self, network: Network, task: Task, context: Context = ALONE) -> Companion:
        """Used during training: this step at work beside a Fit. Steps that cannot raise RecipeError."""
        raise _not_in_training(self)


def _not_in_training(step: Rewrite) -> RecipeError:
    return RecipeError(f"{type(step).__name__} cannot be used during training; put it into the recipe as a step of its "
                       "own")


class Fit(ABC):
    """A step that changes values only.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Calm(fw.steps.Fit):
        ...     factor: float = 0.5
        ...     def fit(self, network, task, context):
        ...         calmer = network.copy()
        ...         calmer.set_tensor("7.weight", self.factor * calmer.tensor("7.weight").detach())
        ...         return calmer
        >>> calmer = Calm().fit(network, task, fw.steps.Context())
    """

    def check(self) -> None:  # noqa: B027  (many steps have nothing to check)
        """Raises RecipeError for options that make no sense, whatever the network; as in ``Rewrite``."""

    def needs(self) -> tuple[str, ...]:
        """What of the task ``fit`` cannot do without; as in ``Rewrite``."""
        return ()

    def check_on(self, network: Network, task: Task, batch: Batch) -> None:  # noqa: B027  (most have nothing to check)
        """Raises an error for what cannot work on the original network and a batch; as in ``Rewrite``."""

    @abstractmethod
    def fit(self, network: Network, task: Task, context: Context) -> Network:
        """A copy of ``network`` with other values: same graph, same shapes, zeros kept where the network's
        ``patterns`` say so. Resumes from ``context.workdir`` after a kill."""


Step = Rewrite | Fit
