"""Weight sharing: codebooks."""

from featherweight.share.candidates import Bits
from featherweight.share.steps import Codebook, CodebookPlan

__all__ = ["Bits", "Codebook", "CodebookPlan"]
