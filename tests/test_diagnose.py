"""What kind of fault a wrong stage has: planted faults by name, foreign ones never by a wrong name.

Truth: what was planted.  Faults of the catalogue are planted in our own engine through its edits; the others in the NumPy engine of
``hf_like.py``, by functions of this file that share nothing with the candidates of ``judge.diagnose``.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import CANARY, PROMPT, write_folder
from hf_like import FORMATS, capture, model, profile, rounded, run

import aprender
from aprender import arithmetic
from aprender.judge import faults, planting, witness
from aprender.judge.diagnose import UNKNOWN, Diagnosis
from aprender.judge.fits import FITTED, SEARCHED
from aprender.judge.local import WRONG, local
from aprender.manifest import CAPTURED, DERIVED
from aprender.report.terminal import console, render
from aprender.sides.own import OwnSide

IDS = [int(i) for i in np.random.default_rng(7).integers(0, 112, 21)]
QWEN2 = model(tiny.Shape())
H, HEADS, KV, DIM = 24, 4, 2, 64
POSITIONS = np.arange(len(IDS))
SEEN = np.tril(np.ones((len(IDS), len(IDS)), bool))
F32 = np.float32


@pytest.fixture(autouse=True)
def _time_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested is what is found, on however slow a machine."""
    monkeypatch.setattr("aprender.judge.local.BUDGET", 300.0)


# ---- the catalogue, planted in our own engine ------------------------------------------------------------------------------------------


def planted(path: Path, ids: tuple[int, ...], name: str, key: tuple[str, int | None]) -> Diagnosis | None:
    """The diagnosis of the first wrong stage with a fault at one site; None if the fault moved no bit."""
    data = OwnSide(path).model_data()
    spelled = key[0] if key[1] is None else f"{key[1]}.{key[0]}"
    edits = planting.plant(f"{name}@{spelled}", data["flags"], data["hparams"]).edits
    captures = OwnSide(path, edits=edits).capture(ids)
    found = [r for r in local(captures, witness.ModelData(**data), arithmetic.profile("exact")) if r.state == WRONG]
    assert all(r.key == key for r in found)
    return found[0].diagnosis if found else None


@pytest.mark.parametrize("shape", tiny.SHAPES[::3], ids=str)
def test_every_fault_of_the_catalogue_is_named(shape: tiny.Shape, tmp_path: Path) -> None:
    """The six faults at their sites in tiny models (the last two of each): right kind, no tie, alpha 1."""
    folder = write_folder(tmp_path / "model", shape)
    ids = tuple(np.random.default_rng(5).integers(0, shape.vocab, 9).tolist())
    for name in ("transposed", "eps", "rope-pairs", "no-bias", "gqa-tile", "no-residual"):
        for key in faults.FAULTS[name].sites(shape.flags, shape.hparams)[-2:]:
            found = planted(folder, ids, name, key)
            assert found is not None, (name, key)
            assert (found.kind, found.ties) == (name, ()), (name, key, found.sentence)
            assert found.alpha == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("transposed", ("qkv_matmul", 3)),
        ("transposed", ("lm_head", None)),
        ("eps", ("attn_norm", 0)),
        ("rope-pairs", ("k_post_rope", 1)),
        ("no-bias", ("qkv_bias", 2)),
        ("gqa-tile", ("attn_scores", 0)),
        ("gqa-tile", ("attention", 2)),
        ("no-residual", ("post_attn_residual", 1)),
    ],
    ids=str,
)
def test_the_catalogue_in_trained_weights(name: str, key: tuple[str, int | None]) -> None:
    found = planted(CANARY / "canary.gguf", PROMPT, name, key)
    assert found is not None
    assert (found.kind, found.ties) == (name, ())
    assert found.look_at


# ---- faults in another engine ----------------------------------------------------------------------------------------------------------

Values = dict[tuple[str, int | None], Any]


