"""The float64 definition of every stage, and a straight-line forward pass per family.

Owns what a stage *means*: one plain NumPy function per operation, and :func:`forward`, which calls them in the order that the published
model code does.  Refuses to read the tables of the engine: a witness that interprets the plan would share its mistakes.  Everything is
float64, nothing is rounded to another format, no order of summation is prescribed.  Called by ``judge.noise`` (the definitions, on a
side's own captured inputs), by ``judgement`` and ``references`` (the forward pass, there as the side ``witness``) and by tests against
Hugging Face float32.

Dimensions: T tokens, J keys, D model, H heads, KV key and value heads, h head size, Qd = H*h, Kd = KV*h, F ffn, V vocabulary.  Arrays have
the token first; attention scores and probabilities are [H, T, J].  Further axes in front are passes side by side, which share the weights.
Lane order is Hugging Face's: the two halves of a head are rotated against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aprender.errors import ArgumentError, ConfigError, UnknownName

Float = NDArray[np.float64]
Mask = NDArray[np.bool_]
Key = tuple[str, int | None]
Weights = Mapping[Key, ArrayLike]
HParams = Mapping[str, int | float]


@dataclass(frozen=True)
class ModelData:
    """A model as a side holds it, as plain data.

    Attributes
    ----------
    arch : str
        Family: a key of :data:`FAMILIES`.
    flags : frozenset of str
        What is switched on (``QKV_BIAS``, ``O_BIAS``, ``QK_NORM`` ...).  The presence of a weight never decides.
    hparams : mapping
        ``layers dim ffn heads kv_heads head vocab eps theta``.
    weights : mapping
        (name, layer or None) to an array [out, in], after the side's own cast or dequantisation, Hugging Face lane order.  ``("output",
        None)`` of a tied model is its token table.
    stored : mapping
        The same keys to (number format, bytes [out, bytes of a row]) in the file, for arithmetics that depend on it; may be empty.
    """

    arch: str
    flags: frozenset[str]
    hparams: HParams
    weights: Weights = field(repr=False)
    stored: Mapping[Key, tuple[str, NDArray[np.uint8]]] = field(default_factory=dict, repr=False)


# ---- the definitions -------------------------------------------------------------------------------------------------------------------

WIDENED = 1 << 22
"""Weights held in float64 at once: 32 MiB."""


def embedding(table: ArrayLike, ids: Sequence[int]) -> Float:
    """Rows of the token table [V, D] for the ids: [T, D]."""
    return np.asarray(table)[np.asarray(ids, np.int64)].astype(np.float64)


def frequencies(theta: float, head: int) -> Float:
    """Angular frequency of each rotary pair, radians per position: theta^(-2i/h), [h/2]."""
    return float(theta) ** (-np.arange(0, head, 2, dtype=np.float64) / head)


def rope_table(positions: Sequence[int] | NDArray[Any], theta: float, head: int) -> Float:
    """Cosines then sines of position x frequency: [T, h]."""
    angle = np.asarray(positions, np.float64)[:, None] * frequencies(theta, head)
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=1)


def inverse_rms(x: Float, eps: float) -> Float:
    """1 / sqrt(mean(x^2) + eps) over the last axis, kept as an axis of length 1."""
    return np.asarray(1.0 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps))


def rms_norm(x: Float, weight: ArrayLike, eps: float) -> Float:
    """RMSNorm over rows as long as the weight: the whole token, or each head of it (``q_norm``, ``k_norm``)."""
    w = np.asarray(weight, np.float64)
    rows = x.reshape(-1, w.size)
    return (rows * inverse_rms(rows, eps) * w).reshape(x.shape)


def linear(x: Float, weight: ArrayLike, bias: ArrayLike | None = None) -> Float:
    """Rows times weight^T, plus bias, for a weight [out, in]: [T, out].  The weight is widened a few rows at a time."""
    w, rows = np.asarray(weight), x.reshape(-1, x.shape[-1])
    y, wide = np.empty((len(rows), len(w))), max(1, WIDENED // max(w.shape[1], 1))
    for i in range(0, len(w), wide):
        np.matmul(rows, w[i : i + wide].astype(np.float64, copy=False).T, out=y[:, i : i + wide])
    y = y.reshape(*x.shape[:-1], len(w))
    return y if bias is None else y + np.asarray(bias, np.float64)


def rotate_half(x: Float, head: int) -> Float:
    """Each head (a, b) as (-b, a): what multiplies the sine."""
    a, b = np.split(x.reshape(*x.shape[:-1], -1, head), 2, axis=-1)
    return np.concatenate([-b, a], axis=-1).reshape(x.shape)


def spread_table(table: Float, width: int) -> tuple[Float, Float]:
    """Cosine and sine of a table [T, h] laid out beside a buffer of heads: two arrays [T, width]."""
    cos, sin = np.split(np.asarray(table, np.float64), 2, axis=-1)
    times = width // cos.shape[-1]
    return np.tile(cos, times), np.tile(sin, times)


def rope(x: Float, table: Float) -> Float:
    """Rotate each head of [T, n*h] by the table [T, h]."""
    cos, sin = spread_table(table, x.shape[-1])
    return x * cos + rotate_half(x, table.shape[-1]) * sin


def heads_first(x: Float, head: int, repeat: int = 1) -> Float:
    """[T, n*h] as [n * repeat, T, h]; key and value heads are repeated for the ``repeat`` query heads that share each."""
    return np.repeat(x.reshape(*x.shape[:-1], -1, head).swapaxes(-2, -3), repeat, axis=-3)


def causal(positions: Sequence[int] | NDArray[Any], key_positions: Sequence[int] | NDArray[Any]) -> Mask:
    """Which keys a token may see, [T, J]: those at its own position and before."""
    return np.asarray(np.asarray(key_positions)[None, :] <= np.asarray(positions)[:, None])


def scores(q: Float, k: Float, allowed: Mask, hparams: HParams) -> Float:
    """Scaled products q . k / sqrt(h) where the mask allows, 0 elsewhere: [H, T, J] from q [T, Qd] and k [J, Kd]."""
    head, share = int(hparams["head"]), int(hparams["heads"]) // int(hparams["kv_heads"])
    dot = heads_first(q, head) @ heads_first(k, head, share).swapaxes(-1, -2)
    return np.where(allowed, dot / np.sqrt(head), 0.0)


def softmax(s: Float, allowed: Mask) -> Float:
    """Softmax over the allowed keys, 0 elsewhere; a row that may see nothing is 0."""
    seen = np.where(allowed, s, -np.inf)
    top = seen.max(axis=-1, keepdims=True)
    e = np.exp(seen - np.where(np.isfinite(top), top, 0.0))
    total = e.sum(axis=-1, keepdims=True)
    return np.asarray(e / np.where(total > 0, total, 1.0))


def mix(p: Float, v: Float, hparams: HParams) -> Float:
    """Probabilities [H, T, J] times values [J, Kd], heads side by side: [T, Qd]."""
    head, share = int(hparams["head"]), int(hparams["heads"]) // int(hparams["kv_heads"])
    y = (p @ heads_first(v, head, share)).swapaxes(-2, -3)
    return y.reshape(*y.shape[:-2], -1)


def silu(x: Float) -> Float:
    """Sigmoid-weighted x / (1 + exp(-x)); for negative x as x * exp(x) / (1 + exp(x)), which cannot overflow."""
    e = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, x, x * e) / (1.0 + e))


# ---- the forward pass ------------------------------------------------------------------------------------------------------------------


Disturb = Callable[[Key, Float], Float]
"""What becomes of a stage's value before anything reads it."""


