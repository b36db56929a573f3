"""The record of ``clean_runs.py`` as a page: how many runs, how many alarms, and how near to the gates.

Owns the counting.  Refuses to leave a line out: every run that is in the file is in the totals.  Called by ``clean_runs.py``, which reads
and writes the lines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """The lines of a record; one that was cut short by the end of its run is dropped."""
    if not path.exists():
        return []
    out = []
    for text in path.read_text().splitlines():
        try:
            out.append(json.loads(text))
        except ValueError:
            continue
    return out


def alarms(line: Line) -> list[str]:
    """What a run was accused of: nothing, if all is well."""
    free, said = line.get("unexplained", []), line.get("alarms", [])
    return said + ([f"unexplained from {free[0]} on ({line['closure'][0]} of its limit)"] if free and not said else [])


def engine(line: Line) -> str:
    """The engine of a run."""
    return str(line["run"].split("/")[0])


def kind(line: Line) -> str:
    """The kind of model of a run."""
    return str(line["run"].split("/")[1])


def sentence(lines: Sequence[Line]) -> str:
    """The totals; of no alarm in n runs the bound of the rule of three."""
    hit = sum(bool(alarms(line)) for line in lines)
    total, elements = sum(line["stages"] for line in lines), sum(line["elements"] for line in lines)
    bound = f": at 95 % confidence the rate is below {3 / len(lines):.1e} per run" if lines and not hit else ""
    return f"**{len(lines)} clean runs judged, {total} stages, {elements:.2g} elements: {hit} false alarms{bound}.**"


def _worst(lines: Iterable[Line], field: str) -> str:
    """The largest share of a gate, and where."""
    found = max((line[field] for line in lines if line.get(field)), default=None)
    return "–" if found is None else f"{found[0]:.2f} ({found[1].split('.')[-1]})"


def _range(lines: Iterable[Line]) -> str:
    """Smallest and largest rms z of a stage."""
    found = [line["z"] for line in lines if line.get("z")]
    if not found:
        return "–"
    low, high = min(z[0] for z in found), max(z[1] for z in found)
    return f"{low[0]:.2f} … {high[0]:.2f} ({high[1].split('.')[-1]})"


def _table(lines: Sequence[Line], title: str, key: Callable[[Line], str]) -> str:
    """One row per value of a key."""
    names = (
        title,
        "runs",
        "stages",
        "elements",
        "alarms",
        "max I / gate",
        "worst group / gate",
        "worst row / gate",
        "rms z",
        "free / limit",
    )
    out = [f"| {' | '.join(names)} |", "|--" * len(names) + "|"]
    for value in dict.fromkeys(map(key, lines)):
        rows = [line for line in lines if key(line) == value]
        cells = [value, len(rows), sum(r["stages"] for r in rows), f"{sum(r['elements'] for r in rows):.1e}"]
        cells += [sum(bool(alarms(r)) for r in rows), _worst(rows, "element"), _worst(rows, "group"), _worst(rows, "row"), _range(rows)]
        out.append(f"| {' | '.join(map(str, [*cells, _worst(rows, 'closure')]))} |")
    return "\n".join(out)


def readme(lines: Sequence[Line], command: str) -> str:
    """The page."""
    lines = sorted(lines, key=lambda line: (line["profile"], line["run"]))
    listed = [f"- `{line['run']}`: {alarm}" for line in lines for alarm in alarms(line)]
    single = [line for line in lines if line["profile"].startswith("hf-f32")]
    over = sum(line.get("overflowed", 0) > 0 for line in lines)
    parts = [
        "# clean-runs",
        "How often is a run accused on which nothing is wrong?",
        f"```\n$ {command}\n```",
        sentence(lines),
        "Every model is right, and is run by an engine as it is: our own in each weight format, Hugging Face transformers, llama.cpp. A run"
        " is judged stage by stage on its own inputs, and its free run against propagated rounding noise; an alarm is any stage called"
        " wrong or not comparable, a free run called unexplained, or logits that change when they are looked at. A figure of a gate is the"
        " largest of all runs: 1 would be an alarm. The gate of elements is that of |I|, of groups that of the mean square of z over a"
        " token, channel, key, head or stage, of rows that of the factor that a norm's row shares.",
        f"In {over} runs a value passes the end of float16, as the declared arithmetic does; that is said and is no alarm.",
        "## By profile",
        _table(lines, "profile", lambda line: line["profile"]),
        "## By engine",
        _table(lines, "engine", engine),
        "## By kind of model",
        _table(sorted(lines, key=kind), "kind", kind),
        "## Float32 by Hugging Face: the group rule",
        "The order in which torch adds is identified where it can be and an envelope where not; the variance of a norm's row factor is"
        " modelled. Each kind of model on its own:",
        _table(single, "kind", lambda line: f"{line['profile']} {kind(line)}"),
        "## Alarms",
        "\n".join(listed) or "None.",
    ]
    return "\n\n".join(parts) + "\n"
