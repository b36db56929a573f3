"""Our engine as a side: chunks, edits, attestation, digest, greedy text, and that nothing depends on how it is run.

Truth: the same numbers by another way (one go, another thread count, NumPy in float64, hashlib), and the canary's answer from its README.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import CANARY, PROMPT, write_folder

from aprender import _core, stages
from aprender.captures import Captures
from aprender.errors import ArgumentError, ConfigError, DeviceError, FormatError, UnknownName
from aprender.sides import open_side, own
from aprender.sides.own import OwnSide

ANSWER = [220, 17, 10, 17, 374, 220, 19, 13]  # " 2+2 is 4.", canary README
IDS = tuple(int(i) for i in np.random.default_rng(3).integers(0, tiny.Shape().vocab, 23))
SIDES = [tiny.Shape("qwen2"), tiny.Shape("llama", tied=True, attention_bias=False), tiny.Shape("qwen3", tied=True)]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., OwnSide]:
    """opened(shape, **options): our engine on a tiny model in F16, so that containers and weights are exact."""
    root = tmp_path_factory.mktemp("own")

    def make(shape: tiny.Shape = SIDES[0], **options: Any) -> OwnSide:
        path = root / f"{shape}.gguf"
        if not path.exists():
            tiny.save_gguf(shape, path, "F16")
        return OwnSide(path, **options)

    return make


def same(a: Captures, b: Captures) -> list[str]:
    """The keys of which the bits differ; the keys themselves must be equal."""
    assert list(a) == list(b)
    return [stages.spell(key) for key in a if a[key].shape != b[key].shape or a[key].tobytes() != b[key].tobytes()]


# ---- chunks ----------------------------------------------------------------------------------------------------------------------------


# 4 heads x 23 keys: 92 scores for one token; 1 cuts to single tokens, 1000 to a few pieces of different lengths
@pytest.mark.parametrize("limit", [1, 300, 1000])
@pytest.mark.parametrize("shape", SIDES, ids=str)
def test_chunks_join_to_the_bits_of_one_go(
    opened: Callable[..., OwnSide], monkeypatch: pytest.MonkeyPatch, shape: tiny.Shape, limit: int
) -> None:
    side = opened(shape)
    whole = side.capture(IDS)
    text = side.generate(IDS, 5)
    told: list[float] = []
    monkeypatch.setattr(own, "LARGEST_SCORES", limit)
    parts = side.capture(IDS, progress=told.append)
    assert len(told) > 1  # it was really cut
    assert told == sorted(told)
    assert told[-1] == 1
    assert same(parts, whole) == []
    assert side.logits(IDS).tobytes() == whole.lm_head.tobytes()
    assert side.generate(IDS, 5) == text
    assert parts.manifest.attestation is True


def test_chunks_cover_every_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (1, 7, 100, 1000, 1 << 26):
        monkeypatch.setattr(own, "LARGEST_SCORES", limit)
        for tokens in (0, 1, 2, 13, 64):
            cut = list(own._chunks(tokens, 4))
            assert [i for first, last in cut for i in range(first, last)] == list(range(tokens))
            assert all(4 * (last - first) * last <= limit or last - first == 1 for first, last in cut)


def test_capture_has_every_stage_in_order(opened: Callable[..., OwnSide]) -> None:
    for shape in SIDES:
        captures = opened(shape).capture(IDS)
        assert list(captures) == stages.keys(shape.flags, shape.layers)
        for key in captures:
            assert captures[key].shape == stages.by_name[key[0]].dims(shape.hparams, len(IDS)), key
            assert not captures[key].flags.writeable


def test_what_is_kept_changes_no_bit(opened: Callable[..., OwnSide]) -> None:
    side = opened()
    whole = side.capture(IDS)
    for text in ("lm_head", "1.ffn_out,*.k_cache", "0.attn_*"):
        part = side.capture(IDS, stages.parse_selection(text))
        assert 0 < len(part) < len(whole)
        assert [stages.spell(key) for key in part if part[key].tobytes() != whole[key].tobytes()] == []


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_threads_and_tiers_change_no_bit(opened: Callable[..., OwnSide], threads: int) -> None:
    reference = opened(SIDES[2], threads=1).capture(IDS)
    for tier, available in _core.TIERS:
        if available:
            captures = opened(SIDES[2], threads=threads, tier=tier).capture(IDS)
            assert same(captures, reference) == []
            assert (captures.manifest.tier, captures.manifest.threads) == (tier, threads)


def test_environment_chooses_threads_and_tier(opened: Callable[..., OwnSide], monkeypatch: pytest.MonkeyPatch) -> None:
    slowest = _core.TIERS[0][0]
    monkeypatch.setenv("APRENDER_TIER", slowest)
    monkeypatch.setenv("APRENDER_THREADS", "2")
    said = opened().capture(IDS).manifest
    assert (said.tier, said.threads) == (slowest, 2)
    for wrong in ("0", "two", "-1", ""):
        monkeypatch.setenv("APRENDER_THREADS", wrong)
        with pytest.raises(ArgumentError, match="APRENDER_THREADS"):
            opened()
    monkeypatch.delenv("APRENDER_THREADS")
    monkeypatch.setenv("APRENDER_TIER", "no such")
    with pytest.raises(UnknownName, match="no such"):
        opened().capture(IDS)


# ---- edits -----------------------------------------------------------------------------------------------------------------------------


def rms_norm(x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    """The definition, in float64, rounded once: what the exact profile declares."""
    wide = x.astype(np.float64)
    return (wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + eps) * w).astype(np.float32)


def before(captures: Captures, key: stages.Key) -> list[stages.Key]:
    return [other for other in captures if stages.order(other) < stages.order(key)]


@pytest.mark.parametrize("edit", [{"value": 0.5}, {"factor": 500000.0}], ids=["value", "factor"])
def test_edit_of_a_step_takes_effect_there_and_not_before(opened: Callable[..., OwnSide], edit: dict[str, float]) -> None:
    clean = opened().capture(IDS)
    bad = opened(edits=[{"target": "step", "stage": "ffn_norm", "layer": 1, "field": "eps"} | edit]).capture(IDS)
    at = ("ffn_norm", 1)
    assert [key for key in before(bad, at) if bad[key].tobytes() != clean[key].tobytes()] == []
    weight = opened().weights["ffn_norm", 1].astype(np.float64)
    hidden = bad["post_attn_residual", 1]
    assert np.array_equal(clean[at], rms_norm(hidden, weight, opened().model.hparams["eps"]))
    # 500000 x 1e-6 (as float32) is half: both spellings mean the same edit
    assert np.allclose(bad[at], rms_norm(hidden, weight, 0.5), rtol=1e-6, atol=0)
    assert not np.array_equal(bad[at], clean[at])


def test_edit_without_layer_means_every_layer(opened: Callable[..., OwnSide]) -> None:
    bad = opened(edits=[{"target": "step", "stage": "attn_scores", "layer": None, "field": "kv_div", "value": 1}])
    assert [step["kv_div"] for step in bad.run().plan() if step["stage"] == "attn_scores"] == [1, 1]
    one = opened(edits=[{"target": "step", "stage": "attn_scores", "layer": 1, "field": "kv_div", "value": 1}])
    assert [step["kv_div"] for step in one.run().plan() if step["stage"] == "attn_scores"] == [2, 1]  # 4 heads share 2


def test_edit_of_an_operand_reads_zero(opened: Callable[..., OwnSide]) -> None:
    bad = opened(edits=[{"target": "step", "stage": "post_attn_residual", "layer": 0, "field": "a", "value": -1}]).capture(IDS)
    assert np.array_equal(bad["post_attn_residual", 0], bad["attn_out", 0])


def test_edit_of_a_weight_takes_effect_and_the_model_data_stay_clean(opened: Callable[..., OwnSide]) -> None:
    clean = opened()
    bad = opened(edits=[{"target": "weight", "weight": "ffn_down", "layer": 1, "transform": "transposed"}])
    captures = bad.capture(IDS)
    at, weight = ("ffn_out", 1), clean.weights["ffn_down", 1]
    assert [key for key in before(captures, at) if captures[key].tobytes() != clean.capture(IDS)[key].tobytes()] == []
    wrong = weight.reshape(weight.shape[::-1]).T.astype(np.float64)  # [160, 64] bytes read as [64, 160]
    expected = captures["ffn_swigl", 1].astype(np.float64) @ wrong.T
    assert np.allclose(captures[at], expected, rtol=0, atol=1e-5 * np.abs(expected).max())  # 160 roundings of 6e-8
    assert not np.allclose(captures[at], clean.capture(IDS)[at], rtol=0, atol=0.1 * np.abs(expected).max())
    said = bad.model_data()
    assert said["weights"]["ffn_down", 1].tobytes() == weight.tobytes()
    assert {key: value.tobytes() for key, value in said["weights"].items()} == {
        key: value.tobytes() for key, value in clean.weights.items()
    }


def test_zeroed_bias_is_no_bias(opened: Callable[..., OwnSide]) -> None:
    names = ("attn_q_bias", "attn_k_bias", "attn_v_bias")
    bad = opened(edits=[{"target": "weight", "weight": name, "layer": 0, "transform": "zero"} for name in names]).capture(IDS)
    assert np.array_equal(bad["qkv_bias", 0], bad["qkv_matmul", 0])
    assert not np.array_equal(bad["qkv_bias", 1], bad["qkv_matmul", 1])


def test_plan_data_of_an_unedited_side_stay_clean(opened: Callable[..., OwnSide]) -> None:
    """An edit belongs to its own side: nothing is written into the shared model."""
    model_plan = opened().run().plan()
    opened(edits=[{"target": "step", "stage": "attn_norm", "layer": 0, "field": "eps", "value": 1}]).capture(IDS)
    assert opened().run().plan() == model_plan


# ---- what the manifest says ------------------------------------------------------------------------------------------------------------


def test_attestation(opened: Callable[..., OwnSide], monkeypatch: pytest.MonkeyPatch) -> None:
    side = opened()
    assert side.capture(IDS).manifest.attestation is True
    assert side.capture(IDS, stages.parse_selection("*.ffn_out")).manifest.attestation is None
    logits = side.logits(IDS).copy()
    monkeypatch.setattr(side, "logits", lambda ids: logits)
    assert side.capture(IDS).manifest.attestation is True
    logits[-1, -1] = np.nextafter(logits[-1, -1], np.float32(np.inf))  # one bit of one number
    assert side.capture(IDS).manifest.attestation is False


def test_digest_is_that_of_the_file(opened: Callable[..., OwnSide], tmp_path: Path) -> None:
    side = opened()
    assert side.digest == hashlib.sha256(Path(side.path).read_bytes()).hexdigest() == side.capture(IDS).manifest.model_digest
    folder = write_folder(tmp_path / "hf", SIDES[0])
    assert OwnSide(folder).digest == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_manifest(opened: Callable[..., OwnSide]) -> None:
    said = opened(SIDES[1], spelling="cpu:x.gguf", threads=2).capture(IDS).manifest
    assert (said.side, said.tokens, said.positions) == ("cpu:x.gguf", IDS, tuple(range(len(IDS))))
    assert (said.producer, said.backend, said.profile, said.arch) == ("aprender", "cpu", "exact", "llama")
    assert said.flags == SIDES[1].flags
    # GGUF and the engine hold eps as float32
    assert said.hparams == SIDES[1].hparams | {"eps": float(np.float32(SIDES[1].eps))}
    assert all(note.origin == "captured" and note.dtype == "float32" for note in said.tensors.values())


def test_model_data_are_the_weights_of_the_file(opened: Callable[..., OwnSide]) -> None:
    """Against the arrays that the writer was given: llama's GGUF has its q and k rows permuted, the tied head is the token table."""
    for shape in SIDES:
        data, made = opened(shape).model_data(), tiny.weights(shape)
        assert np.array_equal(data["weights"]["attn_q", 1], made["model.layers.1.self_attn.q_proj.weight"])
        assert np.array_equal(data["weights"]["ffn_down", 0], made["model.layers.0.mlp.down_proj.weight"])
        head = made["model.embed_tokens.weight" if shape.tied else "lm_head.weight"]
        assert np.array_equal(data["weights"]["output", None], head)
        assert (data["arch"], data["flags"]) == (shape.arch, shape.flags)
        assert ("attn_q", 2) not in data["weights"]  # two layers
        with pytest.raises(KeyError):
            data["weights"]["attn_q", 2]


