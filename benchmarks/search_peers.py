"""The fastest ResNet-20 that ``fw.search`` found, beside a peer's int8 and Torch-Pruning with the peer's int8.

    python benchmarks/search_peers.py --checkpoints FOLDER [openvino | onnxruntime]

The peer in OpenVINO is NNCF, in ONNX Runtime Olive (its ``OnnxStaticQuantization``), both with their defaults. After
``search.py "fast openvino" fast``, whose files in out/search are taken; needs openvino and nncf, or olive-ai and
requests, and torch-pruning.
All start from the same weights and calibrate on the same 512 training images. Torch-Pruning cuts the inner channels of
every block (``beside_torch_pruning.py``), batch norm is estimated again, and the peer rounds; of the cuts, the mildest
is taken with which that takes no longer than ours. One thread, batch 1, all files in turn in one process. The test
images are scored once a file. Rows go into benchmarks/results/search_peers.json.

Nothing is trained.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from beside_torch_pruning import Bench, cifar10
from rows import Rows
from search import WORK
from torch import Tensor

import featherweight as fw
from featherweight import deploy

#: times fewer MACs of the inner channels that are tried
CUTS = (1.1, 1.2, 1.3, 1.5, 1.8, 2.1, 2.5, 3.0, 4.0)
IMAGES, SECONDS = 512, 2.0


def by_nncf(file: Path, images: Tensor) -> Path:
    import nncf
    import openvino

    made = file.with_name(f"{file.stem}_int8.xml")
    few = nncf.Dataset([image.numpy() for image in images.split(1)])
    openvino.save_model(nncf.quantize(openvino.Core().read_model(file), few), made, compress_to_fp16=False)
    return made


def by_olive(file: Path, images: Tensor) -> Path:
    from olive import run
    from olive.data.registry import Registry

    Registry.register_dataset("images")(lambda **options: [({"x": image.numpy()}, 0) for image in images])
    folder = file.with_name(f"{file.stem}_int8")
    run({"input_model": {"type": "ONNXModel", "model_path": str(file)},
         "data_configs": [{"name": "few", "load_dataset_config": {"type": "images"},
                           "dataloader_config": {"batch_size": 1}}],
         "passes": {"rounded": {"type": "OnnxStaticQuantization", "data_config": "few"}},
         "output_dir": str(folder), "cache_dir": str(folder / "cache")})
    return folder / "model.onnx"


def in_openvino(file: Path) -> Callable[[Tensor], Tensor]:
    from featherweight.deploy.openvino.target import core, options

    request = core().compile_model(core().read_model(file), "CPU", options(1, "f32")).create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.numpy()], share_inputs=True)[0].copy())


def in_onnxruntime(file: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options)
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@dataclass(frozen=True)
class Rival:
    """A peer in its runtime. int8: its default int8 of a deployed file. run: a file in a plain session."""

    name: str
    runtime: str
    int8: Callable[[Path, Tensor], Path]
    run: Callable[[Path], Callable[[Tensor], Tensor]]

    def rounded(self, network: fw.Network, task: fw.Task, file: Path) -> Path:
        deploy.target(self.runtime).export(network, file)
        return self.int8(file, torch.cat([x for x, _ in task.batches("calibration")]))


RIVALS = {"openvino": Rival("NNCF", "openvino", by_nncf, in_openvino),
          "onnxruntime": Rival("Olive", "onnxruntime", by_olive, in_onnxruntime)}


def shares(rival: Rival, files: Mapping[str, Path]) -> dict[str, float]:
    """What each file takes of the first one's seconds, in the same rounds."""
    image = next(iter(cifar10.task().batches("validation")))[0][:1]
    calls = {name: partial(rival.run(file), image) for name, file in files.items()}
    timed = fw.measure.interleave(calls, seconds=SECONDS, threads=1, batch=1, runtime=rival.runtime)
    first = next(iter(timed.values())).median_s
    return {name: taken.median_s / first for name, taken in timed.items()}


def top1(call: Callable[[Tensor], Tensor], task: fw.Task) -> float:
    right = [(call(x).argmax(1) == y).float() for x, y in task.batches("test")]
    return 100 * float(torch.cat(right).mean())


def race(rival: Rival, bench: Bench, folder: Path) -> None:
    """Ours beside one peer, as rows."""
    task, rows = cifar10.task(calibration_images=IMAGES), Rows("search_peers.json")
    target = deploy.target(rival.runtime)
    words = "" if rival.runtime == "openvino" else f", {rival.runtime}"
    files = {"float": folder / f"float{target.suffix}", "ours": WORK / rival.runtime / f"model{target.suffix}"}
    whole = bench.original(20)
    target.export(whole, files["float"])
    files[rival.name] = rival.rounded(whole, task, folder / f"whole{target.suffix}")
    ours = shares(rival, files)["ours"]
    for fewer in CUTS:
        cut = bench.theirs(20, fewer, False)
        name, file = f"Torch-Pruning {fewer}x and {rival.name}", folder / f"cut{fewer}{target.suffix}"
        pair = {**files, name: rival.rounded(bench.normed(cut), task, file)}
        share = shares(rival, pair)[name]
        print(name, share, "ours", ours, flush=True)
        if share <= ours:
            break
    for name, share in shares(rival, pair).items():
        row = f"{name}{words}"
        rows.add(row, {"top1": top1(rival.run(pair[name]), task), "latency": share, "calibration_images": IMAGES,
                       "bytes": sum(f.stat().st_size for f in target.files(pair[name]))})
        print(row, rows[row], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtimes", nargs="*", metavar="RUNTIME", help=", ".join(RIVALS))
    parser.add_argument("--checkpoints", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for runtime in given.runtimes or RIVALS:
        with tempfile.TemporaryDirectory() as folder:
            race(RIVALS[runtime], Bench(given.checkpoints), Path(folder))


if __name__ == "__main__":
    main()
