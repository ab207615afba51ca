"""Rounding of one layer: towards what the float network gives at this place, from the inputs that it gets by now."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.calibrate.pair import Pair
from featherweight.calibrate.walk import run
from featherweight.network import Network
from featherweight.network.edit import bias_name
from featherweight.network.matrices import as_matrix, from_matrix
from featherweight.numerics import adaround as ada
from featherweight.numerics import gptq as sweeps
from featherweight.quantize.layers import LayerForm
from featherweight.quantize.rounding.regions import activation
from featherweight.quantize.rounding.state import Rounding, WeightGrid
from featherweight.seeds import seed_from

ROWS = 1 << 17  #: inputs of a layer that are looked at: places of calibration samples, chosen at random
ENOUGH = 4  #: rows for each input of a layer, below which weights are not refit before they are rounded
PASSES = {1: 2, 2: 2}  #: bits -> passes of coordinate descent after the sweep; with more bits they gained nothing
SCHEDULE = ada.Schedule()  #: of "adaround"


@dataclass(frozen=True)
class RoundedLayer:
    """A layer as a matrix [g, o, i] with its grid in the same shape."""

    name: str
    node: Node
    weight: Tensor
    matrix: Tensor
    grid: WeightGrid

    @classmethod
    def of(cls, work: Rounding, layer: LayerForm) -> RoundedLayer:
        node, name = layer.nodes[0], layer.stored.weight
        weight, grid = work.whole.tensor(name).detach(), work.grids[name]
        kept = None if grid.kept is None else as_matrix(node, grid.kept)
        return cls(name, node, weight, as_matrix(node, weight),
                   WeightGrid(as_matrix(node, grid.scale), grid.spec, kept))

    def put(self, matrix: Tensor) -> Tensor:
        """A matrix as the weight that it stands for; float32, number times scale."""
        numbers = (matrix / self.grid.scale).round().float()
        return from_matrix(self.node, numbers * self.grid.scale, self.weight.shape)


#: (layer, rows [g, n, i] that it reads in the rounded network, those of the float one) -> its matrix on its grid
Fit = Callable[[RoundedLayer, Tensor, Tensor], Tensor]


def pool(layer: RoundedLayer, pair: Pair) -> tuple[Tensor, Tensor]:
    """Rows [g, n, i] that a layer, which is the next call, reads in the rounded network; and the float one's."""
    return pair.rows(layer.node, ROWS, seed_from("rows", layer.name))


def one_by_one(work: Rounding, layers: Iterable[LayerForm], pair: Pair, fit: Fit) -> dict[str, Tensor]:
    """By weight's name, what ``fit`` finds for each of these layers; those after it see it rounded.

    pair: where both networks are; it goes ahead to the last of the layers.
    """
    found = {}
    for form in layers:
        layer = RoundedLayer.of(work, form)
        pair.go_to(layer.node.name)
        found[layer.name] = layer.put(fit(layer, *pool(layer, pair)))
        pair.set(layer.name, found[layer.name])
    return found


def swept(layer: RoundedLayer, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's matrix on its grid by GPTQ and some coordinate descent; and what each weight was to be before it was
    rounded for the last time."""
    gram, cross, grid = (x.mT @ x).double(), (x.mT @ z).double(), layer.grid
    matrix = layer.matrix.double()
    if x.shape[1] >= ENOUGH * x.shape[2]:
        matrix = sweeps.towards(matrix, gram, cross)
    found, aims = sweeps.gptq(matrix, gram, grid.scale, grid.spec, kept=grid.kept)
    passes = PASSES.get(grid.spec.bits, 0)
    if not passes:
        return found, aims
    return sweeps.descend(found, matrix, gram, grid.scale, grid.spec, kept=grid.kept, passes=passes)


def gptq(work: Rounding) -> dict[str, Tensor]:
    """Frantar et al. 2023, layer by layer, after moving the weights towards the float network's outputs."""
    return one_by_one(work, work.layers, work.pair, lambda layer, x, z: swept(layer, x, z)[0])


def adaround(work: Rounding) -> dict[str, Tensor]:
    """Nagel et al. 2020, layer by layer, with the activation function that follows and towards the float network's
    outputs (eq. 25)."""
    return one_by_one(work, work.layers, work.pair, partial(_learned, work.whole))


def _learned(network: Network, layer: RoundedLayer, x: Tensor, z: Tensor) -> Tensor:
    node, after, known = layer.node, activation(layer.node), bias_name(layer.node)
    bias = None if known is None else network.tensor(known).detach().view(layer.matrix.shape[0], 1, -1)

    def finish(made: Tensor) -> Tensor:
        made = made if bias is None else made + bias
        if after is None:
            return made
        values = {node.name: made}
        run([after], values, network.tensor, {})
        return values[after.name]

    generator = torch.Generator().manual_seed(seed_from("adaround", layer.name))
    grid = layer.grid
    return ada.adaround(layer.matrix, grid.scale, grid.spec, x, finish(z @ layer.matrix.mT), finish, generator,
                        kept=grid.kept, schedule=SCHEDULE)


__all__ = ["RoundedLayer", "adaround", "gptq", "one_by_one", "pool", "swept"]
