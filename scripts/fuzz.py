"""Builds and runs the fuzz targets of tests/fuzz: libFuzzer where clang is, the driver beside them where only gcc is.

Owns build/fuzz (binaries, the growing corpus, inputs that broke something) and the rows that ``run --record`` appends.  Refuses to go on
when a target does not build.  ``make fuzz``, ``make fuzz-coverage`` and a person call it:

    python scripts/fuzz.py run --seconds 60              # all targets, evenly; first every allocation of every seed fails once
    python scripts/fuzz.py run --target gguf --seconds 600 --record evidence/fuzz/runs.jsonl
    python scripts/fuzz.py coverage [--missing]          # branches of the parsers that seeds and corpus reach (clang, llvm-cov)
    python scripts/fuzz.py prove                         # faults planted in copies of the core: does a fuzzer find each of them?
    python scripts/fuzz.py merge                         # what the corpus reaches and the seeds do not, into the seeds (clang)
    python scripts/fuzz.py seeds                         # write the named seeds again
    python scripts/fuzz.py compiler                      # which compiler is used; exit code 2 when it has no libFuzzer

Exit code 0: nothing broke; 1: something did (the input is named); 2: it cannot be built.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "tests" / "fuzz"
BUILD = ROOT / "build" / "fuzz"
CORPUS = BUILD / "corpus"
CRASHES = BUILD / "crashes"

#: Target -> longest input.
TARGETS = {
    "gguf": 6144,
    "safetensors": 6144,
    "config": 5120,
    "json": 2048,
    "bind": 12288,
    "apr": 12288,
    "folder": 12288,
    "staged": 5120,
    "aprt": 2048,
}
FLOORS = ("base", "quant", "file", "plan", "cpu", "run")
FLAGS = [
    "-std=c11",
    "-D_GNU_SOURCE",
    "-g",
    "-ffp-contract=off",
    "-pthread",
    "-fno-omit-frame-pointer",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-DAP_SMALL_LIMITS",
]
SANITIZE = ["-O2", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=undefined,float-cast-overflow"]
#: What is held against the goal; csrc/file grows by itself.
MEASURED = ("csrc/file/", "csrc/base/json.c", "csrc/base/cursor.c", "csrc/plan/model.c")
#: Calls of the operating system and their failures: shown, but no input can reach them all.
SYSTEM = ("csrc/file/bytes.c",)


class CannotBuildError(Exception):
    """A compiler is missing or a target does not compile."""


# ---- building --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiler:
    """A compiler and whether it brings libFuzzer."""

    command: str
    libfuzzer: bool

    @property
    def version(self) -> str:
        """What it calls itself."""
        return subprocess.run([self.command, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def compiles(command: str, *arguments: str, text: str | None = None) -> bool:
    if not shutil.which(command):
        return False
    with tempfile.TemporaryDirectory() as folder:
        source = ["-xc", "-", "-o", f"{folder}/a"] if text else []
        return subprocess.run([command, *arguments, *source], input=text, text=True, capture_output=True, check=False).returncode == 0


def compiler() -> Compiler:
    """The newest clang that has libFuzzer and can compile the core, else gcc."""
    empty = (
        "#include <stddef.h>\n#include <stdint.h>\nint LLVMFuzzerTestOneInput(const uint8_t *p, size_t n) { return p == 0 && n == 1; }\n"
    )
    for command in ("clang", *(f"clang-{version}" for version in range(30, 10, -1))):
        core = compiles(command, "-fsyntax-only", "-std=c11", str(ROOT / "csrc" / "base" / "tiers.c"))
        if core and compiles(command, "-fsanitize=fuzzer,address,undefined", text=empty):
            return Compiler(command, True)
    for command in ("gcc", "cc"):
        if compiles(command, "-fsanitize=address,undefined", text="int main(void) { return 0; }\n"):
            return Compiler(command, False)
    raise CannotBuildError(
        "neither a clang with libFuzzer nor a gcc with its sanitizers was found: install clang-19 and libclang-rt-19-dev, or gcc"
    )


def sources() -> list[Path]:
    core = [path for floor in FLOORS for path in sorted((ROOT / "csrc" / floor).glob("*.c"))]
    return core + [path for path in sorted(HERE.glob("*.c")) if not path.name.startswith("target_") and path.name != "driver.c"]


def call(arguments: list[str]) -> None:
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotBuildError(f"{' '.join(arguments)}\n{done.stdout}{done.stderr}")


def targets() -> list[str]:
    return [name for name in TARGETS if (HERE / f"target_{name}.c").exists()]


def build(cc: Compiler, folder: Path, flags: list[str], fuzzer: bool) -> None:
    """All targets, anew when any source or flag has changed.  calloc is renamed in mem.c: see check.c."""
    seen = hashlib.sha256(repr((cc, flags, fuzzer)).encode())
    for path in sorted([*ROOT.glob("csrc/*/*"), *HERE.glob("*.[ch]")]):
        seen.update(path.name.encode() + path.read_bytes())
    stamp = folder / "stamp"
    if stamp.exists() and stamp.read_text() == seen.hexdigest():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    trace = ["-fsanitize=fuzzer-no-link"] if fuzzer else []
    main = [] if fuzzer else [str(HERE / "driver.c")]
    objects = {path: folder / (str(path.relative_to(ROOT)).replace("/", "_") + ".o") for path in sources()}

    def compile_one(path: Path) -> None:
        extra = ["-Dcalloc=check_calloc"] if path.name == "mem.c" else []
        call([cc.command, *FLAGS, *flags, *(trace if "csrc" in path.parts else []), *extra, "-c", str(path), "-o", str(objects[path])])

    def link(target: str) -> None:
        final = ["-fsanitize=fuzzer"] if fuzzer else []
        inputs = [str(HERE / f"target_{target}.c"), *main, *map(str, objects.values())]
        call([cc.command, *FLAGS, *flags, *final, *inputs, "-lm", "-o", str(folder / target)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, objects))
        list(pool.map(link, targets()))
    stamp.write_text(seen.hexdigest())


def fuzzers() -> tuple[Compiler, Path]:
    cc = compiler()
    folder = BUILD / ("libfuzzer" if cc.libfuzzer else "driver")
    build(cc, folder, SANITIZE, cc.libfuzzer)
    return cc, folder


# ---- running ---------------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    settings = {"ASAN_OPTIONS": "allocator_may_return_null=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return {name: item for name, item in os.environ.items() if name != "CHECK_SWEEP"} | settings | more


def folders(target: str) -> list[str]:
    """The corpus, which grows, and the seeds, which do not."""
    (CORPUS / target).mkdir(parents=True, exist_ok=True)
    CRASHES.mkdir(parents=True, exist_ok=True)
    return [str(CORPUS / target), str(HERE / "seeds" / target)]


def sweep(folder: Path, target: str) -> bool:
    """Every allocation of every seed fails once: each failure must be told as one and leave no memory behind."""
    arguments = [str(folder / target), "-runs=0", f"-artifact_prefix={CRASHES}/{target}-", folders(target)[1]]
    done = subprocess.run(arguments, env=environment(CHECK_SWEEP="1"), capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        print(done.stderr[-6000:])
    return done.returncode == 0


def run_target(folder: Path, target: str, seconds: int) -> dict[str, Any]:
    """One target for some time.  The result has executions, broken and the tail of what was said."""
    limits = [f"-max_total_time={seconds}", f"-max_len={TARGETS[target]}", "-timeout=5", "-rss_limit_mb=2048", "-print_final_stats=1"]
    arguments = [str(folder / target), *limits, "-use_value_profile=0", f"-artifact_prefix={CRASHES}/{target}-", *folders(target)]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        done = subprocess.run(arguments, env=environment(), stdout=log, stderr=subprocess.STDOUT, check=False)
        log.seek(max(0, log.seek(0, os.SEEK_END) - 20000))
        said = log.read()
    found = re.search(r"Done (\d+) runs in (\d+) second", said) or re.search(r"number_of_executed_units:\s*(\d+)()", said)
    edges = re.findall(r"cov: (\d+)", said)
    return {
        "target": target, "executions": int(found[1]) if found else 0, "seconds": seconds, "edges": int(edges[-1]) if edges else None,
        "broken": done.returncode != 0, "absent": "not built in" in said, "said": said,
    }  # fmt: skip


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def record(path: Path, cc: Compiler, row: dict[str, Any]) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    kept = {key: item for key, item in row.items() if key not in ("said", "absent")}
    rate = round(row["executions"] / max(row["seconds"], 1))
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        out.write(
            json.dumps(kept | {"per_second": rate, "ended": now, "commit": commit, "compiler": cc.version, "machine": platform.machine()})
            + "\n"
        )


def run(wanted: list[str], seconds: int, to: Path | None) -> int:
    cc, folder = fuzzers()
    print(f"{cc.version}, {'libFuzzer' if cc.libfuzzer else 'tests/fuzz/driver.c: no coverage feedback'}")
    broken = False
    for target in wanted:
        if not sweep(folder, target):
            print(f"{target:12} an allocation that failed was not told, or left memory behind")
            broken = True
            continue
        row = run_target(folder, target, max(1, seconds // len(wanted)))
        if row["absent"]:
            print(f"{target:12} not built in")
            continue
        print(
            f"{target:12} {row['executions']:>12,} executions in {row['seconds']} s, {'BROKEN' if row['broken'] else 'nothing broke'}",
            flush=True,
        )
        if row["broken"]:
            print(row["said"][-6000:])
            broken = True
        if to:
            record(to, cc, row)
    if broken:
        print(f"the inputs are in {CRASHES}")
    return int(broken)


# ---- planted faults --------------------------------------------------------------------------------

#: What a fuzzer must find, each in a copy of the core: file, right text, wrong text, the target that finds it.
PLANTED = (
    ("base/cursor.c", "    if (n > ap_left(c)) return 0;\n    *out", "    *out", "gguf"),
    ("base/err.c", "c >= 0x20 && c < 0x7f", "c >= 0x18", "gguf"),
    ("file/gguf.c", "if (count > gguf_left(c) / least)", "if (count * least > gguf_left(c))", "gguf"),
    (
        "file/gguf.c",
        'if (type >= GGUF_TYPES) return ap_fail_at(e, AP_TYPE, at, NULL, "a value',
        'if (0) return ap_fail_at(e, AP_TYPE, at, NULL, "a value',
        "gguf",
    ),
    ("file/gguf.c", "if (t->offset < next) return", "if (0) return", "gguf"),
    ("file/file.c", "if (!file_order(file_name(&r, order[i - 1]), file_name(&r, order[i]))) return i;", "{}", "gguf"),
    ("file/file.c", "s.n > max", "s.n > max + 9", "gguf"),
    ("file/safetensors.c", "if (n > ap_left(&c)) return", "if (0) return", "safetensors"),
    ("file/safetensors.c", "if (t->offset < next) return", "if (0) return", "safetensors"),
    ("base/json.c", "j->depth == AP_JSON_DEPTH", "j->depth == AP_JSON_DEPTH + 1", "json"),
    ("base/json.c", "if (n < 6 || !json_hex4", "if (!json_hex4", "json"),
    ("file/pairs.c", "c->text += n + (kind == AP_J_STR ? span.n : 0); return", "c->text += n; return", "config"),
    ("file/apr.c", "rank > APR_DIMS", "rank > APR_DIMS + 1", "apr"),
    ("file/apr.c", "    ap_free(order);\n    return rc;", "    if (!rc) ap_free(order);\n    return rc;", "apr"),
    ("file/aprt.c", "left < want", "left + 4 < want", "aprt"),
    ("plan/model.c", "h->theta >= 1 &&", "h->theta > 0 &&", "bind"),
    ("plan/model.c", "t->dim[0] != want[0] || ", "", "bind"),
)


def plant(cc: Compiler, healthy: Path, number: int) -> Path:
    """A target over the core with one fault; only the file that holds it is compiled again."""
    name, right, wrong, target = PLANTED[number]
    folder = BUILD / "planted" / str(number)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    text = (folder / "csrc" / name).read_text()
    if text.count(right) != 1:
        raise CannotBuildError(f"csrc/{name} holds {text.count(right)} times: {right}")
    (folder / "csrc" / name).write_text(text.replace(right, wrong))
    broken = folder / "broken.o"
    flags = [*FLAGS, *SANITIZE, "-Wno-error", "-w"]
    call([cc.command, *flags, "-fsanitize=fuzzer-no-link", "-c", str(folder / "csrc" / name), "-o", str(broken)])
    others = [str(path) for path in healthy.glob("*.o") if path.name != f"csrc_{name.replace('/', '_')}.o"]
    call(
        [cc.command, *flags, "-fsanitize=fuzzer", str(HERE / f"target_{target}.c"), str(broken), *others, "-lm", "-o", str(folder / target)]
    )
    return folder / target


def prove(seconds: int, to: Path | None) -> int:
    """Each planted fault must be found from the seeds alone."""
    cc, healthy = fuzzers()
    if not cc.libfuzzer:
        raise CannotBuildError("planted faults are searched for with libFuzzer: install clang and libclang-rt-dev")
    missed, rows = 0, []
    for number, (name, right, wrong, target) in enumerate(PLANTED):
        binary = plant(cc, healthy, number)
        limits = [
            f"-max_total_time={seconds}",
            f"-max_len={TARGETS[target]}",
            "-timeout=5",
            "-seed=1",
            f"-artifact_prefix={binary.parent}/",
        ]
        (binary.parent / "corpus").mkdir()
        arguments = [str(binary), *limits, str(binary.parent / "corpus"), str(HERE / "seeds" / target)]
        done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, errors="replace", check=False)
        tried = [int(count) for count in re.findall(r"^#(\d+)", done.stderr, flags=re.MULTILINE)]
        how = re.search(r"broken promise: .*|runtime error: .*|ERROR: \w+Sanitizer: [\w-]+|ERROR: libFuzzer: .*", done.stderr)
        missed += not done.returncode
        rows.append({"file": name, "right": right, "wrong": wrong, "target": target, "found": bool(done.returncode),
                     "after": max(tried, default=0), "how": how[0].replace(f"{binary.parent}/", "")[:160] if how else None})  # fmt: skip
        print(f"{target:12} {name:20} {'found' if done.returncode else 'MISSED':7} {rows[-1]['how']}", flush=True)
    if to:
        write_rows(to, rows)
    return int(missed > 0)


# ---- coverage --------------------------------------------------------------------------------------


def llvm(cc: Compiler, tool: str) -> str:
    suffix = re.search(r"-\d+$", cc.command)
    for name in (tool + (suffix[0] if suffix else ""), tool):
        if shutil.which(name):
            return name
    raise CannotBuildError(f"{tool} was not found: it comes with the llvm package of {cc.command}")


def measure(cc: Compiler) -> dict[str, Any]:
    """llvm-cov's export for all targets over seeds and corpus, every allocation failing once."""
    folder = BUILD / "coverage"
    build(cc, folder, ["-O0", "-fprofile-instr-generate", "-fcoverage-mapping"], False)
    raw = []
    for target in targets():
        raw.append(folder / f"{target}.profraw")
        arguments = [str(folder / target), "-runs=0", *folders(target)]
        subprocess.run(arguments, env=environment(CHECK_SWEEP="1", LLVM_PROFILE_FILE=str(raw[-1])), capture_output=True, check=True)
    merged = folder / "all.profdata"
    call([llvm(cc, "llvm-profdata"), "merge", "-sparse", *(str(path) for path in raw if path.exists()), "-o", str(merged)])
    binaries = [part for target in targets() for part in ("-object", str(folder / target))][1:]
    arguments = [llvm(cc, "llvm-cov"), "export", *binaries, f"-instr-profile={merged}"]
    export: dict[str, Any] = json.loads(subprocess.run(arguments, capture_output=True, check=True).stdout)["data"][0]
    return export


