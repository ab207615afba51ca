"""Float and int8 in ONNX Runtime and in OpenVINO, timed in the same rounds, beside each runtime's own quantizer.

    python benchmarks/int8_runtimes.py [--models resnet18 mobilenet_v2] [--rounds 60] [--threads 1]

Needs torchvision, scikit-learn, openvino and nncf. Every model gives six files from the same weights and calibration
images (crops of scikit-learn's two photographs): float, our int8 and the runtime's own int8 (``quantize_static``,
``nncf.quantize``) for either runtime. They run in one process, at batch one, in shuffled order every round. OpenVINO
computes floats in float32 in all of them. Every file is opened in a plain session, as where it is deployed; without
VNNI instructions sums of int8 products may saturate there (``saturates`` in the row). ``relative_error``:
of the outputs on crops not calibrated on, against the float network in PyTorch. The weights are random: scores would
say nothing. One row a model and number of threads in benchmarks/results/int8_runtimes.json.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import onnxruntime
import openvino
import torch
import torchvision
from peers import by_onnxruntime
from rows import Rows
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import featherweight as fw
from featherweight import deploy
from featherweight.deploy.onnx.onnxruntime import inference_session
from featherweight.deploy.openvino.target import core, options
from featherweight.deploy.processor import saturates
from featherweight.quantize import Quantize

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "vit_b_16", "encoder_base")
TRANSFORMERS = ("vit_b_16", "encoder_base")
CALIBRATED, COMPARED, BATCH = 32, 8, 8
SEED = 0


def network(name: str) -> nn.Module:
    """Random weights; batch norms get statistics and factors, and ViT's head weights (it has zeros at first)."""
    torch.manual_seed(SEED)
    if name == "encoder_base":  # BERT-base's shape
        layer = nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu", batch_first=True)
        return nn.TransformerEncoder(layer, 12, enable_nested_tensor=False).eval()
    found: nn.Module = torchvision.models.get_model(name, weights=None)
    for module in found.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    return found.eval()


def samples(name: str, count: int, seed: int) -> Tensor:
    """Crops of two photographs as classifiers get them; for the encoder, rows of normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    if name == "encoder_base":
        return torch.randn(count, 128, 768, generator=generator)
    found = []
    for _ in range(count):
        image = torch.tensor(load_sample_images().images[int(torch.randint(2, (), generator=generator))])
        side = int(torch.randint(160, 420, (), generator=generator))
        top, left = (int(torch.randint(edge - side, (), generator=generator)) for edge in image.shape[:2])
        crop = image[top:top + side, left:left + side].permute(2, 0, 1).float()[None] / 255
        found.append(nn.functional.interpolate(crop, size=(224, 224), mode="bilinear", antialias=True))
    mean, spread = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (torch.cat(found) - mean[:, None, None]) / spread[:, None, None]


def files(name: str, whole: fw.Network, inputs: list[Tensor], folder: Path) -> dict[str, Path]:
    """Contestant -> file. A quantizer that fails is told, and missing."""
    task = fw.Task(calibration=lambda: ((x, None) for x in inputs))
    found = {}
    for runtime in ("onnxruntime", "openvino"):
        target = deploy.target(runtime)
        for kind, net in (("float", whole), ("ours", Quantize(target=runtime).plan(whole, task).apply(whole))):
            found[f"{runtime} {kind}"] = folder / f"{runtime}_{kind}{target.suffix}"
            target.export(net, found[f"{runtime} {kind}"])
    peers: dict[str, Callable[[], Path]] = {
        "onnxruntime theirs": lambda: by_onnxruntime(found["onnxruntime float"], folder, inputs),
        "openvino theirs": lambda: by_nncf(name, found["openvino float"], folder, inputs)}
    for peer, make in peers.items():
        try:
            found[peer] = make()
        except Exception as error:
            print(f"{name}: {peer}: {type(error).__name__}: {error}")
    return found


def by_nncf(name: str, source: Path, folder: Path, inputs: list[Tensor]) -> Path:
    """NNCF's default post-training quantization, told where the model is a transformer."""
    kind = {"model_type": nncf.ModelType.TRANSFORMER} if name in TRANSFORMERS else {}
    found = nncf.quantize(core().read_model(source), nncf.Dataset([x.numpy() for x in inputs]), **kind)
    openvino.save_model(found, folder / "theirs.xml", compress_to_fp16=False)
    return folder / "theirs.xml"


