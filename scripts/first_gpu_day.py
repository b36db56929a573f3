"""Everything that is owed on the first day a GPU is there, in one command of at most 20 minutes; writes evidence/cuda/.

    python scripts/first_gpu_day.py                     # all steps
    python scripts/first_gpu_day.py parity faults       # some of them
    python scripts/first_gpu_day.py --fake --out /tmp/x # the same on a device of host memory: the script works; nothing is measured

Steps: ``build`` (nvcc, for this device), ``tests`` (tests/test_cuda.py), ``sanitizer`` (compute-sanitizer's four tools on the tiny models),
``parity`` (every value against the CPU, 16 decoded tokens), ``z`` (statistics and power of each stage), ``arithmetic`` (what the device's
additions really do, from products whose results differ), ``faults`` (each planted fault, and what was named), ``speed`` (decode and prefill
against the roofline).  A step that fails is recorded as failed and the next one runs; the exit code is 1 then, 3 where there is no device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts"), str(ROOT)]

import tiny  # noqa: E402

import aprender  # noqa: E402
from aprender import _core, bisection, env  # noqa: E402

BUDGET = 20 * 60
LOGITS = ("lm_head", None)
CANARY = aprender.canary()
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12, "L40": 0.86e12, "RTX 4090": 1.01e12, "B200": 8.0e12}
"""Nominal memory bandwidth by name, bytes/s: data sheets.  --bandwidth gives another, of a device that is not here or a measured one."""

GRAPH = ("unrecorded@ffn_up", "unrecorded@k_post_rope", "unrecorded@lm_head", "stale@rope_table", "stale@k_cache", "stale@attn_scores")
LINEAR = ("qkv_matmul", "attn_out", "ffn_gate", "ffn_up", "ffn_out", "lm_head")


@dataclass
class Day:
    """Where the records go, and how much time is left."""

    out: Path
    fake: bool
    bandwidth: float | None
    llama_bench: str | None
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return BUDGET - (time.monotonic() - self.began)

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Lines of JSON."""
        (self.out / name).write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))

    def run(self, name: str, words: list[str], limit: float, **variables: str) -> int:
        """A process, its output in NAME.txt; 124 if it ran past its limit."""
        with open(self.out / f"{name}.txt", "w", encoding="utf-8") as stream:
            try:
                more: dict[str, Any] = {"stdout": stream, "stderr": subprocess.STDOUT, "env": os.environ | variables}
                done = subprocess.run(words, cwd=ROOT, check=False, timeout=min(limit, self.left), **more)
            except subprocess.TimeoutExpired:
                return 124
        return done.returncode

    def library(self, faults: bool = False) -> str:
        """The library that the steps use: the shipped one or the one with faults, on the GPU or on the fake device."""
        folder, name = ROOT / "build" / "cuda", "libaprender_cuda" + "_fake" * self.fake + "_faults" * faults + ".so"
        return str(ROOT / "aprender" / name if not self.fake and not faults else folder / name)


def expect(code: int, what: str) -> None:
    if code:
        raise RuntimeError(f"{what}: exit code {code}" + (" (out of time)" if code == 124 else ""))


def plain(folder: Path) -> Path:
    """The canary as a GGUF in F32: the formats of the story."""
    path = folder / "canary-F32.gguf"
    if not path.exists():
        subprocess.run(
            [sys.executable, "-m", "aprender.convert", aprender.canary(""), path, "--formats", "F32", "-q"], check=True, cwd=ROOT
        )
    return path


# ---- the steps -------------------------------------------------------------------------------------------------------------------------


def build(day: Day, folder: Path) -> str:
    if day.fake:
        expect(day.run("build", ["make", "cuda-fake"], 120), "make cuda-fake")
        return "the fake device"
    said = subprocess.run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True, check=True)
    arch = said.stdout.split()[0].replace(".", "")
    expect(day.run("build", ["make", "build", "cuda", "cuda-faults", f"NVCC_ARCHS={arch}"], 420), "make cuda")
    return f"sm_{arch}"


def tests(day: Day, folder: Path) -> str:
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda.py"]
    expect(day.run("tests", [*words, "-k", "parity_counts" if day.fake else "device"], 420), "tests/test_cuda.py")
    return (day.out / "tests.txt").read_text().strip().splitlines()[-1]


