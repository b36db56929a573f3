"""Population *gguf* of the fault matrix: real llama.cpp runs a file that carries the fault, and is judged by the right file.

To the judge that is an engine whose loader or kernel got something wrong.  Owns the plants: bytes of the file changed in place so that what
they decode to is the fault exactly (a row of quantized blocks can be moved, a scale doubled, a block emptied; none is encoded again), and
hyper-parameters.  They are written from the bug reports and share nothing with ``judge.faults`` but the names.  Called by
``fault_matrix``; the protocol is that of ``matrix_case``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf as reader
import numpy as np
from matrix_bytes import PLAIN, Bytes, File, doubled, emptied, even, first_scales, interleaved, times, values
from matrix_case import CLEAN, Bench, Case, Judged
from matrix_models import BYTES_OF, FORMATS, MODES, data, encode, folder, gguf, models, prompt, reference, shape, some, tiny

from aprender.captures import Captures
from aprender.sides.llamacpp import CHUNK, LlamaCppSide
from aprender.stages import Key

POPULATION = "gguf"

MATRICES: Mapping[str, tuple[str, ...]] = {
    "qkv_matmul": ("attn_q", "attn_k", "attn_v"),
    "attn_out": ("attn_output",),
    "ffn_gate": ("ffn_gate",),
    "ffn_up": ("ffn_up",),
    "ffn_out": ("ffn_down",),
    "lm_head": ("output",),
}
NORMS: Mapping[str, str] = {
    "attn_norm": "attn_norm",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "ffn_norm": "ffn_norm",
    "final_norm": "output_norm",
}
OTHER_NORM = {"attn_norm": "ffn_norm", "ffn_norm": "attn_norm", "attn_q_norm": "attn_k_norm", "attn_k_norm": "attn_q_norm"}
BIASES = ("attn_q", "attn_k", "attn_v")


# ---- the plants ------------------------------------------------------------------------------------------------------------------------

Change = Callable[[File, Sequence[str]], None]
"""Changes some tensors of a file."""


def each(change: Callable[[Bytes, str], Bytes]) -> Change:
    """The same for each tensor."""

    def plant(file: File, names: Sequence[str]) -> None:
        for name in names:
            file.put(name, change(file.rows(name), file.format(name)))

    return plant


def from_origin(origin: Callable[[str], str]) -> Change:
    """Each tensor has the rows of another one."""

    def plant(file: File, names: Sequence[str]) -> None:
        rows = {name: file.rows(origin(name)) for name in names}
        for name in names:
            file.put(name, rows[name])

    return plant


def transposed(rows: Bytes, fmt: str) -> Bytes:
    """Read as if stored [in, out]; a quantized matrix must lie on one grid (:func:`matrix_bytes.even`)."""
    right = values(rows, fmt)
    wrong = np.ascontiguousarray(right.reshape(right.shape[::-1]).T)
    made = reader.quants.quantize(wrong, reader.GGMLQuantizationType[fmt]) if fmt in PLAIN else np.frombuffer(even(fmt, wrong), np.uint8)
    return made.view(np.uint8).reshape(rows.shape)


def short_of_rows(rows: Bytes, fmt: str) -> Bytes:
    """The last quarter is never written."""
    return np.concatenate([rows[: len(rows) * 3 // 4], np.zeros_like(rows[len(rows) * 3 // 4 :])])


def plus_one(rows: Bytes, fmt: str) -> Bytes:
    """A float32 vector, each 1 more."""
    return (rows.view(np.float32) + np.float32(1)).view(np.uint8)


def other(names: Mapping[str, str]) -> Callable[[str], str]:
    """A tensor's name with another weight in it."""

    def swapped(name: str) -> str:
        *before, weight, kind = name.split(".")
        return ".".join([*before, names[weight], kind])

    return swapped


def of_first_layer(name: str) -> str:
    """The same tensor of layer 0."""
    return ".".join(["blk", "0", *name.split(".")[2:]])


