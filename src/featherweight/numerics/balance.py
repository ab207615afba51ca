"""Scales that even out channels between two layers, and how far values are from given statistics."""

from __future__ import annotations

import torch
from torch import Tensor


def equalizing(first: Tensor, second: Tensor) -> Tensor:
    """What the first layer's output channels are divided by, and the second's input channels multiplied with, so that
    their weights get equal ranges.

    Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction", eqs. 10-11:
    s = sqrt(r1 r2) / r2; afterwards both ranges are sqrt(r1 r2). first, second: [c] largest magnitudes of the weights
    of each channel on both sides. 1 for a channel whose weights are zero on one side: no scale evens that out.
    """
    return torch.where((first > 0) & (second > 0), (first / second).sqrt(), 1.0)


def smoothing(values: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """What values are divided by, and the weights that they meet multiplied with, so that outliers move from the values
    into the weights.

    Xiao et al. 2023, "SmoothQuant", eq. 4: s = max|X|^alpha / max|W|^(1 - alpha). values, weights: [c] largest
    magnitudes per channel. alpha: 0 evens out the weights, 1 the values. 1 for a channel that is zero on one side.
    """
    scale = values.pow(alpha) / weights.pow(1 - alpha)
    return torch.where((values > 0) & (weights > 0), scale, 1.0)


def statistics_distance(values: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """How far the channels' means and standard deviations are from the given ones, [].

    Cai et al. 2020, "ZeroQ: a novel zero shot quantization framework", eq. 2, one term of the sum:
    |mean(x) - mean|^2 + |std(x) - std|^2. values: [n, c, ...]; mean, variance: [c].
    """
    rows = values.movedim(1, 0).flatten(1)
    spread = (rows.var(1, correction=0) + 1e-8).sqrt()  # kept from zero, where a root has no slope
    return (rows.mean(1) - mean).square().sum() + (spread - variance.clamp(min=0).sqrt()).square().sum()


__all__ = ["equalizing", "smoothing", "statistics_distance"]
