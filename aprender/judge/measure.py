"""One stage measured: how far the captured value is from its prediction, in what a correct engine leaves.

Owns the statistics (I, z, groups, row factors, bits, non-finite values), the two-stage test, and the power.  Refuses to know which stage it
is.  Called by ``judge.local`` with a captured array, its :class:`~aprender.judge.prediction.Prediction` and the run's gates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aprender.judge import sums
from aprender.judge.prediction import Prediction
from aprender.judge.rounding import CERTAIN, Float, U, interval, to_format, ulp
from aprender.judge.rule import SUSPICION, Gates
from aprender.judge.witness import Mask

IMPOSSIBLE = 1e9
"""What a deviation is reported as where none at all is allowed (a probability for a forbidden key, a copied value that changed)."""

FINEST = 2.0**-53
"""Smallest relative error that is spoken of: what float64 holds."""

ALIKE = 16
"""Float32 steps that rows of equal tokens may drift apart and still be added alike (a fresh rounding of each stage of a layer)."""

SAMPLE = 4096
"""Elements that are recomputed exactly when a group is suspicious: enough to tell 1.15 from 1 at 10 sigma."""

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """A set of elements: one row (token), one column (channel), one head; or all."""

    axis: str
    index: int
    rms: float


@dataclass(frozen=True)
class Margin:
    """How near a stage comes to its gates: each family's worst statistic as a share of its gate; above 1 is an alarm.

    Attributes
    ----------
    element : float
        Largest |I| over the gate of elements.
    group : float
        Largest mean square z over the gate of its group's size, from all partial sums where the cheap form passed the gate.
    row : float
        The factor that a row shares, over its gate: the largest one, or the mean square of all.
    """

    element: float = 0.0
    group: float = 0.0
    row: float = 0.0


@dataclass(frozen=True)
class Measure:
    """What was found at one stage.

    Attributes
    ----------
    n : int
        Elements compared.
    i_max, z_rms, z_max, z_mean : float or None
        Largest |I|; root mean square, largest magnitude and mean of z over the elements that are rounded at all.  :data:`IMPOSSIBLE` is the
        ceiling.  None if there are none (a copy).
    bit_equal : float
        Share equal to the emulation, bit for bit (-0 is 0).
    worst : Group or None
        Group with the largest rms z relative to its gate.
    deviation : float
        The statistic that decided, as Gaussian standard deviations of an element; infinite for bits.
    reasons : tuple of str
        Why it is wrong; empty if it is not.
    overflowed, nonfinite : int
        Elements that the declared arithmetic itself makes infinite; captured elements that are not finite.
    power : float
        Smallest relative error of the whole stage that these gates see.
    margin : Margin
        How near the noise tests came to an alarm; bits have no margin.
    """

    n: int
    i_max: float | None
    z_rms: float | None
    z_max: float | None
    z_mean: float | None
    bit_equal: float
    worst: Group | None
    deviation: float
    reasons: tuple[str, ...]
    overflowed: int
    nonfinite: int
    power: float | None
    margin: Margin = Margin()


def group_count(shape: tuple[int, ...]) -> int:
    """How many groups :func:`measure` tests in an array of this shape, the whole of it and the row factors included."""
    return 1 + sum(shape) + int(np.prod(shape[:-1]))


def measure(captured: Float, made: Prediction, gates: Gates, band: float) -> Measure:
    """Judge one captured value.

    Parameters
    ----------
    captured : array
        As the side has it, widened to float64; the shape of ``made.pre``.
    made : Prediction
    gates : Gates
    band : float
        Largest clean rms z of the profile.
    """
    want = made.bits()
    compared = np.ones(captured.shape, bool) if made.compared is None else made.compared
    broken, overflowed = _nonfinite(captured, want, made, compared)
    usable = compared & np.isfinite(captured) & np.isfinite(want) & np.isfinite(made.plain)
    n = int(np.count_nonzero(usable))
    nonfinite = int(np.count_nonzero(compared & ~np.isfinite(captured)))
    if n == 0:
        return Measure(n, None, None, None, None, 0.0, None, np.inf, broken, overflowed, nonfinite, None)
    same = captured == want
    exact = usable & np.broadcast_to(np.asarray(made.certain), captured.shape)
    changed = exact & ~same
    noisy = usable & ~exact
    scores = _Scores(captured, made, usable)
    reasons, deviation = list(broken), np.inf if broken else 0.0
    if changed.any():
        at = np.unravel_index(int(np.argmax(changed)), changed.shape)
        count = int(np.count_nonzero(changed))
        reasons.append(f"{count} of {n} elements are not the bits that the declared recipe gives, first at {list(map(int, at))}")
        deviation = np.inf
    worst, margin = None, Margin()
    if noisy.any():
        said, worst, far, margin = _gated(scores, noisy, gates, band)
        reasons += said
        deviation = max(deviation, far)
    i = np.where(exact, np.where(changed, IMPOSSIBLE, 0.0), np.minimum(np.abs(scores.i), IMPOSSIBLE))
    rounded = scores.rounded & (noisy if noisy.any() else usable)
    z = np.clip(scores.z[rounded], -IMPOSSIBLE, IMPOSSIBLE)
    return Measure(
        n=n,
        i_max=float(i[usable].max()),
        z_rms=float(min(np.sqrt(np.mean(z * z)), IMPOSSIBLE)) if z.size else None,
        z_max=float(np.abs(z).max()) if z.size else None,
        z_mean=float(np.mean(z)) if z.size else None,
        bit_equal=float(np.count_nonzero(same & usable) / n),
        worst=worst,
        deviation=float(deviation),
        reasons=tuple(reasons),
        overflowed=overflowed,
        nonfinite=nonfinite,
        power=power(made, usable, gates, band),
        margin=margin,
    )


def _nonfinite(captured: Float, want: Float, made: Prediction, compared: Mask) -> tuple[tuple[str, ...], int]:
    """Non-finite values first: why they are wrong, and how many the declared arithmetic itself overflows.

    A value within the noise of the overflow boundary may fall on either side.
    """
    got, due = ~np.isfinite(captured), ~np.isfinite(want)
    if not (got.any() or due.any()):
        return (), 0
    with np.errstate(invalid="ignore"):
        edge = np.abs(np.abs(made.pre) - made.format.overflow) <= CERTAIN * np.sqrt(made.sigma2)
    alike = (np.isnan(captured) & np.isnan(want)) | (captured == want)
    wrong = compared & (got | due) & ~alike & ~edge
    overflowed = int(np.count_nonzero(compared & np.isinf(want) & np.isfinite(made.plain) & got))
    if not wrong.any():
        return (), overflowed
    nans, infinite = int(np.count_nonzero(wrong & np.isnan(captured))), int(np.count_nonzero(wrong & np.isinf(captured)))
    finite = int(np.count_nonzero(wrong)) - nans - infinite
    parts = [f"{c} {what}" for c, what in ((nans, "NaN"), (infinite, "infinite"), (finite, "finite where none should be")) if c]
    return (f"values that the replay does not have: {', '.join(parts)}",), overflowed


class _Scores:
    """I and z of every element, and how to compute some of them again from all partial sums."""

    def __init__(self, captured: Float, made: Prediction, usable: Mask) -> None:
        self.captured, self.made = captured, made
        with np.errstate(invalid="ignore", over="ignore"):
            self.residual = np.where(usable, captured - made.plain, 0.0)
            self.i = np.where(usable, interval(captured, made.pre, np.sqrt(made.sigma2), made.format), 0.0)
        self.z = _ratio(self.residual, made.variance)
        self.rounded = usable & ((made.variance > 0) | (self.residual != 0))  # what no operation rounds would only dilute z
        self.factor: Float | None = None
        if made.row is not None:
            self.z, self.factor = _whiten(self.z, np.where(usable, made.plain, 0.0), made)

    def again(self, flat: Index) -> tuple[Float, Float]:
        """I and z of some elements with the variance from their own partial sums."""
        made, captured = self.made, self.captured.ravel()[flat]
        if made.dot is None or made.added is None:
            return self.i.ravel()[flat], self.z.ravel()[flat]
        at = made.dot_index(flat)  # what was computed exactly stays, also for the report
        change = made.gain * sums.exact(made.dot, at) - made.added.ravel()[flat]
        sigma2 = np.maximum(made.sigma2.ravel()[flat] + change, 0.0)
        i = interval(captured, made.pre.ravel()[flat], np.sqrt(sigma2), made.format)
        z = _ratio(self.residual.ravel()[flat], np.maximum(made.variance.ravel()[flat] + change, 0.0))
        self.i.ravel()[flat], self.z.ravel()[flat] = i, z
        return i, z


def _ratio(residual: Float, variance: Float) -> Float:
    """Residual in standard deviations; where none is allowed, 0 or infinite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(residual == 0, 0.0, residual / np.sqrt(variance))


