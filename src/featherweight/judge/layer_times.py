"""Single layers in a runtime: built, exported, timed side by side, and what was measured kept in a file."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.axes.rules.weights import whole_groups
from featherweight.deploy import Target
from featherweight.deploy import target as target_named
from featherweight.judge.figures import Figures, place
from featherweight.judge.time_them import own
from featherweight.measure.timing import side_by_side
from featherweight.network import Network, capture

#: seconds that each layer at each width is run for
SECONDS = 0.02
#: the input of the network that computes next to nothing
SMALL = (1, 8)
#: in the names of figures: less what a call of nothing takes
NET = "net "


@dataclass(frozen=True)
class TimedLayer:
    """One convolution or linear call by itself: what it takes to build it.

    options: its arguments after the bias (a linear call has none). size: its input's shape without the channels and,
    for a convolution, without the batch. turned: it reads its weight, [i, o], turned around. then: the calls behind it,
    each of the one before, where a chain is timed as one: alone, each would be brought into a runtime's own layout.
    """

    operator: str
    weight: tuple[int, ...]
    size: tuple[int, ...]
    bias: bool
    options: tuple[tuple[str, Any], ...] = ()
    turned: bool = False
    then: tuple[TimedLayer, ...] = ()

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
        then = [{"then": [json.loads(layer.key()) for layer in self.then]}] if self.then else []
        return json.dumps([self.operator, self.weight, self.size, self.bias, self.options, *turned, *then])


#: (layers of one kind at several widths, target's name, threads) -> seconds of each
Timer = Callable[[Sequence[TimedLayer], str, int], list[float]]


class One(nn.Module):
    """A layer alone, with random weights."""

    def __init__(self, layer: TimedLayer) -> None:
        super().__init__()
        self.call: Any = reduce(getattr, layer.operator.split("."), torch.ops)
        self.options, self.turned = dict(layer.options), layer.turned
        self.weight = nn.Parameter(torch.randn(layer.weight) * 0.05)
        self.bias = nn.Parameter(torch.zeros(layer.outputs())) if layer.bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.t() if self.turned else self.weight
        made: Tensor = self.call(x, weight, self.bias, **self.options)
        return made


class Nothing(nn.Module):
    """Next to nothing: what a runtime takes for it, it takes to be called."""

    def forward(self, x: Tensor) -> Tensor:
        return -x


def exported(layer: TimedLayer | None, runtime: Target, file: Path) -> Network:
    """The layer alone as a network, written to ``file``; None: next to nothing, of an input ``SMALL``."""
    model: nn.Module = Nothing() if layer is None else nn.Sequential(*map(One, (layer, *layer.then)))
    network = capture(model.eval(), torch.zeros((2, *SMALL[1:]) if layer is None else layer.input(2)))
    assert isinstance(network, Network)
    runtime.export(network, file)
    return network


def time_all(layers: Sequence[TimedLayer], target: str, threads: int) -> list[float]:
    """The least seconds of one call of each layer, in interleaved rounds, batch of one: other processes only ever add,
    and to a long call more often than to a short one. What a call of nothing takes is taken off, as in a network it is
    paid once."""
    runtime, runners, calls = target_named(target), [], {}
    with tempfile.TemporaryDirectory() as folder:
        for i, layer in enumerate((*layers, None)):
            file = Path(folder) / f"{i}{runtime.suffix}"
            network = exported(layer, runtime, file)
            runner = runtime.load(file, threads, like=network.signature)
            runners.append(runner)
            x = torch.randn(SMALL if layer is None else layer.input(1))
            calls[str(i)] = lambda runner=runner, x=x: runner(x)
        found = side_by_side(calls, seconds=SECONDS * len(calls), threads=threads)
        for runner in runners:
            runner.close()
    *least, nothing = (min(found.seconds[str(i)]) for i in range(len(calls)))
    return [own(seconds, nothing) for seconds in least]


class Times:
    """Seconds by machine, runtime, threads and layer, kept in a JSON file as they are taken."""

    def __init__(self, path: Path, target: str, threads: int, timer: Timer) -> None:
        self.target, self.threads, self.timer = target, threads, timer
        self.figures, self.prefix = Figures(path), f"{place(target, threads)}{NET}"

    def times(self, layers: Sequence[TimedLayer]) -> list[float]:
        """Seconds of each layer; what is not known yet is measured together, and kept at once."""
        keys = [self.prefix + layer.key() for layer in layers]
        missing = {k: layer for k, layer in zip(keys, layers, strict=True) if k not in self.figures.known}
        if missing:
            taken = self.timer(list(missing.values()), self.target, self.threads)
            self.figures.add(dict(zip(missing, taken, strict=True)))
        return [self.figures.known[k] for k in keys]

    def settled(self) -> None:
        """All that was asked for is known."""
