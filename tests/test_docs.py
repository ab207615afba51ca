"""Every block of code in the documentation runs: Python in one namespace a page, job files, commands.

A page's Python begins with what ``test_examples.given`` holds: ``fw``, ``torch``, ``nn``, a small ``model`` with
``images``, its ``network`` and a ``task``. Blocks without a language are output or trees of files.
"""

from __future__ import annotations

import itertools
import re
import shlex
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import typer

import featherweight as fw
from featherweight.cli.app import app
from featherweight.steps.kinds import REGISTERED
from featherweight.steps.plan import PLANS
from public_api import modules, names_of
from test_examples import WITHOUT, given

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import figures  # noqa: E402

#: pages whose text is made by a command, or has no code
PAGES = {str(p.relative_to(ROOT)): p for p in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
         if p.name not in ("results.md", "architecture.md")}
#: pages that take long: whole jobs, or loops that test_integrations runs too
SLOW = ("README.md", "docs/howto/own-loop.md", "docs/techniques/search.md")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {"python", "toml", "sh", ""}
pytestmark = pytest.mark.xdist_group("examples")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its text, the line that it begins in."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [Block(m[2], re.sub(f"^{m[1]}", "", m[3], flags=re.MULTILINE), text[:m.start()].count("\n") + 2)
            for m in FENCE.finditer(text)]


def of(page: Path, language: str) -> list[Block]:
    return [b for b in blocks(page) if b.language == language]


@pytest.mark.filterwarnings("ignore")  # of packages that a page uses
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n
                                  for n, p in PAGES.items() if of(p, "python")])
def test_python_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {**given(), "network": given()["network"].copy(), "__name__": "page"}
    if name == "README.md":  # what its reader has
        loader = list(names["task"].batches("train"))
        names |= {"train_loader": loader, "validation_loader": loader, "example_inputs": names["images"][:2],
                  "optimizer": None}
    with patch.dict(REGISTERED), patch.dict(PLANS), patch.dict(fw.deploy.TARGETS):
        for block in of(PAGES[name], "python"):
            code = compile("\n" * (block.line - 1) + block.text, name, "exec", dont_inherit=True)
            exec(code, names)


@pytest.mark.parametrize("name", [n for n, p in PAGES.items() if of(p, "toml")])
def test_job_files_are_jobs(name: str) -> None:
    for block in of(PAGES[name], "toml"):
        tables = tomllib.loads(block.text)
        if "model" in tables:
            job = fw.Job.from_toml(block.text)
            assert job.recipe.steps or job.goal
        else:
            assert fw.Recipe.from_toml(block.text).steps


def words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def commands() -> list[tuple[str, list[str]]]:
    """(page and line, words) of every command in the pages, one a line."""
    found = []
    for name, page in PAGES.items():
        for block in of(page, "sh"):
            for at, line in enumerate(block.text.replace("\\\n", "  ").splitlines()):
                if words(line):
                    found.append((f"{name}:{block.line + at}", words(line)))
    return found


@pytest.mark.parametrize(("where", "line"), commands(), ids=[where for where, _ in commands()])
def test_commands_exist(where: str, line: list[str]) -> None:
    """``featherweight`` commands are parsed by its parser, with their options; ``make`` targets and extras exist."""
    first, *rest = line
    if first == "featherweight":
        group: Any = typer.main.get_command(app)
        if rest[0].startswith("--"):
            assert rest[0] in {option for p in group.params for option in p.opts}
        else:
            context = group.commands[rest[0]].make_context(rest[0], list(rest[1:]))
            assert context.command.name == rest[0]
    elif first == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert rest[0] in targets
    elif first == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for extra in re.findall(r"featherweight\[([\w,]+)\]", " ".join(rest)):
            assert set(extra.split(",")) <= set(extras)
    else:
        assert first in ("python", "git", "cd", "accelerate"), f"{where}: {first} is no command that the tests know"


def test_blocks_have_a_language_that_is_run() -> None:
    for name, page in PAGES.items():
        for block in blocks(page):
            assert block.language in LANGUAGES, f"{name}:{block.line}"


def test_links_lead_somewhere() -> None:
    for name, page in PAGES.items():
        text = FENCE.sub("", page.read_text())
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{name} links to {target}"


def test_figures_are_drawn_from_the_rows() -> None:
    """Every place in a page has a figure; what stands there was made, not typed."""
    places = {name for page in PAGES.values() for name in re.findall(r"<!-- measured: ([\w-]+) -->", page.read_text())}
    assert places == set(figures.PLACES)
    for path, text in figures.written().items():
        assert path.exists()
        if path.suffix == ".md":
            assert path.read_text().count("<!-- measured:") == text.count("![") == 1
        else:
            boxes = [float(y) for y in re.findall(r'<rect class="(?:bar|ours)" x="[\d.]+" y="([\d.]+)"', text)]
            assert len(boxes) > 1
            assert all(b - a >= 17 for a, b in itertools.pairwise(boxes)), "a bar lies on a bar"


def test_every_public_function_and_class_is_in_the_reference() -> None:
    """A name that is a module too (``task.images``) is named by its place, since it would stand for the module."""
    pages = "\n".join(p.read_text() for p in (ROOT / "docs/reference").glob("*.md"))
    whole = set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))
    missing = []
    for module in modules():
        package = Path(module.__file__ or "").parent if hasattr(module, "__path__") else None
        for name in names_of(module):
            value = getattr(module, name)
            hidden = package is not None and ((package / f"{name}.py").exists() or (package / name).is_dir())
            full = f"{module.__name__}.{name}"
            if callable(value) and hidden and module.__name__ in whole and full not in WITHOUT:
                missing += [full] if f"{value.__module__}.{name}" not in whole else []
    assert missing == []
