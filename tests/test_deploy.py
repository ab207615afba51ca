"""Deployment: the exported file gives what the network gives, in the network's nest, or the export says why not."""

from __future__ import annotations

import contextlib
import dataclasses

import onnx
import onnx_ir
import pytest
import torch
import torch.nn.functional as F
from onnxscript import optimizer
from torch import nn
from torch.utils import _pytree as pytree

import featherweight as fw
from featherweight import deploy
from featherweight.deploy.onnx import model as exporting
from featherweight.deploy.onnx import tables
from featherweight.errors import ExportError, InputError


def conv_bn() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return model.eval()


def deployed(network, tmp_path, threads=1):
    target = deploy.target("onnxruntime")
    path = tmp_path / "model.onnx"
    written = target.export(network, path)
    assert written == path.stat().st_size
    return target.load(path, threads, like=network.signature), path


def assert_agrees(network, runner, batch=3):
    args, kwargs = network.example_inputs(batch, seed=5)
    agreement = deploy.verify(network, runner, args, kwargs)
    assert agreement.ok, agreement
    assert agreement.max_rel < 1e-5


def test_file_runs_like_the_network_at_any_batch(tmp_path):
    network = fw.capture(conv_bn(), torch.randn(2, 3, 8, 8))
    runner, _ = deployed(network, tmp_path)
    for batch in (1, 2, 7):
        assert_agrees(network, runner, batch)
    assert set(runner.versions) == {"onnxruntime", "onnx"}


def test_file_is_folded_small_and_named(tmp_path):
    network = fw.capture(conv_bn(), torch.randn(2, 3, 8, 8))
    _, path = deployed(network, tmp_path)
    model = onnx.load(path)
    assert [i.name for i in model.graph.input] == ["input"]
    assert [o.name for o in model.graph.output] == ["output"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert "BatchNormalization" not in {n.op_type for n in model.graph.node}
    assert {"0.weight", "5.weight", "5.bias"} <= {i.name for i in model.graph.initializer}
    stored = sum(len(i.raw_data) for i in model.graph.initializer)
    assert path.stat().st_size < stored + 3000
    assert not any(n.metadata_props or n.doc_string for n in model.graph.node)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx"]


def test_export_leaves_the_network_as_it_was(tmp_path):
    network = fw.capture(conv_bn(), torch.randn(2, 3, 8, 8)).train()
    before = {k: v.clone() for k, v in network.tensors().items()}
    calls = [n.name for n in network.calls()]
    deployed(network, tmp_path)
    assert network.training
    assert [n.name for n in network.calls()] == calls
    assert all(torch.equal(before[k], v) for k, v in network.tensors().items())


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    extra: dict


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x, unused, more):
        y = self.a(x) + more["bias"]
        return Answer(y, {"again": y, "same": x, "list": [y.argmax(1), None], "number": 3})


def test_nests_unused_inputs_and_constants(tmp_path):
    inputs = (torch.randn(2, 4), torch.randn(2, 1), {"bias": torch.randn(2, 3)})
    network = fw.capture(Nested().eval(), inputs)
    runner, path = deployed(network, tmp_path)
    given = runner(*inputs)
    want = network(*inputs)
    assert isinstance(given, Answer)
    assert given.extra["number"] == 3
    assert given.extra["list"][1] is None
    torch.testing.assert_close(given.logits, want.logits)
    torch.testing.assert_close(given.extra["same"], inputs[0])
    assert torch.equal(given.extra["list"][0], want.extra["list"][0])
    assert_agrees(network, runner)
    assert onnx.load(path).graph.output[0].name == "logits"


class Keywords(nn.Module):
    def forward(self, x, scale=None):
        return {"double": x * 2, "scaled": x * scale}, x.shape[0]


def test_keywords_and_sizes_as_outputs(tmp_path):
    network = fw.capture(Keywords().eval(), {"x": torch.randn(2, 3), "scale": torch.randn(2, 3)})
    runner, _ = deployed(network, tmp_path)
    got, size = runner(x=torch.ones(5, 3), scale=torch.full((5, 3), 4.0))
    assert torch.equal(got["scaled"], torch.full((5, 3), 4.0))
    assert size == network(x=torch.ones(5, 3), scale=torch.ones(5, 3))[1]


