"""Hostile tokenizers: what a tokenizer.json or a GGUF's metadata may say to hurt, and the error that each must become.

Every row is one small change to a good tokenizer; the good one is read, so that no row is caught for another reason than its own.  A row
takes no more than two seconds of this process's time and no memory to speak of, whatever numbers the file has.  Rows are named as in the
project's list of hostile files: J for tokenizer.json, M for metadata.
"""

from __future__ import annotations

import copy
import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from aprender import text
from aprender.errors import ArgumentError, ConfigError, FormatError
from aprender.text import backend as library
from aprender.text import strict

SECONDS = 2.0

VOCABULARY = {token: number for number, token in enumerate(["a", "b", "c", "d", "ab", "cd", "abcd", "e", "f", "g"])}
GOOD: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None,
    "added_tokens": [
        {"id": 10, "content": "<|end|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "post_processor": None,
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
              "fuse_unk": False, "byte_fallback": False, "vocab": VOCABULARY, "merges": [["a", "b"], ["c", "d"], ["ab", "cd"]]},
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """Two seconds of this process, whatever the machine does besides."""
    start = time.process_time()
    yield
    spent = time.process_time() - start
    assert spent < SECONDS, f"{spent:.2f} s"


def put(**changes: Any) -> bytes:
    """The good file with values replaced; ``model__vocab`` is model.vocab."""
    data = copy.deepcopy(GOOD)
    for name, value in changes.items():
        *folders, key = name.split("__")
        target = data
        for folder in folders:
            target = target[folder]
        target[key] = value
    return json.dumps(data).encode()


def vocabulary(**more: Any) -> bytes:
    return put(model__vocab=VOCABULARY | more)


def swap(old: str, new: str) -> bytes:
    """The good file with its text changed once."""
    whole = json.dumps(GOOD)
    assert whole.count(old) == 1, old
    return whole.replace(old, new).encode()


def added(**changes: Any) -> bytes:
    return put(added_tokens=[GOOD["added_tokens"][0] | changes])


def split(pattern: str) -> bytes:
    return put(pre_tokenizer={"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False})


def template(**changes: Any) -> bytes:
    special = {"<|end|>": {"id": "<|end|>", "ids": [10], "tokens": ["<|end|>"]}}
    single = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|end|>", "type_id": 0}}]
    return put(post_processor={"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special} | changes)


def template_ids(ids: list[int]) -> bytes:
    return template(special_tokens={"<|end|>": {"id": "<|end|>", "ids": ids, "tokens": ["<|end|>"] * len(ids)}})


ROWS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "J01-empty": ("JSON", lambda: b""),
    "J01-text": ("JSON", lambda: b"hello"),
    "J01-list": ("JSON", lambda: b"[]"),
    "J02-lists": ("DEPTH", lambda: b"[" * 100_000),
    "J02-objects": ("DEPTH", lambda: b'{"a":' * 100_000),
    "J02-just-too-deep": ("DEPTH", lambda: put(more=json.loads("[" * 64 + "]" * 64))),
    "J03-vocab": ("DUPLICATE", lambda: swap('"merges": ', '"vocab": {}, "merges": ')),
    "J03-token": ("DUPLICATE", lambda: swap('"b": 1', '"b": 1, "a": 1')),
    "J03-added": ("DUPLICATE", lambda: put(added_tokens=GOOD["added_tokens"] * 2)),
    "J04-negative": ("TOKENIZER", lambda: vocabulary(g=-1)),
    "J04-fraction": ("TOKENIZER", lambda: vocabulary(g=1.5)),
    "J04-string": ("TOKENIZER", lambda: vocabulary(g="3")),
    "J04-null": ("TOKENIZER", lambda: vocabulary(g=None)),
    "J04-true": ("TOKENIZER", lambda: vocabulary(g=True)),
    "J04-2^63": ("TOKENIZER", lambda: vocabulary(g=2**63)),
    "J05-huge": ("TOKENIZER", lambda: b'{"model":{"type":"BPE","vocab":{"a":1000000000},"merges":[]}}'),
    "J05-added": ("TOKENIZER", lambda: added(id=10**9)),
    "J05-template": ("TOKENIZER", lambda: template_ids([10**9])),
    "J06-shared": ("TOKENIZER", lambda: vocabulary(g=3)),
    "J07-unknown": ("TOKENIZER", lambda: put(model__merges=[["a", "q"]])),
    "J07-joined": ("TOKENIZER", lambda: put(model__merges=[["b", "a"]])),
    "J08-long": ("TOKENIZER", lambda: put(model__merges=[["abcd", "abcd"]])),
    "J09-none": ("TOKENIZER", lambda: put(model__merges=[[]])),
    "J09-one": ("TOKENIZER", lambda: put(model__merges=["ab"])),
    "J09-three": ("TOKENIZER", lambda: put(model__merges=["a b c"])),
    "J09-three-listed": ("TOKENIZER", lambda: put(model__merges=[["a", "b", "c"]])),
    "J09-number": ("TOKENIZER", lambda: put(model__merges=[7])),
    "J09-numbers": ("TOKENIZER", lambda: put(model__merges=[[1, 2]])),
    "J09-object": ("TOKENIZER", lambda: put(model__merges={"a": "b"})),
    "J10-prefix": ("TOKENIZER", lambda: put(model__continuing_subword_prefix="#####")),
    "J11-empty": ("TOKENIZER", lambda: added(content="")),
    "J11-clash": ("TOKENIZER", lambda: added(id=3)),
    "J11-other-id": ("TOKENIZER", lambda: added(content="a")),
    "J11-gap": ("TOKENIZER", lambda: added(id=20)),
    "J11-long": ("TOKENIZER", lambda: added(content="x" * (1 << 20))),
    "J11-number": ("TOKENIZER", lambda: put(added_tokens=[7])),
    "J11-object": ("TOKENIZER", lambda: put(added_tokens={})),
    "J12-unknown": ("UNSUPPORTED", lambda: put(model__type="Magic")),
    "J12-missing": ("UNSUPPORTED", lambda: swap('"type": "BPE", ', "")),
    "J12-no-model": ("UNSUPPORTED", lambda: b'{"version":"1.0"}'),
    "J13-other": ("UNSUPPORTED", lambda: split(r"\w+")),
    "J13-backtracking": ("UNSUPPORTED", lambda: split("(a+)+$")),
    "J13-number": ("UNSUPPORTED", lambda: split(7)),  # type: ignore[arg-type]
    "J13-replace": ("UNSUPPORTED", lambda: put(normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""})),
    "J13-decoder": ("UNSUPPORTED", lambda: put(decoder={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""})),
    "J14-unknown": ("UNSUPPORTED", lambda: put(normalizer={"type": "Magic"})),
    "J14-words": ("UNSUPPORTED", lambda: put(pre_tokenizer={"type": "Magic"})),
    "J14-frame": ("UNSUPPORTED", lambda: put(post_processor={"type": "Magic"})),
    "J14-text": ("UNSUPPORTED", lambda: put(normalizer="NFC")),
    "J14-many": ("LIMIT", lambda: put(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 100_000})),
    "J14-template": ("LIMIT", lambda: template(single=[{"SpecialToken": {"id": "<|end|>", "type_id": 0}}] * 100_000)),
    "J15-bytes": ("UTF8", lambda: swap('"g"', '"\xff"').replace("\xff".encode(), b"\xff")),
    "J15-surrogate": ("UTF8", lambda: swap('"g"', r'"\ud800"')),
    "J15-swapped-pair": ("UTF8", lambda: swap('"g"', r'"\udc00\ud800"')),
    "J15-nul": ("TOKENIZER", lambda: swap('"g"', r'"\u0000"')),
    "J15-nul-added": ("TOKENIZER", lambda: added(content="<\0>")),
    "J16-1e400": ("JSON", lambda: swap('"g": 9', '"g": 1e400')),
    "J16-nan": ("JSON", lambda: swap('"g": 9', '"g": NaN')),
    "J16-infinity": ("JSON", lambda: swap('"g": 9', '"g": -Infinity')),
    "J16-01": ("JSON", lambda: swap('"g": 9', '"g": 09')),
    "J16-digits": ("JSON", lambda: swap('"g": 9', '"g": ' + "9" * 5000)),
    "J17-token": ("LIMIT", lambda: vocabulary(**{"x" * (1 << 20): 11})),
    "J17-file": ("LIMIT", lambda: b'{"' + b"x" * 100_000_000 + b'":1}'),
    "J18-merges": ("LIMIT", lambda: swap("[[", '["' + 'a b","' * 9_000_000 + 'a b",[')),
    "dropout": ("UNSUPPORTED", lambda: put(model__dropout=0.1)),
    "unknown-token": ("TOKENIZER", lambda: put(model__unk_token="<unk>")),
    "vocabulary-list": ("TOKENIZER", lambda: put(model__vocab=["a"])),
}  # fmt: skip


def write(folder: Path, content: bytes) -> Path:
    path = folder / "tokenizer.json"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ROWS)
def test_a_hostile_tokenizer_json(tmp_path: Path, name: str) -> None:
    code, make = ROWS[name]
    path = write(tmp_path, make())
    with pytest.raises(FormatError) as caught:
        text.from_json(path)
    assert caught.value.code == code, caught.value
    said = str(caught.value)
    assert said.startswith(str(path))
    assert "\n" not in said
    assert len(said) - len(str(path)) < 400


def test_the_good_one_is_read(tmp_path: Path) -> None:
    """As it is, with a template, with known words, with a prefix that every right part has; as deep as may be."""
    assert strict.parse(Path("deep.json"), "[" * strict.MOST_DEPTH + "]" * strict.MOST_DEPTH)
    for content in (json.dumps(GOOD).encode(), split(r"\p{N}{1,3}"), template_ids([10])):
        made = text.from_json(write(tmp_path, content))
        assert made.encode("abcdab<|end|>")[:3] == [6, 4, 10]
    assert text.from_json(write(tmp_path, template_ids([10]))).encode("ab") == [4, 10]
    fused = put(model__continuing_subword_prefix="#", model__vocab={"a": 0, "#b": 1, "ab": 2}, model__merges=[["a", "#b"]], added_tokens=[])
    assert text.from_json(write(tmp_path, fused)).encode("ab") == [2]


@pytest.mark.parametrize("name", ["J05-huge", "J05-added", "J05-template"])
def test_no_memory_by_declared_ids(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, ROWS[name][1]())
    tracemalloc.start()
    with pytest.raises(FormatError):
        text.from_json(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20, peak


def test_padding_and_truncation_of_the_file_are_not_followed(tmp_path: Path) -> None:
    """They are for batches; a file must not make a text 10^9 tokens long, or cut it."""
    padding = {
        "strategy": {"Fixed": 10**9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "a",
    }
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    assert text.from_json(write(tmp_path, put(padding=padding, truncation=truncation))).encode("abc") == [4, 2]


def test_a_panic_of_the_library_is_a_format_error(tmp_path: Path) -> None:
    """Past the look before, which refuses this file already, the library panics with what is not even an Exception."""
    bad = put(model__continuing_subword_prefix="#####").decode()
    with pytest.raises(BaseException, match="range") as raw:
        tokenizers.Tokenizer.from_str(bad)
    assert not isinstance(raw.value, Exception)
    with pytest.raises(FormatError, match="some file") as caught:
        library.guarded("some file", lambda: tokenizers.Tokenizer.from_str(bad))
    assert caught.value.code == "TOKENIZER"


def test_an_interruption_stays_one() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        library.guarded("some file", interrupted)


def test_a_known_pattern_is_looked_up_at_once() -> None:
    """J13: the pattern is compared, never compiled."""
    data = json.loads(split("(a+)+$" * 10))
    start = time.perf_counter()
    with pytest.raises(FormatError):
        strict.check(data, Path("tokenizer.json"))
    assert time.perf_counter() - start < 0.01


def test_no_regular_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        text.from_json(tmp_path)
    assert caught.value.code == "NOT_REGULAR"
    with pytest.raises(FormatError) as caught:
        text.from_json(tmp_path / "none.json")
    assert caught.value.code == "IO"


# ---- J19, J20: texts -------------------------------------------------------------------------------------------------------------------

MEGA = 1_000_000


def chain(count: int) -> dict[str, Any]:
    """A vocabulary of a, aa, aaa, … each made by putting one more a behind: the worst for a merger that starts anew at each merge."""
    merges = [["a" * length, "a"] for length in range(1, count)]
    return {"model__vocab": {"a" * length: length for length in range(1, count + 1)}, "model__merges": merges, "added_tokens": []}


ALTERNATING = {"model__vocab": {"a": 0, "b": 1, "ba": 2, "ab": 3, "baba": 4, "abab": 5}, "added_tokens": [],
               "model__merges": [["b", "a"], ["a", "b"], ["ba", "ba"], ["ab", "ab"]]}  # fmt: skip


TEXTS: dict[str, tuple[dict[str, Any], str, int | None]] = {
    "letter": ({}, "a" * MEGA, MEGA),
    "pairs": (chain(2), "a" * MEGA, MEGA // 2),
    "chain": (chain(600), "a" * MEGA, MEGA // 2),
    "alternating": (ALTERNATING, "ab" * (MEGA // 2), None),
}


@pytest.mark.parametrize(("changes", "prompt", "count"), TEXTS.values(), ids=TEXTS)
def test_a_megabyte_of_one_word(tmp_path: Path, changes: dict[str, Any], prompt: str, count: int | None) -> None:
    made = text.from_json(write(tmp_path, put(**changes)))
    ids = made.encode(prompt)
    assert count is None or len(ids) == count
    assert made.decode(ids[:100]) == prompt[: len(made.decode(ids[:100]))]


def test_strange_texts(tmp_path: Path) -> None:
    made = text.from_json(write(tmp_path, json.dumps(GOOD).encode()))
    assert made.encode("a\0b") == [0, 1]  # the vocabulary has no byte 0, and no token for what it does not know
    with pytest.raises(ArgumentError) as caught:
        made.encode("a" * (text.LONGEST_TEXT + 1))
    assert caught.value.code == "LIMIT"
    with pytest.raises(ArgumentError) as caught:
        made.encode("a\udcff")
    assert caught.value.code == "UTF8"


# ---- J25, J26, M15: what a folder brings along -----------------------------------------------------------------------------------------


def test_code_beside_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    """auto_map names a module that leaves a mark when imported."""
    mark = tmp_path / "mark"
    write(tmp_path, json.dumps(GOOD).encode())
    (tmp_path / "tokenization_evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}))
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "tokenization_evil.Evil"}, "eos_token_id": 10}))
    made = text.for_model(tmp_path)
    assert made is not None
    assert made.eos_ids == {10}
    assert not mark.exists()


# ---- M05 to M08: metadata --------------------------------------------------------------------------------------------------------------

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["<unk>", "<s>", "</s>", *BYTES, "a", "b", "ab", "\u2581"]
METADATA: dict[str, Any] = {
    "model": "llama", "tokens": PIECES, "token_type": np.array([2, 3, 3] + [6] * 256 + [1] * 4, np.int32),
    "scores": np.array([0.0] * 259 + [-2.0, -3.0, -1.0, -4.0], np.float32), "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
}  # fmt: skip


def gguf(**changes: Any) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in (METADATA | changes).items() if value is not None}


def test_the_good_metadata_are_read() -> None:
    made = text.from_gguf(gguf())
    assert made.encode("ab\u00e9") == [1, 262, 261, 3 + 0xC3, 3 + 0xA9]
    assert made.decode(made.encode("ab\u00e9")) == "<s> ab\u00e9"


def test_a_begin_token_that_looks_like_a_template() -> None:
    """It is put in front as it stands, whatever the library's shorthand would make of it."""
    for odd in ("$A", "$0", "a:1", "a b", ":", "$"):
        made = text.from_gguf(gguf(tokens=["<unk>", odd, *PIECES[2:]], add_eos_token=True))
        assert made.encode("ab") == [1, 262, 261, 2]


def test_a_megabyte_without_words() -> None:
    """SentencePiece's whole text is one word."""
    made = text.from_gguf(gguf())
    assert len(made.encode("ab" * (MEGA // 4))) == MEGA // 4 + 2
    assert len(made.encode("a" * (MEGA // 2))) == MEGA // 2 + 2


METADATA_ROWS: dict[str, tuple[type[Exception], str, str, dict[str, Any]]] = {
    "M05-scores": (ConfigError, "CONFIG", "scores", {"scores": METADATA["scores"][:-1]}),
    "M05-types": (ConfigError, "CONFIG", "token_type", {"token_type": METADATA["token_type"][:-1]}),
    "M05-longer": (ConfigError, "CONFIG", "scores", {"scores": np.zeros(1000, np.float32)}),
    "M05-none": (FormatError, "MISSING", "scores", {"scores": None}),
    "M06-u8": (FormatError, "KV_TYPE", "scores", {"scores": METADATA["scores"].astype(np.uint8)}),
    "M06-i8": (FormatError, "KV_TYPE", "scores", {"scores": METADATA["scores"].astype(np.int8)}),
    "M06-f64": (FormatError, "KV_TYPE", "scores", {"scores": METADATA["scores"].astype(np.float64)}),
    "M06-strings": (FormatError, "KV_TYPE", "scores", {"scores": PIECES}),
    "M06-types-f32": (FormatError, "KV_TYPE", "token_type", {"token_type": METADATA["token_type"].astype(np.float32)}),
    "M07-negative": (FormatError, "TOKENIZER", "tokens", {"tokens": [*PIECES[:3], "<0x-1>", *PIECES[4:]]}),
    "M07-letters": (FormatError, "TOKENIZER", "tokens", {"tokens": [*PIECES[:3], "<0xZZ>", *PIECES[4:]]}),
    "M07-short": (FormatError, "TOKENIZER", "tokens", {"tokens": [*PIECES[:3], "<0x1>", *PIECES[4:]]}),
    "M07-missing": (FormatError, "TOKENIZER", "tokens", {
        "tokens": [*PIECES[:3], "x", *PIECES[4:]], "token_type": np.array([2, 3, 3, 1] + [6] * 255 + [1] * 4, np.int32)}),
    "M08-bos": (ConfigError, "CONFIG", "bos_token_id", {"bos_token_id": len(PIECES)}),
    "M08-eos": (ConfigError, "CONFIG", "eos_token_id", {"eos_token_id": 2**32 - 1}),
    "M08-unknown": (ConfigError, "CONFIG", "unknown_token_id", {"unknown_token_id": -1}),
    "M08-true": (ConfigError, "CONFIG", "bos_token_id", {"bos_token_id": True}),
    "scores-nan": (FormatError, "TOKENIZER", "scores", {"scores": np.full(len(PIECES), np.nan, np.float32)}),
    "scores-tied": (FormatError, "UNSUPPORTED", "scores", {
        "tokens": [*PIECES, "ba"], "token_type": None, "scores": np.array([0.0] * 259 + [-2, -3, -1, -4, -1], np.float32)}),
    "long-piece": (FormatError, "LIMIT", "tokens", {"tokens": [*PIECES[:-1], "a" * 5000]}),
    "long-pieces": (FormatError, "LIMIT", "tokens", {
        "tokens": [*PIECES, *(f"{number:04000}" for number in range(30))], "token_type": None, "scores": np.arange(293, dtype=np.float32)}),
    "empty": (FormatError, "TOKENIZER", "tokens", {"tokens": ["", *PIECES[1:]]}),
    "twice": (FormatError, "DUPLICATE", "tokens", {"tokens": [*PIECES[:-1], "a"]}),
    "blanks": (FormatError, "UNSUPPORTED", "remove_extra_whitespaces", {"remove_extra_whitespaces": True}),
    "flag": (FormatError, "TYPE", "add_space_prefix", {"add_space_prefix": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", METADATA_ROWS)
def test_hostile_metadata(name: str) -> None:
    """From GGUF, and the same from APR under its own names."""
    kind, code, key, changes = METADATA_ROWS[name]
    metadata = gguf(**changes)
    with pytest.raises(kind) as caught:
        text.from_gguf(metadata, "some.gguf")
    assert (caught.value.code, caught.value.field) == (code, f"tokenizer.ggml.{key}")  # type: ignore[attr-defined]
    if code == "KV_TYPE" and isinstance(changes[key], np.ndarray):
        return  # JSON has one kind of number
    with pytest.raises(kind) as caught:
        text.from_apr(text.apr_metadata(metadata), "some.apr")
    assert caught.value.code == code  # type: ignore[attr-defined]
