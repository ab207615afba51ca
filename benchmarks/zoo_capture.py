"""Captures one model of every torchvision family, and three detectors in parts.

    python benchmarks/zoo_capture.py [NAME ...] [--out benchmarks/results/zoo_capture.json]

Needs torchvision. For every model (random weights, unsettled batch statistics, evaluation mode): the capture's outputs
against the model's, on the examples, on another batch size and, for detectors, on images of other sizes; the same after
saving and loading, where the outputs must be equal bit for bit. Prints a table, writes the JSON file whole or not at
all (only when every model was asked for), and exits with 1 if any model fails.
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
import torchvision
from rows import Rows
from torch import Tensor, nn

import featherweight as fw

TOLERANCE = 1e-4  #: largest difference, relative to the largest output
SEED = 0
RESULTS = Path(__file__).parent / "results/zoo_capture.json"


@dataclass(frozen=True)
class Row:
    """How one model is made and fed. ``inputs(batch, size, seed)`` gives the positional inputs."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int, int, int], tuple[Any, ...]]
    size: int
    other_size: int | None = None  #: detectors: a second image size
    parts: bool = False


def images(batch: int, size: int, seed: int) -> tuple[Any, ...]:
    return (torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)),)


def clips(batch: int, size: int, seed: int) -> tuple[Any, ...]:
    return (torch.rand(batch, 3, 16, size, size, generator=torch.Generator().manual_seed(seed)),)


def pairs(batch: int, size: int, seed: int) -> tuple[Any, ...]:
    return images(batch, size, seed) + images(batch, size, seed + 1)


def photographs(batch: int, size: int, seed: int) -> tuple[Any, ...]:
    """A list of images of different sizes, as detectors take them."""
    generator = torch.Generator().manual_seed(seed)
    return ([torch.rand(3, size + 32 * i, size + 64, generator=generator) for i in range(batch)],)


def _named(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        options: dict[str, Any] = {"weights": None}
        if any(k in name for k in ("fcn", "deeplab", "lraspp", "retinanet", "rcnn", "fcos", "ssd")):
            options["weights_backbone"] = None
        if name in ("googlenet", "inception_v3"):
            options["init_weights"] = True
        if "_resnet50_fpn" in name:
            options |= {"min_size": 256, "max_size": 512}
        return torchvision.models.get_model(name, **options)

    return make


SIZES = {"inception_v3": 299, "swin_v2_t": 256, "fcn_resnet50": 128, "deeplabv3_mobilenet_v3_large": 128,
         "lraspp_mobilenet_v3_large": 128}
CLASSIFIERS = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnext50_32x4d",
    "shufflenet_v2_x1_0", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_16", "fcn_resnet50",
    "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large",
)
ROWS: dict[str, Row] = {name: Row(_named(name), images, SIZES.get(name, 224)) for name in CLASSIFIERS}
ROWS |= {
    "raft_small": Row(_named("raft_small"), pairs, 128),
    "r3d_18": Row(_named("r3d_18"), clips, 56),
    "mvit_v2_s": Row(_named("mvit_v2_s"), clips, 224),
    "retinanet_resnet50_fpn": Row(_named("retinanet_resnet50_fpn"), photographs, 128, 192, parts=True),
    "fasterrcnn_mobilenet_v3_large_320_fpn": Row(_named("fasterrcnn_mobilenet_v3_large_320_fpn"), photographs, 128, 192,
                                                 parts=True),
    "ssdlite320_mobilenet_v3_large": Row(_named("ssdlite320_mobilenet_v3_large"), photographs, 128, 192, parts=True),
}


def prepared(row: Row, seed: int = SEED) -> nn.Module:
    """The model with seeded weights and batch statistics that are not those of a fresh one."""
    torch.manual_seed(seed)
    model = row.make()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.8, 1.2)
    if row.parts:
        settle(model, row)
    return model.eval()


def settle(model: nn.Module, row: Row) -> None:
    """A detector of random weights finds nothing: loosen what it drops, so that boxes are there to compare."""
    for module in model.modules():
        for name in ("score_thresh", "detections_per_img"):
            if hasattr(module, name):
                setattr(module, name, 0.0 if name == "score_thresh" else 20)


