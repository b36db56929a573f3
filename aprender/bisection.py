"""From two spellings to a verdict: open the sides, agree on token ids, run, judge, collect what the report shows.

Owns the order of a hunt: token ids first, then the sample contract, then the local judgement of both sides, then the free comparison and
what quantisation alone costs.  Refuses to compare unlike things and to call anything wrong itself: that is ``judge.verdict``. Called by
``import aprender`` (:func:`compare`), by the command ``bisect`` and by parity tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import aprender
from aprender import arithmetic, parity, repair, sides, stages
from aprender import probes as probing
from aprender.captures import Captures, check_contract
from aprender.declared import AUTO, led, settle
from aprender.errors import ArgumentError, CannotRun, Error, NotComparable
from aprender.judge import closure, faults, loaded, metrics, passes, witness
from aprender.judge.parts import Parts, decompose
from aprender.judge.verdict import Fault, Party, StageResult, Verdict, decide
from aprender.manifest import HELD
from aprender.references import WitnessSide, candidates, file_of, recorded, weights_of
from aprender.sides.own import OwnSide
from aprender.sides.saved import SavedSide
from aprender.stages import Key
from aprender.text.chat import chat_ids

PROMPT = "What is 2+2?"
"""What is asked when nobody says: the prompt of the embedded model's recorded stages."""

ANSWER = 16
"""Tokens of the greedy answer that a report shows."""


@dataclass(frozen=True)
class Report:
    """A verdict and what a reader needs beside it.

    Attributes
    ----------
    judged : Verdict
    prompt : str or None
        Text that the ids came from.
    answers : tuple of (str, str)
        Label and greedy text.
    notes : tuple of str
    reproduce : str
        Command line that makes this report again.
    subject, reference : Captures or None
        What was compared; None where no run was needed to decide.
    probed : tuple of Outcome
        What each probe that was asked for found, or why it could not run.
    operations : tuple of Operation
        Of our own engine on two devices: how far they agree, operation by operation.
    """

    judged: Verdict
    prompt: str | None = None
    answers: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    reproduce: str = ""
    subject: Captures | None = field(default=None, repr=False)
    reference: Captures | None = field(default=None, repr=False)
    probed: tuple[probing.Outcome, ...] = field(default=(), repr=False)
    operations: tuple[parity.Operation, ...] = field(default=(), repr=False)

    @property
    def verdict(self) -> str:
        """``agree``, ``divergence`` or ``not_comparable``."""
        return self.judged.verdict

    @property
    def first(self) -> Fault | None:
        """First wrong operation."""
        return self.judged.first

    @property
    def sentence(self) -> str:
        """Where, what kind, how sure."""
        return self.judged.sentence

    @property
    def exit_code(self) -> int:
        """0 agree, 1 divergence, 3 not comparable."""
        return {"agree": 0, "divergence": 1}.get(self.verdict, 3)

    def to_json(self) -> dict[str, Any]:
        """The keys that scripts rely on, and the sentence, answers, notes and command."""
        extra = {
            "sentence": self.sentence,
            "prompt": self.prompt,
            "answers": dict(self.answers),
            "notes": list(self.notes),
            "reproduce": self.reproduce,
            "probed": [outcome.to_json() for outcome in self.probed],
            "operations": [row.to_json() for row in self.operations],
        }
        return self.judged.to_json() | extra


# ---- token ids -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """What the sides are to be run on: ids, or a text, as it is or as a user's message in each side's own chat template."""

    prompt: str | None = None
    ids: tuple[int, ...] | None = None
    same_ids: bool = False
    chat: bool = False


def _encode(side: Any, prompt: str, chat: bool = False) -> tuple[int, ...] | None:
    """Ids of a text by the side's own tokenizer; of a saved side only if it is the text that was recorded."""
    if isinstance(side, SavedSide):
        return side.captures.tokens if side.captures.manifest.prompt == prompt else None
    tokenizer = side.tokenizer()
    if tokenizer is None:
        return None
    return tuple(chat_ids(tokenizer, prompt) if chat else tokenizer.encode(prompt))


