"""One enumeration of layers, one dialect of ``ignore``, one wording of why not; products that are linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight as fw
from featherweight import deploy
from featherweight.axes.groups import axis_groups
from featherweight.factorize import LowRank
from featherweight.network.edit import out_axis, turned
from featherweight.network.layers import DENSE, EVERY, Skipped, fits, known_by, select
from featherweight.network.matrices import along_outputs, as_matrix, from_matrix, outputs_first
from featherweight.prune import Channels, Layers, Weights
from featherweight.quantize import Mixed, Quantize
from featherweight.share import Codebook
from featherweight.steps import Plan, Rewrite
from problems import CLASSES, PROBLEMS, Conv1D, network, task, tokens
from test_export_bits import optimized

aten = torch.ops.aten


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- patterns

class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.relu(self.fc1(x)))


class Named(nn.Module):
    """Layers in a sequence, in a residual block, at the top, and a bare product."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16))
        self.block = Branch()
        self.mix = nn.Parameter(torch.randn(16, 16) / 4)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.block(self.features(x)) @ self.mix))


WEIGHTS = {"features.0.weight", "features.2.weight", "block.fc1.weight", "block.fc2.weight", "mix", "head.weight"}
#: pattern -> the weights of the layers that it fits
PATTERNS: dict[str, set[str]] = {
    "features.0.weight": {"features.0.weight"},
    "features.0": {"features.0.weight"},
    "features.*": {"features.0.weight", "features.2.weight"},
    "features": {"features.0.weight", "features.2.weight"},
    "feat*": {"features.0.weight", "features.2.weight"},
    "*.fc?": {"block.fc1.weight", "block.fc2.weight"},
    "block": {"block.fc1.weight", "block.fc2.weight"},
    "mix": {"mix"},
    "matmul": {"mix"},
    "linear_2": {"block.fc1.weight"},
    "*.weight": WEIGHTS - {"mix"},
    "*": WEIGHTS,
    "feature": set(),
    "features.1": set(),
    "fc1": set(),
}
STEPS: dict[str, Callable[[tuple[str, ...]], Rewrite]] = {
    "Weights": lambda ignore: Weights(0.5, ignore=ignore),
    "LowRank": lambda ignore: LowRank(energy=0.5, min_gain=-9.0, ignore=ignore),
    "Codebook": lambda ignore: Codebook(bits=1, min_size=1, ignore=ignore),
    "Quantize": lambda ignore: Quantize(activations=None, ignore=ignore),
    "Mixed": lambda ignore: Mixed(bits=6, kinds=("int8", "int4"), activations=None, batches=1, ignore=ignore),
}


@pytest.fixture(scope="module")
def named() -> fw.Network:
    torch.manual_seed(0)
    return fw.capture(Named(), torch.randn(2, 12))  # type: ignore[return-value]


def data() -> fw.Task:
    batches = [(normal(8, 12, seed=i), torch.zeros(8, dtype=torch.long)) for i in range(2)]
    return fw.Task(calibration=lambda: batches, validation=lambda: batches, loss=F.cross_entropy)


def left(plan: Plan, pattern: str) -> set[str]:
    return {s.path for s in plan.skipped if s.reason == f"named in ignore={pattern!r}"}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("step", STEPS)
def test_a_pattern_means_the_same_in_every_step_that_works_on_layers(named: fw.Network, step: str,
                                                                     pattern: str) -> None:
    plan = STEPS[step]((pattern,)).plan(named, data())
    assert left(plan, pattern) == PATTERNS[pattern]
    said = Skipped(pattern, "this pattern of ignore matched no layer") in plan.skipped
    assert said == (not PATTERNS[pattern])
    changed = plan.apply(named)
    for name in PATTERNS[pattern]:
        assert torch.equal(changed.tensor(name), named.tensor(name))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_channels_that_a_named_layer_makes_stay(named: fw.Network, pattern: str) -> None:
    groups = axis_groups(named).groups
    wanted = {g.name for g in groups if PATTERNS[pattern] & {m.tensor for m in g.members if m.makes}}
    plan = Channels(ratio=0.5, ignore=(pattern,)).plan(named, data())
    assert left(plan, pattern) == wanted
    assert not wanted & set(plan.keep)
    said = Skipped(pattern, "this pattern of ignore matched no channels that could be cut") in plan.skipped
    assert said == (not wanted)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_blocks_that_hold_a_named_layer_stay(named: fw.Network, pattern: str) -> None:
    plan = Layers(count=9, score="norm", ignore=(pattern,)).plan(named, data())
    every = {b.name: b for b in Layers(count=9, score="norm").plan(named, data()).blocks}
    assert set(every) == {"block", "matmul"}
    holds = {"block": {"block.fc1.weight", "block.fc2.weight"}, "matmul": {"mix"}}
    wanted = {name for name, inside in holds.items() if inside & PATTERNS[pattern]}
    assert left(plan, pattern) == wanted
    assert {b.name for b in plan.blocks} == set(every) - wanted
    assert any(s.path == pattern and "this pattern of ignore matched no block" in s.reason
               for s in plan.skipped) == (not wanted)


