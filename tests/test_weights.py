"""aprender.weights: what is the same is called the same, what rounding did is called rounding, and every planted fault has its name.

The files come from foreign writers (transformers' layout of safetensors, the gguf package, llama.cpp's encoders); each fault is planted
into one side, and the same comparison without it is fine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import llamacpp
import numpy as np
import pytest
import tiny
from conftest import CANARY, blob, write_folder
from numpy.typing import NDArray

from aprender import _core, weights
from aprender.judge import cells, tally, weighing

Array = NDArray[np.float32]
SMALL = [tiny.Shape(arch, layers=1, tied=tied) for arch in tiny.ARCHS for tied in (False, True)]
WIDE = tiny.Shape("qwen3", layers=1, dim=256, ffn=512, heads=4, kv_heads=2, head=64)
SQUARE = tiny.Shape("qwen2", layers=2, head=16)
UP = "model.layers.0.mlp.up_proj.weight"
BLOCKS = ["Q8_0", "Q4_0", "Q5_0", "Q4_1", "Q5_1", "Q4_K", "Q6_K", "Q5_K", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS", "MXFP4"]

Encode = Callable[[str, Array], tuple[str, Any]]


# ---- files -----------------------------------------------------------------------------------------------------------------------------


def folder(path: Path, shape: tiny.Shape, made: Mapping[str, Array], dtype: str = "F32", **more: Any) -> str:
    return str(write_folder(path, shape, {name: blob(array, dtype) for name, array in made.items()}, **more))


def by_package(kind: str) -> Encode:
    """Matrices as the gguf package writes them."""

    def encode(_: str, array: Array) -> tuple[str, Any]:
        wanted = kind if array.ndim == 2 else "F32"
        return wanted, gguf.quants.quantize(array, gguf.GGMLQuantizationType[wanted])

    return encode


def by_peer(kind: str, peer: llamacpp.Peer) -> Encode:
    """Matrices as llama.cpp writes them."""

    def encode(_: str, array: Array) -> tuple[str, Any]:
        if array.ndim != 2 or kind == "F16":
            return kind if array.ndim == 2 else "F32", array
        data = np.frombuffer(peer.quantize(kind, array), np.uint8)
        return kind, data.reshape(array.shape[0], -1)

    return encode


def gguf_file(path: Path, shape: tiny.Shape, made: Mapping[str, Array], encode: Encode, *, theta: float | None = None) -> str:
    """A GGUF with every tensor as `encode` wants it; its lanes are those of the architecture."""
    writer = gguf.GGUFWriter(path, shape.arch)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.dim)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_rope_freq_base(shape.theta if theta is None else theta)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(shape.vocab)
    for name, array in tiny.gguf_tensors(shape, 0, made).items():
        kind, data = encode(name, array)
        if kind in ("F32", "F16"):
            writer.add_tensor(name, np.ascontiguousarray(data, {"F32": np.float32, "F16": np.float16}[kind]))
        else:
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def rough(shape: tiny.Shape, seed: int = 0) -> dict[str, Array]:
    """The tiny weights, moved off every grid: float32 that nothing else holds exactly."""
    generator = np.random.default_rng(seed + 5)
    return {
        name: (array * (1 + 2e-3 * generator.standard_normal(array.shape))).astype(np.float32)
        for name, array in tiny.weights(shape, seed).items()
    }


def run(*words: str) -> int:
    return weights.main([*words])


def row_of(said: Mapping[str, Any], name: str) -> dict[str, Any]:
    (row,) = [row for row in said["tensors"] if name in (row["a"], row["b"])]
    return dict(row)


def wrong(said: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row for row in said["tensors"] if row["state"] not in weighing.EXPLAINED]


@pytest.fixture
def quant(tmp_path: Path, peer: llamacpp.Peer) -> Callable[[str], tuple[str, str]]:
    """quant(format): the wide model as a folder in float32 and as llama.cpp's GGUF of it."""
    return lambda kind: (
        folder(tmp_path / "f", WIDE, rough(WIDE)),
        gguf_file(tmp_path / f"{kind}.gguf", WIDE, rough(WIDE), by_peer(kind, peer)),
    )


