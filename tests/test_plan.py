"""Floor 3: the plan has every stage once, in order, with the shapes of the table; a value has its place for as long as it is needed.

What an edit may change is checked too: it may make the result wrong, that is what it is for, but it may never lead out of an array.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from aprender import _core, stages
from aprender.errors import ArgumentError, FormatError, UnknownName

Maker = Callable[..., _core.Model]
Key = tuple[str, int | None]
SHAPE = tiny.Shape("qwen3", attention_bias=True)  # every row of the table is on but none twice
STAGE_ROWS = {row[0]: row for row in _core.STAGES}


def container(shape: tiny.Shape) -> str:
    return "safetensors" if shape.attention_bias else "gguf"


def sizes(shape: tiny.Shape, tokens: int, position: int) -> dict[str, int]:
    q, k = shape.heads * shape.head, shape.kv_heads * shape.head
    return {
        "T": tokens, "J": position + tokens, "D": shape.dim, "H": shape.heads, "h": shape.head, "Qd": q, "Kd": k, "QKV": q + 2 * k,
        "F": shape.ffn, "V": shape.vocab,
    }  # fmt: skip


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", tiny.SHAPES, ids=str)
def test_every_active_stage_in_order(shape: tiny.Shape, tiny_model: Maker) -> None:
    """Against `stages.keys`, which reads the same rows without the planner, and against the flags of the shape."""
    plan = _core.Run(tiny_model(shape, container(shape))).plan()
    keys = [(step["stage"], step["layer"]) for step in plan]
    assert keys == stages.keys(shape.flags, shape.layers)
    assert len(set(keys)) == len(keys)
    off = {row[0] for row in _core.STAGES} - {stage for stage, _ in keys}
    assert off == {name for name, row in STAGE_ROWS.items() if row[9] != "ALWAYS" and row[9] not in shape.flags}


def test_the_whole_table_can_be_on(tiny_model: Maker) -> None:
    plan = _core.Run(tiny_model(SHAPE, "safetensors")).plan()
    assert {step["stage"] for step in plan} == set(STAGE_ROWS)
    assert {step["op"] for step in plan} == {row[0] for row in _core.OPS}


@pytest.mark.parametrize("shape", tiny.SHAPES, ids=str)
def test_shapes_are_those_of_the_table(shape: tiny.Shape, tiny_model: Maker) -> None:
    run = _core.Run(tiny_model(shape, container(shape)))
    for position, tokens in ((0, 5), (5, 1), (6, 3)):
        size = sizes(shape, tokens, position)
        plan = run.plan(tokens)
        kept = run.forward(list(range(tokens)), "all")
        assert run.position == position + tokens
        for step in plan:
            dims = tuple(size[symbol] for symbol in STAGE_ROWS[step["stage"]][6].split())
            value = kept[step["stage"], step["layer"]]
            assert value.shape == dims
            assert (step["rows"], step["cols"]) == (int(np.prod(dims[:-1])), dims[-1])
            assert (step["pos"], step["keys"], step["heads"], step["head"]) == (position, position + tokens, shape.heads, shape.head)


@pytest.mark.parametrize("shape", tiny.SHAPES, ids=str)
def test_steps_read_what_the_table_says(shape: tiny.Shape, tiny_model: Maker) -> None:
    """A wire is the last value of its kind: followed here by hand through the exported rows."""
    plan = _core.Run(tiny_model(shape, container(shape))).plan()
    last: dict[str, int] = {}
    for i, step in enumerate(plan):
        _, span, op, out, a, b, *_ = STAGE_ROWS[step["stage"]]
        assert step["op"] == op
        assert (step["layer"] is None) == (span != "LAYER")
        assert step["a"] == (last[a] if a != "NONE" else -1)
        assert step["b"] == (last[b] if b != "NONE" else -1)
        for wire in (out, *(("Q", "K", "V") if out == "QKV" else ())):
            last[wire] = i


def test_parameters_come_from_the_model(tiny_model: Maker) -> None:
    shape = tiny.Shape("llama", eps=1e-3, theta=777.0)
    for step in _core.Run(tiny_model(shape)).plan():
        assert step["eps"] == float(np.float32(1e-3))
        assert step["theta"] == 777.0
        assert step["scale"] == 1 / np.sqrt(24)
        assert (step["kv_div"], step["kv_mod"], step["mask_offset"], step["window"], step["pairing"]) == (2, 2, 0, 0, 0)


@pytest.mark.parametrize("shape", tiny.SHAPES, ids=str)
def test_every_weight_is_read_by_a_step(shape: tiny.Shape, tiny_model: Maker) -> None:
    """And none twice, but that a shared table is also the head; its columns are the rows of the weight."""
    model = tiny_model(shape, container(shape))
    read: list[tuple[str, int | None]] = []
    for step in _core.Run(model).plan():
        assert sum(cols for _, _, cols in step["weights"]) in (0, step["cols"]) or STAGE_ROWS[step["stage"]][2] in ("EMBED", "RMSNORM")
        for weight, bias, _ in step["weights"]:
            read += [(name, step["layer"]) for name in (weight, bias) if name]
    assert sorted(read, key=str) == sorted(((info.name, info.layer) for info in model.weights), key=str)


@pytest.mark.parametrize("tokens", [0, -1, 1 << 16, (1 << 31) - 1])
def test_impossible_token_counts(tokens: int, tiny_model: Maker) -> None:
    with pytest.raises(FormatError, match="tokens") as caught:
        _core.Run(tiny_model(SHAPE, "safetensors")).plan(tokens)
    assert caught.value.code == "LIMIT"


# ---- places ----------------------------------------------------------------------------------------------------------

Place = tuple[bool, bool, int, int]


def clashes(plan: Sequence[Mapping[str, Any]], places: Sequence[Place], fed: frozenset[int] = frozenset()) -> list[str]:
    """Values that share memory while both are needed.

    A value lives from its step to the last needed step that reads it; a kept one for ever; a cache has memory of its own.  A fed step reads
    nothing.
    """
    complaints = []
    end = list(range(len(plan)))
    for i, step in enumerate(plan):
        if places[i][0] and i not in fed:
            for source in (step["a"], step["b"]):
                if source >= 0:
                    end[source] = i
                    if not places[source][0]:
                        complaints.append(f"{step['stage']} reads {plan[source]['stage']}, which is not computed")
    for arena in (False, True):
        mine = [i for i, (needed, kept, _, _) in enumerate(places) if needed and kept == arena and (arena or plan[i]["op"] != "CACHE")]
        for n, i in enumerate(mine):
            for j in mine[n + 1 :]:
                together = arena or end[i] >= j
                overlap = places[i][2] < places[j][2] + places[j][3] and places[j][2] < places[i][2] + places[i][3]
                if together and overlap:
                    complaints.append(f"{plan[i]['stage']} {plan[i]['layer']} and {plan[j]['stage']} {plan[j]['layer']}")
    return complaints


def subsets(keys: Sequence[Key]) -> st.SearchStrategy[list[Key]]:
    return st.lists(st.sampled_from(list(keys)), max_size=12, unique=True)


@given(st.data())
def test_no_two_live_values_share_a_place(tiny_model: Maker, data: st.DataObject) -> None:
    run = _core.Run(tiny_model(SHAPE, "safetensors"), threads=1)
    run.forward(list(range(data.draw(st.integers(1, 4)))))
    tokens = list(range(data.draw(st.integers(1, 6))))
    plan = run.plan(len(tokens))
    keys = [(step["stage"], step["layer"]) for step in plan]
    keep = data.draw(subsets(keys))
    feed_keys = data.draw(subsets(keys))
    feed = {key: np.zeros(plan[keys.index(key)]["rows"] * plan[keys.index(key)]["cols"], np.float32) for key in feed_keys}
    places = run._places(tokens, keep, feed)
    assert not clashes(plan, places, frozenset(keys.index(key) for key in feed))
    assert {key for key, place in zip(keys, places, strict=True) if place[1]} == set(keep)
    assert all(place[0] for key, place in zip(keys, places, strict=True) if key in keep)
    assert all(place[2] % 16 == 0 for place in places)  # 64 bytes


@pytest.mark.parametrize("keep", [None, "all", [("lm_head", None)]])
def test_places_of_a_whole_run(keep: Any, tiny_model: Maker) -> None:
    run = _core.Run(tiny_model(SHAPE, "safetensors"))
    places = run._places([1, 2, 3], keep)
    assert not clashes(run.plan(3), places)
    if keep is None:
        assert not any(needed for needed, *_ in places)  # a replay that keeps nothing computes nothing
    if keep == "all":
        assert all(needed and kept for needed, kept, *_ in places)


def test_clashes_are_found() -> None:
    """The check itself: two values in one place are fine one after the other and not at the same time."""
    plan = [
        {"stage": name, "layer": None, "op": "ADD", "a": a, "b": b}
        for name, a, b in (("x", -1, -1), ("y", 0, -1), ("z", 1, -1), ("w", 2, -1))
    ]
    good = [(True, False, 0, 4), (True, False, 4, 4), (True, False, 0, 4), (True, False, 4, 4)]
    assert not clashes(plan, good)
    assert clashes(plan, [good[0], (True, False, 0, 4), *good[2:]])
    assert clashes(plan, [good[0], (True, False, 3, 4), *good[2:]])
    plan[3]["b"] = 0  # x is now needed to the end
    assert clashes(plan, good)
    assert clashes(plan, [(False, False, 0, 4), *good[1:]])
    assert clashes(plan, [(True, True, 0, 4), (True, True, 0, 4), *good[2:]])
    assert not clashes([dict(step, op="CACHE") for step in plan], good)


def test_scratch_does_not_grow_with_depth(tiny_model: Maker) -> None:
    """What is not kept is thrown away: eight layers need no more working memory than two."""
    high = []
    for layers in (2, 8):
        run = _core.Run(tiny_model(tiny.Shape("llama", layers=layers)))
        high.append(max(at + size for needed, kept, at, size in run._places([1, 2, 3], [("lm_head", None)]) if needed and not kept))
    assert high[0] == high[1]


# ---- edits -----------------------------------------------------------------------------------------------------------


def edited(model: _core.Model, *edits: tuple[str, int | None, str, float]) -> _core.Run:
    return _core.Run(model, edits=edits)


@pytest.mark.parametrize(
    ("edit", "kind"),
    [
        (("attn_norm", 0, "pos", 1), ArgumentError), (("attn_norm", 0, "keys", 1), ArgumentError),
        (("q_post_rope", 0, "head", 2), ArgumentError),
        (("attn_scores", 0, "heads", 2), ArgumentError), (("attn_scores", 0, "kv_div", 0), ArgumentError),
        (("attn_scores", 0, "kv_div", -1), ArgumentError), (("attn_scores", 0, "kv_mod", 0), ArgumentError),
        (("attn_scores", 0, "kv_mod", 3), ArgumentError), (("attn_scores", 0, "window", -1), ArgumentError),
        (("q_post_rope", 0, "pairing", 2), ArgumentError), (("q_post_rope", 0, "pairing", 0.5), ArgumentError),
        (("rope_table", None, "theta", 0), ArgumentError), (("rope_table", None, "theta", 0.5), ArgumentError),
        (("rope_table", None, "theta", float("nan")), ArgumentError),
        (("rope_table", None, "theta", float("inf")), ArgumentError), (("attn_scores", 0, "kv_div", 1e300), ArgumentError),
        (("attn_scores", 0, "mask_offset", float("nan")), ArgumentError), (("attn_norm", 0, "a", -1), ArgumentError),
        (("attn_norm", 0, "a", 10**6), ArgumentError), (("attn_norm", 0, "a", 2), ArgumentError),
        (("attn_norm", 0, "a", -2), ArgumentError),
        (("ffn_out", 0, "a", 0), ArgumentError), (("attn_scores", 0, "a", 0), ArgumentError), (("attn_scores", 0, "b", -1), ArgumentError),
        (("attn_scores", 2, "scale", 1), UnknownName), (("lm_head", 0, "eps", 1), UnknownName), (("nothing", 0, "eps", 1), UnknownName),
        (("attn_norm", 0, "nothing", 1), UnknownName), (("attn_norm", -1, "eps", 1), UnknownName),
    ],
    ids=str,
)  # fmt: skip
def test_edits_out_of_range(edit: tuple[str, int | None, str, float], kind: type[Exception], tiny_model: Maker) -> None:
    with pytest.raises(kind) as caught:
        edited(tiny_model(SHAPE, "safetensors"), edit)
    assert edit[0] in str(caught.value) or edit[2] in str(caught.value)


def test_edits_change_the_plan(tiny_model: Maker) -> None:
    model = tiny_model(SHAPE, "safetensors")
    run = edited(model, ("attn_norm", 1, "eps", 0.5), ("q_post_rope", None, "pairing", 1), ("post_ffn_residual", 0, "a", -1))
    plan, plain = run.plan(), _core.Run(model).plan()
    changed = {
        (step["stage"], step["layer"], field) for step, was in zip(plan, plain, strict=True) for field in step if step[field] != was[field]
    }
    assert changed == {("attn_norm", 1, "eps"), ("q_post_rope", 0, "pairing"), ("q_post_rope", 1, "pairing"), ("post_ffn_residual", 0, "a")}


EDITABLE = ("eps", "scale", "theta", "pairing", "kv_div", "kv_mod", "mask_offset", "window", "a", "b")


@given(st.data())
def test_no_edit_leads_out_of_an_array(tiny_model: Maker, data: st.DataObject) -> None:
    """Any edits whatever: refused, or run to the end (under the sanitizers: without a wild access)."""
    model = tiny_model(SHAPE, "safetensors")
    keys = stages.keys(SHAPE.flags, SHAPE.layers)
    number = st.one_of(st.integers(-3, 60), st.sampled_from([2**31 - 1, -(2**31), 2**31, 10**9, 1e30, 0.5, float("nan"), float("inf")]))
    edit = st.tuples(st.sampled_from(keys), st.sampled_from(EDITABLE), number)
    edits = [(stage, layer, field, float(value)) for (stage, layer), field, value in data.draw(st.lists(edit, min_size=1, max_size=4))]
    try:
        run = _core.Run(model, edits=edits, threads=1)
    except ArgumentError:
        return
    kept = run.forward([1, 2, 3], "all")
    assert len(kept) == len(keys)
    run.forward([4], "all")
