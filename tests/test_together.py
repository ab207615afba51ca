"""Every two families, one after the other: the second plans on what the first left, whose promises stay."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import featherweight as fw
from featherweight.network.file.digest import digest
from featherweight.steps import Rewrite
from featherweight.task import call
from problems import PROBLEMS, network, task, tensors_of

#: one step of each family, with options under which small networks have something to do
FAMILIES: dict[str, Callable[[], Rewrite]] = {
    "channels": lambda: fw.prune.Channels(macs=0.7),
    "layers": lambda: fw.prune.Layers(count=1, score="norm"),
    "student": lambda: fw.distill.Student(width=0.75),
    "low rank": lambda: fw.factorize.LowRank(energy=0.6, min_gain=0.0),
    "low rank on data": lambda: fw.factorize.LowRank(params=0.8, form="auto", data=True, how="error"),
    "structured": lambda: fw.factorize.Structured("monarch", blocks=4),
    "compact": lambda: fw.factorize.Compact("ghost", data=True),
    "weights": lambda: fw.prune.Weights(sparsity=0.5),
    "transferred": lambda: fw.share.Transferred("flips", share=0.25),
    "codebook": lambda: fw.share.Codebook(bits=3, min_size=64),
    "hashed": lambda: fw.share.Hashed(share=0.25, min_size=64),
    "blocks": lambda: fw.share.BlockCodebook(size=4, bits=3, min_size=64),
    "quantized": lambda: fw.quantize.Quantize(ends=None),
    "quantized weights": lambda: fw.quantize.Quantize("int4", None, ends=None),
}
#: what may not follow: a network is quantized once, and zeros of the second sort would meet integers of the first
REFUSED = {("quantized", "quantized weights"), ("quantized weights", "quantized"),
           ("quantized", "quantized"), ("quantized weights", "quantized weights")}
USED = ("residual", "attention", "grouped")


def rows() -> list[Any]:
    """Every two whose stages follow one another; by default each family first and second a few times."""
    found = []
    for i, (a, b) in enumerate(itertools.product(FAMILIES, FAMILIES)):
        if FAMILIES[a]().stage <= FAMILIES[b]().stage and (a, b) not in REFUSED:
            for j, problem in enumerate(USED):
                slow = j > 0 or (i + i // len(FAMILIES)) % 6 > 0
                found.append(pytest.param(a, b, problem, marks=[pytest.mark.slow] * slow))
    return found


@pytest.mark.parametrize(("first", "second", "problem"), rows())
def test_two_families_one_after_the_other(first: str, second: str, problem: str, tmp_path: Path) -> None:
    row, data = PROBLEMS[problem], task(PROBLEMS[problem])
    whole = network(row)
    one = FAMILIES[first]().plan(whole, data)
    left = one.apply(whole)
    two = FAMILIES[second]().plan(left, data)
    both = two.apply(left)
    with torch.no_grad():
        outputs = [tensors_of(call(net, row.example(row.batch or 3, seed=5))) for net in (whole, both)]
    for before, after in zip(*outputs, strict=True):
        assert before.shape == after.shape
        assert bool(torch.isfinite(after).all())
    for name in set(left.patterns) & set(both.tensors()):  # zeros that the first step promised
        zero = left.tensor(name) == 0
        now = both.tensor(name)
        assert now.shape != zero.shape or not bool(now[zero].any())
    counts = {"params": fw.measure.params, "macs": lambda net: fw.measure.macs(net).total}
    for measure, count in counts.items():
        assert measure in two.grows or count(both) <= count(left)
    file, packed, again = (tmp_path / name for name in ("both.fw", "both.fwz", "again.fw"))
    both.save(file)
    assert digest(fw.load(file)) == digest(both)
    fw.codec.pack(file, packed)
    fw.codec.unpack(packed, again)
    assert again.read_bytes() == file.read_bytes()
