"""Quantization, before and after the rounding: equalized and smoothed weights, corrected biases, made-up data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import featherweight as fw
from featherweight import quantize
from featherweight.calibrate import walk
from featherweight.demo import digits
from featherweight.errors import RecipeError, TaskError
from featherweight.network import fold_batch_norm
from featherweight.quantize import Quantize
from featherweight.quantize.prepare.biases import corrected, nearer
from featherweight.quantize.prepare.equalize import equalized
from featherweight.quantize.prepare.smooth import smoothed
from featherweight.steps import Plan
from test_quantize import SHAPES, Attention, Mobile, Residual, fitted, prepared, relative_error

aten = torch.ops.aten


class Heads(nn.Module):
    """Attention by hand with q, k, v apart, then PyTorch's own with packed ones, then a gated MLP."""

    def __init__(self):
        super().__init__()
        self.norm, self.norm2, self.norm3 = nn.LayerNorm(16), nn.RMSNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.packed = nn.MultiheadAttention(16, 4, batch_first=True)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.fc1, self.fc2 = nn.Linear(16, 24), nn.Linear(24, 16, bias=False)

    def forward(self, x):
        n, t, c = x.shape
        y = self.norm(x)
        q, k, v = (f(y).view(n, t, 4, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).reshape(n, t, c))
        y = self.norm2(x)
        x = x + self.packed(y, y, y, need_weights=False)[0]
        y = self.norm3(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y)) + self.fc2(F.relu(self.fc1(x)))


