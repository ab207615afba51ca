"""``Found``: the answer of a search, and the roads not taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from featherweight.balance.combine.trials import Trial
from featherweight.recipe import Recipe, Result


@dataclass(frozen=True)
class Found:
    """result: the job of ``recipe``, run by ``compress``, from which the files are. chosen: its trial. missed: limit ->
    in words by how much the shipped file passes it; empty where all are kept. front: trials of which no other has both
    less of ``minimize`` and a smaller drop. alone: name of a family -> the best trial of that family by itself. trials:
    all of them. device: what latencies were measured on; "" is this machine.

    Example:
        >>> found = fw.search(network, task, fw.Budget(file_bytes=0.9, score_drop=100), trials=3, seconds=0.01)
        >>> found.recipe == found.result.recipe, found.chosen in found.trials
        (True, True)
    """

    result: Result
    chosen: Trial
    minimize: str
    missed: Mapping[str, str]
    front: tuple[Trial, ...]
    alone: Mapping[str, Trial]
    trials: tuple[Trial, ...]
    device: str = ""

    @property
    def recipe(self) -> Recipe:
        """What ``compress`` makes the network with."""
        return self.result.recipe

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values: what ``search.json`` holds."""
        return {"format": 1, "chosen": self.chosen.to_dict(), "minimize": self.minimize, "missed": dict(self.missed),
                "front": [t.to_dict() for t in self.front], "alone": {n: t.to_dict() for n, t in self.alone.items()},
                "trials": [t.to_dict() for t in self.trials], **({"device": self.device} if self.device else {})}

    def __str__(self) -> str:
        rows = [f"chosen: {_row(self.chosen, self.minimize)}",
                *(f"{name} alone: {_row(trial, self.minimize)}" for name, trial in self.alone.items()),
                *(f"missed: {name}: {how}" for name, how in self.missed.items()),
                *([f"latencies are those of {self.device}"] if self.device else [])]
        return "\n".join(rows)


def _row(trial: Trial, figure: str) -> str:
    shares = {figure: trial.shares[figure]} if figure in trial.shares else dict(trial.shares)
    return ", ".join([f"{trial.what}{', shortly trained' * trial.probe}",
                      *(f"{name} x {share:.3f}" for name, share in shares.items()), f"score {0 - trial.drop:+.4g}"])


__all__ = ["Found"]
