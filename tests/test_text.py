"""Text to ids: the same ids from GGUF metadata and from tokenizer.json, checked against transformers and llama.cpp.

The tokenizers beside the canary's are trained here on a few sentences, in the manner of Qwen2, Llama 3, GPT-2 and Llama 2; what matters is
the words that the pre-tokenizer makes, so the corpus is chosen for those: digits, contractions, white space, scripts, emoji, control
characters.  The merges of the tokenizers that are compared with llama.cpp were trained across words, so that a word cut in another place
shows in the ids.
"""

from __future__ import annotations

import importlib
import itertools
import json
import re
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import gguf
import llamacpp
import pytest
import tiny
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

import aprender
from aprender import _core, bisect, run, text, trace
from aprender.captures import open_captures
from aprender.errors import ArgumentError, CannotRun, ConfigError, FormatError
from aprender.text import backend as library
from aprender.text import chat, sentencepiece

CANARY = Path(aprender.canary(""))
Pair = tuple[text.Tokenizer, text.Tokenizer]  # from GGUF, from tokenizer.json
SPECIALS = ("<|begin|>", "<|end|>", "<tool>")

CORPUS = (
    "What is 2+2?", "", " ", "  two  spaces ", "\n\n\r\n\t x\n \n", "12345 67 8\u0663", "don't I'LL we'Ve CAN'T",
    "na\u00efve cafe\u0301 caf\u00e9", "\u4f60\u597d\u4e16\u754c", "\u0645\u0631\u062d\u0628\u0627",
    "\u0928\u092e\u0938\u094d\u0924\u0947", "\u00bd\u00b2\u2167\u2460", "\U0001f468\u200d\U0001f469\u200d\U0001f467 ok",
    "a\u00a0b\u2028c\u3000d", "x\x00y\x7f", "===>>> {}[]()  ;;", "<|begin|>user\nhi<|end|>", "<tool>call</tool>",
    "<|im_start|>user\nhi<|im_end|>", "<|im_start", "\u1e9b\u0323", "\u212b \u00c5 A\u030a", "e" * 300, "\uac00\u1100\u1161",
    "snake_case CamelCase HTTPServer v1.2.3-rc4", "https://example.org/a?b=c&d=%20e#f", "def f(x):\n\treturn x**2  # \u00e4\n",
)  # fmt: skip


@pytest.fixture(scope="module")
def canary() -> Pair:
    pair = text.for_model(CANARY / "canary.gguf"), text.for_model(CANARY)
    assert pair[0] is not None
    assert pair[1] is not None
    return pair[0], pair[1]


def train(kind: str, folder: Path, bos: bool) -> tuple[Path, Path]:
    """A tokenizer of a family, written as tokenizer.json by the library and as GGUF by the gguf package."""
    words = {
        "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    if kind == "qwen2":
        backend.normalizer = normalizers.NFC()
    if kind == "gpt-2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(words[kind]), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*CORPUS, "the 2024 year 123 456 don't don't  indeed\n\n"] * 3, trainer)
    backend.add_special_tokens([tokenizers.AddedToken(word, normalized=False) for word in SPECIALS[:2]])
    backend.add_tokens([tokenizers.AddedToken(SPECIALS[2], normalized=False)])
    first = backend.token_to_id(SPECIALS[0])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single=f"{SPECIALS[0]} $A", special_tokens=[(SPECIALS[0], first)])
    backend.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json", _as_gguf(backend, kind, bos, folder)


def _as_gguf(backend: tokenizers.Tokenizer, kind: str, bos: bool, folder: Path) -> Path:
    """The same tokenizer as GGUF metadata of a tiny model, with an unused padding token, as converters write them."""
    merges = json.loads(backend.to_str())["model"]["merges"]
    size = backend.get_vocab_size()
    tokens = [backend.id_to_token(number) for number in range(size)] + ["[PAD]"]
    kinds = [1] * (size - 3) + [3, 3, 4, 5]

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(kind)
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges([" ".join(pair) for pair in merges])
        writer.add_bos_token_id(size - 3)
        writer.add_eos_token_id(size - 2)
        if kind != "llama-bpe" or not bos:  # Llama 3's files leave it to the name
            writer.add_add_bos_token(bos)

    return tiny.save_gguf(tiny.Shape(vocab=size + 1), folder / "model.gguf", "Q8_0", metadata=metadata)


KINDS = [("qwen2", False), ("llama-bpe", True), ("llama-bpe", False), ("gpt-2", False), ("gpt-2", True)]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    json_file, gguf_file = train(request.param[0], tmp_path_factory.mktemp("tokenizer"), request.param[1])
    from_gguf = text.for_model(gguf_file)
    assert from_gguf is not None
    return from_gguf, text.from_json(json_file)