Call = Callable[[np.ndarray], np.ndarray]


def loaded(file: Path, shape: tuple[int, ...], threads: int) -> tuple[Call, dict[str, int]]:
    """The file made ready for inputs of one shape, and for OpenVINO how many operators of which kind and number type
    it runs (those that only rename are left out)."""
    if file.suffix == ".onnx":
        ready = inference_session(file, threads)
        name = ready.get_inputs()[0].name
        return lambda x: ready.run(None, {name: x})[0], {}
    read = core().read_model(file)
    read.reshape(list(shape))
    compiled = core().compile_model(read, "CPU", options(threads, "f32"))
    request = compiled.create_infer_request()
    facts = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    kinds = Counter(f"{f['layerType'].astype(str)} {f['runtimePrecision'].astype(str)}" for f in facts)
    hidden = ("Input", "Output", "Const", "Reshape")
    return (lambda x: request.infer([x], share_inputs=True)[0],
            {k: n for k, n in sorted(kinds.items()) if not k.startswith(hidden)})


def race(calls: dict[str, Call], x: np.ndarray, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Contestant -> milliseconds of every round, by the wall clock and of the process's processor time."""
    order, shuffler = list(calls), random.Random(SEED)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(rounds + 5):
        shuffler.shuffle(order)
        for name in order:
            calls[name](x)  # its weights back into the caches
            start = time.perf_counter(), time.process_time()
            calls[name](x)
            if turn >= 5:
                times[name].append((1e3 * (time.perf_counter() - start[0]), 1e3 * (time.process_time() - start[1])))
    return times


def figures(values: list[tuple[float, float]]) -> dict[str, float]:
    low, middle, high = statistics.quantiles([wall for wall, _ in values], n=4)
    return {"median_ms": middle, "q1_ms": low, "q3_ms": high, "fastest_ms": min(wall for wall, _ in values),
            "cpu_median_ms": statistics.median(cpu for _, cpu in values)}


def compare(name: str, rounds: int, threads: int) -> dict[str, Any]:
    given = samples(name, CALIBRATED + COMPARED, SEED)
    inputs, others = list(given[:CALIBRATED].split(BATCH)), given[CALIBRATED:]
    module = network(name)
    whole = fw.capture(module, inputs[0])
    with torch.no_grad():
        wanted = module(others).numpy()
    with tempfile.TemporaryDirectory() as text:
        made = files(name, whole, inputs, Path(text))
        one = others[:1].numpy()
        ready = {kind: loaded(file, one.shape, threads) for kind, file in made.items()}
        times = race({kind: call for kind, (call, _) in ready.items()}, one, rounds)
        found: dict[str, Any] = {"threads": threads, "rounds": rounds, "saturates": saturates(),
                                 "versions": versions()}
        for kind, (call, kinds) in ready.items():
            got = np.concatenate([call(others[i:i + 1].numpy()) for i in range(len(others))])
            size = sum(f.stat().st_size for f in deploy.target(kind.partition(" ")[0]).files(made[kind]))
            found[kind] = {**figures(times[kind]), "bytes": size, "operators": kinds,
                           "relative_error": float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))}
    for runtime in ("onnxruntime", "openvino"):
        if f"{runtime} theirs" in times:
            pairs = zip(times[f"{runtime} theirs"], times[f"{runtime} ours"], strict=True)
            found[f"{runtime} theirs_to_ours"] = statistics.median(t[0] / o[0] for t, o in pairs)
    return found


def versions() -> dict[str, str]:
    return {"torchvision": torchvision.__version__, "onnxruntime": onnxruntime.__version__,
            "openvino": openvino.__version__.partition("-")[0], "nncf": nncf.__version__,
            "featherweight": fw.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows = Rows("int8_runtimes.json")
    for name in chosen.models:
        found = compare(name, chosen.rounds, chosen.threads)
        rows.add(f"{name} {chosen.threads}", found)
        for kind, row in found.items():
            if isinstance(row, dict) and "median_ms" in row:
                print(f"{name:20} {kind:20} {row['median_ms']:8.3f} ms (fastest {row['fastest_ms']:.3f}, processor "
                      f"{row['cpu_median_ms']:.3f}) {row['bytes']:>11} bytes  error {row['relative_error']:.4f}")
        print({k: round(v, 3) for k, v in found.items() if k.endswith("theirs_to_ours")})


if __name__ == "__main__":
    main()
