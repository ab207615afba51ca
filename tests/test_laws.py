"""The laws: what every step must hold on every problem network. A new step is one row of STEPS (or FITS)."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node

import featherweight as fw
from featherweight import deploy, measure
from featherweight.axes.blocks import droppable
from featherweight.axes.groups import axis_groups
from featherweight.network.edit import readers_of
from featherweight.network.file.digest import digest
from featherweight.network.layers import known_by
from featherweight.steps import PLANS, Context, Fit, Plan, Rewrite
from featherweight.task import call
from problems import PROBLEMS, Answer, Problem, network, task, tensors_of

STEPS: dict[str, Callable[[], Rewrite]] = {
    "prune.Channels l1": lambda: fw.prune.Channels(macs=0.6, allocation="global"),
    "prune.Channels taylor": lambda: fw.prune.Channels(ratio=0.7, score="taylor", allocation="uniform"),
    "prune.Channels l2, params": lambda: fw.prune.Channels(params=0.6, score="l2", allocation="erk"),
    "prune.Channels fpgm, bytes": lambda: fw.prune.Channels(bytes=0.7, score="fpgm", heads="width"),
    "prune.Channels bn by sensitivity": lambda: fw.prune.Channels(macs=0.5, score="bn", allocation="sensitivity"),
    "prune.Channels fisher, bias": lambda: fw.prune.Channels(macs=0.6, score="fisher", compensate="bias"),
    "prune.Channels activation, refit": lambda: fw.prune.Channels(ratio=0.6, score="activation", allocation="erk",
                                                                  compensate="least_squares"),
    "prune.Channels reconstruction, in parts": lambda: fw.prune.Channels(
        macs=0.5, score="reconstruction", allocation="sensitivity", compensate="least_squares", iterations=2),
    "prune.Channels rounded": lambda: fw.prune.Channels(macs=0.5, score="random", round_to=4, min_keep=4,
                                                        residual=False),
    "prune.Weights": lambda: fw.prune.Weights(sparsity=0.6),
    "prune.Weights 2:4 obs": lambda: fw.prune.Weights(pattern="2:4", score="obs", compensate="obs"),
    "prune.Weights blocks": lambda: fw.prune.Weights(0.4, score="fisher", pattern="block:2x3", allocation="erk",
                                                     compensate="least_squares"),
    "prune.Layers": lambda: fw.prune.Layers(count=1, score="norm"),
    "prune.Layers output": lambda: fw.prune.Layers(count=2),
    "distill.Student": lambda: fw.distill.Student(width=0.6),
    "distill.Student shallow": lambda: fw.distill.Student(width=0.8, depth=0.5, weights="fresh"),
    "factorize.LowRank": lambda: fw.factorize.LowRank(energy=0.6, min_gain=0.0),
    "factorize.LowRank budget": lambda: fw.factorize.LowRank(params=0.8, form="auto", data=True),
    "factorize.Merge": lambda: fw.factorize.Merge(),
    "factorize.Structured monarch": lambda: fw.factorize.Structured("monarch", blocks=4),
    "factorize.Structured circulant": lambda: fw.factorize.Structured("circulant", blocks=4),
    "factorize.Structured displaced": lambda: fw.factorize.Structured("displaced", blocks=4, data=True),
    "factorize.Structured fourier": lambda: fw.factorize.Structured("fourier", blocks=4),
    "factorize.Structured sparse": lambda: fw.factorize.Structured("sparse", terms=2, share=0.05),
    "factorize.Compact": lambda: fw.factorize.Compact("ghost", data=True),
    "factorize.Compact fire": lambda: fw.factorize.Compact("fire"),
    "factorize.Compact shift": lambda: fw.factorize.Compact("shift", terms=2),
    "share.Codebook": lambda: fw.share.Codebook(bits=3, min_size=64),
    "share.Codebook priced": lambda: fw.share.Codebook(bits=3, min_size=64, importance="fisher", rate=0.02,
                                                       spacing="density"),
    "share.Codebook made up for": lambda: fw.share.Codebook(bits=3, min_size=64, rate=0.01, compensate="obs"),
    "share.Codebook channels": lambda: fw.share.Codebook(bits=2, min_size=64, per="channel"),
    "share.Hashed": lambda: fw.share.Hashed(share=0.25, min_size=64),
    "share.BlockCodebook": lambda: fw.share.BlockCodebook(size=4, bits=3, min_size=64, importance="inputs"),
    "share.Transferred": lambda: fw.share.Transferred("flips", share=0.25),
    "share.Vectors": lambda: fw.share.Vectors(),
    "quantize.Quantize": lambda: fw.quantize.Quantize(),
    "quantize.Quantize weights": lambda: fw.quantize.Quantize(activations=None, weight_ranges="mse"),
    "quantize.Quantize groups": lambda: fw.quantize.Quantize("int4", None, granularity=4, rounding="gptq"),
    "quantize.Quantize prepared": lambda: fw.quantize.Quantize(equalize=True, smooth=0.5, correct_bias=True,
                                                               granularity="tensor", ranges="percentile"),
    "quantize.Quantize rescaled": lambda: fw.quantize.Quantize(rescale=True),
    "quantize.Quantize few bits": lambda: fw.quantize.Quantize("ternary", "uint3", ends="int4/int6", ranges="kl"),
    "quantize.Quantize dynamic": lambda: fw.quantize.Quantize(activations="dynamic"),
    "quantize.Quantize halves": lambda: fw.quantize.Quantize("fp16", None),
    "balance.Ladder": lambda: fw.balance.Ladder(score_drop=5.0, rungs=("mse",)),
    "balance.Mixed": lambda: fw.balance.Mixed(bits=5, kinds=("int8", "int4"), batches=1),
    "balance.Mixed families": lambda: fw.balance.Mixed(
        fw.quantize.Quantize(ends=None), bytes=0.2, macs=0.95, kinds=("int8", "float"), batches=1,
        families=("factorize", "share")),
}
FITS: dict[str, Callable[[], Fit]] = {
    "recover.BatchNorm": lambda: fw.recover.BatchNorm(batches=2),
    "recover.Train": lambda: fw.recover.Train(epochs=1, lr=0.01),
    "recover.Train distilled": lambda: fw.recover.Train(epochs=1, lr=0.01, optimizer="adamw",
                                                        distill=fw.distill.Logits(temperature=2.0)),
    "recover.Train by features": lambda: fw.recover.Train(epochs=1, lr=0.01, beside=(
        fw.distill.Features(taps="layers"), fw.distill.Relations("distance", taps="layers"))),
    "distill.BornAgain": lambda: fw.distill.BornAgain(fw.recover.Train(epochs=1, lr=0.01)),
    "recover.Train with masks": lambda: fw.recover.Train(epochs=1, lr=0.01, during=(fw.prune.Weights(sparsity=0.5),)),
}
EXPORTED = ("conv_bn", "residual", "attention", "two_inputs", "dict_output", "grouped")
#: what a step that cuts channels finds none to cut in, and why
UNCUT = {("", "tied_linear"): "its weights map a space to itself", ("", "dataclass_output"): "it gives its inner width",
         ("rounded", "two_inputs"): "its one width is a sum's"}
TOLERANCE = 1e-5


def pair(step: str, problem: str, *marks: Any) -> Any:
    """A step on a problem, as one row of a test: all tests of the pair run one after the other in the same process."""
    return pytest.param(step, problem, marks=[pytest.mark.xdist_group(f"{step} {problem}"), *marks])


def over(rows: Iterable[Any]) -> Any:
    return pytest.mark.parametrize(("step", "problem"), list(rows), scope="module")


def cuts(step: str, problem: str) -> bool:
    return step.startswith("prune.Channels") and not any(s in step and p == problem for s, p in UNCUT)


#: further options of steps that have a row: most problems, and all files, are slow
VARIANTS = ("share.Codebook channels", "share.Codebook priced", "share.Codebook made up for", "share.Transferred",
            "share.Hashed", "share.BlockCodebook",
            "factorize.Structured circulant", "factorize.Structured monarch", "factorize.Structured displaced",
            "factorize.Structured sparse", "factorize.Structured fourier", "factorize.LowRank budget",
            "factorize.Compact", "factorize.Compact fire", "factorize.Compact shift", "distill.Student shallow")
#: other scores, budgets and forms of steps that have rows of their own: on a third of the problems
FORMS = ("prune.Channels taylor", "prune.Channels l2, params", "prune.Channels fpgm, bytes",
         "prune.Channels bn by sensitivity", "prune.Channels fisher, bias", "prune.Weights blocks",
         "quantize.Quantize groups", "quantize.Quantize rescaled", "quantize.Quantize few bits", "balance.Mixed",
         "balance.Mixed families")


def slow(step: str, problem: str, third: bool = False) -> list[Any]:
    """The mark of a pair that says what others say; third: of all steps, two thirds of the problems do."""
    apart = (list(STEPS).index(step) + list(PROBLEMS).index(problem)) % 3 > 0
    said = (step in VARIANTS and problem not in EXPORTED[1:2]) or (apart and (third or step in FORMS))
    return [pytest.mark.slow] * said


pairs = over(pair(s, p, *slow(s, p)) for s in STEPS for p in PROBLEMS)
thirds = over(pair(s, p, *slow(s, p, True)) for s in STEPS for p in PROBLEMS)
cut_pairs = over(pair(s, p, *slow(s, p)) for s in STEPS for p in PROBLEMS if cuts(s, p))
#: every step into two files, every problem into nine; the other two thirds say the same of other widths: slow
exports = over(pair(s, p, *[pytest.mark.slow] * ((i + j) % 3 > 0 or s in VARIANTS))
               for i, s in enumerate(STEPS) for j, p in enumerate(EXPORTED))


@dataclass(frozen=True)
class Case:
    """A step on a problem, planned and applied once for all laws. Do not write into it."""

    problem: Problem
    before: fw.Network
    plan: Plan
    after: fw.Network


@functools.lru_cache(maxsize=4)
def case(step: str, problem: str) -> Case:
    before = network(PROBLEMS[problem])
    plan = STEPS[step]().plan(before, task(PROBLEMS[problem]))
    return Case(PROBLEMS[problem], before, plan, plan.apply(before))


def outputs(net: Any, problem: Problem, batch: int = 3, seed: int = 77) -> list[Tensor]:
    with torch.no_grad():
        return tensors_of(call(net, problem.example(problem.batch or batch, seed=seed)))


def assert_close(wanted: list[Tensor], given: list[Tensor], tolerance: float = 0.0) -> None:
    for a, b in zip(wanted, given, strict=True):
        if not a.is_floating_point():
            torch.testing.assert_close(b, a, rtol=0, atol=0)
            continue
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance * max(1.0, float(a.abs().max())))


def test_every_plan_has_a_row():
    """A rewrite that is not under the laws is not finished; nor is a plan that says which MACs are left, or how to zero
    what it cuts, and is not under the laws of those that cut."""
    planned = {step: case(step, "mlp").plan for step in STEPS}
    shipped = {cls for cls in PLANS.values() if cls.__module__.startswith("featherweight.")}
    assert shipped == {type(plan) for plan in planned.values()}
    for step, plan in planned.items():
        assert step.startswith("prune.Channels") == hasattr(plan, "zero") == hasattr(plan, "macs_after"), step


@over(pair(s, p) for s in STEPS for p in PROBLEMS if s.startswith("prune.Channels") and not cuts(s, p))
def test_what_is_said_to_be_uncut_is(step, problem):
    plan = case(step, problem).plan
    assert isinstance(plan, fw.prune.ChannelPlan)
    assert not plan.keep


@thirds
def test_a_plan_leaves_its_network_unchanged_and_is_made_again_alike(step, problem):
    found, net = case(step, problem), network(PROBLEMS[problem])
    before, values = digest(net), outputs(net, PROBLEMS[problem])
    plan = STEPS[step]().plan(net, task(PROBLEMS[problem]))
    assert digest(net) == before
    assert (net.training, net._taps) == (False, {})
    assert all(p.grad is None for p in net.parameters())
    plan.apply(net)
    assert digest(net) == before
    assert_close(values, outputs(net, PROBLEMS[problem]))
    assert plan == found.plan
    assert plan.tensors.keys() == found.plan.tensors.keys()
    assert_close(list(found.plan.tensors.values()), list(plan.tensors.values()))


@pairs
def test_a_plan_survives_json(step, problem, tmp_path):
    found = case(step, problem)
    text = found.plan.to_json()
    json.loads(text)
    again = Plan.from_json(text, found.plan.tensors)
    assert again == found.plan
    assert digest(again.apply(found.before)) == digest(found.after)
    found.plan.save(tmp_path / "plan")
    read = Plan.load(tmp_path / "plan")
    assert read == found.plan
    assert digest(read.apply(found.before)) == digest(found.after)
    assert found.plan.summary() in str(found.plan)


@pairs
def test_apply_needs_no_data_and_is_deterministic(step, problem):
    found = case(step, problem)
    torch.manual_seed(999)
    first = found.plan.apply(found.before)
    torch.manual_seed(1)
    assert digest(first) == digest(found.plan.apply(found.before)) == digest(found.after)


@pairs
def test_the_signature_is_the_same(step, problem):
    found = case(step, problem)
    assert found.after.signature == found.before.signature
    for batch in (1, 2, 5):
        old, new = (outputs(net, found.problem, batch) for net in (found.before, found.after))
        for a, b in zip(old, new, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert bool(torch.isfinite(b).all())


@pairs
def test_nothing_grows_unless_the_plan_says_so(step, problem, tmp_path):
    """The word that a weight's zeros are to be kept costs some letters of the file; that alone is not counted."""
    found = case(step, problem)
    bare = found.after.copy()
    bare.patterns.clear()
    sizes = {
        "params": (measure.params(found.before), measure.params(found.after)),
        "macs": (measure.macs(found.before).total, measure.macs(found.after).total),
        "bytes": (found.before.save(tmp_path / "before.fw"), bare.save(tmp_path / "after.fw")),
    }
    assert set(found.plan.grows) <= set(sizes)
    grown = {name: pair for name, pair in sizes.items() if pair[1] > pair[0]}
    assert set(grown) <= set(found.plan.grows), f"these grew unannounced (before, after): {grown}"


