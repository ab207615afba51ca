"""``featherweight``: the same words as in Python and TOML.

Exit codes: 0 all is well; 1 a check failed (a step made something worse without saying so, a file differs from
PyTorch), or files wait to be timed on another device; 2 the command line, a file or a recipe is wrong; 3 an error that
nobody foresaw, told with its traceback; 130 and 143 it was stopped (Ctrl-C, SIGTERM). Results go to stdout, progress
and messages to stderr.
"""

from __future__ import annotations

import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from featherweight import __version__, deploy, measure
from featherweight.cli import gallery, show
from featherweight.cli import init as begin
from featherweight.cli.advise import advise
from featherweight.cli.archives import pack, unpack
from featherweight.cli.bench import bench_table
from featherweight.cli.flags import AsJson, ModelName, TaskName, in_flags
from featherweight.cli.models import job_of, network_and_task
from featherweight.cli.pages import report
from featherweight.cli.progress import Listener
from featherweight.cli.schema import job_schema
from featherweight.cli.search import search
from featherweight.errors import FeatherweightError, FileError, RecipeError, Untimed
from featherweight.files import written_whole

CHECK_FAILED, WRONG_INPUT, UNFORESEEN = 1, 2, 3
#: added to the number of the signal that ended it
STOPPED = 128


class Stopped(BaseException):
    """SIGTERM came."""


class Commands(TyperGroup):
    """Tells errors that the library raises on purpose by one line, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Untimed as wait:
            typer.echo(show.printable(str(wait)), err=True)
            raise typer.Exit(CHECK_FAILED) from wait
        except (FeatherweightError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            typer.echo(show.printable(f"error: {in_flags(str(error))}"), err=True)
            raise typer.Exit(WRONG_INPUT) from error
        except Exception as error:
            if ctx.params.get("debug") or isinstance(error, typer.Abort) or hasattr(error, "exit_code"):
                raise  # typer's own say themselves how to exit
            traceback.print_exc()
            raise typer.Exit(UNFORESEEN) from error
        except (KeyboardInterrupt, Stopped) as stop:
            typer.echo("stopped; what a compression had finished is kept: give the same command again to go on, or "
                       "--no-resume with it to start over", err=True)
            raise typer.Exit(STOPPED + (signal.SIGTERM if isinstance(stop, Stopped) else signal.SIGINT)) from stop


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="Makes a trained PyTorch network small and fast enough for its device, and proves that it still "
                       "works. Exit codes: 0 all is well, 1 a check failed, 2 wrong input, 3 an unforeseen error.")

Target = Annotated[str, typer.Option(help="runtime to deploy to")]
Threads = Annotated[int, typer.Option(min=1, help="threads of the runtime")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False,
            version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """Heard before any command."""


@app.command()
def demo(out: Annotated[Path, typer.Option(help="folder for the results")] = Path("out/demo"),
         quick: Annotated[bool, typer.Option("--quick", help="train less: to see the tool, not its results")] = False,
         as_json: AsJson = False) -> None:
    """Train a small network on scikit-learn's digits, compress it, measure it, write a report."""
    from featherweight.demo.job import run

    with Listener(show.err) as listener:
        result = run(out, quick, listener)
    if as_json:
        show.document(result.to_dict())
        return
    first, last = (result.final.before, result.final.after) if result.final else (result.trail[0], result.trail[-1])
    show.out.print(show.comparison(first, last, f"digits, in {result.target}"))
    _say_flags(result.flags)
    show.line(f"report: {out / 'report.html'}")


@app.command()
def compress(recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="job: model, task, steps")],
             out: Annotated[Path | None, typer.Option(help="folder for the results, instead of the recipe's")] = None,
             set_: Annotated[list[str] | None, typer.Option(
                 "--set", metavar="KEY=VALUE", help="change the recipe: compress.target=..., steps.1.macs=0.4")] = None,
             resume: Annotated[bool, typer.Option("--resume/--no-resume", help="go on where a killed run was")] = True,
             as_json: AsJson = False) -> None:
    """Do the job of a recipe: every step applied and measured, the results written. Exit code 1 if flagged."""
    job = job_of(recipe, set_ or [])
    with Listener(show.err) as listener:
        result = job.run(progress=listener, resume=resume, out=out)
    if as_json:
        show.document(result.to_dict())
    else:
        show.out.print(show.comparison(result.trail[0], result.trail[-1], f"{recipe.name}, in {result.target}"))
        last = result.final.after if result.final is not None else result.trail[-1]
        if last.split == "test":
            show.line(f"test split: {last.score_name} {last.score:.2f}")
        show.line(f"report: {Path(out or job.options.out) / 'report.html'}")
    _say_flags(result.flags)
    if result.flags:
        raise typer.Exit(CHECK_FAILED)


app.command()(search)
app.command()(advise)
app.command("bench-table")(bench_table)


def _say_flags(flags: tuple[str, ...]) -> None:
    for flag in flags:
        typer.echo(show.printable(f"flag: {flag}"), err=True)


