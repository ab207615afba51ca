"""Matrices that no linear call reads: sparse and stored in few bits like any, in memory, in files and in runtimes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight as fw
from featherweight import deploy
from featherweight.network import Network
from featherweight.prune import Weights
from featherweight.quantize import Quantize, QuantizePlan

torch.set_num_threads(1)


class Product(nn.Module):
    """``call(x, *matrices)`` between two linear layers of eight numbers."""

    def __init__(self, call: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.call = call
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.matrices = nn.ParameterList(nn.Parameter(torch.randn(shape) / 3) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.call(torch.tanh(self.first(x)), *self.matrices))


class Cells(nn.Module):
    def __init__(self, cell: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cell, self.last = cell(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = given = x.new_zeros(x.shape[0], 16)
        memory = state
        for step in range(3):
            given = self.cell(x[:, step], (state, memory) if isinstance(self.cell, nn.LSTMCell) else state)
            state, memory = given if isinstance(given, tuple) else (given, memory)
        return self.last(state)


class Layer(nn.Module):
    def __init__(self, layer: nn.RNNBase, width: int) -> None:
        super().__init__()
        self.words, self.layer, self.last = nn.Embedding(20, 8), layer, nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(self.words(x))[0])


class TiedLayer(nn.Module):
    """A language model: the table of words is the last layer's matrix too."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(40, 16), nn.LSTM(16, 16, batch_first=True)
        self.last = nn.Linear(16, 40, bias=False)
        self.last.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(self.words(x))[0])


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.last = nn.EmbeddingBag(20, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.bag(x))


def chosen(x: Tensor, matrices: Tensor) -> Tensor:
    """Every sample has one expert's matrix, by number."""
    return torch.bmm(x, matrices[x.sum((1, 2)).abs().mul(7).long() % 3])


def words(batch: int = 2) -> Tensor:
    return torch.randint(20, (batch, 5), generator=torch.Generator().manual_seed(1))


