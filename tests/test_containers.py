"""Floors 2 and 3: the same weights give the same bits, whatever the container, the exact number format, or the number of files.

Every container is written by somebody else (transformers, the gguf package, llama.cpp's encoders) or, for APR, laid down in `tiny.py` as
the format's description has it.  What a container says wrongly is refused with the documented code.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import gguf
import llamacpp
import numpy as np
import pytest
import tiny
from numpy.typing import NDArray

from aprender import _core
from aprender.errors import ConfigError, FormatError

IDS = [3, 1, 4, 1, 5, 9, 2, 6]  # any tokens of the tiny vocabulary
SHAPE = tiny.Shape()


def stages(path: Path) -> dict[tuple[str, int | None], NDArray[np.float32]]:
    """Every stage of a forward pass."""
    return dict(_core.Run(_core.Model(_core.File(path))).forward(IDS, "all"))


def same(a: Path, b: Path) -> None:
    """Bit for bit."""
    x, y = stages(a), stages(b)
    assert x.keys() == y.keys()
    assert len(x) > 10
    for key in x:
        assert np.array_equal(x[key].view(np.uint32), y[key].view(np.uint32)), key


# ---- the matrix ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shape", tiny.SHAPES, ids=str)
def test_same_weights_same_bits(shape: tiny.Shape, kind: str, tmp_path: Path) -> None:
    """The weights are exact in all three formats; llama's GGUF has its q and k rows interleaved, which must be undone."""
    dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[kind]
    folder = tiny.save_hf(shape, tmp_path / "hf", dtype=dtype)
    if not (
        shape.attention_bias and shape.arch != "qwen2"
    ):  # such a GGUF is refused by name: llama.cpp's converter has no place for the biases
        same(folder, tiny.save_gguf(shape, tmp_path / "m.gguf", kind))
    same(folder, tiny.save_apr(shape, tmp_path / "m.apr", kind, **({"tie_word_embeddings": True} if shape.tied else {})))


def test_another_weight_is_seen(tmp_path: Path) -> None:
    made = tiny.weights(SHAPE)
    name = "model.layers.1.mlp.up_proj.weight"
    made[name] = made[name].copy()
    made[name][3, 5] *= 2
    a, b = tiny.save_apr(SHAPE, tmp_path / "a.apr"), tiny.save_apr(SHAPE, tmp_path / "b.apr", made=made)
    with pytest.raises(AssertionError):
        same(a, b)


@pytest.mark.parametrize("kind", ["APR_Q4", "APR_Q8"])
@pytest.mark.parametrize("ffn", [160, 152])  # 152 = 4 * 32 + 24: the rows of ffn_down end inside a block of APR_Q4
def test_apr_own_formats(kind: str, ffn: int, tmp_path: Path) -> None:
    """As many bits as the same values in F32."""
    shape = tiny.Shape(ffn=ffn)
    made = tiny.weights(shape)
    decoded = {
        name: tiny.apr_values(tiny.apr_bytes(array, kind), kind, array.shape) if array.ndim == 2 else array for name, array in made.items()
    }
    same(tiny.save_apr(shape, tmp_path / "q.apr", kind), tiny.save_apr(shape, tmp_path / "f.apr", "F32", made=decoded))


@pytest.mark.foreign
@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
@pytest.mark.parametrize("dim", [256, 288])  # 288 = 256 + 32: each row ends in a block that is not full
def test_apr_k_quants(kind: str, dim: int, peer: llamacpp.Peer, tmp_path: Path) -> None:
    """Rows begin blocks, whatever their width; held against the gguf package's decoder."""
    shape = tiny.Shape(dim=dim, ffn=512, layers=1)
    made = tiny.weights(shape)

    def padded(array: tiny.Array) -> tiny.Array:
        return np.pad(array, ((0, 0), (0, -array.shape[1] % 256)))

    raw = {name: peer.quantize(kind, padded(array)) for name, array in made.items() if array.ndim == 2}
    reader = gguf.GGMLQuantizationType[kind]
    decoded = dict(made)
    for name, data in raw.items():
        rows, columns = made[name].shape
        decoded[name] = gguf.quants.dequantize(np.frombuffer(data, np.uint8).reshape(rows, -1), reader)[:, :columns]
    by_values = {id(array): name for name, array in made.items()}
    a = tiny.save_apr(shape, tmp_path / "q.apr", kind, made=made, encode=lambda _, array: raw[by_values[id(array)]])
    same(a, tiny.save_apr(shape, tmp_path / "f.apr", "F32", made=decoded))