def exercise() -> None:
    """What runs under the sanitizer: every architecture, the canary's K-quants; long, ragged and single pieces, all kept."""
    with tempfile.TemporaryDirectory() as place:
        paths = [tiny.save_gguf(tiny.Shape(arch), Path(place) / f"{arch}.gguf", "Q8_0") for arch in tiny.ARCHS]
        for path in (*paths, Path(CANARY)):
            run = _core.Run(_core.Model(_core.File(path)), backend="cuda")
            for ids in ([3, 1, 4, 1, 5, 92, 65, 35, 89, 79], [7], [8], [1, 2, 3], [4]):
                run.forward(ids, "all")


def sanitizer(day: Day, folder: Path) -> str:
    if day.fake:
        return "not run: the fake device has none"
    for tool, more in (("memcheck", ["--leak-check", "full"]), ("racecheck", []), ("initcheck", []), ("synccheck", [])):
        words = ["compute-sanitizer", "--tool", tool, *more, "--error-exitcode", "86", sys.executable, __file__, "--exercise"]
        expect(day.run(f"sanitizer-{tool}", words, 240), f"compute-sanitizer {tool}")
    return "memcheck, racecheck, initcheck, synccheck: clean"


def parity(day: Day, folder: Path) -> str:
    rows = []
    for path in (CANARY, str(plain(folder))):
        report = bisection.compare(f"cuda:{path}", f"cpu:{path}", steps=2 if day.fake else 16, answer=0, probe=None if day.fake else "all")
        rows += [{"model": Path(path).name, "verdict": report.verdict} | row.to_json() for row in report.operations]
    day.write("parity.jsonl", rows)
    unequal = sum(row["values"] - row["equal"] for row in rows)
    if unequal or any(row["verdict"] != "agree" for row in rows):
        raise RuntimeError(f"{unequal} of {sum(row['values'] for row in rows)} values are not the CPU's bits")
    return f"all {sum(row['values'] for row in rows)} values are the CPU's bits"


def z(day: Day, folder: Path) -> str:
    from measure_profiles import rows_of

    side = aprender.side(f"cuda:{CANARY}")
    side.profile = dataclasses.replace(side.profile, validated=True)  # what is measured here is what the row waits for: with I and bits
    rows = list(rows_of("exact-cuda", side))
    day.write("stages.jsonl", rows)
    return f"{len(rows)} stages"


def products(weight: list[tuple[int, float]], x: list[tuple[int, float]]) -> float:
    """One dot product of 256 columns by the device's GEMV: the canary's head overridden, its input fed."""
    model = _core.Model(_core.File(CANARY))
    matrix = np.zeros((int(model.hparams["vocab"]), int(model.hparams["dim"])), np.float32)
    row = np.zeros((1, matrix.shape[1]), np.float32)
    for at, value in weight:
        matrix[0, at] = value
    for at, value in x:
        row[0, at] = value
    run = _core.Run(model, backend="cuda", overrides={("output", None): matrix})
    return float(run.replay([0], [LOGITS], {("final_norm", None): row})[LOGITS][0, 0])


def arithmetic(day: Day, folder: Path) -> str:
    """Products that come out differently under each thing that a device might do.  Columns 0, 16, 32 … are one lane, added in order."""
    tiny_bit, big = 2.0**-12, 2.0**24
    ones = [(0, 1.0), (16, 1.0), (32, 1.0)]
    cases: Mapping[str, tuple[float, float, float]] = {
        # name: measured, float32 with fma and round to nearest, what else it could be
        "accumulator of 24 bits: 2^24 + 1 - 2^24": (products([(0, big), (16, 1.0), (32, -big)], ones), 0.0, 1.0),
        "fused: (1 + 2^-12)^2 - 1 - 2^-11": (
            products([(0, -1 - 2 * tiny_bit), (16, 1 + tiny_bit)], [(0, 1.0), (16, 1 + tiny_bit)]), tiny_bit**2, 0.0,
        ),
        "to nearest, not truncated: 1 + 3 * 2^-25": (products([(0, 1.0), (16, 3 * 2.0**-25)], ones), 1 + 2.0**-23, 1.0),
        "ties to even: 1 + 2^-24": (products([(0, 1.0), (16, 2.0**-24)], ones), 1.0, 1 + 2.0**-23),
        "subnormals kept: 2^-140 * 1": (products([(0, 2.0**-140)], ones), 2.0**-140, 0.0),
        "subnormal results kept: 2^-70 * 2^-70": (products([(0, 2.0**-70)], [(0, 2.0**-70)]), 2.0**-140, 0.0),
        # the tree adds lane 3 to lane 1 first; one sum in the order of the columns would lose each 1
        "lanes, then the tree: 2^24, 1 and 1 in lanes 0, 1 and 3": (
            products([(0, big), (1, 1.0), (3, 1.0)], [(0, 1.0), (1, 1.0), (3, 1.0)]), big + 2, big,
        ),
    }  # fmt: skip
    day.write("arithmetic.jsonl", [{"case": n, "measured": m, "declared": d, "otherwise": o} for n, (m, d, o) in cases.items()])
    wrong = [name for name, (measured, declared, _) in cases.items() if measured != declared]
    if wrong:
        raise RuntimeError(f"the device does not do what exact-cuda declares: {'; '.join(wrong)}")
    return f"{len(cases)} of {len(cases)} as exact-cuda declares"


