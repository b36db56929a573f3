"""Times of the core, side by side with what else does the same: printed, and written to evidence/bench/.

    python scripts/bench.py            # every bench
    python scripts/bench.py opening    # one of them

Every figure is a median of several runs in one process on one machine, or where it says so the least CPU time; ratios are of medians taken
in turn, so that a busy machine spoils both alike.  Nothing here is asserted: a time depends on the machine.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from aprender import _core  # noqa: E402

Timed = dict[str, float]


def medians(calls: dict[str, Callable[[], object]], runs: int = 9) -> Timed:
    """Median seconds of each call; the calls take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in times.items()}


# ---- opening ---------------------------------------------------------------------------------------------------------------------------


def _text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def _tensors() -> list[tuple[str, tuple[int, ...], int]]:
    """Names, shapes (innermost first) and ggml ids of a 7B model in the usual 4-bit mix: 339 tensors."""
    found: list[tuple[str, tuple[int, ...], int]] = [("token_embd.weight", (3584, 152064), 12)]
    layer = (
        ("attn_norm.weight", (3584,), 0), ("attn_q.weight", (3584, 3584), 12), ("attn_q.bias", (3584,), 0),
        ("attn_k.weight", (3584, 512), 12), ("attn_k.bias", (512,), 0), ("attn_v.weight", (3584, 512), 14), ("attn_v.bias", (512,), 0),
        ("attn_output.weight", (3584, 3584), 12), ("ffn_norm.weight", (3584,), 0), ("ffn_gate.weight", (3584, 18944), 12),
        ("ffn_up.weight", (3584, 18944), 12), ("ffn_down.weight", (18944, 3584), 14),
    )  # fmt: skip
    found += [(f"blk.{i}.{name}", shape, kind) for i in range(28) for name, shape, kind in layer]
    return [*found, ("output_norm.weight", (3584,), 0), ("output.weight", (3584, 152064), 14)]


def _seven_billion(path: Path) -> None:
    """A sparse file that describes itself as a 7B model does: 339 tensors, 152,064 tokens, 151,387 merges."""
    tokens = [b"token%06d"[: 4 + i % 9] % i if i % 9 == 8 else (b"%012d" % i)[-(3 + i % 9) :] for i in range(152064)]
    merges = [b"a%d b%d" % (i, i) for i in range(151387)]
    pairs = [_text(b"general.architecture") + struct.pack("<I", 8) + _text(b"qwen2")]
    pairs += [_text(key) + struct.pack("<IIQ", 9, 8, len(found)) + b"".join(map(_text, found))
              for key, found in ((b"tokenizer.ggml.tokens", tokens), (b"tokenizer.ggml.merges", merges))]  # fmt: skip
    infos, offset = b"", 0
    for name, shape, kind in _tensors():
        block, size = {0: (1, 4), 12: (256, 144), 14: (256, 210)}[kind]
        infos += _text(name.encode()) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        offset += -(-int(np.prod(shape)) // block * size // 32) * 32
    head = b"GGUF" + struct.pack("<IQQ", 3, len(_tensors()), len(pairs)) + b"".join(pairs) + infos
    head += bytes(-len(head) % 32)
    with path.open("wb") as out:
        out.write(head)
        out.truncate(len(head) + offset)


def opening() -> list[str]:
    """The index of a 7B GGUF, and a file of 200,000 keys."""
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        large, many = Path(folder, "7b.gguf"), Path(folder, "keys.gguf")
        _seven_billion(large)
        keys = b"".join(_text(b"key.%06d" % i) + struct.pack("<II", 4, i) for i in range(200_000))
        many.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 200_000) + keys)
        cpu = time.process_time()
        _core.File(large)
        cpu = time.process_time() - cpu
        took = medians({"index": lambda: _core.File(large), "keys": lambda: _core.File(many)})
        began = time.perf_counter()
        gguf.GGUFReader(large)
        reader = time.perf_counter() - began
        file = _core.File(large)
        began = time.perf_counter()
        file.get("tokenizer.ggml.tokens")
        tokens = time.perf_counter() - began
        size = large.stat().st_size / 1e9
    return [
        f"index of a 7B GGUF ({size:.1f} GB, sparse, 339 tensors, 152,064 tokens, 151,387 merges): {1e3 * took['index']:.1f} ms"
        f" ({1e3 * cpu:.1f} ms of CPU in the first); its tokens as Python strings, when asked for: {1e3 * tokens:.0f} ms more;"
        f" the gguf package's reader: {reader:.1f} s",
        f"200,000 keys: {1e3 * took['keys']:.0f} ms",
    ]


# ---- loading ---------------------------------------------------------------------------------------------------------------------------


