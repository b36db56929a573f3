"""What looks wrong and cannot matter: shifts and lane orders common to q and k, and a product that was captured after its bias.

Each is planted in our engine by its edits, in the NumPy engine of ``hf_like.py``, in Hugging Face modules that are patched here, and in
what llama.cpp shows; each has a neighbour that is a fault: one of q and k alone, or two that are unlike.  Truth: the logits, which a gauge
does not move by more than rounding.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llamacpp
import numpy as np
import pytest
import tiny
from conftest import CANARY, PROMPT, write_folder
from hf_like import FORMATS, capture, model, profile, rounded, run

from aprender import bisection
from aprender.asking import Ask
from aprender.captures import Captures
from aprender.judge import faults, witness
from aprender.judge.local import HEALS, NOT_COMPARABLE, WRONG, StageResult, local
from aprender.judgement import Hunt
from aprender.manifest import HALVES
from aprender.references import WitnessSide
from aprender.sides.own import OwnSide
from aprender.stages import Key

IDS = [int(i) for i in np.random.default_rng(7).integers(0, 112, 21)]
QWEN2 = model(tiny.Shape())
H, HEADS = 24, 4
SHIFTED = {("q_post_rope", 0), ("k_post_rope", 0), ("k_cache", 0)}


def states(results: list[StageResult], state: str) -> set[Key]:
    return {r.key for r in results if r.state == state}


# ---- our engine: the whole hunt --------------------------------------------------------------------------------------------------------


def hunted(path: Path, ids: tuple[int, ...], edits: Any) -> bisection.Report:
    side = OwnSide(path, edits=edits)
    return bisection.hunt(Hunt(side, WitnessSide(OwnSide(path), "witness")), Ask(ids=ids), answer=0)


def turned(stage: str, layer: int | None, value: int) -> dict[str, Any]:
    return {"target": "step", "stage": stage, "layer": layer, "field": "pos_shift", "value": value}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("gauge")
    made = {arch: write_folder(root / arch, tiny.Shape(arch)) for arch in tiny.ARCHS}
    return lambda arch: made[arch]


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_a_shift_of_queries_and_keys_heals(arch: str, folders: Callable[[str], Path]) -> None:
    path, ids = folders(arch), tuple(IDS[:9])
    for shift in (7, -2):
        report = hunted(path, ids, [turned("q_post_rope", 1, shift), turned("k_post_rope", 1, shift)])
        assert (report.verdict, report.exit_code, report.judged.finding) == ("agree", 0, None)
        assert f"equal up to positions shifted by {shift} in q and k" in report.sentence
        assert "q_post_rope, k_post_rope, k_cache of layer 1" in report.sentence
        healing = {(row["stage"], row["layer"]) for row in report.to_json()["stages"] if row["state"] == "heals"}
        assert healing == {(stage, 1) for stage, _ in SHIFTED}


@pytest.mark.parametrize("arch", tiny.ARCHS)
@pytest.mark.parametrize("edits", [{"q": 7}, {"k": 7}, {"q": 7, "k": 6}, {"q": 7, "k": -7}], ids=str)
def test_a_shift_that_is_not_common_is_wrong(arch: str, edits: dict[str, int], folders: Callable[[str], Path]) -> None:
    report = hunted(folders(arch), tuple(IDS[:9]), [turned(f"{name}_post_rope", 0, value) for name, value in edits.items()])
    assert (report.verdict, report.exit_code, report.judged.finding) == ("divergence", 1, "operation")
    assert {f.key for f in report.judged.wrong} == {(f"{name}_post_rope", 0) for name in edits}
    assert report.first is not None
    assert report.first.diagnosis is not None
    assert (report.first.kind, report.first.diagnosis.detail) == ("rope-position", f"positions shifted by {next(iter(edits.values()))}")


def test_a_shift_of_the_table_heals(folders: Callable[[str], Path]) -> None:
    """All layers read it, so q and k have the same shift; the positions of a few tokens alone are no shift."""
    report = hunted(folders("qwen3"), tuple(IDS[:9]), [turned("rope_table", None, 5)])
    assert report.verdict == "agree"
    assert "equal up to positions shifted by 5 in the table, and so in q and k" in report.sentence
    twice = {"target": "step", "stage": "rope_table", "layer": None, "field": "pos_step", "value": 2}
    assert hunted(folders("qwen3"), tuple(IDS[:9]), [twice]).verdict == "divergence"


def test_a_shift_heals_in_trained_weights() -> None:
    row = faults.CONTROLS["shift"]
    data = OwnSide(CANARY / "canary.gguf").model_data()
    edits = [edit for key in row.sites(data["flags"], data["hparams"]) for edit in row.edits(*key, data["flags"])]
    report = hunted(CANARY / "canary.gguf", PROMPT, edits)
    assert (report.verdict, report.exit_code) == ("agree", 0)
    assert "of layers 0, 1, 2, 3" in report.sentence


def test_a_shift_beside_a_fault_hides_nothing(folders: Callable[[str], Path]) -> None:
    """Scores of another scale: wrong, and then nothing proves that the shift is one of q and k alike."""
    gauge = [turned("q_post_rope", 0, 7), turned("k_post_rope", 0, 7)]
    scale = {"target": "step", "stage": "attn_scores", "layer": 0, "field": "scale", "factor": 1.1}
    report = hunted(folders("qwen2"), tuple(IDS[:9]), [*gauge, scale])
    assert report.verdict == "divergence"
    assert {f.key for f in report.judged.wrong} == {("q_post_rope", 0), ("k_post_rope", 0), ("attn_scores", 0)}
    report = hunted(folders("qwen2"), tuple(IDS[:9]), [*gauge, {**scale, "layer": 1}])
    assert {f.key for f in report.judged.wrong} == {("attn_scores", 1)}


# ---- after the bias --------------------------------------------------------------------------------------------------------------------


def test_a_product_after_its_bias_is_not_comparable(folders: Callable[[str], Path]) -> None:
    """Control C5, unsaid: the row is not what it is called; nothing is accused, and the value itself is judged."""
    edit = {"target": "capture", "stage": "qkv_matmul", "transform": "instead", "origin": "qkv_bias", "point": "as defined"}
    report = hunted(folders("qwen2"), tuple(IDS[:9]), [{**edit, "layer": 0}, {**edit, "layer": 1}])
    assert (report.verdict, report.exit_code) == ("agree", 0)
    assert "qkv_matmul of layers 0, 1" in report.sentence
    assert "captured after the bias: it is qkv_bias, and that is right" in report.sentence
    rows = {(row["stage"], row["layer"]): row["state"] for row in report.to_json()["stages"]}
    assert rows["qkv_matmul", 0] == rows["qkv_matmul", 1] == NOT_COMPARABLE
    assert rows["qkv_bias", 0] in ("exact", "noise")


@pytest.mark.parametrize("name", ["no-bias", "bias-twice"])
def test_a_bias_that_is_wrong_is_no_capture_point(name: str, folders: Callable[[str], Path]) -> None:
    """Without its bias the sum is the product bit for bit as well."""
    data = OwnSide(folders("qwen2")).model_data()
    edits = faults.FAULTS[name].edits("qkv_bias", 0, data["flags"])
    report = hunted(folders("qwen2"), tuple(IDS[:9]), edits)
    assert {f.key for f in report.judged.wrong} == {("qkv_bias", 0)}
    shown = {"target": "capture", "stage": "qkv_matmul", "layer": 0, "transform": "instead", "origin": "qkv_bias", "point": "as defined"}
    report = hunted(folders("qwen2"), tuple(IDS[:9]), [*edits, shown])
    assert report.verdict == "divergence"
    assert {f.key for f in report.judged.wrong} <= {("qkv_matmul", 0), ("qkv_bias", 0)}


# ---- another engine --------------------------------------------------------------------------------------------------------------------


def rotation(fmt: str, name: str, shift: int) -> Any:
    """q or k of layer 0 as an engine leaves it whose positions count from ``shift``."""
    x = run(QWEN2, IDS, fmt)["qkv_bias", 0]
    x = x[:, : HEADS * H] if name == "q" else x[:, HEADS * H : HEADS * H + H * 2]
    exponent = np.arange(0, H, 2, dtype=np.float32) / np.float32(H)
    frequency = np.float32(1) / np.float32(1e6 ** exponent.astype(np.float64))
    angle = (np.arange(len(IDS)) + shift).astype(np.float32)[:, None] * frequency
    cos, sin = (rounded(f(angle), fmt)[:, None] for f in (np.cos, np.sin))
    a, b = np.split(x.reshape(len(IDS), -1, H), 2, axis=2)
    first = rounded(a * cos, fmt) + rounded(-b * sin, fmt)
    return np.concatenate([first, rounded(b * cos, fmt) + rounded(a * sin, fmt)], axis=2).reshape(x.shape)


def judged(fmt: str, q: int, k: int) -> list[StageResult]:
    shifts = {("q_post_rope", 0): q, ("k_post_rope", 0): k}
    made = {key: rotation(fmt, key[0][0], shift) for key, shift in shifts.items()}
    return local(capture(QWEN2, IDS, fmt, lambda s, i, value: made.get((s, i), value)), QWEN2, profile(fmt))


@pytest.mark.parametrize("fmt", FORMATS)
def test_shifts_of_an_engine_that_rounds(fmt: str) -> None:
    assert states(judged(fmt, 0, 0), HEALS) == states(judged(fmt, 0, 0), WRONG) == set()  # what is put in their place is right
    for shift in (7, 100):
        found = judged(fmt, shift, shift)
        assert (states(found, HEALS), states(found, WRONG)) == (SHIFTED, set())
    for q, k in ((7, 0), (0, 7), (7, 8)):
        found = judged(fmt, q, k)
        assert states(found, HEALS) == set()
        assert states(found, WRONG) == {key for key, shift in ((("q_post_rope", 0), q), (("k_post_rope", 0), k)) if shift}


NEIGHBOURS = np.argsort(np.concatenate([np.arange(0, H, 2), np.arange(1, H, 2)]))
ANY = np.random.default_rng(3).permutation(H)


def permuted(captures: Captures, order: Any, held: dict[str, str]) -> Captures:
    """A capture whose lanes are in another order in some stages, in their q part, their k part or both."""
    arrays: dict[Key, Any] = dict(captures)
    parts = {"q": slice(0, HEADS * H), "k": slice(HEADS * H, HEADS * H + 2 * H), "only": slice(None)}
    for key in arrays:
        for part in held.get(key[0], "").split():
            value = np.array(arrays[key])
            turn = value[:, parts[part]]
            value[:, parts[part]] = turn.reshape(len(turn), -1, H)[:, :, order].reshape(turn.shape)
            arrays[key] = value
    return Captures(arrays, captures.manifest)


EVERYWHERE = {"qkv_matmul": "q k", "qkv_bias": "q k", "q_post_rope": "only", "k_post_rope": "only", "k_cache": "only"}
TURNED = {"q_post_rope": "only", "k_post_rope": "only", "k_cache": "only"}


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("order", [NEIGHBOURS, ANY], ids=["neighbours", "any"])
def test_an_order_of_lanes_common_to_queries_and_keys_heals(fmt: str, order: Any) -> None:
    plain = capture(QWEN2, IDS, fmt)
    for held in (EVERYWHERE, TURNED):
        found = local(permuted(plain, order, held), QWEN2, profile(fmt))
        assert states(found, WRONG) == set()
        # the product before a fused bias is derived: it has no verdict
        assert states(found, HEALS) == {(stage, layer) for stage in held if stage != "qkv_matmul" for layer in (0, 1)}
        assert all("order of the lanes" in r.reason for r in found if r.state == HEALS)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(
    "held",
    [
        {"q_post_rope": "only"},  # k is as it should be
        {"k_post_rope": "only", "k_cache": "only"},
        {"q_post_rope": "only", "k_post_rope": "only"},  # what is kept is not what was rotated
        {"qkv_bias": "q k"},  # permuted weights under a rotation of halves
    ],
    ids=str,
)
def test_an_order_of_lanes_of_one_alone_is_wrong(fmt: str, held: dict[str, str]) -> None:
    found = local(permuted(capture(QWEN2, IDS, fmt), NEIGHBOURS, held), QWEN2, profile(fmt))
    assert states(found, HEALS) == set()
    assert states(found, WRONG)


@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_rotated_neighbours_are_no_gauge(arch: str, folders: Callable[[str], Path]) -> None:
    """Other pairs in both q and k, of weights that are in halves: the product changes, and both are wrong."""
    data = OwnSide(folders(arch)).model_data()
    edits = [e for stage in ("q_post_rope", "k_post_rope") for e in faults.FAULTS["rope-pairs"].edits(stage, 0, data["flags"])]
    report = hunted(folders(arch), tuple(IDS[:9]), edits)
    assert {f.key for f in report.judged.wrong} == {("q_post_rope", 0), ("k_post_rope", 0)}
    assert {f.kind for f in report.judged.wrong} == {"rope-pairs"}


# ---- engines that nobody here wrote ----------------------------------------------------------------------------------------------------


@pytest.mark.foreign
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_hugging_face_shifted(dtype: str, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own function that rotates q and k, given the table of other positions for both, or for q alone; then its own table."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from aprender.sides.hf import HFSide

    side = HFSide(str(folders("llama")), dtype)
    data = witness.ModelData(**side.model_data())
    table, home = side.model.model.rotary_emb, sys.modules[type(side.model.model.layers[0].self_attn).__module__]
    right, forward = home.apply_rotary_pos_emb, table.forward

    def rotated(both: bool) -> Callable[..., Any]:
        def apply(q: Any, k: Any, cos: Any, sin: Any, *more: Any, **named: Any) -> Any:
            far = forward(q, torch.arange(cos.shape[1])[None] + 7)
            return right(q, k, *far, *more, **named)[0], right(q, k, *(far if both else (cos, sin)), *more, **named)[1]

        return apply

    def found() -> list[StageResult]:
        return local(side.capture(IDS), data, side.profile)

    assert states(found(), HEALS) == set()
    everywhere = {(stage, layer) for stage, _ in SHIFTED for layer in (0, 1)}
    with monkeypatch.context() as patch:
        patch.setattr(home, "apply_rotary_pos_emb", rotated(True))
        assert (states(found(), WRONG), states(found(), HEALS)) == (set(), everywhere)
        patch.setattr(home, "apply_rotary_pos_emb", rotated(False))
        assert (states(found(), WRONG), states(found(), HEALS)) == ({("q_post_rope", 0), ("q_post_rope", 1)}, set())
    monkeypatch.setattr(table, "forward", lambda x, position_ids: forward(x, position_ids + 7))
    assert (states(found(), WRONG), states(found(), HEALS)) == (set(), everywhere | {("rope_table", None)})


@pytest.mark.foreign
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_llama_cpp_with_its_lanes_unsaid(peer: llamacpp.Peer, kind: str, tmp_path: Path) -> None:
    """Llama's q and k have neighbours as partners there: weights, rotation and cache alike.  Said it is no matter, unsaid it heals."""
    from aprender.sides.llamacpp import LlamaCppSide

    side = LlamaCppSide(tiny.save_gguf(tiny.Shape("llama"), tmp_path / "model.gguf", kind))
    captures, data = side.capture(IDS), witness.ModelData(**side.model_data())
    held = ("qkv_matmul", "q_post_rope", "k_post_rope", "k_cache")

    def unsaid(names: tuple[str, ...]) -> list[StageResult]:
        notes = {k: dataclasses.replace(n, lanes=HALVES) if k[0] in names else n for k, n in captures.manifest.tensors.items()}
        return local(Captures(captures, dataclasses.replace(captures.manifest, tensors=notes)), data, side.profile)

    assert states(unsaid(()), HEALS) == states(unsaid(()), WRONG) == set()
    found = unsaid(held)
    assert (states(found, HEALS), states(found, WRONG)) == ({(stage, layer) for stage in held for layer in (0, 1)}, set())
    assert states(unsaid(("q_post_rope",)), HEALS) == set()
    assert states(unsaid(("q_post_rope",)), WRONG) >= {("q_post_rope", 0), ("q_post_rope", 1)}
