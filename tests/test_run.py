"""Floor 5: the step loop.  The same bits whatever is kept, however many threads run and however tokens are cut; feeding, replaying, limits.

The canary is wide enough for the threads to share every operation; the tiny models have the rows that it lacks.
"""

from __future__ import annotations

import ctypes
import itertools
import platform
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import PROMPT
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from aprender import _core, stages
from aprender.errors import ArgumentError, CannotRun, FormatError, UnknownName

Array = NDArray[np.float32]
Key = tuple[str, int | None]
Maker = Callable[..., _core.Model]
LOGITS: Key = ("lm_head", None)

#: Every row of the table is on; and llama from a GGUF, whose q and k rows are permuted.
FULL = tiny.Shape("qwen3", attention_bias=True)
SHAPES = [(FULL, "safetensors"), (tiny.Shape("llama", tied=True), "gguf"), (tiny.Shape("qwen2"), "gguf")]
IDS = [3, 1, 4, 1, 5, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28]


def equal(a: Array, b: Array, what: object = "") -> None:
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32), err_msg=str(what))


def all_equal(a: Mapping[Key, Array], b: Mapping[Key, Array]) -> None:
    assert list(a) == list(b)
    for key in a:
        equal(a[key], b[key], key)


@pytest.fixture(scope="module")
def full(tiny_model: Maker) -> _core.Model:
    return tiny_model(FULL, "safetensors")


# ---- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "container"), SHAPES, ids=str)
def test_each_stage_alone(shape: tiny.Shape, container: str, tiny_model: Maker) -> None:
    """Kept alone, or with all others: the same bits.  Two calls, so that a cache is read too."""
    model = tiny_model(shape, container)
    everything = _core.Run(model)
    wanted = [everything.forward(ids, "all") for ids in (IDS[:7], IDS[7:9])]
    for key in wanted[0]:
        run = _core.Run(model)
        for ids, values in zip((IDS[:7], IDS[7:9]), wanted, strict=True):
            kept = run.forward(ids, [key])
            assert list(kept) == [key]
            equal(kept[key], values[key], key)


@given(st.data())
def test_any_subset(full: _core.Model, data: st.DataObject) -> None:
    keys = stages.keys(full.flags, 2)
    keep = data.draw(st.lists(st.sampled_from(keys), unique=True))
    wanted = _core.Run(full).forward(IDS[:6], "all")
    kept = _core.Run(full).forward(IDS[:6], keep)
    assert list(kept) == [key for key in keys if key in keep]  # execution order, whatever order was asked for
    for key in keep:
        equal(kept[key], wanted[key], key)


def test_nothing_kept(full: _core.Model) -> None:
    """The cache advances all the same."""
    run, other = _core.Run(full), _core.Run(full)
    assert run.forward(IDS[:5]) == run.forward(IDS[5:6], []) == {}
    other.forward(IDS[:6], "all")
    equal(run.forward([7], [LOGITS])[LOGITS], other.forward([7], [LOGITS])[LOGITS])


def test_a_stage_of_every_layer(full: _core.Model) -> None:
    kept = _core.Run(full).forward([1], [("ffn_out", None), ("attn_norm", 1)])
    assert list(kept) == [("ffn_out", 0), ("attn_norm", 1), ("ffn_out", 1)]


@pytest.mark.parametrize("keep", [[("nothing", None)], [("ffn_out", 2)], [("ffn_out", -1)], [("lm_head", 0)]])
def test_unknown_stages(keep: list[Key], full: _core.Model) -> None:
    run = _core.Run(full)
    with pytest.raises(UnknownName, match=keep[0][0]) as caught:
        run.forward([1], keep)
    assert (caught.value.code, caught.value.field, run.position) == ("LOOKUP", keep[0][0], 0)


def test_a_stage_that_is_off(tiny_model: Maker) -> None:
    with pytest.raises(UnknownName, match="this model has no stage q_norm"):
        _core.Run(tiny_model(tiny.Shape("llama"))).forward([1], [("q_norm", None)])


@pytest.mark.parametrize("keep", ["lm_head", 7, [7], ["lm_head"], [("lm_head",)], [("lm_head", "x")], [(7, None)], [["lm_head", None]]])
def test_keep_of_the_wrong_kind(keep: Any, full: _core.Model) -> None:
    run = _core.Run(full)
    with pytest.raises(TypeError):
        run.forward([1], keep)
    assert len(run.forward([1], "all")) > 20  # and the run is still good


