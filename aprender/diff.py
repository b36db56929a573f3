"""``python -m aprender.diff``: compare two saved captures, APRT trees or APRT files, tensor by tensor, without a judge.

Owns the comparison (bits, or relative L2 against ``--rtol``), its table and its JSON.  Refuses unlike things (the sample contract) and an
empty comparison.  A NaN that meets a number is a difference, whatever the tolerance.  Says which tensors only one side has, which files
were passed over, and what is only the user's word.  Who of the two is wrong is not asked here: that is ``aprender.bisect``.  Called from
the command line; :func:`compare` gives the same as plain data.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aprender import _prompt, _show
from aprender._command import AGREE, DIVERGENCE, Parser, Usage, command

if TYPE_CHECKING:
    import argparse

    import numpy as np
    from numpy.typing import NDArray
    from rich.console import RenderableType

    from aprender.captures import Captures
    from aprender.judge.elements import Element, Token
    from aprender.stages import Key, Selection

SCHEMA = "aprender.diff/2"
LIMIT = 10

EXAMPLES = (
    "python -m aprender.diff stages-a stages-b                        exit 0 if every tensor is bit-equal",
    "python -m aprender.diff stages-a stages-b --rtol 1e-3            or within a relative L2 of 1e-3",
    "python -m aprender.diff stages-a stages-b --stages '*.attn_*,lm_head' --json",
    "python -m aprender.diff tree stages --prompt-ids 3838,374,220 --arithmetic undeclared    an APRT tree of another tool",
    "python -m aprender.diff a/layer-3/ffn_out.bin b/layer-3/ffn_out.bin -v                   two APRT files",
)


def _parser() -> Parser:
    parser = Parser(
        "diff",
        "Compare two saved captures, APRT trees or APRT files. There is no judge here: every tensor is bit-equal, within --rtol, or"
        " different. Exit codes: 0 all equal or within, 1 a difference, 2 usage, 3 not comparable or nothing to compare.",
        EXAMPLES,
    )
    add = parser.add_argument
    add("a", metavar="A", help="folder written by trace or oracle, APRT tree, or APRT file")
    add("b", metavar="B", help="the other one, the measure of relative figures")
    add("--rtol", type=float, metavar="R", help="largest relative L2 of a tensor that counts as equal (default: bits must be equal)")
    add("--stages", metavar="SELECTION", help="these stages only: 3.attn_*,*.ffn_out,lm_head")
    add("--prompt-ids", metavar="1,2,3", help="token ids of what has no manifest: another tool's tree, or an APRT file")
    add("--arithmetic", metavar="NAME", help="how another tool's tree was computed: a profile, or 'undeclared'")
    add("--limit", type=int, default=LIMIT, metavar="N", help="elements to name that differ most in a tensor (default: %(default)s)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object")
    form.add_argument("-q", "--quiet", action="store_true", help="the sentence only")
    form.add_argument("-v", "--verbose", action="store_true", help="every tensor, the equal ones too, and the tokens and elements of all")
    return parser


# ---- the comparison ------------------------------------------------------------------------------


def compare(a: Captures, b: Captures, rtol: float | None = None, keep: Selection | None = None, limit: int = LIMIT) -> dict[str, Any]:
    """Every tensor that both captures have, as plain data (the object that ``--json`` prints).

    Parameters
    ----------
    a, b : Captures
        ``b`` is the measure of relative figures.
    rtol : float, optional
        Largest relative L2 that counts as equal; bits if not given.
    keep : callable, optional
        Selection of stages.
    limit : int
        How many elements of a tensor to name.

    Raises
    ------
    NotComparable
        The captures hold unlike things, or have no selected tensor in common, or no value in those.
    """
    from aprender.captures import check_contract
    from aprender.errors import NotComparable

    chosen = [key for key in a if keep is None or keep(key)]
    notes = check_contract(a, b, chosen)
    rows = [_row(a, b, key, rtol, limit) for key in chosen if key in b]
    if not any(row["n"] for row in rows):
        raise NotComparable(f"{a.manifest.side} and {b.manifest.side} have no value in common: their tensors are empty", code="EMPTY")
    same = all(row["state"] != "different" for row in rows)
    return {
        "schema": SCHEMA, "verdict": "agree" if same else "divergence", "a": a.manifest.side, "b": b.manifest.side, "rtol": rtol,
        "tokens": list(a.tokens), "compared": len(rows), "equal": sum(row["state"] == "equal" for row in rows),
        "only_a": [_named(key) for key in chosen if key not in b], "notes": notes,
        "only_b": [_named(key) for key in b if key not in a and (keep is None or keep(key))],
        "notes_a": list(a.manifest.notes), "notes_b": list(b.manifest.notes), "stages": rows,
    }  # fmt: skip


def _named(key: Key) -> dict[str, Any]:
    return {"layer": key[1], "stage": key[0]}


def _row(a: Captures, b: Captures, key: Key, rtol: float | None, limit: int) -> dict[str, Any]:
    """One tensor: what ``judge.elements`` finds, and what that makes of it.

    A NaN equals a NaN, an infinity the same infinity; against anything else they differ by more than any ``rtol``.
    """
    from aprender.captures import aligned
    from aprender.judge import elements

    x, y = aligned(a, b, key)
    found = elements.compare(x, y, max(limit, 1))
    equal = found.n_bits_equal == found.n
    close = found.max_abs in (None, 0.0) or (found.rel_l2 is not None and rtol is not None and found.rel_l2 <= rtol)
    within = rtol is not None and not found.unlike and close
    top = [_element(one, x.shape) for one in found.top]
    tokens = None if equal else _tokens(x, y, key)
    worst = max(range(len(tokens)), key=lambda t: tokens[t].badness) + len(a.tokens) - len(tokens) if tokens else None
    return _named(key) | {
        "n": found.n, "shape": list(x.shape), "state": "equal" if equal else "within" if within else "different",
        "n_bits_equal": found.n_bits_equal, "n_value_equal": found.n_value_equal,
        "nan_a_only": found.nan_a_only, "nan_b_only": found.nan_b_only, "nan_both": found.nan_both, "inf_mismatch": found.inf_mismatch,
        "max_abs": top[0]["gap"] if top else 0.0, "max_abs_finite": found.max_abs, "max_ulp": found.max_ulp,
        "ulp_over": list(found.over), "rms": found.rms, "rel_l2": found.rel_l2,
        "cosine": None if found.cos_distance is None else 1 - found.cos_distance, "cos_distance": found.cos_distance,
        "std_ratio": found.std_ratio, "undefined": found.undefined,
        "first": None if found.first is None else _index(found.first, x.shape), "top": top[: max(limit, 0)], "worst_token": worst,
        "by_token": None if tokens is None else [_token(one) for one in tokens],
    }  # fmt: skip


def _tokens(x: NDArray[np.float32], y: NDArray[np.float32], key: Key) -> list[Token] | None:
    """The comparison per token; None where the tensor has no axis of tokens (a file of which nobody said how many there are)."""
    from aprender import stages
    from aprender.judge import elements

    row = stages.stage(key[0])
    if "T" not in row.shape or len(row.shape) != x.ndim:
        return None
    return elements.by_token(x, y, row.shape.index("T"))


def _token(one: Token) -> dict[str, Any]:
    return {
        "differing": one.differing, "unlike": one.unlike, "rel_l2": one.rel_l2, "std_ratio": one.std_ratio, "max_abs": one.max_abs,
    }  # fmt: skip


def _index(at: int, shape: Sequence[int]) -> list[int]:
    """A flat index as one of the tensor."""
    import numpy as np

    return [int(i) for i in np.unravel_index(at, shape)]


def _element(one: Element, shape: Sequence[int]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: they are words, and the bits say the rest."""
    bits = {f"{side}_bits": f"{value:08x}" for side, value in zip("ab", one.bits, strict=True)}
    return {"index": _index(one.at, shape), "a": _finite(one.a), "b": _finite(one.b), "gap": _finite(one.gap)} | bits


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


