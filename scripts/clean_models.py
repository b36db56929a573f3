"""Models and prompts on which nothing is wrong: ordinary ones, and ones that are hard on a variance formula.

Owns the models of ``clean_runs.py``: how the random weights of ``tests/tiny.py`` and the trained weights of the embedded model are bent
(massive channels, products that do not cancel, zeros, subnormals, values just below the end of float16, large biases that cancel), and the
prompts for each.  Refuses nothing: every model here is a right one, and whoever runs it as declared must be found clean.

A model is a :class:`Material`: a shape, weights by their Hugging Face names, prompts.  :data:`KINDS` has one row per kind of model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import canary_corpus
import numpy as np
from matrix_models import ROOT, tiny
from numpy.typing import NDArray

Array = NDArray[np.float32]
Made = dict[str, Array]
Bend = Callable[[Made, tiny.Shape, np.random.Generator], None]

CANARY = ROOT / "aprender" / "data" / "canary"
CANARY_SHAPE = tiny.Shape("qwen2", layers=4, dim=256, ffn=512, heads=8, kv_heads=2, head=32, vocab=640, context=512)

WIDE = {"dim": 256, "ffn": 512, "heads": 8, "kv_heads": 2, "head": 32}
"""Sizes that blocks of 256 divide."""

LENGTHS = (1, 2, 3, 5, 7, 8, 13, 16, 24, 40)
"""Tokens at which the kernels of torch and ggml change: vector or matrix, panels of 4 and 8, and what is left over."""

TEXTS = 20
"""Texts for the trained weights."""

REPEATED = 24
"""Length of a prompt in which tokens come again."""

MARKED = 8
"""The first ids: whose rows of the token table are bent, and which every prompt has some of."""

NORMS: Mapping[str, tuple[str, ...]] = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""A norm of a layer to the products that read it."""


@dataclass(frozen=True)
class Material:
    """A right model, and what to ask it.

    Attributes
    ----------
    kind : str
        A row of :data:`KINDS`.
    seed : int
    shape : Shape
    made : dict
        Hugging Face name to float32 array.
    prompts : tuple of tuple of int
    file : Path or None
        A file that holds it as it is, where there is one.
    """

    kind: str
    seed: int
    shape: tiny.Shape
    made: Made
    prompts: tuple[tuple[int, ...], ...]
    file: Path | None = None


# ---- random weights, bent -------------------------------------------------------------------------------------------------------------


def _channels(shape: tiny.Shape, generator: np.random.Generator) -> NDArray[np.int64]:
    """Three channels of the residual stream."""
    return generator.choice(shape.dim, 3, replace=False)


def plain(made: Made, shape: tiny.Shape, generator: np.random.Generator) -> None:
    """As they are: matrices of sd 1/sqrt(columns), norms 1 +- 0.3."""


def positive(made: Made, shape: tiny.Shape, generator: np.random.Generator) -> None:
    """Every matrix has a mean of its own standard deviation, and so has the token table: products do not cancel."""
    for name, w in made.items():
        if w.ndim == 2:
            made[name] = w + np.float32(w.std())


def massive_norm(factor: float, *, compensated: bool) -> Bend:
    """Three channels of each norm's weight are large; the columns that read them are as much smaller, or not."""

    def bend(made: Made, shape: tiny.Shape, generator: np.random.Generator) -> None:
        at = _channels(shape, generator)
        for layer in range(shape.layers):
            for norm, readers in NORMS.items():
                made[f"model.layers.{layer}.{norm}.weight"][at] *= np.float32(factor)
                for reader in readers if compensated else ():
                    made[f"model.layers.{layer}.{reader}.weight"][:, at] /= np.float32(factor)

    return bend


def massive_stream(factor: float) -> Bend:
    """Three channels of the token table are large, as those of the residual stream of a trained model."""

    def bend(made: Made, shape: tiny.Shape, generator: np.random.Generator) -> None:
        made["model.embed_tokens.weight"][:, _channels(shape, generator)] *= np.float32(factor)

    return bend


def massive_tokens(made: Made, shape: tiny.Shape, generator: np.random.Generator) -> None:
    """The marked tokens are 1000 or 30 times as large as the others, or as much smaller."""
    table = made["model.embed_tokens.weight"]
    for token in range(MARKED):
        table[token] *= np.float32((1000.0, 30.0, 1 / 30.0, 1 / 1000.0)[token % 4])


