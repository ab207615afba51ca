"""Low rank: a layer as a product of smaller ones."""

from featherweight.factorize.candidates import Energies
from featherweight.factorize.steps import LowRank, LowRankPlan

__all__ = ["Energies", "LowRank", "LowRankPlan"]
