"""How much a block matters: one number for each, higher = keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from featherweight.axes.blocks import Block, Blocks
from featherweight.judge.bench import bypass
from featherweight.judge.damage import Judge, damages
from featherweight.network import Network
from featherweight.network.edit import weight_name
from featherweight.task import Task


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
    return _bypassed(case, asked, "output")


def loss(case: BlockCase, asked: Sequence[Block]) -> list[float]:
    """The task's loss with the block bypassed, less that of the original; mean over batches."""
    return _bypassed(case, asked, "loss")


#: name -> score; add one of your own under a new name
BLOCK_SCORES: dict[str, BlockScore] = {"output": output, "loss": loss, "norm": norm, "random": random}
#: those that change when another block was dropped
RESCORED = {"output", "loss"}


def _bypassed(case: BlockCase, asked: Sequence[Block], measure: str) -> list[float]:
    """The damage that each block does that alone is bypassed, against the original, on calibration data."""
    forms = [bypass(block.source, block.output) for block in asked]
    judge = Judge(measure, "calibration", case.batches)
    return damages(case.network, case.task, forms, judge, case.original) if forms else []
