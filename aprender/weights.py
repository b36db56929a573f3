"""``python -m aprender.weights``: compare the weights of two model files, tensor by tensor, across containers and number formats.

Owns which tensors belong together (the weight table's names, equal names otherwise, a tied head with the token table), what the two files
say about hyper-parameters, the report and its JSON.  Works on containers: neither file has to bind to an architecture.  Refuses to call
files alike that have no tensor in common, and to be silent about a tensor that only one side has.  What a difference is, ``judge.weighing``
decides.  Called from the command line; :func:`compare` gives the same as plain data.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aprender import _show
from aprender._command import AGREE, DIVERGENCE, Parser, command

if TYPE_CHECKING:
    from rich.console import RenderableType

    from aprender import _core
    from aprender.judge.cells import Tensor
    from aprender.judge.weighing import Found

SCHEMA = "aprender.weights/1"

EXAMPLES = (
    "python -m aprender.weights model.gguf folder                     a quantised GGUF against the folder that it was made from",
    "python -m aprender.weights a.gguf b.gguf --exact                 exit 0 only if every value is equal",
    "python -m aprender.weights model.gguf folder --filter '*attn_q*' -v",
    "python -m aprender.weights model.gguf folder --jsonl             one line for each tensor",
)

PAIRED = ("attn_q", "attn_k", "attn_q_bias", "attn_k_bias")
"""Rows of WEIGHTS that the quirk ROPE_PAIRS is about."""


# ---- which tensors belong together -----------------------------------------------------------------------------------------------------

Name = tuple[str | None, int | None, str]
"""Row of WEIGHTS and layer, "" after them; for a tensor that no row names: None, None and its own name."""


def _patterns() -> list[tuple[str, re.Pattern[str]]]:
    """How each weight is spelled in each container."""
    from aprender import _core

    spelled = [(row[0], spelling) for row in _core.WEIGHTS for spelling in (row[2], row[3])]
    return [(weight, re.compile(re.escape(spelling).replace("%d", r"(\d{1,6})"))) for weight, spelling in spelled]


def _named(tensors: Sequence[_core.TensorInfo]) -> dict[Name, _core.TensorInfo]:
    """Tensors by what they are."""
    patterns, known = _patterns(), {}
    for info in tensors:
        name: Name = (None, None, info.name)
        for weight, pattern in patterns:
            match = pattern.fullmatch(info.name)
            if match:
                name = (weight, int(match[1]) if match.groups() else None, "")
        known[name if name not in known else (None, None, info.name)] = info
    return known


@dataclass(frozen=True)
class _File:
    """An opened file with what it says about its weights."""

    file: _core.File
    tensors: Mapping[Name, _core.TensorInfo]
    arch: str | None
    hparams: Mapping[str, int | float]
    importance: bool
    unbound: str

    @property
    def head(self) -> int:
        """Rows of a head of q and k; 0 if the file does not say."""
        said = self.hparams
        if "head" in said:
            return int(said["head"])
        return int(said["dim"]) // int(said["heads"]) if said.get("dim") and said.get("heads") else 0

    @property
    def pairs(self) -> int:
        """Size of the heads whose rows this container interleaves for this architecture; 0 if it does not."""
        from aprender import _core

        return self.head if any(row[:2] == (self.arch, self.file.container) for row in _core.QUIRKS) else 0

    def tensor(self, name: Name) -> Tensor:
        """The rows of a tensor, in Hugging Face order."""
        from aprender.judge.cells import Tensor

        info = self.tensors[name]
        pairs = self.pairs if name[0] in PAIRED else 0
        fits = bool(pairs) and bool(info.shape) and info.shape[0] % pairs == 0
        return Tensor(info.format, self.file.raw(info.name), info.shape, pairs=pairs if fits else 0, importance=self.importance)


def _opened(path: str, importance: bool) -> _File:
    from aprender import _core
    from aprender.errors import Error

    file = _core.File(path)
    arch = file.get("general.architecture") or file.get("model_type")
    try:
        model = _core.Model(file)
    except Error as problem:
        said, bound = _said(file, str(arch)), " ".join(str(problem).split())
    else:
        said, bound, arch = model.hparams, "", model.arch
    guided = importance or any(key.startswith("quantize.imatrix") for key in file.keys)
    return _File(file, _named(file.tensors), arch if isinstance(arch, str) else None, said, guided, bound)


def _said(file: _core.File, arch: str) -> dict[str, int | float]:
    """Hyper-parameters as far as a file that does not bind names them."""
    from aprender import _core

    found: dict[str, int | float] = {}
    for field, _, gguf, hf, older, _ in _core.HPARAMS:
        for key in (gguf.replace("%s", arch), hf, older):
            value = file.get(key) if key else None
            if isinstance(value, int | float) and not isinstance(value, bool):
                found.setdefault(field, value)
    return found


def _hparams(a: _File, b: _File) -> list[dict[str, Any]]:
    """Hyper-parameters that both files state and not alike; numbers are compared as the float32 that a GGUF holds."""
    import numpy as np

    rows: list[dict[str, Any]] = [{"field": "architecture", "a": a.arch, "b": b.arch}] if a.arch and b.arch and a.arch != b.arch else []
    for field in a.hparams:
        x, y = a.hparams[field], b.hparams.get(field)
        if y is not None and x != y and np.float32(x) != np.float32(y):
            rows.append({"field": field, "a": x, "b": y})
    return rows


@dataclass(frozen=True)
class _Pair:
    """Two tensors that should hold the same weights."""

    name: Name
    a: Name
    b: Name
    notes: tuple[str, ...] = ()


def _pairs(a: _File, b: _File) -> tuple[list[_Pair], list[Name], list[Name]]:
    """Pairs in the order of A, and what is left over on each side."""
    from aprender import _core

    pairs = [_Pair(name, name, name) for name in a.tensors if name in b.tensors]
    left = [[name for name in one.tensors if name not in other.tensors] for one, other in ((a, b), (b, a))]
    for row in _core.WEIGHTS:
        own, shared = (row[0], None, ""), (row[6], None, "")
        for side, other, letter in ((0, b, "B"), (1, a, "A")):
            if row[6] is not None and own in left[side] and shared in other.tensors:
                left[side].remove(own)
                note = f"tied: {letter} has no {row[0]}, its {row[6]} takes the place"
                pairs.append(_Pair(own, shared, own, (note,)) if side else _Pair(own, own, shared, (note,)))
    return pairs, left[0], left[1]


# ---- the comparison --------------------------------------------------------------------------------------------------------------------


def compare(
    a: str,
    b: str,
    *,
    pattern: str | None = None,
    exact: bool = False,
    importance: bool = False,
    tell: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """Every tensor of two files, as plain data (the object that ``--json`` prints).

    Parameters
    ----------
    a, b : str
        GGUF file, safetensors file or folder.  B is described as a change of A.
    pattern : str, optional
        Shell pattern of the tensors to compare: a weight's name, or its name in either file.
    exact : bool, optional
        Whether a difference that rounding explains counts too.
    importance : bool, optional
        Encoders were guided by an importance matrix, whether the files say so or not.
    tell : callable, optional
        Told the share of bytes done, 0..1.

    Raises
    ------
    FormatError
        A file is not what it claims to be.
    NotComparable
        No tensor of one file belongs to one of the other.
    UnknownName
        No tensor matches the pattern.
    """
    from aprender.errors import NotComparable

    left, right = _opened(a, importance), _opened(b, importance)
    pairs, only_a, only_b = _pairs(left, right)
    if not pairs:
        raise NotComparable(f"{a} and {b} have no tensor in common: no names agree", code="EMPTY", field="tensors")
    if pattern is not None:
        pairs, only_a, only_b = _filtered(left, right, pattern, pairs, only_a, only_b)
    total = sum(left.tensors[pair.a].nbytes + right.tensors[pair.b].nbytes for pair in pairs) or 1
    rows, done = [], 0
    for pair in pairs:
        share = left.tensors[pair.a].nbytes + right.tensors[pair.b].nbytes
        rows.append(_row(left, right, pair, lambda part, at=done, size=share: tell((at + part * size) / total)))  # type: ignore[misc]
        done += share
    hparams = _hparams(left, right)
    same = ("identical bytes", "identical values") if exact else ("identical bytes", "identical values", "re-quantised")
    good = all(row["state"] in same and not (exact and row["zero_signs"]) for row in rows) and not (only_a or only_b or hparams)
    return {
        "schema": SCHEMA, "verdict": "agree" if good else "divergence", "exact": exact, "filter": pattern,
        "a": _file_said(left), "b": _file_said(right), "compared": len(rows), "states": _counted(rows),
        "only_a": [left.tensors[name].name for name in only_a], "only_b": [right.tensors[name].name for name in only_b],
        "hparams": hparams, "tensors": rows,
    }  # fmt: skip


def _file_said(side: _File) -> dict[str, Any]:
    return {
        "path": side.file.path, "container": side.file.container, "architecture": side.arch, "bytes": side.file.nbytes,
        "importance": side.importance, "unbound": side.unbound or None,
    }  # fmt: skip


def _filtered(
    a: _File, b: _File, pattern: str, pairs: list[_Pair], only_a: list[Name], only_b: list[Name]
) -> tuple[list[_Pair], list[Name], list[Name]]:
    """What a shell pattern selects."""
    from fnmatch import fnmatchcase

    from aprender.errors import UnknownName

    def chosen(*names: str | None) -> bool:
        return any(name is not None and fnmatchcase(name, pattern) for name in names)

    found = [pair for pair in pairs if chosen(a.tensors[pair.a].name, b.tensors[pair.b].name, pair.name[0])]
    left = [name for name in only_a if chosen(a.tensors[name].name, name[0])]
    right = [name for name in only_b if chosen(b.tensors[name].name, name[0])]
    if not found:
        raise UnknownName(f"no tensor of both files matches '{pattern}', a shell pattern such as *norm*", code="LOOKUP", field="filter")
    return found, left, right


def _counted(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many tensors are in which state, the most first."""
    from collections import Counter

    return dict(Counter(str(row["state"]) for row in rows).most_common())


