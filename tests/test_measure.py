"""Floor 1, measure: what one pass in C says of two arrays is what NumPy says, whatever the threads, and a NaN never hides."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from aprender import _core
from aprender.judge import elements, metrics

Floats = NDArray[np.float32]

#: NaN of several payloads, infinities, zeros, subnormals, the largest and smallest numbers.
SPECIAL = np.array(
    [
        0x7FC00000,
        0x7FC00001,
        0x7F800001,
        0xFFC12345,
        0x7F800000,
        0xFF800000,
        0,
        0x80000000,
        1,
        0x80000001,
        0x7F7FFFFF,
        0xFF7FFFFF,
        0x00800000,
    ],
    np.uint32,
).view(np.float32)


def witness(a: Floats, b: Floats) -> dict[str, object]:
    """The same figures, each by its own definition."""
    nan_a, nan_b = np.isnan(a), np.isnan(b)
    finite = np.isfinite(a) & np.isfinite(b)
    x, y = a[finite].astype(np.float64), b[finite].astype(np.float64)
    gap = np.abs(x - y)
    differ = a.view(np.uint32) != b.view(np.uint32)
    equal = (a == b) | (nan_a & nan_b)
    rank = [
        np.where(v.view(np.int32) < 0, -(v.view(np.int32) & 0x7FFFFFFF).astype(np.int64), v.view(np.int32)) for v in (a[finite], b[finite])
    ]
    places, apart = np.flatnonzero(finite), np.abs(rank[0] - rank[1])
    return {
        "over": tuple(int(np.sum(apart > steps)) for steps in (1, 16, 256, 65536)),
        "bits_equal": int(np.sum(~differ)), "value_equal": int(np.sum(equal)), "nan_a": int(np.sum(nan_a & ~nan_b)),
        "nan_b": int(np.sum(nan_b & ~nan_a)), "nan_both": int(np.sum(nan_a & nan_b)),
        "inf_unlike": int(np.sum(~finite & ~nan_a & ~nan_b & ~equal)), "finite": int(finite.sum()),
        "max_abs": float(gap.max(initial=0)), "max_at": int(places[gap.argmax()]) if gap.any() else -1,
        "max_ulp": int(apart.max(initial=0)), "first": int(differ.argmax()) if differ.any() else -1,
    }  # fmt: skip


def sums(a: Floats, b: Floats) -> dict[str, tuple[float, float]]:
    """Each sum exactly, and the sum of its terms' sizes: what an error is relative to."""
    finite = np.isfinite(a) & np.isfinite(b)
    x, y = a[finite].astype(np.float64), b[finite].astype(np.float64)
    terms = {"a": x, "b": y, "aa": x * x, "bb": y * y, "dd": (x - y) * (x - y), "ab": (x - y) * (x + y)}
    return {name: (math.fsum(term), math.fsum(np.abs(term))) for name, term in terms.items()}


def check(a: Floats, b: Floats) -> None:
    said = _core.compare(a, b)
    assert {name: said[name] for name in witness(a, b)} == witness(a, b)
    for name, (total, size) in sums(a, b).items():
        assert abs(said[name] - total) <= 1e-13 * size, name  # 4096 additions in 8 lanes: at most 512 roundings of 1.1e-16 in a chain


def pair(n: int, seed: int = 0, spread: float = 1e-3) -> tuple[Floats, Floats]:
    generator = np.random.default_rng(seed)
    a = generator.standard_normal(n).astype(np.float32)
    b = (a * (1 + spread * generator.standard_normal(n))).astype(np.float32)
    same = generator.random(n) < 0.3
    b[same] = a[same]
    return a, b


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 4095, 4096, 4097, 65536, 70001, 300_000])
def test_against_numpy(n: int) -> None:
    check(*pair(n))


def test_every_pair_of_special_values() -> None:
    a, b = (v.ravel() for v in np.meshgrid(SPECIAL, SPECIAL))
    check(np.ascontiguousarray(a), np.ascontiguousarray(b))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 9000), st.integers(0, 2**32 - 1), st.integers(0, 40))
def test_planted_values_never_hide(n: int, seed: int, count: int) -> None:
    """Whatever is planted is counted; and unless it is the same NaN or infinity in both, the verdict is "different"."""
    generator = np.random.default_rng(seed)
    a, _ = pair(n, seed)
    b = a.copy()
    places = generator.integers(0, n, count)
    b[places] = SPECIAL[generator.integers(0, 6, count)]
    check(a, b)
    found = elements.compare(a, b)
    assert (found.unlike > 0) == (count > 0)
    assert found.n_bits_equal == n - len(set(places.tolist()))


