"""``Features``: activations within the student drawn to those within the teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, conv2d, interpolate, linear, relu

from featherweight.distill.losses import feature, tokens
from featherweight.distill.outputs import Where, counted
from featherweight.distill.taps.match import Match, Matches, match
from featherweight.distill.teachers import Teacher, check_teacher, started, tried
from featherweight.errors import RecipeError
from featherweight.network import Network
from featherweight.network.devices import device_of
from featherweight.seeds import seed_from
from featherweight.steps import Companion, Context, Skipped
from featherweight.steps.options import Numbers, check_known, check_numbers
from featherweight.task import Batch, Inputs, Task

NUMBERS = {"weight": Numbers(1.0, above=0), "end": Numbers(1.0, above=0, most=1, noun="a share of the training,"),
           "masked": Numbers(0.65, above=0, below=1, noun="a share of the places,")}


@dataclass(frozen=True)
class FeatureLoss:
    """A row of ``LOSSES``. loss: of two activations [n, c, ...] and a mask (bool, [n, ...] or None).

    width: both need equal widths, so a projector is put where they differ. scaled: both are divided by the teacher's
    root mean square, so that the loss is relative and ``weight`` means the same at every place. tokens: the mask is
    one of tokens [n, t], whatever the activation's axes. spread: channels are compared over places or tokens, which
    activations [n, c] do not have.
    """

    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    width: bool = True
    scaled: bool = True
    generator: bool = False
    fused: bool = False
    tokens: bool = False
    spread: bool = True


def _zeroed(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """A loss without a mask of its own: what does not count is zero in both."""
    def masked(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return loss(student, teacher)
        share = mask.float().mean().clamp(min=1e-6)
        return loss(feature.dropped(student, mask), feature.dropped(teacher, mask)) / share
    return masked


def _tokens(loss: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    return lambda student, teacher, mask: loss(student.flatten(2).transpose(1, 2), teacher.flatten(2).transpose(1, 2),
                                               mask=None if mask is None else mask.flatten(1))


#: name -> loss; the sources stand in ``losses/feature.py`` and ``losses/tokens.py``
LOSSES: dict[str, FeatureLoss] = {
    "hint": FeatureLoss(_zeroed(feature.hint), spread=False),
    "attention": FeatureLoss(_zeroed(feature.attention), width=False, scaled=False),
    "similarity": FeatureLoss(_zeroed(feature.similarity), width=False, scaled=False, spread=False),
    "review": FeatureLoss(_zeroed(feature.pyramid), fused=True),
    "cwd": FeatureLoss(_zeroed(feature.channelwise), scaled=False),
    "fgd": FeatureLoss(feature.focal_global),
    "mgd": FeatureLoss(_zeroed(feature.hint), generator=True),
    "hidden": FeatureLoss(_tokens(tokens.hidden)),
    "relations": FeatureLoss(_tokens(tokens.relations), width=False, scaled=False),
    "maps": FeatureLoss(tokens.attention_maps, width=False, scaled=False, tokens=True),
}


@dataclass(frozen=True)
class Features:
    """Activations within the student are drawn to those within the teacher, at matched places: a term of the loss.

    loss: "hint" (mean squared difference), "attention" (maps of energy), "similarity" (of samples), "review" (fused
        from deep to shallow, over several scales), "cwd" (channels as distributions over places), "fgd" (focal and
        global, for detectors), "mgd" (the teacher's map generated from a masked one), "hidden" and "relations" (of
        tokens), "maps" (attention maps of transformers, with taps="attention").
    weight: factor on the term, which is the mean over the places. end: share of the training, 0..1, after which the
        term is left out.
    taps: "stages" (the end of every resolution), "trunk", "layers" (all that one module gives) or "attention" (the
        attention maps, of fused calls too), found automatically; or paths of modules or nodes, as a mapping where the
        teacher's are named otherwise.
    teacher: a network, or the path of a saved one; None is the original.
    mask: where it counts (padding does not), or for "fgd" what lies in objects: a key of the inputs, or a function of
        (inputs, target) that gives a mask [n, h, w] or [n, t].
    masked: share of the places that "mgd" hides.

    A network that was pruned, factorized or quantized is matched to what it came from at the same paths. Channels that
    were kept are compared directly, where the context's ``plans`` say which; where widths differ otherwise, a projector
    is trained along and is gone from the result. Resolutions that differ are averaged down to the smaller one.
    What was matched, and what not and why, is told in the result's ``notes``.

    Example:
        >>> plan = fw.prune.Channels(macs=0.5).plan(network, task)
        >>> taught = fw.recover.Train(epochs=1, beside=(fw.distill.Logits(), fw.distill.Features(taps="layers")))
        >>> context = fw.steps.Context(original=network, plans=(plan,))
        >>> [note for note in taught.fit(plan.apply(network), task, context).notes if "distill" in note][0]
        'distill.Features compares 0 with 0 (6 kept of 8 channels); ...'
    """

    loss: str = "hint"
    weight: float = 1.0
    taps: str | tuple[str, ...] | Mapping[str, str] = "stages"
    teacher: Any = field(default=None, repr=False, metadata={"file": True})
    mask: Where = field(default=None, repr=False)
    end: float = 1.0
    masked: float = 0.65

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        check_numbers(self, NUMBERS)
        check_known("Features", "loss", self.loss, LOSSES)
        check_teacher("Features", self.teacher, captured=True)
        if LOSSES[self.loss].tokens and self.taps != "attention":
            raise RecipeError(f"Features(loss={self.loss!r}, taps={self.taps!r}) compares attention maps, which no "
                              f'such places give; write Features({self.loss!r}, taps="attention")')

    def check_on(self, network: Network, task: Task, batch: Batch) -> None:
        """Raises RecipeError where the teacher cannot be loaded, or called with a batch."""
        tried(self.teacher, network, batch[0], "Features")

    def start(self, network: Network, task: Task, context: Context) -> Companion:
        """The teacher, taps on both networks and projectors. Raises RecipeError where nothing matches."""
        self.check()
        teacher = started(self.teacher, context.original, device_of(network), "Features")
        known = context.plans if self.teacher is None and LOSSES[self.loss].width else ()
        matches = self._comparable(match(network, teacher.network, self.taps, known))
        return _Hints(self, Tapping(network, teacher, matches), context.seed)

    def _comparable(self, matches: Matches) -> Matches:
        """The matches that have what the loss compares. Raises RecipeError where none has."""
        if not LOSSES[self.loss].spread:
            return matches
        flat = [m for m in matches.found if not (m.student.resolution and m.teacher.resolution)]
        found = tuple(m for m in matches.found if m not in flat)
        if not found:
            raise RecipeError(f"Features(loss={self.loss!r}) compares channels over places or tokens, and what matched "
                              f"has none ({flat[0].student}); write Features('hint') or Features('similarity')")
        reason = f"it has no places or tokens, over which {self.loss!r} compares channels"
        return Matches(found, (*matches.skipped, *(Skipped(m.student.path or m.student.node, reason) for m in flat)))


class Tapping:
    """Taps on the student and its teacher at the matched places: pairs of activations of a batch."""

    def __init__(self, network: Network, teacher: Teacher, matches: Matches) -> None:
        self.teacher, self.matches, self.device = teacher, matches, teacher.device
        self._seen: dict[str, Tensor] = {}
        for found in matches.found:
            for node in found.teacher.reads:
                teacher.tap(node)
        self._removers = [network.add_tap(node, partial(keep, self._seen, node))
                          for node in dict.fromkeys(node for m in matches.found for node in m.student.reads)]

    def pairs(self, inputs: Inputs) -> list[tuple[Match, Tensor, Tensor]]:
        """(match, the student's activation, the teacher's) as [n, c, ...], float32, of what ran last and of ``inputs``;
        only the channels of the teacher that the student kept, where they are known."""
        _, theirs = self.teacher.values(inputs)
        found = []
        for one in self.matches.found:
            given = one.student.of(self._seen).float().movedim(one.student.axis, 1)
            wanted = one.teacher.of(theirs).float().movedim(one.teacher.axis, 1).to(self.device)
            if one.kept is not None:
                wanted = wanted.index_select(1, one.kept.to(self.device))
            found.append((one, given, wanted))
        self._seen.clear()
        return found

    def close(self) -> None:
        for remove in self._removers:
            remove()


def keep(seen: dict[str, Tensor], node: str, value: Tensor) -> None:
    """A tap that remembers what a node gave last."""
    seen[node] = value


def projector(rows: int, columns: int, device: torch.device, *seed: int | str, kernel: int = 0) -> Tensor:
    """A parameter [rows, columns], or [rows, columns, kernel, kernel], of normal numbers of variance 1 / its inputs."""
    generator = torch.Generator().manual_seed(seed_from("projector", *seed))
    shape = (rows, columns, kernel, kernel) if kernel else (rows, columns)
    inputs = columns * max(1, kernel) ** 2
    weight: Tensor = (torch.randn(shape, generator=generator) / inputs**0.5).to(device)
    return weight.requires_grad_()


def projected(x: Tensor, weight: Tensor) -> Tensor:
    """``weight`` [rows, columns] on the channels of [n, columns, ...]."""
    if x.dim() == 4:
        return conv2d(x, weight[:, :, None, None])
    return linear(x.movedim(1, -1), weight).movedim(-1, 1)


def aligned(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both [n, c, ...] at the smaller resolution: maps are averaged, tokens interpolated."""
    if student.shape[2:] == teacher.shape[2:] or student.dim() != teacher.dim():
        return student, teacher
    size = [min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    if student.dim() == 4:
        return adaptive_avg_pool2d(student, (size[0], size[1])), adaptive_avg_pool2d(teacher, (size[0], size[1]))
    return tuple(interpolate(x, size=size, mode="linear") for x in (student, teacher))  # type: ignore[return-value]


class _Hints(Companion):
    def __init__(self, options: Features, tapping: Tapping, seed: int) -> None:
        self.options, self.tapping, self.row = options, tapping, LOSSES[options.loss]
        self.progress = 0.0
        self.projectors: dict[str, Tensor] = {}
        for m in tapping.matches.found:
            if self.row.width and not m.direct:
                self.projectors[m.student.node] = projector(m.teacher.width, m.student.width, tapping.device, seed,
                                                            m.student.node)
            if self.row.generator and len(m.student.shape) == 3:
                width = m.teacher.width if m.kept is None else len(m.kept)
                for part in ("first", "second"):
                    name = f"{m.student.node}/{part}"
                    self.projectors[name] = projector(width, width, tapping.device, seed, name, kernel=3)

    @property
    def notes(self) -> list[str]:
        return self.tapping.matches.notes("distill.Features", self.row.width)

    def update(self, progress: float) -> None:
        self.progress = progress

    def parameters(self) -> list[Tensor]:
        return list(self.projectors.values())

    def loss(self, inputs: Inputs, output: Any, target: Any) -> Tensor | None:
        if self.progress > self.options.end:
            return None
        with torch.autocast(self.tapping.device.type, enabled=False):
            mask = counted(self.options.mask, inputs, target)
            pairs = [(m, *aligned(self._widened(m, given), wanted)) for m, given, wanted in self.tapping.pairs(inputs)]
            if self.row.fused:
                pairs = _fused(pairs)
            terms = [self._term(m, given, wanted, mask) for m, given, wanted in pairs]
            return self.options.weight * torch.stack(terms).mean()

    def _widened(self, one: Match, given: Tensor) -> Tensor:
        weight = self.projectors.get(one.student.node)
        return given if weight is None else projected(given, weight)

    def _term(self, one: Match, given: Tensor, wanted: Tensor, mask: Tensor | None) -> Tensor:
        if self.row.scaled:
            size = wanted.square().mean().sqrt().clamp(min=1e-6)
            given, wanted = given / size, wanted / size
        first = self.projectors.get(f"{one.student.node}/first")
        if first is not None:
            hidden = torch.rand(given[:, 0].shape, device=given.device) < self.options.masked
            second = self.projectors[f"{one.student.node}/second"]
            given = conv2d(relu(conv2d(feature.dropped(given, ~hidden), first, padding=1)), second, padding=1)
        return self.row.loss(given, wanted, mask if self.row.tokens else _resized(mask, given))

    def close(self) -> None:
        self.tapping.close()


def _resized(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """The mask at the resolution of [n, c, ...]; None where it has other axes."""
    if mask is None or mask.dim() != like.dim() - 1:
        return None
    return mask if mask.shape[1:] == like.shape[2:] else interpolate(
        mask[:, None].float(), size=like.shape[2:], mode="nearest")[:, 0] > 0.5


def _fused(pairs: Sequence[tuple[Match, Tensor, Tensor]]) -> list[tuple[Match, Tensor, Tensor]]:
    """The student's activations, each averaged with what comes after it, enlarged to its size.

    ReviewKD's fusion, Chen et al. 2021, section 3.2, without its learned attention; where widths differ it begins anew.
    """
    found: list[tuple[Match, Tensor, Tensor]] = []
    later: Tensor | None = None
    for one, given, wanted in reversed(pairs):
        if later is not None and later.shape[1] == given.shape[1] and given.dim() == 4:
            given = (given + interpolate(later, size=given.shape[2:], mode="nearest")) / 2
        later = given
        found.insert(0, (one, given, wanted))
    return found
