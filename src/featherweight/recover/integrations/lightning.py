"""Rewrites and objectives beside a training of Lightning."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.network import Network
from featherweight.recover.attach import Attached, attach
from featherweight.recover.integrations.following import LastCall, LearnedBeside, target_of
from featherweight.steps import Beside, Plan
from featherweight.task import Task


def _package() -> Any:
    """Lightning under the name by which it is in use, or is installed. Raises RecipeError where it is not."""
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in sorted(names, key=lambda n: n not in sys.modules):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise RecipeError("Lightning is not installed; write pip install lightning")


class LightningCallback(_package().Callback):  # type: ignore[misc]  # Lightning asks for one of its own class
    """Lets ``beside`` work beside a Lightning training of ``network``, as ``recover.attach`` does in a plain loop.

    network: what ``fw.capture`` gave; the module's ``training_step`` calls it and returns its own loss, to which the
        objectives are added. task: its loss is not asked for; its calibration split is what rewrites read.
    beside: objectives and rewrites. original, plans: as of ``recover.attach``.
    target: takes the targets out of a batch, for objectives that read them; None looks for "labels", "target" and the
        like in a mapping, and takes the second of a pair.

    Learned scales and thresholds become parameters of the module while it trains, so that ``self.parameters()`` in
    ``configure_optimizers`` has them; one optimizer. The network goes to the trainer's device. Checkpoints of the
    trainer hold the callback's state. After the training, ``finished`` is the finished network.

    Example:
        >>> import pytorch_lightning as lightning
        >>> class Module(lightning.LightningModule):
        ...     def __init__(self, network):
        ...         super().__init__()
        ...         self.network = network
        ...     def training_step(self, batch, index):
        ...         return torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.01)
        >>> callback = fw.integrations.lightning.Callback(network, task, (fw.distill.Logits(), fw.prune.Weights(0.5)))
        >>> trainer = lightning.Trainer(max_epochs=1, callbacks=[callback], accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(Module(network), torch.utils.data.DataLoader(list(zip(images, [1] * 32)), batch_size=8))
        >>> sparse = callback.finished
    """

    def __init__(self, network: Network, task: Task, beside: Sequence[Beside] = (), *,
                 original: Network | None = None, plans: Sequence[Plan] = (),
                 target: Callable[[Any], Any] = target_of) -> None:
        super().__init__()
        self.network, self.task, self.beside = network, task, tuple(beside)
        self.original, self.plans, self.target = original, tuple(plans), target
        self.finished: Network | None = None
        self.attached: Attached | None = None
        self._undo: list[Callable[[], Any]] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Attaches before the optimizer is made."""
        if stage != "fit":
            return
        if not any(part is self.network for part in pl_module.modules()):
            raise RecipeError("the callback's network is no part of the LightningModule; write self.network = network "
                              "in its __init__")
        self.network.to(trainer.strategy.root_device)
        attached = self.attached = attach(self.network, self.task, self.beside,
                                          steps=int(trainer.estimated_stepping_batches), original=self.original,
                                          plans=self.plans)
        call, own = LastCall(self.network), pl_module.training_step
        pl_module.featherweight = LearnedBeside(attached.parameters())

        def step(batch: Any, *more: Any, **named: Any) -> Any:
            found = own(batch, *more, **named)
            loss = found["loss"] if isinstance(found, Mapping) else found
            if not isinstance(loss, Tensor):
                return found
            whole = attached.loss(*call.take(), self.target(batch), own=loss)
            return {**found, "loss": whole} if isinstance(found, Mapping) else whole

        pl_module.training_step = step
        self._undo = [call.close, lambda: pl_module.__dict__.pop("training_step"),
                      lambda: delattr(pl_module, "featherweight")]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Follows the module's optimizer."""
        if len(trainer.optimizers) != 1:
            raise RecipeError(f"the module has {len(trainer.optimizers)} optimizers; the callback follows one, with "
                              "all parameters in groups")
        if self.attached is not None:
            self.attached.follow(trainer.optimizers[0])

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Adds what ``beside`` adds to gradients, before they are clipped."""
        if self.attached is not None:
            self.attached.after_backward()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Finishes."""
        if self.attached is not None:
            self.finished = self.attached.finish()
        self._undone()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Takes everything off a training that failed."""
        if self.attached is not None:
            self.attached.close()
        self._undone()

    def _undone(self) -> None:
        for undo in self._undo:
            undo()
        self._undo.clear()

    # ---- checkpoints
    def state_dict(self) -> dict[str, Any]:
        """What the trainer's checkpoint keeps."""
        return dict(self.attached.state_dict()) if self.attached is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what ``state_dict`` gave."""
        if self.attached is not None and state_dict:
            self.attached.load_state_dict(state_dict)


Callback = LightningCallback

__all__ = ["Callback"]
