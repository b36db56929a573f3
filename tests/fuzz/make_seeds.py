"""Writes the seed corpus: a few small valid files per target, from which the fuzzers start.

Owns the bytes of every seed that is named after what it shows (``basic``, ``all-types``, …); what a fuzzer found lies beside them under
its hash and is not touched.  Uses ``struct``, ``json`` and ``zlib`` only, so that no reader or writer of ours, and no foreign one, decides
what a file looks like.  ``scripts/fuzz.py seeds`` runs it; the files are committed.

    python tests/fuzz/make_seeds.py [folder]
"""

from __future__ import annotations

import json
import struct
import sys
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

# ---- GGUF ------------------------------------------------------------------------------------------

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)
CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}

#: ggml type id -> values and bytes of a block.
BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36), 10: (256, 84), 11: (256, 110),
    12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50),
    20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56),
    30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18), 42: (64, 18),
}  # fmt: skip


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(kind: int, item: Any) -> bytes:
    """One value; an array is (element kind, items)."""
    if kind == STR:
        return text(item)
    if kind == ARR:
        element, items = item
        return struct.pack("<IQ", element, len(items)) + b"".join(value(element, one) for one in items)
    return struct.pack("<" + CODES[kind], item)


def filling(size: int) -> bytes:
    """Bytes that are small as float32, float16 and scales alike."""
    return bytes((7 * i + 3) % 48 for i in range(size))


