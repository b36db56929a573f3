"""llama.cpp on the CPU as a side: the engine that most GGUF files are run by.

Owns finding the prebuilt libraries, what the model is (as the file says, by our reference decoder) and the worker process that holds the
engine: captures through the eval callback with path attestation, and greedy text.  Refuses every release but the one whose structs are
known, naming what was found.  An assertion or a signal in the library is an error with its last lines, never the end of this process.
Called by ``sides.open_side``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from aprender import arithmetic, errors, stages
from aprender.captures import Captures, open_captures
from aprender.errors import ArgumentError, CannotRun, ConfigError
from aprender.manifest import Manifest
from aprender.pieces import Piece, cuts, whole
from aprender.sides.base import Progress, checked_ids
from aprender.sides.own import OwnSide
from aprender.stages import Selection
from aprender.text import Tokenizer

ENGINE = "llama.cpp"
"""Prefix of its spelling, and producer of its captures."""

VARIABLE = "APRENDER_LLAMACPP"
"""Environment variable that names the folder of the libraries."""

RELEASE = "0.5.0"
"""The release whose structs ``llamacpp_native`` knows."""

PACKAGE = "@node-llama-cpp/linux-x64@3.22.1"
"""npm package that holds it."""

BINARIES = Path("node_modules/@node-llama-cpp/linux-x64/bins/linux-x64")

PROFILES: Mapping[str, str] = {"f32": "ggml-cpu", "f16": "ggml-cpu-f16"}
"""What keys and values are kept in to the row of :mod:`aprender.arithmetic`; float16 is llama.cpp's own default."""

CHUNK = 512
"""Tokens that are computed at once: llama.cpp's own default."""

MOST_THREADS = 512
"""As many as ggml has room for; it does not refuse more, it goes on to start them."""

LONGEST = 127
"""Bytes that an override's key, or its text, may have."""

CONTAINER = "gguf"
"""The one container that llama.cpp reads."""

LAST_LINES = 3
"""Of what a dead worker said."""


def find_libraries() -> Path:
    """The folder of llama.cpp's libraries.

    Looked for where ``APRENDER_LLAMACPP`` says, else in the npm package beside the working directory or this Python's environment.

    Raises
    ------
    CannotRun
        None found, or of another release: what was found where, and what to do.
    """
    named = os.environ.get(VARIABLE)
    here, environment = Path.cwd(), Path(sys.prefix)
    places = [Path(named)] if named else [base / BINARIES for base in (here, here / ".venv" / "npm", environment / "npm")]
    for place in places:
        found = sorted(path.name for path in place.glob("libllama.*so"))
        if f"libllama.v{RELEASE}.so" in found:
            return place.resolve()
        if found:
            text = f"llama.cpp release v{RELEASE} is needed, {place} has {', '.join(found)}"
            raise CannotRun(text, code="BAD_VERSION", path=str(place), field=VARIABLE)
    looked = ", ".join(dict.fromkeys(map(str, places)))
    text = f"no libllama.v{RELEASE}.so in {looked}: npm install --ignore-scripts {PACKAGE}, or set {VARIABLE} to its folder"
    raise CannotRun(text, code="LIBRARY", field=VARIABLE)


