"""The seam every technique hangs in: decide first (a Plan), then do; or change values only (a Fit).

A technique is a frozen dataclass whose fields are its options, and whose constructor stores and does nothing else.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar, Protocol

import safetensors
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from featherweight.errors import FileError, PlanError, RecipeError, did_you_mean
from featherweight.files import written_whole
from featherweight.network import Network
from featherweight.task import Inputs, Task


class Stage(IntEnum):
    """Order of rewrites in a recipe: a later stage never comes before an earlier one."""

    STRUCTURE = 1  #: axes, ranks, layers: shapes change
    SPARSITY = 2  #: zero patterns: values change, shapes do not
    PRECISION = 3  #: number types and codebooks


@dataclass(frozen=True)
class Skipped:
    """Something that a plan left as it was, and why: nothing is skipped in silence."""

    path: str
    reason: str


PLANS: dict[str, type[Plan]] = {}


@dataclass(frozen=True)
class Plan(ABC):
    """A decision that can be printed, compared, saved, and applied without data.

    Subclasses are frozen dataclasses whose fields are JSON-able (str, numbers, bools, tuples, dicts, nested frozen
    dataclasses) except ``tensors``. A plan names the tensors and nodes it touches; ``apply`` checks that they exist.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(arbitrary_types_allowed=True)
    skipped: tuple[Skipped, ...] = field(default=(), kw_only=True)
    #: the measures ("params", "macs", "bytes") that may grow, said beforehand
    grows: tuple[str, ...] = field(default=(), kw_only=True)
    tensors: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True, compare=False)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        family = [*cls.__module__.split("."), ""][1]
        PLANS[f"{family}.{cls.__name__}".lstrip(".")] = cls

    @property
    def kind(self) -> str:
        return next(name for name, cls in PLANS.items() if cls is type(self))

    @abstractmethod
    def apply(self, network: Network) -> Network:
        """A changed copy of ``network``. Reads no data; the same plan on the same network gives the same result."""

    @abstractmethod
    def summary(self) -> str:
        """One line: what is going to change."""

    def __str__(self) -> str:
        lines = [self.summary(), *(f"  left alone: {s.path} ({s.reason})" for s in self.skipped)]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The plan without its tensors, as JSON text."""
        plain = TypeAdapter(Any)
        body = {f.name: plain.dump_python(getattr(self, f.name), mode="json")
                for f in fields(self) if f.name != "tensors"}
        return json.dumps({"kind": self.kind, **body})

    @classmethod
    def from_json(cls, text: str, tensors: Mapping[str, Tensor] | None = None) -> Plan:
        """The plan that ``to_json`` wrote; ``tensors`` are what lay beside it."""
        try:
            body = json.loads(text)
            kind = body.pop("kind")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise PlanError(f"this is not a plan: {error}; expected the text that Plan.to_json wrote") from error
        if kind not in PLANS:
            raise PlanError(f"unknown plan kind {kind!r}; {did_you_mean(kind, PLANS)}")
        try:
            plan: Plan = TypeAdapter(PLANS[kind]).validate_python({**body, "tensors": dict(tensors or {})})
        except ValidationError as error:
            raise PlanError(f"a {kind} plan with wrong fields: {error}") from error
        return plan

    def save(self, path: str | Path) -> None:
        """One safetensors file: the JSON as metadata, the tensors beside it."""
        tensors = {k: v.detach().contiguous().cpu() for k, v in self.tensors.items()}
        with written_whole(path) as part:
            save_file(tensors, part, {"plan": self.to_json()})

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        try:
            with safetensors.safe_open(path, "pt") as file:
                text = (file.metadata() or {})["plan"]
                return cls.from_json(text, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (safetensors.SafetensorError, KeyError, OSError) as error:
            raise FileError(f"{path} is not a saved plan: {error}; expected a file that Plan.save wrote") from error


class Rewrite(ABC):
    """A step that changes structure, zero pattern or number type."""

    stage: ClassVar[Stage]

    @abstractmethod
    def plan(self, network: Network, task: Task) -> Plan:
        """Decides. May read the task's calibration or validation data; leaves the network as it was."""

    def start(self, network: Network, task: Task) -> Driver:
        """Used during training: a driver that a Fit tells of its progress. Steps that cannot raise RecipeError."""
        raise RecipeError(
            f"{type(self).__name__} cannot be used during training; put it into the recipe as a step of its own"
        )


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


@dataclass(frozen=True)
class Context:
    """What surrounds a Fit: the untouched original (a teacher), a place for checkpoints, a listener for progress."""

    original: Network | None = None
    workdir: Path | None = None
    seed: int = 0
    #: called with (what, done, total, figures) as work goes on
    progress: Callable[[str, float, float, Mapping[str, float]], None] = lambda what, done, total, figures: None


class Fit(ABC):
    """A step that changes values only."""

    @abstractmethod
    def fit(self, network: Network, task: Task, context: Context) -> Network:
        """A copy of ``network`` with other values: same graph, same shapes, zeros kept where the network's
        ``patterns`` say so. Resumes from ``context.workdir`` after a kill."""


Step = Rewrite | Fit


class Objective(Protocol):
    """A term that a Fit adds to the task's loss (distillation, penalties). Implementations are frozen dataclasses."""

    def begin(self, network: Network, context: Context) -> Criterion: ...


class Criterion(Protocol):
    """An objective at work: taps set, teacher ready."""

    def __call__(self, inputs: Inputs, output: Any, target: Any, loss: Tensor | None) -> Tensor:
        """The whole loss of this batch, given the task's own (None where the task has no loss)."""
        ...

    def close(self) -> None:
        """Takes the taps off."""


__all__ = ["PLANS", "Context", "Criterion", "Driver", "Fit", "Objective", "Plan", "Rewrite", "Skipped", "Stage",
           "Step"]