@cut_pairs
def test_zeroing_what_is_cut_equals_cutting_it(step, problem):
    found = case(step, problem)
    zeroed = found.plan.zero(found.before)
    before, zeros, after = ({n: t.shape for n, t in net.tensors().items()}
                            for net in (found.before, zeroed, found.after))
    assert {n: zeros[n] for n in before} == before  # and indices, where channels are normalized together
    assert any(after.get(n) != shape for n, shape in before.items()), "nothing was cut"
    assert_close(outputs(zeroed, found.problem), outputs(found.after, found.problem), TOLERANCE)


@cut_pairs
def test_planned_macs_are_those_counted_after(step, problem):
    found = case(step, problem)
    assert found.plan.macs_before == measure.macs(found.before).total
    assert found.plan.macs_after == measure.macs(found.after).total
    assert found.plan.macs_after < found.plan.macs_before


@pairs
def test_what_is_finite_stays_so(step, problem):
    """Its tensors and its outputs."""
    found = case(step, problem)
    assert all(bool(torch.isfinite(t).all()) for t in [*outputs(found.before, found.problem),
                                                       *found.before.tensors().values()])
    assert all(bool(torch.isfinite(t).all()) for t in outputs(found.after, found.problem))
    wrong = [n for n, t in found.after.tensors().items() if t.is_floating_point() and not torch.isfinite(t).all()]
    assert not wrong


