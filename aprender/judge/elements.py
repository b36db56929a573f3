"""Two arrays element by element: counts, gaps, the elements that differ most, and the same per token.

Owns what a comparison without a judge may say of two arrays.  Nothing hides: a NaN or an infinity that the other side does not have is
counted, is larger than any gap of numbers, and stands first in every list; figures that only numbers have are those of the pairs in which
both are finite.  A figure that does not exist is None, with the reason.  The one pass over the data is the core's (``csrc/measure``):
sums in float64, in a fixed order, whatever the number of threads.  Called by ``aprender.diff`` and ``judge.metrics``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprender import _core

Floats = NDArray[np.float32]

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
    over : tuple of int
        Finite pairs that are more than 1, 16, 256 and 65536 steps apart.
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
    over: tuple[int, ...]
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
    said = _core.compare(a, b, limit=max(limit, 0))
    rel, cos, std, why = relative(said)
    pairs = said["finite"]
    return Elements(
        n=a.size, n_bits_equal=said["bits_equal"], n_value_equal=said["value_equal"], nan_a_only=said["nan_a"], nan_b_only=said["nan_b"],
        nan_both=said["nan_both"], inf_mismatch=said["inf_unlike"], max_abs=said["max_abs"] if pairs else None, max_ulp=said["max_ulp"],
        over=said["over"],
        rms=math.sqrt(said["dd"] / pairs) if pairs else None, rel_l2=rel, cos_distance=cos, std_ratio=std, undefined=why,
        first=None if said["first"] < 0 else said["first"], top=tuple(_element(a, b, at, gap) for at, gap in said["top"]),
    )  # fmt: skip


def relative(said: Mapping[str, Any]) -> tuple[float | None, float | None, float | None, str | None]:
    """Relative L2, 1 - cosine, ratio of standard deviations of the finite pairs, and why one of them does not exist.

    With d the norm of the difference and na, nb the norms, ``2 (1 - cos) na nb = d^2 - (na - nb)^2``; na - nb comes from the sum of
    (a - b)(a + b), which is na^2 - nb^2 without its cancellation.
    """
    pairs = said["finite"]
    if not pairs:
        return None, None, None, "there is no pair of finite values"
    na, nb, nd = (math.sqrt(said[name]) for name in ("aa", "bb", "dd"))
    rel = nd / nb if nb else None if nd else 0.0
    cos = max(said["dd"] - (said["ab"] / (na + nb)) ** 2, 0.0) / (2 * na * nb) if na and nb else None
    sa, sb = (_deviation(said[one] / pairs, said[square] / pairs) for one, square in (("a", "aa"), ("b", "bb")))
    std = sa / sb if sb else None
    zero = " and ".join(name for name, norm in (("A", na), ("B", nb)) if not norm)
    constant = "the values of B are all the same: they have no deviation" if std is None else None
    return rel, cos, std, f"all finite values of {zero} are 0: they have no direction" if zero else constant


def _deviation(mean: float, square: float) -> float:
    """Standard deviation from the mean and the mean square; 0 where only the rounding of the two is left."""
    variance = square - mean * mean
    return math.sqrt(variance) if variance > 8e-16 * square else 0.0


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
    rows = (np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1) for array in (a, b))
    return [_token(x, y) for x, y in zip(*rows, strict=True)]


def _token(a: Floats, b: Floats) -> Token:
    said = _core.compare(np.ascontiguousarray(a), np.ascontiguousarray(b))
    rel, _, std, _ = relative(said)
    return Token(
        differing=a.size - said["bits_equal"], unlike=said["nan_a"] + said["nan_b"] + said["inf_unlike"], rel_l2=rel, std_ratio=std,
        max_abs=said["max_abs"] if said["finite"] else None,
    )  # fmt: skip
