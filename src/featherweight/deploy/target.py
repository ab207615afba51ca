"""What a deployment target is, the table of targets, and the comparison of a deployed file with its network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.deploy.processor import ADVICE
from featherweight.deploy.saturation import saturating
from featherweight.errors import ExportError, did_you_mean
from featherweight.network import Network, Signature, trees
from featherweight.network.operators import schema_argument

QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default

#: tolerance of ``verify`` for a float network, by what the runtime computes in, and for one that quantizes (a value on
#: the border of two grid steps may round to either, and the step then travels on; and before weights of integers a
#: runtime may round activations itself, as ONNX Runtime does in MatMulNBits)
FLOAT_TOLERANCE = {"f32": 1e-3, "bf16": 5e-2, "f16": 1e-2}
QUANTIZED_TOLERANCE = 5e-2
#: of activations on a grid of few bits, one that rounds the other way moves by much, and the next ones with it: in such
#: a network so many steps of the coarsest grid, as a share of its range, may be between the two (seen in a ResNet-20 of
#: 4 bits: 1.6), but no more than half of it
FLIPPED_STEPS, MOST_FLIPPED = 3.0, 0.5


class Runner(Protocol):
    """A deployed file, loaded: called like the network it came from, it gives the same nest of tensors.

    Example:
        >>> torch.allclose(runner(images), network(images), atol=1e-4)     # a file that a target loaded
        True
        >>> runner.precision
        'f32'
    """

    @property
    def versions(self) -> Mapping[str, str]:
        """Package -> version of what runs the file."""
        ...

    @property
    def precision(self) -> str:
        """What float operators are computed in: "f32", or a key of FLOAT_TOLERANCE."""
        ...

    @property
    def exact_sums(self) -> bool:
        """Whether sums of products of 8 bits are never cut off, here and on this processor."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def close(self) -> None:
        """Frees the runtime's memory; the runner cannot be called afterwards."""


class Target(Protocol):
    """A runtime that networks are exported to.

    Example:
        >>> runtime = fw.deploy.target("onnxruntime")
        >>> size = runtime.export(network, "model.onnx")
        >>> runner = runtime.load("model.onnx", threads=1, like=network.signature)
        >>> runner.close()
    """

    @property
    def name(self) -> str: ...

    @property
    def package(self) -> str:
        """The Python package that runs its files; imported when used."""
        ...

    @property
    def suffix(self) -> str:
        """How names of its files end, with the dot."""
        ...

    def export(self, network: Network, path: str | Path) -> int:
        """Writes the network in evaluation form to ``path``, whole or not at all; gives the length in bytes, of all
        files where it takes several.

        Batch norms are folded and the batch stays free where it was. Raises ExportError naming operator and module.
        """
        ...

    def files(self, path: str | Path) -> tuple[Path, ...]:
        """All files that were written for ``path``, itself first: they are moved and copied together."""
        ...

    def load(self, path: str | Path, threads: int = 1, *, like: Signature) -> Runner:
        """The file at ``path`` made ready to run on ``threads`` threads, called as ``like`` says."""
        ...


TARGETS: dict[str, Target] = {}


def register(new: Target) -> Target:
    """Puts a target into the table, under its name.

    Example:
        >>> runtime = fw.deploy.target("onnxruntime")
        >>> fw.deploy.register(runtime) is fw.deploy.target(runtime.name)
        True
    """
    TARGETS[new.name] = new
    return new


def target(name: str) -> Target:
    """The target called ``name``; ExportError if there is none.

    Example:
        >>> runtime = fw.deploy.target("onnxruntime")
        >>> runtime.suffix
        '.onnx'
    """
    if not isinstance(name, str) or name not in TARGETS:
        raise ExportError(f"no target named {name!r}; {did_you_mean(str(name), TARGETS)}")
    return TARGETS[name]


