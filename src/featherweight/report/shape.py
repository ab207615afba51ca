"""What a ``result.json`` looks like, for telling a damaged one in words."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from featherweight.errors import FileError

Number = float | None
Text = str | None


class Described(BaseModel):
    """Fields that are known have their type or are null; more fields are left alone."""

    model_config = ConfigDict(extra="allow", strict=True)


class LatencyShape(Described):
    """The seconds of one file."""

    median_s: Number = None
    q1_s: Number = None
    q3_s: Number = None
    rounds: int | None = None
    threads: int | None = None
    batch: int | None = None
    runtime: Text = None
    precision: Text = None
    versions: dict[str, str] | None = None


class RatioShape(BaseModel):
    """All of it, or none."""

    model_config = ConfigDict(extra="forbid", strict=True)

    median: float
    low: float
    high: float


class AgreementShape(Described):
    """A file against PyTorch."""

    max_abs: Number = None
    max_rel: Number = None
    ok: bool | None = None
    tolerance: Number = None


class MeasurementShape(Described):
    """One row of the trail."""

    step: Text = None
    params: int | None = None
    nonzeros: int | None = None
    macs: int | None = None
    uncounted: list[str] | None = None
    network_bytes: int | None = None
    file_bytes: int | None = None
    archive_bytes: int | None = None
    memory_bytes: int | None = None
    target: Text = None
    latency: LatencyShape | None = None
    score: Number = None
    score_name: Text = None
    split: Text = None
    agreement: AgreementShape | None = None
    beside: dict[str, LatencyShape | None] | None = None
    ratios: dict[str, RatioShape] | None = None


class SkippedShape(Described):
    """What a step left alone."""

    path: Text = None
    reason: Text = None


class CurveShape(Described):
    """How sensitive the network is to one group."""

    group: str
    kind: str
    shares: list[float]
    changes: list[float]


class DecisionShape(Described):
    """What a step decided."""

    step: int | None = None
    kind: Text = None
    summary: Text = None
    seconds: Number = None
    grows: list[str] | None = None
    skipped: list[SkippedShape] | None = None
    curves: list[CurveShape] | None = None


class LayerShape(Described):
    """One layer."""

    path: Text = None
    operator: Text = None
    shape: list[int] | None = None
    dtype: Text = None
    params: int | None = None
    macs: int | None = None
    bytes: int | None = None
    output: list[int] | None = None


class LayersShape(Described):
    """The layers of both ends."""

    before: list[LayerShape] | None = None
    after: list[LayerShape] | None = None


class FinalShape(Described):
    """Both ends on the test split."""

    before: MeasurementShape | None = None
    after: MeasurementShape | None = None


class ResultShape(Described):
    """The whole file."""

    format: int
    featherweight: Text = None
    target: Text = None
    date: Text = None
    machine: dict[str, Any] | None = None
    versions: dict[str, str] | None = None
    recipe_toml: Text = None
    trail: list[MeasurementShape] | None = None
    final: FinalShape | None = None
    plans: list[DecisionShape] | None = None
    layers: LayersShape | None = None
    notes: list[str] | None = None
    flags: list[str] | None = None


def check_shape(values: Any, name: str) -> None:
    """Raises FileError where ``values``, of the file ``name``, are no result of ``compress``."""
    if not isinstance(values, dict) or values.get("format") != 1:
        raise FileError(f"{name} is no result of format 1; expected what compress wrote")
    try:
        ResultShape.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        raise FileError(f"{name} is damaged: {'.'.join(map(str, problem['loc']))}: {problem['msg']}; expected what "
                        "compress wrote: run it again, it takes what is finished from the folder's state") from error
