"""What a subject can be held against when no engine is named: the witness, or stages recorded beside its model.

Owns :class:`WitnessSide`, the search for a recording that belongs to a model and to just these ids, and the search for the weights that a
recording was made from.  Refuses to guess: a recording counts only if a digest names its model.  Called by ``bisection`` and
``judgement``.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import aprender
from aprender import _core, arithmetic, stages
from aprender.captures import Captures, open_captures
from aprender.errors import CannotRun
from aprender.judge import witness
from aprender.judge.rounding import to_format
from aprender.manifest import Manifest
from aprender.sides.base import Side
from aprender.sides.own import OwnSide, Weights
from aprender.sides.saved import SavedSide
from aprender.stages import Key
from aprender.text import Tokenizer

# ---- the witness as a side -----------------------------------------------------------------------------------------------------------


class WitnessSide:
    """The float64 definition run freely on some side's weights; it has no arithmetic of its own to judge."""

    profile = None

    def __init__(self, source: Side, spelling: str) -> None:
        self.source, self.spelling = source, spelling
        data = source.model_data()
        if data is None:
            raise CannotRun(f"{source.spelling} has no weights for a witness: name a model, witness:MODEL", code="WEIGHTS")
        self.model = witness.ModelData(**data)

    def capture(self, ids: Sequence[int], keep: stages.Selection | None = None) -> Captures:
        """The free float64 forward pass, handed out as float32."""
        values = witness.forward(self.model, ids)
        kept = {key: value.astype(np.float32) for key, value in values.items() if keep is None or keep(key)}
        manifest = Manifest(
            side=self.spelling,
            tokens=tuple(ids),
            producer="aprender witness",
            version=aprender.__version__,
            arch=self.model.arch,
            flags=self.model.flags,
            hparams=dict(self.model.hparams),
        )
        return Captures(kept, manifest)

    def model_data(self) -> Any:
        """The weights that it runs on."""
        return self.source.model_data()

    def tokenizer(self) -> Tokenizer | None:
        """That of the model."""
        return self.source.tokenizer()

    def generate(self, ids: Sequence[int], n: int) -> list[int]:
        """Greedy, one full forward pass per token: for small models."""
        out: list[int] = []
        tokenizer = self.tokenizer()
        stop = frozenset(tokenizer.eos_ids) if tokenizer else frozenset()
        while len(out) < n:
            token = int(np.argmax(witness.forward(self.model, [*ids, *out])[stages.LOGITS][-1]))
            if token in stop:
                break
            out.append(token)
        return out

    def close(self) -> None:
        """The source is closed by who opened it."""


# ---- recorded references and their weights -------------------------------------------------------------------------------------------


@functools.cache
def _digest(path: Path, size: int, time: int) -> str:
    """SHA-256 of a file; size and time make the cache safe."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest_of(path: Path) -> str | None:
    """SHA-256 of a file, None where there is none."""
    if not path.is_file():
        return None
    stat = path.stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns)


def _home(side: Side) -> Path | None:
    """Folder in which a side's model or captures lie."""
    path = getattr(side, "path", None)
    if path is None:
        return None
    return Path(path) if Path(path).is_dir() else Path(path).parent


def recorded(subject: Side, ids: Sequence[int]) -> SavedSide | None:
    """The reference recorded beside a model for just these ids, ``stages-float16`` first.

    It counts only if its hyper-parameters are the subject's and its digest names a model file in the same folder.
    """
    home = _home(subject)
    data = subject.model_data()
    if home is None or data is None:
        return None
    for folder in sorted(home.glob("stages-*")):
        manifest = open_captures(folder).manifest
        same = manifest.tokens == tuple(ids) and manifest.arch == data["arch"] and _same_sizes(manifest.hparams, data["hparams"])
        if same and manifest.model_digest in {_digest_of(home / "model.safetensors"), getattr(subject, "digest", None)}:
            return SavedSide(folder)
    return None


def _same_sizes(a: Mapping[str, int | float], b: Mapping[str, int | float]) -> bool:
    return all(a.get(name) == b.get(name) for name in ("layers", "dim", "ffn", "heads", "kv_heads", "head", "vocab"))


def weights_of(side: Any, manifest: Manifest, near: Sequence[Path]) -> witness.ModelData | None:
    """A side's model as the side holds it; for a saved side, the file that its digest names, cast as its arithmetic casts weights."""
    data = side.model_data()
    if data is not None:
        return witness.ModelData(**data)
    for path in near:
        if manifest.model_digest is not None and _digest_of(path) == manifest.model_digest:
            held = OwnSide(path.parent if path.name == "model.safetensors" else path).model_data()
            weights = _Cast(held["weights"], side.profile)
            return witness.ModelData(held["arch"], held["flags"], held["hparams"], weights, held["stored"])
    return None


def file_of(side: Any) -> witness.ModelData | None:
    """The file that a side loaded its own copy of, by the reference decoder; None where the side computes with the file itself."""
    origin: Path | None = getattr(side, "origin", None)
    if origin is None:
        return None
    model = _core.Model(_core.File(origin, mmap=True))
    return witness.ModelData(model.arch, model.flags, model.hparams, Weights(model))


class _Cast(Mapping[Key, Any]):
    """Weights rounded to the number format that a side holds them in."""

    def __init__(self, weights: Mapping[Key, Any], profile: arithmetic.Profile | None) -> None:
        self._weights, self._format = weights, profile.activations if profile else arithmetic.F32

    def __getitem__(self, key: Key) -> Any:
        return to_format(np.asarray(self._weights[key], np.float64), self._format)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def candidates(*parties: Any) -> list[Path]:
    """Model files near the sides: beside a saved folder, or the models themselves."""
    out: list[Path] = []
    for party in parties:
        home = _home(party) if party is not None else None
        path = getattr(party, "path", None)
        if home is not None and path is not None:
            out += [Path(path), home / "model.safetensors", home.parent / "model.safetensors"]
    return [path for path in dict.fromkeys(out) if path.is_file()]
