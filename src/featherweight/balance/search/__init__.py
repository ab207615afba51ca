"""``search``: one budget in, the best combination of all families out."""

from featherweight.balance.search.budget import Budget
from featherweight.balance.search.found import Found
from featherweight.balance.search.search import search
from featherweight.balance.search.trials import Trial

__all__ = ["Budget", "Found", "Trial", "search"]
