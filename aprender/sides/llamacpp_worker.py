"""The process that holds llama.cpp: one request on standard input, lines of JSON on standard output, captures in a folder.

Owns the requests and how each is answered: a model held by the library (``sides.llamacpp_native``), captures of it
(``sides.llamacpp_record``), greedy text.  Refuses a graph that lacks a node for a stage that should show.  An assertion or a signal in the
library ends this process and no other; ``sides.llamacpp`` turns that into an error with the last lines.  Run as
``python -m aprender.sides.llamacpp_worker`` by ``sides.llamacpp`` only.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from aprender import _core, stages
from aprender.captures import Captures, save
from aprender.errors import CannotRun, ConfigError, Error
from aprender.manifest import HELD, Manifest, TensorNote
from aprender.pieces import cuts
from aprender.sides.llamacpp import ENGINE
from aprender.sides.llamacpp_native import CACHE_TYPES, CONTEXT, MODEL, OVERRIDE, TAGS, Array, Library
from aprender.sides.llamacpp_record import Recorder, lanes

WITHOUT_FMA = frozenset({"x64", "sse42", "sandybridge", "ivybridge"})
HALF_AWAY = frozenset({"x64", "sse42"})
"""CPU variants without fused multiply-add, and those that round activations to 8 bits by the reference rule."""


class Engine:
    """A model held by llama.cpp."""

    def __init__(self, library: Library, path: str, threads: int, cache: str, overrides: Mapping[str, Any]) -> None:
        self.library, self.threads, self.cache = library, threads, cache
        params = library.llama_model_default_params()
        if overrides:
            self._overrides = ctypes.create_string_buffer(b"".join(map(_override, overrides.items())) + bytes(OVERRIDE.size))
            where, offset, _ = MODEL["kv_overrides"]
            params.set(where, offset, ctypes.addressof(self._overrides))
        self.model = library.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise CannotRun(f"{path}: llama.cpp {library.version} refuses it{library.last_words()}", code="LOAD", path=path)
        self.width = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self.model))

    def held(self) -> dict[str, dict[str, int]]:
        """Hyper-parameters as the library says that it holds them."""
        said = {
            "layers": "n_layer",
            "dim": "n_embd",
            "heads": "n_head",
            "kv_heads": "n_head_kv",
            "context": "n_ctx_train",
            "window": "n_swa",
        }
        found = {name: f"llama_model_{function}" for name, function in said.items()}
        return {name: {f: getattr(self.library, f)(self.model)} for name, f in found.items()} | {
            "vocab": {"llama_vocab_n_tokens": self.width}
        }

    def context(self, tokens: int, batch: int, recorder: Recorder | None = None) -> int:
        """A context for so many tokens, at most ``batch`` at a time: flash attention off, every logit wanted."""
        params = self.library.llama_context_default_params()
        kind = CACHE_TYPES[self.cache]
        values = {
            "n_ctx": max(tokens, 32), "n_batch": batch, "n_ubatch": batch, "n_outputs_max": batch, "n_outputs_max_per_seq": batch,
            "n_threads": self.threads, "n_threads_batch": self.threads, "flash_attn_type": 0, "type_k": kind, "type_v": kind,
        }  # fmt: skip
        if recorder is not None:
            values["cb_eval"] = ctypes.cast(recorder.callback, ctypes.c_void_p).value or 0
        for name, value in values.items():
            where, offset, _ = CONTEXT[name]
            params.set(where, offset, value)
        made: int | None = self.library.llama_init_from_model(self.model, params)
        if not made:
            raise CannotRun(f"llama.cpp made no context for {tokens} tokens{self.library.last_words()}", code="CONTEXT")
        return made

    def decode(self, context: int, ids: Sequence[int], first: int, all_logits: bool = True) -> None:
        """Run ids at positions from ``first`` on."""
        batch = self.library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, first + i, int(all_logits or i == len(ids) - 1)
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
        code = self.library.llama_decode(context, batch)
        self.library.llama_batch_free(batch)
        if code:
            raise CannotRun(f"llama_decode returned {code} at position {first}{self.library.last_words()}", code="RUN")

    def logits(self, context: int, row: int) -> Array:
        """Logits [V] of one row of the last batch."""
        return np.ctypeslib.as_array(self.library.llama_get_logits_ith(context, row), (self.width,)).copy()

    def forward(self, ids: Sequence[int], parts: Sequence[tuple[int, int]], recorder: Recorder | None, tell: Any) -> Array:
        """Logits of every position, [T, V], the prompt in pieces from a first token to a last (exclusive)."""
        context = self.context(len(ids), max(last - first for first, last in parts), recorder)
        out = []
        try:
            for first, last in parts:
                piece = ids[first:last]
                if recorder is not None:
                    recorder.expect(len(piece), first + len(piece))
                self.decode(context, piece, first)
                if recorder is not None and recorder.problem is not None:
                    raise recorder.problem
                out.append(np.stack([self.logits(context, i) for i in range(len(piece))]))
                tell((first + len(piece)) / len(ids))
        finally:
            self.library.llama_free(context)
        return np.concatenate(out)


def _override(entry: tuple[str, Any]) -> bytes:
    """One entry of the metadata as llama_model_kv_override."""
    key, value = entry
    tag, layout = next((tag, layout) for kind, tag, layout in TAGS if isinstance(value, kind))
    return OVERRIDE.pack(tag, key.encode(), struct.pack(layout, value.encode() if isinstance(value, str) else value))


def capture(request: Mapping[str, Any], library: Library, tell: Any) -> None:
    """Capture the stages that are asked for and save them, with attestation: one capture per piece, numbered from 0."""
    model = _core.Model(_core.File(request["model"]))
    wanted = [(stage, layer) for stage, layer in request["keys"]]
    ids, parts = request["ids"], cuts(request["sizes"], len(request["ids"]))
    engine = Engine(library, request["model"], request["threads"], request["cache"], request["overrides"])
    recorder = Recorder(library, wanted, model)
    traced = engine.forward(ids, parts, recorder, lambda share: tell(0.6 * share))
    plain = engine.forward(ids, parts, None, lambda share: tell(0.6 + 0.4 * share))
    missing = [key for key in wanted if key not in recorder.values and stages.by_name[key[0]].node]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        text = f"llama.cpp's graph has no node '{stages.by_name[missing[0][0]].node}' for {stages.spell(missing[0])}{more}"
        raise ConfigError(text, code="MISSING", stage=missing[0][0], layer=missing[0][1])
    made = Manifest(
        side=request["spelling"],
        tokens=(),
        producer=ENGINE,
        version=library.version,
        backend="cpu",
        tier=library.cpu,
        profile=request["profile"],
        threads=engine.threads,
        model_digest=request["digest"],
        tokenizer_digest=request["tokenizer_digest"],
        arch=model.arch,
        flags=model.flags,
        hparams=dict(model.hparams),
        attestation=bool(np.array_equal(traced.view(np.uint32), plain.view(np.uint32))),
        arithmetic={
            "cpu": library.cpu,
            "fma": library.cpu not in WITHOUT_FMA,
            "half_away": library.cpu in HALF_AWAY,
            HELD: engine.held() | recorder.held,
        },
    )
    for at, (first, last) in enumerate(parts):
        arrays = {key: values[at] for key, values in recorder.values.items()}
        notes = {}
        for key, array in arrays.items():
            node, dtype = recorder.nodes[key]
            notes[key] = TensorNote.of(array, dtype, site=node, lanes=lanes(key[0], model))
        own = replace(made, tokens=tuple(ids[first:last]), positions=tuple(range(first, last)), tensors=notes)
        save(Captures(arrays, own), Path(request["out"]) / str(at))


def generate(request: Mapping[str, Any], library: Library, say: Any) -> None:
    """Greedy text: each token is told as it comes, the one that ends the text is not."""
    engine = Engine(library, request["model"], request["threads"], request["cache"], request["overrides"])
    ids, chunk, ends = request["ids"], request["chunk"], frozenset(request["ends"])
    context = engine.context(len(ids) + request["count"], min(chunk, len(ids)))
    try:
        for first in range(0, len(ids), chunk):
            piece = ids[first : first + chunk]
            engine.decode(context, piece, first, all_logits=False)
        row, position = len(piece) - 1, len(ids)
        for step in range(request["count"]):
            last = engine.logits(context, row)
            if not np.isfinite(last).all():
                raise CannotRun(f"{request['spelling']}: logits that are not finite after {step} tokens: no answer", code="NONFINITE")
            token = int(last.argmax())
            if token in ends:
                return
            say({"token": token})
            if step + 1 < request["count"]:
                engine.decode(context, [token], position, all_logits=False)
                row, position = 0, position + 1
    finally:
        library.llama_free(context)


def main(questions: IO[str], answers: IO[str]) -> None:
    """Answer the one request."""

    def say(line: Mapping[str, Any]) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    request = json.load(questions)
    try:
        library = Library(Path(request["folder"]), request["cpu"])
        if request["command"] == "capture":
            capture(request, library, lambda share: say({"progress": share}))
        else:
            generate(request, library, say)
    except Error as error:
        say({"error": str(error), "kind": type(error).__name__, "code": error.code, "field": error.field})
        return
    say({"done": True})


if __name__ == "__main__":
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # an assertion would start a debugger to print one
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints is no answer
    main(sys.stdin, out)
