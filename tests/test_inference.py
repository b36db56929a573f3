"""Which arithmetic numbers are of: every declared row recognised on a side that has it, faults never taken for roundings, nor the reverse.

Truth: engines that run in the arithmetic (our own, Hugging Face, llama.cpp, NumPy), and what was planted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hf_like import DTYPES, FORMATS, Array, capture, float32, model, profile, rounded
from test_loss import half_sums

import aprender
from aprender import arithmetic, bisect, declared
from aprender.captures import Captures, save
from aprender.judge import roundings, verdict
from aprender.judge.inference import infer
from aprender.judge.local import WRONG, local
from aprender.judge.witness import ModelData

IDS = [int(i) for i in np.random.default_rng(6).integers(0, 112, 24)]
TEXT = "What is 7+8? 7+8 is 15."


def inferred(side: Any, ids: Any) -> Any:
    return infer(side.capture(ids), ModelData(**side.model_data()))


def wrong(results: Any) -> list[tuple[str, int | None]]:
    return [r.key for r in results if r.state == WRONG]


def decided(results: Any) -> verdict.Verdict:
    return verdict.decide(verdict.Party("it", results=results), verdict.Party("witness"), {}, IDS)


# ---- every declared row on a side that has it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["canary.gguf", ""])
def test_our_own_engine(kind: str) -> None:
    side = aprender.side(aprender.canary(kind))
    found = inferred(side, side.tokenizer().encode(TEXT))
    assert (found.best.profile, found.ties, found.best.explained) == ("exact", (), found.best.stages)


@pytest.mark.foreign
@pytest.mark.parametrize(("cache", "row"), [("f32", "ggml-cpu"), ("f16", "ggml-cpu-f16")])
def test_llamacpp(cache: str, row: str, peer: object) -> None:
    side = aprender.side(f"llama.cpp:{aprender.canary()}@{cache}")
    found = inferred(side, side.tokenizer().encode(TEXT))
    assert (found.best.profile, found.ties) == (row, ())


@pytest.mark.foreign
@pytest.mark.parametrize("row", ["hf-f32", "hf-f16", "hf-bf16", "hf-f32-sdpa", "hf-f16-sdpa", "hf-bf16-sdpa"])
@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_hugging_face(arch: str, row: str, tmp_path: Path) -> None:
    """One kernel in float32 shows nothing of its inside, and its output is a float32 either way: there the two rows tie, and say so."""
    dtype = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[row.split("-")[1]]
    side: Any = aprender.side(f"hf:{tiny.save_hf(tiny.Shape(arch), tmp_path)}@{dtype}")
    side.declare(arithmetic.profile(row))
    found = inferred(side, IDS)
    assert found.best.explained == found.best.stages
    assert {found.best.profile, *found.ties} == ({row} if row != "hf-f32-sdpa" else {"hf-f32", row})
    put_first = infer(side.capture(IDS), ModelData(**side.model_data()), side.profile)
    assert put_first.best.profile == row


@pytest.mark.parametrize("fmt", [*FORMATS, "sums"])
def test_an_engine_in_numpy(fmt: str) -> None:
    data = model(tiny.Shape("qwen3"))
    captures = capture(data, IDS, "f16", multiply=half_sums) if fmt == "sums" else capture(data, IDS, fmt)
    found = infer(captures, data)
    assert found.best.profile == {"sums": "f16-sums"}.get(fmt, f"hf-{fmt}")
    assert found.text().startswith(f"{found.best.profile}, rms z ")


# ---- faults decide nothing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plant", ["transposed@lm_head", "eps@2.attn_norm", "gqa-tile@1.attn_scores", "no-residual@3.post_ffn_residual"])
def test_a_planted_fault_stays_an_operation(plant: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Found where it is under the row that is inferred, as under the one that is declared."""
    seen = []
    for more in ((), ("--arithmetic", "auto")):
        assert bisect.main(["--plant", plant, "--against", "witness", "--answer", "0", "--json", *more]) == 1
        data = json.loads(capsys.readouterr().out)
        seen.append((data["finding"], data["first"]["stage"], data["first"]["layer"], data["subject"]["profile"]))
    layer, _, stage = plant.partition("@")[2].rpartition(".")
    assert seen[0] == seen[1] == ("operation", stage, int(layer) if layer else None, "exact")


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_wrong_activation_in_every_layer_is_no_arithmetic(fmt: str) -> None:
    """x / (1 + exp(-1.1 x)): wrong wherever it occurs, in no catalogue, and no rounding."""

    def plant(stage: str, layer: int | None, value: Array) -> Array:
        if stage == "ffn_gate":
            seen[layer] = rounded(value, fmt)
        return seen[layer] / (1 + np.exp(np.float32(-1.1) * seen[layer])) if stage == "ffn_silu" else value

    seen: dict[int | None, Array] = {}
    data = model(tiny.Shape("llama"))
    captures = capture(data, IDS, fmt, plant)
    assert infer(captures, data).best.profile == f"hf-{fmt}"
    judged = decided(local(captures, data, profile(fmt)))
    assert (judged.finding, [f.key for f in judged.wrong]) == ("operation", [("ffn_silu", 0), ("ffn_silu", 1)])