class Chain(nn.Module):
    """Transposed, grouped, depthwise; flattened before the head, so that a channel is four inputs of it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.ConvTranspose2d(3, 8, 2, 2, groups=1), nn.Conv2d(8, 12, 3, 1, 1, groups=2)
        self.c, self.d = nn.Conv2d(12, 12, 3, 1, 1, groups=12), nn.ConvTranspose2d(12, 8, 2, 2, groups=4)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = F.max_pool2d(F.leaky_relu(self.a(x), 0.1), 2)
        return self.head(F.adaptive_avg_pool2d(self.d(F.relu(self.c(F.relu(self.b(x))))), 2).flatten(1))


NETWORKS = {**SHAPES, Heads: (5, 16), Chain: (3, 8, 8)}


@pytest.fixture(scope="module", params=list(NETWORKS), ids=lambda c: c.__name__.lower())
def problem(request):
    torch.manual_seed(0)
    return prepared(request.param(), *NETWORKS[request.param])


@pytest.fixture(scope="module")
def trained():
    """A depthwise-separable network with batch norm trained on digits, and its task."""
    task = digits.task()
    torch.manual_seed(0)
    layers, shapes = [], ((1, 12, 3, 1, 1), (12, 12, 3, 1, 12), (12, 24, 1, 1, 1), (24, 24, 3, 2, 1))
    for i, o, kernel, stride, groups in shapes:
        conv = nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False)
        layers += [conv, nn.BatchNorm2d(o), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))
    fitted(model, task, torch.optim.Adam(model.parameters(), 1e-2), epochs=8)
    return fw.capture(model, torch.zeros(2, 1, 8, 8)), task


def images(task):
    return torch.cat([x for x, _ in task.batches("validation")])


def error(step, network, task, x):
    with torch.no_grad():
        return relative_error(step.plan(network, task).apply(network)(x), network(x))


def badly_scaled(network, names, spread):
    """The same function in floats: output channels of each layer times 1/s, inputs of the next times s."""
    network = fold_batch_norm(network)
    generator = torch.Generator().manual_seed(3)
    for (w, b), nxt in names:
        scale = torch.exp(spread * torch.randn(len(network.tensor(b)), generator=generator))
        other = network.tensor(nxt)
        along = (-1, 1, 1, 1) if other.shape[1] == 1 else (1, -1, 1, 1)
        network.set_tensor(w, network.tensor(w) / scale.view(-1, 1, 1, 1))
        network.set_tensor(b, network.tensor(b) / scale)
        network.set_tensor(nxt, other * scale.view(along))
    return network


# ---- equalization and smoothing leave the function

def test_the_function_stays(problem):
    network, task, x = problem
    changed = {}
    for prepare in (equalized, lambda n: smoothed(n, task, 0.5, None)):
        folded = fold_batch_norm(network)
        graph = str(folded.graph)
        values, skipped = prepare(folded)
        assert str(folded.graph) == graph
        assert all(torch.equal(folded.tensor(name), value) for name, value in values.items())
        assert relative_error(folded(x), network(x)) < 1e-5
        assert all(s.reason.startswith(("not equalized", "not smoothed")) for s in skipped)
        changed |= values
    assert bool(changed) == ('pad' not in str(network.graph))  # nothing in Residual


def test_everything_together_on_every_network(problem, tmp_path):
    network, task, x = problem
    step = Quantize(weights="int6", ends=None, equalize=True, smooth=0.5, correct_bias=True)
    plan = step.plan(network, task)
    plan.save(tmp_path / "plan")
    one, two = plan.apply(network), Plan.load(tmp_path / "plan").apply(network)
    assert torch.equal(one(x), two(x))
    assert relative_error(one(x), network(x)) < 0.1
    again = step.plan(network, task)
    assert again == plan
    assert all(torch.equal(again.tensors[k], v) for k, v in plan.tensors.items())


def test_equalized_ranges_are_those_of_a_slow_second_implementation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    for row in range(5):
        model[0].weight.data[row] *= 3.0 ** (row - 2)
    for layer in model[::2]:
        layer.bias.data.zero_()
    network = fw.capture(model, torch.randn(2, 6))
    w = [layer.weight.detach().double().clone() for layer in model[::2]]
    for _ in range(200):
        for first, second in ((w[0], w[1]), (w[1], w[2])):
            for i in range(first.shape[0]):
                r1, r2 = first[i].abs().max(), second[:, i].abs().max()
                s = (r1 * r2).sqrt() / r2
                first[i] /= s
                second[:, i] *= s
    equalized(network)
    for name, want in zip(("0.weight", "2.weight", "4.weight"), w, strict=True):
        torch.testing.assert_close(network.tensor(name).detach().double(), want, rtol=5e-3, atol=1e-6)
    for name, after in (("0.weight", "2.weight"), ("2.weight", "4.weight")):
        torch.testing.assert_close(network.tensor(name).abs().amax(1), network.tensor(after).abs().amax(0),
                                   rtol=5e-3, atol=0)


def test_equalization_saves_badly_scaled_depthwise_layers(trained):
    network, task = trained
    x = images(task)
    names = [(("0.weight", "0.bias"), "3.weight"), (("3.weight", "3.bias"), "6.weight"),
             (("6.weight", "6.bias"), "9.weight")]
    bad = badly_scaled(network, names, spread=1.5)
    assert relative_error(bad(x), network(x)) < 1e-5
    plain, even = (Quantize(granularity="tensor", equalize=e) for e in (False, True))
    assert error(even, bad, task, x) < error(plain, bad, task, x) / 4


def test_a_channel_without_weights_is_not_scaled_up_with_its_bias():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model[0].weight.data[2] *= 1e-8
    model[0].weight.data[3] = 0
    model[0].bias.data[2] = 0.4
    network, task, x = prepared(model, 3, 4, 4)
    highest = network.tensor("0.bias").abs().max()
    folded = fold_batch_norm(network)
    equalized(folded)
    assert folded.tensor("0.bias").abs().max() <= highest * 1.0001
    assert relative_error(folded(x), network(x)) < 1e-5
    assert error(Quantize(equalize=True), network, task, x) < 0.03


def test_what_cannot_be_equalized_is_named():
    reasons = {s.path: s.reason for s in equalized(fold_batch_norm(prepared(Mobile(), 3, 8, 8)[0]))[1]}
    assert "relu6" in reasons["deep.weight"]
    assert "sigmoid" in reasons["excite.weight"]
    assert "linear.weight" not in reasons
    reasons = {s.path: s.reason for s in equalized(fold_batch_norm(prepared(Residual(), 3, 8, 8)[0]))[1]}
    assert "aten.add.Tensor" in reasons["conv1.weight"]

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = self.last(F.relu(x))
            return self.conv(F.relu(self.conv(x))), y, F.relu(y)

    values, skipped = equalized(prepared(Twice(), 4, 6, 6)[0])
    assert not values
    assert "read by several calls" in {s.path: s.reason for s in skipped}["conv.weight"]
    assert "output of the network" in {s.path: s.reason for s in skipped}["last.weight"]


# ---- SmoothQuant

def outliers(model, by=40.0):
    """A few channels of a layer norm's output get large, as in language models."""
    model.norm.weight.data[[3, 11]] *= by
    return model


def test_smoothing_is_that_of_a_slow_second_implementation():
    torch.manual_seed(0)
    network, task, _ = prepared(outliers(Heads()), 5, 16)
    before = {k: v.detach().clone() for k, v in network.tensors().items()}
    xs = torch.cat([x for x, _ in task.batches("calibration")])
    seen = F.layer_norm(xs, [16], before["norm.weight"], before["norm.bias"]).reshape(-1, 16)
    smoothed(network, task, 0.7, None)
    for j in range(16):
        columns = [before[f"{name}.weight"][:, j] for name in "qkv"]
        s = seen[:, j].abs().max() ** 0.7 / max(c.abs().max() for c in columns) ** 0.3
        for name, column in zip("qk", columns[:2], strict=True):
            new = network.tensor(f"{name}.weight")[:, j].detach()
            torch.testing.assert_close(new, column * s, rtol=1e-4, atol=1e-7)
        for name in ("norm.weight", "norm.bias"):
            assert network.tensor(name)[j].item() == pytest.approx((before[name][j] / s).item(), rel=1e-4)


