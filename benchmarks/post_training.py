"""ResNet-20 and ResNet-56 on CIFAR-10 quantized after training to 8, 4 and 3 bits, beside the runtimes' own quantizers.

    python benchmarks/post_training.py --checkpoints FOLDER [PART ...] [--depths 20 56] [--methods gptq ...]

eight: int8 weights, uint8 values, the file that ONNX Runtime runs. peers: ONNX Runtime's ``quantize_static`` (per
channel, QDQ) and NNCF's ``quantize`` (default, and accuracy-controlled on the validation split) from the same float
file and the same calibration images, each run in its own runtime. few: fewer bits, simulated exactly in PyTorch, by
every method of rounding. ladder: ``balance.Ladder`` for the same forms. "int4/uint8" reads weights/values; the first
and the last layer have 8 bits (``ends``), except in the rows that say so.

1,024 training images calibrate; choices were made on training images. Each row reads the test split once and goes into
benchmarks/results/post_training.json as soon as it is measured; one that is there is not run again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import Rows
from torch import Tensor

import featherweight as fw
from featherweight import deploy
from featherweight.deploy.onnx.onnxruntime import inference_session
from featherweight.quantize import Quantize

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples/cifar10_resnet56"))
import cifar10  # noqa: E402

FILES = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}
IMAGES = 1024
#: weights/values -> what may be lost, in points of top-1
WANTED = {"int4/uint8": 0.5, "int4/uint4": 2.0, "int3/uint8": 1.5, "int4/float": 0.3}
METHODS: dict[str, dict[str, Any]] = {
    "nearest, min-max": {"ranges": "minmax", "weight_ranges": "minmax"},
    "nearest": {},
    "nearest, bias corrected": {"correct_bias": True},
    "gptq": {"rounding": "gptq"},
    "gptq, first and last too": {"rounding": "gptq", "ends": None},
    "gptq, groups of 16": {"rounding": "gptq", "granularity": 16},
    "adaround": {"rounding": "adaround"},
    "blocks": {"rounding": "blocks"},
}
Predict = Callable[[Tensor], Tensor]


class Bench:
    def __init__(self, checkpoints: Path, depths: list[int], methods: list[str]) -> None:
        self.checkpoints, self.depths, self.methods = checkpoints, depths, methods
        self.task = cifar10.task(calibration_images=IMAGES)
        self.rows = Rows("post_training.json")

    def network(self, depth: int) -> fw.Network:
        return cifar10.network(depth, str(self.checkpoints / FILES[depth]))

    def score(self, predict: Any, split: str = "test") -> float:
        return float(self.task.score(predict, self.task.batches(split)))  # type: ignore[misc]

    def add(self, name: str, make: Callable[[], tuple[Any, dict[str, Any]]]) -> None:
        """``make`` gives what is scored, and facts about it."""
        if name in self.rows:
            return
        start = time.process_time()
        predict, facts = make()
        seconds = time.process_time() - start
        row = {"top1": self.score(predict), **facts, "processor_s": round(seconds, 1), "seed": 0, "images": IMAGES}
        self.rows.add(name, row)
        print(f"{name:60s} {row['top1']:6.2f} %  {seconds:7.1f} s", flush=True)

    def deployed(self, network: fw.Network) -> tuple[Any, dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            runtime, file = deploy.target("onnxruntime"), Path(folder, "net.onnx")
            size = runtime.export(network, file)
            return runtime.load(file, like=network.signature), {"file_bytes": size}

    # ---- parts
    def eight(self) -> None:
        for depth in self.depths:
            base = self.network(depth)
            self.add(f"resnet{depth} float", lambda b=base: self.deployed(b))
            for name, more in {"min-max": {}, "mse": {"ranges": "mse", "weight_ranges": "mse"}}.items():
                step = Quantize(**more)
                self.add(f"resnet{depth} int8/uint8 {name}",
                         lambda b=base, s=step: self.deployed(s.plan(b, self.task).apply(b)))

    def few(self) -> None:
        for depth in self.depths:
            base = self.network(depth)
            for form in WANTED:
                for name in self.methods:
                    self.add(f"resnet{depth} {form} {name}",
                             lambda b=base, f=form, m=METHODS[name]: self.simulated(b, f, m))

    def simulated(self, base: fw.Network, form: str, more: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        weights, _, values = form.partition("/")
        step = Quantize(weights, None if values == "float" else values, **more)
        made = step.plan(base, self.task).apply(base)
        with tempfile.TemporaryDirectory() as folder:
            size = made.save(Path(folder, "net.fw"))
        return made, {"network_bytes": size, "validation": self.score(made, "validation")}

    def ladder(self) -> None:
        for depth in self.depths:
            base = self.network(depth)
            for form, drop in {"int8/uint8": 0.1, **WANTED}.items():
                weights, _, values = form.partition("/")
                step = fw.balance.Ladder(Quantize(weights, None if values == "float" else values), score_drop=drop)

                def climb(b: fw.Network = base, s: Any = step) -> tuple[Any, dict[str, Any]]:
                    plan = s.plan(b, self.task)
                    return plan.apply(b), {"plan": str(plan).splitlines()[:20]}

                self.add(f"resnet{depth} {form} ladder", climb)

    # ---- peers
    def peers(self) -> None:
        for depth in self.depths:
            self.add(f"resnet{depth} quantize_static", lambda d=depth: self.by_onnxruntime(d))
            for control in (False, True):
                kind = "nncf, accuracy-controlled" if control else "nncf"
                self.add(f"resnet{depth} {kind}", lambda d=depth, c=control: self.by_nncf(d, c))

    def float_file(self, depth: int, folder: str, runtime: str) -> Path:
        target = deploy.target(runtime)
        file = Path(folder, f"float{target.suffix}")
        target.export(self.network(depth), file)
        return file

    def by_onnxruntime(self, depth: int) -> tuple[Predict, dict[str, Any]]:
        from peers import by_onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            inputs = [x for x, _ in self.task.batches("calibration")]
            made = by_onnxruntime(self.float_file(depth, folder, "onnxruntime"), Path(folder), inputs)
            ready, size = inference_session(made, 1), made.stat().st_size
        name = ready.get_inputs()[0].name
        return lambda x: torch.from_numpy(ready.run(None, {name: x.numpy()})[0]), {"file_bytes": size}

    def by_nncf(self, depth: int, control: bool) -> tuple[Predict, dict[str, Any]]:
        import nncf
        import openvino

        from featherweight.deploy.openvino.target import core, options

        with tempfile.TemporaryDirectory() as folder:
            model = core().read_model(self.float_file(depth, folder, "openvino"))
            calibration = nncf.Dataset([x.numpy() for x, _ in self.task.batches("calibration")])
            if control:
                held = list(self.task.batches("validation"))

                def accuracy(compiled: Any, data: Any) -> float:
                    hits = [np.mean(compiled([x])[0].argmax(1) == y) for x, y in data]
                    return float(np.mean(hits))

                made = nncf.quantize_with_accuracy_control(
                    model, calibration, nncf.Dataset([(x.numpy(), y.numpy()) for x, y in held]), accuracy,
                    max_drop=0.001)
            else:
                made = nncf.quantize(model, calibration)
            file = Path(folder, "theirs.xml")
            openvino.save_model(made, file, compress_to_fp16=False)
            size = sum(f.stat().st_size for f in deploy.target("openvino").files(file))
        ready = core().compile_model(made, "CPU", options(1, "f32"))
        return lambda x: torch.from_numpy(ready([x.numpy()])[0].copy()), {"file_bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--depths", type=int, nargs="+", default=list(FILES))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("parts", nargs="*", help="all of them if none is named")
    given = parser.parse_args()
    bench = Bench(given.checkpoints, given.depths, given.methods)
    parts = {"eight": bench.eight, "peers": bench.peers, "few": bench.few, "ladder": bench.ladder}
    for part in given.parts or parts:
        parts[part]()


if __name__ == "__main__":
    main()
