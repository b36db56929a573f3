"""The catalogue of faults: real bugs of real engines, each as data that plants it and as data that predicts what it leaves.

Owns the rows: a name for the command line, the stages where the bug can sit, the edits of plan data, weights or values that put it there,
and the change of the witness's arguments that gives the same wrong stage.  Refuses code that runs: an edit and a change are mappings.
``sides/edits.py`` carries edits out without knowing what they mean, and no kernel has a fault in it; ``judge/diagnose.py`` reads changes
only.  So what plants a fault shares nothing with what finds or names it but the row (what a row is, says ``judge.faultrow``).  Called by
``judge.planting`` (``--plant``, ``--list-faults``), by ``judge.diagnose`` and by the fault matrix.

A site is always the stage where the fault first shows; a fault that touches two stages of a layer has two sites, or names the others in
``also``.  On a side that does not show the stage, :func:`aprender.judge.planting.first_visible` is where it must show.

An edit, ``target`` first (``stage`` and ``layer`` are those of the site unless it says others)::

    step    field, and value or factor      a field of the plan's step (params.def)
    input   field, origin (stage, which)    the step reads as field what the stage of the same layer leaves ("out") or reads ("a", "b")
    weight  weight, transform, ...          a weight, or what "origin" (weight) and "origin_layer" name, through a transform
    value   transform, when ...             the stage's value, before anything reads it; when "decode": not in a run from position 0
    pieces  value                           the prompt is run so many tokens at a time
    capture transform, ...                  what is handed out, not what is computed
    positions value                         where the side says that its tokens stand

A change, ``of`` first::

    hparams   name, and value or factor     positions  scale, step, shift, pieces   table   shift: turned by so many positions
    weights   part, as, stored, ...         biases     factor                       inputs  index, origin (as above; "zero": nothing)
    scores    factor of the scale, or value of it                                   mask    shift, window: what a query sees
    rotation  pairing                       heads      div, mod                     act     name
    output    as, when ...                  the right value, changed

``judge/changes.py`` carries them out.  A change of weights or biases is of one ``part`` of its group or of all (None).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from aprender.judge.faultrow import (
    AGREE,
    EVERYWHERE,
    HEALS,
    REFUSED,
    STORED,
    FaultRow,
    Sites,
    biases,
    by_part,
    each,
    exchanged,
    grouped,
    output,
    paired,
    step,
    untied,
    value,
    vectors,
    weight_rows,
    weights,
)

# ---- the stages of the rows ----------------------------------------------------------------------------------------------------------

LINEAR: Mapping[str, tuple[str, ...]] = {
    "qkv_matmul": ("attn_q", "attn_k", "attn_v"),
    "attn_out": ("attn_output",),
    "ffn_gate": ("ffn_gate",),
    "ffn_up": ("ffn_up",),
    "ffn_out": ("ffn_down",),
    "lm_head": ("output",),
}
BIASES: Mapping[str, tuple[str, ...]] = {
    "qkv_bias": ("attn_q_bias", "attn_k_bias", "attn_v_bias"),
    "attn_out": ("attn_output_bias",),
}
NORMS: Mapping[str, str] = {
    "attn_norm": "attn_norm",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "ffn_norm": "ffn_norm",
    "final_norm": "output_norm",
}
ANOTHER_NORM: Mapping[str, str] = {"attn_norm": "ffn_norm", "ffn_norm": "attn_norm", "q_norm": "attn_k_norm", "k_norm": "attn_q_norm"}
ROTATED, GROUPED = ("q_post_rope", "k_post_rope"), ("attn_scores", "attention")
TABLE, SOFTMAX = ("rope_table",), ("attn_softmax",)
MASKED = ("attn_scores", "attn_softmax", "attention")
PRODUCTS = ("qkv_matmul", "attn_out", "ffn_gate", "ffn_up", "ffn_out", "lm_head")


def _matrices(transform: str, only: Iterable[str] | None = None, **how: Any) -> Sites:
    """An edit of every matrix of each product (of the ``only`` weights)."""
    return {
        stage: tuple({"target": "weight", "weight": name, "transform": transform, **how} for name in names if only is None or name in only)
        for stage, names in LINEAR.items()
        if only is None or set(names) & set(only)
    }


def _masked(readers: Iterable[str], **how: Any) -> Sites:
    """The mask of several steps of a layer; it first shows in the probabilities."""
    return {"attn_softmax": tuple(step(name, stage=stage, value=value) for stage in readers for name, value in how.items())}


# ---- the rows ------------------------------------------------------------------------------------------------------------------------

ROWS: tuple[FaultRow, ...] = (
    # -- weights
    FaultRow(
        "transposed",
        "a weight [out, in] read as if stored [in, out] (paiml/aprender#1651: lm_head)",
        _matrices("transposed"),
        each(LINEAR, weights("transposed")),
        shape="CHAOS",
        variants=by_part("qkv_matmul", weights("transposed")),
    ),
    FaultRow(
        "qk-permuted",
        "a converter interleaves the rows of q and k of a model that rotates halves (huggingface/nanotron#241)",
        _matrices("pairs", ("attn_q", "attn_k"), size="head"),
        each(("qkv_matmul",), weights("pairs", 0, size="head"), weights("pairs", 1, size="head")),
        shape="PERM HEADBLK",
        variants={
            "qkv_matmul": (*paired(weight_rows)[1:], *paired(weight_rows, biases)),
            "qkv_bias": paired(biases),
        },
    ),
    FaultRow(
        "kv-swap",
        "the weights of keys and values change places (tenstorrent/tt-mlir#8958)",
        {
            "qkv_matmul": (
                {"target": "weight", "weight": "attn_k", "transform": "same", "origin": "attn_v"},
                {"target": "weight", "weight": "attn_v", "transform": "same", "origin": "attn_k"},
            )
        },
        each(("qkv_matmul",), weights("origin", 1, origin="attn_v"), weights("origin", 2, origin="attn_k")),
        shape="NORM=",
        variants={
            "qkv_matmul": (("their biases too", exchanged(True, True)),),
            "qkv_bias": (("their biases, not their weights", exchanged(False, True)),),
        },
    ),
    FaultRow(
        "embed-head",
        "the token table used as the head of a model that has one of its own (pegainfer-project/pegainfer#544)",
        {"lm_head": ({"target": "weight", "weight": "output", "transform": "same", "origin": "token_embd"},)},
        each(("lm_head",), weights("origin", 0, origin="token_embd")),
        untied,
        shape="CHAOS",
    ),
    FaultRow(
        "zero-lm-head",
        "tying ignored, the head left at zero (GradientHQ/parallax#444)",
        {"lm_head": ({"target": "weight", "weight": "output", "transform": "zero"},)},
        each(("lm_head",), weights("scaled", factor=0.0)),
        shape="SCALE",
    ),
    FaultRow(
        "first-layer",
        "every layer reads the matrix of the first",
        {k: tuple({**e, "origin": e["weight"], "origin_layer": 0} for e in v) for k, v in _matrices("same").items() if k != "lm_head"},
        {
            stage: tuple(weights("origin", i, origin=name, origin_layer=0) for i, name in enumerate(names))
            for stage, names in LINEAR.items()
            if stage != "lm_head"
        },
        shape="CHAOS",
        first_layer=1,
        variants={
            "qkv_matmul": tuple(
                (f"{name} only", (weights("origin", i, origin=name, origin_layer=0),)) for i, name in enumerate(LINEAR["qkv_matmul"])
            )
        },
    ),
    FaultRow(
        "block",
        "the scale of one block of 32 weights decoded twice too large",
        _matrices("block", factor=2.0),
        each(LINEAR, weights("block", factor=2.0)),
        shape="BLOCK",
        variants=by_part("qkv_matmul", weights("block", factor=2.0)),
    ),
    FaultRow(
        "sub-scales",
        "of each super-block of 256, every sub-block takes the scale of the first (paiml/aprender#2141)",
        _matrices("first-scale"),
        each(LINEAR, weights("first-scale", rounded=True)),
        shape="BLOCK",
        variants={
            **{stage: ((STORED, (weights("first-scale", stored=True),)),) for stage in LINEAR},
            "qkv_matmul": (
                (STORED, (weights("first-scale", stored=True),)),
                *by_part("qkv_matmul", weights("first-scale", rounded=True))["qkv_matmul"],
                *by_part("qkv_matmul", weights("first-scale", stored=True), text=STORED)["qkv_matmul"],
            ),
        },
    ),
    FaultRow(
        "cut-columns",
        "a return in the loop over blocks: only the first half of each row is decoded, the rest is zero (1bit-MONSTER/1bit-MONSTER#488)",
        _matrices("cut-columns", share=0.5),
        each(LINEAR, weights("cut-columns", share=0.5)),
        shape="BLOCK",
        variants=by_part("qkv_matmul", weights("cut-columns", share=0.5)),
    ),
    FaultRow(
        "cut-rows",
        "the last quarter of the rows is never written",
        _matrices("cut-rows", share=0.75),
        each(LINEAR, weights("cut-rows", share=0.75)),
        shape="TAIL",
        variants=by_part("qkv_matmul", weights("cut-rows", share=0.75)),
    ),
    FaultRow(
        "embedding-scale",
        "the embedding multiplied by 16, the root of the width, as another family does",
        {"embedding": ({"target": "weight", "weight": "token_embd", "transform": "scaled", "factor": 16.0},)},
        each(("embedding",), weights("scaled", factor=16.0)),
        shape="SCALE",
        variants={
            "embedding": (
                ("by the root of this model's width", (output("root-scaled", root="dim"),)),
                ("by the root of this model's width, rounded first", (output("root-scaled", root="dim", rounded=True),)),
            )
        },
    ),
    # -- norms and biases
    FaultRow(
        "eps",
        "a norm's epsilon ten times too large, 1e-5 for 1e-6 (ggml-org/llama.cpp#2373)",
        each(NORMS, step("eps", factor=10.0)),
        each(NORMS, {"of": "hparams", "name": "eps", "factor": 10.0}),
        shape="SCALE",
    ),
    FaultRow(
        "norm-plus-one",
        "a norm's weight taken as 1 + w (Lightning-AI/litgpt#1031)",
        vectors(NORMS, "plus", value=1.0),
        each(NORMS, weights("plus", value=1.0)),
        shape="SCALE",
        variants=each(NORMS, ("rounded to the format of the activations", (weights("plus", value=1.0, rounded=True),))),
    ),
    FaultRow(
        "norm-swap",
        "a norm with the weight of the other norm of its layer",
        {
            stage: ({"target": "weight", "weight": NORMS[stage], "transform": "same", "origin": other},)
            for stage, other in ANOTHER_NORM.items()
        },
        {stage: (weights("origin", 0, origin=other),) for stage, other in ANOTHER_NORM.items()},
        shape="NORM=",
    ),
    FaultRow(
        "no-bias",
        "the bias of a projection is dropped (EricLBuehler/candle-vllm#167)",
        vectors(BIASES, "zero"),
        each(BIASES, {"of": "biases", "factor": 0.0}),
        shape="BIAS",
        variants=by_part("qkv_bias", biases(factor=0.0)),
    ),
    FaultRow(
        "bias-twice",
        "the bias of a projection is added twice",
        vectors(BIASES, "scaled", factor=2.0),
        each(BIASES, {"of": "biases", "factor": 2.0}),
        shape="BIAS",
        variants=by_part("qkv_bias", biases(factor=2.0)),
    ),
    # -- positions
    FaultRow(
        "rope-pairs",
        "rotates neighbours (2i, 2i+1), not halves (i, i + h/2) (ggml-org/llama.cpp#13260)",
        each(ROTATED, step("pairing", value=1)),
        each(ROTATED, {"of": "rotation", "pairing": 1}),
        shape="POS0 NORM=",
    ),
    FaultRow(
        "theta",
        "the RoPE base left at another model's: a hundredth, 1e4 for 1e6 (vllm-project/vllm#9503)",
        each(TABLE, step("theta", factor=0.01)),
        each(TABLE, {"of": "hparams", "name": "theta", "factor": 0.01}),
        lambda flags, hparams: float(hparams["theta"]) >= 100,
        shape="POS0",
    ),
    FaultRow(
        "no-rope",
        "every token at position 0: nothing is rotated",
        each(TABLE, step("pos_step", value=0), step("pos_scale", value=0)),
        each(TABLE, {"of": "positions", "scale": 0, "step": 0}),
        shape="POS0",
        variants=each(ROTATED, ("here only, not in the table", ({"of": "positions", "scale": 0, "step": 0},))),
    ),
    FaultRow(
        "pos-from-one",
        "positions count from 1 in the queries only (flashinfer-ai/flashinfer#847)",
        {"q_post_rope": (step("pos_shift", value=1),)},
        {"q_post_rope": ({"of": "table", "shift": 1},)},
        shape="NORM=",
    ),
    FaultRow(
        "keys-behind",
        "keys are rotated to the position before theirs",
        {"k_post_rope": (step("pos_shift", value=-1),)},
        {"k_post_rope": ({"of": "table", "shift": -1},)},
        shape="NORM=",
    ),
    FaultRow(
        "decode-pos-0",
        "decoding gives every token position 0 (Blaizzy/mlx-vlm#1983); shows token by token only",
        each(TABLE, step("pos_scale", value=0), {"target": "pieces", "value": 1}),
        each(TABLE, {"of": "positions", "scale": 0, "pieces": 1}),
        shape="DECODE",
    ),
    FaultRow(
        "chunk-twice",
        "a later chunk counts its offset twice (mlx-node/mlx-node#33); shows in chunks only",
        each(TABLE, step("pos_scale", value=2), {"target": "pieces", "value": 2}),
        each(TABLE, {"of": "positions", "scale": 2, "pieces": 2}),
        shape="DECODE TAIL",
    ),
    FaultRow(
        "window-one-pos",
        "all tokens of a decoding window get the position of its first (jundot/omlx#2363); shows in chunks only",
        each(TABLE, value("first-row", when="decode"), {"target": "pieces", "value": 3}),
        each(TABLE, {"of": "positions", "step": 0, "pieces": 3, "when": "decode"}),
        shape="DECODE",
    ),
    # -- attention
    FaultRow(
        "gqa-tile",
        "query head n reads key head n mod KV, not n / (H/KV) (ekzhang/jax-js#180)",
        each(GROUPED, step("kv_div", value=1)),
        each(GROUPED, {"of": "heads", "div": 1}),
        grouped,
        shape="HEADBLK NORM=",
    ),
    FaultRow(
        "gqa-first",
        "every query head reads the first key head (quantumaikr/quant.cpp#61)",
        each(GROUPED, step("kv_mod", value=1)),
        each(GROUPED, {"of": "heads", "mod": 1}),
        lambda flags, hparams: int(hparams["kv_heads"]) > 1,
        shape="HEADBLK",
    ),
    FaultRow(
        "no-scale",
        "scores not divided by the root of the head size (mlc-ai/mlc-llm#3426)",
        each(("attn_scores",), step("scale", value=1.0)),
        each(("attn_scores",), {"of": "scores", "value": 1.0}),
        shape="SCALE",
    ),
    FaultRow(
        "scale-base",
        "the scale from another head size: 1.061 times too large (ggml-org/llama.cpp#8197)",
        each(("attn_scores",), step("scale", factor=1.061)),
        each(("attn_scores",), {"of": "scores", "factor": 1.061}),
        shape="SCALE",
    ),
    FaultRow(
        "f16-scores",
        "scores kept in float16 by an engine that declares float32 (huggingface/transformers#33317)",
        each(("attn_scores",), value("float16")),
        each(("attn_scores",), output("float16")),
    ),
    FaultRow(
        "bf16-softmax",
        "softmax in bfloat16 by an engine that declares float32 (AI-Hypercomputer/maxtext#1225)",
        each(SOFTMAX, value("bfloat16")),
        each(SOFTMAX, output("bfloat16")),
    ),
    FaultRow(
        "mask-next",
        "a query sees the key after its own, j <= i + 1",
        _masked(MASKED, mask_offset=1),
        each(SOFTMAX, {"of": "mask", "shift": 1}),
        shape="LAST=",
    ),
    FaultRow(
        "mask-self",
        "a query does not see its own key, j < i",
        _masked(MASKED[1:], mask_offset=-1),
        each(SOFTMAX, {"of": "mask", "shift": -1}),
        shape="TAIL",
    ),
    FaultRow(
        "no-mask",
        "every query sees every key",
        _masked(MASKED, mask_offset=EVERYWHERE),
        each(SOFTMAX, {"of": "mask", "shift": EVERYWHERE}),
        shape="LAST=",
    ),
    FaultRow(
        "window",
        "a sliding window, of 4 keys, where the model has none (huggingface/transformers#39408 is one key off)",
        _masked(MASKED[1:], window=4),
        each(SOFTMAX, {"of": "mask", "window": 4}),
        shape="TAIL",
    ),
    FaultRow(
        "rope-on-v",
        "a fused operation rotates the values too (tenstorrent/tt-mlir#8958)",
        each(("v_cache",), value("rotated", by="rope_table")),
        each(("v_cache",), output("rotated", by="rope_table")),
        shape="POS0 NORM=",
    ),
    FaultRow(
        "keys-as-values",
        "attention mixes the keys instead of the values",
        each(("attention",), {"target": "input", "field": "b", "origin": ("attn_scores", "b")}),
        each(("attention",), {"of": "inputs", "index": 1, "origin": ("attn_scores", "b")}),
        shape="NORM=",
    ),
    FaultRow(
        "lost-head",
        "the second head is never written",
        each(("attention",), value("lost-head", head=1)),
        each(("attention",), output("lost-head", head=1)),
        lambda flags, hparams: int(hparams["heads"]) > 1,
        shape="HEADBLK",
    ),
    # -- feed-forward
    FaultRow(
        "gelu",
        "GELU for SiLU (huggingface/transformers#29402 is its two forms)",
        each(("ffn_silu",), step("act", value=1)),
        each(("ffn_silu",), {"of": "act", "name": "gelu"}),
        variants=each(("ffn_silu",), ("by erf, not tanh", ({"of": "act", "name": "gelu-erf"},))),
    ),
    FaultRow(
        "quick-gelu",
        "x sigmoid(1.702 x) for SiLU",
        each(("ffn_silu",), step("act", value=2)),
        each(("ffn_silu",), {"of": "act", "name": "quick-gelu"}),
        variants=each(("ffn_silu",), ("each step rounded", ({"of": "act", "name": "quick-gelu", "steps": True},))),
    ),
    FaultRow(
        "gate-up",
        "gate and up change places: the activation is of the wrong half",
        {
            "ffn_silu": (
                {"target": "input", "field": "a", "origin": ("ffn_up", "out")},
                {"target": "input", "stage": "ffn_swigl", "field": "b", "origin": ("ffn_gate", "out")},
            )
        },
        each(("ffn_silu",), {"of": "inputs", "index": 0, "origin": ("ffn_up", "out")}),
        also=("ffn_swigl",),
        shape="CHAOS",
    ),
    # -- the residual stream and buffers
    FaultRow(
        "no-residual",
        "the residual is not added: the branch replaces the stream",
        each(("post_attn_residual", "post_ffn_residual"), step("a", value=-1)),
        each(("post_attn_residual", "post_ffn_residual"), {"of": "inputs", "index": 0, "origin": ("zero", "")}),
    ),
    FaultRow(
        "stale-residual",
        "the second residual taken from before attention: what attention added is lost",
        each(("post_ffn_residual",), {"target": "input", "field": "a", "origin": ("post_attn_residual", "a")}),
        each(("post_ffn_residual",), {"of": "inputs", "index": 0, "origin": ("post_attn_residual", "a")}),
    ),
    FaultRow(
        "normed-residual",
        "the residual taken after the norm, not before it",
        {
            "post_attn_residual": ({"target": "input", "field": "a", "origin": ("attn_norm", "out")},),
            "post_ffn_residual": ({"target": "input", "field": "a", "origin": ("ffn_norm", "out")},),
        },
        {
            "post_attn_residual": ({"of": "inputs", "index": 0, "origin": ("attn_norm", "out")},),
            "post_ffn_residual": ({"of": "inputs", "index": 0, "origin": ("ffn_norm", "out")},),
        },
    ),
    FaultRow(
        "stale-row",
        "the last token's row is not written: it holds that of the token before (paiml/aprender#2753)",
        each(PRODUCTS, value("stale-row")),
        each(PRODUCTS, output("stale-row")),
        shape="BATCH TAIL",
    ),
    FaultRow(
        "nan",
        "one element is not a number",
        each(("ffn_out", "lm_head"), value("nan")),
        each(("ffn_out", "lm_head"), output("nan")),
        shape="NAN",
    ),
)

ANOTHER_PRODUCT: Mapping[str, str] = {"ffn_gate": "ffn_up", "ffn_up": "ffn_gate"}

SUSPECT_ROWS: tuple[FaultRow, ...] = (
    FaultRow(
        "swapped-weights",
        "it has the weight of the other projection that reads the same input",
        {},
        {stage: (weights("origin", 0, origin=other),) for stage, other in ANOTHER_PRODUCT.items()},
    ),
    FaultRow(
        "no-norm-weight",
        "a norm without its weight",
        {},
        each(NORMS, weights("ones")),
    ),
    FaultRow(
        "scale",
        "another scale of the scores",
        {},
        variants=each(
            ("attn_scores",),
            ("one over the root of the model's width", ({"of": "scores", "name": "dim", "power": -0.5},)),
            ("applied twice", ({"of": "scores", "name": "head", "power": -1.0},)),
            ("the root of the head size, not one over it", ({"of": "scores", "name": "head", "power": 0.5},)),
        ),
    ),
    FaultRow(
        "no-branch",
        "the branch is not added: the stream goes on as it was",
        {},
        each(("post_attn_residual", "post_ffn_residual"), {"of": "inputs", "index": 1, "origin": ("zero", "")}),
    ),
    FaultRow(
        "no-activation",
        "the activation is missing",
        {},
        each(("ffn_silu",), {"of": "act", "name": "identity"}),
    ),
    FaultRow(
        "no-gate",
        "the gate is missing",
        {},
        each(("ffn_swigl",), {"of": "inputs", "index": 0, "origin": ("one", "")}),
    ),
)
"""Faults that a diagnosis recognizes, and that nobody needs to plant: their neighbours of the catalogue are planted."""

CONTROL_ROWS: tuple[FaultRow, ...] = (
    FaultRow(
        "shift",
        "control: queries and keys rotated seven positions further, unsaid: attention is the same",
        {"q_post_rope": (step("pos_shift", value=7), step("pos_shift", stage="k_post_rope", value=7))},
        {"q_post_rope": ({"of": "table", "shift": 7},), "k_post_rope": ({"of": "table", "shift": 7},)},
        also=("k_post_rope",),
        expect=HEALS,
    ),
    FaultRow(
        "shift-said",
        "control: positions counted from 7, and said: not comparable with a side that counts from 0",
        each(TABLE, step("pos_shift", value=7), {"target": "positions", "value": 7}),
        expect=REFUSED,
    ),
    FaultRow(
        "after-bias",
        "control: what is called the product before the bias is taken after it, and said",
        {"qkv_matmul": ({"target": "capture", "transform": "instead", "origin": "qkv_bias", "point": "after the bias"},)},
        possible=lambda flags, hparams: "QKV_BIAS" in flags,
        expect=REFUSED,
    ),
    FaultRow(
        "last-token",
        "control: one row, the last token's, where all tokens are promised",
        each(("ffn_swigl", "lm_head"), {"target": "capture", "transform": "last"}),
        expect=REFUSED,
    ),
    FaultRow(
        "last-token-said",
        "control: one row, the last token's, and the manifest says so",
        each(("ffn_swigl", "lm_head"), {"target": "capture", "transform": "last", "said": True}),
        expect=AGREE,
    ),
    FaultRow(
        "pieces",
        "control: the prompt in pieces of three tokens",
        each(("embedding",), {"target": "pieces", "value": 3}),
        expect=AGREE,
    ),
)

FAULTS: Mapping[str, FaultRow] = {row.name: row for row in ROWS}
"""Every fault, by name."""

CONTROLS: Mapping[str, FaultRow] = {row.name: row for row in CONTROL_ROWS}
"""Every difference that is no bug, by name; what it must come to is its ``expect``."""
