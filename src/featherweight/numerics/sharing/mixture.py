"""A mixture of Gaussians over weights: the prior of soft weight sharing.

Nowlan and Hinton 1992, "Simplifying neural networks by soft weight-sharing", eq. 5 to 8, with the first component held
at zero with a share of its own, which prunes (Ullrich, Meeds and Welling 2017, section 3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_joint(values: Tensor, means: Tensor, log_scales: Tensor, logits: Tensor, zero_share: float) -> Tensor:
    """log(share_j * N(value; mean_j, scale_j)) [n, k + 1] of ``values`` [n]. Component 0 has mean 0 and ``zero_share``;
    the other k have ``means`` [k] and split the rest by softmax(``logits`` [k]). log_scales [k + 1]."""
    centres = torch.cat([means.new_zeros(1), means])
    shares = torch.cat([logits.new_full((1,), math.log(zero_share)),
                        torch.log_softmax(logits, 0) + math.log1p(-zero_share)])
    away = (values[:, None] - centres) * torch.exp(-log_scales)
    return shares - log_scales - 0.5 * away.square() - 0.5 * math.log(2 * math.pi)


def surprise(values: Tensor, means: Tensor, log_scales: Tensor, logits: Tensor, zero_share: float) -> Tensor:
    """The mean of -log p(value), in nats: what the prior adds to the loss."""
    return -torch.logsumexp(log_joint(values, means, log_scales, logits, zero_share), 1).mean()


def components(values: Tensor, means: Tensor, log_scales: Tensor, logits: Tensor, zero_share: float) -> Tensor:
    """The component [n], int64, that most likely gave each value; 0: zero."""
    return log_joint(values, means, log_scales, logits, zero_share).argmax(1)


__all__ = ["components", "log_joint", "surprise"]