@dataclass(frozen=True)
class Plant:
    """How a file gets a fault.

    Attributes
    ----------
    at : mapping
        Stage where it first shows to the weights that have it.
    change : callable, optional
        What becomes of their tensors.
    hparams : mapping
        What the file says instead.
    kind : str
        ``weight`` or ``bias``.
    formats : tuple of str
        That can hold it exactly.
    first_layer : int
    together, alone : bool
        The weights of a stage have it all at once, or one of them only; else all in the first layer, then one at a time.
    """

    at: Mapping[str, tuple[str, ...]]
    change: Change | None = None
    hparams: Mapping[str, float] = field(default_factory=dict)
    kind: str = "weight"
    formats: tuple[str, ...] = FORMATS
    first_layer: int = 0
    together: bool = False
    alone: bool = False

    def tensors(self, key: Key) -> list[str]:
        """Which tensors are changed."""
        names = self.at[key[0]]
        if self.alone or (key[1] and not self.together):
            names = (names[(key[1] or 0) % len(names)],)
        return [File.name(name, key[1], self.kind) for name in names]


QK: Mapping[str, tuple[str, ...]] = {"qkv_matmul": ("attn_q", "attn_k")}
KV: Mapping[str, tuple[str, ...]] = {"qkv_matmul": ("attn_k", "attn_v")}
HEAD: Mapping[str, tuple[str, ...]] = {"lm_head": ("output",)}
TABLE: Mapping[str, tuple[str, ...]] = {"embedding": ("token_embd",)}
LAYERED = {stage: names for stage, names in MATRICES.items() if stage != "lm_head"}

PLANTS: Mapping[str, Plant] = {
    "transposed": Plant(MATRICES, each(transposed)),
    "qk-permuted": Plant(QK, each(lambda rows, fmt: interleaved(rows, shape("llama").head)), together=True),
    "kv-swap": Plant(KV, from_origin(other({"attn_k": "attn_v", "attn_v": "attn_k"})), together=True),
    "embed-head": Plant(HEAD, from_origin(other({"output": "token_embd"}))),
    "zero-lm-head": Plant(HEAD, each(lambda rows, fmt: np.zeros_like(rows))),
    "first-layer": Plant(LAYERED, from_origin(of_first_layer), first_layer=1),
    "block": Plant(MATRICES, each(doubled), alone=True),
    "sub-scales": Plant(MATRICES, each(first_scales), formats=("Q6_K", "Q4_K")),
    "cut-columns": Plant(MATRICES, each(emptied)),
    "cut-rows": Plant(MATRICES, each(short_of_rows)),
    "embedding-scale": Plant(TABLE, each(lambda rows, fmt: times(rows, fmt, 16.0))),
    "norm-plus-one": Plant({stage: (weight,) for stage, weight in NORMS.items()}, each(plus_one)),
    "norm-swap": Plant(
        {stage: (weight,) for stage, weight in NORMS.items() if weight in OTHER_NORM}, from_origin(other(OTHER_NORM)), together=True
    ),
    "no-bias": Plant({"qkv_bias": BIASES}, each(lambda rows, fmt: np.zeros_like(rows)), kind="bias"),
    "bias-twice": Plant({"qkv_bias": BIASES}, each(lambda rows, fmt: times(rows, fmt, 2.0)), kind="bias"),
    "eps": Plant({"attn_norm": ()}, hparams={"eps": 1e-5}),
    "theta": Plant({"rope_table": ()}, hparams={"theta": 1e4}),
}
"""Row of the catalogue to how a file gets it; the hyper-parameters of the right file are eps 1e-6 and theta 1e6."""


def possible(plant: Plant, key: Key, like: tiny.Shape, fmt: str) -> bool:
    """Whether a model in a format can have it there."""
    absent = {"q_norm", "k_norm"} if like.arch != "qwen3" else set()
    absent |= set() if like.qkv_bias else {"qkv_bias"}
    return key[0] not in absent and fmt in plant.formats and (key[1] is None or key[1] >= plant.first_layer)


