"""SentencePiece's BPE from a list of tokens with scores, as GGUF's ``tokenizer.ggml.model = "llama"`` holds it.

Owns the merges that follow from the scores, the byte tokens, and what becomes of blanks.  Two neighbours merge if together they are a
token, the token of the highest score first, the leftmost first where it is there twice; a character that is no token becomes its bytes.
The library merges by a list of pairs instead, which is the same as long as no two tokens that can be merged have equal scores: such
vocabularies are refused.  (A token such as ``aba`` can be made of ``ab a`` and of ``a ba``.  Where both ways offer themselves in places
that overlap, the library would take the shorter left part first, not the leftmost; no vocabulary and text are known in which they do, and
the tests look for one.)  Called by ``backend`` and ``convert``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from aprender.text.keys import Keys
from aprender.text.words import Json

BLANK = "\u2581"
"""What stands for a blank in the tokens."""

BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
LONGEST = 4096
"""Characters in a token; every way to cut one in two is looked up."""

MOST_CUTS = 1 << 28
"""Squares of the lengths of all tokens together; 262 000 tokens of a known model make 2^24."""


def normalizer(prefix: bool) -> Json:
    """Blanks as the tokens have them, one more in front of each piece of text between special tokens if there is a prefix."""
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    return {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": BLANK}, blanks]} if prefix else blanks


def decoder(prefix: bool) -> Json:
    """The way back; the blank in front of the whole text is taken away again."""
    steps: list[Json] = [{"type": "Replace", "pattern": {"String": BLANK}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    return {"type": "Sequence", "decoders": [*steps, *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else [])]}


def cuts(token: str, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to make a token of two, the shortest left part first."""
    pairs = ((token[:at], token[at:]) for at in range(1, len(token)))
    return [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]


def merges(keys: Keys, tokens: Sequence[str], scores: Sequence[float], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """The pairs that may merge, the first to be merged first.

    Raises
    ------
    FormatError
        A score that is no number, or one that two tokens have that can be merged: their order would be anybody's guess.  Tokens that
        are too long.
    """
    for token, score in zip(tokens, scores, strict=True):
        if not math.isfinite(score):
            raise keys.refusal("scores", f"{token[:64]!r} has the score {score}", "TOKENIZER")
        if len(token) > LONGEST:
            raise keys.refusal("tokens", f"{token[:64]!r}… has {len(token)} characters; {LONGEST} are read", "LIMIT")
    if sum(len(token) ** 2 for token in tokens) > MOST_CUTS:
        raise keys.refusal("tokens", f"{len(tokens)} tokens with {sum(map(len, tokens))} characters: too many ways to cut them", "LIMIT")
    found: list[tuple[str, str]] = []
    last: tuple[float, str] | None = None
    for token in sorted(vocabulary, key=lambda token: (-scores[vocabulary[token]], vocabulary[token])):
        pairs = cuts(token, vocabulary)
        if not pairs:
            continue
        score = scores[vocabulary[token]]
        if last is not None and last[0] == score:
            raise keys.refusal("scores", f"{last[1][:64]!r} and {token[:64]!r} share the score {score}: which goes first?", "UNSUPPORTED")
        last = score, token
        found += pairs
    return found


def check_bytes(keys: Keys, byte_tokens: Iterable[str], vocabulary: Mapping[str, int]) -> None:
    """Refuse byte tokens that are none, and a vocabulary without all 256: a text could not be said then."""
    for token in byte_tokens:
        if token not in BYTES:
            raise keys.refusal("tokens", f"{token[:64]!r} is called a byte and is none of <0x00> to <0xFF>", "TOKENIZER")
    missing = [token for token in BYTES if token not in vocabulary]
    if missing:
        raise keys.refusal("tokens", f"{len(missing)} of the 256 byte tokens are missing, {missing[0]} first", "TOKENIZER")


def scores_of(pairs: Iterable[Sequence[str]], tokens: Sequence[str]) -> list[float]:
    """Scores from which :func:`merges` makes the pairs again: what merges first has the highest, what never merges the lowest."""
    rank: dict[str, int] = {}
    for left, right in pairs:
        rank.setdefault(left + right, len(rank))
    for token in tokens:
        rank.setdefault(token, len(rank))
    return [-1.0 - rank[token] for token in tokens]
