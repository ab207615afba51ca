"""What a teacher brings to a detector, a segmenter and a small transformer, beside the same training without one.

    python benchmarks/distillation_beyond.py detection --bccd FOLDER [--seeds 0 1 2]
    python benchmarks/distillation_beyond.py segmentation
    python benchmarks/distillation_beyond.py text --snippets vaderSentiment-3.3.2.tar.gz

The data are those of ``distillation_tasks.py``; detection needs pillow, torchvision, torchmetrics and pycocotools. Each
teacher is trained once (kept in out/distillation_beyond); the students, at half its width and shallower, with fresh
weights, are trained with the same budget in every arm. Epochs and weights were set beforehand, by hand; every row has
the scores on validation and test data: mAP at an IoU of 0.5, mean IoU, right answers, each in %.

Rows go into benchmarks/results/distillation_beyond.json as they are measured; one that is there is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import distillation_tasks as tasks
import torch
from rows import Rows
from torch import Tensor

import featherweight as fw
from featherweight import measure
from featherweight.distill import Features, Logits
from featherweight.recover import Train
from featherweight.steps import Context

WORK = Path(__file__).parent.parent / "out/distillation_beyond"
HALF = fw.distill.Student(width=0.5, weights="fresh")


def in_objects(inputs: Any, boxes: Tensor) -> Tensor:
    return tasks.assigned(boxes)[2]


def words(inputs: Any, target: Any) -> Tensor:
    return inputs[1]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Part:
    """Teacher, student and the arms: what works beside the student's training. example: inputs to capture with."""

    task: Callable[[argparse.Namespace], fw.Task]
    teacher: Callable[[], torch.nn.Module]
    student: Callable[[fw.Network], fw.Network]
    example: Any
    long: Train
    short: Train
    arms: dict[str, tuple[Any, ...]]


def halved(teacher: fw.Network) -> fw.Network:
    return HALF.plan(teacher, fw.Task()).apply(teacher)


def shallow(teacher: fw.Network) -> fw.Network:
    return fw.capture(tasks.Reader(64, 2).eval(), EXAMPLE)


EXAMPLE = torch.zeros(2, tasks.TOKENS, dtype=torch.long), torch.ones(2, tasks.TOKENS, dtype=torch.bool)
BOXES = Logits(output="classes", temperature=2.0, weight=0.5, mask=in_objects)
MAPS = Logits(temperature=2.0, weight=0.5)
LAYERS = {"layers.0": "layers.1", "layers.1": "layers.3"}
HIDDEN = Features("hidden", weight=0.3, taps=LAYERS, mask=words)
ATTENTION = Features("maps", weight=100.0, taps="attention", mask=words)
IMAGES = Train(lr=0.05, schedule="onecycle", autocast="bf16", channels_last=True, clip=5.0)
TEXT = Train(lr=1e-3, optimizer="adamw", weight_decay=0.05, schedule="onecycle", clip=1.0)
PARTS = {
    "detection": Part(
        lambda given: tasks.detection(given.bccd), tasks.Detector, halved, torch.zeros(2, 3, tasks.HIGH, tasks.WIDE),
        dataclasses.replace(IMAGES, epochs=80), dataclasses.replace(IMAGES, epochs=40),
        {"no teacher": (), "logits": (BOXES,),
         "fgd": (Features("fgd", weight=0.5, taps=("neck", "tower"), mask=in_objects),),
         "cwd": (Features("cwd", weight=2.0, taps=("neck", "tower")),)}),
    "segmentation": Part(
        lambda given: tasks.segmentation(), tasks.Segmenter, halved, torch.zeros(2, 3, tasks.SIDE, tasks.SIDE),
        dataclasses.replace(IMAGES, epochs=30), dataclasses.replace(IMAGES, epochs=10),
        {"no teacher": (), "logits": (MAPS,), "cwd": (Features("cwd", weight=2.0, taps=("up1",)),),
         "logits and cwd": (MAPS, Features("cwd", weight=2.0, taps=("up1",)))}),
    "text": Part(
        lambda given: tasks.text(given.snippets), tasks.Reader, shallow, EXAMPLE,
        dataclasses.replace(TEXT, epochs=8), dataclasses.replace(TEXT, epochs=5),
        {"no teacher": (), "logits": (MAPS,), "hidden": (HIDDEN,), "logits and hidden": (MAPS, HIDDEN),
         "logits, hidden and maps": (MAPS, HIDDEN, ATTENTION)}),
}


def row(network: fw.Network, task: fw.Task, start: float, **facts: Any) -> dict[str, Any]:
    assert task.score is not None
    scores = {split: task.score(network, task.batches(split)) for split in ("validation", "test")}
    return {**scores, **facts, "params": measure.params(network), "macs": measure.macs(network).total,
            "processor_s": round(time.process_time() - start), "notes": list(network.notes)[:3]}


def taught(part: Part, name: str, task: fw.Task, rows: Rows) -> fw.Network:
    """The teacher, trained the first time."""
    path = WORK / f"{name}.fw"
    if path.exists():
        return fw.load(path)
    torch.manual_seed(0)
    start = time.process_time()
    untrained = fw.capture(part.teacher().eval(), part.example)
    teacher = part.long.fit(untrained, task, Context(workdir=WORK / name))
    rows.add(f"{name} teacher", row(teacher, task, start, epochs=part.long.epochs))
    path.parent.mkdir(parents=True, exist_ok=True)
    teacher.save(path)
    return teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--epochs", type=int, help="of the students, in place of those of the table")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--bccd", type=Path, help="the folder with Annotations, ImageSets and JPEGImages")
    parser.add_argument("--snippets", type=Path, help="the source archive of vaderSentiment")
    given = parser.parse_args()
    needed = {"detection": "bccd", "text": "snippets"}.get(given.part)
    if needed and getattr(given, needed) is None:
        parser.error(f"{given.part} needs --{needed}")
    part, rows = PARTS[given.part], Rows("distillation_beyond.json")
    if given.epochs is not None:
        part = dataclasses.replace(part, short=dataclasses.replace(part.short, epochs=given.epochs))
    task = part.task(given)
    teacher = taught(part, given.part, task, rows)
    for seed in given.seeds:
        for arm, beside in part.arms.items():
            name = f"{given.part} {part.short.epochs} epochs {arm}, seed {seed}"
            if name in rows:
                continue
            torch.manual_seed(seed)
            start = time.process_time()
            context = Context(original=teacher, workdir=WORK / name.replace(" ", "_").replace(",", ""), seed=seed)
            made = dataclasses.replace(part.short, beside=beside).fit(part.student(teacher), task, context)
            rows.add(name, row(made, task, start, arm=arm, seed=seed, epochs=part.short.epochs))
            print(f"{name:48s} validation {rows[name]['validation']:6.2f} test {rows[name]['test']:6.2f}", flush=True)


if __name__ == "__main__":
    main()
