"""``Recipe``: steps in an order that makes sense."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.errors import RecipeError
from featherweight.recipe import toml
from featherweight.recipe.kinds import build, line, validated
from featherweight.recover import Train
from featherweight.steps import Fit, Plan, Rewrite, Stage, Step
from featherweight.steps.companion import beside
from featherweight.steps.kinds import kind_of


@dataclass(frozen=True)
class Recipe:
    """Steps, applied one after another. Rewrites come in the order STRUCTURE, SPARSITY, PRECISION; Fits go anywhere,
    but ``recover.Train`` cannot train what ``quantize`` made integers.

    Raises RecipeError for steps out of order, with the recipe to write instead, and for options that make no sense.

    Example:
        >>> recipe = fw.Recipe([fw.prune.Channels(macs=0.5), fw.recover.Train(epochs=5), fw.quantize.Quantize()])
        >>> print(recipe.to_toml())
        [[steps]]
        kind = "prune.Channels"
        macs = 0.5
        ...
    """

    steps: tuple[Step, ...] = ()

    def __init__(self, steps: Iterable[Step] = ()) -> None:
        if isinstance(steps, (Rewrite, Fit)):
            raise RecipeError(f"a recipe is a list of steps; write fw.Recipe([{line(steps)}])")
        if isinstance(steps, (str, type)) or not isinstance(steps, Iterable):
            raise RecipeError(f"a recipe is a list of steps, not {steps!r}; write fw.Recipe([fw.quantize.Quantize()]), "
                              "or fw.Recipe.from_toml(...) for a file")
        object.__setattr__(self, "steps", tuple(validated(step) for step in steps))
        for step in self.steps:
            if not isinstance(step, (Rewrite, Fit)):
                raise RecipeError(f"{line(step)} is no step of its own; write fw.recover.Train(distill={line(step)})")
        check_order(self.steps)

    @classmethod
    def from_toml(cls, source: str | Path) -> Recipe:
        """The recipe in a TOML file (Path, or a string ending in ".toml") or text: its ``[[steps]]`` tables."""
        return cls(build(table, f"step {i}") for i, table in enumerate(toml.parse(source).get("steps", []), 1))

    def to_toml(self, complete: bool = False) -> str:
        """TOML text that ``from_toml`` reads back as an equal recipe.

        complete: options at their defaults are written too, so that it means the same where defaults are others.
        """
        return "\n".join("[[steps]]\n" + toml.write(toml.describe(step, complete)) for step in self.steps)

    def __str__(self) -> str:
        return text(self.steps)


def text(steps: Iterable[Step]) -> str:
    """The recipe as Python."""
    return "fw.Recipe([\n" + "".join(f"    {line(step)},\n" for step in steps) + "])"


def planners(step: Step) -> tuple[Any, ...]:
    """What may leave a plan when a step is done: the step itself, or all that works beside a Fit."""
    return (step,) if isinstance(step, Rewrite) else beside(step)


def plan_files(folder: Path, step: Step) -> dict[int, Path]:
    """The plans that a step left in its folder, by the places of their ``planners``."""
    names = ["plan.safetensors"] if isinstance(step, Rewrite) else [
        f"during_{i}.plan" for i in range(len(planners(step)))]
    return {i: folder / name for i, name in enumerate(names) if (folder / name).exists()}


def plans_made(places: Iterable[tuple[Path, Step]]) -> tuple[Plan, ...]:
    """The plans of steps that were done in these folders, as they were applied."""
    found: list[Plan] = []
    for folder, step in places:
        files, whose = plan_files(folder, step), planners(step)
        found += [Plan.load(files[i]) for i in sorted(files, key=lambda i: int(getattr(whose[i], "stage", 0)))]
    return tuple(found)


def rewrites(step: Step) -> tuple[Rewrite, ...]:
    """The rewrites that a step makes, in the order in which their plans are applied."""
    return tuple(sorted((r for r in planners(step) if isinstance(r, Rewrite)), key=lambda r: r.stage))


def aimed(step: Step, target: str) -> Step:
    """The step with ``target`` where it, or what works beside it, leaves open for which runtime it plans."""
    changed: dict[str, Any] = {"target": target} if getattr(step, "target", target) is None else {}
    for name in ("during", "beside"):
        within = tuple(getattr(step, name, ()))
        aims = tuple(aimed(r, target) for r in within)
        if aims != within:
            changed[name] = aims
    inner = getattr(step, "step", None)  # of those that choose its options
    if isinstance(inner, Rewrite):
        changed["step"] = aimed(inner, target)
    return dataclasses.replace(step, **changed) if changed else step  # type: ignore[type-var]


def check_order(steps: tuple[Step, ...]) -> None:
    """Raises RecipeError if a stage comes after a later one, or training after integers."""
    reached: Rewrite | None = None
    for step in steps:
        if reached is not None and _trains_integers(step, reached):
            raise RecipeError(f"{line(step)} comes after {line(reached)}, which leaves integers, not to be trained; "
                              f"write\n{text(ordered(steps))}\nor put it inside: "
                              f"fw.recover.Train(during=({line(reached)},))")
        for rewrite in rewrites(step):
            if reached is not None and rewrite.stage < reached.stage:
                raise RecipeError(
                    f"{line(rewrite)} ({_stage(rewrite)}) comes after {line(reached)} ({_stage(reached)}); the order "
                    f"is structure, sparsity, precision: write\n{text(ordered(steps))}")
            reached = rewrite


def _stage(rewrite: Rewrite) -> str:
    return Stage(rewrite.stage).name.lower()


def _trains_integers(step: Step, reached: Rewrite) -> bool:
    return isinstance(step, Train) and kind_of(getattr(reached, "step", reached)).startswith("quantize.")


def ordered(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The same steps in an order that is allowed: every rewrite, with the Fits after it, moved to its stage; training
    moved before quantization."""
    groups: list[list[Step]] = [[]]
    for step in steps:
        if rewrites(step):
            groups.append([step])
            continue
        late = [i for i, g in enumerate(groups) if g and any(_trains_integers(step, r) for r in rewrites(g[0]))]
        groups[late[0] - 1 if late else -1].append(step)
    first, *rest = groups
    rest.sort(key=lambda g: max(r.stage for r in rewrites(g[0])))
    return (*first, *(step for group in rest for step in group))
