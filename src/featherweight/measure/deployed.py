"""``measure``: one network as it would ship, in figures. What is reported was exported, run and scored."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from featherweight import deploy
from featherweight.codec import archive_bytes
from featherweight.deploy import Agreement, Runner, Target
from featherweight.deploy.profile import PROFILERS, KernelTime
from featherweight.errors import TaskError
from featherweight.measure.macs import macs
from featherweight.measure.measurement import Measurement
from featherweight.measure.memory import peak_memory
from featherweight.measure.timing import Timed, side_by_side
from featherweight.measure.weights import nonzeros, params
from featherweight.network import Network, trees
from featherweight.task import Inputs, Task, told

#: most samples of a split on which the deployed file is compared with PyTorch
COMPARED = 64
#: gives what was found under a name before, or makes it (plain data of JSON)
Kept = Callable[[str, Callable[[], Any]], Any]


@dataclass(frozen=True)
class Deployed:
    """A network and its file in ``folder``, whose figures are taken one by one, so that a job may keep each."""

    network: Network
    task: Task
    target: Target
    folder: Path
    threads: int = 1

    @property
    def file(self) -> Path:
        """The deployed file."""
        return self.folder / f"model{self.target.suffix}"

    def save(self) -> int:
        """Writes ``network.fw``; its bytes."""
        return self.network.save(self.folder / "network.fw")

    def export(self) -> int:
        """Writes the deployed file, and what lies beside it; the bytes of both."""
        return self.target.export(self.network, self.file)

    @contextmanager
    def running(self) -> Iterator[Runner]:
        """The deployed file, loaded."""
        runner = self.target.load(self.file, self.threads, like=self.network.signature)
        try:
            yield runner
        finally:
            runner.close()

    def score(self, runner: Runner, split: str) -> float | None:
        """The score of the deployed file on ``split``; None where the task lacks one of them. Raises TaskError for a
        score that is no finite number."""
        if self.task.score is None or not self.task.has(split):
            return None
        score = float(told(self.task).score(runner, self.task.batches(split)))  # type: ignore[misc]
        if not math.isfinite(score):
            raise TaskError(f"your score gave {score} on the {split} split; expected a finite number, higher is "
                            "better: look at the network's outputs there, and at a division by a count of zero")
        return score

    def measurement(self, runner: Runner, split: str, step: str, network_bytes: int, file_bytes: int, *, archive: bool,
                    memory: bool, kept: Kept = lambda name, make: make()) -> Measurement:
        """All figures but latencies."""
        sample = sample_inputs(self.network, self.task, split)
        agreement = kept("agreement", lambda: dataclasses.asdict(deploy.verify(self.network, runner, *sample)))
        score = kept("score", lambda: self.score(runner, split))
        counted = macs(self.network)
        return Measurement(
            step=step, params=params(self.network), nonzeros=nonzeros(self.network), macs=counted.total,
            uncounted=counted.uncounted, network_bytes=network_bytes, file_bytes=file_bytes, target=self.target.name,
            archive_bytes=kept("archive_bytes", lambda: int(archive_bytes(self.network))) if archive else None,
            memory_bytes=kept("memory_bytes", self._memory) if memory else None, score=score,
            score_name=self.task.score_name, split=split if score is not None else None,
            agreement=Agreement(**agreement))

    def _memory(self) -> int | None:
        return peak_memory(self.target.name, self.file, self.folder / "network.fw", self.threads)

    def profiled(self, split: str, seconds: float) -> tuple[KernelTime, ...]:
        """The runtime's own times of the file's kernels, at the batch of ``timed``; none of a target without."""
        if self.target.name not in PROFILERS:
            return ()
        args, kwargs = _cut(self.network, *sample_inputs(self.network, self.task, split), 1)
        return PROFILERS[self.target.name](self.file, self.network.signature, args, kwargs, self.threads, seconds)

    def timed(self, runner: Runner, split: str, beside: Mapping[str, Path], seconds: float,
              progress: Callable[[float], None] | None = None) -> Timed:
        """Latency at batch one (at the fixed batch where there is one) of the runner, named "", and of the files beside
        it, in the same rounds."""
        args, kwargs = _cut(self.network, *sample_inputs(self.network, self.task, split), 1)
        with ExitStack() as stack:
            runners = {"": runner}
            for name, path in beside.items():
                runners[name] = self.target.load(path, self.threads, like=self.network.signature)
                stack.callback(runners[name].close)
            return side_by_side({name: partial(r, *args, **kwargs) for name, r in runners.items()},
                                seconds=seconds * len(runners), threads=self.threads, batch=_batch(self.network),
                                runtime=self.target.name, versions=runner.versions, precision=runner.precision,
                                progress=progress)


def measure(network: Network, task: Task, target: str | Target = "onnxruntime", split: str = "validation",
            step: str = "", workdir: Path | None = None, threads: int = 1, beside: Mapping[str, Path] | None = None, *,
            archive: bool = False, memory: bool = False, seconds: float = 1.0) -> Measurement:
    """Exports ``network``, runs, compares, times and scores the file, and counts what is in it.

    target: a runtime by name, or the target itself. split: the split that is scored; no score where the task lacks it.
    workdir: where ``network.fw`` and ``model`` + the target's suffix are left; None leaves nothing behind.
    threads: of the runtime. beside: name -> earlier deployed file of the same signature, timed in the same rounds.
    archive: also pack the network. memory: also measure peak memory, in a process of its own (takes some seconds).
    seconds: how long to time, for every file. Raises ExportError where the network cannot be exported or run.

    Example:
        >>> measured = fw.measure.measure(network, task, "onnxruntime", split="test", seconds=0.01)
        >>> measured.macs, measured.score_name
        (78592, 'top-1 %')
    """
    if workdir is None:
        with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
            return measure(network, task, target, split, step, Path(folder), threads, beside, archive=archive,
                           memory=memory, seconds=seconds)
    runtime = deploy.target(target) if isinstance(target, str) else target
    deployed = Deployed(network, task, runtime, Path(workdir), threads)
    deployed.folder.mkdir(parents=True, exist_ok=True)
    sizes = deployed.save(), deployed.export()
    with deployed.running() as runner:
        found = deployed.measurement(runner, split, step, *sizes, archive=archive, memory=memory)
        timed = deployed.timed(runner, split, beside or {}, seconds)
    others = {name: latency for name, latency in timed.latencies.items() if name}
    return dataclasses.replace(found, latency=timed.latencies[""], beside=others,
                               ratios={name: timed.ratio(name, "") for name in others})


def sample_inputs(network: Network, task: Task, split: str = "validation",
                  limit: int = COMPARED) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` with at most ``limit`` real samples of the split; made-up ones where there is no split, or
    where the network's batch is fixed and the split's first batch has another size.

    Example:
        >>> args, kwargs = fw.measure.sample_inputs(network, task, limit=5)
        >>> args[0].shape
        torch.Size([5, 1, 8, 8])
    """
    if task.has(split):
        for inputs, _ in task.batches(split, limit=1):
            return _cut(network, *as_call(inputs), limit)
    return network.example_inputs(batch=2)


def as_call(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs of one batch as ``(args, kwargs)``.

    Example:
        >>> fw.measure.as_call((1, 2)), fw.measure.as_call({"x": 1})
        (((1, 2), {}), ((), {'x': 1}))
    """
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return tuple(inputs), {}


def _cut(network: Network, args: tuple[Any, ...], kwargs: dict[str, Any],
         limit: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first ``limit`` samples of a batch; all of it where the network's batch is fixed."""
    leaves, spec = trees.flatten((args, kwargs))
    tensors = [i for i in range(len(leaves)) if i not in network.signature.constants]
    for item, index in zip(network.signature.inputs, tensors, strict=False):
        if item.batched and isinstance(leaves[index], Tensor):
            leaves[index] = leaves[index][:limit]
    cut: tuple[tuple[Any, ...], dict[str, Any]] = trees.unflatten(leaves, spec)
    return cut


def _batch(network: Network) -> int:
    """The batch size that is timed."""
    shapes = [] if network.signature.dynamic_batch else [i.shape for i in network.signature.inputs if i.shape]
    return int(shapes[0][0] or 1) if shapes else 1
