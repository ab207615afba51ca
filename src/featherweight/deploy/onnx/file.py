"""ONNX models as files: one ``.onnx`` file, weights inside, what no runtime reads left out.

The file carries what ONNX cannot say about the outputs (which leaf of the nest is which tensor, which is a constant) as
JSON in the model's metadata under METADATA.

Weights go into the file one after another, so that writing takes the memory of the largest: protobuf by itself builds
the whole message, and then its bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

from featherweight.files import written_whole

METADATA = "featherweight"
#: a protobuf message holds less than 2 GiB; what is larger gets its weights in a file beside it
WHOLE_LIMIT = 2_000_000_000
#: bytes from which a weight is written by itself
LARGE = 4096


def write(model: Any, outputs: list[dict[str, Any]] | None, path: Path) -> int:
    """Writes the model, with its description of the outputs, whole or not at all; gives the bytes of all files."""
    import onnx_ir

    _strip(model)
    if outputs is not None:
        model.metadata_props[METADATA] = json.dumps({"outputs": outputs}, separators=(",", ":"))
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    if size < WHOLE_LIMIT:
        with written_whole(path) as part, open(part, "wb") as file:
            _stream(model, file)
        for old in beside(path):
            old.unlink()
        return path.stat().st_size
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        onnx_ir.save(model, Path(folder, path.name), external_data=path.name + ".data")
        written = sorted(os.listdir(folder), reverse=True)
        for name in written:
            shutil.move(Path(folder, name), path.with_name(name))
    return sum(path.with_name(name).stat().st_size for name in written)


def beside(path: Path) -> tuple[Path, ...]:
    """The file of weights that lies beside an ``.onnx`` file too large to hold them, if there is one."""
    data = path.with_name(path.name + ".data")
    return (data,) if data.exists() else ()


def _stream(model: Any, file: BinaryIO) -> None:
    """The message of the model, the large weights of its graph behind all else in it."""
    import onnx
    import onnx_ir

    held = dict(model.graph.initializers)
    large = {name: value.const_value for name, value in held.items() if value.const_value.nbytes >= LARGE
             and isinstance(value.const_value, (onnx_ir.Tensor, onnx_ir.LazyTensor))}
    for name in large:
        del model.graph.initializers[name]
    whole = onnx_ir.to_proto(model)
    model.graph.initializers.clear()
    model.graph.initializers.update(held)
    graph = whole.graph.SerializeToString()
    whole.ClearField("graph")
    heads = [_head(name, tensor) for name, tensor in large.items()]
    sizes = [len(head) + tensor.nbytes for head, tensor in zip(heads, large.values(), strict=True)]
    openings = [_opening(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, size) for size in sizes]
    file.write(whole.SerializeToString())
    file.write(_opening(onnx.ModelProto.GRAPH_FIELD_NUMBER, len(graph) + sum(map(len, openings)) + sum(sizes)))
    file.write(graph)
    for opening, head, tensor in zip(openings, heads, large.values(), strict=True):
        file.write(opening + head)
        tensor.tofile(file)


def _head(name: str, tensor: Any) -> bytes:
    """The message of a tensor up to the bytes of its numbers."""
    import onnx

    proto = onnx.TensorProto(name=name, data_type=tensor.dtype.value, dims=tensor.shape.numpy())
    return bytes(proto.SerializeToString()) + _opening(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, tensor.nbytes)


def _opening(field: int, size: int) -> bytes:
    """How a field of so many bytes begins: its number, of the kind that says its length (2), and the length, 7 bits a
    byte, the lowest first (protobuf.dev/programming-guides/encoding)."""
    found = bytearray()
    for number in (field << 3 | 2, size):
        while number > 127:
            found.append(number & 127 | 128)
            number >>= 7
        found.append(number)
    return bytes(found)


def _strip(model: Any) -> None:
    """Removes what no runtime reads: stack traces, module paths, documentation, shapes of inner values."""
    for graph in [model.graph, *(f.graph for f in model.functions.values())]:
        graph.metadata_props.clear()
        graph.doc_string = None
        kept = {id(v) for v in [*graph.inputs, *graph.outputs]}
        for value in [*graph.inputs, *graph.initializers.values()]:
            value.metadata_props.clear()
            value.doc_string = None
        for value in graph.initializers.values():
            value.shape = value.type = None
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
                value.doc_string = None
                if id(value) not in kept:
                    value.shape = value.type = None
    model.metadata_props.clear()
    model.doc_string = None
