"""Low rank: a layer as a product of smaller ones."""

from featherweight.factorize.candidates import Energies
from featherweight.factorize.compact import Compact, CompactPlan
from featherweight.factorize.merge import Merge, MergePlan
from featherweight.factorize.plan import LowRankPlan
from featherweight.factorize.steps import LowRank
from featherweight.factorize.structured import Structured, StructuredPlan
from featherweight.factorize.training import FrobeniusDecay, Nuclear

__all__ = ["Compact", "CompactPlan", "Energies", "FrobeniusDecay", "LowRank", "LowRankPlan", "Merge",
           "MergePlan", "Nuclear", "Structured", "StructuredPlan"]
