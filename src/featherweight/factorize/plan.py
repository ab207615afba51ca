"""``LowRankPlan``: which layers become chains of smaller ones, in which form and at which ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from featherweight.errors import PlanError, did_you_mean
from featherweight.factorize.surgery import kernels, links_of, replace, sizes_of, stem
from featherweight.network import Network
from featherweight.network.edit import clear_dead, read_tensors
from featherweight.network.layers import Layer, select
from featherweight.numerics.factors.chains import Link
from featherweight.numerics.factors.forms import FORMS, pointwise
from featherweight.steps import Plan


@dataclass(frozen=True)
class Split:
    """One layer that becomes several. ``ranks``: (r,) for a matrix, (rank of o, rank of i) of Tucker-2, as many as the
    ``form`` has. error: the squared error over the square of what the layer gave, of the weights, or of the outputs on
    calibration data where these were read; None: not counted."""

    weight: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    form: str = "tucker2"
    error: float | None = None

    @property
    def name(self) -> str:
        """The form by its name in ``FORMS``: a 1x1 kernel or a matrix has one rank, whatever it says."""
        return "svd" if self.form == "tucker2" and len(self.ranks) == 1 else self.form


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a split layer as the matrix [o, i * k], for the report: the ``changes`` are the values at
    these ``shares`` of the full rank, as parts of the largest. group: the layer's weight."""

    group: str
    shares: tuple[float, ...]
    changes: tuple[float, ...]
    kind: str = "spectrum"


@dataclass(frozen=True)
class LowRankPlan(Plan):
    """Which layers are split, at which ranks; their ``spectra``. Factors that data was read for lie in ``tensors``, as
    "NAME.reduce.weight" and "NAME.expand.bias"; the others are computed by ``apply``: they need no data.

    Example:
        >>> wide = fw.capture(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.zeros(2, 64))
        >>> plan = fw.factorize.LowRank(energy=0.5).plan(wide, fw.Task())
        >>> [split.weight for split in plan.splits]
        ['0.weight']
    """

    kind: ClassVar[str] = "factorize.low_rank/1"
    splits: tuple[Split, ...] = ()
    spectra: tuple[Spectrum, ...] = ()

    def apply(self, network: Network) -> Network:
        """A copy with a few calls in the place of each layer; PlanError where a layer is not as planned."""
        changed = network.copy()
        before = read_tensors(changed)
        layers = {layer.weight: layer for layer in select(changed).layers}
        for split in self.splits:
            if split.weight not in layers:
                raise PlanError(f"the plan splits {split.weight!r}, which no linear or convolution call here "
                                f"reads; {did_you_mean(split.weight, layers)}")
            layer = layers[split.weight]
            if not _fits(split, changed, layer):
                raise PlanError(f"the plan splits {split.weight!r} of shape {list(split.shape)} at ranks "
                                f"{list(split.ranks)}; it is {list(changed.tensor(split.weight).shape)} here: plan "
                                "again on this network")
            links = self._stored(split, changed, layer)
            links = links or links_of(layer.calls[0], changed.tensor(split.weight), split.name, split.ranks)
            replace(changed, layer, links, self.tensors.get(f"{stem(split.weight)}bias"))
        clear_dead(changed, before)
        return changed

    def _stored(self, split: Split, network: Network, layer: Layer) -> list[Link]:
        """The links whose weights lie in the plan; none where ``apply`` computes them."""
        weight = network.tensor(split.weight)
        shape = tuple(kernels(layer.calls[0], weight)[0].shape)
        names = {name: f"{stem(split.weight)}{name}.weight" for name, _, _ in
                 sizes_of(layer.calls[0], shape, split.name, split.ranks)}
        if not any(full in self.tensors for full in names.values()):
            return []
        found = []
        for name, size, groups in sizes_of(layer.calls[0], shape, split.name, split.ranks):
            given = self.tensors.get(names[name])
            if given is None or tuple(given.shape) != size:
                held = "none" if given is None else str(list(given.shape))
                raise PlanError(f"the plan's factor {names[name]!r} has shape {held}; expected {list(size)}: load the "
                                "plan with its tensors: Plan.load(path)")
            found.append(Link(name, given.to(weight), groups))
        return found

    def summary(self) -> str:
        shown = ", ".join(f"{stem(s.weight).rstrip('.')} {list(s.shape)} -> {form_text(s)}{error_text(s)}"
                          for s in self.splits)
        return f"low rank: {len(self.splits)} layers" + (f" ({shown})" if shown else "")


def form_text(split: Split) -> str:
    """A split's form and ranks: "8x8" of Tucker-2 and "8" of a matrix, "spatial 8" of another form."""
    usual = split.form == "tucker2" or (split.form == "svd" and _matrix(split.shape))
    return ("" if usual else f"{split.form} ") + "x".join(map(str, split.ranks))


def error_text(split: Split) -> str:
    """A split's error, as a part of what the layer gave, where it was counted."""
    return "" if split.error is None else f" (error {split.error ** 0.5:.1%})"


def _matrix(shape: Sequence[int]) -> bool:
    return len(shape) == 2 or all(k == 1 for k in shape[2:])


def _fits(split: Split, network: Network, layer: Layer) -> bool:
    """Whether the layer is the one that the split was made for, and can have its ranks."""
    weight = network.tensor(split.weight)
    if tuple(weight.shape) != split.shape or split.name not in FORMS:
        return False
    shape = tuple(kernels(layer.calls[0], weight)[0].shape)
    if (pointwise(shape) and split.name != "svd") or (split.name.startswith("grouped")
                                                      and shape[1] % int(split.name.removeprefix("grouped"))):
        return False
    form = FORMS[split.name]
    return len(split.ranks) == len(form.full(shape)) and form.within(shape, split.ranks) == split.ranks


__all__ = ["LowRankPlan", "Spectrum", "Split", "form_text"]
