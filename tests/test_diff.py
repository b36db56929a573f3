"""The command diff: bits, tolerance, NaN, unlike things, exit codes.  Captures are random numbers made here (see test_captures.py)."""

from __future__ import annotations

import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_captures as made
from hypothesis import given
from hypothesis import strategies as st

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
        (["A", "A", "--stages", ""], 2, "empty"), (["A", "A", "--colour"], 2, "--colour"),
        (["A", "A", "--limit", "-1"], 2, "negative"), (["A", "A", "--json", "-q"], 2, "not allowed"),
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


# ---- element by element --------------------------------------------------------------------------


def one(capsys: Capsys, folder: Path, left: np.ndarray, right: np.ndarray, *options: object) -> dict[str, Any]:
    """The row of a comparison of two tensors [tokens, width] that are everything of two captures."""
    for name, array in (("x", left), ("y", right)):
        captures.save(Captures({("final_norm", None): array}, made.manifest(tokens=tuple(range(len(array))))), folder / name)
    run_code, out, err = run(capsys, folder / "x", folder / "y", "--json", *options)
    assert run_code in (0, 1), err
    (row,) = json.loads(out)["stages"]
    return row


def test_figures_are_those_of_the_definitions(tmp_path: Path, capsys: Capsys) -> None:
    """Against exact rational sums of the same float32 values (math.fsum over float64 products, which are exact for float32)."""
    generator = np.random.default_rng(5)
    a, b = generator.standard_normal((2, 4, 50)).astype(np.float32)
    row = one(capsys, tmp_path, a, b)
    x, y = (array.ravel().astype(np.float64).tolist() for array in (a, b))
    gaps = [abs(p - q) for p, q in zip(x, y, strict=True)]

    def norm(values: list[float]) -> float:
        return math.sqrt(math.fsum(v * v for v in values))

    dot = math.fsum(p * q for p, q in zip(x, y, strict=True))
    assert row["rel_l2"] == pytest.approx(norm(gaps) / norm(y), rel=1e-13)
    assert row["rms"] == pytest.approx(norm(gaps) / math.sqrt(200), rel=1e-13)
    assert row["cosine"] == pytest.approx(dot / norm(x) / norm(y), abs=1e-14)
    assert row["std_ratio"] == pytest.approx(statistics.pstdev(x) / statistics.pstdev(y), rel=1e-12)
    assert row["max_abs"] == max(gaps)
    order = sorted(range(200), key=lambda i: (-gaps[i], i))[:10]
    assert [50 * e["index"][0] + e["index"][1] for e in row["top"]] == order
    assert [(e["a"], e["b"], e["gap"]) for e in row["top"]] == [(x[i], y[i], gaps[i]) for i in order]


def test_a_small_angle_is_not_lost(tmp_path: Path, capsys: Capsys) -> None:
    """One element of 10^4 ones moved by 2^-20: 1 - cos is half the squared relative gap across the direction, about 4.5e-17."""
    a = np.ones((2, 5000), np.float32)
    b = a.copy()
    b[1, 7] += np.float32(2.0**-20)
    row = one(capsys, tmp_path, a, b)
    assert row["cos_distance"] == pytest.approx(2.0**-40 / 1e4 / 2, rel=1e-3)
    assert row["max_ulp"] == 8  # 2^-20 in steps of 2^-23
    assert (row["first"], row["n"] - row["n_bits_equal"]) == ([1, 7], 1)


@pytest.mark.parametrize(
    ("left", "right", "steps"),
    [
        (1.0, np.nextafter(np.float32(1), np.float32(2)), 1), (0.0, -0.0, 0), (2.0**-149, -(2.0**-149), 2), (-1.0, -1.0 - 2.0**-22, 2),
        (2.0**-126, 2.0**-126 - 2.0**-149, 1), (1.0, 2.0, 2**23), (3.4028234663852886e38, -3.4028234663852886e38, 2 * 0x7F7FFFFF),
    ],
)  # fmt: skip
def test_steps_between_two_numbers(tmp_path: Path, capsys: Capsys, left: float, right: float, steps: int) -> None:
    a, b = (np.array([[7, value]], np.float32) for value in (left, right))
    assert one(capsys, tmp_path, a, b)["max_ulp"] == steps


def test_elements_have_a_total_order(tmp_path: Path, capsys: Capsys) -> None:
    """NaN, then infinities, then gaps, the first index first among equals, then what only differs in its bits."""
    a = np.zeros((2, 6), np.float32)
    b = np.array([[0, 3, np.inf, np.nan, 3, -0.0], [np.nan, -np.inf, 4, 0, 1, 0]], np.float32)
    row = one(capsys, tmp_path, a, b)
    assert [e["index"] for e in row["top"]] == [[0, 3], [1, 0], [0, 2], [1, 1], [1, 2], [0, 1], [0, 4], [1, 4], [0, 5]]
    assert [e["gap"] for e in row["top"]] == ["nan", "nan", "inf", "inf", 4, 3, 3, 1, 0]
    assert (row["top"][0]["b"], row["top"][3]["b"], row["top"][8]["b_bits"]) == ("nan", "-inf", "80000000")
    for limit in range(10):
        assert one(capsys, tmp_path, a, b, "--limit", limit)["top"] == row["top"][:limit]
    assert (row["max_abs"], row["max_abs_finite"], row["nan_b_only"], row["inf_mismatch"]) == ("nan", 4, 2, 2)


