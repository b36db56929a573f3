"""The process that holds llama.cpp: one request on standard input, lines of JSON on standard output, captures in a folder.

Owns the ctypes door to the prebuilt libraries of release v0.5.0, the eval callback that copies the graph nodes named by the stage table,
and their way into our shapes.  Refuses every other release, and one whose structs do not read as they should: the offsets below hold for
this one alone.  An assertion or a signal in the library ends this process and no other; ``sides.llamacpp`` turns that into an error with
the last lines.  Run as ``python -m aprender.sides.llamacpp_worker`` by ``sides.llamacpp`` only.

A node is recognised by its operation and by the parameter of the file that it reads (``blk.3.attn_output.weight``), because llama.cpp
names some nodes by number; a node without parameter is recognised by its operation and name.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from aprender import _core, stages
from aprender.captures import Captures, save
from aprender.errors import CannotRun, ConfigError, Error
from aprender.manifest import HALVES, HELD, PAIRS, Manifest, TensorNote
from aprender.pieces import cuts
from aprender.sides.llamacpp import ENGINE, RELEASE
from aprender.stages import Key, Stage

LIBRARIES = ("libggml-base.so", f"libggml.v{RELEASE}.so", f"libllama.v{RELEASE}.so")
"""In the order in which they need each other."""

CPU = "libggml-cpu-"
"""A file of this prefix is the CPU backend for one level of instructions."""

WITHOUT_FMA = frozenset({"x64", "sse42", "sandybridge", "ivybridge"})
HALF_AWAY = frozenset({"x64", "sse42"})
"""CPU variants without fused multiply-add, and those that round activations to 8 bits by the reference rule."""

Array = NDArray[np.float32]

# ---- the structs of v0.5.0 -----------------------------------------------------------------------------------------------------------


class Opaque(ctypes.Structure):
    """A parameter struct of unknown length, passed by value.

    On x86-64 System V a struct this large travels by hidden pointer or on the stack, where the callee reads only what it knows: more room
    than it needs does no harm.
    """

    _fields_ = [("bytes", ctypes.c_uint8 * 512)]

    def get(self, kind: str, offset: int) -> Any:
        """The field of struct-module type ``kind`` at ``offset``."""
        return struct.unpack_from(kind, self.bytes, offset)[0]

    def set(self, kind: str, offset: int, value: int) -> None:
        """Write the field of struct-module type ``kind`` at ``offset``."""
        struct.pack_into(kind, self.bytes, offset, value)


# llama_context_params: type, offset, and the default that proves the offset.
CONTEXT: Mapping[str, tuple[str, int, int]] = {
    "n_ctx": ("I", 0, 512), "n_batch": ("I", 4, 2048), "n_ubatch": ("I", 8, 512), "n_seq_max": ("I", 12, 1),
    "n_outputs_max": ("I", 20, 0), "n_outputs_max_per_seq": ("I", 24, 1), "n_threads": ("i", 28, 4), "n_threads_batch": ("i", 32, 4),
    "flash_attn_type": ("i", 52, -1), "cb_eval": ("Q", 88, 0), "cb_eval_user_data": ("Q", 96, 0), "type_k": ("i", 104, 1),
    "type_v": ("i", 108, 1),
}  # fmt: skip

# llama_model_params: the entry that is used, and two that prove where it is; struct llama_model_kv_override: tag, key, value.
MODEL: Mapping[str, tuple[str, int, int]] = {"kv_overrides": ("Q", 64, 0), "n_gpu_layers": ("i", 16, -1), "use_extra_bufts": ("B", 74, 1)}
OVERRIDE = struct.Struct("<i128s4x128s")
TAGS: tuple[tuple[type, int, str], ...] = ((bool, 2, "<?"), (int, 0, "<q"), (float, 1, "<d"), (str, 3, "128s"))
"""Python type to the tag of an override and the layout of its value; a bool is an int too and comes first."""

TYPES: Mapping[int, str] = {0: "float32", 1: "float16"}
"""ggml's number of what a node can hold here, and NumPy's name."""

CACHE_TYPES: Mapping[str, int] = {"f32": 0, "f16": 1}
"""What keys and values can be kept in here, and ggml's number."""


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


