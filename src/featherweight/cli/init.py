"""``featherweight init``: a job file that runs, with what else could be written beside it as comments."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from featherweight.errors import RecipeError
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


def text(model: str, weights: str | None, data: Source, target: str, out: str) -> str:
    """The job as TOML. Raises RecipeError where the data are not there."""
    data = sized(data)
    rows = [f"# Run it: featherweight compress {out}", "", "[model]"]
    package = model.partition(":")[0]
    if model.endswith(".fw"):
        rows.append(f"file = {quoted(model)}    # a saved network")
    elif package in PACKAGES:
        rows.append(f"name = {quoted(model)}")
        rows.append(f"weights = {quoted(weights)}" if weights is not None else
                    '# weights = "model.safetensors"    # the file of its trained state')
        count = len(kinds_of(data))
        if count:
            rows.append(f"arguments = {{{COUNTS[package]} = {count}}}")
    else:
        rows.append(f"factory = {quoted(model)}    # module:function that gives the module")
    rows += ["", "[data]", *(f"{key} = {quoted(value)}" for key, value in data.table().items())]
    parameters = list(inspect.signature(data.reader).parameters.values())[1:]
    rows += [f"# {p.name} = {quoted(p.default)}" for p in parameters
             if p.name not in data.options and p.default is not p.empty and p.default is not None]
    rows += ["", "[compress]", f"target = {quoted(target)}    # the runtime that the file is for",
             'out = "out"    # the folder of the results: the file, report.html, result.json']
    return "\n".join(rows) + "\n" + STEPS


def sized(data: Source) -> Source:
    """Images that are smaller than what they would be made are taken at their own size."""
    if data.kind != "images":
        return data
    usual, own = inspect.signature(data.reader).parameters["size"].default, least_side(data.path)
    small = {"size": own, "resize": own} if own is not None and own < usual else {}
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


def source(given: dict[str, str | None], options: dict[str, str | None], ask: Callable[[str], str]) -> Source:
    """The data that the flags name; ``ask`` is called for what they leave out. Raises RecipeError for several."""
    named = {kind: path for kind, path in given.items() if path is not None}
    if len(named) > 1:
        raise RecipeError(f"both {' and '.join(f'--{kind}' for kind in named)} were given; write one of "
                          f"{', '.join(f'--{kind}' for kind in SOURCES)}")
    if not named:
        path = ask("data: a folder of images, a .csv or a .npz file")
        named = {{".csv": "csv", ".npz": "npz"}.get(Path(path).suffix, "images"): path}
    kind, path = next(iter(named.items()))
    own = {key: value for key, value in options.items() if value is not None}
    if kind == "csv" and "target" not in own:
        own["target"] = ask("the column to predict")
    return Source.of({kind: path, **own})


__all__ = ["source", "text"]
