"""What a free difference of two sides is made of: quantisation, each side's arithmetic, and a bug if there is one.

Owns the decomposition and its line in the report.  Refuses to decide that there is a bug: that is closure's limit.  Called by
``judgement``.

With S and R the free values of subject and reference, W_s and W_r the witness on each side's weights, N_s and N_r the means of the passes
with rounding noise,

    S - R = (S - N_s) + (N_s - W_s) + (W_s - W_r) + (W_r - N_r) + (N_r - R):

bug or noise, arithmetic, quantisation, arithmetic, bug or noise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aprender import stages
from aprender.arithmetic import profile
from aprender.captures import Captures
from aprender.judge.closure import Closed, allowed, leftover
from aprender.judge.passes import Free
from aprender.judge.replay import Replay
from aprender.judge.witness import ModelData


@dataclass(frozen=True)
class Own:
    """What one side adds to a difference, relative to the norm of the reference.

    Attributes
    ----------
    total : float
        The side minus the witness on its own weights.
    arithmetic : float or None
        What its rounding noise makes of that, as predicted; None where it was not.
    bug : float or None
        What its rounding noise does not explain; 0 where closure holds, None where it was not run.
    """

    total: float
    arithmetic: float | None = None
    bug: float | None = None

    def text(self) -> str:
        """In words."""
        predicted = "" if self.arithmetic is None else f" (rounding noise predicts {self.arithmetic:.1e})"
        return f"{self.total:.1e}{predicted}{f', of which {self.bug:.1e} is a bug' if self.bug else ''}"


@dataclass(frozen=True)
class Parts:
    """The free difference of one stage as a sum of vectors, by their norms relative to the reference; norms do not add up.

    Attributes
    ----------
    stage : str
    layer : int or None
    apart : float
        Subject minus reference.
    quantization : float
        Witness on the subject's weights minus witness on the reference's.
    subject, reference : Own
        Each side minus the witness on its own weights.
    """

    stage: str
    layer: int | None
    apart: float
    quantization: float
    subject: Own
    reference: Own

    def text(self) -> str:
        """One line for the report."""
        return (
            f"{stages.spell((self.stage, self.layer))}: {self.apart:.1e} apart = quantisation {self.quantization:.1e} + the subject's"
            f" arithmetic and bugs {self.subject.text()} + the reference's {self.reference.text()}; relative L2 of three vectors, which add"
            " up where their lengths do not"
        )

    def to_json(self) -> dict[str, object]:
        """All figures."""
        return dataclasses.asdict(self)


def decompose(sides: Sequence[tuple[Captures, ModelData]], free: Sequence[Free], rows: Sequence[Sequence[Closed]]) -> Parts | None:
    """The parts of the difference at the last stage that both sides show for all tokens.

    Parameters
    ----------
    sides : sequence of (Captures, ModelData)
        Subject and reference.
    free : sequence of mapping
        Witness of each.
    rows : sequence of sequence of Closed
        What closure found of each; may be empty.

    Returns
    -------
    Parts or None
        None where no such stage is finite on both sides.
    """
    own, other = (Replay.of(captures, model, profile("exact")) for captures, model in sides)  # nothing is replayed: any row will do
    for key in reversed(own.wires):
        if key not in free[1] or key in own.sample.last or key in other.sample.last:
            continue
        left, right = leftover(own, key, free[0]), leftover(other, key, free[1])
        if left is None or right is None or left.shape != right.shape:
            continue
        weights = (free[0][key] - free[1][key]) * allowed(own, key)
        size = float(np.linalg.norm(other.captured(key)))
        apart, cost, *each = (float(np.linalg.norm(part)) for part in (left + weights - right, weights, left, right))
        if size > 0 and all(map(math.isfinite, (size, apart, cost, *each))):
            closed = [next((row for row in found if row.key == key), None) for found in rows]
            return Parts(*key, apart / size, cost / size, *(_own(total, row, size) for total, row in zip(each, closed, strict=True)))
    return None


def _own(total: float, row: Closed | None, size: float) -> Own:
    """One side's part."""
    if row is None:
        return Own(total / size)
    return Own(total / size, None if row.rounding is None else row.rounding / size, 0.0 if row.holds else row.leftover / size)
