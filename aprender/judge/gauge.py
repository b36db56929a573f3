"""Differences that cannot matter, and values taken at another point: what looks wrong on its own inputs and is no wrong operation.

Owns two recognitions.  A *gauge*: queries and keys of a layer that are rotated some positions further, or whose lanes are in another order,
both alike, so that their product does not change (:func:`healed`).  A *capture point*: a product that was captured after its bias
(:func:`after_bias`).  Each is proved by a replay under the gates of the run and by the scores that follow; a difference in one of q and k
alone, or two that are unlike, proves nothing.  Refuses to call anything wrong.  Called by ``judge.local`` after the stages are judged.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from aprender import stages
from aprender.judge.case import Case, collect
from aprender.judge.changes import changed
from aprender.judge.faultrow import Change
from aprender.judge.fits import found_positions
from aprender.judge.measure import measure
from aprender.judge.replay import Recipe, Replay, Unlike, Unmeasured
from aprender.judge.rule import Gates
from aprender.judge.sums import Index
from aprender.stages import Key

Texts = dict[Key, str]

HOLDERS = frozenset({"QKV", "Q", "K", "KCACHE"})
"""Wires that hold queries or keys."""


class Judge:
    """One side's replay under the gates of the run: whether a stage is right, as it is or with other recipes."""

    def __init__(self, replay: Replay, gates: Gates, band: float) -> None:
        self.replay, self.gates, self.band = replay, gates, band

    def clean(self, key: Key, replay: Replay | None = None, changes: Mapping[Key, Recipe] | None = None) -> bool | None:
        """Whether only rounding is left; None where the stage cannot be judged."""
        twin = copy.copy(replay or self.replay)
        twin.changes = changes or {}
        try:
            captured = twin.captured(key)
            with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
                made, _ = twin.predict(key, key in twin.sample.last, captured)
                found = measure(captured, made, self.gates, self.band)
        except (Unmeasured, Unlike):
            return None
        return found.n > 0 and not found.reasons

    def case(self, key: Key) -> Case:
        """The stage's own operation, with what it was given."""
        captured = self.replay.captured(key)
        right, spans = self.replay.predict(key, key in self.replay.sample.last, captured)
        return next(case for case in collect(self.replay, key, captured, right, spans) if case.key == key)


def said(spelling: str, rows: Iterable[tuple[Key, str]]) -> str:
    """Sentences for stages and what is to be said of each: stages of one reason together."""
    alike: dict[str, list[Key]] = {}
    for key, reason in rows:
        alike.setdefault(reason, []).append(key)
    out = ""
    for reason, keys in alike.items():
        layers = [str(layer) for layer in dict.fromkeys(layer for _, layer in keys) if layer is not None]
        where = f" of layer{'s' * (len(layers) > 1)} {', '.join(layers[:4])}{' …' * (len(layers) > 4)}" if layers else ""
        out += f" {', '.join(dict.fromkeys(stage for stage, _ in keys))}{where} ({spelling}): {reason}."
    return out


# ---- gauge -----------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Layer:
    """The stages of one layer between the projection and the scores, as the table wires them."""

    judge: Judge
    index: int

    def of(self, *ops: str) -> list[Key]:
        """Stages of some operations, in execution order."""
        return [key for key in self.judge.replay.wires if key[1] == self.index and stages.stage(key[0]).op in ops]

    @property
    def turned(self) -> list[Key]:
        """The rotated queries and keys."""
        return self.of("ROPE")

    def scores_clean(self, replay: Replay | None = None) -> bool:
        """Whether what is made of q and k is right: the scores, or the first stage after them that was captured and spans them."""
        judge = self.judge
        for key in self.of("SCORES", "SOFTMAX", "MIX"):
            found = judge.clean(key, replay)
            if found is not None:
                return found
        return False

    def kept_clean(self) -> bool:
        """Whether the keys are kept as they were rotated."""
        return all(self.judge.clean(key) is not False for key in self.after if key not in self.turned)

    def frame(self) -> list[Key]:
        """Every stage that holds queries or keys by lanes and positions: from the projection to the cache of keys."""
        wires, (scores,) = self.judge.replay.wires, self.of("SCORES")
        out: set[Key] = set()
        todo = [source.key for source in wires[scores]]
        while todo:
            key = todo.pop()
            if key not in out and stages.stage(key[0]).out in HOLDERS:
                out.add(key)
                todo += [source.key for source in wires[key]]
        return [key for key in wires if key in out]

    @property
    def after(self) -> list[Key]:
        """Of those, what is rotated or made of it."""
        frame = self.frame()
        return frame[frame.index(self.turned[0]) :]


def healed(judge: Judge, wrong: Sequence[Key]) -> Texts:
    """The stages that are equal up to a gauge, and that in words; none where keys of an earlier run are read, which may have another.

    Parameters
    ----------
    judge : Judge
    wrong : sequence of Key
        What was called wrong.
    """
    out: Texts = {}
    if not wrong or len(judge.replay.sample.keys) != len(judge.replay.sample.tokens):
        return out  # what older keys were turned by was not captured
    layers = [_Layer(judge, i) for i in range(int(judge.replay.hparams["layers"]))]
    for key in wrong:
        if stages.stage(key[0]).op == "ROPE_TABLE":
            out |= _shifted_table(key, layers)
    for layer in layers:
        turned = layer.turned
        if all(key in wrong for key in turned):
            out |= _shifted(layer, turned) or _lanes(layer)
    return out