@pairs
def test_saved_equals_loaded_bit_for_bit(step, problem, tmp_path):
    found = case(step, problem)
    found.after.save(tmp_path / "net.fw")
    loaded = fw.load(tmp_path / "net.fw", types={"problems.Answer": Answer})
    assert digest(loaded) == digest(found.after)
    assert_close(outputs(found.after, found.problem), outputs(loaded, found.problem))
    if not found.plan.skipped and step != "prune.Weights":
        assert digest(found.after) != digest(found.before)


@pairs
def test_what_is_left_alone_is_named(step, problem):
    """A step that changes nothing says why, and every reason has words."""
    found = case(step, problem)
    if digest(found.after) == digest(found.before):
        assert found.plan.skipped, "nothing was changed and nothing is said to have been left alone"
    for left in found.plan.skipped:
        assert left.reason.strip()


#: a plan's class -> the names of the weights that it decides on
DECIDES: dict[type[Plan], Callable[[Any, fw.Network], Iterable[str]]] = {
    fw.prune.ChannelPlan: lambda plan, net: in_groups(plan, net),
    fw.distill.StudentPlan: lambda plan, net: students(plan, net),
    fw.prune.WeightPlan: lambda plan, net: plan.zeros,
    fw.prune.LayerPlan: lambda plan, net: inside_blocks(plan, net),
    fw.factorize.LowRankPlan: lambda plan, net: [s.weight for s in plan.splits],
    fw.factorize.StructuredPlan: lambda plan, net: [s.weight for s in plan.layers],
    fw.factorize.CompactPlan: lambda plan, net: [s.weight for s in plan.layers],
    fw.factorize.MergePlan: lambda plan, net: [n for p in plan.pairs for n in (p.first, p.second)],
    fw.share.CodebookPlan: lambda plan, net: [s.weight for s in plan.shared],
    fw.share.TransferredPlan: lambda plan, net: [o.weight for o in plan.orbits],
    fw.share.HashedPlan: lambda plan, net: [h.weight for h in plan.hashed],
    fw.share.BlockCodebookPlan: lambda plan, net: [b.weight for b in plan.blocked],
    fw.share.VectorsPlan: lambda plan, net: plan.names,
    fw.quantize.QuantizePlan: lambda plan, net: [s.weight for s in plan.stored],
    fw.balance.MixedPlan: lambda plan, net: [n for p in plan.plans() for n in DECIDES[type(p)](p, net)],
}


