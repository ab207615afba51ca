"""Task.detection: mean average precision against a slow second form, and torchmetrics where it runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import featherweight as fw
from featherweight.errors import TaskError
from featherweight.task.boxes import IOUS


def boxes(count: int, generator: torch.Generator) -> Tensor:
    corner = torch.rand(count, 2, generator=generator) * 20
    return torch.cat([corner, corner + 2 + torch.rand(count, 2, generator=generator) * 10], 1)


def scene(seed: int, images: int = 6) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """(found, truth): some boxes near objects, some elsewhere, some objects missed, equal scores among them."""
    g = torch.Generator().manual_seed(seed)
    found, truth = [], []
    for i in range(images):
        k = i % 4
        real, labels = boxes(k, g), torch.randint(0, 3, (k,), generator=g)
        near = real + torch.randn(k, 4, generator=g) * 0.8
        more = boxes(3, g)
        found.append({"boxes": torch.cat([near, near + 0.1, more]),
                      "scores": (torch.rand(2 * k + 3, generator=g) * 8).round() / 8,
                      "labels": torch.cat([labels, labels, torch.randint(0, 3, (3,), generator=g)])})
        truth.append({"boxes": real, "labels": labels})
    return found, truth


def overlap(a: list[float], b: list[float]) -> float:
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(wide, 0.0) * max(high, 0.0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def slow(found: list[dict[str, Tensor]], truth: list[dict[str, Tensor]], ious: tuple[float, ...]) -> float:
    """Box by box, threshold by threshold, in the words of the definition."""
    areas = []
    for label in sorted({int(x) for t in truth for x in t["labels"]}):
        objects = [[b.double().tolist() for b in t["boxes"][t["labels"] == label]] for t in truth]
        for least in ious:
            rows: list[tuple[float, bool]] = []
            for image, one in enumerate(found):
                taken: set[int] = set()
                mine = [i for i in range(len(one["labels"])) if one["labels"][i] == label]
                for i in sorted(mine, key=lambda i: -float(one["scores"][i])):
                    best, place = -1.0, -1
                    for j, box in enumerate(objects[image]):
                        value = overlap(one["boxes"][i].double().tolist(), box)
                        if j not in taken and value > best:
                            best, place = value, j
                    if place >= 0 and best >= least:
                        taken.add(place)
                    rows.append((float(one["scores"][i]), place >= 0 and best >= least))
            rows.sort(key=lambda r: -r[0])
            count, points = sum(map(len, objects)), []
            for n in range(1, len(rows) + 1):
                right = sum(hit for _, hit in rows[:n])
                points.append((right / count, right / n))
            for recall in np.linspace(0, 1, 101):
                areas.append(max((p for r, p in points if r >= recall), default=0.0))
    return 100 * sum(areas) / len(areas)


@pytest.mark.parametrize("seed", range(3))
def test_mean_ap_is_what_the_definition_says(seed: int) -> None:
    found, truth = scene(seed)
    ious = (0.5, 0.7, 0.9)
    given = fw.scores.mean_ap(lambda x: found, [(torch.zeros(6, 3, 4, 4), truth)], ious=ious)
    assert given == pytest.approx(slow(found, truth, ious), abs=1e-9)
    assert 5 < given < 95


def test_mean_ap_is_that_of_torchmetrics() -> None:
    metrics = pytest.importorskip("torchmetrics.detection", reason="torchmetrics is not installed")
    if not hasattr(metrics, "MeanAveragePrecision"):
        pytest.skip("torchmetrics needs torchvision and pycocotools for this")
    metric = metrics.MeanAveragePrecision()
    found, truth = scene(7, 12)
    metric.update(found, truth)
    given = fw.scores.mean_ap(lambda x: found, [(torch.zeros(12, 3, 4, 4), truth)])
    assert given == pytest.approx(100 * float(metric.compute()["map"]), abs=1e-4)


def test_batches_and_images_are_added_up() -> None:
    found, truth = scene(1)
    apart = [(torch.full((1, 3, 4, 4), float(i)), truth[i:i + 1]) for i in range(6)]
    task = fw.Task.detection([], apart, decode=lambda index: [found[index]])
    assert task.score is not None
    assert task.score_name == "mAP %"
    given = task.score(lambda x: int(x[0, 0, 0, 0]), task.batches("validation"))
    assert given == pytest.approx(fw.scores.mean_ap(lambda x: found, [(torch.zeros(6, 3, 4, 4), truth)], ious=IOUS))


def test_lists_of_images_are_stacked_and_wrong_ones_named() -> None:
    truth: Any = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}] * 2
    same = fw.Task.detection([([torch.zeros(3, 8, 8)] * 2, truth)], None)
    assert next(same.batches("train"))[0].shape == (2, 3, 8, 8)
    other = fw.Task.detection([([torch.zeros(3, 8, 8), torch.zeros(3, 9, 8)], truth)], None)
    with pytest.raises(TaskError, match=r"sizes \[3, 8, 8\], \[3, 9, 8\]"):
        next(other.batches("train"))


NONE = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}
BOX = {"boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0]]), "labels": torch.tensor([1])}


@pytest.mark.parametrize(("output", "target", "match"), [
    (torch.zeros(2, 5), [BOX], r"as many.*decode="),
    ([BOX], [BOX], "has boxes, labels; expected boxes, scores, labels"),
    ([{**BOX, "scores": torch.ones(2)}], [BOX], r"scores \[2\]"), ([{**BOX, "scores": torch.ones(1)}],
                                                                  [{**BOX, "iscrowd": torch.tensor([1])}], "crowds"),
    ([{**BOX, "scores": torch.ones(1)}], [NONE], "no image has a box")])
def test_what_is_no_detection_is_said(output: Any, target: Any, match: str) -> None:
    with pytest.raises(TaskError, match=match):
        fw.scores.mean_ap(lambda x: output, [(torch.zeros(len(target), 3, 8, 8), target)])


def test_a_detector_of_a_grid_is_quantized_and_scored() -> None:
    """A whole job: outputs [n, 5, h, w] decoded outside of the network."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(8, 5, 1)).eval()
    images = torch.randn(8, 1, 16, 16)

    def decode(maps: Tensor) -> list[dict[str, Tensor]]:
        return [{"boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0]]) + m[:4, 0, 0], "scores": m[4:, 0, 0].sigmoid(),
                 "labels": torch.tensor([1])} for m in torch.as_tensor(maps)]

    with torch.no_grad():
        truth = [{k: v for k, v in one.items() if k != "scores"} for one in decode(net(images))]
    task = fw.Task.detection([(images, truth)], [(images, truth)], decode=decode)
    network = fw.capture(net, images[:2])
    assert isinstance(network, fw.Network)
    rounded = fw.quantize.Quantize().plan(network, task).apply(network)
    assert task.score is not None
    assert task.score(network, task.batches("validation")) == 100
    assert 10 < task.score(rounded, task.batches("validation")) <= 100
