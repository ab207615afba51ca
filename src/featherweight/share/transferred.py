"""``Transferred``: few filters are stored, the others are made of them: scaled, negated, flipped, turned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from featherweight.errors import PlanError, did_you_mean
from featherweight.judge.costs import alone, growth
from featherweight.network import Network
from featherweight.network.edit import (
    CONVOLUTIONS,
    clear_dead,
    insert_call,
    out_axis,
    read_tensors,
    readers_of,
    tensor_node,
)
from featherweight.network.layers import Layer, not_finite, select
from featherweight.numerics.sharing.orbits import GROUPS, Orbits, orbits, turns_of
from featherweight.steps import Plan, Rewrite, Skipped, Stage
from featherweight.steps.options import COUNT, Numbers, check_known, check_numbers
from featherweight.task import Task

aten = torch.ops.aten
UNITS = ("filter", "window")
#: what is stored for a layer, behind its weight's name
PARTS = ("base", "place", "scale", "turns")


@dataclass(frozen=True)
class Orbit:
    """One weight whose rows are images of few. unit: what a row is, a filter [i, *k] or a window [*k] of one. error:
    |W' - W|^2 / |W|^2."""

    weight: str
    shape: tuple[int, ...]
    group: str
    unit: str
    error: float


@dataclass(frozen=True)
class TransferredPlan(Plan):
    """Which weights are made of which filters: ``tensors["NAME_base"]`` and the like.

    Example:
        >>> plan = fw.share.Transferred(share=0.25).plan(network, task)
        >>> all(orbit.error < 1 for orbit in plan.orbits)
        True
    """

    kind: ClassVar[str] = "share.transferred/1"
    orbits: tuple[Orbit, ...] = ()

    def apply(self, network: Network) -> Network:
        """A copy whose weights are computed of ``NAME_base`` and ``NAME_scale``, both trained where the weight was."""
        changed = network.copy()
        before = read_tensors(changed)
        for one in self.orbits:
            if one.weight not in changed.tensors():
                raise PlanError(f"the plan makes {one.weight!r} of few filters, which this network does not have; "
                                f"{did_you_mean(one.weight, changed.tensors())}")
            shape = tuple(changed.tensor(one.weight).shape)
            missing = [part for part in PARTS if f"{one.weight}_{part}" not in self.tensors]
            if shape != one.shape or missing:
                raise PlanError(f"the plan makes {one.weight!r} of shape {list(one.shape)}; here it is {list(shape)}, "
                                f"and the plan lacks {missing or 'nothing'}: plan again on this network, and load "
                                "plans with their tensors: Plan.load(path)")
            self._put(changed, one)
        clear_dead(changed, before)
        return changed

    def _put(self, network: Network, one: Orbit) -> None:
        weight, names = network.tensor(one.weight), network.tied_names(one.weight)
        trains = isinstance(weight, nn.Parameter) and weight.requires_grad
        reads = network.reads_of(one.weight)
        first, like = reads[0], next(iter(reads[0].users))
        for part in PARTS:
            value = self.tensors[f"{one.weight}_{part}"].to(weight.device)
            floats = value.is_floating_point()
            network.add_tensor(f"{one.weight}_{part}", nn.Parameter(value.to(weight), requires_grad=trains) if floats
                               else value, buffer=not floats)

        def make(target: Any, *args: Any) -> Any:
            return insert_call(network, target, args, before=first, like=like)

        base, place, scale, turns = (tensor_node(network, f"{one.weight}_{part}", first) for part in PARTS)
        m, c, k = network.tensor(f"{one.weight}_base").shape
        images = base
        if (g := network.tensor(f"{one.weight}_turns").numel() // k) > 1:
            images = make(aten.index_select.default, base, 2, make(aten.to.dtype, turns, torch.int32))
            images = make(aten.permute.default, make(aten.reshape.default, images, [m, c, g, k]), [2, 0, 1, 3])
            images = make(aten.reshape.default, images, [g * m, c, k])
        rows = make(aten.index_select.default, images, 0, make(aten.to.dtype, place, torch.int32))
        rows = make(aten.mul.Tensor, rows, make(aten.reshape.default, scale, [-1, 1, 1]))
        made = make(aten.reshape.default, rows, list(one.shape))
        for node in reads:
            node.replace_all_uses_with(made)
            network.graph.erase_node(node)
        for name in names:
            network.remove_tensor(name)

    def summary(self) -> str:
        shown = ", ".join(f"{o.weight} (error {o.error ** 0.5:.1%})" for o in self.orbits)
        return f"transferred filters: {len(self.orbits)} layers" + (f" ({shown})" if shown else "")


@dataclass(frozen=True)
class Transferred(Rewrite):
    """Stores few filters of a convolution and makes the others of them; a training is to follow.

    group: what makes one of another, each with a scale of its own, which may be negative, as in CReLU (Shang et al.
        2016): "scale" alone; "flips" along the axes of the window; "rotations" by quarters; "dihedral", both (the
        orbits of group convolutions: Cohen and Welling 2016, section 6).
    unit: what is shared: a whole "filter" [i, *k], of which ``share`` are stored, as a part of those there are; or a
        "window" [*k], of which a filter has one for every input channel and the layer stores ``windows``.
    ignore: patterns of layers to leave alone (``network/layers``).

    Computed as before, the weight being made when the file is loaded: it saves bytes, not time. What would not become
    smaller is left and named. Raises RecipeError for options that make no sense.

    Example:
        >>> wide = fw.capture(nn.Conv2d(16, 32, 3, padding=1), torch.zeros(2, 16, 8, 8))
        >>> small = fw.share.Transferred("dihedral", share=0.25).plan(wide, fw.Task()).apply(wide)
        >>> fw.codec.archive_bytes(small) < 0.5 * fw.codec.archive_bytes(wide)
        True
    """

    group: str = "dihedral"
    unit: str = "filter"
    share: float = 0.25
    windows: int = 16
    ignore: tuple[str, ...] = ()
    stage: ClassVar[Stage] = Stage.PRECISION

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        check_known("Transferred", "group", self.group, GROUPS)
        check_known("Transferred", "unit", self.unit, UNITS)
        check_numbers(self, {"share": Numbers(0.25, above=0, below=1), "windows": COUNT})

    def plan(self, network: Network, task: Task) -> TransferredPlan:
        """Reads no data."""
        self.check()
        selected = select(network, self.ignore)
        found: list[Orbit] = []
        skipped, tensors = list(selected.skipped), dict[str, Tensor]()
        for layer in selected.layers:
            reason = self._refusal(network, layer)
            if not reason:
                one, own = self._fitted(network, layer)
                inside = alone(network, layer.weight)
                grown = growth(inside, TransferredPlan((one,), tensors=own).apply(inside))
                reason = f"its {', '.join(grown)} would grow" if grown else ""
            if reason:
                skipped.append(Skipped(layer.weight, reason))
            else:
                found.append(one)
                tensors |= own
        return TransferredPlan(tuple(found), skipped=tuple(skipped), tensors=tensors)

    def _fitted(self, network: Network, layer: Layer) -> tuple[Orbit, dict[str, Tensor]]:
        weight = network.tensor(layer.weight).detach()
        window = list(weight.shape[2:])
        rows = weight.reshape(-1, weight.shape[1] if self.unit == "filter" else 1, math.prod(window))
        turns = turns_of(self.group, window)
        count = max(1, round(self.share * len(rows))) if self.unit == "filter" else self.windows
        made: Orbits = orbits(rows, min(count, len(rows)), turns)
        small = torch.uint8 if len(turns) * len(made.base) <= 256 else torch.int32
        values = {"base": made.base, "place": made.place.to(small), "scale": made.scale,
                  "turns": turns.flatten().to(torch.uint8 if turns.shape[1] <= 256 else torch.int32)}
        tensors = {f"{layer.weight}_{part}": values[part] for part in PARTS}
        return Orbit(layer.weight, tuple(weight.shape), self.group, self.unit, made.error), tensors

    def _refusal(self, network: Network, layer: Layer) -> str:
        """Why a layer stays as it is, whatever that saves; "" if it need not."""
        call, weight = layer.calls[0], network.tensor(layer.weight)
        if call.target not in CONVOLUTIONS or out_axis(call) or weight[0, 0].numel() == 1:
            return "no convolution with a window of more than one place"
        square = weight.dim() == 4 and weight.shape[2] == weight.shape[3]
        if self.group in ("rotations", "dihedral") and not square:
            return f"group={self.group!r} turns square windows of two axes only"
        if reason := not_finite(weight):
            return reason
        if not weight.any():
            return "its weight is all zero"
        if layer.weight in network.patterns:
            return f"its zeros are kept ({network.patterns[layer.weight]}); other filters would fill them"
        own = {str(call.target) for call in layer.calls}
        others = sorted({str(user.target) for user in readers_of(network, layer.weight)} - own)
        if others:
            return f"its weight is also read by {', '.join(others)}"
        taken = [name for part in PARTS if (name := f"{layer.weight}_{part}") in network.tensors()]
        return f"the name {taken[0]} is taken" if taken else ""


__all__ = ["Orbit", "Transferred", "TransferredPlan"]