# ---- the report ----------------------------------------------------------------------------------


def sentence(said: dict[str, Any]) -> str:
    """The result in one sentence."""
    rows: Sequence[dict[str, Any]] = said["stages"]
    bad = [row for row in rows if row["state"] == "different"]
    tensors = _show.plural(said["compared"], "tensor")
    if bad:
        first = _place(bad[0])
        return f"{len(bad)} of {tensors} differ{'s' if len(bad) == 1 else ''}, the first in execution order is {first}."
    every = f"All {tensors} are" if said["compared"] > 1 else "The one tensor is"
    if said["equal"] == said["compared"]:
        return f"{every} bit-equal."
    worst = max((row for row in rows if row["state"] == "within"), key=lambda row: row["rel_l2"] or 0)
    largest = f"the largest is {worst['rel_l2'] or 0:.1e} at {_place(worst)}"
    return f"{every} within {said['rtol']:g}, {said['equal']} bit-equal; {largest}."


def _place(row: Mapping[str, Any]) -> str:
    return row["stage"] if row["layer"] is None else f"{row['layer']}.{row['stage']}"


def _only(rows: Sequence[dict[str, Any]]) -> str:
    """Tensors that one side lacks, in short."""
    return ", ".join(map(_place, rows[:6])) + (f" and {len(rows) - 6} more" if len(rows) > 6 else "")