# ---- APR: what else it says ------------------------------------------------------------------------


def test_apr_is_read_right(tmp_path: Path) -> None:
    path = tiny.save_apr(SHAPE, tmp_path / "m.apr", name="tiny", tags=["a"])
    file = _core.File(path)
    assert (file.container, file.version, file.notes, file.parts) == ("apr", 2, (), (str(path),))
    assert file.metadata["name"] == "tiny"
    assert file.metadata["tags"] == ["a"]
    assert file.verify() is True
    made = tiny.weights(SHAPE)
    assert {tensor.name: tensor.shape for tensor in file.tensors} == {name: array.shape for name, array in made.items()}
    for name, array in made.items():
        assert np.array_equal(file.dequantize(name), array)


def test_apr_one_flipped_bit_is_found_by_verify(tmp_path: Path) -> None:
    path = tiny.save_apr(SHAPE, tmp_path / "m.apr")
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    file = _core.File(path)  # opening does not read all bytes
    with pytest.raises(FormatError, match="damaged") as caught:
        file.verify()
    assert caught.value.code == "CHECKSUM"


def test_verify_says_when_there_is_nothing_to_check(tmp_path: Path) -> None:
    assert _core.File(tiny.save_gguf(SHAPE, tmp_path / "m.gguf")).verify() is False
    path = tiny.save_apr(SHAPE, tmp_path / "m.apr")
    path.write_bytes(path.read_bytes()[:-4])
    file = _core.File(path)
    assert file.verify() is False
    assert file.notes == ("the file has no checksum at its end",)


