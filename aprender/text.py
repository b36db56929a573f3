"""Text to token ids and back, from whatever tokenizer a model's own container holds.

Owns :class:`Tokenizer`, a thin door to the ``tokenizers`` library, and the reading of its parts from GGUF metadata and from tokenizer.json,
such that both give identical ids.  GGUF names its pre-tokenizer without saying what it does: the known names are rows here, another name
is refused (a nearly right pattern would split some texts wrongly and nobody would see).  Refuses vocabularies other than byte-level BPE.
Applies no chat template.  Called by the sides and the commands.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from aprender import _core
from aprender.errors import ArgumentError, FormatError

KEY = "tokenizer.ggml."  # prefix of GGUF's tokenizer keys
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # GGUF token types that matter here; the others are ordinary words

ENDINGS = ("<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")
"""Special tokens that end a text whatever else a container declares: GGUF has room for one or two, generation_config.json lists all."""


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """What a GGUF means by ``tokenizer.ggml.pre``.

    Attributes
    ----------
    pattern : str or None
        Words that BPE works in; None is GPT-2's own pattern, which the library has built in.
    nfc : bool
        Text is brought into Unicode normal form C first.
    ignore_merges : bool
        A word that is a token is taken whole, without asking the merges.
    begins : bool
        A begin-of-text token is added if the file does not say whether.
    """

    pattern: str | None
    nfc: bool = False
    ignore_merges: bool = False
    begins: bool = False


# The words of GPT-4's tokenizer, of which the two families differ in how many digits go together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "qwen2": PreTokenizer(_WORDS.replace("DIGITS", ""), nfc=True),
    "llama-bpe": PreTokenizer(_WORDS.replace("DIGITS", "{1,3}"), ignore_merges=True, begins=True),
    "gpt-2": PreTokenizer(None),
}
"""Names of ``tokenizer.ggml.pre`` whose pattern is known for certain."""


class Tokenizer:
    """Text to ids and back.

    Parameters
    ----------
    backend : tokenizers.Tokenizer
    eos_ids : iterable of int
        Ids that end a text, as the container declares them; special tokens of :data:`ENDINGS` are added.
    source : str
        Where it came from, for messages.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos_ids: Iterable[int] = (), source: str = "") -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        known = {number for number, token in added.items() if token.special and token.content in ENDINGS}
        self.eos_ids: frozenset[int] = frozenset(eos_ids) | known
        self.source = source
        self.digest = _digest(backend)

    def encode(self, text: str) -> list[int]:
        """Ids of a raw text, special tokens added as the container declares; ``<|im_start|>`` and its like count as one token.

        Raises
        ------
        ArgumentError
            The text holds half a surrogate pair, which no UTF-8 has.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ArgumentError(f"the text is not Unicode at character {error.start}", code="UTF8", field="prompt") from None
        return list(self._backend.encode(text, add_special_tokens=True).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens spelled out; bytes that are no UTF-8 become U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def id_to_piece(self, token: int) -> str:
        """What one id stands for, by itself; ``[id]`` where the vocabulary has nothing there."""
        return f"[{token}]" if self._backend.id_to_token(token) is None else self.decode([token])

    @property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def __repr__(self) -> str:
        return f"<Tokenizer of {self.size} tokens from {self.source or 'memory'}>"


def _digest(backend: tokenizers.Tokenizer) -> str:
    """SHA-256 of what decides the ids: equal for a GGUF and a tokenizer.json of the same tokenizer."""
    data = json.loads(backend.to_str())
    model = data["model"]
    parts = {
        "vocabulary": sorted(backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1]),
        "merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])],
        "added": sorted((token["id"], token["content"], token["special"]) for token in data["added_tokens"]),
        "normalizer": data["normalizer"],
        "words": _bare(data["pre_tokenizer"]),
        "ignore_merges": model.get("ignore_merges", False),
        "frame": backend.encode("", add_special_tokens=True).ids,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _bare(part: Any) -> Any:
    """A pre-tokenizer's description without what only moves offsets."""
    if isinstance(part, dict):
        return {name: _bare(value) for name, value in part.items() if name != "trim_offsets"}
    return [_bare(item) for item in part] if isinstance(part, list) else part


