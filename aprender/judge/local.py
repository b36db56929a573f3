"""The judgement of one side: every stage on the side's own inputs.

Owns :func:`local`, the states that a stage can be in, and :class:`StageResult`.  Refuses to run a side or to read a file, and to hear what
another side made of the same tokens: a local test accuses, a free difference only shows.  Called by ``declared``, ``repair`` and the
probes; ``judge.verdict`` puts two such judgements together.

A stage is ``exact`` (captured equals the emulation of the declared arithmetic bit for bit), ``noise`` (what is left is what that arithmetic
leaves), ``wrong``, ``inherited`` (right on its own inputs, but they depend on something wrong), ``heals`` (off, and equal up to a gauge:
``judge.gauge``), ``unmeasured`` or ``not_comparable`` with a reason.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from aprender import stages
from aprender.arithmetic import Profile
from aprender.captures import Captures
from aprender.errors import NotComparable
from aprender.judge import history
from aprender.judge.diagnose import BUDGET, UNKNOWN, Diagnosis, diagnose
from aprender.judge.gauge import Judge, after_bias, healed
from aprender.judge.loss import Loss, loss
from aprender.judge.measure import Group, Margin, Measure, group_count, measure
from aprender.judge.replay import Replay, Unlike, Unmeasured, ancestors
from aprender.judge.roundings import UNDECLARED, Explanation, explanations, undeclared
from aprender.judge.rule import Gates, Rule
from aprender.judge.witness import ModelData
from aprender.stages import Key

EXACT, NOISE, WRONG, INHERITED, HEALS = "exact", "noise", "wrong", "inherited", "heals"
UNMEASURED, NOT_COMPARABLE = "unmeasured", "not_comparable"
DIAGNOSED = 3
"""Wrong stages of a side, from the first, whose kind is looked for."""


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
