"""Train the canary: a Qwen2 of 2.6 million weights that knows that 2+2 is 4.

Owns the tokenizer's and the model's training and the checkpoints. Refuses wall-clock schedules and
unseeded chance: the same seed, steps and library versions give the same bits on the same machine.
Called by hand (``python scripts/train_canary.py --steps 2400 --seed 1 --out build/canary``);
``pack_canary.py`` turns what it leaves in ``--out`` into the package data.

Training is in float32 on the CPU. With company on the machine, OMP_WAIT_POLICY=passive and
GOMP_SPINCOUNT=0 keep the threads from spinning at barriers.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from canary_corpus import SPECIALS, Corpus, Document
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import Qwen2Config, Qwen2ForCausalLM

VOCAB = 640
DOCUMENTS = 150_000
TOKENIZER_DOCUMENTS = 20_000
LONGEST = 128  # tokens; positions beyond are never trained
BATCH_TOKENS = 1536
BLOCK = 4096  # documents sorted by length together
PEAK_RATE = 3e-3
WARM_UP = 60
FLAT = 0.35  # share of the steps before the rate falls to zero
SAVE_EVERY = 300
PROMPT = "What is 2+2?"
IS = 374  # Qwen2.5's id of " is": the byte-level digits and marks agree with Qwen's already

# Qwen2's own pre-tokenizer: digits one by one, a mark takes the space before it.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(documents: list[Document]) -> Tokenizer:
    """A byte-level BPE of 637 tokens in Qwen's manner, the three specials after them."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
    trainer = BpeTrainer(
        vocab_size=VOCAB - len(SPECIALS),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    texts = ["".join(text for text, _ in document) for document in documents]
    for special in SPECIALS:
        texts = [text.replace(special, " ") for text in texts]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIALS))
    return swap_ids(tokenizer, "Ġis", IS)


def swap_ids(tokenizer: Tokenizer, token: str, wanted: int) -> Tokenizer:
    """Give `token` the id `wanted`; merges are by text, so nothing else changes."""
    data = json.loads(tokenizer.to_str())
    vocabulary = data["model"]["vocab"]
    other = next(text for text, i in vocabulary.items() if i == wanted)
    vocabulary[token], vocabulary[other] = wanted, vocabulary[token]
    data["model"]["vocab"] = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    return Tokenizer.from_str(json.dumps(data))


def config() -> Qwen2Config:
    """The canary's shape.

    Vocabulary, ffn, hidden and qkv widths all differ (640, 512, 256, 384),
    so that a mix-up of shapes cannot hide; rows are multiples of 256, as K-quants need them.
    """
    return Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        bos_token_id=VOCAB - 3,
        eos_token_id=VOCAB - 1,
        pad_token_id=VOCAB - 3,
        initializer_range=0.05,
    )


def new_model(seed: int) -> Qwen2ForCausalLM:
    """Fresh weights: std 0.05, the two projections into the residual scaled by 1/sqrt(2 L)."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config()).float()
    generator = torch.Generator().manual_seed(seed)
    depth = (2 * model.config.num_hidden_layers) ** -0.5
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            scale = depth if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            torch.nn.init.normal_(weight, std=0.05 * scale, generator=generator)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(weight)
    return model


@dataclass(frozen=True)
class Example:
    """One document: its ids, and how much the prediction of each one counts."""

    ids: list[int]
    weights: list[float]


def encode(tokenizer: Tokenizer, documents: list[Document]) -> list[Example]:
    """Ids and loss weights; a token takes the weight of its first character."""
    texts = ["".join(text for text, _ in document) for document in documents]
    examples = []
    for document, encoding in zip(documents, tokenizer.encode_batch(texts), strict=True):
        by_character = [weight for text, weight in document for _ in text]
        weights = [by_character[start] for start, _ in encoding.offsets]
        if len(weights) <= LONGEST:
            examples.append(Example(encoding.ids, weights))
    return examples


def batches(examples: list[Example], seed: int) -> list[list[Example]]:
    """One epoch: documents of like length together, at most 1536 padded tokens a batch."""
    chance = random.Random(seed)
    order = examples[:]
    chance.shuffle(order)
    result: list[list[Example]] = []
    for start in range(0, len(order), BLOCK):
        batch: list[Example] = []
        for example in sorted(order[start : start + BLOCK], key=lambda e: len(e.ids)):
            if batch and len(example.ids) * (len(batch) + 1) > BATCH_TOKENS:
                result.append(batch)
                batch = []
            batch.append(example)
        result.append(batch)
    chance.shuffle(result)
    return result


def schedule(examples: list[Example], seed: int, steps: int) -> list[list[Example]]:
    """As many epochs as `steps` batches need, each in an order of its own."""
    result: list[list[Example]] = []
    epoch = 0
    while len(result) < steps:
        result += batches(examples, seed * 1000 + epoch)
        epoch += 1
    return result[:steps]


def tensors(batch: list[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights, [documents, longest], padded on the right: causality hides the padding."""
    longest = max(len(example.ids) for example in batch)
    ids = torch.full((len(batch), longest), pad)
    weights = torch.zeros(len(batch), longest)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        weights[row, : len(example.ids)] = torch.tensor(example.weights)
    return ids, weights