def _resolve(subject: Any, reference: Any, ask: Ask) -> tuple[tuple[int, ...], tuple[int, ...], str | None]:
    """Ids for the subject, ids for the reference, and the text if there is one."""
    if ask.ids is not None:
        return ask.ids, ask.ids, None
    saved = next((side.captures for side in (reference, subject) if isinstance(side, SavedSide)), None)
    prompt = ask.prompt
    if prompt is None and saved is not None:
        prompt = saved.manifest.prompt
        if prompt is None or not isinstance(subject, SavedSide):
            return saved.tokens, saved.tokens, prompt
    prompt = PROMPT if prompt is None else prompt
    if not prompt:
        raise ArgumentError("the prompt is empty: a forward pass needs at least one token", code="ARGUMENT", field="prompt")
    own = _encode(subject, prompt, ask.chat)
    other = _encode(reference, prompt, ask.chat) if reference is not None else None
    if own is None:
        if other is None or not ask.same_ids:
            raise CannotRun(
                f"{subject.spelling} has no tokenizer for a text: give --prompt-ids, or --same-ids for the reference's", code="TOKENIZER"
            )
        own = other
    return own, (own if other is None else other), prompt


def _tokens_differ(subject: Any, reference: Any, own: Sequence[int], other: Sequence[int]) -> str:
    """The sentence for sides that cut one text into different tokens."""
    at = next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), min(len(own), len(other)))

    def piece(side: Any, ids: Sequence[int]) -> str:
        if at >= len(ids):
            return "nothing"
        tokenizer = side.tokenizer() if not isinstance(side, SavedSide) else None
        return f"{ids[at]} {tokenizer.id_to_piece(ids[at])!r}" if tokenizer else str(ids[at])

    return (
        f"The sides cut the same text into different tokens: at position {at} the subject has {piece(subject, own)}, the reference "
        f"{piece(reference, other)} ({len(own)} and {len(other)} tokens). Nothing after that is comparable; --same-ids forces the"
        " reference's ids."
    )


# ---- the hunt ------------------------------------------------------------------------------------------------------------------------


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


def open_hunt(
    subject: str | None = None,
    against: str | None = None,
    plant: str | Sequence[str] | None = None,
    profiles: Mapping[str, str] | None = None,
    closure: bool = False,
) -> Hunt:
    """Open the sides.

    Parameters
    ----------
    subject, against : str, optional
        Spellings of sides; ``witness`` alone runs on the subject's weights.  The embedded model is judged if none is given.
    plant : str or sequence of str, optional
        ``NAME[@SELECTOR]``: a catalogue fault to plant in our own engine, or several.
    profiles : mapping, optional
        ``subject`` or ``reference`` to an arithmetic that replaces the declared one; ``auto`` is the one that fits best.
    closure : bool
        Run all of closure, whatever it costs.
    """
    named = {party: name for party, name in (profiles or {}).items() if name != AUTO}
    rows = {party: arithmetic.profile(name) for party, name in named.items()}  # a wrong name is said before anything is opened
    right: Any = None
    planted = [plant] if isinstance(plant, str) else list(plant or ())
    if planted:
        right = _open(subject, None)
        if not isinstance(right, OwnSide):
            raise CannotRun(f"a fault can be planted in our own engine only, not in {subject}", code="PLANT")
        data = right.model_data()
        edits = [edit for name in planted for edit in faults.plant(name, data["flags"], data["hparams"]).edits]
        own: Any = OwnSide(right.path, backend=right.backend, edits=edits, spelling=right.spelling)
    else:
        own = _open(subject, None)
    other = None if against is None else _open(against, own)
    for party, side in (("subject", own), ("reference", other)):
        if side is not None and party in rows and hasattr(side, "declare"):  # a side that can run in more than one arithmetic
            side.declare(rows[party])
    return Hunt(own, other, right, " and ".join(planted) or None, profiles or {}, closure)


