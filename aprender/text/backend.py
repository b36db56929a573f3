"""From a tokenizer's metadata to the tokenizers library: byte-level BPE and SentencePiece's BPE.

Owns :func:`build`, the digest of what decides the ids, and the guard around the library, which may panic.  Refuses other kinds of
vocabulary, unknown pre-tokenizers, and parts that do not fit together, each by the name of its key.  Called by the doors of this package.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import tokenizers
from tokenizers import AddedToken

from aprender.errors import FormatError
from aprender.text import sentencepiece
from aprender.text.keys import Keys
from aprender.text.words import BYTE_LEVEL, PRE_TOKENIZERS, SENTENCEPIECE

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""GGUF's token types."""

T = TypeVar("T")


def guarded(source: str, call: Callable[[], T], code: str = "TOKENIZER") -> T:
    """What the call into the library returns; FormatError for whatever it raises, a panic among it."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library raises bare Exception, and a panic is not even one
        why = " ".join(str(error).split())[:200]
        raise FormatError(f"{source}: not a tokenizer that the library can use: {why}", code=code, path=source) from None


def build(keys: Keys) -> tokenizers.Tokenizer:
    """The library's tokenizer for the metadata.

    Raises
    ------
    FormatError, ConfigError
        Another kind of vocabulary, an unknown pre-tokenizer, or parts that do not fit together.
    """
    kind = keys.kind()
    makers = {BYTE_LEVEL: _byte_level, SENTENCEPIECE: _sentencepiece}
    if not isinstance(kind, str) or kind not in makers:
        why = f"the vocabulary is of kind {kind!r}; only byte-level BPE ({BYTE_LEVEL!r}) and SentencePiece's ({SENTENCEPIECE!r}) are read"
        raise keys.refusal("model", why, "UNSUPPORTED")
    tokens = keys.strings("tokens")
    kinds = keys.numbers("token_type", len(tokens), ("int32", "uint32")) or _kinds(keys, tokens)
    return makers[kind](keys, tokens, kinds)


def _kinds(keys: Keys, tokens: list[str]) -> list[int]:
    """Types where the file has none.

    To llama.cpp all tokens of a GGUF are words then.  APR files of other writers have no types though they have special tokens; what is
    longer than one byte and made by no merge can come from a text in no other way than as a whole, and is one of those.
    """
    if not keys.is_apr or keys.kind() != BYTE_LEVEL:
        return [NORMAL] * len(tokens)
    made = {merge.replace(" ", "", 1) for merge in keys.strings("merges")}
    return [NORMAL if len(token) == 1 or token in made else CONTROL for token in tokens]


def _byte_level(keys: Keys, tokens: list[str], kinds: list[int]) -> tokenizers.Tokenizer:
    """Byte-level BPE: words by the name of the pre-tokenizer, then merges.  Unused tokens cannot come from any text and are left out."""
    name = keys.get("pre")
    rules = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if rules is None:
        known = ", ".join(PRE_TOKENIZERS)
        raise keys.refusal("pre", f"the pre-tokenizer {name!r} is not known ({known} are); give --prompt-ids", "UNSUPPORTED")
    vocabulary = _vocabulary(keys, tokens, [its != UNUSED for its in kinds])
    model = _model(vocabulary, _merges(keys, vocabulary), ignore_merges=rules.ignore_merges)
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    whole = {"normalizer": rules.normalizer(), "pre_tokenizer": rules.words(), "decoder": decoder, "model": model}
    return _assemble(keys, tokens, kinds, whole, rules.begins)


def _sentencepiece(keys: Keys, tokens: list[str], kinds: list[int]) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: no words, merges by score, bytes for what is no token.  Unused tokens that nothing merges to are left out."""
    if keys.flag("remove_extra_whitespaces", False):
        raise keys.refusal("remove_extra_whitespaces", "texts would have to be changed in a way that llama.cpp does not", "UNSUPPORTED")
    scores = keys.numbers("scores", len(tokens), ("float32", "int32"))
    if scores is None:
        raise keys.refusal("scores", "missing, and they decide what merges first", "MISSING")
    every = _vocabulary(keys, tokens, [True] * len(tokens))
    sentencepiece.check_bytes(keys, (token for token, its in zip(tokens, kinds, strict=True) if its == BYTE), every)
    merges = sentencepiece.merges(keys, tokens, scores, every)
    reached = {piece for left, right in merges for piece in (left, right, left + right)}
    vocabulary = {token: number for token, number in every.items() if kinds[number] != UNUSED or len(token) == 1 or token in reached}
    unknown = keys.token_id("unknown_token_id", len(tokens))
    model = _model(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token=None if unknown is None else tokens[unknown])
    prefix = keys.flag("add_space_prefix", True)
    whole = {"normalizer": sentencepiece.normalizer(prefix), "pre_tokenizer": None, "decoder": sentencepiece.decoder(prefix)}
    return _assemble(keys, tokens, kinds, whole | {"model": model}, begins=True)


