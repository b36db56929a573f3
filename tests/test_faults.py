"""The catalogue of faults as data: names, sites, edits, and what ``--plant`` makes of a text.  The hunt itself is in ``test_bisect.py``."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import tiny

from aprender import _core, stages
from aprender.errors import ArgumentError, UnknownName
from aprender.judge import changes, faults, planting
from aprender.judge.faultrow import AGREE, HEALS, REFUSED, Change, Edit, FaultRow
from aprender.judge.faults import CONTROLS, FAULTS
from aprender.judge.planting import plant
from aprender.sides.edits import TRANSFORMS, VALUES

QWEN2, LLAMA, QWEN3 = (tiny.Shape(arch) for arch in tiny.ARCHS)
BIASED = tiny.Shape("llama", attention_bias=True)

# Rows of params.def with edit YES, and what a change can be of.
EDITABLE = {
    "eps",
    "scale",
    "theta",
    "pairing",
    "kv_div",
    "kv_mod",
    "mask_offset",
    "window",
    "act",
    "pos_scale",
    "pos_step",
    "pos_shift",
    "a",
    "b",
}
CHANGED = {"hparams", "positions", "table", "weights", "biases", "inputs", "scores", "mask", "rotation", "heads", "act", "output"}

# One row of each fault: the stages where the bug catalogue (bugs.md: B30, B13, B01, B16, B19, B45) says that it first shows.
SHOWS = {
    "transposed": {"qkv_matmul", "attn_out", "ffn_gate", "ffn_up", "ffn_out", "lm_head"},
    "eps": {"attn_norm", "q_norm", "k_norm", "ffn_norm", "final_norm"},
    "rope-pairs": {"q_post_rope", "k_post_rope"},
    "no-bias": {"qkv_bias", "attn_out"},
    "gqa-tile": {"attn_scores", "attention"},
    "no-residual": {"post_attn_residual", "post_ffn_residual"},
}


ALL = {**FAULTS, **CONTROLS}


def test_names():
    assert set(SHOWS) <= set(FAULTS)
    assert not set(FAULTS) & set(CONTROLS)
    assert len(FAULTS) == len(faults.ROWS)
    assert all(row.name == name and row.text and re.fullmatch("[a-z0-9-]+", name) for name, row in ALL.items())
    assert all(bool(row.expect) == (name in CONTROLS) for name, row in ALL.items())
    assert all(row.expect in {AGREE, REFUSED, HEALS} for row in CONTROLS.values())


@pytest.mark.parametrize("shape", tiny.SHAPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_every_site_is_a_stage_and_every_edit_is_plain_data(name: str, shape: tiny.Shape):
    row = ALL[name]
    every = stages.keys(shape.flags, shape.layers)
    sites = row.sites(shape.flags, shape.hparams)
    assert sites == [key for key in every if key in sites]
    for key in sites:
        for edit in row.edits(*key, shape.flags):
            check_edit(edit, key)


def check_edit(edit: Edit, key: stages.Key):
    json.dumps(edit)
    assert edit["layer"] == key[1]
    kind = edit["target"]
    if kind == "step":
        assert edit["field"] in EDITABLE
        assert ("value" in edit) != ("factor" in edit)
    elif kind == "input":
        assert edit["field"] in ("a", "b")
        assert stages.stage(edit["origin"][0])
    elif kind == "weight":
        assert {edit["weight"], edit.get("origin", edit["weight"])} <= {row[0] for row in _core.WEIGHTS}
        assert edit["transform"] in TRANSFORMS
    elif kind == "value":
        assert edit["transform"] in VALUES
    else:
        assert kind in {"pieces", "capture", "positions"}


@pytest.mark.parametrize("name", FAULTS)
def test_every_site_of_a_fault_has_its_prediction(name: str):
    row = FAULTS[name]
    assert set(row.at) == set(row.changes)
    for found in row.changes.values():
        assert found
        assert all(change["of"] in CHANGED for change in found)
        json.dumps(found)


@pytest.mark.parametrize("row", [*faults.ROWS, *faults.SUSPECT_ROWS], ids=lambda row: row.name)
def test_every_change_is_plain_data_that_is_carried_out(row: FaultRow):
    """Of stages that exist, with an interpreter of every part; and no way of recognizing a fault is listed twice."""
    assert set(row.changes) | set(row.variants)
    for stage in {*row.changes, *row.variants}:
        assert stages.stage(stage)
        every = [row.changes[stage]] if stage in row.changes else []
        every += [found for _, found in row.variants.get(stage, ())]
        texts = [text for text, _ in row.variants.get(stage, ())]
        assert len(set(texts)) == len(texts)
        spelled = [json.dumps(found) for found in every]
        assert len(set(spelled)) == len(spelled)
        for change in (change for found in every for change in found):
            assert change["of"] in CHANGED
            check_change(change)


def check_change(change: Change):
    how = change.get("as")
    if change["of"] == "weights":
        assert how in {*changes.TRANSFORMS, "origin", "pairs", "halves"}
    if change["of"] == "output":
        assert how in changes.OUTPUTS
    if change["of"] == "act":
        assert change["name"] in changes.FUNCTIONS
    if how == "origin":
        assert change["origin"] in {row[0] for row in _core.WEIGHTS}


def test_what_is_only_suspected_cannot_be_planted():
    assert set(changes.APPLY) == CHANGED
    assert not {row.name for row in faults.SUSPECT_ROWS} & set(ALL)
    assert not any(row.at for row in faults.SUSPECT_ROWS)
    with pytest.raises(UnknownName, match="no fault 'no-branch'"):
        plant("no-branch", QWEN2.flags, QWEN2.hparams)


def test_where_it_must_show_on_a_side_that_hides_the_stage():
    keys = stages.keys(QWEN2.flags, QWEN2.layers)
    hidden = [key for key in keys if key[0] not in ("rope_table", "attn_scores", "attn_softmax")]
    where = lambda key: planting.first_visible(key, hidden, QWEN2.flags, QWEN2.layers)  # noqa: E731
    assert where(("rope_table", None)) == ("attn_norm", 0)
    assert where(("attn_scores", 1)) == ("attention", 1)
    assert where(("ffn_up", 0)) == ("ffn_up", 0)
    assert planting.first_visible(("lm_head", None), keys[:-1], QWEN2.flags, QWEN2.layers) is None


@pytest.mark.parametrize(
    ("name", "shape", "possible"),
    [
        ("embed-head", tiny.Shape(), True),
        ("embed-head", tiny.Shape(tied=True), False),  # it is the head
        ("bias-twice", LLAMA, False),
        ("first-layer", tiny.Shape(layers=1), False),
        ("gqa-first", tiny.Shape(kv_heads=1), False),
        ("theta", tiny.Shape(theta=50.0), False),  # a hundredth would be less than 1
        ("after-bias", LLAMA, False),
    ],
)
def test_what_a_model_cannot_have(name: str, shape: tiny.Shape, possible: bool):
    assert bool(ALL[name].sites(shape.flags, shape.hparams)) == possible


@pytest.mark.parametrize("shape", [QWEN2, LLAMA, QWEN3, BIASED], ids=str)
@pytest.mark.parametrize("name", SHOWS)
def test_sites_are_stages_of_the_model(name: str, shape: tiny.Shape):
    sites = FAULTS[name].sites(shape.flags, shape.hparams)
    every = stages.keys(shape.flags, shape.layers)
    assert set(sites) <= set(every)
    assert sites == [key for key in every if key in sites]  # execution order
    assert {key[0] for key in sites} <= SHOWS[name]
    for key in sites:
        assert FAULTS[name].edits(*key, shape.flags)


def test_sites_follow_the_flags():
    def where(name: str, shape: tiny.Shape) -> set[str]:
        return {key[0] for key in FAULTS[name].sites(shape.flags, shape.hparams)}

    assert where("no-bias", QWEN2) == {"qkv_bias"}
    assert where("no-bias", LLAMA) == set()
    assert where("no-bias", BIASED) == {"qkv_bias", "attn_out"}
    assert where("eps", QWEN3) == SHOWS["eps"]
    assert where("eps", QWEN2) == SHOWS["eps"] - {"q_norm", "k_norm"}
    # with one key head for all, or one for each, tiling and repeating are the same map
    assert where("gqa-tile", QWEN2) == SHOWS["gqa-tile"]
    for kv_heads in (1, 4):
        assert where("gqa-tile", tiny.Shape(kv_heads=kv_heads)) == set()


@pytest.mark.parametrize("name", SHOWS)
def test_edits_are_plain_data_that_the_engine_knows(name: str):
    shape = tiny.Shape("qwen3", attention_bias=True)
    weights = {row[0] for row in _core.WEIGHTS}
    fields = {"eps", "pairing", "kv_div", "a"}  # rows of params.def with edit YES
    for key in FAULTS[name].sites(shape.flags, shape.hparams):
        for edit in FAULTS[name].edits(*key, shape.flags):
            assert json.loads(json.dumps(edit)) == dict(edit)
            assert edit["layer"] == key[1]
            if edit["target"] == "step":
                assert edit["stage"] == key[0]
                assert edit["field"] in fields
                assert ("value" in edit) != ("factor" in edit)
            else:
                assert edit["target"] == "weight"
                assert edit["weight"] in weights
                assert edit["transform"] in TRANSFORMS


def test_plant_everywhere_and_somewhere():
    whole = plant("eps", QWEN2.flags, QWEN2.hparams)
    assert whole.sites[0] == ("attn_norm", 0)
    assert len(whole.sites) == len(whole.edits) == 2 * 2 + 1  # two norms in each of two layers, and the last one
    one = plant("eps@0.attn_norm", QWEN2.flags, QWEN2.hparams)
    assert one.sites == (("attn_norm", 0),)
    assert one.edits == ({"target": "step", "stage": "attn_norm", "layer": 0, "field": "eps", "factor": 10.0},)
    head = plant("transposed@lm_head", QWEN2.flags, QWEN2.hparams)
    assert head.edits == ({"target": "weight", "weight": "output", "layer": None, "transform": "transposed"},)
    both = plant("gqa-tile@1.*", QWEN2.flags, QWEN2.hparams)
    assert both.sites == (("attn_scores", 1), ("attention", 1))


def test_plant_refuses_with_a_hint():
    with pytest.raises(UnknownName, match="did you mean 'transposed'"):
        plant("transpose", QWEN2.flags, QWEN2.hparams)
    with pytest.raises(UnknownName, match="attn_norm"):
        plant("eps@0.atn_norm", QWEN2.flags, QWEN2.hparams)
    with pytest.raises(ArgumentError, match="it can sit at qkv_bias"):
        plant("no-bias@lm_head", QWEN2.flags, QWEN2.hparams)
    with pytest.raises(ArgumentError, match="no place for it"):
        plant("no-bias", LLAMA.flags, LLAMA.hparams)


def test_listing_names_all():
    text = planting.listing()
    assert all(f"{name} " in text for name in ALL)
    assert "no place in this model" not in text
    assert "no place in this model" in planting.listing(LLAMA.flags, LLAMA.hparams)


def test_the_witness_knows_no_fault_and_no_fault_runs_code():
    judge = Path(faults.__file__).parent
    witness = (judge / "witness.py").read_text()
    for name in ("faults", "faultrow", "planting"):
        assert name not in witness
        modules = {node.module for node in ast.walk(ast.parse((judge / f"{name}.py").read_text())) if isinstance(node, ast.ImportFrom)}
        assert not {m for m in modules if m and ("sides" in m or "noise" in m)}
