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
    nfc : bool or None
        Text is brought into Unicode normal form C first.  None where the name does not settle it: a text that is not in that form is
        refused then, any other has the same ids either way.
    ignore_merges : bool
        A word that is a token is taken whole, without asking the merges.
    begins : bool
        A begin-of-text token is added if the file does not say whether.
    """

    steps: tuple[str | Json, ...]
    nfc: bool | None = False
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

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The same words as a pattern, for steps that follow before the bytes."""

DIGIT: Json = {"type": "Digits", "individual_digits": True}
"""Every digit is a word."""

PUNCTUATION: Json = {"type": "Punctuation", "behavior": "Contiguous"}
"""A run of punctuation is a word."""

# The words of GPT-4's tokenizer, of which the families differ in how many digits go together and in what belongs to a letter.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?LETTER+|\p{N}DIGITS| ?[^\s\p{L}OTHER\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _words(digits: str, letter: str = r"\p{L}", other: str = "") -> str:
    return _WORDS.replace("DIGITS", digits).replace("LETTER", letter).replace("OTHER", other)


ONE_DIGIT, THREE_DIGITS = _words(""), _words("{1,3}")

# The words of GPT-4o's tokenizer: capitals, then small letters; TAIL is what an apostrophe begins.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+TAIL|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*TAIL|\p{{N}}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = _CASES.replace("TAIL", "").replace("DIGITS", "")
GPT4O = _CASES.replace("TAIL", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("DIGITS", "{1,3}")

# DeepSeek's; the letters are those with two cases, of Unicode 13.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d"
    "\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5"
    "\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3"
    "\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d"
    "\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
_CHINESE = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_FULL_WIDTH = r"\s?[!-/:-~" "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_DEEPSEEK_LLM = ("[\r\n]", rf"\s?[{_CASED}]+", _FULL_WIDTH, r"\s+$", _CHINESE, DIGIT)
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE, DIGIT)
_ENDS = "[\r\n]"  # spelled as the characters themselves in some files
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    rf"|[^{_ENDS[1:-1]}\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+{_ENDS}*|\s*{_ENDS}+|\s+(?!\S)|\s+",
)
_SEED = (
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^{_ENDS[1:-1]}\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}{_ENDS[1:-1]}]+"
    rf"|\s*{_ENDS}+|\s+(?!\S)|\s+"
)

_LLAMA3 = PreTokenizer((THREE_DIGITS,), ignore_merges=True, begins=True)
_STARCODER = PreTokenizer((DIGIT, GPT2))

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "qwen2": PreTokenizer((ONE_DIGIT,), nfc=True),
    "qwen35": PreTokenizer((_words("", r"[\p{L}\p{M}]", r"\p{M}"),), nfc=True),
    "deepseek-r1-qwen": PreTokenizer((ONE_DIGIT,), nfc=None),
    "stablelm2": PreTokenizer((ONE_DIGIT,), nfc=None),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": PreTokenizer((THREE_DIGITS,)),
    "dbrx": PreTokenizer((THREE_DIGITS,), nfc=None),
    "glm4": PreTokenizer((THREE_DIGITS,), nfc=None),
    "chatglm-bpe": PreTokenizer((THREE_DIGITS,), nfc=None),
    "gpt-4o": PreTokenizer((GPT4O,)),
    "llama4": PreTokenizer((GPT4O,), nfc=None),
    "tekken": PreTokenizer((TEKKEN,), ignore_merges=True, begins=True),
    "seed-coder": PreTokenizer((_SEED,), nfc=None),
    "deepseek-llm": PreTokenizer(_DEEPSEEK_LLM),
    "deepseek-coder": PreTokenizer(_DEEPSEEK_CODER),
    "deepseek-v3": PreTokenizer(_DEEPSEEK_V3),
    "gpt-2": PreTokenizer((GPT2,)),
    "phi-2": PreTokenizer((GPT2,)),
    "mpt": PreTokenizer((GPT2,), nfc=None),
    "olmo": PreTokenizer((GPT2,), nfc=None),
    "starcoder": _STARCODER,
    "refact": _STARCODER,
    "smollm": _STARCODER,
    "command-r": PreTokenizer((DIGIT, GPT2), nfc=True),
    "falcon": PreTokenizer((PUNCTUATION, GPT2, {"type": "Digits", "individual_digits": False}, "[0-9][0-9][0-9]")),
    "bloom": PreTokenizer((" ?[^(\\s|[.,!?…。，、।۔،])]+",)),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]"), nfc=None),
}
"""Names of ``tokenizer.ggml.pre`` whose words are known for certain, in the spelling of the tokenizer.json of the model that has the name.

The tests compare every row with llama.cpp's ids and list where llama.cpp cuts a text otherwise than that tokenizer.json.  Of several rows
that are alike the first is written.
"""

PATTERNS: frozenset[str] = frozenset(step for rules in PRE_TOKENIZERS.values() for step in rules.steps if isinstance(step, str)) | {
    GPT2_WORDS,
    GPT2_WORDS.removesuffix(r"|\s+"),
    _words("+"),
    r"\d{1,3}(?=(?:\d{3})*\b)",
}
"""Every regular expression that a tokenizer.json may have: a file brings none of its own."""
