"""Single layers in a runtime: built, exported, timed side by side, and what was measured kept in a file."""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.axes.rules.weights import whole_groups
from featherweight.deploy import target as target_named
from featherweight.errors import FileError
from featherweight.files import written_whole
from featherweight.measure.timing import interleave
from featherweight.network import Network, capture

#: seconds that each layer at each width is run for
SECONDS = 0.02


@dataclass(frozen=True)
class TimedLayer:
    """One convolution or linear call by itself: what it takes to build it.

    options: its arguments after the bias (a linear call has none). size: its input's shape without the channels and,
    for a convolution, without the batch. turned: it reads its weight, [i, o], turned around.
    """

    operator: str
    weight: tuple[int, ...]
    size: tuple[int, ...]
    bias: bool
    options: tuple[tuple[str, Any], ...] = ()
    turned: bool = False

    @property
    def inputs_first(self) -> bool:
        return self.turned or "transpose" in self.operator

    @property
    def groups(self) -> int:
        return int(dict(self.options).get("groups", 1))

    def at(self, widths: Mapping[int, int]) -> TimedLayer:
        """The same call with other lengths of its weight's axes; a grouped one that loses whole groups has fewer."""
        shape = tuple(widths.get(d, s) for d, s in enumerate(self.weight))
        options = dict(self.options)
        if self.groups > 1 and not self.keeps_groups():
            options["groups"] = max(1, self.groups * shape[0] // self.weight[0])
        return replace(self, weight=shape, options=tuple(options.items()))

    def keeps_groups(self) -> bool:
        """Whether a cut leaves every group some positions, rather than taking whole groups."""
        return self.groups > 1 and not whole_groups(self.channels(), self.groups)

    def channels(self) -> int:
        """Channels of the input."""
        return self.weight[0] if self.inputs_first else self.weight[1] * self.groups

    def outputs(self) -> int:
        """Channels of the output."""
        return self.weight[1] * self.groups if self.inputs_first else self.weight[0]

    def input(self, batch: int) -> tuple[int, ...]:
        """The shape of an input for ``batch`` samples."""
        if self.options:
            return (batch, self.channels(), *self.size)
        return (batch, *self.size[1:], self.channels())

    def key(self) -> str:
        turned = ["turned"] if self.turned else []
        return json.dumps([self.operator, self.weight, self.size, self.bias, self.options, *turned])


#: (layers of one kind at several widths, target's name, threads) -> seconds of each
Timer = Callable[[Sequence[TimedLayer], str, int], list[float]]


class One(nn.Module):
    """A layer alone, with random weights."""

    def __init__(self, layer: TimedLayer) -> None:
        super().__init__()
        self.call: Any = reduce(getattr, layer.operator.split("."), torch.ops)  # type: ignore[arg-type]
        self.options, self.turned = dict(layer.options), layer.turned
        self.weight = nn.Parameter(torch.randn(layer.weight) * 0.05)
        self.bias = nn.Parameter(torch.zeros(layer.outputs())) if layer.bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.t() if self.turned else self.weight
        made: Tensor = self.call(x, weight, self.bias, **self.options)
        return made


def time_all(layers: Sequence[TimedLayer], target: str, threads: int) -> list[float]:
    """Median seconds of one call of each layer, in interleaved rounds, batch of one."""
    runtime, runners, calls = target_named(target), [], {}
    with tempfile.TemporaryDirectory() as folder:
        for i, layer in enumerate(layers):
            network = capture(One(layer).eval(), torch.zeros(layer.input(2)))
            assert isinstance(network, Network)
            file = Path(folder) / f"{i}{runtime.suffix}"
            runtime.export(network, file)
            runner = runtime.load(file, threads, like=network.signature)
            runners.append(runner)
            x = torch.randn(layer.input(1))
            calls[str(i)] = lambda runner=runner, x=x: runner(x)
        found = interleave(calls, seconds=SECONDS * len(layers), threads=threads)
        for runner in runners:
            runner.close()
    return [found[str(i)].median_s for i in range(len(layers))]


class Times:
    """Seconds by machine, runtime, threads and layer, kept in a JSON file."""

    def __init__(self, path: Path, target: str, threads: int, timer: Timer) -> None:
        self.path, self.target, self.threads, self.timer = path, target, threads, timer
        self.new: dict[str, float] = {}
        self.known = self._held()
        package = target_named(target).package
        self.prefix = f"{_machine()} {package} {metadata.version(package)} threads={threads} "

    def times(self, layers: Sequence[TimedLayer]) -> list[float]:
        keys = [self.prefix + layer.key() for layer in layers]
        missing = {k: layer for k, layer in zip(keys, layers, strict=True) if k not in self.known}
        if missing:
            self.new |= dict(zip(missing, self.timer(list(missing.values()), self.target, self.threads), strict=True))
            self.known |= self.new
        return [self.known[k] for k in keys]

    def save(self) -> None:
        """Adds what is new to what the file holds by now."""
        if not self.new:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        held = self._held()
        with written_whole(self.path) as part:
            part.write_text(json.dumps(held | self.new, indent=0))

    def _held(self) -> dict[str, float]:
        if not self.path.exists():
            return {}
        try:
            return {str(k): float(v) for k, v in json.loads(self.path.read_text()).items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise FileError(f"{self.path} is no table of latencies: {error}; remove it to have them measured again") \
                from error


def _machine() -> str:
    """What kind of processor this is."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()} {models[0] if models else platform.processor()}".strip()
