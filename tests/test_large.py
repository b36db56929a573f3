"""Floor 2: of a large file only what describes it is read at open; a tensor's bytes come when they are wanted, from the file as it was.

The files are sparse, so that they cost no disk; 8 MiB (`AP_FILE_WHOLE` in csrc/file/file.h) is where a file counts as large.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny

from aprender import _core
from aprender.errors import FormatError

LARGE = 8 << 20
VALUES = LARGE // 4  # float32 values of each tensor: a file of two of them is twice as large as it need be


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def gguf(path: Path, pairs: bytes = b"", count: int = 0) -> Path:
    """Tensors a and b, all zero but for their first and last value: 1, 2 and 3, 4."""
    infos = b"".join(text(name) + struct.pack("<IQIQ", 1, VALUES, 0, offset) for name, offset in ((b"a", 0), (b"b", LARGE)))
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, count) + pairs + infos
    head += bytes(-len(head) % 32)
    with path.open("wb") as out:
        out.write(head)
        out.truncate(len(head) + 2 * LARGE)
        for place, value in ((0, 1.0), (VALUES - 1, 2.0), (VALUES, 3.0), (2 * VALUES - 1, 4.0)):
            out.seek(len(head) + 4 * place)
            out.write(struct.pack("<f", value))
    return path


def ends(file: _core.File, name: str) -> tuple[float, float]:
    values = file.dequantize(name)
    assert np.count_nonzero(values) == 2
    return float(values[0]), float(values[-1])


def test_right_values_and_little_memory(tmp_path: Path) -> None:
    before = _core._live_bytes()
    file = _core.File(gguf(tmp_path / "m.gguf"))
    assert _core._live_bytes() - before < LARGE + (1 << 16)  # of 16 MiB
    assert file.nbytes > 2 * LARGE
    assert ends(file, "b") == (3, 4)
    assert ends(file, "a") == (1, 2)
    assert file.raw("a") is not file.raw("a")
    assert np.shares_memory(file.raw("a"), file.raw("a"))


def test_a_view_outlives_the_file(tmp_path: Path) -> None:
    raw = _core.File(gguf(tmp_path / "m.gguf")).raw("b")
    assert raw[:4].tobytes() == struct.pack("<f", 3)


def test_metadata_longer_than_the_first_piece(tmp_path: Path) -> None:
    """12 MB of tokens: read on until all is there; a wrong length is an error, not a search to the end."""
    words = b"".join(text(b"word%08d" % number) for number in range(600_000))
    pairs = text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 600_000) + words
    file = _core.File(gguf(tmp_path / "m.gguf", pairs, 1))
    assert file.get("tokenizer.ggml.tokens")[-1] == "word00599999"
    assert ends(file, "b") == (3, 4)
    spoilt = pairs[:-20] + struct.pack("<Q", 1 << 40) + pairs[-12:]
    with pytest.raises(FormatError) as caught:
        _core.File(gguf(tmp_path / "n.gguf", spoilt, 1))
    assert caught.value.code == "STRING"


def test_changed_while_open(tmp_path: Path) -> None:
    """What was read stays as it was; what was not cannot be had any more."""
    path = gguf(tmp_path / "m.gguf")
    file = _core.File(path)
    assert ends(file, "a") == (1, 2)
    with path.open("r+b") as out:
        out.seek(-4, os.SEEK_END)
        out.write(struct.pack("<f", 5))
    os.utime(path, ns=(1, 1))  # whatever the clock's grain
    assert ends(file, "a") == (1, 2)
    with pytest.raises(FormatError, match="written to since") as caught:
        file.raw("b")
    assert caught.value.code == "CHANGED"


def test_truncated_while_open(tmp_path: Path) -> None:
    path = gguf(tmp_path / "m.gguf")
    file = _core.File(path)
    os.truncate(path, LARGE)
    with pytest.raises(FormatError, match="shrank") as caught:
        file.dequantize("b")
    assert caught.value.code == "CHANGED"


def test_replaced_while_open(tmp_path: Path) -> None:
    """Another file under the name is another file."""
    path = gguf(tmp_path / "m.gguf")
    file = _core.File(path)
    (tmp_path / "new").write_bytes(b"something else")
    os.replace(tmp_path / "new", path)
    assert ends(file, "b") == (3, 4)
    path.unlink()
    assert ends(file, "a") == (1, 2)


def test_many_threads_read_once(tmp_path: Path) -> None:
    file = _core.File(gguf(tmp_path / "m.gguf"))
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(file.raw("a").ctypes.data)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 8


def test_bytes_that_belong_to_nothing_are_looked_for(tmp_path: Path) -> None:
    """Padding and tail lie beyond the first piece."""
    path = gguf(tmp_path / "m.gguf")
    with path.open("ab") as out:
        out.write(bytes(31))
    assert _core.File(path)
    with path.open("ab") as out:
        out.write(b"\1")
    with pytest.raises(FormatError) as caught:
        _core.File(path)
    assert caught.value.code == "GAP"


def test_the_checksum_of_a_large_file(tmp_path: Path) -> None:
    """And of one that is damaged far behind."""
    values = np.zeros(VALUES, np.float32)
    data = tiny.apr_file({"a": (0, values.shape, values.tobytes()), "b": (0, values.shape, values.tobytes())}, b"{}")
    path = tmp_path / "m.apr"
    path.write_bytes(data)
    assert _core.File(path).verify() is True
    path.write_bytes(data[:-100] + b"\1" + data[-99:])
    with pytest.raises(FormatError) as caught:
        _core.File(path).verify()
    assert caught.value.code in ("CHECKSUM", "GAP")


def test_a_large_model_is_the_same_model(tmp_path: Path) -> None:
    """Bound from a file read in pieces: the weights are right, the stages alike in all containers."""
    shape = tiny.Shape(vocab=40_000, layers=1)
    folder, path = tiny.save_hf(shape, tmp_path / "hf", dtype="float32"), tiny.save_gguf(shape, tmp_path / "m.gguf", "F32")
    assert min(path.stat().st_size, (folder / "model.safetensors").stat().st_size) > LARGE
    digests = []
    for source in (folder, path, tiny.save_apr(shape, tmp_path / "m.apr")):
        model = _core.Model(_core.File(source))
        kept = _core.Run(model).forward([1, 39_999], "all")
        digests.append(hashlib.sha256(b"".join(kept[key].tobytes() for key in kept)).hexdigest())
        assert np.array_equal(model.weight("token_embd"), tiny.weights(shape)["model.embed_tokens.weight"])
    assert len(set(digests)) == 1


def test_a_header_that_is_json_to_its_end(tmp_path: Path) -> None:
    """A safetensors header of 9 MB."""
    entries = {f"tensor-number-{i:06d}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(120_000)}
    header = json.dumps(entries).encode()
    assert len(header) > LARGE
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    assert len(_core.File(path).tensors) == 120_000


# ---- mapped ------------------------------------------------------------------------------------------------------------------------------


def stages(model: _core.Model) -> dict[str, bytes]:
    return {str(key): value.tobytes() for key, value in _core.Run(model).forward([1, 2, 3], "all").items()}


def test_a_mapped_model_is_the_same_model(tmp_path: Path) -> None:
    shape = tiny.Shape()
    folder = tmp_path / "shards"
    tiny.hf_model(shape).save_pretrained(folder, max_shard_size="40KB")
    for path in (tiny.save_gguf(shape, tmp_path / "m.gguf", "Q8_0"), folder):
        read, mapped = _core.File(path), _core.File(path, mmap=True)
        assert stages(_core.Model(read)) == stages(_core.Model(mapped))
        name = read.tensors[3].name
        assert np.array_equal(read.raw(name), mapped.raw(name))
        assert np.array_equal(read.dequantize(name), mapped.dequantize(name))
        with pytest.raises(ValueError, match="read-only"):
            mapped.raw(name)[0] = 1


def test_mapping_takes_no_memory(tmp_path: Path) -> None:
    before = _core._live_bytes()
    file = _core.File(gguf(tmp_path / "m.gguf"), mmap=True)
    assert ends(file, "a") == (1, 2)
    assert ends(file, "b") == (3, 4)
    assert _core._live_bytes() - before < LARGE + (1 << 16)


def test_a_mapped_file_that_shrinks_is_an_error_and_no_signal(tmp_path: Path) -> None:
    """Of all that may be computed with it; the process lives, and other files are as they were."""
    shape = tiny.Shape(vocab=2000)
    path = tiny.save_gguf(shape, tmp_path / "m.gguf", "F32")
    other = _core.Model(_core.File(tiny.save_gguf(shape, tmp_path / "other.gguf", "F32"), mmap=True))
    good = stages(other)
    file = _core.File(path, mmap=True)
    model = _core.Model(file)
    assert stages(model) == good
    os.truncate(path, 4096)
    name = model.weights[-1].tensor
    for use in (
        lambda: stages(model), lambda: file.raw(name), lambda: file.dequantize(name), lambda: model.weight("output"),
        lambda: model.weight_raw("output"),
    ):  # fmt: skip
        with pytest.raises(FormatError) as caught:
            use()
        assert caught.value.code == "CHANGED"
    assert stages(other) == good


def test_a_mapped_file_that_is_written_to(tmp_path: Path) -> None:
    path = tiny.save_gguf(tiny.Shape(), tmp_path / "m.gguf", "F32")
    model = _core.Model(_core.File(path, mmap=True))
    stages(model)
    with path.open("r+b") as out:
        out.seek(-4, os.SEEK_END)
        out.write(b"abcd")
    os.utime(path, ns=(1, 1))
    with pytest.raises(FormatError) as caught:
        stages(model)
    assert caught.value.code == "CHANGED"


def test_another_handler_of_bus_errors_is_left_alone() -> None:
    """A fault outside our maps goes to who came before: here to faulthandler, which ends the process with a traceback."""
    code = (
        "import faulthandler, sys, mmap, tempfile, os; faulthandler.enable()\n"
        "from aprender import _core, canary\n"
        "keep = _core.File(canary(), mmap=True)\n"
        "file = tempfile.TemporaryFile(); file.truncate(8192); view = mmap.mmap(file.fileno(), 8192); file.truncate(0)\n"
        "print(view[5000])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout == ""  # nothing was read
    if "libasan" in os.environ.get("LD_PRELOAD", ""):  # the sanitizer's handler came before, and reports in its own file
        assert ran.returncode not in (0, -signal.SIGSEGV)
        return
    assert ran.returncode == -signal.SIGBUS
    assert "Bus error" in ran.stderr
