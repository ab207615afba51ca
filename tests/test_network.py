"""A Network trains, copies, is edited and exported as the model it was captured from."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight as fw
from featherweight.network import fold_batch_norm, settle_batch_norm
from featherweight.network.edit import insert_call
from featherweight.task import call
from problems import PROBLEMS, Problem, conv, first_tensor, images, network, rows, tensors_of, unsettle
from test_capture import plain_attention, same  # noqa: F401

aten = torch.ops.aten
TRAINED = ["conv_bn", "residual", "depthwise", "shared", "no_momentum", "dropout", "transposed", "tied", "tied_linear",
           "attention"]


# ---- training

@pytest.mark.parametrize("name", TRAINED)
def test_trains_in_step_with_the_model_bit_for_bit(name):
    """Three steps of SGD with momentum, evaluation, one more step: parameters, statistics and counters are equal."""
    problem = PROBLEMS[name]
    model, net = problem.factory(), network(problem)
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9) for one in (model, net)]

    def step(one: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        output = first_tensor(call(one.train(), problem.example(6, seed=seed)))
        optimizer.zero_grad()
        F.cross_entropy(output, torch.arange(6) % output.shape[1]).backward()
        optimizer.step()

    for seed in range(3):
        for one, optimizer in zip((model, net), optimizers, strict=True):
            step(one, optimizer, seed)
    with torch.no_grad():
        same(call(model.eval(), problem.example(3)), call(net.eval(), problem.example(3)))
    for one, optimizer in zip((model, net), optimizers, strict=True):
        step(one, optimizer, 9)
    ours, theirs = net.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)
    if "residual" in name:
        assert int(ours["stem.1.num_batches_tracked"]) == 7 + 4


def test_train_and_eval_flip_all_flags_and_only_them():
    net, model = network(PROBLEMS["dropout"]), PROBLEMS["dropout"].factory()
    assert not net.training
    for mode in (True, False, True, False):
        torch.manual_seed(0)
        wanted = model.train(mode)(images(4))
        torch.manual_seed(0)
        same(wanted.detach(), net.train(mode)(images(4)).detach())
    assert net.copy().train().copy().training


def test_frozen_parameters_stay_frozen():
    model = PROBLEMS["mlp"].factory()
    model[0].weight.requires_grad_(False)
    net = fw.capture(model, rows())
    assert not net.tensor("0.weight").requires_grad
    assert not net.copy().tensor("0.weight").requires_grad
    assert net.tensor("0.bias").requires_grad


def test_a_recurrent_network_trains_with_dropout():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(12, 8, 2, dropout=0.5, batch_first=True)
            self.gru = nn.GRU(8, 8, batch_first=True, bidirectional=True)
            self.fc = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.gru(self.lstm(x)[0])[0][:, -1])

    torch.manual_seed(0)
    model = Recurrent().eval()
    net = fw.capture(model, torch.randn(2, 5, 12), parts=False)
    assert net.signature.dynamic_batch
    x = torch.randn(3, 5, 12)
    for mode in (False, True):
        torch.manual_seed(1)
        wanted = model.train(mode)(x)
        torch.manual_seed(1)
        same(wanted.detach(), net.train(mode)(x).detach())


# ---- calls

@pytest.mark.parametrize(("inputs", "message"), [
    ((rows(2, 5),), r"input 'x' has shape \[2, 5\]; expected \[any, 12\] float32"),
    ((torch.randn(12),), r"has shape \[12\]; expected \[any, 12\]"),
    ((rows(), rows()), r"called with 2 positional and \[\] keyword inputs nested as \(\(\*, \*\), \{\}\); "
                       r"captured with \(x\)"),
    (([rows()],), r"nested as \(\(\[\*\],\), \{\}\)"),
    ((3,), r"input 'x' is a int; expected a tensor"),
])
def test_wrong_inputs_are_told(inputs, message):
    with pytest.raises(fw.errors.InputError, match=message):
        network(PROBLEMS["gated"])(*inputs)


def test_taps_see_and_change_values_weights_included():
    net, model = network(PROBLEMS["gated"]), PROBLEMS["gated"].factory()
    weight = next(n for n in net.graph.nodes if n.op == "get_attr" and n.target == "fc.weight")
    silu = net.calls(aten.silu.default)[0]
    seen: list[Tensor] = []
    with net.taps({weight.name: lambda v: v * 2, silu.name: seen.append}):
        tapped = net(rows(3))
    with torch.no_grad():
        model.fc.weight.mul_(2)
        same(model(rows(3)), tapped.detach())
        assert seen[0].shape == (3, 16)
        model.fc.weight.div_(2)
        same(model(rows(3)), net(rows(3)))
    remove = net.add_tap(silu.name, lambda v: v * 0)
    assert not torch.equal(net(rows()), model(rows()))
    remove()
    remove()
    same(model(rows()).detach(), net(rows()).detach())
    with pytest.raises(KeyError, match="no node named 'nothing'"):
        net.add_tap("nothing", lambda v: v)


def test_a_tap_on_a_weight_is_differentiable():
    net = network(PROBLEMS["gated"])
    weight = next(n.name for n in net.graph.nodes if n.op == "get_attr" and n.target == "fc.weight")
    mask = (torch.rand(net.tensor("fc.weight").shape) > 0.5).float()
    with net.taps({weight: lambda v: v * mask}):
        net(rows(3)).square().sum().backward()
    assert bool((net.tensor("fc.weight").grad[mask == 0] == 0).all())
    assert bool((net.tensor("fc.weight").grad[mask == 1] != 0).any())


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=str)
def test_values_are_those_that_flow(problem: Problem):
    """``values`` against what taps on every node see."""
    net, seen = network(problem), {}
    batch = problem.batch or 3
    values = net.values(batch)
    taps = {n.name: (lambda v, name=n.name: seen.__setitem__(name, v)) for n in net.graph.nodes if n.op != "output"}
    with net.taps(taps):
        args, kwargs = net.example_inputs(batch)
        net(*args, **kwargs)
    assert values.keys() == seen.keys()
    for name, value in seen.items():
        if isinstance(value, Tensor):
            assert (values[name].shape, values[name].dtype) == (value.shape, value.dtype)
        elif isinstance(value, int):
            assert values[name] == value


def test_example_inputs_fit_and_repeat():
    for problem in PROBLEMS.values():
        net = network(problem)
        for one, other in zip(tensors_of(net.example_inputs(3)), tensors_of(net.example_inputs(3)), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


# ---- copies and edits

@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=str)
def test_a_copy_is_equal_and_apart(problem: Problem):
    net = network(problem)
    net.notes.append("a note")
    net.patterns["x"] = "1:2"
    other = copy.deepcopy(net)
    with torch.no_grad():
        before = call(net, problem.example())
        same(before, call(other, problem.example()))
        for tensor in other.tensors().values():
            tensor.zero_()
        other.notes.append("another")
        other.patterns.clear()
        same(before, call(net, problem.example()))
    assert (net.notes[-1], net.patterns) == ("a note", {"x": "1:2"})
    assert [n.name for n in net.graph.nodes] == [n.name for n in other.graph.nodes]
    assert [n.meta for n in net.graph.nodes] == [n.meta for n in other.graph.nodes]


def test_tensors_are_added_set_and_removed_by_name():
    net = network(PROBLEMS["mlp"])
    net.add_tensor("new.deep.scale", torch.ones(3))
    net.add_tensor("new.deep.index", torch.arange(3))
    net.add_tensor("new.deep.plain", torch.ones(3), buffer=True, persistent=False)
    assert isinstance(net.tensor("new.deep.scale"), nn.Parameter)
    assert [n for n in net.state_dict() if n.startswith("new")] == ["new.deep.scale", "new.deep.index"]
    with pytest.raises(KeyError, match=r"something named 'new\.deep\.scale' already"):
        net.add_tensor("new.deep.scale", torch.ones(3))
    with pytest.raises(KeyError, match="lies under a tensor"):
        net.add_tensor("new.deep.scale.more", torch.ones(3))
    for leaf in ("scale", "index", "plain"):
        net.remove_tensor(f"new.deep.{leaf}")
    assert "new" not in dict(net.named_modules())
    with pytest.raises(KeyError, match=r"no tensor named 'new\.deep\.scale'"):
        net.tensor("new.deep.scale")
    net.set_tensor("0.weight", torch.zeros(32, 12))
    assert isinstance(net.tensor("0.weight"), nn.Parameter)


def test_an_edited_graph_runs_after_changed():
    net = network(PROBLEMS["mlp"])
    relu = net.calls(aten.relu.default)[0]
    before = net(rows())
    node = insert_call(net, aten.mul.Tensor, (relu, 2.0), after=relu)
    relu.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    net.changed()
    assert not torch.equal(before, net(rows()))
    assert node.meta["module"] == "1"


# ---- batch-norm folding

def _folds(model: nn.Module, x: Tensor, left: int = 0) -> fw.Network:
    unsettle(model)
    model.double().eval()
    x = x.double()
    net = fw.capture(model, x, parts=False)
    before = copy.deepcopy(net.state_dict())
    folded = fold_batch_norm(net)
    assert len(folded.calls(aten.batch_norm.default)) == left
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    if not left:
        assert not [n for n in folded.state_dict() if "running" in n or "tracked" in n]
    return folded


@pytest.mark.parametrize("make", [
    lambda: (conv(3, 8), images()),
    lambda: (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)), images(channels=4)),
    lambda: (nn.Sequential(nn.Linear(12, 6), nn.BatchNorm1d(6, affine=False)), rows(4)),
    lambda: (nn.Sequential(nn.Conv1d(3, 8, 3, padding="same"), nn.BatchNorm1d(8)), torch.randn(2, 3, 9)),
    lambda: (nn.Sequential(nn.Conv3d(3, 4, 2, bias=False), nn.BatchNorm3d(4)), torch.randn(2, 3, 4, 4, 4)),
    lambda: (nn.Sequential(nn.ConvTranspose2d(3, 8, 2, 2, bias=False), nn.BatchNorm2d(8)), images()),
    lambda: (nn.Sequential(nn.ConvTranspose2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)), images(channels=4)),
    lambda: (nn.Sequential(nn.ConvTranspose1d(4, 8, 3, groups=4), nn.BatchNorm1d(8)), torch.randn(2, 4, 5)),
], ids=["conv", "grouped", "linear", "conv1d", "conv3d", "transposed", "transposed_grouped", "transposed1d"])
def test_folding_batch_norm_changes_no_output(make):
    torch.manual_seed(0)
    _folds(*make())


def test_what_cannot_be_folded_stays():
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + y

    _folds(Read(), images(), left=1)
    _folds(PROBLEMS["shared"].factory(), images(), left=2)
    _folds(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), images(), left=1)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=str)
def test_folding_every_problem(problem: Problem):
    net = network(problem)
    folded = fold_batch_norm(net)
    with torch.no_grad():
        wanted, given = (tensors_of(call(one, problem.example())) for one in (net, folded))
        for a, b in zip(wanted, given, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=str)
def test_settled_batch_norms_have_the_statistics_of_nobody(problem: Problem):
    net = network(problem)
    settled = settle_batch_norm(net)
    for norm, before in zip(settled.calls(aten.batch_norm.default), net.calls(aten.batch_norm.default), strict=True):
        names = [str(a) for a in (n.target for n in norm.args[1:5] if n is not None)]
        alone = len(names) == 4 and all(len(settled.users_of(n)) == 1 for n in names)
        mean, var = (settled.tensor(n) for n in names[-2:])
        assert alone == bool((mean == 0).all() and (var == var[0]).all() and str(before.args[1]) == str(norm.args[1]))
    with torch.no_grad():
        wanted, given = (tensors_of(call(one, problem.example())) for one in (net, settled))
        for a, b in zip(wanted, given, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_settled_batch_norms_take_half_of_the_archive():
    model = nn.Sequential(nn.BatchNorm1d(2000), nn.BatchNorm1d(2000))
    unsettle(model)
    net = fw.capture(model.eval(), torch.randn(3, 2000))
    whole, settled = fw.codec.archive_bytes(net), fw.codec.archive_bytes(settle_batch_norm(net))
    assert settled < 0.6 * whole


# ---- out again

@pytest.mark.parametrize("name", ["residual", "attention", "dict_output", "two_inputs", "tied", "shuffle"])
def test_exports_again(name):
    problem = PROBLEMS[name]
    net = network(problem)
    inputs = problem.example(2)
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    shapes = tuple({0: torch.export.Dim.AUTO} for _ in args)
    program = torch.export.export(net, args, dynamic_shapes=(shapes,), strict=False)
    assert set(program.state_dict) == set(net.state_dict())
    with torch.no_grad():
        more = problem.example(5)
        same(call(net, more), call(program.module(), more))
    again = fw.capture(_Held(net), inputs, parts=False)
    with torch.no_grad():
        same(call(net, more), call(again, more))
    assert len(again.calls()) == len(net.calls())


class _Held(nn.Module):
    """A model with a Network inside."""

    def __init__(self, net: fw.Network) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs):
        return self.net(*inputs)


@pytest.mark.parametrize("name", ["residual", "attention", "two_inputs"])
def test_runs_in_onnx_runtime(name, tmp_path):
    import onnxruntime

    problem = PROBLEMS[name]
    net = network(problem)
    inputs = problem.example(2)
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    path = tmp_path / "net.onnx"
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in args)
    torch.onnx.export(net, args, path, dynamo=True, dynamic_shapes=(shapes,), verbose=False)
    session = onnxruntime.InferenceSession(path)
    more = problem.example(5)
    feeds = dict(zip([i.name for i in session.get_inputs()], more if isinstance(more, tuple) else (more,), strict=True))
    got = session.run(None, {k: v.numpy() for k, v in feeds.items()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got[0]), tensors_of(call(net, more))[0], rtol=1e-4, atol=1e-5)
