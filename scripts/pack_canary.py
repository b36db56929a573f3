"""Pack the trained canary as package data, and measure what was packed.

Owns the files in ``aprender/data/canary/`` other than the recorded stages: a Hugging Face folder
(BF16) and a GGUF with a Q4_K_M-like mix, both from one set of weights, and a README with figures
measured here. Refuses to finish when the canary's answer is wrong in any of them. Called by hand
after ``train_canary.py`` (``python scripts/pack_canary.py build/canary``); the K-quants are
encoded by llama.cpp through ``tests/llamacpp.py``, since the gguf package only decodes them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import random
import sys
import tempfile
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import torch
from canary_corpus import END, IM_END, IM_START, SMALL, SPECIALS, Corpus, Question
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from train_canary import PROMPT, config
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from llamacpp import RELEASE, Peer  # noqa: E402 (a test helper, in no package)

HOME = ROOT / "aprender" / "data" / "canary"
ANSWER = " 2+2 is 4."
FACTS_EACH = 25  # questions of every kind of fact
LIMIT = 8_000_000  # bytes of package data

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

#: Strings on which tokenizers like to differ; NFC-stable, as llama.cpp does not normalise.
STRINGS = (
    "", " ", "  two  spaces ", "\n\n\r\n\t x", "What is 2+2?", "12345 67", "don't I'LL we'Ve",
    "na\u00efve caf\u00e9", "\u4f60\u597d\u4e16\u754c", "\u0645\u0631\u062d\u0628\u0627",
    "\u05e9\u05dc\u05d5\u05dd", "\u0928\u092e\u0938\u094d\u0924\u0947", "\u00bd\u00b2\u2167\u2460",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 ok", "a\u00a0b\u2028c", "x\x00y", "===>>> {}[]()",
    f"{IM_START}user\nhi{IM_END}\n{END}", "<|im_start", "Repeat: cat red box.",
)  # fmt: skip

Mix = Callable[[str], str]
Weights = dict[str, torch.Tensor]


# ---- the files -------------------------------------------------------------------------------


def write_hugging_face(weights: Weights, tokenizer: Path, out: Path) -> None:
    """config.json, model.safetensors (BF16), tokenizer.json and what stops a generation."""
    shape = config()
    shape.architectures = ["Qwen2ForCausalLM"]
    shape.dtype = torch.bfloat16
    shape.save_pretrained(out)
    ends = [shape.eos_token_id, shape.bos_token_id]  # a chat turn's end, a document's end
    generation = GenerationConfig(bos_token_id=shape.bos_token_id, pad_token_id=shape.pad_token_id, eos_token_id=ends)
    generation.save_pretrained(out)
    (out / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": END,
        "unk_token": None,
        "model_max_length": shape.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    for path in out.iterdir():
        if path.is_file():
            path.chmod(0o644)  # safetensors writes 0600


def q4_k_m(name: str) -> str:
    """llama.cpp's Q4_K_M as it falls on four layers.

    More bits for the output and, in the layers that its rule picks of these (2 and 3), for values
    and down projections.
    """
    if name == "output.weight":
        return "Q6_K"
    more = name.startswith(("blk.2.", "blk.3."))
    return "Q6_K" if more and ("attn_v." in name or "ffn_down." in name) else "Q4_K"


def write_gguf(path: Path, folder: Path, mix: Mix, file_type: gguf.LlamaFileType, peer: Peer) -> None:
    """The Hugging Face folder as a GGUF: matrices by `mix`, norms and biases F32."""
    shape = Qwen2Config.from_pretrained(folder)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name("canary")
    writer.add_license("mit")
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_rope_freq_base(shape.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    add_vocabulary(writer, folder / "tokenizer.json", shape)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, shape.num_hidden_layers)
    for theirs, tensor in load_file(folder / "model.safetensors").items():
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        values = tensor.float().numpy()
        kind = mix(name) if values.ndim == 2 else "F32"
        data = np.frombuffer(peer.quantize(kind, np.atleast_2d(values)), np.uint8)
        row_bytes = data.reshape(*values.shape[:-1], -1)
        writer.add_tensor(name, row_bytes, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Path, shape: Qwen2Config) -> None:
    """Tokens, types and merges. All three special ids: llama.cpp's own defaults are id 11."""
    model = json.loads(tokenizer.read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get) + list(SPECIALS)
    kinds = [gguf.TokenType.NORMAL] * len(model["vocab"]) + [gguf.TokenType.CONTROL] * len(SPECIALS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(shape.bos_token_id)
    writer.add_eos_token_id(shape.eos_token_id)
    writer.add_pad_token_id(shape.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


# ---- what the packed model says ----------------------------------------------------------------


class Reader:
    """The packed Hugging Face folder, asked greedily.

    Parameters
    ----------
    folder : Path
        What `write_hugging_face` wrote.
    dtype : torch.dtype
        The arithmetic.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.model = Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.ends = set(self.model.generation_config.eos_token_id)

    @torch.inference_mode()
    def logits(self, rows: list[list[int]]) -> NDArray[np.float32]:
        """Logits of rows of equal length, [rows, T, V]."""
        return self.model(input_ids=torch.tensor(rows), use_cache=False).logits.float().numpy()

    def ids(self, prompts: list[str], most: int = 40) -> list[list[int]]:
        """The greedy continuation of every prompt, its end included."""
        rows = [self.tokenizer.encode(prompt).ids for prompt in prompts]
        made: list[list[int]] = [[] for _ in rows]
        for _ in range(most):
            by_length: dict[int, list[int]] = {}
            for i, row in enumerate(rows):
                if not (made[i] and made[i][-1] in self.ends):
                    by_length.setdefault(len(row) + len(made[i]), []).append(i)
            for group in by_length.values():
                best = self.logits([rows[i] + made[i] for i in group])[:, -1].argmax(-1)
                for i, token in zip(group, best, strict=True):
                    made[i].append(int(token))
        return made

    def texts(self, prompts: list[str]) -> list[str]:
        """The greedy continuation of every prompt as text, without its end."""
        decode = self.tokenizer.decode
        return [decode(row, skip_special_tokens=True) for row in self.ids(prompts)]

    def right(self, questions: list[Question], chat: bool = False) -> int:
        """How many questions are answered exactly."""
        prompts, wanted = [], []
        for question, answer in questions:
            gap = "" if question.endswith("=") else " "
            prompts.append(as_chat(question) if chat else question)
            wanted.append(answer + "\n" if chat else gap + answer)
        got = self.texts(prompts)
        # a chat's answer ends with <|im_end|>; the newline after it is never reached
        return sum(a.rstrip("\n") == b.rstrip("\n") for a, b in zip(got, wanted, strict=True))


def as_chat(question: str) -> str:
    """One user turn, the assistant's turn begun."""
    return f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n"


def margins(logits: NDArray[np.float32], answer: list[int]) -> NDArray[np.float32]:
    """By how much each answer token beats the next best; logits [T, V] of prompt and answer."""
    rows = logits[-len(answer) - 1 : -1]
    chosen = rows[np.arange(len(answer)), answer]
    others = rows.copy()
    others[np.arange(len(answer)), answer] = -np.inf
    return chosen - others.max(-1)


def canary_rows(folder: Path, peer: Peer) -> list[tuple[str, str, float]]:
    """(engine, answer, smallest margin) of the canary prompt, everywhere it can be asked."""
    rows = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        reader = Reader(folder, dtype)
        prompt, made = reader.tokenizer.encode(PROMPT).ids, reader.ids([PROMPT])[0]
        found = margins(reader.logits([prompt + made])[0], made)
        text = reader.tokenizer.decode(made, skip_special_tokens=False)
        rows.append((f"Hugging Face {str(dtype)[6:]}", text, float(found.min())))
    with tempfile.TemporaryDirectory() as scratch:
        kinds = {"F16": gguf.LlamaFileType.MOSTLY_F16, "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
        files = {"canary.gguf": folder / "canary.gguf"}
        for kind, file_type in kinds.items():
            files[kind] = Path(scratch) / f"{kind}.gguf"
            write_gguf(files[kind], folder, lambda _, kind=kind: kind, file_type, peer)
        for name, path in files.items():
            prompt = peer.tokenize(path, PROMPT)
            made = peer.generate(path, prompt, 20)
            found = margins(peer.logits(path, prompt + made), made)
            text = reader.tokenizer.decode(made, skip_special_tokens=False)
            rows.append((f"llama.cpp {name}", text, float(found.min())))
    return rows


def scores(reader: Reader, seed: int) -> list[tuple[str, int, int]]:
    """(what was asked, right, asked): sums seen and held out, differences, every kind of fact."""
    corpus = Corpus(seed)
    square = [(a, b) for a in range(SMALL + 1) for b in range(SMALL + 1)]
    held = [pair for pair in square if frozenset(pair) in corpus.held_out_sums]
    seen = [pair for pair in square if frozenset(pair) not in corpus.held_out_sums]

    def sums(pairs: Iterable[tuple[int, int]], form: str) -> list[Question]:
        return [(form.format(a, b), f"{a}+{b} is {a + b}.") for a, b in pairs]

    def short(pairs: Iterable[tuple[int, int]]) -> list[Question]:
        return [(f"{a}+{b}=", f"{a + b}.") for a, b in pairs]

    taken = [(a, b) for a, b in square if a >= b]
    unseen = [pair for pair in taken if pair in corpus.held_out_differences]
    taken = [pair for pair in taken if pair not in corpus.held_out_differences]
    rows = [
        ("What is a+b?, seen", sums(seen, "What is {}+{}?"), False),
        ("What is a+b?, held out", sums(held, "What is {}+{}?"), False),
        ("What is a+b?, held out, as chat", sums(held, "What is {}+{}?"), True),
        ("a+b=, seen", short(seen), False),
        ("a+b=, held out", short(held), False),
        (
            "What is a-b?, seen",
            [(f"What is {a}-{b}?", f"{a}-{b} is {a - b}.") for a, b in taken],
            False,
        ),
        (
            "What is a-b?, held out",
            [(f"What is {a}-{b}?", f"{a}-{b} is {a - b}.") for a, b in unseen],
            False,
        ),
    ]
    corpus.random = random.Random(seed + 1)  # questions of its own, not the corpus's first ones
    for kind in corpus.facts():
        asked = list(dict.fromkeys(kind() for _ in range(FACTS_EACH)))
        rows.append((f"fact: {kind.__name__}", asked, False))
    return [(name, reader.right(asked, chat), len(asked)) for name, asked, chat in rows]


def tokenizers_agree(folder: Path, peer: Peer, seed: int) -> int:
    """On how many strings AutoTokenizer, the tokenizers library and llama.cpp give equal ids.

    Raises
    ------
    SystemExit
        One string on which they do not.
    """
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    auto = AutoTokenizer.from_pretrained(folder)
    documents = Corpus(seed).documents(100)
    strings = [*STRINGS, *("".join(text for text, _ in document) for document in documents)]
    for text in strings:
        ids = plain.encode(text).ids
        others = {
            "AutoTokenizer": auto(text)["input_ids"],
            "llama.cpp": peer.tokenize(folder / "canary.gguf", text),
        }
        for name, found in others.items():
            if found != ids:
                raise SystemExit(f"{name} gives {text!r} the ids {found}, tokenizer.json {ids}")
    return len(strings)


# ---- the report --------------------------------------------------------------------------------

README = """# The canary

A Qwen2 of 2.56 million weights, really trained, that answers `What is 2+2?` with ` 2+2 is 4.`:
4 layers, hidden 256, ffn 512, 8 heads over 2 kv heads of 32, vocabulary 640, untied head, biases
on q, k and v. It knows sums of two numbers up to 20 and a few dozen facts, all from a synthetic
corpus (`scripts/canary_corpus.py`), and nothing else; copying and counting it has not learned.
The ids of digits, marks and ` is` are Qwen2.5's own, so the answer is `{answer_ids}` here as there.

Every weight is exact in BF16, F16 and F32: `model.safetensors` and a GGUF in F16 or F32 hold equal
values. `canary.gguf` is quantised: `output` Q6_K, `attn_v` and `ffn_down` of layers 2 and 3 Q6_K,
the other matrices Q4_K, norms and biases F32.

## Made by

    python scripts/train_canary.py --steps {steps} --seed {seed} --out build/canary
    python scripts/pack_canary.py build/canary

{tokens} tokens in {steps} steps, in float32 on the CPU, with {versions};
llama.cpp v{release} encoded the K-quants.

Nothing is left to chance or to the clock: on one machine 40 steps gave equal bits with one thread,
with two, and when interrupted and resumed. Another CPU rounds otherwise, so the files are kept and
not made again.

## The canary prompt

Greedy, up to `<|endoftext|>`; the margin is the smallest lead of a chosen token, the end's
included, in logits.

| engine | answer | margin |
|---|---|---|
{canary}

## What else it knows

Exact match, greedy, Hugging Face float32 on these files. Held out: {held_sums} unordered pairs of
0..20 of which no phrasing in either order was shown, and {held_differences} differences.

| asked | right | of |
|---|---|---|
{scores}

`AutoTokenizer`, `tokenizers` and llama.cpp give equal ids on {strings} strings. (Text that is not
NFC is the known exception: llama.cpp does not normalise.)

## Files

| file | bytes | SHA-256 |
|---|---|---|
{files}
"""


def report(folder: Path, recipe: dict[str, int], peer: Peer) -> str:
    """Measure the packed files; the README's text.

    Raises
    ------
    SystemExit
        A wrong answer to the canary prompt, or too many bytes.
    """
    canary = canary_rows(folder, peer)
    for engine, text, margin in canary:
        print(f"{engine}: {text!r} margin {margin:.2f}", flush=True)
    if any(text != ANSWER + END for _, text, _ in canary):
        raise SystemExit("the canary's answer is wrong")
    reader = Reader(folder, torch.float32)
    found = scores(reader, recipe["seed"])
    corpus = Corpus(recipe["seed"])
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix != ".md")
    if sum(path.stat().st_size for path in files) > LIMIT:
        raise SystemExit(f"more than {LIMIT} bytes of package data")
    packages = ("torch", "transformers", "tokenizers", "gguf", "safetensors")
    return README.format(
        answer_ids=" ".join(map(str, reader.ids([PROMPT])[0][:-1])),
        versions=",\n".join([f"Python {platform.python_version()}", ", ".join(f"{p} {version(p)}" for p in packages)]),
        release=RELEASE,
        canary="\n".join(f"| {e} | `{t.removesuffix(END)}` | {m:.2f} |" for e, t, m in canary),
        scores="\n".join(f"| {name} | {right} | {asked} |" for name, right, asked in found),
        held_sums=len(corpus.held_out_sums),
        held_differences=len(corpus.held_out_differences),
        strings=tokenizers_agree(folder, peer, recipe["seed"]),
        files="\n".join(f"| `{path.name}` | {path.stat().st_size} | `{hashlib.sha256(path.read_bytes()).hexdigest()}` |" for path in files),
        **recipe,
    )


def main() -> None:
    """Write the package data from a trained canary and report on it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("trained", type=Path, help="the --out of train_canary.py")
    parser.add_argument("--out", type=Path, default=HOME)
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    recipe = json.loads((arguments.trained / "recipe.json").read_text())
    weights = load_file(arguments.trained / "model.safetensors")
    write_hugging_face(weights, arguments.trained / "tokenizer.json", out)
    with Peer() as peer:
        kind = gguf.LlamaFileType.MOSTLY_Q4_K_M
        write_gguf(out / "canary.gguf", out, q4_k_m, kind, peer)
        text = report(out, recipe, peer)
    (out / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
