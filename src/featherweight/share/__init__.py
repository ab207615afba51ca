"""Weight sharing: codebooks, and filters made of one another."""

from featherweight.share.blocks import BlockCodebook, BlockCodebookPlan
from featherweight.share.candidates import Bits, Rates
from featherweight.share.hashed import Hashed, HashedPlan
from featherweight.share.plan import CodebookPlan
from featherweight.share.soft import SoftSharing
from featherweight.share.steps import Codebook
from featherweight.share.transferred import Transferred, TransferredPlan
from featherweight.share.vectors import Vectors, VectorsPlan

__all__ = ["Bits", "BlockCodebook", "BlockCodebookPlan", "Codebook", "CodebookPlan", "Hashed", "HashedPlan", "Rates",
           "SoftSharing", "Transferred", "TransferredPlan", "Vectors", "VectorsPlan"]
