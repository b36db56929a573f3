"""Closure: whether the free run of a side differs from the float64 run on its own weights by no more than propagated rounding noise.

Owns the statistic, its limit, and what follows for the states.  Refuses to accuse an operation: what it sees has come from anywhere
upstream.  It is for what the local test cannot see, a stage that was not measured.  Called by ``judgement``.

With S and R the free values of subject and reference, W_s and W_r the float64 witness run freely on each side's weights,

    S - R = (S - W_s) + (W_s - W_r) + (W_r - R),

as vectors: the middle term is what the weights alone cost, computed exactly.  What is left of S - R when it is taken away is the sum of the
outer terms, so the free difference is explained if and only if each outer term is propagated noise.  Testing them apart is sharper than
testing their sum, and it says which side.

**The statistic.**  ``judge.passes`` makes m float64 passes n_1 ... n_m with the rounding noise of the side's arithmetic in them, from
nothing that the side captured.  If the side is right, its own run S is one more draw of the same distribution.  The *leftover* is the norm
of S minus the mean of the passes: what all passes share, such as activations of 8 bits that noise does not push over a step, is so taken
away and not tolerated.  Its expected square is (1 + 1/m) tr C, C being the covariance of the noise, and tr C is estimated by the sum of
squared deviations from the mean over k = m - 1.

**The limit.**  |S - mean|^2 is a sum of squares over C's eigenvalues, distributed nearly as chi2_v with v = (tr C)^2 / tr C^2 degrees of
freedom (Satterthwaite), the estimate of tr C nearly as chi2_kv, and the two are independent: their ratio is F's with v and kv degrees of
freedom.  By Chernoff's bound, E[exp t(A - xB)] minimized over t for A ~ chi2_v / v and B ~ chi2_kv / kv,

    P(F > x) <= exp(-v/2 [(k + 1) ln((k + x) / (k + 1)) - ln x]),

which the false-alarm probability of the run, shared among its stages, turns into x; the profile's band is the margin for the variance
model, as everywhere.  tr C^2 is estimated without bias from the Gram matrix of the deviations.  Where rounding errors sit in the inputs of
a product, which all outputs of a token share, v counts tokens at most.  No number is fitted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from aprender import stages
from aprender.arithmetic import Profile
from aprender.captures import Captures
from aprender.judge import budget, witness
from aprender.judge.budget import Plan
from aprender.judge.local import EXACT, HEALS, INHERITED, NOISE, NOT_COMPARABLE, StageResult
from aprender.judge.noise import FUSED
from aprender.judge.passes import Free, Passes
from aprender.judge.replay import Replay, Unlike, Unmeasured
from aprender.judge.rule import Gates, Rule
from aprender.judge.verdict import Party, Verdict
from aprender.judge.witness import Float, ModelData
from aprender.stages import Key

UNEXPLAINED = "unexplained"

DUST = 2.0**-40
"""Relative size below which a leftover is the witness's own float64 rounding."""


@dataclass(frozen=True)
class Closed:
    """The leftover of one stage of one side.

    Attributes
    ----------
    stage : str
    layer : int or None
    leftover : float
        Norm of captured minus the mean of the passes.
    noise : float
        Norm that rounding noise is expected to give that.
    limit : float
        Norm that it does not exceed at the false-alarm probability of the run.
    size : float
        Norm of the witness's value.
    freedom : float
        Degrees of freedom of the noise.
    rounding : float or None
        Norm of pass minus free witness, expected: all that the arithmetic makes of the run, with what the passes share.  None where the
        passes began with a captured state.
    """

    stage: str
    layer: int | None
    leftover: float
    noise: float
    limit: float
    size: float
    freedom: float
    rounding: float | None = None

    @property
    def key(self) -> Key:
        """Stage and layer."""
        return self.stage, self.layer

    @property
    def holds(self) -> bool:
        """Whether the leftover is noise."""
        return self.leftover <= self.limit

    def to_json(self) -> dict[str, float | bool]:
        """Leftover, what noise is expected to give and the limit, relative to the stage's norm."""
        size = self.size or 1.0
        return {"leftover": self.leftover / size, "noise": self.noise / size, "limit": self.limit / size, "holds": self.holds}


@dataclass(frozen=True)
class Closure:
    """What closure of one side found, or why it was not run.

    Attributes
    ----------
    rows : sequence of Closed
        In execution order.
    plan : Plan or None
        How much of it was done; None where nothing could be.
    reason : str
        Why it was not run, or not the whole of it; empty if it was.
    """

    rows: Sequence[Closed] = ()
    plan: Plan | None = None
    reason: str = ""

    def to_json(self) -> dict[str, object]:
        """State, passes, what it cost, and the reason."""
        draws = self.plan.draws if self.plan else 0
        state = "not_run" if not self.rows else "holds" if all(row.holds for row in self.rows) else "fails"
        return {
            "state": state,
            "passes": draws,
            "products": self.plan.products if self.plan else None,
            "bytes": self.plan.bytes if self.plan else None,
            "stages": len(self.rows),
            "reason": self.reason or None,
        }


