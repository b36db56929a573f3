"""Types of the C extension ``aprender._core``; ``python -m mypy.stubtest aprender._core`` holds this file against it.

The tables are the row files ``csrc/**/*.def`` as tuples, in file order; each alias below names the columns of one of them.  Nothing else
lists stages, operations, weights or formats.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias, TypedDict, final

import numpy as np
from _typeshed import structseq
from numpy.typing import ArrayLike, NDArray
from typing_extensions import Buffer

# ---- the tables ------------------------------------------------------------------------------------------------------

_StageRow: TypeAlias = tuple[str, str, str, str, str, str, str, str | None, str | None, str, str, str, str, str]
"""name, span (ONCE LAYER TAIL), op, out wire, a wire, b wire ("NONE": none), shape ("T QKV"), weight group, bias group, flag ("ALWAYS"),
lanes, Hugging Face site, llama.cpp node, population in APRT (ALL LAST NONE)."""

_NamedRow: TypeAlias = tuple[str, str]
"""name, what it is."""

_WeightRow: TypeAlias = tuple[str, str, str, str, str, str, str | None, str]
"""name, group (its first row), GGUF name, Hugging Face name (``%d``: the layer), shape ("Qd D"), form (MATRIX VECTOR BIAS), what takes its
place when the flag is off, flag."""

_ArchRow: TypeAlias = tuple[str, str, frozenset[str], frozenset[str]]
"""name, class in config.json, flags always on, flags that the configuration may add."""

_QuirkRow: TypeAlias = tuple[str, str, str]
"""architecture, container, quirk."""

_HparamRow: TypeAlias = tuple[str, str, str, str, str, str]
"""field, kind (INT NUM), GGUF key (``%s``: the architecture), config.json key, APR key, need (REQUIRED DERIVED).  Several spellings of a
key are separated by blanks, the usual one first."""

_FormatRow: TypeAlias = tuple[str, int, str, int, int, bool, int, str, bool]
"""name, ggml id (-1: none), safetensors dtype ("": none), values per block, bytes per block, can be read, APR id (-1: none), packing (ROWS:
each row begins a block; FLAT: blocks run on; WHOLE: one scale, then the values), can be written."""

_TierRow: TypeAlias = tuple[str, bool]
"""name, available on this CPU; worst first."""

_ErrorRow: TypeAlias = tuple[str, str, str]
"""kind, code shown to the user, Python class."""

STAGES: Final[tuple[_StageRow, ...]]
OPS: Final[tuple[_NamedRow, ...]]
FLAGS: Final[tuple[_NamedRow, ...]]
WEIGHTS: Final[tuple[_WeightRow, ...]]
ARCHS: Final[tuple[_ArchRow, ...]]
QUIRKS: Final[tuple[_QuirkRow, ...]]
HPARAMS: Final[tuple[_HparamRow, ...]]
FORMATS: Final[tuple[_FormatRow, ...]]
CONTAINERS: Final[tuple[str, ...]]
TIERS: Final[tuple[_TierRow, ...]]
ERRORS: Final[tuple[_ErrorRow, ...]]

# ---- files -----------------------------------------------------------------------------------------------------------

@final
class TensorInfo(structseq[Any], tuple[str, str, tuple[int, ...], int, int, int]):
    """A tensor of a file."""

    __match_args__: Final = ("name", "format", "shape", "nbytes", "offset", "part")
    @property
    def name(self) -> str: ...
    @property
    def format(self) -> str:
        """Row of FORMATS."""
    @property
    def shape(self) -> tuple[int, ...]:
        """Outermost first."""
    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
    @property
    def offset(self) -> int:
        """Of the first byte, in its file."""
    @property
    def part(self) -> int:
        """Index in ``File.parts``: the file that holds it."""

@final
class File:
    """An opened container: GGUF, APR, safetensors, or a folder with model.safetensors (or its shards' index) and config.json.

    A model in several files is opened by its folder, its index, or the first part of a split GGUF.  With ``mmap`` the tensors are mapped
    and not read, for models larger than memory: the file must then stay as it is; if it does not, what is computed with it raises CHANGED,
    and ``raw`` gives copies.

    Every range is checked here, before a byte is handed out.

    Raises
    ------
    FormatError
        The file is not what it claims to be.
    OSError
        It cannot be read.
    MemoryError
    """

    def __new__(cls, path: str | bytes | os.PathLike[str], *, mmap: bool = False) -> File: ...
    @property
    def path(self) -> str:
        """The file that was opened; for a folder, its model.safetensors."""
    @property
    def container(self) -> str:
        """A row of CONTAINERS."""
    @property
    def version(self) -> int:
        """Of the container; 0 where it has none."""
    @property
    def nbytes(self) -> int:
        """Of all parts together."""
    @property
    def parts(self) -> tuple[str, ...]:
        """The files of the model: the opened one, then its shards."""
    @property
    def notes(self) -> tuple[str, ...]:
        """What is odd about the file and no error, in words."""
    @property
    def metadata(self) -> dict[str, Any]:
        """Every key and value, built anew; config.json is flattened with dots.

        Numbers, strings and booleans as Python has them; arrays of numbers as NumPy arrays, arrays of strings and of JSON as lists.
        """
    @property
    def keys(self) -> tuple[str, ...]:
        """The metadata keys, in file order."""
    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """In file order."""
    def get(self, key: str, default: object = None, /) -> Any:
        """The value of one metadata key, without building the others."""
    def raw(self, name: str, /) -> NDArray[np.uint8]:
        """The bytes of a tensor: [nbytes], a read-only view that keeps the file's memory alive.

        Raises
        ------
        UnknownName
            No tensor of that name.
        """
    def verify(self) -> bool:
        """Read every byte against the checksum of the container.

        Returns
        -------
        bool
            False where the container has none.

        Raises
        ------
        FormatError
            Code CHECKSUM: the file is damaged.
        """
    def dequantize(self, name: str, /) -> NDArray[np.float32]:
        """The values of a tensor, by the reference decoder.

        Raises
        ------
        UnknownName
            No tensor of that name.
        FormatError
            Code UNSUPPORTED: a format that is listed but cannot be read.
        """

# ---- formats ---------------------------------------------------------------------------------------------------------

def encode(format: str, values: ArrayLike, /, *, pad: bool = False, threads: int = 0) -> NDArray[np.uint8]:
    """The bytes of float32 values in a format; the same for any number of threads.

    Parameters
    ----------
    format : str
        Row of FORMATS that can be written.
    values : array_like of float32, [..., n]
        float64 arrays are refused: the caller rounds, and knows it.
    pad : bool, optional
        Fill up each row with zeros to whole blocks, where the packing is ROWS and n is no multiple of the block.
    threads : int, optional
        All cores if 0.

    Returns
    -------
    uint8 array
        [..., bytes of a row] where the packing is ROWS; else [bytes], with the last block filled up.

    Raises
    ------
    ArgumentError
        A format that cannot be written.  Code VALUE: the first value that the format cannot hold, which is one that is not finite or that
        would need a larger scale than there is; F32, F16 and BF16 hold any.
    FormatError
        Code BLOCK: rows that do not fill their blocks, without `pad`.
    TypeError
        Values that are not float32 and would have to be rounded.
    """

def dequantize(format: str, data: Buffer, shape: tuple[int, ...], /, *, tier: str | None = None) -> NDArray[np.float32]:
    """The values that bytes mean in a format: [*shape].

    Parameters
    ----------
    format : str
        Row of FORMATS that can be read.
    data : bytes-like, contiguous
    shape : tuple of int
        Outermost first; the last one is a row.
    tier : str, optional
        Row of TIERS whose decoder is used; the plain reference if not given.  The bits do not depend on it.

    Raises
    ------
    ArgumentError
        A format that cannot be read, or a negative dimension.
    FormatError
        Code SIZE: `data` has more or fewer bytes than that shape takes.
    UnknownName
        A tier that does not exist here.
    """

def compare(
    a: NDArray[np.float32], b: NDArray[np.float32], /, *, limit: int = 0, threads: int = 0, tier: str | None = None
) -> dict[str, Any]:
    """What one pass over two float32 arrays of one size says of them; the same bits for any number of threads and any CPU tier.

    Returns
    -------
    dict
        Counts ``bits_equal``, ``value_equal`` (0 and -0 are, so are two NaN), ``nan_a``, ``nan_b`` (in one alone), ``nan_both``,
        ``inf_unlike`` and ``finite`` (pairs); over the finite pairs the sums ``a b aa bb`` (of a, b and their squares), ``dd`` of (a - b)^2
        and ``ab`` of (a - b)(a + b), ``max_abs`` and its first place ``max_at``, ``max_ulp`` in float32 steps; ``over``, those more than
        1, 16, 256 and 65536 steps apart; ``first`` place whose bits differ (-1: none); ``top``, the ``limit`` places that differ most as
        (place, gap): gap 2e300 where one is NaN, 1e300 where an infinity meets something else.

    Raises
    ------
    TypeError
        Not float32.
    ValueError
        Different sizes, or a tier that is not there.
    """

def estimate_sums(
    x: NDArray[np.float64], w: NDArray[np.float32] | NDArray[np.float64], /, *, lanes: int = 0, block: int = 0, threads: int = 0
) -> NDArray[np.float64]:
    """Variance that adding in float32 leaves of each dot product of rows of x [B, T, K] with rows of w [B, N, K]: [B, T, N].

    Products are exact, each addition rounds.  ``lanes`` (a power of two, at most 64): that many lanes, then the tree; else ``block``:
    in order in blocks of that length, then the blocks in order; else the envelope of unknown orders.  Partial sums are known at the ends
    of segments and interpolated between.  The same bits for any number of threads.

    Raises
    ------
    TypeError
        Other number formats.
    ValueError
        Shapes that do not fit each other, or an order out of range.
    MemoryError
    """

def exact_sums(
    x: NDArray[np.float64],
    w: NDArray[np.float32] | NDArray[np.float64],
    flat: NDArray[np.int64],
    /,
    *,
    lanes: int = 0,
    block: int = 0,
    threads: int = 0,
) -> NDArray[np.float64]:
    """The same of some dot products, by flat index into [B, T, N], from all their partial sums: [P].

    Raises
    ------
    IndexError
        An index outside.
    TypeError, ValueError
        As for ``estimate_sums``.
    """

def lane_dots(
    x: NDArray[np.float32], w: NDArray[np.float32], flat: NDArray[np.int64] | None = None, /, *, lanes: int = 16, threads: int = 0
) -> NDArray[np.float32]:
    """Dot products by float32 fused multiply-adds, lane i adding elements i, i + lanes, ... in order from 0, then the rounded tree.

    Of rows of x [B, T, K] with rows of w [B, N, K]: [B, T, N], or [P] by flat index.  The same bits for any number of threads.

    Raises
    ------
    IndexError
        An index outside.
    TypeError, ValueError
        As for ``estimate_sums``.
    """

def read_aprt(path: str | bytes | os.PathLike[str], /) -> tuple[int | None, NDArray[np.float32]]:
    """One APRT file: its layer (None: the whole model) and its values, [count], a read-only view whose bits are those of the file.

    Raises
    ------
    FormatError
        TRUNCATED, BAD_MAGIC, GAP (bytes that the header does not count), NOT_REGULAR.
    OSError
        It cannot be read.
    MemoryError
    """

# ---- models ----------------------------------------------------------------------------------------------------------

@final
class WeightInfo(structseq[Any], tuple[str, int | None, str, str, tuple[int, ...]]):
    """A weight of a model."""

    __match_args__: Final = ("name", "layer", "tensor", "format", "shape")
    @property
    def name(self) -> str:
        """Row of WEIGHTS."""
    @property
    def layer(self) -> int | None:
        """None outside the layers."""
    @property
    def tensor(self) -> str:
        """Its name in the file; for a shared head, that of the token table."""
    @property
    def format(self) -> str:
        """Row of FORMATS."""
    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in] or [n]."""

@final
class Model:
    """A file bound strictly to its architecture: nothing missing, nothing left over.  Immutable; threads may share it.

    Raises
    ------
    ConfigError
        Codes MISSING, LEFTOVER, CONFIG: tensors and hyper-parameters do not fit together.
    FormatError
        Codes UNSUPPORTED, KV_TYPE: something that this engine does not compute, named.
    """

    def __new__(cls, file: File) -> Model: ...
    @property
    def file(self) -> File: ...
    @property
    def arch(self) -> str:
        """A row of ARCHS."""
    @property
    def flags(self) -> frozenset[str]:
        """Rows of FLAGS that are on."""
    @property
    def quirks(self) -> tuple[str, ...]:
        """What the container did to the weights (ROPE_PAIRS: q and k rows interleaved); undone when they are read."""
    @property
    def tied(self) -> bool:
        """Whether the head is the token table."""
    @property
    def hparams(self) -> dict[str, int | float]:
        """Fields of HPARAMS."""
    @property
    def sources(self) -> dict[str, str]:
        """Field of HPARAMS to where its value came from."""
    @property
    def weights(self) -> tuple[WeightInfo, ...]: ...
    def weight(self, name: str, layer: int | None = None, /) -> NDArray[np.float32]:
        """Values in Hugging Face lane order, [out, in] or [n], by the reference decoder.

        Raises
        ------
        UnknownName
            The model has no such weight.
        """
    def weight_raw(self, name: str, layer: int | None = None, /) -> NDArray[np.uint8]:
        """The file's bytes, in the file's lane order: a read-only view.

        [rows, bytes of a row]; [bytes] where the format's packing is not ROWS.

        Raises
        ------
        UnknownName
            The model has no such weight.
        """

# ---- runs ------------------------------------------------------------------------------------------------------------

@final
class Run:
    """One timeline of a model: cache and position.  A second call while one is running raises CannotRun.

    Parameters
    ----------
    model : Model
    threads : int, optional
        All cores if not given or 0.  The bits do not depend on it.
    tier : str, optional
        Row of TIERS; the best if not given.  The bits do not depend on it.
    edits : sequence of (stage, layer or None, field, value), optional
        Changes of the plan; None as the layer of a layer stage means every layer.
    overrides : dict {(weight, layer or None): array}, optional
        Values in place of weights, Hugging Face lane order; copied.
    backend : {"cpu", "cuda"}, optional
        The device; ``cpu`` if not given.  The one that is asked for is used, or DeviceError raised.
    mode : {"auto", "eager", "checked"}, optional
        Of ``cuda``: single tokens as a graph and longer pieces kernel by kernel; everything kernel by kernel; the same, with errors and
        the guards round all buffers looked at after each kernel.  The bits do not depend on it.

    Raises
    ------
    UnknownName
        A stage, field, weight or tier that does not exist here.
    ArgumentError
        An edit that would lead an operation out of its arrays, or an override of the wrong size.
    DeviceError
        The library of the backend or its device is not there, or has too little memory (DeviceMemoryError).
    """

    def __new__(
        cls,
        model: Model,
        *,
        threads: int | None = None,
        tier: str | None = None,
        edits: Sequence[tuple[str, int | None, str, float]] | None = None,
        overrides: dict[tuple[str, int | None], NDArray[np.float32]] | None = None,
        backend: str | None = None,
        mode: str | None = None,
    ) -> Run: ...
    @property
    def model(self) -> Model: ...
    @property
    def position(self) -> int:
        """Tokens seen so far."""
    @property
    def backend(self) -> str: ...
    @property
    def tier(self) -> str:
        """Instruction set in use, or the device's name."""
    @property
    def mode(self) -> str: ...
    @property
    def path(self) -> str | None:
        """What ran for the last request, in words (kernels, graph); None where there is one way only."""
    def forward(
        self,
        tokens: Sequence[int],
        keep: Literal["all"] | Sequence[tuple[str, int | None]] | None = None,
        feed: Mapping[tuple[str, int | None], ArrayLike] | None = None,
    ) -> dict[tuple[str, int | None], NDArray[np.float32]]:
        """Run the next tokens and return the kept stages.

        Parameters
        ----------
        tokens : sequence of int
        keep : "all" or sequence of (stage, layer), optional
            None as the layer of a layer stage means every layer.
        feed : dict {(stage, layer): array}, optional
            Values that replace those of the stages.

        Returns
        -------
        dict
            In execution order; read-only arrays [T, columns], scores and probabilities [H, T, J], over one block that they keep alive.

        Raises
        ------
        ArgumentError
            No tokens, a token outside the vocabulary, or a fed array of the wrong size.
        UnknownName
            A stage that this model does not have.
        FormatError
            Code LIMIT: too many positions or too many scores in one piece.
        CannotRun
            Code BUSY: another thread is running it.
        KeyboardInterrupt
            Ctrl-C; the position stays.
        MemoryError
        """
    def replay(
        self,
        tokens: Sequence[int],
        keep: Literal["all"] | Sequence[tuple[str, int | None]] | None = None,
        feed: Mapping[tuple[str, int | None], ArrayLike] | None = None,
    ) -> dict[tuple[str, int | None], NDArray[np.float32]]:
        """Like forward, but the position stays and only what `keep` needs is run.

        With the inputs of a stage fed, exactly that stage runs.  A fed k_cache or v_cache ([J, Kd]) replaces the cache.
        """
    def reset(self) -> None:
        """Forget all tokens."""
    def _places(
        self,
        tokens: Sequence[int],
        keep: Literal["all"] | Sequence[tuple[str, int | None]] | None = None,
        feed: Mapping[tuple[str, int | None], ArrayLike] | None = None,
    ) -> tuple[tuple[bool, bool, int, int], ...]:
        """For tests: replay, and per step of the plan (needed, kept, place in its arena, size), counted in values."""
    def plan(self, tokens: int = 1, /) -> tuple[dict[str, Any], ...]:
        """The steps that a forward of so many tokens would take.

        Each a dict: stage, layer, op, rows, cols, k, weights [(weight, bias, columns)], and every field of ``csrc/plan/params.def``.
        """

class _Cuda(TypedDict):
    built: bool
    library: str
    compiler: str | None
    devices: list[str]
    reason: str | None

def cuda() -> _Cuda:
    """What there is of CUDA, without asking for it.

    Whether the library is built, where it is or was looked for, what compiled it, one line per device, and why none can be used (None:
    one can).
    """

# ---- for tests -------------------------------------------------------------------------------------------------------

def _fail_allocation(n: int, /) -> None:
    """The nth allocation of the core from now fails; -1: never."""

def _live_bytes() -> int:
    """Bytes that the core holds."""

def _peak_bytes() -> int:
    """For tests: most bytes that the core held at once since the last call of this."""

def _allocations() -> int:
    """Allocations of the core so far."""
