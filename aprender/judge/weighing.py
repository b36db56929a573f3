"""Two tensors that should hold the same weights: are they the same, did rounding to a coarser format make the difference, or what did?

Owns the comparison of one pair as plain data: the decision whether rounding explains what a pass over both (``judge.tally``) found
(:func:`explained`), and the search for what else would (:func:`compare`): a transposition, rows or columns in another order, a constant
factor, another tensor.  Each is verified by a whole pass, never by shape or likeness alone.  Refuses to call a difference rounding because
it is small: every value must lie in its cell (``judge.cells``), and few differences among many equal values are no rounding at all.  Called
by ``aprender.weights``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprender.judge.cells import Tensor, paired
from aprender.judge.tally import A_TO_B, B_TO_A, BOTH, PIECE, Index, Tally, Tell, View, possible, weigh

LOOSE = 0.06
"""Share of values that an importance matrix may leave outside their cells; measured 0.026."""

LARGEST_NOISE = 1.5
"""Root mean square of the difference over that of a uniform error of one step; measured at most 1.3 (uniform data in MXFP4)."""

LARGEST_LAG = 0.1
"""Correlation of the difference with the value beside it, on top of six standard deviations; measured at most 0.06."""

DENSE = 0.5
"""Rounding touches nearly every value of a tensor that was finer; fewer than this share is another thing, see :func:`_plausible`."""

FEATURES = 16
"""Random sums that stand for a row: enough to tell rows apart at 2 bits a weight."""

MATCHES = 1 << 31
"""Largest product of rows to place and rows to place them at."""

IDENTICAL, EQUAL, ROUNDED = "identical bytes", "identical values", "re-quantised"
TURNED, ROWS, COLUMNS, COPIED = "transposed", "rows permuted", "columns permuted", "rows copied"
SWAPPED, SCALED, DIFFERENT = "swapped", "scaled", "different"
SHAPE, UNREAD = "shape", "unread"
SAME = (IDENTICAL, EQUAL)
FLOAT = 2.0**-23
EXPLAINED = (*SAME, ROUNDED)


# ---- does rounding explain it? ---------------------------------------------------------------------------------------------------------


def noise(tally: Tally) -> float | None:
    """Root mean square of the difference, in that of a uniform error of one step: near 1 for rounding; None where nothing has steps."""
    return math.sqrt(12 * tally.dd / tally.step2) if tally.step2 else None


def lag(tally: Tally) -> float | None:
    """Correlation of the difference with the value beside it; rounding leaves none."""
    below = math.sqrt(tally.lag[1] * tally.lag[2])
    return tally.lag[0] / below if below else None


def explained(tally: Tally, a: Tensor, b: Tensor) -> int | None:
    """Which rounding makes the whole difference: `A_TO_B`, `B_TO_A` or `BOTH`; None if no rounding does."""
    if tally.unlike:
        return None
    strong = lag(tally)
    if strong is not None and abs(strong) > LARGEST_LAG + 6 / math.sqrt(tally.n):
        return None
    for kind in possible(a, b):
        if not tally.outside[kind] and tally.loose[kind] <= LOOSE * tally.n and _plausible(tally, kind):
            size = noise(tally)
            return kind if size is None or size <= LARGEST_NOISE * (2 if tally.loose[kind] else 1) else None
    return None


def _plausible(tally: Tally, kind: int) -> bool:
    """Whether so few differences can be rounding.

    A tensor that is finer throughout loses something nearly everywhere.  If most values agree, then the original holds numbers that the
    other format has too, and those that it lost must be no longer than those that it kept: they were too small, not too fine.
    """
    if tally.changed >= DENSE * tally.filled:
        return True
    return kind != BOTH and tally.bits[1 + kind] <= tally.bits[0]


# ---- what else could it be? ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """The result for one pair.

    Attributes
    ----------
    state : str
        One of the constants above.
    tally : Tally or None
        Of the pass that decided; None where values cannot be compared.
    text : str
        What it is, in words; empty where the state says all.
    kind : int or None
        Direction of the rounding, if there is one.
    alpha : float or None
        B is A times this.
    other : str or None
        The tensor of A that B holds instead.
    first : tuple of int or None
        Row and column of the first value that nothing explains.
    count : int
        How many there are.
    """

    state: str
    tally: Tally | None = None
    text: str = ""
    kind: int | None = None
    alpha: float | None = None
    other: str | None = None
    first: tuple[int, int] | None = None
    count: int = 0


def compare(
    a: Tensor,
    b: Tensor,
    *,
    heads: Iterable[int] = (),
    others: Callable[[], Iterable[tuple[str, Tensor]]] = lambda: (),
    tell: Tell = lambda share: None,
) -> Found:
    """Compare two tensors and say what the difference is.

    Parameters
    ----------
    a, b : Tensor
        B is described as a change of A.
    heads : iterable of int, optional
        Sizes of heads for which an interleaving of rows is tried.
    others : callable, optional
        (name, tensor) of A's other tensors, wanted only if B's values are not A's.
    tell : callable, optional
        Told the share done, 0..1.
    """
    if not (a.readable and b.readable):
        return _unread(a, b)
    if _bytes_equal(a, b):
        return Found(IDENTICAL, weigh(View(a), View(a), tell))
    if a.count and (a.rows, a.cols) == (b.rows, b.cols):
        found = _judged(View(a), View(b), weigh(View(a), View(b), tell))
        if found.state in EXPLAINED:
            return found
        books = sorted({side.name for side in (a, b) if not side.celled})
        if books:
            return replace(found, text=f"{' and '.join(books)} stores points of a codebook: whether rounding explains this cannot be told")
        return _searched(a, b, found, tuple(heads), others)
    if a.shape == b.shape:
        return Found(EQUAL, Tally())
    if (a.rows, a.cols) == (b.cols, b.rows) and (turned := _verified(View(a, turned=True), View(b))):
        return replace(turned, state=TURNED, text=_and("B's is A's transposed", turned))
    return Found(SHAPE, text=f"shapes {list(a.shape)} and {list(b.shape)}")


def _unread(a: Tensor, b: Tensor) -> Found:
    """Formats that have no decoder: their bytes can be equal, and that is all."""
    if _bytes_equal(a, b):
        return Found(IDENTICAL)
    names = " and ".join(sorted({side.name for side in (a, b) if not side.readable}))
    return Found(UNREAD, text=f"{names} cannot be read, and the bytes are not equal")


def _bytes_equal(a: Tensor, b: Tensor) -> bool:
    if (a.name, a.shape, a.pairs, a.data.size) != (b.name, b.shape, b.pairs, b.data.size):
        return False
    return all(np.array_equal(a.data[at : at + (PIECE << 4)], b.data[at : at + (PIECE << 4)]) for at in range(0, a.data.size, PIECE << 4))


def _judged(a: View, b: View, tally: Tally) -> Found:
    """State of a pass: equal, explained by rounding, or different with the place that is hardest to explain."""
    if tally.differing == tally.zero_signs:
        return Found(EQUAL, tally)
    kind = explained(tally, a.tensor, b.tensor)
    if kind is not None:
        return Found(ROUNDED, tally, kind=kind)
    best = min(possible(a.tensor, b.tensor), key=lambda k: (tally.outside[k], tally.loose[k]), default=None)
    if best is not None and tally.outside[best]:
        return Found(DIFFERENT, tally, kind=best, first=tally.first[f"outside {best}"], count=tally.outside[best])
    if best is not None and tally.loose[best] > LOOSE * tally.n:
        return Found(DIFFERENT, tally, kind=best, first=tally.first[f"loose {best}"], count=tally.loose[best])
    return Found(DIFFERENT, tally, kind=best, first=tally.first["differing"], count=tally.differing - tally.zero_signs)


def _and(text: str, found: Found) -> str:
    return text + (", re-quantised" if found.state == ROUNDED else "")


def _verified(a: View, b: View) -> Found | None:
    """The result of a whole pass, if the two are alike on a sample and the pass explains every value."""
    if a.shape != b.shape or not _alike(a, b):
        return None
    found = _judged(a, b, weigh(a, b))
    return found if found.state in EXPLAINED else None


def _alike(a: View, b: View) -> bool:
    """Whether a few rows correlate."""
    rows, cols = b.shape
    sample = np.unique(np.linspace(0, rows - 1, min(rows, 8 + 4096 // cols)).astype(np.intp))
    x, y = (np.nan_to_num(side.values(sample).astype(np.float64), posinf=0, neginf=0).ravel() for side in (a, b))
    size = np.linalg.norm(x) * np.linalg.norm(y)
    return bool(size > 0 and x @ y > 0.5 * size)


def _searched(a: Tensor, b: Tensor, plain: Found, heads: tuple[int, ...], others: Callable[[], Iterable[tuple[str, Tensor]]]) -> Found:
    """What else explains every value; `plain` if nothing does."""
    tally = plain.tally
    assert tally is not None
    outside = tally.rows[-1 if plain.kind is None else plain.kind]
    bad = np.flatnonzero(outside > b.cols / 8)
    found = _scaled(a, b, tally) if plain.count > b.rows / 8 else None
    if not found and (bad.size > b.rows / 8 or a.cols == 1):
        found = _reordered(a, b, heads) or _turned_square(a, b) or _elsewhere(b, others)
    if found:
        return found
    if bad.size:
        return _rows(a, b, bad) or _rows_of_a(a, b, bad) or (_columns(a, b) if bad.size > b.rows / 8 else None) or plain
    return plain


def _scaled(a: Tensor, b: Tensor, tally: Tally) -> Found | None:
    """B = alpha A: the roundest alpha that puts every value into its cell, looked for around the least-squares one."""
    if not tally.aa or tally.unlike or tally.ab * tally.ab < 0.5 * tally.aa * tally.bb:
        return None
    alpha = tally.ab / tally.aa
    low, high = _factors(a, b, alpha)
    alpha = next((round(alpha, digits) for digits in range(1, 12) if low <= round(alpha, digits) <= high), (low + high) / 2)
    if not low <= high or alpha in (0, 1):
        return None
    passed = weigh(View(a, factor=alpha), View(b))
    found = _judged(View(a, factor=alpha), View(b), passed)
    if found.state not in EXPLAINED and (a.coarse or b.coarse or passed.dd > (2 * FLOAT) ** 2 * passed.bb):
        return None
    return replace(found, state=SCALED, first=None, alpha=alpha, text=f"B's is A's times {alpha:.7g}")


def _factors(a: Tensor, b: Tensor, about: float) -> tuple[float, float]:
    """The range of factors that keep every value of A in B's cell (each with its own cell, if it has one)."""
    low, high = -math.inf, math.inf
    for piece in b.pieces(PIECE):
        left, right = a.cells(piece).scaled(math.copysign(1, about)), b.cells(piece)
        negative = right.upper < 0
        ends = [np.where(negative, -y, x) for x, y in ((left.lower, left.upper), (left.upper, left.lower))]
        wanted = [np.where(negative, -y, x) for x, y in ((right.lower, right.upper), (right.upper, right.lower))]
        sure = (ends[0] > 0) & (wanted[0] > 0) & np.isfinite(ends[1]) & np.isfinite(wanted[1])
        if sure.any():
            low = max(low, float((wanted[0][sure] / ends[1][sure]).max()) * (1 - FLOAT))
            high = min(high, float((wanted[1][sure] / ends[0][sure]).min()) * (1 + FLOAT))
    return (low, high) if about > 0 else (-high, -low)


