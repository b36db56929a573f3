"""After a value that is not finite: put the witness's in its place and go on, so that later faults of the same run are still seen.

Owns which value is repaired (the first stage with an element that is not finite where the replay on its own inputs has a number), the
second run, and one list of results out of both.  Refuses to repair what the declared arithmetic itself makes infinite, and a side that
cannot be given values (``capture_fed``): its results stay as they are.  Called by ``judgement``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from aprender import stages
from aprender.arithmetic import Profile
from aprender.captures import Array, Captures
from aprender.judge.local import StageResult, inherited, local
from aprender.judge.replay import Replay, Unlike, Unmeasured
from aprender.judge.witness import ModelData
from aprender.stages import Key

MOST = 8
"""Stages that are repaired in one run: a model whose weights are lost has more, and the first of them say so."""


def judged(
    side: Any, captures: Captures, model: ModelData | None, profile: Profile, results: Sequence[StageResult] | None = None
) -> tuple[list[StageResult], list[str]]:
    """Every stage judged on its own inputs, those after a value that is not finite on a repaired run; and what was repaired, in words.

    Parameters
    ----------
    side : Side
    captures : Captures
        Of one of its runs, from position 0.
    model : ModelData or None
    profile : Profile
        As for :func:`~aprender.judge.local.local`.
    results : sequence of StageResult, optional
        What that has found already.
    """
    results = local(captures, model, profile) if results is None else list(results)
    feed: dict[Key, Array] = {}
    said: list[str] = []
    while hasattr(side, "capture_fed") and model is not None and len(feed) < MOST:
        found = _first_broken(captures, model, profile, feed)
        if found is None:
            break
        key, value, count = found
        feed[key] = value
        captures = side.capture_fed(captures.tokens, feed)
        results = _from(key, results, local(captures, model, profile))
        what = "value that is" if count == 1 else "values that are"
        said.append(
            f"{stages.spell(key)} has {count} {what} not finite: replaced by the witness's, and the run went on, so that what comes after"
            " is judged too"
        )
    if said:
        results = inherited(results, Replay.of(captures, model, profile))
    return results, said


def _first_broken(captures: Captures, model: ModelData, profile: Profile, repaired: dict[Key, Array]) -> tuple[Key, Array, int] | None:
    """The first stage that is not finite of its own accord, with the repaired value and how many elements that concerns."""
    notes = captures.manifest.tensors
    replay = Replay.of(captures, model, profile.with_order(captures.manifest.arithmetic))
    for key in replay.wires:
        if key in repaired or key not in notes or not notes[key].nonfinite:
            continue
        try:
            captured = replay.captured(key)
            with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
                due = replay.predict(key, key in replay.sample.last, captured)[0].bits()
        except (Unmeasured, Unlike):
            continue
        wrong = ~np.isfinite(captured) & np.isfinite(due)
        if wrong.any() and captured.shape == captures[key].shape:
            return key, np.where(wrong, due, captured).astype(np.float32), int(np.count_nonzero(wrong))
    return None


def _from(key: Key, before: Sequence[StageResult], after: Sequence[StageResult]) -> list[StageResult]:
    """Results of a run up to a stage, and those of the repaired run behind it."""
    at = stages.order(key)
    return [new if stages.order(new.key) > at else old for old, new in zip(before, after, strict=True)]
