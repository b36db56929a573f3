"""Measure every arithmetic profile: what a clean side leaves, beside the smallest planted error that is caught there.

``python scripts/measure_profiles.py`` captures the embedded model by each side of :data:`SIDES` (our engine, Hugging Face, llama.cpp) and
writes ``evidence/profiles/``; a side whose library is not here is left out, and said.  A band alone could be met by an overestimated
variance, so each clean rms z stands beside a power cell: the smallest relative error x, on a grid of half decades, for which the stage is
called wrong when the value before its last rounding is multiplied by (1 + x).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from make_evidence import ROOT, environment

import aprender
from aprender import arithmetic, stages
from aprender.errors import CannotRun
from aprender.judge.local import WRONG, StageResult, _gates, local
from aprender.judge.measure import measure
from aprender.judge.replay import Replay
from aprender.judge.rounding import to_format
from aprender.judge.rule import Rule
from aprender.judge.witness import ModelData

PROMPTS = (
    "What is 7+8? 7+8 is 15.\nWhat is the opposite of hot?",
    "What is 2+2?",
    "What is the capital of France?",
    "Who are you?",
    "What is 3+9? 3+9 is 12. What is 12+1? 12+1 is 13. What is the opposite of small?",
)
"""The power cells are of the first."""

SIZES = tuple(m * 10.0**e for e in range(-12, 0) for m in (1.0, 3.0))
LAYER = 1
"""Of the power cells."""

SIDES: Mapping[str, str] = {
    "exact": "{gguf}",
    "hf-f32": "hf:{folder}@float32",
    "hf-f16": "hf:{folder}@float16",
    "hf-bf16": "hf:{folder}@bfloat16",
    "hf-f32-sdpa": "hf:{folder}@float32",
    "hf-f16-sdpa": "hf:{folder}@float16",
    "hf-bf16-sdpa": "hf:{folder}@bfloat16",
    "ggml-cpu": "llama.cpp:{gguf}",
    "ggml-cpu-f16": "llama.cpp:{gguf}@f16",
}
"""Profile to the spelling of a side that can have it, on the embedded model; a profile that is not declared is not run."""


def sides(names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Profile names and sides, as far as their libraries are here."""
    places = {"gguf": aprender.canary(), "folder": aprender.canary("")}
    for name in names:
        try:
            side = aprender.side(SIDES[name].format(**places))
        except (CannotRun, ImportError) as missing:
            print(f"{name} is left out: {missing}", file=sys.stderr)
            continue
        if side.profile.name != name and hasattr(side, "declare"):
            side.declare(arithmetic.profile(name))
        if side.profile.name != name:
            raise SystemExit(f"{SIDES[name]} has the arithmetic {side.profile.name}, not {name}")
        yield name, side


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


def clean(side: Any, model: ModelData) -> Iterator[list[StageResult]]:
    """What the judge finds in every prompt."""
    for text in PROMPTS:
        yield local(side.capture(side.tokenizer().encode(text)), model, side.profile)


def rows_of(name: str, side: Any) -> Iterator[dict[str, Any]]:
    """One line per stage: clean figures over all prompts and layers, power cells of one layer of the first prompt."""
    model = ModelData(**side.model_data())
    runs = list(clean(side, model))
    captures = side.capture(side.tokenizer().encode(PROMPTS[0]))
    profile = side.profile.with_order(captures.manifest.arithmetic)
    replay = Replay.of(captures, model, profile)
    gates = _gates(replay, Rule())
    for result in runs[0]:
        if not result.measured or result.layer not in (None, LAYER):
            continue
        alike = [r for run in runs for r in run if r.stage == result.stage and r.measured]
        z = [r.z_rms for r in alike if r.z_rms is not None]
        whole, one = (smallest_caught(replay, result.key, gates, profile.band, rows) for rows in (slice(None), slice(3, 4)))
        yield {
            "profile": name,
            "layer": result.layer,
            "stage": result.stage,
            "judged": len(alike),
            "wrong": sum(r.state == WRONG for r in alike),
            "n": sum(r.n for r in alike),
            "z_rms": [min(z), max(z)] if z else None,
            "z_max": max((r.z_max for r in alike if r.z_max is not None), default=None),
            "i_max": max((r.i_max for r in alike if r.i_max is not None), default=None),
            "bit_equal": sum((r.bit_equal or 0.0) * r.n for r in alike) / max(1, sum(r.n for r in alike)),
            "claimed": result.power,
            "caught_whole_stage": whole,
            "caught_one_token": one,
        }


HEAD = f"""\
# profiles

What does a clean side leave under each arithmetic profile, and how small an error is caught there? The embedded model on {len(PROMPTS)}
prompts, all layers: smallest and largest rms z of a stage, largest |z| and I, share of bits equal to the emulation. Beside it the power, in
layer {LAYER} of the first prompt ({json.dumps(PROMPTS[0])}).

```
$ python scripts/measure_profiles.py
```

*Caught* is the smallest relative error, on a grid of half decades, of the value before its last rounding that is called wrong: in the whole
stage, or in one token's row; *claimed* is what the judge says of the whole stage without trying. 1e-12 is the least that was tried: where
the recipe is one rounding of a sum or product of short numbers, many exact results lie just between two neighbours, and the smallest push
decides. An rms z of – means that nothing is rounded there (copies).
"""

NAMES = ("stage", "judged", "wrong", "clean rms z", "max z", "max I", "bit-equal", "claimed", "caught: whole stage", "caught: one token")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, one table per profile."""

    def cell(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    out = []
    for name in dict.fromkeys(row["profile"] for row in rows):
        out.append(f"\n## {name}\n\n| {' | '.join(NAMES)} |\n{'|--' * len(NAMES)}|")
        for row in (row for row in rows if row["profile"] == name):
            band = "–" if row["z_rms"] is None else "{:.2f} … {:.2f}".format(*row["z_rms"])
            figures = [band, cell(row["z_max"], ".1f"), cell(row["i_max"], ".1f"), cell(row["bit_equal"], ".5f")]
            caught = [cell(row[size], ".0e") for size in ("claimed", "caught_whole_stage", "caught_one_token")]
            out.append(f"| {row['stage']} | {row['judged']} | {row['wrong']} | {' | '.join(figures + caught)} |")
    return "\n".join(out) + "\n"


def main() -> None:
    """Write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "evidence" / "profiles")
    known = [name for name in SIDES if name in arithmetic.PROFILES]
    parser.add_argument("--only", nargs="+", default=known, choices=known, help="profiles; the others keep what the record has")
    args = parser.parse_args()
    folder, record = args.output, args.output / "stages.jsonl"
    kept = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    rows = [row for row in kept if row["profile"] not in args.only]
    for name, side in sides(args.only):
        print(name, file=sys.stderr)
        rows += list(rows_of(name, side))
    rows.sort(key=lambda row: list(SIDES).index(row["profile"]))
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "environment.json").write_text(json.dumps(environment() | {"threads": os.environ.get("OMP_NUM_THREADS")}, indent=2) + "\n")
    (folder / "README.md").write_text(HEAD + table(rows))


if __name__ == "__main__":
    main()
