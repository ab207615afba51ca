"""Chains of every form: full rank is the layer, errors are what the spectra say, data lowers the error of outputs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import featherweight as fw
from featherweight.cli.app import app
from featherweight.errors import PlanError, RecipeError
from featherweight.factorize import LowRank, LowRankPlan
from featherweight.factorize.layers import CHOICES, factorable
from featherweight.factorize.plan import Split
from featherweight.numerics.factors import cp as cps
from featherweight.numerics.factors.chains import Link, composed, dense, refit_last
from featherweight.numerics.factors.forms import FORMS
from featherweight.numerics.factors.vbmf import evbmf_rank, stable_rank
from featherweight.steps import Plan
from featherweight.task import Task

torch.set_num_threads(1)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decaying(*shape: int, seed: int = 0) -> Tensor:
    """A kernel whose spectra fall, as those of trained layers do."""
    kernel = randn(*shape, seed=seed)
    for axis, size in enumerate(shape):
        turn = torch.linalg.qr(randn(size, size, seed=seed + axis + 1)).Q
        scale = torch.linspace(1, 0.05, size, dtype=torch.float64)
        kernel = torch.tensordot(turn * scale, kernel.movedim(axis, 0), 1).movedim(0, axis)
    return kernel


class Every(nn.Module):
    """Strides, paddings, dilations, groups, transposed calls, and weights that two calls read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, 12, 3, stride=2, padding=1)
        self.groups = nn.Conv2d(12, 16, (3, 5), groups=2, padding=(1, 2), stride=(2, 1), bias=False)
        self.up = nn.ConvTranspose2d(16, 10, (4, 3), stride=(2, 1), padding=1, output_padding=(1, 0))
        self.up_groups = nn.ConvTranspose2d(10, 12, 3, groups=2, dilation=2)
        self.same = nn.Conv2d(12, 12, (3, 5), padding="same", dilation=(1, 2))
        self.point = nn.Conv2d(12, 12, 1, stride=2, padding=1)
        self.line = nn.Conv1d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.groups(torch.relu(self.first(x))))
        x = self.same(torch.relu(self.up_groups(torch.relu(self.up(x)))))
        x = self.line(self.point(self.same(x)).mean(3)).mean(2)
        return self.head(torch.relu(self.head(x)))


def images(count: int = 3, seed: int = 1) -> Tensor:
    return randn(count, 6, 16, 14, seed=seed).float()


@pytest.fixture(scope="module")
def network() -> fw.Network:
    torch.manual_seed(0)
    return fw.capture(Every().eval(), images())  # type: ignore[return-value]


# ---- numerics

@pytest.mark.parametrize("name", FORMS)
def test_full_rank_is_the_kernel_and_less_has_the_error_that_the_spectra_say(name: str) -> None:
    form = FORMS[name]
    parts = int(name[-1]) if name.startswith("grouped") else 2
    kernel = decaying(10, 2 * parts, 3, 3)
    shape = tuple(kernel.shape)
    full = form.full(shape)
    tolerance = 1e-4 if name == "cp" else 1e-9
    assert float((composed(form.links(kernel, full)) - kernel).norm()) < tolerance * float(kernel.norm())
    ranks = form.within(shape, tuple(math.ceil(r / 2) for r in full))
    links = form.links(kernel, ranks)
    assert [(link.name, tuple(link.weight.shape), link.groups) for link in links] == form.sizes(shape, ranks)
    lost = [float(values[r:].square().sum()) for values, r in zip(form.spectra(kernel), ranks, strict=True)]
    error = float((composed(links) - kernel).square().sum())
    assert error <= sum(lost) * 1.0001 + 1e-9 or name == "cp"
    if form.exact:
        assert error == pytest.approx(lost[0])


def test_a_chain_is_one_kernel_as_convolutions_one_after_another_are() -> None:
    links = [Link("a", randn(6, 2, 3, 1), 2), Link("b", randn(6, 1, 1, 3, seed=1), 6), Link("c", randn(5, 6, 1, 1))]
    x = randn(2, 4, 8, 9, seed=3)
    found = x
    for link in links:
        found = nn.functional.conv2d(found, link.weight, groups=link.groups)
    torch.testing.assert_close(found, nn.functional.conv2d(x, composed(links)))
    torch.testing.assert_close(nn.functional.conv2d(x, dense(links[0])),
                               nn.functional.conv2d(x, links[0].weight, groups=2))


