"""``Weights``: what goes, what stays, how the rest makes up for it, and masks at work in a training."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight as fw
from featherweight.calibrate.moments import input_norms, second_moments
from featherweight.errors import PlanError, RecipeError, TaskError
from featherweight.network.file.digest import digest
from featherweight.network.layers import calls_of
from featherweight.network.matrices import as_matrix, from_matrix, rows
from featherweight.numerics.obs import damped, least_squares, sweep
from featherweight.prune import WeightPlan, Weights
from featherweight.prune.weights.masks import ALLOCATIONS, erk, masks_of, pattern_of
from featherweight.prune.weights.schedules import CURVES, MARGIN, cubic
from featherweight.prune.weights.scores import WEIGHT_SCORES, matrix
from featherweight.steps import Companion, Context, Plan, Skipped
from problems import PROBLEMS, Problem, first_tensor, images, network, task, tensors_of

torch.set_num_threads(1)
NOTHING = fw.Task()
PATTERNS = ("single", "2:4", "block:2x3")


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hessian_of(width: int, samples: int = 50, seed: int = 1) -> Tensor:
    """Of inputs that hang together, as activations do."""
    x = gaussian(samples, width, seed=seed) @ gaussian(width, width, seed=seed + 1) + 1
    return x.T @ x


def outputs(net: fw.Network, batch: int = 4) -> list[Tensor]:
    args, kwargs = net.example_inputs(batch)
    with torch.no_grad():
        return tensors_of(net(*args, **kwargs))


def zeros_in(masks: dict[str, Tensor]) -> int:
    return int(sum((~m).sum() for m in masks.values()))


# ---- numerics: against explicit inverses

def error(new: Tensor, old: Tensor, hessian: Tensor) -> Tensor:
    """Squared output error of each row."""
    return ((new - old) @ hessian * (new - old)).sum(-1)


def test_a_sweep_is_obs_with_the_inverse_taken_anew_at_every_column() -> None:
    """w_{j:} -= (w_j / [H_j^-1]_00) H_j^-1[0], H_j = H[j:, j:], for each weight that goes; blocks change nothing."""
    weight, hessian = gaussian(5, 9), hessian_of(9)
    mask = gaussian(5, 9, seed=3) > 0
    slow, full = weight.clone(), damped(hessian, 0.01)
    for row, j in itertools.product(range(5), range(9)):
        if not mask[row, j]:
            inverse = torch.linalg.inv(full[j:, j:])
            slow[row, j:] -= slow[row, j] / inverse[0, 0] * inverse[0]
    for every in (1, 2, 4, 128):
        found = sweep(weight, hessian, lambda first, w, spread: lambda j, v: v * mask[:, first + j], every)
        torch.testing.assert_close(found, slow * mask)


def test_spread_tells_what_a_weight_costs_once_those_left_of_it_are_fixed() -> None:
    weight, hessian = gaussian(3, 6), hessian_of(6)
    seen: dict[int, Tensor] = {}
    sweep(weight, hessian, lambda first, w, spread: seen.update({first: spread}) or (lambda j, v: v), 1)  # type: ignore[func-returns-value]
    for j in range(6):
        inverse = torch.linalg.inv(damped(hessian, 0.01)[j:, j:])
        torch.testing.assert_close(seen[j][0] ** 2, inverse[0, 0])


def test_a_sweep_that_decides_nothing_changes_nothing_and_groups_are_swept_alone() -> None:
    weight = gaussian(2, 3, 7)
    hessian = torch.stack([hessian_of(7, seed=s) for s in (4, 5)])
    torch.testing.assert_close(sweep(weight, hessian, lambda first, w, spread: lambda j, v: v), weight)
    both = sweep(weight, hessian, lambda first, w, spread: lambda j, v: (2 * v).round() / 2, 3)
    for g in range(2):
        alone = sweep(weight[g], hessian[g], lambda first, w, spread: lambda j, v: (2 * v).round() / 2, 3)
        torch.testing.assert_close(both[g], alone)


def test_rounding_in_a_sweep_beats_rounding() -> None:
    """The claim of GPTQ, on the same function: its output error is below that of rounding to the nearest."""
    weight, hessian = gaussian(16, 40), hessian_of(40, 300)
    found = sweep(weight, hessian, lambda first, w, spread: lambda j, v: v.round(), 8)
    assert torch.equal(found, found.round())
    assert error(found, weight, hessian).sum() < 0.7 * error(weight.round(), weight, hessian).sum()


def test_least_squares_is_where_obs_with_the_full_inverse_ends() -> None:
    """One weight after another by the full inverse of what is left, in any order: Frantar & Alistarh 2022, eq. 3."""
    weight, hessian = gaussian(4, 8), hessian_of(8)
    mask = gaussian(4, 8, seed=5) > -0.2
    found = least_squares(weight, hessian, mask)
    for seed, row in itertools.product(range(2), range(4)):
        slow, left = weight[row].clone(), torch.ones(8, dtype=torch.bool)
        gone = torch.nonzero(~mask[row]).flatten()
        for q in gone[torch.randperm(len(gone), generator=torch.Generator().manual_seed(seed))].tolist():
            index = torch.nonzero(left).flatten()
            inverse = torch.linalg.inv(damped(hessian, 0.01)[index][:, index])
            place = int((index == q).nonzero())
            slow[index] -= slow[q] / inverse[place, place] * inverse[place]
            left[q] = False
            slow[q] = 0
        torch.testing.assert_close(found[row], slow)
    swept = sweep(weight, hessian, lambda first, w, spread: lambda j, v: v * mask[:, first + j])
    full = damped(hessian, 0.01)
    assert (error(found, weight, full) <= error(swept, weight, full) * (1 + 1e-9)).all()


def test_a_sweep_over_a_mask_beats_the_mask_alone_and_least_squares_beats_the_sweep() -> None:
    weight, hessian = gaussian(16, 40), hessian_of(40, 300)
    mask = weight.abs() > 0.7
    swept = sweep(weight, hessian, lambda first, w, spread: lambda j, v: v * mask[:, first + j], 8)
    errors = [float(error(w, weight, hessian).sum()) for w in (least_squares(weight, hessian, mask), swept,
                                                               weight * mask)]
    assert errors[0] < errors[1] < errors[2]
    assert errors[0] < 0.7 * errors[2]


def test_an_input_that_is_always_zero_is_no_trouble() -> None:
    hessian = hessian_of(6)
    hessian[2] = hessian[:, 2] = 0
    for found in (sweep(gaussian(3, 6), hessian, lambda first, w, spread: lambda j, v: v.round()),
                  least_squares(gaussian(3, 6), hessian, gaussian(3, 6) > 0),
                  least_squares(gaussian(3, 6), torch.zeros(6, 6, dtype=torch.float64), gaussian(3, 6) > 0)):
        assert bool(torch.isfinite(found).all())


# ---- layers as matrices

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(5, 4), (3, 5)),
    "linear over tokens": (nn.Linear(5, 4), (2, 3, 5)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 2)), (2, 4, 9, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7)),
    "depthwise": (nn.Conv2d(4, 8, 3, padding=1, groups=4), (2, 4, 5, 5)),
    "same": (nn.Conv2d(3, 4, 4, padding="same"), (2, 3, 6, 6)),
    "valid": (nn.Conv1d(3, 4, 3, padding="valid", dilation=2), (2, 3, 9)),
    "conv3d": (nn.Conv3d(2, 3, 2, 2, 1), (2, 2, 4, 5, 4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), (2, 4, 5, 4)),
    "transposed, grouped": (nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), groups=2, dilation=(1, 2)),
                            (2, 4, 4, 5)),
    "transposed, cropped": (nn.ConvTranspose1d(4, 2, 2, 1, 2), (2, 4, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_matrix_times_its_rows(name: str) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    net = fw.capture(layer.eval(), x)
    (node,) = calls_of(net)["weight"]
    weight = net.tensor("weight").detach()
    whole = as_matrix(node, weight)
    assert torch.equal(from_matrix(node, whole, weight.shape), weight)
    flat = rows(node, weight, x) @ whole.transpose(1, 2)  # [g, n * places, o]
    with torch.no_grad():
        layer.bias.zero_()  # type: ignore[union-attr, operator]
        wanted = layer(x)
    if "linear" in name:
        wanted = wanted.reshape(-1, 4)
    else:
        wanted = wanted.flatten(2).transpose(1, 2).reshape(-1, wanted.shape[1])
    torch.testing.assert_close(torch.cat(list(flat), 1), wanted, rtol=1e-4, atol=1e-5)


def test_moments_are_sums_over_all_rows_however_they_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = PROBLEMS["conv_bn"]
    net, work = network(problem), task(problem)
    calls = calls_of(net)
    found, norms = second_moments(net, work.batches("calibration"), calls), input_norms(
        net, work.batches("calibration"), calls)
    first = sum((r := rows(calls["0.0.weight"][0], net.tensor("0.0.weight"), x)[0].double()).T @ r
                for x, _ in work.batches("calibration"))
    torch.testing.assert_close(found["0.0.weight"][0], first, rtol=1e-5, atol=1e-3)
    for name, hessian in found.items():
        squares = as_matrix(calls[name][0], norms[name]) ** 2  # [g, o, i * k]: the same for every output
        wanted = hessian.diagonal(dim1=-2, dim2=-1)[:, None].expand_as(squares)
        torch.testing.assert_close(squares, wanted, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr("featherweight.network.matrices.HELD", 1)
    for name, hessian in second_moments(net, work.batches("calibration"), calls).items():
        torch.testing.assert_close(hessian, found[name], rtol=1e-5, atol=1e-3)


# ---- patterns and allocations: by brute force

def test_n_of_m_by_trying_every_mask_of_a_group() -> None:
    scores = gaussian(4, 14).abs()
    mask = masks_of({"a": scores}, {"a": 18}, pattern_of("3:5"), 0.4, "global")["a"]
    assert mask[:, 10:].all(), "the ragged end stays"
    for row, start in itertools.product(range(4), (0, 5)):
        own = scores[row, start:start + 5]
        best = max(itertools.combinations(range(5), 3), key=lambda k: float(own[list(k)].sum()))
        assert torch.nonzero(mask[row, start:start + 5]).flatten().tolist() == list(best)


def test_blocks_go_by_their_mean_and_ends_stay() -> None:
    scores = gaussian(7, 8).abs()
    mask = masks_of({"a": scores}, {"a": 15}, pattern_of("block:2x3"), 0.5, "layer")["a"]
    means = {(r, c): float(scores[r:r + 2, c:c + 3].mean()) for r in (0, 2, 4) for c in (0, 3)}
    gone = sorted(means, key=means.__getitem__)[:3]
    slow = torch.ones(7, 8, dtype=torch.bool)
    for r, c in gone:
        slow[r:r + 2, c:c + 3] = False
    assert torch.equal(mask, slow)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_allocations_by_sorting(allocation: str) -> None:
    scores = {"a": gaussian(6, 10, seed=1).abs(), "b": 3 * gaussian(4, 40, seed=2).abs()}
    found = masks_of(scores, {"a": 16, "b": 44}, pattern_of("single"), 0.6, allocation)
    if allocation == "global":
        limit = sorted(torch.cat([s.flatten() for s in scores.values()]).tolist())[round(0.6 * 220)]
        assert all(torch.equal(found[n], s >= limit) for n, s in scores.items())
        return
    shares = erk({"a": 60, "b": 160}, {"a": 16, "b": 44}, 0.6) if allocation == "erk" else {"a": 0.6, "b": 0.6}
    for name, own in scores.items():
        parts = zip(own, found[name], strict=True) if allocation == "output" else [(own, found[name])]
        for values, mask in parts:
            limit = sorted(values.flatten().tolist())[round(shares[name] * values.numel())]
            assert torch.equal(mask, values >= limit)


def test_erk_is_proportional_to_the_sum_of_sizes_and_keeps_the_whole() -> None:
    sizes, dims = {"a": 27 * 16, "b": 9 * 64 * 64, "c": 640}, {"a": 25, "b": 134, "c": 74}
    for sparsity in (0.3, 0.9):
        found = erk(sizes, dims, sparsity)
        assert sum(found[n] * sizes[n] for n in sizes) == pytest.approx(sparsity * sum(sizes.values()))
        assert all(0 <= s <= 1 for s in found.values())
    density = {n: 1 - s for n, s in erk(sizes, dims, 0.9).items()}
    free = [n for n in sizes if density[n] < 1]
    ratios = {round(density[n] * sizes[n] / dims[n], 6) for n in free}
    assert len(ratios) == 1
    assert "b" in free


# ---- scores

def test_wanda_is_weight_times_input_norm() -> None:
    problem = PROBLEMS["mlp"]
    net, work = network(problem), task(problem)
    found = WEIGHT_SCORES["wanda"](net, work, calls_of(net), 0)["0.weight"]
    x = torch.cat([x for x, _ in work.batches("calibration")]).double()
    slow = net.tensor("0.weight").detach().double().abs() * x.square().sum(0).sqrt()
    torch.testing.assert_close(found / found.sum(), slow / slow.sum())


@pytest.mark.parametrize("problem", ["mlp", "grouped"])
def test_taylor_and_fisher_against_gradients_of_single_samples(problem: str) -> None:
    row = PROBLEMS[problem]
    net, work, model = network(row), task(row), row.factory()
    assert work.loss is not None
    calls = calls_of(net)
    taylor, fisher = (WEIGHT_SCORES[s](net, work, calls, 0) for s in ("taylor", "fisher"))
    grads: dict[str, list[Tensor]] = {n: [] for n in calls}
    for inputs, target in work.batches("calibration"):
        for x, y in zip(inputs.split(1), target.split(1), strict=True):
            loss = work.loss(model(x), y)
            for name, g in zip(calls, torch.autograd.grad(loss, [model.get_parameter(n) for n in calls]), strict=True):
                grads[name].append(as_matrix(calls[name][0], g).flatten(0, 1).double())
    for name, own in grads.items():
        stack, weight = torch.stack(own), matrix(net, name, calls)
        slow = (weight * stack.sum(0)).abs()
        torch.testing.assert_close(taylor[name] / taylor[name].sum(), slow / slow.sum(), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(fisher[name], weight ** 2 * stack.square().mean(0) / 2, rtol=1e-3, atol=1e-8)


def test_obs_score_is_the_rise_of_the_layers_error_by_explicit_inverse() -> None:
    problem = PROBLEMS["mlp"]
    net, work = network(problem), task(problem)
    calls = calls_of(net)
    found = WEIGHT_SCORES["obs"](net, work, calls, 0)["2.weight"]
    hessian = second_moments(net, work.batches("calibration"), {"2.weight": calls["2.weight"]})["2.weight"][0]
    weight = net.tensor("2.weight").detach().double()
    slow = weight ** 2 / torch.linalg.inv(damped(hessian, 0.01)).diagonal()
    torch.testing.assert_close(found / found.sum(), slow / slow.sum())


# ---- plans

@pytest.mark.parametrize("allocation", ["global", "layer"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_sparsity_is_exact_and_the_smallest_go(allocation: str, sparsity: float) -> None:
    net = network(PROBLEMS["conv_bn"])
    names = [n for n, p in net.named_parameters() if p.dim() > 1]
    small = Weights(sparsity=sparsity, allocation=allocation).plan(net, NOTHING).apply(net)
    before, after = ([n.tensor(k).detach().flatten() for k in names] for n in (net, small))
    if allocation == "global":
        before, after = [torch.cat(before)], [torch.cat(after)]
    for old, new in zip(before, after, strict=True):
        assert int((new == 0).sum()) == round(sparsity * old.numel())
        if sparsity:
            assert old[new == 0].abs().max() <= old[new != 0].abs().min()
        assert torch.equal(new[new != 0], old[new != 0])


COMBINATIONS = [
    *(Weights(None if ":4" in p else 0.5, score=s, pattern=p, allocation=a) for s, p, a in (
        ("random", "single", "erk"), ("wanda", "single", "output"), ("taylor", "2:4", "global"),
        ("fisher", "block:2x3", "layer"), ("obs", "block:2x3", "erk"), ("magnitude", "block:2x3", "output"))),
    *(Weights(None if ":4" in p else 0.5, score=s, pattern=p, allocation=a, compensate=c)
      for (s, c), (p, a) in itertools.product(
          [("obs", "obs"), ("magnitude", "obs"), ("obs", "least_squares")],
          [("single", "global"), ("2:4", "global"), ("block:2x3", "layer"), ("single", "output")])),
]


def label(step: Weights) -> str:
    return f"{step.score} {step.pattern} {step.allocation} {step.compensate}"


@pytest.mark.parametrize("problem", [PROBLEMS[n] for n in ("grouped", "transposed", "attention")], ids=str)
@pytest.mark.parametrize("step", COMBINATIONS, ids=label)
def test_laws_of_every_choice(step: Weights, problem: Problem, tmp_path: Path) -> None:
    """The input unchanged, the same again, JSON and file, the pattern and the count exact, finite outputs."""
    net, work = network(problem), task(problem)
    before = digest(net)
    plan = step.plan(net, work)
    assert (digest(net), net._taps) == (before, {})
    small = plan.apply(net)
    assert digest(step.plan(net, work).apply(net)) == digest(small)
    plan.save(tmp_path / "plan")
    assert digest(Plan.load(tmp_path / "plan").apply(net)) == digest(small)
    pattern, calls = pattern_of(step.pattern), calls_of(net)
    units = 0
    for name, mine in calls.items():
        mask = as_matrix(mine[0], small.tensor(name).detach() != 0).flatten(0, 1)
        o, i = pattern.whole((mask.shape[0], mask.shape[1]))
        units += o * i
        assert mask[o:].all()
        assert mask[:, i:].all()
        if pattern.of:
            assert (mask[:, :i].unflatten(1, (-1, 4)).sum(-1) == 2).all()
        elif pattern.rows > 1:
            share = pattern.units(mask.double())
            assert ((share == 0) | (share == 1)).all()
        if step.allocation == "output":
            assert mask[:o, :i].sum(1).unique().numel() == 1
    zeros = sum(plan.zeros.values())
    assert zeros == sum(int((small.tensor(n) == 0).sum()) for n in calls)
    assert abs(zeros - units / 2) <= 3 * len(calls) * pattern.rows * pattern.columns * (
        24 if step.allocation == "output" else 1)
    assert all(bool(torch.isfinite(t).all()) for t in outputs(small))
    assert all((f"value.{n}" in plan.tensors) == (step.compensate != "none") for n in plan.zeros)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("problem", ["conv_bn", "residual"])
def test_what_stays_makes_up_for_what_goes(problem: str, pattern: str) -> None:
    """Output error on fresh data: SparseGPT's sweep beats zeroing by magnitude, and least squares a plain mask."""
    row = PROBLEMS[problem]
    net, work = network(row), task(row, batch=32)
    x = images(64, seed=99)
    with torch.no_grad():
        wanted = net(x)

    def apart(**options: str) -> float:
        step = Weights(None if ":" in pattern[:2] else 0.5, pattern=pattern, allocation="layer", **options)  # type: ignore[arg-type]
        with torch.no_grad():
            return float((step.plan(net, work).apply(net)(x) - wanted).square().mean())

    plain, swept = apart(), apart(score="obs", compensate="obs")
    assert swept < 0.6 * plain
    assert apart(compensate="least_squares") < 0.6 * plain
    assert apart(compensate="obs") < plain


