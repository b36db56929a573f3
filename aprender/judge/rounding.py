"""One rounding: its step, its variance, and what it tells about the value before it.

Owns everything about rounding a single number to a :class:`~aprender.arithmetic.Format`.  Refuses sums (``judge.sums``) and operations
(``judge.noise``).  Called by those two and by the decision rule.  All arrays are float64 unless a name says otherwise; the values of
float32, float16 and bfloat16 are exact in it.

A value y that is spread evenly between neighbours is off by a uniform error of +-ulp/2 after rounding: variance ulp^2 / 12.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from aprender.arithmetic import F16, F32, Format

Float = NDArray[np.float64]

U = F32.unit
"""Relative error bound of one float32 rounding, 2^-24."""

MEAN_ROUNDING = 0.18 * U * U
"""Relative variance of one float32 rounding, averaged over log-uniform mantissas: (1/3) * E[(ulp / 2y)^2] = (1/3) * 0.541 * u^2."""

CERTAIN = 6.0
"""A rounding is taken as decided if its boundary is this many standard deviations away: P(flip) = 2e-9."""


def endless(fmt: Format) -> Format:
    """A format of the same precision whose exponents never end, as far as float64 goes: nothing is too small or too large for it."""
    return dataclasses.replace(fmt, least=-900, overflow=np.inf)


def ulp(y: Float, fmt: Format) -> Float:
    """Step of the format at each |y| (the subnormal step near 0)."""
    exponent = ((np.ascontiguousarray(y, np.float64).view(np.int64) >> 52) & 0x7FF) - 1022  # as frexp counts: y = m 2^e, 1/2 <= m < 1
    biased: NDArray[np.int64] = np.maximum(exponent, fmt.least) - fmt.precision + 1023
    return (biased << 52).view(np.float64)


def to_format(y: Float, fmt: Format) -> Float:
    """Round to nearest, ties to even, in one step; infinite from ``fmt.overflow`` up."""
    with np.errstate(over="ignore", invalid="ignore"):
        if fmt == F32:
            return y.astype(np.float32).astype(np.float64)
        if fmt == F16:
            return y.astype(np.float16).astype(np.float64)
        step = ulp(y, fmt)
        out = np.rint(y / step) * step
        return np.where(np.abs(y) >= fmt.overflow, np.copysign(np.inf, y), out)


def lowest_bit(y: Float) -> Float:
    """Value of the lowest set bit of each number, 0 for 0."""
    mantissa, exponent = np.frexp(y)
    whole = np.rint(mantissa * 2.0**53).astype(np.int64)
    return np.where(whole == 0, 0.0, np.ldexp((whole & -whole).astype(np.float64), exponent - 53))


def variance(y: Float, fmt: Format, grid: Float | None = None) -> Float:
    """Variance of one rounding of the exact value y.

    Parameters
    ----------
    y : array
        Value before the rounding.
    fmt : Format
        What it is rounded to.
    grid : array, optional
        Spacing of the values that y can take (sums and products of short numbers fall on a coarse grid).  At D = ulp / grid <= 1 nothing is
        rounded; else ulp^2/12 * (1 + 2/D^2), ties included.

    Notes
    -----
    |y| < ulp/2 happens only deep in the subnormals: the result is 0 and the error -y, not uniform.
    """
    step = ulp(y, fmt)
    with np.errstate(over="ignore"):  # of an infinite value it is infinite
        v = step * step / 12.0
    if grid is not None:
        ratio = np.where(grid > 0, step / np.where(grid > 0, grid, 1.0), np.inf)
        v = np.where(ratio <= 1.0, 0.0, v * (1.0 + 2.0 / np.maximum(ratio, 1.0) ** 2))
    v = np.where(np.abs(y) < step / 2, np.minimum(np.maximum(y * y, 2.0**-1000), v), v)  # the square of 1e-170 is 0, its error is not
    return np.where(y == 0, 0.0, v)


def sum_grid(a: Float, b: Float, fmt: Format) -> Float:
    """Grid of a + b for two numbers of the format: the finer of their steps (the lowest set bits would carry, and mislead)."""
    return np.minimum(ulp(a, fmt), ulp(b, fmt))


def product_grid(a: Float, b: Float) -> Float:
    """Grid of a * b: the product of the lowest set bits (a factor of 1 or 2^k rounds nothing)."""
    return lowest_bit(a) * lowest_bit(b)


def settle(pre: Float, sigma2: Float, fmt: Format) -> tuple[Float, Float]:
    """Round an *interior* value that is known up to noise; what is used next, and the variance that is left.

    Where the nearest boundary is far, the rounding is decided and nothing is left.  Where it is near, the result may be one step away: the
    variance of a fair coin, ulp^2 / 4.  Where the noise is as large as the step itself, the rounding is one more uniform error.

    Parameters
    ----------
    pre, sigma2 : array
        Value before the rounding and its variance.
    fmt : Format
    """
    step = ulp(pre, fmt)
    rounded = to_format(pre, fmt)
    sigma = np.sqrt(sigma2)
    noisy = sigma > step / 4
    near = step / 2 - np.abs(rounded - pre) < CERTAIN * sigma
    left = np.where(near, step * step / 4, 0.0)
    return np.where(noisy, pre, rounded), np.where(noisy, sigma2 + step * step / 12, left)


def interval(captured: Float, pre: Float, sigma: Float, fmt: Format) -> Float:
    """How far outside the captured value's rounding interval the replay lies, in standard deviations of what the replay does not know.

    A captured value c says that the value before its last rounding was within half a step of c.  0 if the replayed ``pre`` is in there too.

    Parameters
    ----------
    captured, pre, sigma : array
        Captured value, replay before its last rounding, standard deviation of the replay (0 where it is exact).
    fmt : Format
        The last rounding.

    Returns
    -------
    array
        Signed: positive if the captured value is larger in magnitude than the replay allows; +-inf where sigma is 0.

    Notes
    -----
    Below a power of two the step is half as long, so the interval is a quarter step on that side.
    """
    half = ulp(captured, fmt) / 2
    mantissa, exponent = np.frexp(np.abs(captured))
    inner = np.where((mantissa == 0.5) & (exponent > fmt.least), half / 2, half)
    excess = np.where(captured >= 0, captured - pre, pre - captured)
    outside = np.where(excess > 0, np.maximum(excess - inner, 0.0), np.minimum(excess + half, 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(outside == 0, 0.0, outside / sigma)


def fma32(a: Float, b: Float, c: Float) -> Float:
    """Float32 fused multiply-add of float32 numbers held in float64: a * b + c, rounded once.

    The product is exact in float64 (48 bits).  The sum is rounded to 53 bits and then to 24: wrong only if the first rounding lands exactly
    half way between two float32 numbers, which is looked for and put right.
    """
    product = a * b
    total = product + c
    halfway = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000  # the 29 bits that float32 drops are exactly one half
    if halfway.any():
        lost = np.where(np.abs(product) >= np.abs(c), (product - total) + c, (c - total) + product)  # exact: Dekker's fast two-sum
        total = np.where(halfway & (lost != 0), np.nextafter(total, np.where(lost > 0, np.inf, -np.inf)), total)
    return total.astype(np.float32).astype(np.float64)
