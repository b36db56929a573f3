"""Dot products that are added in a short format: every bit is declared, and no more is kept than the format holds.

Owns the recipes of the three operations that add products, for a profile whose ``accumulator`` is not float32: one fused multiply-add after
the other, each rounded to the accumulator.  Refuses to say that this is enough: a sum that stands still because every next product is
below half a step is emulated here, found to be carried out as declared, and named by ``judge.loss``.  Called by ``judge.replay``, in place
of the recipes of ``judge.noise``.

What is left if nothing is emulated is taken as that of independent roundings, sum_k ulp(S_k)^2 / 12 over the true partial sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from aprender.arithmetic import F32, Order
from aprender.judge import sums, witness
from aprender.judge.prediction import Operand, Prediction, Setting
from aprender.judge.rounding import Float, to_format, variance
from aprender.judge.sums import Dot


def _known(inputs: Sequence[Operand]) -> bool:
    return all(o.variance is None for o in inputs)


def _matmul(at: Setting, inputs: Sequence[Operand]) -> Prediction:
    """Rows times weights; the bias is added to the sum, in the accumulator."""
    (x,) = inputs
    held = at.profile.accumulator
    dot = Dot(x.value[None], np.concatenate([np.asarray(part) for part in at.weights])[None], Order())
    y, (bits, left) = dot.value()[0], (part[0] for part in sums.narrow(dot, held))
    if at.bias is not None:
        y, bits, left = y + at.bias, to_format(bits + at.bias, held), left + variance(y + at.bias, held)
    return _made(at, inputs, y, bits, left, None if x.variance is None else dot.spread(x.variance[None])[0])


def _scores(at: Setting, inputs: Sequence[Operand]) -> Prediction:
    """Dot products of q and k; the scale is rounded to float32, and so is the product with it."""
    q, k = inputs
    head, share = int(at.hparams["head"]), int(at.hparams["heads"]) // int(at.hparams["kv_heads"])
    scale = float(np.float32(1.0 / np.sqrt(head)))
    dot = Dot(witness.heads_first(q.value, head), witness.heads_first(k.value, head, share), Order())
    bits, left = sums.narrow(dot, at.profile.accumulator)
    more = None
    if not _known(inputs):
        own, other = (witness.heads_first(_spread(o), head, n) for o, n in ((q, 1), (k, share)))
        more = scale**2 * (own @ np.square(dot.w).transpose(0, 2, 1) + np.square(dot.x) @ other.transpose(0, 2, 1))
    seen = np.broadcast_to(at.allowed, bits.shape)
    y, bits, left = (np.where(seen, part, 0.0) for part in (dot.value() * scale, to_format(bits * scale, F32), left * scale**2))
    return dataclasses.replace(_made(at, inputs, y, bits, left, more), compared=seen)


def _mix(at: Setting, inputs: Sequence[Operand]) -> Prediction:
    """Probabilities times values."""
    p, v = inputs
    head, share = int(at.hparams["head"]), int(at.hparams["heads"]) // int(at.hparams["kv_heads"])
    values = witness.heads_first(v.value, head, share)
    dot = Dot(p.value, values.transpose(0, 2, 1), Order())
    bits, left = sums.narrow(dot, at.profile.accumulator)
    more = None
    if not _known(inputs):
        more = _side_by_side(_spread(p) @ np.square(values) + np.square(p.value) @ witness.heads_first(_spread(v), head, share))
    return _made(at, inputs, _side_by_side(dot.value()), _side_by_side(bits), _side_by_side(left), more)


def _made(at: Setting, inputs: Sequence[Operand], y: Float, bits: Float, left: Float, more: Float | None) -> Prediction:
    """The prediction, with a last rounding to the activation format; noise that the inputs bring leaves no bit declared."""
    fmt = at.profile.activations
    left = left if fmt == at.profile.accumulator else left + variance(y, fmt)
    if not _known(inputs):
        left = left if more is None else left + more
        return Prediction(y, left, y, left, fmt)
    return Prediction(bits, np.zeros_like(y), y, left, fmt, certain=True)


def _spread(o: Operand) -> Float:
    return np.zeros_like(o.value) if o.variance is None else o.variance


def _side_by_side(a: Float) -> Float:
    """Heads first to heads side by side."""
    return a.transpose(1, 0, 2).reshape(a.shape[1], -1)


PREDICT: Mapping[str, Callable[[Setting, Sequence[Operand]], Prediction]] = {"MATMUL": _matmul, "SCORES": _scores, "MIX": _mix}
"""Operation to its recipe where sums are kept in a short format."""
