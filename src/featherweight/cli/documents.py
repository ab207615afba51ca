"""Commands that read and write files: pages and archives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from featherweight import codec
from featherweight.cli import show
from featherweight.cli.flags import AsJson
from featherweight.errors import FileError
from featherweight.files import written_whole
from featherweight.report import render
from featherweight.report.shape import check_shape
from featherweight.report.taught import brought


def report(out: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="folder that compress wrote")],
           beside: Annotated[list[Path] | None, typer.Option(
               metavar="OUT_DIR", help="folder of the same recipe without a teacher: the page says what distillation "
                                       "brought; may be given several times")] = None) -> None:
    """Draw report.html again from a folder's result.json."""
    source, result = _result(out)
    others = [_result(folder)[1] for folder in beside or ()]
    page = source.with_name("report.html")
    try:
        text = render(result, others)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise FileError(f"{source} is damaged: {type(error).__name__}: {str(error)[:200]}; expected what compress "
                        "wrote") from error
    if beside and not brought(result, others):
        raise FileError(f"the recipe of {source} is not that of {', '.join(map(str, beside))} with a teacher beside "
                        "its trainings; name a folder whose recipe lacks the teacher alone")
    with written_whole(page) as part:
        part.write_text(text, encoding="utf-8")
    typer.echo(page)


def _result(out: Path) -> tuple[Path, dict[str, Any]]:
    """The result file of a folder, and what it holds."""
    source = out / "result.json" if out.is_dir() else out
    try:
        result = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"there is no {source} ({error.strerror}); name the folder that compress wrote, e.g. "
                        "featherweight report out") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{source} is no JSON: {error}; expected what compress wrote") from error
    check_shape(result, str(source))
    return source, result


def pack(network: Annotated[Path, typer.Argument(help=".fw, safetensors or ONNX file")],
         archive: Annotated[Path, typer.Argument(help=".fwz file to write")], as_json: AsJson = False) -> None:
    """Write a saved network, or any safetensors or ONNX file, as an entropy-coded archive."""
    _say_sizes(network, archive, codec.pack(network, archive), as_json)


def unpack(archive: Annotated[Path, typer.Argument(help=".fwz file")],
           network: Annotated[Path, typer.Argument(help="file to write, of the kind that was packed")],
           limit: Annotated[int | None, typer.Option(min=1, help="bytes that the .fw file may have, where the archive "
                                                                 "claims more than strangers are allowed")] = None,
           as_json: AsJson = False) -> None:
    """Write the file that an archive holds, bit for bit."""
    codec.unpack(archive, network, limit=limit)
    _say_sizes(archive, network, network.stat().st_size, as_json)


def _say_sizes(source: Path, written: Path, size: int, as_json: bool) -> None:
    given = source.stat().st_size
    if as_json:
        show.document({"from": str(source), "from_bytes": given, "to": str(written), "to_bytes": size})
    else:
        typer.echo(f"{source} {given} bytes -> {written} {size} bytes")
