"""What works beside a training, in the loops and logs of other packages, each imported when it is first asked for:
``fw.integrations.lightning``, ``fw.integrations.transformers``, ``fw.integrations.loggers``."""

from importlib import import_module
from typing import Any

__all__ = ["lightning", "loggers", "transformers"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"featherweight.integrations has no {name!r}; it has {', '.join(__all__)}")
    return import_module(f"{__name__}.{name}")
