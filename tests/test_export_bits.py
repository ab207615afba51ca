"""Number types of 16 to 1 bits in files: as short as they claim, the same numbers in every runtime, and its kernels."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import featherweight as fw
from featherweight import codec, deploy, measure
from featherweight.deploy.onnx import types as onnx_types
from featherweight.numerics.formats import GRIDS, HALVES, WEIGHTS, weight_bits
from featherweight.quantize import Quantize

torch.set_num_threads(1)
TARGETS = ["onnxruntime", "openvino"]


LAYERS = ("stem", "conv", "grouped", "depthwise", "transposed", "linear2", "linear3", "embedding", "table", "lstm")


class Everything(nn.Module):
    """One call of each kind that has a weight, each with an output of its own."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 3, padding=1)
        self.grouped, self.depthwise = nn.Conv2d(32, 64, 3, groups=4), nn.Conv2d(32, 32, 3, groups=32)
        self.transposed = nn.ConvTranspose2d(32, 64, 2, 2)
        self.linear2, self.linear3 = nn.Linear(64, 32), nn.Linear(64, 32)
        self.embedding, self.table = nn.Embedding(100, 64), nn.Embedding(50, 32)
        self.lstm = nn.LSTM(64, 32, batch_first=True)

    def forward(self, x, v, t):
        y, e = F.relu(self.stem(x)), self.embedding(t)
        return {"conv": self.conv(y), "grouped": self.grouped(y), "depthwise": self.depthwise(y),
                "transposed": self.transposed(y), "linear2": self.linear2(v), "linear3": self.linear3(e),
                "table": self.table(t % 50), "lstm": self.lstm(e)[0]}


def inputs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, 32, 6, 6, generator=generator), torch.randn(count, 64, generator=generator),
            torch.randint(0, 100, (count, 7), generator=generator))


def task_of(*batches):
    return fw.Task(calibration=lambda: [(b, None) for b in batches])


@pytest.fixture(scope="module")
def everything():
    torch.manual_seed(0)
    return fw.capture(Everything().eval(), inputs(2, 0))


def deployed(network, name, folder):
    target = deploy.target(name)
    path = folder / f"model{target.suffix}"
    written = target.export(network, path)
    return target.load(path, like=network.signature), path, written


