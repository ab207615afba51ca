"""A network that gives some of its outputs alone: what only the others need is not computed and holds no width."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from featherweight.errors import CaptureError, did_you_mean
from featherweight.network import trees
from featherweight.network.edit import clear_dead, read_tensors
from featherweight.network.network import Network

#: a field of an output, or a place in a tuple of outputs
Output = str | int


def keep_outputs(network: Network, wanted: Sequence[Output]) -> None:
    """Leaves the outputs ``wanted`` (fields of the model's output, or places in its tuple) in the network. They come in
    the model's own type where its other fields may be missing, else in a dict, or a tuple of the places.

    Raises CaptureError for outputs that there are not.
    """
    signature = network.signature
    nest = trees.unflatten(range(signature.out_spec.num_leaves), signature.out_spec)
    fields = _fields(nest)
    for name in wanted:
        if name not in fields:
            raise CaptureError(f"outputs names {name!r}; the model gives {', '.join(map(repr, fields)) or 'a tensor'}; "
                               f"{did_you_mean(str(name), [str(f) for f in fields])}")
    chosen = {name: fields[name] for name in wanted}
    order, spec = trees.flatten(_nested(nest, chosen))
    order = [leaf for leaf in order if leaf is not None]
    before = read_tensors(network)
    end = next(n for n in network.graph.nodes if n.op == "output")
    results: Any = end.args[0]
    end.args = (tuple(results[i] for i in order),)
    network.signature = replace(signature, out_spec=spec)
    clear_dead(network, before)


def _fields(nest: Any) -> dict[Output, Any]:
    if isinstance(nest, Mapping):
        return dict(nest)
    if dataclasses.is_dataclass(nest):
        return {f.name: getattr(nest, f.name) for f in dataclasses.fields(nest)}
    if hasattr(nest, "_fields"):
        return dict(zip(nest._fields, nest, strict=True))
    return dict(enumerate(nest)) if isinstance(nest, (tuple, list)) else {}


def _nested(nest: Any, chosen: dict[Any, Any]) -> Any:
    """The chosen fields in the type of ``nest`` where it can do without the others."""
    if isinstance(nest, (tuple, list)) and not hasattr(nest, "_fields"):
        return tuple(chosen.values())
    if type(nest) is not dict:
        try:
            return type(nest)(**chosen)
        except TypeError:
            pass
    return dict(chosen)


__all__ = ["Output", "keep_outputs"]