def gguf(
    pairs: Iterable[tuple[str, int, Any]],
    tensors: Iterable[tuple[str, list[int], int]],
    *,
    version: int = 3,
    alignment: int = 32,
    tail: int = 0,
) -> bytes:
    """`tensors`: name, dimensions (innermost first), ggml type."""
    pairs, tensors = list(pairs), list(tensors)
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs))
    for key, kind, item in pairs:
        out += text(key) + struct.pack("<I", kind) + value(kind, item)
    data = b""
    for name, dims, kind in tensors:
        block, size = BLOCKS[kind]
        count = 1
        for dim in dims:
            count *= dim
        data += bytes(-len(data) % alignment)
        out += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, len(data))
        data += filling(count // block * size)
    return out + bytes(-len(out) % alignment) + data + bytes(tail)


def model_gguf(
    arch: str, kind: int, *, dim: int, heads: int, kv: int, head: int, ffn: int, vocab: int, tied: bool, tokens: bool = False
) -> bytes:
    """One layer, as converters write it."""
    pairs: list[tuple[str, int, Any]] = [
        ("general.architecture", STR, arch), ("general.name", STR, "seed"), (f"{arch}.block_count", U32, 1),
        (f"{arch}.context_length", U32, 64), (f"{arch}.embedding_length", U32, dim), (f"{arch}.feed_forward_length", U32, ffn),
        (f"{arch}.attention.head_count", U32, heads), (f"{arch}.attention.head_count_kv", U32, kv),
        (f"{arch}.attention.key_length", U32, head), (f"{arch}.attention.value_length", U32, head),
        (f"{arch}.rope.dimension_count", U32, head), (f"{arch}.rope.freq_base", F32, 1e4),
        (f"{arch}.attention.layer_norm_rms_epsilon", F32, 1e-6),
    ]  # fmt: skip
    if tokens:
        pairs += [("tokenizer.ggml.model", STR, "gpt2"), ("tokenizer.ggml.tokens", ARR, (STR, [chr(97 + i) for i in range(vocab)]))]
    q, k = heads * head, kv * head
    tensors = [("token_embd.weight", [dim, vocab], kind), ("blk.0.attn_norm.weight", [dim], 0)]
    tensors += [("blk.0.attn_q.weight", [dim, q], kind), ("blk.0.attn_k.weight", [dim, k], kind), ("blk.0.attn_v.weight", [dim, k], kind)]
    if arch == "qwen2":
        tensors += [("blk.0.attn_q.bias", [q], 0), ("blk.0.attn_k.bias", [k], 0), ("blk.0.attn_v.bias", [k], 0)]
    if arch == "qwen3":
        tensors += [("blk.0.attn_q_norm.weight", [head], 0), ("blk.0.attn_k_norm.weight", [head], 0)]
    tensors += [("blk.0.attn_output.weight", [q, dim], kind), ("blk.0.ffn_norm.weight", [dim], 0)]
    tensors += [(f"blk.0.ffn_{part}.weight", [dim, ffn], kind) for part in ("gate", "up")]
    tensors += [("blk.0.ffn_down.weight", [ffn, dim], kind), ("output_norm.weight", [dim], 0)]
    if not tied:
        tensors.append(("output.weight", [dim, vocab], kind))
    return gguf(pairs, tensors)


def gguf_seeds() -> dict[str, bytes]:
    basic = [
        ("general.architecture", STR, "llama"),
        ("llama.block_count", U32, 1),
        ("x.list", ARR, (STR, ["a", "", "\u00e9\u20ac\U0001f600"])),
    ]
    three = [("a", [4], 0), ("b", [3, 2], 0), ("c", [256], 12)]
    kinds = [(f"k{kind}", kind, 1) for kind in CODES]
    lists = [(f"l{kind}", ARR, (kind, [0, 1, 1])) for kind in CODES]
    by_format = [(f"t{kind}", [block, 1], kind) for kind, (block, _) in BLOCKS.items()]
    return {
        "basic": gguf(basic, three),
        "values": gguf([*kinds, *lists, ("s", STR, "text"), ("none", ARR, (U8, [])), ("f", F64, 1e300)], []),
        "formats": gguf([], by_format),
        "aligned-64": gguf([("general.alignment", U32, 64), *basic], three, alignment=64),
        "aligned-1": gguf([("general.alignment", U32, 1)], three, alignment=1),
        "version-2-tail": gguf(basic[:1], three, version=2, tail=32),
        "ranks": gguf([], [("scalar", [], 0), ("none", [0], 0), ("none2", [4, 0, 2], 1), ("four", [2, 1, 1, 2], 24)]),
        "empty": gguf([], []),
        "nothing": b"",
        "many-keys": gguf([(f"{i:02}", U8, 1) for i in range(85)], []),
        "many-tensors": gguf([], [(f"{i:02}", [], 24) for i in range(85)], alignment=32),
        "long-string": gguf([("s", STR, "x" * 1001)], []),
        "long-metadata": gguf([(f"{i:02}", STR, "x" * 990) for i in range(5)] + [("z", U8, 1)], [("a", [1], 24)]),
    }


def bind_seeds() -> dict[str, bytes]:
    small: dict[str, Any] = {"dim": 4, "heads": 2, "kv": 1, "head": 2, "ffn": 6, "vocab": 5}
    blocks: dict[str, Any] = {"dim": 32, "heads": 2, "kv": 1, "head": 16, "ffn": 32, "vocab": 3}
    made = {
        "llama": model_gguf("llama", 0, **small, tied=False),
        "llama-tied-tokens": model_gguf("llama", 1, **small, tied=True, tokens=True),
        "qwen2": model_gguf("qwen2", 0, **small, tied=False),
        "qwen3-bf16": model_gguf("qwen3", 30, **small, tied=True),
        "llama-q8_0": model_gguf("llama", 8, **blocks, tied=True),
        "qwen2-q4_0": model_gguf("qwen2", 2, **blocks, tied=True),
    }
    neighbours, names, twice = (
        model_apr("llama", rope_type=0),
        model_apr("llama", spelled=gguf_spelled),
        model_apr("llama", n_layer=1, d_model=8),
    )
    spelled = {"apr-llama": model_apr("llama"), "apr-qwen2": model_apr("qwen2"), "apr-neighbours": neighbours}
    spelled["apr-class"] = model_apr("llama", architecture="LlamaForCausalLM")
    two, biased = model_apr("llama", hf_model_type="qwen2"), model_apr("qwen2", rope_type=0)
    strange = model_apr("llama", tie_word_embeddings=True, attention_bias=0, hidden_act=1)
    bad = {"apr-contradiction": twice, "apr-two-names": two, "apr-neighbours-bias": biased, "apr-strange": strange}
    return made | spelled | {"apr-gguf-names": names} | bad


# ---- safetensors and config.json ------------------------------------------------------------------

WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "U8": 1, "U16": 2, "U32": 4, "U64": 8, "BOOL": 1,
          "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}  # fmt: skip


def safetensors(tensors: Iterable[tuple[str, str, list[int]]], metadata: dict[str, str] | None = None, pad: int = 0) -> bytes:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, dtype, shape in tensors:
        size = WIDTHS[dtype]
        for dim in shape:
            size *= dim
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    written = json.dumps(header, separators=(",", ":")).encode() + b" " * pad
    return struct.pack("<Q", len(written)) + written + filling(at)


def safetensors_seeds() -> dict[str, bytes]:
    two = [("a", "F32", [2, 3]), ("b", "F32", [4])]
    escaped = rb'{"\u0061\ud83d\ude00":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}'
    return {
        "basic": safetensors(two),
        "metadata-padded": safetensors(two, {"format": "pt", "\u00e9": "\U0001f600", 'q"\\': "\n"}, pad=5),
        "dtypes": safetensors([(f"t.{dtype}", dtype, [2, 2]) for dtype in WIDTHS]),
        "ranks": safetensors([("scalar", "F32", []), ("none", "F16", [0]), ("none2", "I8", [3, 0]), ("eight", "U8", [1] * 8)]),
        "empty": safetensors([]),
        "many-tensors": safetensors([(f"{i:02}", "U8", []) for i in range(81)]),
        "many-keys": safetensors([], {f"{i:02}": "" for i in range(81)}),
        "long-header": safetensors([("a", "U8", [])], {"a": "x" * 4500}),
        "same-place": safetensors([("a", "U8", [0]), ("b", "F32", [0, 1]), ("c", "U8", [1])]),
        "index": b'{"weight_map":{"a":"b"}} ',
        "escapes": struct.pack("<Q", len(escaped)) + escaped + b"\0",
    }


#: The model of target_config.c.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "vocab_size": 5, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1,
    "rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "float32", "use_cache": True, "bos_token_id": 1, "eos_token_id": [1, 2],
}  # fmt: skip


