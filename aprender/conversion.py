"""A bound model becomes a file in another container, or in other number formats.

Owns the way from a model to a file: the tensors' names, their order of rows, what is passed through byte for byte and what is encoded
anew, the hyper-parameters and the tokenizer as keys, and the check of the result before it takes its name.  Refuses a GGUF that could not
say what the model is, the source as the target, a target that exists, and a disk that is too small.  What the source is was settled when
it was bound: nothing is dropped or guessed here.  Byte layouts are in ``writers``, the choice of formats in ``mixes``, tokenizers in
``text``.  Called by convert.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprender import _core, atomic, mixes, text, writers
from aprender.errors import CannotRun, Error
from aprender.text import keys

PAIRED = ("attn_q", "attn_k")
"""The weights whose rows a container may interleave (csrc/plan/quirks.def)."""

INTERLEAVED = "ROPE_PAIRS"
NEIGHBOURS, HALVES = 0, 2
"""APR's ``rope_type``: RoPE turns the pairs (2i, 2i + 1) of a head, or (i, i + h/2), as Hugging Face has it."""

PIECE = 1 << 22
"""Values that are compared at a time."""

Tell = Callable[[float], None]
"""Is told the share done, 0..1."""


# ---- the plan --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Job:
    """One tensor of the target.

    Attributes
    ----------
    weight : WeightInfo
        Where it comes from.
    tensor : Tensor
        What it becomes.
    rows : array of int, or None
        The source's row for each row of the target where their order differs: in the file's order if the bytes are passed through, else in
        Hugging Face order.
    passed : bool
        The bytes go through as they are.
    """

    weight: _core.WeightInfo
    tensor: writers.Tensor
    rows: NDArray[np.intp] | None
    passed: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """A conversion before anything is written.

    Attributes
    ----------
    tokenizer : bool
        One is carried over.
    digest : str or None
        What decides its ids; None if this package cannot read it, or there is none.
    notes : tuple of str
        What the user should know.
    """

    model: _core.Model
    container: str
    jobs: tuple[Job, ...]
    layout: writers.Layout
    tokenizer: bool
    digest: str | None
    notes: tuple[str, ...]


def make_plan(model: _core.Model, container: str, mix: mixes.Mix, with_tokenizer: bool = True) -> Plan:
    """Decide everything about a conversion.

    Parameters
    ----------
    model : Model
    container : str
        ``apr`` or ``gguf``.
    mix : Mix
    with_tokenizer : bool, optional
        Carry the tokenizer over, if there is one.

    Raises
    ------
    CannotRun
        A GGUF of this architecture could not say what the model is.
    UnknownName, ArgumentError
        A pattern or a format of the mix does not fit.
    FormatError
        The tokenizer cannot be read, or the metadata are too large.
    """
    _check_sayable(model, container)
    weights = _distinct(model.weights)
    formats, instead = mixes.choose(mix, weights, container)
    notes = [*model.file.notes, *instead]
    jobs = tuple(_job(model, container, weight, its) for weight, its in zip(weights, formats, strict=True))
    words = _tokenizer_keys(model, container, notes) if with_tokenizer else {}
    digest = _tokenizer_digest(model.file, notes) if words else None
    if not words:
        why = "the source has no tokenizer" if with_tokenizer else "the tokenizer is left out"
        notes.append(f"{why}: prompts for the result must be given as ids")
    tensors, about = [job.tensor for job in jobs], _about(model.file, container, notes)
    if container == "apr":
        layout = writers.apr_layout(_apr_metadata(model, about) | words, tensors)
    else:
        said = _gguf_metadata(model, about, _file_type(model, mix, jobs))
        layout = writers.gguf_layout(said | (words or {GGUF_TOKENIZER + "model": NO_TOKENIZER}), tensors)
    return Plan(model, container, jobs, layout, bool(words), digest, tuple(notes))


def _check_sayable(model: _core.Model, container: str) -> None:
    """GGUF has no key for an architecture's options: other readers would not expect the tensors, and ours refuses them."""
    always, optional = next((row[2], row[3]) for row in _core.ARCHS if row[0] == model.arch)
    extra = sorted((model.flags & optional) - always - {"UNTIED"})
    if container == "gguf" and extra:
        what = "; ".join(text for name, text in _core.FLAGS if name in extra)
        raise CannotRun(
            f"{model.file.path}: this {model.arch} has {what} (attention_bias), which a GGUF cannot say: write an .apr",
            code="UNSUPPORTED", path=model.file.path, field="attention_bias",
        )  # fmt: skip


