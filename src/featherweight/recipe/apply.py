"""``compress``: applies a recipe step by step, measures after every one, and goes on where a killed run was."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from featherweight import deploy
from featherweight.deploy.profile import KernelTime
from featherweight.errors import FileError
from featherweight.measure import Measurement
from featherweight.measure.layers import Profile, profiled
from featherweight.network import Network
from featherweight.network.file.digest import digest
from featherweight.processes import Processes
from featherweight.recipe.ends import final, scores_on_test
from featherweight.recipe.files import State, check_alone, seal, unsealed
from featherweight.recipe.flags import check_growth, flags_of, slower, unbounded
from featherweight.recipe.gauge import Gauge
from featherweight.recipe.mark import EARLY, first_batches, job_mark, split_mark
from featherweight.recipe.recipe import Recipe, aimed, plan_files, planners, plans_made
from featherweight.recipe.result import Decision, Result
from featherweight.recipe.terms import FILE as TERMS
from featherweight.recipe.terms import Terms, by_epoch, curves, note_time, time_of
from featherweight.recipe.trial import check_finite, check_place, not_finite, tried
from featherweight.recipe.types import reloaded
from featherweight.recipe.writing import OVER
from featherweight.seeds import generators_kept, seed_all, seed_from
from featherweight.steps import Context, Fit, Plan, Rewrite, Step
from featherweight.steps.given import check_given
from featherweight.steps.kinds import kind_of
from featherweight.steps.options import SEED, Numbers, check_number
from featherweight.task import Inputs, Task

#: called with (what, done, total, figures) as work goes on
Progress = Callable[[str, float, float, Mapping[str, float]], None]
NUMBERS = {"threads": Numbers(1, least=1, whole=True), "seed": SEED, "seconds": Numbers(1.0, least=0)}
#: fields of plans that hold curves for the report
CURVES = ("sensitivity", "spectra")


def compress(network: Network, task: Task, recipe: Recipe | Iterable[Step], target: str = "onnxruntime",
             out: str | Path | None = None, threads: int = 1, seed: int = 0, progress: Progress | None = None,
             resume: bool = True, *, seconds: float = 1.0, memory: bool = False, preface: str = "") -> Result:
    """Applies the steps of ``recipe`` to a copy of ``network``, and measures before and after every one.

    target: the runtime that is exported to, timed (on ``threads`` threads, ``seconds`` a file) and scored in, and that
        steps plan for whose own ``target`` is None.
    out: a folder for the files of ``Result.save`` and for ``state/``, from which the same job goes on after a kill (a
        training from its own checkpoint); ``resume=False`` starts over. Another job's, or one of another task, is
        refused with what differs. None leaves nothing behind.
    seed: of everything random in steps. progress: called with (what, done, total, figures).
    memory: also measure peak memory. preface: TOML tables to be written ahead of the steps.

    Each step is measured on the validation split (calibration where there is none), and both ends once on the test
    split if there is one. Under ``accelerate launch`` the first process plans, measures and writes, all train.

    Raises RecipeError for a recipe or folder that makes no sense, TaskError for a task that does not fit the network
    (tried on a batch of each split before the first step), PlanError for a step that breaks its own word (more
    parameters without saying so), ExportError for what the target cannot run, FileError for a damaged state or a disk
    that cannot be written to.

    Example:
        >>> recipe = fw.Recipe([fw.quantize.Quantize()])
        >>> result = fw.compress(network, task, recipe, target="onnxruntime", out="out", seconds=0.01)
        >>> [measured.step for measured in result.trail]
        ['original', 'quantize.Quantize']
        >>> smaller = fw.load("out/network.fw")
    """
    check_given("compress", network, task, out, progress)
    deploy.target(target)
    for option, given in {"threads": threads, "seed": seed, "seconds": seconds}.items():
        check_number("compress", option, given, NUMBERS[option])
    ready = recipe if isinstance(recipe, Recipe) else Recipe(recipe)
    processes = Processes()
    folder = (Path(out) if out is not None else processes.folder()) / "state"
    with _stops_told(folder, out is None and processes.first):
        check_place(folder, network, target, len(ready.steps))
        check_finite(network, "the network to be compressed")
        begun = {split: first_batches(task, split, seed) for split in EARLY if task.has(split)}
        known = tried(network, task, begun, ready.steps)
        mark = job_mark(network, task, ready.steps, target, begun, seed=seed, threads=threads, seconds=seconds,
                        memory=memory)
        state = State(folder)
        processes.share(lambda: check_alone(folder.parent, "compress", resume))
        with state.held() if processes.first else nullcontext():
            unsteady = processes.share(lambda: state.claim(
                mark, resume, lambda split: split_mark(first_batches(task, split, seed), task, split)
                if split in EARLY else None))
            sample = next((begun[split][0][0] for split in ("validation", "calibration") if split in begun), None)
            work = _Work(network, known, ready, target, state, processes, threads, seed,
                         progress or (lambda what, done, total, figures: None), seconds, memory, preface, unsteady,
                         sample)
            result = work.run()
            if out is not None and processes.first:
                result.save(out, work.gauge.deployed(len(ready.steps)))  # what ships is the file that was measured
        return result


@contextmanager
def _stops_told(folder: Path, removed: bool) -> Iterator[None]:
    """Where files cannot be written, or Ctrl-C came, it is said how to go on; ``removed``: the folder that the state is
    in goes at the end."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        on = ("nothing is kept, as the job has no out: make room, or write compress(..., out=a folder)" if removed else
              "what was finished is kept: make room, or give rights, and call it again to go on")
        raise FileError(f"the job could not write or read its files in {folder.parent}: {error}; {on}") from error
    except KeyboardInterrupt as stop:
        if not removed:
            stop.add_note(f"what was finished is kept in {folder.parent}: call compress with the same arguments to go "
                          "on")
        raise
    finally:
        if removed:
            shutil.rmtree(folder.parent, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class _Work:
    """One job: what ``compress`` was given, and where it keeps its state."""

    original: Network
    task: Task
    recipe: Recipe
    target: str
    state: State
    processes: Processes
    threads: int
    seed: int
    progress: Progress
    seconds: float
    memory: bool
    preface: str
    unsteady: tuple[str, ...]
    sample: Inputs | None  #: of the split that is scored

    @property
    def gauge(self) -> Gauge:
        return Gauge(self.task, deploy.target(self.target), self.state, self.threads, self.seed, self.seconds,
                     self.memory, self._tell)

    def run(self) -> Result:
        network, trail = self.original, [self._measurement(0, self.original, None)]
        decisions: list[list[Decision]] = []
        same: list[bool] = []
        wrong = [not_finite(self.original, self.sample)]
        for index, step in enumerate(self.recipe.steps, 1):
            before = network
            network, decided = self._step(index, step, before)
            check_finite(network, f"after step {index} ({kind_of(step)})")
            decisions.append(decided)
            same.append(digest(before) == digest(network))
            wrong.append(not_finite(network, self.sample))
            trail.append(self._measurement(index, network, step))
        scores = self._on_test(network)
        trail, notes = self._timed(trail, network)
        profiles = [self._profile(index, net) for index, net in ((0, self.original), (len(trail) - 1, network))]
        return Result(
            network=network, trail=tuple(trail), recipe=self.recipe, target=self.target,
            plans=tuple(d for decided in decisions for d in decided), final=final(trail, scores),
            flags=tuple(self._flags(trail, decisions, same, wrong)), notes=(*network.notes, *notes, *self._unsteady()),
            losses={str(i): found for i in range(1, len(self.recipe.steps) + 1)
                    if (found := curves(self.state.place(i)))},
            took=tuple(time_of(self.state.place(i)) for i in range(1, len(self.recipe.steps) + 1)),
            layers_before=profiles[0].layers, layers_after=profiles[1].layers,
            between=tuple(p.between_s for p in profiles), preface=self.preface,
            ended=time.time())

    def _flags(self, trail: list[Measurement], decisions: list[list[Decision]], same: list[bool],
               wrong: list[int]) -> list[str]:
        flags: list[str] = []
        for index, step in enumerate(self.recipe.steps, 1):
            flags += flags_of(index, step, decisions[index - 1], trail[index - 1], trail[index], same[index - 1])
            flags += unbounded(index, step, wrong[index - 1], wrong[index])
        if len(trail) > 2:
            flags += slower("the whole recipe", "original", None, trail[-1])
        return flags

    def _unsteady(self) -> list[str]:
        return [f"the {split} split gives other first batches at every pass: that it is the one that the job began "
                "with could not be checked" for split in self.unsteady]

    # ---- one step
    def _step(self, index: int, step: Step, before: Network) -> tuple[Network, list[Decision]]:
        """The network after step ``index``, from its file if that stands already."""
        folder = self.state.place(index)
        file, notes = folder / "network.fw", folder / "decisions.json"
        if not self.processes.share(notes.exists):
            self._tell(f"step {index}: {kind_of(step)}", index - 1, {})
            began = time.monotonic()
            do = self._fit if isinstance(step, Fit) else self._rewrite
            network, plans = do(index, aimed(step, self.target), before)  # type: ignore[arg-type]
            if self.processes.first:
                seconds = note_time(folder, time.monotonic() - began)
                whose = planners(step)
                decided = [Decision(index, kind_of(whose[place]), p.summary(), p.skipped, p.grows, seconds,
                                    tuple(dataclasses.asdict(c) for name in CURVES for c in getattr(p, name, ())), p)
                           for place, p in plans.items()]
                network.save(file)
                seal(notes, [d.to_dict() for d in decided],
                     [file, *plan_files(folder, step).values(), *folder.glob(TERMS)])
                (folder / "checkpoint.safetensors").unlink(missing_ok=True)
            self.processes.share(lambda: None)
        stored: list[dict[str, Any]]
        stored, changed = unsealed(notes, list[dict[str, Any]])
        if changed:
            raise FileError(f"{folder / changed[0]} is not the file that was written; {OVER}")
        plans = self._plans(index, step)
        decided = [Decision.from_dict(d, p) for d, p in zip(stored, plans.values(), strict=True)]
        return reloaded(file, self.original), decided

    def _rewrite(self, index: int, step: Rewrite, before: Network) -> tuple[Network, dict[int, Plan]]:
        """Decides (or takes up what was decided before a kill), then does. In the first process only."""
        if not self.processes.first:
            return before, {}
        file = self.state.step(index) / "plan.safetensors"
        if not file.exists():
            with generators_kept():
                seed_all(seed_from(self.seed, "plan", index))
                step.plan(before, self.task).save(file)
        plan = Plan.load(file)
        after = plan.apply(before)
        check_growth(index, step, plan, before, after)
        return after, {0: plan}

    def _fit(self, index: int, step: Fit, before: Network) -> tuple[Network, dict[int, Plan]]:
        folder = self.state.step(index)
        context = Context(original=self.original, workdir=folder, seed=seed_from(self.seed, "fit", index),
                          progress=Terms(folder, getattr(step, "epochs", 0), self.processes.first,
                                         by_epoch(self.progress, getattr(step, "epochs", None))),
                          plans=self._made(index))
        after = step.fit(before, self.task, context)
        return after, self._plans(index, step)

    def _made(self, index: int) -> tuple[Plan, ...]:
        """The plans that led to what step ``index`` works on, as they were applied."""
        return plans_made((self.state.place(i), step) for i, step in enumerate(self.recipe.steps[:index - 1], 1))

    def _plans(self, index: int, step: Step) -> dict[int, Plan]:
        return {i: Plan.load(file) for i, file in plan_files(self.state.place(index), step).items()}

    # ---- figures
    def _measurement(self, index: int, network: Network, step: Step | None) -> Measurement:
        name = "original" if step is None else kind_of(step)
        return Measurement.from_dict(self.processes.share(lambda: self.gauge.taken(index, network, name).to_dict()))

    def _timed(self, trail: list[Measurement], network: Network) -> tuple[list[Measurement], list[str]]:
        def plain() -> tuple[list[dict[str, Any]], list[str]]:
            rows, notes = self.gauge.timed(trail, network)
            return [row.to_dict() for row in rows], notes

        rows, notes = self.processes.share(plain)
        return list(map(Measurement.from_dict, rows)), notes

    def _profile(self, index: int, network: Network) -> Profile:
        kernels = self.processes.share(lambda: self.gauge.profiled(index, network))
        return profiled(network, [KernelTime.of(k) for k in kernels])

    def _on_test(self, network: Network) -> list[float | None] | None:
        if not self.task.has("test"):
            return None
        last = len(self.recipe.steps)
        self._tell("measure on the test split", last, {})
        return self.processes.share(lambda: scores_on_test(self.gauge, self.original, network, last))

    def _tell(self, what: str, done: float, facts: Mapping[str, float]) -> None:
        if self.processes.first:
            self.progress(what, done, 1.0 if what == "latencies" else len(self.recipe.steps), facts)