def missing(entry: dict[str, Any]) -> list[str]:
    """Sides of branches that were never taken: line, column, side, and the source line."""
    lines = Path(entry["filename"]).read_text().splitlines()
    taken: dict[tuple[int, int, int, int], list[int]] = {}
    for branch in entry["branches"]:
        counts = taken.setdefault(tuple(branch[:4]), [0, 0])
        counts[0] += branch[4]
        counts[1] += branch[5]
    rows = []
    for place, counts in sorted(taken.items()):
        for side, count in zip(("true", "false"), counts, strict=True):
            if not count:
                rows.append(f"    {place[0]}:{place[1]} never {side}: {lines[place[0] - 1].strip()[:140]}")
    return rows


def coverage(show_missing: bool, to: Path | None) -> int:
    cc = compiler()
    if not cc.libfuzzer:
        raise CannotBuildError("coverage is measured with clang: install clang and llvm")
    rows, total = [], [0, 0]
    for entry in measure(cc)["files"]:
        name = str(Path(entry["filename"]).relative_to(ROOT))
        branches, lines = entry["summary"]["branches"], entry["summary"]["lines"]
        if not name.startswith(MEASURED) or not branches["count"] or name.endswith(".def"):
            continue
        if name not in SYSTEM:
            total = [total[0] + branches["covered"], total[1] + branches["count"]]
        rows.append({"file": name, "reached": branches["covered"], "branches": branches["count"], "lines": round(lines["percent"], 2)})
        share = f"{branches['covered']:4} of {branches['count']:4} {branches['percent']:6.2f} %"
        print(f"{name:30} branches {share}   lines {lines['percent']:6.2f} %")
        if show_missing:
            print("\n".join(missing(entry)))
    rows.append({"file": "all, without the system calls", "reached": total[0], "branches": total[1], "lines": None})
    print(f"{rows[-1]['file']:30} branches {total[0]:4} of {total[1]:4} {100 * total[0] / total[1]:6.2f} %")
    if to:
        write_rows(to, rows)
    return 0


