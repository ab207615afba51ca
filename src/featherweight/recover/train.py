"""``Train``: fine-tuning as a Fit, with a teacher beside it or rewrites driven during it, that survives a kill."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from featherweight.errors import RecipeError
from featherweight.network import Network
from featherweight.network.edit import WEIGHTED, weight_name
from featherweight.recover.optimizers import OPTIMIZERS
from featherweight.recover.schedules import SCHEDULES
from featherweight.steps import Context, Fit, Objective, Rewrite
from featherweight.steps.options import BATCH_LIMIT, SEED, Numbers, check_known, check_numbers
from featherweight.task import Task

NUMBERS = {
    "epochs": Numbers(5, least=0, whole=True), "lr": Numbers(0.01, above=0), "momentum": Numbers(0.9, least=0, below=1),
    "weight_decay": Numbers(5e-4, least=0), "warmup": Numbers(0.1, least=0, below=1, noun="a share of the steps,"),
    "clip": Numbers(1.0, above=0, none="no limit"), "batches": BATCH_LIMIT, "seed": SEED}
SECONDS = Numbers(60.0, least=0)


@dataclass(frozen=True)
class Train(Fit):
    """Trains every floating parameter of the network on the task's train split.

    epochs: passes over the train split. batches: at most this many batches of each pass.
    lr: largest learning rate. optimizer: "sgd" (with ``momentum``) or "adamw" (``momentum`` is its first beta).
    weight_decay: of all parameters, or with ``decay_vectors=False`` of those with more than one axis only.
    schedule: of the learning rate: "cosine", "onecycle" or "constant"; warmup: share of the steps, 0..1, with a
        linear rise.
    distill: an Objective that makes the loss, e.g. ``distill.Logits()``; without one the task's loss is taken.
    during: rewrites at work during the training, told of its progress before every step; their plans are applied at
        its end, and saved as ``during_I.plan`` in the context's workdir.
    clip: largest norm of the gradient. autocast: "bf16" computes in bfloat16 where torch deems it safe;
        x86 processors without AVX-512 emulate it, slowly, which is warned of.
    channels_last: memory layout of images. seed: of shuffling and dropout, together with the context's.
    checkpoint_every: "epoch", or seconds between checkpoints; written to ``context.workdir``, if there is one.

    Zeros of the weights in ``network.patterns`` stay zero. Under ``accelerate launch`` each of P processes takes every
    P-th batch and gradients are averaged; what is left of a pass after the last full round is not used, and the
    statistics of batch norms are averaged at the end of each epoch. All processes must see the same ``workdir``.

    On a CPU the same seed gives the same weights, bit for bit, killed and resumed or not, if the train split is a
    function of torch's, numpy's and Python's global generators, which are seeded before each pass. A split without
    ``len()`` is gone through once beforehand to count its batches.

    Raises RecipeError for options that make no sense, a network without anything to train, a loss that is no longer
    finite, and a checkpoint of another run; TaskError where the task has no train split or no loss.
    """

    epochs: int = 1
    lr: float = 0.01
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "onecycle", "constant"] = "cosine"
    warmup: float = 0.0
    distill: Objective | None = None
    during: tuple[Rewrite, ...] = ()
    clip: float | None = None
    autocast: Literal["bf16"] | None = None
    channels_last: bool = False
    decay_vectors: bool = True
    batches: int | None = None
    seed: int = 0
    checkpoint_every: Literal["epoch"] | float = "epoch"

    def check(self) -> None:
        """Raises RecipeError for options that make no sense, also for rewrites that cannot be at work in a training."""
        check_known("Train", "optimizer", self.optimizer, OPTIMIZERS)
        check_known("Train", "schedule", self.schedule, SCHEDULES)
        check_numbers(self, NUMBERS)
        for name, fits, wanted in (
            ("autocast", self.autocast in (None, "bf16"), "'bf16' or None"),
            ("checkpoint_every", self.checkpoint_every == "epoch" or SECONDS.hold(self.checkpoint_every),
             "'epoch' or seconds"),
            ("during", all(isinstance(r, Rewrite) for r in self.during), "rewrites, e.g. (prune.Weights(...),)"),
            ("distill", self.distill is None or hasattr(self.distill, "begin"), "an objective, e.g. distill.Logits()"),
        ):
            if not fits:
                raise RecipeError(f"Train({name}={getattr(self, name)!r}): expected {wanted}")
        for rewrite in self.during:
            rewrite.check()
            rewrite.check_training()

    def fit(self, network: Network, task: Task, context: Context) -> Network:
        from featherweight.recover.loop import Run

        self.check()
        task.require("train", *([] if self.distill else ["loss"]))
        trainable(network)
        return Run(dataclasses.replace(self, during=tuple(self.during)), network, task, context).fit()


def trainable(network: Network) -> None:
    """Raises RecipeError if no tensor can be trained, or none but biases because all weights are integers."""
    if not any(p.requires_grad and p.is_floating_point() for p in network.parameters()):
        raise RecipeError("the network has no trainable tensor (all are integers, or frozen); put recover.Train before "
                          "quantize.Quantize, or write Train(during=(quantize.Quantize(...),))")
    weights = [n for n in map(weight_name, network.calls(*WEIGHTED)) if n is not None]
    matrices = [p for p in network.parameters() if p.requires_grad and p.dim() > 1]
    integers = [n for n, t in network.tensors().items() if not t.is_floating_point() and t.dim() > 1]
    if integers and not matrices and not any(network.tensor(n).requires_grad for n in weights):
        raise RecipeError(f"all weights of the network are integers ({', '.join(integers[:3])}, ...) and cannot be "
                          "trained; put recover.Train before quantize.Quantize, or write "
                          "Train(during=(quantize.Quantize(...),))")
