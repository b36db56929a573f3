"""A cut of the fault matrix, and the matrix itself under test: its plants, its score, its record.

Truth: what was planted is known.  What a planted file means is read by the ``gguf`` package and held against the bug report done in NumPy.
The whole matrix is ``scripts/fault_matrix.py``; its record is ``evidence/fault-matrix``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import llamacpp
import numpy as np
import pytest
import tiny

from aprender.captures import Captures
from aprender.judge import witness
from aprender.judge.diagnose import Diagnosis
from aprender.judge.faultrow import AGREE, HEALS, REFUSED
from aprender.judge.faults import FAULTS
from aprender.judge.local import StageResult
from aprender.judge.witness import ModelData
from aprender.sides.own import OwnSide
from aprender.stages import Key

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import fault_matrix
import matrix_bytes
import matrix_gguf
import matrix_models
import matrix_own
import matrix_record
import matrix_report
from matrix_case import Bench, Case, Judged, gate, rank, score
from matrix_power import Power

Row = dict[str, Any]


def cut(population: str, arch: str, fmt: str, mode: str, sites: int = 1) -> argparse.Namespace:
    """One model of a population."""
    return fault_matrix.arguments(
        ["--only", population, "--archs", arch, "--formats", fmt, "--modes", mode, "--seeds", "1", "--sites", str(sites)]
    )


def check(rows: list[Row], due: int) -> None:
    """Every fault at its stage and by its name, nothing else accused, the controls and the untouched run left alone."""
    scored = matrix_report.scored(rows)
    assert len(scored) >= due
    assert not [(row["fault"], row["site"], row["false"]) for row in rows if row["false"]]
    assert not [(row["fault"], row["due"], row["wrong"]) for row in scored if not row["stage"]]
    assert not [(row["fault"], row["due"], row["kind"], row["ties"]) for row in scored if row["rank"] != 1]
    assert not [row["fault"] for row in rows if row.get("right") is False]
    assert matrix_report.quiet(rows)[0] >= 1


# ---- the cut ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "fmt", "mode"), [("qwen2", "Q4_K", "prefill"), ("qwen3", "F32", "decode")])
def test_own(arch: str, fmt: str, mode: str) -> None:
    """A site of every row.  Token by token there is no later key to see and no row before the last: those change no bit, and only those."""
    rows = [score(case, case.judge()) for case in matrix_own.cases(cut("own", arch, fmt, mode))]
    check(rows, 38)
    blind = {"mask-next", "no-mask", "stale-row"} if mode == "decode" else set()
    assert {row["fault"] for row in matrix_report.planted(rows) if row["excluded"]} == blind
    assert all(row["changed"] != row["excluded"] for row in matrix_report.planted(rows))


@pytest.mark.foreign
@pytest.mark.parametrize(("arch", "fmt", "mode"), [("qwen2", "Q4_K", "prefill"), ("llama", "Q8_0", "decode")])
def test_gguf(arch: str, fmt: str, mode: str) -> None:
    """A site of every plant, by real llama.cpp; all are predicted to be visible, so none may be excluded."""
    reason = llamacpp.missing()
    if reason:
        pytest.skip(reason)
    rows = [score(case, case.judge()) for case in matrix_gguf.cases(cut("gguf", arch, fmt, mode))]
    check(rows, 14)
    assert not [row["fault"] for row in matrix_report.planted(rows) if row["excluded"]]


@pytest.mark.foreign
def test_hf() -> None:
    """Some of the patched transformers modules, in bfloat16; ``test_hf_plants.py`` has a site of each."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import matrix_hf

    args = fault_matrix.arguments(["--only", "hf", "--archs", "qwen2", "--dtypes", "bfloat16", "--seeds", "1", "--sites", "1"])
    chosen = matrix_models.some(list(matrix_hf.cases(args)), 12, 0)  # the first is the untouched run
    rows = [score(case, case.judge()) for case in chosen]
    check(rows, 9)
    assert all(row["predicted"] is False for row in matrix_report.planted(rows) if row["excluded"])