def loading() -> list[str]:
    """All weights of a file into memory, ours and llama.cpp's without mmap, the same file in turn."""
    import llamacpp
    import tiny

    shape = tiny.Shape("llama", layers=8, dim=1024, ffn=4096, heads=16, kv_heads=4, head=64, vocab=8192)
    with tempfile.TemporaryDirectory() as folder, llamacpp.Peer() as peer:
        path = tiny.save_gguf(shape, Path(folder, "m.gguf"), "Q8_0")
        size = path.stat().st_size
        took = medians({
            "read": lambda: _core.Model(_core.File(path)), "mapped": lambda: _core.Model(_core.File(path, mmap=True)),
            "llama.cpp": lambda: peer.logits(path, [1]),
        }, 7)  # fmt: skip
    return [
        f"loading {size / 1e6:.0f} MB (Q8_0, page cache): read {size / took['read'] / 1e9:.2f} GB/s, mapped {1e3 * took['mapped']:.1f} ms;"
        f" llama.cpp with its default settings, load and one token: {1e3 * took['llama.cpp']:.0f} ms"
        f" (ours, load alone: {1e3 * took['read']:.0f} ms)"
    ]


# ---- comparing -------------------------------------------------------------------------------------------------------------------------


def comparing() -> list[str]:
    """Every figure of two arrays: one pass in C over what NumPy needs for the same figures."""
    from test_measure import pair, sums, witness

    a, b = pair(1_000_000)

    def plain() -> None:
        witness(a, b)
        finite = np.isfinite(a) & np.isfinite(b)
        x, y = a[finite].astype(np.float64), b[finite].astype(np.float64)
        d = x - y
        for term in (x, y, x * x, y * y, d * d, d * (x + y)):
            term.sum()

    took = medians({"NumPy": plain, "C 1": lambda: _core.compare(a, b, threads=1), "C 2": lambda: _core.compare(a, b, threads=2)})
    assert sums(a[:100], b[:100])
    return [
        f"comparing 10^6 values, all figures: NumPy {1e3 * took['NumPy']:.1f} ms, C {1e3 * took['C 1']:.2f} ms on one thread"
        f" ({took['NumPy'] / took['C 1']:.0f} times as fast), {1e3 * took['C 2']:.2f} ms on two ({took['NumPy'] / took['C 2']:.0f} times)"
    ]


# ---- encoding --------------------------------------------------------------------------------------------------------------------------


def encoding() -> list[str]:
    """float32 to each format that can be written, one thread."""
    values = np.random.default_rng(0).standard_normal((512, 4096)).astype(np.float32)
    writable = [row[0] for row in _core.FORMATS if row[8]]
    took = medians({name: lambda name=name: _core.encode(name, values, threads=1) for name in writable}, 5)
    return ["encoding float32, one thread, MB/s: " + ", ".join(f"{name} {values.nbytes / took[name] / 1e6:.0f}" for name in writable)]


# ---- adding ----------------------------------------------------------------------------------------------------------------------------


def adding() -> list[str]:
    """What the judge computes of one projection of a 7B model, and its loops beside the same in NumPy, in seconds of CPU."""
    import test_sums

    from aprender.arithmetic import Order
    from aprender.judge import measure, sums

    generator = np.random.default_rng(0)
    x = generator.standard_normal((1, 16, 3584)).astype(np.float32).astype(np.float64)
    w = generator.standard_normal((1, 18944, 3584), np.float32)
    flat = np.sort(generator.choice(16 * 18944, measure.SAMPLE, replace=False))
    said = []
    for name, order in (("16 lanes", Order(lanes=16)), ("blocks of 192", Order(blocks={3584: 192})), ("order unknown", Order())):
        dot = sums.Dot(x, w, order)
        few = sums.Dot(x, w[:, :64].astype(np.float64), order)
        calls: dict[str, Callable[[], object]] = {"value": dot.value, "estimate": lambda dot=dot: sums.estimate(dot)}
        calls[f"exact ({measure.SAMPLE} of them)"] = lambda dot=dot: sums.exact(dot, flat)
        if order.lanes:
            calls["every bit"] = lambda dot=dot: sums.emulate(dot)
        pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "estimate": (lambda few=few: sums.estimate(few), lambda few=few: test_sums.witness_estimate(few.x, few.w, few.order)),
            "exact": (
                lambda few=few: sums.exact(few, np.arange(16 * 64)),
                lambda few=few: test_sums.witness_exact(few.x, few.w, few.order),
            ),
        }
        if order.lanes:
            rows = np.repeat(few.x[0], 64, axis=0), np.tile(few.w[0], (16, 1))
            pairs["bits"] = (lambda few=few: sums.emulate(few), lambda rows=rows: test_sums.witness_bits(*rows, 16))
        took = ", ".join(f"{what} {_cpu(call):.2f} s" for what, call in calls.items())
        beside = ", ".join(f"{what} {_cpu(numpy) / _cpu(core):.0f}" for what, (core, numpy) in pairs.items())
        said.append(
            f"a projection of 3584 by 18944 (272 MB), 16 tokens, {name}, CPU: {took}; most memory beside operands and results"
            f" {max(_memory(call) for call in calls.values()) / 1e6:.0f} MB; times as fast as NumPy on 64 columns: {beside}"
        )
    return said


def _cpu(call: Callable[[], object]) -> float:
    """Least seconds of CPU of three calls, all threads together: a busy machine lengthens the others."""
    times = []
    for _ in range(3):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return min(times)


