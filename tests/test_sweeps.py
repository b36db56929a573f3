"""Floor 2: whatever is done to a sound file, what comes out is a documented error or a file that can be read, in little memory.

No imagination is needed: the smallest valid file of each container is cut at every byte, each byte is replaced, each bit flipped, every
number-sized place filled with the values that break arithmetic, in pairs too where numbers are known to be, and two files are spliced.
Each sweep says how many files it made and how many of them opened; ``pytest -rP`` shows it.  The rows that need imagination are in
``test_hostile.py``.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import re
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import hostile
import pytest

from aprender import _core
from aprender.errors import Error

CLASSES = {code: kind for _, code, kind in _core.ERRORS}
SLACK = 64 << 10  # beside four times the file: what a File, its messages and a Model take
EDGES = (0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)

Spoil = Callable[[bytes], Iterator[bytes]]


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory: a disk would be asked to keep each of a hundred thousand files."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        yield Path(name)


class Sweep:
    """Puts one file after the other at the same place and opens it."""

    def __init__(self, path: Path, target: Path | None = None, bind: bool = False) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self.target = os.fspath(target or path)
        self.bind = bind
        self.codes: Counter[str] = Counter()
        self.most = 0
        gc.collect()

    def code(self, data: bytes) -> str:
        """The code of the error, or "OK".  Any other exception comes through."""
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, data, 0)
        _core._peak_bytes()
        before, read = _core._live_bytes(), 0
        try:
            file = _core.File(self.target)
            if self.bind:
                _core.Model(file)
            for info in file.tensors:
                read += file.raw(info.name).nbytes
            assert len(file.metadata) == len(file.keys)
            code = "OK"
        except Error as problem:
            code = str(problem.code)
            message = str(problem)
            if type(problem).__name__ != CLASSES[code]:
                raise
            assert len(message) < 1024, message
            assert message.isprintable(), message
        file = None
        growth = _core._peak_bytes() - before
        assert growth <= 4 * len(data) + read + SLACK
        self.most = max(self.most, growth)
        assert _core._live_bytes() <= before  # less where the collector just found what an earlier test had left
        self.codes[code] += 1
        return code

    def all(self, files: Iterator[bytes]) -> Counter[str]:
        try:
            for data in files:
                self.code(data)
        except Exception as problem:
            problem.add_note(f"the file: {data[:4096].hex()}")
            raise
        finally:
            os.close(self.fd)
        print(
            f"{self.codes.total()} files, {self.codes['OK']} of them open; at most {self.most} bytes held; {dict(self.codes.most_common())}"
        )
        return self.codes


# ---- what is done to a file ------------------------------------------------------------------------------------------


def cut(whole: bytes) -> Iterator[bytes]:
    """At every byte."""
    for n in range(len(whole)):
        yield whole[:n]


def bytewise(whole: bytes) -> Iterator[bytes]:
    """Each byte one of the four at the edges."""
    for at in range(len(whole)):
        for value in (0x00, 0x7F, 0x80, 0xFF):
            yield whole[:at] + bytes([value]) + whole[at + 1 :]


def bitwise(whole: bytes) -> Iterator[bytes]:
    for at in range(len(whole)):
        for bit in range(8):
            yield whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]


def edges(size: int) -> tuple[int, ...]:
    return (*EDGES, size - 1, size, size + 1)


def put(whole: bytes, at: int, width: int, value: int) -> bytes:
    return whole[:at] + (value % (1 << 8 * width)).to_bytes(width, "little") + whole[at + width :]


def fieldwise(whole: bytes) -> Iterator[bytes]:
    """Four and eight bytes at every place: fields of these containers stand anywhere, not at multiples of four."""
    for width in (4, 8):
        for at in range(len(whole) - width + 1):
            for value in edges(len(whole)):
                if value < 1 << 8 * width:
                    yield put(whole, at, width, value)


def textual(whole: bytes) -> Iterator[bytes]:
    """JSON: every run of digits becomes each of the values; every byte goes, or stands twice; a quote, bracket
    or comma comes in; each string becomes each of the others."""
    text, at = whole.decode(), 0
    while at < len(text):
        end = at
        while end < len(text) and text[end].isdigit():
            end += 1
        if end > at:
            for value in (*edges(len(whole)), -1, "1e400", "1.5", "00", "0" * 200, "NaN", "null", "[]", "{}", '""'):
                yield (text[:at] + str(value) + text[end:]).encode()
        at = max(at + 1, end)
    for at in range(len(text)):
        yield (text[:at] + text[at + 1 :]).encode()
        yield (text[:at] + text[at] + text[at:]).encode()
        for letter in '"{}[],:\\0\n':
            yield (text[:at] + letter + text[at:]).encode()
    strings = list(re.finditer(r'"[^"]*"', text))
    for string, other in itertools.permutations(strings, 2):
        yield (text[: string.start()] + other[0] + text[string.end() :]).encode()


def framed_text(whole: bytes) -> Iterator[bytes]:
    """The JSON header of a safetensors file, with the length that it then has."""
    length = struct.unpack_from("<Q", whole)[0]
    for text in textual(whole[8 : 8 + length]):
        yield hostile.framed(text, whole[8 + length :])


def pairwise(places: list[tuple[int, int]], *more: int) -> Spoil:
    """Two fields (place, width) at once, each with each value, those given among them."""

    def spoil(whole: bytes) -> Iterator[bytes]:
        for (a, width), (b, other) in itertools.combinations(places, 2):
            for first, second in itertools.product((*edges(len(whole)), *more), repeat=2):
                yield put(put(whole, a, width, first), b, other, second)

    return spoil


def spliced(other: bytes) -> Spoil:
    """The beginning of one and the end of the other, at every eighth byte of each."""

    def spoil(whole: bytes) -> Iterator[bytes]:
        for first, second in ((whole, other), (other, whole)):
            for at in range(0, len(first) + 1, 8):
                for to in range(0, len(second) + 1, 64):
                    yield first[:at] + second[to:]
                yield first[:at] + second[at:]

    return spoil


def sealed(spoil: Spoil) -> Spoil:
    """APR: the header's checksum made right again, so that what stands behind it is reached."""

    def spoilt(whole: bytes) -> Iterator[bytes]:
        for data in spoil(whole):
            yield data if len(data) < 64 else put(data, 40, 4, zlib.crc32(data[:40] + data[44:64]))

    return spoilt


