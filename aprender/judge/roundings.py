"""Roundings that engines make and no arithmetic declares: which of them explains a wrong stage.

Owns the candidates (:data:`ROUNDINGS`), the test that one explains a stage (:func:`explain`) and the rule by which such stages are the
side's arithmetic and not faults (:func:`undeclared`).  Refuses an explanation that is too wide: a candidate replaces the recipe of the
stage to the bit, as a real engine rounds, and the very tests that called it wrong must find nothing any more.  (A mere variance of the
right size explains a wrong scale or plain noise as well; it is no candidate.)  Called by ``judge.local`` for wrong stages of which no
fault is known.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from aprender.arithmetic import BF16, F16, F32, Format, Ggml, Order
from aprender.judge import ggml, narrow, noise
from aprender.judge.measure import measure
from aprender.judge.prediction import Operand, Prediction, Setting
from aprender.judge.replay import Recipe, Replay, Unlike, Unmeasured
from aprender.judge.rounding import Float, to_format, ulp, variance
from aprender.judge.rule import Gates
from aprender.stages import Key

UNDECLARED = "undeclared_arithmetic"

PRODUCTS = 1 << 26
"""Products up to which sums in a short format are tried: a few seconds."""

BUDGET = 4.0
"""Seconds of one thread after which no further stage of a run is tried."""

TF32 = Format("tf32", 11, -125, F32.overflow)


@dataclass(frozen=True)
class Rounding:
    """A rounding that engines make.

    Attributes
    ----------
    slug, text : str
    ops : frozenset of str
        Operations where it is made; empty is all.
    recipe : callable
        The right recipe of a stage to that with the rounding.
    """

    slug: str
    text: str
    ops: frozenset[str]
    recipe: Callable[[Recipe], Recipe]


@dataclass(frozen=True)
class Explanation:
    """Undeclared roundings that leave only dust of a wrong stage.

    Attributes
    ----------
    options : tuple of (str, str, float or None)
        Slug, text and the rms z that is left of each that does; several where they cannot be told apart.
    """

    options: tuple[tuple[str, str, float | None], ...]

    @property
    def slugs(self) -> tuple[str, ...]:
        """Each slug once."""
        return tuple(dict.fromkeys(slug for slug, _, _ in self.options))

    @property
    def slug(self) -> str:
        """All of them, with `` or `` between."""
        return " or ".join(self.slugs)

    def text(self) -> str:
        """The first in words."""
        _, text, z = self.options[0]
        return f"{self.slug} ({text}{'' if z is None else f', rms z {z:.2f}'})"

    def only(self, slug: str) -> Explanation:
        """What is left where another stage has decided."""
        return Explanation(tuple(option for option in self.options if option[0] == slug))


LINEAR = frozenset({"MATMUL"})
DOTS = frozenset({"MATMUL", "SCORES", "MIX"})


def _unordered(at: Setting) -> Setting:
    """The same arithmetic with sums in any order: whoever rounds otherwise adds otherwise."""
    return dataclasses.replace(at, profile=dataclasses.replace(at.profile, order=Order(), ggml=None))


def _loose(made: Prediction, **changes: object) -> Prediction:
    """A prediction of which no bit is declared."""
    return dataclasses.replace(made, certain=False, expected=None, **changes)  # type: ignore[arg-type]


Rule = Callable[[Float], tuple[Float, Float, Float]]
"""Activations to what is multiplied, its step, and how far each was from a boundary."""


def _blocks(size: int, most: float = 127.0, held: Format = F32) -> Rule:
    """Whole numbers of 8 bits times the scale max / ``most`` of each block (0: of the whole row), which is kept in a format."""

    def rule(x: Float) -> tuple[Float, Float, Float]:
        rows = x.reshape(*x.shape[:-1], -1, size or x.shape[-1])
        d = to_format(np.abs(rows).max(axis=-1, keepdims=True) / most, F32)
        whole = np.where(d > 0, rows / np.where(d > 0, d, 1.0), 0.0)
        q, scale = np.clip(np.rint(whole), -128, 127), to_format(d, held)
        apart = np.broadcast_to(scale, rows.shape) * np.abs(0.5 - np.abs(whole - np.rint(whole)))
        return (q * scale).reshape(x.shape), np.broadcast_to(scale, rows.shape).reshape(x.shape), apart.reshape(x.shape)

    return rule


def _signed(x: Float) -> tuple[Float, Float, Float]:
    """Blocks of 256 by llama.cpp's rule, whose largest magnitude becomes -127."""
    made = ggml.q8_k(x.astype(np.float32), Ggml())
    return made.value, made.step, made.apart


