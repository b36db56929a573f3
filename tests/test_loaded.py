"""What a side loaded against its file, and file against file: each finding with a case that must be caught and one that must not.

Truth: what was altered is known, in memory after the load, in config.json, or in the manifest of a recording.  The files are written by
transformers and by the ``gguf`` package.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import llamacpp
import numpy as np
import pytest
import tiny
from conftest import CANARY, write_folder

import aprender
from aprender import arithmetic, bisection, stages
from aprender.asking import Ask
from aprender.captures import Captures, save
from aprender.errors import ArgumentError
from aprender.judge import loaded
from aprender.judgement import Hunt
from aprender.sides.own import OwnSide

SHAPE = tiny.Shape("qwen2")
IDS = (3, 14, 15, 92, 65, 35, 8)


def hunted(subject: object, reference: object = None) -> bisection.Report:
    return bisection.hunt(Hunt(subject, reference), Ask(ids=IDS), answer=0)


# ---- weights as values ---------------------------------------------------------------------------------------------------------------

KEY = ("ffn_up", 1)
VALUES = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)


def test_the_same_weights_are_no_difference() -> None:
    assert loaded.weights({KEY: VALUES}, {KEY: VALUES.copy()}, arithmetic.F32) == []
    holed = np.where(np.arange(4) == 2, np.float32(np.nan), VALUES)
    assert loaded.weights({KEY: holed}, {KEY: holed.copy()}, arithmetic.F32) == []


def test_a_cast_is_the_files_value_in_the_sides_format() -> None:
    half = VALUES.astype(np.float16).astype(np.float32)
    assert loaded.weights({KEY: half}, {KEY: VALUES}, arithmetic.F16) == []
    (found,) = loaded.weights({KEY: half}, {KEY: VALUES}, arithmetic.F32)
    assert "of its 24 elements differ" in found.more
    cut = (VALUES.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)  # bfloat16 by cutting, not by rounding
    assert loaded.weights({KEY: cut}, {KEY: VALUES}, arithmetic.BF16)


def test_the_first_element_is_named_with_both_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "PIECE", 5)  # several pieces
    other = VALUES.copy()
    other[3, 2], other[5, 0] = 0.5, 0.25
    (found,) = loaded.weights({KEY: other}, {KEY: VALUES}, arithmetic.F32)
    assert found.what == f"the weight {stages.spell(KEY)} at [3, 2]"
    assert (found.here, found.there) == ("0.5", f"{float(VALUES[3, 2]):.9g}")
    assert found.more == "2 of its 24 elements differ"


def test_names_and_shapes() -> None:
    (found,) = loaded.weights({}, {KEY: VALUES}, arithmetic.F32)
    assert (found.here, found.there) == ("missing", "there")
    (found,) = loaded.weights({KEY: VALUES.T}, {KEY: VALUES}, arithmetic.F32)
    assert (found.here, found.there) == ("[4, 6]", "[6, 4]")


def test_numbers_are_compared_as_both_containers_keep_them() -> None:
    assert loaded.hyper_parameters({"eps": 1e-6, "theta": 1e6}, {"eps": float(np.float32(1e-6)), "theta": 1e6}) == []
    (found,) = loaded.hyper_parameters({"eps": 1e-6, "heads": 4}, {"eps": 1e-5, "heads": 4})
    assert (found.what, found.here, found.there) == ("eps", "1e-06", "1e-05")


# ---- a model in memory against its file ------------------------------------------------------------------------------------------------


@pytest.mark.foreign
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_parameter_altered_in_memory_is_found(dtype: str, tmp_path: Path) -> None:
    """Every stage is right on what the model holds, and the model does not hold what its file says."""
    pytest.importorskip("transformers")
    from aprender.sides import open_hf

    folder = tiny.save_hf(SHAPE, tmp_path / "model", dtype="float32", made=_unrounded())
    side = open_hf(str(folder), dtype)
    clean = hunted(side)
    assert (clean.exit_code, clean.judged.finding) == (0, None)
    held = side.model.get_parameter("model.layers.1.self_attn.k_proj.weight").data  # type: ignore[attr-defined]
    held[3, 5] += 0.5
    report = hunted(side)
    assert (report.exit_code, report.verdict, report.judged.finding) == (1, "divergence", "loaded")
    assert not report.judged.wrong  # no operation is accused
    assert "at [3, 5]" in report.sentence
    assert f"{float(held[3, 5]):.9g} as loaded" in report.sentence
    assert report.judged.rows
    assert "Agree: all" in report.sentence


def _unrounded() -> dict[str, np.ndarray]:
    """Weights that a cast does change."""
    made = tiny.weights(SHAPE)
    return {name: (array * np.float32(1.001)).astype(np.float32) for name, array in made.items()}


@pytest.mark.foreign
def test_a_configuration_that_changed_after_the_load_is_found(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from aprender.sides import open_hf

    folder = tiny.save_hf(SHAPE, tmp_path / "model")
    side = open_hf(str(folder), "float32")
    write_folder(tmp_path / "other", SHAPE, rms_norm_eps=1e-3)
    (folder / "config.json").write_text((tmp_path / "other" / "config.json").read_text())
    report = hunted(side)
    assert (report.exit_code, report.judged.finding) == (1, "loaded")
    assert "eps is" in report.sentence
    assert "0.001 in the file" in report.sentence


# ---- what a running engine holds -------------------------------------------------------------------------------------------------------

HPARAMS = {"layers": 2, "heads": 4, "kv_heads": 2, "head": 64, "eps": 1e-6, "theta": 1e6}


def test_parameters_as_they_are_due() -> None:
    """As the definitions of Hugging Face and llama.cpp compute them, in float32 at every step."""
    exponent = np.arange(0, 64, 2, dtype=np.float32) / np.float32(64)
    frequencies = (np.float32(1) / np.power(np.float32(1e6), exponent)).tolist()
    held = {
        "eps": {"norm": float(np.float32(1e-6))}, "attention_scale": {"a": 0.125, "b": float(np.float32(1) / np.sqrt(np.float32(64)))},
        "groups": {"a": 2}, "frequencies": {"rotary": frequencies}, "rope_scale": {"Qcur": 1.0}, "window": {"f": 0}, "heads": {"f": 4},
    }  # fmt: skip
    assert loaded.parameters(held, HPARAMS) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("eps", 2e-6), ("attention_scale", 0.1250001), ("groups", 1), ("rope_scale", 0.5), ("window", 4096), ("heads", 8), ("alibi", 0.1)],
)
def test_a_parameter_that_is_not_the_files(name: str, value: float) -> None:
    (found,) = loaded.parameters({name: {"here": value}}, HPARAMS)
    assert found.what == f"{name} of here"
    assert found.here == f"{value:.7g}"


@pytest.mark.parametrize("cast", [np.float16, "bfloat16", "theta"])
def test_frequencies_that_are_not_the_files(cast: object) -> None:
    """noise.md's real fault: `.half()` casts the buffer, which is 3.7e-3 (bfloat16) or 5.4e-3 (float16) off; and a base 1e-4 off."""
    right = 1e6 ** (-np.arange(0, 64, 2) / 64)
    if cast == "theta":
        values = (1e6 * 1.0001) ** (-np.arange(0, 64, 2) / 64)
    elif cast == "bfloat16":
        values = (right.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
    else:
        values = right.astype(np.float16).astype(np.float64)
    (found,) = loaded.parameters({"frequencies": {"rotary": values.tolist()}}, HPARAMS)
    assert "of rotary" in found.what
    assert "of 32 frequencies differ" in found.more
    (found,) = loaded.parameters({"frequencies": {"rotary": right[:16].tolist()}}, HPARAMS)
    assert (found.here, found.there) == ("16", "32")


@pytest.mark.parametrize(
    "held", [5, {"eps": 1e-6}, {"eps": {"norm": "small"}}, {"frequencies": {"rotary": ["x"]}}, {"eps": {"norm": None}}]
)
def test_a_manifest_that_says_something_else_there_is_refused(held: object) -> None:
    with pytest.raises(ArgumentError, match="what an engine holds is name"):
        loaded.parameters(held, HPARAMS)  # type: ignore[arg-type]


@pytest.mark.foreign
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_that_was_cast_after_loading(dtype: str, tmp_path: Path) -> None:
    """`.half()` and `.to(bfloat16)` round the rotary frequencies too; loading with the dtype does not."""
    torch = pytest.importorskip("torch")
    from aprender.sides import open_hf

    folder = tiny.save_hf(SHAPE, tmp_path / "model", dtype="float32", made=_unrounded())
    assert hunted(open_hf(str(folder), dtype)).judged.finding is None
    side = open_hf(str(folder), dtype)
    side.model.to(getattr(torch, dtype))  # type: ignore[attr-defined]  # its parameters have it already
    report = hunted(side)
    assert (report.exit_code, report.judged.finding) == (1, "loaded")
    assert "the RoPE frequency" in report.sentence
    assert "of model.rotary_emb" in report.sentence


@pytest.mark.foreign
@pytest.mark.parametrize(
    ("module", "attribute", "value", "said"),
    [
        ("model.layers.1.input_layernorm", "variance_epsilon", 1e-3, "eps of model.layers.1.input_layernorm is 0.001 as loaded and 1e-06"),
        ("model.layers.0.self_attn", "scaling", 0.25, "attention_scale of model.layers.0.self_attn is 0.25 as loaded and 0.2041241"),
        ("model.rotary_emb", "attention_scaling", 1.1, "rope_attention_scale of model.rotary_emb is 1.1 as loaded and 1 in the file"),
    ],
)
def test_an_attribute_of_a_module_is_found(module: str, attribute: str, value: float, said: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from aprender.sides import open_hf

    side = open_hf(str(tiny.save_hf(SHAPE, tmp_path / "model")), "float32")
    setattr(side.model.get_submodule(module), attribute, value)  # type: ignore[attr-defined]
    report = hunted(side)
    assert report.judged.finding == "loaded"
    assert said in report.sentence


PEER = dataclasses.replace(SHAPE, head=16)
"""llama.cpp wants heads x head size to be the width of a qwen2 model."""


@pytest.mark.foreign
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rope.freq_base", 1234.0, "theta of Qcur-0 is 1234 as loaded and 1000000 in the file"),
        ("attention.layer_norm_rms_epsilon", 1e-3, "eps of norm-0 is 0.001 as loaded and 1e-06 in the file"),
        ("rope.scaling.factor", 2.0, "rope_scale of Qcur-0 is 0.5 as loaded and 1 in the file"),
        ("context_length", 512, "context of llama_model_n_ctx_train is 512 as loaded and 256 in the file"),
        (None, None, None),
    ],
)
def test_what_llama_cpp_was_told_to_believe(
    key: str | None, value: float | None, said: str | None, tmp_path: Path, peer: llamacpp.Peer
) -> None:
    """llama.cpp's own --override-kv is a loader fault to order: the engine holds another value than its file."""
    from aprender.sides.llamacpp import LlamaCppSide

    path = tiny.save_gguf(PEER, tmp_path / "model.gguf")
    more: dict[str, bool | int | float | str] = {"qwen2.rope.scaling.type": "linear"} if key == "rope.scaling.factor" else {}
    side = LlamaCppSide(path, overrides={f"qwen2.{key}": value} | more if key and value else None)
    report = hunted(side)
    assert report.judged.finding == ("loaded" if said else None)
    assert report.exit_code == (1 if said else 0)
    if said:
        assert said in report.sentence
        changes_numbers = key != "context_length"
        assert bool(report.judged.wrong) == changes_numbers  # the stages show it too, where any number depends on it


