"""Quantization: what is stored, what is rounded where, and that the runtime computes on integers throughout."""

from __future__ import annotations

import collections

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import featherweight as fw
from featherweight import deploy
from featherweight.errors import PlanError, RecipeError, TaskError
from featherweight.numerics.formats import GRIDS
from featherweight.quantize import Quantize, QuantizePlan
from featherweight.steps import Plan

aten = torch.ops.aten


class Residual(nn.Module):
    """Blocks of a CIFAR ResNet: a plain one, and one whose shortcut is sliced and padded (option A)."""

    def __init__(self, width=16):
        super().__init__()
        self.width = width
        self.stem, self.stem_norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.linear = nn.Linear(2 * width, 10)

    def forward(self, x):
        x = F.relu(self.stem_norm(self.stem(x)))
        x = F.relu(self.norm1(self.conv1(x)) + x)
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.width // 2, self.width // 2))
        x = F.relu(self.norm2(self.conv2(x)) + short)
        return self.linear(F.avg_pool2d(x, 4).flatten(1))


class Mobile(nn.Module):
    """Depthwise, grouped, ReLU6, squeeze-excite."""

    def __init__(self):
        super().__init__()
        self.up, self.deep = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.grouped, self.down = nn.Conv2d(16, 16, 3, 1, 1, groups=4), nn.Conv2d(16, 16, 1)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.linear = nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu6(self.grouped(F.relu6(self.deep(F.relu6(self.up(x))))))
        x = x * self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        return self.linear(self.down(x).mean([2, 3]))


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(3, 16, 1), nn.Conv2d(32, 16, 1)
        self.d = nn.Conv2d(16, 16, 3)

    def forward(self, x):
        y = F.max_pool2d(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1), 2)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)  # channel shuffle
        left, right = self.c(y).chunk(2, 1)
        return self.d(torch.cat([right, left], 1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        return (x + self.fc2(F.gelu(self.fc1(x)))).mean(1)


def prepared(model, *shape, seed=0):
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
    network = fw.capture(model.eval(), torch.randn(2, *shape))
    batches = [(torch.randn(8, *shape), None) for _ in range(4)]
    return network, fw.Task(calibration=lambda: batches), batches[0][0]


SHAPES = {Residual: (3, 8, 8), Mobile: (3, 8, 8), Concat: (3, 8, 8), Attention: (5, 16)}


@pytest.fixture(scope="module", params=list(SHAPES), ids=lambda c: c.__name__.lower())
def problem(request):
    torch.manual_seed(0)
    return prepared(request.param(), *SHAPES[request.param])


def fitted(model, task, optimizer, epochs):
    """The model after so many passes over the task's train split, ready to be captured."""
    for _ in range(epochs):
        for x, y in task.batches("train"):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def relative_error(given, want):
    return float(((given - want).norm() / want.norm()).detach())


def kernels(quantized, tmp_path, x, network):
    """Operator counts of the graph as ONNX Runtime has optimized it; the file gives what PyTorch gives."""
    target = deploy.target("onnxruntime")
    path = tmp_path / "model.onnx"
    target.export(quantized, path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options)
    runner = target.load(path, like=quantized.signature)
    assert deploy.verify(quantized, runner, (x,)).ok
    assert relative_error(runner(x), network(x)) < 0.06
    return collections.Counter(n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node)


# ---- the laws, briefly

@pytest.mark.parametrize("step", [Quantize(weight_ranges="mse"), Quantize(activations=None)])
def test_plan_reads_apply_does(problem, step, tmp_path):
    network, task, x = problem
    before = {k: v.clone() for k, v in network.tensors().items()}
    calls = [n.name for n in network.calls()]
    plan = step.plan(network, task)
    again = Plan.from_json(plan.to_json(), plan.tensors)
    assert again == plan
    plan.save(tmp_path / "plan")
    one, two = plan.apply(network), Plan.load(tmp_path / "plan").apply(network)
    assert [n.name for n in network.calls()] == calls
    assert all(torch.equal(before[k], v) for k, v in network.tensors().items())
    assert torch.equal(one(x), two(x))
    assert relative_error(one(x), network(x)) < 0.06
    one.save(tmp_path / "network.fw")
    assert torch.equal(fw.load(tmp_path / "network.fw")(x), one(x))


# ---- integers from end to end

def test_residual_network_runs_on_whole_numbers_from_end_to_end(tmp_path):
    network, task, x = prepared(Residual(), 3, 8, 8)
    plan = Quantize().plan(network, task)
    assert not plan.skipped
    counts = kernels(plan.apply(network), tmp_path, x, network)
    assert counts["QLinearConv"] == 3
    assert counts["QLinearAdd"] == 2
    assert counts["QGemm"] == 1
    assert counts["QuantizeLinear"] == 1
    assert counts["DequantizeLinear"] == 0
    assert not {"Conv", "FusedConv", "Relu", "Add", "Gemm", "MatMul"} & set(counts)


def test_depthwise_and_grouped_run_on_whole_numbers(tmp_path):
    network, task, x = prepared(Mobile(), 3, 8, 8)
    counts = kernels(Quantize().plan(network, task).apply(network), tmp_path, x, network)
    assert counts["QLinearConv"] == 6
    assert counts["QLinearGlobalAveragePool"] == 2
    assert counts["QLinearMul"] == 1
    assert not {"Conv", "FusedConv", "Clip", "Relu", "ReduceMean", "Mul", "Gemm"} & set(counts)


def test_concat_shuffle_and_split_stay_on_whole_numbers(tmp_path):
    network, task, x = prepared(Concat(), 3, 8, 8)
    plan = Quantize().plan(network, task)
    counts = kernels(plan.apply(network), tmp_path, x, network)
    assert counts["QLinearConv"] == 4
    assert counts["QLinearConcat"] == 2
    assert counts["QuantizeLinear"] == counts["DequantizeLinear"] == 1
    grids = {p.node: (p.scale, p.zero_point) for p in plan.points}
    assert len({grids[n] for n in ("relu", "relu_1", "cat", "max_pool2d", "view", "transpose", "reshape")}) == 1


def test_values_cut_off_differently_share_no_grid():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            return self.c(torch.cat([F.relu(self.a(x)), self.b(x)], 1))

    network, task, _ = prepared(Mixed(), 3, 4, 4)
    points = {p.node: p for p in Quantize().plan(network, task).points}
    assert points["relu"].zero_point == 0
    assert points["cat"].zero_point > 0
    assert points["conv2d_1"].scale == points["cat"].scale != points["relu"].scale


def test_attention_stays_float_and_its_linears_do_not(tmp_path):
    network, task, x = prepared(Attention(), 5, 16)
    plan = Quantize().plan(network, task)
    assert len(plan.stored) == 4
    reasons = " ".join(s.reason for s in plan.skipped)
    assert "scaled_dot_product_attention" in reasons
    assert "layer_norm" in reasons
    assert "gelu" in reasons
    counts = kernels(plan.apply(network), tmp_path, x, network)
    assert counts["MatMulIntegerToFloat"] + counts["QLinearMatMul"] + counts["QGemm"] == 4


def test_file_shrinks_to_about_a_quarter(tmp_path):
    network, task, _ = prepared(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)), 256)
    quantized = Quantize().plan(network, task).apply(network)
    target = deploy.target("onnxruntime")
    whole, small = (target.export(n, tmp_path / "m.onnx") for n in (network, quantized))
    assert small < 0.3 * whole
    assert quantized.save(tmp_path / "n.fw") < 0.35 * network.save(tmp_path / "m.fw")