#: What a writer may spell otherwise, and what that must give.
SPELLINGS: dict[str, Callable[[dict[str, object]], object]] = {
    "aliases": lambda said: said.update(
        n_layers=said.pop("num_layers"), d_model=said.pop("hidden_size"), ffn_dim=said.pop("intermediate_size")
    ),
    "both spellings, one value": lambda said: said.update(n_layers=2),
    "null beside an alias": lambda said: said.update(n_layers=said.pop("num_layers"), num_layers=None),
    "class of Hugging Face": lambda said: said.update(hf_architecture="Qwen2ForCausalLM", architecture="transformer"),
    "descriptions": lambda said: said.update(author="a", license=None, quantization={"bits": 4}, special_tokens={"bos_token": "x"}),
    "no rope_type": lambda said: said.pop("rope_type"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_apr_spellings(name: str, tmp_path: Path) -> None:
    said = tiny.apr_metadata(SHAPE)
    SPELLINGS[name](said)
    tensors = {key: (0, array.shape, array.tobytes()) for key, array in tiny.weights(SHAPE).items()}
    path = tmp_path / "m.apr"
    path.write_bytes(tiny.apr_file(tensors, json.dumps(said).encode()))
    same(path, tiny.save_hf(SHAPE, tmp_path / "hf"))


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "two spellings, two values": ({"n_layers": 3}, "CONFIG"),
    "two architectures": ({"hf_model_type": "llama"}, "CONFIG"),
    "text for a number": ({"hidden_size": "64"}, "CONFIG"),
    "unknown key": ({"logit_softcap": 30.0}, "UNSUPPORTED"),
    "experts": ({"num_experts": 8}, "UNSUPPORTED"),
    "rope scaling": ({"rope_scaling": {"type": "yarn", "factor": 4}}, "UNSUPPORTED"),
    "neighbours with biases": ({"rope_type": 0}, "UNSUPPORTED"),
    "another pairing": ({"rope_type": 1}, "CONFIG"),
    "unknown architecture": ({"architecture": "mamba"}, "UNSUPPORTED"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_apr_refused(name: str, tmp_path: Path) -> None:
    more, code = REFUSED[name]
    path = tiny.save_apr(SHAPE, tmp_path / "m.apr", **more)
    with pytest.raises((ConfigError, FormatError)) as caught:
        _core.Model(_core.File(path))
    assert caught.value.code == code


def test_apr_neighbours_are_the_rows_of_a_gguf(tmp_path: Path) -> None:
    """rope_type 0: the q and k rows lie as llama.cpp's converter puts them."""
    shape = tiny.Shape("llama")
    turned = {}
    for name, array in tiny.weights(shape).items():
        heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads}.get(name.split(".")[-2])
        turned[name] = tiny.permuted(array, heads) if heads else array
    same(tiny.save_apr(shape, tmp_path / "a.apr", made=turned, rope_type=0), tiny.save_hf(shape, tmp_path / "hf"))


def test_apr_with_names_of_gguf(tmp_path: Path) -> None:
    tensors = {tiny.gguf_name(name): (0, array.shape, array.tobytes()) for name, array in tiny.weights(SHAPE).items()}
    path = tmp_path / "m.apr"
    path.write_bytes(tiny.apr_file(tensors, json.dumps(tiny.apr_metadata(SHAPE)).encode()))
    same(path, tiny.save_hf(SHAPE, tmp_path / "hf"))


def test_crc_is_that_of_zlib(tmp_path: Path) -> None:
    """The header's CRC leaves its own field out; with the field zeroed instead the number is another one."""
    path = tiny.save_apr(SHAPE, tmp_path / "m.apr")
    data = bytearray(path.read_bytes())
    zeroed = zlib.crc32(bytes(data[:40]) + bytes(4) + bytes(data[44:64]))
    assert zeroed != struct.unpack_from("<I", data, 40)[0]
    struct.pack_into("<I", data, 40, zeroed)
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        _core.File(path)
    assert caught.value.code == "CHECKSUM"


# ---- models in several files ---------------------------------------------------------------------------


def sharded(folder: Path, size: str = "40KB") -> Path:
    """A checkpoint that transformers cut into shards."""
    tiny.hf_model(SHAPE).save_pretrained(folder, max_shard_size=size)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def test_sharded_is_the_same_model(tmp_path: Path) -> None:
    folder, single = sharded(tmp_path / "shards"), tiny.save_hf(SHAPE, tmp_path / "one", dtype="float32")
    file = _core.File(folder)
    assert file.container == "safetensors"
    assert {Path(part).name for part in file.parts} == {path.name for path in folder.glob("model*")}
    assert {Path(file.parts[t.part]).name: None for t in file.tensors}.keys() == {path.name for path in folder.glob("model-*")} | set()
    said = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {tensor.name: Path(file.parts[tensor.part]).name for tensor in file.tensors} == said
    same(folder, single)
    same(folder / "model.safetensors.index.json", single)


def rewrite(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Change the index's map."""
    path = folder / "model.safetensors.index.json"
    said = json.loads(path.read_text())
    change(said["weight_map"])
    path.write_text(json.dumps(said))


NORM = "model.norm.weight"

INDEX_LIES: dict[str, tuple[Callable[[dict[str, str]], object], str]] = {
    "out of the folder": (lambda said: said.update({NORM: "../x"}), "PATH"),
    "absolute": (lambda said: said.update({NORM: "/etc/passwd"}), "PATH"),
    "below": (lambda said: said.update({NORM: "a/b"}), "PATH"),
    "dots": (lambda said: said.update({NORM: ".."}), "PATH"),
    "empty": (lambda said: said.update({NORM: ""}), "PATH"),
    "NUL": (lambda said: said.update({NORM: "a\0b"}), "PATH"),
    "no such file": (lambda said: said.update({NORM: "model-9.safetensors"}), "MISSING"),
    "another shard": (lambda said: said.update({NORM: next(name for name in said.values() if name != said[NORM])}), "MISSING"),
    "a tensor that is nowhere": (lambda said: said.update(extra=said[NORM]), "MISSING"),
    "a tensor left out": (lambda said: said.pop(NORM), "COUNT"),
}


@pytest.mark.parametrize("name", INDEX_LIES)
def test_an_index_that_lies(name: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "shards")
    change, code = INDEX_LIES[name]
    rewrite(folder, change)
    with pytest.raises((FormatError, ConfigError)) as caught:
        _core.File(folder)
    assert caught.value.code == code


def test_a_shard_name_cannot_colour_the_terminal(tmp_path: Path) -> None:
    """Whatever stands in the index, the message is plain text."""
    folder = sharded(tmp_path / "shards")
    shard = sorted(folder.glob("model-*"))[0]
    red = "\x1b[31mred"
    shard.rename(folder / red)
    rewrite(folder, lambda said: said.update({name: red for name, place in said.items() if place == shard.name}))
    assert _core.File(folder).tensors
    rewrite(folder, lambda said: said.update({name: red for name in said if name == NORM}))
    with pytest.raises(ConfigError, match="another shard") as caught:
        _core.File(folder)
    assert str(caught.value).isprintable()


def test_a_shard_is_no_link_out_of_the_folder(tmp_path: Path) -> None:
    """But the cache of the Hugging Face hub, where every file is a link to ../../blobs/<hash>, is read."""
    folder = sharded(tmp_path / "snapshots" / "1234")
    shard = sorted(folder.glob("model-*"))[0]
    (tmp_path / "blobs").mkdir()
    shutil.move(shard, tmp_path / "blobs" / "00ff")
    shard.symlink_to("../../blobs/00ff")
    assert _core.File(folder).tensors
    for target in ("../../blobs/../blobs/00ff", str(tmp_path / "blobs" / "00ff"), "../../blobs/.00ff"):
        shard.unlink()
        shard.symlink_to(target)
        with pytest.raises(FormatError) as caught:
            _core.File(folder)
        assert caught.value.code == "PATH"


def test_a_shard_is_a_regular_file(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "shards")
    shard = sorted(folder.glob("model-*"))[0]
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(FormatError) as caught:
        _core.File(folder)
    assert caught.value.code == "NOT_REGULAR"


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "shards")
    first, second = sorted(folder.glob("model-*"))[:2]
    shutil.copy(first, second)
    with pytest.raises(FormatError) as caught:
        _core.File(folder)
    assert caught.value.code == "DUPLICATE"


def test_what_is_wrong_in_a_shard_is_told_with_its_name(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "shards")
    shard = sorted(folder.glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(FormatError, match=shard.name) as caught:
        _core.File(folder)
    assert caught.value.code == "OFFSET"


def split(folder: Path) -> list[Path]:
    """A GGUF that the gguf package wrote in parts of ten tensors."""
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "m.gguf", SHAPE.arch, split_max_tensors=10)
    for add, value in (
        (writer.add_block_count, SHAPE.layers), (writer.add_embedding_length, SHAPE.dim), (writer.add_feed_forward_length, SHAPE.ffn),
        (writer.add_head_count, SHAPE.heads), (writer.add_head_count_kv, SHAPE.kv_heads), (writer.add_key_length, SHAPE.head),
        (writer.add_value_length, SHAPE.head), (writer.add_rope_freq_base, SHAPE.theta), (writer.add_layer_norm_rms_eps, SHAPE.eps),
    ):  # fmt: skip
        add(value)
    for name, array in tiny.gguf_tensors(SHAPE).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(folder.glob("m-*.gguf"))
    assert len(parts) > 2
    return parts


def test_split_gguf_is_the_same_model(tmp_path: Path) -> None:
    parts = split(tmp_path / "split")
    file = _core.File(parts[0])
    assert file.parts == tuple(map(str, parts))
    assert file.nbytes == sum(path.stat().st_size for path in parts)
    same(parts[0], tiny.save_gguf(SHAPE, tmp_path / "one.gguf"))


def test_split_gguf_is_opened_by_its_first_part(tmp_path: Path) -> None:
    parts = split(tmp_path / "split")
    with pytest.raises(ConfigError, match="first part") as caught:
        _core.File(parts[1])
    assert caught.value.field == "split.no"


def test_split_gguf_with_a_part_missing_misnamed_or_foreign(tmp_path: Path) -> None:
    parts = split(tmp_path / "split")
    kept = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(ConfigError, match="part 2 of") as caught:
        _core.File(parts[0])
    assert caught.value.code == "CONFIG"
    parts[1].unlink()
    with pytest.raises(ConfigError) as caught:
        _core.File(parts[0])
    assert caught.value.code == "MISSING"
    parts[1].write_bytes(kept)
    assert _core.File(parts[0]).tensors
    renamed = parts[0].rename(parts[0].with_name("other.gguf"))
    with pytest.raises(ConfigError, match="must end in") as caught:
        _core.File(renamed)
    assert caught.value.code == "CONFIG"