def test_judging_what_changed_is_judging_all() -> None:
    """The same verdict of every stage whether or not those are judged again that cannot have changed."""
    some, whole = (matrix_own.Engine("qwen2", "Q8_0", "pieces", 0, every) for every in (False, True))
    for name, key in (("eps", ("ffn_norm", 1)), ("gate-up", ("ffn_silu", 2)), ("shift", ("q_post_rope", 0))):
        row = (FAULTS | matrix_own.faults.CONTROLS)[name]
        captures = some.capture(row.edits(*key, matrix_models.shape("qwen2").flags))
        plain = [dataclasses.replace(r, diagnosis=None) for r in some.bench._local(captures)]
        assert plain == [dataclasses.replace(r, diagnosis=None) for r in whole.bench._local(captures)]
        assert {r.state for r in plain} & {"wrong", "heals"}


@pytest.mark.parametrize("name", ["mask-next", "no-mask"])
def test_masks_of_pieces(name: str) -> None:
    """In pieces of four a token sees later keys to the end of its piece only; one token that sees one more key has neither fault."""
    engine, key = matrix_own.Engine("qwen2", "F32", "pieces", 0, False), ("attn_softmax", 1)
    judged = engine.judge(FAULTS[name], key)
    assert ([r.key for r in judged.wrong], judged.diagnosis.kind) == ([key], name)
    arrays = {other: np.array(array) for other, array in engine.bench.clean.items()}
    scores = arrays["attn_scores", 1]
    seen = np.tril(np.ones(scores.shape[1:], bool))
    seen[4, 5] = True
    arrays[key] = witness.softmax(scores.astype(np.float64), seen).astype(np.float32)
    odd = engine.bench.judge(name, key, Captures(arrays, engine.bench.clean.manifest))
    assert (odd.wrong[0].key, odd.diagnosis.kind) == (key, "unknown")


# ---- power -----------------------------------------------------------------------------------------------------------------------------


def loud(scale: float, path: Path) -> Bench:
    """A model whose residual stream is so many times larger."""
    shape = matrix_models.shape("llama")
    made = tiny.weights(shape)
    made["model.embed_tokens.weight"] = made["model.embed_tokens.weight"] * np.float32(scale)
    side = OwnSide(tiny.save_gguf(shape, path, made=made))
    return Bench(side.capture(matrix_models.prompt(0)), ModelData(**side.model_data()), side.profile)


@pytest.mark.parametrize(("scale", "visible"), [(1.0, True), (2.0**20, False)])
def test_power_is_predicted_before_the_run(scale: float, visible: bool, tmp_path: Path) -> None:
    """Epsilon, 1e-5 for 1e-6, changes a norm by half of 9e-6 over the mean square: 7e-5 for 1/16, 1000 steps of float32; 7e-17 for 7e10."""
    bench, row, key = loud(scale, tmp_path / "model.gguf"), FAULTS["eps"], ("attn_norm", 0)
    assert bench.power("eps", key, key).visible is visible
    captures = OwnSide(tmp_path / "model.gguf", edits=row.edits(*key, bench.model.flags)).capture(matrix_models.prompt(0))
    judged = bench.judge("eps", key, captures)
    assert judged.changed is visible
    assert [r.key for r in judged.wrong] == ([key] if visible else [])
    made = score(Case("own", "eps", key, "llama", "F32", "prefill", 0, lambda: judged), judged)
    assert (made["excluded"], made["predicted"]) == (not visible, visible)


def test_twins_predict_the_same_bits() -> None:
    """No rotation at all is position 0 for each of the tokens that come one by one; another base is neither."""
    bench = matrix_own.Engine("qwen2", "F32", "prefill", 0, False).bench
    table = ("rope_table", None)
    assert bench.power("no-rope", table, table).twins == ("decode-pos-0",)
    assert bench.power("theta", table, table).twins == ()


# ---- the score can fail ----------------------------------------------------------------------------------------------------------------

HERE, LATER, EARLIER = ("attn_norm", 1), ("ffn_norm", 1), ("attn_norm", 0)


