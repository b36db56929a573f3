"""The catalogue of faults as data: names, sites, edits, and what ``--plant`` makes of a text.  The hunt itself is in ``test_bisect.py``."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import tiny

from aprender import _core, stages
from aprender.errors import ArgumentError, UnknownName
from aprender.judge import faults
from aprender.judge.faults import FAULTS, plant
from aprender.sides import own

QWEN2, LLAMA, QWEN3 = (tiny.Shape(arch) for arch in tiny.ARCHS)
BIASED = tiny.Shape("llama", attention_bias=True)

# One row of each fault: the stages where the bug catalogue (bugs.md: B30, B13, B01, B16, B19, B45) says that it first shows.
SHOWS = {
    "transposed": {"qkv_matmul", "attn_out", "ffn_gate", "ffn_up", "ffn_out", "lm_head"},
    "eps": {"attn_norm", "q_norm", "k_norm", "ffn_norm", "final_norm"},
    "rope-pairs": {"q_post_rope", "k_post_rope"},
    "no-bias": {"qkv_bias", "attn_out"},
    "gqa-tile": {"attn_scores", "attention"},
    "no-residual": {"post_attn_residual", "post_ffn_residual"},
}


def test_the_six_names():
    assert set(FAULTS) == set(SHOWS)
    assert all(row.name == name and row.text for name, row in FAULTS.items())


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
                assert edit["transform"] in own.TRANSFORMS


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
    text = faults.listing()
    assert all(name in text for name in FAULTS)
    assert "no place in this model" not in text
    assert "no place in this model" in faults.listing(LLAMA.flags, LLAMA.hparams)


def test_the_witness_knows_no_fault_and_no_fault_runs_code():
    judge = Path(faults.__file__).parent
    assert "faults" not in (judge / "witness.py").read_text()
    modules = {node.module for node in ast.walk(ast.parse((judge / "faults.py").read_text())) if isinstance(node, ast.ImportFrom)}
    assert not {m for m in modules if m and ("sides" in m or "noise" in m)}