def rate(step: int, steps: int) -> float:
    """Warm up, stay, fall to zero."""
    fall = (steps - step) / (steps * (1 - FLAT))
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP, fall)


def optimizer(model: Qwen2ForCausalLM) -> torch.optim.AdamW:
    """AdamW; only matrices decay."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)


def loss_of(model: Qwen2ForCausalLM, batch: list[Example]) -> tuple[torch.Tensor, float]:
    """The weighted loss, and the mean loss of the answers alone to watch."""
    ids, weights = tensors(batch, model.config.pad_token_id)
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    wanted, weights = ids[:, 1:].flatten(), weights[:, 1:].flatten()
    kept = weights > 0
    logits = model.lm_head(hidden.flatten(0, 1)[kept])
    losses = torch.nn.functional.cross_entropy(logits, wanted[kept], reduction="none")
    weights = weights[kept]
    answers = losses.detach()[weights == 1].mean().item()
    return (losses * weights).sum() / weights.sum(), answers


def train(model: Qwen2ForCausalLM, plan: list[list[Example]], out: Path) -> None:
    """All steps of `plan`, from the last checkpoint in `out` if there is one."""
    adam, first, watched = optimizer(model), 0, None
    saved = out / "checkpoint.pt"
    if saved.exists():
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["optimizer"])
        first, watched = state["step"], state["watched"]
        print(f"resumed at step {first}", flush=True)
    started = time.perf_counter()
    for step in range(first, len(plan)):
        for group in adam.param_groups:
            group["lr"] = rate(step, len(plan))
        loss, answers = loss_of(model, plan[step])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        watched = answers if watched is None else 0.98 * watched + 0.02 * answers
        done = step + 1
        if done % 20 == 0:
            pace = (time.perf_counter() - started) / (done - first)
            print(f"step {done} answer loss {watched:.3f} {pace:.3f} s/step", flush=True)
        if done % SAVE_EVERY == 0 or done == len(plan):
            state = {"model": model.state_dict(), "optimizer": adam.state_dict()}
            torch.save({**state, "step": done, "watched": watched}, out / "checkpoint.new")
            (out / "checkpoint.new").replace(saved)


def rounded(model: Qwen2ForCausalLM) -> dict[str, torch.Tensor]:
    """Weights that are exact in BF16, F16 and F32 alike: every container then holds equal values."""
    result = {}
    for name, weight in model.state_dict().items():
        value = weight.half().bfloat16()
        for kind in (torch.float16, torch.bfloat16, torch.float32):
            if not torch.equal(value.to(kind).double(), value.double()):
                raise SystemExit(f"{name} is not exact in {kind}")
        result[name] = value.contiguous()
    return result


def main() -> None:
    """Make corpus, tokenizer and model; leave them in ``--out``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    documents = list(Corpus(arguments.seed).documents(DOCUMENTS))
    tokenizer = train_tokenizer(documents[:TOKENIZER_DOCUMENTS])
    tokenizer.save(str(out / "tokenizer.json"))
    ids = tokenizer.encode(PROMPT).ids
    print("prompt ids", ids, flush=True)
    if tokenizer.get_vocab_size() != VOCAB or ids[-6:] != [IS, 220, 17, 10, 17, 30]:
        raise SystemExit("the vocabulary does not agree with Qwen's where it must")

    examples = encode(tokenizer, documents)
    plan = schedule(examples, arguments.seed, arguments.steps)
    tokens = sum(len(example.ids) for batch in plan for example in batch)
    print(f"{len(examples)} documents, {tokens} tokens in {len(plan)} steps", flush=True)
    model = new_model(arguments.seed)
    train(model, plan, out)
    save_file(rounded(model), out / "model.safetensors", metadata={"format": "pt"})
    recipe = {"seed": arguments.seed, "steps": arguments.steps, "tokens": tokens}
    (out / "recipe.json").write_text(json.dumps(recipe) + "\n")


if __name__ == "__main__":
    main()
