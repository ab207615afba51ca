"""The right balance: what chooses among the families under budgets."""

from featherweight.balance.combine import Budget, Found, Trial, search
from featherweight.balance.ladder import Ladder
from featherweight.balance.mixed import Mixed
from featherweight.balance.plan import MixedPlan

__all__ = ["Budget", "Found", "Ladder", "Mixed", "MixedPlan", "Trial", "search"]