def found(*keys: Key, kind: str = "eps", ties: tuple[str, ...] = (), **more: Any) -> Judged:
    """A judgement that accuses some stages."""
    wrong = [StageResult(*key, "wrong") for key in keys]
    diagnosis = Diagnosis(*keys[0], kind, ties=ties) if keys else None
    return Judged(wrong, diagnosis, **({"due": (HERE,), "power": Power(True), "cosine": 0.9999, "clean_cosine": 0.99995} | more))


def scored(judged: Judged, population: str = "gguf", fault: str = "eps") -> Row:
    return score(Case(population, fault, HERE, "qwen2", "Q4_K", "prefill", 0, lambda: judged), judged)


def test_the_right_answer_is_right() -> None:
    row = scored(found(HERE))
    assert (row["stage"], row["rank"], row["false"], row["excluded"], row["gate"]) == (True, 1, [], False, "passes")


@pytest.mark.parametrize(
    ("judged", "stage", "place", "false"),
    [
        (found(), False, 0, []),
        (found(LATER), False, 1, ["1.ffn_norm"]),
        (found(EARLIER, HERE), False, 1, ["0.attn_norm"]),
        (found(HERE, LATER), True, 1, ["1.ffn_norm"]),
        (found(HERE, kind="norm-swap"), True, 0, []),
        (found(HERE, kind="unknown"), True, 0, []),
        (found(HERE, kind="norm-swap", ties=("theta", "eps")), True, 3, []),
        (found(HERE, kind="norm-swap", power=Power(True, ("norm-swap",))), True, 1, []),
        (found(HERE, kind="theta", power=Power(True, ("norm-swap",))), True, 0, []),
    ],
)
def test_wrong_answers_are_wrong(judged: Judged, stage: bool, place: int, false: list[str]) -> None:
    row = scored(judged)
    assert (row["stage"], row["rank"], row["false"]) == (stage, place, false)


def test_what_may_be_excluded() -> None:
    """Elsewhere what was predicted invisible; in our engine only what changes no bit, whatever was predicted."""
    for changed in (True, False):
        for visible in (True, False):
            judged = found(changed=changed, power=Power(visible))
            assert scored(judged, "gguf")["excluded"] is not visible
            assert scored(judged, "own")["excluded"] is not changed
    assert scored(found(HERE, power=Power(None)))["excluded"] is False


@pytest.mark.parametrize(
    ("clean", "faulty", "said"), [(0.9995, 0.998, "sees"), (0.9995, 0.9991, "passes"), (0.98, 0.5, "cries"), (1.0, float("nan"), "sees")]
)
def test_the_cosine_gate(clean: float, faulty: float, said: str) -> None:
    assert gate(found(HERE, clean_cosine=clean, cosine=faulty)) == said
    assert gate(found(HERE, cosine=None)) == ""


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("pieces", found(), found(HERE)),
        ("last-token-said", found(), found(refused=True)),
        ("last-token", found(refused=True), found()),
        ("shift", found(HERE), found(LATER)),
        ("shift", found(HERE), found(HERE, same_logits=False)),
    ],
)
def test_controls_can_fail(name: str, good: Judged, bad: Judged) -> None:
    assert scored(good, "own", name)["right"] is True
    assert scored(bad, "own", name)["right"] is False
    assert scored(good, "own", name)["expect"] in (AGREE, REFUSED, HEALS)
    assert scored(found(HERE), "own", "")["right"] is False
    assert scored(found(), "own", "")["right"] is True


def test_the_rank_needs_a_diagnosis() -> None:
    assert rank(dataclasses.replace(found(HERE), diagnosis=None), "eps") == 0


def test_the_page() -> None:
    """Shares are of what is not excluded, 100 % is all of them, and every failure is listed by name."""
    rows = [scored(found(HERE))] * 1999 + [scored(found(LATER, kind="theta")), scored(found(power=Power(False)))]
    text = matrix_report.page(rows, "…")
    assert "2001 faults planted, 1 excluded; stage and layer right first 1999/2000 = 99.9 %" in text
    assert "among the first three 1999/2000 = 99.9 %; 1 false stages" in text
    assert "- eps at 1.attn_norm (qwen2 Q4_K prefill seed 0): due at 1.attn_norm, 1.ffn_norm" in text
    assert "- eps, prefill: predicted invisible, 1 × (sites 1.attn_norm 1; formats Q4_K 1)" in text
    assert "- eps (1.attn_norm): theta" in text
    assert "1999/1999 = 100 %" in matrix_report.page(rows[:1999], "…")