# ---- the files -------------------------------------------------------------------------------------------------------


#: Header counts, key length, value type, array type and count, name length, rank, dimensions, format, offsets of the last tensors.
GGUF_FIELDS = [(8, 8), (16, 8), (24, 8)]
GGUF_FIELDS += [(hostile.WHOLE.index(b"a.list") + at, width) for at, width in ((6, 4), (10, 4), (14, 8))]
GGUF_FIELDS += [
    (hostile.WHOLE.index(bytes(hostile.BG.infos[1])) + at, width) for at, width in ((0, 8), (9, 4), (13, 8), (21, 8), (29, 4), (33, 8))
]

#: Flags and count, metadata offset and size, index, data; of the first entry the lengths, format, dimension, offset, size.
APR_BYTES = bytes(hostile.BA)
APR_FIELDS = [(6, 2), (8, 4), (12, 8), (20, 4), (24, 8), (32, 8)]
APR_FIELDS += [(struct.unpack_from("<Q", APR_BYTES, 24)[0] + at, width) for at, width in ((0, 2), (3, 1), (4, 1), (5, 8), (13, 8), (21, 8))]

TINY_BPE = hostile.strings("tokenizer.ggml.tokens", ["a", "b"])
OTHER_GGUF = bytes(hostile.Gguf(pairs=(TINY_BPE,), infos=(hostile.Info("z", (32,), 8, 0),), data=bytes(34)))
OTHER_ST = hostile.framed(f'{{"__metadata__":{{"k":"v"}},"c":{hostile.entry("[2]", "[0,4]", chr(34) + "F16" + chr(34))}}}', bytes(4))
OTHER_APR = bytes(hostile.replace(hostile.BA.with_only(hostile.Kept(b"z", (64,), bytes(36), 128)), metadata=b'{"architecture":"qwen2"}'))

BINARY = {
    "gguf": (hostile.WHOLE, "x.gguf", OTHER_GGUF),
    "safetensors": (hostile.BS, "x.safetensors", OTHER_ST),
    "apr": (APR_BYTES, "x.apr", OTHER_APR),
}
#: What every sweep of a container must have met, or it did not reach what it should.
MET = {
    "gguf": {"BAD_MAGIC", "BAD_VERSION", "COUNT", "STRING", "NAME", "UTF8", "TYPE", "SHAPE", "BLOCK", "ALIGN", "OFFSET", "OVERLAP", "GAP"},
    "safetensors": {"LIMIT", "TRUNCATED", "JSON", "UTF8"},
    "apr": {"BAD_MAGIC", "CHECKSUM", "JSON", "UTF8", "STRING", "NAME", "TYPE", "SHAPE", "SIZE", "OFFSET", "OVERLAP", "GAP"},
}
BEHIND = {"BAD_VERSION", "UNSUPPORTED", "COUNT"}
SIMPLE: dict[str, Spoil] = {"bytes": bytewise, "bits": bitwise, "fields": fieldwise}


@pytest.mark.parametrize("container", BINARY)
def test_cut(container: str, folder: Path) -> None:
    """No beginning of a file is a file."""
    whole, name, _ = BINARY[container]
    assert Sweep(folder / "sound").code(whole) == "OK"
    codes = Sweep(folder / name).all(cut(whole))
    if container == "apr":  # writers that left out the checksum at the end, or the padding before it, are read
        assert codes["OK"] <= 2
    else:
        assert codes["OK"] == 0
    assert codes.total() == len(whole)


