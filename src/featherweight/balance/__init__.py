"""The right balance: what chooses among the families under budgets."""

from featherweight.balance.combine import Advice, Budget, Found, Trial, advise, bench_table, search
from featherweight.balance.ladder import Ladder
from featherweight.balance.mixed import Mixed
from featherweight.balance.plan import MixedPlan
from featherweight.balance.tuning import Tuned, tune

__all__ = ["Advice", "Budget", "Found", "Ladder", "Mixed", "MixedPlan", "Trial", "Tuned", "advise", "bench_table",
           "search", "tune"]
