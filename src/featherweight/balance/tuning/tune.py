"""``tune``: options of a whole pipeline, chosen by Optuna among runs of it."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featherweight.balance.combine.folders import folder_of, trials_of
from featherweight.balance.combine.trials import Trial, Trials, name_of
from featherweight.balance.combine.watch import Watch
from featherweight.balance.tuning.ranges import Range, changed, held
from featherweight.balance.tuning.rungs import WHAT, Rungs
from featherweight.deploy import target as target_named
from featherweight.errors import FeatherweightError, RecipeError
from featherweight.network import Network
from featherweight.recipe import Recipe, Result, compress
from featherweight.recipe.apply import Progress
from featherweight.recipe.files import seal, unsealed
from featherweight.recover import Train
from featherweight.steps import Step
from featherweight.steps.given import check_given
from featherweight.steps.options import SEED, Numbers, check_number
from featherweight.task import Task

NUMBERS = {"trials": Numbers(20, least=1, whole=True), "minutes": Numbers(30, above=0, none="no limit"),
           "threads": Numbers(1, least=1, whole=True), "seed": SEED, "seconds": Numbers(1.0, least=0)}
#: trials that are never pruned, as there is too little to compare them with
FIRST = 4


@dataclass(frozen=True)
class Run:
    """One run of the pipeline. options: by path. rungs: the scores on its way. trial: what it came to, if it was not
    pruned on its way."""

    options: Mapping[str, Any]
    rungs: tuple[float, ...] = ()
    trial: Trial | None = None


@dataclass(frozen=True)
class Tuned:
    """result: the best run's recipe, run by ``compress``, from which the files are. options: what was chosen, by path.
    runs: all of them, those too that were pruned on their way.

    Example:
        >>> tuned = fw.Tuned(result, {"1.macs": 0.5}, ())                   # as fw.tune gives it
        >>> tuned.result.recipe.steps[0].macs == tuned.options["1.macs"]
        True
    """

    result: Result
    options: Mapping[str, Any]
    runs: tuple[Run, ...]


def tune(network: Network, task: Task, recipe: Recipe | Iterable[Step], over: Mapping[str, Any],
         target: str = "onnxruntime", out: str | Path | None = None, *, trials: int = 20, minutes: float | None = None,
         threads: int = 1, seed: int = 0, seconds: float = 1.0, progress: Progress | None = None,
         resume: bool = True) -> Tuned:
    """Finds options of a recipe with which its deployed file scores best on the validation split, and runs it.

    For what no table of layers can foresee: epochs, learning rates, weights and temperatures of a distillation. Needs
    Optuna (``pip install 'featherweight[tune]'``): a tree of Parzen estimators (Bergstra et al. 2011) says what to try
    next. A training whose score is below the median of the earlier ones at the same share of their trainings (a
    quarter, a half, three quarters) is given up.

    over: path -> what it may be: (low, high), of integers or of numbers, the latter by their logarithm where they span
        a factor of 10; or a list of choices. A path is the number of a step, from 1, and names: "2.lr",
        "2.distill.weight", "2.beside.0.temperature". The recipe as it is comes first, if it lies in the ranges.
    trials: runs; minutes: how long until the last one begins.
    out: a folder for the files of ``compress``, and ``tune/``, from which a call that was killed goes on to the same
        end. target, threads, seed, seconds, progress, resume: as of ``compress``.

    Raises RecipeError for options that make no sense, TaskError for a task that does not fit.

    Example:
        >>> steps = [fw.prune.Channels(macs=0.5), fw.recover.Train(distill=fw.distill.Logits())]
        >>> over = {"2.lr": (0.001, 0.1), "2.epochs": (1, 3), "2.distill.weight": (0.1, 0.9)}
        >>> def tuned():                                                    # with Optuna
        ...     return fw.tune(network, task, steps, over, trials=20, out="tuned")
        >>> fw.tune(network, task, steps, {"2.rate": (0.001, 0.1)})
        Traceback (most recent call last):
        featherweight.errors.RecipeError: tune was given the option '2.rate'; Train has no 'rate': ...
    """
    check_given("tune", network, task, out, progress)
    steps = recipe.steps if isinstance(recipe, Recipe) else tuple(recipe)
    given = {"trials": trials, "minutes": minutes, "threads": threads, "seed": seed, "seconds": seconds}
    for option, number in given.items():
        check_number("tune", option, number, NUMBERS[option])
    ranges = [Range.of(path, value) for path, value in over.items()]
    if not ranges:
        raise RecipeError('tune was given no options; write tune(network, task, recipe, {"2.lr": (0.001, 0.1)})')
    kept = {r.path: held(steps, r.path) for r in ranges}
    if task.score is None:
        raise RecipeError("tune compares scores, and the task has none; write Task(score=..., validation=...)")
    with (folder_of(out) as folder,
          trials_of(network, task, target, folder / "tune", False, resume, kind="tune", threads=threads,
                    seed=seed, seconds=seconds) as taken):
        runs = _Tuning(taken, steps, ranges, progress).run(trials, Watch(minutes), kept)
        done = [run for run in runs if run.trial is not None and not run.trial.failed]
        if not done:
            failed = next((run.trial.failed for run in runs if run.trial is not None), "")
            raise RecipeError(f"no run of the recipe came to its end: {failed}")
        best = min(done, key=lambda run: run.trial.drop)  # type: ignore[union-attr]
        answer = Recipe(changed(steps, best.options))
        place = taken.folder / "jobs" / f"answer-{name_of(answer.steps)}"
        result = compress(network, task, answer, target, place, threads, seed, progress, seconds=seconds)
        result.save(folder, place / f"model{target_named(target).suffix}")
    return Tuned(result, best.options, tuple(runs))


@dataclass(frozen=True)
class _Tuning:
    """What all runs have in common."""

    trials: Trials
    steps: tuple[Step, ...]
    ranges: list[Range]
    progress: Progress | None

    def run(self, most: int, watch: Watch, kept: Mapping[str, Any]) -> list[Run]:
        """The runs in their order. What was run before is told to Optuna anew, which then asks for the same again: its
        answers depend on the seed and on what it was told alone."""
        optuna = _optuna()
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=self.trials.seed),
                                    pruner=optuna.pruners.MedianPruner(n_startup_trials=FIRST))
        if all(r.holds(kept[r.path]) for r in self.ranges):
            study.enqueue_trial(dict(kept))
        runs: list[Run] = []
        while len(runs) < most and (not runs or watch.spent < 1):
            asked = study.ask()
            options = {r.path: r.suggested(asked) for r in self.ranges}
            found = self._run(len(runs), options, _Listening(asked, self.progress))
            if found.trial is None:
                study.tell(asked, state=optuna.trial.TrialState.PRUNED)
            elif found.trial.failed:
                study.tell(asked, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(asked, -found.trial.drop)
            runs.append(found)
        return runs

    def _run(self, number: int, options: Mapping[str, Any], listening: _Listening) -> Run:
        """One run, made, or told from its file."""
        steps = changed(self.steps, options)
        name = f"{number}-{name_of(steps)}"
        file, place = self.trials.folder / f"{name}.json", self.trials.folder / "jobs" / name
        if file.exists():
            known: Run = dataclasses.replace(unsealed(file, Run)[0], options=options)  # another call's may be fewer
            for rung, score in enumerate(known.rungs, 1):
                listening.asked.report(score, rung)
            return known
        what = ", ".join(f"{path}={value:.3g}" if isinstance(value, float) else f"{path}={value}"
                         for path, value in options.items())
        try:
            found = Run(options, (), self._trial(what, steps, place, listening))
        except _Pruned:
            found = Run(options)
        found = dataclasses.replace(found, rungs=tuple(listening.scores))
        seal(file, dataclasses.asdict(found), [])
        shutil.rmtree(place, ignore_errors=True)
        return found

    def _trial(self, what: str, steps: tuple[Step, ...], place: Path, listening: _Listening) -> Trial:
        trials = self.trials
        trainings = itertools.count(0, len(Rungs.shares))
        watched = Recipe([dataclasses.replace(step, beside=(*step.beside, Rungs(trials.split, first=next(trainings))))
                          if isinstance(step, Train) else step for step in steps])
        listening.file = place / "rungs.json"
        listening.replay()
        try:
            result = compress(trials.original, dataclasses.replace(trials.task, test=None), watched, trials.target,
                              place, trials.threads, trials.seed, listening, seconds=trials.seconds)
        except FeatherweightError as error:
            return Trial(what, {}, 0.0, failed=f"{type(error).__name__}: {error}")
        return trials.of(what, result.trail[-1], place / f"model{target_named(trials.target).suffix}", True)


class _Pruned(Exception):
    """A run that does badly is given up."""


@dataclass
class _Listening:
    """Passes progress on, tells a trial of Optuna the scores on the way, and gives the run up when it says so. The
    scores are kept in ``file``, as a run that was killed goes on behind some of them."""

    asked: Any
    progress: Progress | None
    file: Path | None = None
    scores: list[float] = field(default_factory=list)

    def replay(self) -> None:
        """Tells again what was told before the run was killed."""
        assert self.file is not None
        known: list[float] = unsealed(self.file, list[float])[0] if self.file.exists() else []
        for score in known:
            self._report(score)

    def __call__(self, what: str, done: float, total: float, figures: Mapping[str, float]) -> None:
        if what != WHAT:
            if self.progress is not None:
                self.progress(what, done, total, figures)
        elif done > len(self.scores):
            self._report(figures["score"])

    def _report(self, score: float) -> None:
        self.scores.append(score)
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            seal(self.file, self.scores, [])
        self.asked.report(score, len(self.scores))
        if self.asked.should_prune():
            raise _Pruned


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise RecipeError(f"tune needs Optuna ({error}); write pip install 'featherweight[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


__all__ = ["Run", "Tuned", "tune"]
