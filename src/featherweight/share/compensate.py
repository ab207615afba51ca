"""Codebooks on calibration data, layer by layer: each makes up for what the codebooks before it, and its own, did."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from featherweight.calibrate.pair import Pair
from featherweight.network import Network
from featherweight.network.layers import Layer
from featherweight.network.matrices import as_matrix, from_matrix
from featherweight.numerics.gptq import towards
from featherweight.numerics.sharing.codebooks import Coded, packed
from featherweight.numerics.sharing.compensated import compensated
from featherweight.share.plan import bias_of
from featherweight.task import Task

COMPENSATIONS = ("none", "obs")
BATCHES = 8  #: of the calibration split that are read

#: (weights, whether entry 0 is a held zero, their importances) -> a codebook and an index; the price of a bit
Start = Callable[[Tensor, bool, Tensor], tuple[Coded, float]]


@torch.no_grad()
def codes_of(network: Network, task: Task, layers: Sequence[Layer], start: Start,
             holds: Callable[[Tensor], bool]) -> dict[str, Tensor]:
    """``codebook.NAME`` and ``index.NAME`` of each layer's weight; ``bias.NAME``, where the layer has a bias of its own
    that makes up for the mean of what is missing.

    start: gives what the sweep begins with. holds: whether the zeros of a weight are held. Layers come in the order of
    the graph. The inputs of a weight with several calls are those of its first.
    """
    task.require("calibration")
    pair, found = Pair.of(network, task.batches("calibration", BATCHES)), dict[str, Tensor]()
    pair.admit()
    for layer in layers:
        name, node = layer.weight, layer.calls[0]
        pair.go_to(node.name)
        weight, bias = network.tensor(name).detach(), bias_of(network, name)
        inputs = [rows.double() for rows in pair.rows(node)]
        means = [rows.mean(1, keepdim=True) for rows in inputs]
        x, z = (rows - mean for rows, mean in zip(inputs, means, strict=True)) if bias else inputs
        matrix, gram = as_matrix(node, weight).double(), x.mT @ x / x.shape[1]
        aim = towards(matrix, gram, x.mT @ z / x.shape[1])
        coded = _layer(aim, gram, matrix == 0 if holds(weight) else None, start)
        made = coded.codebook[coded.index.long()]
        found[f"codebook.{name}"] = coded.codebook.to(weight.dtype)
        found[f"index.{name}"] = from_matrix(node, coded.index, weight.shape).clone()
        pair.set(name, from_matrix(node, made, weight.shape))
        if bias:
            missing = (matrix @ means[1].mT - made @ means[0].mT).reshape(-1)
            value = network.tensor(bias).detach()
            found[f"bias.{name}"] = (value.double() + missing).to(value.dtype)
            pair.set(bias, found[f"bias.{name}"])
    return {key: t.cpu() for key, t in found.items()}


def _layer(aim: Tensor, gram: Tensor, held: Tensor | None, start: Start) -> Coded:
    """The codes of a layer as a matrix [g, o, i], float64."""
    importance = gram.diagonal(dim1=-2, dim2=-1)[:, None].expand_as(aim)
    first, price = start(aim if held is None else aim.masked_fill(held, 0), held is not None, importance)
    entries, index = compensated(aim, gram, first.codebook, first.index.long(), price, held)
    return packed(aim, entries, index, held is not None)


__all__ = ["COMPENSATIONS", "codes_of"]
