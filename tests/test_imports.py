"""Who may import whom: lower layers never import upper ones, techniques never one another."""

from __future__ import annotations

import ast
from pathlib import Path

import featherweight

ROOT = Path(featherweight.__file__).parent
LAYERS = [
    {"errors", "files", "seeds"},
    {"numerics", "task"},
    {"network"},
    {"steps", "codec", "deploy"},
    {"measure"},
    {"prune", "quantize", "factorize", "share", "distill", "recover"},
    {"report"},
    {"recipe"},
    {"cli"},
]
ALONE = {"prune", "quantize", "factorize", "share", "distill", "recover", "codec", "deploy"}
LEVEL = {name: i for i, layer in enumerate(LAYERS) for name in layer}


def imported(file: Path) -> set[str]:
    """First-level featherweight modules that ``file`` imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "featherweight":
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("featherweight.")}
    return found


def test_imports_keep_the_order():
    wrong = []
    for file in sorted(ROOT.rglob("*.py")):
        own = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        assert own in LEVEL, f"{own} has no place in the order: add it to LAYERS and to docs/architecture.md"
        for other in imported(file) - {own}:
            above = LEVEL.get(other, -1) > LEVEL[own]
            if above or (LEVEL.get(other) == LEVEL[own] and own in ALONE):
                wrong.append(f"{file.relative_to(ROOT)} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_there_are_no_cycles():
    graph: dict[str, set[str]] = {}
    for file in ROOT.rglob("*.py"):
        own = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if own != "__init__":
            graph.setdefault(own, set()).update(imported(file) - {own})
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a cycle of imports: {' -> '.join((*path, name))}"
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())
