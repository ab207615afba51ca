"""What works beside the training of low-rank networks: a decay of products, a pull towards low rank.

Full-rank warm-up (Wang et al. 2021, "Pufferfish", section 3; Wang et al. 2023, "Cuttlefish"), then ranks, is a recipe::

    fw.Recipe([fw.recover.Train(epochs=5), fw.factorize.LowRank(rank="stable"),
               fw.recover.Train(epochs=25, beside=(fw.factorize.FrobeniusDecay(1e-4),))])

The factors that ``LowRank`` leaves share the singular values evenly: spectral initialization (Khodak et al. 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.factorize.layers import NAMES, factorable
from featherweight.factorize.plan import LowRankPlan
from featherweight.factorize.steps import LowRank
from featherweight.factorize.surgery import kernels
from featherweight.network import Network
from featherweight.network.edit import CONVOLUTIONS, TRANSPOSED
from featherweight.network.layers import select
from featherweight.network.operators import schema_argument
from featherweight.numerics.factors.chains import Link, composed
from featherweight.steps import ALONE, Context, Plan, Rewrite, Stage
from featherweight.steps.companion import Companion
from featherweight.steps.options import Numbers, check_number, check_numbers
from featherweight.task import Inputs, Task

ABOVE = Numbers(1e-4, above=0)


# ---- Frobenius decay
@dataclass(frozen=True)
class FrobeniusDecay:
    """Beside the training of a factorized network: weight decay of each product of factors, as a whole layer has it.

    The term strength / 2 * sum |W|^2 over the kernels W that chains of links stand for (Khodak et al. 2021,
    "Initialization and regularization of factorized neural layers", section 3.2). Decay of the factors alone pulls the
    product towards low nuclear norm instead; set the optimizer's weight_decay to 0 beside this.

    Example:
        >>> wide = fw.capture(nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 5)), torch.zeros(2, 12))
        >>> thin = fw.factorize.LowRank(ranks={"0": 4}).plan(wide, fw.Task()).apply(wide)
        >>> decay = fw.factorize.FrobeniusDecay(1e-2).start(thin, fw.Task(), fw.steps.Context())
        >>> float(decay.loss(None, None, None).detach()) > 0
        True
    """

    strength: float = 1e-4

    def check(self) -> None:
        """Raises RecipeError for a strength that is not above 0."""
        check_number("FrobeniusDecay", "strength", self.strength, ABOVE)

    def start(self, network: Network, task: Task, context: Context = ALONE) -> Companion:
        """Raises RecipeError where the network has no factorized layer."""
        self.check()
        chains = chains_of(network)
        if not chains:
            raise RecipeError("FrobeniusDecay was put beside the training of a network without factorized layers; put "
                              "LowRank(rank=\"stable\") into the recipe before this training")
        return _Decay(self.strength, network, chains)


@dataclass
class _Decay(Companion):
    strength: float
    network: Network
    chains: Sequence[Sequence[tuple[str, int]]]

    def loss(self, inputs: Inputs, output: Any, target: Any) -> Tensor | None:
        found = []
        for chain in self.chains:
            links = [Link("", self.network.tensor(name), groups) for name, groups in chain]
            found.append(composed(links).square().sum())
        return self.strength / 2 * torch.stack(found).sum()


def chains_of(network: Network) -> list[list[tuple[str, int]]]:
    """The factorized layers: for each the names and groups of its links, as ``composed`` takes them."""
    found: dict[str, list[tuple[str, int]]] = {}
    for layer in select(network).layers:
        stem, _, part = layer.weight.removesuffix("weight").rstrip(".").rpartition(".")
        call = layer.calls[0]
        if part in NAMES:
            groups = int(schema_argument(call, "groups")) if call.target in CONVOLUTIONS else 1
            mine = found.setdefault(stem, [])
            mine.insert(0 if call.target in TRANSPOSED else len(mine), (layer.weight, groups))
    return [chain for chain in found.values() if len(chain) > 1]


# ---- trained rank pruning
@dataclass(frozen=True)
class Nuclear(Rewrite):
    """Trained rank pruning (Xu et al. 2020): the training pulls the weights to low rank, the step then factorizes them.

    step: the ``LowRank`` that says ranks, form and layers; it is planned at the end, on the trained network, with data
        if it asks for that. strength: of the nuclear norm, the sum of singular values: its subgradient U V^T times
        ``strength`` is added to the weights' gradients (Xu et al., eq. 9). every: optimizer steps between two singular
        value decompositions, each times as strong; 20 in the paper.

    Beside a training it is written ``Train(during=(fw.factorize.Nuclear(fw.factorize.LowRank(energy=0.9)),))``; as a
    step of its own it is ``step``.

    Example:
        >>> pull = fw.factorize.Nuclear(fw.factorize.LowRank(energy=0.9, min_gain=0.0), strength=1e-3)
        >>> trained = fw.recover.Train(epochs=1, during=(pull,)).fit(network, task, fw.steps.Context())
    """

    step: LowRank = field(default_factory=LowRank)
    strength: float = 3e-4
    every: int = 20
    stage: ClassVar[Stage] = Stage.STRUCTURE

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        self.step.check()
        check_numbers(self, {"strength": ABOVE, "every": Numbers(20, least=1, whole=True)})

    def plan(self, network: Network, task: Task) -> LowRankPlan:
        """What ``step`` plans."""
        self.check()
        return self.step.plan(network, task)

    def start(self, network: Network, task: Task, context: Context = ALONE) -> Companion:
        self.check()
        return Pull(self, network, task, [layer.layer.weight for layer in factorable(network, self.step.ignore)[0]])


@dataclass
class Pull(Companion):
    """A ``Nuclear`` at work on the weights ``names`` of a network that trains. count: optimizer steps so far."""

    asked: Nuclear
    network: Network
    task: Task
    names: Sequence[str]
    count: int = 0

    def after_backward(self) -> None:
        self.count += 1
        if self.count % self.asked.every:
            return
        calls = {layer.weight: layer.calls[0] for layer in select(self.network).layers}
        for name in self.names:
            weight = self.network.tensor(name)
            if weight.grad is None:
                continue
            pull = torch.cat([directions(k) for k in kernels(calls[name], weight.detach())])
            turned = pull.shape != weight.shape
            weight.grad.add_(pull.t() if turned else pull, alpha=self.asked.strength * self.asked.every)

    def state(self) -> dict[str, Tensor]:
        return {"count": torch.tensor(self.count)}

    def restore(self, state: Any) -> None:
        self.count = int(state["count"])

    def finish(self) -> Plan:
        network = self.network.copy().eval()
        return self.asked.plan(network, self.task)


def directions(kernel: Tensor) -> Tensor:
    """U V^T of the matrix [o, i * k] of a kernel: a subgradient of the sum of its singular values."""
    u, s, vh = torch.linalg.svd(kernel.flatten(1).float(), full_matrices=False)
    found: Tensor = (u * (s > 1e-6 * s.max().clamp_min(1e-30))) @ vh
    return found.view(kernel.shape).to(kernel.dtype)


__all__ = ["FrobeniusDecay", "Nuclear", "chains_of", "directions"]
