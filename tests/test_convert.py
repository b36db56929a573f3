"""convert: what is written is what the source said, in any container, whoever reads it; and nothing is left where something failed.

Truth: the ``gguf`` package and llama.cpp for GGUF, ``apr_bytes.py`` (which shares no code with the package) for APR, the weights of
``tiny.py`` for the values, our engine on both files for the stages, and llama.cpp's published rule for the mix.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import apr_bytes
import gguf
import llamacpp
import numpy as np
import pytest
import tiny
from conftest import CANARY, PROMPT, blob, safetensors_bytes, write_folder
from hypothesis import given
from hypothesis import strategies as st

from aprender import _core, atomic, conversion, convert, mixes, text, writers
from aprender.errors import ArgumentError, CannotRun, FormatError, UnknownName

IDS = [int(i) for i in np.random.default_rng(5).integers(0, tiny.Shape().vocab, 9)]
PLAIN_SHAPES = [tiny.Shape(arch, tied=tied) for arch in tiny.ARCHS for tied in (False, True)]
BIASED = [shape for shape in tiny.SHAPES if shape.attention_bias]
WIDE = tiny.Shape("llama", dim=256, ffn=512, heads=4, kv_heads=2, head=64)
"""Widths that fill the blocks of K-quants."""

NARROW = tiny.Shape("llama", dim=64, ffn=160, heads=4, kv_heads=2, head=24)
"""Widths that fill blocks of 32 but none of 256."""

WRITABLE = [row[0] for row in _core.FORMATS if row[8]]
APR_IDS = {row[6]: row[0] for row in _core.FORMATS if row[6] >= 0}


# ---- helpers ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def done(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """done(source, out, *options): convert, expect success, give the JSON."""

    def converted(source: object, out: object, *options: str) -> dict[str, Any]:
        code = convert.main([str(source), str(out), "--json", *options])
        said, err = capsys.readouterr()
        assert (code, err) == (0, "")
        return dict(json.loads(said))

    return converted


@pytest.fixture
def failed(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """failed(code, source, out, *options): convert, expect this exit code and one line on stderr; gives the line."""

    def refused(code: int, source: object, out: object, *options: str) -> str:
        found = convert.main([str(source), str(out), *options])
        said, err = capsys.readouterr()
        assert (found, said) == (code, "")
        assert err.startswith("aprender: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        return err

    return refused


def bits(path: Path, ids: list[int] = IDS) -> dict[Any, bytes]:
    """Every stage of our engine on a file."""
    kept = _core.Run(_core.Model(_core.File(path))).forward(ids, "all")
    return {key: array.tobytes() for key, array in kept.items()}


def of_gguf(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    """Keys and tensors as the gguf package reads them."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == len(reader.tensors)
    return keys, tensors


def gguf_values(tensor: gguf.ReaderTensor) -> np.ndarray:
    """Values as the gguf package decodes them, outermost dimension first."""
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape([int(n) for n in tensor.shape[::-1]])


def apr_values(entry: apr_bytes.Entry) -> np.ndarray:
    """Values of an APR tensor: decoded by the gguf package, APR's own two formats by tiny."""
    kind = APR_IDS[entry.dtype]
    if kind.startswith("APR_"):
        return tiny.apr_values(entry.data, kind, entry.shape)
    raw = np.frombuffer(entry.data, np.uint8)
    if len(entry.shape) > 1:
        raw = raw.reshape(entry.shape[0], -1)
    values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    return values.reshape(*entry.shape[:-1], -1)[..., : entry.shape[-1]]


def straight(array: np.ndarray, heads: int) -> np.ndarray:
    """Undo ``tiny.permuted``: row 2i + s of a head goes back to half s."""
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(array.shape)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- the byte layouts ------------------------------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12)
TENSORS = st.dictionaries(
    NAMES.map(lambda name: name.strip() or "t"),
    st.tuples(st.integers(1, 5), st.integers(1, 70), st.sampled_from(["F32", "F16", "BF16"])),
    max_size=6,
)
WORDS = st.text(st.characters(codec="utf-8"), max_size=20)


def random_tensors(said: Mapping[str, tuple[int, int, str]]) -> tuple[list[writers.Tensor], list[np.ndarray]]:
    """Tensors of these sizes, every other one a vector, and bytes for them."""
    tensors = [writers.Tensor(name, kind, (n,) if i % 2 else (rows, n)) for i, (name, (rows, n, kind)) in enumerate(said.items())]
    return tensors, [np.random.default_rng(i).integers(0, 256, t.nbytes, np.uint8) for i, t in enumerate(tensors)]


def laid_down(path: Path, layout: writers.Layout, pieces: list[np.ndarray]) -> Path:
    with open(path, "wb") as out:
        writers.write(out, layout, pieces)
    assert path.stat().st_size == layout.nbytes
    return path


@given(
    TENSORS,
    st.dictionaries(NAMES, st.one_of(WORDS, st.booleans(), st.integers(0, 2**32 - 1), st.lists(WORDS, min_size=1, max_size=4)), max_size=6),
)
def test_gguf_is_read_by_the_gguf_package(tmp_path_factory: Any, said: dict[str, Any], keys: dict[str, Any]) -> None:
    tensors, pieces = random_tensors(said)
    metadata = {"general.architecture": "none", **{f"x.{key}": value for key, value in keys.items()}}
    path = laid_down(tmp_path_factory.mktemp("g") / "x.gguf", writers.gguf_layout(metadata, tensors), pieces)
    found, read = of_gguf(path)
    assert found == metadata
    assert list(read) == [tensor.name for tensor in tensors]
    for tensor, piece in zip(tensors, pieces, strict=True):
        its = read[tensor.name]
        assert (its.tensor_type.name, tuple(int(n) for n in its.shape[::-1])) == (tensor.format, tensor.shape)
        assert its.data.tobytes() == piece.tobytes()
        assert its.data_offset % 32 == 0


@given(
    TENSORS,
    st.dictionaries(NAMES, st.one_of(WORDS, st.none(), st.floats(allow_nan=False, allow_infinity=False), st.lists(WORDS)), max_size=6),
)
def test_apr_is_read_by_another_reader(tmp_path_factory: Any, said: dict[str, Any], metadata: dict[str, Any]) -> None:
    tensors, pieces = random_tensors(said)
    path = laid_down(tmp_path_factory.mktemp("a") / "x.apr", writers.apr_layout(metadata, tensors), pieces)
    read = apr_bytes.read(path.read_bytes())
    assert read.metadata == metadata
    assert read.flags == apr_bytes.ROW_MAJOR
    assert {name: (APR_IDS[entry.dtype], entry.shape, entry.data) for name, entry in read.tensors.items()} == {
        tensor.name: (tensor.format, tensor.shape, piece.tobytes()) for tensor, piece in zip(tensors, pieces, strict=True)
    }
    assert [name for name, _ in sorted(read.tensors.items(), key=lambda item: item[1].offset)] == [tensor.name for tensor in tensors]


def test_gguf_values_keep_their_types(tmp_path: Path) -> None:
    numbers = {
        "uint8": np.uint8(200), "int8": np.int8(-3), "uint16": np.uint16(65535), "int16": np.int16(-9),
        "uint32": np.uint32(7), "int32": np.int32(-7),
        "uint64": np.uint64(1 << 63), "int64": np.int64(-(1 << 40)), "float32": np.float32(0.1), "float64": np.float64(0.1),
    }  # fmt: skip
    metadata: dict[str, Any] = {"general.architecture": "none", **{f"n.{name}": value for name, value in numbers.items()}}
    metadata |= {f"a.{name}": np.array([value, value]) for name, value in numbers.items()}
    metadata |= {"p.int": 5, "p.negative": -5, "p.large": 1 << 40, "p.float": 0.25, "p.bool": True, "p.text": "ä\n", "p.ints": [1, -2]}
    path = laid_down(tmp_path / "x.gguf", writers.gguf_layout(metadata, []), [])
    kinds = {name: [kind.name for kind in field.types] for name, field in gguf.GGUFReader(path).fields.items()}
    for name in numbers:
        assert kinds[f"n.{name}"] == [name.upper()]
        assert kinds[f"a.{name}"] == ["ARRAY", name.upper()]
    wanted = {"int": "UINT32", "negative": "INT32", "large": "UINT64", "float": "FLOAT32", "bool": "BOOL", "text": "STRING"}
    assert {name: kinds[f"p.{name}"] for name in wanted} == {name: [kind] for name, kind in wanted.items()}
    assert kinds["p.ints"] == ["ARRAY", "INT32"]
    found, _ = of_gguf(path)
    assert all(np.array_equal(found[key], value) for key, value in metadata.items())


@pytest.mark.parametrize(
    "value", [None, 1 << 70, {"a": 1}, [1.5], [1, "a"], b"x", "half \ud800", ["\udc00"], np.zeros((2, 2)), np.array(["a"])]
)
def test_gguf_refuses_values_without_a_type(value: Any) -> None:
    with pytest.raises(ArgumentError, match=r"x\.key"):
        writers.gguf_layout({"x.key": value}, [])


@pytest.mark.parametrize("value", [float("nan"), b"x", {1, 2}, "half \ud800", np.float32(1)])
def test_apr_refuses_what_json_has_not(value: Any) -> None:
    with pytest.raises(ArgumentError):
        writers.apr_layout({"key": value}, [])


