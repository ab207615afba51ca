"""Our int8 file against the one ONNX Runtime's own static quantizer makes from the same float file: size and speed.

    python benchmarks/int8_speed.py [--models resnet18 mobilenet_v2] [--rounds 60] [--threads 1]

Needs torchvision (for the models; random weights, batch-norm statistics drawn at random). Both files come from the same
float ONNX export and the same calibration inputs. They run in one process, in shuffled order every round; the ratio of
medians (theirs / ours, above 1 means ours is faster) is what counts. Writes benchmarks/results/int8_speed.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import torchvision
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

import featherweight as fw
from featherweight import deploy
from featherweight.quantize import Quantize

RESULTS = Path(__file__).parent / "results/int8_speed.json"
SEED = 0


def model(name: str) -> nn.Module:
    torch.manual_seed(SEED)
    found: nn.Module = torchvision.models.get_model(name, weights=None)
    for module in found.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
    return found.eval()


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, name: str, inputs: list[torch.Tensor]) -> None:
        self.left = iter([{name: x.numpy()} for x in inputs])

    def get_next(self) -> Any:
        return next(self.left, None)


def theirs(source: Path, folder: Path, inputs: list[torch.Tensor]) -> Path:
    """The runtime's own quantizer, with its own preprocessing: per channel, QDQ, uint8 values, int8 weights."""
    prepared, quantized = folder / "prepared.onnx", folder / "theirs.onnx"
    quant_pre_process(str(source), str(prepared))
    name = onnxruntime.InferenceSession(str(prepared)).get_inputs()[0].name
    quantize_static(str(prepared), str(quantized), Reader(name, inputs), quant_format=QuantFormat.QDQ, per_channel=True,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
    return quantized


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


Times = dict[str, list[tuple[float, float]]]


def race(files: dict[str, Path], x: np.ndarray, rounds: int, threads: int) -> Times:
    """Name -> milliseconds of every round, by the wall clock and of the calling thread's processor time.

    Each round runs all of them, in a fresh order."""
    sessions = {name: session(path, threads) for name, path in files.items()}
    feeds = {name: {s.get_inputs()[0].name: x} for name, s in sessions.items()}
    order = list(files)
    times: Times = {name: [] for name in files}
    shuffler = random.Random(SEED)
    for turn in range(rounds + 5):
        shuffler.shuffle(order)
        for name in order:
            sessions[name].run(None, feeds[name])  # its weights back into the caches
            start = time.perf_counter(), time.thread_time()
            sessions[name].run(None, feeds[name])
            if turn >= 5:
                times[name].append((1e3 * (time.perf_counter() - start[0]), 1e3 * (time.thread_time() - start[1])))
    return times


def figures(values: list[tuple[float, float]]) -> dict[str, float]:
    low, middle, high = statistics.quantiles([wall for wall, _ in values], n=4)
    return {"median_ms": middle, "q1_ms": low, "q3_ms": high,
            "cpu_median_ms": statistics.median(cpu for _, cpu in values)}


def compare(name: str, rounds: int, threads: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(SEED)
    inputs = [torch.randn(4, 3, 224, 224, generator=generator) for _ in range(4)]
    network = fw.capture(model(name), inputs[0])
    target = deploy.target("onnxruntime")
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        files = {"float": folder / "float.onnx", "ours": folder / "ours.onnx"}
        target.export(network, files["float"])
        plan = Quantize().plan(network, fw.Task(calibration=lambda: ((x, None) for x in inputs)))
        target.export(plan.apply(network), files["ours"])
        files["theirs"] = theirs(files["float"], folder, inputs)
        times = race(files, inputs[0][:1].numpy(), rounds, threads)
        found: dict[str, Any] = {kind: {**figures(times[kind]), "bytes": path.stat().st_size}
                                 for kind, path in files.items()}
        found["ratio_theirs_to_ours"] = found["theirs"]["median_ms"] / found["ours"]["median_ms"]
        # with one thread, processor time is what other processes on the machine disturb least
        found["cpu_ratio_theirs_to_ours"] = found["theirs"]["cpu_median_ms"] / found["ours"]["cpu_median_ms"]
        found["speedup_over_float"] = found["float"]["median_ms"] / found["ours"]["median_ms"]
        expected = session(files["float"], threads).run(None, {"x": inputs[0].numpy()})[0]
        for kind in ("ours", "theirs"):
            run = session(files[kind], threads)
            got = run.run(None, {run.get_inputs()[0].name: inputs[0].numpy()})[0]
            found[kind]["relative_error"] = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "input": [1, 3, 224, 224], "threads": options.threads, "rounds": options.rounds, "seed": SEED,
        "device": processor(), "versions": {"python": platform.python_version(), "torch": torch.__version__,
                                            "torchvision": torchvision.__version__,
                                            "onnxruntime": onnxruntime.__version__, "featherweight": fw.__version__},
        "models": {}}
    for name in options.models:
        found = result["models"][name] = compare(name, options.rounds, options.threads)
        print(f"{name}: float {found['float']['median_ms']:.2f} ms, ours {found['ours']['median_ms']:.2f} ms, theirs "
              f"{found['theirs']['median_ms']:.2f} ms, theirs / ours {found['ratio_theirs_to_ours']:.3f} "
              f"(processor time {found['cpu_ratio_theirs_to_ours']:.3f}); bytes ours "
              f"{found['ours']['bytes']}, theirs {found['theirs']['bytes']}")
    RESULTS.parent.mkdir(exist_ok=True)
    part = RESULTS.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(RESULTS)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
