"""The file: what was saved comes back bit for bit, and nothing that a stranger writes into it is ever executed."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import featherweight as fw
from featherweight.errors import FileError
from featherweight.network.file import allowed
from featherweight.network.file.description import describe, rebuild
from featherweight.network.file.digest import digest
from featherweight.network.file.file import FORMAT, _digest
from featherweight.network.file.table import PACKETS, POINTWISE
from featherweight.network.load import network_of
from featherweight.task import call
from problems import PROBLEMS, Answer, Problem, images, network, rows, tensors_of
from test_capture import Branching, Forms, same


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "net.fw"


# ---- back as it was

@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=str)
def test_loaded_is_saved_bit_for_bit(problem: Problem, path):
    net = network(problem)
    net.patterns[next(iter(net.state_dict()))] = "unstructured"
    net.notes.append("a note")
    assert net.save(path) == path.stat().st_size
    loaded = fw.load(path)
    assert isinstance(loaded, fw.Network)
    with torch.no_grad():
        for batch in [problem.batch or 3]:
            wanted, given_ = call(net, problem.example(batch)), call(loaded, problem.example(batch))
            for a, b in zip(tensors_of(wanted), tensors_of(given_), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert list(loaded.state_dict()) == list(net.state_dict())
    assert [n.name for n in loaded.graph.nodes] == [n.name for n in net.graph.nodes]
    assert [n.meta for n in loaded.graph.nodes] == [n.meta for n in net.graph.nodes]
    assert (loaded.patterns, loaded.notes) == (net.patterns, net.notes)
    assert loaded.signature.inputs == net.signature.inputs
    for name, tensor in net.tensors().items():
        other = loaded.tensor(name)
        assert type(other) is type(tensor)
        assert (other.requires_grad, other.dtype) == (tensor.requires_grad, tensor.dtype)
        torch.testing.assert_close(other.detach(), tensor.detach(), rtol=0, atol=0)
        assert sorted(loaded.tied_names(name)) == sorted(net.tied_names(name))


@pytest.mark.parametrize("problem", [PROBLEMS[n] for n in ("residual", "no_momentum", "dropout", "tied")], ids=str)
def test_loaded_trains_in_step_and_saves_the_same(problem: Problem, path, tmp_path):
    net = network(problem)
    net.save(path)
    loaded = fw.load(path)
    assert loaded.save(tmp_path / "again.fw") == path.stat().st_size
    assert digest(fw.load(tmp_path / "again.fw")) == digest(net)
    for one in (net, loaded):
        optimizer = torch.optim.SGD(one.parameters(), 0.1)
        for seed in range(2):
            torch.manual_seed(seed)
            tensors_of(call(one.train(), problem.example(4, seed=seed)))[0].square().mean().backward()
            optimizer.step()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)


def test_named_outputs_are_dicts_unless_their_types_are_given(path):
    net = network(PROBLEMS["dataclass_output"])
    net.save(path)
    inputs = PROBLEMS["dataclass_output"].example()
    assert sorted(fw.load(path)(**inputs)) == ["hidden", "logits"]
    typed = fw.load(path, types={"problems.Answer": Answer})(**inputs)
    assert isinstance(typed, Answer)
    assert typed.loss is None


@pytest.mark.parametrize("form", ["tuple", "list", "dict", "nested", "ordered", "none", "same", "input", "number",
                                  "weight"])
def test_plain_nests_come_back(form, path):
    net = fw.capture(Forms(form).eval(), rows(), parts=False)
    net.save(path)
    with torch.no_grad():
        same(net(rows(3)), fw.load(path)(rows(3)))


def test_every_dtype_is_kept(path):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, dtype=torch.bfloat16))
            for i, dtype in enumerate([torch.float16, torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool,
                                       torch.float8_e4m3fn]):
                self.register_buffer(f"b{i}", torch.tensor([0, 1, 2]).to(dtype))
            self.register_buffer("scalar", torch.tensor(3.5))
            self.register_buffer("empty", torch.zeros(0, 3))
            self.register_buffer("turned", torch.randn(4, 3).t())

        def forward(self, x):
            return (x * self.weight.float() + self.b0 + self.b2 + self.b5 + self.scalar) @ self.turned

    net = fw.capture(Model(), rows(2, 3), parts=False)
    net.save(path)
    loaded = fw.load(path)
    for name, tensor in net.tensors().items():
        assert torch.equal(loaded.tensor(name).to(torch.float64), tensor.to(torch.float64))
        assert loaded.tensor(name).dtype == tensor.dtype


def test_parts_go_into_a_fresh_instance(path):
    assembly = fw.capture(Branching(), rows())
    assembly.save(path)
    other = Branching()
    loaded = fw.load(path, into=other)
    with torch.no_grad():
        same(assembly(rows(5)), loaded(rows(5)))
    assert list(loaded.parts) == list(assembly.parts)
    with pytest.raises(FileError, match=r"holds a model in parts \(body, .*write fw.load\(.*into=YourModel"):
        fw.load(path)
    with pytest.raises(FileError, match="Sequential has no module there; pass a fresh instance"):
        fw.load(path, into=nn.Sequential(nn.Linear(2, 2)))
    wider = Branching()
    wider.register_buffer("more", torch.zeros(3))
    with pytest.raises(FileError, match="'more' is missing, too much or of another shape"):
        fw.load(path, into=wider)
    net = network(PROBLEMS["mlp"])
    net.save(path)
    with pytest.raises(FileError, match="holds a whole network, no class is needed"):
        fw.load(path, into=Branching())


def test_a_save_that_fails_leaves_the_old_file(path, monkeypatch):
    network(PROBLEMS["mlp"]).save(path)
    before = path.read_bytes()
    monkeypatch.setattr("featherweight.network.file.file.save_file",
                        lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        network(PROBLEMS["gated"]).save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


# ---- damaged

@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    file = tmp_path_factory.mktemp("whole") / "net.fw"
    network(PROBLEMS["gated"]).save(file)
    return file.read_bytes()


def test_truncated_anywhere(whole, path):
    for length in [*range(40), *range(40, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(FileError, match=r"truncated|damaged"):
            fw.load(path)
    path.write_bytes(whole + b"more")
    with pytest.raises(FileError, match="damaged"):
        fw.load(path)


def test_a_flipped_bit_anywhere(whole, path):
    for place in [*range(64), *range(64, len(whole), 53)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(FileError, match=r"truncated|damaged|is of format"):
            fw.load(path)


def test_header_lengths_that_look_like_a_pickle(path):
    """A header whose length begins with the bytes of a pickle is still a header."""
    net, found = network(PROBLEMS["gated"]), False
    for extra in range(40):
        net.notes[:] = ["." * (8 * extra)]
        net.save(path)
        found |= path.read_bytes()[:1] == b"\x80"
        fw.load(path)
    assert found


# ---- hostile

class Bomb:
    def __reduce__(self):
        return os.system, ("touch /tmp/featherweight_pwned",)


def stored(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


PICKLES = {"torch.save": stored({"a": torch.ones(3), "bomb": Bomb()}), "protocol 0": pickle.dumps(Bomb(), protocol=0),
           "torch.save, old form": stored(torch.ones(3), _use_new_zipfile_serialization=False),
           "pickle": pickle.dumps(Bomb()), "protocol 2": pickle.dumps(Bomb(), protocol=2)}


@pytest.fixture(autouse=True)
def nothing_is_executed(monkeypatch, tmp_path):
    """No pickle is read and no command run while a test of this file runs."""
    def refuse(*args, **kwargs):
        raise AssertionError("something was executed")

    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(os, "system", refuse)
    monkeypatch.setattr(torch, "load", refuse)


@pytest.mark.parametrize("name", [n for n in PICKLES if n != "protocol 0"])
def test_pickles_are_refused_unopened(name, path):
    path.write_bytes(PICKLES[name])
    with pytest.raises(FileError, match="holds a pickle"):
        fw.load(path)


@pytest.mark.parametrize("raw", [b"", b"\x00" * 8, b"\xff" * 64, b"hello world, this is text",
                                 b"\x10" + b"\x00" * 7 + b"{" * 100,
                                 struct.pack("<Q", 5) + b'{"a":' + b"0" * 40, PICKLES["protocol 0"]])
def test_other_bytes(raw, path):
    path.write_bytes(raw)
    with pytest.raises(FileError, match=r"no featherweight file|damaged"):
        fw.load(path)


def test_safetensors_of_another_kind(path):
    save_file({"a": torch.ones(3)}, path)
    with pytest.raises(FileError, match=f"is of format 'None'; expected '{FORMAT}'"):
        fw.load(path)
    with pytest.raises(FileError, match="no such file"):
        fw.load(path.parent / "nothing.fw")


def forged(path: Path, description: Any, tensors: dict[str, torch.Tensor] | None = None, kind: str = FORMAT,
           text: str | None = None) -> None:
    """Writes what an attacker would: any description, under a right checksum."""
    net_tensors = describe(network(PROBLEMS["gated"]).snapshot())[1] if tensors is None else tensors
    plain = {k: v.detach().contiguous().clone() for k, v in net_tensors.items()}
    text = json.dumps(description) if text is None else text
    save_file(plain, path, {"format": kind, "graph": text, "sha256": _digest(text, plain)})


def described() -> dict[str, Any]:
    return copy.deepcopy(describe(network(PROBLEMS["gated"]).snapshot())[0])


def first_call(description: dict[str, Any]) -> dict[str, Any]:
    return next(n for n in description["nodes"] if n["op"] == "call")


def test_a_pickle_inside(path):
    payload = PICKLES["pickle"].decode("latin-1").replace(".", "")
    forged(path, None, text=payload)
    with pytest.raises(FileError, match="its graph is no JSON"):
        fw.load(path)
    description = described()
    description["tensors"][payload] = "parameter"
    forged(path, description, {**describe(network(PROBLEMS["gated"]).snapshot())[1], payload: torch.ones(3)})
    loaded = fw.load(path)  # a name of odd letters is a name
    assert payload in loaded.tensors()
    for node in (first_call(description), description["nodes"][0]):
        node["target"] = payload
    forged(path, description)
    with pytest.raises(FileError, match=r"are not those its graph lists|no operator|a file may call"):
        fw.load(path)


OPERATORS = [
    "aten.from_file.default", "aten.save.default", "aten.save", "aten.set_.source_Storage", "aten.set_.source_Tensor",
    "aten.resize_.default", "aten.record_stream.default", "aten.set_data.default", "aten.data.default", "aten.add.out",
    "aten._foobar.default", "aten._print.default", "aten._reshape_alias.default", "aten.as_strided_.default",
    "aten.linalg_eigvals.default",
    "aten._nested_view_from_buffer.default", "aten._sparse_coo_tensor_unsafe.default", "aten.manual_seed.default",
    "aten.max_pool2d_with_indices_backward.default", "aten.fbgemm_linear_int8_weight.default",
    "aten.quantized_lstm.input", "aten.manual_seed",
    "aten.set_grad_enabled.default", "aten.warn.default", "aten.backward.default", "aten.relu", "aten.relu.__class__",
    "aten.relu.default.__call__", "aten.relu._schema", "aten.__class__.__mro__", "aten.__dict__", "aten..default",
    "aten",
    "prims.add.default", "higher_order.cond", "os.system", "builtins.eval", "operator.attrgetter", "operator.call",
    "operator.methodcaller", "operator.setitem", "operator.imul", "math.factorial", "torch.load", "torch.ops.aten.relu",
    "_C._jit", "profiler._record_function_enter.default", "inductor.accumulate_grad_.default", "c10d.send.default",
    "image.read_file.default", "quantized.linear.default", "rngprims.philox_rand.default",
    "torchvision.nothing.default",
    "", ".", "..", "featherweight.nothing.default", 3, None, ["aten.relu.default"], {"node": "x"}, True,
]


@pytest.mark.parametrize("name", OPERATORS, ids=str)
def test_operators_that_a_file_may_not_name(name, path):
    description = described()
    first_call(description)["target"] = name
    forged(path, description)
    with pytest.raises(FileError, match=r"a file may|has no operator|expected a text"):
        fw.load(path)


def test_the_rule_over_every_registered_operator():
    """No operator that passes takes a file name, a storage, a stream or an object, or writes into more than itself."""
    passed = 0
    for full in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = full.partition("::")
        packet, _, overload = rest.partition(".")
        try:
            target = allowed.read(f"{namespace}.{packet}.{overload or 'default'}")
        except FileError:
            continue
        passed += 1
        assert namespace in allowed.NAMESPACES
        for i, argument in enumerate(target._schema.arguments):
            assert not any(t in str(argument.type) for t in ("Storage", "Stream", "__torch__", "Any", "Future"))
            assert "file" not in argument.name
            assert i == 0 or argument.alias_info is None or not argument.alias_info.is_write
        assert target._overloadname != "out"
    assert passed > 900


def test_what_a_file_may_not_name_is_not_written(path):
    net = network(PROBLEMS["mlp"])
    net.calls()[0].target = torch.ops.aten._reshape_alias.default
    with pytest.raises(FileError, match=r"aten\._reshape_alias\.default, which a file may not name: it is private"):
        net.save(path)
    net.calls()[0].target = os.system
    with pytest.raises(FileError, match="which a file cannot name"):
        net.save(path)
    assert not path.exists()


def _set(where: str, value: Any):
    """An edit of the description: ``where`` is a path such as "nodes/3/name"."""
    def edit(description: dict[str, Any]) -> None:
        *steps, last = [int(s) if s.isdigit() else s for s in where.split("/")]
        for step in steps:
            description = description[step]
        description[last] = value

    return edit


def _swap(description: dict[str, Any]) -> None:
    calls = [i for i, n in enumerate(description["nodes"]) if n["op"] == "call"]
    nodes = description["nodes"]
    nodes[calls[0]], nodes[calls[1]] = nodes[calls[1]], nodes[calls[0]]


def _deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _nest(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = {"kind": "tuple", "items": [value]}
    return value


CALL = next(i for i, n in enumerate(describe(network(PROBLEMS["gated"]).snapshot())[0]["nodes"]) if n["op"] == "call")
EDITS = {
    "a node before its inputs": (_swap, "does not come before it"),
    "itself": (_set(f"nodes/{CALL}/args", [{"node": "linear"}]), "does not come before it"),
    "unknown node": (_set(f"nodes/{CALL}/args", [{"node": "nothing"}]), "does not come before it"),
    "code as a name": (_set("nodes/0/name", "x); import os; os.system('x')"), "no fresh identifier"),
    "a dunder path as a tensor": (_set("nodes/0/target", "__class__.__init__"), "not in the file"),
    "a number as a name": (_set("nodes/0/name", 3), "no fresh identifier"),
    "a list as a name": (_set("nodes/0/name", []), "no fresh identifier"),
    "a keyword as a name": (_set("nodes/0/name", "lambda"), "reserved|does not come before"),
    "unknown kind": (_set("nodes/0/op", "call_module"), "is of kind 'call_module'"),
    "no output": (lambda d: d["nodes"].pop(), "no single output"),
    "two outputs": (lambda d: d["nodes"].append({**d["nodes"][-1], "name": "output_2"}), "no single output"),
    "unknown tag": (_set(f"nodes/{CALL}/args", [{"pickle": "gASV"}]), "no known form"),
    "two tags": (_set(f"nodes/{CALL}/args", [{"node": "x", "float": "inf"}]), "no known form"),
    "unknown dtype": (_set(f"nodes/{CALL}/args", [{"dtype": "load"}]), "is no dtype"),
    "dotted dtype": (_set(f"nodes/{CALL}/args", [{"dtype": "serialization.load"}]), "is no dtype"),
    "unknown device": (_set(f"nodes/{CALL}/args", [{"device": "x; y"}]), "malformed"),
    "bad float": (_set(f"nodes/{CALL}/args", [{"float": "1e3"}]), "no known form"),
    "bad slice": (_set(f"nodes/{CALL}/args", [{"slice": [1]}]), "no known form"),
    "deep arguments": (_set(f"nodes/{CALL}/args", _deep(900)), "malformed|no JSON"),
    "deep tensor name": (_set("tensors", {".".join("a" * 5000): "parameter"}), "not those its graph lists"),
    "nodes are a text": (_set("nodes", "import os"), "malformed"),
    "nodes are a number": (_set("nodes", 3), "malformed"),
    "no nodes": (lambda d: d.pop("nodes"), "malformed"),
    "more tensors than there are": (_set("tensors/more", "parameter"), "not those its graph lists"),
    "kind of tensor": (_set("tensors/fc.weight", "module"), "is of kind 'module'"),
    "a tie to nothing": (_set("ties", {"fc.weight": "nothing"}), "not those its graph lists"),
    "shape": (_set("inputs/0/shape", [None, "12"]), "no integer"),
    "negative shape": (_set("inputs/0/shape", [None, -12]), "has the shape"),
    "input dtype": (_set("inputs/0/dtype", "Tensor"), "is no dtype"),
    "one input more": (lambda d: d["inputs"].append(d["inputs"][0]), "another number of inputs"),
    "inputs nest": (_set("in_spec", {"kind": "list", "items": [0]}), "no pair of positions"),
    "unknown nest": (_set("out_spec", {"kind": "os.system", "items": [["x", 0]]}), "unknown kind of nest"),
    "nest of nothing": (_set("out_spec", {"kind": "tuple", "items": []}), "has 0 leaves for 1 results"),
    "leaves twice": (_set("out_spec", {"kind": "tuple", "items": [0, 0]}), "numbers its leaves wrongly"),
    "deep nest": (_set("out_spec", _nest(100)), "64 containers deep"),
    "a constant too many": (_set("constants", [[7, 1]]), "leaves for"),
    "counter": (_set(f"nodes/{CALL}/counter", "nothing"), "counts in 'nothing'"),
    "counter of a wrong type": (_set(f"nodes/{CALL}/counter", ["x"]), "is of a wrong type"),
    "patterns": (_set("patterns", {"fc.weight": 3}), "is no text"),
    "notes": (_set("notes", [{"a": 1}]), "is no text"),
    "order": (_set("order", ["a..b"]), "is no tensor name"),
    "order over a tensor": (_set("order", ["fc.weight"]), "malformed"),
}


@pytest.mark.parametrize("name", EDITS)
def test_forged_graphs(name, path):
    edit, message = EDITS[name]
    description = described()
    edit(description)
    forged(path, description)
    with pytest.raises(FileError, match=message):
        fw.load(path)


@pytest.mark.parametrize("text", ["[" * 100_000, "null", "[]", "3", "{}", '"nodes"', "NaN", '{"nodes": NaN}'])
def test_json_that_is_no_graph(text, path):
    for kind in (FORMAT, "featherweight assembly 1"):
        forged(path, None, kind=kind, text=text)
        with pytest.raises(FileError, match=r"no JSON|malformed|does not list its parts"):
            fw.load(path, into=None if kind == FORMAT else Branching())


@pytest.mark.parametrize("parts", [{"body": 3}, {"": {}}, {"__class__": {}}, {"body.0.weight": {}}, {"../x": {}}])
def test_forged_assemblies(parts, path):
    forged(path, {"parts": parts, "notes": []}, kind="featherweight assembly 1", tensors={})
    with pytest.raises(FileError, match=r"malformed|no module there"):
        fw.load(path, into=Branching())
    good = describe(network(PROBLEMS["gated"]).snapshot())
    for name in parts:
        forged(path, {"parts": {name + "x": good[0]}, "notes": []}, {f"{name}x/{k}": v for k, v in good[1].items()},
               kind="featherweight assembly 1")
        with pytest.raises(FileError, match="no module there"):
            fw.load(path, into=Branching())


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=6)
    | st.sampled_from(["aten.add.Tensor", "aten.relu.default", "x", "linear", "fc.weight", "float32", "call", "output",
                       "tensor"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["node", "kind", "items", "dtype", "name", "op", "args", "float", "slice", "x"]), inner,
        max_size=2),
    max_leaves=6)


def places(value: Any, at: tuple = ()) -> list[tuple]:
    """Every place in a nest of lists and dicts."""
    found = [at] if at else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*at, key))
    return found


PLACES = {name: places(describe(network(PROBLEMS[name]).snapshot())[0])
          for name in ("gated", "dict_output", "tied", "two_inputs")}


def test_the_table_knows_what_capturing_gives():
    """Every operator of the problems, and of the files of earlier versions, without the caller's word. What the steps
    give is held by the laws, which save and load it."""
    called = {allowed.target_name(n.target) for p in PROBLEMS.values() for n in network(p).calls()}
    for file in Path(__file__).parent.glob("fixtures/*/**/*.fw"):
        with safe_open(file, "pt") as opened:
            graph = json.loads(opened.metadata()["graph"])
        called |= {n["target"] for n in graph["nodes"] if n["op"] == "call"}
    assert len(called) > 40
    assert allowed.beyond(called) == []


def test_the_table_names_what_there_is_and_the_rule_lets_through():
    registered = {full.partition(".")[0] for full in torch._C._dispatch_get_all_op_names()}
    in_place = {f"aten::{name}_" for name in POINTWISE.split()}  # not all of them are
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    gone = {"aten::cholesky", "aten::qr"} if version >= (2, 14) else set()  # files of earlier versions may call them
    assert registered | in_place | gone >= PACKETS
    for packet in PACKETS & registered:
        namespace, _, name = packet.partition("::")
        forms = getattr(getattr(torch.ops, namespace), name)
        assert not all(allowed.refusal(getattr(forms, overload)) for overload in forms.overloads()), packet


@settings(max_examples=400, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_change_of_the_graph_is_an_error_or_a_network(data):
    name = data.draw(st.sampled_from(sorted(PLACES)))
    description, tensors = describe(network(PROBLEMS[name]).snapshot())
    description = copy.deepcopy(description)
    for _ in range(data.draw(st.integers(1, 3))):
        *steps, last = data.draw(st.sampled_from(PLACES[name]))
        holder = description
        try:
            for step in steps:
                holder = holder[step]
            action = data.draw(st.sampled_from(["set", "drop", "double"]))
            if action == "set":
                holder[last] = data.draw(JUNK)
            elif action == "drop":
                del holder[last]
            elif isinstance(holder, list):
                holder.insert(last, copy.deepcopy(holder[last]))
        except (KeyError, IndexError, TypeError):
            continue
    try:
        found = network_of(rebuild(description, tensors))
    except FileError:
        return
    assert isinstance(found, fw.Network)
    found.copy()
    describe(found.snapshot())


def test_loading_reads_and_runs_no_graph(path, monkeypatch):
    """Whatever operators a graph names, none is called by reading it."""
    network(PROBLEMS["residual"]).save(path)
    monkeypatch.setattr("featherweight.network.program.Program.run", lambda *a, **k: pytest.fail("the graph was run"))
    fw.load(path)
    with pytest.raises(pytest.fail.Exception, match="was run"):
        fw.load(path)(images())


def test_a_file_is_plain_safetensors(path):
    net = network(PROBLEMS["residual"])
    net.save(path)
    stored = load_file(path)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(stored[name], tensor, rtol=0, atol=0)


def test_the_same_network_gives_the_same_bytes(tmp_path):
    """safetensors alone orders the strings of its header at random."""
    net = network(PROBLEMS["residual"])
    net.notes.append("a note with \u00fcml\u00e4uts, \"quotes\" and a\nnew line")
    files = [tmp_path / f"{i}.fw" for i in range(8)]
    for file in files:
        net.copy().save(file)
    assert len({file.read_bytes() for file in files}) == 1
    assert digest(fw.load(files[0])) == digest(net)
