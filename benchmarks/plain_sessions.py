"""ResNet-20 and ResNet-56 on CIFAR-10: float and int8 files in plain sessions, with VNNI and without.

    python benchmarks/plain_sessions.py --checkpoints FOLDER [--depths 20 56]
    python benchmarks/without_vnni benchmarks/plain_sessions.py --checkpoints FOLDER

The second line runs the same on a processor that says it has no VNNI (``without_vnni``). Files are opened as whoever
deploys them does: ``onnxruntime.InferenceSession(path)``, ``openvino.Core().compile_model(path)``. 1,024 training
images calibrate; each row reads the test split once. Rows in benchmarks/results/plain_sessions.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import Rows

import featherweight as fw
from featherweight import deploy

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples/cifar10_resnet56"))
import cifar10  # noqa: E402

FILES = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}
IMAGES, BATCH = 1024, 100
#: what is exported; None: the float network
STEPS: dict[str, dict[str, Any] | None] = {"float": None, "int8": {}, "int8, device=vnni": {"device": "vnni"}}


def onnxruntime_call(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def openvino_call(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import openvino

    compiled = openvino.Core().compile_model(str(path))
    return lambda x: compiled([x])[0]


OPEN = {"onnxruntime": onnxruntime_call, "openvino": openvino_call}


def top1(call: Callable[[np.ndarray], np.ndarray], task: fw.Task) -> float:
    right = total = 0
    for x, wanted in task.batches("test"):
        for part, labels in zip(x.split(BATCH), wanted.split(BATCH), strict=True):
            right += int((call(part.numpy()).argmax(1) == labels.numpy()).sum())
            total += len(labels)
    return 100 * right / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--depths", type=int, nargs="+", default=list(FILES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    task, rows = cifar10.task(calibration_images=IMAGES), Rows("plain_sessions.json")
    kind = "without VNNI" if deploy.saturates() else "with VNNI"
    for depth in given.depths:
        network = cifar10.network(depth, str(given.checkpoints / FILES[depth]))
        for runtime, open_file in OPEN.items():
            target = deploy.target(runtime)
            for step, options in STEPS.items():
                name = f"ResNet-{depth} {runtime} {step} {kind}"
                if name in rows:
                    continue
                made = network if options is None else fw.quantize.Quantize(target=runtime, **options).plan(
                    network, task).apply(network)
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder, f"net{target.suffix}")
                    size = target.export(made, path)
                    row = {"top1": top1(open_file(path), task), "bytes": size, "saturates": deploy.saturates(),
                           "images": IMAGES, "versions": dict(target.load(path, like=made.signature).versions)}
                rows.add(name, row)
                print(f"{name:55} {row['top1']:.2f} %", flush=True)


if __name__ == "__main__":
    main()
