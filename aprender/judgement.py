"""The judgement of a pair: both sides captured, each judged by itself, then the free comparison and what leads the verdict.

Owns :class:`Hunt`, everything that one judgement needs, and the order of the work: the sample contract, the local judgement of both sides,
closure, the parts of the free difference, what a side holds against its file, and the remarks that a reader needs.  Refuses to compare
unlike things and to call anything wrong itself: that is ``judge.verdict``.  Called by ``bisection``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aprender import arithmetic, repair
from aprender import probes as probing
from aprender.captures import Captures, check_contract
from aprender.declared import AUTO, led, settle
from aprender.errors import Error
from aprender.judge import closure, loaded, metrics, passes, witness
from aprender.judge.local import StageResult
from aprender.judge.parts import Parts, decompose
from aprender.judge.verdict import Party, Verdict, decide
from aprender.manifest import HELD
from aprender.references import candidates, file_of, weights_of
from aprender.sides.own import OwnSide
from aprender.stages import Key


@dataclass(frozen=True)
class Hunt:
    """Everything that one judgement needs, opened.

    Attributes
    ----------
    subject, reference : side
        The reference is None if it is to be found: a recording beside the model, else the witness on the subject's weights.
    planted : str or None
        What was planted in the subject, in words.
    right : side or None
        The subject without the planted fault.
    closure : bool
        Whether closure is run whatever it costs.
    """

    subject: Any
    reference: Any = None
    right: Any = None
    planted: str | None = None
    profiles: Mapping[str, str] = field(default_factory=dict)
    closure: bool = False

    def profile_of(self, party: str, side: Any) -> arithmetic.Profile | None:
        """The declared arithmetic, or the one that the user declares instead."""
        if party in self.profiles and self.profiles[party] != AUTO:
            return arithmetic.profile(self.profiles[party])
        found: arithmetic.Profile | None = side.profile
        return found

    def under(self, party: str, profile: arithmetic.Profile) -> Hunt:
        """The same with a side's arithmetic settled."""
        return dataclasses.replace(self, profiles={**self.profiles, party: profile.name})


def _captured(side: Any, ids: Sequence[int], pieces: Sequence[int]) -> Captures:
    """What a side makes of the ids; our own engine as it generates: the prompt, then token by token."""
    if len(pieces) > 1 and isinstance(side, OwnSide):
        return side.capture_pieces(ids, pieces)
    made: Captures = side.capture(ids)
    return made


def undecided(opened: Hunt, ids: Sequence[int], sentence: str) -> Verdict:
    """The verdict for token ids that differ: nothing was run."""
    parties = [_party(opened, name, side) for name, side in (("subject", opened.subject), ("reference", opened.reference))]
    return Verdict(
        verdict="divergence",
        finding="tokens",
        first=None,
        wrong=(),
        sentence=sentence,
        compared=0,
        unmeasured=(),
        tokens=tuple(ids),
        subject=parties[0],
        reference=parties[1],
        rows=(),
    )


def _party(opened: Hunt, name: str, side: Any, captures: Captures | None = None, results: Sequence[StageResult] = ()) -> Party:
    profile = opened.profile_of(name, side)
    manifest = captures.manifest if captures is not None else None
    backend = None
    if manifest is not None and manifest.backend:
        backend = f"{manifest.backend} {manifest.tier}" if manifest.tier else manifest.backend
    return Party(side.spelling, profile.name if profile else "float64", backend, manifest.model_digest if manifest else None, results)


def judge(
    opened: Hunt, reference: Any, ids: Sequence[int], progress: Callable[[float], None], pieces: Sequence[int]
) -> tuple[Hunt, Verdict, Captures, Captures, list[str]]:
    """Capture, check the contract, judge both sides locally, compare freely; the hunt comes back with each side's arithmetic settled."""
    subject = opened.subject
    left = _captured(subject, ids, pieces)
    progress(0.15)
    right = _captured(reference, ids, pieces)
    progress(0.3)
    notes = check_contract(left, right)
    models = {
        "subject": weights_of(subject, left.manifest, candidates(subject, reference)),
        "reference": weights_of(reference, right.manifest, candidates(reference, subject)),
    }
    results: dict[str, Sequence[StageResult]] = {}
    settled = []
    both = {"subject": (subject, left), "reference": (reference, right)}
    for name, (side, captures) in both.items():
        profile = opened.profile_of(name, side)
        results[name] = []
        if profile is not None:
            made = settle(name, side.spelling, captures, models[name], profile, opened.profiles.get(name) == AUTO)
            opened = opened.under(name, made.profile) if made.profile != profile else opened
            results[name], repaired = repair.judged(side, captures, models[name], made.profile, made.results)
            settled.append(made)
            notes += [made.note] if made.note else []
            notes += repaired
        progress(0.3 + 0.2 * len(results))
    free = _witnessed(models, ids)
    closures = _closures(opened, both, models, free, results)
    parties = {n: _party(opened, n, *both[n], closure.settled(results[n], closures.get(n, closure.Closure()))) for n in both}
    progress(0.9)
    cost = _quantization(free)
    judged = decide(parties["subject"], parties["reference"], metrics.compare(left, right), ids, cost, probes=(probing.PROMPT,))
    judged = closure.explained(judged, closures)
    parts = _parts(both, models, free, closures)
    judged = dataclasses.replace(judged, decomposition=None if parts is None else parts.to_json())
    for made in settled:
        judged = led(judged, made)
    judged = _files_first(judged, both, models, notes)
    notes += [] if parts is None else [parts.text()]
    notes += closure.note(closures)
    notes += _remarks(judged, models, left, right)
    return opened, judged, left, right, notes


