"""Floor 2: what is in a file is what comes out, whatever the container; and the configuration beside the weights.

Values by hand and by NumPy; the grammar of config.json; every cut and flip of a small model, opened, bound and run; what the operating
system says.  The files that are refused, row by row, are in ``test_hostile.py``.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import CANARY, blob, safetensors_bytes, write_folder
from hostile import BG, BS, U64, WHOLE, array, pair, text, u32

from aprender import _core
from aprender.errors import ConfigError, Error, FormatError, UnknownName

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


# ---- values ----------------------------------------------------------------------------------------------------------


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


# ---- cuts and flips of a model ---------------------------------------------------------------------------------------

SMALL = tiny.Shape("qwen3", layers=1, dim=8, ffn=12, heads=2, kv_heads=1, head=4, vocab=10, tied=True)


def bound(file: Callable[[], _core.File]) -> str:
    """Open, bind, run two tokens: the code of the first documented error, or "OK"."""
    try:
        model = _core.Model(file())
        _core.Run(model, threads=1).forward([0, 1])
    except (FormatError, ConfigError) as problem:
        return str(problem.code)
    return "OK"


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


# ---- what is not a file of ours --------------------------------------------------------------------------------------


def test_unknown_bytes(tmp_path: Path) -> None:
    assert code_of(tmp_path, b"no model at all") == "BAD_MAGIC"
    with pytest.raises(FormatError, match="git lfs pull"):
        opened(tmp_path, b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "x.gguf")


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
