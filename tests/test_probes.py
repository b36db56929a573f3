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
from aprender import arithmetic, bisect, bisection, probes, stages
from aprender.asking import Ask
from aprender.captures import Captures
from aprender.errors import ArgumentError, UnknownName
from aprender.judgement import Hunt
from aprender.probes import runs
from aprender.sides.edits import VALUES
from aprender.sides.own import OwnSide
from aprender.stages import LOGITS

IDS = (3, 14, 15, 92, 65, 35, 89, 79, 32)
ALL = tuple(probes.PROBES)
OWN = dict.fromkeys(ALL, "agree") | {"padded": "not_run", "keys": "not_run"}
"""Our engine has no batches, and the context of the tiny models (256) is shorter than the keys that are wanted."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("probes") / "model", tiny.Shape())


def hunt(side: Any, names: Sequence[str] = (), ids: Sequence[int] = IDS) -> bisection.Report:
    return bisection.hunt(Hunt(side), Ask(ids=tuple(ids)), answer=0, probes=names)


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
    assert states(report) == OWN
    assert report.judged.probes == ("prompt", *(name for name in ALL if OWN[name] == "agree"))
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
    assert (report.verdict, states(report)) == ("agree", OWN)
    assert max(len(outcome.tokens) for outcome in report.probed) == runs.LONG


def test_a_short_context_is_kept_to(tmp_path: Path) -> None:
    side = OwnSide(write_folder(tmp_path / "m", tiny.Shape(context=20)))
    report = hunt(side, ALL)
    assert report.verdict == "agree"
    assert max(len(outcome.tokens) for outcome in report.probed) == 20


def test_pieces_cut_up_any_number_of_tokens() -> None:
    for tokens in range(1, 130):
        for cut in (runs.ragged(tokens), runs.decoded(tokens) if tokens > 1 else [1]):
            assert sum(cut) == tokens
            assert min(cut) > 0
    assert runs.ragged(40) == [13, 1, 11, 15]
    assert runs.decoded(12) == [4, *[1] * 8]


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
    assert {name for name, state in states(report).items() if state == "not_run"} == {"decode", "ragged", "padded", "keys"}
    assert not {"decode", "ragged"} & set(report.judged.probes)
    note = next(note for note in report.notes if note.startswith("rests on: prompt, one,"))
    assert "the probe cannot run here: decoding, chunks (this side runs a sequence in one piece only); padded batches (this side" in note
    assert "thousands of cached keys (the context of the model is 256 tokens, 2056 are needed)" in note
    assert "--probe all" not in note  # all were asked for


@pytest.mark.foreign
def test_hugging_face_is_probed() -> None:
    pytest.importorskip("torch")
    report = aprender.compare(f"hf:{CANARY}@float32", "witness", prompt_ids=PROMPT, probe="all", answer=0)
    expected = dict.fromkeys(ALL, "agree") | {"keys": "not_run"}  # the context of the canary is 512
    assert states(report) == expected, [o.text for o in report.probed]
    assert report.verdict == "agree"


# ---- the command ---------------------------------------------------------------------------------------------------------------------


def test_names_on_the_command_line(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert probes.parse(None) == ()
    assert probes.parse("prompt") == ()
    assert probes.parse("repeat, one") == ("one", "repeat")
    assert probes.parse("all") == ALL
    with pytest.raises(UnknownName, match="did you mean 'decode'"):
        probes.parse("decoding")
    assert bisect.main(["--help"]) == 0
    assert set(ALL) <= set(capsys.readouterr().out.split())
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


# ---- padded batches --------------------------------------------------------------------------------------------------------------------


def of_hugging_face(folder: Path, dtype: str = "float32") -> Any:
    pytest.importorskip("torch")
    from aprender.sides.hf import HFSide

    return HFSide(str(folder), dtype)


def hook(module: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change what a module is called with by name."""
    module.register_forward_pre_hook(lambda _module, args, named: (args, named | change(named)), with_kwargs=True)


def shared_positions(side: Any) -> None:
    """Every row of a batch has the positions of the longest one: where its tokens lie in the cache."""
    import torch

    def change(named: dict[str, Any]) -> dict[str, Any]:
        rows, width = named["input_ids"].shape
        return {"position_ids": torch.arange(named["attention_mask"].shape[1])[None, -width:]} if rows > 1 else {}

    hook(side.model.model, change)


