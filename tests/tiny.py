"""Tiny random models for every test: one set of weights, as a Hugging Face folder and as a GGUF file.

Owns :class:`Shape`, the seeded weights, and the writers: ``save_hf`` goes through transformers' own ``save_pretrained``, ``save_gguf``
through the ``gguf`` package, both foreign to the code under test; ``save_apr`` lays the bytes down here, as the format's description has
it.  Refuses K-quants (``gguf`` only decodes them; see ``llamacpp.py``).
Called by every test that needs a model.

All widths differ (model 64, heads x head size 96, ffn 160, vocabulary 112), so that a mix-up of shapes cannot hide; all are multiples of
32 and 16, as Q8_0, Q5_0, Q4_0 and our lanes want; the head size 24 is no power of two, so that the attention scale rounds.  Every weight is
exact in BF16, F16 and F32: containers differ by arithmetic alone.

llama.cpp takes heads x head size = model width for granted in qwen2 (not in llama and qwen3): a peer test of it needs ``head=16``.

    shape = Shape("llama", tied=True)
    save_hf(shape, folder)                      # config.json, model.safetensors (BF16)
    save_gguf(shape, path, "Q8_0")              # norms and biases stay F32
    save_apr(shape, path, "APR_Q4")             # likewise
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
FORMATS = ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_0")
ARCHS = ("qwen2", "llama", "qwen3")


@dataclass(frozen=True)
class Shape:
    """Architecture and sizes of a tiny model."""

    arch: str = "qwen2"
    layers: int = 2
    dim: int = 64
    ffn: int = 160
    heads: int = 4
    kv_heads: int = 2
    head: int = 24
    vocab: int = 112
    context: int = 256
    eps: float = 1e-6
    theta: float = 1e6
    tied: bool = False
    attention_bias: bool = False

    @property
    def qkv_bias(self) -> bool:
        return self.arch == "qwen2" or self.attention_bias

    @property
    def flags(self) -> frozenset[str]:
        """The flags of csrc/plan/flags.def that such a model has."""
        on = {"DENSE": True, "QKV_BIAS": self.qkv_bias, "O_BIAS": self.attention_bias, "QK_NORM": self.arch == "qwen3"}
        return frozenset(flag for flag, yes in (on | {"UNTIED": not self.tied}).items() if yes)

    @property
    def hparams(self) -> dict[str, int | float]:
        names = ("layers", "dim", "ffn", "heads", "kv_heads", "head", "vocab", "context", "eps", "theta")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        return f"{self.arch}-{'tied' if self.tied else 'untied'}{'-bias' if self.attention_bias else ''}"


#: Every architecture, tied and untied, with and without attention_bias where the configuration may choose.
SHAPES = tuple(
    Shape(arch, tied=tied, attention_bias=bias)
    for arch in ARCHS
    for tied in (False, True)
    for bias in (False, True)
    if arch != "qwen2" or not bias
)


def weights(shape: Shape, seed: int = 0) -> dict[str, Array]:
    """Hugging Face name -> float32 array.  Matrices of sd 1/sqrt(columns), norms 1 +- 0.3, q and k biases of sd 1: nothing is small."""
    generator = np.random.default_rng([seed, *shape.arch.encode()])
    q, k = shape.heads * shape.head, shape.kv_heads * shape.head

    def matrix(rows: int, columns: int, size: float = 1.0) -> Array:
        return exact(generator.standard_normal((rows, columns)) * size / np.sqrt(columns))

    def vector(length: int, mean: float, sd: float) -> Array:
        return exact(mean + sd * generator.standard_normal(length))

    made = {"model.embed_tokens.weight": matrix(shape.vocab, shape.dim, 4.0), "model.norm.weight": vector(shape.dim, 1, 0.3)}
    if not shape.tied:
        made["lm_head.weight"] = matrix(shape.vocab, shape.dim, 2.0)
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        for name, rows in (("q", q), ("k", k), ("v", k)):
            made[f"{at}self_attn.{name}_proj.weight"] = matrix(rows, shape.dim)
            if shape.qkv_bias:
                made[f"{at}self_attn.{name}_proj.bias"] = vector(rows, 0, 0.3 if name == "v" else 1)
        made[f"{at}self_attn.o_proj.weight"] = matrix(shape.dim, q)
        if shape.attention_bias:
            made[f"{at}self_attn.o_proj.bias"] = vector(shape.dim, 0, 0.3)
        if shape.arch == "qwen3":
            made[f"{at}self_attn.q_norm.weight"] = vector(shape.head, 1, 0.3)
            made[f"{at}self_attn.k_norm.weight"] = vector(shape.head, 1, 0.3)
        made[f"{at}mlp.gate_proj.weight"] = matrix(shape.ffn, shape.dim)
        made[f"{at}mlp.up_proj.weight"] = matrix(shape.ffn, shape.dim)
        made[f"{at}mlp.down_proj.weight"] = matrix(shape.dim, shape.ffn)
        made[f"{at}input_layernorm.weight"] = vector(shape.dim, 1, 0.3)
        made[f"{at}post_attention_layernorm.weight"] = vector(shape.dim, 1, 0.3)
    return made


def exact(values: NDArray[np.float64]) -> Array:
    """Nearest values that BF16, F16 and F32 all have: bf16(f16(x)), whose 8 bits stay on the grid of float16."""
    half = values.astype(np.float16).astype(np.float32)
    bits = half.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


# ---- Hugging Face ------------------------------------------------------------------------------


def hf_config(shape: Shape, **more: Any) -> Any:
    """A transformers configuration of the shape; `more` adds or overrides entries."""
    from transformers import CONFIG_MAPPING

    said = {
        "vocab_size": shape.vocab, "hidden_size": shape.dim, "intermediate_size": shape.ffn, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head,
        "max_position_embeddings": shape.context, "rms_norm_eps": shape.eps, "tie_word_embeddings": shape.tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.theta},
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    if shape.arch != "qwen2":
        said["attention_bias"] = shape.attention_bias
    return CONFIG_MAPPING[shape.arch](**(said | more))


def hf_model(shape: Shape, seed: int = 0, made: Mapping[str, Array] | None = None, **more: Any) -> Any:
    """A transformers model in float32 with these weights (those of `weights(shape, seed)` if not given)."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(hf_config(shape, **more), dtype=torch.float32).eval()
    state = {name: torch.from_numpy(array.copy()) for name, array in (made or weights(shape, seed)).items()}
    if shape.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model


