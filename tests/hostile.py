"""Files that a reader must survive: the corpus, made byte by byte, each with the code that it is to be refused with.

Owns the builders (:class:`Gguf`, :class:`Apr`, :func:`framed`, :func:`llama`) and the rows.  A row is a :class:`Case`: what to write, what
to open, the codes that are right ("OK" guards against refusing too much), what the message must say, what must be read.  It is written
with ``struct`` and ``json`` alone and shares nothing with the package's own writers.  ``test_hostile.py`` runs it row by row,
``test_sweeps.py`` spoils its valid files; run as a script it goes through the whole corpus in one process, under a ceiling of address
space if BYTES is not 0, and prints a line of JSON a row.

    python tests/hostile.py FOLDER BYTES
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from aprender import _core
from aprender.errors import Error

U16, U32, U64 = 1 << 16, 1 << 32, 1 << 64
I64_MAX = (1 << 63) - 1
MIB = 1 << 20

Content = bytes | Callable[[], bytes]
Check = Callable[[Any], None]


@dataclass(frozen=True)
class Case:
    """A row of the corpus.

    `files` are written into an empty folder (a function is called then, for what is large); `place`, if given, makes what is no plain file.
    `target` is opened, the folder itself if empty; with `bind` the file is bound to a model too.  `check` gets the File or Model.
    """

    name: str
    codes: frozenset[str]
    files: Mapping[str, Content]
    target: str = ""
    bind: bool = False
    says: tuple[str, ...] = ()
    check: Check | None = None
    place: Callable[[Path], None] | None = None

    @property
    def row(self) -> str:
        return self.name.split(" ")[0]

    def write(self, folder: Path) -> Path:
        """Make the files; what to open."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content() if callable(content) else content)
        if self.place:
            self.place(folder)
        return folder / self.target if self.target else folder


@dataclass(frozen=True)
class Outcome:
    """What came of a case.  `code`: "OK", ours, or the class of another exception; `growth`: most bytes the core held beyond the start."""

    code: str
    message: str
    field: str | None
    offset: int | None
    seconds: float
    growth: int
    ceiling: int


def sizes(path: Path) -> int:
    """Bytes of what is opened; for a folder, of all regular files in it."""
    each = path.iterdir() if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in each if file.is_file())


def outcome(case: Case, folder: Path) -> Outcome:
    """Write, open, bind and check a case.  The processor's time counts, so that a busy machine is not mistaken for slow code."""
    target = case.write(folder)
    size, data = sizes(target), 0
    _core._peak_bytes()
    baseline, start = _core._live_bytes(), time.process_time()
    code, message, where, offset = "OK", "", None, None
    try:
        file = _core.File(target)
        opened: Any = _core.Model(file) if case.bind else file
        data = sum(info.nbytes for info in file.tensors)
    except Error as problem:
        code, message, where, offset = str(problem.code), str(problem), problem.field, problem.offset
    except (OSError, MemoryError) as problem:
        code, message = type(problem).__name__, str(problem)
    seconds, growth = time.process_time() - start, _core._peak_bytes() - baseline
    if code == "OK":
        read(file)
    if code == "OK" and case.check:
        case.check(opened)
    return Outcome(code, message, where, offset, seconds, growth, data + 4 * (size - data) + MIB)


def read(file: _core.File) -> None:
    """Whatever opened can be read: every tensor's bytes, every key."""
    for info in file.tensors:
        assert file.raw(info.name).nbytes == info.nbytes
    assert len(file.metadata) == len(file.keys)


def case(name: str, codes: str, data: Content, target: str = "file", **more: Any) -> Case:
    """A case of one file.  `codes` is "OK" or the code, or several with blanks between."""
    return Case(name, frozenset(codes.split()), {target: data}, target, **more)


def power(value: int) -> str:
    """2^63, 2^64-1: short enough for a test's name."""
    for exponent in (64, 63, 62, 61, 32, 31):
        if abs(value - (1 << exponent)) <= 64:
            rest = value - (1 << exponent)
            return f"2^{exponent}" + (f"{rest:+d}" if rest else "")
    return str(value)


# ---- GGUF: the parts -------------------------------------------------------------------------------------------------