def test_patterns_of_mixed_are_those_of_ignore(named: fw.Network) -> None:
    for pattern, weights in PATTERNS.items():
        plan = Quantize("int8", None, ends=None, mixed={pattern: "int4"}).plan(named, data())
        assert {s.weight for s in plan.stored if s.kind == "int4"} == weights
        assert (Skipped(pattern, "this pattern of mixed matched no layer") in plan.skipped) == (not weights)


def test_patterns_reach_tied_weights_by_every_name() -> None:
    net = network(PROBLEMS["tied_linear"])
    assert {layer.weight: (layer.names, [c.name for c in layer.calls], layer.path, layer.kind)
            for layer in select(net).layers} == {
        "conv2.weight": (("conv1.weight", "conv2.weight"), ["conv2d", "conv2d_1"], "conv2", "convolution"),
        "b.weight": (("a.weight", "b.weight"), ["linear", "linear_1"], "b", "linear"),
        "fc.weight": (("fc.weight",), ["linear_2"], "fc", "linear")}
    for pattern in ("conv2.weight", "conv2", "conv2d_1", "conv1"):
        assert select(net, (pattern,)).skipped == (Skipped("conv2.weight", f"named in ignore={pattern!r}"),)


def test_a_name_that_attention_gives_its_weight_goes_on_working() -> None:
    net = network(PROBLEMS["attention"])
    (layer,) = [x for x in select(net).layers if x.weight == "blocks.0.attention.in_proj_weight"]
    assert all(layer.fits(p) for p in ("blocks.0.attention.in_proj_", "blocks.0.attention", "blocks.0", "*in_proj*"))
    assert not any(layer.fits(p) for p in ("blocks.1", "block", "attention", "blocks.0.attention.out_proj"))


# ---- why not

