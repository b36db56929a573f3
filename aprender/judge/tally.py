"""One pass over two tensors, piece by piece: what differs, how far, and which values lie outside the cells of the other side.

Owns the ways to look at a tensor (:class:`View`) and the pass (:func:`weigh`), which fills a :class:`Tally`.  Refuses to say what a
difference means: that is ``judge.weighing``, which calls it.  Sums are float64 over finite values; NaN and infinities are counted apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprender.judge.cells import Cells, Tensor

Index = NDArray[np.intp]
Tell = Callable[[float], None]

PIECE = 1 << 16
"""Values compared at once."""


# ---- one way to look at a tensor -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """A tensor with its rows or columns in another order, transposed, or times a constant."""

    tensor: Tensor
    rows: Index | None = None
    columns: Index | None = None
    turned: bool = False
    factor: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns as seen."""
        shape = (self.tensor.rows, self.tensor.cols)
        return shape[::-1] if self.turned else shape

    def values(self, where: slice | Index) -> NDArray[Any]:
        """Values of some rows, float32."""
        found: NDArray[Any] = self._seen(self.tensor.values, where, lambda part, change: change(part))
        return found if self.factor == 1 else (found.astype(np.float64) * self.factor).astype(np.float32)

    def cells(self, where: slice | Index) -> Cells:
        """Cells of some rows."""
        found: Cells = self._seen(self.tensor.cells, where, lambda cells, change: cells.map(change))
        return found if self.factor == 1 else found.scaled(self.factor)

    def _seen(self, read: Callable[[Any], Any], where: slice | Index, change: Callable[[Any, Any], Any]) -> Any:
        if self.turned:
            strips = [change(read(piece), lambda part: part[:, where].T) for piece in self.tensor.pieces(8 * PIECE)]
            if isinstance(strips[0], Cells):
                fields = ("lower", "upper", "step", "near", "far")
                return Cells(*(np.concatenate([getattr(strip, name) for strip in strips], axis=1) for name in fields))
            return np.concatenate(strips, axis=1)
        found = read(where if self.rows is None else self.rows[where])
        return found if self.columns is None else change(found, lambda part: part[:, self.columns])


# ---- one pass over both ----------------------------------------------------------------------------------------------------------------

A_TO_B, B_TO_A, BOTH = range(3)
"""B is A rounded; A is B rounded; both are the same unseen numbers rounded."""


@dataclass
class Tally:
    """What a pass over two tensors counts.

    Attributes
    ----------
    n, differing, zero_signs : int
        Values; those whose bits differ (a NaN equals a NaN); those of them that are 0 against -0.
    nan, inf : list of int
        In A and in B.
    unlike : int
        Places where one side is not finite and the other something else.
    aa, bb, ab, dd, largest : float
        Sums of squares, of products, of squared differences and the largest difference, over places where both are finite.
    outside, loose : list of int
        For `A_TO_B`, `B_TO_A`, `BOTH`: values outside their cells, and those that an importance matrix excuses.
    rows : list of ndarray
        For each of them, values outside in each row; then those that differ.
    first : dict
        (kind) to (row, column) of the first difference and of the first value outside.
    step2, lag : float, list of float
        Sum of squared steps; sums for the correlation of the difference with its neighbour.
    filled, changed, bits : int, int, list of int
        Places that are not 0 on both sides, those of them that differ, and the longest significand in bits: of equal values, and of A and B
        where they differ.
    """

    n: int = 0
    differing: int = 0
    zero_signs: int = 0
    nan: list[int] = field(default_factory=lambda: [0, 0])
    inf: list[int] = field(default_factory=lambda: [0, 0])
    unlike: int = 0
    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0
    dd: float = 0.0
    largest: float = 0.0
    outside: list[int] = field(default_factory=lambda: [0, 0, 0])
    loose: list[int] = field(default_factory=lambda: [0, 0, 0])
    rows: list[Index] = field(default_factory=list)
    first: dict[str, tuple[int, int]] = field(default_factory=dict)
    step2: float = 0.0
    lag: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    filled: int = 0
    changed: int = 0
    bits: list[int] = field(default_factory=lambda: [0, 0, 0])


