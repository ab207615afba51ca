"""What the fuzzer makes: one case of a kind from its number alone, from files of earlier versions and from nothing."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import safetensors
import torch
from forge import TENSORS, graph_of, written
from onnx import helper, numpy_helper
from replay import run
from safetensors.torch import load_file, save_file
from torch import Tensor

import featherweight as fw
from featherweight.cli.app import report
from featherweight.codec.varints import read_varint
from featherweight.errors import FileError
from featherweight.network.file.allowed import FUNCTIONS, NAMESPACES, read
from featherweight.network.file.table import PACKETS
from featherweight.recover import checkpoint


def model_of(arrays: dict[str, Any]) -> bytes:
    """An ONNX file with these initializers."""
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    node = helper.make_node("Constant", [], ["k"], value=tensors[0])
    return bytes(helper.make_model(helper.make_graph([node], "g", [], [], tensors)).SerializeToString())


def archived(data: bytes) -> bytes:
    """The archive of a file."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "file").write_bytes(data)
        fw.codec.pack(Path(folder, "file"), Path(folder, "file.fwz"))
        return Path(folder, "file.fwz").read_bytes()


FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0_1"
NUMBERS = (0, 1, 2, 3, -1, -2, 5, 8, 64, 255, 256, 1000, 2**31 - 1, 2**31, 2**40, 2**53, 2**62, 2**63 - 1,
           -2**63, 2**63)
TEXTS = ("", "x", "float32", "int8", "mean", "sum", "max", "bilinear", "nearest", "constant", "reflect", "circular",
         "L", "floor", "trunc", "tanh", "none", "valid", "same", "fro", "nuc", "ij,jk->ik", "...i->i", "\x1b[31m",
         "[/b]", "a" * 300)
TAGGED = ({"dtype": "float32"}, {"dtype": "int8"}, {"dtype": "bool"}, {"dtype": "complex64"}, {"dtype": "bfloat16"},
          {"dtype": "quint8"}, {"dtype": "float8_e4m3fn"}, {"dtype": "bits8"}, {"layout": "strided"},
          {"layout": "sparse_coo"}, {"layout": "sparse_csr"}, {"layout": "_mkldnn"}, {"memory": "channels_last"},
          {"memory": "contiguous_format"}, {"memory": "preserve_format"}, {"device": "cpu"}, {"device": "meta"},
          {"device": "cuda"}, {"device": "cpu:7"}, {"float": "nan"}, {"float": "inf"}, {"slice": [None, 2, None]},
          {"node": "x"}, {"node": "c"})


def _operators() -> list[Any]:
    found = []
    for full in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = full.partition("::")
        packet, _, overload = rest.partition(".")
        if f"{namespace}::{packet}" in PACKETS and namespace in NAMESPACES:
            try:
                found.append(read(f"{namespace}.{packet}.{overload or 'default'}"))
            except FileError:
                continue
    return sorted(found, key=str)


OPERATORS = _operators()
FLOAT_NAMES = tuple(TENSORS)


# ---- arguments

def small(rng: Random) -> int:
    return rng.choice((0, 1, 2, 3, -1, 4, 1, 2, 0)) if rng.random() < 0.93 else rng.choice(NUMBERS)


def argument(rng: Random, declared: str, nodes: list[str]) -> Any:
    """An argument that a file can express, mostly of the declared type."""
    outer, _, inner = declared.removesuffix("]").partition("[")
    if outer == "Optional":
        return None if rng.random() < 0.5 else argument(rng, inner, nodes)
    if outer == "List":
        return [argument(rng, inner, nodes) for _ in range(rng.choice((0, 1, 1, 2, 2, 2, 3, 4)))]
    if rng.random() < 0.01:
        return junk(rng)
    if declared == "Tensor":
        return {"node": rng.choice(nodes)}
    made: dict[str, Callable[[], Any]] = {
        "bool": lambda: rng.random() < 0.5, "str": lambda: rng.choice(TEXTS),
        "float": lambda: rng.choice((0.0, 1.0, 0.5, -1.0, 1e-5, 1e38, {"float": "nan"}, {"float": "inf"}, 2)),
        "number": lambda: rng.choice((0, 1, 2, -1, 0.5, True, 1e308, {"float": "nan"}, 2**62)),
        "ScalarType": lambda: rng.choice(TAGGED[:8]), "Layout": lambda: rng.choice(TAGGED[8:12]),
        "MemoryFormat": lambda: rng.choice(TAGGED[12:15]), "Device": lambda: rng.choice(TAGGED[15:19]),
        "Generator": lambda: None}
    return made.get(declared, lambda: small(rng))()


