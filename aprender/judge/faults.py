"""The catalogue of faults: real bugs of real engines, each as data that plants it and as data that predicts what it leaves.

Owns the rows: a name for the command line, the stages where the bug can sit, the edits of plan data, weights or values that put it there,
and the change of the witness's arguments that gives the same wrong stage.  Refuses code that runs: an edit and a change are mappings.
``sides/edits.py`` carries edits out without knowing what they mean, and no kernel has a fault in it; ``judge/diagnose.py`` reads changes
only.  So what plants a fault shares nothing with what finds or names it but the row.  Called by ``bisection`` (``--plant``,
``--list-faults``) and by the fault matrix.

A site is always the stage where the fault first shows; a fault that touches two stages of a layer has two sites, or names the others in
``also``.  On a side that does not show the stage, :func:`first_visible` is where it must show.

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

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from aprender import _core, stages
from aprender.errors import ArgumentError, UnknownName
from aprender.judge.witness import HParams
from aprender.stages import Key

Edit = Mapping[str, Any]
Change = Mapping[str, Any]
Flags = frozenset[str]
Sites = Mapping[str, tuple[Edit, ...]]
Possible = Callable[[Flags, HParams], bool]
Variant = tuple[str, tuple[Change, ...]]
"""The same kind of fault otherwise, for a diagnosis: what is other in words, and its changes."""

AGREE, REFUSED, HEALS = "agree", "refused", "heals"


def _always(flags: Flags, hparams: HParams) -> bool:
    return True


def _grouped(flags: Flags, hparams: HParams) -> bool:
    """Several query heads to a key head, and several key heads: else tiling and repeating are one map."""
    return 1 < int(hparams["kv_heads"]) < int(hparams["heads"])


def _untied(flags: Flags, hparams: HParams) -> bool:
    return "UNTIED" in flags


@dataclass(frozen=True)
class FaultRow:
    """One bug of the catalogue, or one control: a difference that is no bug.

    Attributes
    ----------
    name : str
        On the command line: ``--plant NAME[@SELECTOR]``.
    text : str
        What is done wrong, and where it was seen.
    at : mapping
        Stage where it first shows to the edits that plant it there.
    changes : mapping
        The same stages to the changes of the witness's arguments that predict the wrong stage from its captured inputs.
    variants : mapping
        Stage to the same fault otherwise (in one part of a group, with another number): recognized by this name, never planted.
    possible : callable
        Flags and hyper-parameters to whether the model can have it at all.
    also : tuple of str
        Stages of the same layer that are wrong too.
    shape : str
        What the residual looks like (``SCALE BIAS POS0 NORM= PERM HEADBLK TAIL LAST= DECODE BLOCK NAN CHAOS``).
    first_layer : int
        First layer that can have it.
    expect : str
        Empty for a fault; of a control, what must come out: ``agree``, ``refused`` or ``heals``.
    """

    name: str
    text: str
    at: Sites
    changes: Mapping[str, tuple[Change, ...]] = field(default_factory=dict)
    possible: Possible = _always
    also: tuple[str, ...] = ()
    shape: str = ""
    first_layer: int = 0
    expect: str = ""
    variants: Mapping[str, tuple[Variant, ...]] = field(default_factory=dict)

    def edits(self, stage: str, layer: int | None, flags: Flags) -> tuple[Edit, ...]:
        """What plants it at a stage; empty if it cannot sit there, or needs a weight that the model does not have."""
        if layer is not None and layer < self.first_layer:
            return ()
        made = [_sited(edit, stage, layer) for edit in self.at.get(stage, ())]
        return tuple(made) if all(edit["target"] != "weight" or _has(str(edit["weight"]), flags) for edit in made) else ()

    def prediction(self, stage: str) -> tuple[Change, ...]:
        """The changes that make the witness leave the same wrong stage; empty if it cannot sit there."""
        return self.changes.get(stage, ())

    def suspected(self, stage: str, layer: int | None, flags: Flags, hparams: HParams) -> Iterator[Variant]:
        """All changes by which a wrong stage can be recognized as this fault, that which is planted first."""
        if not self.possible(flags, hparams) or (layer is not None and layer < self.first_layer):
            return
        if stage in self.changes:
            yield self.text, self.changes[stage]
        for text, changes in self.variants.get(stage, ()):
            yield f"{self.text}: {text}", changes

    def sites(self, flags: Flags, hparams: HParams) -> list[Key]:
        """Where it can be planted in a model, in execution order."""
        if not self.possible(flags, hparams):
            return []
        return [key for key in stages.keys(flags, int(hparams["layers"])) if self.edits(*key, flags)]


def _sited(edit: Edit, stage: str, layer: int | None) -> Edit:
    """An edit with the layer of its site, and the stage where it says none; a weight belongs to no stage."""
    return {"layer": layer, **edit} if edit["target"] == "weight" else {"stage": stage, "layer": layer, **edit}


def _has(weight: str, flags: Flags) -> bool:
    """Whether a model with these flags has a weight, or another in its place."""
    (row,) = (row for row in _core.WEIGHTS if row[0] == weight)
    *_, otherwise, flag = row
    return flag == "ALWAYS" or flag in flags or bool(otherwise)


# ---- the words of the rows -----------------------------------------------------------------------------------------------------------

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


def _step(name: str, **how: Any) -> Edit:
    return {"target": "step", "field": name, **how}


def _matrices(transform: str, only: Iterable[str] | None = None, **how: Any) -> Sites:
    """An edit of every matrix of each product (of the ``only`` weights)."""
    return {
        stage: tuple({"target": "weight", "weight": name, "transform": transform, **how} for name in names if only is None or name in only)
        for stage, names in LINEAR.items()
        if only is None or set(names) & set(only)
    }


def _vectors(rows: Mapping[str, str | tuple[str, ...]], transform: str, **how: Any) -> Sites:
    """An edit of every norm weight or bias."""
    named = {stage: (names,) if isinstance(names, str) else names for stage, names in rows.items()}
    return {
        stage: tuple({"target": "weight", "weight": name, "transform": transform, **how} for name in names)
        for stage, names in named.items()
    }


def _each(names: Iterable[str], *edits: Any) -> Mapping[str, tuple[Any, ...]]:
    """The same edits, or changes, at each of some stages."""
    return dict.fromkeys(names, edits)


def _weights(how: str, part: int | None = None, **more: Any) -> Change:
    return {"of": "weights", "part": part, "as": how, **more}


def _weight_rows(**how: Any) -> Change:
    return {"of": "weights", **how}


def _value(transform: str, **more: Any) -> Edit:
    return {"target": "value", "transform": transform, **more}


def _output(how: str, **more: Any) -> Change:
    return {"of": "output", "as": how, **more}


def _biases(part: int | None = None, **how: Any) -> Change:
    return {"of": "biases", "part": part, **how}


STORED = "in the bytes of the file"
"""Of what is done to the codes of a quantized weight, not to its values."""


def _by_part(stage: str, *changes: Change, text: str = "") -> Mapping[str, tuple[Variant, ...]]:
    """The changes in one part only of a group of q, k and v."""
    more = f", {text}" if text else ""
    return {stage: tuple((f"{name} only{more}", tuple({**c, "part": i} for c in changes)) for i, name in enumerate("qkv"))}


def _paired(*kinds: Callable[..., Change]) -> tuple[Variant, ...]:
    """Rows of q and k in the other order, either way round, in both or in one: of their weights, their biases or both."""
    out = []
    for how, text in (("pairs", "interleaved"), ("halves", "taken apart")):
        for parts, names in (((0, 1), "q and k"), ((0,), "q"), ((1,), "k")):
            changes = tuple(kind(**{"part": i, "as": how, "size": "head"}) for kind in kinds for i in parts)
            more = " with their biases" if len(kinds) > 1 else ""
            out.append((f"rows of {names}{more} {text}", changes))
    return tuple(out)


def _exchanged(weights: bool, biases: bool) -> tuple[Change, ...]:
    """The keys' in place of the values', and the other way round."""
    rows = ((1, "attn_v"), (2, "attn_k"))
    of = [_weights("origin", i, origin=name) for i, name in rows] if weights else []
    return (*of, *(_biases(i, **{"as": "origin", "origin": f"{name}_bias"}) for i, name in rows if biases))


ROTATED, GROUPED = ("q_post_rope", "k_post_rope"), ("attn_scores", "attention")
TABLE, SOFTMAX = ("rope_table",), ("attn_softmax",)
MASKED = ("attn_scores", "attn_softmax", "attention")
PRODUCTS = ("qkv_matmul", "attn_out", "ffn_gate", "ffn_up", "ffn_out", "lm_head")
EVERYWHERE = 1 << 24
"""A mask offset beyond every position."""


def _masked(readers: Iterable[str], **how: Any) -> Sites:
    """The mask of several steps of a layer; it first shows in the probabilities."""
    return {"attn_softmax": tuple(_step(name, stage=stage, value=value) for stage in readers for name, value in how.items())}


ROWS: tuple[FaultRow, ...] = (
    # -- weights
    FaultRow(
        "transposed",
        "a weight [out, in] read as if stored [in, out] (paiml/aprender#1651: lm_head)",
        _matrices("transposed"),
        _each(LINEAR, _weights("transposed")),
        shape="CHAOS",
        variants=_by_part("qkv_matmul", _weights("transposed")),
    ),
    FaultRow(
        "qk-permuted",
        "a converter interleaves the rows of q and k of a model that rotates halves (huggingface/nanotron#241)",
        _matrices("pairs", ("attn_q", "attn_k"), size="head"),
        _each(("qkv_matmul",), _weights("pairs", 0, size="head"), _weights("pairs", 1, size="head")),
        shape="PERM HEADBLK",
        variants={
            "qkv_matmul": (*_paired(_weight_rows)[1:], *_paired(_weight_rows, _biases)),
            "qkv_bias": _paired(_biases),
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
        _each(("qkv_matmul",), _weights("origin", 1, origin="attn_v"), _weights("origin", 2, origin="attn_k")),
        shape="NORM=",
        variants={
            "qkv_matmul": (("their biases too", _exchanged(True, True)),),
            "qkv_bias": (("their biases, not their weights", _exchanged(False, True)),),
        },
    ),
    FaultRow(
        "embed-head",
        "the token table used as the head of a model that has one of its own (pegainfer-project/pegainfer#544)",
        {"lm_head": ({"target": "weight", "weight": "output", "transform": "same", "origin": "token_embd"},)},
        _each(("lm_head",), _weights("origin", 0, origin="token_embd")),
        _untied,
        shape="CHAOS",
    ),
    FaultRow(
        "zero-lm-head",
        "tying ignored, the head left at zero (GradientHQ/parallax#444)",
        {"lm_head": ({"target": "weight", "weight": "output", "transform": "zero"},)},
        _each(("lm_head",), _weights("scaled", factor=0.0)),
        shape="SCALE",
    ),
    FaultRow(
        "first-layer",
        "every layer reads the matrix of the first",
        {k: tuple({**e, "origin": e["weight"], "origin_layer": 0} for e in v) for k, v in _matrices("same").items() if k != "lm_head"},
        {
            stage: tuple(_weights("origin", i, origin=name, origin_layer=0) for i, name in enumerate(names))
            for stage, names in LINEAR.items()
            if stage != "lm_head"
        },
        shape="CHAOS",
        first_layer=1,
        variants={
            "qkv_matmul": tuple(
                (f"{name} only", (_weights("origin", i, origin=name, origin_layer=0),)) for i, name in enumerate(LINEAR["qkv_matmul"])
            )
        },
    ),
    FaultRow(
        "block",
        "the scale of one block of 32 weights decoded twice too large",
        _matrices("block", factor=2.0),
        _each(LINEAR, _weights("block", factor=2.0)),
        shape="BLOCK",
        variants=_by_part("qkv_matmul", _weights("block", factor=2.0)),
    ),
    FaultRow(
        "sub-scales",
        "of each super-block of 256, every sub-block takes the scale of the first (paiml/aprender#2141)",
        _matrices("first-scale"),
        _each(LINEAR, _weights("first-scale", rounded=True)),
        shape="BLOCK",
        variants={
            **{stage: ((STORED, (_weights("first-scale", stored=True),)),) for stage in LINEAR},
            "qkv_matmul": (
                (STORED, (_weights("first-scale", stored=True),)),
                *_by_part("qkv_matmul", _weights("first-scale", rounded=True))["qkv_matmul"],
                *_by_part("qkv_matmul", _weights("first-scale", stored=True), text=STORED)["qkv_matmul"],
            ),
        },
    ),
    FaultRow(
        "cut-columns",
        "a return in the loop over blocks: only the first half of each row is decoded, the rest is zero (1bit-MONSTER/1bit-MONSTER#488)",
        _matrices("cut-columns", share=0.5),
        _each(LINEAR, _weights("cut-columns", share=0.5)),
        shape="BLOCK",
        variants=_by_part("qkv_matmul", _weights("cut-columns", share=0.5)),
    ),
    FaultRow(
        "cut-rows",
        "the last quarter of the rows is never written",
        _matrices("cut-rows", share=0.75),
        _each(LINEAR, _weights("cut-rows", share=0.75)),
        shape="TAIL",
        variants=_by_part("qkv_matmul", _weights("cut-rows", share=0.75)),
    ),
    FaultRow(
        "embedding-scale",
        "the embedding multiplied by 16, the root of the width, as another family does",
        {"embedding": ({"target": "weight", "weight": "token_embd", "transform": "scaled", "factor": 16.0},)},
        _each(("embedding",), _weights("scaled", factor=16.0)),
        shape="SCALE",
        variants={
            "embedding": (
                ("by the root of this model's width", (_output("root-scaled", root="dim"),)),
                ("by the root of this model's width, rounded first", (_output("root-scaled", root="dim", rounded=True),)),
            )
        },
    ),
    # -- norms and biases
    FaultRow(
        "eps",
        "a norm's epsilon ten times too large, 1e-5 for 1e-6 (ggml-org/llama.cpp#2373)",
        _each(NORMS, _step("eps", factor=10.0)),
        _each(NORMS, {"of": "hparams", "name": "eps", "factor": 10.0}),
        shape="SCALE",
    ),
    FaultRow(
        "norm-plus-one",
        "a norm's weight taken as 1 + w (Lightning-AI/litgpt#1031)",
        _vectors(NORMS, "plus", value=1.0),
        _each(NORMS, _weights("plus", value=1.0)),
        shape="SCALE",
        variants=_each(NORMS, ("rounded to the format of the activations", (_weights("plus", value=1.0, rounded=True),))),
    ),
    FaultRow(
        "norm-swap",
        "a norm with the weight of the other norm of its layer",
        {
            stage: ({"target": "weight", "weight": NORMS[stage], "transform": "same", "origin": other},)
            for stage, other in ANOTHER_NORM.items()
        },
        {stage: (_weights("origin", 0, origin=other),) for stage, other in ANOTHER_NORM.items()},
        shape="NORM=",
    ),
    FaultRow(
        "no-bias",
        "the bias of a projection is dropped (EricLBuehler/candle-vllm#167)",
        _vectors(BIASES, "zero"),
        _each(BIASES, {"of": "biases", "factor": 0.0}),
        shape="BIAS",
        variants=_by_part("qkv_bias", _biases(factor=0.0)),
    ),
    FaultRow(
        "bias-twice",
        "the bias of a projection is added twice",
        _vectors(BIASES, "scaled", factor=2.0),
        _each(BIASES, {"of": "biases", "factor": 2.0}),
        shape="BIAS",
        variants=_by_part("qkv_bias", _biases(factor=2.0)),
    ),
    # -- positions
    FaultRow(
        "rope-pairs",
        "rotates neighbours (2i, 2i+1), not halves (i, i + h/2) (ggml-org/llama.cpp#13260)",
        _each(ROTATED, _step("pairing", value=1)),
        _each(ROTATED, {"of": "rotation", "pairing": 1}),
        shape="POS0 NORM=",
    ),
    FaultRow(
        "theta",
        "the RoPE base left at another model's: a hundredth, 1e4 for 1e6 (vllm-project/vllm#9503)",
        _each(TABLE, _step("theta", factor=0.01)),
        _each(TABLE, {"of": "hparams", "name": "theta", "factor": 0.01}),
        lambda flags, hparams: float(hparams["theta"]) >= 100,
        shape="POS0",
    ),
    FaultRow(
        "no-rope",
        "every token at position 0: nothing is rotated",
        _each(TABLE, _step("pos_step", value=0), _step("pos_scale", value=0)),
        _each(TABLE, {"of": "positions", "scale": 0, "step": 0}),
        shape="POS0",
        variants=_each(ROTATED, ("here only, not in the table", ({"of": "positions", "scale": 0, "step": 0},))),
    ),
    FaultRow(
        "pos-from-one",
        "positions count from 1 in the queries only (flashinfer-ai/flashinfer#847)",
        {"q_post_rope": (_step("pos_shift", value=1),)},
        {"q_post_rope": ({"of": "table", "shift": 1},)},
        shape="NORM=",
    ),
    FaultRow(
        "keys-behind",
        "keys are rotated to the position before theirs",
        {"k_post_rope": (_step("pos_shift", value=-1),)},
        {"k_post_rope": ({"of": "table", "shift": -1},)},
        shape="NORM=",
    ),
    FaultRow(
        "decode-pos-0",
        "decoding gives every token position 0 (Blaizzy/mlx-vlm#1983); shows token by token only",
        _each(TABLE, _step("pos_scale", value=0), {"target": "pieces", "value": 1}),
        _each(TABLE, {"of": "positions", "scale": 0, "pieces": 1}),
        shape="DECODE",
    ),
    FaultRow(
        "chunk-twice",
        "a later chunk counts its offset twice (mlx-node/mlx-node#33); shows in chunks only",
        _each(TABLE, _step("pos_scale", value=2), {"target": "pieces", "value": 2}),
        _each(TABLE, {"of": "positions", "scale": 2, "pieces": 2}),
        shape="DECODE TAIL",
    ),
    FaultRow(
        "window-one-pos",
        "all tokens of a decoding window get the position of its first (jundot/omlx#2363); shows in chunks only",
        _each(TABLE, _value("first-row", when="decode"), {"target": "pieces", "value": 3}),
        _each(TABLE, {"of": "positions", "step": 0, "pieces": 3, "when": "decode"}),
        shape="DECODE",
    ),
    # -- attention
    FaultRow(
        "gqa-tile",
        "query head n reads key head n mod KV, not n / (H/KV) (ekzhang/jax-js#180)",
        _each(GROUPED, _step("kv_div", value=1)),
        _each(GROUPED, {"of": "heads", "div": 1}),
        _grouped,
        shape="HEADBLK NORM=",
    ),
    FaultRow(
        "gqa-first",
        "every query head reads the first key head (quantumaikr/quant.cpp#61)",
        _each(GROUPED, _step("kv_mod", value=1)),
        _each(GROUPED, {"of": "heads", "mod": 1}),
        lambda flags, hparams: int(hparams["kv_heads"]) > 1,
        shape="HEADBLK",
    ),
    FaultRow(
        "no-scale",
        "scores not divided by the root of the head size (mlc-ai/mlc-llm#3426)",
        _each(("attn_scores",), _step("scale", value=1.0)),
        _each(("attn_scores",), {"of": "scores", "value": 1.0}),
        shape="SCALE",
    ),
    FaultRow(
        "scale-base",
        "the scale from another head size: 1.061 times too large (ggml-org/llama.cpp#8197)",
        _each(("attn_scores",), _step("scale", factor=1.061)),
        _each(("attn_scores",), {"of": "scores", "factor": 1.061}),
        shape="SCALE",
    ),
    FaultRow(
        "f16-scores",
        "scores kept in float16 by an engine that declares float32 (huggingface/transformers#33317)",
        _each(("attn_scores",), _value("float16")),
        _each(("attn_scores",), _output("float16")),
    ),
    FaultRow(
        "bf16-softmax",
        "softmax in bfloat16 by an engine that declares float32 (AI-Hypercomputer/maxtext#1225)",
        _each(SOFTMAX, _value("bfloat16")),
        _each(SOFTMAX, _output("bfloat16")),
    ),
    FaultRow(
        "mask-next",
        "a query sees the key after its own, j <= i + 1",
        _masked(MASKED, mask_offset=1),
        _each(SOFTMAX, {"of": "mask", "shift": 1}),
        shape="LAST=",
    ),
    FaultRow(
        "mask-self",
        "a query does not see its own key, j < i",
        _masked(MASKED[1:], mask_offset=-1),
        _each(SOFTMAX, {"of": "mask", "shift": -1}),
        shape="TAIL",
    ),
    FaultRow(
        "no-mask",
        "every query sees every key",
        _masked(MASKED, mask_offset=EVERYWHERE),
        _each(SOFTMAX, {"of": "mask", "shift": EVERYWHERE}),
        shape="LAST=",
    ),
    FaultRow(
        "window",
        "a sliding window, of 4 keys, where the model has none (huggingface/transformers#39408 is one key off)",
        _masked(MASKED[1:], window=4),
        _each(SOFTMAX, {"of": "mask", "window": 4}),
        shape="TAIL",
    ),
    FaultRow(
        "rope-on-v",
        "a fused operation rotates the values too (tenstorrent/tt-mlir#8958)",
        _each(("v_cache",), _value("rotated", by="rope_table")),
        _each(("v_cache",), _output("rotated", by="rope_table")),
        shape="POS0 NORM=",
    ),
    FaultRow(
        "keys-as-values",
        "attention mixes the keys instead of the values",
        _each(("attention",), {"target": "input", "field": "b", "origin": ("attn_scores", "b")}),
        _each(("attention",), {"of": "inputs", "index": 1, "origin": ("attn_scores", "b")}),
        shape="NORM=",
    ),
    FaultRow(
        "lost-head",
        "the second head is never written",
        _each(("attention",), _value("lost-head", head=1)),
        _each(("attention",), _output("lost-head", head=1)),
        lambda flags, hparams: int(hparams["heads"]) > 1,
        shape="HEADBLK",
    ),
    # -- feed-forward
    FaultRow(
        "gelu",
        "GELU for SiLU (huggingface/transformers#29402 is its two forms)",
        _each(("ffn_silu",), _step("act", value=1)),
        _each(("ffn_silu",), {"of": "act", "name": "gelu"}),
        variants=_each(("ffn_silu",), ("by erf, not tanh", ({"of": "act", "name": "gelu-erf"},))),
    ),
    FaultRow(
        "quick-gelu",
        "x sigmoid(1.702 x) for SiLU",
        _each(("ffn_silu",), _step("act", value=2)),
        _each(("ffn_silu",), {"of": "act", "name": "quick-gelu"}),
        variants=_each(("ffn_silu",), ("each step rounded", ({"of": "act", "name": "quick-gelu", "steps": True},))),
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
        _each(("ffn_silu",), {"of": "inputs", "index": 0, "origin": ("ffn_up", "out")}),
        also=("ffn_swigl",),
        shape="CHAOS",
    ),
    # -- the residual stream and buffers
    FaultRow(
        "no-residual",
        "the residual is not added: the branch replaces the stream",
        _each(("post_attn_residual", "post_ffn_residual"), _step("a", value=-1)),
        _each(("post_attn_residual", "post_ffn_residual"), {"of": "inputs", "index": 0, "origin": ("zero", "")}),
    ),
    FaultRow(
        "stale-residual",
        "the second residual taken from before attention: what attention added is lost",
        _each(("post_ffn_residual",), {"target": "input", "field": "a", "origin": ("post_attn_residual", "a")}),
        _each(("post_ffn_residual",), {"of": "inputs", "index": 0, "origin": ("post_attn_residual", "a")}),
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
        _each(PRODUCTS, _value("stale-row")),
        _each(PRODUCTS, _output("stale-row")),
        shape="BATCH TAIL",
    ),
    FaultRow(
        "nan",
        "one element is not a number",
        _each(("ffn_out", "lm_head"), _value("nan")),
        _each(("ffn_out", "lm_head"), _output("nan")),
        shape="NAN",
    ),
)

ANOTHER_PRODUCT: Mapping[str, str] = {"ffn_gate": "ffn_up", "ffn_up": "ffn_gate"}

SUSPECT_ROWS: tuple[FaultRow, ...] = (
    FaultRow(
        "swapped-weights",
        "it has the weight of the other projection that reads the same input",
        {},
        {stage: (_weights("origin", 0, origin=other),) for stage, other in ANOTHER_PRODUCT.items()},
    ),
    FaultRow(
        "no-norm-weight",
        "a norm without its weight",
        {},
        _each(NORMS, _weights("ones")),
    ),
    FaultRow(
        "scale",
        "another scale of the scores",
        {},
        variants=_each(
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
        _each(("post_attn_residual", "post_ffn_residual"), {"of": "inputs", "index": 1, "origin": ("zero", "")}),
    ),
    FaultRow(
        "no-activation",
        "the activation is missing",
        {},
        _each(("ffn_silu",), {"of": "act", "name": "identity"}),
    ),
    FaultRow(
        "no-gate",
        "the gate is missing",
        {},
        _each(("ffn_swigl",), {"of": "inputs", "index": 0, "origin": ("one", "")}),
    ),
)
"""Faults that a diagnosis recognizes, and that nobody needs to plant: their neighbours of the catalogue are planted."""

CONTROL_ROWS: tuple[FaultRow, ...] = (
    FaultRow(
        "shift",
        "control: queries and keys rotated seven positions further, unsaid: attention is the same",
        {"q_post_rope": (_step("pos_shift", value=7), _step("pos_shift", stage="k_post_rope", value=7))},
        {"q_post_rope": ({"of": "table", "shift": 7},), "k_post_rope": ({"of": "table", "shift": 7},)},
        also=("k_post_rope",),
        expect=HEALS,
    ),
    FaultRow(
        "shift-said",
        "control: positions counted from 7, and said: not comparable with a side that counts from 0",
        _each(TABLE, _step("pos_shift", value=7), {"target": "positions", "value": 7}),
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
        _each(("ffn_swigl", "lm_head"), {"target": "capture", "transform": "last"}),
        expect=REFUSED,
    ),
    FaultRow(
        "last-token-said",
        "control: one row, the last token's, and the manifest says so",
        _each(("ffn_swigl", "lm_head"), {"target": "capture", "transform": "last", "said": True}),
        expect=AGREE,
    ),
    FaultRow(
        "pieces",
        "control: the prompt in pieces of three tokens",
        _each(("embedding",), {"target": "pieces", "value": 3}),
        expect=AGREE,
    ),
)

FAULTS: Mapping[str, FaultRow] = {row.name: row for row in ROWS}
"""Every fault, by name."""

CONTROLS: Mapping[str, FaultRow] = {row.name: row for row in CONTROL_ROWS}
"""Every difference that is no bug, by name; what it must come to is its ``expect``."""


def first_visible(key: Key, visible: Iterable[Key], flags: Flags, layers: int) -> Key | None:
    """Where a fault of a stage must show on a side that shows only some stages: there, else at the first visible stage after it."""
    every, shown = stages.keys(flags, layers), frozenset(visible)
    return next((later for later in every[every.index(key) :] if later in shown), None)


@dataclass(frozen=True)
class Plant:
    """A fault at chosen sites of a model.

    Attributes
    ----------
    fault : FaultRow
    sites : tuple of Key
        In execution order; the first is what a bisection must name.
    edits : tuple of mapping
        What ``sides/own.py`` applies.
    """

    fault: FaultRow
    sites: tuple[Key, ...]
    edits: tuple[Edit, ...]


def plant(text: str, flags: Flags, hparams: HParams) -> Plant:
    """What ``--plant NAME[@SELECTOR]`` means for a model.

    Parameters
    ----------
    text : str
        Name of a fault or a control; after ``@`` a selection of stages as everywhere (``transposed@lm_head``, ``eps@0.attn_norm``).
        Without one, every site of the model.
    flags, hparams : frozenset, mapping
        The model.

    Raises
    ------
    UnknownName
        No such fault, or no such stage; the message suggests the nearest.
    ArgumentError
        The model has no such site; the message says which it has.
    """
    name, at, selector = text.partition("@")
    known = {**FAULTS, **CONTROLS}
    if name not in known:
        near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
        hint = f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(known)}"
        raise UnknownName(f"there is no fault '{name}'{hint}", code="LOOKUP", field="plant")
    row = known[name]
    everywhere = row.sites(flags, hparams)
    chosen = stages.parse_selection(selector) if at else lambda key: True
    sites = tuple(key for key in everywhere if chosen(key))
    if not sites:
        where = f"it can sit at {_several(everywhere)}" if everywhere else "this model has no place for it"
        raise ArgumentError(f"the fault '{text}' has no site in this model: {where}", code="ARGUMENT", field="plant")
    return Plant(row, sites, tuple(edit for key in sites for edit in row.edits(*key, flags)))


def _several(keys: Iterable[Key]) -> str:
    """Stages of some keys, each once."""
    return ", ".join(dict.fromkeys(key[0] for key in keys))


def listing(flags: Flags | None = None, hparams: HParams | None = None) -> str:
    """The catalogue for people: a line per fault, and below it the stages where this model (any, if none is given) can have it."""
    every = frozenset(name for name, _ in _core.FLAGS) if flags is None else flags
    shape: HParams = {"layers": 2, "heads": 4, "kv_heads": 2, "theta": 1e6} if hparams is None else hparams
    known = {**FAULTS, **CONTROLS}
    width = max(map(len, known)) + 2
    lines = []
    for row in known.values():
        where = _several(row.sites(every, shape)) or "no place in this model"
        lines += [f"{row.name:{width}}{row.text}", f"{'':{width}}at {where}"]
    return "\n".join(lines)
