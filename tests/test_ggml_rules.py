"""The rounding rules of ggml, each against something that is not itself: numbers by hand, scalar float32, gguf's encoder, our decoder.

That they are the rules of the real kernels is shown by ``test_llamacpp_side.py``, where llama.cpp runs.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import dataclasses

import gguf
import numpy as np
import pytest
import tiny
from numpy.typing import NDArray

from aprender import _core
from aprender.arithmetic import Ggml, profile
from aprender.errors import ArgumentError
from aprender.judge import ggml
from aprender.judge.prediction import Operand, Setting
from aprender.judge.replay import Replay, Sample, Unmeasured
from aprender.sides.own import OwnSide, Stored

AVX, REFERENCE = Ggml(), Ggml(fma=False, half_away=True)
NONE = np.zeros((0, 0), np.uint8)


def samples(rows: int = 40, columns: int = 512, seed: int = 0) -> NDArray[np.float32]:
    """Rows of many sizes, with outliers, a row of zeros and a block of zeros."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((rows, columns)) * np.exp(generator.uniform(-8, 4, (rows, 1)))
    x[:, 7] *= 50
    x[0], x[1, :256] = 0, 0
    return x.astype(np.float32)


def setting(**more: object) -> Setting:
    shape = tiny.Shape("llama")
    options = {"profile": profile("ggml-cpu"), "hparams": shape.hparams, "tokens": [0], "positions": np.arange(1), "keys": np.arange(1)}
    return Setting(**(options | more))


# ---- activations -----------------------------------------------------------------------------------------------------


def test_numbers_by_hand() -> None:
    """A block whose largest magnitude is 127 has scale 1; halves go to the even neighbour, or by the reference rule away from zero."""
    x = np.zeros((1, 256), np.float32)
    x[0, :8] = [-127, 0.5, 1.5, 2.5, -0.4, 126.6, -0.5, -1.5]
    even, away = [-127, 0, 2, 2, 0, 127, 0, -2], [-127, 1, 2, 3, 0, 127, -1, -2]
    for rule in (ggml.q8_0, ggml.q8_k, ggml.q8_1):
        np.testing.assert_array_equal(rule(x, AVX).value[0, :8], even)
    np.testing.assert_array_equal(ggml.q8_0(x, REFERENCE).value[0, :8], away)
    assert ggml.q8_k(x, REFERENCE).value[0, 1] == 0  # K-blocks have one rule


def test_the_reference_rule_is_that_of_the_encoder() -> None:
    """gguf writes Q8_0 by it, so the values it means are those of the rule; the vectorised rule differs, seldom."""
    x = samples(400)
    encoded = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0)
    meant = gguf.quants.dequantize(encoded, gguf.GGMLQuantizationType.Q8_0)
    mine = ggml.q8_0(x, REFERENCE).value.astype(np.float32)
    assert np.array_equal(mine, meant)
    ties = np.r_[np.arange(31) + 0.5, 127].astype(np.float32)[None]  # scale 1, halves: away from zero here, to even there
    assert np.array_equal(ggml.q8_0(ties, REFERENCE).value[0, :31], np.arange(31) + 1)
    assert np.array_equal(ggml.q8_0(ties, AVX).value[0, :31], np.arange(31) + np.arange(31) % 2)


def test_the_sum_for_the_offsets() -> None:
    """s = half(d * sum of q) with d as a float32, one block at a time in scalar arithmetic."""
    x = samples(6)
    total = ggml.q8_1(x, AVX).total
    assert total is not None
    differs = 0
    for row, sums in zip(x, total, strict=True):
        for block, found in zip(row.reshape(-1, 32), sums, strict=True):
            top = np.abs(block).max()
            d = top / np.float32(127)
            q = np.rint(block * (np.float32(127) / top)) if top else block * 0
            assert found == np.float16(d * np.float32(q.sum()))
            differs += found != np.float64(np.float16(d)) * q.sum()
    assert differs > 50  # what the rule is for


def test_blocks_of_256_keep_their_largest_value() -> None:
    """It becomes -127 whatever its sign, so it comes back within two float32 roundings; all others within half a step."""
    x = samples()
    made = ggml.q8_k(x, AVX)
    rows, values = x.reshape(-1, 256), made.value.reshape(-1, 256)
    at = np.abs(rows).argmax(axis=1)
    top, back = (a[np.arange(len(rows)), at].astype(np.float64) for a in (rows, values))
    assert np.allclose(top, back, rtol=3 * 2.0**-24, atol=0)
    assert (np.abs(x - made.value) <= 0.5001 * made.step).all()
    assert not made.value[0].any()


def test_halves_overflow() -> None:
    x = np.array([[65519.0, 65520.0, -1e6, 1.0 + 2.0**-11]], np.float32)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(ggml.RULES["F16"](x, AVX).value, [[65504, np.inf, -np.inf, 1.0]])
    np.testing.assert_array_equal(ggml.RULES["BF16"](np.array([[1 + 2.0**-8, 1 + 3 * 2.0**-8]], np.float32), AVX).value, [[1, 1 + 2.0**-6]])


