"""What a side loaded against what its file says, and what one file says against another: before any stage is judged.

Owns the comparison of hyper-parameters and of weights as values, and the two findings that follow from it.  Refuses to open a file (the
caller reads it with the plain reference decoder) and to accuse an operation: a side whose every operation is right can still compute with
the wrong numbers, and then a replay on its own numbers agrees with it.  Called by ``judgement``.

What a running engine holds it says itself, in the manifest of its captures (``manifest.HELD``): parameters by name and by where each value
was met, a module, a node of its graph, a function of its API.  :data:`DUE` says what the file makes of each.

A weight that a side computes with must be the file's value rounded to the side's number format, every bit of it: a cast has one right
answer.  So there is no tolerance here, and no digest either: the values are read once in any case, and they say where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aprender import stages
from aprender.arithmetic import F32, Format
from aprender.errors import ArgumentError
from aprender.judge import witness
from aprender.judge.rounding import to_format
from aprender.judge.witness import HParams, ModelData
from aprender.stages import Key

LOADED, FILES_DIFFER = "loaded", "files_differ"

UNREAD = ("context",)
"""Hyper-parameters that no operation reads: two files may differ in them without a difference in any number."""

STORAGE = frozenset({"UNTIED"})
"""Flags that say how often a table is stored, and nothing about what is computed."""

PIECE = 1 << 22
"""Elements that are cast and compared at once."""


@dataclass(frozen=True)
class Difference:
    """One thing that two holders of a model have different values of.

    Attributes
    ----------
    what : str
        A hyper-parameter, or a weight with its first element that differs, in words.
    here, there : str
        The value of the side (of the subject), and of its file (of the reference).
    more : str
        How much else of it differs, in words; empty if nothing.
    """

    what: str
    here: str
    there: str
    more: str = ""


def hyper_parameters(here: HParams, there: HParams, skip: Iterable[str] = ()) -> list[Difference]:
    """Entries that both give and that differ in float32: one container keeps them in decimal, another in four bytes."""
    names = [name for name in here if name in there and name not in tuple(skip)]
    return [Difference(name, _said(here[name]), _said(there[name])) for name in names if np.float32(here[name]) != np.float32(there[name])]


def _said(value: float) -> str:
    return f"{value:.7g}"


# ---- what a running engine holds -------------------------------------------------------------------------------------------------------

NONE: Mapping[str, float] = {"rope_scale": 1, "rope_extrapolation": 0, "rope_attention_scale": 1, "alibi": 0, "window": 0}
"""Parameters of what no model here has, and their value where nothing is done: RoPE scaling, slopes per head, a sliding window."""

DUE: Mapping[str, Callable[[HParams], float]] = {
    "attention_scale": lambda hp: 1.0 / math.sqrt(hp["head"]),
    "groups": lambda hp: hp["heads"] / hp["kv_heads"],
    **{name: lambda hp, value=value: value for name, value in NONE.items()},  # type: ignore[misc]
}
"""Parameter to its value by the hyper-parameters of the file; every other one is a hyper-parameter itself."""

FREQUENCIES = "frequencies"
"""The rotary frequencies [h/2] as a list: theta as the numbers show it."""

STEPS = 2
"""Float32 steps that a frequency or a scale may be from its definition: what power, division and root round.

The exponent of a frequency, 2i/h below 1, is rounded to float32 before, by 2^-25 at most: ln(theta) times as much of the frequency.
"""


def parameters(held: Mapping[str, Mapping[str, Any]], file: HParams) -> list[Difference]:
    """What an engine holds that is not what its file says, in the order in which it says it.

    Parameters
    ----------
    held : mapping
        Name to where each value was met to the value.
    file : mapping
        Hyper-parameters of the file.

    Raises
    ------
    ArgumentError
        A manifest says something else there.
    """
    out = []
    for name, place, value in _flat(held):
        if name == FREQUENCIES:
            found = _frequencies(place, value, file)
            out += [] if found is None else [found]
        elif name in DUE or name in file:
            due = DUE[name](file) if name in DUE else file[name]
            if not _near(value, due, STEPS if name in DUE else 0):
                out.append(Difference(f"{name} of {place}", _said(value), _said(due)))
    return out


def _flat(held: Any) -> Iterator[tuple[str, str, Any]]:
    """Name, place and value; refuses what a manifest may say instead."""
    names: Mapping[str, Any] = held if isinstance(held, Mapping) else {"": None}
    for name, said in names.items():
        places: Mapping[str, Any] = said if isinstance(said, Mapping) else {"": None}
        for place, value in places.items():
            numbers = value if name == FREQUENCIES and isinstance(value, Sequence) else [value]
            if not all(isinstance(number, int | float) for number in numbers):
                text = f"what an engine holds is name: {{where: number}}, not {name!r}: {{{place!r}: {value!r}}}"
                raise ArgumentError(text, code="ARGUMENT", field="held")
            yield name, place, value


def _near(value: float, due: float, steps: int, slack: float = 0.0) -> bool:
    """Whether two numbers are at most some steps of float32, and a share of their size, apart."""
    a, b = np.float32(value), np.float32(due)
    return bool(abs(np.float64(a) - np.float64(b)) <= steps * np.spacing(np.abs(b)) + slack * abs(due))


def _frequencies(place: str, values: Sequence[float], file: HParams) -> Difference | None:
    """The first rotary frequency that is not theta's; a shorter number format, another base and a scaling all show here."""
    due = witness.frequencies(float(file["theta"]), int(file["head"]))
    if len(values) != len(due):
        return Difference(f"the number of frequencies of {place}", str(len(values)), str(len(due)))
    slack = math.log(float(file["theta"])) * 2.0**-25
    off = [i for i, value in enumerate(values) if not _near(value, due[i], STEPS, slack)]
    if not off:
        return None
    worst = max(abs(values[i] / due[i] - 1) for i in off)
    more = f"{len(off)} of {len(due)} frequencies differ, by up to {worst:.1e} of each"
    return Difference(f"the RoPE frequency {off[0]} of {place}", _said(values[off[0]]), _said(float(due[off[0]])), more)


