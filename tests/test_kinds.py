"""Faults of the catalogue in engines that nobody here wrote, by name: real llama.cpp on edited files, real Hugging Face modules patched.

To the judge, which holds the right file, an edited GGUF is an engine that loads or computes something wrongly; a patched module is one that
computes wrongly.  Neither shares a line with what predicts: the edits are NumPy and torch, written here.  Truth: what was planted.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import llamacpp
import numpy as np
import pytest
import tiny
from conftest import write_folder

from aprender.judge.diagnose import Diagnosis
from aprender.judge.local import WRONG, StageResult, local
from aprender.judge.witness import ModelData
from aprender.sides.own import OwnSide

pytestmark = pytest.mark.foreign

IDS = tuple(int(i) for i in np.random.default_rng(11).integers(0, 112, 24))
Made = dict[str, tiny.Array]


def diagnosed(results: Iterable[StageResult]) -> list[Diagnosis]:
    return [r.diagnosis for r in results if r.state == WRONG and r.diagnosis is not None]


@pytest.fixture(autouse=True)
def _time_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested is what is found, on however slow a machine."""
    monkeypatch.setattr("aprender.judge.local.BUDGET", 300.0)


# ---- llama.cpp -------------------------------------------------------------------------------------------------------------------------

SHAPE = tiny.Shape("qwen2", head=16)
WIDE = dataclasses.replace(SHAPE, dim=256, ffn=512, heads=4, kv_heads=2, head=64)
AT = "model.layers.1."
ATTENTION = f"{AT}self_attn."


def _weight(name: str, change: Callable[[tiny.Array], tiny.Array]) -> Callable[[Made], Made]:
    return lambda made: {name: np.ascontiguousarray(change(made[name]), np.float32)}


def _other(**names: str) -> Callable[[Made], Made]:
    """Weights in the place of others; ``_`` is ``.``."""
    return lambda made: {to: made[origin] for to, origin in ((a.replace("__", "."), b) for a, b in names.items())}


def _block(w: tiny.Array) -> tiny.Array:
    out = w.copy()
    out[11, 32:64] *= 2
    return out


def _first(share: float, axis: int) -> Callable[[tiny.Array], tiny.Array]:
    def cut(w: tiny.Array) -> tiny.Array:
        end, out = int(w.shape[axis] * share), np.zeros_like(w)
        out[(slice(None),) * axis + (slice(end),)] = w[(slice(None),) * axis + (slice(end),)]
        return out

    return cut


def _swap(a: str, b: str) -> Callable[[Made], Made]:
    return lambda made: {a: made[b], b: made[a]}


def _exchanged(made: Made) -> Made:
    return _swap(f"{ATTENTION}k_proj.weight", f"{ATTENTION}v_proj.weight")(made)


def _interleaved(made: Made) -> Made:
    """Rows of q and k of layer 1 as neighbours; their biases stay."""
    names = (f"{ATTENTION}q_proj.weight", f"{ATTENTION}k_proj.weight")
    return {name: tiny.permuted(made[name], heads) for name, heads in zip(names, (4, 2), strict=True)}


EXACT_WHEN_QUANTIZED: dict[str, tuple[Callable[[Made], Made], tuple[str, int | None]]] = {
    "qk-permuted": (_interleaved, ("qkv_matmul", 1)),
    "kv-swap": (_exchanged, ("qkv_matmul", 1)),
    "swapped-weights": (_swap(f"{AT}mlp.gate_proj.weight", f"{AT}mlp.up_proj.weight"), ("ffn_gate", 1)),
    "first-layer": (lambda made: {f"{AT}mlp.down_proj.weight": made["model.layers.0.mlp.down_proj.weight"]}, ("ffn_out", 1)),
    "embed-head": (lambda made: {"lm_head.weight": made["model.embed_tokens.weight"]}, ("lm_head", None)),
    "zero-lm-head": (_weight("lm_head.weight", np.zeros_like), ("lm_head", None)),
    "cut-rows": (_weight(f"{AT}mlp.gate_proj.weight", _first(0.75, 0)), ("ffn_gate", 1)),
    "no-bias": (_weight(f"{ATTENTION}k_proj.bias", np.zeros_like), ("qkv_bias", 1)),
    "bias-twice": (_weight(f"{ATTENTION}q_proj.bias", lambda b: 2 * b), ("qkv_bias", 1)),
    "norm-plus-one": (_weight(f"{AT}input_layernorm.weight", lambda w: 1 + w), ("attn_norm", 1)),
    "no-norm-weight": (_weight("model.norm.weight", np.ones_like), ("final_norm", None)),
    "norm-swap": (lambda made: {f"{AT}input_layernorm.weight": made[f"{AT}post_attention_layernorm.weight"]}, ("attn_norm", 1)),
}
"""Kind to an edit that rounding to a format of blocks does not change, and where it must show first."""

