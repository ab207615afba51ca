"""Plans that were all made on one network, as the companions of a training make them, applied one after another."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from featherweight.network import Network
from featherweight.steps.plan import Kept, Plan


def joined(plans: Iterable[Plan], network: Network) -> tuple[list[Plan], Network]:
    """The plans as they are applied one after another, and what they make of ``network``, on which all were made.

    Every plan is carried through those before it by ``Plan.after``. Raises PlanError where that cannot be done.
    """
    done, rest = [], list(plans)
    while rest:
        first, *others = rest
        rest = [plan.after(first, network) for plan in others]
        network = first.apply(network)
        done.append(first)
    return done, network


def narrowed(tensor: Tensor, kept: Kept) -> Tensor:
    """The numbers of ``tensor`` at the positions that are kept on each axis (None: all)."""
    for dim, index in enumerate(kept):
        if index is not None:
            tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def widened(small: Tensor, kept: Kept, whole: Tensor) -> Tensor:
    """A copy of ``whole`` with ``small`` at the positions that are kept: ``narrowed`` gives ``small`` back."""
    axes = [torch.arange(size) if index is None else index for size, index in zip(whole.shape, kept, strict=True)]
    places = [index.to(whole.device).view([-1 if d == dim else 1 for d in range(whole.dim())])
              for dim, index in enumerate(axes)]
    result = whole.clone()
    result[tuple(places)] = small.to(result)
    return result