def rows(batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, 8, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    inputs: Callable[..., Tensor] = rows


def product(call: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Case:
    return Case(lambda: Product(call, *shapes))


CASES: dict[str, Case] = {
    "lstm cell": Case(lambda: Cells(nn.LSTMCell)), "gru cell": Case(lambda: Cells(nn.GRUCell)),
    "rnn cell": Case(lambda: Cells(nn.RNNCell)), "relu cell": Case(lambda: Cells(
        lambda i, o: nn.RNNCell(i, o, bias=False, nonlinearity="relu"))),
    "lstm": Case(lambda: Layer(nn.LSTM(8, 12, 2, batch_first=True), 12), words),
    "projected lstm": Case(lambda: Layer(nn.LSTM(8, 12, proj_size=6, batch_first=True), 6), words),
    "gru, both ways": Case(lambda: Layer(nn.GRU(8, 12, batch_first=True, bidirectional=True), 24), words),
    "tied table": Case(TiedLayer, words), "bag of words": Case(Bag, words),
    "matrix on the left": product(lambda x, w: (w @ x.transpose(1, 2)).transpose(1, 2), (8, 8)),
    "einsum": product(lambda x, w: torch.einsum("oi,bni->bno", w, x), (8, 8)),
    "einsum over tokens": product(lambda x, w: torch.einsum("mn,bnd->bmd", w, x), (4, 4)),
    "stacked experts": product(lambda x, w, u: torch.einsum("ebnh,ehd->bnd", F.relu(
        torch.einsum("bnd,edh->ebnh", x, w)), u), (3, 8, 16), (3, 16, 8)),
    "experts by number": product(chosen, (3, 8, 8)),
    "bmm": product(lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1), (4, 8, 8)),
    "baddbmm": product(lambda x, w, b: torch.baddbmm(b, x.transpose(0, 1), w).transpose(0, 1), (4, 8, 8), (4, 1, 1)),
    "matrix times vector": product(lambda x, w, v: x * torch.mv(w, v), (8, 8), (8,)),
    "bilinear": product(lambda x, w: F.bilinear(x, x, w), (8, 8, 8)),
}


def captured(name: str) -> Network:
    torch.manual_seed(0)
    found = fw.capture(CASES[name].build().eval(), CASES[name].inputs(), parts=False)
    assert isinstance(found, Network)
    return found


def task(name: str) -> fw.Task:
    return fw.Task(calibration=[(CASES[name].inputs(4), None)])


def matrices(network: Network) -> dict[str, Tensor]:
    """Every parameter with two axes of more than one."""
    return {n: p for n, p in network.named_parameters() if sum(s > 1 for s in p.shape) > 1}


def read_back(plan: QuantizePlan, network: Network) -> dict[str, Tensor]:
    """What a plan makes of every weight: numbers times the scales of their rows."""
    found: dict[str, Tensor] = {}
    for stored in plan.stored:
        weight, scale = network.tensor(stored.weight).detach(), plan.tensors[f"{stored.weight}_scale"]
        if stored.group is not None:
            rows = weight.reshape(-1, stored.group)
            found[stored.weight] = ((rows / scale[:, None]).round() * scale[:, None]).view(weight.shape)
        else:
            assert stored.axis == 0
            spread = scale.view(-1, *[1] * (weight.dim() - 1))
            found[stored.weight] = (weight / spread).round() * spread
    return found


@pytest.mark.parametrize("name", CASES)
def test_half_of_all_weights_go(name: str) -> None:
    network = captured(name)
    plan = Weights(sparsity=0.5, allocation="layer").plan(network, fw.Task())
    sparse = plan.apply(network)
    for matrix in matrices(network):
        share = float((sparse.tensor(matrix) == 0).float().mean())
        assert share == pytest.approx(0.5, abs=0.02), matrix
    assert not any(s.path in matrices(network) for s in plan.skipped)


@pytest.mark.parametrize("name", CASES)
def test_every_matrix_is_stored_in_eight_bits_by_row(name: str, tmp_path: Any) -> None:
    network, x = captured(name), CASES[name].inputs(3)
    plan = Quantize(activations=None).plan(network, task(name))
    stored = plan.apply(network)
    for matrix in matrices(network):
        assert stored.tensor(matrix).dtype == torch.int8, matrix
    slow = network.copy()
    for weight, value in read_back(plan, network).items():
        slow.set_tensor(weight, value)
    with torch.no_grad():
        torch.testing.assert_close(stored(x), slow(x), rtol=1e-4, atol=1e-5)
        stored.save(tmp_path / "n.fw")
        assert torch.equal(fw.load(tmp_path / "n.fw")(x), stored(x))


FILES = [("tied table", "onnxruntime"), ("lstm cell", "openvino")]
MORE = [("tied table", "openvino"), ("stacked experts", "onnxruntime"), ("stacked experts", "openvino"),
        ("lstm cell", "onnxruntime")]


@pytest.mark.parametrize(("name", "target"), [*FILES, *(pytest.param(*m, marks=pytest.mark.slow) for m in MORE)])
def test_files_hold_every_matrix_once_in_eight_bits(name: str, target: str, tmp_path: Any) -> None:
    network, x = captured(name), CASES[name].inputs(3)
    stored = Quantize(activations="dynamic").plan(network, task(name)).apply(network)
    runtime = deploy.target(target)
    path = tmp_path / f"n{runtime.suffix}"
    runtime.export(stored, path)
    runner = runtime.load(path, like=stored.signature)
    found = deploy.verify(stored, runner, (x,), {})
    runner.close()
    assert found.ok, found
    weights = path if target == "onnxruntime" else path.with_suffix(".bin")
    kept = weights.read_bytes()
    for matrix in matrices(network):
        numbers = stored.tensor(matrix)
        whole = numbers.flatten(0, -2)
        forms = {rows.contiguous().numpy().tobytes() for rows in (whole, whole.t())}
        assert sum(kept.count(form) for form in forms) == 1, matrix


def test_scores_of_what_layers_are_given_leave_all_others_alone_by_name() -> None:
    network = captured("lstm")
    plan = Weights(0.5, score="wanda").plan(network, task("lstm"))
    assert set(plan.zeros) == {"last.weight"}
    assert {"words.weight", "layer.weight_ih_l0", "layer.weight_hh_l1"} <= {s.path for s in plan.skipped}
    pattern = Weights(pattern="2:4").plan(network, fw.Task())
    assert "words.weight" not in pattern.zeros
    assert "layer.weight_hh_l0" in pattern.zeros


@pytest.mark.parametrize("name", ["lstm cell", "gru cell", "rnn cell", "relu cell"])
def test_cells_give_what_the_modules_give(name: str) -> None:
    torch.manual_seed(0)
    model = CASES[name].build().eval()
    network = fw.capture(model, rows(), parts=False)
    assert not any("cell" in str(n.target) for n in network.calls())
    x = rows(3)
    torch.testing.assert_close(network(x), model(x))
    grown = [torch.autograd.grad(net(x).square().sum(), tuple(net.parameters())) for net in (model, network)]
    names = [dict(net.named_parameters()).keys() for net in (model, network)]
    one, two = (dict(zip(n, g, strict=True)) for n, g in zip(names, grown, strict=True))
    for key, gradient in one.items():
        torch.testing.assert_close(two[key], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("turned", [False, True])
def test_grouped_products_of_another_package_are_captured_as_products(turned: bool, tmp_path: Any) -> None:
    """Rows in groups, of which one is empty; what lies behind the last group gives zero."""
    pytest.importorskip("transformers.integrations.moe")

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrices = nn.Parameter(torch.randn(3, 6, 8) if turned else torch.randn(3, 8, 6))

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            weight = self.matrices.transpose(-2, -1) if turned else self.matrices
            return torch.ops.transformers.grouped_mm_fallback(x, weight, offs=ends)

    torch.manual_seed(0)
    model, x, ends = Experts().eval(), torch.randn(7, 8), torch.tensor([2, 2, 6], dtype=torch.int32)
    network = fw.capture(model, (x, ends), dynamic={}, parts=False)
    torch.testing.assert_close(network(x, ends), model(x, ends))
    other = torch.tensor([0, 5, 7], dtype=torch.int32)
    torch.testing.assert_close(network(x, other), model(x, other))
    stored = Quantize(activations=None).plan(network, fw.Task()).apply(network)
    assert stored.tensor("matrices").dtype == torch.int8
    stored.save(tmp_path / "n.fw")
    assert torch.equal(fw.load(tmp_path / "n.fw")(x, ends), stored(x, ends))
