"""Rounding by data, the maths: against all roundings there are, against the papers' algorithms done by hand."""

from __future__ import annotations

import itertools

import pytest
import torch

from featherweight.numerics import adaround, gptq, grids
from featherweight.numerics.formats import GRIDS
from featherweight.numerics.grids import Spec


def tiny(seed, spec=GRIDS["int4"]):
    """One output of 7 weights, correlated inputs, its grid, and the error of every rounding up or down."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(7, 7, generator=generator)
    x = torch.randn(1, 400, 7, generator=generator) @ mix + 0.5
    weight = torch.randn(1, 1, 7, generator=generator)
    scale = (weight.abs().max() / spec.highest).expand(weight.shape)
    numbers = adaround.numbers(spec)
    away = weight.double() / scale
    above = torch.bucketize(away, numbers).clamp(1, len(numbers) - 1)
    pairs = torch.stack([numbers[above - 1], numbers[above]])[:, 0, 0]

    def loss(value):
        return float(((value - weight) @ x.mT).square().sum())

    every = [loss(torch.stack([pairs[b, i] for i, b in enumerate(bits)]).float() * scale)
             for bits in itertools.product((0, 1), repeat=7)]
    nearest = grids.fake_quantize(weight, scale, torch.zeros((), dtype=torch.int32), spec)
    return weight, x, scale, loss, min(every), loss(nearest)


@pytest.mark.parametrize("kind", ["int4", "int2", "ternary", "binary"])
def test_close_to_the_best_of_all_roundings(kind):
    spec = GRIDS[kind]
    ratios = []
    for seed in range(3):
        weight, x, scale, loss, best, nearest = tiny(seed, spec)
        swept, _ = gptq.gptq(weight, (x.mT @ x).double(), scale, spec, damp=1e-4)
        learned = adaround.adaround(
            weight, scale, spec, x, x @ weight.mT, lambda made: made, torch.Generator().manual_seed(0),
            schedule=adaround.Schedule(iterations=200), rows=400)
        for found in (swept.float(), learned):
            numbers = (found / scale).round()
            assert torch.allclose(found, numbers * scale)
            assert set(numbers.flatten().tolist()) <= set(adaround.numbers(spec).tolist())
        assert loss(learned) <= nearest
        ratios.append([loss(found) / best for found in (swept.float(), learned)] + [nearest / best])
    swept, learned, nearest = (sorted(r)[len(r) // 2] for r in zip(*ratios, strict=True))
    assert swept <= nearest
    assert learned <= 1.5


def test_columns_in_order_are_rounded_as_the_paper_has_it():
    """Algorithm 1 by hand: after each column the inverse of what is left is made anew."""
    torch.manual_seed(0)
    spec, x = Spec(4), torch.randn(200, 10).double() @ torch.randn(10, 10).double()
    weight, gram = torch.randn(3, 10).double(), x.T @ x
    scale = (weight.abs().amax(1, keepdim=True) / spec.highest).expand(3, 10)
    full, work = gram + 0.01 * gram.diagonal().mean() * torch.eye(10), weight.clone()
    for j in range(10):
        inverse = torch.linalg.inv(full[j:, j:])
        chosen = (work[:, j] / scale[:, j]).round().clamp(spec.lowest, spec.highest) * scale[:, j]
        work[:, j:] -= ((work[:, j] - chosen) / inverse[0, 0])[:, None] * inverse[0]
    found, aims = gptq.gptq(weight, gram, scale, spec, ordered=False)
    assert torch.allclose(found, work)
    assert ((aims - found).abs() <= scale / 2 + 1e-9)[found.abs() < scale * spec.highest].all()


def test_order_is_undone_and_zeros_are_kept():
    torch.manual_seed(0)
    x = torch.randn(2, 300, 12) * torch.rand(12)
    weight, gram = torch.randn(2, 5, 12), (x.mT @ x).double()
    kept = torch.rand(2, 5, 12) < 0.5
    scale = torch.rand(2, 5, 12) * 0.1 + 0.1  # one per weight: it must go with its column
    found, _ = gptq.gptq(weight, gram, scale, Spec(8), kept=kept)
    assert (found[~kept] == 0).all()
    ratio = found / scale
    assert torch.allclose(ratio, ratio.round(), atol=1e-6)
    order = gram.diagonal(dim1=-2, dim2=-1).argsort(-1, descending=True)
    for g in range(2):
        o = order[g]
        left, _ = gptq.gptq(weight[g][:, o], gram[g][o][:, o], scale[g][:, o], Spec(8), kept=kept[g][:, o],
                            ordered=False)
        assert torch.allclose(found[g][:, o], left)


def test_towards_is_the_least_squares_solution():
    torch.manual_seed(0)
    z = torch.randn(500, 6).double()
    x = z + 0.3 * torch.randn(500, 6).double()
    weight = torch.randn(4, 6).double()
    found = gptq.towards(weight, x.T @ x, x.T @ z, damp=1e-9)
    assert torch.allclose(found.T, torch.linalg.lstsq(x, z @ weight.T).solution, atol=1e-5)
    assert torch.allclose(gptq.towards(weight, x.T @ x, x.T @ x), weight)


def test_soft_weights_start_where_the_weights_are_and_end_on_the_grid():
    torch.manual_seed(0)
    for spec in (*(GRIDS[k] for k in ("int4", "int2", "ternary", "binary")), Spec(4, levels=(0, 1, 2, 4, 8))):
        scale = torch.tensor(0.3)
        weight = (torch.rand(200) * 2 - 1) * 0.3 * spec.highest
        soft = adaround.Soft(weight, scale, spec)
        assert torch.allclose(soft.value(soft.share()), weight, atol=1e-4)
        near = grids.fake_quantize(weight, scale, torch.zeros((), dtype=torch.int32), spec)
        assert torch.allclose(soft.nearest(), near)


def test_descent_ends_where_no_single_change_is_better():
    torch.manual_seed(0)
    spec, x = Spec(3), torch.randn(300, 8).double() @ torch.randn(8, 8).double()
    weight, gram = torch.randn(4, 8).double(), x.T @ x
    scale = (weight.abs().amax(1, keepdim=True) / spec.highest).expand(4, 8)
    start = adaround.Soft(weight, scale, spec).nearest().double()
    found, aims = gptq.descend(start, weight, gram, scale, spec, damp=1e-9, passes=50)

    def loss(value):
        return ((value - weight) @ gram * (value - weight)).sum()

    assert loss(found) <= loss(start)
    for o, i, n in itertools.product(range(4), range(8), adaround.numbers(spec).tolist()):
        other = found.clone()
        other[o, i] = n * scale[o, i]
        assert loss(other) >= loss(found) * (1 - 1e-6)
    assert torch.allclose(adaround.Soft(aims, scale, spec).nearest().double(), found, atol=1e-5)