@pytest.mark.parametrize("prompt", CORPUS)
def test_same_ids_from_both_containers(pair: Pair, prompt: str) -> None:
    assert pair[0].encode(prompt) == pair[1].encode(prompt)


def test_same_digest_from_both_containers(pair: Pair, canary: Pair) -> None:
    """All parts that decide ids are equal, so the digests are; another tokenizer has another one."""
    assert pair[0].digest == pair[1].digest != canary[0].digest == canary[1].digest


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_same_ids_of_any_text(canary: Pair, prompt: str) -> None:
    assert canary[0].encode(prompt) == canary[1].encode(prompt)


@pytest.mark.foreign
@pytest.mark.parametrize("prompt", CORPUS)
def test_the_canary_against_transformers(canary: Pair, prompt: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(CANARY)
    assert canary[0].encode(prompt) == canary[1].encode(prompt) == theirs(prompt)["input_ids"]


@pytest.mark.foreign
def test_the_canary_against_llamacpp(canary: Pair, peer: llamacpp.Peer) -> None:
    """Texts in normal form C only: llama.cpp does not normalise, which is what the last line shows."""
    for prompt in CORPUS:
        if unicodedata.is_normalized("NFC", prompt):
            assert canary[0].encode(prompt) == peer.tokenize(CANARY / "canary.gguf", prompt), prompt
    assert canary[0].encode("cafe\u0301") != peer.tokenize(CANARY / "canary.gguf", "cafe\u0301")


@pytest.mark.parametrize("prompt", [prompt for prompt in CORPUS if prompt.isascii()])
def test_decoding_gives_the_text_back(pair: Pair, prompt: str) -> None:
    ids = pair[0].encode(prompt)
    assert pair[0].decode(ids) in (prompt, SPECIALS[0] + prompt)  # as the tokenizer begins its texts
    assert "".join(map(pair[0].id_to_piece, ids)) == pair[0].decode(ids)


def test_the_prompt_of_the_readme(canary: Pair) -> None:
    """Seven tokens, digits one by one; ids 637 and 639 end a text (the canary's special tokens)."""
    assert canary[0].encode("What is 2+2?") == [261, 374, 220, 17, 10, 17, 30]
    assert canary[0].eos_ids == canary[1].eos_ids == {637, 639}
    assert canary[0].id_to_piece(10_000) == "[10000]"


def test_normal_form_c_follows_the_name(canary: Pair) -> None:
    assert canary[0].encode("cafe\u0301") == canary[0].encode("caf\u00e9")


def test_half_a_surrogate_is_refused(canary: Pair) -> None:
    with pytest.raises(ArgumentError, match="character 1"):
        canary[0].encode("a\ud800")


# ---- refusals ----------------------------------------------------------------------------------

GOOD = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": ["a", "b", "ab", "<|end|>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3], "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.eos_token_id": 3,
}  # fmt: skip


def test_the_good_one_is_read() -> None:
    made = text.from_gguf(GOOD)
    assert made.encode("abba<|end|>") == [2, 1, 0, 3]
    assert made.eos_ids == {3}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", "bert"), ("model", None), ("pre", "qwen9"), ("pre", None), ("pre", 3), ("tokens", None), ("tokens", [1, 2]),
        ("tokens", ["a", "a", "ab", "x"]), ("token_type", [1]), ("merges", ["a"]), ("merges", ["a b c"]), ("merges", ["a q"]),
        ("merges", None), ("eos_token_id", 4), ("eos_token_id", -1), ("add_bos_token", True),
    ],
)  # fmt: skip
def test_bad_metadata_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises((ConfigError, FormatError)) as caught:
        text.from_gguf(GOOD | {f"tokenizer.ggml.{key}": value}, "some.gguf")
    named = {"add_bos_token": "bos_token_id"}.get(key, key)
    assert f"some.gguf: tokenizer.ggml.{named}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"model": {"type": "Magic"}}'])
def test_a_bad_tokenizer_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        text.from_json(tmp_path / "tokenizer.json")
    with pytest.raises(FormatError, match="No such file"):
        text.from_json(tmp_path / "none.json")


def test_no_tokenizer_is_none_and_not_an_error(tmp_path: Path) -> None:
    tiny.save_gguf(tiny.Shape(), tmp_path / "model.gguf")
    assert text.for_model(tmp_path / "model.gguf") is None
    assert text.for_model(tmp_path) is None


def test_a_gguf_does_not_borrow_the_tokenizer_beside_it(tmp_path: Path) -> None:
    tiny.save_gguf(tiny.Shape(), tmp_path / "model.gguf")
    (tmp_path / "tokenizer.json").write_bytes((CANARY / "tokenizer.json").read_bytes())
    assert text.for_model(tmp_path / "model.gguf") is None
    assert text.for_model(tmp_path) is not None