def save_hf(
    shape: Shape, folder: Path, seed: int = 0, *, dtype: str = "bfloat16", made: Mapping[str, Array] | None = None, **more: Any
) -> Path:
    """Write config.json and model.safetensors as transformers writes them; returns the folder."""
    import torch
    from transformers.utils import logging

    model = hf_model(shape, seed, made, **more).to(getattr(torch, dtype))
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    logging.enable_progress_bar()
    return Path(folder)


# ---- GGUF --------------------------------------------------------------------------------------

GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    stem, kind = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{GGUF_NAMES[stem]}.{kind}"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"


def permuted(array: Array, heads: int) -> Array:
    """As llama.cpp's converter turns the q and k rows of the Llama architecture: (half s, i) of each head goes to 2i + s."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))


def gguf_tensors(shape: Shape, seed: int = 0, made: Mapping[str, Array] | None = None) -> dict[str, Array]:
    """GGUF name -> float32 array, in the order of lanes that a GGUF of the architecture has."""
    tensors = {}
    for name, array in (made or weights(shape, seed)).items():
        if shape.arch == "llama" and ".q_proj." in name:
            array = permuted(array, shape.heads)
        if shape.arch == "llama" and ".k_proj." in name:
            array = permuted(array, shape.kv_heads)
        tensors[gguf_name(name)] = array
    return tensors


def save_gguf(
    shape: Shape,
    path: Path,
    formats: str | Callable[[str], str] = "F32",
    seed: int = 0,
    *,
    made: Mapping[str, Array] | None = None,
    metadata: Callable[[gguf.GGUFWriter], None] | None = None,
    encode: Callable[[str, Array], bytes] | None = None,
) -> Path:
    """Write a GGUF without tokenizer.

    `formats` is one name for all matrices or a function of the GGUF name; norms and biases are F32.  `metadata` writes the tokenizer's keys
    and any others; `encode` makes the bytes of matrices (of K-quants, which ``gguf`` cannot write).
    """
    writer = gguf.GGUFWriter(path, shape.arch)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.dim)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_rope_dimension_count(shape.head)
    writer.add_rope_freq_base(shape.theta)
    writer.add_layer_norm_rms_eps(shape.eps)
    if metadata is None:
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(shape.vocab)
    else:
        metadata(writer)
    for name, array in gguf_tensors(shape, seed, made).items():
        wanted = formats if isinstance(formats, str) else formats(name)
        kind = gguf.GGMLQuantizationType[wanted if array.ndim == 2 else "F32"]
        if encode and array.ndim == 2:
            data = np.frombuffer(encode(wanted, array), np.uint8).reshape(len(array), -1)
        else:
            data = gguf.quants.quantize(array, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


# ---- APR ---------------------------------------------------------------------------------------

#: Format name -> dtype byte.
APR_TYPES = {"F32": 0, "F16": 1, "Q4_K": 12, "Q6_K": 14, "BF16": 30, "APR_Q4": 128, "APR_Q8": 129}


def apr_bytes(array: Array, kind: str) -> bytes:
    """The values in one of APR's own formats or a plain one; K-quants come from llama.cpp."""
    if kind in ("F32", "F16", "BF16"):
        return bytes(gguf.quants.quantize(array, gguf.GGMLQuantizationType[kind]).tobytes())
    flat = array.ravel().astype(np.float32)
    if kind == "APR_Q8":
        scale = np.float32(np.abs(flat).max() / 127)
        return scale.tobytes() + np.rint(flat / scale).astype(np.int8).tobytes()
    blocks = np.resize(np.append(flat, np.zeros(-len(flat) % 32, np.float32)), (-(-len(flat) // 32), 32))
    scales = (np.abs(blocks).max(axis=1) / 7).astype(np.float16)
    divisor = np.where(scales == 0, 1, scales).astype(np.float32)[:, None]
    nibbles = (np.clip(np.rint(blocks / divisor), -8, 7) + 8).astype(np.uint8)
    packed = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return b"".join(scale.tobytes() + row.tobytes() for scale, row in zip(scales, packed, strict=True))


def apr_values(data: bytes, kind: str, shape: tuple[int, ...]) -> Array:
    """What `apr_bytes` of APR's own formats mean."""
    count = int(np.prod(shape))
    if kind == "APR_Q8":
        return (np.frombuffer(data, np.int8, offset=4).astype(np.float32) * np.frombuffer(data, np.float32, 1)).reshape(shape)
    rows = np.frombuffer(data, np.uint8).reshape(-1, 18)
    scales = rows[:, :2].copy().view(np.float16).astype(np.float32)
    nibbles = np.stack([rows[:, 2:] & 15, rows[:, 2:] >> 4], axis=-1).reshape(-1, 32).astype(np.float32)
    return ((nibbles - 8) * scales).ravel()[:count].reshape(shape)


def apr_file(tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]], metadata: bytes, flags: int = 0x0420) -> bytes:
    """An APR 2.0 file: name -> (dtype byte, shape, bytes).  Data in order of the index, which is sorted."""

    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % 64)

    index, data = b"", b""
    for name, (kind, shape, raw) in sorted(tensors.items(), key=lambda item: item[0].encode()):
        spelled = name.encode()
        index += struct.pack("<H", len(spelled)) + spelled + struct.pack("<BB", kind, len(shape))
        index += struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<QQ", len(data), len(raw))
        data += padded(raw)
    where = 64 + len(padded(metadata))
    head = b"APR\0" + struct.pack("<BBHIQIQQ", 2, 0, flags, len(tensors), 64, len(metadata), where, where + len(padded(index)))
    head += struct.pack("<I", zlib.crc32(head + bytes(20))) + bytes(20)
    body = head + padded(metadata) + padded(index) + data
    return body + struct.pack("<I", zlib.crc32(body))


