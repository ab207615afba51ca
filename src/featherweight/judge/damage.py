"""How much a change hurts: measures by name, of what changes in outputs, loss or score, and a forecast by curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from featherweight.calibrate.portions import split_batch
from featherweight.errors import RecipeError
from featherweight.judge.bench import Bench, Form, readings
from featherweight.network import Network, trees
from featherweight.network.devices import device_of
from featherweight.numerics.damage import relative_change, traces
from featherweight.seeds import generators_kept, seed_all, seed_from
from featherweight.steps.options import COUNT, SEED, check_batches, check_known, check_number, check_split
from featherweight.task import Batch, Task, call, move

#: gives the damage of what is put at the moment
Gauge = Callable[[], float]


@dataclass(frozen=True)
class Judge:
    """How damage is measured.

    measure: a name of ``MEASURES``. split, batches: what is read (None: all batches). probes: double backward passes a
    batch for "hessian", with vectors drawn by ``seed``.
    """

    measure: str = "output"
    split: str = "calibration"
    batches: int | None = 2
    probes: int = 32
    seed: int = 0

    def check(self, name: str, option: str = "measure") -> None:
        """Raises RecipeError for options that make no sense. name: of the step that was given them, the measure under
        the name ``option``."""
        check_known(name, option, self.measure, MEASURES)
        check_split(name, self.split)
        check_batches(name, self.batches)
        check_number(name, "probes", self.probes, COUNT)
        check_number(name, "seed", self.seed, SEED)


@dataclass(frozen=True)
class Measure:
    """A measure of damage. ``gauge`` reads what it needs from a bench with nothing put, and gives what measures the
    forms that are put then. forecast: the damage of each form by itself, where that is not measured. needs: what the
    task must have beside the split."""

    gauge: Callable[[Bench, Judge], Gauge]
    forecast: Callable[[Bench, Judge, Sequence[Form]], list[float]] | None = None
    needs: tuple[str, ...] = ()


def damages(network: Network, task: Task, forms: Sequence[Form], judge: Judge,
            original: Network | None = None) -> list[float]:
    """The damage of each form by itself. original: what the outputs are held against; None: ``network`` as it is.

    Leaves network and random generators as they were. Raises TaskError for what the task lacks.
    """
    measure = MEASURES[judge.measure]
    if measure.forecast is None:
        return together(network, task, [(form,) for form in forms], judge, original)
    with generators_kept():
        return measure.forecast(_bench(network, task, forms, judge, original), judge, forms)


def together(network: Network, task: Task, picks: Sequence[Collection[Form]], judge: Judge,
             original: Network | None = None) -> list[float]:
    """The measured damage of every pick: of all its forms at once."""
    with generators_kept(), torch.no_grad():
        bench = _bench(network, task, (form for pick in picks for form in pick), judge, original)
        gauge, found = MEASURES[judge.measure].gauge(bench, judge), []
        for pick in picks:
            with bench.put(*pick):
                found.append(gauge())
    return found


def _bench(network: Network, task: Task, forms: Iterable[Form], judge: Judge, original: Network | None) -> Bench:
    task.require(judge.split, *MEASURES[judge.measure].needs)
    seed_all(seed_from("judge", judge.seed))
    return Bench(network, task, judge.split, judge.batches, forms, original)


def scored(network: Network, task: Task, split: str, batches: int | None) -> float:
    """The task's score of ``network``, which is in evaluation mode; minus infinity where it is not a number.

    What the split draws at random it draws alike each time."""
    task.require("score")
    assert task.score is not None
    device = device_of(network)

    def moved(batch: Batch) -> Batch:
        return move(batch[0], device), move(batch[1], device)

    with generators_kept(), torch.no_grad():
        seed_all(seed_from("score", split))
        found = float(task.score(network, map(moved, task.batches(split, batches))))
    return -math.inf if math.isnan(found) else found


# ---- the measures

def by_output(bench: Bench, judge: Judge) -> Gauge:
    """|y' - y|^2 / |y|^2 over all floating-point outputs, mean over batches."""
    again = bench.network.replay()
    whole = [(x, trees.floats(call(bench.original, x))) for x, _ in bench.batches()]
    held = [(split_batch(bench.original, x, outputs), outputs) for x, outputs in whole]

    def moved() -> float:
        changes = [relative_change(batch.floats(again), before) for batch, before in held]
        return sum(changes) / len(changes)

    return moved


