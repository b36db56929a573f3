"""Our own engine as a side: captures, weights as the file holds them, and greedy text.

Owns the way from a model file to :class:`~aprender.captures.Captures`: chunks for long prompts and their joining, path attestation, and
where edits come in (``sides.edits`` carries them out), on the CPU or a GPU.  Refuses to run on another device than the one asked for.
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
from aprender.manifest import Manifest
from aprender.pieces import Piece, cached, cuts, ending, part, whole
from aprender.sides.edits import VALUES, Edit, Switched, handed_out, step_edits, switches, weight_edits, when
from aprender.stages import LOGITS, Key
from aprender.text import Tokenizer, for_model

Array = NDArray[np.float32]

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
        ``{"target": "weight", "weight": …, "layer": … or None, "transform": a key of edits.TRANSFORMS}`` and the others that
        ``judge/faults.py`` lists.  An edit of a step or weight with ``"when"``, a key of edits.WHEN, applies in such pieces only; all
        that have one have the same.
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
        self._when = when(edits)
        always = [edit for edit in edits if not switches(edit)]
        plan = _core.Run(self.model).plan() if edits else ()
        size = self.model.hparams
        self._edits, self._overrides = step_edits(always, plan), weight_edits(always, self.weights, size)
        self._more = (step_edits(edits, plan), weight_edits(edits, self.weights, size)) if self._when else None
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
        arrays, notes = handed_out(self._shown, dict(made), made.manifest.tensors)
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
