"""Two arrays element by element: counts, gaps, the elements that differ most, and the same per token.

Owns what a comparison without a judge may say of two arrays.  Nothing hides: a NaN or an infinity that the other side does not have is
counted, is larger than any gap of numbers, and stands first in every list; figures that only numbers have are those of the pairs in which
both are finite.  A figure that does not exist is None, with the reason.  Sums are NumPy's own, in float64, in a fixed order and without
BLAS: they do not depend on the number of threads.  Called by ``aprender.diff``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Wide = NDArray[np.float64]

INFINITE, NOT_A_NUMBER = 1e300, 2e300
"""What stands for the gap of such a pair when elements are ordered: above all gaps of numbers, which end at 6.9e38."""


@dataclass(frozen=True, slots=True)
class Element:
    """One place at which the two differ.

    Attributes
    ----------
    at : int
        Index into the flat array, row-major.
    a, b : float
    bits : tuple of int
        Of each, as they are stored.
    gap : float
        ``|a - b|``; inf where an infinity meets anything else, nan where a NaN does.
    """

    at: int
    a: float
    b: float
    bits: tuple[int, int]
    gap: float


@dataclass(frozen=True, slots=True)
class Elements:
    """What two arrays of one shape have in common; ``b`` is the measure of what is relative.

    Attributes
    ----------
    n, n_bits_equal, n_value_equal : int
        Elements; those of the same bits; those of the same value (0 and -0 are, so are two NaN).
    nan_a_only, nan_b_only, nan_both, inf_mismatch : int
        NaN against none, and the reverse; in both; an infinity that meets another value.
    max_abs, rms : float or None
        Largest and root mean square gap of the finite pairs; None if there is none.
    max_ulp : int
        Largest number of float32 steps between the two of a finite pair.
    rel_l2, cos_distance, std_ratio : float or None
        Norm of the difference over the norm of ``b``; 1 - cosine, exact for small angles; standard deviations, a over b.
    undefined : str or None
        Why one of the last three is None.
    first : int or None
        First flat index at which bits differ.
    top : tuple of Element
        Those that differ most: NaN first, then infinities, then by gap, then by index.
    """

    n: int
    n_bits_equal: int
    n_value_equal: int
    nan_a_only: int
    nan_b_only: int
    nan_both: int
    inf_mismatch: int
    max_abs: float | None
    max_ulp: int
    rms: float | None
    rel_l2: float | None
    cos_distance: float | None
    std_ratio: float | None
    undefined: str | None
    first: int | None
    top: tuple[Element, ...]

    @property
    def unlike(self) -> int:
        """Pairs that no tolerance makes equal."""
        return self.nan_a_only + self.nan_b_only + self.inf_mismatch


def _classes(a: Floats, b: Floats) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Masks: both finite, exactly one NaN, an infinity that meets another value."""
    finite = np.isfinite(a) & np.isfinite(b)
    nan_a, nan_b = np.isnan(a), np.isnan(b)
    return finite, nan_a != nan_b, ~finite & ~(nan_a | nan_b) & (a != b)


def _ordered(array: Floats) -> NDArray[np.int64]:
    """Whole numbers in the order of the values, neighbours 1 apart; both zeros are 0."""
    bits = array.view(np.int32)
    sign = bits >> 31  # 0 or -1: x ^ -1 - -1 is -x
    return (((bits & 0x7FFFFFFF) ^ sign) - sign).astype(np.int64)


def compare(a: Floats, b: Floats, limit: int = 10) -> Elements:
    """Everything about two arrays.

    Parameters
    ----------
    a, b : ndarray of float32
        Of one shape.
    limit : int
        How many elements to name.
    """
    a, b = np.ascontiguousarray(a).reshape(-1), np.ascontiguousarray(b).reshape(-1)
    differ = a.view(np.uint32) != b.view(np.uint32)
    finite, nan_one, inf_one = _classes(a, b)
    x, y = a[finite].astype(np.float64), b[finite].astype(np.float64)
    gap = np.abs(x - y)
    rel, cos, std, why = _relative(x, y, gap)
    moved = finite & differ
    steps = np.abs(_ordered(a[moved]) - _ordered(b[moved]))
    score = np.zeros(a.size)
    score[finite], score[inf_one], score[nan_one] = gap, INFINITE, NOT_A_NUMBER
    nan_both = int(np.count_nonzero(np.isnan(a) & np.isnan(b)))
    first = int(differ.argmax()) if differ.any() else None
    return Elements(
        n=a.size, n_bits_equal=int(a.size - np.count_nonzero(differ)), n_value_equal=int(np.count_nonzero(a == b)) + nan_both,
        nan_a_only=int(np.count_nonzero(nan_one & np.isnan(a))), nan_b_only=int(np.count_nonzero(nan_one & np.isnan(b))),
        nan_both=nan_both, inf_mismatch=int(np.count_nonzero(inf_one)),
        max_abs=float(gap.max()) if gap.size else None, max_ulp=int(steps.max()) if steps.size else 0,
        rms=float(np.sqrt(np.mean(gap * gap))) if gap.size else None,
        rel_l2=rel, cos_distance=cos, std_ratio=std, undefined=why, first=first, top=_top(a, b, np.flatnonzero(differ), score, limit),
    )  # fmt: skip