def test_apr_metadata_have_a_limit() -> None:
    assert writers.apr_layout({"a": "x" * ((16 << 20) - 8)}, []).nbytes > 16 << 20
    with pytest.raises(FormatError, match="16,777,217") as caught:
        writers.apr_layout({"a": "x" * ((16 << 20) - 7)}, [])
    assert caught.value.code == "LIMIT"


@pytest.mark.parametrize(
    ("container", "name", "kind", "shape", "code"),
    [
        ("gguf", "x" * 64, "F32", (4,), "NAME"), ("gguf", "", "F32", (4,), "NAME"), ("apr", "x" * 257, "F32", (4,), "NAME"),
        ("gguf", "x", "APR_Q4", (4, 32), "UNSUPPORTED"), ("apr", "x", "Q8_0", (4, 32), "UNSUPPORTED"),
        ("gguf", "x", "Q8_0", (4, 33), "BLOCK"),
    ],
)  # fmt: skip
def test_layouts_refuse_what_the_container_has_not(container: str, name: str, kind: str, shape: tuple[int, ...], code: str) -> None:
    make = writers.gguf_layout if container == "gguf" else writers.apr_layout
    with pytest.raises(ArgumentError) as caught:
        make({}, [writers.Tensor(name, kind, shape)])
    assert (caught.value.code, caught.value.field) == (code, name)


@pytest.mark.parametrize("container", ["gguf", "apr"])
def test_names_up_to_the_limit_are_written(container: str, tmp_path: Path) -> None:
    longest = 63 if container == "gguf" else 256
    tensors, piece = [writers.Tensor("x" * longest, "F32", (1,))], np.arange(4, dtype=np.uint8)
    layout = writers.gguf_layout({"general.architecture": "none"}, tensors) if container == "gguf" else writers.apr_layout({}, tensors)
    path = laid_down(tmp_path / "x", layout, [piece])
    names = of_gguf(path)[1] if container == "gguf" else apr_bytes.read(path.read_bytes()).tensors
    assert list(names) == ["x" * longest]


@pytest.mark.parametrize(
    ("kind", "shape"), [("Q4_K", (3, 300)), ("Q6_K", (2, 256)), ("APR_Q4", (3, 33)), ("APR_Q8", (3, 5)), ("F16", (7,)), ("BF16", (2, 3, 4))]
)
def test_sizes_are_those_of_the_encoder(kind: str, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    assert writers.Tensor("x", kind, shape).nbytes == _core.encode(kind, values, pad=True).nbytes


def test_pieces_of_another_size_or_number_are_refused(tmp_path: Path) -> None:
    layout = writers.apr_layout({}, [writers.Tensor("x", "F32", (4,)), writers.Tensor("y", "F32", (4,))])
    piece = np.zeros(16, np.uint8)
    for pieces in ([piece[:-1], piece], [piece, np.zeros(17, np.uint8)]):
        with pytest.raises(ArgumentError, match="16 announced"):
            laid_down(tmp_path / "x", layout, pieces)
    for pieces in ([piece], [piece] * 3):
        with pytest.raises(ValueError, match="zip"):
            laid_down(tmp_path / "x", layout, pieces)
    laid_down(tmp_path / "x", layout, [piece, piece])


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    """The next one is asked for when the last byte of the one before it is written."""
    tensors = [writers.Tensor(f"{i}", "F32", (100 * i + 1,)) for i in range(6)]
    layout, seen = writers.apr_layout({}, tensors), []

    with open(tmp_path / "x", "wb", buffering=0) as out:

        def pieces() -> Any:
            for tensor in tensors:
                seen.append(out.tell())
                yield np.zeros(tensor.nbytes, np.uint8)

        told: list[int] = []
        writers.write(out, layout, pieces(), told.append)
    read = apr_bytes.read((tmp_path / "x").read_bytes())
    assert seen == [entry.offset for entry in read.tensors.values()]
    assert told == [*seen[1:], layout.nbytes - 4]


# ---- which format ----------------------------------------------------------------------------------------------------------------------


def weight(name: str, layer: int | None = None, shape: tuple[int, ...] = (512, 512), kind: str = "BF16") -> Any:
    return SimpleNamespace(name=name, layer=layer, tensor=f"{layer}.{name}", format=kind, shape=shape)


def model_weights(layers: int, tied: bool = False, width: int = 512) -> list[Any]:
    outside = [weight("token_embd", None, (100, width)), weight("output_norm", None, (width,))] + (
        [] if tied else [weight("output", None, (100, width))]
    )
    names = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    return outside + [weight(name, i, (width,) if "norm" in name else (512, width)) for i in range(layers) for name in names]


#: Layers that get Q6_K for attn_v and ffn_down in llama.cpp's Q4_K_M, from its rule by hand; 28 and 32 are those of published files.
MORE = {
    1: [0], 2: [1], 4: [2, 3], 8: [0, 3, 6, 7], 24: [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23],
    28: [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27], 32: [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31],
}  # fmt: skip


@pytest.mark.parametrize("layers", MORE)
@pytest.mark.parametrize("tied", [False, True])
def test_q4_k_m_is_llama_cpps(layers: int, tied: bool) -> None:
    weights = model_weights(layers, tied)
    formats, notes = mixes.choose(mixes.parse("Q4_K_M"), weights, "gguf")
    assert notes == []
    chosen = dict(zip(map(mixes.key, weights), formats, strict=True))
    wanted = {"token_embd" if tied else "output"} | {f"{i}.{name}" for i in MORE[layers] for name in ("attn_v", "ffn_down")}
    assert {key for key, its in chosen.items() if its == "Q6_K"} == wanted
    assert {key for key, its in chosen.items() if its == "F32"} == {key for key in chosen if "norm" in key}
    assert set(chosen.values()) == {"Q4_K", "Q6_K", "F32"}


def test_patterns_choose_and_later_ones_win() -> None:
    weights = model_weights(3)
    formats, _ = mixes.choose(mixes.parse("q4_k, output=Q6_K,*.attn_?=Q8_0,1.attn_q=f16"), weights, "gguf")
    chosen = dict(zip(map(mixes.key, weights), formats, strict=True))
    assert chosen["output"] == "Q6_K"
    assert [chosen[f"{i}.attn_q"] for i in range(3)] == ["Q8_0", "F16", "Q8_0"]
    assert chosen["2.attn_v"] == "Q8_0"
    assert (chosen["0.attn_output"], chosen["token_embd"], chosen["0.attn_norm"]) == ("Q4_K", "Q4_K", "F32")


def test_a_pattern_alone_keeps_the_rest() -> None:
    weights = model_weights(1)
    formats, _ = mixes.choose(mixes.parse("output=Q8_0"), weights, "gguf")
    assert {key: its for key, its in zip(map(mixes.key, weights), formats, strict=True) if its != "BF16"} == {
        "output": "Q8_0", "output_norm": "F32", "0.attn_norm": "F32", "0.ffn_norm": "F32",
    }  # fmt: skip


@pytest.mark.parametrize("pattern", ["outptu", "*norm*", "7.attn_q", "0.output"])
def test_a_pattern_that_no_matrix_matches_is_refused(pattern: str) -> None:
    with pytest.raises(UnknownName, match="no matrix"):
        mixes.choose(mixes.parse(f"Q8_0,{pattern}=F16"), model_weights(3), "gguf")


@pytest.mark.parametrize("words", ["", "Q9_0", "IQ4_NL", "Q8_0,Q4_K", "Q8_0,", "output=", "=F16", "Q8_0,output=Q4_K_M", "Q8_0,output=Q9"])
def test_words_that_mean_nothing_are_refused(words: str) -> None:
    with pytest.raises((UnknownName, ArgumentError)):
        mixes.parse(words)


def test_keep_keeps_what_the_container_has() -> None:
    weights = [weight("token_embd", kind="Q5_0"), weight("output", kind="Q4_K"), weight("output_norm", None, (512,), "BF16")]
    keep = mixes.parse("keep")
    assert mixes.choose(keep, weights, "gguf")[0] == ["Q5_0", "Q4_K", "F32"]
    assert mixes.choose(keep, weights, "apr")[0] == ["F32", "Q4_K", "BF16"]
    padded = [weight("token_embd", None, (8, 300), "Q4_K"), weight("output", kind="APR_Q4")]
    assert mixes.choose(keep, padded, "apr") == (["Q4_K", "APR_Q4"], [])
    assert mixes.choose(keep, padded, "gguf") == (["F32", "F32"], [])  # never a rounding that nobody asked for


@pytest.mark.parametrize(("width", "its"), [(512, "Q4_K"), (160, "Q8_0"), (100, "F16")])
def test_widths_that_fit_no_block_fall_back_and_say_so(width: int, its: str) -> None:
    formats, notes = mixes.choose(mixes.parse("Q4_K"), [weight("output", None, (8, width))], "gguf")
    assert formats == [its]
    assert notes == ([] if its == "Q4_K" else [f"{its} instead of Q4_K for output: rows of {width} are no multiple of 256"])
    assert mixes.choose(mixes.parse("Q4_K"), [weight("output", None, (8, width))], "apr") == (["Q4_K"], [])  # APR fills the last block up


def test_a_format_that_the_container_has_not_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"apr has no format Q8_0; it has F32, F16, BF16, Q4_K"):
        mixes.choose(mixes.parse("Q8_0"), model_weights(1), "apr")
    with pytest.raises(ArgumentError, match="gguf has no format APR_Q4"):
        mixes.choose(mixes.parse("APR_Q4"), model_weights(1), "gguf")