def config_seeds() -> dict[str, bytes]:
    plain = {name: CONFIG[name] for name in ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                             "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings")}  # fmt: skip
    old = {name: item for name, item in CONFIG.items() if name not in ("rope_theta", "rope_scaling")}
    nested = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "layer_types": ["full_attention"],
        "id2label": {"0": "a", "1": "b"},
        "auto_map": {},
    }
    variants = {
        "llama": CONFIG,
        "plain": plain,
        "rope-parameters": old | nested,
        "rope-scaling": CONFIG | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
        "qwen2": CONFIG | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1},
        "bias": CONFIG | {"attention_bias": True},
        "text-for-number": CONFIG | {"num_key_value_heads": "1"},
        "nulls": CONFIG | {"attention_bias": None, "tie_word_embeddings": None, "mlp_bias": None},
        "untied": {name: item for name, item in CONFIG.items() if name != "tie_word_embeddings"},
        "words": CONFIG | {"hidden_act": "swish", "rope_scaling": {"rope_type": "none"}, "layer_types": ["linear", "chunked_attention"]},
        "many-keys": CONFIG | {f"{i:02}": None for i in range(80)},
        "many-in-array": CONFIG | {"array": [{f"{i:02}": None} for i in range(81)]},
        "old-theta": CONFIG | {"rope_parameters": {"rope_theta": 5e5}},
        "quantised": CONFIG | {"quantization_config": {"bits": 4, "quant_method": "gptq", "modules": [[["a"], {}], -1.5e-3]}},
    }
    return {name: json.dumps(item, indent=1 if name == "llama" else None).encode() for name, item in variants.items()}


def json_seeds() -> dict[str, bytes]:
    return {
        "values": rb'{"a":[1,-2,3.5,1e10,-0,0.5E-3,18446744073709551615,-9223372036854775808],"b":{"c":null,"d":true,"e":false},"":"" }',
        "strings": rb'["\"\\\/\b\f\n\r\t","\u0041\u00e9\u20ac\ud83d\ude00",' + '"\u00e9\u20ac\U0001f600"]'.encode(),
        "deep": b"[" * 64 + b"]" * 64,
        "deep-objects": b'{"a":' * 20 + b"0" + b"}" * 20,
        "scalar": b" -1.25e+2 ",
        "blank": b' \t\r\n[ 1 , { "a" : [ ] , "b" : { } } ] ',
        "numbers": b"[" + b",".join([b"1" * 40, b"0.1", b"1e308", b"5e-324", b"9007199254740993", b"0." + b"3" * 100]) + b"]",
    }