# ---- text ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["canary.gguf", ""], ids=["gguf", "safetensors"])
def test_the_canary_answers_in_every_form(form: str) -> None:
    side = OwnSide(CANARY / form)
    told: list[int] = []
    tokenizer = side.tokenizer()
    assert tokenizer is not None
    assert tuple(tokenizer.encode("What is 2+2?")) == PROMPT
    assert side.generate(PROMPT, 64, told.append) == told == ANSWER  # 64 are allowed: it stops at the end token, which is not told
    assert tokenizer.decode(told) == " 2+2 is 4."


def test_generate_stops_where_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    side = OwnSide(CANARY / "canary.gguf")
    assert side.generate(PROMPT, 3) == ANSWER[:3]
    assert side.generate(PROMPT, 0) == []
    monkeypatch.setattr(side, "tokenizer", lambda: SimpleNamespace(eos_ids=frozenset({ANSWER[4]})))
    assert side.generate(PROMPT, 64) == ANSWER[:4]
    monkeypatch.setattr(side, "tokenizer", lambda: SimpleNamespace(eos_ids=frozenset({ANSWER[0]})))
    assert side.generate(PROMPT, 64) == []
    monkeypatch.setattr(side, "tokenizer", lambda: None)  # nothing ends it: as many as asked for, the end token among them
    assert side.generate(PROMPT, 12)[:8] == ANSWER
    assert len(side.generate(PROMPT, 12)) == 12