def _whiten(z: Float, plain: Float, made: Prediction) -> tuple[Float, Float]:
    """Take the row's common factor into account as a covariance, with its predicted size; never by fitting a free scale.

    With a = plain / sd the scores of a row have covariance 1 + s^2 a a^T.  Along a the score is divided by sqrt(1 + s^2 |a|^2), across it
    nothing changes; the first is returned too, as one standard normal number per row.
    """
    assert made.row is not None
    with np.errstate(divide="ignore", invalid="ignore"):
        a = np.where(made.variance > 0, plain / np.sqrt(made.variance), 0.0).reshape(-1, made.width)
    rows = np.where(np.isfinite(z), z, 0.0).reshape(-1, made.width)
    length = np.sqrt((a * a).sum(axis=1, keepdims=True))
    direction = a / np.where(length > 0, length, 1.0)
    along = (rows * direction).sum(axis=1, keepdims=True)
    factor = along / np.sqrt(1.0 + np.square(made.row * length))
    white = (rows - (along - factor) * direction).reshape(z.shape)
    return np.where(np.isfinite(z), white, z), factor[:, 0]


def _gated(scores: _Scores, noisy: Mask, gates: Gates, band: float) -> tuple[list[str], Group | None, float, Margin]:
    """The noise tests: reasons, the worst group, the strongest deviation as that of an element, and the margins."""
    reasons: list[str] = []
    i = np.where(noisy, np.abs(scores.i), 0.0)
    far = float(i.max())
    if far > SUSPICION * gates.element:
        flat = np.flatnonzero(i > SUSPICION * gates.element)
        flat = flat[np.argsort(i.ravel()[flat])[::-1][:SAMPLE]]
        again = np.abs(scores.again(flat)[0])
        far = float(again.max())
        if far > gates.element:
            at = list(map(int, np.unravel_index(int(flat[np.argmax(again)]), i.shape)))
            count = int(np.count_nonzero(again > gates.element))
            more = "at least " if len(flat) == SAMPLE else ""
            reasons.append(
                f"{more}{count} elements outside their rounding interval, by up to {_say(far)} sigma at {at} (gate {gates.element:.1f})"
            )
    element, row = far / gates.element, 0.0
    worst, said, group = _groups(scores, noisy & scores.rounded, gates, band)
    reasons += said
    if scores.factor is not None:
        top = float(np.abs(scores.factor).max())
        shared = float(np.sqrt(np.mean(np.square(scores.factor))))
        limit = float(gates.group(np.array(len(scores.factor)), band))
        row = max(top / (band * gates.element), shared**2 / limit)
        if top > band * gates.element or shared**2 > limit:
            reasons.append(f"rows are scaled as no rounding of the norm does: factor {_say(top)} sigma at most, rms {_say(shared)}")
            far = max(far, top)
    return reasons, worst, far if not said else max(far, gates.element), Margin(element, group, row)