class Odd(nn.Module):
    """A layer of every kind, and weights that are no layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.table = nn.Parameter(torch.randn(1, 4, 8))
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.experts = nn.Parameter(torch.randn(2, 8, 8))
        self.unread = nn.Parameter(torch.randn(3, 3))
        self.register_buffer("steps", torch.randint(-9, 9, (8, 8)))
        self.plain = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.rnn(self.embed(ids) + self.table)[0]
        x = F.linear(self.normed(x), self.steps.to(x.dtype))
        return self.plain(torch.bmm(x[:, :2].transpose(0, 1), self.experts).sum(0))


def test_everything_that_is_no_layer_is_named_with_why() -> None:
    torch.manual_seed(0)
    net = fw.capture(Odd(), torch.randint(10, (3, 4)), keep_parametrizations=True)
    assert isinstance(net, fw.Network)
    few = select(net)
    assert [layer.weight for layer in few.layers] == ["plain.weight"]
    reasons = {s.path: s.reason for s in few.skipped}
    computed = "its weight is computed, not stored (or stored in another form already)"
    assert reasons["normed"] == computed
    assert reasons["linear_1"] == computed
    assert reasons["embed.weight"] == "it is read by aten.embedding.default, by no linear or convolution call"
    assert reasons["rnn.weight_ih_l0"] == "it is read by aten.gru.input, by no linear or convolution call"
    assert reasons["table"] == "it is read by aten.add.Tensor, by no linear or convolution call"
    assert reasons["experts"] == "it is read by aten.bmm.default, by no linear or convolution call"
    assert reasons["unread"] == "no call reads it"
    assert {"normed.parametrizations.weight.original0", "normed.parametrizations.weight.original1"} <= reasons.keys()
    every = select(net, kinds=EVERY)
    assert {layer.weight: layer.kind for layer in every.layers} == {
        "plain.weight": "linear", "embed.weight": "embedding", "rnn.weight_ih_l0": "recurrent",
        "rnn.weight_hh_l0": "recurrent"}
    assert {"table", "experts", "unread", "normed"} <= {s.path for s in every.skipped}
    ignored = select(net, ("normed", "rnn", "none"))
    assert {s.path for s in ignored.skipped if s.reason == "named in ignore='normed'"} == {
        "normed", "normed.parametrizations.weight.original0", "normed.parametrizations.weight.original1"}
    assert Skipped("none", "this pattern of ignore matched no layer") in ignored.skipped
    assert EVERY[:2] == DENSE


def test_integers_are_no_weights() -> None:
    net = fw.capture(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4))
    net.remove_tensor("0.weight")
    net.add_tensor("0.weight", torch.zeros(4, 4, dtype=torch.int8))
    net.remove_tensor("1.weight")
    net.add_tensor("1.weight", torch.zeros(4, 4, dtype=torch.float16), buffer=True)
    assert select(net).skipped == (Skipped("0.weight", "its weight holds int8 values: expected floating point"),)
    reasons = {s.path: s.reason for s in Quantize(activations=None).plan(net, fw.Task()).skipped}
    assert reasons["1.weight"] == "its weight holds float16 values: expected float32"


def test_a_pattern_is_compared_letter_by_letter() -> None:
    assert known_by(["a.b.weight"], []) == {"a.b.weight", "a.b", "a"}
    assert known_by(["weight"], []) == {"weight"}
    assert fits(["Conv"], "C*")
    assert not fits(["Conv"], "c*")


# ---- products that are linear layers

class Product(nn.Module):
    """``make(x [n, t, 8], w [8, 4] or [4, 8], b [4])``; ``transposed``: the weight is [4, 8]."""

    def __init__(self, make: Callable[..., Tensor], transposed: bool) -> None:
        super().__init__()
        self.make = make
        self.w = nn.Parameter(normal(4, 8, seed=3) if transposed else normal(8, 4, seed=3))
        self.b = nn.Parameter(normal(4, seed=4))

    def forward(self, x: Tensor) -> Tensor:
        return self.make(x, self.w, self.b)


#: name -> (product, whether the weight is stored [o, i])
LINEAR: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "matmul": (lambda x, w, b: x @ w, False),
    "matmul of the transpose": (lambda x, w, b: x @ w.T, True),
    "matmul of the mT": (lambda x, w, b: x @ w.mT, True),
    "matmul of the permuted": (lambda x, w, b: x @ w.permute(1, 0), True),
    "matmul of the transpose's transpose": (lambda x, w, b: x @ w.t().transpose(0, 1), False),
    "mm": (lambda x, w, b: torch.mm(x[:, 0], w), False),
    "addmm": (lambda x, w, b: torch.addmm(b, x[:, 0], w), False),
    "linear of the transpose": (lambda x, w, b: F.linear(x, w.t(), b), False),
    "einsum": (lambda x, w, b: torch.einsum("nti,io->nto", x, w), False),
    "einsum, any rank": (lambda x, w, b: torch.einsum("...i, oi -> ...o", x, w), True),
}
OTHERS: dict[str, Callable[..., Tensor]] = {
    "scaled": lambda x, w, b: torch.addmm(b, x[:, 0], w, alpha=2),
    "a bias per sample": lambda x, w, b: torch.addmm(x[:, 1, :4], x[:, 0], w),
    "from the left": lambda x, w, b: w.T @ x.transpose(1, 2),
    "two values": lambda x, w, b: x @ x.transpose(1, 2),
    "two weights": lambda x, w, b: x + (w @ w.T),
    "a batch of matrices": lambda x, w, b: torch.einsum("nti,io->nio", x, w),
    "summed over two": lambda x, w, b: torch.einsum("nti,io->no", x, w),
    "a constant": lambda x, w, b: x @ torch.ones(8, 4),
}


@pytest.mark.parametrize("name", LINEAR)
def test_products_with_a_stored_matrix_are_linear_layers(name: str) -> None:
    make, transposed = LINEAR[name]
    model, x = Product(make, transposed), normal(2, 3, 8)
    net = fw.capture(model, x)
    assert isinstance(net, fw.Network)
    assert {n: t.shape for n, t in net.tensors().items()} == {"w": model.w.shape, "b": model.b.shape}
    torch.testing.assert_close(net(x), model(x), rtol=1e-6, atol=1e-6)
    (layer,) = select(net).layers
    (node,) = layer.calls
    assert (layer.weight, layer.kind, node.target) == ("w", "linear", aten.linear.default)
    assert (turned(node), out_axis(node)) == (not transposed, int(not transposed))
    weight = net.tensor("w").detach()
    assert torch.equal(as_matrix(node, weight)[0], weight if transposed else weight.t())
    assert torch.equal(outputs_first(node, weight), as_matrix(node, weight)[0])
    assert torch.equal(from_matrix(node, as_matrix(node, weight), weight.shape), weight)
    assert torch.equal(as_matrix(node, along_outputs(node, torch.arange(4.0), weight))[0],
                       torch.arange(4.0)[:, None].expand(4, 8))
    assert not any(n.target in (aten.matmul.default, aten.mm.default, aten.addmm.default, aten.einsum.default)
                   for n in net.calls())


@pytest.mark.parametrize("name", OTHERS)
def test_other_products_stay_what_they_are(name: str) -> None:
    model, x = Product(OTHERS[name], False), normal(2, 3, 8)
    net = fw.capture(model, x if name != "two weights" else normal(2, 8, 8))
    assert isinstance(net, fw.Network)
    assert not net.calls(aten.linear.default)
    assert not select(net).layers


def test_a_computed_matrix_that_is_stored_is_the_weight_of_a_layer() -> None:
    model, x = Product(lambda x, w, b: x @ w.exp(), False), normal(2, 3, 8)
    assert [turned(n) for layer in select(fw.capture(model, x)).layers for n in layer.calls] == [True]
    kept = select(fw.capture(model, x, keep_parametrizations=True))
    assert kept.skipped == (Skipped("w", "it is read by aten.exp.default, by no linear or convolution call"),)


def test_nodes_keep_their_names() -> None:
    net = fw.capture(Product(LINEAR["addmm"][0], False), normal(2, 3, 8))
    assert [n.name for n in net.calls(aten.linear.default)] == ["addmm"]


# ---- GPT-2's layers, against the same network of nn.Linear

class Plain(nn.Module):
    """``Conv1D`` with its weight the other way around."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(o, i) / i ** 0.5), nn.Parameter(torch.zeros(o))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.view(-1, x.size(-1)), self.weight, self.bias).view(*x.shape[:-1], self.weight.shape[0])