# ---- seeds -----------------------------------------------------------------------------------------


def named(target: str) -> set[str]:
    """The seeds that make_seeds.py writes: those whose name is no hash."""
    return {path.name for path in (HERE / "seeds" / target).iterdir() if not re.fullmatch(r"[0-9a-f]{40}", path.name)}


def reached(folder: Path, target: str) -> dict[Path, set[int]]:
    """The edges that each seed and each corpus file reaches, by libFuzzer's own book-keeping of a merge."""
    with tempfile.TemporaryDirectory() as temporary:
        control = Path(temporary, "control")
        inputs = [str(HERE / "seeds" / target), str(CORPUS / target)]
        arguments = [
            str(folder / target),
            "-set_cover_merge=1",
            "-use_counters=0",
            f"-merge_control_file={control}",
            f"-max_len={TARGETS[target]}",
            temporary,
            *inputs,
        ]
        done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            raise CannotBuildError(done.stderr[-3000:])
        lines = control.read_text().splitlines()
    paths = [Path(line) for line in lines[2 : 2 + int(lines[0])]]
    edges = {int(number): set(map(int, rest)) for kind, number, *rest in map(str.split, lines[2 + len(paths) :]) if kind == "FT"}
    return {path: edges.get(number, set()) for number, path in enumerate(paths)}


