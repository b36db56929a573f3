"""Captures: the mapping, the manifest, the sample contract and the folder on disk.

Shapes are those of a model made up here: 2 layers, 4 heads of 8 over a model of 24, ffn 40, 16 words, 3 tokens.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aprender import captures, stages
from aprender.captures import Captures
from aprender.errors import ArgumentError, CannotRun, FormatError, NotComparable, UnknownName
from aprender.manifest import Manifest, TensorNote

FLAGS = frozenset({"DENSE", "QKV_BIAS", "UNTIED"})
HPARAMS = {"layers": 2, "dim": 24, "ffn": 40, "heads": 4, "kv_heads": 2, "head": 8, "vocab": 16, "context": 64, "eps": 1e-6, "theta": 1e4}
TOKENS = (5, 9, 2)


def manifest(**said: object) -> Manifest:
    said = {"side": "test:side", "tokens": TOKENS, "arch": "qwen2", "flags": FLAGS, "hparams": dict(HPARAMS)} | said
    return Manifest(**said)  # type: ignore[arg-type]


def make(dtype: str = "float32", seed: int = 0, **said: object) -> Captures:
    """A full capture of random numbers that `dtype` holds exactly."""
    generator = np.random.default_rng(seed)
    arrays = {}
    for key in stages.keys(FLAGS, 2):
        array = generator.standard_normal(stages.stage(key[0]).dims(HPARAMS, len(TOKENS))).astype(np.float32)
        if dtype == "float16":
            array = array.astype(np.float16).astype(np.float32)
        if dtype == "bfloat16":
            array = (array.view(np.uint32) & 0xFFFF0000).view(np.float32)
        arrays[key] = array
    notes = {key: TensorNote.of(array, dtype=dtype) for key, array in arrays.items()}
    return Captures(arrays, manifest(tensors=notes, **said))


# ---- the mapping -------------------------------------------------------------------------------


def test_three_ways_to_the_same_array() -> None:
    cap = make()
    assert cap["ffn_gate", 1] is cap.layer(1).ffn_gate
    assert cap["lm_head"] is cap.lm_head
    assert cap["lm_head", None] is cap.lm_head
    assert cap["layer_output", 0] is cap["post_ffn_residual", 0]


def test_arrays_are_read_only_and_not_copied() -> None:
    array = np.zeros((3, 16), np.float32)
    cap = Captures({("lm_head", None): array}, manifest())
    assert np.shares_memory(cap.lm_head, array)
    with pytest.raises(ValueError, match="read-only"):
        cap.lm_head[0, 0] = 1


def test_half_types_widen_without_loss() -> None:
    values = np.arange(-24, 24, dtype=np.float16).reshape(3, 16) / 7
    assert np.array_equal(Captures({("lm_head", None): values}, manifest()).lm_head, values.astype(np.float32))


def test_iteration_is_execution_order_whatever_the_input_order() -> None:
    cap = make()
    shuffled = Captures({key: cap[key] for key in reversed(list(cap))}, cap.manifest)
    assert list(shuffled) == list(cap) == stages.keys(FLAGS, 2)


def test_missing_things_are_named() -> None:
    cap = make()
    with pytest.raises(UnknownName, match="did you mean 'ffn_gate'"):
        cap["ffn_gat", 0]
    with pytest.raises(UnknownName, match=r"7\.ffn_gate"):
        cap["ffn_gate", 7]
    with pytest.raises(UnknownName, match="no layer 7"):
        cap.layer(7)
    with pytest.raises(AttributeError, match="did you mean 'lm_head'"):
        _ = cap.lmhead
    with pytest.raises(AttributeError, match=r"use \.layer"):
        _ = cap.ffn_gate
    assert cap.get(("ffn_gate", 7)) is None
    assert ("ffn_gate", 7) not in cap
    assert "lm_head" in cap
    assert not hasattr(cap, "nothing")


def test_a_layer_where_none_belongs_is_refused() -> None:
    for key in (("lm_head", 0), ("ffn_out", None)):
        with pytest.raises(ArgumentError, match=key[0]):
            Captures({key: np.zeros(3, np.float32)}, manifest())


def test_non_finite_values_are_counted() -> None:
    array = np.zeros((3, 16), np.float32)
    array[0, :3] = np.nan, np.inf, -np.inf
    assert Captures({("lm_head", None): array}, manifest()).manifest.tensors["lm_head", None].nonfinite == 3


# ---- the folder --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_round_trip_is_exact(tmp_path: Path, dtype: str) -> None:
    said = {"prompt": 'say "ä"', "answer": " 4.", "answer_ids": (1, 2), "attestation": True, "arithmetic": {"matmul": {"Kc": 128}}}
    cap = make(dtype, **said, notes=("one",))
    written = captures.save(cap, tmp_path / "cap")
    back = captures.open_captures(tmp_path / "cap")
    assert back.manifest == written
    assert list(back) == list(cap)
    assert all(np.array_equal(back[key].view(np.uint32), cap[key].view(np.uint32)) for key in cap)
    bare = {key: replace(note, sha256=None) for key, note in back.manifest.tensors.items()}
    assert replace(back.manifest, tensors=bare) == cap.manifest


def test_half_types_take_half_the_room(tmp_path: Path) -> None:
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        captures.save(make(dtype), tmp_path / dtype)
        sizes[dtype] = sum(path.stat().st_size for path in (tmp_path / dtype).glob("*.safetensors"))
    values = sum(array.size for array in make().values())
    assert sizes["float32"] - sizes["bfloat16"] == pytest.approx(2 * values, rel=0.02)


def test_special_values_survive(tmp_path: Path) -> None:
    array = np.array([[0.0, -0.0, np.nan, np.inf, -np.inf, 2.0**-24] + [1.0] * 10] * 3, np.float32)
    for dtype in ("float32", "float16", "bfloat16"):
        notes = {("lm_head", None): TensorNote.of(array, dtype=dtype)}
        captures.save(Captures({("lm_head", None): array}, manifest(tensors=notes)), tmp_path / dtype)
        back = captures.open_captures(tmp_path / dtype).lm_head
        assert np.array_equal(back, array, equal_nan=True)
        assert np.array_equal(np.signbit(back), np.signbit(array))


@pytest.mark.parametrize(("dtype", "value"), [("float16", 70000.0), ("float16", 1 + 2**-12), ("bfloat16", 1 + 2**-9)])
def test_a_value_that_the_native_type_lacks_is_refused(tmp_path: Path, dtype: str, value: float) -> None:
    """float16 ends at 65504 and has 11 bits, bfloat16 8: 2^-12 and 2^-9 beside 1 do not fit."""
    array = np.full((3, 16), value, np.float32)
    notes = {("lm_head", None): TensorNote.of(array, dtype=dtype)}
    with pytest.raises(ArgumentError, match=dtype):
        captures.save(Captures({("lm_head", None): array}, manifest(tensors=notes)), tmp_path / "cap")
    with pytest.raises(FormatError, match="no manifest"):
        captures.open_captures(tmp_path / "cap")


def test_opening_reads_no_tensor(tmp_path: Path) -> None:
    captures.save(make(), tmp_path / "cap")
    (tmp_path / "cap" / "layer-001.safetensors").write_bytes(b"rubbish")
    cap = captures.open_captures(tmp_path / "cap")
    assert cap["ffn_out", 0].shape == (3, 24)
    with pytest.raises(FormatError):
        cap["ffn_out", 1]


def test_the_same_array_is_handed_out_while_it_lives(tmp_path: Path) -> None:
    captures.save(make(), tmp_path / "cap")
    cap = captures.open_captures(tmp_path / "cap")
    held = cap.lm_head
    assert cap.lm_head is held
    with pytest.raises(ValueError, match="read-only"):
        held[0, 0] = 1


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9, 1.0])
def test_any_changed_byte_of_data_is_found(tmp_path: Path, where: float) -> None:
    captures.save(make(), tmp_path / "cap")
    path = tmp_path / "cap" / "model.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + int((len(data) - start - 1) * where)] ^= 1
    path.write_bytes(data)
    cap = captures.open_captures(tmp_path / "cap")
    with pytest.raises(FormatError, match="not those that were saved"):
        _ = [cap[key] for key in cap]


def test_a_missing_file_and_a_missing_tensor_are_named(tmp_path: Path) -> None:
    captures.save(make(), tmp_path / "cap")
    file, other = (tmp_path / "cap" / name for name in ("layer-000.safetensors", "model.safetensors"))
    file.write_bytes(other.read_bytes())
    with pytest.raises(FormatError, match="missing") as caught:
        captures.open_captures(tmp_path / "cap")["ffn_out", 0]
    assert caught.value.field == "ffn_out"
    assert caught.value.path == str(file)
    file.unlink()
    with pytest.raises(FormatError, match="missing") as caught:
        captures.open_captures(tmp_path / "cap")
    assert caught.value.path == str(file)


def test_a_shorter_capture_replaces_a_longer_one(tmp_path: Path) -> None:
    cap = make()
    captures.save(cap, tmp_path / "cap")
    captures.save(Captures({("lm_head", None): cap.lm_head}, replace(cap.manifest, tensors={})), tmp_path / "cap")
    assert sorted(os.listdir(tmp_path / "cap")) == ["manifest.json", "model.safetensors"]
    assert list(captures.open_captures(tmp_path / "cap")) == [("lm_head", None)]


def test_a_capture_can_be_saved_over_itself(tmp_path: Path) -> None:
    captures.save(make(), tmp_path / "cap")
    captures.save(captures.open_captures(tmp_path / "cap"), tmp_path / "cap")
    assert np.array_equal(captures.open_captures(tmp_path / "cap").lm_head, make().lm_head)


@pytest.mark.parametrize("name", ["thesis.tex", "config.json", "model-00001.safetensors"])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("dear")
    with pytest.raises(CannotRun, match=name):
        captures.save(make(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_killed_save_leaves_no_capture(tmp_path: Path) -> None:
    """The manifest is the commit point: a process that dies between layers leaves a folder that says so, and can be written again."""
    captures.save(make(), tmp_path / "cap")
    code = (
        "import os, sys; sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(sys.argv[1])))]\n"
        "sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[1])))\n"
        "from aprender import captures; import test_captures, pathlib\n"
        "write = captures._write\n"
        "def dying(path, data):\n"
        "    if path.name == 'layer-001.safetensors': os._exit(9)\n"
        "    write(path, data)\n"
        "captures._write = dying\n"
        "captures.save(test_captures.make(seed=1), sys.argv[2])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, __file__, str(tmp_path / "cap")], check=False)
    assert done.returncode == 9
    with pytest.raises(FormatError, match="no manifest"):
        captures.open_captures(tmp_path / "cap")
    captures.save(make(), tmp_path / "cap")
    assert captures.open_captures(tmp_path / "cap").tokens == TOKENS


# ---- the manifest as hostile input -------------------------------------------------------------


def written(tmp_path: Path) -> tuple[Path, dict[str, object]]:
    captures.save(make(), tmp_path / "cap")
    path = tmp_path / "cap" / "manifest.json"
    return path, json.loads(path.read_text())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema", "aprender.captures/2"), ("tokens", [1, -2, 3]), ("tokens", [1, True, 2]), ("tokens", "abc"), ("side", None),
        ("hparams", {"dim": "wide"}), ("flags", [1]), ("attestation", 1), ("positions", [0]), ("tensors", []), ("threads", 1.5),
        ("tensors", {"ffn_nothing.0": {}}), ("tensors", {"../../etc/passwd": {}}), ("tensors", {"ffn_out.-1": {}}),
        ("tensors", {"ffn_out": {}}),
        ("tensors", {"lm_head.0": {}}), ("tensors", {"lm_head": 3}), ("tensors", {"lm_head": {"shape": [3, 16]}}), ("answer_ids", [2**70]),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_named(tmp_path: Path, field: str, value: object) -> None:
    path, data = written(tmp_path)
    data[field] = value
    path.write_text(json.dumps(data))
    with pytest.raises(FormatError) as caught:
        captures.open_captures(path.parent)
    assert caught.value.path == str(path)
    assert (caught.value.field or "").startswith(field)


def test_every_entry_is_needed(tmp_path: Path) -> None:
    path, data = written(tmp_path)
    for field in data:
        path.write_text(json.dumps({name: value for name, value in data.items() if name != field}))
        with pytest.raises(FormatError, match=field):
            captures.open_captures(path.parent)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100000, b'{"schema": "aprender.captures/1"}'])
def test_a_broken_manifest_is_a_format_error(tmp_path: Path, text: bytes) -> None:
    path, _ = written(tmp_path)
    path.write_bytes(text)
    with pytest.raises(FormatError):
        captures.open_captures(path.parent)


@given(cut=st.integers(0, 4000), byte=st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_a_damaged_manifest_never_escapes_as_another_error(tmp_path_factory: pytest.TempPathFactory, cut: int, byte: int) -> None:
    text = bytearray(make().manifest.to_json().encode())
    text[min(cut, len(text) - 1)] = byte
    with contextlib.suppress(FormatError):
        Manifest.from_json(text.decode("latin-1"), "x")


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", Path(__file__)):
        with pytest.raises(FormatError) as caught:
            captures.open_captures(path)
        assert str(path) in str(caught.value)


# ---- the sample contract -----------------------------------------------------------------------


def test_like_things_are_comparable() -> None:
    assert captures.check_contract(make(), make("bfloat16", seed=1)) == []


@pytest.mark.parametrize(
    ("said", "both"),
    [
        ({"tokens": (5, 9, 3)}, ("2", "3")),
        ({"tokens": (5, 9)}, ("2", "the end")),
        ({"positions": (1, 2, 3)}, ("0", "1")),
    ],
)
def test_unlike_sequences_are_refused_with_both_values(said: dict[str, object], both: tuple[str, str]) -> None:
    left = make()
    right = Captures({("lm_head", None): np.zeros((3, 16), np.float32)}, manifest(**said))
    with pytest.raises(NotComparable, match=f"{both[0]} against {both[1]}"):
        captures.check_contract(left, right)


def test_unlike_capture_points_and_shapes_are_refused() -> None:
    left = make()
    key = ("attn_scores", 1)
    notes = left.manifest.tensors | {key: replace(left.manifest.tensors[key], capture_point="unscaled")}
    right = Captures(dict(left), replace(left.manifest, tensors=notes))
    with pytest.raises(NotComparable, match=r"1\.attn_scores.*'as defined' against 'unscaled'"):
        captures.check_contract(left, right)
    assert captures.check_contract(left, right, [("lm_head", None)]) == []
    narrow = Captures({("lm_head", None): np.zeros((3, 15), np.float32)}, manifest())
    with pytest.raises(NotComparable, match=r"\[3, 16\] against \[3, 15\]"):
        captures.check_contract(left, narrow)


def test_nothing_in_common_is_refused() -> None:
    left = Captures({("lm_head", None): np.zeros((3, 16), np.float32)}, manifest())
    right = Captures({("final_norm", None): np.zeros((3, 24), np.float32)}, manifest())
    with pytest.raises(NotComparable, match="no tensor in common"):
        captures.check_contract(left, right)


def test_last_token_only_is_a_known_view_and_is_said() -> None:
    left = make()
    last = left.lm_head[-1:]
    note = replace(TensorNote.of(last), positions="last")
    right = Captures({("lm_head", None): last}, manifest(tensors={("lm_head", None): note}))
    (said,) = captures.check_contract(left, right)
    assert "last token" in said
    assert "lm_head" in said
    a, b = captures.aligned(left, right, ("lm_head", None))
    assert a.shape == b.shape == (1, 16)
    assert np.array_equal(a, b)


def test_lane_orders_are_a_known_view_and_are_said() -> None:
    """As llama.cpp's converter permutes: HF row (half s, i) of a head goes to row 2i + s; v keeps its order."""
    left = make()
    size = HPARAMS["head"]
    order = [s * size // 2 + i for i in range(size // 2) for s in range(2)]  # place 2i+s holds row (s, i)

    def permute(array: np.ndarray, heads: int) -> np.ndarray:
        turned = array.copy()
        for head in range(heads):
            turned[:, head * size : (head + 1) * size] = array[:, [head * size + lane for lane in order]]
        return turned

    arrays = {("q_post_rope", 0): permute(left["q_post_rope", 0], 4), ("qkv_matmul", 0): permute(left["qkv_matmul", 0], 6)}
    assert not np.array_equal(arrays["q_post_rope", 0], left["q_post_rope", 0])
    notes = {key: TensorNote.of(array, lanes="pairs") for key, array in arrays.items()}
    right = Captures(arrays, manifest(tensors=notes))
    (said,) = captures.check_contract(left, right)
    assert "lane orders" in said
    for key in arrays:
        a, b = captures.aligned(left, right, key)
        assert np.array_equal(a, b)
