"""Make the records under ``evidence/``: a question, the command that answers it, the environment, every stage as a line of JSON, the table.

``python scripts/make_evidence.py`` runs each question again and writes one folder per question.  A record is data about one machine on
one day; the tests do not read it.  Needs an installed aprender, nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

import aprender
from aprender.report.terminal import table_text

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Question:
    """One record.

    Attributes
    ----------
    folder : str
    text : str
        What is asked, and what the answer would mean.
    arguments : tuple of str
        Of ``python -m aprender.bisect``.
    """

    folder: str
    text: str
    arguments: tuple[str, ...] = ()


QUESTIONS = (
    Question(
        "default-run",
        "Does our engine, on the 4-bit embedded model, differ from the recorded Hugging Face FP16 stages by more than"
        " what quantisation and the"
        " declared roundings of both sides explain?",
    ),
    Question(
        "transposed-lm-head",
        "If the head's matrix is read transposed, does one command name lm_head as the first wrong operation?",
        ("--plant", "transposed@lm_head"),
    ),
)


def environment() -> dict[str, object]:
    """What the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "date": date.today().isoformat(),
        "aprender": aprender.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
    }


def record(question: Question, root: Path) -> int:
    """Run one question and write its folder; returns the command's exit code."""
    words = ["-m", "aprender.bisect", *question.arguments]
    done = subprocess.run([sys.executable, *words, "--json"], capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{question.folder}: exit {done.returncode}: {done.stderr.strip()}")
    report = json.loads(done.stdout)
    folder = root / question.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in report["stages"]))
    (folder / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
    parts = [
        f"# {question.folder}\n\n{question.text}\n",
        f"```\n$ {shlex.join(['python', *words])}\nexit {done.returncode}\n```\n",
        f"**{report['sentence']}**\n",
        "".join(f"- {label}: `{text}`\n" for label, text in report["answers"].items()),
        "".join(f"- {note}\n" for note in report["notes"]),
        f"```\n{table_text(report['stages'])}```\n",
    ]
    (folder / "README.md").write_text("\n".join(parts))
    return done.returncode


def main() -> None:
    """Write every record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "evidence")
    args = parser.parse_args()
    for question in QUESTIONS:
        print(f"{question.folder}: exit {record(question, args.output)}", file=sys.stderr)


if __name__ == "__main__":
    main()
