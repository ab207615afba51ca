"""``Layers``: drops whole residual blocks, x + f(x) -> x."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import Node

from featherweight.errors import PlanError, RecipeError, did_you_mean
from featherweight.network import Network
from featherweight.network.surgery import WEIGHTED, clear_dead, read_tensors, weight_name
from featherweight.steps import Plan, Rewrite, Skipped, Stage
from featherweight.task import Task, call, move

aten = torch.ops.aten
SCORES = ("output", "norm", "random")
ADDS = (aten.add.Tensor, aten.add_.Tensor)
RELUS = (aten.relu.default, aten.relu_.default)
#: calibration batches that a score reads at most
BATCHES = 4


@dataclass(frozen=True)
class Block:
    """A residual block: ``add`` is the node that adds f(x) to ``shortcut``, the node x. ``name``: its module path."""

    name: str
    add: str
    shortcut: str


@dataclass(frozen=True)
class LayerPlan(Plan):
    """Residual blocks to drop, and the score of every block that could be."""

    blocks: tuple[Block, ...]
    scores: dict[str, float]

    def apply(self, network: Network) -> Network:
        """A copy in which each listed block gives back its input; what only it needed is removed."""
        other = network.copy()
        before = read_tensors(other)
        nodes = {n.name: n for n in other.graph.nodes}
        known = {b.add: b for b in residual_blocks(network)[0]}
        for block in self.blocks:
            if known.get(block.add) != block:
                raise PlanError(f"the plan drops block {block.name!r} at node {block.add!r}, which is no residual "
                                "block of this network; make the plan on this very network")
        order = {name: i for i, name in enumerate(nodes)}
        for block in sorted(self.blocks, key=lambda b: -order[b.add]):
            add, source = nodes[block.add], nodes[block.shortcut]
            for user in list(add.users):  # relu(relu(x)) = relu(x)
                if user.target in RELUS and source.target in RELUS:
                    user.replace_all_uses_with(source)
                    other.graph.erase_node(user)
            add.replace_all_uses_with(source)
        clear_dead(other, before)
        other.changed()
        return other

    def summary(self) -> str:
        names = ", ".join(b.name for b in self.blocks) or "none"
        return f"drop {len(self.blocks)} of {len(self.scores)} residual blocks: {names}"


def residual_blocks(network: Network) -> tuple[list[Block], list[Skipped]]:
    """Every addition x + f(x) with weights in f whose result may be replaced by x, in order; and the additions of two
    paths that are none, with the reason."""
    values = network.values()
    reads: dict[Node, int] = {}
    blocks: list[Block] = []
    left: list[Skipped] = []
    seen: dict[str, int] = {}
    for i, node in enumerate(network.graph.nodes):
        mask = 1 << i
        for used in node.all_input_nodes:
            mask |= reads[used]
        reads[node] = mask
        if node.op != "call_function" or node.target not in ADDS:
            continue
        sides = [a for a in node.args[:2] if isinstance(a, Node) and isinstance(values[a.name], Tensor)]
        if len(sides) < 2 or any(_stored(a) for a in sides):
            continue
        path = str(node.meta.get("module", "")) or node.name
        reason = _reason(node, sides, reads, values)
        pair = _sides(sides, reads)
        if pair is None and not any(_weights(a, None) for a in sides):
            continue
        seen[path] = seen.get(path, 0) + 1
        name = path if seen[path] == 1 else f"{path}:{seen[path]}"
        if reason:
            left.append(Skipped(name, reason))
        else:
            assert pair is not None
            blocks.append(Block(name, node.name, pair[0].name))
    return blocks, left


def _stored(node: Node) -> bool:
    """Whether a value reads no input of the network."""
    seen, stack = set(), [node]
    while stack:
        n = stack.pop()
        if n.op == "placeholder":
            return False
        if n not in seen:
            seen.add(n)
            stack.extend(n.all_input_nodes)
    return True


def _sides(sides: Sequence[Node], reads: dict[Node, int]) -> tuple[Node, Node] | None:
    """(shortcut, branch) where the branch is computed from the shortcut itself."""
    for shortcut, branch in ((sides[0], sides[1]), (sides[1], sides[0])):
        own = reads[shortcut]
        bit = 1 << (own.bit_length() - 1)
        if reads[branch] & bit and shortcut is not branch:
            return shortcut, branch
    return None


def _reason(node: Node, sides: Sequence[Node], reads: dict[Node, int], values: dict[str, Any]) -> str:
    """Why an addition is no droppable block; "" if it is one."""
    pair = _sides(sides, reads)
    if pair is None:
        kinds = [str(getattr(a.target, "__name__", a.target)).split(".")[0] for a in sides]
        return f"its shortcut is not the identity (it adds {kinds[0]} and {kinds[1]})"
    if node.kwargs.get("alpha", 1) != 1:
        return "it adds a multiple"
    if values[pair[0].name].shape != values[node.name].shape or values[pair[0].name].dtype != values[node.name].dtype:
        return "its input has another shape than its output"
    return "" if _weights(pair[1], pair[0]) else "its branch has no weights"


def _weights(branch: Node, shortcut: Node | None) -> list[str]:
    """The weights that the branch reads on its way from the shortcut."""
    found, seen, stack = [], set(), [branch]
    while stack:
        n = stack.pop()
        if n is shortcut or n in seen:
            continue
        seen.add(n)
        name = weight_name(n) if n.target in WEIGHTED else None
        if name is not None:
            found.append(name)
        stack.extend(n.all_input_nodes)
    return found


@dataclass(frozen=True)
class Layers(Rewrite):
    """Drops residual blocks.

    count: how many, those of the lowest score. Or names: glob patterns of module paths of blocks. Give one of the two.
    score: "output" (how far the network's outputs move on calibration data when the block alone is bypassed: squared
        distance over squared length), "norm" (root mean square of the block's weights; reads no data) or "random".
    ignore: glob patterns of blocks to keep. seed: for score="random".
    """

    count: int | None = None
    names: tuple[str, ...] = ()
    score: str = "output"
    ignore: tuple[str, ...] = ()
    seed: int = 0

    stage: ClassVar[Stage] = Stage.STRUCTURE

    def plan(self, network: Network, task: Task) -> LayerPlan:
        self._check()
        blocks, left = residual_blocks(network)
        for pattern in (*self.names, *self.ignore):
            if not any(fnmatchcase(b.name, pattern) for b in blocks):
                close = did_you_mean(pattern, [b.name for b in blocks]) if blocks else "none may be dropped"
                left.append(Skipped(pattern, f"no residual block of this name; {close}"))
        ignored = [b for b in blocks if any(fnmatchcase(b.name, p) for p in self.ignore)]
        left.extend(Skipped(b.name, "ignore=(...)") for b in ignored)
        free = [b for b in blocks if b not in ignored]
        if self.names:
            chosen = [b for b in free if any(fnmatchcase(b.name, p) for p in self.names)]
            return LayerPlan(tuple(chosen), {b.name: 0.0 for b in blocks}, skipped=tuple(left))
        scores = self._scores(network, task, free)
        order = sorted(range(len(free)), key=lambda i: (scores[i], i))
        count = min(self.count or 0, len(free))
        if count < (self.count or 0):
            left.append(Skipped("", f"count={self.count}, but only {len(free)} residual blocks may be dropped"))
        lowest = tuple(free[i] for i in sorted(order[:count]))
        return LayerPlan(lowest, {b.name: s for b, s in zip(free, scores, strict=True)}, skipped=tuple(left))

    def _scores(self, network: Network, task: Task, blocks: list[Block]) -> list[float]:
        if self.score == "random":
            return [float(v) for v in np.random.default_rng(self.seed).random(len(blocks))]
        if self.score == "norm":
            nodes = {n.name: n for n in network.graph.nodes}
            found = []
            for b in blocks:
                branch = next(a for a in nodes[b.add].all_input_nodes if a.name != b.shortcut)
                weights = [network.tensor(n).detach().double() for n in _weights(branch, nodes[b.shortcut])]
                found.append(float(sum(w.square().sum() for w in weights) / sum(w.numel() for w in weights)) ** 0.5)
            return found
        return output_change(network, task, blocks) if blocks else []

    def _check(self) -> None:
        if (self.count is None) == (not self.names):
            raise RecipeError(f"Layers was given count={self.count} and names={self.names}; expected one of the two: "
                              "write Layers(count=2) or Layers(names=(\"layer1.1\",))")
        if self.count is not None and self.count < 1:
            raise RecipeError(f"Layers was given count={self.count}; expected a number of blocks from 1, as in "
                              "Layers(count=2)")
        if self.score not in SCORES:
            raise RecipeError(f"Layers has no score {self.score!r}; {did_you_mean(self.score, SCORES)}; "
                              "write Layers(count=2, score=\"output\")")


def output_change(network: Network, task: Task, blocks: Sequence[Block]) -> list[float]:
    """|y' - y|^2 / |y|^2 over all floating-point outputs, y' with one block bypassed, averaged over batches."""
    task.require("calibration")
    work = network.copy().eval()
    device = next((t.device for t in work.tensors().values()), torch.device("cpu"))
    total, batches = [0.0] * len(blocks), 0
    for inputs, _ in task.batches("calibration", BATCHES):
        inputs = move(inputs, device)
        with torch.no_grad():
            whole = _floats(call(work, inputs))
            for i, block in enumerate(blocks):
                with work.taps(_bypass(block)):
                    other = _floats(call(work, inputs))
                moved = sum(float((a - b).double().square().sum()) for a, b in zip(other, whole, strict=True))
                total[i] += moved / max(sum(float(b.double().square().sum()) for b in whole), 1e-30)
        batches += 1
    return [t / max(batches, 1) for t in total]


def _floats(output: Any) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(output) if isinstance(v, Tensor) and v.is_floating_point()]


def _bypass(block: Block) -> dict[str, Callable[[Any], Any]]:
    """Taps that put a block's input in the place of its output."""
    held: dict[str, Any] = {}

    def keep(value: Any) -> None:
        held["x"] = value

    return {block.shortcut: keep, block.add: lambda value: held.pop("x")}