# ---- the same --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_equal_values_across_containers(shape: tiny.Shape, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tiny.weights(shape)
    a, b = gguf_file(tmp_path / "a.gguf", shape, made, by_package("F16")), folder(tmp_path / "b", shape, made, dtype)
    assert run(a, b, "--exact", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["verdict"] == "agree"
    assert said["compared"] == len(made)
    assert set(said["states"]) <= {weighing.EQUAL, weighing.IDENTICAL}
    noted = [row["weight"] for row in said["tensors"] if any("interleaved" in note for note in row["notes"])]
    assert sorted(noted) == (["attn_k", "attn_q"] if shape.arch == "llama" else [])


def test_the_same_file_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = gguf_file(tmp_path / "a.gguf", SMALL[2], tiny.weights(SMALL[2]), by_package("Q8_0"))
    assert run(a, a, "--exact", "-q") == 0
    assert capsys.readouterr().out == f"All {len(tiny.weights(SMALL[2]))} tensors have identical values.\n"
    assert set(weights.compare(a, a)["states"]) == {weighing.IDENTICAL}


def test_the_canary() -> None:
    said = weights.compare(str(CANARY / "canary.gguf"), str(CANARY))
    assert said["verdict"] == "agree"
    matrices = [row for row in said["tensors"] if len(row["shape_a"]) == 2]
    assert {row["state"] for row in matrices} == {weighing.ROUNDED}
    assert {row["state"] for row in said["tensors"] if len(row["shape_a"]) == 1} == {weighing.EQUAL}
    assert all(0.5 < row["noise"] < 1.5 for row in matrices)
    assert said["hparams"] == said["only_a"] == said["only_b"] == []


# ---- re-quantised ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0", "BF16", "F16"])
def test_formats_of_the_gguf_package(shape: tiny.Shape, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = rough(shape)
    a, b = folder(tmp_path / "a", shape, made), gguf_file(tmp_path / "b.gguf", shape, made, by_package(kind))
    for words in ((a, b), (b, a)):
        said = weights.compare(*words)
        assert not wrong(said), sentence_of(said)
        assert said["states"] == {weighing.ROUNDED: sum(array.ndim == 2 for array in made.values())} | {
            weighing.IDENTICAL: sum(array.ndim == 1 for array in made.values())
        }
    assert run(a, b, "-q") == 0
    assert capsys.readouterr().out.startswith("Re-quantisation explains ")
    assert run(a, b, "--exact") == 1


@pytest.mark.foreign
@pytest.mark.parametrize("kind", ["F16", "BF16", *BLOCKS])
def test_formats_of_llamacpp(kind: str, quant: Callable[[str], tuple[str, str]]) -> None:
    """Every tensor, both ways; and against the half-precision halves of the same weights, where both are rounded."""
    a, b = quant(kind)
    for words in ((a, b), (b, a)):
        said = weights.compare(*words)
        assert said["verdict"] == "agree", sentence_of(said)
        assert said["states"][weighing.ROUNDED] == sum(array.ndim == 2 for array in rough(WIDE).values())


@pytest.mark.foreign
@pytest.mark.parametrize(
    "kinds", [("Q8_0", "Q4_K"), ("Q6_K", "Q4_0"), ("F16", "Q4_K"), ("BF16", "Q8_0"), ("F16", "BF16"), ("IQ4_XS", "Q2_K")]
)
def test_two_roundings_of_the_same(kinds: tuple[str, str], quant: Callable[[str], tuple[str, str]]) -> None:
    files = [quant(kind)[1] for kind in kinds]
    said = weights.compare(*files)
    assert said["verdict"] == "agree", sentence_of(said)


def sentence_of(said: Mapping[str, Any]) -> str:
    return weights.sentence(said)


def clipped(_: str, array: Array) -> tuple[str, Any]:
    """An encoder that gives up one value in 40 of a matrix to store the others better, as one with an importance matrix may."""
    if array.ndim != 2:
        return "F32", array
    data = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q4_0).reshape(-1, 18).copy()
    for block, values in zip(data[::4], array.reshape(-1, 32)[::4], strict=True):
        order = np.argsort(-np.abs(values))
        scale = np.float16(values[order[2]] / -8)  # the two largest do not fit any more
        codes = np.clip(np.round(values / np.float32(scale)) + 8, 0, 15).astype(np.uint8)
        block[:2] = np.frombuffer(scale.tobytes(), np.uint8)
        block[2:] = codes[:16] | codes[16:] << 4
    return "Q4_0", data.reshape(array.shape[0], -1)


def test_clipping_must_be_declared(tmp_path: Path) -> None:
    made = rough(SQUARE)
    a, b = folder(tmp_path / "a", SQUARE, made), gguf_file(tmp_path / "b.gguf", SQUARE, made, clipped)
    assert weights.compare(a, b)["verdict"] == "divergence"
    said = weights.compare(a, b, importance=True)
    assert said["verdict"] == "agree", sentence_of(said)
    assert any(row["loose"] for row in said["tensors"])


def test_truncation_is_no_rounding(tmp_path: Path) -> None:
    """BF16 made by cutting bits off is up to a whole step away, always towards zero."""
    made = rough(SQUARE)
    cut = {name: ("BF16", array.shape, (array.view(np.uint32) >> 16).astype(np.uint16).tobytes()) for name, array in made.items()}
    b = str(write_folder(tmp_path / "b", SQUARE, cut))
    assert len(wrong(weights.compare(folder(tmp_path / "a", SQUARE, made), b))) == len(made)


def test_too_small_for_half_is_rounding(tmp_path: Path) -> None:
    """Most BF16 numbers are halves too; those that are too small are rounded, and few of them is right."""
    made = {name: array.copy() for name, array in tiny.weights(SQUARE).items()}
    made[UP][::7, ::9] = tiny.exact(np.float64(made[UP][::7, ::9])) * np.float32(2**-20)
    a, b = folder(tmp_path / "a", SQUARE, made, "BF16"), gguf_file(tmp_path / "b.gguf", SQUARE, made, by_package("F16"))
    said = weights.compare(a, b)
    assert row_of(said, UP)["state"] == weighing.ROUNDED
    assert 0 < row_of(said, UP)["differing"] < made[UP].size / 40
    assert said["verdict"] == "agree"


# ---- one value -------------------------------------------------------------------------------------------------------------------------


def flip(path: str, name: str, byte: int, bit: int) -> None:
    """Flip a bit of a tensor in a file."""
    info = next(info for info in _core.File(path).tensors if info.name == name)
    with open(path, "r+b") as file:
        file.seek(info.offset + byte)
        old = file.read(1)[0]
        file.seek(info.offset + byte)
        file.write(bytes([old ^ 1 << bit]))


@pytest.mark.foreign
@pytest.mark.parametrize("bit", [1, 3, 5, 7])
def test_a_flipped_nibble_is_named(bit: int, quant: Callable[[str], tuple[str, str]], tmp_path: Path) -> None:
    """Where it is, the gguf package says: it decodes the tensor before and after."""
    a, b = quant("Q4_K")
    name, width = "blk.0.ffn_up.weight", 144
    before = _core.File(b).raw(name).copy().reshape(-1, width)
    flip(b, name, 37 * width + 16 + 77, bit)
    after = _core.File(b).raw(name).copy().reshape(-1, width)
    decoded = [gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q4_K).reshape(512, 256) for data in (before, after)]
    ((row, column),) = np.argwhere(decoded[0] != decoded[1])
    said = weights.compare(a, b)
    (bad,) = wrong(said)
    assert (bad["b"], bad["state"], bad["outside"]) == (name, weighing.DIFFERENT, 1)
    assert bad["first"]["row"] == row == 37
    assert (bad["first"]["column"], bad["first"]["block"], bad["first"]["element"]) == (column, 0, column)
    assert bad["first"]["b"] == decoded[1][row, column]
    assert bad["first"]["steps"] > 0.5
    assert f"row {row}, column {column} (block 0, element {column})" in weights.sentence(said)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("side", [0, 1])