def sites(plant: Plant, like: tiny.Shape, fmt: str) -> list[Key]:
    """Where it can sit."""
    whole = {"embedding", "rope_table", "final_norm", "lm_head"}
    keys = [(stage, layer) for stage in plant.at for layer in ([None] if stage in whole else range(like.layers))]
    keys = keys[:1] if plant.hparams else keys  # a hyper-parameter is the whole model's
    return [key for key in keys if possible(plant, key, like, fmt)]


# ---- the cases -------------------------------------------------------------------------------------------------------------------------


class Engine:
    """llama.cpp on one file, one prompt, run in one way."""

    def __init__(self, arch: str, fmt: str, mode: str, seed: int, whole: bool, grid: bool = False) -> None:
        self.arch, self.fmt, self.mode, self.seed, self.whole, self.grid = arch, fmt, mode, seed, whole, grid

    @functools.cached_property
    def path(self) -> Path:
        """The right file; on one grid for each matrix, if so asked."""
        if not self.grid:
            return gguf(self.arch, self.fmt, self.seed)
        return tiny.save_gguf(
            shape(self.arch), folder() / f"{self.arch}-{self.fmt}-{self.seed}-grid.gguf", self.fmt, self.seed, encode=even
        )

    def capture(self, path: Path) -> Captures:
        """Run a file."""
        return LlamaCppSide(path, threads=1, chunk=MODES[self.mode] or CHUNK).capture(prompt(self.seed))

    @functools.cached_property
    def bench(self) -> Bench:
        """The untouched run."""
        profile = LlamaCppSide(self.path).profile
        unquantized = {} if self.grid else reference(self.arch, self.seed)  # a grid is no way to quantize: no gate is shown for it
        return Bench(self.capture(self.path), data(self.path), profile, unquantized, self.whole)

    def planted(self, name: str, key: Key) -> Path:
        """The file with a fault in it."""
        plant, like, out = PLANTS[name], shape(self.arch), folder() / "planted.gguf"
        if plant.hparams:
            other_shape = dataclasses.replace(like, **plant.hparams)
            return tiny.save_gguf(other_shape, out, self.fmt, self.seed, encode=None if self.fmt in BYTES_OF else encode)
        assert plant.change is not None
        file = File(self.path, like)
        plant.change(file, plant.tensors(key))
        return file.save(out)

    def judge(self, name: str, key: Key) -> Judged:
        """Plant and judge."""
        norms = [k for k in self.bench.wires if k[0] in NORMS] if "eps" in PLANTS[name].hparams else []
        return self.bench.judge(name, key, self.capture(self.planted(name, key)), norms)

    def case(self, name: str, key: Key | None) -> Case:
        """One cell."""
        judge = functools.partial(self.judge, name, key) if key else lambda: self.bench.untouched
        side = f"{self.arch}, one grid" if self.grid else self.arch
        return Case(POPULATION, name, key, side, self.fmt, self.mode, self.seed, judge)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Every case that the arguments name."""
    for number, arch, fmt, mode, seed in models(args):
        engine, grid = (Engine(arch, fmt, mode, seed, args.whole, grid) for grid in (False, fmt not in PLAIN))
        yield engine.case(CLEAN, None)
        every = {name: sites(plant, shape(arch), fmt) for name, plant in PLANTS.items()}
        chosen = {name: some(keys, args.sites, number + i) for i, (name, keys) in enumerate(every.items())}
        yield from (engine.case(name, key) for name, keys in chosen.items() for key in keys if name != "transposed" or fmt in PLAIN)
        if fmt not in PLAIN:
            yield grid.case(CLEAN, None)
            yield from (grid.case("transposed", key) for key in chosen["transposed"])
