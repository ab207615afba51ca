"""How the search grows: with layers, parameters and workers, from unit costs measured here.

    python benchmarks/search_scaling.py [solver] [units] [workers]

solver: processor seconds of the exact solvers (one budget, and two at once) by the number of layers. units: processor
seconds of each family's plan, of an export and of a score, on residual stacks of linear layers of several widths and
depths, and the exponents by which they grow. workers: the search as it is, on a stack of a billion parameters with
those costs, where a combination made ready takes what its steps take, on so many workers; only the clock is simulated
(what is tried, what is made ready ahead of time and for nothing, is the search's own). Rows go to
benchmarks/results/search_scaling.json.
"""

from __future__ import annotations

import heapq
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import Rows
from torch import nn

import featherweight as fw
from featherweight.balance.combine.axes import AXES, Picks, Space
from featherweight.balance.combine.seek import Seeker
from featherweight.balance.combine.trials import Trial, name_of
from featherweight.balance.combine.wanted import DROP, Wanted
from featherweight.balance.combine.watch import Watch
from featherweight.balance.combine.workers import EACH
from featherweight.numerics.budget import choose_jointly

SIZES = ((64, 2), (128, 2), (256, 2), (64, 4), (64, 8))
#: width and blocks of the stack that is simulated: 8 * 2048^2 * 30 = 1.007e9 parameters
LARGE = (2048, 30)
WORKERS = (1, 2, 4, 8, 16, 32, 64, 100)
TOKENS, SAMPLES = 8, 64
#: seconds that one combination and the original are timed for, beside one another
TIMED_S = 2.0
#: worlds that differ in what families save and cost
WORLDS = 5
LAYERS = (50, 100, 200, 400, 800, 1600, 3200, 6400)


class Block(nn.Module):
    """What is hidden is four times as wide (the halves of a transformer's parameters, and more)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class Stack(nn.Module):
    """Blocks, the mean over tokens, and a classifier."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(*(Block(width) for _ in range(blocks))), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.head(self.blocks(x).mean(1))
        return made


