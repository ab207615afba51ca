"""Where the tensors of an ONNX file lie, by the fields of its protocol buffer alone: neither onnx nor protobuf is
needed, and nothing is copied.

Numbers of fields are those of onnx.proto: a model has a graph (7), a graph nodes (1) and initializers (5), a node
attributes (5), these a tensor (5), tensors (10), a graph (6) or graphs (11); a tensor has dims (1), a type (2) and its
bytes (9).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap

Bytes = bytes | mmap
#: type as TensorProto numbers it -> (bytes a number, bits)
WIDTHS = {1: (4, 8), 2: (1, 8), 3: (1, 8), 4: (2, 8), 5: (2, 8), 6: (4, 8), 7: (8, 8), 9: (1, 8), 10: (2, 8),
          11: (8, 8), 12: (4, 8), 13: (8, 8), 16: (2, 8), 21: (1, 4), 22: (1, 4), 25: (1, 2), 26: (1, 2)}
GRAPH, NODE, INITIALIZER, ATTRIBUTE = 7, 1, 5, 5
TENSORS, GRAPHS = (5, 10), (6, 11)
DIMS, TYPE, RAW = 1, 2, 9
DEPTH = 32  #: of graphs in attributes of nodes


@dataclass(frozen=True)
class RawTensor:
    """Bytes start..end: numbers of ``width`` bytes, or of ``bits`` in bytes; columns: of the matrix [first axis,
    rest]."""

    start: int
    end: int
    width: int
    bits: int
    columns: int


@dataclass(frozen=True)
class ProtoField:
    """One field: its number, the number that it holds, and where its bytes lie (start = end: it holds a number)."""

    number: int
    value: int
    start: int
    end: int


def fields(data: Bytes, start: int, end: int) -> Iterator[ProtoField]:
    """The fields of a message. ValueError where it is none."""
    at = start
    while at < end:
        key, at = _varint(data, at, end)
        value, length, wire = 0, 0, key & 7
        if wire == 0:
            value, at = _varint(data, at, end)
        elif wire == 2:
            length, at = _varint(data, at, end)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"there is no field at byte {at}")
        if not key >> 3 or length > end - at:
            raise ValueError(f"a field at byte {at} is longer than what holds it")
        yield ProtoField(key >> 3, value, at, at + length)
        at += length


def raw_tensors(data: Bytes) -> list[RawTensor]:
    """The tensors of an ONNX model whose bytes lie in the file. ValueError where this is no ONNX model."""
    graphs = [f for f in fields(data, 0, len(data)) if f.number == GRAPH and f.end > f.start]
    if not graphs:
        raise ValueError("it has no graph")
    return [tensor for graph in graphs for tensor in _in_graph(data, graph, DEPTH)]


def _in_graph(data: Bytes, graph: ProtoField, depth: int) -> Iterator[RawTensor]:
    for part in fields(data, graph.start, graph.end):
        if part.number == INITIALIZER:
            yield from _tensor(data, part)
        elif part.number == NODE and depth:
            for attribute in fields(data, part.start, part.end):
                if attribute.number == ATTRIBUTE:
                    yield from _in_attribute(data, attribute, depth)


def _in_attribute(data: Bytes, attribute: ProtoField, depth: int) -> Iterator[RawTensor]:
    for value in fields(data, attribute.start, attribute.end):
        if value.number in TENSORS:
            yield from _tensor(data, value)
        elif value.number in GRAPHS:
            yield from _in_graph(data, value, depth - 1)


def _tensor(data: Bytes, tensor: ProtoField) -> Iterator[RawTensor]:
    """The tensor, if its bytes lie here and its type is known."""
    shape: list[int] = []
    kind, raw = 0, None
    for part in fields(data, tensor.start, tensor.end):
        if part.number == DIMS and part.end > part.start:
            at = part.start
            while at < part.end:
                size, at = _varint(data, at, part.end)
                shape.append(size)
        elif part.number == DIMS:
            shape.append(part.value)
        elif part.number == TYPE:
            kind = part.value
        elif part.number == RAW:
            raw = part
    if raw is not None and kind in WIDTHS:
        width, bits = WIDTHS[kind]
        count = (raw.end - raw.start) * 8 // bits // (width if bits == 8 else 1)
        fits = len(shape) > 1 and math.prod(shape) in (count, count - count % 8) and count > 0
        yield RawTensor(raw.start, raw.end, width, bits, math.prod(shape[1:]) if fits else 0)


def _varint(data: Bytes, at: int, end: int) -> tuple[int, int]:
    """A number of at most 10 bytes, and where the next thing starts."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        number |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return number, at
    raise ValueError(f"a number at byte {at} has no end")


__all__ = ["ProtoField", "RawTensor", "fields", "raw_tensors"]