# ---- threads and chunks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 7])
def test_threads_do_not_change_bits(threads: int, canary: _core.Model) -> None:
    ids = list(itertools.islice(itertools.cycle(PROMPT), 70))
    all_equal(_core.Run(canary, threads=threads).forward(ids, "all"), _core.Run(canary, threads=1).forward(ids, "all"))


def chunked(model: _core.Model, ids: Sequence[int], lengths: Iterable[int], **options: Any) -> dict[Key, Array]:
    """Captures of a run in pieces, joined: rows one under the other, scores filled up with 0, caches as after the last piece."""
    run, pieces, at = _core.Run(model, **options), [], 0
    for n in lengths:
        pieces.append(run.forward(ids[at : at + n], "all"))
        at += n
        assert run.position == at
    assert at == len(ids)
    joined = {}
    for key in pieces[0]:
        shape = stages.by_name[key[0]].shape
        if "T" not in shape:
            joined[key] = pieces[-1][key]
        elif "J" in shape:
            joined[key] = np.concatenate([np.pad(piece[key], ((0, 0), (0, 0), (0, at - piece[key].shape[2]))) for piece in pieces], axis=1)
        else:
            joined[key] = np.concatenate([piece[key] for piece in pieces])
    return joined


@pytest.mark.parametrize(("shape", "container"), SHAPES, ids=str)
def test_token_by_token(shape: tiny.Shape, container: str, tiny_model: Maker) -> None:
    model = tiny_model(shape, container)
    all_equal(chunked(model, IDS, [1] * len(IDS)), _core.Run(model).forward(IDS, "all"))


@given(st.data())
def test_any_chunks(full: _core.Model, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(IDS) - 1))))
    lengths = [b - a for a, b in itertools.pairwise([0, *cuts, len(IDS)])]
    all_equal(chunked(full, IDS, lengths, threads=data.draw(st.integers(1, 4))), _core.Run(full).forward(IDS, "all"))


def test_chunks_of_the_canary(canary: _core.Model) -> None:
    """Past 64 and 128 keys, where the cache moves."""
    ids = list(itertools.islice(itertools.cycle(PROMPT), 140))
    whole = _core.Run(canary).forward(ids, "all")
    all_equal(chunked(canary, ids, [1, 62, 1, 1, 64, 11], threads=2), whole)


def test_the_cache_is_read(full: _core.Model) -> None:
    """Otherwise chunking shows nothing: other tokens before give other logits after."""
    runs = [_core.Run(full), _core.Run(full)]
    for run, first in zip(runs, ([1, 2], [1, 3]), strict=True):
        run.forward(first)
    a, b = (run.forward([5], [LOGITS])[LOGITS] for run in runs)
    assert not np.array_equal(a, b)


def test_reset(full: _core.Model) -> None:
    run = _core.Run(full)
    first = run.forward(IDS, "all")
    assert run.position == len(IDS)
    run.reset()
    assert run.position == 0
    all_equal(run.forward(IDS, "all"), first)


# ---- feeding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "container"), SHAPES, ids=str)
def test_every_stage_replays_on_its_inputs(shape: tiny.Shape, container: str, tiny_model: Maker) -> None:
    """With the captured inputs fed, the captured value comes out, and nothing else is computed."""
    model = tiny_model(shape, container)
    run = _core.Run(model)
    run.forward(IDS[:5])
    plan = run.plan(4)
    wanted = _replayed_all(run, IDS[5:9])
    for i, step in enumerate(plan):
        key = (step["stage"], step["layer"])
        sources = [plan[j] for j in (step["a"], step["b"]) if j >= 0]
        feed = {(source["stage"], source["layer"]): wanted[source["stage"], source["layer"]] for source in sources}
        assert [(key, True)] == [(k, equal(v, wanted[key], key) is None) for k, v in run.replay(IDS[5:9], [key], feed).items()]
        needed = {j for j, place in enumerate(run._places(IDS[5:9], [key], feed)) if place[0]}
        assert needed == {i} | {j for j in (step["a"], step["b"]) if j >= 0}
        assert run.position == 5


def _replayed_all(run: _core.Run, ids: Sequence[int]) -> dict[Key, Array]:
    first = run.replay(ids, "all")
    all_equal(run.replay(ids, "all"), first)  # a replay leaves nothing behind
    return first


def test_a_replay_is_what_forward_does_next(full: _core.Model) -> None:
    run = _core.Run(full)
    run.forward(IDS[:5])
    next_values = run.replay(IDS[5:8], "all")
    assert run.position == 5
    all_equal(run.forward(IDS[5:8], "all"), next_values)


