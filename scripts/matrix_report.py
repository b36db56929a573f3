"""The page of the fault matrix: tables and lists that are made of its record and of nothing else.

Owns the shares and how they are written.  A share is of the cases that are not excluded; what is excluded is counted in every row and
listed by name.  Called by ``fault_matrix``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

from matrix_case import GATE, TOP

Row = dict[str, Any]

TEXTS = {
    "own": "our engine, with the edits that `bisect --plant` makes",
    "gguf": "files that carry the fault, run by real llama.cpp and judged by the right file",
    "hf": "patched modules of Hugging Face transformers, judged with the weights and hyper-parameters of the right model",
}
HOW = f"""\
A case is *excluded* if nobody could see it: in our engine, of which every bit is declared, if no bit of the stage changes (each is run to
prove it); elsewhere if the row's prediction, put in place of the right value of the untouched run, passes the gates: that is decided before
the faulty run. *Kind*: the first name that the diagnosis gives, and the first three, equal the name of the fault or of a row that predicts
the same bits there. *False stages* are accused and not due. The *cosine gate* compares the stage with float64 on the unquantized weights
and wants {GATE}: it *sees* the fault, *passes* it, or *cries* on the untouched run as well, and then can tell nothing; beside it the median
cosine of untouched and of faulty runs.  A line of `matrix.jsonl` leaves out what is as it must be."""

LONGEST = 40
"""Lines of a list."""


def planted(rows: Iterable[Row]) -> list[Row]:
    """The faults, without controls and untouched runs."""
    return [row for row in rows if row.get("fault") and "expect" not in row]


def scored(rows: Iterable[Row]) -> list[Row]:
    """The faults that are not excluded."""
    return [row for row in planted(rows) if not row["excluded"]]


def share(good: int, of: int) -> str:
    """A share as people read it; 100 % only if it is all of them."""
    if not of:
        return "–"
    percent = 100 * good / of
    text = "100" if good == of else f"{min(percent, 99.9):.1f}"
    return f"{good}/{of} = {text} %"


def table(names: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join([f"| {' | '.join(names)} |", "|--" * len(names) + "|", *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"


# ---- the columns -----------------------------------------------------------------------------------------------------------------------


def gates(rows: Iterable[Row]) -> str:
    """What a cosine gate says: of the faults that it could tell from the untouched run, and how often it could not."""
    said = Counter(row["gate"] for row in rows)
    return f"{said['sees']} / {said['passes']} / {said['cries']}"


def clean_cosine(rows: Iterable[Row]) -> str:
    """Median over untouched runs and over faulty ones."""
    pairs = [(row["clean_cosine"], row["cosine"]) for row in rows if row["clean_cosine"] is not None and row["cosine"] is not None]
    return "–" if not pairs else f"{median(clean for clean, _ in pairs):.4f} → {median(faulty for _, faulty in pairs):.4f}"


def instead(rows: Iterable[Row]) -> str:
    """What was named where the right kind was not."""
    return ", ".join(f"{kind or 'nothing'} {n}" for kind, n in Counter(row["kind"] for row in rows if not row["rank"]).most_common(3))


COLUMNS: dict[str, Callable[[list[Row]], str]] = {
    "planted": lambda rows: str(len(planted(rows))),
    "excluded": lambda rows: str(len(planted(rows)) - len(scored(rows))),
    "stage and layer first": lambda rows: share(sum(row["stage"] for row in scored(rows)), len(scored(rows))),
    "kind first": lambda rows: share(sum(row["rank"] == 1 for row in scored(rows)), len(scored(rows))),
    "in the top three": lambda rows: share(sum(1 <= row["rank"] <= TOP for row in scored(rows)), len(scored(rows))),
    "false stages": lambda rows: str(sum(len(row["false"]) for row in planted(rows))),
    "cosine gate sees / passes / cries": lambda rows: gates(scored(rows)),
    "cosine, clean → with the fault": lambda rows: clean_cosine(scored(rows)),
}


def by(rows: Sequence[Row], of: Callable[[Row], str], name: str, more: dict[str, Callable[[list[Row]], str]] | None = None) -> str:
    """A table with a line for each value of something."""
    columns = COLUMNS | (more or {})
    values = dict.fromkeys(of(row) for row in planted(rows))
    lines = [
        [value, *(column([row for row in rows if row.get("fault") and of(row) == value]) for column in columns.values())]
        for value in values
    ]
    return table([name, *columns], lines)


def layer(row: Row) -> str:
    """Where a fault sits."""
    before, dot, _ = (row["site"] or "").partition(".")
    return f"layer {before}" if dot else "whole model"


AXES: dict[str, Callable[[Row], str]] = {
    "format": lambda row: row["format"],
    "layer": layer,
    "run": lambda row: row["mode"],
    "family": lambda row: row["side"],
    "seed": lambda row: str(row["seed"]),
}


# ---- the parts of the page -------------------------------------------------------------------------------------------------------------


def quiet(rows: Sequence[Row]) -> tuple[int, int, int]:
    """Untouched runs, controls, and how many of both came out wrong."""
    clean, controls = ([row for row in rows if not row.get("fault")], [row for row in rows if "expect" in row])
    return len(clean), len(controls), sum(not row["right"] for row in clean + controls)


def populations(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each."""
    return {name: [row for row in rows if row["population"] == name] for name in dict.fromkeys(row["population"] for row in rows)}


