"""Our engine beside llama.cpp on the same GGUF: the same text, and logits no further apart than its rounding of activations explains.

llama.cpp rounds the activations in front of every quantised matrix to 8 bits (q8_K for K-quants, q8_0 for the others) and to the half
format in front of F16 and BF16 ones.  What that costs is measured here, by the float64 witness with and without the rule; our engine keeps
float32 and must lie within twice that of llama.cpp.  Figures are printed with ``pytest -rP``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llamacpp
import numpy as np
import pytest
import tiny
from conftest import CANARY, PROMPT
from numpy.typing import ArrayLike, NDArray

from aprender import _core
from aprender.judge import witness

pytestmark = pytest.mark.foreign
Float = NDArray[np.float64]
LOGITS = ("lm_head", None)
FLOOR = 2e-6
"""Relative L2 that the order of float32 sums alone may make: 1.6e-7 per matrix product, grown through two to four layers."""


# ---- llama.cpp's rule for activations --------------------------------------------------------------------------------


def q8_0(x: NDArray[np.float32]) -> Float:
    """Blocks of 32: d = max|x| / 127, kept as a half; q = x * (127 / max|x|), to nearest even."""
    rows = x.reshape(-1, 32)
    top = np.abs(rows).max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(top > 0, np.float32(127) / top, np.float32(0))
    q = np.rint(rows * inverse)
    d = (top / np.float32(127)).astype(np.float16)
    return (q.astype(np.float64) * d.astype(np.float64)).reshape(x.shape)


def q8_k(x: NDArray[np.float32]) -> Float:
    """Blocks of 256: the value of largest magnitude becomes -127; the scale stays a float32."""
    rows = x.reshape(-1, 256)
    top = np.take_along_axis(rows, np.abs(rows).argmax(-1)[:, None], -1)
    with np.errstate(divide="ignore"):
        scale = np.where(top != 0, np.float32(-127) / top, np.float32(0))
        d = np.where(top != 0, np.float32(1) / scale, np.float32(0))
    q = np.minimum(127, np.rint(rows * scale))
    return (q.astype(np.float64) * d.astype(np.float64)).reshape(x.shape)


def bf16(x: NDArray[np.float32]) -> Float:
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


RULES: dict[str, Callable[[NDArray[np.float32]], Float]] = {
    "F32": lambda x: x.astype(np.float64),
    "F16": lambda x: x.astype(np.float16).astype(np.float64),
    "BF16": bf16,
    "Q4_0": q8_0,
    "Q5_0": q8_0,
    "Q8_0": q8_0,
    "Q4_K": q8_k,
    "Q6_K": q8_k,
}


def test_rules_on_numbers_by_hand() -> None:
    """A block whose largest magnitude is 127 has scale 1 in both; halves go to the even neighbour; zeros stay."""
    x = np.zeros(256, np.float32)
    x[:6] = [-127, 0.5, 1.5, 2.5, -0.4, 126.6]
    for rule in (q8_0, q8_k):
        np.testing.assert_array_equal(rule(x)[:7], [-127, 0, 2, 2, 0, 127, 0])
    assert {"Q4_K", "Q6_K", *tiny.FORMATS} <= set(RULES)


def witnessed(model: _core.Model, ids: Sequence[int], emulate: bool, monkeypatch: pytest.MonkeyPatch) -> Float:
    """Logits of the float64 witness; with `emulate`, every matrix product reads activations rounded by the rule of its weight's format."""
    weights = {(info.name, info.layer): model.weight(info.name, info.layer) for info in model.weights}
    rule = {id(weights[info.name, info.layer]): RULES[info.format] for info in model.weights if len(info.shape) == 2}

    def linear(x: Float, weight: ArrayLike, bias: ArrayLike | None = None) -> Float:
        y = rule[id(weight)](x.astype(np.float32)) @ np.asarray(weight, np.float64).T
        return y if bias is None else y + np.asarray(bias, np.float64)

    data = witness.ModelData(arch=model.arch, flags=model.flags, hparams=model.hparams, weights=weights)
    with monkeypatch.context() as patched:
        if emulate:
            patched.setattr(witness, "linear", linear)
        return witness.forward(data, ids)[LOGITS]


def relative(a: ArrayLike, b: ArrayLike) -> float:
    """|a - b| / |b| in float64."""
    one, two = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(one - two) / np.linalg.norm(two))