# ---- the record ------------------------------------------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are written one by one; one that was cut off is judged again, the others are not."""
    begun: list[str] = []

    def cases(args: argparse.Namespace) -> Iterator[Case]:
        for fault in ("eps", "theta", "gelu"):
            yield Case("own", fault, HERE, "qwen2", "F32", "prefill", 0, lambda fault=fault: begun.append(fault) or found(HERE, kind=fault))

    monkeypatch.setattr(fault_matrix, "cases", cases)
    args = fault_matrix.arguments(["-o", str(tmp_path)])
    group = next(cases(args)).group
    assert fault_matrix.judged(args, group, frozenset()) == 3
    whole = args.record.read_bytes()
    lines = whole.splitlines(keepends=True)
    args.record.write_bytes(lines[0] + lines[1][:50])
    rows = matrix_record.read(args.record)
    assert [row["fault"] for row in rows] == ["eps"]
    matrix_record.put(args.record, rows)
    assert args.record.read_bytes() == lines[0]
    assert fault_matrix.judged(args, group, frozenset(map(matrix_record.name_of, rows))) == 2
    assert begun == ["eps", "theta", "gelu", "theta", "gelu"]
    fault_matrix.write(args)
    assert [json.loads(text)["fault"] for text in args.record.read_text().splitlines()] == ["eps", "theta", "gelu"]
    assert "3 faults planted" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "row",
    [
        scored(found(HERE)),
        scored(found(LATER, kind="theta", ties=("gelu",))),
        scored(found(changed=False, power=Power(False, ("theta",))), "own"),
        scored(found(HERE, refused=True), "own", "pieces"),
        scored(found(), "own", ""),
    ],
)
def test_a_line_is_read_as_it_was_written(row: Row, tmp_path: Path) -> None:
    """What is left out is what is as it must be: a right answer has a shorter line than any other."""
    matrix_record.put(tmp_path / "record", [row])
    assert matrix_record.read(tmp_path / "record") == [row]
    if row["fault"] == "eps":
        assert (row == scored(found(HERE))) == (len(matrix_record.line(row)) == len(matrix_record.line(scored(found(HERE)))))


@pytest.mark.parametrize("population", ["own", "gguf"])
def test_cases_are_cheap_and_named_apart(population: str) -> None:
    args = fault_matrix.arguments(["--only", population, "--sites", "0"])
    every = list(fault_matrix.cases(args))
    assert len({case.name for case in every}) == len(every)
    assert {case.group for case in every} == set(dict.fromkeys(case.group for case in every))
    groups = [case.group for case in every]
    assert len(list(dict.fromkeys(groups))) == 1 + sum(a != b for a, b in itertools.pairwise(groups))  # one after the other


def test_sites_cover_the_layers() -> None:
    """One site of each fault in each model, and over the models every layer of every fault that can sit in all."""
    args = fault_matrix.arguments(["--only", "own", "--sites", "1"])
    layers: dict[str, set[int | None]] = {}
    for case in fault_matrix.cases(args):
        if case.fault in FAULTS and case.key:
            layers.setdefault(case.fault, set()).add(case.key[1])
    for name, seen in layers.items():
        row, shapes = FAULTS[name], [matrix_models.shape(arch) for arch in tiny.ARCHS]
        assert seen == {key[1] for shape in shapes for key in row.sites(shape.flags, shape.hparams)}, name


# ---- the plants in files ---------------------------------------------------------------------------------------------------------------


def tensors(path: Path) -> dict[str, np.ndarray]:
    """What a file means, by the ``gguf`` package."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape((*t.data.shape[:-1], -1)) for t in gguf.GGUFReader(path).tensors}


def halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a Llama's q or k in the order in which the model computes."""
    return array.reshape(heads, -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)


def same(before: np.ndarray, after: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.array_equal(after, wanted) and not np.array_equal(before, after))


