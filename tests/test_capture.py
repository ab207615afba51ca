"""What capture keeps: outputs, types, ties, sizes; and what it says when it cannot."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight as fw
from featherweight.network.operators import mutates
from featherweight.task import call
from problems import PROBLEMS, Answer, Problem, images, network, rows, tensors_of

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def plain_attention():
    """The same attention kernels with and without gradients, so that outputs can be compared bit for bit."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def same(wanted, given) -> None:
    """Asserts equal nests of bit-for-bit equal tensors."""
    a, b = torch.utils._pytree.tree_flatten(wanted), torch.utils._pytree.tree_flatten(given)
    assert a[1] == b[1]
    for x, y in zip(a[0], b[0], strict=True):
        assert type(x) is type(y)
        if isinstance(x, Tensor):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        else:
            assert x == y


def captured(function, *inputs, **kwargs) -> fw.Network:
    """Captures a plain function (with a parameter, so that it is a model) and checks it on its inputs and on others."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.5, -0.5, 2.0]))

        def forward(self, *args):
            return function(self, *args)

    model = Model()
    found = fw.capture(model, inputs, parts=False, **kwargs)
    for shift in (0.0, 0.7, -3.0):
        other = [x + shift if x.is_floating_point() else x for x in inputs]
        with torch.no_grad():
            same(model(*[x.clone() for x in other]), found(*[x.clone() for x in other]))
    return found


def in_place(network: fw.Network) -> list[str]:
    return [str(n.target) for n in network.calls() if mutates(n)]


# ---- outputs

@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=str)
def test_outputs_are_the_models_bit_for_bit(problem: Problem):
    model, net = problem.factory(), network(problem)
    for batch in [problem.batch] if problem.batch else [1, 2, 3, 7]:
        inputs = problem.example(batch, seed=batch + 10)
        with torch.no_grad():
            same(call(model, inputs), call(net, inputs))
    assert net.signature.dynamic_batch == (problem.batch is None)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=str)
def test_state_dict_is_the_models(problem: Problem):
    model, net = problem.factory(), network(problem)
    ours, theirs = net.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)
    net.load_state_dict(PROBLEMS[problem.name].factory(seed=5).state_dict())
    with torch.no_grad():
        same(call(PROBLEMS[problem.name].factory(seed=5), problem.example()), call(net, problem.example()))


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=str)
def test_no_call_writes_into_anything(problem: Problem):
    assert in_place(network(problem)) == []


def test_the_model_is_left_as_it_was():
    model = PROBLEMS["dropout"].factory().train()
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    fw.capture(model, images())
    assert model.training
    assert not model[0].training
    assert model[1].training
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_training_follows_capture_of_a_model_in_training_mode():
    model = PROBLEMS["dropout"].factory().train()
    net = fw.capture(model, images())
    with torch.no_grad():
        same(model.eval()(images()), net(images()))


# ---- inputs and outputs of every form

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Inner:
    value: Tensor
    more: list[Tensor]


@dataclass
class Outer:
    inner: Inner
    score: Tensor
    nothing: Tensor | None = None


class Forms(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 4)
        self.form = form

    def forward(self, x: Tensor):
        y = self.linear(x)
        return {
            "tuple": (y, y * 2), "list": [y, [y * 2]], "dict": {"b": y, "a": y * 2},
            "nested": {"z": (y, {"k": [y * 3]})},
            "ordered": OrderedDict([("b", y), ("a", y * 2)]), "named": Pair(y, y * 2),
            "dataclass": Outer(Inner(y, [y * 2, y * 3]), y.sum(1)), "none": (y, None), "same": (y, y), "input": (y, x),
            "number": (y, 3, True), "weight": (y, self.linear.bias),
        }[self.form]


@pytest.mark.parametrize("form", ["tuple", "list", "dict", "nested", "ordered", "named", "dataclass", "none", "same",
                                  "input", "number", "weight"])
def test_outputs_come_back_as_their_types(form):
    model = Forms(form).eval()
    net = fw.capture(model, rows(), parts=False)
    with torch.no_grad():
        wanted, given = model(rows(5)), net(rows(5))
    assert type(given) is type(wanted)
    same(wanted, given)
    if form == "dataclass":
        assert isinstance(given.inner, Inner)
        assert given.nothing is None


def test_positions_and_keywords_in_any_order():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 4)

        def forward(self, x: Tensor, *more: Tensor, scale: Tensor, flag: bool = False, bias: Tensor) -> Tensor:
            y = self.linear(x) * scale + sum(m.mean() for m in more) + bias
            return -y if flag else y

    model = Model().eval()
    args, kwargs = (rows(), rows(2, 3)), {"scale": rows(2, 1), "flag": True, "bias": rows(2, 4)}
    net = fw.capture(model, args, kwargs=kwargs, parts=False)
    turned = {"bias": rows(3, 4), "flag": True, "scale": rows(3, 1)}
    with torch.no_grad():
        same(model(rows(3), rows(3, 3), **turned), net(rows(3), rows(3, 3), **turned))
    with pytest.raises(fw.errors.InputError, match="it was True at capture"):
        net(rows(), rows(2, 3), scale=rows(2, 1), flag=False, bias=rows(2, 4))


def test_nested_inputs():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 4)

        def forward(self, batch: dict, pair: tuple) -> Tensor:
            return self.linear(batch["x"] + batch["deep"][0]) + pair[1]

    model = Model().eval()
    make = lambda n: ({"x": rows(n), "deep": [rows(n, seed=2)]}, (rows(n), rows(n, 4)))  # noqa: E731
    net = fw.capture(model, make(2), parts=False)
    with torch.no_grad():
        same(model(*make(5)), net(*make(5)))


def test_integer_inputs_and_mixed_dtypes():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 8)
            self.low = nn.Linear(8, 8).to(torch.bfloat16)
            self.high = nn.Linear(8, 4).double()

        def forward(self, words: Tensor, mask: Tensor) -> Tensor:
            x = self.embedding(words) * mask.unsqueeze(-1)
            return self.high(self.low(x.sum(1).to(torch.bfloat16)).double())

    model = Model().eval()
    inputs = (torch.randint(10, (2, 5)), torch.rand(2, 5) > 0.5)
    net = fw.capture(model, inputs, parts=False)
    assert [i.dtype for i in net.signature.inputs] == [torch.int64, torch.bool]
    with torch.no_grad():
        same(model(*inputs), net(*inputs))
    assert {str(p.dtype) for p in net.parameters()} == {"torch.float32", "torch.bfloat16", "torch.float64"}


# ---- sizes

def test_a_batch_of_one_stays_free():
    net = fw.capture(PROBLEMS["residual"].factory(), images(1), parts=False)
    assert net.signature.inputs[0].shape == (None, 3, 8, 8)
    with torch.no_grad():
        same(PROBLEMS["residual"].factory()(images(5)), net(images(5)))


def test_two_inputs_of_one_batch_and_one_without():
    def function(model, table, x, y):
        return x @ table + y * model.weight

    net = captured(function, torch.randn(12, 3), rows(2), rows(2, 3))
    assert [i.shape for i in net.signature.inputs] == [(12, 3), (None, 12), (None, 3)]


def test_a_fixed_batch_is_noted():
    net = network(PROBLEMS["static_batch"])
    assert net.signature.inputs[0].shape == (4, 3, 8, 8)
    assert any("batch size is fixed" in note for note in net.notes)
    with pytest.raises(fw.errors.InputError, match=r"has shape \[2, 3, 8, 8\]; expected \[4, 3, 8, 8\]"):
        net(images(2))


def test_a_model_that_decides_by_the_batch_size_is_not_captured_wrongly():
    def large(model, x):
        return x * 2 if x.shape[0] > 2 else x * 3

    net = fw.capture(_model(large), rows(2, 3), parts=False)
    assert not net.signature.dynamic_batch or any("other outputs" in n or "another branch" in n for n in net.notes)
    with torch.no_grad():
        same(rows(2, 3) * 3, net(rows(2, 3)))

    def one(model, x):
        return x * 2 if x.shape[0] == 1 else x * 3

    for batch in (1, 2):
        net = fw.capture(_model(one), rows(batch, 3), parts=False)
        with torch.no_grad():
            same(rows(batch, 3) * (2 if batch == 1 else 3), net(rows(batch, 3)))
        assert net.notes


def _model(function) -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, *args):
            return function(self, *args)

    return Model().eval()


# ---- ties, buffers

def test_ties_are_kept_by_capture_copy_and_training():
    for name, a, b in [("tied", "embedding.weight", "output.weight"), ("tied_linear", "a.weight", "b.weight")]:
        net = network(PROBLEMS[name])
        for one in (net, net.copy(), copy.deepcopy(net)):
            assert one.tensor(a) is one.tensor(b)
            assert sorted(one.tied_names(a)) == sorted([a, b])
            every = {id(p) for p in one.tensors().values() if isinstance(p, nn.Parameter)}
            assert len(list(one.parameters())) == len(every)
        net.set_tensor(a, torch.zeros_like(net.tensor(a)))
        assert net.tensor(b) is net.tensor(a)
        assert net.copy().tensor(a) is not net.tensor(a)


def test_a_shared_module_is_read_under_one_name():
    net = network(PROBLEMS["shared"])
    assert len(net.users_of("block.0.weight")) == 2
    assert [n.meta["module"] for n in net.calls(aten.conv2d.default)] == ["stem.0", "block.0", "block.0"]


def test_persistent_and_other_buffers():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 3)
            self.register_buffer("kept", torch.tensor([1.0, 2.0, 3.0]))
            self.register_buffer("left", torch.tensor([3.0, 2.0, 1.0]), persistent=False)
            self.plain = torch.tensor([0.5, 0.5, 0.5])

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.kept + self.left + self.plain

    model = Model().eval()
    net = fw.capture(model, rows(), parts=False)
    assert list(net.state_dict()) == list(model.state_dict()) == ["kept", "linear.weight", "linear.bias"]
    assert {"kept", "left"} <= set(dict(net.named_buffers()))
    with torch.no_grad():
        same(model(rows(4)), net(rows(4)))
        same(model(rows(4)), net.copy()(rows(4)))


# ---- hidden effects

def _relu_after_view(model, x):
    y = x * model.weight
    z = y.view(-1)
    F.relu_(y)
    return z + 1, y


def _add_on_a_slice(model, x):
    y = x * model.weight
    y[:, 1:] += 2
    return y * 3


def _write_a_column(model, x):
    y = x * model.weight
    y[:, 0] = x[:, 1] * 5
    return y, y[:, 0]


def _nested_slices(model, x):
    y = x * model.weight
    z = y[:, 1:]
    z[:, 0].mul_(4)
    return y, z


def _residual(model, x):
    y = x * model.weight
    z = F.relu_(y)
    z += y
    return z


def _residual_input(model, x):
    y = x * model.weight
    z = torch.tanh(y)
    z += y
    return F.relu(z, inplace=True) + y


def _view_after(model, x):
    y = x * model.weight
    y.add_(1)
    return y.flatten(), y.t()


def _unused_result(model, x):
    y = x * model.weight
    y.clamp_(0)
    y.mul_(2)
    return y


def _own_input(model, x):
    x += 1
    x[:, 0] = 7
    return x * model.weight


def _viewed_input(model, x):
    x.view(-1)[0] = 7
    return x * model.weight


def _masked(model, x):
    y = x * model.weight
    y[y < 0] = -1
    return y.masked_fill_(y > 2, 2.0)


def _casts(model, x):
    y = (x * model.weight).half()
    y += x
    y *= 0.1
    return y


def _two_views(model, x):
    y = x * model.weight
    a, b = y[:, :1], y[:, 1:]
    a.add_(1)
    b.mul_(2)
    return y, a, b


def _transposed_view(model, x):
    y = (x * model.weight).clone()
    y.t().add_(1)
    return y


def _reshaped(model, x):
    y = torch.cat([x, x], 1) * 2
    a, b = y[:, :3], y.reshape(-1)
    a.t().add_(model.weight.sum())
    return y, b


FUNCTIONAL = [_add_on_a_slice, _write_a_column, _nested_slices, _residual, _residual_input, _view_after, _unused_result,
              _own_input, _masked, _casts, _two_views, _relu_after_view]


@pytest.mark.parametrize("function", [*FUNCTIONAL, _viewed_input, _transposed_view, _reshaped])
def test_in_place_calls_compute_the_same(function):
    net = captured(function, torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    if function in FUNCTIONAL:
        assert in_place(net) == []
    x = torch.randn(4, 3)
    before = x.clone()
    net(x)
    torch.testing.assert_close(x, before, rtol=0, atol=0)  # the caller's tensor is never written into


@pytest.mark.parametrize("function", [f for f in FUNCTIONAL if f not in (_residual, _residual_input)])
def test_in_place_calls_give_the_same_gradients(function):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    model = _model(function)
    net = fw.capture(model, x, parts=False)
    for one in (model, net):
        sum((t.float() ** 2).sum() for t in tensors_of(one(x.clone()))).backward()
    torch.testing.assert_close(net.weight.grad, model.weight.grad)


def test_what_depends_on_no_input_is_stored():
    def function(model, x):
        mask = torch.zeros(3, 3)
        mask[0] = 1
        early = mask * 2
        mask[1] = 5
        grid = x.new_zeros(3)
        grid[:2] = 4
        return x @ mask + x @ early + torch.arange(3) + grid + model.weight

    net = captured(function, rows(2, 3))
    assert {str(n.target) for n in net.calls()} == {"aten.matmul.default", "aten.add.Tensor"}
    assert set(net.state_dict()) == {"weight"}


def test_random_numbers_are_not_stored():
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight + 1e-9 * torch.rand(3)

    net = fw.capture(Noise(), rows(2, 3), parts=False)
    assert any("rand" in str(n.target) for n in net.calls())


def test_no_grad_regions():
    def function(model, x):
        with torch.no_grad():
            scale = (x * model.weight).abs().mean()
            with torch.enable_grad():
                more = x * 2
        return x * model.weight / scale + more

    net = captured(function, rows(2, 3))
    model = _model(function)
    with torch.no_grad():
        net.weight.copy_(model.weight)
    for one in (model, net):
        one(rows(2, 3)).sum().backward()
    torch.testing.assert_close(net.weight.grad, model.weight.grad)


def test_attention_stays_open_with_frozen_weights():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval().requires_grad_(False)
    net = fw.capture(layer, torch.randn(2, 5, 16), parts=False)
    assert not [n for n in net.calls() if "transformer" in str(n.target) or "multi_head" in str(n.target)]


# ---- what cannot be captured

class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        if self.linear(x).sum() > 0:  # decided by a value
            return x
        return x * 2


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 12), nn.ReLU())
        self.branch = nn.ModuleList([Branch()])
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.branch[0](self.body(x)))


def test_control_flow_is_told_by_module_and_line():
    message = r"in module 'branch\.0'.*test_capture\.py:\d+.*decided by a value"
    with pytest.raises(fw.errors.CaptureError, match=message):
        fw.capture(Branching(), rows(), parts=False)


def test_parts_of_what_cannot_be_captured():
    model = Branching().eval()
    assembly = fw.capture(model, rows())
    assert isinstance(assembly, fw.Assembly)
    assert list(assembly.parts) == ["body", "branch.0.linear", "head"]
    assert any(note.startswith("branch.0 stays Python") for note in assembly.notes)
    with torch.no_grad():
        same(model(rows(6)), assembly(rows(6)))
    assembly.replace("head", assembly.parts["head"].copy())
    with pytest.raises(KeyError, match="no part at 'tail'"):
        assembly.replace("tail", assembly.parts["head"])


def test_a_part_called_at_several_sizes_or_places():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
            self.again = self.conv
            self.sized = Sized()

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            small = self.again(x[..., ::2, ::2])
            if float(y.detach().sum()) > 1e9:
                return y
            return y + F.interpolate(small, size=y.shape[2:]) + self.sized(x) + self.sized(x[..., :5])[..., :1]

    class Sized(nn.Module):
        """Decides by its input's width: a capture at one width would be wrong at another."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight if x.shape[-1] > 6 else -x * self.weight

    model = Model().eval()
    assembly = fw.capture(model, images())
    assert "sized" not in assembly.parts
    assert assembly.model.conv is assembly.model.again
    with torch.no_grad():
        for size in (8, 12, 9):
            same(model(images(2, size=size)), assembly(images(2, size=size)))


