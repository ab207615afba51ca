"""Layers as ``featherweight inspect --ranks`` shows them: spectra, and the ranks that the rules of ``LowRank`` give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table

from featherweight.cli.groups import blocks
from featherweight.factorize.layers import factorable
from featherweight.factorize.ranks import RULES, by_energy, by_rule, spectra
from featherweight.network import Network

ENERGIES = (0.8, 0.9, 0.95, 0.99)
#: how many of the singular values, evenly from the largest to the least, are drawn
DRAWN = 16


@dataclass(frozen=True)
class LayerRanks:
    """A layer as the matrix [o, i * k]: its singular values, descending, and ranks by rule; of a grouped layer, of each
    group, with the roots of the sums of squares of its groups' values."""

    weight: str
    shape: tuple[int, ...]
    full: int
    by_energy: dict[str, int]
    by_rule: dict[str, int]
    values: tuple[float, ...]


def ranks(network: Network) -> tuple[LayerRanks, ...]:
    """All layers that can be factorized."""
    found = []
    for layer in factorable(network, ())[0]:
        values = spectra(layer, "svd")
        kept = {f"{energy:g}": by_rule(layer, "svd", by_energy(energy), values)[0] for energy in ENERGIES}
        rules = {name: by_rule(layer, "svd", rule, values)[0] for name, rule in RULES.items()}
        shape = tuple(network.tensor(layer.layer.weight).shape)
        found.append(LayerRanks(layer.layer.weight, shape, len(values[0]), kept, rules, tuple(values[0].tolist())))
    return tuple(found)


def to_dict(rows: Sequence[LayerRanks]) -> list[dict[str, Any]]:
    """JSON-able values."""
    return [asdict(row) for row in rows]


def table(rows: Sequence[LayerRanks]) -> Table:
    """One row a layer; singular values as rows of blocks, each on its own scale."""
    found = Table(header_style="bold", title="ranks of the layers as matrices [o, i * k]", title_justify="left")
    for head in ("weight", "shape"):
        found.add_column(head, overflow="fold")
    for head in ("full", *(f"{energy:.0%} of energy" for energy in ENERGIES), *RULES):
        found.add_column(head, justify="right")
    found.add_column("singular values")
    for row in rows:
        places = np.linspace(0, len(row.values) - 1, min(DRAWN, len(row.values))).round().astype(int)
        drawn = blocks([row.values[p] for p in places], row.values[0])
        found.add_row(row.weight, "×".join(map(str, row.shape)), str(row.full),
                      *map(str, (*row.by_energy.values(), *row.by_rule.values())), drawn)
    return found


__all__ = ["LayerRanks", "ranks", "table", "to_dict"]
