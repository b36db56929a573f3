"""Our own engine as a side: captures, weights as the file holds them, and greedy text.

Owns the way from a model file to :class:`~aprender.captures.Captures`: chunks for long prompts and their joining, path attestation, and
the application of edits.  An edit is plain data (a step field, a weight or a value, and what becomes of it; ``judge/faults.py`` lists the
forms); this file applies edits and knows no fault.  Refuses backends that are not built in: there is no silent fallback.  Called by
``sides.open_side``, ``bisection`` and the commands.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprender import _core, arithmetic, stages
from aprender.captures import Captures
from aprender.errors import ArgumentError, ConfigError, DeviceError, FormatError
from aprender.manifest import ALL, LAST, Manifest, TensorNote
from aprender.stages import LOGITS, Key
from aprender.text import Tokenizer, for_model

Array = NDArray[np.float32]
Edit = Mapping[str, Any]
Sizes = Mapping[str, int | float]

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

    def forward(self, tokens: Sequence[int], keep: Sequence[Key]) -> dict[Key, Array]:
        """Like ``_core.Run.forward``."""
        applies = self._applies(self._plain.position, len(tokens))
        first, other = (self._edited, self._plain) if applies else (self._plain, self._edited)
        made = first.forward(tokens, list(dict.fromkeys([*keep, *self._caches])))
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
        ``cpu``; another one that is not built in raises :class:`~aprender.errors.DeviceError`.
    threads : int, optional
        All cores if not given (or ``APRENDER_THREADS``).
    tier : str, optional
        A row of ``_core.TIERS``; the best one if not given (or ``APRENDER_TIER``).
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
        edits: Sequence[Edit] = (),
        spelling: str | None = None,
    ) -> None:
        if backend != "cpu":
            raise DeviceError(f"this build has no '{backend}' backend; use cpu:", code="DEVICE", field=backend)
        self.path = Path(path)
        self.spelling = spelling or str(path)
        self.backend = backend
        self.profile = arithmetic.profile("exact")
        self.file = _core.File(path)
        self.model = _core.Model(self.file)
        self.weights = Weights(self.model)
        self._options: dict[str, Any] = {"threads": threads or _threads_from_environment(), "tier": tier or os.environ.get("APRENDER_TIER")}
        self._when = _when(edits)
        always = [edit for edit in edits if not _switches(edit)]
        plan = _core.Run(self.model).plan() if edits else ()
        size = self.model.hparams
        self._edits, self._overrides = _step_edits(always, plan), _weight_edits(always, self.weights, size)
        self._more = (_step_edits(edits, plan), _weight_edits(edits, self.weights, size)) if self._when else None
        self._shown = [edit for edit in edits if edit["target"] in ("capture", "positions")]
        self._values = sorted((e for e in edits if e["target"] == "value"), key=lambda e: stages.order((e["stage"], e["layer"])))
        self._piece = min((int(edit["value"]) for edit in edits if edit["target"] == "pieces"), default=0)

    def run(self) -> _core.Run:
        """A fresh timeline of the model, with the edits applied that apply everywhere."""
        return _core.Run(self.model, **self._options, edits=self._edits, overrides=self._overrides)

    def forward(self, run: _core.Run | Switched, ids: Sequence[int], keep: Sequence[Key]) -> dict[Key, Array]:
        """The next tokens of a timeline: what is kept, with the edits of values put in before anything reads them."""
        if not self._values:
            return run.forward(ids, keep)
        if isinstance(run, Switched):
            raise ArgumentError(
                "edits of values and edits that apply in some pieces only do not go together", code="ARGUMENT", field="when"
            )
        feed: dict[Key, Array] = {}
        for edit in self._values:
            if edit.get("when") == "decode" and run.position == 0:
                continue
            key, table = (edit["stage"], edit["layer"]), (edit.get("by", edit["stage"]), None if "by" in edit else edit["layer"])
            made = run.replay(ids, list({key, table}), feed)
            feed[key] = np.ascontiguousarray(VALUES[edit["transform"]](made[key], edit, self.model.hparams, made[table]))
        return run.forward(ids, keep, feed)

    def pieces(self, tokens: int) -> list[tuple[int, int]]:
        """How a prompt of so many tokens is cut: first and last token of each piece."""
        if self._piece:
            return [(first, min(first + self._piece, tokens)) for first in range(0, tokens, self._piece)]
        return list(_chunks(tokens, int(self.model.hparams["heads"])))

    def _timeline(self) -> _core.Run | Switched:
        """A fresh timeline with all edits applied, each where it applies."""
        if self._when is None or self._more is None:
            return self.run()
        edited = _core.Run(self.model, **self._options, edits=self._more[0], overrides=self._more[1])
        return Switched(self.run(), edited, self._when)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the model file, hexadecimal, as ``sha256sum`` prints it; of several files, that of their digests one a line."""
        digests = []
        for part in self.file.parts:
            with open(part, "rb") as stream:
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
        arrays, tier = self._traced(ids, wanted, self.pieces(len(ids)), progress)
        last = arrays.get(LOGITS)
        attested = None if last is None else bool(np.array_equal(last, self.logits(ids), equal_nan=True))
        manifest = self._manifest(ids, tier, attested, arrays)
        if self._shown:
            arrays, notes = _handed_out(self._shown, arrays, manifest.tensors)
            start = sum(int(edit["value"]) for edit in self._shown if edit["target"] == "positions")
            manifest = dataclasses.replace(manifest, tensors=notes, positions=tuple(range(start, start + len(ids))))
        return Captures(arrays, manifest)

    def capture_pieces(self, ids: Sequence[int], sizes: Sequence[int]) -> Captures:
        """Run the ids in pieces of the given sizes on one cache, and hand out all stages as one sequence: joined along the tokens.

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
        if sum(sizes) != len(ids) or min(sizes, default=0) < 1:
            raise ArgumentError(f"pieces of {list(sizes)} tokens do not cut up {len(ids)} tokens", code="ARGUMENT", field="sizes")
        ends = np.cumsum(sizes).tolist()
        wanted = stages.keys(self.model.flags, int(self.model.hparams["layers"]))
        arrays, tier = self._traced(ids, wanted, zip([0, *ends[:-1]], ends, strict=True), None)
        return Captures(arrays, self._manifest(ids, tier, None, arrays))

    def _traced(
        self, ids: Sequence[int], wanted: Sequence[Key], cuts: Iterable[tuple[int, int]], progress: Callable[[float], None] | None
    ) -> tuple[dict[Key, Array], str]:
        run = self._timeline()
        pieces = []
        for first, last in cuts:
            pieces.append(self.forward(run, ids[first:last], wanted))
            if progress:
                progress(last / len(ids))
        if not pieces:
            raise ArgumentError("no tokens: give at least one", code="ARGUMENT", field="tokens")
        return (pieces[0] if len(pieces) == 1 else _joined(pieces, len(ids))), run.tier

    def _manifest(self, ids: Sequence[int], tier: str, attested: bool | None, arrays: Mapping[Key, Array]) -> Manifest:
        from aprender import __version__

        return Manifest(
            side=self.spelling,
            tokens=tuple(int(i) for i in ids),
            producer="aprender",
            version=__version__,
            backend=self.backend,
            tier=tier,
            profile=self.profile.name,
            threads=self._options["threads"],
            model_digest=self.digest,
            arch=self.model.arch,
            flags=self.model.flags,
            hparams=dict(self.model.hparams),
            attestation=attested,
            tensors={key: TensorNote.of(array) for key, array in arrays.items()},
        )

    def logits(self, ids: Sequence[int]) -> Array:
        """Logits of every position, [T, V], by the path that makes the text: nothing else is kept."""
        run = self._timeline()
        parts = [self.forward(run, ids[first:last], [LOGITS])[LOGITS] for first, last in self.pieces(len(ids))]
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
        """Nothing to release early: arrays may still be in use."""


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


def _joined(pieces: Sequence[Mapping[Key, Array]], tokens: int) -> dict[Key, Array]:
    """Captures of consecutive chunks as one: joined along the tokens, scores padded with 0 to the last key, the last chunk's caches."""
    out: dict[Key, Array] = {}
    for key in pieces[0]:
        shape = stages.by_name[key[0]].shape
        parts = [piece[key] for piece in pieces]
        if "T" not in shape:
            out[key] = parts[-1]
        elif "J" in shape:
            wide = [np.pad(part, ((0, 0), (0, 0), (0, tokens - part.shape[2]))) for part in parts]
            out[key] = np.concatenate(wide, axis=1)
        else:
            out[key] = np.concatenate(parts)
    return out
