"""Measure every arithmetic profile: what a clean side leaves, beside the smallest planted error that is caught there.

``python scripts/measure_profiles.py`` captures the embedded model by our engine and by Hugging Face in three dtypes (needs torch) and
writes ``evidence/profiles/``.  A band alone could be met by an overestimated variance, so each clean rms z stands beside a power cell: the
smallest relative error x, on a grid of half decades, for which the stage is called wrong when the value before its last rounding is
multiplied by (1 + x).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from make_evidence import ROOT, environment

import aprender
from aprender import stages
from aprender.judge import verdict
from aprender.judge.measure import measure
from aprender.judge.replay import Replay
from aprender.judge.rounding import to_format
from aprender.judge.rule import Rule
from aprender.judge.witness import ModelData

TEXT = "What is 7+8? 7+8 is 15.\nWhat is the opposite of hot?"
SIZES = tuple(m * 10.0**e for e in range(-12, 0) for m in (1.0, 3.0))
LAYER = 1


def sides() -> Iterator[tuple[str, Any]]:
    """Profile names and sides."""
    folder = aprender.canary("")
    yield "exact", aprender.side(aprender.canary())
    for dtype in ("float32", "float16", "bfloat16"):
        yield {"float32": "hf-f32", "float16": "hf-f16", "bfloat16": "hf-bf16"}[dtype], aprender.side(f"hf:{folder}@{dtype}")


def smallest_caught(replay: Replay, key: stages.Key, gates: Any, band: float, rows: slice) -> float | None:
    """Smallest x of the grid at which an error (1 + x) of some rows before the last rounding is called wrong; None if none is."""
    captured = replay.captured(key)
    made, _ = replay.predict(key, False, captured)
    base = made.pre if made.expected is None else made.expected
    for x in SIZES:
        planted = np.array(captured, np.float64)
        axis = (slice(None), rows) if planted.ndim == 3 else (rows,)
        planted[axis] = to_format(base * (1.0 + x), made.format)[axis]
        if measure(planted, made, gates, band).reasons:
            return float(x)
    return None


def rows_of(name: str, side: Any) -> Iterator[dict[str, Any]]:
    """One line per stage of one layer and of the whole model."""
    ids = side.tokenizer().encode(TEXT)
    captures = side.capture(ids)
    model = ModelData(**side.model_data())
    profile = side.profile.with_order(captures.manifest.arithmetic)
    replay = Replay.of(captures, model, profile)
    gates = verdict._gates(replay, Rule())
    for result in verdict.local(captures, model, side.profile):
        if not result.measured or result.layer not in (None, LAYER):
            continue
        whole, one = (smallest_caught(replay, result.key, gates, profile.band, rows) for rows in (slice(None), slice(3, 4)))
        yield {
            "profile": name,
            "layer": result.layer,
            "stage": result.stage,
            "state": result.state,
            "n": result.n,
            "z_rms": result.z_rms,
            "z_max": result.z_max,
            "i_max": result.i_max,
            "bit_equal": result.bit_equal,
            "caught_whole_stage": whole,
            "caught_one_token": one,
        }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, one table per profile."""

    def cell(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    out = []
    for name in dict.fromkeys(row["profile"] for row in rows):
        names = ("stage", "clean rms z", "max z", "max I", "bit-equal", "caught: whole stage", "caught: one token")
        out.append(f"\n## {name}\n\n| {' | '.join(names)} |\n{'|--' * len(names)}|")
        for row in (row for row in rows if row["profile"] == name):
            figures = [cell(row["z_rms"], ".2f"), cell(row["z_max"], ".1f"), cell(row["i_max"], ".1f"), cell(row["bit_equal"], ".5f")]
            caught = [cell(row["caught_whole_stage"], ".0e"), cell(row["caught_one_token"], ".0e")]
            out.append(f"| {row['stage']} | {' | '.join(figures + caught)} |")
    return "\n".join(out) + "\n"


def main() -> None:
    """Write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "evidence" / "profiles")
    folder = parser.parse_args().output
    rows = []
    for name, side in sides():
        print(name, file=sys.stderr)
        rows += list(rows_of(name, side))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "environment.json").write_text(json.dumps(environment() | {"threads": os.environ.get("OMP_NUM_THREADS")}, indent=2) + "\n")
    head = (
        "# profiles\n\nWhat does a clean side leave under each arithmetic profile, and how small an error is caught"
        " there? The embedded model"
        " on"
        f" {json.dumps(TEXT)}; stages of layer {LAYER} and of the whole model.\n\n```\n$ python scripts/measure_profiles.py\n```\n\n"
        "*Caught* is the smallest relative error, on a grid of half decades, of the value before its last rounding that is called wrong:"
        " in the whole stage, or in one token's row. 1e-12 is the least that was tried: where the recipe is one"
        " rounding of a sum or product"
        " of short numbers, many exact results lie just between two neighbours, and the smallest push decides. An rms"
        " z of – means that nothing is"
        " rounded there (copies).\n"
    )
    (folder / "README.md").write_text(head + table(rows))


if __name__ == "__main__":
    main()