def _figure(value: float | str | None, form: str = ".1e") -> str:
    return "·" if value is None else value if isinstance(value, str) else format(value, form)


def _unlike(row: Mapping[str, Any]) -> str:
    """Values that are no numbers, in short: ``A 1, B 2, both 3, ±inf 4``."""
    names = (("A", "nan_a_only"), ("B", "nan_b_only"), ("both", "nan_both"), ("±inf", "inf_mismatch"))
    return ", ".join(f"{word} {row[name]}" for word, name in names if row[name])


def _cells(row: dict[str, Any]) -> tuple[object, ...]:
    """A row of the table."""
    from rich.text import Text

    layer = "–" if row["layer"] is None else row["layer"]
    figures = (_figure(row[name]) for name in ("rel_l2", "cos_distance", "max_abs"))
    ratio, token = _figure(row["std_ratio"], ".6f"), "" if row["worst_token"] is None else row["worst_token"]
    state = Text(row["state"], style="bold red" if row["state"] == "different" else "green")
    return layer, row["stage"], f"{row['n']:,}", f"{row['n'] - row['n_bits_equal']:,}", *figures, ratio, token, _unlike(row), state


COLUMNS = "layer  stage  >values  >differing  >relative L2  >1−cos  >largest gap  >std A/B  >worst token  NaN  state"


def _elements(row: dict[str, Any]) -> Iterator[RenderableType]:
    """The elements of a tensor that differ most."""
    if row["top"]:
        first = ", ".join(map(str, row["first"]))
        yield _show.heading(f"{_place(row)}: largest gaps; the first difference is at [{first}], the most steps apart {row['max_ulp']:,}")
        cells = (
            (
                ", ".join(map(str, one["index"])),
                _figure(one["a"], ".9g"),
                _figure(one["b"], ".9g"),
                _figure(one["gap"]),
                one["a_bits"],
                one["b_bits"],
            )
            for one in row["top"]
        )
        yield _show.table(">index  >A  >B  >gap  A's bits  B's bits", cells)


def _token_table(row: dict[str, Any], tokens: Sequence[int]) -> Iterator[RenderableType]:
    """The tokens of a tensor."""
    if row["by_token"]:
        yield _show.heading(f"{_place(row)}: per token")
        last = len(tokens) - len(row["by_token"])  # a tensor of the last token only
        cells = (
            (
                place + last,
                tokens[place + last],
                f"{one['differing']:,}",
                f"{one['unlike']:,}",
                _figure(one["rel_l2"]),
                _figure(one["std_ratio"], ".6f"),
                _figure(one["max_abs"]),
            )
            for place, one in enumerate(row["by_token"])
        )
        yield _show.table(">token  >id  >differing  >NaN, inf  >relative L2  >std A/B  >largest gap", cells)


