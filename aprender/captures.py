"""What a side saw: arrays by (stage, layer) with a manifest, the contract under which two may be compared, and their folder on disk.

Owns :class:`Captures`, the sample contract (:func:`check_contract`,
:func:`aligned`) and the folder format: ``layer-NNN.safetensors``, ``model.safetensors``, and ``manifest.json`` last, as the commit point.
Refuses to compare unlike things, to store a value that its declared native type cannot hold, to write over a folder that is not a capture,
and to read a tensor whose bytes are not those that were saved.  Makes no captures and judges none: the sides fill it, the judge, the
reports and the commands read it.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import TensorSpec, serialize

from aprender import _core, stages
from aprender.atomic import LOCK, check_unlocked, locked, sync_folder, writing
from aprender.errors import ArgumentError, CannotRun, FormatError, NotComparable, UnknownName
from aprender.manifest import ALL, HALVES, LAST, PAIRS, SCHEMA, TREE, Manifest, TensorNote, key_name
from aprender.stages import Key

Array = NDArray[np.float32]

MANIFEST = "manifest.json"
MODEL_FILE = "model.safetensors"
LARGEST_MANIFEST = 1 << 26  # bytes; 100 layers of 25 stages take 0.8 MB


# ---- the mapping -------------------------------------------------------------------------------


class Captures(Mapping[Key, Array]):
    """Read-only mapping of (stage, layer) to a float32 array, in execution order.

    ``cap["ffn_out", 3]``, ``cap.layer(3).ffn_out`` and, for stages of the whole model, ``cap["lm_head", None]`` or ``cap.lm_head``.

    Parameters
    ----------
    arrays : mapping of Key to ndarray
        Each array is used as it is if it is float32; else widened.  Views handed out are read-only.
    manifest : Manifest
        A tensor without a note in it gets the plain one (captured, all tokens, halves, float32).
    pieces : tuple of Captures, optional
        The runs on one cache that this is the whole of, in order (:func:`aprender.pieces.whole`); not stored on disk.
    past : tuple of Captures, optional
        The runs before this one on the same cache, in order; not stored on disk.

    Raises
    ------
    UnknownName
        A key whose stage has no row.
    ArgumentError
        A key with a layer where none belongs, or the reverse.
    """

    def __init__(
        self,
        arrays: Mapping[Key, NDArray[Any]],
        manifest: Manifest,
        pieces: tuple[Captures, ...] = (),
        past: tuple[Captures, ...] = (),
    ) -> None:
        keys = sorted(map(_checked_key, arrays), key=stages.order)
        self._arrays: Mapping[Key, Array] = arrays if isinstance(arrays, Lazy) else {key: _frozen(arrays[key]) for key in keys}
        notes = {key: manifest.tensors.get(key) or TensorNote.of(self._arrays[key]) for key in keys}
        self.manifest = replace(manifest, tensors=notes, positions=manifest.positions or tuple(range(len(manifest.tokens))))
        self._keys = tuple(keys)
        self.pieces, self.past = pieces, past

    @property
    def tokens(self) -> tuple[int, ...]:
        """Token ids of the sequence."""
        return self.manifest.tokens

    def __getitem__(self, key: Key | str) -> Array:
        wanted = (key, None) if isinstance(key, str) else key
        found = (stages.stage(wanted[0]).name, wanted[1])
        if found not in self.manifest.tensors:
            raise UnknownName(f"'{stages.spell(found)}' is not in this capture of {self.manifest.side}", stage=found[0], layer=found[1])
        return self._arrays[found]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    # Mapping's own look for KeyError, which no error of aprender is.
    def __contains__(self, key: object) -> bool:
        return (key, None) in self.manifest.tensors if isinstance(key, str) else key in self.manifest.tensors

    def get(self, key: Key | str, default: Array | None = None) -> Array | None:  # type: ignore[override]
        """The array, or ``default`` where there is none."""
        return self[key] if key in self else default  # noqa: SIM401 (this is get)

    def layer(self, number: int) -> LayerView:
        """The stages of one layer, by name."""
        if not any(key[1] == number for key in self._keys):
            raise UnknownName(f"there is no layer {number} in this capture of {self.manifest.side}", layer=number)
        return LayerView(self, number)

    def __getattr__(self, name: str) -> Array:
        if name.startswith("_") or name not in stages.by_name:
            raise AttributeError(f"captures have no attribute '{name}'{stages.suggest(name, stages.by_name)}")
        if (name, None) not in self.manifest.tensors:
            raise AttributeError(f"'{name}' is not in this capture, or belongs to a layer: use .layer(n).{name}")
        return self[name, None]

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(key[0] for key in self._keys if key[1] is None)]

    def __repr__(self) -> str:
        return f"<Captures of {self.manifest.side}: {len(self)} tensors, {len(self.tokens)} tokens>"


class LayerView(Mapping[str, Array]):
    """The stages of one layer: ``view.ffn_out`` or ``view["ffn_out"]``."""

    def __init__(self, captures: Captures, number: int) -> None:
        self._captures = captures
        self._number = number

    def __getitem__(self, name: str) -> Array:
        return self._captures[name, self._number]

    def __iter__(self) -> Iterator[str]:
        return (key[0] for key in self._captures if key[1] == self._number)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return (name, self._number) in self._captures

    def get(self, name: str, default: Array | None = None) -> Array | None:  # type: ignore[override]
        """The array, or ``default`` where there is none."""
        return self[name] if name in self else default  # noqa: SIM401 (this is get)

    def __getattr__(self, name: str) -> Array:
        if name.startswith("_") or name not in self:
            raise AttributeError(f"layer {self._number} has no '{name}'{stages.suggest(name, self)}")
        return self[name]

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self]

    def __repr__(self) -> str:
        return f"<layer {self._number} of {self._captures!r}>"


def _checked_key(key: Key) -> Key:
    """The key, if its stage exists and has a layer exactly where it should."""
    row = stages.by_name.get(key[0]) or stages.stage(key[0])
    if row.per_layer != (key[1] is not None):
        word = "needs a layer" if row.per_layer else "belongs to the whole model"
        raise ArgumentError(f"'{row.name}' {word}, got layer {key[1]}", code="ARGUMENT", stage=row.name, layer=key[1])
    return row.name, key[1]


def _frozen(array: NDArray[Any]) -> Array:
    """A read-only float32 view, without a copy if the array is float32 already."""
    view: Array = np.asarray(array, dtype=np.float32).view()
    view.flags.writeable = False
    return view


# ---- the sample contract -----------------------------------------------------------------------


def check_contract(a: Captures, b: Captures, keys: Iterable[Key] | None = None) -> list[str]:
    """Whether two captures hold like things.

    Parameters
    ----------
    a, b : Captures
    keys : iterable of Key, optional
        Tensors to be compared; those in both if not given.

    Returns
    -------
    list of str
        Views that :func:`aligned` will apply, in words.  Empty: the tensors are comparable as they are.

    Raises
    ------
    NotComparable
        Nothing in common, or token ids, positions, capture point or shape differ; the message holds both values.
    """
    _check_sequence("token ids", a.tokens, b.tokens)
    _check_sequence("positions", a.manifest.positions, b.manifest.positions)
    common = [key for key in (a if keys is None else keys) if key in a and key in b]
    if not common:
        raise NotComparable(f"{a.manifest.side} and {b.manifest.side} have no tensor in common", code="EMPTY", field="tensors")
    said: dict[str, list[Key]] = {}
    for key in common:
        for note in _check_tensor(a, b, key):
            said.setdefault(note, []).append(key)
    return [f"{note} ({_several(found)})" for note, found in said.items()]


def _several(keys: list[Key]) -> str:
    """A few keys in words."""
    return ", ".join(map(stages.spell, keys[:3])) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _check_sequence(what: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    """Two sequences of whole numbers must be equal; names the first place where they are not."""
    if a == b:
        return
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    x, y = (str(s[at]) if at < len(s) else "the end" for s in (a, b))
    raise NotComparable(f"{what} differ at place {at}: {x} against {y} ({len(a)} and {len(b)} in all)", code="TOKENS", field=what)


def _check_tensor(a: Captures, b: Captures, key: Key) -> list[str]:
    """Notes on one common tensor; raises NotComparable."""
    x, y = a.manifest.tensors[key], b.manifest.tensors[key]
    if x.capture_point != y.capture_point:
        raise NotComparable(
            f"{stages.spell(key)} is captured at different points: '{x.capture_point}' against '{y.capture_point}'",
            code="CAPTURE_POINT", stage=key[0], layer=key[1], field="capture_point",
        )  # fmt: skip
    notes = []
    if x.positions != y.positions:
        notes.append("one side holds the last token only: last tokens compared")
    if x.lanes != y.lanes:
        notes.append(f"lane orders differ ({x.lanes} against {y.lanes}): compared as {HALVES}")
    shapes = [_view_shape(side, key, LAST if x.positions != y.positions else ALL) for side in (a, b)]
    if shapes[0] != shapes[1]:
        shown = f"{stages.spell(key)} has shape {list(x.shape)} against {list(y.shape)}"
        raise NotComparable(shown, code="SHAPE", stage=key[0], layer=key[1], field="shape")
    return notes


def _view_shape(side: Captures, key: Key, positions: str) -> tuple[int, ...]:
    """Shape of a tensor once cut to the positions that are compared."""
    note, row = side.manifest.tensors[key], stages.by_name[key[0]]
    if positions == ALL or "T" not in row.shape or len(note.shape) != len(row.shape):
        return note.shape
    axis = row.shape.index("T")
    return (*note.shape[:axis], 1, *note.shape[axis + 1 :])


def aligned(a: Captures, b: Captures, key: Key) -> tuple[Array, Array]:
    """The two arrays of a key after the views that :func:`check_contract` names: last token of both, lanes as halves."""
    last = a.manifest.tensors[key].positions != b.manifest.tensors[key].positions
    return view(a, key, last), view(b, key, last)


def view(side: Captures, key: Key, last: bool) -> Array:
    """One side's array with its lanes as halves, and of all tokens the last one if asked."""
    array, note, row = side[key], side.manifest.tensors[key], stages.by_name[key[0]]
    if last and note.positions == ALL and "T" in row.shape:
        array = np.take(array, [-1], axis=row.shape.index("T"))
    return halves_from_pairs(array, row, side.manifest.hparams) if note.lanes == PAIRS else array