EXACT_IN_BLOCKS = EXACT_WHEN_QUANTIZED | {
    "block": (_weight(f"{AT}mlp.up_proj.weight", _block), ("ffn_up", 1)),
    "cut-columns": (_weight(f"{AT}mlp.up_proj.weight", _first(0.5, 1)), ("ffn_up", 1)),
    "embedding-scale": (_weight("model.embed_tokens.weight", lambda w: 16 * w), ("embedding", None)),
}
"""Those that blocks of 32 with one scale each take exactly, too."""

EXACT = EXACT_IN_BLOCKS | {
    "transposed": (_weight("lm_head.weight", lambda w: w.reshape(w.shape[::-1]).T), ("lm_head", None)),
}

HPARAMS: dict[str, tuple[dict[str, float], tuple[str, int | None]]] = {
    "eps": ({"eps": 1e-5}, ("attn_norm", 0)),
    "theta": ({"theta": 1e4}, ("q_post_rope", 0)),
}


@pytest.fixture(scope="module")
def save(peer: llamacpp.Peer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """save(shape, format, made): a GGUF whose matrices ggml itself encoded."""
    root = tmp_path_factory.mktemp("kinds")

    def write(shape: tiny.Shape, kind: str, made: Made | None = None) -> Path:
        encode = None if kind in ("F32", "F16") else peer.quantize
        return tiny.save_gguf(shape, root / f"{len(list(root.iterdir()))}.gguf", kind, made=made, encode=encode)

    return write


def named(right: Path, wrong: Path, cache: str) -> list[Diagnosis]:
    """The diagnoses of a run of one file judged with the other."""
    from aprender.sides.llamacpp import LlamaCppSide

    side = LlamaCppSide(wrong, cache=cache)
    return diagnosed(local(side.capture(IDS), ModelData(**OwnSide(right).model_data()), side.profile))


@pytest.mark.parametrize(
    ("kind", "shape", "cases", "cache"),
    [
        ("F16", SHAPE, EXACT, "f16"),
        ("Q8_0", SHAPE, EXACT_IN_BLOCKS, "f32"),
        ("Q4_K", WIDE, EXACT_WHEN_QUANTIZED, "f32"),
        ("Q6_K", WIDE, EXACT_WHEN_QUANTIZED, "f16"),
    ],
    ids=["F16", "Q8_0", "Q4_K", "Q6_K"],
)
def test_llama_cpp(kind: str, shape: tiny.Shape, cases: Any, cache: str, save: Callable[..., Path]) -> None:
    right, made = save(shape, kind), tiny.weights(shape)
    assert named(right, right, cache) == []
    for name, (edit, key) in cases.items():
        found = named(right, save(shape, kind, made | edit(made)), cache)
        assert found, name
        assert ((found[0].stage, found[0].layer), found[0].kind) == (key, name), found[0].sentence
    for name, (more, key) in HPARAMS.items():
        found = named(right, save(dataclasses.replace(shape, **more), kind), cache)
        assert ((found[0].stage, found[0].layer), found[0].kind) == (key, name), found[0].sentence


# ---- Hugging Face ----------------------------------------------------------------------------------------------------------------------


class Patched:
    """Layer 1 of a real model, and the module that defines its class."""

    def __init__(self, path: Path, dtype: str) -> None:
        from aprender.sides.hf import HFSide

        self.side = HFSide(str(path), dtype)
        data = ModelData(**self.side.model_data())
        self.data = dataclasses.replace(data, weights={key: np.array(w) for key, w in data.weights.items()})  # as they are now
        self.model = self.side.model.model
        self.layer = self.model.layers[1]
        self.attention, self.mlp = self.layer.self_attn, self.layer.mlp
        self.home = sys.modules[type(self.attention).__module__]

    def found(self) -> list[Diagnosis]:
        return diagnosed(local(self.side.capture(IDS), self.data, self.side.profile))


Patch = Callable[[Patched, pytest.MonkeyPatch], None]


def _epsilon(on: Patched, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(on.model.layers[0].input_layernorm, "variance_epsilon", 1e-2)


def _no_bias(on: Patched, patch: pytest.MonkeyPatch) -> None:
    import torch

    part = on.attention.k_proj
    patch.setattr(part, "forward", lambda x: torch.nn.functional.linear(x, part.weight))


def _data(of: Callable[[Patched], Any], change: Callable[[Any], Any]) -> Patch:
    def plant(on: Patched, patch: pytest.MonkeyPatch) -> None:
        weight = of(on)
        patch.setattr(weight, "data", change(weight.data).contiguous())

    return plant


def _gelu(on: Patched, patch: pytest.MonkeyPatch) -> None:
    import torch

    patch.setattr(on.mlp.act_fn, "forward", lambda x: torch.nn.functional.gelu(x))


def _quick_gelu(on: Patched, patch: pytest.MonkeyPatch) -> None:
    import torch

    patch.setattr(on.mlp.act_fn, "forward", lambda x: x * torch.sigmoid(1.702 * x))


def _neighbours(on: Patched, patch: pytest.MonkeyPatch) -> None:
    """The interleaved rotation of GPT-J, of q alone."""
    import torch

    right = on.home.apply_rotary_pos_emb

    def apply(q: Any, k: Any, cos: Any, sin: Any, *more: Any, **named: Any) -> Any:
        half = cos.shape[-1] // 2
        c, s = (t[..., :half].repeat_interleave(2, dim=-1).unsqueeze(1) for t in (cos, sin))
        other = torch.stack([-q[..., 1::2], q[..., 0::2]], dim=-1).flatten(-2)
        return q * c + other * s, right(q, k, cos, sin, *more, **named)[1]

    patch.setattr(on.home, "apply_rotary_pos_emb", apply)


def _theta(on: Patched, patch: pytest.MonkeyPatch) -> None:
    import torch

    patch.setattr(on.model.rotary_emb.inv_freq, "data", torch.tensor(1.0) / (torch.tensor(1e4) ** (torch.arange(0, 24, 2).float() / 24)))


def _tiled(on: Patched, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(on.home, "repeat_kv", lambda x, n: x.repeat(1, n, 1, 1))


def _scale(value: float) -> Patch:
    return lambda on, patch: patch.setattr(on.attention, "scaling", on.attention.scaling * value)


def _one_too_wide(on: Patched, patch: pytest.MonkeyPatch) -> None:
    import torch

    from aprender.sides import hf_record

    def wide(*args: Any, **named: Any) -> Any:
        mask = hf_record.eager_mask(*args, **named)
        return mask.masked_fill(torch.tril(torch.ones(mask.shape[-2:], dtype=torch.bool), 1), 0)

    patch.setitem(__import__("transformers").AttentionMaskInterface._global_mapping, hf_record.ATTENTION, wide)


def _no_residual(on: Patched, patch: pytest.MonkeyPatch) -> None:
    """The branch of the feed-forward part alone goes on."""
    held: list[Any] = []
    right = on.mlp.forward

    def branch(x: Any) -> Any:
        held.append(right(x))
        return held[-1]

    forward = on.layer.forward
    patch.setattr(on.mlp, "forward", branch)
    patch.setattr(on.layer, "forward", lambda *args, **named: (forward(*args, **named), held[-1])[1])


def _embedding_as_head(on: Patched, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(on.side.model.lm_head.weight, "data", on.model.embed_tokens.weight.data)


def _scaled(w: Any) -> Any:
    out = w.clone()
    out[7, 32:64] *= 2
    return out


PATCHES: list[tuple[str, tuple[str, int | None], Patch]] = [
    ("eps", ("attn_norm", 0), _epsilon),
    ("norm-plus-one", ("ffn_norm", 1), _data(lambda on: on.layer.post_attention_layernorm.weight, lambda w: w + 1)),
    ("no-bias", ("qkv_bias", 1), _no_bias),
    ("bias-twice", ("qkv_bias", 1), _data(lambda on: on.attention.v_proj.bias, lambda b: b * 2)),
    ("transposed", ("ffn_up", 1), _data(lambda on: on.mlp.up_proj.weight, lambda w: w.reshape(w.shape[::-1]).T)),
    ("block", ("ffn_out", 1), _data(lambda on: on.mlp.down_proj.weight, _scaled)),
    ("gelu", ("ffn_silu", 1), _gelu),
    ("quick-gelu", ("ffn_silu", 1), _quick_gelu),
    ("rope-pairs", ("q_post_rope", 0), _neighbours),
    ("theta", ("rope_table", None), _theta),
    ("gqa-tile", ("attn_scores", 0), _tiled),
    ("scale-base", ("attn_scores", 1), _scale(1.061)),
    ("no-scale", ("attn_scores", 1), _scale(24**0.5)),
    ("scale", ("attn_scores", 1), _scale(1.03)),
    ("mask-next", ("attn_softmax", 0), _one_too_wide),
    ("no-residual", ("post_ffn_residual", 1), _no_residual),
    ("embed-head", ("lm_head", None), _embedding_as_head),
]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_hugging_face(dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    on = Patched(write_folder(tmp_path, tiny.Shape()), dtype)
    assert on.found() == []
    for name, key, plant in PATCHES:
        with pytest.MonkeyPatch.context() as patch:
            plant(on, patch)
            found = on.found()
        assert found, name
        assert ((found[0].stage, found[0].layer), found[0].kind) == (key, name), found[0].sentence
        assert found[0].alpha == pytest.approx(1.0, abs=0.01)
    assert on.found() == []