def in_groups(plan: fw.prune.ChannelPlan, net: fw.Network) -> Iterable[str]:
    """The tensors that are cut, and those of the groups that are named as left whole."""
    named = {s.path for s in plan.skipped}
    groups = axis_groups(net, plan.heads).groups
    return [*plan.shapes, *(m.tensor for g in groups if g.name in named for m in g.members)]


def students(plan: fw.distill.StudentPlan, net: fw.Network) -> Iterable[str]:
    """The tensors that are cut, and those of the blocks that are left out."""
    regions = droppable(net).regions
    nodes = {name for block in plan.blocks for name in regions[block.name]}
    return [*plan.shapes, *(str(given.target) for n in net.calls() if n.name in nodes for given in leaves_of(n))]


def inside_blocks(plan: fw.prune.LayerPlan, net: fw.Network) -> Iterable[str]:
    """The tensors that the calls of scored blocks read."""
    regions = droppable(net).regions
    nodes = {name for block in plan.scores for name in regions[block]}
    return [str(given.target) for node in net.calls() if node.name in nodes for given in leaves_of(node)]


def leaves_of(node: Node) -> list[Node]:
    """The stored tensors that a call reads, also turned around."""
    given = [g.args[0] if g.target is torch.ops.aten.t.default else g for g in node.all_input_nodes]
    return [g for g in given if g.op == "get_attr"]


