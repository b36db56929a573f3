"""Which declared arithmetic a side's numbers are those of.

Owns the likelihood of a side under each row of :data:`aprender.arithmetic.PROFILES` (:func:`infer`).  Refuses a row per stage: it is of a
side.  Refuses to call anything right: a side is judged under the row that was chosen, as it would be had it been declared.  Called by
``bisection``.

**Likelihood.**  At each captured stage a row predicts every element with a mean (the emulation before its last rounding) and a variance
(what is left, the last rounding, and the cell of the float32 number that was written down); the sum of Gaussian log densities is the
stage's.  A stage may also be wrong, and then is anything of its own size: the same number of elements under N(0, mean square).  With even
odds for both, a stage adds log(density | right) or log(density | anything), whichever is larger, but for log 2.  So one wrong stage costs
every row the same and decides nothing, and a row that says nothing about a stage is no better than "anything".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from aprender.arithmetic import F32, PROFILES, Profile
from aprender.captures import Captures
from aprender.judge.prediction import Prediction
from aprender.judge.replay import Replay, Unlike, Unmeasured
from aprender.judge.rounding import Float, ulp, variance
from aprender.judge.witness import ModelData
from aprender.stages import Key

TIE = 4.0
"""Nats within which two rows fit a stage alike, beside what the error of a variance makes: odds of 55 to 1."""


@dataclass(frozen=True)
class Fit:
    """How well a row fits a side.

    Attributes
    ----------
    profile : str
    likelihood : float
        Nats.
    z : float
        Median over the stages of the rms residual in predicted standard deviations, where the row does not declare every bit; 1 is its own
        noise.
    explained, stages : int
        Stages that are likelier under the row than anything of their size, of how many.
    band : float
        Of the row.
    parts : mapping
        Each stage's own likelihood and number of elements.
    """

    profile: str
    likelihood: float
    z: float
    explained: int
    stages: int
    band: float
    parts: Mapping[Key, tuple[float, int]] = field(repr=False)

    def like(self, other: Fit) -> bool:
        """Whether another row fits as well: at each stage their likelihoods differ by less than a variance that is off by the band does."""
        room = math.log(max(self.band, other.band))
        return all(abs(mine - other.parts[key][0]) < TIE + n * room for key, (mine, n) in self.parts.items())


@dataclass(frozen=True)
class Inferred:
    """All rows, the likeliest first.

    Attributes
    ----------
    fits : tuple of Fit
    """

    fits: tuple[Fit, ...]

    @property
    def best(self) -> Fit:
        """The likeliest row."""
        return self.fits[0]

    @property
    def ties(self) -> tuple[str, ...]:
        """Other rows that fit as well."""
        return tuple(fit.profile for fit in self.fits[1:] if self.best.like(fit))

    def text(self) -> str:
        """One line for the report."""
        best, rest = self.best, [fit for fit in self.fits[1:] if fit.profile not in self.ties]
        alike = f" ({', '.join(self.ties)} {'fits' if len(self.ties) == 1 else 'fit'} as well)" if self.ties else ""
        text = f"{best.profile}, rms z {_z(best.z)}, {best.explained} of {best.stages} stages{alike}"
        return text + (f"; next {rest[0].profile}: {_z(rest[0].z)}, {rest[0].explained}" if rest else "")


def _z(z: float) -> str:
    return f"{z:.2f}" if z < 100 else f"{z:.0e}"


def infer(captures: Captures, model: ModelData | None, declared: Profile | None = None, rows: Iterable[Profile] | None = None) -> Inferred:
    """Hold a side against every row.

    Parameters
    ----------
    captures : Captures
    model : ModelData or None
        The side's weights as the side holds them.
    declared : Profile, optional
        The row that is put first among rows that fit alike.
    rows : iterable of Profile, optional
        All that were validated, and the declared one: a row that nobody has measured is no answer.

    Raises
    ------
    NotComparable
        As for :func:`aprender.judge.local.local`.
    """
    among = [row for row in PROFILES.values() if row.validated or row == declared] if rows is None else rows
    fits = [_fit(Replay.of(captures, model, row.with_order(captures.manifest.arithmetic))) for row in among]
    fits.sort(key=lambda fit: -fit.likelihood)
    first = [fit for fit in fits if declared is not None and fit.profile == declared.name and fits[0].like(fit)]
    return Inferred(tuple(first + [fit for fit in fits if fit not in first]))


@np.errstate(invalid="ignore", over="ignore", divide="ignore", under="ignore")
def _fit(replay: Replay) -> Fit:
    """One row."""
    parts: dict[Key, tuple[float, int]] = {}
    explained, zs = 0, []
    seen = [key for key in replay.wires if key in replay.sample.values and key not in replay.sample.derived]
    for key in seen:
        try:
            captured = replay.captured(key)
        except (Unmeasured, Unlike):
            continue
        try:
            made = replay.predict(key, key in replay.sample.last, captured)[0]
        except (Unmeasured, Unlike):
            made = None
        right, anything, z = _likelihood(captured, made)
        parts[key] = max(right, anything), captured.size
        explained += right > anything
        zs += [] if math.isnan(z) else [z]
    total, z = sum(part for part, _ in parts.values()), float(np.median(zs)) if zs else 0.0
    return Fit(replay.profile.name, total, z, explained, len(parts), replay.profile.band, parts)


def _likelihood(captured: Float, made: Prediction | None) -> tuple[float, float, float]:
    """Log density of a stage under a row and under anything of its size, and its rms residual in standard deviations (NaN: all bits)."""
    used = np.isfinite(captured)
    if made is not None:
        used &= np.isfinite(made.pre) & (True if made.compared is None else made.compared)
    if not used.any():
        return -math.inf, 0.0, math.inf
    c = captured[used]
    cell = np.square(ulp(c, F32)) / 12.0
    broad = float(np.mean(np.square(c))) + cell
    anything = -0.5 * float(np.sum(np.log(broad) + np.square(c) / broad))
    if made is None:
        return -math.inf, anything, math.inf
    known = np.broadcast_to(np.asarray(made.certain), captured.shape)[used]
    mean = np.where(known, made.bits()[used], made.pre[used])
    v = cell + np.where(known, 0.0, made.sigma2[used] + variance(mean, made.format))
    z2 = np.square(c - mean) / v
    return -0.5 * float(np.sum(np.log(v) + z2)), anything, float(np.sqrt(np.mean(z2[~known]))) if not known.all() else math.nan