class Names(nn.Module):
    """Inputs and outputs named as the exporter names inner values."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, linear, relu):
        return {"linear": self.lin(linear), "add": F.relu(relu), "relu": linear + relu}


def test_names_that_clash_with_inner_values(tmp_path):
    network = fw.capture(Names().eval(), (torch.randn(2, 4), torch.randn(2, 4)))
    runner, path = deployed(network, tmp_path)
    onnx.checker.check_model(str(path))
    assert_agrees(network, runner)


def test_integer_inputs_and_attention(tmp_path):
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(20, 16)
            self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

        def forward(self, tokens):
            return self.layer(self.embed(tokens)).mean(1)

    torch.manual_seed(0)
    network = fw.capture(Text().eval(), torch.randint(0, 20, (2, 6)))
    runner, _ = deployed(network, tmp_path)
    tokens = torch.randint(0, 20, (4, 6))
    assert deploy.verify(network, runner, (tokens,)).ok


class Levels(nn.Module):
    """A part that is shared by values of several sizes, in a model that is captured in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.head = SharedHead()

    def forward(self, x):
        return self.head([x, x[..., ::2, ::2], x[..., ::3, ::3]]) if float(x.sum()) < 1e9 else x


class SharedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 5, 1)

    def forward(self, levels):
        return [self.a(x.relu()).sigmoid().mean((2, 3)) for x in levels]


def test_sizes_that_differ_have_names_that_differ(tmp_path):
    head = fw.capture(Levels().eval(), torch.randn(2, 4, 12, 12)).parts["head"]
    runner, path = deployed(head, tmp_path)
    for sizes in ((12, 6, 4), (7, 8, 9)):
        assert deploy.verify(head, runner, ([torch.randn(3, 4, s, s) for s in sizes],), {}).ok
    shapes = [[d.dim_param for d in i.type.tensor_type.shape.dim] for i in onnx.load(path).graph.input]
    assert [s[0] for s in shapes] == ["batch"] * 3
    assert len({n for s in shapes for n in s[2:]}) == 6


def test_fixed_batch_stays_fixed(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(2, 12) * 2

    network = fw.capture(Fixed().eval(), torch.randn(2, 3, 4))
    assert not network.signature.dynamic_batch
    runner, _ = deployed(network, tmp_path)
    assert_agrees(network, runner, 2)


def test_stored_int8_stays_int8(tmp_path):
    network = fw.capture(nn.Linear(64, 64).eval(), torch.randn(2, 64))
    weight = network.tensor("weight").detach()
    scale = weight.abs().amax(1) / 127
    network.add_tensor("packed", (weight / scale[:, None]).round().to(torch.int8), buffer=True)
    network.add_tensor("scale", scale, buffer=True)
    network.add_tensor("zero", torch.zeros(64, dtype=torch.int8), buffer=True)
    linear = network.calls(torch.ops.aten.linear.default)[0]
    graph = network.graph
    with graph.inserting_before(linear):
        packed, scales, zero = (graph.create_node("get_attr", n) for n in ("packed", "scale", "zero"))
        whole = graph.call_function(torch.ops.quantized_decomposed.dequantize_per_channel.default,
                                    (packed, scales, zero, 0, -127, 127, torch.int8))
    linear.args = (linear.args[0], whole, *linear.args[2:])
    network.changed()
    runner, path = deployed(network, tmp_path)
    assert path.stat().st_size < 64 * 64 + 3000
    assert deploy.verify(network, runner, (torch.randn(3, 64),)).max_rel < 2e-2  # what it reads is rounded to 8 bits


def test_large_sums_of_whole_numbers_are_exact_on_every_processor(tmp_path):
    """255 * 127 twice is more than 16 bits hold."""
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 8))
    for p in model.parameters():
        nn.init.ones_(p)
    x = torch.ones(4, 8, 2, 2)
    network = fw.capture(model.eval(), x)
    quantized = fw.quantize.Quantize().plan(network, fw.Task(calibration=lambda: [(x, None)])).apply(network)
    assert deploy.verify(quantized, deployed(quantized, tmp_path)[0], (x,)).max_rel < 1e-3