def test_a_layer_is_solved_on_what_the_pruned_layers_before_it_give() -> None:
    problem = PROBLEMS["mlp"]
    net, work = network(problem), task(problem)
    small = Weights(0.5, compensate="least_squares").plan(net, work).apply(net)
    masks = Weights(0.5).plan(net, work).masks()
    by_hand = net.copy()
    for name in ("0.weight", "2.weight", "4.weight"):
        inputs, old = [], by_hand.tensor(name).detach().double()
        place = str(calls_of(by_hand)[name][0].args[0])
        with torch.no_grad(), by_hand.taps({place: inputs.append}):
            for x, _ in work.batches("calibration"):
                by_hand(x)
        x = torch.cat(inputs).double()
        by_hand.set_tensor(name, least_squares(old, x.T @ x, masks[name]).float())
    for name in masks:
        torch.testing.assert_close(small.tensor(name), by_hand.tensor(name), rtol=1e-3, atol=1e-4)


def test_masks_are_kept_by_name_under_every_tied_name() -> None:
    net = network(PROBLEMS["tied"])
    plan = Weights(sparsity=0.5).plan(net, NOTHING)
    small = plan.apply(net)
    assert small.tensor("embedding.weight") is small.tensor("output.weight")
    assert small.patterns == dict.fromkeys(["embedding.weight", "output.weight", "hidden.weight"], "single")
    assert not net.patterns