# ---- tokenizer.json ------------------------------------------------------------------------------


def from_json(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a tokenizer.json; ids that end a text come from the files beside it.

    Raises
    ------
    FormatError
        The file is missing or the library cannot read it.
    """
    where = Path(path)
    try:
        backend = tokenizers.Tokenizer.from_str(where.read_bytes().decode())
    except OSError as error:
        raise FormatError(f"{where}: {error.strerror or error}", code="IO", path=str(where)) from None
    except Exception as error:  # the library raises bare Exception
        raise FormatError(f"{where}: not a tokenizer that can be read: {error}", code="JSON", path=str(where)) from None
    return Tokenizer(backend, _eos_beside(where.parent, backend), str(where))


def _eos_beside(folder: Path, backend: tokenizers.Tokenizer) -> set[int]:
    """Ids that end a text according to generation_config.json, else config.json, else tokenizer_config.json."""
    for name in ("generation_config.json", "config.json"):
        said = _json_object(folder / name).get("eos_token_id")
        ids = {token for token in (said if isinstance(said, list) else [said]) if isinstance(token, int) and not isinstance(token, bool)}
        if ids:
            return ids
    said = _json_object(folder / "tokenizer_config.json").get("eos_token")
    text = said.get("content") if isinstance(said, dict) else said
    found = backend.token_to_id(text) if isinstance(text, str) else None
    return set() if found is None else {found}


def _json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if the file does not exist; FormatError if it is anything else."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not JSON: {error}", code="JSON", path=str(path)) from None
    if not isinstance(data, dict):
        raise FormatError(f"{path}: not a JSON object", code="JSON", path=str(path))
    return data


# ---- GGUF ----------------------------------------------------------------------------------------


def from_gguf(metadata: Mapping[str, Any], source: str = "GGUF") -> Tokenizer:
    """The tokenizer that GGUF metadata describe.

    Parameters
    ----------
    metadata : mapping
        Keys as in the file, ``tokenizer.ggml.tokens`` and so on.
    source : str
        Name of the file, for messages.

    Raises
    ------
    FormatError
        Another kind of vocabulary than byte-level BPE, an unknown pre-tokenizer, or parts that do not fit together.
    """
    kind = metadata.get(KEY + "model")
    if kind != "gpt2":
        raise _refusal(source, "model", f"the vocabulary is of kind {kind!r}; only byte-level BPE ('gpt2') is read", "UNSUPPORTED")
    name = metadata.get(KEY + "pre")
    rules = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if rules is None:
        known = ", ".join(PRE_TOKENIZERS)
        raise _refusal(source, "pre", f"the pre-tokenizer {name!r} is not known ({known} are); give --prompt-ids", "UNSUPPORTED")
    tokens = _words(metadata, "tokens", source)
    kinds = _kinds(metadata, len(tokens), source)
    backend = tokenizers.Tokenizer(_bpe(metadata, tokens, kinds, rules, source))
    if rules.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _splitter(rules)
    backend.decoder = decoders.ByteLevel()
    for wanted, special in ((CONTROL, True), (USER_DEFINED, False)):
        found = [token for token, its in zip(tokens, kinds, strict=True) if its == wanted]
        backend.add_tokens([AddedToken(token, special=special, normalized=False) for token in found])
    _frame(backend, metadata, rules, tokens, source)
    ends = (_token_id(metadata, key, tokens, source) for key in ("eos_token_id", "eot_token_id", "eom_token_id"))
    return Tokenizer(backend, {token for token in ends if token is not None}, source)


def _refusal(source: str, key: str, why: str, code: str = "VALUE") -> FormatError:
    """The error for a tokenizer key."""
    return FormatError(f"{source}: {KEY}{key}: {why}", code=code, path=source, field=KEY + key)


def _words(metadata: Mapping[str, Any], key: str, source: str) -> list[str]:
    """A list of strings among the metadata."""
    found = metadata.get(KEY + key)
    if found is None or not all(isinstance(word, str) for word in found):
        raise _refusal(source, key, "a list of strings is needed", "MISSING" if found is None else "TYPE")
    return list(found)


def _kinds(metadata: Mapping[str, Any], count: int, source: str) -> list[int]:
    """Token types, one per token; ordinary words where the file gives none."""
    found = metadata.get(KEY + "token_type")
    if found is None:
        return [1] * count
    if len(found) != count:
        raise _refusal(source, "token_type", f"{len(found)} types for {count} tokens", "COUNT")
    return [int(kind) for kind in found]


def _bpe(metadata: Mapping[str, Any], tokens: list[str], kinds: list[int], rules: PreTokenizer, source: str) -> models.BPE:
    """The merging model.  Tokens that the file calls unused cannot come from any text and are left out."""
    vocabulary = {token: number for number, token in enumerate(tokens) if kinds[number] != UNUSED}
    if len(vocabulary) != len(tokens) - kinds.count(UNUSED):
        twice = next(token for number, token in enumerate(tokens) if kinds[number] != UNUSED and vocabulary[token] != number)
        raise _refusal(source, "tokens", f"{twice!r} is there twice", "DUPLICATE")
    merges = []
    for place, merge in enumerate(_words(metadata, "merges", source)):
        left, gap, right = merge.partition(" ")
        if not (left and gap and right) or " " in right:
            raise _refusal(source, "merges", f"number {place}, {merge!r}, is not two pieces")
        merges.append((left, right))
    try:
        return models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rules.ignore_merges)
    except Exception as error:  # the library raises bare Exception, for example for a merge into an unknown token
        raise _refusal(source, "merges", str(error)) from None


def _splitter(rules: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """Words first, then bytes."""
    if rules.pattern is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    words = pre_tokenizers.Split(Regex(rules.pattern), "isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _token_id(metadata: Mapping[str, Any], key: str, tokens: list[str], source: str) -> int | None:
    """An id among the metadata, None if the file has none."""
    found = metadata.get(KEY + key)
    if found is not None and not (isinstance(found, int) and 0 <= found < len(tokens)):
        raise _refusal(source, key, f"{found!r} is no token of {len(tokens)}")
    return found


def _frame(backend: tokenizers.Tokenizer, metadata: Mapping[str, Any], rules: PreTokenizer, tokens: list[str], source: str) -> None:
    """Have the begin and end tokens added, where the file says so."""
    single, special = ["$A:0"], []
    for end, default, put in (("bos", rules.begins, lambda piece: single.insert(0, piece)), ("eos", False, single.append)):
        if not metadata.get(f"{KEY}add_{end}_token", default):
            continue
        number = _token_id(metadata, f"{end}_token_id", tokens, source)
        if number is None:
            raise _refusal(source, f"{end}_token_id", f"missing, although the {end} token is to be added", "MISSING")
        put(f"{tokens[number]}:0")
        special.append((tokens[number], number))
    if special:
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)


# ---- any model -----------------------------------------------------------------------------------


def for_model(path: str | os.PathLike[str], file: _core.File | None = None) -> Tokenizer | None:
    """The tokenizer in a model's own container: GGUF metadata, or the tokenizer.json beside safetensors.

    Parameters
    ----------
    path : path
        A model file or a folder.
    file : File, optional
        The same file, if it is open already.

    Returns
    -------
    Tokenizer or None
        None where the container has no tokenizer.

    Raises
    ------
    FormatError
        There is one that cannot be read; or the path is no model.
    """
    where = Path(path)
    if file is None and not where.is_dir():
        file = _core.File(where)
    if file is not None and file.container == "gguf":
        return None if file.metadata.get(KEY + "model", "no_vocab") == "no_vocab" else from_gguf(file.metadata, str(where))
    beside = (where if where.is_dir() else where.parent) / "tokenizer.json"
    return from_json(beside) if beside.is_file() else None
