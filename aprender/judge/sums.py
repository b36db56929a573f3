"""What adding a dot product in float32 leaves: the variance, cheaply and exactly, and the bits where the order is declared.

Owns accumulation: each fused multiply-add rounds the running sum S_k once, so the error of a dot product is a sum of independent roundings
with variance sum_k ulp(S_k)^2 / 12.  Refuses to guess an order: it takes the profile's :class:`~aprender.arithmetic.Order`, and where that
knows nothing an envelope.  Called by ``judge.noise`` (:func:`estimate`) and, for what crosses a gate, by
``judge.measure`` (:func:`exact`, :func:`emulate`).

Operands are stacks: x [B, T, K], w [B, N, K], result [B, T, N]; a linear layer has B = 1, attention has B = H.

:func:`estimate` knows S_k only at the ends of segments (one product per segment) and takes a random walk between them, pinned at both
ends.  That is right on average for products of any mean; the plain formula for zero-mean products is wrong by up to 12 times on SiLU
products and on probabilities times values.

The envelope of an unknown order is the larger of two: the sequential sum with its true partial sums, and K/2 roundings of the root of the
sum of squared products.  The first alone is no envelope where a few large products cancel early: another order keeps them apart until the
end (seen with two tokens in float32: 15 standard deviations of the sequential sum, on a correct engine).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprender.arithmetic import F32, Order
from aprender.judge.rounding import MEAN_ROUNDING, Float, fma32, variance

Index = NDArray[np.int64]

SEGMENT = 32
"""Longest stretch of a sequential sum over which the walk is interpolated; a few large products early in it are what misleads."""

WIDENED = 1 << 24
"""Weights held in float64 at once: 128 MiB, and as much for their squares."""

CHUNK = 1 << 21
"""Products held at once by :func:`exact`: 16 MiB of float64 per temporary."""

NEAR = 1 << 17
"""Products held at once by :func:`emulate`, whose lanes are gone over again and again: they should stay in the second-level cache."""


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

    def rows(self, flat: Index) -> tuple[Float, Float]:
        """The two operands [P, K] of some elements of the result, by flat index into [B, T, N]."""
        b, t, n = np.unravel_index(flat, (self.x.shape[0], self.x.shape[1], self.w.shape[1]))
        return self.x[b, t], self.w[b, n].astype(np.float64, copy=False)


def estimate(dot: Dot) -> Float:
    """Variance of each dot product, from segment sums and one product of squares per segment: [B, T, N]."""
    return dot.by_columns(lambda w: _estimate(Dot(dot.x, w, dot.order)))


def _estimate(dot: Dot) -> Float:
    """The same for a few columns."""
    out = np.zeros((dot.x.shape[0], dot.x.shape[1], dot.w.shape[1]))
    if dot.order.lanes:
        used = min(dot.order.lanes, dot.x.shape[2])
        ends = np.stack([_segment(dot, slice(lane, None, dot.order.lanes), 0.0, out) for lane in range(used)])
        for level in _tree(_padded(ends, dot.order.lanes)):
            out += variance(level, F32).sum(axis=0)
        return out
    k = dot.x.shape[2]
    known = dot.order.block(k, dot.x.shape[1])
    block = known or k
    total: Float | float = 0.0
    for first in range(0, k, block):
        chain: Float | float = 0.0
        for start in range(first, min(first + block, k), SEGMENT):
            chain = _segment(dot, slice(start, min(start + SEGMENT, first + block, k)), chain, out)
        total = total + chain
        if first:
            out += variance(np.asarray(total), F32)
    return out if known else np.maximum(out, _any_order((dot.x * dot.x) @ (dot.w * dot.w).transpose(0, 2, 1), k))


def _any_order(squares: Float, k: int) -> Float:
    """Variance of a sum of ``k`` products of which only the sum of squares is known: every rounding sees half of it on average."""
    return MEAN_ROUNDING * (k / 2) * squares


def _segment(dot: Dot, span: slice, start: Float | float, out: Float) -> Float:
    """Add to ``out`` the variance of one chain of additions that starts at ``start``; its last partial sum.

    With m additions, end - start = d and q the sum of squared products: the mean path is start + (k/m) d, and a walk pinned at both ends
    has variance s2 k (m - k) / m around it, s2 = q/m - (d/m)^2; summed over k = 1 .. m.  Products that are exactly 0 add nothing.
    """
    x, w = dot.x[..., span], dot.w[..., span]
    d = x @ w.transpose(0, 2, 1)
    q = (x * x) @ (w * w).transpose(0, 2, 1)
    m = np.maximum(np.count_nonzero(x, axis=2)[..., None], 1)
    spread = np.maximum(q / m - (d / m) ** 2, 0.0)
    path = m * np.square(start) + start * d * (m + 1) + d * d * ((m + 1) * (2 * m + 1) / (6.0 * m))
    out += MEAN_ROUNDING * (path + spread * ((m * m - 1) / 6.0))
    return np.asarray(start + d)


def _padded(lanes: Float, width: int) -> Float:
    """Lanes on the first axis, zeros for those that got no element."""
    missing = width - lanes.shape[0]
    return lanes if missing == 0 else np.concatenate([lanes, np.zeros((missing, *lanes.shape[1:]))])


def _tree(lanes: Float) -> Iterator[Float]:
    """Sums of the fixed tree, level by level: l with l + half, halving until one is left (float64, not rounded)."""
    while lanes.shape[0] > 1:
        half = lanes.shape[0] // 2
        lanes = lanes[:half] + lanes[half:]
        yield lanes


def exact(dot: Dot, flat: Index) -> Float:
    """Variance of some dot products from all their partial sums, by flat index into the result: [P].

    The work is K per element; memory is bounded by :data:`CHUNK`.
    """
    k = dot.x.shape[2]
    step = max(1, CHUNK // max(k, 1))
    known = dot.order.block(k, dot.x.shape[1])
    parts = []
    for i in range(0, len(flat), step):
        x, w = dot.rows(flat[i : i + step])
        products = x * w
        if dot.order.lanes:
            parts.append(_lanes_exact(products, dot.order.lanes))
        elif known:
            parts.append(_blocks_exact(products, known))
        else:
            parts.append(np.maximum(_blocks_exact(products, k), _any_order(np.square(products).sum(axis=1), k)))
    return np.concatenate(parts) if parts else np.zeros(0)


def _grid(products: Float, length: int) -> Float:
    """Products [P, K] filled up with zeros and cut into [P, K / length, length]."""
    short = -products.shape[1] % length
    filled = np.pad(products, ((0, 0), (0, short))) if short else products
    return filled.reshape(filled.shape[0], -1, length)


def _roundings(sums: Float, products: Float) -> Float:
    """Variance of each running sum's rounding; adding an exact 0 rounds nothing."""
    return np.where(products != 0, variance(sums, F32), 0.0)


