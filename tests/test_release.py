"""What a release is made of fits together: versions, the matrix, the make targets that CI calls, the changelog."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import featherweight as fw

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read(path: str) -> Any:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / path).read_text())


def test_the_citation_names_this_version() -> None:
    held = read("CITATION.cff")
    assert held["version"] == fw.__version__
    assert held["license"] == PROJECT["license"]
    assert {"cff-version", "message", "title", "authors"} <= set(held)


def test_ci_runs_every_python_that_is_promised_and_the_oldest_torch() -> None:
    rows = read(".github/workflows/checks.yml")["jobs"]["tests"]["strategy"]["matrix"]["include"]
    promised = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert [row["python"] for row in rows] == promised
    oldest = next(d for d in PROJECT["dependencies"] if d.startswith("torch>="))
    assert f"=={oldest.removeprefix('torch>=')}.*" in [row["torch"] for row in rows]
    assert "" in [row["torch"] for row in rows], "and the newest"


def test_what_ci_calls_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    calls = [step["run"] for job in read(".github/workflows/checks.yml")["jobs"].values() for step in job["steps"]
             if "run" in step]
    assert len(calls) >= 4
    for call in calls:
        words = call.split()
        assert (words[0] == "make" and words[1] in targets) or (ROOT / words[0]).is_file(), call


def test_issue_templates_ask_for_something() -> None:
    templates = [p for p in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if p.name != "config.yml"]
    assert len(templates) == 3
    for path in templates:
        held = read(str(path.relative_to(ROOT)))
        assert held["name"]
        assert any(part.get("validations", {}).get("required") for part in held["body"]) or "wish" in path.name


def test_the_changelog_keeps_its_form() -> None:
    """Keep a Changelog: what is not released, then versions with their days, newest first, then kinds of changes."""
    text = (ROOT / "CHANGELOG.md").read_text()
    heads = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert heads[0] == "[Unreleased]"
    dated = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", head) for head in heads[1:]]
    assert all(dated)
    found = [(tuple(map(int, m[1].split("."))), m[2]) for m in dated if m]
    assert found == sorted(found, reverse=True)
    assert found[0][0] == tuple(map(int, fw.__version__.partition(".dev")[0].split(".")))
    assert str(read("CITATION.cff")["date-released"]) == found[0][1] or ".dev" in fw.__version__
    kinds = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
