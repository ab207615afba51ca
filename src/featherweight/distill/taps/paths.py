"""The same value in the student and in the teacher, named by the path of the module that gives it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

from featherweight.errors import RecipeError
from featherweight.network import Network


@dataclass(frozen=True)
class Tapped:
    """A value of both networks, by the names of the nodes that give it: ``network.add_tap`` takes them."""

    student: str
    teacher: str


def matched(student: Network, teacher: Network, paths: Iterable[str] | Mapping[str, str]) -> tuple[Tapped, ...]:
    """The nodes that give the outputs of the modules ``paths``, in both networks.

    paths: module paths, e.g. ("layer1", "layer2.0"), or a mapping from the student's path to the teacher's where they
        differ. A node's name stands for that node, where no module has this path.

    Raises RecipeError for a path that a network does not have, and for a module that gives several values or is called
    several times, with what there is.
    """
    pairs = paths if isinstance(paths, Mapping) else {path: path for path in paths}
    return tuple(Tapped(output_node(student, ours, "student"), output_node(teacher, theirs, "teacher"))
                 for ours, theirs in pairs.items())


def output_node(network: Network, path: str, whose: str = "network") -> str:
    """The name of the node that gives the output of the module ``path``; whose: "student", for the error's text."""
    inside = [n for n in network.calls() if _within(str(n.meta.get("module", "")), path)]
    if not inside:
        return _named(network, path, whose)
    members = set(inside)
    found = [n for n in inside if any(user not in members for user in n.users)]
    if len(found) > 1:
        values = network.values()
        found = [n for n in found if isinstance(values.get(n.name), Tensor)]
    if len(found) == 1 and _calls(inside, path) > 1:
        last = found[0].target, found[0].meta.get("module")
        found = [n for n in inside if (n.target, n.meta.get("module")) == last]
    if len(found) != 1:
        names = ", ".join(repr(n.name) for n in found)
        raise RecipeError(f"the {whose}'s module {path!r} gives {len(found)} values ({names or 'none is read'}); write "
                          f"the name of one of these nodes in its place, or the path of a module within it: "
                          f"{_listed(_paths(network, path))}")
    return found[0].name


def _within(module: str, path: str) -> bool:
    return module == path or module.startswith(f"{path}.")


def _calls(inside: list[Node], path: str) -> int:
    """How often a module is called: as often as the least read of its tensors, since parts of it may be shared too."""
    reads: dict[str, int] = {}
    for node in inside:
        for name in {str(given.target) for given in node.all_input_nodes if given.op == "get_attr"}:
            if _within(name, path):
                reads[name] = reads.get(name, 0) + 1
    return min(reads.values(), default=1)


def _named(network: Network, path: str, whose: str) -> str:
    try:
        return network.node(path).name
    except KeyError:
        paths = _paths(network)
        near = difflib.get_close_matches(path, paths, n=1, cutoff=0.5)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise RecipeError(f"the {whose} has no module {path!r}; {meant}It has {_listed(paths)}") from None


def _paths(network: Network, under: str = "") -> list[str]:
    """Paths of all modules that make calls, and of those they lie in, in order; or of those within one."""
    found: dict[str, None] = {}
    for path in network.paths():
        parts = path.split(".")
        found |= dict.fromkeys(".".join(parts[:i]) for i in range(1, len(parts) + 1))
    return [p for p in found if p and p != under and (not under or _within(p, under))]


def _listed(paths: list[str], most: int = 20) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return (", ".join(map(repr, paths[:most])) + more) or "none"