# ---- roundings that nothing declares -------------------------------------------------------------------------------------------------

Activations = Callable[[Array], Array]


def eight_bits(size: int, most: float = 127.0) -> Activations:
    """Whole numbers of 8 bits times max / ``most`` of each block of the last axis, in float32 throughout."""

    def rule(x: Array) -> Array:
        rows = x.reshape(*x.shape[:-1], -1, size or x.shape[-1])
        d = np.abs(rows).max(axis=-1, keepdims=True) / np.float32(most)
        q = np.clip(np.rint(rows / np.where(d > 0, d, np.float32(1))), -128, 127)
        return (q.astype(np.float32) * d).reshape(x.shape)

    return rule


def multiplying(rule: Activations, only: tuple[str, int | None] | None = None, both: bool = False) -> Callable[..., Array]:
    """Products of the linear layers, or of one of them, with rounded activations (and weights)."""

    def multiply(stage: str, layer: int | None, a: Array, b: Array) -> Array:
        if a.ndim == 3 or only not in (None, (stage, layer)):
            return float32(stage, layer, a, b)
        return rule(a) @ (np.ascontiguousarray(rule(b.T)).T if both else b)

    return multiply


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("size", [32, 0])
def test_eight_bits_in_all_products_are_the_arithmetic(size: int, fmt: str) -> None:
    data = model(tiny.Shape("llama"))
    results = local(capture(data, IDS, fmt, multiply=multiplying(eight_bits(size))), data, profile(fmt))
    products = [key for key in (r.key for r in results) if key[0] in ("qkv_matmul", "attn_out", "ffn_gate", "ffn_up", "ffn_out", "lm_head")]
    assert wrong(results) == products
    judged = decided(results)
    slug = f"int8/{size or 'row'}"
    assert (judged.verdict, judged.finding) == ("divergence", roundings.UNDECLARED)
    assert {r.rounding.slug for r in results if r.rounding} == {slug}
    assert f"nothing is left of that with {slug}" in judged.sentence
    assert "whose roundings are not those that it declares" in judged.sentence


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_fault_beside_them_is_named_first(fmt: str) -> None:
    """8-bit activations everywhere, and one of the products multiplies by the wrong scale: that is the operation."""
    eight = multiplying(eight_bits(32))
    data = model(tiny.Shape("llama"))
    for fault in (("ffn_up", 1), ("final_norm", None)):

        def plant(stage: str, layer: int | None, value: Array, fault: tuple[str, int | None] = fault) -> Array:
            return value * np.float32(1.06) if (stage, layer) == fault else value

        judged = decided(local(capture(data, IDS, fmt, plant, multiply=eight), data, profile(fmt)))
        assert (judged.finding, judged.first and judged.first.key) == ("operation", fault)
        assert {f.kind for f in judged.wrong[1:]} == {roundings.UNDECLARED}


