"""``Measurement``: one network as it would ship, in figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from featherweight.deploy import Agreement
from featherweight.errors import FileError
from featherweight.measure.timing import Latency, Ratio


@dataclass(frozen=True)
class Measurement:
    """One network after one step. None means: not measured.

    macs: per sample; a lower bound where ``uncounted`` is not empty. network_bytes: the ``.fw`` file. file_bytes: the
    deployed file. archive_bytes: the packed network. latency: of the deployed file at batch one. memory_bytes: growth
    of the peak resident set of a process that loads and runs it. score: of the deployed file on ``split``. agreement:
    deployed file against PyTorch. beside: latencies of other files timed in the same rounds, by name (in a job:
    "original", and "before" of the step before). ratios: their seconds divided by this file's, pair by pair.

    Example:
        >>> measured = result.trail[0]                            # of what compress gave
        >>> measured.params, measured.macs, measured.target, measured.split
        (1516, 78592, 'onnxruntime', 'validation')
        >>> fw.measure.Measurement.from_dict(measured.to_dict()) == measured
        True
    """

    step: str
    params: int
    nonzeros: int
    macs: int
    uncounted: tuple[str, ...]
    network_bytes: int
    file_bytes: int
    target: str = ""
    archive_bytes: int | None = None
    latency: Latency | None = None
    memory_bytes: int | None = None
    score: float | None = None
    score_name: str = "score"
    split: str | None = None
    agreement: Agreement | None = None
    beside: Mapping[str, Latency] = field(default_factory=dict)
    ratios: Mapping[str, Ratio] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return dataclasses.asdict(self) | {"uncounted": list(self.uncounted)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measurement:
        """What ``to_dict`` gave, also after JSON. Raises FileError for anything else."""
        try:
            found: Measurement = TypeAdapter(cls).validate_python(dict(values))
        except ValidationError as error:
            raise FileError(f"this is no measurement: {error}; expected what Measurement.to_dict gives") from error
        return found
