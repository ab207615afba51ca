"""Activations of student and teacher matched with no help: at the same paths, else by resolution and depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from featherweight.axes.groups import AxisGroups, axis_groups
from featherweight.axes.labels import Labels
from featherweight.distill.taps.attention import attentions
from featherweight.distill.taps.paths import output_node
from featherweight.distill.taps.places import Place, layers, places, stages, trunk
from featherweight.errors import RecipeError
from featherweight.network import Network
from featherweight.network.edit import WEIGHTED
from featherweight.network.layers import Skipped
from featherweight.steps import Plan

#: the names that ``taps`` may be, beside paths
CHOICES = {"stages": stages, "trunk": trunk, "layers": layers, "attention": attentions}
#: share of the layers of both that both have by path, from which the student is taken for a child of the teacher
CHILD = 0.5


@dataclass(frozen=True)
class Match:
    """One activation of the student and the one of the teacher that it is compared with.

    kept: the teacher's channels that the student kept, which are compared directly; None where that is not known.
    """

    student: Place
    teacher: Place
    kept: Tensor | None = field(default=None, compare=False)

    def said(self, projected: bool) -> str:
        """For people; projected: whether widths that differ are made equal by a projector."""
        how = f"{len(self.kept)} kept of {self.teacher.width} channels" if self.kept is not None else (
            f"{self.student.width} channels" if self.direct else
            f"{self.student.width} to {self.teacher.width} channels{' by a projector' if projected else ''}")
        return f"{self.student} with {self.teacher} ({how})"

    @property
    def direct(self) -> bool:
        """Whether the channels are compared without a projector."""
        return self.kept is not None or self.student.width == self.teacher.width


@dataclass(frozen=True)
class Matches:
    """What was matched, and what was not and why."""

    found: tuple[Match, ...]
    skipped: tuple[Skipped, ...] = ()

    def notes(self, who: str, projected: bool) -> list[str]:
        """For the report: one line for what was matched, one for each reason why the rest was not."""
        lines = [f"{who} compares {'; '.join(m.said(projected) for m in self.found)}"]
        for reason in dict.fromkeys(s.reason for s in self.skipped):
            paths = [s.path for s in self.skipped if s.reason == reason]
            lines.append(f"{who} leaves out {', '.join(paths[:8])}{' ...' if len(paths) > 8 else ''}: {reason}")
        return lines


def match(student: Network, teacher: Network, taps: str | Sequence[str] | Mapping[str, str],
          plans: Sequence[Plan] = ()) -> Matches:
    """The activations to compare.

    taps: a key of ``CHOICES``, found automatically; or paths of modules or nodes, as a
        mapping where the teacher's are named otherwise.
    plans: those that made the student of the teacher, in order; they know which channels were kept.

    Raises RecipeError for a name that nothing has, and where nothing matches.
    """
    found = _named(student, teacher, taps) if not isinstance(taps, str) or taps not in CHOICES else (
        _same_paths(student, teacher, taps) if is_child(student, teacher) else _by_size(student, teacher, taps))
    if not found.found:
        raise RecipeError(f"taps={taps!r} matched nothing of the student with the teacher"
                          f"{''.join(f'; {s.path}: {s.reason}' for s in found.skipped[:3])}; write the paths of two "
                          'modules, e.g. taps={"layer2": "features.5"}')
    kept = kept_channels(teacher, [m.teacher for m in found.found], plans)
    return Matches(tuple(_with_kept(m, kept.get(m.teacher.node)) for m in found.found), found.skipped)


def _with_kept(found: Match, kept: Tensor | None) -> Match:
    fits = kept is not None and len(kept) == found.student.width < found.teacher.width
    return Match(found.student, found.teacher, kept if fits else None)


def is_child(student: Network, teacher: Network) -> bool:
    """Whether both have most layers by path, as what was pruned, factorized or quantized has with its parent."""
    own, theirs = ({str(n.meta.get("module", "")) for n in net.calls(*WEIGHTED)} for net in (student, teacher))
    return len(own & theirs) >= CHILD * max(len(own), len(theirs))


def _named(student: Network, teacher: Network, taps: str | Sequence[str] | Mapping[str, str]) -> Matches:
    given = taps if isinstance(taps, Mapping) else {path: path for path in ([taps] if isinstance(taps, str) else taps)}
    ours, theirs = places(student), places(teacher)
    found = []
    for one, other in given.items():
        a, b = output_node(student, one, "student"), output_node(teacher, other, "teacher")
        if a not in ours or b not in theirs:
            raise RecipeError(f"{one!r} or {other!r} gives no floating activation of two or more axes; write the path "
                              "of another module")
        found.append(Match(ours[a], theirs[b]))
    return Matches(tuple(found))


def _same_paths(student: Network, teacher: Network, taps: str) -> Matches:
    ours = {p.node: p for p in attentions(student)} if taps == "attention" else places(student)
    found: list[Match] = []
    left: list[Skipped] = []
    for place in CHOICES[taps](teacher):
        own = ours.get(place.node)
        if own is None or own.path != place.path:
            own = _at(student, ours, place.path, taps)
        if own is None:
            left.append(Skipped(str(place), "the student gives no one activation at this path"))
        elif own.resolution != place.resolution:
            left.append(Skipped(str(place), "the student has another resolution at this path"))
        else:
            found.append(Match(own, place))
    return Matches(tuple(found), tuple(left))


def _at(student: Network, ours: Mapping[str, Place], path: str, taps: str) -> Place | None:
    """The one place of the student at a module's path; None where there is none, or several."""
    if taps == "attention":
        found = [place for place in ours.values() if place.path == path]
        return found[0] if len(found) == 1 else None
    try:
        return ours.get(output_node(student, path, "student"))
    except RecipeError:
        return None