def test_generate_is_the_argmax_of_whole_forward_passes(opened: Callable[..., OwnSide]) -> None:
    """The cache token by token against no cache at all."""
    for shape in SIDES:
        side, ids = opened(shape), list(IDS[:5])
        for token in side.generate(ids, 8):
            assert int(np.argmax(side.logits(ids)[-1])) == token
            ids.append(token)
        assert len(ids) == 13


# ---- refusals --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [(), (112,), (3, -1), (0, 1 << 40)], ids=["none", "too large", "negative", "huge"])
def test_bad_ids_are_refused(opened: Callable[..., OwnSide], ids: Sequence[int]) -> None:
    with pytest.raises(ArgumentError):
        opened().capture(ids)


def test_no_silent_fallback_to_another_device(opened: Callable[..., OwnSide], monkeypatch: pytest.MonkeyPatch) -> None:
    path = opened().path
    monkeypatch.setenv("APRENDER_CUDA_LIBRARY", str(path))  # a file that is no library
    with pytest.raises(DeviceError, match="cuda"):
        open_side(f"cuda:{path}")
    assert open_side(f"cpu:{path}").spelling == f"cpu:{path}"


def test_what_is_no_model_is_refused(tmp_path: Path, opened: Callable[..., OwnSide]) -> None:
    with pytest.raises(FileNotFoundError):
        OwnSide(tmp_path / "missing.gguf")
    data = Path(opened().path).read_bytes()
    for name, content, kind in (("magic", b"nope" + data[4:], FormatError), ("short", data[: len(data) // 2], FormatError)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(kind):
            OwnSide(tmp_path / name)
    folder = write_folder(tmp_path / "hf", SIDES[0], hidden_size=96)
    with pytest.raises(ConfigError, match=r"96"):
        OwnSide(folder)


# ---- many at once ----------------------------------------------------------------------------------------------------------------------


def test_sides_at_once_give_the_same_bits(opened: Callable[..., OwnSide]) -> None:
    """Two models, and two threads on one of them; the pool of threads is shared."""
    sides = [opened(SIDES[0], threads=2), opened(SIDES[2], threads=2), opened(SIDES[0])]
    sides.append(sides[0])
    alone = [side.capture(IDS) for side in sides]
    differ: list[Any] = []
    gate = threading.Barrier(len(sides))

    def work(number: int) -> None:
        try:
            gate.wait()
            for _ in range(5):
                differ.extend(same(sides[number].capture(IDS), alone[number]))
        except Exception as problem:
            differ.append(problem)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(sides))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert differ == []


def test_arrays_outlive_their_side(opened: Callable[..., OwnSide]) -> None:
    import gc

    side = opened(SIDES[1])
    kept, expected = side.capture(IDS).lm_head, side.capture(IDS).lm_head.copy()
    side.close()
    del side
    gc.collect()
    opened(SIDES[1]).capture(IDS)  # would use the memory again
    assert np.array_equal(kept, expected)
