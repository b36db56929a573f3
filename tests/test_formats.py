"""Floor 1: every readable format means what the gguf package and ggml say it means, bit for bit.

The bytes are random, so every quant, sub-scale and high bit takes every value and no two sub-blocks agree; the half scales also take each
special value.  Two foreign readers are asked: ``gguf.quants`` (NumPy) and ggml's ``to_float`` in the prebuilt llama.cpp.  Where one of them
has no answer, `BY_HAND` says in NumPy what the format means.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import gguf
import llamacpp
import numpy as np
import pytest
from numpy.typing import NDArray

from aprender import _core
from aprender.errors import UnknownName

ROOT = Path(__file__).resolve().parent.parent
READABLE = [row for row in _core.FORMATS if row[5]]
BLOCKWISE = [row for row in READABLE if row[7] != "WHOLE"]  # the others are read as whole tensors only: tests of their own below
BLOCKS = 256
Row: TypeAlias = tuple[str, int, str, int, int, bool, int, str, bool]

#: Which formats each foreign reader decodes.
GGUF_READS = [
    row for row in READABLE if row[0] in ("F32", "F16") or gguf.GGMLQuantizationType.__members__.get(row[0]) in gguf.quants._type_traits
]
GGML_READS = [row for row in READABLE if row[0] in llamacpp.FORMATS]

#: Byte offsets of the half scales in a block, from the struct definitions in ggml-common.h.
SCALES = {
    "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,),
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q8_1": (0,), "Q2_K": (80, 82), "Q3_K": (108,), "Q5_K": (0, 2),
    "IQ4_NL": (0,), "IQ4_XS": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,),
    "TQ1_0": (52,), "TQ2_0": (64,), "Q1_0": (0,), "Q2_0": (0,), "APR_Q4": (0,),
}  # fmt: skip

#: Zero, -0, the smallest and largest subnormal, the smallest and largest normal, one, minus a third, +-Inf, a quiet and a signalling NaN.
SPECIAL = np.array([0, 0x8000, 1, 0x03FF, 0x0400, 0x7BFF, 0x3C00, 0xB555, 0x7C00, 0xFC00, 0x7E00, 0xFE01], np.uint16)

#: The same for the one float32 scale, Q8_K's.
SPECIAL32 = np.array([0, 1 << 31, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x3F800000, 0xBEAAAAAB, 0x7F800000, 0xFF800000, 0x7FC00000], np.uint32)

#: Sub-scales that hide nothing, for `test_every_bit_matters`: none of them is zero.
PLAIN_SUBSCALES = {
    "Q4_K": (slice(4, 16), [0x15] * 8 + [0x55] * 4),
    "Q5_K": (slice(4, 16), [0x15] * 8 + [0x55] * 4),
    "Q2_K": (slice(0, 16), [0x35] * 16),
    "Q3_K": (slice(96, 108), [0x55] * 12),
    "IQ4_XS": (slice(2, 8), [0x55] * 6),
}

#: Formats whose scale can be infinite or NaN; APR_Q4 reads such a one, and a subnormal one, as zero.
SPECIAL_SCALES = {*SCALES, "IQ1_M"} - {"APR_Q4"}

#: Bits that no value depends on, [bytes, bits]: sums over the quants, kept for dot products; the sign of a scale that has none.
UNUSED: dict[str, list[tuple[slice, slice]]] = {
    "Q8_1": [(slice(2, 4), slice(None))],
    "Q8_K": [(slice(260, 292), slice(None))],
    "NVFP4": [(slice(0, 4), slice(7, 8))],
}


def half(data: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def bits(data: NDArray[np.uint8], width: int) -> NDArray[np.float32]:
    """The unsigned numbers of `width` bits in each row of bytes, lowest first."""
    count = 8 // width
    numbers = data[:, :, None] >> width * np.arange(count) & (1 << width) - 1
    return numbers.reshape(len(data), -1).astype(np.float32)


def normal_half(data: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The halves, zero where they are subnormal or not finite."""
    value = half(data)
    return np.where(np.isfinite(value) & (np.abs(value) >= 2.0**-14), value, np.float32(0))


