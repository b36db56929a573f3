"""Probes: each shows the class of bugs that it is for, which the prompt alone does not show, and finds nothing in a clean side.

Truth: what is planted is known, and so is how it hides: an edit that applies to single tokens or to later pieces only, a mask fault in a
side that does not show its attention, a capture that changes the logits, noise that is new in each run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import CANARY, PROMPT, write_folder

import aprender
from aprender import bisect, bisection, probes, stages
from aprender.captures import Captures
from aprender.errors import UnknownName
from aprender.sides.own import OwnSide
from aprender.stages import LOGITS

IDS = (3, 14, 15, 92, 65, 35, 89, 79, 32)
ALL = tuple(probes.PROBES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("probes") / "model", tiny.Shape())


def hunt(side: Any, names: Sequence[str] = (), ids: Sequence[int] = IDS) -> bisection.Report:
    return bisection.hunt(bisection.Hunt(side), bisection.Ask(ids=tuple(ids)), answer=0, probes=names)


def states(report: bisection.Report) -> dict[str, str]:
    return {outcome.probe: outcome.state for outcome in report.probed}


class Wrapped:
    """A side in other clothes: what a test does not change is that of our engine."""

    def __init__(self, inner: OwnSide) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def capture(self, ids: Sequence[int], keep: stages.Selection | None = None) -> Captures:
        return self.changed(self.inner.capture(ids, keep))

    def changed(self, captures: Captures) -> Captures:
        return captures


def with_array(captures: Captures, key: stages.Key, change: Callable[[np.ndarray], np.ndarray]) -> Captures:
    arrays = {k: captures[k] for k in captures}
    return Captures(arrays | {key: change(np.array(arrays[key]))}, captures.manifest)


# ---- clean ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [tiny.Shape("qwen2"), tiny.Shape("llama", tied=True), tiny.Shape("qwen3")], ids=str)
def test_a_clean_side_passes_every_probe(shape: tiny.Shape, tmp_path: Path) -> None:
    report = hunt(OwnSide(write_folder(tmp_path / "m", shape)), ALL)
    assert report.verdict == "agree", report.sentence
    assert states(report) == dict.fromkeys(ALL, "agree")
    assert report.judged.probes == ("prompt", *ALL)
    assert len({outcome.tokens for outcome in report.probed}) >= 5  # one, short, long, ragged, causal: five different sequences


def test_without_probes_the_prompt_is_what_it_rests_on(folder: Path) -> None:
    report = hunt(OwnSide(folder))
    assert (report.judged.probes, report.probed) == (("prompt",), ())
    note = next(note for note in report.notes if note.startswith("rests on: prompt;"))
    assert all(row.sees in note for row in probes.PROBES.values())
    assert probes.NEVER in note
    note = next(note for note in hunt(OwnSide(folder), ("decode",)).notes if note.startswith("rests on: prompt, decode;"))
    assert probes.PROBES["decode"].sees not in note
    assert probes.PROBES["causal"].sees in note


@pytest.mark.parametrize("ids", [IDS[:1], IDS[:2], IDS * 5], ids=len)
def test_any_prompt_can_be_probed(folder: Path, ids: tuple[int, ...]) -> None:
    """One token and more than the pieces hold; nothing runs beyond the context of the model."""
    report = hunt(OwnSide(folder), ALL, ids)
    assert (report.verdict, set(states(report).values())) == ("agree", {"agree"})
    assert max(len(outcome.tokens) for outcome in report.probed) == probes.LONG


def test_a_short_context_is_kept_to(tmp_path: Path) -> None:
    side = OwnSide(write_folder(tmp_path / "m", tiny.Shape(context=20)))
    report = hunt(side, ALL)
    assert report.verdict == "agree"
    assert max(len(outcome.tokens) for outcome in report.probed) == 20


def test_pieces_cut_up_any_number_of_tokens() -> None:
    for tokens in range(1, 130):
        for cut in (probes._ragged(tokens), probes._decoded(tokens) if tokens > 1 else [1]):
            assert sum(cut) == tokens
            assert min(cut) > 0
    assert probes._ragged(40) == [13, 1, 11, 15]
    assert probes._decoded(12) == [4, *[1] * 8]


# ---- faults in some pieces only ------------------------------------------------------------------------------------------------------


def edited(folder: Path, when: str) -> OwnSide:
    return OwnSide(folder, edits=[{"target": "step", "stage": "attn_scores", "layer": 1, "field": "scale", "factor": 0.5, "when": when}])


def test_a_fault_of_decoding_is_seen_by_single_tokens_only(folder: Path) -> None:
    names = ("short", "long", "decode", "causal", "repeat", "traced")
    side = edited(folder, "single")
    assert hunt(side).verdict == "agree"
    assert hunt(side, ("short", "long", "causal", "repeat", "traced")).verdict == "agree"
    report = hunt(side, names)
    assert {name for name, state in states(report).items() if state == "divergence"} == {"decode"}
    assert (report.verdict, report.judged.finding) == ("divergence", "operation")
    assert report.first is not None
    assert report.first.key == ("attn_scores", 1)
    assert report.sentence.startswith("Probe decode (a prompt, then token by token): attn_scores of layer 1 of the subject")
    row = next(row for row in report.judged.rows if (row.stage, row.layer) == ("attn_scores", 1))
    assert (row.state, row.free is not None and row.free.rel_l2 is not None and row.free.rel_l2 > 0.01) == ("wrong", True)


def test_a_single_token_is_probed_alone_too(folder: Path) -> None:
    """Softmax over one key hides the scale of its score, so the fault sits at a norm."""
    edits = [{"target": "step", "stage": "final_norm", "layer": None, "field": "eps", "value": 0.5, "when": "single"}]
    report = hunt(OwnSide(folder, edits=edits), ("one", "short"))
    assert states(report) == {"one": "divergence", "short": "agree"}
    assert report.first is not None
    assert report.first.key == ("final_norm", None)


def test_a_fault_of_later_pieces_is_seen_by_pieces_only(folder: Path) -> None:
    report = hunt(edited(folder, "later"), ALL)
    assert {name for name, state in states(report).items() if state == "divergence"} == {"decode", "ragged"}
    assert report.first is not None
    assert report.first.key == ("attn_scores", 1)


def test_a_side_that_shows_little_still_must_not_depend_on_its_pieces(folder: Path) -> None:
    """Only the streams between the layers are shown: no stage can be judged there, but the bits of two cuttings can."""

    class Streams(Wrapped):
        def changed(self, captures: Captures) -> Captures:
            return shown(captures)

        def capture_pieces(self, ids: Sequence[int], sizes: Sequence[int]) -> Captures:
            return shown(self.inner.capture_pieces(ids, sizes))

    report = hunt(Streams(edited(folder, "later")), ("ragged",))
    assert (report.judged.finding, report.first and report.first.key) == ("unexplained", ("post_ffn_residual", 1))
    assert hunt(Streams(OwnSide(folder)), ("ragged",)).verdict == "agree"


def test_a_timeline_that_is_switched_keeps_one_past(folder: Path) -> None:
    """An edit without effect in pieces changes no bit: both runs go on from the same cache."""
    idle = [{"target": "step", "stage": "ffn_norm", "layer": 0, "field": "eps", "factor": 1.0, "when": "single"}]
    plain, switched = OwnSide(folder), OwnSide(folder, edits=idle)
    ids = (IDS * 5)[:40]
    whole = plain.capture(ids)
    for sizes in ([40], [13, 1, 11, 15], [1, 1, 37, 1]):
        pieces = switched.capture_pieces(ids, sizes)
        assert all(np.array_equal(whole[key], pieces[key]) for key in whole)
    assert plain.generate(IDS, 6) == switched.generate(IDS, 6)


def shown(captures: Captures) -> Captures:
    """What an engine shows that hands out hidden states only."""
    names = ("embedding", "rope_table", "post_ffn_residual", "final_norm", "lm_head")
    return Captures({key: captures[key] for key in captures if key[0] in names}, dataclasses.replace(captures.manifest, tensors={}))


# ---- causality, repetition, watching -------------------------------------------------------------------------------------------------


class HiddenStates(Wrapped):
    """Shows the streams between the layers and no attention, as ``output_hidden_states`` does."""

    def changed(self, captures: Captures) -> Captures:
        return shown(captures)


def test_a_mask_that_lets_the_next_token_through_is_named_by_causality_only(folder: Path) -> None:
    """The other probes see that something is left unexplained, and accuse nobody."""
    edits = [
        {"target": "step", "stage": stage, "layer": 1, "field": "mask_offset", "value": 1} for stage in ("attn_scores", "attn_softmax")
    ]
    side = HiddenStates(OwnSide(folder, edits=edits))
    blind = hunt(side, tuple(name for name in ALL if name not in ("causal", "decode", "ragged")))
    assert (blind.judged.finding, blind.first) == ("unexplained", None)
    report = hunt(side, ("causal",))
    assert (report.verdict, report.judged.finding) == ("divergence", "operation")
    assert report.first is not None
    assert (report.first.key, report.first.kind) == (("post_ffn_residual", 1), "not causal")
    assert hunt(HiddenStates(OwnSide(folder)), ("causal",)).verdict == "agree"


class Noisy(Wrapped):
    """Adds noise of its own to a stage on each run; the first run has none, as a race that is seldom lost."""

    runs = 0

    def changed(self, captures: Captures) -> Captures:
        self.runs += 1
        if self.runs == 1:
            return captures
        generator = np.random.default_rng(self.runs)
        return with_array(captures, ("ffn_out", 1), lambda array: array * (1 + generator.standard_normal(array.shape) * 1e-7))


def test_noise_of_each_run_is_nondeterministic(folder: Path) -> None:
    assert hunt(Noisy(OwnSide(folder))).verdict == "agree"
    report = hunt(Noisy(OwnSide(folder)), ("repeat",))
    assert (report.exit_code, report.judged.finding) == (1, "nondeterministic")
    assert report.first is not None
    assert report.first.key == ("ffn_out", 1)
    assert "two runs of the same tokens differ" in report.sentence


class Watched(Wrapped):
    """Capturing turns a fused kernel off, and the logits change; what generates the text is what nobody captures."""

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        return np.asarray(self.inner.logits(ids) * np.float32(1.001))


def test_a_capture_that_changes_the_logits_is_a_heisenbug(folder: Path) -> None:
    assert hunt(Watched(OwnSide(folder))).verdict == "agree"
    report = hunt(Watched(OwnSide(folder)), ("traced",))
    assert (report.exit_code, report.judged.finding) == (1, "heisenbug")
    assert report.first is not None
    assert report.first.key == LOGITS


def test_a_capture_that_says_so_itself_needs_no_probe(folder: Path) -> None:
    class Honest(Wrapped):
        def changed(self, captures: Captures) -> Captures:
            return Captures(captures, dataclasses.replace(captures.manifest, attestation=False))

    report = hunt(Honest(OwnSide(folder)))
    assert (report.exit_code, report.judged.finding) == (1, "heisenbug")
    assert report.sentence.startswith("Probe prompt: Capturing changes the result")


def test_an_unstable_side_is_told_before_its_wrong_stages(folder: Path) -> None:
    """A wrong operation on the prompt and a result that changes: the first is still said."""
    edits = [{"target": "step", "stage": "ffn_norm", "layer": 0, "field": "eps", "factor": 1e4}]
    report = hunt(Noisy(OwnSide(folder, edits=edits)), ("repeat",))
    assert report.judged.finding == "nondeterministic"
    assert "ffn_norm of layer 0 of the subject" in report.sentence
    assert [fault.key for fault in report.judged.wrong] == [("ffn_out", 1), ("ffn_norm", 0)]
    report = hunt(OwnSide(folder, edits=edits), ("short",))
    assert (report.judged.finding, report.sentence.endswith(" Probe short diverges too.")) == ("operation", True)


# ---- what cannot run -----------------------------------------------------------------------------------------------------------------


def test_a_recording_cannot_be_probed() -> None:
    report = aprender.compare(f"saved:{CANARY / 'stages-float32'}", str(CANARY), probe="all", answer=0)
    assert states(report) == dict.fromkeys(ALL, "not_run")
    assert report.judged.probes == ("prompt",)
    assert report.verdict == "agree"
    assert all("cannot run here: a recording" in outcome.text for outcome in report.probed)


def test_a_side_without_pieces_counts_as_not_run(folder: Path) -> None:
    class Whole(Wrapped):
        def __getattr__(self, name: str) -> Any:
            if name == "capture_pieces":
                raise AttributeError(name)
            return super().__getattr__(name)

    report = hunt(Whole(OwnSide(folder)), ALL)
    assert {name for name, state in states(report).items() if state == "not_run"} == {"decode", "ragged"}
    assert not {"decode", "ragged"} & set(report.judged.probes)
    assert any("not probed (--probe all): decoding, chunks;" in note for note in report.notes)


@pytest.mark.foreign
def test_hugging_face_is_probed() -> None:
    pytest.importorskip("torch")
    report = aprender.compare(f"hf:{CANARY}@float32", "witness", prompt_ids=PROMPT, probe="all", answer=0)
    assert states(report) == dict.fromkeys(ALL, "agree") | {"decode": "not_run", "ragged": "not_run"}, [o.text for o in report.probed]
    assert report.verdict == "agree"


# ---- the command ---------------------------------------------------------------------------------------------------------------------


def test_names_on_the_command_line(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert probes.parse(None) == ()
    assert probes.parse("prompt") == ()
    assert probes.parse("repeat, one") == ("one", "repeat")
    assert probes.parse("all") == ALL
    with pytest.raises(UnknownName, match="did you mean 'decode'"):
        probes.parse("decoding")
    assert bisect.main(["--probe", "decoding"]) == 2
    assert "did you mean 'decode'" in capsys.readouterr().err


def test_report_of_the_command(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert bisect.main([str(folder), "--prompt-ids", "1,2,3,4,5", "--probe", "decode,traced", "--json", "--answer", "0"]) == 0
    data: Mapping[str, Any] = json.loads(capsys.readouterr().out)
    assert data["probes"] == ["prompt", "decode", "traced"]
    assert [(row["probe"], row["state"]) for row in data["probed"]] == [("decode", "agree"), ("traced", "agree")]
    assert data["probed"][0]["tokens"] == [1, 2, 3, 4, 5]
    assert bisect.main([str(folder), "--prompt-ids", "1,2,3,4,5", "--probe", "causal", "--answer", "0"]) == 0
    out = capsys.readouterr().out
    assert "probe causal" in out
    assert "agree: the first 4 rows" in out
