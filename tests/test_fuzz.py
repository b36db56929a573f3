"""The seeds of the fuzzers are what they are meant to be: valid files, so that a mutant is one step away from something that is read.

The fuzzers themselves are run by `make fuzz`, and shown to find faults by `scripts/fuzz.py prove`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aprender import _core
from aprender.errors import ConfigError, FormatError

FUZZ = Path(__file__).resolve().parent / "fuzz"
SEEDS = FUZZ / "seeds"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What make_seeds.py writes today."""
    folder = tmp_path_factory.mktemp("seeds")
    subprocess.run([sys.executable, str(FUZZ / "make_seeds.py"), str(folder)], check=True)
    return folder


def test_the_named_seeds_are_those_of_the_script(written: Path) -> None:
    for path in written.rglob("*"):
        if path.is_file():
            assert (SEEDS / path.relative_to(written)).read_bytes() == path.read_bytes(), path
    found = [path for path in SEEDS.rglob("*") if path.is_file() and not (written / path.relative_to(SEEDS)).exists()]
    assert all(len(path.name) == 40 for path in found)  # by the fuzzers, under their hash
    assert sum(path.stat().st_size for path in SEEDS.rglob("*") if path.is_file()) < 200_000


REFUSED = {
    "count-too-large": "NAME",
    "shard": "UNSUPPORTED",
    "shard-beyond": "PATH",
    "shard-negative": "CONFIG",
    "index": "MISSING",
    "nothing": "TRUNCATED",
}


@pytest.mark.parametrize("target", ["gguf", "safetensors", "apr"])
def test_seeds_open(target: str, written: Path) -> None:
    for path in (written / target).iterdir():
        if path.name in REFUSED:
            with pytest.raises((ConfigError, FormatError)) as caught:
                _core.File(path)
            assert caught.value.code == REFUSED[path.name]
            continue
        assert _core.File(path).container == target, path


@pytest.mark.parametrize("target", ["json", "config"])
def test_seeds_are_json(target: str, written: Path) -> None:
    for path in (written / target).iterdir():
        json.loads(path.read_bytes())


def test_seeds_bind_and_run(written: Path) -> None:
    refused = {"apr-contradiction", "apr-two-names", "apr-neighbours-bias", "apr-strange"}
    names = {path.name for path in (written / "bind").iterdir()} - refused
    assert len(names) > 8
    for name in names:
        run = _core.Run(_core.Model(_core.File(written / "bind" / name)))
        assert np.isfinite(run.forward([0, 1], [("lm_head", None)])[("lm_head", None)]).all(), name
    for name in refused:
        with pytest.raises((ConfigError, FormatError)):
            _core.Model(_core.File(written / "bind" / name))