class Bug:
    """What a mutated engine would compute at a stage of layer 0, with the roundings of that engine; rounded once more when kept."""

    def __init__(self, fmt: str) -> None:
        self.fmt, self.v = fmt, run(QWEN2, IDS, fmt)

    def w(self, *names: str) -> list[Any]:
        return [np.asarray(QWEN2.weights[name, None if (name, None) in QWEN2.weights else 0], F32) for name in names]

    def at(self, stage: str) -> Any:
        return self.v[stage, None if (stage, None) in self.v else 0]

    def qkv(self, order: tuple[int, ...] = (0, 1, 2), bias: tuple[float, ...] = (1, 1, 1), rows: Any = None) -> Any:
        weights, biases = self.w("attn_q", "attn_k", "attn_v"), self.w("attn_q_bias", "attn_k_bias", "attn_v_bias")
        if rows is not None:
            weights[:2] = [w.reshape(-1, H, DIM)[:, rows].reshape(-1, DIM) for w in weights[:2]]
        b = np.concatenate([biases[i] * F32(f) for i, f in zip(order, bias, strict=True)])
        return self.at("attn_norm") @ np.concatenate([weights[i] for i in order]).T + b

    def table(self, theta: float = 1e6, positions: Any = POSITIONS) -> Any:
        exponent = np.arange(0, H, 2, dtype=F32) / F32(H)
        angle = np.asarray(positions, F32)[:, None] * (F32(1) / (theta ** exponent.astype(np.float64)).astype(F32))
        return np.concatenate([np.cos(angle), np.sin(angle)], axis=1)

    def turned(self, table: Any = None, pairs: bool = False, flip: float = 1.0) -> Any:
        x = self.at("qkv_bias")[:, : HEADS * H].reshape(len(IDS), HEADS, H)
        table = rounded(self.table() if table is None else table, self.fmt)
        cos, sin = (part[:, None] for part in np.hsplit(table, 2))
        a, b = (x[..., 0::2], x[..., 1::2]) if pairs else np.split(x, 2, axis=2)

        def r(y: Any) -> Any:
            return rounded(y, self.fmt)

        first, second = r(a * cos) + r(-b * sin * F32(flip)), r(b * cos) + r(a * sin * F32(flip))
        out = np.stack([first, second], axis=3) if pairs else np.concatenate([first, second], axis=2)
        return out.reshape(len(IDS), -1)

    def heads(self, stage: str, how: str = "repeat") -> Any:
        x = self.at(stage).reshape(len(IDS), -1, H).transpose(1, 0, 2)
        return x if len(x) == HEADS else np.tile(x, (2, 1, 1)) if how == "tile" else np.repeat(x, 2, axis=0)

    def scores(self, scale: float = H**-0.5, how: str = "repeat") -> Any:
        return rounded(self.heads("q_post_rope") @ self.heads("k_cache", how).transpose(0, 2, 1), self.fmt) * F32(scale)

    def soft(self, seen: Any) -> Any:
        s = np.where(seen, rounded(self.scores(), self.fmt), -np.inf)
        with np.errstate(invalid="ignore"):
            e = np.exp(s - s.max(axis=2, keepdims=True))
            return e / e.sum(axis=2, keepdims=True, dtype=F32)

    def norm(self, x: str, w: Any, eps: float = 1e-6) -> Any:
        rows = self.at(x)
        return rounded(rows * (F32(1) / np.sqrt(np.mean(rows * rows, axis=1, keepdims=True, dtype=F32) + F32(eps))), self.fmt) * w

    def block(self, row: int, columns: slice, factor: float) -> Any:
        w = self.w("ffn_gate")[0].copy()
        w[row, columns] *= F32(factor)
        return self.at("ffn_norm") @ w.T


def _with(x: Any, index: Any, value: Any) -> Any:
    out = x.copy()
    out[index] = value
    return out


def _gelu(x: Any) -> Any:
    return F32(0.5) * x * (F32(1) + np.vectorize(math.erf)(x / np.sqrt(2)).astype(F32))


