"""The ``.fw`` file: a safetensors file whose header carries the graph as JSON.

Layout, byte by byte
    0..7      length N of the header, unsigned little-endian (safetensors)
    8..8+N    the header, JSON: per tensor its dtype, shape and place; ``__metadata__`` with the strings "format"
              ("featherweight 1"), "graph" (JSON, below) and "sha256" (of graph, tensor names, dtypes, shapes and bytes)
    the rest  the tensors' bytes, read by the safetensors library, which checks that they fill the file exactly

The graph: ``nodes`` [{name, op: input|tensor|call|output, target, args, kwargs, module, source, ...}], ``inputs``,
``in_spec``, ``out_spec``, ``constants``, ``tensors`` {name: kind}, ``ties`` {name: name it shares}, ``order`` of module
paths, ``patterns``, ``notes``, and ``packed``: tensors of integers written with fewer than 8 bits (``packed.py``).
Arguments are JSON literals or tagged objects: {"node": name}, {"dtype": ..}, {"device": ..}, {"layout": ..},
{"memory": ..}, {"float": "inf"}, {"slice": [..]}.

How each byte is read: ``json.loads``, then checks of every field (``description.py``). A call's operator is looked up
by name in a table (``table.py``, ``allowed.py``), its arguments are held against its schema (``arguments.py``), and the
graph is tried on tensors without data (``shapes.py``) before anything is computed. Nothing is imported, unpickled or
evaluated on a file's word. A damaged or hostile file is a FileError. The checksum finds damage; it proves nothing about
who wrote the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save as serialize
from safetensors.torch import save_file
from torch import Tensor

from featherweight.errors import FileError
from featherweight.files import written_whole
from featherweight.network.file import packed
from featherweight.network.file.allowed import target_name
from featherweight.network.file.description import describe, rebuild
from featherweight.network.snapshot import Snapshot

FORMAT = "featherweight 1"
ASSEMBLY_FORMAT = "featherweight assembly 1"
#: how files of other kinds begin -> what to say of one
OTHERS = {b"\x93FWZ": "an archive: write fw.codec.unpack(archive, 'network.fw') first",
          b"\x08": "an ONNX file, which a runtime loads: fw.load takes the network.fw beside it"}
HEADER_LIMIT = 100_000_000  #: bytes; as safetensors has it


# ---- writing

def save(snapshot: Snapshot, path: str | Path) -> int:
    """Writes a network to ``path``, whole or not at all; gives the file's length in bytes."""
    description, tensors = describe(snapshot)
    return _write(path, tensors, FORMAT, description)


def save_parts(parts: Mapping[str, Snapshot], outside: Mapping[str, Tensor], notes: list[str], path: str | Path) -> int:
    """Writes a model in parts: every part as a graph, and ``outside``, the tensors of what stayed Python."""
    described: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, snapshot in parts.items():
        described[name], own = describe(snapshot)
        tensors |= {f"{name}/{k}": v for k, v in own.items()}
    tensors |= {f"/{k}": v for k, v in outside.items()}
    return _write(path, tensors, ASSEMBLY_FORMAT, {"parts": described, "notes": notes})


def lengths(snapshot: Snapshot) -> tuple[int, int]:
    """(the length in bytes of the file that ``save`` would write, the bytes of its tensors)."""
    description, tensors = describe(snapshot)
    plain, text = _packed(tensors, description)
    size = sum(t.nbytes for t in plain.values())
    meta = {"format": FORMAT, "graph": text, "sha256": "0" * hashlib.sha256().digest_size * 2}
    return _header(plain, meta) + size, size


