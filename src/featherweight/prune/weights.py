"""``Weights``: sets the smallest weights to zero, at once or little by little while the network trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import Tensor

from featherweight.errors import PlanError, RecipeError, did_you_mean
from featherweight.network import Network
from featherweight.network.surgery import WEIGHTED, weight_name
from featherweight.steps import Driver, Plan, Rewrite, Skipped, Stage
from featherweight.task import Task

SCOPES = ("global", "layer")
PATTERN = "unstructured"


@dataclass(frozen=True)
class WeightPlan(Plan):
    """Which weights stay: ``tensors[name]`` is a mask (bool, the weight's shape, True = kept); ``zeros[name]`` counts
    the others."""

    zeros: dict[str, int]

    def apply(self, network: Network) -> Network:
        """A copy with the masked weights zero, which ``patterns`` asks whoever trains it to keep so."""
        other = network.copy()
        known = other.tensors()
        for name in self.zeros:
            mask = self.tensors.get(name)
            if mask is None:
                raise PlanError(f"the plan has no mask for {name!r}; load it with its tensors: Plan.load(path)")
            if name not in known:
                raise PlanError(f"the plan masks {name!r}, which this network does not have; "
                                f"{did_you_mean(name, known)}")
            weight = known[name].detach()
            if weight.shape != mask.shape:
                raise PlanError(f"the mask of {name!r} has shape {list(mask.shape)}; the weight has "
                                f"{list(weight.shape)}: make the plan on this very network")
            other.set_tensor(name, weight.masked_fill(~mask.to(weight.device, torch.bool), 0))
            for tied in network.tied_names(name):
                other.patterns[tied] = PATTERN
        other.changed()
        return other

    def summary(self) -> str:
        total = sum(m.numel() for m in self.tensors.values())
        zeros = sum(self.zeros.values())
        return f"set {zeros} of {total} weights in {len(self.zeros)} tensors to zero ({zeros / max(total, 1):.0%})"


@dataclass(frozen=True)
class Weights(Rewrite):
    """Magnitude pruning of single weights (Han et al. 2015): those nearest to zero become zero.

    sparsity: fraction of zeros among the weights of convolutions and linear layers, 0..1 (1 left out).
    scope: "global" ranks all weights together; "layer" takes the same fraction of every tensor.
    ignore: glob patterns of module paths or tensor names to leave alone.

    During training (in a Fit's ``during=(...)``) the masks grow from none at progress ``begin`` to ``sparsity`` at
    progress ``end``, a new mask every ``frequency`` of the way, on the cubic schedule of Zhu & Gupta 2017, eq. 1:
    s_t = s_f (1 - (1 - (t - begin) / (end - begin))^3). Zeros in a dense tensor save no time.
    """

    sparsity: float = 0.8
    scope: str = "global"
    ignore: tuple[str, ...] = ()
    begin: float = 0.0
    end: float = 0.75
    frequency: float = 0.01

    stage: ClassVar[Stage] = Stage.SPARSITY

    def plan(self, network: Network, task: Task) -> WeightPlan:
        names, left = self._candidates(network)
        weights = {n: network.tensor(n).detach() for n in names}
        return plan_of(magnitude_masks(weights, self.sparsity, self.scope), left)

    def start(self, network: Network, task: Task) -> GradualMasks:
        names, left = self._candidates(network)
        return GradualMasks(self, network, names, left)

    def _candidates(self, network: Network) -> tuple[list[str], tuple[Skipped, ...]]:
        """Weights of convolutions and linear calls, each tied one once; what else reads a weight is named."""
        self._check()
        found: dict[int, str] = {}
        left: list[Skipped] = []
        used: set[str] = set()
        for node in network.calls(*WEIGHTED):
            name, path = weight_name(node), str(node.meta.get("module", ""))
            if name is None:
                left.append(Skipped(path or node.name, "its weight is computed, not stored"))
                continue
            tied = network.tied_names(name)
            hit = next((p for p in self.ignore for n in (*tied, *(t.rpartition(".")[0] for t in tied), path)
                        if fnmatchcase(n, p)), None)
            if hit is not None:
                used.add(hit)
                left.append(Skipped(name, f"ignore={hit!r}"))
            elif not network.tensor(name).is_floating_point():
                left.append(Skipped(name, f"it holds {network.tensor(name).dtype}, no floating-point numbers"))
            else:
                found.setdefault(id(network.tensor(name)), name)
        left += [Skipped(p, "this pattern of ignore=(...) matched no weight") for p in self.ignore if p not in used]
        if not found and not left:
            left.append(Skipped("", "the network has no convolution and no linear layer"))
        return list(found.values()), tuple(dict.fromkeys(left))

    def _check(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise RecipeError(f"Weights was given sparsity={self.sparsity}; expected the fraction of zeros, from 0 and "
                              "below 1, as in Weights(sparsity=0.8)")
        if self.scope not in SCOPES:
            raise RecipeError(f"Weights has no scope {self.scope!r}; {did_you_mean(self.scope, SCOPES)}; "
                              "write Weights(scope=\"global\")")
        if not (0 <= self.begin < self.end <= 1 and self.frequency > 0):
            raise RecipeError(f"Weights was given begin={self.begin}, end={self.end}, frequency={self.frequency}; "
                              "expected 0 <= begin < end <= 1, frequency above 0, as in Weights(begin=0.0, end=0.75)")


def plan_of(masks: Mapping[str, Tensor], skipped: tuple[Skipped, ...]) -> WeightPlan:
    zeros = {n: int(m.numel() - m.sum()) for n, m in masks.items()}
    changed = {n: z for n, z in zeros.items() if z}
    return WeightPlan(changed, tensors={n: masks[n] for n in changed}, skipped=skipped)


def magnitude_masks(weights: Mapping[str, Tensor], sparsity: float, scope: str) -> dict[str, Tensor]:
    """Masks that keep the largest weights: exactly ``round(sparsity * n)`` zeros, over all (global) or in each tensor.

    weights: name -> tensor of any shape; the masks are bool tensors of the same shapes, on the CPU.
    """
    if scope == "layer":
        return {n: _mask(w.abs().float().flatten().cpu(), sparsity).view(w.shape) for n, w in weights.items()}
    if not weights:
        return {}
    flat = [w.abs().float().flatten().cpu() for w in weights.values()]
    whole = _mask(torch.cat(flat), sparsity)
    parts = torch.split(whole, [f.numel() for f in flat])
    return {n: p.clone().view(w.shape) for (n, w), p in zip(weights.items(), parts, strict=True)}


def _mask(sizes: Tensor, sparsity: float) -> Tensor:
    mask = torch.ones(sizes.numel(), dtype=torch.bool)
    count = round(sparsity * sizes.numel())
    if count:
        mask[sizes.argsort(stable=True)[:count]] = False
    return mask


def cubic(progress: float, begin: float, end: float, final: float) -> float:
    """Sparsity at ``progress`` (Zhu & Gupta 2017, eq. 1, from no zeros at all)."""
    share = min(max((progress - begin) / (end - begin), 0.0), 1.0)
    return final * (1 - (1 - share) ** 3)


class GradualMasks(Driver):
    """Masks on the weights of a network in training: they multiply what the graph reads, so that a masked weight gets
    no gradient and stays masked."""

    def __init__(self, step: Weights, network: Network, names: list[str], skipped: tuple[Skipped, ...]) -> None:
        self.step, self.network, self.skipped = step, network, skipped
        self.masks = {n: torch.ones_like(network.tensor(n), dtype=torch.bool) for n in names}
        self.done = -1
        self.removers: list[Callable[[], None]] = []
        for name in names:
            for node in [n for n in network.graph.nodes if n.op == "get_attr" and n.target in network.tied_names(name)]:
                self.removers.append(network.add_tap(node.name, self._tap(name)))

    def _tap(self, name: str) -> Callable[[Tensor], Tensor]:
        def masked(weight: Tensor) -> Tensor:
            mask = self.masks[name]
            if mask.device != weight.device:
                mask = self.masks[name] = mask.to(weight.device)
            return weight * mask

        return masked

    def update(self, progress: float) -> None:
        step = self.step
        if progress < step.begin:
            return
        due = int(min(progress, step.end) / step.frequency + 1e-9) if progress < step.end else 1 << 30
        if due > self.done:
            self.done = due
            self._grow(cubic(progress, step.begin, step.end, step.sparsity))

    def _grow(self, sparsity: float) -> None:
        """New masks from what the graph reads now: weights that are zero already stay so."""
        weights = {n: self.network.tensor(n).detach() for n in self.masks}
        current = {n: w * self.masks[n].to(w.device) for n, w in weights.items()}
        self.masks = magnitude_masks(current, sparsity, self.step.scope)

    def finish(self) -> WeightPlan:
        """Takes the taps off; the final masks hold the full sparsity, however far the training went."""
        self.update(1.0)
        for remove in self.removers:
            remove()
        self.removers.clear()
        return plan_of({n: m.cpu() for n, m in self.masks.items()}, self.skipped)

    def state(self) -> dict[str, Tensor]:
        return {"done": torch.tensor(self.done), **{f"mask.{n}": m.cpu() for n, m in self.masks.items()}}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.done = int(state["done"])
        self.masks = {n: state[f"mask.{n}"].bool() for n in self.masks}