@pairs
def test_every_matrix_is_in_the_plan_or_skipped_by_name(step, problem):
    """Nothing is skipped in silence: a parameter of two or more axes is decided on, or named with a reason. Layers are
    named by their weight; channels and blocks by the module that makes them."""
    found = case(step, problem)
    decided = set(DECIDES[type(found.plan)](found.plan, found.before))
    named = {s.path.removesuffix(" (layer)").partition(":")[0] for s in found.plan.skipped}
    larger = isinstance(found.plan, (fw.prune.ChannelPlan, fw.prune.LayerPlan, fw.distill.StudentPlan))
    missing = []
    for name, parameter in found.before.named_parameters():
        known = set(found.before.tied_names(name))
        if larger:
            known = known_by(known, readers_of(found.before, name))
        if parameter.dim() > 1 and not known & (decided | named):
            missing.append(name)
    assert not missing


@thirds
def test_the_result_copies_trains_and_takes_another_plan(step, problem):
    """What a step leaves is a Network like any other."""
    found = case(step, problem)
    net = found.after.copy()
    assert digest(net) == digest(found.after)
    values = net.values(found.problem.batch or 2)
    assert values.keys() >= {n.name for n in net.calls()}
    torch.manual_seed(0)
    inputs = found.problem.example(found.problem.batch or 4)
    total = sum(t.float().square().mean() for t in tensors_of(call(net.train(), inputs)))
    if isinstance(total, Tensor) and total.requires_grad:  # what was rounded last has no gradient
        total.backward()
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        assert all(bool(torch.isfinite(g).all()) for g in grads)
    again = STEPS["prune.Weights"]().plan(found.after, task(found.problem)).apply(found.after)
    assert all(bool(torch.isfinite(t).all()) for t in outputs(again, found.problem))


