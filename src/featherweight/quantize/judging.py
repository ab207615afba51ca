"""How damage is measured, and forecast: functions that take a bench with layers in other forms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from featherweight.errors import RecipeError
from featherweight.network import trees
from featherweight.numerics.change import relative_change
from featherweight.numerics.hessian import traces
from featherweight.quantize.search import scored
from featherweight.seeds import seed_from
from featherweight.task import call

if TYPE_CHECKING:
    from featherweight.quantize.damage import Bench
    from featherweight.quantize.layers import LayerForm

Measure = Callable[[], float]


def by_output(bench: Bench) -> Measure:
    """How far the outputs move, of their own squared length."""
    batches = bench.data()
    with torch.no_grad():
        whole = [trees.floats(call(bench.network, x)) for x, _ in batches]

    def moved() -> float:
        changes = [relative_change(trees.floats(call(bench.network, x)), before)
                   for (x, _), before in zip(batches, whole, strict=True)]
        return sum(changes) / len(changes)

    return moved


def by_score(bench: Bench) -> Measure:
    """By how many points the score falls; negative where it rises."""
    judge = bench.judge
    score = partial(scored, bench.network, bench.task, judge.split, judge.batches)
    whole = score()
    return lambda: whole - score()


def by_hessian(bench: Bench) -> dict[str, dict[str, float]]:
    """The mean trace of the Hessian over a weight times the squared distance of its rounding."""
    for mine in bench.choices.values():
        if len({layer.activations for layer in mine.values()}) > 1:
            raise RecipeError(f'how="hessian" judges weights alone, and {", ".join(mine)} round values differently; '
                              'write how="output"')
    found = mean_traces(bench)

    def away(layer: LayerForm) -> float:
        moved = bench.rounded(layer) - bench.network.tensor(layer.stored.weight).detach()
        return float(moved.double().square().sum())

    return {name: {kind: found[name] * away(layer) for kind, layer in mine.items()}
            for name, mine in bench.choices.items()}


def mean_traces(bench: Bench) -> dict[str, float]:
    """Weight's name -> the trace of the loss's Hessian over it, over its number of elements; at least 0."""
    bench.task.require("loss")
    assert bench.task.loss is not None
    leaves = {n: bench.network.tensor(n).detach().clone().requires_grad_() for n in bench.choices}
    taps = {node: partial(_instead, leaves[n]) for n, nodes in bench.weights.items() for node in nodes}
    generator = torch.Generator().manual_seed(seed_from("hutchinson", bench.judge.seed))
    total, batches = dict.fromkeys(leaves, 0.0), bench.data()
    with bench.network.taps(taps), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for x, y in batches:
            try:
                loss = bench.task.loss(call(bench.network, x), y)
                made = traces(loss, list(leaves.values()), generator, bench.judge.probes)
            except RuntimeError as error:
                raise RecipeError(f"the loss cannot be differentiated twice ({error}); "
                                  'write how="output", which needs no derivative') from error
            for name, trace in zip(leaves, made, strict=True):
                total[name] += trace / len(batches)
    return {n: max(t, 0.0) / max(1, leaves[n].numel()) for n, t in total.items()}


def _instead(leaf: Tensor, weight: Tensor) -> Tensor:
    return leaf


#: name -> what measures the damage of the layers that are in another form, and what forecasts that of every layer by
#: itself (None: it is measured so). The loss of a trained network is too flat to measure what "hessian" forecasts.
HOW: dict[str, tuple[Callable[[Bench], Measure], Callable[[Bench], dict[str, dict[str, float]]] | None]] = {
    "output": (by_output, None), "score": (by_score, None), "hessian": (by_output, by_hessian)}

__all__ = ["HOW", "Measure"]