def _say(x: float) -> str:
    return f"{x:.3g}" if x < IMPOSSIBLE else "any number of"


def _free(made: Prediction) -> Mask:
    """Where the replay does not know the last rounding at all: its noise is as large as the step, as ``settle`` has it.

    Elsewhere the rounding is emulated.  It is no noise but a known number, and of elements that are nearly equal (a channel that its bias
    rules) it is one number many times over: whether the captured value is the emulated one is for I to say, not for a group.
    """
    return np.asarray(np.sqrt(made.sigma2) > ulp(made.pre, made.format) / 4)


def alike(rows: Float) -> Index:
    """Rows [T, N] that are nearly equal, because their tokens are, have one number between 0 and the count of different ones: [T].

    Their sums are rounded alike.  Rows are sorted along one direction, in which different rows do not meet but by chance; neighbours are
    alike if they are no further apart than :data:`ALIKE` steps of float32, in which sums are added.
    """
    finite = np.where(np.isfinite(rows), rows, 0.0)
    along = finite @ np.cos(np.arange(1.0, rows.shape[1] + 1.0))
    order = np.argsort(along)
    size = np.sqrt(np.square(finite).sum(axis=1))[order]
    first = np.concatenate([[True], np.diff(along[order]) > ALIKE * U * size[1:]])
    which = np.empty(len(rows), np.int64)
    which[order] = np.cumsum(first) - 1
    return which


