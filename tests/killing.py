"""Jobs that are killed at every file operation, for ``tests/test_jobs.py`` and ``benchmarks/kills.py``.

A kill is an exception at a file operation, after which no other one works: before each operation, and so after the one
that came before it.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import featherweight as fw
from test_recipe import Nudge, Scale, assert_same, batches, squeeze, task, tiny


class Killed(BaseException):
    """Stands for SIGKILL."""


class Kill:
    """Lets so many file operations in a folder through; from then on none works."""

    folder, left, seen = "", 0, 0

    def arm(self, folder: Path, after: int) -> None:
        self.folder, self.left, self.seen = str(folder), after, 0

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folder or event not in CHANGES or not str(arguments[0]).startswith(self.folder):
            return
        if event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        self.seen += 1
        if self.seen > self.left:
            raise Killed


CHANGES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate"}
KILL = Kill()
sys.addaudithook(lambda event, arguments: KILL.hear(event, arguments))

INT8 = fw.quantize.Quantize(target="onnxruntime")
FAMILIES = {
    "steps": fw.Recipe([Scale(by=None), Nudge(), fw.prune.Weights(sparsity=0.5)]),
    "training": fw.Recipe([fw.prune.Channels(macs=0.7),
                           fw.recover.Train(epochs=2, lr=0.05, distill=fw.distill.Logits(), checkpoint_every=0.0)]),
    "low rank and codebooks": fw.Recipe([fw.factorize.LowRank(energy=0.9), fw.share.Codebook()]),
    "quantization": fw.Recipe([fw.recover.BatchNorm(), INT8]),
    "search": fw.Recipe([fw.balance.Ladder(INT8)]),
    "in training": fw.Recipe([fw.recover.Train(epochs=2, lr=0.05, during=(fw.prune.Weights(sparsity=0.75), INT8),
                                               checkpoint_every=0.0)]),
}


def without_times(values: Any) -> Any:
    """What ``result.json`` holds, but seconds and what is said of them."""
    if isinstance(values, dict):
        return {k: without_times(v) for k, v in values.items()
                if k not in ("latency", "beside", "ratios", "seconds", "date", "recipe_toml")}
    if isinstance(values, list):
        return [without_times(v) for v in values if not (isinstance(v, str) and ("slower" in v or "latencies" in v))]
    return values


def unlike(a: Any, b: Any) -> list[str]:
    """The lines in which two values differ, as JSON."""
    lines = (json.dumps(value, indent=1).splitlines() for value in (b, a))
    return [line for line in difflib.unified_diff(*lines, n=0, lineterm="") if line[:3] not in ("---", "+++")][:20]


def check(recipe: fw.Recipe, folder: Path, step: int) -> int:
    """Kills a job at every ``step``-th file operation, lets it go on, and compares with a job that was not killed;
    how many kills there were."""
    network = tiny()

    def run(out: Path) -> fw.Result:
        return squeeze(network, task(test=lambda: batches(4)), recipe, out=out, seconds=0.0)

    whole = run(folder / "whole")
    wanted = without_times(json.loads((folder / "whole" / "result.json").read_text()))
    for count in itertools.count(0, step):
        out = folder / str(count)
        KILL.arm(out, count)
        try:
            run(out)
        except Killed:
            pass
        else:
            assert count > 40, "the kills were heard"
            return count // step
        finally:
            KILL.folder = ""
        resumed = run(out)
        assert_same(resumed.network, whole.network)
        found = without_times(json.loads((out / "result.json").read_text()))
        assert found == wanted, f"killed at {count}: " + " / ".join(unlike(found, wanted))
        left = [p for p in out.rglob("*") if p.suffix in (".part", ".lock", ".holder") or "cleared" in p.name]
        assert left == []
    raise AssertionError("not reached")
