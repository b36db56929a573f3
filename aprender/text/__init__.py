"""Text to token ids and back, from whatever tokenizer a model's own container holds.

Owns :class:`Tokenizer`, a thin door to the ``tokenizers`` library, and its doors from GGUF metadata, APR metadata and tokenizer.json, such
that all give identical ids.  GGUF names its pre-tokenizer without saying what it does: the known names are rows of ``words``, another
name is refused (a nearly right pattern would split some texts wrongly and nobody would see).  Returns a chat template as text and applies
none.  Called by the sides, the commands and the writers.
"""

from __future__ import annotations

import functools
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from aprender import _core
from aprender.errors import ArgumentError, FormatError
from aprender.text import backend as library
from aprender.text import strict
from aprender.text.keys import APR, APR_TEMPLATE, GGUF, GGUF_TEMPLATE, Keys
from aprender.text.sentencepiece import BLANK
from aprender.text.words import BYTE_LEVEL, PRE_TOKENIZERS, PreTokenizer

__all__ = [
    "ENDINGS", "PRE_TOKENIZERS", "PreTokenizer", "Tokenizer", "apr_metadata", "for_model", "from_apr", "from_gguf", "from_json",
    "gguf_metadata", "render_chat",
]  # fmt: skip

ENDINGS = ("<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")
"""Special tokens that end a text whatever else a container declares: GGUF has room for one or two, generation_config.json lists all."""

LONGEST_TEXT = 1 << 24
"""Characters that are tokenised at once: 16 million, more than any model's context holds."""


class Tokenizer:
    """Text to ids and back.

    Parameters
    ----------
    backend : tokenizers.Tokenizer
    eos_ids : iterable of int
        Ids that end a text, as the container declares them; special tokens of :data:`ENDINGS` are added.
    source : str
        Where it came from, for messages.
    chat_template : str, optional
        The container's template for conversations, as text.
    settled : bool
        False where it is not known whether texts are brought into normal form C: others are refused then.
    named : mapping, optional
        Texts of special tokens by what a chat template calls them: ``bos_token`` and so on.

    Attributes
    ----------
    backend : tokenizers.Tokenizer
    eos_ids : frozenset of int
    source : str
    chat_template : str or None
        Never rendered here.
    named : dict
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos_ids: Iterable[int] = (),
        source: str = "",
        chat_template: str | None = None,
        settled: bool = True,
        named: Mapping[str, str] | None = None,
    ) -> None:
        self.backend = backend
        added = backend.get_added_tokens_decoder()
        known = {number for number, token in added.items() if token.special and token.content in ENDINGS}
        self.eos_ids: frozenset[int] = frozenset(eos_ids) | known
        self.source = source
        self.chat_template = chat_template
        self._settled = settled
        self.named = dict(named or {})

    def encode(self, text: str, frame: bool = True) -> list[int]:
        """Ids of a raw text; ``<|im_start|>`` and its like count as one token.

        Parameters
        ----------
        text : str
        frame : bool
            Add the special tokens before and after that the container declares.

        Raises
        ------
        ArgumentError
            ``LIMIT``: more than :data:`LONGEST_TEXT` characters.  ``UTF8``: half a surrogate pair, which no UTF-8 has.  ``UNSUPPORTED``:
            a text that is not in normal form C, where the container does not say whether it is to be brought there.
        """
        if len(text) > LONGEST_TEXT:
            why = f"the text has {len(text)} characters; {LONGEST_TEXT} are tokenised at once"
            raise ArgumentError(why, code="LIMIT", field="prompt")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ArgumentError(f"the text is not Unicode at character {error.start}", code="UTF8", field="prompt") from None
        if not (self._settled or unicodedata.is_normalized("NFC", text)):
            why = f"{self.source}: the name of its pre-tokenizer does not say what becomes of a text that is not in Unicode normal form C"
            raise ArgumentError(f"{why}; give it in that form", code="UNSUPPORTED", field="prompt")
        return list(library.guarded(self.source, lambda: self.backend.encode(text, add_special_tokens=frame)).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens spelled out; bytes that are no UTF-8 become U+FFFD."""
        return str(library.guarded(self.source, lambda: self.backend.decode(list(ids), skip_special_tokens=False)))

    def id_to_piece(self, token: int) -> str:
        """What one id stands for inside a text; ``[id]`` where the vocabulary has nothing there."""
        if self.backend.id_to_token(token) is None:
            return f"[{token}]"
        before = self._before
        return self.decode([token]) if before is None else self.decode([before, token])[len(self.decode([before])) :]

    @functools.cached_property
    def _before(self) -> int | None:
        """A token to put in front, where decoding takes the blank at the beginning of a text away."""
        first = self.backend.token_to_id(BLANK + "a"), self.backend.token_to_id("a")
        return next((token for token in first if token is not None and self.decode([token]) == "a"), None) if self._strips else None

    @property
    def _strips(self) -> bool:
        return "Strip" in repr(self.backend.decoder) or "Metaspace" in repr(self.backend.decoder)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of what decides the ids: equal for a GGUF, an APR and a tokenizer.json of one tokenizer."""
        return library.digest(library.parts(self.backend))

    @property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def __repr__(self) -> str:
        return f"<Tokenizer of {self.size} tokens from {self.source or 'memory'}>"


# ---- tokenizer.json ------------------------------------------------------------------------------


def from_json(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a tokenizer.json; ids that end a text and the chat template come from the files beside it.

    Raises
    ------
    FormatError
        The file is missing, is not what :mod:`aprender.text.strict` lets through, or the library cannot read it.
    """
    where = Path(path)
    content = strict.decode(where, strict.read(where))
    data = strict.parse(where, content)
    strict.check(data, where)
    backend = library.guarded(str(where), lambda: tokenizers.Tokenizer.from_str(content))
    backend.no_padding()
    backend.no_truncation()
    for token in data.get("added_tokens") or ():
        if backend.token_to_id(token["content"]) != token["id"]:
            why = f"{token['content'][:64]!r} is to be {token['id']} and the library makes it {backend.token_to_id(token['content'])}"
            raise FormatError(f"{where}: added_tokens: {why}", code="TOKENIZER", path=str(where), field="added_tokens")
    folder = where.parent
    return Tokenizer(backend, _eos_beside(folder, backend), str(where), _template_beside(folder), named=_named_beside(folder))


