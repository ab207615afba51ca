"""What a network keeps between questions (shapes, names, facts) is that of a network built afresh, whatever happened to
it in between."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode

import featherweight as fw
from featherweight.axes.groups import axis_groups
from featherweight.axes.labels import AtomSets
from featherweight.network import Network, fold_batch_norm
from featherweight.network.devices import placed
from featherweight.network.edit import clear_dead, insert_call, read_tensors, tensor_node
from problems import PROBLEMS, Problem, network
from test_capture import same

aten = torch.ops.aten


def plain_values(net: Network, batch: int) -> dict[str, Any]:
    """The slow, obvious form of ``Network.values``: every tensor and every call by itself."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = net.example_inputs(batch)
    inputs = iter(net.signature.leaves(args, kwargs))
    found: dict[str, Any] = {}
    with mode, torch.no_grad():
        for node in net.graph.nodes:
            if node.op == "placeholder":
                found[node.name] = mode.from_tensor(next(inputs))
            elif node.op == "get_attr":
                found[node.name] = mode.from_tensor(net.tensor(str(node.target)))
            elif node.op == "call_function":
                given = map_arg((node.args, node.kwargs), lambda n: found[n.name])
                found[node.name] = node.target(*given[0], **given[1])
    return found


def told(value: Any) -> Any:
    """What a value without data says, as plain data."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.stride(), value.storage_offset(), value.dtype, value.device,
                value.requires_grad, isinstance(value, nn.Parameter))
    return [told(v) for v in value] if isinstance(value, (list, tuple)) else (type(value), value)


def all_told(values: dict[str, Any]) -> dict[str, Any]:
    return {name: told(value) for name, value in values.items()}


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=str)
def test_shapes_found_once_for_alike_calls_are_those_of_every_call(problem: Problem):
    net = network(problem)
    for batch in (1, 3):
        assert all_told(net.values(batch)) == all_told(plain_values(net, batch))


def test_a_call_that_changes_shapes_in_place_keeps_all_apart():
    """``unsqueeze_`` changes the shape of its argument: another value that is alike must keep its own."""
    net = network(PROBLEMS["mlp"])
    x = next(n for n in net.graph.nodes if n.op == "placeholder")
    first, second = (insert_call(net, aten.clone.default, (x,), after=x) for _ in range(2))
    insert_call(net, aten.unsqueeze_.default, (second, 0), after=second)
    net.changed()
    values = net.values(2)
    assert values[first.name].shape == (2, 12)
    assert values[second.name].shape == (1, 2, 12)


# ---- what a change does

def shorter_weights(net: Network) -> None:
    """Half of a hidden layer goes: tensors of other shapes, the graph as it was."""
    for name in ("0.weight", "0.bias"):
        net.set_tensor(name, net.tensor(name)[:16])
    net.set_tensor("2.weight", net.tensor("2.weight")[:, :16])


def another_number_type(net: Network) -> None:
    for name in net.tensors():
        net.set_tensor(name, net.tensor(name).double())
    x = next(n for n in net.graph.nodes if n.op == "placeholder")
    double = insert_call(net, aten.to.dtype, (x, torch.float64), after=x)
    x.replace_all_uses_with(double, delete_user_cb=lambda user: user is not double)
    net.changed()


def swapped_data(net: Network) -> None:
    """Behind the network's back: the very same tensors hold other data."""
    net.tensor("0.weight").data = net.tensor("0.weight").data[:16]
    net.tensor("0.bias").data = net.tensor("0.bias").data[:16]
    net.tensor("2.weight").data = net.tensor("2.weight").data[:, :16]


def added(net: Network) -> None:
    net.add_tensor("new.scale", torch.ones(3))
    net.add_tensor("new.index", torch.arange(3), buffer=True)


def tied(net: Network) -> None:
    net.add_tensor("twin.bias", net.tensor("0.bias"))


def removed(net: Network) -> None:
    added(net)
    assert "new.scale" in net.tensors()
    net.remove_tensor("new.scale")


def new_reader(net: Network) -> None:
    """A call that reads a tensor is put in; the arguments of another one are replaced."""
    relu = net.calls(aten.relu.default)[0]
    made = insert_call(net, aten.mul.Tensor, (relu, tensor_node(net, "0.bias", relu)), after=relu)
    relu.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    net.changed()


