"""Text to ids: the same ids from GGUF metadata and from tokenizer.json, checked against transformers and llama.cpp.

The tokenizers beside the canary's are trained here on a few sentences, in the manner of Qwen2, Llama 3 and GPT-2; what matters is the words
that the pre-tokenizer makes, so the corpus is chosen for those: digits, contractions, white space, scripts, emoji, control characters.
"""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import gguf
import llamacpp
import pytest
import tiny
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

import aprender
from aprender import _core, text
from aprender.errors import ArgumentError, ConfigError, FormatError

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
        ("model", "llama"), ("model", None), ("pre", "qwen9"), ("pre", None), ("pre", 3), ("tokens", None), ("tokens", [1, 2]),
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
