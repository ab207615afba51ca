"""Affine grids: what they promise about rounding, zero and the choice of range."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.numerics import grids
from featherweight.numerics.grids import Spec

SPECS = [Spec(bits, signed, symmetric) for bits in (2, 4, 8, 16) for signed, symmetric in
         ((True, True), (True, False), (False, False))]
FITTED = [grids.minmax, grids.least_squares]


@st.composite
def tensors(draw, axis=False):
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    seed, scale = draw(st.integers(0, 2**31)), draw(st.sampled_from([1e-20, 1e-3, 1.0, 300.0, 1e20]))
    shift, spike = draw(st.sampled_from([0.0, 1.0, -3.0])), draw(st.booleans())
    values = torch.from_numpy(np.random.default_rng(seed).normal(shift, 1, (rows, columns))).float()
    if spike:
        values[0, 0] *= 30
    return values * scale


def test_the_ranges_of_whole_numbers():
    assert (Spec(8).lowest, Spec(8).highest, Spec(8).dtype) == (-127, 127, torch.int8)
    affine = Spec(8, signed=False, symmetric=False)
    assert (affine.lowest, affine.highest, affine.dtype) == (0, 255, torch.uint8)
    assert (Spec(4, symmetric=False).lowest, Spec(4).highest) == (-8, 7)


@settings(max_examples=60, deadline=None)
@given(tensors(), st.sampled_from(SPECS), st.sampled_from([None, 0, 1]))
def test_rounding_moves_a_value_by_half_a_step_at_most(values, spec, axis):
    spec = Spec(spec.bits, spec.signed, spec.symmetric, axis)
    scale, zero = grids.minmax(values, spec)
    back = grids.dequantize(grids.quantize(values, scale, zero, spec), scale, zero, spec)
    step = scale if axis is None else scale.view([-1 if i == axis else 1 for i in range(2)])
    # the zero point is rounded too, so the range may move by half a step at an end of an affine grid
    allowed = 0.5 if spec.symmetric else 1.0
    assert ((back - values).abs() <= step * allowed * (1 + 1e-4) + values.abs() * 1e-5).all()
    assert torch.isfinite(back).all()


@settings(max_examples=60, deadline=None)
@given(tensors(), st.sampled_from(SPECS), st.sampled_from(FITTED))
def test_zero_stands_exactly(values, spec, fit):
    scale, zero = fit(values, spec)
    numbers = grids.quantize(torch.zeros(3), scale, zero, spec)
    assert torch.equal(grids.dequantize(numbers, scale, zero, spec), torch.zeros(3))
    assert spec.lowest <= int(zero) <= spec.highest


@settings(max_examples=60, deadline=None)
@given(tensors(), st.sampled_from(SPECS), st.sampled_from([None, 0]))
def test_least_squares_is_never_worse_than_the_whole_range(values, spec, axis):
    spec = Spec(spec.bits, spec.signed, spec.symmetric, axis)
    values = values.double()
    errors = [(values - grids.fake_quantize(values, *fit(values, spec), spec)).square() for fit in FITTED]
    whole, searched = (e.sum() if axis is None else e.sum(1) for e in errors)
    assert (searched <= whole * (1 + 1e-6)).all()


@settings(max_examples=30, deadline=None)
@given(tensors(), st.sampled_from(SPECS))
def test_rounding_again_changes_nothing(values, spec):
    scale, zero = grids.minmax(values, spec)
    once = grids.quantize(values, scale, zero, spec)
    assert torch.equal(grids.quantize(grids.dequantize(once, scale, zero, spec), scale, zero, spec), once)


def brute_force(values, spec, candidates=2000):
    """Least squared error of a symmetric grid over very many ranges, one by one."""
    top = float(values.abs().max())
    best = float("inf")
    for share in np.linspace(0.02, 1, candidates):
        scale = top * share / spec.highest
        q = (values / scale).round().clamp(spec.lowest, spec.highest)
        best = min(best, float((values - q * scale).square().sum()))
    return best


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_least_squares_comes_near_an_exhaustive_search(bits):
    generator = torch.Generator().manual_seed(bits)
    values = torch.randn(2000, generator=generator, dtype=torch.float64)
    values[0] = 12.0
    spec = Spec(bits)
    scale, zero = grids.least_squares(values, spec)
    found = float((values - grids.fake_quantize(values, scale, zero, spec)).square().sum())
    assert found <= brute_force(values, spec) * 1.03


def test_counts_stand_for_repeated_values():
    values = torch.tensor([-0.2, 0.1, 0.4, 0.7, 9.0])
    counts = torch.tensor([30, 50, 40, 20, 1])
    spec = Spec(3, signed=False, symmetric=False)
    repeated = grids.least_squares(values.repeat_interleave(counts), spec)
    counted = grids.least_squares(values, spec, counts)
    torch.testing.assert_close(repeated, counted)
    whole, _ = grids.minmax(values, spec)
    assert counted[0] < whole


def test_constant_and_zero_tensors():
    for spec in SPECS:
        for value in (0.0, 5.0, -5.0):
            values = torch.full((4,), value)
            scale, zero = grids.minmax(values, spec)
            back = grids.dequantize(grids.quantize(values, scale, zero, spec), scale, zero, spec)
            torch.testing.assert_close(back, values)
