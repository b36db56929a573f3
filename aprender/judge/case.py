"""One operation under suspicion: what it was given, and its recipe with other arguments.

Owns :class:`Case`, how the cases of a judged region are collected, and the few ways in which a recipe can be wrapped (other settings, mask,
table, scale, order of columns).  Refuses to know any fault: ``judge.changes`` (the catalogue's data), ``judge.fits`` (searched numbers)
and ``judge.gauge`` say what is changed.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aprender import stages
from aprender.arithmetic import F32
from aprender.judge import fused, noise
from aprender.judge.noise import FUSED
from aprender.judge.prediction import Operand, Prediction, Setting
from aprender.judge.replay import Recipe, Replay
from aprender.judge.rounding import to_format
from aprender.judge.sums import Index
from aprender.judge.witness import Float, Mask
from aprender.stages import Key


@dataclass(frozen=True)
class Case:
    """One operation of the judged region, with what it was given.

    Attributes
    ----------
    key : Key
    op : str
    at : Setting
    inputs : tuple of Operand
    replay : Replay
    recipe : callable
        The right recipe.
    stages : tuple of str
        The stages that it carries out: its own, and those before it that are fused with it.
    captured, right : array, Prediction or None
        The captured value and the right replay, where the case is the judged stage itself.
    """

    key: Key
    op: str
    at: Setting = field(repr=False)
    inputs: tuple[Operand, ...] = field(repr=False)
    replay: Replay = field(repr=False)
    recipe: Recipe = field(repr=False)
    stages: tuple[str, ...] = ()
    captured: Float | None = field(default=None, repr=False)
    right: Prediction | None = field(default=None, repr=False)

    @property
    def parts(self) -> list[int]:
        """Columns of each weight or bias part."""
        return [len(np.asarray(w)) for w in (self.at.weights or self.at.biases)]

    @property
    def last(self) -> bool:
        """Whether only the last token was captured."""
        return len(self.at.tokens) < len(self.replay.sample.tokens)


def collect(replay: Replay, key: Key, captured: Float, right: Prediction, spans: Sequence[Key]) -> list[Case]:
    """Every operation of a judged region with what it is given.

    Parameters
    ----------
    replay : Replay
    key : Key
        The judged stage.
    captured, right : array, Prediction
        Its captured value and its right replay.
    spans : sequence of Key
        The stages that were estimated.
    """
    seen: dict[Key, Case] = {}
    twin = copy.copy(replay)

    def watch(key_of: Key, op: str) -> Recipe:
        own = replay.recipes[op]
        names = _carried_out(replay, key_of, op)

        def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
            judged = (captured, right) if key_of == key else (None, None)
            seen[key_of] = Case(key_of, op, at, tuple(inputs), replay, own, names, *judged)
            return own(at, inputs)

        return recipe

    twin.changes = {other: watch(other, replay.operation(other)) for other in (*spans, key)}
    twin.predict(key, key in replay.sample.last, captured)
    return list(seen.values())


# ---- recipes with other arguments -----------------------------------------------------------------------------------------------------


def with_setting(recipe: Recipe, **fields: object) -> Recipe:
    """A recipe with other fields of its setting."""
    return lambda at, inputs: recipe(dataclasses.replace(at, **fields), inputs)  # type: ignore[arg-type]


def _carried_out(replay: Replay, key: Key, op: str) -> tuple[str, ...]:
    """The stages that an operation makes in one: the product before a fused bias, scores and probabilities before their mix."""
    depth = 2 if op == fused.ATTENTION else int(replay.profile.fused_bias and stages.stage(key[0]).op in FUSED)
    names = [key]
    for _ in range(depth):
        names.insert(0, replay.wires[names[0]][0].key)
    return tuple(name for name, _ in names)


def each(made: Prediction, turn: Callable[[Any], Any]) -> Prediction:
    """A prediction whose arrays are all turned in the same way; sums that do not fit it any more are dropped."""
    names = ("pre", "sigma2", "plain", "variance", "expected", "certain", "compared")
    arrays = {name: getattr(made, name) for name in names}
    return dataclasses.replace(
        made,
        dot=None,
        added=None,
        row=None,
        **{name: turn(a) if isinstance(a, np.ndarray) and a.ndim == made.pre.ndim else a for name, a in arrays.items()},
    )


def reordered(made: Prediction, columns: Index) -> Prediction:
    """A prediction with its last axis in another order."""
    return each(made, lambda a: a[..., columns])


def without(made: Prediction, columns: Mask) -> Prediction:
    """A prediction with some columns exactly 0."""
    certain = np.broadcast_to(np.asarray(made.certain), made.pre.shape) | columns
    return dataclasses.replace(each(made, lambda a: a if a.dtype == bool else np.where(columns, 0.0, a)), certain=certain)


def neighbours(heads: int, head: int) -> Index:
    """Lanes of each head so that the neighbours (2i, 2i + 1) come to (i, i + h/2)."""
    one = np.concatenate([np.arange(0, head, 2), np.arange(1, head, 2)])
    return np.asarray((np.arange(heads)[:, None] * head + one).ravel(), np.int64)


@dataclass(frozen=True)
class _Masked(Setting):
    """A setting with a mask of its own."""

    mask: Mask | None = None

    @property
    def allowed(self) -> Mask:
        """The mask that is supposed, [T, J]."""
        return super().allowed if self.mask is None else self.mask


def with_mask(case: Case, mask: Mask, inner: Recipe | None = None) -> Recipe:
    """The right recipe under another mask; a score that it forbids is 0."""
    right = inner or case.recipe

    def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
        made = right(_Masked(**{f.name: getattr(at, f.name) for f in dataclasses.fields(at)}, mask=mask), inputs)
        if case.op != "SCORES":
            return made
        seen = np.broadcast_to(at.allowed | mask, made.pre.shape)
        return dataclasses.replace(made, compared=seen, certain=np.broadcast_to(np.asarray(made.certain), seen.shape) | ~mask)

    return recipe


def with_table(case: Case, recipe: Recipe, **fields: object) -> Recipe:
    """What is rotated by a table of other hyper-parameters or positions; of the table itself, that table."""
    if case.op == "ROPE_TABLE":
        return with_setting(recipe, **fields)

    def rotated(at: Setting, inputs: Sequence[Operand]) -> Prediction:
        other = dataclasses.replace(at, captured=None, **fields)  # type: ignore[arg-type]
        return recipe(at, [inputs[0], case.replay.recipes["ROPE_TABLE"](other, ()).operand()])

    return rotated


def scaled_scores(case: Case, scale: float) -> Recipe:
    """Scores with another scale; what ggml does to q before is done.  In a fused kernel q is scaled instead."""
    own = float(np.float32(float(case.at.hparams["head"]) ** -0.5))

    def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
        if case.op == fused.ATTENTION:
            factor, (q, *others) = scale / own, inputs
            return case.recipe(at, [Operand(q.value * factor, None if q.variance is None else q.variance * factor**2), *others])
        q, k = inputs
        if at.profile.ggml is not None and at.profile.cache != F32:
            q = Operand(to_format(q.value, at.profile.cache), q.variance)
        return noise.scores(at, [q, k], scale if at.profile.wide else float(np.float32(scale)))

    return recipe