def merge(files: int, budget: int) -> int:
    """Adds to the named seeds those corpus files that reach the most new edges for their size."""
    cc, folder = fuzzers()
    if not cc.libfuzzer:
        raise CannotBuildError("merging needs libFuzzer: install clang and libclang-rt-dev")
    for target in targets():
        seeds, keep = HERE / "seeds" / target, named(target)
        edges = reached(folder, target)
        have = set().union(*(found for path, found in edges.items() if path.name in keep))
        rest = {path: (found, path.stat().st_size) for path, found in edges.items() if path.name not in keep}
        chosen: list[Path] = []
        room = budget
        while rest and len(chosen) < files:
            best = max(rest, key=lambda path: len(rest[path][0] - have) / (rest[path][1] + 64) if rest[path][1] <= room else 0)
            found, size = rest.pop(best)
            if not found - have or size > room:
                break
            chosen.append(best)
            have |= found
            room -= size
        contents = [path.read_bytes() for path in chosen]
        for path in seeds.iterdir():
            if path.name not in keep:
                path.unlink()
        for content in contents:
            (seeds / hashlib.sha1(content).hexdigest()).write_bytes(content)
        missing = len(set().union(*edges.values()) - have)
        size = sum(path.stat().st_size for path in seeds.iterdir())
        print(
            f"{target:12} {len(keep)} named, {len(chosen)} found, {size:,} bytes, {len(have)} edges, {missing} more in the corpus",
            flush=True,
        )
    return 0