# ---- weights

def test_stored_weights_are_the_rounded_folded_ones():
    network, task, _ = prepared(Residual(), 3, 8, 8)
    quantized = Quantize(device="vnni").plan(network, task).apply(network)
    folded = {k: v.detach() for k, v in fw.network.fold_batch_norm(network).tensors().items()}
    for name in ("stem.weight", "conv2.weight", "linear.weight"):
        weight, stored = folded[name], quantized.tensor(name)
        assert stored.dtype == torch.int8
        for o, row in enumerate(weight):  # channel by channel, by hand
            scale = row.abs().max() / 127
            assert float(quantized.tensor(f"{name}_scale")[o]) == pytest.approx(float(scale), rel=1e-5)
            assert (stored[o] - (row / scale).round()).abs().max() <= 1
            assert ((stored[o] * scale - row).abs() <= scale * 0.5001).all()


def test_least_squares_ranges_round_weights_closer():
    torch.manual_seed(0)
    model = nn.Linear(256, 8)
    model.weight.data[:, 0] = 3.0  # one outlier per row
    network, task, _ = prepared(model, 256)

    def error(step):
        quantized = step.plan(network, task).apply(network)
        return ((quantized.tensor("weight") * quantized.tensor("weight_scale")[:, None]) - model.weight).square().sum()

    assert error(Quantize(weight_ranges="mse")) <= error(Quantize())


