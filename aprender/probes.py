"""Probes: ways of running a side that make a class of bugs visible which one prompt in one piece cannot show.

Owns the rows (:data:`PROBES`), what each demands of a side, and how their outcomes and the verdict on the prompt become one verdict.
Refuses to count a probe that could not run: it is named as not run, with the reason.  A probe judges as everything else is judged (each
stage on its own inputs, ``judge.verdict``) or compares bits of two runs of the same side; it never compares two engines.  Called by
``bisection``.

A side that can run a sequence in pieces on one cache has ``capture_pieces`` and so promises the same bits for every cutting.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aprender import stages
from aprender.arithmetic import Profile
from aprender.captures import Array, Captures
from aprender.errors import CannotRun, NotComparable, UnknownName
from aprender.judge import metrics
from aprender.judge.verdict import SUBJECT, Fault, Party, Verdict, decide, local
from aprender.judge.witness import ModelData
from aprender.manifest import LAST
from aprender.references import candidates, weights_of
from aprender.sides.saved import SavedSide
from aprender.stages import LOGITS, Key

PROMPT = "prompt"
"""The run that every verdict rests on: the question in one piece, as the side does it by itself."""
ALL = "all"

HEISENBUG, NONDETERMINISTIC, UNEXPLAINED, OPERATION = "heisenbug", "nondeterministic", "unexplained", "operation"
UNSTABLE = (HEISENBUG, NONDETERMINISTIC)
"""Findings that come before any single stage: what was judged is not what the side does every time."""

AGREE, DIVERGENCE, NOT_RUN = "agree", "divergence", "not_run"

PIECES = (13, 1, 11, 15)
"""Tokens of ragged pieces: odd, so that no piece fills a tile or begins where one does, and one of them a single token."""
SHORT, LONG, DECODED = 3, 128, 8
"""Tokens of a short and of a long sequence, and how many are decoded one by one."""


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
        What was run; empty if nothing was.
    judged : Verdict or None
        Of a probe that judges stages.
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

    def lengthened(self, tokens: int) -> tuple[int, ...]:
        """The prompt's ids, repeated or cut to so many tokens, and never beyond the context of the model."""
        room = int(self.hparams.get("context") or tokens)
        return tuple(itertools.islice(itertools.cycle(self.whole.tokens), min(tokens, room)))

    def captured(self, ids: tuple[int, ...]) -> Captures:
        """The ids in one piece; the prompt is not run again."""
        return self.whole if ids == self.whole.tokens else self.side.capture(ids)

    def judged(self, captures: Captures, against: Captures | None = None) -> Verdict:
        """Every stage on its own inputs; ``against`` is another run of the same side, for the free comparison."""
        party = Party(self.side.spelling, self.profile.name, results=local(captures, self.model, self.profile))
        free = {} if against is None else metrics.compare(captures, against)
        return decide(party, Party(self.side.spelling, self.profile.name), free, captures.tokens)


# ---- probes that judge stages --------------------------------------------------------------------------------------------------------


def _outcome(probe: str, judged: Verdict, unequal: Fault | None = None) -> Outcome:
    """What a judged run makes of a probe; stages that are right but not equal to those of another cutting remain unexplained."""
    if judged.verdict == DIVERGENCE:
        return Outcome(probe, DIVERGENCE, judged.sentence, judged.finding, judged.wrong, judged.tokens, judged)
    if unequal is not None:
        return Outcome(probe, DIVERGENCE, unequal.reason, UNEXPLAINED, (unequal,), judged.tokens, judged)
    count = sum(row.result is not None and row.result.measured for row in judged.rows)
    if not count:
        return Outcome(probe, NOT_RUN, "no stage could be judged", tokens=judged.tokens)
    return Outcome(probe, AGREE, f"{count} stages of {len(judged.tokens)} tokens are right", tokens=judged.tokens)


def _sequence(tokens: Callable[[int], int]) -> Callable[[str, Bench], Outcome]:
    """A probe that runs another number of tokens (a function of the prompt's) in one piece."""

    def run(probe: str, bench: Bench) -> Outcome:
        captures = bench.side.capture(bench.lengthened(tokens(len(bench.whole.tokens))))
        return _outcome(probe, bench.judged(captures))

    return run


