"""The processes that ``accelerate launch`` started, and what they share: values, means, files, decisions."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from featherweight.errors import RecipeError

T = TypeVar("T")


class Processes:
    """The processes of one run, by Accelerate; a run in one process is the first and only one.

    Raises RecipeError, when first asked, where several were started but do not know of one another, and would each do
    all the work.
    """

    def __init__(self) -> None:
        self.several = int(os.environ.get("WORLD_SIZE", "1")) > 1

    @cached_property
    def _accelerator(self) -> Any:
        from accelerate import Accelerator

        found = Accelerator()
        if self.several and found.num_processes == 1:
            raise RecipeError(f"{os.environ['WORLD_SIZE']} processes were started, but they are not joined; start them "
                              "by 'accelerate launch --num_processes 2 script.py' (with --cpu where there is no GPU)")
        return found

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return torch.device(self._accelerator.device)

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        return int(self._accelerator.process_index)

    @property
    def world(self) -> int:
        """How many there are."""
        return int(self._accelerator.num_processes)

    @property
    def first(self) -> bool:
        """Whether this is the one that plans, measures and writes."""
        return not self.several or self.rank == 0

    @property
    def half(self) -> bool:
        """Whether ``accelerate launch`` was told to compute in bfloat16."""
        return bool(self._accelerator.mixed_precision == "bf16")

    # ---- what they share
    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Gives every tensor the first process's numbers."""
        if self.world > 1:
            from accelerate.utils import broadcast

            with torch.no_grad():
                for tensor in tensors:
                    tensor.data.copy_(broadcast(tensor.detach().clone()))

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its mean over the processes, one message for each dtype."""
        if self.world == 1 or not tensors:
            return
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            same = [t for t in tensors if t.dtype == dtype]
            flat = self._accelerator.reduce(torch.cat([t.detach().reshape(-1) for t in same]), reduction="mean")
            for tensor, mean in zip(same, flat.split([t.numel() for t in same]), strict=True):
                tensor.detach().copy_(mean.view(tensor.shape))

    def gathered(self, numbers: Sequence[int]) -> list[list[int]]:
        """The numbers of every process, as many from each."""
        if self.world == 1:
            return [list(numbers)]
        rows = self._accelerator.gather(torch.tensor([numbers], device=self.device))
        return [[int(n) for n in row] for row in rows.tolist()]

    def share(self, make: Callable[[], T]) -> T:
        """Runs ``make`` in the first process; all get what it gave."""
        box = [make() if self.first else None]
        if self.several:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(box)
        return box[0]  # type: ignore[return-value]

    def folder(self) -> Path:
        """A fresh folder that all see (on one machine)."""
        return Path(self.share(lambda: tempfile.mkdtemp(prefix="featherweight-")))
