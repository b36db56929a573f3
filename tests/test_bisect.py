"""The hunt end to end: the default run, planted faults, every kind of reference, token ids, prompts, steps, JSON, exit codes.

Truth: what was planted is known, so the first wrong operation is known.  Clean runs are the must-not case of every detector.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import tiny
from conftest import CANARY, PROMPT, write_folder

import aprender
from aprender import bisect, bisection
from aprender.asking import Ask
from aprender.captures import Captures, save
from aprender.errors import CannotRun, NotComparable
from aprender.judgement import Hunt
from aprender.sides.own import OwnSide

NUMBER = {"type": ["number", "null"]}
FAULT = {
    "type": "object",
    "required": ["side", "layer", "stage", "kind", "confidence"],
    "properties": {
        "side": {"enum": ["subject", "reference"]},
        "layer": {"type": ["integer", "null"]},
        "stage": {"type": "string"},
        "kind": {"type": "string"},
        "confidence": {"type": "number", "minimum": 0, "maximum": 1},
    },
}
SIDE = {"type": "object", "required": ["spelling", "profile", "backend", "digest"]}
STAGE_KEYS = ["layer", "stage", "n", "cos_distance", "rel_l2", "norm_ratio", "quantization", "i_max", "z_rms", "z_max", "loss", "state"]
SCHEMA = {  # the keys that scripts rely on
    "type": "object",
    "required": [
        *("schema", "verdict", "finding", "first", "wrong", "compared", "unmeasured", "probes", "tokens", "subject", "reference", "stages"),
    ],
    "properties": {
        "schema": {"const": "aprender.bisect/1"},
        "verdict": {"enum": ["agree", "divergence", "not_comparable"]},
        "finding": {"enum": [None, "loaded", "files_differ", "operation", "tokens", "overflow", "unexplained"]},
        "first": {"anyOf": [{"type": "null"}, FAULT]},
        "wrong": {"type": "array", "items": FAULT},
        "compared": {"type": "integer", "minimum": 0},
        "unmeasured": {"type": "array", "items": {"type": "object", "required": ["layer", "stage", "reason"]}},
        "probes": {"type": "array", "items": {"type": "string"}},
        "tokens": {"type": "array", "items": {"type": "integer"}},
        "subject": SIDE,
        "reference": SIDE,
        "stages": {
            "type": "array",
            "items": {
                "type": "object",
                "required": STAGE_KEYS,
                "properties": {
                    "state": {"enum": ["exact", "noise", "wrong", "inherited", "heals", "unmeasured", "not_comparable"]},
                    **dict.fromkeys(("cos_distance", "rel_l2", "norm_ratio", "quantization", "i_max", "z_rms", "z_max", "loss"), NUMBER),
                },
            },
        },
    },
}


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = bisect.main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


# ---- the two runs that the README shows ----------------------------------------------------------------------------------------------


def test_default_run_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--json")
    data = json.loads(out)
    jsonschema.validate(data, SCHEMA)
    assert code == 0
    assert (data["verdict"], data["finding"], data["first"], data["wrong"]) == ("agree", None, None, [])
    assert data["reference"]["profile"] == "hf-f16"
    assert tuple(data["tokens"]) == PROMPT
    assert data["compared"] == len(data["stages"]) == 80  # 2 once + 4 layers of 19 + 2 at the end
    assert data["answers"]["answer"] == "' 2+2 is 4.'"
    assert not data["unmeasured"]
    assert {row["state"] for row in data["stages"]} <= {"exact", "noise"}


def test_default_run_explains_the_difference_by_quantisation(capsys: pytest.CaptureFixture[str]) -> None:
    """The free difference of a 4-bit model is what float64 on both sets of weights predicts, to the FP16 noise of the reference."""
    rows = json.loads(run(capsys, "--json")[1])["stages"]
    seen = [row for row in rows if row["quantization"] and row["quantization"] > 1e-2]
    assert len(seen) > 60
    # The reference's own FP16 noise is 2e-3 at worst (attn_softmax of layer 1), a tenth of the 2e-2 that quantisation makes at least.
    assert all(abs(row["rel_l2"] - row["quantization"]) < 4e-3 for row in seen)


def test_default_run_imports_no_torch() -> None:
    code = "import sys; from aprender.bisect import main; code = main(['-q']); sys.exit(9 if 'torch' in sys.modules else code)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_transposed_head_is_named_with_both_answers(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--plant", "transposed@lm_head")
    assert code == 1
    assert out.startswith("lm_head of the subject")
    assert "first wrong operation" in out
    assert "' 2+2 is 4.'" in out
    shown = [line for line in out.splitlines() if line.startswith("answer with transposed@lm_head")]
    assert len(shown) == 1
    assert "2+2 is 4" not in shown[0]


# ---- the fault matrix ----------------------------------------------------------------------------------------------------------------


SIX = ("transposed", "eps", "rope-pairs", "no-bias", "gqa-tile", "no-residual")  # the others: test_catalogue.py


def _sites() -> list[tuple[str, str]]:
    from aprender.judge import faults

    data = OwnSide(CANARY / "canary.gguf").model_data()
    rows = [faults.FAULTS[name] for name in SIX]
    return [(row.name, site) for row in rows for site in map(_spelled, row.sites(data["flags"], data["hparams"]))]


def _spelled(key: tuple[str, int | None]) -> str:
    return key[0] if key[1] is None else f"{key[1]}.{key[0]}"


@pytest.mark.parametrize("container", ["canary.gguf", ""], ids=["gguf", "safetensors"])
def test_every_fault_at_every_site_is_named_there(container: str) -> None:
    """Each of the six faults at each of its sites in each layer: the first and only wrong stage is the site, or no bit of it changed."""
    subject = str(CANARY / container)
    clean = aprender.side(subject).capture(PROMPT)
    invisible = []
    for fault, site in _sites():
        opened = bisection.open_hunt(subject, "witness", f"{fault}@{site}")
        report = bisection.hunt(opened, Ask(ids=PROMPT), answer=0)
        stage, layer = (site, None) if "." not in site else (site.split(".")[1], int(site.split(".")[0]))
        assert report.subject is not None
        if np.array_equal(report.subject[stage, layer], clean[stage, layer]):
            invisible.append(f"{fault}@{site}")
            assert report.verdict == "agree"
            continue
        named = [(fault.stage, fault.layer) for fault in report.judged.wrong]
        assert report.exit_code == 1, f"{fault}@{site}"
        assert named == [(stage, layer)], f"{fault}@{site} named {named}"
    # A bigger epsilon moves no float32 bit only where mean(x^2) > eps / 2^-24 / 2 = 75; the canary's later layers stay below that.
    print("planted without changing a bit:", invisible)
    assert len(invisible) <= 4


@pytest.mark.parametrize("shape", tiny.SHAPES, ids=str)
def test_faults_of_every_architecture(shape: tiny.Shape, tmp_path: Path) -> None:
    from aprender.judge import faults

    folder = write_folder(tmp_path / "model", shape)
    ids = tuple(np.random.default_rng(5).integers(0, shape.vocab, 9).tolist())
    data = OwnSide(folder).model_data()
    for row in (faults.FAULTS[name] for name in SIX):
        sites = row.sites(data["flags"], data["hparams"])
        assert sites or row.name == "no-bias"  # without biases there is none to drop
        for key in sites[-2:]:
            report = aprender.compare(str(folder), "witness", prompt_ids=ids, plant=f"{row.name}@{_spelled(key)}", answer=0)
            assert [(fault.stage, fault.layer) for fault in report.judged.wrong] == [key]


# ---- clean runs ----------------------------------------------------------------------------------------------------------------------

QUESTIONS = (
    *("2", "2+2=", "What is 7+8?", "What is 13-5?", "7 plus 8", "The capital of France is", "What color is the sky?", "Who are you?"),
    *(
        "What is the opposite of hot?",
        "Count from 3 to 7.",
        "Repeat: cat red box.",
        "Spell cat.",
        "Once there was a small dog.",
        " ",
        "\n\n",
    ),
    *("0123456789 " * 4, "Ann has a cup and Tom has a key. What does Tom have?", "é ü ñ 漢字 🙂", "def f(x):\n    return x + 1\n"),
    "What day comes after Monday? What month comes before May? What is larger, 4 or 9? " * 2,
)


def test_twenty_clean_prompts_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No false alarm on trained weights: 20 texts of 1 to 80 tokens, subject and witness."""
    assert len(QUESTIONS) == 20
    opened = bisection.open_hunt()
    lengths = set()
    for text in QUESTIONS:
        report = bisection.hunt(opened, Ask(prompt=text), answer=0)
        lengths.add(len(report.judged.tokens))
        assert report.exit_code == 0, f"{text!r}: {report.sentence}"
    assert min(lengths) == 1
    assert max(lengths) > 40


