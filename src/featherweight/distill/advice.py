"""Which student meets a limit: MACs counted, latencies measured in the runtime that it will live in."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from featherweight import deploy
from featherweight.distill.student import Student
from featherweight.measure import interleave, macs
from featherweight.network import Network
from featherweight.task import Task


@dataclass(frozen=True)
class StudentSize:
    """A student that could be made: the step that makes it, its MACs a sample, and the median latency of one sample.

    Example:
        >>> size = fw.distill.students(network, widths=(0.5,), seconds=0.05)[0]
        >>> size.step, size.meets(latency_s=60.0)
        (Student(width=0.5, depth=1.0, weights='inherited', seed=0), True)
    """

    step: Student
    macs: int
    latency_s: float

    def meets(self, latency_s: float | None = None, macs: int | None = None) -> bool:
        """Whether it is within the limits."""
        return (latency_s is None or self.latency_s <= latency_s) and (macs is None or self.macs <= macs)

    def __str__(self) -> str:
        return (f"a student of {self.step.width:g} width and {self.step.depth:g} depth: {self.macs} MACs, "
                f"{1000 * self.latency_s:.3g} ms")


def students(network: Network, widths: Sequence[float] = (0.25, 0.5, 0.75), depths: Sequence[float] = (1.0,),
             target: str = "onnxruntime", seconds: float = 2.0, threads: int = 1) -> tuple[StudentSize, ...]:
    """Students of every width and depth, the largest first, timed side by side in ``target`` for ``seconds`` in all.

    Example:
        >>> sizes = fw.distill.students(network, widths=(0.25, 0.75), seconds=0.05)
        >>> [size.step.width for size in sizes]
        [0.75, 0.25]
        >>> print(next(size for size in sizes if size.meets(macs=10_000)))
        a student of 0.25 width and 1 depth: ... MACs, ... ms
    """
    runtime, task = deploy.target(target), Task()
    steps = [Student(width, depth) for width in widths for depth in depths]
    made = [step.plan(network, task).apply(network) for step in steps]
    with tempfile.TemporaryDirectory() as folder:
        runners = []
        try:
            for i, small in enumerate(made):
                file = Path(folder, f"{i}{runtime.suffix}")
                runtime.export(small, file)
                runners.append(runtime.load(file, threads, like=small.signature))
            args, kwargs = network.example_inputs(1)
            calls = {str(i): partial(runner, *args, **kwargs) for i, runner in enumerate(runners)}
            timed = interleave(calls, seconds=seconds, threads=threads, runtime=runtime.name)
        finally:
            for runner in runners:
                runner.close()
    sizes = [StudentSize(step, macs(small).total, timed[str(i)].median_s)
             for i, (step, small) in enumerate(zip(steps, made, strict=True))]
    return tuple(sorted(sizes, key=lambda size: -size.macs))
