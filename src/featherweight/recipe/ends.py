"""Both ends of a job on the test split, which is read once, after all else."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from featherweight.measure import Measurement
from featherweight.network import Network
from featherweight.recipe.files import refused, seal, unsealed
from featherweight.recipe.gauge import Gauge
from featherweight.recipe.mark import first_batches, split_mark
from featherweight.recipe.result import Final


@dataclasses.dataclass(frozen=True)
class Tested:
    """The scores [original, compressed] on the test split, and that split's mark."""

    mark: dict[str, Any]
    scores: list[float | None]


def scores_on_test(gauge: Gauge, original: Network, network: Network, last: int) -> list[float | None]:
    """The scores of the deployed files of steps 0 and ``last`` on the test split, as they stand or taken now.

    Raises RecipeError where the split is another than the one that stands there was taken on."""
    file = gauge.state.folder / "final.json"

    def mark() -> dict[str, Any]:
        return split_mark(first_batches(gauge.task, "test", gauge.seed), gauge.task, "test")

    now = mark()
    if file.exists():
        stored: Tested
        stored, changed = unsealed(file, Tested)
        if not changed:
            refused(gauge.state.folder.parent, {"test": stored.mark}, {"test": now}, lambda split: mark())
            return stored.scores
    found = [gauge.on_test(original, 0), gauge.on_test(network, last)]
    seal(file, dataclasses.asdict(Tested(now, found)), [*gauge.files(0), *gauge.files(last)])
    return found


def final(trail: Sequence[Measurement], scores: Sequence[float | None] | None) -> Final | None:
    """Both ends with their scores on the test split; the other figures are those of the trail."""
    if scores is None:
        return None
    rows = zip((trail[0], trail[-1]), ("original", "compressed"), scores, strict=True)
    return Final(*(dataclasses.replace(row, step=name, score=score, split=None if score is None else "test")
                   for row, name, score in rows))


__all__ = ["final", "scores_on_test"]
