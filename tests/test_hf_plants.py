"""Bugs in real transformers modules: each is accused at the stage where it was put and by its name, and the untouched models are not.

Truth: what was patched is known, and the models are transformers' own.  One site of each fault, in a dtype, a family and a layer that
change from fault to fault; ``scripts/fault_matrix.py --only hf`` runs them all.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import matrix_hf  # noqa: E402 (after the skip)
from hf_plants import PLANTS, planted  # noqa: E402
from matrix_case import score  # noqa: E402

from aprender.judge import faults  # noqa: E402
from aprender.stages import Key, spell  # noqa: E402

pytestmark = pytest.mark.foreign

ARCHS, DTYPES, SEED = ("qwen2", "llama", "qwen3"), ("float32", "float16", "bfloat16"), 1
"""Seed 1: Llama and Qwen3 with attention_bias."""


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, str], matrix_hf.Model]:
    """One per family and dtype; each is captured untouched and judged when it is first needed."""
    return {at: matrix_hf.Model(*at, SEED, whole=False) for at in itertools.product(ARCHS, DTYPES)}


def _sampled() -> list[tuple[str, str, str, Key]]:
    """A site of every plant: dtype and layer change with its number, and the family where the first has no place for it.

    epsilon is seen in float32 everywhere; a shorter format rounds its change away where the stream is large.
    """
    out = []
    for i, (name, plant) in enumerate(PLANTS.items()):
        dtypes = plant.dtypes or (DTYPES[:1] if name == "eps" else DTYPES)
        dtype = dtypes[i % len(dtypes)]
        for arch in (ARCHS[(i + k) % len(ARCHS)] for k in range(len(ARCHS))):
            at = matrix_hf.sites(plant, matrix_hf.shape(arch, SEED), dtype)
            if at:
                out.append((name, arch, dtype, at[i % len(at)]))
                break
    return out


SAMPLED = _sampled()


def test_the_sample_has_every_plant_and_spreads() -> None:
    assert [name for name, *_ in SAMPLED] == list(PLANTS)
    assert len(set(PLANTS) & set(faults.FAULTS)) >= 25
    assert {dtype for _, _, dtype, _ in SAMPLED} == set(DTYPES)
    assert {arch for _, arch, _, _ in SAMPLED} == set(ARCHS)
    assert {key[1] for *_, key in SAMPLED} == {None, 0, 1, 2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_an_untouched_model_is_not_accused(models: dict[tuple[str, str], matrix_hf.Model], arch: str, dtype: str) -> None:
    bench = models[arch, dtype].bench
    assert bench.untouched.wrong == []
    assert len([r for r in bench.results if r.measured]) >= len(bench.results) - 3  # the product before a fused bias does not exist


@pytest.mark.parametrize(("name", "arch", "dtype", "key"), SAMPLED, ids=[f"{n}@{spell(k)}-{a}-{d}" for n, a, d, k in SAMPLED])
def test_a_patched_model_is_accused_where_it_was_patched(
    models: dict[tuple[str, str], matrix_hf.Model], name: str, arch: str, dtype: str, key: Key
) -> None:
    model = models[arch, dtype]
    judged = model.judge(name, key)
    row = score(model.case(name, key), judged)
    if name in faults.CONTROLS:
        assert row["right"]
        return
    assert judged.changed
    assert not row["excluded"]
    assert row["false"] == []
    assert row["stage"], (row["due"], row["wrong"])
    assert row["rank"] == 1, (row["kind"], row["ties"])


def test_a_patch_goes_away_with_its_model(models: dict[tuple[str, str], matrix_hf.Model]) -> None:
    """Functions that all layers of all models share are put back: a model loaded afterwards computes what the untouched one did."""
    model = models["qwen2", "float32"]
    for name, key in (("rope-pairs", ("q_post_rope", 1)), ("rope-on-v", ("v_cache", 0)), ("mask-self", ("attn_softmax", 2))):
        side = model.side()
        with planted(side.model, name, key):
            assert not np.array_equal(side.capture(matrix_hf.prompt(SEED)).lm_head, model.bench.clean.lm_head)
    assert np.array_equal(model.side().capture(matrix_hf.prompt(SEED)).lm_head, model.bench.clean.lm_head)
