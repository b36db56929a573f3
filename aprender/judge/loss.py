"""How much information a declared arithmetic loses at a stage, carried out to the letter: emulated against plain float64.

Owns the measure and the limit beyond which it is the finding ``arithmetic_loss``.  Refuses to look at what the side captured: whether the
arithmetic is carried out is the local test's question, whether it is enough is this one's.  Called by ``judge.local`` for every stage.

The *loss* of a stage is the relative L2 distance of the emulation (every declared rounding made) from float64 with nothing emulated, on the
same inputs.  Roundings do cost something: each declared rounding, taken as an error of its own within half a step of a format whose
exponents never end, has a known variance, and together they make the *cost* of the stage.  A sound arithmetic loses just that.  More is
lost where roundings act in concert or a format ends: a sum that stands still because each next product is below half a step, a scale or
a probability that vanishes.  An outlier that takes the step of its block of 8-bit activations is neither: the block declares that step, and
its loss is shown, but is no finding.

**The limit.**  A pass of M stages pays M such costs.  A stage that by itself loses more than all of them together would, if each cost as
much as its own cost, has lost what no rounding explains: loss^2 > M cost^2.  Nothing is fitted.  Below few degrees of freedom the noise of
the cost itself is larger than that, and the bound of the rule for groups (``judge.rule``) takes the place of M.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aprender.judge.prediction import Prediction
from aprender.judge.rounding import Float, endless, variance
from aprender.judge.rule import Gates

ARITHMETIC_LOSS = "arithmetic_loss"


@dataclass(frozen=True)
class Loss:
    """What one stage loses.

    Attributes
    ----------
    relative : float
        Relative L2 of emulated minus plain.
    cost : float
        The same if every rounding were one of its own.
    reason : str
        Why it is a finding; empty if it is none.
    """

    relative: float
    cost: float
    reason: str = ""


def loss(made: Prediction, gates: Gates, band: float, stages: int) -> Loss | None:
    """The loss of a stage.

    Parameters
    ----------
    made : Prediction
    gates : Gates
        Of the run.
    band : float
        Of the profile.
    stages : int
        M, the stages of the pass.

    Returns
    -------
    Loss or None
        None where nothing is finite, or all is 0.  Infinities are the finding ``overflow``.
    """
    plain = made.plain if made.unrounded is None else made.unrounded
    with np.errstate(invalid="ignore", over="ignore"):
        lost = made.bits() - plain
        cost = _cost(made)
    usable = np.isfinite(lost) & np.isfinite(cost)
    if made.compared is not None:
        usable &= made.compared
    size = float(np.sum(np.square(plain), where=usable))
    if size == 0:
        return None
    whole, due = float(np.sum(np.square(lost), where=usable)), float(np.sum(cost, where=usable))
    relative, expected = (float(np.sqrt(part / size)) for part in (whole, due))
    free = np.count_nonzero(usable) if made.cost is None and not made.shared else np.prod(usable.shape[:-1])
    limit = max(float(stages), float(gates.group(np.array(max(float(free), 1.0)), band)))
    if whole <= limit * due:
        return Loss(relative, expected)
    times = f"{np.sqrt(whole / due):.0f} times" if due > 0 else "and not"
    return Loss(
        relative,
        expected,
        f"its declared roundings lose {relative:.1e} of it (relative L2 against float64), {times} the {expected:.1e} that they cost where"
        f" each is an error of its own; {stages} of those stages together would lose {expected * np.sqrt(stages):.1e}",
    )


def _cost(made: Prediction) -> Float:
    """Variance of the declared roundings, each by itself and in a format that never ends; what a row shares included."""
    cost = made.variance + (0.0 if made.cost is None else made.cost)
    if made.row is not None:
        cost = cost + np.square(made.plain.reshape(-1, made.width) * made.row).reshape(cost.shape)
    last = variance(made.plain, made.format) - variance(made.plain, endless(made.format))
    return np.asarray(np.maximum(cost - np.maximum(last, 0.0), 0.0))
