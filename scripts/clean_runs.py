"""Thousands of runs on which nothing is wrong, each judged: how many false alarms, and how near to the gates the judge comes.

``python scripts/clean_runs.py`` runs every model of ``clean_models.py`` on every engine that can run it (our own in each weight format,
Hugging Face in three dtypes, llama.cpp in several formats), judges each run twice (stage by stage, and the free run against propagated
noise) and appends one line per run to ``evidence/clean-runs/runs.jsonl``; the table beside it is made from the lines.  ``--resume`` leaves
out what is there already, ``--share 0.02`` takes about every fiftieth run, ``--only hf canary`` those whose engine or kind of model has
such a name.  Refuses to call anything wrong itself: the judgement is ``judge.local`` and ``judge.closure``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import clean_models
import clean_table
import numpy as np
import tiny
from clean_models import KINDS, ROOT, Material
from make_evidence import environment

from aprender import _core, arithmetic, stages
from aprender.captures import Captures
from aprender.errors import CannotRun
from aprender.judge import closure, witness
from aprender.judge.local import EXACT, NOT_COMPARABLE, WRONG, StageResult, local
from aprender.judge.witness import ModelData

FOLDER = ROOT / "evidence" / "clean-runs"
SHARE = 0.3
"""Of all runs: near 10 000, which two idle cores judge in less than 25 minutes."""

FEWEST = 256
"""Elements of a stage whose rms z is worth a range."""

# ---- the engines -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """A way of running a model.

    Attributes
    ----------
    name : str
        ``own Q4_K``, ``hf float16``, ``ggml Q8_0 f16``.
    open : callable
        A material and an empty folder to a side.
    wide : bool
        It needs rows of 256.
    seeds : int
        Models of each kind and architecture: more where an alarm is more likely, none where every bit is declared.
    shipped : bool
        It runs the file of the material as it is.
    """

    name: str
    open: Callable[[Material, Path], Any]
    wide: bool = False
    seeds: int = 1
    shipped: bool = False


def _gguf(material: Material, folder: Path, kind: str) -> Path:
    """The material as a GGUF whose matrices are in a format."""

    def encode(name: str, array: Any) -> bytes:
        return bytes(_core.encode(name, np.ascontiguousarray(array)).tobytes())

    ours = kind in ENCODED and kind not in ("F32", "F16", "BF16")
    with np.errstate(all="ignore"):  # the package divides by scales that are subnormal
        return tiny.save_gguf(material.shape, folder / "model.gguf", kind, made=material.made, encode=encode if ours else None)


def _own(kind: str) -> Callable[[Material, Path], Any]:
    def opened(material: Material, folder: Path) -> Any:
        from aprender.sides.own import OwnSide

        if kind.startswith("APR"):
            return OwnSide(tiny.save_apr(material.shape, folder / "model.apr", kind, made=material.made), threads=1)
        return OwnSide(_gguf(material, folder, kind), threads=1)

    return opened


def _ggml(kind: str, cache: str) -> Callable[[Material, Path], Any]:
    def opened(material: Material, folder: Path) -> Any:
        from aprender.sides.llamacpp import LlamaCppSide

        path = material.file if kind == "shipped" and material.file else _gguf(material, folder, kind)
        return LlamaCppSide(path, cache=cache, threads=1)

    return opened


def _shipped(material: Material, folder: Path) -> Any:
    from aprender.sides.own import OwnSide

    assert material.file is not None
    return OwnSide(material.file, threads=1)


def _hf(dtype: str, name: str) -> Callable[[Material, Path], Any]:
    def opened(material: Material, folder: Path) -> Any:
        from aprender.sides.hf import HFSide

        tiny.save_hf(material.shape, folder, dtype="float32", made=material.made)
        side = HFSide(str(folder), dtype)
        side.declare(arithmetic.profile(name))
        return side

    return opened


ENCODED = frozenset(row[0] for row in _core.FORMATS if row[8])
"""Formats that we encode; the others of :data:`OWN` are encoded by the ``gguf`` package."""

OWN = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q4_K", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "TQ1_0", "TQ2_0", "MXFP4", "APR_Q4", "APR_Q8")
GGML = ("F32", "F16", "BF16", "Q8_0", "Q4_K", "Q6_K", "Q4_0", "Q5_1")
SUPER = frozenset(row[0] for row in _core.FORMATS if row[3] == 256)
"""Formats with blocks of 256."""

DTYPES: Mapping[str, str] = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
SEEDS: Mapping[str, int] = {"f32": 6, "f16": 3, "bf16": 3}
"""Models by dtype: in float32 the group rule is the weakest, so it gets the most."""

ENGINES: tuple[Engine, ...] = (
    *(Engine(f"own {kind}", _own(kind), kind in SUPER) for kind in OWN),
    Engine("own shipped", _shipped, True, shipped=True),
    *(
        Engine(f"hf {name.removeprefix('hf-')}", _hf(DTYPES[row.activations.name], name), seeds=SEEDS[row.activations.name])
        for name, row in arithmetic.PROFILES.items()
        if name.startswith("hf-")
    ),
    *(Engine(f"ggml {kind} {cache}", _ggml(kind, cache), kind in SUPER) for kind in GGML for cache in ("f32", "f16")),
    *(Engine(f"ggml shipped {cache}", _ggml("shipped", cache), True, shipped=True) for cache in ("f32", "f16")),
)


# ---- one run ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """One model on one engine: its prompts share the model in memory."""

    engine: str
    kind: str
    arch: str
    seed: int
    prompts: tuple[int, ...] = field(default=())

    def name(self, prompt: int) -> str:
        """What a line is found by again."""
        return f"{self.engine}/{self.kind}/{self.arch}/{self.seed}/{prompt}"


def judge(side: Any, model: ModelData, ids: Sequence[int]) -> dict[str, Any]:
    """Judge one run, as a record."""
    captures = side.capture(ids)
    results = local(captures, model, side.profile)
    closed = closure.closure(captures, model, side.profile, witness.forward(model, ids), results)
    return {"profile": side.profile.name, "tokens": len(ids), **figures(captures, results), **closing(closed.rows)}


def figures(captures: Captures, results: Sequence[StageResult]) -> dict[str, Any]:
    """What the local judgement came to: alarms, and for each family of tests the stage that was nearest to its gate."""
    measured = [r for r in results if r.measured]
    bad = [r for r in results if r.state in (WRONG, NOT_COMPARABLE)]
    alarms = [f"{stages.spell(r.key)}: {r.reason}" for r in bad]
    if captures.manifest.attestation is False:
        alarms.append("logits differ when nothing is captured")
    out: dict[str, Any] = {
        "stages": len(measured),
        "elements": sum(r.n for r in measured),
        "exact": sum(r.state == EXACT for r in measured),
        "overflowed": sum(r.overflowed for r in results),
        "unmeasured": sorted({r.stage for r in results if not r.measured and r not in bad}),
        "alarms": alarms,
    }
    for family in ("element", "group", "row"):
        worst = max(measured, key=lambda r: getattr(r.margin, family), default=None)
        share = getattr(worst.margin, family) if worst else 0.0
        out[family] = [round(share, 4), stages.spell(worst.key)] if worst and share > 0 else None
    z = [(r.z_rms, stages.spell(r.key)) for r in measured if r.z_rms is not None and r.n >= FEWEST and r.state != EXACT]
    out["z"] = [[round(value, 4), key] for value, key in (min(z), max(z))] if z else None
    return out


def closing(rows: Sequence[closure.Closed]) -> dict[str, Any]:
    """What the free run came to: its leftover over its limit where that is largest; an alarm if no stage is wrong and it is above 1."""
    if not rows:
        return {"closure": None}
    worst = max(rows, key=lambda row: row.leftover / row.limit if row.limit else 0.0)
    share = worst.leftover / worst.limit if worst.limit else 0.0
    return {"closure": [round(share, 4), stages.spell(worst.key)], "unexplained": [stages.spell(r.key) for r in rows if not r.holds]}


def run(batch: Batch) -> list[dict[str, Any]]:
    """Every prompt of a batch."""
    engine = next(e for e in ENGINES if e.name == batch.engine)
    material = clean_models.material(batch.kind, batch.arch, batch.seed, engine.wide)
    out = []
    with tempfile.TemporaryDirectory() as folder:
        side = engine.open(material, Path(folder))
        model = ModelData(**side.model_data())
        for prompt in batch.prompts:
            line = {"run": batch.name(prompt), **judge(side, model, material.prompts[prompt])}
            out.append({field: value for field, value in line.items() if value not in (None, 0, [])})
        side.close()
    return out


# ---- all runs --------------------------------------------------------------------------------------------------------------------------


def batches() -> Iterator[Batch]:
    """Every model on every engine that can run it."""
    for engine in ENGINES:
        for kind in KINDS:
            for arch in clean_models.archs(kind):
                for seed in range(engine.seeds):
                    count = clean_models.prompts(kind)
                    if not engine.shipped or clean_models.has_file(kind):
                        yield Batch(engine.name, kind, arch, seed, tuple(range(count)))


def chosen(args: argparse.Namespace, done: set[str]) -> list[Batch]:
    """The batches that the options leave, without the runs that are done: of a share, those whose names' checksums are in it."""
    out = []
    for batch in batches():
        if args.only and not any(word in (batch.kind, batch.engine, *batch.engine.split()) for word in args.only):
            continue
        names = {prompt: batch.name(prompt) for prompt in batch.prompts}
        kept = [prompt for prompt, name in names.items() if _place(name) < args.share and name not in done]
        if kept:
            out.append(Batch(batch.engine, batch.kind, batch.arch, batch.seed, tuple(kept)))
    return out


