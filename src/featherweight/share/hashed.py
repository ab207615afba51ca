"""``Hashed``: weights that share numbers as a hash of their place says, which needs no index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from featherweight.network import Network
from featherweight.network.layers import Layer, select
from featherweight.numerics.sharing.hashing import drawn, hashed, of_hashed, prime_below
from featherweight.share.made import Made, applied, planned, stays
from featherweight.steps import Plan, Rewrite, Stage
from featherweight.steps.options import COUNT, SEED, Numbers, check_numbers
from featherweight.task import Task

aten = torch.ops.aten
#: what is stored for a layer, behind its weight's name
PARTS = ("base", "rows", "columns")


@dataclass(frozen=True)
class HashedWeight:
    """One weight of hashed numbers. prime: of the hash. error: |W' - W|^2 / |W|^2."""

    weight: str
    shape: tuple[int, ...]
    prime: int
    error: float


@dataclass(frozen=True)
class HashedPlan(Plan):
    """Which weights become hashed: ``tensors["NAME_base"]`` the numbers, ``NAME_rows`` and ``NAME_columns`` the hash.

    Example:
        >>> wide = fw.capture(nn.Linear(64, 64), torch.zeros(2, 64))
        >>> plan = fw.share.Hashed(share=1 / 8).plan(wide, fw.Task())
        >>> [plan.tensors[f"{one.weight}_base"].numel() for one in plan.hashed]
        [511]
    """

    kind: ClassVar[str] = "share.hashed/1"
    hashed: tuple[HashedWeight, ...] = ()

    def apply(self, network: Network) -> Network:
        """A copy whose weights are looked up in ``NAME_base``, a parameter, when the network runs."""
        return applied(network, self.hashed, self.tensors, PARTS, self._put)

    def _put(self, at: Made, one: HashedWeight) -> None:
        base, rows, columns = (at.stored(part, self.tensors[f"{one.weight}_{part}"]) for part in PARTS)
        wide = [at.make(aten.to.dtype, n, torch.int32) for n in (rows, columns)]
        product = at.make(aten.mul.Tensor, at.make(aten.reshape.default, wide[0], [-1, 1]), wide[1])
        place = at.make(aten.reshape.default, at.make(aten.remainder.Scalar, product, one.prime), [-1])
        both = at.make(aten.cat.default, [base, at.make(aten.neg.default, base)], 0)
        at.in_place(at.make(aten.reshape.default, at.make(aten.index_select.default, both, 0, place), list(one.shape)))

    def summary(self) -> str:
        shown = ", ".join(f"{h.weight} (error {h.error ** 0.5:.1%})" for h in self.hashed)
        return f"hashed weights: {len(self.hashed)} layers" + (f" ({shown})" if shown else "")


@dataclass(frozen=True)
class Hashed(Rewrite):
    """Weights that share few numbers by a hash of their row and column, up to the sign (HashedNets: Chen et al. 2015);
    a training is to follow, as what shares a number has nothing in common.

    share: of the numbers that a layer stores, as a part of its weights. seed: of the hash.
    min_size: smaller weights are left alone.
    ignore: patterns of layers to leave alone (``network/layers``).

    Computed as before, the weight being made when the file is loaded: it saves bytes, not time. What would not become
    smaller is left and named. Raises RecipeError for options that make no sense.

    Example:
        >>> wide = fw.capture(nn.Linear(64, 64), torch.zeros(2, 64))
        >>> small = fw.share.Hashed(share=1 / 8).plan(wide, fw.Task()).apply(wide)
        >>> fw.codec.archive_bytes(small) < fw.codec.archive_bytes(wide) / 3
        True
    """

    share: float = 0.125
    seed: int = 0
    min_size: int = 1024
    ignore: tuple[str, ...] = ()
    stage: ClassVar[Stage] = Stage.PRECISION

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        check_numbers(self, {"share": Numbers(0.125, above=0, below=1), "seed": SEED, "min_size": COUNT})

    def plan(self, network: Network, task: Task) -> HashedPlan:
        """Reads no data."""
        self.check()
        return planned(network, select(network, self.ignore), lambda layer: self._fitted(network, layer),
                       lambda layer: self._refusal(network, layer), lambda hashed, own: HashedPlan(hashed, tensors=own))

    def _fitted(self, network: Network, layer: Layer) -> tuple[HashedWeight, dict[str, Tensor]]:
        weight = network.tensor(layer.weight).detach()
        matrix = weight.flatten(1)
        prime = prime_below(max(3, 2 * round(self.share * matrix.numel()) - 1))
        a, b = (n.to(weight.device) for n in drawn(len(matrix), matrix.shape[1], prime, self.seed))
        base = hashed(matrix, a, b, prime)
        away = (of_hashed(base, a, b, prime) - matrix).double().square().sum() / matrix.double().square().sum()
        tensors = {f"{layer.weight}_{part}": value for part, value in zip(PARTS, (base, a, b), strict=True)}
        return HashedWeight(layer.weight, tuple(weight.shape), prime, float(away)), tensors

    def _refusal(self, network: Network, layer: Layer) -> str:
        size = network.tensor(layer.weight).numel()
        if size < self.min_size:
            return f"only {size} weights, fewer than min_size={self.min_size}"
        return stays(network, layer, PARTS)


__all__ = ["Hashed", "HashedPlan", "HashedWeight"]
