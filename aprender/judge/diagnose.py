"""What kind of fault a wrong stage has: each candidate is replayed in the witness's place, and confirmed if only dust is left.

Owns the rule that confirms a candidate, and the ranking.  The candidates are the rows of the catalogue (``judge.faults``, whose changes
``judge.changes`` carries out) and those that look at the captured value first (``judge.fits``).  Refuses shares of explained variance: a
candidate holds if the very tests that called the stage wrong (``judge.measure`` under the run's gates) find nothing once it is replayed
under the same roundings, and else the kind is ``unknown`` with the shapes of ``judge.shapes`` and what is nearest.  Called by
``judge.local`` for the first wrong stages of a side.

Where a stage was estimated and not captured, the fault may sit in it: every operation of the judged region is a case.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from aprender import _core, stages
from aprender.judge import fused
from aprender.judge.case import Case, collect
from aprender.judge.changes import Impossible, changed
from aprender.judge.faultrow import Change
from aprender.judge.faults import ROWS, SUSPECT_ROWS
from aprender.judge.fits import FITTED, FLOOR, SEARCHED, UNSCALED, Parameter, free_scale, noise_of, unsure, written
from aprender.judge.measure import Measure, measure
from aprender.judge.prediction import Prediction
from aprender.judge.replay import Recipe, Replay
from aprender.judge.rounding import to_format
from aprender.judge.rule import Gates
from aprender.judge.shapes import Residual, Shape, shapes
from aprender.judge.witness import Float
from aprender.stages import Key

UNKNOWN = "unknown"

FREE_SCALE = "free-scale"
"""The whole value times a number: what no fault of its own is, and what some cannot be told from."""

BUDGET = 4.0
"""Seconds of one thread after which no further candidate is begun in a run; the diagnosis then says that some were not tried."""

WITHIN = 8
"""Rows that a coarse search looks at: near the start angles do not wrap."""

NEAREST = 3
"""Candidates that are shown where none is confirmed."""

TOGETHER: Mapping[str, frozenset[str]] = {"mask": frozenset({"SCORES", "SOFTMAX"})}
"""What several operations of a region read alike: a change of it is a change of them all."""


@dataclass(frozen=True)
class Near:
    """A candidate that is not confirmed, and yet explains most of a residual: it is no verdict.

    Attributes
    ----------
    kind, detail : str
    alpha, sigma : float
        As in :class:`Diagnosis`; far from 1 it is the same family with another number, or chance.
    explained : float
        Share of the residual's weighted square that alpha times the candidate's takes away.
    """

    kind: str
    detail: str
    alpha: float
    sigma: float
    explained: float

    @property
    def sentence(self) -> str:
        """How near it comes."""
        return f"{self.kind} explains {100 * self.explained:.3g} % of it at {self.alpha:.4g} ± {self.sigma:.1g} of its size"


@dataclass(frozen=True)
class Diagnosis:
    """What kind of fault a stage has.

    Attributes
    ----------
    stage, layer : str, int or None
    kind : str
        Slug of the candidate that leaves only dust; ``unknown`` if none does.
    detail : str
        The variant in words.
    ties : tuple of str
        Other kinds that leave only dust too: this capture cannot tell them apart.
    alpha, sigma : float or None
        Least squares of the residual on the candidate's predicted residual: 1 within sigma if the candidate is the whole fault.
    left : float or None
        Root mean square z of what is left under the candidate (unknown: of the residual itself).
    bit_equal : float or None
        Share of elements that have the candidate's very bits.
    shapes : tuple of Shape
    look_at : tuple of str
        Weights by their names in the file, keys of hyper-parameters, the operation.
    tried : int
        Variants replayed.
    complete : bool
        Whether all were tried within the budget.
    nearest : tuple of Near
        Where nothing is confirmed: what comes nearest, the best first.
    """

    stage: str
    layer: int | None
    kind: str
    detail: str = ""
    ties: tuple[str, ...] = ()
    alpha: float | None = None
    sigma: float | None = None
    left: float | None = None
    bit_equal: float | None = None
    shapes: tuple[Shape, ...] = ()
    look_at: tuple[str, ...] = ()
    tried: int = 0
    complete: bool = True
    nearest: tuple[Near, ...] = ()

    def to_json(self) -> dict[str, object]:
        """The keys that scripts rely on."""
        lists = {"ties": list(self.ties), "look_at": list(self.look_at), "nearest": [dataclasses.asdict(near) for near in self.nearest]}
        return dataclasses.asdict(self) | lists | {"shapes": [s.to_json() for s in self.shapes]}

    @property
    def sentence(self) -> str:
        """What it is and how it is known; else what it looks like and where to look."""
        look = "; ".join(self.look_at)
        if self.kind == UNKNOWN:
            seen = "; ".join(f"{s.code}: {s.text}" for s in self.shapes) or "no shape"
            few = "" if self.complete else f" (the {self.tried} replayed; larger ones were not)"
            near = "; ".join(near.sentence for near in self.nearest)
            near = f" Nearest, and no verdict, for more than rounding is left: {near}." if near else ""
            return f"Kind unknown: no fault of the catalogue{few} leaves only rounding. The residual: {seen}.{near} Look at {look}."
        fit = "" if self.alpha is None else f", {self.alpha:.4g} ± {self.sigma:.1g} of it is there"
        tie = f"; as likely: {', '.join(self.ties)}" if self.ties else ""
        return f"Kind {self.kind}: {self.detail}. Replayed with it, only rounding is left{fit}{tie}. Look at {look}."


HPARAMS: Mapping[str, tuple[str, ...]] = {
    "ROPE_TABLE": ("theta", "head"),
    "ROPE": ("theta", "head"),
    "RMSNORM": ("eps",),
    "SCORES": ("head", "heads", "kv_heads"),
    "MIX": ("head", "heads", "kv_heads"),
    fused.ATTENTION: ("head", "heads", "kv_heads"),
    "EMBED": ("dim",),
}
"""Operation to the hyper-parameters that it reads."""


# ---- the search ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    """A variant that was replayed and leaves only dust."""

    slug: str
    detail: str
    made: Prediction
    found: Measure
    keys: tuple[Key, ...]
    fitted: bool


class _Held(Mapping[Key, ArrayLike]):
    """Weights that are decoded once and kept while one stage is looked at."""

    def __init__(self, weights: Mapping[Key, ArrayLike]) -> None:
        self._weights, self._kept = weights, dict[Key, ArrayLike]()

    def __getitem__(self, key: Key) -> ArrayLike:
        if key not in self._kept:
            self._kept[key] = self._weights[key]
        return self._kept[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __contains__(self, key: object) -> bool:
        return key in self._weights


class _Search:
    """One wrong stage under suspicion of everything."""

    def __init__(self, replay: Replay, key: Key, gates: Gates, band: float) -> None:
        self.replay, self.key, self.gates, self.band = copy.copy(replay), key, gates, band
        self.replay.weights = None if replay.weights is None else _Held(replay.weights)
        self.last = key in replay.sample.last
        self.captured = replay.captured(key)
        self.right, spans = self.replay.predict(key, self.last, self.captured)
        self.found = measure(self.captured, self.right, gates, band)
        self.cases = collect(self.replay, key, self.captured, self.right, spans)
        self.tried, self.complete = 0, True
        self.near: dict[str, Near] = {}

    def replayed(self, changes: Mapping[Key, Recipe]) -> Prediction:
        """The stage with other recipes in its region."""
        (only, *others) = self.cases
        if not others:  # nothing was estimated: the inputs are those of the case
            return dataclasses.replace(changes[only.key](only.at, only.inputs), shared=self.right.shared)
        twin = copy.copy(self.replay)
        twin.changes = changes
        return twin.predict(self.key, self.last, self.captured)[0]

    def trial(self, slug: str, detail: str, changes: Mapping[Key, Recipe], more: Float | None = None) -> _Trial | None:
        """Replay a variant; None unless only dust is left."""
        self.tried += 1
        try:
            made = self.replayed(changes)
        except Impossible:
            return None
        if made.pre.shape != self.captured.shape:
            return None
        made = made if more is None else unsure(made, more)
        found = measure(self.captured, made, self.gates, self.band)
        if found.reasons or found.n < self._spoken(made) or not _fits(self.captured, made):
            self._note(slug, detail, made)
            return None
        due = self.right.bits()
        if _fits(due, made) and not measure(due, made, self.gates, self.band).reasons:
            return None  # too vague to differ from no fault at all
        return _Trial(slug, detail, made, found, tuple(changes), more is not None)

    def _note(self, slug: str, detail: str, made: Prediction) -> None:
        """Remember the best of a kind that was not confirmed, if it explains most of the residual."""
        alpha, sigma, explained = fit(self.captured, self.right, made)
        if explained > 0.5 and (slug not in self.near or explained > self.near[slug].explained):
            self.near[slug] = Near(slug, detail, alpha, sigma, explained)

    def _spoken(self, made: Prediction) -> int:
        """Elements that a prediction must have a value for: those that it does not leave out (a row without keys), half at least."""
        used = np.isfinite(self.captured) & np.isfinite(self.right.plain)
        used &= True if self.right.compared is None else self.right.compared
        spoken = used if made.compared is None else used & made.compared
        return max(int(np.count_nonzero(spoken)), int(np.count_nonzero(used)) // 2, 1)

    def run(self, budget: float) -> list[_Trial]:
        """All candidates that leave only dust, the best first; one of each kind.

        A row of the catalogue comes before a fitted number, more equal bits before fewer, then the order of the tables decides.
        """
        end = time.thread_time() + budget
        confirmed: dict[str, _Trial] = {}
        for slug, detail, changes in self._variants():
            if time.thread_time() > end:
                self.complete = False
                break
            self._keep(confirmed, self.trial(slug, detail, changes))
        for row in FITTED:
            for case in self.cases:
                if case.op in row.ops and row.slug not in confirmed:
                    if time.thread_time() > end:
                        self.complete = False
                        break
                    self._keep(confirmed, self._fit(row, case))
        self._free(confirmed)
        return sorted(confirmed.values(), key=lambda t: (t.fitted, -t.found.bit_equal))

    @staticmethod
    def _keep(confirmed: dict[str, _Trial], trial: _Trial | None) -> None:
        if trial is not None and (trial.slug not in confirmed or trial.found.bit_equal > confirmed[trial.slug].found.bit_equal):
            confirmed[trial.slug] = trial

    def _free(self, confirmed: dict[str, _Trial]) -> None:
        """A free scale of the stage is a shape and no kind; it is a tie of what it cannot be told from, and else only near."""
        (case,) = [case for case in self.cases if case.key == self.key]
        for detail, recipe in free_scale(case) if case.op not in UNSCALED else ():
            found = self.trial(FREE_SCALE, detail, {case.key: recipe})
            if found is not None and confirmed:
                self._keep(confirmed, dataclasses.replace(found, fitted=True))
            elif found is not None:
                self._note(FREE_SCALE, detail, found.made)

    def _variants(self) -> Iterator[tuple[str, str, dict[Key, Recipe]]]:
        """Every variant of every candidate without a free number, with the recipes that it changes."""
        for row in (*ROWS, *SUSPECT_ROWS):
            for case in self.cases:
                for stage in case.stages:
                    for detail, changes in row.suspected(stage, case.key[1], self.replay.flags, self.replay.hparams):
                        made = self._recipes(case, changes)
                        if made:
                            yield row.name, detail, made
        for slug, ops, variants in SEARCHED:
            for case in self.cases:
                if not ops or case.op in ops:
                    for detail, recipe in variants(case):
                        yield slug, detail, {case.key: recipe}

    def _recipes(self, case: Case, changes: Sequence[Change]) -> dict[Key, Recipe] | None:
        """The changed recipes of a case, and of the others that read the same; None where a change has no place."""
        ops = frozenset[str]().union(*(TOGETHER.get(change["of"], frozenset()) for change in changes))
        try:
            return {other.key: changed(other, changes) for other in self.cases if other is case or other.op in ops}
        except Impossible:
            return None

    def _fit(self, row: Parameter, case: Case) -> _Trial | None:
        """The best value of one number, by least squares in its logarithm."""

        def plain(log: float) -> Float:
            return self.replayed({case.key: row.change(case, math.exp(log))}).plain

        used = np.isfinite(self.captured) & np.isfinite(self.right.plain)
        used &= True if self.right.compared is None else self.right.compared
        weight = np.where(used, 1.0 / np.where(used, noise_of(self.right, self.captured), 1.0), 0.0)
        few = weight.copy()
        few[(slice(None), slice(WITHIN, None)) if few.ndim == 3 else slice(WITHIN, None)] = 0.0

        def loss(log: float, w: Float) -> float:
            return float(np.nansum(np.where(used, np.square(self.captured - plain(log)), 0.0) * w))

        start = min((math.log(p) for p in row.starts(case)), key=lambda log: loss(log, few))
        log, step = start, 1e-5
        for _ in range(12):
            slope = (plain(log + step) - plain(log - step)) / (2 * step)
            norm = float((slope**2 * weight)[used].sum())
            if not norm > 0:
                return None
            move = float((slope * (self.captured - plain(log)) * weight)[used].sum()) / norm
            log += max(-0.5, min(0.5, move))
            if abs(move) < 1e-3 / math.sqrt(norm):
                break
        value, sigma = math.exp(log), math.exp(log) / math.sqrt(norm)
        for nice in written(value, sigma, row.unit(case)):
            found = self.trial(row.slug, f"{row.slug} is {nice:.8g}", {case.key: row.change(case, nice)})
            if found is not None:
                return found
        text = f"{row.slug} is {value:.8g} ± {sigma:.1g} (fitted)"
        return self.trial(row.slug, text, {case.key: row.change(case, value)}, np.where(used, slope**2 / norm, 0.0))


def _fits(value: Float, made: Prediction) -> bool:
    """Whether every value is one of the format that a prediction is rounded to."""
    finite = np.isfinite(value)
    return np.array_equal(to_format(value, made.format)[finite], value[finite])


def fit(captured: Float, right: Prediction, made: Prediction) -> tuple[float, float, float]:
    """Least squares of the residual on the residual that a candidate predicts: its factor, the standard deviation, the share explained.

    All 0 where the candidate predicts no residual.
    """
    used = np.isfinite(captured) & np.isfinite(right.plain) & np.isfinite(made.plain)
    for compared in (right.compared, made.compared):
        used &= True if compared is None else compared
    error, due = (captured - right.plain)[used], (made.plain - right.plain)[used]
    v = np.maximum(made.variance[used], np.square(FLOOR * made.plain[used]) + np.finfo(float).tiny)
    norm, size, both = float((due * due / v).sum()), float((error * error / v).sum()), float((error * due / v).sum())
    if not (0 < norm < math.inf and 0 < size < math.inf):
        return 0.0, 0.0, 0.0
    return both / norm, 1.0 / math.sqrt(norm), min(both * both / (norm * size), 1.0)


def _look_at(cases: Iterable[Case]) -> tuple[str, ...]:
    """Weights by their names in files, hyper-parameters by their keys, and operations."""
    out: dict[str, None] = {}
    for case in cases:
        layer = "" if case.key[1] is None else str(case.key[1])
        groups = {stages.stage(case.key[0]).weight, stages.stage(case.key[0]).bias} - {None}
        for name, group, gguf, hf, *_, flag in _core.WEIGHTS:
            if group in groups and (
                flag == "ALWAYS" or flag in case.replay.flags or case.replay.weights is None or (name, case.key[1]) in case.replay.weights
            ):
                out[f"weight {gguf.replace('%d', layer)} ({hf.replace('%d', layer)})"] = None
        for name, _, gguf, hf, *_ in _core.HPARAMS:
            if name in HPARAMS.get(case.op, ()):
                out[f"hyper-parameter {gguf.removeprefix('%s.')} ({hf.split()[0]})"] = None
        out[f"operation {case.op} of {stages.spell(case.key)}"] = None
    return tuple(out)


@np.errstate(invalid="ignore", over="ignore", divide="ignore", under="ignore")
def diagnose(replay: Replay, key: Key, gates: Gates, band: float, budget: float = BUDGET) -> Diagnosis:
    """What kind of fault a wrong stage has.

    Parameters
    ----------
    replay : Replay
        The side, as it was judged.
    key : Key
        A stage that was called wrong.
    gates, band : Gates, float
        Those that called it wrong.
    budget : float
        Seconds after which no further candidate is begun.
    """
    search = _Search(replay, key, gates, band)
    confirmed = search.run(budget)
    right, captured = search.right, search.captured
    seen = np.ones(captured.shape, bool) if right.compared is None else right.compared
    head = int(replay.hparams["head"]) if {"Qd", "Kd", "QKV"} & set(stages.stage(key[0]).shape) else 0
    shown = shapes(Residual.of(captured, right.plain, right.variance, np.broadcast_to(seen, captured.shape), head))
    common = {"shapes": shown, "tried": search.tried, "complete": search.complete}
    if not confirmed:
        near = tuple(sorted(search.near.values(), key=lambda n: -n.explained)[:NEAREST])
        return Diagnosis(*key, UNKNOWN, left=search.found.z_rms, look_at=_look_at(search.cases), nearest=near, **common)  # type: ignore[arg-type]
    best = confirmed[0]
    alpha, sigma, _ = fit(captured, right, best.made)
    return Diagnosis(
        *key,
        best.slug,
        best.detail,
        tuple(t.slug for t in confirmed[1:]),
        alpha if sigma else None,
        sigma or None,
        best.found.z_rms,
        best.found.bit_equal,
        look_at=_look_at(case for case in search.cases if case.key in best.keys),
        **common,  # type: ignore[arg-type]
    )