def weigh(a: View, b: View, tell: Tell = lambda share: None) -> Tally:
    """Count everything in one pass, piece by piece of rows."""
    rows, cols = b.shape
    tally = Tally(rows=[np.zeros(rows, np.intp) for _ in range(4)])
    height = max(1, (8 * PIECE if a.turned or b.turned else PIECE) // max(cols, 1))
    for first in range(0, rows if cols else 0, height):
        where = slice(first, min(first + height, rows))
        x, y = a.values(where), b.values(where)
        _count(tally, x, y, where.start)
        same = np.array_equal(x, y)
        if not same:
            _look(tally, a, b, where, x.astype(np.float64), y.astype(np.float64))
        tell(where.stop / rows)
    return tally


def _dot(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Sum of products; not BLAS, whose threads would fight over a busy machine for a little sum."""
    return float(np.einsum("ij,ij->", x, y))


def _count(tally: Tally, x: NDArray[Any], y: NDArray[Any], start: int) -> None:
    """What needs no cells: bits, NaN and infinities, sums."""
    bits = [np.ascontiguousarray(part).view(np.uint32) for part in (x, y)]
    differing = bits[0] != bits[1]
    finite = [np.isfinite(part) for part in (x, y)]
    tally.n += x.size
    for side, part in enumerate((x, y)):
        if not finite[side].all():
            nan = int(np.isnan(part).sum())
            tally.nan[side] += nan
            tally.inf[side] += part.size - int(finite[side].sum()) - nan
    u, v = x.astype(np.float64), y.astype(np.float64)
    if not (finite[0].all() and finite[1].all()):
        both = finite[0] & finite[1]
        differing &= ~(np.isnan(x) & np.isnan(y))
        tally.unlike += int((differing & ~both).sum())
        u, v = np.where(both, u, 0), np.where(both, v, 0)
    tally.aa += _dot(u, u)
    if not differing.any():
        tally.bb += _dot(v, v)
        tally.ab += _dot(u, v)
        _significands(tally, x, y, differing)
        return
    tally.differing += int(differing.sum())
    tally.rows[-1][start : start + len(x)] = differing.sum(1)
    tally.zero_signs += int((differing & (x == y)).sum())
    apart = u - v
    tally.bb += _dot(v, v)
    tally.ab += _dot(u, v)
    tally.dd += _dot(apart, apart)
    tally.largest = max(tally.largest, float(np.abs(apart).max()))
    _note(tally, "differing", differing & (x != y), start)
    _significands(tally, x, y, differing)


def _note(tally: Tally, what: str, places: NDArray[np.bool_], start: int) -> None:
    """Remember the first place, in the order of the rows."""
    if what not in tally.first and places.any():
        row, column = divmod(int(places.argmax()), places.shape[1])
        tally.first[what] = (start + row, column)


def _significands(tally: Tally, x: NDArray[Any], y: NDArray[Any], differing: NDArray[np.bool_]) -> None:
    """How many values there are to round, how many differ, and how long the significands of both kinds are."""
    filled = (x != 0) | (y != 0)
    tally.filled += int(filled.sum())
    tally.changed += int((filled & differing).sum())
    for place, part, chosen in ((0, x, filled & ~differing), (1, x, filled & differing), (2, y, filled & differing)):
        if tally.bits[place] < 24 and chosen.any():
            whole = (np.ascontiguousarray(part)[chosen].view(np.uint32) & np.uint32(0x7FFFFF)) | np.uint32(0x800000)
            last = int((whole & (~whole + np.uint32(1))).min())
            tally.bits[place] = max(tally.bits[place], 25 - last.bit_length())


def _look(tally: Tally, a: View, b: View, where: slice, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
    """Hold each value against the cell of the other one."""
    left, right = a.cells(where), b.cells(where)
    unequal, odd = x != y, None
    with np.errstate(invalid="ignore"):
        apart = x - y
    finite = np.isfinite(apart)
    if not finite.all():
        odd = unequal & ~finite & ~(np.isnan(x) & np.isnan(y))
        apart, y = np.where(finite, apart, 0), np.where(np.isfinite(y), y, 0)
        x = np.where(np.isfinite(x), x, 0)
        unequal &= finite
    for kind in possible(a.tensor, b.tensor):
        own, value, cells = (left, x, right) if kind == BOTH else (None, x, right) if kind == A_TO_B else (None, y, left)
        out, beyond = _beyond(own, value, cells, unequal)
        if odd is not None:
            out, beyond = out | odd, beyond | odd
        count = int(np.count_nonzero(out))
        if count:
            tally.outside[kind] += int(np.count_nonzero(beyond))
            tally.loose[kind] += int(np.count_nonzero(out & ~beyond))
            tally.rows[kind][where] += out.sum(1)
            _note(tally, f"outside {kind}", beyond, where.start)
            _note(tally, f"loose {kind}", out, where.start)
    tally.step2 += _dot(left.step, left.step) + _dot(right.step, right.step)
    if x.shape[1] > 1:
        parts = (_dot(apart[:, :-1], y[:, 1:]), _dot(apart[:, :-1], apart[:, :-1]), _dot(y[:, 1:], y[:, 1:]))
        tally.lag = [total + part for total, part in zip(tally.lag, parts, strict=True)]


def possible(a: Tensor, b: Tensor) -> list[int]:
    """The kinds of rounding that these formats allow."""
    return [kind for kind, rounded in ((A_TO_B, b.coarse), (B_TO_A, a.coarse), (BOTH, a.coarse and b.coarse)) if rounded]


def _beyond(
    own: Cells | None, x: NDArray[np.float64], cells: Cells, unequal: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which values (or their own cells) lie outside the cells of the other side, and which beyond what an importance matrix excuses too."""
    with np.errstate(invalid="ignore"):
        out = ((x if own is None else own.upper) < cells.lower) | ((x if own is None else own.lower) > cells.upper)
        out &= unequal
        if cells.near is cells.lower and (own is None or own.near is own.lower):
            return out, out
        beyond = ((x if own is None else own.far) < cells.near) | ((x if own is None else own.near) > cells.far)
        return out, beyond & unequal