def _once(made: Prediction) -> Float:
    """Weight of each element in a group that crosses rows, [T, 1]: rows that are alike count as one."""
    if made.plain.ndim != 2 or len(made.plain) < 2:
        return np.ones((1,) * made.plain.ndim)
    which = alike(made.plain)
    return (1.0 / np.bincount(which))[which][:, None]


def _groups(scores: _Scores, mask: Mask, gates: Gates, band: float) -> tuple[Group | None, list[str], float]:
    """Root mean square z of the stage and of each row, column and head; the worst one is recomputed exactly before it is called wrong.

    The worst one is named, but only elements with a free last rounding make it wrong.  The last value returned is the largest mean square
    as a share of its gate.
    """
    made, free = scores.made, mask & _free(scores.made)
    squares = np.where(mask, np.square(np.minimum(np.abs(scores.z), IMPOSSIBLE)), 0.0)
    once = np.broadcast_to(_once(made), mask.shape)
    named = _ranked(squares, mask, once, made, gates, band)
    tested = named if np.array_equal(free, mask) else _ranked(np.where(free, squares, 0.0), free, once, made, gates, band)
    suspects = [found for found in tested if found[0] > 1.0]
    nearest = max((share for share, *_ in tested if share <= 1.0), default=0.0)
    said = []
    for _, group, flat in sorted(suspects, key=lambda s: -s[0]):
        pick = flat if len(flat) <= SAMPLE else np.sort(np.random.default_rng(0).choice(flat, SAMPLE, replace=False))
        z = np.minimum(np.abs(scores.again(pick)[1]), IMPOSSIBLE)
        weight = np.ones(len(flat)) if group.axis == "token" else once.ravel()[flat]
        counted = weight[np.searchsorted(flat, pick)]
        n = counted.sum() * min(1.0, float(np.atleast_1d(_effective(group.axis, np.array([weight.sum()]), mask, made))[0]) / weight.sum())
        rms = float(np.sqrt(np.average(z * z, weights=counted)))
        gate = float(np.sqrt(gates.group(np.array(max(n, 1.0)), band)))
        nearest = max(nearest, (rms / gate) ** 2)
        if rms > gate:
            name = "the stage" if group.axis == "all" else f"{group.axis} {group.index}"
            said.append(f"rms z of {name} is {_say(rms)} (gate {gate:.2f}, {len(pick)} elements)")
            break
    return max(named, key=lambda found: found[0])[1] if mask.any() else None, said, nearest


Ranked = tuple[float, Group, Index]


def _ranked(squares: Float, mask: Mask, once: Float, made: Prediction, gates: Gates, band: float) -> list[Ranked]:
    """The worst group of each partition: its mean square as a share of its gate, its name, its elements."""
    out = []
    for axis, sizes, totals, member in _partitions(squares, mask, once):
        mean = totals / np.where(sizes > 0, sizes, 1.0)
        share = mean / gates.group(np.maximum(_effective(axis, sizes, mask, made), 1.0), band)
        k = int(np.argmax(share))
        out.append((float(share[k]), Group(axis, k, float(np.sqrt(mean[k]))), np.flatnonzero(member(k) & mask)))
    return out


