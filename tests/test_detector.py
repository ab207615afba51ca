"""A detector built as YOLOv8 is: split and joined channels, pools in a row, a head that keeps its anchors by shape."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight as fw
from featherweight import measure

torch.set_num_threads(1)


def conv(i: int, o: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(o),
                         nn.SiLU(inplace=True))


class Split(nn.Module):
    """C2f: half of the channels goes through residual blocks, all of what they give is joined."""

    def __init__(self, i: int, o: int, blocks: int = 1) -> None:
        super().__init__()
        half = o // 2
        self.into, self.out = conv(i, 2 * half), conv((2 + blocks) * half, o)
        self.blocks = nn.ModuleList(nn.Sequential(conv(half, half, 3), conv(half, half, 3)) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.into(x).chunk(2, 1))
        parts.extend(parts[-1] + block(parts[-1]) for block in self.blocks)
        return self.out(torch.cat(parts, 1))


class Pools(nn.Module):
    """SPPF."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.into, self.out = conv(i, i // 2), conv(i * 2, o)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.into(x)]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, 1, 2))
        return self.out(torch.cat(parts, 1))


class Detect(nn.Module):
    """Boxes as distributions over distances, and classes; anchors are made anew where the shape is another."""

    def __init__(self, widths: tuple[int, ...], classes: int = 4, bins: int = 8) -> None:
        super().__init__()
        self.classes, self.bins, self.shape = classes, bins, None
        self.boxes = nn.ModuleList(nn.Sequential(conv(c, 16, 3), nn.Conv2d(16, 4 * bins, 1)) for c in widths)
        self.kinds = nn.ModuleList(nn.Sequential(conv(c, 16, 3), nn.Conv2d(16, classes, 1)) for c in widths)
        self.mean = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.mean.weight.data[:] = torch.arange(bins, dtype=torch.float32).view(1, bins, 1, 1)
        self.anchors = self.strides = torch.empty(0)

    def forward(self, levels: list[Tensor]) -> Tensor:
        shape = levels[0].shape
        levels = [torch.cat((a(x), b(x)), 1) for a, b, x in zip(self.boxes, self.kinds, levels, strict=True)]
        if self.shape != shape:
            points, strides = [], []
            for x, stride in zip(levels, (4.0, 8.0), strict=True):
                y, z = torch.meshgrid(torch.arange(x.shape[2]) + 0.5, torch.arange(x.shape[3]) + 0.5, indexing="ij")
                points.append(torch.stack((z, y), -1).view(-1, 2))
                strides.append(torch.full((len(points[-1]), 1), stride))
            self.anchors, self.strides, self.shape = torch.cat(points).t(), torch.cat(strides).t(), shape
        every = torch.cat([x.view(shape[0], 4 * self.bins + self.classes, -1) for x in levels], 2)
        box, kinds = every.split((4 * self.bins, self.classes), 1)
        count, _, places = box.shape
        far = self.mean(box.view(count, 4, self.bins, places).transpose(2, 1).softmax(1)).view(count, 4, places)
        low, high = far.chunk(2, 1)
        low, high = self.anchors[None] - low, self.anchors[None] + high
        return torch.cat((torch.cat(((low + high) / 2, high - low), 1) * self.strides, kinds.sigmoid()), 1)


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = conv(3, 16, 3, 2), Split(16, 16)
        self.down, self.b = conv(16, 32, 3, 2), Split(32, 32)
        self.deep, self.c, self.pools = conv(32, 48, 3, 2), Split(48, 48), Pools(48, 48)
        self.up, self.detect = Split(80, 32), Detect((32, 48))

    def forward(self, x: Tensor) -> Tensor:
        near = self.b(self.down(self.a(self.stem(x))))
        far = self.pools(self.c(self.deep(near)))
        near = self.up(torch.cat((F.interpolate(far, scale_factor=2.0, mode="nearest"), near), 1))
        return self.detect([near, far])


def images(batch: int) -> Tensor:
    return torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))


def test_a_detector_is_captured_whole_cut_and_stored() -> None:
    torch.manual_seed(0)
    model = Detector().eval()
    network = fw.capture(model, images(2))
    assert isinstance(network, fw.Network)
    assert network.signature.dynamic_batch
    assert model.detect.shape is None, "the model is left as it was"
    with torch.no_grad():
        for batch in (1, 2, 3):
            torch.testing.assert_close(network(images(batch)), model(images(batch)))
    plan = fw.prune.Channels(macs=0.5).plan(network, fw.Task())
    small = plan.apply(network)
    assert plan.macs_after == measure.macs(small).total <= 0.52 * plan.macs_before
    assert {s.path for s in plan.skipped} == {"detect.boxes.0.1", "detect.kinds.0.1", "detect.boxes.1.1",
                                              "detect.kinds.1.1", "detect.mean"}
    with torch.no_grad():
        torch.testing.assert_close(small(images(3)), plan.zero(network)(images(3)), rtol=1e-4, atol=1e-4)
    stored = fw.quantize.Quantize().plan(small, fw.Task(calibration=[(images(8), None)])).apply(small)
    with torch.no_grad():
        apart = (stored(images(3)) - small(images(3))).norm() / small(images(3)).norm()
    assert float(apart) < 0.05
    assert all(stored.tensor(n).dtype == torch.int8 for n, p in small.named_parameters() if p.dim() == 4
               and n != "detect.mean.weight"), "every convolution's weight is stored"