def test_verify_tells_a_wrong_file(tmp_path):
    network = fw.capture(conv_bn(), torch.randn(2, 3, 8, 8))
    runner, _ = deployed(network, tmp_path)
    other = network.copy()
    other.set_tensor("5.bias", other.tensor("5.bias") + 1)
    agreement = deploy.verify(other, runner, (torch.randn(2, 3, 8, 8),))
    assert not agreement.ok
    assert agreement.max_abs == pytest.approx(1, rel=1e-3)


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(ExportError, match="did you mean 'onnxruntime'"):
        deploy.target("onnxruntim")
    network = fw.capture(conv_bn(), torch.randn(2, 3, 8, 8))
    runner, path = deployed(network, tmp_path)
    with pytest.raises(InputError, match="call it as the example inputs were"):
        runner(torch.randn(2, 3, 8, 8), torch.randn(1))
    with pytest.raises(InputError, match="expected a tensor of torch"):
        runner(torch.zeros(2, 3, 8, 8, dtype=torch.int64))
    with pytest.raises(InputError, match="refused the inputs"):
        runner(torch.randn(2, 4, 8, 8))
    runner.close()
    with pytest.raises(ExportError, match="closed"):
        runner(torch.randn(2, 3, 8, 8))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ExportError, match="does not load"):
        deploy.target("onnxruntime").load(path, like=network.signature)


