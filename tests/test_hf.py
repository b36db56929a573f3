"""Hugging Face as a side: every stage captured where the table says, nothing changed by looking, the mask, the order of sums, refusals.

Models are those of tiny.py; the definitions that captures are held against are written out here in float64 for single operations, so that
neither our engine nor the witness is needed.  Where a value must equal the model's own, the model is asked without hooks.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AttentionMaskInterface  # noqa: E402 (after the skip)

import aprender  # noqa: E402
from aprender import sides, stages  # noqa: E402
from aprender.errors import ArgumentError, CannotRun, ConfigError, UnknownName  # noqa: E402
from aprender.sides import hf_record, torch_order  # noqa: E402
from aprender.sides.hf import HFSide  # noqa: E402
from aprender.sides.hf_record import ATTENTION, Site  # noqa: E402

pytestmark = pytest.mark.foreign

DTYPES = ("float32", "float16", "bfloat16")
IDS = (5, 9, 2, 77, 31, 4, 8, 100, 3)
CANARY = aprender.canary("")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tiny.Shape, Path]:
    root = tmp_path_factory.mktemp("hf")
    return {shape: tiny.save_hf(shape, root / str(shape)) for shape in tiny.SHAPES}


@pytest.fixture(scope="module", params=[(shape, dtype) for shape in tiny.SHAPES for dtype in DTYPES], ids=lambda p: f"{p[0]}-{p[1]}")
def side(request: pytest.FixtureRequest, folders: dict[tiny.Shape, Path]) -> HFSide:
    shape, dtype = request.param
    made = HFSide(str(folders[shape]), dtype)
    made.shape = shape
    made.captured = made.capture(IDS)
    return made


# ---- everything is captured, and looking changes nothing ---------------------------------------


def test_every_stage_of_the_table_in_order(side: HFSide) -> None:
    """Number of stages from the flags of the shape, not from the side; each in the model's own type, exactly."""
    cap = side.captured
    assert side.flags == side.shape.flags
    assert list(cap) == stages.keys(side.shape.flags, side.shape.layers)
    assert all(cap[key].shape == stages.stage(key[0]).dims(side.shape.hparams, len(IDS)) for key in cap)
    assert {note.dtype for note in cap.manifest.tensors.values()} == {side.dtype}
    narrow = {"float32": np.float32, "float16": np.float16}.get(side.dtype)
    for array in cap.values():
        exact = array.astype(narrow) if narrow else (array.view(np.uint32) & 0xFFFF0000).view(np.float32)
        assert np.array_equal(exact, array)


def test_the_path_is_attested(side: HFSide) -> None:
    """Against a model that was never hooked and never knew our attention function."""
    assert side.captured.manifest.attestation is True
    fresh = HFSide(str(side.name), side.dtype)
    with torch.inference_mode():
        theirs = fresh.model(input_ids=torch.tensor([IDS])).logits[0].float().numpy()
    assert np.array_equal(theirs, side.captured.lm_head)
    assert np.array_equal(side.logits(IDS), theirs)