def _files_first(
    judged: Verdict, sides: Mapping[str, tuple[Any, Captures]], models: Mapping[str, witness.ModelData | None], notes: list[str]
) -> Verdict:
    """What a side holds against its file, then file against file: either leads the verdict, whatever the stages say."""
    for name, (side, captures) in sides.items():
        held = models[name]
        try:
            file = file_of(side)
        except Error as problem:
            notes.append(f"what {side.spelling} loaded was not held against its file: {problem}")
            continue
        cast = side.profile.activations if side.profile else arithmetic.F32
        against = file or held
        running = captures.manifest.arithmetic.get(HELD)
        found = loaded.against_file(held if file else None, captures.manifest.hparams, against, cast, running) if against else []
        if found:
            return judged.led_by(loaded.LOADED, loaded.loaded_sentence(name, side.spelling, found, judged.sentence))
    mine, other = (models[name] or _told(captures) for name, (_, captures) in sides.items())
    found = loaded.between_files(mine, other) if mine and other else []
    if found:
        return judged.led_by(
            loaded.FILES_DIFFER,
            loaded.files_sentence(judged.subject.spelling, judged.reference.spelling, found, judged.sentence),
        )
    return judged


def _told(captures: Captures) -> witness.ModelData | None:
    """A model whose weights nobody has, as far as the manifest describes it."""
    m = captures.manifest
    return witness.ModelData(m.arch, m.flags, m.hparams, {}) if m.arch and m.hparams else None


def _witnessed(models: Mapping[str, witness.ModelData | None], ids: Sequence[int]) -> dict[str, passes.Free]:
    """The float64 forward pass on each side's weights, where they are known; one pass for weights that are shared."""
    out: dict[str, passes.Free] = {}
    for name, model in models.items():
        twin = next((n for n in out if model is not None and models[n].weights is model.weights), None)  # type: ignore[union-attr]
        if model is not None:
            out[name] = out[twin] if twin else witness.forward(model, ids)
    return out


def _quantization(free: Mapping[str, passes.Free]) -> dict[Key, float]:
    """What the weights alone make of the difference: relative L2 of the witness on the subject's against the witness on the reference's."""
    if len(free) < 2:
        return {}
    mine, other = free["subject"], free["reference"]
    if mine is other:
        return dict.fromkeys(mine, 0.0)
    made = ((key, metrics.distance(mine[key], other[key]).rel_l2) for key in mine if key in other)
    return {key: value for key, value in made if value is not None}


def _closures(
    opened: Hunt,
    sides: Mapping[str, tuple[Any, Captures]],
    models: Mapping[str, witness.ModelData | None],
    free: Mapping[str, passes.Free],
    results: Mapping[str, Sequence[StageResult]],
) -> dict[str, closure.Closure]:
    """Whether each side's free run is explained by rounding noise; of a side without an arithmetic there is nothing to explain."""
    out: dict[str, closure.Closure] = {}
    for name, (side, captures) in sides.items():
        model, declared = models[name], opened.profile_of(name, side)
        if declared is not None and model is None:
            out[name] = closure.Closure(reason="not run: nobody has the side's weights")
        elif declared is not None and model is not None:
            out[name] = closure.closure(captures, model, declared, free[name], results[name], opened.closure)
    return out


def _parts(
    sides: Mapping[str, tuple[Any, Captures]],
    models: Mapping[str, witness.ModelData | None],
    free: Mapping[str, passes.Free],
    closures: Mapping[str, closure.Closure],
) -> Parts | None:
    """The parts of the free difference, where both sides' weights are known."""
    held = [(captures, model) for name, (_, captures) in sides.items() if (model := models[name]) is not None]
    rows = [closures[name].rows if name in closures else () for name in sides]
    return decompose(held, list(free.values()), rows) if len(held) == len(free) == 2 else None


def _remarks(judged: Verdict, models: Mapping[str, Any], left: Captures, right: Captures) -> list[str]:
    """What a reader must know to trust the verdict: its probes, its power, what was not judged."""
    notes = []
    seen = [r for r in judged.subject.results if r.power is not None]
    if seen:
        weakest = max(seen, key=lambda r: r.power or 0)
        notes.append(
            f"power: on these {len(judged.tokens)} tokens a relative error of {weakest.power:.0e} of any whole stage would have been seen"
            f" (weakest: {weakest.stage})"
        )
    if judged.unmeasured:
        names = ", ".join(dict.fromkeys(r.stage for r in judged.unmeasured))
        notes.append(f"not judged on the subject: {names} ({judged.unmeasured[0].reason})")
    if models["reference"] is None and judged.reference.results:
        notes.append("the reference's weights were not found: its stages that need them are unmeasured")
    for captures in (left, right):
        declared = arithmetic.PROFILES.get(captures.manifest.profile or "")
        if declared is not None and not declared.validated:
            notes.append(f"{captures.manifest.side}: arithmetic model not validated: {declared.name} was not yet measured on such a device")
            notes += captures.manifest.notes
        if captures.manifest.attestation is False:
            notes.append(f"{captures.manifest.side}: logits differ when nothing is captured; what was judged is not what makes the text")
    return notes
