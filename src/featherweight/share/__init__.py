"""Weight sharing: codebooks."""

from featherweight.share.candidates import Bits, Rates
from featherweight.share.steps import Codebook, CodebookPlan
from featherweight.share.vectors import Vectors, VectorsPlan

__all__ = ["Bits", "Codebook", "CodebookPlan", "Rates", "Vectors", "VectorsPlan"]
