"""The training loop behind ``Train``: one object a run, thrown away at its end."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast
from torch import Tensor

from featherweight.errors import RecipeError, TaskError
from featherweight.network import Network
from featherweight.network.devices import placed
from featherweight.processes import accelerator
from featherweight.recover import checkpoint as files
from featherweight.recover.batches import epoch, rounds
from featherweight.recover.checkpoint import Checkpoint, Position
from featherweight.recover.optimizers import OPTIMIZERS, groups, pack, unpack
from featherweight.recover.schedules import SCHEDULES
from featherweight.recover.zeros import Zeros
from featherweight.seeds import generators_kept, seed_all, seed_from
from featherweight.steps import Context, Criterion, Driver, Plan
from featherweight.steps.fingerprint import fingerprint
from featherweight.task import SPLITS, Batch, Task, batch_size, call, move

if TYPE_CHECKING:
    from featherweight.recover.train import Train

aten = torch.ops.aten
EMULATED = ("AVX2", "NO AVX")  #: x86 processors that compute bfloat16 by way of float32
REPORT_EVERY = 20  #: steps between reports on an accelerator, where reading the loss makes it wait


class Run:
    """One run of ``step`` from ``network``: everything that lives as long as it."""

    def __init__(self, step: Train, network: Network, task: Task, context: Context) -> None:
        self.step, self.origin, self.context = step, network, context
        self.accelerator = accelerator()
        self.device = torch.device(self.accelerator.device)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.task = on_device(task, self.device)
        self.work = placed(network, self.device)
        self.normalizes = bool(self.work.calls(aten.batch_norm.default))
        self.drivers: list[Driver] = []
        self.criterion: Criterion | None = None
        self.loss_sum = self.loss_count = self.samples = self.progress = 0.0
        self.started = self.saved = time.monotonic()

    def seed(self, *parts: int | str) -> int:
        return seed_from(self.context.seed, self.step.seed, *parts)

    # ---- the run
    def fit(self) -> Network:
        with generators_kept():
            self._start()
            position = self._resume()
            try:
                for number in range(position.epoch, self.step.epochs):
                    self._epoch(number, position)
                    position = Position(number + 1, 0, position.rounds)
                    self._average_buffers()
                    self._save(position)
                return self._finish(position)
            finally:
                if self.criterion is not None:
                    self.criterion.close()

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
        self.drivers = [rewrite.start(self.work, self.task) for rewrite in step.during]
        self.own = [t for driver in self.drivers for t in driver.parameters()]
        if step.distill is not None:
            self.criterion = step.distill.begin(self.work, self.context)
        mine = [p for p in self.work.parameters() if p.requires_grad and p.is_floating_point()]
        taken = {id(t) for t in self.own}
        self.trained = [p for p in mine if id(p) not in taken] + self.own
        self._share_values()
        self.optimizer = OPTIMIZERS[step.optimizer](
            groups([p for p in mine if id(p) not in taken], self.own, step.weight_decay, step.decay_vectors),
            step.lr, step.momentum)
        self.work.train()

    def _epoch(self, number: int, position: Position) -> None:
        first = position.step if number == position.epoch else 0
        self.loss_sum = self.loss_count = 0.0
        stream = epoch(self.task, self.seed("epoch", number), first, self.step.batches, self.rank, self.world,
                       self.normalizes)
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
        torch.manual_seed(self.seed("step", number, index, self.rank))
        self.progress = min(1.0, done / max(1, total - 1))
        for driver in self.drivers:
            driver.update(self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = step.lr * SCHEDULES[step.schedule](min(done / total, 1.0), step.warmup)
        inputs, target = self._input(batch[0]), batch[1]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._half()):
            loss = self._loss(inputs, target)
        loss.backward()  # type: ignore[no-untyped-call]
        self._average_gradients()
        for driver in self.drivers:
            driver.after_backward()
        self.zeros.clear_gradients()
        if step.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.trained, step.clip)
        self.optimizer.step()
        self.zeros.restore()
        self.optimizer.zero_grad()
        self.samples += batch_size(inputs) * self.world
        self._report(loss, done + 1, total, index + 1 == per_epoch)

    def _half(self) -> bool:
        return self.step.autocast == "bf16" or self.accelerator.mixed_precision == "bf16"

    def _input(self, inputs: Any) -> Any:
        if not self.step.channels_last:
            return inputs
        return torch.utils._pytree.tree_map_only(
            Tensor, lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t, inputs)

    def _loss(self, inputs: Any, target: Any) -> Tensor:
        output = call(self.work, inputs)
        own = self.task.loss(output, target) if self.task.loss is not None and target is not None else None
        if self.criterion is not None:
            return self.criterion(inputs, output, target, own)
        if own is None:
            raise TaskError("a train batch has no target and so no loss; give targets, or write "
                            "Train(distill=distill.Logits(weight=1.0)) to learn from the original alone")
        return own

    def _report(self, loss: Tensor, done: int, total: int, last: bool) -> None:
        self.loss_sum = self.loss_sum + loss.detach()  # type: ignore[assignment]
        self.loss_count += 1
        if not last and self.device.type != "cpu" and done % REPORT_EVERY:
            return
        mean = float(self.loss_sum) / self.loss_count
        if not math.isfinite(mean):
            raise RecipeError(f"the loss was {mean} at step {done} of {total}; write a smaller learning rate, e.g. "
                              f"Train(lr={self.step.lr / 10:g}), or Train(clip=1.0)")
        speed = self.samples / max(time.monotonic() - self.started, 1e-9)
        if self.rank == 0:
            self.context.progress("recover.Train", done, total, {"loss": mean, "images_per_s": speed})

    # ---- the end
    def _finish(self, position: Position) -> Network:
        plans: list[Plan] = []
        for index, driver in enumerate(self.drivers):
            if self.progress < 1:
                driver.update(1.0)
            plan = driver.finish()
            plans.append(dataclasses.replace(plan, tensors={k: t.detach().cpu() for k, t in plan.tensors.items()}))
            if self.context.workdir is not None and self.rank == 0:
                self.context.workdir.mkdir(parents=True, exist_ok=True)
                plans[-1].save(self.context.workdir / f"during_{index}.plan")
        result = take_values(self.origin.copy(), self.work)
        for plan in plans:
            result = plan.apply(result)
        return result.eval()

    # ---- several processes
    def _share_values(self) -> None:
        """Every process starts from the first one's values."""
        if self.world > 1:
            with torch.no_grad():
                for tensor in [*self.work.tensors().values(), *self.own]:
                    tensor.data.copy_(broadcast(tensor.detach().clone()))

    def _average_gradients(self) -> None:
        gradients = [t.grad for t in self.trained if t.grad is not None]
        if self.world > 1 and gradients:
            self._average(gradients)

    def _average_buffers(self) -> None:
        if self.world > 1:
            self._average([t for t in self.work.buffers() if t.is_floating_point()])

    def _average(self, tensors: list[Tensor]) -> None:
        """Replaces each tensor by its mean over the processes, one message for each dtype."""
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            same = [t for t in tensors if t.dtype == dtype]
            flat = self.accelerator.reduce(torch.cat([t.detach().reshape(-1) for t in same]), reduction="mean")
            for tensor, mean in zip(same, flat.split([t.numel() for t in same]), strict=True):
                tensor.detach().copy_(mean.view(tensor.shape))

    # ---- checkpoints
    def _due(self) -> bool:
        every = self.step.checkpoint_every
        return every != "epoch" and time.monotonic() - self.saved >= float(every)

    def _save(self, position: Position) -> None:
        if self.context.workdir is None or self.rank != 0:
            return
        tensors, numbers = pack(self.optimizer)
        held_numbers = {"optimizer": numbers, "progress": self.progress}
        held = {f"optimizer/{k}": v for k, v in tensors.items()}
        held |= {f"network/{k}": v for k, v in unique(self.work).items()}
        for index, driver in enumerate(self.drivers):
            held |= {f"driver/{index}/state/{k}": v for k, v in driver.state().items()}
            held |= {f"driver/{index}/own/{i}": v for i, v in enumerate(driver.parameters())}
        files.write(self.context.workdir, self._mark(), Checkpoint(position, held, held_numbers))
        self.saved = time.monotonic()

    def _mark(self) -> str:
        if not hasattr(self, "mark"):
            plain = dataclasses.replace(self.step, checkpoint_every="epoch")
            self.mark = fingerprint(plain, self.origin, seed=self.context.seed, processes=self.world)
        return self.mark

    def _resume(self) -> Position:
        folder = self.context.workdir
        found = files.read(folder, self._mark()) if folder is not None else None
        self._agree(found)
        if found is None:
            count = rounds(self.task, self.seed("epoch", 0), self.step.batches, self.world, self.normalizes)
            return Position(0, 0, count)
        with torch.no_grad():
            for name, tensor in found.under("network/").items():
                self.work.tensor(name).copy_(tensor)
            for index, driver in enumerate(self.drivers):
                for place, tensor in enumerate(driver.parameters()):
                    tensor.copy_(found.tensors[f"driver/{index}/own/{place}"])
                state = found.under(f"driver/{index}/state/")
                driver.restore({k: v.to(self.device) for k, v in state.items()})
        unpack(self.optimizer, found.under("optimizer/"), found.numbers["optimizer"])
        self.progress = found.numbers["progress"]
        return found.position

    def _agree(self, found: Checkpoint | None) -> None:
        """All processes must go on from the same place."""
        if self.world > 1:
            place = (found.position.epoch, found.position.step) if found is not None else (-1, -1)
            everyone = self.accelerator.gather(torch.tensor([place], device=self.device))
            if len(everyone.unique(dim=0)) > 1:
                raise RecipeError(f"the processes found different checkpoints {everyone.tolist()}; "
                                  "Context(workdir=...) must be one folder that all of them see")


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


def on_device(task: Task, device: torch.device) -> Task:
    """The same task with batches that lie on ``device``."""
    if device.type == "cpu":
        return task

    def moved(split: str) -> Any:
        return lambda: Moved(task.start(split), device)

    return dataclasses.replace(task, **{s: moved(s) for s in SPLITS if task.has(s)})


class Moved:
    """A pass over batches, each moved to a device; it has a length if the pass has."""

    def __init__(self, batches: Any, device: torch.device) -> None:
        self.batches, self.device = batches, device

    def __iter__(self) -> Any:
        return (move(batch, self.device) for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)
