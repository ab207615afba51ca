"""``BatchNorm``: the running statistics of batch norms estimated anew, as pruning and quantizing shift them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.errors import RecipeError
from featherweight.network import Network
from featherweight.network.devices import placed
from featherweight.network.operators import set_schema_argument
from featherweight.processes import Processes
from featherweight.seeds import generators_kept, seed_all, seed_from
from featherweight.steps import Context, Fit
from featherweight.steps.options import BATCH_LIMIT, SEED, check_number
from featherweight.task import Task, batch_size, call, move

aten = torch.ops.aten


@dataclass(frozen=True)
class BatchNorm(Fit):
    """Sets every batch norm's running mean and variance to their average over ``batches`` batches of the train split
    (calibration where there is none), weighted by samples; targets are not read and no other value changes.

    Each norm normalizes by the statistics of its batch meanwhile (as in training), dropout stays off. Variances are
    unbiased. After Izmailov et al. 2018 (section 3.2) and Li et al. 2020 ("EagleEye", section 3.3). A network without
    batch norms comes back as it was. ``batches=None`` takes the whole split.

    Example:
        >>> small = fw.prune.Channels(macs=0.5).plan(network, task).apply(network)
        >>> settled = fw.recover.BatchNorm().fit(small, task, fw.steps.Context(original=network))
    """

    batches: int | None = 100
    seed: int = 0

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        if not BATCH_LIMIT.hold(self.batches):
            raise RecipeError(f"BatchNorm(batches={self.batches!r}): expected 1 or more, or None for all")
        check_number("BatchNorm", "seed", self.seed, SEED)

    def fit(self, network: Network, task: Task, context: Context) -> Network:
        self.check()
        result = network.copy()
        if not _norms(network):
            return result
        split = "train" if task.has("train") else "calibration"
        device = Processes().device
        work = placed(network, device).eval()
        sums, calls = _prepare(work)
        total = 0.0
        with generators_kept(), torch.no_grad():
            seed_all(seed_from(context.seed, self.seed, "batch norm"))
            for index, (inputs, _) in enumerate(task.batches(split, self.batches)):
                size = batch_size(inputs)
                for tally in sums.values():
                    tally.weight = size
                call(work, move(inputs, device))
                total += size
                context.progress("recover.BatchNorm", index + 1, self.batches or index + 1, {})
        if not total:
            raise RecipeError(f"the {split} split gave no batches; check Task({split}=...), it must start a fresh pass "
                              "at every call")
        with torch.no_grad():
            for (mean, variance), tally in sums.items():
                result.tensor(mean).copy_(tally.mean / (total * calls[mean, variance]))
                result.tensor(variance).copy_(tally.variance / (total * calls[mean, variance]))
        return result


class _Tally:
    """Sums of batch means and variances [c], in float64, each weighted by ``weight``; a norm with momentum 1 leaves
    those of its last batch in its buffers ``mean`` and ``variance``."""

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        self.last = mean, variance
        self.mean: Any = 0.0
        self.variance: Any = 0.0
        self.weight = 0

    def add(self, _: Tensor) -> None:
        mean, variance = self.last
        self.mean = self.mean + self.weight * mean.double()
        self.variance = self.variance + self.weight * variance.double()


def _norms(network: Network) -> list[tuple[Node, str, str]]:
    """Batch-norm calls with stored statistics, and the names of their mean and variance."""
    found = []
    for node in network.calls(aten.batch_norm.default):
        mean, variance = node.args[3], node.args[4]
        if isinstance(mean, Node) and isinstance(variance, Node) and mean.op == variance.op == "get_attr":
            found.append((node, str(mean.target), str(variance.target)))
    return found


def _prepare(work: Network) -> tuple[dict[tuple[str, str], _Tally], dict[tuple[str, str], int]]:
    """Lets the norms of ``work`` keep the statistics of their last batch, and adds each to a tally."""
    sums: dict[tuple[str, str], _Tally] = {}
    calls: dict[tuple[str, str], int] = {}
    for node, mean, variance in _norms(work):
        names = mean, variance
        tally = sums.setdefault(names, _Tally(work.tensor(mean), work.tensor(variance)))
        calls[names] = calls.get(names, 0) + 1
        set_schema_argument(node, "training", True)
        set_schema_argument(node, "momentum", 1.0)
        work.add_tap(node.name, tally.add)
    work.changed()
    return sums, calls
