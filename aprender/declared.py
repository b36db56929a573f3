"""Under which arithmetic a side is judged: the one that it declares, the one that its numbers show, or none.

Owns the choice (:func:`settle`) and the sentences of finding ``undeclared_arithmetic`` for a whole side.  Refuses to choose for a stage,
and to doubt a declaration that operations bear out: a side is asked what else it may be only if most kinds of operations are wrong wherever
they occur, or most stages hold numbers that the declared format does not have.  Called by ``judgement`` for each side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aprender import arithmetic, stages
from aprender.arithmetic import Profile
from aprender.captures import Captures
from aprender.judge.inference import infer
from aprender.judge.local import WRONG, StageResult, local
from aprender.judge.rounding import to_format
from aprender.judge.roundings import UNDECLARED
from aprender.judge.verdict import Verdict
from aprender.judge.witness import ModelData

AUTO = "auto"
"""In place of a row's name: the row that fits best."""


@dataclass(frozen=True)
class Settled:
    """A side with the arithmetic that it is judged under.

    Attributes
    ----------
    profile : Profile
    results : sequence of StageResult
        Its stages, judged under that.
    note : str
        Which rows fit how well; empty if none was asked.
    instead : str
        What is wrong with the declaration, without a full stop; empty if nothing is.
    fits : bool
        Whether the side as a whole is of that arithmetic.
    """

    profile: Profile
    results: Sequence[StageResult]
    note: str = ""
    instead: str = ""
    fits: bool = True


def settle(party: str, spelling: str, captures: Captures, model: ModelData | None, declared: Profile, auto: bool = False) -> Settled:
    """Judge a side under the arithmetic that it has.

    Parameters
    ----------
    party, spelling : str
        ``subject`` or ``reference``, and how the user wrote it.
    captures : Captures
    model : ModelData or None
    declared : Profile
    auto : bool
        Take the row that fits best instead of the declared one.

    Returns
    -------
    Settled
    """
    results = [] if auto else local(captures, model, declared)
    if not auto and not _misfit(results) and not _finer(captures, declared):
        return Settled(declared, results)
    found = infer(captures, model, declared)
    note = f"arithmetic of the {party}: {found.text()}"
    best = arithmetic.profile(found.best.profile)
    if auto or best.name != declared.name:
        other = local(captures, model, best)
        if not _misfit(other) and not _finer(captures, best):
            instead = "" if auto else f"{spelling} is declared as {declared.name}, but its numbers are those of {found.text()}"
            return Settled(best, other, note, instead)
        results = other if auto else results
    kept = best if auto else declared
    return Settled(kept, results, note, f"No declared arithmetic fits the {party} ({spelling}): the best is {found.text()}", fits=False)


def _misfit(results: Sequence[StageResult]) -> bool:
    """Whether most kinds of operations are wrong at every stage that has them."""
    kinds: dict[str, list[bool]] = {}
    for result in results:
        if result.measured:
            kinds.setdefault(stages.stage(result.stage).op, []).append(result.state == WRONG)
    return 2 * sum(all(found) for found in kinds.values()) > len(kinds)


def _finer(captures: Captures, declared: Profile) -> bool:
    """Whether most stages hold numbers that the declared format does not have: a finer one passes every test of rounding noise."""
    fmt = declared.activations
    if fmt == arithmetic.F32:
        return False
    stray = 0
    for value in captures.values():
        wide = np.asarray(value, np.float64)
        stray += not np.array_equal(to_format(wide, fmt), wide, equal_nan=True)
    return 2 * stray > len(captures)


def led(judged: Verdict, settled: Settled) -> Verdict:
    """The verdict, led by ``undeclared_arithmetic`` where a side is not what it declares and no stage explains why.

    A wrong operation under the row that does fit stays the finding.
    """
    if not settled.instead or (settled.fits and judged.verdict != "agree"):
        return judged
    return judged.led_by(UNDECLARED, f"{settled.instead}. Under {settled.profile.name}: {judged.sentence}")
