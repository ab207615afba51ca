"""Sums of two products of 8 bits in 16 bits, as x86 processors without VNNI instructions form them, and which scales
keep them from saturating.

The instruction PMADDUBSW (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2) multiplies unsigned
bytes by signed ones and adds neighbouring products two by two into signed 16 bits, which saturate: sat(u1 * w1 +
u2 * w2). Integer kernels add these sums in 32 bits. Neighbours are the activations of neighbouring channels at one
place of the kernel window; where the number of channels is odd, some kernels pair the last one with the first channel
of the next place, others with nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LOWEST, HIGHEST = -(1 << 15), (1 << 15) - 1  #: of signed 16 bits
#: how far rounding to nearest moves a weight, in steps of its scale
ROUNDED = 0.5
#: weights that are looked at together, which bounds the memory
AT_ONCE = 1 << 24


def pairs(numbers: Tensor) -> list[Tensor]:
    """``numbers`` [n, window, channels] as neighbours, [n, pairs, 2], for each way in which kernels pair them; what has
    no neighbour is paired with 0."""
    window, channels = numbers.shape[1:]
    ways = [numbers.flatten(1)]
    if channels % 2 and window > 1:
        ways.append(F.pad(numbers, (0, 1)).flatten(1))
    return [F.pad(way, (0, way.shape[1] % 2)).reshape(len(way), -1, 2) for way in ways]


def factors(steps: Tensor, largest: Tensor) -> Tensor:
    """By what the scale of each row has to grow so that no sum of two products saturates: [rows], 1 or more.

    steps: weights over their scale, [rows, window, channels]. largest: the largest unsigned integer that the
    activations of each channel reach, [channels]. A sum is largest where both activations reach theirs and both weights
    have one sign: u1 |w1| + u2 |w2|. One product alone fits: 255 * 128. For weights and activations of 8 bits, 2 is
    always enough.
    """
    rows = max(1, AT_ONCE // max(1, steps[0].numel())) if len(steps) else 1
    return torch.cat([_factors(part.float(), largest.float()) for part in torch.split(steps, rows)])


def _factors(steps: Tensor, largest: Tensor) -> Tensor:
    found = torch.ones(len(steps), dtype=torch.float64)
    reach = largest.expand(1, *steps.shape[1:])
    for weights, tops in zip(pairs(steps), pairs(reach), strict=True):
        products = weights * tops
        sums = torch.where(weights[..., 0] * weights[..., 1] > 0, (products[..., 0] + products[..., 1]).abs(), 0)
        found = torch.maximum(found, (sums / (HIGHEST - ROUNDED * (tops[..., 0] + tops[..., 1]))).amax(1))
    return found


def saturated(numbers: Tensor, activations: Tensor) -> Tensor:
    """Whether any sum of two products saturates in a row, for each sample: [samples, rows].

    numbers: rounded weights, [rows, window, channels]. activations: unsigned integers, [samples, window, channels].
    """
    found = torch.zeros(len(activations), len(numbers), dtype=torch.bool)
    for weights, given in zip(pairs(numbers.float()), pairs(activations.float()), strict=True):
        for pair in range(weights.shape[1]):
            sums = given[:, pair] @ weights[:, pair].t()
            found |= (sums < LOWEST) | (sums > HIGHEST)
    return found


__all__ = ["factors", "pairs", "saturated"]
