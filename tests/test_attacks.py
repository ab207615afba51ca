"""Files that mean harm: each is refused or runs, in a process with limits on time and memory. ``make fuzz`` finds more.

What the fuzzer found lies in ``tests/attacks`` and is opened here again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune
from typer.testing import CliRunner

import featherweight as fw
from attacks.forge import TENSORS, graph_of, one_call, written
from featherweight.cli import show
from featherweight.cli.app import app
from featherweight.codec.archive import MAGIC
from featherweight.codec.blocks import varint
from featherweight.errors import FileError
from featherweight.report import render

HERE = Path(__file__).parent / "attacks"

SECONDS = 60  #: for all files of one replay; every file takes a small part of a second
X, A, B = {"node": "x"}, {"node": "t_a"}, {"node": "t_b"}
ONE = {"a": torch.ones(3, 30000), "b": torch.ones(1)}

#: name -> (a call that killed the process or never ended, what is said of it)
CALLS: dict[str, tuple[Any, str]] = {
    "update_stats": (one_call("aten.batch_norm_update_stats.default", [A, B, B, 0.5], tensors=ONE),
                     "only with your word"),
    "native_norm": (one_call("aten.native_batch_norm.default", [A, B, B, B, B, True, 0.1, 1e-5], tensors=ONE),
                    "only with your word"),
    "sizes": (one_call("aten.batch_norm.default", [A, B, B, B, B, True, 0.1, 1e-5, False], tensors=ONE),
              "does not fit"),
    "dtype": (one_call("aten.sum.default", [X], {"dtype": -1}), "'dtype' as -1, which is no Optional"),
    "dtype_float": (one_call("aten.sum.default", [X], {"dtype": 6}), "'dtype' as 6, which is no Optional"),
    "to": (one_call("aten.to.dtype", [X, -2]), "'dtype' as -2, which is no ScalarType"),
    "layout": (one_call("aten.zeros_like.default", [X], {"layout": 77}), "'layout' as 77"),
    "memory": (one_call("aten.clone.default", [X], {"memory_format": 9}), "'memory_format' as 9"),
    "device": (one_call("aten.to.device", [X, "cuda:99", {"dtype": "float32"}]), "'device' as 'cuda:99'"),
    "stack": (one_call("aten._stack.default", [[], 0]), "only with your word"),
    "promote": (one_call("aten.promote_types.default", [0, 1000]), "'type1' as 0|only with your word"),
    "fft": (one_call("aten._fft_r2c.default", [X, [7, -9], 0, True]), "only with your word"),
    "weight_norm": (one_call("aten._weight_norm.default", [A, {"node": "t_c"}, 0],
                             tensors={"a": torch.ones(3, 3), "c": torch.tensor(1.0)}), "only with your word"),
    "split": (graph_of([{"name": "w", "op": "call", "target": "aten.expand.default", "args": [B, [2**40]]},
                        {"name": "c", "op": "call", "target": "aten.split.Tensor", "args": [{"node": "w"}, 1]}],
                       {"b": torch.ones(1)}), "more than"),
    "power": (one_call("operator.pow", [10, 10**9]), "raised to"),
    "repeat": (one_call("operator.mul", ["x", 2**40]), "expected 2 numbers"),
    "huge": (one_call("aten.zeros.default", [[2**30, 2**30]]), "more than"),
    "arguments": (one_call("aten.relu.default", [X, X, X]), "gives aten.relu.default 3 arguments"),
    "none": (one_call("aten.relu.default", []), "no 'self'"),
}


def replayed(paths: list[Path]) -> dict[str, str]:
    """A file's name -> what came of it. Fails where the process dies or takes too long."""
    done = subprocess.run([sys.executable, str(HERE / "replay.py"), *map(str, paths)], capture_output=True, text=True,
                          timeout=SECONDS, check=False)
    assert done.returncode == 0, f"exit {done.returncode} after {done.stdout[-300:]}: {done.stderr[-1500:]}"
    found: dict[str, list[str]] = {}
    name = ""
    for line in done.stdout.splitlines():
        if line.startswith("  "):
            found[name].append(line.strip())
        else:
            name = line
            found[name] = []
    return {name: " ".join(lines) for name, lines in found.items()}


