"""What a run reads from its cache, held against all earlier tokens: stale, lost, shifted and overwritten slots are named.

Truth: what is planted is known.  In our engine it is planted in the cache itself, in pieces after the first only; in Hugging Face in
transformers' own ``DynamicCache``.  A slot is the position whose key or value it should hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llamacpp
import numpy as np
import pytest
import tiny
from conftest import write_folder

from aprender import bisection, stages
from aprender.asking import Ask
from aprender.captures import Captures
from aprender.errors import ArgumentError
from aprender.judge.local import StageResult, local
from aprender.judge.witness import ModelData
from aprender.judgement import Hunt
from aprender.pieces import Piece, cuts, part, whole
from aprender.sides.edits import VALUES
from aprender.sides.own import OwnSide

IDS = (3, 14, 15, 92, 65, 35, 89, 79, 32)
DECODE = (4, 1, 1, 1, 1, 1)
RAGGED = (13, 1, 11, 15)
CACHES = ("k_cache", "v_cache")
SHAPES = [tiny.Shape("qwen2"), tiny.Shape("llama", tied=True), tiny.Shape("qwen3")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("history") / "model", tiny.Shape(context=4096))


def judged(side: Any, captures: Captures) -> list[StageResult]:
    return local(captures, ModelData(**side.model_data()), side.profile)


def wrong(side: Any, captures: Captures) -> list[StageResult]:
    return [result for result in judged(side, captures) if result.state == "wrong"]


# ---- the faults: what becomes of a cache [J, Kd] -------------------------------------------------------------------------------------


def stale(cache: np.ndarray) -> np.ndarray:
    """Slot 3 was not written: it still holds what belongs to slot 2."""
    out = cache.copy()
    out[3:4] = out[2:3]
    return out


def lost(cache: np.ndarray) -> np.ndarray:
    """Slot 1 is empty."""
    out = cache.copy()
    out[1] = 0
    return out


def evicted(cache: np.ndarray) -> np.ndarray:
    """A window that is full too early: the first key is gone, the others moved up, and the last one stands twice."""
    return np.concatenate([cache[1:], cache[-1:]])


def over(cache: np.ndarray) -> np.ndarray:
    """A ring that is one too short: the newest row is written over the first slot too."""
    out = cache.copy()
    out[0] = out[-1]
    return out


def other_layer(cache: np.ndarray) -> np.ndarray:
    """Slot 2 holds numbers that this layer never wrote."""
    out = cache.copy()
    out[2] = out[2, ::-1] * np.float32(0.75)
    return out


FAULTS: dict[Callable[[np.ndarray], np.ndarray], str] = {
    stale: r"slot 3 \(token 92\) holds what belongs to slot 2 \(token 15\)",
    lost: r"slot 1 \(token 14\) holds zeros: nothing was written",
    evicted: r"4 slots from 0 to 3 each hold what belongs to the position 1 later",
    over: r"slot 0 \(token 3\) holds what belongs to slot 4 \(token 65\)",
    other_layer: r"slot 2 \(token 15\) holds no row that this layer wrote \(relative L2 [0-9.e+]+\)",
}
"""Fault to what must be said of it in the first piece that reads it: position 4 (token 65), on a cache of five."""


def planted(monkeypatch: pytest.MonkeyPatch, folder: Path, stage: str, fault: Callable[[np.ndarray], np.ndarray]) -> OwnSide:
    """Our engine with a fault in the cache of layer 1, in all pieces but the first."""
    monkeypatch.setitem(VALUES, "test", lambda value, edit, size, table: fault(value))  # type: ignore[arg-type]
    return OwnSide(folder, edits=[{"target": "value", "stage": stage, "layer": 1, "transform": "test", "when": "decode"}])


# ---- our engine ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [DECODE, (9,), (1,) * 9, (2, 3, 4)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_clean_run_in_pieces_is_right(shape: tiny.Shape, sizes: tuple[int, ...], tmp_path: Path) -> None:
    side = OwnSide(write_folder(tmp_path / "m", shape))
    captures = side.capture_pieces(IDS, sizes)
    assert len(captures.pieces) == (len(sizes) if len(sizes) > 1 else 0)
    assert {result.state for result in judged(side, captures)} == {"exact"}  # the arithmetic of our engine declares every bit


def test_clean_ragged_chunks_are_right(folder: Path) -> None:
    side = OwnSide(folder)
    assert {result.state for result in judged(side, side.capture_pieces((IDS * 5)[:40], RAGGED))} == {"exact"}


@pytest.mark.parametrize("stage", CACHES)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_wrong_slot_is_named_and_nothing_else(
    fault: Callable[[np.ndarray], np.ndarray], stage: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the prompt were computed with the right cache, those of decoding with the wrong one: only the cache is wrong."""
    side = planted(monkeypatch, folder, stage, fault)
    found = wrong(side, side.capture_pieces(IDS, DECODE))
    assert [result.key for result in found] == [(stage, 1)]
    assert pytest.approx(1) == found[0].confidence
    assert_said(rf"in the piece of position 4: {FAULTS[fault]}", found[0].reason)


