"""``sensitivity`` as version 0.1 had it; ``fw.sensitivity`` measures every family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from featherweight.judge.sensitivity import sensitivity as judged
from featherweight.network import Network
from featherweight.quantize.candidates import Kinds
from featherweight.quantize.step import Quantize
from featherweight.steps.moved import tell
from featherweight.task import Task


@dataclass(frozen=True)
class Damage:
    """What it does to a network that the weight ``layer`` (and what its calls read) is of this ``kind``."""

    layer: str
    kind: str
    damage: float


def sensitivity(network: Network, task: Task, kinds: Sequence[str] = ("int8", "int4"), how: str = "output",
                step: Quantize | None = None, split: str = "calibration", batches: int | None = 2, probes: int = 32,
                seed: int = 0) -> tuple[Damage, ...]:
    """``fw.sensitivity(network, task, fw.quantize.Kinds(kinds, step), measure=how, ...)``; "float" does no damage."""
    tell("featherweight.quantize.sensitivity", 'fw.sensitivity(network, task, "quantize", measure=..., options=...)')
    family = Kinds(tuple(kind for kind in kinds if kind != "float"), step or Quantize())
    found = judged(network, task, family, how, split=split, batches=batches, probes=probes, seed=seed)
    return tuple(Damage(d.layer, str(d.option), d.damage) for d in found)


__all__ = ["Damage", "sensitivity"]
