"""``featherweight demo``: the main job from a training to a report, on data that comes with scikit-learn."""

from __future__ import annotations

from pathlib import Path

import torch

from featherweight import distill, prune, quantize, recover
from featherweight.demo import digits
from featherweight.network import Network, capture
from featherweight.recipe import Job, Recipe, Result
from featherweight.recipe.apply import Progress
from featherweight.recipe.job import Data, Model, Options
from featherweight.steps import Context


def trained(epochs: int, progress: Progress) -> Network:
    """The demo's network, captured and trained."""
    task = digits.task()
    network = capture(digits.model(), digits.digits()["train"][0][:2])
    assert isinstance(network, Network)
    fit = recover.Train(epochs=epochs, lr=0.1, schedule="onecycle")
    return fit.fit(network, task, Context(progress=progress))


def recipe(epochs: int) -> Recipe:
    """About half the MACs cut, channels in eights; retrained with the original as its teacher; then eight bits."""
    return Recipe([
        prune.Channels(macs=0.5, round_to=8),
        recover.Train(epochs=epochs, lr=0.05, distill=distill.Logits(temperature=4.0)),
        quantize.Quantize(weights="int8", activations="uint8"),
    ])


def run(out: Path, quick: bool, progress: Progress) -> Result:
    """Trains, compresses, measures and writes everything into ``out``: the trained network as ``trained.fw``, and what
    ``Result.save`` writes; ``recipe.toml`` does the compression again. Always starts over."""
    digits.digits()  # says at once if scikit-learn is missing
    out.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a network is not faster on more, and far slower on busy ones
    try:
        progress("step 0: train the original", 0, 3, {})
        trained(4 if quick else 15, progress).save(out / "trained.fw")
        options = Options(out=out.as_posix(), seconds=0.2 if quick else 1.0)
        job = Job(Model(file=(out / "trained.fw").as_posix()), Data("featherweight.demo.digits:task"), options,
                  recipe(2 if quick else 8))
        return job.run(progress=progress, resume=False)
    finally:
        torch.set_num_threads(threads)