def _pieces(tokens: Callable[[int], int], sizes: Callable[[int], list[int]]) -> Callable[[str, Bench], Outcome]:
    """A probe that runs a sequence in pieces: judged, and bit-equal to the rows of the sequence in one piece."""

    def run(probe: str, bench: Bench) -> Outcome:
        if not hasattr(bench.side, "capture_pieces"):
            raise CannotRun("this side runs a sequence in one piece only", code="PROBE")
        ids = bench.lengthened(tokens(len(bench.whole.tokens)))
        cut = sizes(len(ids))
        whole, pieces = bench.captured(ids), bench.side.capture_pieces(ids, cut)
        key = next((key for key in pieces if key in whole and not _same(pieces[key], whole[key])), None)
        unequal = None
        if key is not None:
            unequal = _fault(key, "chunking", f"{stages.spell(key)} is not bit-equal to that of the same tokens in one piece")
        return _outcome(probe, bench.judged(pieces, whole), unequal)

    return run


def _decoded(tokens: int) -> list[int]:
    """A prompt and then single tokens."""
    single = min(DECODED, tokens - 1)
    return [tokens - single, *[1] * single]


def _ragged(tokens: int) -> list[int]:
    """Uneven pieces, again and again."""
    out: list[int] = []
    for size in itertools.cycle(PIECES):
        if sum(out) + size >= tokens:
            return [*out, tokens - sum(out)]
        out.append(size)
    return out


# ---- probes that compare bits of two runs --------------------------------------------------------------------------------------------


def _same(a: Array, b: Array) -> bool:
    """Bit for bit; two different NaN are different."""
    return a.shape == b.shape and np.array_equal(np.ascontiguousarray(a).view(np.uint32), np.ascontiguousarray(b).view(np.uint32))


def _fault(key: Key, kind: str, reason: str) -> Fault:
    """A difference of bits: nothing is estimated, so it is certain."""
    return Fault(SUBJECT, key[1], key[0], kind, 1.0, reason)


def _bits(probe: str, tokens: Sequence[int], finding: str, fault: Fault | None, well: str) -> Outcome:
    if fault is None:
        return Outcome(probe, AGREE, well, tokens=tuple(tokens))
    return Outcome(probe, DIVERGENCE, fault.reason, finding, (fault,), tuple(tokens))


def _rows(array: Array, key: Key, count: int) -> Array:
    """The first rows of a stage, and of its keys the first ones."""
    for axis, name in enumerate(stages.stage(key[0]).shape):
        if name in "TJ":
            array = np.take(array, range(count), axis=axis)
    return array


