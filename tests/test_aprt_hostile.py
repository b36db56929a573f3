"""APRT files and trees that lie: one table of cases T01 to T21, each with the code or the verdict that it must get, and two sweeps.

Everything is built from one minimal file, layer 0 with the values 1, 2, 3, 4.  A case is a name, what it does, and what must come of it:
``OK``, the code of an error, or the exit code of ``diff``.  A case that must be refused has a neighbour that must not.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CANARY
from dying import FAILED

from aprender import _core, aprt, diff, trace
from aprender.captures import Captures, open_captures
from aprender.errors import CannotRun, ConfigError, FormatError, NotComparable
from aprender.manifest import Manifest

WHOLE = 0xFFFFFFFF
OK = "OK"
Capsys = pytest.CaptureFixture[str]


def blob(values: Any = (1, 2, 3, 4), layer: int = 0, count: int | None = None, magic: bytes = b"APRT", order: str = "little") -> bytes:
    """An APRT file; `values` as numbers, or as uint32 bits."""
    array = np.asarray(values)
    array = array if array.dtype == np.uint32 else array.astype(np.float32).view(np.uint32)
    head = magic + layer.to_bytes(4, order) + (array.size if count is None else count).to_bytes(4, order)  # type: ignore[arg-type]
    return head + array.astype("<u4" if order == "little" else ">u4").tobytes()


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """What waits for a pipe's other end would wait for ever."""
    signal.alarm(60)
    yield
    signal.alarm(0)


def code_of(work: Callable[[], Any]) -> str:
    """OK, or the code of the error that comes; one about a file must name it."""
    try:
        work()
    except (FormatError, ConfigError, NotComparable, CannotRun) as problem:
        named = problem.path or isinstance(problem, NotComparable | CannotRun)
        return problem.code or "NO CODE" if named else "NO PATH"
    except OSError as problem:
        return f"OSError {problem.errno}"
    return OK


# ---- T01 to T07: one file ------------------------------------------------------------------------

ONE_FILE: list[tuple[str, bytes, str]] = [
    *((f"T01 short {n}", blob()[:n], "TRUNCATED") for n in range(12)),
    ("T02 magic", blob(magic=b"APRS"), "BAD_MAGIC"),
    ("T02 magic of another format", b"GGUF" + bytes(40), "BAD_MAGIC"),
    ("T03 count_max", blob((), count=WHOLE), "TRUNCATED"),
    *((f"T04 body_short {n}", blob()[:-n], "TRUNCATED") for n in (1, 2, 3, 4)),
    *((f"T05 trailing {n}", blob() + bytes(n), "GAP") for n in (1, 4)),
    ("T06 empty", blob(()), OK),
    ("T06 empty with a body", blob((), count=0) + bytes(4), "GAP"),
    ("T07 byteswapped", blob(order="big"), "TRUNCATED"),
    ("a good one", blob(), OK),
    ("the last layer that is one", blob(layer=WHOLE - 1), OK),
    ("the whole model", blob(layer=WHOLE), OK),
]


@pytest.mark.parametrize(("data", "expected"), [row[1:] for row in ONE_FILE], ids=[row[0] for row in ONE_FILE])
def test_one_file(tmp_path: Path, data: bytes, expected: str) -> None:
    path = tmp_path / "attn_norm.bin"
    path.write_bytes(data)
    assert code_of(lambda: _core.read_aprt(path)) == expected