def _as_is(key: Key, value: Float) -> Float:
    """The definition, undisturbed."""
    return value


class _Layer:
    """The weights of one layer by name, the values that it produces, and the model's flags."""

    def __init__(self, model: ModelData, index: int, out: dict[Key, Float], disturb: Disturb) -> None:
        self.model, self.index, self.out, self.disturb = model, index, out, disturb
        self.head, self.eps = int(model.hparams["head"]), float(model.hparams["eps"])
        self.qd, self.kd = int(model.hparams["heads"]) * self.head, int(model.hparams["kv_heads"]) * self.head

    def w(self, name: str) -> ArrayLike:
        return self.model.weights[name, self.index]

    def keep(self, stage: str, value: Float) -> Float:
        value = self.disturb((stage, self.index), value)
        self.out[stage, self.index] = value
        return value

    def split(self, qkv: Float) -> tuple[Float, Float, Float]:
        q, k, v = np.split(qkv, [self.qd, self.qd + self.kd], axis=-1)
        return q, k, v

    def project(self, x: Float) -> Float:
        parts = [linear(x, self.w(name)) for name in ("attn_q", "attn_k", "attn_v")]
        return self.keep("qkv_matmul", np.concatenate(parts, axis=-1))

    def add_bias(self, qkv: Float) -> Float:
        parts = [np.asarray(self.w(name), np.float64) for name in ("attn_q_bias", "attn_k_bias", "attn_v_bias")]
        return self.keep("qkv_bias", qkv + np.concatenate(parts))


def _qwen2(at: _Layer, x: Float) -> tuple[Float, Float, Float]:
    """Qwen2: biases on q, k and v, always; none on the output projection."""
    return at.split(at.add_bias(at.project(x)))


def _llama(at: _Layer, x: Float) -> tuple[Float, Float, Float]:
    """Llama: biases on all four projections if ``attention_bias`` says so."""
    qkv = at.project(x)
    return at.split(at.add_bias(qkv) if "QKV_BIAS" in at.model.flags else qkv)


