"""One-shot compensation: what is left of a network after a cut is refit, so that it gives what the whole network gave.

The calls that a cut reaches are gone through in graph order, once, the whole and the cut network side by side: each is
refit on what it reads in the cut network as refit so far, towards what the whole network gave there, so that errors do
not add up (He et al. 2017, section 3.3; Zhang et al. 2016, section 3.3). Batch norms keep their statistics, which are
those of the values aimed at; estimated anew, they would undo part of the fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from featherweight.axes.groups import AxisGroups
from featherweight.axes.zero import zero
from featherweight.calibrate.walk import BUDGET, Half, Order, input_values
from featherweight.errors import RecipeError, did_you_mean
from featherweight.network import Network
from featherweight.numerics.least_squares import Moments, factor, refit
from featherweight.prune.channels.refit_calls import RefitCall, find_sites
from featherweight.steps import Skipped
from featherweight.task import Task, batch_size

ROWS = 50_000  #: observations of a fit at most: places of calibration samples, chosen at random
ELEMENTS = 1 << 27  #: observations times inputs of a fit at most
RIDGE = 1e-4  #: pull towards the old weights, relative to the mean square of an input
ROUNDS = 4  #: further fits where a ReLU follows, whose targets know of it

#: batch by batch: X [g, r, p], Y [g, r, o], and level [g, r, o] or None where nothing flat follows. Where the level is
#: a number, all that lies beyond it on Y's side is as good as Y.
Rows = Iterable[tuple[Tensor, Tensor, Tensor | None]]
#: (weight [g, o, p], rows, whether a constant may be added) -> the new weight and the constant [g, o], float64
Method = Callable[[Tensor, Rows, bool], tuple[Tensor, Tensor]]


def wide(value: Tensor) -> Tensor:
    """In float32 or wider."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def bias(weight: Tensor, rows: Rows, constant: bool) -> tuple[Tensor, Tensor]:
    """The constant alone: the mean of what is missing. Exact where what was cut is constant."""
    total, count = torch.zeros(weight.shape[:2], dtype=torch.float64, device=weight.device), 0
    for x, y, _ in rows if constant else ():
        total += (y.mean(1) - (weight @ x.mean(1)[..., None])[..., 0]).double() * y.shape[1]
        count += y.shape[1]
    return weight.double(), total / max(count, 1)


def least_squares(weight: Tensor, rows: Rows, constant: bool) -> tuple[Tensor, Tensor]:
    """All weights and the constant (He et al. 2017, eq. 3, with a ridge towards the old weights).

    Where a ReLU follows, outputs that it had cut off need only stay cut off: each further fit aims at the allowed value
    next to the last one's, so that the distance to what is allowed falls with every round (the fits of Zhang et al.
    2016, section 3.2, take values after the ReLU for targets, to the same end).
    """
    held, moments = list(rows), Moments()
    for x, y, _ in held:
        moments.add(x, y)
    gram, cross = moments.products(centred=constant)
    lower = factor(gram, RIDGE)
    middle, aim = moments.means()
    middle = middle if constant else torch.zeros_like(middle)
    for done in range(ROUNDS + 1):
        new = refit(gram, cross, weight, RIDGE, lower)
        shift = (aim - (new @ middle[..., None])[..., 0]) * constant
        if done == ROUNDS or all(level is None for _, _, level in held):
            break
        cross, aim = torch.zeros_like(cross), torch.zeros_like(aim)
        for x, y, level in held:
            target = y if level is None else nearest(x @ new.mT.to(x) + shift[:, None].to(x), y, level)
            cross += ((x - middle[:, None].to(x)).mT @ target).double() / moments.count
            aim += target.sum(1).double() / moments.count
    return new, shift


def nearest(made: Tensor, y: Tensor, level: Tensor) -> Tensor:
    """The allowed value next to ``made``: ``y`` where the level is no number, else what lies beyond it on y's side."""
    beyond = torch.where((made - level) * (y - level) >= 0, made, level)
    return torch.where(level.isnan(), y, beyond)


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
    with torch.no_grad():
        return Walk(network, axes, kept).run(task, METHODS[method], batches)


def left_out(network: Network, axes: AxisGroups, kept: np.ndarray) -> tuple[Skipped, ...]:
    """The calls below a cut that ``compensated`` leaves as they are or refits without a constant, and why."""
    return find_sites(network, axes, kept)[1]