def text(value: bytes | str) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def pair(key: bytes | str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def u32(key: bytes | str, value: int) -> bytes:
    return pair(key, 4, struct.pack("<I", value))


def f32(key: bytes | str, value: float) -> bytes:
    return pair(key, 6, struct.pack("<f", value))


def string(key: bytes | str, value: bytes | str) -> bytes:
    return pair(key, 8, text(value))


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


def strings(key: str, values: list[str]) -> bytes:
    return pair(key, 9, array(8, len(values), b"".join(map(text, values))))


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
    pairs: tuple[bytes, ...] = (string("general.architecture", "llama"), u32("a.number", 7), pair("a.list", 9, array(4, 2, bytes(8))))
    infos: tuple[Info, ...] = (Info("a", (4,), 0, 0), Info("b", (3, 2), 0, 32), Info("c", (256,), 12, 64))
    data: bytes = field(default=bytes(range(16)) + bytes(16) + bytes(range(24)) + bytes(8) + bytes(144))
    tensors: int | None = None
    keys: int | None = None
    align: int = 32

    def __bytes__(self) -> bytes:
        counts = (len(self.infos) if self.tensors is None else self.tensors, len(self.pairs) if self.keys is None else self.keys)
        head = self.magic + self.version + struct.pack("<QQ", *counts)
        head += b"".join(self.pairs) + b"".join(bytes(info) for info in self.infos)
        return head + bytes(-len(head) % self.align if self.data else 0) + self.data

    def with_pairs(self, *more: bytes) -> Gguf:
        return replace(self, pairs=(*self.pairs, *more))

    def with_only(self, *infos: Info, data: bytes = b"") -> Gguf:
        return replace(self, infos=infos, data=data)

    def with_first(self, **changes: Any) -> Gguf:
        """The first tensor's entry, changed."""
        return replace(self, infos=(replace(self.infos[0], **changes), *self.infos[1:]))


BG = Gguf()
WHOLE = bytes(BG)
AFTER_HEADER = len(WHOLE) - 24


# ---- GGUF: the rows --------------------------------------------------------------------------------------------------

WRAPS = tuple(U64 // entry + 1 for entry in (48, 64, 72, 368))  # counts that wrap when they are multiplied by the size of some entry


def gguf_cases() -> Iterator[Case]:
    yield case("G00 valid", "OK", WHOLE, check=check_minimal)
    yield case("G00 version 2", "OK", bytes(replace(BG, version=struct.pack("<I", 2))), check=check_minimal)
    yield case("G01 empty", "TRUNCATED", b"", "x.gguf")
    yield case("G01 empty, no name to go by", "TRUNCATED", b"")
    yield case("G02 magic only", "TRUNCATED", WHOLE[:4])
    yield case("G03 short header", "TRUNCATED", WHOLE[:23], says=("7", "16"))
    yield case("G04 magic", "BAD_MAGIC", b"FUGG" + WHOLE[4:], says=("FUGG",))
    yield case("G04 magic of a .gguf", "BAD_MAGIC", b"FUGG" + WHOLE[4:], "x.gguf", says=("FUGG", "GGUF"))
    for old, name in ((b"lmgg", "GGML"), (b"tjgg", "GGJT"), (b"fmgg", "GGMF")):
        yield case(f"G05 {name}", "BAD_MAGIC", old + WHOLE[4:], says=(name,))
    for row, number in (("G06", 0), ("G06", 1), ("G07", 4), ("G07", U32 - 1)):
        yield case(
            f"{row} version {power(number)}", "BAD_VERSION", bytes(replace(BG, version=struct.pack("<I", number))), says=(str(number),)
        )
    yield case("G08 big-endian", "BAD_ENDIAN", bytes(replace(BG, version=b"\0\0\0\x03")), says=("big-endian",))
    over = AFTER_HEADER // 25 + 1
    for row, count in (("G09", U64 - 1), ("G09", 1 << 63), *(("G10", n) for n in WRAPS), ("G11", over)):
        yield case(f"{row} {power(count)} tensors", "COUNT", bytes(replace(BG, tensors=count)), says=(str(count), str(AFTER_HEADER // 25)))
    for count in (U64 - 1, 1 << 63, *WRAPS, AFTER_HEADER // 14 + 1):
        yield case(f"G12 {power(count)} keys", "COUNT", bytes(replace(BG, keys=count)), says=(str(count), str(AFTER_HEADER // 14)))
    yield case("G13 one tensor more", "NAME", bytes(replace(BG, tensors=4)))  # the padding reads as an empty name
    yield case("G13 one tensor more, no padding", "STRING", bytes(replace(padded_to_nothing(), tensors=4)))  # the data reads as a length
    yield case("G14 one key fewer", "SHAPE", bytes(replace(BG, keys=2)))  # "a.list" reads as a tensor of 9 dimensions
    yield from gguf_key_cases()
    yield from gguf_value_cases()
    yield from gguf_entry_cases()
    yield from gguf_shape_cases()
    yield from gguf_data_cases()


def check_minimal(file: _core.File) -> None:
    assert file.keys == ("general.architecture", "a.number", "a.list")
    assert (file.get("general.architecture"), file.get("a.number"), file.get("a.list").tolist()) == ("llama", 7, [0, 0])
    assert [(t.name, t.format, t.shape, t.nbytes) for t in file.tensors] == [
        ("a", "F32", (4,), 16),
        ("b", "F32", (2, 3), 24),
        ("c", "Q4_K", (256,), 144),
    ]
    assert (file.raw("a").tobytes(), file.raw("b").tobytes(), file.raw("c").tobytes()) == (bytes(range(16)), bytes(range(24)), bytes(144))


def padded_to_nothing() -> Gguf:
    """BG with a key that makes its head end on the alignment, so that data follows the entries at once; the data begins with 0xFF."""
    short = next(n for n in range(64) if len(bytes(replace(BG.with_pairs(string("pad", "x" * n)), data=b""))) % 32 == 0)
    return replace(BG.with_pairs(string("pad", "x" * short)), data=b"\xff" * 16 + BG.data[16:])


def gguf_key_cases() -> Iterator[Case]:
    for length in (U64 - 1, U64 - 8):
        spoilt = bytes(BG.with_pairs(struct.pack("<Q", length) + b"k" + bytes(12)))
        yield case(f"G15 key of {power(length)}", "STRING", spoilt, says=(str(length),))
    yield case("G16 key of 65536", "NAME", bytes(BG.with_pairs(u32("k" * 65536, 1))), says=("65536", "65535"))
    yield case("G16 key of 65535", "OK", bytes(BG.with_pairs(u32("k" * 65535, 1))), check=lambda file: same(file.get("k" * 65535), 1))
    yield case("G17 empty key", "NAME", bytes(BG.with_pairs(u32("", 1))))
    for letter in ("\0", "\n", "\x1b[31m", "\x7f", "\x85"):
        yield case(f"G18 key with {letter!r}", "NAME", bytes(BG.with_pairs(u32(f"k{letter}", 1))))
    yield case("G19 key not UTF-8", "UTF8", bytes(BG.with_pairs(u32(b"k\xff", 1))), says=("k\\xff",))
    yield case("G20 key twice, same value", "DUPLICATE", bytes(BG.with_pairs(u32("a.number", 7))), says=("a.number",))
    yield case("G20 key twice, other value", "DUPLICATE", bytes(BG.with_pairs(u32("a.number", 8))), says=("a.number",))
    yield case("G20 alignment twice", "DUPLICATE", bytes(BG.with_pairs(u32("general.alignment", 32), u32("general.alignment", 64))))
    yield case(
        "G21 200 000 keys", "OK", lambda: bytes(replace(BG, pairs=tuple(u32(f"key.{i}", i) for i in range(200_000)))), check=check_many
    )
    yield case("G22 200 000 colliding keys", "OK", colliding_keys, check=lambda file: same(len(file.keys), 200_000))


def same(found: object, wanted: object) -> None:
    assert found == wanted


def check_many(file: _core.File) -> None:
    assert len(file.keys) == 200_000
    assert file.get("key.199999") == 199_999


def fnv1a(words: np.ndarray, state: int) -> np.ndarray:
    """FNV-1a of 32 bits, from a state on, of the rows of an array of bytes."""
    states = np.full(len(words), state, np.uint64)
    for column in words.T:
        states = ((states ^ column) * np.uint64(0x01000193)) & np.uint64(0xFFFFFFFF)
    return states


def colliding_keys() -> bytes:
    """Keys that are one value to FNV-1a: 18 places, each filled by either of two words that take the hash from one state to one state."""
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz0123456789", np.uint8)
    drawn = np.arange(1 << 18) * 229 % 36**5  # no number twice: 229 and 36 share no factor
    words = letters[np.stack([drawn // 36**place % 36 for place in range(5)], axis=1)]
    state, places = 0x811C9DC5, []
    for _ in range(18):
        hashes = fnv1a(words, state)
        order = np.argsort(hashes)
        twin = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])[0]
        places.append([words[n].tobytes() for n in order[twin : twin + 2]])
        state = int(hashes[order[twin]])
    keys = [b"".join(words) for words in itertools.islice(itertools.product(*places), 200_000)]
    assert set(fnv1a(np.frombuffer(b"".join(keys[::1000]), np.uint8).reshape(-1, len(keys[0])), 0x811C9DC5)) == {state}
    return bytes(replace(BG, pairs=tuple(u32(key, 1) for key in keys)))


def gguf_value_cases() -> Iterator[Case]:
    def added(kind: int, value: bytes, key: str = "k") -> bytes:
        return bytes(BG.with_pairs(pair(key, kind, value)))

    for kind in (13, 255, 1 << 31, U32 - 1):
        yield case(f"G23 type {power(kind)}", "TYPE", added(kind, bytes(8)), says=(str(kind), "12"))
    yield case("G24 bool 2", "VALUE", added(7, b"\2"), says=("2",))
    yield case("G24 bool 3 in an array", "VALUE", added(9, array(7, 2, b"\1\3")), says=("3",))
    yield case("G24 bool 1", "OK", added(7, b"\1"), check=lambda file: same(file.get("k"), True))
    for length in (U64 - 1, left_after(8, struct.pack("<Q", 0)) + 1):
        yield case(f"G25 string of {power(length)}", "STRING", added(8, struct.pack("<Q", length)), says=(str(length),))
    for bad in (b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xff", b"\xe2\x82"):
        yield case(f"G26 string {bad.hex()}", "UTF8", added(8, text(bad)))
        yield case(f"G26 strings {bad.hex()}", "UTF8", added(9, array(8, 1, text(bad))))
    yield case(
        "G26 string up to U+10FFFF", "OK", added(8, text("aäΩ€\U0010ffff")), check=lambda file: same(file.get("k"), "aäΩ€\U0010ffff")
    )
    for kind, size, name in ((0, 1, "u8"), (10, 8, "u64"), (4, 4, "u32"), (8, 8, "strings")):
        for count in (U64 - 1, (1 << 61) + 1, 1 << 61, left_after(9, array(kind, 0)) // size + 1):
            row = "G28" if kind == 8 else "G27"
            yield case(f"{row} {power(count)} {name}", "COUNT", added(9, array(kind, count)), says=(str(count),))
    for kind in (13, 255):
        yield case(f"G29 elements of type {kind}", "TYPE", added(9, array(kind, 1, bytes(8))), says=(str(kind),))
        yield case(f"G29 none of type {kind}", "TYPE", added(9, array(kind, 0)), says=(str(kind),))
    yield case("G30 array of arrays", "UNSUPPORTED", added(9, array(9, 1, array(4, 1, bytes(4)))))
    yield case("G30 100 000 arrays deep", "UNSUPPORTED", lambda: added(9, array(9, 1) * 100_000))
    for value in (0, 3, 13, 131_072, 1 << 31):
        yield case(
            f"G31 alignment {power(value)}", "ALIGN", bytes(BG.with_pairs(u32("general.alignment", value))), says=(str(value), "65536")
        )
    for kind, item in ((5, bytes(4)), (10, bytes(8)), (9, array(4, 1, bytes(4))), (8, text("32"))):
        yield case(f"G32 alignment of type {kind}", "KV_TYPE", added(kind, item, "general.alignment"), says=("general.alignment",))
    tight = replace(BG, align=1).with_pairs(u32("general.alignment", 1))
    tight = tight.with_only(Info("a", (1,), 0, 0), Info("b", (1,), 0, 4), data=struct.pack("<ff", 1.5, 2.5))
    yield case("G33 alignment 1", "OK", bytes(tight), check=lambda file: same([float(file.dequantize(n)[0]) for n in "ab"], [1.5, 2.5]))


def left_after(kind: int, value: bytes) -> int:
    """Bytes of the file that follow the added pair `k` of that value."""
    return len(bytes(BG.with_pairs(pair("k", kind, value)))) - 24 - sum(map(len, BG.pairs)) - len(pair("k", kind, value))


def gguf_entry_cases() -> Iterator[Case]:
    entry = bytes(BG.infos[0])
    yield case(
        f"G34 name of {power(U64 - 1)}", "STRING", WHOLE.replace(entry, struct.pack("<Q", U64 - 1) + entry[8:]), says=(str(U64 - 1),)
    )
    yield case("G34 name of 65", "NAME", bytes(BG.with_first(name="n" * 65)), says=("65", "64"))
    yield case("G34 name of 64", "OK", bytes(BG.with_first(name="n" * 64)), check=lambda file: same(file.raw("n" * 64).nbytes, 16))
    yield case("G34 no name", "NAME", bytes(BG.with_first(name="")))
    yield case(
        "G35 NUL in a name",
        "NAME",
        bytes(BG.with_only(*(replace(BG.infos[n], name=name) for n, name in ((0, "a\0b"), (1, "a"))), data=BG.data[:64])),
    )
    yield case("G36 same name", "DUPLICATE", bytes(BG.with_first(name="b")), says=("'b'",))
    for name in ("../../x", "/x", "a/../../b"):  # a name is a key of an index; nothing here makes a path of it
        yield case(f"G37 {name}", "OK", bytes(BG.with_first(name=name)), check=lambda file, name=name: same(file.tensors[0].name, name))


def gguf_shape_cases() -> Iterator[Case]:
    yield case("G38 rank 5", "SHAPE", bytes(BG.with_first(dims=(4, 1, 1, 1, 1))), says=("5", "4"))
    yield case("G38 rank 2^32-1", "SHAPE", bytes(BG.with_first(rank=U32 - 1)), says=(str(U32 - 1), "4"))
    scalar = BG.with_only(Info("a", (), 0, 0), data=struct.pack("<f", 2.5))
    yield case("G39 scalar", "OK", bytes(scalar), check=lambda file: same((file.tensors[0].shape, float(file.dequantize("a"))), ((), 2.5)))
    for dims in ((0,), (4, 0), (4, 1, 1, 0)):
        empty = bytes(BG.with_only(Info("a", dims, 0, 0)))
        yield case(f"G40 {dims}", "OK", empty, check=lambda file, dims=dims: same(file.dequantize("a").shape, dims[::-1]))
    yield case("G40 no vocabulary, bound", "CONFIG", llama(tensors={"token_embd.weight": (0, (32, 0), b"")}), "x.gguf", bind=True)
    for dim in (U64 - 1, 1 << 63):
        yield case(f"G41 {power(dim)}", "SHAPE", bytes(BG.with_first(dims=(dim,))), says=(str(dim),))
    yield case("G42 product 2^64", "SHAPE", bytes(BG.with_first(dims=(U32, U32))))
    for dims in ((I64_MAX, 2), (1 << 62, 4), (U32, U32, 2, 2), (0, I64_MAX, I64_MAX)):
        yield case(f"G43 {' x '.join(map(power, dims))}", "SHAPE", bytes(BG.with_first(dims=dims)))
    yield case("G44 2^64 bytes of F32", "SHAPE", bytes(BG.with_first(dims=(1 << 62,))))
    yield case("G45 2^64-4 bytes of F32", "SHAPE", bytes(BG.with_first(dims=((1 << 62) - 1,))))
    yield case("G46 Q4_0 that wraps", "SHAPE", bytes(BG.with_first(dims=(((U64 // 18) // 32 + 1) * 32,), kind=2)))
    half = (1 << 63) - 64
    eights = (Info("a", (half,), 24, 0), Info("b", (half,), 24, half))
    yield case("G47 sum wraps", "OFFSET", bytes(BG.with_only(*eights, data=bytes(64))), says=(str(half),))
    yield case("G48 Q4_K of 255", "BLOCK", bytes(BG.with_only(Info("a", (255,), 12, 0), data=bytes(144))), says=("255", "256", "Q4_K"))
    yield case("G48 Q8_0 of 31", "BLOCK", bytes(BG.with_only(Info("a", (31,), 8, 0), data=bytes(34))), says=("31", "32", "Q8_0"))
    for row, kinds in (("G49", (4, 5, 31, 32, 33, 36, 37, 38)), ("G50", (43, 44, 1 << 31, U32 - 1))):
        for kind in kinds:
            yield case(f"{row} format {power(kind)}", "TYPE", bytes(BG.with_first(kind=kind)), says=(str(kind),))
    for name, kind, block, size in (("NVFP4", 40, 64, 36), ("Q1_0", 41, 128, 18), ("Q2_0", 42, 64, 18)):
        listed = bytes(BG.with_only(Info("a", (block,), kind, 0), data=bytes(size)))
        yield case(f"G51 {name}", "OK", listed, check=lambda file, name=name: check_not_read(file, name))


def check_not_read(file: _core.File, name: str) -> None:
    """Listed with its name and its bytes; its values are given or refused by code."""
    assert file.tensors[0].format == name
    assert file.raw("a").nbytes == file.tensors[0].nbytes
    try:
        assert np.isfinite(file.dequantize("a")).all()  # a decoder has come: zeros are zeros in all of these
    except Error as problem:
        assert problem.code == "UNSUPPORTED" and name in str(problem)  # noqa: PT017, PT018


def gguf_data_cases() -> Iterator[Case]:
    a, b, c = BG.infos
    for by in (1, 16):
        yield case(f"G52 offset +{by}", "ALIGN", bytes(replace(BG, infos=(a, replace(b, offset=32 + by), c))), says=(str(32 + by), "32"))
    yield case("G53 offset wraps", "OFFSET", bytes(replace(BG, infos=(a, replace(b, offset=U64 - 32), c))), says=(str(U64 - 32),))
    yield case("G54 one byte short", "OFFSET", WHOLE[:-1], says=("144", str(len(BG.data) - 1)))
    yield case(
        "G54 a GiB short", "OFFSET", bytes(replace(BG, infos=(a, b, replace(c, offset=1 << 30)))), says=(str(1 << 30), str(len(BG.data)))
    )
    yield case("G55 same offset", "OVERLAP", bytes(replace(BG, infos=(a, replace(b, offset=0), c))), says=("'b'", "32"))
    yield case("G55 half overlap", "OVERLAP", bytes(replace(BG, infos=(a, b, replace(c, offset=32)))), says=("32", "64"))
    gap = replace(BG, infos=(a, b, replace(c, offset=64 + 4096)), data=BG.data[:64] + bytes(4096) + BG.data[64:])
    yield case("G56 gap", "GAP", bytes(gap), says=("4160", "64"))
    for where, at in (("between tensors", 31), ("before the next", 56)):
        yield case(f"G56 padding {where} is not zero", "GAP", bytes(replace(BG, data=BG.data[:at] + b"x" + BG.data[at + 1 :])))
    start = len(WHOLE) - len(BG.data)
    yield case("G56 padding before the data is not zero", "GAP", WHOLE[: start - 1] + b"x" + WHOLE[start:])
    yield case("G57 zip at the end", "GAP", WHOLE + b"PK\3\4" + bytes(64), says=("68", "32"))
    yield case("G57 zeros at the end", "OK", WHOLE + bytes(-len(WHOLE) % 32 or 32), check=check_minimal)
    yield case("G57 too many zeros", "GAP", WHOLE + bytes(33), says=("33", "32"))
    yield case("G58 no data", "TRUNCATED", bytes(replace(BG, data=b"")))
    yield case("G58 no tensors", "OK", bytes(BG.with_only()), check=lambda file: same(file.tensors, ()))
    yield case("G59 100 000 empty tensors", "OK", many_infos, check=lambda file: same(len(file.tensors), 100_000))
    yield case("G60 backwards", "GAP", bytes(replace(BG, infos=(c, b, a))))


# ---- a model ---------------------------------------------------------------------------------------------------------

WIDTH, HEADS, KV_HEADS, HEAD, INNER, VOCAB = 32, 4, 2, 8, 48, 6

#: Weights of a one-layer Llama: name in GGUF, name at Hugging Face, shape with the outermost first.
WEIGHTS: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    ("token_embd.weight", "model.embed_tokens.weight", (VOCAB, WIDTH)),
    ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight", (WIDTH,)),
    ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight", (HEADS * HEAD, WIDTH)),
    ("blk.0.attn_k.weight", "model.layers.0.self_attn.k_proj.weight", (KV_HEADS * HEAD, WIDTH)),
    ("blk.0.attn_v.weight", "model.layers.0.self_attn.v_proj.weight", (KV_HEADS * HEAD, WIDTH)),
    ("blk.0.attn_output.weight", "model.layers.0.self_attn.o_proj.weight", (WIDTH, HEADS * HEAD)),
    ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight", (WIDTH,)),
    ("blk.0.ffn_gate.weight", "model.layers.0.mlp.gate_proj.weight", (INNER, WIDTH)),
    ("blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight", (INNER, WIDTH)),
    ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight", (WIDTH, INNER)),
    ("output_norm.weight", "model.norm.weight", (WIDTH,)),
)

Value = tuple[int, bytes]  # GGUF type, bytes
Stored = tuple[int, tuple[int, ...], bytes]  # GGUF format, dimensions with the innermost first, bytes


def ramp(shape: tuple[int, ...]) -> bytes:
    """F32 values from -1/2 to 1/2, none of them special."""
    return (((np.arange(int(np.prod(shape))) * 37 + 11) % 64 - 31.5) / 64).astype("<f4").tobytes()


def said_u32(value: int) -> Value:
    return 4, struct.pack("<I", value)


def said_f32(value: float) -> Value:
    return 6, struct.pack("<f", value)


LLAMA_KEYS: dict[str, Value] = {
    "general.architecture": (8, text("llama")),
    "llama.block_count": said_u32(1),
    "llama.embedding_length": said_u32(WIDTH),
    "llama.feed_forward_length": said_u32(INNER),
    "llama.attention.head_count": said_u32(HEADS),
    "llama.attention.head_count_kv": said_u32(KV_HEADS),
    "llama.attention.key_length": said_u32(HEAD),
    "llama.vocab_size": said_u32(VOCAB),
    "llama.context_length": said_u32(64),
    "llama.attention.layer_norm_rms_epsilon": said_f32(1e-6),
    "llama.rope.freq_base": said_f32(10000.0),
}
LLAMA_TENSORS: dict[str, Stored] = {name: (0, shape[::-1], ramp(shape)) for name, _, shape in WEIGHTS}


def packed(pairs: tuple[bytes, ...], tensors: Mapping[str, Stored]) -> bytes:
    """A GGUF of these pairs and tensors, each tensor at the next multiple of 32."""
    infos, data = [], b""
    for name, (kind, dims, blob) in tensors.items():
        infos.append(Info(name, dims, kind, len(data)))
        data += blob + bytes(-len(blob) % 32)
    return bytes(Gguf(pairs=pairs, infos=tuple(infos), data=data))


def llama(keys: Mapping[str, Value | None] | None = None, tensors: Mapping[str, Stored | None] | None = None) -> bytes:
    """A model that runs, with keys and tensors changed, added, or (None) taken away."""
    said = {key: value for key, value in (LLAMA_KEYS | dict(keys or {})).items() if value}
    have = {name: stored for name, stored in (LLAMA_TENSORS | dict(tensors or {})).items() if stored}
    return packed(tuple(pair(key, *value) for key, value in said.items()), have)


def check_runs(model: _core.Model) -> None:
    logits = _core.Run(model, threads=1).forward([1, 2], [("lm_head", None)])[("lm_head", None)]
    assert logits.shape == (2, VOCAB)
    assert np.isfinite(logits).all()
    assert logits.std() > 0


def model_case(
    name: str, codes: str, keys: Mapping[str, Value | None] | None = None, tensors: Mapping[str, Stored | None] | None = None, **more: Any
) -> Case:
    return case(name, codes, llama(keys, tensors), "x.gguf", bind=True, **more)


def model_cases() -> Iterator[Case]:
    yield model_case("M00 valid", "OK", check=check_runs)
    layers, heads, kv_heads = "llama.block_count", "llama.attention.head_count", "llama.attention.head_count_kv"
    yield model_case("M01 no layers", "CONFIG", {layers: said_u32(0)}, says=("0",))
    yield model_case("M01 2^31 layers", "CONFIG", {layers: said_u32(1 << 31)}, says=(str(1 << 31),))
    yield model_case("M01 4097 layers", "CONFIG", {layers: said_u32(4097)}, says=("4097", "4096"))
    for count in (2, 513, 4096):
        yield model_case(f"M01 {count} layers of a file with one", "MISSING", {layers: said_u32(count)})
    yield model_case("M02 no heads", "CONFIG", {heads: said_u32(0)}, says=("0",))
    for key in (heads, layers, "llama.embedding_length", "llama.attention.layer_norm_rms_epsilon", "general.architecture"):
        yield model_case(f"M02 {key} removed", "MISSING", {key: None}, says=(key,))
    yield model_case(
        "M03 width by heads", "CONFIG", {heads: said_u32(5), kv_heads: None, "llama.attention.key_length": None}, says=("32", "5")
    )
    yield model_case("M03 heads by kv heads", "CONFIG", {kv_heads: said_u32(3)}, says=("4", "3"))
    for count in (0, 5):
        yield model_case(f"M03 {count} kv heads", "CONFIG", {kv_heads: said_u32(count)}, says=(str(count),))
    for count in (VOCAB - 1, VOCAB + 1):
        tokens = (9, array(8, count, b"".join(text(f"t{n}") for n in range(count))))
        yield model_case(f"M04 {count} tokens", "CONFIG", {"tokenizer.ggml.tokens": tokens}, says=(str(count), str(VOCAB)))
        yield model_case(f"M04 vocabulary of {count}", "CONFIG", {"llama.vocab_size": said_u32(count)}, says=(str(count), str(VOCAB)))
    yield from number_cases()
    yield from mixture_cases()
    yield from weight_cases()
    yield from architecture_cases()


def number_cases() -> Iterator[Case]:
    for value in (float("nan"), 0.0, -1.0, float("inf")):
        yield model_case(f"M09 base {value}", "CONFIG", {"llama.rope.freq_base": said_f32(value)})
    for size in (7, 16):  # odd, and more than the head has: RoPE on a part of a head is not computed, and 16 is no part
        yield model_case(
            f"M09 {size} dimensions",
            "UNSUPPORTED",
            {"llama.rope.dimension_count": said_u32(size)},
            says=("llama.rope.dimension_count", str(size)),
        )
    yield model_case("M09 odd head", "CONFIG", {"llama.attention.key_length": said_u32(7)}, says=("7",))
    for value in (float("nan"), -1e-6, 1e30, float("inf")):
        yield model_case(f"M10 eps {value}", "CONFIG", {"llama.attention.layer_norm_rms_epsilon": said_f32(value)})
    huge = (10, struct.pack("<Q", 1 << 63))
    yield model_case("M11 context 2^63", "CONFIG", {"llama.context_length": huge}, says=(str(1 << 63),))
    yield model_case("M11 context 2^31-1", "OK", {"llama.context_length": said_u32((1 << 31) - 1)}, check=check_runs)
    widths = (("u8", 0, "B"), ("u16", 2, "H"), ("i32", 5, "i"), ("u64", 10, "Q"), ("i64", 11, "q"))
    for name, kind, letter in widths:
        counts = {key: (kind, struct.pack(f"<{letter}", number)) for key, number in
                  (("llama.block_count", 1), ("llama.attention.head_count", HEADS), ("llama.embedding_length", WIDTH))}  # fmt: skip
        yield model_case(f"M19 counts as {name}", "OK", counts, check=check_runs)
    yield model_case("M19 negative count", "CONFIG", {"llama.attention.head_count": (5, struct.pack("<i", -4))}, says=("-4",))
    for name, value in (("string", (8, text("4"))), ("f32", said_f32(4.0)), ("bool", (7, b"\1"))):
        yield model_case(f"M19 count as {name}", "KV_TYPE", {"llama.attention.head_count": value}, says=("llama.attention.head_count",))


def mixture_cases() -> Iterator[Case]:
    """Mixtures of experts are not computed: the key that says so is refused by name, whatever its number, before any other is believed."""
    for count in (2, 1 << 31):
        yield model_case(
            f"M12 {power(count)} experts", "UNSUPPORTED", {"llama.expert_count": said_u32(count)}, says=("llama.expert_count",)
        )
    used = {"llama.expert_count": said_u32(2), "llama.expert_used_count": said_u32(3)}
    yield model_case("M12 used > count", "UNSUPPORTED", used, says=("expert",))
    router = {"blk.0.ffn_gate_inp.weight": (0, (WIDTH, 3), ramp((3, WIDTH)))}
    yield model_case("M12 router", "LEFTOVER", None, router, says=("blk.0.ffn_gate_inp.weight",))


def weight_cases() -> Iterator[Case]:
    up = "blk.0.ffn_up.weight"
    yield model_case(
        "M13 transposed",
        "CONFIG",
        None,
        {up: (0, (INNER, WIDTH), ramp((WIDTH, INNER)))},
        says=(up, f"[{WIDTH}, {INNER}]", f"[{INNER}, {WIDTH}]"),
    )
    yield model_case("M13 absent", "MISSING", None, {up: None}, says=(up,))
    yield model_case("M13 one too many", "LEFTOVER", None, {"blk.1.ffn_up.weight": LLAMA_TENSORS[up]}, says=("blk.1.ffn_up.weight",))
    for name, bits in (("NaN", 0x7E01), ("infinite", 0x7C00)):
        row = struct.pack("<H", 0x3C00) + bytes(n % 5 + 1 for n in range(32))
        spoilt = struct.pack("<H", bits) + row[2:]
        table = (8, (WIDTH, VOCAB), row + row + spoilt + row * 3)
        yield model_case(
            f"M14 {name} scale", "OK", None, {"token_embd.weight": table}, check=lambda model, bits=bits: check_spoilt_row(model, bits)
        )
    square = {
        "llama.embedding_length": said_u32(256),
        "llama.attention.head_count": said_u32(2),
        "llama.attention.key_length": said_u32(128),
    }
    yield model_case(
        "M18 norm as Q4_K",
        "CONFIG",
        square,
        {**wide_tensors(256), "output_norm.weight": (12, (256,), bytes(144))},
        says=("output_norm.weight", "Q4_K"),
    )
    yield model_case(
        "M18 norm as F16", "OK", None, {"output_norm.weight": (1, (WIDTH,), np.ones(WIDTH, "<f2").tobytes())}, check=check_runs
    )
    whole = {up: (24, (WIDTH, INNER), bytes(n % 7 for n in range(WIDTH * INNER)))}
    yield model_case("M18 matrix of whole numbers", "OK", None, whole, check=check_runs)


def check_spoilt_row(model: _core.Model, bits: int) -> None:
    """Token 2 is read as what its scale makes of it; its neighbours do not notice."""
    scale = np.uint16(bits).view(np.float16).astype(np.float32)
    key = ("embedding", None)
    found = _core.Run(model, threads=1).forward([1, 2, 3], [key])[key]
    with np.errstate(invalid="ignore"):
        wanted = np.arange(32).astype(np.float32) % 5 + 1
        np.testing.assert_array_equal(found, [wanted, wanted * scale, wanted])


def wide_tensors(width: int) -> dict[str, Stored]:
    """The model's tensors at another width, where two heads and two kv heads fill it."""
    shapes = {name: tuple(n if n in (VOCAB, INNER) else width for n in shape[::-1]) for name, _, shape in WEIGHTS}
    return {name: (0, dims, ramp(dims)) for name, dims in shapes.items()}


def architecture_cases() -> Iterator[Case]:
    key = "general.architecture"
    yield model_case("M17 unknown architecture", "UNSUPPORTED", {key: (8, text("mamba"))}, says=("mamba",))
    yield model_case("M17 empty architecture", "UNSUPPORTED NAME", {key: (8, text(""))})
    yield case("M17 10 MB of architecture", "UNSUPPORTED NAME", lambda: llama({key: (8, text("x" * 10_000_000))}), "x.gguf", bind=True)
    yield model_case("M17 architecture as a number", "KV_TYPE", {key: said_u32(7)}, says=(key,))
    yield model_case("M17 unknown key", "UNSUPPORTED", {"llama.attention.twist": said_u32(7)}, says=("llama.attention.twist",))


# ---- a model in several files ----------------------------------------------------------------------------------------


def split_part(number: int, count: int, names: list[str], total: int, keys: Mapping[str, Value | None] | None = None) -> bytes:
    """Part `number` of `count` with these tensors; the first one has the model's keys."""
    said = {**(LLAMA_KEYS if number == 0 else {}), "split.no": (2, struct.pack("<H", number)), "split.count": (2, struct.pack("<H", count))}
    said |= {"split.tensors.count": (5, struct.pack("<i", total))} | dict(keys or {})
    return packed(tuple(pair(key, *value) for key, value in said.items() if value), {name: LLAMA_TENSORS[name] for name in names})


def split_name(number: int, count: int) -> str:
    return f"m-{number + 1:05}-of-{count:05}.gguf"


def split_files(
    count: int = 3, first: Mapping[str, Value | None] | None = None, later: Mapping[str, Value | None] | None = None
) -> dict[str, bytes]:
    names, files = list(LLAMA_TENSORS), {}
    for number in range(count):
        part = names[number * len(names) // count : (number + 1) * len(names) // count]
        files[split_name(number, count)] = split_part(number, count, part, len(names), first if number == 0 else later)
    return files


def split_cases() -> Iterator[Case]:
    """Split GGUF: opened by its first part."""

    def made(name: str, codes: str, files: Mapping[str, Content], target: str = split_name(0, 3), **more: Any) -> Case:
        return Case(f"M16 {name}", frozenset(codes.split()), files, target, bind=True, **more)

    whole, u16 = split_files(), lambda value: (2, struct.pack("<H", value))
    yield made("three parts", "OK", whole, check=check_runs)
    lonely = split_part(0, U16 - 1, list(LLAMA_TENSORS)[:3], len(LLAMA_TENSORS))
    yield made("count 65535", "CONFIG MISSING", {split_name(0, U16 - 1): lonely}, split_name(0, U16 - 1))
    for number in (3, U16 - 1):
        yield made(f"no {number} of 3", "CONFIG MISSING", split_files(later={"split.no": u16(number)}))
        yield made(f"first is no {number} of 3", "CONFIG MISSING", split_files(first={"split.no": u16(number)}))
    yield made("two parts say the same number", "CONFIG MISSING", split_files(later={"split.no": u16(1)}))
    yield made("a part says another count", "CONFIG MISSING", split_files(later={"split.count": u16(4)}))
    yield made("part missing", "MISSING", {name: data for name, data in whole.items() if name != split_name(1, 3)})
    yield made(
        "tensor in two parts",
        "DUPLICATE CONFIG",
        {**whole, split_name(2, 3): split_part(2, 3, ["token_embd.weight", *list(LLAMA_TENSORS)[-3:]], len(LLAMA_TENSORS))},
    )
    yield made("part cut short", "OFFSET TRUNCATED", {**whole, split_name(2, 3): whole[split_name(2, 3)][:-64]})
    yield made("part is something else", "BAD_MAGIC", {**whole, split_name(2, 3): b"something else altogether"})


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


HEADER = f'{{"a":{entry()},"b":{entry("[2,2]", "[16,32]")}}}'
BS = framed(HEADER, np.arange(8, dtype="<f4").tobytes())
EMPTY = bytes(32)


def st(name: str, codes: str, data: Content, **more: Any) -> Case:
    return case(name, codes, data, "x.safetensors", **more)


def safetensors_cases() -> Iterator[Case]:
    yield st("S00 valid", "OK", BS, check=check_two)
    for size in range(8):
        yield st(f"S01 {size} bytes", "TRUNCATED", bytes(size), says=(str(size),))
        yield case(f"S01 {size} bytes, no name to go by", "TRUNCATED", bytes(size))
    yield st("S02 no header", "JSON", framed("", bytes(16)))
    for length in (U64 - 1, 1 << 63, 100_000_001):
        yield st(f"S03 header of {power(length)}", "LIMIT", framed(HEADER, EMPTY, length), says=(str(length), "100000000"))
    yield st("S04 header beyond the end", "TRUNCATED", framed(HEADER, b"", len(HEADER) + 1), says=(str(len(HEADER) + 1), str(len(HEADER))))
    yield st("S05 blank in front", "JSON", framed(" " + HEADER, EMPTY))
    yield st("S05 byte order mark", "JSON", framed("\ufeff" + HEADER, EMPTY))
    yield st("S06 blanks at the end", "OK", framed(HEADER + "   ", BS[-32:]), check=check_two)
    yield st("S06 NUL at the end", "JSON", framed(HEADER + "\0", EMPTY))
    yield st("S06 newline at the end", "JSON", framed(HEADER + "\n", EMPTY))
    yield st("S07 0xFF in a name", "UTF8", framed(HEADER.encode().replace(b'"a"', b'"\xff"'), EMPTY))
    for half in ("\\ud800", "\\udc00", "\\ud800\\u0041"):
        yield st(f"S07 half a pair {half}", "UTF8", framed(HEADER.replace('"a"', f'"{half}"'), EMPTY))
    for n in range(1, len(HEADER)):
        yield st(f"S08 cut at {n}", "JSON", framed(HEADER[:n], EMPTY))
    yield st("S09 deep", "DEPTH", framed("[" * 100_000))
    yield st("S09 deep in an entry", "DEPTH", framed('{"a":' + "[" * 100_000), says=("64",))
    yield from name_cases()
    yield from field_cases()
    yield from place_cases()
    yield from shape_cases()
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
        yield st(f"S08 no JSON {broken!r}", "JSON", framed(broken))


def check_two(file: _core.File) -> None:
    assert [(t.name, t.format, t.shape, t.nbytes) for t in file.tensors] == [("a", "F32", (4,), 16), ("b", "F32", (2, 2), 16)]
    assert file.dequantize("a").tolist() == [0, 1, 2, 3]
    assert file.dequantize("b").tolist() == [[4, 5], [6, 7]]


def name_cases() -> Iterator[Case]:
    yield st("S10 name twice", "DUPLICATE", framed(f'{{"a":{entry()},"a":{entry()}}}', bytes(16)), says=("'a'",))
    yield st("S10 name twice, two ranges", "DUPLICATE", framed(f'{{"a":{entry()},"a":{entry("[4]", "[16,32]")}}}', EMPTY), says=("'a'",))
    yield st("S11 name twice, escaped", "DUPLICATE", framed(f'{{"a":{entry()},"\\u0061":{entry("[4]", "[16,32]")}}}', EMPTY), says=("'a'",))
    names = ("", "x" * 256, "x" * 1_000_000, "\\u0000", "a\\nb", "\\u001b[31m", "\\u009b31m")
    for name in names:
        yield st(f"S31 name {name[:12]!r} of {len(name)}", "NAME", framed(f'{{"{name}":{entry()}}}', bytes(16)))
    yield st(
        "S31 name of 255", "OK", framed(f'{{"{"x" * 255}":{entry()}}}', bytes(16)), check=lambda file: same(file.raw("x" * 255).nbytes, 16)
    )
    yield st("S31 traversal", "OK", framed(f'{{"../../x":{entry()}}}', bytes(16)), check=lambda file: same(file.tensors[0].name, "../../x"))
    yield st(
        "S31 every letter",
        "OK",
        framed(f'{{"aäΩ€\U0010ffff\\ud83d\\ude00":{entry()}}}', bytes(16)),
        check=lambda file: same(file.tensors[0].name, "aäΩ€\U0010ffff😀"),
    )


def field_cases() -> Iterator[Case]:
    yield st(
        "S12 two dtypes",
        "DUPLICATE",
        framed('{"a":{"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]}}', bytes(16)),
        says=("dtype",),
    )
    escaped = '{"a":{"dtype":"F32","\\u0064type":"F16","shape":[4],"data_offsets":[0,16]}}'
    yield st("S12 two dtypes, one escaped", "JSON DUPLICATE", framed(escaped, bytes(16)))  # a field's name is spelt plainly or is unknown
    yield st(
        "S12 two shapes",
        "DUPLICATE",
        framed('{"a":{"dtype":"F32","shape":[4],"shape":[4],"data_offsets":[0,16]}}', bytes(16)),
        says=("shape",),
    )
    for value in ("7", '{"k":1}', '{"k":["v"]}', '{"k":{"v":"w"}}', "[]", '{"k":null}', '"text"'):
        yield st(f"S13 metadata {value}", "JSON", framed(f'{{"__metadata__":{value},"a":{entry()}}}', bytes(16)))
    yield st(
        "S13 good metadata",
        "OK",
        framed(f'{{"__metadata__":{{"k":"v"}},"a":{entry()}}}', bytes(16)),
        check=lambda file: same([t.name for t in file.tensors], ["a"]),
    )
    yield st(
        "S14 metadata twice",
        "DUPLICATE",
        framed(f'{{"__metadata__":{{}},"__metadata__":{{}},"a":{entry()}}}', bytes(16)),
        says=("__metadata__",),
    )
    yield st("S14 key twice in metadata", "DUPLICATE", framed(f'{{"__metadata__":{{"k":"v","\\u006b":"v"}},"a":{entry()}}}', bytes(16)))
    for dtype in ('"F99"', '"f32"', "7", '""', "null", '["F32"]'):
        yield st(f"S15 dtype {dtype}", "TYPE", one(dtype=dtype))
    yield st("S16 no shape", "JSON", framed('{"a":{"dtype":"F32","data_offsets":[0,16]}}', bytes(16)), says=("'a'", "shape"))
    yield st("S16 no offsets", "JSON", framed('{"a":{"dtype":"F32","shape":[4]}}', bytes(16)), says=("'a'", "data_offsets"))
    yield st("S16 no dtype", "JSON", framed('{"a":{"shape":[4],"data_offsets":[0,16]}}', bytes(16)), says=("'a'", "dtype"))
    yield st("S16 another field", "JSON", framed('{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16],"x":1}}', bytes(16)))
    for dtype in ("F4", "F6_E2M3", "F6_E3M2"):
        yield st(f"S25 {dtype}", "UNSUPPORTED SIZE", one("[3]", "[0,2]", f'"{dtype}"', 2), says=(dtype,))


def place_cases() -> Iterator[Case]:
    yield st("S17 offsets backwards", "OFFSET", one(offsets="[16,0]"), says=("16", "0"))
    for offsets in ("[0,8,16]", "[-1,16]", "[1.5,16]", "[0,1e3]", '["0",16]', "[0]", "[]", "7", "[0,[16]]", "{}"):
        yield st(f"S17 offsets {offsets}", "JSON", one(offsets=offsets))
    yield st("S18 past the end", "OFFSET", one(offsets="[0,17]"), says=("17", "16"))
    yield st("S18 far past the end", "OFFSET", one(offsets=f"[0,{U64 - 1}]"), says=(str(U64 - 1), "16"))
    shared = ",".join(f'"t{i}":{entry()}' for i in range(10))
    yield st("S19 same range", "OVERLAP", framed("{" + shared + "}", bytes(16)))
    yield st("S20 half overlap", "OVERLAP", two(entry(), entry("[4]", "[4,20]"), 20), says=("'b'", "4", "16"))
    yield st("S21 hole", "GAP", two(entry(), entry("[4]", "[20,36]"), 36), says=("'b'", "20", "16"))
    yield st("S21 hole in front", "GAP", one(offsets="[4,20]", size=20), says=("4",))
    yield st("S22 bytes at the end", "GAP", BS + b"\0", says=("1",))
    yield st("S22 bytes and no tensor", "GAP", framed("{}", bytes(4)), says=("4",))
    yield st("S24 one byte short", "SIZE", one(offsets="[0,15]", size=15), says=("15", "16"))
    yield st("S24 twice the size", "SIZE", one(offsets="[0,32]", size=32), says=("32", "16"))
    for pad in range(8):
        head = f'{{"t":{entry()}}}'
        data = framed(head + " " * ((pad - len(head)) % 8), struct.pack("<4f", 1.5, -2, 0.25, 96))
        yield st(f"S27 data at 8k+{pad}", "OK", data, check=lambda file: same(file.dequantize("t").tolist(), [1.5, -2, 0.25, 96]))


def shape_cases() -> Iterator[Case]:
    wraps = ("[4294967296,4294967296]", f"[0,{1 << 63},{1 << 63}]", f"[0,{1 << 62},4]", f"[{1 << 62}]", f"[{1 << 63}]")
    for shape in wraps:
        yield st(f"S23 shape {shape}", "SHAPE", one(shape), says=("'t'",))
    for number in ("18446744073709551616", "1e2", "00", "-0", "0x10", "1.0", "+4", ".5", "NaN", "true", "null"):
        yield st(f"S26 shape [{number}]", "JSON", one(f"[{number}]"))
    odd = framed(f'{{"a":{entry("[0]", "[0,0]")},"b":{entry("[3,0]", "[0,0]")},"c":{entry("[]", "[0,4]")}}}', struct.pack("<f", 2.5))
    yield st("S28 empty and scalar", "OK", odd, check=check_odd)
    yield st("S28 no tensors", "OK", framed("{}"), check=lambda file: same(file.tensors, ()))
    for rank in (33, 1000):
        yield st(f"S29 rank {rank}", "SHAPE", one("[" + ",".join(["1"] * rank) + "]", "[0,4]", size=4), says=("'t'",))
    for rank in (8, 9, 32):
        deep = one("[" + "1," * (rank - 1) + "4]")
        yield st(f"S29 rank {rank}", "OK", deep, check=lambda file, rank=rank: same(file.dequantize("t").shape, (1,) * (rank - 1) + (4,)))
    yield st("S30 100 000 empty tensors", "OK", many_tensors, check=lambda file: same(len(file.tensors), 100_000))


def check_odd(file: _core.File) -> None:
    assert sorted((t.name, t.shape) for t in file.tensors) == [("a", (0,)), ("b", (3, 0)), ("c", ())]
    assert (file.dequantize("b").shape, float(file.dequantize("c"))) == ((3, 0), 2.5)


def many_infos() -> bytes:
    return bytes(BG.with_only(*(Info(f"t{n}", (0,), 0, 0) for n in range(100_000))))


def many_kept() -> bytes:
    names = sorted(f"t{n}".encode() for n in range(100_000))
    return bytes(BA.with_only(*(Kept(name, (0, 2), b"") for name in names)))


def many_tensors() -> bytes:
    return framed("{" + ",".join(f'"t{i}":{entry("[0]", "[0,0]")}' for i in range(100_000)) + "}")


# ---- safetensors in several files ------------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS = {FIRST: framed(f'{{"a":{entry()}}}', bytes(16)), SECOND: framed(f'{{"b":{entry("[2,2]")}}}', bytes(16))}


def index(weights: Mapping[str, Any], **more: Any) -> bytes:
    return json.dumps({"metadata": {"total_size": 32}, "weight_map": dict(weights), **more}).encode()


def shard_cases() -> Iterator[Case]:
    good = {"a": FIRST, "b": SECOND}

    def made(name: str, codes: str, weights: Mapping[str, Any], **more: Any) -> Case:
        return Case(name, frozenset(codes.split()), {INDEX: index(weights), **SHARDS}, **more)

    def linked(name: str, codes: str, place: Callable[[Path], None], **more: Any) -> Case:
        return Case(name, frozenset(codes.split()), {INDEX: index(good), FIRST: SHARDS[FIRST]}, place=place, **more)

    yield made("S32 sound", "OK", good, check=lambda file: same(sorted(t.name for t in file.tensors), ["a", "b"]))
    for value in ("../x", "/etc/passwd", "a/b", "..", ".", "", "m\0.safetensors", "a\\b", "x" * 256):
        yield made(f"S32 {value[:20]!r}", "PATH", {"a": FIRST, "b": value})
    yield linked("S33 link out of the folder", "PATH", link_out)
    yield linked("S33 link through a linked folder", "PATH", link_through)
    yield linked("S33 hard link", "OK", hard_link, check=lambda file: same(len(file.tensors), 2))
    for name, place in (("FIFO", lambda folder: os.mkfifo(folder / SECOND)), ("folder", lambda folder: (folder / SECOND).mkdir()),
                        ("device", lambda folder: (folder / SECOND).symlink_to("/dev/zero"))):  # fmt: skip
        yield linked(f"S34 {name}", "NOT_REGULAR PATH", place)
    yield made("S35 in the other shard", "MISSING DUPLICATE", {"a": SECOND, "b": SECOND})
    yield made("S35 both the other way round", "MISSING DUPLICATE", {"a": SECOND, "b": FIRST})
    yield made(
        "S35 a shard that the index does not name", "OK", {"a": FIRST}, check=lambda file: same([t.name for t in file.tensors], ["a"])
    )
    more = {INDEX: index({"a": FIRST}), FIRST: framed(f'{{"a":{entry()},"b":{entry("[4]", "[16,32]")}}}', EMPTY)}
    yield Case("S35 not in the index", frozenset({"COUNT", "MISSING"}), more)
    yield made("S35 nowhere", "MISSING", {**good, "c": FIRST})
    twice = {INDEX: index(good), FIRST: SHARDS[FIRST], SECOND: framed(f'{{"a":{entry()},"b":{entry("[4]", "[16,32]")}}}', EMPTY)}
    yield Case("S35 in both shards", frozenset({"DUPLICATE", "MISSING"}), twice)
    spelt = json.dumps(good)[:-1] + f', "a": "{FIRST}"}}'
    yield Case(
        "S35 twice in the index", frozenset({"DUPLICATE"}), {INDEX: f'{{"metadata": {{}}, "weight_map": {spelt}}}'.encode(), **SHARDS}
    )
    yield Case("S35 shard missing", frozenset({"MISSING"}), {INDEX: index(good), FIRST: SHARDS[FIRST]})
    for name, spoilt in (("list", b"[]"), ("empty", b""), ("cut", index(good)[:-3]), ("number for a name", index({"a": 7}))):
        yield Case(f"S35 index is a {name}", frozenset({"JSON", "TRUNCATED"}), {INDEX: spoilt, **SHARDS})
    yield Case(
        "S36 1 000 000 shards",
        frozenset({"LIMIT"}),
        {INDEX: lambda: index({f"t{n}": f"s{n}.safetensors" for n in range(1_000_000)}), **SHARDS},
    )


def outside(folder: Path) -> Path:
    """A shard beside the folder, where nobody may look for one."""
    path = folder.parent / f"{folder.name}-outside"
    path.mkdir(exist_ok=True)
    (path / SECOND).write_bytes(SHARDS[SECOND])
    return path


def link_out(folder: Path) -> None:
    (folder / SECOND).symlink_to(outside(folder) / SECOND)


def link_through(folder: Path) -> None:
    (folder / "inner").symlink_to(outside(folder))
    (folder / SECOND).symlink_to(Path("inner") / SECOND)


def hard_link(folder: Path) -> None:
    os.link(outside(folder) / SECOND, folder / SECOND)


# ---- config.json -----------------------------------------------------------------------------------------------------

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1, "hidden_size": WIDTH, "intermediate_size": INNER,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD, "vocab_size": VOCAB, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip


@cache
def hf_weights() -> bytes:
    """The same weights as a safetensors file."""
    said, data = {}, b""
    for _, name, shape in WEIGHTS:
        blob = ramp(shape)
        said[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(blob)]}
        data += blob
    return framed(json.dumps(said), data)


def config_case(name: str, codes: str, change: Mapping[str, Any], without: tuple[str, ...] = (), **more: Any) -> Case:
    said = {key: value for key, value in (CONFIG | dict(change)).items() if key not in without}
    files = {"config.json": json.dumps(said).encode(), "model.safetensors": hf_weights()}
    return Case(name, frozenset(codes.split()), files, bind=True, **more)


def config_cases() -> Iterator[Case]:
    yield config_case("J21 valid", "OK", {}, check=check_runs)
    yield config_case("J21 10^9 layers", "CONFIG", {"num_hidden_layers": 10**9}, says=("num_hidden_layers", str(10**9)))
    yield config_case("J21 -1 layers", "CONFIG", {"num_hidden_layers": -1}, says=("num_hidden_layers", "-1"))
    yield config_case("J21 2^64-1 layers", "CONFIG", {"num_hidden_layers": U64 - 1}, says=("num_hidden_layers", str(U64 - 1)))
    yield config_case("J21 4096 layers of a file with one", "MISSING", {"num_hidden_layers": 4096})
    yield config_case("J21 no heads", "CONFIG", {"num_attention_heads": 0}, says=("0",))
    yield config_case("J21 width by heads", "CONFIG", {"num_attention_heads": 5}, ("head_dim", "num_key_value_heads"), says=("32", "5"))
    for key in ("num_attention_heads", "head_dim"):
        for value in ("4", True, [4], 4.0):
            yield config_case(f"J22 {key} {json.dumps(value)}", "CONFIG", {key: value}, says=(key,))
        yield config_case(
            f"J22 {key} an object", "UNSUPPORTED MISSING", {key: {"a": 4}}, says=(key,)
        )  # known by its members, not by its name
    for value in ("1e-6", True, [1e-6]):
        yield config_case(f"J22 eps {json.dumps(value)}", "CONFIG", {"rms_norm_eps": value}, says=("rms_norm_eps",))
    yield config_case("J22 no heads said", "MISSING", {"num_attention_heads": None}, says=("num_attention_heads",))
    for name, member in (
        ("twice", '{"b": 1, "b": 1}'),
        ("twice, escaped", '{"b": 1, "\\u0062": 2}'),
        ("deep", '[[{"c": {"b": 1, "a": {}, "b": 2}}]]'),
    ):
        said = json.dumps(CONFIG)[:-1] + f', "architectures2": [7, {member}]}}'
        yield Case(
            f"J22 key {name} in an array",
            frozenset({"DUPLICATE"}),
            {"config.json": said.encode(), "model.safetensors": hf_weights()},
            says=("config.json",),
        )
    apart = {"config.json": b'{"a": [{"b": 1}, {"b": 1, "c": {"b": 1}}, [{"b": 1}]]}', "model.safetensors": BS}
    yield Case(
        "J22 key once in each object of an array", frozenset({"OK"}), apart, check=lambda file: same(file.get("a")[1]["c"], {"b": 1})
    )
    for scaling in (7, "linear", [1], {"type": 7}, {"rope_type": ["linear"]}):
        yield config_case(f"J23 scaling {json.dumps(scaling)}", "CONFIG UNSUPPORTED", {"rope_scaling": scaling}, says=("rope_scaling",))
    for scaling in ({"type": "linear", "factor": 2.0}, {"rope_type": "twist"}):
        yield config_case(f"J23 scaling {json.dumps(scaling)}", "UNSUPPORTED", {"rope_scaling": scaling}, says=("rope_scaling",))
    yield config_case("J23 no scaling", "OK", {"rope_scaling": None}, check=check_runs)
    for count in (VOCAB - 1, VOCAB + 1):
        yield config_case(f"J24 vocabulary of {count}", "CONFIG", {"vocab_size": count}, says=(str(count), str(VOCAB)))


# ---- APR -------------------------------------------------------------------------------------------------------------


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 64)


@dataclass(frozen=True)
class Kept:
    """A tensor of an APR file: `dims` outermost first.  What is None is worked out; what is given is written, true or not."""

    name: bytes
    dims: tuple[int, ...]
    data: bytes
    kind: int = 0
    offset: int | None = None
    size: int | None = None
    name_length: int | None = None
    rank: int | None = None

    def entry(self, offset: int) -> bytes:
        length = len(self.name) if self.name_length is None else self.name_length
        rank = len(self.dims) if self.rank is None else self.rank
        place = offset if self.offset is None else self.offset
        size = len(self.data) if self.size is None else self.size
        return struct.pack("<H", length) + self.name + struct.pack(f"<BB{len(self.dims)}QQQ", self.kind, rank, *self.dims, place, size)


@dataclass(frozen=True)
class Apr:
    """An APR file to be spoilt: header of 64 bytes, JSON, index, tensors, each padded to 64, and the CRC of it all."""

    magic: bytes = b"APR\0"
    version: tuple[int, int] = (2, 0)
    flags: int = 0x0400  # rows are contiguous
    tensors: tuple[Kept, ...] = (Kept(b"a", (4,), struct.pack("<4f", 1.5, -2, 0.25, 96)), Kept(b"b", (2, 3), struct.pack("<6f", *range(6))))
    metadata: bytes = b'{"model_type":"llama","rms_norm_eps":0.5}'
    count: int | None = None
    metadata_offset: int = 64
    metadata_size: int | None = None
    index_offset: int | None = None
    data_offset: int | None = None
    reserved: bytes = bytes(20)
    crc: int | None = None

    def __bytes__(self) -> bytes:
        blobs = [padded(tensor.data) for tensor in self.tensors]
        offsets = itertools.accumulate(map(len, blobs), initial=0)
        entries, data = b"".join(tensor.entry(at) for tensor, at in zip(self.tensors, offsets, strict=False)), b"".join(blobs)
        said = padded(self.metadata)
        index_at = 64 + len(said) if self.index_offset is None else self.index_offset
        data_at = 64 + len(said) + len(padded(entries)) if self.data_offset is None else self.data_offset
        size = len(self.metadata) if self.metadata_size is None else self.metadata_size
        count = len(self.tensors) if self.count is None else self.count
        head = self.magic + bytes(self.version) + struct.pack("<HIQIQQ", self.flags, count, self.metadata_offset, size, index_at, data_at)
        crc = zlib.crc32(head + self.reserved) if self.crc is None else self.crc
        whole = head + struct.pack("<I", crc) + self.reserved + said + padded(entries) + data
        return whole + struct.pack("<I", zlib.crc32(whole))

    def with_first(self, **changes: Any) -> Apr:
        return replace(self, tensors=(replace(self.tensors[0], **changes), *self.tensors[1:]))

    def with_only(self, *tensors: Kept) -> Apr:
        return replace(self, tensors=tensors)


BA = Apr()


def apr(name: str, codes: str, data: Apr | bytes, **more: Any) -> Case:
    return case(name, codes, bytes(data), "x.apr", **more)


def apr_cases() -> Iterator[Case]:
    yield apr("A00 valid", "OK", BA, check=check_apr)
    for n in range(64):
        yield apr(f"A01 {n} bytes", "TRUNCATED", bytes(BA)[:n])
    for magic, name in ((b"APR1", "APR1"), (b"APRN", "APRN"), (b"APR2", "APR2")):
        yield apr(f"A02 {name}", "BAD_MAGIC", replace(BA, magic=magic), says=(name,))
    yield apr(
        "A02 GGUF", "BAD_MAGIC BAD_VERSION", replace(BA, magic=b"GGUF")
    )  # judged by its bytes, which say GGUF of a version unheard of
    for version in ((1, 0), (3, 0), (255, 255)):
        yield apr(f"A03 version {version[0]}.{version[1]}", "BAD_VERSION", replace(BA, version=version), says=(str(version[0]),))
    whole = bytes(BA)
    for bit in range(512):
        spoilt = whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :]
        yield apr(f"A04 header bit {bit}", "CHECKSUM BAD_MAGIC", spoilt)
    yield from apr_place_cases()
    yield from apr_name_cases()
    yield from apr_tensor_cases()
    yield from apr_flag_cases()
    yield from apr_model_cases()


def check_apr(file: _core.File) -> None:
    assert file.container == "apr"
    assert sorted((t.name, t.format, t.shape, t.nbytes) for t in file.tensors) == [("a", "F32", (4,), 16), ("b", "F32", (2, 3), 24)]
    assert file.dequantize("a").tolist() == [1.5, -2, 0.25, 96]
    assert file.dequantize("b").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert file.verify()


def apr_place_cases() -> Iterator[Case]:
    size = len(bytes(BA))
    for offset in (U64 - 1, size, size + 1):
        yield apr(f"A05 metadata at {power(offset)}", "OFFSET", replace(BA, metadata_offset=offset))
    yield apr("A06 metadata wraps", "OFFSET", replace(BA, metadata_offset=U64 - 8))
    yield apr("A07 metadata in the header", "OVERLAP", replace(BA, metadata_offset=0))
    yield apr("A08 metadata of 2^32-1", "OFFSET", replace(BA, metadata_size=U32 - 1))
    for name, codes, said in (
        ("no JSON", "JSON", b"hello"), ("cut", "JSON", BA.metadata[:-1]), ("deep", "DEPTH", b'{"a":' + b"[" * 100_000),
        ("not UTF-8", "UTF8", b'{"a":"\xff"}'), ("empty", "JSON", b""), ("a list", "JSON", b"[]"), ("NaN", "JSON", b'{"a":NaN}'),
    ):  # fmt: skip
        yield apr(f"A09 metadata {name}", codes, replace(BA, metadata=said))
    repeated = replace(BA, metadata=b'{"model_type":"llama","rms_norm_eps":0.25,"rms_norm_eps":0.5}')
    yield apr(
        "A10 metadata twice, the last wins",
        "OK",
        repeated,
        check=lambda file: same(([v for v in file.metadata.values() if isinstance(v, float)], len(file.notes)), ([0.5], 1)),
    )
    header = bytes(replace(BA, count=U32 - 1, metadata=b"{}", tensors=(), metadata_size=0, index_offset=64, data_offset=64))[:64]
    yield apr("A11 2^32-1 tensors in 64 bytes", "COUNT", header, says=(str(U32 - 1),))
    yield apr("A11 2^32-1 tensors", "COUNT", replace(BA, count=U32 - 1), says=(str(U32 - 1),))
    yield case("A11 100 000 tensors", "OK", many_kept, "x.apr", check=lambda file: same(file.tensors[99_999].shape, (0, 2)))
    wide = BA.with_only(Kept(b"a", (1,) * 7 + (4,), BA.tensors[0].data))  # its dimensions fill the index: there is no room for a second
    yield apr("A11 two tensors in the room of one", "STRING TRUNCATED NAME COUNT", replace(wide, count=2))
    yield apr("A11 one tensor more", "STRING NAME COUNT OVERLAP OFFSET", replace(BA, count=3))
    for offset, codes in ((size + 1, "OFFSET"), (U64 - 1, "OFFSET"), (0, "OFFSET OVERLAP"), (32, "OFFSET OVERLAP")):
        yield apr(f"A12 index at {power(offset)}", codes, replace(BA, index_offset=offset))
    for offset in (size + 1, U64 - 1, U64 - 64):
        yield apr(f"A12 data at {power(offset)}", "OFFSET", replace(BA, data_offset=offset))


def apr_name_cases() -> Iterator[Case]:
    yield apr("A13 name of 65535", "STRING", BA.with_first(name_length=65535))
    yield apr("A13 no name", "NAME", BA.with_first(name=b""))
    first, second = BA.tensors
    yield apr("A14 names FF and FE", "UTF8", BA.with_only(replace(first, name=b"\xfe"), replace(second, name=b"\xff")))
    yield apr("A15 unsorted", "NAME", BA.with_only(replace(first, name=b"b"), replace(second, name=b"a")))
    yield apr("A15 same name", "DUPLICATE", BA.with_only(first, replace(second, name=b"a")), says=("a",))


def apr_tensor_cases() -> Iterator[Case]:
    for kind in (2, 10, 31, 127, 130, 255):
        yield apr(f"A16 format {kind}", "TYPE", BA.with_first(kind=kind), says=(str(kind),))
    block = struct.pack("<H", 0x3C00) + bytes([0x98] * 16)  # scale 1, low half 8: nought, high half 9: one
    for kind in (8, 128):
        yield apr(
            f"A16 AprQ4 as {kind}",
            "OK",
            BA.with_only(Kept(b"t", (64,), block * 2, kind)),
            check=lambda file: same(sorted(set(file.dequantize("t").tolist())), [0, 1]),
        )
    for kind in (9, 129):
        eight = Kept(b"t", (4,), struct.pack("<f4b", 0.5, 1, -2, 3, -128), kind)
        yield apr(
            f"A16 AprQ8 as {kind}", "OK", BA.with_only(eight), check=lambda file: same(file.dequantize("t").tolist(), [0.5, -1, 1.5, -64])
        )
    yield apr("A17 rank 9", "SHAPE", BA.with_first(dims=(4,) + (1,) * 8), says=("9", "8"))
    yield apr("A17 rank 255", "SHAPE", BA.with_first(rank=255), says=("255", "8"))
    yield apr(
        "A17 scalar", "OK", BA.with_only(Kept(b"t", (), struct.pack("<f", 2.5))), check=lambda file: same(float(file.dequantize("t")), 2.5)
    )
    for dims in ((U32, U32), (I64_MAX, 2), (U64 - 1,), (1 << 63, 2), (0, 1 << 63, 1 << 63)):
        yield apr(f"A18 {' x '.join(map(power, dims))}", "SHAPE", BA.with_first(dims=dims))
    yield apr("A18 nought", "OK", BA.with_only(Kept(b"t", (3, 0), b"")), check=lambda file: same(file.dequantize("t").shape, (3, 0)))
    for size in (15, 17, 0, 1 << 63):
        yield apr(f"A19 {power(size)} bytes for 16", "SIZE", BA.with_first(size=size), says=(str(size), "16"))
    yield apr("A20 AprQ4 of 64 in 18 bytes", "SIZE", BA.with_only(Kept(b"t", (64,), block, 128)), says=("18", "36"))
    yield apr("A21 AprQ4 of 2^40 in 18 bytes", "SIZE", BA.with_only(Kept(b"t", (1 << 40,), block, 128)), says=("18",))
    yield apr("A22 offset wraps", "OFFSET", BA.with_first(offset=U64 - 64))
    yield apr("A22 offset past the end", "OFFSET", BA.with_first(offset=1 << 20))
    yield apr(
        "A23 offset +4",
        "OK",
        BA.with_only(Kept(b"t", (4,), bytes(4) + BA.tensors[0].data, offset=4, size=16)),
        check=lambda file: same((file.dequantize("t").tolist(), len(file.notes)), ([1.5, -2, 0.25, 96], 1)),
    )
    first, second = BA.tensors
    yield apr("A24 one range", "OVERLAP", BA.with_only(first, replace(second, offset=0)))
    yield apr("A24 half overlap", "OVERLAP", BA.with_only(first, replace(second, offset=8)))
    spoilt = bytearray(bytes(BA))
    spoilt[-4 - 64] ^= 1  # the first byte of the last tensor
    yield apr("A29 data bit", "OK", bytes(spoilt), check=check_damage)


def check_damage(file: _core.File) -> None:
    """Opening does not read the checksum; asking for it does."""
    assert file.dequantize("b")[0, 0] != 0
    try:
        file.verify()
    except Error as problem:
        assert problem.code == "CHECKSUM"  # noqa: PT017
    else:
        raise AssertionError("the damage was not seen")


def apr_flag_cases() -> Iterator[Case]:
    for name, flag in (("LZ4", 1), ("ZSTD", 2), ("encrypted", 4)):
        yield apr(f"A25 {name}", "UNSUPPORTED", replace(BA, flags=0x0400 | flag))
    yield apr("A26 column-major", "UNSUPPORTED", replace(BA, flags=0x0800))
    yield apr("A26 no layout said", "OK", replace(BA, flags=0), check=check_apr)
    yield apr("A27 reserved bytes", "OK", replace(BA, reserved=b"x" * 20), check=lambda file: (check_apr(file), same(len(file.notes), 1)))
    for name, sharding in (
        ("pattern ../x", {"shard_count": 2, "shard_index": 0, "pattern": "../x"}),
        ("index 2 of 2", {"shard_count": 2, "shard_index": 2}),
    ):
        said = json.dumps({"model_type": "llama", "sharding": sharding}).encode()  # refusing shards altogether opens no path either
        yield apr(f"A28 {name}, flag set", "PATH CONFIG UNSUPPORTED", replace(BA, flags=0x0410, metadata=said))
        yield apr(f"A28 {name}", "PATH CONFIG", replace(BA, metadata=said))


APR_SAID: dict[str, Any] = {
    "architecture": "llama", "num_layers": 1, "hidden_size": WIDTH, "intermediate_size": INNER, "num_heads": HEADS,
    "num_kv_heads": KV_HEADS, "head_dim": HEAD, "vocab_size": VOCAB, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "rope_type": 2,
}  # fmt: skip


def apr_model(change: Mapping[str, Any]) -> Apr:
    kept = tuple(sorted((Kept(name.encode(), shape, ramp(shape)) for _, name, shape in WEIGHTS), key=lambda tensor: tensor.name))
    return Apr(tensors=kept, metadata=json.dumps(APR_SAID | dict(change)).encode())


def apr_model_cases() -> Iterator[Case]:
    yield apr("A30 valid", "OK", apr_model({}), bind=True, check=check_runs)
    for value in ("32", -1, 1e308, None, True):
        yield apr(f"A30 width {json.dumps(value)}", "MISSING" if value is None else "CONFIG", apr_model({"hidden_size": value}), bind=True)
    payload = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% include '/etc/passwd' %}"
    yield apr(
        "A31 template",
        "OK",
        apr_model({"chat_template": payload}),
        bind=True,
        check=lambda model: same(payload in model.file.metadata.values(), True),
    )


# ---- all of it -------------------------------------------------------------------------------------------------------


@cache
def reads(what: str) -> bool:
    """Whether this build reads a container that came later than this file.  Only a plain UNSUPPORTED counts as not yet."""
    import tempfile

    trial = next(iter(shard_cases() if what == "shards" else split_cases()))
    with tempfile.TemporaryDirectory() as folder:
        return outcome(replace(trial, check=None), Path(folder)).code != "UNSUPPORTED"


def cases() -> list[Case]:
    """The rows of every container that this build reads."""
    found = [*gguf_cases(), *model_cases(), *safetensors_cases(), *config_cases()]
    found += split_cases() if reads("split") else ()
    found += shard_cases() if reads("shards") else ()
    found += apr_cases() if "apr" in _core.CONTAINERS else ()
    return found


def main(folder: str, ceiling: str) -> None:
    """Every case in this process, which may map `ceiling` bytes in all (0: any number); a line of JSON for each."""
    if int(ceiling):
        resource.setrlimit(resource.RLIMIT_AS, (int(ceiling), resource.RLIM_INFINITY))
    rows = cases()
    for number, row in enumerate(rows):
        place = Path(folder) / str(number)
        place.mkdir()
        print(json.dumps({"name": row.name, **asdict(outcome(row, place))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