# ---- APR ------------------------------------------------------------------------------------------


def apr_size(kind: int, dims: list[int]) -> int:
    count = 1
    for dim in dims:
        count *= dim
    cols = dims[-1] if dims else 1
    if kind in (8, 128):  # the blocks run on over the ends of rows
        return (count + 31) // 32 * 18
    if kind in (9, 129):
        return 4 + count
    block, size = {3: (1, 8), 4: (1, 4), 5: (1, 8), 6: (1, 1), 7: (1, 1)}.get(kind) or BLOCKS[kind]
    return count // max(cols, 1) * ((cols + block - 1) // block) * size


def padded(part: bytes) -> bytes:
    return part + bytes(-len(part) % 64)


def apr(metadata: dict[str, Any], tensors: Iterable[tuple[str, list[int], int]], *, flags: int = 0x0400) -> bytes:
    """`tensors`: name, dimensions (outermost first), dtype byte; the index is sorted, the data lie in its order."""
    described = json.dumps(metadata, separators=(",", ":")).encode()
    rows = sorted(tensors)
    index, data = b"", b""
    for name, dims, kind in rows:
        size = apr_size(kind, dims)
        index += struct.pack("<H", len(name)) + name.encode() + struct.pack(f"<BB{len(dims)}QQQ", kind, len(dims), *dims, len(data), size)
        data += padded(filling(size))
    index_at = 64 + len(padded(described))
    head = b"APR\0" + struct.pack("<BBHIQIQQ", 2, 0, flags, len(rows), 64, len(described), index_at, index_at + len(padded(index)))
    rest = bytes(20)
    image = head + struct.pack("<I", zlib.crc32(head + rest)) + rest + padded(described) + padded(index) + data
    return image + struct.pack("<I", zlib.crc32(image))


def counted(image: bytes, count: int) -> bytes:
    """The APR with another number of tensors in its header."""
    head = image[:8] + struct.pack("<I", count) + image[12:40]
    image = head + struct.pack("<I", zlib.crc32(head + image[44:64])) + image[44:-4]
    return image + struct.pack("<I", zlib.crc32(image))


def gguf_spelled(name: str) -> str:
    """As writers that kept GGUF's names have it."""
    parts = {
        "model.embed_tokens.": "token_embd.", "lm_head.": "output.", "model.norm.": "output_norm.", "model.layers.": "blk.",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_", "mlp.": "ffn_", "_proj": "",
    }  # fmt: skip
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


def model_apr(arch: str, spelled: Callable[[str], str] = str, **more: Any) -> bytes:
    """The model of target_config.c."""
    metadata = {
        "model_type": arch, "architecture": arch, "hidden_size": 4, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "vocab_size": 5,
        "intermediate_size": 6, "max_position_embeddings": 64, "rope_theta": 10000.0, "rope_type": 2, "rms_norm_eps": 1e-6, "head_dim": 2,
    }  # fmt: skip
    shapes = {
        "input_layernorm": ([4], 0), "post_attention_layernorm": ([4], 0), "self_attn.q_proj": ([4, 4], 0), "self_attn.k_proj": ([2, 4], 1),
        "self_attn.v_proj": ([2, 4], 128), "self_attn.o_proj": ([4, 4], 129), "mlp.gate_proj": ([6, 4], 30), "mlp.up_proj": ([6, 4], 0),
        "mlp.down_proj": ([4, 6], 0),
    }  # fmt: skip
    at = "model.layers.0."
    tensors = [("model.embed_tokens.weight", [5, 4], 0), ("lm_head.weight", [5, 4], 0), ("model.norm.weight", [4], 0)]
    tensors += [(f"{at}{name}.weight", dims, kind) for name, (dims, kind) in shapes.items()]
    if arch == "qwen2":
        tensors += [(f"{at}self_attn.{part}_proj.bias", [rows], 0) for part, rows in (("q", 4), ("k", 2), ("v", 2))]
    return apr(metadata | more, [(spelled(name), dims, kind) for name, dims, kind in tensors])


