"""Losses for transformers: hidden states, attention maps and relations of tokens. Scalars.

mask: bool [n, t], true at tokens that count (padding is false); None counts all.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import log_softmax

from featherweight.distill.losses.response import averaged


def hidden(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of hidden states [n, t, c]. TinyBERT, Jiao et al. 2020, eq. 8."""
    return averaged((student - teacher).square(), mask)


def attention_maps(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of attention maps [n, heads, t, t]; rows of queries that do not count are left out.

    TinyBERT, Jiao et al. 2020, eq. 7. Maps are averaged over heads where the numbers of heads differ.
    """
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    return averaged((student - teacher).square().movedim(1, 2), mask)


def relations(student: Tensor, teacher: Tensor, heads: int = 1, mask: Tensor | None = None) -> Tensor:
    """KL of the tokens' relations ``softmax(x x' / sqrt(d))``, in ``heads`` equal parts of the width, over key tokens.

    student, teacher: [n, t, c] queries, keys or values; widths may differ. Averaged over samples, heads and queries
    that count; keys that do not count have no share. MiniLMv2, Wang et al. 2021, eqs. 2 and 3.
    """
    def logs(x: Tensor) -> Tensor:
        parts = x.view(*x.shape[:2], heads, -1).transpose(1, 2)
        scores = parts @ parts.transpose(2, 3) / math.sqrt(parts.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], -1e4)
        return log_softmax(scores, 3)

    p, q = logs(student), logs(teacher)
    return averaged((q.exp() * (q - p)).sum(3).transpose(1, 2), mask)
