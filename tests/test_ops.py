"""Floor 4: every operation, alone, against the arithmetic that cpu/cpu.h declares, on every CPU tier.

An operation is run by `Run.replay` with its inputs fed.  Dot products are emulated bit for bit: 16 lanes, a fused multiply-add each (built
here from float64 by rounding to odd), a fixed tree.  Everything else is declared to be rounded once, so it is held against the definition
in extended precision: half a unit in the last place, and 2^-20 of one for the float64 in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import write_folder
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from aprender import _core

Array = NDArray[np.float32]
Maker = Callable[..., _core.Model]
Edits = tuple[tuple[str, int | None, str, float], ...]

TIERS = [name for name, available in _core.TIERS if available]
TESTED: set[str] = set()  # operations that a test of this file has run, for the last test

#: No width is a multiple of the 16 lanes or of the 4 rows multiplied together; heads x head size is not the width; three heads share one.
ODD = tiny.Shape("qwen3", layers=2, dim=35, ffn=37, heads=6, kv_heads=2, head=10, vocab=41, attention_bias=True, eps=1e-3, theta=321.0)


# ---- the declared arithmetic -----------------------------------------------------------------------------------------


def fma(a: Array, b: Array, c: Array) -> Array:
    """round(a * b + c) in float32.

    The product of two float32 is exact in float64.  The sum with c is rounded there to odd (what it lost is known exactly), so that
    rounding it to float32, which has 29 bits less, is the only rounding.
    """
    with np.errstate(all="ignore"):
        p = a.astype(np.float64) * b.astype(np.float64)
        c = np.broadcast_to(c, p.shape).astype(np.float64)
        s = p + c
        t = s - p
        lost = (p - (s - t)) + (c - t)
        bits = s.view(np.int64)
        even = (lost != 0) & np.isfinite(s) & np.isfinite(lost) & (bits & 1 == 0)
        away = np.where((lost > 0) == (s > 0), 1, -1)
        return np.where(even, (bits + away).view(np.float64), s).astype(np.float32)


def tree(lanes: NDArray[Any]) -> NDArray[Any]:
    """Sum over the last axis of 16: l + (l+8), + (l+4), + (l+2), + (l+1)."""
    for half in (8, 4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
    return lanes[..., 0]


def dot(a: Array, b: Array) -> Array:
    """Sum over the last axis in 16 lanes; broadcasts."""
    n = a.shape[-1]
    lanes = np.zeros((*np.broadcast_shapes(a.shape[:-1], b.shape[:-1]), 16), np.float32)
    for i in range(0, n, 16):
        live = min(16, n - i)
        lanes[..., :live] = fma(a[..., i : i + live], b[..., i : i + live], lanes[..., :live])
    with np.errstate(all="ignore"):
        return tree(lanes)


def rounded_once(mine: Array, exact: NDArray[np.longdouble]) -> None:
    """Each value is the float32 nearest to the exact one, but for ties that the float64 in between cannot see."""
    with np.errstate(all="ignore"):
        nearest = exact.astype(np.float32)
        finite = np.isfinite(nearest) & np.isfinite(mine)
        np.testing.assert_array_equal(mine[~finite & ~np.isnan(nearest)], nearest[~finite & ~np.isnan(nearest)])
        np.testing.assert_array_equal(np.isnan(mine), np.isnan(nearest))
        unit = np.spacing(np.abs(nearest[finite])).astype(np.longdouble)
        error = np.abs(mine[finite].astype(np.longdouble) - exact[finite]) / unit
    assert error.max(initial=0) <= 0.5 + 2.0**-20, error.max()


def same_bits(mine: Array, wanted: Array) -> None:
    nan = np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(mine), nan)
    np.testing.assert_array_equal(mine.view(np.uint32)[~nan], np.ascontiguousarray(wanted).view(np.uint32)[~nan])


def wide(x: Array) -> NDArray[np.longdouble]:
    return x.astype(np.longdouble)


# ---- running one operation -------------------------------------------------------------------------------------------


def steps(model: _core.Model, tokens: int) -> dict[tuple[str, int | None], dict[str, Any]]:
    return {(step["stage"], step["layer"]): step for step in _core.Run(model).plan(tokens)}


def inputs_of(model: _core.Model, key: tuple[str, int | None], tokens: int) -> list[tuple[tuple[str, int | None], tuple[int, int]]]:
    """The stages that a step reads, and their (rows, columns)."""
    plan = _core.Run(model).plan(tokens)
    step = next(step for step in plan if (step["stage"], step["layer"]) == key)
    TESTED.add(step["op"])
    found = [plan[i] for i in dict.fromkeys((step["a"], step["b"])) if i >= 0]
    return [((source["stage"], source["layer"]), (source["rows"], source["cols"])) for source in found]


def replay(
    model: _core.Model, key: tuple[str, int | None], feed: Mapping[Any, Array], tokens: int, position: int = 0, edits: Edits = ()
) -> Array:
    """The stage on these inputs: the same bits on every tier and for 1 and 3 threads."""
    results = []
    for tier in TIERS:
        for threads in (1, 3):
            run = _core.Run(model, threads=threads, tier=tier, edits=edits)
            assert run.tier == tier
            if position:
                run.forward([0] * position)
            results.append(run.replay([1] * tokens, [key], dict(feed))[key])
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].view(np.uint32), other.view(np.uint32))
    return results[0]


def numbers(rows: int, cols: int, seed: int = 0, kind: str = "normal") -> Array:
    generator = np.random.default_rng([seed, rows, cols])
    x = generator.standard_normal((rows, cols)).astype(np.float32)
    if kind == "wild":  # magnitudes from subnormal to overflow, zeros of both signs: sums cancel, underflow and overflow
        with np.errstate(all="ignore"):
            x = (x * np.exp2(generator.integers(-148, 128, x.shape)).astype(np.float64)).astype(np.float32)
        x.flat[:: max(1, x.size // 7)] = -0.0
    if kind == "nan":
        x.flat[:: max(1, x.size // 3)] = np.nan
        x.flat[1 :: max(1, x.size // 3)] = np.inf
    return x


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> _core.Model:
    return _core.Model(_core.File(write_folder(tmp_path_factory.mktemp("odd"), ODD)))


KINDS = ("normal", "wild", "nan")


def with_op(name: str) -> list[tuple[str, int | None]]:
    return [(row[0], 1 if row[1] == "LAYER" else None) for row in _core.STAGES if row[2] == name]


# ---- the emulation itself --------------------------------------------------------------------------------------------


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3))
def test_fma_is_exact(values: list[float]) -> None:
    """Against rational arithmetic."""
    from fractions import Fraction

    a, b, c = (np.array([value], np.float32) for value in values)
    exact = Fraction(float(a[0])) * Fraction(float(b[0])) + Fraction(float(c[0]))
    mine = fma(a, b, c)[0]
    if not np.isfinite(mine):
        assert abs(exact) > Fraction(float(np.finfo(np.float32).max))
        return
    around = [mine, np.nextafter(mine, np.float32(np.inf)), np.nextafter(mine, np.float32(-np.inf))]
    distance = [abs(Fraction(float(value)) - exact) for value in around if np.isfinite(value)]
    assert distance[0] == min(distance)


def test_two_roundings_would_be_seen() -> None:
    """1 + 2^-12 squared, less 1: fused it keeps 2^-24, rounded twice it does not."""
    a = np.array([1 + 2**-12], np.float32)
    assert fma(a, a, np.array([-1], np.float32))[0] == np.float32(2**-11 + 2**-24)
    assert (a * a - np.float32(1))[0] != fma(a, a, np.array([-1], np.float32))[0]
    x, y = numbers(64, 480), numbers(64, 480, seed=1)
    assert (dot(x, y) != np.sum(x * y, axis=1, dtype=np.float32)).mean() > 0.5  # another order has other bits
    with pytest.raises(AssertionError):
        rounded_once(np.nextafter(x, np.float32(9)), wide(x))


# ---- MATMUL, BIAS ----------------------------------------------------------------------------------------------------


def matmul(model: _core.Model, key: tuple[str, int | None], x: Array) -> Array:
    """The declared product, with the bias added in float32 where the step has one."""
    parts = []
    for weight, bias, _ in steps(model, 1)[key]["weights"]:
        layer = key[1]
        y = dot(x[:, None, :], model.weight(weight, layer)[None, :, :])
        with np.errstate(all="ignore"):
            parts.append(y + model.weight(bias, layer) if bias else y)
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("key", with_op("MATMUL"), ids=lambda key: key[0])
@pytest.mark.parametrize("kind", KINDS)
def test_matmul(key: tuple[str, int | None], kind: str, odd: _core.Model) -> None:
    for tokens in (1, 5):
        [(source, shape)] = inputs_of(odd, key, tokens)
        x = numbers(*shape, kind=kind)
        same_bits(replay(odd, key, {source: x}, tokens), matmul(odd, key, x))


@pytest.mark.parametrize("formats", tiny.FORMATS)
def test_matmul_decodes_every_format(formats: str, tiny_model: Maker) -> None:
    """Rows of 64, 96 and 160 values; llama, so that the rows of q and k stand permuted in the file."""
    model = tiny_model(tiny.Shape("llama"), "gguf", formats)
    for key in with_op("MATMUL"):
        [(source, shape)] = inputs_of(model, key, 3)
        x = numbers(*shape)
        same_bits(replay(model, key, {source: x}, 3), matmul(model, key, x))


def test_matmul_decodes_k_quants(canary: _core.Model) -> None:
    """The canary's mix: Q4_K and Q6_K, by the last layer and the head."""
    formats = {info.format for info in canary.weights if info.layer in (None, 3)}
    assert {"Q4_K", "Q6_K"} <= formats
    for stage in ("qkv_matmul", "ffn_out", "lm_head"):
        key = (stage, None if stage == "lm_head" else 3)
        [(source, shape)] = inputs_of(canary, key, 2)
        x = numbers(*shape)
        same_bits(replay(canary, key, {source: x}, 2), matmul(canary, key, x))


