"""llama.cpp as a second opinion for the tests: logits, greedy text, token ids, quantised bytes.

Owns the ctypes door to the prebuilt llama.cpp of the npm package @node-llama-cpp/linux-x64@3.22.1
(release v0.5.0), kept in a worker process, because the library aborts where Python would raise.
Refuses every other release, naming what it found: the offsets below hold for this one alone.
Called by the tests that need a peer and by ``scripts/pack_canary.py``, which borrows the K-quant
encoders. The libraries are looked for in ``$APRENDER_TEST_LLAMACPP``, else in ``.venv/npm``.

    with Peer() as peer:
        ids = peer.tokenize("canary.gguf", "What is 2+2?")
        logits = peer.logits("canary.gguf", ids)                                          # [T, V]
        data = peer.quantize("Q4_K", weights)                             # [rows, columns] float32

The worker is this file run with the argument ``worker``; both ends speak pickles over a pipe.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

RELEASE = "0.5.0"
FOLDER = "node_modules/@node-llama-cpp/linux-x64/bins/linux-x64"
ROOT = Path(__file__).resolve().parent.parent

#: ggml's numbers of the formats on offer; the worker checks each against the library's own name.
FORMATS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8,
    "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "Q8_K": 15, "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19,
    "IQ4_NL": 20, "IQ3_S": 21, "IQ2_S": 22, "IQ4_XS": 23, "IQ1_M": 29, "BF16": 30, "TQ1_0": 34, "TQ2_0": 35,
    "MXFP4": 39, "NVFP4": 40, "Q1_0": 41, "Q2_0": 42,
}  # fmt: skip


class PeerError(RuntimeError):
    """llama.cpp refused, or its process died; the message holds what it said."""


# ---- the caller's side -----------------------------------------------------------------------


def folder() -> Path:
    """Where the libraries should be; whether they are there is for `missing` to say."""
    named = os.environ.get("APRENDER_TEST_LLAMACPP")
    return Path(named) if named else ROOT / ".venv" / "npm" / FOLDER


def missing() -> str | None:
    """Why there is no peer here, as a reason to skip; None when there is one."""
    found = sorted(path.name for path in folder().glob("libllama.*so"))
    if not found:
        return f"no llama.cpp libraries in {folder()}"
    if f"libllama.v{RELEASE}.so" not in found:
        return f"llama.cpp release v{RELEASE} is needed, {folder()} has {', '.join(found)}"
    return None


class Peer:
    """A worker process that holds llama.cpp; a context manager.

    The process starts with the first question and again after a death. A model stays open until
    another is asked for or its file changes.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker; a later question starts another."""
        if self._process:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe:
                    pipe.close()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._errors:
            self._errors.close()
        self._process = self._errors = None

    def _start(self) -> subprocess.Popen[bytes]:
        reason = missing()
        if reason:
            raise PeerError(reason)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        return subprocess.Popen(
            [sys.executable, __file__, "worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )

    def _ask(self, question: str, *arguments: object) -> Any:
        if not self._process:
            self._process = self._start()
        try:
            pickle.dump((question, arguments), self._process.stdin)
            self._process.stdin.flush()
            good, answer = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            code = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip()[-2000:]
            self.close()
            raise PeerError(f"llama.cpp died (exit {code}) on {question}: {said}") from None
        if not good:
            raise PeerError(answer)
        return answer

    def version(self) -> str:
        """The release as the library itself names it."""
        return self._ask("version")

    def tokenize(self, model: str | Path, text: str, special: bool = True) -> list[int]:
        """Ids of `text` by the file's own vocabulary.

        Nothing is added in front; `special` says whether ``<|im_start|>`` and its kind count as
        one token.
        """
        return self._ask("tokenize", str(model), text, special)

    def logits(self, model: str | Path, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits of every position, [T, V], in one batch: KV cache F32, no flash attention."""
        return self._ask("logits", str(model), list(ids))

    def generate(self, model: str | Path, ids: Sequence[int], count: int, stop: bool = True) -> list[int]:
        """The next `count` greedy ids, one decode each through the cache.

        With `stop`, less: up to and with the first id that the vocabulary calls an end.
        """
        return self._ask("generate", str(model), list(ids), count, stop)

    def quantize(self, name: str, rows: NDArray[np.float32]) -> bytes:
        """`rows` [rows, columns] in the format `name`, as ``ggml_quantize_chunk`` encodes it."""
        return self._ask("quantize", name, np.ascontiguousarray(rows, dtype=np.float32))

    def dequantize(self, name: str, data: bytes, count: int) -> NDArray[np.float32]:
        """The `count` values that `data` means in the format `name`, by ggml's ``to_float``."""
        return self._ask("dequantize", name, bytes(data), count)


# ---- the worker's side -----------------------------------------------------------------------


