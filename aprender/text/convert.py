"""A tokenizer.json as metadata: GGUF's ``tokenizer.ggml.*`` keys, and through them APR's.

Owns :func:`gguf_metadata` and :func:`apr_metadata`.  What it writes is read back and compared, part by part, with the tokenizer that it
came from: a tokenizer that the keys cannot say is refused by the name of the part, and nothing is nearly right.  Called by the writers of
GGUF and APR files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from aprender.errors import FormatError
from aprender.text import backend as library
from aprender.text import keys, sentencepiece
from aprender.text.words import BYTE_LEVEL, PRE_TOKENIZERS, SENTENCEPIECE


def gguf_metadata(folder: str | os.PathLike[str], vocab_size: int | None = None) -> dict[str, Any]:
    """The tokenizer of a folder as GGUF's keys.

    Parameters
    ----------
    folder : path
        With tokenizer.json, and tokenizer_config.json and generation_config.json where there are.
    vocab_size : int, optional
        Rows of the model's embedding: so many tokens are written, those beyond the tokenizer's own as unused.

    Returns
    -------
    dict
        ``tokenizer.ggml.*`` and ``tokenizer.chat_template``; lists of str, int32 and float32 arrays, int and bool.  Empty where the folder
        has no tokenizer.json.

    Raises
    ------
    FormatError
        The tokenizer cannot be read (its own code), or is one that GGUF's keys cannot say (``UNSUPPORTED``, ``field`` names the part).
    """
    from aprender.text import from_json

    where = Path(folder) / "tokenizer.json"
    if not where.is_file():
        return {}
    known = from_json(where)
    data = json.loads(known.backend.to_str())
    mine = library.parts(known.backend)
    make = _sentencepiece if data["model"].get("byte_fallback") else _byte_level
    said = make(data, mine, str(where))
    said |= _special(data, known.backend, Path(folder), known.eos_ids, str(where))
    if vocab_size is not None:
        _pad(said, vocab_size, str(where))
    if known.chat_template is not None:
        said[keys.GGUF_TEMPLATE] = known.chat_template
    _compare(mine, said, str(where))
    return said


def apr_metadata(tokenizer: Mapping[str, Any] | str | os.PathLike[str], vocab_size: int | None = None) -> dict[str, Any]:
    """A tokenizer as APR's keys (:data:`aprender.text.keys.APR`).

    Parameters
    ----------
    tokenizer : mapping or path
        Metadata of a GGUF, or a folder with tokenizer.json.
    vocab_size : int, optional
        As for :func:`gguf_metadata`; for a folder only.

    Returns
    -------
    dict
        Values that JSON can hold.  Empty where there is no tokenizer.

    Raises
    ------
    FormatError
        As :func:`gguf_metadata`.  Metadata of a GGUF are renamed, not judged.
    """
    return keys.to_apr(tokenizer if isinstance(tokenizer, Mapping) else gguf_metadata(tokenizer, vocab_size))


def _refusal(source: str, field: str, why: str) -> FormatError:
    return FormatError(f"{source}: {field}: {why}", code="UNSUPPORTED", path=source, field=field)


def _byte_level(data: Mapping[str, Any], mine: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Kind, pre-tokenizer, tokens, types and merges."""
    model = data["model"]
    name = _name(mine)
    if name is None:
        raise _refusal(source, "pre_tokenizer", "its normalizer and words are those of no pre-tokenizer that GGUF has a name for here")
    tokens, kinds = _tokens(data, mine, source)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    found = {"model": BYTE_LEVEL, "pre": name, "tokens": tokens, "token_type": np.array(kinds, np.int32), "merges": merges}
    return {keys.GGUF + key: value for key, value in found.items()}


