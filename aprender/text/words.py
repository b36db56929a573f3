"""What a pre-tokenizer's name means: rows, one per name of GGUF's ``tokenizer.ggml.pre``, and nothing else.

Owns :data:`PRE_TOKENIZERS`, in the spelling that the model's own tokenizer.json uses, so that a name and a tokenizer.json can be told to
be the same.  Refuses names by their absence: a nearly right pattern would split some texts wrongly and nobody would see.  Called by the
other modules of this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
"""Kinds of vocabulary, as ``tokenizer.ggml.model`` names them: byte-level BPE, and SentencePiece's BPE with bytes for the rest."""


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """What a GGUF means by ``tokenizer.ggml.pre``.

    Attributes
    ----------
    steps : tuple of object
        One after the other, each within the words of the one before: a pattern whose matches are words of their own, or a part of the
        tokenizers library as tokenizer.json spells it.  What is left at the end is turned into bytes.
    nfc : bool
        Text is brought into Unicode normal form C first.
    ignore_merges : bool
        A word that is a token is taken whole, without asking the merges.
    begins : bool
        A begin-of-text token is added if the file does not say whether.
    """

    steps: tuple[str | Json, ...]
    nfc: bool = False
    ignore_merges: bool = False
    begins: bool = False

    def normalizer(self) -> Json | None:
        """The normalizer as tokenizer.json spells it."""
        return {"type": "NFC"} if self.nfc else None

    def words(self) -> Json:
        """The pre-tokenizer as tokenizer.json spells it."""
        parts = [_split(step) if isinstance(step, str) else dict(step) for step in self.steps]
        if not any(part["type"] == "ByteLevel" for part in parts):
            parts.append(_bytes(use_regex=False))
        return parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts}


def _split(pattern: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _bytes(use_regex: bool) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


GPT2 = _bytes(use_regex=True)
"""GPT-2's own words, which the library has built in, and bytes."""

DIGIT: Json = {"type": "Digits", "individual_digits": True}
"""Every digit is a word."""

# The words of GPT-4's tokenizer, of which the families differ in how many digits go together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ONE_DIGIT, THREE_DIGITS = _WORDS.replace("DIGITS", ""), _WORDS.replace("DIGITS", "{1,3}")

_LLAMA3 = PreTokenizer((THREE_DIGITS,), ignore_merges=True, begins=True)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "qwen2": PreTokenizer((ONE_DIGIT,), nfc=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "gpt-2": PreTokenizer((GPT2,)),
}
"""Names of ``tokenizer.ggml.pre`` whose meaning is known for certain."""
