"""What rounding may leave of each operation, from its inputs, its weights and the side's profile.

Owns the recipes.  Each function makes a :class:`~aprender.judge.prediction.Prediction`: it replays one operation in float64 with every
declared deterministic rounding emulated (``pre``), says what the replay cannot know (``sigma2``: order of addition, exp, reciprocal square
root), and what a captured value may differ by if nothing is emulated (``variance``).  No fitted constant: a count of roundings is
multiplied by the variance of one.  Refuses to decide (``judge.rule``) and to look up which input belongs to which stage (``judge.replay``,
which calls it).

:data:`PREDICT` is keyed by the operations of ``ops.def``.  What Hugging Face does inside each: x is widened to float32; the operation runs
in float32; the result is rounded once to the activation format, except where a recipe below rounds in between (the norm before its weight,
both products of RoPE, the scores before their scale).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from aprender.arithmetic import BF16, F32, Format
from aprender.judge import sums, witness
from aprender.judge.prediction import Operand, Prediction, Setting
from aprender.judge.rounding import MEAN_ROUNDING as ROUNDING
from aprender.judge.rounding import U, interval, product_grid, settle, sum_grid, to_format, ulp, variance
from aprender.judge.sums import Dot
from aprender.judge.witness import Float

EXP = 2 * ROUNDING
"""Relative variance of a float32 exponential that is good to 1 ulp: its own rounding and as much again for what is before it."""

TINY = 2.0**-118
"""Absolute error below which float32 results are not judged: exp(-88) ends the range where libraries still agree (flushed or not)."""

WIDE = 4 * 2.0**-53
"""Relative standard deviation of what is left of a float64 exponential and a division: which of two float32 neighbours, once in 10^7."""


def _known(*operands: Operand) -> bool:
    return all(o.variance is None for o in operands)


def _spread(o: Operand) -> Float:
    return np.zeros_like(o.value) if o.variance is None else o.variance


# ---- operations whose recipe is one or two roundings -----------------------------------------------------------------------------------


def _embed(at: Setting, _: Sequence[Operand]) -> Prediction:
    """A gather: no rounding."""
    y = witness.embedding(at.weights[0], at.tokens)
    none = np.zeros_like(y)
    return Prediction(y, none, y, none, at.profile.activations, certain=True)


def _cache(at: Setting, inputs: Sequence[Operand]) -> Prediction:
    """A copy into the cache, rounded to the cache's format."""
    (x,) = inputs
    rounding = variance(x.value, at.profile.cache, ulp(x.value, at.profile.activations))
    return Prediction(x.value, _spread(x), x.value, rounding + _spread(x), at.profile.cache, certain=_known(x))


def _add(at: Setting, inputs: Sequence[Operand]) -> Prediction:
    """One sum, rounded once."""
    a, b = inputs
    fmt, y, left = at.profile.activations, a.value + b.value, _spread(a) + _spread(b)
    return Prediction(y, left, y, left + variance(y, fmt, sum_grid(a.value, b.value, fmt)), fmt, certain=_known(a, b))


def _mul(at: Setting, inputs: Sequence[Operand]) -> Prediction:
    """One product, rounded once."""
    a, b = inputs
    fmt, y = at.profile.activations, a.value * b.value
    left = _spread(a) * b.value**2 + _spread(b) * a.value**2
    return Prediction(y, left, y, left + variance(y, fmt, product_grid(a.value, b.value)), fmt, certain=_known(a, b))


def _bias(at: Setting, inputs: Sequence[Operand]) -> Prediction:
    """A bias added to a product that was rounded before (an unfused engine)."""
    (x,) = inputs
    b = at.bias if at.bias is not None else np.zeros(x.value.shape[1])
    return _add(at, [x, Operand(np.broadcast_to(b, x.value.shape).copy())])


