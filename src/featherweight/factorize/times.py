"""Measured seconds of layers and of the chains that they may become, from the shared table of layer latencies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from featherweight.factorize.layers import Factorable
from featherweight.judge.costs import alone
from featherweight.judge.elsewhere import TimesElsewhere, times_of
from featherweight.judge.layer_times import TimedLayer, Times
from featherweight.judge.widths import timed_chains, timed_layers
from featherweight.network import Network
from featherweight.numerics.factors.forms import Ranks

#: every how many ranks of a form are timed
APART = 3


@dataclass(frozen=True)
class LinkTimes:
    """Seconds of calls in a runtime, each call or chain alone at batch one, less what the runtime takes to be called;
    what it gains by fusing is not in them.

    every: all convolution and linear calls of the network that could be timed.
    """

    every: tuple[TimedLayer, ...]
    times: Times | TimesElsewhere
    known: dict[tuple[str, str, Ranks], float] = field(default_factory=dict)

    @classmethod
    def of(cls, network: Network, target: str, threads: int = 1, times: str | None = None) -> LinkTimes:
        """Of a network in ``target``; figures are kept in latency.json in $FEATHERWEIGHT_CACHE, else in
        ~/.cache/featherweight. times: the folder of another device, in the place of this machine."""
        layers, _ = timed_layers(network)
        return cls(tuple(layers.values()), times_of(target, threads, times))

    def total(self) -> float:
        """Seconds of all calls, as they are in the network."""
        return sum(self.times.times(self.every))

    def factorized(self, network: Network) -> float:
        """Seconds of all calls of a network whose layers became chains."""
        return sum(self.times.times(timed_chains(network)))

    def seconds(self, layer: Factorable, at: tuple[str, Ranks] | None) -> float:
        """Seconds of a layer's calls, whole (None) or as chains."""
        key = (layer.layer.weight, *(at or ("", ())))
        if key not in self.known:
            network = alone(layer.network, layer.layer.weight) if at is None else layer.split(*at)
            self.known[key] = sum(self.times.times(timed_chains(network)))
        return self.known[key]

    def along(self, layer: Factorable, form: str, ladder: Sequence[Ranks]) -> None:
        """Learns the seconds of one form at many ranks. Some are timed; what lies between is taken to lie on the lines
        between them, over the multiply-accumulates."""
        macs = {ranks: layer.cost(form, ranks).macs for ranks in ladder}
        ordered = sorted(macs, key=lambda ranks: macs[ranks])
        timed = {macs[ranks]: self.seconds(layer, (form, ranks)) for ranks in (*ordered[::APART], *ordered[-1:])}
        for ranks in ordered:
            known = float(np.interp(macs[ranks], list(timed), list(timed.values())))
            self.known.setdefault((layer.layer.weight, form, ranks), known)


__all__ = ["LinkTimes"]
