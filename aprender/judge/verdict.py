"""The verdict: what follows from the judgement of each side for the comparison of two.

Owns :func:`decide` (first wrong operation, finding, sentence) and :class:`Verdict` with the JSON that scripts rely on.  Refuses to judge a
stage itself (that is ``judge.local``), to run a side or to read a file.  Called by ``aprender.judgement``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from aprender import stages
from aprender.judge.diagnose import UNKNOWN, Diagnosis
from aprender.judge.gauge import said
from aprender.judge.local import EXACT, HEALS, INHERITED, NOISE, NOT_COMPARABLE, UNMEASURED, WRONG, StageResult
from aprender.judge.loss import ARITHMETIC_LOSS
from aprender.judge.metrics import Distance
from aprender.judge.roundings import UNDECLARED
from aprender.stages import Key

OPERATION, OVERFLOW = "operation", "overflow"
SUBJECT, REFERENCE = "subject", "reference"
OF_ARITHMETIC: Mapping[str, str] = {
    OVERFLOW: "overflows first: its arithmetic is too narrow",
    UNDECLARED: "is the first whose roundings are not those that it declares",
    ARITHMETIC_LOSS: "is the first where the arithmetic itself fails, carried out as declared",
}
"""Kinds that are no wrong operation, and what the sentence says of the first."""


@dataclass(frozen=True)
class Party:
    """One side of a comparison, for the report.

    Attributes
    ----------
    spelling, profile, backend, digest : str or None
        How the user wrote it, its arithmetic, its device, the digest of its model.
    results : sequence of StageResult
        Its local verdicts; empty if it was not judged (a witness needs no judge).
    """

    spelling: str
    profile: str | None = None
    backend: str | None = None
    digest: str | None = None
    results: Sequence[StageResult] = field(default=(), repr=False)

    def to_json(self) -> dict[str, object]:
        """The keys that scripts rely on."""
        return {"spelling": self.spelling, "profile": self.profile, "backend": self.backend, "digest": self.digest}


@dataclass(frozen=True)
class Fault:
    """A wrong operation of a side."""

    side: str
    layer: int | None
    stage: str
    kind: str
    confidence: float
    reason: str = ""
    diagnosis: Diagnosis | None = field(default=None, repr=False)

    @property
    def key(self) -> Key:
        """Stage and layer."""
        return self.stage, self.layer

    def to_json(self) -> dict[str, object]:
        """The keys that scripts rely on."""
        return {"side": self.side, "layer": self.layer, "stage": self.stage, "kind": self.kind, "confidence": self.confidence}


@dataclass(frozen=True)
class Row:
    """One line of the stage table: the free comparison, what quantisation alone costs, and the local verdict."""

    layer: int | None
    stage: str
    state: str
    n: int
    free: Distance | None = None
    quantization: float | None = None
    result: StageResult | None = None
    closure: Mapping[str, Mapping[str, float | bool]] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """The keys that scripts rely on; null where a figure does not exist."""
        free, own = self.free, self.result if self.result is not None and self.result.measured else None
        return {
            "layer": self.layer,
            "stage": self.stage,
            "n": self.n,
            "cos_distance": None if free is None else free.cos_distance,
            "rel_l2": None if free is None else free.rel_l2,
            "norm_ratio": None if free is None else free.norm_ratio,
            "quantization": self.quantization,
            "i_max": None if own is None else own.i_max,
            "z_rms": None if own is None else own.z_rms,
            "z_max": None if own is None else own.z_max,
            "loss": None if own is None or own.loss is None else own.loss.relative,
            "closure": {name: self.closure.get(name) for name in (SUBJECT, REFERENCE)},
            "state": self.state,
        }


@dataclass(frozen=True)
class Verdict:
    """The judged comparison of a subject with a reference.

    Attributes
    ----------
    verdict : str
        ``agree``, ``divergence`` or ``not_comparable``.
    finding : str or None
    first : Fault or None
        First wrong operation in execution order, of either side.
    wrong : tuple of Fault
        All of them.  A replay takes the captured inputs as they are, so these are faults of their own, not consequences.
    sentence : str
        Where, what kind, how sure.
    closure : mapping
        ``subject`` and ``reference`` to what :mod:`aprender.judge.closure` found, or why it was not run.
    decomposition : mapping or None
        What the free difference of the last stage is made of (:mod:`aprender.judge.parts`); None without both sides' weights.
    """

    verdict: str
    finding: str | None
    first: Fault | None
    wrong: tuple[Fault, ...]
    sentence: str
    compared: int
    unmeasured: tuple[StageResult, ...]
    tokens: tuple[int, ...]
    subject: Party
    reference: Party
    rows: tuple[Row, ...] = field(repr=False)
    probes: tuple[str, ...] = ()
    closure: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    decomposition: Mapping[str, object] | None = None

    def led_by(self, finding: str, sentence: str) -> Verdict:
        """The same judgement of the stages, led by a finding that is no stage's."""
        return dataclasses.replace(self, verdict="divergence", finding=finding, sentence=sentence)

    def to_json(self) -> dict[str, object]:
        """One object with the keys that scripts rely on."""
        return {
            "schema": "aprender.bisect/1",
            "verdict": self.verdict,
            "finding": self.finding,
            "first": None if self.first is None else self.first.to_json(),
            "wrong": [fault.to_json() for fault in self.wrong],
            "diagnosis": None if self.first is None or self.first.diagnosis is None else self.first.diagnosis.to_json(),
            "compared": self.compared,
            "unmeasured": [{"layer": r.layer, "stage": r.stage, "reason": r.reason} for r in self.unmeasured],
            "probes": list(self.probes),
            "closure": {name: self.closure.get(name) for name in (SUBJECT, REFERENCE)},
            "decomposition": self.decomposition,
            "tokens": list(self.tokens),
            "subject": self.subject.to_json(),
            "reference": self.reference.to_json(),
            "stages": [row.to_json() for row in self.rows],
        }


