"""The sides: whatever can produce captures, and the one spelling by which users name them.

Owns :func:`open_side`.  Refuses unknown prefixes with a suggestion; imports an engine's module only when that engine is asked for, so that torch is
never loaded for our own.  Called by ``bisection`` and the commands.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aprender.errors import CannotRun, UnknownName
from aprender.stages import suggest

DTYPES = ("float32", "float16", "bfloat16")


def _own(backend: str) -> Callable[[str, str], Any]:
    def opened(rest: str, spelling: str) -> Any:
        from aprender.sides.own import OwnSide

        return OwnSide(rest, backend=backend, spelling=spelling)

    return opened


def _hf(rest: str, spelling: str) -> Any:
    from aprender.sides.hf import HFSide

    name, at, dtype = rest.rpartition("@")
    if not at or "/" in dtype:
        name, dtype = rest, "float16"
    if dtype not in DTYPES:
        raise UnknownName(f"'{spelling}': there is no dtype '{dtype}', one of {', '.join(DTYPES)} is needed", code="LOOKUP", field="dtype")
    return HFSide(name, dtype=dtype, spelling=spelling)


def _saved(rest: str, spelling: str) -> Any:
    from aprender.sides.saved import SavedSide

    return SavedSide(rest, spelling=spelling)


PREFIXES: Mapping[str, Callable[[str, str], Any]] = {"cpu": _own("cpu"), "cuda": _own("cuda"), "hf": _hf, "saved": _saved}
"""Prefix before the first colon to what opens the rest."""


def open_side(spelling: str | os.PathLike[str]) -> Any:
    """Open a side by its spelling.

    Parameters
    ----------
    spelling : str or Path
        ``model.gguf`` or ``folder/`` (our engine), ``cpu:`` or ``cuda:`` before it, ``hf:NAME_OR_FOLDER[@float32|@float16|@bfloat16]``,
        ``saved:folder``.

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
    if colon and prefix in PREFIXES and not Path(text).exists():
        if not rest:
            raise CannotRun(f"'{text}' names nothing after '{prefix}:'", code="ARGUMENT", field="side")
        return PREFIXES[prefix](rest, text)
    if colon and prefix.isidentifier() and not Path(text).exists():
        raise UnknownName(f"there is no side '{prefix}:'{suggest(prefix, PREFIXES)}", code="LOOKUP", field="side")
    return _own("cpu")(text, text)