def _rope(at: Setting, inputs: Sequence[Operand]) -> Prediction:
    """Two products rounded, then their sum: rnd(rnd(x c) + rnd(rot(x) s)), with the table as captured."""
    x, table = inputs
    fmt, head = at.profile.activations, int(at.hparams["head"])
    cos, sin = witness.spread_table(table.value, x.value.shape[1])
    table_left = _spread(table)
    cos_left, sin_left = witness.spread_table(table_left, x.value.shape[1])
    turned, x_left = witness.rotate_half(x.value, head), _spread(x)
    if at.profile.wide:
        y = x.value * cos + turned * sin
        left = x_left * cos**2 + x.value**2 * cos_left + np.abs(witness.rotate_half(x_left, head)) * sin**2 + turned**2 * sin_left
        return Prediction(y, left, y, left + variance(y, fmt), fmt, certain=_known(x, table))
    a, a_left = settle(x.value * cos, x_left * cos**2 + x.value**2 * cos_left, fmt)
    b, b_left = settle(turned * sin, np.abs(witness.rotate_half(x_left, head)) * sin**2 + turned**2 * sin_left, fmt)
    products = variance(x.value * cos, fmt, product_grid(x.value, cos)) + variance(turned * sin, fmt, product_grid(turned, sin))
    total = products + variance(a + b, fmt, sum_grid(a, b, fmt)) + a_left + b_left
    return Prediction(a + b, a_left + b_left, x.value * cos + turned * sin, total, fmt, certain=_known(x, table))


# ---- the RoPE table --------------------------------------------------------------------------------------------------------------------


def _rope_table(at: Setting, _: Sequence[Operand]) -> Prediction:
    """Cosine and sine of the float32 angle: position times a float32 frequency, rounded once.

    A library's power function may return a neighbour of the frequency (``table_ulps`` steps away at most); the error is the same at every
    position, so it is not noise.  The neighbour that fits a whole column best is taken; none fits a wrong base, a scaling that is missing,
    or a frequency cast to a shorter format.
    """
    exact = _frequencies(at)
    best = _rotations(at, exact)
    worst = _misfit(at, best)
    for steps in sorted(range(-at.profile.table_ulps, at.profile.table_ulps + 1), key=abs):
        other = _rotations(at, exact + steps * ulp(exact, F32))
        misfit = _misfit(at, other)
        best, worst = np.where(np.tile(misfit < worst, 2), other, best), np.minimum(misfit, worst)
    left = _table_variance(at, best)
    return Prediction(best, left, best, left + variance(best, at.profile.activations), at.profile.activations)


def _frequencies(at: Setting) -> Float:
    """The float32 frequencies [h/2]: the exponent 2i/h, the power and its reciprocal are each rounded to float32."""
    exponent = to_format(np.arange(0, int(at.hparams["head"]), 2) / float(at.hparams["head"]), F32)
    return to_format(1.0 / to_format(float(at.hparams["theta"]) ** exponent, F32), F32)


def _rotations(at: Setting, frequency: Float) -> Float:
    """Cosine and sine of the float32 product of position and frequency: [T, h]."""
    angle = to_format(np.asarray(at.positions, np.float64)[:, None] * frequency, F32)
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=1)


def _table_variance(at: Setting, y: Float) -> Float:
    """Of a float32 cosine or sine that is good to 1 ulp (uniform: 0.58 ulp), or that was float64 before; those of 0 are exact."""
    left = np.full_like(y, WIDE**2) if at.profile.wide else np.square(0.58 * ulp(y, F32))
    at_zero = np.tile(np.hsplit(y, 2)[1] == 0, 2)
    return np.asarray(np.where(at_zero, 0.0, left))


