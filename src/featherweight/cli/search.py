"""``featherweight search``: a job's model and data, and limits in the place of steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from featherweight.balance import Budget, Found
from featherweight.balance.combine.job import search as sought
from featherweight.cli import show
from featherweight.cli.flags import AsJson
from featherweight.cli.progress import Listener
from featherweight.errors import RecipeError, did_you_mean
from featherweight.recipe import Job
from featherweight.recover import Train

LIMITS = tuple(field.name for field in dataclasses.fields(Budget))
#: what a [goal] may say beside limits
OPTIONS = ("minimize", "minutes", "trials", "families", "times", "workers")
MISSED = 1


def search(job: Annotated[Path, typer.Argument(metavar="JOB.toml", help="job: model, task or data, [goal]")],
           out: Annotated[Path | None, typer.Option(help="folder for the results, instead of the job's")] = None,
           latency: Annotated[str | None, typer.Option(help="0.5x of the original's, or 2ms")] = None,
           file_bytes: Annotated[str | None, typer.Option(help="of the deployed file: 0.25x, or 300kB")] = None,
           archive_bytes: Annotated[str | None, typer.Option(help="of the entropy-coded archive")] = None,
           macs: Annotated[str | None, typer.Option(help="0.5x, or 40M")] = None,
           memory: Annotated[str | None, typer.Option(help="of the process that runs the file")] = None,
           score_drop: Annotated[float | None, typer.Option(help="points of the score that may be lost")] = None,
           minimize: Annotated[str | None, typer.Option(help="what is to be least within the limits")] = None,
           minutes: Annotated[float | None, typer.Option(help="how long it may look")] = None,
           trials: Annotated[int | None, typer.Option(help="combinations that are tried at most")] = None,
           times: Annotated[str | None, typer.Option(help="folder of bench-table, for another device")] = None,
           workers: Annotated[int | None, typer.Option(help="processes of Ray that try ahead")] = None,
           resume: Annotated[bool, typer.Option("--resume/--no-resume", help="go on where a killed run was")] = True,
           as_json: AsJson = False) -> None:
    """Find the combination of all families that keeps limits, make it, measure it. Exit code 1 if a limit is missed."""
    given = {"latency": latency, "file_bytes": file_bytes, "archive_bytes": archive_bytes, "macs": macs,
             "memory": memory, "score_drop": score_drop, "minimize": minimize, "minutes": minutes, "trials": trials,
             "times": times, "workers": workers}
    read = Job.from_toml(job)
    goal = {**read.goal, **{name: value for name, value in given.items() if value is not None}}
    with Listener(show.err) as listener:
        found = run(read, goal, out, resume, listener)
    if as_json:
        show.document(found.to_dict())
    else:
        trail = found.result.trail
        show.out.print(show.comparison(trail[0], trail[-1], f"{job.name}, in {found.result.target}"))
        for row in str(found).splitlines():
            show.line(row)
        show.line(f"report: {Path(out or read.options.out) / 'report.html'}")
    if found.missed:
        raise typer.Exit(MISSED)


def run(job: Job, goal: Mapping[str, Any], out: Path | None, resume: bool, listener: Listener) -> Found:
    """The search of a job. Raises RecipeError for a goal, or steps, that make no sense."""
    for name in goal:
        if name not in (*LIMITS, *OPTIONS):
            raise RecipeError(f"[goal] has {name!r}; {did_you_mean(name, (*LIMITS, *OPTIONS))}")
    limits = {name: goal[name] for name in LIMITS if name in goal}
    if not limits:
        raise RecipeError('the job has no [goal]; write [goal] and latency = "0.5x" and score_drop = 1.0 under it, or '
                          "--latency 0.5x --score-drop 1")
    steps = job.recipe.steps
    if len(steps) > 1 or not all(isinstance(step, Train) for step in steps):
        raise RecipeError("a job with a [goal] may have one step, a training after the cut: kind = \"recover.Train\"; "
                          "the others are found")
    options = {name: goal[name] for name in OPTIONS if name in goal}
    network, task = job.prepare()
    given, folder = job.options, Path(out or job.options.out)
    return sought(network, task, Budget(**limits), given.target, folder, threads=given.threads, seed=given.seed,
                  seconds=given.seconds, recover=next((s for s in steps if isinstance(s, Train)), None),
                  progress=listener, resume=resume, preface=job.preface(f"{folder.as_posix()}-again"), **options)