def test_smoothing_reaches_every_kind_of_place():
    torch.manual_seed(0)
    network, task, _ = prepared(Heads(), 5, 16)
    values, skipped = smoothed(network, task, 0.5, None)
    assert {"norm.weight", "norm2.weight", "norm3.weight", "v.bias", "packed.in_proj_bias", "up.bias",
            "fc1.bias", "fc2.weight", "o.weight", "packed.out_proj.weight", "down.weight"} <= values.keys()
    assert {s.path: s.reason for s in skipped}.keys() == {"fc1.weight"}
    assert "aten.add.Tensor, which absorbs no scale" in skipped[0].reason
    reasons = {s.path: s.reason for s in smoothed(*prepared(Attention(), 5, 16)[:2], 0.5, None)[1]}
    assert "gelu" in reasons["fc2.weight"]
    with pytest.raises(TaskError, match="the calibration split is empty; smoothing"):
        smoothed(network, fw.Task(calibration=list), 0.5, None)


def test_smoothing_saves_attention_with_outlier_channels():
    torch.manual_seed(0)
    network, task, x = prepared(outliers(Attention()), 5, 16)
    network.tensor("qkv.weight").data[:, [3, 11]] /= 40.0  # what is large matters no more than the rest
    plain, smooth = (error(Quantize(smooth=s), network, task, x) for s in (None, 0.5))
    assert smooth < plain / 2


# ---- bias correction

def channel_means(network, names, x):
    """Mean of every channel of the calls, by taps."""
    seen = {}
    with network.taps({n: lambda v, n=n: seen.__setitem__(n, v) for n in names}), torch.no_grad():
        network(x)
    return {n: v.double().movedim(1 if v.dim() == 4 else -1, 0).flatten(1).mean(1) for n, v in seen.items()}


def test_corrected_means_are_the_float_ones_as_layer_by_layer(trained):
    network, task = trained
    x = torch.cat([b for b, _ in task.batches("calibration")])
    folded = fold_batch_norm(network)
    calls = [n for n in folded.calls() if n.target in (aten.conv2d.default, aten.linear.default)]
    plan = Quantize(weights="int4", activations="uint4", ends=None).plan(network, task)
    found = corrected(plan, network, task, None)
    whole = channel_means(folded, [n.name for n in calls], x)
    for name, mean in channel_means(found.apply(network), whole, x).items():
        torch.testing.assert_close(mean, whole[name], rtol=0, atol=2e-5)
    slow = plan.apply(network)  # the network run once per layer
    for node in calls:
        lost = whole[node.name] - channel_means(slow, [node.name], x)[node.name]
        bias = str(node.args[2].target)
        slow.set_tensor(bias, (slow.tensor(bias).double() + lost).float())
        torch.testing.assert_close(found.tensors[bias], slow.tensor(bias).detach(), rtol=1e-3, atol=1e-4)
        assert bias in found.changed


def test_correction_lowers_the_error_of_four_bits(trained):
    network, task = trained
    x = images(task)
    for form in ({"activations": None}, {"weight_ranges": "minmax"}):
        plain, better = (error(Quantize(weights="int4", ends=None, correct_bias=c, **form), network, task, x)
                         for c in (False, True))
        assert better < plain * 0.9


def test_correction_of_an_equalized_network_aims_at_the_equalized_means(trained):
    network, task = trained
    bad = badly_scaled(network, [(("0.weight", "0.bias"), "3.weight"), (("3.weight", "3.bias"), "6.weight")], 1.0)
    x = images(task)
    for rounding, bound in (("nearest", 0.8), ("gptq", 1.05)):  # GPTQ leaves little of the means to correct
        step = Quantize(weights="int4", ends=None, weight_ranges="minmax", equalize=True, rounding=rounding)
        plain, better = (error(replace(step, correct_bias=c), bad, task, x) for c in (False, True))
        assert better < plain * bound


