"""Text to token ids and back, from whatever tokenizer a model's own container holds.

Owns :class:`Tokenizer`, a thin door to the ``tokenizers`` library, and its doors from GGUF metadata, APR metadata and tokenizer.json, such
that all give identical ids.  GGUF names its pre-tokenizer without saying what it does: the known names are rows of ``words``, another
name is refused (a nearly right pattern would split some texts wrongly and nobody would see).  Returns a chat template as text and applies
none.  Called by the sides, the commands and the writers.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from aprender import _core
from aprender.errors import ArgumentError, FormatError
from aprender.text import backend as library
from aprender.text.keys import APR, APR_TEMPLATE, GGUF, GGUF_TEMPLATE, Keys
from aprender.text.sentencepiece import BLANK
from aprender.text.words import PRE_TOKENIZERS, PreTokenizer

__all__ = [
    "ENDINGS", "PRE_TOKENIZERS", "PreTokenizer", "Tokenizer", "apr_metadata", "for_model", "from_apr", "from_gguf", "from_json",
    "gguf_metadata",
]  # fmt: skip

ENDINGS = ("<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")
"""Special tokens that end a text whatever else a container declares: GGUF has room for one or two, generation_config.json lists all."""


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

    Attributes
    ----------
    backend : tokenizers.Tokenizer
    eos_ids : frozenset of int
    source : str
    digest : str
        SHA-256 of what decides the ids.
    chat_template : str or None
        Never rendered here.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, eos_ids: Iterable[int] = (), source: str = "", chat_template: str | None = None
    ) -> None:
        self.backend = backend
        added = backend.get_added_tokens_decoder()
        known = {number for number, token in added.items() if token.special and token.content in ENDINGS}
        self.eos_ids: frozenset[int] = frozenset(eos_ids) | known
        self.source = source
        self.chat_template = chat_template
        self.digest = library.digest(backend)

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
        return list(self.backend.encode(text, add_special_tokens=True).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens spelled out; bytes that are no UTF-8 become U+FFFD."""
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

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

    @property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def __repr__(self) -> str:
        return f"<Tokenizer of {self.size} tokens from {self.source or 'memory'}>"


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
    return Tokenizer(backend, _eos_beside(where.parent, backend), str(where), _template_beside(where.parent))


def _template_beside(folder: Path) -> str | None:
    """The chat template: chat_template.jinja, else what tokenizer_config.json says; of several the one called default."""
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        try:
            return beside.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"{beside}: not UTF-8 at byte {error.start}", code="UTF8", path=str(beside), offset=error.start) from None
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
    said = json_object(folder / "tokenizer_config.json").get("eos_token")
    text = said.get("content") if isinstance(said, dict) else said
    found = backend.token_to_id(text) if isinstance(text, str) else None
    return set() if found is None else {found}


def json_object(path: Path) -> dict[str, Any]:
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
    count = len(keys.get("tokens"))
    ends = (keys.token_id(key, count) for key in ("eos_token_id", "eot_token_id", "eom_token_id"))
    return Tokenizer(backend, {token for token in ends if token is not None}, keys.source, template if isinstance(template, str) else None)


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
