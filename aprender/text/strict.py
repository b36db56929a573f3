"""A tokenizer.json looked at before the library sees it: the library forgives much, trusts ids and lengths, and may panic.

Owns the reading of JSON files that a stranger may have written, and :func:`check`.  Refuses, each with its code: what is no JSON (``JSON``,
``UTF8``, ``DEPTH``, ``DUPLICATE``), what is too large (``LIMIT``), parts and regular expressions that are not known (``UNSUPPORTED``), and
a vocabulary, merges or added tokens that do not fit together (``TOKENIZER``).  Nothing is allocated by a number in the file.  Called by
the doors of this package.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from aprender.errors import FormatError
from aprender.text.words import PATTERNS

MOST_BYTES = 1 << 26  # of a JSON file; the largest tokenizer.json of a known model has 33 MB
MOST_STRINGS = 1 << 23  # in it; 580 000 merges and 262 000 tokens make 1.5 million
MOST_DEPTH = 64
MOST_PARTS = 64  # in a sequence of normalizers and the like
LONGEST_TOKEN = 1 << 16  # bytes
LARGEST_GAP = 1 << 16  # ids that no token has

NORMALIZERS = frozenset(("NFC", "NFD", "NFKC", "NFKD", "Sequence", "Prepend", "Replace", "Lowercase", "Strip", "StripAccents"))
WORDS = frozenset(("Sequence", "Split", "ByteLevel", "Digits", "Punctuation", "Metaspace", "Whitespace", "WhitespaceSplit"))
FRAMES = frozenset(("Sequence", "ByteLevel", "TemplateProcessing"))
DECODERS = frozenset(("Sequence", "ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"))
PARTS: Mapping[str, frozenset[str]] = {
    "normalizer": NORMALIZERS, "pre_tokenizer": WORDS, "post_processor": FRAMES, "decoder": DECODERS,
}  # fmt: skip
"""Types that a part of a tokenizer.json may have."""

Refuse = Callable[[str, str, str], NoReturn]
"""Raises for (code, field, why)."""


def _refuser(path: Path) -> Refuse:
    def refuse(code: str, field: str, why: str) -> NoReturn:
        raise FormatError(f"{path}: {field + ': ' if field else ''}{why}", code=code, path=str(path), field=field or None)

    return refuse


# ---- JSON ------------------------------------------------------------------------------------------------------------------------------


def load(path: Path) -> Any:
    """What a JSON file says, read strictly.

    Raises
    ------
    FormatError
        ``IO`` it cannot be read, ``NOT_REGULAR`` it is no file, ``LIMIT`` more than :data:`MOST_BYTES`, ``UTF8``, ``JSON``, ``DEPTH``,
        ``DUPLICATE``.
    """
    return parse(path, decode(path, read(path)))


def parse(path: Path, text: str) -> Any:
    """What the text of a JSON file says; see :func:`load`."""
    refuse = _refuser(path)
    if text.count('"') > 2 * MOST_STRINGS:
        refuse("LIMIT", "", f"more than {MOST_STRINGS} strings")
    try:
        data = json.loads(text, object_pairs_hook=_once(refuse), parse_constant=_no_number, parse_float=_finite, parse_int=_short)
    except RecursionError:
        refuse("DEPTH", "", f"nested deeper than {MOST_DEPTH}")
    except FormatError:
        raise
    except ValueError as error:
        refuse("JSON", "", f"not JSON: {error}")
    if _depth(data) > MOST_DEPTH:
        refuse("DEPTH", "", f"nested deeper than {MOST_DEPTH}")
    if re.search(r"\\u[dD][89a-fA-F]", text):
        _whole_characters(data, refuse)
    return data


def read(path: Path) -> bytes:
    """The bytes of a regular file of no more than :data:`MOST_BYTES`."""
    refuse = _refuser(path)
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            refuse("NOT_REGULAR", "", "not a regular file")
        if found.st_size > MOST_BYTES:
            refuse("LIMIT", "", f"{found.st_size} bytes; at most {MOST_BYTES} are read")
        return path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror or error}", code="IO", path=str(path)) from None


def decode(path: Path, data: bytes) -> str:
    """Bytes of a file as text."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 at byte {error.start}", code="UTF8", path=str(path), offset=error.start) from None


