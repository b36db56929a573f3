"""Every catalogue fault at every site: is it named there, first and alone?  Number formats x families x prefill and decode x seeds.

``python scripts/fault_matrix.py`` plants each fault of ``judge/faults.py`` in tiny random models (two layers, widths of 256 for the
K-quants; the writers are those of the tests) and writes ``evidence/fault-matrix/``: one line of JSON per fault, format, family, mode and
seed, the environment, and a table.  Decode is the same prompt token by token.  Clean models and the controls are judged too.  Options cut
the matrix; the record says what was run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from make_evidence import ROOT, environment

from aprender import _core, stages
from aprender.captures import check_contract
from aprender.errors import NotComparable
from aprender.judge import faults, witness
from aprender.judge.verdict import local
from aprender.sides.own import OwnSide

sys.path.insert(0, str(ROOT / "tests"))
import tiny

FORMATS, MODES = ("F32", "F16", "Q8_0", "Q6_K", "Q4_K"), ("prefill", "decode")
TOKENS = 9
STEPWISE = {"target": "pieces", "value": 1}
NAMED, ALSO, OTHER, MISSED, UNSEEN = "named", "named, and others below it", "another first", "missed", "no bit changes"


@dataclass
class Model:
    """A model in a mode: its file, what it gives untouched."""

    arch: str
    fmt: str
    mode: str
    seed: int
    path: Path
    ids: list[int] = field(default_factory=list)

    def open(self) -> Model:
        """Run it untouched."""
        self.side = self.edited(())
        self.data = self.side.model_data()
        self.truth = witness.ModelData(**self.data)
        self.clean = self.side.capture(self.ids)
        return self

    def edited(self, edits: tuple[faults.Edit, ...]) -> OwnSide:
        """The engine with a fault in it."""
        cut = (STEPWISE,) if self.mode == "decode" and not any(edit["target"] == "pieces" for edit in edits) else ()
        return OwnSide(self.path, edits=(*edits, *cut))

    def wrong(self, captures: Any) -> list[stages.Key]:
        """What the judge accuses."""
        return [r.key for r in local(captures, self.truth, self.side.profile) if r.state == "wrong"]

    def judge(self, row: faults.FaultRow, key: stages.Key) -> str:
        """One fault at one site."""
        captures = self.edited(row.edits(*key, self.data["flags"])).capture(self.ids)
        if np.array_equal(captures[key], self.clean[key]):
            return UNSEEN
        wrong = self.wrong(captures)
        if not wrong:
            return MISSED
        if wrong[0] != key:
            return OTHER
        return NAMED if wrong == [key, *((stage, key[1]) for stage in row.also)] else ALSO

    def control(self, row: faults.FaultRow, key: stages.Key) -> str:
        """One control at one site: what it came to."""
        captures = self.edited(row.edits(*key, self.data["flags"])).capture(self.ids)
        try:
            check_contract(captures, self.clean)
        except NotComparable:
            return faults.REFUSED
        off = set(self.wrong(captures)) - {(stage, key[1]) for stage in (key[0], *row.also)}
        if off:
            return "alarm"
        close = np.allclose(captures[stages.LOGITS], self.clean[stages.LOGITS][-len(captures[stages.LOGITS]) :], rtol=1e-3, atol=1e-3)
        return row.expect if close else "alarm"


def models(args: argparse.Namespace, folder: Path) -> Iterator[Model]:
    """Every model of the matrix."""
    for seed, fmt, arch in itertools.product(range(args.seeds), args.formats, args.archs):
        shape = tiny.Shape(arch, dim=256, ffn=512, heads=4, kv_heads=2, head=64, vocab=160)
        path = folder / f"{arch}-{fmt}-{seed}.gguf"
        tiny.save_gguf(shape, path, fmt, seed, encode=None if fmt in ("F32", "F16") else lambda f, a: _core.encode(f, a).tobytes())
        ids = np.random.default_rng(seed).integers(0, shape.vocab, TOKENS).tolist()
        for mode in args.modes:
            yield Model(arch, fmt, mode, seed, path, ids).open()


def records(model: Model, every: int) -> Iterator[dict[str, Any]]:
    """One record per fault and control, and one for the clean model; of each fault's sites every so many, from a different one on."""
    at = {"arch": model.arch, "format": model.fmt, "mode": model.mode, "seed": model.seed}
    yield {"fault": None, **at, "sites": 1, "outcome": {"agree" if not model.wrong(model.clean) else "alarm": 1}}
    for i, row in enumerate([*faults.FAULTS.values(), *faults.CONTROLS.values()]):
        judge = model.control if row.expect else model.judge
        sites = row.sites(model.data["flags"], model.data["hparams"])
        sites = sites[i % min(every, len(sites) or 1) :: every]
        made = {stages.spell(key): judge(row, key) for key in sites}
        good = row.expect or NAMED
        yield {
            "fault": row.name,
            **at,
            "sites": len(sites),
            "outcome": dict(Counter(made.values())),
            "exceptions": {site: outcome for site, outcome in made.items() if outcome != good},
        }