def _row(a: _File, b: _File, pair: _Pair, tell: Callable[[float], None]) -> dict[str, Any]:
    """One pair as plain data."""
    from aprender.judge import weighing

    x, y = a.tensor(pair.a), b.tensor(pair.b)

    def others() -> Iterator[tuple[str, Tensor]]:
        for name, info in a.tensors.items():
            if name != pair.a and info.shape == y.shape:
                yield info.name, a.tensor(name)

    heads = dict.fromkeys(side.head for side in (a, b) if side.head)
    found = weighing.compare(x, y, heads=heads, others=others, tell=tell)
    notes = list(pair.notes)
    if x.pairs != y.pairs:
        notes.append(f"rows interleaved in {'A' if x.pairs else 'B'}, as its container declares")
    left, right = a.tensors[pair.a], b.tensors[pair.b]
    return {
        "weight": pair.name[0], "layer": pair.name[1], "a": left.name, "b": right.name, "state": found.state, "notes": notes,
        "format_a": left.format, "format_b": right.format, "shape_a": list(left.shape), "shape_b": list(right.shape),
        **_figures(found), "first": weighing.place(x, y, found), "text": _in_words(x, y, found),
    }  # fmt: skip


def _figures(found: Found) -> dict[str, Any]:
    """The numbers of a pair; None where one does not exist."""
    from math import sqrt

    from aprender.judge import weighing
    from aprender.judge.tally import Tally

    tally = found.tally or Tally()
    scale = sqrt(tally.aa * tally.bb)
    return {
        "n": tally.n, "differing": tally.differing, "zero_signs": tally.zero_signs, "nan_a": tally.nan[0], "nan_b": tally.nan[1],
        "inf_a": tally.inf[0], "inf_b": tally.inf[1], "max_abs": tally.largest,
        "rel_l2": sqrt(tally.dd / tally.aa) if tally.aa else None, "cos_distance": _cos_distance(tally) if scale else None,
        "noise": weighing.noise(tally), "lag": weighing.lag(tally), "loose": tally.loose[found.kind] if found.kind is not None else 0,
        "outside": found.count, "alpha": found.alpha, "other": found.other,
    }  # fmt: skip