class Opaque(ctypes.Structure):
    """A parameter struct of unknown length, passed by value.

    On x86-64 System V a struct this large travels by hidden pointer or on the stack, where the
    callee reads only what it knows: more room than needed does no harm.
    """

    _fields_ = [("bytes", ctypes.c_uint8 * 512)]

    def get(self, kind: str, offset: int) -> int:
        """The field of struct-module type `kind` at `offset`."""
        return struct.unpack_from(kind, self.bytes, offset)[0]

    def set(self, kind: str, offset: int, value: int) -> None:
        """Write the field of struct-module type `kind` at `offset`."""
        struct.pack_into(kind, self.bytes, offset, value)


#: Fields of v0.5.0's llama_context_params: type, offset, and the default that proves the offset.
CONTEXT = {
    "n_ctx": ("I", 0, 512),
    "n_batch": ("I", 4, 2048),
    "n_ubatch": ("I", 8, 512),
    "n_seq_max": ("I", 12, 1),
    "n_outputs_max": ("I", 20, 0),
    "n_outputs_max_per_seq": ("I", 24, 1),
    "n_threads": ("i", 28, 4),
    "n_threads_batch": ("i", 32, 4),
    "flash_attn_type": ("i", 52, -1),
    "type_k": ("i", 104, 1),
    "type_v": ("i", 108, 1),
}


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


