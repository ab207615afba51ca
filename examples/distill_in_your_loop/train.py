"""Distillation in a training loop of one's own: a plain PyTorch loop, a cut student, a teacher that is not captured.

    python examples/distill_in_your_loop/train.py

A small network is trained on a made-up task, then cut to a tenth of its MACs and trained again in the same plain loop:
alone, taught by the outputs of the original module (not captured, and it may lie on another device), and taught by the
activations of the captured original as well, kept channels compared directly.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import featherweight as fw
from featherweight.steps import Beside

torch.manual_seed(0)
BATCHES, BATCH, CLASSES = 40, 64, 6


def data(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Images [64, 1, 8, 8] whose class is where most of their smoothed noise lies."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, BATCH, 1, 8, 8, generator=generator)
    parts = nn.functional.avg_pool2d(images.flatten(0, 1), (4, 3)).flatten(1)[:, :CLASSES - 2]
    rest = images.flatten(0, 1)[:, 0, :, 6:].mean(2)[:, :2]
    classes = torch.cat([parts, rest], 1).argmax(1)
    return list(zip(images, classes.view(count, BATCH), strict=True))


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
                         nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(24 * 16, CLASSES))


def accuracy(predict: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    predict.eval()
    with torch.no_grad():
        return 100 * sum(float((predict(x).argmax(1) == y).float().mean()) for x, y in batches) / len(batches)


def train(network: fw.Network, batches: list[tuple[Tensor, Tensor]], beside: tuple[Beside, ...] = (),
          original: fw.Network | None = None, plan: fw.steps.Plan | None = None, epochs: int = 2) -> fw.Network:
    """The loop that anybody would write; ``attached`` adds what works beside it."""
    network = network.copy().train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    attached = fw.recover.attach(network, fw.Task(loss=cross_entropy), beside, steps=epochs * len(batches),
                                 optimizer=optimizer, original=original, plans=() if plan is None else (plan,))
    for _ in range(epochs):
        for images, classes in batches:
            optimizer.zero_grad()
            attached.loss(images, network(images), classes).backward()
            optimizer.step()
    return attached.finish()


def main() -> dict[str, float]:
    """Accuracy in % of each way on fresh data."""
    torch.set_num_threads(1)
    batches, fresh = data(BATCHES, 1), data(10, 2)
    original = train(fw.capture(model().eval(), batches[0][0][:2]), batches, epochs=4)
    module = model()  # the same network as a plain module, not captured
    module.load_state_dict({name: tensor.detach().clone() for name, tensor in original.state_dict().items()})
    plan = fw.prune.Channels(macs=0.1).plan(original, fw.Task())
    small = plan.apply(original)
    logits = fw.distill.Logits(weight=0.5, teacher=module)
    found = {
        "original": original,
        "cut": small,
        "trained alone": train(small, batches),
        "taught by outputs": train(small, batches, (logits,)),
        "and by activations": train(small, batches, (logits, fw.distill.Features(taps="layers")), original, plan)}
    return {name: accuracy(network, fresh) for name, network in found.items()}


if __name__ == "__main__":
    for name, score in main().items():
        print(f"{name:20s} {score:5.1f} %")
