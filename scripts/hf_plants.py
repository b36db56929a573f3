"""The bugs of the catalogue, put into real transformers models: a parameter, a buffer or a module attribute changed, a forward replaced.

Owns the plants, written from the bug reports and from transformers' own source; they share nothing with ``judge.faults`` but the names and
the stages where each may sit, and nothing with our engine.  Refuses to judge.  Called by ``matrix_hf``: a plant changes a model that was
loaded for it alone; what it must change in a module of transformers (a function that all layers share) is put back at the end.

The parts of a layer are transformers': ``self_attn.{q,k,v,o}_proj``, ``mlp.{gate,up,down}_proj``, ``act_fn``, ``input_layernorm`` and
``post_attention_layernorm``.
"""

from __future__ import annotations

import contextlib
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers.activations import QuickGELUActivation
from transformers.cache_utils import DynamicCache

Key = tuple[str, int | None]
Install = Callable[["Site"], None]


@dataclass
class Site:
    """Where a plant goes.

    Attributes
    ----------
    model : module
        A causal language model, to be changed.
    stage, layer : str, int or None
    undo : ExitStack
        What has to be put back.
    """

    model: Any
    stage: str
    layer: int | None
    undo: contextlib.ExitStack

    @property
    def block(self) -> Any:
        """The decoder layer."""
        return self.model.model.layers[self.layer]

    @property
    def attn(self) -> Any:
        """Its attention."""
        return self.block.self_attn

    @property
    def home(self) -> Any:
        """The module of transformers that the model's code is in."""
        return sys.modules[type(self.model).__module__]

    def replace(self, name: str, value: Any) -> None:
        """Another function in the place of one that the model's code calls by name."""
        self.undo.enter_context(mock.patch.object(self.home, name, value))


def forward(module: Any, function: Callable[..., Any]) -> None:
    """Another forward for one module; hooks on it go on."""
    module.forward = types.MethodType(function, module)


def after(module: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The module's own forward, and then something done to what it gives."""
    own = module.forward
    module.forward = lambda *args, **more: change(own(*args, **more))


# ---- parameters ------------------------------------------------------------------------------------------------------------------------

LINEAR: Mapping[str, tuple[str, ...]] = {
    "qkv_matmul": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_out": ("self_attn.o_proj",),
    "ffn_gate": ("mlp.gate_proj",),
    "ffn_up": ("mlp.up_proj",),
    "ffn_out": ("mlp.down_proj",),
    "lm_head": ("lm_head",),
}
NORMS: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "final_norm": "model.norm",
}
OTHER_NORM = {"attn_norm": "ffn_norm", "ffn_norm": "attn_norm", "q_norm": "k_norm", "k_norm": "q_norm"}


def at(site: Site, path: str) -> Any:
    """A module of the layer, or of the model if the site has no layer."""
    return (site.model if site.layer is None else site.block).get_submodule(path)


def linears(site: Site) -> list[Any]:
    """The projections of a stage."""
    return [at(site, path) for path in LINEAR[site.stage]]


def norm(site: Site, stage: str | None = None) -> Any:
    """The norm of a stage."""
    return at(site, NORMS[stage or site.stage])


def weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Install:
    """Something done to each matrix of a stage."""

    def install(site: Site) -> None:
        for module in linears(site):
            module.weight.data = change(module.weight.data).contiguous()

    return install


def read_as_columns(w: torch.Tensor) -> torch.Tensor:
    """What lies in memory as [out, in] taken for [in, out]."""
    return w.reshape(w.shape[1], w.shape[0]).T


