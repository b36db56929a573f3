"""``python -m aprender.diff``: compare two saved captures, tensor by tensor, without a judge.

Owns the comparison (bits, or relative L2 against ``--rtol``), its table and its JSON.  Refuses unlike things (the sample contract) and an
empty comparison.  A NaN that meets a number is a difference.  Says which tensors only one side has.  Who of the two is wrong is not asked
here: that is ``aprender.bisect``.  Called from the command line; :func:`compare` gives the same as plain data.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from aprender import _show
from aprender._command import AGREE, DIVERGENCE, Parser, Usage, command

if TYPE_CHECKING:
    from rich.console import RenderableType

    from aprender.captures import Captures
    from aprender.stages import Key, Selection

SCHEMA = "aprender.diff/1"

EXAMPLES = (
    "python -m aprender.diff stages-a stages-b                        exit 0 if every tensor is bit-equal",
    "python -m aprender.diff stages-a stages-b --rtol 1e-3            or within a relative L2 of 1e-3",
    "python -m aprender.diff stages-a stages-b --stages '*.attn_*,lm_head' --json",
)


def _parser() -> Parser:
    parser = Parser(
        "diff",
        "Compare two saved captures. There is no judge here: every tensor is bit-equal, within --rtol, or different. Exit codes: 0 all"
        " equal or within, 1 a difference, 2 usage, 3 not comparable or nothing to compare.",
        EXAMPLES,
    )
    add = parser.add_argument
    add("a", metavar="A", help="folder written by trace or oracle")
    add("b", metavar="B", help="the other one, the measure of relative figures")
    add("--rtol", type=float, metavar="R", help="largest relative L2 of a tensor that counts as equal (default: bits must be equal)")
    add("--stages", metavar="SELECTION", help="these stages only: 3.attn_*,*.ffn_out,lm_head")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object")
    form.add_argument("-q", "--quiet", action="store_true", help="the sentence only")
    form.add_argument("-v", "--verbose", action="store_true", help="every tensor, the equal ones too")
    return parser


def compare(a: Captures, b: Captures, rtol: float | None = None, keep: Selection | None = None) -> dict[str, Any]:
    """Every tensor that both captures have, as plain data (the object that ``--json`` prints).

    Parameters
    ----------
    a, b : Captures
        ``b`` is the measure of relative figures.
    rtol : float, optional
        Largest relative L2 that counts as equal; bits if not given.
    keep : callable, optional
        Selection of stages.

    Raises
    ------
    NotComparable
        The captures hold unlike things, or have no selected tensor in common.
    """
    from aprender.captures import check_contract

    chosen = [key for key in a if keep is None or keep(key)]
    notes = check_contract(a, b, chosen)
    rows = [_row(a, b, key, rtol) for key in chosen if key in b]
    same = all(row["state"] != "different" for row in rows)
    return {
        "schema": SCHEMA, "verdict": "agree" if same else "divergence", "a": a.manifest.side, "b": b.manifest.side, "rtol": rtol,
        "tokens": list(a.tokens), "compared": len(rows), "equal": sum(row["state"] == "equal" for row in rows),
        "only_a": [_named(key) for key in chosen if key not in b], "notes": notes,
        "only_b": [_named(key) for key in b if key not in a and (keep is None or keep(key))], "stages": rows,
    }  # fmt: skip


def _named(key: Key) -> dict[str, Any]:
    return {"layer": key[1], "stage": key[0]}


def _row(a: Captures, b: Captures, key: Key, rtol: float | None) -> dict[str, Any]:
    """One tensor: elements whose bits differ, how far apart the finite ones are, and what that makes of it.

    A NaN equals a NaN, an infinity the same infinity; against anything else they differ by more than any ``rtol``.
    """
    import numpy as np

    from aprender.captures import aligned
    from aprender.judge.metrics import distance

    x, y = aligned(a, b, key)
    differing = int(np.count_nonzero(np.ascontiguousarray(x).view(np.uint32) != np.ascontiguousarray(y).view(np.uint32)))
    finite = np.isfinite(x) & np.isfinite(y)
    unlike = int(np.count_nonzero(~finite & ~((x == y) | (np.isnan(x) & np.isnan(y)))))
    apart = distance(x[finite], y[finite])
    gap = np.abs(x[finite].astype(np.float64) - y[finite]) if finite.any() else np.zeros(1)
    within = rtol is not None and unlike == 0 and (gap.max() == 0 or (apart.rel_l2 is not None and apart.rel_l2 <= rtol))
    return _named(key) | {
        "n": x.size, "differing": differing, "state": "equal" if differing == 0 else "within" if within else "different",
        "rel_l2": apart.rel_l2, "cos_distance": apart.cos_distance, "max_abs": float(gap.max()),
        "nan_a": int(np.isnan(x).sum()), "nan_b": int(np.isnan(y).sum()), "nonfinite_unlike": unlike,
    }  # fmt: skip


# ---- the report ----------------------------------------------------------------------------------


def sentence(said: dict[str, Any]) -> str:
    """The result in one sentence."""
    rows: Sequence[dict[str, Any]] = said["stages"]
    bad = [row for row in rows if row["state"] == "different"]
    tensors = _show.plural(said["compared"], "tensor")
    if bad:
        first = _place(bad[0])
        return f"{len(bad)} of {tensors} differ{'s' if len(bad) == 1 else ''}, the first in execution order is {first}."
    if said["equal"] == said["compared"]:
        return f"All {tensors} are bit-equal."
    worst = max((row for row in rows if row["state"] == "within"), key=lambda row: row["rel_l2"] or 0)
    return f"All {tensors} are within {said['rtol']:g}, {said['equal']} bit-equal; the largest is {worst['rel_l2']:.1e} at {_place(worst)}."


def _place(row: dict[str, Any]) -> str:
    return row["stage"] if row["layer"] is None else f"{row['layer']}.{row['stage']}"


def _only(rows: Sequence[dict[str, Any]]) -> str:
    """Tensors that one side lacks, in short."""
    return ", ".join(map(_place, rows[:6])) + (f" and {len(rows) - 6} more" if len(rows) > 6 else "")


def _cells(row: dict[str, Any]) -> tuple[object, ...]:
    """A row of the table."""
    from rich.text import Text

    layer = "–" if row["layer"] is None else row["layer"]
    nan = f"{row['nan_a']} | {row['nan_b']}" if row["nan_a"] or row["nan_b"] else ""
    figures = ("·" if row[name] is None else f"{row[name]:.1e}" for name in ("rel_l2", "cos_distance", "max_abs"))
    state = Text(row["state"], style="bold red" if row["state"] == "different" else "green")
    return layer, row["stage"], f"{row['n']:,}", f"{row['differing']:,}", *figures, nan, state


def _render(said: dict[str, Any], verbose: bool) -> Iterator[RenderableType]:
    """Everything, in reading order."""
    from rich.text import Text

    yield Text(sentence(said), style="bold green" if said["verdict"] == "agree" else "bold red")
    shown = [row for row in said["stages"] if verbose or row["state"] != "equal"]
    if shown:
        yield Text()
        yield _show.table("layer  stage  >values  >differing  >relative L2  >1−cos  >largest gap  >NaN  state", map(_cells, shown))
    facts = [("A", said["a"]), ("B", said["b"]), *(("compared as", note) for note in said["notes"])]
    facts += [(f"only in {side}", _only(said[f"only_{side.lower()}"])) for side in "AB" if said[f"only_{side.lower()}"]]
    yield Text()
    yield _show.facts(facts)


@command
def main(argv: list[str] | None = None) -> int:
    """Compare two folders; returns the exit code."""
    args = _parser().parse_args(argv)
    if args.rtol is not None and not (math.isfinite(args.rtol) and args.rtol >= 0):
        raise Usage(f"--rtol {args.rtol}: a number that is not negative is needed")
    from aprender import stages
    from aprender.captures import open_captures
    from aprender.errors import ArgumentError, UnknownName

    try:
        keep = None if args.stages is None else stages.parse_selection(args.stages)
    except (ArgumentError, UnknownName) as problem:
        raise Usage(str(problem)) from None
    said = compare(open_captures(args.a), open_captures(args.b), args.rtol, keep)
    if args.json:
        print(json.dumps(said, ensure_ascii=False, allow_nan=False))
    elif args.quiet:
        print(sentence(said))
    else:
        _show.show(*_render(said, args.verbose))
    return AGREE if said["verdict"] == "agree" else DIVERGENCE


if __name__ == "__main__":
    sys.exit(main())
