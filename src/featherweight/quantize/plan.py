"""``QuantizePlan``: which weights are stored how, and which activations are rounded to which grid."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from featherweight.errors import PlanError
from featherweight.judge.costs import growth
from featherweight.network import Network, fold_batch_norm
from featherweight.network.devices import device_of
from featherweight.numerics.formats import GRIDS
from featherweight.quantize.prepare.expand_activations import write_out
from featherweight.quantize.prepare.rescale import Product, multiply
from featherweight.quantize.store import Point, Stored, round_value, scale_name, store_weight
from featherweight.steps import Plan
from featherweight.steps.joined import narrowed


@dataclass(frozen=True)
class Rung:
    """One attempt of a ``Ladder``: its name, the score with it, and whether it stayed. seconds are not compared.

    Example:
        >>> plan = fw.balance.Ladder(rungs=("mse",)).plan(network, task)
        >>> [rung.name for rung in plan.trail][:2]
        ['float', 'as given']
    """

    name: str
    score: float
    kept: bool
    seconds: float = field(default=0.0, compare=False)

    def __str__(self) -> str:
        return f"{self.name}: {self.score:.4g}{'' if self.kept else ', dropped'} ({self.seconds:.1f} s)"


@dataclass(frozen=True)
class QuantizePlan(Plan):
    """Which weights are stored how, and which activations are rounded to which grid.

    changed: tensors of the network (batch norm folded) that get new values first, which lie in the plan's tensors under
    their names: equalized or rounded weights, corrected biases. Biases stay float: a target whose kernels want whole
    ones rounds them to (input scale times weight scale) when it exports. trail: what a ``Ladder`` tried, in order.
    gates: activations that are written out as products first. products: with vectors that are put in first, by which
    activations are divided before they are rounded, or multiplied after; the vectors lie in the plan's tensors.

    Example:
        >>> plan = fw.quantize.Quantize().plan(network, task)
        >>> [stored.weight for stored in plan.stored]
        ['0.weight', '3.weight', '7.weight']
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
        return ", ".join([*parts, *(f"{n} activations as {kind}" for kind, n in values.items())]) + climbed

    def _reached(self) -> float:
        return [r.score for r in self.trail if r.kept][-1]

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *(f"  {rung}" for rung in self.trail)])

    def apply(self, network: Network) -> Network:
        """A copy with batch norm folded, the named weights stored as integers, the named activations rounded."""
        if not self.stored and not self.points:
            return network.copy()
        result = self._folded(network)
        for product in self.products:
            multiply(result, product, self._tensor(product.factor).to(device_of(result)))
        self.round(result)
        return result

    def round(self, folded: Network) -> None:
        """Stores weights and rounds activations in ``folded`` itself: the network in the form that activations are
        rounded in, with the products that even channels out."""
        for name in self.changed:
            self._change(folded, name)
        for stored in self.stored:
            store_weight(folded, stored, self.tensors.get(scale_name(stored.weight)))
        for point in self.points:
            round_value(folded, point)
        folded.changed()

    def after(self, earlier: Plan, network: Network) -> QuantizePlan:
        """The plan with weights and scales as ``earlier`` leaves them, rounding what is read then. Raises PlanError
        after another quantization, and where zeros are to stay that the grid of a weight does not have."""
        if isinstance(earlier, QuantizePlan):
            raise PlanError("a network is quantized once; write one quantize.Quantize(mixed={...}) for layers of "
                            "different kinds")
        trained = network.copy()
        for name in self.changed:
            self._change(trained, name)
        left, kept = earlier.apply(trained), earlier.kept(network)
        tensors = {**self.tensors, **{name: left.tensor(name).detach() for name in self.changed}}
        for stored in self.stored:
            spec, name = GRIDS.get(stored.kind), stored.weight
            if spec is not None and spec.odd and not left.tensor(name).all():
                raise PlanError(f"the zeros of {name!r} have no place among the levels of {stored.kind}; write "
                                f'Quantize(mixed={{"{name}": "ternary"}}), or Weights(ignore=("{name}",))')
            if stored.axis is not None and name in kept:
                tensors[scale_name(name)] = narrowed(self._tensor(scale_name(name)), kept[name][stored.axis:][:1])
        before, folded = self._folded(network), self._folded(left)
        points = tuple(p for point in self.points if (p := _carried(point, before, folded)) is not None)
        return announced(replace(self, points=points, tensors=tensors), left)

    def _folded(self, network: Network) -> Network:
        """A copy in the form that activations are rounded in."""
        result = fold_batch_norm(network) if self.fold_batch_norm else network.copy()
        write_out(result, self.gates)
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


def announced(plan: QuantizePlan, network: Network, after: Network | None = None) -> QuantizePlan:
    """The plan with its word on what grows: the file of so small a network that its graph grows by more than its
    weights shrink. after: what the plan makes of the network, where that is at hand."""
    if not plan.stored and not plan.points:
        return plan
    return replace(plan, grows=growth(network, plan.apply(network) if after is None else after, ("bytes",)))


def _carried(point: Point, before: Network, after: Network) -> Point | None:
    """The point in a graph of which channels were cut: read by those of its readers that still read the activation, and
    by choices of channels that the cut put in; None where none is left, as within a shuffle that became such a
    choice."""
    then, now = ({n.name: n for n in network.graph.nodes} for network in (before, after))
    if point.node not in now:
        return None
    known = {user.name for user in then[point.node].users}
    readers = [user.name for user in now[point.node].users if user.name in point.readers
               or (user.name not in known and user.target is torch.ops.aten.index_select.default)]
    return replace(point, readers=tuple(readers)) if readers else None


__all__ = ["QuantizePlan", "Rung", "announced"]