def _place(name: str) -> float:
    """Where a run stands in 0 to 1: the same each time, and no neighbour of runs with a name like it."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) / 2.0**64


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _runnable(wanted: Sequence[Batch]) -> list[Batch]:
    """Without llama.cpp where it is not installed: said, not silent."""
    from aprender.sides.llamacpp import find_libraries

    try:
        find_libraries()
    except CannotRun as reason:
        print(f"left out: llama.cpp ({reason})", file=sys.stderr)
        return [batch for batch in wanted if not batch.engine.startswith("ggml")]
    return list(wanted)


def main() -> None:
    """Run, and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="examples: clean_runs.py --jobs 2; clean_runs.py --resume --share 1 --only ggml; clean_runs.py --share 0.01 -o /tmp/runs",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--share", type=float, default=SHARE, help="of all runs (0.02: about every fiftieth); a larger one contains it")
    parser.add_argument("--only", nargs="+", default=[], help="words of engines, or kinds of model (hf, own, Q4_K, f32-sdpa, canary ...)")
    parser.add_argument("--resume", action="store_true", help="keep the lines that are there, and run what is missing")
    parser.add_argument("-o", "--output", type=Path, default=FOLDER)
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "runs.jsonl"
    lines = clean_table.read(path) if args.resume else []
    wanted = _runnable(chosen(args, {line["run"] for line in lines}))
    began = time.monotonic()
    with (
        open(path, "a" if args.resume else "w") as stream,
        concurrent.futures.ProcessPoolExecutor(args.jobs, initializer=_one_thread) as pool,
    ):
        for done in concurrent.futures.as_completed([pool.submit(run, batch) for batch in wanted]):
            for line in done.result():
                lines.append(line)
                stream.write(json.dumps(line) + "\n")
                for alarm in clean_table.alarms(line):
                    print(f"ALARM {line['run']}: {alarm}", file=sys.stderr)
            stream.flush()
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    (args.output / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
    command = " ".join(["python", "scripts/clean_runs.py", *sys.argv[1:]])
    (args.output / "README.md").write_text(clean_table.readme(lines, command))
    print(clean_table.sentence(lines), file=sys.stderr)


if __name__ == "__main__":
    main()
