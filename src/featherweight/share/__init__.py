"""Weight sharing: codebooks."""

from featherweight.share.steps import Codebook, CodebookPlan

__all__ = ["Codebook", "CodebookPlan"]