def test_calls_that_harm_are_refused_and_findings_stay_found(tmp_path: Path) -> None:
    files = [written(tmp_path / f"{name}.fw", *made) for name, (made, _) in CALLS.items()]
    kept = sorted(p for p in HERE.iterdir() if p.suffix not in (".py", "") and p.is_file())
    said = replayed([*files, *kept])
    for name, (_, reason) in CALLS.items():
        assert any(part in said[f"{name}.fw"] for part in reason.split("|")), f"{name}: {said[f'{name}.fw']}"
        assert "refused" in said[f"{name}.fw"], name
    for path in kept:
        assert said[path.name], path.name


def test_counts_are_bounded_before_they_are_multiplied(tmp_path: Path) -> None:
    """Shapes of 100,000 axes, and 50,000 tensors that no graph lists."""
    good, _ = one_call("aten.relu.default", [X])
    files = [written(tmp_path / "axes.fw", {**good, "packed": {"w": [1, 0, 1, "int8", [2**39] * 100_000]}},
                     {"w": torch.zeros(1, dtype=torch.uint8)}),
             written(tmp_path / "tensors.fw", good, {f"t{i}": torch.zeros(0) for i in range(50_000)}),
             written(tmp_path / "shape.fw", {**good, "inputs": [
                 {**good["inputs"][0], "shape": [None] * 100_000}]}, {})]
    for file in files:
        began = time.process_time()
        with pytest.raises(FileError):
            fw.load(file)
        assert time.process_time() - began < 3, file.name


def test_what_a_file_claims_is_not_allocated(tmp_path: Path) -> None:
    written(tmp_path / "wide.fw", *one_call("aten.relu.default", [X], shape=(None, 2**33)))
    network = fw.load(tmp_path / "wide.fw")
    assert isinstance(network, fw.Network)
    assert network.values()["c"].shape == (2, 2**33)
    said = CliRunner().invoke(app, ["inspect", str(tmp_path / "wide.fw")])
    assert said.exit_code == 0, said.output
    written(tmp_path / "wider.fw", *one_call("aten.relu.default", [X], shape=(None, 2**39)))
    with pytest.raises(FileError, match="has the shape"):
        fw.load(tmp_path / "wider.fw")


@pytest.mark.parametrize("path", ["[/b]", "[bold]a", "a\x1b[31mred\x07", "\x9b2J", "a\u202eb"])
def test_names_reach_no_terminal_as_commands(path: str, tmp_path: Path) -> None:
    net = fw.capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.ones(2, 3))
    assert isinstance(net, fw.Network)
    for node in net.calls():
        node.meta["module"] = path
    net.notes.append(path)
    net.save(tmp_path / "named.fw")
    said = CliRunner().invoke(app, ["inspect", str(tmp_path / "named.fw")])
    assert said.exit_code == 0, said.output
    assert show.printable(path) in said.output
    assert all(c.isprintable() or c == "\n" for c in said.output)
    refused = CliRunner().invoke(app, ["measure", f"{tmp_path}/{path.replace('/', '')}.fw"])
    assert all(c.isprintable() or c == "\n" for c in refused.output)


def test_a_title_and_progress_take_no_markup() -> None:
    stream = io.StringIO()
    plain = fw.measure.Measurement("[/b]", 1, 1, 1, ("[/b]",), 1, 1, score=1.0, score_name="[/b]\x07")
    console = Console(file=stream, width=200)
    console.print(show.comparison(plain, plain, "[/b]\x1b[31m"))
    console.print(show.measurement(plain))
    assert "[/b]\\x1b[31m" in stream.getvalue()
    assert stream.getvalue().count("[/b]\\x07") == 2
    assert stream.getvalue().count("[/b]") == 4
    assert all(c.isprintable() or c == "\n" for c in stream.getvalue())


