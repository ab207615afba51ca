"""Low rank: a layer as a product of smaller ones."""

from featherweight.factorize.candidates import Energies
from featherweight.factorize.plan import LowRankPlan
from featherweight.factorize.steps import LowRank

__all__ = ["Energies", "LowRank", "LowRankPlan"]
