"""Feature losses: activations within the student drawn to those within the teacher. Scalars.

``student`` and ``teacher`` are feature maps [n, c, h, w] of one shape, unless said otherwise; tokens come as [n, c, t].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, log_softmax, normalize, softmax


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference. FitNets, Romero et al. 2015, eq. 3 (without the half)."""
    return (student - teacher).square().mean()


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of the maps of energy: squares summed over channels, each map divided by its norm.

    Averaged over samples; widths may differ. Attention transfer, Zagoruyko and Komodakis 2017, eq. 2 with p = 2.
    """
    a, b = (normalize(x.square().sum(1).flatten(1), dim=1) for x in (student, teacher))
    return (a - b).square().sum(1).mean()


def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """``|G_s - G_t|^2 / n^2`` of the samples' normalized inner products [n, n]; shapes may differ.

    Similarity-preserving, Tung and Mori 2019, eqs. 1 to 4.
    """
    a, b = (normalize(x.flatten(1) @ x.flatten(1).T, dim=1) for x in (student, teacher))
    return (a - b).square().sum() / len(a) ** 2


def pyramid(student: Tensor, teacher: Tensor, levels: Sequence[int] = (4, 2, 1)) -> Tensor:
    """Mean squared differences of the maps and of their averages over 4 x 4, 2 x 2 and 1 cells, weighted 1, 1/2, 1/4...

    The weights are divided by their sum; levels as large as the maps are left out. The hierarchical context loss of
    ReviewKD, Chen et al. 2021, section 3.3.
    """
    total, weights, weight = hint(student, teacher), 1.0, 1.0
    if student.dim() == 4:
        for level in levels:
            if level < student.shape[2]:
                weight /= 2
                total = total + weight * hint(adaptive_avg_pool2d(student, level), adaptive_avg_pool2d(teacher, level))
                weights += weight
    return total / weights


def channelwise(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """``T^2 / c * sum over channels of KL`` of the channels' distributions over positions, averaged over samples.

    CWD, Shu et al. 2021, eq. 4.
    """
    p = log_softmax(student.flatten(2) / temperature, 2)
    q = log_softmax(teacher.flatten(2) / temperature, 2)
    return temperature**2 * (q.exp() * (q - p)).sum(2).mean()


def _attentions(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Spatial [n, 1, h, w] and channel [n, c, 1, 1] attention of a map, of mean 1. FGD, eqs. 3 and 4."""
    size = x.abs()
    n, c, h, w = x.shape
    place = h * w * softmax(size.mean(1).flatten(1) / temperature, 1)
    channel = c * softmax(size.mean((2, 3)) / temperature, 1)
    return place.view(n, 1, h, w), channel.view(n, c, 1, 1)


def focal(student: Tensor, teacher: Tensor, inside: Tensor | None = None, temperature: float = 0.5,
          background: float = 0.5, attend: float = 0.1) -> Tensor:
    """Squared differences weighted by the teacher's attention, apart for foreground and background, and attention's L1.

    inside: [n, h, w], above 0 in objects; None takes the teacher's places of more than mean attention. Each of the two
    grounds is averaged over its own positions. background: its weight; attend: that of the attention's difference.
    FGD's focal part, Yang et al. 2022a, eqs. 2 to 8, with averages where they have sums.
    """
    place, channel = _attentions(teacher, temperature)
    own_place, own_channel = _attentions(student, temperature)
    front = ((place if inside is None else inside.unsqueeze(1)) > (1 if inside is None else 0)).to(student.dtype)
    terms = place * channel * (student - teacher).square()

    def mean(ground: Tensor) -> Tensor:
        return (terms * ground).sum() / (ground.sum() * student.shape[1]).clamp(min=1)

    apart = (place - own_place).abs().mean() + (channel - own_channel).abs().mean()
    return mean(front) + background * mean(1 - front) + attend * apart


def context(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the maps' contexts [n, c]: channels averaged over places by softmax of their mean.

    FGD's global part, Yang et al. 2022a, eq. 9, with the pooling of its context block and without its learned layers.
    """
    def pooled(x: Tensor) -> Tensor:
        return (x.flatten(2) * softmax(x.mean(1).flatten(1), 1).unsqueeze(1)).sum(2)

    return (pooled(student) - pooled(teacher)).square().mean()


def focal_global(student: Tensor, teacher: Tensor, inside: Tensor | None = None) -> Tensor:
    """FGD: the focal part plus the global one."""
    return focal(student, teacher, inside) + context(student, teacher)


def dropped(features: Tensor, keep: Tensor) -> Tensor:
    """Features [n, c, ...] at the places of ``keep`` (bool, [n, ...]), else 0. MGD, Yang et al. 2022b, eq. 2."""
    return torch.where(keep.unsqueeze(1), features, 0.0)
