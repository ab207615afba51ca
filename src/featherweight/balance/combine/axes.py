"""The families as axes of the search: each offers its step at several amounts, from little to much.

Within one amount the family's own step decides what every layer gets; the search weighs the families against one
another. A family of one's own enters itself into ``AXES`` with one row.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featherweight.axes.blocks import droppable
from featherweight.balance.mixed import Mixed
from featherweight.factorize import LowRank
from featherweight.network import Network
from featherweight.prune import Channels, Layers, Weights
from featherweight.quantize import Quantize
from featherweight.recover import Train
from featherweight.share import Codebook, Vectors
from featherweight.steps import Rewrite, Stage, Step

#: figure of a budget -> what steps that cut count in, the first that is asked for
UNITS = {"latency": "latency", "macs": "macs", "file_bytes": "bytes", "archive_bytes": "bytes", "memory": "bytes"}
#: what is written for it
NOUNS = {"latency": "of the calls' latency", "macs": "MACs", "bytes": "bytes"}
#: shares of what is counted that stay
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
#: blocks that are dropped at most, as a share of all, and in how many amounts
DROPPED, AMOUNTS = 0.5, 6
SPARSITIES = (0.4, 0.55, 0.7, 0.8, 0.9)
#: shares of the bytes that layers of 8 and of 4 bits keep, between those of either alone
MIXED = (0.22, 0.19, 0.16)
#: bits of the index, and the price of a bit of the archive
BOOKS = ((5, 0.002), (4, 0.003), (3, 0.01), (3, 0.05), (2, 0.01))
EVERYWHERE = frozenset({"latency", "file_bytes", "archive_bytes", "macs", "memory"})


@dataclass(frozen=True)
class Amount:
    """A step at one amount. text: in few words. position: how far it goes, for the surrogate; 0 would be nothing.
    beside: what does the same during a training, where there is one. behind: what follows at the end."""

    text: str
    position: float
    step: Rewrite
    beside: Rewrite | None = None
    behind: tuple[Rewrite, ...] = ()


@dataclass(frozen=True)
class Axis:
    """offers: what there is for a network, from little to much, where "latency", "macs" or "bytes" count. lowers: the
    figures that it may lower."""

    offers: Callable[[Network, str], Sequence[Amount]]
    lowers: Collection[str]


def _channels(network: Network, counted: str) -> list[Amount]:
    return _shares(counted, lambda kept: Channels(
        score="reconstruction", allocation="sensitivity", compensate="least_squares", **kept))


def _low_rank(network: Network, counted: str) -> list[Amount]:
    return _shares(counted, lambda kept: LowRank(form="auto", data=True, **kept))


def _shares(counted: str, step: Callable[[dict[str, Any]], Rewrite]) -> list[Amount]:
    return [Amount(f"{share:.0%} {NOUNS[counted]}", -math.log2(share), step({counted: share})) for share in SHARES]


def _depth(network: Network, counted: str) -> list[Amount]:
    blocks = len(droppable(network).found)
    counts = sorted({math.ceil(DROPPED * blocks * i / AMOUNTS) for i in range(1, AMOUNTS + 1)}) if blocks > 1 else []
    return [Amount(f"{count} of {blocks} blocks dropped", -math.log2(1 - count / (blocks + 1)),
                  Layers(count=count, per="macs")) for count in counts]


def _weights(network: Network, counted: str) -> list[Amount]:
    return [Amount(f"{zeros:.0%} zeros", -math.log2(1 - zeros), Weights(sparsity=zeros, score="obs", compensate="obs"),
                   Weights(sparsity=zeros, end=0.6)) for zeros in SPARSITIES]


def _integers(network: Network, counted: str) -> list[Amount]:
    mixed = [Amount(f"int8 and int4, {share:.0%} bytes", -math.log2(2 * share),
                    Mixed(bytes=share, kinds=("int8", "int4"))) for share in MIXED]
    return [Amount("int8", 1.0, Quantize()), *(mixed if counted == "bytes" else ())]


def _codebooks(network: Network, counted: str) -> list[Amount]:
    return [Amount(f"{2**bits} entries, {rate} a bit", float(number), Codebook(
        bits=bits, rate=rate, compensate="obs", min_size=256, fold_batch_norm=True), behind=(Vectors(),))
        for number, (bits, rate) in enumerate(BOOKS, 1)]


#: name -> axis, in the order in which their steps are applied
AXES: dict[str, Axis] = {
    "depth": Axis(_depth, EVERYWHERE),
    "channels": Axis(_channels, EVERYWHERE),
    "low rank": Axis(_low_rank, EVERYWHERE),
    "zeros": Axis(_weights, {"archive_bytes"}),
    "integers": Axis(_integers, EVERYWHERE - {"macs"}),
    "codebooks": Axis(_codebooks, {"file_bytes", "archive_bytes"}),
}

#: for each axis of a ``Space`` the number of its offer, from 1 on; 0: the axis is left out
Picks = tuple[int, ...]


@dataclass(frozen=True)
class Space:
    """The axes that can help, each with its offers."""

    names: tuple[str, ...]
    offers: tuple[tuple[Amount, ...], ...]

    @classmethod
    def of(cls, network: Network, wanted: Collection[str], families: Collection[str],
           times: str | None = None) -> Space:
        """The ``families`` (names in ``AXES``) that may lower one of the figures ``wanted`` and offer something. times:
        the folder of another device, whose latencies steps count."""
        counted = next((unit for figure, unit in UNITS.items() if figure in wanted), "macs")
        axes = {name: axis for name, axis in AXES.items() if name in families and set(axis.lowers) & set(wanted)}
        offers = {name: axis.offers(network, counted) for name, axis in axes.items()}
        found = {name: tuple(_on(offer, times) for offer in mine) for name, mine in offers.items() if mine}
        return cls(tuple(found), tuple(found.values()))

    def chosen(self, picks: Picks) -> dict[str, Amount]:
        """Name of axis -> offer, where one is taken."""
        return {name: offers[pick - 1] for name, offers, pick in zip(self.names, self.offers, picks, strict=True)
                if pick}

    def steps(self, picks: Picks, training: Train | None = None) -> tuple[Step, ...]:
        """The steps in the order of their stages, the ``training`` after what cuts, and with what can work beside it;
        without a cut there is none."""
        offers = sorted(self.chosen(picks).values(), key=lambda offer: offer.step.stage)
        behind = tuple(step for offer in offers for step in offer.behind)
        if training is None:
            return (*(offer.step for offer in offers), *behind)
        beside = [offer.beside for offer in offers if offer.beside is not None]
        own = [offer.step for offer in offers if offer.beside is None]
        cut = sum(step.stage < Stage.PRECISION for step in own)
        if not (cut or beside):
            return (*own, *behind)
        return (*own[:cut], dataclasses.replace(training, beside=(*training.beside, *beside)), *own[cut:], *behind)

    def alone(self, axis: int, pick: int) -> Picks:
        """One offer of one axis, and nothing else."""
        return tuple(pick if i == axis else 0 for i in range(len(self.names)))

    def positions(self, picks: Sequence[Picks]) -> npt.NDArray[np.float64]:
        """[n, axes]."""
        places = [np.array([0.0, *(offer.position for offer in offers)]) for offers in self.offers]
        given = np.asarray(picks, dtype=np.int64).reshape(len(picks), len(self.names))
        found: npt.NDArray[np.float64] = np.zeros(given.shape)
        for i, place in enumerate(places):
            found[:, i] = place[given[:, i]]
        return found

    def all(self) -> list[Picks]:
        """Every combination, at most one of them storing numbers in another form."""
        precise = [i for i, offers in enumerate(self.offers) if offers[0].step.stage == Stage.PRECISION]
        return [picks for picks in itertools.product(*(range(len(offers) + 1) for offers in self.offers))
                if sum(picks[i] > 0 for i in precise) < 2]


def _on(offer: Amount, times: str | None) -> Amount:
    step = offer.step
    if times is None or not isinstance(step, (Channels, LowRank)) or step.latency is None:
        return offer
    return dataclasses.replace(offer, step=dataclasses.replace(step, times=times))


def told(chosen: Mapping[str, Amount]) -> str:
    """A combination in words."""
    return " + ".join(f"{name} ({offer.text})" for name, offer in chosen.items()) or "nothing"


__all__ = ["AXES", "Amount", "Axis", "Picks", "Space", "told"]
