"""How much memory an export takes at most, and an int8 file from the float model on, beside other tools.

    python benchmarks/export_memory.py [NAME ...]

Needs torchvision and timm (random weights, nothing downloaded), OpenVINO and NNCF for their arms. Each arm is a process
of its own with one thread. ``peak_mb``: the most resident memory beyond what the process had when the model was made
and all packages were imported; ``seconds``: on the wall. "ours" captures and exports; "ours, int8" captures, quantizes
on 64 images and exports. Results go into benchmarks/results/export_memory.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers import by_onnxruntime
from rows import Rows
from torch import Tensor, nn
from zoo_prune import MARK

import featherweight as fw
from featherweight import deploy

IMAGES, BATCH = 64, 8
EXAMPLE = torch.zeros(2, 3, 224, 224)


def images() -> list[Tensor]:
    return [torch.rand(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(i)) for i in range(IMAGES // BATCH)]


def ours(model: nn.Module, folder: Path, target: str = "onnxruntime", small: bool = False) -> Path:
    network, runtime = fw.capture(model, EXAMPLE), deploy.target(target)
    assert isinstance(network, fw.Network)
    if small:
        task = fw.Task(calibration=lambda: ((x, None) for x in images()))
        network = fw.quantize.Quantize(target=target).plan(network, task).apply(network)
    path = folder / f"ours{runtime.suffix}"
    runtime.export(network, path)
    return path


def plain(model: nn.Module, folder: Path) -> Path:
    """torch's own exporter."""
    path = folder / "plain.onnx"
    free = ({0: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(model, (EXAMPLE,), path, dynamo=True, dynamic_shapes=free, external_data=False, verbose=False)
    return path


def by_nncf(model: nn.Module, folder: Path) -> Path:
    import nncf
    import openvino

    whole = openvino.convert_model(model, example_input=EXAMPLE)
    data = nncf.Dataset(images(), lambda x: x.numpy())
    path = folder / "nncf.xml"
    openvino.save_model(nncf.quantize(whole, data, subset_size=IMAGES // BATCH), path)
    return path


Arm = Callable[[nn.Module, Path], Path]
ARMS: dict[str, Arm] = {
    "float: torch's exporter": plain, "float: ours": ours,
    "int8: torch's exporter, ONNX Runtime's tool": lambda m, f: by_onnxruntime(plain(m, f), f, images()),
    "int8: ours": lambda m, f: ours(m, f, small=True),
    "int8 for OpenVINO: NNCF": by_nncf, "int8 for OpenVINO: ours": lambda m, f: ours(m, f, "openvino", True),
}


def resnet50() -> nn.Module:
    import torchvision

    return torchvision.models.resnet50(weights=None).eval()  # type: ignore[no-any-return]


def vit() -> nn.Module:
    import timm

    return timm.create_model("vit_small_patch16_224", pretrained=False).eval()  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {"resnet50": resnet50, "vit_small": vit}


def resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(model: str, arm: str) -> None:
    torch.set_num_threads(1)
    import onnx  # noqa: F401  (all arms have the same packages in memory before)
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    from torch.onnx import export  # noqa: F401

    made = MODELS[model]()
    before, start = resident(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = ARMS[arm](made, Path(folder))
        files = [f for f in (path, path.with_suffix(".bin")) if f.exists()]
        found = {"peak_mb": round(resident() - before), "before_mb": round(before),
                 "bytes": sum(f.stat().st_size for f in files),
                 "seconds": round(time.perf_counter() - start, 1)}
    print(MARK + json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    rows = Rows("export_memory.json")
    for model in options.names or MODELS:
        for arm in ARMS:
            name = f"{model}, {arm}"
            if name in rows:
                continue
            done = subprocess.run([sys.executable, __file__, "--child", model, arm], capture_output=True, text=True,
                                  check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
            row: dict[str, Any] = json.loads(lines[-1].removeprefix(MARK)) if lines else {
                "error": done.stderr.strip().splitlines()[-1][:300] if done.stderr.strip() else str(done.returncode)}
            print(name, row, flush=True)
            if "error" not in row:
                rows.add(name, row)


if __name__ == "__main__":
    main()