def figures(
    model: _core.Model, peer: llamacpp.Peer, ids: Sequence[int], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> dict[str, float]:
    ours = _core.Run(model, **options).forward(ids, [LOGITS])[LOGITS]
    theirs = peer.logits(model.file.path, ids)
    plain, rounded = (witnessed(model, ids, emulate, monkeypatch) for emulate in (False, True))
    return {
        "ours to llama.cpp": relative(theirs, ours),
        "what the rule costs": relative(rounded, plain),
        "llama.cpp to the witness with the rule": relative(theirs, rounded),
        "ours to the witness": relative(ours, plain),
    }


def said(name: str, found: dict[str, float]) -> None:
    print(f"{name}: relative L2 of the logits: " + ", ".join(f"{key} {value:.2g}" for key, value in found.items()))


# ---- logits ----------------------------------------------------------------------------------------------------------


PROMPTS = ["What is 2+2?", "What is 7 plus 8?", "What is the capital of France?", "What is the opposite of hot?", "Who are you?"]


def test_the_canary(canary: _core.Model, peer: llamacpp.Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """On each prompt within the bound.

    And the rule is the whole reason: with it the witness meets llama.cpp, wherever no sum in another order has tipped an activation.
    """
    explained = []
    for prompt in PROMPTS:
        found = figures(canary, peer, peer.tokenize(CANARY / "canary.gguf", prompt), monkeypatch)
        said(f"canary, {prompt!r}", found)
        assert found["ours to llama.cpp"] <= 2 * found["what the rule costs"]
        assert found["ours to the witness"] < FLOOR
        explained.append(found["llama.cpp to the witness with the rule"])
    assert min(explained) < 1e-5


@pytest.mark.parametrize("edit", [("q_post_rope", 1, "pairing", 1), ("attn_norm", 0, "eps", 1.0), ("attn_scores", 2, "kv_div", 1)], ids=str)
def test_a_fault_would_be_seen(
    edit: tuple[str, int, str, float], canary: _core.Model, peer: llamacpp.Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted in our engine, each of these is more than rounding of activations could be."""
    found = figures(canary, peer, PROMPT, monkeypatch, edits=[edit])
    said(str(edit), found)
    assert found["ours to llama.cpp"] > 2 * found["what the rule costs"]


TINY = [
    tiny.Shape("qwen2", head=16),  # llama.cpp takes heads x head size = width for granted there
    tiny.Shape("llama"),
    tiny.Shape("llama", tied=True),
    tiny.Shape("qwen3"),
    tiny.Shape("qwen3", tied=True),
]
IDS = [3, 1, 4, 1, 5, 92, 65, 35, 89, 79]


@pytest.mark.parametrize("shape", TINY, ids=str)
@pytest.mark.parametrize("formats", tiny.FORMATS)
def test_tiny_models(
    shape: tiny.Shape, formats: str, peer: llamacpp.Peer, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., _core.Model]
) -> None:
    model = tiny_model(shape, "gguf", formats)
    found = figures(model, peer, IDS, monkeypatch)
    said(f"{shape} {formats}", found)
    assert found["ours to llama.cpp"] <= 2 * found["what the rule costs"] + FLOOR
    assert found["ours to the witness"] < FLOOR


# ---- text ------------------------------------------------------------------------------------------------------------


def greedy(model: _core.Model, ids: Sequence[int], count: int, stop: frozenset[int]) -> list[int]:
    """The next ids, ours, with the cache."""
    run, step, made = _core.Run(model), list(ids), []
    while len(made) < count:
        best = int(run.forward(step, [LOGITS])[LOGITS][-1].argmax())
        made.append(best)
        if best in stop:
            break
        step = [best]
    return made


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_same_text(prompt: str, canary: _core.Model, peer: llamacpp.Peer) -> None:
    path = CANARY / "canary.gguf"
    ids = peer.tokenize(path, prompt)
    assert prompt != PROMPTS[0] or tuple(ids) == PROMPT
    theirs = peer.generate(path, ids, 16)
    ends = frozenset(int(canary.file.get(f"tokenizer.ggml.{name}_token_id")) for name in ("eos", "bos"))
    assert greedy(canary, ids, 16, ends) == theirs
    words = canary.file.get("tokenizer.ggml.tokens")
    print(repr("".join(words[i] for i in theirs).replace("\u0120", " ")))


def test_the_answer(canary: _core.Model, peer: llamacpp.Peer) -> None:
    """' 2+2 is 4.', id for id, by both."""
    answer = [220, 17, 10, 17, 374, 220, 19, 13]
    assert greedy(canary, PROMPT, 8, frozenset()) == peer.generate(CANARY / "canary.gguf", PROMPT, 8, stop=False) == answer


def test_the_peer_reads_the_file_given(peer: llamacpp.Peer, tmp_path: Path) -> None:
    """Other weights, other logits: the comparison is not of a file with itself."""
    shape = tiny.Shape("llama")
    paths = [tiny.save_gguf(shape, tmp_path / f"{seed}.gguf", "F32", seed) for seed in (0, 1)]
    assert relative(*(peer.logits(path, IDS) for path in paths)) > 0.1