def outlier_activations(made: Made, shape: tiny.Shape, generator: np.random.Generator) -> None:
    """A few rows of the gate and of the up projection are large: the activations that the down projection reads have outliers."""
    for layer in range(shape.layers):
        rows = generator.choice(shape.ffn, 3, replace=False)
        made[f"model.layers.{layer}.mlp.up_proj.weight"][rows] *= np.float32(300.0)
        made[f"model.layers.{layer}.mlp.gate_proj.weight"][rows] *= np.float32(8.0)


def zeros(made: Made, shape: tiny.Shape, generator: np.random.Generator) -> None:
    """The marked tokens are zero, and so are a value head, some rows of each feed-forward and some channels of a norm."""
    made["model.embed_tokens.weight"][:MARKED] = 0
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        made[f"{at}self_attn.v_proj.weight"][: shape.head] = 0
        made[f"{at}mlp.up_proj.weight"][:: shape.ffn // 8] = 0
        made[f"{at}mlp.gate_proj.weight"][1 :: shape.ffn // 8] = 0
        made[f"{at}input_layernorm.weight"][_channels(shape, generator)] = 0


def subnormal(made: Made, shape: tiny.Shape, generator: np.random.Generator) -> None:
    """The marked tokens are subnormal in float16 or in float32, and the values and a part of the feed-forward come near it."""
    table = made["model.embed_tokens.weight"]
    for token in range(MARKED):
        table[token] *= np.float32((2.0**-15, 2.0**-20, 2.0**-126, 2.0**-140)[token % 4])
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        made[f"{at}self_attn.v_proj.weight"][: shape.head] *= np.float32(2.0**-16)
        made[f"{at}self_attn.v_proj.weight"][shape.head :] *= np.float32(2.0**-127)
        made[f"{at}mlp.up_proj.weight"][: shape.ffn // 2] *= np.float32(2.0**-18)


def sinks(made: Made, shape: tiny.Shape, generator: np.random.Generator) -> None:
    """Queries and keys 6 times as large: scores of a few hundred, and probabilities that are 1, or vanish."""
    for layer in range(shape.layers):
        for part in "qk":
            made[f"model.layers.{layer}.self_attn.{part}_proj.weight"] *= np.float32(6.0)


def to_the_edge(largest: float) -> Bend:
    """The up projection so large that the largest gated activation of the first prompts is just this; the down projection as much smaller.

    Powers of two do it roughly and the activations' own size does the rest, so that the weights stay exact in every format.
    """

    def bend(made: Made, shape: tiny.Shape, generator: np.random.Generator) -> None:
        from aprender.judge import witness

        for layer in range(shape.layers):
            tops = [
                float(np.abs(witness.forward(_model_data(made, shape), prompt)["ffn_swigl", layer]).max())
                for prompt in _random_prompts(shape, 0)
            ]
            made[f"model.layers.{layer}.mlp.up_proj.weight"] *= np.float32(largest / max(tops))
            made[f"model.layers.{layer}.mlp.down_proj.weight"] *= np.float32(max(tops) / largest)

    return bend


def _model_data(made: Made, shape: tiny.Shape):  # noqa: ANN202 (a witness.ModelData)
    """The weights by the names of weights.def."""
    from aprender import _core
    from aprender.judge.witness import ModelData

    weights = {}
    for name, _, _, spelled, *_ in _core.WEIGHTS:
        for layer in range(shape.layers) if "%d" in spelled else (None,):
            full = spelled if layer is None else spelled.replace("%d", str(layer))
            if full in made:
                weights[name, layer] = made[full]
    weights.setdefault(("output", None), weights["token_embd", None])
    return ModelData(shape.arch, shape.flags, shape.hparams, weights)


# ---- the trained model -----------------------------------------------------------------------------------------------------------------


@functools.cache
def trained() -> Made:
    """The weights of the embedded model: BF16 in the file, exact in float32."""
    from safetensors import safe_open

    with safe_open(CANARY / "model.safetensors", "pt") as opened:
        return {name: opened.get_tensor(name).float().numpy() for name in opened.keys()}  # noqa: SIM118 (no mapping)


def large_bias(size: float) -> Bend:
    """A constant on the three lowest-frequency rotary pairs of every key bias.

    The rotation hardly turns them, so it shifts all scores of a query alike, which the softmax takes away again: large numbers, and the
    same text.
    """

    def bend(made: Made, shape: tiny.Shape, generator: np.random.Generator) -> None:
        half = shape.head // 2
        for layer in range(shape.layers):
            heads = made[f"model.layers.{layer}.self_attn.k_proj.bias"].reshape(-1, shape.head)
            heads[:, half - 3 : half] += np.float32(size)
            heads[:, shape.head - 3 :] += np.float32(size)

    return bend


@functools.cache
def _documents(seed: int, count: int) -> tuple[tuple[int, ...], ...]:
    """Texts of the embedded model's corpus as ids, cut to 40 tokens: sums, facts, chats and stories."""
    from aprender.text import from_json

    tokenizer = from_json(CANARY / "tokenizer.json")
    drawn = canary_corpus.Corpus(seed).documents(count)
    texts = ("".join(text for text, _ in document) for document in drawn)
    return tuple(tuple(tokenizer.encode(text)[: LENGTHS[-1]]) for text in texts)


# ---- the rows --------------------------------------------------------------------------------------------------------------------------

RANDOM: Mapping[str, Bend] = {
    "random": plain,
    "positive": positive,
    "massive-norm-30": massive_norm(30, compensated=True),
    "massive-norm-1000": massive_norm(1000, compensated=True),
    "massive-norm-raw": massive_norm(30, compensated=False),
    "massive-stream-100": massive_stream(100),
    "massive-stream-1000": massive_stream(1000),
    "massive-tokens": massive_tokens,
    "outlier-activations": outlier_activations,
    "sinks": sinks,
    "zeros": zeros,
    "subnormal": subnormal,
    "near-overflow": to_the_edge(6e4),
    "overflow": to_the_edge(9e4),
}
TRAINED: Mapping[str, Bend] = {
    "canary": plain,
    "canary-bias-30": large_bias(30),
    "canary-bias-100": large_bias(100),
    "canary-bias-300": large_bias(300),
}
KINDS = (*RANDOM, *TRAINED)


def _random_prompts(shape: tiny.Shape, seed: int) -> tuple[tuple[int, ...], ...]:
    """One prompt of each length, a third of its ids marked ones; then one token over and over, and two by turns."""
    generator = np.random.default_rng([seed, shape.vocab])
    out = []
    for length in LENGTHS:
        ids = generator.integers(0, shape.vocab, length)
        marked = generator.random(length) < 1 / 3
        out.append(tuple(np.where(marked, generator.integers(0, MARKED, length), ids).tolist()))
    one, two = (int(i) for i in generator.choice(np.arange(MARKED, shape.vocab), 2, replace=False))
    return (*out, (one,) * REPEATED, (one, two) * (REPEATED // 2))


def random_shape(arch: str, seed: int, wide: bool) -> tiny.Shape:
    """A shape that changes with the seed: sizes, bases, epsilons, tied or not; wide where blocks of 256 must fit."""
    sizes = WIDE if wide or seed % 2 == 0 else {"dim": 64, "ffn": 160, "heads": 4, "kv_heads": 2, "head": 16}
    shape = tiny.Shape(arch, theta=(1e6, 1e4)[seed // 2 % 2], eps=(1e-6, 1e-5)[seed // 4 % 2], tied=seed % 3 == 1, **sizes)
    return dataclasses.replace(shape, vocab=112 + 16 * (seed % 3))


def material(kind: str, arch: str, seed: int, wide: bool) -> Material:
    """One model of a kind; of trained weights ``seed`` chooses the texts only."""
    generator = np.random.default_rng([seed, *kind.encode()])
    if kind in TRAINED:
        made = {name: array.copy() for name, array in trained().items()}
        TRAINED[kind](made, CANARY_SHAPE, generator)
        file = CANARY / "canary.gguf" if kind == "canary" else None
        return Material(kind, seed, CANARY_SHAPE, made, _documents(seed, TEXTS), file)
    shape = random_shape(arch, seed, wide)
    made = tiny.weights(shape, seed)
    RANDOM[kind](made, shape, generator)
    return Material(kind, seed, shape, made, _random_prompts(shape, seed))


def archs(kind: str) -> Sequence[str]:
    """The architectures that a kind comes in."""
    return ("qwen2",) if kind in TRAINED else tiny.ARCHS


def prompts(kind: str) -> int:
    """How many prompts each model of a kind has."""
    return TEXTS if kind in TRAINED else len(LENGTHS) + 2


def has_file(kind: str) -> bool:
    """Whether the models of a kind come in a file of their own."""
    return kind == "canary"
