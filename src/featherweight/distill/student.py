"""``Student``: a thinner or shallower copy of a network's own graph, to be taught by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from featherweight.axes.blocks import Block, Blocks, droppable, without
from featherweight.axes.cut import cut, kept_atoms, kept_positions
from featherweight.axes.groups import AxisGroup, axis_groups
from featherweight.distill.strategies.online import fresh
from featherweight.errors import PlanError
from featherweight.measure.macs import macs
from featherweight.network import Network
from featherweight.steps import Plan, Rewrite, Skipped, Stage
from featherweight.steps.options import SEED, Numbers, check_known, check_numbers
from featherweight.steps.plan import Kept
from featherweight.task import Task

SHARE = Numbers(0.5, above=0, most=1, noun="the fraction that remains,")
WEIGHTS = ("inherited", "fresh")


@dataclass(frozen=True)
class StudentPlan(Plan):
    """Blocks that the student leaves out, and the channels that it keeps of what is left, by axis group.

    shapes: of the tensors that are cut, after the blocks are gone. seed: of fresh weights, None for inherited ones.

    Example:
        >>> plan = fw.distill.Student(width=0.5).plan(network, task)
        >>> {group: len(kept) for group, kept in plan.keep.items()}
        {'0': 4, '3': 8}
    """

    kind: ClassVar[str] = "distill.student/1"
    blocks: tuple[Block, ...]
    keep: dict[str, tuple[int, ...]]
    shapes: dict[str, tuple[int, ...]]
    macs_whole: int
    macs_small: int
    seed: int | None = None

    def apply(self, network: Network) -> Network:
        """The student. Raises PlanError if the network is not the one planned on."""
        shallow = self._shallow(network)
        axes = axis_groups(shallow)
        small = cut(shallow, axes, kept_atoms(axes, self.keep)) if self.keep else shallow
        return small if self.seed is None else fresh(small, self.seed)

    def _shallow(self, network: Network) -> Network:
        known = set(droppable(network).found) if self.blocks else set()
        for block in self.blocks:
            if block not in known:
                raise PlanError(f"the plan leaves out {block.name!r}, which is no block of this network that may be "
                                "dropped; make the plan on this very network")
        shallow = without(network, self.blocks) if self.blocks else network.copy()
        tensors = shallow.tensors()
        for name, shape in self.shapes.items():
            if name not in tensors or tuple(tensors[name].shape) != shape:
                raise PlanError(f"the plan was made for {name!r} of shape {list(shape)}, which is not here: make the "
                                "plan on this very network")
        return shallow

    def kept(self, network: Network) -> dict[str, Kept]:
        shallow = self._shallow(network)
        axes = axis_groups(shallow)
        return kept_positions(shallow, axes, kept_atoms(axes, self.keep))

    def summary(self) -> str:
        share = self.macs_small / self.macs_whole if self.macs_whole else 1.0
        how = "inherited" if self.seed is None else "fresh"
        return (f"a student of {self.macs_small} MACs ({share:.0%}), weights {how}: {len(self.blocks)} blocks out, "
                f"channels cut in {len(self.keep)} axis groups")


@dataclass(frozen=True)
class Student(Rewrite):
    """A thinner and shallower copy of the network's own graph, to be taught by the network it was made of.

    width: fraction of the channels of every axis group, 0..1. depth: fraction of the blocks that may be dropped, 0..1;
    those that go lie evenly between those that stay. weights: "inherited" from the channels with the largest weights
    (sums of absolute values), or "fresh". seed: of fresh weights. The training behind it teaches it, e.g.
    ``recover.Train(beside=(distill.Logits(), distill.Features()))``.

    Example:
        >>> student = fw.distill.Student(width=0.5).plan(network, task).apply(network)
        >>> fw.measure.macs(student).total < 0.6 * fw.measure.macs(network).total
        True
    """

    width: float = 0.5
    depth: float = 1.0
    weights: str = "inherited"
    seed: int = 0

    stage: ClassVar[Stage] = Stage.STRUCTURE

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        check_numbers(self, {"width": SHARE, "depth": SHARE, "seed": SEED})
        check_known("Student", "weights", self.weights, WEIGHTS)

    def plan(self, network: Network, task: Task) -> StudentPlan:
        """Chooses blocks and channels. Reads no data."""
        self.check()
        found = droppable(network)
        blocks = _spread(found, 1 - self.depth)
        shallow = without(network, blocks) if blocks else network
        axes = axis_groups(shallow)
        groups = axes.groups if self.width < 1 else ()
        keep = {g.name: _largest(shallow, g, self.width) for g in groups}
        touched = {m.tensor for g in groups for m in g.members}
        shapes = {name: tuple(shallow.tensor(name).shape) for name in sorted(touched)}
        left = [*axes.frozen] if self.width < 1 else []
        if self.depth < 1 and not blocks:
            left.append(Skipped("depth", "no block may be dropped, or too few for one to go"))
        if self.width == 1 and not blocks:
            left.append(Skipped("width", "width=1 and no block left out: the student is the network itself"))
        seed = self.seed if self.weights == "fresh" else None
        small = cut(shallow, axes, kept_atoms(axes, keep)) if keep else shallow
        return StudentPlan(blocks, keep, shapes, macs(network).total, macs(small).total, seed, skipped=tuple(left))


def _spread(found: Blocks, share: float) -> tuple[Block, ...]:
    """Of the largest blocks that do not overlap one another, this share, evenly over the depth; in graph order."""
    kinds = ("layer", "residual", "shortcut", "plain")
    usable: list[Block] = []
    for kind in kinds:
        usable += [b for b in found.found if b.kind == kind and not any(found.overlap(b, u) for u in usable)]
    order = {b: i for i, b in enumerate(found.found)}
    usable.sort(key=order.__getitem__)
    count = min(len(usable), round(share * len(usable)))
    chosen = [usable[math.floor((i + 0.5) * len(usable) / count)] for i in range(count)]
    return tuple(dict.fromkeys(chosen))


def _largest(network: Network, group: AxisGroup, share: float) -> tuple[int, ...]:
    """The channels with the largest sum of absolute weights, over all that make or read them."""
    size = np.zeros(len(group))
    for member in group.members:
        if member.role in ("weight", ""):
            rows = network.tensor(member.tensor).detach().float().abs().movedim(member.dim, 0).flatten(1).sum(1)
            size += rows.cpu().numpy()[member.index].sum(1)
    count = max(1, round(share * len(group)))
    best: Sequence[int] = np.argsort(-size, kind="stable")[:count].tolist()
    return tuple(sorted(best))