def torch_reads(data: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    torch = pytest.importorskip("torch")
    return torch.from_numpy(data.copy()).view(getattr(torch, dtype)).float().numpy()


#: What the gguf package cannot decode: blocks [n, bytes] to values [n, block].
BY_HAND: dict[str, Callable[[NDArray[np.uint8]], NDArray[np.float32]]] = {
    "Q8_1": lambda data: half(data[:, :2]) * data[:, 4:].view(np.int8).astype(np.float32),
    "F64": lambda data: data.view("<f8").astype(np.float32),
    "I8": lambda data: data.view("<i1").astype(np.float32),
    "I16": lambda data: data.view("<i2").astype(np.float32),
    "I32": lambda data: data.view("<i4").astype(np.float32),
    "I64": lambda data: data.view("<i8").astype(np.float32),
    "U8": lambda data: data.astype(np.float32),
    "U16": lambda data: data.view("<u2").astype(np.float32),
    "U32": lambda data: data.view("<u4").astype(np.float32),
    "U64": lambda data: data.view("<u8").astype(np.float32),
    "BOOL": lambda data: (data != 0).astype(np.float32),
    "F8_E4M3": lambda data: torch_reads(data, "float8_e4m3fn"),
    "F8_E5M2": lambda data: torch_reads(data, "float8_e5m2"),
    "F8_E8M0": lambda data: torch_reads(data, "float8_e8m0fnu"),
    "Q1_0": lambda data: half(data[:, :2]) * (bits(data[:, 2:], 1) * 2 - 1),
    "Q2_0": lambda data: half(data[:, :2]) * (bits(data[:, 2:], 2) - 1),
    "APR_Q4": lambda data: normal_half(data[:, :2]) * (bits(data[:, 2:], 4) - 8),
    "Q8_K": lambda data: np.ascontiguousarray(data[:, :4]).view("<f4") * data[:, 4:260].view(np.int8).astype(np.float32),
}


def blocks(row: Row, seed: int = 0) -> NDArray[np.uint8]:
    """[BLOCKS, bytes of a block]: random, the first ones with special scales in every combination that fits."""
    name, _, _, _, size, *_ = row
    generator = np.random.default_rng([seed, *name.encode()])
    made = generator.integers(0, 256, (BLOCKS, size), np.uint8)
    for i, offset in enumerate(SCALES.get(name, ())):
        ordinary = generator.normal(0, 0.1, BLOCKS).astype(np.float16).view(np.uint16)
        values = np.resize(np.repeat(SPECIAL, len(SPECIAL) ** i), BLOCKS)  # the second scale changes once per round of the first
        scale = np.where(np.arange(BLOCKS) < len(SPECIAL) ** len(SCALES[name]), values, ordinary).astype("<u2")
        made[:, offset : offset + 2] = scale.view(np.uint8).reshape(-1, 2)
    if name == "Q8_K":
        made[: len(SPECIAL32), :4] = SPECIAL32.astype("<u4").view(np.uint8).reshape(-1, 4)
    if name == "F64":
        ordinary = np.concatenate([generator.normal(0, 0.1, BLOCKS - 8), [0, -0.0, 1e-45, 1e-46, 1 + 2**-24, -1e39, np.inf, np.nan]])
        made[:] = ordinary.astype("<f8").view(np.uint8).reshape(-1, 8)
    if name == "IQ1_M":  # the half lies in the upper nibbles of four 16-bit numbers, its lowest one first
        ordinary = generator.normal(0, 0.1, BLOCKS).astype(np.float16).view(np.uint16)
        ordinary[: len(SPECIAL)] = SPECIAL
        made[:, 49::2] = made[:, 49::2] & 15 | (ordinary[:, None] >> np.array([0, 4, 8, 12]) & 15) << 4
    if name in ("I64", "U64"):  # where float32 rounds: half way between two of its numbers, and the largest there is
        made[:4] = (
            np.array([(1 << 24) + 1, (1 << 60) + (1 << 36), (1 << 60) + (1 << 36) + 1, (1 << 63) - 1], "<u8").view(np.uint8).reshape(-1, 8)
        )
    if name in ("I8", "U8", "BOOL", "MXFP4") or name.startswith("F8_"):  # every number, every power of two
        made[:, 0] = np.arange(BLOCKS)
    if name == "NVFP4":  # every scale
        made[:, :4] = np.arange(BLOCKS)[:, None] + np.array([0, 1, 2, 128])
    return made


def one_tensor(path: Path, kind: int, values: int, data: bytes) -> _core.File:
    """A GGUF of a single one-dimensional tensor, written by hand."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, values, kind, 0)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return _core.File(path)


def ours(row: Row, data: NDArray[np.uint8], folder: Path) -> NDArray[np.float32]:
    """By itself and, where GGUF has the format, as a tensor of a file: the same bits."""
    name, kind, _, block, size, *_ = row
    values = _core.dequantize(name, data, (data.size // size * block,))
    if kind >= 0:
        stored = one_tensor(folder / "t.gguf", kind, values.size, data.tobytes()).dequantize("t")
        np.testing.assert_array_equal(stored.view(np.uint32), values.view(np.uint32))
    return values


def same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> None:
    """Equal bit for bit, but that any NaN equals any NaN: which payload a product of NaNs has is the processor's choice."""
    assert a.shape == b.shape
    nan = np.isnan(a)
    np.testing.assert_array_equal(nan, np.isnan(b))
    np.testing.assert_array_equal(a.view(np.uint32)[~nan], b.view(np.uint32)[~nan])


def ids(row: Row) -> str:
    return row[0]


def test_every_readable_format_is_held_against_somebody() -> None:
    """A new row of formats.def needs a second reader, or a line in `BY_HAND`."""
    assert {row[0] for row in BLOCKWISE} == {row[0] for row in (*GGUF_READS, *GGML_READS)} | set(BY_HAND)
    assert not {row[0] for row in GGUF_READS} & set(BY_HAND)


@pytest.mark.parametrize("row", BLOCKWISE, ids=ids)
def test_against_numpy(row: Row, tmp_path: Path) -> None:
    """The gguf package's or, for eight-bit floats, torch's, where they have the format."""
    data = blocks(row)
    with np.errstate(all="ignore"):
        if row[0] in BY_HAND:
            theirs = BY_HAND[row[0]](data).reshape(-1)
        else:
            theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[row[0]]).reshape(-1)
    mine = ours(row, data, tmp_path)
    same_bits(mine, np.ascontiguousarray(theirs, np.float32))
    assert row[0] == "BOOL" or np.unique(mine[~np.isnan(mine)]).size > BLOCKS * 3 // 4  # the bytes did say something
    assert row[0] not in SPECIAL_SCALES or (np.isnan(mine).any() and np.isinf(mine).any())
    if row[3] == 256:  # all sub-blocks distinct: a group read from its neighbour's place, or under its neighbour's scale, shows
        groups = mine.reshape(BLOCKS, 16, 16)[-1]
        assert np.isfinite(groups).all()
        assert np.unique(groups, axis=0).shape[0] == 16