def difference(wanted: Any, given: Any) -> float:
    """Largest difference relative to the largest value of each output; infinite where the nests or shapes differ."""
    a, spec_a = pytree.tree_flatten(wanted)
    b, spec_b = pytree.tree_flatten(given)
    if spec_a != spec_b:
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape or x.dtype != y.dtype or not bool(torch.isfinite(x).eq(torch.isfinite(y)).all()):
            return float("inf")
        if x.numel():
            worst = max(worst, float((x.double() - y.double()).abs().max() / x.double().abs().max().clamp_min(1e-12)))
    return worst


def same(wanted: Any, given: Any) -> bool:
    a, b = pytree.tree_leaves(wanted), pytree.tree_leaves(given)
    return len(a) == len(b) and all(isinstance(x, Tensor) and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def examine(name: str, row: Row, folder: Path) -> dict[str, Any]:
    """One model's figures."""
    model = prepared(row)
    example = row.inputs(2, row.size, 1)
    start = time.perf_counter()
    network = fw.capture(model, example)
    seconds = time.perf_counter() - start
    parts = list(network.parts) if isinstance(network, fw.Assembly) else []
    nodes = sum(len(n.calls()) for n in (network.parts.values() if isinstance(network, fw.Assembly) else [network]))
    feeds = {"examples": example, "batch 1": row.inputs(1, row.size, 2), "batch 3": row.inputs(3, row.size, 3)}
    if row.other_size is not None:
        feeds |= {"other size": row.inputs(2, row.other_size, 4)}
    differences, found = {}, {}
    with torch.no_grad():
        for feed, inputs in feeds.items():
            wanted = model(*inputs)
            found[feed] = network(*inputs)
            differences[feed] = difference(wanted, found[feed])
            if row.parts and not any(len(d["boxes"]) for d in wanted):
                raise AssertionError("the detector finds no boxes: nothing is compared")
        path = folder / f"{name}.fw"
        start = time.perf_counter()
        size = network.save(path)
        saved = time.perf_counter() - start
        start = time.perf_counter()
        loaded = fw.load(path, into=prepared(row, SEED + 1)) if parts else fw.load(path)
        reading = time.perf_counter() - start
        equal = all(same(found[feed], loaded(*inputs)) for feed, inputs in feeds.items())
        path.unlink()
    dynamic = all(n.signature.dynamic_batch for n in (network.parts.values() if parts else [network]))
    ok = max(differences.values()) <= TOLERANCE and equal and bool(parts) == row.parts and dynamic
    return {"ok": ok, "seconds": round(seconds, 2), "nodes": nodes, "bytes": size, "save_seconds": round(saved, 2),
            "load_seconds": round(reading, 2), "max_difference": max(differences.values()), "differences": differences,
            "loaded_equal": equal, "dynamic_batch": dynamic, "parts": parts, "notes": network.notes}


def versions() -> dict[str, str]:
    return {"featherweight": fw.__version__, "torch": torch.__version__, "torchvision": torchvision.__version__,
            "python": platform.python_version()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    unknown = [n for n in options.names if n not in ROWS]
    if unknown:
        parser.error(f"unknown models {unknown}; known: {', '.join(ROWS)}")
    names, rows, failed = options.names or list(ROWS), Rows(options.out.resolve()), []
    print(f"{'model':40} {'seconds':>8} {'nodes':>6} {'difference':>11} {'loaded':>7} {'batch':>6}  parts")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = examine(name, ROWS[name], Path(folder))
            except Exception as error:
                traceback.print_exc()
                row = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        failed += [] if row["ok"] else [name]
        if not options.names:
            rows.add(name, {**row, "threads": options.threads, "seed": SEED, "tolerance": TOLERANCE,
                            "versions": versions()})
        if "error" in row:
            print(f"{name:40} FAILED {row['error'][:400]}", flush=True)
        else:
            print(f"{name:40} {row['seconds']:8.2f} {row['nodes']:6} {row['max_difference']:11.1e} "
                  f"{'equal' if row['loaded_equal'] else 'DIFFERS':>7} "
                  f"{'any' if row['dynamic_batch'] else 'FIXED':>6}  "
                  f"{', '.join(row['parts'])}{'' if row['ok'] else '  FAILED'}", flush=True)
        gc.collect()
    print(f"{len(names) - len(failed)} of {len(names)} hold" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
