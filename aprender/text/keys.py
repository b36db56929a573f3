"""The keys under which a tokenizer lies in metadata: GGUF's, and the same things in APR.

Owns the table of both spellings, :class:`Keys`, which reads either, and :func:`to_apr`.  Refuses values of the wrong type by the name of
their key.  Called by ``backend`` and by the doors of this package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aprender.errors import ConfigError, Error, FormatError
from aprender.text.words import BYTE_LEVEL

GGUF = "tokenizer.ggml."
"""Prefix of GGUF's tokenizer keys."""

APR: Mapping[str, str] = {
    "model": "tokenizer.model_type",
    "pre": "tokenizer.pre_type",
    "tokens": "tokenizer.vocabulary",
    "token_type": "tokenizer.token_types",
    "merges": "tokenizer.merges",
    "scores": "tokenizer.scores",
    "bos_token_id": "tokenizer.bos_token_id",
    "eos_token_id": "tokenizer.eos_token_id",
    "eot_token_id": "tokenizer.eot_token_id",
    "eom_token_id": "tokenizer.eom_token_id",
    "unknown_token_id": "tokenizer.unknown_token_id",
    "padding_token_id": "tokenizer.padding_token_id",
    "add_bos_token": "tokenizer.add_bos_token",
    "add_eos_token": "tokenizer.add_eos_token",
    "add_space_prefix": "tokenizer.add_space_prefix",
    "remove_extra_whitespaces": "tokenizer.remove_extra_whitespaces",
}
"""What GGUF calls ``tokenizer.ggml.KEY`` and what APR calls it.

``vocabulary``, ``merges``, ``scores``, ``bos_token_id``, ``eos_token_id``, ``model_type`` and ``pre_type`` are APR's own keys.  The others
are added by this package's writer, so that nothing is lost: ``token_types`` (list of int, one per token: 1 word, 2 unknown, 3 control,
4 user defined, 5 unused, 6 byte), ``add_bos_token``, ``add_eos_token`` and ``add_space_prefix`` (bool), further special ids (int).
"""

APR_SIZE = "tokenizer.vocab_size"
GGUF_TEMPLATE, APR_TEMPLATE = "tokenizer.chat_template", "chat_template"


class Keys:
    """A tokenizer's metadata under GGUF's short names, whichever container they came from.

    Parameters
    ----------
    metadata : mapping
        Keys as in the file.
    source : str
        Name of the file, for messages.
    spelling : mapping, optional
        Short name to key, :data:`APR`; GGUF's prefix is put in front if not given.
    """

    def __init__(self, metadata: Mapping[str, Any], source: str, spelling: Mapping[str, str] | None = None) -> None:
        self.metadata, self.source, self._spelling = metadata, source, spelling

    def name(self, key: str) -> str:
        """The key as the file spells it."""
        return GGUF + key if self._spelling is None else self._spelling.get(key, "tokenizer." + key)

    @property
    def is_apr(self) -> bool:
        """The metadata are those of an APR file."""
        return self._spelling is not None

    def kind(self) -> Any:
        """The kind of vocabulary as GGUF names it; APR files of other writers call byte-level BPE "bpe" or leave it to the merges."""
        said = self.get("model")
        if self.is_apr and (said is None or str(said).lower() == "bpe"):
            return BYTE_LEVEL if self.get("merges") is not None and self.get("scores") is None else said
        return said

    def get(self, key: str) -> Any:
        """The value, None if the file has none."""
        return self.metadata.get(self.name(key))

    def refusal(self, key: str, why: str, code: str = "VALUE") -> Error:
        """The error for a key."""
        kind = ConfigError if code == "CONFIG" else FormatError
        return kind(f"{self.source}: {self.name(key)}: {why}", code=code, path=self.source, field=self.name(key))

    def strings(self, key: str) -> list[str]:
        """A list of strings."""
        found = self.get(key)
        if not isinstance(found, list | tuple) or not all(isinstance(word, str) for word in found):
            raise self.refusal(key, "a list of strings is needed", "MISSING" if found is None else "TYPE")
        return list(found)

    def numbers(self, key: str, count: int, dtypes: tuple[str, ...]) -> list[Any] | None:
        """One number per token, None if the file has none.

        Parameters
        ----------
        key : str
        count : int
            Number of tokens.
        dtypes : tuple of str
            NumPy types that an array may have; a list's numbers must fit the first.
        """
        found = self.get(key)
        if found is None:
            return None
        array = found if isinstance(found, np.ndarray) else np.asarray(found)
        fits = array.dtype.name in dtypes if array is found else array.dtype.kind in {np.dtype(name).kind for name in (*dtypes, "int32")}
        if array.ndim != 1 or (array.size and not fits):
            raise self.refusal(key, f"a list of {dtypes[0]} is needed, not {array.dtype} of {array.ndim} dimensions", "KV_TYPE")
        if array.size != count:
            raise self.refusal(key, f"{array.size} values for {count} tokens", "CONFIG")
        return list(array.tolist())

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        found = self.get(key)
        if found is not None and not isinstance(found, bool | np.bool_):
            raise self.refusal(key, f"{found!r} is neither true nor false", "TYPE")
        return default if found is None else bool(found)

    def token_id(self, key: str, count: int) -> int | None:
        """An id, None if the file has none."""
        found = self.get(key)
        if found is None:
            return None
        if isinstance(found, bool) or not isinstance(found, int | np.integer) or not 0 <= found < count:
            raise self.refusal(key, f"{found!r} is no token of {count}", "CONFIG")
        return int(found)


def to_apr(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """GGUF's tokenizer keys as APR's; values become what JSON can hold."""
    said = {apr: _plain(metadata[GGUF + key]) for key, apr in APR.items() if GGUF + key in metadata}
    if GGUF + "tokens" in metadata:
        said[APR_SIZE] = len(metadata[GGUF + "tokens"])
    if GGUF_TEMPLATE in metadata:
        said[APR_TEMPLATE] = metadata[GGUF_TEMPLATE]
    return said


def _plain(value: Any) -> Any:
    """Python's own types instead of NumPy's."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
