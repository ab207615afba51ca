"""Models by the names that other packages give them, and tasks from files: what a job file says without any Python."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from featherweight.errors import RecipeError, did_you_mean
from featherweight.task.arrays import arrays
from featherweight.task.images import images
from featherweight.task.table import table, texts
from featherweight.task.task import Task

#: what a [data] table may name its files by
SOURCES = ("images", "csv", "npz")


# ---- data
@dataclass(frozen=True)
class Source:
    """Data in files: one of ``SOURCES``, its path (of the job file's folder), and options of the function of
    ``fw.task`` that reads it."""

    kind: str
    path: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Source:
        """Of a [data] table. Raises RecipeError for unknown keys and missing ones."""
        named = [kind for kind in SOURCES if kind in given]
        if len(named) != 1 or not isinstance(given[named[0]], str):
            raise RecipeError(f"[data] names {' and '.join(named) or 'nothing'}; expected one of {', '.join(SOURCES)} "
                              'and a path: write images = "folder"')
        found = cls(named[0], given[named[0]], {k: v for k, v in given.items() if k != named[0]})
        _, *parameters = inspect.signature(found.reader).parameters.values()
        known = [p.name for p in parameters]
        for key in found.options:
            if key not in known:
                raise RecipeError(f"[data] has no option {key!r} for {found.kind}; {did_you_mean(key, known)}")
        missing = [p.name for p in parameters if p.default is p.empty and p.name not in found.options]
        if missing:
            raise RecipeError(f"[data] {found.kind} = {found.path!r} needs {missing[0]}; write {missing[0]} = ...")
        return found

    @property
    def reader(self) -> Callable[..., Task]:
        if self.kind == "csv":
            return texts if {"text", "tokenizer"} & set(self.options) else table
        return images if self.kind == "images" else arrays

    def task(self, folder: str) -> Task:
        """Paths are looked for in ``folder``."""
        options = dict(self.options)
        if isinstance(options.get("tokenizer"), str) and (Path(folder) / options["tokenizer"]).exists():
            options["tokenizer"] = str(Path(folder) / options["tokenizer"])
        try:
            return self.reader(Path(folder) / self.path, **options)
        except TypeError as error:
            raise RecipeError(f"[data] {self.kind} = {self.path!r} with {options}: {error}") from error

    def table(self) -> dict[str, Any]:
        """As ``of`` reads it."""
        return {self.kind: self.path, **self.options}


# ---- models
def _timm(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    model: nn.Module = _package("timm").create_model(name, **{"pretrained": False, **arguments})
    return model


def _torchvision(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    model: nn.Module = _package("torchvision.models").get_model(name, **{"weights": None, **arguments})
    return model


def _transformers(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    package, rest = _package("transformers"), dict(arguments)
    head = str(rest.pop("head", "ForSequenceClassification"))
    auto = getattr(package, f"AutoModel{head}", None)
    if auto is None:
        raise RecipeError(f'transformers has no AutoModel{head}; write arguments = {{head = '
                          '"ForSequenceClassification"}, or "" for the bare model')
    model: nn.Module = auto.from_pretrained(name, **rest)
    return model


#: package -> (name, arguments) -> the model
PACKAGES: dict[str, Callable[[str, Mapping[str, Any]], nn.Module]] = {
    "timm": _timm, "torchvision": _torchvision, "transformers": _transformers}


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        first = name.partition(".")[0]
        raise RecipeError(f"the model is one of {first}, which is not here: {error}; write pip install {first}"
                          ) from error


def model_named(name: str, arguments: Mapping[str, Any], weights: str | None, folder: str) -> nn.Module:
    """The model that "package:name" calls, in evaluation mode. weights: the file of its state (safetensors, or saved by
    torch), of ``folder``; None leaves what the package gives. Raises RecipeError in words for all that goes wrong."""
    package, _, own = name.partition(":")
    if package not in PACKAGES or not own:
        raise RecipeError(f"[model] name = {name!r}; expected PACKAGE:NAME with one of {', '.join(PACKAGES)}, as in "
                          'name = "torchvision:resnet18"')
    if (local := Path(folder) / own).exists():
        own = str(local)
    try:
        model = PACKAGES[package](own, arguments)
    except RecipeError:
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RecipeError(f"{package} gave no model {own!r} for {dict(arguments)}: {first}") from error
    if weights is not None:
        _load(model, Path(folder) / weights)
    return model.eval()


def _load(model: nn.Module, path: Path) -> None:
    """Fills a model from a file of its state; pickles are read as tensors alone."""
    if not path.is_file():
        raise RecipeError(f"[model] weights = {str(path)!r}: no such file")
    try:
        held: Any = safetensors.torch.load_file(path) if path.suffix == ".safetensors" else torch.load(
            path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise RecipeError(f"{path} is no file of tensors: {str(error).splitlines()[0]}; save it by "
                          "torch.save(model.state_dict(), path)") from error
    except Exception as error:
        raise RecipeError(f"{path} holds more than tensors ({type(error).__name__}); save it by "
                          "torch.save(model.state_dict(), path)") from error
    state = next((held[key] for key in ("state_dict", "model", "model_state_dict")
                  if isinstance(held, Mapping) and isinstance(held.get(key), Mapping)), held)
    if not isinstance(state, Mapping):
        raise RecipeError(f"{path} holds a {type(held).__name__}, no state; save it by "
                          "torch.save(model.state_dict(), path)")
    plain = {str(key).removeprefix("module."): value for key, value in state.items()}
    try:
        model.load_state_dict(plain)
    except RuntimeError as error:
        told = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise RecipeError(f"the weights in {path} do not fit the model: {told}") from error


__all__ = ["PACKAGES", "SOURCES", "Source", "model_named"]
