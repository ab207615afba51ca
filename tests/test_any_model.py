"""Kinds of models that once went wrong: each a row, with what is right of it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight as fw
from featherweight import deploy, measure
from featherweight.errors import CaptureError
from featherweight.network import Assembly, Network
from problems import unsettle


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = build()
    unsettle(model)
    return model.eval()


# ---- sizes that depend on the data
class Masked(nn.Module):
    """Rows that a mask takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.third(F.relu(self.second(x[x[:, 0] > 0])))


class Nonzero(Masked):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.third(F.relu(self.second(x))).index_select(0, torch.nonzero(x[:, 0] > 0).squeeze(1))


class Selected(Masked):
    def forward(self, x: Tensor) -> Tensor:
        x = self.third(F.relu(self.second(self.first(x))))
        return torch.masked_select(x, x > 0)


class Experts(nn.Module):
    """Each row goes to the expert that scores it best."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(8, 3), nn.Linear(8, 4)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        best, sums = self.router(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (best == i).nonzero().squeeze(1)
            sums = sums.index_add(0, rows, expert(x[rows]))
        return self.head(sums)


STEPS = {
    "channels": fw.prune.Channels(ratio=0.5), "weights": fw.prune.Weights(sparsity=0.5),
    "depth": fw.prune.Layers(count=1), "low rank": fw.factorize.LowRank(energy=0.8),
    "int8": fw.quantize.Quantize(), "codebook": fw.share.Codebook(bits=4),
}


@pytest.mark.parametrize("model", [Masked, Nonzero, Selected, Experts])
def test_every_step_takes_sizes_that_depend_on_the_data(model: type[nn.Module]) -> None:
    network = fw.capture(made(model), torch.randn(6, 8))
    batches = [(torch.randn(6, 8), torch.zeros(6, dtype=torch.int64))] * 2
    task = fw.Task(calibration=batches, train=batches, loss=lambda output, target: output.square().sum())
    assert not measure.macs(network).uncounted
    x = torch.randn(5, 8)
    for step in STEPS.values():
        plan = step.plan(network, task)
        small = plan.apply(network)
        assert small(x).isfinite().all()
    plan = fw.prune.Channels(ratio=0.5).plan(network, task)
    assert plan.macs_after == measure.macs(plan.apply(network)).total < measure.macs(network).total
    frozen = {Selected: "third", Experts: "router"}.get(model, "first")
    assert frozen in {skipped.path for skipped in plan.skipped}
    assert torch.allclose(plan.zero(network)(x), plan.apply(network)(x), atol=1e-5)


# ---- recurrent layers
class Recurrent(nn.Module):
    def __init__(self, layer: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.layer = layer(4, 6, **options)
        self.head = nn.Linear(6 * (1 + options.get("bidirectional", False)), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])


@pytest.mark.parametrize(("layer", "options"), [
    (nn.LSTM, {"num_layers": 2, "bidirectional": True}), (nn.RNN, {"num_layers": 2}),
    pytest.param(nn.GRU, {"num_layers": 2}, marks=pytest.mark.slow),
    pytest.param(nn.RNN, {"nonlinearity": "relu", "bias": False, "bidirectional": True}, marks=pytest.mark.slow),
])
def test_recurrent_layers_take_any_length_and_are_traced_in_one_step(layer: type[nn.RNNBase], options: dict[str, Any],
                                                                     tmp_path) -> None:
    model = made(lambda: Recurrent(layer, batch_first=True, **options))
    network = fw.capture(model, torch.randn(2, 300, 4))  # step by step this takes a minute
    assert network.signature.inputs[0].shape == (None, None, 4)
    short = fw.capture(model, torch.randn(2, 5, 4))
    assert [n.target for n in short.calls()] == [n.target for n in network.calls()]
    network.save(tmp_path / "network.fw")
    assert torch.equal(fw.load(tmp_path / "network.fw")(torch.ones(1, 7, 4)), network(torch.ones(1, 7, 4)))
    target = deploy.target("onnxruntime")
    target.export(network, tmp_path / "model.onnx")
    runner = target.load(tmp_path / "model.onnx", like=network.signature)
    for length in (5, 40):
        x = torch.randn(3, length, 4)
        assert torch.allclose(network(x), model(x), atol=1e-6)
        assert deploy.verify(network, runner, (x,)).ok


class Projected(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = nn.LSTM(4, 6, proj_size=3, **options)

    def forward(self, x: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
        given, (hidden, memory) = self.layer(x, (hidden, memory))
        return given, hidden, memory


@pytest.mark.parametrize(("target", "form", "options"), [
    ("onnxruntime", "int8", {"num_layers": 2, "bidirectional": True}), ("openvino", "int8", {"bias": False}),
    *(pytest.param(*row, marks=pytest.mark.slow) for row in [
        ("onnxruntime", "float", {"bias": False}), ("openvino", "float", {"num_layers": 2, "bidirectional": True})])])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_projections_of_memories_are_written_out_for_runtimes(target: str, form: str, options: dict[str, Any],
                                                              tmp_path) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    model = made(lambda: Projected(**options))
    both = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    x = torch.randn(5, 2, 4), torch.randn(both, 2, 3), torch.randn(both, 2, 6)
    network = fw.capture(model, x, dynamic={})
    if form == "int8":
        network = fw.quantize.Quantize(activations=None).plan(network, fw.Task()).apply(network)
    runtime = deploy.target(target)
    path = tmp_path / f"model{runtime.suffix}"
    runtime.export(network, path)
    found = deploy.verify(network, runtime.load(path, like=network.signature), x)
    assert found.max_rel < 1e-5, found


# ---- weights read along different axes
class Turned(nn.Module):
    """A weight that reads, and writes as its transpose."""

    def __init__(self, convolution: bool) -> None:
        super().__init__()
        self.convolution = convolution
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3) if convolution else torch.randn(8, 12))
        self.first = nn.Conv2d(3, 3, 1) if convolution else nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.convolution:
            return F.conv_transpose2d(F.relu(F.conv2d(x, self.weight)), self.weight)
        return F.linear(F.relu(F.linear(x, self.weight)), self.weight.t())

    def meets(self, x: Tensor) -> Tensor:
        """The sum of the squares of all that each number of the weight is multiplied with, by autograd."""
        weight = torch.ones_like(self.weight, requires_grad=True)
        first = self.first(x)
        if self.convolution:
            hidden = F.relu(F.conv2d(first, self.weight))
            total = F.conv2d(first.square(), weight).sum() + F.conv_transpose2d(hidden.square(), weight).sum()
        else:
            hidden = F.relu(F.linear(first, self.weight))
            total = F.linear(first.square(), weight).sum() + F.linear(hidden.square(), weight.t()).sum()
        return torch.autograd.grad(total, weight)[0]


READERS = {
    "obs": fw.prune.Weights(0.5, score="obs", compensate="obs"),
    "least squares": fw.prune.Weights(0.5, compensate="least_squares"),
    "low rank": fw.factorize.LowRank(params=0.7, data=True), "codebook": fw.share.Codebook(bits=2, min_size=16,
                                                                                          importance="inputs"),
    "gptq": fw.quantize.Quantize("int4", None, rounding="gptq"),
}


@pytest.mark.parametrize("convolution", [True, False])
def test_weights_read_along_different_axes_are_scored_by_all_that_they_meet(convolution: bool) -> None:
    model = made(lambda: Turned(convolution))
    x = torch.randn(4, 3, 8, 8) if convolution else torch.randn(16, 12)
    network, task = fw.capture(model, x), fw.Task(calibration=[(x, None)])
    plan = fw.prune.Weights(0.5, score="wanda", allocation="layer").plan(network, task)
    scores = model.weight.detach().abs() * model.meets(x).sqrt()
    kept = plan.apply(network).tensor("weight") != 0
    assert scores[~kept].max() <= scores[kept].min()
    for name, step in READERS.items():
        left = step.plan(network, task)
        assert left.apply(network)(x).isfinite().all(), name
        reasons = " ".join(s.reason for s in left.skipped if s.path == "weight")
        assert name == "codebook" or "along different axes" in reasons or "several kinds" in reasons, name


# ---- complex numbers written in place
class Spectral(nn.Module):
    """A Fourier layer: some frequencies are mixed and written into zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.lift, self.head = nn.Parameter(torch.randn(4, 4, 3, 2)), nn.Linear(1, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x).transpose(1, 2)
        waves = torch.fft.rfft(h)
        mixed = torch.zeros(*waves.shape, dtype=torch.cfloat)
        mixed[..., :3] = torch.einsum("nit,iot->not", waves[..., :3], torch.view_as_complex(self.weight))
        mixed[..., 4] += waves[..., 1]
        return self.head(F.gelu(h + torch.fft.irfft(mixed, n=h.shape[-1])).transpose(1, 2))


