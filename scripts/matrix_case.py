"""One cell of the fault matrix: what is planted where, how it is judged, and how the judgement is scored.

Owns the protocol that the populations share (``matrix_own``, ``matrix_gguf``, ``matrix_hf``): a module has ``cases(args)``, which yields
:class:`Case`; a case is cheap until its ``judge`` is called.  A population plants; :class:`Bench` holds the untouched run of a side, judges
a faulty one and says what a cosine gate would have seen.  :func:`score` compares names and places only: it knows no fault.  Called by
``fault_matrix``.

    def cases(args: argparse.Namespace) -> Iterator[Case]:
        bench = functools.cache(lambda: Bench(clean_captures, model, profile, witness_on_unquantized_weights))
        judge = lambda: bench().judge("eps", ("attn_norm", 0), captures_of_the_patched_model())
        yield Case("hf", "eps", ("attn_norm", 0), "qwen2", "bfloat16", "prefill", 0, judge)

``args`` has ``archs``, ``formats``, ``dtypes``, ``modes`` (lists of names), ``seeds``, ``sites`` (of each fault and model) and ``whole``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matrix_power import Forecast, Power
from numpy.typing import NDArray

from aprender import stages
from aprender.arithmetic import Profile
from aprender.captures import Captures, check_contract, view
from aprender.errors import NotComparable
from aprender.judge import faults, local
from aprender.judge.diagnose import Diagnosis
from aprender.judge.faultrow import HEALS, REFUSED
from aprender.judge.local import StageResult
from aprender.judge.replay import Replay, ancestors, wiring
from aprender.judge.rule import Rule
from aprender.judge.witness import Float, ModelData
from aprender.manifest import DERIVED
from aprender.stages import Key

GATE = 0.999
"""The cosine gate that is shown beside: what porting guides ask of a stage."""

CLEAN = ""
"""Fault of a case that has none."""

TOP = 3
"""Names among which the right kind must be."""


@dataclass(frozen=True)
class Judged:
    """What came of one case.

    Attributes
    ----------
    wrong : sequence of StageResult
        Stages called wrong, in execution order.
    diagnosis : Diagnosis or None
        Of the first of them.
    due : tuple of Key
        Where the fault may show: the stages whose judged region holds its site, in execution order; it must show at the first.
    power : Power
    changed : bool
        Whether a bit of the first due stage differs from the untouched run.
    cosine, clean_cosine : float or None
        Of that stage with the float64 witness on the unquantized weights; of the untouched run.
    refused : bool
        The capture was refused as not comparable.
    same_logits : bool
        Whether the logits are those of the untouched run, up to noise.
    """

    wrong: Sequence[StageResult] = ()
    diagnosis: Diagnosis | None = None
    due: tuple[Key, ...] = ()
    power: Power = field(default_factory=Power)
    changed: bool = True
    cosine: float | None = None
    clean_cosine: float | None = None
    refused: bool = False
    same_logits: bool = True


@dataclass(frozen=True)
class Case:
    """One cell.

    Attributes
    ----------
    population : str
        ``own``, ``gguf`` or ``hf``.
    fault : str
        Row of ``judge.faults``, fault or control; :data:`CLEAN` for the untouched run.
    key : Key or None
        Where it is planted: a site of the row.  Where it must show follows from what the side shows (:meth:`Bench.due`).
    side, format, mode : str
        Family; number format of the weights, or dtype; how the prompt is run.
    seed : int
        Of weights and prompt.
    judge : callable
        Runs it.
    """

    population: str
    fault: str
    key: Key | None
    side: str
    format: str
    mode: str
    seed: int
    judge: Callable[[], Judged] = field(repr=False, compare=False)

    @property
    def group(self) -> str:
        """Cases that share one untouched run; they follow each other and are judged by one process."""
        return f"{self.population} {self.side} {self.format} {self.mode} {self.seed}"

    @property
    def name(self) -> str:
        """What a record is found by again."""
        return f"{self.group} {self.fault or 'clean'}@{stages.spell(self.key) if self.key else ''}"


class Bench:
    """An untouched run of a side: its captures, how they are judged, and what a gate would compare with.

    Parameters
    ----------
    captures : Captures
    model : ModelData
        What the file says: the right weights and hyper-parameters.
    profile : Profile
    reference : mapping, optional
        (stage, layer) to the float64 witness on the unquantized weights: what a cosine gate is held against.
    whole : bool
        Judge every stage of every run, also those of which neither value nor inputs changed.
    """

    def __init__(
        self,
        captures: Captures,
        model: ModelData,
        profile: Profile,
        reference: Mapping[Key, Float] | None = None,
        whole: bool = False,
    ) -> None:
        self.clean, self.model, self.profile, self.whole = captures, model, profile, whole
        self.reference = reference or {}
        self.results = local.local(captures, model, profile)
        self.wires = wiring(model.flags, int(model.hparams["layers"]))
        self._before = ancestors(self.wires)
        self._replay = Replay.of(captures, model, profile.with_order(captures.manifest.arithmetic))
        self._gates = local._gates(self._replay, Rule())
        self._forecasts: dict[tuple[Key, Key], Forecast] = {}

    @property
    def untouched(self) -> Judged:
        """The case without a fault."""
        return _judged(self.results)

    def due(self, fault: str, site: Key, more: Iterable[Key] = (), captures: Captures | None = None) -> tuple[Key, ...]:
        """Where a fault may show on this side: the site if it is judged, else the stages whose region spans it, else the next after it.

        A stage that the faulty run's ``captures`` only recompute (scores that are not what the softmax was given) is not judged there.
        """
        row = {**faults.FAULTS, **faults.CONTROLS}[fault]
        sites = {site, *more, *((stage, site[1]) for stage in row.also)}
        hidden = {key for key, note in captures.manifest.tensors.items() if note.origin == DERIVED} if captures is not None else set()
        judged = [r for r in self.results if r.measured and r.key not in hidden]
        held = tuple(r.key for r in judged if sites & {r.key, *r.spans})
        after = (r.key for r in judged if site in self._before[r.key])
        return held or tuple(after)[:1]

    def power(self, fault: str, site: Key, shown: Key) -> Power:
        """What is to be expected of a fault, from the untouched run alone."""
        if (site, shown) not in self._forecasts:
            self._forecasts[site, shown] = Forecast(self._replay, shown, site, self._gates, self.profile.band)
        return self._forecasts[site, shown].power(fault)

    def judge(self, fault: str, site: Key, captures: Captures, more: Iterable[Key] = ()) -> Judged:
        """Judge a run that has a fault at a site; ``more`` are other sites of the same cause (a hyper-parameter of the model)."""
        due = self.due(fault, site, more, captures)
        try:
            check_contract(captures, self.clean)
        except NotComparable:
            return Judged(due=due, refused=True)
        made = _judged(self._local(captures))
        if not due:
            return made
        x, y = _seen(captures, due[0]), _seen(self.clean, due[0])
        return dataclasses.replace(
            made,
            due=due,
            power=self.power(fault, site, due[0]),
            changed=x.shape != y.shape or not np.array_equal(x, y, equal_nan=True),
            cosine=self._cosine(captures, due[0]),
            clean_cosine=self._cosine(self.clean, due[0]),
            same_logits=self._same_logits(captures),
        )

    def _local(self, captures: Captures) -> list[StageResult]:
        """Every stage judged; one of which neither the value nor an input changed a bit is what it was."""
        known = {} if self.whole else {r.key: r for r in self.results if self._as_it_was(captures, r.key)}
        judge = local._judge

        def remembered(replay: Any, key: Key, *rule: Any) -> StageResult:
            return known[key] if key in known else judge(replay, key, *rule)

        local._judge = remembered
        try:
            return local.local(captures, self.model, self.profile)
        finally:
            local._judge = judge

    def _as_it_was(self, captures: Captures, key: Key) -> bool:
        """Whether a stage, all that it was judged on and all that is known of it are the untouched run's."""
        old, new = self.clean.manifest, captures.manifest
        if (old.tokens, old.positions, old.arithmetic) != (new.tokens, new.positions, new.arithmetic):
            return False
        spans = next(r.spans for r in self.results if r.key == key)
        read = {key, *(source.key for k in (key, *spans) for source in self.wires[k])}
        return all(
            old.tensors.get(k) == new.tensors.get(k) and (k not in captures or np.array_equal(captures[k], self.clean[k], equal_nan=True))
            for k in read
        )

    def _cosine(self, captures: Captures, key: Key) -> float | None:
        """Cosine of a stage with the witness on the unquantized weights, where the mask allows; None if there is none."""
        if key not in self.reference:
            return None
        x, y = _seen(captures, key).astype(np.float64), np.asarray(self.reference[key], np.float64)
        x, y = x.ravel(), (y if y.shape == x.shape else y[-len(x) :]).ravel()  # a capture of the last token only
        norm = float(np.linalg.norm(x) * np.linalg.norm(y))
        return float(x @ y) / norm if 0 < norm < np.inf else 0.0

    def _same_logits(self, captures: Captures) -> bool:
        if stages.LOGITS not in captures or stages.LOGITS not in self.clean:
            return True
        x, y = captures[stages.LOGITS], self.clean[stages.LOGITS]
        some = max(1e-3, 16 * self.profile.activations.unit)  # roundings between a stage and the logits, in the side's own numbers
        return bool(np.linalg.norm(x - y[-len(x) :]) <= some * np.linalg.norm(y[-len(x) :]))


