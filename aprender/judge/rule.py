"""The decision rule: one number, the false-alarm probability of a whole run, and every gate that follows from it.

Owns :class:`Rule` and :class:`Gates`.  Refuses constants that were tuned on an engine: a gate is a tail bound for the number of things that
are tested.  Called by ``judge.local`` (one :class:`Gates` per run) and ``judge.measure`` (which applies them).

Four families of tests share alpha equally: single elements (I), whole stages, groups (rows, columns, heads) and row factors.

* An element: the Gaussian tail is below exp(-q^2/2), so q = sqrt(2 ln(N / (alpha/4))) for N elements, times 1.18: a standard deviation that
  is known through a model of roundings is not known better (noise.md: 9 for 5e7 elements at alpha 1e-6, where q is 7.6).
* A group of n: the mean of n squares exceeds 1 + 2 sqrt(x/n) + 2 x/n with probability below e^-x (Laurent and Massart 2000), so x =
  ln(G / (alpha/4)) for G groups; times the profile's band squared, the margin for the variance model, which does not average out.

Nothing is called wrong on an interpolated variance: what passes ``suspicion`` times a gate is computed again from all partial sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SUSPICION = 0.6
"""Share of an element gate from which the exact form is asked for: an interpolated sigma may be too large by 1.3 at most elements."""

MODEL_MARGIN = 1.18


@dataclass(frozen=True)
class Gates:
    """The gates of one run.

    Attributes
    ----------
    element : float
        Largest |I| of a clean run, and largest |z| where z is Gaussian.
    nats : float
        x of the group bound.
    elements, alpha : float
        What they follow from.
    """

    element: float
    nats: float
    elements: int
    alpha: float

    def group(self, n: NDArray[Any], band: float) -> NDArray[np.float64]:
        """Largest mean square of z over groups of ``n`` independent elements, for a profile with this band."""
        return np.asarray(band * band * (1.0 + 2.0 * np.sqrt(self.nats / n) + 2.0 * self.nats / n), np.float64)

    def chance(self, deviation: float) -> float:
        """Probability that a clean run has an element this many standard deviations out, at most."""
        return min(1.0, self.elements * math.exp(-((deviation / MODEL_MARGIN) ** 2) / 2)) if math.isfinite(deviation) else 0.0


@dataclass(frozen=True)
class Rule:
    """False-alarm probability of one whole run (model statement; the tests bound it empirically)."""

    alpha: float = 1e-6

    def gates(self, elements: int, groups: int) -> Gates:
        """Gates for a run that tests so many elements and groups."""
        share = self.alpha / 4
        q = math.sqrt(2.0 * math.log(max(elements, 1) / share))
        return Gates(MODEL_MARGIN * q, math.log(max(groups, 1) / share), elements, self.alpha)
