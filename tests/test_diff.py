"""The command diff: bits, tolerance, NaN, unlike things, exit codes.  Captures are random numbers made here (see test_captures.py)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_captures as made

from aprender import captures, diff
from aprender.captures import Captures
from aprender.manifest import TensorNote
from aprender.stages import Key

HEAD: Key = ("lm_head", None)
Pair = tuple[Path, Captures]
Capsys = pytest.CaptureFixture[str]


def changed(source: Captures, arrays: dict[Key, np.ndarray]) -> Captures:
    """The captures with some tensors replaced."""
    return Captures(dict(source) | arrays, replace(source.manifest, tensors={}))


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """A saved capture, and the same in memory to be changed."""
    source = made.make()
    captures.save(source, tmp_path / "a")
    return tmp_path / "a", source


def run(capsys: Capsys, *argv: object) -> tuple[int, str, str]:
    code = diff.main([str(word) for word in argv])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_equal_is_zero(pair: Pair, tmp_path: Path, capsys: Capsys) -> None:
    captures.save(pair[1], tmp_path / "b")
    code, out, err = run(capsys, pair[0], tmp_path / "b")
    assert (code, err) == (0, "")
    assert f"All {len(pair[1])} tensors are bit-equal." in out


@pytest.mark.parametrize("key", [("embedding", None), ("ffn_up", 1), HEAD])
def test_one_bit_is_a_difference(pair: Pair, tmp_path: Path, capsys: Capsys, key: Key) -> None:
    array = pair[1][key].copy()
    array.view(np.uint32)[1, 2] ^= 1
    captures.save(changed(pair[1], {key: array}), tmp_path / "b")
    code, out, _ = run(capsys, pair[0], tmp_path / "b", "--json")
    said = json.loads(out)
    (row,) = [row for row in said["stages"] if row["state"] != "equal"]
    assert (code, said["verdict"]) == (1, "divergence")
    assert (row["stage"], row["layer"], row["n"] - row["n_bits_equal"]) == (*key, 1)


@pytest.mark.parametrize(("rtol", "code"), [(1e-3, 0), (1e-5, 1)])
def test_rtol_is_relative_l2_per_tensor(pair: Pair, tmp_path: Path, capsys: Capsys, rtol: float, code: int) -> None:
    """One tensor scaled by 1 + 1e-4 is a relative L2 of 1e-4: inside 1e-3, outside 1e-5."""
    captures.save(changed(pair[1], {HEAD: pair[1][HEAD] * np.float32(1 + 1e-4)}), tmp_path / "b")
    found, out, _ = run(capsys, pair[0], tmp_path / "b", "--rtol", rtol, "--json")
    assert found == code
    row = json.loads(out)["stages"][-1]
    assert row["rel_l2"] == pytest.approx(1e-4, rel=1e-2)


def test_a_small_tensor_is_not_hidden_by_large_ones(pair: Pair, tmp_path: Path, capsys: Capsys) -> None:
    small = pair[1]["ffn_out", 0] * np.float32(1e-12)
    captures.save(changed(pair[1], {("ffn_out", 0): small}), tmp_path / "a2")
    captures.save(changed(pair[1], {("ffn_out", 0): small * 2}), tmp_path / "b")
    assert run(capsys, tmp_path / "a2", tmp_path / "b", "--rtol", 1e-2)[0] == 1


@pytest.mark.parametrize(
    ("left", "right", "rtol", "code"),
    [
        (np.nan, np.nan, None, 0), (np.nan, np.nan, 1, 0), (np.nan, 1.0, 1, 1), (1.0, np.nan, 1, 1), (np.inf, np.inf, None, 0),
        (np.inf, -np.inf, 1, 1), (np.inf, 3e38, 1, 1), (0.0, -0.0, None, 1), (0.0, -0.0, 0, 0),
    ],
)  # fmt: skip
def test_what_is_not_a_number_never_hides(
    pair: Pair, tmp_path: Path, capsys: Capsys, left: float, right: float, rtol: float | None, code: int
) -> None:
    for name, value in (("a", left), ("b", right)):
        array = pair[1][HEAD].copy()
        array[0, 0] = value
        captures.save(changed(pair[1], {HEAD: array}), tmp_path / name)
    options = [] if rtol is None else ["--rtol", rtol]
    found, out, _ = run(capsys, tmp_path / "a", tmp_path / "b", "--json", *options)
    row = json.loads(out)["stages"][-1]
    assert found == code
    nan = bool(np.isnan(left)), bool(np.isnan(right))
    assert (row["nan_a_only"], row["nan_b_only"], row["nan_both"]) == (nan == (True, False), nan == (False, True), nan == (True, True))


def test_what_only_one_side_has_is_said(pair: Pair, tmp_path: Path, capsys: Capsys) -> None:
    fewer = {key: array for key, array in pair[1].items() if key[1] != 1}
    captures.save(Captures(fewer, replace(pair[1].manifest, tensors={})), tmp_path / "b")
    code, out, _ = run(capsys, pair[0], tmp_path / "b")
    assert code == 0
    assert "only in A  1.attn_norm" in out
    code, out, _ = run(capsys, tmp_path / "b", pair[0], "--json")
    assert {row["layer"] for row in json.loads(out)["only_b"]} == {1}


def test_a_known_view_is_applied_and_said(pair: Pair, tmp_path: Path, capsys: Capsys) -> None:
    last = pair[1].lm_head[-1:]
    notes = {HEAD: replace(TensorNote.of(last), positions="last")}
    captures.save(Captures({HEAD: last}, replace(pair[1].manifest, tensors=notes)), tmp_path / "b")
    code, out, _ = run(capsys, pair[0], tmp_path / "b")
    assert code == 0
    assert "last tokens compared" in out


@pytest.mark.parametrize("said", [{"tokens": (5, 9, 3)}, {"tokens": (5, 9, 2, 4)}, {"positions": (1, 2, 3)}])
def test_unlike_things_are_not_compared(pair: Pair, tmp_path: Path, capsys: Capsys, said: dict[str, tuple[int, ...]]) -> None:
    captures.save(Captures(dict(pair[1]), replace(pair[1].manifest, positions=said.pop("positions", ()), **said)), tmp_path / "b")
    code, out, err = run(capsys, pair[0], tmp_path / "b", "--json")
    assert (code, out) == (3, "")
    assert "against" in err


def test_nothing_compared_is_no_agreement(pair: Pair, tmp_path: Path, capsys: Capsys) -> None:
    captures.save(Captures({HEAD: pair[1].lm_head}, replace(pair[1].manifest, tensors={})), tmp_path / "b")
    code, out, err = run(capsys, pair[0], tmp_path / "b", "--stages", "*.ffn_out")
    assert (code, out) == (3, "")
    assert "no tensor in common" in err


@pytest.mark.parametrize(
    ("argv", "code", "word"),
    [
        ([], 2, "required"), (["A"], 2, "required"), (["A", "none"], 3, "none"), (["A", "A", "--rtol", "-1"], 2, "rtol"),
        (["A", "A", "--rtol", "nan"], 2, "rtol"), (["A", "A", "--stages", "ffn_ot"], 2, "did you mean 'ffn_out'"),
        (["A", "A", "--stages", ""], 2, "empty"), (["A", "A", "--colour"], 2, "--colour"), (["A", "A", "--json", "-q"], 2, "not allowed"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(pair: Pair, capsys: Capsys, argv: list[str], code: int, word: str) -> None:
    found, out, err = run(capsys, *[pair[0] if part == "A" else part for part in argv])
    assert (found, out) == (code, "")
    assert err.count("\n") == 1
    assert word in err


def test_a_damaged_capture_cannot_be_compared(pair: Pair, tmp_path: Path, capsys: Capsys) -> None:
    captures.save(pair[1], tmp_path / "b")
    path = tmp_path / "b" / "layer-001.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    code, out, err = run(capsys, pair[0], tmp_path / "b")
    assert (code, out) == (3, "")
    assert "layer-001" in err
