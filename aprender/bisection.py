"""From two spellings to a verdict: open the sides, agree on token ids, run, judge, collect what the report shows.

Owns the order of a hunt: token ids first (``asking``), then the judgement of the pair (``judgement``), then the probes, the answers and the
step to judge.  Refuses to compare unlike things and to call anything wrong itself: that is ``judge.verdict``. Called by ``import aprender``
(:func:`compare`), by the command ``bisect`` and by parity tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import aprender
from aprender import arithmetic, parity, sides, stages
from aprender import probes as probing
from aprender.asking import Ask, resolve, tokens_differ
from aprender.captures import Captures
from aprender.declared import AUTO
from aprender.errors import CannotRun
from aprender.judge import planting
from aprender.judge.verdict import Fault, Verdict
from aprender.judgement import Hunt, judge, undecided
from aprender.references import WitnessSide, recorded
from aprender.sides.own import OwnSide
from aprender.sides.saved import SavedSide

ANSWER = 16
"""Tokens of the greedy answer that a report shows."""


@dataclass(frozen=True)
class Report:
    """A verdict and what a reader needs beside it.

    Attributes
    ----------
    judged : Verdict
    prompt : str or None
        Text that the ids came from.
    answers : tuple of (str, str)
        Label and greedy text.
    notes : tuple of str
    reproduce : str
        Command line that makes this report again.
    subject, reference : Captures or None
        What was compared; None where no run was needed to decide.
    probed : tuple of Outcome
        What each probe that was asked for found, or why it could not run.
    operations : tuple of Operation
        Of our own engine on two devices: how far they agree, operation by operation.
    """

    judged: Verdict
    prompt: str | None = None
    answers: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    reproduce: str = ""
    subject: Captures | None = field(default=None, repr=False)
    reference: Captures | None = field(default=None, repr=False)
    probed: tuple[probing.Outcome, ...] = field(default=(), repr=False)
    operations: tuple[parity.Operation, ...] = field(default=(), repr=False)

    @property
    def verdict(self) -> str:
        """``agree``, ``divergence`` or ``not_comparable``."""
        return self.judged.verdict

    @property
    def first(self) -> Fault | None:
        """First wrong operation."""
        return self.judged.first

    @property
    def sentence(self) -> str:
        """Where, what kind, how sure."""
        return self.judged.sentence

    @property
    def exit_code(self) -> int:
        """0 agree, 1 divergence, 3 not comparable."""
        return {"agree": 0, "divergence": 1}.get(self.verdict, 3)

    def to_json(self) -> dict[str, Any]:
        """The keys that scripts rely on, and the sentence, answers, notes and command."""
        extra = {
            "sentence": self.sentence,
            "prompt": self.prompt,
            "answers": dict(self.answers),
            "notes": list(self.notes),
            "reproduce": self.reproduce,
            "probed": [outcome.to_json() for outcome in self.probed],
            "operations": [row.to_json() for row in self.operations],
        }
        return self.judged.to_json() | extra


# ---- the hunt ------------------------------------------------------------------------------------------------------------------------


def open_hunt(
    subject: str | None = None,
    against: str | None = None,
    plant: str | Sequence[str] | None = None,
    profiles: Mapping[str, str] | None = None,
    closure: bool = False,
) -> Hunt:
    """Open the sides.

    Parameters
    ----------
    subject, against : str, optional
        Spellings of sides; ``witness`` alone runs on the subject's weights.  The embedded model is judged if none is given.
    plant : str or sequence of str, optional
        ``NAME[@SELECTOR]``: a catalogue fault to plant in our own engine, or several.
    profiles : mapping, optional
        ``subject`` or ``reference`` to an arithmetic that replaces the declared one; ``auto`` is the one that fits best.
    closure : bool
        Run all of closure, whatever it costs.
    """
    named = {party: name for party, name in (profiles or {}).items() if name != AUTO}
    rows = {party: arithmetic.profile(name) for party, name in named.items()}  # a wrong name is said before anything is opened
    right: Any = None
    planted = [plant] if isinstance(plant, str) else list(plant or ())
    if planted:
        right = _open(subject, None)
        if not isinstance(right, OwnSide):
            raise CannotRun(f"a fault can be planted in our own engine only, not in {subject}", code="PLANT")
        data = right.model_data()
        edits = [edit for name in planted for edit in planting.plant(name, data["flags"], data["hparams"]).edits]
        own: Any = OwnSide(right.path, backend=right.backend, edits=edits, spelling=right.spelling)
    else:
        own = _open(subject, None)
    other = None if against is None else _open(against, own)
    for party, side in (("subject", own), ("reference", other)):
        if side is not None and party in rows and hasattr(side, "declare"):  # a side that can run in more than one arithmetic
            side.declare(rows[party])
    return Hunt(own, other, right, " and ".join(planted) or None, profiles or {}, closure)


def _open(spelling: str | None, subject: Any) -> Any:
    """A side by its spelling, the witness included; the embedded model if there is none."""
    if spelling is None:
        return OwnSide(aprender.canary(), spelling="canary.gguf")
    if spelling != "witness" and not spelling.startswith("witness:"):
        return sides.open_side(spelling)
    name = spelling.partition(":")[2]
    if not name and subject is None:
        raise CannotRun("the witness needs weights: witness:MODEL", code="WEIGHTS")
    return WitnessSide(sides.open_side(name) if name else subject, spelling)


def _silent(share: float) -> None:
    """Nobody wants to know how far it is."""


def hunt(
    opened: Hunt,
    ask: Ask,
    answer: int = ANSWER,
    steps: int = 0,
    progress: Callable[[float], None] = _silent,
    probes: Sequence[str] = (),
) -> Report:
    """Run both sides on one question and judge them.

    Parameters
    ----------
    opened : Hunt
    ask : Ask
    answer : int
        Tokens of the greedy answers to show; 0 shows none.
    steps : int
        Tokens to generate (the reference's drive both); the first step whose choice differs is judged, else the last.
    progress : callable, optional
        Told the share that is done, 0 … 1, after each part of the work.
    probes : sequence of str, optional
        Names of probes to run on the subject beyond the prompt.
    """
    subject, reference = opened.subject, opened.reference
    own, other, prompt = resolve(subject, reference, ask)
    if own != other and not ask.same_ids:
        return Report(undecided(opened, own, tokens_differ(subject, reference, own, other)), prompt)
    ids, notes = other, []
    if reference is None:
        reference = recorded(subject, ids) or WitnessSide(subject, "witness")
        found = "recorded beside the model" if isinstance(reference, SavedSide) else "float64 definitions on the subject's own weights"
        notes.append(f"reference: {reference.spelling}, {found}")
    prompted = len(ids)
    if steps:
        ids, said = _differing_step(subject, reference, ids, steps)
        notes.append(said)
    opened, judged, left, right, more = judge(opened, reference, ids, progress, [prompted, *[1] * (len(ids) - prompted)])
    devices = parity.table(left, right) if _two_devices(subject, reference) else ()
    notes += [parity.sentence(devices)] if devices else []
    probed = probing.probe(subject, opened.profile_of("subject", subject), left, probes)
    judged = probing.combine(judged, probed, left.manifest.attestation)
    more.append(probing.rests(judged.probes, probed))
    answers = _answers(opened, reference, ids, answer) if answer else ()
    return Report(judged, prompt, answers, tuple(notes + more), "", left, right, probed, devices)


def _two_devices(subject: Any, reference: Any) -> bool:
    """Whether both sides are our own engine, on different devices."""
    return isinstance(subject, OwnSide) and isinstance(reference, OwnSide) and subject.backend != reference.backend


# ---- answers and steps ---------------------------------------------------------------------------------------------------------------


def _text(side: Any, fallback: Any, ids: Sequence[int]) -> str:
    tokenizer = side.tokenizer() or fallback.tokenizer()
    return repr(tokenizer.decode(list(ids))) if tokenizer else " ".join(map(str, ids))


def _answers(opened: Hunt, reference: Any, ids: Sequence[int], n: int) -> tuple[tuple[str, str], ...]:
    """Greedy texts to show, the right one beside that of a planted fault."""
    subject = opened.subject
    out = []
    if not isinstance(subject, SavedSide):
        label = f"answer with {opened.planted}" if opened.planted else "answer"
        out.append((label, _text(subject, subject, subject.generate(ids, n))))
    if opened.right is not None:
        out.append(("right answer", _text(opened.right, subject, opened.right.generate(ids, n))))
    elif isinstance(reference, SavedSide):
        if reference.captures.manifest.answer is not None:
            out.append(("reference's answer", repr(reference.captures.manifest.answer)))
    elif not isinstance(reference, WitnessSide):
        out.append(("reference's answer", _text(reference, subject, reference.generate(ids, n))))
    return tuple(out)


def _differing_step(subject: Any, reference: Any, ids: Sequence[int], steps: int) -> tuple[tuple[int, ...], str]:
    """Ids up to the first generated token on which the sides choose differently, the reference's tokens driving both."""
    if isinstance(reference, SavedSide):
        raise CannotRun("a recorded reference cannot generate: --steps needs --against a side that runs", code="STEPS")
    driven = reference.generate(ids, steps)
    full = (*ids, *driven)
    if not driven:
        return tuple(ids), "steps: the reference ends at once"
    if isinstance(subject, OwnSide):
        last = subject.logits(full, len(ids))
    else:
        last = subject.capture(full, lambda key: key == stages.LOGITS)[stages.LOGITS]
    chosen = [int(np.argmax(row)) for row in last[len(ids) - 1 : -1]]
    for step, (mine, theirs) in enumerate(zip(chosen, driven, strict=True)):
        if mine != theirs:
            return full[
                : len(ids) + step
            ], f"steps: the first choice that differs is step {step}: {mine} against {theirs}; that step is judged"
    return full[:-1], f"steps: all {len(driven)} choices are equal; the last step is judged"


def compare(
    subject: str | None = None,
    against: str | None = None,
    *,
    prompt: str | None = None,
    prompt_ids: Sequence[int] | None = None,
    plant: str | Sequence[str] | None = None,
    same_ids: bool = False,
    answer: int = ANSWER,
    steps: int = 0,
    probe: str | None = None,
    closure: bool = False,
) -> Report:
    """Judge one side, against another if given.

    Parameters
    ----------
    subject : str, optional
        Spelling of a side (``model.gguf``, ``folder/``, ``hf:NAME@float16``, ``saved:folder``); the embedded canary if not given.
    against : str, optional
        The reference; if not given, stages recorded beside the model for just this prompt, else the witness on the subject's weights.
    prompt : str, optional
        Raw text; special tokens as the container's tokenizer declares.
    prompt_ids : sequence of int, optional
        Token ids instead of a text.
    plant : str or sequence of str, optional
        A catalogue fault to plant in our own engine first, ``NAME[@SELECTOR]``, or several.
    same_ids : bool
        Run both sides on the reference's ids even if they cut the text differently.
    answer : int
        Tokens of the greedy answers to show.
    steps : int
        Generate so many tokens and judge the first step that differs.
    probe : str, optional
        Names of probes with commas between them, or ``all``; the prompt alone if not given.
    closure : bool
        Run all of closure, whatever it costs; a large model is cut short otherwise, and the notes say so.

    Returns
    -------
    Report

    Raises
    ------
    NotComparable
        The sides hold unlike things; the message has both values.

    Examples
    --------
    >>> aprender.compare().verdict
    'agree'
    >>> report = aprender.compare(plant="transposed@lm_head")
    >>> report.verdict, report.first.stage
    ('divergence', 'lm_head')
    """
    chosen = probing.parse(probe)
    opened = open_hunt(subject, against, plant, closure=closure)
    ask = Ask(prompt, None if prompt_ids is None else tuple(prompt_ids), same_ids)
    try:
        return hunt(opened, ask, answer, steps, probes=chosen)
    finally:
        for side in (opened.subject, opened.reference, opened.right):
            if side is not None:
                side.close()


def with_command(report: Report, command: str) -> Report:
    """The report with the command line that makes it again."""
    return dataclasses.replace(report, reproduce=command)


__all__ = ["Report", "compare", "hunt", "open_hunt", "with_command"]
