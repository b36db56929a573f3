"""The vocabulary of stages: order, flags, aliases, selections.  Numbers come from the rows of csrc/plan/stages.def, counted by hand."""

from __future__ import annotations

import pytest

from aprender import stages
from aprender.errors import ArgumentError, Error, UnknownName

QWEN2 = {"DENSE", "QKV_BIAS", "UNTIED"}
SHAPE = {"dim": 96, "heads": 4, "kv_heads": 2, "head": 32, "ffn": 160, "vocab": 64}


def test_rows_are_in_execution_order() -> None:
    names = [row.name for row in stages.STAGES]
    assert names[0] == "embedding"
    assert names[-1] == "lm_head"
    assert len(set(names)) == len(names)
    assert [stages.index(name) for name in names] == list(range(len(names)))
    assert stages.index("attn_scores") < stages.index("attn_softmax") < stages.index("attention") < stages.index("ffn_norm")


def test_every_wire_is_written_before_it_is_read() -> None:
    """The table is the forward pass: a row may only read what an earlier row wrote.  One QKV buffer is the wires Q, K and V."""
    written: set[str] = set()
    for row in stages.STAGES:
        assert {wire for wire in (row.a, row.b) if wire} <= written, row.name
        written |= {"Q", "K", "V", "QKV"} if row.out == "QKV" else {row.out or ""}


@pytest.mark.parametrize("row", stages.STAGES, ids=lambda row: row.name)
def test_shapes_use_known_symbols(row: stages.Stage) -> None:
    assert len(row.dims(SHAPE, 5, 7)) == len(row.shape)


def test_dims_keep_the_head_size_apart_from_the_model_size() -> None:
    """4 heads of 32 are 128 columns beside a model of 96; two kv heads are 64, so q, k and v side by side are 256."""
    assert stages.stage("qkv_matmul").dims(SHAPE, 3) == (3, 256)
    assert stages.stage("attention").dims(SHAPE, 3) == (3, 128)
    assert stages.stage("attn_scores").dims(SHAPE, 3, 9) == (4, 3, 9)
    assert stages.stage("rope_table").dims(SHAPE, 3) == (3, 32)


def test_flags_switch_rows() -> None:
    """qwen2 has biases and no head norms, qwen3 the reverse; everything else is shared: 25 rows, 23 and 24 of them on."""
    qwen2, qwen3 = stages.keys(QWEN2, 1), stages.keys({"DENSE", "QK_NORM"}, 1)
    assert ("qkv_bias", 0) in qwen2
    assert ("q_norm", 0) not in qwen2
    assert ("qkv_bias", 0) not in qwen3
    assert ("q_norm", 0) in qwen3
    assert len(qwen2) == len(stages.STAGES) - 2
    assert len(qwen3) == len(stages.STAGES) - 1


def test_keys_run_layer_by_layer() -> None:
    every = stages.keys(QWEN2, 3)
    assert every[0] == ("embedding", None)
    assert every[-1] == ("lm_head", None)
    assert [key[1] for key in every if key[1] is not None] == sorted(key[1] for key in every if key[1] is not None)
    assert sorted(every, key=stages.order) == every


def test_alias_is_the_last_row_of_a_layer() -> None:
    assert stages.stage("layer_output").name == "post_ffn_residual"


@pytest.mark.parametrize(("wrong", "right"), [("ffn_swiglu", "ffn_swigl"), ("lmhead", "lm_head"), ("layer_outputs", "layer_output")])
def test_unknown_stage_suggests(wrong: str, right: str) -> None:
    with pytest.raises(UnknownName, match=f"did you mean '{right}'") as caught:
        stages.stage(wrong)
    assert isinstance(caught.value, LookupError)
    assert isinstance(caught.value, Error)


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("3.attn_*", [("attn_norm", 3), ("attn_out", 3)], [("attn_norm", 2), ("ffn_out", 3), ("post_attn_residual", 3)]),
        ("*.ffn_out", [("ffn_out", 0), ("ffn_out", 9)], [("ffn_up", 0), ("lm_head", None)]),
        ("lm_head", [("lm_head", None)], [("final_norm", None)]),
        ("1..3.ffn_up", [("ffn_up", 1), ("ffn_up", 2)], [("ffn_up", 0), ("ffn_up", 3)]),
        ("layer_output", [("post_ffn_residual", 5)], [("post_attn_residual", 5)]),
        ("*norm", [("final_norm", None), ("q_norm", 1)], [("embedding", None)]),
        ("0.ffn_*, lm_head", [("ffn_up", 0), ("lm_head", None)], [("ffn_up", 1)]),
    ],
)
def test_selection(text: str, inside: list[stages.Key], outside: list[stages.Key]) -> None:
    chosen = stages.parse_selection(text)
    assert all(map(chosen, inside))
    assert not any(map(chosen, outside))


@pytest.mark.parametrize("text", ["", "ffn_out,", "3.lm_head", "x.ffn_out", "3..1.ffn_out"])
def test_bad_selection(text: str) -> None:
    with pytest.raises(ArgumentError):
        stages.parse_selection(text)


@pytest.mark.parametrize("text", ["nothing_*", "2.attn_nrom"])
def test_selection_of_nothing(text: str) -> None:
    with pytest.raises(UnknownName):
        stages.parse_selection(text)


def test_layers() -> None:
    assert stages.parse_layers("2..5") == range(2, 5)
    assert stages.parse_layers("3") == range(3, 4)
    for text in ("5..5", "a..b", "-1..2", "", "1...3"):
        with pytest.raises(ArgumentError):
            stages.parse_layers(text)
