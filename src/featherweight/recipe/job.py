"""``Job``: a whole job in one TOML file: which model, which task, what to do with it.

    [model]
    name = "torchvision:resnet18"     # or "timm:...", "transformers:..."
    weights = "resnet18.pth"          # or factory = "mymodels:resnet20" (module:function), or file = "network.fw"
    arguments = {num_classes = 3}
    [data]
    images = "folder"                 # or csv = "rows.csv", npz = "arrays.npz"; options of fw.task.images and the like
    size = 224                        # or, in the place of [data]: [task] with factory = "mydata:task" and arguments
    [compress]
    target = "onnxruntime"
    out = "out"
    [[steps]]
    kind = "prune.Channels"
    macs = 0.5

In the place of steps, ``featherweight search`` takes a [goal]: limits of ``fw.Budget``, and options of ``fw.search``;
the steps are then no more than a training, after the cut.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featherweight import deploy
from featherweight.errors import FeatherweightError, RecipeError
from featherweight.network import Assembly, Network, capture, load
from featherweight.recipe import toml
from featherweight.recipe.apply import Progress, compress
from featherweight.recipe.kinds import make
from featherweight.recipe.recipe import Recipe
from featherweight.recipe.result import Result
from featherweight.task import SPLITS, Inputs, Task, batch_size
from featherweight.task.named import Source, model_named


@dataclass(frozen=True)
class Model:
    """factory: "module:function", which gives a module, a (module, example inputs) pair or a Network; or name:
    "package:name" of timm, torchvision or transformers, with the file of its ``weights``; or file: a saved Network."""

    factory: str | None = None
    file: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    weights: str | None = None

    def check(self) -> None:
        if sum(given is not None for given in (self.factory, self.file, self.name)) != 1:
            raise RecipeError('[model] names a factory or a file, one of the two; write factory = "module:function", '
                              'or a name alone, of timm, torchvision or transformers: name = "torchvision:resnet18"')
        if self.weights is not None and self.name is None:
            raise RecipeError("[model] weights are for a model that has a name; let the factory load them, or write "
                              'name = "torchvision:resnet18"')


@dataclass(frozen=True)
class Data:
    """factory: "module:function", which gives a Task."""

    factory: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """What ``compress`` is told; folder: of this file's, where paths and modules are looked for."""

    target: str = "onnxruntime"
    out: str = "out"
    seed: int = 0
    threads: int = 1
    seconds: float = 1.0
    memory: bool = False
    folder: str = "."

    def check(self) -> None:
        """Raises ExportError for an unknown target."""
        deploy.target(self.target)


@dataclass(frozen=True)
class Job:
    """A job; ``folder`` (of its file) is searched for modules too, after the current one.

    Example:
        >>> job = fw.Job.from_toml('''
        ... [model]
        ... file = "network.fw"
        ... [task]
        ... factory = "mydata:task"
        ... [[steps]]
        ... kind = "prune.Channels"
        ... macs = 0.5
        ... ''')
        >>> job.recipe.steps[0].macs
        0.5
    """

    model: Model
    task: Data | Source
    options: Options
    recipe: Recipe
    folder: str = "."
    goal: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_toml(cls, source: str | Path) -> Job:
        """The job in a TOML file or text. Raises RecipeError for unknown tables, keys and kinds."""
        tables = toml.parse(source)
        if "model" not in tables:
            raise RecipeError('the job has no [model]; write [model] and factory = "module:function" under it')
        if ("task" in tables) == ("data" in tables):
            many = "both [task] and [data]" if "task" in tables else "no [task]"
            raise RecipeError(f'the job has {many}; write [task] and factory = "module:function" under it, or [data] '
                              'and images = "folder"')
        for name in ("model", "task", "data", "compress", "goal"):
            if not isinstance(tables.get(name, {}), Mapping):
                raise RecipeError(f"{name} is no table; write [{name}]")
        data: Data | Source = (make(Data, tables["task"], "[task]") if "task" in tables else Source.of(tables["data"]))
        options: Options = make(Options, tables.get("compress", {}), "[compress]")
        place = Path(source).resolve().parent if toml.is_path(source) else Path()
        return cls(make(Model, tables["model"], "[model]"), data, options, Recipe.from_toml(source),
                   os.path.normpath(place / options.folder), tables.get("goal", {}))

    def to_toml(self) -> str:
        """TOML text that ``from_toml`` reads back."""
        goal = f"[goal]\n{toml.write(self.goal)}\n" if self.goal else ""
        return self.preface() + goal + self.recipe.to_toml()

    def preface(self, out: str | None = None, folder: str | None = None) -> str:
        """The tables ahead of the steps; ``out`` is named instead of the options' own, and ``folder``, from which paths
        are told, where it is given."""
        options = replace(self.options, out=self.options.out if out is None else out, folder=folder or ".")
        rows = ""
        data = ("data", self.task.table()) if isinstance(self.task, Source) else ("task", vars(self.task))
        for name, table in (("model", vars(self.model)), data, ("compress", vars(options))):
            given = {f: v for f, v in table.items() if v is not None and v != {} and (f, v) != ("folder", ".")}
            rows += f"[{name}]\n{toml.write(given)}\n"
        return rows

    def prepare(self) -> tuple[Network, Task]:
        """The network (captured, if the factory gives a module) and the task. Raises RecipeError."""
        task, model = self._task(), self.model
        if model.file is not None:
            own = Path(self.folder, model.file)
            made: Any = load(own if own.exists() and not Path(model.file).exists() else model.file)
        elif model.name is not None:
            made = model_named(model.name, model.arguments, model.weights, self.folder)
        else:
            made = call_factory(str(model.factory), model.arguments, self.folder, "[model]")
        return as_network(made, task, str(model.file or model.name or model.factory)), task

    def _task(self) -> Task:
        if isinstance(self.task, Source):
            return self.task.task(self.folder)
        task = call_factory(self.task.factory, self.task.arguments, self.folder, "[task]")
        if not isinstance(task, Task):
            raise RecipeError(f"[task] factory {self.task.factory!r} gave a {type(task).__name__}; expected a fw.Task")
        return task

    def run(self, progress: Progress | None = None, resume: bool = True, out: str | Path | None = None) -> Result:
        """Does the job; ``out`` overrides the file's. The recipe that it leaves names another folder, ``out`` +
        "-again", so that running it computes all anew and can be compared. Raises RecipeError for a job with a goal."""
        if self.goal:
            raise RecipeError("the job has a [goal], for which the steps are to be found; write featherweight search "
                              "and the file's name")
        network, task = self.prepare()
        given = self.options
        folder = Path(out or given.out)
        preface = self.preface(f"{folder.as_posix()}-again", Path(os.path.relpath(self.folder, folder)).as_posix())
        return compress(network, task, self.recipe, given.target, folder, given.threads, given.seed, progress, resume,
                        seconds=given.seconds, memory=given.memory, preface=preface)