@pytest.mark.parametrize("n", [5000, 300_001])
def test_threads_change_no_bit(n: int) -> None:
    a, b = pair(n)
    first = _core.compare(a, b, limit=7, threads=1)
    assert all(_core.compare(a, b, limit=7, threads=t) == first for t in (2, 3, 8, 64))
    b[n // 2] += 1
    assert _core.compare(a, b, limit=7, threads=2) != first


TIERS = [row[0] for row in _core.TIERS if row[1]]


@pytest.mark.parametrize("n", [0, 5, 8, 4095, 4096, 50_003])
@pytest.mark.parametrize("plant", [None, np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45], ids=str)
def test_every_tier_says_the_same(n: int, plant: float | None) -> None:
    """A block of numbers alone takes another way than one with a NaN or an infinity: bits, sums and places are the same."""
    a, b = pair(n, 3)
    if plant is not None and n:
        b[[0, n // 2, n - 1]] = plant
        a[n // 2] = plant
    said = [_core.compare(a, b, limit=5, tier=tier) for tier in TIERS]
    assert all(other == said[0] for other in said)
    check(a, b)


def test_a_tier_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="CPU tier sse9 is unknown here"):
        _core.compare(*pair(8), tier="sse9")


@pytest.mark.parametrize("limit", [0, 1, 3, 10, 5000])
@pytest.mark.parametrize("plant", [lambda b: None, lambda b: b.__setitem__(slice(9, 20000, 4999), np.nan)], ids=["numbers", "NaN"])
def test_the_places_that_differ_most(limit: int, plant: Callable[[Floats], None]) -> None:
    """In a total order: NaN, infinities, gap; among equals the first."""
    a, b = pair(20_000)
    b[11], b[17_000] = np.inf, -np.inf
    b[300:310] = a[300:310] + 2  # a tie
    plant(b)
    score = np.where(np.isnan(b), 2e300, np.where(np.isinf(b), 1e300, np.abs(a.astype(np.float64) - np.where(np.isfinite(b), b, 0))))
    where = np.flatnonzero(a.view(np.uint32) != b.view(np.uint32))
    order = where[np.lexsort((where, -score[where]))][:limit]
    assert _core.compare(a, b, limit=limit)["top"] == tuple((int(at), float(score[at])) for at in order)


def test_small_angles_do_not_cancel() -> None:
    """1 - cosine of arrays 1e-7 apart, and of a pure scale, where it is nothing."""
    a, _ = pair(10_000)
    b = np.nextafter(a, np.float32(np.inf))
    x, y = a.astype(np.float64), b.astype(np.float64)
    truth = float(np.square(x / np.linalg.norm(x) - y / np.linalg.norm(y)).sum() / 2)
    assert elements.compare(a, b).cos_distance == pytest.approx(truth, rel=1e-6)
    assert 0 < truth < 1e-14
    scaled = elements.compare(a, a * np.float32(2))
    assert scaled.cos_distance is not None
    assert scaled.cos_distance < 1e-15
    assert scaled.rel_l2 == pytest.approx(0.5)


@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-3, 10.0])
def test_the_distance_of_float32_is_that_of_float64(spread: float) -> None:
    """The core's pass beside NumPy's own norms in float64; figures that do not exist are None on both ways."""
    a, b = pair(10_000, spread=spread)
    x, y = a.astype(np.float64), b.astype(np.float64)
    found = metrics.distance(a, b)
    assert found.rel_l2 == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(y), rel=1e-12)
    assert found.norm_ratio == pytest.approx(np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)
    apart = float(np.square(x / np.linalg.norm(x) - y / np.linalg.norm(y)).sum() / 2)
    assert found.cos_distance == pytest.approx(apart, rel=1e-6, abs=1e-30)
    assert metrics.distance(x, y).cos_distance == pytest.approx(apart, rel=1e-6, abs=1e-30)
    zero = np.zeros_like(a)
    assert metrics.distance(a, zero) == metrics.distance(x, zero) == metrics.Distance(a.size, None, None, None)
    a[3] = np.nan
    assert metrics.distance(a, b) == metrics.Distance(a.size, None, None, None, (1, 0))


def test_unlike_things_are_refused() -> None:
    a, b = pair(8)
    with pytest.raises(TypeError):
        _core.compare(a.astype(np.float64), b)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="7"):
        _core.compare(a, b[:7])


def test_not_contiguous() -> None:
    a, b = pair(4000)
    assert _core.compare(a[::2], b[::2]) == _core.compare(a[::2].copy(), b[::2].copy())
