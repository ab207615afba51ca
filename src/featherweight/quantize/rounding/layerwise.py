"""Rounding of one layer: towards what the float network gives at this place, from the inputs that it gets by now."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.calibrate.walk import run
from featherweight.network.edit import bias_name
from featherweight.network.matrices import as_matrix, from_matrix, rows
from featherweight.numerics import adaround as ada
from featherweight.numerics import gptq as sweeps
from featherweight.quantize.layers import LayerForm
from featherweight.quantize.rounding.regions import activation
from featherweight.quantize.rounding.state import Pair, Walk, WeightGrid, advance
from featherweight.seeds import seed_from

ROWS = 1 << 17  #: inputs of a layer that are looked at: places of calibration samples, chosen at random
ELEMENTS = 1 << 25  #: numbers of such inputs that are held at once
CHUNK = 1 << 24  #: numbers of them that are unfolded at once
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
    def of(cls, walk: Walk, layer: LayerForm) -> RoundedLayer:
        node, name = layer.nodes[0], layer.stored.weight
        weight, grid = walk.whole.tensor(name).detach(), walk.grids[name]
        kept = None if grid.kept is None else as_matrix(node, grid.kept)
        return cls(name, node, weight, as_matrix(node, weight),
                   WeightGrid(as_matrix(node, grid.scale), grid.spec, kept))

    def put(self, matrix: Tensor) -> Tensor:
        """A matrix as the weight that it stands for; float32, number times scale."""
        numbers = (matrix / self.grid.scale).round().float()
        return from_matrix(self.node, numbers * self.grid.scale, self.weight.shape)


def pool(site: RoundedLayer, states: list[Pair]) -> tuple[Tensor, Tensor]:
    """Rows [g, n, i] that a layer, which is the next call, reads in the rounded network; and the float one's."""
    node, weight = site.node, site.weight
    generator = torch.Generator().manual_seed(seed_from("rows", site.name))
    width = site.matrix.shape[0] * site.matrix.shape[2]
    share = min(ROWS, ELEMENTS // width) / len(states)
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for whole, short in states:
        given = [half.get(node.args[0]).float() for half in (short, whole)]
        length = given[0].shape[0]
        alone = weight.dim() > 2 and given[0].dim() < weight.dim()
        size = length if alone else max(1, CHUNK // max(1, given[0][:1].numel() * weight[:1, :1].numel()))
        for start in range(0, length, size):
            unfolded = [rows(node, weight, x[start:start + size]) for x in given]
            count = max(1, round(share * min(size, length - start) / length))
            chosen = torch.randperm(unfolded[0].shape[1], generator=generator)[:count].to(weight.device)
            for held, new in zip(found, unfolded, strict=True):
                held.append(new[:, chosen])
    return torch.cat(found[0], 1), torch.cat(found[1], 1)


def swept(site: RoundedLayer, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's matrix on its grid by GPTQ and some coordinate descent; and what each weight was to be before it was
    rounded for the last time."""
    gram, cross, grid = (x.mT @ x).double(), (x.mT @ z).double(), site.grid
    matrix = site.matrix.double()
    if x.shape[1] >= ENOUGH * x.shape[2]:
        matrix = sweeps.towards(matrix, gram, cross)
    found, aims = sweeps.gptq(matrix, gram, grid.scale, grid.spec, kept=grid.kept)
    passes = PASSES.get(grid.spec.bits, 0)
    if not passes:
        return found, aims
    return sweeps.descend(found, matrix, gram, grid.scale, grid.spec, kept=grid.kept, passes=passes)


def gptq(walk: Walk) -> dict[str, Tensor]:
    """Frantar et al. 2023, layer by layer, after moving the weights towards the float network's outputs."""
    found = {}
    for layer in walk.layers:
        site = RoundedLayer.of(walk, layer)
        advance(walk.states, walk.order.number[site.node.name], set())
        found[site.name] = site.put(swept(site, *pool(site, walk.states))[0])
        walk.set(site.name, found[site.name])
    return found


def adaround(walk: Walk) -> dict[str, Tensor]:
    """Nagel et al. 2020, layer by layer, with the activation that follows and towards the float network's outputs
    (eq. 25)."""
    found = {}
    for layer in walk.layers:
        site = RoundedLayer.of(walk, layer)
        advance(walk.states, walk.order.number[site.node.name], set())
        found[site.name] = site.put(_learned(walk, site, *pool(site, walk.states)))
        walk.set(site.name, found[site.name])
    return found


def _learned(walk: Walk, site: RoundedLayer, x: Tensor, z: Tensor) -> Tensor:
    node, after, known = site.node, activation(site.node), bias_name(site.node)
    bias = None if known is None else walk.whole.tensor(known).detach().view(site.matrix.shape[0], 1, -1)

    def finish(made: Tensor) -> Tensor:
        made = made if bias is None else made + bias
        if after is None:
            return made
        values = {node.name: made}
        run([after], values, walk.whole.tensor, {})
        return values[after.name]

    generator = torch.Generator().manual_seed(seed_from("adaround", site.name))
    grid = site.grid
    return ada.adaround(site.matrix, grid.scale, grid.spec, x, finish(z @ site.matrix.mT), finish, generator,
                        kept=grid.kept, schedule=SCHEDULE)


__all__ = ["RoundedLayer", "adaround", "gptq", "pool", "swept"]
