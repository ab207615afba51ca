"""``QuantizePlan``: which weights are stored how, and which activations are rounded to which grid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from featherweight.errors import PlanError
from featherweight.network import Network, fold_batch_norm
from featherweight.network.devices import device_of
from featherweight.numerics.formats import weight_bits
from featherweight.quantize.layers import LayerForm
from featherweight.quantize.prepare.gates import write_out
from featherweight.quantize.prepare.rescale import Product, multiply
from featherweight.quantize.store import Point, Stored, round_value, scale_name, store_weight
from featherweight.steps import Plan

#: bytes of graph that a rounded value and a stored weight bring along, about, in the larger of the two files
POINT_BYTES = 900
WEIGHT_BYTES = 900
#: bytes of a scale and its zero point
SCALE_BYTES = 5


@dataclass(frozen=True)
class Rung:
    """One attempt of a ``Ladder``: its name, the score with it, and whether it stayed. seconds are not compared."""

    name: str
    score: float
    kept: bool
    seconds: float = field(default=0.0, compare=False)

    def __str__(self) -> str:
        return f"{self.name}: {self.score:.4g}{'' if self.kept else ', dropped'} ({self.seconds:.1f} s)"


@dataclass(frozen=True)
class QuantizePlan(Plan):
    """Which weights are stored how, and which values are rounded to which grid.

    changed: tensors of the network (batch norm folded) that get new values first, which lie in the plan's tensors under
    their names: equalized or rounded weights, corrected biases. Biases stay float: a target whose kernels want whole
    ones rounds them to (input scale times weight scale) when it exports. trail: what a ``Ladder`` tried, in order.
    gates: activations that are written out as products first. products: with vectors that are put in first, by which
    values are divided before they are rounded, or multiplied after; the vectors lie in the plan's tensors.
    """

    kind: ClassVar[str] = "quantize/1"
    stored: tuple[Stored, ...]
    points: tuple[Point, ...]
    changed: tuple[str, ...] = ()
    fold_batch_norm: bool = True
    trail: tuple[Rung, ...] = ()
    products: tuple[Product, ...] = ()
    gates: tuple[str, ...] = ()

    def summary(self) -> str:
        kinds = Counter(s.kind for s in self.stored)
        values = Counter(p.kind for p in self.points)
        parts = [f"{n} weights as {kind}" for kind, n in kinds.items()] or ["0 weights"]
        stayed = [r.name for r in self.trail if r.kept]
        names = " + ".join(stayed[2:] or stayed[1:])
        climbed = f"; {names}: {self.trail[0].score:.4g} -> {self._reached():.4g}" if stayed else ""
        return ", ".join([*parts, *(f"{n} values as {kind}" for kind, n in values.items())]) + climbed

    def _reached(self) -> float:
        return [r.score for r in self.trail if r.kept][-1]

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *(f"  {rung}" for rung in self.trail)])

    def apply(self, network: Network) -> Network:
        """A copy with batch norm folded, the named weights stored as whole numbers, the named values rounded."""
        if not self.stored and not self.points:
            return network.copy()
        result = fold_batch_norm(network) if self.fold_batch_norm else network.copy()
        write_out(result, self.gates)
        for product in self.products:
            multiply(result, product, self._tensor(product.factor).to(device_of(result)))
        for name in self.changed:
            self._change(result, name)
        for stored in self.stored:
            store_weight(result, stored, self.tensors.get(scale_name(stored.weight)))
        for point in self.points:
            round_value(result, point)
        result.changed()
        return result

    def _change(self, network: Network, name: str) -> None:
        new, known = self._tensor(name), network.tensors().get(name)
        if known is None or known.shape != new.shape:
            raise PlanError(f"the plan changes {name!r} of {list(new.shape)}, which the network "
                            f"{'has not' if known is None else f'has as {list(known.shape)}'}; plan again for it")
        network.set_tensor(name, new.to(known))

    def _tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise PlanError(f"the plan lacks the tensor {name!r}; load it with the tensors that lie beside it")
        return self.tensors[name]


def growth(folded: Network, found: Sequence[LayerForm], points: Sequence[Point]) -> tuple[str, ...]:
    """("bytes",) where the network is so small that the file's graph grows by more than its weights shrink."""
    saved = sum(folded.tensor(f.stored.weight).numel() * (4 - weight_bits(f.stored.kind) / 8)
                - SCALE_BYTES * f.stored.scales(folded.tensor(f.stored.weight).shape) for f in found)
    grouped = sum(f.stored.group is not None for f in found)
    return ("bytes",) if saved < POINT_BYTES * len(points) + WEIGHT_BYTES * (len(found) + grouped) else ()


__all__ = ["QuantizePlan", "Rung", "growth"]
