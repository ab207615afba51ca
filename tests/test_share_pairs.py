"""Codebooks with every other family: before or after, as the stages order them, on small problem networks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import featherweight as fw
from featherweight import deploy, measure
from featherweight.steps import Rewrite, Stage
from featherweight.task import call
from problems import PROBLEMS, network, task, tensors_of

FAMILIES: dict[str, Callable[[], Rewrite]] = {
    "prune.Channels": lambda: fw.prune.Channels(macs=0.6),
    "prune.Weights": lambda: fw.prune.Weights(sparsity=0.6),
    "prune.Weights 2:4": lambda: fw.prune.Weights(pattern="2:4", compensate="obs"),
    "prune.Layers": lambda: fw.prune.Layers(count=1, score="norm"),
    "distill.Student": lambda: fw.distill.Student(width=0.6),
    "factorize.LowRank": lambda: fw.factorize.LowRank(energy=0.6, min_gain=0.0),
    "factorize.Structured": lambda: fw.factorize.Structured("monarch", blocks=4),
    "factorize.Merge": lambda: fw.factorize.Merge(),
    "share.Vectors": lambda: fw.share.Vectors(),
    "quantize.Quantize": lambda: fw.quantize.Quantize(),
    "quantize.Quantize weights": lambda: fw.quantize.Quantize("int4", None),
    "balance.Mixed": lambda: fw.balance.Mixed(bits=5, kinds=("int8", "int4"), batches=1),
}
SHARED = {"": lambda: fw.share.Codebook(bits=3, min_size=32),
          " made up for": lambda: fw.share.Codebook(bits=3, min_size=32, rate=0.01, compensate="obs")}
#: the others say the same of other widths: slow
NAMES = ("conv_bn", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mlp", "residual", "attention")))
#: where all layers that a family leaves are too small for a codebook of their own
TOO_SMALL = {("distill.Student", "mlp"), ("factorize.LowRank", "mlp"), ("factorize.LowRank", "attention")}


def outputs(net: fw.Network, problem: str) -> list[torch.Tensor]:
    with torch.no_grad():
        return tensors_of(call(net, PROBLEMS[problem].example(3, seed=77)))


def looked_up(net: fw.Network, plan: fw.share.CodebookPlan) -> fw.Network:
    """The network with every shared weight written out, and the biases of the plan."""
    out = net.copy()
    for item in plan.shared:
        codebook, index = plan.codes(item, net.tensor(item.weight).detach())
        bias = plan.tensors.get(f"bias.{item.weight}")
        if bias is not None:
            readers = [n for n in out.graph.nodes if n.op == "get_attr" and n.target in out.tied_names(item.weight)]
            (reader,) = [user for n in readers for user in n.users]
            out.set_tensor(str(reader.args[2].target), bias)
        out.set_tensor(item.weight, codebook[index.long()])
    return out


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("problem", NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_codebooks_after_a_family_are_the_weights_it_left_looked_up(family, problem, kind, tmp_path):
    before = network(PROBLEMS[problem])
    other, share = FAMILIES[family](), SHARED[kind]()
    first = other.plan(before, task(PROBLEMS[problem])).apply(before)
    plan = share.plan(first, task(PROBLEMS[problem]))
    after = plan.apply(first)
    named = {s.weight for s in plan.shared} | {s.path for s in plan.skipped}
    assert named, f"nothing is said of any layer after {family}"
    if other.stage is not Stage.PRECISION or family == "share.Vectors":
        assert bool(plan.shared) == ((family, problem) not in TOO_SMALL)
    for item in plan.shared:
        _, index = plan.codes(item, first.tensor(item.weight).detach())
        assert not item.zeros or not index[first.tensor(item.weight) == 0].any()
    for given, wanted in zip(outputs(after, problem), outputs(looked_up(first, plan), problem), strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)
        assert torch.isfinite(given).all()
    after.save(tmp_path / "a.fw")
    for given, wanted in zip(outputs(fw.load(tmp_path / "a.fw"), problem), outputs(after, problem), strict=True):
        assert torch.equal(given, wanted)


@pytest.mark.parametrize("problem", NAMES)
@pytest.mark.parametrize("family", [f for f, make in FAMILIES.items() if make().stage is Stage.PRECISION])
def test_what_comes_after_codebooks_leaves_their_indices(family, problem):
    before = network(PROBLEMS[problem])
    shared = SHARED[""]().plan(before, task(PROBLEMS[problem])).apply(before)
    after = FAMILIES[family]().plan(shared, task(PROBLEMS[problem])).apply(shared)
    index = {n: t for n, t in shared.tensors().items() if n.endswith("_index")}
    assert index
    assert all(torch.equal(after.tensor(n), t) for n, t in index.items())
    assert all(torch.isfinite(out).all() for out in outputs(after, problem))


@pytest.mark.parametrize("family", [pytest.param(f, marks=[pytest.mark.slow] * (i % 4 > 0))
                                    for i, f in enumerate(FAMILIES)])
def test_pairs_are_exported_as_they_compute(family, tmp_path):
    before = network(PROBLEMS["conv_bn"])
    first = FAMILIES[family]().plan(before, task(PROBLEMS["conv_bn"])).apply(before)
    after = SHARED[""]().plan(first, task(PROBLEMS["conv_bn"])).apply(first)
    target = deploy.target("onnxruntime")
    target.export(after, tmp_path / "a.onnx")
    runner = target.load(tmp_path / "a.onnx", like=after.signature)
    args, kwargs = measure.as_call(PROBLEMS["conv_bn"].example(3, seed=5))
    try:
        assert deploy.verify(after, runner, args, kwargs).ok
    finally:
        runner.close()