@pytest.mark.foreign
def test_a_gguf_that_was_edited_after_it_was_read(tmp_path: Path, peer: llamacpp.Peer) -> None:
    """The judge holds the file as it was; the worker loads it as it is."""
    from aprender.sides.llamacpp import LlamaCppSide

    path = tiny.save_gguf(PEER, tmp_path / "model.gguf")
    side = LlamaCppSide(path)
    tiny.save_gguf(dataclasses.replace(PEER, eps=1e-3), path)
    report = hunted(side)
    assert report.judged.finding == "loaded"
    assert "eps" in report.sentence


def test_an_override_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    from aprender.sides.llamacpp import LlamaCppSide

    with pytest.raises(ArgumentError, match="more than 127 bytes"):
        LlamaCppSide(tmp_path / "none.gguf", overrides={"k" * 128: 1})


def test_a_recording_of_another_theta_than_its_file_is_found(tmp_path: Path) -> None:
    good = aprender.open_captures(CANARY / "stages-float32")
    said = dataclasses.replace(good.manifest, hparams=dict(good.manifest.hparams) | {"theta": 10000.0})
    for name, manifest, code, finding in (("same", good.manifest, 0, None), ("other", said, 1, "loaded")):
        save(Captures({key: np.array(good[key]) for key in good}, manifest), tmp_path / name)
        for part in ("model.safetensors", "config.json"):
            target = tmp_path / part
            if not target.exists():
                target.symlink_to(CANARY / part)
        report = aprender.compare(str(CANARY / "canary.gguf"), f"saved:{tmp_path / name}", answer=0)
        assert (report.exit_code, report.judged.finding) == (code, finding)
    assert "theta is 10000 as loaded and 1000000 in the file" in report.sentence


