"""Other ways to run a Hugging Face model than one sequence in one go: in pieces on one cache, a long one's end, a padded batch, its table.

Owns these runs, each with the hooks of ``sides.hf_record``, the model's own code and transformers' own cache.  Rows of a batch are cut out
of it, padding dropped, as captures of one sequence each.  Declares no order of accumulation: a library takes other kernels for one token
than for many, so that its order is known for whole prompts only.  Called by ``sides.hf``, whose methods these are.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from aprender import stages
from aprender.captures import Captures
from aprender.errors import ArgumentError
from aprender.manifest import DERIVED, Manifest, TensorNote
from aprender.pieces import Piece, cached, cuts, ending, whole
from aprender.sides.base import checked_ids
from aprender.sides.hf_record import Recorder, Site, same_bits
from aprender.stages import Key

if TYPE_CHECKING:
    from aprender.sides.hf import HFSide

TABLE: Key = ("rope_table", None)

PADDINGS = ("left", "right")


# ---- pieces ----------------------------------------------------------------------------------------------------------------------------


def capture_pieces(side: HFSide, ids: Sequence[int], sizes: Sequence[int]) -> Captures:
    """Run the ids in pieces of the given sizes on one cache, and hand out all stages as one sequence, with the pieces kept."""
    ids = checked_ids(ids, int(side.hparams["vocab"]))
    parts, every = cuts(sizes, len(ids)), side.keys()
    pieces, notes, hooked = _traced(side, ids, parts, [every] * len(parts))
    return whole(pieces, _manifest(side, ids, notes, _attested(side, ids, parts, hooked)))


def capture_end(side: HFSide, ids: Sequence[int], count: int) -> Captures:
    """All stages of the last ``count`` ids, run on the cache of those before; of these, what their keys and values are made from."""
    ids = checked_ids(ids, int(side.hparams["vocab"]))
    parts = cuts([len(ids) - count, count], len(ids))
    pieces, notes, hooked = _traced(side, ids, parts, [cached(side.flags, int(side.hparams["layers"])), side.keys()])
    return ending(pieces, _manifest(side, ids, notes, _attested(side, ids, parts, hooked)))


def _traced(
    side: HFSide, ids: tuple[int, ...], parts: Iterable[tuple[int, int]], wanted: Iterable[Sequence[Key]]
) -> tuple[list[Piece], dict[Key, TensorNote], list[torch.Tensor]]:
    """The pieces with the stages that are wanted of each, the notes of the last, and the logits."""
    pieces: list[Piece] = []
    notes: dict[Key, TensorNote] = {}
    logits: list[torch.Tensor] = []
    past: Any = None
    for (first, last), keys in zip(parts, wanted, strict=True):
        recorder = Recorder(side.model, frozenset(keys), side.flags)
        with side._traced(), recorder:
            found, past = side._forward(ids[first:last], past)
        arrays, made = side._arrays(recorder, keys, last - first, last)
        derived = {key for key, note in notes.items() if note.origin == DERIVED}
        notes |= {key: dataclasses.replace(note, origin=DERIVED) if key in derived else note for key, note in made.items()}
        pieces.append(Piece(first, last, arrays))
        logits.append(found)
    return pieces, notes, logits


def _attested(side: HFSide, ids: tuple[int, ...], parts: Iterable[tuple[int, int]], hooked: Iterable[torch.Tensor]) -> bool:
    """Whether the same pieces without hooks give the same logits, bit for bit."""
    past: Any = None
    same = True
    for (first, last), traced in zip(parts, hooked, strict=True):
        plain, past = side._forward(ids[first:last], past)
        same = same and same_bits(traced, plain)
    return same


def _manifest(side: HFSide, ids: tuple[int, ...], notes: dict[Key, TensorNote], attested: bool | None) -> Manifest:
    """The side's manifest with the order of accumulation left open."""
    return side._manifest(ids, notes, attested, {"matmul": "envelope"})


