"""Our own engine as a side: captures, weights as the file holds them, and greedy text.

Owns the way from a model file to :class:`~aprender.captures.Captures`: chunks for long prompts and their joining, path attestation, and
the application of edits, on the CPU or a GPU.  An edit is plain data (a step field, a weight or a value, and what becomes of it;
``judge/faults.py`` lists the forms); this file applies edits and knows no fault.  Refuses to run on another device than the one asked for.
Called by ``sides.open_side``, ``bisection`` and the commands.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprender import _core, arithmetic, stages
from aprender.captures import Captures
from aprender.errors import ArgumentError, ConfigError, DeviceError, FormatError, UnknownName
from aprender.manifest import ALL, LAST, Manifest, TensorNote
from aprender.pieces import Piece, cached, cuts, ending, part, whole
from aprender.stages import LOGITS, Key
from aprender.text import Tokenizer, for_model

Array = NDArray[np.float32]
Edit = Mapping[str, Any]
Sizes = Mapping[str, int | float]

PROFILES: Mapping[str, str] = {"cpu": "exact", "cuda": "exact-cuda"}
"""Backend to the arithmetic that it declares."""

TABLE: Key = ("rope_table", None)

LARGEST_SCORES = 1 << 26
"""Values of one layer's attention scores in one piece; longer prompts are run in chunks, with the same bits."""


class Weights(Mapping[Key, Array]):
    """The weights of a bound model: (name, layer) to float32 [out, in], Hugging Face lane order, decoded when asked for and not kept."""

    def __init__(self, model: _core.Model) -> None:
        self._model = model
        self._keys = tuple((info.name, info.layer) for info in model.weights)
        self._known = frozenset(self._keys)

    def __getitem__(self, key: Key) -> Array:
        if key not in self._known:
            raise KeyError(key)
        return self._model.weight(*key)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


TURNED: Mapping[str, str] = {"attn_q": "heads", "attn_k": "kv_heads"}
"""Weights whose rows the one quirk there is (``ROPE_PAIRS``) has as neighbours (2i, 2i + 1) of a head, and how many heads they have."""


class Stored(Mapping[Key, tuple[str, NDArray[np.uint8]]]):
    """What the file holds of each matrix: (name, layer) to its number format and bytes, one row per weight row, Hugging Face lane order."""

    def __init__(self, model: _core.Model) -> None:
        self._model = model
        self._formats = {(info.name, info.layer): info.format for info in model.weights if len(info.shape) == 2}

    def __getitem__(self, key: Key) -> tuple[str, NDArray[np.uint8]]:
        raw: NDArray[np.uint8] = self._model.weight_raw(*key)
        if self._model.quirks and key[0] in TURNED:
            heads = int(self._model.hparams[TURNED[key[0]]])
            raw = raw.reshape(heads, -1, 2, raw.shape[1]).swapaxes(1, 2).reshape(raw.shape)
        return self._formats[key], raw

    def __iter__(self) -> Iterator[Key]:
        return iter(self._formats)

    def __len__(self) -> int:
        return len(self._formats)


# ---- edits ---------------------------------------------------------------------------------------------------------------------------


def _reread_transposed(weight: Array, edit: Edit, size: Sizes) -> Array:
    """The same bytes of a [out, in] matrix, read as if they were stored [in, out]."""
    rows, cols = weight.shape
    return np.ascontiguousarray(weight.reshape(cols, rows).T)


