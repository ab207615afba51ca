"""``Mutual``: several students that learn at once and from one another, of which the one that was given stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from featherweight.distill.losses.response import divergence
from featherweight.distill.outputs import check_output, choose, targets
from featherweight.errors import RecipeError
from featherweight.network import Network
from featherweight.network.devices import device_of, placed
from featherweight.seeds import seed_from
from featherweight.steps import Companion, Context
from featherweight.steps.options import Numbers, check_known, check_numbers
from featherweight.task import Inputs, Task, call

Loss = Callable[[Sequence[Tensor], Tensor, float], Tensor]


def each_other(logits: Sequence[Tensor], classes: Tensor, temperature: float) -> Tensor:
    """Every student towards every other: the mean of ``T^2 KL``, summed. DML, Zhang et al. 2018, eq. 8."""
    total = logits[0].new_zeros(())
    for i, own in enumerate(logits):
        others = [divergence(own, other.detach(), temperature) for j, other in enumerate(logits) if j != i]
        total = total + torch.stack(others).mean()
    return total


def ensemble(logits: Sequence[Tensor], classes: Tensor, temperature: float) -> Tensor:
    """Every student towards the mean of all logits, which learns from the targets itself, as ONE's ensemble does with a
    gate in the place of the mean. Lan et al. 2018, eqs. 3 to 7."""
    mean = torch.stack(list(logits)).mean(0)
    return cross_entropy(mean, classes) + torch.stack([divergence(own, mean.detach(), temperature)
                                                       for own in logits]).sum()


def collaborative(logits: Sequence[Tensor], classes: Tensor, temperature: float) -> Tensor:
    """Every student towards the lowest logits that any has against the target's. KDCL, Guo et al. 2020, eq. 7."""
    index = classes[:, None]
    against = torch.stack([own - own.gather(1, index) for own in logits])
    lowest = against.min(0).values.detach()
    return torch.stack([divergence(own, lowest, temperature) for own in logits]).sum()


#: name -> what the students learn from one another
LOSSES: dict[str, Loss] = {"dml": each_other, "one": ensemble, "kdcl": collaborative}


@dataclass(frozen=True)
class Mutual:
    """Peers are trained beside the network, on the same batches, and all learn from one another; the peers are gone.

    peers: how many, copies of the network with fresh weights; or networks of one's own, as a tuple. They are trained by
    the same optimizer, without weight decay, on the cross-entropy of integer target classes. A checkpoint has them.
    loss: "dml" (from each other), "one" (from the mean of all), "kdcl" (from the lowest logits). weight: on that term.

    Example:
        >>> step = fw.recover.Train(beside=(fw.distill.Mutual(peers=1),))
        >>> trained = step.fit(network, task, fw.steps.Context())
    """

    peers: int | tuple[Any, ...] = 1
    loss: str = "dml"
    temperature: float = 1.0
    weight: float = 1.0
    output: str | int | None = None

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        check_numbers(self, {"temperature": Numbers(1.0, above=0), "weight": Numbers(1.0, above=0)})
        check_known("Mutual", "loss", self.loss, LOSSES)
        check_output(self)
        if isinstance(self.peers, (int, float)):
            check_numbers(self, {"peers": Numbers(1, least=1, whole=True)})
        elif not self.peers or not all(isinstance(p, Network) for p in self.peers):
            raise RecipeError(f"Mutual was given peers={self.peers!r}; expected how many copies, or networks: "
                              "Mutual(peers=(fw.capture(model, inputs),))")

    def start(self, network: Network, task: Task, context: Context) -> Companion:
        self.check()
        device = device_of(network)
        given = list(self.peers) if isinstance(self.peers, tuple) else [
            fresh(network, seed_from(context.seed, "peer", i)) for i in range(self.peers)]
        return _Peers(self, [placed(peer, device).train() for peer in given])


class _Peers(Companion):
    def __init__(self, options: Mutual, peers: list[Network]) -> None:
        self.options, self.peers = options, peers

    @property
    def notes(self) -> list[str]:
        return [f"distill.Mutual trained {len(self.peers)} peer(s) beside the network; they are gone"]

    def parameters(self) -> list[Tensor]:
        return [p for peer in self.peers for p in peer.parameters() if p.requires_grad]

    def loss(self, inputs: Inputs, output: Any, target: Any) -> Tensor:
        classes, which = targets(target, "Mutual"), self.options.output
        logits = [choose(output, which).float(), *(choose(call(peer, inputs), which).float() for peer in self.peers)]
        if len({own.shape for own in logits}) > 1:
            raise RecipeError("the students of distill.Mutual give outputs of shapes "
                              f"{[list(x.shape) for x in logits]}; the classes must be equal")
        own = torch.stack([cross_entropy(given, classes) for given in logits[1:]]).sum()
        return own + self.options.weight * LOSSES[self.options.loss](logits, classes, self.options.temperature)

    def state(self) -> dict[str, Tensor]:
        return {f"{i}/{name}": buffer for i, peer in enumerate(self.peers) for name, buffer in peer.named_buffers()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for i, peer in enumerate(self.peers):
                for name, buffer in peer.named_buffers():
                    buffer.copy_(state[f"{i}/{name}"])


def fresh(network: Network, seed: int) -> Network:
    """A copy with new weights: matrices normal with variance 2 / inputs (He et al. 2015), norms and biases as at rest.

    Vectors that are no biases are ones (the scales of norms); running statistics are 0 and 1. Zeros of the weights in
    the network's ``patterns`` stay.
    """
    other, generator = network.copy(), torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for name, tensor in other.tensors().items():
        if id(tensor) in done or not tensor.is_floating_point():
            continue
        done.add(id(tensor))
        leaf = name.rpartition(".")[2]
        if isinstance(tensor, torch.nn.Parameter):
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
            value = noise * (2 / max(1, tensor[0].numel())) ** 0.5 if tensor.dim() > 1 else torch.full(
                tensor.shape, float("bias" not in leaf))
        elif leaf in STATISTICS:
            value = torch.full(tensor.shape, STATISTICS[leaf])
        else:
            continue
        zeros = any(known in other.patterns for known in other.tied_names(name))
        with torch.no_grad():
            tensor.copy_(torch.where(tensor == 0, 0.0, value.to(tensor.device)) if zeros else value)
    return other


#: a running statistic -> where it begins
STATISTICS = {"running_mean": 0.0, "running_var": 1.0}
__all__ = ["LOSSES", "Mutual", "fresh"]