def test_a_hint_only_where_the_bytes_are_swapped(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(blob(order="big"))
    with pytest.raises(FormatError, match="big-endian") as caught:
        _core.read_aprt(path)
    assert (caught.value.offset, caught.value.field) == (8, "count")
    path.write_bytes(blob()[:-4])
    with pytest.raises(FormatError, match="16 bytes; 12 follow") as caught:
        _core.read_aprt(path)
    assert "big-endian" not in str(caught.value)


def test_a_count_is_not_believed(tmp_path: Path) -> None:
    """T03: 16 GiB are announced; a process that may have 64 MiB more than it has refuses the file, not the memory."""
    (tmp_path / "x.bin").write_bytes(blob((), count=WHOLE))
    child = os.fork()
    if not child:
        code = FAILED
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20), resource.RLIM_INFINITY))
            code = 0 if code_of(lambda: _core.read_aprt(tmp_path / "x.bin")) == "TRUNCATED" else 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_every_cut_and_every_flipped_bit(tmp_path: Path) -> None:
    """A file is covered wholly by its header: every cut is refused; a flipped bit is refused, or is the layer's or a value's, and shows."""
    good, path = blob(), tmp_path / "x.bin"
    for n in range(len(good)):
        path.write_bytes(good[:n])
        assert code_of(lambda: _core.read_aprt(path)) == "TRUNCATED"
    for bit in range(8 * len(good)):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        if 32 <= bit < 64 or bit >= 96:
            layer, values = _core.read_aprt(path)
            assert (layer or 0).to_bytes(4, "little") + bytes(values.view(np.uint8)) == data[4:8] + data[12:]
        else:
            assert code_of(lambda: _core.read_aprt(path)) in ("BAD_MAGIC", "TRUNCATED", "GAP")


def test_nothing_leaks_and_no_memory_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    before = _core._live_bytes()
    for data in (blob(), blob()[:-1], blob(magic=b"NOPE")):
        path.write_bytes(data)
        code_of(lambda: _core.read_aprt(path))
        assert _core._live_bytes() == before
    path.write_bytes(blob())
    _core._fail_allocation(1)
    with pytest.raises(MemoryError):
        _core.read_aprt(path)
    _core._fail_allocation(-1)
    _, values = _core.read_aprt(path)
    assert _core._live_bytes() > before
    assert values.tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 0
    del values
    assert _core._live_bytes() == before


# ---- T08, T09, T21 and other contradictions: a tree ----------------------------------------------

TREES: list[tuple[str, dict[str, bytes | str], str]] = [
    ("a good one", {"layer-3/attn_norm.bin": blob(layer=3), "lm_head.bin": blob(layer=WHOLE), "layer-0/embedding.bin": blob()}, OK),
    ("T08 layer_path", {"layer-3/attn_norm.bin": blob(layer=2)}, "CONFIG"),
    ("T09 the whole model's mark in a layer", {"layer-0/attn_norm.bin": blob(layer=WHOLE)}, "CONFIG"),
    ("T09 layer 0 at the root", {"lm_head.bin": blob()}, "CONFIG"),
    ("T09 a layer's stage at the root", {"attn_norm.bin": blob()}, "CONFIG"),
    ("T09 the whole model's stage in a layer", {"layer-0/lm_head.bin": blob(layer=WHOLE)}, "CONFIG"),
    ("T09 the embedding in another layer", {"layer-1/embedding.bin": blob(layer=1)}, "CONFIG"),
    ("T09 the embedding at the root", {"embedding.bin": blob()}, "CONFIG"),
    ("T05 in a tree", {"layer-0/attn_norm.bin": blob() + b"x"}, "GAP"),
    ("T04 in a tree", {"layer-0/attn_norm.bin": blob()[:-1]}, "TRUNCATED"),
    ("a count that the ids do not divide", {"layer-0/attn_norm.bin": blob((1, 2, 3))}, "SHAPE"),
    ("scores of 2 heads, 2 tokens", {"layer-0/attn_scores.bin": blob(range(8))}, OK),
    ("scores that are no squares", {"layer-0/attn_scores.bin": blob(range(6))}, "SHAPE"),
    ("T06 in a tree", {"layer-0/attn_norm.bin": blob(())}, OK),
    ("nothing", {}, "INCOMPLETE"),
    ("no stage's name", {"layer-0/attn_nrom.bin": blob()}, "INCOMPLETE"),
    ("a layer's name with zeros", {"layer-00/attn_norm.bin": blob()}, "INCOMPLETE"),
    ("T21 a pipe", {"layer-0/attn_norm.bin": "fifo"}, "NOT_REGULAR"),
    ("T21 a folder", {"layer-0/attn_norm.bin": "folder"}, "NOT_REGULAR"),
    ("T21 a link to itself", {"layer-0/attn_norm.bin": "loop"}, "NOT_REGULAR"),
    ("T21 a link to a device", {"layer-0/attn_norm.bin": "/dev/zero"}, "NOT_REGULAR"),
    ("T21 a linked layer", {"layer-0": "/dev/zero"}, "NOT_REGULAR"),
    ("T21 a pipe that is nobody's", {"layer-0/attn_norm.bin": blob(), "layer-0/pipe": "fifo"}, OK),
]