def positions_of_the_cache(side: Any) -> None:
    """Right for the prompt; where a batch is decoded, as above (unslothai/unsloth#3699)."""
    import torch

    def change(named: dict[str, Any]) -> dict[str, Any]:
        rows, width = named["input_ids"].shape
        return {"position_ids": torch.tensor([[named["attention_mask"].shape[1] - 1]])} if rows > 1 and width == 1 else {}

    hook(side.model.model, change)


def no_padding_mask(side: Any) -> None:
    """Padding is seen as if it were text."""
    hook(side.model.model, lambda named: {"attention_mask": None})


def shared_rotation(side: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is right, but queries of all rows are rotated by that of the first row."""
    import sys

    home = sys.modules[type(side.model).__module__]
    right = home.apply_rotary_pos_emb

    def rotated(q: Any, k: Any, cos: Any, sin: Any, **more: Any) -> Any:
        return right(q, k, cos[:1], sin[:1], **more)[0], right(q, k, cos, sin, **more)[1]

    monkeypatch.setattr(home, "apply_rotary_pos_emb", rotated)


PADDED = {
    "positions": (positions_of_the_cache, ("rope_table", None)),
    "mask": (no_padding_mask, ("attn_softmax", 0)),
    "queries": (shared_rotation, ("q_post_rope", 0)),
}


@pytest.mark.foreign
@pytest.mark.parametrize("name", PADDED)
def test_faults_of_padded_rows_are_seen_in_a_batch_only(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest row has no padding and stays right; a row padded on the right has its tokens where they would be alone."""
    plant, key = PADDED[name]
    side = of_hugging_face(folder)
    assert hunt(side, ("padded",)).verdict == "agree"
    plant(*((side, monkeypatch) if plant is shared_rotation else (side,)))
    assert hunt(side, ("short", "decode")).verdict == "agree"
    report = hunt(side, ("padded",))
    assert (report.verdict, report.judged.finding) == ("divergence", "operation")
    assert report.first is not None
    assert report.first.key == key
    (found,) = report.probed
    assert found.text.startswith("row 1 (4 tokens) of a batch padded on the left: ")
    assert found.text.endswith("Of rows of 14, 4, 9 tokens, wrong are: padded left: rows 1, 2; padded right: none.")
    assert found.tokens == IDS[1:5]  # the row that is shown, as it would be run alone


@pytest.mark.foreign
def test_rows_that_are_shifted_as_a_whole_are_said_to_be(folder: Path) -> None:
    """Queries and keys of a padded row stand further on, all alike: attention is the same (the catalogue's control ``shift``)."""
    side = of_hugging_face(folder)
    shared_positions(side)
    table = side.capture_batch([IDS, IDS[:4]], "left")[1]["rope_table", None]
    assert np.array_equal(table, side.rotary_table([5, 6, 7, 8])["rope_table", None])
    (found,) = hunt(side, ("padded",)).probed
    assert found.state == "agree"
    assert "; row 1, padded left; " in found.text
    assert "shifted by 10" in found.text
    assert "row 0" not in found.text


@pytest.mark.foreign
@pytest.mark.parametrize("shape", [tiny.Shape("qwen2"), tiny.Shape("llama", tied=True), tiny.Shape("qwen3")], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_of_a_clean_batch_are_right(shape: tiny.Shape, dtype: str, tmp_path: Path) -> None:
    side = of_hugging_face(write_folder(tmp_path / "m", shape), dtype)
    report = hunt(side, ("padded",))
    assert (report.verdict, states(report)) == ("agree", {"padded": "agree"})
    for padding, single in (("left", 0), ("left", 1), ("right", 0)):
        rows = side.capture_batch([IDS, IDS[:2]], padding, single)
        assert [len(row.pieces) for row in rows] == [2 * single, 2 * single]
        assert [(row.tokens, row.manifest.positions) for row in rows] == [(IDS, tuple(range(9))), (IDS[:2], (0, 1))]
        assert rows[1]["attn_scores", 0].shape == (4, 2, 2)
        assert np.array_equal(rows[0]["embedding", None][:2], rows[1]["embedding", None])


@pytest.mark.foreign
def test_one_kernel_is_probed_in_batches_and_pieces_too(folder: Path) -> None:
    """With sdpa the scores and probabilities are never formed; every other stage of each row is there."""
    side = of_hugging_face(folder)
    side.declare(arithmetic.profile("hf-f32-sdpa"))
    report = hunt(side, ("decode", "padded"))
    assert states(report) == {"decode": "agree", "padded": "agree"}, [outcome.text for outcome in report.probed]
    rows = side.capture_batch([IDS, IDS[:3]], "left", 1)
    assert all(("attention", 1) in row and ("attn_scores", 1) not in row for row in rows)


def merged_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a batch is decoded, a slot of the other rows gets what the first row has in the slot before (scouzi1966/maclocal-api#92)."""
    from transformers.cache_utils import DynamicLayer

    update = DynamicLayer.update

    def faulty(self: Any, keys: Any, values: Any, *args: Any, **more: Any) -> Any:
        out = update(self, keys, values, *args, **more)
        if keys.shape[0] > 1 and keys.shape[2] == 1:
            self.values[1:, :, 12] = self.values[:1, :, 11]
        return out

    monkeypatch.setattr(DynamicLayer, "update", faulty)


@pytest.mark.foreign
def test_a_cache_that_rows_share_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 14, 4 and 9 tokens, padded on the left, decode their last two: slot 12 of the batch is the one before the last."""
    side = of_hugging_face(folder)
    merged_caches(monkeypatch)
    assert hunt(side, ("decode",)).verdict == "agree"
    report = hunt(side, ("padded",))
    assert report.first is not None
    assert report.first.key == ("v_cache", 0)
    (found,) = report.probed
    assert found.text.startswith("row 1 (4 tokens) of a batch padded on the left: v_cache of layer 0")
    assert "slot 2 (token 92) holds what belongs to slot 1 (token 15)" in found.text  # a value of layer 0 is that of its token alone
    assert found.wrong[1].key == ("v_cache", 1)
    assert found.wrong[1].reason.startswith("slot 2 (token 92) holds no row that this layer wrote")
    assert "padded left: rows 1, 2; padded right: none" in found.text


@pytest.mark.foreign
def test_a_batch_that_cannot_be(folder: Path) -> None:
    side = of_hugging_face(folder)
    for padding, single in (("up", 0), ("right", 1), ("left", 2), ("left", -1)):
        with pytest.raises(ArgumentError):
            side.capture_batch([IDS, IDS[:2]], padding, single)


def test_our_engine_says_that_it_has_no_batches(folder: Path) -> None:
    (found,) = hunt(OwnSide(folder), ("padded",)).probed
    assert (found.state, found.text) == ("not_run", "cannot run here: this side runs one sequence at a time and has no batches")


# ---- far positions ---------------------------------------------------------------------------------------------------------------------


def test_far_positions_of_our_own_table(folder: Path) -> None:
    side = OwnSide(folder)
    table = side.rotary_table([0, 3, 131071])
    assert np.array_equal(table["rope_table", None][:2], side.capture(IDS)["rope_table", None][[0, 3]])
    (found,) = hunt(side, ("far",)).probed
    assert found.text.startswith("the rotary table is right at positions 0, 1, 8191, 131071; its angles are up to ")
    off = float(found.text.split("up to ")[1].split()[0])
    # theta^(-2i/h) in float32: three roundings of the frequency and one of the angle, each 2^-24 of at most 131071 rad
    assert 0 < off < 131071 * 4 * 2.0**-24
    wrong = [{"target": "step", "stage": "rope_table", "layer": None, "field": "theta", "factor": 1.0001}]
    (found,) = hunt(OwnSide(folder, edits=wrong), ("far",)).probed
    assert (found.state, [fault.key for fault in found.wrong]) == ("divergence", [("rope_table", None)])


def test_a_table_that_ends_is_seen_far_out_only(folder: Path) -> None:
    class Short(Wrapped):
        """The last row of a table of 4096 stands for all behind it."""

        def rotary_table(self, positions: Sequence[int]) -> Captures:
            made = self.inner.rotary_table([min(position, 4095) for position in positions])
            return Captures(made, dataclasses.replace(made.manifest, positions=tuple(positions)))

    report = hunt(Short(OwnSide(folder)), ("long", "far"))
    assert states(report) == {"long": "agree", "far": "divergence"}
    assert report.first is not None
    assert report.first.key == ("rope_table", None)
    assert report.sentence.startswith("Probe far (the rotary table at positions 0, 1, 8191, 131071): at positions ")
    assert len(report.judged.rows) > 1  # the table of stages is the prompt's


def short_positions(side: Any) -> None:
    """Positions go through bfloat16: exact to 256."""
    import torch

    rotary = side.model.model.rotary_emb
    rotary.register_forward_pre_hook(lambda _, args: (args[0], args[1].to(torch.bfloat16)))
    hook(rotary, lambda named: {k: v.to(torch.bfloat16) for k, v in named.items() if k == "position_ids"})


def scaled(side: Any) -> None:
    """Low frequencies divided by 8, as for another model of the family (ggml-org/llama.cpp#8676 is the other way round)."""
    side.model.model.rotary_emb.inv_freq[8:] /= 8


@pytest.mark.foreign
@pytest.mark.parametrize(("plant", "seen"), [(short_positions, {"far"}), (scaled, {"long", "far"})])
def test_far_positions_of_hugging_face(plant: Callable[[Any], None], seen: set[str], folder: Path) -> None:
    side = of_hugging_face(folder)
    assert set(states(hunt(side, ("long", "far"))).values()) == {"agree"}
    plant(side)
    report = hunt(side, ("long", "far"))
    assert {name for name, state in states(report).items() if state == "divergence"} == seen
    assert report.first is not None
    assert report.first.key == ("rope_table", None)


# ---- thousands of cached keys ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("roomy") / "model", tiny.Shape(context=4096))


def test_thousands_of_keys_are_judged(roomy: Path) -> None:
    (found,) = hunt(OwnSide(roomy), ("keys",)).probed
    assert (found.state, found.text) == ("agree", "42 stages of 8 tokens are right, on a cache of 2056 keys")


@pytest.mark.foreign
def test_thousands_of_keys_of_hugging_face(roomy: Path) -> None:
    assert states(hunt(of_hugging_face(roomy, "bfloat16"), ("keys",))) == {"keys": "agree"}


def test_keys_that_are_dropped_after_a_thousand(roomy: Path) -> None:
    edits = [{"target": "step", "stage": stage, "layer": 1, "field": "window", "value": 1024} for stage in ("attn_softmax", "attention")]
    report = hunt(OwnSide(roomy, edits=edits), ("long", "decode", "keys"))
    assert states(report) == {"long": "agree", "decode": "agree", "keys": "divergence"}
    assert report.first is not None
    assert report.first.key == ("attn_softmax", 1)


def test_a_slot_among_thousands(roomy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(value: np.ndarray, edit: Any, size: Any, table: np.ndarray) -> np.ndarray:
        out = value.copy()
        out[1500:1501] = out[1499:1500]
        return out

    monkeypatch.setitem(VALUES, "test", change)  # type: ignore[arg-type]
    side = OwnSide(roomy, edits=[{"target": "value", "stage": "v_cache", "layer": 0, "transform": "test", "when": "decode"}])
    report = hunt(side, ("long", "decode", "keys"))
    assert {name for name, state in states(report).items() if state == "divergence"} == {"keys"}
    assert report.first is not None
    assert report.first.key == ("v_cache", 0)
    # 1500 mod 9 is 6, and the prompt of nine tokens is repeated
    assert f"slot 1500 (token {IDS[6]}) holds what belongs to slot 1499 (token {IDS[5]})" in report.sentence


def test_accumulators_that_are_too_short_for_thousands(roomy: Path) -> None:
    """Probabilities times values added in float16, in order: the sum of small terms comes to a halt."""

    class Short(Wrapped):
        def capture_end(self, ids: Sequence[int], count: int) -> Captures:
            made = self.inner.capture_end(ids, count)
            p, v = (np.asarray(made[stage, 1], np.float16) for stage in ("attn_softmax", "v_cache"))
            heads = v.reshape(len(v), 2, -1).repeat(2, axis=1)
            total = np.zeros((count, *heads.shape[1:]), np.float16)
            for key in range(len(v)):
                total += p[:, :, key].T[..., None] * heads[key]
            arrays = {key: made[key] for key in made} | {("attention", 1): total.reshape(count, -1).astype(np.float32)}
            return Captures(arrays, made.manifest, past=made.past)

    report = hunt(Short(OwnSide(roomy)), ("long", "keys"))
    assert states(report) == {"long": "agree", "keys": "divergence"}
    assert report.first is not None
    assert report.first.key == ("attention", 1)
