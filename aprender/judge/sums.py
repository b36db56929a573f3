"""What adding a dot product in float32 leaves: the variance, cheaply and exactly, and the bits where the order is declared.

Owns accumulation: each fused multiply-add rounds the running sum S_k once, so the error of a dot product is a sum of independent roundings
with variance sum_k ulp(S_k)^2 / 12.  Refuses to guess an order: it takes the profile's :class:`~aprender.arithmetic.Order`, and where that
knows nothing an envelope.  Called by ``judge.noise`` (:func:`estimate`, :func:`emulate`) and, for what crosses a gate, by
``judge.measure`` (:func:`exact`).  The loops are in ``csrc/measure/sums.c``; ``tests/test_sums.py`` has them once more in NumPy.

Operands are stacks: x [B, T, K], w [B, N, K], result [B, T, N]; a linear layer has B = 1, attention has B = H.

:func:`estimate` knows S_k only at the ends of segments (lanes, or 32 products in a row) and takes a random walk between them, pinned at
both ends.  That is right on average for products of any mean; the plain formula for zero-mean products is wrong by up to 12 times on SiLU
products and on probabilities times values.

The envelope of an unknown order is the larger of two: the sequential sum with its true partial sums, and K/2 roundings of the root of the
sum of squared products.  The first alone is no envelope where a few large products cancel early: another order keeps them apart until the
end (seen with two tokens in float32: 15 standard deviations of the sequential sum, on a correct engine).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprender import _core
from aprender.arithmetic import Format, Order
from aprender.errors import ArgumentError
from aprender.judge.rounding import Float, to_format, variance

Index = NDArray[np.int64]

SMALLEST = 2.0**-149
"""Step of float32 below its normal numbers: no rounding of a sum has a shorter one."""

NORMAL = 2.0**-126
"""Smallest normal number of float32 and bfloat16."""

WIDENED = 1 << 22
"""Weights held in float64 at once: 32 MiB, and as much for their squares."""


@dataclass(frozen=True)
class Dot:
    """A stack of dot products and the order in which they are added.

    Attributes
    ----------
    x, w : array
        [B, T, K] and [B, N, K], the numbers that the engine multiplied.  w may be float32; it is widened a few columns at a time.
    order : Order
    flush : bool
        A unit may carry it out that reads subnormal numbers as zero: the bfloat16 products of x86 (``vdpbf16ps``, AMX) do so whatever the
        flags say, and older CPUs do not have them.
    """

    x: Float
    w: NDArray[Any]
    order: Order
    flush: bool = False

    @property
    def size(self) -> int:
        """Number of products."""
        return int(self.x.size * self.w.shape[1])

    def value(self) -> Float:
        """The products in float64: [B, T, N]."""
        return self.by_columns(lambda w: np.asarray(self.x @ w.transpose(0, 2, 1)))

    def spread(self, x_variance: Float) -> Float:
        """Variance that noise in x brings: [B, T, N]."""
        return self.by_columns(lambda w: np.asarray(x_variance @ (w * w).transpose(0, 2, 1)))

    def by_columns(self, part: Callable[[Float], Float]) -> Float:
        """A function of w in float64 that gives [B, T, columns], over at most :data:`WIDENED` numbers at a time."""
        wide = max(1, WIDENED // max(self.w.shape[0] * self.w.shape[2], 1))
        pieces = [part(self.w[:, i : i + wide].astype(np.float64, copy=False)) for i in range(0, self.w.shape[1], wide)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=2)


def estimate(dot: Dot) -> Float:
    """Variance of each dot product, from sums over segments and one sum of squares per segment: [B, T, N].

    A rounding of a subnormal sum has the step of the smallest numbers, which a relative variance does not know of.
    """
    found = _core.estimate_sums(_float64(dot.x), _weights(dot.w), lanes=dot.order.lanes, block=_block(dot))
    found, lost = np.where(found > 0, found + dot.x.shape[2] * SMALLEST**2 / 12.0, found), _flushed(dot)
    return np.asarray(found if lost is None else found + lost)


def _flushed(dot: Dot) -> Float | None:
    """Square of what a unit may lose that reads subnormal numbers as zero and writes none: [B, T, N]; None where there are none.

    The bound is every product of which a factor is subnormal, and what is subnormal of each partial sum.
    """
    if not dot.flush:
        return None
    small_x, small_w = (np.where(np.abs(a) < NORMAL, np.abs(a), 0.0).astype(np.float64) for a in (dot.x, dot.w))
    if not (small_x.any() or small_w.any()):
        return None
    x, w = np.abs(dot.x.astype(np.float64)), np.abs(dot.w.astype(np.float64))
    lost = small_x @ w.transpose(0, 2, 1) + x @ small_w.transpose(0, 2, 1)
    return np.asarray(np.square(lost + dot.x.shape[2] * NORMAL))


def exact(dot: Dot, flat: Index) -> Float:
    """Variance of some dot products from all their partial sums, by flat index into the result: [P].  The work is K per element."""
    at = flat.astype(np.int64, copy=False)
    found, lost = _core.exact_sums(_float64(dot.x), _weights(dot.w), at, lanes=dot.order.lanes, block=_block(dot)), _flushed(dot)
    return found if lost is None else found + lost.ravel()[at]


def emulate(dot: Dot, flat: Index | None = None) -> Float:
    """The float32 bits that the declared lanes and tree give, by flat index into the result (all of it if None): [P].

    Only for an order with lanes, where every bit is declared.

    Raises
    ------
    ArgumentError
        The operands are not float32 numbers.
    """
    index = None if flat is None else flat.astype(np.int64, copy=False)
    return _core.lane_dots(_float32(dot.x), _float32(dot.w), index, lanes=dot.order.lanes).ravel().astype(np.float64)


def narrow(dot: Dot, fmt: Format) -> tuple[Float, Float]:
    """Sums kept in a short format, one fused multiply-add after the other: the bits, and the variance of so many independent roundings.

    The variance is sum_k ulp(S_k)^2 / 12 over the true partial sums: what a sum that stands still exceeds.  The work is K passes over
    [B, T, N].  Products of 16-bit numbers are exact in float64, and so the sum with one is rounded once.

    Returns
    -------
    (array, array)
        Both [B, T, N].
    """
    bits, true, left = (np.zeros((dot.x.shape[0], dot.x.shape[1], dot.w.shape[1])) for _ in range(3))
    for k in range(dot.x.shape[2]):
        product = dot.x[:, :, k, None] * dot.w[:, None, :, k].astype(np.float64, copy=False)
        bits, true = to_format(bits + product, fmt), true + product
        left += variance(true, fmt)
    return bits, left


def lane_dot(x: Float, w: Float, lanes: int) -> Float:
    """Dot products of rows [P, K] by fused multiply-adds in lanes and a rounded tree, bit for bit: [P]."""
    return emulate(Dot(x[:, None], w[:, None], Order(lanes=lanes)))


def _block(dot: Dot) -> int:
    """Length of the blocks; 0 where only the envelope is known."""
    return dot.order.block(dot.x.shape[2], dot.x.shape[1]) or 0


def _float64(a: NDArray[Any]) -> Float:
    return a.astype(np.float64, copy=False)


def _weights(w: NDArray[Any]) -> NDArray[Any]:
    """As they are if the core reads them so: a large float32 matrix is not copied."""
    return w if w.dtype == np.float32 else _float64(w)


def is_float32(dot: Dot) -> bool:
    """Whether all operands are float32 numbers: only such can be emulated."""
    with np.errstate(over="ignore", invalid="ignore"):
        return all(np.array_equal(a.astype(np.float32, copy=False), a, equal_nan=True) for a in (dot.x, dot.w))


def _float32(a: NDArray[Any]) -> NDArray[np.float32]:
    """The same numbers; what is emulated with others than the engine had would be wrong in silence."""
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = a.astype(np.float32, copy=False)
    if narrow is not a and not np.array_equal(narrow, a, equal_nan=True):
        raise ArgumentError("a dot product can be emulated for float32 operands only, and these hold other numbers", code="ARGUMENT")
    return narrow
