"""A form for every layer, of all that families offer, within budgets; and the plan that gives layers these forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

from featherweight.balance.plan import MixedPlan
from featherweight.judge.bench import Form
from featherweight.judge.candidates import FAMILIES, Candidate, judged, priced
from featherweight.judge.costs import COSTS, growth
from featherweight.judge.damage import Judge, together
from featherweight.judge.in_network import InNetwork
from featherweight.network import Network, fold_batch_norm
from featherweight.network.layers import fits, known_by
from featherweight.numerics.budget import choose_jointly, reachable
from featherweight.numerics.formats import weight_bits
from featherweight.quantize.candidates import Kinds
from featherweight.quantize.layers import ends, layers
from featherweight.quantize.plan import QuantizePlan
from featherweight.quantize.request import of_ends
from featherweight.quantize.step import Quantize
from featherweight.seeds import generators_kept
from featherweight.steps import Plan, Skipped
from featherweight.task import Task

FLOAT = "float"  #: the option of a layer that stays as it is
#: budgets that are a fraction of what the network costs -> the cost, by its name in ``COSTS``
COUNTED = {"bytes": "tensor_bytes", "archive": "archive_bytes", "macs": "macs"}
Offers = Mapping[str, Sequence[Candidate]]
Picks = Mapping[str, Candidate]


@dataclass(frozen=True)
class Asked:
    """What is chosen among, and within which budgets: the options of ``Mixed``, under the same names. budgets: those
    that were given, by name; ``damage`` is not among them."""

    step: Quantize
    kinds: tuple[str, ...]
    families: tuple[str, ...]
    budgets: Mapping[str, float]
    damage: float | None
    judge: Judge


@dataclass(frozen=True)
class Chosen:
    """Weight's name -> what was picked for it; weight's name -> the kind that ``mixed`` or ``ends`` had settled; and
    what is to be said of budgets that cannot be met."""

    picks: Picks
    settled: Mapping[str, str]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class Limit:
    """One budget over the free layers: what they may cost together, and what each costs in each form it is offered."""

    name: str
    most: float
    costs: list[list[float]]


def chosen(asked: Asked, network: Network, task: Task) -> Chosen:
    """The picks whose damages sum to the least within the budgets; with a budget of damage, the fewest bytes."""
    with generators_kept():
        folded = fold_batch_norm(network).eval()
        settled = settled_kinds(asked.step, folded)
        offers = offered(asked, folded, task, settled)
        limits = [_limit(asked, name, network, folded, task, offers, settled) for name in asked.budgets]
        harm = [[float(c.damage or 0.0) for c in mine] for mine in offers.values()]
        goal = harm
        if asked.damage is not None:
            goal = _counts(folded, offers, "tensor_bytes")
            limits.append(Limit("damage", asked.damage, harm))
        limits, said = _met(asked, limits)
        made = choose_jointly(goal, [m.costs for m in limits], [m.most for m in limits])
        picks: list[Picks] = [{n: mine[k] for (n, mine), k in zip(offers.items(), made.picks, strict=True)}]
        if asked.damage is None:
            picks += _even(asked, offers, limits)
        if offers and len(picks) > 1:
            real = together(folded, task, [[c.form for c in pick.values()] for pick in picks], asked.judge)
            picks = [picks[real.index(min(real))]]
    return Chosen(picks[0], settled, said)


def settled_kinds(step: Quantize, folded: Network) -> dict[str, str]:
    """Weight's name -> the kind that the step's ``mixed`` or ``ends`` gives it."""
    outer = ends(folded) if step.ends is not None else set()
    found: dict[str, str] = {}
    for layer in layers(folded, replace(step, ends=None).request())[0]:
        name = layer.stored.weight
        fit = [kind for p, kind in step.mixed.items() if fits(known_by((name,), layer.nodes), p)]
        if step.ends is not None and outer & set(layer.nodes):
            weights, values = of_ends(step.ends, step.activations)
            fit = fit or [f"{weights}/{values or FLOAT}"]
        found |= {name: fit[-1]} if fit else {}
    return found


def offered(asked: Asked, folded: Network, task: Task, settled: Mapping[str, str]) -> Offers:
    """Weight's name -> the forms that it may take, with their damages: the kinds in their order, then the families."""
    free = [layer.stored.weight for layer in layers(folded, asked.step.request())[0]
            if layer.stored.weight not in settled]
    whole = FLOAT in asked.kinds
    kinds = Kinds(tuple(k for k in asked.kinds if k != FLOAT), asked.step)
    found = [c for family in (kinds, *(FAMILIES[name] for name in asked.families))
             for c in family.candidates(folded, task) if c.layer in free]
    offers: dict[str, list[Candidate]] = {name: [] for name in free}
    for c in judged(folded, task, found, asked.judge) if found else ():
        offers[c.layer].append(c)
    for name, mine in offers.items():
        if whole:
            before = set(asked.kinds[:asked.kinds.index(FLOAT)])
            mine.insert(sum(c.option in before for c in mine), _as_it_is(name))
    return {name: mine for name, mine in offers.items() if mine}


def _as_it_is(name: str) -> Candidate:
    return Candidate(name, "", FLOAT, Form(), partial(MixedPlan, ()), damage=0.0)


def _even(asked: Asked, offers: Offers, limits: Sequence[Limit]) -> list[Picks]:
    """Every kind for all layers, where all can have it and the budgets allow it."""
    found: list[Picks] = []
    for kind in asked.kinds:
        at = [next((k for k, c in enumerate(mine) if c.option == kind and c.family in ("", Kinds.name)), None)
              for mine in offers.values()]
        if None in at:
            continue
        even = [k for k in at if k is not None]
        if all(sum(c[k] for c, k in zip(m.costs, even, strict=True)) <= m.most for m in limits):
            found.append({n: mine[k] for (n, mine), k in zip(offers.items(), even, strict=True)})
    return found