def faults(day: Day, folder: Path) -> str:
    """Each fault of csrc/cuda/faults.cuh, planted in the test library: the stages that the report names."""
    os.environ["APRENDER_CUDA_LIBRARY"] = day.library(faults=True)
    edges, rows = tiny.save_gguf(tiny.Shape("qwen2"), folder / "edges.gguf"), []
    planted = [*(f"transposed@{stage}" for stage in LINEAR), *(f"stride@{stage}" for stage in ("qkv_matmul", "ffn_out")), *GRAPH]
    planted += [f"race@{stage}" for stage in ("attn_norm", "qkv_matmul", "attn_softmax", "lm_head")]
    try:
        for fault in planted:
            os.environ["APRENDER_CUDA_FAULT"] = fault
            path, ids = (edges, [3, 1, 4, 1, 5, 92, 65, 35, 89, 79]) if fault.startswith("stride") else (plain(folder), None)
            report = bisection.compare(f"cuda:{path}", f"cpu:{path}", prompt_ids=ids, steps=3 if fault in GRAPH else 0, answer=0)
            named = [f"{wrong.side} {wrong.stage}" for wrong in report.judged.wrong[:2]]
            rows.append(
                {"fault": fault, "verdict": report.verdict, "finding": report.judged.finding, "named": named, "sentence": report.sentence}
            )
    finally:
        del os.environ["APRENDER_CUDA_FAULT"]
        os.environ["APRENDER_CUDA_LIBRARY"] = day.library()
    day.write("faults.jsonl", rows)
    sure = [row for row in rows if not row["fault"].startswith("race")]  # a race may be won; racecheck sees it without luck
    missed = [row["fault"] for row in sure if row["verdict"] != "divergence"]
    if missed:
        raise RuntimeError(f"not seen: {', '.join(missed)}")
    raced = [row for row in rows if row not in sure]
    return f"{len(sure)} of {len(sure)} seen; races: {sum(row['verdict'] == 'divergence' for row in raced)} of {len(raced)}"


# ---- speed -----------------------------------------------------------------------------------------------------------------------------