def _seen(captures: Captures, key: Key) -> NDArray[np.float32]:
    """A captured stage in our lane order; scores that the mask forbids mean nothing and are 0."""
    value = view(captures, key, last=False)
    return np.tril(value) if key[0] == "attn_scores" else np.asarray(value)


def _judged(results: Sequence[StageResult]) -> Judged:
    """What a list of results says."""
    wrong = [r for r in results if r.state == local.WRONG]
    return Judged(wrong, wrong[0].diagnosis if wrong else None)


# ---- the score -------------------------------------------------------------------------------------------------------------------------


def rank(judged: Judged, fault: str) -> int:
    """Place of the right name among those that the diagnosis gives, from 1; 0 if it is not among them."""
    if judged.diagnosis is None:
        return 0
    right = {fault, *judged.power.twins}
    return next((i for i, kind in enumerate((judged.diagnosis.kind, *judged.diagnosis.ties), 1) if kind in right), 0)


def gate(judged: Judged) -> str:
    """What a cosine gate would have said: ``sees`` it, ``passes`` it, or ``cries`` on the untouched run too."""
    if judged.cosine is None or judged.clean_cosine is None:
        return ""
    if not judged.clean_cosine >= GATE:
        return "cries"
    return "passes" if judged.cosine >= GATE else "sees"


