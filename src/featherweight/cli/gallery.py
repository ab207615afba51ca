"""``featherweight examples``: lists the examples that ship with the package, and copies one."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path
from typing import Annotated

import typer

import featherweight
from featherweight.cli import show
from featherweight.errors import FileError, did_you_mean


def folders() -> dict[str, Path]:
    """Name -> folder of every example: of a checkout, or as the wheel installed them."""
    places = (Path(featherweight.__file__).parents[2] / "examples",
              Path(sysconfig.get_path("data")) / "share/featherweight/examples")
    place = next((p for p in places if p.is_dir()), None)
    if place is None:
        raise FileError(f"the examples are not there ({places[1]}); install the wheel of featherweight anew")
    return {p.name: p for p in sorted(place.iterdir()) if (p / "README.md").is_file()}


def title(folder: Path) -> str:
    """The first line of its README."""
    return (folder / "README.md").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def command_of(folder: Path) -> str:
    """The last command that its README names: the one that runs it."""
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    return next((line for line in reversed(lines) if line.startswith(("featherweight ", "python "))), "")


Name = Annotated[str | None, typer.Argument(metavar="NAME", help="the example to copy; none: list them")]
Out = Annotated[Path | None, typer.Option(help="folder to write, instead of one of its name")]


def examples(name: Name = None, out: Out = None) -> None:
    """List the examples, or copy one into a folder of its name."""
    found = folders()
    if name is None:
        for key, folder in found.items():
            show.line(f"{key:22} {title(folder)}")
        return
    if name not in found:
        raise FileError(f"there is no example {name!r}; {did_you_mean(name, found)}")
    place = out or Path(name)
    if place.exists():
        raise FileError(f"{place} is there already; write --out another-folder, or remove it")
    shutil.copytree(found[name], place, ignore=shutil.ignore_patterns("__pycache__", "out", "*.fw"))
    show.line(f"{place}: read {place / 'README.md'}, then: cd {place} && {command_of(found[name])}")


__all__ = ["examples"]
