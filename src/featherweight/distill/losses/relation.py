"""Relation losses: how samples lie to one another in the student, drawn to how they lie in the teacher. Scalars.

``student`` [n, a] and ``teacher`` [n, b] are embeddings of the same n samples; the widths may differ.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize, smooth_l1_loss

TINY = 1e-12


def distances(x: Tensor) -> Tensor:
    """[n, n] Euclidean distances, divided by the mean of those that are not zero."""
    squared = (x.square().sum(1, keepdim=True) + x.square().sum(1) - 2 * x @ x.T).clamp(min=TINY)
    away = 1 - torch.eye(len(x), dtype=x.dtype, device=x.device)
    found = squared.sqrt() * away
    return found / (found.sum() / away.sum().clamp(min=1)).clamp(min=TINY)


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber's difference of the normalized pairwise distances. RKD-D, Park et al. 2019, eqs. 6 to 8."""
    return smooth_l1_loss(distances(student), distances(teacher))


def angles(x: Tensor) -> Tensor:
    """[n, n, n]: cosines of the angles at sample i between the directions to j and to k."""
    way = normalize(x.unsqueeze(0) - x.unsqueeze(1), dim=2)
    return way @ way.transpose(1, 2)


def angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber's difference of the cosines of all triples. RKD-A, Park et al. 2019, eqs. 9 and 10."""
    return smooth_l1_loss(angles(student), angles(teacher))


def correlation(student: Tensor, teacher: Tensor, gamma: float = 0.4) -> Tensor:
    """Mean squared difference of the correlation matrices [n, n] by the Gaussian kernel ``exp(-gamma |a - b|^2)``.

    Embeddings are divided by their norm first, so ``|a - b|^2 = 2 - 2 a.b``. Correlation congruence, Peng et al. 2019,
    eqs. 5 to 8, without the Taylor series that they compute the kernel by.
    """
    a, b = normalize(student, dim=1), normalize(teacher, dim=1)
    kernels = [torch.exp(-2 * gamma * (1 - x @ x.T)) for x in (a, b)]
    return (kernels[0] - kernels[1]).square().mean()


def contrastive(student: Tensor, teacher: Tensor, bank: Tensor, temperature: float = 0.07) -> Tensor:
    """``-log h(s_i, t_i) - sum over the bank of log(1 - h(s_i, b))``, averaged over samples.

    student, teacher: [n, d] of norm 1; bank: [k, d], the teacher's embeddings of other samples, of norm 1.
    ``h = e^x / (e^x + 1)`` with ``x = s.t / temperature - log k``, up to the constant of normalization that CRD divides
    by (Tian et al. 2020, eqs. 17 to 19): noise-contrastive estimation with k negatives.
    """
    prior = float(torch.log(torch.tensor(float(max(1, len(bank))))))
    hit = (student * teacher).sum(1) / temperature - prior
    miss = student @ bank.T / temperature - prior
    return -(logsigmoid(hit) + logsigmoid(-miss).sum(1)).mean()
