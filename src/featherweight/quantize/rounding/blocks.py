"""Blocks of layers rounded together, so that errors within a block may cancel.

Li et al. 2021, "BRECQ: pushing the limit of post-training quantization by block reconstruction": the rounding variables
of AdaRound, for the squared error at the end of a residual block. Wei et al. 2022, "QDrop: randomly dropping
quantization for extremely low-bit post-training quantization": where activations have few bits, the rounding of each
number is left out at random, and their step sizes are learned along (Esser et al. 2020). Here the two levels that a
weight chooses from are those around what it was to be when GPTQ rounded it, and it starts near to what GPTQ chose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.calibrate.walk import run
from featherweight.network import Network
from featherweight.network.matrices import from_matrix
from featherweight.numerics.adaround import Schedule, Soft, decide
from featherweight.quantize.rounding.layerwise import RoundedLayer, one_by_one, swept
from featherweight.quantize.rounding.regions import Region, blocks
from featherweight.quantize.rounding.state import Rounding
from featherweight.quantize.training.quantizers import Lsq
from featherweight.quantize.training.rounded_once import rounded_once
from featherweight.seeds import seed_from

SCHEDULE = Schedule(iterations=500)
LEAN = 0.7  #: how far rounding starts from undecided towards what GPTQ found
SAMPLES = 32  #: of a step
DROP = 0.5  #: share of the numbers whose rounding is left out in a step
VALUE_RATE = 1e-3  #: step size of the scales of activations, relative to them


@dataclass(frozen=True)
class TunedBlock:
    """A region's samples at its entries and its end, and what is learned in it.

    given, unrounded: activations at the entries, by name, in the rounded and (where roundings are dropped) in the float
    network. wanted: the float network's activation at the end. softs: by weight's name, the rounding that is learned.
    rounds: what rounds activations inside, by name of the copy; learned: those of them whose scale is learned.
    """

    network: Network
    region: Region
    given: Mapping[str, Tensor]
    unrounded: Mapping[str, Tensor]
    wanted: Tensor
    softs: Mapping[str, Soft]
    rounds: Mapping[str, Lsq]
    learned: Mapping[str, Lsq]
    drops: bool
    generator: torch.Generator

    @classmethod
    def of(cls, work: Rounding, region: Region, aims: Mapping[str, Tensor]) -> TunedBlock:
        """Both networks are at the region's entries; the float one goes past its end."""
        whole, rounded, points = work.pair.whole, work.pair.compressed, work.points
        inside = {n.name: points[n.name] for n in region.nodes if n.name in points}
        drops = any(p.spec.bits < 8 for p in inside.values())
        given = {n: torch.cat(rounded.gave(n)) for n in region.entries}
        before = {n: torch.cat(whole.gave(n)) for n in region.entries if drops}
        whole.keep([region.end.name])
        whole.go_past(region.end.name)
        wanted = torch.cat(whole.gave(region.end.name))
        whole.release([region.end.name])
        softs = {name: Soft(aim, work.grids[name].scale, work.grids[name].spec, work.grids[name].kept, LEAN)
                 for name, aim in aims.items()}
        once = {name: inside[name] for name in rounded_once(rounded.network, inside)}
        rounds = {name: Lsq(p.spec, torch.tensor(p.scale, device=wanted.device), p.zero_point, values=True)
                  for name, p in once.items()}
        grids = Counter((p.scale, p.zero_point, p.kind) for p in points.values())
        learned = {name: rounds[name] for name, p in once.items()
                   if drops and grids[p.scale, p.zero_point, p.kind] == 1}  # those that share a grid keep it
        return cls(rounded.network, region, given, before, wanted, softs, rounds, learned, drops,
                   torch.Generator().manual_seed(seed_from("blocks", *aims)))

    def made(self, values: dict[str, Any], weights: Mapping[str, Tensor],
             taps: Mapping[str, Callable[[Any], Any]]) -> Tensor:
        """The activation at the end, out of those at the entries."""
        def tensor(name: str) -> Tensor:
            return weights[name] if name in weights else self.network.tensor(name).detach()

        run(self.region.nodes, values, tensor, taps)
        end: Tensor = values[self.region.end.name]
        return end

    def mixed(self, kept: Tensor, other: Tensor) -> Tensor:
        """``other`` at a random share of the places."""
        drawn = torch.rand(kept.shape, generator=self.generator).to(kept.device) < DROP
        return torch.where(drawn, other, kept)

    def dropped(self) -> dict[str, Callable[[Any], Any]]:
        """Taps during a step: gradients pass the rounding of the activations."""
        def tap(rounds: Lsq) -> Callable[[Any], Any]:
            return (lambda value: self.mixed(rounds(value), value)) if self.drops else rounds

        return {name: tap(rounds) for name, rounds in self.rounds.items()}

    def whole_error(self, weights: Mapping[str, Tensor], taps: Mapping[str, Callable[[Any], Any]]) -> float:
        """Mean squared error at the end, over all samples."""
        total, size = 0.0, 4 * SAMPLES
        with torch.no_grad():
            for start in range(0, len(self.wanted), size):
                values = {n: v[start:start + size] for n, v in self.given.items()}
                made = self.made(values, weights, taps)
                total += float((made - self.wanted[start:start + size]).square().sum(dtype=torch.float64))
        return total / self.wanted.numel()