def _once(refuse: Refuse) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(found)
        if len(made) != len(found):
            seen: set[str] = set()
            twice = next(key for key, _ in found if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            refuse("DUPLICATE", "", f"the key {twice[:64]!r} is there twice in one object")
        return made

    return pairs


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON's")


def _finite(digits: str) -> float:
    if len(digits) > 64 or not math.isfinite(float(digits)):
        raise ValueError(f"the number {digits[:32]} cannot be held")
    return float(digits)


def _short(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"the number {digits[:32]} of {len(digits)} digits cannot be held")
    return int(digits)


def _depth(data: Any) -> int:
    """Levels of objects and lists, looked at level by level and no further than needed."""
    level, depth = [data], 0
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        if depth > MOST_DEPTH:
            break
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def _strings(data: Any) -> Iterator[str]:
    """Every string in it, keys among them."""
    rest = [data]
    while rest:
        one = rest.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            yield from one
            rest.extend(one.values())
        elif isinstance(one, list):
            rest.extend(one)


def _whole_characters(data: Any, refuse: Refuse) -> None:
    for text in _strings(data):
        if any("\ud800" <= character <= "\udfff" for character in text):
            refuse("UTF8", "", f"{text[:64]!a} has half a surrogate pair, which no UTF-8 has")


# ---- tokenizer.json --------------------------------------------------------------------------------------------------------------------


def check(data: Any, path: Path) -> None:
    """Refuse a tokenizer.json that the library would not read as it stands.

    Parameters
    ----------
    data : object
        What :func:`load` returned.
    path : Path
        For messages.

    Raises
    ------
    FormatError
        ``UNSUPPORTED``, ``LIMIT``, ``TOKENIZER``, ``JSON`` (not an object); see the head of this file.
    """
    refuse = _refuser(path)
    if not isinstance(data, dict):
        refuse("JSON", "", "not an object")
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        kind = str(model.get("type"))[:64] if isinstance(model, dict) else None
        refuse("UNSUPPORTED", "model.type", f"the model is of type {kind!r}; BPE is read")
    ids = _vocabulary(model.get("vocab"), refuse)
    _merges(model, ids, refuse)
    _settings(model, ids, refuse)
    _added(data.get("added_tokens"), ids, refuse)
    for part in PARTS:
        _part(data.get(part), part, part, ids, refuse)


def _token(text: Any, field: str, refuse: Refuse, code: str) -> str:
    if not isinstance(text, str) or not text or "\0" in text:
        refuse("TOKENIZER", field, f"{str(text)[:64]!r} is no token")
    if len(text.encode()) > LONGEST_TOKEN:
        refuse(code, field, f"{text[:32]!r}… has {len(text)} characters; {LONGEST_TOKEN} bytes are read")
    return text


def _number(value: Any, most: int, field: str, refuse: Refuse) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < most:
        refuse("TOKENIZER", field, f"{str(value)[:64]!r} is no id below {most}")
    return value


def _vocabulary(vocabulary: Any, refuse: Refuse) -> dict[str, int]:
    """Token to id."""
    if not isinstance(vocabulary, dict):
        refuse("TOKENIZER", "model.vocab", "an object from token to id is needed")
    most = len(vocabulary) + LARGEST_GAP
    for token, number in vocabulary.items():
        _token(token, "model.vocab", refuse, "LIMIT")
        _number(number, most, f"model.vocab[{token[:64]!r}]", refuse)
    if len(set(vocabulary.values())) != len(vocabulary):
        refuse("TOKENIZER", "model.vocab", "two tokens have one id")
    return dict(vocabulary)


def _merges(model: Mapping[str, Any], ids: Mapping[str, int], refuse: Refuse) -> None:
    """Every merge is two tokens that make a third."""
    merges, prefix = model.get("merges"), model.get("continuing_subword_prefix") or ""
    if not isinstance(merges, list) or not isinstance(prefix, str):
        refuse("TOKENIZER", "model.merges", "a list of pairs is needed")
    for place, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(piece, str) for piece in pair):
            refuse("TOKENIZER", f"model.merges[{place}]", f"{str(merge)[:64]!r} is not two pieces")
        if not pair[1].startswith(prefix):
            refuse("TOKENIZER", f"model.merges[{place}]", f"{pair[1][:64]!r} does not begin with {prefix[:64]!r}, the prefix inside words")
        for piece in (*pair, pair[0] + pair[1][len(prefix) :]):
            if piece not in ids:
                refuse("TOKENIZER", f"model.merges[{place}]", f"{piece[:64]!r} is no token")


