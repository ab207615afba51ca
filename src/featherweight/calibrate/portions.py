"""The samples of a batch in portions whose activations stay in the processor's cache, where that gives the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.network import Network, trees
from featherweight.network.signature import Signature
from featherweight.numerics.damage import relative_change
from featherweight.task import Inputs, call

#: bytes of a portion's largest activation. Tensors of more than 32 MiB are returned to the operating system at once
#: by glibc and cleared page by page at the next call, which took a third of the time of a detector at 352 pixels.
LARGEST = 16 << 20
#: |y' - y|^2 / |y|^2 at which portions and the whole batch are taken to give the same
ALIKE = 1e-10


@dataclass(frozen=True)
class Portions:
    """One batch, as tensor inputs of a network, portion after portion."""

    signature: Signature
    leaves: Sequence[list[Any]]

    def floats(self, network: Callable[..., Any]) -> list[Tensor]:
        """The floating-point outputs of ``network`` for the whole batch."""
        given = []
        for leaves in self.leaves:
            args, kwargs = self.signature.nest(leaves)
            given.append(trees.floats(network(*args, **kwargs)))
        return given[0] if len(given) == 1 else [torch.cat(parts) for parts in zip(*given, strict=True)]


def split_batch(network: Network, inputs: Inputs, outputs: Sequence[Tensor] | None = None) -> Portions:
    """``inputs``, one batch on the CPU, in portions of samples.

    outputs: the floating-point outputs of ``network`` for the whole batch; None computes them if they are needed. Where
    portions give something else, as where the samples of a batch know of one another, the batch is one portion. In
    evaluation mode, whatever the network's is.
    """
    signature = network.signature
    leaves = call(lambda *args, **kwargs: signature.leaves(args, kwargs), inputs)
    whole = Portions(signature, [leaves])
    along = [i.batched for i in signature.inputs]
    sizes = {tensor.shape[0] for tensor, batched in zip(leaves, along, strict=True) if batched}
    if len(sizes) != 1 or any(tensor.device.type != "cpu" for tensor in leaves):
        return whole
    samples, size = sizes.pop(), _samples(network)
    if size >= samples:
        return whole
    split = Portions(signature, [[t[start:start + size] if batched else t for t, batched in
                                  zip(leaves, along, strict=True)] for start in range(0, samples, size)])
    run = network.copy().eval() if network.training else network
    with torch.no_grad():
        given, outputs = split.floats(run), whole.floats(run) if outputs is None else outputs
    same = [g.shape for g in given] == [o.shape for o in outputs] and relative_change(given, outputs) <= ALIKE
    return split if same else whole


def _samples(network: Network) -> int:
    """How many samples have a largest activation of ``LARGEST`` bytes; at least one."""
    values = network.values(2)
    given = [values[n.name] for n in network.graph.nodes if n.op in ("placeholder", "call_function")]
    of_two = max((v.nbytes for v in given if isinstance(v, Tensor)), default=1)
    return max(1, int(2 * LARGEST / max(1, of_two)))


__all__ = ["Portions", "split_batch"]
