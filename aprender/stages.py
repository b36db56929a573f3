"""The public vocabulary: one :class:`Stage` per row of ``csrc/plan/stages.def``, and the ways to name and select stages.

Owns the rows as Python sees them, their execution order, the alias of the last row of a layer, and the two little languages of the
command line: a selection (``3.attn_*,*.ffn_out,lm_head``) and a range of layers (``0..4``).  Refuses names that no row has, with the
nearest one as a suggestion.  No list of stages is written here: everything comes from the table that the extension exports.  Called by
captures, the sides, the judge, the reports and every command.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from aprender import _core
from aprender.errors import ArgumentError, UnknownName

Key = tuple[str, int | None]
"""Name of one tensor of one forward pass: stage and layer; the layer is None for stages of the whole model."""

Selection = Callable[[Key], bool]


@dataclass(frozen=True, slots=True)
class Stage:
    """One row of ``stages.def``.

    Attributes
    ----------
    name : str
        Public name, as in every report, file and option.
    span : str
        ``ONCE`` before the layers, ``LAYER`` in each of them, ``TAIL`` after them.
    op : str
        Operation, a row of ``ops.def``.
    out, a, b : str or None
        Wires written and read.
    weight, bias : str or None
        Group of rows of ``weights.def`` that the operation reads.
    shape : tuple of str
        Symbols, outermost first: T tokens, D model, H heads, h head size, Qd, Kd, QKV = Qd + 2 Kd, J keys, F ffn, V vocabulary.
    flag : str
        Architecture flag that switches the row on, or ``ALWAYS``.
    lanes : str
        What a foreign side may have permuted: ``-``, ``HEADS`` or ``ROPE``.
    hf, node : str
        Where Hugging Face and llama.cpp show it.
    population : str
        Tokens that an APRT file of the stage holds: ``ALL``, ``LAST`` or ``NONE`` (not written).
    """

    name: str
    span: str
    op: str
    out: str | None
    a: str | None
    b: str | None
    weight: str | None
    bias: str | None
    shape: tuple[str, ...]
    flag: str
    lanes: str
    hf: str
    node: str
    population: str

    @property
    def per_layer(self) -> bool:
        """Whether every layer has one."""
        return self.span == "LAYER"

    def dims(self, hparams: Mapping[str, int | float], tokens: int, keys: int | None = None) -> tuple[int, ...]:
        """Shape of the tensor for a model, in elements.

        Parameters
        ----------
        hparams : mapping
            At least ``dim ffn heads kv_heads head vocab``.
        tokens : int
            T.
        keys : int, optional
            J; as many as there are tokens if not given.

        Raises
        ------
        KeyError
            A hyper-parameter that the shape needs is not in ``hparams``.
        """
        q = int(hparams["heads"]) * int(hparams["head"])
        k = int(hparams["kv_heads"]) * int(hparams["head"])
        size = {"T": tokens, "J": tokens if keys is None else keys, "D": int(hparams["dim"]), "H": int(hparams["heads"])}
        size |= {"h": int(hparams["head"]), "Qd": q, "Kd": k, "QKV": q + 2 * k, "F": int(hparams["ffn"]), "V": int(hparams["vocab"])}
        return tuple(size[symbol] for symbol in self.shape)


def _from_row(row: tuple[object, ...]) -> Stage:
    """One exported row as a Stage; an absent wire or weight comes as None or as the word the row file uses."""
    cell = [None if value is None or value == "NONE" else str(value) for value in row]
    name, span, op, out, a, b, shape, weight, bias, flag, lanes, hf, node, _ = cell
    population = str(row[13])  # here NONE is a value: "an APRT tree has no such file"
    return Stage(
        name=name or "", span=span or "", op=op or "", out=out, a=a, b=b, weight=weight, bias=bias, shape=tuple((shape or "").split()),
        flag=flag or "ALWAYS", lanes=lanes or "-", hf=hf or "", node=node or "", population=population,
    )  # fmt: skip


STAGES: tuple[Stage, ...] = tuple(_from_row(tuple(row)) for row in _core.STAGES)
"""Every stage, in execution order."""

by_name: Mapping[str, Stage] = {row.name: row for row in STAGES}
_order: Mapping[str, int] = {row.name: i for i, row in enumerate(STAGES)}

LOGITS: Key = (STAGES[-1].name, None)
"""The last row: what text is made from."""

# What other tools call the value that leaves a layer is the last row of the layer, whatever that row is.
ALIASES: Mapping[str, str] = {"layer_output": [row.name for row in STAGES if row.per_layer][-1]}


def suggest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known name, or the empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def stage(name: str) -> Stage:
    """The row of a name or alias.

    Raises
    ------
    UnknownName
        No row has that name; the message suggests the nearest.
    """
    found = by_name.get(ALIASES.get(name, name))
    if found is None:
        raise UnknownName(f"there is no stage '{name}'{suggest(name, [*by_name, *ALIASES])}", code="LOOKUP", field="stage", stage=name)
    return found


def index(name: str) -> int:
    """Place of a stage in execution order, 0 first; raises :class:`UnknownName`."""
    return _order[stage(name).name]


def order(key: Key) -> tuple[int, int, int]:
    """Sort key that puts (stage, layer) pairs in execution order."""
    row = stage(key[0])
    span = ("ONCE", "LAYER", "TAIL").index(row.span)
    return span, -1 if key[1] is None else key[1], _order[row.name]


def active(row: Stage | str, flags: Iterable[str]) -> bool:
    """Whether a model with these flags has this stage."""
    wanted = (stage(row) if isinstance(row, str) else row).flag
    return wanted == "ALWAYS" or {part.strip() for part in wanted.split("|")} <= set(flags)


def keys(flags: Iterable[str], layers: int) -> list[Key]:
    """All (stage, layer) pairs of a model, in execution order.

    Parameters
    ----------
    flags : iterable of str
        The model's flags (rows of ``flags.def``).
    layers : int
        Number of layers.
    """
    flags = frozenset(flags)
    rows = [row for row in STAGES if active(row, flags)]
    once: list[Key] = [(row.name, None) for row in rows if row.span == "ONCE"]
    each: list[Key] = [(row.name, i) for i in range(layers) for row in rows if row.per_layer]
    tail: list[Key] = [(row.name, None) for row in rows if row.span == "TAIL"]
    return once + each + tail


def spell(key: Key) -> str:
    """A key as people and selections write it: ``3.ffn_out``, ``lm_head``."""
    return key[0] if key[1] is None else f"{key[1]}.{key[0]}"


def parse_layers(text: str) -> range:
    """``"2..5"`` is layers 2, 3 and 4 (the end is exclusive, as in APRT traces); ``"3"`` is layer 3.

    Raises
    ------
    ArgumentError
        Not of that form, or empty.
    """
    match = re.fullmatch(r"\s*(\d+)(?:\.\.(\d+))?\s*", text)
    if match is None:
        raise ArgumentError(f"layers '{text}' are not of the form a..b (b exclusive) or n", code="ARGUMENT", field="layers")
    start = int(match[1])
    end = start + 1 if match[2] is None else int(match[2])
    if end <= start:
        raise ArgumentError(f"layers '{text}' hold no layer: the end is exclusive", code="ARGUMENT", field="layers")
    return range(start, end)


def parse_selection(text: str) -> Selection:
    """Which stages a list of patterns means.

    Parameters
    ----------
    text : str
        Patterns separated by commas: ``[LAYERS.]STAGE``.  STAGE is a name, an alias or a shell pattern; LAYERS is ``n``, ``a..b``
        (b exclusive) or ``*`` (each layer).  Without LAYERS a pattern means every layer and the whole-model stages.

    Returns
    -------
    callable
        Takes a :data:`Key`, says whether it is selected.

    Raises
    ------
    UnknownName
        A pattern that no stage matches.
    ArgumentError
        An empty selection, bad layers, or a layer for a stage of the whole model.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ArgumentError(f"the selection '{text}' has an empty pattern", code="ARGUMENT", field="stages")
    chosen = [_pattern(part) for part in parts]
    return lambda key: any(one(key) for one in chosen)


def _pattern(part: str) -> Selection:
    """One pattern of a selection as a predicate."""
    where, dot, what = part.rpartition(".")
    if any(sign in what for sign in "*?["):
        rows = [row for row in STAGES if fnmatch.fnmatchcase(row.name, what)]
        if not rows:
            raise UnknownName(f"no stage matches '{what}'", code="LOOKUP", field="stage", stage=what)
    else:
        rows = [stage(what)]
    names = frozenset(row.name for row in rows)
    if not dot:
        return lambda key: key[0] in names
    if not any(row.per_layer for row in rows):
        raise ArgumentError(f"'{part}': '{what}' belongs to the whole model, not to a layer", code="ARGUMENT", field="stages", stage=what)
    if where == "*":
        return lambda key: key[0] in names and key[1] is not None
    layers = parse_layers(where)
    return lambda key: key[0] in names and key[1] is not None and key[1] in layers
