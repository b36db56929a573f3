"""Our engine against Hugging Face float32, every stage of every layer, on tiny models of every architecture and on the canary.

Truth: transformers in float32, and NumPy float64 (the witness) as the measure of what float32 may cost: Hugging Face's own distance
from it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import CANARY, PROMPT

import aprender
from aprender.bisection import Report
from aprender.judge import metrics
from aprender.references import WitnessSide
from aprender.sides.hf import HFSide
from aprender.sides.own import OwnSide

pytestmark = pytest.mark.foreign


def distances(folder: Path, ids: tuple[int, ...], own: Path | None = None) -> dict[tuple[str, int | None], tuple[float, float, float]]:
    """Per stage: ours from float64, Hugging Face's from float64, ours from Hugging Face's (relative L2)."""
    ours, theirs = OwnSide(own or folder), HFSide(str(folder), dtype="float32")
    truth = WitnessSide(ours, "witness").capture(ids)
    a, b = ours.capture(ids), theirs.capture(ids)
    assert set(a) == set(b) == set(truth)
    pairs = [metrics.compare(left, right) for left, right in ((a, truth), (b, truth), (a, b))]
    return {key: tuple(pair[key].rel_l2 for pair in pairs) for key in a}  # type: ignore[misc]


def check(found: dict[tuple[str, int | None], tuple[float, float, float]], what: str) -> None:
    """Ours is no further from float64 than twice Hugging Face float32 is; a stage that it has exactly, we have exactly."""
    worst = max(found, key=lambda key: found[key][2])
    ratio = max(found, key=lambda key: found[key][0] / max(found[key][1], 1e-12))
    print(f"{what}: largest relative difference to Hugging Face {found[worst][2]:.1e} at {worst}; furthest from float64 in units of")
    print(f"  Hugging Face's own distance: {found[ratio][0] / max(found[ratio][1], 1e-12):.2f} at {ratio}")
    for key, (mine, theirs, _) in found.items():
        # 3e-8 is half a float32 step (2^-24 = 6e-8): what a single rounding per element may leave where theirs happens to be smaller.
        assert mine <= 2 * theirs + 3e-8, f"{key}: ours {mine:.2e} from float64, Hugging Face {theirs:.2e}"


@pytest.mark.parametrize("shape", tiny.SHAPES, ids=str)
def test_every_stage_of_every_architecture(shape: tiny.Shape, tmp_path: Path) -> None:
    ids = tuple(np.random.default_rng(1).integers(0, shape.vocab, 19).tolist())
    tiny.save_hf(shape, tmp_path / "model")
    check(distances(tmp_path / "model", ids), str(shape))


def test_every_stage_of_the_canary() -> None:
    check(distances(CANARY, PROMPT), "canary")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_both_sides_are_judged_clean(arch: str, dtype: str, tmp_path: Path) -> None:
    """Random weights, 19 tokens: neither our engine nor Hugging Face has a wrong stage under its declared arithmetic."""
    shape = tiny.Shape(arch)
    tiny.save_hf(shape, tmp_path / "model")
    ids = tuple(np.random.default_rng(2).integers(0, shape.vocab, 19).tolist())
    report = aprender.compare(str(tmp_path / "model"), f"hf:{tmp_path / 'model'}@{dtype}", prompt_ids=ids, answer=0)
    assert report.verdict == "agree", report.sentence
    clean(report)


def clean(report: Report) -> None:
    """rms z of the reference lies in the accepted band of a clean stage: at most 1.5 (f32), 1.15 (f16, bf16)."""
    band = 1.5 if report.judged.reference.profile == "hf-f32" else 1.15
    seen = {r.key: r.z_rms for r in report.judged.reference.results if r.z_rms is not None}
    assert len(seen) > 20
    assert max(seen.values()) <= band
    worst = max(seen, key=lambda key: seen[key])
    print(f"{report.judged.reference.profile}: rms z {min(seen.values()):.2f} … {seen[worst]:.2f} (largest at {worst})")


@pytest.mark.parametrize("form", ["canary.gguf", ""], ids=["gguf", "safetensors"])
@pytest.mark.parametrize("prompt", ["What is 2+2?", "What is the capital of France?", "7 plus 8"])
def test_same_greedy_text(form: str, prompt: str) -> None:
    """The margins of these answers are above 1.5 logits, far above what 4 bits move (canary README)."""
    ours, theirs = OwnSide(CANARY / form), HFSide(str(CANARY), dtype="float32")
    tokenizer = ours.tokenizer()
    assert tokenizer is not None
    ids = tokenizer.encode(prompt)
    assert ours.generate(ids, 24) == theirs.generate(ids, 24)
    if prompt == "What is 2+2?":
        assert tokenizer.decode(ours.generate(ids, 24)) == " 2+2 is 4."


def test_the_recorded_stages_are_those_of_hugging_face() -> None:
    """Made again here they need not have the same bits (other CPUs round otherwise), but they must be as right, and as near."""
    for dtype in ("float16", "float32"):
        saved = aprender.open_captures(CANARY / f"stages-{dtype}")
        again = HFSide(str(CANARY), dtype=dtype).capture(PROMPT)
        truth = WitnessSide(OwnSide(CANARY), "witness").capture(PROMPT)
        assert set(saved) == set(again)
        assert saved.tokens == again.tokens == PROMPT
        for key, far in metrics.compare(saved, again).items():
            noise = metrics.compare(again, truth)[key].rel_l2
            assert far.rel_l2 is not None
            assert noise is not None
            assert far.rel_l2 <= 2 * noise, key  # both are about `noise` from the truth
        report = aprender.compare(f"saved:{CANARY / f'stages-{dtype}'}", f"witness:{CANARY}", answer=0)
        assert report.verdict == "agree", report.sentence
