"""The roundings of llama.cpp's CPU kernels (ggml), emulated: what each weight format makes of the activations, and five operations.

Owns the activation rules (a matrix of Q4_K multiplies activations that were rounded to q8_K), RMSNorm as ggml rounds it, the iterated
angle and the fused multiply-add of RoPE, the scale of the scores, and the fused gate.  The other operations are those of ``judge.noise``.
Refuses to decode weights: values come from the reference decoder; only the offsets of formats that have them are read here, because their
products cancel and leave more than the values show.  Called by ``judge.replay`` for a profile with a ``ggml`` column.

The sums of ggml's kernels are integers inside a block and float32 across blocks, in an order that depends on the CPU and on the number of
tokens; the variance is the envelope of any order.  As in ``judge.sums`` it is the larger of two: the roundings of products of random sign,
and those of the running sums that the products of this matrix and these activations have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aprender import _core
from aprender.arithmetic import BF16, F16, F32, Format, Ggml, Order
from aprender.judge import noise, sums, witness
from aprender.judge.prediction import Operand, Prediction, Setting
from aprender.judge.rounding import CERTAIN, MEAN_ROUNDING, endless, fma32, settle, to_format, ulp, variance
from aprender.judge.sums import WIDENED, Dot
from aprender.judge.witness import Float

Single = NDArray[np.float32]
Bytes = NDArray[np.uint8]

LIBM = 0.06
"""Error of the C library's float32 cosine and sine before their last rounding, in steps: 0.56 in all (glibc's documentation)."""

EXP = 8 * MEAN_ROUNDING
"""Relative variance of ggml's vectorised exponential, which is good to 2 ulp (1.95 by its source): two uniform errors of one ulp."""

BLOCKS: Mapping[str, tuple[int, int]] = {row[0]: (row[3], row[4]) for row in _core.FORMATS}
"""Format to the values and the bytes of one of its blocks."""


# ---- activations -----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rounded:
    """Activations as a kernel multiplies them.

    Attributes
    ----------
    value : array
        [T, K].
    step : array
        Distance of neighbouring values, and ``apart`` how far each value was from the boundary between them: both [T, K].
    total : array or None
        [T, K / 32]: the sum of each block that meets the offsets of the weights, where it is rounded by itself.
    """

    value: Float
    step: Float
    apart: Float
    total: Float | None = None

    def left(self, spread: Float) -> Float:
        """Variance that is left of inputs known up to a variance: their own, and a step where the rounding is not decided."""
        near = self.apart < CERTAIN * np.sqrt(spread)
        return np.where(spread > 0, spread + np.where(near, self.step**2 / 4, 0.0), 0.0)


def plain(fmt: Format) -> Callable[[Single, Ggml], Rounded]:
    """Each value rounded to a floating-point format."""

    def rule(x: Single, _: Ggml) -> Rounded:
        wide = x.astype(np.float64)
        value, step = to_format(wide, fmt), ulp(wide, fmt)
        return Rounded(value, step, step / 2 - np.abs(value - wide))

    return rule


def _blocks(x: Single, whole: NDArray[np.float32], scale: NDArray[np.float32], q: Single) -> Rounded:
    """Whole numbers times the scale of their block; ``whole`` is x in units of the scale before rounding."""
    d = scale.astype(np.float64)
    step = np.broadcast_to(d, q.shape)
    apart = np.abs(step) * (0.5 - np.abs(whole.astype(np.float64) - q))
    return Rounded((q.astype(np.float64) * d).reshape(x.shape), np.abs(step).reshape(x.shape), apart.reshape(x.shape))


def q8_0(x: Single, how: Ggml) -> Rounded:
    """Blocks of 32: d = max|x| / 127 kept as a half; q = x * (127 / max|x|) to nearest even.

    The reference rule, which the oldest CPU variants run: q = x * (1 / d), halves away from zero.
    """
    return _eight(x, how)[0]


def _eight(x: Single, how: Ggml) -> tuple[Rounded, Single, Single]:
    """The same with the scales before they became halves and the whole numbers."""
    rows = x.reshape(*x.shape[:-1], -1, 32)
    top = np.abs(rows).max(axis=-1, keepdims=True)
    d = top / np.float32(127)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / d if how.half_away else np.float32(127) / top
    whole = rows * np.where(top > 0, inverse, np.float32(0))
    q = np.copysign(np.floor(np.abs(whole) + np.float32(0.5)), whole) if how.half_away else np.rint(whole)
    return _blocks(x, whole, d.astype(np.float16).astype(np.float32), q), d, q


