"""GGUF files changed in place, row of bytes by row of bytes: how the fault matrix plants a fault in a quantized file exactly.

Owns a file in memory and what can be done to rows without decoding and encoding them again (which would round, and the fault would be
another): moved, emptied, multiplied by powers of two, given other scales.  Offsets are those of ggml's block structs.  Called by
``matrix_gguf``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf as reader
import numpy as np
from matrix_models import tiny
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
PLAIN = ("F32", "F16")
"""Formats without blocks."""


# ---- the file --------------------------------------------------------------------------------------------------------------------------


class File:
    """A GGUF in memory: rows of bytes, to be changed in place.

    Parameters
    ----------
    path : Path
    like : tiny.Shape
        A Llama's rows of q and k lie as neighbours; here they are seen as halves, as the model computes.
    """

    def __init__(self, path: Path, like: tiny.Shape) -> None:
        self.like, self._data = like, np.frombuffer(path.read_bytes(), np.uint8).copy()
        self._tensors = {tensor.name: tensor for tensor in reader.GGUFReader(path).tensors}

    @staticmethod
    def name(weight: str, layer: int | None, kind: str = "weight") -> str:
        """As GGUF spells it."""
        return f"{weight}.{kind}" if layer is None else f"blk.{layer}.{weight}.{kind}"

    def format(self, name: str) -> str:
        """Its number format."""
        return str(self._tensors[name].tensor_type.name)

    def _raw(self, name: str) -> Bytes:
        """Bytes as they lie: a view."""
        tensor = self._tensors[name]
        return self._data[tensor.data_offset : tensor.data_offset + int(tensor.n_bytes)].reshape(*reversed(tensor.shape[1:].tolist()), -1)

    def _heads(self, name: str) -> int:
        """Heads whose rows lie as neighbours; 0 if none do."""
        heads = {"attn_q.weight": self.like.heads, "attn_k.weight": self.like.kv_heads}
        return heads.get(name.split(".", 2)[-1], 0) if self.like.arch == "llama" else 0

    def rows(self, name: str) -> Bytes:
        """Rows of bytes, [out, bytes of a row] (a vector is one row): a copy."""
        raw, heads = self._raw(name), self._heads(name)
        if heads:
            raw = raw.reshape(heads, -1, 2, raw.shape[1]).swapaxes(1, 2).reshape(raw.shape)
        return np.atleast_2d(raw).copy()

    def put(self, name: str, rows: Bytes) -> None:
        """Put rows back."""
        heads = self._heads(name)
        if heads:
            rows = rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        self._raw(name)[...] = rows.reshape(self._raw(name).shape)

    def save(self, path: Path) -> Path:
        """Write it."""
        path.write_bytes(self._data.tobytes())
        return path


# ---- what can be done to rows of bytes -------------------------------------------------------------------------------------------------


def values(rows: Bytes, fmt: str) -> NDArray[np.float32]:
    """What rows mean, by the ``gguf`` package."""
    return np.asarray(reader.quants.dequantize(rows, reader.GGMLQuantizationType[fmt]), np.float32)


def blocks(rows: Bytes, fmt: str) -> Bytes:
    """Rows as [out, blocks, bytes of a block]: a view."""
    size = reader.GGML_QUANT_SIZES[reader.GGMLQuantizationType[fmt]][1]
    return rows.reshape(len(rows), -1, size)


HALVES: Mapping[str, tuple[slice, ...]] = {"Q8_0": (slice(0, 2),), "Q4_K": (slice(0, 2), slice(2, 4)), "Q6_K": (slice(208, 210),)}
"""Where a block has the float16 numbers that all its weights are multiplied with."""


def times(rows: Bytes, fmt: str, factor: float) -> Bytes:
    """All weights times a power of two: the numbers themselves, or those of each block."""
    if fmt in PLAIN:
        dtype = {"F32": np.float32, "F16": np.float16}[fmt]
        return (rows.view(dtype) * dtype(factor)).view(np.uint8)
    out = blocks(rows.copy(), fmt)
    for where in HALVES[fmt]:
        half = np.ascontiguousarray(out[..., where]).view(np.float16)
        out[..., where] = (half * np.float16(factor)).view(np.uint8)
    return out.reshape(rows.shape)


def sub_scales(block: Bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The 6-bit scales and minima of Q4_K's eight sub-blocks: two arrays [..., 8] of [..., 144]."""
    s = block[..., 4:16]
    low, high = s[..., :8] & 63, s[..., :8] >> 6
    scale = np.concatenate([low[..., :4], (s[..., 8:] & 15) | high[..., :4] << 4], axis=-1)
    least = np.concatenate([low[..., 4:], s[..., 8:] >> 4 | high[..., 4:] << 4], axis=-1)
    return scale, least


