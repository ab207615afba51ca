"""The benchmarks' result files: rows are appended, files of any age are read, tables take the newest row."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import rows as rows_  # noqa: E402
import tables  # noqa: E402
from rows import Rows, histories, newest  # noqa: E402


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rows_, "RESULTS", tmp_path)
    return tmp_path / "arms.json"


def test_rows_are_appended_and_say_when_of_what_and_where(path: Path) -> None:
    rows = Rows("arms.json")
    assert "a" not in rows
    rows.add("a", {"top1": 90.0})
    rows.add("b", {"top1": 70.0, "device": "an accelerator"})
    rows.add("a", {"top1": 91.0})
    assert "a" in rows
    assert [r["top1"] for r in histories(path)["a"]] == [90.0, 91.0]
    assert rows["a"]["top1"] == rows.newest()["a"]["top1"] == 91.0
    head = subprocess.run(["git", "-C", BENCHMARKS, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert head.startswith(rows["a"]["commit"].rstrip("+"))
    assert rows["a"]["date"].endswith("+00:00")
    assert rows["a"]["device"] == rows["a"]["machine"]["processor"]
    assert rows["b"]["device"] == "an accelerator"


def test_rows_without_a_date_are_the_oldest(path: Path) -> None:
    path.write_text(json.dumps({"rows": {"a": {"top1": 90.0}, "b": [
        {"top1": 3.0, "date": "2026-02-01"}, {"top1": 2.0, "date": "2026-01-01"}, {"top1": 1.0}]}}))
    assert [r["top1"] for r in histories(path)["b"]] == [1.0, 2.0, 3.0]
    Rows(path).add("a", {"top1": 91.0})
    assert [r["top1"] for r in histories(path)["a"]] == [90.0, 91.0]
    assert [r["top1"] for r in newest(path).values()] == [91.0, 3.0]
    path.write_text(json.dumps({"models": {"alexnet": {"ok": True}}, "device": "x86_64"}))
    assert newest(path) == {"alexnet": {"ok": True}}
    assert histories(path.with_name("none.json")) == {}


def test_asked_for_again_earlier_rows_do_not_count(path: Path) -> None:
    path.write_text(json.dumps({"rows": {"a": {"top1": 90.0}, "b": [{"top1": 1.0, "date": "2026-01-01"}]}}))
    rows = Rows(path, again=True)
    assert "a" not in rows
    assert "b" not in rows
    rows.add("b", {"top1": 2.0})
    assert "b" in rows
    assert len(histories(path)["b"]) == 2


def test_the_page_is_made_from_the_committed_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tables, "PAGE", tmp_path / "results.md")
    tables.main()
    assert (tmp_path / "results.md").read_text() == (BENCHMARKS.parent / "docs/results.md").read_text()