def table(rows: list[dict[str, Any]], formats: list[str]) -> str:
    """Faults by formats: sites named there and alone, of those where a bit changes."""

    def cell(name: str, fmt: str) -> str:
        total: Counter[str] = Counter()
        for row in rows:
            if row["fault"] == name and row["format"] == fmt:
                total.update(row["outcome"])
        unseen = total.pop(UNSEEN, 0)
        good = total[faults.CONTROLS[name].expect if name in faults.CONTROLS else NAMED]
        return f"{good}/{sum(total.values())}" + (f" ({unseen} unseen)" if unseen else "")

    lines = ["| fault | " + " | ".join(formats) + " |", "|--" * (len(formats) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cell(name, fmt) for fmt in formats) + " |" for name in (*faults.FAULTS, *faults.CONTROLS)]
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> str:
    """The totals in a sentence or two."""
    of_faults: Counter[str] = Counter()
    for row in rows:
        if row["fault"] in faults.FAULTS:
            of_faults.update(row["outcome"])
    controls = [row for row in rows if row["fault"] in faults.CONTROLS]
    alarms = sum(row["outcome"].get("alarm", 0) for row in rows if row["fault"] not in faults.FAULTS)
    seen = sum(of_faults.values()) - of_faults[UNSEEN]
    return (
        f"**{seen} planted faults that change a bit: {of_faults[NAMED]} named at their stage and layer and nothing else accused, "
        f"{of_faults[ALSO]} named first with others accused downstream, {of_faults[OTHER]} with another stage first, {of_faults[MISSED]}"
        f" missed; {of_faults[UNSEEN]} more change no bit of their stage. {sum(row['fault'] is None for row in rows)} clean runs and"
        f" {sum(row['sites'] for row in controls)} controls: {alarms} alarms.**"
    )


def write(rows: list[dict[str, Any]], args: argparse.Namespace, seconds: float) -> None:
    """The record."""
    folder = ROOT / "evidence" / "fault-matrix"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "matrix.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
    odd = [row for row in rows if row.get("exceptions")]
    listed = dict.fromkeys(
        f"- {row['fault']} at {site}: {what} ({row['arch']} {row['format']} {row['mode']})"
        for row in odd
        for site, what in row["exceptions"].items()
    )
    judged = dict.fromkeys(f"{row['arch']} {row['format']} {row['mode']} seed {row['seed']}" for row in rows)
    formats = list(dict.fromkeys(row["format"] for row in rows))
    text = (
        "# fault-matrix\n\nIs every fault of the catalogue named at the stage and layer where it was planted, and nothing else?\n\n"
        f"```\n$ python {' '.join(['scripts/fault_matrix.py', *sys.argv[1:]])}\n```\n\n{summary(rows)}\n\nJudged:"
        f" {', '.join(judged)}; {TOKENS} tokens; {seconds:.0f} s.\n\n"
        f"Sites named, of those where a bit changes (of a control: what it must come to):\n\n{table(rows, formats)}\n\n"
        f"## Exceptions\n\n" + ("\n".join(listed) or "None.") + "\n"
    )
    (folder / "README.md").write_text(text)


def main() -> None:
    """Run the matrix, or the part that the options name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--archs", nargs="+", default=list(tiny.ARCHS), choices=tiny.ARCHS)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--every", type=int, default=1, help="only every so many sites of each fault")
    args = parser.parse_args()
    began, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        for model in models(args, Path(folder)):
            rows += records(model, args.every)
            write(rows, args, time.monotonic() - began)  # a run that is cut short leaves what it has
            print(f"{model.arch} {model.fmt} {model.mode} seed {model.seed}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    print(summary(rows), file=sys.stderr)


if __name__ == "__main__":
    main()