class LlamaCppSide:
    """A GGUF run by llama.cpp on the CPU, flash attention off.

    Parameters
    ----------
    path : str or Path
        GGUF file of an architecture that the stage table describes.
    cache : str
        What keys and values are kept in: ``f32`` or ``f16``.
    threads : int, optional
        All cores if not given.
    chunk : int
        Tokens computed at once; 1 is token by token, as text is made.
    cpu : str, optional
        Variant of the CPU library (``haswell``, ``zen4`` …); the best one here if not given.
    overrides : mapping, optional
        Metadata keys to values that llama.cpp is told to believe in place of the file's, as its ``--override-kv`` does.
    spelling : str, optional
        How the user wrote it.

    Raises
    ------
    CannotRun
        The libraries are missing or of another release.
    FormatError, ConfigError, OSError
        The file cannot be read, or holds what the stage table does not describe.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        cache: str = "f32",
        threads: int | None = None,
        chunk: int = CHUNK,
        cpu: str | None = None,
        overrides: Mapping[str, bool | int | float | str] | None = None,
        spelling: str | None = None,
    ) -> None:
        for key, value in (overrides or {}).items():
            if max(len(text.encode()) for text in (key, value if isinstance(value, str) else "")) > LONGEST:
                raise ArgumentError(f"override of {key!r}: more than {LONGEST} bytes", code="ARGUMENT", field="overrides")
        if chunk < 1:
            raise ArgumentError(f"chunk {chunk}: a positive number of tokens is needed", code="ARGUMENT", field="chunk")
        if threads is not None and not 1 <= threads <= MOST_THREADS:
            raise ArgumentError(f"threads {threads}: a number from 1 to {MOST_THREADS} is needed", code="ARGUMENT", field="threads")
        self.path = Path(path)
        self.spelling = spelling or f"{ENGINE}:{path}"
        self.folder = find_libraries()
        self.profile = arithmetic.profile(PROFILES[cache])
        self.source = OwnSide(path, spelling=self.spelling)
        if self.source.file.container != CONTAINER:
            raise ConfigError(f"{path}: llama.cpp reads GGUF, this is {self.source.file.container}", code="UNSUPPORTED", path=str(path))
        self._options: dict[str, Any] = {
            "threads": threads or min(len(os.sched_getaffinity(0)), MOST_THREADS),
            "chunk": chunk,
            "cpu": cpu,
            "cache": cache,
            "overrides": dict(overrides or {}),
        }

    @property
    def digest(self) -> str:
        """SHA-256 of the model file, as of our own engine."""
        return self.source.digest

    def model_data(self) -> dict[str, Any]:
        """What the file holds, read by our decoder and not by llama.cpp."""
        return self.source.model_data()

    def tokenizer(self) -> Tokenizer | None:
        """The file's own tokenizer; None if it has none."""
        return self.source.tokenizer()

    # -- the forward pass --

    def capture(self, ids: Sequence[int], keep: Selection | None = None, progress: Progress | None = None) -> Captures:
        """Run a sequence from position 0 and hand out the selected stages that llama.cpp shows (all of those if not given).

        The pass is run twice, with and without the callback; whether the logits are bit-equal is the manifest's ``attestation``.

        Parameters
        ----------
        ids : sequence of int
        keep : callable, optional
            (stage, layer) to bool.
        progress : callable, optional
            Called with the share done.

        Raises
        ------
        ArgumentError
            No ids, or one outside the vocabulary.
        CannotRun
            llama.cpp refuses the model, or its process died.
        ConfigError
            Its graph has another shape than the stage table says.
        """
        chunk = self._options["chunk"]
        sizes = [min(chunk, len(ids) - first) for first in range(0, len(ids), chunk)]
        return self._captured(ids, sizes, keep, progress)

    def capture_pieces(self, ids: Sequence[int], sizes: Sequence[int]) -> Captures:
        """Run a sequence in pieces of the given sizes on one cache: all stages as one sequence, with the pieces kept."""
        return self._captured(ids, sizes, None, None)

    def _captured(self, ids: Sequence[int], sizes: Sequence[int], keep: Selection | None, progress: Progress | None) -> Captures:
        """The pieces that a worker has run and saved, as one capture."""
        model = self.source.model
        ids = checked_ids(ids, int(model.hparams["vocab"]))
        parts = cuts(sizes, len(ids))
        shown = [key for key in stages.keys(model.flags, int(model.hparams["layers"])) if stages.by_name[key[0]].node]
        keys = [key for key in shown if keep is None or keep(key)]
        with tempfile.TemporaryDirectory(prefix="aprender-") as folder:
            tokenizer = self._readable_tokenizer()
            about = {"digest": self.digest, "tokenizer_digest": tokenizer.digest if tokenizer else None}
            for line in self._ask("capture", ids, keys=keys, out=folder, sizes=list(sizes), **about):
                if progress:
                    progress(line["progress"])
            saved = [open_captures(Path(folder) / str(at)) for at in range(len(parts))]
            pieces = [Piece(*part, {key: piece[key] for key in piece}) for part, piece in zip(parts, saved, strict=True)]
        made: Manifest = saved[-1].manifest
        return whole(pieces, dataclasses.replace(made, tokens=ids, positions=tuple(range(len(ids)))))

    def _readable_tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None also where it cannot be read, for ids alone need none."""
        try:
            return self.tokenizer()
        except errors.Error:
            return None

    # -- text --

    def generate(self, ids: Sequence[int], n: int, on_token: Callable[[int], None] | None = None) -> list[int]:
        """Greedy continuation with the KV cache: at most ``n`` ids, ended before an id that ends the text.

        Raises
        ------
        CannotRun
            The logits are not finite: there is no greatest one.
        """
        ids = checked_ids(ids, int(self.source.model.hparams["vocab"]))
        out: list[int] = []
        tokenizer = self._readable_tokenizer()
        ends = sorted(tokenizer.eos_ids) if tokenizer else []
        for line in self._ask("generate", ids, count=n, ends=ends) if n > 0 else ():
            out.append(line["token"])
            if on_token:
                on_token(line["token"])
        return out

    def close(self) -> None:
        """Nothing stays open: each question has its own process."""

    # -- the worker --

    def _ask(self, command: str, ids: Sequence[int], **more: Any) -> Iterator[Mapping[str, Any]]:
        """Put one question to a fresh worker; its lines, until it is done."""
        question = self._options | more
        question |= {"command": command, "ids": list(ids), "model": str(self.path), "folder": str(self.folder)}
        question |= {"spelling": self.spelling, "profile": self.profile.name}
        place = {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
        with tempfile.TemporaryFile() as said, tempfile.TemporaryFile("w+") as asked:
            json.dump(question, asked)
            asked.seek(0)
            worker = subprocess.Popen(
                [sys.executable, "-m", "aprender.sides.llamacpp_worker"],
                stdin=asked, stdout=subprocess.PIPE, stderr=said, text=True, env=os.environ | place,
            )  # fmt: skip
            with worker:
                try:
                    yield from self._lines(worker, said)
                finally:
                    worker.kill()

    def _lines(self, worker: subprocess.Popen[str], said: IO[bytes]) -> Iterator[Mapping[str, Any]]:
        """What a worker answers, until it is done; raises what it raised, or how it died."""
        assert worker.stdout is not None
        for text in worker.stdout:
            line = json.loads(text)
            if "done" in line:
                return
            if "error" in line:
                kind = getattr(errors, line["kind"], CannotRun)
                raise kind(line["error"], code=line["code"], path=str(self.path), field=line["field"])
            yield line
        code = worker.wait()
        said.seek(0)
        last = [line.strip() for line in said.read().decode(errors="replace").splitlines() if line.strip()][-LAST_LINES:]
        how = f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
        raise CannotRun(f"{self.spelling}: the process of llama.cpp {how}: {' | '.join(last) or 'it said nothing'}", code="DIED")
