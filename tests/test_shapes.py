"""The codes of a residual, each with one that must be seen and one that must not; everything from arrays made here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from aprender.judge.shapes import Residual, shapes

GENERATOR = np.random.default_rng(11)
T, C, HEAD = 12, 96, 24
DUE = GENERATOR.standard_normal((T, C))
SIGMA = 1e-6
DUST = SIGMA * GENERATOR.standard_normal((T, C))


def codes(captured: Any, due: Any = DUE, head: int = HEAD) -> dict[str, float]:
    """Code to number."""
    used = np.ones(due.shape, bool)
    return {s.code: s.value for s in shapes(Residual.of(captured, due, np.full(due.shape, SIGMA**2), used, head))}


def rows(first: int, last: int) -> Any:
    out = DUE + DUST
    out[first:last] = GENERATOR.standard_normal((last - first, C)) + 0.5 * DUE[first:last]
    return out


def columns(which: Any) -> Any:
    out = DUE + DUST
    out[:, which] *= 1.0 + GENERATOR.uniform(0.1, 0.9, out[:, which].shape)
    return out


ROTATED = np.hstack([np.roll(DUE[:, i : i + HEAD], 1, axis=1) for i in range(0, C, HEAD)])
CASES: list[tuple[str, float | None, Callable[[], Any]]] = [
    ("SCALE", 1.061, lambda: DUE * 1.061 + DUST),
    ("SCALE", 0.0, lambda: DUE * 0.0),
    ("SCALE", -1.0, lambda: -DUE),
    ("ROWSCALE", 3.0, lambda: DUE * np.linspace(0.5, 1.5, T)[:, None] + DUST),
    ("BIAS", 1.0, lambda: DUE + DUST + GENERATOR.standard_normal(C)),
    ("POS0", 1.0, lambda: rows(1, T)),
    ("NORM=", 1.0, lambda: ROTATED),
    ("PERM", float(T), lambda: ROTATED),
    ("HEADBLK", 2.0, lambda: columns(np.r_[24:48, 72:96])),
    ("TAIL", 7.0, lambda: rows(7, T)),
    ("LAST=", T - 1.0, lambda: rows(0, T - 1)),
    ("TOKEN", 4.0, lambda: rows(4, 5)),
    ("CHANNEL", 31.0, lambda: columns([31])),
    ("NAN", 3.0, lambda: np.where(np.arange(C) < 3, np.where(np.arange(T)[:, None] == 2, np.nan, DUE), DUE)),
    ("BLOCK", 32.0, lambda: columns(np.arange(C) % 32 < 5)),
    ("BLOCK", 17.0, lambda: columns(np.arange(10, 27))),
    ("CHAOS", None, lambda: np.random.default_rng(99).standard_normal((T, C))),
    ("FUNC", None, lambda: np.tanh(DUE)),
    ("FAINT", 1.0, lambda: DUE + DUST),
    ("DIFF", None, lambda: DUE + 0.01 * np.random.default_rng(98).standard_normal((T, C))),
]


@pytest.mark.parametrize(("code", "value", "make"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_a_shape_has_its_code_and_number(code: str, value: float | None, make: Callable[[], Any]) -> None:
    found = codes(make())
    assert code in found
    if value is not None:
        assert found[code] == pytest.approx(value, rel=0.05, abs=1e-9)


#: Codes that may hold beside another: a permutation keeps norms, rows that are unlike leave a difference.
BESIDE = {"NORM=", "PERM", "DIFF", "CHAOS", "FUNC", "BLOCK", "HEADBLK", "FAINT"}


@pytest.mark.parametrize(("code", "value", "make"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_no_code_holds_that_should_not(code: str, value: float | None, make: Callable[[], Any]) -> None:
    assert set(codes(make())) - {code} <= BESIDE


@pytest.mark.parametrize("code", ["SCALE", "BIAS", "POS0", "PERM", "HEADBLK", "TAIL", "LAST=", "TOKEN", "CHANNEL", "NAN", "CHAOS", "FUNC"])
def test_noise_on_everything_has_only_a_size(code: str) -> None:
    found = codes(DUE + 0.01 * np.random.default_rng(98).standard_normal((T, C)))
    assert code not in found
    assert found["DIFF"] == pytest.approx(0.01, rel=0.1)


def test_scores_are_read_with_their_heads_side_by_side() -> None:
    due = GENERATOR.standard_normal((4, T, T))
    captured = due.copy()
    captured[2] = GENERATOR.standard_normal((T, T))
    used = np.tril(np.ones((T, T), bool))
    found = {s.code: s for s in shapes(Residual.of(captured, due, np.full(due.shape, SIGMA**2), used, 0))}
    assert "(2)" in found["HEADBLK"].text


def test_what_the_mask_forbids_does_not_count() -> None:
    due = GENERATOR.standard_normal((2, T, T))
    used = np.tril(np.ones((T, T), bool))
    assert shapes(Residual.of(np.where(used, due, np.nan), due, np.full(due.shape, SIGMA**2), used, 0)) == ()
