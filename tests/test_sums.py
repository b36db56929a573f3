"""Floor 1, sums: the variance of adding in float32 and the bits of declared lanes, in C, against the same definitions in NumPy.

The witness below shares no code with the core: all partial sums at once by ``cumsum``, segments by matrix products, fused multiply-adds in
float64 with the double rounding put right.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from aprender import _core
from aprender.arithmetic import F32, Order
from aprender.errors import ArgumentError
from aprender.judge import sums
from aprender.judge.rounding import MEAN_ROUNDING, fma32, variance

Float = NDArray[np.float64]

LENGTHS = (1, 15, 16, 17, 31, 33, 64, 100, 512, 3584)
BLOCKS = (1, 7, 32, 128, 192, 9999)
ORDERS = (*(Order(lanes=n) for n in (16, 1, 4, 64)), Order(), *(Order(blocks=dict.fromkeys(LENGTHS, n)) for n in BLOCKS))


# ---- the witness -----------------------------------------------------------------------------------------------------------------------


def tree(lanes: Float) -> Iterator[Float]:
    """Sums of the fixed tree over the last axis, level by level: l with l + half, not rounded."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
        yield lanes


def grid(a: Float, length: int) -> Float:
    """[P, K] filled up with zeros and cut into [P, K / length, length]."""
    filled = np.pad(a, ((0, 0), (0, -a.shape[1] % length)))
    return filled.reshape(len(a), -1, length)


def blocks_exact(products: Float, block: int) -> Float:
    """In order inside blocks, block sums in order: [P]."""
    cut = grid(products, min(block, products.shape[1]))
    running = np.cumsum(cut, axis=2)
    out = np.where(cut != 0, variance(running, F32), 0.0).sum(axis=(1, 2))
    return out + variance(np.cumsum(running[:, :, -1], axis=1)[:, 1:], F32).sum(axis=1)


def lanes_exact(products: Float, lanes: int) -> Float:
    """In order inside lanes, then the tree: [P]."""
    cut = grid(products, lanes)
    running = np.cumsum(cut, axis=1)
    out = np.where(cut != 0, variance(running, F32), 0.0).sum(axis=(1, 2))
    return out + sum((variance(level, F32).sum(axis=1) for level in tree(running[:, -1])), np.zeros(len(out)))


def witness_exact(x: Float, w: Float, order: Order) -> Float:
    """All of [B, T, N], from all partial sums."""
    (batch, tokens, k), columns = x.shape, w.shape[1]
    products = (x[:, :, None] * w[:, None]).reshape(-1, k)
    known = order.block(k, tokens)
    if order.lanes:
        found = lanes_exact(products, order.lanes)
    elif known:
        found = blocks_exact(products, known)
    else:
        found = np.maximum(blocks_exact(products, k), MEAN_ROUNDING * (k / 2) * np.square(products).sum(axis=1))
    return found.reshape(batch, tokens, columns)


def segment(x: Float, w: Float, start: Float, out: Float) -> Float:
    """Add to ``out`` what a chain from ``start`` over these products leaves, a walk pinned at both ends; its end."""
    d, q = x @ w.transpose(0, 2, 1), (x * x) @ (w * w).transpose(0, 2, 1)
    m = np.maximum(np.count_nonzero(x, axis=2)[..., None], 1)
    spread = np.maximum(q / m - (d / m) ** 2, 0.0)
    out += MEAN_ROUNDING * (m * np.square(start) + start * d * (m + 1) + d * d * ((m + 1) * (2 * m + 1) / (6.0 * m)))
    out += MEAN_ROUNDING * spread * ((m * m - 1) / 6.0)
    return start + d


def witness_estimate(x: Float, w: Float, order: Order) -> Float:
    """All of [B, T, N], from the ends of lanes or of stretches of 32 products."""
    (batch, tokens, k), columns = x.shape, w.shape[1]
    out, nothing = np.zeros((batch, tokens, columns)), np.zeros((batch, tokens, columns))
    if order.lanes:
        ends = [segment(x[..., i :: order.lanes], w[..., i :: order.lanes], nothing, out) for i in range(order.lanes)]
        return out + sum((variance(level, F32).sum(axis=-1) for level in tree(np.stack(ends, axis=-1))), nothing)
    known = order.block(k, tokens)
    block, total = known or k, nothing
    for first in range(0, k, block):
        chain = nothing
        for at in range(first, min(first + block, k), 32):
            piece = slice(at, min(at + 32, first + block, k))
            chain = segment(x[..., piece], w[..., piece], chain, out)
        total = total + chain
        if first:
            out += variance(total, F32)
    return out if known else np.maximum(out, MEAN_ROUNDING * (k / 2) * ((x * x) @ (w * w).transpose(0, 2, 1)))


