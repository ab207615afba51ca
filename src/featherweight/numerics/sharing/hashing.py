"""Hashed weights (Chen et al. 2015, "Compressing neural networks with the hashing trick", eq. 7).

Weight (i, j) is number a_i * b_j mod p of ``base`` followed by ``-base``, with p a prime just below twice the length of
``base`` and a, b drawn once: residues of a prime are taken evenly, and products of 15 bits each do not overflow 32 bits
in any runtime, which make the index anew.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST = 1 << 15


def prime_below(number: int) -> int:
    """The largest prime that is at most ``number``, which is at least 2."""
    return next(n for n in range(number, 1, -1) if all(n % k for k in range(2, math.isqrt(n) + 1)))


def drawn(rows: int, columns: int, prime: int, seed: int) -> tuple[Tensor, Tensor]:
    """a [rows] and b [columns], int16, from 1 to below the prime and 32768."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(1, min(prime, MOST), (n,), generator=generator).to(torch.int16) for n in (rows, columns))
    return a, b


def places(a: Tensor, b: Tensor, prime: int) -> Tensor:
    """Which of the numbers of base and -base each weight is: int64 [rows, columns]."""
    return (a.long()[:, None] * b.long()) % prime


def hashed(matrix: Tensor, a: Tensor, b: Tensor, prime: int) -> Tensor:
    """``base`` [(prime + 1) / 2] of the hashed matrix that is nearest to ``matrix``: the means of what shares a number,
    with its sign; 0 where nothing does."""
    place, count = places(a, b, prime).flatten(), prime // 2 + 1
    signed = torch.where(place < count, 1.0, -1.0).double() * matrix.double().flatten()
    zeros = torch.zeros(count, dtype=torch.float64, device=matrix.device)
    sums = zeros.index_add(0, place % count, signed)
    shared = zeros.index_add(0, place % count, torch.ones_like(signed))
    return (sums / shared.clamp_min(1)).to(matrix.dtype)


def of_hashed(base: Tensor, a: Tensor, b: Tensor, prime: int) -> Tensor:
    """The matrix [rows, columns]."""
    return torch.cat([base, -base])[places(a, b, prime)]


__all__ = ["drawn", "hashed", "of_hashed", "places", "prime_below"]