def test_a_flipped_low_bit_is_named(dtype: str, side: int, tmp_path: Path) -> None:
    made = tiny.weights(SQUARE)
    files = [folder(tmp_path / "a", SQUARE, made, dtype), gguf_file(tmp_path / "b.gguf", SQUARE, made, by_package("F16"))]
    assert weights.compare(*files, exact=True)["verdict"] == "agree"
    flip(files[1], "blk.1.ffn_down.weight", 2 * (3 * 160 + 17), 0)
    said = weights.compare(*(files if side else files[::-1]))
    (bad,) = wrong(said)
    assert (bad["weight"], bad["layer"], bad["differing"]) == ("ffn_down", 1, 1)
    assert (bad["first"]["row"], bad["first"]["column"]) == (3, 17)


def test_a_flipped_low_bit_among_rounded_values_is_named(tmp_path: Path) -> None:
    """Every half is rounded here, and the one that is rounded wrongly is found."""
    made = rough(SQUARE)
    a, b = folder(tmp_path / "a", SQUARE, made), gguf_file(tmp_path / "b.gguf", SQUARE, made, by_package("F16"))
    assert weights.compare(a, b)["verdict"] == "agree"
    flip(b, "blk.1.ffn_down.weight", 2 * (3 * 160 + 17), 0)
    (bad,) = wrong(weights.compare(a, b))
    assert (bad["outside"], bad["first"]["row"], bad["first"]["column"]) == (1, 3, 17)


