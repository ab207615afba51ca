"""Batch norms that no longer train: folded into the call before them, or with their statistics in scale and shift."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.network.edit import (
    WEIGHTED,
    bias_name,
    clear_dead,
    constant_value,
    read_tensors,
    readers_of,
    tensor_node,
    weight_name,
)
from featherweight.network.matrices import along_outputs
from featherweight.network.network import Network
from featherweight.network.operators import schema_argument

aten = torch.ops.aten


def fold_batch_norm(network: Network) -> Network:
    """A copy in which every batch norm that only follows one convolution or linear call is folded into it.

    Jacob et al. 2018, eq. 14: w' = w * gamma / sqrt(var + eps) per output channel o, b' = beta + (b - mean) * that.
    The copy computes the same in evaluation mode and has no batch statistics left to train there. A weight that
    several calls read, or a call whose result is read elsewhere too, is left alone.

    Example:
        >>> folded = fw.network.fold_batch_norm(network)
        >>> folded.calls(torch.ops.aten.batch_norm.default)
        []
        >>> torch.allclose(folded(images), network(images), atol=1e-5)
        True
    """
    folded = network.copy()
    before, taken = read_tensors(folded), set(folded.tensors())
    for norm in folded.calls(aten.batch_norm.default):
        call = norm.args[0]
        if isinstance(call, Node) and _foldable(folded, call, norm):
            _fold(folded, call, norm, taken)
    clear_dead(folded, before)
    return folded


def settle_batch_norm(network: Network) -> Network:
    """A copy whose batch norms keep their statistics in their scale and shift: gamma' = gamma / sqrt(var + eps),
    beta' = beta - mean * gamma', and then mean 0 and variance 1 - eps, alike in every channel.

    The copy computes the same in evaluation mode, and its archive holds two vectors a batch norm instead of four. For
    networks whose weights must stay as they are (codebooks, masks), where folding would change them; train before, as
    a training would normalize by the statistics of its batches once more. A batch norm without scale and shift of its
    own, or one that shares a tensor with another call, is left alone.

    Example:
        >>> settled = fw.network.settle_batch_norm(network)
        >>> torch.allclose(settled(images), network(images), atol=1e-5)
        True
    """
    settled = network.copy()
    for norm in settled.calls(aten.batch_norm.default):
        names = [str(a.target) if isinstance(a, Node) and a.op == "get_attr" else "" for a in norm.args[1:5]]
        if all(n and len(readers_of(settled, n)) == 1 and len(settled.tied_names(n)) == 1 for n in names):
            gamma, beta, mean, var = (settled.tensor(n).detach() for n in names)
            scale, eps = norm_scale(settled, norm), float(norm.args[7])  # type: ignore[arg-type]
            shift = beta.double() - mean.double() * scale
            for name, value in zip(names, (scale, shift, torch.zeros_like(mean), torch.full_like(var, 1 - eps)),
                                   strict=True):
                settled.set_tensor(name, value.to(gamma.dtype))
    settled.changed()
    return settled


def _foldable(network: Network, call: Node, norm: Node) -> bool:
    name = weight_name(call)
    if call.target not in WEIGHTED or name is None or len(call.users) != 1 or schema_argument(norm, "training"):
        return False
    bias = bias_name(call)
    has_bias = len(call.args) > 2 and call.args[2] is not None
    stats = [constant_value(network, a) for a in norm.args[3:5]]
    affine = [a is None or constant_value(network, a) is not None for a in norm.args[1:3]]
    return (all(s is not None for s in stats) and all(affine) and len(readers_of(network, name)) == 1
            and (not has_bias or (bias is not None and len(network.users_of(bias)) == 1)))


def _fold(network: Network, call: Node, norm: Node, taken: set[str]) -> None:
    """taken: names of tensors, to which that of a new bias is added."""
    name = str(weight_name(call))
    weight = network.tensor(name).detach()
    beta, mean = (constant_value(network, a) for a in norm.args[2:4])
    assert mean is not None
    scale = norm_scale(network, norm)
    old = bias_name(call)
    bias = network.tensor(old).detach().double() if old is not None else torch.zeros_like(scale)
    bias = (bias - mean.double()) * scale + (0 if beta is None else beta.detach().double())
    network.set_tensor(name, (weight.double() * along_outputs(call, scale, weight)).to(weight.dtype))
    if old is not None:
        network.set_tensor(old, bias.to(weight.dtype))
    else:
        new = name.removesuffix("weight") + "bias"
        if new in taken or not name.endswith("weight"):
            new = name + "_bias"
        network.add_tensor(new, bias.to(weight.dtype))
        taken.add(new)
        node = tensor_node(network, new, call)
        call.args = (*call.args[:2], node, *call.args[3:])
    norm.replace_all_uses_with(call)
    network.graph.erase_node(norm)


def norm_scale(network: Network, norm: Node) -> Tensor:
    """What a batch norm multiplies every channel with, [o] float64: gamma / sqrt(var + eps)."""
    gamma, var = (constant_value(network, norm.args[i]) for i in (1, 4))
    assert var is not None
    scale = torch.rsqrt(var.detach().double() + float(norm.args[7]))  # type: ignore[arg-type]
    return scale if gamma is None else scale * gamma.detach().double()