@pytest.mark.parametrize("name", ["residual", "shared", "tied"])
def test_batches_that_memory_does_not_hold_are_run_from_the_beginning(name: str,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    net, work = network(PROBLEMS[name]), task(PROBLEMS[name])
    step = Weights(0.5, compensate="obs")
    full = step.plan(net, work)
    monkeypatch.setattr("featherweight.calibrate.walk.BUDGET", 1)
    for key, value in step.plan(net, work).tensors.items():
        torch.testing.assert_close(value, full.tensors[key])


def test_a_weight_that_an_embedding_reads_too_is_masked_and_not_changed() -> None:
    net = network(PROBLEMS["tied"])
    plan = Weights(0.5, compensate="obs").plan(net, task(PROBLEMS["tied"]))
    values = {n for n in plan.tensors if n.startswith("value.")}
    assert values == {"value.hidden.weight"}
    assert any("not only convolutions" in s.reason for s in plan.skipped)


def test_what_is_zero_already_goes_first_whatever_the_score() -> None:
    net = network(PROBLEMS["mlp"])
    half = Weights(0.5).plan(net, NOTHING).apply(net)
    more = Weights(0.6, score="random", seed=3).plan(half, NOTHING).apply(half)
    zeros = [sum(int((n.tensor(k) == 0).sum()) for k in calls_of(n)) for n in (half, more)]
    assert zeros == [round(0.5 * 1272), round(0.6 * 1272)]


def test_ignored_weights_stay_and_are_named() -> None:
    net = network(PROBLEMS["mlp"])
    plan = Weights(sparsity=0.5, ignore=("4", "nowhere")).plan(net, NOTHING)
    assert set(plan.zeros) == {"0.weight", "2.weight"}
    assert Skipped("4.weight", "named in ignore='4'") in plan.skipped
    assert Skipped("nowhere", "this pattern of ignore matched no layer") in plan.skipped


def test_ends_that_fill_no_group_are_named() -> None:
    net = network(PROBLEMS["mlp"])
    reasons = {s.path: s.reason for s in Weights(pattern="7:9").plan(net, NOTHING).skipped}
    assert reasons["0.weight"] == "the last 3 of its 12 columns fill no unit of the pattern 7:9 and stay"
    big = {s.path: s.reason for s in Weights(0.5, pattern="block:64x1").plan(net, NOTHING).skipped}
    assert big["0.weight"] == "its matrix [32, 12] holds no whole unit of the pattern block:64x1"


def test_mask_that_does_not_fit_is_refused() -> None:
    plan = Weights(sparsity=0.5).plan(network(PROBLEMS["mlp"]), NOTHING)
    with pytest.raises(PlanError, match="has shape"):
        plan.apply(fw.capture(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), torch.randn(2, 12)))
    with pytest.raises(PlanError, match="has no mask for"):
        Plan.from_json(plan.to_json()).apply(network(PROBLEMS["mlp"]))


