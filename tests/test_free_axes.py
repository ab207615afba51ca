"""Sizes that stay free beside the batch: found or named, proved, kept by every step, file and runtime, and limited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight as fw
from featherweight import deploy, measure
from featherweight.errors import CaptureError, ExportError, InputError
from featherweight.network import FreeAxis, Network
from problems import unsettle

WORDS, CLASSES = 50, 3
LENGTHS = (5, 17, 64, 128)
FAMILIES = {
    "channels": fw.prune.Channels(macs=0.6), "refit": fw.prune.Channels(macs=0.6, compensate="least_squares"),
    "weights": fw.prune.Weights(sparsity=0.5, score="wanda"), "depth": fw.prune.Layers(count=1),
    "low rank": fw.factorize.LowRank(energy=0.8, data=True), "int8": fw.quantize.Quantize(),
    "dynamic": fw.quantize.Quantize(activations="dynamic"), "gptq": fw.quantize.Quantize(rounding="gptq"),
    "codebooks": fw.share.Codebook(bits=4),
}


class Encoder(nn.Module):
    """A text encoder: words and learned positions, attention with a mask, the mean of all words that count."""

    def __init__(self, width: int = 16, heads: int = 4, positions: int = 128) -> None:
        super().__init__()
        self.heads = heads
        self.words, self.positions = nn.Embedding(WORDS, width), nn.Embedding(positions, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(4)])
        self.qkv = nn.ModuleList([nn.Linear(width, 3 * width) for _ in range(2)])
        self.out = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.wide = nn.ModuleList([nn.Linear(width, 4 * width) for _ in range(2)])
        self.narrow = nn.ModuleList([nn.Linear(4 * width, width) for _ in range(2)])
        self.head = nn.Linear(width, CLASSES)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        n, t = ids.shape
        x = self.words(ids) + self.positions(torch.arange(t, device=ids.device))
        seen = mask[:, None, None, :].bool()
        for i in range(2):
            q, k, v = self.qkv[i](self.norms[2 * i](x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            x = x + self.out[i](y.transpose(1, 2).reshape(n, t, -1))
            x = x + self.narrow[i](F.gelu(self.wide[i](self.norms[2 * i + 1](x))))
        counted = mask.unsqueeze(-1).to(x.dtype)
        return self.head((x * counted).sum(1) / counted.sum(1))


def text(batch: int = 2, length: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sentences padded to the longest: the first one is shorter."""
    ids = torch.randint(1, WORDS, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, (3 * length + 3) // 4:] = 0
    return ids, mask


def made(cls: type[nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = cls()
    unsettle(model)
    return model.eval()


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return made(Encoder)


@pytest.fixture(scope="module")
def network(encoder: nn.Module) -> Network:
    found = fw.capture(encoder, text())
    assert isinstance(found, Network)
    return found


@pytest.fixture(scope="module")
def task() -> fw.Task:
    batches = [(text(4, length, length), torch.arange(4) % CLASSES) for length in (7, 12, 16, 30)]
    return fw.Task(train=batches, calibration=batches, validation=batches, loss=F.cross_entropy, score=fw.scores.top1)


# ---- found, named, fixed
def test_a_length_is_found_and_its_table_ends_it(network: Network, encoder: nn.Module) -> None:
    ids, mask = network.signature.inputs
    assert ids.axes == mask.axes == (FreeAxis(1, "size_1", example=16),)
    assert ids.limits == mask.limits == ((1, 1, 128),)
    assert any("size_1" in note for note in network.notes)
    for length in (1, *LENGTHS):
        assert torch.allclose(network(*text(3, length)), encoder(*text(3, length)), atol=1e-5), length
    with pytest.raises(InputError, match="129 along axis 1; the graph holds up to 128"):
        network(*text(2, 129))


def test_a_length_is_named(encoder: nn.Module) -> None:
    tokens = {"ids": {1: "tokens"}, "mask": {1: "tokens"}}
    found = fw.capture(encoder, text(), dynamic=tokens)
    assert [a.name for i in found.signature.inputs for a in i.axes] == ["tokens", "tokens"]
    with pytest.raises(InputError, match="both are 'tokens' and must be equal"):
        found(text(2, 9)[0], text(2, 8)[1])


def test_a_length_is_fixed_where_none_is_wanted(encoder: nn.Module) -> None:
    fixed = fw.capture(encoder, text(), dynamic={})
    assert [i.shape for i in fixed.signature.inputs] == [(None, 16), (None, 16)]
    with pytest.raises(InputError, match="has shape"):
        fixed(*text(2, 17))


@pytest.mark.parametrize(("dynamic", "said"), [
    ({"id": {1: "tokens"}}, "dynamic names the input 'id'"),
    ({"ids": {2: "tokens"}}, r"axis 2 of the input 'ids', which is a tensor of 2 axes; write dynamic="),
    ({"ids": {1: "the length"}}, "expected a name of letters"),
    ({"ids": {1: 5}}, "expected a name of letters"),
])
def test_what_cannot_be_named(encoder: nn.Module, dynamic: Any, said: str) -> None:
    with pytest.raises(CaptureError, match=said):
        fw.capture(encoder, text(), dynamic=dynamic)


def test_a_size_that_the_model_fixes_cannot_be_named() -> None:
    with pytest.raises(CaptureError, match="the model fixes axis 1 of the input 'input'"):
        fw.capture(nn.Linear(8, 4), torch.randn(2, 8), dynamic={"input": {1: "width"}})


# ---- kinds of models, and where their graphs end
class Sums(nn.Module):
    """Down and up again, added to itself: heights of a multiple of 4, or one less, fit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.up(F.relu(self.second(x))) + x


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.unsqueeze(1))
        return x * 2 if x.shape[2] > 200 else x


class Table(nn.Module):
    """Positions from a stored table, cut to the length."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(1, 40, 8))
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.table[:, : x.shape[1]])


class Windows(nn.Module):
    """Attention in windows with a mask made of the image's size: a constant where that is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = self.linear(x.permute(0, 2, 3, 1)).view(n, h // 4, 4, w // 4, 4, c)
        return x + torch.arange(h // 4, device=x.device).view(-1, 1, 1, 1, 1)


def sizes(network: Network) -> list[tuple[Any, ...]]:
    return [(a.axis, a.period, a.remainders) for i in network.signature.inputs for a in i.axes]


def test_heights_of_a_fully_convolutional_network_follow_their_pattern() -> None:
    model = made(Sums)
    found = fw.capture(model, torch.randn(2, 3, 32, 32))
    assert sizes(found) == [(2, 4, (0, 3)), (3, 4, (0, 3))]
    for h, w in ((4, 64), (31, 40), (3, 3)):
        x = torch.randn(1, 3, h, w)
        assert torch.allclose(found(x), model(x), atol=1e-5)
    with pytest.raises(InputError, match="leaves 0 or 3 when divided by 4 there: pad or crop"):
        found(torch.randn(1, 3, 33, 32))
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 3, 33, 32))


def test_a_branch_on_a_length_ends_it() -> None:
    model = made(Branch)
    found = fw.capture(model, torch.randn(2, 400))
    assert [i.limits for i in found.signature.inputs] == [((1, 10, 1009),)]
    assert torch.equal(found(torch.ones(3, 1009)), model(torch.ones(3, 1009)))
    with pytest.raises(InputError, match="1010 along axis 1"):
        found(torch.ones(2, 1010))
    assert [i.limits for i in fw.capture(model, torch.randn(2, 2000)).signature.inputs] == [((1, 1010, None),)]


def test_a_stored_table_ends_a_length() -> None:
    found = fw.capture(made(Table), torch.randn(2, 6, 8))
    assert found.signature.inputs[0].shape == (None, None, 8)
    assert found.signature.inputs[0].limits == ((1, 1, 40),)


def test_an_image_size_stays_fixed_where_a_constant_would_be_computed_at_every_run() -> None:
    model = made(Windows)
    assert fw.capture(model, torch.randn(2, 3, 16, 16)).signature.inputs[0].shape == (None, 3, 16, 16)
    named = fw.capture(model, torch.randn(2, 3, 16, 16), dynamic={"x": {2: "height", 3: "width"}})
    x = torch.randn(1, 3, 24, 40)
    assert torch.allclose(named(x), model(x), atol=1e-5)
    with pytest.raises(InputError, match="a multiple of 4"):
        named(torch.randn(1, 3, 18, 16))


def test_cells_of_one_size_are_never_taken_for_those_of_another(tmp_path) -> None:
    model = made(lambda: nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                                       nn.Linear(32, 4)))
    x = torch.randn(2, 1, 8, 8)
    found = fw.capture(model, x)
    assert found.signature.inputs[0].shape == (None, 1, 8, 8)
    assert any("pools to a fixed number of cells" in note for note in found.notes)
    named = fw.capture(model, x, dynamic={"input": {2: "height", 3: "width"}})
    wide = torch.randn(3, 1, 9, 13)
    assert torch.allclose(named(wide), model(wide), atol=1e-6)
    with pytest.raises(ExportError, match="capture with fixed sizes"):
        deploy.target("onnxruntime").export(named, tmp_path / "model.onnx")


class Sequence(nn.Module):
    """A length made shorter by a formula, then a recurrent layer."""

    def __init__(self, shorter: nn.Module, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.shorter, self.layer, self.head = shorter, layer(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.shorter(x).transpose(1, 2))[0])


def strided() -> nn.Module:
    return nn.Conv1d(4, 8, 5, stride=2, padding=2)


def pooled() -> nn.Module:
    return nn.Sequential(nn.Conv1d(4, 8, 3), nn.MaxPool1d(3, 2, 1, ceil_mode=True))


@pytest.mark.parametrize(("shorter", "layer"), [
    (strided, nn.GRU), (pooled, nn.LSTM), *(pytest.param(f, layer, marks=pytest.mark.slow) for f, layer in [
        (strided, nn.LSTM), (strided, nn.RNN), (pooled, nn.GRU)])])
def test_lengths_that_strides_and_pools_leave_to_recurrent_layers_stay_free(
        shorter: Callable[[], nn.Module], layer: type[nn.RNNBase], tmp_path) -> None:
    model = made(lambda: Sequence(shorter(), layer))
    found = fw.capture(model, torch.randn(2, 4, 96))
    assert found.signature.inputs[0].shape == (None, 4, None)
    target = deploy.target("onnxruntime")
    target.export(found, tmp_path / "model.onnx")
    runner = target.load(tmp_path / "model.onnx", like=found.signature)
    for length in (12, 61, 97, 200):
        x = torch.randn(3, 4, length)
        assert torch.allclose(found(x), model(x), atol=1e-6)
        assert deploy.verify(found, runner, (x,)).ok


# ---- every step, file and runtime
@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_keeps_free_sizes_and_takes_batches_of_any_length(family: str, network: Network, task: fw.Task,
                                                                     tmp_path) -> None:
    small = FAMILIES[family].plan(network, task).apply(network)
    assert small.signature == network.signature
    small.save(tmp_path / "small.fw")
    loaded = fw.load(tmp_path / "small.fw")
    assert [i.axes for i in loaded.signature.inputs] == [i.axes for i in network.signature.inputs]
    for length in (5, 40):
        assert torch.equal(loaded(*text(2, length)), small(*text(2, length)))


def test_costs_are_counted_at_the_examples_size(encoder: nn.Module, network: Network) -> None:
    assert measure.macs(network).total == measure.macs(fw.capture(encoder, text(), dynamic={})).total


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_one_file_serves_all_lengths_pruned_and_int8(target: str, network: Network, task: fw.Task, tmp_path) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    pruned = fw.prune.Channels(macs=0.6).plan(network, task).apply(network)
    small = fw.quantize.Quantize(target=target).plan(pruned, task).apply(pruned)
    runtime = deploy.target(target)
    path = tmp_path / f"model{runtime.suffix}"
    runtime.export(small, path)
    runner = runtime.load(path, like=small.signature)
    for batch, length in ((2, 5), (1, 17), (3, 64), (2, 128)):
        given = text(batch, length, seed=length)
        assert deploy.verify(small, runner, given).ok, length
    with pytest.raises(InputError, match="up to 128"):
        runner(*text(2, 129))
    if target == "onnxruntime":
        session = onnxruntime.InferenceSession(path)
        assert [i.shape for i in session.get_inputs()] == [["batch", "size_1"]] * 2


def test_a_hugging_face_encoder_serves_lengths_5_to_128(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=128)).eval()
    network = fw.capture(model, dict(zip(("input_ids", "attention_mask"), text(), strict=True)))
    deploy.target("onnxruntime").export(network, tmp_path / "model.onnx")
    runner = deploy.target("onnxruntime").load(tmp_path / "model.onnx", like=network.signature)
    for length in LENGTHS:
        given = dict(zip(("input_ids", "attention_mask"), text(3, length), strict=True))
        assert torch.allclose(network(**given)["logits"], model(**given).logits, atol=1e-5)
        assert deploy.verify(network, runner, (), given).ok
    assert network.signature.inputs[0].limits == ((1, 1, 128),)


def test_the_model_is_left_as_it_was() -> None:
    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.shape, self.seen = None, {}

        def forward(self, x: Tensor) -> Tensor:
            if self.shape != x.shape:
                self.shape = x.shape
                self.grid = torch.arange(x.shape[1], dtype=x.dtype).unsqueeze(-1)
            self.seen[str(x.shape)] = 1
            return self.linear(x) + self.grid

    model = Caches().eval()
    found = fw.capture(model, torch.randn(2, 6, 4))
    assert model.shape is None
    assert model.seen == {}
    assert not hasattr(model, "grid")
    x = torch.randn(3, 9, 4)
    assert torch.allclose(found(x), model(x), atol=1e-6)
