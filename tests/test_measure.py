"""measure/: every count against a slow, obvious second way of counting; timing, scores and the whole measurement."""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import featherweight as fw
from featherweight import measure
from featherweight.errors import FileError, TaskError
from featherweight.network import Network
from featherweight.network.edit import insert_call, tensor_node

torch.set_num_threads(1)
aten = torch.ops.aten


def captured(model: nn.Module, *inputs: Tensor) -> Network:
    network = fw.capture(model.eval(), inputs)
    assert isinstance(network, Network)
    return network


def total(model: nn.Module, *inputs: Tensor) -> int:
    counted = measure.macs(captured(model, *inputs))
    assert counted.uncounted == ()
    return counted.total


# ---- MACs

def loop_count(conv: nn.Module, height: int, width: int) -> int:
    """Counts the products of a convolution one position at a time, from its definition: output row r reads input rows
    r * stride + dilation * k - padding, padding included."""
    rows = (height + 2 * conv.padding[0] - conv.dilation[0] * (conv.kernel_size[0] - 1) - 1) // conv.stride[0] + 1
    columns = (width + 2 * conv.padding[1] - conv.dilation[1] * (conv.kernel_size[1] - 1) - 1) // conv.stride[1] + 1
    count = 0
    inputs_per_group = conv.in_channels // conv.groups
    for _o, _r, _c in itertools.product(range(conv.out_channels), range(rows), range(columns)):
        for _i, _h, _w in itertools.product(range(inputs_per_group), *(range(k) for k in conv.kernel_size)):
            count += 1
    return count


@pytest.mark.parametrize("options", [
    {}, {"stride": 2, "padding": 1}, {"groups": 4}, {"groups": 2, "dilation": 2, "padding": 2}, {"padding": "same"}])
def test_convolution_against_a_loop(options):
    conv = nn.Conv2d(4, 8, (3, 2), **options)
    given = torch.randn(2, 4, 7, 6)
    if options.get("padding") == "same":
        expected = total(nn.Sequential(nn.ZeroPad2d((0, 1, 1, 1)), nn.Conv2d(4, 8, (3, 2))), given)
        assert expected == loop_count(nn.Conv2d(4, 8, (3, 2)), 9, 7)
    else:
        expected = loop_count(conv, 7, 6)
    assert total(conv, given) == expected


