"""What a stored state belongs to: steps by kind and by those of their options that are not at their defaults.

So a state outlives that a class moves within its family, and that a step gets an option more. A default that changes,
or an option that means something else, asks for a new format of the states.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from featherweight.network import Network
from featherweight.network.file.digest import digest
from featherweight.steps.kinds import kind_of, options


def canonical(value: Any) -> Any:
    """``value`` as JSON-able data that is equal where the options are: dataclasses as [kind, options that are not at
    their defaults], networks by digest, functions by name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [kind_of(value), {name: canonical(given) for name, given in options(value).items()}]
    if isinstance(value, Network):
        return ["network", digest(value)]
    if isinstance(value, Mapping):
        return {str(k): canonical(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [canonical(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return repr(value)


def fingerprint(step: Any, network: Network, **more: Any) -> str:
    """What a checkpoint belongs to: the step's options, the network it started from, and ``more`` (seed, processes)."""
    text = json.dumps([canonical(step), digest(network), more], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


__all__ = ["canonical", "fingerprint"]
