"""What the kinds of the layers cost in time, measured inside the network in the runtime that it is for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from featherweight import deploy, measure
from featherweight.network import Network
from featherweight.quantize.layers import LayerForm
from featherweight.quantize.search import plain
from featherweight.quantize.step import Quantize
from featherweight.task import Task

#: seconds that each file is timed for, and files that are timed in the same rounds
SECONDS = 0.2
TOGETHER = 8
#: files -> median seconds of one call of each
Timer = Callable[[Mapping[str, Network]], dict[str, float]]
Costs = dict[str, dict[str, float]]


def seconds(network: Network, task: Task, step: Quantize, options: Mapping[str, Mapping[str, LayerForm]],
            kinds: tuple[str, ...], share: float, timer: Timer | None = None) -> tuple[float, Costs]:
    """What the layers of ``options`` may cost together so that the network takes ``share`` of the float one's latency,
    and what each costs in each kind: how much longer the network takes than with all layers of the first kind.

    What a layer adds so includes the way to whole numbers and back at its sides; neighbours that change together
    share that, so sums are estimates. Networks are timed at batch one, ``TOGETHER`` in the same rounds as the first.
    """
    timer = timer or partial(_timed, task=task, target=step.target or "onnxruntime")
    fast = plain(step, ranges="minmax", weight_ranges="minmax", rounding="nearest", equalize=False, smooth=None,
                 rescale=False, correct_bias=False, calibration_batches=1)

    def made(kind_of: Mapping[str, str]) -> Network:
        whole = tuple(n for n, k in kind_of.items() if k == "float")
        mixed = {**fast.mixed, **{n: k for n, k in kind_of.items() if k != "float"}}
        return replace(fast, mixed=mixed, ignore=(*fast.ignore, *whole)).plan(network, task).apply(network)

    first = {n: next(k for k in kinds if k == "float" or k in mine) for n, mine in options.items()}
    others = [(n, k) for n, mine in options.items() for k in kinds if k != first[n] and (k == "float" or k in mine)]
    base = made(first)
    costs: Costs = {n: {first[n]: 0.0} for n in options}
    ends: dict[str, float] = {}
    for start in range(0, max(1, len(others)), TOGETHER):
        part = others[start:start + TOGETHER]
        found = timer({"first": base, **({} if ends else {"float": network}),
                       **{f"{i}": made({**first, n: k}) for i, (n, k) in enumerate(part)}})
        ends = ends or found
        for i, (n, k) in enumerate(part):
            costs[n][k] = ends["first"] * (found[f"{i}"] / found["first"] - 1)
    ordered = {n: {k: costs[n][k] for k in kinds if k in costs[n]} for n in costs}
    return share * ends["float"] - ends["first"], ordered


def _timed(networks: Mapping[str, Network], task: Task, target: str) -> dict[str, float]:
    """Median seconds of one call of each network's deployed file, in interleaved rounds."""
    runtime, runners = deploy.target(target), {}
    try:
        with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
            calls: dict[str, Callable[[], Any]] = {}
            for name, network in networks.items():
                file = Path(folder) / f"{name}{runtime.suffix}"
                runtime.export(network, file)
                runners[name] = runtime.load(file, like=network.signature)
                args, kwargs = measure.sample_inputs(network, task, "calibration", limit=1)
                calls[name] = partial(runners[name], *args, **kwargs)
            found = measure.interleave(calls, seconds=SECONDS * len(calls), threads=1)
    finally:
        for runner in runners.values():
            runner.close()
    return {name: found[name].median_s for name in networks}


__all__ = ["seconds"]