def q8_1(x: Single, how: Ggml) -> Rounded:
    """As q8_0; and what meets the offsets of the weights is s = half(d * sum of q), with d before it became a half."""
    made, d, q = _eight(x, how)
    total = (d[..., 0] * q.sum(axis=-1, dtype=np.float32)).astype(np.float16)
    return dataclasses.replace(made, total=total.astype(np.float64))


def q8_k(x: Single, _: Ggml) -> Rounded:
    """Blocks of 256: the first value of largest magnitude becomes -127; the scale stays a float32."""
    rows = x.reshape(*x.shape[:-1], -1, 256)
    top = np.take_along_axis(rows, np.abs(rows).argmax(axis=-1)[..., None], axis=-1)
    with np.errstate(divide="ignore"):
        inverse = np.where(top != 0, np.float32(-127) / top, np.float32(0))
        d = np.where(top != 0, np.float32(1) / inverse, np.float32(0))
    whole = inverse * rows
    return _blocks(x, whole, d, np.minimum(np.rint(whole), np.float32(127)))


RULES: Mapping[str, Callable[[Single, Ggml], Rounded]] = {
    "F32": plain(F32), "F16": plain(F16), "BF16": plain(BF16),
    "Q4_0": q8_0, "Q5_0": q8_0, "Q8_0": q8_0, "IQ4_NL": q8_0, "MXFP4": q8_0, "NVFP4": q8_0, "Q1_0": q8_0, "Q2_0": q8_0,
    "Q4_1": q8_1, "Q5_1": q8_1,
    "Q2_K": q8_k, "Q3_K": q8_k, "Q4_K": q8_k, "Q5_K": q8_k, "Q6_K": q8_k, "TQ1_0": q8_k, "TQ2_0": q8_k,
    "IQ1_S": q8_k, "IQ1_M": q8_k, "IQ2_XXS": q8_k, "IQ2_XS": q8_k, "IQ2_S": q8_k, "IQ3_XXS": q8_k, "IQ3_S": q8_k, "IQ4_XS": q8_k,
}  # fmt: skip
"""Weight format to what its kernel makes of the activations."""


def _block_step(size: int) -> Callable[[Float], Float]:
    """The step of whole numbers up to 127 times a scale per block."""

    def step(x: Float) -> Float:
        top = np.abs(x.reshape(*x.shape[:-1], -1, size)).max(axis=-1, keepdims=True)
        return np.asarray(np.broadcast_to(top / 127.0, (*top.shape[:-1], size)).reshape(x.shape))

    return step


def _float_step(fmt: Format) -> Callable[[Float], Float]:
    return lambda x: ulp(x, endless(fmt))


STEPS: Mapping[Callable[[Single, Ggml], Rounded], Callable[[Float], Float]] = {
    q8_0: _block_step(32), q8_1: _block_step(32), q8_k: _block_step(256),
    RULES["F32"]: _float_step(F32), RULES["F16"]: _float_step(F16), RULES["BF16"]: _float_step(BF16),
}  # fmt: skip
"""Rule to the steps that it rounds to, [T, K], if neither a scale nor an exponent could end: what a loss is held against."""

BY_FORMAT = frozenset({"MATMUL"})
"""Operations that need to know the number format of their weights."""

FLOATS: Mapping[str, Format] = {"F32": F32, "F16": F16, "BF16": BF16}


# ---- offsets of the weights --------------------------------------------------------------------------------------------------------------


def _half(raw: Bytes, at: int) -> Float:
    """The float16 at an offset of each block, [..., 1]."""
    return np.ascontiguousarray(raw[..., at : at + 2]).view(np.float16).astype(np.float64)


def _six_bits(raw: Bytes) -> Float:
    """The eight 6-bit minimums in the 12 bytes of scales of Q4_K and Q5_K."""
    low = raw[..., 4:8] & 63
    high = (raw[..., 8:12] >> 4) | ((raw[..., 4:8] >> 6) << 4)
    return np.concatenate([low, high], axis=-1).astype(np.float64)


OFFSETS: Mapping[str, Callable[[Bytes], Float]] = {
    "Q4_1": lambda raw: _half(raw, 2),
    "Q5_1": lambda raw: _half(raw, 2),
    "Q2_K": lambda raw: _half(raw, 82) * (raw[..., :16] >> 4),
    "Q4_K": lambda raw: _half(raw, 2) * _six_bits(raw[..., 4:16]),
    "Q5_K": lambda raw: _half(raw, 2) * _six_bits(raw[..., 4:16]),
    "Q6_K": lambda raw: 32.0 * _half(raw, 208) * raw[..., 192:208].view(np.int8),
    "TQ1_0": lambda raw: _half(raw, 52),
    "TQ2_0": lambda raw: _half(raw, 64),
}
"""Format to the offsets of one block's equal parts: bytes [..., size of a block] to [..., parts].

:data:`ADDED` add theirs, the others subtract it.
"""

