"""Edits of plan data, weights and values, carried out without knowing what they mean.

Owns what may be done to a weight (:data:`TRANSFORMS`) and to the value of a stage (:data:`VALUES`), edits of step fields as the core takes
them, edits of what is handed out, and a timeline whose edits apply in some pieces of a prompt only.  An edit is plain data (a step field, a
weight or a value, and what becomes of it); ``judge/faults.py`` lists the forms, and this file knows no fault.  Refuses an edit that fits
nothing in the model.  Called by ``sides.own`` only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprender import _core, stages
from aprender.errors import ArgumentError
from aprender.manifest import ALL, LAST, TensorNote
from aprender.stages import Key

Array = NDArray[np.float32]
Edit = Mapping[str, Any]
Sizes = Mapping[str, int | float]


# ---- what may become of a weight -----------------------------------------------------------------------------------------------------


def _reread_transposed(weight: Array, edit: Edit, size: Sizes) -> Array:
    """The same bytes of a [out, in] matrix, read as if they were stored [in, out]."""
    rows, cols = weight.shape
    return np.ascontiguousarray(weight.reshape(cols, rows).T)


def _as_pairs(weight: Array, edit: Edit, size: Sizes) -> Array:
    """The rows of each group of ``size``: its two halves interleaved."""
    rows = int(size[edit["size"]])
    return weight.reshape(-1, 2, rows // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _one_block(weight: Array, edit: Edit, size: Sizes) -> Array:
    """One block of 32 in the middle row: scaled."""
    out, row, col = weight.copy(), len(weight) // 2, weight.shape[1] // 64 * 32
    out[row, col : col + 32] *= np.float32(edit["factor"])
    return out


def _first_scale(weight: Array, edit: Edit, size: Sizes) -> Array:
    """Every 32 columns rescaled so that their largest value is that of the first 32 of their 256."""
    out = weight.copy()
    for first in range(0, weight.shape[1], 256):
        lead = np.abs(weight[:, first : first + 32]).max(axis=1, keepdims=True)
        for col in range(first + 32, min(first + 256, weight.shape[1]), 32):
            top = np.abs(weight[:, col : col + 32]).max(axis=1, keepdims=True)
            out[:, col : col + 32] *= np.where(top > 0, lead / np.where(top > 0, top, 1), 1)
    return out


def _cut(axis: int) -> Callable[[Array, Edit, Sizes], Array]:
    """Zero behind a share of the rows (0) or columns (1)."""

    def cut(weight: Array, edit: Edit, size: Sizes) -> Array:
        out = weight.copy()
        end = int(weight.shape[axis] * edit["share"])
        out[(slice(None),) * axis + (slice(end, None),)] = 0
        return out

    return cut


TRANSFORMS: Mapping[str, Callable[[Array, Edit, Sizes], Array]] = {
    "same": lambda weight, edit, size: weight,
    "transposed": _reread_transposed,
    "zero": lambda weight, edit, size: np.zeros_like(weight),
    "scaled": lambda weight, edit, size: weight * np.float32(edit["factor"]),
    "plus": lambda weight, edit, size: weight + np.float32(edit["value"]),
    "pairs": _as_pairs,
    "block": _one_block,
    "first-scale": _first_scale,
    "cut-columns": _cut(1),
    "cut-rows": _cut(0),
}
"""What an edit may do to a weight."""


# ---- what may become of a value ------------------------------------------------------------------------------------------------------


def _short(keep: int) -> Callable[[Array, Edit, Sizes, Array], Array]:
    """Nearest values whose mantissa has ``keep`` bits after the leading one."""

    def shortened(value: Array, edit: Edit, size: Sizes, table: Array) -> Array:
        bits, drop = value.view(np.uint32), np.uint32(23 - keep)
        half = (np.uint32(1) << (drop - np.uint32(1))) - np.uint32(1) + (bits >> drop & np.uint32(1))
        return ((bits + half) >> drop << drop).view(np.float32)

    return shortened


def _last_row_stale(value: Array, edit: Edit, size: Sizes, table: Array) -> Array:
    """The last row is the one before it."""
    return np.concatenate([value[:-1], value[-2:-1] if len(value) > 1 else value])


def _head_lost(value: Array, edit: Edit, size: Sizes, table: Array) -> Array:
    """One head's columns are zero."""
    out, width = value.copy(), int(size["head"])
    out[:, edit["head"] * width : (edit["head"] + 1) * width] = 0
    return out


def _not_a_number(value: Array, edit: Edit, size: Sizes, table: Array) -> Array:
    """The first element of the last row is NaN."""
    out = value.copy()
    out[-1, 0] = np.nan
    return out


def _rotated(value: Array, edit: Edit, size: Sizes, table: Array) -> Array:
    """The new rows of a cache, rotated by a table of cosines and sines."""
    fresh, half = value[-len(table) :], table.shape[1] // 2
    pairs = fresh.reshape(len(fresh), -1, 2, half)
    cos, sin = table[:, None, :half], table[:, None, half:]
    turned = np.stack([pairs[:, :, 0] * cos - pairs[:, :, 1] * sin, pairs[:, :, 1] * cos + pairs[:, :, 0] * sin], axis=2)
    return np.concatenate([value[: -len(table)], turned.reshape(fresh.shape)])


VALUES: Mapping[str, Callable[[Array, Edit, Sizes, Array], Array]] = {
    "float16": lambda value, edit, size, table: value.astype(np.float16).astype(np.float32),
    "bfloat16": _short(7),
    "stale-row": _last_row_stale,
    "first-row": lambda value, edit, size, table: np.repeat(value[:1], len(value), axis=0),
    "lost-head": _head_lost,
    "nan": _not_a_number,
    "rotated": _rotated,
}
"""What an edit may do to the value of a stage."""