class Walk:
    """The whole and the cut network (zeroed, so that shapes agree), batch by batch at the same call."""

    def __init__(self, network: Network, axes: AxisGroups, kept: np.ndarray) -> None:
        self.whole, self.short = network.copy().eval(), zero(network, axes, kept).eval()
        self.orders = Order(self.whole), Order(self.short)
        self.sites = find_sites(self.whole, axes, kept)[0]
        self.states: list[tuple[Half, Half]] = []
        self.samples = 0
        self.generator = torch.Generator().manual_seed(0)

    def run(self, task: Task, method: Method, batches: int) -> dict[str, Tensor]:
        waiting = self._inputs(task, batches)
        wanted = {name for s in self.sites for name in (s.node.name, s.end.name)}
        found: dict[str, Tensor] = {}
        for site, room in zip(self.sites, self._room(), strict=True):
            while waiting and (not self.states or self.samples + waiting[0][0] <= room):
                size, values = waiting.pop(0)
                self.samples += size
                self.states.append((Half(self.whole, self.orders[0], dict(values)),
                                    Half(self.short, self.orders[1], dict(values))))
            for whole, short in self.states:
                whole.advance(self.orders[0].number[site.end.name] + 1, wanted)
                short.advance(self.orders[1].number[site.node.name], set())
            found.update(self._fit(site, method))
            for name in {site.node.name, site.end.name}:
                wanted.discard(name)
                for whole, _ in self.states:
                    whole.forget(name)
        return found

    def _inputs(self, task: Task, batches: int) -> list[tuple[int, dict[str, Tensor]]]:
        """The number of samples and the inputs by name of every batch."""
        found = [(batch_size(inputs), input_values(self.whole, inputs))
                 for inputs, _ in (task.batches("calibration", batches) if self.sites else ())]
        if self.sites and not found:
            raise RecipeError("the calibration split gave no batches; check Task(calibration=...), it must start a "
                              "fresh pass at every call")
        return found

    def _room(self) -> list[float]:
        """How many samples fit into ``BUDGET`` at each site and all later ones."""
        first, second = self.orders
        loads = [first.held(first.number[s.end.name] + 1) + second.held(second.number[s.node.name])
                 + sum(first.size.get(n.name, 0) for n in {s.node, s.end}) for s in self.sites]
        return [BUDGET / max(1.0, *loads[i:]) for i in range(len(loads))]

    def _rows(self, site: RefitCall, bias: Tensor | None) -> Rows:
        """What a site reads in the short network and what it should make of that; ``bias`` is taken off."""
        there = self.orders[1].named
        inputs = max(1, math.prod(site.kernel) * len(site.ins) * len(site.groups))
        each = -(-min(ROWS, ELEMENTS // inputs) // self.samples)
        for whole, short in self.states:
            x, own = short.get(there[site.node.name].args[0]), whole.values[site.node.name]
            other = short.get(there[site.total[0].name].args[site.total[1]]) if site.total is not None else 0
            end = whole.values[site.end.name]
            y = site.undone(self.short, end - other)
            y = torch.where(y.isfinite(), y, own)
            places = torch.randperm(site.places(y), generator=self.generator)[:each].to(y.device)
            level = None
            if site.flat is not None:
                bound = end.clamp(*site.flat)
                level = site.undone(self.short, torch.where(end == bound, torch.nan, bound) - other)
            less = 0 if bias is None else bias
            yield (wide(site.read(x, places)), wide(site.made(y, places)) - less,
                   None if level is None else wide(site.made(level, places)) - less)

    def _fit(self, site: RefitCall, method: Method) -> dict[str, Tensor]:
        """Refits one call and sets the short network's tensors; gives them."""
        weight = self.short.tensor(site.weight).detach()
        bias = None if site.bias is None else self.short.tensor(site.bias).detach()
        outs = site.outputs(site.matrix(weight).shape[:2].numel())
        old = None if bias is None else bias[outs].view(len(site.groups), 1, -1)
        new, shift = method(wide(site.kept(weight)), self._rows(site, old), site.constant is not None)
        found = {site.weight: site.put(weight, new)}
        if site.constant is not None:
            value = self.short.tensor(site.constant).detach().double()
            sign = 1 if bias is not None else -1
            found[site.constant] = value.index_add(0, outs, shift.flatten(), alpha=sign).to(weight.dtype)
        for name, tensor in found.items():
            self.short.set_tensor(name, tensor)
        return found