def optimized(path):
    """The graph as ONNX Runtime runs it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_name("optimized.onnx"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options)
    return collections.Counter(n.op_type for n in onnx.load(path.with_name("optimized.onnx")).graph.node)


def kinds_in(path):
    return collections.Counter(onnx.TensorProto.DataType.Name(i.data_type) for i in onnx.load(path).graph.initializer
                               if np.prod(i.dims) >= onnx_types.SMALLEST)


def assert_alike(network, runner, args, bound=2e-2):
    with torch.no_grad():
        wanted, given = network(*args), runner(*args)
    wanted, given = (v if isinstance(v, dict) else {"": v} for v in (wanted, given))
    worst = {k: float((wanted[k] - given[k]).abs().max() / wanted[k].abs().max()) for k in wanted}
    assert max(worst.values()) < bound, worst


# ---- every kind on every call

@pytest.mark.parametrize(("granularity", "activations", "turn"), [("channel", None, 0), (32, "uint8", 7)])
def test_every_kind_on_every_call_in_every_runtime(everything, tmp_path, granularity, activations, turn):
    mixed = {name: WEIGHTS[(i + turn) % len(WEIGHTS)] for i, name in enumerate(LAYERS)}
    step = Quantize(activations=activations, granularity=granularity, mixed=mixed, ends=None)
    args = inputs(4, 1)
    plan = step.plan(everything, task_of(args))
    assert {s.kind for s in plan.stored} == set(mixed.values())
    network = plan.apply(everything)
    network.save(tmp_path / "n.fw")
    loaded = fw.load(tmp_path / "n.fw")
    assert all(torch.equal(v, loaded.tensor(k)) and v.dtype == loaded.tensor(k).dtype
               for k, v in network.tensors().items())
    assert measure.params(network) == measure.params(everything)
    assert measure.macs(network).total == measure.macs(everything).total
    assert not measure.macs(network).uncounted
    codec.pack(tmp_path / "n.fw", tmp_path / "n.fwz")
    codec.unpack(tmp_path / "n.fwz", tmp_path / "again.fw")
    assert (tmp_path / "n.fw").read_bytes() == (tmp_path / "again.fw").read_bytes()
    for name in TARGETS:
        runner, path, _ = deployed(network, name, tmp_path)
        assert_alike(network, runner, args)
        if path.suffix == ".onnx":
            onnx.checker.check_model(str(path), full_check=True)


# ---- bytes

@pytest.fixture(scope="module")
def wide():
    torch.manual_seed(0)
    return fw.capture(nn.Linear(256, 256).eval(), torch.randn(2, 256))


@pytest.mark.parametrize("kind", ["int8", "int4", "int2"])
def test_many_outputs_have_as_many_zero_points(tmp_path, kind):
    """So many that, taken for weights, they would be stored in fewer bits than the numbers that they belong to."""
    torch.manual_seed(0)
    network = fw.capture(nn.Linear(32, 2 * onnx_types.SMALLEST).eval(), torch.randn(2, 32))
    quantized = Quantize(kind, activations=None, ends=None).plan(network, fw.Task()).apply(network)
    for name in TARGETS:
        assert_alike(quantized, deployed(quantized, name, tmp_path)[0], (torch.randn(4, 32),))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_our_file_takes_as_many_bits_as_it_says(wide, tmp_path, kind):
    network = Quantize(kind, activations=None, ends=None).plan(wide, fw.Task()).apply(wide)
    bits = {**{k: weight_bits(k) for k in WEIGHTS}, "ternary": 2}[kind]
    weights = 256 * 256 * bits / 8
    # scales and biases of four bytes, zero points of one; the graph
    assert weights <= network.save(tmp_path / "n.fw") < weights + 256 * 9 + 4000


@pytest.mark.parametrize(("kind", "bits", "stored"), [("int4", 4, "INT4"), ("ternary", 2, "INT2"), ("int2", 2, "UINT2"),
                                                      ("bf16", 16, "BFLOAT16")])
def test_deployed_files_take_few_bytes(wide, tmp_path, kind, bits, stored):
    network = Quantize(kind, activations=None, ends=None).plan(wide, fw.Task()).apply(wide)
    runner, path, written = deployed(network, "onnxruntime", tmp_path)
    assert_alike(network, runner, (torch.randn(3, 256),))
    if onnx_types.narrowest_of_runtime() <= 2 or bits > 2:
        assert written < 256 * 256 * bits / 8 + 256 * 9 + 2000
        assert stored in kinds_in(path)
    if bits < 8:
        assert optimized(path)["MatMulNBits"] == 1


@pytest.mark.parametrize(("kind", "bits"), [("int4", 4), ("fp16", 16)])
def test_openvino_files_take_few_bytes(wide, tmp_path, kind, bits):
    network = Quantize(kind, activations=None, ends=None).plan(wide, fw.Task()).apply(wide)
    runner, path, _ = deployed(network, "openvino", tmp_path)
    assert_alike(network, runner, (torch.randn(3, 256),))
    assert path.with_suffix(".bin").stat().st_size < 256 * 256 * bits / 8 + 256 * 9 + 2000


@pytest.mark.parametrize(("numbers", "narrowest", "kind"), [
    (range(-8, 8), 2, "INT4"), ([-2, 1], 2, "INT2"), ([-3, -1, 1, 3], 2, "UINT2"), ([-3, -1, 1, 3], 4, "INT4"),
    (range(-112, 113, 16), 2, "UINT4"), ([-9, 0, 1], 2, "UINT2"), ([100], 2, "UINT2"), ([0, 1], 8, None),
    (range(-8, 9), 2, None),
])
def test_the_narrowest_type_is_found(numbers, narrowest, kind):
    array = np.array(numbers, np.int8)
    found = onnx_types.kind_of(array, narrowest)
    assert (found and found[0]) == kind
    if kind is not None and kind.startswith("U"):
        assert np.array_equal(found[1], np.sort(array))


LARGE = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**100}  # beyond the other one


def test_halves_are_seen_bit_by_bit():
    for dtype, name in ((torch.float16, "FLOAT16"), (torch.bfloat16, "BFLOAT16")):
        values = torch.cat([torch.randn(300).to(dtype).float(), torch.tensor([0.0, -0.0, float("inf"), LARGE[dtype]])])
        assert onnx_types.half_of(values.numpy()) == name
    assert onnx_types.half_of(np.array([1e-3, 1e5], np.float32)) is None


# ---- kernels

class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 32, 3, 1, 1), nn.Conv2d(32, 32, 3, 1, 1), nn.Conv2d(32, 32, 3, 1, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = F.relu(self.c(F.relu(self.b(x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def convolutions():
    torch.manual_seed(0)
    return fw.capture(Convolutions().eval(), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(("kind", "granularity"), [("int4", "tensor"), ("ternary", "channel")])
def test_convolutions_of_few_bits_run_on_whole_numbers(convolutions, tmp_path, kind, granularity):
    x = torch.randn(16, 3, 8, 8)
    network = Quantize(kind, granularity=granularity).plan(convolutions, task_of(x)).apply(convolutions)
    runner, path, written = deployed(network, "onnxruntime", tmp_path)
    assert written < 32 * 32 * 9 * 2 * weight_bits(kind) / 8 + 12000
    assert optimized(path)["QLinearConv"] == 3
    assert_alike(network, runner, (x,))


def test_convolutions_on_floats_read_their_weights_once(convolutions, tmp_path):
    network = Quantize("int4", activations=None).plan(convolutions, fw.Task()).apply(convolutions)
    runner, path, _ = deployed(network, "onnxruntime", tmp_path)
    ran = optimized(path)
    assert ran["Conv"] == 3
    assert not ran["DequantizeLinear"]
    assert_alike(network, runner, (torch.randn(3, 3, 8, 8),))


def test_groups_between_rounded_values_are_not_rounded_again(convolutions, tmp_path):
    """ONNX Runtime makes one grid of 8 bits of any float weight that it finds between rounded values."""
    x = torch.randn(16, 3, 8, 8)
    network = Quantize("int4", granularity=16, ends=None).plan(convolutions, task_of(x)).apply(convolutions)
    runner, path, _ = deployed(network, "onnxruntime", tmp_path)
    assert optimized(path)["Conv"] >= 2
    assert_alike(network, runner, (x,), 1e-2)


def test_a_group_of_a_whole_row_is_a_scale_per_channel(convolutions):
    plan = Quantize("int4", activations=None, granularity=27, ends=None).plan(convolutions, fw.Task())
    assert (plan.stored[0].weight, plan.stored[0].group) == ("a.weight", None)


def test_biases_are_rounded_finely_where_sums_are_coarse(tmp_path):
    """Sums of 1-bit values times 1-bit weights step by much: a bias rounded to such a step is another bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1))
    network = fw.capture(model.eval(), torch.randn(2, 16, 5, 5))
    x = torch.randn(16, 16, 5, 5)
    step = Quantize("binary", activations="uint1", ends=None, correct_bias=False, mixed={"2": "int8/uint8"})
    plan = step.plan(network, task_of(x))
    quantized = plan.apply(network)
    _, path, _ = deployed(quantized, "onnxruntime", tmp_path)
    model = onnx.load(path)
    held = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    step = held["0.bias_scale"]
    assert optimized(path)["QLinearConv"] == 1
    assert np.abs(held["0.bias_whole"] * step - network.tensor("0.bias").detach().numpy()).max() <= step.max() / 2
    assert step.max() <= plan.points[0].scale * plan.tensors["0.weight_scale"].max() / 64