@app.command()
def init(model: Annotated[str | None, typer.Option(
             metavar="NAME", help="timm:, torchvision: or transformers:NAME, module:function, or a .fw file")] = None,
         weights: Annotated[str | None, typer.Option(metavar="FILE", help="the state of a named model")] = None,
         images: Annotated[str | None, typer.Option(metavar="FOLDER", help="one folder of images a class")] = None,
         csv: Annotated[str | None, typer.Option(metavar="FILE", help="rows of numbers, or texts")] = None,
         npz: Annotated[str | None, typer.Option(metavar="FILE", help="arrays x and y")] = None,
         task: Annotated[str | None, typer.Option(metavar="NAME", help="module:function of an fw.Task, for other data"
                                                  )] = None,
         label: Annotated[str | None, typer.Option(metavar="COLUMN", help="what a csv is to say")] = None,
         text: Annotated[str | None, typer.Option(metavar="COLUMN", help="the texts of a csv")] = None,
         tokenizer: Annotated[str | None, typer.Option(metavar="NAME", help="name or folder, for texts")] = None,
         target: Target = "onnxruntime",
         out: Annotated[Path, typer.Option(metavar="JOB.toml", help="the file to write")] = Path("job.toml")) -> None:
    """Write a job file that runs: for a model that has a name and data in files, no Python is needed."""
    def ask(what: str) -> str:
        try:
            return str(typer.prompt(what, err=True))
        except typer.Abort as error:
            if sys.stdin.isatty():
                raise
            raise RecipeError(f"there is nobody to ask for {what.partition(':')[0]!r}; write --model, and one of "
                              "--images, --csv with --label, --npz, --task") from error

    if out.exists():
        raise FileError(f"{out} is there already; write --out another.toml, or remove it")
    deploy.target(target)
    data = begin.source({"images": images, "csv": csv, "npz": npz, "task": task},
                        {"target": label, "text": text, "tokenizer": tokenizer}, ask)
    told = begin.text(model or ask("model: timm:NAME, torchvision:NAME, transformers:NAME, module:function or a .fw"),
                      weights, data, target, str(out))
    with written_whole(out) as part:
        part.write_text(told, encoding="utf-8")
    show.line(f"{out}: read it, then featherweight compress {out}")


@app.command()
def schema() -> None:
    """Print the JSON schema of job files, by which editors complete and check them."""
    show.document(job_schema())


app.command()(gallery.examples)


@app.command("measure")
def measure_(model: ModelName, task: TaskName = None, target: Target = "onnxruntime", threads: Threads = 1,
             split: Annotated[str, typer.Option(help="split to score on")] = "validation",
             memory: Annotated[bool, typer.Option("--memory", help="peak memory too, in a process of its own")] = False,
             as_json: AsJson = False) -> None:
    """Export a network, run the file, and say what it costs and how good it is."""
    deploy.target(target)
    network, data = network_and_task(model, task)
    found = measure.measure(network, data, target, split, model, threads=threads, archive=True, memory=memory)
    if as_json:
        show.document(found.to_dict())
    else:
        show.out.print(show.measurement(found))
    if found.agreement is not None and not found.agreement.ok:
        typer.echo(show.printable(found.agreement.complaint()), err=True)
        raise typer.Exit(CHECK_FAILED)


@app.command()
def inspect(model: ModelName, task: TaskName = None,
            score: Annotated[str, typer.Option(help="what the channels of a group are ranked by")] = "l1",
            curves: Annotated[bool, typer.Option("--sensitivity", help="how the outputs change as a group loses "
                                                                       "channels (reads calibration data)")] = False,
            ranks: Annotated[bool, typer.Option("--ranks", help="the singular values of each layer, and the ranks by "
                                                                "rule")] = False,
            as_json: AsJson = False) -> None:
    """Show a network's layers, the groups of channels that can be cut together, their scores and sensitivity, and what
    is frozen and why."""
    from featherweight.cli import ranks as spectra
    from featherweight.cli.groups import grouped

    network, data = network_and_task(model, task)
    rows, groups = measure.layers(network), grouped(network, data, score, curves)
    if as_json:
        show.document({
            "params": measure.params(network), "macs": measure.macs(network).total, "notes": network.notes,
            "uncounted": list(measure.macs(network).uncounted), "layers": [r.to_dict() for r in rows],
            **groups.to_dict(), **({"ranks": spectra.to_dict(spectra.ranks(network))} if ranks else {})})
        return
    show.out.print(show.layers(rows))
    if ranks:
        show.out.print(spectra.table(spectra.ranks(network)))
    if groups.axes.groups:
        show.out.print(groups.table())
    else:
        show.out.print("no group of channels can be cut", highlight=False)
    for skipped in groups.axes.frozen:
        show.line(f"frozen: {skipped.path}: {skipped.reason}")
    for note in network.notes:
        show.line(f"note: {note}")


@app.command()
def export(model: ModelName, file: Annotated[Path, typer.Argument(help="file to write")],
           target: Target = "onnxruntime", as_json: AsJson = False) -> None:
    """Write a network as a runtime's file, run it, and compare it with PyTorch."""
    runtime = deploy.target(target)
    network, _ = network_and_task(model, None)
    written = runtime.export(network, file)
    runner = runtime.load(file, like=network.signature)
    agreement = deploy.verify(network, runner, *network.example_inputs(batch=2))
    runner.close()
    if as_json:
        show.document({"file": str(file), "bytes": written, "max_rel": agreement.max_rel, "ok": agreement.ok})
    else:
        typer.echo(f"{file}: {written} bytes; differs from PyTorch by {agreement.max_rel:.1e} of the largest output")
    if not agreement.ok:
        typer.echo(show.printable(agreement.complaint()), err=True)
        raise typer.Exit(CHECK_FAILED)


app.command()(report)
app.command()(pack)
app.command()(unpack)


def main() -> None:
    """Runs the command line; the entry point of ``featherweight``."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped

    signal.signal(signal.SIGTERM, stop)
    app()