def _reordered(a: Tensor, b: Tensor, heads: tuple[int, ...]) -> Found | None:
    """Rows of heads interleaved where no container declares it, or not where one does."""
    for head in heads:
        if head < 2 or head % 2 or a.rows % head:
            continue
        rows = np.arange(a.rows)
        there = paired(rows, head)
        back = np.argsort(there)
        for order, text in ((there, "B lacks the interleaving of halves"), (back, "B has an interleaving of halves")):
            found = _verified(View(a, rows=order), View(b))
            if found:
                why = (
                    f"{text} in heads of {head} rows that {'its container declares' if order is there and b.pairs else 'nothing declares'}"
                )
                return replace(found, state=ROWS, text=_and(why, found))
    return None


def _turned_square(a: Tensor, b: Tensor) -> Found | None:
    found = _verified(View(a, turned=True), View(b)) if a.rows == a.cols and a.rows > 1 else None
    return replace(found, state=TURNED, text=_and("B's is A's transposed", found)) if found else None


def _elsewhere(b: Tensor, others: Callable[[], Iterable[tuple[str, Tensor]]]) -> Found | None:
    """B's values are those of another tensor of A."""
    for name, other in others():
        if other.readable and (other.rows, other.cols) == (b.rows, b.cols):
            found = _verified(View(other), View(b))
            if found:
                return replace(found, state=SWAPPED, other=name, text=_and(f"B's is A's {name}", found))
    return None


