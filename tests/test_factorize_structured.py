"""Structured matrices: each is the nearest of its kind, its graph is its matrix, and both runtimes take it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
from featherweight.errors import PlanError, RecipeError
from featherweight.factorize import Structured
from featherweight.factorize.structured import FORMS, nearest
from featherweight.numerics.factors import structured as matrices
from featherweight.task import Task
from problems import agrees_in_runtimes

torch.set_num_threads(1)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_matrix_of_the_kind_is_itself() -> None:
    of_kind = {"monarch": matrices.of_monarch(randn(16, 5), randn(24, 4, seed=1)),
               "kronecker": matrices.of_kronecker(randn(2, 4, 4), randn(2, 6, 5, seed=1)),
               "circulant": matrices.of_circulant(randn(6, 5, 4)),
               "displaced": matrices.of_displaced(randn(6, 5, 2, 4), randn(6, 5, 2, 4, seed=1))}
    for form, matrix in of_kind.items():
        assert matrix.shape == (24, 20)
        torch.testing.assert_close(nearest(form, matrix, 4, 2), matrix, rtol=1e-5, atol=1e-6)
    plain = randn(24, 2) @ randn(2, 20, seed=1)
    plain[3, 4] += 9.0
    torch.testing.assert_close(nearest("sparse", plain, 4, 2, 1 / 480), plain, rtol=1e-3, atol=1e-3)


def test_matrices_are_what_their_names_say() -> None:
    torch.testing.assert_close(matrices.of_kronecker(randn(1, 3, 2), randn(1, 4, 5, seed=1)),
                               torch.kron(randn(1, 3, 2)[0], randn(1, 4, 5, seed=1)[0]))
    column = randn(1, 1, 5)
    turned = torch.stack([column[0, 0].roll(n) for n in range(5)], 1)
    torch.testing.assert_close(matrices.of_circulant(column), turned)
    right, left, x = randn(9, 4), randn(6, 3, seed=1), randn(12, seed=2)
    blocks = torch.block_diag(*right.view(3, 3, 4))
    mixed = (blocks @ x).view(3, 3).t().reshape(-1)
    torch.testing.assert_close(matrices.of_monarch(right, left) @ x, torch.block_diag(*left.view(3, 2, 3)) @ mixed)


def test_a_product_of_circulant_and_skew_circulant_is_what_its_columns_say() -> None:
    g, h = randn(5), randn(5, seed=1)
    left = torch.tensor([[float(g[(i - j) % 5]) for j in range(5)] for i in range(5)]).double()
    right = torch.tensor([[float(h[(i - j) % 5]) * (1 if i >= j else -1) for j in range(5)] for i in range(5)]).double()
    torch.testing.assert_close(matrices.of_displaced(g.view(1, 1, 1, 5), h.view(1, 1, 1, 5)), left @ right,
                               rtol=1e-6, atol=1e-6)
    toeplitz = randn(9)[torch.arange(5)[:, None] - torch.arange(5) + 4]
    torch.testing.assert_close(nearest("displaced", toeplitz, 5, 2), toeplitz, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_fourier_matrices_transform_and_come_back(size: int) -> None:
    there, back = matrices.fourier(size)
    x = randn(size)
    wanted = torch.view_as_real(torch.fft.rfft(x)).flatten()
    torch.testing.assert_close(there @ x, wanted)
    torch.testing.assert_close(back @ wanted, x)


def test_each_turn_of_low_displacement_is_the_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the equations of all numbers at once, without Fourier transforms; the first turn begins where none was."""
    matrix = randn(6, 6)
    monkeypatch.setattr(matrices, "TURNS", 0)
    _, h = matrices.displaced(matrix, 6, 2)
    for _ in range(2):
        units = torch.eye(12).double().view(12, 1, 1, 2, 6)
        columns = torch.stack([matrices.of_displaced(u, h).flatten() for u in units], 1)
        g = torch.linalg.lstsq(columns, matrix.flatten()[:, None]).solution.view(1, 1, 2, 6)
        columns = torch.stack([matrices.of_displaced(g, u).flatten() for u in units], 1)
        h = torch.linalg.lstsq(columns, matrix.flatten()[:, None]).solution.view(1, 1, 2, 6)
    monkeypatch.setattr(matrices, "TURNS", 2)
    torch.testing.assert_close(matrices.of_displaced(*matrices.displaced(matrix, 6, 2)), matrices.of_displaced(g, h),
                               rtol=1e-5, atol=1e-6)


def test_low_rank_and_sparse_takes_turns_that_only_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, lost, rest = randn(12, 10), [], np.zeros((12, 10))
    for turn in range(1, 5):
        monkeypatch.setattr(matrices, "TURNS", turn)
        made = nearest("sparse", matrix, 4, 3, 0.1)
        u, s, v = np.linalg.svd(matrix.numpy() - rest)
        low = u[:, :3] * s[:3] @ v[:3]
        rest = matrix.numpy() - low
        bound = sorted(np.abs(rest).flatten())[-12]
        rest = np.where(np.abs(rest) >= bound, rest, 0)
        np.testing.assert_allclose(made, low + rest, rtol=1e-5, atol=1e-6)
        lost.append(float((made - matrix).square().sum()))
    u, s, v = torch.linalg.svd(matrix)
    assert float(s[3:].square().sum()) > lost[0] > lost[1] > lost[2] > lost[3]