def _distinct(weights: Sequence[_core.WeightInfo]) -> list[_core.WeightInfo]:
    """Each tensor once: a shared head is not written."""
    first: dict[str, _core.WeightInfo] = {}
    for weight in weights:
        first.setdefault(weight.tensor, weight)
    return list(first.values())


def _job(model: _core.Model, container: str, weight: _core.WeightInfo, its: str) -> Job:
    """One weight in the target's spelling, format and order of rows."""
    gguf, hf = next((row[2], row[3]) for row in _core.WEIGHTS if row[0] == weight.name)
    name = gguf if container == "gguf" else hf
    name = name if weight.layer is None else name % weight.layer
    passed = its == weight.format
    return Job(weight, writers.Tensor(name, its, tuple(weight.shape)), _rows(model, container, weight, passed), passed)


def _rows(model: _core.Model, container: str, weight: _core.WeightInfo, passed: bool) -> NDArray[np.intp] | None:
    """Which row of the source goes to each row of the target; None where all stay."""
    if weight.name not in PAIRED:
        return None
    count, head = weight.shape[0], int(model.hparams["head"])
    target = _places((model.arch, container, INTERLEAVED) in _core.QUIRKS, count, head)
    source = _places(passed and _interleaved(model), count, head)
    rows = np.empty(count, np.intp)
    rows[target] = source
    return None if np.array_equal(rows, np.arange(count)) else rows


def _interleaved(model: _core.Model) -> bool:
    """Whether the rows of q and k lie in pairs: a quirk of the container, and in APR what ``rope_type`` says."""
    file = model.file
    return (model.arch, file.container, INTERLEAVED) in _core.QUIRKS or (file.container == "apr" and file.get("rope_type") == NEIGHBOURS)


def _places(interleaved: bool, count: int, head: int) -> NDArray[np.intp]:
    """In which row of the file each row of Hugging Face's order lies (``ap_weight_row_at`` of csrc/plan/model.h)."""
    n = np.arange(count)
    i, half = n % head, head // 2
    return n - i + np.where(i < half, 2 * i, 2 * (i - half) + 1) if interleaved else n


# ---- the keys --------------------------------------------------------------------------------------------------------------------------

ABOUT = ("name", "description", "author", "license", "version")
"""What both containers say about a model; a GGUF with ``general.`` before it."""

GENERAL = "general."
OWN_GGUF = ("architecture", "type", "file_type", "quantization_version", "alignment")
OWN_APR = (
    "architecture", "model_type", "hf_architecture", "hf_model_type", "original_format", "rope_type", "tie_word_embeddings",
    "attention_bias", "total_size", "param_count",
)  # fmt: skip
"""Keys about the file and not about the model, or that are written from the model as it was bound: each file has its own."""


def _said(file: _core.File) -> dict[str, Any]:
    """What the source says about the model besides hyper-parameters and tokenizer, without ``general.``."""
    if file.container == "gguf":
        found = {key.removeprefix(GENERAL): file.get(key) for key in file.keys if key.startswith(GENERAL)}
        return {key: value for key, value in found.items() if key not in OWN_GGUF}
    if file.container == "apr":
        own = {*OWN_APR, *(spelling for row in _core.HPARAMS for spelling in row[4].split())}
        own |= {key for key in file.keys if key.startswith(("tokenizer.", "quantization.", "sharding.")) or key == keys.APR_TEMPLATE}
        return {key: file.get(key) for key in file.keys if key not in own and file.get(key) is not None}
    said = file.get("_name_or_path")
    return {"name": Path(said).name} if isinstance(said, str) and said else {}


def _note_left_behind(names: Iterable[str], container: str, notes: list[str]) -> None:
    if names := sorted(names):
        notes.append(f"left behind, for want of such keys in {container}: {', '.join(names)}")


def _about(file: _core.File, container: str, notes: list[str]) -> dict[str, Any]:
    """What the target says about the model, between containers only what both have words for.

    A name there is always, that of the file or folder if need be.
    """
    said = _said(file)
    same = {name: value for name, value in said.items() if file.container == "gguf" or "." not in name}  # APR: a dot was an object
    kept = same if file.container == container else {name: said[name] for name in ABOUT if isinstance(said.get(name), str)}
    _note_left_behind(said.keys() - kept.keys(), container, notes)
    path = Path(file.path).resolve()
    return kept | {"name": kept.get("name") or (path.parent.name if path.stem.startswith("model") else path.stem)}