# ---- rows and columns by what is in them -----------------------------------------------------------------------------------------------


def _features(tensor: Tensor, along_rows: bool) -> NDArray[np.float64]:
    """A few random sums over each row, or each column."""
    random = np.random.default_rng(7)
    weights = random.standard_normal((tensor.cols if along_rows else tensor.rows, FEATURES))
    made = np.zeros((tensor.rows if along_rows else tensor.cols, FEATURES))
    for piece in tensor.pieces(PIECE):
        values = np.nan_to_num(tensor.values(piece).astype(np.float64), posinf=0, neginf=0)
        if along_rows:
            made[piece] = values @ weights
        else:
            made += values.T @ weights[piece]
    return made


def _nearest(wanted: NDArray[np.float64], known: NDArray[np.float64]) -> Index:
    """For each wanted feature the place of the nearest known one."""
    squares = np.square(known).sum(1)
    found = np.empty(len(wanted), np.intp)
    height = max(1, (PIECE * 8) // max(len(known), 1))
    for at in range(0, len(wanted), height):
        part = wanted[at : at + height]
        found[at : at + height] = (squares - 2 * (part @ known.T)).argmin(1)
    return found


def _rows(a: Tensor, b: Tensor, bad: Index) -> Found | None:
    """Rows of B that are other rows of A."""
    if bad.size * a.rows > MATCHES:
        return None
    order = np.arange(a.rows)
    if a.cols == 1:
        order[np.argsort(b.values(slice(0, b.rows))[:, 0], kind="stable")] = np.argsort(a.values(slice(0, a.rows))[:, 0], kind="stable")
    else:
        order[bad] = _nearest(_features(b, True)[bad], _features(a, True))
    moved = _moved(order)
    found = _verified(View(a, rows=order), View(b)) if moved.size else None
    if not found:
        return None
    first = int(moved[0])
    if np.unique(order).size == order.size:
        return replace(found, state=ROWS, first=(first, 0), count=moved.size, text=_and(_in_words(order), found))
    return replace(
        found, state=COPIED, first=(first, 0), count=moved.size,
        text=_and(f"B's row {first} is A's row {order[first]}" + (f", and {moved.size - 1} more" if moved.size > 1 else ""), found),
    )  # fmt: skip


def _rows_of_a(a: Tensor, b: Tensor, bad: Index) -> Found | None:
    """Rows of A that are other rows of B: the copy lies on the other side."""
    found = _rows(b, a, bad)
    if not found or found.tally is None:
        return None
    text = found.text.translate(str.maketrans("AB", "BA")) if found.state == COPIED else found.text
    return replace(found, text=text, kind=None if found.kind is None else (B_TO_A, A_TO_B, BOTH)[found.kind], tally=_other_way(found.tally))


def _other_way(tally: Tally) -> Tally:
    """The same counts with the sides exchanged."""
    swap = {name: getattr(tally, name)[::-1] for name in ("nan", "inf")}
    return replace(tally, **swap, aa=tally.bb, bb=tally.aa)


def _moved(order: Index) -> Index:
    return np.flatnonzero(order != np.arange(order.size))


def _in_words(order: Index, what: str = "row") -> str:
    """A permutation as heads that moved, if it is one of whole heads."""
    moved = _moved(order)
    breaks = np.flatnonzero(np.diff(order) != 1) + 1
    head = int(np.gcd.reduce(np.append(breaks, order.size)))
    if head > 1 and not (order[::head] % head).any():
        heads = order[::head] // head
        return (
            f"{_moved(heads).size} of {heads.size} heads of {head} {what}s moved, B's {_moved(heads)[0]} is A's {heads[_moved(heads)[0]]}"
        )
    return f"{moved.size} of {order.size} {what}s moved, B's {moved[0]} is A's {order[moved[0]]}"


def _columns(a: Tensor, b: Tensor) -> Found | None:
    """Columns of B that are other columns of A."""
    if a.cols < 2 or a.cols**2 > MATCHES:
        return None
    order = _nearest(_features(b, False), _features(a, False))
    if not _moved(order).size or np.unique(order).size < order.size:
        return None
    found = _verified(View(a, columns=order), View(b))
    return replace(found, state=COLUMNS, first=(0, int(_moved(order)[0])), text=_and(_in_words(order, "column"), found)) if found else None


# ---- one value -------------------------------------------------------------------------------------------------------------------------


def place(a: Tensor, b: Tensor, found: Found) -> Mapping[str, Any] | None:
    """Where the first unexplained value is: row and column in Hugging Face order, block and element of the rounded side, both values."""
    if found.first is None:
        return None
    row, column = found.first
    side = a if found.kind == B_TO_A else b
    where = np.array([row])
    steps = float(side.cells(where).step[0, column])
    x, y = float(a.values(where)[0, column]), float(b.values(where)[0, column])
    return {
        "row": row, "column": column, "block": column // side.block, "element": column % side.block,
        "a": _number(x), "b": _number(y), "steps": _number(abs(x - y) / steps) if steps else None,
    }  # fmt: skip


def _number(value: float) -> float | str:
    """A number that JSON has, or the name of one that it has not."""
    return value if math.isfinite(value) else str(value)
