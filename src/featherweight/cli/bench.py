"""``featherweight bench-table``: what is to be timed on a device that is not this machine, as one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featherweight.balance import bench_table as written
from featherweight.cli import show
from featherweight.cli.flags import AsJson, ModelName, TaskName
from featherweight.cli.models import network_and_task
from featherweight.judge.time_them import RESULT, SCRIPT


def bench_table(model: ModelName,
                out: Annotated[Path, typer.Option(help="the folder to carry to the device")],
                task: TaskName = None,
                target: Annotated[str, typer.Option(help="runtime to deploy to")] = "onnxruntime",
                threads: Annotated[int, typer.Option(min=1, help="threads of the runtime")] = 1,
                as_json: AsJson = False) -> None:
    """Write a network and its layers, to be timed on another device, with a script that needs numpy and the runtime."""
    network, data = network_and_task(model, task)
    count = written(network, data, out, target, threads=threads)
    if as_json:
        show.document({"folder": str(out), "files": count})
        return
    show.line(f"{count} files in {out} are to be timed: take the folder to the device, run python {SCRIPT} in it, "
              f"bring {RESULT} back into {out}")
