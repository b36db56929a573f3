"""A folder of captures as a side: it can be compared and judged, but it cannot run.

Owns the choice of arithmetic for a recording (its manifest names it) and the refusals of a side that is a record: other ids, generation.
Called by ``sides.open_side``, ``asking`` and ``bisection``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from aprender import arithmetic
from aprender.captures import Captures, open_captures
from aprender.errors import ArgumentError, CannotRun, NotComparable
from aprender.sides.base import Progress
from aprender.stages import Selection
from aprender.text import Tokenizer


class SavedSide:
    """Recorded stages.

    Parameters
    ----------
    folder : str or Path
        Written by ``trace``, ``oracle`` or :func:`aprender.captures.save`.
    spelling : str, optional
        How the user wrote it.

    Raises
    ------
    FormatError
        Not a capture.
    ArgumentError
        The manifest names no arithmetic profile.
    UnknownName
        It names one that this version does not know.
    """

    def __init__(self, folder: str | os.PathLike[str], spelling: str | None = None) -> None:
        self.path = Path(folder)
        self.captures = open_captures(self.path)
        self.spelling = spelling or f"saved:{self.path.name}"
        name = self.captures.manifest.profile
        if name is None:
            raise ArgumentError(f"{self.path}: the manifest names no arithmetic", code="MISSING", path=str(self.path), field="profile")
        self.profile = arithmetic.profile(name).with_order(self.captures.manifest.arithmetic)

    def capture(self, ids: Sequence[int], keep: Selection | None = None, progress: Progress | None = None) -> Captures:
        """The recorded captures, if they are of just these ids.

        Raises
        ------
        NotComparable
            Other ids were recorded; the first place that differs is named.
        """
        have = self.captures.tokens
        if tuple(ids) != have:
            at = next((i for i, (a, b) in enumerate(zip(ids, have, strict=False)) if a != b), min(len(ids), len(have)))
            held, asked = (str(s[at]) if at < len(s) else "the end" for s in (have, ids))
            text = f"at place {at} {held}, asked for {asked} ({len(have)} and {len(ids)} tokens)"
            raise NotComparable(f"{self.spelling} recorded other token ids: {text}", code="TOKENS", field="tokens")
        if keep is None:
            return self.captures
        kept = {key: self.captures[key] for key in self.captures if keep(key)}
        notes = {key: self.captures.manifest.tensors[key] for key in kept}
        return Captures(kept, replace(self.captures.manifest, tensors=notes))

    def model_data(self) -> dict[str, Any] | None:
        """None: a recording holds no weights."""
        return None

    def tokenizer(self) -> Tokenizer | None:
        """None: a recording holds ids."""
        return None

    def generate(self, ids: Sequence[int], n: int, on_token: Callable[[int], None] | None = None) -> list[int]:
        """Always raises :class:`CannotRun`."""
        raise CannotRun(f"{self.spelling} is a recording and cannot generate", code="SAVED")

    def close(self) -> None:
        """Nothing is open."""