def build(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, what in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(what, bytes):
            path.write_bytes(what)
        elif what == "fifo":
            os.mkfifo(path)
        elif what == "folder":
            path.mkdir()
        else:
            path.symlink_to(path.name if what == "loop" else what)
    return root


@pytest.mark.parametrize(("files", "expected"), [row[1:] for row in TREES], ids=[row[0] for row in TREES])
def test_a_tree(tmp_path: Path, files: dict[str, bytes | str], expected: str) -> None:
    def work() -> None:
        list(aprt.open_tree(build(tmp_path / "t", files), (1, 2), "exact").values())

    (tmp_path / "t").mkdir()
    assert code_of(work) == expected


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("attn_norm.bin", blob(layer=5), OK), ("layer-5/attn_norm.bin", blob(layer=5), OK), ("layer-5/attn_norm.bin", blob(), "CONFIG"),
        ("attn_norm.bin", blob(layer=WHOLE), "CONFIG"), ("lm_head.bin", blob(layer=WHOLE), OK), ("lm_head.bin", blob(), "CONFIG"),
        ("embedding.bin", blob(), OK), ("embedding.bin", blob(layer=1), "CONFIG"), ("final_norm.bin", "fifo", "NOT_REGULAR"),
        ("final_norm.bin", "/dev/zero", "NOT_REGULAR"), ("final_norm.bin", "loop", "OSError 40"), ("final_norm.bin", "/none", "OSError 2"),
    ],
)  # fmt: skip
def test_a_file_by_itself(tmp_path: Path, name: str, data: bytes | str, expected: str) -> None:
    build(tmp_path, {name: data})
    assert code_of(lambda: aprt.open_file(tmp_path / name)) == expected


# ---- T10, T11: bits; see test_aprt.py for the round trip ------------------------------------------


@pytest.mark.parametrize("pattern", [0x7FC00000, 0x7FC00001, 0x7F800001, 0xFFC12345, 0xFF800001, 0x80000000, 1, 0x7F800000, 0xFF800000])
def test_bits_are_read_as_they_are(tmp_path: Path, pattern: int) -> None:
    (tmp_path / "x.bin").write_bytes(blob(np.array([pattern] * 3, np.uint32)))
    assert _core.read_aprt(tmp_path / "x.bin")[1].view(np.uint32).tolist() == [pattern] * 3


# ---- T12 to T16: two files -----------------------------------------------------------------------

