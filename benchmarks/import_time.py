"""What importing costs beside ``import torch``: fresh processes in turns, seconds of the processor.

    python benchmarks/import_time.py [--rounds 15]

Arms: ``import torch``; ``import featherweight``, which loads names when they are asked for; the same and every public
name asked for (torch included); ``featherweight --version``. One process of each before counting, which compiles and
reads the files. Results go into benchmarks/results/import_time.json: one row an arm, medians and quartiles, and the
ratio to torch within the same round. The goal of ``import featherweight``: at most 1.1 times ``import torch``.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys

import numpy as np
from rows import Rows

ARMS = {
    "import torch": ("-c", "import torch"),
    "import featherweight": ("-c", "import featherweight"),
    "import featherweight, every public name": (
        "-c", "import featherweight as fw; [getattr(fw, name) for name in fw.__all__]"),
    "featherweight --version": ("-c", "from featherweight.cli import main; main()", "--version"),
}
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def seconds(words: tuple[str, ...]) -> float:
    """Of the processor, in the process and in the system on its behalf."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    rounds = np.array([[seconds(words) for words in ARMS.values()] for _ in range(given.rounds + 1)][1:])
    ratios = np.median(rounds / rounds[:, :1], axis=0)
    rows = Rows("import_time.json")
    for name, taken, ratio in zip(ARMS, rounds.T, ratios, strict=True):
        low, middle, high = (round(float(q), 4) for q in np.quantile(taken, (0.25, 0.5, 0.75)))
        rows.add(name, {"median_s": middle, "q1_s": low, "q3_s": high, "to_torch": round(float(ratio), 3),
                        "rounds": given.rounds})
        print(f"{name:42s} {middle:6.3f} s ({low:.3f} to {high:.3f})  {ratio:5.2f} x torch", flush=True)


if __name__ == "__main__":
    main()