INTERLEAVED = np.argsort(np.concatenate([np.arange(0, H, 2), np.arange(1, H, 2)]))
BUGS: list[tuple[str, str, Callable[[Bug], Any]]] = [
    ("no-bias", "qkv_bias", lambda b: b.qkv(bias=(0, 0, 0))),
    ("no-bias", "qkv_bias", lambda b: b.qkv(bias=(1, 0, 1))),
    ("bias-twice", "qkv_bias", lambda b: b.qkv(bias=(2, 2, 2))),
    ("kv-swap", "qkv_bias", lambda b: b.qkv((0, 2, 1))),
    ("qk-permuted", "qkv_bias", lambda b: b.qkv(rows=INTERLEAVED)),
    ("swapped-weights", "ffn_gate", lambda b: b.at("ffn_norm") @ b.w("ffn_up")[0].T),
    ("transposed", "ffn_up", lambda b: b.at("ffn_norm") @ b.w("ffn_up")[0].reshape(DIM, -1)),
    ("block", "ffn_gate", lambda b: b.block(77, slice(32, 64), 2)),
    ("block", "ffn_gate", lambda b: b.block(77, slice(32, 64), 0)),
    ("block", "ffn_gate", lambda b: b.block(5, slice(17, 18), 1.5)),
    ("rope-pairs", "q_post_rope", lambda b: b.turned(pairs=True)),
    ("theta", "rope_table", lambda b: b.table(1e4)),
    ("theta", "rope_table", lambda b: b.table(123456.0)),
    ("theta", "q_post_rope", lambda b: b.turned(b.table(1e4))),
    ("rope-position", "rope_table", lambda b: b.table(positions=POSITIONS * 2)),  # one shift for all would heal: test_gauge.py
    ("no-rope", "rope_table", lambda b: b.table(positions=POSITIONS * 0)),
    ("rope-position", "q_post_rope", lambda b: b.turned(b.table(positions=POSITIONS - 1))),
    ("no-rope", "q_post_rope", lambda b: b.at("qkv_bias")[:, : HEADS * H]),
    ("gqa-tile", "attn_scores", lambda b: np.where(SEEN, b.scores(how="tile"), 0)),
    ("gqa-tile", "attention", lambda b: (b.at("attn_softmax") @ b.heads("v_cache", "tile")).transpose(1, 0, 2).reshape(len(IDS), -1)),
    ("no-scale", "attn_scores", lambda b: np.where(SEEN, b.scores(1.0), 0)),
    ("scale-base", "attn_scores", lambda b: np.where(SEEN, b.scores(1.061 * H**-0.5), 0)),
    ("mask-next", "attn_softmax", lambda b: b.soft(np.tri(len(IDS), len(IDS), 1, bool))),
    ("mask-self", "attn_softmax", lambda b: np.nan_to_num(b.soft(np.tri(len(IDS), len(IDS), -1, bool)))),
    ("no-mask", "attn_softmax", lambda b: b.soft(np.ones_like(SEEN))),
    ("window", "attn_softmax", lambda b: b.soft(SEEN & ~np.tri(len(IDS), len(IDS), -7, bool))),
    ("eps", "attn_norm", lambda b: b.norm("embedding", b.w("attn_norm")[0], 1e-3)),
    ("eps", "attn_norm", lambda b: b.norm("embedding", b.w("attn_norm")[0], 0.3)),
    ("norm-plus-one", "ffn_norm", lambda b: b.norm("post_attn_residual", F32(1) + b.w("ffn_norm")[0])),
    ("no-norm-weight", "ffn_norm", lambda b: b.norm("post_attn_residual", F32(1))),
    ("no-residual", "post_attn_residual", lambda b: b.at("attn_out")),
    ("no-branch", "post_ffn_residual", lambda b: b.at("post_attn_residual")),
    ("gelu", "ffn_silu", lambda b: _gelu(b.at("ffn_gate"))),
    ("no-activation", "ffn_silu", lambda b: b.at("ffn_gate")),
    ("no-gate", "ffn_swigl", lambda b: b.at("ffn_up")),
    ("embedding-scale", "embedding", lambda b: b.at("embedding") * F32(8)),
    ("embed-head", "lm_head", lambda b: b.at("final_norm") @ b.w("token_embd")[0].T),
    ("lost-head", "attention", lambda b: np.where(np.arange(HEADS * H) // H == 1, 0, b.at("attention"))),
    ("lost-head", "attention", lambda b: np.where(np.arange(HEADS * H) // H == 2, 0, b.at("attention"))),
    ("zero", "attn_out", lambda b: b.at("attn_out") * 0),
    ("stale-row", "ffn_up", lambda b: _with(b.at("ffn_up"), 13, b.at("ffn_up")[12])),
    ("nan", "ffn_out", lambda b: _with(b.at("ffn_out"), (1, 1), np.nan)),
]


def found_in(bug: Bug, stage: str, value: Any) -> Diagnosis:
    """The diagnosis of one stage that holds another value; scores of a masked softmax are recomputed, as on the real side."""
    key = (stage, None if (stage, None) in bug.v else 0)
    scores = DERIVED if stage == "attn_softmax" else CAPTURED
    captures = capture(QWEN2, IDS, bug.fmt, lambda s, i, right: value if (s, i) == key else right, scores=scores)
    found = [r for r in local(captures, QWEN2, profile(bug.fmt)) if r.state == WRONG]
    assert found[0].key == key
    assert found[0].diagnosis is not None
    return found[0].diagnosis


@pytest.mark.parametrize("fmt", FORMATS)
def test_faults_of_another_engine(fmt: str) -> None:
    """42 bugs: each by name, or at worst two of them unknown; none by a wrong name."""
    bug, unnamed = Bug(fmt), []
    for i, (kind, stage, make) in enumerate(BUGS):
        found = found_in(bug, stage, make(bug))
        if found.kind == UNKNOWN:
            unnamed.append((i, kind, stage))
            assert found.shapes
        else:
            assert kind in (found.kind, *found.ties), (i, stage, found.sentence)
            assert found.kind == kind, (i, stage, found.sentence)
            assert found.alpha is None or found.alpha == pytest.approx(1.0, abs=0.1)
    print("unknown:", unnamed)
    assert len(unnamed) <= 2


def _int8(b: Bug) -> Any:
    x = b.at("ffn_swigl")
    step = np.abs(x).max(axis=1, keepdims=True) / 127
    return (np.rint(x / step) * step) @ b.w("ffn_down")[0].T


def _layer_norm(b: Bug) -> Any:
    x = b.at("embedding")
    x = x - x.mean(axis=1, keepdims=True)
    return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + F32(1e-6)) * b.w("attn_norm")[0]


NOISE = np.random.default_rng(1).standard_normal((DIM, HEADS * H)).astype(F32)
FOREIGN: list[tuple[str, str, Callable[[Bug], Any]]] = [
    ("DIFF", "ffn_silu", lambda b: b.at("ffn_gate") / (1 + np.exp(-1.1 * b.at("ffn_gate")))),
    ("NORM=", "q_post_rope", lambda b: b.turned(np.hstack(np.hsplit(b.table(), 2)[::-1]))),
    ("POS0", "q_post_rope", lambda b: b.turned(flip=-1.0)),
    ("PERM", "ffn_up", lambda b: _with(b.at("ffn_up"), np.s_[:, [3, 99]], b.at("ffn_up")[:, [99, 3]])),
    ("PERM", "ffn_out", lambda b: b.at("ffn_out")[:, ::-1]),
    ("DIFF", "attn_out", lambda b: b.at("attention") @ (b.w("attn_output")[0] * (1 + F32(0.01) * NOISE)).T),
    ("DIFF", "ffn_out", _int8),
    ("FUNC", "attn_scores", lambda b: np.where(SEEN, 2 * np.tanh(b.scores() / 2), 0)),
    ("SCALE", "ffn_up", lambda b: b.at("ffn_up") * F32(1.5)),
    ("ROWSCALE", "ffn_out", lambda b: b.at("ffn_out") * np.linspace(0.5, 1.5, len(IDS), dtype=F32)[:, None]),
    ("BIAS", "attn_out", lambda b: b.at("attn_out") + NOISE[:, 0]),
    ("HEADBLK", "attention", lambda b: np.where(np.arange(HEADS * H) // H == 1, F32(0.5), F32(1)) * b.at("attention")),
    ("TAIL", "ffn_up", lambda b: np.where(np.arange(len(IDS))[:, None] >= 13, b.at("ffn_up")[::-1] * F32(1.3), b.at("ffn_up"))),
    ("LAST=", "ffn_up", lambda b: np.where(np.arange(len(IDS))[:, None] < 20, b.at("ffn_up") ** 3, b.at("ffn_up"))),
    ("TOKEN", "ffn_up", lambda b: _with(b.at("ffn_up"), 20, b.at("ffn_up")[20] ** 2)),
    ("CHAOS", "ffn_out", lambda b: np.random.default_rng(2).standard_normal((len(IDS), DIM))),
    ("BLOCK", "ffn_up", lambda b: b.at("ffn_up") * np.where(np.arange(160) % 16 == 3, F32(1.2), F32(1))),
    ("DIFF", "attn_norm", _layer_norm),
    ("CHANNEL", "ffn_up", lambda b: _with(b.at("ffn_up"), np.s_[:, 7], b.at("ffn_up")[:, 7] ** 2)),
    ("DIFF", "post_attn_residual", lambda b: 2 * b.at("embedding") + b.at("attn_out")),
]


@pytest.mark.parametrize("fmt", FORMATS)
def test_faults_that_no_catalogue_has(fmt: str) -> None:
    """20 of another nature: unknown, with the shape that fits, and with what to look at."""
    bug = Bug(fmt)
    for i, (code, stage, make) in enumerate(FOREIGN):
        found = found_in(bug, stage, make(bug))
        assert found.kind == UNKNOWN, (i, stage, found.sentence)
        assert code in {s.code for s in found.shapes}, (i, stage, found.sentence)
        assert found.look_at[-1].startswith("operation")
        assert "unknown" in found.sentence


def test_identical_faults_are_a_tie() -> None:
    bug = Bug("f32")
    found = found_in(bug, "q_post_rope", bug.at("qkv_bias")[:, : HEADS * H])
    assert (found.kind, found.ties) == ("no-rope", ("rope-position",))  # position 0 for every token rotates nothing
    assert "as likely: rope-position" in found.sentence


@pytest.mark.parametrize("fmt", FORMATS)
def test_one_token_cannot_tell_an_epsilon_from_a_scale(fmt: str) -> None:
    """One row, one factor: both leave only rounding; rows of different size tell them apart."""
    eps = 1e-2

    def planted(stage: str, layer: int | None, value: Any) -> Any:
        x = QWEN2.weights["token_embd", None][IDS[: len(value)]]
        r = F32(1) / np.sqrt(np.mean(x * x, axis=1, keepdims=True, dtype=F32) + F32(eps))
        return rounded(x * r, fmt) * QWEN2.weights["attn_norm", 0] if (stage, layer) == ("attn_norm", 0) else value

    for tokens, ties in ((1, ("free-scale",)), (len(IDS), ())):
        found = [r for r in local(capture(QWEN2, IDS[:tokens], fmt, planted), QWEN2, profile(fmt)) if r.state == WRONG]
        assert [r.key for r in found] == [("attn_norm", 0)]
        assert found[0].diagnosis is not None
        assert (found[0].diagnosis.kind, found[0].diagnosis.ties) == ("eps", ties)


def test_a_share_explained_is_no_proof() -> None:
    """SiLU of slope 1.1 is 98 % explained by GELU (noise of the fit aside): that is not its name."""
    bug = Bug("f32")
    x = bug.at("ffn_gate")
    error, due = x / (1 + np.exp(-1.1 * x)) - x / (1 + np.exp(-x)), _gelu(x) - x / (1 + np.exp(-x))
    alpha = (error * due).sum() / (due * due).sum()
    assert 1 - np.square(error - alpha * due).sum() / np.square(error).sum() > 0.95
    found = found_in(bug, "ffn_silu", x / (1 + np.exp(-1.1 * x)))
    assert found.kind == UNKNOWN
    near = {n.kind: n for n in found.nearest}
    assert list(near) == [n.kind for n in found.nearest]
    assert "gelu" in near
    assert near["gelu"].alpha == pytest.approx(alpha, abs=0.05)  # weighted by the noise of each element, so not the very number
    assert near["gelu"].explained > 0.95
    assert [n.explained for n in found.nearest] == sorted((n.explained for n in found.nearest), reverse=True)
    assert "Nearest, and no verdict" in found.sentence


def test_what_is_confirmed_needs_no_nearest() -> None:
    bug = Bug("f32")
    assert found_in(bug, "ffn_silu", _gelu(bug.at("ffn_gate"))).nearest == ()
    chaos = found_in(bug, "ffn_out", np.random.default_rng(2).standard_normal((len(IDS), DIM)))
    assert (chaos.kind, chaos.nearest) == (UNKNOWN, ())  # nothing explains half of it


def test_a_scale_is_near_and_no_kind() -> None:
    found = found_in(Bug("f16"), "ffn_up", Bug("f16").at("ffn_up") * F32(1.5))
    assert (found.kind, found.nearest[0].kind) == (UNKNOWN, "free-scale")
    assert found.nearest[0].detail.startswith("1.5 times")


# ---- the rest ----------------------------------------------------------------------------------------------------------------------------


def test_clean_runs_are_not_diagnosed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a clean run was diagnosed")

    monkeypatch.setattr("aprender.judge.local.diagnose", never)
    for fmt in FORMATS:
        found = local(capture(QWEN2, IDS, fmt), QWEN2, profile(fmt))
        assert all(r.diagnosis is None for r in found)
    with pytest.raises(AssertionError, match="diagnosed"):
        found_in(Bug("f32"), "ffn_up", Bug("f32").at("ffn_up") * F32(1.5))


def test_names_are_unique_and_cover_what_can_be_planted() -> None:
    rows = [row.name for row in (*faults.ROWS, *faults.SUSPECT_ROWS)]
    searched = [slug for slug, _, _ in SEARCHED]
    assert len(set(rows)) == len(rows)
    assert len(set(searched)) == len(searched)
    assert {row.slug for row in FITTED} <= set(rows)
    assert set(searched) - set(rows) == {"zero", "swapped-parts", "rope-position"}


def test_the_report_says_the_kind() -> None:
    report = aprender.compare(plant="transposed@lm_head", answer=0)
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["first"]["kind"] == data["diagnosis"]["kind"] == "transposed"
    assert data["diagnosis"]["alpha"] == pytest.approx(1.0)
    assert any("output.weight" in place for place in data["diagnosis"]["look_at"])
    out = io.StringIO()
    console(out).print(render(report))
    assert "Kind transposed" in out.getvalue()
    assert aprender.compare(answer=0).to_json()["diagnosis"] is None