INF = np.inf
PAIRS: list[tuple[str, Any, Any, list[str], int, dict[str, Any]]] = [
    ("T12 a NaN against 2", [1, np.nan], [1, 2], [], 1, {"nan_a_only": 1, "max_abs": "nan"}),
    ("T12 and no tolerance hides it", [1, np.nan], [1, 2], ["--rtol", "1e9"], 1, {"nan_a_only": 1}),
    ("T12 the other way", [1, 2], [1, np.nan], ["--rtol", "1e9"], 1, {"nan_b_only": 1, "max_abs": "nan", "max_abs_finite": 0.0}),
    ("T13 the same NaN", [1, np.nan], [1, np.nan], [], 0, {"nan_both": 1, "n_bits_equal": 2}),
    ("T13 another payload, bits", np.array([0x7FC00000], np.uint32), np.array([0x7FC00001], np.uint32), [], 1, {"n_value_equal": 1}),
    ("T13 another payload, values", np.array([0x7FC00000], np.uint32), np.array([0x7FC00001], np.uint32), ["--rtol", "0"], 0,
     {"nan_both": 1, "n_bits_equal": 0, "n_value_equal": 1}),
    ("T14 the same infinity", [INF, 1], [INF, 1], [], 0, {"inf_mismatch": 0}),
    ("T14 infinities of two signs", [INF, 1], [-INF, 1], ["--rtol", "1e9"], 1, {"inf_mismatch": 1, "max_abs": "inf"}),
    ("T14 an infinity against 1", [INF, 1], [1, 1], ["--rtol", "1e9"], 1, {"inf_mismatch": 1, "max_abs": "inf", "max_abs_finite": 0.0}),
    ("T14 a NaN is more than an infinity", [INF, np.nan], [1, 1], [], 1, {"inf_mismatch": 1, "nan_a_only": 1, "max_abs": "nan"}),
    ("T15 zeros against zeros", [0, 0], [0, 0], [], 0, {"cosine": None, "rel_l2": 0.0, "max_abs": 0.0}),
    ("T15 zeros against ones", [0, 0], [1, 1], [], 1, {"cosine": None, "rel_l2": 1.0, "max_abs": 1.0}),
    ("T15 ones against zeros", [1, 1], [0, 0], ["--rtol", "1e9"], 1, {"cosine": None, "rel_l2": None, "max_abs": 1.0}),
    ("zeros of two signs, bits", [0.0, 1], [-0.0, 1], [], 1, {"n_value_equal": 2, "max_ulp": 0}),
    ("zeros of two signs, values", [0.0, 1], [-0.0, 1], ["--rtol", "0"], 0, {"n_value_equal": 2}),
    ("only NaN on both sides", [np.nan], [np.nan], ["--rtol", "0"], 0, {"max_abs_finite": None, "rms": None, "cosine": None}),
]  # fmt: skip


@pytest.mark.parametrize(("a", "b", "options", "code", "says"), [row[1:] for row in PAIRS], ids=[row[0] for row in PAIRS])
def test_two_files(tmp_path: Path, capsys: Capsys, a: Any, b: Any, options: list[str], code: int, says: dict[str, Any]) -> None:
    build(tmp_path, {"a/lm_head.bin": blob(a, WHOLE), "b/lm_head.bin": blob(b, WHOLE)})
    line = [str(tmp_path / side / "lm_head.bin") for side in "ab"] + options
    assert diff.main([*line, "--json"]) == code
    said = json.loads(capsys.readouterr().out)
    (row,) = said["stages"]
    assert said["verdict"] == ("divergence" if code else "agree")
    assert {name: row[name] for name in says} == says
    assert (row["undefined"] is None) == (None not in (row["cosine"], row["rel_l2"], row["std_ratio"]))
    assert diff.main([*line, "-v"]) == code  # the table stands whatever the figures are
    assert diff.main([*line, "-q"]) == code