def test_a_fed_value_takes_the_place_of_the_computed_one(full: _core.Model) -> None:
    """It is seen by what comes after and by nothing before; all of it, not a part."""
    plain = _core.Run(full).forward(IDS[:4], "all")
    key: Key = ("ffn_norm", 1)
    other = plain[key] * 2
    fed = _core.Run(full).forward(IDS[:4], "all", {key: other})
    order = list(plain)
    equal(fed[key], other)
    for before in order[: order.index(key)]:
        equal(fed[before], plain[before], before)
    for after in ("ffn_gate", "ffn_up", "ffn_out"):
        assert not np.array_equal(fed[after, 1], plain[after, 1])
    assert not np.array_equal(fed[LOGITS], plain[LOGITS])
    all_equal(_core.Run(full).forward(IDS[:4], "all", dict.fromkeys([key], plain[key])), plain)


def test_resuming_from_a_layer(full: _core.Model) -> None:
    """The first layer's output fed: its attention is not needed, the logits are the same."""
    plain = _core.Run(full).forward(IDS[:4], "all")
    key: Key = ("post_ffn_residual", 0)
    run = _core.Run(full)
    kept = run.replay(IDS[:4], [LOGITS], {key: plain[key]})
    equal(kept[LOGITS], plain[LOGITS])
    needed = {(s["stage"], s["layer"]) for s, p in zip(run.plan(4), run._places(IDS[:4], [LOGITS], {key: plain[key]}), strict=True) if p[0]}
    assert {layer for _, layer in needed} == {None, 0, 1}
    assert {stage for stage, layer in needed if layer == 0} == {"post_ffn_residual"}
    assert ("embedding", None) not in needed


def test_every_stage_can_be_fed(full: _core.Model) -> None:
    plain = _core.Run(full).forward(IDS[:4], "all")
    for key, value in plain.items():
        run = _core.Run(full)
        kept = run.forward(IDS[:4], [key, LOGITS], {key: value})
        equal(kept[key], value, key)
        equal(kept[LOGITS], plain[LOGITS], key)
        equal(run.forward([9], [LOGITS])[LOGITS], _next(full, IDS[:4], 9), key)


def _next(model: _core.Model, ids: Sequence[int], token: int) -> Array:
    run = _core.Run(model)
    run.forward(ids)
    return run.forward([token], [LOGITS])[LOGITS]


def test_a_fed_cache_is_the_cache(full: _core.Model) -> None:
    """Captured keys and values of one history, fed into an empty run at the same place, continue it."""
    run = _core.Run(full)
    history = run.forward(IDS[:6], "all")
    wanted = run.forward([9], [LOGITS])[LOGITS]
    other = _core.Run(full)
    other.forward([0] * 6)
    caches = {key: value for key, value in history.items() if key[0] in ("k_cache", "v_cache")}
    other.reset()
    other.forward([0] * 6, None, caches)
    equal(other.forward([9], [LOGITS])[LOGITS], wanted)


def test_any_array_can_be_fed(full: _core.Model) -> None:
    """Other types and layouts are converted if float32 holds their values; a float64 array is for the caller to round."""
    key: Key = ("attn_norm", 0)
    value = np.round(_core.Run(full).forward(IDS[:4], [key])[key] * 8)
    wanted = _core.Run(full).replay(IDS[:4], [("qkv_matmul", 0)], {key: value})
    for other in (
        value.astype(np.float16),
        value.tolist(),
        np.asfortranarray(value),
        value.astype(np.int16),
        value[::-1][::-1],
        value.ravel(),
    ):
        all_equal(_core.Run(full).replay(IDS[:4], [("qkv_matmul", 0)], {key: other}), wanted)
    with pytest.raises(TypeError, match="float64"):
        _core.Run(full).replay(IDS[:4], [("qkv_matmul", 0)], {key: value.astype(np.float64)})


