"""The report in a terminal: one sentence, the table of stages, the answer, how to reproduce.

Owns layout and words around the figures.  Refuses to judge, to round a figure into another state, or to hide a row that is not clean:
layers that are folded are counted and their worst row is named.  Called by the commands ``bisect`` and, for its table, by notebooks.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from aprender.bisection import Report

Row = Mapping[str, Any]

WIDTH = 120
"""Columns where the output is not a terminal."""

STYLES: Mapping[str, str] = {
    "exact": "green",
    "noise": "green",
    "wrong": "bold red",
    "inherited": "yellow",
    "heals": "cyan",
    "unmeasured": "dim",
    "not_comparable": "magenta",
}
VERDICT_STYLES: Mapping[str, str] = {"agree": "bold green", "divergence": "bold red", "not_comparable": "bold magenta"}


def console(stream: Any = None) -> Console:
    """A console for the result: ``NO_COLOR`` is honoured, and a pipe gets a fixed width and no colour."""
    made = Console(file=stream, highlight=False, soft_wrap=False)
    return made if made.is_terminal else Console(file=stream, highlight=False, width=WIDTH, no_color=True)


def figure(value: float | None, digits: int = 1) -> str:
    """A figure in the table: scientific, ``0`` for exactly zero, ``·`` where there is none."""
    if value is None:
        return "·"
    if value == 0:
        return "0"
    return f"{value:.{digits}e}"


def plain(value: float | None, digits: int = 2) -> str:
    """A statistic near 1: fixed point while that is readable."""
    if value is None:
        return "·"
    return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.1e}"


def layer_name(layer: int | None) -> str:
    """A layer in the table; whole-model stages have a dash."""
    return "–" if layer is None else str(layer)


def folded(rows: Sequence[Row], verbose: bool) -> list[Row]:
    """Rows to print: all if asked; else clean layers between the first and the last are one row each.

    Parameters
    ----------
    rows : sequence of mapping
        ``stages`` of the JSON report, in execution order.
    verbose : bool

    Returns
    -------
    list
        Rows of the report, and rows that stand for a folded layer.
    """
    layers = [row["layer"] for row in rows if row["layer"] is not None]
    if verbose or not layers:
        return list(rows)
    open_layers = {min(layers), max(layers)} | {row["layer"] for row in rows if row["state"] in ("wrong", "heals", "not_comparable")}
    out: list[Row] = []
    for layer, group in groupby(rows, key=lambda row: row["layer"]):
        members = list(group)
        if layer is None or layer in open_layers:
            out += members
        else:
            out.append(_fold(members))
    return out


def _fold(members: Sequence[Row]) -> Row:
    """One row for a layer that is not shown: how many stages are in which state, and the largest of each figure."""
    counts: dict[str, int] = {}
    for row in members:
        counts[row["state"]] = counts.get(row["state"], 0) + 1

    def largest(name: str) -> float | None:
        return max((row[name] for row in members if row[name] is not None), default=None)

    figures = {name: largest(name) for name in ("cos_distance", "rel_l2", "quantization", "i_max", "z_rms", "z_max")}
    text = ", ".join(f"{n} {state}" for state, n in counts.items())
    return {"layer": members[0]["layer"], "stage": f"⋮ {text}", "norm_ratio": None, "state": "largest", **figures}


def stage_table(rows: Sequence[Row], verbose: bool = True) -> Table:
    """The cosine-per-stage table of a report.

    Parameters
    ----------
    rows : sequence of mapping
        ``stages`` of the JSON report.
    verbose : bool
        Show every layer.
    """
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name, justify in (("layer", "right"), ("stage", "left"), ("1−cos", "right"), ("rel L2", "right"), ("norm ratio", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    closed = verbose and any(_closure(row) for row in rows)
    for name in ("quantization", "I", "rms z", "max z", *(("leftover", "limit") if closed else ())):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for item in folded(rows, verbose):
        style = STYLES.get(item["state"], "dim")
        ratio = item["norm_ratio"]
        table.add_row(
            layer_name(item["layer"]),
            Text(item["stage"], style="bold red" if item["state"] == "wrong" else ""),
            figure(item["cos_distance"]),
            figure(item["rel_l2"]),
            "·" if ratio is None else f"{ratio:.6f}",
            figure(item["quantization"]),
            plain(item["i_max"], 1),
            plain(item["z_rms"]),
            plain(item["z_max"], 1),
            *([figure(_closure(item).get(name)) for name in ("leftover", "limit")] if closed else ()),
            Text(item["state"], style=style),
            style="dim" if item["state"] == "largest" else None,
        )
    return table


def _closure(row: Row) -> Mapping[str, float]:
    """Closure of the subject at a stage; empty where there is none."""
    return (row.get("closure") or {}).get("subject") or {}


def table_text(rows: Sequence[Row], verbose: bool = True) -> str:
    """The table as plain text, for records and notebooks."""
    page = io.StringIO()
    Console(file=page, width=WIDTH, color_system=None, force_terminal=False, force_jupyter=False).print(stage_table(rows, verbose))
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines()) + "\n"


def operation_table(rows: Sequence[Row]) -> Table:
    """Our own engine on two devices, operation by operation (``operations`` of the JSON report)."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("operation", "stages", "values", "same bits", "largest rel L2", "at", "from token"):
        table.add_column(name, justify="left" if name in ("operation", "at") else "right", no_wrap=True)
    for row in rows:
        token = "·" if row["token"] is None else str(row["token"])
        style = "" if row["equal"] == row["values"] else "bold red"
        counts = [str(row[name]) for name in ("tensors", "values", "equal")]
        table.add_row(row["operation"], *counts, figure(row["rel_l2"]), row["stage"] or "·", token, style=style)
    return table


def _side_text(side: Mapping[str, Any]) -> str:
    backend = f", {side['backend']}" if side.get("backend") else ""
    return f"{side['spelling']} ({side['profile']}{backend})"


def _labelled(lines: Iterable[tuple[str, str]]) -> Table:
    """Label and text in two columns."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in lines:
        table.add_row(label, Text(text))
    return table


def render(report: Report, verbose: bool = False) -> RenderableType:
    """The whole report.

    Parameters
    ----------
    report : Report
    verbose : bool
        Every layer, and every note.
    """
    data = report.to_json()
    head = Text(report.sentence, style=VERDICT_STYLES[data["verdict"]])
    sides = [("subject", _side_text(data["subject"]))]
    if data["reference"]:
        sides.append(("reference", _side_text(data["reference"])))
    if report.prompt is not None:
        sides.append(("prompt", f"{report.prompt!r} ({len(data['tokens'])} tokens)"))
    first = report.first
    if first is not None and first.diagnosis is not None:
        head.append("\n" + first.diagnosis.sentence, style="not bold")
    parts: list[RenderableType] = [head, Text(), _labelled(sides), Text()]
    if data["stages"]:
        parts += [stage_table(data["stages"], verbose), Text()]
    if data["operations"]:
        parts += [operation_table(data["operations"]), Text()]
    tail = list(report.answers)
    tail += [(f"probe {outcome.probe}", f"{outcome.state.replace('_', ' ')}: {outcome.text}") for outcome in report.probed]
    tail += [("note", note) for note in report.notes]
    tail.append(("reproduce", report.reproduce))
    return Group(*parts, _labelled(tail))