@pytest.mark.parametrize("form", FORMS)
def test_data_brings_outputs_nearer(form: str) -> None:
    torch.manual_seed(0)
    net = fw.capture(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval(), torch.randn(2, 64))
    mix = randn(64, 64, seed=3).float() / 8
    data = [(1 + torch.randn(64, 64) @ mix, torch.zeros(64)) for _ in range(4)]
    task, errors = Task(calibration=data), {}
    for given in (False, True):
        plan = Structured(form, blocks=8, terms=1, data=given).plan(net, task)
        assert len(plan.layers) == 2
        small = plan.apply(net)
        x = torch.cat([x for x, _ in data])
        errors[given] = float((small(x) - net(x)).detach().square().sum())
    assert errors[True] < 0.8 * errors[False]
    assert all(0 < layer.error < 1 for layer in plan.layers)


@pytest.mark.parametrize("form", ["monarch", "kronecker", "circulant"])
def test_no_other_of_the_kind_is_nearer(form: str) -> None:
    """Gradient descent on the stored numbers, from the projection and from elsewhere, finds nothing nearer."""
    matrix = randn(8, 12)
    best = float((nearest(form, matrix, 4, 2) - matrix).square().sum())
    make = getattr(matrices, f"of_{form}")
    sizes = {"monarch": [(16, 3), (8, 4)], "kronecker": [(2, 4, 4), (2, 2, 3)], "circulant": [(2, 3, 4)]}[form]
    for seed in range(3):
        given = [(0.3 * randn(*size, seed=seed)).requires_grad_() for size in sizes]
        optimizer = torch.optim.Adam(given, lr=0.05)
        for _ in range(150):
            optimizer.zero_grad()
            loss = (make(*given) - matrix).square().sum()
            loss.backward()
            optimizer.step()
        assert float(loss.detach()) >= best - 1e-6


def test_inputs_that_are_looked_at_lower_the_error_of_each_block() -> None:
    matrix, x = randn(8, 12), randn(100, 12, seed=1) @ randn(12, 12, seed=2)
    plain = matrices.of_monarch(*matrices.monarch(matrix, 4))
    aware = matrices.of_monarch(*matrices.monarch(matrix, 4, x.T @ x))
    lost = [sum(float(((m - matrix)[s * 2:s * 2 + 2, k * 3:k * 3 + 3] @ x.T[k * 3:k * 3 + 3]).square().sum())
                for s in range(4) for k in range(4)) for m in (aware, plain)]
    assert lost[0] < lost[1]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.point = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 1, stride=2)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.point(torch.relu(self.first(x)))).flatten(2).transpose(1, 2)
        return self.down(torch.relu(self.up(x)))


def images(count: int) -> Tensor:
    return randn(count, 3, 12, 12, seed=count).float()


@pytest.fixture(scope="module")
def network() -> fw.Network:
    torch.manual_seed(0)
    return fw.capture(Net().eval(), images(2))  # type: ignore[return-value]


@pytest.mark.parametrize("form", [pytest.param(form, marks=[pytest.mark.slow] * (form not in ("monarch", "circulant")))
                                  for form in FORMS])
def test_the_graph_computes_with_the_matrix_and_both_runtimes_take_it(network: fw.Network, form: str,
                                                                     tmp_path: Path) -> None:
    blocks, terms = (8, 1) if form in ("displaced", "fourier") else (4, 2)
    plan = Structured(form, blocks=blocks, terms=terms).plan(network, Task())
    small, slow = plan.apply(network), network.copy()
    assert plan.layers
    for layer in plan.layers:
        weight = network.tensor(layer.weight).detach()
        slow.set_tensor(layer.weight, nearest(form, weight.flatten(1), blocks, layer.terms).reshape(weight.shape))
        lost = (slow.tensor(layer.weight) - weight).detach().square().sum() / weight.square().sum()
        assert layer.error == pytest.approx(float(lost), rel=1e-3)
    torch.testing.assert_close(small(images(5)), slow(images(5)), rtol=1e-4, atol=1e-5)
    assert fw.measure.params(small) < fw.measure.params(network)
    agrees_in_runtimes(small, images(1), tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_forms_train_where_products_are_in_bfloat16(network: fw.Network, form: str) -> None:
    small = Structured(form, blocks=8, terms=1).plan(network, Task()).apply(network)
    with torch.autocast("cpu", torch.bfloat16):
        small(images(2)).float().square().sum().backward()
    grads = [p.grad for p in small.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() and g.abs().max() > 0 for g in grads)


def test_what_stays_is_named_and_what_is_wrong_refused(network: fw.Network) -> None:
    skipped = {s.path: s.reason for s in Structured("kronecker", blocks=3).plan(network, Task()).skipped}
    assert skipped["first.weight"] == "neither a linear layer nor a 1 x 1 convolution"
    assert skipped["up.weight"] == "blocks=3 does not divide its widths [64, 32]"
    for step, message in ((Structured("toeplitz"), "expected one of 'monarch'"), (Structured(blocks=0), "blocks=0")):
        with pytest.raises(RecipeError, match=message):
            step.check()
    plan = Structured().plan(network, Task())
    with pytest.raises(PlanError, match="which no linear or convolution call here reads"):
        plan.apply(plan.apply(network))
