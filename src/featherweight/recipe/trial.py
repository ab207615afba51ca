"""What is found out before the first step: that the task fits the network, and that there is room for the files."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight import deploy
from featherweight.errors import ExportError, FeatherweightError, RecipeError, TaskError
from featherweight.network import Network, trees
from featherweight.network.devices import device_of
from featherweight.seeds import generators_kept
from featherweight.steps import Step
from featherweight.steps.kinds import kind_of
from featherweight.task import Batch, Inputs, Pass, Predict, Task, call, described, move, scores, told

#: files as large as the network that a step leaves (the network, the deployed file), and that a job needs beside
#: (a checkpoint with its optimizer, what is shipped)
STEP, BESIDE = 2, 6


@dataclass(frozen=True)
class OnLogits:
    """A loss that takes logits, given the main tensor of outputs that hold several (as of Hugging Face)."""

    given: Any

    def __call__(self, output: Any, target: Any) -> Tensor:
        found: Tensor = self.given(scores.main_output(output), target)
        return found


def check_place(folder: Path, network: Network, target: str, steps: int) -> None:
    """Raises ExportError where the target's package is not installed, RecipeError where there is no room."""
    package = deploy.target(target).package
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        raise ExportError(f"the target {target!r} needs the package {package}, which is not installed; write "
                          f"pip install 'featherweight[{target}]'")
    near = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(near).free
    wanted = ((steps + 1) * STEP + BESIDE) * sum(t.nbytes for t in network.tensors().values())
    if wanted > free:
        raise RecipeError(f"a job of {steps} steps on this network may need {wanted / 1e9:.3g} GB in {folder}, where "
                          f"{free / 1e9:.3g} GB are free; write another out=...")


def check_finite(network: Network, where: str) -> None:
    """Raises RecipeError where a parameter is not finite, or another tensor is NaN; buffers may hold infinities, as
    attention masks do."""
    parameters = dict(network.named_parameters())
    for name, tensor in network.tensors().items():
        if not tensor.is_floating_point():
            continue
        wrong = ~tensor.isfinite() if name in parameters else tensor.isnan()
        if bool(wrong.any()):
            raise RecipeError(f"{where}: {name!r} holds {int(wrong.sum())} of {tensor.numel()} numbers that are not "
                              "finite; look at what was loaded, or train with a smaller learning rate")


def not_finite(network: Network, inputs: Inputs | None) -> int:
    """How many numbers of the outputs for these inputs are infinite (as scores of padding may be) or NaN."""
    if inputs is None:
        return 0
    mode = network.training
    try:
        with torch.no_grad():
            outputs = call(network.eval(), move(inputs, device_of(network)))
    finally:
        network.train(mode)
    return sum(int((~value.isfinite()).sum()) for value in trees.floats(outputs))


def tried(network: Network, task: Task, batches: Mapping[str, list[Batch]], steps: Sequence[Step] = ()) -> Task:
    """The task with one batch of each split tried: does the network take it, does the loss give a scalar, the score a
    number? Is all there that the steps need, and does nothing in them (a teacher, a cache) fail on it? The task's loss
    takes what the network gives, and errors in either say whose they are. Raises TaskError, or what a step raises."""
    known = told(task)
    for index, step in enumerate(steps, 1):
        with _named(index, step):
            task.require(*step.needs())
    if _known_empty(task.test):
        raise TaskError("the test split holds no batches, and nothing could be scored on it at the end; write "
                        "Task(test=...) with some in it, or leave it out")
    losses = {split for step in steps if "loss" in step.needs() for split in step.needs()}
    with generators_kept():
        known = _tried(network, known, batches, losses)
        for index, step in enumerate(steps, 1):
            for found in [*batches.values()][:1]:
                with _named(index, step):
                    step.check_on(network, known, move(found[0], device_of(network)))
    return known


def _known_empty(split: Any) -> bool:
    """Whether a split says that it is empty, without a pass over it."""
    try:
        return len(getattr(split, "loader", split)) == 0
    except TypeError:
        return False


@contextmanager
def _named(index: int, step: Step) -> Iterator[None]:
    """Says of an error which step it is about."""
    try:
        yield
    except FeatherweightError as error:
        raise type(error)(f"step {index} ({kind_of(step)}): {error}") from error


def _tried(network: Network, known: Task, batches: Mapping[str, list[Batch]], losses: Collection[str]) -> Task:
    """losses: splits on which steps take the loss, whether there is a target or not."""
    for split, found in batches.items():
        if not found:
            raise TaskError(f"the {split} split gave no batches; Task({split}=...) must start a fresh pass at every "
                            "call")
        inputs, target = move(found[0], device_of(network))
        output = _output(network, inputs, split)
        if known.loss is not None and (target is not None or split in losses):
            known = _tried_loss(known, output, target, split)
        if known.score is not None and split == ("validation" if known.has("validation") else "calibration"):
            _tried_score(known, network, found[:1], split)
    return known


def _output(network: Network, inputs: Any, split: str) -> Any:
    try:
        with torch.no_grad():
            return call(network, inputs)
    except Exception as error:
        raise TaskError(f"the network cannot be called with the first batch of the {split} split "
                        f"({_inputs(inputs)}): {error}") from error


def _inputs(inputs: Any) -> str:
    if isinstance(inputs, Mapping):
        return ", ".join(f"{name} {described(item)}" for name, item in inputs.items())
    return ", ".join(map(described, inputs)) if isinstance(inputs, (tuple, list)) else described(inputs)


def _tried_loss(task: Task, output: Any, target: Any, split: str) -> Task:
    """The task, with a loss of logits where only that takes what the network gives."""
    try:
        found = _loss(task, output, target)
    except TaskError as error:
        if isinstance(output, Tensor):
            raise TaskError(f"on the {split} split: {error}") from error.__cause__
        given: Any = task.loss
        other = told(replace(task, loss=OnLogits(given.given)))
        try:
            found, task = _loss(other, output, target), other
        except FeatherweightError:
            raise TaskError(f"on the {split} split: {error}") from error.__cause__
    if not isinstance(found, Tensor) or found.numel() != 1 or found.dim():
        raise TaskError(f"your loss gave {described(found)} on the {split} split; expected a scalar tensor: "
                        "loss(output, target) -> Tensor, e.g. torch.nn.functional.cross_entropy")
    if bool(found.isnan()):
        raise TaskError(f"your loss is NaN on the first batch of the {split} split, before any step; look at that "
                        "data, and at what the loss divides by")
    return task


def _loss(task: Task, output: Any, target: Any) -> Any:
    with torch.no_grad():
        return task.loss(output, target) if task.loss is not None else None


def _tried_score(task: Task, predict: Predict, batches: list[Batch], split: str) -> None:
    if task.score is not None:
        with torch.no_grad():
            task.score(predict, Pass(split, iter(batches)))


__all__ = ["OnLogits", "check_finite", "check_place", "not_finite", "tried"]
