"""Number types by name: what weights are stored as, and what activations are rounded to."""

from __future__ import annotations

from itertools import product

import torch

from featherweight.errors import RecipeError, did_you_mean
from featherweight.numerics.grids import Spec

#: Additive powers of two (Li et al. 2020, eq. 5): a magnitude is a sum of one power, or none, of each of these terms.
#: A term of two bits has three powers; what is left over is a term of one bit.
TERMS: dict[str, tuple[tuple[int, ...], ...]] = {
    "apot3": ((1, 2, 4),),
    "apot4": ((1, 4, 8), (2,)),
    "apot5": ((1, 4, 16), (2, 8, 32)),
}


def sums(terms: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """All sums of one number, or none, of each term."""
    return tuple(sorted(sum(chosen) for chosen in product(*((0, *term) for term in terms))))


#: Grids of stored weights. Narrow, with zero on them, so that pruned weights stay zero; of 2 and 1 bit with as many
#: levels on both sides of zero as fit, and none on it.
GRIDS: dict[str, Spec] = {
    **{f"int{bits}": Spec(bits) for bits in range(3, 9)},
    "ternary": Spec(2),
    "int2": Spec(2, odd=True),
    "binary": Spec(1, odd=True),
    **{kind: Spec(int(kind[-1]), levels=sums(terms)) for kind, terms in TERMS.items()},
}
#: floats of two bytes: stored so, computed as float32
HALVES: dict[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
WEIGHTS = (*GRIDS, *HALVES)

#: Grids of activations. "uint": affine, the zero point where the values want it. "int": symmetric, and signed only
#: where values lie below zero (the entry here; ``unsigned`` gives the other).
ACTIVATIONS: dict[str, Spec] = {
    **{f"uint{bits}": Spec(bits, signed=False, symmetric=False) for bits in range(1, 9)},
    **{f"int{bits}": Spec(bits) for bits in range(2, 9)},
}


#: Values that linear calls round when they run, all of a call's input to the grid over its range; no data is needed.
DYNAMIC = "dynamic"
DYNAMIC_SPEC = ACTIVATIONS["uint8"]


def unsigned(spec: Spec) -> Spec:
    """The grid of as many bits from zero up."""
    return Spec(spec.bits, signed=False, symmetric=True, axis=spec.axis)


def weight_bits(kind: str) -> int:
    """Bits of one weight of this kind."""
    return GRIDS[kind].bits if kind in GRIDS else 8 * HALVES[kind].itemsize


def value_bits(kind: str | None) -> int:
    """Bits of one value of this kind; None: a float."""
    if kind is None:
        return 32
    return (DYNAMIC_SPEC if kind == DYNAMIC else ACTIVATIONS[kind]).bits


def check_kinds(where: str, weights: str, activations: str | None) -> None:
    """Raises RecipeError for a name that is not in the tables."""
    if weights not in WEIGHTS:
        raise RecipeError(f"{where}={weights!r} is not known; {did_you_mean(str(weights), WEIGHTS)}")
    known = (*ACTIVATIONS, DYNAMIC)
    if activations is not None and activations not in known:
        raise RecipeError(f"activations={activations!r} is not known; {did_you_mean(str(activations), known)}, or None")


__all__ = ["ACTIVATIONS", "DYNAMIC", "DYNAMIC_SPEC", "GRIDS", "HALVES", "WEIGHTS", "check_kinds", "unsigned",
           "value_bits", "weight_bits"]
