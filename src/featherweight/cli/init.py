"""``featherweight init``: a job file that runs, with what else could be written beside it as comments."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from featherweight.errors import RecipeError
from featherweight.recipe.job import factory_named
from featherweight.task.images import classes, least_side
from featherweight.task.named import PACKAGES, SOURCES, Source
from featherweight.task.table import words

#: what a package calls the number of classes -> in the arguments of its models
COUNTS = {"timm": "num_classes", "torchvision": "num_classes", "transformers": "num_labels"}
STEPS = """
# What is done, from top to bottom. Steps need no order of yours beyond: structure first, then zeros, then numbers.
# featherweight inspect shows the layers; every step is a table, its options are those of the class in Python.

# Half of the multiply-accumulates, taken where it hurts least; then the rest is trained, taught by the untouched model.
# [[steps]]
# kind = "prune.Channels"
# macs = 0.5
# score = "reconstruction"
# allocation = "sensitivity"
# compensate = "least_squares"
#
# [[steps]]
# kind = "recover.Train"
# epochs = 5
# lr = 0.01
# distill = {kind = "distill.Logits", temperature = 4.0}

# Weights and activations of 8 bits, by calibration data: no training.
[[steps]]
kind = "quantize.Quantize"
weights = "int8"
activations = "uint8"
"""


def text(model: str, weights: str | None, data: Source | str, target: str, out: str) -> str:
    """The job as TOML. data: what the files hold, or the module:function that gives the task. Raises RecipeError or
    TaskError where a file or function is not there, or is none that the job could read."""
    _check(model, weights, data)
    data = sized(data) if isinstance(data, Source) else data
    rows = [f"# Run it: featherweight compress {out}", "", "[model]"]
    package = model.partition(":")[0]
    if model.endswith(".fw"):
        rows.append(f"file = {quoted(model)}    # a saved network")
    elif package in PACKAGES:
        rows.append(f"name = {quoted(model)}")
        rows.append(f"weights = {quoted(weights)}" if weights is not None else
                    '# weights = "model.safetensors"    # the file of its trained state')
        count = 0 if isinstance(data, str) else len(kinds_of(data))
        if count:
            rows.append(f"arguments = {{{COUNTS[package]} = {count}}}")
    else:
        rows.append(f"factory = {quoted(model)}    # module:function that gives the module")
    rows += ["", *(["[task]", f"factory = {quoted(data)}    # module:function that gives the fw.Task"]
                   if isinstance(data, str) else _data(data))]
    rows += ["", "[compress]", f"target = {quoted(target)}    # the runtime that the file is for",
             'out = "out"    # the folder of the results: the file, report.html, result.json']
    return "\n".join(rows) + "\n" + STEPS


def _check(model: str, weights: str | None, data: Source | str) -> None:
    """Looks for all that the job names. Tokenizers and models of packages may have to be fetched: they wait for it."""
    files = {"--model": model if model.endswith(".fw") else None, "--weights": weights}
    for flag, path in files.items():
        if path is not None and not Path(path).is_file():
            raise RecipeError(f"{flag} {path}: no such file; expected one that is there, seen from the job file")
    if not model.endswith(".fw") and model.partition(":")[0] not in PACKAGES:
        factory_named(model, ".", "the model's")
    if isinstance(data, str):
        factory_named(data, ".", "the task's")
    else:
        Source(data.kind, data.path, {key: print if key == "tokenizer" else value
                                      for key, value in data.options.items()}).task(".")


def _data(data: Source) -> list[str]:
    """The table of the files, with the other options of what reads them as comments."""
    parameters = list(inspect.signature(data.reader).parameters.values())[1:]
    return ["[data]", *(f"{key} = {quoted(value)}" for key, value in data.table().items()),
            *(f"# {p.name} = {quoted(p.default)}" for p in parameters
              if p.name not in data.options and p.default is not p.empty and p.default is not None)]


def sized(data: Source) -> Source:
    """Images that are smaller than what they would be made are taken at their own size."""
    if data.kind != "images":
        return data
    usual, own = inspect.signature(data.reader).parameters["size"].default, least_side(data.path)
    small = {"size": own, "resize": own} if own < usual else {}
    return Source(data.kind, data.path, {**small, **data.options})


def kinds_of(data: Source) -> list[str]:
    """The classes that the data have; none where that is not known without reading them all."""
    if data.kind == "images":
        return classes(data.path)
    if data.kind == "csv":
        return words(data.path, str(data.options["target"]))
    return []


def quoted(value: Any) -> str:
    """A value as TOML has it."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def source(given: dict[str, str | None], options: dict[str, str | None], ask: Callable[[str], str]) -> Source | str:
    """The data that the flags name, or the task's module:function; ``ask`` is called for what they leave out. Raises
    RecipeError for several."""
    named = {kind: path for kind, path in given.items() if path is not None}
    if len(named) > 1:
        raise RecipeError(f"both {' and '.join(f'--{kind}' for kind in named)} were given; write one of "
                          f"{', '.join(f'--{kind}' for kind in (*SOURCES, 'task'))}")
    if not named:
        path = ask("data: a folder of images, a .csv or a .npz file, or the module:function of a task")
        named = {{".csv": "csv", ".npz": "npz"}.get(Path(path).suffix, "task" if ":" in path[2:] else "images"): path}
    kind, path = next(iter(named.items()))
    if kind == "task":
        return path
    own = {key: value for key, value in options.items() if value is not None}
    if kind == "csv" and "target" not in own:
        own["target"] = ask("the column to predict")
    return Source.of({kind: path, **own})


__all__ = ["source", "text"]
