"""``Layers``: what may be dropped and why not, the network without it, scores, and the order in which blocks go."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight as fw
from featherweight.axes.blocks import Block, droppable
from featherweight.errors import PlanError, RecipeError, TaskError
from featherweight.measure.macs import macs
from featherweight.prune import LayerPlan, Layers
from featherweight.steps import Plan
from problems import PROBLEMS, Attention, InvertedResidual, ShortcutA, conv, images, network, task, tensors_of, unsettle

torch.set_num_threads(1)
NOTHING = fw.Task()
ALL = ("residual", "shortcut", "plain", "layer")


def outputs(net: fw.Network, batch: int = 4) -> list[Tensor]:
    args, kwargs = net.example_inputs(batch)
    with torch.no_grad():
        return tensors_of(net(*args, **kwargs))


def build(*parts: nn.Module, seed: int = 0) -> nn.Sequential:
    """A classifier of 8 by 8 images around these parts, which give 16 channels."""
    torch.manual_seed(seed)
    model = nn.Sequential(conv(3, 8), *parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).eval()
    unsettle(model)
    return model


@pytest.fixture(scope="module")
def residual() -> fw.Network:
    return fw.capture(build(ShortcutA(8, 8, 1), ShortcutA(8, 16, 2), ShortcutA(16, 16, 1), ShortcutA(16, 16, 1)),
                      images())


def images_task() -> fw.Task:
    return task(PROBLEMS["conv_bn"])


def found(net: fw.Network) -> dict[str, str]:
    return {b.name: b.kind for b in droppable(net).found}


def reasons(net: fw.Network) -> dict[str, str]:
    return {s.path: s.reason for s in droppable(net).skipped}


class Projected(nn.Module):
    """He et al. 2016, option B: the shortcut is a strided convolution and a norm."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(i, o, 3, stride), conv(o, o, act=False))
        self.shortcut = conv(i, o, 1, stride, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class Odd(nn.Module):
    """Sums that are no blocks: two inputs' worth of paths, equal paths, a branch that is read elsewhere, a multiple."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(3, 8), conv(8, 8), conv(8, 8)
        self.c, self.d, self.e = conv(8, 8, stride=2), conv(8, 8), conv(8, 8, 1, 2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        x = self.a(x) + self.b(x)
        inner = self.c(x)
        x = self.d(inner) + self.e(x)
        x = torch.add(self.d(x), x, alpha=2)
        return self.fc(x.mean((2, 3)) + y), inner


# ---- what may be dropped

def test_every_kind_is_found(residual: fw.Network) -> None:
    assert found(residual) == {"1": "residual", "2": "shortcut", "3": "residual", "4": "residual"}
    assert reasons(residual) == {
        "0.0": "its output has another shape than its input ([3, 8, 8] to [8, 8, 8])",
        "7": "its output has another shape than its input ([16] to [5])"}
    assert found(network(PROBLEMS["attention"])) == {
        "blocks.0": "residual", "blocks.0:2": "residual", "blocks.0 (layer)": "layer",
        "blocks.1": "residual", "blocks.1:2": "residual", "blocks.1 (layer)": "layer"}
    plain = fw.capture(build(conv(8, 8), conv(8, 8, 3, groups=8), conv(8, 16), conv(16, 16, 3, 2)), images())
    assert found(plain) == {"1.0": "plain", "2.0": "plain"}


def test_stride_counts_even_where_shapes_are_equal() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten(),
                          nn.Linear(4, 5)).eval()
    net = fw.capture(model, torch.randn(2, 4, 1, 1))
    assert found(net) == {"2": "plain"}
    assert reasons(net)["0"] == "its stride is [2, 2]"


def test_what_may_not_be_dropped_is_named_with_the_reason() -> None:
    torch.manual_seed(0)
    net = fw.capture(Odd().eval(), (images(), torch.randn(2, 8)))
    assert found(net) == dict.fromkeys(("a.0", "b.0", "d.0", "d.0:2"), "plain")
    assert [r.split(":")[0] for r in reasons(net).values()][:3] == [
        "its two paths are as deep as one another", "a value inside its branch is read elsewhere too",
        "it adds a multiple"]
    two = reasons(network(PROBLEMS["two_inputs"]))
    assert two["add"] == "its two paths do not start from one value"
    same = fw.capture(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).eval(), torch.randn(2, 6))
    assert found(same) == {"0": "plain"}
    assert reasons(same) == {"2": "it makes the network's output"}


@pytest.mark.parametrize("name", PROBLEMS)
def test_each_block_alone_goes_and_the_network_runs_trains_and_shrinks(name: str) -> None:
    net = network(PROBLEMS[name])
    for block in droppable(net).found:
        plan = Layers(names=(block.name.replace("[", "[[]"),), kinds=ALL).plan(net, NOTHING)
        assert plan.blocks == (block,)
        assert Plan.from_json(plan.to_json()) == plan
        small = plan.apply(net)
        assert small.signature == net.signature
        assert [a.shape for a in outputs(net)] == [a.shape for a in outputs(small)]
        assert macs(small).total < macs(net).total
        assert set(small.state_dict()) <= set(net.state_dict())


# ---- the network without it, against the modules themselves

def test_dropping_residual_blocks() -> None:
    model = build(*(ShortcutA(8, 8, 1) for _ in range(3)), ShortcutA(8, 16, 2))
    net = fw.capture(model, images())
    small = Layers(names=("1", "2", "3")).plan(net, NOTHING).apply(net)
    for i in (1, 2, 3):
        model[i] = nn.Identity()
    torch.testing.assert_close(small(images(seed=5)), model(images(seed=5)))
    assert set(small.state_dict()) == set(model.state_dict())
    assert len(small.calls(torch.ops.aten.relu.default)) == 3


def test_dropping_branches_leaves_shortcuts_that_are_computed() -> None:
    """A padded and strided slice, and a projection with its norm."""
    model = build(ShortcutA(8, 12, 2), Projected(12, 16, 2), InvertedResidual(16, 16, 1))
    net = fw.capture(model, images())
    assert found(net) == {"1": "shortcut", "2": "shortcut", "3": "residual"}
    small = Layers(names=("1", "2", "3")).plan(net, NOTHING).apply(net)
    x = images(seed=5)
    seen = model[0](x)
    seen = F.relu(F.pad(seen[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
    seen = F.relu(model[2].shortcut(seen))
    torch.testing.assert_close(small(x), model[4:](seen))
    assert {k for k in small.state_dict() if k.startswith("2")} == {
        k for k in model.state_dict() if k.startswith("2.shortcut")}


def test_dropping_plain_layers_takes_norm_and_activation_along() -> None:
    model = build(conv(8, 16), conv(16, 16), conv(16, 16, groups=16))
    net = fw.capture(model, images())
    small = Layers(names=("2.0", "3.0")).plan(net, NOTHING).apply(net)
    model[2], model[3] = nn.Identity(), nn.Identity()
    torch.testing.assert_close(small(images(seed=5)), model(images(seed=5)))
    assert set(small.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("norm_first", [True, False])
def test_dropping_an_encoder_layer_or_one_half_of_it(norm_first: bool) -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(*(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first)
                              for _ in range(3)))
    model = nn.Sequential(nn.Linear(12, 16), encoder, nn.Linear(16, 5)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    unsettle(model)
    net = fw.capture(model.eval(), torch.randn(2, 3, 12))
    assert [b.name for b in droppable(net).found if b.kind == "layer"] == [f"1.{i} (layer)" for i in range(3)]
    small = Layers(names=("1.1 (layer)",), kinds=("layer",)).plan(net, NOTHING).apply(net)
    x = torch.randn(4, 3, 12)
    torch.testing.assert_close(small(x), model[2](model[1][2](model[1][0](model[0](x)))), rtol=1e-4, atol=1e-5)
    half = Layers(names=("1.1:2",)).plan(net, NOTHING).apply(net)
    seen = model[1][0](model[0](x))
    layer: Any = model[1][1]
    y = layer.norm1(seen) if norm_first else seen
    y = seen + layer.self_attn(y, y, y, need_weights=False)[0]
    y = y if norm_first else layer.norm2(layer.norm1(y))
    torch.testing.assert_close(half(x), model[2](model[1][2](y)), rtol=1e-4, atol=1e-5)


class StateSpace(nn.Module):
    """A state goes from token to token, as Mamba's does: it starts at zeros of the batch's size."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.into, self.out = nn.LayerNorm(12), nn.Linear(12, 8), nn.Linear(8, 12)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        y, state, seen = self.into(self.norm(x)), torch.zeros(x.shape[0], 8), []
        for step in range(x.shape[1]):
            state = state * 0.5 + y[:, step]
            seen.append(state)
        return x.to(torch.float32) + self.out(torch.stack(seen, 1))


class Crossed(nn.Module):
    """Attention on another sequence, heads written with views."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(12, 12), nn.Linear(12, 24), nn.Linear(12, 12)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        k, v = self.kv(memory).chunk(2, -1)
        q, k, v = (t.view(x.shape[0], -1, 3, 4).transpose(1, 2) for t in (self.q(x), k, v))
        return x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Conv1dBlock(nn.Module):
    """GPT-2's half of a block: products with matrices stored [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.w, self.b = nn.Parameter(torch.randn(12, 20) / 3), nn.Parameter(torch.randn(20))
        self.u, self.c = nn.Parameter(torch.randn(20, 12) / 4), nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        y = torch.addmm(self.b, self.norm(x).view(-1, 12), self.w)
        return x + torch.addmm(self.c, F.gelu(y), self.u).view(x.shape)


class Sequence(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([block(), block()]), nn.Linear(12, 5)

    def forward(self, x: Tensor, memory: Tensor, without: int = -1) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = x if i == without else block(x, memory)
        return self.head(x)


@pytest.mark.parametrize("block", [StateSpace, Crossed, Conv1dBlock])
def test_blocks_of_sequences_are_found_and_dropped(block: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x, memory = Sequence(block).eval(), torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    net = fw.capture(model, (x, memory))
    for i in range(2):
        name = [b.name for b in droppable(net).found if b.name.startswith(f"blocks.{i}") and b.kind != "plain"][-1]
        small = Layers(names=(name,)).plan(net, NOTHING).apply(net)
        torch.testing.assert_close(small(x[:1], memory[:1]), model(x[:1], memory[:1], without=i))
        assert macs(small).total < macs(net).total


# ---- scores

def test_the_block_that_does_least_goes_first(residual: fw.Network) -> None:
    net = residual.copy()
    for name in ("3.bn2.weight", "3.bn2.bias"):
        net.set_tensor(name, net.tensor(name).detach() * 1e-3)
    for score in ("output", "loss"):
        plan = Layers(count=1, score=score).plan(net, images_task())
        assert isinstance(plan, LayerPlan)
        if score == "output":
            assert [b.name for b in plan.blocks] == ["3"]
        assert abs(plan.scores["3"]) < min(abs(s) for n, s in plan.scores.items() if n != "3")
    apart = max(float((a - b).abs().max()) for a, b in zip(
        outputs(net), outputs(Layers(names=("3",)).plan(net, NOTHING).apply(net)), strict=True))
    assert apart < 0.05


@pytest.mark.parametrize("score", ["output", "loss"])
@pytest.mark.parametrize("name", ["residual", "attention"])
def test_scores_are_measured_on_the_network_without_the_block(name: str, score: str) -> None:
    net, work = network(PROBLEMS[name]), task(PROBLEMS[name])
    plan = Layers(count=1, score=score, kinds=ALL, batches=2).plan(net, work)
    assert plan.scores.keys() == {b.name for b in droppable(net).found}
    for block, value in plan.scores.items():
        small = Layers(names=(block,), kinds=ALL).plan(net, work).apply(net)
        moved = []
        with torch.no_grad():
            for inputs, target in work.batches("calibration", 2):
                y, other = net(inputs), small(inputs)
                moved.append(float((other - y).double().square().sum() / y.double().square().sum()) if score == "output"
                             else float(F.cross_entropy(other, target) - F.cross_entropy(y, target)))
        assert value == pytest.approx(sum(moved) / len(moved), rel=1e-3, abs=1e-5)


class Shift(nn.Module):
    """x + f(x), f a constant (a linear layer of zeros and a bias)."""

    def __init__(self, by: list[float]) -> None:
        super().__init__()
        self.f = nn.Linear(len(by), len(by))
        nn.init.zeros_(self.f.weight)
        self.f.bias.data = torch.tensor(by)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def test_greedy_scores_again_what_is_left() -> None:
    """Either of two blocks would do, so each alone matters least; but not without the other. Against all pairs."""
    net = fw.capture(nn.Sequential(Shift([3.0, 0.0]), Shift([3.0, 0.0]), Shift([0.0, 0.4]), nn.Tanh()).eval(),
                     torch.randn(2, 2))
    data = [(torch.randn(32, 2, generator=torch.Generator().manual_seed(s)), None) for s in range(2)]
    work = fw.Task(calibration=lambda: data)

    def far(*names: str) -> float:
        small = Layers(names=names).plan(net, work).apply(net)
        with torch.no_grad():
            return sum(float((small(x) - net(x)).square().sum() / net(x).square().sum()) for x, _ in data) / 2

    once, greedy = (Layers(count=2, greedy=g).plan(net, work) for g in (False, True))
    assert {b.name for b in once.blocks} == {"0", "1"}
    best = min(itertools.combinations("012", 2), key=lambda pair: far(*pair))
    assert far(*(b.name for b in greedy.blocks)) == pytest.approx(far(*best), rel=0.05)
    assert far(*best) < 0.5 * far("0", "1")
    assert greedy.scores[greedy.blocks[1].name] == pytest.approx(far(*(b.name for b in greedy.blocks)), rel=1e-4)


def test_score_for_the_macs_saved(residual: fw.Network) -> None:
    counted, blocks = macs(residual), droppable(residual)
    plain, per = (Layers(count=1, score="norm", per=p).plan(residual, NOTHING) for p in ("block", "macs"))
    for block in blocks.found:
        small = Layers(names=(block.name,)).plan(residual, NOTHING).apply(residual)
        saved = 1 - macs(small).total / counted.total
        assert per.scores[block.name] == pytest.approx(plain.scores[block.name] / saved)


def test_scores_without_data_and_with_chance(residual: fw.Network) -> None:
    assert len(Layers(count=1, score="norm").plan(residual, NOTHING).blocks) == 1
    plans = [Layers(count=2, score="random", seed=s).plan(residual, NOTHING) for s in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    assert plans[0].scores.keys() == {"1", "2", "3", "4"}
    with pytest.raises(TaskError, match="calibration"):
        Layers(count=1).plan(residual, NOTHING)
    with pytest.raises(TaskError, match="loss"):
        Layers(count=1, score="loss").plan(residual, fw.Task(calibration=images_task().calibration))


# ---- what is said

def test_blocks_kept_missing_and_too_few_are_named(residual: fw.Network) -> None:
    plan = Layers(count=5, score="norm", ignore=("3", "33"), kinds=("residual",)).plan(residual, NOTHING)
    said = {s.path: s.reason for s in plan.skipped}
    assert sorted(b.name for b in plan.blocks) == ["1", "4"]
    assert "only 2 blocks may be dropped" in said[""]
    assert said["3"] == "named in ignore='3'"
    assert "no block of this name may be dropped; " in said["33"]
    assert "kind 'shortcut'" in said["2"]


def test_blocks_that_share_calls_exclude_one_another() -> None:
    net = network(PROBLEMS["attention"])
    plan = Layers(names=("blocks.0*",), kinds=ALL).plan(net, NOTHING)
    assert [b.name for b in plan.blocks] == ["blocks.0", "blocks.0:2"]
    assert {s.path: s.reason for s in plan.skipped}["blocks.0 (layer)"] == "it shares calls with 'blocks.0', which goes"
    plan = Layers(count=6, kinds=ALL).plan(net, task(PROBLEMS["attention"]))
    outs = outputs(plan.apply(net))
    assert all(bool(torch.isfinite(o).all()) for o in outs)
    assert 2 <= len(plan.blocks) <= 4


def test_plan_of_another_network_is_refused(residual: fw.Network) -> None:
    plan = Layers(count=1, score="norm").plan(residual, NOTHING)
    with pytest.raises(PlanError, match="which is no block of this network that may be dropped; make the plan on this"):
        plan.apply(network(PROBLEMS["mlp"]))
    wrong = LayerPlan((Block("1", plan.blocks[0].output, "relu", "plain"),), {})
    with pytest.raises(PlanError, match="no block of this network"):
        wrong.apply(residual)


@pytest.mark.parametrize(("step", "message"), [
    (Layers(), r"write Layers\(count=2\)"),
    (Layers(count=1, names=("a",)), "one of the two"),
    (Layers(count=0), "count=0; expected an integer from 1"),
    (Layers(count=1, batches=0), r"batches=0.*batches=4"),
    (Layers(count=1, score="outputs"), "did you mean 'output'"),
    (Layers(count=1, per="mac"), "no per 'mac'; did you mean 'macs'"),
    (Layers(count=1, kinds=("residuals",)), "did you mean 'residual'"),
    (Layers(count=1, kinds=()), r"kinds=\(\); expected one or more of"),
])
def test_senseless_options_are_answered_with_the_line_to_write(step: Layers, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        step.plan(network(PROBLEMS["mlp"]), NOTHING)


def test_a_transformer_loses_a_layer_and_learns_on() -> None:
    torch.manual_seed(0)
    net = fw.capture(Attention().eval(), images())
    small = Layers(count=1, kinds=("layer",)).plan(net, task(PROBLEMS["attention"])).apply(net)
    fitted = fw.recover.Train(epochs=1, lr=0.01).fit(small, task(PROBLEMS["attention"]), fw.steps.Context())
    assert all(bool(torch.isfinite(o).all()) for o in outputs(fitted))
