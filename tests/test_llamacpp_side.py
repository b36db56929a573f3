"""llama.cpp as a side: what it captures, that a correct run is judged clean in every format, and that a fault in its file is named.

The engine is the real one.  A fault is planted in the GGUF that it runs, while the judge holds the right file: to the judge that is an
engine whose loader or kernel got something wrong.  Figures (largest clean rms z, |z| and |I| of each stage; what a fault leaves) are
printed with ``pytest -rP``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import llamacpp
import numpy as np
import pytest
import tiny
from conftest import CANARY, PROMPT

from aprender import arithmetic, bisect, run, trace
from aprender.captures import Captures, aligned, open_captures
from aprender.captures import save as save_captures
from aprender.errors import ArgumentError, CannotRun, ConfigError, UnknownName
from aprender.judge import ggml, metrics
from aprender.judge.local import StageResult, local
from aprender.judge.witness import ModelData
from aprender.manifest import HALVES, PAIRS
from aprender.sides import open_side
from aprender.sides.llamacpp import RELEASE, VARIABLE, LlamaCppSide, find_libraries
from aprender.sides.own import OwnSide
from aprender.stages import Key, parse_selection

foreign = pytest.mark.foreign

LENGTHS = (1, 3, 4, 5, 7, 8, 24)
"""Tokens at which ggml's kernels change: vector or matrix, panels of 4 and 8, and what is left over."""

IDS = tuple(int(i) for i in np.random.default_rng(11).integers(0, 112, 24))
SHAPES = (tiny.Shape("qwen2", head=16), tiny.Shape("llama"), tiny.Shape("qwen3"))
WIDE = {"dim": 256, "ffn": 512, "heads": 4, "kv_heads": 2, "head": 64, "layers": 1}
"""Sizes that blocks of 256 divide."""

K_QUANTS = ("Q4_K", "Q6_K")
OTHERS = ("Q4_1", "Q5_1", "Q2_K", "Q3_K", "Q5_K", "IQ4_NL", "IQ4_XS")


def wide(shape: tiny.Shape) -> tiny.Shape:
    return dataclasses.replace(shape, **WIDE)