def test_zeros_and_patterns_are_kept():
    network, task, _ = prepared(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), 64)
    weight = network.tensor("0.weight").detach().clone()
    weight[torch.rand(64, 64) < 0.7] = 0
    network.set_tensor("0.weight", weight)
    network.patterns["0.weight"] = "unstructured"
    quantized = Quantize().plan(network, task).apply(network)
    assert quantized.patterns == {"0.weight": "unstructured"}
    assert (quantized.tensor("0.weight")[weight == 0] == 0).all()


def test_weight_only_needs_no_data():
    network, _, x = prepared(Residual(), 3, 8, 8)
    plan = Quantize(activations=None).plan(network, fw.Task())
    assert not plan.points
    assert len(plan.stored) == 4
    assert relative_error(plan.apply(network)(x), network(x)) < 0.02


class Tied(nn.Module):
    def __init__(self, embed):
        super().__init__()
        self.embed = nn.Embedding(20, 16) if embed else nn.Linear(16, 20)
        self.head, self.between = nn.Linear(16, 20, bias=False), nn.Linear(20, 16)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        return self.head(F.relu(x if x.shape[-1] == 16 else self.between(x)))


def test_a_weight_read_by_two_calls_is_stored_once(tmp_path):
    network, task, x = prepared(Tied(embed=False), 16)
    plan = Quantize().plan(network, task)
    assert len(plan.stored) == 2
    quantized = plan.apply(network)
    assert quantized.tensor("head.weight") is quantized.tensor("embed.weight")
    assert relative_error(quantized(x), network(x)) < 0.05
    quantized.save(tmp_path / "n.fw")
    loaded = fw.load(tmp_path / "n.fw")
    assert loaded.tensor("head.weight") is loaded.tensor("embed.weight")


@pytest.mark.parametrize("kind", ["int8", "int4", "fp16"])
def test_a_weight_that_an_embedding_reads_too_is_stored_once_by_row(tmp_path, kind):
    """Looked up and multiplied with, it has the same numbers: those of its rows' grids."""
    torch.manual_seed(0)
    words = torch.randint(0, 20, (2, 6))
    network = fw.capture(Tied(embed=True).eval(), words)
    task = fw.Task(calibration=lambda: [(torch.randint(0, 20, (4, 6)), None)])
    plan = Quantize(kind, activations=None, ends=None).plan(network, task)
    assert not any("embed" in s.path and "kernel" not in s.reason for s in plan.skipped)
    quantized = plan.apply(network)
    assert quantized.tensor("head.weight") is quantized.tensor("embed.weight")
    stored = {s.weight: s for s in plan.stored}
    assert quantized.tensor("embed.weight").element_size() == (2 if kind == "fp16" else 1)
    slow = network.copy()
    for name, form in stored.items():
        weight = network.tensor(name).detach()
        if kind == "fp16":
            made = weight.half().float()
        else:
            assert form.axis == 0
            scale = plan.tensors[f"{name}_scale"][:, None]
            made = (weight / scale).round().clamp(GRIDS[kind].lowest, GRIDS[kind].highest) * scale
        slow.set_tensor(name, made)
    torch.testing.assert_close(quantized(words), slow(words))
    quantized.save(tmp_path / "n.fw")
    assert torch.equal(fw.load(tmp_path / "n.fw")(words), quantized(words))


def test_a_module_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, 1, 1)

        def forward(self, x):
            return self.conv(F.relu(self.conv(x)))

    network, task, x = prepared(Twice(), 4, 6, 6)
    plan = Quantize().plan(network, task)
    assert len(plan.stored) == 1
    assert relative_error(plan.apply(network)(x), network(x)) < 0.05


def test_quantizing_twice_names_what_is_stored_already():
    network, task, x = prepared(Residual(), 3, 8, 8)
    once = Quantize().plan(network, task).apply(network)
    plan = Quantize().plan(once, task)
    assert not plan.stored
    assert not plan.points
    assert sum("another form already" in s.reason for s in plan.skipped) == 4
    assert torch.equal(plan.apply(once)(x), once(x))


def test_nothing_to_do_is_no_error():
    class Plain(nn.Module):
        def forward(self, x):
            return (x + 1).softmax(-1)

    network, task, x = prepared(Plain(), 5)
    plan = Quantize().plan(network, task)
    assert isinstance(plan, QuantizePlan)
    assert torch.equal(plan.apply(network)(x), network(x))
    assert {"aten.softmax.int has no integer kernel"} <= {s.reason for s in plan.skipped}


