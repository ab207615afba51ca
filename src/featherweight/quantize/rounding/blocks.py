"""Blocks of layers rounded together, so that errors within a block may cancel.

Li et al. 2021, "BRECQ: pushing the limit of post-training quantization by block reconstruction": the rounding variables
of AdaRound, for the squared error at the end of a residual block. Wei et al. 2022, "QDrop: randomly dropping
quantization for extremely low-bit post-training quantization": while values have few bits, the rounding of every number
is left out at random, and step sizes of values are learned along (Esser et al. 2020). Here the two levels that a weight
chooses from are those around what it was to be when GPTQ rounded it, and it starts near to what GPTQ chose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from featherweight.calibrate.walk import run
from featherweight.network.matrices import from_matrix
from featherweight.numerics.adaround import Schedule, Soft, decide
from featherweight.quantize.rounding.layerwise import RoundedLayer, pool, swept
from featherweight.quantize.rounding.regions import Region, blocks
from featherweight.quantize.rounding.state import Walk, advance
from featherweight.quantize.training.quantizers import Lsq
from featherweight.quantize.training.rounded_once import rounded_once
from featherweight.seeds import seed_from

SCHEDULE = Schedule(iterations=500)
LEAN = 0.7  #: how far rounding starts from undecided towards what GPTQ found
SAMPLES = 32  #: of a step
DROP = 0.5  #: share of the numbers whose rounding is left out in a step
VALUE_RATE = 1e-3  #: step size of the scales of values, relative to them


class TunedBlock:
    """A region's samples at its entries and its end, and what is learned in it."""

    def __init__(self, walk: Walk, region: Region, wanted: set[str], aims: Mapping[str, Tensor]) -> None:
        self.walk, self.region = walk, region
        names = region.entries
        self.given = {n: torch.cat([short.values[n] for _, short in walk.states]) for n in names}
        self.float = {n: torch.cat([whole.values[n] for whole, _ in walk.states]) for n in names}
        for whole, _ in walk.states:
            whole.advance(walk.order.number[region.end.name] + 1, wanted | {region.end.name})
        self.wanted = torch.cat([whole.values[region.end.name] for whole, _ in walk.states])
        self.softs = {name: Soft(aim, walk.grids[name].scale, walk.grids[name].spec, walk.grids[name].kept, LEAN)
                      for name, aim in aims.items()}
        self.generator = torch.Generator().manual_seed(seed_from("blocks", *aims))
        inside = {n.name: walk.points[n.name] for n in region.nodes if n.name in walk.points}
        once = {name: inside[name] for name in rounded_once(walk.short, inside)}
        self.rounds = {name: Lsq(p.spec, torch.tensor(p.scale, device=self.wanted.device), p.zero_point, values=True)
                       for name, p in once.items()}
        self.drops = any(p.spec.bits < 8 for p in inside.values())
        grids = Counter((p.scale, p.zero_point, p.kind) for p in walk.points.values())
        self.learned = {name: self.rounds[name] for name, p in once.items()
                        if self.drops and grids[p.scale, p.zero_point, p.kind] == 1}  # those that share a grid keep it

    def made(self, values: dict[str, Any], weights: Mapping[str, Tensor],
             taps: Mapping[str, Callable[[Any], Any]]) -> Tensor:
        def tensor(name: str) -> Tensor:
            return weights[name] if name in weights else self.walk.short.tensor(name).detach()

        run(self.region.nodes, values, tensor, taps)
        end: Tensor = values[self.region.end.name]
        return end

    def mixed(self, kept: Tensor, other: Tensor) -> Tensor:
        """``other`` at a random share of the places."""
        drawn = torch.rand(kept.shape, generator=self.generator).to(kept.device) < DROP
        return torch.where(drawn, other, kept)

    def dropped(self) -> dict[str, Callable[[Any], Any]]:
        """What points do during a step: gradients pass the rounding of their values."""
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


def started(walk: Walk, region: Region) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By weight's name, what GPTQ finds for the layers of a region one by one; and what the weights were to be."""
    found, aims = {}, {}
    states = walk.ahead()
    for layer in region.layers:
        site = RoundedLayer.of(walk, layer)
        advance(states, walk.order.number[site.node.name], set())
        value, aim = swept(site, *pool(site, states))
        found[site.name], aims[site.name] = site.put(value), from_matrix(site.node, aim, site.weight.shape)
        walk.set(site.name, found[site.name])
    return found, aims


def learned(walk: Walk, region: Region, wanted: set[str]) -> dict[str, Tensor]:
    """The values of a region's weights, rounded down or up together; scales of values are learned along. Never worse
    on all samples than rounding layer by layer with GPTQ."""
    start, aims = started(walk, region)
    block = TunedBlock(walk, region, wanted, aims)
    base = block.whole_error(start, walk.taps)
    if not base > 0:
        return start
    taps = block.dropped()

    def error(values: list[Tensor]) -> Tensor:
        index = torch.randint(len(block.wanted), (SAMPLES,), generator=block.generator).to(block.wanted.device)
        given = {n: v[index] for n, v in block.given.items()}
        if block.drops:
            given = {n: block.mixed(v, block.float[n][index]) for n, v in given.items()}
        made = block.made(dict(given), dict(zip(block.softs, values, strict=True)), taps)
        return (made - block.wanted[index]).square().mean() / base

    others = [(q.size, VALUE_RATE * float(q.start)) for q in block.learned.values()]
    with torch.enable_grad():
        decide(list(block.softs.values()), error, SCHEDULE, others)
    found = {name: soft.nearest() for name, soft in block.softs.items()}
    if block.whole_error(found, {**walk.taps, **block.learned}) >= base:
        return start
    for name, quantizer in block.learned.items():
        walk.learned(name, float(quantizer.scale(torch.empty(0))))
    return found


def reconstructed(walk: Walk) -> dict[str, Tensor]:
    """Region by region, each seeing those before it as they are rounded."""
    found: dict[str, Tensor] = {}
    regions = blocks(walk.whole, walk.order, walk.layers, walk.points)
    for index, region in enumerate(regions):
        wanted = {name for r in regions[index:] for name in r.entries}
        advance(walk.states, 1 + max(walk.order.number.get(name, -1) for name in region.entries), wanted)
        new = learned(walk, region, wanted)
        for name, value in new.items():
            walk.set(name, value)
        found |= new
        later = {name for r in regions[index + 1:] for name in r.entries}
        for half in (half for pair in walk.states for half in pair):
            for name in {*region.entries, region.end.name} - later:
                half.forget(name)
    return found


__all__ = ["reconstructed"]