@pytest.fixture(scope="module")
def save(peer: llamacpp.Peer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """save(shape, format, made=None, name=None): a GGUF whose matrices ggml itself encoded; one for all tests if nothing is given."""
    root = tmp_path_factory.mktemp("llamacpp")

    @functools.cache
    def plain(shape: tiny.Shape, kind: str) -> Path:
        return write(shape, kind, f"{hash((shape, kind)) & 0xFFFFFFFFFFFF:x}")

    def write(shape: tiny.Shape, kind: str, name: str, made: dict[str, tiny.Array] | None = None) -> Path:
        encode = None if kind in ("F32", "F16", "BF16") else peer.quantize
        return tiny.save_gguf(shape, root / f"{name}.gguf", kind, made=made, encode=encode)

    def make(shape: tiny.Shape, kind: str, made: dict[str, tiny.Array] | None = None, name: str | None = None) -> Path:
        return plain(shape, kind) if made is None and name is None else write(shape, kind, name or "other", made)

    return make


def judged(side: LlamaCppSide, ids: Sequence[int], model: ModelData | None = None) -> list[StageResult]:
    """Every stage of a run, judged with the side's own file or with another one."""
    captures = side.capture(ids)
    assert captures.manifest.attestation is True
    return local(captures, model or ModelData(**side.model_data()), side.profile)


def wrong(results: Sequence[StageResult]) -> list[Key]:
    return [r.key for r in results if r.state not in ("exact", "noise", "inherited", "unmeasured")]


class Worst:
    """The largest figures of each stage over many runs."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[float, float, float, float]] = {}

    def add(self, results: Sequence[StageResult]) -> None:
        for r in results:
            if r.measured:
                z, top, i, equal = self.rows.get(r.stage, (0.0, 0.0, 0.0, 1.0))
                self.rows[r.stage] = (
                    max(z, r.z_rms or 0), max(top, r.z_max or 0), max(i, r.i_max or 0), min(equal, r.bit_equal or 0),
                )  # fmt: skip

    def say(self, title: str) -> None:
        noisy = [f"{name} {z:.2f} ({top:.1f}, I {i:.1f})" for name, (z, top, i, equal) in self.rows.items() if equal < 1]
        exact = [name for name, (*_, equal) in self.rows.items() if equal == 1]
        print(f"{title}: rms z (max |z|, max |I|): {', '.join(noisy)}; bit for bit: {', '.join(exact)}")


EXACT = (
    "embedding", "attn_norm", "qkv_bias", "q_norm", "k_norm", "k_cache", "v_cache", "post_attn_residual", "ffn_norm", "post_ffn_residual",
    "final_norm",
)  # fmt: skip
"""Stages of which every bit is declared."""


# ---- finding the libraries -------------------------------------------------------------------------------------------


def test_no_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(CannotRun, match=rf"no libllama\.v{RELEASE}\.so in {tmp_path}.*npm install") as caught:
        find_libraries()
    assert (caught.value.code, caught.value.field) == ("LIBRARY", VARIABLE)


def test_places_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "environment"))
    with pytest.raises(CannotRun) as caught:
        find_libraries()
    assert str(tmp_path / "node_modules") in str(caught.value)
    assert str(tmp_path / "environment" / "npm") in str(caught.value)


def test_another_release_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libllama.v0.6.1.so").touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(CannotRun, match=rf"v{RELEASE} is needed, .* has libllama\.v0\.6\.1\.so"):
        find_libraries()


@foreign
def test_libraries_that_do_not_load(save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("libggml-base.so", f"libggml.v{RELEASE}.so", f"libllama.v{RELEASE}.so"):
        (tmp_path / name).write_bytes(b"not an object")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(CannotRun, match="cannot be loaded") as caught:
        LlamaCppSide(save(SHAPES[1], "F32")).capture(IDS[:2])
    assert caught.value.code == "LIBRARY"


@foreign
def test_another_container_is_refused(peer: llamacpp.Peer) -> None:
    with pytest.raises(ConfigError, match="reads GGUF"):
        LlamaCppSide(CANARY)


# ---- what is captured ------------------------------------------------------------------------------------------------


@foreign
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_captures_are_the_stages(shape: tiny.Shape, save: Callable[..., Path], peer: llamacpp.Peer) -> None:
    """In float32 each stage is what our engine computes, up to the order of sums; the logits are those of another door, bit for bit."""
    path = save(shape, "F32")
    captures, own = LlamaCppSide(path).capture(IDS), OwnSide(path).capture(IDS)
    assert np.array_equal(captures.lm_head, peer.logits(path, list(IDS)))
    hidden = {key for key in own if key not in captures}
    assert {stage for stage, _ in hidden} == {"rope_table", "ffn_silu"}
    for key in captures:
        mine, other = aligned(captures, own, key)
        if key[0] == "attn_scores":  # above the diagonal both are 0
            assert np.array_equal(mine == 0, other == 0)
        assert np.linalg.norm(mine - other) <= 3e-6 * np.linalg.norm(other), key
    told = captures.manifest
    assert (told.producer, told.profile, told.attestation) == ("llama.cpp", "ggml-cpu", True)
    assert (told.version.split("-")[0], told.model_digest) == (RELEASE, OwnSide(path).digest)
    assert told.tier


@foreign
def test_lane_orders_matter(save: Callable[..., Path]) -> None:
    """Llama's q and k have neighbours as partners: said so, they are ours; not said, they are far away."""
    path = save(SHAPES[1], "F32")
    captures, own = LlamaCppSide(path).capture(IDS[:5]), OwnSide(path).capture(IDS[:5])
    pairs = {key[0] for key, note in captures.manifest.tensors.items() if note.lanes == PAIRS}
    assert pairs == {"qkv_matmul", "q_post_rope", "k_post_rope", "k_cache"}
    notes = {key: dataclasses.replace(note, lanes=HALVES) for key, note in captures.manifest.tensors.items()}
    unsaid = Captures(captures, dataclasses.replace(captures.manifest, tensors=notes))
    said, not_said = metrics.compare(captures, own), metrics.compare(unsaid, own)
    for stage in pairs:
        assert said[stage, 0].rel_l2 < 1e-6 < 0.1 < not_said[stage, 0].rel_l2


@foreign
def test_a_selection_changes_no_bit(save: Callable[..., Path]) -> None:
    side = LlamaCppSide(save(SHAPES[0], "Q8_0"))
    whole, some = side.capture(IDS), side.capture(IDS, parse_selection("1.attn_*,lm_head,0.qkv_bias"))
    assert 0 < len(some) < len(whole)
    assert all(np.array_equal(some[key], whole[key]) for key in some)


@foreign
@pytest.mark.parametrize("chunk", [1, 5, 8])
def test_in_pieces(chunk: int, save: Callable[..., Path]) -> None:
    """Token by token and in ragged pieces: the same stages up to the order of sums, the caches whole, and judged clean."""
    path = save(SHAPES[2], "Q8_0")
    pieces, whole = LlamaCppSide(path, chunk=chunk), LlamaCppSide(path)
    captures = pieces.capture(IDS)
    assert np.array_equal(captures["k_cache", 0], captures["k_post_rope", 0])
    assert captures["attn_softmax", 1].shape == (4, 24, 24)
    for key, array in whole.capture(IDS).items():
        assert array.shape == captures[key].shape
        assert np.linalg.norm(array - captures[key]) <= 0.02 * np.linalg.norm(array), key  # one activation's rounding may tip
    assert not wrong(judged(pieces, IDS))


@foreign
def test_threads_and_progress(save: Callable[..., Path]) -> None:
    told: list[float] = []
    one = LlamaCppSide(save(SHAPES[0], "Q4_0"), threads=1).capture(IDS, progress=told.append)
    two = LlamaCppSide(save(SHAPES[0], "Q4_0"), threads=2).capture(IDS)
    assert all(np.array_equal(one[key], two[key]) for key in one)
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert (one.manifest.threads, two.manifest.threads) == (1, 2)


@foreign
def test_text_is_that_of_the_peer(peer: llamacpp.Peer) -> None:
    path = CANARY / "canary.gguf"
    side, told = LlamaCppSide(path), []
    answer = side.generate(PROMPT, 16, told.append)
    assert answer == told == peer.generate(path, PROMPT, 16)[: len(answer)]
    assert side.tokenizer().decode(answer) == " 2+2 is 4."  # and ends there by itself
    assert side.generate(PROMPT, 3) == answer[:3]
    assert side.generate(PROMPT, 0) == []


@foreign
def test_ids_are_checked(save: Callable[..., Path]) -> None:
    side = LlamaCppSide(save(SHAPES[0], "F32"))
    with pytest.raises(ArgumentError, match="id 112"):
        side.capture([1, 112])
    with pytest.raises(ArgumentError, match="empty"):
        side.generate([], 3)
    for options in ({"threads": 0}, {"threads": 513}, {"chunk": 0}):
        with pytest.raises(ArgumentError, match="is needed"):
            LlamaCppSide(side.path, **options)


@foreign
def test_an_unknown_variant_is_refused(save: Callable[..., Path]) -> None:
    with pytest.raises(CannotRun, match="no CPU variant 'z80'"):
        LlamaCppSide(save(SHAPES[0], "F32"), cpu="z80").capture(IDS[:2])


@foreign
def test_a_model_that_it_refuses(peer: llamacpp.Peer, tmp_path: Path) -> None:
    """Heads that do not fill the width: we read it, llama.cpp's qwen2 does not, and says why."""
    path = tiny.save_gguf(tiny.Shape("qwen2"), tmp_path / "m.gguf")
    with pytest.raises(CannotRun, match=r"refuses it: .*blk.0.attn_q.weight"):
        LlamaCppSide(path).capture(IDS[:2])


@foreign
def test_a_death_is_an_error(save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An assertion of ggml in the middle of a run: this process lives on, the message has its last words, and the command ends with 3."""
    script = (
        "import ctypes, sys\n"
        "from aprender.sides import llamacpp_worker as worker\n"
        "def decode(self, *_, **__):\n"
        "    ctypes.CDLL('libggml-base.so').ggml_abort(b'ops.cpp', 17, b'GGML_ASSERT(%s) failed', b'a->ne[0] == 7')\n"
        "worker.Engine.decode = decode\n"
        "worker.main(sys.stdin, sys.stdout)\n"
    )
    path, run_worker = save(SHAPES[0], "F32"), subprocess.Popen

    def other(command: list[str], **options: object) -> subprocess.Popen[str]:
        libraries = {"LD_LIBRARY_PATH": str(find_libraries()), "GGML_NO_BACKTRACE": "1"}
        return run_worker([sys.executable, "-c", script], **(options | {"env": options["env"] | libraries}))

    monkeypatch.setattr(subprocess, "Popen", other)
    with pytest.raises(CannotRun, match=r"ended by signal 6: .*ops\.cpp:17: GGML_ASSERT\(a->ne\[0\] == 7\) failed") as caught:
        LlamaCppSide(path).capture(IDS[:2])
    assert caught.value.code == "DIED"
    assert run.main([f"llama.cpp:{path}", "--prompt-ids", "1,2"]) == 3
    assert "GGML_ASSERT" in capsys.readouterr().err


# ---- clean runs --------------------------------------------------------------------------------------------------------


@foreign
@pytest.mark.parametrize("kind", [*tiny.FORMATS, *K_QUANTS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_clean(shape: tiny.Shape, kind: str, save: Callable[..., Path]) -> None:
    """No alarm at any length; where every bit is declared, every bit is as declared."""
    side, worst = LlamaCppSide(save(wide(shape) if kind in K_QUANTS else shape, kind)), Worst()
    for length in LENGTHS:
        results = judged(side, IDS[:length])
        assert not wrong(results), [(r.key, r.reason) for r in results if r.state == "wrong"]
        assert {r.stage for r in results if r.state == "unmeasured"} == {"rope_table", "ffn_silu"}
        assert all(r.state == "exact" for r in results if r.stage in EXACT)
        worst.add(results)
    worst.say(f"{shape} {kind}")


@foreign
@pytest.mark.parametrize("kind", OTHERS)
def test_clean_in_other_formats(kind: str, save: Callable[..., Path]) -> None:
    side, worst = LlamaCppSide(save(wide(SHAPES[0]), kind)), Worst()
    for length in (1, 5, 24):
        results = judged(side, IDS[:length])
        assert not wrong(results), [(r.key, r.reason) for r in results if r.state == "wrong"]
        worst.add(results)
    worst.say(kind)


@foreign
@pytest.mark.parametrize("cpu", ["x64", "sse42", "sandybridge", "ivybridge", "piledriver", "haswell"])
def test_clean_on_every_variant(cpu: str, save: Callable[..., Path]) -> None:
    """Without fused additions RoPE rounds twice; the two oldest round activations by the reference rule."""
    worst = Worst()
    for kind in ("F32", "Q8_0"):
        side = LlamaCppSide(save(SHAPES[1], kind), cpu=cpu)
        results = judged(side, IDS)
        assert not wrong(results), [(r.key, r.reason) for r in results if r.state == "wrong"]
        worst.add(results)
    worst.say(cpu)


@foreign
@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q8_0"])
def test_running_sums_that_grow_with_every_block(kind: str, save: Callable[..., Path]) -> None:
    """Of a gate that equals its partner silu(g) g is nearly all positive: the offsets of all blocks add up, and cancel with the codes.

    Over 8192 values the roundings of products of random sign are too few for that by 3 (Q4_K); the running sums tell.
    """
    shape = dataclasses.replace(wide(SHAPES[0]), ffn=8192)
    made = tiny.weights(shape)
    for name in [name for name in made if "up_proj" in name]:
        made[name] = made[name.replace("up_proj", "gate_proj")]
    results = judged(LlamaCppSide(save(shape, kind, made, f"coherent-{kind}")), IDS)
    (down,) = (r for r in results if r.stage == "ffn_out")
    print(f"{kind}: rms z {down.z_rms:.2f}, largest {down.z_max:.1f}")
    assert not wrong(results)
    assert down.z_rms is not None
    assert down.z_rms <= 1.3  # what is known as an envelope may not be exceeded by more


@foreign
def test_the_variant_is_part_of_the_arithmetic(save: Callable[..., Path]) -> None:
    """RoPE of a variant without fused additions, judged as if it had them: seen, and there alone."""
    side = LlamaCppSide(save(SHAPES[1], "F32"), cpu="sse42")
    captures = side.capture(IDS)
    said = dict(captures.manifest.arithmetic)
    assert set(said.pop("held")) >= {"eps", "theta", "layers"}
    assert said == {"cpu": "sse42", "fma": False, "half_away": True}
    bare = Captures(captures, dataclasses.replace(captures.manifest, arithmetic={}))
    results = local(bare, ModelData(**side.model_data()), side.profile)
    assert {stage for stage, _ in wrong(results)} == {"q_post_rope", "k_post_rope"}


PROMPTS = ("What is 2+2?", "What is 7 plus 8?", "What is the capital of France?", "What is the opposite of hot?", "Who are you?")


@foreign
def test_the_canary_is_clean(peer: llamacpp.Peer) -> None:
    """Q4_K, Q6_K and what else its mix has, trained weights, several prompts, at once and token by token."""
    path, worst = CANARY / "canary.gguf", Worst()
    for prompt in PROMPTS:
        for chunk in (512, 1) if prompt == PROMPTS[0] else (512,):
            results = judged(LlamaCppSide(path, chunk=chunk), peer.tokenize(path, prompt))
            assert not wrong(results), [(r.key, r.reason) for r in results if r.state == "wrong"]
            worst.add(results)
    worst.say("canary")


@foreign
def test_far_positions(save: Callable[..., Path]) -> None:
    """600 tokens in llama.cpp's own pieces of 512: the angle is iterated, and its error grows with the position."""
    ids, worst = [int(i) for i in np.random.default_rng(2).integers(0, 112, 600)], Worst()
    results = judged(LlamaCppSide(save(SHAPES[2], "Q8_0")), ids)
    assert not wrong(results), [(r.key, r.reason) for r in results if r.state == "wrong"]
    worst.add(results)
    worst.say("600 tokens")


@foreign
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_clean_with_a_cache_of_halves(shape: tiny.Shape, save: Callable[..., Path]) -> None:
    """llama.cpp's own default: keys and values are rounded, and so is what is multiplied with them."""
    side, worst = LlamaCppSide(save(shape, "Q8_0"), cache="f16"), Worst()
    for length in (1, 5, 24):
        captures, model = side.capture(IDS[:length]), ModelData(**side.model_data())
        results = local(captures, model, side.profile)
        assert not wrong(results), [(r.key, r.reason) for r in results if r.state == "wrong"]
        worst.add(results)
    assert captures.manifest.tensors["v_cache", 0].dtype == "float16"
    assert all(r.state == "exact" for r in results if r.stage in EXACT)
    worst.say(f"{shape}, float16 cache")
    as_if = local(captures, model, arithmetic.profile("ggml-cpu"))
    assert {stage for stage, _ in wrong(as_if)} == {"k_cache", "v_cache", "attn_scores", "attention"}


@foreign
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K"])
def test_the_rule_is_needed(kind: str, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged as if activations stayed float32, every product is wrong and nothing else: the rules are what makes it clean."""
    side = LlamaCppSide(save(wide(SHAPES[0]), kind))
    captures, model = side.capture(IDS[:8]), ModelData(**side.model_data())
    monkeypatch.setattr(ggml, "RULES", ggml.RULES | {kind: ggml.RULES["F32"]})
    found = {stage for stage, _ in wrong(local(captures, model, side.profile))}
    assert found == {"qkv_matmul", "attn_out", "ffn_gate", "ffn_up", "ffn_out", "lm_head"}


# ---- faults in the file that it runs -----------------------------------------------------------------------------------


def model_of(path: Path) -> ModelData:
    return ModelData(**OwnSide(path).model_data())


def edited(path: Path, tensor: str, offset: int, change: Callable[[bytes], bytes], size: int = 2) -> Path:
    """A copy of a GGUF with some bytes of a tensor changed."""
    at = next(t for t in gguf.GGUFReader(path).tensors if t.name == tensor).data_offset + offset
    data = bytearray(path.read_bytes())
    data[at : at + size] = change(bytes(data[at : at + size]))
    out = path.with_name(f"{path.stem}-edited.gguf")
    out.write_bytes(data)
    return out


def one_ulp(half: bytes) -> bytes:
    """The next float16 away from zero."""
    return (np.frombuffer(half, np.uint16) + np.uint16(1)).tobytes()


SCALE = {"Q8_0": 0, "Q4_0": 0, "Q5_0": 0, "Q4_1": 0, "Q4_K": 0, "Q6_K": 208}
"""Where a block's float16 scale is."""


@foreign
@pytest.mark.parametrize("length", [1, 4, 24])
@pytest.mark.parametrize("kind", SCALE)
def test_one_block_scale(kind: str, length: int, save: Callable[..., Path]) -> None:
    """The smallest change that the file can hold: one float16 step of the scale of one block, 7e-4 of 32 or 256 weights."""
    right = save(wide(SHAPES[0]), kind)
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    other = edited(right, "blk.0.ffn_gate.weight", 7 * block + SCALE[kind], one_ulp)
    assert not wrong(judged(LlamaCppSide(right), IDS[:length]))
    results = judged(LlamaCppSide(other), IDS[:length], model_of(right))
    assert wrong(results) == [("ffn_gate", 0)]
    seen = next(r for r in results if r.key == ("ffn_gate", 0))
    print(f"{kind}, {length} tokens: max |z| {seen.z_max:.0f}, rms {seen.z_rms:.1f}: {seen.reason}")


FAULTY = {
    "eps": ({"eps": 1e-5}, ("attn_norm", 0), {"attn_norm", "ffn_norm", "final_norm", "q_norm", "k_norm"}),
    "theta": ({"theta": 1e6 * (1 + 1e-5)}, ("q_post_rope", 0), {"q_post_rope", "k_post_rope"}),
}


@foreign
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fault", FAULTY)
def test_hyper_parameters(fault: str, shape: tiny.Shape, save: Callable[..., Path]) -> None:
    changes, first, allowed = FAULTY[fault]
    right = save(shape, "Q8_0")
    other = save(dataclasses.replace(shape, **changes), "Q8_0", name=f"{shape}-{fault}")
    found = wrong(judged(LlamaCppSide(other), IDS, model_of(right)))
    assert found[0] == first
    assert {stage for stage, _ in found} <= allowed


def _swap(made: dict[str, tiny.Array]) -> None:
    rows = made["model.layers.1.mlp.up_proj.weight"]
    rows[[3, 4]] = rows[[4, 3]]


def _no_bias(made: dict[str, tiny.Array]) -> None:
    made["model.layers.1.self_attn.k_proj.bias"][:] = 0


def _bias_ulp(made: dict[str, tiny.Array]) -> None:
    bias = made["model.layers.0.self_attn.v_proj.bias"]
    bias[5] = np.nextafter(bias[5], np.float32(9))


def _norm(made: dict[str, tiny.Array]) -> None:
    made["model.layers.0.post_attention_layernorm.weight"][:] *= np.float32(1 + 1e-5)


def _norm_ulp(made: dict[str, tiny.Array]) -> None:
    weight = made["model.norm.weight"]
    weight[9] = np.nextafter(weight[9], np.float32(9))


def _transposed(made: dict[str, tiny.Array]) -> None:
    name = "lm_head.weight"
    made[name] = np.ascontiguousarray(made[name].T).reshape(made[name].shape)


WEIGHTS: dict[str, tuple[Callable[[dict[str, tiny.Array]], None], Key]] = {
    "swapped rows": (_swap, ("ffn_up", 1)),
    "missing bias": (_no_bias, ("qkv_bias", 1)),
    "one bias one step": (_bias_ulp, ("qkv_bias", 0)),
    "norm weight": (_norm, ("ffn_norm", 0)),
    "norm weight one step": (_norm_ulp, ("final_norm", None)),
    "transposed head": (_transposed, ("lm_head", None)),
}


@foreign
@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
@pytest.mark.parametrize("fault", WEIGHTS)
def test_weights(fault: str, kind: str, save: Callable[..., Path]) -> None:
    """Each is named at its stage and nowhere else."""
    edit, stage = WEIGHTS[fault]
    shape = SHAPES[0]
    made = {name: array.copy() for name, array in tiny.weights(shape).items()}
    edit(made)
    other = save(shape, kind, made, f"{fault.replace(' ', '-')}-{kind}")
    assert wrong(judged(LlamaCppSide(other), IDS, model_of(save(shape, kind)))) == [stage]


@foreign
def test_rows_in_halves(save: Callable[..., Path]) -> None:
    """A Llama whose q rows were never interleaved, as a converter that forgets it writes them: the projection is not the file's."""
    shape = SHAPES[1]
    made = tiny.weights(shape)
    q = "model.layers.0.self_attn.q_proj.weight"
    other = save(shape, "Q8_0", made | {q: tiny.permuted(made[q], shape.heads)}, "twice")
    assert wrong(judged(LlamaCppSide(other), IDS, model_of(save(shape, "Q8_0")))) == [("qkv_matmul", 0)]


# ---- what the worker may not do ----------------------------------------------------------------------------------------


@foreign
def test_attestation_is_recorded(save: Callable[..., Path]) -> None:
    """A capture whose logits differ with and without the callback says so."""
    side = LlamaCppSide(save(SHAPES[0], "F32"))
    script = (
        "import json, sys\n"
        "from aprender.sides import llamacpp_worker as worker\n"
        "plain = worker.Engine.forward\n"
        "def forward(self, ids, chunk, recorder, tell):\n"
        "    out = plain(self, ids, chunk, recorder, tell)\n"
        "    return out if recorder is None else -out\n"
        "worker.Engine.forward = forward\n"
        "worker.main(sys.stdin, sys.stdout)\n"
    )
    run_worker = subprocess.Popen

    def other(command: list[str], **options: object) -> subprocess.Popen[str]:
        return run_worker([sys.executable, "-c", script], **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", other)
        assert side.capture(IDS[:3]).manifest.attestation is False
    assert side.capture(IDS[:3]).manifest.attestation is True


@foreign
def test_a_graph_without_a_node_is_refused(save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes change their names between releases: a stage that should show and does not is an error, never a gap."""
    side = LlamaCppSide(save(SHAPES[0], "F32"))
    script = (
        "import sys\n"
        "from aprender.sides import llamacpp_record, llamacpp_worker as worker\n"
        "llamacpp_record.Sites.find = lambda self, op, name, sources: None\n"
        "worker.main(sys.stdin, sys.stdout)\n"
    )
    run_worker = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: run_worker([sys.executable, "-c", script], **options))
    with pytest.raises(ConfigError, match="no node 'embd GET_ROWS' for embedding and 38 more"):
        side.capture(IDS[:3])


# ---- commands --------------------------------------------------------------------------------------------------------


@foreign
def test_bisect(capsys: pytest.CaptureFixture[str], peer: llamacpp.Peer) -> None:
    """The canary against its recorded Hugging Face stages, and against our engine on the same file."""
    name = f"llama.cpp:{CANARY / 'canary.gguf'}"
    assert bisect.main([name, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["verdict"], said["subject"]["profile"], said["reference"]["profile"]) == ("agree", "ggml-cpu", "hf-f16")
    assert {row["stage"] for row in said["unmeasured"]} == {"rope_table", "ffn_silu"}
    for subject in (name, f"{name}@f16"):
        assert bisect.main([subject, "--against", str(CANARY / "canary.gguf"), "-q"]) == 0
        assert "all 75 judged stages" in capsys.readouterr().out


@foreign
def test_bisect_against_hugging_face(save: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two engines on the same weights, float32: both right, and where they end is told."""
    shape = SHAPES[1]
    folder = tiny.save_hf(shape, tmp_path / "hf")
    words = [f"llama.cpp:{save(shape, 'F32')}", "--against", f"hf:{folder}@float32", "--prompt-ids", ",".join(map(str, IDS)), "--json"]
    assert bisect.main(words) == 0
    said = json.loads(capsys.readouterr().out)
    last = said["stages"][-1]
    assert last["stage"] == "lm_head"
    assert last["quantization"] < 1e-12  # the same weights; eps is a float32 in one file and a decimal in the other
    assert last["rel_l2"] < 1e-5


@foreign
def test_bisect_names_what_an_engine_loaded_wrongly(save: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stages of an engine that says it runs a file, and multiplies with one block of it read wrongly: from a saved trace to the verdict."""
    right = save(wide(SHAPES[0]), "Q4_K")
    other = edited(right, "blk.0.ffn_down.weight", 144 * 5, one_ulp)
    captures = LlamaCppSide(other).capture(IDS[:8])
    claimed = Captures(captures, dataclasses.replace(captures.manifest, model_digest=OwnSide(right).digest))
    save_captures(claimed, tmp_path / "stages")
    assert bisect.main([f"saved:{tmp_path / 'stages'}", "--against", str(right), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["finding"], len(said["wrong"])) == ("operation", 1)
    assert (said["first"]["stage"], said["first"]["layer"], said["first"]["side"]) == ("ffn_out", 0, "subject")
    print(said["sentence"])


@foreign
def test_run_and_trace(capsys: pytest.CaptureFixture[str], tmp_path: Path, peer: llamacpp.Peer) -> None:
    name = f"llama.cpp:{CANARY / 'canary.gguf'}"
    assert run.main([name, "--prompt", PROMPTS[0]]) == 0
    assert capsys.readouterr().out == " 2+2 is 4.\n"
    out = str(tmp_path / "stages")
    assert trace.main([name, "--prompt", PROMPTS[0], "-o", out, "-q"]) == 0
    capsys.readouterr()
    saved = open_captures(out)
    assert saved.manifest.attestation is True
    assert saved.manifest.arithmetic["cpu"] == saved.manifest.tier
    assert bisect.main([f"saved:{out}", "--against", str(CANARY / "canary.gguf"), "-q"]) == 0
    assert "all 75 judged stages" in capsys.readouterr().out  # the file that its digest names is the reference's


def test_a_machine_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert run.main([f"llama.cpp:{CANARY / 'canary.gguf'}", "--prompt", "x"]) == 3
    assert VARIABLE in capsys.readouterr().err
    with pytest.raises(CannotRun, match="names nothing"):
        open_side("llama.cpp:")
    with pytest.raises(UnknownName, match="cannot be kept in 'q8_0', one of f32, f16"):
        open_side("llama.cpp:model.gguf@q8_0")