@pytest.mark.parametrize(
    ("feed", "kind"),
    [
        ({("attn_norm", 0): np.zeros((4, 63), np.float32)}, ArgumentError),
        ({("attn_norm", 0): np.zeros(0, np.float32)}, ArgumentError),
        ({("attn_norm", 0): 1.0}, ArgumentError),
        ({("attn_norm", 2): np.zeros((4, 64), np.float32)}, UnknownName),
        ({("nothing", None): np.zeros((4, 64), np.float32)}, UnknownName),
        ({("attn_norm", None): np.zeros((4, 64), np.float32)}, ValueError),
        ({"attn_norm": np.zeros((4, 64), np.float32)}, TypeError),
        ({("attn_norm", 0): "text"}, ValueError),
        ({("attn_norm", 0): np.zeros((4, 64), np.complex64)}, TypeError),
        ([("attn_norm", 0)], TypeError),
        (7, TypeError),
    ],
)
def test_feeds_that_do_not_fit(feed: Any, kind: type[Exception], full: _core.Model) -> None:
    run = _core.Run(full)
    with pytest.raises(kind):
        run.forward(IDS[:4], [LOGITS], feed)
    assert run.position == 0
    equal(run.forward(IDS[:4], [LOGITS])[LOGITS], _core.Run(full).forward(IDS[:4], [LOGITS])[LOGITS])


# ---- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "container"), SHAPES, ids=str)
def test_overrides_are_in_hugging_face_order(shape: tiny.Shape, container: str, tiny_model: Maker) -> None:
    """A weight in its own place changes no bit, even where the file has permuted rows or another format."""
    model = tiny_model(shape, container)
    overrides = {(info.name, info.layer): model.weight(info.name, info.layer) for info in model.weights}
    all_equal(_core.Run(model, overrides=overrides).forward(IDS, "all"), _core.Run(model).forward(IDS, "all"))


def test_an_override_counts(full: _core.Model) -> None:
    """It is copied, and it changes its own stage and what follows."""
    weight = np.zeros_like(full.weight("ffn_up", 1))
    run = _core.Run(full, overrides={("ffn_up", 1): weight})
    weight[:] = 7
    kept, plain = run.forward(IDS[:3], "all"), _core.Run(full).forward(IDS[:3], "all")
    assert not kept["ffn_up", 1].any()
    equal(kept["ffn_gate", 1], plain["ffn_gate", 1])
    assert not np.array_equal(kept[LOGITS], plain[LOGITS])


def test_a_shared_head_can_be_overridden_alone(tiny_model: Maker) -> None:
    model = tiny_model(tiny.Shape("llama", tied=True))
    kept = _core.Run(model, overrides={("output", None): np.zeros_like(model.weight("output"))}).forward([1], "all")
    assert kept["embedding", None].any()
    assert not kept[LOGITS].any()


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        ({("ffn_up", 0): np.zeros(3, np.float32)}, ArgumentError),
        ({("ffn_up", 2): np.zeros((160, 64), np.float32)}, UnknownName),
        ({("ffn_up", None): np.zeros((160, 64), np.float32)}, UnknownName),
        ({("nothing", 0): np.zeros(3, np.float32)}, UnknownName),
        ({("ffn_up", 0): np.zeros((160, 64))}, TypeError),
        ({"ffn_up": np.zeros(3, np.float32)}, TypeError),
        ({("ffn_up", 0): "x"}, ValueError),
        ([1], TypeError),
    ],
)
def test_overrides_that_do_not_fit(overrides: Any, kind: type[Exception], full: _core.Model) -> None:
    with pytest.raises(kind):
        _core.Run(full, overrides=overrides)


