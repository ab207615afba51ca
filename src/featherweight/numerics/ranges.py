"""Ranges of activations that are clipped so that the rest stands more exactly: from histograms to grids.

``values`` [b] are the middles of a histogram's bins in rising order (the outermost two its ends), ``counts`` [b] how
many fell into each. Each gives (scale float32 [], zero_point int32 []), as ``grids.from_range`` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.numerics.grids import SMALLEST_SCALE, Spec, fake_quantize, from_range

#: share of the activations that ``percentile`` leaves beyond each end of the range
BEYOND = 1e-4
#: shares of the whole range that ``kullback_leibler`` tries
SHARES = 64


def percentile(values: Tensor, spec: Spec, counts: Tensor, beyond: float = BEYOND) -> tuple[Tensor, Tensor]:
    """The grid over all values but the share ``beyond`` at either end."""
    below = counts.double().cumsum(0) / counts.sum()
    low = values[int((below >= beyond).nonzero()[0])]
    high = values[int((below >= 1 - beyond).nonzero()[0])]
    return from_range(low, high, spec)


def kullback_leibler(values: Tensor, spec: Spec, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The grid whose rounded activations are distributed most like the values (Migacz 2017, "8-bit inference").

    The range is cut off to shares of itself, both ends alike. P is the histogram with what lies beyond added to its
    last bins; Q gives every bin the mean count of the occupied bins that round to the same number. The share with the
    least KL(P || Q) is taken.
    """
    counts = counts.double()
    best: tuple[float, tuple[Tensor, Tensor]] | None = None
    for share in torch.linspace(1.0, 1 / SHARES, SHARES).tolist():
        low, high = values[0].clamp(max=0) * share, values[-1].clamp(min=0) * share
        grid = from_range(low, high, spec)
        inside = ((values >= low) & (values <= high)).nonzero()[:, 0]
        if len(inside) < 2:
            continue
        first, last = int(inside[0]), int(inside[-1])
        kept = counts[first:last + 1].clone()
        within = kept.clone()
        kept[0] += counts[:first].sum()
        kept[-1] += counts[last + 1:].sum()
        found = _divergence(kept, within, fake_quantize(values[first:last + 1].double(), *grid, spec))
        if best is None or found < best[0]:
            best = found, grid
    return best[1] if best is not None else from_range(values[0], values[-1], spec)


def _divergence(wanted: Tensor, counts: Tensor, rounded: Tensor) -> float:
    """KL(P || Q) of the histogram ``wanted``; Q gives the occupied bins of one rounded activation the same count."""
    _, level = torch.unique_consecutive(rounded, return_inverse=True)
    occupied = (wanted > 0).double()
    size = int(level[-1]) + 1
    sums = torch.zeros(size, dtype=torch.float64).index_add_(0, level, counts)
    bins = torch.zeros(size, dtype=torch.float64).index_add_(0, level, occupied)
    spread = (sums / bins.clamp(min=1))[level] * occupied
    p = wanted / wanted.sum()
    q = (spread / spread.sum().clamp(min=SMALLEST_SCALE)).clamp(min=1e-12)
    return float((p * (p.clamp(min=1e-300).log() - q.log())).sum())


__all__ = ["kullback_leibler", "percentile"]
