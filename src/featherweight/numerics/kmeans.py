"""k-means of scalars: the codebook of a weight tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def kmeans(values: Tensor, clusters: int, *, hold_zero: bool = False, rounds: int = 300) -> tuple[Tensor, Tensor]:
    """Codebook and index of ``values`` (any shape), at most ``clusters`` entries, the squared error least as found.

    Centroids start evenly between the smallest and the largest value, which Han et al. 2016 (Deep Compression,
    section 3.2) found best, and move by Lloyd's rule until none moves. In one axis a cluster is an interval, so on
    sorted values a round is one ``searchsorted`` and two looks into running sums. A centroid that nobody is nearest to
    (pruned weights leave a hole around zero) starts again at the far end of the cluster with the largest error. The
    cost never rises from the even start, so it is never above that of a uniform grid of as many levels from smallest to
    largest value.

    hold_zero: entry 0 is exactly 0.0 and holds the exact zeros alone; all other values share the remaining entries.

    Returns the codebook [k] in the dtype of ``values``, ascending (after the held zero), with no unused entry
    (k may be smaller than ``clusters``), and the index: the shape of ``values``, uint8 (int16 above 256 entries).
    Deterministic. Raises ValueError for values that are not finite or for no room.
    """
    flat = values.detach().reshape(-1).double()
    if not torch.isfinite(flat).all():
        raise ValueError("k-means of values that are not finite")
    if not 1 + hold_zero <= clusters <= 1 << 15:
        raise ValueError(f"{clusters} clusters; expected {1 + hold_zero} to {1 << 15}")
    free = flat[flat != 0] if hold_zero else flat
    if free.numel():
        centroids = lloyd(torch.sort(free).values, clusters - hold_zero, rounds).to(values.dtype)
    else:
        centroids = free.to(values.dtype)
    index = nearest(flat, centroids.double()) + hold_zero if free.numel() else torch.zeros_like(flat, dtype=torch.int64)
    if hold_zero:
        index[flat == 0] = 0
        centroids = torch.cat([centroids.new_zeros(1), centroids])
    used = torch.bincount(index, minlength=len(centroids)) > 0
    used[0] |= hold_zero
    index = (torch.cumsum(used, 0) - 1)[index]
    codebook = centroids[used]
    return codebook, index.reshape(values.shape).to(torch.uint8 if len(codebook) <= 256 else torch.int16)


def lloyd(ordered: Tensor, clusters: int, rounds: int = 300) -> Tensor:
    """Centroids [k], ascending, of ``ordered`` (float64, ascending, not empty); its distinct values if they suffice."""
    distinct: Tensor = torch.unique_consecutive(ordered)
    if len(distinct) <= clusters:
        return distinct
    centre = ordered.mean()
    shifted = ordered - centre
    zero = ordered.new_zeros(1)
    sums, squares = torch.cat([zero, shifted.cumsum(0)]), torch.cat([zero, shifted.square().cumsum(0)])
    centroids = torch.linspace(float(shifted[0]), float(shifted[-1]), clusters, dtype=torch.float64)
    for _ in range(clusters):
        centroids, cuts = _settle(shifted, sums, centroids, rounds)
        counts = cuts[1:] - cuts[:-1]
        centroids, starts, stops = centroids[counts > 0], cuts[:-1][counts > 0], cuts[1:][counts > 0]
        room = clusters - len(centroids)
        totals = sums[stops] - sums[starts]
        spread = squares[stops] - squares[starts] - totals.square() / (stops - starts)
        wide = shifted[starts] < shifted[stops - 1]
        if not room or not wide.any():
            break
        worst = torch.where(wide, spread.clamp_min(0), -1.0).topk(min(room, int(wide.sum()))).indices
        low, high = shifted[starts[worst]], shifted[stops[worst] - 1]
        farther = torch.where(centroids[worst] - low > high - centroids[worst], low, high)
        centroids = torch.cat([centroids, farther]).sort().values
    return centroids + centre


def _settle(ordered: Tensor, sums: Tensor, centroids: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Lloyd's rounds until nothing moves: centroids [k], and the cuts [k + 1] of ``ordered`` between them."""
    ends = torch.tensor([0, len(ordered)])
    cuts = ends
    for _ in range(rounds):
        inner = torch.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2)
        cuts = torch.cat([ends[:1], inner, ends[1:]])
        counts = cuts[1:] - cuts[:-1]
        moved = torch.where(counts > 0, (sums[cuts[1:]] - sums[cuts[:-1]]) / counts.clamp_min(1), centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids, cuts


def nearest(values: Tensor, codebook: Tensor) -> Tensor:
    """Index (int64) of the entry of ``codebook`` [k] (ascending) nearest to each of ``values``."""
    return torch.searchsorted((codebook[1:] + codebook[:-1]) / 2, values.contiguous())
