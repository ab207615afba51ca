"""``featherweight pack`` and ``unpack``: files as entropy-coded archives."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featherweight import codec
from featherweight.cli import show
from featherweight.cli.flags import AsJson


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
