"""``compress``: applies a recipe step by step, measures after every one, and goes on where a killed run was."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from featherweight import deploy, measure
from featherweight.errors import PlanError, RecipeError
from featherweight.measure import Measurement
from featherweight.network import Network, load, trees
from featherweight.network.file.digest import digest
from featherweight.processes import Processes
from featherweight.recipe.files import JOB_FORMAT, State, read_json, write_json
from featherweight.recipe.flags import flags_of, slower
from featherweight.recipe.recipe import Recipe, aimed, planners
from featherweight.recipe.result import Decision, Final, Result
from featherweight.recipe.terms import Terms, curves
from featherweight.seeds import generators_kept, seed_all, seed_from
from featherweight.steps import Context, Fit, Plan, Rewrite, Step
from featherweight.steps.fingerprint import canonical
from featherweight.steps.kinds import kind_of
from featherweight.task import Task

#: called with (what, done, total, figures) as work goes on
Progress = Callable[[str, float, float, Mapping[str, float]], None]


def compress(network: Network, task: Task, recipe: Recipe | Iterable[Step], target: str = "onnxruntime",
             out: str | Path | None = None, threads: int = 1, seed: int = 0, progress: Progress | None = None,
             resume: bool = True, *, seconds: float = 1.0, memory: bool = False, preface: str = "") -> Result:
    """Applies the steps of ``recipe`` to a copy of ``network``, and measures before and after every one.

    target: the runtime that is exported to, timed (on ``threads`` threads, ``seconds`` a file) and scored in, and that
        steps plan for whose own ``target`` is None.
    out: a folder for the files of ``Result.save`` and for ``state/``, from which the same job goes on after a kill (a
        training from its own checkpoint); ``resume=False`` starts over. None leaves nothing behind.
    seed: of everything random in steps. progress: called with (what, done, total, figures).
    memory: also measure peak memory. preface: TOML tables to be written ahead of the steps.

    Each step is measured on the validation split (calibration where there is none), and both ends once on the test
    split if there is one. Under ``accelerate launch`` the first process plans, measures and writes, all train.

    Raises RecipeError for a recipe or folder that makes no sense, PlanError for a step that breaks its own word (more
    parameters without saying so), ExportError for what the target cannot run.

    Example:
        >>> recipe = fw.Recipe([fw.quantize.Quantize()])
        >>> result = fw.compress(network, task, recipe, target="onnxruntime", out="out", seconds=0.01)
        >>> [measured.step for measured in result.trail]
        ['original', 'quantize.Quantize']
        >>> smaller = fw.load("out/network.fw")
    """
    if not isinstance(network, Network):
        parts = f" one of its parts: assembly.parts[{next(iter(network.parts))!r}]" if hasattr(network, "parts") else \
            " fw.capture(model, example_inputs) first"
        raise RecipeError(f"compress takes a Network, not a {type(network).__name__}; compress{parts}")
    ready = recipe if isinstance(recipe, Recipe) else Recipe(recipe)
    deploy.target(target)
    processes = Processes()
    folder = Path(out) / "state" if out is not None else processes.folder()
    mark = {"format": JOB_FORMAT, "recipe": canonical(ready.steps), "network": digest(network),
            "target": target, "seed": seed, "threads": threads}
    try:
        processes.share(lambda: State(folder).claim(mark, resume))
        work = _Work(network, task, ready, target, State(folder), processes, threads, seed,
                     progress or (lambda what, done, total, figures: None), seconds, memory, preface)
        result = work.run()
        if out is not None and processes.first:
            result.save(out, work.deployed(len(ready.steps)))  # what ships is the very file that was measured
        return result
    finally:
        if out is None and processes.first:
            shutil.rmtree(folder, ignore_errors=True)


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

    def run(self) -> Result:
        steps, share = self.recipe.steps, self.processes.share
        done = share(lambda: self.state.done(len(steps) + 1))
        network, trail = self.original, [self._measurement(0, self.original, None, done)]
        decisions: list[Decision] = []
        flags: list[str] = []
        for index, step in enumerate(steps, 1):
            before = network
            network, decided = self._step(index, step, before)
            decisions += decided
            trail.append(self._measurement(index, network, step, done))
            flags += flags_of(index, step, decided, trail[-2], trail[-1], digest(before) == digest(network))
        final = self._final(network)
        if len(steps) > 1:
            last = final.after if final is not None else trail[-1]
            flags += slower("the whole recipe", last.beside.get("original"), last)
        return Result(
            network=network, trail=tuple(trail), recipe=self.recipe, target=self.target, plans=tuple(decisions),
            final=final, flags=tuple(flags), notes=tuple(network.notes),
            losses={str(i): found for i in range(1, len(steps) + 1)
                    if (found := curves(self.state.folder / f"step_{i}"))},
            layers_before=measure.layers(self.original), layers_after=measure.layers(network), preface=self.preface)

    # ---- one step
    def _step(self, index: int, step: Step, before: Network) -> tuple[Network, list[Decision]]:
        """The network after step ``index``, from its file if that stands already."""
        folder = self.state.folder / f"step_{index}"
        file, notes = folder / "network.fw", folder / "decisions.json"
        if not self.processes.share(file.exists):
            self._tell(f"step {index}: {kind_of(step)}", index - 1, {})
            began = time.monotonic()
            do = self._fit if isinstance(step, Fit) else self._rewrite
            network, plans = do(index, aimed(step, self.target), before)  # type: ignore[arg-type]
            if self.processes.first:
                seconds = time.monotonic() - began
                whose = planners(step)
                decided = [Decision(index, kind_of(whose[place]), p.summary(), p.skipped, p.grows, seconds,
                                    tuple(dataclasses.asdict(c) for c in getattr(p, "sensitivity", ())), p)
                           for place, p in plans.items()]
                write_json(notes, [d.to_dict() for d in decided])
                network.save(file)
                (folder / "checkpoint.safetensors").unlink(missing_ok=True)
            self.processes.share(lambda: None)
        network = load(file, types=named_types(self.original))  # type: ignore[assignment]
        plans = self._plans(index, step)
        decided = [Decision.from_dict(d, p) for d, p in zip(read_json(notes), plans.values(), strict=True)]
        return network, decided

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
                          progress=Terms(folder, getattr(step, "epochs", 0), self.processes.first, self.progress),
                          plans=self._made(index))
        after = step.fit(before, self.task, context)
        return after, self._plans(index, step)

    def _made(self, index: int) -> tuple[Plan, ...]:
        """The plans that led to what step ``index`` works on, as they were applied."""
        found: list[Plan] = []
        for number, step in enumerate(self.recipe.steps[:index - 1], 1):
            own, whose = self._plans(number, step), planners(step)
            found += [own[place] for place in sorted(own, key=lambda p: int(getattr(whose[p], "stage", 0)))]
        return tuple(found)

    def _plans(self, index: int, step: Step) -> dict[int, Plan]:
        """The plans that step ``index`` made, by the places of their ``planners``."""
        folder = self.state.folder / f"step_{index}"
        names = ["plan.safetensors"] if isinstance(step, Rewrite) else [
            f"during_{i}.plan" for i in range(len(planners(step)))]
        return {i: Plan.load(folder / name) for i, name in enumerate(names) if (folder / name).exists()}

    # ---- figures
    def deployed(self, index: int) -> Path:
        """The exported file of step ``index``."""
        return self.state.folder / f"step_{index}" / f"model{deploy.target(self.target).suffix}"

    def _measurement(self, index: int, network: Network, step: Step | None, done: int) -> Measurement:
        file = self.state.folder / f"step_{index}" / "measurement.json"
        if index < done:
            return Measurement.from_dict(read_json(file))
        name = "original" if step is None else kind_of(step)
        self._tell(f"measure {name}", index, {})

        def take() -> dict[str, Any]:
            split = "validation" if self.task.has("validation") else "calibration"
            earlier = {"original": self.deployed(0)} if index else {}
            if index > 1:
                earlier["before"] = self.deployed(index - 1)
            found = self._measure(network, split, name, self.state.step(index), earlier)
            write_json(file, found.to_dict())
            return found.to_dict()

        found = Measurement.from_dict(self.processes.share(take))
        self._tell(f"measured {name}", index, figures(found))
        return found

    def _measure(self, network: Network, split: str, name: str, folder: Path,
                 beside: Mapping[str, Path]) -> Measurement:
        with generators_kept():
            seed_all(seed_from(self.seed, "measure", split))
            return measure.measure(network, self.task, self.target, split, name, folder, self.threads,
                                   {k: file for k, file in beside.items() if file.exists()}, archive=True,
                                   memory=self.memory, seconds=self.seconds)

    def _final(self, network: Network) -> Final | None:
        if not self.task.has("test"):
            return None
        file = self.state.folder / "final.json"

        def take() -> list[dict[str, Any]]:
            if not file.exists():
                before = self._measure(self.original, "test", "original", self.state.folder / "final_before", {})
                after = self._measure(network, "test", "compressed", self.state.folder / "final_after",
                                      {"original": self.deployed(0)})
                write_json(file, [before.to_dict(), after.to_dict()])
            return list(read_json(file))

        self._tell("measure on the test split", len(self.recipe.steps), {})
        before, after = (Measurement.from_dict(m) for m in self.processes.share(take))
        return Final(before, after)

    def _tell(self, what: str, done: int, facts: Mapping[str, float]) -> None:
        if self.processes.first:
            self.progress(what, done, len(self.recipe.steps), facts)


def figures(found: Measurement) -> dict[str, float]:
    """What a listener is told of a measurement."""
    told: dict[str, float] = {"params": found.params, "macs": found.macs, "file_bytes": found.file_bytes}
    if found.latency is not None:
        told["latency_s"] = found.latency.median_s
    if found.score is not None:
        told[found.score_name] = found.score
    return told


def check_growth(index: int, step: Rewrite, plan: Plan, before: Network, after: Network) -> None:
    """Raises PlanError if ``after`` has more parameters than ``before`` and the plan did not say so."""
    old, new = measure.params(before), measure.params(after)
    if new > old and "params" not in plan.grows:
        raise PlanError(f"step {index} ({kind_of(step)}) grew the network from {old} to {new} parameters without "
                        "saying so in its plan's grows; this is a fault of the step")


def named_types(network: Network) -> dict[str, type]:
    """The classes (by qualified name) that the network's outputs are made of, for ``load``."""
    spec, found = network.signature.out_spec, {}

    def visit(value: Any) -> None:
        if isinstance(value, int):
            return
        found[f"{type(value).__module__}.{type(value).__qualname__}"] = type(value)
        if dataclasses.is_dataclass(value):
            items: Iterable[Any] = [getattr(value, f.name) for f in dataclasses.fields(value)]
        else:
            items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
        for item in items:
            visit(item)

    visit(trees.unflatten(range(spec.num_leaves), spec))
    return found