def test_ends_of_text_beside_a_tokenizer_json(tmp_path: Path) -> None:
    """generation_config.json wins over config.json, that over the token's text in tokenizer_config.json."""
    (tmp_path / "tokenizer.json").write_bytes((CANARY / "tokenizer.json").read_bytes())
    always = {637, 639}  # the canary's special tokens end a text by their spelling
    for name, content, ids in (
        ("tokenizer_config.json", {"eos_token": {"content": "!"}}, {0}),
        ("config.json", {"eos_token_id": 5}, {5}),
        ("generation_config.json", {"eos_token_id": [6, 7]}, {6, 7}),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        assert text.from_json(tmp_path / "tokenizer.json").eos_ids == always | ids
    (tmp_path / "config.json").write_text("[" * 100000)
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(FormatError, match=r"config\.json"):
        text.from_json(tmp_path / "tokenizer.json")


def test_metadata_come_straight_from_the_reader() -> None:
    assert text.from_gguf(_core.File(CANARY / "canary.gguf").metadata).size == 640


# ---- from one container to the other -------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS, ids=str)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("folder")
    train(request.param[0], made, request.param[1])
    (made / "tokenizer_config.json").write_text(json.dumps({"eos_token": SPECIALS[1], "chat_template": "{{ messages }}"}))
    return made


def test_a_tokenizer_json_goes_into_metadata_and_back(folder: Path) -> None:
    """The same digest, ids, ends and template from the folder, from GGUF's keys and from APR's."""
    first = text.from_json(folder / "tokenizer.json")
    metadata = text.gguf_metadata(folder, first.size + 5)
    apr = json.loads(json.dumps(text.apr_metadata(folder)))
    assert len(metadata["tokenizer.ggml.tokens"]) == first.size + 5
    for made in (text.from_gguf(metadata), text.from_apr(apr), text.from_apr(text.apr_metadata(metadata))):
        assert (made.digest, made.eos_ids, made.chat_template) == (first.digest, first.eos_ids, "{{ messages }}")
        assert all(made.encode(prompt) == first.encode(prompt) for prompt in CORPUS)


def test_the_canary_s_metadata_are_those_of_its_gguf(canary: Pair) -> None:
    """What is written from the folder decides ids as what another program wrote."""
    theirs = {key: value for key, value in _core.File(CANARY / "canary.gguf").metadata.items() if key.startswith("tokenizer.")}
    ours = text.gguf_metadata(CANARY)
    for key in ("model", "pre", "tokens", "merges", "eos_token_id", "add_bos_token"):
        assert ours["tokenizer.ggml." + key] == theirs["tokenizer.ggml." + key], key
    assert list(ours["tokenizer.ggml.token_type"]) == list(theirs["tokenizer.ggml.token_type"])
    assert ours["tokenizer.chat_template"] == theirs["tokenizer.chat_template"]
    assert text.from_apr(text.apr_metadata(theirs)).digest == canary[0].digest
    assert text.gguf_metadata(CANARY.parent) == {}


def test_what_metadata_cannot_say_is_refused(folder: Path, tmp_path: Path) -> None:
    """Other words, an added token that eats the blank before it, more tokens than rows: refused by the name of the part."""
    good = json.loads((folder / "tokenizer.json").read_text())
    odd = [{**token, "lstrip": True} for token in good["added_tokens"]]
    for part, value in (("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}), ("added_tokens", odd)):
        (tmp_path / "tokenizer.json").write_text(json.dumps(good | {part: value}))
        with pytest.raises(FormatError) as caught:
            text.gguf_metadata(tmp_path)
        assert (caught.value.code, caught.value.field) == ("UNSUPPORTED", part)
    with pytest.raises(FormatError, match="rows"):
        text.gguf_metadata(folder, 10)


def test_an_apr_file_of_another_writer() -> None:
    """No types, no kind: what no merge makes and is no byte is special; a name of the pre-tokenizer there must be."""
    apr = {"tokenizer.vocabulary": ["a", "b", "ab", "<|end|>"], "tokenizer.merges": ["a b"], "tokenizer.pre_type": "qwen2",
           "tokenizer.eos_token_id": 3}  # fmt: skip
    for more in ({}, {"tokenizer.model_type": "BPE"}, {"tokenizer.model_type": "gpt2"}):
        made = text.from_apr(apr | more)
        assert made.encode("abba<|end|>") == [2, 1, 0, 3]
        assert made.digest == text.from_gguf(GOOD).digest
    for key, value in (("pre_type", None), ("model_type", "unigram"), ("merges", None)):
        with pytest.raises(FormatError):
            text.from_apr({name: its for name, its in (apr | {"tokenizer." + key: value}).items() if its is not None})


# ---- pre-tokenizers by name, against llama.cpp -----------------------------------------------------

WORDS = (
    *(prompt for prompt in CORPUS if "<" not in prompt),
    "I'm you're WE'LL o'clock 'tis",
    "price $12,345.67 + 8% = x^2 ~ `code`",
    "HelloWORLD fooBar \u00c4\u00d6\u00dc\u00e4\u00f6\u00fc",
    "Stra\u00dfe \u00c9COLE",
    "12345678 a1b22c333 \u0663\u0664\u0665\u0666 \u2460\u2461",
    "a\n\n\nb \n c\t\t\td   e",
    "// note\n/* x */ #include <a.h>\n",
    "\u65e5\u672c\u8a9e\u30c6\u30b9\u30c8 \u30ab\u3001\u3072\u3089\u3002",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440! \u0395\u03bb\u03bb\u03b7",
    "foo/bar\\baz //x\n/y",
    "\u0964\u0939\u093f\u0928\u094d\u0926\u0940\u0964 \u0964",
    "\u2026wait\u2026 \u201cquoted\u201d \u2018s",
    "   \r\n  \r\n",
    "a \u3000 b",
    "x\u00a0\u00a0y",
    "tab\tend\t",
    "100 000 1000000",
    "\u0e01\u0e33 \uac00\ub098",
)

#: What llama.cpp cuts otherwise than the model's own tokenizer.json: the characters, left out of the texts, and the reason.
NOT_ASCII, BLANKS = r"[^\x00-\x7f]", r"[^\S\x00-\x7f]"
DIFFER = {
    "gpt-4o": (NOT_ASCII, "capitals and marks: llama.cpp's pattern knows only A to Z and a to z as cases"),
    "llama4": (NOT_ASCII, "as gpt-4o"),
    "tekken": (NOT_ASCII, "as gpt-4o"),
    "falcon": (NOT_ASCII, "digits are looked for after the bytes, and six of the bytes are spelled as superscripts and fractions"),
    "deepseek-llm": (BLANKS, "llama.cpp's patterns see a vertical tab for every blank outside ASCII, which the ranges of its Chinese lack"),
    "deepseek-coder": (BLANKS, "as deepseek-llm"),
}


@pytest.fixture(scope="module")
def across() -> tuple[list[str], list[str]]:
    """Tokens and merges trained across words; no merge joins digits, of which DeepSeek's vocabularies have no longer tokens either."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False, use_regex=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=2500, min_frequency=2, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([*WORDS, "12 123 1234 12345 0 00 000"] * 3, trainer)
    model = json.loads(backend.to_str())["model"]
    vocabulary, merges = dict(model["vocab"]), [" ".join(pair) for pair in model["merges"]]
    return sorted(vocabulary, key=lambda token: vocabulary[token]), merges


def joined_digits(tokens: list[str], merges: list[str]) -> tuple[list[str], list[str]]:
    """With tokens of two and three digits too, and digits joined to letters."""
    more = [("1", "2"), ("12", "3"), ("0", "0"), ("00", "0"), ("4", "5"), ("a", "1"), ("3", "4"), ("5", "6"), ("67", "8"), ("6", "7")]
    fresh = [pair for pair in more if pair[0] in tokens or any("".join(other) == pair[0] for other in more)]
    made = [*tokens, *dict.fromkeys("".join(pair) for pair in fresh if "".join(pair) not in tokens)]
    return made, [*(" ".join(pair) for pair in fresh if " ".join(pair) not in merges), *merges]


def named(pre: str, tokens: list[str], merges: list[str], path: Path) -> Path:
    """A model whose GGUF names a pre-tokenizer."""

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([1] * len(tokens))
        writer.add_token_merges(merges)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)
        writer.add_add_bos_token(False)

    return tiny.save_gguf(tiny.Shape(vocab=len(tokens), head=16, layers=1), path, "Q8_0", metadata=metadata)


def texts(pre: str) -> list[str]:
    """Whole texts and pieces put together at random, without the characters that llama.cpp is known to treat otherwise."""
    random = Random(7)
    left_out = re.compile(DIFFER[pre][0] if pre in DIFFER else r"(?!)")
    whole = [left_out.sub("", words) for words in WORDS]

    def piece() -> str:
        words = random.choice(whole) or " "
        start = random.randrange(len(words))
        return words[start : start + random.randrange(1, 6)]

    made = [*whole, *("".join(piece() for _ in range(random.randrange(1, 12))) for _ in range(250))]
    any_form = text.PRE_TOKENIZERS[pre].nfc is False
    return [prompt for prompt in made if any_form or unicodedata.is_normalized("NFC", prompt)]


@pytest.mark.foreign
@pytest.mark.parametrize("pre", text.PRE_TOKENIZERS)
def test_a_named_pre_tokenizer_against_llamacpp(pre: str, across: tuple[list[str], list[str]], peer: llamacpp.Peer, tmp_path: Path) -> None:
    tokens, merges = across if pre == "deepseek-llm" else joined_digits(*across)
    path = named(pre, tokens, merges, tmp_path / "model.gguf")
    made = text.for_model(path)
    assert made is not None
    prompts = texts(pre)
    assert len(prompts) > 100
    for prompt in prompts:
        assert made.encode(prompt) == peer.tokenize(path, prompt), prompt


@pytest.mark.foreign
@pytest.mark.parametrize(
    ("pre", "prompt"),
    [
        ("gpt-4o", "\u00e9cole\u00c9"), ("tekken", "\u00e9cole\u00c9"), ("llama4", "\u00e9cole\u00c9"),
        ("gpt-4o", "\u0939\u093f\u0928\u094d\u0926\u0940"), ("falcon", "\u4f60\u597d\u4e16\u754c"), ("deepseek-llm", "123"),
        ("deepseek-llm", " \u2028"),
        ("qwen2", "cafe\u0301"), ("qwen35", "cafe\u0301"), ("command-r", "cafe\u0301"),
    ],
)  # fmt: skip
def test_where_llamacpp_differs(pre: str, prompt: str, across: tuple[list[str], list[str]], peer: llamacpp.Peer, tmp_path: Path) -> None:
    """The reasons of DIFFER, tokens of several digits, and normal form C, which llama.cpp does not bring texts into.

    Words that BPE works in are all that differs, so merges that join everything across the places in question make it visible; with
    GPT-2's words, in which the two agree, the same merges give the same ids.
    """
    tokens, merges = joined_digits(*across)
    for one in (prompt, unicodedata.normalize("NFC", prompt)):
        symbols = pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(one)[0][0]
        whole = symbols[0]
        for symbol in symbols[1:]:
            if f"{whole} {symbol}" not in merges:
                merges = [f"{whole} {symbol}", *merges]
            whole += symbol
            tokens += [] if whole in tokens else [whole]
    order = sorted(merges, key=lambda merge: len(merge) if merge.replace(" ", "") in tokens[-40:] else 1000)
    for name, same in ((pre, False), ("gpt-2", True)):
        path = named(name, tokens, order, tmp_path / f"{name}.gguf")
        made = text.for_model(path)
        assert made is not None
        assert (made.encode(prompt) == peer.tokenize(path, prompt)) is same


@pytest.mark.foreign
@pytest.mark.parametrize(
    ("pre", "module", "name"),
    [("qwen2", "qwen2", "Qwen2Tokenizer"), ("qwen35", "qwen3_5", "Qwen3_5Tokenizer"), ("command-r", "cohere", "CohereTokenizer"),
     ("phi-2", "codegen", "CodeGenTokenizer"), ("gpt-2", "gpt2", "GPT2Tokenizer")],
)  # fmt: skip
def test_a_named_pre_tokenizer_is_that_of_transformers(pre: str, module: str, name: str) -> None:
    """Normalizer and words of the class that transformers has for the model."""
    pytest.importorskip("transformers")
    theirs = getattr(importlib.import_module(f"transformers.models.{module}.tokenization_{module}"), name)()
    data = json.loads(theirs.backend_tokenizer.to_str())
    rules = text.PRE_TOKENIZERS[pre]
    assert data["normalizer"] == rules.normalizer()
    assert library.bare(data["pre_tokenizer"]) == library.bare(rules.words())


def test_a_text_whose_form_is_not_settled_is_refused() -> None:
    made = text.from_gguf(GOOD | {"tokenizer.ggml.pre": "stablelm2"})
    assert made.encode("ab") == [2]
    with pytest.raises(ArgumentError, match="normal form C") as caught:
        made.encode("cafe\u0301")
    assert caught.value.code == "UNSUPPORTED"
    assert text.from_gguf(GOOD | {"tokenizer.ggml.pre": "llama3"} | {"tokenizer.ggml.add_bos_token": False}).encode("abe\u0301") == [2]


# ---- SentencePiece -----------------------------------------------------------------------------------

BLANK = "\u2581"
PHRASES = (
    *CORPUS, "hello world", "<s>hi</s> there", "<s> hi </s>x", "aaaaaaa", "aaaaa banana aaaa", " lead", "a<call>b <call> c", "<unk>x",
    "trail  ", f"{BLANK}x {BLANK}", "\u00fcber na\u00efve \U0001f600",
)  # fmt: skip


@dataclass(frozen=True)
class Pieces:
    """A SentencePiece vocabulary in the manner of Llama 2: specials, bytes, what merges make in their order, single characters."""

    tokens: list[str]
    kinds: list[int]
    scores: list[float]

    def gguf(self, path: Path, prefix: bool, bos: bool = False) -> Path:
        def metadata(writer: gguf.GGUFWriter) -> None:
            writer.add_tokenizer_model("llama")
            writer.add_tokenizer_pre("default")
            writer.add_token_list(self.tokens)
            writer.add_token_types(self.kinds)
            writer.add_token_scores(self.scores)
            writer.add_bos_token_id(1)
            writer.add_eos_token_id(2)
            writer.add_unk_token_id(0)
            writer.add_add_bos_token(bos)
            writer.add_add_space_prefix(prefix)

        return tiny.save_gguf(tiny.Shape(vocab=len(self.tokens), head=16, layers=1), path, "Q8_0", metadata=metadata)


@pytest.fixture(scope="module")
def pieces() -> Pieces:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=420, min_frequency=1, show_progress=False)
    backend.train_from_iterator([one for one in PHRASES * 3 if "<" not in one and "\0" not in one], trainer)
    model = json.loads(backend.to_str())["model"]
    made = [*("".join(pair) for pair in model["merges"]), BLANK * 2, BLANK * 4, "aaa", "aaaa"]
    made += sorted(token for token in model["vocab"] if len(token) == 1)
    made = list(dict.fromkeys(made))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *made, "<call>", "[PAD9]"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(made), 4, 5]
    return Pieces(tokens, kinds, [*[0.0] * 259, *(-1.0 - place for place in range(len(made))), -1000.0, -1000.0])


@pytest.mark.foreign
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_against_llamacpp(pieces: Pieces, peer: llamacpp.Peer, tmp_path: Path, prefix: bool) -> None:
    path = pieces.gguf(tmp_path / "model.gguf", prefix)
    made = text.for_model(path)
    assert made is not None
    for prompt in PHRASES:
        assert made.encode(prompt) == peer.tokenize(path, prompt), prompt
        if not prefix and BLANK not in prompt:
            assert made.decode(made.encode(prompt)) == prompt

    random = Random(11)
    for _ in range(500):
        prompt = "".join(random.choice(pieces.tokens[259:]) for _ in range(random.randrange(1, 12))).replace(BLANK, " ")
        assert made.encode(prompt) == peer.tokenize(path, prompt), prompt


def by_score(prompt: str, scores: dict[str, float]) -> list[str]:
    """The rule as it is told: of all neighbours that are a token together, the best one merges, the leftmost if there are several."""
    symbols = list(prompt)
    while True:
        places = [place for place in range(len(symbols) - 1) if symbols[place] + symbols[place + 1] in scores]
        if not places:
            return symbols
        place = max(places, key=lambda place: (scores[symbols[place] + symbols[place + 1]], -place))
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]


def test_merges_are_those_by_score() -> None:
    """Small vocabularies of two letters, most of whose tokens can be made in several ways, in any order of scores."""
    random = Random(5)
    several = 0
    for _ in range(120):
        word = "".join(random.choices("ab", k=6))
        parts = sorted({word[first:last] for first, last in itertools.combinations(range(7), 2) if last - first > 1})
        made = random.sample(parts, random.randrange(4, len(parts) + 1))
        tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", *made]
        scores = {token: -1.0 - place for place, token in enumerate(made)}
        several += sum(len(sentencepiece.cuts(token, dict.fromkeys(tokens, 0))) > 1 for token in made)
        metadata = {"model": "llama", "tokens": tokens, "scores": [0.0] * 259 + list(scores.values()), "add_bos_token": False}
        metadata |= {"add_space_prefix": False, "token_type": [2] + [6] * 256 + [1] * (2 + len(made))}
        known = text.from_gguf({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})
        for _ in range(60):
            prompt = "".join(random.choices("ab", k=random.randrange(1, 12)))
            assert [tokens[token] for token in known.encode(prompt)] == by_score(prompt, scores), (made, prompt)
    assert several > 100


@pytest.mark.foreign
@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_against_transformers(pieces: Pieces, tmp_path: Path, legacy: bool) -> None:
    """LlamaTokenizerFast with the merges that transformers derives.

    It puts no blank before a text that begins with one, nor, unless legacy, after a special token; llama.cpp and SentencePiece do both.
    """
    pytest.importorskip("transformers")
    from transformers.convert_slow_tokenizer import generate_merges
    from transformers.models.llama.tokenization_llama import LlamaTokenizerFast

    made = text.for_model(pieces.gguf(tmp_path / "model.gguf", prefix=True, bos=True))
    assert made is not None
    vocabulary = {token: number for number, token in enumerate(pieces.tokens) if token != "[PAD9]"}
    scores = {token: pieces.scores[number] for token, number in vocabulary.items()}
    theirs = LlamaTokenizerFast(
        vocab=vocabulary, merges=generate_merges(vocabulary, scores), legacy=legacy, additional_special_tokens=["<call>"]
    )
    theirs.update_post_processor()
    differ = []
    for prompt in PHRASES:
        ids = theirs(prompt)["input_ids"]
        ids = ids if ids[:1] == [1] else [1, *ids]
        if made.encode(prompt) != ids:
            differ.append(prompt)
    expected = [prompt for prompt in PHRASES if prompt[:1] in (" ", BLANK) or re.search(r"(<s>|</s>|<call>|<unk>) ", prompt)]
    if not legacy:
        expected = [prompt for prompt in PHRASES if prompt in expected or re.search(r"(<s>|</s>|<call>|<unk>)[^<]", prompt)]
    assert differ == expected


def test_sentencepiece_pieces_and_ends(pieces: Pieces, tmp_path: Path) -> None:
    """A piece keeps the blank that decoding takes from the beginning of a text; unused tokens come from no text."""
    made = text.for_model(pieces.gguf(tmp_path / "model.gguf", prefix=True, bos=True))
    assert made is not None
    ids = made.encode("hello world")
    assert ids[0] == 1
    assert made.eos_ids == {2}
    assert made.decode(ids[1:]) == "hello world"
    assert "".join(map(made.id_to_piece, ids[1:])) == " hello world"
    assert made.id_to_piece(len(pieces.tokens) - 1) == f"[{len(pieces.tokens) - 1}]"
    assert len(pieces.tokens) - 1 not in made.encode("[PAD9]")
    assert made.named == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_goes_into_metadata_and_back(pieces: Pieces, tmp_path: Path, prefix: bool) -> None:
    """From a tokenizer.json in the form that Llama 2's has, to GGUF's keys, to APR's: one digest, the same ids."""
    made = text.for_model(pieces.gguf(tmp_path / "model.gguf", prefix, bos=True))
    assert made is not None
    made.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}))
    first = text.from_json(tmp_path / "tokenizer.json")
    metadata = text.gguf_metadata(tmp_path, len(pieces.tokens) + 3)
    assert metadata["tokenizer.ggml.scores"].dtype == "float32"
    assert {len(metadata["tokenizer.ggml." + key]) for key in ("tokens", "token_type", "scores")} == {len(pieces.tokens) + 3}
    apr = json.loads(json.dumps(text.apr_metadata(tmp_path)))
    for other in (first, text.from_gguf(metadata), text.from_apr(apr)):
        assert other.digest == made.digest
        assert all(other.encode(prompt) == made.encode(prompt) for prompt in PHRASES)
    assert text.from_gguf(metadata | {"tokenizer.ggml.add_space_prefix": not prefix}).digest != made.digest


