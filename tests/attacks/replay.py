"""Opens files that mean harm, one after the other, with a limit on memory; ``tests/test_attacks.py`` runs it.

    python tests/attacks/replay.py FILE ...

For each file a line "name" before and "  refused: ..." or "  ran" after it is opened as what its ending says, and,
where it opens, called. What must not happen is that the process dies or hangs, or an error of another kind than ours.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import featherweight as fw
from featherweight.cli.pages import report
from featherweight.errors import FeatherweightError
from featherweight.recover import checkpoint

FIRST = Path(__file__).parents[1] / "fixtures" / "v0_1" / "network_plain.fw"
MEMORY = 12 << 30  #: bytes of address space, what torch takes before included


def network(path: Path) -> None:
    run(fw.load(path))


def run(found: Any, quiet: bool = False) -> None:
    """Calls a network at two batch sizes; what it raises is its own affair, and printed unless ``quiet``."""
    for batch in (2, 3):
        try:
            args, kwargs = found.example_inputs(batch)
            with torch.no_grad():
                found(*args, **kwargs)
        except Exception as error:
            if not quiet:
                print(f"  raised {type(error).__name__}", flush=True)


def archive(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fw.codec.unpack(path, Path(folder, "network.fw"))
        network(Path(folder, "network.fw"))


def packed(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fw.codec.pack(path, Path(folder, "network.fwz"))


def plan(path: Path) -> None:
    found = fw.steps.Plan.load(path)
    try:
        run(found.apply(fw.load(FIRST)))
    except Exception as error:
        print(f"  raised {type(error).__name__}", flush=True)


def state(path: Path) -> None:
    checkpoint.read(path.parent, "mark")


#: a file's ending -> what opens it
OPEN: dict[str, Callable[[Path], object]] = {
    ".fw": network, ".fwz": archive, ".pack": packed, ".plan": plan, ".safetensors": state,
    ".json": report,
    ".toml": fw.Recipe.from_toml,
}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name in names:
        print(Path(name).name, flush=True)
        try:
            OPEN[Path(name).suffix](Path(name))
        except FeatherweightError as error:
            print(f"  refused: {str(error)[:300]}", flush=True)
        else:
            print("  ran", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