# ---- edits of the plan, of weights and of what is shown ------------------------------------------------------------------------------


def step_edits(edits: Sequence[Edit], plan: Sequence[Mapping[str, Any]]) -> list[tuple[str, int | None, str, float]]:
    """Edits of step fields as the core takes them; a factor multiplies the value that the plan holds, an origin names a step."""
    out = []
    for edit in (edit for edit in edits if edit["target"] in ("step", "input")):
        hit = [step for step in plan if step["stage"] == edit["stage"] and edit.get("layer") in (None, step["layer"])]
        if not hit:
            raise ArgumentError(f"the edit of {edit['stage']} in layer {edit.get('layer')} fits no step of this model", code="ARGUMENT")
        for step in hit:
            if edit["target"] == "input":
                value = _origin(edit["origin"], step["layer"], plan)
            else:
                value = edit["value"] if "value" in edit else step[edit["field"]] * edit["factor"]
            out.append((step["stage"], step["layer"], edit["field"], float(value)))
    return out


def switches(edit: Edit) -> bool:
    """Whether an edit of the plan or of a weight applies in some pieces only.  (Edits of values have a rule of their own.)"""
    return "when" in edit and edit["target"] in ("step", "weight")


def when(edits: Sequence[Edit]) -> str | None:
    """In which pieces the edits apply that do not apply in all; there is one such rule per side."""
    rules = sorted({edit["when"] for edit in edits if switches(edit)})
    if len(rules) > 1 or not set(rules) <= set(WHEN):
        raise ArgumentError(f"edits apply when {', '.join(rules)}: one of {', '.join(WHEN)} is needed", code="ARGUMENT", field="when")
    return rules[0] if rules else None


def _origin(origin: Sequence[str], layer: int | None, plan: Sequence[Mapping[str, Any]]) -> int:
    """The step that a stage of the layer is (``out``), or that it reads (``a``, ``b``)."""
    stage, which = origin
    for place, step in enumerate(plan):
        if (step["stage"], step["layer"]) == (stage, layer):
            return place if which == "out" else int(step[which])
    raise ArgumentError(f"this model has no {stage} in layer {layer} to read from", code="ARGUMENT")


def weight_edits(edits: Sequence[Edit], weights: Mapping[Key, Array], size: Sizes) -> dict[Key, Array]:
    """Edits of weights as arrays to put in their places; an origin is read as the file holds it."""
    out: dict[Key, Array] = {}
    for edit in (edit for edit in edits if edit["target"] == "weight"):
        keys = [key for key in weights if key[0] == edit["weight"] and edit.get("layer") in (None, key[1])]
        if not keys:
            raise ArgumentError(f"the edit of {edit['weight']} in layer {edit.get('layer')} fits no weight of this model", code="ARGUMENT")
        for key in keys:
            source = (
                out[key] if key in out and "origin" not in edit else weights[edit.get("origin", key[0]), edit.get("origin_layer", key[1])]
            )
            out[key] = np.ascontiguousarray(TRANSFORMS[edit["transform"]](source, edit, size), np.float32)
    return out


def handed_out(
    edits: Sequence[Edit], arrays: dict[Key, Array], notes: dict[Key, TensorNote]
) -> tuple[dict[Key, Array], dict[Key, TensorNote]]:
    """Edits of what is shown: another stage instead, or the last token only, said or not."""
    arrays, notes = dict(arrays), dict(notes)
    for edit in edits:
        key = edit["stage"], edit["layer"]
        if edit["target"] != "capture" or key not in arrays:
            continue
        if edit["transform"] == "instead":
            arrays[key] = arrays[edit["origin"], edit["layer"]]
            notes[key] = dataclasses.replace(notes[key], capture_point=edit["point"])
        else:
            arrays[key] = arrays[key][-1:]
            notes[key] = dataclasses.replace(notes[key], shape=arrays[key].shape, positions=LAST if edit.get("said") else ALL)
    return arrays, notes


# ---- edits that apply in some pieces only --------------------------------------------------------------------------------------------

WHEN: Mapping[str, Callable[[int, int], bool]] = {
    "single": lambda position, tokens: tokens == 1,
    "later": lambda position, tokens: position > 0,
}
"""In which pieces of a prompt an edit applies (``"when"``), by the piece's first position and length; in all of them without it."""


class Switched:
    """A timeline whose edits apply in some pieces only: an edited run and a plain one, of which each piece is computed by one.

    The other one follows with the keys and values of the first in its cache, so that both are at the same place with the same past.
    """

    def __init__(self, plain: _core.Run, edited: _core.Run, when: str) -> None:
        self._plain, self._edited, self._applies = plain, edited, WHEN[when]
        caches = [key for key in stages.keys(plain.model.flags, int(plain.model.hparams["layers"])) if stages.stage(key[0]).shape[0] == "J"]
        self._caches = tuple(caches)
        self.tier = plain.tier

    def forward(self, tokens: Sequence[int], keep: Sequence[Key], feed: Mapping[Key, Array]) -> dict[Key, Array]:
        """Like ``_core.Run.forward``."""
        applies = self._applies(self._plain.position, len(tokens))
        first, other = (self._edited, self._plain) if applies else (self._plain, self._edited)
        made = first.forward(tokens, list(dict.fromkeys([*keep, *self._caches])), feed)
        other.forward(tokens, self._caches, {key: made[key] for key in self._caches})
        return {key: value for key, value in made.items() if key in set(keep)}