def apr_seeds() -> dict[str, bytes]:
    two = [("a", [4], 0), ("b", [2, 3], 0)]
    named = {
        "name": "seed",
        "license": None,
        "quantization": {"quant_type": "q4_k", "bits": 4},
        "tokenizer.vocabulary": ["a", "\u00e9"],
        "tokenizer.scores": [0.5, -1],
    }
    return {
        "basic": apr({"model_type": "llama"}, two),
        "metadata": apr(named, two),
        "dtypes": apr({}, [(f"t{kind}", [2, 40], kind) for kind in (0, 1, 3, 4, 5, 6, 7, 8, 9, 12, 14, 30, 128, 129)]),
        "ranks": apr({}, [("eight", [1] * 8, 0), ("none", [0, 3], 1), ("scalar", [], 0)]),
        "empty": apr({}, []),
        "many-tensors": apr({}, [(f"{i:02}", [], 6) for i in range(81)]),
        "count-too-large": counted(apr({}, [(name, [1] * 8, 0) for name in "abcd"]), 15),
        "long-metadata": apr({"a": "x" * 4500}, []),
        "shard-negative": apr({"sharding": {"shard_count": -1}}, []),
        "same-place": apr({}, [("a", [0], 0), ("b", [0], 0), ("c", [1], 0)]),
        "flags-0": apr({"architecture": "qwen2"}, two, flags=0),
        "shard": apr({"sharding": {"shard_count": 2, "shard_index": 1, "pattern": "m-{}.apr"}}, two),
        "shard-alone": apr({"sharding": {"shard_count": 1, "shard_index": 0, "pattern": None}}, two),
        "shard-beyond": apr({"sharding": {"shard_count": 2, "shard_index": 2, "pattern": "../m"}}, two),
        "llama": model_apr("llama"),
    }


# ---- folders --------------------------------------------------------------------------------------

#: As in target_folder.c.
NAMES = (
    "model.safetensors", "config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "m.apr", "m.bin", "red", "b0", "b1", ".",
)  # fmt: skip
REGULAR, FOLDER, PIPE, LINK = range(4)