def _misfit(at: Setting, y: Float) -> Float:
    """How far the worst element of each pair's column is outside its rounding interval, [h/2]; 0 if nothing was captured."""
    if at.captured is None:
        return np.zeros(y.shape[1] // 2)
    outside = np.abs(interval(at.captured, y, np.sqrt(_table_variance(at, y)), at.profile.activations))
    cos, sin = np.hsplit(outside.max(axis=0), 2)
    return np.asarray(np.maximum(cos, sin))


# ---- the norm --------------------------------------------------------------------------------------------------------------------------


def _rmsnorm(at: Setting, inputs: Sequence[Operand]) -> Prediction:
    """RMSNorm: r = 1/sqrt(mean(x^2) + eps) in float32, h = x r rounded, y = h w rounded."""
    (x,) = inputs
    fmt, eps, w = at.profile.activations, float(at.hparams["eps"]), np.asarray(at.weights[0], np.float64)
    rows = x.value.reshape(-1, w.size)
    if at.profile.wide:
        y = _wide_norm(rows, w, eps, at.profile.order.lanes).reshape(x.value.shape)
        left = (_spread(x).reshape(rows.shape) * np.square(witness.inverse_rms(rows, eps) * w)).reshape(y.shape)
        return Prediction(y, left, y, left + variance(y, fmt), fmt, certain=_known(x))
    r = witness.inverse_rms(rows, eps)
    row = np.sqrt(_row_variance(rows, r, eps))
    h = rows * r
    unknown = variance(h, F32) + _spread(x).reshape(rows.shape) * r * r
    y = (h * w).reshape(x.value.shape)
    if fmt == F32:
        left = (unknown * w * w).reshape(y.shape)
        own = np.square(h * w * row).reshape(y.shape)
        return Prediction(y, left + own, y, left + variance(y, fmt), fmt, row=row, width=w.size)
    inner, flips = settle(h, unknown + np.square(h * row), fmt)
    pre = (inner * w).reshape(y.shape)
    total = w * w * (variance(h, fmt) + _spread(x).reshape(rows.shape) * r * r) + variance(
        pre.reshape(rows.shape), fmt, product_grid(inner, w)
    )
    left = (w * w * flips).reshape(y.shape) + np.square(pre * U / 3)  # a product of two short numbers is exact in float32
    return Prediction(pre, left, y, total.reshape(y.shape), fmt)


def _row_variance(rows: Float, r: Float, eps: float) -> Float:
    """Relative variance of r, which a whole row shares: [rows, 1].

    Two roundings for the square root and its reciprocal; half of the relative error of mean(x^2) + eps, which is: the rounding of each
    square, a sum kept in at least 32 partial sums (k / (3 * 32^2) roundings of the total, and two for joining them), the division, the sum.
    """
    k = rows.shape[1]
    square = rows * rows
    total = square.sum(axis=1, keepdims=True)
    mean = total / k
    share = (square * square).sum(axis=1, keepdims=True) / np.where(total > 0, total, 1.0) ** 2
    added = ROUNDING * (share + 2.0 + k / 3072.0)
    divided = variance(mean, F32) / np.where(mean > 0, mean, 1.0) ** 2
    shifted = variance(mean + eps, F32) / np.where(mean + eps > 0, mean + eps, 1.0) ** 2
    return np.asarray(variance(r, F32) / (r * r) + ROUNDING + (added + divided + shifted) / 4)


def _wide_norm(rows: Float, w: Float, eps: float, lanes: int) -> Float:
    """The norm in float64: squares added in lanes, the tree, then x r w from the left."""
    width = -rows.shape[1] % lanes
    square = np.pad(rows * rows, ((0, 0), (0, width))).reshape(len(rows), -1, lanes)
    total = np.zeros((len(rows), lanes))
    for piece in range(square.shape[1]):
        total = total + square[:, piece]
    while total.shape[1] > 1:
        total = total[:, : total.shape[1] // 2] + total[:, total.shape[1] // 2 :]
    return np.asarray(rows * (1.0 / np.sqrt(total / rows.shape[1] + eps)) * w)


# ---- dot products ----------------------------------------------------------------------------------------------------------------------


def _matmul(at: Setting, inputs: Sequence[Operand]) -> Prediction:
    """Rows times weights, in the number format of the activations."""
    return matmul(at, inputs, at.profile.activations)


def matmul(at: Setting, inputs: Sequence[Operand], factors: Format) -> Prediction:
    """Rows times weights: float32 accumulation, then the bias, then one rounding (fused), or a rounding before the bias (``exact``).

    ``factors`` is the number format of what is multiplied.
    """
    (x,) = inputs
    fmt, profile = at.profile.activations, at.profile
    w = np.asarray(at.weights[0]) if len(at.weights) == 1 else np.concatenate([np.asarray(part) for part in at.weights])
    dot = Dot(x.value[None], w[None], profile.order, flush=factors == BF16)
    y, added = dot.value()[0], sums.estimate(dot)[0]
    left = added.copy()
    if x.variance is not None:
        left += dot.spread(x.variance[None])[0]
    bits = sums.emulate(dot).reshape(y.shape) if _replayed(dot, x) else None
    if at.bias is not None:
        y = y + at.bias
        left += variance(y, F32)
        bits = None if bits is None else to_format(bits + at.bias, F32)
    total = left if fmt == F32 else left + variance(y, fmt)
    return Prediction(y, left, y, total, fmt, certain=bits is not None, expected=bits, dot=dot, added=added)


def _replayed(dot: Dot, *operands: Operand) -> bool:
    """Whether a dot product is also emulated bit for bit: its order is declared, and its inputs are known float32 numbers.

    (Closure asks for the noise of a float64 pass, of which no engine has the bits.)
    """
    return dot.order.lanes > 0 and _known(*operands) and sums.is_float32(dot)


def _scores(at: Setting, inputs: Sequence[Operand]) -> Prediction:
    """Dot products of q and k; the scale is 1 / sqrt(h), rounded once to float32 (``wide``: not at all)."""
    scale = 1.0 / np.sqrt(int(at.hparams["head"]))
    return scores(at, inputs, float(scale) if at.profile.wide else float(np.float32(scale)))


def scores(at: Setting, inputs: Sequence[Operand], scale: float) -> Prediction:
    """Dot products of q and k, rounded; times the scale, rounded.  A scale that is a power of two rounds nothing."""
    q, k = inputs
    fmt, head = at.profile.activations, int(at.hparams["head"])
    share = int(at.hparams["heads"]) // int(at.hparams["kv_heads"])
    dot = Dot(witness.heads_first(q.value, head), witness.heads_first(k.value, head, share), at.profile.order, flush=fmt == BF16)
    qk, added = dot.value(), sums.estimate(dot)
    left = added.copy()
    if not _known(q, k):
        qs, ks = witness.heads_first(_spread(q), head), witness.heads_first(_spread(k), head, share)
        left += Dot(qs, dot.w**2, dot.order).value() + Dot(dot.x**2, ks, dot.order).value()
    inner, inner_left = (qk, left) if fmt == F32 else settle(qk, left, fmt)
    total = left if fmt == F32 else left + variance(qk, fmt)
    pre = inner * scale
    last = variance(pre, fmt, product_grid(to_format(inner, fmt), np.full(1, scale)))
    compared = np.broadcast_to(at.allowed, pre.shape)
    bits = to_format(sums.emulate(dot).reshape(pre.shape) * scale, fmt) if _replayed(dot, q, k) else None
    bits = None if bits is None else np.where(compared, bits, 0.0)
    sigma2 = scale**2 * inner_left + np.square(pre * U / 3)
    return Prediction(
        np.where(compared, pre, 0.0),
        np.where(compared, sigma2, 0.0),
        np.where(compared, qk * scale, 0.0),
        scale**2 * total + last,
        fmt,
        certain=bits is not None,
        compared=compared,
        expected=bits,
        dot=dot,
        added=scale**2 * added,
        gain=scale**2,
    )


def _mix(at: Setting, inputs: Sequence[Operand]) -> Prediction:
    """Probabilities times values: one float32 sum over the keys, one rounding."""
    p, v = inputs
    if not np.isfinite(v.value).all():
        return _mix_broken(at, p, v)
    fmt, head, heads = at.profile.activations, int(at.hparams["head"]), int(at.hparams["heads"])
    share = heads // int(at.hparams["kv_heads"])
    values = witness.heads_first(v.value, head, share).transpose(0, 2, 1)
    dot = Dot(p.value, values, at.profile.order, flush=fmt == BF16)

    def side_by_side(a: Float) -> Float:
        return a.transpose(1, 0, 2).reshape(a.shape[1], -1)

    y, added = side_by_side(dot.value()), side_by_side(sums.estimate(dot))
    grid = side_by_side(_single_grid(p.value, values))
    added = np.where(grid > 0, variance(y, F32, grid), added)
    left = added.copy()
    if not _known(p, v):
        spread = witness.heads_first(_spread(v), head, share).transpose(0, 2, 1)
        left += side_by_side(Dot(_spread(p), values**2, dot.order).value() + Dot(p.value**2, spread, dot.order).value())
    total = left if fmt == F32 else left + np.where(grid > 0, variance(y, fmt, grid), variance(y, fmt))
    bits = side_by_side(sums.emulate(dot).reshape(heads, p.value.shape[1], head)) if _replayed(dot, p, v) else None
    return Prediction(y, left, y, total, fmt, certain=bits is not None, expected=bits, dot=dot, added=added, heads=heads)


def _mix_broken(at: Setting, p: Operand, v: Operand) -> Prediction:
    """The same where some values are not finite: they reach the queries that may see their keys, and no others.

    Of a key that the mask forbids an engine reads nothing, or it adds 0 times its value, which is NaN: both are right.
    """
    lost, share = ~np.isfinite(v.value), int(at.hparams["heads"]) // int(at.hparams["kv_heads"])
    made = _mix(at, [p, Operand(np.where(lost, 0.0, v.value), v.variance)])
    values = witness.heads_first(v.value, int(at.hparams["head"]), share)
    broken = np.flatnonzero(lost.any(axis=1))
    added = np.zeros((*p.value.shape[:2], values.shape[2]))
    forbidden = np.zeros(added.shape, bool)
    for j in broken:
        seen, bad = at.allowed[None, :, j, None], ~np.isfinite(values[:, None, j])
        with np.errstate(invalid="ignore"):
            added += np.where(seen & bad, p.value[:, :, j, None] * values[:, None, j], 0.0)
        forbidden |= ~seen & bad

    def beside(a: Float) -> Float:
        return a.transpose(1, 0, 2).reshape(a.shape[1], -1)

    more, untold = beside(added), np.asarray(beside(forbidden.astype(np.float64)), bool)
    if at.captured is not None:
        untold &= np.isnan(at.captured)
    bits = None if made.expected is None else made.expected + more
    return dataclasses.replace(made, pre=made.pre + more, plain=made.plain + more, expected=bits, compared=~untold)


def _single_grid(p: Float, values: Float) -> Float:
    """Grid of the one product of a query that reads one key only (a first token, or a probability of 1), 0 for other queries: [H, T, h]."""
    single = np.count_nonzero(p, axis=2) == 1
    which = np.argmax(p != 0, axis=2)
    head = np.arange(p.shape[0])[:, None]
    grid = product_grid(p[head, np.arange(p.shape[1]), which][..., None], values[head, :, which])
    return np.where(single[..., None], grid, 0.0)


# ---- exponentials ----------------------------------------------------------------------------------------------------------------------


def _softmax(at: Setting, inputs: Sequence[Operand]) -> Prediction:
    """The exponent s - max is rounded once and exp is good to 1 ulp (``wide``: both in float64)."""
    (s,) = inputs
    return softmax(at, s, np.full_like(s.value, WIDE**2) if at.profile.wide else variance(exponents(at, s), F32) + EXP)


def exponents(at: Setting, s: Operand) -> Float:
    """Scores less the largest of their row, 0 where the mask forbids."""
    allowed = np.broadcast_to(at.allowed, s.value.shape)
    top = np.where(allowed, s.value, -np.inf).max(axis=-1, keepdims=True)
    return np.where(allowed, s.value - np.where(np.isfinite(top), top, 0.0), 0.0)


def softmax(at: Setting, s: Operand, power: Float) -> Prediction:
    """Softmax over the allowed keys, one rounding, where exp(s - max) has a relative error of variance ``power`` per key.

    A relative error of variance d_j per key reaches p_i through the sum as p_i^2 [d_i (1 - 2 p_i) + sum_j p_j^2 d_j]; three more roundings
    for the sum, its reciprocal and the product.
    """
    fmt, allowed = at.profile.activations, np.broadcast_to(at.allowed, s.value.shape)
    p = witness.softmax(s.value, allowed)
    top = np.where(allowed, s.value, -np.inf).max(axis=-1, keepdims=True)
    shown = np.where(allowed | (s.value == -np.inf), 0.0, s.value)  # a mask that is added hides no NaN and no infinity of a later key
    broken = (~np.isfinite(top) | ~np.isfinite(shown).all(axis=-1, keepdims=True)) & allowed.any(axis=-1, keepdims=True)
    d = power + _spread(s)
    total = (p * p * d).sum(axis=-1, keepdims=True)
    own, least = (WIDE**2, 0.0) if at.profile.wide else (3 * ROUNDING, TINY**2)
    left = p * p * (d * np.maximum(1.0 - 2.0 * p, 0.0) + total + own) + least
    alone = allowed.sum(axis=-1, keepdims=True) == 1  # exp(0) / exp(0): nothing is rounded
    left = np.where(allowed & ~alone, left, 0.0)
    rounding = np.where(alone, 0.0, variance(p, fmt))
    p = np.where(broken & allowed, np.nan, p)
    compared = np.broadcast_to(allowed.any(axis=-1, keepdims=True), p.shape) & ~(broken & ~allowed)
    return Prediction(p, left, p, left + rounding, fmt, certain=~allowed | alone, compared=compared)


def _silu(at: Setting, inputs: Sequence[Operand]) -> Prediction:
    """Sigmoid-weighted x / (1 + exp(-x)): an exponential, a sum and a division in float32, one rounding."""
    (x,) = inputs
    fmt, y = at.profile.activations, witness.silu(x.value)
    left = np.square(WIDE * y) if at.profile.wide else 2 * ROUNDING * y * y + TINY**2
    if x.variance is not None:
        e = np.exp(-np.abs(x.value))
        logistic = np.where(x.value >= 0, 1.0, e) / (1.0 + e)
        left = left + x.variance * np.square(logistic * (1.0 + x.value * (1.0 - logistic)))
    return Prediction(y, left, y, left + variance(y, fmt), fmt)


FUSED: Mapping[str, str] = {"BIAS": "MATMUL"}
"""An operation that a side with fused biases carries out inside the one before it."""

PREDICT: Mapping[str, Callable[[Setting, Sequence[Operand]], Prediction]] = {
    "EMBED": _embed,
    "ROPE_TABLE": _rope_table,
    "RMSNORM": _rmsnorm,
    "MATMUL": _matmul,
    "BIAS": _bias,
    "ROPE": _rope,
    "CACHE": _cache,
    "SCORES": _scores,
    "SOFTMAX": _softmax,
    "MIX": _mix,
    "ADD": _add,
    "SILU": _silu,
    "MUL": _mul,
}
"""Operation to its recipe; a row of ``ops.def`` without one is a red test."""
