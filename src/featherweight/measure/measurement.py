"""``measure``: one network as it would ship, in figures. What is reported was exported, run and scored."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from featherweight import deploy
from featherweight.codec import archive_bytes
from featherweight.deploy import Agreement, Runner, Target
from featherweight.errors import FileError
from featherweight.measure.macs import macs
from featherweight.measure.memory import peak_memory
from featherweight.measure.timing import Latency, interleave
from featherweight.measure.weights import nonzeros, params
from featherweight.network import Network, trees
from featherweight.task import Inputs, Task

#: most samples of a split on which the deployed file is compared with PyTorch
COMPARED = 64


@dataclass(frozen=True)
class Measurement:
    """One network after one step. None means: not measured.

    macs: per sample; a lower bound where ``uncounted`` is not empty. network_bytes: the ``.fw`` file. file_bytes: the
    deployed file. archive_bytes: the packed network. latency: of the deployed file at batch one. memory_bytes: growth
    of the peak resident set of a process that loads and runs it. score: of the deployed file on ``split``. agreement:
    deployed file against PyTorch. beside: latencies of other files timed in the same rounds, by name (in a job:
    "original", and "before" of the step before).

    Example:
        >>> measured = result.trail[0]                            # of what compress gave
        >>> measured.params, measured.macs, measured.target, measured.split
        (1516, 78592, 'onnxruntime', 'validation')
        >>> fw.measure.Measurement.from_dict(measured.to_dict()) == measured
        True
    """

    step: str
    params: int
    nonzeros: int
    macs: int
    uncounted: tuple[str, ...]
    network_bytes: int
    file_bytes: int
    target: str = ""
    archive_bytes: int | None = None
    latency: Latency | None = None
    memory_bytes: int | None = None
    score: float | None = None
    score_name: str = "score"
    split: str | None = None
    agreement: Agreement | None = None
    beside: Mapping[str, Latency] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return dataclasses.asdict(self) | {"uncounted": list(self.uncounted)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measurement:
        """What ``to_dict`` gave, also after JSON. Raises FileError for anything else."""
        try:
            found: Measurement = TypeAdapter(cls).validate_python(dict(values))
        except ValidationError as error:
            raise FileError(f"this is no measurement: {error}; expected what Measurement.to_dict gives") from error
        return found


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
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    runtime = deploy.target(target) if isinstance(target, str) else target
    network_file, file = workdir / "network.fw", workdir / f"model{runtime.suffix}"
    network_bytes = network.save(network_file)
    file_bytes = runtime.export(network, file)
    runner = runtime.load(file, threads, like=network.signature)
    try:
        sample = sample_inputs(network, task, split)
        agreement = deploy.verify(network, runner, *sample)
        latency, others = _time(network, runtime, runner, sample, threads, beside or {}, seconds)
        score = None
        if task.score is not None and task.has(split):
            score = float(task.score(runner, task.batches(split)))
    finally:
        runner.close()
    counted = macs(network)
    return Measurement(
        step=step, params=params(network), nonzeros=nonzeros(network), macs=counted.total, uncounted=counted.uncounted,
        network_bytes=network_bytes, file_bytes=file_bytes, target=runtime.name,
        archive_bytes=_archive_bytes(network) if archive else None, latency=latency,
        memory_bytes=peak_memory(runtime.name, file, network_file, threads) if memory else None,
        score=score, score_name=task.score_name, split=split if score is not None else None, agreement=agreement,
        beside=others)


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


def _time(network: Network, runtime: Target, runner: Runner, sample: tuple[tuple[Any, ...], dict[str, Any]],
          threads: int, beside: Mapping[str, Path], seconds: float) -> tuple[Latency, dict[str, Latency]]:
    """Latency at batch one (at the fixed batch where there is one) of the runner and of the files beside it."""
    args, kwargs = _cut(network, *sample, 1)
    batch = 1
    if not network.signature.dynamic_batch:
        shapes = [i.shape for i in network.signature.inputs if i.shape]
        batch = int(shapes[0][0] or 1) if shapes else 1
    own = "" if "" not in beside else "this"
    others = {name: runtime.load(path, threads, like=network.signature) for name, path in beside.items()}
    try:
        calls = {name: partial(r, *args, **kwargs) for name, r in {own: runner, **others}.items()}
        timed = interleave(calls, seconds=seconds * len(calls), threads=threads, batch=batch, runtime=runtime.name,
                           versions=runner.versions, precision=runner.precision)
    finally:
        for other in others.values():
            other.close()
    return timed.pop(own), timed


def _archive_bytes(network: Network) -> int:
    return int(archive_bytes(network))
