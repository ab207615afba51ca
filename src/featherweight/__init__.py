"""Makes a trained PyTorch network small and fast enough for its device, and proves that it still works.

Names are loaded when they are first asked for, so that ``featherweight --version`` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featherweight import balance, distill, errors, factorize, prune, quantize, recover, share
    from featherweight.balance import Advice, Budget, Found, Tuned, advise, search, tune
    from featherweight.judge.sensitivity import Sensitivity, sensitivity
    from featherweight.network import Assembly, Network, capture, load
    from featherweight.recipe import Job, Recipe, Result, compress
    from featherweight.recover import integrations
    from featherweight.task import Task, scores

__version__ = "0.2.0"
__all__ = ["Advice", "Assembly", "Budget", "Found", "Job", "Network", "Recipe", "Result", "Sensitivity", "Task",
           "Tuned", "advise", "balance", "capture", "compress", "distill", "errors", "factorize", "integrations",
           "load", "prune", "quantize", "recover", "scores", "search", "sensitivity", "share", "tune"]

#: public names that are no folders or files of this package -> where they are
_PLACES = {
    "Assembly": "network", "Network": "network", "capture": "network", "load": "network", "scores": "task",
    "Job": "recipe", "Recipe": "recipe", "Result": "recipe", "compress": "recipe", "Task": "task",
    "Advice": "balance", "Budget": "balance", "Found": "balance", "advise": "balance", "search": "balance",
    "Tuned": "balance", "tune": "balance",
    "integrations": "recover",
    "Sensitivity": "judge.sensitivity", "sensitivity": "judge.sensitivity",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        found = globals()[name] = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
        return found
    try:
        return import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
