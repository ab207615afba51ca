"""How much a block matters: one number for each, higher = keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from featherweight.network import Network, trees
from featherweight.network.devices import device_of
from featherweight.network.edit import weight_name
from featherweight.numerics.change import relative_change
from featherweight.prune.depth.blocks import Block, Blocks
from featherweight.task import Task, call, move


@dataclass(frozen=True)
class BlockCase:
    """What a score may look at: the network with its ``blocks``, and the ``original`` that it was before other blocks
    went. batches: of the calibration data, at most."""

    network: Network
    original: Network
    task: Task
    blocks: Blocks
    batches: int
    seed: int


#: (case, the blocks asked for) -> one number each
BlockScore = Callable[[BlockCase, Sequence[Block]], list[float]]


def random(case: BlockCase, asked: Sequence[Block]) -> list[float]:
    """Uniform noise: the baseline that every score has to beat."""
    return [float(v) for v in np.random.default_rng(case.seed).random(len(asked))]


def norm(case: BlockCase, asked: Sequence[Block]) -> list[float]:
    """Root mean square of the block's weights. Reads no data."""
    network, nodes = case.network, {n.name: n for n in case.network.graph.nodes}
    found = []
    for block in asked:
        names = {weight_name(nodes[n]) for n in case.blocks.regions[block.name]} - {None}
        weights = [network.tensor(str(n)).detach().double() for n in sorted(map(str, names))]
        count = sum(w.numel() for w in weights)
        found.append(float(sum(w.square().sum() for w in weights) / max(count, 1)) ** 0.5)
    return found


def output(case: BlockCase, asked: Sequence[Block]) -> list[float]:
    """|y' - y|^2 / |y|^2 over all floating-point outputs, y of the original and y' with the block bypassed; mean over
    batches."""
    total, count = np.zeros(len(asked)), 0
    for whole, others, _ in _bypassed(case, asked):
        total += [relative_change(trees.floats(other), trees.floats(whole)) for other in others]
        count += 1
    return [float(t) / max(count, 1) for t in total]


def loss(case: BlockCase, asked: Sequence[Block]) -> list[float]:
    """The task's loss with the block bypassed, less that of the original; mean over batches."""
    task = case.task
    task.require("calibration", "loss")
    assert task.loss is not None
    total, count = np.zeros(len(asked)), 0
    for whole, others, target in _bypassed(case, asked):
        before = float(task.loss(whole, target))
        total += [float(task.loss(other, target)) - before for other in others]
        count += 1
    return [float(t) / max(count, 1) for t in total]


#: name -> score; add one of your own under a new name
BLOCK_SCORES: dict[str, BlockScore] = {"output": output, "loss": loss, "norm": norm, "random": random}
#: those that change when another block was dropped
RESCORED = {"output", "loss"}


def _bypassed(case: BlockCase, asked: Sequence[Block]) -> Iterator[tuple[Any, Iterator[Any], Any]]:
    """For each calibration batch: the original's output, the network's outputs with one block bypassed, the target."""
    case.task.require("calibration")
    if not asked:
        return
    original, work = case.original.copy().eval(), case.network.copy().eval()
    device = device_of(work)
    for inputs, target in case.task.batches("calibration", case.batches):
        moved = move(inputs, device)

        def without(block: Block, inputs: Any = moved) -> Any:
            with torch.no_grad(), work.taps(_bypass(block)):
                return call(work, inputs)

        with torch.no_grad():
            whole = call(original, moved)
            yield whole, (without(b) for b in asked), move(target, device)


def _bypass(block: Block) -> dict[str, Callable[[Any], Any]]:
    """Taps that put a block's source in the place of its output."""
    held: dict[str, Any] = {}

    def keep(value: Any) -> None:
        held["x"] = value

    return {block.source: keep, block.output: lambda value: held.pop("x")}
