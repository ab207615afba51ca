"""A plan: a decision that is printed, compared, saved, and applied without data."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import safetensors
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from featherweight.errors import FileError, PlanError, did_you_mean
from featherweight.files import written_whole
from featherweight.network import Network
from featherweight.network.layers import Skipped

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