def _blocks_exact(products: Float, block: int) -> Float:
    """Sequential inside blocks, block sums added in order: [P]."""
    cut = _grid(products, block)
    running = np.cumsum(cut, axis=2)
    out = _roundings(running, cut).sum(axis=(1, 2))
    totals = np.cumsum(running[:, :, -1], axis=1)[:, 1:]
    return np.asarray(out + variance(totals, F32).sum(axis=1))


def _lanes_exact(products: Float, lanes: int) -> Float:
    """Sequential inside lanes, then the tree: [P]."""
    cut = _grid(products, lanes)
    running = np.cumsum(cut, axis=1)
    out = _roundings(running, cut).sum(axis=(1, 2))
    for level in _tree(running[:, -1].T):
        out = out + variance(level, F32).sum(axis=0)
    return np.asarray(out)


def emulate(dot: Dot, flat: Index | None = None) -> Float:
    """The float32 bits that the declared lanes and tree give, by flat index into the result (all of it if None): [P].

    Only for an order with lanes, where every bit is declared.
    """
    count = dot.x.shape[0] * dot.x.shape[1] * dot.w.shape[1]
    index = np.arange(count) if flat is None else flat
    step = max(1, NEAR // max(dot.x.shape[2], 1))
    parts = [lane_dot(*dot.rows(index[i : i + step]), dot.order.lanes) for i in range(0, len(index), step)]
    return np.concatenate(parts) if parts else np.zeros(0)


def lane_dot(x: Float, w: Float, lanes: int) -> Float:
    """Dot products of rows [P, K] by fused multiply-adds in lanes and a rounded tree, bit for bit: [P]."""
    a, b = _grid(x, lanes), _grid(w, lanes)
    acc = np.zeros((x.shape[0], lanes))
    for i in range(a.shape[1]):
        acc = fma32(a[:, i], b[:, i], acc)
    return tree32(acc)


def tree32(lanes: Float) -> Float:
    """The fixed tree with each sum rounded to float32: [P, lanes] to [P]."""
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = (lanes[:, :half] + lanes[:, half:]).astype(np.float32).astype(np.float64)
    return lanes[:, 0]
