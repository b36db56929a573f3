"""What the sides are asked: a text or token ids, and whether both sides cut it alike.

Owns :class:`Ask`, its way to the ids of each side, and the sentence for ids that differ.  Refuses an empty prompt, and a text for a side
that has no tokenizer.  Called by ``bisection``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aprender.errors import ArgumentError, CannotRun
from aprender.sides.saved import SavedSide
from aprender.text.chat import chat_ids

PROMPT = "What is 2+2?"
"""What is asked when nobody says: the prompt of the embedded model's recorded stages."""


@dataclass(frozen=True)
class Ask:
    """What the sides are to be run on: ids, or a text, as it is or as a user's message in each side's own chat template."""

    prompt: str | None = None
    ids: tuple[int, ...] | None = None
    same_ids: bool = False
    chat: bool = False


def _encode(side: Any, prompt: str, chat: bool = False) -> tuple[int, ...] | None:
    """Ids of a text by the side's own tokenizer; of a saved side only if it is the text that was recorded."""
    if isinstance(side, SavedSide):
        return side.captures.tokens if side.captures.manifest.prompt == prompt else None
    tokenizer = side.tokenizer()
    if tokenizer is None:
        return None
    return tuple(chat_ids(tokenizer, prompt) if chat else tokenizer.encode(prompt))


def resolve(subject: Any, reference: Any, ask: Ask) -> tuple[tuple[int, ...], tuple[int, ...], str | None]:
    """Ids for the subject, ids for the reference, and the text if there is one."""
    if ask.ids is not None:
        return ask.ids, ask.ids, None
    saved = next((side.captures for side in (reference, subject) if isinstance(side, SavedSide)), None)
    prompt = ask.prompt
    if prompt is None and saved is not None:
        prompt = saved.manifest.prompt
        if prompt is None or not isinstance(subject, SavedSide):
            return saved.tokens, saved.tokens, prompt
    prompt = PROMPT if prompt is None else prompt
    if not prompt:
        raise ArgumentError("the prompt is empty: a forward pass needs at least one token", code="ARGUMENT", field="prompt")
    own = _encode(subject, prompt, ask.chat)
    other = _encode(reference, prompt, ask.chat) if reference is not None else None
    if own is None:
        if other is None or not ask.same_ids:
            raise CannotRun(
                f"{subject.spelling} has no tokenizer for a text: give --prompt-ids, or --same-ids for the reference's", code="TOKENIZER"
            )
        own = other
    return own, (own if other is None else other), prompt


def tokens_differ(subject: Any, reference: Any, own: Sequence[int], other: Sequence[int]) -> str:
    """The sentence for sides that cut one text into different tokens."""
    at = next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), min(len(own), len(other)))

    def piece(side: Any, ids: Sequence[int]) -> str:
        if at >= len(ids):
            return "nothing"
        tokenizer = side.tokenizer() if not isinstance(side, SavedSide) else None
        return f"{ids[at]} {tokenizer.id_to_piece(ids[at])!r}" if tokenizer else str(ids[at])

    return (
        f"The sides cut the same text into different tokens: at position {at} the subject has {piece(subject, own)}, the reference "
        f"{piece(reference, other)} ({len(own)} and {len(other)} tokens). Nothing after that is comparable; --same-ids forces the"
        " reference's ids."
    )
