"""The small random models of the fault matrix: three layers, widths that blocks of 256 divide, in every weight format.

Owns their shapes, files, prompts, ways to run a prompt, and the float64 witness on their unquantized weights.  The writers are those of the
tests.  Called by the populations (``matrix_own``, ``matrix_gguf``, ``matrix_hf``).
"""

from __future__ import annotations

import atexit
import functools
import itertools
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from make_evidence import ROOT

from aprender import _core
from aprender.judge import witness
from aprender.judge.witness import Float, ModelData
from aprender.sides.own import OwnSide
from aprender.stages import Key

sys.path.insert(0, str(ROOT / "tests"))
import tiny

ARCHS = tiny.ARCHS
FORMATS = ("F32", "F16", "Q8_0", "Q6_K", "Q4_K")
MODES: Mapping[str, int] = {"prefill": 0, "decode": 1, "pieces": 4}
"""How a prompt is run: so many tokens at a time, 0 is all at once."""

BYTES_OF = ("F32", "F16", "BF16")
"""Formats that the writer makes by itself."""

Item = TypeVar("Item")


def shape(arch: str) -> tiny.Shape:
    """First, middle and last layer; two query heads to each of two key heads; a head of a size that K-quants allow."""
    return tiny.Shape(arch, layers=3, dim=256, ffn=512, heads=4, kv_heads=2, head=64, vocab=160)


def prompt(seed: int) -> list[int]:
    """Ids; 11 or more, so that pieces of four leave a rest."""
    return np.random.default_rng(seed).integers(0, shape("qwen2").vocab, 11 + 2 * seed).tolist()


@functools.cache
def folder() -> Path:
    """Where this process puts its files; gone at its end."""
    made = tempfile.TemporaryDirectory(prefix="matrix-")
    atexit.register(made.cleanup)
    return Path(made.name)


def encode(fmt: str, array: tiny.Array) -> bytes:
    """Bytes of a matrix in a quantized format."""
    return bytes(_core.encode(fmt, array).tobytes())


@functools.cache
def gguf(arch: str, fmt: str, seed: int) -> Path:
    """The right file."""
    path = folder() / f"{arch}-{fmt}-{seed}.gguf"
    return tiny.save_gguf(shape(arch), path, fmt, seed, encode=None if fmt in BYTES_OF else encode)


@functools.lru_cache(maxsize=2)
def reference(arch: str, seed: int) -> Mapping[Key, Float]:
    """What a cosine gate is held against: every stage of the unquantized weights, in float64."""
    return witness.forward(data(gguf(arch, "F32", seed)), prompt(seed))


def data(path: Path) -> ModelData:
    """What a file says, by our reader."""
    return ModelData(**OwnSide(path).model_data())


def models(args: Any) -> Iterator[tuple[int, str, str, str, int]]:
    """Number, family, format, mode and seed of every model that the arguments name."""
    every = itertools.product(range(args.seeds), args.archs, args.formats, args.modes)
    yield from ((i, arch, fmt, mode, seed) for i, (seed, arch, fmt, mode) in enumerate(every))


def some(items: Sequence[Item], count: int, first: int) -> list[Item]:
    """So many of the items (0 is all), evenly spread and from another one on each time, in their order."""
    if not count or count >= len(items):
        return list(items)
    return [items[i] for i in sorted({(first + k * len(items) // count) % len(items) for k in range(count)})]
