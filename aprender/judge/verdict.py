"""The verdict: every stage of a side judged on its own inputs, and what follows for the comparison of two sides.

Owns :func:`local` (states per stage), :func:`decide` (first wrong operation, finding, sentence) and :class:`Verdict` with the JSON that
scripts rely on.  Refuses to run a side or to read a file.  Called by ``aprender.judgement``.

A stage is ``exact`` (captured equals the emulation of the declared arithmetic bit for bit), ``noise`` (what is left is what that arithmetic
leaves), ``wrong``, ``inherited`` (right on its own inputs, but they depend on something wrong), ``heals`` (off, and equal up to a gauge:
``judge.gauge``), ``unmeasured`` or ``not_comparable`` with a reason.  A local test accuses; a free difference only shows.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from aprender import stages
from aprender.arithmetic import Profile
from aprender.captures import Captures
from aprender.errors import NotComparable
from aprender.judge import history
from aprender.judge.diagnose import BUDGET, UNKNOWN, Diagnosis, diagnose
from aprender.judge.gauge import Judge, after_bias, healed, said
from aprender.judge.loss import ARITHMETIC_LOSS, Loss, loss
from aprender.judge.measure import Group, Margin, Measure, group_count, measure
from aprender.judge.metrics import Distance
from aprender.judge.replay import Replay, Unlike, Unmeasured, ancestors
from aprender.judge.roundings import UNDECLARED, Explanation, explanations, undeclared
from aprender.judge.rule import Gates, Rule
from aprender.judge.witness import ModelData
from aprender.stages import Key

EXACT, NOISE, WRONG, INHERITED, HEALS = "exact", "noise", "wrong", "inherited", "heals"
UNMEASURED, NOT_COMPARABLE = "unmeasured", "not_comparable"
DIAGNOSED = 3
"""Wrong stages of a side, from the first, whose kind is looked for."""
OPERATION, OVERFLOW = "operation", "overflow"
SUBJECT, REFERENCE = "subject", "reference"
OF_ARITHMETIC: Mapping[str, str] = {
    OVERFLOW: "overflows first: its arithmetic is too narrow",
    UNDECLARED: "is the first whose roundings are not those that it declares",
    ARITHMETIC_LOSS: "is the first where the arithmetic itself fails, carried out as declared",
}
"""Kinds that are no wrong operation, and what the sentence says of the first."""


@dataclass(frozen=True)
class StageResult:
    """One stage of one side, judged on the side's own inputs.

    Attributes
    ----------
    stage : str
    layer : int or None
    state : str
    reason : str
        Why it is wrong, unmeasured or not comparable, which wrong stage it inherits from, or up to what it is equal; empty if it is clean.
    n : int
        Elements compared.
    i_max, z_rms, z_max, z_mean, bit_equal, power : float or None
        As in :class:`~aprender.judge.measure.Measure`.
    group : Group or None
        The worst row, column or head.
    confidence : float
        For a wrong stage: 1 - false-alarm probability, shared among the stages of the region.
    overflowed : int
        Elements that the declared arithmetic itself makes infinite.
    spans : tuple of Key
        Stages that were estimated and not captured: the region that was judged.
    diagnosis : Diagnosis or None
        What kind of fault it is; None for a stage that is not wrong, or not among the first that are.
    margin : Margin
        How near the stage came to its gates.
    rounding : Explanation or None
        For a wrong stage of no known fault: an undeclared rounding that leaves only dust.
    systematic : bool
        That rounding is all the side's for this operation: its arithmetic, and no fault of the stage.
    loss : Loss or None
        What the declared arithmetic itself loses there.
    """

    stage: str
    layer: int | None
    state: str
    reason: str = ""
    n: int = 0
    i_max: float | None = None
    z_rms: float | None = None
    z_max: float | None = None
    z_mean: float | None = None
    bit_equal: float | None = None
    power: float | None = None
    group: Group | None = None
    confidence: float = 0.0
    overflowed: int = 0
    spans: tuple[Key, ...] = ()
    diagnosis: Diagnosis | None = field(default=None, repr=False)
    margin: Margin = field(default_factory=Margin)
    rounding: Explanation | None = None
    systematic: bool = False
    loss: Loss | None = None

    @property
    def key(self) -> Key:
        """Stage and layer."""
        return self.stage, self.layer

    @property
    def kind(self) -> str:
        """Of a wrong stage: which fault explains it, or which undeclared rounding."""
        if self.systematic:
            return UNDECLARED
        known = self.diagnosis.kind if self.diagnosis else UNKNOWN
        return f"undeclared {self.rounding.slug}" if known == UNKNOWN and self.rounding else known

    @property
    def measured(self) -> bool:
        """Whether there is a local verdict."""
        return self.state in (EXACT, NOISE, WRONG, INHERITED, HEALS)

    def sees(self, relative: float) -> bool:
        """Whether a relative error of the whole stage of this size is within what this capture had the power to see."""
        return self.power is not None and relative >= self.power


def local(captures: Captures, model: ModelData | None, profile: Profile, rule: Rule | None = None) -> list[StageResult]:
    """Judge every stage of a side on the side's own captured inputs.

    Parameters
    ----------
    captures : Captures
        One sequence.
    model : ModelData or None
        The side's weights and hyper-parameters as the side holds them (after its own cast); None where no one has them: stages that need
        no weight are judged with the hyper-parameters of the manifest.
    profile : Profile
        The side's arithmetic.  An accumulation order in the manifest is used.
    rule : Rule, optional
        False-alarm probability of the run.

    Returns
    -------
    list of StageResult
        One per (stage, layer) of the model, in execution order.

    Raises
    ------
    NotComparable
        Neither a model nor hyper-parameters in the manifest: the stages are not even known.
    """
    if model is None and not captures.manifest.hparams:
        raise NotComparable(f"{captures.manifest.side} names no model and no hyper-parameters: nothing can be judged", code="MISSING")
    profile = profile.with_order(captures.manifest.arithmetic)
    replay = Replay.of(captures, model, profile)
    gates = _gates(replay, rule or Rule())
    apart = history.apart(captures, replay, lambda piece: Replay.of(piece, model, profile))
    judged = [_judged(apart.get(key, [replay]), key, gates, profile.band) for key in replay.wires]
    pieces = {r.key: own for r, own in judged if own is not replay}
    results, replay = _recognized([r for r, _ in judged], replay, pieces, gates, profile.band)
    replays = {**dict.fromkeys(replay.wires, replay), **pieces}
    return inherited(_rounded(_diagnosed(results, replays, gates, profile.band), replays, gates, profile.band), replay)


def _recognized(
    results: list[StageResult], replay: Replay, pieces: Container[Key], gates: Gates, band: float
) -> tuple[list[StageResult], Replay]:
    """What only looks wrong: a value of another capture point is not comparable, and what is equal up to a gauge heals.

    A stage of which one of ``pieces`` is wrong stays so.
    """
    wrong = [r.key for r in results if r.state == WRONG and r.key not in pieces]
    unlike, replay = after_bias(Judge(replay, gates, band), wrong)
    if unlike:
        again = (_judge(replay, r.key, gates, band) if r.key in wrong else r for r in results)
        results = [StageResult(*r.key, NOT_COMPARABLE, unlike[r.key]) if r.key in unlike else r for r in again]
    same = healed(Judge(replay, gates, band), [r.key for r in results if r.state == WRONG and r.key not in pieces])
    heals = {r.key for r in results if r.key in same and r.measured}
    return [dataclasses.replace(r, state=HEALS, reason=same[r.key], confidence=0.0) if r.key in heals else r for r in results], replay


def _judged(replays: Sequence[Replay], key: Key, gates: Gates, band: float) -> tuple[StageResult, Replay]:
    """One stage, and the replay that its result comes from: of several pieces the first wrong one, else the noisiest."""
    found = [_judge(replay, key, gates, band) for replay in replays]
    if len(found) == 1:
        return found[0], replays[0]
    at = next((i for i, r in enumerate(found) if r.state == WRONG), None)
    if at is None:
        at = max(range(len(found)), key=lambda i: (found[i].measured, found[i].state != EXACT, found[i].z_rms or 0.0))
    reason = f"in the piece of {history.piece_of(replays[at])}: {found[at].reason}" if found[at].state == WRONG else found[at].reason
    return dataclasses.replace(found[at], reason=reason, n=sum(r.n for r in found)), replays[at]


def _diagnosed(results: list[StageResult], replays: Mapping[Key, Replay], gates: Gates, band: float) -> list[StageResult]:
    """The first wrong stages with the kind of their fault."""
    first = [r.key for r in results if r.state == WRONG][:DIAGNOSED]
    end = time.thread_time() + BUDGET
    found = {key: diagnose(replays[key], key, gates, band, end - time.thread_time()) for key in first}
    return [dataclasses.replace(r, diagnosis=found.get(r.key)) for r in results]


def _rounded(results: list[StageResult], replays: Mapping[Key, Replay], gates: Gates, band: float) -> list[StageResult]:
    """The wrong stages of no known fault with the undeclared rounding that explains them."""
    open_ones = [r.key for r in results if r.state == WRONG and r.kind == UNKNOWN]
    found = explanations(replays, open_ones, gates, band)
    ops = {r.key: replays[r.key].operation(r.key) for r in results if r.measured}
    whole = undeclared(ops, [r.key for r in results if r.state == WRONG], found)
    return [dataclasses.replace(r, rounding=whole.get(r.key, found.get(r.key)), systematic=r.key in whole) for r in results]


def _gates(replay: Replay, rule: Rule) -> Gates:
    """The gates for all that will be tested."""
    shapes = [replay.sample.values[key].shape for key in replay.wires if key in replay.sample.values and key not in replay.sample.derived]
    return rule.gates(sum(int(np.prod(s)) for s in shapes), sum(group_count(s) for s in shapes))


def _judge(replay: Replay, key: Key, gates: Gates, band: float) -> StageResult:
    """One stage."""
    try:
        captured = replay.captured(key)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):  # an overflow is a value here, and is judged as one
            made, spans = replay.predict(key, key in replay.sample.last, captured)
            found = measure(captured, made, gates, band)
            lost = loss(made, gates, band, len(replay.wires))
    except Unmeasured as reason:
        return StageResult(*key, UNMEASURED, str(reason))
    except Unlike as reason:
        return StageResult(*key, NOT_COMPARABLE, str(reason))
    if found.n == 0 and not found.reasons:
        return StageResult(*key, UNMEASURED, "no element is finite and allowed by the mask", overflowed=found.overflowed)
    result = dataclasses.replace(_result(key, found, spans, gates), loss=lost)
    if result.state == WRONG and stages.stage(key[0]).shape[0] == "J":
        return dataclasses.replace(result, reason=history.held(replay, captured, made.bits()))
    return result


def _result(key: Key, found: Measure, spans: tuple[Key, ...], gates: Gates) -> StageResult:
    """The state of a measured stage."""
    state = WRONG if found.reasons else EXACT if found.bit_equal == 1.0 else NOISE
    return StageResult(
        stage=key[0],
        layer=key[1],
        state=state,
        reason="; ".join(found.reasons),
        n=found.n,
        i_max=found.i_max,
        z_rms=found.z_rms,
        z_max=found.z_max,
        z_mean=found.z_mean,
        bit_equal=found.bit_equal,
        power=found.power,
        group=found.worst,
        confidence=(1.0 - gates.chance(found.deviation)) / (1 + len(spans)) if found.reasons else 0.0,
        overflowed=found.overflowed,
        spans=spans,
        margin=found.margin,
    )


def inherited(results: list[StageResult], replay: Replay) -> list[StageResult]:
    """Mark what is right on its own inputs but depends on something wrong."""
    before = ancestors(replay.wires)
    wrong = [r.key for r in results if r.state == WRONG]

    def marked(result: StageResult) -> StageResult:
        first = next((key for key in wrong if key in before[result.key]), None)
        if first is None or result.state not in (EXACT, NOISE):
            return result
        return dataclasses.replace(result, state=INHERITED, reason=f"right on its own inputs, which depend on {stages.spell(first)}")

    return [marked(result) for result in results]


# ---- two sides -------------------------------------------------------------------------------------------------------------------------


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