def _relative(x: Wide, y: Wide, gap: Wide) -> tuple[float | None, float | None, float | None, str | None]:
    """Relative L2, 1 - cosine, ratio of standard deviations of finite numbers, and why one of them does not exist."""
    if not x.size:
        return None, None, None, "there is no pair of finite values"
    nx, ny, nd = (float(np.sqrt(np.sum(v * v))) for v in (x, y, gap))
    rel = nd / ny if ny else None if nd else 0.0
    cos = float(np.sum(np.square(x / nx - y / ny)) / 2) if nx and ny else None
    sy = float(np.std(y))
    std = float(np.std(x)) / sy if sy else None
    zero = " and ".join(name for name, norm in (("A", nx), ("B", ny)) if not norm)
    constant = "the values of B are all the same: they have no deviation" if std is None else None
    return rel, cos, std, f"all finite values of {zero} are 0: they have no direction" if zero else constant


def _top(a: Floats, b: Floats, where: NDArray[np.int64], score: Wide, limit: int) -> tuple[Element, ...]:
    """Of the elements ``where`` those of the largest score, in a total order: score, then index."""
    if where.size > limit > 0:
        found = score[where]
        least = np.partition(found, where.size - limit)[where.size - limit]
        above = np.flatnonzero(found > least)
        where = where[np.concatenate([above, np.flatnonzero(found == least)[: limit - above.size]])]
    order = np.lexsort((where, -score[where]))[: max(limit, 0)]
    return tuple(_element(a, b, int(at), float(score[at])) for at in where[order])


def _element(a: Floats, b: Floats, at: int, score: float) -> Element:
    bits = int(a.view(np.uint32)[at]), int(b.view(np.uint32)[at])
    gap = {INFINITE: float("inf"), NOT_A_NUMBER: float("nan")}.get(score, score)
    return Element(at, float(a[at]), float(b[at]), bits, gap)


@dataclass(frozen=True, slots=True)
class Token:
    """One token's part of two arrays; the figures are as those of :class:`Elements`."""

    differing: int
    unlike: int
    rel_l2: float | None
    std_ratio: float | None
    max_abs: float | None

    @property
    def badness(self) -> tuple[bool, float]:
        """Sorts tokens: those with a NaN or infinity of one side only are the worst, then by relative L2, without bound where B is 0."""
        return self.unlike > 0, float("inf") if self.rel_l2 is None and self.max_abs else self.rel_l2 or 0.0


def by_token(a: Floats, b: Floats, axis: int) -> list[Token]:
    """The comparison of each token.

    Parameters
    ----------
    a, b : ndarray of float32
        Of one shape.
    axis : int
        That of the tokens.
    """
    x, y = (np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1) for array in (a, b))
    finite, nan_one, inf_one = _classes(x, y)
    pairs = finite.sum(axis=1)
    wide_x, wide_y = (np.where(finite, v, 0).astype(np.float64) for v in (x, y))
    gap = np.abs(wide_x - wide_y)
    differing = np.count_nonzero(np.ascontiguousarray(x).view(np.uint32) != np.ascontiguousarray(y).view(np.uint32), axis=1)
    unlike = np.count_nonzero(nan_one | inf_one, axis=1)
    far, norm = np.sqrt(np.sum(gap * gap, axis=1)), np.sqrt(np.sum(wide_y * wide_y, axis=1))
    std_x, std_y = (_deviations(v, finite, pairs) for v in (wide_x, wide_y))
    return [
        Token(
            differing=int(differing[t]), unlike=int(unlike[t]),
            rel_l2=float(far[t] / norm[t]) if norm[t] else None if far[t] or not pairs[t] else 0.0,
            std_ratio=float(std_x[t] / std_y[t]) if std_y[t] else None,
            max_abs=float(gap[t].max()) if pairs[t] else None,
        )
        for t in range(x.shape[0])
    ]  # fmt: skip


def _deviations(values: Wide, finite: NDArray[np.bool_], pairs: NDArray[np.int64]) -> Wide:
    """Standard deviation of each row's finite values; the others are 0 in it."""
    count = np.maximum(pairs, 1)
    middle = (np.sum(values, axis=1) / count)[:, None]
    away: Wide = np.where(finite, values - middle, 0.0)
    return np.asarray(np.sqrt(np.sum(away * away, axis=1) / count), np.float64)