# ---- budgets

def _limit(asked: Asked, name: str, network: Network, folded: Network, task: Task, offers: Offers,
           settled: Mapping[str, str]) -> Limit:
    share = asked.budgets[name]
    if name == "latency":
        return _latency(asked, share, network, task, offers, settled)
    if name == "bits":
        sizes = {n: folded.tensor(n).numel() for n in (*offers, *settled)}
        fixed_bits = sum(sizes[n] * _bits(kind) for n, kind in settled.items())
        costs = [[float(sizes[n] * _bits(str(c.option))) for c in mine] for n, mine in offers.items()]
        return Limit(name, share * sum(sizes.values()) - fixed_bits, costs)
    cost = COUNTED[name]
    fixed = [c for n, kind in settled.items()
             for c in Kinds((kind,), asked.step).candidates(folded, task, n)]
    settled_cost = sum((c.costs[cost] for c in priced(folded, fixed, (cost,))), 0.0)
    most = share * COSTS[cost](network) - COSTS[cost](folded) - settled_cost
    return Limit(name, most, _counts(folded, offers, cost))


def _counts(folded: Network, offers: Offers, cost: str) -> list[list[float]]:
    """By how much each form of each layer changes what the network costs."""
    flat = iter(priced(folded, [c for mine in offers.values() for c in mine], (cost,)))
    return [[next(flat).costs[cost] for _ in mine] for mine in offers.values()]


def _bits(kind: str) -> int:
    return 32 if kind == FLOAT else int(weight_bits(kind.partition("/")[0]))


def _latency(asked: Asked, share: float, network: Network, task: Task, offers: Offers,
             settled: Mapping[str, str]) -> Limit:
    """What each layer adds in each form, against all layers in the first form of each. That includes the way to
    integers and back at its sides; neighbours that change together share that, so sums are estimates."""
    fast = replace(asked.step, ranges="minmax", weight_ranges="minmax", rounding="nearest", equalize=False,
                   smooth=None, rescale=False, correct_bias=False, calibration_batches=1)
    first = {n: mine[0] for n, mine in offers.items()}

    def made(changed: Picks) -> Network:
        return joined(replace(asked, step=fast), network, task, {**first, **changed}, settled).apply(network)

    others = {f"{n} {c.family} {c.option}": partial(made, {n: c}) for n, mine in offers.items() for c in mine[1:]}
    clock = InNetwork(task, asked.step.target or "onnxruntime")
    taken = clock.seconds(made({}), {FLOAT: lambda: network, **others})
    costs = [[0.0, *(taken[f"{n} {c.family} {c.option}"] - taken[""] for c in mine[1:])] for n, mine in offers.items()]
    return Limit("latency", share * taken[FLOAT] - taken[""], costs)


def _met(asked: Asked, limits: Sequence[Limit]) -> tuple[list[Limit], tuple[Skipped, ...]]:
    """The limits, those raised that cannot be met, and what is said of them."""
    raised = reachable([m.costs for m in limits], [m.most for m in limits])
    said = []
    for m, most in zip(limits, raised, strict=True):
        if most > m.most + 1e-9 * abs(m.most):
            given = asked.damage if m.name == "damage" else asked.budgets[m.name]
            among = f"kinds={asked.kinds}" + (f" and families={asked.families}" if asked.families else "")
            said.append(Skipped("", f"{m.name}={given} cannot be reached with {among}; the cheapest were taken: allow "
                                    "cheaper ones, or ask for less"))
    return [replace(m, most=most) for m, most in zip(limits, raised, strict=True)], tuple(said)


# ---- what was chosen, as a plan

def as_step(asked: Asked, picks: Picks, settled: Mapping[str, str]) -> Quantize:
    """The ``Quantize`` that gives layers the kinds that were picked or settled."""
    step = asked.step
    mine = {n: str(c.option) for n, c in picks.items() if c.family == Kinds.name}
    first = next(kind for kind in (*asked.kinds, step.weights) if kind != FLOAT)
    return replace(step, weights=first.partition("/")[0], mixed={**step.mixed, **settled, **mine}, ends=None,
                   ignore=(*step.ignore, *(n for n, c in picks.items() if c.family == "")))


def joined(asked: Asked, network: Network, task: Task, picks: Picks, settled: Mapping[str, str]) -> Plan:
    """The plan for all picks: of the step alone where no families were asked for; else structure before zeros before
    number types, integers last. Layers that another family made or changed are left float by the step."""
    base = as_step(asked, picks, settled)
    others = sorted((c for c in picks.values() if c.family not in ("", Kinds.name)),
                    key=lambda c: (FAMILIES[c.family].stage, c.family))
    if not asked.families:
        return base.plan(network, task)
    parts: list[Plan] = []
    after = fold_batch_norm(network).eval()
    known = after.tensors().keys() - {c.layer for c in others}
    for family, mine in groupby(others, key=lambda c: c.family):
        for plan in FAMILIES[family].joined([c.plan() for c in mine]):
            parts.append(plan)
            after = plan.apply(after).eval()
    new = tuple(layer.stored.weight for layer in layers(after, base.request())[0] if layer.stored.weight not in known)
    last: QuantizePlan = replace(base, ignore=(*base.ignore, *new)).plan(after, task)
    parts += [last] if last.stored else []
    made = MixedPlan.of(parts, skipped=last.skipped)
    return replace(made, grows=growth(network, made.apply(network)))


__all__ = ["COUNTED", "FLOAT", "Asked", "Chosen", "as_step", "chosen", "joined"]