def decide(
    subject: Party,
    reference: Party,
    free: Mapping[Key, Distance],
    tokens: Iterable[int],
    quantization: Mapping[Key, float] | None = None,
    probes: Iterable[str] = (),
) -> Verdict:
    """Put the two local judgements and the free comparison together.

    Parameters
    ----------
    subject, reference : Party
        The subject must have been judged; the reference has results where it was.
    free : mapping
        Distance per (stage, layer), from :func:`~aprender.judge.metrics.compare`.
    tokens : iterable of int
    quantization : mapping, optional
        Relative L2 of the witness on the subject's weights against the witness on the original ones.
    probes : iterable of str
        Names of the runs that the verdict rests on.
    """
    own = {r.key: r for r in subject.results}
    other = {r.key: r for r in reference.results}
    keys = sorted({*own, *other, *free}, key=stages.order)
    rows = tuple(_row(key, own.get(key), other.get(key), free.get(key), (quantization or {}).get(key)) for key in keys)
    faults = [*_faults(SUBJECT, subject.results), *_faults(REFERENCE, reference.results)]
    # stable: the subject first where both are wrong; what is the arithmetic's, and no stage's own fault, comes after all that is
    faults.sort(key=lambda fault: (fault.kind in (UNDECLARED, ARITHMETIC_LOSS), stages.order(fault.key)))
    kinds = {fault.kind for fault in faults}
    measured = sum(r.measured for r in subject.results)
    verdict = "divergence" if faults else "agree" if measured else NOT_COMPARABLE
    finding = None if not faults else OPERATION if kinds - set(OF_ARITHMETIC) else faults[0].kind
    return Verdict(
        verdict=verdict,
        finding=finding,
        first=faults[0] if faults else None,
        wrong=tuple(faults),
        sentence=_sentence(verdict, faults, subject, reference, free, quantization or {}),
        compared=len(free),
        unmeasured=tuple(r for r in subject.results if r.state == UNMEASURED),
        tokens=tuple(tokens),
        subject=subject,
        reference=reference,
        rows=rows,
        probes=tuple(probes),
    )