def weights(held: Mapping[Key, Any], file: Mapping[Key, Any], cast: Format) -> list[Difference]:
    """Weights that are not the file's values, cast: names that only one has, then shapes, then values.

    Parameters
    ----------
    held, file : mapping
        (name, layer) to an array, in the same order of lanes.
    cast : Format
        What the side rounds weights to.
    """
    out = []
    for key in dict.fromkeys((*file, *held)):
        if key not in held or key not in file:
            out.append(Difference(_named(key), *(_there(key in side) for side in (held, file))))
            continue
        found = _values(key, np.asarray(held[key]), np.asarray(file[key]), cast)
        if found is not None:
            out.append(found)
    return out


def _named(key: Key) -> str:
    return f"the weight {stages.spell(key)}"


def _there(yes: bool) -> str:
    return "there" if yes else "missing"


def _values(key: Key, held: Any, file: Any, cast: Format) -> Difference | None:
    """The first element of a weight that differs; None if none does."""
    if held.shape != file.shape:
        return Difference(f"the shape of {_named(key)}", str(list(held.shape)), str(list(file.shape)))
    count, first = 0, None
    for start, mine, right in _pieces(held.reshape(-1), file.reshape(-1), cast):
        unlike = np.flatnonzero((mine != right) & ~(np.isnan(mine) & np.isnan(right)))
        count += unlike.size
        if first is None and unlike.size:
            place = start + int(unlike[0])
            first = (place, float(mine[unlike[0]]), float(right[unlike[0]]))
    if first is None:
        return None
    at = list(map(int, np.unravel_index(first[0], held.shape)))
    more = f"{count} of its {held.size} elements differ" if count > 1 else ""
    return Difference(f"{_named(key)} at {at}", f"{first[1]:.9g}", f"{first[2]:.9g}", more)


def _pieces(held: Any, file: Any, cast: Format) -> Iterator[tuple[int, Any, Any]]:
    """Both, piece by piece, the file's cast."""
    for start in range(0, held.size, PIECE):
        mine, right = held[start : start + PIECE], file[start : start + PIECE]
        yield start, mine, right if cast == F32 else to_format(right.astype(np.float64), cast)


def against_file(
    held: ModelData | None, said: HParams, file: ModelData, cast: Format, running: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Difference]:
    """What a side computes with that is not what its file says.

    Parameters
    ----------
    held : ModelData or None
        The model in the side's memory; None where that is the file itself, or nobody can look.
    said : mapping
        Hyper-parameters by the manifest of its captures.
    file : ModelData
        The file by the reference decoder.
    cast : Format
        What the side rounds weights to.
    running : mapping, optional
        Parameters as the running engine says that it holds them (:func:`parameters`).
    """
    found = hyper_parameters(said, file.hparams) + parameters(running or {}, file.hparams)
    if held is None:
        return found
    known = {item.what for item in found}
    found += [item for item in hyper_parameters(held.hparams, file.hparams) if item.what not in known]
    found += _words(held, file)
    return found + weights(held.weights, file.weights, cast)


def _words(here: ModelData, there: ModelData) -> list[Difference]:
    """Architecture and flags."""
    out = [] if here.arch == there.arch else [Difference("the architecture", here.arch, there.arch)]
    for flag in sorted((here.flags ^ there.flags) - STORAGE):
        out.append(Difference(flag, *("on" if flag in model.flags else "off" for model in (here, there))))
    return out


def between_files(subject: ModelData, reference: ModelData) -> list[Difference]:
    """What the files of two sides say differently of the computation.

    Their weights may differ by quantisation, and how many numbers a file has follows from what is compared here: a file is bound strictly,
    so two files that agree on architecture, flags and sizes have weights of the same names and shapes.
    """
    return _words(subject, reference) + hyper_parameters(subject.hparams, reference.hparams, UNREAD)


def loaded_sentence(side: str, spelling: str, found: list[Difference], judged: str) -> str:
    """The first difference with both values, how many more, and what the stages say."""
    first = found[0]
    return (
        f"The {side} ({spelling}) does not hold what its file says: {first.what} is {first.here} as loaded and {first.there} in the file"
        f"{_rest(found)}. Its stages: {judged}"
    )


def files_sentence(subject: str, reference: str, found: list[Difference], judged: str) -> str:
    """The first difference with both values, how many more, and what the stages say, each side judged by its own file."""
    first = found[0]
    return (
        f"The files of the two sides describe different models: {first.what} is {first.here} for the subject ({subject}) and {first.there}"
        f" for the reference ({reference}){_rest(found)}. Each judged by its own file: {judged}"
    )


def _rest(found: list[Difference]) -> str:
    """What else differs."""
    inner = f" ({found[0].more})" if found[0].more else ""
    return inner + (f"; so do {', '.join(item.what for item in found[1:4])}{' …' if len(found) > 4 else ''}" if len(found) > 1 else "")
