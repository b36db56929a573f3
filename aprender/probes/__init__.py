"""Probes: ways of running a side that make a class of bugs visible which one prompt in one piece cannot show.

Owns the rows (:data:`PROBES`), what each demands of a side, and how their outcomes and the verdict on the prompt become one verdict.
Refuses to count a probe that could not run: it is named as not run, with the reason.  A probe judges as everything else is judged (each
stage on its own inputs, ``judge.local``) or compares bits of two runs of the same side; it never compares two engines.  Called by
``bisection``.

What a side can do beyond ``capture`` it shows by having the method: ``capture_pieces`` (a sequence in pieces on one cache), ``capture_end``
(the end of a long one), ``capture_batch`` (a padded batch), ``rotary_table`` (at any positions), ``logits``.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aprender.arithmetic import Profile
from aprender.captures import Captures
from aprender.errors import CannotRun, NotComparable, UnknownName
from aprender.judge.verdict import Verdict
from aprender.probes import bits, runs
from aprender.probes.bench import DIVERGENCE, HEISENBUG, NONDETERMINISTIC, NOT_RUN, UNEXPLAINED, UNSTABLE, Bench, Outcome, unattested
from aprender.references import candidates, weights_of
from aprender.sides.saved import SavedSide

PROMPT = "prompt"
"""The run that every verdict rests on: the question in one piece, as the side does it by itself."""
ALL = "all"


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
        Probe("one", "the first token alone", "operations on a single row", runs.sequence(lambda tokens: 1)),
        Probe("short", f"{runs.SHORT} tokens", "tiles that are not full", runs.sequence(lambda tokens: runs.SHORT)),
        Probe("long", f"{runs.LONG} tokens or more", "longer contexts", runs.sequence(lambda tokens: max(runs.LONG, tokens))),
        Probe("decode", "a prompt, then token by token", "decoding", runs.pieces(lambda tokens: max(tokens, 4), runs.decoded)),
        Probe(
            "ragged",
            f"pieces of {'/'.join(map(str, runs.PIECES))}",
            "chunks",
            runs.pieces(lambda tokens: max(tokens, sum(runs.PIECES)), runs.ragged),
        ),
        Probe("padded", "a batch of unequal rows, padded left and right", "padded batches", runs.padded),
        Probe("far", f"the rotary table at positions {', '.join(map(str, runs.FAR))}", "far positions", runs.far),
        Probe("keys", f"{runs.END} tokens on a cache of {runs.KEYS} keys or more", "thousands of cached keys", runs.cached_keys),
        Probe("causal", "other last tokens: earlier rows stay", "leaks from later tokens", bits.causal),
        Probe("repeat", "twice: the same bits", "results that change from run to run", bits.repeat),
        Probe("traced", "logits with and without captures", "captures that change the result", bits.traced),
    )
}
"""Every probe beyond the prompt itself, by name, in the order in which they run."""

CANNOT = "cannot run here: "

NEVER = "sliding windows"
"""What no probe of this version runs: no architecture that is read has them."""


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


def rests(ran: Iterable[str], outcomes: Sequence[Outcome] = ()) -> str:
    """The sentence on what a verdict rests on, and what its probes could not see.

    Parameters
    ----------
    ran : iterable of str
        Names of the probes that ran.
    outcomes : sequence of Outcome, optional
        Of all that were asked for: those that could not run are told with the reason.
    """
    names = tuple(ran)
    failed: dict[str, list[str]] = {}
    for outcome in (o for o in outcomes if o.state == NOT_RUN):
        failed.setdefault(outcome.text.removeprefix(CANNOT), []).append(outcome.probe)
    lost = [f"{', '.join(PROBES[name].sees for name in found)} ({why})" for why, found in failed.items()]
    asked = {outcome.probe for outcome in outcomes}
    unseen = [row.sees for row in PROBES.values() if row.name not in names and row.name not in asked]
    more = f"; not seen, the probe cannot run here: {'; '.join(lost)}" if lost else ""
    more += f"; not probed (--probe all): {', '.join(unseen)}" if unseen else ""
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
        return tuple(Outcome(name, NOT_RUN, f"{CANNOT}{why}") for name in names)
    model = weights_of(side, whole.manifest, candidates(side))
    bench = Bench(side, profile, whole, model, whole.manifest.hparams or (model.hparams if model else {}))
    return tuple(_run(PROBES[name], bench) for name in names)


def _run(row: Probe, bench: Bench) -> Outcome:
    try:
        return row.run(row.name, bench)
    except (CannotRun, NotComparable) as problem:
        return Outcome(row.name, NOT_RUN, f"{CANNOT}{problem}")


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
        found.append(bits.told(PROMPT, prompt.tokens, HEISENBUG, unattested(), ""))
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


__all__ = ["ALL", "NEVER", "PROBES", "PROMPT", "Outcome", "Probe", "combine", "parse", "probe", "rests"]
