"""Floor 1: what is written in a format is what the foreign readers read, and as good as what ggml's own encoders write.

The plain formats, Q8_0 and Q4_0 are held against the bytes of NumPy, gguf and ggml; the formats with a search of our own against the
errors that ggml's encoders leave. What cannot be written is refused before a byte is.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import tracemalloc
from collections.abc import Callable

import gguf
import llamacpp
import numpy as np
import pytest
from numpy.typing import NDArray

from aprender import _core
from aprender.errors import ArgumentError, FormatError, UnknownName

WRITABLE = [row for row in _core.FORMATS if row[8]]
ROWS = {row[0]: row for row in _core.FORMATS}

#: Formats that we write byte by byte as ggml does.
SAME_BYTES = ("Q8_0", "Q4_0")


def drawn(scale: float, seed: int = 0) -> NDArray[np.float32]:
    """[64, 256] around `scale`; rows of zeros, of one number, of few, of numbers half way between two quants, and with outliers."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((64, 256)) * scale
    x[0] = 0
    x[1] = scale
    x[2] = -scale
    x[3:9] = np.round(x[3:9] / scale) * scale
    x[9, ::32] *= 20
    x[10, 1::2] = -x[10, ::2]  # both signs of the largest magnitude
    for row, top in ((11, 127), (12, -127), (13, 8), (14, -8)):  # half way between two quants, exactly
        x[row] = (np.arange(256) % 32 % abs(top) - abs(top) // 2 + 0.5) * scale
        x[row, ::32] = top * scale
    x[-1] = -0.0
    return x.astype(np.float32)


def float32_patterns() -> NDArray[np.float32]:
    """Random bits, and every pattern near the edges of a half: the least subnormal, the least normal, the first that is infinite."""
    generator = np.random.default_rng(0)
    edges = [np.arange(edge - 70000, edge + 70000, dtype=np.uint32) for edge in (0x33000000, 0x38800000, 0x477FF000, 0x7F7F8000)]
    bits = np.concatenate([generator.integers(0, 1 << 32, 1 << 20, np.uint32), *edges])
    return np.concatenate([bits, bits | 0x80000000]).view(np.float32)


# ---- bytes -----------------------------------------------------------------------------------------------------------------------------


def test_f32_is_copied() -> None:
    """Signalling NaNs too."""
    x = float32_patterns()
    np.testing.assert_array_equal(_core.encode("F32", x), x.view(np.uint8))


def test_f16_rounds_to_nearest_even() -> None:
    x = float32_patterns()
    with np.errstate(all="ignore"):
        theirs = x.astype(np.float16)
    mine = _core.encode("F16", x).view(np.float16)
    nan = np.isnan(x)
    np.testing.assert_array_equal(mine[~nan].view(np.uint16), theirs[~nan].view(np.uint16))
    kept = (x[nan].view(np.uint32) >> 13 & 0x3FF) | 0x7E00 | (x[nan].view(np.uint32) >> 16 & 0x8000)  # quiet, sign and payload kept
    np.testing.assert_array_equal(mine[nan].view(np.uint16), kept)
    assert np.isinf(mine[np.isfinite(x)]).any()


def test_bf16_rounds_to_nearest_even() -> None:
    x = float32_patterns()
    np.testing.assert_array_equal(_core.encode("BF16", x), gguf.quants.quantize(x, gguf.GGMLQuantizationType.BF16))
    assert np.isinf(_core.dequantize("BF16", _core.encode("BF16", x), x.shape)[np.isfinite(x)]).any()


#: Below 1e-38 the inverse of the scale overflows, and what ggml then converts to an integer is undefined.
SCALES = (1e-30, 1e-9, 1e-7, 1e-6, 1e-4, 1.0, 100.0, 3e3)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", SAME_BYTES)
def test_the_bytes_are_those_of_gguf(name: str, scale: float) -> None:
    x = drawn(scale)[:-1]  # -0 has a scale of 0 there and of -0 in ggml
    np.testing.assert_array_equal(_core.encode(name, x), gguf.quants.quantize(x, gguf.GGMLQuantizationType[name]))


@pytest.mark.foreign
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", SAME_BYTES)
def test_the_bytes_are_those_of_ggml(name: str, scale: float, peer: llamacpp.Peer) -> None:
    x = drawn(scale, seed=1)
    assert _core.encode(name, x).tobytes() == peer.quantize(name, x)


@pytest.mark.parametrize("name", SAME_BYTES)
def test_what_is_too_small_for_a_scale_is_zero(name: str) -> None:
    for scale in (1e-38, 1e-40, 1e-45):
        assert not _core.dequantize(name, _core.encode(name, drawn(scale)), (64, 256)).any()


# ---- errors ----------------------------------------------------------------------------------------------------------------------------


def populations() -> dict[str, NDArray[np.float32]]:
    """[64, 1024] each: what weights look like, and what they should not."""
    generator = np.random.default_rng(0)
    shape = (64, 1024)
    gaussian = generator.standard_normal(shape)
    made = {
        "gaussian": gaussian,
        "weights": gaussian * 0.02,
        "uniform": generator.uniform(-1, 1, shape),
        "positive": generator.uniform(0, 1, shape),
        "offset": gaussian * 0.1 + 3,
        "heavy tails": generator.standard_t(2, shape),
        "heavier tails": np.clip(generator.standard_cauchy(shape), -1e4, 1e4),
        "sparse": gaussian * (generator.random(shape) < 0.05),
        "constant rows": np.repeat(generator.standard_normal((64, 1)), 1024, 1),
        "constant groups": np.repeat(generator.standard_normal((64, 32)), 32, 1),
        "one magnitude": generator.choice([-1.0, 1.0], shape),
        "large": gaussian * 1e4,
        "small": gaussian * 1e-5,  # their sub-scales are subnormal halves
        "tiny": gaussian * 1e-30,
        "subnormal": gaussian * 1e-40,
        "zero": np.zeros(shape),
        "halves": np.where(np.arange(1024) % 32, generator.integers(-7, 7, shape) + 0.5, 7),  # exactly half way, under a scale of one
    }
    return {name: x.astype(np.float32) for name, x in made.items()}


POPULATIONS = populations()
SEARCHED = {"Q4_K": 32, "Q6_K": 16}  # values of a group


def rms(x: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(x**2)))


