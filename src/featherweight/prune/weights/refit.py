"""What stays makes up for what goes: every weight solved in turn on the inputs that the pruned network gives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.calibrate.moments import gram, second_moments
from featherweight.calibrate.portions import split_batch
from featherweight.calibrate.walk import Flow, Order, Waiting
from featherweight.network import Network
from featherweight.network.devices import device_of
from featherweight.network.edit import WEIGHTED, readers_of
from featherweight.network.layers import APART
from featherweight.network.matrices import as_matrix, from_matrix, layout
from featherweight.numerics.obs import LAZY, Decide, Rule, least_squares, sweep
from featherweight.prune.weights.masks import Pattern, lowest, lowest_of_rows, of_groups
from featherweight.prune.weights.scores import BATCHES
from featherweight.steps import Skipped
from featherweight.task import Batch, Task, move

COMPENSATIONS = ("none", "obs", "least_squares")
#: share of the mean diagonal added to every Hessian
DAMP = 0.01
Tensors = dict[str, Tensor]


def compensated(network: Network, task: Task, calls: Mapping[str, Sequence[Node]], masks: Tensors, pattern: Pattern,
                method: str, *, adaptive: bool, rows: bool) -> tuple[Tensors, Tensors, tuple[Skipped, ...]]:
    """(masks, new values, what was not compensated), all in the weights' shapes, on the CPU.

    adaptive: each weight keeps its number of zeros and the sweep chooses which, by what they cost as the weights then
    stand. rows: that number holds for every row. A weight that something else reads too keeps its values.
    """
    work = network.copy().eval()
    found, values, left = dict(masks), {}, []
    changed = {name: mine for name, mine in calls.items() if not bool(masks[name].all())}
    flow, rest = started(work, task, changed)
    for name, mine in changed.items():
        weight, node = work.tensor(name).detach(), mine[0]
        if reason := _unfit(network, name, mine):
            left.append(Skipped(name, f"{reason}: its other weights stay as they are"))
            work.set_tensor(name, weight * masks[name].to(weight.device))
            flow, rest = started(work, task, changed)  # the others that read it may come earlier
            continue
        hessian = moments_of(flow, name, mine) + second_moments(work, rest, {name: mine}).get(name, 0.0)
        old, mask = as_matrix(node, weight).double(), as_matrix(node, masks[name]).to(weight.device)
        if adaptive:
            mask, new = choose(old, hessian, mask, pattern, rows)
        if method == "least_squares":
            new = least_squares(old, hessian, mask, DAMP)
        elif not adaptive:
            new = sweep(old, hessian, fixed(mask), damp=DAMP)
        found[name] = from_matrix(node, mask, weight.shape).cpu().clone()
        values[name] = from_matrix(node, new, weight.shape).to(weight.dtype).cpu().clone()
        work.set_tensor(name, values[name].to(weight.device))
    return found, values, tuple(left)


def _unfit(network: Network, name: str, calls: Sequence[Node]) -> str:
    """Why a weight is no one matrix whose outputs could be fit; "" where it is."""
    if any(reader.target not in WEIGHTED for reader in readers_of(network, name)):
        return "not only convolutions and linear layers read it"
    return APART if len({layout(call) for call in calls}) > 1 else ""


def started(network: Network, task: Task, calls: Mapping[str, Sequence[Node]]) -> tuple[Flow, list[Batch]]:
    """The calibration batches before the first call, as many as memory holds at each of these calls; and the others."""
    flow = Flow(network, Order.of(network))
    places = [flow.order.number[n.name] for mine in calls.values() for n in mine]
    waiting = Waiting(task.batches("calibration", BATCHES) if places else iter(()))
    with torch.no_grad():
        for inputs in waiting.admitted(max((flow.order.held[p] for p in places), default=0.0)):
            for leaves in split_batch(network, move(inputs, device_of(network))).leaves:
                flow.take(leaves)
    return flow, list(waiting.batches)


def moments_of(flow: Flow, name: str, calls: Sequence[Node]) -> Tensor:
    """Sum of x x^T [g, i * k, i * k], float64, over all inputs of a weight's calls; ``flow`` goes on to the first."""
    total, weight = torch.zeros((), dtype=torch.float64), flow.network.tensor(name).detach()
    with torch.no_grad():
        flow.go_to(calls[0].name)
        ahead = flow if len(calls) == 1 else flow.ahead()
        for node in calls:
            ahead.go_to(node.name)
            total = total.to(weight.device) + gram(node, weight, ahead.reads(node.name))
    return total


def fixed(mask: Tensor) -> Decide:
    """Decides by a mask [..., o, i] that is known beforehand."""
    return lambda first, w, spread: partial(_masked, mask[..., first:])


def _masked(mask: Tensor, column: int, values: Tensor) -> Tensor:
    return values * mask[..., column]


def choose(weight: Tensor, hessian: Tensor, mask: Tensor, pattern: Pattern, rows: bool) -> tuple[Tensor, Tensor]:
    """Sweeps over ``weight`` [g, o, i] and chooses a mask [g, o, i] with as many zeros as ``mask``, block of columns by
    block of columns, by (w / spread)^2 of the weights as they stand (Frantar & Alistarh 2023, section 3.2).

    What a column block loses is its share of the units that go; in an n:m pattern the same of every group.
    """
    found = torch.ones_like(mask)
    shape = (mask.shape[0] * mask.shape[1], mask.shape[2])
    gone = pattern.units((~mask).flatten(0, 1).double())
    total, width = int(gone.sum() + 0.5), gone.shape[1]
    per_row = round(float(gone.sum(1).max())) if rows and gone.numel() else 0
    unit = pattern.of or pattern.columns
    share = float(gone.mean()) if pattern.of and gone.numel() else 0.0

    def decide(first: int, w: Tensor, spread: Tensor) -> Rule:
        scores = (w / spread[..., None, :]).square().flatten(0, 1)
        units = pattern.units(scores)
        begin, end = (min(c // pattern.columns, width) for c in (first, first + w.shape[-1]))
        if pattern.of:
            kept = of_groups(units, pattern, share) if units.numel() else units.bool()
        elif rows:
            kept = lowest_of_rows(units, _part(per_row, begin, end, width))
        else:
            kept = lowest(units, _part(total, begin, end, width))
        own = pattern.spread(kept, (shape[0], w.shape[-1])).view(w.shape)
        found[..., first:first + w.shape[-1]] = own
        return partial(_masked, own)

    every = unit * max(1, (1 if pattern.of else LAZY) // unit)
    return found, sweep(weight, hessian, decide, every=every, damp=DAMP)


def _part(total: int, begin: int, end: int, width: int) -> int:
    """What of ``total`` falls to columns begin..end of ``width``: the parts of consecutive columns add up to it."""
    return round(total * end / width) - round(total * begin / width) if width else 0