def other_argument(net: Network) -> None:
    """An argument alone is another one, and nobody says so."""
    view = net.calls(aten.mul.Tensor)[0]
    view.target, view.args = aten.unsqueeze.default, (view.args[0], 0)
    squeezed = insert_call(net, aten.squeeze.dim, (view, 0), after=view)
    view.replace_all_uses_with(squeezed, delete_user_cb=lambda user: user is not squeezed)


def new_name(net: Network) -> None:
    net.calls(aten.relu.default)[0].name = "another_name"


def gone(net: Network) -> None:
    before = read_tensors(net)
    relu = net.calls(aten.relu.default)[0]
    relu.replace_all_uses_with(relu.args[0])
    clear_dead(net, before)


def part_of_ones_own(net: Network) -> None:
    """Names that come by modules, and are told with ``changed()``."""
    net.get_submodule("0").register_buffer("mine", torch.ones(2))
    net.changed()


def with_a_product(net: Network) -> None:
    relu = net.calls(aten.relu.default)[0]
    made = insert_call(net, aten.mul.Tensor, (relu, 2.0), after=relu)
    relu.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    net.changed()


def other_parameters(net: Network) -> None:
    net.load_state_dict({n: t.clone() + 1 for n, t in net.state_dict().items()}, assign=True)


CHANGES: dict[str, Callable[[Network], None]] = {f.__name__: f for f in (
    shorter_weights, another_number_type, swapped_data, added, tied, removed, new_reader, other_argument, new_name,
    gone, part_of_ones_own, other_parameters)}


def everything(net: Network) -> dict[str, Any]:
    """All that is kept, asked for by the public methods; tensors by identity."""
    names = list(net.tensors())
    return {
        "tensors": {n: id(t) for n, t in net.tensors().items()},
        "looked up": {n: id(net.tensor(n)) for n in names},
        "tied": {n: net.tied_names(n) for n in names},
        "users": {n: [u.name for u in net.users_of(n)] for n in names},
        "nodes": [net.node(n.name).name for n in net.graph.nodes],
        "values": {b: all_told(net.values(b)) for b in (1, 2)},
        "form": net.fact("shape of the whole", lambda: len(net.graph.nodes)),
    }


def afresh(net: Network) -> Network:
    """A network of the same graph and tensors that has been asked nothing yet."""
    return Network.of(net.snapshot())


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_kept_is_that_of_a_network_built_afresh(change: Callable[[Network], None]):
    net = network(PROBLEMS["mlp"])
    with_a_product(net)
    before = everything(net)
    assert before == everything(afresh(net))
    change(net)
    after = everything(net)
    assert after == everything(afresh(net))
    assert after != before
    assert all_told(net.values(3)) == all_told(plain_values(net, 3))


def test_a_network_on_another_device_or_of_other_floats_is_asked_again():
    net = network(PROBLEMS["conv_bn"])
    before = all_told(net.values(1))
    elsewhere = placed(net, "meta")
    assert {v.device.type for v in elsewhere.values(1).values()} == {"meta"}
    assert {v.dtype for v in net.to(torch.float64).tensors().values()} == {torch.float64, torch.int64}
    assert all_told(net.values(1)) == all_told(plain_values(net, 1)) != before
    assert all_told(net.to(torch.float32).values(1)) == before


def test_erased_nodes_and_lost_tensors_are_not_found():
    net = network(PROBLEMS["mlp"])
    relu = net.calls(aten.relu.default)[0]
    assert net.node(relu.name) is relu
    relu.replace_all_uses_with(relu.args[0])
    net.graph.erase_node(relu)  # and nobody says so
    with pytest.raises(KeyError, match=f"no node named '{relu.name}'"):
        net.node(relu.name)
    net.tensors()
    del net.get_submodule("0")._parameters["bias"]  # nor here
    assert "0.bias" not in net.tensors()
    with pytest.raises(KeyError, match=r"no tensor named '0\.bias'"):
        net.tied_names("0.bias")


# ---- facts

def counted(net: Network, asked: list[str]) -> Any:
    def find() -> int:
        asked.append("asked")
        return len(net.graph.nodes)

    return net.fact("nodes", find)


def test_a_fact_is_found_once_and_shared_with_copies():
    """Neither weights' values matter nor taps nor training; a copy goes its own way once it is changed."""
    net, asked = network(PROBLEMS["mlp"]), []
    assert counted(net, asked) == counted(net, asked)
    net.set_tensor("0.weight", torch.zeros_like(net.tensor("0.weight")))
    with net.taps({net.calls()[0].name: torch.neg}):
        net.train()(*net.example_inputs()[0])
        counted(net.eval(), asked)
    other = net.copy()
    counted(other, asked)
    assert len(asked) == 1
    with_a_product(other)
    assert counted(other, asked) == counted(net, asked) + 1
    assert len(asked) == 2
    assert counted(net.copy(), asked) == counted(net, asked)
    assert len(asked) == 2