ADDED = frozenset({"Q4_1", "Q5_1"})


def offsets(fmt: str, raw: Bytes) -> Float | None:
    """Offsets of rows of weights, [rows, parts of all blocks]; None for a format without."""
    if fmt not in OFFSETS:
        return None
    made = OFFSETS[fmt](np.ascontiguousarray(raw).reshape(len(raw), -1, BLOCKS[fmt][1]))
    return made.reshape(len(raw), -1)


def first_scales(fmt: str, raw: Bytes) -> Bytes | None:
    """Rows of super-blocks in which every sub-block has the scale (and the minimum) of the first; None for a format that has none."""
    blocks = np.array(raw).reshape(len(raw), -1, BLOCKS[fmt][1])
    if fmt == "Q6_K":
        blocks[..., 192:208] = blocks[..., 192:193]
    elif fmt in ("Q4_K", "Q5_K"):
        scale, least = (blocks[..., at, None] & 63 for at in (4, 8))  # 6 bits each; those of sub-blocks 4 to 7 are in two pieces
        blocks[..., 4:8], blocks[..., 8:12] = scale | scale >> 4 << 6, least | least >> 4 << 6
        blocks[..., 12:16] = scale & 15 | (least & 15) << 4
    else:
        return None
    return blocks.reshape(raw.shape)


# ---- products --------------------------------------------------------------------------------------------------------------------------


def _matmul(at: Setting, inputs: Sequence[Operand]) -> Prediction:
    """Rows times weights, the activations rounded as the format of each part wants."""
    (x,) = inputs
    how = at.profile.ggml or Ggml()
    unrounded, cost = _plainly(at, x)
    if len({fmt for fmt, _ in at.stored}) == 1 and at.stored[0][0] in FLOATS:
        fmt = at.stored[0][0]
        made = noise.matmul(at, [_activations(x, fmt, how)[1]], FLOATS[fmt])
        return dataclasses.replace(made, unrounded=unrounded, cost=cost)
    parts = [_part(x, np.asarray(w), fmt, raw, how) for w, (fmt, raw) in zip(at.weights, at.stored, strict=True)]
    y, left = (np.concatenate(column, axis=1) for column in zip(*parts, strict=True))
    if at.bias is not None:
        y, left = y + at.bias, left + variance(y, F32)
    return Prediction(y, left, y, left, at.profile.activations, unrounded=unrounded, cost=cost)


def _plainly(at: Setting, x: Operand) -> tuple[Float | None, Float | None]:
    """Products with the activations as they are, and the variance of rounding these; nothing where all formats leave them alone."""
    if all(fmt == F32.name.upper() for fmt, _ in at.stored):
        return None, None
    dots = [(Dot(x.value[None], np.asarray(w)[None], Order()), fmt) for w, (fmt, _) in zip(at.weights, at.stored, strict=True)]
    y = np.concatenate([dot.value()[0] for dot, _ in dots], axis=1)
    cost = np.concatenate([dot.spread(np.square(STEPS[RULES[fmt]](x.value))[None] / 12)[0] for dot, fmt in dots], axis=1)
    return y if at.bias is None else y + at.bias, cost


def _activations(x: Operand, fmt: str, how: Ggml) -> tuple[Rounded, Operand]:
    """The activations as the kernel of a format multiplies them."""
    made = RULES[fmt](x.value.astype(np.float32), how)
    return made, Operand(made.value, None if x.variance is None else made.left(x.variance))