def folder(opened: str, entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    parts = (struct.pack("<BBH", NAMES.index(name), kind, len(content)) + content for name, kind, content in entries)
    return bytes([NAMES.index(opened)]) + b"".join(parts)


def folder_seeds() -> dict[str, bytes]:
    layer = {
        "input_layernorm": [4], "self_attn.q_proj": [4, 4], "self_attn.k_proj": [2, 4], "self_attn.v_proj": [2, 4],
        "self_attn.o_proj": [4, 4], "post_attention_layernorm": [4], "mlp.gate_proj": [6, 4], "mlp.up_proj": [6, 4],
        "mlp.down_proj": [4, 6],
    }  # fmt: skip
    shapes = {"model.embed_tokens": [5, 4], "model.norm": [4]} | {f"model.layers.0.{name}": shape for name, shape in layer.items()}
    rows = [(f"{name}.weight", "F32", shape) for name, shape in shapes.items()]
    config = ("config.json", REGULAR, config_seeds()["plain"])
    shards = (NAMES[3], NAMES[4])
    index = {"metadata": {"total_size": 1}, "weight_map": {name: shards[i >= 5] for i, (name, _, _) in enumerate(rows)}}
    listed = (NAMES[2], REGULAR, json.dumps(index).encode())
    parts = [(NAMES[3], REGULAR, safetensors(rows[:5])), (NAMES[4], REGULAR, safetensors(rows[5:]))]
    split: Any = [("split.count", U16, 2), ("split.tensors.count", I32, 3)]
    first = gguf([("general.architecture", STR, "llama"), ("split.no", U16, 0), *split], [("a", [4], 0), ("b", [3, 2], 0)])
    halves = [(NAMES[5], REGULAR, first), (NAMES[6], REGULAR, gguf([("split.no", U16, 1), *split], [("c", [2], 0)]))]
    return {
        "whole": folder(".", [(NAMES[0], REGULAR, safetensors(rows)), config]),
        "sharded": folder(".", [listed, config, *parts]),
        "hub": folder(".", [listed, config, parts[0], (NAMES[4], LINK, b"\1"), ("b1", REGULAR, parts[1][2])]),
        "split": folder(NAMES[5], halves),
        "apr": folder("m.apr", [("m.apr", REGULAR, model_apr("llama"))]),
        "trace": bytes([NAMES.index("m.bin") + 13 * 10]) + folder(".", [("m.bin", REGULAR, aprt_seeds()["basic"])])[1:],
        **{
            f"shard-named-{what}": folder(".", [(NAMES[2], REGULAR, json.dumps({"weight_map": {"a": name}}).encode())])
            for what, name in (("dots", ".."), ("dot", "."), ("nul", "a\0b"), ("long", "x" * 256), ("nothing", ""))
        },
        "many-in-map": folder(".", [(NAMES[2], REGULAR, json.dumps({"weight_map": {f"{i:02}": "a" for i in range(81)}}).encode())]),
        "many-in-shards": folder(
            ".",
            [
                (NAMES[2], REGULAR, json.dumps({"weight_map": {"00": shards[0], "50": shards[1]}}).encode()),
                (NAMES[3], REGULAR, safetensors([(f"{i:02}", "U8", []) for i in range(41)])),
                (NAMES[4], REGULAR, safetensors([(f"{i:02}", "U8", []) for i in range(50, 91)])),
            ],
        ),
        "split-uncounted": folder(
            NAMES[5],
            [
                (NAMES[5], REGULAR, gguf([("split.no", U16, 0), ("split.count", U16, 2)], [("a", [4], 0)])),
                (NAMES[6], REGULAR, gguf([("split.no", U16, 1), ("split.count", U16, 2)], [("b", [4], 0)])),
            ],
        ),
        "pipe": folder(".", [(NAMES[0], PIPE, b""), config]),
        "nothing": folder(".", [("m.bin", REGULAR, b"version https://git-lfs.github.com/spec/v1")]),
    }


def staged_seeds() -> dict[str, bytes]:
    """Small and larger than what is read at once."""
    many: list[tuple[str, int, Any]] = [(f"key.{i}", STR, "x" * 40) for i in range(12)]
    return {
        "gguf": gguf_seeds()["basic"],
        "gguf-long": gguf(many, [("a", [64], 0), ("b", [3, 2], 0)]),
        "safetensors": safetensors_seeds()["basic"],
        "safetensors-long": safetensors([(f"tensor.{i}", "F32", [2, 3]) for i in range(12)], {"key": "x" * 300}),
        "apr": apr_seeds()["metadata"],
        "apr-long": apr({f"key{i}": "x" * 40 for i in range(12)}, [("a", [64], 0), ("b", [2, 40], 128)]),
    }


def aprt_seeds() -> dict[str, bytes]:
    def aprt(layer: int, words: list[int]) -> bytes:
        return b"APRT" + struct.pack(f"<II{len(words)}I", layer, len(words), *words)

    turned = b"APRT" + struct.pack(">II4I", 0, 4, 1, 2, 3, 4)
    return {
        "big-endian": turned,
        "basic": aprt(0, [0x3F800000] * 4),
        "empty": aprt(3, []),
        "whole": aprt(0xFFFFFFFF, [0x7FC00000, 0x7F800001, 0xFF800000, 1]),
    }


TARGETS = {
    "gguf": gguf_seeds, "safetensors": safetensors_seeds, "config": config_seeds, "json": json_seeds, "bind": bind_seeds, "apr": apr_seeds,
    "aprt": aprt_seeds, "folder": folder_seeds, "staged": staged_seeds,
}  # fmt: skip


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "seeds"
    for target, seeds in TARGETS.items():
        (folder / target).mkdir(parents=True, exist_ok=True)
        for name, content in seeds().items():
            (folder / target / name).write_bytes(content)


if __name__ == "__main__":
    main()