def _causal(probe: str, bench: Bench) -> Outcome:
    """Other last tokens: no earlier row may move."""
    ids = bench.lengthened(max(len(bench.whole.tokens), 4))
    early, vocab = len(ids) - max(1, len(ids) // 4), int(bench.hparams["vocab"])
    if early < 1:
        raise CannotRun("a context of one token has no earlier rows", code="PROBE")
    changed = (*ids[:early], *((token + 1 + vocab // 2) % vocab for token in ids[early:]))
    a, b = bench.captured(ids), bench.side.capture(changed)
    fault = None
    keys = [key for key in a if key in b and set(stages.stage(key[0]).shape) & {"T", "J"} and a.manifest.tensors[key].positions != LAST]
    if not keys:
        raise CannotRun("this side shows no stage of earlier tokens", code="PROBE")
    for key in keys:
        x, y = _rows(a[key], key, early), _rows(b[key], key, early)
        if not _same(x, y):
            fault = _fault(key, "not causal", f"rows of the first {early} tokens of {stages.spell(key)} move with the tokens after them")
            break
    return _bits(probe, changed, OPERATION, fault, f"the first {early} rows of {len(keys)} stages do not depend on later tokens")


def _repeat(probe: str, bench: Bench) -> Outcome:
    """The same once more: the same bits."""
    first, again = bench.whole, bench.side.capture(bench.whole.tokens)
    key = next((key for key in first if key not in again or not _same(first[key], again[key])), None)
    reason = "" if key is None else f"two runs of the same tokens differ, first at {stages.spell(key)}: no single run stands for this side"
    fault = None if key is None else _fault(key, NONDETERMINISTIC, reason)
    return _bits(probe, first.tokens, NONDETERMINISTIC, fault, f"{len(first)} stages have the same bits in a second run")


def _traced(probe: str, bench: Bench) -> Outcome:
    """Logits of the captured run against those of a run that captures nothing."""
    whole = bench.whole
    if LOGITS not in whole:
        raise CannotRun("this side shows no logits", code="PROBE")
    if hasattr(bench.side, "logits"):
        plain = bench.side.logits(whole.tokens)
    else:
        plain = bench.side.capture(whole.tokens, lambda key: key == LOGITS)[LOGITS]
    shown = whole[LOGITS]
    same = _same(shown, plain[-len(shown) :]) and whole.manifest.attestation is not False
    return _bits(probe, whole.tokens, HEISENBUG, None if same else _unattested(), "the logits are the same bits with and without capturing")


def _unattested() -> Fault:
    return _fault(LOGITS, HEISENBUG, "the logits differ when nothing is captured: what was judged is not what makes the text")


# ---- the rows ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """One way of running a side.

    Attributes
    ----------
    name : str
    text : str
        What is run, for the list of probes.
    sees : str
        What only this makes visible: named as not seen where the probe did not run.
    run : callable
        Name and bench to the outcome; raises :class:`CannotRun` where the side has no such way of running.
    """

    name: str
    text: str
    sees: str
    run: Callable[[str, Bench], Outcome] = field(repr=False)


PROBES: Mapping[str, Probe] = {
    row.name: row
    for row in (
        Probe("one", "the first token alone", "operations on a single row", _sequence(lambda tokens: 1)),
        Probe("short", f"{SHORT} tokens", "tiles that are not full", _sequence(lambda tokens: SHORT)),
        Probe("long", f"{LONG} tokens or more", "longer contexts", _sequence(lambda tokens: max(LONG, tokens))),
        Probe("decode", "a prompt, then token by token", "decoding", _pieces(lambda tokens: max(tokens, 4), _decoded)),
        Probe("ragged", f"pieces of {'/'.join(map(str, PIECES))}", "chunks", _pieces(lambda tokens: max(tokens, sum(PIECES)), _ragged)),
        Probe("causal", "other last tokens: earlier rows stay", "leaks from later tokens", _causal),
        Probe("repeat", "twice: the same bits", "results that change from run to run", _repeat),
        Probe("traced", "logits with and without captures", "captures that change the result", _traced),
    )
}
"""Every probe beyond the prompt itself, by name, in the order in which they run."""

NEVER = "padded batches, sliding windows and thousands of cached keys"
"""What no probe of this version runs."""


def parse(text: str | None) -> tuple[str, ...]:
    """``NAME``, ``NAME,NAME`` or ``all``: names of probes in the order in which they run; ``prompt`` is always run and may be named.

    Raises
    ------
    UnknownName
        No such probe; the message suggests the nearest.
    """
    names = [name.strip() for name in text.split(",")] if text is not None else []
    known = (ALL, PROMPT, *PROBES)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(known)}"
            raise UnknownName(f"there is no probe '{name}'{hint}", code="LOOKUP", field="probe")
    return tuple(name for name in PROBES if name in names or ALL in names)


def rests(ran: Iterable[str]) -> str:
    """The sentence on what a verdict rests on and what its probes could not see."""
    names = tuple(ran)
    unseen = [row.sees for row in PROBES.values() if row.name not in names]
    more = f"; not probed (--probe all): {', '.join(unseen)}" if unseen else ""
    return f"rests on: {', '.join(names)}{more}; this version never probes {NEVER}"


def probe(side: Any, profile: Profile | None, whole: Captures, names: Sequence[str]) -> tuple[Outcome, ...]:
    """Run probes on a side.

    Parameters
    ----------
    side : Side
    profile : Profile or None
        Its arithmetic; a side without one is a definition and is not probed.
    whole : Captures
        Its capture of the prompt.
    names : sequence of str
        Of :data:`PROBES`, as :func:`parse` gives them.
    """
    if not names:
        return ()
    if isinstance(side, SavedSide) or profile is None:
        why = "a recording cannot be run again" if profile is not None else "a definition has no arithmetic to judge"
        return tuple(Outcome(name, NOT_RUN, f"cannot run here: {why}") for name in names)
    model = weights_of(side, whole.manifest, candidates(side))
    bench = Bench(side, profile, whole, model, whole.manifest.hparams or (model.hparams if model else {}))
    return tuple(_run(PROBES[name], bench) for name in names)


def _run(row: Probe, bench: Bench) -> Outcome:
    try:
        return row.run(row.name, bench)
    except (CannotRun, NotComparable) as problem:
        return Outcome(row.name, NOT_RUN, f"cannot run here: {problem}")


# ---- one verdict ---------------------------------------------------------------------------------------------------------------------


def combine(prompt: Verdict, outcomes: Sequence[Outcome], attested: bool | None = None) -> Verdict:
    """The verdict that rests on the prompt and on all probes that ran.

    A side whose result depends on the run or on being watched is told first; then what is wrong on the prompt; then what a probe found.
    But where the prompt only leaves something unexplained, a probe that names the operation comes first.

    Parameters
    ----------
    prompt : Verdict
    outcomes : sequence of Outcome
    attested : bool, optional
        Of the prompt's capture: False where its logits are not those of the path that makes the text.
    """
    ran = [outcome for outcome in outcomes if outcome.state != NOT_RUN]
    judged = dataclasses.replace(prompt, probes=(PROMPT, *(outcome.probe for outcome in ran)))
    found = [outcome for outcome in ran if outcome.finding is not None]
    if attested is False and not any(outcome.finding == HEISENBUG for outcome in found):
        found.append(_bits(PROMPT, prompt.tokens, HEISENBUG, _unattested(), ""))
    found.sort(key=lambda outcome: outcome.finding not in UNSTABLE)  # stable: else in the order of the rows
    if prompt.finding == UNEXPLAINED:
        found.sort(key=lambda outcome: (outcome.finding not in UNSTABLE, outcome.finding == UNEXPLAINED))
    named = bool(found) and prompt.finding == UNEXPLAINED and found[0].finding != UNEXPLAINED
    if not found or (prompt.finding is not None and not named and found[0].finding not in UNSTABLE):
        more = f" Probes {', '.join(outcome.probe for outcome in ran)} find nothing more." if ran and not found else ""
        more = more or (f" Probe {found[0].probe} diverges too." if found else "")
        return dataclasses.replace(judged, sentence=judged.sentence + more)
    return _told(judged, found)


def _told(judged: Verdict, found: Sequence[Outcome]) -> Verdict:
    """The verdict with the first of the outcomes in front; the table is that of the run which shows it, if it judged stages."""
    first = found[0]
    what = {HEISENBUG: "Capturing changes the result", NONDETERMINISTIC: "The result changes from run to run"}.get(first.finding or "")
    head = f"Probe {first.probe}" + (f" ({PROBES[first.probe].text})" if first.probe in PROBES else "")
    sentence = f"{head}: {what + ': ' if what else ''}{first.text}"
    if judged.finding is not None:
        sentence += f" On the prompt: {judged.sentence}"
    shown: dict[str, Any] = {}
    if first.judged is not None:
        shown = {"rows": first.judged.rows, "tokens": first.tokens, "compared": first.judged.compared}
    wrong = tuple(fault for outcome in found[:1] for fault in outcome.wrong) + judged.wrong
    return dataclasses.replace(
        judged, verdict=DIVERGENCE, finding=first.finding, first=first.wrong[0], wrong=wrong, sentence=sentence, **shown
    )
