"""The command ``featherweight``, also as ``python -m featherweight``."""

from __future__ import annotations

import sys

from featherweight import __version__


def main() -> None:
    """Says the version at once; for anything else the commands are loaded, and torch with them."""
    if sys.argv[1:] == ["--version"]:
        sys.stdout.write(f"{__version__}\n")
        return
    from featherweight import cli

    cli.main()


if __name__ == "__main__":
    main()