@pytest.mark.parametrize(
    ("names", "datas", "words"),
    [
        (("lm_head.bin", "lm_head.bin"), (blob((1, 2), WHOLE), blob((1, 2, 3), WHOLE)), ("[2]", "[3]")),
        (("attn_norm.bin", "attn_norm.bin"), (blob(layer=1), blob(layer=2)), ("1.attn_norm", "2.attn_norm")),
        (("attn_norm.bin", "ffn_norm.bin"), (blob(), blob()), ("0.attn_norm", "0.ffn_norm")),
        (("lm_head.bin", "lm_head.bin"), (blob((), WHOLE), blob((), WHOLE)), ("empty", "lm_head")),
        (("attn_nrom.bin", "attn_norm.bin"), (blob(), blob()), ("attn_nrom", "did you mean 'attn_norm'")),
        (("lm_head.bin", "layer-0/ffn_norm.bin"), (blob(layer=WHOLE), blob()), ("a file", "a folder")),
    ],
    ids=["T16 count", "T16 layer", "T16 stage", "nothing", "no stage", "file and folder"],
)  # fmt: skip
def test_unlike_things_are_not_compared(
    tmp_path: Path, capsys: Capsys, names: tuple[str, str], datas: tuple[bytes, bytes], words: tuple[str, str]
) -> None:
    build(tmp_path, {f"{side}/{name}": data for side, name, data in zip("ab", names, datas, strict=True)})
    second = tmp_path / "b" / (names[1] if "/" not in names[1] else ".")
    assert diff.main([str(tmp_path / "a" / names[0]), str(second)]) == 3
    out = capsys.readouterr()
    assert out.out == ""
    assert all(word in out.err for word in words), out.err


def test_a_file_that_becomes_a_link_is_not_followed(tmp_path: Path) -> None:
    found = aprt.open_tree(build(tmp_path, {"layer-0/attn_norm.bin": blob(), "other": blob()}), (1, 2), "exact")
    (tmp_path / "layer-0" / "attn_norm.bin").unlink()
    (tmp_path / "layer-0" / "attn_norm.bin").symlink_to(tmp_path / "other")
    assert code_of(lambda: found["attn_norm", 0]) == "NOT_REGULAR"


# ---- T17 to T20: what the manifest knows ---------------------------------------------------------


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    arrays = {("attn_norm", 0): np.ones((2, 2), np.float32), ("lm_head", None): np.arange(8, dtype=np.float32).reshape(2, 4)}
    aprt.write_tree(Captures(arrays, Manifest(side="test:side", tokens=(1, 2))), tmp_path / "ours")  # type: ignore[arg-type]
    return tmp_path / "ours"


def test_a_tree_without_its_manifest(ours: Path) -> None:
    """T17: unfinished unless the user says what it is; what a killed writer left is unfinished whatever is said."""
    (ours / "manifest.json").unlink()
    assert code_of(lambda: aprt.open_tree(ours)) == "INCOMPLETE"
    assert code_of(lambda: aprt.open_tree(ours, (1, 2), "exact")) == OK
    (ours / ".lock").write_text("pid 1\nlm_head.bin\n")
    assert code_of(lambda: aprt.open_tree(ours, (1, 2), "exact")) == "INCOMPLETE"


def test_every_changed_bit_of_a_tree_is_found(ours: Path) -> None:
    """T18: in the values it is the digest that says so, in the header what stands there."""
    path = ours / "layer-0" / "attn_norm.bin"
    good = path.read_bytes()
    for bit in range(8 * len(good)):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        found = code_of(lambda: open_captures(ours)["attn_norm", 0])
        assert found == "CHECKSUM" if bit >= 96 else found in ("BAD_MAGIC", "CONFIG", "TRUNCATED", "GAP")
    path.write_bytes(blob((1, 1)))
    assert code_of(lambda: open_captures(ours)["attn_norm", 0]) == "CHECKSUM"
    path.write_bytes(good)
    assert code_of(lambda: open_captures(ours)["attn_norm", 0]) == OK
    path.unlink()
    assert code_of(lambda: open_captures(ours)) == "MISSING"


def test_a_stale_file_is_named_and_not_compared(ours: Path, capsys: Capsys) -> None:
    """T19: a file of an older run lies in one of two equal trees."""
    build(ours, {"layer-7/ffn_out.bin": blob(layer=7)})
    assert ("ffn_out", 7) not in open_captures(ours)
    assert diff.main([str(ours), str(ours)]) == 0
    assert "not of this trace, and not read: layer-7/ffn_out.bin" in capsys.readouterr().out
    assert diff.main([str(ours), str(ours), "--json"]) == 0
    assert "layer-7" in json.loads(capsys.readouterr().out)["notes_a"][0]