def _as_pairs(weight: Array, edit: Edit, size: Sizes) -> Array:
    """The rows of each group of ``size``: its two halves interleaved."""
    rows = int(size[edit["size"]])
    return weight.reshape(-1, 2, rows // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _one_block(weight: Array, edit: Edit, size: Sizes) -> Array:
    """One block of 32 in the middle row: scaled."""
    out, row, col = weight.copy(), len(weight) // 2, weight.shape[1] // 64 * 32
    out[row, col : col + 32] *= np.float32(edit["factor"])
    return out


def _first_scale(weight: Array, edit: Edit, size: Sizes) -> Array:
    """Every 32 columns rescaled so that their largest value is that of the first 32 of their 256."""
    out = weight.copy()
    for first in range(0, weight.shape[1], 256):
        lead = np.abs(weight[:, first : first + 32]).max(axis=1, keepdims=True)
        for col in range(first + 32, min(first + 256, weight.shape[1]), 32):
            top = np.abs(weight[:, col : col + 32]).max(axis=1, keepdims=True)
            out[:, col : col + 32] *= np.where(top > 0, lead / np.where(top > 0, top, 1), 1)
    return out


def _cut(axis: int) -> Callable[[Array, Edit, Sizes], Array]:
    """Zero behind a share of the rows (0) or columns (1)."""

    def cut(weight: Array, edit: Edit, size: Sizes) -> Array:
        out = weight.copy()
        end = int(weight.shape[axis] * edit["share"])
        out[(slice(None),) * axis + (slice(end, None),)] = 0
        return out

    return cut


TRANSFORMS: Mapping[str, Callable[[Array, Edit, Sizes], Array]] = {
    "same": lambda weight, edit, size: weight,
    "transposed": _reread_transposed,
    "zero": lambda weight, edit, size: np.zeros_like(weight),
    "scaled": lambda weight, edit, size: weight * np.float32(edit["factor"]),
    "plus": lambda weight, edit, size: weight + np.float32(edit["value"]),
    "pairs": _as_pairs,
    "block": _one_block,
    "first-scale": _first_scale,
    "cut-columns": _cut(1),
    "cut-rows": _cut(0),
}
"""What an edit may do to a weight."""


def _short(keep: int) -> Callable[[Array, Edit, Sizes, Array], Array]:
    """Nearest values whose mantissa has ``keep`` bits after the leading one."""

    def shortened(value: Array, edit: Edit, size: Sizes, table: Array) -> Array:
        bits, drop = value.view(np.uint32), np.uint32(23 - keep)
        half = (np.uint32(1) << (drop - np.uint32(1))) - np.uint32(1) + (bits >> drop & np.uint32(1))
        return ((bits + half) >> drop << drop).view(np.float32)

    return shortened


def _last_row_stale(value: Array, edit: Edit, size: Sizes, table: Array) -> Array:
    """The last row is the one before it."""
    return np.concatenate([value[:-1], value[-2:-1] if len(value) > 1 else value])


def _head_lost(value: Array, edit: Edit, size: Sizes, table: Array) -> Array:
    """One head's columns are zero."""
    out, width = value.copy(), int(size["head"])
    out[:, edit["head"] * width : (edit["head"] + 1) * width] = 0
    return out


def _not_a_number(value: Array, edit: Edit, size: Sizes, table: Array) -> Array:
    """The first element of the last row is NaN."""
    out = value.copy()
    out[-1, 0] = np.nan
    return out


def _rotated(value: Array, edit: Edit, size: Sizes, table: Array) -> Array:
    """The new rows of a cache, rotated by a table of cosines and sines."""
    fresh, half = value[-len(table) :], table.shape[1] // 2
    pairs = fresh.reshape(len(fresh), -1, 2, half)
    cos, sin = table[:, None, :half], table[:, None, half:]
    turned = np.stack([pairs[:, :, 0] * cos - pairs[:, :, 1] * sin, pairs[:, :, 1] * cos + pairs[:, :, 0] * sin], axis=2)
    return np.concatenate([value[: -len(table)], turned.reshape(fresh.shape)])


VALUES: Mapping[str, Callable[[Array, Edit, Sizes, Array], Array]] = {
    "float16": lambda value, edit, size, table: value.astype(np.float16).astype(np.float32),
    "bfloat16": _short(7),
    "stale-row": _last_row_stale,
    "first-row": lambda value, edit, size, table: np.repeat(value[:1], len(value), axis=0),
    "lost-head": _head_lost,
    "nan": _not_a_number,
    "rotated": _rotated,
}
"""What an edit may do to the value of a stage."""


def _step_edits(edits: Sequence[Edit], plan: Sequence[Mapping[str, Any]]) -> list[tuple[str, int | None, str, float]]:
    """Edits of step fields as the core takes them; a factor multiplies the value that the plan holds, an origin names a step."""
    out = []
    for edit in (edit for edit in edits if edit["target"] in ("step", "input")):
        hit = [step for step in plan if step["stage"] == edit["stage"] and edit.get("layer") in (None, step["layer"])]
        if not hit:
            raise ArgumentError(f"the edit of {edit['stage']} in layer {edit.get('layer')} fits no step of this model", code="ARGUMENT")
        for step in hit:
            if edit["target"] == "input":
                value = _origin(edit["origin"], step["layer"], plan)
            else:
                value = edit["value"] if "value" in edit else step[edit["field"]] * edit["factor"]
            out.append((step["stage"], step["layer"], edit["field"], float(value)))
    return out


def _switches(edit: Edit) -> bool:
    """Whether an edit of the plan or of a weight applies in some pieces only.  (Edits of values have a rule of their own.)"""
    return "when" in edit and edit["target"] in ("step", "weight")


def _when(edits: Sequence[Edit]) -> str | None:
    """In which pieces the edits apply that do not apply in all; there is one such rule per side."""
    rules = sorted({edit["when"] for edit in edits if _switches(edit)})
    if len(rules) > 1 or not set(rules) <= set(WHEN):
        raise ArgumentError(f"edits apply when {', '.join(rules)}: one of {', '.join(WHEN)} is needed", code="ARGUMENT", field="when")
    return rules[0] if rules else None


def _origin(origin: Sequence[str], layer: int | None, plan: Sequence[Mapping[str, Any]]) -> int:
    """The step that a stage of the layer is (``out``), or that it reads (``a``, ``b``)."""
    stage, which = origin
    for place, step in enumerate(plan):
        if (step["stage"], step["layer"]) == (stage, layer):
            return place if which == "out" else int(step[which])
    raise ArgumentError(f"this model has no {stage} in layer {layer} to read from", code="ARGUMENT")


def _weight_edits(edits: Sequence[Edit], weights: Weights, size: Sizes) -> dict[Key, Array]:
    """Edits of weights as arrays to put in their places; an origin is read as the file holds it."""
    out: dict[Key, Array] = {}
    for edit in (edit for edit in edits if edit["target"] == "weight"):
        keys = [key for key in weights if key[0] == edit["weight"] and edit.get("layer") in (None, key[1])]
        if not keys:
            raise ArgumentError(f"the edit of {edit['weight']} in layer {edit.get('layer')} fits no weight of this model", code="ARGUMENT")
        for key in keys:
            source = (
                out[key] if key in out and "origin" not in edit else weights[edit.get("origin", key[0]), edit.get("origin_layer", key[1])]
            )
            out[key] = np.ascontiguousarray(TRANSFORMS[edit["transform"]](source, edit, size), np.float32)
    return out


def _handed_out(
    edits: Sequence[Edit], arrays: dict[Key, Array], notes: dict[Key, TensorNote]
) -> tuple[dict[Key, Array], dict[Key, TensorNote]]:
    """Edits of what is shown: another stage instead, or the last token only, said or not."""
    arrays, notes = dict(arrays), dict(notes)
    for edit in edits:
        key = edit["stage"], edit["layer"]
        if edit["target"] != "capture" or key not in arrays:
            continue
        if edit["transform"] == "instead":
            arrays[key] = arrays[edit["origin"], edit["layer"]]
            notes[key] = dataclasses.replace(notes[key], capture_point=edit["point"])
        else:
            arrays[key] = arrays[key][-1:]
            notes[key] = dataclasses.replace(notes[key], shape=arrays[key].shape, positions=LAST if edit.get("said") else ALL)
    return arrays, notes


WHEN: Mapping[str, Callable[[int, int], bool]] = {
    "single": lambda position, tokens: tokens == 1,
    "later": lambda position, tokens: position > 0,
}
"""In which pieces of a prompt an edit applies (``"when"``), by the piece's first position and length; in all of them without it."""


class Switched:
    """A timeline whose edits apply in some pieces only: an edited run and a plain one, of which each piece is computed by one.

    The other one follows with the keys and values of the first in its cache, so that both are at the same place with the same past.
    """

    def __init__(self, plain: _core.Run, edited: _core.Run, when: str) -> None:
        self._plain, self._edited, self._applies = plain, edited, WHEN[when]
        caches = [key for key in stages.keys(plain.model.flags, int(plain.model.hparams["layers"])) if stages.stage(key[0]).shape[0] == "J"]
        self._caches = tuple(caches)
        self.tier = plain.tier

    def forward(self, tokens: Sequence[int], keep: Sequence[Key], feed: Mapping[Key, Array]) -> dict[Key, Array]:
        """Like ``_core.Run.forward``."""
        applies = self._applies(self._plain.position, len(tokens))
        first, other = (self._edited, self._plain) if applies else (self._plain, self._edited)
        made = first.forward(tokens, list(dict.fromkeys([*keep, *self._caches])), feed)
        other.forward(tokens, self._caches, {key: made[key] for key in self._caches})
        return {key: value for key, value in made.items() if key in set(keep)}


# ---- the side ------------------------------------------------------------------------------------------------------------------------


class OwnSide:
    """Our engine on one model.

    Parameters
    ----------
    path : str or Path
        GGUF file, safetensors file, or a folder with ``model.safetensors`` and ``config.json``.
    backend : str
        ``cpu`` or ``cuda``; :class:`~aprender.errors.DeviceError` where its library or its device is not there.
    threads : int, optional
        All cores if not given (or ``APRENDER_THREADS``).
    tier : str, optional
        A row of ``_core.TIERS``; the best one if not given (or ``APRENDER_TIER``).
    mode : str, optional
        How ``cuda`` is driven: ``auto``, ``eager`` or ``checked`` (``_core.Run``).
    edits : sequence of mapping
        ``{"target": "step", "stage": …, "layer": … or None, "field": …, "value" or "factor": …}``,
        ``{"target": "weight", "weight": …, "layer": … or None, "transform": a key of TRANSFORMS}`` and the others that
        ``judge/faults.py`` lists.  An edit of a step or weight with ``"when"``, a key of WHEN, applies in such pieces only; all that
        have one have the same.
    spelling : str, optional
        How the user wrote it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        backend: str = "cpu",
        threads: int | None = None,
        tier: str | None = None,
        mode: str | None = None,
        edits: Sequence[Edit] = (),
        spelling: str | None = None,
    ) -> None:
        if backend not in PROFILES:
            raise UnknownName(f"there is no backend '{backend}', one of {', '.join(PROFILES)} is needed", code="LOOKUP", field="backend")
        _check_device(backend)
        self.path = Path(path)
        self.spelling = spelling or str(path)
        self.backend = backend
        self.profile = arithmetic.profile(PROFILES[backend])
        self.file = _core.File(path)
        self.model = _core.Model(self.file)
        self.weights = Weights(self.model)
        self._options: dict[str, Any] = {"threads": threads or _threads_from_environment(), "tier": tier or os.environ.get("APRENDER_TIER")}
        self._options |= {"backend": backend, "mode": mode}
        self._anchor = None if backend == "cpu" else _core.Run(self.model, **self._options)  # one upload of the weights for all runs
        self._when = _when(edits)
        always = [edit for edit in edits if not _switches(edit)]
        plan = _core.Run(self.model).plan() if edits else ()
        size = self.model.hparams
        self._edits, self._overrides = _step_edits(always, plan), _weight_edits(always, self.weights, size)
        self._more = (_step_edits(edits, plan), _weight_edits(edits, self.weights, size)) if self._when else None
        self._shown = [edit for edit in edits if edit["target"] in ("capture", "positions")]
        self._values = sorted((e for e in edits if e["target"] == "value"), key=lambda e: stages.order((e["stage"], e["layer"])))
        self._piece = min((int(edit["value"]) for edit in edits if edit["target"] == "pieces"), default=0)

    def run(self, mode: str | None = None) -> _core.Run:
        """A fresh timeline of the model, with the edits applied that apply everywhere; in another mode than the side's, if given."""
        options = self._options | ({"mode": mode} if mode else {})
        return _core.Run(self.model, **options, edits=self._edits, overrides=self._overrides)

    def forward(
        self, run: _core.Run | Switched, ids: Sequence[int], keep: Sequence[Key], given: Mapping[Key, Array] | None = None
    ) -> dict[Key, Array]:
        """The next tokens of a timeline: what is kept, with values put in before anything reads them: edited ones, and those given."""
        feed = dict(given or {})
        if not self._values:
            return run.forward(ids, keep, feed)
        if isinstance(run, Switched):
            raise ArgumentError(
                "edits of values and edits that apply in some pieces only do not go together", code="ARGUMENT", field="when"
            )
        for edit in self._values:
            key, table = (edit["stage"], edit["layer"]), (edit.get("by", edit["stage"]), None if "by" in edit else edit["layer"])
            if (edit.get("when") == "decode" and run.position == 0) or key in (given or {}):
                continue
            made = run.replay(ids, list({key, table}), feed)
            feed[key] = np.ascontiguousarray(VALUES[edit["transform"]](made[key], edit, self.model.hparams, made[table]))
        return run.forward(ids, keep, feed)

    def pieces(self, tokens: int) -> list[tuple[int, int]]:
        """How a prompt of so many tokens is cut: first and last token of each piece."""
        if self._piece:
            return [(first, min(first + self._piece, tokens)) for first in range(0, tokens, self._piece)]
        return list(_chunks(tokens, int(self.model.hparams["heads"])))

    def _timeline(self, mode: str | None = None) -> _core.Run | Switched:
        """A fresh timeline with all edits applied, each where it applies."""
        if self._when is None or self._more is None:
            return self.run(mode)
        edited = _core.Run(self.model, **self._options | ({"mode": mode} if mode else {}), edits=self._more[0], overrides=self._more[1])
        return Switched(self.run(mode), edited, self._when)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the model file, hexadecimal, as ``sha256sum`` prints it; of several files, that of their digests one a line."""
        digests = []
        for path in self.file.parts:
            with open(path, "rb") as stream:
                digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
        return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def model_data(self) -> dict[str, Any]:
        """What the file holds, for the judge: ``arch``, ``flags``, ``hparams``, ``weights`` (never the edited ones), ``stored``."""
        model = self.model
        held = {"arch": model.arch, "flags": model.flags, "hparams": model.hparams}
        return held | {"weights": self.weights, "stored": Stored(model)}

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer | None:
        return for_model(self.path, self.file)

    def tokenizer(self) -> Tokenizer | None:
        """The container's own tokenizer; None if it has none."""
        return self._tokenizer

    def capture(
        self, ids: Sequence[int], keep: stages.Selection | None = None, progress: Callable[[float], None] | None = None
    ) -> Captures:
        """Run the ids from position 0 and hand out the selected stages (all if not given).

        Parameters
        ----------
        ids : sequence of int
        keep : callable, optional
            (stage, layer) to bool.
        progress : callable, optional
            Called with the share done, 0..1.

        Raises
        ------
        ArgumentError
            No ids, or one outside the vocabulary.
        """
        wanted = [key for key in stages.keys(self.model.flags, int(self.model.hparams["layers"])) if keep is None or keep(key)]
        found, ran = self._traced(ids, [(cut, wanted) for cut in self.pieces(len(ids))], progress)
        return self._seen(whole(found, self._manifest(ids, ran, self._attested(ids, found, self.logits))))

    def capture_fed(self, ids: Sequence[int], feed: Mapping[Key, Array]) -> Captures:
        """All stages of the ids with the values of some of them given: what the engine makes of those is what is shown after them."""
        wanted = stages.keys(self.model.flags, int(self.model.hparams["layers"]))
        found, ran = self._traced(ids, [(cut, wanted) for cut in self.pieces(len(ids))], feed=feed)
        return self._seen(whole(found, self._manifest(ids, ran, None)))

    def _seen(self, made: Captures) -> Captures:
        """What is handed out of a capture, with the edits of that."""
        if not self._shown:
            return made
        arrays, notes = _handed_out(self._shown, dict(made), made.manifest.tensors)
        start = sum(int(edit["value"]) for edit in self._shown if edit["target"] == "positions")
        positions = tuple(range(start, start + len(made.tokens)))
        return Captures(arrays, dataclasses.replace(made.manifest, tensors=notes, positions=positions))

    def capture_pieces(self, ids: Sequence[int], sizes: Sequence[int]) -> Captures:
        """Run the ids in pieces of the given sizes on one cache, and hand out all stages as one sequence, with the pieces kept.

        Parameters
        ----------
        ids : sequence of int
        sizes : sequence of int
            Tokens of each piece; together as many as there are ids.

        Raises
        ------
        ArgumentError
            The sizes do not cut up the ids.
        """
        wanted = stages.keys(self.model.flags, int(self.model.hparams["layers"]))
        found, ran = self._traced(ids, [(cut, wanted) for cut in cuts(sizes, len(ids))])
        plain = functools.partial(self._logits, at=cuts(sizes, len(ids)))
        return whole(found, self._manifest(ids, ran, None if self.backend == "cpu" else self._attested(ids, found, plain)))

    def _attested(self, ids: Sequence[int], found: Sequence[Piece], plain: Callable[[Sequence[int]], Array]) -> bool | None:
        """Whether the logits are the same bits when nothing else is kept; and, where a graph ran, when its kernels are run one by one."""
        if any(LOGITS not in piece.arrays for piece in found):
            return None
        shown = np.concatenate([piece.arrays[LOGITS] for piece in found])
        same = bool(np.array_equal(shown, plain(ids), equal_nan=True))
        if self.backend == "cpu" or not any(piece.last - piece.first == 1 for piece in found):
            return same
        eager = self._logits(ids, [(piece.first, piece.last) for piece in found], "eager")
        return same and bool(np.array_equal(shown, eager, equal_nan=True))

    def capture_end(self, ids: Sequence[int], count: int) -> Captures:
        """All stages of the last ``count`` ids, run on the cache of those before; of these, what their keys and values are made from.

        Memory grows with the length and not with its square: that is what it is for.
        """
        flags, layers = self.model.flags, int(self.model.hparams["layers"])
        first, last = cuts([len(ids) - count, count], len(ids))
        past = cached(flags, layers)
        found, ran = self._traced(ids, [*((cut, past) for cut in self.pieces(first[1])), (last, stages.keys(flags, layers))])
        return ending(found, self._manifest(ids, ran, None))

    def rotary_table(self, positions: Sequence[int]) -> Captures:
        """The rows of the rotary table at any positions: a capture of that one stage, computed as a run computes it."""
        (shift,) = (step["pos_shift"] for step in self.run().plan() if step["stage"] == TABLE[0])
        rows = []
        for position in positions:
            edits = [*self._edits, (*TABLE, "pos_shift", float(shift + position))]
            run = _core.Run(self.model, **self._options, edits=edits, overrides=self._overrides)
            rows.append(self.forward(run, [0], [TABLE])[TABLE])
        made = self._manifest((0,) * len(rows), (run.tier,), None)
        return Captures({TABLE: np.concatenate(rows)}, dataclasses.replace(made, positions=tuple(positions)))

    def _traced(
        self,
        ids: Sequence[int],
        parts: Sequence[tuple[tuple[int, int], Sequence[Key]]],
        progress: Callable[[float], None] | None = None,
        feed: Mapping[Key, Array] | None = None,
    ) -> tuple[list[Piece], tuple[str, ...]]:
        """The parts of a sequence, each with the stages that are wanted of it, on one timeline.

        And what ran: tier or device, then what each kind of part was, where a device has several ways.
        """
        run = self._timeline()
        pieces: list[Piece] = []
        paths: dict[str, int] = {}
        for (first, last), wanted in parts:
            given = {key: part(array, key, first, last) for key, array in (feed or {}).items()}
            pieces.append(Piece(first, last, self.forward(run, ids[first:last], wanted, given)))
            if isinstance(run, _core.Run) and run.path is not None:
                path = f"{last - first} token{'s'[: last - first > 1]}: {run.path}"
                paths[path] = paths.get(path, 0) + 1
            if progress:
                progress(last / len(ids))
        if not pieces:
            raise ArgumentError("no tokens: give at least one", code="ARGUMENT", field="tokens")
        return pieces, (run.tier, *(f"{count} times {path}" if count > 1 else path for path, count in paths.items()))

    def _manifest(self, ids: Sequence[int], ran: Sequence[str], attested: bool | None) -> Manifest:
        from aprender import __version__

        return Manifest(
            side=self.spelling,
            tokens=tuple(int(i) for i in ids),
            producer="aprender",
            version=__version__,
            backend=self.backend,
            tier=ran[0],
            profile=self.profile.name,
            threads=self._options["threads"],
            model_digest=self.digest,
            arch=self.model.arch,
            flags=self.model.flags,
            hparams=dict(self.model.hparams),
            attestation=attested,
            notes=(f"{self.spelling} ran on {ran[0]}: {'; '.join(ran[1:])}",) if ran[1:] else (),
        )

    def logits(self, ids: Sequence[int], prompt: int | None = None) -> Array:
        """Logits of every position, [T, V], by the path that makes the text: nothing else is kept.

        Parameters
        ----------
        ids : sequence of int
        prompt : int, optional
            After so many tokens the others come one by one; if not given, all come at once.
        """
        prompt = len(ids) if prompt is None else prompt
        return self._logits(ids, [*self.pieces(prompt), *((at, at + 1) for at in range(prompt, len(ids)))])

    def _logits(self, ids: Sequence[int], at: Sequence[tuple[int, int]], mode: str | None = None) -> Array:
        run = self._timeline(mode)
        parts = [self.forward(run, ids[first:last], [LOGITS])[LOGITS] for first, last in at]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def generate(self, ids: Sequence[int], n: int, on_token: Callable[[int], None] | None = None) -> list[int]:
        """Greedy continuation of the ids: at most ``n`` tokens, the end-of-text token not included.

        Parameters
        ----------
        ids : sequence of int
        n : int
        on_token : callable, optional
            Called with each token as it comes.
        """
        if not ids:
            raise ArgumentError("the prompt is empty: a forward pass needs at least one token", code="ARGUMENT", field="prompt")
        stop = self._stop()
        run = self._timeline()
        last: Array | None = None
        for first, end in self.pieces(len(ids)):
            last = self.forward(run, ids[first:end], [LOGITS])[LOGITS]
        out: list[int] = []
        while last is not None and len(out) < n:
            token = int(np.argmax(last[-1]))
            if token in stop:
                break
            out.append(token)
            if on_token:
                on_token(token)
            if len(out) < n:
                last = self.forward(run, [token], [LOGITS])[LOGITS]
        return out

    def _stop(self) -> frozenset[int]:
        """Ids that end a text; none where the tokenizer is missing or cannot be read, for ids alone need none."""
        try:
            tokenizer = self.tokenizer()
        except (ConfigError, FormatError):
            return frozenset()
        return frozenset(tokenizer.eos_ids) if tokenizer else frozenset()

    def close(self) -> None:
        """The device's copy of the weights goes with the last run; arrays may still be in use."""
        self._anchor = None


def _check_device(backend: str) -> None:
    """A device that cannot be used is told before a large file is read for nothing."""
    said = _core.cuda() if backend != "cpu" else None
    if said is not None and said["reason"] is not None:
        text = f"cuda: there is no device to use: {said['reason']}; use cpu:" if said["built"] else said["reason"]
        raise DeviceError(text, code="DEVICE", field=backend)


def _threads_from_environment() -> int | None:
    text = os.environ.get("APRENDER_THREADS")
    if text is None:
        return None
    if not text.isdigit() or int(text) < 1:
        raise ArgumentError(f"APRENDER_THREADS is '{text}', a positive number is needed", code="ARGUMENT", field="APRENDER_THREADS")
    return int(text)


def _chunks(tokens: int, heads: int) -> Iterator[tuple[int, int]]:
    """Cut a prompt so that heads x chunk x keys stays under the limit."""
    first = 0
    while first < tokens:
        last = tokens
        while last - first > 1 and heads * (last - first) * last > LARGEST_SCORES:
            last = first + (last - first) // 2
        yield first, last
        first = last
