"""The right balance: what chooses among the families under a budget."""

from featherweight.balance.ladder import Ladder
from featherweight.balance.mixed import Mixed

__all__ = ["Ladder", "Mixed"]