# ---- values of few bits

#: fewest and most numbers, even and odd, from zero up and on both sides
SOME = ("uint1", "uint2", "uint4", "uint7", "int2", "int4", "int7")


class Branches(nn.Module):
    """One linear call for every kind of value, each on a value of its own."""

    def __init__(self):
        super().__init__()
        for kind in SOME:
            self.add_module(kind, nn.Linear(16, 8))

    def forward(self, x):
        return {k: getattr(self, k)(torch.sin(x * (i + 1))) for i, k in enumerate(SOME)}


@pytest.mark.parametrize("target", TARGETS)
def test_values_of_every_kind_are_cut_off_at_their_ends(tmp_path, target):
    torch.manual_seed(0)
    network = fw.capture(Branches().eval(), torch.randn(2, 16))
    weights = "int7" if target == "openvino" and fw.deploy.saturates() else "int8"
    mixed = {k: f"{weights}/{k}" for k in SOME}
    # the grids are chosen on smaller values than come later, so that there is something to cut off
    plan = Quantize(activations="uint8", mixed=mixed, target=target).plan(network, task_of(torch.randn(8, 16) * 0.02))
    assert {p.kind for p in plan.points} == set(SOME)
    quantized = plan.apply(network)
    runner, _, _ = deployed(quantized, target, tmp_path)
    assert_alike(quantized, runner, (torch.randn(64, 16),), 1e-2)