def test_bias(odd: _core.Model) -> None:
    [key] = with_op("BIAS")
    for kind in KINDS:
        [(source, shape)] = inputs_of(odd, key, 4)
        x = numbers(*shape, kind=kind)
        bias = np.concatenate([odd.weight(name, 1) for _, name, _ in steps(odd, 1)[key]["weights"]])
        with np.errstate(all="ignore"):
            same_bits(replay(odd, key, {source: x}, 4), x + bias)


def test_nothing_reads_as_zero(odd: _core.Model) -> None:
    """Edits that take an input away: what is left is the bias, the other summand, or zero."""
    keys = {key[0]: key for op in ("MATMUL", "BIAS", "ADD", "MUL", "SILU") for key in with_op(op)}
    for stage, key in keys.items():
        sources = inputs_of(odd, key, 4)
        feed = {source: numbers(*shape, seed=i) for i, (source, shape) in enumerate(sources)}
        mine = replay(odd, key, feed, 4, edits=((stage, key[1], "a", -1),))
        biases = [odd.weight(name, key[1]) for _, name, _ in steps(odd, 1)[key]["weights"] if name] if stage == "qkv_bias" else []
        wanted = np.concatenate(biases) if biases else feed[sources[1][0]] if stage.endswith("residual") else np.float32(0)
        np.testing.assert_array_equal(mine, np.broadcast_to(wanted, mine.shape), err_msg=stage)