def _cos_distance(tally: Any) -> float:
    """1 - cosine, from the difference of the unit vectors, which does not cancel: |x - y|^2 = dd at equal norms."""
    from math import sqrt

    na, nb = sqrt(tally.aa), sqrt(tally.bb)
    return float(max(0.0, (tally.dd - (na - nb) ** 2) / (2 * na * nb)))


def _in_words(a: Tensor, b: Tensor, found: Found) -> str:
    """What a difference is, in a line."""
    from aprender.judge import weighing
    from aprender.judge.tally import A_TO_B, B_TO_A, BOTH

    tally = found.tally
    if found.text or tally is None or found.state in weighing.SAME:
        parts = [found.text] if found.text else []
        parts += (
            [f"{_show.plural(tally.zero_signs, 'zero')} of another sign"]
            if tally and tally.zero_signs and found.state in weighing.SAME
            else []
        )
        return ", ".join(parts)
    if found.state == weighing.ROUNDED:
        word = {
            A_TO_B: f"B is A in {b.name}",
            B_TO_A: f"A is B in {a.name}",
            BOTH: f"{a.name} and {b.name} of the same",
        }
        loose = (
            f", {tally.loose[found.kind]:,} beyond, as an importance matrix leaves them"
            if found.kind is not None and tally.loose[found.kind]
            else ""
        )
        return f"{word[found.kind or 0]}{loose}"
    here = weighing.place(a, b, found)
    assert here is not None
    steps = f", {here['steps']:.3g} steps" if isinstance(here["steps"], float) else ""
    block = f" (block {here['block']}, element {here['element']})" if (a.block if found.kind == B_TO_A else b.block) > 1 else ""
    many = f"{found.count:,} of {tally.n:,} values" if found.count > 1 else "one value"
    values = " against ".join(f"{value:.9g}" if isinstance(value, float) else str(value) for value in (here["a"], here["b"]))
    return f"{many}, the first in row {here['row']}, column {here['column']}{block}: {values}{steps}"