def test_every_readable_weight_format_of_a_gguf_has_a_rule() -> None:
    """Those that llama.cpp multiplies with; 8-bit floats, integers, APR's own and formats of activations are not among them."""
    unruled = {row[0] for row in _core.FORMATS} - set(ggml.RULES)
    assert not {name for name in unruled if name.startswith(("Q2", "Q3", "Q4", "Q5", "Q6", "IQ", "TQ", "MX", "NV"))}
    assert set(ggml.RULES) <= {row[0] for row in _core.FORMATS}


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_K"])
def test_noise_in_an_input(kind: str) -> None:
    """An input known up to noise: what is left is its own, and a step where the rounding is not decided."""
    x = samples(20)
    made = ggml.RULES[kind](x, AVX)
    assert not made.left(np.zeros_like(made.value)).any()
    sigma = np.full(made.value.shape, 1e-9) * np.abs(x)
    left = made.left(sigma**2)
    moved = ggml.RULES[kind]((x.astype(np.float64) + 6e-9 * x).astype(np.float32), AVX).value
    flipped = np.abs(moved - made.value) > made.step / 2
    assert (left[flipped] > 0).all()
    near = left > 2 * sigma**2
    assert np.mean(near[np.abs(x) > 0]) < 0.01


# ---- offsets of the weights ------------------------------------------------------------------------------------------

CODES = {
    "Q4_1": slice(4, None), "Q5_1": slice(4, None), "Q2_K": slice(16, 80), "Q4_K": slice(16, None), "Q5_K": slice(16, None),
    "Q6_K": slice(0, 192), "TQ1_0": slice(0, 52), "TQ2_0": slice(0, 64),
}  # fmt: skip
"""Where the codes of a block are; with all of them 0 a weight is its offset and nothing else."""
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)}