@pytest.mark.parametrize(("step", "message"), [
    (Weights(sparsity=1.0), r"as in Weights\(sparsity=0.8\)"),
    (Weights(allocation="all"), "no allocation 'all'"),
    (Weights(score="magnitud"), "did you mean 'magnitude'"),
    (Weights(pattern="4:2"), 'no pattern \'4:2\'; expected "single"'),
    (Weights(pattern="block:0x2"), "no pattern 'block:0x2'"),
    (Weights(0.8, pattern="2:4"), r"which has sparsity 0.5; write Weights\(pattern='2:4'\)"),
    (Weights(compensate="ols"), "did you mean 'obs'"),
    (Weights(schedule="linear"), "no schedule 'linear'"),
    (Weights(regrow="rigl"), "no regrow 'rigl'"),
    (Weights(regrow="surgery", score="wanda"), "says nothing about weights that are masked"),
    (Weights(begin=0.5, end=0.5), "0 <= begin < end <= 1"),
])
def test_senseless_options_are_answered_with_the_line_to_write(step: Weights, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        step.plan(network(PROBLEMS["mlp"]), NOTHING)


def test_scores_and_compensation_ask_for_the_data_they_read() -> None:
    net = network(PROBLEMS["mlp"])
    for step in (Weights(score="wanda"), Weights(score="fisher"), Weights(score="obs"), Weights(compensate="obs")):
        with pytest.raises(TaskError, match="calibration"):
            step.plan(net, NOTHING)
    with pytest.raises(RecipeError, match="works at once"):
        Weights(compensate="obs").start(net, NOTHING)


# ---- in a training

def test_schedules() -> None:
    """Zhu & Gupta 2017, eq. 1, from 0 to 0.8 between 0.2 and 0.6; equal shares of what is left; all at once."""
    assert cubic(0.1, 0.2, 0.6, 0.8) == 0
    assert cubic(0.4, 0.2, 0.6, 0.8) == pytest.approx(0.8 * (1 - 0.5 ** 3))
    assert all(curve(t, 0.2, 0.6, 0.8) == pytest.approx(0.8) for curve in CURVES.values() for t in (0.6, 1.0))
    left = [1 - CURVES["iterative"](t, 0.2, 0.6, 0.8) for t in (0.2, 0.3, 0.4, 0.5, 0.6)]
    assert {round(b / a, 6) for a, b in itertools.pairwise(left)} == {round(0.2 ** 0.25, 6)}
    assert [CURVES["constant"](t, 0.2, 0.6, 0.8) for t in (0.19, 0.2)] == [0, 0.8]


def train(net: fw.Network, driver: Companion, start: int, stop: int, steps: int = 40, lr: float = 0.05) -> None:
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=lr)
    generator = torch.Generator().manual_seed(start)
    for i in range(start, stop):
        driver.update(i / steps)
        x = torch.randn(16, 12, generator=generator)
        loss = F.mse_loss(first_tensor(net(x)), x[:, :5])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def share(driver: Any) -> float:
    return zeros_in(driver.masks) / sum(m.numel() for m in driver.masks.values())