class Mlp(nn.Module):
    """A norm, two layers, a residual sum and a head, of layers of one kind."""

    def __init__(self, kind: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up, self.down, self.head = kind(32, 64), kind(64, 32), kind(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.down(F.relu(self.up(self.norm(x))))).mean(1))


def values(batch: int = 4, seed: int = 1) -> Tensor:
    return normal(batch, 3, 32, seed=seed)


@pytest.fixture(scope="module")
def pair() -> tuple[fw.Network, fw.Network]:
    """The same function with weights [i, o] and [o, i]."""
    torch.manual_seed(0)
    theirs, ours = Mlp(Conv1D), Mlp(Plain)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            other = theirs.get_parameter(name)
            p.copy_(torch.randn(p.shape) / 6 if "bias" in name else other.t() if p.dim() > 1 else other)
            if "bias" in name:
                other.copy_(p)
    nets = [fw.capture(m, values()) for m in (theirs, ours)]
    assert all(turned(n) for n in nets[0].calls(aten.linear.default))
    assert not any(turned(n) for n in nets[1].calls(aten.linear.default))
    return nets[0], nets[1]  # type: ignore[return-value]


def three() -> fw.Task:
    batches = [(values(16, seed=i), torch.arange(16) % CLASSES) for i in range(3)]
    return fw.Task(calibration=lambda: batches, validation=lambda: batches, loss=F.cross_entropy)


