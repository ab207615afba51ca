"""The processes that a training runs in, by Accelerate."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from featherweight.errors import RecipeError

if TYPE_CHECKING:
    from accelerate import Accelerator


def accelerator() -> Accelerator:
    """Accelerate's view of this run: the device, and the processes that ``accelerate launch`` started.

    Raises RecipeError where several were started but do not know of one another, and would each do all the work.
    """
    from accelerate import Accelerator

    found = Accelerator()
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and found.num_processes == 1:
        raise RecipeError(f"{started} processes were started, but they are not joined; start them by "
                          "'accelerate launch --num_processes 2 script.py' (with --cpu where there is no GPU)")
    return found