def halves_from_pairs(array: Array, row: stages.Stage, hparams: Mapping[str, int | float]) -> Array:
    """Heads whose RoPE partners lie side by side, re-ordered so that partner i is i + h/2.  Of q, k and v side by side, v stays as it is.

    Parameters
    ----------
    array : ndarray
        [tokens, columns].
    row : Stage
    hparams : mapping
        ``heads``, ``kv_heads`` and ``head``.
    """
    size = int(hparams["head"])
    turned = (int(hparams["heads"]) + int(hparams["kv_heads"])) * size if row.shape[-1] == "QKV" else array.shape[-1]
    pairs = array[:, :turned].reshape(array.shape[0], -1, size // 2, 2)
    return np.concatenate([pairs.swapaxes(-1, -2).reshape(array.shape[0], turned), array[:, turned:]], axis=1)


# ---- on disk -----------------------------------------------------------------------------------


def _to_bfloat16(array: Array) -> NDArray[np.uint16]:
    """The upper halves of float32 values; exact only if the lower halves are zero, which the caller checks by widening again."""
    return (array.view(np.uint32) >> 16).astype(np.uint16)


def _from_bfloat16(bits: NDArray[np.uint16]) -> Array:
    """bfloat16 bits as float32: no rounding."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


_NARROW: Mapping[str, tuple[Callable[[Array], NDArray[Any]], Callable[[NDArray[Any]], Array]]] = {
    "float32": (lambda array: array, lambda native: native),
    "float16": (lambda array: array.astype(np.float16), lambda native: native.astype(np.float32)),
    "bfloat16": (_to_bfloat16, _from_bfloat16),
}


def _native(array: Array, note: TensorNote, key: Key) -> NDArray[Any]:
    """The array in its native type, contiguous; ArgumentError if a value does not fit."""
    narrow, widen = _NARROW[note.dtype]
    flat = np.ascontiguousarray(array)
    with np.errstate(over="ignore"):
        native = narrow(flat)
    if not np.array_equal(widen(native), flat, equal_nan=True):
        raise ArgumentError(f"{stages.spell(key)} holds values that {note.dtype} does not have", code="VALUE", stage=key[0], layer=key[1])
    return native


def file_name(layer: int | None) -> str:
    """The file of a layer, or of the stages of the whole model."""
    return MODEL_FILE if layer is None else f"layer-{layer:03d}.safetensors"


_OURS = re.compile(r"(layer-\d{3,6}\.safetensors|model\.safetensors|manifest\.json)(\.tmp)?|\.lock")


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Whether a capture may be saved there: before long work, so that it is not done in vain.

    Raises
    ------
    CannotRun
        Not a folder, one that holds anything else than a capture, or (code BUSY) one that somebody else writes now.
    """
    where = Path(folder)
    if where.exists() and not where.is_dir():
        raise CannotRun(f"{where}: is not a folder", code="PATH", path=str(where))
    check_unlocked(where)
    foreign = sorted(name for name in (os.listdir(where) if where.is_dir() else ()) if not _OURS.fullmatch(name))
    if foreign:
        raise CannotRun(f"{where} holds '{foreign[0]}': it is not a capture and will not be written over", code="PATH", path=str(where))


def save(captures: Captures, folder: str | os.PathLike[str]) -> Manifest:
    """Write a capture to a folder.

    Each file is written under another name, synced and renamed; the manifest last, so that a folder with a manifest is whole.  A capture
    that is there already is replaced.

    Parameters
    ----------
    captures : Captures
    folder : path
        Made if it does not exist.

    Returns
    -------
    Manifest
        As written, with the digest of each tensor.

    Raises
    ------
    CannotRun
        The folder holds anything else than a capture, or cannot be written.
    ArgumentError
        A value that its native type does not have.
    """
    where = Path(folder)
    try:
        check_folder(where)
        where.mkdir(parents=True, exist_ok=True)
        with locked(where):
            return _save(captures, where)
    except OSError as error:
        raise CannotRun(f"{where}: {error.strerror or error}", code="IO", path=str(where)) from error


def _save(captures: Captures, where: Path) -> Manifest:
    """Write a capture to a folder that is ours alone now: without a manifest it reads as unfinished, so that goes first and comes last."""
    (where / MANIFEST).unlink(missing_ok=True)
    sync_folder(where)
    notes: dict[Key, TensorNote] = {}
    for layer in dict.fromkeys(key[1] for key in captures):
        notes |= _save_file(captures, layer, where)
    for name in sorted(set(os.listdir(where)) - {file_name(key[1]) for key in captures} - {LOCK}):
        (where / name).unlink()
    manifest = replace(captures.manifest, tensors=notes, schema=SCHEMA)
    try:
        _write(where / MANIFEST, manifest.to_json().encode())
    except BaseException:  # the last sync may have failed, with the file in its place
        with suppress(OSError):
            (where / MANIFEST).unlink(missing_ok=True)
        raise
    return manifest


def _save_file(captures: Captures, layer: int | None, where: Path) -> dict[Key, TensorNote]:
    """Write one layer's file; returns its notes with digests."""
    arrays = {key: _native(captures[key], captures.manifest.tensors[key], key) for key in captures if key[1] == layer}
    notes = {}
    specs = {}
    for key, native in arrays.items():
        note = captures.manifest.tensors[key]
        notes[key] = replace(note, shape=native.shape, sha256=hashlib.sha256(native.data).hexdigest())
        specs[key[0]] = TensorSpec(dtype=note.dtype, shape=native.shape, data_ptr=native.ctypes.data, data_len=native.nbytes)
    _write(where / file_name(layer), bytes(serialize(specs)))  # arrays stays alive until here: the specs hold bare pointers
    return notes


def _write(path: Path, data: bytes) -> None:
    """Write a file so that its name never shows half of it."""
    with writing(path) as out:
        out.write(data)


class Lazy(Mapping[Key, Array]):
    """Arrays that are read when they are asked for, and kept while somebody holds them.

    Parameters
    ----------
    where : Path
        Folder.
    notes : mapping of Key to TensorNote
        What it holds.
    """

    def __init__(self, where: Path, notes: Mapping[Key, TensorNote]) -> None:
        self._where = where
        self._notes = notes
        self._live: weakref.WeakValueDictionary[Key, Array] = weakref.WeakValueDictionary()

    def __iter__(self) -> Iterator[Key]:
        return iter(self._notes)

    def __len__(self) -> int:
        return len(self._notes)

    def __getitem__(self, key: Key) -> Array:
        found = self._live.get(key)
        if found is None:
            found = self._live[key] = _frozen(self._read(key))
        return found

    @abstractmethod
    def _read(self, key: Key) -> Array:
        """One tensor from its file, checked."""


class _Folder(Lazy):
    """The arrays of a saved capture, checked against their digests."""

    _last: tuple[str, _core.File] | None = None  # the tensors of a layer are wanted one after the other

    def _read(self, key: Key) -> Array:
        path = str(self._where / file_name(key[1]))
        name, note = key[0], self._notes[key]
        file = self._file(path)
        info = next((tensor for tensor in file.tensors if tensor.name == name), None)
        if info is None:
            raise FormatError(f"{path}: the tensor '{name}' is missing", code="MISSING", path=path, field=name)
        if tuple(info.shape) != note.shape:
            shapes = f"{list(info.shape)}, the manifest says {list(note.shape)}"
            raise FormatError(f"{path}: '{name}' has shape {shapes}", code="SHAPE", path=path, field=name)
        if note.sha256 is not None and hashlib.sha256(file.raw(name).data).hexdigest() != note.sha256:
            raise FormatError(f"{path}: the bytes of '{name}' are not those that were saved", code="CHANGED", path=path, field=name)
        return file.dequantize(name)

    def _file(self, path: str) -> _core.File:
        """The file of a layer, kept open until another one is asked for."""
        if self._last is None or self._last[0] != path:
            try:
                self._last = path, _core.File(path)
            except OSError as error:
                raise FormatError(f"{path}: {error.strerror or error}", code="IO", path=path) from error
        return self._last[1]


def read_manifest(where: Path) -> Manifest:
    """The manifest of a saved capture or of an APRT tree of ours.

    Raises
    ------
    FormatError
        There is none, or it is not ours.
    """
    path = where / MANIFEST
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise FormatError(f"{path}: is not a regular file", code="NOT_REGULAR", path=str(path))
        if about.st_size > LARGEST_MANIFEST:
            raise FormatError(f"{path}: larger than any manifest of ours", code="LIMIT", path=str(path))
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 at byte {error.start}", code="UTF8", path=str(path), offset=error.start) from None
    except OSError as error:
        why = "not a saved capture: it has no manifest.json" if where.is_dir() else error.strerror or str(error)
        raise FormatError(f"{where}: {why}", code="PATH", path=str(where), field=MANIFEST) from None
    return Manifest.from_json(text, str(path))


def open_captures(folder: str | os.PathLike[str]) -> Captures:
    """A saved capture, or an APRT tree of ours; arrays are read when they are first used.

    Raises
    ------
    FormatError
        No manifest (an interrupted save leaves none), a manifest that is not ours, or a file that is missing.  A damaged tensor is
        found when it is read.
    """
    where = Path(folder)
    manifest = read_manifest(where)
    if manifest.schema == TREE:
        from aprender.aprt import open_tree

        return open_tree(where)
    for layer, key in {key[1]: key for key in manifest.tensors}.items():
        file = where / file_name(layer)
        if not file.is_file():
            raise FormatError(f"{file}: missing, the manifest lists '{key_name(key)}'", code="MISSING", path=str(file), field=key_name(key))
    return Captures(_Folder(where, manifest.tensors), manifest)
