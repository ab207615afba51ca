"""The command line: thin, one function a command."""

import sys

from featherweight import __version__

__all__ = ["main"]


def main() -> None:
    """The command ``featherweight``: says the version at once; for anything else torch and the commands are loaded."""
    if sys.argv[1:] == ["--version"]:
        sys.stdout.write(f"{__version__}\n")
        return
    from featherweight.cli import app

    app.main()
