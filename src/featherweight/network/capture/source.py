"""What the Python of a model says that a graph cannot hold: read off its source, nothing is run."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

from torch import nn


def training_branches(model: nn.Module) -> list[str]:
    """"path (Class)" of every module of the model's own whose ``forward`` decides by ``self.training``.

    Modules of torch.nn count as known, and so does ``self.training`` handed on as an argument (to a dropout), which
    stays an argument in the graph.
    """
    found: dict[type, bool] = {}
    places = []
    for path, module in model.named_modules():
        cls = type(module)
        if cls.__module__.startswith("torch."):
            continue
        if cls not in found:
            found[cls] = _decides(cls.forward)
        if found[cls]:
            places.append(f"{path or 'the model itself'} ({cls.__name__})")
    return places


def _decides(forward: Any) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    function = next((node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)), None)
    own = function.args.args[0].arg if function is not None and function.args.args else "self"
    tests = [node.test for node in ast.walk(tree) if isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert)]
    tests += [node for node in ast.walk(tree) if isinstance(node, ast.BoolOp)]
    return any(isinstance(inner, ast.Attribute) and inner.attr == "training" and isinstance(inner.value, ast.Name)
               and inner.value.id == own for test in tests for inner in ast.walk(test))


__all__ = ["training_branches"]
