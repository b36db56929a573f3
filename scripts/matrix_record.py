"""The record of the fault matrix on disk: a line of JSON per case, written as it is judged.

Owns how a row is spelled there.  Most cases come out as they must, and a key that says so is left out: a fault that is seen where it sits,
alone, and by its own name has only its cosines on its line.  Called by ``fault_matrix``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def _due(row: Row) -> Row:
    """What a case must come to, as far as that goes without running it."""
    quiet: Row = {"wrong": [], "false": [], "right": True}
    if not row.get("fault") or "expect" in row:
        return quiet
    where, name = row["site"], row["fault"]
    seen = {"due": where, "wrong": [where], "false": [], "stage": True, "predicted": True, "changed": True, "excluded": False}
    return seen | {"kind": name, "rank": 1, "ties": [], "twins": [], "complete": True}


def line(row: Row) -> str:
    """A row as a line, without what is as it must be."""
    due = _due(row)
    return json.dumps({key: value for key, value in row.items() if key not in due or due[key] != value}) + "\n"


def read(record: Path) -> list[Row]:
    """The rows of a record; a line that was cut off when the run was stopped is left out."""
    rows = []
    for text in record.read_text().splitlines() if record.exists() else ():
        try:
            row = json.loads(text)
        except json.JSONDecodeError:
            continue
        rows.append(_due(row) | row)
    return rows


def put(record: Path, rows: Iterable[Row]) -> None:
    """Write a record anew."""
    part = record.with_suffix(".part")
    part.write_text("".join(map(line, rows)))
    part.replace(record)


def name_of(row: Row) -> str:
    """The case of a row, as :attr:`matrix_case.Case.name` spells it."""
    group = f"{row['population']} {row['side']} {row['format']} {row['mode']} {row['seed']}"
    return f"{group} {row.get('fault') or 'clean'}@{row.get('site') or ''}"