NAMED = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id", "pad_token": "padding_token_id"}
"""Special tokens as tokenizer_config.json and chat templates call them, and the ids in metadata."""


def _named_beside(folder: Path) -> dict[str, str]:
    """Texts of the special tokens that tokenizer_config.json names."""
    config = json_object(folder / "tokenizer_config.json")
    texts = {name: token_text(config, name) for name in NAMED}
    return {name: text for name, text in texts.items() if text is not None}


def token_text(config: Mapping[str, Any], name: str) -> str | None:
    """The text of a token that tokenizer_config.json names, as text or as an object."""
    said = config.get(name)
    text = said.get("content") if isinstance(said, dict) else said
    return text if isinstance(text, str) else None


def _template_beside(folder: Path) -> str | None:
    """The chat template: chat_template.jinja, else what tokenizer_config.json says; of several the one called default."""
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        return strict.decode(beside, strict.read(beside))
    said = json_object(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(said, list):
        named = {one.get("name"): one.get("template") for one in said if isinstance(one, dict)}
        said = named.get("default")
    return said if isinstance(said, str) else None


def _eos_beside(folder: Path, backend: tokenizers.Tokenizer) -> set[int]:
    """Ids that end a text according to generation_config.json, else config.json, else tokenizer_config.json."""
    for name in ("generation_config.json", "config.json"):
        said = json_object(folder / name).get("eos_token_id")
        ids = {token for token in (said if isinstance(said, list) else [said]) if isinstance(token, int) and not isinstance(token, bool)}
        if ids:
            return ids
    text = token_text(json_object(folder / "tokenizer_config.json"), "eos_token")
    found = backend.token_to_id(text) if text is not None else None
    return set() if found is None else {found}


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if the file does not exist; FormatError if it is anything else."""
    data = strict.load(path) if path.is_file() else {}
    if not isinstance(data, dict):
        raise FormatError(f"{path}: not a JSON object", code="JSON", path=str(path))
    return data


# ---- GGUF and APR ----------------------------------------------------------------------------------


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
        Another kind of vocabulary, an unknown pre-tokenizer, or parts that do not fit together.
    ConfigError
        A list of another length than the tokens', or an id that is no token.
    """
    return _from_keys(Keys(metadata, source), metadata.get(GGUF_TEMPLATE))


def from_apr(metadata: Mapping[str, Any], source: str = "APR") -> Tokenizer:
    """The tokenizer that the metadata of an APR file describe (:data:`aprender.text.keys.APR`).

    Parameters
    ----------
    metadata : mapping
        Flat, nested objects with dots: ``tokenizer.vocabulary`` and so on.
    source : str
        Name of the file, for messages.

    Raises
    ------
    FormatError, ConfigError
        As :func:`from_gguf`.
    """
    return _from_keys(Keys(metadata, source, APR), metadata.get(APR_TEMPLATE))


def _from_keys(keys: Keys, template: Any) -> Tokenizer:
    """The tokenizer of metadata in either spelling."""
    backend = library.build(keys)
    tokens = keys.strings("tokens")
    ends = {keys.token_id(key, len(tokens)) for key in ("eos_token_id", "eot_token_id", "eom_token_id")}
    ids = {name: keys.token_id(key, len(tokens)) for name, key in NAMED.items()}
    rules = PRE_TOKENIZERS[keys.get("pre")] if keys.kind() == BYTE_LEVEL else None
    return Tokenizer(
        backend,
        (token for token in ends if token is not None),
        keys.source,
        template if isinstance(template, str) else None,
        settled=rules is None or rules.nfc is not None,
        named={name: tokens[number] for name, number in ids.items() if number is not None},
    )


def render_chat(template: str, messages: Sequence[Mapping[str, Any]], named: Mapping[str, str] | None = None) -> str:
    """See :func:`aprender.text.chat.render_chat`."""
    from aprender.text import chat

    return chat.render_chat(template, messages, named)


def gguf_metadata(folder: str | os.PathLike[str], vocab_size: int | None = None) -> dict[str, Any]:
    """See :func:`aprender.text.convert.gguf_metadata`."""
    from aprender.text import convert

    return convert.gguf_metadata(folder, vocab_size)


def apr_metadata(tokenizer: Mapping[str, Any] | str | os.PathLike[str], vocab_size: int | None = None) -> dict[str, Any]:
    """See :func:`aprender.text.convert.apr_metadata`."""
    from aprender.text import convert

    return convert.apr_metadata(tokenizer, vocab_size)


# ---- any model -----------------------------------------------------------------------------------


def for_model(path: str | os.PathLike[str], file: _core.File | None = None) -> Tokenizer | None:
    """The tokenizer in a model's own container: metadata of GGUF or APR, or the tokenizer.json beside safetensors.

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
        return None if file.metadata.get(GGUF + "model", "no_vocab") == "no_vocab" else from_gguf(file.metadata, str(where))
    if file is not None and file.container == "apr":
        return from_apr(file.metadata, str(where)) if APR["tokens"] in file.metadata else None
    beside = (where if where.is_dir() else where.parent) / "tokenizer.json"
    return from_json(beside) if beside.is_file() else None