@dataclass(frozen=True)
class Agreement:
    """How far a deployed file's outputs are from the network's on the same inputs.

    max_abs: largest absolute difference of any float output value; max_rel: the same relative to the largest magnitude
    in its output tensor, or for integers the share of values that differ, whichever is worse over the outputs.
    ok: max_rel <= tolerance. It is not where an output of the network is NaN.
    saturates: where it is not ok, whether the runner's kernels cut off sums of products of 8 bits on these inputs.

    Example:
        >>> fw.deploy.verify(network, runner, (images,)).max_rel < 1e-4
        True
    """

    max_abs: float
    max_rel: float
    ok: bool
    tolerance: float
    saturates: bool = False

    def complaint(self) -> str:
        """What to say where it is not ok."""
        if not self.max_rel < float("inf"):
            return ("the network or its deployed file gives outputs that are not finite; look for weights or scales "
                    "that a number type cannot hold (fp16 ends at 65504)")
        return (f"the deployed file differs from PyTorch by {self.max_rel:.2g} of the largest output, more than the "
                f"{self.tolerance:g} allowed" + (f"; {ADVICE}" if self.saturates else ""))


def verify(network: Network, runner: Runner, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None,
           tolerance: float | None = None) -> Agreement:
    """Runs both on the same inputs and compares them. The network is compared as it evaluates.

    tolerance: bound for ``max_rel``; by default FLOAT_TOLERANCE of the runner's precision, or where the network
    quantizes QUANTIZED_TOLERANCE, and for values of few bits more (FLIPPED_STEPS).
    Raises ExportError where nests, shapes or number types differ.

    Example:
        >>> fw.deploy.verify(network, runner, (images,)).ok
        True
    """
    mode = network.training
    try:
        network.eval()
        with torch.no_grad():
            wanted, spec = trees.flatten(network(*args, **(kwargs or {})))
    finally:
        network.train(mode)
    given, other = trees.flatten(runner(*args, **(kwargs or {})))
    if tolerance is None:  # what a runner computes in is known once it ran
        steps = [high - low for low, high in map(_ends, network.calls(QUANTIZE))]
        few = min(MOST_FLIPPED, FLIPPED_STEPS / min(steps)) if steps else 0.0
        tolerance = max(QUANTIZED_TOLERANCE, few) if is_quantized(network) else FLOAT_TOLERANCE[runner.precision]
    if spec != other:
        raise ExportError(f"the deployed file gives another nest of outputs: {other}; the network gives {spec}")
    worst_abs = worst_rel = 0.0
    for index, (want, got) in enumerate(zip(wanted, given, strict=True)):
        absolute, relative = _difference(index, want, got)
        worst_abs, worst_rel = max(worst_abs, absolute), max(worst_rel, relative)
    ok = worst_rel <= tolerance
    return Agreement(worst_abs, worst_rel, ok, tolerance,
                     not ok and not runner.exact_sums and bool(saturating(network, args, kwargs)))


def is_quantized(network: Network) -> bool:
    """Whether activations or stored weights are on a grid of integers somewhere in the graph."""
    return any(str(node.target).startswith("quantized_decomposed.") for node in network.calls())


def _ends(node: Node) -> tuple[int, int]:
    """The smallest and the largest number of the grid that a call rounds to."""
    return int(schema_argument(node, "quant_min")), int(schema_argument(node, "quant_max"))


def _difference(index: int, want: Any, got: Any) -> tuple[float, float]:
    if not isinstance(want, Tensor):
        return (0.0, 0.0) if want == got else (float("inf"), float("inf"))
    if not isinstance(got, Tensor) or want.shape != got.shape or want.dtype != got.dtype:
        raise ExportError(f"output {index} of the deployed file is {_describe(got)}; "
                          f"the network's is {_describe(want)}")
    if not want.numel():
        return 0.0, 0.0
    want = want.cpu()
    if not want.is_floating_point():
        return 0.0, float((want != got).double().mean())
    both = torch.nan_to_num(want.double()), torch.nan_to_num(got.double())
    absolute = float((both[0] - both[1]).abs().max())
    if bool(want.isnan().any()) or not torch.equal(want.isinf(), got.isinf()):
        return float("inf"), float("inf")
    return absolute, absolute / max(float(both[0].abs().max()), 1e-12)


def _describe(value: Any) -> str:
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)