@pytest.mark.parametrize("what", ["fifo", "folder", "loop", "/dev/zero"])
def test_a_manifest_or_a_lock_that_is_no_file(tmp_path: Path, what: str) -> None:
    """Neither waits for a pipe's other end nor reads a device."""
    build(tmp_path, {"a/manifest.json": what, "b/.lock": what})
    assert code_of(lambda: open_captures(tmp_path / "a")) in ("NOT_REGULAR", "PATH")
    for folder in "ab":
        assert code_of(lambda folder=folder: aprt.check(tmp_path / folder)) in ("PATH", f"OSError {errno.ELOOP}")
    source = Captures({("lm_head", None): np.zeros((1, 4), np.float32)}, Manifest(side="x", tokens=(1,)))  # type: ignore[arg-type]
    assert code_of(lambda: aprt.write_tree(source, tmp_path / "a")) == "PATH"
    expected = {"fifo": "PATH", "folder": f"OSError {errno.EISDIR}"}.get(what, f"OSError {errno.ELOOP}")
    assert code_of(lambda: aprt.write_tree(source, tmp_path / "b")) == expected


def test_names_that_a_terminal_would_obey(ours: Path, capsys: Capsys) -> None:
    """Escapes, line ends and bytes that are no UTF-8 in the name of a stray file: shown escaped, and no reason to fail."""
    for name in (b"\x1b[31mred\n.bin", b"\xff\xfe.bin"):
        Path(os.fsdecode(os.path.join(os.fsencode(ours), name))).write_bytes(blob())
    for form in ([], ["--json"]):
        assert diff.main([str(ours), str(ours), *form]) == 0
        out = capsys.readouterr().out
        assert "x1b[31mred" in out
        assert "udcff" in out
        assert "\x1b[31m" not in out
    aprt.write_tree(open_captures(ours), ours.parent / "again")
    with pytest.raises(CannotRun, match=r"\\x1b"):
        aprt.write_tree(open_captures(ours), ours)


def test_what_no_header_can_count_is_refused_before_the_run(tmp_path: Path, capsys: Capsys) -> None:
    """T20: 8 heads of 23171 tokens are 4,295,161,928 scores, 2^32 are 4,294,967,296; one token less is allowed."""
    assert code_of(lambda: aprt.check(tmp_path / "t", {("attn_scores", 0): (8, 23171, 23171)})) == "LIMIT"
    assert code_of(lambda: aprt._check_sizes({("attn_scores", 0): (8, 23170, 23170)})) == OK
    ids = ",".join(["1"] * 23171)
    assert (
        trace.main([str(CANARY / "canary.gguf"), "--prompt-ids", ids, "-o", str(tmp_path / "t"), "--aprt", "--stages", "*.attn_scores"])
        == 3
    )
    assert "4,295,161,928 values" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    "entry",
    [
        {"tensors": {"../../etc/passwd": {}}},
        {"tensors": {"attn_norm.0": 3}},
        {"tokens": "x"},
        {"schema": "aprender.aprt/2"},
        {"schema": None},
    ],
)
def test_a_manifest_that_lies(ours: Path, entry: dict[str, Any]) -> None:
    path = ours / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entry))
    assert code_of(lambda: aprt.open_tree(ours)) in ("NAME", "TYPE", "BAD_VERSION", "VALUE")


def test_a_shape_that_lies(ours: Path) -> None:
    """The manifest's shape is not believed over the header's count; a huge one allocates nothing."""
    path = ours / "manifest.json"
    for shape in ([2, 3], [1 << 40, 1 << 40], []):
        data = json.loads(path.read_text())
        data["tensors"]["attn_norm.0"]["shape"] = shape
        path.write_text(json.dumps(data))
        assert code_of(lambda: aprt.open_tree(ours)["attn_norm", 0]) == "CHECKSUM"