def codes(kind: str, data: NDArray[np.uint8], value: int, by: int) -> NDArray[np.uint8] | None:
    """The block with the code of one value moved by so many levels, found by trying; None at the ends."""
    form = cells.layout(kind)
    bits = np.flatnonzero(np.unpackbits(form.mask, bitorder="little"))
    base = np.unpackbits(data, bitorder="little")
    decode = lambda block: cells._decode(kind, np.packbits(block, bitorder="little")[None])[0]  # noqa: E731
    now = decode(base)
    own = [bit for bit in bits if np.flatnonzero(decode(base ^ (np.arange(base.size) == bit)) != now).tolist() == [value]]
    tried = []
    for code in range(1 << len(own)):
        block = base.copy()
        block[own] = [code >> place & 1 for place in range(len(own))]
        tried.append((float(decode(block)[value]), block))
    tried.sort(key=lambda pair: pair[0])
    levels = sorted({level for level, _ in tried})
    at = levels.index(float(now[value])) + by
    return np.packbits(next(block for level, block in tried if level == levels[at]), bitorder="little") if 0 <= at < len(levels) else None


@pytest.mark.foreign
@pytest.mark.parametrize("kind", BLOCKS)
def test_one_code_two_levels_off_is_caught_in_every_format(kind: str, peer: llamacpp.Peer) -> None:
    """A code that is one level off is caught nearly always (it may be a tie), one that is two off always."""
    generator = np.random.default_rng(3)
    x = (generator.standard_normal((40, 256)) * 0.05).astype(np.float32)
    data = np.frombuffer(peer.quantize(kind, x), np.uint8).copy()
    size, block = len(data) // (40 * 256 // (row := next(row for row in _core.FORMATS if row[0] == kind))[3]), row[3]
    whole = data.reshape(-1, size)
    caught: dict[int, list[bool]] = {1: [], 2: []}
    plain = cells.Tensor("F32", x.view(np.uint8).reshape(-1), x.shape)
    assert weighing.compare(plain, cells.Tensor(kind, data, x.shape)).state == weighing.ROUNDED
    for by in (1, 2):
        for at in generator.choice(len(whole), 12, replace=False):
            value = int(generator.integers(block))
            moved = codes(kind, whole[at], value, by)
            if moved is None:
                continue
            changed = whole.copy()
            changed[at] = moved
            found = weighing.compare(plain, cells.Tensor(kind, changed.reshape(-1), x.shape))
            caught[by].append(found.state == weighing.DIFFERENT and found.first == divmod(int(at) * block + value, 256))
    assert len(caught[2]) >= 3 or kind == "Q2_K"
    assert all(caught[2])
    assert np.mean(caught[1]) > 0.75


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["F16", "F32"])
def test_a_planted_nan_is_named(value: float, kind: str, tmp_path: Path) -> None:
    made = rough(SQUARE)
    files = [folder(tmp_path / "a", SQUARE, made)]
    made[UP] = made[UP].copy()
    made[UP][5, 6] = value
    files.append(gguf_file(tmp_path / "b.gguf", SQUARE, made, by_package(kind)))
    for a, b in (files, files[::-1]):
        said = weights.compare(a, b)
        (bad,) = wrong(said)
        assert (bad["weight"], bad["first"]["row"], bad["first"]["column"]) == ("ffn_up", 5, 6)
        assert bad["nan_a"] + bad["nan_b"] + bad["inf_a"] + bad["inf_b"] == 1
        assert "1 tensor with NaN or infinities" in weights.sentence(said)
    said = weights.compare(files[1], files[1])  # the same on both sides: equal, and still told
    assert said["verdict"] == "agree"
    assert "1 tensor with NaN or infinities" in weights.sentence(said)


def test_a_zero_of_another_sign_is_told(tmp_path: Path) -> None:
    made = {name: array.copy() for name, array in tiny.weights(SQUARE).items()}
    made[UP][2, 2] = 0
    a = folder(tmp_path / "a", SQUARE, made)
    made[UP][2, 2] = -0.0
    b = folder(tmp_path / "b", SQUARE, made)
    said = weights.compare(a, b)
    assert (said["verdict"], row_of(said, UP)["zero_signs"]) == ("agree", 1)
    assert weights.compare(a, b, exact=True)["verdict"] == "divergence"


# ---- whole tensors ---------------------------------------------------------------------------------------------------------------------

Q, GATE, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.down_proj.weight"


def transposed(made: dict[str, Array]) -> None:
    made[Q] = np.ascontiguousarray(made[Q].T)


