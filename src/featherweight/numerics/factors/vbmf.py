"""The rank of a matrix under noise by empirical variational Bayes: what is below it is taken for noise.

Nakajima, Sugiyama, Babacan and Tomioka 2013, "Global analytic solution of fully-observed variational Bayesian matrix
factorization", section 5 (the noise is unknown); Kim et al. 2016 take it for the ranks of convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from torch import Tensor

Floats = npt.NDArray[np.float64]
#: noises that are tried, and rounds of trying closer about the best of them
TRIED, ROUNDS = 400, 4


def evbmf_rank(values: Tensor, rows: int, columns: int) -> int:
    """How many of the singular ``values`` (descending, all of them) of a matrix [rows, columns] stand out of noise."""
    short, long = sorted((rows, columns))
    given: Floats = values.detach().double().cpu().numpy()[:short]
    if not len(given) or not given.any():
        return 0
    noise = _noise(given, short, long)
    least = math.sqrt(long * noise * _threshold(short / long))
    return int((given > least).sum())


def _threshold(alpha: float) -> float:
    """The least gamma^2 / (M sigma^2) that is signal (theorem 2; tau as corollary 1 approximates it)."""
    tau = 2.5129 * math.sqrt(alpha)
    return (1 + tau) * (1 + alpha / tau)


def free_energy(noise: Floats, values: Floats, short: int, long: int) -> Floats:
    """[n]: the free energy (eq. 31, constants left out) at each variance ``noise`` [n] of the singular ``values``."""
    alpha = short / long
    x = np.square(values)[:, None] / (long * noise)
    clipped = np.maximum(x, 1e-300)
    signal = x > _threshold(alpha)
    inner = np.where(signal, x - (1 + alpha), 2 * math.sqrt(alpha))
    tau = 0.5 * (inner + np.sqrt(np.maximum(np.square(inner) - 4 * alpha, 0)))
    more = np.log(tau + 1) + alpha * np.log(tau / alpha + 1) - tau
    found: Floats = (x - np.log(clipped) + np.where(signal, more, 0.0)).sum(0)
    return found


def _noise(values: Floats, short: int, long: int) -> float:
    """The variance of the noise of least free energy, within the bounds of theorem 4."""
    alpha, squares = short / long, np.square(values)
    most = max(0, min(math.ceil(short / (1 + alpha)) - 1, short) - 1)  # components that can be signal
    high = float(squares.sum()) / (short * long)
    low = max(float(squares[most + 1]) / (long * _threshold(alpha)) if most + 1 < short else 0.0,
              float(squares[most + 1:].mean()) / long if most + 1 < short else 0.0, high * 1e-12)
    return least(lambda noise: free_energy(noise, values, short, long), min(low, high), high)


def least(energy: Callable[[Floats], Floats], low: float, high: float) -> float:
    """Where ``energy`` is least between two positive bounds: tried on a grid, and closer about the best, again."""
    for _ in range(ROUNDS):
        tried = np.geomspace(low, high, TRIED)
        best = int(energy(tried).argmin())
        low, high = float(tried[max(best - 1, 0)]), float(tried[min(best + 1, TRIED - 1)])
    return float(tried[best])


def stable_rank(values: Tensor) -> float:
    """|W|_F^2 / |W|_2^2 of singular ``values``: at most the rank, little changed by small ones."""
    squares = values.double().square()
    return float(squares.sum() / squares.max()) if bool(squares.any()) else 0.0


__all__ = ["evbmf_rank", "free_energy", "stable_rank"]
