"""``featherweight report``: the page of a job drawn again, or several jobs on one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from featherweight.errors import FileError
from featherweight.files import written_whole
from featherweight.report import compared, render
from featherweight.report.shape import check_shape
from featherweight.report.taught import brought

Folders = Annotated[list[Path], typer.Argument(metavar="OUT_DIR...", help="folders that compress wrote; several are "
                                               "compared on one page")]
Beside = Annotated[list[Path] | None, typer.Option(
    metavar="OUT_DIR", help="folder of the same recipe without a teacher: the page says what distillation brought; may "
                            "be given several times")]
Page = Annotated[Path, typer.Option("--page", help="the page to write where several folders are compared")]


def report(out: Folders, page: Page = Path("compare.html"), beside: Beside = None) -> None:
    """Draw report.html again from a folder's result.json; of several folders, one page that compares them."""
    held = {str(place): _result(place) for place in out}
    if len(held) > 1:
        names = _short(list(held))
        _write(page, ", ".join(held), lambda: compared({names[place]: result for place, (_, result) in held.items()}))
        return
    source, result = next(iter(held.values()))
    others = [_result(place)[1] for place in beside or ()]
    _write(source.with_name("report.html"), str(source), lambda: render(result, others))
    if beside and not brought(result, others):
        raise FileError(f"the recipe of {source} is not that of {', '.join(map(str, beside))} with a teacher beside "
                        "its trainings; name a folder whose recipe lacks the teacher alone")


def _result(place: Path) -> tuple[Path, dict[str, Any]]:
    """The file and what it holds. Raises FileError for one that is missing or damaged."""
    source = place / "result.json" if place.is_dir() else place
    try:
        result: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"there is no {source} ({error.strerror}); name the folder that compress wrote, e.g. "
                        "featherweight report out") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{source} is no JSON: {error}; expected what compress wrote") from error
    check_shape(result, str(source))
    return source, result


def _write(page: Path, source: str, draw: Callable[[], str]) -> None:
    try:
        text = draw()
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise FileError(f"{source} is damaged: {type(error).__name__}: {str(error)[:200]}; expected what compress "
                        "wrote") from error
    with written_whole(page) as part:
        part.write_text(text, encoding="utf-8")
    typer.echo(page)


def _short(places: list[str]) -> dict[str, str]:
    """Each place without what all of them begin and end with."""
    parts = [Path(place).parts for place in places]
    while all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    while all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    return {place: "/".join(p) for place, p in zip(places, parts, strict=True)}


__all__ = ["report"]
