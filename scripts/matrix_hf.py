"""Population *hf* of the fault matrix: patched modules of real transformers models, recorded as every Hugging Face run is.

The judge gets the right weights and hyper-parameters, which the file holds; the captures come from a model that was changed after it was
loaded (``hf_plants``), through the recorder of ``sides.hf``.  Where torch fuses what the catalogue holds apart (a projection and its bias),
the fault must show at the first stage that is visible.  Called by ``fault_matrix``; the protocol is that of ``matrix_case``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from hf_plants import PLANTS, Plant, planted
from matrix_case import CLEAN, Bench, Case, Judged
from matrix_models import folder, some, tiny

from aprender.judge import faults, witness
from aprender.judge.witness import ModelData
from aprender.sides.hf import HFSide
from aprender.stages import Key, keys

POPULATION = "hf"
MODE = "prefill"
"""The recorder shows a prompt that is run in one go."""


def shape(arch: str, seed: int) -> tiny.Shape:
    """First, middle and last layer; a head whose scale rounds; projections with a bias in every other model that may choose."""
    biased = arch != "qwen2" and seed % 2 == 1
    return tiny.Shape(arch, layers=3, dim=256, ffn=512, heads=8, kv_heads=2, head=32, vocab=160, attention_bias=biased)


def prompt(seed: int) -> list[int]:
    """Ids; more than the window of the catalogue."""
    return np.random.default_rng(seed).integers(0, shape("qwen2", 0).vocab, 11 + 2 * seed).tolist()


@functools.cache
def saved(arch: str, seed: int) -> Path:
    """The right model, as transformers writes it."""
    return tiny.save_hf(shape(arch, seed), folder() / f"hf-{arch}-{seed}", seed)


def sites(plant: Plant, like: tiny.Shape, dtype: str) -> list[Key]:
    """Where it can sit in a model."""
    if plant.dtypes and dtype not in plant.dtypes:
        return []
    every = keys(like.flags, like.layers)
    at = [stage for stage in plant.at if stage not in plant.biased or like.attention_bias]
    return [key for key in every if key[0] in at and (key[1] is None or key[1] >= plant.first_layer)]


class Model:
    """A right model in a dtype, on one prompt."""

    def __init__(self, arch: str, dtype: str, seed: int, whole: bool) -> None:
        self.arch, self.dtype, self.seed, self.whole = arch, dtype, seed, whole

    def side(self) -> HFSide:
        """The model, loaded anew: a plant changes it."""
        return HFSide(str(saved(self.arch, self.seed)), self.dtype)

    @functools.cached_property
    def bench(self) -> Bench:
        """The untouched run, held by the weights of a model that nothing will touch."""
        side = self.side()
        unrounded = ModelData(**HFSide(str(saved(self.arch, self.seed)), "float32").model_data())
        reference = witness.forward(unrounded, prompt(self.seed))
        return Bench(side.capture(prompt(self.seed)), ModelData(**side.model_data()), side.profile, reference, self.whole)

    def judge(self, name: str, key: Key) -> Judged:
        """Plant and judge."""
        side = self.side()
        with planted(side.model, name, key):
            captures = side.capture(prompt(self.seed))
        return self.bench.judge(name, key, captures)

    def case(self, name: str, key: Key | None) -> Case:
        """One cell."""
        judge = functools.partial(self.judge, name, key) if key else lambda: self.bench.untouched
        return Case(POPULATION, name, key, self.arch, self.dtype, MODE, self.seed, judge)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Every case that the arguments name."""
    every = itertools.product(range(args.seeds), args.archs, args.dtypes)
    for number, (seed, arch, dtype) in enumerate(every):
        model, like = Model(arch, dtype, seed, args.whole), shape(arch, seed)
        yield model.case(CLEAN, None)
        for i, (name, plant) in enumerate(PLANTS.items()):
            row = {**faults.FAULTS, **faults.CONTROLS}[name]
            possible = [key for key in sites(plant, like, dtype) if row.possible(like.flags, like.hparams)]
            yield from (model.case(name, key) for key in some(possible, args.sites, number + i))