def _row(key: Key, own: StageResult | None, other: StageResult | None, free: Distance | None, quantization: float | None) -> Row:
    """One line: the subject's own result, unless only the reference is wrong there."""
    states = [r.state for r in (own, other) if r is not None]
    shown = other if other is not None and other.state == WRONG and (own is None or own.state != WRONG) else own
    state = shown.state if shown is not None else UNMEASURED
    if state in (EXACT, NOISE) and INHERITED in states:
        state = INHERITED
    n = shown.n if shown is not None and shown.n else free.n if free is not None else 0
    return Row(key[1], key[0], state, n, free, quantization, shown)


def _faults(side: str, results: Iterable[StageResult]) -> list[Fault]:
    """What is wrong with one side, and where its declared arithmetic is too narrow."""
    wrong = [
        Fault(side, r.layer, r.stage, r.kind, r.confidence, f"{r.reason}{_explained(r)}", r.diagnosis) for r in results if r.state == WRONG
    ]
    narrow = [
        Fault(side, r.layer, r.stage, OVERFLOW, 1.0, f"{r.overflowed} elements overflow, as the declared arithmetic does")
        for r in results
        if r.overflowed and r.state != WRONG
    ]
    lossy = [
        Fault(side, r.layer, r.stage, ARITHMETIC_LOSS, 1.0, r.loss.reason)
        for r in results
        if r.loss is not None and r.loss.reason and r.state != WRONG and not r.overflowed
    ]
    return wrong + narrow + lossy


def _explained(result: StageResult) -> str:
    """What an undeclared rounding leaves of a wrong stage, in words."""
    if result.rounding is None or (not result.systematic and result.kind != f"undeclared {result.rounding.slug}"):
        return ""
    return f"; nothing is left of that with {result.rounding.text()}"


def _sentence(
    verdict: str,
    faults: Sequence[Fault],
    subject: Party,
    reference: Party,
    free: Mapping[Key, Distance],
    quantization: Mapping[Key, float],
) -> str:
    """Where, what kind, how sure."""
    if faults:
        first = faults[0]
        party = subject if first.side == SUBJECT else reference
        what = OF_ARITHMETIC.get(first.kind, "is the first wrong operation")
        kind = "" if first.kind == UNKNOWN or first.kind in OF_ARITHMETIC else f", {first.kind}"
        sure = f"{100 * min(first.confidence, 0.999999):.4f} %".replace(".0000 %", " %")
        more = f" {len(faults) - 1} more below." if len(faults) > 1 else ""
        return f"{_place(first.key)} of the {first.side} ({party.spelling}) {what}{kind}: {first.reason}. Confidence {sure}.{more}"
    judged = [r for r in subject.results if r.measured]
    if verdict == NOT_COMPARABLE:
        return f"Nothing was judged: no stage of {subject.spelling} could be measured."
    exact = sum(r.state == EXACT for r in judged)
    how = "each bit for bit what its arithmetic makes" if exact == len(judged) else f"{exact} bit for bit, the rest within rounding noise"
    last = next((key for key in sorted(free, key=stages.order, reverse=True) if free[key].rel_l2 is not None), None)
    apart = ""
    if last is not None:
        cost = quantization.get(last)
        weights = f"; the weights alone account for {cost:.1e}" if cost else ""
        apart = f" Running alone, the sides end {free[last].rel_l2:.1e} apart (relative L2 at {_place(last)}){weights}."
    other = sum(r.measured for r in reference.results)
    both = f" So are {other} of the reference." if other else ""
    but = [
        said(party.spelling, [(r.key, r.reason) for r in party.results if r.state in (HEALS, NOT_COMPARABLE)])
        for party in (subject, reference)
    ]
    return f"Agree: all {len(judged)} judged stages of {subject.spelling} are right, {how}.{both}{''.join(but)}{apart}"


def _place(key: Key) -> str:
    """A key in words."""
    return key[0] if key[1] is None else f"{key[0]} of layer {key[1]}"
