"""APRT trees: bytes, populations, the canary through ``trace --aprt``, and writing under kills, full disks and two writers.

The bytes are read back by NumPy alone (``fromfile`` as u32): nothing here compares floats where bits are meant, because a NaN's payload is
part of the promise.  Worked examples (sizes and headers of a 7-token Qwen2.5-7B trace: width 3584, ffn 18944, q+k+v 4608, 152064 words,
28 heads) are those of files that the original tool wrote.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_captures as made
from conftest import CANARY, PROMPT
from dying import killed, steps

from aprender import aprt, atomic, captures, diff, oracle, stages, trace
from aprender.captures import Captures, open_captures
from aprender.errors import CannotRun, FormatError, UnknownName
from aprender.manifest import TREE, Manifest, TensorNote
from aprender.stages import Key

GGUF = str(CANARY / "canary.gguf")
HEAD: Key = ("lm_head", None)
NAN_BITS = (0x7FC00000, 0x7FC00001, 0x7F800001, 0xFFC12345, 0xFF800001)
OTHER_BITS = (0x80000000, 0x00000001, 0x807FFFFF, 0x7F800000, 0xFF800000)  # -0, 2^-149, a subnormal, +inf, -inf
Capsys = pytest.CaptureFixture[str]


def words(path: Path) -> np.ndarray:
    """A file as little-endian u32: magic, layer, count, and the bits of the values."""
    return np.fromfile(path, dtype="<u4")


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint32).ravel()


def bare(arrays: dict[Key, np.ndarray], tokens: int) -> Captures:
    return Captures(arrays, Manifest(side="test:side", tokens=tuple(range(tokens))))


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def small(seed: int = 0, layers: tuple[int, ...] = (0, 1)) -> Captures:
    """A few tensors of every population, so that sweeps over every step stay short."""
    whole = made.make(seed=seed)
    kept = {key: array for key, array in whole.items() if key[0] in ("attn_scores", "lm_head") and key[1] in (*layers, None)}
    return Captures(kept, replace(whole.manifest, tensors={}))


# ---- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "shape", "place", "size", "header"),
    [
        (("embedding", None), (7, 3584), "layer-0/embedding.bin", 100_364, "41505254 00000000 00620000"),
        (("ffn_gate", 3), (7, 18944), "layer-3/ffn_gate.bin", 530_444, "41505254 03000000 00060200"),
        (("qkv_matmul", 27), (7, 4608), "layer-27/qkv_matmul.bin", 129_036, "41505254 1b000000 007e0000"),
        (HEAD, (1, 152064), "lm_head.bin", 608_268, "41505254 ffffffff 00520200"),
        (("final_norm", None), (7, 3584), "final_norm.bin", 100_364, "41505254 ffffffff 00620000"),
        (("attn_scores", 0), (28, 7, 7), "layer-0/attn_scores.bin", 12 + 4 * 1372, "41505254 00000000 5c050000"),
    ],
)
def test_files_are_those_of_the_worked_examples(
    tmp_path: Path, key: Key, shape: tuple[int, ...], place: str, size: int, header: str
) -> None:
    notes = {HEAD: TensorNote(shape, positions="last")} if key == HEAD else {}
    source = Captures({key: np.zeros(shape, np.float32)}, Manifest(side="x", tokens=tuple(range(7)), tensors=notes))  # type: ignore[arg-type]
    aprt.write_tree(source, tmp_path)
    assert listing(tmp_path) == sorted([place, "manifest.json"])
    data = (tmp_path / place).read_bytes()
    assert (len(data), data[:12]) == (size, bytes.fromhex(header))


def planted(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros with every awkward value where a causal mask does not fall: in the first column."""
    array = np.zeros(shape, np.uint32)
    array.reshape(-1, shape[-1])[: len(NAN_BITS + OTHER_BITS), 0] = NAN_BITS + OTHER_BITS
    return array.view(np.float32)