def test_biases_are_corrected_unasked_where_outputs_get_nearer(trained):
    network, task = trained
    step = Quantize(weights="int4", ends=None, weight_ranges="minmax")
    plans = {c: replace(step, correct_bias=c).plan(network, task) for c in (None, False, True)}
    biases = {c: {n for n in plan.changed if n.endswith("bias")} for c, plan in plans.items()}
    assert biases[None] == biases[True] > biases[False]
    assert nearer(plans[True], plans[False], network, task, None)
    assert not nearer(plans[False], plans[True], network, task, None)
    worse = {name: tensor + 0.5 * (name in biases[True]) for name, tensor in plans[True].tensors.items()}
    assert not nearer(replace(plans[True], tensors=worse), plans[False], network, task, None)
    without = replace(step, activations=None).plan(network, task)
    assert not any(n.endswith("bias") for n in without.changed)


def test_calls_without_a_bias_are_named_and_data_is_asked_for():
    network, task, _ = prepared(nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 4)), 8)
    plan = Quantize(correct_bias=True).plan(network, task)
    assert plan.changed == ("2.bias",)
    assert [(s.path, s.reason) for s in plan.skipped] == [("0", "not corrected: it has no bias")]
    with pytest.raises(TaskError, match="bias correction needs calibration data"):
        Quantize(activations=None, correct_bias=True).plan(network, fw.Task(calibration=list))


# ---- data made from the network

@pytest.mark.parametrize(("step", "what"), [
    (Quantize(correct_bias=True), "biases are corrected"), (Quantize(rounding="gptq"), "weights are rounded")])
def test_data_left_out_for_want_of_memory_is_named(trained, monkeypatch, step, what):
    network, task = trained
    (x, y), *_ = task.batches("calibration")
    task = replace(task, calibration=lambda: [(x[:16], y[:16]), (x[16:32], y[16:32])])
    assert not [s for s in step.plan(network, task).skipped if s.path == "calibration"]
    monkeypatch.setattr(walk, "BUDGET", 1)
    reasons = [s.reason for s in step.plan(network, task).skipped if s.path == "calibration"]
    assert len(reasons) == 1
    assert reasons[0].startswith(f"{what} by a part of it: only the first 16 samples were read")


def test_distilled_data_stands_in_for_real_data(trained):
    network, task = trained
    x = images(task)
    made = quantize.distilled_data(network, batches=2, steps=60)
    noise = [(torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(i)), None) for i in range(2)]
    step = Quantize(activations="uint4", ends=None)
    real, distilled, random = (error(step, network, replace(task, calibration=lambda d=d: d), x)
                               for d in (list(task.batches("calibration")), made, noise))
    assert distilled < random / 2
    assert distilled < real * 2.5
    means = [channel_means(network, ["conv2d_3"], torch.cat([b for b, _ in d]))["conv2d_3"] for d in (made, noise)]
    want = network.tensor("10.running_mean").double()
    assert (means[0] - want).norm() < (means[1] - want).norm() / 3


def test_distilled_data_are_made_again_alike(trained):
    network, _ = trained
    before = {k: v.clone() for k, v in network.tensors().items()}
    one, two, other = (quantize.distilled_data(network, 2, 3, 2, seed) for seed in (0, 0, 1))
    assert [b.shape for b, _ in one] == [(3, 1, 8, 8)] * 2
    assert all(target is None and not b.requires_grad for b, target in one)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(one, two, strict=True))
    assert not torch.equal(one[0][0], one[1][0])
    assert not torch.equal(one[0][0], other[0][0])
    assert all(torch.equal(before[k], v) for k, v in network.tensors().items())
    assert all(p.requires_grad for p in network.parameters())


def test_quantizing_without_data(trained):
    network, task = trained
    step = Quantize(calibration="distilled", calibration_batches=1, correct_bias=True)
    plan = step.plan(network, fw.Task())
    assert not plan.skipped
    assert relative_error(plan.apply(network)(images(task)), network(images(task))) < 0.1
    plain, _, x = prepared(Attention(), 5, 16)
    plan = Quantize(calibration="distilled").plan(plain, fw.Task())
    assert relative_error(plan.apply(plain)(x), plain(x)) < 0.1
    assert "standard normal inputs" in {s.path: s.reason for s in plan.skipped}["calibration"]
    with pytest.warns(UserWarning, match="standard normal inputs are taken"):
        made = quantize.distilled_data(plain, 1, 200)
    assert float(made[0][0].std()) == pytest.approx(1, abs=0.05)


def test_inputs_that_cannot_be_made():
    torch.manual_seed(0)
    network = fw.capture(nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 4)).eval(), torch.randint(0, 20, (2, 6)))
    with pytest.raises(TaskError, match="is int64; data can be made for float inputs only"):
        quantize.distilled_data(network)
    with pytest.raises(RecipeError, match="expected one of 'data', 'distilled'"):
        Quantize(calibration="none").plan(network, fw.Task())