def swapped(made: dict[str, Array]) -> None:
    made[UP], made[GATE] = made[GATE], made[UP]


def stale(made: dict[str, Array]) -> None:
    made[UP] = made[UP].copy()
    made[UP][9] = made[UP][31]


def scaled(made: dict[str, Array]) -> None:
    made[UP] = (made[UP] * np.float64(1.01)).astype(np.float32)


def negated(made: dict[str, Array]) -> None:
    made[UP] = -made[UP]


def heads_moved(made: dict[str, Array]) -> None:
    made[Q] = np.ascontiguousarray(made[Q].reshape(4, -1, made[Q].shape[1])[[2, 1, 0, 3]].reshape(made[Q].shape))


def interleaved(made: dict[str, Array]) -> None:
    made[Q] = tiny.permuted(made[Q], 4)


def columns_moved(made: dict[str, Array]) -> None:
    made[DOWN] = np.ascontiguousarray(made[DOWN][:, np.random.default_rng(1).permutation(made[DOWN].shape[1])])


FAULTS = {
    transposed: (weighing.TURNED, [Q]),
    swapped: (weighing.SWAPPED, [UP, GATE]),
    stale: (weighing.COPIED, [UP]),
    scaled: (weighing.SCALED, [UP]),
    negated: (weighing.SCALED, [UP]),
    heads_moved: (weighing.ROWS, [Q]),
    interleaved: (weighing.ROWS, [Q]),
    columns_moved: (weighing.COLUMNS, [DOWN]),
}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("turn", [False, True], ids=["", "swapped sides"])
def test_a_fault_has_its_name(fault: Callable[[dict[str, Array]], None], kind: str, turn: bool, tmp_path: Path) -> None:
    """Planted into the side that is rounded, or into the other one; what was not touched stays explained."""
    made, shape = rough(SQUARE), SQUARE
    a = folder(tmp_path / "a", shape, made)
    assert weights.compare(a, gguf_file(tmp_path / "good.gguf", shape, made, by_package(kind)))["verdict"] == "agree"
    fault(made)
    b = gguf_file(tmp_path / "b.gguf", shape, made, by_package(kind))
    said = weights.compare(b, a) if turn else weights.compare(a, b)
    state, names = FAULTS[fault]
    bad = wrong(said)
    assert {row["b" if not turn else "a"] for row in bad} == {tiny.gguf_name(name) for name in names}
    assert {row["state"] for row in bad} == {state}, sentence_of(said)
    assert said["verdict"] == "divergence"
    row = bad[0]
    if fault is scaled:
        assert row["alpha"] == pytest.approx(1 / 1.01 if turn else 1.01, rel=2e-4)
        assert turn or kind == "Q4_0" or row["alpha"] == 1.01
    if fault is negated:
        assert row["alpha"] == -1
    if fault is stale:
        assert row["text"].startswith("A's row 9 is B's row 31" if turn else "B's row 9 is A's row 31")
        assert row["first"]["row"] == 9
    if fault is heads_moved:
        assert "2 of 4 heads of 16 rows moved, B's 0 is A's 2" in row["text"]
    if fault is interleaved:
        assert "interleaving of halves in heads of 16 rows that nothing declares" in row["text"]
    if fault is swapped:
        other = {row["b"]: row["other"] for row in bad}
        gate, up = (tiny.gguf_name(name) if turn else name for name in (GATE, UP))
        assert sorted(other.values()) == sorted([gate, up])


@pytest.mark.parametrize("square", [False, True])
def test_a_transposed_matrix_is_proved_by_its_values(square: bool, tmp_path: Path) -> None:
    """A shape the other way round says nothing yet."""
    shape = SQUARE if square else tiny.Shape("qwen2", layers=1)
    made = tiny.weights(shape)
    a = folder(tmp_path / "a", shape, made)
    transposed(made)
    said = weights.compare(a, folder(tmp_path / "b", shape, made))
    assert row_of(said, Q)["state"] == weighing.TURNED
    made[Q] = np.ascontiguousarray(made[Q][::-1])
    said = weights.compare(a, folder(tmp_path / "c", shape, made))
    assert row_of(said, Q)["state"] == (weighing.DIFFERENT if square else weighing.SHAPE)


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_a_llama_gguf_whose_converter_forgot_the_permutation(kind: str, tmp_path: Path) -> None:
    shape = tiny.Shape("llama", layers=1)
    made = rough(shape)
    a = folder(tmp_path / "a", shape, made)
    k = Q.replace("q_proj", "k_proj")

    def forgot(name: str, array: Array) -> tuple[str, Any]:
        plain = {"blk.0.attn_q.weight": made[Q], "blk.0.attn_k.weight": made[k]}
        return by_package(kind)(name, plain.get(name, array))

    assert weights.compare(a, gguf_file(tmp_path / "good.gguf", shape, made, by_package(kind)))["verdict"] == "agree"
    said = weights.compare(a, gguf_file(tmp_path / "b.gguf", shape, made, forgot))
    assert {row["weight"]: row["state"] for row in wrong(said)} == {"attn_q": weighing.ROWS, "attn_k": weighing.ROWS}
    assert all("B lacks the interleaving of halves in heads of 24 rows that its container declares" in row["text"] for row in wrong(said))


