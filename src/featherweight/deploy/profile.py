"""What a runtime says itself of how long each of its kernels takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from featherweight.network import Signature


@dataclass(frozen=True)
class KernelTime:
    """One kernel of a deployed file: its name and operator in the runtime, the seconds of a run (the mean of the middle
    half), the calls of the network that it may stand for (of a fused kernel, the one that it ends with is first), and
    the names of the stored tensors that it reads, where the runtime tells them.
    """

    name: str
    operator: str
    seconds: float
    calls: tuple[str, ...]
    weights: tuple[str, ...] = ()

    @classmethod
    def of(cls, held: Mapping[str, Any]) -> Self:
        """Of what JSON gives back of one."""
        return cls(**{**held, "calls": tuple(held["calls"]), "weights": tuple(held.get("weights", ()))})


#: in the names of a runtime's operators that hold weights or do MACs
WORKING = ("Conv", "Gemm", "MatMul", "FullyConnected", "Gather", "GRU", "LSTM", "RNN", "Attention", "Normalization",
           "Einsum")


def works(operator: str) -> bool:
    """Whether a runtime's operator holds weights or does MACs."""
    return any(word in operator for word in WORKING)


#: (file, signature, args, kwargs, threads, seconds) -> its kernels
Profiler = Callable[[Path, Signature, tuple[Any, ...], Mapping[str, Any], int, float], tuple[KernelTime, ...]]
#: target -> how its files are profiled; of a target without an entry, no kernel is known
PROFILERS: dict[str, Profiler] = {}

__all__ = ["PROFILERS", "KernelTime", "Profiler", "works"]