def test_a_planted_weight_accuses_its_stage() -> None:
    """An edit is a fault of the engine and not of its loader."""
    report = aprender.compare(plant="transposed@1.ffn_up", answer=0)
    assert report.judged.finding == "operation"
    assert report.first is not None
    assert (report.first.stage, report.first.layer) == ("ffn_up", 1)


# ---- file against file -----------------------------------------------------------------------------------------------------------------


def test_a_quantised_file_is_no_other_model() -> None:
    report = aprender.compare(str(CANARY / "canary.gguf"), str(CANARY), answer=0)
    assert (report.exit_code, report.judged.finding) == (0, None)


@pytest.mark.parametrize(("entry", "value", "word"), [("rope_theta", 500.0, "theta"), ("rms_norm_eps", 1e-3, "eps")])
def test_two_files_that_disagree_are_named_before_any_stage(entry: str, value: float, word: str, tmp_path: Path) -> None:
    gguf = tiny.save_gguf(SHAPE, tmp_path / "model.gguf")
    folder = write_folder(tmp_path / "model", SHAPE)
    agree = aprender.compare(str(gguf), str(folder), prompt_ids=IDS, answer=0)
    assert (agree.exit_code, agree.judged.finding) == (0, None)
    config = json.loads((folder / "config.json").read_text())
    config[entry] = value
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(config))
    report = aprender.compare(str(gguf), str(folder), prompt_ids=IDS, answer=0)
    assert (report.exit_code, report.judged.finding) == (1, "files_differ")
    assert not report.judged.wrong
    here, there = OwnSide(gguf).model.hparams[word], OwnSide(folder).model.hparams[word]
    assert here != there
    assert f"{word} is {here:.7g} for the subject" in report.sentence
    assert f"{there:.7g} for the reference" in report.sentence


def test_a_length_that_no_operation_reads_is_no_finding(tmp_path: Path) -> None:
    gguf = tiny.save_gguf(dataclasses.replace(SHAPE, context=SHAPE.context * 2), tmp_path / "model.gguf")
    report = aprender.compare(str(gguf), str(write_folder(tmp_path / "model", SHAPE)), prompt_ids=IDS, answer=0)
    assert (report.exit_code, report.judged.finding) == (0, None)