# ---- the report ------------------------------------------------------------------------------------------------------------------------


def sentence(said: Mapping[str, Any]) -> str:
    """The result in one sentence."""
    bad = _wrong(said)
    many, parts = _show.plural(said["compared"], "tensor"), []
    for side in "ab":
        if said[f"only_{side}"]:
            parts.append(f"{_several(said[f'only_{side}'])} only in {side.upper()}")
    parts += [f"{row['field']} {_value(row['a'])} against {_value(row['b'])}" for row in said["hparams"]]
    broken = sum(row["nan_a"] + row["nan_b"] + row["inf_a"] + row["inf_b"] > 0 for row in said["tensors"])
    end = f"; {_show.plural(broken, 'tensor')} with NaN or infinities" if broken else ""
    if bad:
        first = bad[0]
        what = f"{len(bad)} of {many} {'differs' if len(bad) == 1 else 'differ'}"
        more = "".join(f"; {part}" for part in parts)
        return f"{what}, {'' if len(bad) == 1 else 'first '}{first['a']}: {first['state']}, {first['text']}{more}{end}."
    states = said["states"]
    if set(states) <= {"identical bytes", "identical values"}:
        fine = f"All {many} have identical values"
    else:
        rounded = states["re-quantised"]
        fine = f"Re-quantisation explains {rounded} of {many}"
        fine += f", the other {said['compared'] - rounded} have identical values" if said["compared"] > rounded else ""
    if any("interleaved" in note for row in said["tensors"] for note in row["notes"]):
        fine += ", after the row order that the container declares"
    return f"{fine}{''.join(f', but {part}' if place == 0 else f'; {part}' for place, part in enumerate(parts))}{end}."


