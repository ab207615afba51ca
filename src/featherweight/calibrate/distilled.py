"""Calibration data without data: inputs made from a network's weights and batch-norm statistics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.errors import TaskError
from featherweight.network import Network
from featherweight.network.edit import constant_value
from featherweight.numerics.balance import statistics_distance
from featherweight.seeds import seed_from
from featherweight.steps import Skipped
from featherweight.task import Inputs, Task

aten = torch.ops.aten

RATE = 0.1  #: Adam's first learning rate; it falls to zero along a cosine
CALIBRATIONS = ("data", "distilled")
NO_NORMS = "no batch norm whose statistics inputs could be made from: standard normal inputs are taken"


def distilled_data(network: Network, batches: int = 4, batch: int = 32, steps: int = 100, seed: int = 0,
                   ) -> list[tuple[Inputs, None]]:
    """Batches (inputs, None) for a calibration split, made without any data.

    Cai et al. 2020, "ZeroQ", eq. 2: standard normal inputs are trained so that the mean and the standard deviation of
    what reaches each batch norm, per channel, match its running ones; the weights stay. Adam, ``steps`` steps a batch.
    network: as captured, batch norm not folded; its inputs are to be floats, free sizes other than the batch are 64.
    The same seed gives the same batches. A network without batch norm gets standard normal inputs, and a warning says
    so. Raises TaskError for whole-number inputs, of which nothing can be made.

    Example:
        >>> data = fw.quantize.distilled_data(network, batches=1, batch=4, steps=2)
        >>> data[0][0].shape
        torch.Size([4, 1, 8, 8])
    """
    check_inputs(network)
    work = network.copy().eval()
    work.requires_grad_(False)
    norms = batch_norms(work)
    if not norms:
        warnings.warn(f"distilled_data: {NO_NORMS}", stacklevel=2)
    return [(_made(work, norms, batch, steps, seed_from(seed, index, "distilled data")), None)
            for index in range(batches)]


def calibrated(calibration: str, network: Network, task: Task, batches: int | None) -> tuple[Task, list[Skipped]]:
    """The task with the calibration split that is asked for (one of ``CALIBRATIONS``), and what there is to say of it.

    Inputs are made when they are first read: a plan that needs none costs nothing."""
    if calibration == "data":
        return task, []

    @cache
    def made() -> list[tuple[Inputs, None]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return distilled_data(network, 4 if batches is None else batches)

    said = [] if batch_norms(network) else [Skipped("calibration", NO_NORMS)]
    return replace(task, calibration=lambda: made()), said


def check_inputs(network: Network) -> None:
    """Raises TaskError for inputs that cannot be made."""
    for item in network.signature.inputs:
        if not item.dtype.is_floating_point:
            raise TaskError(f"input {item.name!r} is {str(item.dtype).removeprefix('torch.')}; data can be made for "
                            "float inputs only: write Task(calibration=lambda: my_batches, ...)")
    args, kwargs = network.example_inputs()
    if args and kwargs:
        raise TaskError("the network takes positional and keyword inputs, which no batch of data holds at once; "
                        "capture it with one kind alone")


def batch_norms(network: Network) -> list[tuple[Node, Tensor, Tensor]]:
    """The batch-norm calls that normalize by stored statistics, with mean and variance [c]."""
    found = []
    for node in network.calls(aten.batch_norm.default):
        mean, variance = (constant_value(network, a) for a in node.args[3:5])
        if mean is not None and variance is not None and not node.args[5]:
            found.append((node, mean.detach(), variance.detach()))
    return found


def _made(network: Network, norms: list[tuple[Node, Tensor, Tensor]], batch: int, steps: int, seed: int) -> Inputs:
    """One batch of inputs."""
    args, kwargs = network.example_inputs(batch, seed)
    leaves = [t.detach().clone() for t in network.signature.leaves(args, kwargs)]
    if norms and steps:
        _train(network, norms, leaves, steps)
    args, kwargs = network.nest([t.detach() for t in leaves])
    if kwargs:
        return kwargs
    return args[0] if len(args) == 1 and isinstance(args[0], Tensor) else args


def _train(network: Network, norms: list[tuple[Node, Tensor, Tensor]], leaves: list[Tensor], steps: int) -> None:
    """Trains the inputs ``leaves`` in place."""
    for leaf in leaves:
        leaf.requires_grad_(True)
    optimizer = torch.optim.Adam(leaves, lr=RATE)
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[Any], None]:
        return lambda value: seen.__setitem__(name, value)

    with network.taps({name: watch(name) for name in {str(node.args[0]) for node, _, _ in norms}}):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad()
            args, kwargs = network.nest(leaves)
            with torch.enable_grad():
                network(*args, **kwargs)
                loss = sum(statistics_distance(seen[str(n.args[0])], mean, var) for n, mean, var in norms)
            assert isinstance(loss, Tensor)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    for leaf in leaves:
        leaf.requires_grad_(False)


__all__ = ["CALIBRATIONS", "batch_norms", "calibrated", "distilled_data"]