def test_unrelated_models_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = folder(tmp_path / "a", SQUARE, tiny.weights(SQUARE, 1))
    for kind in ("F32", "Q4_0"):
        b = gguf_file(tmp_path / f"{kind}.gguf", SQUARE, tiny.weights(SQUARE, 2), by_package(kind))
        said = weights.compare(a, b)
        assert len(wrong(said)) == said["compared"]
        assert {row["state"] for row in wrong(said)} == {weighing.DIFFERENT}
        assert run(a, b, "-q") == 1
        assert re.match(r"\d+ of \d+ tensors differ, first model.embed_tokens.weight: different, ", capsys.readouterr().out)


# ---- what belongs together -------------------------------------------------------------------------------------------------------------


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    made = tiny.weights(SQUARE)
    a, b = folder(tmp_path / "a", SQUARE, made), folder(tmp_path / "b", SQUARE, {name: x for name, x in made.items() if name != UP})
    for words, side in (((a, b), "a"), ((b, a), "b")):
        said = weights.compare(*words)
        assert (said["verdict"], said[f"only_{side}"]) == ("divergence", [UP])
        assert f"but {UP} only in {side.upper()}" in weights.sentence(said)


def test_a_tied_head_is_paired_with_the_token_table(tmp_path: Path) -> None:
    """One file has the head as a copy, the other not at all."""
    tied, untied = tiny.Shape("qwen2", layers=1, tied=True), tiny.Shape("qwen2", layers=1)
    made = tiny.weights(tied)
    copied = made | {"lm_head.weight": made["model.embed_tokens.weight"]}
    a, b = folder(tmp_path / "a", tied, made), gguf_file(tmp_path / "b.gguf", untied, copied, by_package("F16"))
    for words in ((a, b), (b, a)):
        said = weights.compare(*words, exact=True)
        assert said["verdict"] == "agree", sentence_of(said)
        row = next(row for row in said["tensors"] if row["weight"] == "output")
        assert len(row["notes"]) == 1
        assert row["notes"][0].endswith("has no output, its token_embd takes the place")
    copied["lm_head.weight"] = copied["lm_head.weight"][::-1].copy()
    said = weights.compare(a, gguf_file(tmp_path / "c.gguf", untied, copied, by_package("F16")))
    assert [row["weight"] for row in wrong(said)] == ["output"]


def test_files_that_do_not_bind_are_compared_by_equal_names(tmp_path: Path) -> None:
    """Names that no table has, and no configuration at all."""
    generator = np.random.default_rng(0)
    made = {name: generator.standard_normal((8, 32)).astype(np.float32) for name in ("experts.0.weight", "gamma")}
    made["conv"] = generator.standard_normal((3, 4, 32)).astype(np.float32)
    from conftest import safetensors_bytes

    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes({name: blob(array, "F32") for name, array in made.items()}))
    made["conv"] = made["conv"].copy()
    made["conv"][2, 1, 7] += 1
    (tmp_path / "b.safetensors").write_bytes(safetensors_bytes({name: blob(array, "F32") for name, array in made.items()}))
    a, b = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    assert weights.compare(a, a)["verdict"] == "agree"
    said = weights.compare(a, b)
    (bad,) = wrong(said)
    assert (bad["a"], bad["first"]["row"], bad["first"]["column"]) == ("conv", 2 * 4 + 1, 7)
    assert said["a"]["unbound"]