def test_complex_numbers_written_in_place_train() -> None:
    model, x = made(Spectral), torch.randn(3, 16, 1)
    network = fw.capture(model, x)
    wanted, found = (torch.autograd.grad(net(x).square().sum(), list(net.parameters())) for net in (model, network))
    for own, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(own, other)


# ---- outputs that matter
@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor | None = None


class Answers(nn.Module):
    def __init__(self, give: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.give = give
        self.first, self.second, self.aside = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        hidden = F.relu(self.first(x))
        return self.give(self.second(hidden), self.aside(hidden) + 0 * hidden[:, :5])


OUTPUTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Any, Callable[[Any], Tensor]]] = {
    "dict": (lambda a, b: {"hidden": b, "logits": a}, ("logits",), operator.itemgetter("logits")),
    "one name": (lambda a, b: {"hidden": b, "logits": a}, "logits", operator.itemgetter("logits")),
    "dataclass": (Answer, ("logits",), operator.attrgetter("logits")),
    "tuple": (lambda a, b: (b, a), (1,), operator.itemgetter(0)),
    "nest": (lambda a, b: {"all": (a, b), "logits": a}, ("logits",), operator.itemgetter("logits")),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_outputs_that_matter_hold_no_width_of_the_others(kind: str, tmp_path) -> None:
    give, wanted, pick = OUTPUTS[kind]
    model = made(lambda: Answers(give))
    x = torch.randn(3, 8)
    network = fw.capture(model, x, outputs=wanted)
    expected = model.second(F.relu(model.first(x)))
    assert torch.allclose(pick(network(x)), expected)
    assert "aside.weight" not in network.tensors()
    network.save(tmp_path / "network.fw")
    types = {f"{Answer.__module__}.{Answer.__qualname__}": Answer}
    assert torch.equal(pick(fw.load(tmp_path / "network.fw", types=types)(x)), pick(network(x)))
    assert fw.prune.Channels(ratio=0.5).plan(network, fw.Task()).macs_after < measure.macs(network).total


def test_outputs_that_there_are_not() -> None:
    with pytest.raises(CaptureError, match=r"outputs names 'logit'; the model gives 'hidden', 'logits'.*logits"):
        fw.capture(made(lambda: Answers(OUTPUTS["dict"][0])), torch.randn(2, 8), outputs=("logit",))
    with pytest.raises(CaptureError, match="the model gives a tensor"):
        fw.capture(nn.Linear(4, 4), torch.randn(2, 4), outputs=("logits",))


# ---- parts that give classes
class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Answer:
        return Answer(self.linear(x), x)


class Whole(nn.Module):
    def __init__(self, part: type[nn.Module] = Part) -> None:
        super().__init__()
        self.part, self.head = part(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = self.part(x)
        return self.head(found.logits) if found.logits.sum() > 0 else self.head(found.hidden)


def _local() -> type[nn.Module]:
    @dataclass
    class Mine:
        logits: Tensor
        hidden: Tensor

    class Local(Part):
        def forward(self, x: Tensor) -> Any:
            return Mine(self.linear(x), x)

    return Local


@pytest.mark.parametrize("part", [Part, _local()])
def test_into_gives_parts_the_models_own_classes(part: type[nn.Module], tmp_path) -> None:
    model = made(lambda: Whole(part))
    assembly = fw.capture(model, torch.randn(2, 8))
    assert isinstance(assembly, Assembly)
    assert isinstance(assembly.parts["part"], Network)
    assembly.save(tmp_path / "model.fw")
    back = fw.load(tmp_path / "model.fw", into=Whole(part))
    x = torch.randn(4, 8)
    assert torch.equal(back(x), assembly(x))
    assert type(back.parts["part"](x)) is type(model.part(x))
