"""A Fit's checkpoint: one safetensors file, its position as JSON in the header, written whole or not at all.

Tensors are named "network/NAME", "optimizer/INDEX/KEY", and "driver/PLACE/state/NAME" and "driver/PLACE/own/INDEX" for
the companions. Nothing in it is pickled or evaluated.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from featherweight.errors import RecipeError
from featherweight.files import written_whole
from featherweight.network import Network
from featherweight.network.devices import device_of
from featherweight.recover.companions import Companions, unique
from featherweight.recover.optimizers import pack, unpack

FILE = "checkpoint.safetensors"
FORMAT = "featherweight checkpoint 2"
#: formats that are read no more -> the version that wrote them
OLD_FORMATS = {"featherweight checkpoint 1": "0.1"}


@dataclass(frozen=True)
class Position:
    """How far a Fit came: ``epoch`` epochs and ``step`` steps of the next, of ``rounds`` steps an epoch."""

    epoch: int
    step: int
    rounds: int


@dataclass(frozen=True)
class Checkpoint:
    """What a resumed Fit needs: how far it came, tensors by name, numbers."""

    position: Position
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix``, without it."""
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


def write(folder: Path, mark: str, checkpoint: Checkpoint) -> None:
    """Writes ``folder/checkpoint.safetensors``; a run killed meanwhile leaves the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in checkpoint.tensors.items()}
    meta = {"format": FORMAT, "fingerprint": mark, "numbers": json.dumps(checkpoint.numbers),
            "position": json.dumps(dataclasses.asdict(checkpoint.position))}
    meta["sha256"] = _digest(meta, tensors)
    with written_whole(folder / FILE) as part:
        save_file(tensors, part, meta)


def read(folder: Path, mark: str) -> Checkpoint | None:
    """The checkpoint in ``folder``; None where there is none, or only a damaged one (with a warning).

    Raises RecipeError for one that belongs to other options or another network, or that another version wrote.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            _check_format(path, meta["format"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if meta.get("sha256", known := _digest(meta, tensors)) != known:
            raise ValueError("its bytes do not match its checksum")
        given = meta["fingerprint"]
        position, numbers = Position(**json.loads(meta["position"])), json.loads(meta["numbers"])
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, OSError, RecursionError) as error:
        warnings.warn(f"the checkpoint {path} cannot be read ({error}); starting from the beginning", stacklevel=2)
        return None
    if given != mark:
        raise RecipeError(f"the checkpoint {path} belongs to other options, another network or another number of "
                          "processes; pass another Context(workdir=...), or delete it to start over")
    return Checkpoint(position, tensors, numbers)


def _digest(meta: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the numbers and all tensors."""
    found = hashlib.sha256(json.dumps([meta["fingerprint"], meta["numbers"], meta["position"]]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return found.hexdigest()


def _check_format(path: Path, form: str) -> None:
    if form != FORMAT:
        writer = f"version {OLD_FORMATS[form]}" if form in OLD_FORMATS else "a newer version"
        raise RecipeError(f"the checkpoint {path} was written by {writer} of featherweight (format {form!r}), from "
                          f"which this one cannot go on (it reads {FORMAT!r}); finish it with that version, or pass "
                          "another Context(workdir=...), or delete it to start over")


def taken(position: Position, network: Network, optimizer: Optimizer, companions: Companions, progress: float,
          sums: Mapping[str, Tensor], count: int) -> Checkpoint:
    """All that a run needs to go on from ``position``. sums, count: of the losses of this epoch's steps so far."""
    state, numbers = pack(optimizer)
    held = {f"optimizer/{name}": tensor for name, tensor in state.items()}
    held |= {f"network/{name}": tensor for name, tensor in unique(network).items()}
    held |= {f"driver/{name}": tensor for name, tensor in companions.state().items()}
    held |= {f"sum/{name}": tensor for name, tensor in sums.items()}
    return Checkpoint(position, held, {"optimizer": numbers, "progress": progress, "count": count})


def restored(found: Checkpoint, network: Network, optimizer: Optimizer, companions: Companions) -> float:
    """Puts back what ``taken`` took; the progress that the companions were told last."""
    with torch.no_grad():
        for name, tensor in found.under("network/").items():
            network.tensor(name).copy_(tensor)
    companions.restore(found.under("driver/"), device_of(network))
    unpack(optimizer, found.under("optimizer/"), found.numbers["optimizer"])
    return float(found.numbers["progress"])
