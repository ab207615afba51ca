"""``SoftSharing``: weights are drawn together in a training by a prior that is learned beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.network import Network
from featherweight.numerics.sharing.mixture import components, surprise
from featherweight.share.plan import CodebookPlan, Shared
from featherweight.share.steps import Codebook
from featherweight.steps import ALONE, Companion, Context, Plan, Rewrite, Stage
from featherweight.steps.options import Numbers, check_numbers
from featherweight.task import Inputs, Task

NUMBERS = {"clusters": Numbers(16, least=3, most=256, whole=True), "strength": Numbers(0.01, above=0),
           "zero_share": Numbers(0.9, above=0, below=1), "min_size": Numbers(1024, least=0, whole=True),
           "begin": Numbers(0.0, least=0, below=1)}
Codes = dict[str, tuple[Tensor, Tensor]]
WIDTH = 0.25  #: scale of the components at the start, in distances between them
NARROWEST = -7.0  #: log of the smallest scale against a layer's largest weight: a narrower one would be a spike


@dataclass(frozen=True)
class SoftSharing(Rewrite):
    """Soft weight sharing (Nowlan & Hinton 1992; Ullrich et al. 2017).

    In a training, each layer's weights get a mixture of Gaussians as their prior, whose means, scales and shares are
    trained too. At the end each weight takes the mean of the component that most likely gave it: the mixture has become
    a codebook, its zero component the pruned weights.

    clusters: components of a layer, that at zero among them. strength: of the prior against the task's loss: the term
        is strength * mean(-log p(weight)) over all weights. zero_share: the share of the component at zero.
    min_size, ignore: as in ``Codebook``. begin: the progress of the training from which the prior acts.

    Works in a training alone: ``Train(beside=(SoftSharing(),))``. Raises RecipeError elsewhere.

    Example:
        >>> step = fw.share.SoftSharing(clusters=8, min_size=100)
        >>> trained = fw.recover.Train(epochs=1, beside=(step,)).fit(network, task, fw.steps.Context())
        >>> "3.weight_codebook" in trained.tensors()
        True
    """

    clusters: int = 16
    strength: float = 0.01
    zero_share: float = 0.9
    min_size: int = 1024
    ignore: tuple[str, ...] = ()
    begin: float = 0.0
    stage: ClassVar[Stage] = Stage.PRECISION

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        check_numbers(self, NUMBERS)

    def check_training(self) -> None:
        """Every option has a meaning in a training."""

    def plan(self, network: Network, task: Task) -> CodebookPlan:
        """Raises RecipeError: there is nothing to decide without a training."""
        raise RecipeError("SoftSharing draws weights together in a training; write Train(beside=(SoftSharing(),)), or "
                          "Codebook() for codebooks at once")

    def start(self, network: Network, task: Task, context: Context = ALONE) -> MixturePrior:
        """The mixtures at work in a training."""
        self.check()
        hard = Codebook(clusters=self.clusters, min_size=self.min_size, ignore=self.ignore)
        layers, skipped = hard.layers(network)

        def finish(codes: Codes) -> CodebookPlan:
            shared = tuple(Shared(n, len(book), True) for n, (book, _) in codes.items())
            tensors = {f"{what}.{n}": t.cpu() for n, found in codes.items()
                       for what, t in zip(("codebook", "index"), found, strict=True)}
            return CodebookPlan(shared=shared, skipped=skipped, tensors=tensors)

        return MixturePrior(network, [layer.weight for layer in layers], self, finish)


class MixturePrior(Companion):
    """The prior's term of the loss, and the codebooks that are left of it."""

    def __init__(self, network: Network, names: Sequence[str], step: SoftSharing,
                 plan: Callable[[Codes], Plan]) -> None:
        self.network, self.step, self.plan, self.on = network, step, plan, False
        self.mixtures = {n: _started(network.tensor(n).detach(), step.clusters - 1) for n in names}
        self.total = sum(network.tensor(n).numel() for n in names)

    def update(self, progress: float) -> None:
        self.on = progress >= self.step.begin

    def loss(self, inputs: Inputs, output: Any, target: Any) -> Tensor | None:
        if not self.on or not self.mixtures:
            return None
        terms = []
        for name, mixture in self.mixtures.items():
            flat = self.network.tensor(name).reshape(-1)
            terms.append(flat.numel() * surprise(flat, *_bounded(flat, *mixture), self.step.zero_share))
        return self.step.strength / self.total * torch.stack(terms).sum()

    def parameters(self) -> list[Tensor]:
        return [t for mixture in self.mixtures.values() for t in mixture]

    @torch.no_grad()
    def finish(self) -> Plan:
        return self.plan({n: self._codes(n) for n in self.mixtures})

    def _codes(self, name: str) -> tuple[Tensor, Tensor]:
        """Codebook, ascending after the held zero, without unused entries; and the index."""
        weight = self.network.tensor(name).detach()
        flat = weight.reshape(-1)
        means, scales, logits = _bounded(flat, *self.mixtures[name])
        index = components(flat, means, scales, logits, self.step.zero_share).masked_fill(flat == 0, 0)
        book = torch.cat([means.new_zeros(1), means])
        used = torch.bincount(index, minlength=len(book)) > 0
        used[0] = True
        order = torch.cat([torch.zeros_like(index[:1]), 1 + torch.argsort(book[1:])])
        order = order[used[order]]
        place = torch.zeros_like(book, dtype=torch.int64)
        place[order] = torch.arange(len(order), device=place.device)
        return book[order].to(weight), place[index].to(torch.uint8).view(weight.shape)


def _started(weight: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means evenly between the smallest and the largest weight, log scales (of zero first) and logits of the shares."""
    low, high = float(weight.min()), float(weight.max())
    means = torch.linspace(low, high, count, device=weight.device, dtype=weight.dtype)
    width = max((high - low) / max(count - 1, 1) * WIDTH, 1e-8)
    scales = torch.full((count + 1,), width, device=weight.device, dtype=weight.dtype).log()
    logits = torch.zeros_like(means)
    return means.requires_grad_(), scales.requires_grad_(), logits.requires_grad_()


def _bounded(flat: Tensor, means: Tensor, scales: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mixture with no component narrower than a layer's weights allow."""
    least = flat.detach().abs().max().clamp_min(1e-8).log() + NARROWEST
    return means, torch.maximum(scales, least), logits


__all__ = ["MixturePrior", "SoftSharing"]