def test_transposed_convolution_against_a_scatter_loop():
    conv = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
    count = 0
    for _i, _h, _w in itertools.product(range(4), range(5), range(5)):  # every input element
        for _o, _r, _c in itertools.product(range(6 // 2), range(3), range(3)):  # goes to the outputs of its group
            count += 1
    assert total(conv, torch.randn(2, 4, 5, 5)) == count


def test_one_and_three_dimensional_convolutions():
    assert total(nn.Conv1d(3, 5, 4), torch.randn(2, 3, 10)) == 5 * 7 * 3 * 4
    assert total(nn.Conv3d(2, 3, 2), torch.randn(2, 2, 4, 4, 4)) == 3 * 27 * 2 * 8
    assert total(nn.ConvTranspose1d(3, 5, 4), torch.randn(2, 3, 10)) == 3 * 10 * 5 * 4


class Products(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run
        self.w = nn.Parameter(torch.randn(6, 5))

    def forward(self, x):
        return self.run(x, self.w)


@pytest.mark.parametrize(("run", "expected"), [
    (lambda x, w: x @ w, 4 * 6 * 5),
    (lambda x, w: torch.bmm(x, x.transpose(1, 2)), 4 * 6 * 4),
    (lambda x, w: torch.baddbmm(x[:, :, :4], x, x.transpose(1, 2)), 4 * 6 * 4),
    (lambda x, w: torch.addmm(w[0], x[:, 0], w), 6 * 5),
    (lambda x, w: torch.einsum("nti,io->nto", x, w), 4 * 6 * 5),
    (lambda x, w: torch.einsum("n...i,io->n...o", x, w), 4 * 6 * 5),
    (lambda x, w: torch.einsum("nti,nsi->nts", x, x), 4 * 4 * 6),
    (lambda x, w: torch.einsum("nti,nti->nti", x, x), 0),  # element by element: no sum
    (lambda x, w: torch.einsum("nti->nit", x), 0),
    (lambda x, w: torch.einsum("nti,io,po->ntp", x, w, w), 4 * 6 * 5 + 4 * 5 * 6),
    (lambda x, w: F.scaled_dot_product_attention(x, x[:, :3], x[:, :3]), 4 * 3 * (6 + 6)),
    (lambda x, w: torch.softmax(x, -1).relu() + 1, 0),
    (lambda x, w: x @ (w @ w.T) @ w, 4 * 6 * 6 + 4 * 6 * 5),  # w @ w.T depends on no input: multiplied out once
])
def test_matrix_products(run, expected):
    assert total(Products(run), torch.randn(3, 4, 6)) == expected


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_against_their_cells(kind):
    layer = kind(5, 7, num_layers=2, bidirectional=True, batch_first=True)
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind.__name__]
    per_step = 0
    for inputs in (5, 14):  # the second layer reads both directions of the first
        for _direction in range(2):
            per_step += gates * 7 * inputs + gates * 7 * 7
    network = captured(layer, torch.randn(2, 9, 5))
    assert measure.macs(network).total == 9 * per_step
    assert measure.params(network) == sum(p.numel() for p in layer.parameters())


class Block(nn.Module):
    """A CIFAR residual block with a zero-padded identity (option A)."""

    def __init__(self, i, o, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.stride, self.grow = stride, o - i

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.grow:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.grow // 2, self.grow // 2))
        return F.relu(x + y)


def resnet(blocks=3):
    layers, i = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()], 16
    for o in (16, 32, 64):
        for _ in range(blocks):
            layers.append(Block(i, o, 1 if i == o else 2))
            i = o
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def test_resnet20_has_its_known_figures():
    network = captured(resnet(), torch.randn(2, 3, 32, 32))
    counted = measure.macs(network)
    assert counted.total == 40_551_040  # 40.55 M, He et al. 2016 with convolutions and the last layer
    assert counted.uncounted == ()
    assert measure.params(network) == 269_722
    rows = measure.layers(network)
    assert sum(r.params for r in rows) == 269_722
    assert sum(r.macs for r in rows) == counted.total
    first = rows[0]
    assert (first.path, first.weight, first.shape, first.output) == ("0", "0.weight", (16, 3, 3, 3), (1, 16, 32, 32))
    assert (first.params, first.bytes, first.dtype) == (432, 1728, "float32")
    json.dumps([r.to_dict() for r in rows])


def test_an_unknown_operator_is_named_and_can_be_taught():
    class Spectrum(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(8, 8)
            self.inner = Products(lambda x, w: torch.fft.rfft(x).real)

        def forward(self, x):
            return self.inner(self.mix(x))

    network = captured(Spectrum(), torch.randn(2, 8))
    counted = measure.macs(network)
    assert counted.total == 64
    assert counted.uncounted == ("inner (aten.fft_rfft.default)",)
    assert [r.macs for r in measure.layers(network)] == [64, None]
    measure.COUNTERS["aten.fft_rfft"] = lambda arguments, out: math.prod(arguments["self"].shape)
    try:
        assert measure.macs(network).total == 72
    finally:
        del measure.COUNTERS["aten.fft_rfft"]


def test_counts_do_not_depend_on_the_example_batch():
    assert total(resnet(1), torch.randn(5, 3, 16, 16)) == total(resnet(1), torch.randn(1, 3, 16, 16))


# ---- weights

def test_tied_weights_count_once_and_zeros_are_seen():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(11, 4)
            self.head = nn.Linear(4, 11)
            self.head.weight = self.words.weight
            self.spare = nn.Linear(3, 3)  # never run, still in the file

        def forward(self, x):
            return self.head(self.words(x))

    model = Tied()
    with torch.no_grad():
        model.words.weight[3] = 0
        model.head.bias.zero_()
        model.spare.weight.zero_()
    network = captured(model, torch.tensor([[1, 2], [3, 4]]))
    assert measure.params(network) == sum(p.numel() for p in model.parameters()) == 44 + 11 + 12
    assert measure.nonzeros(network) == sum(int(p.count_nonzero()) for p in model.parameters())
    assert measure.macs(network).total == 2 * 4 * 11
    assert [r.params for r in measure.layers(network)] == [44, 11]


def with_decoded_weight(decode) -> tuple[Network, Tensor]:
    """A linear network whose weight [6, 8] is stored by ``decode(network, before)`` -> the node that gives it."""
    network = captured(nn.Linear(8, 6), torch.randn(2, 8))
    call = network.calls(aten.linear.default)[0]
    node = decode(network, call)
    call.args = (call.args[0], node, call.args[2])
    network.graph.eliminate_dead_code()
    network.remove_tensor("weight")
    network.changed()
    return network, network(torch.eye(8)).detach() - network.tensor("bias")


def test_integer_weights_count_as_the_weights_they_stand_for():
    def decode(network, before):
        codes = torch.randint(-127, 128, (6, 8), dtype=torch.int8)
        codes[2] = 0
        network.add_tensor("q", codes)
        network.add_tensor("s", torch.rand(6) + 0.5, buffer=True)
        network.add_tensor("z", torch.zeros(6, dtype=torch.int64))
        q, s, z = (tensor_node(network, n, before) for n in "qsz")
        return insert_call(network, torch.ops.quantized_decomposed.dequantize_per_channel.default,
                           (q, s, z, 0, -127, 127, torch.int8), before=before)

    network, weight = with_decoded_weight(decode)
    bias = network.tensor("bias")
    assert measure.params(network) == 48 + 6
    assert measure.nonzeros(network) == int(weight.count_nonzero()) + int(bias.count_nonzero())
    assert measure.macs(network).total == 48
    (row,) = measure.layers(network)
    assert (row.weight, row.shape, row.dtype, row.macs) == ("q", (6, 8), "int8", 48)
    assert row.bytes == 48 + 6 * 4 + 6 * 8 + 6 * 4  # codes, scales, zero points, bias


def test_a_codebook_counts_as_the_weights_it_gives():
    def decode(network, before):
        network.add_tensor("book", nn.Parameter(torch.tensor([0.0, 0.5, -1.0])))
        network.add_tensor("index", torch.randint(0, 3, (6, 8), dtype=torch.uint8))
        book, index = (tensor_node(network, n, before) for n in ("book", "index"))
        wide = insert_call(network, aten.to.dtype, (index, torch.int64), before=before)
        return insert_call(network, aten.index.Tensor, (book, [wide]), before=before)

    network, weight = with_decoded_weight(decode)
    assert measure.params(network) == 48 + 6
    assert measure.nonzeros(network) == int((weight.abs() > 1e-6).sum()) + int(network.tensor("bias").count_nonzero())
    assert measure.macs(network).total == 48
    assert measure.layers(network)[0].bytes == 48 + 3 * 4 + 6 * 4


def test_a_table_looked_up_by_position_counts_its_own_elements():
    class Bias(nn.Module):  # as Swin's relative position bias: 5 learned values, read 9 times
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(5))
            self.register_buffer("place", torch.arange(9) % 5)

        def forward(self, x):
            return x + self.table[self.place]

    assert measure.params(captured(Bias(), torch.randn(2, 9))) == 5


# ---- time

def test_interleaving_shares_noise_and_finds_the_slower_one():
    order = []

    def call(name, pause):
        def run():
            order.append(name)
            time.sleep(pause)
        return run

    timed = measure.interleave({"a": call("a", 0.001), "b": call("b", 0.004)}, rounds=15, warmup=1, threads=2, batch=4,
                               runtime="sleep", versions={"x": "1"})
    assert 2 < timed["b"].median_s / timed["a"].median_s < 6
    one = timed["a"]
    assert one.q1_s <= one.median_s <= one.q3_s
    assert (one.rounds, one.threads, one.batch, one.runtime, one.versions) == (15, 2, 4, "sleep", {"x": "1"})
    rounds = [tuple(order[i:i + 4:2]) for i in range(2, len(order), 4)]
    assert len(rounds) == 15
    assert all(sorted(r) == ["a", "b"] for r in rounds)
    assert len(set(rounds)) == 2  # no one always comes first


def test_interleaving_by_time_stops():
    began = time.perf_counter()
    timed = measure.interleave({"": lambda: time.sleep(0.001)}, seconds=0.2)
    assert timed[""].rounds >= 11
    assert time.perf_counter() - began < 2


# ---- scores

def batches(*pairs):
    return iter(pairs)


def test_top_k_against_sorting():
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 10), torch.randint(0, 10, (50,))
    for score, k in ((measure.scores.top1, 1), (measure.scores.top5, 5)):
        right = sum(int(label in sorted(range(10), key=lambda i, row=row: -row[i])[:k])
                    for row, label in zip(logits.tolist(), labels.tolist(), strict=True))
        halves = batches((logits[:30], labels[:30]), (logits[30:], labels[30:]))
        assert score(lambda x: x, halves) == pytest.approx(100 * right / 50)


@pytest.mark.parametrize("wrap", [
    lambda x: {"aux": x * 0, "logits": x}, lambda x: (x, x * 0), lambda x: {"a": x}, lambda x: [x]])
def test_scores_find_the_output_in_a_nest(wrap):
    logits = torch.eye(4)
    assert measure.scores.top1(wrap, batches((logits, torch.arange(4)))) == 100.0
    assert measure.scores.top1(lambda a, b: wrap(a), batches(({"a": logits, "b": 1}, torch.arange(4)))) == 100.0


def test_mean_iou_against_sets_of_pixels():
    torch.manual_seed(0)
    logits, truth = torch.randn(3, 4, 6, 6), torch.randint(0, 3, (3, 6, 6))
    truth[0, 0] = 255
    found = logits.argmax(1)
    ious = []
    for c in range(4):
        seen = {p for p in itertools.product(range(3), range(6), range(6)) if truth[p] != 255}
        a, b = {p for p in seen if found[p] == c}, {p for p in seen if truth[p] == c}
        ious.append(len(a & b) / len(a | b))
    value = measure.scores.mean_iou(lambda x: x, batches((logits[:2], truth[:2]), (logits[2:], truth[2:])))
    assert value == pytest.approx(100 * sum(ious) / 4)


def test_scores_refuse_what_they_cannot_judge():
    with pytest.raises(TaskError, match="no batches"):
        measure.scores.top1(lambda x: x, batches())
    with pytest.raises(TaskError, match=r"targets \[n\]; got \[2, 3\] and \[3\]"):
        measure.scores.top1(lambda x: x, batches((torch.randn(2, 3), torch.arange(3))))
    with pytest.raises(TaskError, match="holds no tensor"):
        measure.scores.top1(lambda x: {}, batches((torch.randn(2, 3), torch.arange(2))))
    with pytest.raises(TaskError, match=r"outside 0\.\.2"):
        measure.scores.mean_iou(lambda x: x, batches((torch.randn(1, 3, 2, 2), torch.full((1, 2, 2), 3))))


# ---- the whole

class FakeRunner:
    versions = {"fake": "1"}  # noqa: RUF012
    precision = "f32"

    def __init__(self, network):
        self.network, self.calls, self.closed = network, [], False

    def __call__(self, *args, **kwargs):
        assert not self.closed
        self.calls.append(args[0].shape[0])
        with torch.no_grad():
            return self.network(*args, **kwargs)

    def close(self):
        self.closed = True


class FakeTarget:
    """A runtime that is the saved network itself, and always answers with a wrong second class."""

    name, package, suffix = "fake", "torch", ".bin"

    def __init__(self):
        self.runners = []

    def export(self, network, path):
        return network.save(path) + 1

    def load(self, path, threads=1, *, like):
        self.runners.append(FakeRunner(fw.load(path)))
        return self.runners[-1]


def small_task(**splits):
    torch.manual_seed(0)
    x = torch.randn(40, 8)
    return fw.Task(score=measure.scores.top1, score_name="top1",
                   **(splits or {"validation": lambda: [(x[:30], x[:30].argmax(1)), (x[30:], x[30:].argmax(1))]}))


def test_measure_reports_the_deployed_file(tmp_path):
    network, task, target = captured(nn.Linear(8, 8), torch.randn(2, 8)), small_task(), FakeTarget()
    found = measure.measure(network, task, target, workdir=tmp_path, step="float", seconds=0.05)
    assert (found.step, found.params, found.macs, found.target, found.split) == ("float", 72, 64, "fake", "validation")
    assert found.network_bytes == (tmp_path / "network.fw").stat().st_size
    assert found.file_bytes == (tmp_path / "model.bin").stat().st_size + 1
    assert found.score == measure.scores.top1(network, task.batches("validation"))
    assert found.agreement.ok
    assert found.agreement.max_abs == 0
    assert found.latency.runtime == "fake"
    assert found.latency.batch == 1
    assert (found.archive_bytes, found.memory_bytes) == (None, None)
    runner = target.runners[0]
    assert runner.closed
    assert set(runner.calls) == {1, 10, 30}  # timed at one; compared and scored in the split's batches
    assert found == measure.Measurement.from_dict(json.loads(json.dumps(found.to_dict())))
    beside = measure.measure(network, task, target, workdir=tmp_path / "b", seconds=0.05,
                             beside={"before": tmp_path / "model.bin"})
    assert beside.beside["before"].rounds == beside.latency.rounds
    assert all(r.closed for r in target.runners)


def test_measure_without_data_has_no_score():
    network = captured(nn.Linear(8, 8), torch.randn(2, 8))
    found = measure.measure(network, fw.Task(), FakeTarget(), seconds=0.05)
    assert (found.score, found.split) == (None, None)
    assert found.latency.median_s > 0
    with pytest.raises(FileError, match="no measurement"):
        measure.Measurement.from_dict({"params": "many"})


def test_measure_in_onnx_runtime(tmp_path):
    network = captured(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), torch.randn(2, 8))
    task = small_task()
    found = measure.measure(network, task, workdir=tmp_path, seconds=0.1, memory=True, archive=True)
    assert found.file_bytes == Path(tmp_path, "model.onnx").stat().st_size
    assert found.agreement.ok
    assert found.score == pytest.approx(measure.scores.top1(network, task.batches("validation")))
    assert "onnxruntime" in found.latency.versions
    assert found.memory_bytes is None or 0 < found.memory_bytes < 500e6
    assert found.archive_bytes > 0


def test_a_network_of_fixed_batch_is_timed_whole():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(4, 2, 4) * torch.ones(4, 1, 1)

    network = captured(Fixed(), torch.randn(4, 8))
    assert not network.signature.dynamic_batch
    found = measure.measure(network, fw.Task(), FakeTarget(), seconds=0.05)
    assert found.latency.batch == 4