@pytest.mark.parametrize("fmt", FORMATS)
def test_eight_bits_in_one_product_are_named_there(fmt: str) -> None:
    data = model(tiny.Shape("qwen3"))
    hidden = multiplying(eight_bits(32), ("attn_out", 1))
    results = local(capture(data, IDS, fmt, multiply=hidden), data, profile(fmt))
    assert wrong(results) == [("attn_out", 1)]
    judged = decided(results)
    assert judged.finding == "operation"
    assert judged.first is not None
    assert judged.first.kind == "undeclared int8/32"
    assert "first wrong operation, undeclared int8/32" in judged.sentence


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("most", "known"), [(128.0, True), (120.0, False)])
def test_a_rule_that_nobody_knows_is_not_claimed(most: float, known: bool, fmt: str) -> None:
    """Scale max / 128 is one that engines have; max / 120 is none, and a noise of about the right size explains nothing."""
    data = model(tiny.Shape("llama", dim=128, ffn=512))
    hidden = multiplying(eight_bits(32, most), ("ffn_out", 1))
    results = local(capture(data, IDS, fmt, multiply=hidden), data, profile(fmt))
    assert wrong(results) == [("ffn_out", 1)]
    found = next(r.rounding for r in results if r.key == ("ffn_out", 1))
    assert (found and found.slug) == ("int8/32" if known else None)


OTHERS: dict[str, tuple[Callable[..., Array], tuple[str, ...]]] = {
    # rounding to its own format changes nothing: such an engine is clean, and is left out
    "f16 inputs": (multiplying(lambda x: rounded(x, "f16"), ("ffn_out", 1), both=True), ("f32",)),
    "bf16 inputs": (multiplying(lambda x: rounded(x, "bf16"), ("ffn_out", 1), both=True), ("f32", "f16")),
    "f16 sums": (lambda s, i, a, b: half_sums(s, i, *(rounded(x, "f16") for x in (a, b))) if (s, i) == ("ffn_out", 1) else a @ b, ("f16",)),
    "f16 output": (lambda s, i, a, b: rounded(a @ b, "f16") if (s, i) == ("ffn_out", 1) else a @ b, ("f32",)),
    "bf16 output": (lambda s, i, a, b: rounded(a @ b, "bf16") if (s, i) == ("ffn_out", 1) else a @ b, ("f32", "f16")),
}


@pytest.mark.parametrize(("slug", "fmt"), [(slug, fmt) for slug, (_, formats) in OTHERS.items() for fmt in formats])
def test_other_roundings_in_one_product(slug: str, fmt: str) -> None:
    data = model(tiny.Shape("llama"))
    results = local(capture(data, IDS, fmt, multiply=OTHERS[slug][0]), data, profile(fmt))
    assert wrong(results) == [("ffn_out", 1)]
    found = next(r.rounding for r in results if r.key == ("ffn_out", 1))
    assert found is not None
    # in the range of float16 its 11 bits are those of tf32: nobody can tell
    assert found.slug == (f"{slug} or tf32 inputs" if slug == "f16 inputs" else slug)


FAULTS: dict[str, Callable[[Array], Array]] = {
    "one column": lambda y: np.concatenate([y[:, :5], y[:, 5:6] * np.float32(1.5), y[:, 6:]], axis=1),
    "one token": lambda y: np.concatenate([y[:3], y[2:3], y[4:]]),
    "a scale": lambda y: y * np.float32(1.002),
    "noise of 1 %": lambda y: y + np.float32(0.01) * np.random.default_rng(0).standard_normal(y.shape).astype(np.float32) * np.abs(y),
    "columns turned": lambda y: np.roll(y, 1, axis=1),
}


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("fault", FAULTS)
def test_no_rounding_explains_a_fault(fault: str, fmt: str) -> None:
    def plant(stage: str, layer: int | None, value: Array) -> Array:
        return FAULTS[fault](value) if (stage, layer) == ("ffn_out", 1) else value

    data = model(tiny.Shape("llama"))
    results = local(capture(data, IDS, fmt, plant), data, profile(fmt))
    assert wrong(results) == [("ffn_out", 1)]
    assert [r.rounding for r in results if r.rounding is not None] == []