def _assemble(keys: Keys, tokens: list[str], kinds: list[int], whole: dict[str, Any], begins: bool) -> tokenizers.Tokenizer:
    """Model and words, added tokens and frame as one."""
    text = json.dumps({"version": "1.0", "added_tokens": [], "post_processor": _frame(keys, begins, tokens), **whole})
    backend = guarded(keys.source, lambda: tokenizers.Tokenizer.from_str(text))
    for wanted, special in (((CONTROL, UNKNOWN), True), ((USER_DEFINED,), False)):
        found = [token for token, its in zip(tokens, kinds, strict=True) if its in wanted]
        if "" in found:
            raise keys.refusal("tokens", f"token {tokens.index('')} is empty, and a special one", "TOKENIZER")
        backend.add_tokens([AddedToken(token, special=special, normalized=False) for token in found])
    return backend


def _vocabulary(keys: Keys, tokens: list[str], used: list[bool]) -> dict[str, int]:
    """Token to id of the tokens that are used."""
    vocabulary = {token: number for number, token in enumerate(tokens) if used[number]}
    if len(vocabulary) != sum(used):
        twice = next(token for number, token in enumerate(tokens) if used[number] and vocabulary[token] != number)
        raise keys.refusal("tokens", f"{twice[:64]!r} is there twice", "DUPLICATE")
    return vocabulary


def _merges(keys: Keys, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces, the first to be merged first."""
    merges = []
    for place, merge in enumerate(keys.strings("merges")):
        left, gap, right = merge.partition(" ")
        if not (left and gap and right) or " " in right:
            raise keys.refusal("merges", f"number {place}, {merge[:64]!r}, is not two pieces", "TOKENIZER")
        for piece in (left, right, left + right):
            if piece not in vocabulary:
                raise keys.refusal("merges", f"number {place}, {merge[:64]!r}: {piece[:64]!r} is no token", "TOKENIZER")
        merges.append((left, right))
    if len(set(merges)) != len(merges):
        raise keys.refusal("merges", f"{len(merges) - len(set(merges))} of them are there twice", "DUPLICATE")
    return merges


def _model(vocabulary: Mapping[str, int], merges: list[tuple[str, str]], **more: Any) -> dict[str, Any]:
    """The merging model as tokenizer.json spells it."""
    return {"type": "BPE", "vocab": dict(vocabulary), "merges": [list(pair) for pair in merges], **more}


def _frame(keys: Keys, begins: bool, tokens: list[str]) -> dict[str, Any] | None:
    """What adds the begin and end tokens, where the file says so, as tokenizer.json spells it."""
    pieces: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    special = {}
    for end, default, place in (("bos", begins, 0), ("eos", False, 2)):
        if not keys.flag(f"add_{end}_token", default):
            continue
        number = keys.token_id(f"{end}_token_id", len(tokens))
        if number is None:
            raise keys.refusal(f"{end}_token_id", f"missing, although the {end} token is to be added", "MISSING")
        pieces.insert(place, {"SpecialToken": {"id": tokens[number], "type_id": 0}})
        special[tokens[number]] = {"id": tokens[number], "ids": [number], "tokens": [tokens[number]]}
    return {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special} if special else None


# ---- what decides the ids --------------------------------------------------------------------------------------------------------------


def parts(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """What decides the ids, as plain data: equal for a GGUF and a tokenizer.json of the same tokenizer."""
    data = json.loads(backend.to_str())
    model, normalizer, words = data["model"], data["normalizer"], bare(data["pre_tokenizer"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])]
    if model.get("byte_fallback"):
        merges = _by_result(merges)
        words = None if normalizer == sentencepiece.normalizer(False) and words == NO_BLANKS_LEFT else words
    vocabulary = model["vocab"] | {token["content"]: token["id"] for token in data["added_tokens"]}
    return {
        "vocabulary": sorted(vocabulary.items(), key=lambda item: item[1]),
        "merges": merges,
        "added": sorted((token["id"], token["content"], token["special"]) for token in data["added_tokens"]),
        "normalizer": None if normalizer == {"type": "Sequence", "normalizers": []} else normalizer,
        "words": words,
        "ignore_merges": model.get("ignore_merges", False),
        "frame": backend.encode("", add_special_tokens=True).ids,
    }


NO_BLANKS_LEFT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
"""Words that end at blanks, of which the normalizer has left none."""


def _by_result(merges: list[str]) -> list[str]:
    """Merges to one token in one order: converters differ in it, and the ids do not."""
    together = itertools.groupby(merges, key=lambda merge: merge.replace(" ", "", 1))
    return [merge for _, same in together for merge in sorted(same)]


def digest(data: dict[str, Any]) -> str:
    """SHA-256 of what :func:`parts` returned."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def bare(part: Any) -> Any:
    """A pre-tokenizer's description without what only moves offsets."""
    if isinstance(part, dict):
        return {name: bare(value) for name, value in part.items() if name != "trim_offsets"}
    return [bare(item) for item in part] if isinstance(part, list) else part