def _by_size(student: Network, teacher: Network, taps: str) -> Matches:
    """By equal resolution, several of one by depth; all by depth where no resolution is equal."""
    ours, theirs = CHOICES[taps](student), CHOICES[taps](teacher)
    common = {p.resolution for p in ours} & {p.resolution for p in theirs}
    if not common:
        return Matches(tuple(_by_depth(ours, theirs)))
    found = [m for size in sorted(common, reverse=True)
             for m in _by_depth([p for p in ours if p.resolution == size], [p for p in theirs if p.resolution == size])]
    left = [Skipped(f"{whose} {p}", "the other network has no activation of this resolution")
            for whose, all_ in (("the student's", ours), ("the teacher's", theirs)) for p in all_
            if p.resolution not in common]
    return Matches(tuple(sorted(found, key=lambda m: m.student.depth)), tuple(left))


def _by_depth(ours: Sequence[Place], theirs: Sequence[Place]) -> list[Match]:
    """As many pairs as the shorter of both has, the last with the last."""
    count = min(len(ours), len(theirs))
    return [Match(ours[(i + 1) * len(ours) // count - 1], theirs[(i + 1) * len(theirs) // count - 1])
            for i in range(count)]


def kept_channels(teacher: Network, asked: Sequence[Place], plans: Sequence[Plan]) -> dict[str, Tensor]:
    """Node's name -> the channels of the teacher's activation that are left after all ``plans``, made one on the result
    of the other, beginning with the teacher itself; nothing for activations whose channels no plan speaks of."""
    found: dict[str, Tensor] = {}
    network = teacher
    for number, plan in enumerate(plans):
        kept = plan.kept(network)
        if kept:
            axes = axis_groups(network, getattr(plan, "heads", "whole"))
            gone = np.zeros(int(axes.component.max(initial=-1)) + 1, dtype=bool)
            for name, positions in kept.items():
                for atoms, stay in zip(axes.tensors.get(name, ()), positions, strict=False):
                    if atoms is not None and stay is not None:
                        gone[axes.component[np.delete(atoms, stay.numpy())]] = True
            for place in asked:
                stays = _staying(axes, gone, place)
                if stays is not None:
                    before = found.get(place.node)
                    found[place.node] = stays if before is None else before[stays]
        if number + 1 < len(plans):
            network = plan.apply(network)
    return found


def _staying(axes: AxisGroups, gone: np.ndarray, place: Place) -> Tensor | None:
    labels = axes.values.get(place.node)
    field = labels.field(place.axis % (len(place.shape) + 1)) if isinstance(labels, Labels) else None
    if field is None or len(field.dims) != 1:
        return None
    return torch.from_numpy(np.flatnonzero(~gone[axes.component[field.atoms.ravel()]]))