@pytest.mark.parametrize("name", ["svd", "spatial", "tucker2", "tt", "grouped2", "cp", "separable", "squeeze"])
def test_the_error_of_outputs_is_lower_where_the_inputs_are_looked_at(name: str) -> None:
    form, kernel = FORMS[name], decaying(8, 6, 3, 3)
    x = randn(400, 54, seed=5) @ decaying(54, 54, seed=6)
    gram, flat = x.T @ x, kernel.flatten(1)
    for share in (0.25, 0.5, 0.75):
        ranks = (round(12 * share),) if name == "cp" else form.within(
            (8, 6, 3, 3), tuple(round(r * share) for r in form.full((8, 6, 3, 3))))
        aware = form.links(kernel, ranks, gram)
        aware = aware if name == "svd" else refit_last(aware, gram, gram @ flat.T)
        errors = [float(((composed(links).flatten(1) - flat) @ x.T).square().sum())
                  for links in (aware, form.links(kernel, ranks))]
        assert errors[0] < errors[1]
        if name == "svd":  # the best there is (Eckart and Young on outputs)
            best = float(torch.linalg.svdvals(flat @ x.T)[ranks[0]:].square().sum())
            assert errors[0] == pytest.approx(best, rel=1e-2)


def test_the_last_link_is_refit_as_least_squares_have_it() -> None:
    kernel, x = decaying(5, 4, 3, 3), randn(200, 36, seed=2)
    links = refit_last(FORMS["spatial"].links(kernel, (4,)), x.T @ x, x.T @ x @ kernel.flatten(1).T, 1e-12)
    columns = []
    width = links[1].weight[0].numel()
    for n in range(width):  # the slow way: what each single weight of the last link gives
        one = torch.zeros(1, width, dtype=torch.float64)
        one[0, n] = 1
        columns.append(x @ composed([links[0], Link("", one.view(1, *links[1].weight.shape[1:]))]).flatten())
    best = torch.linalg.lstsq(torch.stack(columns, 1), x @ kernel.flatten(1).T).solution
    torch.testing.assert_close(links[1].weight.flatten(1), best.T, rtol=1e-5, atol=1e-6)


def test_cp_keeps_its_error_and_loses_the_terms_that_cancel() -> None:
    tensor = randn(12, 10, 9)
    free = cps.least_squares(tensor, 14)
    kept = list(cps.cp(tensor, 14))
    errors = [float((cps.rebuilt(f) - tensor).square().sum()) for f in (kept, free)]
    assert errors[0] <= errors[1] * (1 + 2 * cps.SLACK) + 1e-9
    assert cps.sensitivity(kept) < 0.7 * cps.sensitivity(free)
    assert all(torch.allclose(kept[0].norm(dim=0), f.norm(dim=0)) for f in kept)


def brute_force_rank(values: Tensor, short: int, long: int) -> int:
    """Nakajima et al. 2013, the slow way: the free energy of every variance of a fine grid, term by term, each
    component signal or noise by its threshold."""
    alpha = short / long
    squares = [float(v) ** 2 for v in values]
    tau = 2.5129 * math.sqrt(alpha)
    threshold = (1 + tau) * (1 + alpha / tau)
    best = (math.inf, 0)
    for noise in np.geomspace(1e-4 * sum(squares) / (short * long), sum(squares) / (short * long), 4000):
        energy, rank = 0.0, 0
        for square in squares:
            x = square / (long * noise)
            energy += x - math.log(x)
            if x > threshold:
                t = 0.5 * (x - 1 - alpha + math.sqrt((x - 1 - alpha) ** 2 - 4 * alpha))
                energy += math.log(t + 1) + alpha * math.log(t / alpha + 1) - t
                rank += 1
        best = min(best, (energy, rank))
    return best[1]


def test_evbmf_finds_the_rank_under_noise_as_brute_force_does() -> None:
    for seed, (rows, columns, rank, noise) in enumerate([(30, 50, 4, 0.3), (50, 20, 7, 0.5), (24, 24, 2, 1.0),
                                                         (16, 90, 0, 1.0)]):
        matrix = randn(rows, max(rank, 1), seed=seed) @ randn(max(rank, 1), columns, seed=seed + 9) * (rank > 0)
        values = torch.linalg.svdvals(matrix + noise * randn(rows, columns, seed=seed + 20))
        found = evbmf_rank(values, rows, columns)
        assert found == brute_force_rank(values, *sorted((rows, columns)))
        assert found == rank
    assert evbmf_rank(torch.zeros(3), 3, 4) == 0


