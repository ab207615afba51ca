"""Structured matrices, compact filters, transferred filters and hashed weights: each kind on a trained MNIST network.

    python benchmarks/filters.py [KIND ...]

Two small networks, trained for four epochs on 10,000 images of MNIST: 784-512-512-10, whose first two layers become
structured or hashed; and four convolutions of 3 x 3 (32 channels), of which all but the first become compact or
transferred. A row a kind has parameters, MACs, bytes in the archive (of weights that a graph makes of fewer numbers,
what is stored counts), the least processor seconds of a call in both runtimes (one thread, batch 1, all kinds in turn),
the squared relative error of the outputs of one layer (the second linear layer, the third convolution) on 512 images
at projection and after 60 steps of Adam on that layer alone, and the accuracy on the validation and test images at
projection and after one epoch of training, taught by the original's outputs.

Settings were fixed beforehand. Rows: results/filters.json; those of each network's original say "original".
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rows import Rows
from torch import Tensor, nn

import featherweight as fw
from featherweight import deploy, measure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples/deep_compression"))
import mnist  # noqa: E402

IMAGES, CALIBRATION, STEPS = 10_000, 512, 60
WORK = HERE.parent / "out/filters"
DENSE, FILTERS = "dense", "filters"
#: what stays as it is: the first layer's inputs, or the outputs
ENDS = {DENSE: ("5",), FILTERS: ("0", "9")}
LAYER = {DENSE: "3", FILTERS: "4"}
KINDS: dict[str, dict[str, fw.steps.Rewrite]] = {
    DENSE: {
        "low rank 16": fw.factorize.LowRank(ranks={"1": 16, "3": 16}, form="svd"),
        **{f"{form} 16": fw.factorize.Structured(form, blocks=16, ignore=ENDS[DENSE])
           for form in ("monarch", "kronecker", "circulant", "fourier")},
        "displaced 16": fw.factorize.Structured("displaced", blocks=16, terms=1, ignore=ENDS[DENSE]),
        "sparse 2 %, rank 8": fw.factorize.Structured("sparse", terms=8, share=0.02, ignore=ENDS[DENSE]),
        "monarch 16, data": fw.factorize.Structured("monarch", blocks=16, data=True, ignore=ENDS[DENSE]),
        "circulant 16, data": fw.factorize.Structured("circulant", blocks=16, data=True, ignore=ENDS[DENSE]),
        "hashed 1/8": fw.share.Hashed(share=1 / 8, ignore=ENDS[DENSE]),
        "hashed 1/64": fw.share.Hashed(share=1 / 64, ignore=ENDS[DENSE]),
        "blocks of 8, 8 bits": fw.share.BlockCodebook(size=8, bits=8, ignore=ENDS[DENSE]),
    },
    FILTERS: {
        "separable": fw.factorize.LowRank(ranks={"2": 1, "4": 1, "6": 1}, form="separable", min_gain=0.0),
        "squeeze": fw.factorize.LowRank(ranks={"2": 8, "4": 8, "6": 8}, form="squeeze", min_gain=0.0),
        **{f"{form}, data": fw.factorize.Compact(form, data=True, ignore=ENDS[FILTERS])
           for form in ("ghost", "fire", "shift")},
        **{f"{group} 1/4": fw.share.Transferred(group, share=0.25, ignore=ENDS[FILTERS])
           for group in ("scale", "dihedral")},
        "16 windows": fw.share.Transferred("dihedral", unit="window", windows=16, ignore=ENDS[FILTERS]),
        "blocks of 9, 6 bits": fw.share.BlockCodebook(size=9, bits=6, ignore=ENDS[FILTERS]),
    },
}


def fresh(network: str) -> nn.Module:
    torch.manual_seed(0)
    if network == DENSE:
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(),
                             nn.Linear(512, 10))
    return nn.Sequential(nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU(),
                         nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU(),
                         nn.Flatten(), nn.Linear(1568, 10))


def task() -> fw.Task:
    whole = mnist.task(batch=128)

    def train() -> Iterator[tuple[Tensor, Tensor]]:
        for n, batch in enumerate(whole.batches("train", None)):
            if n * 128 >= IMAGES:
                return
            yield batch

    return dataclasses.replace(whole, train=train, calibration=lambda: whole.batches("calibration", 2))


def trained(network: fw.Network, epochs: int, lr: float, teacher: fw.Network | None = None) -> fw.Network:
    beside = () if teacher is None else (fw.distill.Logits(temperature=2.0, weight=0.8),)
    return fw.recover.Train(epochs=epochs, lr=lr, weight_decay=1e-4, autocast="bf16", channels_last=True,
                            clip=1.0, beside=beside).fit(network, task(), fw.steps.Context(original=teacher))


def original(network: str) -> fw.Network:
    path = WORK / f"{network}.fw"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = fw.capture(fresh(network).eval(), torch.zeros(2, 1, 28, 28))
        trained(made, 4, 0.1).save(path)
    return fw.load(path)


def score(network: fw.Network, split: str) -> float:
    of = task()
    assert of.score is not None
    return float(of.score(network, of.batches(split)))


def layer_errors(whole: fw.Network, step: fw.steps.Rewrite, name: str) -> dict[str, float]:
    """Squared relative errors of one layer's outputs, as planned on the layer alone and after a short fit of it."""
    layer: nn.Module = getattr(fresh(DENSE if name == LAYER[DENSE] else FILTERS), name)
    layer.load_state_dict({part: whole.tensor(f"{name}.{part}").detach() for part in ("weight", "bias")})
    x = torch.cat([_inputs(whole, name, images) for images, _ in task().batches("calibration", 2)])[:CALIBRATION]
    inside = fw.capture(nn.Sequential(OrderedDict([(name, layer)])).eval(), x[:2])
    wanted = inside(x).detach()
    given = dataclasses.replace(step, data=False) if getattr(step, "data", False) else step
    small = given.plan(inside, fw.Task()).apply(inside)

    def error() -> Tensor:
        return (small(x) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()

    learned = [p for p in small.parameters() if p.requires_grad]
    first = float(error().detach())
    optimizer = torch.optim.Adam(learned, lr=2e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = error()
        loss.backward()
        optimizer.step()
    return {"output_error": first, "output_error_fitted": float(error().detach())}


def _inputs(whole: fw.Network, name: str, images: Tensor) -> Tensor:
    """What the layer called ``name`` reads."""
    call = next(c for c in whole.calls() if len(c.args) > 1 and str(getattr(c.args[1], "target", "")) ==
                f"{name}.weight")
    found: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        found.append(value.detach())
        return value

    remove = whole.add_tap(call.args[0].name, keep)  # type: ignore[union-attr]
    with torch.no_grad():
        whole(images)
    remove()
    return found[0]


def seconds(networks: dict[str, fw.Network], target: str) -> dict[str, float]:
    """The least processor seconds of a call of each, in turn, one thread, one image."""
    runtime, least, x = deploy.target(target), dict.fromkeys(networks, 1e9), torch.randn(1, 1, 28, 28)
    with tempfile.TemporaryDirectory() as folder:
        runners = {}
        for i, (name, network) in enumerate(networks.items()):
            file = Path(folder) / f"{i}{runtime.suffix}"
            runtime.export(network, file)
            runners[name] = runtime.load(file, 1, like=network.signature)
        for _ in range(60):
            for name, runner in runners.items():
                runner(x)
                began = time.process_time()
                for _ in range(10):
                    runner(x)
                least[name] = min(least[name], (time.process_time() - began) / 10)
        for runner in runners.values():
            runner.close()
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="; ".join(k for kinds in KINDS.values() for k in kinds))
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows("filters.json")
    for network, kinds in KINDS.items():
        wanted = [k for k in kinds if (not given.kinds or k in given.kinds) and f"{network}: {k}" not in rows]
        if not wanted:
            continue
        whole = original(network)
        plans = {kind: kinds[kind].plan(whole, task()) for kind in wanted}
        small = {kind: plan.apply(whole) for kind, plan in plans.items()}
        times = {target: seconds({"original": whole, **small}, target) for target in ("onnxruntime", "openvino")}
        for kind, net in {"original": whole, **small}.items():
            tuned = net if kind == "original" else trained(net, 1, 0.05, whole)
            row: dict[str, Any] = {
                "network": network, "kind": kind, "params": sum(p.numel() for p in tuned.parameters()),
                "macs": measure.macs(net).total, "archive_bytes": fw.codec.archive_bytes(tuned),
                **{f"{target}_s": found[kind] for target, found in times.items()},
                **({} if kind == "original" else layer_errors(whole, kinds[kind], LAYER[network])),
                "validation_at_once": score(net, "validation"), "validation": score(tuned, "validation"),
                "test_error_at_once": 100 - score(net, "test"), "test_error": 100 - score(tuned, "test")}
            rows.add(f"{network}: {kind}", row)
            print(f"{network}: {kind}", row, flush=True)


if __name__ == "__main__":
    main()
