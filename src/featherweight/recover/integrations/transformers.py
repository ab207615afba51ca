"""Rewrites and objectives beside a training of Hugging Face's Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featherweight.errors import RecipeError
from featherweight.network import Network
from featherweight.recover.attach import attach
from featherweight.recover.integrations.following import LastCall, LearnedBeside
from featherweight.steps import Beside, Plan
from featherweight.task import Task

#: in a checkpoint's folder
FILE = "featherweight.safetensors"


class Trained(nn.Module):
    """A network and what is learned beside it, as one model of a Trainer: called by the names of the network's inputs,
    however it was captured."""

    accepts_loss_kwargs = False  #: the Trainer then passes what the batch holds and no more

    def __init__(self, network: Network, learned: Sequence[Tensor]) -> None:
        super().__init__()
        self.network, self.learned = network, LearnedBeside(learned)

    def forward(self, **inputs: Any) -> Any:
        """What the network gives. Raises RecipeError for other names than the network's inputs have."""
        names = [given.name for given in self.network.signature.inputs]
        if set(names) != set(inputs):
            raise RecipeError(f"a batch holds {', '.join(inputs)} beside its labels; the network was captured with "
                              f"{', '.join(names)}: name the columns of the data so, and remove the others")
        args, kwargs = self.network.signature.nest([inputs[name] for name in names])
        return self.network(*args, **kwargs)


class TrainerCallback(transformers.TrainerCallback):  # type: ignore[misc]  # the Trainer asks for one of its own class
    """Lets ``beside`` work beside a Trainer's training of ``network``, as ``recover.attach`` does in a plain loop.

    network: what ``fw.capture`` gave, called by names as in ``network(input_ids=..., attention_mask=...)``. The Trainer
        is given ``callback.model`` (the network, with the learned scales of ``beside`` as parameters beside it) and
        ``compute_loss_func=callback.loss``: the task's loss of output and labels, and the objectives' terms.
    task: its loss; its calibration split is what rewrites read. beside, original, plans: as of ``recover.attach``.

    The Trainer clips gradients before penalties are added. Checkpoints hold the callback's state, and a training that
    is resumed takes it up. After the training, ``finished`` is the finished network.

    Example:
        >>> callback = fw.integrations.transformers.Callback(network, task, (fw.prune.Weights(sparsity=0.5),))
        >>> arguments = transformers.TrainingArguments(                   # doctest: +SKIP
        ...     "out", num_train_epochs=1, remove_unused_columns=False)
        >>> transformers.Trainer(callback.model, arguments, train_dataset=rows, callbacks=[callback],
        ...     compute_loss_func=callback.loss).train()                  # doctest: +SKIP
        >>> callback.close()
    """

    def __init__(self, network: Network, task: Task, beside: Sequence[Beside] = (), *,
                 original: Network | None = None, plans: Sequence[Plan] = ()) -> None:
        # how many steps it will be is known when the training begins
        self.attached = attach(network, task, beside, steps=1, original=original, plans=plans)
        self.model = Trained(network, self.attached.parameters())
        self.finished: Network | None = None
        self._call = LastCall(network)

    def loss(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        """For ``Trainer(compute_loss_func=...)``."""
        inputs, output = self._call.take()
        return self.attached.loss(inputs, output, labels)

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Follows the Trainer's optimizer for as many steps as it will make."""
        self.attached.steps = max(1, int(state.max_steps))
        optimizer = more["optimizer"]
        self.attached.follow(getattr(optimizer, "optimizer", optimizer))  # accelerate's wrapper holds it
        if state.global_step:
            given = args.resume_from_checkpoint
            folder = Path(given) if isinstance(given, str) else Path(args.output_dir, f"checkpoint-{state.global_step}")
            if not (folder / FILE).is_file():
                raise RecipeError(f"{folder} holds no {FILE}: it was written by a training without this callback; "
                                  "begin anew")
            self.attached.load_state_dict(load_file(folder / FILE))

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Writes the state of what works beside the training into the checkpoint."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: t.contiguous() for name, t in self.attached.state_dict().items()}, folder / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Finishes."""
        self.finished = self.attached.finish()
        self._call.close()

    def close(self) -> None:
        """Takes everything off, for a training that failed or never began."""
        self.attached.close()
        self._call.close()


Callback = TrainerCallback

__all__ = ["Callback"]