def _part(x: Operand, w: NDArray[np.float32], fmt: str, raw: Bytes, how: Ggml) -> tuple[Float, Float]:
    """Value and variance of the products with one matrix, a few rows of it at a time."""
    made, rounded = _activations(x, fmt, how)
    wide = max(1, WIDENED // w.shape[1])
    pieces = [_rows(made, rounded, w[i : i + wide], fmt, raw[i : i + wide]) for i in range(0, len(w), wide)]
    value, left = (np.concatenate(column, axis=1) for column in zip(*pieces, strict=True))
    return value, left


def _rows(made: Rounded, x: Operand, w: NDArray[np.float32], fmt: str, raw: Bytes) -> tuple[Float, Float]:
    """The same for some rows.

    A weight is a scaled code less an offset, and the two are multiplied and added apart: two sums, and each may be rounded as any order
    would.  Codes and activations of one sign do not cancel: their partial sums are as large as their total, which the envelope of
    ``judge.sums`` sees and a sum of squares does not.
    """
    wide, shift = w.astype(np.float64), None if fmt in FLOATS else offsets(fmt, raw)
    value, parts = x.value @ wide.T, [wide]
    if shift is not None:
        m = np.repeat(shift, w.shape[1] // shift.shape[1], axis=1)
        parts = [wide - m if fmt in ADDED else wide + m, m]
        over = beside(made)
        value = value if over is None else value + over @ shift.T
    dots = [Dot(x.value[None], part[None], Order(), flush=FLOATS.get(fmt) == BF16) for part in parts]
    left = sum((sums.estimate(dot)[0] for dot in dots), np.zeros_like(value))
    if x.variance is not None:
        left = left + x.variance @ (w.astype(np.float64) ** 2).T
    return value, left


def beside(made: Rounded) -> Float | None:
    """What a block's sum, rounded by itself, has over the sum of its rounded activations, [..., blocks]; None where no kernel keeps it.

    It meets the offsets of the weights.  Where the scale of a block vanishes as a half and its sum does not, there is nothing else.
    """
    return None if made.total is None else made.total - made.value.reshape(*made.total.shape, 32).sum(axis=-1)


def met(at: Setting) -> Float | None:
    """The offsets that such sums meet, of all parts of a product: [N, blocks]; None if no part has any."""
    found = [offsets(fmt, raw) if RULES[fmt] is q8_1 else None for fmt, raw in at.stored]
    blocks = next((m.shape[1] for m in found if m is not None), None)
    if blocks is None:
        return None
    return np.concatenate([np.zeros((len(np.asarray(w)), blocks)) if m is None else m for w, m in zip(at.weights, found, strict=True)])


def _scores(at: Setting, inputs: Sequence[Operand]) -> Prediction:
    """Dot products of q and k, rounded, times 1 / sqrt(h) with both steps in float32."""
    q, k = inputs
    made = noise.scores(at, [_beside_cache(at, q), k], float(np.float32(1) / np.sqrt(np.float32(at.hparams["head"]))))
    if at.profile.cache == F32:
        return made
    head = int(at.hparams["head"])
    squares = {"heads": at.hparams["heads"], "kv_heads": at.hparams["kv_heads"], "head": head}
    cost = witness.scores(np.square(_float_step(at.profile.cache)(q.value)) / 12, np.square(k.value), at.allowed, squares) / np.sqrt(head)
    return dataclasses.replace(made, unrounded=witness.scores(q.value, k.value, at.allowed, at.hparams), cost=cost)


def _mix(at: Setting, inputs: Sequence[Operand]) -> Prediction:
    """Probabilities times values."""
    p, v = inputs
    made = noise.PREDICT["MIX"](at, [_beside_cache(at, p), v])
    if at.profile.cache == F32:
        return made
    cost = witness.mix(np.square(_float_step(at.profile.cache)(p.value)) / 12, np.square(v.value), at.hparams)
    return dataclasses.replace(made, unrounded=witness.mix(p.value, v.value, at.hparams), cost=cost)


def _beside_cache(at: Setting, x: Operand) -> Operand:
    """What is multiplied with the cache is rounded to the cache's format, as activations are to that of weights."""
    if at.profile.cache == F32:
        return x
    if x.variance is None:
        return Operand(to_format(x.value, at.profile.cache))
    return Operand(*settle(x.value, x.variance, at.profile.cache))


# ---- the norm --------------------------------------------------------------------------------------------------------------------------


def norm_bits(x: Float, weight: ArrayLike, eps: float) -> Float:
    """RMSNorm of rows [rows, K] bit for bit: float32 squares added in order in float64, then every step in float32."""
    rows, w = x.astype(np.float32), np.asarray(weight, np.float32)
    total = np.cumsum(np.square(rows), axis=1, dtype=np.float64)[:, -1:]
    mean = (total / rows.shape[1]).astype(np.float32)
    scale = np.float32(1) / np.sqrt(mean + np.float32(eps))
    return np.asarray((rows * scale * w).astype(np.float64))


def _rmsnorm(at: Setting, inputs: Sequence[Operand]) -> Prediction:
    """Every rounding is declared; of an input that was estimated, only the noise is known."""
    (x,) = inputs
    made = noise.PREDICT["RMSNORM"](at, inputs)
    if x.variance is not None:
        return made
    width = np.asarray(at.weights[0]).size
    bits = norm_bits(x.value.reshape(-1, width), at.weights[0], float(at.hparams["eps"])).reshape(x.value.shape)
    return dataclasses.replace(made, certain=True, expected=bits)


# ---- RoPE ------------------------------------------------------------------------------------------------------------------------------


def _rope_table(at: Setting, _: Sequence[Operand]) -> Prediction:
    """Cosine and sine of an angle that is multiplied by theta^(-2/h) from pair to pair, every step in float32."""
    head = int(at.hparams["head"])
    exponent = np.float32(-2) / np.float32(head)
    ratio = np.float32(np.float64(np.float32(at.hparams["theta"])) ** np.float64(exponent))
    angle = [np.asarray(at.positions, np.float32)]
    for _pair in range(1, head // 2):
        angle.append(angle[-1] * ratio)
    wide = np.stack(angle, axis=1).astype(np.float64)
    y = np.concatenate([np.cos(wide), np.sin(wide)], axis=1)
    at_zero = np.tile(wide == 0, 2)
    left = np.where(at_zero, 0.0, np.square(LIBM / CERTAIN * ulp(y, F32)))
    return Prediction(y, left, y, left + variance(y, F32), F32)


def _rope(at: Setting, inputs: Sequence[Operand]) -> Prediction:
    """Each pair (a, b) to fma(a, c, -rnd(b s)) and fma(a, s, rnd(b c)): one product is rounded, the other only without fused additions."""
    x, table = inputs
    contracted = at.profile.ggml is None or at.profile.ggml.fma
    head, fmt = int(at.hparams["head"]), at.profile.activations
    cos, sin = witness.spread_table(table.value, x.value.shape[1])
    unknown = np.zeros_like(table.value) if table.variance is None else table.variance
    cos_left, sin_left = witness.spread_table(unknown, x.value.shape[1])
    own = np.zeros_like(x.value) if x.variance is None else x.variance
    turned, turned_own = witness.rotate_half(x.value, head), np.abs(witness.rotate_half(own, head))
    first = np.arange(x.value.shape[1]) % head < head // 2  # the lanes of a: there the sine's product is the rounded one
    a, a_left = x.value * cos, own * cos**2 + x.value**2 * cos_left
    b, b_left = turned * sin, turned_own * sin**2 + turned**2 * sin_left
    small, small_left = settle(np.where(first, b, a), np.where(first, b_left, a_left), F32)
    large, large_left = np.where(first, a, b), np.where(first, a_left, b_left)
    total = variance(np.where(first, b, a), F32) + (0.0 if contracted else variance(large, F32))
    if contracted:
        bits = np.where(first, fma32(x.value, cos, small), fma32(turned, sin, small))
    else:
        large, large_left = settle(large, large_left, F32)
        bits = to_format(small + large, fmt)
    pre, left = small + large, small_left + large_left
    bits = np.where(left == 0, bits, to_format(pre, fmt))
    certain = (left == 0) if x.variance is None else False
    return Prediction(pre, left, a + b, left + total + variance(pre, fmt), fmt, certain=certain, expected=bits)


# ---- exponentials ------------------------------------------------------------------------------------------------------------------------


def _softmax(at: Setting, inputs: Sequence[Operand]) -> Prediction:
    """The rounding of s - max is emulated; the exponential is the vectorised one."""
    (s,) = inputs
    exponent = to_format(noise.exponents(at, s), F32)
    broken = np.isfinite(s.value)  # an overflow before stays what it is
    return noise.softmax(at, Operand(np.where(broken, exponent, s.value), s.variance), np.full_like(exponent, EXP))


def _silu(at: Setting, inputs: Sequence[Operand]) -> Prediction:
    """Inside the fused gate: the vectorised exponential e, a sum and a division; the error of e counts as its share in 1 + e."""
    (x,) = inputs
    made = noise.PREDICT["SILU"](at, inputs)
    e = np.exp(-np.maximum(x.value, -80.0))
    more = (EXP - noise.EXP) * np.square(made.plain * e / (1.0 + e))
    return dataclasses.replace(made, sigma2=made.sigma2 + more, variance=made.variance + more)


PREDICT: Mapping[str, Callable[[Setting, Sequence[Operand]], Prediction]] = {
    **noise.PREDICT,
    "ROPE_TABLE": _rope_table,
    "RMSNORM": _rmsnorm,
    "MATMUL": _matmul,
    "ROPE": _rope,
    "SCORES": _scores,
    "MIX": _mix,
    "SOFTMAX": _softmax,
    "SILU": _silu,
}
"""Operation to its recipe: those of ``judge.noise`` where ggml has no rounding of its own."""