@pytest.mark.parametrize("options", [
    {}, {"schedule": "iterative"}, {"schedule": "constant", "begin": 0.2}, {"pattern": "2:8"}, {"score": "random"},
    {"pattern": "block:2x3", "allocation": "layer"}, {"score": "wanda", "allocation": "output", "frequency": 0.1},
    {"score": "taylor", "frequency": 0.1}], ids=str)
def test_masks_grow_while_training_and_the_plan_makes_them_last(options: dict[str, Any]) -> None:
    net = network(PROBLEMS["mlp"]).train()
    step = Weights(None if options.get("pattern") == "2:8" else 0.75, **{"end": 0.5, **options})
    driver = step.start(net, task(PROBLEMS["mlp"]))
    shares, masks = [], []
    for i in range(0, 40, 4):
        train(net, driver, i, i + 4)
        shares.append(share(driver))
        masks.append({n: m.clone() for n, m in driver.masks.items()})
    assert shares == sorted(shares)
    if not options:
        assert shares[0] == pytest.approx(cubic(3 / 40, 0, 0.5, 0.75), abs=0.02)
        assert shares[-1] == pytest.approx(0.75, abs=1e-3)
    for earlier, later in itertools.pairwise(masks):
        assert all(not (later[n] & ~earlier[n]).any() for n in later), "a masked weight came back"
    net.eval()
    x = torch.randn(4, 12)
    seen = net(x)
    plan = driver.finish()
    assert isinstance(plan, WeightPlan)
    assert not torch.allclose(net(x), seen), "the taps are off"
    torch.testing.assert_close(plan.apply(net)(x), seen)
    assert zeros_in(plan.masks()) == pytest.approx(0.75 * 1272, abs=100 if options else 0)