def _given(model: _core.Model) -> Iterator[tuple[tuple[str, str, str, str, str, str], int | float]]:
    """Rows of ``_core.HPARAMS`` with the model's values; a number is the shortest that is the same float32."""
    for row in _core.HPARAMS:
        value = model.hparams[row[0]]
        if value or row[5] == "REQUIRED":  # a context length that nobody gave is 0
            yield row, int(value) if row[1] == "INT" else _shortest(value)


def _shortest(value: float) -> float:
    return float(str(np.float32(value)))


def _gguf_metadata(model: _core.Model, about: Mapping[str, Any], file_type: int) -> dict[str, Any]:
    """The keys of a GGUF, in the order in which llama.cpp writes them."""
    said: dict[str, Any] = {"general.architecture": model.arch, "general.type": "model"}
    said |= {GENERAL + field: value for field, value in about.items()}
    said |= {"general.file_type": file_type, "general.quantization_version": 2}
    said |= {row[2].split()[0] % model.arch: value for row, value in _given(model)}
    key, head = next((row[2].split()[0] % model.arch, value) for row, value in _given(model) if row[0] == "head")
    said |= {key.replace("key_length", "value_length"): head, f"{model.arch}.rope.dimension_count": head}
    return said


def _apr_metadata(model: _core.Model, about: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of an APR."""
    its_class, optional = next((row[1], row[3]) for row in _core.ARCHS if row[0] == model.arch)
    said: dict[str, Any] = {"architecture": model.arch, "model_type": model.arch, "hf_architecture": its_class, **about}
    said["original_format"] = model.file.container
    for row, value in _given(model):
        said[row[4].split()[0]] = value
    said |= {"rope_type": HALVES, "tie_word_embeddings": model.tied}
    if optional - {"UNTIED"}:
        said["attention_bias"] = bool(model.flags & optional - {"UNTIED"})
    return said


GGUF_TOKENIZER, NO_TOKENIZER = "tokenizer.ggml.", "no_vocab"


def _tokenizer_keys(model: _core.Model, container: str, notes: list[str]) -> dict[str, Any]:
    """The tokenizer in the target's keys, empty if the source has none; between files of one kind they stay as they are."""
    file, vocab = model.file, int(model.hparams["vocab"])
    if file.container == "safetensors":
        folder = Path(file.path).parent
        return text.gguf_metadata(folder, vocab) if container == "gguf" else text.apr_metadata(folder, vocab)
    own = {key: file.get(key) for key in file.keys if key.startswith("tokenizer.") or key == keys.APR_TEMPLATE}
    if file.container == "gguf" and own.get(GGUF_TOKENIZER + "model", NO_TOKENIZER) == NO_TOKENIZER:
        return {}
    if file.container == container:
        return own
    known = {apr: keys.GGUF + key for key, apr in keys.APR.items()} | {keys.APR_TEMPLATE: keys.GGUF_TEMPLATE, keys.APR_SIZE: ""}
    _note_left_behind(own.keys() - set(known.values() if container == "apr" else known), container, notes)
    return text.apr_metadata(own) if container == "apr" else _gguf_spelled(own)


def _gguf_spelled(own: Mapping[str, Any]) -> dict[str, Any]:
    """APR's tokenizer keys as GGUF's; numbers for each token get GGUF's types."""
    said = {keys.GGUF + key: own[apr] for key, apr in keys.APR.items() if apr in own}
    if keys.GGUF + "tokens" not in said:
        return {}
    for key, dtype in (("token_type", np.int32), ("scores", np.float32)):
        if keys.GGUF + key in said:
            said[keys.GGUF + key] = np.asarray(said[keys.GGUF + key], dtype)
    return said | ({keys.GGUF_TEMPLATE: own[keys.APR_TEMPLATE]} if keys.APR_TEMPLATE in own else {})


def _tokenizer_digest(file: _core.File, notes: list[str]) -> str | None:
    """What decides the ids of the source's tokenizer; one that this package cannot read is carried over all the same, and that is noted."""
    try:
        found = text.for_model(file.path, file)
    except Error as problem:
        notes.append(f"the tokenizer goes over unread: {problem}")
        return None
    return found.digest if found else None


def _file_type(model: _core.Model, mix: mixes.Mix, jobs: Sequence[Job]) -> int:
    """``general.file_type``: that of the source if the formats stay, else that of the mix."""
    said = model.file.get("general.file_type") if model.file.container == "gguf" else None
    if isinstance(said, int) and all(job.passed for job in jobs):
        return said
    sizes: dict[str, int] = {}
    for job in jobs:
        if len(job.tensor.shape) > 1:
            sizes[job.tensor.format] = sizes.get(job.tensor.format, 0) + prod(job.tensor.shape)
    return mixes.gguf_file_type(mix, sizes)


# ---- the work --------------------------------------------------------------------------------------------------------------------------


def _pieces(plan: Plan, sums: dict[str, int]) -> Iterator[NDArray[np.uint8]]:
    """The bytes of each tensor in turn; their CRC32 is noted under the tensor's name."""
    for job in plan.jobs:
        data = np.ascontiguousarray(_passed(plan.model, job) if job.passed else _encoded(plan.model, job))
        sums[job.tensor.name] = zlib.crc32(data.data)
        yield data


def _passed(model: _core.Model, job: Job) -> NDArray[np.uint8]:
    raw = model.weight_raw(job.weight.name, job.weight.layer)
    return raw if job.rows is None else raw[job.rows]


def _encoded(model: _core.Model, job: Job) -> NDArray[np.uint8]:
    values = model.weight(job.weight.name, job.weight.layer)
    try:
        return _core.encode(job.tensor.format, values if job.rows is None else values[job.rows], pad=True)
    except Error as problem:
        where = f"{model.file.path}: {job.weight.tensor}"
        raise CannotRun(f"{where}: {problem}", code=problem.code, path=model.file.path, field=job.weight.tensor) from None


def carry_out(plan: Plan, path: Path, verify: bool, tell: Tell) -> list[dict[str, Any]]:
    """Write the file and check it; it takes its name only when it is right.

    Parameters
    ----------
    plan : Plan
    path : Path
    verify : bool
    tell : callable
        Is told the share done.

    Returns
    -------
    list of dict
        A row per tensor: name, source, from, to, shape, bytes_in, bytes_out, passed, crc32, relative_rms (None if not verified).

    Raises
    ------
    CannotRun
        Code CHANGED or LOSS: what was read back is not what was written, or lost more than rounding may.  The code of the encoder's error:
        values that a format cannot hold.
    OSError
    """
    sums: dict[str, int] = {}
    total = plan.layout.nbytes * (2 if verify else 1)
    with atomic.writing(path) as out:
        writers.write(out, plan.layout, _pieces(plan, sums), lambda done: tell(done / total))
        out.flush()
        losses = _verified(plan, out.name, path, sums, lambda done: tell((plan.layout.nbytes + done) / total)) if verify else {}
    return [
        {
            "name": job.tensor.name, "source": job.weight.tensor, "from": job.weight.format, "to": job.tensor.format,
            "shape": list(job.tensor.shape), "bytes_in": plan.model.weight_raw(job.weight.name, job.weight.layer).nbytes,
            "bytes_out": job.tensor.nbytes, "passed": job.passed, "crc32": sums[job.tensor.name],
            "relative_rms": losses.get(job.tensor.name),
        }
        for job in plan.jobs
    ]  # fmt: skip


# ---- the check -------------------------------------------------------------------------------------------------------------------------


def _verified(plan: Plan, written: str, final: Path, sums: Mapping[str, int], told: Callable[[int], None]) -> dict[str, float]:
    """Read the file as anybody would and hold it against the source; the relative RMS error of each tensor by its name."""
    try:
        file = _core.File(written)
        file.verify()
        back = _core.Model(file)
        tokenizer = text.for_model(written, file) if plan.digest or not plan.tokenizer else None
    except Error as problem:
        raise CannotRun(
            f"{final}: what was written cannot be read back, so it is not kept: {problem}",
            code=problem.code,
            path=str(final),
            field=problem.field,
        ) from None
    if file.notes or file.container != plan.container or file.nbytes != plan.layout.nbytes:
        found = f"{file.container} of {file.nbytes} bytes{''.join(f', {note}' for note in file.notes)}"
        raise _not_the_same(final, None, found, f"{plan.container} of {plan.layout.nbytes}")
    for what in ("arch", "flags", "hparams"):
        if getattr(back, what) != getattr(plan.model, what):
            raise _not_the_same(final, what, getattr(back, what), getattr(plan.model, what))
    if (tokenizer.digest if tokenizer else None) != plan.digest:
        raise _not_the_same(final, "tokenizer", tokenizer, plan.digest)
    losses, done = {}, 0
    for job in plan.jobs:
        losses[job.tensor.name] = _tensor_verified(plan, back, job, final, sums)
        done += job.tensor.nbytes
        told(done)
    return losses


def _tensor_verified(plan: Plan, back: _core.Model, job: Job, final: Path, sums: Mapping[str, int]) -> float:
    """Bytes by their CRC32, then values against the source's, both in Hugging Face order."""
    name = job.tensor.name
    crc = zlib.crc32(back.file.raw(name).data)
    if crc != sums[name]:
        raise _not_the_same(final, name, f"CRC32 {crc:08x}", f"{sums[name]:08x}")
    if job.passed and job.weight.name not in PAIRED:
        return 0.0
    place = job.weight.name, job.weight.layer
    error, peak, equal = _distance(plan.model.weight(*place), back.weight(*place))
    if job.passed and not equal:
        raise _not_the_same(final, name, f"values with relative RMS error {error:.3g}", "the same values: the rows are in another order")
    allowed = mixes.allowed_loss(job.tensor.format, peak)
    if not equal and not error <= allowed:
        raise CannotRun(
            f"{final}: {name}: {job.tensor.format} leaves a relative RMS error of {error:.3g} from {job.weight.format}, rounding explains "
            f"{allowed:.3g}: store it in another format (--formats …,{mixes.key(job.weight)}=FORMAT)",
            code="LOSS", path=str(final), field=name,
        )  # fmt: skip
    return error


def _not_the_same(final: Path, field: str | None, found: object, wanted: object) -> Exception:
    what = f"{field}: " if field else ""
    return CannotRun(
        f"{final}: {what}read back {found}, written was {wanted}; the file is not kept", code="CHANGED", path=str(final), field=field
    )


def _distance(wanted: NDArray[np.float32], found: NDArray[np.float32]) -> tuple[float, float, bool]:
    """RMS of the difference over RMS, largest magnitude over RMS, and whether all bits are equal."""
    a, b = wanted.reshape(-1), found.reshape(-1)
    if a.size != b.size:
        return float("inf"), 0.0, False
    square = missed = peak = 0.0
    equal = np.array_equal(a.view(np.uint32), b.view(np.uint32))
    with np.errstate(all="ignore"):  # what is not finite shows in the result
        for at in range(0, a.size, PIECE):
            x, y = a[at : at + PIECE], b[at : at + PIECE]
            missing = np.subtract(x, y, dtype=np.float64)
            missed += float(np.dot(missing, missing))
            square += float(np.einsum("i,i", x, x, dtype=np.float64))
            peak = max(peak, float(np.abs(x).max(initial=0.0)))
    rms = (square / a.size) ** 0.5 if a.size else 0.0
    if not rms:
        return (float("inf") if missed else 0.0), 0.0, equal
    return 0.0 if equal else (missed / square) ** 0.5, peak / rms, equal


# ---- before anything is touched --------------------------------------------------------------------------------------------------------


def check_place(out: Path, force: bool) -> None:
    """The target may be written; CannotRun if not."""
    if not out.parent.is_dir():
        raise _refused(out, f"the folder {out.parent} does not exist")
    if out.exists() and not out.is_file():
        raise _refused(out, "exists and is not a regular file", "NOT_REGULAR")
    if os.path.lexists(out) and not force:
        raise _refused(out, "exists; --force replaces it")


def check_apart(out: Path, parts: Sequence[str]) -> None:
    """Writing the target harms no file of the source; CannotRun if it does."""
    for place in (out, out.with_name(out.name + atomic.SUFFIX)):
        for part in parts:
            if place.exists() and place.samefile(part):
                raise _refused(out, f"writing it would destroy the source, {part}: give OUT another name")


def _refused(out: Path, why: str, code: str = "PATH") -> CannotRun:
    return CannotRun(f"{out}: {why}", code=code, path=str(out))


def check_room(out: Path, needed: int) -> None:
    """The disk has room for the whole file, what it replaces goes only afterwards; CannotRun if not."""
    disk = os.statvfs(out.parent)
    free = disk.f_bavail * disk.f_frsize
    if needed > free:
        raise CannotRun(
            f"{out}: {needed:,} bytes are needed ({needed / 1e9:.2f} GB), {free:,} are free in {out.parent} ({free / 1e9:.2f} GB)",
            code="LIMIT", path=str(out),
        )  # fmt: skip
