"""Which tensor of a network's output is meant, and which positions of a batch count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import RecipeError, did_you_mean
from featherweight.network.trees import flatten
from featherweight.steps.options import Numbers, check_number
from featherweight.task import Inputs, described

#: where the losses of a batch count: a key of the inputs ("attention_mask"), or a function of inputs and target
Where = str | Callable[[Inputs, Any], Tensor] | None


def check_output(step: Any) -> None:
    """Raises RecipeError where a step's ``output`` is no key, no field's name and no position."""
    if step.output is not None and not isinstance(step.output, str):
        check_number(type(step).__name__, "output", step.output,
                     Numbers(0, whole=True, noun="a key, a field or a position"))


def choose(output: Any, which: str | int | None, whose: str = "the network") -> Tensor:
    """The tensor ``which`` of an output, or its first floating one; a tensor alone is the output 0. whose: it is, for
    errors. Raises RecipeError where there is none."""
    for leaf in flatten(output if which is None else _part(output, which, whose))[0]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise RecipeError(f"{whose} gives no floating tensor (it gives {described(output)}) that distill.Logits could "
                      "match")


def _part(output: Any, which: str | int, whose: str) -> Any:
    if isinstance(output, Tensor):
        if which == 0:
            return output
        raise RecipeError(f"{whose} gives one tensor, and no output {which!r}; leave Logits(output=...) out")
    if isinstance(output, Mapping):
        if which not in output:
            raise RecipeError(f"{whose} has no output {which!r}; {did_you_mean(str(which), map(str, output))}")
        return output[which]
    if isinstance(which, str):
        if not hasattr(output, which):
            raise RecipeError(f"the output of {whose}, a {type(output).__name__}, has no field {which!r}; write "
                              "Logits(output=0) for the first of several, or None")
        return getattr(output, which)
    try:
        return output[which]
    except (IndexError, TypeError, KeyError) as error:
        raise RecipeError(f"{whose} has no output {which}: {error}; write Logits(output=0)") from error


def counted(where: Where, inputs: Inputs, target: Any) -> Tensor | None:
    """bool: the positions of a batch that count (padding does not); None where all do.

    Raises RecipeError for a key that the inputs do not have.
    """
    if where is None:
        return None
    if not isinstance(where, str):
        return where(inputs, target) > 0
    if not isinstance(inputs, Mapping) or where not in inputs:
        known = map(str, inputs) if isinstance(inputs, Mapping) else ()
        raise RecipeError(f"mask={where!r} names no input; {did_you_mean(where, known)}; write the key of the inputs, "
                          "or a function of (inputs, target) that gives the mask")
    return torch.as_tensor(inputs[where]) > 0


def targets(target: Any, who: str) -> Tensor:
    """Target classes [n]. Raises RecipeError for other targets."""
    if isinstance(target, Tensor) and not target.is_floating_point():
        return target
    raise RecipeError(f"distill.{who} needs integer target classes, and the batch's target is "
                      f"{'missing' if target is None else f'a {type(target).__name__}'}; give Task(train=...) pairs "
                      "(inputs, classes)")