Partition = tuple[str, Float, Float, "_Member"]


class _Member:
    """Which elements of a shape belong to the k-th group along an axis."""

    def __init__(self, shape: tuple[int, ...], axis: int | None) -> None:
        self.shape, self.axis = shape, axis

    def __call__(self, k: int) -> Mask:
        out = np.zeros(self.shape, bool)
        out[(slice(None),) * (self.axis or 0) + ((k,) if self.axis is not None else ())] = True
        return out


def _partitions(squares: Float, mask: Mask, once: Float) -> Iterator[Partition]:
    """The stage as a whole, then by token, channel or key, and head: name, sizes, sums of squares, membership; each row counts ``once``."""
    counted = mask * once
    yield "all", np.array([counted.sum()]), np.array([(squares * once).sum()]), _Member(mask.shape, None)
    names = ("head", "token", "key") if squares.ndim == 3 else ("token", "channel")
    for axis, name in enumerate(names):
        others = tuple(a for a in range(squares.ndim) if a != axis)
        if name == "token":  # one row: nothing in it is there twice
            yield name, np.count_nonzero(mask, axis=others).astype(np.float64), squares.sum(axis=others), _Member(mask.shape, axis)
        else:
            yield name, counted.sum(axis=others), (squares * once).sum(axis=others), _Member(mask.shape, axis)


def _effective(axis: str, sizes: Float, mask: Mask, made: Prediction) -> Float:
    """Independent elements in each group; noise in an input is shared by a whole row, which then counts once."""
    if not made.shared:
        return sizes
    rows = float(np.prod(mask.shape[:-1]))
    per_row = mask.shape[-1]
    return np.full(sizes.shape, rows) if axis == "all" else np.maximum(sizes / per_row if axis in ("token", "head") else sizes, 1.0)


def power(made: Prediction, usable: Mask, gates: Gates, band: float) -> float | None:
    """Smallest relative error of a whole stage (a scale on all of it) that the gates see with this capture.

    By bits and by I: the value must reach the next rounding boundary, and the replay must be an element gate away from it; three elements
    for which that holds make it sure.  By z: the rms of the stage passes its gate; by the row factor: its rms does.  A fault in one row or
    one weight needs more: one row of 512 about 10 times, one weight of 131072 about 1000 times (measured).

    Returns
    -------
    float or None
        None if everything is 0.
    """
    counted = usable & (made.plain != 0)
    if not counted.any():
        return None
    pre, y = np.abs(made.pre[counted]), np.abs(made.plain[counted])
    certain = np.broadcast_to(np.asarray(made.certain), made.pre.shape)[counted]
    step = ulp(pre, made.format)
    left = np.abs(to_format(pre, made.format)) + step / 2 - pre  # to the boundary above
    short = np.where(certain, 0.0, gates.element * np.sqrt(made.sigma2[counted])) - left
    needed = np.maximum(left, FINEST * y)  # a tie is tipped by anything
    needed = (needed + np.ceil(np.maximum(short, 0.0) / step) * step) / y
    enough = min(3, len(needed)) - 1
    best = float(np.partition(needed, enough)[enough])
    variance, free = made.variance[counted], _free(made)[counted] & ~certain
    if not free.any():
        return best
    weight = float(np.mean(np.square(y[free]) / variance[free]))
    if made.row is not None:
        seen = made.width * weight / (1.0 + float(np.mean(made.row**2)) * made.width * weight)
        return min(best, float(np.sqrt((gates.group(np.array(made.row.size), band) - 1.0) / seen)))
    n = float(np.prod(made.pre.shape[:-1])) if made.shared else float(np.count_nonzero(free))
    return min(best, float(np.sqrt((gates.group(np.array(n), band) - 1.0) / weight)))