class Traits(ctypes.Structure):
    """ggml_type_traits."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float", ctypes.c_void_p),
    ]


LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
POINTER, LONG, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32

#: What is called: name -> (result, arguments).
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_version": (ctypes.c_char_p, []),
    "llama_log_set": (None, [LOG, POINTER]),
    "llama_backend_init": (None, []),
    "llama_model_default_params": (Opaque, []),
    "llama_context_default_params": (Opaque, []),
    "llama_model_load_from_file": (POINTER, [ctypes.c_char_p, Opaque]),
    "llama_model_free": (None, [POINTER]),
    "llama_model_get_vocab": (POINTER, [POINTER]),
    "llama_init_from_model": (POINTER, [POINTER, Opaque]),
    "llama_free": (None, [POINTER]),
    "llama_batch_init": (Batch, [INT, INT, INT]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (INT, [POINTER, Batch]),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [POINTER, INT]),
    "llama_vocab_n_tokens": (INT, [POINTER]),
    "llama_vocab_is_eog": (ctypes.c_bool, [POINTER, INT]),
    "llama_tokenize": (
        INT,
        [POINTER, ctypes.c_char_p, INT, ctypes.POINTER(INT), INT, ctypes.c_bool, ctypes.c_bool],
    ),
    "ggml_backend_load_all_from_path": (None, [ctypes.c_char_p]),
    "ggml_type_name": (ctypes.c_char_p, [ctypes.c_int]),
    "ggml_get_type_traits": (ctypes.POINTER(Traits), [ctypes.c_int]),
    "dequantize_row_q8_K": (None, [POINTER, POINTER, LONG]),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        [ctypes.c_int, POINTER, POINTER, LONG, LONG, LONG, POINTER],
    ),
}


class Library:
    """The three shared objects as one, every function with its types, the log silent.

    Raises
    ------
    PeerError
        The release, or a default at an offset that we rely on, is not the known one.
    """

    def __init__(self, where: Path) -> None:
        names = ("libggml-base.so", f"libggml.v{RELEASE}.so", f"libllama.v{RELEASE}.so")
        objects = [ctypes.CDLL(str(where / name), ctypes.RTLD_GLOBAL) for name in names]
        for name, (result, arguments) in FUNCTIONS.items():
            function = next(getattr(o, name) for o in reversed(objects) if hasattr(o, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self._check()
        self._silence = LOG(lambda *_: None)  # kept: C holds no reference
        self.llama_log_set(self._silence, None)
        self.ggml_backend_load_all_from_path(str(where).encode())
        self.llama_backend_init()

    def _check(self) -> None:
        version = self.llama_version().decode()
        if version.split("-")[0] != RELEASE:
            raise PeerError(f"llama.cpp release v{RELEASE} is needed, found {version}")
        params = self.llama_context_default_params()
        for name, (kind, offset, default) in CONTEXT.items():
            found = params.get(kind, offset)
            if found != default:
                raise PeerError(f"llama.cpp {version}: {name} reads {found} instead of {default}")
        for name, number in FORMATS.items():
            found = self.ggml_type_name(number).decode().upper()
            if found != name:
                raise PeerError(f"llama.cpp {version}: format {number} is {found}, not {name}")

    def context(self, model: int, tokens: int) -> int:
        """A context for up to `tokens` tokens that computes as plainly as llama.cpp can."""
        params = self.llama_context_default_params()
        room = max(tokens, 32)
        threads = len(os.sched_getaffinity(0))
        values = {
            "n_ctx": room,
            "n_batch": room,
            "n_ubatch": room,
            "n_outputs_max": room,
            "n_outputs_max_per_seq": room,
            "n_threads": threads,
            "n_threads_batch": threads,
            "flash_attn_type": 0,
            "type_k": FORMATS["F32"],
            "type_v": FORMATS["F32"],
        }
        for name, value in values.items():
            kind, offset, _ = CONTEXT[name]
            params.set(kind, offset, value)
        context = self.llama_init_from_model(model, params)
        if not context:
            raise PeerError(f"llama.cpp made no context for {tokens} tokens")
        return context


class Worker:
    """Answers the questions of `Peer`, one method each."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self._open: tuple[str, int] | None = None
        self._model: int | None = None

    def version(self) -> str:
        return self.library.llama_version().decode()

    def _load(self, path: str) -> tuple[int, int]:
        """Model and vocabulary of the file, opened unless it is still the open one."""
        try:
            key = (path, os.stat(path).st_mtime_ns)
        except OSError as error:
            raise PeerError(f"llama.cpp cannot open {path}: {error.strerror}") from None
        if key != self._open:
            if self._model:
                self.library.llama_model_free(self._model)
            params = self.library.llama_model_default_params()
            self._open = None
            self._model = self.library.llama_model_load_from_file(path.encode(), params)
            if not self._model:
                raise PeerError(f"llama.cpp refuses {path}")
            self._open = key
        return self._model, self.library.llama_model_get_vocab(self._model)

    def tokenize(self, path: str, text: str, special: bool) -> list[int]:
        _, vocabulary = self._load(path)
        data = text.encode()
        room = len(data) + 8  # a token has at least one byte
        ids = (INT * room)()
        n = self.library.llama_tokenize(vocabulary, data, len(data), ids, room, False, special)
        if n < 0:
            raise PeerError(f"llama.cpp needs {-n} tokens for {len(data)} bytes")
        return list(ids[:n])

    def _decode(self, context: int, ids: list[int], first: int) -> None:
        """Run `ids` at positions from `first` on, all of them with logits."""
        batch = self.library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, first + i, 1
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
        code = self.library.llama_decode(context, batch)
        self.library.llama_batch_free(batch)
        if code:
            raise PeerError(f"llama_decode returned {code}")

    def _row(self, context: int, index: int, width: int) -> NDArray[np.float32]:
        row = self.library.llama_get_logits_ith(context, index)
        return np.ctypeslib.as_array(row, (width,)).copy()

    def logits(self, path: str, ids: list[int]) -> NDArray[np.float32]:
        model, vocabulary = self._load(path)
        width = self.library.llama_vocab_n_tokens(vocabulary)
        context = self.library.context(model, len(ids))
        try:
            self._decode(context, ids, 0)
            return np.stack([self._row(context, i, width) for i in range(len(ids))])
        finally:
            self.library.llama_free(context)

    def generate(self, path: str, ids: list[int], count: int, stop: bool) -> list[int]:
        model, vocabulary = self._load(path)
        width = self.library.llama_vocab_n_tokens(vocabulary)
        context = self.library.context(model, len(ids) + count)
        made: list[int] = []
        try:
            step, first = ids, 0
            for _ in range(count):
                self._decode(context, step, first)
                best = int(self._row(context, len(step) - 1, width).argmax())
                made.append(best)
                if stop and self.library.llama_vocab_is_eog(vocabulary, best):
                    break
                first += len(step)
                step = [best]
            return made
        finally:
            self.library.llama_free(context)

    def _traits(self, name: str) -> Traits:
        if name not in FORMATS:
            raise PeerError(f"no format {name} here; there are {', '.join(FORMATS)}")
        return self.library.ggml_get_type_traits(FORMATS[name])[0]

    def quantize(self, name: str, rows: NDArray[np.float32]) -> bytes:
        traits = self._traits(name)
        if rows.ndim != 2 or rows.shape[1] % traits.block:
            raise PeerError(f"{name} needs [rows, {traits.block} k] values, not {rows.shape}")
        count, columns = rows.shape
        data = np.zeros(rows.size // traits.block * traits.size, np.uint8)
        written = self.library.ggml_quantize_chunk(FORMATS[name], rows.ctypes.data, data.ctypes.data, 0, count, columns, None)
        if written != data.size:
            raise PeerError(f"{name}: {written} bytes written, {data.size} expected")
        return data.tobytes()

    def dequantize(self, name: str, data: bytes, count: int) -> NDArray[np.float32]:
        traits = self._traits(name)
        if count % traits.block or len(data) != count // traits.block * traits.size:
            raise PeerError(f"{len(data)} bytes are not {count} values of {name}")
        if name == "F32":  # the one format without to_float
            return np.frombuffer(data, np.float32).copy()
        values = np.empty(count, np.float32)
        held = np.frombuffer(data, np.uint8).copy()  # aligned as a block wants it
        to_float = traits.to_float or self.library.dequantize_row_q8_K  # Q8_K's is there, but not in the table
        to_float(held.ctypes.data, values.ctypes.data, count)
        return values


def serve() -> None:
    """Answer questions on standard input until it ends; what the library prints goes to stderr."""
    questions = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    worker: Worker | None = None
    while True:
        try:
            question, arguments = pickle.load(questions)
        except EOFError:
            return
        try:
            worker = worker or Worker(Library(folder()))
            answer = (True, getattr(worker, question)(*arguments))
        except PeerError as error:
            answer = (False, str(error))
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    if sys.argv[1:] != ["worker"]:
        raise SystemExit(f"usage: {sys.argv[0]} worker")
    serve()
