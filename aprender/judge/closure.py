"""Closure: whether the free run of a side differs from the float64 run on its own weights by no more than propagated rounding noise.

Owns the prediction of that noise, its limit, and the decomposition of a free difference.  Refuses to accuse an operation: what it sees has
come from anywhere upstream.  It is for what the local test cannot see, a stage that was not measured.  Called by ``bisection``.

With S and R the free values of subject and reference, W_s and W_r the float64 witness run freely on each side's weights,

    S - R = (S - W_s) + (W_s - W_r) + (W_r - R),

as vectors: the middle term is what the weights alone cost, computed exactly.  What is left of S - R when it is taken away is the sum of the
outer terms, so the free difference is explained if and only if each outer term, the *leftover* of one side, is propagated noise.  Testing
them apart is sharper than testing their sum, and it says which side.

**The prediction** uses nothing that the side captured.  The recipes of the side's arithmetic are evaluated on the witness's own values: per
stage the variance of (captured - plain) with all inputs given, plus the square of (plain - witness), which is what emulated roundings
(a float32 angle) do.  A Gaussian of that size is added to the stage in a float64 forward pass on the same weights and goes on through all
that follows; a factor that a row shares is drawn once per row.  Activations that are rounded to the format of the weights that read them
are rounded so on each pass: one error for all readers.  The differences n_1 ... n_m of such passes from the
undisturbed one are draws of the free noise: its expected square is tr C, estimated by the mean of |n_i|^2, C being its covariance.

**The limit**: |n|^2 is a sum of squares over C's eigenvalues, distributed nearly as (tr C / v) chi2_v with v = (tr C)^2 / tr C^2 degrees of
freedom (Satterthwaite); tr C^2 is estimated without bias by the mean of <n_i, n_j>^2 over pairs.  The tail bound of the rule for groups
(``judge.rule``) with v in place of n then gives a limit for all stages of a run at its false-alarm probability, and the profile's band is
the margin for the variance model, as everywhere.  Moments are taken about zero: roundings that all passes share, 8-bit activations that
noise has not yet pushed over a step, are one direction of C, so v is near 1 there and the limit wide, where the truth is sharper.  Where
rounding errors sit in the inputs of a product, which all its outputs share, v counts tokens at most.  No number is fitted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from aprender import _core, stages
from aprender.arithmetic import Profile, profile
from aprender.captures import Captures
from aprender.judge import ggml, witness
from aprender.judge.noise import FUSED
from aprender.judge.prediction import Prediction
from aprender.judge.replay import Replay, Sample, Unlike, Unmeasured
from aprender.judge.rule import Gates, Rule
from aprender.judge.verdict import Verdict
from aprender.judge.witness import Float, ModelData
from aprender.stages import Key

UNEXPLAINED = "unexplained"

DRAWS = 6
"""Passes with noise: 15 pairs for tr C^2, whose error only moves the limit where few degrees of freedom make it wide anyway."""

DUST = 2.0**-40
"""Relative size below which a leftover is the witness's own float64 rounding."""

Free = Mapping[Key, Float]


@dataclass(frozen=True)
class Closed:
    """The leftover of one stage of one side.

    Attributes
    ----------
    stage : str
    layer : int or None
    leftover : float
        Norm of captured minus free witness on the side's own weights.
    noise : float
        Norm that propagated rounding noise is expected to have.
    limit : float
        Norm that it does not exceed at the false-alarm probability of the run.
    size : float
        Norm of the witness's value.
    freedom : float
        Degrees of freedom of the noise.
    """

    stage: str
    layer: int | None
    leftover: float
    noise: float
    limit: float
    size: float
    freedom: float

    @property
    def key(self) -> Key:
        """Stage and layer."""
        return self.stage, self.layer

    @property
    def holds(self) -> bool:
        """Whether the leftover is noise."""
        return self.leftover <= self.limit