def synthetic(folder: Path, shape: tiny.Shape) -> Path:
    """A GGUF of real size in Q4_K, of random quants under sane scales: speed needs no real weights."""
    generator = np.random.default_rng(0)

    def sizes() -> Iterator[tuple[str, tuple[int, ...]]]:
        small = tiny.Shape(shape.arch, layers=shape.layers)  # names of a model of so many layers, with symbols for sizes
        named = {small.dim: shape.dim, small.ffn: shape.ffn, small.heads * small.head: shape.heads * shape.head, small.vocab: shape.vocab}
        named |= {small.kv_heads * small.head: shape.kv_heads * shape.head, small.head: shape.head}
        for name, array in tiny.weights(small).items():
            yield name, tuple(named[size] for size in array.shape)

    def encode(wanted: str, array: np.ndarray) -> bytes:
        if wanted != "Q4_K":
            return np.ones(array.shape, np.float32).tobytes()
        row = generator.integers(0, 256, (array.shape[1] // 256, 144), np.uint8)
        row[:, :4] = np.array([0.001, 0.001], np.float16).view(np.uint8)
        return np.tile(row.reshape(-1), array.shape[0]).tobytes()

    made = {name: np.broadcast_to(np.float32(1), size) for name, size in sizes()}
    return tiny.save_gguf(shape, folder / "synthetic.gguf", "Q4_K", made=made, encode=encode)


def timed(call: Callable[[], object], runs: int) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def speed(day: Day, folder: Path) -> str:
    shape = tiny.Shape("qwen2", layers=28, dim=1536, ffn=8960, heads=12, kv_heads=2, head=128, vocab=32768, context=4096)  # a 1.5B model
    if day.fake:
        shape = tiny.Shape("qwen2", layers=1, dim=256, ffn=512, heads=4, kv_heads=2, head=64, vocab=256)
    path = synthetic(folder, shape)
    model = _core.Model(_core.File(path))
    read = sum(info.nbytes for info in model.file.tensors if not info.name.startswith("token_embd"))
    found = next((value for name, value in BANDWIDTH.items() if name in _core.cuda()["devices"][0]), None)
    bandwidth, prompt = day.bandwidth or found, list(range(32 if day.fake else 512))
    rows: list[dict[str, Any]] = []
    for mode in ("auto", "eager"):
        run = _core.Run(model, backend="cuda", mode=mode)
        run.forward(prompt, [LOGITS])
        run.forward([1], [LOGITS])
        decode = timed(lambda run=run: run.forward([1], [LOGITS]), 4 if day.fake else 32)  # type: ignore[misc]
        floor = None if bandwidth is None else read / bandwidth
        rows.append({"what": f"decode, {mode}", "tokens_per_s": 1 / decode, "share_of_roofline": None if floor is None else floor / decode})
        fresh = _core.Run(model, backend="cuda", mode=mode)
        prefill = timed(lambda run=fresh: run.replay(prompt, [LOGITS]), 3)  # type: ignore[misc]
        rows.append({"what": f"prefill of {len(prompt)}, {mode}", "tokens_per_s": len(prompt) / prefill, "share_of_roofline": None})
    if day.llama_bench:
        words = [day.llama_bench, "-m", str(path), "-ngl", "99", "-p", str(len(prompt)), "-n", "32", "-r", "5", "-o", "jsonl"]
        expect(day.run("llama-bench", words, 240), "llama-bench")
    day.write("speed.jsonl", [row | {"weights_read": read, "bandwidth": bandwidth} for row in rows])
    return "; ".join(f"{row['what']}: {row['tokens_per_s']:.1f} tokens/s" for row in rows)


STEPS: Mapping[str, Callable[[Day, Path], str]] = {
    step.__name__: step for step in (build, tests, parity, arithmetic, faults, z, sanitizer, speed)
}  # fmt: skip
"""In the order in which they run: what everything rests on first, what takes longest last."""


# ---- the day ---------------------------------------------------------------------------------------------------------------------------


def page(said: Mapping[str, Any], results: list[dict[str, Any]]) -> str:
    """README.md of the record."""
    devices = ", ".join(said["cuda"]["devices"]) or "no device"
    lines = [f"| {row['step']} | {row['state']} | {row['seconds']:.0f} | {row['text']} |" for row in results]
    return "\n".join([
        "# The CUDA backend on a device", "", f"Device: {devices}. Library: {said['cuda']['compiler']}.", "",
        "Made by `python scripts/first_gpu_day.py`; what was printed is in the text files, every figure in the lines of JSON.", "",
        "| step | state | seconds | what came out |", "|---|---|---|---|", *lines, "",
    ])  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"{' '.join(STEPS)} (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "evidence" / "cuda")
    parser.add_argument("--fake", action="store_true", help="on the device of host memory; measures nothing")
    parser.add_argument("--bandwidth", type=float, metavar="BYTES_PER_S", help="of the device's memory, for the roofline")
    parser.add_argument("--llama-bench", metavar="PATH", help="a llama-bench built with CUDA, run on the same file")
    parser.add_argument("--exercise", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(options.steps) - set(STEPS)
    if unknown:
        parser.error(f"there is no step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    if options.exercise:
        exercise()
        return 0
    day = Day(options.out, options.fake, options.bandwidth, options.llama_bench)
    os.environ["APRENDER_CUDA_LIBRARY"] = day.library()
    day.out.mkdir(parents=True, exist_ok=True)
    results = []
    with tempfile.TemporaryDirectory() as place:
        for name, step in STEPS.items():
            if options.steps and name not in options.steps:
                continue
            began = time.monotonic()
            try:
                state, text = "done", step(day, Path(place))
            except Exception as problem:
                state, text = "failed", f"{type(problem).__name__}: {' '.join(str(problem).split())}"
            results.append({"step": name, "state": state, "seconds": time.monotonic() - began, "text": text})
            print(f"{name:<11} {state:<7} {results[-1]['seconds']:6.1f} s  {text}", flush=True)
            if name == "build" and (state == "failed" or _core.cuda()["reason"] is not None):
                print(f"no device to go on with: {_core.cuda()['reason']}", file=sys.stderr)
                return 3
    said = env.describe()
    day.write("steps.jsonl", results)
    (day.out / "environment.json").write_text(json.dumps(said, indent=2) + "\n")
    (day.out / "README.md").write_text(page(said, results))
    return int(any(row["state"] == "failed" for row in results))


if __name__ == "__main__":
    sys.exit(main())
