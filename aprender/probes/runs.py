"""Probes that judge the stages of another run: other lengths, pieces on one cache, padded batches, far positions, thousands of keys.

Owns these, and what each demands of a side: a method of the name that it asks for.  Refuses to hold a side to equal bits for every cutting
unless its arithmetic declares every bit.  Rows of the table in ``probes``.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from aprender import stages
from aprender.captures import Captures
from aprender.errors import CannotRun
from aprender.judge import witness
from aprender.probes.bench import AGREE, DIVERGENCE, Bench, Outcome, certain, healed, measured, outcome, same

PIECES = (13, 1, 11, 15)
"""Tokens of ragged pieces: odd, so that no piece fills a tile or begins where one does, and one of them a single token."""

SHORT, LONG, DECODED = 3, 128, 8
"""Tokens of a short and of a long sequence, and how many are decoded one by one."""

FAR = (0, 1, 8191, 131071)
"""Positions of the rotary table: where nothing is turned, the first that is, and the last ones of contexts of 8 k and 128 k."""

KEYS, END = 2048, 8
"""Keys in the cache before the tokens that are judged, and how many these are."""

PADDINGS, DECODED_TOGETHER = ("left", "right"), 2
"""Where a batch is padded, and how many tokens of all its rows are then decoded together."""


def _method(bench: Bench, name: str, lacking: str) -> Any:
    """What the side must be able to do; CannotRun with the reason where it is not."""
    if not hasattr(bench.side, name):
        raise CannotRun(lacking, code="PROBE")
    return getattr(bench.side, name)


# ---- lengths and pieces ----------------------------------------------------------------------------------------------------------------


def sequence(tokens: Callable[[int], int]) -> Callable[[str, Bench], Outcome]:
    """A probe that runs another number of tokens (a function of the prompt's) in one piece."""

    def run(probe: str, bench: Bench) -> Outcome:
        captures = bench.side.capture(bench.lengthened(tokens(len(bench.whole.tokens))))
        return outcome(probe, bench.judged(captures))

    return run


def pieces(tokens: Callable[[int], int], sizes: Callable[[int], list[int]]) -> Callable[[str, Bench], Outcome]:
    """A probe that runs a sequence in pieces: judged; and bit-equal to one piece, where the arithmetic declares every bit."""

    def run(probe: str, bench: Bench) -> Outcome:
        capture = _method(bench, "capture_pieces", "this side runs a sequence in one piece only")
        ids = bench.lengthened(tokens(len(bench.whole.tokens)))
        whole, cut = bench.captured(ids), capture(ids, sizes(len(ids)))
        key = None
        if bench.profile.order.lanes:
            key = next((key for key in cut if key in whole and not same(cut[key], whole[key])), None)
        unequal = None
        if key is not None:
            unequal = certain(key, "chunking", f"{stages.spell(key)} is not bit-equal to that of the same tokens in one piece")
        return outcome(probe, bench.judged(cut, whole), unequal, cut.manifest.attestation)

    return run


def decoded(tokens: int) -> list[int]:
    """A prompt and then single tokens."""
    single = min(DECODED, tokens - 1)
    return [tokens - single, *[1] * single]


def ragged(tokens: int) -> list[int]:
    """Uneven pieces, again and again."""
    out: list[int] = []
    for size in itertools.cycle(PIECES):
        if sum(out) + size >= tokens:
            return [*out, tokens - sum(out)]
        out.append(size)
    return out


# ---- padded batches --------------------------------------------------------------------------------------------------------------------


def padded(probe: str, bench: Bench) -> Outcome:
    """Three rows of unequal length in one batch, padded on the left, the last tokens decoded, then on the right; each judged by itself."""
    capture = _method(bench, "capture_batch", "this side runs one sequence at a time and has no batches")
    tokens = len(bench.whole.tokens)
    rows = [bench.lengthened(count, first) for first, count in enumerate((tokens + 5, max(1, tokens // 2), tokens))]
    lengths = [len(row) for row in rows]
    if len(set(lengths)) == 1:
        raise CannotRun("a context of one token has no rows of unequal length", code="PROBE")
    single = min(DECODED_TOGETHER, min(lengths) - 1)
    found = [
        (padding, at, outcome(probe, bench.judged(row), attested=row.manifest.attestation))
        for padding, count in zip(PADDINGS, (single, 0), strict=True)  # decoding goes on behind the last token: no padding may be there
        for at, row in enumerate(capture(rows, padding, count))
    ]
    wrong = [(padding, at, one) for padding, at, one in found if one.state == DIVERGENCE]
    shape = f"rows of {', '.join(map(str, lengths))} tokens"
    if wrong:
        padding, at, first = wrong[0]
        where = "; ".join(f"padded {side}: {_several([k for p, k, _ in wrong if p == side])}" for side in PADDINGS)
        text = f"row {at} ({lengths[at]} tokens) of a batch padded on the {padding}: {first.text} Of {shape}, wrong are: {where}."
        return dataclasses.replace(first, text=text)
    if all(one.state != AGREE for _, _, one in found):
        return found[0][2]
    count = sum(measured(one.judged) for _, _, one in found if one.judged is not None)
    gauge = "".join(f"; row {at}, padded {side}{healed(one.judged)}" for side, at, one in found if one.judged and healed(one.judged))
    return Outcome(probe, AGREE, f"{shape}, padded left and right: {count} stages are right{gauge}", tokens=rows[0])


def _several(rows: list[int]) -> str:
    return ("row " if len(rows) == 1 else "rows ") + ", ".join(map(str, rows)) if rows else "none"


# ---- far positions, and thousands of keys ----------------------------------------------------------------------------------------------


def far(probe: str, bench: Bench) -> Outcome:
    """The rotary table at chosen positions, near and far.  How far its angles are from exact ones is told, and accuses nobody."""
    table: Captures = _method(bench, "rotary_table", "this side does not show its rotary table at chosen positions")(FAR)
    found = outcome(probe, bench.judged(table))
    where = ", ".join(map(str, FAR))
    text = f"the rotary table is right at positions {where}" if found.state == AGREE else f"at positions {where}: {found.text}"
    (value,) = (table[key] for key in table)
    return dataclasses.replace(found, text=f"{text}; {_angles(value, bench)}", tokens=(), judged=None)


def _angles(table: Any, bench: Bench) -> str:
    """The largest angle between a table's rotations and the exact ones, in words."""
    exact = witness.rope_table(FAR, float(bench.hparams["theta"]), int(bench.hparams["head"]))
    (cos, sin), (right_cos, right_sin) = np.hsplit(np.asarray(table, np.float64), 2), np.hsplit(exact, 2)
    angle = np.abs(np.arctan2(sin * right_cos - cos * right_sin, cos * right_cos + sin * right_sin)).max(axis=1)
    at = int(np.argmax(angle))
    return f"its angles are up to {angle[at]:.1e} rad from exact ones (position {FAR[at]})"


def cached_keys(probe: str, bench: Bench) -> Outcome:
    """The last tokens of a long sequence, on a cache of thousands of keys, which is held against the tokens that filled it."""
    capture = _method(bench, "capture_end", "this side cannot show the end of a sequence alone")
    due = max(KEYS + END, len(bench.whole.tokens))
    ids = bench.lengthened(due)
    if len(ids) < due:
        raise CannotRun(f"the context of the model is {len(ids)} tokens, {due} are needed", code="PROBE")
    captures = capture(ids, END)
    found = outcome(probe, bench.judged(captures), attested=captures.manifest.attestation)
    if found.state != AGREE:
        return found
    return dataclasses.replace(found, text=f"{found.text}, on a cache of {len(ids)} keys")