def closure(
    captures: Captures,
    model: ModelData,
    declared: Profile,
    free: Free,
    results: Sequence[StageResult] = (),
    forced: bool = False,
    rule: Rule | None = None,
) -> Closure:
    """Hold the free run of a side against the witness on the same weights.

    Parameters
    ----------
    captures : Captures
        One sequence from position 0.
    model : ModelData
        The side's model as the side holds it.
    declared : Profile
        The side's arithmetic.
    free : mapping
        :func:`~aprender.judge.witness.forward` of that model on these ids.
    results : sequence of StageResult
        Its local verdicts: in a model too large for all of it, the layers before the first that was not judged right are left out.
    forced : bool
        All of it, whatever it costs.
    rule : Rule, optional

    Returns
    -------
    Closure
        A row per captured stage; stages with an element that is not finite have none: they are judged as what they are by the local test.
    """
    own = Replay.of(captures, model, declared.with_order(captures.manifest.arithmetic))
    tokens = len(captures.tokens)
    if tuple(own.sample.positions) != tuple(range(tokens)) or len(own.sample.keys) != tokens:
        return Closure(reason="not run: the sequence does not start at position 0, and what came before is not known")
    plan = budget.plan(own.hparams, own.flags, tokens, _starts(own, results), forced)
    if not plan.draws:
        return Closure((), plan, plan.reason)
    gates, out = (rule or Rule()).gates(1, len(own.wires)), []
    for key, shown, judged in Passes(own, model, free, plan.draws, plan.first).run():
        captured = _captured(own, key)
        if captured is not None and judged:
            out.append(_closed(own, key, captured, view(own, key, shown), gates, None if plan.first else free[key]))
    return Closure([row for row in out if math.isfinite(row.leftover) and math.isfinite(row.limit)], plan, plan.reason)


def _starts(own: Replay, results: Sequence[StageResult]) -> list[int]:
    """The layer that closure may begin with: the first that has a stage that was not judged right, if what enters it was captured."""
    right = [r for r in results if r.state in (EXACT, NOISE)]
    spanned = {key for r in right for key in r.spans}
    if own.profile.fused_bias:
        spanned |= {own.wires[r.key][0].key for r in right if stages.stage(r.stage).op in FUSED}
    open_layers = (r.layer for r in results if r.layer is not None and r.state not in (EXACT, NOISE) and r.key not in spanned)
    first = min(open_layers, default=0)
    entry = (stages.ALIASES["layer_output"], first - 1)
    return [first] if first and entry not in own.sample.last and _captured(own, entry) is not None else []


def _captured(own: Replay, key: Key) -> Float | None:
    """What the side shows of a stage; None where it does not, or not in this shape."""
    try:
        return own.captured(key) * allowed(own, key)
    except (Unmeasured, Unlike):
        return None


def leftover(own: Replay, key: Key, free: Free) -> Float | None:
    """Captured minus free witness, where both are and mean anything; None where the side did not capture the stage."""
    captured = _captured(own, key)
    with np.errstate(invalid="ignore"):
        return None if captured is None else np.asarray(captured - view(own, key, free[key]))


def view(own: Replay, key: Key, value: Float) -> Float:
    """A value of one pass or of several as the side shows it: the last token if it captured only that, 0 where the mask forbids."""
    shape = stages.stage(key[0]).shape
    if key in own.sample.last and "T" in shape:
        value = np.take(value, [-1], axis=shape.index("T") - len(shape))
    return np.asarray(value * allowed(own, key))


def allowed(own: Replay, key: Key) -> Float | float:
    """1 where a score means anything, 0 where the mask forbids it."""
    shape = stages.stage(key[0]).shape
    if "J" not in shape or "T" not in shape:
        return 1.0
    tokens = own.sample.positions[-1:] if key in own.sample.last else own.sample.positions
    return witness.causal(tokens, own.sample.keys).astype(np.float64)


def _closed(own: Replay, key: Key, captured: Float, shown: Float, gates: Gates, free: Float | None) -> Closed:
    """The row of one stage."""
    draws, middle = len(shown), shown.mean(axis=0)
    deviations = (shown - middle).reshape(draws, -1)
    most = float(captured.size if own.profile.ggml is None else len(own.sample.tokens))
    total, freedom = _moments(deviations @ deviations.T, most)
    noise, size = math.sqrt((1.0 + 1.0 / draws) * total), float(np.linalg.norm(middle))
    rounding = None if free is None else float(np.sqrt(np.mean(np.square(shown - view(own, key, free)).reshape(draws, -1).sum(axis=1))))
    limit = own.profile.band * math.sqrt(quantile(freedom, draws - 1, gates.nats)) * noise + DUST * size
    return Closed(key[0], key[1], float(np.linalg.norm(captured - middle)), noise, limit, size, freedom, rounding)


