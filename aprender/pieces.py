"""A sequence that was run in pieces on one cache: the pieces as one capture, and what came before a piece.

Owns the joining of arrays along the tokens and :func:`whole`.  What joining loses is kept: each piece's caches as that piece read them, for
a cache that was right at the end may have been wrong in between.  Refuses pieces that do not follow one another.  Called by the sides that
can run a sequence in pieces; ``judge.history`` reads what is kept.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from aprender import stages
from aprender.captures import Array, Captures
from aprender.errors import ArgumentError
from aprender.manifest import Manifest, TensorNote
from aprender.stages import Key, Stage


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens that one forward pass computed.

    Attributes
    ----------
    first, last : int
        Place of its first token in the sequence, and of the first one that is not in it any more.
    arrays : mapping
        (stage, layer) to an array: rows of these tokens; scores, probabilities and caches with all keys so far.
    """

    first: int
    last: int
    arrays: Mapping[Key, Array]


def cached(flags: frozenset[str], layers: int) -> list[Key]:
    """The stages of a model that its keys and values are made from: whatever writes what a cache reads, each with the rows of a token."""
    read = {row.a for row in stages.STAGES if row.shape[0] == "J"}
    return [key for key in stages.keys(flags, layers) if stages.by_name[key[0]].out in {*read, "QKV"}]


def joined(parts: Sequence[Array], row: Stage, keys: int) -> Array:
    """Pieces of one stage as one: along the tokens, scores filled up with 0 to the last key; caches are those after the last piece."""
    if "T" not in row.shape:
        return parts[-1]
    if "J" in row.shape:
        parts = [np.pad(part, ((0, 0), (0, 0), (0, keys - part.shape[2]))) for part in parts]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=row.shape.index("T"))


def cuts(sizes: Sequence[int], tokens: int) -> list[tuple[int, int]]:
    """First and last (exclusive) token of each piece.

    Raises
    ------
    ArgumentError
        The sizes do not cut up so many tokens.
    """
    if sum(sizes) != tokens or min(sizes, default=0) < 1:
        raise ArgumentError(f"pieces of {list(sizes)} tokens do not cut up {tokens} tokens", code="ARGUMENT", field="sizes")
    return list(itertools.pairwise([0, *itertools.accumulate(sizes)]))


def whole(pieces: Sequence[Piece], manifest: Manifest) -> Captures:
    """One capture of all pieces; of several, each is kept as a capture too, with those before it as its past.

    Parameters
    ----------
    pieces : sequence of Piece
        From the first token on; all have the stages of the last.
    manifest : Manifest
        Of the whole sequence.  The notes of its tensors may be left out.
    """
    keys = len(manifest.tokens)
    every = {key: joined([piece.arrays[key] for piece in pieces], stages.by_name[key[0]], keys) for key in pieces[-1].arrays}
    said = {key: _note(manifest.tensors[key], array) for key, array in every.items() if key in manifest.tensors}
    manifest = dataclasses.replace(manifest, tensors=said)
    if len(pieces) == 1:
        return Captures(every, manifest)
    kept: list[Captures] = []
    for piece in pieces:
        rows = {key: _rows(array, piece, key) for key, array in every.items()}
        kept.append(_capture(dataclasses.replace(piece, arrays=rows), manifest, tuple(kept)))
    return Captures(every, manifest, pieces=tuple(kept))


def ending(pieces: Sequence[Piece], manifest: Manifest) -> Captures:
    """The last piece alone, with those before it as its past: of these a few stages are enough (what the caches are made from).

    Parameters
    ----------
    pieces : sequence of Piece
    manifest : Manifest
        Of the whole sequence.
    """
    past: list[Captures] = []
    for piece in pieces[:-1]:
        past.append(_capture(piece, manifest, tuple(past)))
    return _capture(pieces[-1], manifest, tuple(past))


def part(array: Array, key: Key, first: int, last: int) -> Array:
    """What a piece sees of a stage of the whole: the rows of its tokens, and the keys up to its last; a view."""
    cut = {"T": slice(first, last), "J": slice(last)}
    return array[tuple(cut.get(name, slice(None)) for name in stages.by_name[key[0]].shape)]


def _rows(array: Array, piece: Piece, key: Key) -> Array:
    """A piece's part of a joined array; its cache as it was, copied: the block that it lies in holds the other stages too."""
    return part(array, key, piece.first, piece.last) if "T" in stages.by_name[key[0]].shape else np.array(piece.arrays[key])


def _capture(piece: Piece, manifest: Manifest, past: tuple[Captures, ...]) -> Captures:
    """One piece with its part of the manifest."""
    notes = {key: _note(manifest.tensors[key], array) for key, array in piece.arrays.items() if key in manifest.tensors}
    positions = manifest.positions or tuple(range(len(manifest.tokens)))
    cut = slice(piece.first, piece.last)
    own = dataclasses.replace(manifest, tokens=manifest.tokens[cut], positions=positions[cut], attestation=None, tensors=notes)
    return Captures(piece.arrays, own, past=past)


def _note(note: TensorNote, array: Array) -> TensorNote:
    """The note of the whole, with the shape and the counts of a part."""
    counted = TensorNote.of(array)
    return dataclasses.replace(note, shape=counted.shape, nonfinite=counted.nonfinite, sha256=None)
