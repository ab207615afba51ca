"""Blocks: up to four million numbers of one width as few bytes as the methods here make of them, exact both ways.

A number is 1, 2, 4 or 8 bytes, taken as an unsigned integer: the coder knows no dtypes, and gives back every bit.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featherweight.codec import entropy, rows, words
from featherweight.codec.varints import read_varint, varint
from featherweight.errors import FileError
from featherweight.numerics import packing

Numbers = NDArray[Any]
#: numbers to bytes; None where a method does not apply
Write = Callable[[Numbers], bytes | None]
BLOCK = 1 << 22  #: numbers in a block at most: what bounds the memory that a block can ask for
TRIED = 1 << 18  #: numbers by which a method is chosen
WHOLE = 420  #: bytes hold integers of any of 1 to 7 bits
WIDTHS = (1, 2, 4, 8)
SAMPLE = 1 << 16  #: bytes of a sample, of which four tell whether deflating a block is worth its time
#: the share of a block that coding must save: what is nearly noise is kept as it is, which is read forty times faster
WORTH = 1 / 256
RAW, DEFLATED, CODED, PLANES, PALETTE, SPARSE, PACKED, ROWS, PACKED_ROWS, TEXT = range(10)
FIRST = PACKED + 1  #: methods that archives of version 1 know


def encode(numbers: Numbers, bits: int = 8, columns: int = 0) -> tuple[int, bytes]:
    """The method that makes ``numbers`` smallest, and its bytes. bits: below 8, the numbers are bytes that hold whole
    numbers of so many bits. columns: of the matrix that they are; 0 where they are none.

    Of many numbers, the method is chosen by the first ``TRIED`` of them.
    """
    writers = _writers(numbers.itemsize, bits, columns)
    unit = (columns * bits if columns else WHOLE) if bits < 8 else max(columns, 1)
    if numbers.size > max(TRIED, 2 * unit):
        method, _ = _shortest(numbers[:max(TRIED - TRIED % unit, unit)], writers)
        payload = writers[method](numbers)
        if payload is not None and len(payload) <= numbers.nbytes:
            return method, payload
    return _shortest(numbers, writers)


def _shortest(numbers: Numbers, writers: Mapping[int, Write]) -> tuple[int, bytes]:
    made = [(len(payload), method, payload) for method, write in writers.items()
            if method != DEFLATED and (payload := write(numbers)) is not None]
    if DEFLATED in writers and _worth_deflating(numbers, min(made)[0]):
        made.append((len(payload := _deflated(numbers)), DEFLATED, payload))
    length, method, payload = min(made)
    return (method, payload) if length <= _worth(numbers.nbytes) else (RAW, _raw(numbers))


def _worth(length: int) -> float:
    """The bytes that coding may make of ``length`` bytes to be worth the time of decoding them."""
    return length - length * WORTH


def _worth_deflating(numbers: Numbers, best: int) -> bool:
    """Whether deflating, the slowest method, may make fewer bytes than ``best``: of large blocks, samples tell."""
    if numbers.itemsize == 1 or numbers.nbytes <= 4 * SAMPLE:
        return True
    plain = numbers.tobytes()
    length = sum(len(zlib.compress(plain[at:at + SAMPLE], 6)) for at in range(0, len(plain), len(plain) // 4 + 1))
    return length / (4 * SAMPLE) < 1.1 * best / len(plain)


def _writers(width: int, bits: int, columns: int) -> dict[int, Write]:
    """What is tried for numbers of so many bytes, of bits in these, and of matrices."""
    found = {method: write for method, (write, _) in METHODS.items()}
    if bits < 8:
        found[PACKED] = partial(_packed, bits=bits)
        if columns:
            found[PACKED_ROWS] = partial(_packed_rows, bits=bits, columns=columns)
    elif columns and width == 1:
        found[ROWS] = partial(rows.encode, columns=columns)
    return found


def decode(method: int, payload: bytes, count: int, width: int) -> Numbers:
    """The ``count`` numbers of ``width`` bytes that ``encode`` made ``payload`` of. FileError for anything else."""
    if method not in METHODS or width not in WIDTHS or not 0 < count <= BLOCK:
        raise FileError(f"the archive holds a block of method {method}, {count} numbers of {width} bytes; "
                        f"this version knows methods 0..{len(METHODS) - 1} and up to {BLOCK} numbers")
    numbers = METHODS[method][1](payload, count, width)
    if numbers.size != count:
        raise FileError(f"the archive is damaged: a block holds {numbers.size} numbers, not {count}")
    return numbers


def _kind(width: int) -> str:
    return f"<u{width}"


def _raw(numbers: Numbers) -> bytes:
    return numbers.tobytes()


def _read_raw(payload: bytes, count: int, width: int) -> Numbers:
    if len(payload) != count * width:
        raise FileError(f"the archive is damaged: {len(payload)} bytes for {count} numbers of {width}")
    return np.frombuffer(payload, _kind(width))


def _deflated(numbers: Numbers) -> bytes:
    return zlib.compress(numbers.tobytes(), 9 if numbers.itemsize == 1 else 6)


def _read_deflated(payload: bytes, count: int, width: int) -> Numbers:
    reader = zlib.decompressobj()
    try:
        plain = reader.decompress(payload, count * width)
        if not reader.eof:
            plain += reader.decompress(reader.unconsumed_tail, 1)
    except zlib.error as error:
        raise FileError(f"the archive is damaged: {error}") from error
    if not reader.eof:
        raise FileError("the archive is damaged: a deflated block does not end where it claims to")
    return _read_raw(plain, count, width)


def _coded(numbers: Numbers) -> bytes | None:
    return entropy.encode(numbers) if numbers.itemsize == 1 else None


def _read_coded(payload: bytes, count: int, width: int) -> Numbers:
    if width != 1:
        raise FileError("the archive is damaged: coded symbols are bytes")
    return entropy.decode(payload, count)


def _planes(numbers: Numbers) -> bytes | None:
    """Every byte of the numbers by itself, coded where that is shorter. The sign goes last, so that a float's exponent
    fills the top byte: the rest is nearly noise, the exponents are not."""
    width = numbers.itemsize
    if width == 1:
        return None
    turned = np.ascontiguousarray((numbers << 1) | (numbers >> (8 * width - 1))).view(np.uint8).reshape(-1, width)
    out = []
    for plane in turned.T:
        plain = np.ascontiguousarray(plane)
        stream = entropy.encode(plain) if entropy.entropy_bytes(plain) < _worth(plain.size) else plain.tobytes()
        stream = stream if len(stream) <= _worth(plain.size) else plain.tobytes()
        out.append(varint(len(stream)) + stream)
    return b"".join(out)


def _read_planes(payload: bytes, count: int, width: int) -> Numbers:
    turned, at = np.empty((count, width), np.uint8), 0
    for i in range(width):
        length, at = read_varint(payload, at)
        stream, at = payload[at:at + length], at + length
        turned[:, i] = np.frombuffer(stream, np.uint8) if len(stream) == count else entropy.decode(stream, count)
    if at != len(payload):
        raise FileError("the archive is damaged: byte planes do not fill their block")
    numbers = turned.view(_kind(width)).reshape(-1)
    return (numbers >> 1) | (numbers << (8 * width - 1))


def _palette(numbers: Numbers) -> bytes | None:
    """Few different numbers: each once, then which one where."""
    if numbers.itemsize == 1 or np.unique(numbers[:: max(1, numbers.size // 2048)]).size > 256:
        return None
    values, index = np.unique(numbers, return_inverse=True)
    if values.size > 256:
        return None
    return bytes((values.size - 1,)) + values.tobytes() + entropy.encode(index.astype(np.uint8))


def _read_palette(payload: bytes, count: int, width: int) -> Numbers:
    size = payload[0] + 1 if payload else 1
    values = _read_raw(payload[1:1 + size * width], size, width)
    index = entropy.decode(payload[1 + size * width:], count)
    if int(index.max()) >= size:
        raise FileError("the archive is damaged: a palette is too short")
    return values[index]


def _sparse(numbers: Numbers) -> bytes | None:
    """Many zeros, also negative ones: where what is, then the rest as a block of its own."""
    if numbers.itemsize == 1:
        return None
    minus = 1 << 8 * numbers.itemsize - 1  # the sign alone
    places = np.where(numbers == minus, 2, numbers != 0).astype(np.uint8)
    rest = numbers[places == 1]
    if not 0 < rest.size < 0.98 * numbers.size:
        return None
    coded = entropy.encode(places)
    method, payload = _shortest(rest, {m: write for m, (write, _) in METHODS.items() if m != SPARSE})
    return varint(len(coded)) + coded + bytes((method,)) + payload


def _read_sparse(payload: bytes, count: int, width: int) -> Numbers:
    length, at = read_varint(payload, 0)
    places = entropy.decode(payload[at:at + length], count)
    at += length
    method = payload[at] if at < len(payload) else SPARSE
    if int(places.max()) > 2 or method == SPARSE:
        raise FileError("the archive is damaged: a mask of zeros is none")
    numbers = np.zeros(count, _kind(width))
    numbers[places == 1] = decode(method, payload[at + 1:], int((places == 1).sum()), width)
    numbers[places == 2] = 1 << 8 * width - 1
    return numbers


def _packed(numbers: Numbers, bits: int) -> bytes:
    """Bytes that hold integers of ``bits`` bits: these, coded, and the bits that are left."""
    count = numbers.size * 8 // bits
    left = packing.unpack(numbers, 1, numbers.size * 8)[count * bits:]
    return bytes((bits, *packing.pack(left, 1))).ljust(2, b"\0") + entropy.encode(packing.unpack(numbers, bits, count))


def _read_packed(payload: bytes, count: int, width: int) -> Numbers:
    bits = payload[0] if len(payload) > 2 and width == 1 else 0
    if not 0 < bits < 8:
        raise FileError("the archive is damaged: packed numbers have 1 to 7 bits")
    symbols = entropy.decode(payload[2:], count * 8 // bits)
    if int(symbols.max(initial=0)) >> bits:
        raise FileError(f"the archive is damaged: a packed number has more than {bits} bits")
    packed = packing.pack(symbols, bits)
    numbers = np.zeros(count, np.uint8)
    numbers[:packed.size] = packed
    if count * 8 % bits:
        numbers[-1] |= payload[1] << (8 - count * 8 % bits) & 255
    return numbers


def _packed_rows(numbers: Numbers, bits: int, columns: int) -> bytes | None:
    """As ``_packed``, the numbers of whole rows as a matrix; None where what follows the rows is not all zeros."""
    count = numbers.size * 8 // bits // columns * columns
    left = packing.unpack(numbers, 1, numbers.size * 8)[count * bits:]
    if not count or left.any():
        return None
    return bytes((bits,)) + varint(count) + rows.encode(packing.unpack(numbers, bits, count), columns)


def _read_packed_rows(payload: bytes, count: int, width: int) -> Numbers:
    bits = payload[0] if payload and width == 1 else 0
    held, at = read_varint(payload, 1)
    if not 0 < bits < 8 or not 0 < held <= count * 8 // bits:
        raise FileError("the archive is damaged: packed rows do not fill their block")
    symbols = rows.decode(payload[at:], held)
    if int(symbols.max()) >> bits:
        raise FileError(f"the archive is damaged: a packed number has more than {bits} bits")
    packed = packing.pack(symbols, bits)
    numbers = np.zeros(count, np.uint8)
    numbers[:packed.size] = packed
    return numbers


def _read_rows(payload: bytes, count: int, width: int) -> Numbers:
    if width != 1:
        raise FileError("the archive is damaged: coded symbols are bytes")
    return rows.decode(payload, count)


def _read_text(payload: bytes, count: int, width: int) -> Numbers:
    return _read_raw(words.read(payload, count * width), count, width)


def _unwritten(numbers: Numbers) -> bytes | None:
    """Written only where more is known of the numbers."""
    return None


#: method -> (numbers to bytes; bytes back to numbers)
METHODS: dict[int, tuple[Write, Callable[[bytes, int, int], Numbers]]] = {
    RAW: (_raw, _read_raw),
    DEFLATED: (_deflated, _read_deflated),
    CODED: (_coded, _read_coded),
    PLANES: (_planes, _read_planes),
    PALETTE: (_palette, _read_palette),
    SPARSE: (_sparse, _read_sparse),
    PACKED: (_unwritten, _read_packed),
    ROWS: (_unwritten, _read_rows),
    PACKED_ROWS: (_unwritten, _read_packed_rows),
    TEXT: (lambda numbers: words.write(numbers.tobytes()) if numbers.itemsize == 1 else None, _read_text),
}
