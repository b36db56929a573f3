"""What a declared arithmetic loses: sound ones what their roundings cost, and no more; sums that stand still and values that vanish, more.

Truth: engines in NumPy and llama.cpp's rules that carry the arithmetic out as declared; float64 without any rounding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
from hf_like import FORMATS, Array, capture, model, profile

import aprender
from aprender import arithmetic, bisect
from aprender.arithmetic import F16, Profile
from aprender.captures import Captures, save
from aprender.judge import ggml, noise, sums, verdict
from aprender.judge.local import EXACT, WRONG, StageResult, local
from aprender.judge.loss import ARITHMETIC_LOSS, Loss, loss
from aprender.judge.prediction import Operand, Prediction, Setting
from aprender.judge.rule import Gates, Rule
from aprender.judge.witness import ModelData

IDS = [int(i) for i in np.random.default_rng(6).integers(0, 112, 24)]
STAGES = 44  # of a pass with two layers
GATES: Gates = Rule().gates(10**5, 10**4)
TIMES = 1.3  # a sound arithmetic loses at most so many times its cost: the error of a variance that is estimated over a few dozen tokens


def findings(results: list[StageResult]) -> list[tuple[str, int | None]]:
    return [r.key for r in results if r.loss is not None and r.loss.reason]


def worst(results: list[StageResult]) -> float:
    return max(r.loss.relative / r.loss.cost for r in results if r.loss is not None and r.loss.cost > 0)


# ---- sound arithmetics ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_a_clean_side_loses_what_its_roundings_cost(arch: str, fmt: str) -> None:
    data = model(tiny.Shape(arch))
    results = local(capture(data, IDS, fmt), data, profile(fmt))
    assert findings(results) == []
    print(f"{arch} {fmt}: at most {worst(results):.2f} times the cost")
    assert worst(results) < TIMES
    assert sum(r.loss is not None for r in results) > 30


@pytest.mark.parametrize("kind", ["canary.gguf", ""])
def test_the_canary_loses_what_its_roundings_cost(kind: str) -> None:
    side = aprender.side(aprender.canary(kind))
    results = local(side.capture(IDS), ModelData(**side.model_data()), side.profile)
    assert findings(results) == []
    assert worst(results) < TIMES


@pytest.mark.foreign
@pytest.mark.parametrize("cache", ["f32", "f16"])
def test_eight_bit_activations_lose_what_they_cost(cache: str, peer: object) -> None:
    """llama.cpp on the canary's 4-bit weights: a loss of 4e-3 per product, which is that of the declared blocks."""
    side = aprender.side(f"llama.cpp:{aprender.canary()}@{cache}")
    results = local(side.capture(IDS), ModelData(**side.model_data()), side.profile)
    assert findings(results) == []
    assert worst(results) < TIMES
    assert max(r.loss.relative for r in results if r.loss is not None) > 1e-3


# ---- activations in blocks -----------------------------------------------------------------------------------------------------------


def product(x: Array, w: Array, fmt: str) -> Loss | None:
    """The loss of x · wᵀ with weights in a format, under llama.cpp's rules; bytes and values of the weights by the gguf package."""
    kind = gguf.GGMLQuantizationType[fmt]
    raw = gguf.quants.quantize(w, kind).view(np.uint8).reshape(len(w), -1)
    held = gguf.quants.dequantize(raw, kind).reshape(w.shape)
    every = np.arange(len(x))
    at = Setting(arithmetic.profile("ggml-cpu"), {}, range(len(x)), every, every, weights=(held,), stored=((fmt, raw),))
    return loss(ggml.PREDICT["MATMUL"](at, [Operand(x.astype(np.float64))]), GATES, 1.5, STAGES)


def operands(tokens: int = 24, k: int = 512, columns: int = 64) -> tuple[Array, Array]:
    generator = np.random.default_rng(3)
    return generator.standard_normal((tokens, k)).astype(np.float32), generator.standard_normal((columns, k)).astype(np.float32)


@pytest.mark.parametrize("fmt", ["Q8_0", "F16"])
def test_ordinary_activations(fmt: str) -> None:
    x, w = operands()
    found = product(x, w, fmt)
    assert found is not None
    assert not found.reason
    assert found.relative == pytest.approx(found.cost, rel=0.2)  # the errors of 24 tokens are shared by all columns


