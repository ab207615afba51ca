"""A whole network and the one compressed so far, side by side: what every data-aware compression of layers looks at.

Layers are compressed in graph order. Each sees the inputs that it gets in the network as compressed so far and aims at
what the whole network gives at the same place, so that errors do not add up (He et al. 2017, section 3.3). A caller of
one's own goes from layer to layer::

    pair = Pair.of(network, task.batches("calibration"))
    pair.admit()
    for node in network.calls(aten.linear.default):
        pair.go_to(node.name)
        x, z = pair.rows(node)  # [g, n, i] in the compressed network, and at the same places in the whole one
        pair.set(weight_name(node), ...)  # what makes of x what the old weight makes of z
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.calibrate.portions import split_batch
from featherweight.calibrate.walk import Flow, Order, Waiting
from featherweight.errors import TaskError
from featherweight.network.devices import device_of
from featherweight.network.edit import weight_name
from featherweight.network.matrices import as_matrix, portions, rows
from featherweight.network.network import Network
from featherweight.network.program import Tap
from featherweight.task import Batch, move

ROWS = 1 << 17  #: inputs of a layer that are looked at: places of calibration samples, chosen at random
ELEMENTS = 1 << 25  #: numbers of such inputs that are held at once


@dataclass
class Pair:
    """The whole network and the compressed one, all calibration batches of both at the same place.

    Values that are set in the compressed network hold for the calls that it has not done yet.
    """

    whole: Flow
    compressed: Flow
    waiting: Waiting

    @classmethod
    def of(cls, whole: Network, batches: Iterable[Batch], compressed: Network | None = None,
           taps: dict[str, Tap] | None = None) -> Pair:
        """Both networks at their beginning, run as captured: in evaluation mode. No batch is read before ``admit``.

        compressed: None copies ``whole``. Its graph may be another one, if the calls that are gone to have the same
        names in both. taps: names of the compressed network's nodes -> what their activations pass through.
        """
        first = Flow(whole, Order.of(whole))
        other = whole.copy() if compressed is None else compressed
        second = Flow(other, first.order if compressed is None else Order.of(other), taps or {})
        return cls(first, second, Waiting(iter(batches)))

    @property
    def samples(self) -> int:
        """How many samples both networks have seen."""
        return self.waiting.samples

    def admit(self, sample_bytes: float | None = None) -> str:
        """Lets as many waiting batches in as memory holds, at least one, and says how many stay out ("" if none).

        sample_bytes: what both networks hold of one sample from here on; None takes the most that is held at any call.
        May be asked again further on, where less is held.
        """
        fullest = max(self.whole.order.held) + max(self.compressed.order.held)
        for inputs in self.waiting.admitted(fullest if sample_bytes is None else sample_bytes):
            for leaves in split_batch(self.whole.network, move(inputs, device_of(self.whole.network))).leaves:
                self.whole.take(leaves)
                self.compressed.take(leaves)
        return self.waiting.left_out()

    def go_to(self, name: str) -> None:
        """Both networks run up to this call; it is not done yet."""
        self.whole.go_to(name)
        self.compressed.go_to(name)

    def go_past(self, name: str) -> None:
        """Both networks run up to this call, which is done."""
        self.whole.go_past(name)
        self.compressed.go_past(name)

    def ahead(self) -> Pair:
        """The same two networks at the same place: it may go ahead while this one stays."""
        return replace(self, whole=self.whole.ahead(), compressed=self.compressed.ahead())

    def keep(self, names: Collection[str]) -> None:
        """Keeps activations of both networks beyond their last use."""
        self.whole.keep(names)
        self.compressed.keep(names)

    def release(self, names: Collection[str]) -> None:
        """Releases kept activations."""
        self.whole.release(names)
        self.compressed.release(names)

    def rows(self, node: Node, most: int = ROWS, seed: int = 0) -> tuple[Tensor, Tensor]:
        """[g, n, i] each: rows that the matrix of a linear or convolution call, which is the next one, is multiplied
        with in the compressed network, and those at the same places in the whole one.

        At most about ``most`` rows, drawn with ``seed``, an equal share of every batch; float32 or wider.
        """
        weight = self.whole.network.tensor(str(weight_name(node)))
        groups, _, width = as_matrix(node, weight).shape
        generator = torch.Generator().manual_seed(seed)
        share = min(most, ELEMENTS // (groups * width)) / len(self.whole.batches)
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for pair in zip(self.compressed.reads(node.name), self.whole.reads(node.name), strict=True):
            given = [wide(x) for x in pair]
            length = given[0].shape[0]
            for part in portions(node, weight, given[0]):
                unfolded = [rows(node, weight, x[part]) for x in given]
                count = max(1, round(share * (part.stop - part.start) / length))
                chosen = torch.randperm(unfolded[0].shape[1], generator=generator)[:count].to(weight.device)
                for held, new in zip(found, unfolded, strict=True):
                    held.append(new[:, chosen])
        one, other = torch.cat(found[0], 1), torch.cat(found[1], 1)
        if not bool(torch.isfinite(one).all() & torch.isfinite(other).all()):
            raise TaskError(f"what {node.name!r} reads is not finite on the calibration data; look at that data")
        return one, other

    def set(self, name: str, value: Tensor) -> None:
        """Another value for a tensor of the compressed network, in the old one's dtype and on its device."""
        self.compressed.network.set_tensor(name, value.to(self.compressed.network.tensor(name)))


def wide(value: Tensor) -> Tensor:
    """In float32 or wider."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


__all__ = ["Pair", "wide"]