def score(case: Case, judged: Judged) -> dict[str, Any]:
    """One record of the matrix.

    ``excluded`` cases are counted and listed, not scored: in an arithmetic of which every bit is declared (``own``) those that change no
    bit; elsewhere those that were predicted invisible before the run.  A stage that is accused and not due is a false one in any case.
    """
    row = faults.CONTROLS.get(case.fault)
    wrong = [r.key for r in judged.wrong]
    out = {
        "population": case.population,
        "fault": case.fault or None,
        "site": stages.spell(case.key) if case.key else None,
        "side": case.side,
        "format": case.format,
        "mode": case.mode,
        "seed": case.seed,
        "wrong": [stages.spell(key) for key in wrong],
        "false": [stages.spell(key) for key in wrong if key not in judged.due],
    }
    if not case.fault:
        return out | {"right": not wrong}
    if row is not None:
        return out | {"expect": row.expect, "right": _control(row.expect, judged)}
    invisible = not judged.changed if case.population == "own" else judged.power.visible is False
    found = judged.diagnosis
    return out | {
        "due": stages.spell(judged.due[0]) if judged.due else None,
        "predicted": judged.power.visible,
        "changed": judged.changed,
        "excluded": invisible,
        "stage": bool(wrong and judged.due and wrong[0] == judged.due[0]),
        "kind": None if found is None else found.kind,
        "ties": [] if found is None else list(found.ties),
        "twins": list(judged.power.twins),
        "rank": rank(judged, case.fault),
        "complete": found is None or found.complete,
        "gate": gate(judged),
        "cosine": _short(judged.cosine),
        "clean_cosine": _short(judged.clean_cosine),
    }


def _control(expect: str, judged: Judged) -> bool:
    """Whether a control came to what it must; one that heals may be called off where it sits, if the logits are right."""
    if expect == REFUSED:
        return judged.refused
    if expect == HEALS:
        return judged.same_logits and not judged.refused and {r.key for r in judged.wrong} <= set(judged.due)
    return not judged.refused and not judged.wrong and judged.same_logits


def _short(cosine: float | None) -> float | None:
    """To seven digits: what a record keeps."""
    return None if cosine is None else round(cosine, 7)
