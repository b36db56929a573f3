"""Floor 2: no file can do more than raise FormatError.

The corpus is made here, byte by byte, from a small valid GGUF and a small valid safetensors file; each row says which code the error has,
or that the file is fine, which guards against refusing too much.  Then every cut and every flipped byte: nothing but the documented
errors may come out.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import CANARY, blob, safetensors_bytes, write_folder

from aprender import _core
from aprender.errors import ConfigError, Error, FormatError, UnknownName

U64, I64_MAX = 1 << 64, (1 << 63) - 1
CODES = {code for _, code, kind in _core.ERRORS if kind == "FormatError"}


def opened(folder: Path, data: bytes, name: str = "file") -> _core.File:
    path = folder / name
    path.write_bytes(data)
    return _core.File(path)


def code_of(folder: Path, data: bytes, name: str = "file") -> str:
    """The code of the error, or "OK".  Anything else than a FormatError comes through and fails the test."""
    try:
        file = opened(folder, data, name)
    except FormatError as problem:
        lines, length = str(problem).splitlines(), len(str(problem))
        assert (problem.path, len(lines), problem.code in CODES) == (str(folder / name), 1, True)  # noqa: PT017
        assert length < 900  # at most 128 bytes of the file, escaped
        return str(problem.code)
    for info in file.tensors:  # whatever opened can be read
        assert file.raw(info.name).nbytes == info.nbytes
    assert len(file.metadata) == len(file.keys)
    return "OK"


# ---- GGUF: the parts -------------------------------------------------------------------------------------------------


def text(value: bytes | str) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def pair(key: bytes | str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def u32(key: bytes | str, value: int) -> bytes:
    return pair(key, 4, struct.pack("<I", value))


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


@dataclass(frozen=True)
class Info:
    """A tensor's entry; `dims` innermost first, as GGUF has them."""

    name: bytes | str
    dims: tuple[int, ...]
    kind: int
    offset: int
    rank: int | None = None

    def __bytes__(self) -> bytes:
        rank = len(self.dims) if self.rank is None else self.rank
        return text(self.name) + struct.pack(f"<I{len(self.dims)}QIQ", rank, *self.dims, self.kind, self.offset)


@dataclass(frozen=True)
class Gguf:
    """A file to be spoilt.  As it stands it is valid: three keys; F32 [4], F32 [2, 3], Q4_K [256]."""

    magic: bytes = b"GGUF"
    version: bytes = struct.pack("<I", 3)
    pairs: tuple[bytes, ...] = (
        pair("general.architecture", 8, text("llama")),
        u32("a.number", 7),
        pair("a.list", 9, array(4, 2, bytes(8))),
    )
    infos: tuple[Info, ...] = (Info("a", (4,), 0, 0), Info("b", (3, 2), 0, 32), Info("c", (256,), 12, 64))
    data: bytes = field(default=bytes(range(16)) + bytes(16) + bytes(range(24)) + bytes(8) + bytes(144))
    tensors: int | None = None
    keys: int | None = None
    align: int = 32

    def __bytes__(self) -> bytes:
        head = self.magic + self.version
        head += struct.pack(
            "<QQ", len(self.infos) if self.tensors is None else self.tensors, len(self.pairs) if self.keys is None else self.keys
        )
        head += b"".join(self.pairs) + b"".join(bytes(info) for info in self.infos)
        return head + bytes(-len(head) % self.align if self.data else 0) + self.data

    def with_pairs(self, *more: bytes) -> Gguf:
        return replace(self, pairs=(*self.pairs, *more))

    def with_only(self, *infos: Info, data: bytes = b"") -> Gguf:
        return replace(self, infos=infos, data=data)


BG = Gguf()
WHOLE = bytes(BG)
LEFT = len(WHOLE) - 24  # bytes after the header
AFTER_PAIRS = len(bytes(BG)) - 24 - sum(map(len, BG.pairs))


