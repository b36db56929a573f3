"""Five wrong turns of a real hunt, each as a test: what misled people for weeks must not mislead the tool.

A hunt for one transposed matrix took three weeks, because aggregate statistics were compared, samples were unlike, captures were taken at
two points, quantisation noise was read as a bug, and the path that was traced was not the one that ran.  Each test first makes the
misleading figure as it was made then, and shows that it misleads; then it asks the tool.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import CANARY, PROMPT, blob, write_folder

import aprender
from aprender import bisect, bisection, diff
from aprender.asking import Ask
from aprender.captures import Captures, save
from aprender.errors import NotComparable
from aprender.judgement import Hunt
from aprender.manifest import LAST, TensorNote
from aprender.sides.own import OwnSide
from aprender.sides.saved import SavedSide
from aprender.stages import Key

IDS = (3, 14, 15, 92, 65, 35, 89, 79, 32)


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> OwnSide:
    return OwnSide(write_folder(tmp_path_factory.mktemp("story") / "model", tiny.Shape()))


def judged(subject: Any, reference: Any = None, ids: Sequence[int] = IDS, probes: Sequence[str] = ()) -> bisection.Report:
    return bisection.hunt(Hunt(subject, reference), Ask(ids=tuple(ids)), answer=0, probes=probes)


def recording(captures: Captures, side: OwnSide, name: str) -> SavedSide:
    """A capture beside the model that it is of, so that its weights are found."""
    save(captures, side.path / name)
    return SavedSide(side.path / name)


def replaced(captures: Captures, arrays: dict[Key, np.ndarray], **note: Any) -> Captures:
    """The capture with other arrays in some places, whose notes say what is asked for."""
    notes = {key: dataclasses.replace(TensorNote.of(array), **note) for key, array in arrays.items()}
    manifest = dataclasses.replace(captures.manifest, tensors=dict(captures.manifest.tensors) | notes)
    return Captures({key: captures[key] for key in captures} | arrays, manifest)


def aggregates(array: np.ndarray) -> list[float]:
    """What a summary of a tensor held."""
    wide = np.sort(array.astype(np.float64).ravel())
    return [wide.mean(), wide.std(), wide.min(), wide.max(), float(np.linalg.norm(wide))]


# ---- 1. aggregate statistics ---------------------------------------------------------------------------------------------------------


def test_equal_statistics_of_a_wrong_stage(side: OwnSide) -> None:
    """A stage with its lanes in another order has the same mean, deviation, extremes and norm; what follows is computed from it."""
    key = ("ffn_swigl", 1)
    right = side.capture(IDS)
    arrays = side.run().forward(IDS, "all", {key: np.ascontiguousarray(right[key][:, ::-1])})
    wrong = Captures(arrays, dataclasses.replace(right.manifest, tensors={}))
    assert aggregates(wrong[key]) == aggregates(right[key])
    report = judged(recording(wrong, side, "permuted"), side)
    assert (report.verdict, report.first and report.first.key) == ("divergence", key)
    assert [fault.key for fault in report.judged.wrong] == [key]  # what follows is right on what it was given
    assert judged(recording(right, side, "right"), side).verdict == "agree"


def test_a_spike_in_one_layer_is_what_the_model_was_trained_to_do(tmp_path: Path) -> None:
    """One layer 17 times its neighbour: compared with the neighbour it looks broken, compared with its own inputs it is right."""
    shape = tiny.Shape()
    weights = tiny.weights(shape)
    up = "model.layers.1.mlp.up_proj.weight"
    folder = write_folder(tmp_path / "m", shape, {name: blob(array * 32 if name == up else array) for name, array in weights.items()})
    captures = OwnSide(folder).capture(IDS)
    assert captures["ffn_swigl", 1].std() > 17 * captures["ffn_swigl", 0].std()
    assert aprender.compare(str(folder), prompt_ids=IDS, answer=0).verdict == "agree"
    report = aprender.compare(str(folder), prompt_ids=IDS, plant="transposed@0.ffn_up", answer=0)  # the layer without the spike
    assert report.first is not None
    assert report.first.key == ("ffn_up", 0)


# ---- 2. unlike samples ---------------------------------------------------------------------------------------------------------------


def test_last_token_against_all_tokens_is_refused_with_both_values(side: OwnSide, capsys: pytest.CaptureFixture[str]) -> None:
    """Their deviations differ by far, and neither is wrong: 9 tokens hold 1440 values, the last one 160."""
    key = ("ffn_swigl", 1)
    every = side.capture(IDS)
    last = replaced(every, {key: np.array(every[key][-1:])})
    ratio = float(every[key].std() / last[key].std())
    assert abs(ratio - 1) > 0.05
    whole, cut = recording(every, side, "whole"), recording(last, side, "cut")
    with pytest.raises(NotComparable) as caught:
        judged(cut, whole)
    assert caught.value.code == "SHAPE"
    for text in ("1.ffn_swigl", "[1, 160]", "[9, 160]"):
        assert text in str(caught.value)
    folders = [str(cut.path), str(whole.path)]
    assert bisect.main([f"saved:{folders[0]}", "--against", f"saved:{folders[1]}"]) == 3
    assert diff.main(folders) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("[1, 160] against [9, 160]") == 2


def test_a_last_token_that_is_said_to_be_one_is_compared_with_the_last_token(side: OwnSide) -> None:
    key = ("ffn_swigl", 1)
    every = side.capture(IDS)
    last = replaced(every, {key: np.array(every[key][-1:])}, positions=LAST)
    report = judged(recording(last, side, "said"), recording(every, side, "whole"))
    assert report.verdict == "agree"
    assert any("last token" in note and "1.ffn_swigl" in note for note in report.notes)
    row = next(row for row in report.judged.rows if (row.stage, row.layer) == key)
    assert row.free is not None
    assert (row.free.n, row.free.rel_l2) == (160, 0.0)


def test_other_tokens_are_refused_with_both_values(side: OwnSide) -> None:
    """One BOS token on one side, the prompt on the other."""
    with pytest.raises(NotComparable, match=r"place 1 the end, asked for 14 \(1 and 9 tokens\)"):
        judged(side, recording(side.capture(IDS[:1]), side, "bos"))


# ---- 3. capture points ---------------------------------------------------------------------------------------------------------------


def test_before_the_bias_against_after_it_is_refused_with_both_values(side: OwnSide, capsys: pytest.CaptureFixture[str]) -> None:
    """A bias of sd 1 makes the deviations differ: read as "too large", while the bytes of both biases are equal."""
    key = ("qkv_bias", 0)
    after = side.capture(IDS)
    assert after[key].std() > 1.1 * after["qkv_matmul", 0].std()
    before = replaced(after, {key: np.array(after["qkv_matmul", 0])}, capture_point="before the bias")
    folders = [recording(before, side, "before"), recording(after, side, "after")]
    with pytest.raises(NotComparable) as caught:
        judged(*folders)
    assert caught.value.code == "CAPTURE_POINT"
    for text in ("0.qkv_bias", "'before the bias'", "'as defined'"):
        assert text in str(caught.value)
    assert bisect.main([f"saved:{folders[0].path}", "--against", f"saved:{folders[1].path}"]) == 3
    assert "'before the bias' against 'as defined'" in capsys.readouterr().err


def test_a_capture_point_that_nobody_declared_is_named_as_the_wrong_stage(side: OwnSide) -> None:
    """The values before the bias under the name of those after it: the stage is not what its own inputs make, and what follows is not."""
    key = ("qkv_bias", 0)
    after = side.capture(IDS)
    report = judged(recording(replaced(after, {key: np.array(after["qkv_matmul", 0])}), side, "mislabelled"), side)
    assert (report.verdict, report.first and report.first.key) == ("divergence", key)
    assert all(fault.side == "subject" for fault in report.judged.wrong)


# ---- 4. quantisation noise -----------------------------------------------------------------------------------------------------------


def test_quantisation_noise_is_no_bug() -> None:
    """4-bit weights against the original ones: cosines that a gate of 0.999 fails, 0.9966 as in the story among them; both sides right."""
    report = aprender.compare(str(CANARY / "canary.gguf"), str(CANARY), prompt_ids=PROMPT, answer=0)
    cosines = {(row.stage, row.layer): row.free.cos_distance or 0 for row in report.judged.rows if row.free}
    failed = [key for key, distance in cosines.items() if distance > 1e-3]
    assert len(failed) > 20
    assert max(cosines.values()) > 1 - 0.9966
    assert report.verdict == "agree"
    rows = {(row.stage, row.layer): row for row in report.judged.rows}
    for key in failed:  # and it says where the distance is from: the weights alone account for it
        assert rows[key].quantization == pytest.approx(rows[key].free.rel_l2 if rows[key].free else None, rel=1e-3)


def test_a_bug_far_smaller_than_the_noise_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    """An epsilon of 1e-5 for 1e-6: the stage is nearer to its right self than 1e-6 in cosine, thousands of times nearer than 4 bits are."""
    plant = "eps@0.attn_norm"
    right = OwnSide(CANARY / "canary.gguf").capture(PROMPT)
    report = aprender.compare(str(CANARY / "canary.gguf"), str(CANARY), prompt_ids=PROMPT, plant=plant, answer=0)
    assert report.subject is not None
    a, b = (captures["attn_norm", 0].astype(np.float64).ravel() for captures in (report.subject, right))
    assert 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) < 1e-6
    assert (report.verdict, report.first and report.first.key) == ("divergence", ("attn_norm", 0))
    assert bisect.main(["--plant", plant, "--json", "--answer", "0"]) == 1
    assert json.loads(capsys.readouterr().out)["first"]["stage"] == "attn_norm"


# ---- 5. another path than the one that runs --------------------------------------------------------------------------------------------


class TwoPaths(OwnSide):
    """An engine whose traced path is right and whose fast path, which makes the text, has the head transposed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.fast = OwnSide(path, edits=[{"target": "weight", "weight": "output", "layer": None, "transform": "transposed"}])

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        return self.fast.logits(ids)

    def generate(self, ids: Sequence[int], n: int, on_token: Any = None) -> list[int]:
        return self.fast.generate(ids, n, on_token)


