"""The table of learners: how rounding is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from featherweight.errors import RecipeError
from featherweight.numerics.formats import GRIDS
from featherweight.quantize.training.quantizers import Fixed, Lsq, Pact, Quantizer, Steepening
from featherweight.quantize.training.weight_quantizers import Apot, Balanced, Dorefa, Straight, Ttq


@dataclass(frozen=True)
class Learner:
    """weights, values: made as (spec, scale, zero point, whether they are activations). kinds: the weights it is for,
    keys of ``GRIDS``; those of other kinds beside them (``ends``, ``mixed``) are trained by learned scales.
    progressive: whether the number of bits may change during training."""

    weights: Callable[..., Quantizer] = Lsq
    values: Callable[..., Quantizer] = Lsq
    kinds: tuple[str, ...] = tuple(GRIDS)
    progressive: bool = True

    def of_weight(self, kind: str) -> Callable[..., Quantizer]:
        return self.weights if kind in self.kinds else Lsq


POWERS = tuple(kind for kind, spec in GRIDS.items() if spec.levels is not None)
#: name -> learner; add one of your own under a new name
LEARNERS: dict[str, Learner] = {
    "lsq": Learner(),
    "ste": Learner(Straight, Fixed),
    "pact": Learner(Straight, Pact),
    "dorefa": Learner(Dorefa, Fixed),
    "apot": Learner(Apot, kinds=POWERS),
    "ttq": Learner(Ttq, kinds=("ternary",), progressive=False),
    "balanced": Learner(Balanced, Steepening, kinds=("binary",), progressive=False),
    "react": Learner(Straight, kinds=("binary",)),
}


def check_learner(learn: str, kinds: Iterable[str]) -> None:
    """Raises RecipeError where all weights are of ``kinds`` that the learner is not for."""
    trained = set(kinds) & set(GRIDS)
    wanted = LEARNERS[learn].kinds
    if trained and not trained & set(wanted):
        raise RecipeError(f"learn={learn!r} trains weights of {', '.join(map(repr, wanted))}, and these are "
                          f"{', '.join(map(repr, sorted(trained)))}; write weights={wanted[-1]!r}, or learn='lsq'")


__all__ = ["LEARNERS", "Learner", "check_learner"]