@pytest.mark.parametrize("sweep", SIMPLE)
@pytest.mark.parametrize("container", BINARY)
def test_everywhere(container: str, sweep: str, folder: Path) -> None:
    whole, name, _ = BINARY[container]
    codes = Sweep(folder / name).all(SIMPLE[sweep](whole))
    assert MET[container] <= set(codes)
    assert codes["OK"]  # a changed value is a valid file


@pytest.mark.parametrize("sweep", SIMPLE)
def test_behind_the_checksum(sweep: str, folder: Path) -> None:
    codes = Sweep(folder / "x.apr").all(sealed(SIMPLE[sweep])(APR_BYTES))
    assert codes["CHECKSUM"] == 0
    assert BEHIND | MET["apr"] - {"CHECKSUM"} <= set(codes)


@pytest.mark.parametrize(("whole", "name", "spoil"), [
    pytest.param(hostile.WHOLE, "x.gguf", pairwise(GGUF_FIELDS), id="gguf"),
    pytest.param(APR_BYTES, "x.apr", sealed(pairwise(APR_FIELDS)), id="apr"),
])  # fmt: skip
def test_pairs_of_fields(whole: bytes, name: str, spoil: Spoil, folder: Path) -> None:
    """Sums and products of two values that are each harmless."""
    codes = Sweep(folder / name).all(spoil(whole))
    assert codes.total() == 66 * 144
    assert {"COUNT", "STRING", "SHAPE", "OFFSET", "OVERLAP", "GAP", "TYPE"} <= set(codes)


@pytest.mark.parametrize("container", BINARY)
def test_spliced(container: str, folder: Path) -> None:
    whole, name, other = BINARY[container]
    codes = Sweep(folder / name).all(spliced(other)(whole))
    assert codes["OK"] >= 2  # the two files themselves


@pytest.mark.parametrize("one", BINARY)
@pytest.mark.parametrize("other", BINARY)
def test_spliced_with_another_container(one: str, other: str, folder: Path) -> None:
    if one != other:
        assert Sweep(folder / BINARY[one][1]).all(spliced(BINARY[other][0])(BINARY[one][0]))["OK"] >= 2


# ---- JSON ------------------------------------------------------------------------------------------------------------


def test_header_as_text(folder: Path) -> None:
    codes = Sweep(folder / "x.safetensors").all(framed_text(hostile.BS))
    assert {"JSON", "SHAPE", "OFFSET", "SIZE", "TYPE", "DUPLICATE", "NAME"} <= set(codes)


def with_config(folder: Path, bind: bool = True) -> Sweep:
    (folder / "model.safetensors").write_bytes(hostile.hf_weights())
    return Sweep(folder / "config.json", folder, bind)


@pytest.mark.parametrize("spoil", [cut, bytewise, bitwise, textual])
def test_configuration(spoil: Spoil, folder: Path) -> None:
    """Opened and bound."""
    whole = json.dumps(hostile.CONFIG | {"rope_scaling": None}).encode()
    codes = with_config(folder).all(spoil(whole))
    assert codes["JSON"]
    assert bool(codes["OK"]) == (spoil is not cut)
    if spoil in (bitwise, textual):
        assert {"MISSING", "CONFIG", "UNSUPPORTED"} <= set(codes)


@pytest.mark.parametrize("spoil", [cut, bytewise, bitwise, textual])
def test_index_of_shards(spoil: Spoil, folder: Path) -> None:
    for name, data in hostile.SHARDS.items():
        (folder / name).write_bytes(data)
    whole = hostile.index({"a": hostile.FIRST, "b": hostile.SECOND})
    codes = Sweep(folder / hostile.INDEX, folder).all(spoil(whole))
    assert codes["JSON"]
    assert bool(codes["OK"]) == (spoil is not cut)
    if spoil in (bitwise, textual):
        assert {"MISSING", "PATH"} <= set(codes)


# ---- models ----------------------------------------------------------------------------------------------------------


def in_pairs(whole: bytes) -> Iterator[bytes]:
    """Every pair of a model's numbers, with small values too."""
    places = [whole.index(key.encode()) + len(key) + 4 for key, (kind, _) in hostile.LLAMA_KEYS.items() if kind == 4]
    yield from pairwise([(at, 4) for at in places], 2, 3, 16, 96)(whole)


def test_hyper_parameters(folder: Path) -> None:
    """A GGUF model bound with every pair of its numbers spoilt."""
    codes = Sweep(folder / "x.gguf", bind=True).all(in_pairs(hostile.llama()))
    assert {"CONFIG", "MISSING"} <= set(codes)


def test_model_keys(folder: Path) -> None:
    """The part of a model's file before its data: each byte and each bit, opened and bound."""
    whole = hostile.llama()
    head = whole.index(b"token_embd.weight") - 8
    codes = Sweep(folder / "x.gguf", bind=True).all(data + whole[head:] for spoil in (bytewise, bitwise) for data in spoil(whole[:head]))
    assert {"CONFIG", "MISSING", "UNSUPPORTED", "KV_TYPE", "OK"} <= set(codes)
