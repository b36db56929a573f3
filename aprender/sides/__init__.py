"""The sides: whatever can produce captures, and the one spelling by which users name them.

Owns :func:`open_side`.  Refuses unknown prefixes with a suggestion; imports an engine's module only when that engine is asked for, so that
torch is never loaded for our own.  Called by ``bisection`` and the commands.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from aprender.arithmetic import DTYPES
from aprender.errors import CannotRun, UnknownName
from aprender.stages import suggest

if TYPE_CHECKING:
    from aprender.sides.base import Side


def _own(backend: str) -> Callable[[str, str], Side]:
    def opened(rest: str, spelling: str) -> Side:
        from aprender.sides.own import OwnSide

        return OwnSide(rest, backend=backend, spelling=spelling)

    return opened


def _hf(rest: str, spelling: str) -> Side:
    name, at, dtype = rest.rpartition("@")
    if not at or "/" in dtype:  # an @ in a folder's name
        name, dtype = rest, DTYPES[0]
    if dtype not in DTYPES:
        text = f"'{spelling}': there is no dtype '{dtype}', one of {', '.join(DTYPES)} is needed"
        raise UnknownName(text, code="LOOKUP", field="dtype")
    return open_hf(name, dtype, spelling)


def open_hf(name: str, dtype: str = DTYPES[0], spelling: str | None = None) -> Side:
    """A Hugging Face side; CannotRun where torch or transformers is not installed."""
    try:
        from aprender.sides.hf import HFSide
    except ImportError as error:
        text = f"hf: sides need torch and transformers 5: pip install 'aprender[hf]' ({error})"
        raise CannotRun(text, code="IMPORT", field=error.name) from None
    return HFSide(name, dtype, spelling)


def _saved(rest: str, spelling: str) -> Side:
    from aprender.sides.saved import SavedSide

    return SavedSide(rest, spelling=spelling)


def _llamacpp(rest: str, spelling: str) -> Side:
    from aprender.sides.llamacpp import PROFILES, LlamaCppSide

    name, at, cache = rest.rpartition("@")
    if not at or "/" in cache:  # an @ in a folder's name
        name, cache = rest, next(iter(PROFILES))
    if cache not in PROFILES:
        text = f"'{spelling}': keys and values cannot be kept in '{cache}', one of {', '.join(PROFILES)} is needed"
        raise UnknownName(text, code="LOOKUP", field="cache")
    return LlamaCppSide(name, cache=cache, spelling=spelling)


PREFIXES: Mapping[str, Callable[[str, str], Side]] = {
    "cpu": _own("cpu"), "cuda": _own("cuda"), "hf": _hf, "saved": _saved, "llama.cpp": _llamacpp,
}  # fmt: skip
"""Prefix before the first colon to what opens the rest."""


def open_side(spelling: str | os.PathLike[str]) -> Side:
    """Open a side by its spelling.

    Parameters
    ----------
    spelling : str or Path
        ``model.gguf`` or ``folder/`` (our engine), ``cpu:`` or ``cuda:`` before it, ``hf:NAME_OR_FOLDER[@float32|@float16|@bfloat16]``,
        ``llama.cpp:model.gguf[@f32|@f16]``, ``saved:folder``.

    Returns
    -------
    Side

    Raises
    ------
    UnknownName
        No side has that prefix.
    CannotRun, FormatError, ConfigError, OSError
        The side exists but cannot be opened.
    """
    text = os.fspath(spelling)
    prefix, colon, rest = text.partition(":")
    if not colon or Path(text).exists():
        return _own("cpu")(text, text)
    if prefix in PREFIXES:
        if not rest:
            raise CannotRun(f"'{text}' names nothing after '{prefix}:'", code="ARGUMENT", field="side")
        return PREFIXES[prefix](rest, text)
    if prefix.isidentifier():
        raise UnknownName(f"there is no side '{prefix}:'{suggest(prefix, PREFIXES)}", code="LOOKUP", field="side")
    return _own("cpu")(text, text)
