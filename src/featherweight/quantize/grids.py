"""Post-training quantization, in the order in which it is done: activations prepared, grids chosen, weights rounded,
biases corrected. Each part works on the folded network and changes its values there; what it changed, it gives by
name."""

from __future__ import annotations

from torch import Tensor

from featherweight.network import Network
from featherweight.numerics.formats import ACTIVATIONS, DYNAMIC, GRIDS
from featherweight.quantize.layers import LayerForm
from featherweight.quantize.placement import Placement
from featherweight.quantize.prepare.equalize import equalized
from featherweight.quantize.prepare.smooth import smoothed
from featherweight.quantize.ranges import Tops, activation_grids, usual_method
from featherweight.quantize.store import Point, chosen_scale
from featherweight.steps import Skipped
from featherweight.task import Task

Values = dict[str, Tensor]


def prepared(folded: Network, task: Task, smooth: float | None, equalize: bool,
             batches: int | None) -> tuple[Values, list[Skipped]]:
    """Smoothing and equalization: the function stays, the ranges get even."""
    values: Values = {}
    skipped: list[Skipped] = []
    if smooth is not None:
        new, left = smoothed(folded, task, smooth, batches)
        values, skipped = values | new, skipped + left
    if equalize:
        new, left = equalized(folded)
        values, skipped = values | new, skipped + left
    return values, skipped


def weight_scales(folded: Network, found: list[LayerForm], method: str | None) -> Values:
    """Weight's name -> the scales of its grid; none for halves."""
    scales = {}
    for layer in found:
        kind = layer.stored.kind
        if kind in GRIDS:
            weight = folded.tensor(layer.stored.weight).detach().cpu()
            chosen = chosen_scale(weight, layer.stored, method or usual_method(GRIDS[kind].bits))
            scales[layer.stored.weight] = chosen
    return scales


def value_grids(folded: Network, task: Task, placed: Placement, found: list[LayerForm], activations: str | None,
                ranges: str | None, batches: int | None, tops: Tops | None = None) -> tuple[Point, ...]:
    """The grids of the activations: those that share one take the widest kind that a reader of theirs wants.

    activations, ranges, batches: the options ``activations``, ``ranges`` and ``calibration_batches`` of ``Quantize``.
    tops: the largest values of channels, looked at in the same pass.
    """
    dynamic = tuple(Point(name, 1.0, 0, readers, DYNAMIC) for name, readers in placed.dynamic.items())
    if not placed.points:
        return dynamic
    groups: dict[str, list[str]] = {}
    for name, leader in placed.points.items():
        groups.setdefault(leader, []).append(name)

    def bits(kind: str) -> int:
        return ACTIVATIONS[kind].bits

    wanted = {n.name: str(layer.activations) for layer in found for n in layer.nodes if layer.on_grid}
    kinds = {}
    for leader, names in groups.items():
        asked = [wanted[r] for name in names for r in placed.readers[name] if r in wanted]
        asked = asked or [str(activations) if activations in ACTIVATIONS else max(wanted.values(), key=bits)]
        kinds[leader] = max(asked, key=bits)
    specs = {g: ACTIVATIONS[k] for g, k in kinds.items()}
    method = ranges or usual_method(min(s.bits for s in specs.values()))
    chosen = activation_grids(folded, task, groups, specs, method, batches, tops)
    return tuple(Point(name, chosen[leader].scale, chosen[leader].zero_point, placed.readers[name], kinds[leader],
                       chosen[leader].signed) for name, leader in placed.points.items()) + dynamic