def test_transposed_convolution_is_named_and_right(tmp_path):
    network, task, x = prepared(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 6, 2, 2, groups=2)), 3, 6, 6)
    plan = Quantize().plan(network, task)
    assert [s.reason for s in plan.skipped if s.path == "1.weight"] == [
        "stored as integers, but its call has a kernel for floats only"]
    quantized = plan.apply(network)
    assert relative_error(quantized(x), network(x)) < 0.05
    kernels(quantized, tmp_path, x, network)


def test_float_readers_of_an_input_see_it_unrounded():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(x), x.exp()

    network, task, x = prepared(Both(), 8)
    quantized = Quantize().plan(network, task).apply(network)
    assert torch.equal(quantized(x)[1], x.exp())
    assert not torch.equal(quantized(x)[0], network(x)[0])


def test_least_squares_ranges_of_values_cut_outliers_off():
    network, _, _ = prepared(nn.Linear(16, 4), 16)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    x[0, 0] = 60.0
    task = fw.Task(calibration=lambda: [(x, None)])
    whole, cut = (Quantize(ranges=r).plan(network, task).points[0] for r in ("minmax", "mse"))
    assert whole.scale == pytest.approx(float(x.max() - x.min()) / 255, rel=1e-5)
    errors = []
    for point in (whole, cut):
        steps = (x / point.scale).round().add(point.zero_point).clamp(0, 255)
        errors.append(float(((steps - point.zero_point) * point.scale - x).square().sum()))
    assert errors[1] <= errors[0] * 1.001


# ---- options and errors

def test_ignore_leaves_layers_float_and_names_what_matched_nothing():
    network, task, _ = prepared(Residual(), 3, 8, 8)
    plan = Quantize(ignore=("stem", "lin*", "nowhere.*")).plan(network, task)
    assert sorted(s.weight for s in plan.stored) == ["conv1.weight", "conv2.weight"]
    reasons = {s.path: s.reason for s in plan.skipped}
    assert reasons["stem.weight"] == "named in ignore='stem'"
    assert reasons["nowhere.*"] == "this pattern of ignore matched no layer"


def test_small_networks_say_that_their_files_may_grow():
    assert Quantize().plan(*prepared(nn.Linear(4, 4), 4)[:2]).grows == ("bytes",)
    assert Quantize().plan(*prepared(nn.Linear(128, 128), 128)[:2]).grows == ()


@pytest.mark.parametrize(("step", "message"), [
    (Quantize(weights="int9"), "did you mean 'int8'"),
    (Quantize(activations="unit8"), "did you mean 'uint8'"),
    (Quantize(ranges="minmac"), "expected one of 'minmax', 'mse'"),
    (Quantize(weight_ranges="l2"), "expected one of 'minmax', 'mse'"),
])
def test_unknown_options_are_answered(step, message):
    network, task, _ = prepared(nn.Linear(4, 4), 4)
    with pytest.raises(RecipeError, match=message):
        step.plan(network, task)


def test_missing_empty_and_bad_calibration_data():
    network, _, _ = prepared(nn.Linear(4, 4), 4)
    with pytest.raises(TaskError, match="calibration split and none was given"):
        Quantize().plan(network, fw.Task())
    with pytest.raises(TaskError, match="calibration split is empty"):
        Quantize().plan(network, fw.Task(calibration=list))
    bad = torch.full((2, 4), float("inf"))
    with pytest.raises(TaskError, match="not finite on the calibration data"):
        Quantize().plan(network, fw.Task(calibration=lambda: [(bad, None)]))


def test_calibration_batches_bounds_what_is_read():
    network, _, _ = prepared(nn.Linear(4, 4), 4)
    seen = []

    def batches():
        for i in range(10):
            seen.append(i)
            yield torch.full((2, 4), float(i)), None

    plan = Quantize(calibration_batches=3).plan(network, fw.Task(calibration=batches))
    assert max(seen) <= 3
    assert next(p for p in plan.points).scale == pytest.approx(2 / 255)


def test_a_plan_for_another_network_is_refused():
    network, task, _ = prepared(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), 8)
    plan = Quantize().plan(network, task)
    with pytest.raises(PlanError, match="plan again for"):
        plan.apply(prepared(nn.Linear(8, 8), 8)[0])
    with pytest.raises(PlanError, match="plan again for"):
        plan.apply(prepared(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), 8)[0])
    with pytest.raises(PlanError, match="lie beside it"):
        Plan.from_json(plan.to_json()).apply(network)