# ---- EMBED, RMSNORM --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formats", [*tiny.FORMATS, "canary"])
def test_embed(formats: str, tiny_model: Maker, canary: _core.Model) -> None:
    model = canary if formats == "canary" else tiny_model(tiny.Shape("llama"), "gguf", formats)
    inputs_of(model, ("embedding", None), 1)
    ids = [0, 3, 3, int(model.hparams["vocab"]) - 1]
    for tier in TIERS:
        mine = _core.Run(model, tier=tier).replay(ids, [("embedding", None)])["embedding", None]
        np.testing.assert_array_equal(mine, model.weight("token_embd")[ids])


def rms_norm(x: Array, weight: Array, eps: float) -> NDArray[np.longdouble]:
    with np.errstate(all="ignore"):
        return wide(x) / np.sqrt((wide(x) ** 2).mean(-1, keepdims=True) + np.longdouble(eps)) * wide(weight)


@pytest.mark.parametrize("key", with_op("RMSNORM"), ids=lambda key: key[0])
@pytest.mark.parametrize("kind", KINDS)
def test_rms_norm(key: tuple[str, int | None], kind: str, odd: _core.Model) -> None:
    """Over rows; q_norm and k_norm over each head of their part of the shared buffer."""
    [(source, shape)] = inputs_of(odd, key, 5)
    x = numbers(*shape, kind=kind)
    first = {"q_norm": 0, "k_norm": ODD.heads * ODD.head}.get(key[0])
    mine = replay(odd, key, {source: x}, 5)
    weight = odd.weight(steps(odd, 1)[key]["weights"][0][0], key[1])
    part = x if first is None else x[:, first : first + mine.shape[1]].reshape(-1, ODD.head)
    rounded_once(mine.reshape(part.shape), rms_norm(part, weight, float(np.float32(ODD.eps))))


