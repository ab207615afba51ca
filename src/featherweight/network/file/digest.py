"""A network's identity: one digest of its graph and of every tensor's bytes."""

from __future__ import annotations

import hashlib
import json

import torch

from featherweight.network.file.description import describe
from featherweight.network.network import Network


def digest(network: Network) -> str:
    """SHA-256 (hex) of the graph, and of names, dtypes, shapes and bytes of the tensors.

    Two networks with one digest compute the same. The torch version is not part of it.
    """
    description, tensors = describe(network.snapshot())
    description.pop("torch", None)
    total = hashlib.sha256(json.dumps(description, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():
            total.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