def _moments(gram: Float, most: float) -> tuple[float, float]:
    """Trace of the covariance, and its degrees of freedom, from the inner products of the deviations from the mean.

    With S = D^T D / k for k + 1 Gaussian draws, E tr S^2 = (1 + 1/k) tr C^2 + (tr C)^2 / k, which gives the estimate of tr C^2.
    """
    k = len(gram) - 1
    total = float(np.trace(gram)) / k
    square = float(np.sum(gram * gram)) / (k * k)
    shared = k * k / ((k + 2.0) * (k - 1.0)) * (square - total * total / k)
    return total, min(max(total * total / shared if shared > 0 else most, 1.0), most)


def quantile(freedom: float, k: int, nats: float) -> float:
    """The x that a ratio F with ``freedom`` and k * ``freedom`` degrees of freedom exceeds with probability e^-``nats`` at most."""

    def bound(log_x: float) -> float:  # ln((k + x) / (k + 1)) by the larger of both terms, so that no x is too large
        return float((k + 1) * (np.logaddexp(math.log(k), log_x) - math.log(k + 1)) - log_x)

    low, high = 0.0, 1.0
    while bound(high) < 2 * nats / freedom:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if bound(middle) < 2 * nats / freedom else (low, middle)
    return math.exp(min(high, 600.0))


# ---- what follows ----------------------------------------------------------------------------------------------------------------------


def settled(results: Sequence[StageResult], found: Closure) -> list[StageResult]:
    """Local verdicts with closure taken into account.

    A stage that is right on its own inputs and depends on something wrong is ``inherited`` if the wrong shows in its value.  Where closure
    holds it does not, and the stage is what it is by itself.
    """
    held = {row.key for row in found.rows if row.holds}

    def own(result: StageResult) -> StageResult:
        if result.state != INHERITED or result.key not in held:
            return result
        return dataclasses.replace(result, state=EXACT if result.bit_equal == 1.0 else NOISE, reason="")

    return [own(result) for result in results]


def explained(judged: Verdict, closures: Mapping[str, Closure]) -> Verdict:
    """The verdict with the figures of closure, and with finding ``unexplained`` if no stage is wrong and yet a free run is far from noise.

    Parameters
    ----------
    judged : Verdict
    closures : mapping
        ``subject`` and ``reference`` to their :func:`closure`.
    """
    figures: dict[Key, dict[str, Mapping[str, float | bool]]] = {}
    for name, found in closures.items():
        for row in found.rows:
            figures.setdefault(row.key, {})[name] = row.to_json()
    rows = tuple(dataclasses.replace(row, closure=figures.get((row.stage, row.layer), {})) for row in judged.rows)
    judged = dataclasses.replace(judged, rows=rows, closure={name: found.to_json() for name, found in closures.items()})
    parties = {"subject": judged.subject, "reference": judged.reference}
    still_open = [(stages.order(row.key), name, row) for name, found in closures.items() for row in _open(parties[name], found)]
    if judged.verdict != "agree" or not still_open:
        return judged
    _, name, first = min(still_open, key=lambda item: item[0])
    return judged.led_by(UNEXPLAINED, _sentence(name, parties[name], first))


def _open(party: Party, found: Closure) -> list[Closed]:
    """Rows that noise does not explain; those that a gauge explains, which ends before the last row, are not among them."""
    unlike = {r.key for r in party.results if r.state == NOT_COMPARABLE}
    failed = [row for row in found.rows if not row.holds and row.key not in unlike]
    gauges = [stages.order(r.key) for r in party.results if r.state == HEALS]
    if not gauges or not found.rows[-1].holds:
        return failed
    return [row for row in failed if stages.order(row.key) < min(gauges)]


def _sentence(name: str, party: Party, first: Closed) -> str:
    """Which side, from where on, how far, and what was not judged on the way."""
    hidden = [r for r in party.results if not r.measured and stages.order(r.key) <= stages.order(first.key)]
    where = f"; not judged up to there: {', '.join(dict.fromkeys(stages.spell(r.key) for r in hidden[-4:]))}" if hidden else ""
    return (
        f"No judged operation is wrong, and yet the {name} ({party.spelling}) is not explained: from {stages.spell(first.key)} on it is"
        f" {_share(first.leftover, first)} from float64 runs on its own weights with its rounding noise in them, where that noise makes"
        f" {_share(first.noise, first)} and at most {_share(first.limit, first)} (relative L2){where}."
    )


def _share(norm: float, row: Closed) -> str:
    return f"{norm / row.size if row.size else norm:.1e}"


def note(closures: Mapping[str, Closure]) -> list[str]:
    """What a reader is told: how far the runs are explained, and whatever was not run, with the reason."""
    out = []
    for name, found in closures.items():
        if found.rows:
            share, worst = max((row.leftover / row.limit if row.limit else 0.0, stages.spell(row.key)) for row in found.rows)
            draws, less = found.plan.draws if found.plan else 0, f" ({found.reason})" if found.reason else ""
            out.append(
                f"closure of the {name}: {len(found.rows)} stages against {draws} float64 runs with its rounding noise: {share:.2g} times"
                f" the limit at most, at {worst}{less}"
            )
        else:
            out.append(f"closure of the {name}: {found.reason or 'no stage to hold against the witness'}")
    return out