def assert_said(pattern: str, text: str) -> None:
    assert re.match(pattern, text), text


@pytest.mark.parametrize("stage", CACHES)
@pytest.mark.parametrize("piece", [0, 2])
def test_a_slot_that_was_wrong_once_is_named_though_it_is_right_at_the_end(
    stage: str, piece: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next piece repairs it: the last cache of all is clean."""
    clean = OwnSide(folder).capture_pieces(IDS, DECODE)[stage, 1]
    kept = np.array(clean)

    def repaired(cache: np.ndarray) -> np.ndarray:
        out = cache.copy()
        out[:4] = kept[:4]
        return out

    count = iter(range(99))

    def change(value: np.ndarray, edit: Any, size: Any, table: np.ndarray) -> np.ndarray:
        return stale(value) if next(count) == piece else repaired(value)

    monkeypatch.setitem(VALUES, "test", change)  # type: ignore[arg-type]
    side = OwnSide(folder, edits=[{"target": "value", "stage": stage, "layer": 1, "transform": "test", "when": "decode"}])
    captures = side.capture_pieces(IDS, DECODE)
    assert np.array_equal(captures[stage, 1][:4], kept[:4])
    found = wrong(side, captures)
    assert [result.key for result in found] == [(stage, 1)]
    assert_said(rf"in the piece of position {4 + piece}: slot 3 \(token 92\) holds what belongs to slot 2", found[0].reason)


def test_without_its_pieces_the_attention_would_be_accused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the same arrays, and nothing of what each piece read."""
    side = planted(monkeypatch, folder, "k_cache", stale)
    captures = side.capture_pieces(IDS, DECODE)
    bare = Captures(captures, captures.manifest)
    assert [result.key for result in wrong(side, bare)] == [("k_cache", 1), ("attn_scores", 1)]


def test_the_probe_names_the_slot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt alone agrees: it is run in one piece."""
    side = planted(monkeypatch, folder, "v_cache", stale)
    assert bisection.hunt(Hunt(side), Ask(ids=IDS), answer=0).verdict == "agree"
    report = bisection.hunt(Hunt(side), Ask(ids=IDS), answer=0, probes=("short", "decode"))
    assert report.first is not None
    assert report.first.key == ("v_cache", 1)
    assert report.sentence.startswith("Probe decode (a prompt, then token by token): v_cache of layer 1")
    assert "slot 3 (token 92) holds what belongs to slot 2 (token 15)" in report.sentence


STEPS = {
    "mask": ("attn_softmax", [("attn_softmax", "mask_offset", -1), ("attention", "mask_offset", -1)]),
    "window": ("attn_softmax", [("attn_softmax", "window", 3), ("attention", "window", 3)]),
    "query position": ("q_post_rope", [("q_post_rope", "pos_shift", -1)]),
    "key position": ("k_post_rope", [("k_post_rope", "pos_shift", 1)]),
}
"""Faults of decoding that are no fault of the cache: where they are named, and the fields of the plan that plant them."""


@pytest.mark.parametrize("name", STEPS)
def test_mask_window_and_positions_are_the_models_not_the_sides(name: str, folder: Path) -> None:
    """In later pieces only (flashinfer-ai/flashinfer#847, huggingface/transformers#39408): never the cache, and never the first piece."""
    stage, fields = STEPS[name]
    edits = [{"target": "step", "stage": at, "layer": 0, "field": field, "value": value, "when": "later"} for at, field, value in fields]
    side = OwnSide(folder, edits=edits)
    assert not wrong(side, side.capture(IDS))
    assert wrong(side, side.capture_pieces(IDS, DECODE))[0].key == (stage, 0)


# ---- a side that does not show its cache ---------------------------------------------------------------------------------------------


def hidden(captures: Captures, *names: str) -> Captures:
    """A capture, and each of its pieces, without some stages."""
    kept = {key: captures[key] for key in captures if key[0] not in names}
    pieces = tuple(hidden(piece, *names) for piece in captures.pieces)
    return Captures(kept, captures.manifest, pieces, tuple(hidden(piece, *names) for piece in captures.past))


@pytest.mark.parametrize("names", [CACHES, (*CACHES, "attn_scores", "attn_softmax")], ids=len)
@pytest.mark.parametrize("stage", CACHES)
def test_attention_is_judged_from_history_where_the_cache_is_not_shown(
    stage: str, names: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first stage after the cache that is shown has read something else than what earlier tokens had put there."""
    clean = OwnSide(folder)
    assert not wrong(clean, hidden(clean.capture_pieces(IDS, DECODE), *names))
    side = planted(monkeypatch, folder, stage, stale)
    found = wrong(side, hidden(side.capture_pieces(IDS, DECODE), *names))
    seen = "attn_scores" if stage == "k_cache" and "attn_scores" not in names else "attention"
    assert [result.key for result in found] == [(seen, 1)]
    assert (stage, 1) in found[0].spans


def test_a_single_step_is_judged_on_its_own_past(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One decoded token, its cache shown or not; without its past the old slots cannot be judged, and a hidden cache neither."""
    step = OwnSide(folder).capture_end(IDS, 1)
    assert (step.tokens, step["k_cache", 1].shape[0]) == (IDS[-1:], len(IDS))
    assert not wrong(OwnSide(folder), step)
    side = planted(monkeypatch, folder, "k_cache", stale)
    found = side.capture_end(IDS, 1)
    assert [(r.key, r.n) for r in wrong(side, found)] == [(("k_cache", 1), found["k_cache", 1].size)]
    side = planted(monkeypatch, folder, "k_cache", stale)
    found = hidden(side.capture_end(IDS, 1), *CACHES)
    assert [r.key for r in wrong(side, found)] == [("attn_scores", 1)]
    alone = Captures(found, found.manifest)
    states = {r.key: (r.state, r.reason) for r in judged(side, alone)}
    assert states["attn_scores", 1] == ("unmeasured", "1.k_cache was not captured, and it holds tokens from before this run")


# ---- pieces --------------------------------------------------------------------------------------------------------------------------


def test_pieces_are_views_of_the_whole_but_for_their_caches(folder: Path) -> None:
    captures = OwnSide(folder).capture_pieces(IDS, DECODE)
    first, *later = captures.pieces
    assert [piece.manifest.positions for piece in captures.pieces] == [(0, 1, 2, 3), (4,), (5,), (6,), (7,), (8,)]
    assert [len(piece.past) for piece in captures.pieces] == [0, 1, 2, 3, 4, 5]
    for key in captures:
        row = stages.by_name[key[0]]
        assert np.shares_memory(first[key], captures[key]) == ("T" in row.shape)
        assert np.array_equal(later[0][key], captures[key][:5] if "T" not in row.shape else part(captures[key], key, 4, 5))
    assert not captures.pieces[0].pieces


def test_sizes_must_cut_up_the_tokens(folder: Path) -> None:
    assert cuts([4, 1, 2], 7) == [(0, 4), (4, 5), (5, 7)]
    for sizes in ([4, 4], [], [0, 7], [8, -1]):
        with pytest.raises(ArgumentError, match="do not cut up 7 tokens"):
            cuts(sizes, 7)
    with pytest.raises(ArgumentError, match="do not cut up 9 tokens"):
        OwnSide(folder).capture_pieces(IDS, [1])


def test_one_piece_is_no_history(folder: Path) -> None:
    captures = OwnSide(folder).capture(IDS)
    arrays = {key: captures[key] for key in captures}
    assert whole([Piece(0, len(IDS), arrays)], captures.manifest).pieces == ()


# ---- Hugging Face --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def corrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Makes transformers' own cache lose a slot of layer 1 once it holds more than five tokens."""
    pytest.importorskip("torch")
    from transformers.cache_utils import DynamicLayer

    def corrupt(which: str, slot: int) -> None:
        update, seen = DynamicLayer.update, []

        def faulty(self: Any, keys: Any, values: Any, *args: Any, **more: Any) -> Any:
            if keys.shape[-2] > 1:  # a prompt: its layers come in order
                seen.append(self)
            out = update(self, keys, values, *args, **more)
            if len(seen) % 2 == 0 and self is seen[-1] and self.keys.shape[-2] > 5:  # the tiny model has two layers
                held = getattr(self, which)
                held[:, :, slot] = held[:, :, slot - 1]
            return out

        monkeypatch.setattr(DynamicLayer, "update", faulty)

    return corrupt


@pytest.mark.foreign
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("which", "stage"), [("keys", "k_cache"), ("values", "v_cache")])
def test_a_corrupted_dynamic_cache_is_named(
    dtype: str, which: str, stage: str, folder: Path, corrupted: Callable[[str, int], None]
) -> None:
    pytest.importorskip("torch")
    from aprender.sides.hf import HFSide

    side = HFSide(str(folder), dtype)
    assert not wrong(side, side.capture_pieces(IDS, DECODE))
    corrupted(which, 2)
    captures = side.capture_pieces(IDS, DECODE)
    found = wrong(side, captures)
    assert [result.key for result in found] == [(stage, 1)]
    assert_said(r"in the piece of position 5: slot 2 \(token 15\) holds what belongs to slot 1 \(token 14\)", found[0].reason)
    if (dtype, which) == ("float16", "keys"):
        names = (*CACHES, "attn_scores", "attn_softmax")
        assert [result.key for result in wrong(side, hidden(captures, *names))] == [("attention", 1)]


@pytest.mark.foreign
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_clean_hugging_face_pieces_are_right(shape: tiny.Shape, dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from aprender.sides.hf import HFSide

    side = HFSide(str(write_folder(tmp_path / "m", shape)), dtype)
    for ids, sizes in ((IDS, DECODE), ((IDS * 5)[:40], RAGGED)):
        captures = side.capture_pieces(ids, sizes)
        assert captures.manifest.attestation is True
        results = judged(side, captures)
        assert {result.state for result in results} <= {"exact", "noise", "unmeasured"}
        assert {result.stage for result in results if result.state == "unmeasured"} <= {"qkv_matmul"}  # fused with its bias
        assert not wrong(side, hidden(captures, *CACHES, "attn_scores", "attn_softmax"))


# ---- llama.cpp ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.foreign
@pytest.mark.parametrize("cache", ["f32", "f16"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("shape", [tiny.Shape("qwen2", head=16), tiny.Shape("llama"), tiny.Shape("qwen3")], ids=str)
def test_clean_pieces_of_llamacpp_are_right_and_a_changed_slot_is_named(shape: tiny.Shape, kind: str, cache: str, tmp_path: Path) -> None:
    """Its lanes are pairs where the container has them so; a float16 cache holds what the key is rounded to."""
    if llamacpp.missing():
        pytest.skip(llamacpp.missing())
    from aprender.sides.llamacpp import LlamaCppSide

    side = LlamaCppSide(tiny.save_gguf(shape, tmp_path / "m.gguf", kind), cache=cache)
    captures = side.capture_pieces(IDS, DECODE)
    assert captures.manifest.attestation is True
    results = {result.key: result for result in judged(side, captures)}
    assert {result.state for result in results.values()} <= {"exact", "noise", "unmeasured"}
    assert (results["k_cache", 1].state, results["k_cache", 1].n) == ("exact", captures["k_cache", 1].size)
    pieces = list(captures.pieces)
    changed = np.array(pieces[3]["k_cache", 1])
    changed[2] = changed[0]
    pieces[3] = Captures({**pieces[3], ("k_cache", 1): changed}, pieces[3].manifest, past=pieces[3].past)
    found = wrong(side, Captures(captures, captures.manifest, pieces=tuple(pieces)))
    assert found[0].key == ("k_cache", 1)
    assert_said(r"in the piece of position 6: slot 2 \(token 15\) holds what belongs to slot 0 \(token 3\)", found[0].reason)
