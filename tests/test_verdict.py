"""The decision: what is called wrong, what is not, and how it is said.  Captures come from the NumPy engine of ``hf_like.py``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import jsonschema
import numpy as np
import pytest
import tiny
from hf_like import FORMATS, Plant, capture, model, profile

from aprender import arithmetic, stages
from aprender.captures import Captures
from aprender.errors import NotComparable
from aprender.judge import metrics, verdict
from aprender.judge.local import EXACT, INHERITED, NOISE, NOT_COMPARABLE, UNMEASURED, WRONG, StageResult, local
from aprender.judge.measure import IMPOSSIBLE, group_count
from aprender.judge.replay import ancestors, wiring
from aprender.judge.rule import Rule
from aprender.judge.verdict import Party
from aprender.manifest import DERIVED, LAST, Manifest, TensorNote
from aprender.stages import Key

IDS = [int(i) for i in np.random.default_rng(7).integers(0, 112, 21)]
QWEN2 = model(tiny.Shape())


def at(stage: str, layer: int | None, change: Plant) -> Plant:
    """Change one stage of one layer."""
    return lambda s, i, value: change(s, i, value) if (s, i) == (stage, layer) else value


def judge(fmt: str = "f16", plant: Plant | None = None, **more: object) -> dict[Key, StageResult]:
    found = local(capture(QWEN2, IDS, fmt, plant, **more), QWEN2, profile(fmt))  # type: ignore[arg-type]
    return {r.key: r for r in found}


def wrong(results: dict[Key, StageResult]) -> list[Key]:
    return [key for key, r in results.items() if r.state == WRONG]


# ---- gates -------------------------------------------------------------------------------------


def test_gates_grow_with_what_is_tested():
    small, large = Rule().gates(1000, 100), Rule().gates(50_000_000, 100_000)
    assert small.element < large.element
    # noise.md, section 4.3: with exact partial sums 9 is enough for 5e7 elements at 1e-6 (7.6 sigma by the exact tail, 7.9 by the bound)
    assert 8.5 < large.element < 10.0
    assert Rule(1e-3).gates(1000, 100).element < small.element


def test_group_gate_holds_its_promise():
    # 20000 groups of 50 at a false-alarm rate of 1e-2 / 4 each way: the bound must hold, and the 95 % quantile must be below it
    generator = np.random.default_rng(0)
    mean = np.square(generator.standard_normal((20000, 50))).mean(axis=1)
    gate = float(Rule(1e-2).gates(10**6, 20000).group(np.array(50), 1.0))
    assert mean.max() < gate
    assert mean.max() > gate / 2  # and it is no wall: within a factor two of what chance reaches


def test_chance_of_a_deviation():
    gates = Rule().gates(10**6, 100)
    assert gates.chance(gates.element) <= 1e-6
    assert gates.chance(1.0) == 1.0
    assert gates.chance(np.inf) == 0.0


# ---- clean -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
def test_clean_runs_of_all_lengths_are_clean(fmt: str):
    for tokens in (1, 2, 3, 7, 33):
        for seed in range(3):
            data = model(tiny.Shape("qwen3"), seed)
            ids = np.random.default_rng(seed).integers(0, 112, tokens)
            found = local(capture(data, ids, fmt), data, profile(fmt))
            assert [(r.key, r.reason) for r in found if r.state not in (EXACT, NOISE)] == []


def test_exact_is_bit_for_bit():
    results = judge("f32")
    assert results["post_attn_residual", 0].state == EXACT  # one declared rounding
    assert results["ffn_up", 0].state == NOISE  # the order of the sum is not known
    assert results["ffn_up", 0].bit_equal < 1.0


# ---- faults, each with its neighbour that is none ------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
def test_one_changed_bit_of_an_exact_stage(fmt: str):
    def bump(s: str, i: int | None, value: np.ndarray) -> np.ndarray:
        out = value.copy()
        out[3, 5] = np.nextafter(out[3, 5], np.float32(np.inf)) if fmt == "f32" else out[3, 5] * (1 + 2.0**-6)
        return out

    results = judge(fmt, at("post_attn_residual", 1, bump))
    assert wrong(results) == [("post_attn_residual", 1)]
    assert "1 of 1344 elements" in results["post_attn_residual", 1].reason  # 21 tokens x 64
    assert results["post_attn_residual", 1].confidence == 1.0


@pytest.mark.parametrize("fmt", FORMATS)
def test_scale_of_the_scores_that_no_cosine_sees(fmt: str):
    results = judge(fmt, at("attn_scores", 0, lambda s, i, value: value * np.float32(1.001)))
    assert wrong(results) == [("attn_scores", 0)]
    assert results["attn_scores", 0].confidence > 0.999


@pytest.mark.parametrize("fmt", FORMATS)
def test_one_row_of_a_weight(fmt: str):
    def row(s: str, i: int | None, value: np.ndarray) -> np.ndarray:
        out = value.copy()
        out[:, 77] *= np.float32(1.1)
        return out

    results = judge(fmt, at("ffn_gate", 1, row))
    assert wrong(results) == [("ffn_gate", 1)]
    assert results["ffn_gate", 1].group is not None
    assert (results["ffn_gate", 1].group.axis, results["ffn_gate", 1].group.index) == ("channel", 77)


def test_row_scale_of_a_norm_in_float32():
    # every element within 4 ulp: only the common factor of the row shows it (an eps of the wrong size looks like this)
    clean = judge("f32")["attn_norm", 0]
    results = judge("f32", at("attn_norm", 0, lambda s, i, value: value * np.float32(1 + 2.0**-21)))
    assert wrong(results) == [("attn_norm", 0)]
    assert "rows are scaled" in results["attn_norm", 0].reason
    assert clean.state == NOISE


def test_a_probability_for_a_forbidden_key():
    def leak(s: str, i: int | None, value: np.ndarray) -> np.ndarray:
        out = value.copy()
        out[0, 2, 3] = 1e-7
        return out

    results = judge("f32", at("attn_softmax", 1, leak))
    assert wrong(results) == [("attn_softmax", 1)]
    assert results["attn_softmax", 1].i_max == IMPOSSIBLE


def test_mask_one_key_too_wide():
    captures = capture(QWEN2, IDS, "bf16")
    q, k = (np.asarray(captures[name, 0], np.float64) for name in ("q_post_rope", "k_cache"))
    s = np.einsum("thd,jhd->htj", q.reshape(21, 4, 24), np.repeat(k.reshape(21, 2, 24), 2, axis=1)) / np.sqrt(24)
    s = np.where(np.tri(21, 21, 1, dtype=bool), s, -np.inf)
    p = np.exp(s - s.max(axis=2, keepdims=True))
    p /= p.sum(axis=2, keepdims=True)
    results = judge("bf16", at("attn_softmax", 0, lambda *_: p))
    assert wrong(results) == [("attn_softmax", 0)]


def test_nan_never_hides():
    def poison(s: str, i: int | None, value: np.ndarray) -> np.ndarray:
        out = value.copy()
        out[1, 1] = np.nan
        return out

    results = judge("f16", at("ffn_out", 0, poison))
    assert wrong(results)[0] == ("ffn_out", 0)
    assert "1 NaN" in results["ffn_out", 0].reason
    assert wrong(results) == [("ffn_out", 0)]  # what follows from a NaN input is NaN as it should be


@pytest.mark.parametrize("fmt", FORMATS)
def test_nan_of_a_forbidden_key(fmt: str):
    """One that adds 0 times it to every query is right, and one that skips it: the stage that has it is wrong, and no other.

    Where the key may be seen the mixture is NaN; one that is not, or NaN where every key is finite, is wrong.
    """

    def broken(s: str, i: int | None, value: np.ndarray) -> np.ndarray:
        if (s, i) == ("v_cache", 0):
            value = value.copy()
            value[13, 5] = np.nan
        return value

    def skipping(also: Plant) -> Plant:
        clean = capture(QWEN2, IDS, fmt)["attention", 0]

        def plant(s: str, i: int | None, value: np.ndarray) -> np.ndarray:
            if (s, i) == ("attention", 0):
                value = np.concatenate([clean[:13], value[13:]])
            return also(s, i, broken(s, i, value))

        return plant

    assert wrong(judge(fmt, broken)) == [("v_cache", 0)]
    assert wrong(judge(fmt, skipping(lambda s, i, value: value))) == [("v_cache", 0)]
    hidden = skipping(at("attention", 0, lambda s, i, value: np.nan_to_num(value)))
    assert wrong(judge(fmt, hidden)) == [("v_cache", 0), ("attention", 0)]

    def more(s: str, i: int | None, value: np.ndarray) -> np.ndarray:
        out = value.copy()
        out[2, 70] = np.nan  # of another lane: no value of it is NaN
        return out

    assert wrong(judge(fmt, skipping(at("attention", 0, more)))) == [("v_cache", 0), ("attention", 0)]


def test_overflow_of_the_declared_arithmetic_is_no_wrong_operation():
    loud = dataclasses.replace(
        QWEN2, weights={**QWEN2.weights, ("ffn_up", 1): np.asarray(QWEN2.weights["ffn_up", 1]) * np.float32(2.0**16)}
    )
    for fmt, overflows in (("f16", True), ("bf16", False)):
        results = local(capture(loud, IDS, fmt), loud, profile(fmt))
        assert [r.key for r in results if r.state == WRONG] == []
        assert any(r.overflowed for r in results) == overflows
    narrow = decided(local(capture(loud, IDS, "f16"), loud, profile("f16")))
    assert (narrow.verdict, narrow.finding) == ("divergence", "overflow")
    assert narrow.first is not None
    assert (narrow.first.stage, narrow.first.layer, narrow.first.kind) == ("ffn_up", 1, "overflow")
    # but an infinity where the arithmetic has none is wrong
    results = judge("f16", at("ffn_up", 1, lambda s, i, value: np.where(value == value.max(), np.float32(np.inf), value)))
    assert wrong(results) == [("ffn_up", 1)]


def test_weights_of_another_cast_are_found_at_every_product():
    # the fingerprint of a wrong cast: all matrix products, nothing that has no matrix
    cast = {key: np.asarray(w, np.float32) * np.float32(1 + 2.0**-9) if np.ndim(w) == 2 else w for key, w in QWEN2.weights.items()}
    other = dataclasses.replace(QWEN2, weights=cast)
    results = {r.key: r for r in local(capture(QWEN2, IDS, "f16"), other, profile("f16"))}
    ops = {stages.stage(key[0]).op for key in wrong(results)}
    assert ops == {"EMBED", "MATMUL", "BIAS"}


def test_an_undeclared_arithmetic_does_not_pass():
    results = {r.key: r for r in local(capture(QWEN2, IDS, "bf16"), QWEN2, profile("f16"))}
    assert ("attn_norm", 0) in wrong(results)


# ---- what depends on what ------------------------------------------------------------------------


def test_inherited_is_what_depends_on_it_and_nothing_else():
    results = judge("f16", at("ffn_gate", 1, lambda s, i, value: value * np.float32(1.5)))
    assert wrong(results) == [("ffn_gate", 1)]
    assert results["ffn_up", 1].state in (EXACT, NOISE)  # a sibling
    assert results["ffn_norm", 1].state in (EXACT, NOISE)
    for key in (("ffn_silu", 1), ("ffn_out", 1), ("final_norm", None), ("lm_head", None)):
        assert results[key].state == INHERITED
        assert "1.ffn_gate" in results[key].reason


def test_two_faults_are_two():
    def both(s: str, i: int | None, value: np.ndarray) -> np.ndarray:
        return value * np.float32(1.2) if (s, i) in {("attn_out", 0), ("ffn_up", 1)} else value

    assert wrong(judge("bf16", both)) == [("attn_out", 0), ("ffn_up", 1)]


def test_wiring_follows_the_wires():
    wires = wiring(frozenset({"DENSE", "QK_NORM"}), 2)
    assert [source.key for source in wires["k_post_rope", 1]] == [("k_norm", 1), ("rope_table", None)]
    assert [(source.key, source.part) for source in wires["v_cache", 1]] == [(("qkv_matmul", 1), "V")]
    assert [source.key for source in wires["post_ffn_residual", 0]] == [("post_attn_residual", 0), ("ffn_out", 0)]
    assert [source.key for source in wires["attn_norm", 0]] == [("embedding", None)]
    before = ancestors(wires)
    assert ("ffn_gate", 0) not in before["ffn_up", 0]
    assert ("ffn_gate", 0) in before["attn_norm", 1]


# ---- what was not captured -----------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_derived_stage_is_spanned(fmt: str):
    results = judge(fmt, scores=DERIVED)
    assert results["attn_scores", 0].state == UNMEASURED
    assert "recomputed" in results["attn_scores", 0].reason
    assert results["attn_softmax", 0].spans == (("attn_scores", 0),)
    assert wrong(results) == []
    # a scale that goes in at the scores is found at the softmax, and the two stages share the confidence
    bad = judge(fmt, at("attn_scores", 0, lambda s, i, value: value * np.float32(1.06)), scores=DERIVED)
    assert wrong(bad) == [("attn_softmax", 0)]
    assert bad["attn_softmax", 0].confidence == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("fmt", FORMATS)
def test_missing_stages_are_spanned(fmt: str):
    """Norm to down projection with nothing captured in between, as in noise.md section 2.4."""
    drop = ("ffn_gate", "ffn_up", "ffn_silu", "ffn_swigl")
    clean = judge(fmt, drop=drop)
    assert clean["ffn_gate", 0].reason == "the side did not show it"
    assert {key[0] for key in clean["ffn_out", 0].spans} == set(drop)
    assert wrong(clean) == []
    bad = judge(fmt, at("ffn_silu", 1, lambda s, i, value: value * np.float32(1.05)), drop=drop)
    assert wrong(bad) == [("ffn_out", 1)]


def test_too_long_a_region_is_not_judged():
    kept = ("embedding", "rope_table", "lm_head")
    drop = [row.name for row in stages.STAGES if row.name not in kept]
    results = judge("f16", drop=drop)
    assert results["lm_head", None].state == UNMEASURED
    assert "captured near enough" in results["lm_head", None].reason


def test_without_weights_the_rest_is_judged():
    results = {r.key: r for r in local(capture(QWEN2, IDS, "f16"), None, profile("f16"))}
    unmeasured = {key[0] for key, r in results.items() if not r.measured}
    assert unmeasured == {"embedding", "attn_norm", "qkv_matmul", "qkv_bias", "attn_out", "ffn_norm", "ffn_gate", "ffn_up", "ffn_out"} | {
        "final_norm", "lm_head",
    }  # fmt: skip
    assert "weights" in results["ffn_up", 0].reason
    assert wrong(results) == []
    with pytest.raises(NotComparable, match="no hyper-parameters"):
        local(Captures({}, Manifest(side="x", tokens=(1,))), None, profile("f16"))


def test_last_token_only():
    whole = capture(QWEN2, IDS, "f16")
    values = {key: whole[key] for key in whole}
    values["lm_head", None] = values["lm_head", None][-1:]
    notes = dict(whole.manifest.tensors)
    notes["lm_head", None] = TensorNote.of(values["lm_head", None], dtype="float16")
    for factor, state in ((1.0, NOISE), (1.01, WRONG)):
        made = dict(values)
        made["lm_head", None] = (made["lm_head", None] * np.float32(factor)).astype(np.float16).astype(np.float32)
        kept = {**notes, ("lm_head", None): dataclasses.replace(notes["lm_head", None], positions=LAST)}
        results = local(Captures(made, dataclasses.replace(whole.manifest, tensors=kept)), QWEN2, profile("f16"))
        assert results[-1].n == 112
        assert results[-1].state in ({NOISE, EXACT} if state == NOISE else {WRONG})


def test_a_wrong_shape_is_not_comparable():
    whole = capture(QWEN2, IDS, "f16")
    values = {key: whole[key] for key in whole} | {("ffn_up", 0): whole["ffn_up", 0][:, :-1]}
    notes = {key: note for key, note in whole.manifest.tensors.items() if key != ("ffn_up", 0)}
    results = {r.key: r for r in local(Captures(values, dataclasses.replace(whole.manifest, tensors=notes)), QWEN2, profile("f16"))}
    assert results["ffn_up", 0].state == NOT_COMPARABLE
    assert "[21, 159]" in results["ffn_up", 0].reason
    assert results["ffn_swigl", 0].state == NOT_COMPARABLE  # its input is not what it says
    assert results["ffn_gate", 0].measured


def test_cache_of_a_later_chunk():
    """The cache holds older tokens: only the rows of this run are judged, and scores reach back."""
    whole = capture(QWEN2, IDS, "f32")
    fresh, first = len(IDS) - 8, 8

    def cut(key: Key) -> np.ndarray:
        axes = stages.stage(key[0]).shape
        return whole[key] if "T" not in axes else np.take(whole[key], range(first, first + fresh), axis=axes.index("T"))

    values = {key: cut(key) for key in whole}
    notes = {key: TensorNote.of(values[key], origin=whole.manifest.tensors[key].origin) for key in values}
    later = Captures(
        values, dataclasses.replace(whole.manifest, tokens=tuple(IDS[first:]), positions=tuple(range(first, 21)), tensors=notes)
    )
    results = {r.key: r for r in local(later, QWEN2, profile("f32"))}
    assert wrong(results) == []
    assert results["k_cache", 0].n == fresh * 48
    assert results["attn_softmax", 0].n == 4 * fresh * 21
    shifted = dataclasses.replace(later.manifest, positions=tuple(range(first + 1, 22)))
    assert wrong({r.key: r for r in local(Captures(values, shifted), QWEN2, profile("f32"))})[0] == ("rope_table", None)


# ---- free comparison -----------------------------------------------------------------------------


def test_distance_by_hand():
    d = metrics.distance([3.0, 4.0], [3.0, 0.0])
    assert (d.n, d.norm_ratio, d.rel_l2) == (2, pytest.approx(5 / 3), pytest.approx(4 / 3))
    assert d.cos_distance == pytest.approx(1 - 0.6)
    assert metrics.distance([2.0, 4.0], [1.0, 2.0]).cos_distance == pytest.approx(0.0, abs=1e-30)  # a scale is invisible to it


def test_distance_keeps_its_digits():
    a = np.ones(1000)
    b = a.copy()
    b[0] += 1e-9  # 1 - cos is 5e-22: far below what 1 minus a cosine can hold
    assert metrics.distance(b, a).cos_distance == pytest.approx(0.5e-18 * (1 / 1000) * (1 - 1 / 1000), rel=1e-6)


def test_distance_without_a_figure():
    assert metrics.distance([1.0, np.nan], [1.0, 2.0]) == metrics.Distance(2, None, None, None, (1, 0))
    assert metrics.distance([0.0], [0.0]) == metrics.Distance(1, None, 0.0, None)
    assert metrics.distance([1.0], [0.0]).rel_l2 is None
    assert metrics.distance([], []).n == 0


def test_compare_is_in_execution_order_over_what_both_have():
    a, b = capture(QWEN2, IDS, "f16"), capture(QWEN2, IDS, "f32", drop=("ffn_silu",))
    free = metrics.compare(a, b)
    assert list(free) == [key for key in stages.keys(QWEN2.flags, 2) if key[0] != "ffn_silu"]
    # float16 against float32 at the logits after two layers: 2e-4 to 2e-3
    assert 1e-5 < (free["lm_head", None].rel_l2 or 0) < 1e-2


# ---- the verdict ---------------------------------------------------------------------------------

FAULT = {
    "type": "object",
    "required": ["side", "layer", "stage", "kind", "confidence"],
    "additionalProperties": False,
    "properties": {
        "side": {"enum": ["subject", "reference"]},
        "layer": {"type": ["integer", "null"]},
        "stage": {"type": "string"},
        "kind": {"type": "string"},
        "confidence": {"type": "number", "minimum": 0, "maximum": 1},
    },
}
FIGURE = {"type": ["number", "null"]}
PARTY = {
    "type": "object",
    "required": ["spelling", "profile", "backend", "digest"],
    "properties": {name: {"type": ["string", "null"]} for name in ("spelling", "profile", "backend", "digest")},
}
FIGURES = ("cos_distance", "rel_l2", "norm_ratio", "quantization", "i_max", "z_rms", "z_max", "loss")
STATES = [EXACT, NOISE, WRONG, INHERITED, UNMEASURED, NOT_COMPARABLE]
SCHEMA = {
    "type": "object",
    "required": ["schema", "verdict", "finding", "first", "wrong", "compared", "unmeasured", "probes", "tokens", "subject", "reference",
                 "stages"],
    "properties": {
        "schema": {"const": "aprender.bisect/1"},
        "verdict": {"enum": ["agree", "divergence", "not_comparable"]},
        "finding": {"enum": [None, "operation", "overflow"]},
        "first": {"anyOf": [{"type": "null"}, FAULT]},
        "wrong": {"type": "array", "items": FAULT},
        "compared": {"type": "integer"},
        "unmeasured": {"type": "array", "items": {"type": "object", "required": ["layer", "stage", "reason"]}},
        "tokens": {"type": "array", "items": {"type": "integer"}},
        "subject": PARTY,
        "reference": PARTY,
        "stages": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["layer", "stage", "n", *FIGURES, "closure", "state"],
                "additionalProperties": False,
                "properties": {
                    "layer": {"type": ["integer", "null"]},
                    "stage": {"type": "string"},
                    "n": {"type": "integer"},
                    "closure": {"const": {"subject": None, "reference": None}},  # judge.closure puts its figures there, later
                    "state": {"enum": STATES},
                    **dict.fromkeys(FIGURES, FIGURE),
                },
            },
        },
    },
}  # fmt: skip


def decided(
    own: Sequence[StageResult], other: Sequence[StageResult] = (), free: dict[Key, metrics.Distance] | None = None
) -> verdict.Verdict:
    return verdict.decide(
        Party("a.gguf", "exact", "cpu", "00", own), Party("hf:b", "hf-f16", "cpu", None, other), free or {}, IDS, probes=("prefill",)
    )


def two_sides(left: Plant | None = None, right: Plant | None = None) -> verdict.Verdict:
    a, b = capture(QWEN2, IDS, "f16", left), capture(QWEN2, IDS, "f32", right)
    results = [local(captures, QWEN2, profile(fmt)) for captures, fmt in ((a, "f16"), (b, "f32"))]
    return decided(*results, metrics.compare(a, b))


def test_agreement():
    made = two_sides()
    data = json.loads(json.dumps(made.to_json(), allow_nan=False))
    jsonschema.validate(data, SCHEMA)
    assert (made.verdict, made.finding, made.first, made.wrong) == ("agree", None, None, ())
    assert made.sentence.startswith("Agree")
    assert data["compared"] == len(data["stages"]) == len(stages.keys(QWEN2.flags, 2))
    assert {entry["stage"] for entry in data["unmeasured"]} == {"qkv_matmul"}


def test_divergence_of_the_subject():
    made = two_sides(left=at("attn_out", 1, lambda s, i, value: value[:, ::-1]))
    data = json.loads(json.dumps(made.to_json(), allow_nan=False))
    jsonschema.validate(data, SCHEMA)
    assert (made.verdict, made.finding) == ("divergence", "operation")
    assert (data["first"]["side"], data["first"]["layer"], data["first"]["stage"], data["first"]["kind"]) == (
        "subject",
        1,
        "attn_out",
        "unknown",
    )
    assert data["first"]["confidence"] > 0.999
    assert made.sentence.startswith("attn_out of layer 1 of the subject (a.gguf) is the first wrong operation")
    states = {(row["stage"], row["layer"]): row["state"] for row in data["stages"]}
    assert states["attn_out", 1] == "wrong"
    assert states["lm_head", None] == "inherited"


def test_the_reference_can_be_the_wrong_one():
    made = two_sides(right=at("ffn_silu", 0, lambda s, i, value: value * np.float32(1.02)))
    assert [(fault.side, fault.stage) for fault in made.wrong] == [("reference", "ffn_silu")]
    assert "of the reference (hf:b)" in made.sentence
    row = next(row for row in made.rows if (row.stage, row.layer) == ("ffn_silu", 0))
    assert row.state == WRONG
    assert next(row for row in made.rows if row.stage == "lm_head").state == INHERITED


def test_first_is_the_earlier_of_both():
    made = two_sides(
        left=at("ffn_up", 1, lambda s, i, value: value * np.float32(1.1)),
        right=at("ffn_up", 0, lambda s, i, value: value * np.float32(1.1)),
    )
    assert [(fault.side, fault.layer) for fault in made.wrong] == [("reference", 0), ("subject", 1)]


def test_nothing_judged_is_no_agreement():
    made = decided([StageResult("lm_head", None, UNMEASURED, "no reason")])
    assert made.verdict == "not_comparable"
    assert "Nothing was judged" in made.sentence


def test_a_result_says_what_it_could_see():
    result = judge("f16")["ffn_up", 0]
    assert result.power is not None
    assert result.sees(result.power * 2)
    assert not result.sees(result.power / 2)
    assert not StageResult("lm_head", None, UNMEASURED).sees(1.0)


# ---- false alarms --------------------------------------------------------------------------------


def test_false_alarms_of_many_models():
    """No alarm in 36 clean runs, 1488 stages, 2.0 million elements; a rate of 1e-6 per run is the model's statement, this bounds it."""
    elements = count = 0
    for fmt in FORMATS:
        for seed in range(4):
            for arch in tiny.ARCHS:
                data = model(tiny.Shape(arch, tied=bool(seed % 2)), 100 + seed)
                ids = np.random.default_rng(seed).integers(0, 112, 5 + 11 * seed)
                found = local(capture(data, ids, fmt), data, profile(fmt))
                assert [(arch, seed, r.key, r.reason) for r in found if r.state == WRONG] == []
                elements += sum(r.n for r in found)
                count += sum(r.measured for r in found)
    assert count == 1488
    assert elements > 1_500_000


def test_groups_are_counted_as_they_are_tested():
    # [T, D]: the whole, 21 rows, 64 columns, and the factors of 21 rows; a gate for fewer would be too low
    assert group_count((21, 64)) == 1 + 21 + 64 + 21


@pytest.mark.parametrize("fmt", FORMATS)
def test_our_own_profile_demands_bits_of_declared_sums(fmt: str):
    """A capture of another arithmetic is not what ``exact`` declares: its sums are off by a rounding, and it says so."""
    results = {r.key: r for r in local(capture(QWEN2, IDS, fmt), QWEN2, arithmetic.profile("exact"))}
    assert results["ffn_up", 0].state == WRONG
