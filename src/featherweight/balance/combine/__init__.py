"""``search``: one budget in, the best combination of all families out."""

from featherweight.balance.combine.budget import Budget
from featherweight.balance.combine.found import Found
from featherweight.balance.combine.job import search
from featherweight.balance.combine.trials import Trial

__all__ = ["Budget", "Found", "Trial", "search"]
