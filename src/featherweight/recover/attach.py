"""``attach``: what ``Train`` lets work beside a training, beside a training loop of one's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from featherweight.errors import RecipeError
from featherweight.network import Network
from featherweight.network.devices import device_of
from featherweight.recover.batches import on_device
from featherweight.recover.companions import Companions, check_joined
from featherweight.recover.zeros import Zeros, trainable
from featherweight.seeds import generators_kept
from featherweight.steps import Beside, Companion, Context, Plan
from featherweight.steps.companion import is_beside
from featherweight.steps.given import check_network, check_task
from featherweight.task import Inputs, Task

#: networks whose training is followed
ATTACHED: WeakSet[Network] = WeakSet()


def attach(network: Network, task: Task, beside: Sequence[Beside] = (), steps: int = 0,
           optimizer: Optimizer | None = None, *, original: Network | None = None,
           plans: Sequence[Plan] = ()) -> Attached:
    """Lets rewrites and objectives work beside a training loop of one's own, as ``Train(beside=...)`` does in its.

    >>> import torch, featherweight as fw
    >>> data = [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(10)]
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
    >>> network = fw.capture(model, torch.randn(2, 4)).train()
    >>> optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    >>> beside = (fw.distill.Logits(weight=0.5), fw.prune.Weights(sparsity=0.75))
    >>> task = fw.Task(loss=torch.nn.functional.cross_entropy)
    >>> attached = fw.recover.attach(network, task, beside, steps=len(data), optimizer=optimizer)
    >>> for inputs, target in data:
    ...     optimizer.zero_grad()
    ...     attached.loss(inputs, network(inputs), target).backward()
    ...     optimizer.step()
    >>> finished = attached.finish()
    >>> int((finished.tensor("0.weight") == 0).sum() + (finished.tensor("2.weight") == 0).sum())
    168

    network: is trained by the loop itself, where it lies. What works beside it sets taps on its nodes until ``finish``;
        ``quantize.Quantize`` also puts copies of values into its graph, which compute nothing afterwards.
    task: its loss, and the data that ``beside`` reads (calibration); the train split is the loop's own.
    steps: of the optimizer, in all: they make the progress that schedules follow.
    optimizer: of ``network.parameters()``; a group with the learned parameters of ``beside`` is added to it (without
        weight decay; so make schedulers of the learning rate afterwards), and hooks on its ``step`` count the steps,
        add what ``beside`` adds to gradients, and keep the zeros of the weights in ``network.patterns``. A step with a
        closure, as Lightning makes it, is followed too. None where it does not exist yet: ``Attached.follow`` takes it.
    original: the teacher of ``distill.Logits()``; None is the network as it is now. plans: those that made the network
        of the original, which know the channels that ``distill.Features`` compares.

    Raises RecipeError, before any step, for what cannot work beside a training, or not together.
    """
    check_network("attach", network)
    check_task("attach", task)
    if network in ATTACHED:
        raise RecipeError("the network is attached already; finish that training first, by attached.finish(), or give "
                          "it up by attached.close()")
    if steps < 1:
        raise RecipeError(f"attach(steps={steps!r}): expected the number of optimizer steps of the whole training, "
                          "e.g. steps=epochs * len(loader)")
    for thing in beside if isinstance(beside, (tuple, list)) else (beside,):
        if not is_beside(thing) or thing is beside:
            raise RecipeError(f"attach(beside=...) was given {thing!r}; expected objectives and rewrites, e.g. "
                              "(distill.Logits(), prune.Weights(sparsity=0.8))")
    trainable(network)
    with generators_kept():
        attached = Attached(network, task, beside, steps, original, plans)
    try:
        if optimizer is not None:
            attached.follow(optimizer)
    except RecipeError:
        attached.close()
        raise
    return attached


class Attached:
    """The companions of a training loop of one's own; see ``attach``.

    Example:
        >>> optimizer = torch.optim.SGD(network.train().parameters(), lr=0.01)
        >>> attached = fw.recover.attach(network, task, (fw.distill.Logits(),), steps=4, optimizer=optimizer)
        >>> for inputs, target in task.batches("train"):
        ...     optimizer.zero_grad()
        ...     attached.loss(inputs, network(inputs), target).backward()
        ...     optimizer.step()
        >>> trained = attached.finish()
    """

    def __init__(self, network: Network, task: Task, beside: Sequence[Beside], steps: int,
                 original: Network | None, plans: Sequence[Plan] = ()) -> None:
        self.network, self.steps, self.done = network, steps, 0
        #: what the last loss was the sum of, by name: "task", "distill.Logits", ...
        self.terms: dict[str, Tensor] = {}
        self._origin = network.copy()
        context = Context(original=original if original is not None else self._origin, plans=tuple(plans))
        device = device_of(network)
        check_joined(beside, network, on_device(task, device), context)
        self._zeros = Zeros(network)
        self._companions = Companions(beside, network, on_device(task, device), context)
        self._adding = [name for name, c in zip(self._companions.names, self._companions.all, strict=True)
                        if type(c).loss is not Companion.loss]
        self._heard = -1.0  # the progress that the companions were told last
        self._asked = self._added = False
        self._finished: Network | None = None
        self._optimizer: Optimizer | None = None
        self._removers: list[Callable[[], None]] = [
            network.register_forward_pre_hook(lambda module, inputs: self._tell()).remove]
        ATTACHED.add(network)

    @property
    def progress(self) -> float:
        """How far the training is, 0..1."""
        return min(1.0, self.done / max(1, self.steps - 1))

    def parameters(self) -> list[Tensor]:
        """The learned parameters of what works beside the training (step sizes, thresholds)."""
        return self._companions.parameters()

    def follow(self, optimizer: Optimizer) -> None:
        """Takes the optimizer: adds ``parameters`` that it does not have, and hooks on its ``step``.

        Raises RecipeError for a second optimizer, one that has a scheduler already, and one of another network.
        """
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [p for p in self.parameters() if id(p) not in known]
        if self._optimizer is not None:
            raise RecipeError("attach follows one optimizer; give all parameters to it, in groups")
        if not any(id(p) in known for p in self.network.parameters()):
            raise RecipeError("the optimizer has no parameter of the attached network; write e.g. "
                              "torch.optim.SGD(network.parameters(), lr=0.01)")
        if missing and any("initial_lr" in group for group in optimizer.param_groups):
            raise RecipeError("the optimizer has a scheduler already, which does not know of the parameters that are "
                              "learned beside; make the scheduler after attach(...)")
        if missing:
            optimizer.add_param_group({"params": missing, "weight_decay": 0.0})
        self._optimizer = optimizer
        self._removers += [optimizer.register_step_pre_hook(self._before).remove,
                           optimizer.register_step_post_hook(self._after).remove]

    # ---- in the loop
    def loss(self, inputs: Inputs, output: Any, target: Any = None, own: Tensor | None = None) -> Tensor:
        """The whole loss of a batch: the task's times its weight, plus the term of each objective.

        inputs, output: of the network's last forward pass, whose activations objectives such as ``distill.Features``
        take; other inputs would compare them with the teacher's on something else, which nobody notices.
        own: the task's loss, where the loop knows it (a model that computes it itself); None asks ``task.loss``.
        """
        if self._optimizer is None:
            raise RecipeError("attach knows no optimizer, and so no steps; write attach(..., optimizer=optimizer), or "
                              "attached.follow(optimizer)")
        found = self._companions.terms(inputs, output, target, own)
        self._asked = True
        self.terms = {name: term.detach() for name, term in found.items()}
        return reduce(add, found.values())

    def after_backward(self) -> None:
        """Adds what ``beside`` adds to gradients, which otherwise comes with ``optimizer.step()``: for loops that clip
        gradients, between ``backward`` and that."""
        self._companions.after_backward()
        self._zeros.clear_gradients()
        self._added = True

    def finish(self) -> Network:
        """The finished network: a copy with the trained values and all plans applied, in evaluation mode.

        Takes taps and hooks off. As much is pruned as was asked for, however far the training went.
        """
        if self._finished is None:
            if self._heard < 1:
                self._companions.update(1.0)
            self._finished, _ = self._companions.finish(self._origin)
            self.close()
        return self._finished

    def close(self) -> None:
        """Takes taps and hooks off; for a loop that failed."""
        ATTACHED.discard(self.network)
        self._companions.close()
        for remove in self._removers:
            remove()
        self._removers.clear()

    # ---- checkpoints
    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside ``network.state_dict()`` and ``optimizer.state_dict()``: tensors by name."""
        return {"done": torch.tensor(self.done), **{f"beside/{k}": t.detach().clone()
                                                    for k, t in self._companions.state().items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what ``state_dict`` gave, attached to the same network, as it was before the training, with the
        same ``beside``; the trained values are loaded into the network and the optimizer by their own
        ``load_state_dict``. Raises RecipeError for the state of another."""
        held = {name.removeprefix("beside/"): tensor for name, tensor in state.items() if name.startswith("beside/")}
        try:
            self._companions.restore(held, device_of(self.network))
            self.done, self._heard = int(state["done"]), -1.0
        except (KeyError, RuntimeError) as error:
            raise RecipeError(f"this is the state of another attach(...): {error}; attach to the same network with the "
                              "same beside=(...) first") from error

    # ---- hooks
    def _tell(self) -> None:
        """Before the first forward pass of a step: the progress."""
        if self.progress != self._heard:
            self._heard = self.progress
            self._companions.update(self.progress)

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before an optimizer step; one with a closure does the forward and backward pass within."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._gradients()
            return None

        def followed() -> Any:
            found = closure()
            self._gradients()
            return found

        return (args[:1], {**kwargs, "closure": followed})

    def _gradients(self) -> None:
        if self._adding and not self._asked:
            raise RecipeError(f"a step was made without the terms of {' and '.join(self._adding)}; write "
                              "attached.loss(inputs, output, target).backward() in the loop")
        if not self._added:
            self.after_backward()
        self._asked = self._added = False

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._zeros.restore()
        for parameter in self.parameters():  # the network's zero_grad, which some loops call, does not know them
            parameter.grad = None
        self.done += 1
        if self.done == self.steps + 1:
            warnings.warn(f"the training goes on after attach(steps={self.steps}); what works beside it has settled",
                          stacklevel=2)
