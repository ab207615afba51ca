"""How docstrings become Markdown: lists of options as lists, examples as code.

The package's docstrings are plain text: an option is a line ``name: what it does``, an example a run of ``>>>`` lines.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

#: "name: ..." or "name, name: ..." at the start of a line
OPTION = re.compile(r"^(?P<names>[a-z_]\w*(?:(?:,| or) [a-z_]\w*)*): (?P<rest>.*)")


def markdown(text: str) -> str:
    """The text of a docstring with options as a list and examples as fenced code."""
    lines: list[str] = []
    code = False
    for line in text.splitlines():
        bare = line.strip()
        if bare in ("Example:", "Examples:"):
            continue
        if bare.startswith(">>>") and not code:
            lines += ["", "```pycon"]
            code = True
        if code and not bare:
            lines += ["```", ""]
            code = False
        if code:
            lines.append(bare if bare.startswith((">>>", "...")) else line.strip())
            continue
        found = OPTION.match(line)
        if found:
            names = ", ".join(f"`{n}`" for n in re.split(r", | or ", found["names"]))
            lines += ["", f"- {names}: {found['rest']}"]
        else:
            lines.append(line)
    return "\n".join([*lines, "```"] if code else lines)


class Plain(Extension):
    """Rewrites every docstring when it was read."""

    def on_object(self, *, obj: Any, **more: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
