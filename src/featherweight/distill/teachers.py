"""Teachers: a Network, a saved one, any module or function, or several; run once a batch, whoever asks."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from featherweight.errors import FeatherweightError, RecipeError
from featherweight.network import Network, load
from featherweight.network.devices import device_of, placed
from featherweight.network.file.digest import digest
from featherweight.network.trees import flatten, unflatten
from featherweight.steps.content import content
from featherweight.task import Inputs, call, described, move

Key = tuple[Any, ...]
#: teachers at work, so that several companions run one of them once
RUNNING: WeakValueDictionary[Key, Teacher] = WeakValueDictionary()
#: said where activations are to be matched
UNCAPTURED = ("activations are matched within one captured teacher, and this is a module, a function or several; write "
              "teacher=fw.capture(module, inputs), one for each distill.Features")


class Teacher:
    """A frozen teacher on a student's device: its outputs for a batch, and the activations that are asked for.

    Several members are an ensemble: floating outputs are averaged. Nothing of it is trained.
    """

    def __init__(self, members: tuple[Any, ...], device: torch.device, sources: tuple[Any, ...]) -> None:
        self.members, self.device, self.sources = members, device, sources
        self._seen: dict[str, Tensor] = {}
        self._tapped: set[str] = set()
        self._last: tuple[Key, Any, Any, dict[str, Tensor]] | None = None

    @property
    def network(self) -> Network:
        """The one member, captured. Raises RecipeError where it is no Network, or one of several."""
        if len(self.members) != 1 or not isinstance(self.members[0], Network):
            raise RecipeError(UNCAPTURED)
        return self.members[0]

    def tap(self, node: str) -> None:
        """Asks for the activation of a node of ``network``."""
        if node not in self._tapped:
            self._tapped.add(node)
            self.network.add_tap(node, lambda value: self._seen.update({node: value}))

    def values(self, inputs: Inputs) -> tuple[Any, dict[str, Tensor]]:
        """(output, node's name -> activation) for a batch; once for the same tensors, on the student's device."""
        key = _versions(inputs)
        if self._last is None or self._last[0] != key:
            self._seen = {}
            with torch.no_grad():
                outputs = [self._told(member, inputs) for member in self.members]
            self._last = key, inputs, _mean(outputs), self._seen
        return self._last[2], self._last[3]

    def _told(self, member: Any, inputs: Inputs) -> Any:
        """What a member gives; an error in it says whose it is."""
        try:
            return self._called(member, inputs)
        except Exception as error:
            raise RecipeError(f"the teacher ({type(member).__name__}) raised {type(error).__name__}: {error}; it is "
                              "called as the network is, with the inputs of a batch of the train split") from error

    def _called(self, member: Any, inputs: Inputs) -> Any:
        if not isinstance(member, nn.Module):
            return move(call(member, inputs), self.device)
        training = [m for m in member.modules() if m.training]
        first = next(iter(member.parameters()), None)
        for module in training:
            module.training = False
        try:
            output = call(member.eval() if isinstance(member, Network) else member,
                          inputs if first is None else move(inputs, first.device))
        finally:
            for module in training:
                module.training = True
        leaves, spec = flatten(output)
        return unflatten([move(leaf, self.device) for leaf in leaves], spec)

    def mark(self) -> str:
        """SHA-256 (hex) of all that its outputs follow from. Raises RecipeError for a function: nobody can tell."""
        return hashlib.sha256(repr([_mark(member) for member in self.members]).encode()).hexdigest()


def check_teacher(who: str, given: Any, captured: bool = False) -> None:
    """Raises RecipeError where no teacher can be made of what ``distill.WHO`` was given, None being the original.
    captured: activations within it are asked for."""
    if given is None:
        return
    sources = _sources(given)
    if not sources or any(isinstance(s, type) or not (callable(s) or isinstance(s, (str, Path))) for s in sources):
        raise RecipeError(f"distill.{who} was given teacher={given!r}; expected a Network, the path of a saved one, a "
                          f"module, a function of the inputs, or a tuple of these: {who}(teacher=network)")
    if captured and (len(sources) > 1 or not isinstance(sources[0], (Network, str, Path))):
        raise RecipeError(UNCAPTURED)


def _sources(given: Any) -> tuple[Any, ...]:
    return tuple(given) if isinstance(given, (tuple, list)) else (given,)


def tried(given: Any, original: Network, inputs: Inputs, who: str) -> Teacher:
    """The teacher as ``started`` gives it, which was called with ``inputs``. Raises RecipeError where it cannot be."""
    teacher = started(given, original, device_of(original), who)
    teacher.values(inputs)
    return teacher


def started(given: Any, original: Network | None, device: torch.device, who: str) -> Teacher:
    """The teacher that an objective called ``who`` was given, None for the original. Raises RecipeError where there is
    none, or no teacher can be made of it."""
    if given is None:
        given = original
    if given is None:
        raise RecipeError(f"distill.{who} has no teacher: the context holds no original; write {who}(teacher=network), "
                          "or run the step by fw.compress, which gives the original")
    check_teacher(who, given)
    sources = _sources(given)
    key = (str(device), *(_identity(s) for s in sources))
    found = RUNNING.get(key)
    if found is None:
        found = RUNNING[key] = Teacher(tuple(_member(s, device, who) for s in sources), device, sources)
    return found


def _member(source: Any, device: torch.device, who: str) -> Any:
    try:
        made: Any = load(source) if isinstance(source, (str, Path)) else source
    except FeatherweightError as error:
        raise RecipeError(f"distill.{who} was given teacher={str(source)!r}: {error}") from error
    return placed(made, device).eval() if isinstance(made, Network) else made


def _identity(source: Any) -> Key:
    """Equal as long as the source is the same and no tensor of it was changed."""
    if isinstance(source, (str, Path)):
        return str(source), Path(source).stat().st_mtime_ns if Path(source).exists() else 0
    tensors = source.state_dict(keep_vars=True).values() if isinstance(source, nn.Module) else ()
    return id(source), *(_state(t) for t in tensors)


def _versions(inputs: Any) -> Key:
    return tuple(_state(leaf) if isinstance(leaf, Tensor) else leaf for leaf in flatten(inputs)[0])


def _state(tensor: Tensor) -> Key:
    """Another one after every change in place (of tensors made in inference mode nobody counts the changes)."""
    return id(tensor), 0 if tensor.is_inference() else tensor._version


def _mean(outputs: list[Any]) -> Any:
    if len(outputs) == 1:
        return outputs[0]
    every = [flatten(output)[0] for output in outputs]
    forms = list(dict.fromkeys(", ".join(map(described, leaves)) for leaves in every))
    if len({tuple(getattr(leaf, "shape", ()) for leaf in leaves) for leaves in every}) > 1:
        raise RecipeError(f"the outputs of several teachers are averaged, and these give {' and '.join(forms)}; write "
                          "teachers whose outputs have one shape, or teacher=one of them")
    columns = zip(*every, strict=True)
    leaves = [torch.stack(column).mean(0) if isinstance(column[0], Tensor) and column[0].is_floating_point()
              else column[0] for column in columns]
    return unflatten(leaves, flatten(outputs[0])[1])


def _mark(member: Any) -> str:
    if isinstance(member, Network):
        return digest(member)
    if not isinstance(member, nn.Module):
        raise RecipeError("outputs of a teacher that is a function cannot be cached, since nobody can tell when it "
                          "changes; write teacher=module, or leave cache out")
    return content(member)


__all__ = ["Teacher", "check_teacher", "started", "tried"]