def _memory(call: Callable[[], object]) -> int:
    """Most bytes of Python, NumPy and the core at once during a call, less what it gives back."""
    _core._peak_bytes()
    held = _core._live_bytes()
    tracemalloc.start()
    result = call()
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return python - np.asarray(result).nbytes + _core._peak_bytes() - held


# ---- judging ---------------------------------------------------------------------------------------------------------------------------

CHILD = """
import json, resource, sys, time
from aprender.captures import open_captures
from aprender.judge import closure, witness
from aprender.judge.local import local
from aprender.judge.witness import ModelData
from aprender.sides import open_side

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def timed(call):
    wall, cpu, before = time.perf_counter(), time.process_time(), peak()
    found = call()
    return found, time.perf_counter() - wall, time.process_time() - cpu, peak() - before, before

side = open_side(sys.argv[1])
ids = list(range(3, 3 + int(sys.argv[2])))
captures = side.capture(ids)
model = ModelData(**side.model_data())
results, *alone = timed(lambda: local(captures, model, side.profile))
free = witness.forward(model, ids)
closed, *rest = timed(lambda: closure.closure(captures, model, side.profile, free, results, forced=True))
states = sorted({r.state for r in results})
print(json.dumps([states, alone, closed.plan.draws, all(row.holds for row in closed.rows), rest]))
"""


def judging() -> list[str]:
    """A whole layer of a 7B model judged in a process of its own: time, and the most memory beside what was held before."""
    import llamacpp
    import tiny

    shape = tiny.Shape("qwen2", layers=1, dim=3584, ffn=18944, heads=28, kv_heads=4, head=128, vocab=512)

    def encode(kind: str, array: np.ndarray) -> bytes:
        """A few rows over and over: what the bits are does not matter, how many there are does."""
        few = np.random.default_rng(array.shape[1]).standard_normal((128, array.shape[1])).astype(np.float32)
        return _core.encode(kind, few / np.float32(np.sqrt(array.shape[1])), threads=1).tobytes() * (array.shape[0] // 128)

    said = []
    with tempfile.TemporaryDirectory() as folder:
        path = tiny.save_gguf(shape, Path(folder, "layer.gguf"), "Q4_K", made=_zeros(shape), encode=encode)
        for spelling in (str(path), *([] if llamacpp.missing() else [f"llama.cpp:{path}"])):
            for tokens in (8, 32):
                command = [sys.executable, "-c", CHILD, spelling, str(tokens)]
                child = subprocess.run(
                    command, capture_output=True, text=True, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
                )
                states, local, draws, holds, rest = json.loads(child.stdout)
                engine = "llama.cpp" if ":" in spelling else "our engine"
                said.append(
                    f"a layer of a 7B model (Q4_K, 233 million weights), {tokens} tokens, by {engine}: judged in {_took(local)} (states:"
                    f" {', '.join(states)}); closure with {draws} passes in {_took(rest)} ({'holds' if holds else 'fails'})"
                )
    return said


def _zeros(shape: Any) -> dict[str, np.ndarray]:
    """Weights by the name of Hugging Face that take no room: matrices of zeros, vectors of random numbers around 1."""
    size = {"D": shape.dim, "F": shape.ffn, "V": shape.vocab, "Qd": shape.heads * shape.head, "Kd": shape.kv_heads * shape.head}
    found = {}
    for _, _, _, name, dims, form, _, flag in _core.WEIGHTS:
        if flag == "ALWAYS" or flag in shape.flags:
            sizes = [size[symbol] for symbol in dims.split()]
            vector = 1 + 0.1 * np.random.default_rng(len(name)).standard_normal(sizes[0])
            full = name.replace("%d", "0")
            found[full] = np.broadcast_to(np.float32(0), sizes) if form == "MATRIX" else vector.astype(np.float32)
    return found


def _took(figures: list[float]) -> str:
    wall, cpu, more, before = figures
    return f"{wall:.1f} s ({cpu:.1f} s of CPU), {more / 1e6:.0f} MB beside {before / 1e6:.0f} MB"


BENCHES: dict[str, Callable[[], list[str]]] = {
    "opening": opening,
    "loading": loading,
    "comparing": comparing,
    "encoding": encoding,
    "adding": adding,
    "judging": judging,
}


def machine() -> str:
    """What ran it."""
    name = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "?"
    )
    tier = [row[0] for row in _core.TIERS if row[1]][-1]
    cores = len(os.sched_getaffinity(0))
    return f"{name}, tier {tier}, {cores} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, NumPy {np.__version__}"


def main() -> None:
    chosen = sys.argv[1:] or list(BENCHES)
    lines = [f"* {line}" for name in chosen for line in BENCHES[name]()]
    print("\n".join([machine(), *lines]))
    if len(sys.argv) == 1:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
        ).stdout.strip()
        folder = ROOT / "evidence" / "bench"
        folder.mkdir(parents=True, exist_ok=True)
        said = ["# Times of the core", "", f"`python scripts/bench.py` at {commit or 'no commit'}: {machine()}", "", *lines, ""]
        (folder / "README.md").write_text("\n".join(said))


if __name__ == "__main__":
    main()
