"""``search``: a budget in, the combination of all families that keeps it out."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight import deploy
from featherweight.balance.combine.axes import AXES, Picks, Space
from featherweight.balance.combine.budget import FIGURES, Budget, check_scored
from featherweight.balance.combine.folders import folder_of, trials_of
from featherweight.balance.combine.found import Found
from featherweight.balance.combine.seek import Seeker, front
from featherweight.balance.combine.training import left_by, of_training, short
from featherweight.balance.combine.trials import Trial, Trials, name_of
from featherweight.balance.combine.wanted import DROP, Wanted
from featherweight.balance.combine.watch import Watch
from featherweight.balance.combine.workers import EACH, workers_of
from featherweight.errors import FeatherweightError, FileError, RecipeError, Untimed
from featherweight.judge.elsewhere import Elsewhere
from featherweight.network import Network
from featherweight.processes import Processes
from featherweight.recipe import Recipe, Result, compress
from featherweight.recipe.apply import Progress
from featherweight.recipe.files import JOBS
from featherweight.recipe.trial import check_place
from featherweight.recipe.writing import write_json
from featherweight.recover import Train
from featherweight.steps import Step
from featherweight.steps.given import check_given
from featherweight.steps.options import SEED, Numbers, check_known, check_number
from featherweight.task import Task

NUMBERS = {"trials": Numbers(60, least=1, whole=True), "minutes": Numbers(30, above=0, none="no limit"),
           "threads": Numbers(1, least=1, whole=True), "seed": SEED, "seconds": Numbers(1.0, least=0),
           "workers": Numbers(2, least=1, whole=True, none="this process alone")}
#: combinations that wait for a device together
CARRIED = 16
#: combinations that are made as they would ship, at most, and one more that needs no training where others got one
SHIPPED = 4
#: trainings of combinations as they would ship that time is kept for, before one was made
KEPT = 2
#: what a whole training leaves at least and at most of what a trial lost beyond the original with the short training
LEAST_LEFT, MOST_LEFT = 0.02, 4.0


def search(network: Network, task: Task, budget: Budget, target: str = "onnxruntime", out: str | Path | None = None,
           *, minimize: str | None = None, recover: Train | None = None, families: str | Collection[str] = tuple(AXES),
           trials: int = 60, minutes: float | None = None, threads: int = 1, seed: int = 0, seconds: float = 1.0,
           progress: Progress | None = None, resume: bool = True, preface: str = "",
           times: str | Path | None = None, workers: int | None = None) -> Found:
    """Finds the combination of pruning, low rank, quantization and sharing that keeps a budget, and makes it.

    budget: the limits, which hold together. minimize: what is to be least within them, "latency", "file_bytes",
        "archive_bytes", "macs", "memory" or "score_drop"; None takes the score's drop where the budget does not limit
        it, else the latency.
    recover: a training after the cut (and before integers), beside which weights are pruned; None is none. Whatever is
        cut is tried without it first, and stays untrained where it loses no more than it may; where the drop itself is
        to be least, and where more is lost, it gets a tenth of the epochs, one at least, and so does the original,
        once, at a lower learning rate. What the whole training leaves of the drop between them is learned from the
        combinations that get it, four at most. The limit of the drop is for the network as it ships.
    families: names in ``balance.combine.axes.AXES``, or one. trials: combinations that are tried at most; minutes:
        how long it may take. Of these, the time of two whole trainings, told from the original's short one, is kept up
        to a half, and that of one up to three quarters; after the first, another is begun only where there is time for
        it. What was found by then is the answer, whose files are written after that.
    times: the folder of another device (``balance.bench_table``), on which latencies are measured instead. The search
        stops (errors.Untimed) where it needs some: deployed files wait in the folder then, to be timed there together,
        and the same call goes on with what came back.
    workers: so many processes of Ray plan, export and score combinations ahead of time, on this machine or on the
        cluster that ``ray.init(address=...)`` was called for, whose machines must see ``out``. Nothing is timed while
        they work, and the answer is that of one process (given the same ``torch.get_num_threads()``).
    out: a folder for the files of ``compress``, ``search.json``, and ``search/``, from which a search that was killed
        goes on; None leaves nothing behind. target, threads, seed, seconds, progress, resume, preface: as of
        ``compress``.

    Every trial is exported, scored on the validation split (calibration where there is none) and timed beside the
    original in the same rounds; the answer is the best of them, made by ``compress``, and held against the
    budget as shipped. The test split is read once, there. Raises RecipeError for options that make no sense, TaskError
    for a task that does not fit.

    Example:
        >>> found = fw.search(network, task, fw.Budget(file_bytes=0.9, score_drop=100), trials=3, seconds=0.01)
        >>> found.result.trail[-1].file_bytes < found.result.trail[0].file_bytes
        True
    """
    check_given("search", network, task, out, progress)
    given = {"trials": trials, "minutes": minutes, "threads": threads, "seed": seed, "seconds": seconds,
             "workers": workers}
    families = (families,) if isinstance(families, str) else tuple(families)
    wanted = _checked(budget, minimize, families, given)
    check_recover(recover)
    check_scored("search", task)
    deploy.target(target)
    if Processes().several:
        raise RecipeError("search was called in several processes; call it in one, and its recipe with compress under "
                          "accelerate launch")
    with folder_of(out) as folder:
        return _Search(network, task, budget, wanted, target, folder, recover, families, progress, resume,
                       preface, given, None if times is None else Path(times)).run()


def check_recover(given: Any) -> None:
    """Raises RecipeError where what comes after a cut is no training, or one with options that make no sense."""
    if given is None:
        return
    if not isinstance(given, Train):
        raise RecipeError(f"search was given recover={given!r}; expected a training, as in "
                          "search(recover=fw.recover.Train(epochs=5))")
    given.check()


def _checked(budget: Budget, minimize: str | None, families: Collection[str], given: Mapping[str, Any]) -> str:
    """What is to be least. Raises RecipeError for arguments that make no sense."""
    if not isinstance(budget, Budget):
        raise RecipeError(f"search was given budget={budget!r}; expected limits, as in "
                          "fw.Budget(latency=0.5, score_drop=1.0)")
    wanted = minimize or (DROP if budget.score_drop is None else "latency")
    check_known("search", "minimize", wanted, (*FIGURES, DROP))
    for name in families:
        check_known("search", "families", name, AXES)
    for option, number in given.items():
        check_number("search", option, number, NUMBERS[option])
    return wanted


@dataclass(frozen=True)
class _Search:
    """What ``search`` was given."""

    original: Network
    task: Task
    budget: Budget
    minimize: str
    target: str
    out: Path
    recover: Train | None
    families: tuple[str, ...]
    progress: Progress | None
    resume: bool
    preface: str
    options: dict[str, Any]
    times: Path | None

    def run(self) -> Found:
        check_place(self.out, self.original, self.target, len(self.families))
        count, device = self.options["workers"], None
        if self.times is not None:
            device = Elsewhere(self.times, self.target, self.options["threads"])
            device.check()
            device.begin()
        steps = () if self.recover is None else (self.recover,)
        with trials_of(self.original, self.task, self.target, self.out / "search", self._figures("memory"), self.resume,
                       device, steps, "search",
                       **{name: self.options[name] for name in ("threads", "seed", "seconds")}) as trials, \
                workers_of(count, trials) if count else nullcontext() as workers:
            ahead = min(max(EACH * (count or 0), CARRIED if device is not None else 1), self.options["trials"])
            return self._found(dataclasses.replace(trials, workers=workers, ahead=ahead))

    def _figures(self, name: str) -> bool:
        return name in (*self.budget.limited, self.minimize)

    def _found(self, trials: Trials) -> Found:
        limits = self.budget.limits(trials.costs())
        if self.budget.score_drop is not None:
            limits[DROP] = self.budget.score_drop
        probe, watch = short(self.recover), Watch(self.options["minutes"])
        cost, whole = (0.0, 0.0) if self.recover is None else of_training(trials, self.recover)
        wanted = Wanted(limits, self.minimize, trials.points, cost)
        figures = {*self.budget.limited, self.minimize} - {DROP}
        times = None if self.times is None else str(self.times)
        space = Space.of(self.original, figures or FIGURES, self.families, times)
        seeker = Seeker(trials, space, wanted, watch, self.options["trials"], self._tell, probe, expect=trials.expect)
        shipped = self._shipped(seeker, whole)
        picks, trained = min(shipped, key=lambda one: (*wanted.rank(shipped[one]), shipped[one].drop))
        chosen, result = shipped[picks, trained], self._job(space, picks, trained, self.task)
        known = [*seeker.known.items(), *((other, trial) for (other, _), trial in shipped.items()
                                          if seeker.known[other] != trial)]
        every = tuple(trial for _, trial in known)
        found = Found(result, chosen, self.minimize, _missed(wanted, chosen),
                      front(every, self._cost()), _alone(space, known, wanted), every,
                      trials.device.device if trials.device is not None else "")
        result = dataclasses.replace(result, search=found.to_dict())
        result.save(self.out, self._file(space, picks, trained))
        write_json(self.out / JOBS["search"], result.search)
        return dataclasses.replace(found, result=result)

    def _shipped(self, seeker: Seeker, whole: float) -> dict[tuple[Picks, bool], Trial]:
        """The combinations that were made by ``compress``, trained or not, as it measured them: until one keeps the
        budget as shipped, or ``SHIPPED`` were made. What each came to is known from then on. Where they are trained,
        which takes about ``whole`` seconds, what is left of a drop is learned from each, and the search goes on with
        what that allows; the first to be trained may miss limits by what is thought of a training that was not made.
        Where none is as good as the best that needs no training, that one is made too."""
        asked, made = seeker.wanted, dict[tuple[Picks, bool], Trial]()
        left = left_by(self.recover)
        for count in range(SHIPPED + (self.recover is not None)):
            seeker.wanted = dataclasses.replace(asked, left=left)
            if count < SHIPPED:
                seeker.watch.keep(whole, max(KEPT - len(made), 1))
                seeker.run()
            picks, cut = seeker.best_of(trained=not made or (count < SHIPPED and seeker.watch.left > whole))
            if not made and not cut.probe:
                picks, cut = seeker.hoped() or (picks, cut)
            if (picks, cut.probe or cut.trained) in made:
                break
            trial = made[picks, cut.probe] = self._ships(seeker, picks, cut)
            seeker.learn(picks, trial, cut.probe)
            if asked.met(trial) and not cut.probe:
                break
            if cut.probe and not trial.failed and cut.drop - asked.short > asked.points / 10:
                left = min(max(trial.drop / (cut.drop - asked.short), LEAST_LEFT), MOST_LEFT)
        return made

    def _ships(self, seeker: Seeker, picks: Picks, cut: Trial) -> Trial:
        """A combination as it ships; the failed trial of one that does not stand its whole training."""
        try:
            result = self._job(seeker.space, picks, cut.probe, dataclasses.replace(self.task, test=None))
        except (Untimed, FileError):
            raise
        except FeatherweightError as error:
            if not cut.probe:
                raise
            return Trial(cut.what, {}, 0.0, trained=True, failed=f"{type(error).__name__}: {error}")
        if len(result.trail) == 1:
            return dataclasses.replace(cut, shipped=True)
        trial = seeker.trials.of(cut.what, result.trail[-1], self._file(seeker.space, picks, cut.probe), cut.probe)
        return dataclasses.replace(trial, shipped=True)

    def _cost(self) -> str:
        """The figure that the front shows beside the drop."""
        return self.minimize if self.minimize != DROP else next(iter(self.budget.limited), "latency")

    def _job(self, space: Space, picks: Picks, trained: bool, task: Task) -> Result:
        """A combination as ``compress`` makes it."""
        return compress(self.original, task, Recipe(self._steps(space, picks, trained)), self.target,
                        self._place(space, picks, trained), self.options["threads"], self.options["seed"],
                        self.progress, seconds=self.options["seconds"], memory=self._figures("memory"),
                        preface=self.preface)

    def _place(self, space: Space, picks: Picks, trained: bool) -> Path:
        return self.out / "search" / "jobs" / name_of(self._steps(space, picks, trained))

    def _file(self, space: Space, picks: Picks, trained: bool) -> Path:
        return self._place(space, picks, trained) / f"model{deploy.target(self.target).suffix}"

    def _steps(self, space: Space, picks: Picks, trained: bool) -> tuple[Step, ...]:
        return space.steps(picks, self.recover if trained else None)

    def _tell(self, what: str, done: int) -> None:
        if self.progress is not None:
            self.progress(f"trial {done + 1}: {what}", done, self.options["trials"], {})


def _missed(wanted: Wanted, shipped: Trial) -> dict[str, str]:
    """Limit -> by how much the shipped file passes it."""
    found = {}
    for name, limit in wanted.limits.items():
        figure = wanted.figure(shipped, name)
        if figure > limit:
            unit = " points" if name == DROP else " of the original's"
            found[name] = f"{figure:.4g}{unit}, {limit:.4g} asked; this is the closest that was found"
    return found


def _alone(space: Space, known: Sequence[tuple[Picks, Trial]], wanted: Wanted) -> dict[str, Trial]:
    """Family -> the best of its trials by itself."""
    found: dict[str, Trial] = {}
    for picks, trial in known:
        taken = [i for i, pick in enumerate(picks) if pick]
        if len(taken) == 1:
            name = space.names[taken[0]]
            found[name] = min(found.get(name, trial), trial, key=wanted.rank)
    return found


__all__ = ["search"]