@pytest.mark.parametrize("change", [shorter_weights, new_reader, other_argument, gone], ids=lambda f: f.__name__)
def test_a_copy_of_a_changed_network_does_not_get_what_was_kept_before(change: Callable[[Network], None]):
    net = network(PROBLEMS["mlp"])
    with_a_product(net)
    everything(net)
    change(net)
    assert everything(net)["values"]
    other = copy.deepcopy(net)
    assert all_told(other.values()) == all_told(plain_values(other, 2))


def test_what_is_loaded_or_folded_is_asked_afresh(tmp_path):
    net = network(PROBLEMS["conv_bn"])
    everything(net)
    net.save(tmp_path / "net.fw")
    loaded, folded = fw.load(tmp_path / "net.fw"), fold_batch_norm(net)
    assert all_told(loaded.values(1)) == all_told(plain_values(net, 1))
    assert all_told(folded.values(1)) == all_told(plain_values(folded, 1))
    assert len(folded.tensors()) < len(net.tensors())


def test_what_is_given_may_be_changed_by_who_asked():
    net = network(PROBLEMS["mlp"])
    net.values().clear()
    net.tensors().clear()
    assert all_told(net.values()) == all_told(plain_values(net, 2))
    assert "0.weight" in net.tensors()


# ---- run again

def halved(value: Any) -> Any:
    return value / 2 if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=str)
def test_run_again_from_a_tap_a_network_gives_what_it_gives_from_the_start(problem: Problem):
    """Every node tapped by itself, in graph order and back, and two far apart together; on two batches in turns."""
    net = network(problem)
    again = net.replay()
    batches = [net.example_inputs(problem.batch or 2, seed) for seed in (0, 1)]
    names = [n.name for n in net.graph.nodes if n.op != "output"]
    picks = [[name] for name in names[::3] + names[::-5]] + [[names[-1], names[len(names) // 2]], []]
    with torch.no_grad():
        for pick in picks:
            with net.taps(dict.fromkeys(pick, halved)):
                for args, kwargs in batches:
                    same(net(*args, **kwargs), again(*args, **kwargs))


class Counted(TorchDispatchMode):
    """Counts the calls of an operator."""

    def __init__(self, target: Any) -> None:
        super().__init__()
        self.target, self.count = target, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is self.target
        return function(*args, **(kwargs or {}))


def test_what_comes_before_a_tap_is_done_once():
    net = network(PROBLEMS["mlp"])
    again, (args, _) = net.replay(), net.example_inputs()
    linear = net.calls(aten.linear.default)
    with torch.no_grad(), net.taps({str(linear[-1].args[1]): halved}):
        with Counted(aten.addmm.default) as first:
            again(*args)
        with Counted(aten.addmm.default) as second:
            again(*args)
    assert (first.count, second.count) == (len(linear), 1)


def test_values_held_between_runs_are_bounded(monkeypatch: pytest.MonkeyPatch):
    net = network(PROBLEMS["mlp"])
    again, (args, _) = net.replay(), net.example_inputs()
    monkeypatch.setattr("featherweight.network.kept.replay.HELD", 0)
    linear = net.calls(aten.linear.default)
    with torch.no_grad(), net.taps({str(linear[-1].args[1]): halved}), Counted(aten.addmm.default) as counted:
        same(again(*args), again(*args))
    assert counted.count == 2 * len(linear)


@pytest.mark.parametrize("target", [aten.add_.Scalar, aten.bernoulli.p], ids=str)
def test_a_graph_that_writes_or_draws_is_run_as_a_whole(target: Any):
    """A second run would read what the first one wrote, or go on with other numbers than it drew."""
    net = network(PROBLEMS["mlp"])
    relu = net.calls(aten.relu.default)[0]
    made = insert_call(net, target, (relu, 0.5), after=relu)
    if target is aten.bernoulli.p:
        relu.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    net.changed()
    again, (args, _) = net.replay(), net.example_inputs()
    with torch.no_grad(), net.taps({net.calls(aten.linear.default)[-1].name: halved}):
        for seed in range(3):
            torch.manual_seed(seed)
            wanted = net(*args)
            torch.manual_seed(seed)
            same(wanted, again(*args))


# ---- groups of axes, kept with the network

def test_groups_of_axes_are_found_once_for_a_network_and_its_copies():
    net = network(PROBLEMS["mlp"])
    found = axis_groups(net)
    assert axis_groups(net.copy()) is found
    assert axis_groups(net, "width") is not found
    shorter_weights(net)
    assert [len(g) for g in axis_groups(net).groups] == [len(g) // (1 + (g.name == "0")) for g in found.groups]
    assert axis_groups(afresh(net)).names() == found.names()


def test_kept_atoms_are_counted_set_by_set():
    generator = np.random.default_rng(0)
    sets = [generator.integers(0, 50, size) for size in (1, 7, 20, (3, 4))]
    kept = generator.random(50) < 0.5
    assert AtomSets(sets).count(kept) == [int(np.count_nonzero(kept[s])) for s in sets]
    assert AtomSets([]).count(kept) == []


# ---- where tensors are read

def slow_reads(net: Network, name: str) -> list[Node]:
    names = net.tied_names(name)
    return [node for node in net.graph.nodes if node.op == "get_attr" and node.target in names]


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=str)
def test_where_a_tensor_is_read_is_what_a_walk_finds_after_every_edit(problem: Problem) -> None:
    net = network(problem)

    def check() -> None:
        for name in net.tensors():
            assert net.reads_of(name) == slow_reads(net, name), name
            assert net.users_of(name) == [user for node in slow_reads(net, name) for user in node.users]

    check()
    names = [str(n.target) for n in net.graph.nodes if n.op == "get_attr"]
    first = net.calls()[0]
    net.add_tensor("fresh", torch.ones(1))
    check()
    made = tensor_node(net, "fresh", before=first)
    again = tensor_node(net, names[-1], before=first)  # a second reading, before the first
    check()
    for node in (made, again):
        if not node.users:
            net.graph.erase_node(node)
        check()
    net.set_tensor(names[0], net.tensor(names[0]) + 0)
    check()
    read = net.reads_of(names[0])[0]
    with net.graph.inserting_after(read):
        other = net.graph.create_node("get_attr", names[0])
    read.replace_all_uses_with(other)
    net.graph.erase_node(read)
    check()
    net.changed()
    check()


def chain(layers: int) -> Network:
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(4, 4), nn.ReLU())))
    net = fw.capture(model.eval(), torch.randn(2, 4))
    assert isinstance(net, Network)
    return net