def _header(tensors: Mapping[str, Tensor], meta: dict[str, str]) -> int:
    """The length in bytes of what stands ahead of the tensors: that of tensors without elements, in the order and the
    spelling of safetensors, with the shapes and places of these."""
    head = serialize({name: t.new_empty(0) for name, t in tensors.items()}, meta)[8:].rstrip()
    entries, at, grown = json.loads(head), 0, 0
    del entries["__metadata__"]
    for name in entries:
        tensor = tensors[name]
        places = (str(list(numbers)).replace(" ", "") for numbers in (tensor.shape, (at, at + tensor.nbytes)))
        grown += sum(map(len, places)) - len("[0][0,0]")
        at += tensor.nbytes
    return 8 + -(-(len(head) + grown) // 8) * 8


def _packed(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """The tensors as they lie in the file, and the graph as text."""
    plain, entries = packed.pack({k: v.detach().contiguous().cpu() for k, v in tensors.items()})
    return plain, json.dumps({**description, **({"packed": entries} if entries else {})}, separators=(",", ":"))


def _write(path: str | Path, tensors: dict[str, Tensor], kind: str, description: dict[str, Any]) -> int:
    plain, text = _packed({k: v.clone() for k, v in tensors.items()}, description)
    with written_whole(path) as part:
        save_file(plain, part, {"format": kind, "graph": text, "sha256": _digest(text, plain)})
        _order_metadata(part)
    return Path(path).stat().st_size


def _order_metadata(path: Path) -> None:
    """Sorts the strings in the header, which safetensors writes in any order: equal networks give equal files."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) <= length:  # the same strings: only an escape spelled otherwise could make it longer
            file.seek(8)
            file.write(ordered.ljust(length))


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


# ---- reading

@dataclass(frozen=True)
class Parts:
    """What ``save_parts`` wrote."""

    parts: Mapping[str, Snapshot]
    outside: Mapping[str, Tensor]
    notes: list[str]


def read(path: str | Path, types: Mapping[str, type] | None = None,
         operators: Collection[str] = ()) -> Snapshot | Parts:
    """What ``save`` or ``save_parts`` wrote; further arguments as in ``load``. Raises FileError for anything else."""
    kind, description, tensors = _read(Path(path))
    if kind == FORMAT:
        return rebuild(description, tensors, types, operators)
    parts = description.get("parts") if isinstance(description, dict) else None
    if not isinstance(parts, dict) or not isinstance(description.get("notes"), list):
        raise FileError(f"{path} does not list its parts")
    own: dict[str, dict[str, Tensor]] = {name: {} for name in ("", *parts)}
    for full, tensor in tensors.items():
        name = _part(full, own)
        own[name][full[len(name) + 1:]] = tensor
    rebuilt = {name: rebuild(graph, own[name], types, operators) for name, graph in parts.items()}
    return Parts(rebuilt, own[""], [str(n) for n in description["notes"]])


def _part(full: str, parts: Collection[str]) -> str:
    """The part that a tensor "part/name" belongs to, "" for one outside ("/name"): the longest name that fits."""
    at = len(full)
    while (at := full.rfind("/", 0, at)) >= 0:
        if full[:at] in parts:
            return full[:at]
    raise FileError(f"the tensor {full[:80]!r} belongs to no part of the model")


def _read(path: Path) -> tuple[str, Any, dict[str, Tensor]]:
    if path.is_dir():
        raise FileError(f"{path} is a folder; write the name of a file in it: fw.load({str(path / 'network.fw')!r})")
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as raw:
        head = raw.read(9)
    length = int.from_bytes(head[:8], "little")
    if len(head) < 9 or head[8:9] != b"{" or length > HEADER_LIMIT or length + 8 > size:
        if head[:2] == b"PK" or head[:1] == b"\x80":
            raise FileError(f"{path} holds a pickle (a torch.save file?), which can run code when read; it was not "
                            "opened. Save a network with network.save(path)")
        if head[8:9] not in (b"", b"{"):
            other = next((said for begins, said in OTHERS.items() if head.startswith(begins)), "")
            raise FileError(f"{path} is no featherweight file, " + (f"it looks like {other}" if other else
                            "or a damaged one; such files are written by network.save(path)"))
        raise FileError(f"{path} is no featherweight file or is truncated: its header claims {length} of {size} bytes")
    try:
        with safetensors.safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            kind = meta.get("format")
            if kind not in (FORMAT, ASSEMBLY_FORMAT):
                raise FileError(f"{path} is of format {str(kind)[:80]!r}; expected {FORMAT!r} (written by "
                                "network.save)")
            text = meta.get("graph", "")
            description = _parsed(path, text)
            _check_names(path, kind, description, set(file.keys()))
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileError:
        raise
    except Exception as error:
        raise FileError(f"{path} is damaged or truncated: {error}") from error
    if _digest(text, tensors) != meta.get("sha256"):
        raise FileError(f"{path} is damaged: its bytes do not match its checksum")
    if isinstance(description, dict) and "packed" in description:
        tensors = packed.unpack(tensors, description["packed"])
    return kind, description, tensors


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged: its graph is no JSON: {error}") from error


def _check_names(path: Path, kind: str, description: Any, names: set[str]) -> None:
    """Raises FileError for tensors that no graph lists, before any of them is read."""
    graphs = {"": description}
    if kind == ASSEMBLY_FORMAT:
        names = {name for name in names if not name.startswith("/")}
        parts = description.get("parts") if isinstance(description, dict) else None
        graphs = {f"{part}/": graph for part, graph in parts.items()} if isinstance(parts, dict) else {"": None}
    listed: set[str] = set()
    for start, graph in graphs.items():
        tensors = graph.get("tensors") if isinstance(graph, dict) else None
        if not isinstance(tensors, dict):
            return  # no graph: refused as such later
        listed.update(start + name for name in tensors)
    if not names <= listed:
        raise FileError(f"{path} is damaged: the tensors in the file are not those its graph lists: "
                        f"{min(names - listed)[:80]!r} is not")


__all__ = ["Parts", "describe", "lengths", "read", "rebuild", "save", "save_parts", "target_name"]
