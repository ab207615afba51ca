"""The public surface is what ``public_api.txt`` says: a change of it is seen before it is made."""

from __future__ import annotations

import difflib

from public_api import FILE, text


def test_the_public_surface_is_what_was_meant() -> None:
    kept, found = FILE.read_text(encoding="utf-8").splitlines(), text().splitlines()
    changes = "\n".join(difflib.unified_diff(kept, found, "tests/public_api.txt", "the code", lineterm="", n=1))
    assert not changes, (f"{changes}\n\nIf this was meant, write 'make api' and say it in CHANGELOG.md; of a name that "
                         "went or moved: CONTRIBUTING.md, 'Names that go'")
