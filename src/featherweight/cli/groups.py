"""Groups of channels as ``featherweight inspect`` shows them: members, scores, sensitivity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from featherweight.axes.groups import AxisGroups
from featherweight.cli.show import row
from featherweight.errors import RecipeError, did_you_mean
from featherweight.network import Network
from featherweight.prune import Curve, axis_groups
from featherweight.prune.channels.scores.table import SCORES, Scores
from featherweight.prune.channels.sensitivity import curves as curves_of
from featherweight.task import Task

BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Grouped:
    """The groups of a network, the scores of their channels by ``score``, and their curves (none if not asked for)."""

    axes: AxisGroups
    score: str
    scores: Scores
    curves: tuple[Curve, ...]

    def to_dict(self) -> dict[str, Any]:
        curves: list[Curve | None] = [*self.curves] or [None] * len(self.scores)
        return {"score": self.score, "groups": [
            {"name": g.name, "channels": len(g), "scores": s.tolist(),
             "members": [{"tensor": m.tensor, "axis": m.dim} for m in g.members],
             **({} if c is None else {"sensitivity": {"kind": c.kind, "shares": c.shares, "changes": c.changes}})}
            for g, s, c in zip(self.axes.groups, self.scores, curves, strict=True)],
            "frozen": [{"path": s.path, "reason": s.reason} for s in self.axes.frozen]}

    def table(self) -> Table:
        """One row a group; curves as rows of blocks, all on one scale. Which axes of which tensors: ``to_dict``."""
        found = Table(header_style="bold", title="channels that live and die together", title_justify="left",
                      box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        found.add_column("group", overflow="fold")
        found.add_column("channels", justify="right")
        found.add_column(f"{self.score}: least, median, most", justify="right")
        if self.curves:
            shares = self.curves[0].shares
            found.add_column(f"{self.curves[0].kind} as {shares[0]:.0%} to {shares[-1]:.0%} go")
        found.add_column("layers that have them", overflow="fold")
        top = max((max(c.changes) for c in self.curves), default=0.0)
        for i, (group, scores) in enumerate(zip(self.axes.groups, self.scores, strict=True)):
            spread = " ".join(f"{v:.3g}" for v in np.quantile(scores, (0, 0.5, 1)))
            drawn = [f"{blocks(self.curves[i].changes, top)} {max(self.curves[i].changes):.3g}"] if self.curves else []
            members = ", ".join(dict.fromkeys(m.tensor.rpartition(".")[0] or m.tensor for m in group.members))
            row(found, group.name, str(len(group)), spread, *drawn, members)
        return found


def grouped(network: Network, task: Task, score: str, curves: bool) -> Grouped:
    """Finds the groups, scores their channels, and measures their sensitivity if ``curves``."""
    if score not in SCORES:
        raise RecipeError(f"there is no score {score!r}; {did_you_mean(score, SCORES)}; write --score l1")
    axes = axis_groups(network)
    scores = SCORES[score](network, task, axes.groups, 0)
    found = curves_of(network, task, axes.groups, scores) if curves else ()
    return Grouped(axes, score, scores, found)


def blocks(values: Sequence[float], top: float) -> str:
    """Values 0..top as a row of blocks of rising height; anything above 0 is seen."""
    last = len(BLOCKS) - 1
    heights = [0 if v <= 0 or top <= 0 else min(last, max(1, round(v / top * last))) for v in values]
    return "".join(BLOCKS[h] for h in heights)
