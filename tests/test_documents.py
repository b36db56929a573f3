"""What users read is true: the README's commands and Python run, and the notebook runs and is what its text form says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest
from conftest import CANARY

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTEBOOK = ROOT / "notebooks" / "01_first_divergence.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    """Every `python -m aprender.…` line of the README, without its comment; those that need torch are tested with the Hugging Face side."""
    lines = [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("python -m aprender.")]


def test_the_readme_has_its_two_commands_on_top() -> None:
    first = blocks("sh")[0].split("\n")
    assert first[0].startswith("make demo")
    assert first[1].startswith("make test")


@pytest.mark.foreign
def test_readme_commands_run(tmp_path: Path) -> None:
    """In order, as a reader would: `folder` is the canary's folder, `model.gguf` its GGUF."""
    (tmp_path / "folder").symlink_to(CANARY)
    (tmp_path / "model.gguf").symlink_to(CANARY / "canary.gguf")
    (tmp_path / "questions.txt").write_text("What is 2+2?\nWhat is 7+8?\n")
    found = commands()
    assert len(found) >= 12
    for line in found:
        words = shlex.split(line)
        done = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
        expected = {1} if "--plant" in line else {0, 1} if "aprender.diff" in line else {0}
        assert done.returncode in expected, f"{line}\n{done.stdout[-500:]}\n{done.stderr[-500:]}"


def test_readme_python_runs() -> None:
    (code,) = blocks("python")
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    report = names["report"]
    assert (report.verdict, report.first.stage) == ("divergence", "lm_head")  # type: ignore[attr-defined]


def test_the_notebook_is_its_text() -> None:
    """The pair holds the same cells, so that a reviewer may read the text form alone."""
    text, notebook = jupytext.read(NOTEBOOK), jupytext.read(NOTEBOOK.with_suffix(".ipynb"))
    assert [(cell.cell_type, cell.source) for cell in text.cells] == [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert all(cell.outputs for cell in notebook.cells if cell.cell_type == "code" and not cell.source.startswith("assert"))


def test_architecture_names_what_exists() -> None:
    """Every path in ARCHITECTURE.md is there."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:csrc|aprender|tests)/[\w./]+)`", text))
    paths |= {f"csrc/{path}" for path in re.findall(r"`((?:plan|quant|file|base|cpu)/\w+\.(?:def|h|c))`", text)}
    assert len(paths) > 15
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing
