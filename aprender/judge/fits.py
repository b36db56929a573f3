"""Faults that are found by looking at the captured value: which row, which block, which position, which number.

Owns the searched candidates (:data:`SEARCHED`) and the ones with a number that is fitted (:data:`FITTED`).  A search proposes a changed
recipe and proves nothing: ``judge.diagnose``, which calls this, replays what is proposed as it replays a row of the catalogue.  Slugs are
those of the catalogue where they mean the same thing.  Refuses what a row of ``judge.faults`` can say as plain data.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from aprender.judge import fused, ggml, witness
from aprender.judge.case import Case, scaled_scores, with_mask, with_setting, with_table, without
from aprender.judge.changes import changed
from aprender.judge.prediction import Operand, Prediction, Setting
from aprender.judge.replay import Recipe
from aprender.judge.rounding import variance
from aprender.judge.sums import Index
from aprender.judge.witness import Float

Variant = tuple[str, Recipe]

FLOOR = 2.0**-50
"""Relative error below which a fit does not weigh elements: what float64 leaves."""

NICE = (-2.0, -1.0, -0.5, 1.0)
"""Changes a of a block times 1 + a that are taken as exact where a fit is near them: a sign, a loss, a half, twice."""


@dataclass(frozen=True)
class Parameter:
    """A kind of fault with one number that is fitted, then judged as any other; the error of the fit counts as noise.

    Attributes
    ----------
    slug : str
        Its name in reports.
    ops : frozenset of str
        Operations where it can sit.
    starts : callable
        A case to the positive values from which the fit may start.
    change : callable
        A case and a value to a changed recipe.
    unit : callable
        A case to the size in which people write the number.
    """

    slug: str
    ops: frozenset[str]
    starts: Callable[[Case], Iterable[float]]
    change: Callable[[Case, float], Recipe]
    unit: Callable[[Case], float] = lambda case: 1.0


def noise_of(right: Prediction, captured: Float) -> Float:
    """Variance to weigh a fit with: a wrong value is rounded at its own size, which may be larger than that of the right one."""
    floor = np.square(FLOOR * captured) + np.finfo(float).tiny
    return np.maximum(np.maximum(right.variance, variance(captured, right.format)), floor)


def unsure(made: Prediction, more: Float) -> Prediction:
    """A prediction with a fitted number in it: no bits are known, and the error of the fit is noise."""
    return dataclasses.replace(made, sigma2=made.sigma2 + more, variance=made.variance + more, certain=False, expected=None)


def free_scale(case: Case) -> Iterator[Variant]:
    """The whole value times a number, by least squares."""
    if case.captured is None or case.right is None:
        return
    right, y = case.right, case.right.plain
    used = np.isfinite(case.captured) & np.isfinite(y) & (True if right.compared is None else right.compared)
    weight = np.where(used, 1.0 / np.where(used, noise_of(right, case.captured), 1.0), 0.0)
    norm = float((y * y * weight)[used].sum())
    if not 0 < norm < math.inf:
        return
    a = float((y * case.captured * weight)[used].sum()) / norm

    def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
        made = case.recipe(at, inputs)
        y = made.plain * a
        inside = np.maximum(made.variance - variance(made.plain, made.format), made.sigma2)  # rounded at another size than the right one
        left = a * a * inside + np.square(made.plain) / norm
        return Prediction(y, left, y, left + variance(y, made.format), made.format, compared=made.compared)

    yield f"{a:.6g} times what is due, everywhere", recipe


# ---- products --------------------------------------------------------------------------------------------------------------------------


def _swapped_parts(case: Case) -> Iterator[Variant]:
    """The query part exchanged with another of its size; that of keys and values is a row of the catalogue."""
    sizes, names = case.parts, ("q", "k", "v")
    for b in (i for i in range(1, len(sizes)) if sizes[i] == sizes[0]):
        order = list(range(len(sizes)))
        order[0], order[b] = b, 0

        def moved(parts: Sequence[object], order: list[int] = order) -> tuple[object, ...]:
            return tuple(parts[i] for i in order) if parts else ()

        text = f"q and {names[b]} are exchanged"
        both = {"weights": moved(case.at.weights), "biases": moved(case.at.biases), "stored": moved(case.at.stored)}
        yield text, with_setting(case.recipe, **both)
        if case.at.weights and case.at.biases:
            yield f"{text} (their weights only)", with_setting(case.recipe, weights=both["weights"], stored=both["stored"])
            yield f"{text} (their biases only)", with_setting(case.recipe, biases=both["biases"])


def _one_block(case: Case) -> Iterator[Variant]:
    """One output channel, one block of its weights scaled: found by regression on the partial products."""
    if case.captured is None or case.right is None or len(case.inputs[0].value) < 2:
        return
    right, error = case.right, case.captured - case.right.plain
    z2 = np.square(np.nan_to_num(error / np.sqrt(np.where(right.variance > 0, right.variance, 1.0))))
    column = int(np.argmax(z2.sum(axis=0)))
    if z2[:, column].sum() < 0.9 * z2.sum():
        return
    ends = np.cumsum([0, *case.parts])
    part = int(np.searchsorted(ends, column, side="right")) - 1
    w = np.asarray(case.at.weights[part], np.float64)
    row, x = w[column - ends[part]], _multiplied(case, part)
    v = noise_of(right, case.captured)[:, column]
    for size in (256, 32, 16, 1):
        if len(row) % size or size == len(row):
            continue
        partial = (x * row).reshape(len(x), -1, size).sum(axis=2)
        norm = (partial**2 / v[:, None]).sum(axis=0)
        a = (partial * (error[:, column] / v)[:, None]).sum(axis=0) / np.where(norm > 0, norm, 1.0)
        at = int(np.argmax(a * a * norm))
        best = float(a[at])
        near = next((n for n in NICE if abs(n - best) < 6 / math.sqrt(norm[at])), best)
        text = f"row {column - ends[part]} of the weight, columns {at * size} to {at * size + size - 1}, has {1 + near:.6g} of its value"
        yield text, _scaled_block(case, part, column - int(ends[part]), slice(at * size, (at + 1) * size), near, norm[at])


def _multiplied(case: Case, part: int) -> Float:
    """The activations as the kernel of a weight multiplies them, [T, K]."""
    x, how = case.inputs[0].value, case.at.profile.ggml
    if how is None or not case.at.stored:
        return x
    return ggml.RULES[case.at.stored[part][0]](x.astype(np.float32), how).value


def _scaled_block(case: Case, part: int, row: int, columns: slice, a: float, norm: float) -> Recipe:
    """The right recipe with one block of one weight row times 1 + a; what the fit does not know of a is noise."""
    w = np.array(case.at.weights[part], np.float64)
    partial = _multiplied(case, part)[:, columns] @ w[row, columns]
    w[row, columns] *= 1.0 + a
    weights = (*case.at.weights[:part], w, *case.at.weights[part + 1 :])

    def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
        made = case.recipe(dataclasses.replace(at, weights=weights), inputs)
        if a in NICE:
            return made
        more = np.zeros_like(made.pre)
        more[:, sum(case.parts[:part]) + row] = partial**2 / norm
        return unsure(made, more)

    return recipe


# ---- positions -------------------------------------------------------------------------------------------------------------------------


def turns(case: Case) -> tuple[Float, Float]:
    """How far each token is turned: real and imaginary part of every pair [T, h/2], summed over heads, as captured over as given."""
    assert case.captured is not None
    half = int(case.at.hparams["head"]) // 2
    if case.op == "ROPE_TABLE":
        cos, sin = np.hsplit(case.captured, 2)
        return cos, sin
    before, after = (a.reshape(len(a), -1, 2, half) for a in (case.inputs[0].value, case.captured))
    cos = (before * after).sum(axis=(1, 2))
    sin = (before[:, :, 0] * after[:, :, 1] - before[:, :, 1] * after[:, :, 0]).sum(axis=1)
    return cos, sin


def found_positions(case: Case) -> Index:
    """The whole position at which each token seems to stand: where its turns agree best with the frequencies."""
    cos, sin = turns(case)
    own = np.asarray(case.at.positions)
    at = np.arange(-len(own) - 8, 4 * int(own.max(initial=0)) + 64)
    angle = at[:, None] * witness.frequencies(float(case.at.hparams["theta"]), int(case.at.hparams["head"]))
    return np.asarray(at[np.argmax(np.nan_to_num(cos) @ np.cos(angle).T + np.nan_to_num(sin) @ np.sin(angle).T, axis=1)], np.int64)


def said_positions(own: Index, found: Index) -> str:
    """Positions in words."""
    apart = found - own
    if (apart == apart[0]).all():
        return f"positions shifted by {apart[0]}"
    wrong = np.flatnonzero(apart)
    some = ", ".join(f"token {t} at {found[t]}, not {own[t]}" for t in wrong[:4])
    return f"{some}{' …' if len(wrong) > 4 else ''}"


def _positions(case: Case) -> Iterator[Variant]:
    if case.captured is None or len(case.captured) != len(case.at.positions):
        return
    own, found = np.asarray(case.at.positions), found_positions(case)
    shifted = bool((found - own == found[0] - own[0]).all())
    if not np.array_equal(own, found) and (shifted or found.min() >= 0):  # who counts backwards turns the wrong way: no position is wrong
        change = {"of": "table", "shift": int(found[0] - own[0])}
        turned = shifted and case.op == "ROPE"
        yield said_positions(own, found), changed(case, (change,)) if turned else with_table(case, case.recipe, positions=found)


# ---- attention -------------------------------------------------------------------------------------------------------------------------


def _windows(case: Case) -> Iterator[Variant]:
    """As many keys as the last token gives any weight to."""
    if case.captured is None:
        return
    seen = np.count_nonzero((case.captured[:, -1] != 0).any(axis=0))
    keys, positions = np.asarray(case.at.keys)[None, :], np.asarray(case.at.positions)[:, None]
    if 0 < seen < len(case.at.keys):
        yield f"a token sees the last {seen} keys only", with_mask(case, (keys <= positions) & (keys > positions - seen))


def _ahead(case: Case) -> Index:
    """How many keys after its own each token gives any weight to, [T]."""
    keys, positions = np.asarray(case.at.keys), np.asarray(case.at.positions)
    seen = (np.asarray(case.captured) != 0).any(axis=0)
    return np.asarray(np.where(seen, keys[None, :] - positions[:, None], 0).max(axis=1).clip(0), np.int64)


def _next_keys(case: Case) -> Iterator[Variant]:
    """Tokens that are not the last of their piece see the key after their own; a piece has two at least, so half of them do."""
    ahead = np.zeros(0, np.int64) if case.captured is None else _ahead(case)
    if ahead.max(initial=0) == 1 and 2 * np.count_nonzero(ahead) >= len(ahead) - 1:
        yield "the tokens that are not the last of their piece see the key after their own", _seeing(case, ahead)


def _whole_pieces(case: Case) -> Iterator[Variant]:
    """Each token sees its piece to the end."""
    ahead = np.zeros(0, np.int64) if case.captured is None else _ahead(case)
    if ahead.max(initial=0) > 1 and all(b == a - 1 for a, b in itertools.pairwise(ahead) if a):
        yield f"each token sees its piece to the end, up to {ahead.max()} keys after its own", _seeing(case, ahead)


def _seeing(case: Case, ahead: Index) -> Recipe:
    """The right recipe where each token sees so many keys after its own."""
    return with_mask(case, np.asarray(case.at.keys)[None, :] <= (np.asarray(case.at.positions) + ahead)[:, None])


def _lost_heads(case: Case) -> Iterator[Variant]:
    """Heads of which every value is 0, and not all of them are."""
    if case.captured is None:
        return
    size = int(case.at.hparams["head"])
    zero = ~case.captured.reshape(len(case.captured), -1, size).any(axis=(0, 2))
    if zero.all() or not zero.any():
        return
    lost = np.repeat(zero, size)

    def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
        made = case.recipe(at, inputs)
        return without(made, lost)

    yield f"heads that are never written: {', '.join(map(str, np.flatnonzero(zero)))}", recipe


# ---- any operation ---------------------------------------------------------------------------------------------------------------------


def _zero(case: Case) -> Iterator[Variant]:
    if case.captured is None or case.captured.any():
        return

    def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
        made = case.recipe(at, inputs)
        none = np.zeros_like(made.pre)
        return Prediction(none, none, none, none, made.format, certain=True, compared=made.compared)

    yield "every value is 0", recipe


def _stale_rows(case: Case) -> Iterator[Variant]:
    """Rows that hold what is due in another row."""
    captured, right = case.captured, case.right
    if captured is None or right is None or captured.ndim != 2 or len(captured) < 2 or len(captured) != len(case.at.positions):
        return
    z = (captured - right.plain) / np.sqrt(np.where(right.variance > 0, right.variance, np.inf))
    wrong = np.where(right.variance > 0, np.abs(z) > 4, captured != right.plain).any(axis=1)
    index = np.arange(len(captured))
    for t in np.flatnonzero(wrong):
        index[t] = int(np.argmin(np.square(right.plain - captured[t]).sum(axis=1)))
    changed = np.flatnonzero(index != np.arange(len(index)))
    if not len(changed):
        return

    def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
        moved = [Operand(o.value[index], None if o.variance is None else o.variance[index]) for o in inputs]
        return case.recipe(dataclasses.replace(at, tokens=tuple(np.asarray(at.tokens)[index])), moved)

    some = ", ".join(f"{t} that of {index[t]}" for t in changed[:4])
    yield f"tokens hold the value of others: {some}{' …' if len(changed) > 4 else ''}", recipe


def _not_finite(case: Case) -> Iterator[Variant]:
    """Values that are not finite, among others that are right."""
    if case.captured is None or case.right is None:
        return
    lost = ~np.isfinite(case.captured) & np.isfinite(case.right.bits())
    if not lost.any():
        return

    def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
        made, captured = case.recipe(at, inputs), np.asarray(case.captured)
        bits, pre, plain = (np.where(lost, captured, a) for a in (made.bits(), made.pre, made.plain))
        return dataclasses.replace(made, pre=pre, plain=plain, expected=None if made.expected is None else bits)

    yield f"{np.count_nonzero(lost)} values are not finite, the others are right", recipe


ROW_BY_ROW = "EMBED RMSNORM MATMUL BIAS ROPE CACHE ADD SILU MUL"

SEARCHED: tuple[tuple[str, frozenset[str], Callable[[Case], Iterable[Variant]]], ...] = tuple(
    (slug, frozenset(ops.split()), variants)
    for slug, ops, variants in (
        ("nan", "", _not_finite),
        ("zero", "", _zero),
        ("stale-row", ROW_BY_ROW, _stale_rows),
        ("swapped-parts", "MATMUL BIAS", _swapped_parts),
        ("block", "MATMUL", _one_block),
        ("rope-position", "ROPE_TABLE ROPE", _positions),
        ("window", "SOFTMAX", _windows),
        ("mask-next", "SOFTMAX", _next_keys),
        ("no-mask", "SOFTMAX", _whole_pieces),
        ("lost-head", "MIX", _lost_heads),
    )
)
"""Name, operations where it can sit (none: any), and a case to its variants."""


# ---- a number that is fitted -------------------------------------------------------------------------------------------------------------


def _eps(case: Case, eps: float) -> Recipe:
    return with_setting(case.recipe, hparams={**case.at.hparams, "eps": eps})


def _theta(case: Case, theta: float) -> Recipe:
    return with_table(case, case.recipe, hparams={**case.at.hparams, "theta": theta})


FITTED: tuple[Parameter, ...] = (
    Parameter("eps", frozenset({"RMSNORM"}), lambda case: np.logspace(-12, 0, 13), _eps),
    Parameter("theta", frozenset({"ROPE_TABLE", "ROPE"}), lambda case: np.logspace(2, 8, 121), _theta),
    Parameter(
        "scale",
        frozenset({"SCORES", fused.ATTENTION}),
        lambda case: np.logspace(-3, 1, 9),
        scaled_scores,
        lambda case: float(case.at.hparams["head"]) ** -0.5,
    ),
)
"""Faults with one number that is fitted."""

UNSCALED = frozenset({"EMBED", "SCORES"})
"""Operations whose own scale is a kind of its own: a free scale of the value says no more."""


def written(value: float, sigma: float, unit: float) -> Iterator[float]:
    """Numbers that people write, as near to a fit as its error: what an engine has in its source, or a multiple of the usual value."""
    for size in dict.fromkeys((1.0, unit)):
        for digits in range(1, 6):
            nice = float(f"{value / size:.{digits - 1}e}") * size
            if abs(nice - value) < 4 * sigma:
                yield nice
                break
