"""Whether the channels of an activation differ so much that one grid serves them badly."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor
from torch.fx import Node

from featherweight.network.matrices import as_matrix
from featherweight.quantize.ranges import Tops

#: so many times the rounding error of even channels is worth a look at equalization: four bits are lost
UNEVEN = 16.0


def unevenness(calls: Iterable[tuple[Node, Tensor]], tops: Tops) -> float:
    """How many times larger the rounding error of a call's input is, beside what the call gives, than if all channels
    reached as far; of the worst call, 1 or more.

    calls: (call, its weight). One step for all channels gives each the same error, weighed by the norm of the weights
    that read it: with reach r_c and norm n_c, sqrt(max(r)^2 sum(n_c^2) / sum(r_c^2 n_c^2)).
    """
    worst = 1.0
    for node, weight in calls:
        key = str(node.args[0]), 1 - weight.dim()
        if key not in tops.found:
            continue
        reach = tops.reach(key).double().cpu()
        groups = as_matrix(node, weight).detach().double().cpu().square()
        norms = groups.reshape(*groups.shape[:2], -1, weight[0, 0].numel()).sum((1, 3)).flatten()
        given = float((reach.square() * norms).sum())
        if given > 0:
            worst = max(worst, math.sqrt(float(reach.max()) ** 2 * float(norms.sum()) / given))
    return worst


__all__ = ["UNEVEN", "unevenness"]