def _facts(said: dict[str, Any]) -> Iterator[tuple[str, object]]:
    for side in "AB":
        path = said.get(f"path_{side.lower()}")
        yield side, said[side.lower()] + (f" in {path}" if path else "")
        yield from (("", note) for note in said[f"notes_{side.lower()}"])
    yield from (("compared as", note) for note in said["notes"])
    yield from ((f"only in {side}", _only(said[f"only_{side.lower()}"])) for side in "AB" if said[f"only_{side.lower()}"])
    reasons = {row["undefined"]: row for row in said["stages"] if row["undefined"]}
    yield from ((f"· at {_place(row)}", why) for why, row in reasons.items())


def _render(said: dict[str, Any], verbose: bool) -> Iterator[RenderableType]:
    """Everything, in reading order."""
    from rich.text import Text

    yield Text(sentence(said), style="bold green" if said["verdict"] == "agree" else "bold red")
    shown = [row for row in said["stages"] if verbose or row["state"] != "equal"]
    if shown:
        yield Text()
        yield _show.table(COLUMNS, map(_cells, shown))
    apart = [row for row in shown if row["state"] != "equal"]
    for row in apart if verbose else [row for row in apart if row["state"] == "different"][:1]:
        for part in (*_elements(row), *(_token_table(row, said["tokens"]) if verbose else ())):
            yield Text()
            yield part
    yield Text()
    yield _show.facts(_facts(said))


# ---- the command ---------------------------------------------------------------------------------


def _open(path: str, ids: tuple[int, ...] | None, arithmetic: str | None) -> tuple[Captures, bool]:
    """What a word of the command line names, and whether the user's word about it was needed."""
    from aprender import aprt, captures

    where = Path(path)
    if where.is_dir() and not (where / captures.MANIFEST).exists() and aprt.is_tree(where):
        return aprt.open_tree(where, ids, arithmetic), True
    if where.exists() and not where.is_dir():
        return aprt.open_file(where, ids), True
    return captures.open_captures(where), False


def _both(args: argparse.Namespace) -> tuple[Captures, Captures]:
    """Both sides, of one kind."""
    from aprender.errors import NotComparable

    ids = None if args.prompt_ids is None else _prompt.parse_ids(args.prompt_ids)
    kinds = ["a folder" if Path(path).is_dir() else "a file" for path in (args.a, args.b) if Path(path).exists()]
    if len(set(kinds)) > 1:
        raise NotComparable(f"{args.a} is {kinds[0]}, {args.b} is {kinds[1]}", code="SHAPE")
    (a, asked), (b, asked_too) = (_open(path, ids, args.arithmetic) for path in (args.a, args.b))
    if not (asked or asked_too) and (ids is not None or args.arithmetic is not None):
        raise Usage("--prompt-ids and --arithmetic are for what has no manifest: both have one, which says that")
    if kinds[:1] == ["a file"] and list(a) != list(b):
        raise NotComparable(f"unlike tensors: {args.a} is {_spelled(a)}, {args.b} is {_spelled(b)}", code="SHAPE", field="stage")
    return a, b


def _spelled(captures: Captures) -> str:
    from aprender import stages

    return ", ".join(map(stages.spell, captures))


@command
def main(argv: list[str] | None = None) -> int:
    """Compare two folders or files; returns the exit code."""
    args = _parser().parse_args(argv)
    if args.rtol is not None and not (math.isfinite(args.rtol) and args.rtol >= 0):
        raise Usage(f"--rtol {args.rtol}: a number that is not negative is needed")
    if args.limit < 0:
        raise Usage(f"--limit {args.limit}: a number of elements cannot be negative")
    from aprender import stages
    from aprender.errors import ArgumentError, UnknownName

    try:
        keep = None if args.stages is None else stages.parse_selection(args.stages)
    except (ArgumentError, UnknownName) as problem:
        raise Usage(str(problem)) from None
    said = compare(*_both(args), args.rtol, keep, args.limit) | {"path_a": args.a, "path_b": args.b}
    if args.json:
        print(json.dumps(said, ensure_ascii=False, allow_nan=False))
    elif args.quiet:
        print(sentence(said))
    else:
        _show.show(*_render(said, args.verbose))
    return AGREE if said["verdict"] == "agree" else DIVERGENCE


if __name__ == "__main__":
    sys.exit(main())
