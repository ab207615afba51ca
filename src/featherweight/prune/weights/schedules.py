"""Masks at work in a training: how many weights are zero at a progress, and whether they may come back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.network import Network
from featherweight.steps import Companion, Plan
from featherweight.steps.joined import narrowed, widened

Masks = dict[str, Tensor]
#: (network with masked weights as they count, sparsity, factors on the scores) -> new masks
Choose = Callable[[Network, float, Mapping[str, Tensor]], Masks]
REGROW = ("none", "surgery")
#: a kept weight goes below a threshold t / MARGIN, a masked one comes back above t: the ratio b / a of Guo et al. 2016
#: in their released code, 1.1 / 0.9
MARGIN = 1.1 / 0.9


def way(progress: float, begin: float, end: float) -> float:
    """How far ``progress`` is from ``begin`` to ``end``, 0..1."""
    return min(max((progress - begin) / (end - begin), 0.0), 1.0)


def cubic(progress: float, begin: float, end: float, final: float) -> float:
    """Sparsity at ``progress`` (Zhu & Gupta 2017, eq. 1, from no zeros at all)."""
    return final * (1 - (1 - way(progress, begin, end)) ** 3)


def iterative(progress: float, begin: float, end: float, final: float) -> float:
    """The same share of what is left goes in each step (as Han et al. 2015 prune and train in turns)."""
    left: float = (1 - final) ** way(progress, begin, end)
    return 1 - left


def constant(progress: float, begin: float, end: float, final: float) -> float:
    """All at ``begin``."""
    return final if progress >= begin else 0.0


#: schedule -> (progress, begin, end, final sparsity) -> sparsity
CURVES: dict[str, Callable[[float, float, float, float], float]] = {
    "gradual": cubic, "iterative": iterative, "constant": constant}


@dataclass(frozen=True)
class Grow:
    """How masks grow: by ``curve`` from progress ``begin`` to ``end``, anew every ``frequency``, to ``sparsity``."""

    curve: str
    regrow: str
    begin: float
    end: float
    frequency: float
    sparsity: float

    @property
    def settled(self) -> float:
        """The progress at which masks are decided for the last time."""
        if self.regrow != "none":
            return (self.end + 1) / 2
        return self.begin if self.curve == "constant" else self.end

    def sparsity_at(self, progress: float) -> float:
        return CURVES[self.curve](progress, self.begin, self.end, self.sparsity)


class Through(torch.autograd.Function):
    """``weight * mask`` whose gradient passes to every weight as if nothing were masked (straight through)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class MaskSchedule(Companion):
    """Masks that multiply the weights which the graph reads.

    Without regrowth a masked weight gets no gradient and stays masked. With ``regrow="surgery"`` it gets the gradient
    of what the graph read, and new masks are chosen from all weights, the kept ones favoured by ``MARGIN``.

    Beside companions that cut the network, masks are chosen for what their plans leave of it, so that the sparsity and
    the pattern are those of the network that comes out; they are chosen anew until these plans are settled.
    """

    def __init__(self, network: Network, names: list[str], grow: Grow, choose: Choose,
                 plan: Callable[[Masks], Plan]) -> None:
        self.network, self.grow, self.choose, self.plan = network, grow, choose, plan
        self.masks = {n: torch.ones_like(network.tensor(n), dtype=torch.bool) for n in names}
        self.done = -1
        self.copy: Network | None = None
        self.earlier: Sequence[Companion] = ()
        self.removers: list[Callable[[], None]] = []
        for name in names:
            for node in network.reads_of(name):
                self.removers.append(network.add_tap(node.name, self._tap(name)))

    def _tap(self, name: str) -> Callable[[Tensor], Tensor]:
        def masked(weight: Tensor) -> Tensor:
            mask = self.masks[name]
            if mask.device != weight.device:
                mask = self.masks[name] = mask.to(weight.device)
            if self.grow.regrow == "surgery":
                through: Tensor = Through.apply(weight, mask)  # type: ignore[no-untyped-call]
                return through
            return weight * mask

        return masked

    def follow(self, earlier: Sequence[Companion]) -> None:
        self.earlier = earlier

    def update(self, progress: float) -> None:
        grow = self.grow
        if progress < grow.begin:
            return
        last = progress >= grow.settled and all(companion.settled for companion in self.earlier)
        due = 1 << 30 if last else int(progress / grow.frequency + 1e-9)
        if due > self.done:
            self.done = due
            self._decide(grow.sparsity_at(progress))

    def _decide(self, sparsity: float) -> None:
        """New masks from the network as it stands: masked weights count as zero, which go first, unless they regrow."""
        current = self._now()
        masks = {n: m.to(current.tensor(n).device) for n, m in self.masks.items()}
        if self.grow.regrow == "none":
            for name, mask in masks.items():
                current.set_tensor(name, current.tensor(name).detach() * mask)
        favour = {n: 1 + (MARGIN - 1) * m.double() if self.grow.regrow == "surgery" else torch.ones(m.shape)
                  for n, m in masks.items()}
        plans = [plan for companion in self.earlier if (plan := companion.now()) is not None]
        self.masks = self._chosen(current, plans, sparsity, favour, masks)

    def _chosen(self, network: Network, plans: Sequence[Plan], sparsity: float, favour: Mapping[str, Tensor],
                masks: Masks) -> Masks:
        """Masks chosen for what ``plans`` leave of ``network``; where they leave nothing, ``masks`` stay as they are.

        favour, masks: in the shapes of ``network``, as the new masks are.
        """
        if not plans:
            return self.choose(network, sparsity, favour)
        first, *rest = plans
        kept = first.kept(network)
        favour, small = ({n: narrowed(t, kept.get(n, ())) for n, t in given.items()} for given in (favour, masks))
        found = self._chosen(first.apply(network), [p.after(first, network) for p in rest], sparsity, favour, small)
        if self.grow.regrow == "none":
            found = {n: m & small[n].to(m.device) for n, m in found.items()}
        return masks | {n: widened(m, kept[n], masks[n]) if n in kept else m for n, m in found.items()}

    def _now(self) -> Network:
        """A copy in evaluation mode with the values as they are, the same object every time."""
        if self.copy is None:
            self.copy = self.network.copy().eval()
        with torch.no_grad():
            for name, tensor in self.network.tensors().items():
                self.copy.tensor(name).copy_(tensor)
        return self.copy

    def finish(self) -> Plan:
        """Takes the taps off; the final masks hold the full sparsity, however far the training went."""
        self.update(1.0)
        self.close()
        return self.plan({n: m.cpu() for n, m in self.masks.items()})

    def close(self) -> None:
        for remove in self.removers:
            remove()
        self.removers.clear()

    def state(self) -> dict[str, Tensor]:
        return {"done": torch.tensor(self.done), **{f"mask.{n}": m.cpu() for n, m in self.masks.items()}}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.done = int(state["done"])
        self.masks = {n: state[f"mask.{n}"].bool() for n in self.masks}
