"""Random generators: seeded from what a result depends on, and left as they were found."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_from(*parts: int | str) -> int:
    """A seed that depends on every part."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")


def seed_all(seed: int) -> None:
    """Seeds torch (every device), numpy and Python: what a split may shuffle and augment with."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Leaves the global random generators as they were found."""
    ours = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(ours[0])
        np.random.set_state(ours[1])