def apr_metadata(shape: Shape) -> dict[str, Any]:
    """What an APR file says about a model of the shape."""
    return {
        "architecture": shape.arch, "num_layers": shape.layers, "hidden_size": shape.dim, "intermediate_size": shape.ffn,
        "num_heads": shape.heads, "num_kv_heads": shape.kv_heads, "head_dim": shape.head, "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context, "rms_norm_eps": shape.eps, "rope_theta": shape.theta, "rope_type": 2,
    } | ({"attention_bias": True} if shape.attention_bias else {})  # fmt: skip


def save_apr(
    shape: Shape,
    path: Path,
    formats: str = "F32",
    seed: int = 0,
    *,
    made: Mapping[str, Array] | None = None,
    encode: Callable[[str, Array], bytes] | None = None,
    **more: Any,
) -> Path:
    """Write an APR file without tokenizer: matrices in the format, norms and biases in F32; `encode` makes the bytes of K-quants."""
    tensors = {}
    for name, array in (made or weights(shape, seed)).items():
        kind = formats if array.ndim == 2 else "F32"
        raw = encode(kind, array) if encode and array.ndim == 2 else apr_bytes(array, kind)
        tensors[name] = (APR_TYPES[kind], array.shape, raw)
    path.write_bytes(apr_file(tensors, json.dumps(apr_metadata(shape) | more).encode()))
    return path
