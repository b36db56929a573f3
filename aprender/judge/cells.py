"""What a stored number may have been before it was rounded: for every value of a tensor the interval ("cell") of numbers that its format's
encoder turns into it.

Owns how the cells are found, which is by asking the decoder and by no table of formats: in a format with blocks, a bit that moves one
value alone belongs to its code and a bit that moves many to a scale.  So the code bits of a block are known, and every block is decoded
twice more, with all codes at their least and at their greatest.  That gives each value the range and the spacing that *its own stored
scales* allow.  A format without blocks has few enough codes to decode them all.  Refuses formats that cannot be read.  Called by
``judge.tally`` and ``judge.weighing``.

A cell is half a step to each side, and more only where encoders are known to go further (figures: llama.cpp's own encoders on eight kinds
of data, normal, heavy-tailed, uniform, shifted, and on trained weights):

* a scale is rounded to a half after the codes were picked, which moves a value by 2^-11 of itself (twice that where sub-scales are rounded
  too, and 2.5 times where a minimum is);
* a value beyond the range of its group gets the end code: up to half of the block's largest step further out, plus what rounding the
  group's minimum takes away;
* a group whose scale became zero: half of the block's largest step;
* an importance matrix (only if declared) buys accuracy elsewhere with outliers: up to `REACH` steps, for at most `LOOSE` of the values.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprender import _core

Bytes = NDArray[np.uint8]
Double = NDArray[np.float64]
Where = slice | NDArray[np.intp]

HALF = 2.0**-11
"""Relative error of a number stored as a half."""

TINY = 2.0**-25
"""Half of the smallest positive half: the error of a scale that is nearly zero."""

CLIP = 0.56
"""How far beyond its range, in the largest step of its block, an encoder leaves a value; measured 0.50."""

REACH = (8.0, 20.0)
"""With an importance matrix: steps beyond the cell inside the range (one scale per block; measured 6), and beyond its end (measured 16)."""

SUBSCALES = (32, 128)
"""Sub-scales: the largest of a format that picks codes before it rounds the scale, and the largest of all."""

_ROWS: dict[str, Any] = {row[0]: row for row in _core.FORMATS}


@dataclass(frozen=True)
class Cells:
    """Intervals of a piece of a tensor, float64, all of its shape.

    Attributes
    ----------
    lower, upper : ndarray
        What lies between, ends included, may have become the stored value.
    step : ndarray
        Spacing of the format there; 0 where the number is its own cell.
    near, far : ndarray
        The same ends where an importance matrix is declared; else `lower` and `upper` themselves.
    """

    lower: Double
    upper: Double
    step: Double
    near: Double
    far: Double

    def map(self, change: Any) -> Cells:
        """The same function applied to each array."""
        return Cells(*(change(part) for part in (self.lower, self.upper, self.step, self.near, self.far)))

    def scaled(self, factor: float) -> Cells:
        """Cells of the values times a factor."""
        ends = [part * factor for part in (self.lower, self.upper, self.near, self.far)]
        low, high, near, far = ends if factor >= 0 else (ends[1], ends[0], ends[3], ends[2])
        return Cells(low, high, self.step * abs(factor), near, far)


# ---- formats with blocks ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """What the decoder of a format with blocks gives away.

    Attributes
    ----------
    mask : uint8 array [bytes of a block]
        The bits that are codes.
    least, greatest : uint8 array [bytes of a block]
        Code bits that give every value the first and the last of its levels.
    levels : ndarray
        What the codes mean, ascending, from 0 (`least`) to 1 (`greatest`).
    units : int
        Smallest scale that makes all levels whole numbers: the range in the units of the stored scale.
    group : int
        Values side by side that share scale and minimum.
    single : bool
        One scale for the whole block.
    shifted : bool
        Groups have a minimum of their own, besides the scale.
    minima : int
        Into how many steps the minima of a block are rounded; 0 if they are not.
    """

    mask: Bytes
    least: Bytes
    greatest: Bytes
    levels: Double
    units: int
    group: int
    single: bool
    shifted: bool
    minima: int

    @property
    def doubt(self) -> float:
        """By how many roundings to a half the number that a code was picked for may differ from its stored scale times the code."""
        return 1.05 if self.even and not (self.single and self.shifted) else 2.0

    @property
    def even(self) -> bool:
        """Whether the levels are evenly spaced."""
        return self.units == self.levels.size - 1


def _read(name: str, data: Bytes, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """What bytes mean in a format."""
    return _core.dequantize(name, np.ascontiguousarray(data).reshape(-1).data, shape)


def _decode(name: str, blocks: Bytes) -> Double:
    """Blocks [n, bytes] to values [n, values of a block]."""
    shape = (blocks.shape[0], _ROWS[name][3])
    return _read(name, blocks, shape).astype(np.float64)


def _code_bits(name: str, random: np.random.Generator) -> NDArray[np.intp]:
    """The bits that belong to codes, [values of a block, bits of a code]: flipping one never moves any other value."""
    size = _ROWS[name][4]
    flips = np.packbits(np.eye(size * 8, dtype=np.uint8), axis=1, bitorder="little")
    most, owner, seen = np.zeros(size * 8, int), np.full(size * 8, -1), 0
    while seen < 12:
        base = random.integers(0, 256, (1, size), np.uint8)
        values = _decode(name, base)
        if not np.isfinite(values).all() or not values.any():
            continue
        seen += 1
        moved = _decode(name, base ^ flips) != values
        most = np.maximum(most, moved.sum(1))
        alone = moved.sum(1) == 1
        owner[alone] = moved[alone].argmax(1)
    found = [np.flatnonzero((most == 1) & (owner == value)) for value in range(_ROWS[name][3])]
    return np.array(found if len({len(one) for one in found}) == 1 else np.empty((len(found), 0)), np.intp)


CODES = 0.75
"""Least share of a block's bits that are codes of single values: 0.76 (Q2_K) and more where each value has its own; 0.3 (IQ3_S) and less
where several share a point of a codebook."""


@functools.cache
def separable(name: str) -> bool:
    """Whether each value of a block has bits of its own, so that a cell can be told for it."""
    return bool(_code_bits(name, np.random.default_rng(0)).size >= CODES * 8 * _ROWS[name][4])


@functools.cache
def layout(name: str) -> Layout:
    """The layout of a format with blocks whose values are separable, found once."""
    random = np.random.default_rng(0)
    bits, size = _code_bits(name, random), _ROWS[name][4]
    width = bits.shape[1]
    patterns = np.zeros((1 << width, size * 8), np.uint8)
    for code in range(1 << width):
        patterns[code, bits[:, [bit for bit in range(width) if code >> bit & 1]].reshape(-1)] = 1
    patterns = np.packbits(patterns, axis=1, bitorder="little")
    mask, clearest, table, offsets, lows, breaks = patterns[-1], 0.0, np.empty((0, 0)), [], [], [bits.shape[0]]
    for _ in range(400):  # scales at random: the levels are read where the minimum hides least of them
        base = random.integers(0, 256, size, np.uint8) & ~mask
        values = _decode(name, base | patterns)
        spread = values.max(0) - values.min(0)
        if not (np.isfinite(values).all() and spread.all() and 1e-20 < np.abs(values).max() < 1e20):
            continue
        breaks.extend(np.flatnonzero((np.diff(values[0]) != 0) | (np.diff(values[-1]) != 0)) + 1)
        lows.append(values[0])
        offsets.append(values[0] / (values[-1] - values[0] + (values[-1] == values[0])))
        clear = float((spread / np.abs(values).max(0)).min())
        if clear > clearest:
            clearest, table = clear, values
    first, last = sorted((int(table[:, 0].argmin()), int(table[:, 0].argmax())))  # code 0 is the minimum where there is one
    levels = np.unique(np.round(np.median((table - table[first]) / (table[last] - table[first]), axis=1), 6))
    single, shifted = len(breaks) == 1, bool(np.ptp(np.array(offsets)) > 1e-2)
    minima = max(_whole(low / np.abs(low).max(), 1e-5) for low in lows if low.any()) if shifted and not single else 0
    return Layout(
        mask, patterns[first], patterns[last], levels, _whole(levels, 2e-6), int(np.gcd.reduce(breaks)), single, shifted, minima
    )  # fmt: skip


def _whole(numbers: Double, error: float) -> int:
    """The smallest factor that makes whole numbers of these, each known to within `error`."""
    return next((n for n in range(1, 1 << 12) if np.abs(numbers * n - np.round(numbers * n)).max() < error * n), 1 << 12)


def _block_cells(name: str, blocks: Bytes, values: Double, decode: Any, wide: bool, loose: bool) -> Cells:
    """Cells of whole blocks; `decode` turns blocks into values of the shape of `values`, `wide` says that rows are whole blocks."""
    form = layout(name)
    group, block = (form.group, _ROWS[name][3]) if wide else (1, _ROWS[name][3])
    low = decode(blocks & ~form.mask | form.least)[:, ::group].astype(np.float64)
    span = decode(blocks & ~form.mask | form.greatest)[:, ::group] - low
    seen = (values.shape[0], low.shape[1], group)
    values, low, span = values.reshape(seen), low[:, :, None], span[:, :, None]
    flat, gaps, last = span == 0, np.diff(form.levels), form.levels.size - 1
    with np.errstate(all="ignore"):
        place = (values - low) / np.where(flat, np.inf, span)
        code = _codes(form, place)
    slack, clip, largest = _room(form, low, span, block // group if wide else block)
    edges = np.concatenate([[-gaps[0] / 2], (form.levels[1:] + form.levels[:-1]) / 2, [1 + gaps[-1] / 2]])
    first, second = edges[code] * span + low, edges[code + 1] * span + low
    outward = np.sign(span) * clip
    ends = code == 0, code == last
    np.subtract(first, outward, out=first, where=ends[0])
    np.add(second, outward, out=second, where=ends[1])
    step = np.abs(span) * (edges[1:] - edges[:-1])[code]
    slack = slack + (np.abs(values - low if form.shifted else values) + step) * (HALF * form.doubt)
    lower, upper = np.minimum(first, second) - slack, np.maximum(first, second) + slack
    if flat.any():
        lower, upper, step = np.where(flat, values - clip, lower), np.where(flat, values + clip, upper), np.where(flat, largest, step)
    if not loose:
        lower, upper, step = (part.reshape(seen[0], -1) for part in (lower, upper, step))
        return Cells(lower, upper, step, lower, upper)
    inside = REACH[0] * step if form.single else np.zeros_like(step)
    room = [np.where(end, REACH[1] * largest, inside) for end in ends]
    below, above = np.where(span >= 0, room[0], room[1]), np.where(span >= 0, room[1], room[0])
    return Cells(*(part.reshape(seen[0], -1) for part in (lower, upper, step, lower - below, upper + above)))


def _codes(form: Layout, place: Double) -> NDArray[np.intp]:
    """Numbers of the levels nearest to places in 0..1."""
    if form.even:
        near: NDArray[np.intp] = np.clip(np.rint(place * form.units), 0, form.units).astype(np.intp)
        return near
    return np.searchsorted((form.levels[1:] + form.levels[:-1]) / 2, place)


def _room(form: Layout, low: Double, span: Double, block: int) -> tuple[Double, Double, Double]:
    """What encoders need besides half a step: everywhere, and beyond the range; and the largest step of the block."""
    size = np.maximum(np.abs(low), np.abs(low + span))
    early = SUBSCALES[0] if not form.single and not form.even else 1  # the code is picked before any scale is rounded
    nothing = TINY * form.units * (8 if form.single else SUBSCALES[1])
    slack = (2.5 * HALF * np.abs(low) if form.shifted else 0) + TINY * form.units * early
    slack = slack + np.where(_over_blocks(size, block) < 4 * nothing, nothing, 0)
    largest = _over_blocks(np.abs(span), block) * np.diff(form.levels).max()
    clip = CLIP * largest + (1.1 / (2 * form.minima) * _over_blocks(np.abs(low), block) if form.minima else 0) + nothing
    return slack, clip, largest


def _over_blocks(sizes: Double, block: int) -> Double:
    """The largest of each block [rows, groups, 1], in the place of every group of it; a last block may be short."""
    rows, groups, _ = sizes.shape
    whole = sizes[:, :, 0]
    if groups % block:
        whole = np.pad(whole, ((0, 0), (0, -groups % block)))
    most = whole.reshape(rows, -1, block).max(2)
    return np.repeat(most, block, axis=1)[:, :groups, None]


# ---- formats without blocks ------------------------------------------------------------------------------------------------------------


def _code_table(values: Double, slack: float) -> tuple[Double, Double, Double]:
    """Lower end, upper end and step for every code of a format, given what the codes mean."""
    finite = np.isfinite(values)
    known = np.unique(values[finite])
    gaps = np.diff(known)
    below, above = np.append(gaps[:1], gaps), np.append(gaps, gaps[-1:])
    at = np.searchsorted(known, np.where(finite, values, known[0]))
    step = np.where(finite, (below[at] + above[at]) / 2, 0)
    with np.errstate(invalid="ignore"):
        lower = np.where(finite, values - below[at] / 2 - slack * step, values)
        upper = np.where(finite, values + above[at] / 2 + slack * step, values)
    return lower, upper, step


@functools.cache
def _plain_table(name: str) -> tuple[Double, Double, Double]:
    """Of a format whose values stand alone, in one or two bytes."""
    size = _ROWS[name][4]
    codes = np.arange(256**size, dtype=f"<u{size}").view(np.uint8)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return _code_table(_read(name, codes, (256**size,)).astype(np.float64), 0)


# ---- tensors ---------------------------------------------------------------------------------------------------------------------------


class Tensor:
    """The bytes of a tensor as rows that are decoded when they are asked for.

    Parameters
    ----------
    name : str
        Row of FORMATS.
    data : uint8 array
    shape : tuple of int
        Outermost first.  More than two dimensions count as rows; a vector of single numbers is a column.
    pairs : int, optional
        Size of a head whose rows the container interleaved (2i, 2i + 1 for halves i, i + h/2); rows are given in halves.
    importance : bool, optional
        The file declares that an importance matrix guided its encoder.
    """

    def __init__(self, name: str, data: Bytes, shape: tuple[int, ...], *, pairs: int = 0, importance: bool = False) -> None:
        _, _, _, self.block, self.size, self.readable, _, self.packing, *_ = _ROWS[name]
        self.name, self.data, self.shape, self.pairs, self.importance = name, data, tuple(shape), pairs, importance
        column = len(self.shape) == 1 and self.block == 1
        self.cols = 1 if column or not self.shape else self.shape[-1]
        self.rows = int(np.prod(self.shape, dtype=np.int64)) // self.cols if self.cols else 0

    @property
    def count(self) -> int:
        """Values in all."""
        return self.rows * self.cols

    @property
    def coarse(self) -> bool:
        """Whether its values are rounded more than a float32 is."""
        return bool(self.block > 1 or self.size <= 2)

    @property
    def celled(self) -> bool:
        """Whether the cells of its values are known: not those of a codebook, of which several values share one code."""
        return self.block == 1 or separable(self.name)

    def pieces(self, values: int) -> Iterator[slice]:
        """Rows in pieces of about so many values, whole heads and whole blocks together."""
        unit = max(self.pairs, self.block if self.packing == _FLAT else 1, 1)
        rows = max(unit, values // max(self.cols, 1) // unit * unit)
        for first in range(0, self.rows, rows):
            yield slice(first, min(first + rows, self.rows))

    def _places(self, where: Where) -> Where:
        """Rows of the file for rows in halves."""
        if not self.pairs:
            return where
        rows = np.arange(where.start, where.stop) if isinstance(where, slice) else where
        return paired(rows, self.pairs)

    def _take(self, where: Where) -> tuple[Bytes, int, Any]:
        """The blocks of some rows [n, bytes], how many rows, and what decodes such blocks to [rows, columns]."""
        where = self._places(where)
        count = where.stop - where.start if isinstance(where, slice) else len(where)
        if self.packing == _FLAT:
            return self._take_flat(where, count)
        if self.packing == _WHOLE:
            codes = self.data[-self.count :].reshape(self.rows, self.cols)[where].reshape(-1, 1) if self.count else self.data[:0, None]
            head = self.data[: self.data.size - self.count]
            return codes, count, lambda part: _read(self.name, np.append(head, part), (count, self.cols))
        width = -(-self.cols // self.block) * self.size
        blocks = self.data.reshape(self.rows, width)[where].reshape(-1, self.size)
        shape = (count * self.cols,) if self.cols % self.block == 0 else (count, self.cols)

        def decode(part: Bytes) -> NDArray[np.float32]:
            return _read(self.name, part, shape).reshape(count, self.cols)

        return blocks, count, decode

    def _take_flat(self, where: Where, count: int) -> tuple[Bytes, int, Any]:
        """Blocks that run on over the ends of rows: those from the first row to the last one."""
        rows = np.arange(where.start, where.stop) if isinstance(where, slice) else where
        if not count or not self.cols:
            return self.data[:0].reshape(0, self.size), count, lambda part: np.zeros((count, self.cols), np.float32)
        first, end = int(rows.min()) * self.cols // self.block, -(-(int(rows.max()) + 1) * self.cols // self.block)
        blocks = self.data[first * self.size : end * self.size].reshape(-1, self.size)
        places = (rows * self.cols - first * self.block)[:, None] + np.arange(self.cols)
        return blocks, count, lambda part: _decode(self.name, part).reshape(-1)[places].astype(np.float32)

    def values(self, where: Where) -> NDArray[np.float32]:
        """Values of some rows, [rows, columns]."""
        blocks, _, decode = self._take(where)
        found: NDArray[np.float32] = decode(blocks)
        return found

    def cells(self, where: Where) -> Cells:
        """Cells of some rows, each array [rows, columns]."""
        blocks, count, decode = self._take(where)
        values = decode(blocks).astype(np.float64)
        if not self.coarse or not self.celled:
            return Cells(values, values, np.zeros_like(values), values, values)
        if self.block > 1:
            wide = self.packing != _FLAT and self.cols % self.block == 0
            return _block_cells(self.name, blocks, values, decode, wide, self.importance)
        if self.packing == _WHOLE:
            every = np.append(self.data[: self.data.size - self.count], np.arange(256, dtype=np.uint8))
            table = _code_table(_read(self.name, every, (256,)).astype(np.float64), 1e-4)
        else:
            table = _plain_table(self.name)
        codes = np.ascontiguousarray(blocks).view(f"<u{self.size}").reshape(count, self.cols)
        lower, upper, step = (part[codes] for part in table)
        return Cells(lower, upper, step, lower, upper)


_FLAT, _WHOLE = "FLAT", "WHOLE"


def paired(rows: NDArray[np.intp], head: int) -> NDArray[np.intp]:
    """Where a container that interleaves the halves of each head has these rows."""
    at = rows % head
    half = head // 2
    found: NDArray[np.intp] = rows - at + np.where(at < half, 2 * at, 2 * (at - half) + 1)
    return found