def test_prompts_file_judges_each_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "questions.txt"
    path.write_text("What is 2+2?\n\nWhat is 7+8?\n")
    code, out, _ = run(capsys, "--prompts", str(path), "-q")
    assert (code, len(out.splitlines())) == (0, 2)
    code, out, _ = run(capsys, "--prompts", str(path), "--json", "--plant", "transposed@2.ffn_up")
    data = json.loads(out)
    assert code == 1
    assert [row["verdict"] for row in data["prompts"]] == ["divergence"] * 2
    assert data["first"] == {"side": "subject", "layer": 2, "stage": "ffn_up"} | {k: data["first"][k] for k in ("kind", "confidence")}


# ---- references ----------------------------------------------------------------------------------------------------------------------


def test_against_the_witness_needs_no_recording(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--prompt", "What is 7+8?", "--json")
    data = json.loads(out)
    assert (code, data["reference"]["spelling"]) == (0, "witness")
    assert any("float64 definitions" in note for note in data["notes"])
    code, out, _ = run(capsys, str(CANARY / "canary.gguf"), "--against", f"witness:{CANARY}", "--json")
    data = json.loads(out)
    assert code == 0
    last = data["stages"][-1]
    assert last["rel_l2"] == pytest.approx(last["quantization"], abs=1e-5)  # both are float64 but for our float32 engine


def test_a_wrong_reference_is_named_as_such(tmp_path: Path) -> None:
    """A recording with one bad stage: the subject is right, the reference is accused."""
    good = aprender.open_captures(CANARY / "stages-float16")
    arrays = {key: np.array(good[key]) for key in good}
    arrays["ffn_up", 1][3] = arrays["ffn_up", 1][2]  # a stale row
    folder = tmp_path / "stages"
    save(Captures(arrays, good.manifest), folder)
    report = aprender.compare(str(CANARY / "canary.gguf"), f"saved:{folder}", answer=0)
    assert report.verdict == "divergence"
    assert report.first is not None
    assert (report.first.side, report.first.stage, report.first.layer) == ("reference", "ffn_up", 1)


def test_two_own_containers_agree() -> None:
    report = aprender.compare(str(CANARY), str(CANARY / "canary.gguf"), answer=0)
    assert report.verdict == "agree"
    rows = {(row["stage"], row["layer"]): row for row in report.to_json()["stages"]}
    assert rows["embedding", None]["rel_l2"] > 1e-2  # 4-bit table
    assert rows["rope_table", None]["rel_l2"] == 0


# ---- ids -----------------------------------------------------------------------------------------------------------------------------


class Respelled:
    """A side whose tokenizer cuts differently: one more token in front, as a doubled BOS."""

    def __init__(self) -> None:
        self.side = OwnSide(CANARY, spelling="respelled")

    def __getattr__(self, name: str) -> object:
        return getattr(self.side, name)

    def tokenizer(self) -> object:
        inner = self.side.tokenizer()

        class Doubled:
            eos_ids = inner.eos_ids
            decode, id_to_piece = inner.decode, inner.id_to_piece

            @staticmethod
            def encode(text: str) -> list[int]:
                return [637, *inner.encode(text)]

        return Doubled()


def test_different_tokens_for_one_text_are_a_finding() -> None:
    opened = Hunt(OwnSide(CANARY / "canary.gguf"), Respelled())
    report = bisection.hunt(opened, Ask(prompt="What is 2+2?"))
    assert (report.exit_code, report.judged.finding) == (1, "tokens")
    assert "position 0" in report.sentence
    assert "261" in report.sentence
    assert "637" in report.sentence
    jsonschema.validate(report.to_json(), SCHEMA)
    forced = bisection.hunt(opened, Ask(prompt="What is 2+2?", same_ids=True), answer=0)
    assert (forced.exit_code, forced.judged.tokens) == (0, (637, *PROMPT))


def test_other_ids_than_recorded_are_not_comparable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NotComparable, match="place 1"):
        aprender.compare(str(CANARY / "canary.gguf"), f"saved:{CANARY / 'stages-float16'}", prompt_ids=(261, 220))
    code, out, err = run(capsys, "--against", f"saved:{CANARY / 'stages-float16'}", "--prompt-ids", "261,220")
    assert (code, out, len(err.splitlines())) == (3, "", 1)