@pytest.mark.foreign
@pytest.mark.parametrize("kind", POPULATIONS)
@pytest.mark.parametrize("name", SEARCHED)
def test_no_worse_than_ggml(name: str, kind: str, peer: llamacpp.Peer) -> None:
    """The error of our search, by ggml's own decoder, is no more than 1.01 times that of ggml's encoder."""
    x = POPULATIONS[kind]
    mine = peer.dequantize(name, _core.encode(name, x).tobytes(), x.size).reshape(x.shape)
    theirs = peer.dequantize(name, peer.quantize(name, x), x.size).reshape(x.shape)
    assert rms(mine.astype(np.float64) - x) <= 1.01 * rms(theirs.astype(np.float64) - x)


@pytest.mark.parametrize("kind", POPULATIONS)
@pytest.mark.parametrize("name", SEARCHED)
def test_no_value_is_far_off(name: str, kind: str) -> None:
    """Within a step and a quarter of its own group, and what rounding the group's scale under the block's half may add."""
    x = POPULATIONS[kind]
    groups = x.reshape(-1, SEARCHED[name]).astype(np.float64)
    if name == "Q4_K":
        step = (np.maximum(groups.max(1), 0) - np.minimum(groups.min(1), 0)) / 15
    else:
        step = np.abs(groups).max(1) / 32
    off = np.abs(_core.dequantize(name, _core.encode(name, x), x.shape).reshape(groups.shape) - groups).max(1)
    largest = step.reshape(-1, 256 // SEARCHED[name]).max(1).repeat(256 // SEARCHED[name])
    least_half = 2.0**-24 * 64  # what a subnormal half cannot say, times the greatest integer of six bits
    assert (off <= 1.25 * step + 0.25 * largest + least_half).all()


@pytest.mark.parametrize("kind", POPULATIONS)
@pytest.mark.parametrize("name", [row[0] for row in WRITABLE if row[0] in gguf.GGMLQuantizationType.__members__])
def test_gguf_reads_the_same(name: str, kind: str) -> None:
    x = POPULATIONS[kind]
    data = _core.encode(name, x)
    theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name]).reshape(x.shape)
    np.testing.assert_array_equal(_core.dequantize(name, data, x.shape), theirs)


