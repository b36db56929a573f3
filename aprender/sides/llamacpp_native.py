"""The ctypes door to the prebuilt libraries of llama.cpp v0.5.0.

Owns the structs, the functions that are called, and :class:`Library`, the shared objects as one.  Refuses every other release, and one
whose structs do not read as they should: the offsets below hold for this one alone.  Called by ``sides.llamacpp_worker`` and
``sides.llamacpp_record``, in a process of its own.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprender.errors import CannotRun, ConfigError
from aprender.sides.llamacpp import RELEASE

LIBRARIES = ("libggml-base.so", f"libggml.v{RELEASE}.so", f"libllama.v{RELEASE}.so")
"""In the order in which they need each other."""

CPU = "libggml-cpu-"
"""A file of this prefix is the CPU backend for one level of instructions."""

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


# ---- the library ---------------------------------------------------------------------------------------------------------------------


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