def test_weights_come_back_by_surgery_and_settle() -> None:
    net = network(PROBLEMS["mlp"]).train()
    driver = Weights(0.75, regrow="surgery", end=0.4, frequency=0.025).start(net, NOTHING)
    returned, last = {True: 0, False: 0}, dict(driver.masks)
    for i in range(40):
        train(net, driver, i, i + 1, lr=0.6)
        returned[i / 40 <= 0.7] += sum(int((m & ~last[n]).sum()) for n, m in driver.masks.items())
        last = dict(driver.masks)
        assert share(driver) == pytest.approx(cubic(min(i / 40, 0.4), 0, 0.4, 0.75), abs=1e-3)
    assert returned[True] > 10
    assert returned[False] == 0, "after (end + 1) / 2 masks stay"
    assert zeros_in(driver.finish().masks()) == round(0.75 * 1272)  # type: ignore[attr-defined]


def test_masked_weights_get_the_gradient_of_what_the_graph_read() -> None:
    net = network(PROBLEMS["mlp"]).train()
    driver = Weights(0.5, regrow="surgery", schedule="constant").start(net, NOTHING)
    driver.update(0.0)
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    net(x).square().mean().backward()
    pruned = driver.finish().apply(net).train()
    pruned(x).square().mean().backward()
    for name in ("0.weight", "2.weight", "4.weight"):
        torch.testing.assert_close(net.tensor(name).grad, pruned.tensor(name).grad)
        assert (net.tensor(name) != 0).all(), "the dense weight is still there"


