"""Arguments and flags that many commands have; the library's messages in the words of the command line."""

from __future__ import annotations

from typing import Annotated

import typer

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="a saved .fw file, a job file (its model and task), or "
                                          "module:function that returns a module, (module, example inputs) or a "
                                          "Network")]
TaskName = Annotated[str | None, typer.Option("--task", metavar="MODULE:FUNCTION", help="function that returns a Task")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]
#: as the library says it -> as one writes it on the command line; the longer ones first
SPOKEN = {
    "write compress(..., out=another folder), or resume=False to start over":
        "write --out another-folder, or --no-resume to start over",
    "write compress(..., out=another folder)": "write --out another-folder",
    "write compress(..., resume=False) to start over": "write --no-resume to start over",
    "compress(..., out=another folder), or resume=False to start over":
        "--out another-folder, or --no-resume to start over",
    "write another out=...": "write --out another-folder",
    "call it again to go on": "give the same command again to go on",
}


def in_flags(message: str) -> str:
    """The message with flags where the library names arguments of Python."""
    for said, flag in SPOKEN.items():
        message = message.replace(said, flag)
    return message
