"""History: what each piece of a run read from its cache, held against what the tokens before it had put there.

A local replay of attention takes the cache as it is given.  Here its rows must be the keys and values of all earlier tokens, slot by slot,
in every piece; and where a cache changed between the pieces, attention is replayed piece by piece, each with the cache that it read, so
that only the cache is accused.  Where a side does not show its cache, ``judge.replay`` makes it from the same history.

Owns which stages must be judged so (:func:`apart`) and the words for what a wrong slot holds instead (:func:`held`).  Refuses to judge by
itself: that is ``judge.local``, which calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from aprender import stages
from aprender.captures import Captures
from aprender.judge.replay import Replay
from aprender.judge.witness import Float
from aprender.stages import Key

NAMED = 3
"""Wrong slots that are told one by one."""


# ---- which stages, on which caches -----------------------------------------------------------------------------------------------------


def apart(captures: Captures, replay: Replay, again: Callable[[Captures], Replay]) -> dict[Key, list[Replay]]:
    """Stages that must be judged piece by piece, with the replay of each piece.

    Parameters
    ----------
    captures : Captures
        A sequence, perhaps the whole of several pieces.
    replay : Replay
        Of it.
    again : callable
        Makes the replay of one piece.

    Returns
    -------
    dict
        Empty where it was one piece, or where every piece read from its caches what the last one did: then the whole stands for each.
    """
    changed = {key for key in replay.wires if _is_cache(key) and not _steady(captures, key)}
    if not changed:
        return {}
    for key, sources in replay.wires.items():
        hit = [source.key for source in sources if source.key in changed]
        if hit and ({"J"} & set(stages.stage(key[0]).shape) or any(_is_keyed(k) or k not in captures for k in hit)):
            changed.add(key)
    replays = [again(piece) for piece in captures.pieces]
    return {key: replays for key in replay.wires if key in changed}


def _is_cache(key: Key) -> bool:
    return stages.stage(key[0]).shape[0] == "J"


def _is_keyed(key: Key) -> bool:
    """Whether a stage has an axis of keys: its rows depend on what was in the cache at the time."""
    return "J" in stages.stage(key[0]).shape


def _steady(captures: Captures, key: Key) -> bool:
    """Whether every piece read from a cache what the last one read there, bit for bit."""
    if key not in captures:
        return True
    final = np.ascontiguousarray(captures[key]).view(np.uint32)
    reads = (np.ascontiguousarray(piece[key]).view(np.uint32) for piece in captures.pieces if key in piece)
    return all(len(read) <= len(final) and np.array_equal(read, final[: len(read)]) for read in reads)


def piece_of(replay: Replay) -> str:
    """The tokens of a piece in words."""
    first, last = int(replay.sample.positions[0]), int(replay.sample.positions[-1])
    return f"position {first}" if first == last else f"positions {first} to {last}"


# ---- what a wrong slot holds -----------------------------------------------------------------------------------------------------------


def held(replay: Replay, captured: Float, due: Float) -> str:
    """What the wrong slots of a cache hold instead of the rows that they are due.

    Parameters
    ----------
    replay : Replay
        Of the run that read the cache.
    captured, due : array
        [J, Kd]: the cache as it was read, and the rows as their tokens put them there.
    """
    sample = replay.sample
    first = len(sample.keys) - len(captured)
    ids = (*sample.before, *sample.tokens)[-len(captured) :]
    slots = np.flatnonzero((captured != due).any(axis=1))
    where = [_same_row(captured[slot], due, int(slot)) for slot in slots]
    shifts = {None if other is None else int(other - slot) for slot, other in zip(slots, where, strict=True)}
    shift = shifts.pop() if len(shifts) == 1 and len(slots) > 1 else None
    if shift:
        way = f"{abs(shift)} {'later' if shift > 0 else 'earlier'}"
        return f"{len(slots)} slots from {first + slots[0]} to {first + slots[-1]} each hold what belongs to the position {way}"
    said = [
        f"slot {first + slot} (token {ids[slot]}) holds {_content(captured[slot], due, slot, other, first, ids)}"
        for slot, other in zip(slots[:NAMED], where, strict=False)
    ]
    more = f"; {len(slots) - NAMED} more slots are wrong" if len(slots) > NAMED else ""
    return "; ".join(said) + more


def _same_row(row: Float, rows: Float, slot: int) -> int | None:
    """The row that is bit for bit this one; of several (a token that comes again may have the same value) the nearest to its slot."""
    found = np.flatnonzero((rows == row).all(axis=1))
    return int(found[np.argmin(np.abs(found - slot))]) if len(found) else None


def _content(row: Float, due: Float, slot: int, other: int | None, first: int, ids: Sequence[int]) -> str:
    """What one wrong slot holds, in words."""
    if not row.any():
        return "zeros: nothing was written"
    if other is not None:
        return f"what belongs to slot {first + other} (token {ids[other]})"
    columns = np.flatnonzero(row != due[slot])
    with np.errstate(invalid="ignore", over="ignore"):
        size = float(np.linalg.norm(row - due[slot]) / max(float(np.linalg.norm(due[slot])), np.finfo(np.float64).tiny))
    some = "" if len(columns) == len(row) else f" in {len(columns)} of {len(row)} columns from {columns[0]}"
    return f"no row that this layer wrote{some} (relative L2 {size:.1e})"