def by_loss(bench: Bench, judge: Judge) -> Gauge:
    """By how much the task's loss rises, mean over batches; negative where it falls."""
    batches, loss, again = bench.batches(), bench.task.loss, bench.network.replay()
    assert loss is not None
    whole = [float(loss(call(bench.original, x), y)) for x, y in batches]

    def risen() -> float:
        rises = [float(loss(call(again, x), y)) - before for (x, y), before in zip(batches, whole, strict=True)]
        return sum(rises) / len(rises)

    return risen


def by_score(bench: Bench, judge: Judge) -> Gauge:
    """By how many points the task's score falls; negative where it rises."""
    bench.batches()  # there are some
    score = partial(scored, task=bench.task, split=judge.split, batches=judge.batches)
    whole = score(bench.original)
    return lambda: whole - score(bench.network)


def by_hessian(bench: Bench, judge: Judge, forms: Sequence[Form]) -> list[float]:
    """The mean trace of the loss's Hessian over each weight times |W' - W|^2 (Dong et al. 2020, "HAWQ-V2", eq. 10)."""
    reads: dict[str, set[str]] = {}
    for form in forms:
        for name in form.weights:
            reads.setdefault(name, set()).add(form.reads)
    for name, given in reads.items():
        if len(given) > 1:
            found = ", ".join(sorted(r or "float" for r in given))
            raise RecipeError(f'"hessian" judges weights alone, and what {name} is multiplied with is read as {found}; '
                              'write "output" in its place')
    if any(form.nodes for form in forms):
        raise RecipeError('"hessian" judges weights alone, and these forms change other values; write "output" in its '
                          "place")
    mean = mean_traces(bench, judge, list(reads))
    return [sum(mean[name] * far for name, far in bench.away(form).items()) for form in forms]


def mean_traces(bench: Bench, judge: Judge, names: Sequence[str]) -> dict[str, float]:
    """Weight's name -> the trace of the loss's Hessian over it, over its number of elements; at least 0."""
    loss_of = bench.task.loss
    assert loss_of is not None
    leaves = {n: bench.network.tensor(n).detach().clone().requires_grad_() for n in names}
    taps = {node.name: partial(_instead, leaves[n]) for n in names for node in readings(bench.network, n)}
    generator = torch.Generator().manual_seed(seed_from("hutchinson", judge.seed))
    total, batches = dict.fromkeys(leaves, 0.0), bench.batches()
    with bench.network.taps(taps), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for x, y in batches:
            try:
                loss = loss_of(call(bench.network, x), y)
                made = traces(loss, list(leaves.values()), generator, judge.probes)
            except RuntimeError as error:
                raise RecipeError(f"the loss cannot be differentiated twice ({error}); "
                                  'write "output" in the place of "hessian", which needs no derivative') from error
            for name, trace in zip(leaves, made, strict=True):
                total[name] += trace / len(batches)
    return {n: max(t, 0.0) / max(1, leaves[n].numel()) for n, t in total.items()}


def _instead(leaf: Tensor, weight: Tensor) -> Tensor:
    return leaf


#: name -> measure; add one of your own under a new name. The loss of a trained network is too flat to measure what
#: "hessian" forecasts, so that several changes at once are measured by the outputs there.
MEASURES: dict[str, Measure] = {
    "output": Measure(by_output),
    "loss": Measure(by_loss, needs=("loss",)),
    "score": Measure(by_score, needs=("score",)),
    "hessian": Measure(by_output, by_hessian, needs=("loss",)),
}

__all__ = ["MEASURES", "Gauge", "Judge", "Measure", "damages", "scored", "together"]
