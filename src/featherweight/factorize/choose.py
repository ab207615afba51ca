"""The ranks of all layers together: least total damage under budgets of MACs, parameters, bytes, measured latency."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from featherweight import measure
from featherweight.calibrate.moments import second_moments
from featherweight.factorize.layers import Factorable, LayerCost
from featherweight.factorize.plan import Split
from featherweight.factorize.ranks import by_energy, by_rule, fixed, spectra
from featherweight.factorize.surgery import weight_of
from featherweight.factorize.times import LinkTimes
from featherweight.judge.bench import Form
from featherweight.judge.damage import Judge, damages
from featherweight.network import Network
from featherweight.numerics.budget import choose_jointly, reachable
from featherweight.numerics.factors.chains import side_by_side
from featherweight.numerics.factors.forms import FORMS, Ranks
from featherweight.steps import Skipped
from featherweight.task import Task

#: what a ``LowRank`` step may ask a fraction of
BUDGETS = ("macs", "params", "bytes", "latency")
#: energies at which the ranks of the forms are offered
LADDER = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.84, 0.88, 0.91, 0.94, 0.96, 0.975, 0.985, 0.993)
#: shares of the output channels that are the ranks offered of CP, which has no spectrum
CP_SHARES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5)
#: numbers of a kernel up to which "auto" offers CP as well: its fit takes as long as these times the rank
CP_MOST = 150_000
#: "error": the squared errors, summed as they are; else a name of ``judge.damage.MEASURES``
ERROR = "error"


@dataclass(frozen=True)
class Goal:
    """What is to remain: the share of each budget. choice: a key of ``CHOICES``. round_to: ranks are multiples of this.
    how, batches: by which damage, on how much data. data: errors are those of the outputs. target, times: for a
    latency."""

    shares: Mapping[str, float]
    choice: str
    round_to: int
    how: str
    batches: int | None
    data: bool
    target: str | None
    times: str | None = None


@dataclass(frozen=True)
class Offer:
    """One form of one layer, its squared error over the square of the whole, and what it costs of each budget. grams:
    by which the factors are chosen, one a group; None: by the weights alone."""

    layer: Factorable
    form: str
    ranks: Ranks
    error: float
    costs: tuple[float, ...]
    grams: tuple[Tensor, ...] | None


def chosen(goal: Goal, network: Network, task: Task, layers: Sequence[Factorable]) -> tuple[list[Split], list[Skipped]]:
    """The splits within the budget, and what is left whole and why."""
    clock = LinkTimes.of(network, goal.target or "onnxruntime", times=goal.times) if "latency" in goal.shares else None
    prices = [_price(goal, name, network, clock) for name in goal.shares]
    grams = _grams(goal, network, task, layers) if goal.data else {}
    offers = [_offers(goal, layer, grams.get(layer.layer.weight), [price for price, _ in prices], clock)
              for layer in layers]
    if clock is not None:
        clock.times.settled()
    weights = _sensitivities(goal, network, task, offers)
    harm = [[0.0, *(o.error * weight for o in mine)] for mine, weight in zip(offers, weights, strict=True)]
    costs = [[[price(layer, None), *(o.costs[n] for o in mine)] for layer, mine in zip(layers, offers, strict=True)]
             for n, (price, _) in enumerate(prices)]
    rests = [total - sum(row[0] for row in table) for (_, total), table in zip(prices, costs, strict=True)]
    shares = goal.shares.values()
    budgets = [share * total - rest for share, (_, total), rest in zip(shares, prices, rests, strict=True)]
    met = reachable(costs, budgets)
    picks = choose_jointly(harm, costs, met).picks if layers else ()
    asked = ", ".join(f"{name}={share}" for name, share in goal.shares.items())
    skipped = [Skipped(layer.layer.weight, "no form of it is smaller" if not mine else
                       f"kept whole: {asked} is met at less damage by the others")
               for layer, mine, pick in zip(layers, offers, picks, strict=True) if not pick]
    for (name, share), (_, total), rest, given, least in zip(goal.shares.items(), prices, rests, budgets, met,
                                                             strict=True):
        if least > given + 1e-9 * total:
            skipped.append(Skipped("", f"{name}={share} cannot be reached: {(least + rest) / total:.3f} remain, the "
                                       'least that these forms allow; write form="auto", or ignore less'))
    taken = [mine[pick - 1] for mine, pick in zip(offers, picks, strict=True) if pick]
    return [Split(o.layer.layer.weight, tuple(network.tensor(o.layer.layer.weight).shape), o.ranks, o.form, o.error)
            for o in taken], skipped


# ---- what is offered
def _offers(goal: Goal, layer: Factorable, grams: tuple[Tensor, ...] | None, prices: Sequence[Price],
            clock: LinkTimes | None) -> list[Offer]:
    """The forms of a layer that cost less of a budget, and let no count grow. clock: where seconds are one."""
    found: list[Offer] = []
    for form in _forms(goal, layer):
        names = None if FORMS[form].most is not None else spectra(layer, form, grams)
        over = layer.growth(form, fixed(layer, form, 1), goal.data) - _bytes(layer, form, fixed(layer, form, 1))
        ladder = [ranks for ranks in _ladder(goal, layer, form, names) if _smaller(goal, layer, form, ranks, over)]
        if clock is not None:
            clock.along(layer, form, ladder)
        for ranks in ladder:
            costs = tuple(price(layer, (form, ranks)) for price in prices)
            if all(cost >= price(layer, None) for cost, price in zip(costs, prices, strict=True)):
                continue
            exact = names is not None and FORMS[form].exact and (grams is None or form == "svd")
            error = _lost(names[0], ranks[0]) if exact and names is not None else layer.error(form, ranks, grams)
            found.append(Offer(layer, form, ranks, error, costs, grams))
    return found


def _smaller(goal: Goal, layer: Factorable, form: str, ranks: Ranks, over: int) -> bool:
    """Whether no count grows; over: bytes that the file grows by besides the weights."""
    count = layer.cost(form, ranks, goal.data)
    return (count.params < layer.whole.params and count.macs <= layer.whole.macs
            and _bytes(layer, form, ranks) + over < 0)


def _forms(goal: Goal, layer: Factorable) -> list[str]:
    """Those of the choice; of "auto" CP too, for kernels that are not too large for its fit."""
    more = layer.forms("cp") if goal.choice == "auto" and math.prod(layer.shape) <= CP_MOST else []
    return list(dict.fromkeys((*layer.forms(goal.choice), *more)))


def _ladder(goal: Goal, layer: Factorable, form: str, values: Sequence[Tensor] | None) -> list[Ranks]:
    """All ranks that are offered, each once."""
    step = goal.round_to
    if values is None:
        found = [fixed(layer, form, max(step, round(share * layer.shape[0] / step) * step)) for share in CP_SHARES]
    else:
        found = [FORMS[form].within(layer.shape, tuple(max(step, round(r / step) * step)
                                                       for r in by_rule(layer, form, by_energy(energy), values)))
                 for energy in LADDER]
    return list(dict.fromkeys(found))


def _bytes(layer: Factorable, form: str, ranks: Ranks) -> int:
    """By how many bytes the weights grow."""
    return (layer.cost(form, ranks).params - layer.whole.params) * layer.kernels[0].element_size()


def _lost(values: Tensor, rank: int) -> float:
    squares = values.square()
    return float(squares[rank:].sum() / squares.sum())


# ---- what it costs
#: (layer, its form and ranks; None: as it is) -> the cost
Price = Callable[[Factorable, tuple[str, Ranks] | None], float]


def _price(goal: Goal, budget: str, network: Network, clock: LinkTimes | None) -> tuple[Price, float]:
    """What a layer costs of a budget, and what the network costs of it. clock: for the latency."""
    if clock is not None and budget == "latency":
        return clock.seconds, clock.total()
    if budget == "macs":
        return lambda layer, at: float(_counted(goal, layer, at).macs), float(measure.macs(network).total)
    if budget == "params":
        return lambda layer, at: float(_counted(goal, layer, at).params), float(measure.params(network))
    tensors = {id(t): t for t in network.tensors().values()}.values()
    return (lambda layer, at: float(_counted(goal, layer, at).params * layer.kernels[0].element_size()),
            float(sum(t.numel() * t.element_size() for t in tensors)))


def _counted(goal: Goal, layer: Factorable, at: tuple[str, Ranks] | None) -> LayerCost:
    return layer.whole if at is None else layer.cost(*at, goal.data)


# ---- how much it hurts
def _grams(goal: Goal, network: Network, task: Task,
           layers: Sequence[Factorable]) -> dict[str, tuple[Tensor, ...]]:
    """Weight's name -> for each group the second moments of what it is multiplied with; of transposed ones none."""
    calls = {layer.layer.weight: layer.layer.calls for layer in layers if not layer.adjoint}
    found = second_moments(network, task.batches("calibration", goal.batches), calls) if calls else {}
    return {name: tuple(gram) for name, gram in found.items()}