def set_sub_scales(block: Bytes, scale: NDArray[np.uint8], least: NDArray[np.uint8]) -> None:
    """The way back, in place."""
    block[..., 4:8] = scale[..., :4] | scale[..., 4:] >> 4 << 6
    block[..., 8:12] = least[..., :4] | least[..., 4:] >> 4 << 6
    block[..., 12:16] = scale[..., 4:] & 15 | (least[..., 4:] & 15) << 4


def emptied(rows: Bytes, fmt: str) -> Bytes:
    """The second half of each row decodes to zero."""
    out = rows.copy()
    if fmt not in ("Q4_K", "Q6_K"):
        out[:, rows.shape[1] // 2 :] = 0
        return out
    every = blocks(out, fmt)
    parts = 8 if fmt == "Q4_K" else 16
    behind = np.arange(every.shape[1] * parts).reshape(-1, parts) >= every.shape[1] * parts // 2
    if fmt == "Q4_K":
        scale, least = sub_scales(every)
        set_sub_scales(every, np.where(behind, 0, scale).astype(np.uint8), np.where(behind, 0, least).astype(np.uint8))
    else:
        every[..., 192:208] = np.where(behind, 0, every[..., 192:208])
    return out


def doubled(rows: Bytes, fmt: str) -> Bytes:
    """Of one row, 32 weights twice as large."""
    out = rows.copy()
    if fmt in PLAIN:
        size = 32 * (4 if fmt == "F32" else 2)
        row, first = len(rows) // 2, rows.shape[1] // size // 2 * size
        out[row : row + 1, first : first + size] = times(np.ascontiguousarray(out[row : row + 1, first : first + size]), fmt, 2.0)
        return out
    every = blocks(out, fmt)
    if fmt == "Q8_0":
        row, block = len(rows) // 2, every.shape[1] // 2
        every[row, block] = times(every[row, block][None], fmt, 2.0)[0]
    elif fmt == "Q6_K":
        pairs = every[..., 192:208].view(np.int8).reshape(*every.shape[:2], 8, 2)
        row, block, part = np.argwhere((np.abs(pairs.astype(int)) < 64).all(axis=-1) & (pairs != 0).any(axis=-1))[0]
        pairs = every[row, block, 192 + 2 * part : 194 + 2 * part].view(np.int8)
        pairs *= 2
    else:
        scale, least = sub_scales(every)
        row, block, part = np.argwhere((scale < 32) & (least < 32) & (scale > 0))[0]
        scale[row, block, part] *= 2
        least[row, block, part] *= 2
        set_sub_scales(every, scale, least)
    return out


def first_scales(rows: Bytes, fmt: str) -> Bytes:
    """Every sub-block of a super-block has the scale of the first."""
    out = rows.copy()
    every = blocks(out, fmt)
    if fmt == "Q6_K":
        every[..., 192:208] = every[..., 192:193]
    else:
        scale, least = sub_scales(every)
        set_sub_scales(every, np.broadcast_to(scale[..., :1], scale.shape), np.broadcast_to(least[..., :1], least.shape))
    return out


def interleaved(rows: Bytes, head: int) -> Bytes:
    """The halves of each head's rows as neighbours."""
    return rows.reshape(-1, 2, head // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def even(fmt: str, array: tiny.Array) -> bytes:
    """A matrix on one grid for all of it, a power of two: in whatever order its elements are stored, they are stored exactly."""
    most = {"Q8_0": 127, "Q6_K": 31, "Q4_K": 7}[fmt]
    unit = 2.0 ** np.ceil(np.log2(np.abs(array).max() / most))
    q = np.clip(np.rint(array / unit), -most, most).astype(np.int8)

    def half(value: float, count: int) -> Bytes:
        return np.tile(np.array([value], np.float16).view(np.uint8), (count, 1))

    if fmt == "Q8_0":
        parts = q.reshape(-1, 32).view(np.uint8)
        return np.concatenate([half(unit, len(parts)), parts], axis=1).tobytes()
    if fmt == "Q4_K":
        pairs = (q + 8).astype(np.uint8).reshape(-1, 4, 2, 32)
        packed = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
        out = np.concatenate([half(unit / 32, len(packed)), half(unit / 4, len(packed)), np.zeros((len(packed), 140), np.uint8)], axis=1)
        out[:, 16:] = packed
        thirty_two = np.full((len(packed), 8), 32, np.uint8)
        set_sub_scales(out, thirty_two, thirty_two)
        return out.tobytes()
    by = (q + 32).astype(np.uint8).reshape(-1, 2, 4, 32)  # [blocks, halves of 128, quarters of 32]
    low = (by[:, :, :2] & 15) | (by[:, :, 2:] & 15) << 4
    high = by[:, :, 0] >> 4 | by[:, :, 1] >> 4 << 2 | by[:, :, 2] >> 4 << 4 | by[:, :, 3] >> 4 << 6
    scales = np.full((len(by), 16), 16, np.uint8)
    return np.concatenate([low.reshape(-1, 128), high.reshape(-1, 64), scales, half(unit / 16, len(by))], axis=1).tobytes()