def test_an_outlier_takes_the_step_of_its_block_and_that_is_declared() -> None:
    """One channel 1000 times the others: in its block all others become 0.  Block formats cost that; it is shown, and is no finding."""
    x, w = operands()
    x[:, 5] *= 1000
    found = product(x, w, "Q8_0")
    assert found is not None
    assert not found.reason
    x[:, 5], w[:, 5] = 1e5, 0  # the weights do not read the channel: what is left of the block is lost, and nothing hides it
    found = product(x, w, "Q8_0")
    assert found is not None
    assert not found.reason
    assert found.relative > 0.2  # 31 of 512 products: sqrt(31 / 512) = 0.25


@pytest.mark.parametrize(("fmt", "tiny_one"), [("Q8_0", 1e-6), ("F16", 1e-9)])
def test_a_scale_that_underflows(fmt: str, tiny_one: float) -> None:
    """max / 127 = 3e-8 is below half of the smallest float16, 6e-8: the scale is 0, and so is everything.  1e-9 itself is 0 in float16."""
    x, w = operands()
    found = product(x * np.float32(tiny_one), w, fmt)
    assert found is not None
    assert found.relative == pytest.approx(1.0, abs=0.2)  # a few of the largest blocks still round to the smallest scale
    assert "its declared roundings lose" in found.reason


# ---- probabilities -------------------------------------------------------------------------------------------------------------------


def flat_softmax(keys: int, name: str) -> Loss | None:
    """One query that sees so many keys, all with nearly the same score."""
    hparams = tiny.Shape("llama").hparams
    at = Setting(arithmetic.profile(name), hparams, [0], np.array([keys - 1]), np.arange(keys))
    s = np.random.default_rng(0).normal(size=(4, 1, keys)) * 0.1
    return loss(noise.PREDICT["SOFTMAX"](at, [Operand(s)]), GATES, 1.15, STAGES)


def test_probabilities_vanish_in_float16_over_many_keys() -> None:
    """1 / 1000 is an ordinary float16; 1 / 500 000 = 2e-6 has 5 bits left (a step of 6e-8); in bfloat16 nothing ends."""
    few, many, wide = flat_softmax(1000, "hf-f16"), flat_softmax(500_000, "hf-f16"), flat_softmax(500_000, "hf-bf16")
    assert few is not None
    assert many is not None
    assert wide is not None
    assert (bool(few.reason), bool(many.reason), bool(wide.reason)) == (False, True, False)
    assert many.relative == pytest.approx(2.0**-24 / 12**0.5 * 500_000, rel=0.1)  # a step of 2^-24 at 1 / 500 000


# ---- sums that stand still -----------------------------------------------------------------------------------------------------------


def half_sums(stage: str, layer: int | None, a: Array, b: Array) -> Array:
    """NumPy's float16, one product after the other; a product of two float16 numbers and its sum are exact in float64."""
    total = np.zeros((*a.shape[:-1], b.shape[-1]), np.float16)
    for k in range(a.shape[-1]):
        total = (total.astype(np.float64) + a[..., k, None].astype(np.float64) * b[..., None, k, :]).astype(np.float16)
    return total.astype(np.float32)


def stalling(arch: str = "llama", ffn: int = 4096) -> ModelData:
    """A model whose down projection of layer 1 adds thousands of numbers of one sign: gate = up makes silu(g) g mostly positive."""
    data = model(tiny.Shape(arch, ffn=ffn))
    weights = dict(data.weights)
    weights["ffn_up", 1] = weights["ffn_gate", 1]
    weights["ffn_down", 1] = np.full_like(weights["ffn_down", 1], 0.25)
    return dataclasses.replace(data, weights=weights)


def test_narrow_sums_are_what_numpy_makes() -> None:
    generator = np.random.default_rng(5)
    x, w = (generator.standard_normal((2, 7, 300)).astype(np.float16).astype(np.float64) for _ in range(2))
    bits, left = sums.narrow(sums.Dot(x, w, arithmetic.Order()), F16)
    wanted = half_sums("", None, x.astype(np.float32), w.transpose(0, 2, 1).astype(np.float32))
    assert np.array_equal(bits, wanted)
    error = bits - x @ w.transpose(0, 2, 1)
    assert np.sqrt(np.mean(error**2 / left)) == pytest.approx(1.0, abs=0.25)  # 98 nearly Gaussian errors: sd 7 %


def test_float16_sums_that_do_not_stand_still() -> None:
    """Random signs, 160 terms: every stage has the declared bits, and loses what so many roundings cost."""
    data = model(tiny.Shape("qwen3", attention_bias=True))
    results = local(capture(data, IDS, "f16", multiply=half_sums), data, arithmetic.profile("f16-sums"))
    assert [(r.key, r.reason) for r in results if r.state == WRONG] == []
    products = [r for r in results if r.stage in ("qkv_bias", "attn_scores", "attention", "attn_out", "ffn_gate", "ffn_out", "lm_head")]
    assert {r.state for r in products} == {EXACT}
    assert findings(results) == []
    assert worst(results) < TIMES


