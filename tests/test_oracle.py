"""The command oracle: what it writes, what it says, exit codes; and the stages that the package carries, recorded again.

Float16 and float32 stages from another CPU differ in their last bits, so the carried ones are held against fresh ones within the noise of
their format: a few units of 2^-11 and 2^-24 that grow along four layers (canary README: float16 against float32 is 6e-4 at the logits).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

pytest.importorskip("torch")
pytest.importorskip("transformers")

import aprender
from aprender import captures, oracle, stages

pytestmark = pytest.mark.foreign

CANARY = Path(aprender.canary(""))
Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_hf(tiny.Shape("llama"), tmp_path_factory.mktemp("oracle") / "tiny")


def run(capsys: Capsys, *argv: object) -> tuple[int, str, str]:
    code = oracle.main([str(word) for word in argv])
    out = capsys.readouterr()
    return code, out.out, out.err


# ---- what is written ---------------------------------------------------------------------------


def test_the_default_is_float16_and_the_canary_prompt(tmp_path: Path, capsys: Capsys) -> None:
    code, out, err = run(capsys, CANARY, "-o", tmp_path / "o")
    assert (code, err) == (0, "")
    said = captures.open_captures(tmp_path / "o").manifest
    assert (said.side, said.profile, said.prompt, said.answer) == ("hf:canary@float16", "hf-f16", "What is 2+2?", " 2+2 is 4.")
    assert len(said.tensors) == 80  # 19 stages in each of 4 layers, embedding, rope_table, final_norm, lm_head
    assert said.floor is not None
    assert 1e-5 < said.floor < 2e-3  # canary README: 6e-4 over 4078 positions
    for part in ("' 2+2 is 4.'", "80 tensors of 7 tokens", "relative L2", "bit-equal", "not finite  none"):
        assert part in out


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_dtype(model: Path, tmp_path: Path, capsys: Capsys, dtype: str) -> None:
    code, out, _ = run(capsys, model, "-o", tmp_path / "o", "--dtype", dtype, "--prompt-ids", "5,9,2", "--answer", 3)
    cap = captures.open_captures(tmp_path / "o")
    assert code == 0
    assert list(cap) == stages.keys(tiny.Shape("llama").flags, 2)
    assert {note.dtype for note in cap.manifest.tensors.values()} == {dtype}
    assert (cap.tokens, cap.manifest.prompt, cap.manifest.answer, len(cap.manifest.answer_ids)) == ((5, 9, 2), None, None, 3)
    assert (cap.manifest.floor is None) == (dtype == "float32")
    assert ("the measure" in out) == (dtype == "float32")


def test_selections_are_combined(model: Path, tmp_path: Path, capsys: Capsys) -> None:
    options = ("--prompt-ids", "5,9", "--layers", "1..2", "--stages", "attn_*,lm_head", "--no-floor", "-q", "--answer", "0")
    code, out, err = run(capsys, model, "-o", tmp_path / "o", *options)
    cap = captures.open_captures(tmp_path / "o")
    assert (code, out, err) == (0, "", "")
    assert [stages.spell(key) for key in cap] == ["1.attn_norm", "1.attn_scores", "1.attn_softmax", "1.attn_out", "lm_head"]
    assert sorted(os.listdir(tmp_path / "o")) == ["layer-001.safetensors", "manifest.json", "model.safetensors"]
    assert cap.manifest.floor is None


def test_values_that_are_not_finite_are_said(model: Path, tmp_path: Path, capsys: Capsys) -> None:
    """Float16 ends at 65504: a norm weight of 60000 overflows where the activation is beyond 1.09."""
    made = tiny.weights(tiny.Shape("llama"))
    made["model.layers.1.input_layernorm.weight"] = np.full(64, 59904, np.float32)  # exact in bf16 and f16
    folder = tiny.save_hf(tiny.Shape("llama"), tmp_path / "m", made=made)
    code, out, _ = run(capsys, folder, "-o", tmp_path / "o", "--prompt-ids", "5,9,2")
    cap = captures.open_captures(tmp_path / "o")
    assert code == 0
    assert cap.manifest.tensors["attn_norm", 1].nonfinite > 0
    assert cap.manifest.tensors["attn_norm", 0].nonfinite == 0
    assert "1.attn_norm" in out
    assert cap.manifest.answer_ids == ()
    assert "not finite" in cap.manifest.notes[0]


def test_logits_that_hooks_change_are_exit_one(model: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionMaskInterface

    from aprender.sides import hf_record

    monkeypatch.delitem(AttentionMaskInterface._global_mapping, hf_record.ATTENTION)
    code, out, _ = run(capsys, model, "-o", tmp_path / "o", "--prompt-ids", "5,9,2")
    assert code == 1
    assert "DIFFER" in out


# ---- the stages that the package carries -------------------------------------------------------


@pytest.mark.parametrize(("dtype", "noise"), [("float16", 2.0**-7), ("float32", 2.0**-18)])
def test_the_carried_stages_are_those_of_hugging_face(dtype: str, noise: float) -> None:
    kept = captures.open_captures(CANARY / f"stages-{dtype}")
    fresh = oracle.record(str(CANARY), dtype, prompt="What is 2+2?", answer=16)
    assert captures.check_contract(kept, fresh) == []
    assert list(kept) == list(fresh)
    for key in fresh:
        apart = np.linalg.norm(kept[key].astype(np.float64) - fresh[key]) / np.linalg.norm(fresh[key].astype(np.float64))
        assert apart <= noise, stages.spell(key)
    a, b = kept.manifest, fresh.manifest
    for name in ("side", "answer", "answer_ids", "model_digest", "tokenizer_digest", "attestation", "hparams", "flags", "arch", "profile"):
        assert getattr(a, name) == getattr(b, name), name
    assert (a.answer, a.attestation) == (" 2+2 is 4.", True)


@pytest.mark.parametrize(("dtype", "most"), [("float16", 400_000), ("float32", 750_000)])
def test_the_carried_stages_are_small_and_name_no_path(dtype: str, most: int) -> None:
    folder = CANARY / f"stages-{dtype}"
    assert sum(path.stat().st_size for path in folder.iterdir()) < most
    text = (folder / "manifest.json").read_text()
    assert not any(word in text for word in ("/work", "/home", "/tmp", "/root", str(Path.home())))


def test_the_script_records_the_same_bits_on_this_machine(tmp_path: Path) -> None:
    """Two runs in two processes: nothing random, no clock, no path in what is written."""
    script = Path(__file__).resolve().parent.parent / "scripts" / "record_canary_stages.py"
    for name in ("a", "b"):
        subprocess.run([sys.executable, script, "--out", tmp_path / name], check=True, capture_output=True)
    for path in sorted((tmp_path / "a").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes(), path.name


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "code", "word"),
    [
        ([], 2, "required"), (["MODEL"], 2, "-o"), (["MODEL", "-o", "OUT", "--dtype", "int4"], 2, "int4"),
        (["MODEL", "-o", "OUT", "--prompt", "x", "--prompt-ids", "1"], 2, "exclude"),
        (["MODEL", "-o", "OUT", "--prompt-ids", "1,x"], 2, "1,x"),
        (["MODEL", "-o", "OUT", "--stages", "ffn_ot"], 2, "did you mean 'ffn_out'"),
        (["MODEL", "-o", "OUT", "--layers", "2..1"], 2, "2..1"), (["MODEL", "-o", "OUT", "--answer", "-1"], 2, "-1"),
        (["/no/where", "-o", "OUT"], 3, "no such folder"), (["MODEL", "-o", "OUT", "--prompt-ids", "5,112"], 3, "112"),
        (["MODEL", "-o", "OUT"], 3, "--prompt-ids"), (["MODEL", "-o", "OUT", "--prompt-ids", "1", "--layers", "1..3"], 3, "2 layers"),
        (["CANARY", "-o", "OUT", "--prompt", ""], 3, "empty"),
        (["MODEL", "-o", "OUT", "--prompt-ids", "1", "--stages", "qkv_bias"], 3, "keeps no stage"),
        (["MODEL", "-o", "TESTS"], 3, "not a capture"), (["MODEL", "-o", "FILE"], 3, "not a folder"),
        (["EMPTY", "-o", "OUT"], 3, "config.json"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(model: Path, tmp_path: Path, capsys: Capsys, argv: list[str], code: int, word: str) -> None:
    (tmp_path / "empty").mkdir()
    words = {"MODEL": model, "OUT": tmp_path / "o", "CANARY": CANARY}
    words |= {"TESTS": Path(__file__).parent, "FILE": Path(__file__), "EMPTY": tmp_path / "empty"}
    found, out, err = run(capsys, *[words.get(part, part) for part in argv])
    assert (found, out) == (code, "")
    assert err.count("\n") == 1
    assert word in err
    assert not (tmp_path / "o").exists()


def test_a_truncated_checkpoint_is_one_line(model: Path, tmp_path: Path, capsys: Capsys) -> None:
    shutil.copytree(model, tmp_path / "m")
    data = (model / "model.safetensors").read_bytes()
    (tmp_path / "m" / "model.safetensors").write_bytes(data[: len(data) // 2])
    code, out, err = run(capsys, tmp_path / "m", "-o", tmp_path / "o", "--prompt-ids", "1")
    assert (code, out) == (3, "")
    assert err.count("\n") == 1
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config)[:-5])
    assert run(capsys, tmp_path / "m", "-o", tmp_path / "o", "--prompt-ids", "1")[0] == 3