def _sensitivities(goal: Goal, network: Network, task: Task, offers: Sequence[Sequence[Offer]]) -> list[float]:
    """For each layer the damage of a unit of its squared error: measured at its middle offer, and taken to be the same
    at the others, as the change of the outputs is linear in that of a weight."""
    if goal.how == ERROR:
        return [1.0] * len(offers)
    middle = [sorted(mine, key=lambda o: o.error)[len(mine) // 2] for mine in offers if mine]
    forms = [Form(weights={o.layer.layer.weight: partial(_instead, o)}) for o in middle]
    measured = iter(zip(middle, damages(network, task, forms, Judge(goal.how, batches=goal.batches)), strict=True))
    found = []
    for mine in offers:
        offer, damage = next(measured) if mine else (None, 0.0)
        found.append(max(damage, 0.0) / max(offer.error, 1e-12) if offer is not None else 0.0)
    return found


def _instead(offer: Offer, weight: Tensor) -> Tensor:
    call, layer = offer.layer.layer.calls[0], offer.layer
    grams = offer.grams or (None,) * len(layer.kernels)
    links = side_by_side([FORMS[offer.form].links(kernel, offer.ranks, gram)
                          for kernel, gram in zip(layer.kernels, grams, strict=True)])
    return weight_of(call, links, weight.shape)
