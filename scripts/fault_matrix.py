"""The fault matrix: every catalogue fault, planted in three ways, and whether the judge names its stage, its layer and its kind.

``python scripts/fault_matrix.py`` judges the populations *own* (edits of our engine), *gguf* (files with the fault in them, run by real
llama.cpp) and *hf* (patched Hugging Face modules), each a module ``matrix_<name>`` with the protocol of ``matrix_case``, and writes
``evidence/fault-matrix/``: one line of JSON per case as it is judged, the environment, and the tables of ``matrix_report``.  A run that
is stopped leaves what it has; ``--resume`` goes on from there, ``--render`` only writes the tables again.  The options cut the matrix.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from make_evidence import ROOT, environment
from matrix_case import Case, score
from matrix_models import ARCHS, FORMATS, MODES
from matrix_record import line, name_of, put, read
from matrix_report import page, summary

POPULATIONS = ("own", "gguf", "hf")
DTYPES = ("float32", "float16", "bfloat16")
SITES = 2
"""Sites of each fault in each model, another choice in each; all of them take four times as long."""


def populations() -> list[str]:
    """Those whose module is there and can be imported here (``hf`` needs torch)."""
    found = [name for name in POPULATIONS if importlib.util.find_spec(f"matrix_{name}")]
    return [name for name in found if name != "hf" or importlib.util.find_spec("torch")]


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Every case, cheap until it is judged."""
    for name in args.only:
        yield from importlib.import_module(f"matrix_{name}").cases(args)


def judged(args: argparse.Namespace, group: str, done: frozenset[str]) -> int:
    """Judge the cases of one untouched run, and add a line of each to the record; returns how many."""
    count = 0
    with args.record.open("ab", buffering=0) as out:
        for case in cases(args):
            if case.group == group and case.name not in done:
                began = time.monotonic()
                row = score(case, case.judge()) | {"seconds": round(time.monotonic() - began, 2)}
                out.write(line(row).encode())  # one write: lines of two processes do not mix
                count += 1
    return count


def run(args: argparse.Namespace) -> None:
    """Judge what is not in the record yet."""
    kept = read(args.record)
    put(args.record, kept)  # without a line that was cut off
    done = frozenset(map(name_of, kept))
    groups = list(dict.fromkeys(case.group for case in cases(args) if case.name not in done))
    began, count = time.monotonic(), 0
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))  # a process is a core
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        futures = {pool.submit(judged, args, group, done): group for group in groups}
        for i, future in enumerate(as_completed(futures), 1):
            count += future.result()
            left = (time.monotonic() - began) / i * (len(groups) - i)
            print(f"{futures[future]}: {i} of {len(groups)} models, {count} cases, {left:.0f} s left", file=sys.stderr)


def write(args: argparse.Namespace) -> None:
    """The record in order, and the page that is made of it."""
    order = {case.name: i for i, case in enumerate(cases(args))}
    rows = sorted(read(args.record), key=lambda row: order.get(name_of(row), len(order)))
    put(args.record, rows)
    command = " ".join(["python scripts/fault_matrix.py", *(word for word in sys.argv[1:] if word not in ("--resume", "--render"))])
    (args.record.parent / "README.md").write_text(page(rows, command))
    print(summary(rows), file=sys.stderr)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """What is asked."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="examples: fault_matrix.py --jobs 2; fault_matrix.py --only gguf --formats Q4_K --seeds 1; fault_matrix.py --render",
    )
    parser.add_argument("--only", nargs="+", default=populations(), choices=POPULATIONS, help="populations")
    parser.add_argument("--archs", nargs="+", default=list(ARCHS), choices=ARCHS)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS, help="of weights, in own and gguf")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES, help="in hf")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES, help="how the prompt is run, in own and gguf")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--sites", type=int, default=SITES, help="of each fault in each model, another choice in each; 0 is all")
    parser.add_argument("--whole", action="store_true", help="judge every stage of every run, also those that cannot have changed")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--resume", action="store_true", help="go on with the record that is there")
    parser.add_argument("--render", action="store_true", help="judge nothing; write the tables of the record that is there")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "evidence" / "fault-matrix")
    args = parser.parse_args(words)
    args.record = args.output / "matrix.jsonl"
    return args


def main() -> None:
    """Run the matrix, or the part that the options name."""
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    if not (args.resume or args.render):
        args.record.unlink(missing_ok=True)
    if not args.render:
        (args.output / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
        run(args)
    write(args)


if __name__ == "__main__":
    main()