def _pairs(w: np.ndarray) -> np.ndarray:
    return w.reshape(-1, 2, 32, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def _zeroed(axis: int, share: float) -> Callable[[np.ndarray], np.ndarray]:
    def cut(w: np.ndarray) -> np.ndarray:
        keep = np.arange(w.shape[axis]) < w.shape[axis] * share
        return np.where(keep[:, None] if axis == 0 else keep, w, 0)

    return cut


MEANT: dict[str, tuple[Key, str, Callable[[np.ndarray], np.ndarray]]] = {
    "transposed": (("ffn_up", 1), "blk.1.ffn_up.weight", lambda w: w.reshape(w.shape[::-1]).T),
    "qk-permuted": (("qkv_matmul", 2), "blk.2.attn_q.weight", _pairs),
    "zero-lm-head": (("lm_head", None), "output.weight", np.zeros_like),
    "cut-columns": (("ffn_out", 0), "blk.0.ffn_down.weight", _zeroed(1, 0.5)),
    "cut-rows": (("attn_out", 2), "blk.2.attn_output.weight", _zeroed(0, 0.75)),
    "embedding-scale": (("embedding", None), "token_embd.weight", lambda w: 16 * w),
    "norm-plus-one": (("final_norm", None), "output_norm.weight", lambda w: w + np.float32(1)),
}


@pytest.mark.parametrize("fmt", matrix_models.FORMATS)
@pytest.mark.parametrize("name", MEANT)
def test_a_planted_file_means_the_fault(name: str, fmt: str) -> None:
    """Decoded, the planted tensor is the right one with the fault, exactly, and no other tensor has changed."""
    key, tensor, wanted = MEANT[name]
    engine = matrix_gguf.Engine("llama", fmt, "prefill", 0, False, name == "transposed" and fmt not in matrix_bytes.PLAIN)
    right, wrong = tensors(engine.path), tensors(engine.planted(name, key))
    turn = (lambda a: halves(a, 4)) if tensor.endswith("attn_q.weight") else (lambda a: a)
    assert same(right[tensor], wrong[tensor], _back(turn, wanted(turn(right[tensor])), right[tensor]))
    changed = {other for other in right if not np.array_equal(right[other], wrong[other])}
    assert changed == ({tensor, tensor.replace("attn_q", "attn_k")} if name == "qk-permuted" else {tensor})


def _back(turn: Callable[[np.ndarray], np.ndarray], wanted: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Rows in the order of the file again: the inverse of ``turn``."""
    order = turn(np.arange(len(like))[:, None])[:, 0] if like.ndim == 2 else slice(None)
    out = np.empty_like(wanted)
    out[order] = wanted
    return out


@pytest.mark.parametrize("fmt", matrix_models.FORMATS)
def test_a_planted_block_is_twice_as_large(fmt: str) -> None:
    """32 weights of one row, from a multiple of 32 on."""
    engine = matrix_gguf.Engine("qwen2", fmt, "prefill", 0, False)
    right, wrong = (tensors(path)["blk.1.ffn_up.weight"] for path in (engine.path, engine.planted("block", ("ffn_up", 1))))
    row, column = np.argwhere(right != wrong)[0]
    first = column // 32 * 32
    wanted = right.copy()
    wanted[row, first : first + 32] *= 2
    assert same(right, wrong, wanted)


def test_sub_scales_of_the_first() -> None:
    """Q6_K: each 16 weights times the first scale of their 256 over their own (the weights are d * scale * q)."""
    engine = matrix_gguf.Engine("qwen2", "Q6_K", "prefill", 0, False)
    key, name = ("ffn_up", 1), "blk.1.ffn_up.weight"
    right, wrong = (tensors(path)[name].reshape(-1, 16, 16) for path in (engine.path, engine.planted("sub-scales", key)))
    raw = next(t for t in gguf.GGUFReader(engine.path).tensors if t.name == name).data.reshape(-1, 210)
    scales = raw[:, 192:208].view(np.int8).astype(np.float32)
    fits = np.where(scales[:, :, None] != 0, right / np.where(scales, scales, 1)[:, :, None] * scales[:, :1, None], wrong)
    assert np.allclose(wrong, fits, rtol=1e-6)
    assert not np.array_equal(right, wrong)