def test_the_worst_token_is_named(tmp_path: Path, capsys: Capsys) -> None:
    """Token 0 has the largest gap, token 2 the largest gap for its size; a NaN beats both."""
    a = np.full((4, 8), 1000, np.float32)
    a[2:] = 1
    a[:, ::2] *= -1
    b = a.copy()
    b[0, 0] += 10
    b[2, 0] += 1
    row = one(capsys, tmp_path, a, b)
    assert row["worst_token"] == 2
    assert [t["differing"] for t in row["by_token"]] == [1, 0, 1, 0]
    assert row["by_token"][2]["rel_l2"] == pytest.approx(1 / math.sqrt(7), rel=1e-12)  # 7 ones and a zero
    assert row["by_token"][1]["std_ratio"] == 1
    code, out, _ = run(capsys, tmp_path / "x", tmp_path / "y", "-v")
    assert code == 1
    assert "final_norm: per token" in out
    assert len(re.findall(r"(?m)^ +\d +\d +\d", out)) == 4
    assert "per token" not in run(capsys, tmp_path / "x", tmp_path / "y")[1]
    b[3, 3] = np.nan
    assert one(capsys, tmp_path, a, b)["worst_token"] == 3


def test_a_scale_error_shows_in_the_deviations(tmp_path: Path, capsys: Capsys) -> None:
    """Cosine is blind to it."""
    a = np.random.default_rng(1).standard_normal((3, 40)).astype(np.float32)
    row = one(capsys, tmp_path, a * 2, a)
    assert row["std_ratio"] == pytest.approx(2, rel=1e-7)
    assert row["cos_distance"] < 1e-15


def test_last_token_rows_are_called_by_their_place(pair: Pair, tmp_path: Path, capsys: Capsys) -> None:
    last = pair[1].lm_head[-1:] + np.float32(1)
    notes = {HEAD: replace(TensorNote.of(last), positions="last")}
    captures.save(Captures({HEAD: last}, replace(pair[1].manifest, tensors=notes)), tmp_path / "b")
    code, out, _ = run(capsys, pair[0], tmp_path / "b", "--json")
    assert code == 1
    assert json.loads(out)["stages"][0]["worst_token"] == len(made.TOKENS) - 1


def test_all_tensors_are_compared(pair: Pair, tmp_path: Path, capsys: Capsys) -> None:
    captures.save(pair[1], tmp_path / "b")
    code, out, _ = run(capsys, pair[0], tmp_path / "b", "--json", "--limit", 1)
    said = json.loads(out)
    assert code == 0
    assert said["schema"] == "aprender.diff/2"
    assert len(said["stages"]) == said["compared"] == len(pair[1]) > 10


SPECIAL = (np.nan, np.inf, -np.inf)


@given(
    rows=st.integers(1, 4), columns=st.integers(1, 9), seed=st.integers(0, 1 << 30), scale=st.sampled_from([0.0, 1e-40, 1.0, 3e38]),
    value=st.sampled_from(SPECIAL), side=st.booleans(), rtol=st.sampled_from([None, 0.0, 1e-3, 1e300]), limit=st.integers(0, 3),
)  # fmt: skip
def test_a_planted_nan_or_infinity_never_passes(
    rows: int, columns: int, seed: int, scale: float, value: float, side: bool, rtol: float | None, limit: int
) -> None:
    """In one of two equal tensors it is a difference under every tolerance, and first in the list; in both it is none."""
    generator = np.random.default_rng(seed)
    a = (generator.uniform(-1, 1, (rows, columns)) * scale).astype(np.float32)
    b, at = a.copy(), tuple(generator.integers(0, a.shape))
    (a if side else b)[at] = value
    tokens = tuple(range(rows))

    def compared(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
        pair = (Captures({("final_norm", None): array}, made.manifest(tokens=tokens)) for array in (x, y))
        return diff.compare(*pair, rtol, limit=limit)

    said = compared(a, b)
    (row,) = said["stages"]
    assert said["verdict"] == "divergence"
    assert row["nan_a_only"] + row["nan_b_only"] + row["inf_mismatch"] == 1
    assert row["max_abs"] == ("nan" if np.isnan(value) else "inf")
    assert row["worst_token"] == at[0]
    assert [e["index"] for e in row["top"]] == [[int(i) for i in at]][:limit]
    json.dumps(said, allow_nan=False)
    b[at] = a[at] = value
    assert compared(a, b)["verdict"] == "agree"


@pytest.mark.parametrize("options", [["--prompt-ids", "1"], ["--arithmetic", "exact"]])
def test_a_word_that_nobody_needs_is_refused(pair: Pair, capsys: Capsys, options: list[str]) -> None:
    code, out, err = run(capsys, pair[0], pair[0], *options)
    assert (code, out) == (2, "")
    assert "manifest" in err
