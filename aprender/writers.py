"""The bytes of the files that this package writes: GGUF v3 and APR v2.

Owns both layouts: what stands before the tensors, where each tensor begins, what fills the gaps and what follows.  A layout is made from
names, formats and shapes alone, so that its size is known before anything is written; then the tensors are handed over one at a time, never
together.  Refuses what the container cannot hold (a format, a long name, a value without a type) and tensors of another size than
announced.  Knows no model and opens no file.  Called by convert.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from aprender import _core
from aprender.errors import ArgumentError, FormatError

Bytes = NDArray[np.uint8]

GGUF_ALIGNMENT, APR_ALIGNMENT = 32, 64
GGUF_NAME, APR_NAME = 63, 256
"""Longest name of a tensor in bytes: ggml has room for 64 with a zero at the end, other APR writers cut at 256."""

APR_METADATA = 16 << 20
"""Largest APR metadata in bytes that every reader takes."""

QUANTIZED, HAS_VOCAB, ROW_MAJOR = 0x0020, 0x0200, 0x0400
"""Flags of an APR header."""


@dataclass(frozen=True, slots=True)
class Format:
    """A row of the formats, as far as a writer needs it."""

    name: str
    gguf: int
    block: int
    bytes: int
    apr: int
    packing: str


FORMATS: Mapping[str, Format] = {row[0]: Format(row[0], row[1], row[3], row[4], row[6], row[7]) for row in _core.FORMATS}
"""Every format by its name."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor that is to be written.

    Attributes
    ----------
    name : str
    format : str
        Row of ``_core.FORMATS``.
    shape : tuple of int
        Outermost first, whatever the container wants.
    """

    name: str
    format: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, without what fills the gap after it."""
        its, values = FORMATS[self.format], math.prod(self.shape)
        if its.packing == "WHOLE":
            return 4 + values * its.bytes
        if its.packing == "FLAT":
            return -(-values // its.block) * its.bytes
        return math.prod(self.shape[:-1]) * -(-self.shape[-1] // its.block) * its.bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """A file before its tensors are known.

    Attributes
    ----------
    head : bytes
        Everything before the first tensor.
    tensors : tuple of Tensor
        In the order in which they lie.
    alignment : int
        Each tensor is followed by zeros up to a multiple of it.
    checksum : bool
        The CRC32 of all bytes follows the last of them.
    """

    head: bytes
    tensors: tuple[Tensor, ...]
    alignment: int
    checksum: bool

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.head) + sum(_padded(t.nbytes, self.alignment) for t in self.tensors) + 4 * self.checksum


def _padded(size: int, alignment: int) -> int:
    """The size with what fills the gap up to the next multiple of the alignment."""
    return -(-size // alignment) * alignment


def _filled(data: bytes, alignment: int) -> bytes:
    return data + bytes(_padded(len(data), alignment) - len(data))


def write(out: BinaryIO, layout: Layout, pieces: Iterable[Bytes], told: Callable[[int], None] = lambda _: None) -> None:
    """Write a file, one tensor after the other.

    Parameters
    ----------
    out : binary file
        At its beginning; only written to, never sought in.
    layout : Layout
    pieces : iterable of uint8 arrays
        The bytes of each tensor, in the order of the layout; one is asked for when the one before it is written.
    told : callable, optional
        Is called with the bytes written so far, after each tensor.

    Raises
    ------
    ArgumentError
        A tensor has another size than the layout says, or there are too few or too many.
    OSError
    """
    crc = at = 0

    def put(data: Any) -> None:
        nonlocal crc, at
        out.write(data)
        if layout.checksum:
            crc = zlib.crc32(data, crc)
        at += len(data)

    put(layout.head)
    for tensor, piece in zip(layout.tensors, pieces, strict=True):
        flat = np.ascontiguousarray(piece, dtype=np.uint8).reshape(-1)
        if flat.size != tensor.nbytes:
            raise ArgumentError(f"{tensor.name}: {flat.size} bytes given, {tensor.nbytes} announced", code="SIZE", field=tensor.name)
        put(flat.data)
        put(bytes(_padded(at, layout.alignment) - at))
        told(at)
    if layout.checksum:
        out.write(struct.pack("<I", crc))


def _format(tensor: Tensor, container: str) -> int:
    """The container's number of a tensor's format; ArgumentError if it has none or cannot hold such rows."""
    its = FORMATS[tensor.format]
    number = its.gguf if container == "gguf" else its.apr
    if number < 0:
        raise ArgumentError(f"{tensor.name}: {container} has no format {tensor.format}", code="UNSUPPORTED", field=tensor.name)
    if container == "gguf" and tensor.shape[-1] % its.block:
        raise ArgumentError(
            f"{tensor.name}: rows of {tensor.shape[-1]} values, GGUF stores {its.name} in whole blocks of {its.block}",
            code="BLOCK", field=tensor.name,
        )  # fmt: skip
    return number


def _name(name: str, longest: int) -> bytes:
    """A tensor's name in UTF-8."""
    data = _utf8(name, name)
    if not 0 < len(data) <= longest:
        raise ArgumentError(f"tensor '{name}': a name of {len(data)} bytes, 1..{longest} are possible", code="NAME", field=name)
    return data


def _utf8(text: str, field: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(f"{field}: not Unicode at character {error.start}", code="UTF8", field=field) from None


# ---- GGUF --------------------------------------------------------------------------------------------------------------------------------

_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS = {
    "uint8": (0, "B"), "int8": (1, "b"), "uint16": (2, "H"), "int16": (3, "h"), "uint32": (4, "I"), "int32": (5, "i"),
    "float32": (6, "f"), "uint64": (10, "Q"), "int64": (11, "q"), "float64": (12, "d"),
}  # fmt: skip


def gguf_layout(metadata: Mapping[str, Any], tensors: Sequence[Tensor]) -> Layout:
    """A GGUF of version 3.

    Parameters
    ----------
    metadata : mapping
        In the order given.  A Python int becomes uint32 (int32 if negative, 64 bits if it must be), a float float32, a NumPy scalar or
        array keeps its type; lists are of strings or of integers (int32).
    tensors : sequence of Tensor

    Raises
    ------
    ArgumentError
        A value, a name or a format that GGUF cannot hold.
    """
    infos, at = [], 0
    for tensor in tensors:
        dims = tensor.shape[::-1]
        infos.append(_gguf_text(_name(tensor.name, GGUF_NAME)) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
        infos.append(struct.pack("<IQ", _format(tensor, "gguf"), at))
        at += _padded(tensor.nbytes, GGUF_ALIGNMENT)
    pairs = [_gguf_text(_utf8(key, key)) + _gguf_value(key, value) for key, value in metadata.items()]
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(pairs)) + b"".join([*pairs, *infos])
    return Layout(_filled(head, GGUF_ALIGNMENT), tuple(tensors), GGUF_ALIGNMENT, checksum=False)


def _gguf_text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def _gguf_value(key: str, value: Any) -> bytes:
    """Type and value of one key."""
    if isinstance(value, bool):
        return struct.pack("<IB", _BOOL, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _gguf_text(_utf8(value, key))
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(_gguf_text(_utf8(word, key)) for word in value)
    array = _gguf_numbers(key, value)
    number, letter = _NUMBERS[array.dtype.name]
    if array.ndim == 0:
        return struct.pack(f"<I{letter}", number, array.item())
    return struct.pack("<IIQ", _ARRAY, number, array.size) + array.astype(array.dtype.newbyteorder("<")).tobytes()


def _gguf_numbers(key: str, value: Any) -> NDArray[Any]:
    """One number or several with the type that the file shall have."""
    if isinstance(value, int) and not isinstance(value, np.generic):
        fits = [name for name in ("uint32", "int32", "uint64", "int64") if np.iinfo(name).min <= value <= np.iinfo(name).max]
        if fits:
            return np.array(value, fits[0])
    elif isinstance(value, float) and not isinstance(value, np.generic):
        return np.array(value, np.float32)
    elif isinstance(value, list) and all(isinstance(item, int) and -(1 << 31) <= item < 1 << 31 for item in value):
        return np.array(value, np.int32)
    elif isinstance(value, np.generic | np.ndarray) and value.dtype.name in _NUMBERS and value.ndim < 2:
        return np.asarray(value)
    raise ArgumentError(f"{key}: GGUF has no type for {type(value).__name__} {value!r:.60}", code="TYPE", field=key)


# ---- APR ---------------------------------------------------------------------------------------------------------------------------------


def apr_layout(metadata: Mapping[str, Any], tensors: Sequence[Tensor]) -> Layout:
    """An APR of version 2: header, metadata, index, tensors, checksum.

    Parameters
    ----------
    metadata : mapping
        A JSON object.
    tensors : sequence of Tensor
        They lie in this order; the index is sorted by name, as readers demand.

    Raises
    ------
    ArgumentError
        A value that JSON does not have, or a name or a format that APR does not have.
    FormatError
        Code LIMIT: more metadata than readers take.
    """
    text = _apr_json(metadata)
    entries, at = [], 0
    for tensor in tensors:
        name = _name(tensor.name, APR_NAME)
        shape = struct.pack(f"<BB{len(tensor.shape)}Q", _format(tensor, "apr"), len(tensor.shape), *tensor.shape)
        entries.append((name, struct.pack("<H", len(name)) + name + shape + struct.pack("<QQ", at, tensor.nbytes)))
        at += _padded(tensor.nbytes, APR_ALIGNMENT)
    body = _filled(text, APR_ALIGNMENT)
    index = _filled(b"".join(entry for _, entry in sorted(entries)), APR_ALIGNMENT)
    flags = ROW_MAJOR | HAS_VOCAB * ("tokenizer.vocabulary" in metadata) | QUANTIZED * any(_quantized(t) for t in tensors)
    start = struct.pack("<4sBBHIQIQQ", b"APR\0", 2, 0, flags, len(tensors), 64, len(text), 64 + len(body), 64 + len(body) + len(index))
    rest = bytes(20)
    head = start + struct.pack("<I", zlib.crc32(start + rest)) + rest  # the checksum's own field is left out, not zeroed
    return Layout(head + body + index, tuple(tensors), APR_ALIGNMENT, checksum=True)


def _quantized(tensor: Tensor) -> bool:
    its = FORMATS[tensor.format]
    return its.block > 1 or its.packing != "ROWS"


def _apr_json(metadata: Mapping[str, Any]) -> bytes:
    """The metadata as one line of JSON."""
    try:
        text = json.dumps(dict(metadata), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"metadata: {error}", code="TYPE", field="metadata") from None
    data = _utf8(text, "metadata")
    if len(data) > APR_METADATA:
        raise FormatError(
            f"metadata of {len(data):,} bytes: readers of APR take {APR_METADATA:,} (a tokenizer this large goes into a GGUF)",
            code="LIMIT", field="metadata",
        )  # fmt: skip
    return data