def test_operator_without_onnx_form_is_named_with_its_module(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    network = fw.capture(nn.Sequential(nn.Linear(3, 3), Odd()).eval(), torch.randn(2, 3))
    with pytest.raises(ExportError, match=r"special_bessel_j0.default, called in module 1"):
        deploy.target("onnxruntime").export(network, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_attention_without_heads_and_pools_of_every_form(tmp_path):
    class Mixed(nn.Module):
        def forward(self, x, mask):
            y = F.scaled_dot_product_attention(x, x * 2, x, mask)
            image = y.unsqueeze(1).expand(-1, 3, -1, -1)
            pooled = F.adaptive_avg_pool2d(image, 1), image.mean([2, 3]), image.mean((-1, -2), keepdim=True)
            return y, pooled, image.mean([1, 2]), image.clamp(min=0)

    network = fw.capture(Mixed().eval(), (torch.randn(2, 5, 8), torch.randn(2, 5, 5)))
    runner, path = deployed(network, tmp_path)
    assert_agrees(network, runner)
    kinds = [n.op_type for n in onnx.load(path).graph.node]
    assert kinds.count("GlobalAveragePool") == 2  # the third is the first again
    assert kinds.count("ReduceMean") == 1
    assert "Max" not in kinds


class Windows(nn.Module):
    """Attention in windows: samples, windows, heads, length, width; with a mask for each window, or one for all."""

    def __init__(self, mask):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.register_buffer("mask", mask)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(3, 0, 1, 4, 2, 5)
        return F.scaled_dot_product_attention(q, k, v, self.mask).transpose(2, 3).flatten(3)


@pytest.mark.parametrize("shape", [(3, 1, 5, 5), *(pytest.param(s, marks=pytest.mark.slow) for s in ((5, 5), None))])
def test_attention_on_five_axes(shape, tmp_path):
    torch.manual_seed(0)
    model = Windows(torch.randn(shape) if shape else None).eval()
    network = fw.capture(model, torch.randn(2, 3, 5, 8), dynamic={})
    runner, _ = deployed(network, tmp_path)
    assert_agrees(network, runner)


# ---- what the exporter is spared

class Halves(nn.Module):
    """Slices of one value and of several, and what rules join to one call."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return a[:, :4] * a[:, 4:], b[:, :3].sum(1) + a[:, 3:8].sum(1), F.relu(F.relu(b)).clamp(0, 1).clamp(0, 2)


class Sums(nn.Module):
    """Calls that nothing is made of others for."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)
        self.b.weight = nn.Parameter(self.a.weight.detach() @ torch.ones(6, 8))

    def forward(self, x, scale):
        return torch.relu(self.a(x)) * scale + self.b(torch.relu(self.a(x))), scale


SPARED = {"halves": (Halves, (torch.randn(2, 6),)), "sums": (Sums, (torch.randn(2, 6), torch.ones(2, 8))),
          "convolutions": (conv_bn, (torch.randn(2, 3, 8, 8),))}


@pytest.mark.parametrize(("kind", "name"), [("float", "halves"), ("int8", "sums"), ("float", "convolutions")])
def test_what_the_exporter_is_spared_changes_no_file(tmp_path, monkeypatch, name, kind):
    """The slow, obvious way: the exporter does all that it does by itself."""
    make, inputs = SPARED[name]
    torch.manual_seed(0)
    network = fw.capture(make().eval(), inputs)
    if kind == "int8":
        network = fw.quantize.Quantize().plan(network, fw.Task(calibration=[(inputs, None)])).apply(network)
    runner, path = deployed(network, tmp_path)
    (tmp_path / "plain").mkdir()
    monkeypatch.setattr(exporting, "decompose_where_needed", lambda program: None)
    for spared in ("kept_tables", "parameters_once", "rules_where_they_apply"):
        monkeypatch.setattr(exporting, spared, contextlib.nullcontext)
    plain, other = deployed(network, tmp_path / "plain")
    args, _ = network.example_inputs(3, seed=5)
    assert all(map(torch.equal, pytree.tree_leaves(runner(*args)), pytree.tree_leaves(plain(*args))))
    graphs = [onnx.load(p).graph for p in (path, other)]
    shapes = [[(n.op_type, len(n.input), [a for a in n.attribute if a.type != onnx.AttributeProto.STRING])
               for n in graph.node] for graph in graphs]
    assert shapes[0] == shapes[1]
    assert [(i.name, i.dims, i.raw_data) for i in graphs[0].initializer if "." in i.name] \
        == [(i.name, i.dims, i.raw_data) for i in graphs[1].initializer if "." in i.name]


@pytest.mark.parametrize(("name", "whole"), [("sums", True), ("convolutions", False)])
def test_programs_are_decomposed_where_something_would_change(tmp_path, monkeypatch, name, whole):
    """A flattening is written with others; a graph of sums stays."""
    decomposed, plain = [], torch.export.ExportedProgram.run_decompositions

    def heard(program, *given, **options):
        decomposed.append(program)
        return plain(program, *given, **options)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", heard)
    make, inputs = SPARED[name]
    deployed(fw.capture(make().eval(), inputs), tmp_path)
    assert bool(decomposed) is not whole


HALVES = """<ir_version: 8, opset_import: ["": 18]>
halves (float[2, 8] x) => (float[2, 4] y)
<int64[1] zero = {0}, int64[1] half = {4}, int64[1] whole = {8}, int64[1] axis = {1}> {
    low = Slice (x, zero, half, axis)
    high = Slice (x, half, whole, axis)
    many = Relu (low)
    more = Relu (many)
    y = Mul (more, high)
}"""


def test_rules_are_tried_where_they_apply():
    found = []
    for where in (tables.rules_where_they_apply, contextlib.nullcontext):
        model = onnx_ir.serde.deserialize_model(onnx.parser.parse_model(HALVES))
        with where():
            optimizer.optimize_ir(model)
        found.append([node.op_type for node in model.graph])
    assert found[0] == found[1]
    assert found[0].count("Relu") == 1, "a rule that applies was tried"


class Bags(nn.Module):
    """Bags of a length, weighted if ``factors`` are given, in front of a linear map."""

    def __init__(self, mode, padding=None):
        super().__init__()
        self.bag, self.last = nn.EmbeddingBag(50, 8, mode=mode, padding_idx=padding), nn.Linear(8, 3)
        nn.init.normal_(self.bag.weight)

    def forward(self, x, factors=None):
        return self.last(self.bag(x, per_sample_weights=factors))


#: mode, padding, whether entries are weighted
BAGS = [(mode, padding, weighted) for mode in ("sum", "mean", "max") for padding in (None, 0)
        for weighted in (False, True) if not weighted or mode == "sum"]


def bag_inputs(weighted):
    x = torch.randint(0, 50, (4, 6))
    x[0], x[1, :3] = 0, 0  # nothing but padding, and half of it
    return (x, torch.rand(4, 6)) if weighted else (x,)


@pytest.mark.parametrize(("mode", "padding", "weighted"), BAGS)
def test_bags_of_one_length_are_no_loop(mode, padding, weighted, tmp_path):
    given = bag_inputs(weighted)
    model = Bags(mode, padding).eval()
    network = fw.capture(model, given if weighted else given[0])
    runner, path = deployed(network, tmp_path)
    assert torch.allclose(runner(*given), model(*given), atol=1e-5)
    assert "Loop" not in {node.op_type for node in onnx.load(path).graph.node}
    assert torch.equal(network(*given), model(*given))


def test_bags_of_half_precision(tmp_path):
    given, model = bag_inputs(False), Bags("mean", 0).eval().half()
    runner, _ = deployed(fw.capture(model, given[0]), tmp_path)
    assert torch.allclose(runner(*given), model(*given), atol=1e-2)
