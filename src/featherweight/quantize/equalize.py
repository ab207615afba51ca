"""Cross-layer equalization."""

from __future__ import annotations

from torch import Tensor

from featherweight.network import Network
from featherweight.steps import Skipped


def equalized(network: Network) -> tuple[dict[str, Tensor], list[Skipped]]:
    raise NotImplementedError
