"""What a stored state belongs to: steps by kind and by those of their options that are not at their defaults.

So a state outlives that a class moves within its family, and that a step gets an option more. A default that changes,
or an option that means something else, asks for a new format of the states.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featherweight.files import checksum
from featherweight.network import Network
from featherweight.network.file.digest import digest
from featherweight.steps.content import content
from featherweight.steps.kinds import OURS, kind_of, options


def canonical(value: Any) -> Any:
    """``value`` as JSON-able data that is equal where the options are: dataclasses as [kind, options that are not at
    their defaults, and the code where it is the user's], networks by digest, functions by content; so the files that
    options with the metadata "file" name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = [] if type(value).__module__.partition(".")[0] == OURS else [content(type(value))]
        files = [f.name for f in dataclasses.fields(value) if f.metadata.get("file")]
        return [kind_of(value), {name: _file(given) if name in files else canonical(given)
                                 for name, given in options(value).items()}, *own]
    if isinstance(value, Network):
        return ["network", digest(value)]
    if isinstance(value, Mapping):
        return {str(k): canonical(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [canonical(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if callable(value):
        return [f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}",
                content(value)]
    return repr(value)


def _file(given: Any) -> Any:
    """An option that may be the path of a file, or hold some: each with the file's checksum."""
    if isinstance(given, (tuple, list)):
        return [_file(one) for one in given]
    if isinstance(given, (str, Path)):
        return [str(given), checksum(Path(given)) if Path(given).is_file() else None]
    return canonical(given)


def fingerprint(step: Any, network: Network, **more: Any) -> str:
    """What a checkpoint belongs to: the step's options, the network it started from, and ``more`` (seed, processes)."""
    text = json.dumps([canonical(step), digest(network), more], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


__all__ = ["canonical", "fingerprint"]
