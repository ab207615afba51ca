"""``Logits``: the student's outputs drawn to the teacher's (Hinton, Vinyals and Dean 2015, section 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from featherweight.errors import RecipeError, did_you_mean
from featherweight.network import Network, load
from featherweight.network.devices import device_of, placed
from featherweight.network.trees import flatten
from featherweight.steps import Companion, Context
from featherweight.steps.options import Numbers, check_number, check_numbers
from featherweight.task import Inputs, Task, call

NUMBERS = {"temperature": Numbers(4.0, above=0), "axis": Numbers(1, whole=True),
           "weight": Numbers(0.9, least=0, most=1, noun="the teacher's share,")}


@dataclass(frozen=True)
class Logits:
    """The loss ``weight * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - weight) * task loss``.

    temperature: T. weight: share of the teacher, 0..1; 1 needs no targets.
    teacher: a network, or the path of a saved one; None is the original, before any step.
    output: which output, where there are several: a key, a field name or a position; None is the first floating
        tensor. axis: of the classes: 1 for [n, k] and for maps [n, k, h, w], -1 for sequences [n, t, k].

    The divergence is summed over the classes and averaged over all else. Used as ``recover.Train(distill=Logits())``,
    or beside other companions as ``recover.Train(beside=(Logits(), ...))``: the term is ``weight * T^2 * KL(...)``, and
    1 - weight is the factor on the task's loss.

    Example:
        >>> taught = fw.recover.Train(epochs=1, distill=fw.distill.Logits(temperature=4.0, weight=0.9))
        >>> trained = taught.fit(network, task, fw.steps.Context(original=network))
    """

    temperature: float = 4.0
    weight: float = 0.9
    teacher: Network | str | None = field(default=None, repr=False)
    output: str | int | None = None
    axis: int = 1

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        check_numbers(self, NUMBERS)
        if self.output is not None and not isinstance(self.output, str):
            check_number("Logits", "output", self.output, Numbers(0, whole=True, noun="a key, a field or a position"))

    def start(self, network: Network, task: Task, context: Context) -> Companion:
        """The teacher in evaluation mode on the network's device. Raises RecipeError where there is no teacher."""
        self.check()
        teacher: Any = load(self.teacher) if isinstance(self.teacher, str) else self.teacher
        if teacher is None:
            teacher = context.original
        if not isinstance(teacher, Network):
            raise RecipeError("distill.Logits has no teacher: the context holds no original; write "
                              "Logits(teacher=network), or run the step by fw.compress, which gives the original")
        device = device_of(network)
        return _Response(self, placed(teacher, device).eval())


@dataclass(frozen=True)
class _Response(Companion):
    options: Logits
    teacher: Network

    @property
    def task_weight(self) -> float:
        return 1 - self.options.weight

    def loss(self, inputs: Inputs, output: Any, target: Any) -> Tensor:
        options = self.options
        with torch.no_grad():
            wanted = choose(call(self.teacher, inputs), options.output)
        given = choose(output, options.output)
        if wanted.shape != given.shape:
            raise RecipeError(f"the teacher's output has shape {list(wanted.shape)}, the student's "
                              f"{list(given.shape)}; the classes must be equal; choose another by Logits(output=...)")
        return options.weight * divergence(given, wanted, options.temperature, options.axis)


def divergence(student: Tensor, teacher: Tensor, temperature: float, axis: int = 1) -> Tensor:
    """``T^2 * KL(softmax(teacher / T) || softmax(student / T))`` over ``axis``, averaged over the others: scalar."""
    p = log_softmax(student.float() / temperature, axis)
    q = log_softmax(teacher.float() / temperature, axis)
    terms = kl_div(p, q, reduction="none", log_target=True)
    return terms.sum(axis).mean() * temperature**2


def choose(output: Any, which: str | int | None) -> Tensor:
    """The tensor ``which`` of an output, or its first floating one."""
    if which is not None:
        if isinstance(output, Mapping):
            if which not in output:
                raise RecipeError(f"the network has no output {which!r}; {did_you_mean(str(which), map(str, output))}")
            output = output[which]
        elif isinstance(which, str):
            if not hasattr(output, which):
                raise RecipeError(f"the network's output, a {type(output).__name__}, has no field {which!r}; write "
                                  "Logits(output=0) for the first of several, or None")
            output = getattr(output, which)
        else:
            try:
                output = output[which]
            except (IndexError, TypeError) as error:
                raise RecipeError(f"the network has no output {which}: {error}; write Logits(output=0)") from error
    for leaf in flatten(output)[0]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise RecipeError("the network gives no floating tensor that distill.Logits could match")
