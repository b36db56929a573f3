"""What the numbers of a capture are: the manifest, one note per tensor, and their JSON.

Owns :class:`Manifest`, :class:`TensorNote` and the words that both may use.  Refuses JSON of another schema, and entries that are missing
or of another kind.  Knows no array and no folder.  Called by ``captures`` (which writes and reads it) and by the sides (which fill it).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprender import stages
from aprender.errors import FormatError
from aprender.stages import Key

SCHEMA, TREE = "aprender.captures/1", "aprender.aprt/1"  # of a folder of ours, and of an APRT tree of ours

ALL, LAST = "all", "last"  # positions that a tensor holds
HALVES, PAIRS = "halves", "pairs"  # RoPE partners of a head: (i, i + h/2) as in Hugging Face, or (2i, 2i + 1)
CAPTURED, DERIVED = "captured", "derived"
AS_DEFINED = "as defined"  # the capture point that the row of the stage describes
HELD = "held"  # entry of a manifest's ``arithmetic``: parameters as the running engine holds them, name -> where -> value


@dataclass(frozen=True, slots=True)
class TensorNote:
    """What one array is.

    Attributes
    ----------
    shape : tuple of int
    dtype : str
        Native type on the side, as NumPy spells it (``float16``, ``bfloat16``, ``float32``); arrays in memory are float32.
    origin : str
        ``captured``, or ``derived`` where we recomputed what the side does not show: no local verdict there.
    positions : str
        ``all`` tokens or the ``last`` one only.
    lanes : str
        Order of the two RoPE partners in a head: ``halves`` (ours and Hugging Face's) or ``pairs``.
    capture_point : str
        ``as defined``, or in words what the side shows instead (``unscaled``).
    site : str
        Where it was taken, for people; not part of the contract.
    nonfinite : int
        Elements that are NaN or infinite.
    sha256 : str or None
        Of the native bytes on disk; None in memory.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    origin: str = CAPTURED
    positions: str = ALL
    lanes: str = HALVES
    capture_point: str = AS_DEFINED
    site: str = ""
    nonfinite: int = 0
    sha256: str | None = None

    @classmethod
    def of(cls, array: NDArray[Any], dtype: str = "float32", origin: str = CAPTURED, site: str = "", lanes: str = HALVES) -> TensorNote:
        """The note of an array: its shape and non-finite elements counted, the rest as said."""
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        return cls(shape=tuple(array.shape), dtype=dtype, origin=origin, lanes=lanes, site=site, nonfinite=bad)


@dataclass(frozen=True)
class Manifest:
    """What the numbers of a capture are and who made them.

    Attributes
    ----------
    side : str
        Spelling of the side, without machine-specific paths where the maker can avoid them (``hf:canary@float16``).
    tokens : tuple of int
        Token ids, one sequence.
    positions : tuple of int
        Position of each token.
    producer, version, backend, tier : str or None
        Software, its version, device and CPU level that computed the values.
    profile : str or None
        Row of :mod:`aprender.arithmetic` that the side declares.
    threads : int or None
    model_digest, tokenizer_digest : str or None
        SHA-256, hexadecimal.
    prompt : str or None
        Text that the ids came from.
    arch : str
    flags : frozenset of str
    hparams : dict
        As the side holds them: ``layers dim ffn heads kv_heads head vocab context eps theta``.
    attestation : bool or None
        Traced and untraced logits bit-equal; None if not tried.
    answer : str or None
    answer_ids : tuple of int
        Greedy continuation of the prompt by the same side.
    answer_margin : float or None
        Smallest gap between the two largest logits along the answer.
    floor : float or None
        Relative L2 of the logits against the same side in float32: what the number format alone costs.
    arithmetic : dict
        Plain data measured on the machine that made it (accumulation order, RoPE buffer type), for the arithmetic profile; and ``held``,
        the parameters that the running engine holds, by name and by where each value was first met (``judge.loaded`` has the names).
    tensors : dict of Key to TensorNote
    notes : tuple of str
        Sentences for the reader.
    schema : str
        Which folder it describes: ``SCHEMA`` or ``TREE``.
    """

    side: str
    tokens: tuple[int, ...]
    positions: tuple[int, ...] = ()
    producer: str | None = None
    version: str | None = None
    backend: str | None = None
    tier: str | None = None
    profile: str | None = None
    threads: int | None = None
    model_digest: str | None = None
    tokenizer_digest: str | None = None
    prompt: str | None = None
    arch: str = ""
    flags: frozenset[str] = frozenset()
    hparams: dict[str, int | float] = field(default_factory=dict)
    attestation: bool | None = None
    answer: str | None = None
    answer_ids: tuple[int, ...] = ()
    answer_margin: float | None = None
    floor: float | None = None
    arithmetic: dict[str, Any] = field(default_factory=dict)
    tensors: dict[Key, TensorNote] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    schema: str = SCHEMA

    def to_json(self, more: Mapping[Key, Mapping[str, object]] | None = None) -> str:
        """JSON text, one line per entry and per tensor, so that two manifests can be compared by eye.

        Parameters
        ----------
        more : mapping, optional
            Further entries of tensors, for other readers: :meth:`from_json` passes over them.
        """
        data: dict[str, Any] = {"schema": self.schema} | {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tensors"}
        data["flags"] = sorted(self.flags)
        lines = [f"  {json.dumps(name)}: {_dump(value)}" for name, value in data.items()]
        keys, more = sorted(self.tensors, key=stages.order), more or {}
        rows = [f"    {json.dumps(key_name(key))}: {_dump(asdict(self.tensors[key]) | dict(more.get(key, {})))}" for key in keys]
        lines.append('  "tensors": {\n' + ",\n".join(rows) + ("\n  }" if rows else "  }"))
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str, path: str = "manifest") -> Manifest:
        """The manifest of a text made by :meth:`to_json`.

        Raises
        ------
        FormatError
            Not JSON, another schema, or a missing or mistyped entry; ``path`` and ``field`` say where.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path}: not JSON: {error}", code="JSON", path=path) from None
        if not isinstance(data, dict) or data.get("schema") not in (SCHEMA, TREE):
            found = data.get("schema") if isinstance(data, dict) else None
            raise FormatError(f"{path}: schema {found!r}, {SCHEMA!r} or {TREE!r} is needed", code="BAD_VERSION", path=path, field="schema")
        said = _checked(data, _MANIFEST_KINDS, path) | {"schema": data["schema"]}
        said["tensors"] = {_key_of(name, path): _note(value, name, path) for name, value in said["tensors"].items()}
        made = cls(**said)
        if len(made.positions) not in (0, len(made.tokens)):
            counts = f"{len(made.positions)} positions for {len(made.tokens)} tokens"
            raise FormatError(f"{path}: {counts}", code="VALUE", path=path, field="positions")
        return made


def _dump(value: object) -> str:
    """One JSON line; a non-finite number, which JSON does not have, is null."""
    if isinstance(value, float) and not math.isfinite(value):
        value = None
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def key_name(key: Key) -> str:
    """A key as the manifest spells it: ``ffn_out.3``, ``lm_head``."""
    return key[0] if key[1] is None else f"{key[0]}.{key[1]}"


def _key_of(name: str, path: str) -> Key:
    """The key that :func:`key_name` spelled; FormatError for a stage that no row has, or a layer where none belongs."""
    stage, dot, layer = name.partition(".")
    row = stages.by_name.get(stage)
    if row is None or row.per_layer != bool(dot) or (dot and re.fullmatch(r"\d{1,6}", layer) is None):
        raise FormatError(f"{path}: '{name}' names no tensor", code="NAME", path=path, field=f"tensors.{name}")
    return stage, int(layer) if dot else None


Check = Callable[[object], Any]


def _is(*kinds: type) -> Check:
    """A check that returns the value if its type is one of these (a bool is no number), else raises TypeError."""

    def check(value: object) -> object:
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise TypeError
        return value

    return check


def _count(value: object) -> int:
    """A whole number that is not negative and that 64 bits hold."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise TypeError
    return value


def _list(one: Check) -> Check:
    """A check of a JSON array's elements; gives a tuple."""
    return lambda value: tuple(one(item) for item in _is(list)(value))


_text, _maybe_text, _number = _is(str), _is(str, type(None)), _is(int, float)
_maybe_number = _is(int, float, type(None))

_MANIFEST_KINDS: Mapping[str, Check] = {
    "side": _text, "tokens": _list(_count), "positions": _list(_count), "producer": _maybe_text, "version": _maybe_text,
    "backend": _maybe_text, "tier": _maybe_text, "profile": _maybe_text, "threads": _is(int, type(None)), "model_digest": _maybe_text,
    "tokenizer_digest": _maybe_text, "prompt": _maybe_text, "arch": _text, "flags": lambda value: frozenset(_list(_text)(value)),
    "hparams": lambda value: {name: _number(item) for name, item in _is(dict)(value).items()}, "attestation": _is(bool, type(None)),
    "answer": _maybe_text, "answer_ids": _list(_count), "answer_margin": _maybe_number, "floor": _maybe_number, "arithmetic": _is(dict),
    "tensors": _is(dict), "notes": _list(_text),
}  # fmt: skip

_NOTE_KINDS: Mapping[str, Check] = {
    "shape": _list(_count), "dtype": _text, "origin": _text, "positions": _text, "lanes": _text, "capture_point": _text, "site": _text,
    "nonfinite": _count, "sha256": _maybe_text,
}  # fmt: skip

_WORDS: Mapping[str, tuple[str, ...]] = {
    "dtype": ("float32", "float16", "bfloat16"), "origin": (CAPTURED, DERIVED), "positions": (ALL, LAST), "lanes": (HALVES, PAIRS),
}  # fmt: skip


def _checked(data: dict[str, object], kinds: Mapping[str, Check], path: str, prefix: str = "") -> dict[str, Any]:
    """The entries of an object of the manifest, each of the kind that it must be."""
    said = {}
    for name, check in kinds.items():
        if name not in data:
            raise FormatError(f"{path}: '{prefix}{name}' is missing", code="MISSING", path=path, field=prefix + name)
        try:
            said[name] = check(data[name])
        except TypeError:
            shown = repr(data[name])
            shown = shown if len(shown) < 60 else shown[:60] + "…"
            raise FormatError(f"{path}: '{prefix}{name}' cannot be {shown}", code="TYPE", path=path, field=prefix + name) from None
    return said


def _note(data: object, name: str, path: str) -> TensorNote:
    """One tensor's note, checked."""
    where = f"tensors.{name}"
    if not isinstance(data, dict):
        raise FormatError(f"{path}: '{where}' is not an object", code="TYPE", path=path, field=where)
    said = _checked(data, _NOTE_KINDS, path, f"{where}.")
    for entry, words in _WORDS.items():
        if said[entry] not in words:
            wanted = f"is {said[entry]!r}, one of {', '.join(words)} is needed"
            raise FormatError(f"{path}: '{where}.{entry}' {wanted}", code="VALUE", path=path, field=f"{where}.{entry}")
    return TensorNote(**said)
