"""Attention as one kernel: what rounding may leave between (q, keys, values) and its output, where nothing inside can be seen.

Owns the recipe of the fused kernels (flash attention as torch's ``scaled_dot_product_attention`` runs it on a CPU).  Refuses a kernel whose
roundings are not declared by :class:`aprender.arithmetic.Fused`.  Called by ``judge.replay`` for a profile that has one, in place of the
recipes of scores, probabilities and their product.

With s_j the scaled score of key j, e_j = exp(s_j - max), S = sum e_j and p_j = e_j / S, the kernel computes

    y = (sum_j rnd(e_j) v_j) / S,

all of it in float32 but for rnd, which rounds to the activation format what the second product reads; the sum S takes e_j before that.

* A relative error of variance d_j in e_j that both sums see moves y by p_j (v_j - y): together sum_j p_j^2 d_j (v_j - y)^2.  d_j holds the
  accumulation of q.k, the roundings of the scaled score and of its distance from the maximum, and the exponential itself.
* The rounding of e_j is seen by the numerator alone: sum_j var(rnd e_j) (v_j / S)^2.  The largest e_j is 1, which rounds to itself; there
  the exponential's own error stays in S and is rounded away above.
* Accumulation of the second product, and of S: as for every dot product and every norm.  Two more roundings for 1 / S and its product.

The noise of e_j is shared by all columns of a head, so the elements of a row count as one in a group (``shared``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from aprender.arithmetic import F32, Order
from aprender.judge import sums, witness
from aprender.judge.noise import EXP, exponents
from aprender.judge.prediction import Operand, Prediction, Setting
from aprender.judge.rounding import MEAN_ROUNDING as ROUNDING
from aprender.judge.rounding import U, variance
from aprender.judge.sums import Dot
from aprender.judge.witness import Float

ATTENTION = "FUSED_ATTENTION"
"""What the three operations are called when they are one."""

INSIDE = frozenset({"SCORES", "SOFTMAX"})
"""Operations whose values the kernel never forms, and :data:`LAST`, whose value is its output."""
LAST = "MIX"

LANES = 8
"""Partial sums in which S is kept at least: the float32 lanes of the narrowest vectors that such kernels are built for."""


def _attention(at: Setting, inputs: Sequence[Operand]) -> Prediction:
    """(q, keys, values) to the output of attention, heads side by side: [T, Qd]."""
    assert at.profile.fused is not None
    q, k, v = inputs
    fmt, head, heads = at.profile.activations, int(at.hparams["head"]), int(at.hparams["heads"])
    share = heads // int(at.hparams["kv_heads"])
    scale = float(np.float32(1.0 / np.sqrt(head)))
    dot = Dot(witness.heads_first(q.value, head), witness.heads_first(k.value, head, share), Order())
    s = dot.value() * scale
    seen = np.broadcast_to(at.allowed, s.shape)
    a = exponents(at, Operand(s))
    e = np.where(seen, np.exp(a), 0.0)
    total = e.sum(axis=2, keepdims=True)
    p = e / np.where(total > 0, total, 1.0)
    d = scale**2 * (sums.estimate(dot) + _brought(q, k, head, share, dot)) + variance(s, F32) + variance(a, F32) + EXP
    d = np.where(seen, d + at.profile.fused.exp**2, 0.0)
    values = witness.heads_first(v.value, head, share).transpose(0, 2, 1)
    second = Dot(p, values, Order())
    y, added = second.value(), sums.estimate(second)
    left = added + _moved(p, d, values, y) + np.square(y) * ROUNDING * (3.0 + s.shape[2] / (3.0 * LANES**2))
    left = left + np.square(y * U / 3)  # float32 before the last rounding
    if fmt != F32:
        rounded = np.where(a == 0, at.profile.fused.exp**2, variance(e, fmt)) * seen
        left = left + (rounded / np.square(np.where(total > 0, total, 1.0))) @ np.square(values).transpose(0, 2, 1)
    if v.variance is not None:
        left = left + np.square(p) @ witness.heads_first(v.variance, head, share)
    y, left, added = (_side_by_side(part) for part in (y, left, added))
    last = left if fmt == F32 else left + variance(y, fmt)
    return Prediction(y, left, y, last, fmt, dot=second, added=added, heads=heads, shared=True)


def _brought(q: Operand, k: Operand, head: int, share: int, dot: Dot) -> Float | float:
    """Variance of q.k that noise in q and k brings, where they were estimated: [H, T, J]."""
    found: Float | float = 0.0
    if q.variance is not None:
        found = found + witness.heads_first(q.variance, head) @ np.square(dot.w).transpose(0, 2, 1)
    if k.variance is not None:
        found = found + np.square(dot.x) @ witness.heads_first(k.variance, head, share).transpose(0, 2, 1)
    return found


def _moved(p: Float, d: Float, values: Float, y: Float) -> Float:
    """Sum over keys of p^2 d (v - y)^2, expanded; values [H, h, J], y [H, T, h]."""
    weight = np.square(p) * d
    v = values.transpose(0, 2, 1)
    moved = weight @ np.square(v) - 2.0 * y * (weight @ v) + np.square(y) * weight.sum(axis=2, keepdims=True)
    return np.asarray(np.maximum(moved, 0.0))


def _side_by_side(a: Float) -> Float:
    """Heads first to heads side by side."""
    return a.transpose(1, 0, 2).reshape(a.shape[1], -1)


PREDICT: Mapping[str, Callable[[Setting, Sequence[Operand]], Prediction]] = {ATTENTION: _attention}
"""The one recipe, as ``judge.noise`` has its own."""