@pytest.mark.parametrize(
    ("key", "shape"), [(("embedding", None), (10, 24)), (("attn_scores", 1), (2, 10, 10)), (("final_norm", None), (10, 3))]
)
def test_bits_survive(tmp_path: Path, key: Key, shape: tuple[int, ...]) -> None:
    array = planted(shape)
    manifest = aprt.write_tree(bare({key: array}, 10), tmp_path)
    assert np.array_equal(words(tmp_path / aprt.file_name(key))[3:], bits(array))
    back = open_captures(tmp_path)
    assert np.array_equal(bits(back[key]), bits(array))
    assert manifest.tensors[key].nonfinite == len(NAN_BITS) + 2
    (tmp_path / "manifest.json").unlink()
    assert np.array_equal(bits(aprt.open_tree(tmp_path, range(10), "undeclared")[key]), bits(array))
    assert np.array_equal(bits(aprt.open_file(tmp_path / aprt.file_name(key))[key]), bits(array))


def test_what_would_see_a_later_token_is_zero(tmp_path: Path) -> None:
    array = np.full((2, 3, 3), np.nan, np.float32)
    aprt.write_tree(bare({("attn_scores", 0): array}, 3), tmp_path)
    found = words(tmp_path / "layer-0" / "attn_scores.bin")[3:].reshape(2, 3, 3)
    allowed = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1]], bool)
    assert (found[:, ~allowed] == 0).all()
    assert (found[:, allowed] == bits(array)[0]).all()


def test_of_the_logits_the_last_token(tmp_path: Path) -> None:
    source = made.make()
    manifest = aprt.write_tree(source, tmp_path)
    assert np.array_equal(words(tmp_path / "lm_head.bin")[3:], bits(source.lm_head[-1]))
    assert (manifest.tensors[HEAD].positions, manifest.tensors[HEAD].shape) == ("last", (1, 16))
    assert manifest.tensors["final_norm", None].positions == "all"