class Tensor(ctypes.Structure):
    """ggml_tensor."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    ]


LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
EVAL = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
LOG_ERROR = 4  # ggml_log_level
_P, _I, _S = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p

FUNCTIONS: Mapping[str, tuple[Any, list[Any]]] = {
    "llama_version": (_S, []),
    "llama_log_set": (None, [LOG, _P]),
    "llama_backend_init": (None, []),
    "llama_model_default_params": (Opaque, []),
    "llama_context_default_params": (Opaque, []),
    "llama_model_load_from_file": (_P, [_S, Opaque]),
    "llama_model_get_vocab": (_P, [_P]),
    "llama_vocab_n_tokens": (_I, [_P]),
    **{f"llama_model_{name}": (_I, [_P]) for name in ("n_layer", "n_embd", "n_head", "n_head_kv", "n_ctx_train", "n_swa")},
    "llama_init_from_model": (_P, [_P, Opaque]),
    "llama_free": (None, [_P]),
    "llama_batch_init": (Batch, [_I, _I, _I]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (_I, [_P, Batch]),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [_P, _I]),
    "ggml_backend_load_all_from_path": (None, [_S]),
    "ggml_backend_load": (_P, [_S]),
    "ggml_op_desc": (_S, [_P]),
    "ggml_get_name": (_S, [_P]),
    "ggml_nelements": (ctypes.c_int64, [_P]),
    "ggml_nbytes": (ctypes.c_size_t, [_P]),
    "ggml_backend_tensor_get": (None, [_P, _P, ctypes.c_size_t, ctypes.c_size_t]),
}
"""What is called: name to result and arguments."""


class Library:
    """The shared objects as one, every function with its types; errors that it logs go to standard error.

    Raises
    ------
    CannotRun
        Files are missing, cannot be loaded, or are of another release; or a default is not where this release has it.
    """

    def __init__(self, where: Path, cpu: str | None = None) -> None:
        try:
            objects = [ctypes.CDLL(str(where / name), ctypes.RTLD_GLOBAL) for name in LIBRARIES]
        except OSError as error:
            raise CannotRun(f"llama.cpp in {where} cannot be loaded: {error}", code="LIBRARY", path=str(where)) from None
        for name, (result, arguments) in FUNCTIONS.items():
            function = next((getattr(o, name) for o in reversed(objects) if hasattr(o, name)), None)
            if function is None:
                raise CannotRun(f"llama.cpp in {where} has no function {name}", code="LIBRARY", path=str(where), field=name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.version: str = self.llama_version().decode()
        self._check(where)
        self.said: deque[str] = deque(maxlen=3)  # errors that it logged
        self._log = LOG(self._logged)  # kept: C holds no reference
        self.llama_log_set(self._log, None)
        if cpu is None:
            self.ggml_backend_load_all_from_path(str(where).encode())
        elif not self.ggml_backend_load(str(where / f"{CPU}{cpu}.so").encode()):
            raise CannotRun(f"llama.cpp in {where} has no CPU variant '{cpu}' that runs here", code="DEVICE", field=cpu)
        self.llama_backend_init()
        self.cpu = _loaded_cpu()

    def __getattr__(self, name: str) -> Any:  # functions are put there by setattr, which the type checker does not see
        raise AttributeError(name)

    def _logged(self, level: int, text: bytes, _: object) -> None:
        """What the library logs: errors to standard error, where the caller looks for last words; the rest is dropped."""
        if level == LOG_ERROR:
            self.said.append(text.decode(errors="replace").strip())
            os.write(2, text)

    def last_words(self) -> str:
        """The errors that were logged last, to end a message with."""
        return ": " + "; ".join(self.said) if self.said else ""

    def _check(self, where: Path) -> None:
        if self.version.split("-")[0] != RELEASE:
            raise CannotRun(f"llama.cpp {RELEASE} is needed, {where} has {self.version}", code="BAD_VERSION", path=str(where))
        for params, fields in ((self.llama_context_default_params(), CONTEXT), (self.llama_model_default_params(), MODEL)):
            for name, (kind, offset, default) in fields.items():
                if params.get(kind, offset) != default:
                    found = f"{name} reads {params.get(kind, offset)}, {default} is its default"
                    raise CannotRun(f"llama.cpp {self.version} in {where}: {found}", code="BAD_VERSION", path=str(where), field=name)

    def read(self, tensor: Tensor, pointer: int) -> Array:
        """A copy of a tensor as float32, axes slowest first: [ne3, ne2, ne1, ne0]; views with any strides."""
        if tensor.type not in TYPES:
            raise ConfigError(f"{tensor.name.decode()} has type {tensor.type}, float32 or float16 is needed", code="TYPE")
        count = self.ggml_nbytes(pointer)
        raw = np.empty(count, np.uint8)
        self.ggml_backend_tensor_get(pointer, raw.ctypes.data, 0, count)
        shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
        view: NDArray[Any] = np.ndarray(shape, TYPES[tensor.type], buffer=raw.data, strides=strides)
        return view.astype(np.float32)


def _loaded_cpu() -> str:
    """Which CPU library is mapped into this process."""
    with open("/proc/self/maps") as stream:
        names = {Path(line.split()[-1]).name for line in stream if CPU in line}
    return ",".join(sorted(name.removeprefix(CPU).removesuffix(".so") for name in names))


# ---- which node is which stage -------------------------------------------------------------------------------------------------------

VIEW = "VIEW"
SOFT_MAX = "SOFT_MAX"
SCORES = "SCORES"
GIVEN: Mapping[str, tuple[tuple[str, int], ...]] = {
    "RMS_NORM": (("eps", 0),),
    "ROPE": (("theta", 5), ("rope_scale", 6), ("rope_extrapolation", 7), ("rope_attention_scale", 8)),
    SOFT_MAX: (("attention_scale", 0), ("alibi", 1)),
}
"""Operation to the parameters of its nodes that are held against the file, and where among op_params each float is."""

TRANSPOSED = frozenset({"cache_v"})  # without flash attention the values lie with the token as the fastest axis


@dataclass(frozen=True)
class Site:
    """A node that shows a stage, or a part of it."""

    key: Key
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Sites:
    """Where the wanted stages show: by (operation, parameter that the node reads), and by (operation, name of the node)."""

    by_parameter: Mapping[tuple[str, str], Site]
    by_name: Mapping[tuple[str, str], Site]

    @classmethod
    def of(cls, wanted: Iterable[Key], flags: frozenset[str]) -> Sites:
        """Those of the stages that the table says llama.cpp shows."""
        parameters: dict[tuple[str, str], Site] = {}
        names: dict[tuple[str, str], Site] = {}
        for stage, layer in wanted:
            row = stages.by_name[stage]
            if not row.node:
                continue
            name, op = row.node.split()
            read = _parameters(row, flags, layer)
            for part, parameter in enumerate(read):
                parameters[op, parameter] = Site((stage, layer), part, len(read))
            if not read:
                names[op, _spelled(name, op, layer)] = Site((stage, layer))
        return cls(parameters, names)

    def find(self, op: str, name: str, sources: Iterable[str]) -> Site | None:
        """The site of a node, if it is one."""
        found = (self.by_parameter.get((op, source)) for source in sources)
        return next((site for site in found if site is not None), None) or self.by_name.get((op, name))


def _parameters(row: Stage, flags: frozenset[str], layer: int | None) -> list[str]:
    """Names in the file of the parameters that a row's node reads: of several parts each."""
    group = row.weight or row.bias
    spelled = {weight: gguf for weight, _, gguf, *_ in _core.WEIGHTS}
    out = []
    for weight, member, _, _, _, _, otherwise, flag in _core.WEIGHTS:
        if group is not None and member == group:
            here = weight if flag == "ALWAYS" or flag in flags else otherwise
            out += [spelled[here].replace("%d", str(layer))] if here else []
    return out