def test_stable_rank_is_the_ratio_of_two_norms() -> None:
    matrix = randn(9, 14)
    want = float(matrix.norm() ** 2 / torch.linalg.matrix_norm(matrix, 2) ** 2)
    assert stable_rank(torch.linalg.svdvals(matrix)) == pytest.approx(want)


def test_separable_and_squeeze_are_the_compact_layers_that_they_are_called_after() -> None:
    kernel = decaying(10, 4, 3, 3)
    reduce, expand = FORMS["separable"].links(kernel, (1,))
    assert (reduce.groups, tuple(reduce.weight.shape), tuple(expand.weight.shape)) == (4, (4, 1, 3, 3), (10, 4, 1, 1))
    for i in range(4):  # every input channel by itself: the nearest matrix [o, k] of rank one
        u, s, vh = torch.linalg.svd(kernel[:, i].flatten(1), full_matrices=False)
        made = composed([reduce, expand])[:, i].flatten(1)
        torch.testing.assert_close(made, s[0] * u[:, :1] @ vh[:1])
    first, second = FORMS["squeeze"].links(kernel, (2,))
    assert (tuple(first.weight.shape), tuple(second.weight.shape)) == ((2, 4, 1, 1), (10, 2, 3, 3))
    values = torch.linalg.svdvals(kernel.movedim(1, 0).flatten(1))
    error = (composed([first, second]) - kernel).square().sum()
    torch.testing.assert_close(error, values[2:].square().sum())


# ---- the step

@pytest.mark.parametrize("choice", CHOICES)
def test_full_rank_is_the_same_network_and_its_macs_are_counted(network: fw.Network, choice: str) -> None:
    layers, skipped, _ = factorable(network, ())
    assert not skipped
    splits = []
    for layer in layers:
        for form in layer.forms(choice):
            splits.append(Split(layer.layer.weight, tuple(network.tensor(layer.layer.weight).shape),
                                FORMS[form].full(layer.shape), form))
            one = LowRankPlan((splits[-1],)).apply(network)
            more = fw.measure.macs(one).total - fw.measure.macs(network).total
            assert more == layer.cost(form, splits[-1].ranks).macs - layer.whole.macs
    for form in {s.form for s in splits}:
        plan = LowRankPlan(tuple(s for s in splits if s.form == form))
        torch.testing.assert_close(plan.apply(network)(images(4)), network(images(4)), rtol=1e-4, atol=1e-5)


def test_a_rank_by_an_error_is_the_least_within_it(network: fw.Network) -> None:
    for form in ("svd", "tucker2", "tt"):
        plan = LowRank(error=0.6, form=form, min_gain=-100.0).plan(network, Task())
        layers = {layer.layer.weight: layer for layer in factorable(network, ())[0]}
        assert plan.splits
        for split in plan.splits:
            assert layers[split.weight].error(split.form, split.ranks) <= 0.36
            fewer = tuple(max(1, r - 2) for r in split.ranks)
            assert layers[split.weight].error(split.form, fewer) > 0.36 or fewer == split.ranks


def calibrated(count: int = 3) -> Task:
    batches = [(images(32, seed=s), torch.zeros(32, dtype=torch.long)) for s in range(count)]
    return Task(calibration=lambda: batches, loss=nn.functional.cross_entropy)


@pytest.mark.parametrize("budget", ["macs", *(pytest.param(b, marks=pytest.mark.slow) for b in ("params", "bytes"))])
def test_a_budget_is_met_and_closely(network: fw.Network, budget: str) -> None:
    def size(net: fw.Network) -> float:
        if budget == "macs":
            return fw.measure.macs(net).total
        return sum(t.numel() for t in net.tensors().values())  # of four bytes each, all parameters

    for data in (False, True):
        small = LowRank(**{budget: 0.7}, form="auto", data=data).plan(network, calibrated()).apply(network)  # type: ignore[arg-type]
        assert 0.55 < size(small) / size(network) <= 0.7


def test_with_a_budget_the_best_form_may_be_cp_for_kernels_that_are_not_too_large(
        monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.einsum("or,ir,kr->oik", *(torch.randn(n, 16) for n in (16, 16, 9))).view(16, 16, 3, 3))
    network = fw.capture(layer.eval(), torch.randn(2, 16, 8, 8))
    step = LowRank(params=0.3, how="error", form="auto")
    (best,) = step.plan(network, Task()).splits
    monkeypatch.setattr("featherweight.factorize.choose.CP_MOST", 16 * 16 * 9 - 1)
    (other,) = step.plan(network, Task()).splits
    assert best.form == "cp"
    assert best.error < 0.05
    assert other.form != "cp"
    pointwise = fw.capture(nn.Conv2d(16, 16, 1).eval(), torch.randn(2, 16, 8, 8))
    monkeypatch.undo()
    assert {s.form for s in step.plan(pointwise, Task()).splits} <= {"svd"}
    assert other.error > 0.1