def test_nothing_in_common_is_not_comparable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from conftest import safetensors_bytes

    for name in "ab":
        (tmp_path / f"{name}.safetensors").write_bytes(safetensors_bytes({name: blob(np.ones((2, 2), np.float32))}))
    assert run(str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")) == 3
    assert "no tensor in common" in capsys.readouterr().err


def test_hyperparameters_are_compared(tmp_path: Path) -> None:
    made = tiny.weights(SQUARE)
    a = folder(tmp_path / "a", SQUARE, made)
    b = gguf_file(tmp_path / "b.gguf", SQUARE, made, by_package("F32"), theta=10000.0)
    said = weights.compare(a, b)
    assert not wrong(said)
    assert said["verdict"] == "divergence"
    assert said["hparams"] == [{"field": "theta", "a": 1e6, "b": 1e4}]
    assert "but theta 1,000,000 against 10,000" in weights.sentence(said)
    assert weights.compare(a, gguf_file(tmp_path / "c.gguf", SQUARE, made, by_package("F32")))["verdict"] == "agree"


def test_a_format_without_a_decoder_is_compared_by_bytes() -> None:
    """None is without today: one is made so."""
    data = [np.array(values, np.uint8) for values in ((1, 2), (1, 3))]
    a, b = (cells.Tensor("U8", one, (2,)) for one in data)
    a.readable = b.readable = False
    assert weighing.compare(a, a).state == weighing.IDENTICAL
    found = weighing.compare(a, b)
    assert (found.state, found.text) == (weighing.UNREAD, "U8 cannot be read, and the bytes are not equal")


# ---- the command -----------------------------------------------------------------------------------------------------------------------


def test_filter_json_and_jsonl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = rough(SQUARE)
    a = folder(tmp_path / "a", SQUARE, made)
    scaled(made)
    b = gguf_file(tmp_path / "b.gguf", SQUARE, made, by_package("Q8_0"))
    assert run(a, b, "--filter", "*attn_q*", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["schema"] == "aprender.weights/1"
    assert {row["weight"] for row in said["tensors"]} == {"attn_q", "attn_q_bias"}
    assert run(a, b, "--filter", "ffn_up", "--jsonl") == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["layer"], row["state"]) for row in lines] == [(0, weighing.SCALED), (1, weighing.ROUNDED)]
    assert run(a, b, "--filter", "nothing") == 3
    assert "matches 'nothing'" in capsys.readouterr().err
    assert run(a) == 2


def test_the_report_leads_with_its_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = rough(SQUARE)
    a = folder(tmp_path / "a", SQUARE, made)
    swapped(made)
    b = gguf_file(tmp_path / "b.gguf", SQUARE, made, by_package("F32"))
    assert run(a, b) == 1
    out = capsys.readouterr().out
    assert out.startswith(
        "2 of 27 tensors differ, first model.layers.0.mlp.gate_proj.weight: swapped, B's is A's model.layers.0.mlp.up_proj"
    )
    assert "0.ffn_gate" in out
    assert "1.ffn_gate" not in out
    assert run(a, b, "-v") == 1
    assert "1.ffn_gate" in capsys.readouterr().out


def test_memory_is_that_of_pieces() -> None:
    """Nothing of the size of a tensor is made: both sides are decoded in pieces of rows."""
    import tracemalloc

    rows = 40 * tally.PIECE // 512
    data = np.zeros(rows * 512 * 2, np.uint8)
    tensor, other = cells.Tensor("F16", data, (rows, 512)), cells.Tensor("BF16", data.copy(), (rows, 512))
    tracemalloc.start()
    try:
        assert weighing.compare(tensor, other).state == weighing.EQUAL
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < rows * 512 * 4


# ---- the parts -------------------------------------------------------------------------------------------------------------------------


BLOCKED = [row for row in _core.FORMATS if row[3] > 1]
CODEBOOKS = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0"}  # several values share a code


