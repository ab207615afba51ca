"""The command line: thin, one function a command."""

import sys

from featherweight import __version__

__all__ = ["main"]


def main() -> None:
    """The command ``featherweight``: says the version at once; for anything else torch and the commands are loaded.

    Where they are not installed, as on a device, ``featherweight unpack ARCHIVE FILE`` works without.
    """
    if sys.argv[1:] == ["--version"]:
        sys.stdout.write(f"{__version__}\n")
        return
    try:
        from featherweight.cli import app
    except ModuleNotFoundError:
        if sys.argv[1:2] != ["unpack"]:
            raise
        from featherweight.codec.__main__ import main as unpack

        sys.exit(unpack(sys.argv[2:]))
    app.main()