def made(width: int, blocks: int) -> tuple[fw.Network, fw.Task]:
    torch.manual_seed(0)
    network = fw.capture(Stack(width, blocks).eval(), torch.randn(2, TOKENS, width))
    batches = [(torch.randn(SAMPLES // 2, TOKENS, width), torch.arange(SAMPLES // 2) % 10) for _ in range(2)]
    assert isinstance(network, fw.Network)
    return network, fw.Task(calibration=batches, validation=batches, loss=nn.functional.cross_entropy,
                            score=fw.scores.top1)


def took(work: Callable[..., Any], *given: Any) -> float:
    began = time.process_time()
    work(*given)
    return time.process_time() - began


def rewritten(step: Any, network: fw.Network, task: fw.Task) -> fw.Network:
    changed: fw.Network = step.plan(network, task).apply(network)
    return changed


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def solver(rows: Rows) -> None:
    """Layers with a dozen options each, whose damages fall as their costs rise."""
    chance, found = np.random.default_rng(0), {}
    for budgets in (1, 2):
        seconds = []
        for layers in LAYERS:
            costs = [np.sort(chance.uniform(0.1, 1, (layers, 12)), 1) for _ in range(budgets)]
            harm = np.sort(chance.exponential(1, (layers, 12)), 1)[:, ::-1]
            given = [[list(map(float, row)) for row in table] for table in costs]
            limits = [0.5 * float(table.max(1).sum()) for table in costs]
            seconds.append(took(choose_jointly, harm.tolist(), given, limits))
            print(budgets, layers, seconds[-1], flush=True)
        found[f"budgets_{budgets}"] = {"seconds": seconds, "exponent": exponent(LAYERS, seconds)}
    rows.add("solver", {"layers": list(LAYERS), "options": 12, **found})


def units(rows: Rows) -> dict[str, tuple[float, float, float]]:
    """Name -> (a, p, q): processor seconds are a * width^p * blocks^q."""
    seconds: dict[str, list[float]] = {}
    for width, blocks in (SIZES[0], *SIZES):  # once before, as the first export loads much
        if len(seconds.get("export", ())) == 1 and (width, blocks) == SIZES[0]:
            seconds.clear()
        network, task = made(width, blocks)
        for name, axis in AXES.items():
            offers = axis.offers(network, "macs")
            if offers:
                step = offers[len(offers) // 2].step
                seconds.setdefault(name, []).append(took(rewritten, step, network, task))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            runtime = fw.deploy.target("onnxruntime")
            seconds.setdefault("export", []).append(took(runtime.export, network, file))
            runner = runtime.load(file, 1, like=network.signature)
            seconds.setdefault("score", []).append(took(fw.scores.top1, runner, task.batches("validation")))
            runner.close()
        print(width, blocks, {name: round(s[-1], 3) for name, s in seconds.items()}, flush=True)
    terms = np.array([[1.0, np.log(w), np.log(b)] for w, b in SIZES])
    fits = {name: np.linalg.lstsq(terms, np.log(taken), rcond=None)[0] for name, taken in seconds.items()
            if len(taken) == len(SIZES)}
    found = {name: (float(np.exp(a)), float(p), float(q)) for name, (a, p, q) in fits.items()}
    rows.add("units", {"sizes": [list(size) for size in SIZES], "seconds": seconds, "fits": found})
    return found


class Simulated:
    """Trials of a world in which costs multiply and drops add up but for chance, on a clock of its own."""

    def __init__(self, space: Space, costs: dict[str, tuple[float, float, float]], workers: int, seed: int) -> None:
        chance = np.random.default_rng(seed)
        self.space, self.workers, self.clock, self.worked = space, workers, 0.0, 0.0
        self.rate, self.hurt = chance.uniform(0.3, 1.0, len(space.names)), chance.uniform(0.05, 0.5, len(space.names))
        self.joint = chance.normal(0, 0.05, (len(space.names),) * 2)
        width, blocks = LARGE
        self.seconds = {name: a * width**p * blocks**q for name, (a, p, q) in costs.items()}
        self.ready: set[str] = set()
        self.asked: set[str] = set()
        self.picks = {name_of(space.steps(picks)): picks for picks in space.all()}

    def preparing(self, picks: Picks) -> float:
        return sum(self.seconds[name] for name in self.space.chosen(picks)) + self.seconds["export"] + \
            self.seconds["score"]

    def expect(self, many: Iterable[tuple[str, Sequence[Any]]], sure: bool) -> None:
        """As ``Trials.expect``: a batch is made ready where the first of it is not, and all wait for the last."""
        ahead = EACH * self.workers if self.workers > 1 and sure else 1
        batch = [name_of(steps) for _, steps in itertools.islice(many, ahead)]
        if batch[0] in self.ready:
            return
        batch = [name for name in batch if name not in self.ready]
        free = [self.clock] * self.workers
        for name in batch:
            took = self.preparing(self.picks[name])
            heapq.heappush(free, heapq.heappop(free) + took)
            self.worked += took
        self.clock, self.ready = max(free), self.ready | set(batch)

    def taken(self, what: str, steps: Sequence[Any]) -> Trial:
        picks = self.picks[name_of(steps)]
        self.clock += TIMED_S
        self.asked.add(name_of(steps))
        x = self.space.positions([picks])[0]
        drop = float((self.hurt * x**2).sum() + x @ self.joint @ x)
        return Trial(what, {"latency": float(np.exp(-(self.rate * x).sum()))}, max(drop, 0.0))


def workers(rows: Rows, costs: dict[str, tuple[float, float, float]]) -> None:
    network, _ = made(64, 8)
    space = Space.of(network, {"macs", "archive_bytes"}, [name for name in AXES if name in costs])
    found: dict[str, list[dict[str, Any]]] = {}
    for count, seed in itertools.product(WORKERS, range(WORLDS)):
        world = Simulated(space, costs, count, seed)
        seeker = Seeker(world, space, Wanted({DROP: 1.0}, "latency", 0.1), Watch(None), 200,  # type: ignore[arg-type]
                        lambda what, done: None, expect=world.expect)
        seeker.run()
        useful = sum(world.preparing(world.picks[name]) for name in world.asked)
        found.setdefault(str(count), []).append({
            "hours": world.clock / 3600, "trials": len(seeker.known), "ready": len(world.ready),
            "useful": useful / world.worked, "best": seeker.known[seeker.best].what})
        assert found[str(count)][seed]["best"] == found["1"][seed]["best"], "the answer depends on the workers"
    for count, worlds in found.items():
        print(count, {name: round(float(np.mean([w[name] for w in worlds])), 2) for name in worlds[0]
                      if name != "best"}, flush=True)
    rows.add("workers", {"width": LARGE[0], "blocks": LARGE[1], "families": list(space.names), "worlds": WORLDS,
                         "workers": found, "seconds": Simulated(space, costs, 1, 0).seconds})


def main() -> None:
    torch.set_num_threads(1)
    rows, asked = Rows("search_scaling.json"), sys.argv[1:] or ["solver", "units", "workers"]
    if "solver" in asked:
        solver(rows)
    costs = units(rows) if "units" in asked else {n: tuple(f) for n, f in rows["units"]["fits"].items()}
    if "workers" in asked:
        workers(rows, costs)


if __name__ == "__main__":
    main()