def closure(captures: Captures, model: ModelData, declared: Profile, free: Free, rule: Rule | None = None) -> list[Closed]:
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
    rule : Rule, optional

    Returns
    -------
    list of Closed
        A row per captured stage, in execution order; empty where the run does not start at position 0.  Stages with an element that is not
        finite have none: they are judged as what they are by the local test.
    """
    own = Replay.of(captures, model, declared.with_order(captures.manifest.arithmetic))
    tokens = len(captures.tokens)
    if tuple(own.sample.positions) != tuple(range(tokens)) or len(own.sample.keys) != tokens:
        return []
    noise = _Noise(own, free)
    gates = (rule or Rule()).gates(1, len(own.wires))
    out = []
    for key, draws in noise.drawn(model, captures.tokens):
        left = leftover(own, key, free)
        if left is not None and noise.judges(key):
            out.append(_closed(own, key, left, [noise.shown(key, draw) for draw in draws], gates, noise.shown(key, free[key])))
    return [row for row in out if math.isfinite(row.leftover) and math.isfinite(row.limit)]


def leftover(own: Replay, key: Key, free: Free) -> Float | None:
    """Captured minus free witness, where both are and mean anything; None where the side did not capture the stage."""
    try:
        captured = own.captured(key)
    except (Unmeasured, Unlike):
        return None
    with np.errstate(invalid="ignore"):
        return np.asarray(captured - _view(own, key, free[key])) * _allowed(own, key)


def _view(own: Replay, key: Key, value: Float) -> Float:
    """The last token of a value, if the side captured only that."""
    shape = stages.stage(key[0]).shape
    return np.take(value, [-1], axis=shape.index("T")) if key in own.sample.last and "T" in shape else value


def _allowed(own: Replay, key: Key) -> Float | float:
    """1 where a score means anything, 0 where the mask forbids it."""
    shape = stages.stage(key[0]).shape
    if "J" not in shape or "T" not in shape:
        return 1.0
    tokens = own.sample.positions[-1:] if key in own.sample.last else own.sample.positions
    return witness.causal(tokens, own.sample.keys).astype(np.float64)


def _closed(own: Replay, key: Key, left: Float, draws: Sequence[Float], gates: Gates, value: Float) -> Closed:
    """The row of one stage."""
    total = float(np.mean([np.vdot(n, n) for n in draws]))
    shared = float(np.mean([np.vdot(a, b) ** 2 for a, b in combinations(draws, 2)]))
    most = float(left.size if own.profile.ggml is None else len(own.sample.tokens))
    freedom = min(max(total * total / shared if shared > 0 else most, 1.0), most)
    size = float(np.linalg.norm(value))
    bound = float(gates.group(np.array([freedom]), own.profile.band)[0])
    limit = math.sqrt(total * bound) + DUST * size
    return Closed(key[0], key[1], float(np.linalg.norm(left)), math.sqrt(total), limit, size, freedom)


class _Noise:
    """The rounding noise of a side's arithmetic on the witness's values, stage by stage."""

    def __init__(self, own: Replay, free: Free) -> None:
        m, self._own, self._free = own.sample, own, free
        twin = Sample(free, m.tokens, m.positions, m.keys)  # type: ignore[arg-type]  # float64 here: a witness's values
        self._replay = Replay(twin, own.profile, own.hparams, own.flags, own.weights, own.stored)
        self._readers: dict[Key, list[Key]] = {}
        for reader, sources in own.wires.items():
            for source in sources:
                self._readers.setdefault(source.key, []).append(reader)
        self._made: dict[Key, tuple[Float, Prediction] | None] = {}
        # the product before a fused bias does not exist on such a side: its rounding would be counted twice
        fused = (key for key in own.wires if own.profile.fused_bias and stages.stage(key[0]).op in FUSED)
        self._absent = frozenset(own.wires[key][0].key for key in fused)

    def judges(self, key: Key) -> bool:
        """Whether the arithmetic says anything about the stage."""
        return key in self._absent or self._at(key) is not None

    def shown(self, key: Key, value: Float) -> Float:
        """A value as the side shows it."""
        return np.asarray(_view(self._own, key, value) * _allowed(self._own, key))

    def drawn(self, model: ModelData, ids: Sequence[int]) -> Iterator[tuple[Key, list[Float]]]:
        """Draws of the free noise of each stage, in execution order; the passes go in step, so that one layer of each is held."""
        draws = [_Draw(self, np.random.default_rng(seed)) for seed in range(DRAWS)]
        passes = [witness.steps(model, ids, draw) for draw in draws]
        with np.errstate(invalid="ignore", over="ignore"):
            for together in zip(*passes, strict=True):
                key = together[0][0]
                yield key, [draw.shown.pop(key) - self._free[key] for draw in draws]

    def _at(self, key: Key) -> tuple[Float, Prediction] | None:
        """Standard deviation per element, and the prediction; None where nothing is declared."""
        if key not in self._made:
            table = self._own.sample.values.get(key) if self._own.profile.table_ulps and not self._own.wires[key] else None
            try:
                with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
                    made, _ = self._replay.predict(key, captured=None if table is None else np.asarray(table, np.float64))
                    left = made.variance + (0.0 if self._rounds_inputs(key) else np.square(made.plain - self._free[key]))
                self._made[key] = np.sqrt(np.where(np.isfinite(left), left, 0.0)), made
            except (Unmeasured, Unlike):
                self._made[key] = None
        return self._made[key]

    def _rounds_inputs(self, key: Key) -> bool:
        """Whether the stage's activations are rounded to the format of its weights."""
        row = stages.stage(key[0])
        return self._own.profile.ggml is not None and row.op in ggml.BY_FORMAT and row.weight is not None

    def _rule_of(self, key: Key) -> str | None:
        """The number format by whose rule the first reader of a stage rounds it."""
        reader = next((other for other in self._readers.get(key, ()) if self._rounds_inputs(other)), None)
        if reader is None:
            return None
        group = stages.stage(reader[0]).weight
        names = (row[0] for row in _core.WEIGHTS if row[1] == group)
        found = next((self._own.stored[name, reader[1]][0] for name in names if (name, reader[1]) in self._own.stored), None)
        return found if found in ggml.RULES else None

    def read(self, key: Key, value: Float) -> Float:
        """A stage's value as its readers multiply it."""
        rule, how = self._rule_of(key), self._own.profile.ggml
        if rule is None or how is None:
            return value
        return np.asarray(ggml.RULES[rule](value.astype(np.float32), how).value, np.float64)

    def disturbed(self, key: Key, value: Float, generator: np.random.Generator) -> Float:
        """A value with noise of the stage's size."""
        found = None if key in self._absent else self._at(key)
        if found is None:
            return value
        spread, made = found
        out = value + spread * generator.standard_normal(value.shape)
        if made.row is None:
            return out
        rows = value.reshape(-1, made.width)
        return np.asarray(out + (rows * made.row * generator.standard_normal((len(rows), 1))).reshape(value.shape))


