"""Which inputs each stage is judged on: the side's own captured ones, or an estimate that spans what it did not show.

Owns the wiring (the wires of ``stages.def`` walked once, as the planner does), the choice between a captured input and an estimated one,
and the reasons why a stage cannot be judged.  Refuses to read a value that the side recomputed (*derived*): a derived input is estimated
from what is before it, and the judged region spans it.  Called by ``judge.local``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aprender import _core, stages
from aprender.arithmetic import F32, Profile
from aprender.captures import Captures, halves_from_pairs
from aprender.judge import fused, ggml, narrow
from aprender.judge.noise import FUSED, PREDICT
from aprender.judge.prediction import Operand, Prediction, Setting
from aprender.judge.sums import Index
from aprender.judge.witness import Float, HParams, ModelData, Weights
from aprender.manifest import DERIVED, LAST, PAIRS
from aprender.stages import Key, Stage

Recipe = Callable[[Setting, Sequence[Operand]], Prediction]
"""How one operation is replayed: ``judge.noise`` and ``judge.ggml`` have one per row of ``ops.def``."""

LONGEST_REGION = 4
"""Stages that an estimate may span.  First-order propagation was measured over three (norm to down projection); a whole layer was not."""


@dataclass(frozen=True)
class Sample:
    """What a side captured of one sequence, as plain data.

    Attributes
    ----------
    values : mapping
        (stage, layer) to an array; scores and probabilities are [H, T, J].
    tokens : tuple of int
    positions, keys : array
        Positions of the T tokens and of the J keys.
    derived : frozenset
        Keys of ``values`` that were recomputed and not captured.
    last : frozenset
        Keys of ``values`` that hold the last token only.
    past : mapping
        (stage, layer) to the rows of the tokens before these, where the same side captured them: what the caches must still hold.
    before : tuple of int
        Ids of these earlier tokens.
    """

    values: Mapping[Key, NDArray[np.float32]] = field(repr=False)
    tokens: tuple[int, ...]
    positions: Index
    keys: Index
    derived: frozenset[Key] = frozenset()
    last: frozenset[Key] = frozenset()
    past: Mapping[Key, NDArray[np.float32]] = field(default_factory=dict, repr=False)
    before: tuple[int, ...] = ()

    @classmethod
    def of(cls, captures: Captures) -> Sample:
        """The sample of a capture: lanes as halves, positions from its manifest."""
        notes, positions = captures.manifest.tensors, np.asarray(captures.manifest.positions, np.int64)
        cached = [note.shape[stages.stage(key[0]).shape.index("J")] for key, note in notes.items() if "J" in stages.stage(key[0]).shape]
        count = max([len(positions), *cached])
        first = positions[-1] + 1 - count if len(positions) else 0
        earlier = [_in_halves(piece) for piece in captures.past]
        rows = [key for key in (earlier[0] if earlier else ()) if stages.stage(key[0]).shape[0] == "T" and all(key in e for e in earlier)]
        return cls(
            values=_in_halves(captures),
            tokens=captures.tokens,
            positions=positions,
            keys=positions if count == len(positions) else np.arange(first, first + count),
            derived=frozenset(key for key, note in notes.items() if note.origin == DERIVED),
            last=frozenset(key for key, note in notes.items() if note.positions == LAST),
            past={key: np.concatenate([piece[key] for piece in earlier]) for key in rows},
            before=tuple(token for piece in captures.past for token in piece.tokens),
        )


def _in_halves(captures: Captures) -> Mapping[Key, NDArray[np.float32]]:
    """The values of a capture in Hugging Face lane order."""
    return _Halves(captures) if any(note.lanes == PAIRS for note in captures.manifest.tensors.values()) else captures


class _Halves(Mapping[Key, NDArray[np.float32]]):
    """A capture seen in Hugging Face lane order."""

    def __init__(self, captures: Captures) -> None:
        self._captures = captures

    def __getitem__(self, key: Key) -> NDArray[np.float32]:
        note, value = self._captures.manifest.tensors[key], self._captures[key]
        return halves_from_pairs(value, stages.stage(key[0]), self._captures.manifest.hparams) if note.lanes == PAIRS else value

    def __iter__(self):  # type: ignore[no-untyped-def]  # noqa: ANN204
        return iter(self._captures)

    def __len__(self) -> int:
        return len(self._captures)

    def __contains__(self, key: object) -> bool:
        return key in self._captures


@dataclass(frozen=True)
class Source:
    """An input: the stage that wrote the wire last, and which columns of it (None is all)."""

    key: Key
    part: str | None = None


def wiring(flags: frozenset[str], layers: int) -> dict[Key, tuple[Source, ...]]:
    """Every stage of a model with the stages that it reads, in execution order.

    A wire is the latest value of its kind; the buffer of q, k and v is read as a whole or as one of three views.
    """
    latest: dict[str, Source] = {}
    out: dict[Key, tuple[Source, ...]] = {}
    for key in stages.keys(flags, layers):
        row = stages.stage(key[0])
        out[key] = tuple(latest[wire] for wire in (row.a, row.b) if wire is not None)
        if row.out is not None:
            latest[row.out] = Source(key)
            if row.out == "QKV":
                latest |= {part: Source(key, part) for part in row.out}
    return out


def ancestors(wires: Mapping[Key, tuple[Source, ...]]) -> dict[Key, frozenset[Key]]:
    """Every stage with all stages that its value depends on."""
    out: dict[Key, frozenset[Key]] = {}
    for key, sources in wires.items():
        out[key] = frozenset().union(*({source.key} | out[source.key] for source in sources))
    return out


def _after(past: Float | None, fresh: Operand) -> Operand:
    """Rows that were captured earlier, without a doubt, and then those of this run."""
    if past is None:
        return fresh
    spread = None if fresh.variance is None else np.concatenate([np.zeros_like(past), fresh.variance])
    return Operand(np.concatenate([past, fresh.value]), spread)


class Unmeasured(Exception):
    """Why a stage cannot be judged."""


class Unlike(Exception):
    """Why a captured value is not the stage that it is called."""


def recipes(profile: Profile) -> dict[str, Recipe]:
    """Operation to its recipe in an arithmetic."""
    made = dict(PREDICT if profile.ggml is None else ggml.PREDICT)
    return made | (dict(fused.PREDICT) if profile.fused else {}) | (dict(narrow.PREDICT) if profile.accumulator != F32 else {})


class Replay:
    """One side's captures, ready to be replayed stage by stage.

    Parameters
    ----------
    sample : Sample
    profile : Profile
        The side's arithmetic.
    hparams, flags : mapping, frozenset
        The model as the side holds it.
    weights : mapping or None
        As in :class:`~aprender.judge.witness.ModelData`; None where no one has them.
    stored : mapping
        As in :class:`~aprender.judge.witness.ModelData`.
    """

    def __init__(
        self,
        sample: Sample,
        profile: Profile,
        hparams: HParams,
        flags: frozenset[str],
        weights: Weights | None,
        stored: Mapping[Key, tuple[str, NDArray[np.uint8]]] | None = None,
    ) -> None:
        self.recipes = recipes(profile)
        self.stored = stored or {}
        self.sample, self.profile, self.hparams, self.flags, self.weights = sample, profile, hparams, flags, weights
        self.wires = wiring(flags, int(hparams["layers"]))
        self.changes: Mapping[Key, Recipe] = {}  # recipes of a twin that replays a suspected fault; none in a judgement
        qd, kd = int(hparams["heads"]) * int(hparams["head"]), int(hparams["kv_heads"]) * int(hparams["head"])
        self._columns = {"Q": slice(0, qd), "K": slice(qd, qd + kd), "V": slice(qd + kd, qd + 2 * kd)}

    @classmethod
    def of(cls, captures: Captures, model: ModelData | None, profile: Profile) -> Replay:
        """From a capture; without a model the manifest's hyper-parameters and flags are taken, and weights are missing."""
        m = captures.manifest
        if model is None:
            return cls(Sample.of(captures), profile, m.hparams, m.flags, None)
        return cls(Sample.of(captures), profile, model.hparams, model.flags, model.weights, model.stored)

    def operation(self, key: Key) -> str:
        """The operation that a stage is judged as: a fused bias is part of the product before it."""
        op = stages.stage(key[0]).op
        if self.profile.fused and op == fused.LAST:
            return fused.ATTENTION
        return FUSED[op] if self.profile.fused_bias and op in FUSED else op

    def absent(self) -> frozenset[Key]:
        """Stages that such a side never forms: a product before a fused bias, the inside of a fused attention kernel."""
        bias = {sources[0].key for key, sources in self.wires.items() if self.profile.fused_bias and stages.stage(key[0]).op in FUSED}
        inside = {key for key in self.wires if self.profile.fused and stages.stage(key[0]).op in fused.INSIDE}
        return frozenset(bias | inside)

    def captured(self, key: Key) -> Float:
        """The captured value in float64, cut to the rows that can be judged: of a cache those of this run, unless its past is known."""
        if key not in self.sample.values:
            raise Unmeasured("the side did not show it")
        if key in self.sample.derived:
            raise Unmeasured("recomputed from the side's own input, not captured: judged together with the next captured stage")
        value = self._value(key)
        row = stages.stage(key[0])
        fresh = row.shape[0] == "J" and value.shape[0] > len(self.sample.tokens) and self._past(self.wires[key][0]) is None
        return value[-len(self.sample.tokens) :] if fresh else value

    def _past(self, source: Source) -> Float | None:
        """What earlier tokens of this sequence had at an input, [J - T, ...]; None where that was not captured."""
        rows = self.sample.past.get(source.key)
        if rows is None or source.key in self.sample.derived or len(rows) != len(self.sample.keys) - len(self.sample.tokens):
            return None
        return np.asarray(rows, np.float64)[..., self._columns[source.part] if source.part else slice(None)]

    def _value(self, key: Key) -> Float:
        """A captured array in float64, if it has the shape that the model gives the stage."""
        value = np.asarray(self.sample.values[key], np.float64)
        tokens = 1 if key in self.sample.last else len(self.sample.tokens)
        due = stages.stage(key[0]).dims(self.hparams, tokens, len(self.sample.keys))
        if value.shape != due:
            raise Unlike(f"{stages.spell(key)} has shape {list(value.shape)}, the model gives it {list(due)}")
        return value

    def predict(self, key: Key, last: bool = False, captured: Float | None = None) -> tuple[Prediction, tuple[Key, ...]]:
        """What the side should have captured, and the stages that the estimate spans besides its own.

        Parameters
        ----------
        key : Key
        last : bool
            For the last token only.
        captured : array, optional
            What the side did capture.

        Raises
        ------
        Unmeasured
            An input or a weight is missing.
        Unlike
            An input has another shape than the model gives it.
        """
        row = stages.stage(key[0])
        spans: list[Key] = []
        rows, op, sources = [row], row.op, self.wires[key]
        if self.profile.fused_bias and op in FUSED:  # the product before the bias does not exist on such a side
            before = sources[0].key
            op, sources, rows = FUSED[op], self.wires[before], [stages.stage(before[0]), row]
        inside: tuple[Key, ...] = ()
        if self.profile.fused and op in fused.INSIDE:
            raise Unmeasured("attention is one kernel on this side, which forms no such value")
        if self.profile.fused and op == fused.LAST:
            probabilities, values = sources
            scores = self.wires[probabilities.key][0]
            inside = scores.key, probabilities.key
            op, sources = fused.ATTENTION, (*self.wires[scores.key], values)
        operands = [self._operand(source, last, spans) for source in sources]
        past = [self._past(source) if rows[-1].shape[0] == "J" else None for source in sources]  # a cache has the rows of all tokens so far
        operands = [_after(*pair) for pair in zip(past, operands, strict=True)]
        if len(spans) > LONGEST_REGION:
            raise Unmeasured("none of its inputs was captured near enough: " + ", ".join(stages.spell(k) for k in spans[:3]) + " …")
        tokens = slice(-1, None) if last else slice(None)
        remembered = any(rows is not None for rows in past)
        setting = Setting(
            profile=self.profile,
            hparams=self.hparams,
            tokens=(*self.sample.before, *self.sample.tokens) if remembered else self.sample.tokens[tokens],
            positions=self.sample.keys if remembered else self.sample.positions[tokens],
            keys=self.sample.keys,
            weights=self._parts([r.weight for r in rows], key[1]),
            biases=self._parts([r.bias for r in rows], key[1]),
            stored=self._stored(row.weight, key[1]) if self.profile.ggml and op in ggml.BY_FORMAT and row.weight else (),
            captured=captured,
        )
        made = self.changes.get(key, self.recipes[op])(setting, operands)
        made = made if self.profile.validated else made.unproven()
        return dataclasses.replace(made, shared=made.shared or any(o.variance is not None for o in operands)), (*spans, *inside)

    def read(self, key: Key, which: str = "out", last: bool = False) -> Operand:
        """What a stage leaves (``out``), or reads first (``a``) or second (``b``), as an input of another stage."""
        source = Source(key) if which == "out" else self.wires[key]["ab".index(which)]
        return self._operand(source, last, [])

    def _operand(self, source: Source, last: bool, spans: list[Key]) -> Operand:
        """An input as captured, else as estimated; ``spans`` grows by what was estimated."""
        key, row = source.key, stages.stage(source.key[0])
        columns = self._columns[source.part] if source.part else slice(None)
        known = key in self.sample.values and key not in self.sample.derived and (last or key not in self.sample.last)
        if known:
            value = self._value(key)
            return Operand(self._cut(value, row, last and key not in self.sample.last)[..., columns])
        if row.shape[0] == "J" and len(self.sample.keys) > len(self.sample.tokens) and self._past(self.wires[key][0]) is None:
            raise Unmeasured(f"{stages.spell(key)} was not captured, and it holds tokens from before this run")
        whole = row.shape[0] == "J"  # keys and values of all tokens are read, also for the last token
        made, before = self.predict(key, last and not whole)
        spans.extend((*before, key))
        estimate = made.operand()
        spread = None if estimate.variance is None else estimate.variance[..., columns]
        return Operand(estimate.value[..., columns], spread)

    def _cut(self, value: Float, row: Stage, last: bool) -> Float:
        """The last token of a value, if asked for and if the value has a token axis."""
        return np.take(value, [-1], axis=row.shape.index("T")) if last and "T" in row.shape else value

    def _owners(self, groups: list[str | None], layer: int | None) -> list[Key]:
        """The weights of the groups by name, in table order, as far as the model's flags switch them on."""
        rows = [row for row in _core.WEIGHTS if row[1] in groups]
        return [(name, layer) for name, *_, otherwise, flag in rows if flag == "ALWAYS" or flag in self.flags or otherwise]

    def _parts(self, groups: list[str | None], layer: int | None) -> tuple[ArrayLike, ...]:
        """The weights of the groups, part by part."""
        parts: list[ArrayLike] = []
        for owner in self._owners(groups, layer):
            if self.weights is None:
                raise Unmeasured("it needs the side's weights, and there are none")
            if owner not in self.weights:
                raise Unmeasured(f"the weight {stages.spell(owner)} was not given")
            parts.append(self.weights[owner])
        return tuple(parts)

    def _stored(self, group: str, layer: int | None) -> tuple[tuple[str, NDArray[np.uint8]], ...]:
        """Number formats and bytes of a group's weights, which decide how its activations are rounded."""
        out = []
        for owner in self._owners([group], layer):
            if owner not in self.stored:
                raise Unmeasured(f"the number format of {stages.spell(owner)} in its file was not given, and the arithmetic depends on it")
            if self.stored[owner][0] not in ggml.RULES:
                raise Unmeasured(f"{stages.spell(owner)} is {self.stored[owner][0]}, for which no rounding of activations is declared")
            out.append(self.stored[owner])
        return tuple(out)
