"""``python -m featherweight.codec ARCHIVE FILE``: writes the file that an archive holds.

numpy and constriction are all that this needs: a device has no torch (``pip install --no-deps featherweight``, then
``pip install numpy constriction``).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from featherweight.codec.archive import unpack
from featherweight.errors import FeatherweightError

USAGE = "usage: python -m featherweight.codec ARCHIVE.fwz FILE"


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0, or 2 where the archive cannot be read or the command line is wrong."""
    if len(arguments) != 2:
        sys.stderr.write(f"{USAGE}\n")
        return 2
    try:
        size = unpack(*arguments)
    except (FeatherweightError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{arguments[1]}: {size} bytes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
