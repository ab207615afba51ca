"""Response losses: the student's outputs drawn to the teacher's. Scalars, in nats where they are divergences.

``student`` and ``teacher`` are logits of one shape with the classes on ``axis``; T is the temperature.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, one_hot, softmax

TINY = 1e-7


def averaged(terms: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of ``terms``, or of those where ``mask`` (bool, the leading axes of ``terms``) is true: scalar.

    A mask that is false everywhere gives zero.
    """
    if mask is None:
        return terms.mean()
    wide = mask.view(*mask.shape, *[1] * (terms.dim() - mask.dim())).expand_as(terms)
    return torch.where(wide, terms, 0.0).sum() / wide.sum().clamp(min=1)


def divergence(student: Tensor, teacher: Tensor, temperature: float, axis: int = 1,
               mask: Tensor | None = None) -> Tensor:
    """``T^2 * KL(softmax(teacher / T) || softmax(student / T))`` over ``axis``, averaged over the others: scalar.

    Hinton, Vinyals and Dean 2015, section 2. mask: bool, of the shape without ``axis``; positions that count.
    """
    p = log_softmax(student.float() / temperature, axis)
    q = log_softmax(teacher.float() / temperature, axis)
    terms = kl_div(p, q, reduction="none", log_target=True)
    return averaged(terms.sum(axis), mask) * temperature**2


def rows(logits: Tensor, axis: int, mask: Tensor | None = None) -> Tensor:
    """[positions, classes]: the classes last, all other axes in one; only the positions of ``mask``."""
    flat = logits.float().movedim(axis, -1)
    found: Tensor = flat[mask] if mask is not None else flat.reshape(-1, flat.shape[-1])
    return found


def decoupled(student: Tensor, teacher: Tensor, target: Tensor, temperature: float, alpha: float = 1.0,
              beta: float = 8.0) -> Tensor:
    """``T^2 * (alpha * TCKD + beta * NCKD)`` of rows [n, classes] with target classes [n].

    TCKD: divergence of (target, all others); NCKD: divergence among the others alone. Zhao et al. 2022, eq. 7.
    """
    hit = one_hot(target, student.shape[1]).bool()

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        scaled = logits / temperature
        among = scaled.masked_fill(hit, -torch.inf)
        both = torch.stack([scaled[hit], among.logsumexp(1)], 1)
        return log_softmax(both, 1), log_softmax(among, 1).masked_fill(hit, 0.0)

    (p, among_p), (q, among_q) = parts(student), parts(teacher)
    target_part = (q.exp() * (q - p)).sum(1)
    other_part = (among_q.exp().masked_fill(hit, 0.0) * (among_q - among_p)).sum(1)
    return temperature**2 * (alpha * target_part + beta * other_part).mean()


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of the rows of two matrices, averaged: scalar."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    found: Tensor = ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=TINY)).mean()
    return found


def correlated(student: Tensor, teacher: Tensor, temperature: float, beta: float = 1.0, gamma: float = 1.0) -> Tensor:
    """``T^2 * (beta * (1 - r over classes) + gamma * (1 - r over samples))`` of the probabilities of rows [n, classes].

    r: Pearson's correlation. DIST, Huang et al. 2022, eqs. 8 to 10 (the factor T^2 as its authors' code has it).
    """
    p, q = softmax(student / temperature, 1), softmax(teacher / temperature, 1)
    return temperature**2 * (beta * (1 - _correlation(p, q)) + gamma * (1 - _correlation(p.T, q.T)))


def standardized(logits: Tensor, axis: int = 1) -> Tensor:
    """Logits minus their mean over the classes, divided by their deviation (over n - 1). Sun et al. 2024, alg. 1."""
    mean, deviation = logits.float().mean(axis, keepdim=True), logits.float().std(axis, keepdim=True)
    return (logits.float() - mean) / (deviation + TINY)


def multi_level(student: Tensor, teacher: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Divergence of rows [n, classes] at several temperatures, and of the relations of samples and of classes.

    Sum of the three levels, each averaged over the temperatures: divergence, ``|p p' - q q'|^2 / n`` and
    ``|p' p - q' q|^2 / classes``. MLKD, Jin et al. 2023, eqs. 4 to 8.
    """
    total = student.new_zeros(())
    for t in temperatures:
        p, q = softmax(student / t, 1), softmax(teacher / t, 1)
        total = total + divergence(student, teacher, t)
        total = total + (p @ p.T - q @ q.T).square().sum() / len(p)
        total = total + (p.T @ p - q.T @ q).square().sum() / p.shape[1]
    return total / len(temperatures)


def soft_cross_entropy(student: Tensor, wanted: Tensor, axis: int = 1) -> Tensor:
    """``-sum(wanted * log softmax(student))`` over ``axis``, averaged over the others; wanted: probabilities."""
    return -(wanted * log_softmax(student.float(), axis)).sum(axis).mean()


def softened(target: Tensor, classes: int, share: float, by: Tensor | None = None) -> Tensor:
    """[n, classes]: ``(1 - share) * one_hot(target) + share * by``; by: probabilities, None for the uniform ones.

    Uniform: label smoothing, Szegedy et al. 2016, section 7. By the network's own past outputs: PS-KD, Kim et al. 2021,
    eq. 6.
    """
    hard = one_hot(target, classes).float()
    return (1 - share) * hard + share * (torch.full_like(hard, 1 / classes) if by is None else by)


def bounded(student: Tensor, teacher: Tensor, target: Tensor, margin: float = 0.0) -> Tensor:
    """The student's squared error, where it is not smaller by ``margin`` than the teacher's: scalar, squared units.

    Summed over all axes but the first, averaged over samples. Chen et al. 2017, eq. 5 (for regression).
    """
    def error(given: Tensor) -> Tensor:
        return (given.float() - target.float()).square().flatten(1).sum(1)

    own = error(student)
    return torch.where(own + margin > error(teacher), own, 0.0).mean()