def as_network(made: Any, task: Task, name: str) -> Network:
    """The network in what a file or factory ``name`` gave: a Network, a module, or a pair (module, example inputs); a
    module alone is captured on two samples of the task's data. Raises RecipeError for anything else."""
    example = None
    if isinstance(made, tuple) and len(made) == 2:
        made, example = made
    if isinstance(made, nn.Module) and not isinstance(made, (Network, Assembly)):
        made = capture(made, example_of(task) if example is None else example)
    if isinstance(made, Assembly):
        raise RecipeError(f"the model can be captured in parts only, {', '.join(made.parts)}: {'; '.join(made.notes)}; "
                          f"let {name!r} return one of them: "
                          f"fw.capture(model, inputs).parts[{next(iter(made.parts), '')!r}]")
    if not isinstance(made, Network):
        raise RecipeError(f"{name!r} gave a {type(made).__name__}; expected a torch.nn.Module, a pair (module, example "
                          "inputs) or a fw.Network")
    return made


def example_of(task: Task) -> Inputs:
    """Two samples of the task's first batch, to capture a model with."""
    split = next((s for s in ("calibration", "validation", "train") if task.has(s)), None)
    if split is None:
        raise RecipeError("the task has no data to capture the model with; let the model's factory return "
                          f"(model, example_inputs), or write Task({SPLITS[0]}=...)")
    inputs, _ = next(iter(task.batches(split)))
    size = batch_size(inputs)

    def few(value: Any) -> Any:
        return value[:2] if isinstance(value, Tensor) and value.dim() and value.shape[0] == size else value

    return torch.utils._pytree.tree_map(few, inputs)  # type: ignore[no-any-return]


def factory_named(name: str, folder: str, where: str) -> Callable[..., Any]:
    """The function "module:function"; modules are looked for in ``folder`` too. Raises RecipeError where it is not
    there."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise RecipeError(f"{where} factory is {name!r}; expected module:function, e.g. \"mymodels:resnet20\"")
    for place in (str(Path(folder).resolve()), str(Path.cwd())):
        if place not in sys.path:
            sys.path.insert(0, place)
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise RecipeError(f"{where} factory {name!r}: there is no module {error.name!r} in the current folder, the "
                          "recipe's folder or the Python path") from error
    if not callable(found):
        raise RecipeError(f"{where} factory {name!r}: module {module!r} has no function {function!r}")
    made: Callable[..., Any] = found
    return made


def call_factory(name: str, arguments: Mapping[str, Any], folder: str, where: str) -> Any:
    """What the function "module:function" gives for ``arguments``."""
    found = factory_named(name, folder, where)
    try:
        return found(**arguments)
    except TypeError as error:
        raise RecipeError(f"{where} factory {name!r} called with {dict(arguments)}: {error}") from error
    except FeatherweightError:
        raise
    except Exception as error:
        raise RecipeError(f"your function {name!r} raised {type(error).__name__}: {error}") from error
