"""The folders that bring steps, plans and candidates: each enters them into the tables when it is imported."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

SHIPPED = ("prune", "factorize", "share", "quantize", "distill", "recover", "balance")


@cache
def shipped() -> dict[str, ModuleType]:
    """Folder's name -> its module. Imports those that nobody asked for yet, so that everything shipped stands in its
    table."""
    return {name: importlib.import_module(f"featherweight.{name}") for name in SHIPPED}


__all__ = ["SHIPPED", "shipped"]
