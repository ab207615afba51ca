"""A plan: a decision that is printed, compared, saved, and applied without data."""

from __future__ import annotations

import inspect
import json
import re
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
from featherweight.steps.kinds import OURS
from featherweight.steps.shipped import shipped

#: kind -> class of every plan that can be read
PLANS: dict[str, type[Plan]] = {}
#: of one tensor: per axis the positions that stay, in order; None where all do
Kept = tuple[Tensor | None, ...]
#: kinds as version 0.1 wrote them -> what reads them; a package with plans of its own adds those that it wrote
ALIASES = {
    "prune.ChannelPlan": "prune.channels/1",
    "prune.WeightPlan": "prune.weights/1",
    "prune.LayerPlan": "prune.layers/1",
    "quantize.QuantizePlan": "quantize/1",
    "factorize.LowRankPlan": "factorize.low_rank/1",
    "share.CodebookPlan": "share.codebook/1",
}
#: a name, with dots, and a version from 1
KIND = re.compile(r"\w+(?:\.\w+)*/[1-9]\d*")


@dataclass(frozen=True)
class Plan(ABC):
    """A decision that can be printed, compared, saved, and applied without data.

    Subclasses are frozen dataclasses whose fields are JSON-able (str, numbers, bools, tuples, dicts, nested frozen
    dataclasses) except ``tensors``. A plan names the tensors and nodes it touches; ``apply`` checks that they exist.

    Every concrete subclass writes out its ``kind``, a name and the version of its fields, under which saved plans are
    read: ``kind: ClassVar[str] = "mytool.channels/1"``. The class's name and module may then change. A class without a
    kind, or with the kind of another class, is a PlanError when it is defined.

    Example:
        >>> plan = fw.prune.Channels(macs=0.5).plan(network, task)
        >>> plan.save("channels.plan")
        >>> fw.steps.Plan.load("channels.plan") == plan
        True
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(arbitrary_types_allowed=True, extra="forbid")
    kind: ClassVar[str]
    skipped: tuple[Skipped, ...] = field(default=(), kw_only=True)
    #: the measures ("params", "macs", "bytes") that may grow, said beforehand
    grows: tuple[str, ...] = field(default=(), kw_only=True)
    tensors: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True, compare=False)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not inspect.isabstract(cls):
            _claim(cls)

    @abstractmethod
    def apply(self, network: Network) -> Network:
        """A changed copy of ``network``. Reads no data; the same plan on the same network gives the same result."""

    @abstractmethod
    def summary(self) -> str:
        """One line: what is going to change."""

    def kept(self, network: Network) -> Mapping[str, Kept]:
        """Tensor's name -> the positions that stay, for the tensors of ``network`` that ``apply`` makes smaller."""
        return {}

    def after(self, earlier: Plan, network: Network) -> Plan:
        """This plan for ``earlier.apply(network)``, where both were made on ``network``: the plan itself, unless it
        holds something in the shape of a tensor, or by what a tensor holds. Raises PlanError where there is none."""
        return self

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
        """The plan that ``to_json`` wrote; ``tensors`` are what lay beside it.

        Raises PlanError for a kind that is not known, or of a later version, and for fields that are missing, unknown
        or of a wrong type, in nested dataclasses too."""
        try:
            body = json.loads(text)
            given = body.pop("kind")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise PlanError(f"this is not a plan: {error}; expected the text that Plan.to_json wrote") from error
        kind = ALIASES.get(str(given), str(given))
        if kind not in PLANS:
            shipped()
        if kind not in PLANS:
            raise PlanError(_unknown(kind))
        if "tensors" in body:
            raise PlanError(f"a {kind} plan with wrong fields: tensors: no such field; tensors lie beside the text")
        try:
            plan: Plan = TypeAdapter(PLANS[kind]).validate_python({**body, "tensors": dict(tensors or {})})
        except ValidationError as error:
            raise PlanError(f"a {kind} plan with wrong fields: {_wrong(error)}; expected what Plan.to_json of this "
                            "version writes: make the plan again") from error
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


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _claim(cls: type[Plan]) -> None:
    """Puts a concrete plan into ``PLANS``; one of the same full name (its module was executed again) is replaced.

    Raises PlanError where the class writes out no kind with a version, or the kind of another class."""
    if not cls.__module__.startswith(f"{OURS}."):
        shipped()  # what comes with the package has its kinds first
    kind, name = vars(cls).get("kind"), _full_name(cls)
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__.removesuffix("Plan")).lower()
    line = f'kind: ClassVar[str] = "{cls.__module__.partition(".")[0].strip("_")}.{snake or "plan"}/1"'
    if not isinstance(kind, str) or not KIND.fullmatch(kind):
        raise PlanError(f"the plan {name} {'has no kind' if kind is None else f'has the kind {kind!r}'}; expected a "
                        f"name and a version, under which saved plans are read: write {line} into the class")
    other = PLANS.get(kind, cls)
    if _full_name(other) != name:
        raise PlanError(f"the plan {name} has the kind {kind!r}, which is taken by {_full_name(other)}; write another "
                        f"into the class, e.g. {line}")
    PLANS[kind] = cls


def _unknown(kind: str) -> str:
    """What is to be said of a kind that is in no table."""
    name, _, version = kind.rpartition("/")
    known = [int(k.rpartition("/")[2]) for k in PLANS if k.rpartition("/")[0] == name]
    if known and version.isdecimal() and int(version) > max(known):
        return (f"a plan of kind {kind!r} was written by a newer featherweight; this one reads {name}/{max(known)}: "
                "install the newer one, or make the plan again")
    return f"unknown plan kind {kind!r}; {did_you_mean(kind, PLANS)}"


def _wrong(error: ValidationError) -> str:
    """The fields that are wrong, by their path, and why."""
    reasons = {"unexpected_keyword_argument": "no such field", "missing": "this field is missing"}
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {reasons.get(e['type'], e['msg'])}" for e in error.errors())
