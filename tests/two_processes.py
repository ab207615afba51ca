"""A script run by two processes on the CPU, as ``accelerate launch`` or ``torchrun`` start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import featherweight as fw


def run_by_two(script: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both wrote, as ``folder/0.pt`` and ``folder/1.pt``. ``script``: its text, with {tests} and {out} for the
    folder of the tests and ``folder``."""
    file = folder / "script.py"
    file.write_text(script.format(tests=str(Path(__file__).parent), out=str(folder)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(fw.__file__).parents[1]),
                   "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0",
                           "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(file)],
                          env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "0.pt"), torch.load(folder / "1.pt")