def witness_bits(x: Float, w: Float, lanes: int) -> Float:
    """Rows [P, K] by fused multiply-adds in lanes and a rounded tree: [P].  The last products go to the first lanes only."""
    acc = np.zeros((len(x), lanes))
    for at in range(0, x.shape[1], lanes):
        n = min(lanes, x.shape[1] - at)
        acc[:, :n] = fma32(x[:, at : at + n], w[:, at : at + n], acc[:, :n])
    while acc.shape[1] > 1:
        acc = (acc[:, : acc.shape[1] // 2] + acc[:, acc.shape[1] // 2 :]).astype(np.float32).astype(np.float64)
    return acc[:, 0]


# ---- operands --------------------------------------------------------------------------------------------------------------------------


def float32(a: Float) -> Float:
    return a.astype(np.float32).astype(np.float64)


def usual(k: int, mean: float, seed: int = 0, batch: int = 2, tokens: int = 3, columns: int = 11) -> tuple[Float, Float]:
    generator = np.random.default_rng([k, int(10 * mean), seed])
    x = float32(generator.normal(size=(batch, tokens, k)) + mean)
    x[generator.random(x.shape) < 0.1] = 0.0
    return x, float32(generator.normal(size=(batch, columns, k)) + mean)


def wild(k: int, seed: int, count: int = 64) -> tuple[Float, Float]:
    """Rows of float32 bits of every exponent, of ties, of subnormal sums, of sums that cancel; some with NaN or infinity."""
    generator = np.random.default_rng([k, seed])
    bits = generator.integers(0, 1 << 32, (2, count, k), np.uint32)
    a = bits.view(np.float32).astype(np.float64)
    a = np.where(np.isfinite(a), a, 1.0)
    step = generator.integers(-8, 9, a.shape) * 2.0 ** generator.integers(-25, 26, a.shape)  # ties, and 2^24 + 1
    tiny = generator.integers(-(1 << 10), 1 << 10, a.shape) * 2.0 ** generator.integers(-80, -70, a.shape)
    kind = (np.arange(count) % 4)[:, None]
    a = np.where(kind == 0, a, np.where(kind == 1, step, tiny))
    cancel = kind[:, 0] == 3
    a[:, cancel] = generator.normal(size=a[:, cancel].shape)
    a[0, cancel, k // 2 :] = a[0, cancel, : k - k // 2]
    a[1, cancel, k // 2 :] = -a[1, cancel, : k - k // 2]
    a[:, 3::16] *= 2.0**30
    for at, value in ((8, np.nan), (9, np.inf), (10, -np.inf)):
        if k:
            a[0, at::16, generator.integers(0, k)] = value
    x, w = float32(a)
    return x, w


def agree(found: NDArray[np.floating], expected: Float, tolerance: float) -> None:
    """To a relative error, infinities and NaN in the same places."""
    assert found.shape == expected.shape
    same = np.isfinite(expected)
    assert np.array_equal(found[~same], expected[~same], equal_nan=True)
    worst = np.abs(found - expected)[same] / np.where(expected[same] == 0, 1e-300, np.abs(expected[same]))
    assert worst.max(initial=0.0) <= tolerance


# ---- variances -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("mean", [0.0, 0.3, 1.0])
def test_variances_are_those_of_the_definition(order: Order, mean: float) -> None:
    for k in LENGTHS:
        x, w = usual(k, mean)
        dot = sums.Dot(x, w, order)
        every = np.arange(x.shape[0] * x.shape[1] * w.shape[1])
        exact = witness_exact(x, w, order)
        agree(sums.exact(dot, every).reshape(exact.shape), exact, 1e-12)
        agree(sums.estimate(dot), witness_estimate(x, w, order), 1e-11)  # a spread is a small difference of large sums


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_variances_of_wild_numbers(order: Order) -> None:
    """Subnormal sums, overflow, infinities and NaN: every partial sum is looked at, so nothing may be skipped."""
    for k in (1, 16, 17, 100):
        x, w = (a[:, None] for a in wild(k, 1))
        found = sums.exact(sums.Dot(x, w, order), np.arange(len(x)))
        agree(found, witness_exact(x, w, order).ravel(), 1e-12)


def test_subnormal_steps_by_hand() -> None:
    """Products of 2^-151 and 2^-149: the first is below half a step and its error is itself, the second rounds by a step."""
    x, w = np.full((1, 1, 2), 2.0**-75), np.array([[[2.0**-76, 2.0**-74]]])
    found = sums.exact(sums.Dot(x[..., :1], w[..., :1], Order(lanes=1)), np.arange(1))
    assert found[0] == pytest.approx(min(2.0**-302, 2.0**-298 / 12), rel=1e-15)
    found = sums.exact(sums.Dot(x, w, Order(lanes=1)), np.arange(1))
    assert found[0] == pytest.approx(2.0**-302 + 2.0**-298 / 12, rel=1e-15)


def test_what_must_be_caught() -> None:
    """The comparison above is sharp: another order, or a step of zeros counted as roundings, is far outside its tolerance."""
    x, w = usual(100, 0.3)
    every = np.arange(66)
    lanes = sums.exact(sums.Dot(x, w, Order(lanes=16)), every)
    assert np.abs(lanes / sums.exact(sums.Dot(x, w, Order(lanes=4)), every) - 1).max() > 0.1
    counted = variance(np.cumsum(x[:, :, None] * w[:, None], axis=3), F32).sum(axis=3).ravel()  # zeros too
    assert np.abs(sums.exact(sums.Dot(x, w, Order(blocks={100: 100})), every) / counted - 1).max() > 0.02


def test_float32_weights_are_read_as_they_are() -> None:
    x, w = usual(200, 0.3)
    for order in (Order(lanes=16), Order()):
        whole, narrow = (sums.Dot(x, form, order) for form in (w, w.astype(np.float32)))
        assert np.array_equal(sums.estimate(whole), sums.estimate(narrow))
        assert np.array_equal(sums.exact(whole, np.arange(66)), sums.exact(narrow, np.arange(66)))
        turned = sums.Dot(
            x.transpose(2, 1, 0).copy().transpose(2, 1, 0), np.asfortranarray(w), order
        )  # attention's views are not in row order
        assert np.array_equal(sums.estimate(whole), sums.estimate(turned))


def test_no_bit_depends_on_threads_or_on_neighbours() -> None:
    x, w = usual(333, 0.3, tokens=5, columns=37)
    flat = np.random.default_rng(0).permutation(2 * 5 * 37)
    for order in ({"lanes": 16}, {"block": 128}, {}):
        one = _core.estimate_sums(x, w, threads=1, **order)
        assert np.array_equal(one, _core.estimate_sums(x, w, threads=5, **order))
        assert np.array_equal(one[:, :, 30:31], _core.estimate_sums(x, np.ascontiguousarray(w[:, 30:31]), **order))
        every = _core.exact_sums(x, w, flat, threads=1, **order)
        assert np.array_equal(every, _core.exact_sums(x, w, flat, threads=5, **order))
        assert np.array_equal(every[5:6], _core.exact_sums(x, w, flat[5:6], **order))
    a, b = x.astype(np.float32), w.astype(np.float32)
    bits = _core.lane_dots(a, b, threads=1)
    assert np.array_equal(bits, _core.lane_dots(a, b, threads=5))
    assert np.array_equal(bits.ravel()[flat], _core.lane_dots(a, b, flat, threads=3))


# ---- bits ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 15, 16, 17, 31, 32, 33, 100, 3584])
@pytest.mark.parametrize("lanes", [1, 2, 16, 64])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bits_of_lanes(k: int, lanes: int) -> None:
    for seed in range(4):
        for x, w in (wild(k, seed), tuple(a[0] for a in usual(k, 0.3, seed, 1, 8, 8))):
            found, expected = sums.lane_dot(x, w, lanes), witness_bits(x, w, lanes)
            missing = np.isnan(expected)
            assert np.array_equal(np.isnan(found), missing)
            assert np.array_equal(found[~missing].view(np.int64), expected[~missing].view(np.int64))


def test_fused_multiply_adds_round_once() -> None:
    """(1 + 2^-12)^2 - 1 = 2^-11 + 2^-24: an engine that rounds the product first loses the last term; ties go to even."""
    x, w = np.array([[1.0, 1 + 2.0**-12]]), np.array([[-1.0, 1 + 2.0**-12]])
    assert sums.lane_dot(x, w, 1)[0] == 2.0**-11 + 2.0**-24
    half = np.array([[2.0**24, 1.0, 2.0**-60]])  # 2^24 + 1 is a tie and goes to even; what follows is too late
    assert sums.lane_dot(half, np.ones((1, 3)), 1)[0] == 2.0**24
    assert sums.lane_dot(np.array([[2.0**24, 1 + 2.0**-20]]), np.array([[1.0, 1.0 + 2.0**-23]]), 1)[0] == 2.0**24 + 2
    assert np.signbit(sums.lane_dot(np.array([[-(2.0**-149)]]), np.array([[2.0**-149]]), 1))[0]  # -0, by underflow


def test_numbers_that_are_not_float32_are_refused() -> None:
    x, w = usual(20, 0.3)
    with pytest.raises(ArgumentError, match="float32"):
        sums.emulate(sums.Dot(x + 1e-12, w, Order(lanes=16)))
    x[0, 0, 0] = np.nan
    assert np.isnan(sums.emulate(sums.Dot(x, w, Order(lanes=16)))[:11]).all()


# ---- arguments -------------------------------------------------------------------------------------------------------------------------


def test_nothing_to_do() -> None:
    for shape in ((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)):
        b, t, n, k = shape
        x, w = np.ones((b, t, k)), np.ones((b, n, k))
        for order in ({"lanes": 16}, {"block": 2}, {}):
            assert np.array_equal(_core.estimate_sums(x, w, **order), np.zeros((b, t, n)))
            assert np.array_equal(_core.exact_sums(x, w, np.arange(b * t * n), **order), np.zeros(b * t * n))
        assert np.array_equal(_core.lane_dots(x.astype(np.float32), w.astype(np.float32)), np.zeros((b, t, n)))


def test_bad_arguments_are_refused() -> None:
    x, w = np.ones((2, 3, 5)), np.ones((2, 4, 5))
    narrow, flat = w.astype(np.float32), np.arange(3)
    for lanes in (-1, 3, 128):
        with pytest.raises(ValueError, match=f"lanes {lanes}"):
            _core.estimate_sums(x, w, lanes=lanes)
    with pytest.raises(ValueError, match="lanes 0"):
        _core.lane_dots(narrow, narrow, lanes=0)
    with pytest.raises(ValueError, match="block -1"):
        _core.exact_sums(x, w, flat, block=-1)
    with pytest.raises(ValueError, match="one length"):
        _core.estimate_sums(x, w[..., :4])
    with pytest.raises(ValueError, match="one length"):
        _core.exact_sums(x, w[:1], flat)
    with pytest.raises(ValueError, match="2 axes"):
        _core.estimate_sums(x[0], w)
    for bad in (x.astype(np.float32), x.tolist(), x.astype(np.int64)):
        with pytest.raises(TypeError, match="float64"):
            _core.estimate_sums(bad, w)
    with pytest.raises(TypeError, match="float32"):
        _core.lane_dots(x, narrow)
    with pytest.raises(TypeError, match="float32"):
        _core.lane_dots(narrow, w)
    for at in (-1, 24):
        with pytest.raises(IndexError, match=r"there are 24"):
            _core.exact_sums(x, w, np.array([0, at]))
    for bad_flat in (flat.astype(np.int32), flat[None], [0], None):
        with pytest.raises(TypeError, match="int64"):
            _core.exact_sums(x, w, bad_flat)


def test_every_failed_allocation_is_reported() -> None:
    x, w = usual(40, 0.3)
    before = _core._live_bytes()
    for nth in (1, 2, 3):
        _core._fail_allocation(nth)
        try:
            with pytest.raises(MemoryError):
                _core.estimate_sums(x, w, lanes=16)
        finally:
            _core._fail_allocation(-1)
        assert _core._live_bytes() == before
