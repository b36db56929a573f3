"""What every probe is given and what it leaves: the side on its bench, and the outcome.

Owns :class:`Bench`, :class:`Outcome` and how a judged run becomes an outcome.  Refuses to know any single probe.  Called by the probes of
this package.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aprender.arithmetic import Profile
from aprender.captures import Array, Captures
from aprender.judge import metrics
from aprender.judge.local import HEALS, local
from aprender.judge.verdict import SUBJECT, Fault, Party, Verdict, decide
from aprender.judge.witness import ModelData
from aprender.stages import LOGITS, Key

HEISENBUG, NONDETERMINISTIC, UNEXPLAINED, OPERATION = "heisenbug", "nondeterministic", "unexplained", "operation"
UNSTABLE = (HEISENBUG, NONDETERMINISTIC)
"""Findings that come before any single stage: what was judged is not what the side does every time."""

AGREE, DIVERGENCE, NOT_RUN = "agree", "divergence", "not_run"


@dataclass(frozen=True)
class Outcome:
    """What one probe found.

    Attributes
    ----------
    probe : str
    state : str
        ``agree``, ``divergence`` or ``not_run``.
    text : str
        What was found, or why the probe cannot run here.
    finding : str or None
    wrong : tuple of Fault
    tokens : tuple of int
        What was run; empty if no sequence was.
    judged : Verdict or None
        Of a probe that judges the stages of a sequence.
    """

    probe: str
    state: str
    text: str
    finding: str | None = None
    wrong: tuple[Fault, ...] = ()
    tokens: tuple[int, ...] = ()
    judged: Verdict | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, Any]:
        """The keys that scripts rely on."""
        first = self.wrong[0].to_json() if self.wrong else None
        return {
            "probe": self.probe, "state": self.state, "finding": self.finding, "first": first, "text": self.text,
            "tokens": list(self.tokens),
        }  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """A side to be probed, with what the prompt has shown already.

    Attributes
    ----------
    side : Side
    profile : Profile
        Its arithmetic.
    whole : Captures
        The prompt in one piece.
    model : ModelData or None
        Its weights, for the judge.
    hparams : mapping
    """

    side: Any
    profile: Profile
    whole: Captures
    model: ModelData | None
    hparams: Mapping[str, int | float]

    def lengthened(self, tokens: int, first: int = 0) -> tuple[int, ...]:
        """The prompt's ids from a place on, repeated or cut to so many tokens, and never beyond the context of the model."""
        room = int(self.hparams.get("context") or tokens)
        return tuple(itertools.islice(itertools.cycle(self.whole.tokens), first, first + min(tokens, room)))

    def captured(self, ids: tuple[int, ...]) -> Captures:
        """The ids in one piece; the prompt is not run again."""
        return self.whole if ids == self.whole.tokens else self.side.capture(ids)

    def judged(self, captures: Captures, against: Captures | None = None) -> Verdict:
        """Every stage on its own inputs; ``against`` is another run of the same side, for the free comparison."""
        party = Party(self.side.spelling, self.profile.name, results=local(captures, self.model, self.profile))
        free = {} if against is None else metrics.compare(captures, against)
        return decide(party, Party(self.side.spelling, self.profile.name), free, captures.tokens)


def measured(judged: Verdict) -> int:
    """Stages with a local verdict."""
    return sum(row.result is not None and row.result.measured for row in judged.rows)


def healed(judged: Verdict) -> str:
    """What the stages are equal up to, where they only look wrong; empty if none does."""
    said = dict.fromkeys(row.result.reason for row in judged.rows if row.state == HEALS and row.result is not None)
    return "".join(f"; {reason}" for reason in said)


def outcome(probe: str, judged: Verdict, unequal: Fault | None = None, attested: bool | None = None) -> Outcome:
    """What a judged run makes of a probe.

    Parameters
    ----------
    probe : str
    judged : Verdict
    unequal : Fault, optional
        A stage that is right but not equal to that of another cutting: it remains unexplained.
    attested : bool, optional
        Of the run: False where its logits are not those without capturing.
    """
    if attested is False:
        return Outcome(probe, DIVERGENCE, unattested().reason, HEISENBUG, (unattested(),), judged.tokens, judged)
    if judged.verdict == DIVERGENCE:
        return Outcome(probe, DIVERGENCE, judged.sentence, judged.finding, judged.wrong, judged.tokens, judged)
    if unequal is not None:
        return Outcome(probe, DIVERGENCE, unequal.reason, UNEXPLAINED, (unequal,), judged.tokens, judged)
    count = measured(judged)
    if not count:
        return Outcome(probe, NOT_RUN, "no stage could be judged", tokens=judged.tokens)
    return Outcome(
        probe, AGREE, f"{count} stages of {len(judged.tokens)} tokens are right{healed(judged)}", tokens=judged.tokens, judged=judged
    )


def certain(key: Key, kind: str, reason: str) -> Fault:
    """A difference of bits: nothing is estimated, so it is certain."""
    return Fault(SUBJECT, key[1], key[0], kind, 1.0, reason)


def unattested() -> Fault:
    """The fault of a capture that changes the logits."""
    return certain(LOGITS, HEISENBUG, "the logits differ when nothing is captured: what was judged is not what makes the text")


def same(a: Array, b: Array) -> bool:
    """Bit for bit; two different NaN are different."""
    return a.shape == b.shape and np.array_equal(np.ascontiguousarray(a).view(np.uint32), np.ascontiguousarray(b).view(np.uint32))
