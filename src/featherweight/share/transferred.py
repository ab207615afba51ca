"""``Transferred``: few filters are stored, the others are made of them: scaled, negated, flipped, turned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from featherweight.network import Network
from featherweight.network.edit import CONVOLUTIONS, out_axis
from featherweight.network.layers import Layer, select
from featherweight.numerics.sharing.orbits import GROUPS, Orbits, orbits, turns_of
from featherweight.share.made import Made, applied, planned, stays
from featherweight.steps import Plan, Rewrite, Stage
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
        return applied(network, self.orbits, self.tensors, PARTS, self._put)

    def _put(self, at: Made, one: Orbit) -> None:
        values = {part: self.tensors[f"{one.weight}_{part}"] for part in PARTS}
        base, place, scale, turns = (at.stored(part, value) for part, value in values.items())
        m, c, k = values["base"].shape
        images = base
        if (g := values["turns"].numel() // k) > 1:
            images = at.make(aten.index_select.default, base, 2, at.make(aten.to.dtype, turns, torch.int32))
            images = at.make(aten.permute.default, at.make(aten.reshape.default, images, [m, c, g, k]), [2, 0, 1, 3])
            images = at.make(aten.reshape.default, images, [g * m, c, k])
        rows = at.make(aten.index_select.default, images, 0, at.make(aten.to.dtype, place, torch.int32))
        rows = at.make(aten.mul.Tensor, rows, at.make(aten.reshape.default, scale, [-1, 1, 1]))
        at.in_place(at.make(aten.reshape.default, rows, list(one.shape)))

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
        return planned(
            network, select(network, self.ignore), lambda layer: self._fitted(network, layer),
            lambda layer: self._refusal(network, layer), lambda orbits, own: TransferredPlan(orbits, tensors=own))

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
        return stays(network, layer, PARTS)


__all__ = ["Orbit", "Transferred", "TransferredPlan"]
