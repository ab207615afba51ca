"""Speed of whole networks as chains of smaller layers: VGG-16, AlexNet, ResNet-50 at 224 pixels, a 768-wide encoder.

    python benchmarks/low_rank_speed.py [vgg16 alexnet resnet50 encoder]

One thread, batch 1, ONNX Runtime and OpenVINO, every form in turn beside the whole network. macs=0.4: the ranks that
leave 40 % of the MACs, by least squared error; classifiers stay (of VGG-16 and AlexNet the convolutions alone are run).
latency=0.5: the ranks (of "spatial" or, in the encoder, "svd") for half of the convolution and linear calls' latency by
the table of measured layers, whose seconds for the calls before and after are ``calls_s``.
The weights are random, with singular values that fall as j^-0.7, near those of trained layers: no score is told.

Needs torchvision. Two rows a network and runtime go into benchmarks/results/low_rank_speed.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from low_rank import timed
from rows import Rows
from torch import Tensor, nn

import featherweight as fw
from featherweight.factorize.times import LinkTimes

TARGETS = ("onnxruntime", "openvino")
FORMS = ("svd", "spatial", "tucker2", "auto")
HEADS = ("fc", "classifier")  #: stay as they are


def image(name: str) -> fw.Network:
    import torchvision

    model = torchvision.models.get_model(name, weights=None)
    return fw.capture(shaped(model.features if name in ("vgg16", "alexnet") else model), torch.randn(2, 3, 224, 224))


class Encoder(nn.Module):
    """Two layers of a transformer of the usual size, on 128 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def encoder() -> fw.Network:
    return fw.capture(shaped(Encoder()), torch.randn(2, 128, 768))


def shaped(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, the singular values of every matrix [o, i * k] falling as j^-0.7."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1 and weight.shape[0] > 1:
                u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
                falling = torch.arange(1.0, len(s) + 1) ** -0.7
                weight.copy_((u * (falling * s.norm() / falling.norm()) @ v).view(weight.shape))
    return model.eval()


NETWORKS: dict[str, Callable[[], fw.Network]] = {
    **{name: lambda name=name: image(name) for name in ("vgg16", "alexnet", "resnet50")}, "encoder": encoder}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help=", ".join(NETWORKS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows("low_rank_speed.json")
    for name in given.networks or NETWORKS:
        torch.manual_seed(0)
        whole = NETWORKS[name]()
        arms = {"whole": whole}
        for form in FORMS if name != "encoder" else FORMS[:1]:
            if all(f"{name} {target}" in rows for target in TARGETS):
                break
            step = fw.factorize.LowRank(macs=0.4, form=form, how="error", round_to=8, ignore=HEADS)
            arms[f"{form} macs=0.4"] = step.plan(whole, fw.Task()).apply(whole)
        for target in TARGETS:
            timed(rows, f"{name} {target}", arms, target)
        for target in TARGETS:
            gated(rows, f"{name} {target}, latency=0.5", whole, "svd" if name == "encoder" else "spatial", target)


def gated(rows: Rows, name: str, whole: fw.Network, form: str, target: str) -> None:
    """Half of the latency by the table of layers, and what that table says of the result."""
    if name in rows:
        return
    step = fw.factorize.LowRank(latency=0.5, form=form, how="error", round_to=32, target=target, ignore=HEADS)
    fast = step.plan(whole, fw.Task()).apply(whole)
    clock = LinkTimes.of(whole, target)
    calls = {"whole": clock.total(), "fast": clock.factorized(fast)}
    timed(rows, name, {"whole": whole, f"{form} latency=0.5": fast}, target, calls_s=calls)


if __name__ == "__main__":
    main()
