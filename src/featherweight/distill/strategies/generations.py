"""``BornAgain``: the same network trained again from fresh weights, each generation taught by the one before."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from featherweight.distill.logits import Logits
from featherweight.distill.strategies.online import fresh
from featherweight.errors import RecipeError
from featherweight.network import Network
from featherweight.seeds import seed_from
from featherweight.steps import Context, Fit
from featherweight.steps.options import Numbers, check_numbers
from featherweight.task import Batch, Task

TAUGHT = Logits(temperature=1.0, weight=0.5)


@dataclass(frozen=True)
class BornAgain(Fit):
    """Trains ``generations`` networks of the same form from fresh weights, each taught by the one before it.

    train: the training of a generation, a ``recover.Train`` whose ``distill`` is left open. The first is taught by the
    network that was given. taught: how (its teacher is set). Generations that a killed run had finished are read from
    their checkpoints in the context's workdir. Born-again networks, Furlanello et al. 2018, section 3.

    Example:
        >>> born = fw.distill.BornAgain(fw.recover.Train(epochs=1, lr=0.05), generations=2)
        >>> trained = born.fit(network, task, fw.steps.Context())
    """

    train: Any
    generations: int = 1
    taught: Logits = TAUGHT

    def check(self) -> None:
        """Raises RecipeError for options that make no sense, those of ``train`` too."""
        check_numbers(self, {"generations": Numbers(1, least=1, whole=True)})
        if not isinstance(self.train, Fit) or getattr(self.train, "distill", "") is not None:
            raise RecipeError(f"BornAgain was given train={self.train!r}; expected a training without a teacher: "
                              "BornAgain(recover.Train(epochs=5))")
        self.train.check()
        self.taught.check()

    def check_on(self, network: Network, task: Task, batch: Batch) -> None:
        """Raises what the training of the first generation raises."""
        dataclasses.replace(self.train, distill=dataclasses.replace(self.taught, teacher=None)).check_on(network, task,
                                                                                                       batch)

    def fit(self, network: Network, task: Task, context: Context) -> Network:
        self.check()
        teacher = network
        for number in range(1, self.generations + 1):
            folder = None if context.workdir is None else context.workdir / f"generation_{number}"
            own = dataclasses.replace(context, workdir=folder, original=teacher,
                                      seed=seed_from(context.seed, "generation", number))
            born = fresh(network, own.seed)
            step = dataclasses.replace(self.train, distill=dataclasses.replace(self.taught, teacher=None))
            teacher = step.fit(born, task, own)
        return teacher
