"""``Result``: the compressed network and the whole story of how it came about."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from featherweight import __version__, codec, deploy
from featherweight.errors import RecipeError
from featherweight.measure import LayerFigures, Measurement
from featherweight.network import Network
from featherweight.recipe import toml
from featherweight.recipe.kinds import line
from featherweight.recipe.recipe import Recipe
from featherweight.recipe.writing import copy_file, write_json, write_text
from featherweight.report import render
from featherweight.steps import Plan, Skipped
from featherweight.steps.kinds import kind_of


@dataclass(frozen=True)
class Decision:
    """What one step decided: ``step`` counts from 1; a Fit has decisions only for rewrites at work during it.

    curves: how sensitive the network was to the parts that the step chose among, where it measured that.

    Example:
        >>> decision = result.plans[0]                            # of what compress gave
        >>> decision.step, decision.kind
        (1, 'prune.Channels')
    """

    step: int
    kind: str
    summary: str
    skipped: tuple[Skipped, ...] = ()
    grows: tuple[str, ...] = ()
    seconds: float = 0.0
    curves: tuple[dict[str, Any], ...] = ()
    plan: Plan | None = dataclasses.field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values, without the plan."""
        return {"step": self.step, "kind": self.kind, "summary": self.summary, "grows": list(self.grows),
                "skipped": [{"path": s.path, "reason": s.reason} for s in self.skipped], "seconds": self.seconds,
                "curves": list(self.curves)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], plan: Plan | None = None) -> Decision:
        skipped = tuple(Skipped(**s) for s in values["skipped"])
        return cls(**{**values, "skipped": skipped, "grows": tuple(values["grows"]),
                      "curves": tuple(values.get("curves", ())), "plan": plan})


@dataclass(frozen=True)
class Final:
    """Both ends of the trail measured on the test split.

    Example:
        >>> final = result.final                                  # of what compress gave, on the test split
        >>> final.before.split, final.after.file_bytes < final.before.file_bytes
        ('test', True)
    """

    before: Measurement
    after: Measurement


@dataclass(frozen=True)
class Result:
    """trail: [0] is the untouched network, [i] what step i left. flags: what got worse without a step saying so.

    Example:
        >>> [measured.step for measured in result.trail]          # what compress gave
        ['original', 'prune.Channels', 'quantize.Quantize']
        >>> result.save("out")
    """

    network: Network
    trail: tuple[Measurement, ...]
    recipe: Recipe
    target: str
    plans: tuple[Decision, ...] = ()
    final: Final | None = None
    flags: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    layers_before: tuple[LayerFigures, ...] = ()
    layers_after: tuple[LayerFigures, ...] = ()
    #: number of a training's step -> its loss and each of the loss's terms by name, the mean of every epoch
    losses: Mapping[str, Mapping[str, list[float]]] = dataclasses.field(default_factory=dict, compare=False)
    preface: str = ""  #: TOML tables of the job, ahead of the steps
    date: str = dataclasses.field(default="", compare=False)  #: when it was measured, UTC: "2026-01-31 12:00"

    @property
    def recipe_toml(self) -> str:
        """The recipe as TOML with every option written out, or as Python (each line a comment) where TOML cannot hold
        it."""
        try:
            return self.preface + self.recipe.to_toml(complete=True)
        except RecipeError as error:
            return self.preface + "".join(f"# {row}\n" for row in [str(error), *str(self.recipe).splitlines()])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values: what ``result.json`` holds and the report shows."""
        return {
            "format": 1, "featherweight": __version__, "machine": machine(), "versions": self._versions(),
            "target": self.target, "date": self.date, "recipe": [_described(step) for step in self.recipe.steps],
            "recipe_toml": self.recipe_toml,
            "trail": [m.to_dict() for m in self.trail],
            "final": None if self.final is None else {"before": self.final.before.to_dict(),
                                                      "after": self.final.after.to_dict()},
            "plans": [d.to_dict() for d in self.plans],
            "layers": {"before": [dataclasses.asdict(x) for x in self.layers_before],
                       "after": [dataclasses.asdict(x) for x in self.layers_after]},
            "losses": {step: dict(terms) for step, terms in self.losses.items()},
            "notes": list(self.notes), "flags": list(self.flags),
        }

    def _versions(self) -> dict[str, str]:
        latency = self.trail[-1].latency if self.trail else None
        return {"python": platform.python_version(), "torch": str(torch.__version__),
                **(dict(latency.versions) if latency is not None else {})}

    def save(self, out: str | Path, deployed: Path | None = None) -> None:
        """Writes into ``out``: ``model`` + the target's suffix (and what lies beside it), ``network.fw``,
        ``network.fwz`` (packed), ``result.json``, ``recipe.toml`` and ``report.html``, each whole or not at all.

        deployed: the network's exported file, to be copied; None exports it (again).
        """
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        runtime = deploy.target(self.target)
        if deployed is None:
            runtime.export(self.network, folder / f"model{runtime.suffix}")
        else:
            for file in reversed(runtime.files(deployed)):  # what names the others comes last
                copy_file(file, folder / f"model{file.name.removeprefix(deployed.stem)}")
        self.network.save(folder / "network.fw")
        codec.pack(folder / "network.fw", folder / "network.fwz")
        values = self.to_dict()
        write_json(folder / "result.json", values)
        write_text(folder / "recipe.toml", self.recipe_toml)
        write_text(folder / "report.html", render(values))


def _described(step: Any) -> dict[str, Any]:
    try:
        return toml.describe(step)
    except RecipeError:
        return {"kind": kind_of(step), "line": line(step)}


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import os

    name = platform.processor() or platform.machine()
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        rows = (row.partition(":") for row in facts.read_text(errors="replace").splitlines())
        name = next((value.strip() for key, _, value in rows if key.strip() == "model name"), name)
    return {"system": platform.system(), "machine": platform.machine(), "processor": name, "cores": os.cpu_count() or 1}
