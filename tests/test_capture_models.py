"""Models as people write them, captured: each is treated, or refused in words that name what and where."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import library as operators

import featherweight as fw

torch.set_num_threads(1)


class Calls(nn.Module):
    """Two linear layers and a function that calls them."""

    def __init__(self, call: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.call, self.a, self.b = call, nn.Linear(4, 4), nn.Linear(4, 4)
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(self, *inputs)


class Counting(nn.Module):
    """Counts its calls in one buffer and keeps a moving average in another, in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.count += 1
        self.average.mul_(0.9).add_(h.mean(0) * 0.1)
        return h + self.average


class Training(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x * 2 if self.training else x)


class HandsOn(nn.Module):
    """Hands its mode on to a dropout, which the graph has too."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.a(x), 0.5, self.training)


def under_autocast(m: Any, x: Tensor, on: bool) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=on):
        return m.b(m.a(x)).float()


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)


def causal(size: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(size)


#: name -> (model, inputs)
WHOLE: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "an encoder with a mask": (lambda: Calls(lambda m, x, mask: m.e(x, mask=mask), e=encoder()),
                               lambda: (torch.randn(3, 5, 16), causal(5))),
    "an encoder with padding": (lambda: Calls(lambda m, x, pad: m.e(x, src_key_padding_mask=pad), e=encoder()),
                                lambda: (torch.randn(3, 5, 16), torch.arange(5).expand(3, 5) > 2)),
    "encoder and decoder": (lambda: Calls(lambda m, x, y: m.t(x, y, tgt_mask=causal(4)),
                                          t=nn.Transformer(16, 2, 1, 1, 32, batch_first=True)),
                            lambda: (torch.randn(3, 5, 16), torch.randn(3, 4, 16))),
    "autocast that is off": (lambda: Calls(lambda m, x: under_autocast(m, x, False)), lambda: (torch.randn(3, 4),)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_captured_whole(name: str) -> None:
    build, inputs = WHOLE[name]
    torch.manual_seed(0)
    model, given = build().eval(), inputs()
    net = fw.capture(model, given, parts=False)
    padded = given[-1] if given[-1].dtype == torch.bool else torch.zeros(len(given[0]), dtype=torch.bool)
    with torch.no_grad():  # padded tokens mean nothing
        torch.testing.assert_close(net(*given)[~padded], model(*given)[~padded], rtol=1e-4, atol=1e-5)


class Rescaled(nn.Module):
    """Halves a weight and drops a row of another when it evaluates first, as RWKV does it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.rescaled = nn.Linear(4, 4), nn.Linear(4, 4), False

    def forward(self, x: Tensor) -> Tensor:
        if not self.rescaled:
            with torch.no_grad():
                self.a.weight.div_(2)
                self.b.weight[1] = 0
            self.rescaled = True
        return self.b(self.a(x))


