"""A reader of APR files that shares no code with the package: struct, json and zlib.

Owns :func:`read`, which checks every rule of the layout on the way (checksums, offsets, padding, order) and fails by assertion.  Decodes no
format.  Called by the tests of what writes APR.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from typing import Any

ROW_MAJOR, HAS_VOCAB, QUANTIZED = 0x0400, 0x0200, 0x0020


@dataclass(frozen=True)
class Entry:
    """A tensor: dtype byte, shape, bytes, and where they begin in the file."""

    dtype: int
    shape: tuple[int, ...]
    data: bytes
    offset: int


@dataclass(frozen=True)
class Apr:
    """A whole file."""

    flags: int
    metadata: dict[str, Any]
    tensors: dict[str, Entry]


def align(n: int) -> int:
    return (n + 63) // 64 * 64


def read(data: bytes) -> Apr:
    """Parse and check the bytes of a file."""
    magic, major, minor, flags, count, meta_at, meta_n, index_at, data_at, crc = struct.unpack_from("<4sBBHIQIQQI", data)
    assert (magic, major, minor) == (b"APR\0", 2, 0)
    assert data[44:64] == bytes(20)
    assert crc == zlib.crc32(data[:40] + data[44:64])
    assert meta_at == 64
    assert index_at == 64 + align(meta_n)
    assert data[64 + meta_n : index_at] == bytes(index_at - 64 - meta_n)
    assert struct.unpack("<I", data[-4:])[0] == zlib.crc32(data[:-4])
    tensors, end = _index(data, count, index_at, data_at)
    assert data_at == align(end)
    assert data[end:data_at] == bytes(data_at - end)
    _check_places(data, tensors, data_at)
    return Apr(flags, json.loads(data[64 : 64 + meta_n], object_pairs_hook=_once), tensors)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """No key twice: readers refuse that."""
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def _index(data: bytes, count: int, at: int, data_at: int) -> tuple[dict[str, Entry], int]:
    tensors: dict[str, Entry] = {}
    names = []
    for _ in range(count):
        (length,) = struct.unpack_from("<H", data, at)
        name = data[at + 2 : at + 2 + length]
        dtype, nd = struct.unpack_from("<BB", data, at + 2 + length)
        *shape, offset, size = struct.unpack_from(f"<{nd}QQQ", data, at + 4 + length)
        start = data_at + offset
        assert start + size <= len(data) - 4
        tensors[name.decode()] = Entry(dtype, tuple(shape), data[start : start + size], start)
        names.append(name)
        at += 4 + length + 8 * nd + 16
    assert names == sorted(set(names))
    return tensors, at


def _check_places(data: bytes, tensors: dict[str, Entry], data_at: int) -> None:
    """Tensors lie one after the other, each on a multiple of 64, zeros between, and nothing else before the footer."""
    at = data_at
    for entry in sorted(tensors.values(), key=lambda entry: entry.offset):
        assert entry.offset == at
        assert entry.offset % 64 == 0
        at = align(entry.offset + len(entry.data))
        filling = data[entry.offset + len(entry.data) : at]
        assert filling == bytes(len(filling))
    assert at == len(data) - 4