def started(work: Rounding, region: Region) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By weight's name, what GPTQ finds for the layers of a region one by one; and what the weights were to be."""
    aims = {}

    def fit(layer: RoundedLayer, x: Tensor, z: Tensor) -> Tensor:
        value, aim = swept(layer, x, z)
        aims[layer.name] = from_matrix(layer.node, aim, layer.weight.shape)
        return value

    return one_by_one(work, region.layers, work.pair.ahead(), fit), aims


def learned(work: Rounding, region: Region) -> dict[str, Tensor]:
    """The values of a region's weights, rounded down or up together; scales of activations are learned along. Never
    worse on all samples than rounding layer by layer with GPTQ."""
    start, aims = started(work, region)
    taps = work.pair.compressed.taps
    block = TunedBlock.of(work, region, aims)
    base = block.whole_error(start, taps)
    if not base > 0:
        return start
    dropped = block.dropped()

    def error(values: list[Tensor]) -> Tensor:
        index = torch.randint(len(block.wanted), (SAMPLES,), generator=block.generator).to(block.wanted.device)
        given = {n: v[index] for n, v in block.given.items()}
        if block.drops:
            given = {n: block.mixed(v, block.unrounded[n][index]) for n, v in given.items()}
        made = block.made(dict(given), dict(zip(block.softs, values, strict=True)), dropped)
        return (made - block.wanted[index]).square().mean() / base

    others = [(q.size, VALUE_RATE * float(q.start)) for q in block.learned.values()]
    with torch.enable_grad():
        decide(list(block.softs.values()), error, SCHEDULE, others)
    found = {name: soft.nearest() for name, soft in block.softs.items()}
    if block.whole_error(found, {**taps, **block.learned}) >= base:
        return start
    for name, quantizer in block.learned.items():
        work.learned(name, float(quantizer.scale(torch.empty(0))))
    return found


def reconstructed(work: Rounding) -> dict[str, Tensor]:
    """Region by region, each seeing those before it as they are rounded."""
    pair, found = work.pair, {}
    regions = blocks(work.whole, pair.whole.order, work.layers, work.points)
    for region in regions:
        pair.keep(region.entries)
    for region in regions:
        for name in region.entries:
            pair.go_past(name)
        for name, value in learned(work, region).items():
            pair.set(name, value)
            found[name] = value
        pair.release(region.entries)
    return found


__all__ = ["reconstructed"]