def test_weights_that_the_model_writes_are_left_as_they_were_and_written_once() -> None:
    torch.manual_seed(0)
    model, x = Rescaled().eval(), torch.randn(3, 4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    net = fw.capture(model, x, parts=False)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not model.rescaled
    assert not any("written into" in note for note in net.notes)
    wanted = model(x)
    for _ in range(2):
        torch.testing.assert_close(net(x), wanted)
    net(x).sum().backward()
    assert torch.equal(net.tensor("a.weight"), before["a.weight"] / 2)


class Padded(nn.Module):
    """Keeps a stride and a width in buffers, computes its padding of them and of the length, and decides by it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 4, 4, 2), nn.BatchNorm1d(4)
        self.register_buffer("stride", torch.tensor(2), persistent=False)
        self.register_buffer("width", torch.tensor(4))

    def forward(self, x: Tensor) -> Tensor:
        length, extra = x.shape[-1], self.width - self.stride
        steps = torch.ceil((length - self.width + extra) / self.stride + 1).to(torch.int64) - 1
        missing = steps * self.stride + self.width - extra - length
        mode = "constant" if length <= max(extra, missing) else "reflect"
        return self.norm(self.conv(nn.functional.pad(x, (extra, missing), mode)))


@pytest.mark.parametrize("length", [2, 9])
def test_integers_in_buffers_are_numbers_that_the_model_decides_by(length: int) -> None:
    torch.manual_seed(0)
    model, x = Padded().eval(), torch.randn(3, 4, length)
    net = fw.capture(model, x, parts=False)
    assert type(model) is Padded
    assert net.signature.inputs[0].shape == (None, 4, length)
    torch.testing.assert_close(net(x[:1]), model(x[:1]))
    assert any(note.endswith("which are fixed from now on: stride, width") for note in net.notes), net.notes
    assert torch.equal(net.tensor("width"), model.width)


def test_a_module_of_torch_export_is_captured() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    x = torch.randn(2, 4)
    net = fw.capture(torch.export.export(model, (x,)).module(), x, parts=False)
    torch.testing.assert_close(net(x), model(x))


#: name -> (model, a word of the reason why a child stays Python, the parts)
PARTS: dict[str, tuple[Callable[[], nn.Module], str, set[str]]] = {
    "an attribute of a child is read": (
        lambda: Calls(lambda m, x: m.b(m.a(x) * (m.a.out_features if m.a(x).sum() != 0 else 0))),
        "cannot be captured whole", {"a", "b"}),
    "a tensor of a child is read": (
        lambda: Calls(lambda m, x: m.b(m.a(x) @ m.a.weight if (x @ m.a.weight.t()).sum() < 1e9 else m.a(x))),
        "cannot be captured whole", {"a", "b"}),
    "a method of a child is called": (
        lambda: Calls(lambda m, x: m.b(m.a(x)) if m.a.extra_repr() and x.sum() != 0 else x),
        "cannot be captured whole", {"a", "b"}),
    "a scripted child": (lambda: Calls(lambda m, x: m.b(m.s(x)), s=torch.jit.script(nn.Linear(4, 4))),
                         "s stays Python: it is TorchScript", {"b"}),
    "autocast that is on": (lambda: Calls(lambda m, x: under_autocast(m, x, True)),
                            "autocast to torch.bfloat16 on cpu inside a model cannot be captured", {"a"}),
}


@pytest.mark.parametrize("name", PARTS)
def test_captured_in_parts_with_the_reason(name: str) -> None:
    build, reason, parts = PARTS[name]
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(3, 4)
    found = fw.capture(model, x, tolerance=1e-2)
    assert isinstance(found, fw.Assembly)
    assert set(found.parts) == parts
    assert any(reason in note for note in found.notes), found.notes
    with torch.no_grad():
        torch.testing.assert_close(found(x), model(x), rtol=1e-2, atol=1e-2)


@functools.cache
def own_operators() -> operators.Library:
    """Operators of somebody else's namespace; they are there as long as the library is held."""
    library = operators.Library("featherweight_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    operators.register_fake(torch.ops.featherweight_test.twice.default, torch.empty_like)
    return library


def own_operator() -> nn.Module:
    own_operators()
    return Calls(lambda m, x: torch.ops.featherweight_test.twice(m.a(x)))


#: name -> (what is given, the message)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a function": (lambda: lambda x: x, "takes a torch.nn.Module, not a function; for a function, write a module"),
    "TorchScript": (lambda: torch.jit.script(nn.Linear(4, 4)), "TorchScript, whose Python is gone"),
    "an exported program": (lambda: torch.export.export(nn.Linear(4, 4), (torch.randn(2, 4),)),
                            r"write capture\(program.module\(\)"),
    "an operator that no file can name": (own_operator, "module.*featherweight_test.twice.*write it with operators"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_words(name: str) -> None:
    build, message = REFUSED[name]
    with pytest.raises(fw.errors.CaptureError, match=message):
        fw.capture(build(), torch.randn(2, 4), parts=False)


def test_a_size_beyond_which_the_model_does_something_else_is_refused(tmp_path) -> None:
    model = Calls(lambda m, x: m.b(m.a(x)) if x.shape[0] > 4 else m.a(x)).eval()
    net = fw.capture(model, torch.randn(2, 4), parts=False)
    net.save(tmp_path / "net.fw")
    for one in (net, net.copy(), fw.load(tmp_path / "net.fw")):
        assert one(torch.randn(4, 4)).shape == (4, 4)
        with pytest.raises(fw.errors.InputError, match="has 5 along axis 0; the graph holds up to 4"):
            one(torch.randn(5, 4))
    assert any("axis 0 of input" in note and "up to 4" in note for note in net.notes)


@pytest.mark.parametrize(("model", "said"), [(Training, True), (HandsOn, False)])
def test_a_branch_on_training_is_told(model: type[nn.Module], said: bool) -> None:
    net = fw.capture(model().eval(), torch.randn(2, 4), parts=False)
    assert any("self.training" in note and model.__name__ in note for note in net.notes) is said


def test_buffers_that_the_model_writes_are_left_as_they_were() -> None:
    model = nn.Sequential(Counting(), nn.Linear(4, 4)).eval()
    with torch.no_grad():
        model[0].average.fill_(0.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    net = fw.capture(model, torch.randn(2, 4))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert any("0.average" in note and "0.count" in note for note in net.notes)
