"""APRT files and trees: ``layer-3/ffn_out.bin``, ``lm_head.bin``, each a header of 12 bytes and float32 values, without a shape.

Owns where a stage is filed, what of it a file holds (the last column of the stage table), the way a tree is written so that it never reads
as whole when it is not, and the reading of trees: ours by their manifest, those of other tools by what the user says about them.  Refuses
to write over what is not ours, headers that contradict their path, counts that no shape fits, and bytes that are not those that were
written.  The header itself is read in C.  Called by ``captures.open_captures`` (a tree of ours is a capture like any other), ``trace``,
``oracle`` and ``diff``.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from aprender import _core, stages
from aprender.arithmetic import profile
from aprender.atomic import LOCK, SUFFIX, check_unlocked, locked, sync_folder, writing
from aprender.captures import MANIFEST, Array, Captures, Lazy, read_manifest, view
from aprender.errors import CannotRun, ConfigError, FormatError
from aprender.manifest import ALL, LAST, TREE, Manifest, TensorNote, key_name
from aprender.stages import Key, Stage

ENDING = ".bin"
MAGIC = b"APRT"
HEADER = 12  # bytes: the magic, the layer and the number of values as little-endian u32
WHOLE = 0xFFFFFFFF  # the layer that a stage of the whole model is filed under
LARGEST = 0xFFFFFFFF  # values that a header can count

UNDECLARED = "undeclared"
"""What to say for the arithmetic of a tree when nobody knows it."""

_LAYER = re.compile(r"layer-(0|[1-9]\d{0,5})")


# ---- where a stage is filed, and what of it ------------------------------------------------------


def held(key: Key) -> bool:
    """Whether a tree has a file for it."""
    return stages.stage(key[0]).population != "NONE"


def _number(key: Key) -> int | None:
    """The layer in a file's header; None for the whole model.  What comes before the layers is filed under layer 0."""
    return 0 if stages.by_name[key[0]].span == "ONCE" else key[1]


def file_name(key: Key) -> str:
    """Path of a tensor inside its tree."""
    number = _number(key)
    return key[0] + ENDING if number is None else f"layer-{number}/{key[0]}{ENDING}"


def header(key: Key, count: int) -> bytes:
    """The 12 bytes before the values."""
    number = _number(key)
    return MAGIC + (WHOLE if number is None else number).to_bytes(4, "little") + count.to_bytes(4, "little")


def shapes(keys: Iterable[Key], hparams: Mapping[str, int | float], tokens: int) -> dict[Key, tuple[int, ...]]:
    """What a tree of a model will hold: the shapes of those of the keys that have a file."""
    rows = {key: stages.stage(key[0]) for key in keys if held(key)}
    return {
        key: _cut(row.dims(hparams, tokens), row) if row.population == "LAST" else row.dims(hparams, tokens) for key, row in rows.items()
    }


def _cut(shape: tuple[int, ...], row: Stage) -> tuple[int, ...]:
    """A shape of all tokens as that of one."""
    return tuple(1 if symbol == "T" else size for symbol, size in zip(row.shape, shape, strict=True))


def _shape(captures: Captures, key: Key) -> tuple[int, ...]:
    """Shape of what a file of this tensor holds; CannotRun where the capture has not got that."""
    note, row = captures.manifest.tensors[key], stages.by_name[key[0]]
    size = dict(zip(row.shape, note.shape, strict=False))
    problem = None
    if len(note.shape) != len(row.shape):
        problem = f"has shape {list(note.shape)}, {' × '.join(row.shape)} is needed"
    elif "J" in size and size["J"] != size["T"]:
        problem = f"has {size['J']} keys for {size['T']} tokens, an APRT file as many of one as of the other"
    elif row.population == "ALL" and note.positions == LAST and len(captures.tokens) > 1:
        problem = f"is there of the last token only, an APRT file holds all {len(captures.tokens)}"
    if problem:
        text = f"{stages.spell(key)} {problem}: leave it out with --stages"
        raise CannotRun(text, code="SHAPE", stage=key[0], layer=key[1], field="shape")
    return _cut(note.shape, row) if row.population == "LAST" else note.shape


def _values(captures: Captures, key: Key) -> Array:
    """What a file of this tensor holds: its tokens, lanes as halves, 0 where a later token would be seen.  No value changes its bits."""
    row = stages.by_name[key[0]]
    array = np.ascontiguousarray(view(captures, key, row.population == "LAST"))
    if "J" in row.shape and "T" in row.shape:
        array = array.copy()
        array.view(np.uint32)[..., np.triu(np.ones(array.shape[-2:], bool), 1)] = 0
    return array


