"""``fw.search`` on a detector and on a small transformer: the same call, no option changed.

    python benchmarks/search_beyond.py detection --bccd FOLDER
    python benchmarks/search_beyond.py text --snippets vaderSentiment-3.3.2.tar.gz

Networks, data and scores are those of ``distillation_beyond.py``, whose teachers are what is made small. Half of the
latency in ONNX Runtime and at most a point lost (mAP at an IoU of 0.5, right answers, in %), no training. The test
split is scored once. Rows go into benchmarks/results/search.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from distillation_beyond import PARTS, taught
from rows import Rows
from search import row

import featherweight as fw

WORK = Path(__file__).parent.parent / "out/search_beyond"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("detection", "text"))
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--bccd", type=Path, help="the folder with Annotations, ImageSets and JPEGImages")
    parser.add_argument("--snippets", type=Path, help="the source archive of vaderSentiment")
    given = parser.parse_args()
    torch.set_num_threads(1)
    part = PARTS[given.part]
    task = part.task(given)
    network = taught(part, given.part, task, Rows("distillation_beyond.json"))
    began = time.perf_counter()
    found = fw.search(network, task, fw.Budget(latency="0.5x", score_drop=1.0), out=WORK / given.part,
                      minutes=given.minutes)
    Rows("search.json").add(f"{given.part}, half the latency", row(found, time.perf_counter() - began))
    print(found)


if __name__ == "__main__":
    main()