def apr_q4_by_hand(x: NDArray[np.float32]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """Scales [blocks] and quants [blocks, 32] of the values, the last block filled up."""
    blocks = np.append(x.reshape(-1), np.zeros(-x.size % 32, np.float32)).reshape(-1, 32)
    scale = (np.abs(blocks).max(1) / np.float32(7)).astype(np.float16)
    scale[scale < np.float16(2.0**-14)] = 0
    quotient = np.divide(blocks, scale[:, None].astype(np.float32), out=np.zeros_like(blocks), where=scale[:, None] != 0)
    quants = np.sign(quotient) * np.floor(np.abs(quotient.astype(np.float64)) + 0.5) + 8  # halves away from zero
    return scale.view(np.uint16), np.clip(quants, 0, 15).astype(np.int64)


@pytest.mark.parametrize("kind", POPULATIONS)
def test_apr_q4_bytes(kind: str) -> None:
    """The blocks run on over the ends of rows; 1001 columns: a row begins anywhere in a block."""
    x = np.ascontiguousarray(POPULATIONS[kind][:, :1001])
    scale, quants = apr_q4_by_hand(x)
    data = _core.encode("APR_Q4", x)
    assert data.shape == (18 * -(-x.size // 32),)
    blocks = data.reshape(-1, 18)
    np.testing.assert_array_equal(np.ascontiguousarray(blocks[:, :2]).view(np.uint16)[:, 0], scale)
    np.testing.assert_array_equal(blocks[:, 2:], quants[:, ::2] | quants[:, 1::2] << 4)


def test_apr_q4_has_no_tiny_scales() -> None:
    """Seven times the least normal half is written with its scale; less than that as zeros, for a subnormal would be read as zero."""
    for most, written in ((7 * 2.0**-14, True), (6.99 * 2.0**-14, False), (0.0, False)):
        data = _core.encode("APR_Q4", np.full(32, most, np.float32))
        assert data.tobytes() == (b"\x00\x04" + b"\xff" * 16 if written else bytes(2) + b"\x88" * 16)


@pytest.mark.parametrize("kind", POPULATIONS)
def test_apr_q8_bytes(kind: str) -> None:
    x = POPULATIONS[kind]
    scale = np.float32(np.abs(x).max() / np.float32(127))
    quotient = (x / scale if scale else np.zeros_like(x)).astype(np.float64)
    quants = np.sign(quotient) * np.floor(np.abs(quotient) + 0.5)
    data = _core.encode("APR_Q8", x)
    assert data[:4].tobytes() == scale.tobytes()
    np.testing.assert_array_equal(data[4:].view(np.int8).reshape(x.shape), quants)


def test_apr_q8_at_the_edges() -> None:
    """No values are a scale alone; a scale of few bits does not carry a quant over the edge."""
    assert _core.encode("APR_Q8", np.zeros((3, 0), np.float32)).tobytes() == bytes(4)
    least = np.float32(1e-45)
    for most in (190 * least, -190 * least):  # 190 / 127 is rounded to 1
        assert _core.encode("APR_Q8", np.array([most, 3 * least, 0], np.float32))[4:].view(np.int8).tolist() == [127 * np.sign(most), 3, 0]
    assert not _core.encode("APR_Q8", np.array([60 * least], np.float32)).any()  # 60 / 127 is rounded to 0


# ---- shapes, threads, refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [row for row in WRITABLE if row[7] == "ROWS"], ids=lambda row: row[0])
def test_shapes(row: tuple[str, int, str, int, int, bool, int, str, bool]) -> None:
    """Leading dimensions stay; a row that ends inside a block is filled up with zeros, on demand."""
    name, _, _, block, size, *_ = row
    x = np.random.default_rng(0).standard_normal((2, 3, 2 * block)).astype(np.float32)
    whole = _core.encode(name, x)
    assert whole.shape == (2, 3, 2 * size)
    np.testing.assert_array_equal(whole[1, 2], _core.encode(name, x[1, 2]))
    np.testing.assert_array_equal(whole, _core.encode(name, x, pad=True))
    assert _core.encode(name, x[:, :0]).shape == (2, 0, 2 * size)
    assert _core.encode(name, x[..., :0]).shape == (2, 3, 0)
    assert _core.encode(name, np.asfortranarray(x)).tobytes() == whole.tobytes()
    if block == 1:
        assert _core.encode(name, x[0, 0, 0]).shape == (size,)
        return
    x[..., block + 5 :] = 0
    short = np.ascontiguousarray(x[..., : block + 5])
    np.testing.assert_array_equal(_core.encode(name, short, pad=True), _core.encode(name, x))
    with pytest.raises(FormatError, match=rf"rows of {block + 5} values.* {block}-value") as caught:
        _core.encode(name, short)
    assert caught.value.code == "BLOCK"


@pytest.mark.parametrize("row", WRITABLE, ids=lambda row: row[0])
@pytest.mark.parametrize("columns", [256, 300])
def test_threads_change_nothing(row: tuple[str, int, str, int, int, bool, int, str, bool], columns: int) -> None:
    """More values than one thread takes at once, rows that fill their blocks and rows that do not."""
    x = np.random.default_rng(0).standard_normal((1000, columns)).astype(np.float32)
    one = _core.encode(row[0], x, pad=True, threads=1)
    for threads in (2, 5):
        np.testing.assert_array_equal(one, _core.encode(row[0], x, pad=True, threads=threads))


@pytest.mark.parametrize("row", [row for row in WRITABLE if row[0] not in ("F32", "F16", "BF16")], ids=lambda row: row[0])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(row: tuple[str, int, str, int, int, bool, int, str, bool], bad: float) -> None:
    x = np.ones((300, 2, 256), np.float32)
    x[299, 1, 255] = x[270, 0, 17] = bad
    with pytest.raises(ArgumentError, match=rf"values\[270, 0, 17\] is -?(nan|inf): {row[0]} takes finite") as caught:
        _core.encode(row[0], x)
    assert caught.value.code == "VALUE"
    assert caught.value.field == "values"


@pytest.mark.parametrize("row", [row for row in WRITABLE if row[0] not in ("F32", "F16", "BF16", "APR_Q8")], ids=lambda row: row[0])
def test_the_greatest_magnitude(row: tuple[str, int, str, int, int, bool, int, str, bool]) -> None:
    """What would need an infinite scale is refused, and the message's own limit is not: it comes back, and nothing is infinite."""
    x = np.full(256, -3e38, np.float32)
    with pytest.raises(ArgumentError, match=r"values\[0\] is -3e\+38") as caught:
        _core.encode(row[0], x)
    limit = np.float32(str(caught.value).rsplit(" ", 1)[1]) * np.float32(1 - 1e-5)
    for x in (np.full(256, limit), np.full(256, -limit), limit * np.resize(np.float32([1, -1, 0.1]), 256)):
        back = _core.dequantize(row[0], _core.encode(row[0], x), (256,))
        assert np.abs(back - x).max() <= 0.15 * limit


def test_arguments_are_refused_by_name() -> None:
    names = " ".join(row[0] for row in WRITABLE)
    for name in ("Q9_9", "IQ1_S"):
        with pytest.raises(ArgumentError, match=rf"{name} cannot be written; these can: {names}"):
            _core.encode(name, [1.0])
    with pytest.raises(TypeError):
        _core.encode("F32", np.zeros(3))  # float64
    with pytest.raises(ArgumentError, match="Q9_9 cannot be read; these can: F32 F16"):
        _core.dequantize("Q9_9", b"", (1,))
    with pytest.raises(FormatError, match="2 rows of 33 values in Q8_0 take 136 bytes, data has 68") as caught:
        _core.dequantize("Q8_0", bytes(68), (2, 33))
    assert caught.value.code == "SIZE"
    with pytest.raises(ArgumentError, match="negative"):
        _core.dequantize("Q8_0", bytes(34), (-1, 32))
    for shape in ((1 << 40, 1 << 40), (1 << 61,), (1 << 62, 1)):
        with pytest.raises(ArgumentError, match="exceed any memory"):
            _core.dequantize("F32", b"", shape)


def array_bytes() -> int:
    """What NumPy holds for the values of arrays made since tracemalloc began."""
    gc.collect()
    arrays = tracemalloc.take_snapshot().filter_traces([tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)])
    return sum(trace.size for trace in arrays.traces)


def test_nothing_leaks() -> None:
    """100 calls of each kind, those that are refused too, leave no array behind and no object each."""
    x = np.ones((8, 256), np.float32)
    bad, double = x * np.float32(np.nan), x.astype(np.float64)
    data = _core.encode("Q8_0", x)
    calls = (
        lambda: _core.dequantize("Q8_0", data, x.shape, tier="generic"),
        lambda: _core.encode("APR_Q8", x.tolist()),
        lambda: _core.encode("Q8_0", x[:, :7]),
        lambda: _core.encode("Q8_0", bad),
        lambda: _core.encode("Q8_0", double),
        lambda: _core.dequantize("Q8_0", data, (7, 7)),
        lambda: _core.dequantize("Q9_9", data, (8, 256)),
        lambda: _core.dequantize("Q8_0", data, (8, 256), tier="abacus"),
    )

    def repeat(call: Callable[[], object]) -> int:
        for _ in range(100):
            with contextlib.suppress(ArgumentError, FormatError, TypeError, UnknownName):
                call()
        gc.collect()
        return sys.getallocatedblocks()

    def arrays(call: Callable[[], object]) -> int:
        tracemalloc.start()
        try:
            repeat(call)
            return array_bytes()
        finally:
            tracemalloc.stop()

    gc.freeze()  # what other tests have imported is not looked at a hundred times
    for n, call in enumerate(calls):
        repeat(call)
        assert any(-repeat(call) + repeat(call) < 50 for _ in range(3)), n  # Python's own caches may grow once
        assert arrays(call) == 0, n
    gc.unfreeze()
    kept: list[object] = []
    assert arrays(lambda: kept.append(_core.encode("F32", x))) == 100 * x.nbytes  # a leak would be seen