def interleave(w: torch.Tensor, size: int) -> torch.Tensor:
    """Rows of each head as a converter for the other rotation orders them: first half and second half by turns."""
    heads = w.reshape(-1, size, *w.shape[1:])
    return torch.stack([heads[:, : size // 2], heads[:, size // 2 :]], dim=2).reshape(w.shape)


def permute_qk(site: Site) -> None:
    """Queries and keys as for neighbours; their biases stay."""
    for module in (site.attn.q_proj, site.attn.k_proj):
        module.weight.data = interleave(module.weight.data, site.attn.head_dim)


def swap_kv(site: Site) -> None:
    """The two weights change places; their biases stay."""
    k, v = site.attn.k_proj.weight, site.attn.v_proj.weight
    k.data, v.data = v.data.clone(), k.data.clone()


def head_from_table(site: Site) -> None:
    """As if the embeddings were tied."""
    site.model.lm_head.weight.data = site.model.model.embed_tokens.weight.data.clone()


def from_first_layer(site: Site) -> None:
    """A loop that does not advance its index."""
    for path in LINEAR[site.stage]:
        at(site, path).weight.data = site.model.model.layers[0].get_submodule(path).weight.data.clone()


def double_block(w: torch.Tensor) -> torch.Tensor:
    """Blocks of 32 columns: the one in the middle of the middle row is twice as large."""
    blocks = w.clone().reshape(w.shape[0], -1, 32)
    blocks[w.shape[0] // 2, blocks.shape[1] // 2] *= 2
    return blocks.reshape(w.shape)


def first_scale(w: torch.Tensor) -> torch.Tensor:
    """Super-blocks of 256: each block of 32 as large as the first is."""
    blocks = w.reshape(w.shape[0], -1, 8, 32)
    top = blocks.float().abs().amax(dim=-1, keepdim=True)
    return (blocks * (top[:, :, :1] / top).to(w.dtype)).reshape(w.shape)


def keep_columns(w: torch.Tensor) -> torch.Tensor:
    """Only the first half of each row was decoded."""
    return torch.cat([w[:, : w.shape[1] // 2], torch.zeros_like(w[:, w.shape[1] // 2 :])], dim=1)


def keep_rows(w: torch.Tensor) -> torch.Tensor:
    """The last quarter was never written."""
    return torch.cat([w[: len(w) * 3 // 4], torch.zeros_like(w[len(w) * 3 // 4 :])])


def biases(factor: float) -> Install:
    """The bias of a projection, that many times."""

    def install(site: Site) -> None:
        paths = LINEAR["qkv_matmul" if site.stage == "qkv_bias" else site.stage]
        for module in (at(site, path) for path in paths):
            module.bias.data = module.bias.data * factor

    return install


def larger_eps(site: Site) -> None:
    """1e-5, a default of another family, for 1e-6."""
    norm(site).variance_epsilon = 1e-5


def one_plus(site: Site) -> None:
    """A family that stores w - 1."""
    module = norm(site)
    module.weight.data = module.weight.data + 1


def swap_norm(site: Site) -> None:
    """The other norm's weight."""
    norm(site).weight.data = norm(site, OTHER_NORM[site.stage]).weight.data.clone()


def scaled_table(site: Site) -> None:
    """The root of the width, as Gemma has it; 16 of 256."""
    after(site.model.model.embed_tokens, lambda x: x * math.sqrt(site.model.config.hidden_size))


# ---- positions -------------------------------------------------------------------------------------------------------------------------


def base(site: Site) -> None:
    """The frequencies of theta 1e4, as when config.json's is not read."""
    rotary = site.model.model.rotary_emb
    size = 2 * len(rotary.inv_freq)
    rotary.inv_freq = 1.0 / (1e4 ** (torch.arange(0, size, 2, dtype=torch.float) / size))


def standing(site: Site) -> None:
    """Every token at position 0."""
    rotary = site.model.model.rotary_emb
    own = rotary.forward
    rotary.forward = lambda x, position_ids: own(x, torch.zeros_like(position_ids))


def rotation(turn: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Install:
    """Another rotation in one layer: ``turn(site, right, q, k, cos, sin)``."""

    def install(site: Site) -> None:
        right, here = site.home.apply_rotary_pos_emb, inside(site)

        def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **more: Any) -> Any:
            return turn(site, right, q, k, cos, sin) if here() else right(q, k, cos, sin, **more)

        site.replace("apply_rotary_pos_emb", rotate)

    return install


def inside(site: Site) -> Callable[[], bool]:
    """Whether the planted layer's attention is being computed."""
    running: list[bool] = []
    own = site.attn.forward

    def watched(*args: Any, **more: Any) -> Any:
        running.append(True)
        try:
            return own(*args, **more)
        finally:
            running.pop()

    site.attn.forward = watched
    return lambda: bool(running)


def one_of(site: Site, right: Any, wrong: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Only what the site names is wrong: queries or keys."""
    return (wrong[0], right[1]) if site.stage == "q_post_rope" else (right[0], wrong[1])


def neighbours(site: Site, right: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    """Pairs (2i, 2i + 1), as GPT-J rotates."""
    half = cos.shape[-1] // 2
    c, s = (part[..., :half].repeat_interleave(2, dim=-1).unsqueeze(1) for part in (cos, sin))

    def turned(x: torch.Tensor) -> torch.Tensor:
        other = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        return x * c + other * s

    return one_of(site, right(q, k, cos, sin), (turned(q), turned(k)))


def shifted(by: int, both: bool = False) -> Callable[..., Any]:
    """The table of other positions, for queries or keys or both."""

    def turn(site: Site, right: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        positions = torch.arange(by, by + q.shape[2])[None]
        wrong = right(q, k, *type(site.model.model.rotary_emb).forward(site.model.model.rotary_emb, q, positions))
        return wrong if both else one_of(site, right(q, k, cos, sin), wrong)

    return turn


def rotate_values(site: Site) -> None:
    """A fused kernel that rotates all three."""
    right, here, table = site.home.apply_rotary_pos_emb, inside(site), []

    def remember(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **more: Any) -> Any:
        table[:] = [cos, sin]
        return right(q, k, cos, sin, **more)

    update = DynamicCache.update

    def written(cache: Any, k: torch.Tensor, v: torch.Tensor, *args: Any, **more: Any) -> Any:
        return update(cache, k, right(v, v, *table)[0] if here() else v, *args, **more)

    site.replace("apply_rotary_pos_emb", remember)
    site.undo.enter_context(mock.patch.object(DynamicCache, "update", written))


# ---- attention -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attend:
    """Eager attention as transformers writes it, with one thing changed.

    Attributes
    ----------
    shared : callable
        Keys or values [1, KV, J, h] and the group size to [1, H, J, h]; of ``of``: ``key``, ``value`` or none.
    scores, weights, out : callable
        Of the scaled scores, the probabilities, the result [1, H, T, h].
    mask : callable
        Of the visible pairs [T, J].
    keys_twice : bool
        Keys where values are meant.
    """

    shared: Callable[[torch.Tensor, int], torch.Tensor] | None = None
    of: str = ""
    scores: Callable[[torch.Tensor], torch.Tensor] = torch.clone
    weights: Callable[[torch.Tensor], torch.Tensor] = torch.clone
    out: Callable[[torch.Tensor], torch.Tensor] = torch.clone
    mask: Callable[[torch.Tensor], torch.Tensor] | None = None
    keys_twice: bool = False

    def __call__(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``eager_attention_forward``."""
        groups = module.num_key_value_groups

        def repeated(x: torch.Tensor, name: str) -> torch.Tensor:
            return self.shared(x, groups) if self.shared and name == self.of else x.repeat_interleave(groups, dim=1)

        s = self.scores(torch.matmul(query, repeated(key, "key").transpose(2, 3)) * scaling)
        if self.mask is not None:
            mask = additive(self.mask(torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()), s.dtype)
        s = s if mask is None else s + mask
        p = self.weights(nn.functional.softmax(s, dim=-1, dtype=torch.float32).to(query.dtype))
        made = torch.matmul(p, repeated(key if self.keys_twice else value, "value"))
        return self.out(made).transpose(1, 2).contiguous(), p


def attention(changed: Attend, **sited: Attend) -> Install:
    """Another attention in one layer; ``sited`` by stage where it depends on that."""

    def install(site: Site) -> None:
        right, layer, attend = site.home.eager_attention_forward, site.layer, sited.get(site.stage, changed)

        def function(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **more: Any) -> Any:
            if module.layer_idx != layer:
                return right(module, query, key, value, mask, scaling=scaling, **more)
            return attend(module, query, key, value, mask, scaling)

        site.replace("eager_attention_forward", function)

    return install


def additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as transformers adds it."""
    return torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)[None, None]


def seen(change: Callable[[torch.Tensor], torch.Tensor]) -> Install:
    """One attention is given another mask: the visible pairs [T, J], changed."""

    def install(site: Site) -> None:
        own = site.attn.forward

        def masked(*args: Any, hidden_states: torch.Tensor, attention_mask: Any = None, **more: Any) -> Any:
            tokens = hidden_states.shape[1]
            wrong = additive(change(torch.ones(tokens, tokens, dtype=torch.bool).tril()), hidden_states.dtype)
            return own(*args, hidden_states=hidden_states, attention_mask=wrong, **more)

        site.attn.forward = masked

    return install


def tiled(x: torch.Tensor, groups: int) -> torch.Tensor:
    """``tile`` for ``repeat_interleave``: head n reads n mod KV."""
    return x.repeat(1, groups, 1, 1)


def only_first(x: torch.Tensor, groups: int) -> torch.Tensor:
    """As multi-query attention: one key head for all."""
    return x[:, :1].expand(-1, x.shape[1] * groups, -1, -1)


def scale(change: Callable[[float], float]) -> Install:
    """Another ``scaling`` of one attention."""

    def install(site: Site) -> None:
        site.attn.scaling = change(site.attn.scaling)

    return install


def without_head(x: torch.Tensor) -> torch.Tensor:
    """The second head is never written."""
    return x.index_fill(1, torch.tensor([1]), 0)


def as_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """Through bfloat16 and back."""
    return x.bfloat16().to(x.dtype)


# ---- feed-forward, residuals, buffers --------------------------------------------------------------------------------------------------


def activation(made: Callable[[], Any]) -> Install:
    """Another activation in one layer."""

    def install(site: Site) -> None:
        site.block.mlp.act_fn = made()

    return install


def gate_for_up(site: Site) -> None:
    """The activation is of the wrong half."""
    forward(site.block.mlp, lambda mlp, x: mlp.down_proj(mlp.act_fn(mlp.up_proj(x)) * mlp.gate_proj(x)))


def residual(first: str, second: str) -> Install:
    """The layer's forward with other residuals: ``first`` at post_attn_residual, ``second`` at post_ffn_residual.

    ``hidden`` is what entered the layer, ``normed`` what the norm before the branch gave, ``nothing`` is none.
    """

    def install(site: Site) -> None:
        names = first if site.stage == "post_attn_residual" else "", second if site.stage == "post_ffn_residual" else ""

        def layer(block: Any, hidden_states: torch.Tensor, **more: Any) -> torch.Tensor:
            normed = block.input_layernorm(hidden_states)
            branch, _ = block.self_attn(hidden_states=normed, **more)
            taken = {"": hidden_states, "normed": normed}
            middle = taken[names[0]] + branch if names[0] != "nothing" else branch
            normed = block.post_attention_layernorm(middle)
            branch = block.mlp(normed)
            taken = {"": middle, "normed": normed, "hidden": hidden_states}
            return taken[names[1]] + branch if names[1] != "nothing" else branch

        forward(site.block, layer)

    return install


def stale(x: torch.Tensor) -> torch.Tensor:
    """The last row holds what the one before it does."""
    return torch.cat([x[:, :-1], x[:, -2:-1]], dim=1)


def broken(x: torch.Tensor) -> torch.Tensor:
    """One NaN, in the last row."""
    out = x.clone()
    out[:, -1, 0] = math.nan
    return out


def outputs(change: Callable[[torch.Tensor], torch.Tensor]) -> Install:
    """Something done to what each projection of a stage gives."""

    def install(site: Site) -> None:
        for module in linears(site):
            after(module, change)

    return install


# ---- the rows --------------------------------------------------------------------------------------------------------------------------

ROTATED = ("q_post_rope", "k_post_rope")
RESIDUALS = ("post_attn_residual", "post_ffn_residual")
LAYERED = tuple(stage for stage in LINEAR if stage != "lm_head")
SHORTER = ("float32",)
"""What a shorter format would lose is lost already where the model is in it."""


@dataclass(frozen=True)
class Plant:
    """How a model gets a fault: the stages where it may sit, and the change.

    Attributes
    ----------
    at : tuple of str
    install : callable
    dtypes : tuple of str
        In which it is a fault; empty is all.
    first_layer : int
    biased : tuple of str
        Of ``at``, those where only a model with ``attention_bias`` can have it.
    """

    at: tuple[str, ...]
    install: Install
    dtypes: tuple[str, ...] = ()
    first_layer: int = 0
    biased: tuple[str, ...] = ()


PLANTS: Mapping[str, Plant] = {
    "transposed": Plant(tuple(LINEAR), weights(read_as_columns)),
    "qk-permuted": Plant(("qkv_matmul",), permute_qk),
    "kv-swap": Plant(("qkv_matmul",), swap_kv),
    "embed-head": Plant(("lm_head",), head_from_table),
    "zero-lm-head": Plant(("lm_head",), weights(torch.zeros_like)),
    "first-layer": Plant(LAYERED, from_first_layer, first_layer=1),
    "block": Plant(tuple(LINEAR), weights(double_block)),
    "sub-scales": Plant(tuple(LINEAR), weights(first_scale), SHORTER),
    "cut-columns": Plant(tuple(LINEAR), weights(keep_columns)),
    "cut-rows": Plant(tuple(LINEAR), weights(keep_rows)),
    "embedding-scale": Plant(("embedding",), scaled_table),
    "eps": Plant(tuple(NORMS), larger_eps),
    "norm-plus-one": Plant(tuple(NORMS), one_plus),
    "norm-swap": Plant(tuple(OTHER_NORM), swap_norm),
    "no-bias": Plant(("qkv_bias", "attn_out"), biases(0), biased=("attn_out",)),
    "bias-twice": Plant(("qkv_bias", "attn_out"), biases(2), biased=("attn_out",)),
    "rope-pairs": Plant(ROTATED, rotation(neighbours)),
    "theta": Plant(("rope_table",), base),
    "no-rope": Plant(("rope_table",), standing),
    "pos-from-one": Plant(("q_post_rope",), rotation(shifted(1))),
    "keys-behind": Plant(("k_post_rope",), rotation(shifted(-1))),
    "gqa-tile": Plant(("attn_scores", "attention"), attention(Attend(tiled, "key"), attention=Attend(tiled, "value"))),
    "gqa-first": Plant(("attn_scores", "attention"), attention(Attend(only_first, "key"), attention=Attend(only_first, "value"))),
    "no-scale": Plant(("attn_scores",), scale(lambda _: 1.0)),
    "scale-base": Plant(("attn_scores",), scale(lambda s: s * 1.061)),
    "f16-scores": Plant(("attn_scores",), attention(Attend(scores=lambda s: s.half().float())), SHORTER),
    "bf16-softmax": Plant(("attn_softmax",), attention(Attend(weights=as_bfloat16)), SHORTER),
    "mask-next": Plant(("attn_softmax",), seen(lambda pairs: torch.ones_like(pairs).tril(1))),
    "mask-self": Plant(("attn_softmax",), attention(Attend(mask=lambda pairs: pairs.tril(-1)))),
    "no-mask": Plant(("attn_softmax",), seen(torch.ones_like)),
    "window": Plant(("attn_softmax",), attention(Attend(mask=lambda pairs: pairs.triu(-3)))),
    "rope-on-v": Plant(("v_cache",), rotate_values),
    "keys-as-values": Plant(("attention",), attention(Attend(keys_twice=True))),
    "lost-head": Plant(("attention",), attention(Attend(out=without_head))),
    "gelu": Plant(("ffn_silu",), activation(lambda: nn.GELU(approximate="tanh"))),
    "quick-gelu": Plant(("ffn_silu",), activation(QuickGELUActivation)),
    "gate-up": Plant(("ffn_silu",), gate_for_up),
    "no-residual": Plant(RESIDUALS, residual("nothing", "nothing")),
    "stale-residual": Plant(("post_ffn_residual",), residual("", "hidden")),
    "normed-residual": Plant(RESIDUALS, residual("normed", "normed")),
    "stale-row": Plant(tuple(LINEAR), outputs(stale)),
    "nan": Plant(("ffn_out", "lm_head"), outputs(broken)),
    "shift": Plant(("q_post_rope",), rotation(shifted(7, both=True))),
}
"""Row of the catalogue to how a model gets it.  Right models have eps 1e-6 and theta 1e6, and see every key up to their own."""


@contextlib.contextmanager
def planted(model: Any, name: str, key: Key) -> Iterator[None]:
    """A model with a fault in it; it stays changed, but the code of transformers does not."""
    with contextlib.ExitStack() as undo, torch.no_grad():
        PLANTS[name].install(Site(model, *key, undo))
        yield