def test_two_thresholds() -> None:
    """A kept weight a little below a masked one stays; one far below it goes (Guo et al. 2016, eq. 3)."""
    net = fw.capture(nn.Linear(4, 1, bias=False).eval(), torch.randn(2, 4))
    net.set_tensor("weight", torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    driver = Weights(0.5, regrow="surgery", schedule="constant", frequency=0.1).start(net, NOTHING)
    driver.update(0.0)
    assert driver.masks["weight"].tolist() == [[True, True, False, False]]
    net.set_tensor("weight", torch.tensor([[4.0, 3.0, 3.0 * MARGIN - 0.01, 1.0]]))
    driver.update(0.2)
    assert driver.masks["weight"].tolist() == [[True, True, False, False]]
    net.set_tensor("weight", torch.tensor([[4.0, 3.0, 3.0 * MARGIN + 0.01, 1.0]]))
    driver.update(0.4)
    assert driver.masks["weight"].tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("options", [{"allocation": "layer"}, {"regrow": "surgery"}, {"schedule": "iterative"}],
                         ids=str)
def test_a_resumed_driver_goes_on_alike(options: dict[str, Any]) -> None:
    """Stopped in the middle and taken up by another driver on a copy: the same weights at the end."""
    step = Weights(sparsity=0.75, **options)
    whole = network(PROBLEMS["mlp"]).train()
    driver = step.start(whole, NOTHING)
    train(whole, driver, 0, 20)
    copied = whole.copy().train()
    other = step.start(copied, NOTHING)
    other.restore(driver.state())
    train(whole, driver, 20, 40)
    train(copied, other, 20, 40)
    assert driver.finish() == other.finish()
    assert digest(whole) == digest(copied)


@pytest.mark.parametrize("regrow", ["none", "surgery"])
def test_a_killed_training_ends_where_it_would_have(regrow: str, tmp_path: Path) -> None:
    problem = PROBLEMS["conv_bn"]
    net, work = network(problem), task(problem)
    step = fw.recover.Train(epochs=4, lr=0.05, during=(Weights(0.7, regrow=regrow, end=0.6),))

    class Killed(Exception):
        pass

    def kill(what: str, done: float, total: float, figures: Any) -> None:
        if done == 8:
            raise Killed("at step 8")

    with pytest.raises(Killed, match="at step 8"):
        step.fit(net, work, Context(workdir=tmp_path, progress=kill))
    resumed = step.fit(net, work, Context(workdir=tmp_path))
    assert digest(resumed) == digest(step.fit(net, work, Context()))
    assert sum(int((resumed.tensor(n) == 0).sum()) for n in calls_of(net)) == round(
        0.7 * sum(net.tensor(n).numel() for n in calls_of(net)))


def test_training_that_stopped_early_still_gives_the_sparsity_asked_for() -> None:
    net = network(PROBLEMS["mlp"])
    driver = Weights(sparsity=0.6, end=1.0).start(net, NOTHING)
    driver.update(0.3)
    assert zeros_in(driver.finish().masks()) == round(0.6 * 1272)  # type: ignore[attr-defined]