class _Draw:
    """One pass's noise; ``shown`` is what the side would show of the stages passed, before its readers round it."""

    def __init__(self, noise: _Noise, generator: np.random.Generator) -> None:
        self._noise, self._generator = noise, generator
        self.shown: dict[Key, Float] = {}

    def __call__(self, key: Key, value: Float) -> Float:
        self.shown[key] = self._noise.disturbed(key, value, self._generator)
        return self._noise.read(key, self.shown[key])


# ---- the parts of a difference ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """The free difference of one stage as a sum of three vectors, by their norms relative to the reference; norms do not add up.

    Attributes
    ----------
    stage : str
    layer : int or None
    apart : float
        Subject minus reference.
    quantization : float
        Witness on the subject's weights minus witness on the reference's.
    subject, reference : float
        Each side minus the witness on its own weights: arithmetic, and bugs if there are any.
    subject_noise, reference_noise : float or None
        What rounding noise alone makes of these; None where it was not predicted.
    """

    stage: str
    layer: int | None
    apart: float
    quantization: float
    subject: float
    reference: float
    subject_noise: float | None = None
    reference_noise: float | None = None

    def text(self) -> str:
        """One line for the report."""

        def noise(value: float | None) -> str:
            return "" if value is None else f" (rounding noise predicts {value:.1e})"

        return (
            f"{stages.spell((self.stage, self.layer))}: {self.apart:.1e} apart = quantisation {self.quantization:.1e} + the subject's"
            f" arithmetic and bugs {self.subject:.1e}{noise(self.subject_noise)} + the reference's"
            f" {self.reference:.1e}{noise(self.reference_noise)}; relative L2 of three vectors, which add up where their lengths do not"
        )


def decompose(sides: Sequence[tuple[Captures, ModelData]], free: Sequence[Free], rows: Sequence[Sequence[Closed]]) -> Parts | None:
    """The parts of the difference at the last stage that both sides show for all tokens.

    Parameters
    ----------
    sides : sequence of (Captures, ModelData)
        Subject and reference.
    free : sequence of mapping
        Witness of each.
    rows : sequence of sequence of Closed
        :func:`closure` of each; may be empty.

    Returns
    -------
    Parts or None
        None where no such stage is finite on both sides.
    """
    own, other = (Replay.of(captures, model, profile("exact")) for captures, model in sides)  # nothing is replayed: any row will do
    for key in reversed(own.wires):
        if key not in free[1] or key in own.sample.last or key in other.sample.last:
            continue
        left, right = leftover(own, key, free[0]), leftover(other, key, free[1])
        if left is None or right is None or left.shape != right.shape:
            continue
        weights = (free[0][key] - free[1][key]) * _allowed(own, key)
        size = float(np.linalg.norm(other.captured(key)))
        norms = [float(np.linalg.norm(part)) for part in (left + weights - right, weights, left, right)]
        if size > 0 and all(map(math.isfinite, (size, *norms))):
            noise = [next((row.noise / size for row in found if row.key == key), None) for found in rows]
            return Parts(*key, *(norm / size for norm in norms), *noise)
    return None


# ---- the finding -----------------------------------------------------------------------------------------------------------------------


def explained(judged: Verdict, rows: Mapping[str, Sequence[Closed]]) -> Verdict:
    """The verdict with finding ``unexplained`` if no stage is wrong and yet a side's free run is far from what noise makes.

    Parameters
    ----------
    judged : Verdict
    rows : mapping
        ``subject`` and ``reference`` to their :func:`closure`.
    """
    still_open = [(stages.order(row.key), name, row) for name, found in rows.items() for row in found if not row.holds]
    if judged.verdict != "agree" or not still_open:
        return judged
    _, name, first = min(still_open, key=lambda item: item[0])
    party = judged.subject if name == "subject" else judged.reference
    hidden = [r for r in party.results if not r.measured and stages.order(r.key) <= stages.order(first.key)]
    where = f"; not judged up to there: {', '.join(dict.fromkeys(stages.spell(r.key) for r in hidden[-4:]))}" if hidden else ""
    return judged.led_by(
        UNEXPLAINED,
        f"No judged operation is wrong, and yet the {name} ({party.spelling}) is not explained: from {stages.spell(first.key)} on it is"
        f" {_share(first.leftover, first)} from the float64 run on its own weights, where its rounding noise makes"
        f" {_share(first.noise, first)} and at most {_share(first.limit, first)} (relative L2){where}.",
    )


def _share(norm: float, row: Closed) -> str:
    return f"{norm / row.size if row.size else norm:.1e}"