def summary(rows: Sequence[Row]) -> str:
    """The totals in a sentence of each population."""
    out = []
    for name, some in populations(rows).items():
        clean, controls, alarms = quiet(some)
        said = {column: make(some) for column, make in COLUMNS.items()}
        out.append(
            f"**{name}: {said['planted']} faults planted, {said['excluded']} excluded; stage and layer right first"
            f" {said['stage and layer first']}; kind right first {said['kind first']}, among the first three {said['in the top three']};"
            f" {said['false stages']} false stages; {clean} untouched runs and {controls} controls, {alarms} alarms.**"
        )
    return "\n\n".join(out)


def power(rows: Sequence[Row]) -> str:
    """What was predicted before the run against what came of it."""
    said = [row for row in planted(rows) if row["predicted"] is not None]
    cells = Counter((row["predicted"], row["stage"]) for row in said)
    lines = [[f"predicted {'visible' if p else 'invisible'}", *(str(cells[p, seen]) for seen in (True, False))] for p in (True, False)]
    return table(["before the run", "named at its stage", "not"], lines)


def grouped(rows: Iterable[Row], say: Callable[[Row], str]) -> str:
    """A list, equal lines once with their number."""
    lines = [f"- {text}" + (f" ({n} ×)" if n > 1 else "") for text, n in Counter(map(say, rows)).most_common()]
    more = [f"- … and {len(lines) - LONGEST} more lines, in the record"] if len(lines) > LONGEST else []
    return "\n".join(lines[:LONGEST] + more) or "None."


def unseen(rows: Iterable[Row]) -> str:
    """What is excluded: each fault and way to run once, with its sites and formats."""
    why = {True: "predicted invisible", False: "no bit of the stage changes"}
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["excluded"]:
            found.setdefault(f"{row['fault']}, {row['mode']}: {why[row['changed']]}", []).append(row)
    lines = []
    for text, some in sorted(found.items()):
        sites, formats = (
            ", ".join(f"{name} {n}" for name, n in sorted(Counter(row[key] for row in some).items())) for key in ("site", "format")
        )
        lines.append(f"- {text}, {len(some)} × (sites {sites}; formats {formats})")
    return "\n".join(lines) or "None."


def lists(rows: Sequence[Row]) -> str:
    """Everything that is not as it should be, by name."""
    of = planted(rows)
    at = lambda row: f"{row['fault'] or 'untouched'} at {row['site']} ({row['side']} {row['format']} {row['mode']} seed {row['seed']})"  # noqa: E731
    parts = {
        "Excluded": unseen(of),
        "Another stage first, or none": grouped(
            (row for row in scored(rows) if not row["stage"]),
            lambda row: f"{at(row)}: due at {row['due']}, {', '.join(row['wrong'][:3]) or 'none'}",
        ),
        "False stages": grouped((row for row in of if row["false"]), lambda row: f"{at(row)}: {', '.join(row['false'][:3])}"),
        "Another kind": grouped(
            (row for row in scored(rows) if not 1 <= row["rank"] <= TOP),
            lambda row: f"{row['fault']} ({row['due']}): {row['kind'] or 'nothing'}",
        ),
        "Alarms": grouped(
            (row for row in rows if row.get("right") is False), lambda row: f"{at(row)}: {', '.join(row['wrong'][:3]) or 'not as it must'}"
        ),
    }
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts.items())


def page(rows: Sequence[Row], command: str) -> str:
    """README of the record."""
    parts = [
        "# fault-matrix\n\nIs every fault of the catalogue named at the stage and layer where it was planted, and by its kind?\n",
        f"```\n$ {command}\n```\n\n{summary(rows)}\n",
        f"{HOW}\n",
    ]
    for name, some in populations(rows).items():
        parts.append(f"## {name}\n\nPlanted in {TEXTS.get(name, name)}.\n")
        parts.append(by(some, lambda row: row["fault"], "fault", {"named instead": lambda rows: instead(scored(rows))}))
        parts += [by(some, of, axis) for axis, of in AXES.items()]
        parts += [power(some), lists(some) + "\n"]
    return "\n".join(parts)
