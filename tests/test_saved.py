"""A saved folder as a side: what it can and what it refuses.  Captures are random numbers (see test_captures.py)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_captures as made

from aprender import captures, sides
from aprender.errors import ArgumentError, CannotRun, FormatError, NotComparable, UnknownName
from aprender.sides.saved import SavedSide
from aprender.stages import parse_selection


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    captures.save(made.make(profile="hf-f32", arithmetic={"matmul": {"Kc": {"24": 8}, "rows": 3}}), tmp_path / "cap")
    return tmp_path / "cap"


def test_it_hands_out_what_was_saved(folder: Path) -> None:
    side = sides.open_side(f"saved:{folder}")
    cap = side.capture(made.TOKENS)
    assert np.array_equal(cap.lm_head, made.make().lm_head)
    assert side.spelling == f"saved:{folder}"
    assert side.model_data() is None
    assert side.tokenizer() is None


def test_the_arithmetic_is_the_recorded_one_with_its_order(folder: Path) -> None:
    side = SavedSide(folder)
    assert side.profile.name == "hf-f32"
    assert side.profile.order.block(24, 3) == 8
    assert side.profile.order.block(24, 2) is None


def test_a_selection(folder: Path) -> None:
    cap = SavedSide(folder).capture(made.TOKENS, parse_selection("1.ffn_*,lm_head"))
    assert {key[1] for key in cap} == {1, None}
    assert set(cap.manifest.tensors) == set(cap)


@pytest.mark.parametrize(("ids", "word"), [((5, 9, 3), "2, asked for 3"), ((5, 9), "2, asked for the end"), ((), "the end")])
def test_other_ids_are_refused_with_both_values(folder: Path, ids: tuple[int, ...], word: str) -> None:
    with pytest.raises(NotComparable, match=word):
        SavedSide(folder).capture(ids)


def test_it_cannot_generate(folder: Path) -> None:
    with pytest.raises(CannotRun, match="cannot generate"):
        SavedSide(folder).generate(made.TOKENS, 1)


def test_a_recording_without_known_arithmetic_is_refused(folder: Path, tmp_path: Path) -> None:
    cap = captures.open_captures(folder)
    for profile, error in ((None, ArgumentError), ("hf-f33", UnknownName)):
        captures.save(captures.Captures(dict(cap), replace(cap.manifest, profile=profile)), tmp_path / "other")
        with pytest.raises(error):
            SavedSide(tmp_path / "other")


def test_what_is_no_capture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no manifest\.json"):
        sides.open_side(f"saved:{tmp_path}")