def _wrong(said: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The tensors that make a divergence."""
    same = ("identical bytes", "identical values") if said["exact"] else ("identical bytes", "identical values", "re-quantised")
    return [row for row in said["tensors"] if row["state"] not in same or (said["exact"] and row["zero_signs"])]


def _several(names: Sequence[str]) -> str:
    return ", ".join(map(_show.visible, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _value(value: object) -> str:
    return _show.number(value) if isinstance(value, int | float) else str(value)


def _cells(row: Mapping[str, Any], wrong: bool) -> tuple[object, ...]:
    """A row of the table."""
    from rich.text import Text

    name = (
        row["a"]
        if row["a"] == row["b"] or row["weight"] is None
        else row["weight"]
        if row["layer"] is None
        else f"{row['layer']}.{row['weight']}"
    )
    formats = row["format_a"] if row["format_a"] == row["format_b"] else f"{row['format_a']} | {row['format_b']}"
    broken = " | ".join(str(row[f"nan_{side}"] + row[f"inf_{side}"]) for side in "ab")
    figures = ("·" if row[key] is None else f"{row[key]:.1e}" for key in ("rel_l2", "cos_distance"))
    text = "; ".join([part for part in (row["text"], *row["notes"]) if part])
    return name, formats, *figures, "" if broken == "0 | 0" else broken, Text(row["state"], style="bold red" if wrong else "green"), text


def _render(said: Mapping[str, Any], verbose: bool) -> Iterator[RenderableType]:
    """Everything, in reading order."""
    from rich.text import Text

    yield Text(_show.visible(sentence(said)), style="bold green" if said["verdict"] == "agree" else "bold red")
    wrong = [id(row) for row in _wrong(said)]
    shown = [
        row
        for row in said["tensors"]
        if verbose or not row["state"].startswith("identical") or row["zero_signs"] or row["nan_a"] or row["nan_b"]
    ]
    if shown:
        yield Text()
        yield _show.table(
            "tensor  formats  >relative L2  >1−cos  >not finite  =state  what", (_cells(row, id(row) in wrong) for row in shown)
        )
    facts = [
        (side.upper(), f"{said[side]['path']}: {said[side]['container']}, {said[side]['architecture'] or 'architecture not said'}")
        for side in "ab"
    ]
    facts += [("states", ", ".join(f"{count} {state}" for state, count in said["states"].items()))]
    facts += [(f"only in {side.upper()}", name) for side in "ab" for name in said[f"only_{side}"]]
    facts += [("hyper-parameters", f"{row['field']}: {_value(row['a'])} in A, {_value(row['b'])} in B") for row in said["hparams"]]
    yield Text()
    yield _show.facts(facts)


def _parser() -> Parser:
    parser = Parser(
        "weights",
        "Compare the weights of two models tensor by tensor, across containers and number formats, and say for each: identical,"
        " re-quantised (every value within the step that its own block's stored scales allow), transposed, permuted, swapped, scaled, or"
        " which value differs first. Exit codes: 0 identical or explained by re-quantisation or by the row order that a container"
        " declares, 1 a difference, 2 usage, 3 not comparable.",
        EXAMPLES,
    )
    add = parser.add_argument
    add("a", metavar="A", help="GGUF file, safetensors file, or a folder with model.safetensors")
    add("b", metavar="B", help="the other one")
    add("--filter", metavar="PATTERN", help="these tensors only: a shell pattern of the weight's name, or of its name in a file")
    add("--exact", action="store_true", help="a difference that re-quantisation explains makes exit 1 too")
    add("--imatrix", action="store_true", help="an importance matrix guided the encoder, though no file says so: outliers may be clipped")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object")
    form.add_argument("--jsonl", action="store_true", help="one JSON line per tensor")
    form.add_argument("-q", "--quiet", action="store_true", help="the sentence only")
    form.add_argument("-v", "--verbose", action="store_true", help="every tensor, the identical ones too")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    """Compare two files; returns the exit code."""
    args = _parser().parse_args(argv)
    with _show.Progress("comparing", args.quiet or args.json or args.jsonl) as tell:
        said = compare(args.a, args.b, pattern=args.filter, exact=args.exact, importance=args.imatrix, tell=tell)
    if args.json:
        print(json.dumps(said, ensure_ascii=False, allow_nan=False))
    elif args.jsonl:
        for row in said["tensors"]:
            print(json.dumps(row, ensure_ascii=False, allow_nan=False))
    elif args.quiet:
        print(_show.visible(sentence(said)))
    else:
        _show.show(*_render(said, args.verbose), width=140)
    return AGREE if said["verdict"] == "agree" else DIVERGENCE


if __name__ == "__main__":
    sys.exit(main())