def test_two_budgets_hold_together_and_one_out_of_reach_is_said(network: fw.Network) -> None:
    small = LowRank(params=0.8, macs=0.6, how="error", form="auto").plan(network, Task()).apply(network)
    assert fw.measure.params(small) <= 0.8 * fw.measure.params(network)
    assert fw.measure.macs(small).total <= 0.6 * fw.measure.macs(network).total
    plan = LowRank(params=0.01, how="error").plan(network, Task())
    assert any("params=0.01 cannot be reached" in s.reason for s in plan.skipped)


def test_a_fit_to_data_lies_in_the_plan_and_lowers_the_error_of_the_outputs(network: fw.Network) -> None:
    fresh = images(64, seed=99)
    whole = network(fresh).detach()
    away = {}
    for data in (False, True):
        plan = LowRank(ranks={"first": 6, "groups": 3, "same": 6}, form="svd", data=data, min_gain=-9.0).plan(
            network, calibrated(4))
        away[data] = float((plan.apply(network)(fresh).detach() - whole).square().mean())
        assert bool(plan.tensors) == data
    assert away[True] < away[False] / 2
    assert {"first.reduce.weight", "first.expand.weight", "first.bias", "groups.bias"} <= plan.tensors.keys()
    assert "groups.expand.bias" in plan.apply(network).tensors()
    assert isinstance(plan, LowRankPlan)
    alone = Plan.from_json(plan.to_json(), {n: t for n, t in plan.tensors.items() if n != "first.reduce.weight"})
    with pytest.raises(PlanError, match=r"'first.reduce.weight' has shape none; expected \[6, 6, 3, 3\]"):
        alone.apply(network)


def test_biases_that_data_gives_keep_the_means(network: fw.Network) -> None:
    """The mean of each output channel of the layer, on the calibration data, is that of the whole network."""
    plan = LowRank(ranks={"groups": 2}, form="svd", data=True, min_gain=-9.0).plan(network, calibrated(4))
    seen: list[Tensor] = []
    small = plan.apply(network)
    last = next(n for n in small.calls() if any(str(a) == "groups_expand_weight" for a in n.all_input_nodes))
    first = next(n for n in network.calls() if "groups_weight" in map(str, n.all_input_nodes))
    for net, name in ((network, first.name), (small, last.name)):
        means = []
        for x, _ in calibrated(4).batches("calibration"):
            with torch.no_grad(), net.taps({name: lambda v: means.append(v.mean((0, 2, 3)))}):  # noqa: B023
                net(x)
        seen.append(torch.stack(means).mean(0))
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("options", "message"), [
    ({"form": "svds"}, "did you mean 'svd'"), ({"rank": "vbmf"}, "did you mean 'evbmf'"),
    ({"macs": 0.5, "error": 0.1}, r"error and macs; expected one of them: write LowRank\(macs=0.5\)"),
    ({"macs": 1.5}, "macs=1.5; expected the fraction that remains"), ({"how": "outputs"}, "did you mean 'output'"),
    ({"round_to": 0}, "round_to=0"), ({"error": 1.0}, "error=1.0"),
    ({"rank": "stable", "ranks": {"a": 2}}, "ranks and"),
])
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        fw.Recipe([LowRank(**options)])  # type: ignore[arg-type]


def test_inspect_shows_the_ranks(network: fw.Network, tmp_path: Path) -> None:
    network.save(tmp_path / "every.fw")
    made = CliRunner().invoke(app, ["inspect", str(tmp_path / "every.fw"), "--ranks", "--json"])
    assert made.exit_code == 0, made.output
    rows = {row["weight"]: row for row in json.loads(made.stdout)["ranks"]}
    values = torch.linalg.svdvals(network.tensor("first.weight").detach().flatten(1).double())
    torch.testing.assert_close(torch.tensor(rows["first.weight"]["values"], dtype=torch.float64), values)
    kept = (values.square().cumsum(0) / values.square().sum() < 0.9).sum() + 1
    assert rows["first.weight"]["by_energy"]["0.9"] == int(kept)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "every.fw"), "--ranks"]).output
    assert "ranks of the layers" in shown