@pytest.mark.parametrize("name", list(mixes.GGUF_FILE_TYPES))
def test_file_types_are_ggufs(name: str) -> None:
    theirs = {kind.name: int(kind) for kind in gguf.LlamaFileType}
    spelled = {"F32": "ALL_F32", "Q4_K": "MOSTLY_Q4_K_S", "Q3_K": "MOSTLY_Q3_K_M", "Q5_K": "MOSTLY_Q5_K_M", "MXFP4": "MOSTLY_MXFP4_MOE"}
    assert mixes.GGUF_FILE_TYPES[name] == theirs[spelled.get(name, f"MOSTLY_{name}")]


# ---- what rounding may cost ------------------------------------------------------------------------------------------------------------

DISTRIBUTIONS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "normal": lambda r: r.standard_normal((16, 512)),
    "heavy tails": lambda r: r.standard_t(2, (16, 512)),
    "one outlier": lambda r: np.where(np.arange(16 * 512).reshape(16, 512) == 77, 1e4, r.standard_normal((16, 512))),
    "outlier in each row": lambda r: np.where(np.arange(512) == 77, 60, r.standard_normal((16, 512))),
    "blocks of all sizes": lambda r: r.standard_normal((16, 512)) * np.repeat(10.0 ** r.integers(-3, 4, (16, 16)), 32, axis=1),
    "uniform": lambda r: r.uniform(-1, 1, (16, 512)),
    "positive": lambda r: r.uniform(0.9, 1, (16, 512)),
    "sparse": lambda r: np.where(r.random((16, 512)) < 0.02, r.standard_normal((16, 512)), 0),
    "constant": lambda r: np.full((16, 512), -0.37),
    "zero": lambda r: np.zeros((16, 512)),
}


