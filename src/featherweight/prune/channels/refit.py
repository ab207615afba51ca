"""One-shot compensation: what is left of a network after a cut is refit, so that it gives what the whole network gave.

The calls that a cut reaches are gone through in graph order, once, the whole and the cut network side by side: each is
refit on what it reads in the cut network as refit so far, towards what the whole network gave there, so that errors do
not add up (He et al. 2017, section 3.3; Zhang et al. 2016, section 3.3). Batch norms keep their statistics, which are
those of the outputs aimed at; estimated anew, they would undo part of the fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from featherweight.axes.groups import AxisGroups
from featherweight.axes.zero import zero
from featherweight.calibrate.pair import Pair, wide
from featherweight.errors import RecipeError, did_you_mean
from featherweight.network import Network
from featherweight.numerics.least_squares import Moments, factor, refit
from featherweight.prune.channels.refit_calls import RefitCall, find_refit_calls
from featherweight.steps import Skipped
from featherweight.task import Task

ROWS = 50_000  #: observations of a fit at most: places of calibration samples, chosen at random
ELEMENTS = 1 << 27  #: observations times inputs of a fit at most
RIDGE = 1e-4  #: pull towards the old weights, relative to the mean square of an input
ROUNDS = 4  #: further fits where a ReLU follows, whose targets know of it


@dataclass(frozen=True)
class Observations:
    """What a call reads and should give at some places of one batch.

    x [g, r, p]: inputs; y [g, r, o]: targets. level [g, r, o]: the clipping bound where the activation function that
    follows saturates on y (NaN where it does not); a saturated target only has to stay saturated. None: it never does.
    """

    x: Tensor
    y: Tensor
    level: Tensor | None


Rows = Iterable[Observations]  #: batch by batch
#: (weight [g, o, p], rows, whether a constant may be added) -> the new weight and the constant [g, o], float64
Method = Callable[[Tensor, Rows, bool], tuple[Tensor, Tensor]]


def bias(weight: Tensor, rows: Rows, constant: bool) -> tuple[Tensor, Tensor]:
    """The constant alone: the mean of what is missing. Exact where what was cut is constant."""
    total, count = torch.zeros(weight.shape[:2], dtype=torch.float64, device=weight.device), 0
    for seen in rows if constant else ():
        total += (seen.y.mean(1) - (weight @ seen.x.mean(1)[..., None])[..., 0]).double() * seen.y.shape[1]
        count += seen.y.shape[1]
    return weight.double(), total / max(count, 1)


def least_squares(weight: Tensor, rows: Rows, constant: bool) -> tuple[Tensor, Tensor]:
    """All weights and the constant (He et al. 2017, eq. 3, with a ridge towards the old weights).

    Where a ReLU follows, saturated outputs only have to stay saturated: each further fit aims at the allowed output
    next to that of the last fit, so that the distance to what is allowed falls with every round (the fits of Zhang et
    al. 2016, section 3.2, take activations after the ReLU for targets, to the same end).
    """
    moments, held, saturates = Moments(), [], False
    for seen in rows:
        moments.add(seen.x, seen.y)
        held.append((seen.x, allowed(seen.y, seen.level)))
        saturates |= seen.level is not None
    gram, cross = moments.products(centred=constant)
    lower = factor(gram, RIDGE)
    middle, aim = moments.means()
    middle = middle if constant else torch.zeros_like(middle)
    new = refit(gram, cross, weight, RIDGE, lower)
    for done in range(ROUNDS if saturates else 0):
        offset, cross, aim = aim * constant, torch.zeros_like(cross), torch.zeros_like(aim)
        for i, (x, (low, high)) in enumerate(held):
            if done == 0:
                x = x - middle[:, None].to(x)
                held[i] = x, (low, high)
            target = (x @ new.mT.to(x)).add_(offset[:, None].to(x)).clamp_(low, high)
            cross += (target.mT @ x).mT.double() / moments.count
            aim += target.sum(1).double() / moments.count
        new = refit(gram, cross, weight, RIDGE, lower)
    return new, (aim - (new @ middle[..., None])[..., 0]) * constant


def allowed(y: Tensor, level: Tensor | None) -> tuple[Tensor, Tensor]:
    """The least and the largest output that is as good as ``y``: ``y`` itself, or anything from ``level`` on, on y's
    side, where y saturates (``level`` is a number)."""
    if level is None:
        return y, y
    free = torch.full_like(y, torch.inf)
    return (torch.where(y > level, level, torch.where(y <= level, -free, y)),
            torch.where(y < level, level, torch.where(y >= level, free, y)))


METHODS: dict[str, Method] = {"bias": bias, "least_squares": least_squares}


def compensated(network: Network, task: Task, axes: AxisGroups, kept: np.ndarray, method: str,
                batches: int = 16) -> dict[str, Tensor]:
    """New values for weights, biases and running means, by name and of full shape, that make up for a cut.

    kept [atoms] bool says what stays: set the tensors, then ``cut`` (or ``zero``) with the same. Reads inputs of
    ``batches`` calibration batches, no targets. method: a key of ``METHODS``; "least_squares" refits all input weights
    that are kept, "bias" only adds the mean of what is missing. A branch that ends in a sum aims at the whole sum, the
    error of the other summand included (He et al. 2017, section 3.4). Every call below a cut is refit, save those that
    ``left_out`` names. Raises RecipeError for an unknown method, TaskError without calibration data.
    """
    if method not in METHODS:
        raise RecipeError(f"there is no compensation {method!r}; {did_you_mean(method, METHODS)}; "
                          'write compensate="least_squares"')
    task.require("calibration")
    calls, _ = find_refit_calls(network, axes, kept)
    if not calls:
        return {}
    with torch.no_grad():
        pair = Pair.of(network, task.batches("calibration", batches), zero(network, axes, kept))
        return refitted(pair, calls, METHODS[method])


def left_out(network: Network, axes: AxisGroups, kept: np.ndarray) -> tuple[Skipped, ...]:
    """The calls below a cut that ``compensated`` leaves as they are or refits without a constant, and why."""
    return find_refit_calls(network, axes, kept)[1]


def refitted(pair: Pair, calls: Sequence[RefitCall], method: Method) -> dict[str, Tensor]:
    """New values for the tensors of ``calls``, in graph order, by name; the compressed network gets them too.

    pair: the whole network, and the cut one zeroed, so that shapes agree. More batches are let in where later calls
    hold less. Raises RecipeError without any batch.
    """
    pair.whole.keep([name for c in calls for name in (c.node.name, c.end.name)])
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for call, load in zip(calls, loads(pair, calls), strict=True):
        pair.admit(load)
        if not pair.samples:
            raise RecipeError("the calibration split gave no batches; check Task(calibration=...), it must start a "
                              "fresh pass at every call")
        pair.whole.go_past(call.end.name)
        pair.compressed.go_to(call.node.name)
        new = _fit(pair, call, method, generator)
        for name, value in new.items():
            pair.set(name, value)
        found |= new
        pair.whole.release([call.node.name, call.end.name])
    return found


def loads(pair: Pair, calls: Sequence[RefitCall]) -> list[float]:
    """Bytes that both networks hold of one sample at each call, or at a later one where that is more."""
    whole, cut = pair.whole.order, pair.compressed.order
    own = [whole.held[whole.number[c.end.name] + 1] + cut.held[cut.number[c.node.name]]
           + sum(whole.size.get(name, 0.0) for name in {c.node.name, c.end.name}) for c in calls]
    return list(accumulate(reversed(own), max))[::-1]


def _rows(pair: Pair, call: RefitCall, bias: Tensor | None, generator: torch.Generator) -> Rows:
    """What a call reads in the cut network and what it should make of that; ``bias`` is taken off."""
    inputs = max(1, math.prod(call.kernel) * len(call.ins) * len(call.groups))
    each = -(-min(ROWS, ELEMENTS // inputs) // pair.samples)
    whole, cut = pair.whole, pair.compressed
    others: Sequence[Tensor | int] = [0] * len(cut.batches)
    if call.total is not None:
        others = cut.reads(call.total[0].name, call.total[1])
    network, less = cut.network, 0 if bias is None else bias
    for x, other, own, end in zip(cut.reads(call.node.name), others, whole.gave(call.node.name),
                                  whole.gave(call.end.name), strict=True):
        y = call.undone(network, end - other)
        y = torch.where(y.isfinite(), y, own)
        places = torch.randperm(call.places(y), generator=generator)[:each].to(y.device)
        level = None
        if call.saturation is not None:
            bound = end.clamp(*call.saturation)
            level = call.undone(network, torch.where(end == bound, torch.nan, bound) - other)
        yield Observations(wide(call.read(x, places)), wide(call.made(y, places)) - less,
                           None if level is None else wide(call.made(level, places)) - less)


def _fit(pair: Pair, call: RefitCall, method: Method, generator: torch.Generator) -> dict[str, Tensor]:
    """New values for the tensors of one call."""
    network = pair.compressed.network
    weight = network.tensor(call.weight).detach()
    bias = None if call.bias is None else network.tensor(call.bias).detach()
    outs = call.outputs(call.matrix(weight).shape[:2].numel())
    old = None if bias is None else bias[outs].view(len(call.groups), 1, -1)
    new, shift = method(wide(call.kept(weight)), _rows(pair, call, old, generator), call.constant is not None)
    found = {call.weight: call.put(weight, new)}
    if call.constant is not None:
        value = network.tensor(call.constant).detach().double()
        sign = 1 if bias is not None else -1
        found[call.constant] = value.index_add(0, outs, shift.flatten(), alpha=sign).to(weight.dtype)
    return found