@exports
def test_exported_equals_pytorch(step, problem, tmp_path):
    found = case(step, problem)
    target = deploy.target("onnxruntime")
    path = tmp_path / f"net{target.suffix}"
    assert target.export(found.after, path) == path.stat().st_size
    runner = target.load(path, like=found.after.signature)
    try:
        for batch in (1, 3):
            inputs = found.problem.example(batch, seed=5)
            args, kwargs = measure.as_call(inputs)
            agreement = deploy.verify(found.after, runner, args, kwargs)
            assert agreement.ok, f"{step} on {problem}, batch {batch}: {agreement}"
    finally:
        runner.close()


# ---- fits

def _fits() -> list[tuple[str, str]]:
    chosen = ["conv_bn", "residual", "shared", "tied", "tied_linear", "two_inputs", "dict_output", "dropout",
              "no_momentum", "attention", "static_batch"]
    return [(f, p) for f in FITS for p in chosen if not ("distilled" in f and p == "dict_output")]


@pytest.mark.parametrize(("fit", "problem"), _fits())
def test_a_fit_changes_values_only(fit, problem, tmp_path):
    """Same graph, same shapes, same names; its input unchanged; alike again; saved as it is."""
    row = PROBLEMS[problem]
    net = network(row)
    before = digest(net)
    fitted = FITS[fit]().fit(net, task(row), Context(original=net.copy()))
    assert digest(net) == before
    assert (net.training, net._taps, fitted._taps) == (False, {}, {})
    assert [(n.name, n.op, n.target) for n in fitted.graph.nodes] == [(n.name, n.op, n.target) for n in net.graph.nodes]
    assert {k: (v.shape, v.dtype) for k, v in fitted.tensors().items()} == {
        k: (v.shape, v.dtype) for k, v in net.tensors().items()}
    assert all(sorted(fitted.tied_names(n)) == sorted(net.tied_names(n)) for n in net.tensors())
    assert fitted.signature == net.signature
    assert digest(FITS[fit]().fit(net, task(row), Context(original=net.copy()))) == digest(fitted)
    if fit != "recover.BatchNorm":
        assert digest(fitted) != before
    fitted.save(tmp_path / "net.fw")
    assert digest(fw.load(tmp_path / "net.fw", types={"problems.Answer": Answer})) == digest(fitted)
    assert all(bool(torch.isfinite(t).all()) for t in outputs(fitted.eval(), row))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("problem", ["residual", "tied", "tied_linear", "attention", "shared"])
def test_a_fit_keeps_the_zeros_that_are_to_be_kept(fit, problem):
    row = PROBLEMS[problem]
    pruned = case("prune.Weights", problem).after
    assert pruned.patterns
    fitted = FITS[fit]().fit(pruned, task(row), Context(original=network(row)))
    assert fitted.patterns.keys() >= pruned.patterns.keys()
    for name in pruned.patterns:
        assert bool((fitted.tensor(name)[pruned.tensor(name) == 0] == 0).all())
