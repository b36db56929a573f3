"""What the residual of a wrong stage looks like: codes that need no hypothesis, each with a number.

Owns the codes: several may hold at once, and a fault that no catalogue knows is described by them.  Refuses to name a cause (that is
``judge.diagnose``) and to say what is wrong (``judge.local``).  Works on the captured value, the replayed one and its variance alone.

A *line* is a row, a column or a head.  It is right if the rms of its z is no larger than :data:`RIGHT`; a residual that is no larger than
rounding everywhere (only the interval test sees it) has one code, ``FAINT``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprender.judge.rounding import Float
from aprender.judge.witness import Mask

RIGHT = 4.0
"""Largest rms z of a line that counts as right: well above the gates of a clean line, far below any error that can be seen."""

LARGEST_Z = 1e9
STRONG = frozenset({"SCALE", "ROWSCALE", "BIAS", "CHAOS", "PERM"})
"""Codes that describe the whole of a residual."""

PERIODS = (16, 32, 256)
"""Lengths of the blocks that number formats and kernels work in."""


@dataclass(frozen=True)
class Shape:
    """One code that holds: ``value`` is its number, ``text`` the same in words."""

    code: str
    value: float
    text: str

    def to_json(self) -> dict[str, object]:
        """The keys that scripts rely on."""
        return {"code": self.code, "value": self.value, "text": self.text}


@dataclass(frozen=True)
class Residual:
    """A wrong stage as tokens x columns.

    Attributes
    ----------
    captured, plain, variance : array
        [T, C]: as captured, as replayed in float64, and what rounding may leave.
    used : array of bool
        [T, C]: elements that mean anything.
    group : int
        Columns of a head, or 0 where the stage has none.
    """

    captured: Float
    plain: Float
    variance: Float
    used: Mask
    group: int = 0

    @classmethod
    def of(cls, captured: Float, plain: Float, variance: Float, used: Mask, head: int) -> Residual:
        """From arrays [T, C] or [H, T, J]; scores and probabilities are laid out with their heads side by side."""
        if captured.ndim == 3:
            heads, tokens, keys = captured.shape

            def beside(a: NDArray[Any]) -> Any:
                return np.broadcast_to(a, captured.shape).transpose(1, 0, 2).reshape(tokens, heads * keys)

            return cls(beside(captured), beside(plain), beside(variance), beside(used), keys)
        return cls(captured, plain, variance, used, head if head and captured.shape[1] % head == 0 else 0)


def shapes(residual: Residual) -> tuple[Shape, ...]:
    """All codes that hold, the most telling first."""
    r = residual
    finite = r.used & np.isfinite(r.captured) & np.isfinite(r.plain)
    lost = int(np.count_nonzero(r.used & ~np.isfinite(r.captured) & np.isfinite(r.plain)))
    found = [Shape("NAN", lost, f"{lost} of {np.count_nonzero(r.used)} values are not finite")] if lost else []
    got, due = np.where(finite, r.captured, 0.0), np.where(finite, r.plain, 0.0)
    error = got - due
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(error == 0, 0.0, error / np.sqrt(r.variance))
    z = np.where(finite, np.clip(np.nan_to_num(z, nan=0.0, posinf=LARGEST_Z, neginf=-LARGEST_Z), -LARGEST_Z, LARGEST_Z), 0.0)
    if not finite.any() or not error.any():
        return tuple(found)
    if np.abs(z).max() <= RIGHT:
        rms = float(np.sqrt(np.mean(np.square(z[finite]))))
        return (*found, Shape("FAINT", rms, f"no larger than rounding (rms z {rms:.2g}): only the rounding intervals show it"))
    found += _whole(got, due, error)
    found += _lines(z, finite, r.group)
    found += _sorted(got, due, r.variance)
    if not any(shape.code in STRONG for shape in found):
        found += _function(error[finite], due[finite], got[finite])
    return tuple(found)


def _function(error: Float, due: Float, got: Float) -> Iterator[Shape]:
    """FUNC and, of everything, DIFF: what is said where nothing sharper holds.

    The residual is a function of the value that is due if it changes little from one value to the next (von Neumann's ratio, 1 by chance).
    """
    order = np.argsort(due)
    spread = float(np.square(error - error.mean()).sum())
    ratio = float(np.square(np.diff(error[order])).sum()) / (2 * spread) if spread else 1.0
    if len(error) >= 32 and ratio < 0.05:
        yield Shape("FUNC", ratio, "the residual is a function of each value by itself")
    size, norm = float(np.linalg.norm(due)), float(np.linalg.norm(got))
    if size and norm:
        apart, cosine = float(np.linalg.norm(error)) / size, float(got @ due) / (size * norm)
        yield Shape("DIFF", apart, f"relative L2 {apart:.2g}, cosine {cosine:.6f}, norm ratio {norm / size:.6f}")


def _whole(got: Float, due: Float, error: Float) -> Iterator[Shape]:
    """SCALE, BIAS, NORM= and CHAOS: the residual against the value that is due."""
    size, norm = float((due * due).sum()), float((got * got).sum())
    if size == 0:
        return
    ratio, alpha = float(np.sqrt(norm / size)), float((got * due).sum() / size)
    left = float(np.square(got - alpha * due).sum() / (error * error).sum())
    cosine = alpha / ratio if ratio else 0.0
    if left < 1e-2:
        yield Shape("SCALE", alpha, f"{alpha:.6g} times what is due, everywhere")
        return
    rows = (got * due).sum(axis=1) / np.maximum((due * due).sum(axis=1), np.finfo(float).tiny)
    if len(due) > 1 and float(np.square(got - rows[:, None] * due).sum() / (error * error).sum()) < 1e-2:
        yield Shape("ROWSCALE", float(rows.max() / rows.min()) if rows.min() > 0 else float(rows.min()),
                    f"each token has a scale of its own, {rows.min():.6g} to {rows.max():.6g}")  # fmt: skip
    constant = len(error) * float(np.square(error.mean(axis=0)).sum() / (error * error).sum())
    if len(error) > 2 and constant > 0.98:
        yield Shape("BIAS", constant, f"the same for every token (share {constant:.4f})")
    if abs(ratio - 1.0) < 5e-3 and cosine < 0.99:
        yield Shape("NORM=", ratio, f"norm ratio {ratio:.4f} at cosine {cosine:.3f}: a rotation or an exchange")
    if abs(cosine) < 0.15 and ratio > 0.05:
        yield Shape("CHAOS", cosine, f"unlike what is due (cosine {cosine:.3f}, norm ratio {ratio:.3f})")


def _bad(z: Float, finite: Mask, axis: int) -> NDArray[np.bool_]:
    """Which lines across an axis are wrong."""
    count = np.maximum(np.count_nonzero(finite, axis=axis), 1)
    return np.asarray(np.sqrt(np.square(z).sum(axis=axis) / count) > RIGHT, bool)


def _lines(z: Float, finite: Mask, group: int) -> Iterator[Shape]:
    """POS0, TAIL, LAST= and TOKEN over the rows; HEADBLK, BLOCK and CHANNEL over the columns."""
    rows = _bad(z, finite, 1)
    first, wrong = int(np.argmax(rows)), int(np.count_nonzero(rows))
    if len(rows) > 1 and wrong:
        if first == 1 and rows[1:].all():
            yield Shape("POS0", 1, "the first token is right, every later one is wrong")
        elif wrong > 1 and first > 1 and rows[first:].all():
            yield Shape("TAIL", first, f"tokens 0 to {first - 1} are right, all from {first} on are wrong")
        if wrong > 1 and not rows[-1] and rows[:-1].all():
            yield Shape("LAST=", len(rows) - 1, "the last token is right, every earlier one is wrong")
        if wrong == 1:
            yield Shape("TOKEN", first, f"one token is wrong: {first}")
    yield from _columns(z, finite, group)


def _columns(z: Float, finite: Mask, group: int) -> Iterator[Shape]:
    """HEADBLK, BLOCK, CHANNEL: which columns are wrong."""
    bad = _bad(z, finite, 0)
    wrong = int(np.count_nonzero(bad))
    if wrong in (0, len(bad)):
        return
    if wrong == 1:
        yield Shape("CHANNEL", int(np.argmax(bad)), f"one channel is wrong: {int(np.argmax(bad))}")
        return
    if group and len(bad) > group:
        heads = bad.reshape(-1, group)
        hit: Mask = np.asarray(heads.any(axis=1))
        if not hit.all() and heads[hit].mean() > 0.5:
            names = ", ".join(map(str, np.flatnonzero(hit)[:8]))
            yield Shape("HEADBLK", int(hit.sum()), f"{int(hit.sum())} of {len(hit)} heads are wrong ({names}), the others right")
    first, last = int(np.argmax(bad)), len(bad) - 1 - int(np.argmax(bad[::-1]))
    if bad[first : last + 1].mean() > 0.9:
        yield Shape("BLOCK", wrong, f"channels {first} to {last} are wrong, the others right")
        return
    for period in PERIODS:
        if len(bad) % period or len(bad) == period:
            continue
        share: Float = np.mean(bad.reshape(-1, period), axis=0)
        if (np.minimum(share, 1 - share) < 0.1).all() and 0 < np.count_nonzero(share > 0.5) < period:
            n = int(np.count_nonzero(share > 0.5))
            yield Shape("BLOCK", period, f"the same {n} of every {period} channels are wrong")
            return


def _sorted(got: Float, due: Float, variance: Float) -> Iterator[Shape]:
    """PERM: every token has the values that are due, in another order."""
    apart = np.sort(got, axis=1) - np.sort(due, axis=1)
    room = np.sqrt(np.max(variance, axis=1, keepdims=True)) + np.abs(due).max(axis=1, keepdims=True) * 2.0**-52
    same = np.abs(apart).max(axis=1) <= 2 * RIGHT * room[:, 0]
    moved = np.abs(got - due).max(axis=1) > 4 * RIGHT * room[:, 0]
    if moved.any() and same.all() and due.shape[1] > 1:
        yield Shape("PERM", int(moved.sum()), f"the values are those that are due, in another order ({int(moved.sum())} tokens)")
