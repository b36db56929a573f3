"""Several faults in one run are all named, also behind a value that is not finite.

Truth: what is planted is known.  A run whose only token is not a number after the first fault shows nothing of the later ones by itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import CANARY, blob, write_folder

import aprender
from aprender import bisect, bisection, repair
from aprender.asking import Ask
from aprender.captures import Captures
from aprender.judge.local import StageResult, local
from aprender.judge.witness import ModelData
from aprender.sides.own import OwnSide
from aprender.stages import Key

IDS = (3, 14, 15, 92, 65, 35, 89)
THREE = ("nan@0.ffn_out", "gelu@1.ffn_silu", "transposed@lm_head")
SITES: list[Key] = [("ffn_out", 0), ("ffn_silu", 1), ("lm_head", None)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("repair") / "model", tiny.Shape())


def hunt(folder: Path, plant: str | Sequence[str] | None, ids: Sequence[int]) -> bisection.Report:
    return bisection.hunt(bisection.open_hunt(str(folder), "witness", plant), Ask(ids=tuple(ids)), answer=0)


def judged(side: Any, captures: Captures) -> tuple[list[StageResult], list[str]]:
    model = ModelData(**side.model_data())
    return repair.judged(side, captures, model, side.profile, local(captures, model, side.profile))


@pytest.mark.parametrize("ids", [IDS[:1], IDS], ids=len)
def test_three_faults_are_all_named(folder: Path, ids: tuple[int, ...]) -> None:
    report = hunt(folder, THREE, ids)
    assert (report.judged.finding, [fault.key for fault in report.judged.wrong]) == ("operation", SITES)
    assert [fault.kind for fault in report.judged.wrong] == ["nan", "gelu", "transposed"]
    assert report.sentence.endswith("2 more below.")
    assert [note for note in report.notes if note.startswith("0.ffn_out has 1 value that is not finite: replaced by the witness's")]
    states = {(row.stage, row.layer): row.state for row in report.judged.rows}
    assert states["ffn_norm", 0] == "exact"
    assert states["attn_norm", 1] == "inherited"  # right on its own inputs, which are repaired ones


def test_without_repair_the_later_ones_would_not_be_seen(folder: Path) -> None:
    """The control: one token, which is not a number any more."""
    side: OwnSide = bisection.open_hunt(str(folder), "witness", THREE).subject
    plain = {r.key: r.state for r in local(side.capture(IDS[:1]), ModelData(**side.model_data()), side.profile)}
    assert [plain[key] for key in SITES] == ["wrong", "unmeasured", "unmeasured"]


@pytest.mark.parametrize("faults", [THREE[:1], THREE[1:], THREE[::2], ()], ids=len)
def test_what_is_not_planted_is_not_named(folder: Path, faults: tuple[str, ...]) -> None:
    report = hunt(folder, faults, IDS)
    assert [fault.key for fault in report.judged.wrong] == [site for name, site in zip(THREE, SITES, strict=True) if name in faults]
    assert any("not finite" in note for note in report.notes) == (THREE[0] in faults)


def test_one_name_is_one_fault(folder: Path) -> None:
    report = hunt(folder, THREE[1], IDS)
    assert [fault.key for fault in report.judged.wrong] == SITES[1:2]


def test_a_run_in_pieces_is_repaired_too(folder: Path) -> None:
    """The catalogue's control of pieces: three tokens at a time; the element that is lost is in the last row of each."""
    report = hunt(folder, (*THREE, "pieces"), IDS)
    assert [fault.key for fault in report.judged.wrong] == SITES
    assert any(note.startswith("0.ffn_out has 3 values that are not finite") for note in report.notes)


def test_a_nan_after_a_nan_is_repaired_in_its_turn(folder: Path) -> None:
    report = hunt(folder, ("nan@0.ffn_out", "nan@1.ffn_out", THREE[2]), IDS[:1])
    assert [fault.key for fault in report.judged.wrong] == [("ffn_out", 0), ("ffn_out", 1), ("lm_head", None)]
    assert sum("not finite" in note for note in report.notes) == 2


def test_an_infinite_value_is_repaired(folder: Path) -> None:
    """A weight 3e38 times too large: sums of 160 products go beyond the largest float32, 3.4e38; those of the file's weights do not."""
    edits = [
        {"target": "weight", "weight": "ffn_down", "layer": 0, "transform": "scaled", "factor": 3e38},
        {"target": "step", "stage": "ffn_silu", "layer": 1, "field": "act", "value": 1},
    ]
    side = OwnSide(folder, edits=edits)
    results, said = judged(side, side.capture(IDS))
    assert [r.key for r in results if r.state == "wrong"] == SITES[:2]
    assert len(said) == 1


def test_what_the_arithmetic_itself_makes_infinite_is_not_repaired(tmp_path: Path) -> None:
    """The file's own weights are too large for float32: the witness's value is infinite as well."""
    shape, name = tiny.Shape(), "model.layers.0.mlp.down_proj.weight"
    weights = tiny.weights(shape)
    large = weights.pop(name) * np.float32(2.0**127) * np.float32(4)  # at most 0.4 before
    tensors = {other: blob(array) for other, array in weights.items()} | {name: ("F32", large.shape, large.tobytes())}
    side = OwnSide(write_folder(tmp_path / "m", shape, tensors))
    captures = side.capture(IDS)
    assert captures.manifest.tensors["ffn_out", 0].nonfinite > 0
    results, said = judged(side, captures)
    assert said == []
    found = next(r for r in results if r.key == ("ffn_out", 0))
    assert (found.state != "wrong", found.overflowed > 0) == (True, True)


class Counting:
    """Our engine, counting how often it is given values."""

    def __init__(self, inner: OwnSide) -> None:
        self.inner, self.given = inner, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def capture_fed(self, ids: Sequence[int], feed: Mapping[Key, np.ndarray]) -> Captures:
        self.given += 1
        return self.inner.capture_fed(ids, feed)


def test_a_clean_run_is_judged_as_it_is(folder: Path) -> None:
    side = Counting(OwnSide(folder))
    captures, model = side.capture(IDS), ModelData(**side.model_data())
    results, said = judged(side, captures)
    assert (results, said, side.given) == (local(captures, model, side.profile), [], 0)


def test_values_that_are_given_stay(folder: Path) -> None:
    """What is fed is what is shown; what is before it does not move, and what is after it is made from it."""
    side = OwnSide(folder)
    plain = side.capture(IDS)
    value = np.array(plain["ffn_out", 0]) * np.float32(2)
    fed = side.capture_fed(IDS, {("ffn_out", 0): value})
    assert np.array_equal(fed["ffn_out", 0], value)
    assert np.array_equal(fed["ffn_swigl", 0], plain["ffn_swigl", 0])
    assert np.array_equal(fed["post_ffn_residual", 0], plain["post_attn_residual", 0] + value)  # one addition in float32
    assert not np.array_equal(fed["lm_head", None], plain["lm_head", None])


def test_several_plants_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for name in THREE for word in ("--plant", name)]
    assert bisect.main([*words, "--json", "--answer", "2"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert [(fault["stage"], fault["layer"]) for fault in data["wrong"]] == SITES
    assert "answer with nan@0.ffn_out and gelu@1.ffn_silu and transposed@lm_head" in data["answers"]
    assert data["reproduce"].count("--plant") == 3
    assert bisect.main(["--plant", THREE[1], "--plant", "gleu", "--answer", "0"]) == 2
    assert "did you mean 'gelu'" in capsys.readouterr().err
    assert aprender.compare(str(CANARY), plant=THREE[:2], answer=0).first is not None
