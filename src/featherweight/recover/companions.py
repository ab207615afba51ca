"""All that works beside one training: started in an order that lets each do its work, joined at the end."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import PlanError, RecipeError, TaskError
from featherweight.network import Network
from featherweight.seeds import generators_kept
from featherweight.steps import Companion, Context, Plan, Rewrite
from featherweight.steps.companion import started
from featherweight.steps.joined import joined
from featherweight.steps.kinds import kind_of
from featherweight.task import Inputs, Task


class Companions:
    """The companions of ``things`` (rewrites and objectives) on ``network``, which is about to be trained.

    Plans are applied by stage: structure, sparsity, precision. Companions are told of the progress in the same order,
    and started in the opposite one, objectives first: so a weight is rounded, then masked, then held, as the finished
    network has it cut, then zeroed, then stored. The order of ``things`` makes no difference to this; it names each by
    its place.
    """

    def __init__(self, things: Sequence[Any], network: Network, task: Task, context: Context) -> None:
        self.network, self.task = network, task
        self.names = _names(things)
        self.order = sorted(range(len(things)), key=lambda place: int(getattr(things[place], "stage", 0)))
        found = _started(things, self.order, network, task, context)
        self.all = [found[place] for place in range(len(things))]
        for index, place in enumerate(self.order):
            self.all[place].follow([self.all[p] for p in self.order[:index]])
        self.task_weight = 1.0
        for companion in self.all:
            self.task_weight *= companion.task_weight

    def _ordered(self) -> list[Companion]:
        return [self.all[place] for place in self.order]

    def update(self, progress: float) -> None:
        for companion in self._ordered():
            companion.update(progress)

    def terms(self, inputs: Inputs, output: Any, target: Any, own: Tensor | None = None) -> dict[str, Tensor]:
        """The terms that the batch's loss is the sum of: "task", times its weight, and each companion's by its name.

        own: the task's loss where it is known already; None computes it. Raises TaskError or RecipeError where it is
        needed and missing.
        """
        found: dict[str, Tensor] = {}
        if self.task_weight:
            if own is None and self.task.loss is not None and target is not None:
                own = self.task.loss(output, target)
            if own is None and self.task_weight < 1:
                mixing = [name for name, c in zip(self.names, self.all, strict=True) if c.task_weight < 1]
                raise RecipeError(f"{' and '.join(mixing)} mixes in the task's loss (weight {self.task_weight:g}), but "
                                  "the task or the batch has none; write Logits(weight=1.0) to learn from the teacher "
                                  "alone")
            if own is None:
                raise TaskError("a train batch has no target and so no loss; give targets, or write "
                                "Train(distill=distill.Logits(weight=1.0)) to learn from the original alone")
            found["task"] = own if self.task_weight == 1 else self.task_weight * own
        for name, companion in zip(self.names, self.all, strict=True):
            term = companion.loss(inputs, output, target)
            if term is not None:
                found[name] = term
        return found

    def after_backward(self) -> None:
        for companion in self._ordered():
            companion.after_backward()

    def parameters(self) -> list[Tensor]:
        return [tensor for companion in self.all for tensor in companion.parameters()]

    def state(self) -> dict[str, Tensor]:
        """The state and the parameters of every companion, by its place: "0/state/NAME", "0/own/0"."""
        held: dict[str, Tensor] = {}
        for place, companion in enumerate(self.all):
            held |= {f"{place}/state/{name}": tensor for name, tensor in companion.state().items()}
            held |= {f"{place}/own/{i}": tensor for i, tensor in enumerate(companion.parameters())}
        return held

    def restore(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Takes up what ``state`` gave; its tensors come to ``device``."""
        with torch.no_grad():
            for place, companion in enumerate(self.all):
                for i, tensor in enumerate(companion.parameters()):
                    tensor.copy_(state[f"{place}/own/{i}"])
                prefix = f"{place}/state/"
                companion.restore({name.removeprefix(prefix): tensor.to(device) for name, tensor in state.items()
                                   if name.startswith(prefix)})

    def finish(self, origin: Network) -> tuple[Network, dict[int, Plan]]:
        """``origin``, of which the trained network was a copy, with the trained values and all plans applied, in
        evaluation mode; and the plans as they were applied, by the places of those who gave them."""
        plans = {place: plan for place in self.order if (plan := self.all[place].finish()) is not None}
        plans = {place: dataclasses.replace(plan, tensors={k: t.detach().cpu() for k, t in plan.tensors.items()})
                 for place, plan in plans.items()}
        done, result = joined(plans.values(), take_values(origin.copy(), self.network))
        result.notes += [note for companion in self.all for note in companion.notes if note not in result.notes]
        return result.eval(), dict(sorted(zip(plans, done, strict=True)))

    def close(self) -> None:
        for companion in self.all:
            companion.close()


def _started(things: Sequence[Any], order: Sequence[int], network: Network, task: Task,
             context: Context) -> dict[int, Companion]:
    """The companions by place: objectives first, then rewrites from the last of the ``order`` to the first."""
    objectives = [place for place in order if not isinstance(things[place], Rewrite)]
    found: dict[int, Companion] = {}
    try:
        for place in (*objectives, *(p for p in reversed(order) if p not in objectives)):
            found[place] = started(things[place], network, task, context)
    except BaseException:
        for companion in found.values():
            companion.close()
        raise
    return found


def check_joined(things: Sequence[Any], network: Network, task: Task, context: Context) -> None:
    """Raises RecipeError where the plans of several rewrites cannot be joined.

    Finishes them once on an untrained copy of ``network``, so that a long training does not end in an error.
    """
    rewrites = [thing for thing in things if isinstance(thing, Rewrite)]
    if len(rewrites) < 2:
        return
    with generators_kept():
        companions = Companions(rewrites, network.copy(), task, dataclasses.replace(context, workdir=None))
        try:
            companions.update(1.0)
            companions.finish(network)
        except PlanError as error:
            raise RecipeError(f"{' and '.join(companions.names)} cannot work in one training: {error}") from error
        finally:
            companions.close()


def advice(means: Mapping[str, float], lr: float) -> str:
    """What to do where a loss is not finite; means: the loss, and its terms by name where it has several. One that is
    alone in it has what it is made of to blame, no rate of learning."""
    terms = {name: math.isfinite(mean) for name, mean in means.items() if name != "loss"}
    if any(terms.values()):
        wrong = [name for name, finite in terms.items() if not finite]
        return (f"of its terms {' and '.join(wrong)} alone is not finite: look at what that is made of (a teacher's "
                "outputs, data)")
    return f"write a smaller learning rate, e.g. Train(lr={lr / 10:g}), or Train(clip=1.0)"


def unique(network: Network) -> dict[str, Tensor]:
    """The network's tensors, a tied one under its first name only."""
    seen: set[int] = set()
    return {n: t for n, t in network.tensors().items() if not (id(t) in seen or seen.add(id(t)))}  # type: ignore[func-returns-value]


def take_values(network: Network, source: Network) -> Network:
    """Copies the values of ``source``'s tensors into ``network``, which has the same; gives ``network``."""
    with torch.no_grad():
        for name, tensor in unique(network).items():
            tensor.copy_(source.tensor(name))
    return network


def _names(things: Sequence[Any]) -> list[str]:
    """The kind of each; one that comes again is numbered."""
    kinds = [kind_of(thing) for thing in things]
    counts = [kinds[:place].count(kind) + 1 for place, kind in enumerate(kinds)]
    return [f"{kind} {count}" if count > 1 else kind for kind, count in zip(kinds, counts, strict=True)]
