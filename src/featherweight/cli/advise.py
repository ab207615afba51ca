"""``featherweight advise``: where time and bytes go, what each family gives alone, the recipe to start from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from featherweight.balance import Advice
from featherweight.balance import advise as advised
from featherweight.cli import show
from featherweight.cli.flags import AsJson, ModelName, TaskName
from featherweight.cli.models import network_and_task
from featherweight.cli.progress import Listener
from featherweight.errors import RecipeError
from featherweight.measure import LayerFigures
from featherweight.report import units

MOST = 12  #: layers that are shown, the costliest


def advise(model: ModelName, task: TaskName = None,
           target: Annotated[str, typer.Option(help="runtime to deploy to")] = "onnxruntime",
           score_drop: Annotated[float, typer.Option(min=0, help="points of the score that may be lost")] = 1.0,
           minutes: Annotated[float, typer.Option(help="how long families are measured")] = 5.0,
           out: Annotated[Path | None, typer.Option(help="folder that keeps what was measured")] = None,
           as_json: AsJson = False) -> None:
    """Say where time and bytes go, what each family saves at which drop of the score, and where to start; no training.
    """
    if task is None and not model.endswith(".toml"):
        raise RecipeError("advise reads data; write --task module:function, or name a job file: featherweight advise "
                          "job.toml")
    network, data = network_and_task(model, task)
    with Listener(show.err) as listener:
        found = advised(network, data, target, out, score_drop=score_drop, minutes=minutes, progress=listener)
    if as_json:
        show.document(found.to_dict())
        return
    show.out.print(_costly(found.layers, found.between_s))
    show.out.print(_alone(found))
    show.line(f"to start from: {found.what}; predicted: latency x {found.expected['latency']:.2f}, score "
              f"{0 - found.expected['score_drop']:+.3g}")
    show.line(found.recipe.to_toml())


def _costly(layers: Sequence[LayerFigures], between_s: float) -> Table:
    """The layers that take most of the time (of the MACs, where it is not known), and the rest in one row."""
    timed = any(layer.seconds for layer in layers)
    weights = [float(layer.seconds or 0 if timed else layer.macs or 0) for layer in layers]
    whole, held = sum(weights) + between_s or 1.0, sum(layer.bytes for layer in layers) or 1
    order = sorted(range(len(layers)), key=lambda i: -weights[i])
    table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("layer", overflow="fold")
    for head in ("time" if timed else "MACs", "bytes"):
        table.add_column(head, justify="right")
    for i in order[:MOST]:
        show.row(table, layers[i].path or "(top)", f"{weights[i] / whole:.1%}", f"{layers[i].bytes / held:.1%}")
    rest = order[MOST:]
    left = sum(weights[i] for i in rest) + between_s
    show.row(table, f"{len(rest)} others, and what lies between", f"{left / whole:.1%}",
             f"{sum(layers[i].bytes for i in rest) / held:.1%}")
    return table


def _alone(found: Advice) -> Table:
    """Each family at each amount that was measured."""
    table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("alone", overflow="fold")
    for head in ("latency", "file", "archive", "MACs", "score"):
        table.add_column(head, justify="right")
    for trial in found.alone:
        shares = [trial.shares.get(name) for name in ("latency", "file_bytes", "archive_bytes", "macs")]
        show.row(table, trial.what + (f": {trial.failed}" if trial.failed else ""),
                 *(units.NONE if share is None else f"x {share:.2f}" for share in shares), f"{0 - trial.drop:+.3g}")
    return table
