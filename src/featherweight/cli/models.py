"""Models and tasks as the command line names them."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from pathlib import Path
from typing import Any

from featherweight import deploy
from featherweight.errors import FileError, RecipeError
from featherweight.network import Network, load
from featherweight.recipe import Job, toml
from featherweight.recipe.job import as_network, call_factory
from featherweight.task import Task


def task_named(name: str | None) -> Task:
    """The Task that ``module:function`` gives; one without data where no name was given."""
    if name is None:
        return Task()
    task = call_factory(name, {}, ".", "--task")
    if not isinstance(task, Task):
        raise RecipeError(f"--task {name!r} gave a {type(task).__name__}; expected a featherweight.Task")
    return task


def network_named(name: str, task: Task) -> Network:
    """A saved ``.fw`` file, or what ``module:function`` gives: a Network, a module, or (module, example inputs)."""
    if ":" not in name or Path(name).is_file():
        if name.endswith(".fwz"):
            raise FileError(f"{name} is an archive; write featherweight unpack {name} {name[:-1]} first")
        suffixes = [target.suffix for target in deploy.TARGETS.values() if Path(name).suffix == target.suffix]
        if suffixes:
            raise FileError(f"{name} is a deployed file, which holds no network; name the network that it was made of, "
                            "e.g. network.fw beside it")
        model: Any = load(name)
    else:
        model = call_factory(name, {}, ".", "the model's")
    return as_network(model, task, name)


def network_and_task(name: str, task: str | None) -> tuple[Network, Task]:
    """The network and its task: those of a job file (``*.toml``), or what ``network_named`` and ``task_named`` give; a
    task that is named comes before the job's."""
    if name.endswith(".toml"):
        network, data = job_of(Path(name), []).prepare()
        return network, data if task is None else task_named(task)
    data = task_named(task)
    return network_named(name, data), data


def job_of(recipe: Path, settings: list[str]) -> Job:
    """The job in a TOML file, after ``--set`` was heard: "compress.target=...", "steps.1.macs=0.4" (the first step is
    1), "task.arguments.folder=..."."""
    if not settings:
        return Job.from_toml(recipe)
    tables = toml.parse(recipe)
    for setting in settings:
        _set(tables, setting)
    steps = tables.pop("steps", [])
    text = "".join(f"[{name}]\n{toml.write(table)}" for name, table in tables.items())
    text += "".join(f"[[steps]]\n{toml.write(step)}" for step in steps)
    job = Job.from_toml(text + "\n")
    return dataclasses.replace(job, folder=os.path.normpath(recipe.resolve().parent / job.options.folder))


def _set(tables: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    path = key.strip().split(".")
    if not equals or len(path) < 2 or not all(path):
        raise RecipeError(f"--set {setting!r}: expected table.key=value, e.g. --set compress.target=onnxruntime or "
                          "--set steps.1.macs=0.4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text  # a bare word is a string
    place: Any = tables
    for depth, step in enumerate(path[:-1]):
        if isinstance(place, list):
            if not step.isdecimal() or not 1 <= int(step) <= len(place):
                raise RecipeError(f"--set {setting!r}: there is no step {step}; the recipe has steps 1 to {len(place)}")
            place = place[int(step) - 1]
        elif isinstance(place, dict):
            place = place.setdefault(step, [] if depth == 0 and step == "steps" else {})
        else:
            raise RecipeError(f"--set {setting!r}: {'.'.join(path[:depth])} is {place!r}, no table")
    if not isinstance(place, dict):
        raise RecipeError(f"--set {setting!r}: {'.'.join(path[:-1])} is no table; write e.g. --set steps.1.macs=0.4")
    place[path[-1]] = value

