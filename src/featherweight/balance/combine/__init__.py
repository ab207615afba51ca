"""``search``: one budget in, the best combination of all families out; ``advise``: where to begin."""

from featherweight.balance.combine.advise import Advice, advise
from featherweight.balance.combine.bench import bench_table
from featherweight.balance.combine.budget import Budget
from featherweight.balance.combine.found import Found
from featherweight.balance.combine.job import search
from featherweight.balance.combine.trials import Trial

__all__ = ["Advice", "Budget", "Found", "Trial", "advise", "bench_table", "search"]
