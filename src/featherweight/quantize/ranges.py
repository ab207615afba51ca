"""What activations occur at the points, seen by taps while calibration data runs through the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from featherweight.errors import TaskError
from featherweight.network import Network
from featherweight.network.devices import device_of
from featherweight.network.program import Tap
from featherweight.numerics import ranges
from featherweight.numerics.formats import unsigned
from featherweight.numerics.grids import Spec, from_range, least_squares
from featherweight.task import Task, call, move

BINS = 2048  #: of the histogram that all methods but "minmax" look at
Search = Callable[[Tensor, Spec, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Grid:
    """Where a value is rounded to: x = (number - zero_point) * scale. signed: whether numbers go below zero where the
    grid is symmetric."""

    scale: float
    zero_point: int
    signed: bool


@dataclass(frozen=True)
class Tops:
    """The largest and the smallest number of each channel of activations, filled while calibration data runs.

    axes: activation's node -> the axes, counted from the end, along which its readers have their channels. found,
    least: (node, axis) -> [channels].
    """

    axes: Mapping[str, tuple[int, ...]]
    found: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    least: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def look(self, name: str, value: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest number of all."""
        least = most = value
        for axis in self.axes.get(name, ()):
            others = [i for i in range(-value.dim(), 0) if i != axis]
            least, most = low, top = value.amin(others), value.amax(others)
            self.found[name, axis] = torch.maximum(self.found.get((name, axis), top), top)
            self.least[name, axis] = torch.minimum(self.least.get((name, axis), low), low)
        return least.amin(), most.amax()

    def reach(self, key: tuple[str, int]) -> Tensor:
        """How far each channel gets from zero."""
        return torch.maximum(self.found[key], -self.least[key])


#: method -> (bin centers, spec, counts) -> (scale, zero point); "minmax" needs no histogram
SEARCHES: dict[str, Search] = {
    "mse": least_squares, "percentile": ranges.percentile, "kl": ranges.kullback_leibler,
}
METHODS = ("minmax", *SEARCHES)


def usual_method(bits: int) -> str:
    """How ranges are chosen where nobody says: of few bits, cutting off what is rare pays."""
    return "minmax" if bits >= 8 else "mse"


def activation_grids(network: Network, task: Task, groups: Mapping[str, list[str]], specs: Mapping[str, Spec],
                     method: str, batches: int | None, tops: Tops | None = None) -> dict[str, Grid]:
    """Leader -> the grid that all points of its group share.

    groups: leader -> node names. specs: leader -> what its grid may be; a symmetric one loses its sign where no value
    lies below zero. method: one of METHODS; all but "minmax" run the data a second time, to fill a histogram per group.
    tops: what else is looked at in the same pass. Raises TaskError where the calibration split is missing or empty, or
    values are not finite.
    """
    leaders = {name: leader for leader, names in groups.items() for name in names}
    lows, highs = _extremes(network, task, leaders, batches, tops or Tops({}))
    counts = {} if method == "minmax" else _histograms(network, task, leaders, lows, highs, batches)
    grids = {}
    for leader in groups:
        low, high = lows[leader], highs[leader]
        spec = specs[leader]
        if spec.symmetric and spec.signed and low >= 0:
            spec = unsigned(spec)
        if leader in counts:
            scale, zero = SEARCHES[method](_centers(low, high), spec, counts[leader])
        else:
            scale, zero = from_range(low, high, spec)
        grids[leader] = Grid(float(scale), int(zero), spec.signed)
    return grids


def watched(network: Network, task: Task, taps: Mapping[str, Tap], batches: int | None,
            wanting: str = "quantized activations need") -> None:
    """Runs the calibration data through the network, as it evaluates, with ``taps``. Raises TaskError without data,
    which says who is ``wanting`` it."""
    seen, device, mode = 0, device_of(network), network.training
    network.eval()
    try:
        with network.taps(taps), torch.no_grad():
            for inputs, _ in task.batches("calibration", batches):
                call(network, move(inputs, device))
                seen += 1
    finally:
        network.train(mode)
    if not seen:
        raise TaskError(f"the calibration split is empty; {wanting} calibration data: "
                        "Task(calibration=lambda: my_batches, ...)")


def _extremes(network: Network, task: Task, leaders: dict[str, str], batches: int | None,
              tops: Tops) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    lows: dict[str, Tensor] = {}
    highs: dict[str, Tensor] = {}

    def watch(name: str) -> Tap:
        def tap(value: Tensor) -> None:
            low, high = tops.look(name, value.detach())
            leader = leaders[name]
            lows[leader] = torch.minimum(lows.get(leader, low), low)
            highs[leader] = torch.maximum(highs.get(leader, high), high)

        return tap

    watched(network, task, {name: watch(name) for name in leaders}, batches)
    for leader in lows:
        if not (torch.isfinite(lows[leader]) and torch.isfinite(highs[leader])):
            _check_weights(network)
            raise TaskError(f"the value of node {leader!r} is not finite on the calibration data; look at that data, "
                            f'or leave the node float: Quantize(ignore=("{leader}",))')
    return {k: v.cpu() for k, v in lows.items()}, {k: v.cpu() for k, v in highs.items()}


def _histograms(network: Network, task: Task, leaders: dict[str, str], lows: dict[str, Tensor],
                highs: dict[str, Tensor], batches: int | None) -> dict[str, Tensor]:
    """Leader -> how many values fell into each of BINS. Exact zeros are left out: they stand exactly on every grid."""
    counts = {leader: torch.zeros(BINS, dtype=torch.float64) for leader in lows if highs[leader] > lows[leader]}

    def watch(leader: str) -> Tap:
        low, high = float(lows[leader]), float(highs[leader])
        zero = torch.histc(torch.zeros(1), BINS, low, high).double()  # the bin of zero (none: zero is out of range)

        def tap(value: Tensor) -> None:
            seen = torch.histc(value.detach().float(), BINS, low, high).double().cpu()
            counts[leader] += seen - zero * (value.numel() - int(value.count_nonzero()))

        return tap

    watched(network, task, {name: watch(leader) for name, leader in leaders.items() if leader in counts}, batches)
    return {leader: found for leader, found in counts.items() if found.any()}


def _centers(low: Tensor, high: Tensor) -> Tensor:
    """Middle of each bin, the outermost two moved to the ends of the range."""
    edges = torch.linspace(float(low), float(high), BINS + 1, dtype=torch.float64)
    centers = (edges[1:] + edges[:-1]) / 2
    centers[0], centers[-1] = edges[0], edges[-1]
    return centers


def _check_weights(network: Network) -> None:
    """Raises TaskError where a stored tensor, not the data, is what is not finite."""
    for name, tensor in network.tensors().items():
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise TaskError(f"{name!r} holds numbers that are not finite; train or load the weights again")