# ---- the RoPE table --------------------------------------------------------------------------------------------------------------------


def rotary_table(side: HFSide, positions: Sequence[int]) -> Captures:
    """What the model's rotary module gives for any positions: a capture of that one stage."""
    recorder = Recorder(side.model, frozenset([TABLE]), side.flags)
    rotary = recorder.module(Site.parse(stages.by_name[TABLE[0]].hf, None).where[0])
    with recorder, torch.inference_mode():
        rotary(torch.zeros(1, 1, dtype=side.model.dtype), torch.tensor([list(positions)]))
    arrays, notes = side._arrays(recorder, [TABLE], len(positions))
    made = _manifest(side, (0,) * len(positions), notes, None)
    return Captures(arrays, dataclasses.replace(made, positions=tuple(positions)))


# ---- padded batches --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class RowRecorder(Recorder):
    """Records one row of a batch without its padding: what a run of that row alone would show.

    Attributes
    ----------
    row : int
    own, seen : slice
        Where the row's tokens lie among those of this pass, and where all its tokens so far lie in the cache.
    """

    row: int = 0
    own: slice = dataclasses.field(default_factory=lambda: slice(None))
    seen: slice = dataclasses.field(default_factory=lambda: slice(None))

    def _cut(self, value: Any, *axes: slice) -> Any:
        """The row of a tensor [B, ...], or of each of a tuple, cut along the axes that follow; what all rows share has B = 1."""
        if isinstance(value, tuple):
            return tuple(self._cut(part, *axes) for part in value)
        if not isinstance(value, torch.Tensor) or value.dim() <= len(axes):
            return value
        at = min(self.row, len(value) - 1)
        return value[(slice(at, at + 1), *axes)]

    def after(self, path: str, then: Callable[[tuple[Any, ...], Any], None]) -> None:
        """As :meth:`Recorder.after`, with this row's part of inputs and output."""
        super().after(path, lambda args, output: then(self._cut(args, self.own), self._cut(output, self.own)))

    def before(self, path: str, then: Callable[[tuple[Any, ...]], None]) -> None:
        """As :meth:`Recorder.before`, with this row's part of the inputs."""
        super().before(path, lambda args: then(self._cut(args, self.own)))

    def part(self, shown: Sequence[Any]) -> list[Any]:
        """The part of this row of queries [B, heads, T, h], keys and values [B, heads, J, h], and what follows, [B, heads, T, J]."""
        heads = slice(None)
        inputs = [self._cut(one, heads, cut) for one, cut in zip(shown[:3], (self.own, self.seen, self.seen), strict=True)]
        return inputs + [self._cut(one, heads, self.own, self.seen) for one in shown[3:]]


class BatchRecorder(Recorder):
    """Stands for the recorders of all rows while the batch runs: the attention function knows one recorder."""

    def __init__(self, rows: Sequence[RowRecorder]) -> None:
        super().__init__(rows[0].model, frozenset(), rows[0].flags)
        self.rows = rows
        self._entered = contextlib.ExitStack()

    def __enter__(self) -> BatchRecorder:
        for row in self.rows:
            self._entered.enter_context(row)
        super().__enter__()  # last, so that attention comes here
        return self

    def __exit__(self, *problem: object) -> None:
        super().__exit__(*problem)
        self._entered.close()

    def attention(self, layer: int, *shown: Any) -> None:
        """Show each row its part of what passed through the attention function."""
        for row in self.rows:
            row.attention(layer, *row.part(shown))

    def entered(self, layer: int, *shown: Any) -> None:
        """Show each row its part of what the attention function was given."""
        for row in self.rows:
            row.entered(layer, *row.part(shown))