def exported(captures: Captures) -> Captures:
    """A capture as a tree will hold it.

    Raises
    ------
    CannotRun
        Nothing of it has a file in a tree, or something has not got what its file must hold.
    """
    keys = _keys(captures)
    for key in keys:
        _shape(captures, key)
    arrays = {key: _values(captures, key) for key in keys}
    notes = {key: _note(captures.manifest.tensors[key], array, key) for key, array in arrays.items()}
    return Captures(arrays, replace(captures.manifest, tensors=notes))


def _keys(captures: Captures) -> list[Key]:
    """What of a capture has a file."""
    keys = [key for key in captures if held(key)]
    if not keys:
        have = ", ".join(sorted({key[0] for key in captures})) or "nothing"
        raise CannotRun(f"APRT has no file for what was captured ({have})", code="EMPTY", field="stages")
    return keys


def _note(note: TensorNote, array: Array, key: Key) -> TensorNote:
    """The note of a tensor in a tree."""
    made = TensorNote.of(array, dtype=note.dtype, origin=note.origin, site=note.site)
    return replace(made, capture_point=note.capture_point, positions=_population(key))


# ---- writing -------------------------------------------------------------------------------------


def check(folder: str | os.PathLike[str], wanted: Mapping[Key, tuple[int, ...]] | None = None) -> None:
    """Whether a tree may and can be written there: before long work, so that it is not done in vain.

    Parameters
    ----------
    folder : path
    wanted : mapping of Key to shape, optional
        What it is to hold.

    Raises
    ------
    CannotRun
        Not a folder, one that holds anything else than a tree of ours, (code BUSY) one that somebody else writes now, or (code LIMIT) a
        tensor that no header can count.
    FormatError
        Something that is no folder has the name of a layer's.
    OSError
        ENOSPC: there is less room than the files need.
    """
    where = Path(folder)
    _check_sizes(wanted or {})
    check_unlocked(where)
    ours = _ours(where) if where.exists() else set()
    _check_room(where, wanted or {}, ours)


def _check_sizes(wanted: Mapping[Key, tuple[int, ...]]) -> None:
    for key, shape in wanted.items():
        if math.prod(shape) > LARGEST:
            text = f"{stages.spell(key)} has {math.prod(shape):,} values, an APRT file counts at most {LARGEST:,}: take fewer tokens"
            raise CannotRun(text, code="LIMIT", stage=key[0], layer=key[1], field="count")


def _check_room(where: Path, wanted: Mapping[Key, tuple[int, ...]], ours: set[str]) -> None:
    """Files of an older trace give their room back."""
    need = sum(HEADER + 4 * math.prod(shape) + 512 for shape in wanted.values())  # 512: a line of the manifest
    there = next(path for path in (where.absolute(), *where.absolute().parents) if path.exists())
    disk = os.statvfs(there)
    free = disk.f_bavail * disk.f_frsize + sum(os.lstat(where / name).st_size for name in ours if os.path.lexists(where / name))
    if need > free:
        raise OSError(errno.ENOSPC, f"the trace takes {need:,} bytes, {free:,} are free: --stages and --layers take fewer", str(where))