def gguf_cases() -> Iterator[tuple[str, bytes, str]]:
    yield "valid", WHOLE, "OK"
    yield "valid version 2", bytes(replace(BG, version=struct.pack("<I", 2))), "OK"
    yield "G02 magic only", WHOLE[:4], "TRUNCATED"
    yield "G03 short header", WHOLE[:23], "TRUNCATED"
    yield "G04 magic", b"FUGG" + WHOLE[4:], "BAD_MAGIC"
    for old in (b"lmgg", b"tjgg", b"fmgg"):
        yield f"G05 {old!r}", old + WHOLE[4:], "BAD_MAGIC"
    for number in (0, 1, 4, 0xFFFFFFFF):
        yield f"G06 version {number}", bytes(replace(BG, version=struct.pack("<I", number))), "BAD_VERSION"
    yield "G08 big-endian", bytes(replace(BG, version=b"\0\0\0\x03")), "BAD_ENDIAN"
    for count in (U64 - 1, 1 << 63, *(U64 // entry + 1 for entry in (48, 64, 72, 368)), LEFT // 25 + 1):
        yield f"G09 {count} tensors", bytes(replace(BG, tensors=count)), "COUNT"
    for count in (U64 - 1, 1 << 63, *(U64 // entry + 1 for entry in (48, 64, 72, 368)), LEFT // 14 + 1):
        yield f"G12 {count} keys", bytes(replace(BG, keys=count)), "COUNT"
    yield "G13 one tensor more", bytes(replace(BG, tensors=4)), "NAME"  # the padding reads as an empty name
    yield "G14 one key fewer", bytes(replace(BG, keys=2)), "SHAPE"  # "a.list" reads as a tensor of 9 dimensions
    yield from gguf_key_cases()
    yield from gguf_tensor_cases()
    yield from gguf_data_cases()


def gguf_key_cases() -> Iterator[tuple[str, bytes, str]]:
    for length in (U64 - 1, U64 - 8):
        yield f"G15 key of {length}", bytes(BG.with_pairs(struct.pack("<Q", length) + b"k" + bytes(12))), "STRING"
    yield "G16 long key", bytes(BG.with_pairs(u32("k" * 65536, 1))), "NAME"
    yield "G16 longest key", bytes(BG.with_pairs(u32("k" * 65535, 1))), "OK"
    yield "G17 empty key", bytes(BG.with_pairs(u32("", 1))), "NAME"
    for letter in ("\0", "\n", "\x1b[31m", "\x7f", "\x85"):
        yield f"G18 key with {letter!r}", bytes(BG.with_pairs(u32(f"k{letter}", 1))), "NAME"
    yield "G19 key not UTF-8", bytes(BG.with_pairs(u32(b"k\xff", 1))), "UTF8"
    yield "G20 key twice, same value", bytes(BG.with_pairs(u32("a.number", 7))), "DUPLICATE"
    yield "G20 key twice, other value", bytes(BG.with_pairs(u32("a.number", 8))), "DUPLICATE"
    for kind in (13, 255, 1 << 31, 0xFFFFFFFF):
        yield f"G23 type {kind}", bytes(BG.with_pairs(pair("k", kind, bytes(8)))), "TYPE"
    yield "G24 bool 2", bytes(BG.with_pairs(pair("k", 7, b"\2"))), "VALUE"
    yield "G24 bool 1", bytes(BG.with_pairs(pair("k", 7, b"\1"))), "OK"
    yield "G24 bool 3 in an array", bytes(BG.with_pairs(pair("k", 9, array(7, 2, b"\1\3")))), "VALUE"
    yield "G25 string of 2^64-1", bytes(BG.with_pairs(pair("k", 8, struct.pack("<Q", U64 - 1)))), "STRING"
    yield "G25 string beyond the end", bytes(replace(BG.with_pairs(pair("k", 8, struct.pack("<Q", 1 << 20))), infos=(), data=b"")), "STRING"
    for bad in (b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xff", b"\xe2\x82"):
        yield f"G26 string {bad!r}", bytes(BG.with_pairs(pair("k", 8, text(bad)))), "UTF8"
        yield f"G26 strings {bad!r}", bytes(BG.with_pairs(pair("k", 9, array(8, 1, text(bad))))), "UTF8"
    yield "G27 array of 2^64-1 bytes", bytes(BG.with_pairs(pair("k", 9, array(0, U64 - 1)))), "COUNT"
    yield "G27 array that wraps", bytes(BG.with_pairs(pair("k", 9, array(10, (1 << 61) + 1)))), "COUNT"
    yield "G28 strings that wrap", bytes(BG.with_pairs(pair("k", 9, array(8, 1 << 61)))), "COUNT"
    for kind in (13, 255):
        yield f"G29 elements of type {kind}", bytes(BG.with_pairs(pair("k", 9, array(kind, 1, bytes(8))))), "TYPE"
        yield f"G29 none of type {kind}", bytes(BG.with_pairs(pair("k", 9, array(kind, 0)))), "TYPE"
    yield "G30 array of arrays", bytes(BG.with_pairs(pair("k", 9, array(9, 1, array(4, 1, bytes(4)))))), "UNSUPPORTED"
    yield "G30 100000 arrays deep", bytes(BG.with_pairs(pair("k", 9, array(9, 1) * 100000))), "UNSUPPORTED"
    for value in (0, 3, 13, 131072, 1 << 31):
        yield f"G31 alignment {value}", bytes(BG.with_pairs(u32("general.alignment", value))), "ALIGN"
    for kind, value in ((5, bytes(4)), (10, bytes(8)), (9, array(4, 1, bytes(4))), (8, text("32"))):
        yield f"G32 alignment of type {kind}", bytes(BG.with_pairs(pair("general.alignment", kind, value))), "KV_TYPE"
    one = replace(BG, align=1).with_pairs(u32("general.alignment", 1))
    yield "G33 alignment 1", bytes(one.with_only(Info("a", (1,), 0, 0), Info("b", (1,), 0, 4), data=bytes(8))), "OK"


def gguf_tensor_cases() -> Iterator[tuple[str, bytes, str]]:
    def first(**changes: Any) -> bytes:
        return bytes(replace(BG, infos=(replace(BG.infos[0], **changes), *BG.infos[1:])))

    yield "G34 name of 2^64-1", WHOLE.replace(bytes(BG.infos[0]), struct.pack("<Q", U64 - 1) + bytes(BG.infos[0])[8:]), "STRING"
    yield "G34 name of 65", first(name="n" * 65), "NAME"
    yield "G34 name of 64", first(name="n" * 64), "OK"
    yield "G34 no name", first(name=""), "NAME"
    yield "G35 NUL in a name", first(name="b\0c"), "NAME"
    yield "G36 same name", first(name="b"), "DUPLICATE"
    for name in ("../../x", "/x", "a/../../b"):
        yield f"G37 {name}", first(name=name), "OK"
    yield "G38 rank 5", first(dims=(4, 1, 1, 1, 1)), "SHAPE"
    yield "G38 rank 2^32-1", first(rank=0xFFFFFFFF), "SHAPE"
    yield "G39 scalar", bytes(BG.with_only(Info("a", (), 0, 0), data=bytes(4))), "OK"
    for dims in ((0,), (4, 0), (4, 1, 1, 0)):
        yield f"G40 {dims}", bytes(BG.with_only(Info("a", dims, 0, 0))), "OK"
    for dim in (U64 - 1, 1 << 63):
        yield f"G41 {dim}", first(dims=(dim,)), "SHAPE"
    wraps = ((1 << 32, 1 << 32), (I64_MAX, 2), (1 << 62, 4), (1 << 32, 1 << 32, 2, 2), (1 << 62,), ((1 << 62) - 1,), (0, I64_MAX, I64_MAX))
    for dims in wraps:
        yield f"G42-45 {dims}", first(dims=dims), "SHAPE"
    yield "G46 Q4_0 that wraps", first(dims=(((U64 // 18) // 32 + 1) * 32,), kind=2), "SHAPE"
    eights = (Info("a", ((1 << 63) - 64,), 24, 0), Info("b", ((1 << 63) - 64,), 24, (1 << 63) - 64))
    yield "G47 sum wraps", bytes(BG.with_only(*eights, data=bytes(64))), "OFFSET"
    yield "G48 Q4_K of 255", bytes(BG.with_only(Info("a", (255,), 12, 0), data=bytes(144))), "BLOCK"
    yield "G48 Q8_0 of 31", bytes(BG.with_only(Info("a", (31,), 8, 0), data=bytes(34))), "BLOCK"
    for kind in (4, 5, 31, 32, 33, 36, 37, 38, 43, 1 << 31, 0xFFFFFFFF):
        yield f"G49 format {kind}", first(kind=kind), "TYPE"
    yield "G51 NVFP4", bytes(BG.with_only(Info("a", (64,), 40, 0), data=bytes(36))), "OK"


def gguf_data_cases() -> Iterator[tuple[str, bytes, str]]:
    a, b, c = BG.infos
    for by in (1, 16):
        yield f"G52 offset +{by}", bytes(replace(BG, infos=(a, replace(b, offset=32 + by), c))), "ALIGN"
    yield "G53 offset wraps", bytes(replace(BG, infos=(a, replace(b, offset=U64 - 32), c))), "OFFSET"
    yield "G54 one byte short", WHOLE[:-1], "OFFSET"
    yield "G54 a GiB short", bytes(replace(BG, infos=(a, b, replace(c, offset=1 << 30)))), "OFFSET"
    yield "G55 same offset", bytes(replace(BG, infos=(a, replace(b, offset=0), c))), "OVERLAP"
    yield "G55 half overlap", bytes(replace(BG, infos=(a, b, replace(c, offset=32)))), "OVERLAP"
    gap = replace(BG, infos=(a, b, replace(c, offset=64 + 4096)), data=BG.data[:64] + bytes(4096) + BG.data[64:])
    yield "G56 gap", bytes(gap), "GAP"
    yield "G57 zip at the end", WHOLE + b"PK\3\4" + bytes(64), "GAP"
    yield "G57 zeros at the end", WHOLE + bytes(-len(WHOLE) % 32 or 32), "OK"
    yield "G57 too many zeros", WHOLE + bytes(33), "GAP"
    yield "G58 no data", bytes(replace(BG, data=b"")), "TRUNCATED"
    yield "G58 no tensors", bytes(BG.with_only()), "OK"
    backwards = (Info("c", (256,), 12, 64), Info("b", (3, 2), 0, 32), Info("a", (4,), 0, 0))
    yield "G60 backwards", bytes(replace(BG, infos=backwards)), "GAP"


@pytest.mark.parametrize(("data", "code"), [pytest.param(data, code, id=name) for name, data, code in gguf_cases()])
def test_gguf(data: bytes, code: str, tmp_path: Path) -> None:
    assert code_of(tmp_path, data) == code


def test_gguf_is_read_right(tmp_path: Path) -> None:
    file = opened(tmp_path, WHOLE)
    assert (file.container, file.version, file.nbytes, file.path) == ("gguf", 3, len(WHOLE), str(tmp_path / "file"))
    assert [(t.name, t.format, t.shape, t.nbytes) for t in file.tensors] == [
        ("a", "F32", (4,), 16),
        ("b", "F32", (2, 3), 24),
        ("c", "Q4_K", (256,), 144),
    ]
    assert all(t.offset % 32 == 0 for t in file.tensors)
    assert file.raw("b").tobytes() == bytes(range(24))
    assert file.dequantize("b").shape == (2, 3)
    assert file.keys == ("general.architecture", "a.number", "a.list")
    assert file.get("a.number") == 7
    assert file.get("nothing") is None
    assert file.get("nothing", 3) == 3
    assert file.get("general.architecture") == "llama"
    np.testing.assert_array_equal(file.get("a.list"), np.zeros(2, np.uint32))
    with pytest.raises(UnknownName, match="no tensor named d"):
        file.raw("d")


#: GGUF type, bytes, value: every kind, at an edge of its range.
SCALARS = [
    (0, b"\xff", 255), (1, b"\x80", -128), (2, b"\xff\xff", 65535), (3, b"\0\x80", -32768), (4, b"\xff" * 4, 0xFFFFFFFF),
    (5, b"\0\0\0\x80", -(1 << 31)), (6, struct.pack("<f", 0.1), float(np.float32(0.1))), (7, b"\1", True), (8, text("ä"), "ä"),
    (10, b"\xff" * 8, U64 - 1), (11, b"\0" * 7 + b"\x80", -(1 << 63)), (12, struct.pack("<d", 0.1), 0.1),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "data", "value"), SCALARS)
def test_gguf_values(kind: int, data: bytes, value: object, tmp_path: Path) -> None:
    file = opened(
        tmp_path, bytes(BG.with_pairs(pair("k", kind, data), pair("list", 9, array(kind, 3, data * 3)), pair("none", 9, array(kind, 0))))
    )
    assert file.get("k") == value
    assert type(file.get("k")) is type(value)
    assert list(file.get("list")) == [value] * 3
    assert len(file.get("none")) == 0


# ---- safetensors -----------------------------------------------------------------------------------------------------


def framed(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    header = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(shape: str = "[4]", offsets: str = "[0,16]", dtype: str = '"F32"') -> str:
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}'


def one(shape: str = "[4]", offsets: str = "[0,16]", dtype: str = '"F32"', size: int = 16) -> bytes:
    return framed(f'{{"t":{entry(shape, offsets, dtype)}}}', bytes(size))


def two(first: str, second: str, size: int = 32) -> bytes:
    return framed(f'{{"a":{first},"b":{second}}}', bytes(size))


BS = two(entry(), entry("[2,2]", "[16,32]"))
HEADER = BS[8:-32].decode()


def safetensors_cases() -> Iterator[tuple[str, bytes, str]]:
    yield "valid", BS, "OK"
    yield "S02 no header", framed("", bytes(16)), "JSON"
    for length in (U64 - 1, 1 << 63, 100_000_001):
        yield f"S03 header of {length}", framed(HEADER, bytes(32), length), "LIMIT"
    yield "S04 header beyond the end", framed(HEADER, b"", len(HEADER) + 1), "TRUNCATED"
    yield "S05 blank in front", framed(" " + HEADER, bytes(32)), "JSON"
    yield "S05 byte order mark", framed("\ufeff" + HEADER, bytes(32)), "JSON"
    yield "S06 blanks at the end", framed(HEADER + "   ", bytes(32)), "OK"
    yield "S06 NUL at the end", framed(HEADER + "\0", bytes(32)), "JSON"
    yield "S06 newline at the end", framed(HEADER + "\n", bytes(32)), "JSON"
    yield "S07 0xFF in a name", framed(HEADER.encode().replace(b'"a"', b'"\xff"'), bytes(32)), "UTF8"
    yield "S07 half a pair", framed(HEADER.replace('"a"', '"\\ud800"'), bytes(32)), "UTF8"
    yield "S09 deep", framed("[" * 100000), "DEPTH"
    yield "S09 deep in an entry", framed('{"a":' + "[" * 100000), "DEPTH"
    yield "S10 name twice", framed(f'{{"a":{entry()},"a":{entry()}}}', bytes(16)), "DUPLICATE"
    yield "S11 name twice, escaped", framed(f'{{"a":{entry()},"\\u0061":{entry()}}}', bytes(16)), "DUPLICATE"
    yield "S12 dtype twice", framed('{"a":{"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]}}', bytes(16)), "DUPLICATE"
    for value in ("7", '{"k":1}', '{"k":["v"]}', "[]", '{"k":null}', '"text"'):
        yield f"S13 metadata {value}", framed(f'{{"__metadata__":{value},"a":{entry()}}}', bytes(16)), "JSON"
    yield "S13 good metadata", framed(f'{{"__metadata__":{{"k":"v"}},"a":{entry()}}}', bytes(16)), "OK"
    yield "S14 metadata twice", framed(f'{{"__metadata__":{{}},"__metadata__":{{}},"a":{entry()}}}', bytes(16)), "DUPLICATE"
    yield "S14 key twice in metadata", framed(f'{{"__metadata__":{{"k":"v","\\u006b":"v"}},"a":{entry()}}}', bytes(16)), "DUPLICATE"
    for dtype in ('"F99"', '"f32"', "7", '""'):
        yield f"S15 dtype {dtype}", one(dtype=dtype), "TYPE"
    yield "S16 no shape", framed('{"a":{"dtype":"F32","data_offsets":[0,16]}}', bytes(16)), "JSON"
    yield "S16 no offsets", framed('{"a":{"dtype":"F32","shape":[4]}}', bytes(16)), "JSON"
    yield "S16 another field", framed('{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16],"x":1}}', bytes(16)), "JSON"
    yield "S17 offsets backwards", one(offsets="[16,0]"), "OFFSET"
    for offsets in ("[0,8,16]", "[-1,16]", "[1.5,16]", "[0,1e3]", '["0",16]', "[0]", "7", "[0,[16]]"):
        yield f"S17 offsets {offsets}", one(offsets=offsets), "JSON"
    yield "S18 past the end", one(offsets="[0,17]"), "OFFSET"
    yield "S18 far past the end", one("[4611686018427387903]", f"[0,{U64 - 1}]"), "SHAPE"
    same = ",".join(f'"t{i}":{entry()}' for i in range(10))
    yield "S19 same range", framed("{" + same + "}", bytes(16)), "OVERLAP"
    yield "S20 half overlap", two(entry(), entry("[4]", "[4,20]"), 20), "OVERLAP"
    yield "S21 hole", two(entry(), entry("[4]", "[20,36]"), 36), "GAP"
    yield "S21 hole in front", one(offsets="[4,20]", size=20), "GAP"
    yield "S22 bytes at the end", BS + b"\0", "GAP"
    for shape in ("[4294967296,4294967296]", "[0,9223372036854775808,9223372036854775808]", "[0,4611686018427387904,4]", f"[{1 << 62}]"):
        yield f"S23 shape {shape}", one(shape), "SHAPE"
    yield "S24 one byte short", one(offsets="[0,15]", size=15), "SIZE"
    yield "S24 twice the size", one(offsets="[0,32]", size=32), "SIZE"
    for dtype in ('"F4"', '"F6_E2M3"', '"F6_E3M2"'):
        yield f"S25 {dtype}", one("[3]", "[0,2]", dtype, 2), "UNSUPPORTED"
    for number in ("18446744073709551616", "1e2", "00", "-0", "0x10", "1.0", "+4", ".5", "NaN", "true", "null"):
        yield f"S26 shape [{number}]", one(f"[{number}]"), "JSON"
    for pad in (1, 2, 4):
        head = f'{{"t":{entry()}}}'
        yield f"S27 data at 8k+{pad}", framed(head + " " * ((pad - len(head)) % 8), bytes(16)), "OK"
    yield (
        "S28 empty and scalar",
        framed(f'{{"a":{entry("[0]", "[0,0]")},"b":{entry("[3,0]", "[0,0]")},"c":{entry("[]", "[0,4]")}}}', bytes(4)),
        "OK",
    )
    yield "S28 no tensors", framed("{}"), "OK"
    for rank in (9, 33, 1000):
        yield f"S29 rank {rank}", one("[" + ",".join(["1"] * rank) + "]", "[0,4]", size=4), "SHAPE"
    yield "S29 rank 8", one("[1,1,1,1,1,1,1,4]"), "OK"
    for name in ("", "x" * 256, "x" * 1_000_000, "\\u0000", "a\\nb", "\\u001b[31m"):
        yield f"S31 name {name[:12]!r} of {len(name)}", framed(f'{{"{name}":{entry()}}}', bytes(16)), "NAME"
    yield "S31 name of 255", framed(f'{{"{"x" * 255}":{entry()}}}', bytes(16)), "OK"
    yield "S31 traversal", framed(f'{{"../../x":{entry()}}}', bytes(16)), "OK"
    for broken in (
        "{,}",
        '{"a"}',
        '{"a":}',
        "{}{}",
        '{"a":1,}',
        "{'a':1}",
        '{"a":tru}',
        "\x01{}",
        '{"a":"\\x"}',
        '{"a":"\t"}',
        "{}x",
        "[]",
        "1",
    ):
        yield f"not JSON {broken!r}", framed(broken), "JSON"


@pytest.mark.parametrize(("data", "code"), [pytest.param(data, code, id=name) for name, data, code in safetensors_cases()])
def test_safetensors(data: bytes, code: str, tmp_path: Path) -> None:
    assert code_of(tmp_path, data, "file.safetensors") == code


@pytest.mark.parametrize("size", range(8))
def test_safetensors_of_a_few_bytes(size: int, tmp_path: Path) -> None:
    """S01; without the name to go by the same."""
    assert code_of(tmp_path, bytes(size), "x.safetensors") == code_of(tmp_path, bytes(size), "x") == "TRUNCATED"


def test_safetensors_header_cut_anywhere(tmp_path: Path) -> None:
    """S08: the length says where the header ends, the JSON does not."""
    for n in range(1, len(HEADER)):
        assert code_of(tmp_path, framed(HEADER[:n], bytes(32)), "x.safetensors") == "JSON", HEADER[:n]


def test_safetensors_are_read_right(tmp_path: Path) -> None:
    """S27: data at every place modulo 8; the values by hand, and F16, BF16, F32 hold the same ones."""
    values = np.array([[1.5, -2.0], [0.25, 96.0]], np.float32)
    tensors = {dtype: blob(values, dtype) for dtype in ("F32", "F16", "BF16")} | {"odd": ("U8", (3,), b"abc"), "last": blob(values, "F32")}
    plain = safetensors_bytes(tensors)
    length = struct.unpack("<Q", plain[:8])[0]
    for pad in range(8):
        data = struct.pack("<Q", length + pad) + plain[8 : 8 + length] + b" " * pad + plain[8 + length :]
        file = opened(tmp_path, data, "x.safetensors")
        assert file.container == "safetensors"
        for name in ("F32", "F16", "BF16", "last"):
            np.testing.assert_array_equal(file.dequantize(name), values)
        assert file.raw("odd").tobytes() == b"abc"


# ---- config.json -----------------------------------------------------------------------------------------------------


def config_cases() -> Iterator[tuple[str, str | bytes, str]]:
    yield "empty object", "{}", "OK"
    yield "not an object", "[1]", "JSON"
    yield "empty", "", "JSON"
    yield "cut", '{"a": 1', "JSON"
    yield "trailing comma", '{"a": 1,}', "JSON"
    yield "two objects", "{}{}", "JSON"
    yield "NaN", '{"a": NaN}', "JSON"
    yield "Infinity", '{"a": Infinity}', "JSON"
    yield "beyond float64", '{"a": 1e999}', "JSON"
    yield "key twice", '{"a": 1, "a": 1}', "DUPLICATE"
    yield "key twice, escaped", '{"a": 1, "\\u0061": 2}', "DUPLICATE"
    yield "object twice", '{"a": {"b": 1}, "a": {"c": 1}}', "DUPLICATE"
    yield "dotted key beside the object", '{"a": {"b": 1}, "a.b": 1}', "DUPLICATE"
    yield "deep", '{"a": ' + "[" * 100000, "DEPTH"
    yield "deep objects", '{"a":' * 70 + "1" + "}" * 70, "DEPTH"
    yield "deep but allowed", '{"a":' * 60 + "1" + "}" * 60, "OK"
    yield "byte order mark", "\ufeff{}", "JSON"
    yield "not UTF-8", b'{"a": "\xff"}', "UTF8"
    yield "half a pair", '{"a": "\\ud800"}', "UTF8"
    yield "long key", '{"' + "k" * 256 + '": 1}', "NAME"
    yield "empty key", '{"": 1}', "NAME"
    yield "control in a key", '{"a\\u0000": 1}', "NAME"
    yield "comment", '{"a": 1} // b', "JSON"


@pytest.mark.parametrize(("config", "code"), [pytest.param(config, code, id=name) for name, config, code in config_cases()])
def test_config(config: str | bytes, code: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(config if isinstance(config, bytes) else config.encode())
    assert code_of(tmp_path, BS, "model.safetensors") == code


def test_config_is_flattened(tmp_path: Path) -> None:
    same = {"a": 1, "f": None, "g": [1, {"h": 2}], "i": {}, "j": "ä\n", "k": True, "big": (1 << 64) - 1, "small": -(1 << 63)}
    said = same | {"b": {"c": -2, "d": {"e": 1.5}}}
    (tmp_path / "config.json").write_text(json.dumps(said))
    (tmp_path / "model.safetensors").write_bytes(BS)
    file = _core.File(tmp_path)
    assert file.path == str(tmp_path / "model.safetensors")
    assert file.metadata == same | {"b.c": -2, "b.d.e": 1.5}


# ---- cuts, flips and sizes -------------------------------------------------------------------------------------------

SMALL = tiny.Shape("qwen3", layers=1, dim=8, ffn=12, heads=2, kv_heads=1, head=4, vocab=10, tied=True)


def bound(file: Callable[[], _core.File]) -> str:
    """Open, bind, run two tokens: the code of the first documented error, or "OK"."""
    try:
        model = _core.Model(file())
        _core.Run(model, threads=1).forward([0, 1])
    except (FormatError, ConfigError) as problem:
        return str(problem.code)
    return "OK"


@pytest.mark.parametrize("name", ["x.gguf", "x.safetensors"])
def test_cut_at_every_byte(name: str, tmp_path: Path) -> None:
    whole = WHOLE if name == "x.gguf" else BS
    assert code_of(tmp_path, whole, name) == "OK"
    codes = {code_of(tmp_path, whole[:n], name) for n in range(len(whole))}
    assert "OK" not in codes


@pytest.mark.parametrize("name", ["x.gguf", "x.safetensors"])
def test_flip_every_byte(name: str, tmp_path: Path) -> None:
    whole = WHOLE if name == "x.gguf" else BS
    codes = []
    for at in range(len(whole)):
        for mask in (0xFF, 0x01, 0x80):
            codes.append(code_of(tmp_path, whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :], name))
    assert "OK" in codes  # a changed name or value is a valid file
    assert len(set(codes)) >= 8  # and most kinds of damage have been met


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same small model in both containers."""
    folder = tmp_path_factory.mktemp("small")
    tiny.save_gguf(SMALL, folder / "small.gguf")
    return write_folder(folder, SMALL)


@pytest.mark.parametrize("name", ["small.gguf", "model.safetensors", "config.json"])
def test_flip_every_byte_of_a_model(name: str, small: Path, tmp_path: Path) -> None:
    """Opened, bound and run: whatever passes the checks can be computed."""
    for other in ("model.safetensors", "config.json"):
        (tmp_path / other).write_bytes((small / other).read_bytes())
    whole = (small / name).read_bytes()
    target = tmp_path / name
    source = target if name.endswith(".gguf") else tmp_path
    target.write_bytes(whole)
    assert bound(lambda: _core.File(source)) == "OK"
    codes = set()
    for at in range(len(whole)):
        target.write_bytes(whole[:at] + bytes([whole[at] ^ (0xFF, 0x01, 0x20)[at % 3]]) + whole[at + 1 :])
        codes.add(bound(lambda: _core.File(source)))
    assert {"OK", "MISSING"} <= codes
    assert "CONFIG" in codes or name == "model.safetensors"


@pytest.mark.parametrize("name", ["small.gguf", "config.json"])
def test_cut_a_model_at_every_byte(name: str, small: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((small / "model.safetensors").read_bytes())
    whole = (small / name).read_bytes()
    source = tmp_path / name if name.endswith(".gguf") else tmp_path
    for n in range(len(whole)):
        (tmp_path / name).write_bytes(whole[:n])
        assert bound(lambda: _core.File(source)) != "OK"


def quickly(seconds: float, folder: Path, data: bytes, name: str) -> None:
    start = time.perf_counter()
    assert code_of(folder, data, name) == "OK"
    assert time.perf_counter() - start < seconds


def test_many_keys(tmp_path: Path) -> None:
    """G21: 200 000 keys in under a second on an idle machine (0.3 s measured); what is quadratic takes minutes."""
    pairs = tuple(u32(f"key.{i}", i) for i in range(200_000))
    quickly(10, tmp_path, bytes(replace(BG, pairs=pairs)), "x.gguf")


def test_many_tensors(tmp_path: Path) -> None:
    """S30: 100 000 empty tensors, likewise."""
    header = "{" + ",".join(f'"t{i}":{entry("[0]", "[0,0]")}' for i in range(100_000)) + "}"
    quickly(10, tmp_path, framed(header), "x.safetensors")


# ---- what is not a file of ours --------------------------------------------------------------------------------------


def test_empty(tmp_path: Path) -> None:
    assert code_of(tmp_path, b"") == code_of(tmp_path, b"", "x.gguf") == "TRUNCATED"


def test_unknown_bytes(tmp_path: Path) -> None:
    assert code_of(tmp_path, b"no model at all") == "BAD_MAGIC"
    with pytest.raises(FormatError, match="git lfs pull"):
        opened(tmp_path, b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "x.gguf")


def test_special_files(tmp_path: Path) -> None:
    """A FIFO must not hang, a device must not fill the memory."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(FormatError) as caught:
            _core.File(path)
        assert caught.value.code == "NOT_REGULAR"


def test_operating_system_errors(tmp_path: Path) -> None:
    for path, number in ((tmp_path / "none", errno.ENOENT), (tmp_path, errno.ENOENT), (CANARY / "canary.gguf" / "x", errno.ENOTDIR)):
        with pytest.raises(OSError) as caught:
            _core.File(path)
        assert caught.value.errno == number
        assert not isinstance(caught.value, Error)
    with pytest.raises(FileNotFoundError):
        _core.File(tmp_path / "none")
    with pytest.raises(ValueError, match="null"):
        _core.File("a\0b")


def test_names_of_any_kind(tmp_path: Path) -> None:
    """A path may be bytes, a Path, hold blanks, and not be UTF-8; a link to a model is a model."""
    odd = os.fsencode(tmp_path) + b"/a \xff.gguf"
    Path(os.fsdecode(odd)).write_bytes(WHOLE)
    assert len(_core.File(odd).tensors) == len(_core.File(os.fsdecode(odd)).tensors) == 3
    assert os.fsencode(_core.File(odd).path) == odd
    (tmp_path / "link").symlink_to(os.fsdecode(odd))
    assert len(_core.File(tmp_path / "link").tensors) == 3


def test_message_escapes_what_it_quotes(tmp_path: Path) -> None:
    """A name from a file can neither move the cursor nor fill the screen."""
    with pytest.raises(FormatError) as caught:
        opened(tmp_path, bytes(BG.with_pairs(u32("\x1b[2Jevil" + "x" * 500, 1))))
    assert "\x1b" not in str(caught.value)
    assert "\\x1b[2Jevil" in str(caught.value)
    assert len(str(caught.value)) < 400
