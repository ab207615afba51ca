"""Figures of a job or a training, to where people look at them: TensorBoard, MLflow, Weights & Biases, a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from featherweight.errors import RecipeError


class Logger(Protocol):
    """Takes figures by name at a step.

    Example:
        >>> class Printed:
        ...     def log(self, step, figures):
        ...         print(step, dict(figures))
        >>> Printed().log(3, {"loss": 0.5})
        3 {'loss': 0.5}
    """

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...


def _package(name: str, install: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise RecipeError(f"{name} is not installed; write pip install {install}") from error


@dataclass(frozen=True)
class JsonLines:
    """One JSON object a line, in a file that grows: ``{"step": 3, "loss": 0.5}``.

    Example:
        >>> from pathlib import Path
        >>> fw.integrations.loggers.JsonLines("log.jsonl").log(3, {"loss": 0.5})
        >>> Path("log.jsonl").read_text()
        '{"step": 3, "loss": 0.5}\\n'
    """

    file: str | Path

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        with open(self.file, "a", encoding="utf-8") as out:
            out.write(json.dumps({"step": step, **figures}) + "\n")


@dataclass(frozen=True)
class TensorBoard:
    """Event files in ``folder``, for ``tensorboard --logdir folder``; needs the package tensorboard.

    Example:
        >>> logger = fw.integrations.loggers.TensorBoard("runs")          # nothing is written before the first figure
    """

    folder: str | Path

    @cached_property
    def writer(self) -> Any:
        """torch's SummaryWriter."""
        _package("tensorboard", "tensorboard")
        return import_module("torch.utils.tensorboard").SummaryWriter(str(self.folder))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()


@dataclass(frozen=True)
class MLflow:
    """The active MLflow run, or ``client``, anything with ``log_metrics(figures, step=...)``.

    Example:
        >>> logger = fw.integrations.loggers.MLflow()                     # mlflow is imported with the first figure
    """

    client: Any = None

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        client = self.client if self.client is not None else _package("mlflow", "mlflow")
        # MLflow takes letters, digits and a few signs in a name
        client.log_metrics({"".join(c if c.isalnum() or c in "_-. /" else "_" for c in n): v
                            for n, v in figures.items()}, step=step)


@dataclass(frozen=True)
class WandB:
    """The active run of Weights & Biases, or ``run``, anything with ``log(figures, step=...)``.

    Example:
        >>> logger = fw.integrations.loggers.WandB()                      # wandb is imported with the first figure
    """

    run: Any = None

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        run = self.run if self.run is not None else _package("wandb", "wandb")
        run.log(dict(figures), step=step)


def progress(*loggers: Logger) -> Callable[[str, float, float, Mapping[str, float]], None]:
    """What ``fw.compress(progress=...)`` and ``steps.Context(progress=...)`` call: every figure goes to the loggers as
    "what it is of/its name", at a step that counts the calls.

    Example:
        >>> heard = fw.integrations.loggers.progress(fw.integrations.loggers.JsonLines("log.jsonl"))
        >>> heard("recover.Train", 10, 100, {"loss": 0.5})
        >>> print(open("log.jsonl").read().strip())
        {"step": 0, "recover.Train/loss": 0.5}
    """
    calls = 0

    def tell(what: str, done: float, total: float, figures: Mapping[str, float]) -> None:
        nonlocal calls
        if figures:
            for logger in loggers:
                logger.log(calls, {f"{what}/{name}": float(value) for name, value in figures.items()})
            calls += 1

    return tell


__all__ = ["JsonLines", "Logger", "MLflow", "TensorBoard", "WandB", "progress"]
