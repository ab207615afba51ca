"""The structure of ``docs/architecture.md``, section 4: who may import whom, file by file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import featherweight

ROOT = Path(featherweight.__file__).parent

#: each line may import from the lines above it only
FLOORS = """
errors files seeds
processes task
numerics
network
steps codec
deploy
measure
axes calibrate
judge
recover distill
prune quantize factorize share
report
recipe
balance
demo
cli
__main__
"""
FLOOR = {folder: i for i, line in enumerate(FLOORS.strip().splitlines()) for folder in line.split()}
#: imports of our own inside functions that are allowed: (file's module, imported module), each with its reason
LATE: dict[tuple[str, str], str] = {
    ("cli", "cli.app"): "the version is said without torch",
    ("cli", "codec.__main__"): "a device that unpacks has no torch",
    ("cli.app", "demo.job"): "only the demo needs it",
    ("cli.app", "cli.groups"): "only inspect needs it",
    ("cli.app", "cli.ranks"): "the same",
    ("measure.memory", "deploy"): "it is a process of its own, which must start small",
    ("measure.memory", "network"): "the same",
    ("measure.memory", "network.load"): "the same",
}
#: lines of a file, lines of a function, share of all lines in one folder, files in one flat folder
FILE, FUNCTION, FOLDER, FLAT = 310, 60, 0.2, 15


def module(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return "" if name == "__init__" else name.removesuffix(".__init__")


FILES = {module(path): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
FACES = {name for name, path in FILES.items() if path.name == "__init__.py"}


def imports(name: str) -> Iterator[tuple[str, bool]]:
    """(module of ours that a file imports, whether inside a function); what stands under TYPE_CHECKING counts too."""

    def visit(node: ast.AST, late: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom):
                assert not child.level, f"{name} imports relatively in line {child.lineno}"
                for alias in child.names:
                    yield f"{child.module}.{alias.name}", late
            elif isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, late
            else:
                yield from visit(child, late or isinstance(child, ast.FunctionDef | ast.Lambda))

    for full, late in visit(TREES[name], False):
        package, _, found = full.partition(".")
        if package == "featherweight":
            while found not in FILES:
                found = found.rpartition(".")[0]
            if found and found != name:
                yield found, late


def circles() -> list[set[str]]:
    """Files that import one another: sets of two or more, each of which reaches all others of its set."""
    graph = {n: {f for f, _ in imports(n) if f not in FACES} for n in FILES if n not in FACES}

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for other in graph[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        return seen

    far = {n: reached(n) for n in graph}
    found = {frozenset({o for o in far[n] if n in far[o]} | {n}) for n in graph if n in far[n]}
    return [set(c) for c in sorted(found, key=sorted)]


def test_every_folder_is_on_a_floor() -> None:
    assert {name.partition(".")[0] for name in FILES if name} == set(FLOOR)


@pytest.mark.parametrize("folder", sorted(FLOOR))
def test_a_folder_imports_only_from_the_floors_below(folder: str) -> None:
    found = [(name, other) for name in FILES if name.partition(".")[0] == folder and name not in FACES
             for other, _ in imports(name)]
    up = [(a, b) for a, b in found if b.partition(".")[0] != folder
          and FLOOR[b.partition(".")[0]] >= FLOOR[folder]]
    assert not up


def test_late_imports_stand_in_the_list() -> None:
    found = {(name, other) for name in FILES for other, late in imports(name) if late}
    assert found == set(LATE)


def test_no_files_import_one_another() -> None:
    assert circles() == []


def test_files_functions_and_folders_have_a_size_to_read() -> None:
    lines = {name: len(FILES[name].read_text().splitlines()) for name in FILES}
    long = [n for n, count in lines.items() if count > FILE]
    long += [f"{n}.{f.name}" for n, tree in TREES.items() for f in ast.walk(tree)
             if isinstance(f, ast.FunctionDef) and f.end_lineno is not None and f.end_lineno - f.lineno >= FUNCTION]
    assert not long
    total = sum(lines.values())
    folders = {folder: sum(c for n, c in lines.items() if n.partition(".")[0] == folder) for folder in FLOOR}
    assert {f for f, count in folders.items() if count > FOLDER * total} == set()
    flat = {path.parent for path in FILES.values()}
    assert not [p for p in flat if len([f for f in p.glob("*.py") if f.name != "__init__.py"]) > FLAT]


def test_a_class_name_means_one_thing() -> None:
    names: dict[str, list[str]] = {}
    for name, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                names.setdefault(node.name, []).append(name)
    assert {n: where for n, where in names.items() if len(where) > 1} == {}
