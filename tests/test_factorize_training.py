"""Merging what was split, and what pulls a training towards low rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
from featherweight.errors import PlanError, RecipeError
from featherweight.factorize import FrobeniusDecay, LowRank, Merge, Nuclear
from featherweight.factorize.training import chains_of, directions
from featherweight.task import Task
from problems import PROBLEMS, network, task
from test_factorize_forms import Every, images

torch.set_num_threads(1)
FORCE = -100.0


@pytest.fixture(scope="module")
def every() -> fw.Network:
    torch.manual_seed(0)
    return fw.capture(Every().eval(), images())  # type: ignore[return-value]


@pytest.mark.parametrize("form", ["svd", "spatial", "tucker2", "tt"])
def test_merging_takes_a_factorization_back(every: fw.Network, form: str) -> None:
    """Every chain of plain convolutions becomes one call again, which computes the same."""
    wanted = {"first": 99, "point": 99}
    split = LowRank(ranks=wanted, form=form, min_gain=FORCE).plan(every, Task()).apply(every)
    plan = Merge().plan(split, Task())
    merged = plan.apply(split)
    assert len(merged.calls()) == len(every.calls())
    assert fw.measure.params(merged) == fw.measure.params(every)
    torch.testing.assert_close(merged(images(4)), split(images(4)), rtol=1e-4, atol=1e-5)
    assert {n for n in merged.tensors() if "merged" in n} >= {"point.merged.weight"}
    assert any(n.startswith("first.merged") for n in merged.tensors())
    named = {s.path for s in plan.skipped}
    assert {"groups.weight", "same.weight", "head.weight"} <= named


def test_what_saves_stays_split_and_what_lies_between_is_respected() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(32, 4), nn.Linear(4, 32), nn.Linear(32, 40), nn.Linear(40, 8)
            self.e, self.f = nn.Conv1d(8, 16, 1), nn.Conv1d(16, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.d(self.c(torch.relu(self.b(self.a(x)))))
            return self.f(self.e(x.unsqueeze(2)))

    net = fw.capture(Two().eval(), torch.randn(2, 32))
    plan = Merge().plan(net, Task())
    assert [(p.first, p.second) for p in plan.pairs] == [("c.weight", "d.weight")]
    reasons = {s.path: s.reason for s in plan.skipped}
    assert "params" in reasons["b.weight"]
    assert "grow" in reasons["b.weight"]
    assert reasons["f.weight"] == "it pads what has a bias before"
    x = torch.randn(5, 32)
    torch.testing.assert_close(plan.apply(net)(x), net(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(PlanError, match="plan again"):
        plan.apply(plan.apply(net))


def test_the_decay_is_that_of_the_whole_kernels_and_its_gradient_too(every: fw.Network) -> None:
    small = LowRank(energy=0.8, form="svd", min_gain=FORCE).plan(every, Task()).apply(every)
    chains = chains_of(small)
    assert {n[0][0].split(".")[0] for n in chains} == {"first", "groups", "up", "up_groups", "same", "point", "line",
                                                     "head"}
    term = FrobeniusDecay(0.1).start(small, Task()).loss(None, None, None)
    assert term is not None
    whole = 0.0
    for layer in ("first", "point", "head", "line", "same"):  # those of one group: a product of two matrices
        a, b = (small.tensor(f"{layer}.{part}.weight").flatten(1) for part in ("reduce", "expand"))
        whole += float((b.detach() @ a.detach()).square().sum())
    for layer in ("groups", "up_groups"):
        for a, b in zip(*(small.tensor(f"{layer}.{p}.weight").detach().chunk(2) for p in ("reduce", "expand")),
                        strict=True):
            whole += float((b.flatten(1) @ a.flatten(1)).square().sum())
    a, b = (small.tensor(f"up.{part}.weight").detach().flatten(1) for part in ("reduce", "expand"))
    whole += float((b @ a).square().sum())
    assert float(term.detach()) == pytest.approx(0.05 * whole, rel=1e-4)
    term.backward()
    assert small.tensor("first.reduce.weight").grad is not None
    with pytest.raises(RecipeError, match="without factorized layers"):
        FrobeniusDecay().start(every, Task())


def test_directions_are_the_slope_of_the_sum_of_singular_values() -> None:
    kernel = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch.linalg.svdvals(kernel.flatten(1)).sum().backward()
    torch.testing.assert_close(directions(kernel.detach()), kernel.grad, rtol=1e-4, atol=1e-5)


def test_a_training_under_the_nuclear_norm_ends_in_lower_ranks() -> None:
    net, job = network(PROBLEMS["mlp"]), task(PROBLEMS["mlp"])
    step = LowRank(energy=0.9, min_gain=FORCE)
    ranks = []
    for strength in (1e-9, 0.03):
        train = fw.recover.Train(epochs=8, lr=0.05, during=(Nuclear(step, strength=strength, every=2),))
        trained = train.fit(net, job, fw.steps.Context())
        ranks.append([trained.tensor(f"{n}.reduce.weight").shape[0] for n in (0, 2)])
    assert sum(ranks[1]) < sum(ranks[0])


def test_wrong_options_are_refused() -> None:
    for step, message in ((Nuclear(strength=0.0), "strength=0.0"), (Nuclear(every=0), "every=0"),
                          (Nuclear(LowRank(energy=2.0)), "energy=2.0"), (FrobeniusDecay(-1.0), "strength=-1.0")):
        with pytest.raises(RecipeError, match=message):
            step.check()