@pytest.mark.foreign
@pytest.mark.parametrize("row", GGML_READS, ids=ids)
def test_against_ggml(row: Row, tmp_path: Path, peer: llamacpp.Peer) -> None:
    data = blocks(row, seed=1)
    theirs = peer.dequantize(row[0], data.tobytes(), data.size // row[4] * row[3])
    same_bits(ours(row, data, tmp_path), theirs)


TIERS = [name for name, available in _core.TIERS if available]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("row", READABLE, ids=ids)
def test_every_tier_has_the_same_bits(row: Row, tier: str) -> None:
    """Against the plain reference: rows of whole blocks, rows that begin or end inside one, special scales, NaNs with their payloads."""
    name, _, _, block, _, _, _, packing, _ = row
    data = np.concatenate([blocks(row, seed) for seed in range(4)])
    if packing == "WHOLE":
        data = np.concatenate([np.array([0.37], np.float32).view(np.uint8), data.reshape(-1)])
    count = 4 * BLOCKS * block
    shapes = [(count,), (8, count // 8)]
    if packing == "FLAT":
        shapes += [(217, 151)]  # one less than count, and rows that begin anywhere in a block
    elif block > 1:
        shapes += [(count // block, block - 1), (4 * BLOCKS, block - 7), (2 * BLOCKS, 2 * block - 9)]
    else:
        shapes += [(1, count), (count // 4, 4), (count // 32, 32)]
    for shape in shapes:
        plain = _core.dequantize(name, data, shape)
        np.testing.assert_array_equal(_core.dequantize(name, data, shape, tier=tier).view(np.uint32), plain.view(np.uint32))


def test_an_unknown_tier_is_refused() -> None:
    with pytest.raises(UnknownName, match="no CPU tier"):
        _core.dequantize("F32", bytes(4), (1,), tier="abacus")


def test_a_wrong_bit_would_be_seen() -> None:
    a = np.array([1.0, np.nan, 0.0], np.float32)
    same_bits(a, a.copy())
    same_bits(a, np.array([1.0, -np.nan, 0.0], np.float32))
    for other in ([1.0, np.nan, -0.0], [1.0, 2.0, 0.0], [np.nextafter(np.float32(1), np.float32(2)), np.nan, 0.0]):
        with pytest.raises(AssertionError):
            same_bits(a, np.array(other, np.float32))


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_half(name: str, tmp_path: Path) -> None:
    """All 65536 patterns; a NaN stays one and keeps its payload, quieted in F16 as F16C does."""
    row = next(row for row in READABLE if row[0] == name)
    every = np.arange(1 << 16, dtype=np.uint16)
    mine = ours(row, every.view(np.uint8).reshape(-1, 2), tmp_path)
    if name == "BF16":
        expected = every.astype(np.uint32) << 16
    else:
        expected = every.view(np.float16).astype(np.float32).view(np.uint32)
        nan = np.isnan(every.view(np.float16))
        expected[nan] = ((every[nan] & 0x8000).astype(np.uint32) << 16) | 0x7FC00000 | ((every[nan] & 0x3FF).astype(np.uint32) << 13)
    np.testing.assert_array_equal(mine.view(np.uint32), expected)


def test_f32_keeps_every_pattern(tmp_path: Path) -> None:
    """Signalling NaNs too: the bytes are copied, not converted."""
    row = next(row for row in READABLE if row[0] == "F32")
    bits = np.concatenate([np.random.default_rng(0).integers(0, 1 << 32, 4096, np.uint32), np.array([0x7F800001, 0xFF812345], np.uint32)])
    mine = ours(row, bits.view(np.uint8).reshape(-1, 4), tmp_path)
    np.testing.assert_array_equal(mine.view(np.uint32), bits)


#: TQ1_0 is left out: 256 bytes mean 243 things there.
@pytest.mark.parametrize("row", [row for row in BLOCKWISE if row[3] > 1 and row[0] != "TQ1_0"], ids=ids)
def test_every_bit_matters(row: Row, tmp_path: Path) -> None:
    """Flipping any single bit of a block changes some value, or is in a sum that no value needs: no field is read from the wrong place."""
    name, _, _, block, size, *_ = row
    base = np.random.default_rng(2).integers(1, 256, size, np.uint8)
    for offset in SCALES.get(name, ()):
        base[offset : offset + 2] = np.array([0.37], np.float16).view(np.uint8)
    if name in PLAIN_SUBSCALES:
        where, plain = PLAIN_SUBSCALES[name]
        base[where] = plain
    if name == "Q8_K":
        base[:4] = np.array([0.37], np.float32).view(np.uint8)
    if name in ("MXFP4", "NVFP4"):
        base[:] = 0x75  # a nibble of 0 or 8 would hide its sign: both are zero
    if name == "NVFP4":
        base[:4] = 0x35  # no bit away from 0x7F, which is zero
    if name == "IQ1_M":
        base[49::2] = base[49::2] & 15 | np.array([0xC, 0xE, 0x5, 0x3], np.uint8) << 4
    flipped = base[None] ^ np.packbits(np.eye(size * 8, dtype=np.uint8), axis=1, bitorder="little")
    values = ours(row, np.concatenate([base[None], flipped]), tmp_path).reshape(-1, block)
    changed = (values[1:].view(np.uint32) != values[:1].view(np.uint32)).any(1)
    needed = np.ones((size, 8), bool)
    for unused in UNUSED.get(name, []):
        needed[unused] = False
    np.testing.assert_array_equal(changed.reshape(size, 8), needed)


def test_every_known_format_is_sized_as_ggml_sizes_it() -> None:
    """The formats that are only listed too: a wrong size would put every later tensor in the wrong place."""
    for name, kind, _, block, size, *_ in _core.FORMATS:
        if kind >= 0 and name in gguf.GGMLQuantizationType.__members__:
            known = gguf.GGMLQuantizationType[name]
            sizes = gguf.GGML_QUANT_SIZES[known] if name != "Q8_1" else (32, 2 + 2 + 32)  # gguf says 40; ggml-common.h has two halves
            assert (known.value, *sizes) == (kind, block, size), name
    listed = {name for name, kind, *_ in _core.FORMATS if kind >= 0}
    assert set(gguf.GGMLQuantizationType.__members__) <= listed


def test_decoders_are_one_file_each() -> None:
    """A block format has its own struct file, and its size is asserted there."""
    for name, _, _, block, size, *_ in READABLE:
        if block > 1:
            text = (ROOT / "csrc" / "quant" / f"{name.lower()}.h").read_text()
            assert re.search(rf"AP_ASSERT\(sizeof\(ap_{name.lower()}\) == {size}\b", text), name


def test_nothing_is_only_listed() -> None:
    """A format that is known by name alone would need its refusal tested."""
    assert [row[0] for row in _core.FORMATS if not row[5]] == []


@pytest.mark.parametrize("scale", SPECIAL32.tolist())
def test_one_scale_for_the_whole_tensor(scale: int) -> None:
    """APR_Q8: a float32, then a signed byte per value; a row is found by counting."""
    quants = np.concatenate([np.arange(-128, 128), np.arange(7)]).astype(np.int8)  # 263 values, and 263 is a prime
    head = np.array([scale], "<u4")
    with np.errstate(all="ignore"):
        expected = quants.astype(np.float32) * head.view(np.float32)
    data = head.tobytes() + quants.tobytes()
    same_bits(_core.dequantize("APR_Q8", data, (263,)), expected)
    same_bits(_core.dequantize("APR_Q8", data, (263, 1)), expected[:, None])
    same_bits(_core.dequantize("APR_Q8", data[:-1], (2, 131)), expected[:-1].reshape(2, 131))


@pytest.mark.parametrize("row", [row for row in READABLE if row[7] == "FLAT"], ids=ids)
def test_rows_may_begin_inside_a_block(row: Row) -> None:
    """FLAT: the rows are pieces of one long row, whatever their width."""
    name, _, _, block, size, *_ = row
    data = blocks(row)
    whole = _core.dequantize(name, data, (BLOCKS * block,))
    for columns in (1, block - 1, block, block + 1, 3 * block + 5, 1000):
        rows = BLOCKS * block // columns
        used = -(-rows * columns // block) * size
        mine = _core.dequantize(name, data.reshape(-1)[:used], (rows, columns))
        same_bits(mine, whole[: rows * columns].reshape(rows, columns))


@pytest.mark.parametrize("row", [row for row in READABLE if row[7] == "ROWS" and row[3] > 1], ids=ids)
def test_rows_may_end_inside_a_block(row: Row) -> None:
    """ROWS: each row begins a block, and the rest of its last one is not looked at."""
    name, _, _, block, size, *_ = row
    data = blocks(row)
    whole = _core.dequantize(name, data, (BLOCKS // 2, 2 * block))
    for columns in (1, block - 1, block + 1, 2 * block - 3):
        per_row = -(-columns // block)
        kept = data.reshape(BLOCKS // 2, 2, size)[:, :per_row]
        same_bits(_core.dequantize(name, np.ascontiguousarray(kept), (BLOCKS // 2, columns)), np.ascontiguousarray(whole[:, :columns]))