def test_the_walks_over_a_graph_do_not_grow_with_its_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What looks at the whole graph once for each layer takes the square of the layers: planning, applying, groups,
    figures and files look at it as often whatever its size, but for a walk over the nodes that read tensors."""
    walks = [0]
    plain = torch.fx.graph._node_list.__iter__

    def counted(nodes: Any) -> Any:
        walks[0] += 1
        return plain(nodes)

    def count(layers: int) -> dict[str, int]:
        net, found = chain(layers), {}
        task = fw.Task(calibration=[(torch.randn(2, 4), None)])
        runtime, small = fw.deploy.target("onnxruntime"), [net]
        for name, call in (
                ("groups", lambda: axis_groups(net)), ("layers", lambda: fw.measure.layers(net)),
                ("macs", lambda: fw.measure.macs(net)), ("plan", lambda: fw.quantize.Quantize().plan(net, task)),
                ("apply", lambda: small.append(fw.quantize.Quantize().plan(net, task).apply(net))),
                ("prune", lambda: fw.prune.Weights(sparsity=0.5).plan(net, fw.Task()).apply(net)),
                ("save", lambda: small[-1].save(tmp_path / "net.fw")), ("load", lambda: fw.load(tmp_path / "net.fw")),
                ("export", lambda: runtime.export(net, tmp_path / "net.onnx"))):
            walks[0] = 0
            call()
            found[name] = walks[0]
        return found

    with monkeypatch.context() as patched:
        patched.setattr(torch.fx.graph._node_list, "__iter__", counted)
        few, many = count(4), count(16)
    assert few == many


def test_a_network_is_printed_without_control_characters() -> None:
    told = fw.capture(nn.Linear(4, 4), torch.zeros(2, 4))
    told = Network(told.graph, dataclasses.replace(told.signature, inputs=(
        dataclasses.replace(told.signature.inputs[0], name="a\x1b[31m"),)))
    assert "\x1b" not in repr(told)
    assert "input    a\\x1b[31m: [any, 4]" in repr(told)
