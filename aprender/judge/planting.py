"""A fault of the catalogue at chosen sites of a model: what ``--plant`` means, and the listing for people.

Owns :func:`plant`, which makes the edits that a side is given, and where a planted fault must show.  Refuses names that are no fault's, and
sites that the model does not have.  Called by ``bisection`` (``--plant``) and by the command ``bisect`` (``--list-faults``).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from aprender import _core, stages
from aprender.errors import ArgumentError, UnknownName
from aprender.judge.faultrow import Edit, FaultRow, Flags
from aprender.judge.faults import CONTROLS, FAULTS
from aprender.judge.witness import HParams
from aprender.stages import Key


def first_visible(key: Key, visible: Iterable[Key], flags: Flags, layers: int) -> Key | None:
    """Where a fault of a stage must show on a side that shows only some stages: there, else at the first visible stage after it."""
    every, shown = stages.keys(flags, layers), frozenset(visible)
    return next((later for later in every[every.index(key) :] if later in shown), None)


@dataclass(frozen=True)
class Plant:
    """A fault at chosen sites of a model.

    Attributes
    ----------
    fault : FaultRow
    sites : tuple of Key
        In execution order; the first is what a bisection must name.
    edits : tuple of mapping
        What ``sides/own.py`` applies.
    """

    fault: FaultRow
    sites: tuple[Key, ...]
    edits: tuple[Edit, ...]


def plant(text: str, flags: Flags, hparams: HParams) -> Plant:
    """What ``--plant NAME[@SELECTOR]`` means for a model.

    Parameters
    ----------
    text : str
        Name of a fault or a control; after ``@`` a selection of stages as everywhere (``transposed@lm_head``, ``eps@0.attn_norm``).
        Without one, every site of the model.
    flags, hparams : frozenset, mapping
        The model.

    Raises
    ------
    UnknownName
        No such fault, or no such stage; the message suggests the nearest.
    ArgumentError
        The model has no such site; the message says which it has.
    """
    name, at, selector = text.partition("@")
    known = {**FAULTS, **CONTROLS}
    if name not in known:
        near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
        hint = f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(known)}"
        raise UnknownName(f"there is no fault '{name}'{hint}", code="LOOKUP", field="plant")
    row = known[name]
    everywhere = row.sites(flags, hparams)
    chosen = stages.parse_selection(selector) if at else lambda key: True
    sites = tuple(key for key in everywhere if chosen(key))
    if not sites:
        where = f"it can sit at {_several(everywhere)}" if everywhere else "this model has no place for it"
        raise ArgumentError(f"the fault '{text}' has no site in this model: {where}", code="ARGUMENT", field="plant")
    return Plant(row, sites, tuple(edit for key in sites for edit in row.edits(*key, flags)))


def _several(keys: Iterable[Key]) -> str:
    """Stages of some keys, each once."""
    return ", ".join(dict.fromkeys(key[0] for key in keys))


def listing(flags: Flags | None = None, hparams: HParams | None = None) -> str:
    """The catalogue for people: a line per fault, and below it the stages where this model (any, if none is given) can have it."""
    every = frozenset(name for name, _ in _core.FLAGS) if flags is None else flags
    shape: HParams = {"layers": 2, "heads": 4, "kv_heads": 2, "theta": 1e6} if hparams is None else hparams
    known = {**FAULTS, **CONTROLS}
    width = max(map(len, known)) + 2
    lines = []
    for row in known.values():
        where = _several(row.sites(every, shape)) or "no place in this model"
        lines += [f"{row.name:{width}}{row.text}", f"{'':{width}}at {where}"]
    return "\n".join(lines)