def _open(spelling: str | None, subject: Any) -> Any:
    """A side by its spelling, the witness included; the embedded model if there is none."""
    if spelling is None:
        return OwnSide(aprender.canary(), spelling="canary.gguf")
    if spelling != "witness" and not spelling.startswith("witness:"):
        return sides.open_side(spelling)
    name = spelling.partition(":")[2]
    if not name and subject is None:
        raise CannotRun("the witness needs weights: witness:MODEL", code="WEIGHTS")
    return WitnessSide(sides.open_side(name) if name else subject, spelling)


def _silent(share: float) -> None:
    """Nobody wants to know how far it is."""


def hunt(
    opened: Hunt,
    ask: Ask,
    answer: int = ANSWER,
    steps: int = 0,
    progress: Callable[[float], None] = _silent,
    probes: Sequence[str] = (),
) -> Report:
    """Run both sides on one question and judge them.

    Parameters
    ----------
    opened : Hunt
    ask : Ask
    answer : int
        Tokens of the greedy answers to show; 0 shows none.
    steps : int
        Tokens to generate (the reference's drive both); the first step whose choice differs is judged, else the last.
    progress : callable, optional
        Told the share that is done, 0 … 1, after each part of the work.
    probes : sequence of str, optional
        Names of probes to run on the subject beyond the prompt.
    """
    subject, reference = opened.subject, opened.reference
    own, other, prompt = _resolve(subject, reference, ask)
    if own != other and not ask.same_ids:
        return Report(_undecided(opened, own, _tokens_differ(subject, reference, own, other)), prompt)
    ids, notes = other, []
    if reference is None:
        reference = recorded(subject, ids) or WitnessSide(subject, "witness")
        found = "recorded beside the model" if isinstance(reference, SavedSide) else "float64 definitions on the subject's own weights"
        notes.append(f"reference: {reference.spelling}, {found}")
    prompted = len(ids)
    if steps:
        ids, said = _differing_step(subject, reference, ids, steps)
        notes.append(said)
    opened, judged, left, right, more = _judge(opened, reference, ids, progress, [prompted, *[1] * (len(ids) - prompted)])
    devices = parity.table(left, right) if _two_devices(subject, reference) else ()
    notes += [parity.sentence(devices)] if devices else []
    probed = probing.probe(subject, opened.profile_of("subject", subject), left, probes)
    judged = probing.combine(judged, probed, left.manifest.attestation)
    more.append(probing.rests(judged.probes, probed))
    answers = _answers(opened, reference, ids, answer) if answer else ()
    return Report(judged, prompt, answers, tuple(notes + more), "", left, right, probed, devices)


def _two_devices(subject: Any, reference: Any) -> bool:
    """Whether both sides are our own engine, on different devices."""
    return isinstance(subject, OwnSide) and isinstance(reference, OwnSide) and subject.backend != reference.backend


def _captured(side: Any, ids: Sequence[int], pieces: Sequence[int]) -> Captures:
    """What a side makes of the ids; our own engine as it generates: the prompt, then token by token."""
    if len(pieces) > 1 and isinstance(side, OwnSide):
        return side.capture_pieces(ids, pieces)
    made: Captures = side.capture(ids)
    return made


def _undecided(opened: Hunt, ids: Sequence[int], sentence: str) -> Verdict:
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