@pytest.mark.parametrize("name", [name for name in WRITABLE if name != "F32"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_honest_rounding_is_within_the_bound(name: str, distribution: str) -> None:
    values = np.asarray(DISTRIBUTIONS[distribution](np.random.default_rng(1)), np.float32)
    back = _core.dequantize(name, _core.encode(name, values), values.shape)
    error, peak, equal = conversion._distance(values, back)
    print(f"{name} {distribution}: {error:.4g} of {mixes.allowed_loss(name, peak):.4g}")
    assert equal or error <= mixes.allowed_loss(name, peak)


@pytest.mark.parametrize("name", WRITABLE)
def test_rows_in_another_order_are_beyond_the_bound(name: str) -> None:
    values = np.random.default_rng(2).standard_normal((16, 512)).astype(np.float32)
    back = _core.dequantize(name, _core.encode(name, np.roll(values, 1, axis=0)), values.shape)
    error, peak, equal = conversion._distance(values, back)
    assert not equal
    assert error > 2 * mixes.allowed_loss(name, peak)


def test_every_writable_format_has_a_bound() -> None:
    assert {name for name in WRITABLE if mixes.allowed_loss(name, 1.0) == float("inf")} == set()


def test_what_is_not_finite_is_no_small_distance() -> None:
    ones = np.ones(8, np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        holed = ones.copy()
        holed[3] = bad
        error, peak, equal = conversion._distance(ones, holed)
        assert not equal
        assert not error <= mixes.allowed_loss("F16", peak)
        assert conversion._distance(holed, holed)[2]
    assert conversion._distance(np.zeros(4, np.float32), ones[:4])[0] == np.inf
    assert conversion._distance(ones, ones[:7])[0] == np.inf


# ---- safetensors to GGUF ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shape", PLAIN_SHAPES, ids=str)
def test_a_folder_becomes_the_gguf_of_the_gguf_package(done: Callable[..., Any], tmp_path: Path, shape: tiny.Shape, kind: str) -> None:
    """Keys, names, shapes, order of rows and values; then every stage of our engine, against the folder."""
    folder = write_folder(tmp_path / "hf", shape)
    said = done(folder, tmp_path / "m.gguf", "--formats", kind)
    keys, tensors = of_gguf(tmp_path / "m.gguf")
    theirs, _ = of_gguf(tiny.save_gguf(shape, tmp_path / "theirs.gguf", kind))
    assert {key: value for key, value in keys.items() if not key.startswith("general.")} == {
        key: value for key, value in theirs.items() if not key.startswith("general.")
    }
    general = {
        "name": "hf",
        "file_type": mixes.GGUF_FILE_TYPES[kind],
        "quantization_version": 2,
        "architecture": shape.arch,
        "type": "model",
    }
    assert {key: value for key, value in keys.items() if key.startswith("general.")} == {f"general.{k}": v for k, v in general.items()}
    wanted = tiny.gguf_tensors(shape)
    assert set(tensors) == set(wanted)
    for name, array in wanted.items():
        assert tensors[name].tensor_type.name == (kind if array.ndim == 2 else "F32")
        assert np.array_equal(gguf_values(tensors[name]), array), name
    assert bits(tmp_path / "m.gguf") == bits(folder)
    assert said["verified"]
    assert all(row["relative_rms"] == 0 for row in said["tensors"])


def test_another_order_of_rows_would_be_seen(done: Callable[..., Any], tmp_path: Path) -> None:
    """The test above can fail: without the order of rows, values and stages differ."""
    shape = tiny.Shape("llama")
    folder = write_folder(tmp_path / "hf", shape)
    done(folder, tmp_path / "m.gguf", "--formats", "F32")
    values = gguf_values(of_gguf(tmp_path / "m.gguf")[1]["blk.0.attn_q.weight"])
    assert not np.array_equal(values, tiny.weights(shape)["model.layers.0.self_attn.q_proj.weight"])
    assert np.array_equal(straight(values, shape.heads), tiny.weights(shape)["model.layers.0.self_attn.q_proj.weight"])


@pytest.mark.parametrize("shape", BIASED, ids=str)
def test_a_gguf_that_could_not_say_its_biases_is_refused(
    done: Callable[..., Any], failed: Callable[..., str], tmp_path: Path, shape: tiny.Shape
) -> None:
    folder = write_folder(tmp_path / "hf", shape)
    said = failed(3, folder, tmp_path / "m.gguf")
    assert "attention_bias" in said
    assert "write an .apr" in said
    assert left(tmp_path) == ["hf"]
    done(folder, tmp_path / "m.apr")
    assert bits(tmp_path / "m.apr") == bits(folder)


@pytest.mark.parametrize("kind", [name for name in WRITABLE if mixes.has("gguf", name)])
@pytest.mark.parametrize("shape", [WIDE, tiny.Shape("qwen3", dim=256, ffn=256, tied=True)], ids=str)
def test_every_format_is_read_by_the_gguf_package(done: Callable[..., Any], tmp_path: Path, shape: tiny.Shape, kind: str) -> None:
    """Their decoder finds the source's values again, in the right rows, as near as rounding allows; ours and theirs agree."""
    said = done(write_folder(tmp_path / "hf", shape), tmp_path / "m.gguf", "--formats", kind)
    _, tensors = of_gguf(tmp_path / "m.gguf")
    losses = {row["name"]: row["relative_rms"] for row in said["tensors"]}
    file = _core.File(tmp_path / "m.gguf")
    for name, array in tiny.gguf_tensors(shape).items():
        values = gguf_values(tensors[name])
        error = float(np.linalg.norm(np.float64(values) - array) / np.linalg.norm(np.float64(array)))
        if array.ndim == 2 and array.shape[1] % 256 == 0:
            assert tensors[name].tensor_type.name == kind
        assert error <= mixes.allowed_loss(tensors[name].tensor_type.name, 1e9)
        assert losses[name] == pytest.approx(error, rel=1e-6, abs=1e-12)
        assert np.array_equal(values, file.dequantize(name))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_simple_formats_have_the_bytes_of_the_gguf_package(done: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    done(write_folder(tmp_path / "hf", NARROW), tmp_path / "m.gguf", "--formats", kind)
    _, tensors = of_gguf(tmp_path / "m.gguf")
    _, theirs = of_gguf(tiny.save_gguf(NARROW, tmp_path / "theirs.gguf", kind))
    assert {name: tensor.data.tobytes() for name, tensor in tensors.items()} == {
        name: tensor.data.tobytes() for name, tensor in theirs.items()
    }


def test_the_canary_gets_the_mix_that_it_was_packed_with(done: Callable[..., Any], tmp_path: Path) -> None:
    """canary.gguf was made by llama.cpp's encoders and the gguf package, the folder beside it holds its source."""
    said = done(CANARY, tmp_path / "m.gguf", "--formats", "Q4_K_M")
    keys, tensors = of_gguf(tmp_path / "m.gguf")
    theirs, packed = of_gguf(CANARY / "canary.gguf")
    assert {name: t.tensor_type.name for name, t in tensors.items()} == {name: t.tensor_type.name for name, t in packed.items()}
    assert {name: t.n_bytes for name, t in tensors.items()} == {name: t.n_bytes for name, t in packed.items()}
    assert {"qwen2.block_count", "qwen2.rope.freq_base", "tokenizer.ggml.tokens", "tokenizer.ggml.merges"} <= keys.keys() & theirs.keys()
    assert {key for key in keys.keys() & theirs.keys() if keys[key] != theirs[key]} == set()
    assert said["tokenizer"]
    ours, original = (np.concatenate([gguf_values(f[name]).ravel() for name in sorted(f)]) for f in (tensors, packed))
    source = np.concatenate(
        [_core.File(CANARY).dequantize(row["source"]).ravel() for row in sorted(said["tensors"], key=lambda row: row["name"])]
    )
    assert np.linalg.norm(ours - source) <= 1.02 * np.linalg.norm(original - source)  # no worse than ggml's encoder, but for a hair


# ---- anything to APR -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "source"),
    [(shape, "hf") for shape in BIASED] + [(s, source) for s in PLAIN_SHAPES for source in ("hf", "F32", "F16", "BF16")],
    ids=str,
)
def test_an_apr_holds_what_its_source_held(done: Callable[..., Any], tmp_path: Path, shape: tiny.Shape, source: str) -> None:
    """From a folder and from GGUFs of the gguf package: Hugging Face's names, shapes and rows, the values bit for bit, and every stage."""
    folder = write_folder(tmp_path / "hf", shape)
    path = folder if source == "hf" else tiny.save_gguf(shape, tmp_path / "m.gguf", source)
    said = done(path, tmp_path / "m.apr")
    read = apr_bytes.read((tmp_path / "m.apr").read_bytes())
    wanted = tiny.weights(shape)
    assert set(read.tensors) == set(wanted)
    for name, array in wanted.items():
        entry = read.tensors[name]
        assert APR_IDS[entry.dtype] == ("BF16" if source == "hf" else source if array.ndim == 2 else "F32")
        assert entry.shape == array.shape
        assert np.array_equal(apr_values(entry), array), name
    assert read.flags == apr_bytes.ROW_MAJOR
    assert all(row["passed"] for row in said["tensors"])
    assert bits(tmp_path / "m.apr") == bits(folder)


@pytest.mark.parametrize("shape", tiny.SHAPES, ids=str)
def test_the_metadata_of_an_apr(done: Callable[..., Any], tmp_path: Path, shape: tiny.Shape) -> None:
    said = done(write_folder(tmp_path / "named", shape), tmp_path / "m.apr")
    wanted = tiny.apr_metadata(shape) | {
        "model_type": shape.arch, "hf_architecture": f"{shape.arch.capitalize()}ForCausalLM",
        "name": "named", "original_format": "safetensors", "tie_word_embeddings": shape.tied,
    }  # fmt: skip
    if shape.arch != "qwen2":
        wanted["attention_bias"] = shape.attention_bias
    assert apr_bytes.read((tmp_path / "m.apr").read_bytes()).metadata == wanted
    assert said["notes"] == ["the source has no tokenizer: prompts for the result must be given as ids"]


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0"])
def test_what_apr_has_not_is_decoded(done: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    """To float32, without a loss: the gguf package decodes the same values from the source."""
    shape = tiny.Shape("llama")
    path = tiny.save_gguf(shape, tmp_path / "m.gguf", kind)
    done(path, tmp_path / "m.apr")
    read, (_, source) = apr_bytes.read((tmp_path / "m.apr").read_bytes()), of_gguf(path)
    for name, entry in read.tensors.items():
        values = gguf_values(source[tiny.gguf_name(name)])
        heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads}.get(name.split(".")[-2])
        assert APR_IDS[entry.dtype] == "F32"
        assert np.array_equal(apr_values(entry), straight(values, heads) if heads else values), name
    assert bits(tmp_path / "m.apr") == bits(path)


@pytest.mark.parametrize("mix", ["Q4_K_M", "Q6_K", "Q4_K,*.attn_k=Q6_K"])
def test_k_quants_go_through_byte_for_byte(done: Callable[..., Any], tmp_path: Path, mix: str) -> None:
    """Llama's rows of q and k are put back without being encoded again; from there back to GGUF, all bytes are the first ones."""
    folder = write_folder(tmp_path / "hf", WIDE)
    done(folder, tmp_path / "a.gguf", "--formats", mix)
    said = done(tmp_path / "a.gguf", tmp_path / "b.apr")
    assert all(row["passed"] and row["relative_rms"] == 0 for row in said["tensors"])
    read, (_, source) = apr_bytes.read((tmp_path / "b.apr").read_bytes()), of_gguf(tmp_path / "a.gguf")
    assert read.flags == apr_bytes.ROW_MAJOR | apr_bytes.QUANTIZED
    for name, entry in read.tensors.items():
        raw = source[tiny.gguf_name(name)]
        heads = {"q_proj": WIDE.heads, "k_proj": WIDE.kv_heads}.get(name.split(".")[-2])
        rows = raw.data.view(np.uint8).reshape(int(raw.shape[-1]), -1) if len(raw.shape) > 1 else raw.data.view(np.uint8)
        assert entry.data == (straight(rows, heads) if heads else rows).tobytes(), name
        assert APR_IDS[entry.dtype] == raw.tensor_type.name
        if heads:
            assert entry.data != rows.tobytes()
    done(tmp_path / "b.apr", tmp_path / "c.gguf")
    assert {name: t.data.tobytes() for name, t in of_gguf(tmp_path / "c.gguf")[1].items()} == {
        name: t.data.tobytes() for name, t in source.items()
    }
    assert bits(tmp_path / "a.gguf") == bits(tmp_path / "b.apr") == bits(tmp_path / "c.gguf")


@pytest.mark.parametrize("kind", [name for name in WRITABLE if mixes.has("apr", name)])
@pytest.mark.parametrize("shape", [NARROW, WIDE], ids=["narrow", "wide"])
def test_every_format_of_an_apr(done: Callable[..., Any], tmp_path: Path, shape: tiny.Shape, kind: str) -> None:
    """Decoded by others, also where the rows of K-quants are filled up with zeros."""
    said = done(write_folder(tmp_path / "hf", shape), tmp_path / "m.apr", "--formats", kind)
    assert said["notes"] == ["the source has no tokenizer: prompts for the result must be given as ids"]
    read, losses = apr_bytes.read((tmp_path / "m.apr").read_bytes()), {row["name"]: row["relative_rms"] for row in said["tensors"]}
    quantised = kind not in ("F32", "F16", "BF16")
    assert read.flags == apr_bytes.ROW_MAJOR | apr_bytes.QUANTIZED * quantised
    file = _core.File(tmp_path / "m.apr")
    for name, array in tiny.weights(shape).items():
        entry = read.tensors[name]
        assert APR_IDS[entry.dtype] == (kind if array.ndim == 2 else "F32")
        values = apr_values(entry)
        error = float(np.linalg.norm(np.float64(values) - array) / np.linalg.norm(np.float64(array)))
        assert (0 < error < 0.2) == (quantised and array.ndim == 2)
        assert losses[name] == pytest.approx(error, rel=1e-6, abs=1e-12)
        assert np.array_equal(values, file.dequantize(name))


def test_an_apr_with_neighbouring_pairs_is_straightened(done: Callable[..., Any], tmp_path: Path) -> None:
    """rope_type 0: the rows lie as in a GGUF.  What is written says 2 and has Hugging Face's rows."""
    shape = tiny.Shape("llama")
    made = tiny.weights(shape)
    turned = dict(made)
    for layer in range(shape.layers):
        for part, heads in (("q", shape.heads), ("k", shape.kv_heads)):
            name = f"model.layers.{layer}.self_attn.{part}_proj.weight"
            turned[name] = tiny.permuted(made[name], heads)
    path = tiny.save_apr(shape, tmp_path / "old.apr", "F32", made=turned, rope_type=0)
    done(path, tmp_path / "new.apr")
    done(path, tmp_path / "new.gguf")
    read = apr_bytes.read((tmp_path / "new.apr").read_bytes())
    assert read.metadata["rope_type"] == 2
    assert all(np.array_equal(apr_values(read.tensors[name]), array) for name, array in made.items())
    _, tensors = of_gguf(tmp_path / "new.gguf")
    assert all(np.array_equal(gguf_values(tensors[name]), array) for name, array in tiny.gguf_tensors(shape).items())
    assert bits(tmp_path / "new.apr") == bits(path) == bits(tmp_path / "new.gguf")


def test_models_in_several_files_become_one(done: Callable[..., Any], tmp_path: Path) -> None:
    shape = tiny.Shape("qwen3")
    whole, folder = write_folder(tmp_path / "whole", shape), write_folder(tmp_path / "parts", shape)
    shards(folder, shape)
    done(folder, tmp_path / "m.apr")
    assert bits(tmp_path / "m.apr") == bits(whole)
    assert apr_bytes.read((tmp_path / "m.apr").read_bytes()).metadata["name"] == "parts"


def shards(folder: Path, shape: tiny.Shape) -> list[Path]:
    """Cut the folder's model.safetensors in two, with an index."""
    names = list(tiny.weights(shape))
    files = [folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {}
    for file, part in zip(files, (names[::2], names[1::2]), strict=True):
        file.write_bytes(safetensors_bytes({name: blob(tiny.weights(shape)[name]) for name in part}))
        where |= dict.fromkeys(part, file.name)
    (folder / "model.safetensors").unlink()
    size = sum(2 * array.size for array in tiny.weights(shape).values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": where}))
    return files


def test_what_is_said_about_a_model_goes_along(done: Callable[..., Any], tmp_path: Path) -> None:
    def about(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(tiny.Shape().vocab)
        writer.add_name("A name")
        writer.add_license("mit")
        writer.add_tags(["a", "b"])
        writer.add_file_type(1)

    path = tiny.save_gguf(tiny.Shape(), tmp_path / "a.gguf", "F16", metadata=about)
    said = done(path, tmp_path / "b.apr")
    assert "left behind, for want of such keys in apr: tags" in said["notes"]
    found = apr_bytes.read((tmp_path / "b.apr").read_bytes()).metadata
    assert (found["name"], found["license"]) == ("A name", "mit")
    done(tmp_path / "b.apr", tmp_path / "c.gguf")
    keys, _ = of_gguf(tmp_path / "c.gguf")
    assert (keys["general.name"], keys["general.license"], keys["general.file_type"]) == ("A name", "mit", 1)
    said = done(path, tmp_path / "d.gguf")
    assert of_gguf(tmp_path / "d.gguf")[0]["general.tags"] == ["a", "b"]
    assert not any("left behind" in note for note in said["notes"])


def test_an_apr_of_an_apr_says_the_same(done: Callable[..., Any], tmp_path: Path) -> None:
    """Key by key and byte by byte; what would lie about the new file, or was no plain value, is left out, and the latter is said."""
    done(CANARY, tmp_path / "a.apr")
    assert done(tmp_path / "a.apr", tmp_path / "b.apr")["notes"] == []
    a, b = (apr_bytes.read((tmp_path / name).read_bytes()) for name in ("a.apr", "b.apr"))
    assert b.metadata == a.metadata | {"original_format": "apr"}
    assert {name: entry.data for name, entry in a.tensors.items()} == {name: entry.data for name, entry in b.tensors.items()}
    more = {"tags": ["x"], "created_at": "2026", "special_tokens": {"bos_token": "b"}, "param_count": 7, "license": "mit"}
    path = tiny.save_apr(tiny.Shape(), tmp_path / "c.apr", "F16", **more)
    said = done(path, tmp_path / "d.apr")
    assert "left behind, for want of such keys in apr: special_tokens.bos_token" in said["notes"]
    found = apr_bytes.read((tmp_path / "d.apr").read_bytes()).metadata
    assert {key: found.get(key) for key in more} == {
        "tags": ["x"],
        "created_at": "2026",
        "special_tokens": None,
        "param_count": None,
        "license": "mit",
    }
    said = done(path, tmp_path / "e.gguf")
    assert "left behind, for want of such keys in gguf: created_at, special_tokens.bos_token, tags" in said["notes"]


# ---- tokenizers ------------------------------------------------------------------------------------------------------------------------

TEXTS = ("What is 2+2?", "<|im_start|>user\nHi<|im_end|>\n", " two  spaces", "naïve 你好 12345", "")


@pytest.mark.parametrize("source", [CANARY, CANARY / "canary.gguf"], ids=["folder", "gguf"])
@pytest.mark.parametrize("ending", ["apr", "gguf"])
def test_the_tokenizer_goes_along(done: Callable[..., Any], tmp_path: Path, source: Path, ending: str) -> None:
    """Truth: the tokenizers library on the folder's tokenizer.json."""
    import tokenizers

    theirs = tokenizers.Tokenizer.from_file(str(CANARY / "tokenizer.json"))
    path = tmp_path / f"m.{ending}"
    assert done(source, path)["tokenizer"]
    found = text.for_model(path)
    assert found is not None
    assert [found.encode(words) for words in TEXTS] == [theirs.encode(words).ids for words in TEXTS]
    first = text.for_model(source)
    assert first is not None
    assert (found.eos_ids, found.chat_template, found.digest) == (first.eos_ids, first.chat_template, first.digest)


def test_the_tokenizer_of_an_apr(done: Callable[..., Any], tmp_path: Path) -> None:
    """The keys that other readers look for, against tokenizer.json."""
    done(CANARY, tmp_path / "m.apr")
    read = apr_bytes.read((tmp_path / "m.apr").read_bytes())
    assert read.flags == apr_bytes.ROW_MAJOR | apr_bytes.HAS_VOCAB
    model = json.loads((CANARY / "tokenizer.json").read_text())
    settings = json.loads((CANARY / "tokenizer_config.json").read_text())
    words = model["model"]["vocab"] | {token["content"]: token["id"] for token in model["added_tokens"]}
    assert read.metadata["tokenizer.vocabulary"] == sorted(words, key=words.__getitem__)
    assert read.metadata["tokenizer.merges"] == [" ".join(pair) for pair in model["model"]["merges"]]
    assert read.metadata["tokenizer.eos_token_id"] == words[settings["eos_token"]]
    assert read.metadata["tokenizer.vocab_size"] == len(words) == 640
    assert read.metadata["chat_template"] == settings["chat_template"]


def test_a_tokenizer_that_nobody_here_reads_goes_over_unread(done: Callable[..., Any], tmp_path: Path) -> None:
    def odd(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("from-another-world")
        writer.add_token_list([f"t{i}" for i in range(tiny.Shape().vocab)])
        writer.add_token_merges(["t 1"])
        writer.add_key_value("tokenizer.ggml.mask_token_id", 3, gguf.GGUFValueType.UINT32)

    path = tiny.save_gguf(tiny.Shape(), tmp_path / "a.gguf", "F16", metadata=odd)
    said = done(path, tmp_path / "b.apr")
    assert said["tokenizer"]
    assert any("unread" in note and "from-another-world" in note for note in said["notes"])
    assert "left behind, for want of such keys in apr: tokenizer.ggml.mask_token_id" in said["notes"]
    assert done(path, tmp_path / "same.gguf")["notes"] == said["notes"][1:]
    assert of_gguf(tmp_path / "same.gguf")[0]["tokenizer.ggml.mask_token_id"] == 3
    found = apr_bytes.read((tmp_path / "b.apr").read_bytes()).metadata
    assert (found["tokenizer.pre_type"], found["tokenizer.vocabulary"][7]) == ("from-another-world", "t7")
    done(tmp_path / "b.apr", tmp_path / "c.gguf")
    keys, _ = of_gguf(tmp_path / "c.gguf")
    assert (keys["tokenizer.ggml.pre"], keys["tokenizer.ggml.merges"], keys["tokenizer.ggml.tokens"][7]) == (
        "from-another-world",
        ["t 1"],
        "t7",
    )


def test_scores_and_types_of_sentencepiece_go_there_and_back(done: Callable[..., Any], tmp_path: Path) -> None:
    """Every key, type and bit; the ids of a text are the same from both containers."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "ab", "▁ab"]
    shape = tiny.Shape("llama", vocab=len(pieces))

    def sentencepiece(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(pieces)
        writer.add_token_scores([-0.1 * i for i in range(len(pieces))])
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 5)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(True)

    path = tiny.save_gguf(shape, tmp_path / "a.gguf", "F16", metadata=sentencepiece)
    assert done(path, tmp_path / "b.apr")["notes"] == []
    assert done(tmp_path / "b.apr", tmp_path / "c.gguf")["notes"] == []

    def tokenizer(file: Path) -> dict[str, tuple[Any, Any]]:
        fields = gguf.GGUFReader(file).fields
        return {key: (field.types, field.contents()) for key, field in fields.items() if key.startswith("tokenizer.")}

    assert tokenizer(tmp_path / "c.gguf") == tokenizer(path)
    assert len(tokenizer(path)) == 10
    found = [text.for_model(file) for file in (path, tmp_path / "b.apr", tmp_path / "c.gguf")]
    ids = [one.encode("ab a ü") for one in found if one]
    assert ids[0] == ids[1] == ids[2]
    assert len(ids[0]) > 4


def test_a_tokenizer_can_be_left_out(done: Callable[..., Any], failed: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "canary"
    shutil.copytree(CANARY, folder, ignore=shutil.ignore_patterns("stages-*", "*.gguf"))
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in failed(3, folder, tmp_path / "m.apr")
    said = done(folder, tmp_path / "m.apr", "--no-tokenizer")
    assert (said["tokenizer"], said["notes"]) == (False, ["the tokenizer is left out: prompts for the result must be given as ids"])
    done(CANARY, tmp_path / "m.gguf", "--no-tokenizer")
    assert {key: value for key, value in of_gguf(tmp_path / "m.gguf")[0].items() if "tokenizer" in key} == {
        "tokenizer.ggml.model": "no_vocab"
    }
    assert text.for_model(tmp_path / "m.gguf") is None
    assert text.for_model(tmp_path / "m.apr") is None


# ---- llama.cpp -------------------------------------------------------------------------------------------------------------------------


def rewritten(path: Path, out: Path) -> Path:
    """The same keys and bytes, written by the gguf package."""
    reader = gguf.GGUFReader(path)
    keys = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    writer = gguf.GGUFWriter(out, keys["general.architecture"].contents())
    for name, field in keys.items():
        if name != "general.architecture":
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.foreign
@pytest.mark.parametrize("mix", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q6_K", "Q4_K_M"])
@pytest.mark.parametrize("arch", tiny.ARCHS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_llama_cpp_computes_the_same(
    done: Callable[..., Any], tmp_path: Path, peer: llamacpp.Peer, arch: str, mix: str, tied: bool
) -> None:
    """Logits equal in every bit to those from a GGUF of the gguf package with the same bytes; in F32 one that it made from the weights."""
    shape = tiny.Shape(arch, dim=256, ffn=512, heads=4, kv_heads=2, head=64, tied=tied)
    ours = tmp_path / "ours.gguf"
    done(write_folder(tmp_path / "hf", shape), ours, "--formats", mix)
    theirs = tiny.save_gguf(shape, tmp_path / "theirs.gguf", mix) if mix == "F32" else rewritten(ours, tmp_path / "theirs.gguf")
    logits = peer.logits(ours, IDS)
    assert logits.shape == (len(IDS), shape.vocab)
    assert np.array_equal(logits, peer.logits(theirs, IDS))
    exact = _core.Run(_core.Model(_core.File(tmp_path / "hf"))).forward(IDS, [("lm_head", None)])["lm_head", None]
    far = float(np.linalg.norm(logits - exact) / np.linalg.norm(exact))
    print(f"{arch} {mix}: relative L2 of llama.cpp's logits to ours on the source {far:.3g}")
    assert far < {"F32": 1e-5, "F16": 0.02, "BF16": 0.1, "Q8_0": 0.1}.get(mix, 1.0)


@pytest.mark.foreign
@pytest.mark.parametrize("mix", ["keep", "Q8_0", "Q4_K_M"])
def test_llama_cpp_runs_the_canary(done: Callable[..., Any], tmp_path: Path, peer: llamacpp.Peer, mix: str) -> None:
    """From the folder, with its tokenizer: the same ids as canary.gguf's, and the answer of its README."""
    path = tmp_path / "m.gguf"
    done(CANARY, path, "--formats", mix)
    assert [peer.tokenize(path, words) for words in TEXTS] == [peer.tokenize(CANARY / "canary.gguf", words) for words in TEXTS]
    assert peer.tokenize(path, "What is 2+2?") == list(PROMPT)
    assert peer.generate(path, PROMPT, 12)[:8] == [220, 17, 10, 17, 374, 220, 19, 13]
    done(path, tmp_path / "m.apr")
    assert bits(tmp_path / "m.apr", list(PROMPT)) == bits(path, list(PROMPT))


# ---- what stands in the way ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder in which there is m.gguf, the source, and nothing else."""
    tiny.save_gguf(tiny.Shape("llama", tied=True), tmp_path / "m.gguf", "Q8_0")
    return tmp_path


@pytest.mark.parametrize("out", ["m", "m.safetensors", "m.bin", "m.apr.gz", ".apr", "apr"])
def test_an_unknown_ending_is_usage(failed: Callable[..., str], small: Path, out: str) -> None:
    said = failed(2, small / "m.gguf", small / out)
    assert ".apr" in said
    assert ".gguf" in said
    assert left(small) == ["m.gguf"]


@pytest.mark.parametrize("out", ["M.APR", "a b.gguf", "x.y.apr"])
def test_known_endings_in_any_spelling(done: Callable[..., Any], small: Path, out: str) -> None:
    assert done(small / "m.gguf", small / out)["container"] == out.rsplit(".", 1)[1].lower()
    assert left(small) == sorted(["m.gguf", out])


@pytest.mark.parametrize("words", ["Q9_0", "", "Q8_0,output"])
def test_wrong_formats_are_usage_before_anything_is_read(failed: Callable[..., str], tmp_path: Path, words: str) -> None:
    assert "--formats" in failed(2, tmp_path / "missing.gguf", tmp_path / "m.apr", "--formats", words)


def test_an_existing_file_needs_force(failed: Callable[..., str], done: Callable[..., Any], small: Path) -> None:
    (small / "old.apr").write_text("thesis")
    assert "--force" in failed(3, small / "m.gguf", small / "old.apr")
    assert (small / "old.apr").read_text() == "thesis"
    done(small / "m.gguf", small / "old.apr", "--force")
    assert bits(small / "old.apr") == bits(small / "m.gguf")
    (small / "dangling.apr").symlink_to(small / "nowhere")
    assert "--force" in failed(3, small / "m.gguf", small / "dangling.apr")
    assert left(small) == ["dangling.apr", "m.gguf", "old.apr"]


@pytest.mark.parametrize("how", ["same", "other spelling", "hard link", "symbolic link", "temporary name"])
def test_the_source_is_never_the_target(failed: Callable[..., str], small: Path, how: str) -> None:
    source = small / "m.gguf"
    before = source.read_bytes()
    out = {"same": source, "other spelling": small / "." / "x" / ".." / "m.gguf"}.get(how, small / "link.gguf")
    if how == "other spelling":
        (small / "x").mkdir()
    if how == "hard link":
        out.hardlink_to(source)
    if how == "symbolic link":
        out.symlink_to(source)
    if how == "temporary name":
        source = source.rename(small / ("link.gguf" + atomic.SUFFIX))
    assert "source" in failed(3, source, out, "--force")
    assert source.read_bytes() == before


def test_no_shard_of_the_source_is_the_target(failed: Callable[..., str], tmp_path: Path) -> None:
    shape = tiny.Shape()
    parts = shards(write_folder(tmp_path / "hf", shape), shape)
    (tmp_path / "m.apr").hardlink_to(parts[1])
    before = parts[1].read_bytes()
    assert parts[1].name in failed(3, tmp_path / "hf", tmp_path / "m.apr", "--force")
    assert parts[1].read_bytes() == before


def test_targets_that_are_no_files(failed: Callable[..., str], small: Path) -> None:
    (small / "d.apr").mkdir()
    os.mkfifo(small / "f.apr")
    for name in ("d.apr", "f.apr"):
        assert "not a regular file" in failed(3, small / "m.gguf", small / name, "--force")
    assert str(small / "no") in failed(3, small / "m.gguf", small / "no" / "m.apr")
    assert left(small) == ["d.apr", "f.apr", "m.gguf"]


def test_a_full_disk_is_known_before_anything_is_written(
    failed: Callable[..., str], done: Callable[..., Any], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = done(small / "m.gguf", small / "a.apr")["bytes_out"]
    free = size - 1
    monkeypatch.setattr(conversion.os, "statvfs", lambda _: SimpleNamespace(f_bavail=free, f_frsize=1))
    opened: list[Any] = []
    monkeypatch.setattr(atomic, "open", lambda *words, **more: opened.append(words), raising=False)
    said = failed(3, small / "m.gguf", small / "b.apr")
    assert f"{size:,} bytes are needed" in said
    assert f"{free:,} are free" in said
    assert opened == []
    monkeypatch.undo()
    free += 1
    monkeypatch.setattr(conversion.os, "statvfs", lambda _: SimpleNamespace(f_bavail=free, f_frsize=1))
    done(small / "m.gguf", small / "b.apr")


def bad_sources(folder: Path) -> dict[str, tuple[Path, tuple[str, ...]]]:
    """Name -> source and what the message must hold."""
    shape, good = tiny.Shape("llama"), (CANARY / "canary.gguf").read_bytes()
    (folder / "magic.gguf").write_bytes(b"NOPE" + good[4:])
    (folder / "short.gguf").write_bytes(good[: len(good) // 2])
    made = tiny.weights(shape)
    less = {name: blob(array) for name, array in made.items() if "layers.1.mlp.up" not in name}
    more = {name: blob(array) for name, array in made.items()} | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": blob(np.ones(12, np.float32))
    }
    turned = {name: blob(array.T if "layers.0.mlp.gate" in name else array) for name, array in made.items()}
    return {
        "missing": (folder / "nothing.gguf", ("nothing.gguf",)),
        "magic": (folder / "magic.gguf", ("magic.gguf", "NOPE", "GGUF")),
        "short": (folder / "short.gguf", ("short.gguf", "cut short")),
        "tensor missing": (write_folder(folder / "less", shape, less), ("model.layers.1.mlp.up_proj.weight", "missing")),
        "tensor left over": (write_folder(folder / "more", shape, more), ("rotary_emb.inv_freq", "will not be ignored")),
        "shape": (write_folder(folder / "turned", shape, turned), ("mlp.gate_proj.weight", "[64, 160]", "[160, 64]")),
        "key": (write_folder(folder / "key", shape, rope_scaling={"rope_type": "llama3", "factor": 8.0}), ("rope_scaling", "llama3")),
        "architecture": (write_folder(folder / "arch", shape, model_type="mamba"), ("mamba", "not supported")),
        "quantised": (write_folder(folder / "gptq", shape, quantization_config={"quant_method": "gptq"}), ("quantization_config",)),
    }


BAD = ("missing", "magic", "short", "tensor missing", "tensor left over", "shape", "key", "architecture", "quantised", "rope_freqs")


@pytest.mark.parametrize("name", BAD)
def test_bad_sources_leave_one_line_and_nothing_else(failed: Callable[..., str], tmp_path: Path, name: str) -> None:
    made = bad_sources(tmp_path) | {"rope_freqs": (with_rope_freqs(tmp_path / "ropes.gguf"), ("rope_freqs.weight", "will not be ignored"))}
    source, words = made[name]
    before = left(tmp_path)
    for ending in ("apr", "gguf"):
        said = failed(3, source, tmp_path / f"out.{ending}")
        assert all(word in said for word in words), said
    assert left(tmp_path) == before


def with_rope_freqs(path: Path) -> Path:
    """A Llama 3.1 as llama.cpp's converter writes it: the scaling of RoPE is a tensor."""
    shape = tiny.Shape("llama")
    plain = tiny.save_gguf(shape, path.with_name("plain.gguf"), "F16")
    reader, writer = gguf.GGUFReader(plain), gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0])
    writer.add_tensor("rope_freqs.weight", np.ones(12, np.float32))
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_a_format_cannot_hold_are_named(
    failed: Callable[..., str], done: Callable[..., Any], tmp_path: Path, bad: float
) -> None:
    shape, name = tiny.Shape(), "model.layers.1.mlp.up_proj.weight"
    made = {key: array.copy() for key, array in tiny.weights(shape).items()}
    made[name][3, 5] = bad
    folder = write_folder(tmp_path / "hf", shape, {key: ("F32", array.shape, array.tobytes()) for key, array in made.items()})
    assert name in failed(3, folder, tmp_path / "m.gguf", "--formats", "Q8_0")
    done(folder, tmp_path / "m.gguf")  # as they are, they are passed through
    assert np.array_equal(gguf_values(of_gguf(tmp_path / "m.gguf")[1]["blk.1.ffn_up.weight"]), made[name], equal_nan=True)
    made[name][3, 5] = 1e6
    folder = write_folder(tmp_path / "hf", shape, {key: ("F32", array.shape, array.tobytes()) for key, array in made.items()})
    said = failed(3, folder, tmp_path / "h.gguf", "--formats", "F16")  # float16 ends at 65504
    assert "blk.1.ffn_up.weight: F16 leaves a relative RMS error of inf" in said
    made[name][3, 5:7] = np.inf, 1 / 3
    folder = write_folder(tmp_path / "hf", shape, {key: ("F32", array.shape, array.tobytes()) for key, array in made.items()})
    assert "a relative RMS error of nan" in failed(3, folder, tmp_path / "h.gguf", "--formats", "F16")  # nothing can be said about the rest
    assert left(tmp_path) == ["hf", "m.gguf"]


# ---- what was written is not what should be there --------------------------------------------------------------------------------------


def damaged(monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object]) -> None:
    """Have the file changed between writing and reading back."""
    real = conversion._verified

    def verified(plan: Any, written: str, *rest: Any) -> Any:
        change(Path(written))
        return real(plan, written, *rest)

    monkeypatch.setattr(conversion, "_verified", verified)


def flip(at: Callable[[bytes], int]) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at(data)] ^= 1
        path.write_bytes(data)

    return change


DAMAGE: dict[str, Callable[[Path], object]] = {
    "first byte": flip(lambda data: 0),
    "a key": flip(lambda data: data.index(b"rope_t" if data[:3] == b"APR" else b"freq_base")),
    "a dimension": flip(lambda data: data.index(b"up_proj.weight" if data[:3] == b"APR" else b"ffn_up.weight") + 20),
    "a weight": flip(lambda data: len(data) - 3000),
    "the last weight": flip(lambda data: len(data) - 200),
    "the last byte": flip(lambda data: len(data) - 1),  # of APR's checksum, or of what fills a GGUF up
    "an end cut off": lambda path: os.truncate(path, path.stat().st_size - 64),
    "bytes at the end": lambda path: path.write_bytes(path.read_bytes() + bytes(64)),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
@pytest.mark.parametrize("ending", ["apr", "gguf"])
def test_damage_is_found_before_the_file_takes_its_name(
    failed: Callable[..., str], done: Callable[..., Any], small: Path, monkeypatch: pytest.MonkeyPatch, damage: str, ending: str
) -> None:
    out = small / f"out.{ending}"
    out.write_text("old")
    with monkeypatch.context() as patch:
        damaged(patch, DAMAGE[damage])
        said = failed(3, small / "m.gguf", out, "--force", "--formats", "F16")
    assert str(out) in said
    assert "not kept" in said
    assert out.read_text() == "old"
    assert left(small) == sorted(["m.gguf", out.name])
    with monkeypatch.context() as patch:
        damaged(patch, lambda path: path.write_bytes(path.read_bytes()))  # touched, not changed
        done(small / "m.gguf", out, "--force", "--formats", "F16")


def test_without_verification_nobody_looks(done: Callable[..., Any], small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged(monkeypatch, lambda path: pytest.fail("looked"))
    said = done(small / "m.gguf", small / "m.apr", "--no-verify")
    assert not said["verified"]
    assert {row["relative_rms"] for row in said["tensors"]} == {None}
    assert bits(small / "m.apr") == bits(small / "m.gguf")


@pytest.mark.parametrize("fault", ["rows in another order", "not put back", "another tensor", "zeros", "half", "two values swapped"])
def test_wrong_encoding_is_found(failed: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """The converter itself goes wrong: what it writes is whole, and still not the source."""
    shape = tiny.Shape("llama")
    folder, real = write_folder(tmp_path / "hf", shape), _core.encode
    if fault == "not put back":
        monkeypatch.setattr(conversion, "_rows", lambda *_: None)
    elif fault == "two values swapped":
        monkeypatch.setattr(conversion._core, "encode", lambda kind, x, **more: real(kind, swapped(x), **more))
    else:
        wrong = {
            "rows in another order": lambda x: np.roll(x, 1, 0),
            "another tensor": lambda x: x[::-1] * 0.7,
            "zeros": np.zeros_like,
            "half": lambda x: x / 2,
        }
        change = wrong[fault]
        monkeypatch.setattr(
            conversion._core, "encode", lambda kind, x, **more: real(kind, np.ascontiguousarray(change(x), np.float32), **more)
        )
    said = failed(3, folder, tmp_path / "m.gguf", "--formats", "F32" if fault == "two values swapped" else "Q4_0")
    assert "relative RMS error" in said
    assert left(tmp_path) == ["hf"]


def swapped(x: np.ndarray) -> np.ndarray:
    """The first two values in each other's place."""
    flat = x.copy().reshape(-1)
    flat[[0, 1]] = flat[[1, 0]]
    return flat.reshape(x.shape)


def test_rows_that_were_passed_through_in_another_order_are_found(
    failed: Callable[..., str], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_gguf(tiny.Shape("llama"), small / "f.gguf", "F16")
    monkeypatch.setattr(conversion, "_interleaved", lambda _: False)
    assert "self_attn.q_proj.weight" in failed(3, small / "f.gguf", small / "m.apr")
    assert left(small) == ["f.gguf", "m.gguf"]


def test_hyper_parameters_are_read_back(failed: Callable[..., str], small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = conversion._apr_metadata
    monkeypatch.setattr(conversion, "_apr_metadata", lambda *words: real(*words) | {"rope_theta": 10000.0})
    said = failed(3, small / "m.gguf", small / "m.apr")
    assert "hparams" in said
    assert "10000.0" in said
    assert "1000000.0" in said


def test_the_tokenizer_is_read_back(failed: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = conversion._tokenizer_keys

    def wrong(*words: Any) -> dict[str, Any]:
        said = real(*words)
        said["tokenizer.vocabulary"][5], said["tokenizer.vocabulary"][6] = said["tokenizer.vocabulary"][6], said["tokenizer.vocabulary"][5]
        return said

    monkeypatch.setattr(conversion, "_tokenizer_keys", wrong)
    assert "tokenizer" in failed(3, CANARY, tmp_path / "m.apr")
    assert left(tmp_path) == []


# ---- a disk that fills up, a process that dies -----------------------------------------------------------------------------------------


class Door:
    """A file of which the k-th write fails."""

    def __init__(self, out: Any, last: int) -> None:
        self.out, self.left = out, last

    @classmethod
    def opening(cls, last: int) -> Callable[..., Door]:
        def door(*words: Any, **more: Any) -> Door:
            return cls(open(*words, **more), last)

        return door

    def write(self, data: Any) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(28, "No space left on device")
        return int(self.out.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.out, name)

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *_: object) -> None:
        self.out.close()


@pytest.mark.parametrize("ending", ["apr", "gguf"])
@pytest.mark.parametrize("k", [0, 1, 2, 17, "last", "flush", "sync", "rename"])
def test_a_disk_that_fills_up_leaves_nothing(
    failed: Callable[..., str], small: Path, monkeypatch: pytest.MonkeyPatch, k: int | str, ending: str
) -> None:
    out = small / f"out.{ending}"
    out.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if k == "sync":
            patch.setattr(atomic.os, "fsync", full)
        elif k == "rename":
            patch.setattr(atomic.os, "replace", full)
        else:
            last = 2 * 20 + (ending == "apr")  # writes before the last: a head, 20 tensors each with what fills up, in APR a checksum
            patch.setattr(atomic, "open", Door.opening({"last": last, "flush": 10**6}.get(k, k)), raising=False)
            if k == "flush":
                patch.setattr(Door, "flush", full, raising=False)
        said = failed(3, small / "m.gguf", out, "--force")
    assert "No space left on device" in said
    assert str(out) in said
    assert out.read_text() == "old"
    assert left(small) == sorted(["m.gguf", out.name])


#: A converter that kills itself at the k-th of the calls that touch the disk.
DYING = """
import os, signal, sys
from aprender import atomic, convert
left = int(sys.argv[1])

def touch():
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)

class Door:
    def __init__(self, out): self.out = out
    def write(self, data): touch(); n = self.out.write(data); self.out.flush(); touch(); return n
    def __getattr__(self, name): return getattr(self.out, name)
    def __enter__(self): return self
    def __exit__(self, *_): self.out.close()

def dying(real):
    def call(*words):
        touch(); found = real(*words); touch(); return found
    return call

atomic.open = lambda *words, **more: Door(open(*words, **more))
atomic.os.replace, atomic.os.fsync = dying(os.replace), dying(os.fsync)
code = convert.main(sys.argv[2:])
print("touched", int(sys.argv[1]) - left)
sys.exit(code)
"""


def dying(k: int, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", DYING, str(k), *map(str, words)], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("ending", ["apr", "gguf"])
def test_a_kill_leaves_the_old_file_or_the_new_one(done: Callable[..., Any], small: Path, ending: str) -> None:
    """At points spread over the work: between any two calls that touch the disk, the name holds a whole file."""
    out, new = small / f"out.{ending}", small / f"new.{ending}"
    done(small / "m.gguf", new)
    whole = new.read_bytes()
    new.unlink()
    clean = dying(10**6, small / "m.gguf", out, "-q")
    assert (clean.returncode, clean.stderr) == (0, "")
    assert out.read_bytes() == whole
    touches = int(clean.stdout.split()[-1])
    assert touches > 40
    seen = set()
    for k in sorted({0, 1, touches // 2, *range(touches - 6, touches)}):
        for old in (b"old", None) if k >= touches - 4 else (b"old",):
            out.unlink(missing_ok=True)
            if old:
                out.write_bytes(old)
            died = dying(k, small / "m.gguf", out, "--force")
            assert died.returncode == -signal.SIGKILL
            found = out.read_bytes() if out.exists() else None
            assert found in (old, whole)
            seen.add("new" if found == whole else "old")
            assert set(left(small)) <= {"m.gguf", out.name, out.name + atomic.SUFFIX}
    assert seen == {"old", "new"}
    assert dying(10**6, small / "m.gguf", out, "--force", "-q").returncode == 0  # what the dead left is in nobody's way
    assert left(small) == sorted(["m.gguf", out.name])


@pytest.mark.skipif(not shutil.which("strace"), reason="no strace")
def test_a_kill_at_a_system_call(small: Path) -> None:
    """The same from outside: the kernel kills the process at its k-th write to the disk."""
    out = small / "out.apr"
    code = f"import sys; from aprender import convert; sys.exit(convert.main([{str(small / 'm.gguf')!r}, {str(out)!r}, '--force', '-q']))"
    for call, numbers in (("pwrite64,write", (1, 2, 5)), ("fsync", (1, 2)), ("rename,renameat,renameat2", (1,))):
        for k in numbers:
            out.write_bytes(b"old")
            words = ["strace", "-f", "-qq", "-o", "/dev/null", "-P", str(out) + atomic.SUFFIX, "-P", str(out), "-P", str(small)]
            words += ["-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={k}", sys.executable, "-c", code]
            died = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
            if "ptrace" in died.stderr:
                pytest.skip(f"strace may not trace here: {died.stderr.strip()}")
            assert died.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), (call, k, died)
            if out.read_bytes() != b"old":
                assert call != "pwrite64,write"
                apr_bytes.read(out.read_bytes())
            assert set(left(small)) <= {"m.gguf", out.name, out.name + atomic.SUFFIX}


def test_two_writers_of_one_name(tmp_path: Path) -> None:
    """The second is refused and does no harm; what a dead one left is taken over; a link there is not followed."""
    path, other = tmp_path / "x", tmp_path / "x.tmp"
    with atomic.writing(path) as out:
        out.write(b"first")
        with pytest.raises(CannotRun, match=r"x\.tmp is being written") as caught, atomic.writing(path):
            pytest.fail("two at once")
        assert caught.value.code == "BUSY"
        out.write(b" and only")
    assert path.read_bytes() == b"first and only"
    other.write_bytes(b"what a dead writer left, longer than what comes now")
    with atomic.writing(path) as out:
        out.write(b"second")
    assert path.read_bytes() == b"second"
    (tmp_path / "precious").write_text("thesis")
    other.symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links") as failed, atomic.writing(path):
        pytest.fail("followed a link")
    assert failed.value.filename == str(path)
    assert (tmp_path / "precious").read_text() == "thesis"
    assert path.read_bytes() == b"second"


def test_a_writer_that_comes_while_another_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has opened the file, and before it can lock it the file takes its final name: that one must not be emptied."""
    path, real = tmp_path / "x", atomic.fcntl.flock
    first = atomic.writing(path)
    first.__enter__().write(b"whole")
    calls: list[int] = []

    def late(handle: int, how: int) -> None:
        if not calls:
            first.__exit__(None, None, None)
        calls.append(handle)
        real(handle, how)

    monkeypatch.setattr(atomic.fcntl, "flock", late)
    with atomic.writing(path) as out:
        assert path.read_bytes() == b"whole"
        out.write(b"next")
        out.flush()
        assert path.read_bytes() == b"whole"
    assert path.read_bytes() == b"next"
    assert len(calls) == 2
    assert left(tmp_path) == ["x"]


def test_ctrl_c_leaves_nothing(small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "_verified", interrupted)
    assert convert.main([str(small / "m.gguf"), str(small / "m.apr")]) == 3
    assert capsys.readouterr().err == "aprender: interrupted\n"
    assert left(small) == ["m.gguf"]


# ---- what is said ----------------------------------------------------------------------------------------------------------------------


def test_the_summary_is_true(done: Callable[..., Any], tmp_path: Path) -> None:
    """Sizes against the files, sums against the tensors' bytes."""
    import zlib

    said = done(CANARY / "canary.gguf", tmp_path / "m.apr", "--formats", "*.ffn_down=F16,output=BF16")
    read = apr_bytes.read((tmp_path / "m.apr").read_bytes())
    assert (said["schema"], said["container"], said["source_container"], said["arch"]) == ("aprender.convert/1", "apr", "gguf", "qwen2")
    assert said["bytes_out"] == (tmp_path / "m.apr").stat().st_size
    assert said["bytes_in"] == (CANARY / "canary.gguf").stat().st_size
    assert said["ratio"] == said["bytes_out"] / said["bytes_in"]
    assert len(said["tensors"]) == len(read.tensors) == 51
    source = {tensor.name: tensor for tensor in _core.File(CANARY / "canary.gguf").tensors}
    for row in said["tensors"]:
        entry = read.tensors[row["name"]]
        assert (row["to"], tuple(row["shape"]), row["bytes_out"]) == (APR_IDS[entry.dtype], entry.shape, len(entry.data))
        assert row["crc32"] == zlib.crc32(entry.data)
        assert (row["from"], row["bytes_in"]) == (source[row["source"]].format, source[row["source"]].nbytes)
        assert row["passed"] == (row["from"] == row["to"])
        error = np.linalg.norm(apr_values(entry) - _core.File(CANARY / "canary.gguf").dequantize(row["source"]))
        assert (row["relative_rms"] == 0) == (error == 0)
    assert {row["to"] for row in said["tensors"] if "down_proj" in row["name"]} == {"F16"}
    assert next(row["to"] for row in said["tensors"] if row["name"] == "lm_head.weight") == "BF16"


def test_the_table_and_the_sentence(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(small / "hf", NARROW)
    assert convert.main([str(small / "hf"), str(small / "a.gguf"), "--formats", "Q4_K"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"Wrote {small / 'a.gguf'}: ")
    assert "read back and verified" in " ".join(out.split())
    assert "Q8_0 instead of Q4_K for" in out
    assert "no tokenizer" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("BF16 ")]
    assert [row[1] for row in rows] == ["Q8_0", "F32"]
    assert rows[0][-1].startswith("blk.")
    assert convert.main([str(small / "m.gguf"), str(small / "b.apr"), "-q", "--no-verify"]) == 0
    out, err = capsys.readouterr()
    assert (out.count("\n"), err) == (1, "")
    assert "not verified" in out


def test_reports_how_far_it_is(small: Path) -> None:
    model, told = _core.Model(_core.File(small / "m.gguf")), []
    plan = conversion.make_plan(model, "apr", mixes.parse("keep"))
    conversion.carry_out(plan, small / "m.apr", True, told.append)
    assert told == sorted(told)
    assert told[-1] <= 1
    assert told[-1] > 0.95
    assert len([share for share in told if share < 0.5]) > 10


def test_the_plan_is_made_before_anything_is_written(small: Path) -> None:
    model = _core.Model(_core.File(small / "m.gguf"))
    for words, kind in (("F16,nothing=F32", UnknownName), ("Q8_0", ArgumentError)):
        with pytest.raises(kind):
            conversion.make_plan(model, "apr", mixes.parse(words))
    with pytest.raises(CannotRun, match="does not exist"):
        conversion.check_place(small / "no" / "m.apr", False)
    assert left(small) == ["m.gguf"]