# ---- steps ---------------------------------------------------------------------------------------------------------------------------


def test_steps_judge_the_first_choice_that_differs() -> None:
    report = aprender.compare(str(CANARY / "canary.gguf"), str(CANARY), prompt="What is 2+2?", steps=6, answer=0)
    assert report.exit_code == 0
    assert len(report.judged.tokens) == 7 + 5  # all six choices are equal: the last step is judged on all tokens before it
    report = aprender.compare(
        str(CANARY / "canary.gguf"), str(CANARY), prompt="What is 2+2?", steps=6, plant="transposed@3.ffn_out", answer=0
    )
    assert report.exit_code == 1
    assert any("first choice that differs" in note for note in report.notes)
    assert report.first is not None
    assert (report.first.stage, report.first.layer) == ("ffn_out", 3)


def test_a_recording_cannot_generate() -> None:
    with pytest.raises(CannotRun, match="recorded"):
        aprender.compare(str(CANARY / "canary.gguf"), f"saved:{CANARY / 'stages-float16'}", steps=2)


# ---- forms and bad input -------------------------------------------------------------------------------------------------------------


def test_jsonl_has_a_line_per_stage(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--jsonl")
    rows = [json.loads(line) for line in out.splitlines()]
    assert (code, len(rows)) == (0, 80)
    assert all(set(STAGE_KEYS) <= set(row) for row in rows)


def test_quiet_is_one_line_and_verbose_shows_every_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(run(capsys, "-q")[1].splitlines()) == 1
    assert "⋮" in run(capsys)[1]
    shown = run(capsys, "-v")[1]
    assert "⋮" not in shown
    assert shown.count("ffn_swigl") == 4


def test_list_faults(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--list-faults")
    assert code == 0
    for name in ("transposed", "eps", "rope-pairs", "no-bias", "gqa-tile", "no-residual"):
        assert name in out


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["missing.gguf"], 3, "missing.gguf"),
        (["--plant", "transposd@lm_head"], 2, "did you mean 'transposed'"),
        (["--plant", "transposed@lm_hed"], 2, "did you mean 'lm_head'"),
        (["--plant", "no-bias@ffn_up"], 3, "no site"),
        (["--prompt-ids", "1,99999"], 3, "99999"),
        (["--prompt", ""], 3, "empty"),
        (["--prompt-ids", "1,x"], 2, "1,x"),
        (["--prompt", "a", "--prompt-ids", "1"], 2, "exclude"),
        (["--nonsense"], 2, "--nonsense"),
        (["--steps", "-1"], 2, "--steps"),
        (["--arithmetic", "exactly"], 2, "did you mean 'exact'"),
        (["cuda:x.gguf"], 3, "cuda"),
        (["nope:x"], 2, "nope"),
        (["--prompts", "missing.txt"], 3, "missing.txt"),
        (["witness"], 3, "witness:MODEL"),
    ],
)
def test_bad_input_is_one_line_and_the_right_code(capsys: pytest.CaptureFixture[str], words: list[str], code: int, text: str) -> None:
    got, out, err = run(capsys, *words)
    assert (got, out) == (code, "")
    assert len(err.splitlines()) == 1, err
    assert text in err
    mapped = {3: 125, 2: 128}[code]
    assert run(capsys, *words, "--git-bisect")[0] == mapped


def test_a_profile_that_does_not_fit_is_not_silently_accepted() -> None:
    """Must catch: FP16 stages judged as if they were float32 are far outside float32 noise."""
    opened = bisection.open_hunt(f"saved:{CANARY / 'stages-float16'}", f"witness:{CANARY}", profiles={"subject": "hf-f32"})
    assert bisection.hunt(opened, Ask(), answer=0).exit_code == 1
    opened = bisection.open_hunt(f"saved:{CANARY / 'stages-float16'}", f"witness:{CANARY}")
    assert bisection.hunt(opened, Ask(), answer=0).exit_code == 0
