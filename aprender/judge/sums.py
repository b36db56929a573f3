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
from aprender.arithmetic import Order
from aprender.errors import ArgumentError
from aprender.judge.rounding import Float

Index = NDArray[np.int64]

WIDENED = 1 << 24
"""Weights held in float64 at once: 128 MiB, and as much for their squares."""


@dataclass(frozen=True)
class Dot:
    """A stack of dot products and the order in which they are added.

    Attributes
    ----------
    x, w : array
        [B, T, K] and [B, N, K], the numbers that the engine multiplied.  w may be float32; it is widened a few columns at a time.
    order : Order
    """

    x: Float
    w: NDArray[Any]
    order: Order

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
    """Variance of each dot product, from sums over segments and one sum of squares per segment: [B, T, N]."""
    return _core.estimate_sums(_float64(dot.x), _weights(dot.w), lanes=dot.order.lanes, block=_block(dot))


def exact(dot: Dot, flat: Index) -> Float:
    """Variance of some dot products from all their partial sums, by flat index into the result: [P].  The work is K per element."""
    return _core.exact_sums(_float64(dot.x), _weights(dot.w), flat.astype(np.int64, copy=False), lanes=dot.order.lanes, block=_block(dot))


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
