"""What closure of one side costs before it is begun, and how much of it is done: all of it, fewer passes, the later layers only, or none.

Owns the estimate, in multiply-adds and in bytes, and the limits.  Refuses to measure time: what is done may not depend on how busy a
machine is.  Called by ``judge.closure``.

A pass multiplies every weight with every token, and keeps the values of one layer.  Predicting the noise of a product from its partial
sums costs as much as two passes through it (``scripts/bench.py``, "adding": 0.27 s beside 0.14 s).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aprender import _core, stages
from aprender.judge.replay import wiring
from aprender.stages import Stage

PRODUCTS = 1 << 40
"""Multiply-adds in float64 that nobody is asked about: two to three minutes of one core."""

BYTES = 1 << 32
"""Memory for the values of the passes that nobody is asked about: 4 GiB."""

LEAST, MOST = 3, 24
"""Passes: with fewer the spread is anybody's guess, more do not make the limit much sharper."""

ROWS = 48
"""Tokens of all passes together, at least: a limit rests on their number where a row of activations errs as a whole."""

PREDICTION = 2
"""What predicting the noise costs, in passes."""

MATRICES = frozenset(row[1] for row in _core.WEIGHTS if row[5] == "MATRIX")
"""Groups of weights that a stage multiplies its input with."""


@dataclass(frozen=True)
class Plan:
    """What is done.

    Attributes
    ----------
    draws : int
        Passes; 0: closure is not run.
    first : int
        The layer that they begin with.
    products, bytes : int
        Multiply-adds in float64 and memory of all this; of the whole of it where nothing is run.
    reason : str
        Why it is not the whole; empty if it is.
    """

    draws: int
    first: int
    products: int
    bytes: int
    reason: str = ""


def wanted(tokens: int) -> int:
    """Passes that closure of a prompt rests on, if the size of the model allows: 6, and more for a few tokens."""
    return min(MOST, max(2 * LEAST, math.ceil(ROWS / tokens)))


def products(hparams: Mapping[str, int | float], flags: frozenset[str], tokens: int, first: int = 0) -> int:
    """Multiply-adds of one pass from a layer on."""
    total = 0
    for key, sources in wiring(flags, int(hparams["layers"])).items():
        row = stages.stage(key[0])
        if key[1] is None or key[1] >= first:
            total += math.prod(row.dims(hparams, tokens)) * _inner(
                row, [stages.stage(source.key[0]) for source in sources], hparams, tokens
            )
    return total


def _inner(row: Stage, sources: Sequence[Stage], hparams: Mapping[str, int | float], tokens: int) -> int:
    """Length of the dot product that makes an element of a stage; 0 where there is none."""
    if sources and row.weight in MATRICES:
        return sources[0].dims(hparams, tokens)[-1]
    if len(sources) == 2 and sources[1].shape[0] == "J":  # queries or probabilities meet the cache
        return int(hparams["head"]) if row.shape[-1] == "J" else tokens
    return 0


def memory(hparams: Mapping[str, int | float], flags: frozenset[str], tokens: int, draws: int) -> int:
    """Bytes of the values that the passes hold at once: one layer of each, or the logits, as shown and as read on, in float64."""
    one = [stages.stage(key[0]) for key in stages.keys(flags, 1)]
    sizes = [math.prod(row.dims(hparams, tokens)) for row in one]
    layer = sum(size for row, size in zip(one, sizes, strict=True) if row.per_layer)
    return 2 * 8 * draws * max(layer, *sizes)


def plan(hparams: Mapping[str, int | float], flags: frozenset[str], tokens: int, starts: Sequence[int] = (), forced: bool = False) -> Plan:
    """How much of the closure of one side is done.

    Parameters
    ----------
    hparams, flags : mapping, frozenset
        The model's.
    tokens : int
        Of the prompt.
    starts : sequence of int
        Layers that the passes may begin with, because everything before was judged and the hidden state that enters them was captured.
    forced : bool
        All of it, whatever it costs.
    """
    most = wanted(tokens)

    def cost(draws: int, first: int = 0) -> tuple[int, int]:
        return (draws + PREDICTION) * products(hparams, flags, tokens, first), memory(hparams, flags, tokens, draws)

    whole = cost(most)
    for first in (0, *starts):
        for draws in range(most, LEAST - 1, -1):
            needed = cost(draws, first)
            if forced or (needed[0] <= PRODUCTS and needed[1] <= BYTES):
                return Plan(draws, first, *needed, reason=_less(draws, most, first, whole))
    return Plan(0, 0, *whole, reason=f"not run: would need {_said(whole)}; --closure to force")


def _less(draws: int, most: int, first: int, whole: tuple[int, int]) -> str:
    """Why it is not the whole."""
    cuts = [f"{draws} passes in place of {most}"] if draws < most else []
    cuts += [f"from layer {first} on, for all before was judged"] if first else []
    return f"{' and '.join(cuts)}: the whole would need {_said(whole)}; --closure to force" if cuts else ""


def _said(needed: tuple[int, int]) -> str:
    return f"{needed[0]:.1e} multiply-adds in float64 and {needed[1] / 2**30:.1f} GiB"