def _shift(case: Case) -> int:
    """By how many positions every token is turned too far; 0 if they do not agree."""
    if case.captured is None or len(case.captured) != len(case.at.positions):
        return 0
    apart = found_positions(case) - np.asarray(case.at.positions)
    return int(apart[0]) if (apart == apart[0]).all() else 0


def _recipes(case: Case, change: Change) -> dict[Key, Recipe]:
    return {case.key: changed(case, (change,))}


def _shifted(layer: _Layer, turned: Sequence[Key]) -> Texts:
    """Queries and keys the same number of positions further."""
    cases = [layer.judge.case(key) for key in turned]
    shifts = {_shift(case) for case in cases}
    if len(shifts) != 1 or 0 in shifts:
        return {}
    (shift,) = shifts
    proved = all(layer.judge.clean(case.key, changes=_recipes(case, {"of": "table", "shift": shift})) for case in cases)
    if not proved or not layer.kept_clean() or not layer.scores_clean():
        return {}
    return dict.fromkeys(layer.after, f"equal up to positions shifted by {shift} in q and k")


def _shifted_table(key: Key, layers: Sequence[_Layer]) -> Texts:
    """The table of rotations made for positions further on: every layer's queries and keys have the same shift."""
    judge = layers[0].judge
    case = judge.case(key)
    shift = _shift(case)
    if not shift or not judge.clean(key, changes=_recipes(case, {"of": "positions", "shift": shift})):
        return {}
    if not all(judge.clean(other) is not False for layer in layers for other in layer.turned):
        return {}
    if not all(layer.kept_clean() and layer.scores_clean() for layer in layers):
        return {}
    turned = [other for layer in layers for other in layer.after]
    return dict.fromkeys((key, *turned), f"equal up to positions shifted by {shift} in the table, and so in q and k")


# ---- lanes -----------------------------------------------------------------------------------------------------------------------------


def _lanes(layer: _Layer) -> Texts:
    """The lanes of every head of q and k in another order, one and the same: in all that holds them, or from the rotation on."""
    frame, shown = layer.frame(), layer.judge.replay.sample
    captured = [key for key in frame if key in shown.values and key not in shown.derived]
    for first in dict.fromkeys((*captured[:1], layer.turned[0])):
        held = frame if first != layer.turned[0] else layer.after
        order = _order(layer, first)
        if order is None:
            continue
        twin = _undone(layer.judge.replay, held, order)
        if all(layer.judge.clean(key, twin) is not False for key in frame) and layer.scores_clean(twin) and layer.scores_clean():
            where = "in q and k" if first != layer.turned[0] else "in q and k once they are rotated"
            return dict.fromkeys(held, f"equal up to the order of the lanes of each head {where}")
    return {}


def _order(layer: _Layer, key: Key) -> Index | None:
    """Which lane of a head holds what is due in each, by the queries of a stage; None if it is no other order."""
    case, head = layer.judge.case(key), int(layer.judge.replay.hparams["head"])
    if case.captured is None or case.right is None:
        return None
    width = int(layer.judge.replay.hparams["heads"]) * head
    got, due = (a[:, :width].reshape(-1, head) for a in (case.captured, case.right.plain))
    if not (np.isfinite(got).all() and np.isfinite(due).all()):
        return None
    apart = np.square(due).sum(axis=0)[:, None] + np.square(got).sum(axis=0)[None] - 2 * due.T @ got
    order = np.asarray(np.argmin(apart, axis=1), np.int64)
    moved = not np.array_equal(order, np.arange(head)) and np.array_equal(np.sort(order), np.arange(head))
    return order if moved else None


def _undone(replay: Replay, keys: Iterable[Key], order: Index) -> Replay:
    """The same side with the lanes of some stages put back."""
    head, values = int(replay.hparams["head"]), replay.sample.values
    width = (int(replay.hparams["heads"]) + int(replay.hparams["kv_heads"])) * head

    def back(value: Any) -> Any:
        out = np.array(value)
        turned = out[:, :width].reshape(len(out), -1, head)[:, :, order]
        out[:, :width] = turned.reshape(len(out), -1)
        return out

    put: dict[Key, Any] = {key: back(values[key]) for key in keys if key in values}
    twin = copy.copy(replay)
    twin.sample = dataclasses.replace(replay.sample, values=ChainMap(put, values))  # type: ignore[arg-type]
    return twin


# ---- capture points --------------------------------------------------------------------------------------------------------------------


def after_bias(judge: Judge, wrong: Sequence[Key]) -> tuple[Texts, Replay]:
    """Products that were captured after their bias, unsaid; and the replay that does not take them for what they are called.

    Such a product is bit for bit the value after it, which is right if it is judged from the product's own inputs; where a bias was
    dropped the two are equal as well, but the value after it is wrong.
    """
    out: Texts = {}
    replay = judge.replay
    for key, before in _biased(replay, wrong):
        values = replay.sample.values
        if before not in values or key not in values or not np.array_equal(values[before], values[key], equal_nan=True):
            continue
        twin = copy.copy(replay)
        twin.sample = dataclasses.replace(replay.sample, derived=replay.sample.derived | {before})
        if judge.clean(key, twin):
            out[before] = f"captured after the bias: it is {key[0]}, and that is right"
            replay = twin
    return out, replay


def _biased(replay: Replay, wrong: Sequence[Key]) -> Iterator[tuple[Key, Key]]:
    """Every sum with a bias whose product is called wrong, and that product."""
    for key, sources in replay.wires.items():
        if stages.stage(key[0]).op == "BIAS" and sources[0].key in wrong:
            yield key, sources[0].key
