"""Float64 forward passes with the rounding noise of a side's arithmetic in them: draws of what a correct side would have shown.

Owns the size of that noise at each stage, and the passes, which go side by side through one reading of the weights.  Refuses to judge what
they show (``judge.closure``, which calls this, does) and to look at a captured value, except where the run begins in the middle.

The recipes of the side's arithmetic are evaluated on the witness's own values: per stage the variance of (captured - plain) with all
inputs given, plus the square of (plain - witness), which is what emulated roundings (a float32 angle) do.  A Gaussian of that size is
added to the stage and goes on through all that follows; a factor that a row shares is drawn once per row.  Rows that are equal, because
their tokens are, are added in one order and err together: they share a draw, which attention over them does not average away.

**Activations that the kernels of the weights round** (ggml) are rounded so on each pass.  Values that noise leaves on the same side of a
step are rounded alike on every pass and by the side itself; the few near a step are not, and one step is 10^4 times the noise.  How many
there are is Poisson's: where fewer than one is expected, no pass may have any and the side one, and no spread of passes would allow for
it.  So on each pass every row of activations has one more than chance gives it: a value drawn from the row or, every second time, from
those with the longest step, goes a step up or down.  The passes then spread at least as far as the side's own roundings do.  What such a
kernel keeps beside the rounded activations (sums of blocks, as halves) is kept on each pass too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from aprender import _core, stages
from aprender.judge import ggml, witness
from aprender.judge.ggml import Rounded
from aprender.judge.measure import Index, alike
from aprender.judge.prediction import Operand, Prediction, Setting
from aprender.judge.replay import Replay, Sample, Unlike, Unmeasured
from aprender.judge.witness import Float, ModelData
from aprender.stages import Key

Free = Mapping[Key, Float]


class Latest(Mapping[Key, Any]):
    """Weights of which the one that was read last stays decoded: a stage is computed, and its noise predicted, with the same."""

    def __init__(self, weights: Mapping[Key, ArrayLike]) -> None:
        self._weights = weights
        self._last: tuple[Key, Any] | None = None

    def __getitem__(self, key: Key) -> Any:
        if self._last is None or self._last[0] != key:
            self._last = None  # before the next is decoded: one at a time
            self._last = key, self._weights[key]
        return self._last[1]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __contains__(self, key: object) -> bool:
        return key in self._weights


@dataclass(frozen=True)
class _Level:
    """Noise of a stage.

    Attributes
    ----------
    spread : array
        Standard deviation per element.
    row : array or None
        Relative standard deviation of what a row of ``width`` shares.
    which : array or None
        Which tokens are alike.
    met : array or None
        Offsets of the weights that meet sums rounded by themselves.
    """

    spread: Float
    row: Float | None
    width: int
    which: Index | None
    met: Float | None = None


class Passes:
    """Passes of one side's model on its captured ids.

    Parameters
    ----------
    own : Replay
        The side's captures: which stages there are, and its arithmetic.
    model : ModelData
        As the side holds it.
    free : mapping
        The undisturbed pass, :func:`~aprender.judge.witness.forward`.
    draws : int
        How many passes.
    first : int
        The layer to begin with; before it the captured hidden state is taken as it is.
    """

    def __init__(self, own: Replay, model: ModelData, free: Free, draws: int, first: int = 0) -> None:
        weights = Latest(model.weights)
        self._model = ModelData(model.arch, model.flags, model.hparams, weights, model.stored)
        self._own, self._free, self._draws, self._first = own, free, draws, first
        self._generator = np.random.default_rng(0)
        twin = Sample(free, own.sample.tokens, own.sample.positions, own.sample.keys)  # type: ignore[arg-type]  # float64: a witness's
        self._replay = Replay(twin, own.profile, own.hparams, own.flags, weights, own.stored)
        self._readers: dict[Key, list[Key]] = {}
        for reader, sources in own.wires.items():
            for source in sources:
                self._readers.setdefault(source.key, []).append(reader)
        self._absent = own.absent()  # its rounding would be counted twice
        self._shown: dict[Key, tuple[Float, bool]] = {}
        self._over: dict[Key, Float] = {}  # what the rounded sums of a stage's blocks have over the sums of its rounded values

    def run(self) -> Iterator[tuple[Key, Float, bool]]:
        """Stage by stage in execution order: what each pass shows, [draws, ...], and whether the arithmetic says anything about the stage.

        A layer of each pass is held at a time, and one weight.
        """
        entry = (stages.ALIASES["layer_output"], self._first - 1)
        hidden = self._beside(self._own.captured(entry)) if self._first else None
        with np.errstate(invalid="ignore", over="ignore"):
            for key, _ in witness.steps(self._model, self._own.sample.tokens, self._disturbed, self._first, hidden):
                value, judged = self._shown.pop(key)
                yield key, value, judged

    def _beside(self, value: Float) -> Float:
        """The same on every pass."""
        return np.broadcast_to(value, (self._draws, *value.shape))

    def _disturbed(self, key: Key, value: Float) -> Float:
        """A stage's value on each pass with its noise; what goes on is what the readers' kernels make of it."""
        if stages.stage(key[0]).span != "LAYER" and value.ndim == self._free[key].ndim:
            value = self._beside(value)
        level = None if key in self._absent else self._level(key)
        over = self._over.get(self._own.wires[key][0].key) if level is not None and level.met is not None else None
        if level is not None and level.met is not None and over is not None:
            value = value + over @ level.met.T
        shown = value if level is None else self._noisy(value, level)
        self._shown[key] = shown, level is not None or key in self._absent
        return self._read(key, shown)

    def _noisy(self, value: Float, level: _Level) -> Float:
        """A value with noise of a level, [draws, T, ...]."""
        out = value + level.spread * self._drawn(value.shape, level.which)
        if level.row is None:
            return np.asarray(out)
        rows = value.reshape(*value.shape[:2], -1, level.width)
        factor = level.row.reshape(*rows.shape[1:3], 1) * self._drawn((*rows.shape[:3], 1), level.which)
        return np.asarray(out + (rows * factor).reshape(value.shape))

    def _drawn(self, shape: tuple[int, ...], which: Index | None) -> Float:
        """Standard normal numbers, the same for tokens that are alike."""
        if which is None:
            return self._generator.standard_normal(shape)
        return np.asarray(self._generator.standard_normal((shape[0], int(which.max()) + 1, *shape[2:]))[:, which])

    def _level(self, key: Key) -> _Level | None:
        """The noise of a stage; None where nothing is declared."""
        table = self._own.sample.values.get(key) if self._own.profile.table_ulps and not self._own.wires[key] else None
        twin, met = copy.copy(self._replay), []

        def watched(at: Setting, inputs: Sequence[Operand]) -> Prediction:
            met.append(ggml.met(at))
            return self._replay.recipes[self._replay.operation(key)](at, inputs)

        twin.changes = {key: watched} if self._rounds_inputs(key) else {}
        try:
            with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
                made, _ = twin.predict(key, captured=None if table is None else np.asarray(table, np.float64))
                left = made.variance + (0.0 if met else np.square(made.plain - self._free[key]))
        except (Unmeasured, Unlike):
            return None
        free = self._free[key]
        which = alike(free) if free.ndim == 2 else None
        return _Level(np.sqrt(np.where(np.isfinite(left), left, 0.0)), made.row, made.width, which, met[0] if met else None)

    def _rounds_inputs(self, key: Key) -> bool:
        """Whether the stage's activations are rounded to the format of its weights."""
        row = stages.stage(key[0])
        return self._own.profile.ggml is not None and row.op in ggml.BY_FORMAT and row.weight is not None

    def _rule_of(self, key: Key) -> str | None:
        """The number format by whose rule the first reader of a stage rounds it."""
        reader = next((other for other in self._readers.get(key, ()) if self._rounds_inputs(other)), None)
        if reader is None:
            return None
        group = stages.stage(reader[0]).weight
        names = (row[0] for row in _core.WEIGHTS if row[1] == group)
        found = next((self._own.stored[name, reader[1]][0] for name in names if (name, reader[1]) in self._own.stored), None)
        return found if found in ggml.RULES else None

    def _read(self, key: Key, value: Float) -> Float:
        """A stage's value as its readers multiply it."""
        rule, how = self._rule_of(key), self._own.profile.ggml
        if rule is None or how is None:
            return value
        made = ggml.RULES[rule](value.astype(np.float32), how)
        over = ggml.beside(made)
        if over is not None:
            self._over[key] = over
        return one_more(made, self._generator)


def one_more(made: Rounded, generator: np.random.Generator) -> Float:
    """Rounded activations [..., K] with one value of every row a step off, drawn from all or, every second time, from those that step most.

    Parameters
    ----------
    made : Rounded
        By the rule of a kernel.
    generator : Generator
    """
    step = np.broadcast_to(made.step, made.value.shape)
    rows = (*step.shape[:-1], 1)
    among = (step >= step.max(axis=-1, keepdims=True) / 2) | (generator.random(rows) < 0.5)  # floats: the largest two binades
    at = np.where(among, generator.random(step.shape), -1.0).argmax(axis=-1)[..., None]
    off = np.where(generator.random(rows) < 0.5, 1.0, -1.0) * np.take_along_axis(step, at, -1)
    out = np.array(made.value)
    np.put_along_axis(out, at, np.take_along_axis(made.value, at, -1) + off, -1)
    return out
