"""``advise``: where time and bytes go, what each family gives alone, and the recipe to start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from featherweight import deploy
from featherweight.balance.combine.axes import AXES, Space, told
from featherweight.balance.combine.budget import check_scored
from featherweight.balance.combine.folders import folder_of, trials_of
from featherweight.balance.combine.seek import Seeker
from featherweight.balance.combine.trials import Trial
from featherweight.balance.combine.wanted import DROP, Wanted
from featherweight.balance.combine.watch import Watch
from featherweight.measure.deployed import Deployed
from featherweight.measure.layers import LayerFigures, profiled
from featherweight.network import Network
from featherweight.recipe import Recipe
from featherweight.recipe.apply import Progress
from featherweight.steps.given import check_given
from featherweight.steps.options import SEED, Numbers, check_number
from featherweight.task import Task

NUMBERS = {"score_drop": Numbers(1.0, least=0, noun="points of the score"), "minutes": Numbers(5, above=0),
           "threads": Numbers(1, least=1, whole=True), "seed": SEED, "seconds": Numbers(0.3, least=0)}


@dataclass(frozen=True)
class Advice:
    """layers: the calls that hold weights or do MACs, with the seconds of their kernels where the runtime tells them.
    between_s: of the kernels between. alone: each family by itself, from little to much, measured. recipe: the
    combination that promises the lowest latency within the drop; expected: figure -> what it promises, a prediction.

    Example:
        >>> advice = fw.advise(network, task, minutes=0.05, seconds=0.01)
        >>> advice.layers[0].path, advice.alone[0].what
        ('0', 'nothing')
    """

    layers: tuple[LayerFigures, ...]
    between_s: float
    alone: tuple[Trial, ...]
    what: str
    recipe: Recipe
    expected: Mapping[str, float]

    def to_dict(self) -> dict[str, object]:
        """JSON-able values."""
        return {"layers": [layer.to_dict() for layer in self.layers], "between_s": self.between_s,
                "alone": [trial.to_dict() for trial in self.alone], "what": self.what,
                "recipe": self.recipe.to_toml(), "expected": dict(self.expected)}


def advise(network: Network, task: Task, target: str = "onnxruntime", out: str | Path | None = None, *,
           score_drop: float = 1.0, minutes: float = 5.0, threads: int = 1, seed: int = 0, seconds: float = 0.3,
           progress: Progress | None = None, resume: bool = True) -> Advice:
    """Says, without training, where time and bytes go, what each family could save and at which drop of the score, and
    which recipe to start from.

    score_drop: points that the recipe may lose. minutes: how long families are measured, the mildest amounts first.
    out: a folder that keeps what was measured; ``fw.search`` with the same ``out``, ``seconds`` and ``threads`` goes on
    from there. Raises RecipeError for options that make no sense, TaskError for a task that does not fit.

    Example:
        >>> advice = fw.advise(network, task, minutes=0.05, seconds=0.01)
        >>> set(advice.expected) == {"latency", "score_drop"}
        True
    """
    check_given("advise", network, task, out, progress)
    given = {"score_drop": score_drop, "minutes": minutes, "threads": threads, "seed": seed, "seconds": seconds}
    for option, number in given.items():
        check_number("advise", option, number, NUMBERS[option])
    check_scored("advise", task)
    watch = Watch(minutes)
    with (folder_of(out) as folder,
          trials_of(network, task, target, folder / "search", False, resume, threads=threads, seed=seed,
                    seconds=seconds) as trials):
        space = Space.of(network, {"latency", "file_bytes", "archive_bytes"}, tuple(AXES))

        def tell(what: str, done: int) -> None:
            if progress is not None:
                progress(f"trial {done + 1}: {what}", done, sum(map(len, space.offers)), {})

        seeker = Seeker(trials, space, Wanted({DROP: score_drop}, "latency", trials.points), watch, 1 << 30, tell)
        seeker.alone(share=1.0)
        picks, expected = seeker.expected()
        original = Deployed(network, task, deploy.target(target), trials.folder / "original", threads)
        profile = profiled(network, original.profiled(trials.split, seconds))
    return Advice(profile.layers, profile.between_s, tuple(seeker.known.values()), told(space.chosen(picks)),
                  Recipe(space.steps(picks)), expected)


__all__ = ["Advice", "advise"]
