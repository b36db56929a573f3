"""What the tests share: one hypothesis profile, llama.cpp as a peer, the canary, and tiny models in every container, made once.

Owns the fixtures and the plain safetensors writer (no torch, so that the sanitizers can watch the core alone); the weights are those of
``tiny.py``.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import llamacpp
import numpy as np
import pytest
import tiny

from aprender import _core

hypothesis.settings.register_profile("aprender", deadline=None, derandomize=True, max_examples=50, database=None)
hypothesis.settings.load_profile("aprender")

CANARY = Path(__file__).resolve().parent.parent / "aprender" / "data" / "canary"
PROMPT = (261, 374, 220, 17, 10, 17, 30)  # "What is 2+2?", canary README

Blob = tuple[str, tuple[int, ...], bytes]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "foreign: needs torch or llama.cpp; the sanitizer run leaves it out")


@pytest.fixture(scope="session")
def peer() -> Iterator[llamacpp.Peer]:
    reason = llamacpp.missing()
    if reason:
        pytest.skip(reason)
    with llamacpp.Peer() as found:
        yield found


@pytest.fixture(scope="session")
def canary() -> _core.Model:
    return _core.Model(_core.File(CANARY / "canary.gguf"))


def safetensors_bytes(tensors: Mapping[str, Blob], metadata: Mapping[str, str] | None = None) -> bytes:
    """A file as the reference writer makes it: name -> (dtype, shape, bytes), in the order given, header padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())


def blob(array: np.ndarray, dtype: str = "BF16") -> Blob:
    """A float32 array in a safetensors dtype that holds it exactly."""
    data = {"F32": array, "F16": array.astype(np.float16), "BF16": (array.view(np.uint32) >> 16).astype(np.uint16)}[dtype]
    return dtype, array.shape, data.tobytes()


def config_json(shape: tiny.Shape, **more: Any) -> dict[str, Any]:
    """What transformers 5 writes for the shape, as far as it matters; `more` overrides, None as a value removes."""
    said = {
        "architectures": [{"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[shape.arch]],
        "model_type": shape.arch, "num_hidden_layers": shape.layers, "hidden_size": shape.dim, "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head, "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context, "rms_norm_eps": shape.eps, "tie_word_embeddings": shape.tied, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.theta}, "dtype": "bfloat16",
    }  # fmt: skip
    if shape.arch != "qwen2":
        said["attention_bias"] = shape.attention_bias
    return {key: value for key, value in (said | more).items() if value is not None}


def write_folder(folder: Path, shape: tiny.Shape, tensors: Mapping[str, Blob] | None = None, seed: int = 0, **more: Any) -> Path:
    """config.json and model.safetensors without torch; the tensors are those of the shape if not given."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tensors if tensors is not None else {name: blob(array) for name, array in tiny.weights(shape, seed).items()}
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    (folder / "config.json").write_text(json.dumps(config_json(shape, **more)))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., _core.Model]:
    """tiny_model(shape, container="gguf", formats="F32"): a bound model, one for all tests."""
    root = tmp_path_factory.mktemp("tiny")

    @functools.cache
    def make(shape: tiny.Shape, container: str = "gguf", formats: str = "F32") -> _core.Model:
        name = f"{hash((shape, container, formats)) & 0xFFFFFFFFFFFF:x}"
        if container == "gguf":
            return _core.Model(_core.File(tiny.save_gguf(shape, root / f"{name}.gguf", formats)))
        return _core.Model(_core.File(write_folder(root / name, shape)))

    return make