def _walk(where: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Every entry of a tree by its path in it, those of its layers' folders one by one."""
    for entry in sorted(os.scandir(where), key=lambda entry: entry.name):
        if not _LAYER.fullmatch(entry.name):
            yield entry.name, entry
        elif entry.is_dir(follow_symlinks=False):
            for inner in sorted(os.scandir(entry.path), key=lambda entry: entry.name):
                yield f"{entry.name}/{inner.name}", inner
        else:
            raise FormatError(f"{entry.path}: is not a folder", code="NOT_REGULAR", path=entry.path)


def _ours(where: Path) -> set[str]:
    """Files that we may replace: those of the manifest of an older trace, and those that a killed writer of ours noted down.

    Raises
    ------
    CannotRun
        There is anything else.
    """
    if not where.is_dir():
        raise CannotRun(f"{where}: is not a folder", code="PATH", path=str(where))
    listed: set[str] = {LOCK}
    with suppress(FormatError):
        manifest = read_manifest(where)
        if manifest.schema == TREE:
            listed |= {MANIFEST, *map(file_name, manifest.tensors)}
    if (where / LOCK).is_file():
        listed |= {line.decode(errors="replace") for line in (where / LOCK).read_bytes().splitlines()}
    found = set()
    for name, entry in _walk(where):
        if name.removesuffix(SUFFIX) not in listed or not entry.is_file(follow_symlinks=False):
            text = f"{where} holds '{_several([name])}', which no trace of ours lists: not written over; remove it, or write elsewhere"
            raise CannotRun(text, code="PATH", path=str(where))
        found.add(name)
    return found - {LOCK}


def write_tree(captures: Captures, folder: str | os.PathLike[str]) -> Manifest:
    """Write a capture as an APRT tree with a manifest.

    The old manifest goes first and the new one comes last, every file is synced and renamed before that: a folder with a manifest is whole.
    A trace of ours that is there already is replaced, with all of its files.  On an error nothing of either is left.

    Parameters
    ----------
    captures : Captures
        Only stages that APRT knows are written; of logits the last token.
    folder : path
        Made if it does not exist.

    Returns
    -------
    Manifest
        As written; each digest is that of the whole file.

    Raises
    ------
    CannotRun
        See :func:`check`; or (code BUSY) somebody else writes there; or nothing to write.
    OSError
        It cannot be written; ENOSPC before anything is touched, if that can be known.
    """
    where = Path(folder)
    wanted = {key: _shape(captures, key) for key in _keys(captures)}
    _check_sizes(wanted)
    where.mkdir(parents=True, exist_ok=True)
    with locked(where) as note_down:
        old = _ours(where)
        _check_room(where, wanted, old)
        names = {MANIFEST, *map(file_name, wanted)}
        note_down("".join(f"{name}\n" for name in sorted({name.removesuffix(SUFFIX) for name in old} | names)).encode())
        sync_folder(where)
        try:
            return _replace(captures, list(wanted), where, old - names)
        except BaseException:
            _remove(where, names | old)
            raise


def _replace(captures: Captures, keys: list[Key], where: Path, stale: set[str]) -> Manifest:
    """The files of a trace in a folder that is ours alone now."""
    (where / MANIFEST).unlink(missing_ok=True)
    sync_folder(where)
    notes = {key: _write_file(captures, key, where) for key in keys}
    for name in stale:
        (where / name).unlink(missing_ok=True)  # a temporary file of a killed writer may have been used again
    for path in {(where / name).parent for name in stale} - {where}:
        with suppress(OSError):  # not empty
            path.rmdir()
    sync_folder(where)
    manifest = replace(captures.manifest, tensors=notes, schema=TREE)
    more = {key: {"path": file_name(key), "size": HEADER + 4 * math.prod(note.shape)} for key, note in notes.items()}
    with writing(where / MANIFEST) as out:
        out.write(manifest.to_json(more).encode())
    return manifest


def _write_file(captures: Captures, key: Key, where: Path) -> TensorNote:
    """One file; returns its note with its digest."""
    path = where / file_name(key)
    path.parent.mkdir(exist_ok=True)
    array = _values(captures, key)
    parts = header(key, array.size), array.astype("<f4", copy=False).reshape(-1).view(np.uint8).data
    with writing(path) as out:
        for part in parts:
            out.write(part)
    return replace(_note(captures.manifest.tensors[key], array, key), sha256=_digest(*parts))


def _digest(*parts: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _remove(where: Path, names: set[str]) -> None:
    """What can be removed of a trace that failed, the manifest first."""
    for name in [MANIFEST, *sorted(names)]:
        with suppress(OSError):
            (where / name).unlink(missing_ok=True)
    for path in {(where / name).parent for name in names} - {where}:
        with suppress(OSError):
            path.rmdir()


# ---- reading -------------------------------------------------------------------------------------


def _read(path: Path, key: Key) -> Array:
    """The values of a file, [count], if its header's layer is the one that its path says."""
    if path.is_symlink():
        raise FormatError(f"{path}: is a link, not a file", code="NOT_REGULAR", path=str(path))
    number, values = _core.read_aprt(path)
    _check_layer(path, key, number)
    return values


def _check_layer(path: Path, key: Key, number: int | None) -> None:
    wanted = _number(key)
    if number != wanted:
        says = f"the header says {_spell_layer(number)}, a file of this name and place must say {_spell_layer(wanted)}"
        raise ConfigError(f"{path}: {says}", code="CONFIG", path=str(path), offset=4, field="layer", layer=number, stage=key[0])


def _spell_layer(number: int | None) -> str:
    return "the whole model" if number is None else f"layer {number}"


class _Tree(Lazy):
    """The arrays of a tree, checked against what is known of them."""

    def __init__(self, where: Path, notes: Mapping[Key, TensorNote], files: Mapping[Key, Path]) -> None:
        super().__init__(where, notes)
        self._files = files

    def _read(self, key: Key) -> Array:
        path, note = self._files[key], self._notes[key]
        values, wanted = _read(path, key), math.prod(note.shape)
        if values.size != wanted:
            text = f"{values.size} values, the trace had {list(note.shape)}, which is {wanted}"
            raise FormatError(f"{path}: {text}", code="CHECKSUM" if note.sha256 else "CHANGED", path=str(path), field="count")
        if note.sha256 is not None and _digest(header(key, values.size), values.view(np.uint8).data) != note.sha256:
            raise FormatError(f"{path}: the bytes are not those that were written", code="CHECKSUM", path=str(path), field="sha256")
        return values.reshape(note.shape)


def is_tree(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has the looks of an APRT tree."""
    where = Path(folder)
    return where.is_dir() and any(_LAYER.fullmatch(name) or name.endswith(ENDING) or name == LOCK for name in os.listdir(where))


def open_tree(folder: str | os.PathLike[str], ids: Sequence[int] | None = None, arithmetic: str | None = None) -> Captures:
    """An APRT tree as a capture; arrays are read when they are first used.

    Parameters
    ----------
    folder : path
    ids : sequence of int, optional
        Token ids of a tree without a manifest; one that has a manifest says them itself.
    arithmetic : str, optional
        How such a tree was computed: a row of :mod:`aprender.arithmetic`, or ``undeclared``.

    Returns
    -------
    Captures
        Its manifest's notes name the files that were passed over, and what is only the user's word.

    Raises
    ------
    FormatError
        INCOMPLETE: no manifest, and not enough said to do without.  SHAPE: a count that no number of rows fits.  MISSING, NOT_REGULAR, and
        what is wrong in a header; in a tree of ours that and CHECKSUM only when the tensor is read.
    ConfigError
        A file in the wrong place, or whose header says another layer than its path.
    UnknownName
        No such arithmetic.
    """
    where = Path(folder)
    if (where / MANIFEST).exists():
        return _open_ours(where)
    if (where / LOCK).exists():
        text = "is unfinished: its writer was interrupted, or is still at work; trace again"
        raise FormatError(f"{where}: {text}", code="INCOMPLETE", path=str(where), field=MANIFEST)
    if ids is None or arithmetic is None:
        text = (
            "has no manifest.json: a trace that was not finished, or another tool's; of another tool's say what it holds,"
            f" with --prompt-ids and --arithmetic (or '{UNDECLARED}')"
        )
        raise FormatError(f"{where}: {text}", code="INCOMPLETE", path=str(where), field=MANIFEST)
    return _open_foreign(where, tuple(ids), arithmetic)


def _open_ours(where: Path) -> Captures:
    """By the manifest.  Whatever else lies there is named, and not read."""
    manifest = read_manifest(where)
    if manifest.schema != TREE:
        raise FormatError(f"{where / MANIFEST}: schema {manifest.schema!r}, {TREE!r} is needed", code="BAD_VERSION", path=str(where))
    there, names = dict(_walk(where)), {key: file_name(key) for key in manifest.tensors}
    for key, name in names.items():
        if name not in there:
            text = f"{where / name}: missing, the manifest lists '{key_name(key)}'"
            raise FormatError(text, code="MISSING", path=str(where / name), field=key_name(key))
    stray = sorted({name for name in there if name.endswith(ENDING)} - set(names.values()))
    notes = (*manifest.notes, *([f"not of this trace, and not read: {_several(stray)}"] if stray else []))
    return Captures(_Tree(where, manifest.tensors, {key: where / name for key, name in names.items()}), replace(manifest, notes=notes))


def _several(names: list[str]) -> str:
    """A few names from a disk, which may hold anything."""
    return ", ".join(ascii(name)[1:-1] for name in names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _open_foreign(where: Path, ids: tuple[int, ...], arithmetic: str) -> Captures:
    """By the user's word: every file is looked at now, and every shape must follow from its count and the number of ids."""
    name = None if arithmetic == UNDECLARED else profile(arithmetic).name
    files, stray = _foreign_files(where)
    tensors = {key: replace(TensorNote.of(_shaped(path, key, len(ids))), positions=_population(key)) for key, path in files.items()}
    _check_widths(tensors, files)
    notes = [f"the tree has no manifest: its {len(ids)} token ids and its arithmetic ({arithmetic}) are your word"]
    notes += [f"not read, APRT has no such stage: {_several(stray)}"] if stray else []
    manifest = Manifest(side=f"aprt:{where.name}", tokens=ids, profile=name, notes=tuple(notes), tensors=tensors)
    return Captures(_Tree(where, tensors, files), manifest)


def _foreign_files(where: Path) -> tuple[dict[Key, Path], list[str]]:
    """The files of stages, and the names of those that are of none."""
    files: dict[Key, Path] = {}
    stray = []
    for place, entry in _walk(where):
        if not place.endswith(ENDING):
            continue
        key, path = _key_of(place, where), Path(entry.path)
        if key is None:
            stray.append(place)
        elif key in files:
            text = f"{path}: the same stage as {files[key].name}"
            raise FormatError(text, code="DUPLICATE", path=str(path), stage=key[0], layer=key[1])
        else:
            files[key] = path
    if not files:
        raise FormatError(f"{where}: no file of any stage", code="INCOMPLETE", path=str(where))
    return files, stray


def _key_of(place: str, where: Path) -> Key | None:
    """The tensor of a path inside a tree; None if it is of no stage that APRT has, ConfigError if that belongs elsewhere."""
    folder, _, name = place.rpartition("/")
    stem = name.removesuffix(ENDING)
    row = stages.by_name.get(stages.ALIASES.get(stem, stem))
    if row is None or not held((row.name, None)):
        return None
    if row.span == "TAIL":
        key: Key = row.name, None
        right, belongs = folder == "", "to the whole model: beside the layers' folders"
    elif row.span == "ONCE":
        key, right, belongs = (row.name, None), folder == "layer-0", "into layer-0"
    else:
        key, right, belongs = (row.name, int(folder[6:] or 0)), folder != "", "to a layer: into its folder"
    if not right:
        raise ConfigError(f"{where / place}: this stage belongs {belongs}", code="CONFIG", path=str(where / place), stage=row.name)
    return key


def _population(key: Key) -> str:
    return LAST if stages.by_name[key[0]].population == "LAST" else ALL


def _shaped(path: Path, key: Key, tokens: int) -> Array:
    """The values of a file without a manifest, in the shape that follows from their count."""
    row, values = stages.by_name[key[0]], _read(path, key)
    rows = 1 if row.population == "LAST" else tokens
    known = math.prod(rows for symbol in row.shape if symbol in "TJ")
    if known < 1 or values.size % known:
        form = " × ".join("n" if symbol not in "TJ" else str(rows) for symbol in row.shape)
        text = f"{path}: {values.size} values are not {form}: are there {tokens} token ids?"
        raise FormatError(text, code="SHAPE", path=str(path), field="count", stage=row.name, layer=key[1])
    return values.reshape([rows if symbol in "TJ" else values.size // known for symbol in row.shape])


def _check_widths(tensors: Mapping[Key, TensorNote], files: Mapping[Key, Path]) -> None:
    """What the stage table calls by one name must be of one size in all files."""
    first: dict[str, tuple[int, Key]] = {}
    for key in sorted(tensors, key=stages.order):
        for symbol, size in zip(stages.by_name[key[0]].shape, tensors[key].shape, strict=True):
            if symbol not in "TJ" and first.setdefault(symbol, (size, key))[0] != size:
                other, before = first[symbol]
                text = f"{files[key]}: {size} values a token or head ({symbol}), {files[before]} has {other}"
                raise FormatError(text, code="SHAPE", path=str(files[key]), field="count", stage=key[0], layer=key[1])


def open_file(path: str | os.PathLike[str], ids: Sequence[int] | None = None) -> Captures:
    """One APRT file as a capture of one tensor: the stage is that of its name, the layer that of its header.

    Parameters
    ----------
    path : path
    ids : sequence of int, optional
        Token ids; without them the tensor is flat.

    Raises
    ------
    UnknownName
        The file is not called as a stage is.
    FormatError, ConfigError, OSError
        See :func:`open_tree`.
    """
    file = Path(path)
    number, values = _core.read_aprt(file)  # first: of a file that is none of these, its name would only mislead
    row = stages.stage(file.name.removesuffix(ENDING))
    key: Key = (row.name, number if row.per_layer else None)
    folder = _LAYER.fullmatch(file.absolute().parent.name)
    if row.per_layer and (number is None or (folder and int(folder[1]) != number)):
        must = f"that of its folder {folder[0]}" if folder else "a layer"
        raise ConfigError(
            f"{file}: the header says {_spell_layer(number)}, it must be {must}", code="CONFIG", path=str(file), stage=row.name
        )
    _check_layer(file, key, number)
    array = values if ids is None else _shaped(file, key, len(ids))
    note = replace(TensorNote.of(array), positions=_population(key))
    notes = () if ids is None else (f"the {len(ids)} token ids are your word: an APRT file holds none",)
    return Captures({key: array}, Manifest(side=f"aprt:{file.name}", tokens=tuple(ids or ()), tensors={key: note}, notes=notes))