def junk(rng: Random) -> Any:
    return copy.deepcopy(rng.choice((
        None, True, rng.choice(NUMBERS), rng.random(), rng.choice(TEXTS), rng.choice(TAGGED), [], {},
        [rng.choice(NUMBERS)], [rng.choice(NUMBERS)] * 70, {rng.choice(TEXTS): rng.choice(NUMBERS)}, [[[]]],
        {"kind": "tuple", "items": [0]},
        "aten.relu.default", "operator.pow", "operator.mul", "operator.getitem")))


# ---- mutations of nests

def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at] if at else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*at, key))
    return found


def mutated(rng: Random, value: Any, spots: list[tuple[Any, ...]]) -> Any:
    """A nest with one to three places set to something else, dropped, doubled, or set to what another place has."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        *steps, last = rng.choice(spots)
        holder = value
        try:
            for step in steps:
                holder = holder[step]
            action = rng.choice(("set", "set", "drop", "double", "other"))
            if action == "set":
                holder[last] = junk(rng)
            elif action == "drop":
                del holder[last]
            elif action == "double" and isinstance(holder, list):
                holder.insert(last, copy.deepcopy(holder[last]))
            elif action == "other":
                other: Any = value
                for step in rng.choice(spots):
                    other = other[step]
                holder[last] = copy.deepcopy(other)
        except (KeyError, IndexError, TypeError):
            continue
    return value


def parted(path: Path) -> tuple[dict[str, str], Any, dict[str, Tensor]]:
    with safetensors.safe_open(path, "pt") as file:
        meta = file.metadata()
    return meta, json.loads(meta["graph"]), load_file(path)


def texts(path: Path) -> Any:
    return json.loads(path.read_text())


FIRST = FIXTURES / "network_plain.fw"
PLAIN = fw.load(FIRST)
NETWORKS = [parted(p) for p in sorted(FIXTURES.glob("network_*.fw"))]
SPOTS = [places(description) for _, description, _ in NETWORKS]
RAW = [p.read_bytes() for p in sorted(FIXTURES.glob("network_*.fw"))]
MODEL = model_of({"w": np.arange(400, dtype=np.float32).reshape(20, 20),
                  "i": np.tile(np.arange(5, dtype=np.uint8), 90)})
ARCHIVES = [p.read_bytes() for p in sorted(FIXTURES.glob("*.fwz"))] + [archived(data) for data in (RAW[0], MODEL)]
PLANS = [(json.loads(safetensors.safe_open(p, "pt").metadata()["plan"]), load_file(p))
         for p in sorted((FIXTURES / "plans").glob("*.plan"))]
RESULT = texts(FIXTURES / "job_done" / "result.json")
RESULT_SPOTS = places(RESULT)
RECIPE = (FIXTURES / "recipe.toml").read_text()


# ---- kinds

def graph(rng: Random, path: Path) -> None:
    which = rng.randrange(len(NETWORKS))
    meta, description, tensors = NETWORKS[which]
    written(path, mutated(rng, description, SPOTS[which]), tensors, meta["format"])


def assembly(rng: Random, path: Path) -> None:
    which = rng.randrange(len(NETWORKS))
    _, description, tensors = NETWORKS[which]
    name = rng.choice(("part", "", "0", "a.b", "a/b", "__class__"))
    whole = {"parts": {name: mutated(rng, description, SPOTS[which])}, "notes": []}
    if rng.random() < 0.3:
        whole = mutated(rng, whole, places(whole))
    written(path, whole, {f"{name}/{k}": v for k, v in tensors.items()}, "featherweight assembly 1")


def operator(rng: Random, path: Path) -> None:
    """One to three calls in a row, of operators in the table, on tensors of many shapes and types."""
    calls: list[dict[str, Any]] = []
    nodes = ["x", *(f"t_{name}" for name in rng.sample(FLOAT_NAMES, 6))]
    for place in range(rng.choice((1, 1, 1, 2, 3))):
        name = f"c{place}"
        if rng.random() < 0.06:
            target: Any = rng.choice(sorted(FUNCTIONS))
            args = [rng.choice((small(rng), rng.choice(NUMBERS), {"node": rng.choice(nodes)})) for _ in range(2)]
            calls.append({"name": name, "op": "call", "target": target, "args": args})
        else:
            target = rng.choice(OPERATORS)
            args, kwargs, stopped = [], {}, False
            for item in target._schema.arguments:
                stopped = stopped or item.kwarg_only or (item.has_default_value() and rng.random() < 0.35)
                if not stopped:
                    args.append(argument(rng, str(item.real_type), nodes))
                elif not item.has_default_value() or rng.random() < 0.2:
                    kwargs[item.name] = argument(rng, str(item.real_type), nodes)
            calls.append({"name": name, "op": "call", "target": str(target), "args": args, "kwargs": kwargs})
        nodes = [*nodes, name, name]
    used = {node[2:] for node in nodes if node.startswith("t_")}
    written(path, *graph_of(calls, {k: TENSORS[k] for k in sorted(used)}))


def raw(rng: Random, path: Path) -> None:
    data = bytearray(rng.choice(RAW))
    for _ in range(rng.choice((1, 2, 8))):
        data[rng.randrange(min(len(data), rng.choice((16, 400, len(data)))))] = rng.randrange(256)
    path.write_bytes(data[:rng.randrange(len(data))] if rng.random() < 0.1 else data)


def header(rng: Random, path: Path) -> None:
    """A .fw file whose safetensors header is changed, as ``pack`` reads it."""
    data = rng.choice(RAW)
    size = int.from_bytes(data[:8], "little")
    head = json.loads(data[8:8 + size])
    graph_text = json.loads(head["__metadata__"]["graph"])
    if rng.random() < 0.5:
        graph_text["packed"] = {rng.choice(list(head)): junk(rng), **graph_text.get("packed", {})}
        head["__metadata__"]["graph"] = json.dumps(graph_text)
    changed = json.dumps(mutated(rng, head, places(head))).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + size:])


def model(rng: Random, path: Path) -> None:
    """An ONNX file with changed bytes, as ``pack`` reads it."""
    data = bytearray(MODEL)
    for _ in range(rng.choice((1, 2, 8))):
        data[rng.randrange(min(len(data), rng.choice((16, 400, len(data)))))] = rng.randrange(256)
    path.write_bytes(data[:rng.randrange(len(data))] if rng.random() < 0.1 else data)


def archive(rng: Random, path: Path) -> None:
    whole = rng.choice(ARCHIVES)
    body, new = bytearray(whole[40:]), whole[7] > 2
    for _ in range(rng.choice((1, 1, 2, 6))):
        at = rng.randrange(8 if new else 32, min(len(body), rng.choice((60, 1000, len(body)))))
        body[at] = rng.choice((rng.randrange(256), body[at] ^ 1 << rng.randrange(8), 0, 255))
    if new and rng.random() < 0.9:
        resealed(body)
    path.write_bytes(whole[:8] + hashlib.sha256(body).digest() + body)


def resealed(body: bytearray) -> None:
    """Right checksums of blocks, as far as there are blocks, so that what decodes them is reached."""
    at = 9
    try:
        _, at = read_varint(bytes(body), at)
        while at < len(body):
            begin = at
            _, at = read_varint(bytes(body), at + 1)
            length, at = read_varint(bytes(body), at)
            at += length
            body[at:at + 4] = zlib.crc32(body[begin:at]).to_bytes(4, "little")
            at += 4
    except FileError:
        pass


def plan(rng: Random, path: Path) -> None:
    body, tensors = rng.choice(PLANS)
    save_file(tensors, path, {"plan": json.dumps(mutated(rng, body, places(body)))})


def state(rng: Random, path: Path) -> None:
    meta: dict[str, Any] = {"format": checkpoint.FORMAT, "fingerprint": "mark",
                            "position": {"epoch": 1, "step": 2, "rounds": 3},
                            "numbers": {"optimizer": {}, "progress": 0.5}}
    meta = mutated(rng, meta, places(meta))
    plain = {k: v if isinstance(v, str) else json.dumps(v) for k, v in meta.items()}
    save_file({"network/a": torch.ones(3)}, path, plain)


def result(rng: Random, path: Path) -> None:
    path.write_text(json.dumps(mutated(rng, RESULT, RESULT_SPOTS)))


def recipe(rng: Random, path: Path) -> None:
    lines = RECIPE.splitlines()
    for _ in range(rng.choice((1, 2, 4))):
        at = rng.randrange(len(lines))
        key = lines[at].partition("=")[0]
        lines[at] = rng.choice((f"{key}= {rng.choice(NUMBERS)}", f"{key}= {json.dumps(rng.choice(TEXTS))}",
                                f"{key}= []", f"{key}= true", f"{key}= nan", "", rng.choice(lines), rng.choice(TEXTS)))
    path.write_text("\n".join(lines))


# ---- opening

def opened(path: Path) -> Any:
    found = fw.load(path)
    run(found, quiet=True)
    return found


def into(path: Path) -> Any:
    return fw.load(path, into=torch.nn.Sequential(torch.nn.Linear(2, 2)))


def unpacked(path: Path) -> Any:
    fw.codec.unpack(path, path.with_suffix(".out"))
    return opened(path.with_suffix(".out"))


def packed(path: Path) -> Any:
    return fw.codec.pack(path, path.with_suffix(".out"))


def reported(path: Path) -> Any:
    report([path])
    return True


def planned(path: Path) -> Any:
    """A plan is read, and applied to a network that it may not fit; what that raises is its own affair."""
    found = fw.steps.Plan.load(path)
    with contextlib.suppress(Exception):
        run(found.apply(PLAIN), quiet=True)
    return found


def kept(path: Path) -> Any:
    return checkpoint.read(path.parent, "mark")


@dataclass(frozen=True)
class Kind:
    """How a case is written, which ending its file has, and what opens it."""

    write: Callable[[Random, Path], None]
    suffix: str
    opener: Callable[[Path], Any]
    name: str = "case"

    def open(self, rng: Random, folder: Path) -> Any:
        path = folder / f"{self.name}{self.suffix}"
        self.write(rng, path)
        return self.opener(path)


#: name -> kind; how often each is made follows from ``SHARES``
KINDS: dict[str, Kind] = {
    "operator": Kind(operator, ".fw", opened), "graph": Kind(graph, ".fw", opened),
    "assembly": Kind(assembly, ".fw", into), "raw": Kind(raw, ".fw", opened),
    "pack": Kind(header, ".pack", packed), "model": Kind(model, ".pack", packed),
    "archive": Kind(archive, ".fwz", unpacked),
    "plan": Kind(plan, ".plan", planned), "state": Kind(state, ".safetensors", kept, "checkpoint"),
    "result": Kind(result, ".json", reported), "recipe": Kind(recipe, ".toml", fw.Recipe.from_toml),
}
SHARES = ["operator"] * 10 + ["graph"] * 3 + ["assembly", "raw", "pack", "model", "archive", "plan", "state",
                                              "result", "recipe"]