def test_stages_without_a_file_are_left_out(tmp_path: Path) -> None:
    source = made.make()
    aprt.write_tree(source, tmp_path)
    without = {row.name for row in stages.STAGES if row.population == "NONE"}
    assert without & {key[0] for key in source}
    assert {path.stem for path in tmp_path.rglob("*.bin")} == {key[0] for key in source} - without
    with pytest.raises(CannotRun, match="no file"):
        aprt.write_tree(bare({("k_cache", 0): np.zeros((3, 16), np.float32)}, 3), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_pairs_are_written_as_halves(tmp_path: Path) -> None:
    """Partner 2i and 2i + 1 of a head become i and i + h/2, as the stage is defined; h = 8 (see test_captures.py)."""
    array = np.arange(3 * 32, dtype=np.float32).reshape(3, 32)
    notes = {("q_post_rope", 0): TensorNote(array.shape, lanes="pairs")}
    aprt.write_tree(Captures({("q_post_rope", 0): array}, made.manifest(tensors=notes)), tmp_path)
    found = words(tmp_path / "layer-0" / "q_post_rope.bin")[3:].view(np.float32)
    assert found[:8].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert open_captures(tmp_path).manifest.tensors["q_post_rope", 0].lanes == "halves"


@pytest.mark.parametrize(
    ("key", "shape", "positions", "word"),
    [
        (("attn_scores", 0), (2, 3, 5), "all", "5 keys for 3 tokens"), (("embedding", None), (1, 24), "last", "last token only"),
        (("embedding", None), (72,), "all", r"shape \[72\]"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_hold_is_refused(tmp_path: Path, key: Key, shape: tuple[int, ...], positions: str, word: str) -> None:
    notes = {key: TensorNote(shape, positions=positions)}
    with pytest.raises(CannotRun, match=word):
        aprt.write_tree(Captures({key: np.zeros(shape, np.float32)}, made.manifest(tensors=notes)), tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


# ---- the manifest --------------------------------------------------------------------------------


def test_the_manifest_lists_each_file(tmp_path: Path) -> None:
    source = made.make(profile="exact", prompt="a b", model_digest="ab" * 32)
    aprt.write_tree(source, tmp_path)
    said = json.loads((tmp_path / "manifest.json").read_text())
    assert said["schema"] == TREE
    assert (said["side"], said["profile"], said["tokens"], said["prompt"]) == ("test:side", "exact", list(made.TOKENS), "a b")
    rows = {row["path"]: row for row in said["tensors"].values()}
    assert sorted(rows) == [name for name in listing(tmp_path) if name != "manifest.json"]
    for name, row in rows.items():
        data = (tmp_path / name).read_bytes()
        assert (row["size"], row["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert row["size"] == 12 + 4 * int(np.prod(row["shape"]))


def test_a_tree_is_a_capture_like_any_other(tmp_path: Path) -> None:
    """What it holds is what was captured, and writing it again gives the same bytes."""
    source = made.make("float16")
    written = aprt.write_tree(source, tmp_path / "a")
    back = open_captures(tmp_path / "a")
    assert back.manifest == written
    assert back.manifest.tensors["ffn_out", 0].dtype == "float16"
    for key, array in aprt.exported(source).items():
        assert np.array_equal(bits(back[key]), bits(array)), key
    aprt.write_tree(back, tmp_path / "b")
    assert listing(tmp_path / "a") == listing(tmp_path / "b")
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in listing(tmp_path / "a"))
    captures.save(back, tmp_path / "c")
    assert np.array_equal(open_captures(tmp_path / "c").lm_head, back.lm_head)


def test_a_tree_can_be_written_over_itself(tmp_path: Path) -> None:
    aprt.write_tree(made.make(), tmp_path)
    before = (tmp_path / "layer-1" / "ffn_out.bin").read_bytes()
    aprt.write_tree(open_captures(tmp_path), tmp_path)
    assert (tmp_path / "layer-1" / "ffn_out.bin").read_bytes() == before
    _ = list(open_captures(tmp_path).values())


def test_reading_is_lazy(tmp_path: Path) -> None:
    aprt.write_tree(made.make(), tmp_path)
    (tmp_path / "layer-1" / "ffn_out.bin").write_bytes(b"rubbish")
    back = open_captures(tmp_path)
    assert back["ffn_out", 0].shape == (3, 24)
    with pytest.raises(FormatError) as caught:
        back["ffn_out", 1]
    assert caught.value.path == str(tmp_path / "layer-1" / "ffn_out.bin")
    held = back.lm_head
    assert back.lm_head is held
    assert not held.flags.writeable


# ---- a tree of another tool ----------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A tree without a manifest."""
    aprt.write_tree(made.make(), tmp_path / "foreign")
    (tmp_path / "foreign" / "manifest.json").unlink()
    return tmp_path / "foreign"


def test_shapes_follow_from_the_counts(foreign: Path) -> None:
    want = aprt.exported(made.make())
    back = aprt.open_tree(foreign, made.TOKENS, "hf-f16")
    assert list(back) == list(want)
    assert {key: array.shape for key, array in back.items()} == {key: array.shape for key, array in want.items()}
    assert (back.tokens, back.manifest.profile) == (made.TOKENS, "hf-f16")
    assert "your word" in back.manifest.notes[0]
    assert aprt.open_tree(foreign, made.TOKENS, "undeclared").manifest.profile is None


@pytest.mark.parametrize(("ids", "arithmetic"), [(None, None), (made.TOKENS, None), (None, "exact")])
def test_without_the_users_word_it_is_incomplete(foreign: Path, ids: tuple[int, ...] | None, arithmetic: str | None) -> None:
    with pytest.raises(FormatError, match="--prompt-ids") as caught:
        aprt.open_tree(foreign, ids, arithmetic)
    assert caught.value.code == "INCOMPLETE"


def test_a_wrong_word_is_found_where_it_can_be(foreign: Path) -> None:
    with pytest.raises(FormatError, match="token ids") as caught:
        aprt.open_tree(foreign, (1, 2, 3, 4, 5), "exact")
    assert caught.value.code == "SHAPE"
    with pytest.raises(UnknownName, match="hf-f16"):
        aprt.open_tree(foreign, made.TOKENS, "hf-f61")
    with pytest.raises(FormatError, match="token ids"):
        aprt.open_tree(foreign, (), "exact")


def test_widths_that_contradict_each_other_are_refused(foreign: Path) -> None:
    """27 values are 3 tokens of 9, but every other tensor of the model's width has 24."""
    (foreign / "layer-1" / "attn_norm.bin").write_bytes(b"APRT" + (1).to_bytes(4, "little") + (27).to_bytes(4, "little") + bytes(108))
    with pytest.raises(FormatError, match=r"9 values.*24") as caught:
        aprt.open_tree(foreign, made.TOKENS, "exact")
    assert caught.value.path == str(foreign / "layer-1" / "attn_norm.bin")


def test_other_names_of_a_stage(foreign: Path) -> None:
    (foreign / "layer-0" / "post_ffn_residual.bin").rename(foreign / "layer-0" / "layer_output.bin")
    assert aprt.open_tree(foreign, made.TOKENS, "exact")["post_ffn_residual", 0].shape == (3, 24)
    (foreign / "layer-0" / "post_ffn_residual.bin").write_bytes((foreign / "layer-0" / "layer_output.bin").read_bytes())
    with pytest.raises(FormatError) as caught:
        aprt.open_tree(foreign, made.TOKENS, "exact")
    assert caught.value.code == "DUPLICATE"


def test_what_is_passed_over_is_said(foreign: Path) -> None:
    for name in ("my_dump.bin", "layer-1/k_cache.bin", "notes.txt"):
        (foreign / name).write_bytes(b"x")
    note = aprt.open_tree(foreign, made.TOKENS, "exact").manifest.notes[1]
    assert "my_dump.bin" in note
    assert "layer-1/k_cache.bin" in note
    assert "notes.txt" not in note


# ---- trace and oracle ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The canary's prompt, as a tree and as an ordinary capture."""
    root = tmp_path_factory.mktemp("traced")
    ids = ",".join(map(str, PROMPT))
    assert trace.main([GGUF, "--prompt-ids", ids, "-o", str(root / "tree"), "--aprt", "-q"]) == 0
    assert trace.main([GGUF, "--prompt-ids", ids, "-o", str(root / "folder"), "-q"]) == 0
    return root / "tree", root / "folder"


def test_a_traced_tree_holds_what_an_ordinary_trace_does(traced: tuple[Path, Path]) -> None:
    tree, folder = map(open_captures, traced)
    assert set(tree) == {key for key in folder if aprt.held(key)}
    for key in tree:
        want = folder[key][-1:] if key == HEAD else folder[key]
        assert tree[key].shape == want.shape
        assert np.array_equal(bits(tree[key]), bits(want)), key
    said = tree.manifest
    assert (said.tokens, said.profile, said.attestation) == (PROMPT, "exact", True)
    assert said.model_digest == folder.manifest.model_digest
    assert len(list(traced[0].rglob("*.bin"))) == 4 * 17 + 3  # 17 stages of each of 4 layers, embedding, final_norm, lm_head


def test_diff_takes_tree_and_folder_and_a_foreign_tree(traced: tuple[Path, Path], tmp_path: Path, capsys: Capsys) -> None:
    tree, folder = traced
    assert diff.main([str(tree), str(folder)]) == 0
    assert "last tokens compared (lm_head)" in capsys.readouterr().out
    for name in listing(tree):
        if name != "manifest.json":
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes((tree / name).read_bytes())
    assert diff.main([str(tmp_path), str(folder)]) == 3
    assert "--prompt-ids" in capsys.readouterr().err
    word = ["--prompt-ids", ",".join(map(str, PROMPT)), "--arithmetic", "exact"]
    assert diff.main([str(tmp_path), str(folder), *word]) == 0
    assert "your word" in capsys.readouterr().out
    changed = bytearray((tmp_path / "layer-2" / "ffn_out.bin").read_bytes())
    changed[-1] ^= 0x40
    (tmp_path / "layer-2" / "ffn_out.bin").write_bytes(changed)
    assert diff.main([str(tmp_path), str(folder), *word, "-q"]) == 1
    assert "the first in execution order is 2.ffn_out" in capsys.readouterr().out
    other = ["--prompt-ids", ",".join(map(str, (*PROMPT[:-1], 29))), "--arithmetic", "exact"]
    assert diff.main([str(tmp_path), str(folder), *other]) == 3
    assert "30" in capsys.readouterr().err


def test_a_selection_of_a_tree(tmp_path: Path, capsys: Capsys) -> None:
    line = [GGUF, "--prompt-ids", "1,2", "-o", str(tmp_path / "t"), "--aprt", "--json"]
    assert trace.main([*line, "--stages", "attn_*,lm_head", "--layers", "1..3"]) == 0
    said = json.loads(capsys.readouterr().out)
    names = listing(tmp_path / "t")
    assert "layer-1/attn_softmax.bin" in names
    assert {name.split("/")[0] for name in names} == {"layer-1", "layer-2", "lm_head.bin", "manifest.json"}
    assert said["tensors"] == len(names) - 1
    assert said["bytes"] == sum((tmp_path / "t" / name).stat().st_size - 12 for name in names if name.endswith(".bin"))


@pytest.mark.parametrize("part", ["*.k_cache", "rope_table", "lm_head,0.v_cache"])
def test_a_stage_that_a_tree_cannot_hold_is_refused_by_name(tmp_path: Path, capsys: Capsys, part: str) -> None:
    assert trace.main([GGUF, "--prompt-ids", "1,2", "-o", str(tmp_path / "t"), "--aprt", "--stages", part]) == 3
    assert f"'{part.split(',')[-1]} in an APRT tree'" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_oracle_writes_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch: the forward pass is replaced by numbers made here, everything after it is the command's."""
    monkeypatch.setattr(oracle, "record", lambda *_, **__: made.make("float16", attestation=True))
    assert oracle.main(["folder", "-o", str(tmp_path / "t"), "--prompt-ids", "1,2,3", "--aprt", "-q"]) == 0
    assert open_captures(tmp_path / "t").manifest.schema == TREE


# ---- what is there already -----------------------------------------------------------------------


def test_an_older_trace_is_replaced_with_all_of_its_files(tmp_path: Path) -> None:
    aprt.write_tree(made.make(), tmp_path)
    aprt.write_tree(small(1, (0,)), tmp_path)
    assert listing(tmp_path) == ["layer-0/attn_scores.bin", "lm_head.bin", "manifest.json"]
    assert not (tmp_path / "layer-1").exists()


@pytest.mark.parametrize(
    "name", ["thesis.tex", "my.bin", "layer-0/attn_norm.bin", "layer-0/sub/x.bin", "manifest.json", "model.safetensors"]
)
def test_what_is_not_ours_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("dear")
    for attempt in (aprt.check, lambda folder: aprt.write_tree(made.make(), folder)):
        with pytest.raises(CannotRun, match=name.split("/")[0]):
            attempt(tmp_path)
        assert listing(tmp_path) == [name]
        assert (tmp_path / name).read_text() == "dear"


def test_a_capture_is_not_written_over_by_a_tree_nor_the_reverse(tmp_path: Path) -> None:
    captures.save(made.make(), tmp_path / "a")
    with pytest.raises(CannotRun):
        aprt.write_tree(made.make(), tmp_path / "a")
    aprt.write_tree(made.make(), tmp_path / "b")
    with pytest.raises(CannotRun):
        captures.save(made.make(), tmp_path / "b")
    assert open_captures(tmp_path / "a").tokens == open_captures(tmp_path / "b").tokens == made.TOKENS


@pytest.mark.parametrize("write", [aprt.write_tree, captures.save], ids=["tree", "capture"])
def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path, write: Callable[[Captures, Path], Manifest]) -> None:
    write(made.make(), tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)}
    with atomic.locked(tmp_path), pytest.raises(CannotRun, match=f"pid {os.getpid()}") as caught:
        write(made.make(seed=1), tmp_path)
    assert caught.value.code == "BUSY"
    assert {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)} == before
    write(made.make(seed=1), tmp_path)
    assert np.array_equal(open_captures(tmp_path)["ffn_out", 0], made.make(seed=1)["ffn_out", 0])


def test_a_lock_that_its_holder_removed_meanwhile_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is opened, the first writer ends and removes it, and only then it is locked: two would write at once."""
    real, calls = fcntl.flock, []

    def late(handle: int, how: int) -> None:
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(handle)
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with atomic.locked(tmp_path):
        assert os.path.samestat(os.fstat(calls[-1]), os.stat(tmp_path / ".lock"))
        assert len(calls) == 2
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("check", [aprt.check, captures.check_folder], ids=["tree", "capture"])
def test_a_folder_that_is_being_written_is_refused_before_the_work(tmp_path: Path, check: Callable[[Path], None]) -> None:
    with atomic.locked(tmp_path), pytest.raises(CannotRun, match=f"pid {os.getpid()}"):
        check(tmp_path)
    for left in ("", "p", "pid", "pid 1\n"):  # of one that was killed
        (tmp_path / ".lock").write_text(left)
        check(tmp_path)
        assert (tmp_path / ".lock").read_text() == left


def test_a_note_of_what_may_be_replaced_is_whole_before_anything_is(tmp_path: Path) -> None:
    """The system lets the lock grow to 30 bytes: its list is cut, so the older trace stays."""
    aprt.write_tree(OLD, tmp_path)
    assert limited(30, lambda: aprt.write_tree(NEW, tmp_path)) == ".lock"
    assert which(tmp_path) == "old"


def test_a_lock_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("npm")
    with pytest.raises(CannotRun, match="not a lock of ours"), atomic.locked(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == "npm"


# ---- interruptions -------------------------------------------------------------------------------

OLD, NEW = small(0, (0, 1)), small(1, (1,))
WRITERS: dict[str, Callable[[Captures, Path], Any]] = {"tree": aprt.write_tree, "capture": captures.save}


def through_oracle(source: Captures, folder: Path) -> None:
    """The command's way to the disk, the forward pass left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "record", lambda *_, **__: Captures(source, replace(source.manifest, attestation=True)))
        code = oracle.main(["folder", "-o", str(folder), "--prompt-ids", "1,2,3", "-q"])
    if code:
        raise CannotRun(f"oracle ended with {code}")


WRITERS["oracle"] = through_oracle


def which(folder: Path) -> str | None:
    """OLD or NEW, whichever the folder holds, every byte of it verified; None if it says that it is not whole."""
    try:
        found = open_captures(folder)
    except FormatError:
        return None
    for name, source in (("old", OLD), ("new", NEW)):
        wanted = aprt.exported(source) if found.manifest.schema == TREE else source
        if set(found) == set(wanted):
            assert all(np.array_equal(bits(found[key]), bits(wanted[key])) for key in found), name
            return name
    pytest.fail(f"neither of the two captures: {list(found)}")


@pytest.mark.parametrize("there", [False, True], ids=["new folder", "over an older one"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_kill_at_any_step_never_leaves_what_reads_as_whole_and_is_not(tmp_path: Path, writer: str, there: bool) -> None:
    write, seen, k = WRITERS[writer], [], 0
    while True:
        folder = tmp_path / str(k)
        if there:
            write(OLD, folder)
        alive = not killed(lambda folder=folder: write(NEW, folder), k)  # type: ignore[misc]
        seen.append(which(folder))
        write(NEW, folder)  # what a kill leaves stands in nobody's way
        assert which(folder) == "new"
        assert not [name for name in listing(folder) if name.endswith((".tmp", ".lock"))]
        assert len(listing(folder)) == 3
        if alive:
            break
        k += 1
    assert k > 20
    assert seen[-1] == "new"
    order = [seen[i] for i in range(len(seen)) if not i or seen[i] != seen[i - 1]]
    assert order == (["old", None, "new"] if there else [None, "new"]), order


def failure(step: Callable[[str, str], None], work: Callable[[], Any]) -> BaseException | None:
    """What comes out of it when its steps are watched."""
    try:
        with steps(step):
            work()
    except (OSError, CannotRun) as problem:
        return problem
    return None


@pytest.mark.parametrize("there", [False, True], ids=["new folder", "over an older one"])
@pytest.mark.parametrize("writer", ["tree", "capture"])
def test_a_full_disk_at_any_step_leaves_nothing_half_done(tmp_path: Path, writer: str, there: bool) -> None:
    write, k, failed = WRITERS[writer], 0, 0
    while True:
        folder, count = tmp_path / str(k), 0
        if there:
            write(OLD, folder)

        def full(what: str, path: str, k: int = k) -> None:
            nonlocal count
            count += what in ("write", "open", "fsync", "mkdir")
            if what in ("write", "open", "fsync", "mkdir") and count == k + 1:
                raise OSError(errno.ENOSPC, "No space left on device", path)

        problem = failure(full, lambda folder=folder: write(NEW, folder))  # type: ignore[misc]
        if problem is not None:
            failed += 1
            cause = problem if isinstance(problem, OSError) else problem.__cause__
            assert isinstance(cause, OSError)
            assert cause.errno == errno.ENOSPC
            assert isinstance(problem, OSError) or writer == "capture"
            assert which(folder) in ((None, "old") if there else (None,))
            assert not [name for name in listing(folder) if name.endswith((".tmp", ".lock"))]
            write(NEW, folder)
        assert which(folder) == "new"
        if count <= k:
            break
        k += 1
    assert failed > 10


def limited(size: int, work: Callable[[], Any]) -> str:
    """The name of the file at which it fails when the system lets no file grow beyond a size; in a child, the limit stays there."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            work()
        except OSError as problem:
            os.write(writer, f"{errno.errorcode[problem.errno or 0]} {os.path.basename(str(problem.filename))}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader, "rb") as pipe:
        said = pipe.read().decode()
    assert said.startswith("EFBIG ")
    return said.removeprefix("EFBIG ")


def test_a_tree_that_failed_leaves_no_file(tmp_path: Path) -> None:
    """A real limit of the system's, not a patched call: no file may grow beyond 100 bytes."""
    source = bare({("ffn_norm", 0): np.zeros((3, 4), np.float32), ("ffn_norm", 1): np.zeros((3, 40), np.float32)}, 3)
    assert limited(100, lambda: aprt.write_tree(source, tmp_path / "t")) == "ffn_norm.bin"
    assert listing(tmp_path / "t") == []


def test_too_little_room_is_found_before_anything_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aprt.write_tree(OLD, tmp_path)
    real = os.statvfs(tmp_path)

    class Full:
        f_bavail, f_frsize = 0, real.f_frsize

    monkeypatch.setattr(os, "statvfs", lambda _: Full)
    with pytest.raises(OSError, match="bytes") as caught:
        aprt.write_tree(made.make(), tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert which(tmp_path) == "old"
    with pytest.raises(OSError, match="bytes"):
        aprt.check(tmp_path / "deep" / "er", {("ffn_out", 0): (3, 24)})
    assert not (tmp_path / "deep").exists()


def test_the_order_of_the_steps_is_that_of_a_commit(tmp_path: Path) -> None:
    """What a kill does not show, because the page cache outlives it: what is synced before what."""
    for writer, there in (("tree", "lm_head.bin"), ("capture", "model.safetensors")):
        WRITERS[writer](OLD, tmp_path / writer)
        log = logged(lambda writer=writer: WRITERS[writer](NEW, tmp_path / writer), tmp_path / writer)  # type: ignore[misc]
        gone, put = log.index(("unlink", "manifest.json")), log.index(("replace", "manifest.json"))
        writes = [i for i, (what, path) in enumerate(log) if what == "write" and path.endswith((".bin.tmp", ".safetensors.tmp"))]
        assert ("fsync", ".") in log[gone : writes[0]], "the old manifest is gone for good before the first write"
        data = [(i, path) for i, (what, path) in enumerate(log) if what == "replace" and path != "manifest.json"]
        assert there in [path for _, path in data]
        for at, path in data:
            assert gone < at < put
            assert log[at - 1] == ("fsync", path + ".tmp"), "a file is synced, then renamed"
            assert ("fsync", os.path.dirname(path) or ".") in log[at:put], "and its folder is synced before the manifest"
        assert log[put - 1] == ("fsync", "manifest.json.tmp")
        assert ("fsync", ".") in log[put:], "and the manifest's folder after it"
        assert [i for i, step in enumerate(log) if step == ("unlink", ".lock")] == [len(log) - 1], "the lock is held to the end"
        if writer == "tree":
            assert ("fsync", ".lock") in log[:gone], "what may be replaced is noted down before the manifest goes"


def test_new_folders_of_layers_are_synced_before_the_manifest(tmp_path: Path) -> None:
    source = bare({("ffn_norm", 0): np.zeros((3, 4), np.float32)}, 3)
    log = logged(lambda: aprt.write_tree(source, tmp_path), tmp_path)
    assert ("fsync", ".") in log[log.index(("mkdir", "layer-0")) : log.index(("replace", "manifest.json"))]


def logged(work: Callable[[], Any], folder: Path) -> list[tuple[str, str]]:
    """The steps of a writer, by their paths inside the folder."""
    log: list[tuple[str, str]] = []
    with steps(lambda what, path: log.append((what, os.path.relpath(path, folder)))):
        work()
    return log


def test_a_file_that_is_no_aprt_is_told_so(tmp_path: Path) -> None:
    """Whatever it is called: not that its name is no stage."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(FormatError, match="not with 'APRT'") as caught:
        aprt.open_file(path)
    assert caught.value.code == "BAD_MAGIC"