class Unattested(TwoPaths):
    """The same, and its tracer never looked at the other path."""

    def capture(self, *args: Any, **more: Any) -> Captures:
        made = super().capture(*args, **more)
        return Captures(made, dataclasses.replace(made.manifest, attestation=None))


def test_a_trace_of_another_path_is_no_verdict_on_the_one_that_runs() -> None:
    """Every traced stage is right and the text is wrong: the tool must not say "agree"."""
    side = TwoPaths(CANARY)
    ran = bisection.hunt(Hunt(side), Ask(ids=PROMPT))
    assert dict(ran.answers)["answer"] != "' 2+2 is 4.'"
    assert not [row for row in ran.judged.rows if row.state == "wrong"]
    assert (ran.exit_code, ran.judged.finding) == (1, "heisenbug")
    assert "not what makes the text" in ran.sentence
    assert judged(OwnSide(CANARY), ids=PROMPT).verdict == "agree"


def test_a_tracer_that_never_looked_is_looked_at_by_the_probe() -> None:
    report = judged(Unattested(CANARY), ids=PROMPT, probes=("traced",))
    assert (report.exit_code, report.judged.finding, report.first and report.first.stage) == (1, "heisenbug", "lm_head")


def test_the_path_that_runs_is_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """How the hunt ends: the path that makes the text, captured itself."""
    assert bisect.main(["--plant", "transposed@lm_head", "-q"]) == 1
    assert capsys.readouterr().out.startswith("lm_head of the subject (canary.gguf) is the first wrong operation")
