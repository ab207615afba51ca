"""Runs the examples of the gallery, each by the command of its README, and writes there what came out.

    python benchmarks/gallery.py [NAME ...] [--done FOLDER]

--done: a folder with copies of the examples that were run already.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rows import machine
from tables import table

from featherweight.cli.gallery import command_of
from featherweight.report import tables as told
from featherweight.report import units

EXAMPLES = Path(__file__).parents[1] / "examples"
PLACE = re.compile(r"\n## Measured here\n.*", re.DOTALL)


TOOK = "took.txt"  #: in a folder that was run: how long that took, in words


def run(folder: Path) -> str:
    """Runs the example in ``folder`` and notes how long it took; what it printed last."""
    began, before = time.monotonic(), os.times()
    words = command_of(folder).split()
    main = [sys.executable] if words[0] == "python" else [sys.executable, "-c",
                                                          "from featherweight.cli import main; main()"]
    done = subprocess.run([*main, *words[1:]], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):  # 1: a step is flagged
        raise SystemExit(f"{folder.name}: {done.stderr[-2000:]}")
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    (folder / TOOK).write_text(f"{time.monotonic() - began:.0f} s, {spent:.0f} s of processor time")
    return done.stdout.strip().splitlines()[-1]


def said(folder: Path, line: str) -> list[str]:
    """The section of a README: before and after, or the line that was printed."""
    file = folder / "out/result.json"
    held = json.loads(file.read_text()) if file.exists() else {}
    known = {**machine(), **(held.get("versions") or {})}
    about = ", ".join(f"{k} {known[k]}" for k in ("processor", "instructions", "torch"))
    took = folder / TOOK
    about += f"; the command, training of the original included: {took.read_text()}" if took.exists() else ""
    if not held:
        return ["", line, "", f"{about}."]
    first, last = held["trail"][0], held["trail"][-1]
    rows = [[name, units.amount(kind, before), units.amount(kind, after), change]
            for name, kind, before, after, change in told.changes(first, last) if after is not None]
    ends = held["final"] or {"before": first, "after": last}
    before, after = ends["before"], ends["after"]
    rows.append([f"{after['score_name']}, {after['split']}", units.score(before["score"]), units.score(after["score"]),
                 units.difference(before["score"], after["score"])])
    flags = [f"- flagged: {flag}" for flag in held["flags"]]
    return [*table(["", "before", "after", ""], rows), *flags, *([""] if flags else []),
            f"{held['target']}, one thread, batch 1; {about}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--done", type=Path)
    options = parser.parse_args()
    gallery = [p.parent.name for p in sorted(EXAMPLES.glob("*/README.md")) if (p.parent / "compress.py").exists()
               or (p.parent / "job.toml").exists()]
    for name in options.names or gallery:
        with tempfile.TemporaryDirectory() as space:
            folder, began, line = Path(space, name), time.monotonic(), ""
            if options.done is not None and (options.done / name / "out").exists():
                folder = options.done / name
            else:
                shutil.copytree(EXAMPLES / name, folder)
                line = run(folder)
            page = EXAMPLES / name / "README.md"
            text = PLACE.sub("", page.read_text()).rstrip("\n")
            page.write_text("\n".join([text, "", "## Measured here", *said(folder, line), ""]))
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
