"""``bench_table``: what is to be timed of a network on a device that is not this machine, as one folder."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featherweight import deploy
from featherweight.deploy.nest import feed
from featherweight.errors import RecipeError, Untimed
from featherweight.factorize import LowRank
from featherweight.judge.elsewhere import Elsewhere
from featherweight.measure.deployed import sample_inputs
from featherweight.network import Network
from featherweight.prune import Channels
from featherweight.task import Task

#: the steps whose layers are timed where none are given
STEPS = (Channels(latency=0.5), LowRank(latency=0.5, form="auto", how="error"))


def bench_table(network: Network, task: Task, out: str | Path, target: str = "onnxruntime",
                steps: Sequence[Channels | LowRank] = STEPS, threads: int = 1) -> int:
    """Writes what ``steps`` want to know of a device into the folder ``out``; gives the number of files to be timed.

    The folder holds the network, single layers at several widths and ranks, ``manifest.json``, and ``time_them.py``,
    which needs Python 3.9, numpy and the runtime. Run there, it leaves ``times.json``; with that file brought back into
    the folder, ``Channels(latency=..., times=out)``, ``LowRank(latency=..., times=out)`` and
    ``fw.search(..., times=out)`` plan for the device. What one of them misses is added to the folder and said.
    steps: with a latency each. threads: of the runtime; ``Channels`` and ``LowRank`` look for times on one.

    Raises RecipeError for steps without a latency, FileError where the folder is another target's.

    Example:
        >>> import os
        >>> fw.balance.bench_table(network, task, "bench") > 10
        True
        >>> sorted(os.listdir("bench"))
        ['layers', 'manifest.json', 'networks', 'time_them.py']
    """
    for step in steps:
        if getattr(step, "latency", None) is None:
            raise RecipeError(f"bench_table was given {step}; expected steps with a latency, as in "
                              "fw.prune.Channels(latency=0.5)")
    place = Elsewhere(Path(out), target, threads)
    place.begin()
    runtime = deploy.target(target)
    with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
        file = Path(folder, f"model{runtime.suffix}")
        runtime.export(network, file)
        place.add_networks(file, (), inputs_of(network, task))
    for step in steps:
        try:
            dataclasses.replace(step, times=str(out), target=target).plan(network, task)
        except Untimed:
            continue
    return place.waiting()


def inputs_of(network: Network, task: Task, split: str = "calibration") -> dict[str, npt.NDArray[Any]]:
    """Name -> array of a call with one sample, by which files are timed."""
    args, kwargs = sample_inputs(network, task, split, limit=1)
    return {name: np.ascontiguousarray(array) for name, array
            in feed(network.signature, {item.name for item in network.signature.inputs}, args, kwargs).items()}


__all__ = ["bench_table", "inputs_of"]