def test_rms_norm_reads_its_eps(odd: _core.Model) -> None:
    [(source, shape)] = inputs_of(odd, ("attn_norm", 1), 2)
    x = numbers(*shape)
    mine = replay(odd, ("attn_norm", 1), {source: x}, 2, edits=(("attn_norm", 1, "eps", 0.25),))
    rounded_once(mine, rms_norm(x, odd.weight("attn_norm", 1), 0.25))
    zero = replay(odd, ("attn_norm", 1), {source: np.zeros(shape, np.float32)}, 2, edits=(("attn_norm", 1, "eps", 0.0),))
    assert np.isnan(zero).all()  # 0 / 0: said, not hidden


# ---- ROPE_TABLE, ROPE ------------------------------------------------------------------------------------------------


def angles(theta: float, head: int, positions: NDArray[np.int64]) -> Array:
    """The recipe of Hugging Face in float32: exponent, power, reciprocal and product are each rounded."""
    exponent = (np.arange(0, head, 2, dtype=np.float32) / np.float32(head)).astype(np.float32)
    power = (np.longdouble(theta) ** wide(exponent)).astype(np.float32)
    return positions.astype(np.float32)[:, None] * (np.float32(1) / power)[None]


@pytest.mark.parametrize(("theta", "head"), [(1e6, 24), (1e4, 128), (321.0, 10), (5e5, 2), (1.0, 6)])
def test_rope_table(theta: float, head: int, tmp_path: Path) -> None:
    """At small and large positions; at the largest the angle is 10^6 and its reduction must still be exact."""
    shape = tiny.Shape("llama", layers=1, dim=4, ffn=4, heads=1, kv_heads=1, head=head, theta=theta, vocab=4)
    model = _core.Model(_core.File(write_folder(tmp_path, shape)))
    inputs_of(model, ("rope_table", None), 1)
    for first in (0, 4000):
        run = _core.Run(model)
        for _ in range(0, first, 1000):
            run.forward([0] * 1000)
        mine = run.replay([0] * 97, [("rope_table", None)])["rope_table", None]
        angle = wide(angles(theta, head, np.arange(first, first + 97)))
        rounded_once(mine[:, : head // 2], np.cos(angle))
        rounded_once(mine[:, head // 2 :], np.sin(angle))


@pytest.mark.parametrize("pairing", [0, 1])
@pytest.mark.parametrize("key", with_op("ROPE"), ids=lambda key: key[0])
@pytest.mark.parametrize("kind", KINDS)
def test_rope(key: tuple[str, int | None], pairing: int, kind: str, odd: _core.Model) -> None:
    (source, shape), (table, table_shape) = inputs_of(odd, key, 5)
    x, angle = numbers(*shape, kind=kind), numbers(table_shape[0], ODD.head // 2, seed=1)
    t = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    mine = replay(odd, key, {source: x, table: t}, 5, edits=((key[0], key[1], "pairing", pairing),)).reshape(5, -1, ODD.head)
    half = ODD.head // 2
    a, b = (slice(0, half), slice(half, None)) if pairing == 0 else (slice(0, None, 2), slice(1, None, 2))
    x = x.reshape(5, -1, ODD.head)
    c, s = wide(t[:, None, :half]), wide(t[:, None, half:])
    with np.errstate(all="ignore"):
        rounded_once(mine[..., a], wide(x[..., a]) * c - wide(x[..., b]) * s)
        rounded_once(mine[..., b], wide(x[..., b]) * c + wide(x[..., a]) * s)


# ---- CACHE, SCORES, SOFTMAX, MIX -------------------------------------------------------------------------------------


def test_cache(odd: _core.Model) -> None:
    """What was there, then the new rows; v is a part of the shared buffer."""
    k = ODD.kv_heads * ODD.head
    for stage in ("k_cache", "v_cache"):
        before = _core.Run(odd).forward([0, 0, 0], [(stage, 1)])[stage, 1]
        [(source, shape)] = inputs_of(odd, (stage, 1), 2)
        x = numbers(*shape)
        mine = replay(odd, (stage, 1), {source: x}, 2, position=3)
        np.testing.assert_array_equal(mine[:3], before)
        np.testing.assert_array_equal(mine[3:], x[:, -k:])


def visible(tokens: int, position: int, mask_offset: int = 0, window: int = 0) -> NDArray[np.bool_]:
    """[T, J]: query at position p sees keys 0 .. p + mask_offset, and of those the last `window`."""
    last = position + np.arange(tokens)[:, None] + mask_offset
    key = np.arange(position + tokens)[None]
    seen = (key <= last) & (last < position + tokens)
    seen |= (last >= position + tokens) & (key >= 0)
    top = np.minimum(last, position + tokens - 1)
    return seen & (key > top - window) if window else seen


MASKS = [
    {},
    {"mask_offset": 1},
    {"mask_offset": -2},
    {"mask_offset": -99},
    {"mask_offset": 99},
    {"window": 1},
    {"window": 3},
    {"window": 99},
]
HEADS = [{}, {"kv_div": 1}, {"kv_div": 2}, {"kv_mod": 1}, {"kv_div": 1, "kv_mod": 2}, {"kv_div": 99}]


def as_edits(stage: str, fields: Mapping[str, float]) -> Edits:
    return tuple((stage, 1, name, value) for name, value in fields.items())


def kv_heads(fields: Mapping[str, int]) -> NDArray[np.int64]:
    """kv head of each head; three heads share one unless edited."""
    return np.arange(ODD.heads) // fields.get("kv_div", 3) % fields.get("kv_mod", 2)


@pytest.mark.parametrize("fields", [*MASKS, *HEADS[1:], {"scale": 2.5}], ids=str)
@pytest.mark.parametrize("position", [0, 30])
def test_scores(fields: dict[str, Any], position: int, odd: _core.Model) -> None:
    """f32(dot * scale) where the mask allows, 0 elsewhere."""
    tokens = 5
    keys = position + tokens
    key = ("attn_scores", 1)
    q, k = numbers(tokens, ODD.heads * ODD.head), numbers(keys, ODD.kv_heads * ODD.head, seed=1)
    assert [source for source, _ in inputs_of(odd, key, tokens)] == [("q_post_rope", 1), ("k_cache", 1)]
    mine = replay(odd, key, {("q_post_rope", 1): q, ("k_cache", 1): k}, tokens, position, as_edits("attn_scores", fields))
    heads = k.reshape(keys, -1, ODD.head)[:, kv_heads(fields)]
    product = dot(q.reshape(tokens, -1, ODD.head).transpose(1, 0, 2)[:, :, None], heads.transpose(1, 0, 2)[:, None])
    scale = fields.get("scale", 1 / np.sqrt(np.float64(ODD.head)))
    wanted = (product.astype(np.float64) * scale).astype(np.float32)
    mask = visible(tokens, position, fields.get("mask_offset", 0), fields.get("window", 0))
    same_bits(mine, np.where(mask, wanted, np.float32(0)))


@pytest.mark.parametrize("fields", MASKS, ids=str)
@pytest.mark.parametrize("position", [0, 30])
@pytest.mark.parametrize("kind", ["normal", "steep", "equal", "nan"])
def test_softmax(fields: dict[str, int], position: int, kind: str, odd: _core.Model) -> None:
    tokens = 5
    shape = (ODD.heads, tokens, position + tokens)
    x = numbers(shape[0] * shape[1], shape[2]).reshape(shape)
    if kind == "steep":
        x *= 300  # most underflow to 0, none is negative
    if kind == "equal":
        x[:] = -7e30
    if kind == "nan":
        x[1, 2, 0], x[2, :, 1], x[3, 4] = np.nan, np.inf, -np.inf
    assert [source for source, _ in inputs_of(odd, ("attn_softmax", 1), tokens)] == [("attn_scores", 1)]
    mine = replay(odd, ("attn_softmax", 1), {("attn_scores", 1): x}, tokens, position, as_edits("attn_softmax", fields))
    mask = np.broadcast_to(visible(tokens, position, fields.get("mask_offset", 0), fields.get("window", 0)), shape)
    with np.errstate(all="ignore"):
        masked = np.where(mask, wide(x), -np.inf)
        power = np.where(mask, np.exp(wide(x) - masked.max(-1, keepdims=True)), 0)
        wanted = np.where(mask, power / power.sum(-1, keepdims=True), 0)
    rounded_once(mine, wanted)
    assert not np.signbit(mine[~np.isnan(mine)]).any()


@pytest.mark.parametrize("fields", [*MASKS, *HEADS[1:]], ids=str)
@pytest.mark.parametrize("position", [0, 30])
def test_mix(fields: dict[str, int], position: int, odd: _core.Model) -> None:
    """Lane of a key is its number modulo 16, so the sum does not depend on how many keys came at once."""
    tokens = 5
    keys = position + tokens
    p, v = np.abs(numbers(ODD.heads * tokens, keys)).reshape(ODD.heads, tokens, keys), numbers(keys, ODD.kv_heads * ODD.head, seed=1)
    assert [source for source, _ in inputs_of(odd, ("attention", 1), tokens)] == [("attn_softmax", 1), ("v_cache", 1)]
    mine = replay(odd, ("attention", 1), {("attn_softmax", 1): p, ("v_cache", 1): v}, tokens, position, as_edits("attention", fields))
    mask = visible(tokens, position, fields.get("mask_offset", 0), fields.get("window", 0))
    heads = v.reshape(keys, -1, ODD.head)[:, kv_heads(fields)]
    lanes = np.zeros((tokens, ODD.heads, ODD.head, 16), np.float32)
    for j in range(keys):
        lane = lanes[..., j % 16]
        lane[mask[:, j]] = fma(p[:, :, j].T[:, :, None], heads[j][None], lane)[mask[:, j]]
    same_bits(mine, tree(lanes).reshape(tokens, -1))


# ---- ADD, MUL, SILU --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [*with_op("ADD"), *with_op("MUL")], ids=lambda key: key[0])
@pytest.mark.parametrize("kind", KINDS)
def test_add_and_mul(key: tuple[str, int | None], kind: str, odd: _core.Model) -> None:
    (one, shape), (two, _) = inputs_of(odd, key, 5)
    a, b = numbers(*shape, kind=kind), numbers(*shape, seed=1, kind=kind)
    with np.errstate(all="ignore"):
        wanted = a * b if key[0] == "ffn_swigl" else a + b
    same_bits(replay(odd, key, {one: a, two: b}, 5), wanted)


@pytest.mark.parametrize("kind", [*KINDS, "dense"])
def test_silu(kind: str, odd: _core.Model) -> None:
    [key] = with_op("SILU")
    [(source, shape)] = inputs_of(odd, key, 5)
    x = np.linspace(-120, 90, shape[0] * shape[1], dtype=np.float32).reshape(shape) if kind == "dense" else numbers(*shape, kind=kind)
    with np.errstate(all="ignore"):
        exact = wide(x) / (1 + np.exp(-wide(x)))
    rounded_once(replay(odd, key, {source: x}, 5), exact)


def test_tiers_agree_on_a_whole_run(canary: _core.Model) -> None:
    """Every stage of a real model, bit for bit; and an unknown tier is refused by name."""
    ids = [263, 374, 220, 17, 10, 17, 30]
    runs = [_core.Run(canary, tier=tier).forward(ids, "all") for tier in TIERS]
    for other in runs[1:]:
        for key, value in runs[0].items():
            np.testing.assert_array_equal(value.view(np.uint32), other[key].view(np.uint32), err_msg=str(key))
    with pytest.raises(LookupError, match="avx9"):
        _core.Run(canary, tier="avx9")


def test_every_operation_was_tested() -> None:
    """A new row of ops.def comes with its test.  (Alone, this test has nothing to look at.)"""
    if TESTED:
        assert {row[0] for row in _core.OPS} == TESTED