# ---- a whole side that is not what it declares ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fmt", "said"), [(a, b) for a in FORMATS for b in FORMATS if a != b])
def test_a_side_that_declares_another_row(fmt: str, said: str) -> None:
    data = model(tiny.Shape("qwen2"))
    made = declared.settle("subject", "saved:it", capture(data, IDS, fmt), data, profile(said))
    assert made.profile.name == f"hf-{fmt}"
    assert wrong(made.results) == []
    assert made.instead.startswith(f"saved:it is declared as hf-{said}, but its numbers are those of hf-{fmt}, rms z ")
    led = declared.led(decided(made.results), made)
    assert (led.verdict, led.finding) == ("divergence", roundings.UNDECLARED)
    clean = declared.settle("subject", "saved:it", capture(data, IDS, fmt), data, profile(fmt))
    assert (clean.note, clean.instead) == ("", "")


def test_a_fault_in_such_a_side_is_not_swallowed() -> None:
    def plant(stage: str, layer: int | None, value: Array) -> Array:
        return value * np.float32(1.06) if (stage, layer) == ("ffn_norm", 1) else value

    data = model(tiny.Shape("qwen2"))
    made = declared.settle("subject", "saved:it", capture(data, IDS, "bf16", plant), data, profile("f32"))
    led = declared.led(decided(made.results), made)
    assert (made.profile.name, led.finding, led.first and led.first.key) == ("hf-bf16", "operation", ("ffn_norm", 1))


def test_where_nothing_fits_it_is_said() -> None:
    """Every value of every stage off by 1 % at random: no row, and no operation that would explain it."""
    generator = np.random.default_rng(1)

    def plant(stage: str, layer: int | None, value: Array) -> Array:
        return value * (1 + np.float32(0.01) * generator.standard_normal(value.shape).astype(np.float32))

    data = model(tiny.Shape("llama"))
    for auto in (False, True):
        made = declared.settle("subject", "saved:it", capture(data, IDS, "f32", plant), data, profile("f32"), auto)
        led = declared.led(decided(made.results), made)
        assert led.finding == roundings.UNDECLARED
        assert led.sentence.startswith("No declared arithmetic fits the subject (saved:it): the best is ")


def test_auto_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Recorded numbers of a bfloat16 engine that say they are float32: a divergence as declared, and clean as what they are."""
    shape = tiny.Shape("llama")
    folder = tiny.save_hf(shape, tmp_path / "model")
    captures = capture(model(shape), IDS, "bf16")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    manifest = dataclasses.replace(captures.manifest, profile=f"hf-{DTYPES['f32'].replace('float', 'f')}", model_digest=digest)
    save(Captures(dict(captures), manifest), folder / "stages")
    words = [f"saved:{folder / 'stages'}", "--against", f"witness:{folder}", "--answer", "0", "--json"]
    found = []
    for more in ([], ["--arithmetic", "auto"], ["--arithmetic", "subject=auto,reference=auto"]):
        code = bisect.main([*words, *more])
        data = json.loads(capsys.readouterr().out)
        found.append((code, data["finding"], data["subject"]["profile"]))
        assert any(note.startswith("arithmetic of the subject: hf-bf16, rms z ") for note in data["notes"])
    assert found == [(1, roundings.UNDECLARED, "hf-bf16"), (0, None, "hf-bf16"), (0, None, "hf-bf16")]