def _qwen3(at: _Layer, x: Float) -> tuple[Float, Float, Float]:
    """Qwen3: as Llama, then an RMSNorm over each head of q and of k."""
    q, k, v = _llama(at, x)
    q = at.keep("q_norm", rms_norm(q, at.w("attn_q_norm"), at.eps))
    k = at.keep("k_norm", rms_norm(k, at.w("attn_k_norm"), at.eps))
    return q, k, v


FAMILIES: Mapping[str, Callable[[_Layer, Float], tuple[Float, Float, Float]]] = {"qwen2": _qwen2, "llama": _llama, "qwen3": _qwen3}
"""How each family makes q, k and v from the normed hidden state; the rest of a layer is the same."""


def _layer(at: _Layer, hidden: Float, table: Float, allowed: Mask) -> Float:
    """One decoder layer: the hidden state [T, D] that enters, to the one that leaves."""
    normed = at.keep("attn_norm", rms_norm(hidden, at.w("attn_norm"), at.eps))
    q, k, v = FAMILIES[at.model.arch](at, normed)
    q = at.keep("q_post_rope", rope(q, table))
    k = at.keep("k_post_rope", rope(k, table))
    k, v = at.keep("k_cache", k), at.keep("v_cache", v)
    s = at.keep("attn_scores", scores(q, k, allowed, at.model.hparams))
    p = at.keep("attn_softmax", softmax(s, allowed))
    a = at.keep("attention", mix(p, v, at.model.hparams))
    a = at.keep("attn_out", linear(a, at.w("attn_output"), at.w("attn_output_bias") if "O_BIAS" in at.model.flags else None))
    hidden = at.keep("post_attn_residual", hidden + a)
    normed = at.keep("ffn_norm", rms_norm(hidden, at.w("ffn_norm"), at.eps))
    gate = at.keep("ffn_gate", linear(normed, at.w("ffn_gate")))
    up = at.keep("ffn_up", linear(normed, at.w("ffn_up")))
    gate = at.keep("ffn_silu", silu(gate))
    up = at.keep("ffn_swigl", gate * up)
    f = at.keep("ffn_out", linear(up, at.w("ffn_down")))
    return at.keep("post_ffn_residual", hidden + f)


def forward(model: ModelData, ids: Sequence[int]) -> dict[Key, Float]:
    """All stages of one sequence that starts at position 0.

    Parameters
    ----------
    model : ModelData
        Family, flags, hyper-parameters, weights.
    ids : sequence of int
        Token ids, at least one, each in 0 .. V-1.

    Returns
    -------
    dict
        (stage, layer or None) to a float64 array, in execution order.

    Raises
    ------
    UnknownName
        No family of that name.
    ConfigError
        A weight that the family needs is missing.
    ArgumentError
        No ids, or an id outside the vocabulary.
    """
    if model.arch not in FAMILIES:
        raise UnknownName(f"the witness knows no family '{model.arch}' (it knows {', '.join(FAMILIES)})", code="LOOKUP", field="arch")
    vocab = int(model.hparams["vocab"])
    if len(ids) == 0 or not all(0 <= i < vocab for i in ids):
        raise ArgumentError(f"token ids must be one or more, each from 0 to {vocab - 1}", code="ARGUMENT", field="tokens")
    try:
        return dict(steps(model, ids))
    except KeyError as missing:
        raise ConfigError(f"the witness needs a weight or hyper-parameter that was not given: {missing}", code="MISSING") from missing


def steps(
    model: ModelData, ids: Sequence[int], disturb: Disturb = _as_is, first: int = 0, hidden: Float | None = None
) -> Iterator[tuple[Key, Float]]:
    """The whole pass, top to bottom; yields what each part has produced, a layer at a time.

    Parameters
    ----------
    model : ModelData
    ids : sequence of int
    disturb : callable, optional
        (stage, layer) and value to the value that goes on: how rounding noise is carried through a whole pass.  Several passes go side by
        side if it gives the first two stages, the embedding and the RoPE table, an axis more.
    first, hidden : int, array, optional
        The layer to begin with, and the hidden state that enters it; the embedding is then left out.
    """
    weights, hp = model.weights, model.hparams
    positions = np.arange(len(ids))
    allowed = causal(positions, positions)
    if hidden is None:
        hidden = disturb(("embedding", None), embedding(weights["token_embd", None], ids))
        yield ("embedding", None), hidden
    table = disturb(("rope_table", None), rope_table(positions, float(hp["theta"]), int(hp["head"])))
    yield ("rope_table", None), table
    for i in range(first, int(hp["layers"])):
        out: dict[Key, Float] = {}
        hidden = _layer(_Layer(model, i, out, disturb), hidden, table, allowed)
        yield from out.items()
    normed = disturb(("final_norm", None), rms_norm(hidden, weights["output_norm", None], float(hp["eps"])))
    yield ("final_norm", None), normed
    yield ("lm_head", None), disturb(("lm_head", None), linear(normed, weights["output", None]))