def test_added_tokens_of_the_normalized_text_cannot_be_said(pieces: Pieces, tmp_path: Path) -> None:
    """The first conversions of Llama have them: <s> is found only where a blank may be put before it."""
    made = text.for_model(pieces.gguf(tmp_path / "model.gguf", True))
    assert made is not None
    data = json.loads(made.backend.to_str())
    data["added_tokens"] = [token | {"normalized": True} for token in data["added_tokens"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert text.from_json(tmp_path / "tokenizer.json").encode("hi<s>") != made.encode("hi<s>")
    with pytest.raises(FormatError, match="normalized") as caught:
        text.gguf_metadata(tmp_path)
    assert caught.value.field == "added_tokens"


def test_a_blank_before_the_first_piece_only_cannot_be_said(pieces: Pieces, tmp_path: Path) -> None:
    """What Llama's tokenizer.json has since transformers 5; metadata mean a blank before every piece."""
    made = text.for_model(pieces.gguf(tmp_path / "model.gguf", True))
    assert made is not None
    data = json.loads(made.backend.to_str())
    data |= {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": BLANK, "prepend_scheme": "first", "split": False}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(FormatError) as caught:
        text.gguf_metadata(tmp_path)
    assert (caught.value.code, caught.value.field) == ("UNSUPPORTED", "normalizer")


# ---- chat templates ----------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "hi"}]


def payloads(mark: Path) -> list[str]:
    """Programs that would leave a mark, were they run without a sandbox."""
    return [
        f"{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}",
        f"{{{{ lipsum.__globals__['os'].system('touch {mark}') }}}}",
        f"{{% set opener = lipsum.__globals__['__builtins__']['open'] %}}{{{{ opener('{mark}', 'w').close() }}}}",
    ]


def test_the_template_of_each_container(canary: Pair) -> None:
    assert canary[0].chat_template == canary[1].chat_template
    assert canary[0].chat_template is not None
    assert "im_start" in canary[0].chat_template


@pytest.mark.foreign
@pytest.mark.parametrize("which", range(3))
def test_a_hostile_template_stays_text(tmp_path: Path, which: int) -> None:
    """Loaded from all three containers: no mark.  Rendered when asked: refused, no mark.  Without the sandbox it would leave one."""
    pytest.importorskip("transformers")
    import jinja2

    mark = tmp_path / "mark"
    template = payloads(mark)[which]
    (tmp_path / "tokenizer.json").write_bytes((CANARY / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(template)
    loaded = text.from_json(tmp_path / "tokenizer.json")
    metadata = text.gguf_metadata(tmp_path)
    for made in (loaded, text.from_gguf(metadata), text.from_apr(text.apr_metadata(tmp_path))):
        assert made.chat_template == template
    with pytest.raises(FormatError, match="chat_template") as caught:
        text.render_chat(template, MESSAGES)
    assert caught.value.field == "chat_template"
    assert not mark.exists()
    jinja2.Environment().from_string(template).render()
    assert mark.exists()


@pytest.mark.foreign
def test_a_template_is_rendered_as_transformers_does(canary: Pair) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(CANARY)
    messages = [*MESSAGES, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "What is 2+2?"}]
    known = canary[1]
    assert known.chat_template is not None
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.render_chat(known.chat_template, messages, known.named) == expected
    ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert chat.chat_ids(known, "hi") == chat.chat_ids(canary[0], "hi") == ids
    assert text.render_chat("{{ bos_token }}|{{ messages[0].content }}", MESSAGES, {"bos_token": "<s>"}) == "<s>|hi"


def test_templates_beside_a_tokenizer_json(tmp_path: Path) -> None:
    """chat_template.jinja wins over tokenizer_config.json; of several there, the default."""
    (tmp_path / "tokenizer.json").write_bytes((CANARY / "tokenizer.json").read_bytes())
    assert text.from_json(tmp_path / "tokenizer.json").chat_template is None
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "tool"}, {"name": "default", "template": "plain"}]
    for said, found in ((named, "plain"), ("one", "one"), (7, None)):
        config.write_text(json.dumps({"chat_template": said}))
        assert text.from_json(tmp_path / "tokenizer.json").chat_template == found
    (tmp_path / "chat_template.jinja").write_text("file")
    assert text.from_json(tmp_path / "tokenizer.json").chat_template == "file"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(FormatError) as caught:
        text.from_json(tmp_path / "tokenizer.json")
    assert caught.value.code == "UTF8"


def test_without_a_template_or_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    made = text.from_gguf(GOOD)
    with pytest.raises(CannotRun, match="no chat template"):
        chat.chat_ids(made, "hi")
    monkeypatch.setitem(sys.modules, "transformers.utils.chat_template_utils", None)
    with pytest.raises(CannotRun, match="transformers"):
        text.render_chat("{{ 1 }}", MESSAGES)


@pytest.mark.foreign
def test_the_option_chat(canary: Pair, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """run, trace and bisect take the prompt as a user's message: more tokens than the raw text's, those of the template."""
    pytest.importorskip("transformers")
    model, prompt = str(CANARY / "canary.gguf"), "What is 2+2?"
    expected = chat.chat_ids(canary[0], prompt)
    assert expected != canary[0].encode(prompt)
    assert run.main([model, "--prompt", prompt, "--chat", "--json", "-n", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_ids"] == expected
    assert trace.main([model, "--prompt", prompt, "--chat", "--stages", "lm_head", "-o", str(tmp_path / "out"), "-q"]) == 0
    assert list(open_captures(tmp_path / "out").tokens) == expected
    capsys.readouterr()
    assert bisect.main([model, "--against", model, "--prompt", prompt, "--chat", "--json", "--answer", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == expected


@pytest.mark.parametrize(
    ("command", "words"),
    [(run, ["--prompt-ids", "1"]), (trace, ["--prompt-ids", "1", "-o", "out"]), (bisect, ["--prompt-ids", "1"]), (bisect, [])],
)
def test_chat_without_a_text_is_wrong_usage(command: Any, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(CANARY / "canary.gguf"), *words, "--chat"]) == 2
    assert "--chat needs a text" in capsys.readouterr().err


def test_chat_with_a_model_that_has_no_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = train("qwen2", tmp_path, False)[1]
    assert run.main([str(path), "--prompt", "hi", "--chat", "-n", "1"]) == 3
    assert "no chat template" in capsys.readouterr().err