def _short(fmt: Format) -> Rule:
    """A shorter floating-point format."""

    def rule(x: Float) -> tuple[Float, Float, Float]:
        value, step = to_format(x, fmt), ulp(x, fmt)
        return value, step, step / 2 - np.abs(value - x)

    return rule


UNDECIDED = 127 * 4 * F32.unit
"""Steps from a boundary within which float32 does not decide a rounding to whole numbers up to 127: two roundings, with a margin of two."""


def _inputs(rule: Rule, both: bool = False, size: int = 1) -> Callable[[Recipe], Recipe]:
    """The inputs of a product are rounded first: the first of them, or both (the weights of a linear layer are the second)."""

    def known(o: Operand) -> Operand:
        value, step, apart = rule(o.value)
        near = apart < UNDECIDED * step
        left = np.where(near, step**2 / 4, 0.0) + (0.0 if o.variance is None else o.variance)
        return Operand(value, left if left.any() else None)

    def changed(_: Recipe) -> Recipe:
        def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
            _check(inputs[0].value, size)
            new = [known(o) if both or i == 0 else o for i, o in enumerate(inputs)]
            weights = tuple(rule(np.asarray(w, np.float64))[0] for w in at.weights) if both else at.weights
            made = _plain_recipe(at, dataclasses.replace(_unordered(at), weights=weights), new)
            return _loose(made, shared=any(o.variance is not None for o in new))

        return recipe

    return changed


class _Inapplicable(Exception):
    """The rounding cannot be made here."""


def _check(x: Float, size: int) -> None:
    if size and x.shape[-1] % size:
        raise _Inapplicable


def _plain_recipe(at: Setting, changed: Setting, inputs: Sequence[Operand]) -> Prediction:
    """The recipe of a product without any rounding of its inputs, by the number of inputs and weights."""
    if at.weights:
        return noise.PREDICT["MATMUL"](changed, inputs)
    return noise.PREDICT["MIX" if inputs[0].value.ndim == 3 else "SCORES"](changed, inputs)


def _output(fmt: Format) -> Callable[[Recipe], Recipe]:
    """The result is cast to a shorter format."""

    def changed(right: Recipe) -> Recipe:
        def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
            made = right(at, inputs)
            if made.format.precision <= fmt.precision:
                raise _Inapplicable
            return _loose(made, format=fmt, variance=made.variance + variance(made.plain, fmt), row=None)

        return recipe

    return changed


def _sums(fmt: Format) -> Callable[[Recipe], Recipe]:
    """Products are added in a shorter format, one after the other."""

    def changed(_: Recipe) -> Recipe:
        def recipe(at: Setting, inputs: Sequence[Operand]) -> Prediction:
            if at.profile.accumulator.precision <= fmt.precision or _size(at, inputs) > PRODUCTS:
                raise _Inapplicable
            where = dataclasses.replace(at, profile=dataclasses.replace(at.profile, accumulator=fmt, ggml=None))
            op = "MATMUL" if at.weights else "MIX" if inputs[0].value.ndim == 3 else "SCORES"
            return narrow.PREDICT[op](where, inputs)

        return recipe

    return changed


def _size(at: Setting, inputs: Sequence[Operand]) -> int:
    """Products of an operation."""
    x = inputs[0].value
    columns = sum(len(np.asarray(w)) for w in at.weights) or len(inputs[1].value) * int(at.hparams["heads"])
    return int(x.size * columns)


BLOCKS = {32: "blocks of 32", 64: "blocks of 64", 128: "blocks of 128", 256: "blocks of 256", 0: "one scale per token"}
"""Over how many activations engines take one scale; 0 is all of a token's."""

