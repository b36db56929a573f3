"""What kind of fault a wrong stage has: each candidate is replayed in the witness's place, and confirmed if only dust is left.

Owns the candidates as rows (a name, the operations where it can sit, the edited arguments) and the rule that confirms one.  Refuses shares
of explained variance: a candidate holds if the very tests that called the stage wrong (``judge.measure`` under the run's gates) find
nothing once it is replayed under the same roundings, and else the kind is ``unknown`` with the shapes of ``judge.shapes``.  Shares nothing
with ``judge.faults``, which plants.  Called by ``judge.verdict`` for the first wrong stages of a side.

A candidate is ``(slug, ops, variants)``: ``variants`` takes a :class:`Case` (one operation with its setting and inputs) and yields pairs of
a text and a changed recipe.  Where a stage was estimated and not captured, the fault may sit in it: every operation of the judged region is
a case.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from aprender import _core, stages
from aprender.arithmetic import F32
from aprender.judge import noise
from aprender.judge.measure import Measure, measure
from aprender.judge.prediction import Operand, Prediction, Setting
from aprender.judge.replay import Recipe, Replay
from aprender.judge.rounding import MEAN_ROUNDING, U, to_format, variance
from aprender.judge.rule import Gates
from aprender.judge.shapes import Residual, Shape, shapes
from aprender.judge.sums import Index
from aprender.judge.witness import Float, Mask
from aprender.stages import Key

UNKNOWN = "unknown"

BUDGET = 4.0
"""Seconds of one thread after which no further candidate is begun in a run; the diagnosis then says that some were not tried."""

WITHIN = 8
"""Rows that a coarse search looks at: near the start angles do not wrap."""

FLOOR = 2.0**-50
"""Relative error below which a fit does not weigh elements: what float64 leaves."""

Variant = tuple[str, Recipe]


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
    captured, right : array, Prediction or None
        The captured value and the right replay, where the case is the judged stage itself.
    """

    key: Key
    op: str
    at: Setting = field(repr=False)
    inputs: tuple[Operand, ...] = field(repr=False)
    replay: Replay = field(repr=False)
    recipe: Recipe = field(repr=False)
    captured: Float | None = field(default=None, repr=False)
    right: Prediction | None = field(default=None, repr=False)

    @property
    def parts(self) -> list[int]:
        """Columns of each weight or bias part."""
        return [len(np.asarray(w)) for w in (self.at.weights or self.at.biases)]


@dataclass(frozen=True)
class Candidate:
    """A kind of fault.

    Attributes
    ----------
    slug : str
        Its name in reports.
    ops : frozenset of str
        Operations where it can sit; empty is all of them.
    variants : callable
        A case to its variants, each a text and a changed recipe.
    together : bool
        All cases of the region have the fault at once (a mask).
    """

    slug: str
    ops: frozenset[str]
    variants: Callable[[Case], Iterable[Variant]]
    together: bool = False

    def applies(self, op: str) -> bool:
        """Whether an operation can have it."""
        return not self.ops or op in self.ops


