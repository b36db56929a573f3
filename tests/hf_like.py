"""A forward pass in NumPy that rounds where Hugging Face's does: what the judge is tested on without torch.

Owns a small engine written straight down, float32 inside each operation and one rounding to the activation format after it, as eager
transformers on a CPU does.  It shares nothing with ``aprender.judge``: its roundings are NumPy's casts and, for bfloat16, the bits of
float32.  A bug is planted by the caller, as a function of (stage, layer, value) before the value is rounded.  Called by the judge's tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tiny
from numpy.typing import NDArray

from aprender import _core, arithmetic
from aprender.captures import Captures
from aprender.judge.witness import ModelData
from aprender.manifest import CAPTURED, DERIVED, Manifest, TensorNote

Array = NDArray[np.float32]
Key = tuple[str, int | None]
Plant = Callable[[str, int | None, Array], Array]
Multiply = Callable[[str, int | None, Array, Array], Array]

DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
FORMATS = tuple(DTYPES)


def rounded(x: NDArray[Any], fmt: str) -> Array:
    """Float32 values rounded to a format, ties to even."""
    x = np.asarray(x, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        if fmt == "f16":
            return x.astype(np.float16).astype(np.float32)
        if fmt == "bf16":
            bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
            return np.where(np.isfinite(x), ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32), x)
    return x


def model(shape: tiny.Shape, seed: int = 0) -> ModelData:
    """The weights of ``tiny.py`` by the names of weights.def; they are exact in every format."""
    made = tiny.weights(shape, seed)
    weights: dict[Key, Array] = {}
    for name, _, _, hf, *_ in _core.WEIGHTS:
        layers = [None] if "%d" not in hf else list(range(shape.layers))
        for layer in layers:
            full = hf if layer is None else hf.replace("%d", str(layer))
            if full in made:
                weights[name, layer] = made[full]
    weights.setdefault(("output", None), weights["token_embd", None])
    return ModelData(shape.arch, shape.flags, shape.hparams, weights)


def float32(stage: str, layer: int | None, a: Array, b: Array) -> Array:
    """A product of a stage: [..., T, K] times [..., K, N]."""
    return a @ b


def capture(
    data: ModelData,
    ids: Sequence[int],
    fmt: str,
    plant: Plant | None = None,
    *,
    scores: str = CAPTURED,
    drop: Sequence[str] = (),
    multiply: Multiply = float32,
) -> Captures:
    """Run the ids and keep every stage, as the profile ``hf-<fmt>`` declares; the product before a bias is marked derived."""
    values = run(data, ids, fmt, plant, multiply)
    origins = {"attn_scores": scores, "qkv_matmul": DERIVED if "QKV_BIAS" in data.flags else CAPTURED}
    kept = {key: value for key, value in values.items() if key[0] not in drop}
    notes = {key: TensorNote.of(value, dtype=DTYPES[fmt], origin=origins.get(key[0], CAPTURED)) for key, value in kept.items()}
    hparams: dict[str, Any] = dict(data.hparams)
    return Captures(
        kept, Manifest(side=f"like:{fmt}", tokens=tuple(map(int, ids)), arch=data.arch, flags=data.flags, hparams=hparams, tensors=notes)
    )


def profile(fmt: str) -> arithmetic.Profile:
    return arithmetic.profile(f"hf-{fmt}")


@np.errstate(over="ignore", invalid="ignore")  # an overflow is a value that some tests want
def run(data: ModelData, ids: Sequence[int], fmt: str, plant: Plant | None = None, multiply: Multiply = float32) -> dict[Key, Array]:
    """All stages of one sequence."""
    out: dict[Key, Array] = {}
    h: Mapping[str, Any] = data.hparams
    heads, kv, size, eps = int(h["heads"]), int(h["kv_heads"]), int(h["head"]), np.float32(h["eps"])

    def keep(stage: str, layer: int | None, value: NDArray[Any]) -> Array:
        value = np.asarray(value, np.float32)
        if plant is not None:
            value = np.asarray(plant(stage, layer, value), np.float32)
        out[stage, layer] = rounded(value, fmt)
        return out[stage, layer]

    def weight(name: str, layer: int | None = None) -> Array:
        return np.asarray(data.weights[name, layer], np.float32)

    def norm(x: Array, w: Array) -> Array:
        rows = x.reshape(-1, w.size)
        r = np.float32(1) / np.sqrt(np.mean(rows * rows, axis=1, keepdims=True, dtype=np.float32) + eps)
        return (rounded(rows * r, fmt) * w).reshape(x.shape)

    def turn(x: Array) -> Array:
        cos, sin = (np.tile(part, (1, 2 * x.shape[1] // size)) for part in np.hsplit(table, 2))
        a, b = np.split(x.reshape(len(x), -1, size), 2, axis=2)
        other = np.concatenate([-b, a], axis=2).reshape(x.shape)
        return rounded(x * cos, fmt) + rounded(other * sin, fmt)

    def by_head(x: Array, repeat: int = 1) -> Array:
        return np.repeat(x.reshape(len(x), -1, size).transpose(1, 0, 2), repeat, axis=0)

    exponent = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    frequency = np.float32(1) / (np.float64(h["theta"]) ** exponent.astype(np.float64)).astype(np.float32)
    angle = np.arange(len(ids), dtype=np.float32)[:, None] * frequency
    seen = np.tril(np.ones((len(ids), len(ids)), bool))
    scale = np.float32(size**-0.5)

    x = keep("embedding", None, weight("token_embd")[np.asarray(ids)])
    table = keep("rope_table", None, np.concatenate([np.cos(angle), np.sin(angle)], axis=1))
    for i in range(int(h["layers"])):
        y = keep("attn_norm", i, norm(x, weight("attn_norm", i)))
        qkv = np.concatenate([multiply("qkv_matmul", i, y, weight(name, i).T) for name in ("attn_q", "attn_k", "attn_v")], axis=1)
        if "QKV_BIAS" in data.flags:
            out["qkv_matmul", i] = rounded(qkv, fmt)
            bias = np.concatenate([weight(f"attn_{part}_bias", i) for part in "qkv"])
            qkv = keep("qkv_bias", i, qkv + bias)
        else:
            qkv = keep("qkv_matmul", i, qkv)
        q, k, v = np.split(qkv, [heads * size, (heads + kv) * size], axis=1)
        if "QK_NORM" in data.flags:
            q, k = keep("q_norm", i, norm(q, weight("attn_q_norm", i))), keep("k_norm", i, norm(k, weight("attn_k_norm", i)))
        q, k = keep("q_post_rope", i, turn(q)), keep("k_post_rope", i, turn(k))
        k, v = keep("k_cache", i, k), keep("v_cache", i, v)
        s = rounded(multiply("attn_scores", i, by_head(q), by_head(k, heads // kv).transpose(0, 2, 1)), fmt) * scale
        s = keep("attn_scores", i, np.where(seen, s, np.float32(0)))
        e = np.where(seen, np.exp(s - np.where(seen, s, -np.inf).max(axis=2, keepdims=True)), np.float32(0))
        p = keep("attn_softmax", i, e / e.sum(axis=2, keepdims=True, dtype=np.float32))
        a = keep("attention", i, multiply("attention", i, p, by_head(v, heads // kv)).transpose(1, 0, 2).reshape(len(ids), -1))
        a = multiply("attn_out", i, a, weight("attn_output", i).T)
        a = keep("attn_out", i, a + weight("attn_output_bias", i) if "O_BIAS" in data.flags else a)
        x = keep("post_attn_residual", i, x + a)
        y = keep("ffn_norm", i, norm(x, weight("ffn_norm", i)))
        gate, up = (
            keep("ffn_gate", i, multiply("ffn_gate", i, y, weight("ffn_gate", i).T)),
            keep("ffn_up", i, multiply("ffn_up", i, y, weight("ffn_up", i).T)),
        )
        gate = keep("ffn_silu", i, gate / (np.float32(1) + np.exp(-gate)))
        y = keep("ffn_swigl", i, gate * up)
        x = keep("post_ffn_residual", i, x + keep("ffn_out", i, multiply("ffn_out", i, y, weight("ffn_down", i).T)))
    y = keep("final_norm", None, norm(x, weight("output_norm")))
    keep("lm_head", None, multiply("lm_head", None, y, weight("output").T))
    return out