ALIKE: dict[str, Rewrite] = {
    "Weights": Weights(0.6),
    "Weights wanda by rows": Weights(0.5, score="wanda", allocation="output"),
    "Weights fisher": Weights(0.5, score="fisher", allocation="erk"),
    "Weights 2:4 obs": Weights(pattern="2:4", score="obs", compensate="obs"),
    "Weights blocks": Weights(0.5, pattern="block:4x2", compensate="least_squares"),
    "LowRank": LowRank(energy=0.6, min_gain=0.0),
    "LowRank ranks": LowRank(ranks={"up": 5, "down.weight": 6}, min_gain=0.0),
    "Codebook": Codebook(bits=3, min_size=1, ignore=("head",)),
    "Channels": Channels(macs=0.5),
    "Channels taylor, bias": Channels(macs=0.6, score="taylor", compensate="bias"),
    "Channels reconstruction": Channels(macs=0.5, score="reconstruction", compensate="least_squares"),
    "Channels sensitivity": Channels(macs=0.5, allocation="sensitivity", score="fisher"),
    "Quantize": Quantize(),
    "Quantize tensor": Quantize(granularity="tensor"),
    "Quantize few bits": Quantize("int3", None, ends="int4", weight_ranges="mse"),
    "Quantize groups": Quantize("int4", None, granularity=16, ends=None),
    "Quantize groups by gptq": Quantize("int4", None, granularity=16, ends=None, rounding="gptq"),
    "Quantize gptq": Quantize("int4", rounding="gptq"),
    "Quantize blocks": Quantize("int4", rounding="blocks"),
    "Quantize prepared": Quantize(smooth=0.5, equalize=True, correct_bias=True),
    "Quantize rescaled": Quantize(rescale=True),
    "Quantize dynamic": Quantize(activations="dynamic"),
    "Quantize halves": Quantize("fp16", None),
}


@pytest.mark.parametrize("name", ALIKE)
def test_a_layer_stored_the_other_way_around_is_treated_alike(pair: tuple[fw.Network, fw.Network], name: str) -> None:
    """One plan for each; what they make computes the same, and the same weights are decided on."""
    theirs, ours = pair
    x = values(5, seed=77)
    made = []
    for net in (theirs, ours):
        plan = ALIKE[name].plan(net, three())
        made.append((plan, plan.apply(net)))
    (plan, one), (other, two) = made
    torch.testing.assert_close(one(x), two(x), rtol=1e-4, atol=1e-4)
    assert not torch.equal(one(x), theirs(x))
    assert plan.summary().replace("[64, 32]", "[32, 64]") == other.summary().replace("[64, 32]", "[32, 64]")
    assert {s.path for s in plan.skipped if s.path.endswith("weight")} == {
        s.path for s in other.skipped if s.path.endswith("weight")}


# ---- in the runtimes

#: name -> (step, the kernels that ONNX Runtime computes the five layers of "gpt2" by)
DEPLOYED: dict[str, tuple[Rewrite, tuple[str, ...]]] = {
    "Weights": (Weights(0.6), ()),
    "Weights 2:4": (Weights(pattern="2:4", score="obs", compensate="obs"), ()),
    "LowRank": (LowRank(energy=0.6, min_gain=0.0), ()),
    "Codebook": (Codebook(bits=3, min_size=64), ()),
    "Channels": (Channels(macs=0.6), ()),
    "Quantize": (Quantize(), ("QGemm", "MatMulIntegerToFloat")),
    "Quantize int4": (Quantize("int4", ends=None), ("QGemm", "MatMulIntegerToFloat")),
    "Quantize weights": (Quantize(activations=None), ("MatMulNBits",)),
    "Quantize groups": (Quantize("int4", None, granularity=16, ends=None), ("MatMulNBits",)),
    "Quantize groups of bytes": (Quantize("int8", None, granularity=16), ("MatMulNBits",)),
    "Quantize dynamic": (Quantize(activations="dynamic"), ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")),
    "Quantize halves": (Quantize("fp16", None), ()),
}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", DEPLOYED)
def test_gpt2_compressed_computes_the_same_when_deployed(name: str, runtime: str, tmp_path: Any) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    step, kernels = DEPLOYED[name]
    problem = PROBLEMS["gpt2"]
    before = network(problem)
    after = step.plan(before, task(problem)).apply(before)
    target = deploy.target(runtime)
    path = tmp_path / f"net{target.suffix}"
    target.export(after, path)
    runner = target.load(path, like=after.signature)
    try:
        for batch in (1, 3):
            agreement = deploy.verify(after, runner, (tokens(batch, seed=5),), {})
            assert agreement.ok, f"{name}, batch {batch}: {agreement}"
    finally:
        runner.close()
    if runtime == "onnxruntime" and kernels:
        found = optimized(path)
        assert sum(found[k] for k in kernels) == 5, found