def _settings(model: Mapping[str, Any], ids: Mapping[str, int], refuse: Refuse) -> None:
    if model.get("dropout"):
        refuse("UNSUPPORTED", "model.dropout", "merges left out at random make other ids each time")
    unknown = model.get("unk_token")
    if unknown is not None and (not isinstance(unknown, str) or unknown not in ids):
        refuse("TOKENIZER", "model.unk_token", f"{str(unknown)[:64]!r} is no token")
    for flag in ("byte_fallback", "fuse_unk", "ignore_merges"):
        if model.get(flag) not in (None, False, True):
            refuse("TOKENIZER", f"model.{flag}", "neither true nor false")


def _added(added: Any, ids: dict[str, int], refuse: Refuse) -> None:
    """Added tokens have texts and ids of their own, or those of the vocabulary; they join ``ids``."""
    if not isinstance(added, list | None):
        refuse("TOKENIZER", "added_tokens", "a list is needed")
    owners, seen = {number: token for token, number in ids.items()}, set()
    most = len(ids) + len(added or ()) + LARGEST_GAP
    for place, one in enumerate(added or ()):
        field = f"added_tokens[{place}]"
        token = _token(one.get("content") if isinstance(one, dict) else None, field, refuse, "TOKENIZER")
        number = _number(one.get("id"), most, field, refuse)
        if token in seen:
            refuse("DUPLICATE", field, f"{token[:64]!r} is there twice")
        if ids.get(token, number) != number or owners.get(number, token) != token:
            refuse("TOKENIZER", field, f"{token[:64]!r} has the id {number}, and the vocabulary has another for it or it for another")
        seen.add(token)
        ids[token], owners[number] = number, token


def _part(part: Any, kind: str, field: str, ids: Mapping[str, int], refuse: Refuse) -> None:
    """A normalizer, a pre-tokenizer and the like: a known type, known regular expressions, ids that there are."""
    if part is None:
        return
    its = part.get("type") if isinstance(part, dict) else None
    if its not in PARTS[kind]:
        refuse("UNSUPPORTED", field, f"the type {str(its)[:64]!r} is not known; {', '.join(sorted(PARTS[kind]))} are")
    if its == "Sequence":
        inner = [value for key, value in part.items() if key != "type"]
        if len(inner) != 1 or not isinstance(inner[0], list):
            refuse("TOKENIZER", field, "a sequence has one list")
        if len(inner[0]) > MOST_PARTS:
            refuse("LIMIT", field, f"{len(inner[0])} steps; {MOST_PARTS} are read")
        for place, one in enumerate(inner[0]):
            _part(one, kind, f"{field}[{place}]", ids, refuse)
    pattern = part.get("pattern")
    if isinstance(pattern, dict) and "Regex" in pattern and pattern["Regex"] not in PATTERNS:
        refuse("UNSUPPORTED", field, f"the regular expression {str(pattern['Regex'])[:64]!r} is not one of those that are known")
    if its == "TemplateProcessing":
        _template(part, field, ids, refuse)


def _template(part: Mapping[str, Any], field: str, ids: Mapping[str, int], refuse: Refuse) -> None:
    """Tokens put around a text are tokens, and few."""
    special, known = part.get("special_tokens"), set(ids.values())
    if (
        not isinstance(special, dict)
        or max(len(part.get(one) or ()) for one in ("single", "pair")) > MOST_PARTS
        or len(special) > MOST_PARTS
    ):
        refuse("LIMIT", field, f"the template has more than {MOST_PARTS} pieces, or no list of its tokens")
    for name, one in special.items():
        numbers = one.get("ids") if isinstance(one, dict) else None
        if not isinstance(numbers, list) or not 1 <= len(numbers) <= MOST_PARTS or any(number not in known for number in numbers):
            refuse("TOKENIZER", field, f"the ids of {name[:64]!r}, {str(numbers)[:64]}, are none of the vocabulary's")