def _judge(
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


# ---- answers and steps ---------------------------------------------------------------------------------------------------------------


def _text(side: Any, fallback: Any, ids: Sequence[int]) -> str:
    tokenizer = side.tokenizer() or fallback.tokenizer()
    return repr(tokenizer.decode(list(ids))) if tokenizer else " ".join(map(str, ids))


def _answers(opened: Hunt, reference: Any, ids: Sequence[int], n: int) -> tuple[tuple[str, str], ...]:
    """Greedy texts to show, the right one beside that of a planted fault."""
    subject = opened.subject
    out = []
    if not isinstance(subject, SavedSide):
        label = f"answer with {opened.planted}" if opened.planted else "answer"
        out.append((label, _text(subject, subject, subject.generate(ids, n))))
    if opened.right is not None:
        out.append(("right answer", _text(opened.right, subject, opened.right.generate(ids, n))))
    elif isinstance(reference, SavedSide):
        if reference.captures.manifest.answer is not None:
            out.append(("reference's answer", repr(reference.captures.manifest.answer)))
    elif not isinstance(reference, WitnessSide):
        out.append(("reference's answer", _text(reference, subject, reference.generate(ids, n))))
    return tuple(out)


def _differing_step(subject: Any, reference: Any, ids: Sequence[int], steps: int) -> tuple[tuple[int, ...], str]:
    """Ids up to the first generated token on which the sides choose differently, the reference's tokens driving both."""
    if isinstance(reference, SavedSide):
        raise CannotRun("a recorded reference cannot generate: --steps needs --against a side that runs", code="STEPS")
    driven = reference.generate(ids, steps)
    full = (*ids, *driven)
    if not driven:
        return tuple(ids), "steps: the reference ends at once"
    if isinstance(subject, OwnSide):
        last = subject.logits(full, len(ids))
    else:
        last = subject.capture(full, lambda key: key == stages.LOGITS)[stages.LOGITS]
    chosen = [int(np.argmax(row)) for row in last[len(ids) - 1 : -1]]
    for step, (mine, theirs) in enumerate(zip(chosen, driven, strict=True)):
        if mine != theirs:
            return full[
                : len(ids) + step
            ], f"steps: the first choice that differs is step {step}: {mine} against {theirs}; that step is judged"
    return full[:-1], f"steps: all {len(driven)} choices are equal; the last step is judged"


def compare(
    subject: str | None = None,
    against: str | None = None,
    *,
    prompt: str | None = None,
    prompt_ids: Sequence[int] | None = None,
    plant: str | Sequence[str] | None = None,
    same_ids: bool = False,
    answer: int = ANSWER,
    steps: int = 0,
    probe: str | None = None,
    closure: bool = False,
) -> Report:
    """Judge one side, against another if given.

    Parameters
    ----------
    subject : str, optional
        Spelling of a side (``model.gguf``, ``folder/``, ``hf:NAME@float16``, ``saved:folder``); the embedded canary if not given.
    against : str, optional
        The reference; if not given, stages recorded beside the model for just this prompt, else the witness on the subject's weights.
    prompt : str, optional
        Raw text; special tokens as the container's tokenizer declares.
    prompt_ids : sequence of int, optional
        Token ids instead of a text.
    plant : str or sequence of str, optional
        A catalogue fault to plant in our own engine first, ``NAME[@SELECTOR]``, or several.
    same_ids : bool
        Run both sides on the reference's ids even if they cut the text differently.
    answer : int
        Tokens of the greedy answers to show.
    steps : int
        Generate so many tokens and judge the first step that differs.
    probe : str, optional
        Names of probes with commas between them, or ``all``; the prompt alone if not given.
    closure : bool
        Run all of closure, whatever it costs; a large model is cut short otherwise, and the notes say so.

    Returns
    -------
    Report

    Raises
    ------
    NotComparable
        The sides hold unlike things; the message has both values.

    Examples
    --------
    >>> aprender.compare().verdict
    'agree'
    >>> report = aprender.compare(plant="transposed@lm_head")
    >>> report.verdict, report.first.stage
    ('divergence', 'lm_head')
    """
    chosen = probing.parse(probe)
    opened = open_hunt(subject, against, plant, closure=closure)
    ask = Ask(prompt, None if prompt_ids is None else tuple(prompt_ids), same_ids)
    try:
        return hunt(opened, ask, answer, steps, probes=chosen)
    finally:
        for side in (opened.subject, opened.reference, opened.right):
            if side is not None:
                side.close()


def with_command(report: Report, command: str) -> Report:
    """The report with the command line that makes it again."""
    return dataclasses.replace(report, reproduce=command)


__all__ = ["Ask", "Error", "Hunt", "NotComparable", "Report", "compare", "hunt", "open_hunt", "with_command"]