@pytest.mark.parametrize("row", BLOCKED, ids=lambda row: row[0])
def test_layouts_are_found(row: tuple[Any, ...]) -> None:
    """Every format with blocks has its code bits found, all in all as many as its name says; or it is one of a codebook."""
    assert cells.separable(row[0]) == (row[0] not in CODEBOOKS)
    if row[0] in CODEBOOKS:
        return
    form = cells.layout(row[0])
    width = 4 if row[0] in ("NVFP4", "MXFP4") else int(re.search(r"\d", row[0])[0])  # type: ignore[index]
    assert int(np.unpackbits(form.mask).sum()) == row[3] * width
    assert form.levels[0] == 0
    assert form.levels[-1] == 1
    assert form.levels.size == (1 << width) - (row[0] in ("MXFP4", "NVFP4"))  # 0 and -0
    assert form.shifted == (row[0] in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"))


def test_a_codebook_is_compared_and_never_explained() -> None:
    data = np.random.default_rng(0).integers(0, 256, 66 * 4, np.uint8)
    data.reshape(4, 66)[:, :2] = np.float16(0.1).reshape(1).view(np.uint8)
    a = cells.Tensor("IQ2_XXS", data, (4, 256))
    values = a.values(slice(0, 4))
    same = cells.Tensor("F32", np.ascontiguousarray(values).view(np.uint8).reshape(-1), (4, 256))
    assert weighing.compare(a, same).state == weighing.EQUAL
    moved = values.copy()
    moved[2, 7] *= 1.5
    other = weighing.compare(a, cells.Tensor("F32", moved.view(np.uint8).reshape(-1), (4, 256)))
    assert other.state == weighing.DIFFERENT
    assert "codebook" in other.text


def test_the_cell_of_a_half_is_half_a_step() -> None:
    values = np.array([1.0, 1.5, 2.0, 65504.0, 6e-8], np.float16)
    cell = cells.Tensor("F16", values.view(np.uint8), (5,)).cells(slice(0, 5))
    ulp = 2.0**-10
    np.testing.assert_array_equal(cell.lower[:3, 0], [1 - ulp / 4, 1.5 - ulp / 2, 2 - ulp / 2])
    np.testing.assert_array_equal(cell.upper[:, 0], [1 + ulp / 2, 1.5 + ulp / 2, 2 + ulp, 65520, 2.0**-24 + 2.0**-25])


def apr_q4(values: Array) -> NDArray[np.uint8]:
    """APR's own nibbles: blocks of 32 run on over the ends of rows, the last one is filled with zeros."""
    flat = np.pad(values.reshape(-1), (0, -values.size % 32)).reshape(-1, 32)
    scale = (np.abs(flat).max(1) / 7).astype(np.float16)
    nibbles = (np.clip(np.round(flat / scale.astype(np.float32)[:, None]), -8, 7) + 8).astype(np.uint8)
    return np.concatenate([scale.view(np.uint8).reshape(-1, 2), nibbles[:, ::2] | nibbles[:, 1::2] << 4], axis=1)


def q8_0(values: Array) -> NDArray[np.uint8]:
    """Rows that end inside a block, filled with zeros."""
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % 32)))
    return gguf.quants.quantize(padded, gguf.GGMLQuantizationType.Q8_0).reshape(-1, 34)


@pytest.mark.parametrize(("kind", "encode"), [("APR_Q4", apr_q4), ("Q8_0", q8_0)])
def test_blocks_that_do_not_fit_the_rows(kind: str, encode: Callable[[Array], NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tally, weighing):
        monkeypatch.setattr(module, "PIECE", 90)  # two rows at once
    x = np.random.default_rng(0).standard_normal((7, 45)).astype(np.float32)
    data, plain = encode(x), cells.Tensor("F32", x.view(np.uint8).reshape(-1), x.shape)
    found = weighing.compare(plain, cells.Tensor(kind, data.reshape(-1), x.shape))
    assert found.state == weighing.ROUNDED
    data[3 if kind == "APR_Q4" else 5, 9] ^= 0x60  # rows 2 or 2 again: 3 * 32 + 14, and row 2, column 32 + 7
    found = weighing.compare(plain, cells.Tensor(kind, data.reshape(-1), x.shape))
    assert (found.state, found.count, found.first) == (weighing.DIFFERENT, 1, divmod(3 * 32 + 15, 45) if kind == "APR_Q4" else (2, 39))
    order = np.array([0, 1, 4, 3, 2, 5, 6])
    found = weighing.compare(plain, cells.Tensor(kind, encode(x[order]).reshape(-1), x.shape))
    assert (found.state, found.count) == (weighing.ROWS, 2)


def test_an_error_that_follows_its_neighbours_is_no_rounding() -> None:
    """Each value within half a step, and yet all of them moved towards the next one."""
    generator = np.random.default_rng(0)
    step = 2.0**-7
    b = generator.integers(-100, 100, (64, 512)) * step
    for kind, follow in (("noise", False), ("followed", True)):
        moved = np.sign(np.roll(b, -1, 1)) if follow else generator.choice([-1, 1], b.shape)
        a = (b + moved * step * 0.3).astype(np.float32)
        scale = np.array([step], np.float32).view(np.uint8)
        tensor = cells.Tensor("APR_Q8", np.append(scale, np.round(b / step).astype(np.int8).view(np.uint8).reshape(-1)), b.shape)
        found = weighing.compare(cells.Tensor("F32", a.view(np.uint8).reshape(-1), a.shape), tensor)
        assert found.state == (weighing.DIFFERENT if follow else weighing.ROUNDED), kind