def test_torn_ties_of_parts_are_named():
    model = Branching()
    model.head = nn.Linear(12, 12)
    model.head.weight = model.body[0].weight
    assembly = fw.capture(model, rows())
    assert any("tied weights are apart now: body.0.weight, head.weight" in note for note in assembly.notes)


def test_a_failed_capture_prints_nothing(capfd):
    fw.capture(Branching(), rows())
    assert capfd.readouterr() == ("", "")


def test_parts_of_a_model_that_gives_a_dataclass():
    @dataclass
    class Found:
        first: Tensor
        rest: list[Tensor]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Branching()

        def forward(self, x: Tensor) -> Found:
            y = self.inner(x)
            return Found(y, [y * 2])

    model = Model().eval()
    assembly = fw.capture(model, rows(), parts=True)
    with torch.no_grad():
        same(model(rows(4)), assembly(rows(4)))


def test_nothing_captures():
    with pytest.raises(fw.errors.CaptureError, match="no part of it could be captured either"):
        fw.capture(Alone(), rows())


class Alone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight if (x * self.weight).sum() > 0 else x


@pytest.mark.parametrize(("call", "message"), [
    (lambda: fw.capture(PROBLEMS["mlp"].factory(), "x"), "example inputs are a str; expected a tensor, a tuple"),
    (lambda: fw.capture(PROBLEMS["mlp"].factory(), rows(2, 5)), "does not run on the example inputs: RuntimeError"),
    (lambda: fw.capture(network(PROBLEMS["mlp"]), rows()), "captured already"),
    (lambda: fw.capture(_model(lambda m, x: F.dropout(x * m.weight, 0.5)), rows(16, 3), parts=False),
     "is the model random in evaluation mode"),
])
def test_wrong_uses_of_capture(call, message):
    with pytest.raises(fw.errors.CaptureError, match=message):
        call()


def test_answer_type_survives():
    net = network(PROBLEMS["dataclass_output"])
    assert isinstance(net(**PROBLEMS["dataclass_output"].example()), Answer)


def test_every_call_knows_its_module_and_line():
    net = network(PROBLEMS["residual"])
    assert {"stem.0", "layer1.0.conv1", "layer2.0.bn2", "fc"} <= set(net.paths())
    padding = net.calls(aten.pad.default)[0]
    assert padding.meta["module"] == "layer2.0"
    assert padding.meta["source"].startswith("problems.py:")


class Turned(nn.Module):
    """A product that is turned around: whether its memory is in order depends on that of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp().permute(1, 0, 2).contiguous().view(-1, x.shape[2])


@pytest.mark.parametrize("turned", [True, False])
def test_a_view_of_what_was_turned_around_takes_any_memory(turned: bool) -> None:
    given = torch.randn(4, 3, 5).permute(1, 0, 2), torch.randn(3, 4, 5)
    found = fw.capture(Turned().eval(), given[0] if turned else given[1])
    for x in given:
        assert torch.equal(found(x), Turned()(x))
