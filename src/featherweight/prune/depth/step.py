"""``Layers``: makes a network shallower by dropping blocks and layers of the same shape."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

from featherweight.axes.blocks import KINDS, Block, Blocks, droppable, without
from featherweight.errors import PlanError, RecipeError, did_you_mean
from featherweight.measure.macs import macs as count_macs
from featherweight.network import Network
from featherweight.network.edit import readers_of
from featherweight.network.layers import around, fits, ignored, known_by, select, unmatched
from featherweight.prune.depth.scores import BLOCK_SCORES, RESCORED, BlockCase
from featherweight.steps import Plan, Rewrite, Skipped, Stage
from featherweight.steps.options import SEED, Numbers, check_known, check_numbers
from featherweight.task import Task

PER = ("block", "macs")
NUMBERS = {"count": Numbers(2, least=1, whole=True, none="blocks by name"),
           "batches": Numbers(4, least=1, whole=True), "seed": SEED}


@dataclass(frozen=True)
class LayerPlan(Plan):
    """Blocks to drop, in the order in which they were chosen, and the last score of every block that could be.

    Example:
        >>> deep = fw.capture(nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), torch.randn(2, 8))
        >>> plan = fw.prune.Layers(count=1, score="random", kinds=("plain",)).plan(deep, fw.Task())
        >>> [block.kind for block in plan.blocks]
        ['plain']
    """

    kind: ClassVar[str] = "prune.layers/1"
    blocks: tuple[Block, ...]
    scores: dict[str, float]

    def apply(self, network: Network) -> Network:
        """A copy in which each listed block gives back its input (or shortcut); what only it needed is removed.

        Raises PlanError if the network is not the one planned on."""
        known = set(droppable(network).found)
        for block in self.blocks:
            if block not in known:
                raise PlanError(f"the plan drops {block.name!r} at node {block.output!r}, which is no block of this "
                                "network that may be dropped; make the plan on this very network")
        return without(network, self.blocks)

    def summary(self) -> str:
        names = ", ".join(b.name for b in self.blocks) or "none"
        return f"drop {len(self.blocks)} of {len(self.scores)} blocks: {names}"


@dataclass(frozen=True)
class Layers(Rewrite):
    """Drops blocks: residual branches, plain layers of the same shape, whole encoder layers.

    count: how many, those of the lowest score. Or names: glob patterns of blocks (module paths). Give one of the two.
    score: "output" (how far the network's outputs move on calibration data when the block alone is bypassed: squared
        distance over squared length), "loss" (by how much the loss rises there), "norm" (root mean square of the
        block's weights; reads no data) or "random".
    greedy: after each block that goes, those left are scored again without it, against the original; for scores that
        read data.
    per: "block" takes the lowest score, "macs" the lowest score for the share of all MACs that it saves.
    kinds: "residual" (x + f(x)), "shortcut" (s(x) + f(x)), "plain" (f(x) at stride 1) and "layer" (whole modules of two
        or more residual blocks, named "path (layer)"; they and the blocks in them exclude one another).
    ignore: patterns (``network/layers``) of blocks to keep, or of layers in them. seed: for score="random".
    batches: of calibration data, at most.

    Example:
        >>> class Residual(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        ...     def forward(self, x):
        ...         return x + self.inner(x)
        >>> deep = fw.capture(nn.Sequential(Residual(), Residual(), nn.Linear(8, 2)), torch.randn(2, 8))
        >>> data = fw.Task(calibration=lambda: [(torch.randn(4, 8), None)])
        >>> shallow = fw.prune.Layers(count=1).plan(deep, data).apply(deep)
    """

    count: int | None = None
    names: tuple[str, ...] = ()
    score: str = "output"
    ignore: tuple[str, ...] = ()
    seed: int = 0
    greedy: bool = True
    per: str = "block"
    kinds: tuple[str, ...] = ("residual", "shortcut", "plain")
    batches: int = 4

    stage: ClassVar[Stage] = Stage.STRUCTURE

    def plan(self, network: Network, task: Task) -> LayerPlan:
        """Raises RecipeError for options that make no sense, TaskError where the score needs data that is not there."""
        self.check()
        blocks = droppable(network)
        free, left = self._candidates(network, blocks)
        if self.names:
            chosen: list[Block] = []
            for block in (b for b in free if any(fnmatchcase(b.name, p) for p in self.names)):
                clash = next((c for c in chosen if blocks.overlap(block, c)), None)
                if clash is None:
                    chosen.append(block)
                else:
                    left.append(Skipped(block.name, f"it shares calls with {clash.name!r}, which goes"))
            return LayerPlan(tuple(chosen), {b.name: 0.0 for b in free}, skipped=tuple(left))
        assert self.count is not None
        dropped, scores = self._lowest(network, task, blocks, free)
        if len(dropped) < self.count:
            left.append(Skipped("", f"count={self.count}, but only {len(dropped)} blocks may be dropped"))
        return LayerPlan(dropped, scores, skipped=tuple(left))

    def _candidates(self, network: Network, blocks: Blocks) -> tuple[list[Block], list[Skipped]]:
        free, left = [], list(blocks.skipped)
        names, known = [b.name for b in blocks.found], _known(network, blocks)
        missing = {p: "" for p in self.names if not any(fnmatchcase(n, p) for n in names)}
        missing |= {p: f"{unmatched(p, 'ignore', 'block').reason}: " for p in self.ignore
                    if not any(fits(k, p) for k in known.values())}
        for pattern, said in missing.items():
            close = did_you_mean(pattern, names) if names else "none may be dropped"
            left.append(Skipped(pattern, f"{said}no block of this name may be dropped; {close}"))
        for block in blocks.found:
            if hit := ignored(known[block.name], self.ignore):
                left.append(Skipped(block.name, hit))
            elif block.kind in self.kinds:
                free.append(block)
            else:
                left.append(Skipped(block.name, f"it is of the kind {block.kind!r}, and kinds={self.kinds}"))
        return free, [*left, *_outside(network, blocks, {s.path for s in left})]

    def _lowest(self, network: Network, task: Task, blocks: Blocks,
                free: list[Block]) -> tuple[tuple[Block, ...], dict[str, float]]:
        """The blocks that go, one after the other, and the last score of each."""
        assert self.count is not None
        by_output = {(b.output, b.kind): b for b in free}
        dropped: list[Block] = []
        left = list(free)
        scores = self._scores(BlockCase(network, network, task, blocks, self.batches, self.seed), free)
        found = {b.name: s for b, s in zip(free, scores, strict=True)}
        while left and len(dropped) < self.count:
            lowest = min(left, key=lambda b: found[b.name])
            dropped.append(lowest)
            left = [b for b in left if not blocks.overlap(b, lowest)]
            if self.greedy and self.score in RESCORED and left and len(dropped) < self.count:
                smaller = without(network, tuple(dropped))
                inner = droppable(smaller)
                now = [(b, by_output.get((b.output, b.kind))) for b in inner.found]
                pairs = [(b, old) for b, old in now if old is not None and old in left]
                case = BlockCase(smaller, network, task, inner, self.batches, self.seed)
                again = self._scores(case, [b for b, _ in pairs])
                left = [old for _, old in pairs]
                found.update({old.name: s for (_, old), s in zip(pairs, again, strict=True)})
        return tuple(dropped), found

    def _scores(self, case: BlockCase, asked: list[Block]) -> list[float]:
        scores = BLOCK_SCORES[self.score](case, asked)
        if self.per == "macs" and asked:
            counted = count_macs(case.network)
            saved = [sum(counted.by_node.get(n, 0) for n in case.blocks.regions[b.name]) for b in asked]
            scores = [s / max(m / max(counted.total, 1), 1e-9) for s, m in zip(scores, saved, strict=True)]
        return scores

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        if (self.count is None) == (not self.names):
            raise RecipeError(f"Layers was given count={self.count} and names={self.names}; expected one of the two: "
                              "write Layers(count=2) or Layers(names=(\"layer1.1\",))")
        check_numbers(self, NUMBERS)
        check_known("Layers", "score", self.score, BLOCK_SCORES)
        check_known("Layers", "per", self.per, PER)
        for kind in self.kinds:
            check_known("Layers", "kinds", kind, KINDS, 'kinds=("residual", "plain")')
        if not self.kinds:
            raise RecipeError(f"Layers was given kinds=(); expected one or more of {KINDS}")


def _known(network: Network, blocks: Blocks) -> dict[str, frozenset[str]]:
    """Block's name -> what a pattern of ``ignore`` may fit: its own name, its output's node, the layers in it."""
    layers = select(network).layers
    found = {}
    for block in blocks.found:
        inside = [layer.known for layer in layers if any(c.name in blocks.regions[block.name] for c in layer.calls)]
        found[block.name] = frozenset([*around(block.name), block.output]).union(*inside)
    return found


def _outside(network: Network, blocks: Blocks, named: set[str]) -> list[Skipped]:
    """The parameters of two or more axes that no block reads, and none of the modules ``named``."""
    inside = {name for region in blocks.regions.values() for name in region}
    found = []
    for name, parameter in network.named_parameters():
        readers = readers_of(network, name)
        if parameter.dim() > 1 and not any(r.name in inside for r in readers):
            found += [] if named & known_by(network.tied_names(name), readers) else [Skipped(name, "it is in no block")]
    return found
