"""``Request``: which form is asked for each weight and each activation, before the network is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from featherweight.deploy.kernels import FEW_BITS, ONNX_RUNTIME, RULES, Rules
from featherweight.errors import RecipeError
from featherweight.numerics.formats import ACTIVATIONS, check_kinds, value_bits
from featherweight.steps.options import COUNT


@dataclass(frozen=True)
class Request:
    """The options of ``Quantize`` that say which form each layer takes, under the same names."""

    weights: str
    activations: str | None
    granularity: str | int
    mixed: Mapping[str, str]
    ends: str | None
    ignore: tuple[str, ...]
    target: str | None = None

    def check(self) -> None:
        """Raises RecipeError for names that are not in the tables."""
        check_kinds("weights", self.weights, self.activations)
        for pattern, text in self.mixed.items():
            check_kinds(f"mixed[{pattern!r}]", *split(text, self.activations))
        if self.ends is not None:
            check_kinds("ends", *split(self.ends, self.activations))
        grain = self.granularity
        if grain not in ("channel", "tensor") and not COUNT.hold(grain):
            raise RecipeError(f"granularity={grain!r} is not known; expected 'channel', 'tensor' or the length of a "
                              "group, as in granularity=32")

    def rules(self) -> Rules:
        """Which calls the target computes on integers, and where it wants activations rounded."""
        return FEW_BITS if value_bits(self.activations) < 8 else RULES.get(self.target or "onnxruntime", ONNX_RUNTIME)


def split(text: str, activations: str | None) -> tuple[str, str | None]:
    """"int4/uint8" as (weights, activations); "int8" keeps the step's ``activations``, "int8/float" has none."""
    weights, slash, values = text.partition("/")
    return weights, (None if values == "float" else values) if slash else activations


def of_ends(ends: str, activations: str | None) -> tuple[str, str | None]:
    """What ``ends`` asks for where the other layers have these ``activations``: activations are rounded only where
    those of the other layers are, and at run time where those are."""
    weights, values = split(ends, activations)
    return weights, values if activations in ACTIVATIONS else activations


__all__ = ["Request", "of_ends", "split"]
