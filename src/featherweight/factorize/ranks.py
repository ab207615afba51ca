"""Rules that say the ranks of a layer from its singular values, one layer at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from featherweight.factorize.layers import Factorable
from featherweight.factorize.plan import Spectrum
from featherweight.numerics.factors.forms import FORMS, Ranks
from featherweight.numerics.factors.vbmf import evbmf_rank, stable_rank
from featherweight.numerics.lowrank import rank_by_energy

#: (singular values, the shape of the matrix that they are of) -> the rank
Rule = Callable[[Tensor, Sequence[int]], int]
DRAWN = 33  #: singular values of a layer that a plan keeps for the report
TRIES = 14  #: halvings of what is asked of the spectra, where the error itself is bounded


def by_energy(energy: float) -> Rule:
    """The smallest rank that keeps this part of the sum of squares."""
    return lambda values, shape: rank_by_energy(values, energy)


#: name -> rule that needs no number
RULES: dict[str, Rule] = {
    "evbmf": lambda values, shape: evbmf_rank(values, *shape),
    "stable": lambda values, shape: math.ceil(stable_rank(values) - 1e-9),
}


def spectra(layer: Factorable, form: str, grams: Sequence[Tensor] | None = None) -> list[Tensor]:
    """For each rank of the form the singular values; of several groups the root of the sum of their squares."""
    each = [FORMS[form].spectra(kernel, None if grams is None else grams[g]) for g, kernel in enumerate(layer.kernels)]
    return [torch.stack(mine).square().sum(0).sqrt() for mine in zip(*each, strict=True)]


def spectrum(layer: Factorable) -> Spectrum:
    """The singular values of a layer as a matrix, at most ``DRAWN`` of them, evenly from the first to the last."""
    values = spectra(layer, "svd")[0]
    places = torch.linspace(0, len(values) - 1, min(DRAWN, len(values))).round().long()
    drawn = (values[places] / values[0].clamp_min(1e-300)).tolist()
    return Spectrum(layer.layer.weight, tuple(((places + 1) / len(values)).tolist()), tuple(drawn))


def by_rule(layer: Factorable, form: str, rule: Rule, values: Sequence[Tensor] | None = None) -> Ranks:
    """The ranks by a rule; of a CP decomposition, which has one rank and no spectrum, what its longest side asks."""
    decomposition = FORMS[form]
    shapes = [parts[0].shape for parts in decomposition.matrices(torch.empty(layer.shape, device="meta"), None)]
    found = zip(values or spectra(layer, form), shapes, strict=True)
    return decomposition.within(layer.shape, tuple(rule(own, shape) for own, shape in found))


def fixed(layer: Factorable, form: str, rank: int) -> Ranks:
    """This rank, where it is not above the full one."""
    return FORMS[form].within(layer.shape, (rank,) * len(FORMS[form].full(layer.shape)))


def by_error(layer: Factorable, form: str, error: float) -> Ranks:
    """The ranks at which |W' - W| is just within ``error`` |W|, Frobenius norms: the error itself, not a bound."""
    square = error ** 2
    if FORMS[form].most is not None:
        return _tried(layer, form, square)
    values = spectra(layer, form)
    if FORMS[form].exact:
        return by_rule(layer, form, by_energy(1 - square), values)
    asked = partial(by_rule, layer, form, values=values)
    low, high = max(1e-9, 1 - square), 1.0  # each spectrum alone loses no more than all together
    best = asked(by_energy(high))
    for _ in range(TRIES):
        middle = 1 - math.sqrt((1 - low) * max(1 - high, (1 - low) * 1e-3))
        ranks = asked(by_energy(middle))
        if layer.error(form, ranks) <= square:
            best, high = ranks, middle
        else:
            low = middle
    return best


def _tried(layer: Factorable, form: str, square: float) -> Ranks:
    """The least single rank, found by halving, at which the squared error is within ``square``."""
    low, high = 0, FORMS[form].full(layer.shape)[0]
    while high - low > max(1, high // 16):
        middle = (low + high) // 2
        low, high = (low, middle) if layer.error(form, (middle,)) <= square else (middle, high)
    return (high,)