# ---- records ---------------------------------------------------------------------------------------

EVIDENCE = ROOT / "evidence" / "fuzz"


def read_rows(name: str) -> list[dict[str, Any]]:
    path = EVIDENCE / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tables() -> int:
    """Put the recorded rows, as tables, between the markers of evidence/fuzz/README.md."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows("runs.jsonl"):
        runs.setdefault(row["target"], []).append(row)
    parts = {"runs": ["| target | executions | seconds | a second | edges | runs that broke |", "|--|--:|--:|--:|--:|--:|"]}
    for target in TARGETS:
        if rows := runs.get(target):
            count, seconds = sum(row["executions"] for row in rows), sum(row["seconds"] for row in rows)
            edges = max(row["edges"] or 0 for row in rows)
            broken = sum(row["broken"] for row in rows)
            parts["runs"].append(f"| {target} | {count:,} | {seconds:,} | {count // max(seconds, 1):,} | {edges} | {broken} |")
    parts["planted"] = ["| file | right | planted | target | found by |", "|--|--|--|--|--|"]
    for row in read_rows("planted.jsonl"):
        right, wrong, how = (str(row[key]).strip().split("\n")[0].replace("|", "\\|")[:70] for key in ("right", "wrong", "how"))
        parts["planted"].append(f"| {row['file']} | `{right}` | `{wrong}` | {row['target']} | {how if row['found'] else 'MISSED'} |")
    parts["coverage"] = ["| file | branch sides reached | of | % | lines % |", "|--|--:|--:|--:|--:|"]
    for row in read_rows("coverage.jsonl"):
        share = 100 * row["reached"] / row["branches"]
        lines = "" if row["lines"] is None else row["lines"]
        parts["coverage"].append(f"| {row['file']} | {row['reached']} | {row['branches']} | {share:.2f} | {lines} |")
    readme = EVIDENCE / "README.md"
    text = readme.read_text()
    for name, lines in parts.items():
        before, rest = text.split(f"<!-- {name} -->\n", 1)
        after = rest.split("<!-- end -->", 1)[1]
        text = f"{before}<!-- {name} -->\n" + "\n".join(lines) + "\n<!-- end -->" + after
    readme.write_text(text)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--seconds", type=int, default=60, help="for all targets together")
    running.add_argument("--target", action="append", choices=list(TARGETS))
    running.add_argument("--record", type=Path)
    covering = commands.add_parser("coverage")
    covering.add_argument("--missing", action="store_true", help="list what is not reached")
    covering.add_argument("--record", type=Path)
    commands.add_parser("tables")
    commands.add_parser("compiler")
    proving = commands.add_parser("prove")
    proving.add_argument("--seconds", type=int, default=120, help="for each fault, at most")
    proving.add_argument("--record", type=Path)
    merging = commands.add_parser("merge")
    merging.add_argument("--files", type=int, default=24, help="for each target, at most")
    merging.add_argument("--budget", type=int, default=8000, help="bytes for each target, at most")
    commands.add_parser("seeds")
    given = parser.parse_args()
    try:
        if given.command == "run":
            return run(given.target or targets(), given.seconds, given.record)
        if given.command == "coverage":
            return coverage(given.missing, given.record)
        if given.command == "tables":
            return tables()
        if given.command == "merge":
            return merge(given.files, given.budget)
        if given.command == "prove":
            return prove(given.seconds, given.record)
        if given.command == "compiler":
            found = compiler()
            print(found.version)
            return 0 if found.libfuzzer else 2
        return subprocess.run([sys.executable, str(HERE / "make_seeds.py")], check=True).returncode
    except CannotBuildError as problem:
        print(problem, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