@dataclass(frozen=True)
class Parameter:
    """A kind of fault with one number that is fitted, then judged as any other; the error of the fit counts as noise.

    Attributes
    ----------
    slug, ops : as in :class:`Candidate`
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

    def to_json(self) -> dict[str, object]:
        """The keys that scripts rely on."""
        out = dataclasses.asdict(self)
        return out | {"ties": list(self.ties), "shapes": [s.to_json() for s in self.shapes], "look_at": list(self.look_at)}

    @property
    def sentence(self) -> str:
        """What it is and how it is known; else what it looks like and where to look."""
        look = "; ".join(self.look_at)
        if self.kind == UNKNOWN:
            seen = "; ".join(f"{s.code}: {s.text}" for s in self.shapes) or "no shape"
            few = "" if self.complete else f" (the {self.tried} replayed; larger ones were not)"
            return f"Kind unknown: no fault of the catalogue{few} leaves only rounding. The residual: {seen}. Look at {look}."
        fit = "" if self.alpha is None else f", {self.alpha:.4g} ± {self.sigma:.1g} of it is there"
        tie = f"; as likely: {', '.join(self.ties)}" if self.ties else ""
        return f"Kind {self.kind}: {self.detail}. Replayed with it, only rounding is left{fit}{tie}. Look at {look}."


# ---- helpers of the candidates ---------------------------------------------------------------------------------------------------------


def _edited(**changes: object) -> Callable[[Case], Recipe]:
    """The right recipe with other fields of its setting."""
    return lambda case: lambda at, inputs: case.recipe(dataclasses.replace(at, **changes), inputs)  # type: ignore[arg-type]


def _hparams(case: Case, **changes: float) -> Recipe:
    """The right recipe with other hyper-parameters."""
    return _edited(hparams={**case.at.hparams, **changes})(case)


def _each_part(parts: int, names: Sequence[str] = ("q", "k", "v")) -> Iterator[tuple[str, list[bool]]]:
    """All parts of a group, then each by itself: a text and which are hit."""
    yield ("", [True] * parts)
    if parts > 1:
        for i in range(parts):
            yield (f" of {names[i] if parts == len(names) else i}", [k == i for k in range(parts)])


def _weights(at: Setting) -> list[Float]:
    return [np.asarray(w, np.float64) for w in at.weights]


def _reordered(made: Prediction, columns: Index) -> Prediction:
    """A prediction with its last axis in another order."""

    def turn(a: object) -> object:
        return a[..., columns] if isinstance(a, np.ndarray) and a.ndim == made.pre.ndim else a

    names = ("pre", "sigma2", "plain", "variance", "expected", "certain", "compared")
    return dataclasses.replace(made, dot=None, added=None, **{name: turn(getattr(made, name)) for name in names})  # type: ignore[arg-type]


def _neighbours(heads: int, head: int) -> Index:
    """Lanes of each head so that the neighbours (2i, 2i + 1) come to (i, i + h/2)."""
    one = np.concatenate([np.arange(0, head, 2), np.arange(1, head, 2)])
    return np.asarray((np.arange(heads)[:, None] * head + one).ravel(), np.int64)


@dataclass(frozen=True)
class _Masked(Setting):
    """A setting with a mask of its own."""

    mask: Mask | None = None

    @property
    def allowed(self) -> Mask:
        """The mask that the candidate supposes, [T, J]."""
        return super().allowed if self.mask is None else self.mask


def _with_mask(case: Case, mask: Mask) -> Recipe:
    """The right recipe under another mask; a score that it forbids is 0."""

    def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
        made = case.recipe(_Masked(**{f.name: getattr(at, f.name) for f in dataclasses.fields(at)}, mask=mask), inputs)
        if case.op != "SCORES":
            return made
        seen = np.broadcast_to(at.allowed | mask, made.pre.shape)
        return dataclasses.replace(made, compared=seen, certain=np.broadcast_to(np.asarray(made.certain), seen.shape) | ~mask)

    return recipe


# ---- weights and biases ----------------------------------------------------------------------------------------------------------------


def _transposed(case: Case) -> Iterator[Variant]:
    for name, hit in _each_part(len(case.at.weights)):
        made = tuple(
            np.ascontiguousarray(np.asarray(w).reshape(np.asarray(w).shape[::-1]).T) if h else w
            for w, h in zip(case.at.weights, hit, strict=True)
        )
        yield f"the weight{name} is read as if it were stored [in, out]", _edited(weights=made)(case)


def _times_bias(factor: float, text: str) -> Callable[[Case], Iterator[Variant]]:
    def variants(case: Case) -> Iterator[Variant]:
        for name, hit in _each_part(len(case.at.biases)) if case.at.biases else ():
            made = tuple(np.asarray(b, np.float64) * (factor if h else 1.0) for b, h in zip(case.at.biases, hit, strict=True))
            yield f"the bias{name} {text}", _edited(biases=made)(case)

    return variants


def _swapped_parts(case: Case) -> Iterator[Variant]:
    """Two parts of one group exchanged: weights, biases or both."""
    sizes, names = case.parts, ("q", "k", "v")
    for a, b in ((i, j) for i in range(len(sizes)) for j in range(i) if sizes[i] == sizes[j]):
        order = list(range(len(sizes)))
        order[a], order[b] = b, a

        def moved(parts: Sequence[object], order: list[int] = order) -> tuple[object, ...]:
            return tuple(parts[i] for i in order) if parts else ()

        text = f"{names[b]} and {names[a]} are exchanged" if len(sizes) == len(names) else f"parts {b} and {a} are exchanged"
        both = {"weights": moved(case.at.weights), "biases": moved(case.at.biases), "stored": moved(case.at.stored)}
        yield text, _edited(**both)(case)
        if case.at.weights and case.at.biases:
            yield f"{text} (their weights only)", _edited(weights=both["weights"], stored=both["stored"])(case)
            yield f"{text} (their biases only)", _edited(biases=both["biases"])(case)


def _other_weight(case: Case) -> Iterator[Variant]:
    """The weight of another projection that reads the same input: gate for up."""
    row = stages.stage(case.key[0])
    for other in stages.STAGES:
        same = other.op == row.op and other.a == row.a and other.shape == row.shape and other.span == row.span
        if other.name == row.name or not same or other.weight is None or len(case.at.weights) != 1:
            continue
        found = case.replay.weights.get((other.weight, case.key[1])) if case.replay.weights is not None else None
        if found is not None:
            yield f"it has the weight of {other.name}", _edited(weights=(found,))(case)


def _table_as_head(case: Case) -> Iterator[Variant]:
    """The token table in place of another weight of its shape."""
    first = next(row for row in stages.STAGES if row.op == "EMBED")
    table = case.replay.weights.get((str(first.weight), None)) if case.replay.weights is not None else None
    if case.key[1] is None and table is not None and np.shape(table) == np.shape(case.at.weights[0]):
        yield "the token table is used as head", _edited(weights=(table,))(case)


def _permuted_rows(case: Case) -> Iterator[Variant]:
    """Rows of q and k as for the other kind of RoPE pairs, either way round."""
    head, sizes = int(case.at.hparams["head"]), case.parts
    if len(sizes) != 3:  # the group of q, k and v
        return
    for way, names in (("as for neighbours", (0, 1)), ("as for halves", (0, 1))):
        for hit in (names, (0,), (1,)):
            text = f"rows of {' and '.join('qk'[i] for i in hit)} are permuted {way}"

            def moved(parts: Sequence[object], hit: tuple[int, ...] = hit, way: str = way) -> tuple[object, ...]:
                out = list(parts)
                for i in hit if parts else ():
                    order = _neighbours(sizes[i] // head, head)
                    order = order if way == "as for halves" else np.argsort(order)
                    part = parts[i]
                    out[i] = (part[0], np.asarray(part[1])[order]) if isinstance(part, tuple) else np.asarray(part)[order]
                return tuple(out)

            whole = {"weights": moved(case.at.weights), "biases": moved(case.at.biases), "stored": moved(case.at.stored)}
            yield text, _edited(**whole)(case)
            if case.at.weights and case.at.biases:
                yield f"{text} (their biases not)", _edited(weights=whole["weights"], stored=whole["stored"])(case)


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
    row, x = w[column - ends[part]], case.inputs[0].value
    v = _noise(right, case.captured)[:, column]
    for size in (256, 32, 16, 1):
        if len(row) % size or size == len(row):
            continue
        partial = (x * row).reshape(len(x), -1, size).sum(axis=2)
        norm = (partial**2 / v[:, None]).sum(axis=0)
        a = (partial * (error[:, column] / v)[:, None]).sum(axis=0) / np.where(norm > 0, norm, 1.0)
        at = int(np.argmax(a * a * norm))
        best = float(a[at])
        near = next((n for n in (-2.0, -1.0, -0.5, 1.0) if abs(n - best) < 6 / math.sqrt(norm[at])), best)
        text = f"row {column - ends[part]} of the weight, columns {at * size} to {at * size + size - 1}, has {1 + near:.6g} of its value"
        yield text, _scaled_block(case, part, column - int(ends[part]), slice(at * size, (at + 1) * size), near, norm[at])


def _scaled_block(case: Case, part: int, row: int, columns: slice, a: float, norm: float) -> Recipe:
    """The right recipe with one block of one weight row times 1 + a; what the fit does not know of a is noise."""
    w = np.array(case.at.weights[part], np.float64)
    partial = case.inputs[0].value[:, columns] @ w[row, columns]
    w[row, columns] *= 1.0 + a
    weights = (*case.at.weights[:part], w, *case.at.weights[part + 1 :])

    def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
        made = case.recipe(dataclasses.replace(at, weights=weights), inputs)
        if a in (-2.0, -1.0, -0.5, 1.0):
            return made
        more = np.zeros_like(made.pre)
        more[:, sum(case.parts[:part]) + row] = partial**2 / norm
        return _unsure(made, more)

    return recipe


def _noise(right: Prediction, captured: Float) -> Float:
    """Variance to weigh a fit with: a wrong value is rounded at its own size, which may be larger than that of the right one."""
    floor = np.square(FLOOR * captured) + np.finfo(float).tiny
    return np.maximum(np.maximum(right.variance, variance(captured, right.format)), floor)


def _unsure(made: Prediction, more: Float) -> Prediction:
    """A prediction with a fitted number in it: no bits are known, and the error of the fit is noise."""
    return dataclasses.replace(made, sigma2=made.sigma2 + more, variance=made.variance + more, certain=False, expected=None)


# ---- embedding, norm, elementwise --------------------------------------------------------------------------------------------------------


def _scaled_table(case: Case) -> Iterator[Variant]:
    root = math.sqrt(float(case.at.hparams["dim"]))
    for text, factor in (("", root), (" (rounded first)", float(to_format(np.array([root]), case.at.profile.activations)[0]))):

        def recipe(at: Setting, inputs: Sequence[Operand], factor: float = factor) -> Prediction:
            made = case.recipe(at, inputs)
            y, fmt = made.plain * factor, made.format
            left = MEAN_ROUNDING * y * y
            return Prediction(y, left, y, left + variance(y, fmt), fmt)

        yield f"the embedding is multiplied by sqrt({int(case.at.hparams['dim'])}){text}", recipe


def _norm_weight(change: Callable[[Float], Float], text: str) -> Callable[[Case], Iterator[Variant]]:
    def variants(case: Case) -> Iterator[Variant]:
        yield text, _edited(weights=tuple(change(w) for w in _weights(case.at)))(case)

    return variants


def _epsilons(case: Case) -> Iterator[Variant]:
    for eps in (1e-5, 1e-6, 1e-12, 10 * float(case.at.hparams["eps"])):
        if eps != float(case.at.hparams["eps"]):
            yield f"epsilon is {eps:.3g}, the model has {float(case.at.hparams['eps']):.3g}", _hparams(case, eps=eps)


def _without(index: int, text: str) -> Callable[[Case], Iterator[Variant]]:
    """An input of a sum read as zero."""

    def variants(case: Case) -> Iterator[Variant]:
        def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
            return case.recipe(at, [Operand(np.zeros_like(o.value)) if i == index else o for i, o in enumerate(inputs)])

        yield text, recipe

    return variants


def _only(index: int, text: str) -> Callable[[Case], Iterator[Variant]]:
    """One input handed on as it is."""

    def variants(case: Case) -> Iterator[Variant]:
        def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
            o, fmt = inputs[index], at.profile.activations
            left = np.zeros_like(o.value) if o.variance is None else o.variance
            return Prediction(o.value, left, o.value, left, fmt, certain=o.variance is None)

        yield text, recipe

    return variants


def _erf(x: Float) -> Float:
    return np.asarray(np.vectorize(math.erf, otypes=[np.float64])(x))


FUNCTIONS: Mapping[str, Callable[[Float], Float]] = {
    "GELU": lambda x: 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0))),
    "GELU by tanh": lambda x: 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
}


def _gelu(case: Case) -> Iterator[Variant]:
    for name, function in FUNCTIONS.items():

        def recipe(at: Setting, inputs: Sequence[Operand], function: Callable[[Float], Float] = function) -> Prediction:
            (x,), fmt = inputs, at.profile.activations
            y = function(x.value)
            left = 4 * MEAN_ROUNDING * y * y + np.square(U * x.value) / 3  # 1 + erf cancels for negative x
            left = left if x.variance is None else left + 1.3 * x.variance
            return Prediction(y, left, y, left + variance(y, fmt), fmt)

        yield f"{name} in place of SiLU", recipe


# ---- RoPE ----------------------------------------------------------------------------------------------------------------------------


def _pairs(case: Case) -> Iterator[Variant]:
    head = int(case.at.hparams["head"])
    order = _neighbours(case.inputs[0].value.shape[1] // head, head)

    def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
        x, table = inputs
        spread = None if x.variance is None else x.variance[:, order]
        return _reordered(case.recipe(at, [Operand(x.value[:, order], spread), table]), np.argsort(order))

    yield "neighbours (2i, 2i + 1) are rotated, not halves (i, i + h/2)", recipe


def _other_table(case: Case, **changes: object) -> Recipe:
    """A table of another base or of other positions: the table itself, or what is rotated by it."""
    if case.op == "ROPE_TABLE":
        return _edited(**changes)(case)

    def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
        other = dataclasses.replace(at, captured=None, **changes)  # type: ignore[arg-type]
        return case.recipe(at, [inputs[0], case.replay.recipes["ROPE_TABLE"](other, ()).operand()])

    return recipe


def _theta(case: Case, theta: float) -> Recipe:
    return _other_table(case, hparams={**case.at.hparams, "theta": theta})


def _thetas(case: Case) -> Iterator[Variant]:
    for theta in (1e4, 5e5, 1e6):
        if theta != float(case.at.hparams["theta"]):
            yield f"the base of RoPE is {theta:g}, the model has {float(case.at.hparams['theta']):g}", _theta(case, theta)


def _positions(case: Case) -> Iterator[Variant]:
    for text, made in (
        ("one too high", case.at.positions + 1),
        ("one too low", case.at.positions - 1),
        ("0 for every token", np.zeros_like(case.at.positions)),
        ("that of the first token for every token", np.full_like(case.at.positions, case.at.positions[0])),
    ):
        if not np.array_equal(made, case.at.positions):
            yield f"the position is {text}", _other_table(case, positions=made)


def _not_rotated(case: Case) -> Iterator[Variant]:
    yield from _only(0, "nothing is rotated")(case)


# ---- attention -------------------------------------------------------------------------------------------------------------------------


def _tiled(case: Case) -> Iterator[Variant]:
    heads, kv, head = (int(case.at.hparams[name]) for name in ("heads", "kv_heads", "head"))
    if not 1 < kv < heads:
        return

    def spread(a: Float | None) -> Float | None:
        return None if a is None else a.reshape(len(a), kv, head)[:, np.arange(heads) % kv].reshape(len(a), -1)

    def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
        a, b = inputs
        wide = Operand(np.asarray(spread(b.value)), spread(b.variance))
        return case.recipe(dataclasses.replace(at, hparams={**at.hparams, "kv_heads": heads}), [a, wide])

    yield f"query head n reads key head n mod {kv}, not n / {heads // kv}", recipe


def _scaled(case: Case, scale: float) -> Recipe:
    """Scores with another scale; what ggml does to q before is done."""

    def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
        q, k = inputs
        if at.profile.ggml is not None and at.profile.cache != F32:
            q = Operand(to_format(q.value, at.profile.cache), q.variance)
        return noise.scores(at, [q, k], scale if at.profile.wide else float(np.float32(scale)))

    return recipe


def _scales(case: Case) -> Iterator[Variant]:
    head, dim = float(case.at.hparams["head"]), float(case.at.hparams["dim"])
    for text, scale in (
        ("missing", 1.0),
        ("1/sqrt(model width)", dim**-0.5),
        ("applied twice", 1.0 / head),
        ("sqrt(head size)", head**0.5),
    ):
        yield f"the scale of the scores is {text}", _scaled(case, scale)


def _masks(case: Case) -> Iterator[Variant]:
    keys, positions = np.asarray(case.at.keys)[None, :], np.asarray(case.at.positions)[:, None]
    yield "each token sees one key too many", _with_mask(case, keys <= positions + 1)
    yield "each token sees one key too few", _with_mask(case, keys < positions)


def _no_mask(case: Case) -> Iterator[Variant]:
    yield "every token sees every key", _with_mask(case, np.ones((len(case.at.positions), len(case.at.keys)), bool))


def _windows(case: Case) -> Iterator[Variant]:
    """As many keys as the last token gives any weight to."""
    if case.captured is None:
        return
    seen = np.count_nonzero((case.captured[:, -1] != 0).any(axis=0))
    keys, positions = np.asarray(case.at.keys)[None, :], np.asarray(case.at.positions)[:, None]
    if 0 < seen < len(case.at.keys):
        yield f"a token sees the last {seen} keys only", _with_mask(case, (keys <= positions) & (keys > positions - seen))


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


def _row(slug: str, ops: str, variants: Callable[[Case], Iterable[Variant]], together: bool = False) -> Candidate:
    return Candidate(slug, frozenset(ops.split()), variants, together)


CANDIDATES: tuple[Candidate, ...] = (
    _row("nan", "", _not_finite),
    _row("zero", "", _zero),
    _row("transposed", "MATMUL", _transposed),
    _row("no-bias", "MATMUL BIAS", _times_bias(0.0, "is missing")),
    _row("double-bias", "MATMUL BIAS", _times_bias(2.0, "is added twice")),
    _row("swapped-parts", "MATMUL BIAS", _swapped_parts),
    _row("swapped-weights", "MATMUL", _other_weight),
    _row("embedding-head", "MATMUL", _table_as_head),
    _row("permuted-rows", "MATMUL BIAS", _permuted_rows),
    _row("embedding-scale", "EMBED", _scaled_table),
    _row("eps", "RMSNORM", _epsilons),
    _row("norm-plus-one", "RMSNORM", _norm_weight(lambda w: 1.0 + w, "the weight is 1 + w")),
    _row("no-norm-weight", "RMSNORM", _norm_weight(np.ones_like, "the weight is missing")),
    _row("rope-pairs", "ROPE", _pairs),
    _row("no-rope", "ROPE", _not_rotated),
    _row("rope-theta", "ROPE_TABLE ROPE", _thetas),
    _row("rope-position", "ROPE_TABLE ROPE", _positions),
    _row("gqa-tile", "SCORES MIX", _tiled),
    _row("scale", "SCORES", _scales),
    _row("mask", "SCORES SOFTMAX", _masks, together=True),
    _row("no-mask", "SCORES SOFTMAX", _no_mask, together=True),
    _row("window", "SCORES SOFTMAX", _windows),
    _row("no-residual", "ADD", _without(0, "the residual is not added")),
    _row("no-branch", "ADD", _without(1, "the branch is not added")),
    _row("gelu", "SILU", _gelu),
    _row("no-activation", "SILU", _only(0, "the activation is missing")),
    _row("no-gate", "MUL", _only(1, "the gate is missing")),
    _row("stale-row", "EMBED RMSNORM MATMUL BIAS ROPE CACHE ADD SILU MUL", _stale_rows),
    _row("one-block", "MATMUL", _one_block),
)
"""Faults without a free number; the order breaks ties of the figures only."""

FITTED: tuple[Parameter, ...] = (
    Parameter("eps", frozenset({"RMSNORM"}), lambda case: np.logspace(-12, 0, 13), lambda case, p: _hparams(case, eps=p)),
    Parameter("rope-theta", frozenset({"ROPE_TABLE", "ROPE"}), lambda case: np.logspace(2, 8, 121), _theta),
    Parameter(
        "scale", frozenset({"SCORES"}), lambda case: np.logspace(-3, 1, 9), _scaled, lambda case: float(case.at.hparams["head"]) ** -0.5
    ),
)
"""Faults with one number that is fitted."""

HPARAMS: Mapping[str, tuple[str, ...]] = {
    "ROPE_TABLE": ("theta", "head"),
    "ROPE": ("theta", "head"),
    "RMSNORM": ("eps",),
    "SCORES": ("head", "heads", "kv_heads"),
    "MIX": ("head", "heads", "kv_heads"),
    "EMBED": ("dim",),
}
"""Operation to the hyper-parameters that it reads."""


# ---- the search ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    """A variant that was replayed."""

    slug: str
    detail: str
    made: Prediction
    found: Measure
    keys: tuple[Key, ...]
    fitted: bool


class _Search:
    """One wrong stage under suspicion of everything."""

    def __init__(self, replay: Replay, key: Key, gates: Gates, band: float) -> None:
        self.replay, self.key, self.gates, self.band = replay, key, gates, band
        self.last = key in replay.sample.last
        self.captured = replay.captured(key)
        self.right, spans = replay.predict(key, self.last, self.captured)
        self.found = measure(self.captured, self.right, gates, band)
        self.cases = self._cases((*spans, key))
        self.tried, self.complete = 0, True

    def _cases(self, keys: Sequence[Key]) -> list[Case]:
        """Every operation of the region with what it is given."""
        seen: dict[Key, Case] = {}
        twin = copy.copy(self.replay)

        def watch(key: Key, op: str) -> Recipe:
            right = self.replay.recipes[op]

            def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
                judged = (self.captured, self.right) if key == self.key else (None, None)
                seen[key] = Case(key, op, at, tuple(inputs), self.replay, right, *judged)
                return right(at, inputs)

            return recipe

        twin.changes = {key: watch(key, self.replay.operation(key)) for key in keys}
        twin.predict(self.key, self.last, self.captured)
        return list(seen.values())

    def replayed(self, changes: Mapping[Key, Recipe]) -> Prediction:
        """The stage with other recipes in its region."""
        twin = copy.copy(self.replay)
        twin.changes = changes
        return twin.predict(self.key, self.last, self.captured)[0]

    def trial(self, slug: str, detail: str, changes: Mapping[Key, Recipe], more: Float | None = None) -> _Trial | None:
        """Replay a variant; None unless only dust is left."""
        self.tried += 1
        made = self.replayed(changes)
        if made.pre.shape != self.captured.shape:
            return None
        made = made if more is None else _unsure(made, more)
        found = measure(self.captured, made, self.gates, self.band)
        if found.reasons or found.n < self._spoken(made):
            return None
        if not measure(self.right.bits(), made, self.gates, self.band).reasons:
            return None  # too vague to differ from no fault at all
        return _Trial(slug, detail, made, found, tuple(changes), more is not None)

    def _spoken(self, made: Prediction) -> int:
        """Elements that a prediction must have a value for: those that it does not leave out (a row without keys), half at least."""
        used = np.isfinite(self.captured) & np.isfinite(self.right.plain)
        used &= True if self.right.compared is None else self.right.compared
        spoken = used if made.compared is None else used & made.compared
        return max(int(np.count_nonzero(spoken)), int(np.count_nonzero(used)) // 2, 1)

    def run(self, budget: float) -> list[_Trial]:
        """All candidates that leave only dust, the best first; one of each kind."""
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
        return sorted(confirmed.values(), key=lambda t: (t.fitted, -t.found.bit_equal))

    @staticmethod
    def _keep(confirmed: dict[str, _Trial], trial: _Trial | None) -> None:
        if trial is not None and (trial.slug not in confirmed or trial.found.bit_equal > confirmed[trial.slug].found.bit_equal):
            confirmed[trial.slug] = trial

    def _variants(self) -> Iterator[tuple[str, str, dict[Key, Recipe]]]:
        """Every variant of every candidate with the recipes that it changes."""
        for row in CANDIDATES:
            cases = [case for case in self.cases if row.applies(case.op)]
            if row.together:
                for variants in zip(*(row.variants(case) for case in cases), strict=True) if cases else ():
                    yield row.slug, variants[0][0], {case.key: recipe for case, (_, recipe) in zip(cases, variants, strict=True)}
                continue
            for case in cases:
                for detail, recipe in row.variants(case):
                    yield row.slug, detail, {case.key: recipe}

    def _fit(self, row: Parameter, case: Case) -> _Trial | None:
        """The best value of one number, by least squares in its logarithm."""

        def plain(log: float) -> Float:
            return self.replayed({case.key: row.change(case, math.exp(log))}).plain

        used = np.isfinite(self.captured) & np.isfinite(self.right.plain)
        used &= True if self.right.compared is None else self.right.compared
        weight = np.where(used, 1.0 / np.where(used, _noise(self.right, self.captured), 1.0), 0.0)
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
        for nice in _written(value, sigma, row.unit(case)):
            found = self.trial(row.slug, f"{row.slug} is {nice:.8g}", {case.key: row.change(case, nice)})
            if found is not None:
                return found
        text = f"{row.slug} is {value:.8g} ± {sigma:.1g} (fitted)"
        return self.trial(row.slug, text, {case.key: row.change(case, value)}, np.where(used, slope**2 / norm, 0.0))


def _written(value: float, sigma: float, unit: float) -> Iterator[float]:
    """Numbers that people write, as near to a fit as its error: what an engine has in its source, or a multiple of the usual value."""
    for size in dict.fromkeys((1.0, unit)):
        for digits in range(1, 6):
            nice = float(f"{value / size:.{digits - 1}e}") * size
            if abs(nice - value) < 4 * sigma:
                yield nice
                break


def _alpha(captured: Float, right: Prediction, made: Prediction) -> tuple[float, float] | tuple[None, None]:
    """Least squares of the residual on the residual that a candidate predicts, and its standard deviation."""
    used = np.isfinite(captured) & np.isfinite(right.plain) & np.isfinite(made.plain)
    for compared in (right.compared, made.compared):
        used &= True if compared is None else compared
    error, due = (captured - right.plain)[used], (made.plain - right.plain)[used]
    v = np.maximum(made.variance[used], np.square(FLOOR * made.plain[used]) + np.finfo(float).tiny)
    norm = float((due * due / v).sum())
    return (float((error * due / v).sum()) / norm, 1.0 / math.sqrt(norm)) if 0 < norm < math.inf else (None, None)


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
        return Diagnosis(*key, UNKNOWN, left=search.found.z_rms, look_at=_look_at(search.cases), **common)  # type: ignore[arg-type]
    best = confirmed[0]
    alpha, sigma = _alpha(captured, right, best.made)
    return Diagnosis(
        *key,
        best.slug,
        best.detail,
        tuple(t.slug for t in confirmed[1:]),
        alpha,
        sigma,
        best.found.z_rms,
        best.found.bit_equal,
        look_at=_look_at(case for case in search.cases if case.key in best.keys),
        **common,  # type: ignore[arg-type]
    )
