"""A MobileNet-style network that plain W8A8 wrecks, and what ``balance.Ladder`` makes of it, choosing by itself.

    python benchmarks/ladder.py [--epochs 8]

The network (inverted residuals, depthwise, swish) is trained here on CIFAR-10 with batch-norm scales drawn between 2^-5
and 2^5, which stay about there: within one value some channels are a thousand times as large as others, and one grid
serves them badly. plain: ``Quantize()``, min-max. theirs: ONNX Runtime's ``quantize_static`` on the same float file.
ladder: ``Ladder(score_drop=1.0)`` on 5,000 images kept from training. All are scored as files in ONNX Runtime on the
test split, once, in benchmarks/results/ladder.json; a row that is there is not measured again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peers import by_onnxruntime
from rows import Rows
from torch import Tensor, nn

import featherweight as fw
from featherweight import deploy
from featherweight.deploy.onnx.onnxruntime import inference_session
from featherweight.steps import Context

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples/cifar10_resnet56"))
import cifar10  # noqa: E402

WORK = HERE.parent / "out/ladder"
SEED = 0
SPREAD = 5.0  #: powers of two, to either side, of the scales


class Block(nn.Module):
    """Widens fourfold by a 1x1 convolution, 3x3 depthwise, narrows by a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 4 * inputs
        self.up, self.up_norm = nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.deep = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.deep_norm = nn.BatchNorm2d(wide)
        self.down, self.down_norm = nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.same = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.up_norm(self.up(x)))
        y = self.down_norm(self.down(F.silu(self.deep_norm(self.deep(y)))))
        return x + y if self.same else y


def mobile() -> nn.Module:
    torch.manual_seed(SEED)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU(),
        Block(16, 24, 2), Block(24, 24, 1), Block(24, 40, 2), Block(40, 40, 1), Block(40, 64, 1), Block(64, 64, 1),
        nn.Conv2d(64, 256, 1, bias=False), nn.BatchNorm2d(256), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(256, 10))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.copy_(2 ** torch.empty_like(module.weight).uniform_(-SPREAD, SPREAD))
    return net


def trained(task: fw.Task, epochs: int) -> fw.Network:
    file = WORK / f"mobile_{epochs}.fw"
    if not file.exists():
        network = fw.capture(mobile().eval(), torch.zeros(2, 3, 32, 32))
        step = fw.recover.Train(epochs=epochs, lr=0.05, schedule="onecycle", autocast="bf16", channels_last=True,
                                clip=5.0, decay_vectors=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        step.fit(network, task, Context(workdir=WORK / f"training_{epochs}", seed=SEED)).save(file)
    loaded = fw.load(file)
    assert isinstance(loaded, fw.Network)
    return loaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    given = parser.parse_args()
    task, rows, runtime = cifar10.task(), Rows("ladder.json"), deploy.target("onnxruntime")
    base = trained(task, given.epochs)

    def scored(predict: Callable[[Tensor], Any]) -> float:
        return float(task.score(predict, task.batches("test")))  # type: ignore[misc]

    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)

        def deployed(name: str, network: fw.Network, **facts: Any) -> None:
            file = folder / f"{name}.onnx"
            size = runtime.export(network, file)
            rows.add(name, {"top1": scored(runtime.load(file, like=network.signature)), "file_bytes": size,
                            "seed": SEED, "epochs": given.epochs, **facts})
            print(f"{name:10s} {rows[name]['top1']:6.2f} %  {size} B", flush=True)

        if "float" not in rows:
            deployed("float", base)
        if "plain" not in rows:
            deployed("plain", fw.quantize.Quantize().plan(base, task).apply(base))
        if "theirs" not in rows:
            runtime.export(base, folder / "source.onnx")
            made = by_onnxruntime(folder / "source.onnx", folder, [x for x, _ in task.batches("calibration")])
            ready = inference_session(made, 1)
            name = ready.get_inputs()[0].name
            rows.add("theirs", {"top1": scored(lambda x: torch.from_numpy(ready.run(None, {name: x.numpy()})[0])),
                                "file_bytes": made.stat().st_size, "seed": SEED, "epochs": given.epochs})
            print(f"theirs     {rows['theirs']['top1']:6.2f} %", flush=True)
        if "ladder" not in rows:
            plan = fw.balance.Ladder(score_drop=1.0).plan(base, task)
            print(plan, flush=True)
            deployed("ladder", plan.apply(base), plan=str(plan).splitlines())


if __name__ == "__main__":
    main()