def _spelled(name: str, op: str, layer: int | None) -> str:
    """A node's own name in a layer."""
    return f"{name}_l{layer} (view)" if op == VIEW else name if layer is None else f"{name}-{layer}"


def lanes(stage: str, model: _core.Model) -> str:
    """Order of the RoPE partners where llama.cpp shows a stage: as the rows of q and k lie in the file."""
    turned = model.quirks and stage in _TURNED
    return PAIRS if turned else HALVES


_TURNED = frozenset(row.name for row in stages.STAGES if row.shape[-1] in ("QKV", "Qd", "Kd") and row.out in ("QKV", "Q", "K", "KCACHE"))


class Recorder:
    """The eval callback: says which nodes are wanted, and copies them once they are computed.

    Attributes
    ----------
    values : dict of Key to list of arrays
        One array per piece of the prompt, in the shape of the stage.
    nodes : dict of Key to (str, str)
        Name of the node (of several parts the last), and its type.
    held : dict of str to (dict of str to float)
        Parameters that nodes were given: each value that occurs, with the first node that has it.
    """

    def __init__(self, library: Library, wanted: Iterable[Key], model: _core.Model) -> None:
        self.library, self.hparams = library, model.hparams
        self.sites = Sites.of(wanted, model.flags)
        self.values: dict[Key, list[Array]] = {}
        self.nodes: dict[Key, tuple[str, str]] = {}
        self.held: dict[str, dict[str, float]] = {}
        self.problem: Exception | None = None
        self.tokens = self.keys = 0
        self._parts: dict[Key, dict[int, Array]] = {}
        self._raw_scores: dict[str, tuple[Key, Array]] = {}
        self._checked = False
        self.callback = EVAL(self._called)

    def expect(self, tokens: int, keys: int) -> None:
        """Say how many tokens come next, and how many keys there are then."""
        self.tokens, self.keys = tokens, keys

    def _called(self, pointer: int, ask: bool, _: object) -> bool:
        """Called by the library twice per node; an exception must not cross it, so it is kept, and the run's caller raises it."""
        try:
            tensor = Tensor.from_address(pointer)
            if not self._checked:
                self._check(tensor, pointer)
            op = self.library.ggml_op_desc(pointer).decode()
            site = self._site(tensor, op)
            softmax = op == SOFT_MAX and bool(self._raw_scores)
            if ask:
                self._hold(tensor, op)
                return site is not None or op == SOFT_MAX
            if softmax:
                self._scale(tensor)
            if site is not None:
                self._take(site, tensor, pointer)
        except Exception as problem:
            self.problem = self.problem or problem
            return False
        return True

    def _check(self, tensor: Tensor, pointer: int) -> None:
        """Whether the struct of a tensor reads as the library's own functions do."""
        said = self.library.ggml_get_name(pointer), self.library.ggml_nelements(pointer)
        read = tensor.name, int(np.prod(tuple(tensor.ne)))
        if said != read:
            raise CannotRun(f"llama.cpp {self.library.version}: a tensor reads as {read}, it is {said}", code="BAD_VERSION")
        self._checked = True

    def _hold(self, tensor: Tensor, op: str) -> None:
        """Note what a node is given besides its inputs."""
        for name, at in GIVEN.get(op, ()):
            (value,) = struct.unpack("f", struct.pack("i", tensor.op_params[at]))
            places = self.held.setdefault(name, {})
            if value not in places.values():
                places[tensor.name.decode()] = value

    def _site(self, tensor: Tensor, op: str) -> Site | None:
        sources = [Tensor.from_address(source).name.decode() for source in tensor.src if source is not None]
        return self.sites.find(op, tensor.name.decode(), sources)

    def _take(self, site: Site, tensor: Tensor, pointer: int) -> None:
        """Copy a node out and bring it to the shape of its stage; parts side by side."""
        row = stages.by_name[site.key[0]]
        value = self._shaped(row, self.library.read(tensor, pointer))
        self.nodes[site.key] = tensor.name.decode(), TYPES[tensor.type]
        if row.op == SCORES:
            self._raw_scores[tensor.name.decode()] = site.key, value
            return
        parts = self._parts.setdefault(site.key, {})
        parts[site.part] = value
        if len(parts) == site.parts:
            self._put(site.key, np.concatenate([parts[i] for i in range(site.parts)], axis=-1))
            del self._parts[site.key]

    def _put(self, key: Key, value: Array) -> None:
        due = stages.by_name[key[0]].dims(self.hparams, self.tokens, self.keys)
        if value.shape != due:
            raise ConfigError(
                f"{stages.spell(key)} has shape {list(value.shape)} in llama.cpp, {list(due)} is needed",
                code="SHAPE",
                stage=key[0],
                layer=key[1],
            )
        self.values.setdefault(key, []).append(value)

    def _shaped(self, row: Stage, value: Array) -> Array:
        """[ne3, ne2, ne1, ne0] as the stage is shaped: heads side by side, padded keys cut off."""
        if row.shape[0] == "J":
            value = value.transpose(3, 2, 1, 0) if row.node.split()[0] in TRANSPOSED else value[0]
            return np.ascontiguousarray(value.reshape(value.shape[0], -1)[: self.keys])
        if row.shape[-1] == "J":
            return np.ascontiguousarray(value[0, :, :, : self.keys])
        return value.reshape(self.tokens, -1)

    def _scale(self, softmax: Tensor) -> None:
        """Scores as the softmax forms them: the product times the scale that this node was given, rounded; 0 for later keys, if finite.

        The engine's own mask shows in the probabilities, where the judge demands 0 for a key that may not be seen.
        """
        source = Tensor.from_address(softmax.src[0]).name.decode()
        if source not in self._raw_scores:
            return
        scale, slope = struct.unpack("ff", struct.pack("ii", *softmax.op_params[:2]))
        if slope:
            raise ConfigError(f"{source}: scores with a slope per head (ALiBi) are not a stage", code="UNSUPPORTED")
        key, raw = self._raw_scores.pop(source)
        first = self.keys - self.tokens
        seen = np.arange(self.keys)[None, :] <= first + np.arange(self.tokens)[:, None]
        scores = raw * np.float32(scale)
        self._put(key, np.where(seen | ~np.isfinite(scores), scores, np.float32(0)))  # the mask is added: it hides no NaN


# ---- running -------------------------------------------------------------------------------------------------------------------------


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