def test_no_hook_is_left_behind(side: HFSide) -> None:
    modules = list(side.model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    assert side.model.config._attn_implementation == "eager"


def test_only_the_product_before_a_fused_bias_is_derived(side: HFSide) -> None:
    """attn_scores count as captured: they are proved to be the bits that the softmax was given."""
    derived = {key[0] for key, note in side.captured.manifest.tensors.items() if note.origin == "derived"}
    assert derived == ({"qkv_matmul"} if side.shape.qkv_bias else set())


def test_the_manifest_says_what_it_is(side: HFSide) -> None:
    said = side.captured.manifest
    assert said.side == f"hf:{side.shape}@{side.dtype}"
    assert (said.arch, said.tokens, said.positions) == (side.shape.arch, IDS, tuple(range(len(IDS))))
    assert said.hparams == side.shape.hparams
    assert said.profile == {"float32": "hf-f32", "float16": "hf-f16", "bfloat16": "hf-bf16"}[side.dtype]
    assert said.arithmetic["inv_freq"] == "float32"  # from_pretrained(dtype=…) keeps it; model.half() would not
    assert "/" not in said.to_json().replace("aprender.captures/1", "")  # no path of this machine


# ---- each value is what its stage means --------------------------------------------------------

# One rounding; for float32 with room for sums of up to 160 terms, each of which rounds.
ULP = {"float32": 2.0**-20, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def close(got: np.ndarray, wanted: np.ndarray, unit: float) -> bool:
    """Within a few roundings of the stage's own size: a swap of two lanes or rows is hundreds of times more."""
    return bool(np.linalg.norm(got - wanted) <= 4 * unit * np.linalg.norm(wanted))


def test_values_are_what_the_rows_say(side: HFSide) -> None:
    """Each captured value against its definition in float64 on the captured inputs."""
    cap, shape, weights, unit = side.captured, side.shape, side.model_data()["weights"], ULP[side.dtype]
    wide = {key: array.astype(np.float64) for key, array in cap.items()}
    q_size, k_size, head = shape.heads * shape.head, shape.kv_heads * shape.head, shape.head
    assert np.array_equal(cap["embedding", None], weights["token_embd", None][list(IDS)])
    table = wide["rope_table", None]
    angles = np.arange(len(IDS))[:, None] * shape.theta ** (-np.arange(0, head, 2) / head)
    assert close(table, np.concatenate([np.cos(angles), np.sin(angles)], axis=1), max(unit, 2.0**-22))
    hidden = wide["embedding", None]
    for layer in range(shape.layers):
        v = {row.name: wide[row.name, layer] for row in stages.STAGES if (row.name, layer) in wide}
        w = {key[0]: weights[key].astype(np.float64) for key in weights if key[1] == layer}
        projected = v["attn_norm"] @ np.concatenate([w["attn_q"], w["attn_k"], w["attn_v"]]).T
        assert close(v["qkv_matmul"], projected, unit)
        if shape.qkv_bias:
            projected += np.concatenate([w["attn_q_bias"], w["attn_k_bias"], w["attn_v_bias"]])
            assert close(v["qkv_bias"], projected, unit)
        last = v["qkv_bias" if shape.qkv_bias else "qkv_matmul"]
        q, k, values = last[:, :q_size], last[:, q_size : q_size + k_size], last[:, q_size + k_size :]
        if shape.arch == "qwen3":
            for name, part in (("q", q), ("k", k)):
                heads = part.reshape(len(IDS), -1, head)
                normed = heads / np.sqrt((heads**2).mean(-1, keepdims=True) + shape.eps) * w[f"attn_{name}_norm"]
                assert close(v[f"{name}_norm"], normed.reshape(part.shape), 2 * unit)
            q, k = v["q_norm"], v["k_norm"]
        for name, part in (("q", q), ("k", k)):
            assert close(v[f"{name}_post_rope"], rotated(part, table, head), 3 * unit)
        assert np.array_equal(v["k_cache"], v["k_post_rope"])
        assert np.array_equal(v["v_cache"], values)
        check_attention(v, shape, unit)
        attention = v["attention"] @ w["attn_output"].T + w.get("attn_output_bias", 0)
        assert close(v["attn_out"], attention, unit)
        assert close(v["post_attn_residual"], hidden + v["attn_out"], unit)
        assert close(v["ffn_gate"], v["ffn_norm"] @ w["ffn_gate"].T, unit)
        assert close(v["ffn_up"], v["ffn_norm"] @ w["ffn_up"].T, unit)
        assert close(v["ffn_silu"], v["ffn_gate"] / (1 + np.exp(-v["ffn_gate"])), unit)
        assert close(v["ffn_swigl"], v["ffn_silu"] * v["ffn_up"], unit)
        assert close(v["ffn_out"], v["ffn_swigl"] @ w["ffn_down"].T, unit)
        hidden = v["post_ffn_residual"]
        assert close(hidden, v["post_attn_residual"] + v["ffn_out"], unit)
    assert close(wide["lm_head", None], wide["final_norm", None] @ weights["output", None].T.astype(np.float64), unit)


def rotated(part: np.ndarray, table: np.ndarray, head: int) -> np.ndarray:
    """RoPE on halves with the captured table."""
    heads = part.reshape(part.shape[0], -1, 2, head // 2)
    cos, sin = (half[:, None] for half in np.split(table, 2, axis=1))
    first, second = heads[:, :, 0], heads[:, :, 1]
    return np.stack([first * cos - second * sin, second * cos + first * sin], axis=2).reshape(part.shape)


def check_attention(v: dict[str, np.ndarray], shape: tiny.Shape, unit: float) -> None:
    """Scores, probabilities and their sum: key head = query head // group, nothing above the diagonal."""
    tokens = v["q_post_rope"].shape[0]
    q = v["q_post_rope"].reshape(tokens, shape.heads, shape.head).transpose(1, 0, 2)
    k, value = (v[name].reshape(tokens, shape.kv_heads, shape.head).transpose(1, 0, 2) for name in ("k_cache", "v_cache"))
    k, value = (np.repeat(part, shape.heads // shape.kv_heads, axis=0) for part in (k, value))
    mask = np.tril(np.ones((tokens, tokens), bool))
    scores = np.where(mask, q @ k.transpose(0, 2, 1) * shape.head**-0.5, 0)
    assert close(v["attn_scores"], scores, 2 * unit)
    assert not v["attn_scores"][:, ~mask].any()
    powers = np.where(mask, np.exp(v["attn_scores"] - v["attn_scores"].max(-1, keepdims=True)), 0)
    assert close(v["attn_softmax"], powers / powers.sum(-1, keepdims=True), 2 * unit)
    assert not v["attn_softmax"][:, ~mask].any()
    mixed = (v["attn_softmax"] @ value).transpose(1, 0, 2).reshape(tokens, -1)
    assert close(v["attention"], mixed, 2 * unit)


def test_weights_are_those_as_loaded(side: HFSide) -> None:
    """The checkpoint's numbers (exact in every type here), by our names; a tied head is the token table."""
    data = side.model_data()
    made = tiny.weights(side.shape)
    assert (data["arch"], data["flags"], data["hparams"]) == (side.shape.arch, side.shape.flags, side.shape.hparams)
    assert len(data["weights"]) == len(made) + side.shape.tied
    for (name, layer), array in data["weights"].items():
        spelled = next(row[3] for row in aprender.sides.hf._core.WEIGHTS if row[0] == name).replace("%d", str(layer))
        spelled = "model.embed_tokens.weight" if spelled == "lm_head.weight" and side.shape.tied else spelled
        assert np.array_equal(array, made[spelled])


# ---- the mask ----------------------------------------------------------------------------------


def sees_the_future(side: HFSide) -> bool:
    """Whether changing the last tokens moves earlier rows, or any probability lies above the diagonal."""
    other = (*IDS[:5], 1, 1, 1, 1)
    a, b = side.capture(IDS), side.capture(other)
    moved = any(
        not np.array_equal(np.take(a[key], range(5), axis), np.take(b[key], range(5), axis))
        for key in a
        for axis in [stages.stage(key[0]).shape.index("T") if "T" in stages.stage(key[0]).shape else 0]
        if key[0] not in ("attn_scores", "attn_softmax")
    )
    above = ~np.tril(np.ones((len(IDS), len(IDS)), bool))
    return moved or any(bool(a[key][:, above].any()) for key in a if key[0] == "attn_softmax")


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_attention_is_causal(folders: dict[tiny.Shape, Path], arch: str) -> None:
    assert not sees_the_future(HFSide(str(folders[tiny.Shape(arch)]), "float32"))


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_the_detector_sees_a_bidirectional_mask(folders: dict[tiny.Shape, Path], arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens when a custom attention name has no mask function: transformers passes none at all.  The attestation sees it as well."""
    side = HFSide(str(folders[tiny.Shape(arch)]), "float32")
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, ATTENTION)
    assert sees_the_future(side)
    assert side.capture(IDS).manifest.attestation is False


def test_the_detector_sees_a_mask_that_is_one_too_wide(folders: dict[tiny.Shape, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """j <= i + 1, the classic off by one."""

    def wide(*args: object, **kwargs: object) -> object:
        mask = hf_record.eager_mask(*args, **kwargs)
        tokens = mask.shape[-1]
        return mask.masked_fill(torch.tril(torch.ones(tokens, tokens, dtype=torch.bool), 1), 0)

    side = HFSide(str(folders[tiny.Shape("llama")]), "float32")
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, ATTENTION, wide)
    assert sees_the_future(side)
    assert side.capture(IDS).manifest.attestation is False


# ---- the proof that scores are what the softmax consumed ---------------------------------------


def test_scores_that_the_softmax_did_not_get_stay_derived(folders: dict[tiny.Shape, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose eager attention caps its scores: the recomputed product is not what its softmax consumes."""
    side = HFSide(str(folders[tiny.Shape("qwen3")]), "float32")
    home = sys.modules[type(side.model.model.layers[0].self_attn).__module__]

    def capped(module: object, q: object, k: object, v: object, mask: object, scaling: float, **_: object) -> tuple[object, object]:
        scores = torch.matmul(q, home.repeat_kv(k, module.num_key_value_groups).transpose(2, 3)) * scaling
        weights = torch.nn.functional.softmax(torch.tanh(scores) + mask, dim=-1)
        return torch.matmul(weights, home.repeat_kv(v, module.num_key_value_groups)).transpose(1, 2).contiguous(), weights

    assert side.capture(IDS).manifest.tensors["attn_scores", 0].origin == "captured"
    monkeypatch.setattr(home, "eager_attention_forward", capped)
    assert side.capture(IDS).manifest.tensors["attn_scores", 0].origin == "derived"


# ---- selections, one token, text ---------------------------------------------------------------


def test_a_selection_changes_no_bit(side: HFSide) -> None:
    some = side.capture(IDS, stages.parse_selection("1.attn_*,0.ffn_silu,lm_head,rope_table"))
    assert set(some) == {key for key in side.captured if stages.parse_selection("1.attn_*,0.ffn_silu,lm_head,rope_table")(key)}
    assert all(np.array_equal(some[key], side.captured[key]) for key in some)


def test_one_token(side: HFSide) -> None:
    cap = side.capture(IDS[:1])
    assert cap["attn_softmax", 0].shape == (side.shape.heads, 1, 1)
    assert (cap["attn_softmax", 0] == 1).all()
    assert cap.manifest.attestation is True


def test_progress_is_told_once_per_layer(folders: dict[tiny.Shape, Path]) -> None:
    told: list[float] = []
    HFSide(str(folders[tiny.Shape()])).capture(IDS, progress=told.append)
    assert told == [0.5, 1.0]


def test_greedy_text_is_that_of_whole_passes(side: HFSide) -> None:
    """The KV cache may round otherwise (other kernels for one token), so each step's choice must be within that noise of the best."""
    answer = side.generate(IDS, 6)
    ids = list(IDS)
    for token in answer:
        last = side.logits(ids)[-1]
        assert last.max() - last[token] <= 64 * ULP[side.dtype] * np.abs(last).max()
        ids.append(token)
    assert len(answer) == 6
    told: list[int] = []
    assert side.generate(IDS, 3, told.append) == told == answer[:3]
    assert side.generate(IDS, 0) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_canary_answers(dtype: str) -> None:
    canary = HFSide(CANARY, dtype)
    tokenizer = canary.tokenizer()
    assert tokenizer is not None
    answer, margin = canary.answer(tokenizer.encode("What is 2+2?"), 16)
    assert tokenizer.decode(answer) == " 2+2 is 4."  # and ends there by itself: 8 of 16
    assert margin is not None
    assert margin > 1.5  # 1.83 in float32, data/canary/README.md


def test_logits_that_are_not_finite_give_no_answer(folders: dict[tiny.Shape, Path]) -> None:
    side = HFSide(str(folders[tiny.Shape()]), "float16")
    with torch.no_grad():
        side.model.model.norm.weight[3] = float("nan")
    assert side.capture(IDS).manifest.tensors["lm_head", None].nonfinite == len(IDS) * tiny.Shape().vocab
    with pytest.raises(CannotRun, match="not finite"):
        side.generate(IDS, 4)


@pytest.mark.parametrize("ids", [(), (5, 112), (-1,)])
def test_ids_are_checked(folders: dict[tiny.Shape, Path], ids: tuple[int, ...]) -> None:
    side = HFSide(str(folders[tiny.Shape()]))
    with pytest.raises(ArgumentError, match=r"empty|112|-1"):
        side.capture(ids)
    with pytest.raises(ArgumentError):
        side.generate(ids, 1)


# ---- the order of sums -------------------------------------------------------------------------


def ordered(block: int) -> torch_order.Product:
    """A product that adds in order within blocks, as if it were this machine's library."""
    return lambda x, w: torch.from_numpy(torch_order.emulate(x.numpy(), w.numpy(), block))


def separate(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Each product rounded, then added, in order."""
    total = torch.zeros(x.shape[0], w.shape[0])
    for k in range(x.shape[1]):
        total = total + x[:, k : k + 1] * w[:, k]
    return total


def lanes(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Four interleaved sums: no blocks in order."""
    products = x[:, None] * w
    parts = [products[:, :, lane::4] for lane in range(4)]
    sums = [torch.stack([part[:, :, : i + 1].sum(-1) for i in range(part.shape[-1])])[-1] for part in parts]
    return (sums[0] + sums[2]) + (sums[1] + sums[3])


@pytest.mark.parametrize("block", [1, 2, 7, 32, 48, 64, 96])
def test_a_block_length_is_found(block: int) -> None:
    assert torch_order.block_length(5, 96, 40, ordered(block)) == block


def test_products_that_are_rounded_by_themselves_are_blocks_of_one() -> None:
    assert torch_order.block_length(5, 96, 40, separate) == 1


def test_an_order_that_is_not_proved_is_not_claimed() -> None:
    """Interleaved sums show at the first look; a product in half precision has the right order and the wrong bits."""
    assert torch_order.block_length(5, 96, 40, lanes) is None
    assert torch_order.block_length(5, 96, 40, lambda x, w: ordered(32)(x, w).bfloat16().float()) is None


def test_one_row_of_another_order_spoils_the_claim() -> None:
    def mixed(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = ordered(32)(x, w)
        out[0] = ordered(48)(x[:1], w)[0]
        return out

    assert torch_order.block_length(5, 96, 40, mixed) is None


def test_products_that_disagree_leave_their_length_open() -> None:
    found = torch_order.identify([(ordered(32), 5, 96, 40), (ordered(48), 5, 96, 24), (ordered(32), 5, 64, 40)])
    assert found == {"Kc": {"64": 32, "96": None}, "rows": 5}
    assert torch_order.identify([(lanes, 5, 96, 40)]) == "envelope"


def test_what_is_found_here_holds_for_the_captures(folders: dict[tiny.Shape, Path]) -> None:
    """24 tokens, float32: wherever an order was identified on this machine, a captured projection has its very bits."""
    shape = tiny.Shape("llama")
    side = HFSide(str(folders[shape]), "float32")
    ids = [int(token) for token in np.random.default_rng(1).integers(0, shape.vocab, 24)]
    cap, weights = side.capture(ids), side.model_data()["weights"]
    found = cap.manifest.arithmetic["matmul"]
    blocks = {} if found == "envelope" else {int(k): block for k, block in found["Kc"].items() if block}
    checked = 0
    for stage, source, weight, k in (
        ("ffn_gate", "ffn_norm", "ffn_gate", 64), ("attn_out", "attention", "attn_output", 96), ("ffn_out", "ffn_swigl", "ffn_down", 160),
    ):  # fmt: skip
        if k in blocks:
            assert np.array_equal(cap[stage, 1], torch_order.emulate(cap[source, 1], weights[weight, 1], blocks[k])), stage
            checked += 1
    # On a machine whose torch adds in no blocks nothing is claimed; what is claimed must be bits, and was just checked.
    assert checked or found == "envelope" or not {64, 96, 160} & blocks.keys()


def test_half_types_leave_the_order_open(folders: dict[tiny.Shape, Path]) -> None:
    for dtype in ("float16", "bfloat16"):
        assert HFSide(str(folders[tiny.Shape()]), dtype).arithmetic(24)["matmul"] == "envelope"


# ---- the table's column, and refusals ----------------------------------------------------------


@pytest.mark.parametrize("row", stages.STAGES, ids=lambda row: row.name)
def test_every_site_of_the_table_is_understood(row: stages.Stage) -> None:
    """A new row whose site the recorder does not know is red here, not silently unmeasured."""
    site = Site.parse(row.hf, 0)
    assert site.kind in hf_record._HOOKS or row.op in hf_record._DERIVED
    assert all("{" not in path and path.count(".") < 8 for path in site.where)


def test_sites_spell_the_shared_path_out() -> None:
    found = Site.parse("cat:model.layers.{i}.self_attn.q_proj,k_proj", 7).where
    assert found == ("model.layers.7.self_attn.q_proj", "model.layers.7.self_attn.k_proj")


def test_a_module_that_does_not_exist_is_named(folders: dict[tiny.Shape, Path]) -> None:
    side = HFSide(str(folders[tiny.Shape()]))
    del side.model.model.layers[1].mlp.act_fn
    side.model.model.layers[1].mlp.act_fn = torch.nn.functional.silu
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.act_fn"):
        side.capture(IDS)


@pytest.mark.parametrize(
    ("arch", "more", "word"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}}, "RoPE scaling"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}, "sliding-window"),
    ],
)
def test_what_the_table_does_not_describe_is_refused(tmp_path: Path, arch: str, more: dict[str, object], word: str) -> None:
    tiny.save_hf(tiny.Shape(arch), tmp_path, **more)
    with pytest.raises(ConfigError, match=word):
        HFSide(str(tmp_path))


def edit(path: Path, **more: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def test_bad_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    """transformers would fill a missing tensor with random numbers, and ignore one that is left over."""
    shape = tiny.Shape("llama")
    tiny.save_hf(shape, tmp_path / "m")
    edit(tmp_path / "m" / "config.json", attention_bias=True)
    with pytest.raises(ConfigError, match="missing"):
        HFSide(str(tmp_path / "m"))
    tiny.save_hf(tiny.Shape("llama", attention_bias=True), tmp_path / "m")
    edit(tmp_path / "m" / "config.json", attention_bias=False)
    with pytest.raises(ConfigError, match=r"left over.*bias"):
        HFSide(str(tmp_path / "m"))
    edit(tmp_path / "m" / "config.json", attention_bias=True, mlp_bias=True)
    with pytest.raises(ConfigError, match="mlp"):
        HFSide(str(tmp_path / "m"))
    edit(tmp_path / "m" / "config.json", mlp_bias=False, intermediate_size=96)
    with pytest.raises((ConfigError, CannotRun), match=r"m: "):
        HFSide(str(tmp_path / "m"))
    edit(tmp_path / "m" / "config.json", intermediate_size=160, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises((ConfigError, CannotRun), match="GPTQ"):
        HFSide(str(tmp_path / "m"))


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="'gpt2' is not known"):
        HFSide(str(tmp_path))


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}')
    (tmp_path / "evil.py").write_text("open(__file__ + '.ran', 'w')\n")
    with pytest.raises(CannotRun):
        HFSide(str(tmp_path))
    assert not (tmp_path / "evil.py.ran").exists()


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    tiny.save_hf(tiny.Shape(), tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CannotRun, match="safetensors"):
        HFSide(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "nowhere/"])
def test_a_folder_that_is_not_there(name: str) -> None:
    with pytest.raises(CannotRun, match="no such folder"):
        HFSide(name)


def test_a_folder_or_file_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CannotRun, match=r"no config\.json"):
        HFSide(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CannotRun):
        HFSide(str(tmp_path))
    with pytest.raises(CannotRun, match="is a file"):
        HFSide(str(tmp_path / "config.json"))


def test_offline_is_one_clear_line() -> None:
    """A hub name without network: in a fresh process, because the hub reads its switches on import."""
    code = """if True:
        from aprender.sides import open_side
        from aprender.errors import CannotRun
        try:
            open_side('hf:org/no-such-model')
        except CannotRun as problem:
            print(problem)
    """
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.startswith("org/no-such-model: no folder here, and no model of that name can be reached")
    assert done.stdout.count("\n") == 1


def test_a_model_of_the_hub_is_read_from_the_cache(tmp_path: Path) -> None:
    """The canary, laid out as the hub's cache lays out org/canary: found by name without network, with its tokenizer and digest."""
    snapshot = tmp_path / "models--org--canary" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for path in Path(CANARY).glob("*.*"):
        if path.suffix in (".json", ".safetensors"):
            (snapshot / path.name).symlink_to(path)
    (tmp_path / "models--org--canary" / "refs").mkdir()
    (tmp_path / "models--org--canary" / "refs" / "main").write_text("0" * 40)
    code = """if True:
        from aprender.sides import open_side
        side = open_side('hf:org/canary')
        said = side.capture(side.tokenizer().encode('What is 2+2?')).manifest
        print(said.side, said.model_digest, side.tokenizer().decode(side.generate(said.tokens, 16)))
    """
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True, check=True, timeout=120)
    digest = hashlib.sha256((Path(CANARY) / "model.safetensors").read_bytes()).hexdigest()
    assert done.stdout == f"hf:org/canary@float16 {digest}  2+2 is 4.\n"
    assert done.stderr == ""


# ---- the spelling ------------------------------------------------------------------------------


def test_spellings(folders: dict[tiny.Shape, Path]) -> None:
    folder = folders[tiny.Shape()]
    assert sides.open_side(f"hf:{folder}").dtype == "float16"
    assert sides.open_side(f"hf:{folder}@bfloat16").profile.name == "hf-bf16"
    assert sides.open_side(f"hf:{folder}@float32").spelling == f"hf:{folder}@float32"
    with pytest.raises(UnknownName, match="no dtype 'int4'"):
        sides.open_side(f"hf:{folder}@int4")
    with pytest.raises(UnknownName, match="did you mean 'saved'"):
        sides.open_side("save:folder")
    with pytest.raises(CannotRun, match="names nothing"):
        sides.open_side("hf:")


def test_without_torch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aprender.sides.hf", None)
    with pytest.raises(CannotRun, match=r"pip install 'aprender\[hf\]'"):
        sides.open_side(f"hf:{CANARY}")
