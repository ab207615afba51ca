"""The fastest ResNet-20 that ``fw.search`` found in OpenVINO, beside NNCF's int8 and Torch-Pruning with NNCF's int8.

    python benchmarks/search_peers.py --checkpoints FOLDER

After ``search.py "fast openvino"``, whose file in out/search/openvino is taken; needs openvino, nncf and torch-pruning.
All start from the same weights, calibrate on the same 512 training images, and are trained no more. Torch-Pruning cuts
the inner channels of every block (``beside_torch_pruning.py``), batch norm is estimated again, and NNCF rounds; of the
cuts, the mildest is taken with which that takes no longer than ours. One thread, batch 1, all files in turn in one
process. The test images are scored once a file. Rows go into benchmarks/results/search_peers.json.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import nncf
import openvino
import torch
from beside_torch_pruning import FILES, Bench, cifar10
from rows import Rows
from search import WORK
from torch import Tensor

import featherweight as fw
from featherweight import deploy
from featherweight.deploy.openvino.target import core, options

#: times fewer MACs of the inner channels that are tried
CUTS = (1.1, 1.2, 1.3, 1.5, 1.8, 2.1, 2.5, 3.0, 4.0)
IMAGES, SECONDS = 512, 2.0
TARGET = deploy.target("openvino")


def rounded(network: fw.Network, task: fw.Task, file: Path) -> Path:
    """NNCF's default int8 of a network."""
    TARGET.export(network, file)
    images = [x.numpy() for x, _ in task.batches("calibration")]
    made = file.with_name(f"{file.stem}_int8.xml")
    openvino.save_model(nncf.quantize(core().read_model(file), nncf.Dataset(images)), made, compress_to_fp16=False)
    return made


def run(file: Path) -> Callable[[Tensor], Tensor]:
    """The file in a plain session: its outputs."""
    request = core().compile_model(core().read_model(file), "CPU", options(1, "f32")).create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.numpy()], share_inputs=True)[0].copy())


def shares(files: Mapping[str, Path]) -> dict[str, float]:
    """What each file takes of the first one's seconds, in the same rounds."""
    image = next(iter(cifar10.task().batches("validation")))[0][:1]
    calls = {name: partial(run(file), image) for name, file in files.items()}
    timed = fw.measure.interleave(calls, seconds=SECONDS, threads=1, batch=1, runtime="openvino")
    first = next(iter(timed.values())).median_s
    return {name: taken.median_s / first for name, taken in timed.items()}


def top1(file: Path, task: fw.Task) -> float:
    infer = run(file)
    right = [(infer(x).argmax(1) == y).float() for x, y in task.batches("test")]
    return 100 * float(torch.cat(right).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows, task, bench = Rows("search_peers.json"), cifar10.task(calibration_images=IMAGES), Bench(given.checkpoints)
    whole = cifar10.network(20, str(given.checkpoints / FILES[20]))
    with tempfile.TemporaryDirectory() as folder:
        files = {"float": Path(folder, "float.xml"), "ours": WORK / "openvino/model.xml"}
        TARGET.export(whole, files["float"])
        files["NNCF"] = rounded(whole, task, Path(folder, "whole.xml"))
        ours = shares(files)["ours"]
        for fewer in CUTS:
            cut = bench.normed(bench.theirs(20, fewer, False))
            name = f"Torch-Pruning {fewer}x and NNCF"
            pair = {**files, name: rounded(cut, task, Path(folder, f"cut{fewer}.xml"))}
            share = shares(pair)[name]
            print(name, share, "ours", ours, flush=True)
            if share <= ours:
                break
        for name, share in shares(pair).items():
            rows.add(name, {"top1": top1(pair[name], task), "latency": share, "calibration_images": IMAGES,
                            "bytes": sum(f.stat().st_size for f in TARGET.files(pair[name]))})
            print(name, rows[name], flush=True)


if __name__ == "__main__":
    main()