# ---- limits and bad arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "kind", "says"),
    [
        ([], ArgumentError, "no tokens"),
        ([1, 112], ArgumentError, "token 112 at position 3"),
        ([1, 2, -1], ArgumentError, "token -1 at index 2"),
        ([1 << 40], ArgumentError, "token 1099511627776"),
        ([1 << 80], OverflowError, None),
        (["a"], TypeError, None),
        ([1.5], TypeError, None),
        (None, TypeError, None),
        (7, TypeError, None),
        ([1] * ((1 << 20) + 1), FormatError, "beyond 1048576"),
        ([1] * 40000, FormatError, "fewer tokens"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_tokens_that_cannot_be(tokens: Any, kind: type[Exception], says: str | None, full: _core.Model) -> None:
    run = _core.Run(full)
    run.forward([1, 2])
    with pytest.raises(kind, match=says):
        run.forward(tokens, [LOGITS])
    assert run.position == 2
    equal(run.forward([5], [LOGITS])[LOGITS], _next(full, [1, 2], 5))


def test_tokens_of_any_integer_kind(full: _core.Model) -> None:
    wanted = _core.Run(full).forward([1, 2], [LOGITS])
    for tokens in ((1, 2), np.array([1, 2], np.int64), np.array([1, 2], np.uint8), range(1, 3)):
        all_equal(_core.Run(full).forward(tokens, [LOGITS]), wanted)


def test_position_limit(tmp_path: Path, tiny_model: Maker) -> None:
    """The last position that is allowed is 2^20 - 1; the position counts, not only the piece."""
    run = _core.Run(tiny_model(tiny.Shape("llama", layers=1)))
    run.forward([1])
    with pytest.raises(FormatError, match="position 1 \\+ 1048576 tokens is beyond 1048576") as caught:
        run.forward([1] * (1 << 20))
    assert caught.value.code == "LIMIT"


def test_arguments_of_a_run(full: _core.Model) -> None:
    for bad in ({"threads": "x"}, {"tier": 7}, {"edits": 7}, {"edits": [1]}, {"nothing": 1}):
        with pytest.raises(TypeError):
            _core.Run(full, **bad)
    with pytest.raises(TypeError):
        _core.Run(full.file)  # type: ignore[arg-type]
    assert _core.Run(full, threads=None).backend == "cpu"
    assert _core.Run(full, threads=10**6).model is full


# ---- one timeline, many threads --------------------------------------------------------------------------------------


def test_a_second_call_is_refused(canary: _core.Model) -> None:
    """While one thread is in forward, every call of another says so at once; afterwards all is well."""
    run = _core.Run(canary, threads=1)
    ids = list(PROMPT) * 60
    answers: list[str] = []
    started, done = threading.Event(), threading.Event()

    def first() -> None:
        started.set()
        run.forward(ids)
        done.set()

    worker = threading.Thread(target=first)
    worker.start()
    started.wait()
    while not done.is_set():
        for call in (lambda: run.forward([1]), lambda: run.replay([1]), run.reset):
            try:
                call()
            except CannotRun as problem:
                answers.append(str(problem.code))
        if answers and len(answers) % 30 == 0:
            done.wait(0.001)
        if not answers and run.position:  # the other thread had finished before we looked
            break
    worker.join()
    assert set(answers) == {"BUSY"}


def test_runs_of_one_model_in_many_threads(canary: _core.Model) -> None:
    """A Model is shared; each thread has its own Run."""
    wanted = [_core.Run(canary).forward([n, *PROMPT], [LOGITS])[LOGITS] for n in range(4)]
    wrong: list[int] = []

    def work(n: int) -> None:
        for _ in range(5):
            if not np.array_equal(_core.Run(canary, threads=1 + n % 2).forward([n, *PROMPT], [LOGITS])[LOGITS], wanted[n]):
                wrong.append(n)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# ---- the floating-point mode of others -------------------------------------------------------------------------------

if platform.machine() == "x86_64":

    @pytest.fixture(scope="module")
    def control(tmp_path_factory: pytest.TempPathFactory) -> Any:
        """mode(): this thread's MXCSR; mode_set(x)."""
        folder = tmp_path_factory.mktemp("mode")
        (folder / "mode.c").write_text(
            "#include <xmmintrin.h>\nunsigned mode(void) { return _mm_getcsr(); }\nvoid mode_set(unsigned x) { _mm_setcsr(x); }\n"
        )
        compiler = shutil.which("cc") or shutil.which("gcc") or "cc"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(folder / "mode.so"), str(folder / "mode.c")], check=True)
        return ctypes.CDLL(str(folder / "mode.so"))

    @pytest.mark.parametrize("threads", [1, 3])
    def test_flush_to_zero_and_rounding_of_others(threads: int, control: Any, full: _core.Model) -> None:
        """A library built with -ffast-math switches denormals off for the whole thread: no bit changes, and its mode comes back."""
        run = _core.Run(full, threads=threads)
        one, two = (np.float32(1e-20) * np.arange(1, 4 * 160 + 1, dtype=np.float32).reshape(4, 160) for _ in range(2))
        feed = {("ffn_silu", 0): one, ("ffn_up", 0): two}
        wanted = run.replay([1] * 4, [("ffn_swigl", 0)], feed)["ffn_swigl", 0]
        assert ((wanted > 0) & (wanted < np.finfo(np.float32).tiny)).any()  # subnormal
        whole = run.replay(IDS, [LOGITS])[LOGITS]
        before = control.mode()
        for mode in (0x9FC0, 0x3F80, 0x7F80):  # flush to zero and denormals are zero; rounding down; rounding to zero
            control.mode_set(mode)
            try:
                mine, logits = run.replay([1] * 4, [("ffn_swigl", 0)], feed)["ffn_swigl", 0], run.replay(IDS, [LOGITS])[LOGITS]
                after = control.mode()
            finally:
                control.mode_set(before)
            equal(mine, wanted)
            equal(logits, whole)
            assert after & 0xFFC0 == mode & 0xFFC0