def capture_batch(side: HFSide, rows: Sequence[Sequence[int]], padding: str, single: int = 0) -> tuple[Captures, ...]:
    """Run sequences of unequal length as one padded batch, and hand out each by itself, its padding dropped.

    The mask and the positions are those that ``generate`` gives a batch: padding is masked, and a row's first token is at position 0.

    Parameters
    ----------
    rows : sequence of sequences of int
    padding : str
        ``left`` or ``right``.
    single : int
        So many last tokens of each row are run one by one, on the cache of the batch; only where the padding is on the left.
    """
    if padding not in PADDINGS:
        raise ArgumentError(f"padding '{padding}': {' or '.join(PADDINGS)} is needed", code="ARGUMENT", field="padding")
    ids = [checked_ids(row, int(side.hparams["vocab"])) for row in rows]
    if single < 0 or single >= min(map(len, ids)) or (single and padding != PADDINGS[0]):
        raise ArgumentError(
            f"{single} single tokens: fewer than the shortest row has, and padding on the left", code="ARGUMENT", field="single"
        )
    width = max(map(len, ids))
    starts = [width - len(row) if padding == PADDINGS[0] else 0 for row in ids]
    filled = torch.zeros(len(ids), width, dtype=torch.long)
    mask = torch.zeros_like(filled)
    for at, (row, start) in enumerate(zip(ids, starts, strict=True)):
        filled[at, start : start + len(row)] = torch.tensor(row)
        mask[at, start : start + len(row)] = 1
    parts = cuts([width - single, *[1] * single], width)
    pieces, notes, hooked = _batch_traced(side, ids, starts, filled, mask, parts)
    attested = all(same_bits(traced, plain) for traced, plain in zip(hooked, _batch(side, filled, mask, parts), strict=True))
    return tuple(whole(own, _manifest(side, row, said, attested)) for row, own, said in zip(ids, pieces, notes, strict=True))


def _batch_traced(
    side: HFSide,
    ids: Sequence[tuple[int, ...]],
    starts: Sequence[int],
    filled: torch.Tensor,
    mask: torch.Tensor,
    parts: Sequence[tuple[int, int]],
) -> tuple[list[list[Piece]], list[dict[Key, TensorNote]], list[torch.Tensor]]:
    """The pieces and the notes of each row, and the logits of each piece."""
    every, logits, past = side.keys(), [], None
    pieces: list[list[Piece]] = [[] for _ in ids]
    notes: list[dict[Key, TensorNote]] = [{} for _ in ids]
    for first, last in parts:
        recorders = []
        for at, (row, start) in enumerate(zip(ids, starts, strict=True)):
            begin, end = max(start, first), min(start + len(row), last)
            own, seen = slice(begin - first, end - first), slice(start, end)
            recorders.append(RowRecorder(side.model, frozenset(every), side.flags, row=at, own=own, seen=seen))
        with side._traced(), BatchRecorder(recorders):
            found, past = _batch_step(side, filled, mask, first, last, past)
        logits.append(found)
        for at, recorder in enumerate(recorders):
            tokens, held = recorder.own.stop - recorder.own.start, recorder.seen.stop - recorder.seen.start
            arrays, notes[at] = side._arrays(recorder, every, tokens, held)
            pieces[at].append(Piece(held - tokens, held, arrays))
    return pieces, notes, logits


def _batch(side: HFSide, filled: torch.Tensor, mask: torch.Tensor, parts: Iterable[tuple[int, int]]) -> list[torch.Tensor]:
    """Logits [B, T, V] of each piece, without hooks."""
    out, past = [], None
    for first, last in parts:
        found, past = _batch_step(side, filled, mask, first, last, past)
        out.append(found)
    return out


def _batch_step(side: HFSide, filled: torch.Tensor, mask: torch.Tensor, first: int, last: int, past: Any) -> tuple[torch.Tensor, Any]:
    """One pass over some columns of a batch: logits and the cache."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, first:last]
    with torch.inference_mode():
        made = side.model(
            input_ids=filled[:, first:last], attention_mask=mask[:, :last], position_ids=positions, past_key_values=past, use_cache=True
        )
    return made.logits, made.past_key_values