def _sentencepiece(data: Mapping[str, Any], mine: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Kind, tokens, types, scores and what becomes of blanks."""
    prefix = data["normalizer"] == sentencepiece.normalizer(True)
    if not prefix and data["normalizer"] != sentencepiece.normalizer(False):
        raise _refusal(source, "normalizer", "it is not SentencePiece's, with or without a blank in front of each piece of text")
    tokens, kinds = _tokens(data, mine, source)
    kinds = [library.BYTE if token in sentencepiece.BYTES else its for token, its in zip(tokens, kinds, strict=True)]
    unknown = data["model"]["vocab"].get(data["model"].get("unk_token"))
    if unknown is not None:
        kinds[unknown] = library.UNKNOWN if kinds[unknown] == library.CONTROL else kinds[unknown]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in data["model"]["merges"]]
    scores = np.array(sentencepiece.scores_of(pairs, tokens), np.float32)
    found = {"model": SENTENCEPIECE, "pre": "default", "tokens": tokens, "token_type": np.array(kinds, np.int32), "scores": scores}
    found |= {"add_space_prefix": prefix} | ({} if unknown is None else {"unknown_token_id": unknown})
    return {keys.GGUF + key: value for key, value in found.items()}


def _name(mine: Mapping[str, Any]) -> str | None:
    """The row of :data:`PRE_TOKENIZERS` that says what the tokenizer does, one that settles the normal form if there is."""
    wanted = mine["normalizer"], mine["words"], mine["ignore_merges"]
    for name, rules in sorted(PRE_TOKENIZERS.items(), key=lambda row: row[1].nfc is None):
        if (rules.normalizer(), library.bare(rules.words()), rules.ignore_merges) == wanted:
            return name
    return None


def _tokens(data: Mapping[str, Any], mine: Mapping[str, Any], source: str) -> tuple[list[str], list[int]]:
    """Tokens by id and their types; what no token has is called unused."""
    vocabulary = mine["vocabulary"]
    size = vocabulary[-1][1] + 1 if vocabulary else 0
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [library.UNUSED] * size
    for token, number in vocabulary:
        tokens[number], kinds[number] = token, library.NORMAL
    for added in data["added_tokens"]:
        odd = [flag for flag in ("single_word", "lstrip", "rstrip") if added[flag]]
        if odd:
            raise _refusal(source, "added_tokens", f"{added['content'][:64]!r} has {odd[0]} set, which metadata have no room for")
        if added["normalized"] and data["normalizer"] not in (None, {"type": "NFC"}):
            why = f"{added['content'][:64]!r} is looked for in the normalized text; metadata mean the text as it is"
            raise _refusal(source, "added_tokens", why)
        kinds[added["id"]] = library.CONTROL if added["special"] else library.USER_DEFINED
    return tokens, kinds


def _pad(said: dict[str, Any], size: int, source: str) -> None:
    """As many tokens as the embedding has rows."""
    tokens, kinds = said[keys.GGUF + "tokens"], said[keys.GGUF + "token_type"]
    if len(tokens) > size:
        raise _refusal(source, "vocab_size", f"{len(tokens)} tokens for the {size} rows of the model's embedding")
    said[keys.GGUF + "tokens"] = [*tokens, *(f"[PAD{number}]" for number in range(len(tokens), size))]
    more = size - len(tokens)
    said[keys.GGUF + "token_type"] = np.append(kinds, np.full(more, library.UNUSED, np.int32))
    if keys.GGUF + "scores" in said:
        scores = said[keys.GGUF + "scores"]
        said[keys.GGUF + "scores"] = np.append(scores, -1.0 - np.arange(len(scores), size, dtype=np.float32))


def _special(data: Mapping[str, Any], backend: tokenizers.Tokenizer, folder: Path, eos_ids: frozenset[int], source: str) -> dict[str, Any]:
    """Ids with a meaning, and whether the ends of a text are added."""
    from aprender.text import NAMED, json_object, token_text

    config = json_object(folder / "tokenizer_config.json")
    said: dict[str, Any] = {}
    for name, key in NAMED.items():
        found = backend.token_to_id(token_text(config, name) or "")
        if found is not None:
            said[key] = int(found)
    first, last = _frame(backend, source)
    said["add_bos_token"], said["add_eos_token"] = first is not None, last is not None
    said |= {key: token for key, token in (("bos_token_id", first), ("eos_token_id", last)) if token is not None}
    said |= _ends(said.get("eos_token_id"), eos_ids, backend, source)
    return {keys.GGUF + key: value for key, value in said.items()}


def _frame(backend: tokenizers.Tokenizer, source: str) -> tuple[int | None, int | None]:
    """The tokens put before and after every text."""
    bare = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    for before in range(len(whole) - len(bare) + 1):
        if whole[before : before + len(bare)] == bare:
            first, last = whole[:before], whole[before + len(bare) :]
            if len(first) <= 1 and len(last) <= 1:
                return (first[0] if first else None), (last[0] if last else None)
    raise _refusal(source, "post_processor", f"it makes {whole} of {bare}: more than one token before and one after")


def _ends(eos: int | None, eos_ids: frozenset[int], backend: tokenizers.Tokenizer, source: str) -> dict[str, int]:
    """The ids that end a text, in the keys that GGUF has; those that are known by their spelling need none."""
    from aprender.text import ENDINGS

    rest = sorted(eos_ids - {eos}, key=lambda token: (backend.id_to_token(token) in ENDINGS, token))
    names = [name for name, used in (("eos_token_id", eos is not None), ("eot_token_id", False), ("eom_token_id", False)) if not used]
    lost = [token for token in rest[len(names) :] if backend.id_to_token(token) not in ENDINGS]
    if lost:
        raise _refusal(source, "eos_token_id", f"{len(eos_ids)} tokens end a text; metadata have room for three, not for {lost}")
    return dict(zip(names, rest, strict=False))


def _compare(mine: Mapping[str, Any], said: Mapping[str, Any], source: str) -> None:
    """Refuse metadata that would be read as another tokenizer."""
    theirs = library.parts(library.build(keys.Keys(said, source)))
    for part, value in mine.items():
        if theirs[part] != value:
            raise _refusal(source, part, "metadata cannot say it: read back, it is another")
