"""``Logits``: the student's outputs drawn to the teacher's (Hinton, Vinyals and Dean 2015, section 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from featherweight.distill.cache import OutputCache, check_folder
from featherweight.distill.losses.response import (
    correlated,
    decoupled,
    divergence,
    multi_level,
    rows,
    standardized,
)
from featherweight.distill.outputs import Where, check_output, choose, counted, targets
from featherweight.distill.teachers import Teacher, check_teacher, started, tried
from featherweight.errors import RecipeError
from featherweight.network import Network
from featherweight.network.devices import device_of
from featherweight.steps import Companion, Context
from featherweight.steps.options import Numbers, check_known, check_numbers
from featherweight.task import Batch, Inputs, Task, call

NUMBERS = {"temperature": Numbers(4.0, above=0), "axis": Numbers(1, whole=True),
           "weight": Numbers(0.9, least=0, most=1, noun="the teacher's share,")}


@dataclass(frozen=True)
class ResponseCase:
    """What a loss of the table is given: logits of both, the positions that count, the target, T and the axis."""

    student: Tensor
    teacher: Tensor
    mask: Tensor | None
    target: Any
    temperature: float
    axis: int

    def rows(self) -> tuple[Tensor, Tensor]:
        """Both as [positions, classes]."""
        return rows(self.student, self.axis, self.mask), rows(self.teacher, self.axis, self.mask)

    def classes(self) -> Tensor:
        """Target classes of the positions that count."""
        found = targets(self.target, "Logits(loss='dkd')")
        return found[self.mask] if self.mask is not None else found.reshape(-1)


#: name -> loss; the sources stand in ``losses/response.py``
LOSSES: dict[str, Callable[[ResponseCase], Tensor]] = {
    "kd": lambda c: divergence(c.student, c.teacher, c.temperature, c.axis, c.mask),
    "dkd": lambda c: decoupled(*c.rows(), c.classes(), c.temperature),
    "dist": lambda c: correlated(*c.rows(), c.temperature),
    "mlkd": lambda c: multi_level(*c.rows(), (c.temperature / 2, c.temperature, 1.5 * c.temperature)),
}


@dataclass(frozen=True)
class Logits:
    """The loss ``weight * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - weight) * task loss``.

    temperature: T. weight: share of the teacher, 0..1; 1 needs no targets.
    teacher: a network, the path of a saved one, a module (on any device), a function of the inputs, or several of them
        as a tuple, whose outputs are averaged; None is the original, before any step.
    output: which output, where there are several: a key, a field name or a position; None is the first floating
        tensor. axis: of the classes: 1 for [n, k] and for maps [n, k, h, w], -1 for sequences [n, t, k].
    loss: "kd" as above; "dkd" parts the target class from the others, "dist" compares correlations, "mlkd" adds the
        relations of samples and of classes. standardize: each sample's logits to mean 0 and deviation 1 first.
    mask: where it counts: a key of the inputs ("attention_mask"), or a function of (inputs, target) giving a mask.
    cache: a folder where the teacher's outputs are kept, by content, for data that is not augmented; in float16, or in
        float32 where that would overflow.

    The divergence is summed over the classes and averaged over all else. Used as ``recover.Train(distill=Logits())``,
    or beside other companions as ``recover.Train(beside=(Logits(), ...))``: the term is ``weight * T^2 * KL(...)``, and
    1 - weight is the factor on the task's loss.

    Example:
        >>> taught = fw.recover.Train(epochs=1, distill=fw.distill.Logits(temperature=4.0, weight=0.9))
        >>> trained = taught.fit(network, task, fw.steps.Context(original=network))
    """

    temperature: float = 4.0
    weight: float = 0.9
    teacher: Any = field(default=None, repr=False, metadata={"file": True})
    output: str | int | None = None
    axis: int = 1
    loss: str = "kd"
    standardize: bool = False
    mask: Where = field(default=None, repr=False)
    cache: str | None = None

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        check_numbers(self, NUMBERS)
        check_known("Logits", "loss", self.loss, LOSSES)
        check_output(self)
        check_teacher("Logits", self.teacher)

    def check_on(self, network: Network, task: Task, batch: Batch) -> None:
        """Raises RecipeError where the teacher, or the loss of what it gives, does not fit what ``network`` gives for a
        batch; FileError where there is no room for a cache."""
        teacher = tried(self.teacher, network, batch[0], "Logits")
        if self.cache is not None:
            teacher.mark()
            check_folder(self.cache)
        with torch.no_grad():
            found = _Response(self, teacher, None).loss(batch[0], call(network, batch[0]), batch[1])
        if not bool(found.isfinite()):
            raise RecipeError(f"the loss of distill.Logits is {float(found)} on the first batch, before any step; look "
                              "at what the teacher gives: its outputs must be finite")

    def start(self, network: Network, task: Task, context: Context) -> Companion:
        """The teacher in evaluation mode on the network's device. Raises RecipeError where there is no teacher."""
        self.check()
        device = device_of(network)
        teacher = started(self.teacher, context.original, device, "Logits")
        return _Response(self, teacher, OutputCache(self.cache, teacher) if self.cache is not None else None)


@dataclass(frozen=True)
class _Response(Companion):
    options: Logits
    teacher: Teacher
    cache: OutputCache | None

    @property
    def task_weight(self) -> float:
        return 1 - self.options.weight

    def loss(self, inputs: Inputs, output: Any, target: Any) -> Tensor:
        options = self.options
        given, wanted = choose(output, options.output), self._wanted(inputs)
        if not -given.dim() <= options.axis < given.dim():
            raise RecipeError(f"Logits(axis={options.axis}) names no axis of outputs {list(given.shape)}; "
                              "write Logits(axis=1), or axis=-1 for the last")
        if wanted.shape != given.shape:
            raise RecipeError(f"the teacher's output has shape {list(wanted.shape)}, the student's "
                              f"{list(given.shape)}; the classes must be equal; choose another by Logits(output=...)")
        if options.standardize:
            given, wanted = standardized(given, options.axis), standardized(wanted, options.axis)
        case = ResponseCase(given, wanted, counted(options.mask, inputs, target), target, options.temperature,
                            options.axis)
        return options.weight * LOSSES[options.loss](case)

    def _wanted(self, inputs: Inputs) -> Tensor:
        found = self.cache.outputs(inputs) if self.cache is not None else None
        if found is None:
            with torch.no_grad():
                found = choose(self.teacher.values(inputs)[0], self.options.output, "the teacher")
            if self.cache is not None:
                found = self.cache.outputs(inputs, found)
                assert found is not None
        return found.to(self.teacher.device)

    def finish(self) -> None:
        if self.cache is not None:
            self.cache.flush()

    def close(self) -> None:
        if self.cache is not None:
            self.cache.flush()


__all__ = ["LOSSES", "Logits", "choose", "divergence"]