def test_a_sum_that_stands_still_is_named() -> None:
    data = stalling()
    captures = capture(data, IDS, "f16", multiply=half_sums)
    results = local(captures, data, arithmetic.profile("f16-sums"))
    assert [r.key for r in results if r.state == WRONG] == []
    assert findings(results) == [("ffn_out", 1)]
    lost = next(r.loss for r in results if r.key == ("ffn_out", 1))
    assert lost is not None
    true = captures["ffn_swigl", 1].astype(np.float64) @ np.full((4096, 64), 0.25)
    size = np.linalg.norm(captures["ffn_out", 1] - true) / np.linalg.norm(true)
    assert lost.relative == pytest.approx(size, rel=1e-3)
    assert size > 0.05


def test_the_same_sums_in_float32_lose_nothing() -> None:
    data = stalling()
    results = local(capture(data, IDS, "f16"), data, profile("f16"))
    assert findings(results) == []
    assert [r.key for r in results if r.state == WRONG] == []


def test_float16_sums_that_were_not_declared_are_wrong() -> None:
    """Under hf-f16 the very same numbers are not what was declared: an operation, no loss."""
    data = stalling()
    results = local(capture(data, IDS, "f16", multiply=half_sums), data, profile("f16"))
    assert ("ffn_out", 1) in [r.key for r in results if r.state == WRONG]
    assert findings(results) == []


# ---- the report ----------------------------------------------------------------------------------------------------------------------


def test_the_finding_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Captures of the engine with float16 sums, judged as what it declares: exit 1, the stage, its size."""
    shape, data = tiny.Shape("llama", ffn=4096), stalling()
    made = tiny.weights(shape)
    made["model.layers.1.mlp.up_proj.weight"] = made["model.layers.1.mlp.gate_proj.weight"]
    made["model.layers.1.mlp.down_proj.weight"] = np.full_like(made["model.layers.1.mlp.down_proj.weight"], 0.25)
    folder = tiny.save_hf(shape, tmp_path / "model", made=made)
    captures = capture(data, IDS, "f16", multiply=half_sums)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    save(Captures(dict(captures), dataclasses.replace(captures.manifest, profile="f16-sums", model_digest=digest)), folder / "stages")
    words = [f"saved:{folder / 'stages'}", "--against", f"witness:{folder}", "--answer", "0"]
    assert bisect.main([*words, "--json"]) == 1
    data_out = json.loads(capsys.readouterr().out)
    assert (data_out["verdict"], data_out["finding"]) == ("divergence", ARITHMETIC_LOSS)
    assert (data_out["first"]["stage"], data_out["first"]["layer"], data_out["first"]["kind"]) == ("ffn_out", 1, ARITHMETIC_LOSS)
    assert {row["state"] for row in data_out["stages"]} <= {"exact", "noise", "unmeasured"}
    row = next(row for row in data_out["stages"] if (row["stage"], row["layer"]) == ("ffn_out", 1))
    assert row["loss"] > 0.05
    assert bisect.main([*words, "-q"]) == 1
    said = capsys.readouterr().out
    assert said.startswith("ffn_out of layer 1 of the subject")
    assert "is the first where the arithmetic itself fails, carried out as declared" in said


def test_a_wrong_operation_comes_before_a_loss() -> None:
    data = stalling()

    def plant(stage: str, layer: int | None, value: Array) -> Array:
        return value * np.float32(1.06) if (stage, layer) == ("final_norm", None) else value

    row: Profile = arithmetic.profile("f16-sums")
    results = local(capture(data, IDS, "f16", plant, multiply=half_sums), data, row)
    judged = verdict.decide(verdict.Party("it", row.name, results=results), verdict.Party("witness"), {}, IDS)
    assert (judged.finding, judged.first and judged.first.key) == ("operation", ("final_norm", None))
    assert [fault.kind for fault in judged.wrong][1:] == [ARITHMETIC_LOSS]


def test_infinities_are_left_to_overflow() -> None:
    """Nothing finite: no loss is spoken of."""
    y = np.full((2, 3), 1e6)
    assert loss(Prediction(y, np.zeros_like(y), y, np.zeros_like(y), F16, certain=True), GATES, 1.15, STAGES) is None