@pytest.mark.parametrize("kind", CODES)
def test_offsets_are_what_is_left_without_codes(kind: str) -> None:
    generator = np.random.default_rng(3)
    values, size = ggml.BLOCKS[kind]
    raw = generator.integers(0, 256, (5, 4, size), np.uint8)
    raw[..., CODES[kind]] = 0
    for at in HALVES[kind]:
        raw[..., at : at + 2] = generator.uniform(0.01, 2, (5, 4, 1)).astype(np.float16).view(np.uint8)
    found = ggml.offsets(kind, raw.reshape(5, -1))
    assert found is not None
    decoded = _core.dequantize(kind, raw.tobytes(), (5, 4 * values))
    sign = 1 if kind in ("Q4_1", "Q5_1") else -1
    np.testing.assert_allclose(sign * np.repeat(found, decoded.shape[1] // found.shape[1], axis=1), decoded, rtol=2.0**-23)


def test_every_format_with_an_offset_is_tested() -> None:
    assert set(CODES) == set(ggml.OFFSETS)
    assert ggml.offsets("Q8_0", np.zeros((2, 34), np.uint8)) is None


def test_offsets_cancel_and_count() -> None:
    """Rows of Q4_1 whose code and offset cancel: the values are small, the noise is that of the large parts."""
    raw = np.zeros((3, 20), np.uint8)
    raw[:, 0:2] = np.full((3, 1), 8.0, np.float16).view(np.uint8)
    raw[:, 2:4] = np.full((3, 1), -64.0, np.float16).view(np.uint8)
    raw[:, 4:] = 0x88  # every code 8: 8 * 8 - 64 = 0
    w = _core.dequantize("Q4_1", raw.tobytes(), (3, 32))
    assert not w.any()
    x = Operand(samples(4, 32).astype(np.float64))
    made = ggml.PREDICT["MATMUL"](setting(weights=[w], stored=[("Q4_1", raw)]), [x])
    assert (made.variance[2:] > 0).all()


# ---- operations ------------------------------------------------------------------------------------------------------


def test_the_norm_in_scalar_arithmetic() -> None:
    generator = np.random.default_rng(4)
    x, w, eps = (
        (generator.standard_normal((5, 64)) * 0.01).astype(np.float32),
        generator.uniform(0.5, 2, 64).astype(np.float32),
        np.float32(1e-5),
    )
    found = ggml.norm_bits(x.astype(np.float64), w, 1e-5)
    for row, line in zip(x, found, strict=True):
        total = 0.0
        for value in row:
            total += float(value * value)
        scale = np.float32(1) / np.sqrt(np.float32(total / 64) + eps)
        assert [np.float32(v) for v in line] == [value * scale * weight for value, weight in zip(row, w, strict=True)]
    assert not np.array_equal(found, ggml.norm_bits(x.astype(np.float64), w, 1.1e-5))


def _libm(name: str) -> object:
    function = getattr(ctypes.CDLL(ctypes.util.find_library("m")), name)
    function.restype = ctypes.c_float
    function.argtypes = [ctypes.c_float] * (2 if name == "powf" else 1)
    return function


def test_the_angle_is_iterated() -> None:
    """The table against the C library, pair by pair: within its last rounding; the angle taken directly is another at far positions."""
    hparams = tiny.Shape("llama").hparams
    positions = np.array([0, 1, 24, 1000, 30000])
    made = ggml.PREDICT["ROPE_TABLE"](setting(positions=positions), [])
    cos, sin, power = (_libm(name) for name in ("cosf", "sinf", "powf"))
    ratio = np.float32(power(float(hparams["theta"]), float(np.float32(-2) / np.float32(24))))
    unequal = 0
    for row, position in zip(made.pre, positions, strict=True):
        angle = np.float32(position)
        for pair in range(12):
            for value, exact in ((cos(float(angle)), row[pair]), (sin(float(angle)), row[12 + pair])):
                assert abs(value - exact) <= 0.57 * np.spacing(np.float32(abs(value)))
                unequal += np.float32(value) != np.float32(exact)
            angle = angle * ratio
    assert unequal < 6
    direct = np.cos(positions[:, None] * 1e6 ** (-np.arange(12) / 12))
    assert np.abs(direct - made.pre[:, :12])[-1].max() > 1e-5  # the last rounding is 3e-8


@pytest.mark.parametrize("how", [AVX, REFERENCE], ids=str)
def test_pairs_are_turned_as_declared(how: Ggml) -> None:
    """With fused additions one product of each is not rounded; without, both are."""
    generator = np.random.default_rng(5)
    x = generator.standard_normal((4, 48)).astype(np.float32)
    table = np.concatenate([np.cos(angle := generator.uniform(0, 6, (4, 12))), np.sin(angle)], axis=1).astype(np.float32)
    at = setting(profile=dataclasses.replace(profile("ggml-cpu"), ggml=how), positions=np.arange(4))
    made = ggml.PREDICT["ROPE"](at, [Operand(x.astype(np.float64)), Operand(table.astype(np.float64))])
    assert np.all(made.certain)
    for t in range(4):
        for head in (0, 24):
            for i in range(12):
                a, b, c, s = x[t, head + i], x[t, head + 12 + i], table[t, i], table[t, 12 + i]
                if how.fma:  # 48 bits of a product and 24 of another fit into float64's sum up to one further rounding
                    one, two = np.float32(float(a) * float(c) - float(b * s)), np.float32(float(a) * float(s) + float(b * c))
                else:
                    one, two = a * c - b * s, a * s + b * c
                assert (made.bits()[t, head + i], made.bits()[t, head + 12 + i]) == (one, two)


def test_the_scale_of_the_scores() -> None:
    """1 / sqrt(h) in two float32 steps: for head 24 another number than the root rounded once."""
    two_steps = np.float32(1) / np.sqrt(np.float32(24))
    assert two_steps != np.float32(1 / np.sqrt(24))
    q = k = Operand(np.eye(4, 24)[:1].repeat(4, axis=1) * 0 + 1.0)
    hparams = tiny.Shape("llama").hparams | {"heads": 4, "kv_heads": 4}
    made = ggml.PREDICT["SCORES"](setting(hparams=hparams), [q, k])
    np.testing.assert_array_equal(made.pre, np.full((4, 1, 1), 24 * float(two_steps)))


# ---- what the judge needs --------------------------------------------------------------------------------------------


def test_formats_of_a_model(tmp_path) -> None:
    """The file's bytes by row, in Hugging Face lane order: what they decode to are the weights."""
    side = OwnSide(tiny.save_gguf(tiny.Shape("llama"), tmp_path / "m.gguf", "Q5_0"))
    stored = side.model_data()["stored"]
    assert isinstance(stored, Stored)
    for key, (kind, raw) in stored.items():
        w = side.weights[key]
        assert kind == "Q5_0"
        np.testing.assert_array_equal(_core.dequantize(kind, raw.tobytes(), w.shape), w)
    assert ("attn_norm", 0) not in stored
    assert len(stored) == 2 * 7 + 2


def test_without_formats_products_are_unmeasured(tmp_path) -> None:
    side = OwnSide(tiny.save_gguf(tiny.Shape("llama"), tmp_path / "m.gguf", "Q5_0"))
    captures, model = side.capture([1, 2, 3]), side.model
    args = (Sample.of(captures), profile("ggml-cpu"), model.hparams, model.flags, side.weights)
    with pytest.raises(Unmeasured, match=r"number format of 0\.ffn_gate in its file was not given"):
        Replay(*args).predict(("ffn_gate", 0))
    odd = {("ffn_gate", 0): ("I8", NONE)}
    with pytest.raises(Unmeasured, match="is I8, for which no rounding"):
        Replay(*args, odd).predict(("ffn_gate", 0))
    Replay(*args, side.model_data()["stored"]).predict(("ffn_gate", 0))
    Replay(*args).predict(("attn_norm", 0))


def test_what_a_variant_declares() -> None:
    row = profile("ggml-cpu")
    assert row.with_order({"cpu": "sse42", "fma": False, "half_away": True}).ggml == REFERENCE
    assert row.with_order({"cpu": "zen4", "fma": True, "half_away": False}) == row
    assert row.with_order(None) is row
    with pytest.raises(ArgumentError, match="fma"):
        row.with_order({"fma": "no"})