def test_a_value_that_rounds_the_other_way_is_allowed_for(convolutions, tmp_path):
    x = torch.randn(16, 3, 8, 8)
    wide, narrow = (Quantize(activations=a).plan(convolutions, task_of(x)).apply(convolutions)
                    for a in ("uint8", "uint4"))
    runner, _, _ = deployed(narrow, "onnxruntime", tmp_path)
    found = deploy.verify(narrow, runner, (x,))
    assert found.ok
    assert found.tolerance == pytest.approx(3 / 15)
    assert deploy.verify(wide, runner, (x,)).tolerance == deploy.QUANTIZED_TOLERANCE


# ---- tables and recurrent calls

def test_tables_look_up_whole_numbers_and_halves(everything):
    for kind, again in itertools.product(["int4", "fp16"], [None, "uint8"]):
        plan = Quantize(kind, activations=again, ends=None).plan(everything, task_of(inputs(4, 1)))
        network = plan.apply(everything)
        rows = [str(n.args[0].target) for n in network.calls(torch.ops.aten.embedding.default)]
        assert rows.count("embedding.weight") == 1
        assert network.tensor("embedding.weight").dtype == (HALVES.get(kind) or torch.int8)
        assert next(w for w in measure.weights(network) if w.name == "embedding.weight").numel == 6400
        args = inputs(3, 2)
        want = everything.tensor("table.weight").detach()[args[2] % 50]
        step = want.abs().max() / (GRIDS["int4"].highest if kind == "int4" else 1024)
        assert (network(*args)["table"] - want).abs().max() < step


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_are_stored(make):
    torch.manual_seed(0)
    network = fw.capture(make(16, 8, num_layers=2, bidirectional=True, batch_first=True).eval(), torch.randn(2, 3, 16))
    plan = Quantize("int4", activations=None, ends=None).plan(network, fw.Task())
    assert [s.weight for s in plan.stored] == [n for n in network.tensors() if n.startswith("weight")]
    assert len(plan.stored) == 8
    quantized, x = plan.apply(network), torch.randn(5, 3, 16)
    read_back = network.copy()
    for stored in plan.stored:
        weight, scale = network.tensor(stored.weight).detach(), plan.tensors[f"{stored.weight}_scale"][:, None]
        numbers = (weight.double() / scale).round().clamp(-7, 7)
        assert torch.equal(quantized.tensor(stored.weight), numbers.to(torch.int8))
        read_back.set_tensor(stored.weight, numbers.float() * scale)
    torch.testing.assert_close(quantized(x)[0], read_back(x)[0])
    left = Quantize("int4", activations=None, ends=None, ignore=("weight_hh*",)).plan(network, fw.Task())
    assert {s.weight for s in left.stored} == {s.weight for s in plan.stored if "ih" in s.weight}
