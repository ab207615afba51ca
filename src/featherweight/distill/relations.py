"""``Relations``: how samples lie to one another in the student, drawn to how they lie in the teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from featherweight.distill.features import Tapping, projector
from featherweight.distill.losses import feature, relation
from featherweight.distill.taps.match import Matches, match
from featherweight.distill.teachers import check_teacher, started, tried
from featherweight.network import Network
from featherweight.network.devices import device_of
from featherweight.processes import Processes
from featherweight.steps import Companion, Context
from featherweight.steps.options import Numbers, check_known, check_numbers
from featherweight.task import Batch, Inputs, Task

NUMBERS = {"weight": Numbers(1.0, above=0), "temperature": Numbers(0.07, above=0),
           "bank": Numbers(4096, least=1, whole=True), "width": Numbers(128, least=1, whole=True)}
#: name -> loss of two embeddings [n, a] and [n, b]; RKD's weights are those of its authors (25 and 50)
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "distance": relation.distance,
    "angle": relation.angle,
    "rkd": lambda s, t: 25 * relation.distance(s, t) + 50 * relation.angle(s, t),
    "correlation": relation.correlation,
    "similarity": feature.similarity,
}
CONTRASTIVE = "crd"


@dataclass(frozen=True)
class Relations:
    """How the samples of a batch lie to one another is drawn to how they do in the teacher: a term of the loss.

    loss: "distance" and "angle" (RKD's parts), "rkd" (both), "correlation" (CC), "similarity" (SP), "crd" (contrastive:
        the same sample among ``bank`` others, kept in a memory bank that a checkpoint has).
    weight: factor on the term. taps: as in ``Features``; of those found, the last is taken; maps are averaged over
        places. teacher: a network, or the path of a saved one; None is the original.
    temperature, bank, width: of "crd": of the similarities, of the memory bank (samples), and of the embeddings, which
        both sides are projected to.

    Example:
        >>> taught = fw.recover.Train(epochs=1, beside=(fw.distill.Relations("distance", weight=0.5),))
        >>> trained = taught.fit(network, task, fw.steps.Context(original=network))
    """

    loss: str = "rkd"
    weight: float = 1.0
    taps: str | tuple[str, ...] | Mapping[str, str] = "trunk"
    teacher: Any = field(default=None, repr=False, metadata={"file": True})
    temperature: float = 0.07
    bank: int = 4096
    width: int = 128

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        check_numbers(self, NUMBERS)
        check_known("Relations", "loss", self.loss, (*LOSSES, CONTRASTIVE))
        check_teacher("Relations", self.teacher, captured=True)

    def check_on(self, network: Network, task: Task, batch: Batch) -> None:
        """Raises RecipeError where the teacher cannot be loaded, or called with a batch."""
        tried(self.teacher, network, batch[0], "Relations")

    def start(self, network: Network, task: Task, context: Context) -> Companion:
        """The teacher and taps on both networks. Raises RecipeError where nothing matches."""
        self.check()
        teacher = started(self.teacher, context.original, device_of(network), "Relations")
        matches = match(network, teacher.network, self.taps)
        tapping = Tapping(network, teacher, Matches(matches.found[-1:], matches.skipped))
        return (_Contrasting if self.loss == CONTRASTIVE else _Relating)(self, tapping, context.seed)


def _embedding(x: Tensor) -> Tensor:
    """[n, c] of [n, c, ...]."""
    return x.flatten(2).mean(2) if x.dim() > 2 else x


class _Relating(Companion):
    def __init__(self, options: Relations, tapping: Tapping, seed: int) -> None:
        self.options, self.tapping = options, tapping

    @property
    def notes(self) -> list[str]:
        return self.tapping.matches.notes("distill.Relations", False)

    def loss(self, inputs: Inputs, output: Any, target: Any) -> Tensor:
        with torch.autocast(self.tapping.device.type, enabled=False):
            [(_, given, wanted)] = self.tapping.pairs(inputs)
            return self.options.weight * LOSSES[self.options.loss](_embedding(given), _embedding(wanted))

    def close(self) -> None:
        self.tapping.close()


class _Contrasting(Companion):
    """CRD with a queue of the teacher's embeddings; in every process the same one."""

    def __init__(self, options: Relations, tapping: Tapping, seed: int) -> None:
        self.options, self.tapping, self.processes = options, tapping, Processes()
        [m] = tapping.matches.found
        device, theirs = tapping.device, m.teacher.width
        self.ours = projector(options.width, m.student.width, device, seed, "student")
        self.theirs = projector(options.width, theirs, device, seed, "teacher")
        self.bank = normalize(projector(options.bank, options.width, device, seed, "bank").detach(), dim=1)
        self.place = torch.zeros((), dtype=torch.int64)

    @property
    def notes(self) -> list[str]:
        return self.tapping.matches.notes("distill.Relations", False)

    def parameters(self) -> list[Tensor]:
        return [self.ours, self.theirs]

    def state(self) -> dict[str, Tensor]:
        return {"bank": self.bank, "place": self.place}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.bank, self.place = state["bank"].clone(), state["place"].cpu().clone()

    def loss(self, inputs: Inputs, output: Any, target: Any) -> Tensor:
        with torch.autocast(self.tapping.device.type, enabled=False):
            [(_, given, wanted)] = self.tapping.pairs(inputs)
            ours = normalize(linear(_embedding(given), self.ours), dim=1)
            theirs = normalize(linear(_embedding(wanted), self.theirs), dim=1)
            term = relation.contrastive(ours, theirs, self.bank.clone(), self.options.temperature)
            self._remember(theirs.detach())
        return self.options.weight * term

    def _remember(self, found: Tensor) -> None:
        """Puts a batch of every process into the bank, in the order of the processes, over the oldest."""
        rows = everyones(found, self.processes)[-len(self.bank):]
        index = (int(self.place) + torch.arange(len(rows), device=rows.device)) % len(self.bank)
        self.bank[index] = rows
        self.place = (self.place + len(rows)) % len(self.bank)

    def close(self) -> None:
        self.tapping.close()


def everyones(rows: Tensor, processes: Processes) -> Tensor:
    """The rows of all processes, in their order; each may have another number of them."""
    if not processes.several or processes.world == 1:
        return rows
    sizes = [size for [size] in processes.gathered([len(rows)])]
    whole = rows.new_zeros((sum(sizes), *rows.shape[1:]))
    first = sum(sizes[:processes.rank])
    whole[first:first + len(rows)] = rows * processes.world
    processes.average([whole])
    return whole
