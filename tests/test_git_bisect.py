"""``git bisect run`` with the command as its judge: a real repository, whose commits change an engine, and git names the first bad one.

Truth: which commit breaks the engine is chosen here.  The engine is a script in the repository that runs the model with the edits that
its commit holds and saves what it saw; on one commit it cannot run, on another it records something else than was asked for.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import write_folder

import aprender

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")

IDS = "3,14,15,92,65,35"
ENGINE = """\
import json, pathlib, sys
from aprender.captures import save
from aprender.sides.own import OwnSide

model, ids = sys.argv[1], [int(word) for word in sys.argv[2].split(",")]
here = json.loads(pathlib.Path(__file__).with_name("engine.json").read_text())
save(OwnSide(model, edits=here["edits"]).capture(ids[: here["tokens"]]), pathlib.Path(model, "out"))
"""
GOOD: dict[str, Any] = {"tokens": 6, "edits": []}
TIDY = {"tokens": 6, "edits": [{"target": "step", "stage": "ffn_norm", "layer": 0, "field": "eps", "factor": 1.0}]}  # changes no bit
BAD = {"tokens": 6, "edits": [{"target": "weight", "weight": "ffn_up", "layer": 1, "transform": "transposed"}]}
WORSE = {"tokens": 6, "edits": [*BAD["edits"], {"target": "step", "stage": "attn_norm", "layer": 1, "field": "eps", "factor": 100.0}]}
SHORT = {"tokens": 5, "edits": []}  # the capture is of other tokens than those asked for: not comparable
COMMITS = (  # what each commit makes of the engine; None: it does not even start
    GOOD, GOOD, TIDY, TIDY, SHORT, None, TIDY, BAD, BAD, WORSE,
)  # fmt: skip
FIRST_BAD = COMMITS.index(BAD)
CANNOT = (COMMITS.index(SHORT), COMMITS.index(None))


class Repository:
    """A temporary repository, cut off from the configuration of this machine."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model, self.log = root, model, root.parent / "codes.txt"
        self.env = os.environ | {
            "PYTHONPATH": str(Path(aprender.__file__).parent.parent), "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull,
            "HOME": str(root.parent), "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        for name in ("AUTHOR", "COMMITTER"):
            self.env |= {f"GIT_{name}_NAME": "a", f"GIT_{name}_EMAIL": "a@example.org"}
        for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
            self.env.pop(name, None)
        self.root.mkdir()
        self.git("init", "-q", "-b", "main")
        self.commits = [self.commit(number, content) for number, content in enumerate(COMMITS)]

    def git(self, *words: str) -> str:
        done = subprocess.run(["git", *words], cwd=self.root, env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"git {' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def commit(self, number: int, content: dict[str, Any] | None) -> str:
        (self.root / "engine.py").write_text(ENGINE if content is not None else ENGINE + "def broken(:\n")
        (self.root / "engine.json").write_text(json.dumps(content or TIDY))
        (self.root / "CHANGES").write_text(f"change {number}\n")
        self.git("add", "-A")
        self.git("commit", "-q", "-m", f"change {number}")
        return self.git("rev-parse", "HEAD").strip()

    def script(self) -> str:
        """What README tells: what cannot be built or run is 125, the rest is the command's own code; the codes are written down."""
        judge = f"'{sys.executable}' -m aprender.bisect saved:{self.model}/out --against witness:{self.model} --prompt-ids {IDS}"
        engine = f"'{sys.executable}' engine.py {self.model} {IDS}"
        return (
            f"code=125; if {engine}; then {judge} -q --git-bisect; code=$?; fi; echo $(git rev-parse HEAD) $code >> {self.log}; exit $code"
        )

    def codes(self) -> dict[int, int]:
        """Exit code of every commit that was tried."""
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return {self.commits.index(commit): int(code) for commit, code in lines}


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "engine", write_folder(tmp_path / "model", tiny.Shape()))


def test_git_names_the_first_bad_commit_and_skips_what_cannot_run(repository: Repository) -> None:
    repository.git("bisect", "start", repository.commits[-1], repository.commits[0])
    said = repository.git("bisect", "run", "sh", "-c", repository.script())
    codes = repository.codes()
    assert f"{repository.commits[FIRST_BAD]} is the first bad commit" in said
    assert f"change {FIRST_BAD}" in said
    assert repository.git("rev-parse", "refs/bisect/bad").strip() == repository.commits[FIRST_BAD]
    for number, code in codes.items():
        assert code == (125 if number in CANNOT else int(number >= FIRST_BAD)), f"commit {number} gave {code}"
    skipped = [line for line in repository.git("bisect", "log").splitlines() if line.startswith("git bisect skip")]
    assert skipped  # 5 is the middle of 0 … 9
    assert {codes[FIRST_BAD - 1], codes[FIRST_BAD]} == {0, 1}


@pytest.mark.parametrize("number", [0, FIRST_BAD, *CANNOT])
def test_code_of_a_commit(repository: Repository, number: int) -> None:
    """Both ways to be skipped, whichever git happens to try: an engine that does not start, and a capture that is not comparable."""
    repository.git("checkout", "-q", repository.commits[number])
    done = subprocess.run(["sh", "-c", repository.script()], cwd=repository.root, env=repository.env, capture_output=True, text=True)
    assert done.returncode == repository.codes()[number] == (125 if number in CANNOT else int(number == FIRST_BAD))
    if number == FIRST_BAD:
        assert done.stdout.startswith("ffn_up of layer 1 of the subject")
    if number == COMMITS.index(SHORT):
        assert "recorded other token ids" in done.stderr


def test_wrong_usage_stops_the_hunt(repository: Repository) -> None:
    """A mistake in the command line is no reason to skip every commit: 128 stops git bisect at once."""
    repository.git("bisect", "start", repository.commits[-1], repository.commits[0])
    judge = f"'{sys.executable}' -m aprender.bisect saved:{repository.model}/out --no-such-option --git-bisect"
    done = subprocess.run(
        ["git", "bisect", "run", "sh", "-c", judge], cwd=repository.root, env=repository.env, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "first bad commit" not in done.stdout
    assert "128" in done.stdout + done.stderr