def test_no_text_reaches_the_report_as_markup() -> None:
    """Every place of a result in turn holds markup, numbers too: the page shows it as text, or there is no page."""
    result = json.loads((HERE.parent / "fixtures" / "v0_1" / "job_done" / "result.json").read_text())
    shown, kinds = 0, set()
    for *steps, last in leaves(result):
        kind = tuple(step for step in (*steps, last) if isinstance(step, str))
        if kind in kinds:
            continue
        kinds.add(kind)
        holder = result
        for step in steps:
            holder = holder[step]
        before, holder[last] = holder[last], "<img src=x>&"
        with contextlib.suppress(TypeError, ValueError, LookupError, AttributeError):
            page = render(result)
            assert "<img" not in page, kind
            shown += "&lt;img src=x&gt;&amp;" in page
        holder[last] = before
    assert len(kinds) > 60
    assert shown > 15


def leaves(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a nest of lists and dicts that holds neither."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    return [at] if items is None else [found for key, inner in items for found in leaves(inner, (*at, key))]


# ---- archives

def archived(path: Path, length: int, blocks: bytes) -> Path:
    body = hashlib.sha256(b"").digest() + varint(length) + blocks
    path.write_bytes(MAGIC + b"\x01" + hashlib.sha256(body).digest() + body)
    return path


def block(method: int, count: int, payload: bytes) -> bytes:
    return bytes((method,)) + varint(count) + varint(len(payload)) + payload


def test_an_archive_gives_out_in_proportion_to_what_it_is(tmp_path: Path) -> None:
    zeros = block(2, 1 << 20, b"\x00\x00")
    bomb = archived(tmp_path / "bomb.fwz", 1 << 30, zeros * 1024)
    assert bomb.stat().st_size < 10_000
    with pytest.raises(FileError, match=r"more than the \d+ allowed.*limit=1073741824"):
        fw.codec.unpack(bomb, tmp_path / "out.fw")
    head = json.dumps({"w": {"dtype": "U8", "shape": [5], "data_offsets": [0, 5]}}).encode()
    head = len(head).to_bytes(8, "little") + head
    more = archived(tmp_path / "more.fwz", len(head) + (32 << 20), block(0, len(head), head) + zeros * 32)
    began = time.process_time()
    with pytest.raises(FileError, match="the tensors of the file inside end at"):
        fw.codec.unpack(more, tmp_path / "out.fw")
    assert time.process_time() - began < 0.3, "nothing was decoded beyond the header"
    assert not (tmp_path / "out.fw").exists()


def test_a_thousand_small_coded_blocks_take_a_moment(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    given = {f"t{i}": (torch.randn(64, 64, generator=g) * 2).round().to(torch.int8) for i in range(1000)}
    save_file(given, tmp_path / "many.safetensors")
    assert fw.codec.pack(tmp_path / "many.safetensors", tmp_path / "many.fwz") < 0.5 * 1000 * 64 * 64, "they are coded"
    began = time.process_time()
    fw.codec.unpack(tmp_path / "many.fwz", tmp_path / "again.safetensors")
    assert time.process_time() - began < 3  # it was 22 s
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "many.safetensors").read_bytes()


@pytest.mark.parametrize("bits", [0, -1, 8, 2.5, 1e400, None, "1", [1], True])
def test_packing_a_hostile_header(bits: Any, tmp_path: Path) -> None:
    """Numbers of bits that are none, offsets that are no numbers."""
    path = tmp_path / "net.fw"
    written(path, {"packed": {"a": [bits]}}, {"a": torch.zeros(64, dtype=torch.uint8)})
    with pytest.raises(FileError, match="no featherweight file"):
        fw.codec.pack(path, tmp_path / "net.fwz")
    data = path.read_bytes()
    head = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    head["__metadata__"]["graph"] = "{}"
    head["a"]["data_offsets"] = [0, bits]
    text = json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    with pytest.raises(FileError, match=r"no featherweight file|damaged"):
        fw.codec.pack(path, tmp_path / "net.fwz")


def test_a_bias_does_not_cost_the_palette_of_its_weight(tmp_path: Path) -> None:
    sizes = []
    for bias in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(1000, 500, bias=bias)
        with torch.no_grad():
            model.weight.copy_(torch.randn(200)[torch.randint(200, (500, 1000))])
        sizes.append(packed_size(model, tmp_path))
    assert sizes[1] < sizes[0] + 4 * 500 + 600


def test_negative_zeros_cost_no_more_than_zeros(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(500, 1000)
    mask = weight.abs() > 2.4
    plain, masked = nn.Linear(1000, 500, bias=False), nn.Linear(1000, 500, bias=False)
    with torch.no_grad():
        plain.weight.copy_(torch.where(mask, weight, 0))
        masked.weight.copy_(weight * mask)
    assert bool(torch.signbit(masked.weight[masked.weight == 0]).any())
    assert packed_size(masked, tmp_path) == packed_size(plain, tmp_path)
    pruned = nn.Linear(1000, 500, bias=False)
    with torch.no_grad():
        pruned.weight.copy_(weight)
    prune.custom_from_mask(pruned, "weight", mask)
    prune.remove(pruned, "weight")
    assert packed_size(pruned, tmp_path) == packed_size(plain, tmp_path)
    network = fw.capture(plain.eval(), torch.randn(2, 1000))
    assert isinstance(network, fw.Network)
    network.set_tensor("weight", weight * mask)  # past capture, every bit is kept: a sign a zero
    network.save(tmp_path / "signs.fw")
    signs = fw.codec.pack(tmp_path / "signs.fw", tmp_path / "signs.fwz") - packed_size(plain, tmp_path)
    assert 0 < signs < 1.05 * int((~mask).sum()) / 8
    fw.codec.unpack(tmp_path / "signs.fwz", tmp_path / "again.fw")
    assert (tmp_path / "again.fw").read_bytes() == (tmp_path / "signs.fw").read_bytes()


def packed_size(model: nn.Module, folder: Path) -> int:
    network = fw.capture(model.eval(), torch.randn(2, 1000))
    assert isinstance(network, fw.Network)
    network.save(folder / "net.fw")
    return fw.codec.pack(folder / "net.fw", folder / "net.fwz")


# ---- memory

PEAK = """
import resource, sys, featherweight as fw
fw.load(sys.argv[1])  # what torch imports for shapes is there
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
open("/proc/self/clear_refs", "w").write("5")
network = fw.load(sys.argv[2])
peak = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_loading_takes_less_than_three_times_what_is_loaded(tmp_path: Path) -> None:
    network = fw.capture(nn.Linear(3, 3).eval(), torch.ones(2, 3))
    assert isinstance(network, fw.Network)
    network.save(tmp_path / "small.fw")
    size = 16 << 20
    network.add_tensor("bits", torch.from_numpy(np.random.default_rng(0).integers(0, 2, size).astype(np.int8)),
                       buffer=True)
    assert network.save(tmp_path / "bits.fw") < size / 7
    done = subprocess.run([sys.executable, "-c", PEAK, tmp_path / "small.fw", tmp_path / "bits.fw"],
                          capture_output=True, text=True, timeout=SECONDS, check=True)
    assert int(done.stdout) < 3 * size


# ---- operators that no table knows

class Differences(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.diff(x)


def test_an_operator_beyond_the_table_needs_the_readers_word(tmp_path: Path) -> None:
    network = fw.capture(Differences().eval(), torch.randn(2, 5))
    assert isinstance(network, fw.Network)
    assert any("aten.diff.default" in note and "operators=" in note for note in network.notes)
    network.save(tmp_path / "diff.fw")
    with pytest.raises(FileError, match=r"fw\.load\(path, operators=\['aten\.diff\.default'\]\)"):
        fw.load(tmp_path / "diff.fw")
    given = torch.randn(3, 5)
    loaded = fw.load(tmp_path / "diff.fw", operators=["aten.diff.default"])
    assert torch.equal(loaded(given), torch.diff(given))
    written(tmp_path / "set.fw", *one_call("aten._reshape_alias.default", [X, [2], [1]], tensors={"a": TENSORS["row"]}))
    with pytest.raises(FileError, match="may not name"):  # the rule holds whatever the reader says
        fw.load(tmp_path / "set.fw", operators=["aten._reshape_alias.default"])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_private_operators_are_written_with_public_ones(tmp_path: Path) -> None:
    """Weight norm's own kernel trusts its arguments; a network that keeps it computed names none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 4)), nn.utils.weight_norm(nn.Linear(4, 3), dim=None))
    given = torch.randn(3, 5)
    network = fw.capture(model.eval(), given, keep_parametrizations=True)
    assert isinstance(network, fw.Network)
    assert any(n.target is torch.ops.aten.linalg_vector_norm.default for n in network.calls())
    assert not any(n.target is torch.ops.aten._weight_norm.default for n in network.calls())
    network.save(tmp_path / "normed.fw")
    loaded = fw.load(tmp_path / "normed.fw")
    with torch.no_grad():
        torch.testing.assert_close(loaded(given), model(given))


def test_one_call_that_fits_at_some_sizes_is_enough(tmp_path: Path) -> None:
    """Windows of seven along a free axis: 64 is no multiple of seven, 224 is."""
    call = ("aten.unflatten.int", [X, 1, [-1, 7]])
    network = fw.load(written(tmp_path / "windows.fw", *one_call(*call, shape=(None, None))))
    assert network(torch.ones(2, 21)).shape == (2, 3, 7)
    with pytest.raises(FileError, match=r"call 'c' of aten.unflatten.int does not fit .*float32 \[2, 64\]"):
        fw.load(written(tmp_path / "fixed.fw", *one_call(*call, shape=(None, 64))))


def test_lists_of_results_cannot_be_multiplied(tmp_path: Path) -> None:
    """4,096 results read whole a thousand times take as long as a far larger graph."""
    calls = [{"name": "w", "op": "call", "target": "aten.expand.default", "args": [B, [4096]]},
             {"name": "u", "op": "call", "target": "aten.unbind.int", "args": [{"node": "w"}]},
             *({"name": f"c{i}", "op": "call", "target": "aten.stack.default", "args": [{"node": "u"}, 0]}
               for i in range(1000))]
    with pytest.raises(FileError, match="reads more results of other calls"):
        fw.load(written(tmp_path / "lists.fw", *graph_of(calls, {"b": torch.ones(1)})))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "projected"])
def test_recurrent_layers_read_nothing_beyond_their_states(kind: str, tmp_path: Path) -> None:
    """torch's kernels read states of 7 numbers with weights for 6, past the end of either."""
    torch.manual_seed(0)
    layer = (nn.LSTM(5, 6, 2, batch_first=True, bidirectional=True, proj_size=3) if kind == "projected" else
             getattr(nn, kind)(5, 6, 2, batch_first=True, bidirectional=kind != "RNN", bias=kind != "RNN"))
    given = torch.randn(2, 4, 5)
    network = fw.capture(layer.eval(), given)
    assert isinstance(network, fw.Network)
    network.save(tmp_path / "net.fw")
    loaded = fw.load(tmp_path / "net.fw")
    for wanted, got in zip(pytree.tree_leaves(layer(given)), pytree.tree_leaves(loaded(given)), strict=True):
        torch.testing.assert_close(got, wanted)
    with safe_open(tmp_path / "net.fw", "pt") as file:
        description = json.loads(file.metadata()["graph"])
    for node in description["nodes"]:
        if node.get("target") == "aten.zeros.default":
            node["args"][0][-1] += 1
    with pytest.raises(FileError, match="is given states and weights"):
        fw.load(written(tmp_path / "wide.fw", description, load_file(tmp_path / "net.fw")))
