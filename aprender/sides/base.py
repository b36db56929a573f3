"""What every side can do: the one interface that bisection, probes and commands use.

Owns the protocol :class:`Side` and the check of token ids that all foreign sides share.  Refuses to know any engine.  Called by every
module of this package (which implement it) and by everything above (which use it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aprender.arithmetic import Profile
from aprender.captures import Captures
from aprender.errors import ArgumentError
from aprender.stages import Selection
from aprender.text import Tokenizer

Progress = Callable[[float], None]
"""Told the share that is done, 0 … 1."""

Weights = Mapping[tuple[str, int | None], NDArray[np.float32]]
"""(row of ``weights.def``, layer or None) to the array [out, in] that the side multiplies with, after its own cast."""


class Side(Protocol):
    """Anything that can produce captures.

    Attributes
    ----------
    spelling : str
        How the user names it on a command line.
    profile : Profile
        The arithmetic that it declares.
    """

    spelling: str
    profile: Profile

    def capture(self, ids: Sequence[int], keep: Selection | None = None, progress: Progress | None = None) -> Captures:
        """Run a sequence from position 0 and keep the selected stages; all of them if ``keep`` is None."""

    def model_data(self) -> dict[str, Any] | None:
        """The model as the side holds it, for the witness; None where the side cannot show it.

        ``arch``, ``flags``, ``hparams`` (``layers dim ffn heads kv_heads head vocab context eps theta``) and ``weights`` (:data:`Weights`,
        Hugging Face lane order; ``output`` of a tied model is the token table).  A side that runs a file also gives ``stored``: the number
        format and the bytes of each matrix.
        """

    def generate(self, ids: Sequence[int], n: int, on_token: Callable[[int], None] | None = None) -> list[int]:
        """Greedy continuation: at most ``n`` ids, ended before an id that ends the text."""

    def tokenizer(self) -> Tokenizer | None:
        """The container's own tokenizer; None where it has none."""

    def close(self) -> None:
        """Give memory back; the side is not used again."""


def checked_ids(ids: Sequence[int], vocab: int) -> tuple[int, ...]:
    """The ids as plain integers.

    Raises
    ------
    ArgumentError
        None at all, or one outside 0 … vocab - 1.
    """
    if not ids:
        raise ArgumentError("the prompt is empty: a forward pass needs at least one token", code="ARGUMENT", field="prompt")
    for place, token in enumerate(ids):
        if not 0 <= token < vocab:
            raise ArgumentError(f"token id {token} at place {place} is not in 0 … {vocab - 1}", code="ARGUMENT", field="prompt-ids")
    return tuple(int(token) for token in ids)