ROUNDINGS: Sequence[Rounding] = (
    *(Rounding(f"{fmt.name} output", f"its result is cast to {fmt.name}", frozenset(), _output(fmt)) for fmt in (F16, BF16)),
    *(
        Rounding(f"int8/{size or 'row'}", f"8-bit activations, {text}, max / {most:.0f}", LINEAR, _inputs(_blocks(size, most), size=size))
        for size, text in BLOCKS.items()
        for most in (127.0, 128.0)
    ),
    Rounding("int8/32", "8-bit activations, blocks of 32, scale in f16 (q8_0)", LINEAR, _inputs(_blocks(32, held=F16), size=32)),
    Rounding("int8/256", "8-bit activations, blocks of 256, signed scale (q8_K)", LINEAR, _inputs(_signed, size=256)),
    *(Rounding(f"{f.name} inputs", f"inputs of the product in {f.name}", DOTS, _inputs(_short(f), both=True)) for f in (F16, BF16, TF32)),
    *(Rounding(f"{fmt.name} sums", f"products added in {fmt.name}, one after the other", DOTS, _sums(fmt)) for fmt in (F16, BF16)),
)
"""What a stage may have that its side does not declare."""


@np.errstate(invalid="ignore", over="ignore", divide="ignore", under="ignore")
def explain(replay: Replay, key: Key, gates: Gates, band: float, prefer: Sequence[str] = ()) -> Explanation | None:
    """The undeclared rounding that explains a wrong stage.

    Parameters
    ----------
    replay : Replay
    key : Key
        A stage that was called wrong.
    gates, band : Gates, float
        Those that called it wrong.
    prefer : sequence of str
        Slugs that are tried first, and alone if one fits.

    Returns
    -------
    Explanation or None
        None where none fits.
    """
    op = replay.operation(key)
    rows = [row for row in ROUNDINGS if not row.ops or op in row.ops]
    for chosen in ([row for row in rows if row.slug in prefer], rows):
        found = [(row, z) for row in chosen for z in _tried(replay, key, row, gates, band)]
        if found:
            return Explanation(tuple((row.slug, row.text, z) for row, z in found))
    return None


def _tried(replay: Replay, key: Key, row: Rounding, gates: Gates, band: float) -> Iterator[float | None]:
    """The rms z that a rounding leaves of a stage; nothing if it does not explain it."""
    twin, last, captured = copy.copy(replay), key in replay.sample.last, replay.captured(key)
    twin.changes = {key: row.recipe(replay.recipes[replay.operation(key)])}
    try:
        made = twin.predict(key, last, captured)[0]
    except (_Inapplicable, Unmeasured, Unlike):
        return
    seen = np.isfinite(captured) & (True if made.compared is None else made.compared)
    if not np.array_equal(to_format(captured[seen], made.format), captured[seen]):
        return  # no numbers of the format that it would have been rounded to
    found = measure(captured, made, gates, band)
    if found.reasons or found.n == 0:
        return
    yield found.z_rms


def explanations(
    replays: Mapping[Key, Replay], wrong: Sequence[Key], gates: Gates, band: float, budget: float = BUDGET
) -> dict[Key, Explanation]:
    """What explains each wrong stage, as far as time allows; what explained the one before is tried first."""
    end, prefer = time.thread_time() + budget, tuple[str, ...]()
    out: dict[Key, Explanation] = {}
    for key in wrong:
        if time.thread_time() > end:
            break
        found = explain(replays[key], key, gates, band, prefer)
        if found is not None:
            out[key], prefer = found, found.slugs
    return out


def undeclared(ops: Mapping[Key, str], wrong: Iterable[Key], found: Mapping[Key, Explanation]) -> dict[Key, Explanation]:
    """Stages whose rounding is the side's arithmetic and no fault of their own, with that rounding.

    That is so where no stage of an operation is as declared, and one and the same rounding explains most of them, two at least: an engine
    has one kernel for an operation.  A single stage among others that are as declared is a fault, whatever explains it.

    Parameters
    ----------
    ops : mapping
        Every measured stage to its operation.
    wrong : iterable of Key
    found : mapping
        What explains some of them.
    """
    wrong = set(wrong)
    out: dict[Key, Explanation] = {}
    for op in set(ops.values()):
        of_kind = [key for key in ops if ops[key] == op]
        if len(of_kind) < 2 or not wrong.issuperset(of_kind):
            continue
        slugs = [slug for key in of_kind if key in found for slug in found[key].slugs]
        common = max(dict.fromkeys(slugs), key=slugs.count, default="")
        if slugs.count(common) * 2 > len(of_kind):
            out |= {key: found[key].only(common) for key in of_kind if key in found and common in found[key].slugs}
    return out
