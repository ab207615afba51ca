"""Values rounded when the network runs: no data, the runtime's own kernels, the same numbers in PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import featherweight as fw
from featherweight import deploy
from featherweight.balance import Ladder, Mixed
from featherweight.numerics.grids import Spec, fake_quantize, minmax
from featherweight.quantize import Quantize, sensitivity
from featherweight.recover import Train
from featherweight.steps import Context
from test_export_bits import assert_alike, deployed, kinds_in, optimized
from test_quantize import Attention, Tied, prepared, relative_error


class Wide(nn.Module):
    """A convolution, and linear calls on two and three axes, two of them on one value."""

    def __init__(self):
        super().__init__()
        self.conv, self.left, self.right = nn.Conv1d(8, 32, 3, 1, 1), nn.Linear(32, 48), nn.Linear(32, 48, bias=False)
        self.head = nn.Linear(48, 10)

    def forward(self, x):
        x = self.conv(x).transpose(1, 2)
        return self.head((F.gelu(self.left(x)) * self.right(x)).mean(1))


@pytest.fixture(scope="module")
def wide():
    torch.manual_seed(0)  # of weights too: in another draw a value at the border of two steps may round to either
    return prepared(Wide(), 8, 12)


@pytest.mark.parametrize(("weights", "granularity"), [
    ("int8", "channel"), ("int8", "tensor"), ("int4", "channel"), ("int2", "channel"), ("ternary", "channel"),
    ("apot4", "channel")])
def test_no_data_is_needed_and_the_runtime_multiplies_whole_numbers(wide, tmp_path, weights, granularity):
    network, _, x = wide
    plan = Quantize(weights, "dynamic", granularity=granularity).plan(network, fw.Task())
    assert {p.kind for p in plan.points} == {"dynamic"}
    assert [p.readers for p in plan.points] == [("linear", "linear_1"), ("linear_2",)]
    assert [(s.path, s.reason) for s in plan.skipped] == [
        ("conv.weight", "stored as integers, but its call has a kernel for floats only")]
    quantized = plan.apply(network)
    runner, path, _ = deployed(quantized, "onnxruntime", tmp_path)
    assert_alike(quantized, runner, (x,), 1e-5)
    kernels = optimized(path)
    assert kernels["DynamicQuantizeMatMul"] + kernels["MatMulIntegerToFloat"] == 3
    assert not kernels["MatMul"] + kernels["Gemm"] + kernels["MatMulNBits"]
    runner, _, _ = deployed(quantized, "openvino", tmp_path)
    assert deploy.verify(quantized, runner, (x,)).ok


def test_values_are_rounded_to_the_grid_over_their_range(wide):
    network, _, x = wide
    step = Quantize(activations="dynamic", mixed={"conv": "int8/float"}, device="vnni")
    quantized = step.plan(network, fw.Task()).apply(network)
    model = Wide().eval()
    weights = {n: fake_quantize(w, *minmax(w, Spec(8, axis=0)), Spec(8, axis=0)) if n.endswith("weight") else w
               for n, w in network.tensors().items()}
    model.load_state_dict(weights)
    byte = Spec(8, signed=False, symmetric=False)
    for layer in (model.left, model.right, model.head):
        layer.register_forward_pre_hook(lambda _, given: (fake_quantize(given[0], *minmax(given[0], byte), byte),))
    with torch.no_grad():
        assert torch.allclose(quantized(x), model(x), atol=1e-5)
        assert relative_error(quantized(10 * x), network(10 * x)) < 0.02  # no range was fixed


def test_what_has_a_grid_already_is_read_from_it(wide, tmp_path):
    network, task, x = wide
    plan = Quantize(mixed={"right": "int8/dynamic", "head": "int8/dynamic"}).plan(network, task)
    assert {p.kind: p.readers for p in plan.points if "linear_1" in p.readers or "linear_2" in p.readers} == {
        "uint8": ("linear", "linear_1"), "dynamic": ("linear_2",)}
    quantized = plan.apply(network)
    assert_alike(quantized, deployed(quantized, "onnxruntime", tmp_path)[0], (x,))
    assert relative_error(quantized(x), network(x)) < 0.05


def test_groups_are_multiplied_as_weights_alone(wide, tmp_path):
    network, _, x = wide
    plan = Quantize("int4", "dynamic", granularity=16, ends=None).plan(network, fw.Task())
    assert not plan.points
    assert sum("floats only" in s.reason for s in plan.skipped) == 4
    quantized = plan.apply(network)
    assert_alike(quantized, deployed(quantized, "onnxruntime", tmp_path)[0], (x,), 5e-2)


def test_a_weight_of_two_calls_lies_once_in_the_file(tmp_path):
    torch.manual_seed(0)
    network, _, _ = prepared(Tied(embed=False), 16)
    weights = "int7" if fw.deploy.saturates() else "int8"  # read twice, sums cannot be made exact
    quantized = Quantize(weights, "dynamic", ends=None).plan(network, fw.Task()).apply(network)
    x = torch.randn(4, 16)
    runner, path, _ = deployed(quantized, "onnxruntime", tmp_path)
    assert_alike(quantized, runner, (x,), 1e-5)
    assert kinds_in(path) == {"INT8": 2}


def test_it_is_written_and_read(wide, tmp_path):
    network, _, x = wide
    quantized = Quantize(activations="dynamic").plan(network, fw.Task()).apply(network)
    quantized.save(tmp_path / "n.fw")
    assert torch.equal(fw.load(tmp_path / "n.fw")(x), quantized(x))
    assert fw.measure.macs(quantized).total == fw.measure.macs(network).total
    assert fw.measure.params(quantized) == fw.measure.params(network)


@pytest.mark.parametrize("rounding", ["gptq", "blocks"])
def test_weights_are_rounded_for_what_they_will_read(rounding):
    torch.manual_seed(0)
    network, task, x = prepared(Attention(), 5, 16)
    near, better = (Quantize("int3", "dynamic", ends=None, rounding=r).plan(network, task)
                    for r in ("nearest", rounding))
    assert near.points == better.points
    assert relative_error(better.apply(network)(x), network(x)) < relative_error(near.apply(network)(x), network(x))


def test_it_trains(wide):
    network, _, x = wide
    want = network(x).detach()
    task = fw.Task(train=lambda: [(x, want)] * 20, loss=lambda y, t: 100 * F.mse_loss(y, t))
    step = Quantize("int3", "dynamic", ends=None)
    trained = Train(epochs=3, lr=0.01, during=(step,)).fit(network, task, Context())
    assert [n for n in trained.calls() if "choose_qparams" in str(n.target)]
    plain = step.plan(network, fw.Task()).apply(network)
    assert relative_error(trained(x), want) < 0.6 * relative_error(plain(x), want)


def test_those_who_choose_know_it(wide):
    network, task, x = wide
    found = {(d.layer, d.kind): d.damage for d in sensitivity(network, task, ("int8/dynamic", "int8/float"))}
    assert found["head.weight", "int8/dynamic"] > found["head.weight", "int8/float"]
    assert found["conv.weight", "int8/dynamic"] == found["conv.weight", "int8/float"]
    mixed = Mixed(Quantize(activations="dynamic", ends=None), kinds=("int8", "int4"), bits=6).plan(network, task)
    assert {p.kind for p in mixed.points} == {"dynamic"}
    want = network(x).detach().argmax(1)
    judged = fw.Task(calibration=lambda: [(x, want)], validation=lambda: [(x, want)], score=fw.scores.top1)
    climbed = Ladder(Quantize("int2", "dynamic"), score_drop=0.0).plan(network, judged)
    assert {p.kind for p in climbed.points} == {"dynamic"}
    assert climbed.trail[0].score == 100


# ---- recurrent layers
class Memory(nn.Module):
    def __init__(self, width, **options):
        super().__init__()
        self.layer = nn.LSTM(24, width, batch_first=True, **options)

    def forward(self, x, hidden, cells):
        return self.layer(x, (hidden, cells))


def stepped(network, x, hidden, cells):
    """A layer's outputs, one step after the other, on what reads are rounded to: all inputs on one grid, each state on
    its own."""
    def read(value):
        scale, zero = minmax(value, Spec(8, symmetric=False, signed=False))
        return fake_quantize(value, scale, zero, Spec(8, symmetric=False, signed=False))

    own = {name: network.tensor(f"layer.{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    w, r = (own[f"weight_{n}"].float() * network.tensor(f"layer.weight_{n}_l0_scale")[:, None] for n in ("ih", "hh"))
    given, outputs = read(x), []
    for step in range(x.shape[1]):
        gates = given[:, step] @ w.t() + own["bias_ih"] + read(hidden) @ r.t() + own["bias_hh"]
        i, f, g, o = gates.chunk(4, 1)
        cells = f.sigmoid() * cells + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cells.tanh()
        outputs.append(hidden)
    return torch.stack(outputs, 1)


def test_wide_memories_are_computed_on_integers_in_onnx_runtime(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(3, 7, 24)
    for options, whole in (({"width": 64}, True), ({"width": 32}, False),
                           ({"width": 64, "num_layers": 2, "bidirectional": True}, True)):
        both = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
        states = [torch.randn(both, 3, options["width"]) for _ in range(2)]
        network = fw.capture(Memory(**options).eval(), (x, *states), dynamic={})
        small = Quantize(activations=None).plan(network, fw.Task()).apply(network)
        runner, path, _ = deployed(small, "onnxruntime", tmp_path)
        kernels = optimized(path)
        assert (kernels["DynamicQuantizeLSTM"], kernels["LSTM"]) == ((both + 1) // 2 * whole, both * (not whole))
        found = deploy.verify(small, runner, (x, *states))
        assert found.max_rel < (0.03 if whole else 1e-5), found
        if both == 1 and whole:
            wanted = stepped(small, x, *(s[0] for s in states))
            assert relative_error(runner(x, *states)[0], wanted) < 2e-3
