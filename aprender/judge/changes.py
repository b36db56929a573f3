"""Change data as recipes: what the catalogue says about a fault, carried out on the operation that is under suspicion.

Owns :func:`changed`, the one interpreter of the changes that the rows of ``judge.faults`` hold.  Every change wraps a recipe into another
one, so that a mutant has the very rounding points of the side's arithmetic: a fault before the last rounding is rounded as the side would
round it.  Refuses edits: what plants a fault is applied by the
side and shares nothing with this file.  Called by ``judge.diagnose``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aprender import _core
from aprender.arithmetic import BF16, F16, Format
from aprender.judge import ggml, noise, witness
from aprender.judge.case import Case, each, neighbours, reordered, scaled_scores, with_mask, with_setting, with_table, without
from aprender.judge.noise import WIDE
from aprender.judge.prediction import Operand, Prediction, Setting
from aprender.judge.replay import Recipe
from aprender.judge.rounding import MEAN_ROUNDING, U, settle, to_format, variance
from aprender.judge.sums import Index
from aprender.judge.witness import Float
from aprender.stages import Key

Change = Mapping[str, Any]
Array = NDArray[np.float32]


class Impossible(Exception):
    """The change has no place here: the model has no such weight or part, or it changes nothing."""


def changed(case: Case, changes: Sequence[Change]) -> Recipe:
    """The right recipe with all the changes.

    Raises
    ------
    Impossible
        One of them has no place in this case.
    """
    recipe = case.recipe
    for change in changes:
        recipe = APPLY[change["of"]](case, change, recipe)
    return recipe


# ---- settings --------------------------------------------------------------------------------------------------------------------------


def _number(case: Case, change: Change, own: float) -> float:
    """The number that a change puts in the place of another: a value, or its own times a factor."""
    return float(change["value"]) if "value" in change else own * float(change["factor"])


def _hparams(case: Case, change: Change, inner: Recipe) -> Recipe:
    name = change["name"]
    own = float(case.at.hparams[name])
    value = _number(case, change, own)
    if value == own:
        raise Impossible
    hparams = {**case.at.hparams, name: value}
    return with_table(case, inner, hparams=hparams) if case.op == "ROPE" else with_setting(inner, hparams=hparams)


def _positions(case: Case, change: Change, inner: Recipe) -> Recipe:
    """Row t of a piece that starts at p stands at p * scale + t * step + shift."""
    at, index = np.asarray(case.at.positions), np.arange(len(case.at.positions))
    size = int(change.get("pieces", len(at)))
    start = at[index // size * size]
    moved = start * change.get("scale", 1) + (at - start) * change.get("step", 1) + change.get("shift", 0)
    moved = np.where((start == 0) & (change.get("when") == "decode"), at, moved)
    if np.array_equal(moved, at):
        raise Impossible
    return with_table(case, inner, positions=moved)


def _table(case: Case, change: Change, inner: Recipe) -> Recipe:
    """Rotated by so many positions more than the table says.

    Float64 arithmetic turns the table that it has; any other engine has made it for the other positions.
    """
    shift = int(change["shift"])
    if not case.at.profile.wide:
        return with_table(case, inner, positions=np.asarray(case.at.positions) + shift)

    def turned(at: Setting, inputs: Sequence[Operand]) -> Prediction:
        x, table = inputs
        cos, sin = np.hsplit(table.value, 2)
        angle = shift * noise._frequencies(at)  # the float32 numbers of the table itself
        c, s = np.cos(angle), np.sin(angle)
        return inner(at, [x, Operand(np.concatenate([cos * c - sin * s, sin * c + cos * s], axis=1), table.variance)])

    return turned


def _mask(case: Case, change: Change, inner: Recipe) -> Recipe:
    ahead = np.asarray(case.at.keys)[None, :] - np.asarray(case.at.positions)[:, None]
    shift, window = int(change.get("shift", 0)), int(change.get("window", 0))
    mask = ahead <= shift
    return with_mask(case, mask & (ahead - shift > -window) if window else mask, inner)


def _rotation(case: Case, change: Change, inner: Recipe) -> Recipe:
    """Neighbours (2i, 2i + 1) are rotated, not halves."""
    head = int(case.at.hparams["head"])
    order = neighbours(case.inputs[0].value.shape[1] // head, head)

    def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
        x, table = inputs
        spread = None if x.variance is None else x.variance[:, order]
        return reordered(inner(at, [Operand(x.value[:, order], spread), table]), np.argsort(order))

    return recipe


def _heads(case: Case, change: Change, inner: Recipe) -> Recipe:
    """Query head n reads key head (n / div) mod m."""
    heads, kv, head = (int(case.at.hparams[name]) for name in ("heads", "kv_heads", "head"))
    which = np.arange(heads) // int(change.get("div", heads // kv)) % int(change.get("mod", kv))

    def spread(a: Float | None) -> Float | None:
        return None if a is None else a.reshape(len(a), kv, head)[:, which].reshape(len(a), -1)

    def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
        a, *others = inputs
        wide = [Operand(np.asarray(spread(b.value)), spread(b.variance)) for b in others]
        return inner(dataclasses.replace(at, hparams={**at.hparams, "kv_heads": heads}), [a, *wide])

    return recipe


def _scores(case: Case, change: Change, inner: Recipe) -> Recipe:
    head = float(case.at.hparams["head"])
    if "power" in change:
        return scaled_scores(case, float(case.at.hparams[change["name"]]) ** float(change["power"]))
    return scaled_scores(case, _number(case, change, 1.0 / math.sqrt(head)))


# ---- weights and biases ----------------------------------------------------------------------------------------------------------------


def _origin(case: Case, change: Change) -> Key:
    """Name of the weight that is read instead."""
    weights, name = case.replay.weights or {}, change["origin"]
    for layer in (change.get("origin_layer", case.key[1]), None):
        if (name, layer) in weights:
            return name, layer
    raise Impossible


def _pairs(case: Case, change: Change, w: Array) -> Index:
    """Order of rows: the halves of each head interleaved, or (``halves``) taken apart."""
    size = int(case.at.hparams[change["size"]])
    if len(w) % size:
        raise Impossible
    apart = neighbours(len(w) // size, size)
    return apart if change["as"] == "halves" else np.argsort(apart)


def _block(w: Array, change: Change) -> Array:
    """One block of 32 in the middle row."""
    out, row, first = w.copy(), len(w) // 2, w.shape[1] // 64 * 32
    out[row, first : first + 32] *= np.float32(change["factor"])
    return out


def _first_scale(w: Array, change: Change) -> Array:
    """In each 256 columns every 32 have the largest value of the first."""
    rows, columns = w.shape
    whole = np.pad(w, ((0, 0), (0, -columns % 256))).reshape(rows, -1, 8, 32)
    top = np.abs(whole).max(axis=3, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        out = whole * np.where(top > 0, top[:, :, :1] / top, np.float32(1))
    return np.asarray(out.reshape(rows, -1)[:, :columns], np.float32)


def _kept(w: Array, change: Change) -> Array:
    """Zero behind a share of the rows or columns."""
    out, axis = w.copy(), 0 if change["as"] == "cut-rows" else 1
    end = int(w.shape[axis] * float(change["share"]))
    out[(slice(None),) * axis + (slice(end, None),)] = 0
    return out


TRANSFORMS: Mapping[str, Callable[[Array, Change], Array]] = {
    "transposed": lambda w, change: np.ascontiguousarray(w.reshape(w.shape[::-1]).T),
    "scaled": lambda w, change: np.asarray(w * np.float32(change["factor"]), np.float32),
    "plus": lambda w, change: np.asarray(w + np.float32(change["value"]), np.float32),
    "ones": lambda w, change: np.ones_like(w),
    "block": _block,
    "first-scale": _first_scale,
    "cut-columns": _kept,
    "cut-rows": _kept,
}
"""What becomes of a weight by itself, in the float32 in which an engine holds it."""


def _hit(change: Change, parts: int) -> range:
    """The parts that a change is of: all, or one."""
    part = change.get("part")
    if part is None:
        return range(parts)
    if part >= parts:
        raise Impossible
    return range(part, part + 1)


def _refilled(stored: Sequence[tuple[str, NDArray[np.uint8]]], part: int) -> tuple[str, NDArray[np.uint8]]:
    """The bytes of a part whose sub-blocks all have the scale of the first."""
    fmt, raw = stored[part] if stored else ("", np.empty((0, 0), np.uint8))
    made = ggml.first_scales(fmt, raw) if stored else None
    if made is None:
        raise Impossible
    return fmt, made


def _weights(case: Case, change: Change, inner: Recipe) -> Recipe:
    """Weights of some parts; what the file holds of them goes with their rows."""
    values: dict[int, ArrayLike] = {}
    held: dict[int, tuple[str, NDArray[np.uint8]]] = {}
    stored = case.at.stored
    for i in _hit(change, len(case.at.weights)):
        own = np.asarray(case.at.weights[i], np.float32)
        if change["as"] == "origin":
            key = _origin(case, change)
            values[i] = np.asarray((case.replay.weights or {})[key])
            if stored and key in case.replay.stored:
                held[i] = case.replay.stored[key]
        elif change.get("stored"):
            held[i] = _refilled(stored, i)
            values[i] = _core.dequantize(held[i][0], held[i][1].data, own.shape)
        elif change["as"] in ("pairs", "halves"):
            order = _pairs(case, change, own)
            values[i] = own[order]
            if stored:
                held[i] = stored[i][0], np.asarray(stored[i][1])[order]
        else:
            made = TRANSFORMS[change["as"]](own, change)
            values[i] = to_format(made.astype(np.float64), case.at.profile.activations) if change.get("rounded") else made
        if np.shape(values[i]) != own.shape or np.array_equal(values[i], own):
            raise Impossible

    def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
        weights = tuple(values.get(i, w) for i, w in enumerate(at.weights))
        kept = tuple(held.get(i, s) for i, s in enumerate(at.stored))
        return inner(dataclasses.replace(at, weights=weights, stored=kept), inputs)

    if not values:
        raise Impossible
    return recipe


def _biases(case: Case, change: Change, inner: Recipe) -> Recipe:
    """Biases of some parts: times a factor, of another part, or in another order."""
    values: dict[int, Float] = {}
    for i in _hit(change, len(case.at.biases)):
        own = np.asarray(case.at.biases[i], np.float64)
        how = change.get("as", "scaled")
        if how == "origin":
            values[i] = np.asarray((case.replay.weights or {})[_origin(case, change)], np.float64)
        else:
            values[i] = own * float(change["factor"]) if how == "scaled" else own[_pairs(case, change, own.astype(np.float32))]
        if values[i].shape != own.shape:
            raise Impossible

    def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
        return inner(dataclasses.replace(at, biases=tuple(values.get(i, b) for i, b in enumerate(at.biases))), inputs)

    if not values:
        raise Impossible
    return recipe


# ---- inputs and results ----------------------------------------------------------------------------------------------------------------


def _inputs(case: Case, change: Change, inner: Recipe) -> Recipe:
    """An input read from elsewhere, as nothing, or as ones."""
    index, (stage, which) = int(change["index"]), change["origin"]
    own = case.inputs[index].value
    if stage in ("zero", "one"):
        other = Operand(np.full_like(own, 1.0 if stage == "one" else 0.0))
    else:
        key = (stage, case.key[1])
        if key not in case.replay.wires:
            raise Impossible
        other = case.replay.read(key, which, case.last)
    if other.value.shape != own.shape:
        raise Impossible

    def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
        return inner(at, [other if i == index else o for i, o in enumerate(inputs)])

    return recipe


def _erf(x: Float) -> Float:
    return np.asarray(np.vectorize(math.erf, otypes=[np.float64])(x))


FUNCTIONS: Mapping[str, Callable[[Float], Float]] = {
    "gelu": lambda x: 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
    "gelu-erf": lambda x: 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0))),
    "quick-gelu": lambda x: witness.silu(1.702 * x) / 1.702,
    "identity": lambda x: x,
}
"""Activations by name."""


def _by_steps(x: Operand, fmt: Format) -> tuple[Float, Float]:
    """Quick GELU with the product 1.702 x and the sigmoid each rounded to the format: the value, and the variance that is left."""
    spread = np.zeros_like(x.value) if x.variance is None else x.variance
    inner = 1.702 * x.value
    a, a_left = settle(inner, 1.702**2 * spread + np.square(U * inner) / 3, fmt)
    gate = 1.0 / (1.0 + np.exp(-a))
    b, b_left = settle(gate, 4 * MEAN_ROUNDING * gate**2 + np.square(gate * (1 - gate)) * a_left, fmt)
    y = x.value * b
    return y, np.square(x.value) * b_left + b**2 * spread + np.square(U * y) / 3


def _act(case: Case, change: Change, inner: Recipe) -> Recipe:
    """Another activation: four roundings of the result, and of 1 + tanh or 1 + erf, which cancel for negative x."""
    function = FUNCTIONS[change["name"]]

    def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
        (x,), fmt, wide = inputs, at.profile.activations, at.profile.wide
        y = function(x.value)
        if change.get("steps"):
            pre, left = _by_steps(x, fmt)
            return Prediction(pre, left, y, left + variance(y, fmt) + np.square(y) * fmt.unit**2 / 3, fmt)
        if change["name"] == "identity":
            left = np.zeros_like(y) if x.variance is None else x.variance
            return Prediction(y, left, y, left, fmt, certain=x.variance is None)
        left = np.square(WIDE * x.value) if wide else 4 * MEAN_ROUNDING * y * y + np.square(U * x.value) / 3
        left = left if x.variance is None else left + 1.3 * x.variance  # the slope of all of them is at most 1.13
        return Prediction(y, left, y, left + variance(y, fmt), fmt)

    return recipe


def _rows(made: Prediction, index: Index) -> Prediction:
    return each(made, lambda a: a[index])


def _shortened(fmt: Format) -> Callable[[Case, Change, Prediction], Prediction]:
    def turn(case: Case, change: Change, made: Prediction) -> Prediction:
        if fmt.precision >= made.format.precision:
            raise Impossible
        total = np.maximum(made.variance - variance(made.plain, made.format), 0.0) + variance(made.plain, fmt)
        bits = None if made.expected is None else to_format(made.expected, fmt)
        return dataclasses.replace(made, variance=total, format=fmt, expected=bits, dot=None, added=None)

    return turn


def _stale_row(case: Case, change: Change, made: Prediction) -> Prediction:
    index = np.arange(len(made.pre))
    if len(index) < 2:
        raise Impossible
    index[-1] -= 1
    return _rows(made, index)


def _lost_head(case: Case, change: Change, made: Prediction) -> Prediction:
    size, head = int(case.at.hparams["head"]), int(change["head"])
    if made.pre.shape[1] < (head + 1) * size:
        raise Impossible
    return without(made, np.arange(made.pre.shape[1]) // size == head)


def _nan(case: Case, change: Change, made: Prediction) -> Prediction:
    def first(a: Any) -> Any:
        out = a.copy()
        out[-1, 0] = np.nan
        return out

    bits = None if made.expected is None else first(made.expected)
    return dataclasses.replace(made, pre=first(made.pre), plain=first(made.plain), expected=bits)


def _rotated(case: Case, change: Change, made: Prediction) -> Prediction:
    """Two products and a sum, each rounded: in which order is not known.  Rows of a cache from before this run are as they were."""
    table = case.replay.read((change["by"], None), "out", case.last).value[-len(made.pre) :]
    old, fresh = slice(len(made.pre) - len(table)), slice(len(made.pre) - len(table), None)
    cos, sin = witness.spread_table(table, made.pre.shape[1])
    a, b = made.plain[fresh] * cos, witness.rotate_half(made.plain[fresh], table.shape[1]) * sin
    left = np.concatenate([made.sigma2[old], variance(a, made.format) + variance(b, made.format) + made.sigma2[fresh]])
    y = np.concatenate([made.plain[old], a + b])
    return Prediction(y, left, y, left + variance(y, made.format), made.format)


def _scaled_value(case: Case, change: Change, made: Prediction) -> Prediction:
    """Times the root of a size of the model, which may be rounded to the activations' format before."""
    factor = math.sqrt(float(case.at.hparams[change["root"]]))
    factor = float(to_format(np.array([factor]), made.format)[0]) if change.get("rounded") else factor
    y = made.plain * factor
    left = MEAN_ROUNDING * y * y
    return Prediction(y, left, y, left + variance(y, made.format), made.format)


OUTPUTS: Mapping[str, Callable[[Case, Change, Prediction], Prediction]] = {
    "float16": _shortened(F16),
    "bfloat16": _shortened(BF16),
    "stale-row": _stale_row,
    "lost-head": _lost_head,
    "nan": _nan,
    "rotated": _rotated,
    "root-scaled": _scaled_value,
}
"""What becomes of the right value."""


def _output(case: Case, change: Change, inner: Recipe) -> Recipe:
    return lambda at, inputs: OUTPUTS[change["as"]](case, change, inner(at, inputs))


APPLY: Mapping[str, Callable[[Case, Change, Recipe], Recipe]] = {
    "hparams": _hparams,
    "positions": _positions,
    "table": _table,
    "weights": _weights,
    "biases": _biases,
    "inputs": _inputs,
    "scores": _scores,
    "mask": _mask,
    "rotation": _rotation,
    "heads": _heads,
    "act": _act,
    "output": _output,
}
"""What a change can be of."""
