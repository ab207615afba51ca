"""``Train``: fine-tuning as a Fit, with objectives and rewrites at work beside it, that survives a kill."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Literal

import torch
from torch import Tensor

from featherweight.errors import RecipeError, TaskError
from featherweight.network import Network
from featherweight.network.devices import placed
from featherweight.processes import Processes
from featherweight.recover import checkpoint as files
from featherweight.recover.batches import epoch, on_device, rounds
from featherweight.recover.checkpoint import Checkpoint, Position
from featherweight.recover.companions import Companions, advice, check_joined
from featherweight.recover.optimizers import OPTIMIZERS, groups
from featherweight.recover.schedules import SCHEDULES
from featherweight.recover.zeros import Zeros, trainable
from featherweight.seeds import generators_kept, seed_all, seed_from
from featherweight.steps import Beside, Context, Fit, Rewrite
from featherweight.steps.companion import beside, is_beside
from featherweight.steps.fingerprint import fingerprint
from featherweight.steps.options import BATCH_LIMIT, SEED, Numbers, check_known, check_numbers
from featherweight.task import Batch, Task, batch_size, call

aten = torch.ops.aten
EMULATED = ("AVX2", "NO AVX")  #: x86 processors that compute bfloat16 by way of float32
REPORT_EVERY = 20  #: steps between reports on an accelerator, where reading the loss makes it wait

NUMBERS = {
    "epochs": Numbers(5, least=0, whole=True), "lr": Numbers(0.01, above=0), "momentum": Numbers(0.9, least=0, below=1),
    "weight_decay": Numbers(5e-4, least=0), "warmup": Numbers(0.1, least=0, below=1, noun="a share of the steps,"),
    "clip": Numbers(1.0, above=0, none="no limit"), "batches": BATCH_LIMIT, "seed": SEED}
SECONDS = Numbers(60.0, least=0)


@dataclass(frozen=True)
class Train(Fit):
    """Trains every floating parameter of the network on the task's train split.

    epochs: passes over the train split. batches: at most this many batches of each pass.
    lr: largest learning rate. optimizer: "sgd" (with ``momentum``) or "adamw" (``momentum`` is its first beta).
    weight_decay: of all parameters, or with ``decay_vectors=False`` of those with more than one axis only.
    schedule: of the learning rate: "cosine", "onecycle" or "constant"; warmup: share of the steps, 0..1, with a
        linear rise.
    beside: what works beside the training: objectives, each adding a term to the loss, e.g. ``distill.Logits()``, and
        rewrites, told of the progress before every step, e.g. ``prune.Weights(sparsity=0.8)``. Several work at once,
        in any order. The loss is the task's, times the product of the objectives' factors on it, plus all terms.
        Plans of rewrites are applied at the end, structure before sparsity before precision, each carried through
        those before it, and saved as ``during_I.plan`` in the context's workdir.
    distill, during: an objective and rewrites, as ``beside`` takes them too; I counts ``during`` before ``beside``.
    clip: largest norm of the gradient. autocast: "bf16" computes in bfloat16 where torch deems it safe;
        x86 processors without AVX-512 emulate it, slowly, which is warned of.
    channels_last: memory layout of images. seed: of shuffling and dropout, together with the context's.
    checkpoint_every: "epoch", or seconds between checkpoints; written to ``context.workdir``, if there is one.

    Zeros of the weights in ``network.patterns`` stay zero. Under ``accelerate launch`` each of P processes takes every
    P-th batch and gradients are averaged; what is left of a pass after the last full round is not used, and the
    statistics of batch norms are averaged at the end of each epoch. All processes must see the same ``workdir``.

    On a CPU the same seed gives the same weights, bit for bit, killed and resumed or not, if the train split is a
    function of torch's, numpy's and Python's global generators, which are seeded before each pass. A split without
    ``len()`` is gone through once beforehand to count its batches.

    Raises RecipeError for options that make no sense, rewrites that cannot work in one training (before the first
    step), a network without anything to train, a loss that is no longer finite, and a checkpoint of another run;
    TaskError where the task has no train split or no loss.

    Example:
        >>> small = fw.prune.Channels(macs=0.5).plan(network, task).apply(network)
        >>> step = fw.recover.Train(epochs=1, lr=0.01, distill=fw.distill.Logits(temperature=4.0))
        >>> trained = step.fit(small, task, fw.steps.Context(original=network))
    """

    epochs: int = 1
    lr: float = 0.01
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "onecycle", "constant"] = "cosine"
    warmup: float = 0.0
    distill: Beside | None = None
    during: tuple[Rewrite, ...] = ()
    clip: float | None = None
    autocast: Literal["bf16"] | None = None
    channels_last: bool = False
    decay_vectors: bool = True
    batches: int | None = None
    seed: int = 0
    checkpoint_every: Literal["epoch"] | float = "epoch"
    beside: tuple[Beside, ...] = ()

    def check(self) -> None:
        """Raises RecipeError for options that make no sense, also for rewrites that cannot be at work in a training."""
        check_known("Train", "optimizer", self.optimizer, OPTIMIZERS)
        check_known("Train", "schedule", self.schedule, SCHEDULES)
        check_numbers(self, NUMBERS)
        for name, fits, wanted in (
            ("autocast", self.autocast in (None, "bf16"), "'bf16' or None"),
            ("checkpoint_every", self.checkpoint_every == "epoch" or SECONDS.hold(self.checkpoint_every),
             "'epoch' or seconds"),
            ("during", all(isinstance(r, Rewrite) for r in self.during), "rewrites, e.g. (prune.Weights(...),)"),
            ("beside", all(map(is_beside, self.beside)),
             "objectives and rewrites, e.g. (distill.Logits(), prune.Weights(...))"),
            ("distill", self.distill is None or is_beside(self.distill), "an objective, e.g. distill.Logits()"),
        ):
            if not fits:
                raise RecipeError(f"Train({name}={getattr(self, name)!r}): expected {wanted}")
        for thing in beside(self):
            check = getattr(thing, "check", None)
            if callable(check):
                check()
            if isinstance(thing, Rewrite):
                thing.check_training()

    def needs(self) -> tuple[str, ...]:
        """The train split, and the loss where nothing beside gives one."""
        objectives = [thing for thing in beside(self) if not isinstance(thing, Rewrite)]
        return ("train",) if objectives else ("train", "loss")

    def check_on(self, network: Network, task: Task, batch: Batch) -> None:
        """Raises RecipeError where there is nothing to train, and what those beside it that have a
        ``check_on`` raise for this network and batch."""
        trainable(network)
        for thing in beside(self):
            check = getattr(thing, "check_on", None)
            if callable(check):
                check(network, task, batch)

    def fit(self, network: Network, task: Task, context: Context) -> Network:
        self.check()
        task.require(*self.needs())
        trainable(network)
        return _Run(dataclasses.replace(self, during=tuple(self.during)), network, task, context).fit()


class _Run:
    """One run of ``step`` from ``network``: everything that lives as long as it."""

    def __init__(self, step: Train, network: Network, task: Task, context: Context) -> None:
        self.step, self.origin, self.context = step, network, context
        self.processes = Processes()
        self.device = self.processes.device
        self.task = on_device(task, self.device)
        self.work = placed(network, self.device)
        self.normalizes = bool(self.work.calls(aten.batch_norm.default))
        self.mark = fingerprint(dataclasses.replace(step, checkpoint_every="epoch"), network, seed=context.seed,
                                      processes=self.processes.world)
        self.sums: dict[str, Tensor] = {}
        self.count, self.samples, self.progress = 0, 0, 0.0
        self.started = self.saved = time.monotonic()

    def seed(self, *parts: int | str) -> int:
        return seed_from(self.context.seed, self.step.seed, *parts)

    # ---- the run
    def fit(self) -> Network:
        with generators_kept():
            found = files.read(self.context.workdir, self.mark) if self.context.workdir is not None else None
            if found is None:
                check_joined(beside(self.step), self.work, self.task, self.context)
            self._start()
            try:
                position = self._resume(found)
                for number in range(position.epoch, self.step.epochs):
                    self._epoch(number, position)
                    position = Position(number + 1, 0, position.rounds)
                    self.processes.average([t for t in self.work.buffers() if t.is_floating_point()])
                    self._save(position)
                return self._finish()
            finally:
                self.companions.close()

    def _start(self) -> None:
        step = self.step
        if self._half() and self.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in EMULATED:
            warnings.warn("autocast='bf16' on a processor that emulates bfloat16: several times slower than float32; "
                          "leave autocast out", stacklevel=2)
        if step.channels_last:
            for tensor in self.work.parameters():
                if tensor.dim() == 4:
                    tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        seed_all(self.seed("start"))
        self.zeros = Zeros(self.work)
        self.companions = Companions(beside(step), self.work, self.task, self.context)
        own = self.companions.parameters()
        taken = {id(t) for t in own}
        mine = [p for p in self.work.parameters() if p.requires_grad and p.is_floating_point() and id(p) not in taken]
        self.trained = mine + own
        self.processes.broadcast([*self.work.tensors().values(), *own])
        self.optimizer = OPTIMIZERS[step.optimizer](groups(mine, own, step.weight_decay, step.decay_vectors), step.lr,
                                                    step.momentum)
        self.work.train()

    def _epoch(self, number: int, position: Position) -> None:
        first = position.step if number == position.epoch else 0
        if not first:
            self.sums, self.count = {}, 0
        stream = epoch(self.task, self.seed("epoch", number), first, self.step.batches, self.processes.rank,
                       self.processes.world, self.normalizes)
        index = first
        for index, batch in enumerate(stream, first + 1):
            self._step(batch, number, index - 1, position.rounds)
            if self._due() and index < position.rounds:
                self._save(Position(number, index, position.rounds))
        if index == 0:
            raise TaskError("the train split gave no batches; Task(train=...) must start a fresh pass at every call")

    def _step(self, batch: Batch, number: int, index: int, per_epoch: int) -> None:
        step, total = self.step, per_epoch * self.step.epochs
        done = number * per_epoch + index
        torch.manual_seed(self.seed("step", number, index, self.processes.rank))
        self.progress = min(1.0, done / max(1, total - 1))
        self.companions.update(self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = step.lr * SCHEDULES[step.schedule](min(done / total, 1.0), step.warmup)
        inputs, target = self._input(batch[0]), batch[1]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._half()):
            terms = self.companions.terms(inputs, call(self.work, inputs), target)
            loss = reduce(add, terms.values())
        loss.backward()  # type: ignore[no-untyped-call]
        self.processes.average([t.grad for t in self.trained if t.grad is not None])
        self.companions.after_backward()
        self.zeros.clear_gradients()
        if step.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.trained, step.clip)
        self.optimizer.step()
        self.zeros.restore()
        self.optimizer.zero_grad()
        self.samples += batch_size(inputs) * self.processes.world
        self._report({"loss": loss, **(terms if len(terms) > 1 else {})}, done + 1, total, index + 1 == per_epoch)

    def _half(self) -> bool:
        return self.step.autocast == "bf16" or self.processes.half

    def _input(self, inputs: Any) -> Any:
        if not self.step.channels_last:
            return inputs
        return torch.utils._pytree.tree_map_only(
            Tensor, lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t, inputs)

    def _report(self, losses: dict[str, Tensor], done: int, total: int, last: bool) -> None:
        """Tells the loss, and each term where it has several, as means over this epoch so far."""
        self.sums = {name: loss.detach() + self.sums.get(name, 0.0) for name, loss in losses.items()}
        self.count += 1
        if not last and self.device.type != "cpu" and done % REPORT_EVERY:
            return
        means = {name: float(loss) / self.count for name, loss in self.sums.items()}
        if not math.isfinite(means["loss"]):
            raise RecipeError(f"the loss was {means['loss']} at step {done} of {total}; {advice(means, self.step.lr)}")
        speed = self.samples / max(time.monotonic() - self.started, 1e-9)
        if self.processes.rank == 0:
            self.context.progress("recover.Train", done, total, {**means, "images_per_s": speed})

    def _finish(self) -> Network:
        if self.progress < 1:
            self.companions.update(1.0)
        result, plans = self.companions.finish(self.origin)
        if self.context.workdir is not None and self.processes.rank == 0:
            self.context.workdir.mkdir(parents=True, exist_ok=True)
            for place, plan in plans.items():
                plan.save(self.context.workdir / f"during_{place}.plan")
        return result

    # ---- checkpoints
    def _due(self) -> bool:
        every = self.step.checkpoint_every
        return every != "epoch" and time.monotonic() - self.saved >= float(every)

    def _save(self, position: Position) -> None:
        if self.context.workdir is not None and self.processes.rank == 0:
            run = files.taken(position, self.work, self.optimizer, self.companions, self.progress, self.sums,
                              self.count)
            files.write(self.context.workdir, self.mark, run)
            self.saved = time.monotonic()

    def _resume(self, found: Checkpoint | None) -> Position:
        """Where to begin; all processes from the same place."""
        place = (found.position.epoch, found.position.step) if found is not None else (-1, -1)
        everyone = self.processes.gathered(place)
        if any(other != everyone[0] for other in everyone):
            raise RecipeError(f"the processes found different checkpoints {everyone}; Context(workdir=...) must be one "
                              "folder that all of them see")
        if found is None:
            count = rounds(self.task, self.seed("epoch", 0), self.step.batches, self.processes.world, self.normalizes)
            return Position(0, 0, count)
        self.progress = files.restored(found, self.work, self.optimizer, self.companions)
        self.sums = {name: tensor.to(self.device) for name, tensor in found.under("sum/").items()}
        self.count = int(found.numbers.get("count", 0))
        return found.position
