"""Floor 4: the CUDA backend gives the bits of the CPU backend, uses the device as it should, and fails in one clear line.

Without a GPU the kernels run on a device made of host memory (csrc/cuda/fake.cpp): the same sources, each thread of a block up to its next
meeting point, fresh memory poisoned, graphs kept by value, failures to order.  Where CUDA's headers are, the code that calls the CUDA
runtime runs too, on a runtime of host memory (csrc/cuda/fake_runtime.cpp).  What that cannot show (nvcc's code, real races, real
asynchrony) is shown by the tests at the end, which want a device and skip with that reason where none is, and by scripts/first_gpu_day.py.

Truth: the CPU backend, which is held against Hugging Face, llama.cpp and NumPy elsewhere.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import jsonschema
import numpy as np
import pytest
import test_formats
import tiny
from conftest import CANARY, PROMPT, blob, write_folder
from numpy.typing import NDArray

from aprender import _core, arithmetic, bisect, bisection, info, parity, stages
from aprender.captures import Captures
from aprender.errors import ArgumentError, DeviceError, DeviceMemoryError, UnknownName
from aprender.judge.local import local
from aprender.judge.witness import ModelData
from aprender.sides import open_side
from aprender.sides.own import OwnSide

Array = NDArray[np.float32]
Key = tuple[str, int | None]
Kept = Mapping[Key, Array]
Maker = Callable[..., _core.Model]

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cuda"
LOGITS: Key = ("lm_head", None)
FULL = tiny.Shape("qwen3", attention_bias=True)  # every row of the table is on
IDS = [3, 1, 4, 1, 5, 92, 65, 35, 89, 79]
INVALID, FULL_UP, ILLEGAL, FAILED = 1, 2, 700, 719  # codes of fake.cpp: as in the CUDA runtime
TABLE = (
    *("count", "select", "room", "get", "fill", "upload", "fetch", "launch", "stream_new", "wait", "done", "move"),
    *("graph_new", "graph_set", "graph_run", "kernel"),
)
"""What can fail while a model is run; the other functions only give back."""
NVCC = os.environ.get("NVCC") or shutil.which("nvcc") or next((str(p) for p in [Path("/usr/local/cuda/bin/nvcc")] if p.exists()), None)
BOTH = pytest.mark.parametrize(
    "fake",
    ["fake", pytest.param("fake_runtime", marks=pytest.mark.skipif(NVCC is None, reason="no nvcc: no headers of CUDA"))],
    indirect=True,
)
"""On the fake device, and through device_cuda.cu on the fake CUDA runtime."""


def same(a: Kept, b: Kept, what: object = "") -> None:
    """The same stages with the same bits; a NaN equals a NaN, of which a GPU has only one."""
    assert list(a) == list(b)
    for key in a:
        assert a[key].shape == b[key].shape
        assert not parity.unequal(a[key], b[key]).any(), f"{what} {key}"


# ---- the fake device -----------------------------------------------------------------------------------------------------------------


class Fake:
    """A library on the fake device, with what tests may order of it."""

    def __init__(self, path: Path) -> None:
        self.path, self._dll = path, ctypes.CDLL(str(path))
        self._dll.ap_fake_calls.restype = ctypes.c_long
        self._dll.ap_fake_live.restype = ctypes.c_size_t
        self._dll.ap_fake_memory.argtypes = [ctypes.c_size_t]
        self._dll.ap_fake_fail.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]

    def reset(self) -> None:
        self._dll.ap_fake_reset()

    def fail(self, call: str, nth: int, code: int) -> None:
        """The nth call of that function from now fails; 0: none."""
        self._dll.ap_fake_fail(call.encode(), nth, code)

    def calls(self, call: str) -> int:
        return int(self._dll.ap_fake_calls(call.encode()))

    def reverse(self, on: bool) -> None:
        """Threads and blocks run last to first: bits that change are a race."""
        self._dll.ap_fake_reverse(int(on))

    def lock(self, on: bool) -> None:
        """Host code that touches device memory dies."""
        self._dll.ap_fake_lock(int(on))

    def scribble(self, at: int, byte: int) -> int:
        """Change a byte of the newest piece of memory, counted from its end if negative; what was there."""
        return int(self._dll.ap_fake_scribble(ctypes.c_long(at), byte))

    def memory(self, size: int) -> None:
        self._dll.ap_fake_memory(size)

    def devices(self, count: int) -> None:
        self._dll.ap_fake_devices(count)

    @property
    def live(self) -> int:
        """Bytes of device memory that are held."""
        return int(self._dll.ap_fake_live())

    @property
    def handles(self) -> int:
        """Streams and graphs that are held."""
        return int(self._dll.ap_fake_handles())

    @property
    def last(self) -> int:
        """What cudaGetLastError would give: of the fake runtime only."""
        return int(self._dll.ap_fake_last())


@pytest.fixture(scope="session")
def libraries() -> dict[str, Path]:
    """The libraries on the fake device, built if something changed since; the one with the fake runtime where nvcc is."""
    made = subprocess.run(["make", "-s", "cuda-fake"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-3000:]
    return {name: BUILD / f"libaprender_cuda_{name}.so" for name in ("fake", "fake_faults", "fake_runtime")}


@pytest.fixture
def fake(request: pytest.FixtureRequest, libraries: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """The library that is shipped, on the fake device; nothing may be left on it."""
    path = libraries[getattr(request, "param", "fake")]
    monkeypatch.setenv("APRENDER_CUDA_LIBRARY", str(path))
    device = Fake(path)
    device.reset()
    yield device
    device.reset()
    gc.collect()
    assert (device.live, device.handles) == (0, 0)


@pytest.fixture
def faulty(libraries: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str | None], Fake]]:
    """faulty(NAME[@STAGE]): the test library with that fault switched on."""
    monkeypatch.setenv("APRENDER_CUDA_LIBRARY", str(libraries["fake_faults"]))
    device = Fake(libraries["fake_faults"])
    device.reset()

    def switch(fault: str | None) -> Fake:
        if fault is None:
            monkeypatch.delenv("APRENDER_CUDA_FAULT", raising=False)
        else:
            monkeypatch.setenv("APRENDER_CUDA_FAULT", fault)
        return device

    yield switch
    device.reset()


def cuda(model: _core.Model, mode: str | None = None, **more: Any) -> _core.Run:
    return _core.Run(model, backend="cuda", mode=mode, **more)


# ---- the same bits as the CPU --------------------------------------------------------------------------------------------------------

PIECES = ([*IDS], [7], [8], [1, 2, 3], [4], list(range(17)), [5])  # prompt, decode, ragged, a tile that overflows, decode
"""Pieces of one sequence: longer than a tile of 8 tokens, shorter, single."""


FILES = [(shape, "gguf") for shape in tiny.SHAPES if not shape.attention_bias] + [
    (shape, "safetensors") for shape in tiny.SHAPES if shape.tied
]
"""Every architecture, tied and untied, with and without biases (which no GGUF of these architectures has)."""


@BOTH
@pytest.mark.parametrize(("shape", "container"), FILES, ids=str)
def test_every_stage_of_every_architecture(shape: tiny.Shape, container: str, fake: Fake, tiny_model: Maker) -> None:
    model = tiny_model(shape, container)
    host, device = _core.Run(model), cuda(model)
    for ids in PIECES:
        same(device.forward(ids, "all"), host.forward(ids, "all"), len(ids))


@BOTH
@pytest.mark.parametrize("mode", ["eager", "checked"])
def test_every_mode_has_the_same_bits(mode: str, fake: Fake, tiny_model: Maker) -> None:
    model = tiny_model(FULL, "safetensors")
    host, device = _core.Run(model), cuda(model, mode)
    for ids in PIECES:
        same(device.forward(ids, "all"), host.forward(ids, "all"), len(ids))


def known_to_gguf(row: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the gguf package write a format that it does not know or, Q8_1, sizes otherwise (ggml-common.h has two halves)."""
    name, kind, _, block, size, *_ = row
    kinds = gguf.GGMLQuantizationType
    if name not in kinds.__members__:
        member = int.__new__(kinds, kind)
        member._name_, member._value_ = name, kind
        monkeypatch.setitem(kinds._member_map_, name, member)
    monkeypatch.setitem(gguf.GGML_QUANT_SIZES, kinds[name], (block, size))


def stored(row: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> _core.Model:
    """A model of one layer whose token table and shared head are stored in a format: random bytes, special scales."""
    name, kind, dtype, block, size, *_, packing, _ = row
    shape = tiny.Shape("qwen2", layers=1, dim=256, heads=8, kv_heads=2, head=32, ffn=64, vocab=1, tied=True)
    if packing != "ROWS":
        return _core.Model(_core.File(tiny.save_apr(dataclasses.replace(shape, vocab=33), folder / "m.apr", name)))
    data = test_formats.blocks(row).reshape(-1)
    shape = dataclasses.replace(shape, vocab=data.size // size * block // shape.dim)
    made = tiny.weights(shape)
    if kind < 0:
        tensors = {key: blob(array, "F32") for key, array in made.items()}
        tensors["model.embed_tokens.weight"] = (dtype, (shape.vocab, shape.dim), data.tobytes())
        return _core.Model(_core.File(write_folder(folder / "m", shape, tensors)))
    known_to_gguf(row, monkeypatch)
    table = made["model.embed_tokens.weight"]
    path = tiny.save_gguf(
        shape, folder / "m.gguf", lambda tensor: name if tensor.startswith("token_embd") else "F32", made=made,
        encode=lambda kind, array: data.tobytes() if array is table else array.astype(np.float32).tobytes(),
    )  # fmt: skip
    return _core.Model(_core.File(path))


@pytest.mark.parametrize("row", _core.FORMATS, ids=lambda row: row[0])
def test_every_value_of_every_format(row: Any, fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole table by EMBED; by MATMUL the kernel for one token and the one for many, on inputs of our choice."""
    model = stored(row, tmp_path, monkeypatch)
    vocab, dim = int(model.hparams["vocab"]), int(model.hparams["dim"])
    host, device = _core.Run(model), cuda(model)
    every = [list(range(vocab)), [("embedding", None)]]
    a, b = host.replay(*every), device.replay(*every)
    same(b, a)
    assert np.unique(a["embedding", None][~np.isnan(a["embedding", None])]).size > 2 or row[0] == "BOOL"  # the bytes did say something
    x = np.random.default_rng(1).normal(size=(11, dim)).astype(np.float32)
    for rows in (1, 11):
        feed = {("final_norm", None): x[:rows]}
        same(device.replay([0] * rows, [LOGITS], feed), host.replay([0] * rows, [LOGITS], feed), rows)


@pytest.mark.parametrize("formats", ["Q8_0", "Q4_0", "Q5_0", "F16", "BF16"])
def test_quantized_models(formats: str, fake: Fake, tiny_model: Maker) -> None:
    model = tiny_model(tiny.Shape("llama"), "gguf", formats)  # q and k rows lie as pairs in the file
    host, device = _core.Run(model), cuda(model)
    for ids in PIECES:
        same(device.forward(ids, "all"), host.forward(ids, "all"), len(ids))


EDITS = [
    ("attn_scores", None, "scale", 0.125), ("attn_scores", None, "kv_div", 1), ("attn_scores", None, "kv_mod", 1),
    ("attention", None, "kv_div", 1), ("attn_scores", None, "mask_offset", 3), ("attn_softmax", None, "mask_offset", -2),
    ("attn_scores", None, "window", 4), ("attn_softmax", None, "window", 5), ("q_post_rope", None, "pairing", 1),
    ("k_post_rope", 1, "pos_shift", 2), ("rope_table", None, "theta", 1e4), ("rope_table", None, "pos_scale", 2),
    ("rope_table", None, "pos_step", 0), ("rope_table", None, "pos_shift", 131071), ("ffn_silu", None, "act", 1),
    ("ffn_silu", 0, "act", 2), ("ffn_norm", None, "eps", 0.25), ("post_attn_residual", None, "a", -1), ("post_ffn_residual", 1, "b", -1),
    ("ffn_swigl", None, "b", -1), ("ffn_silu", None, "a", -1), ("ffn_out", 0, "a", -1), ("attn_out", 1, "a", -1), ("qkv_bias", 0, "a", -1),
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: f"{edit[0]}-{edit[2]}-{edit[3]}")
def test_edits_of_the_plan(edit: tuple[str, int | None, str, float], fake: Fake, tiny_model: Maker) -> None:
    """What an operation reads from its step it reads on the device too; and it does something."""
    model = tiny_model(FULL, "safetensors")
    host, device, plain = _core.Run(model, edits=[edit]), cuda(model, edits=[edit]), _core.Run(model)
    moved = False
    for ids in (IDS, [7], [8]):
        made, right = host.forward(ids, "all"), plain.forward(ids, "all")
        same(device.forward(ids, "all"), made, len(ids))
        moved |= any(parity.unequal(made[key], right[key]).any() for key in made)
    assert moved


@BOTH
def test_overrides_and_feeds(fake: Fake, tiny_model: Maker) -> None:
    model = tiny_model(FULL, "safetensors")
    generator = np.random.default_rng(0)
    other = {
        ("ffn_up", 0): generator.normal(size=(160, 64)).astype(np.float32),
        ("attn_norm", 1): generator.normal(size=64).astype(np.float32),
    }
    host, device = _core.Run(model, overrides=other), cuda(model, overrides=other)
    for ids in (IDS, [7]):
        same(device.forward(ids, "all"), host.forward(ids, "all"), len(ids))
    for ids in ([1, 2], [3]):  # in a graph there is no place for a value that comes from the host
        for stage in ("ffn_gate", "k_cache", "attn_scores", "v_cache", "embedding"):
            layer = None if stage == "embedding" else 1
            shape = host.replay(ids, [(stage, layer)])[stage, layer].shape
            feed = {(stage, layer): generator.normal(size=shape).astype(np.float32)}
            same(device.replay(ids, "all", feed), host.replay(ids, "all", feed), stage)


def test_nan_stays(fake: Fake, tiny_model: Maker) -> None:
    model = tiny_model(FULL, "safetensors")
    x = np.ones((3, 64), np.float32)
    x[1, 5] = np.nan
    feed = {("embedding", None): x}
    host = _core.Run(model).replay([1, 2, 3], "all", feed)
    same(cuda(model).replay([1, 2, 3], "all", feed), host)
    assert np.isnan(host[LOGITS][1]).all()


@BOTH
def test_a_long_context(fake: Fake, tiny_model: Maker) -> None:
    """More keys than a block of any kernel has threads (256), so that every loop over keys goes round; and the cache grows twice."""
    model = tiny_model(tiny.Shape("qwen2", layers=1), "gguf")
    ids = list(np.random.default_rng(3).integers(0, 112, 300))
    host, device = _core.Run(model), cuda(model)
    keep = [("attn_scores", 0), ("attn_softmax", 0), ("attention", 0), ("k_cache", 0), LOGITS]
    for piece in (ids[:40], ids[40:60], ids[60:280], ids[280:281], ids[281:]):
        same(device.forward(piece, keep), host.forward(piece, keep), len(piece))


@BOTH
def test_no_race_and_no_divergence(fake: Fake, tiny_model: Maker) -> None:
    """Threads and blocks in reverse order: the same bits.  (A missing barrier changes them: test_faults.)"""
    model = tiny_model(FULL, "safetensors")
    forward = cuda(model).forward(IDS, "all")
    fake.reverse(True)
    same(cuda(model).forward(IDS, "all"), forward)


# ---- how the device is used ----------------------------------------------------------------------------------------------------------


def test_captures_cost_one_copy(fake: Fake, tiny_model: Maker) -> None:
    """One copy of the kept arena, and nothing waits for a stage: as many waits whatever is kept."""
    run = cuda(tiny_model(FULL, "safetensors"), "eager")
    run.forward(IDS, "all")  # room for everything
    counts = []
    for keep in ([LOGITS], "all"):
        before = {name: fake.calls(name) for name in ("fetch", "wait", "done", "upload", "launch")}
        run.replay(IDS, keep)
        counts.append({name: fake.calls(name) - before[name] for name in before})
    for count in counts:
        assert (count["fetch"], count["upload"]) == (1, 1)  # the arena; the tokens
        assert count["wait"] + count["done"] == 3
    assert (
        counts[1]["launch"] - counts[0]["launch"] == 4
    )  # kept caches are copied into the arena on the device: two layers, keys and values


@BOTH
def test_decoding_is_a_graph(fake: Fake, tiny_model: Maker) -> None:
    """Built once, run once a token, with new arguments where something moved; what is kept and how it is run does not change the bits."""
    model = tiny_model(FULL, "safetensors")
    run, eager = cuda(model), cuda(model, "eager")
    assert (run.mode, eager.mode) == ("auto", "eager")
    counted = ("graph_new", "graph_run", "launch", "graph_set")
    for side in (run, eager):
        side.forward(IDS, [LOGITS])
        assert re.fullmatch(r"\d+ kernels, one by one", str(side.path))
    before = {name: fake.calls(name) for name in counted}
    for token in range(5):
        graphed = run.forward([token], [LOGITS])
        assert re.fullmatch(r"a graph of \d+ kernels", str(run.path))
        assert fake.calls("launch") == before["launch"]
        same(graphed, eager.forward([token], [LOGITS]), token)
        assert re.fullmatch(r"\d+ kernels, one by one", str(eager.path))
        assert str(run.path).split()[3] == str(eager.path).split()[0]
        before["launch"] = fake.calls("launch")
    one = 2 + int(str(run.path).split()[3]) if "runtime" in fake.path.name else 1  # CUDA makes a graph, each node of it, and what is run
    assert fake.calls("graph_new") - before["graph_new"] == one
    assert fake.calls("graph_run") - before["graph_run"] == 5
    assert fake.calls("graph_set") > before["graph_set"]
    kept, plain = cuda(model), cuda(model)
    for ids in (IDS, [1], [2], [3]):
        assert not parity.unequal(kept.forward(ids, "all")[LOGITS], plain.forward(ids, [LOGITS])[LOGITS]).any()


@BOTH
def test_one_upload_for_all_runs_of_a_model(fake: Fake, tiny_model: Maker) -> None:
    model = tiny_model(FULL, "safetensors")
    first = cuda(model)
    one, uploads = fake.live, fake.calls("upload")
    second = cuda(model)
    assert (fake.live, fake.calls("upload")) == (one, uploads)
    del first
    assert len(second.forward(IDS, "all")) > 20  # the weights are still there
    third = cuda(model, overrides={("attn_norm", 1): np.ones(64, np.float32)})
    assert fake.calls("upload") > uploads  # other weights
    del second, third
    assert fake.live == 0


def test_a_tied_head_is_uploaded_once(fake: Fake, tiny_model: Maker) -> None:
    sizes = []
    for tied in (False, True):
        run = cuda(tiny_model(tiny.Shape("llama", tied=tied), "gguf"))
        sizes.append(fake.live)
        del run
    assert sizes[0] - sizes[1] == 112 * 64 * 4  # the head: vocabulary x width in F32; a multiple of 256 bytes


def test_weights_stay_quantized(fake: Fake, tiny_model: Maker) -> None:
    sizes = {}
    for formats in ("F32", "Q4_0"):
        run = cuda(tiny_model(tiny.Shape("llama"), "gguf", formats))
        sizes[formats] = fake.live
        del run
    assert sizes["F32"] / sizes["Q4_0"] > 6  # 32 bits against 4.5, less norms, guards and alignment


def test_the_host_never_touches_device_memory(libraries: dict[str, Path]) -> None:
    """Device memory is locked while no kernel runs: a host read of it ends the process."""
    code = f"""
import ctypes, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from aprender import _core
import aprender
device = ctypes.CDLL({str(libraries["fake"])!r})
device.ap_fake_lock(1)
run = _core.Run(_core.Model(_core.File(aprender.canary())), backend="cuda")
for ids in ([261, 374, 220], [17], [10]):
    assert len(run.forward(ids, "all")) == 80
print("fine")
if len(sys.argv) > 1:
    device.ap_fake_scribble(0, 0)   # as a host that forgets where its buffers are
"""
    env = os.environ | {"APRENDER_CUDA_LIBRARY": str(libraries["fake"])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr[-2000:]
    dead = subprocess.run([sys.executable, "-c", code, "and touch"], capture_output=True, text=True, check=False, env=env)
    assert dead.returncode == -signal.SIGSEGV


# ---- errors --------------------------------------------------------------------------------------------------------------------------


def attempt(model: _core.Model, count: Callable[[], int] = int) -> Exception | int:
    """What a hunt does of a device: the error, or the count before the run is closed (where no error can be told to anybody)."""
    try:
        run = cuda(model)
        for ids in (IDS[:3], [7], [8], list(range(60))):  # eager, a graph, the graph again, and a cache that grows
            run.forward(ids, [LOGITS])
        return count()
    except Exception as problem:
        return problem.with_traceback(None)


@BOTH
@pytest.mark.parametrize("call", TABLE)
def test_each_call_may_fail(call: str, fake: Fake, tiny_model: Maker) -> None:
    """An error in any call is one DeviceError that names device and call; nothing leaks; what comes after is right."""
    model = tiny_model(tiny.Shape("qwen2", layers=1), "gguf")
    total = attempt(model, lambda: fake.calls(call))
    assert isinstance(total, int)
    assert total > 0
    for nth in sorted({*range(1, min(total, 6) + 1), total // 2, total} - {0}):
        for code in (INVALID, FULL_UP):
            fake.fail(call, nth, code)
            problem = attempt(model)
            assert isinstance(problem, DeviceError), (call, nth, code)
            assert len(str(problem).splitlines()) == 1
            if code == FULL_UP and call != "count":
                assert isinstance(problem, DeviceMemoryError)
                assert "are free" in str(problem)
            else:
                assert ("invalid argument" if code == INVALID else "out of memory") in str(problem)
                named = str(problem.field)
                assert call in (named, "count", "kernel") or (call, named) == ("wait", "upload")  # through the runtime, an upload waits
            del problem
            gc.collect()
            assert (fake.live, fake.handles) == (0, 0), (call, nth, code)
    host = _core.Run(model).forward(IDS, "all")
    same(cuda(model).forward(IDS, "all"), host)


def test_words_of_the_runtime(libraries: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tiny_model: Maker) -> None:
    """Too old a driver is told so; too little memory is forgotten by the runtime once it was told, as no other error is."""
    if NVCC is None:
        pytest.skip("no nvcc: no headers of CUDA")
    monkeypatch.setenv("APRENDER_CUDA_LIBRARY", str(libraries["fake_runtime"]))
    device, model = Fake(libraries["fake_runtime"]), tiny_model(tiny.Shape(), "gguf")
    device.reset()
    device.fail("count", 1, 35)  # cudaErrorInsufficientDriver
    with pytest.raises(DeviceError, match="no NVIDIA driver is installed, or it is too old for this CUDA runtime"):
        cuda(model)
    for code, left in ((FULL_UP, 35), (INVALID, INVALID)):
        device.fail("get", 1, code)
        with pytest.raises(DeviceError):
            cuda(model)
        assert device.last == (0 if code == FULL_UP else left)


LOST = """
import ctypes, sys
sys.path.insert(0, {tests!r})
from aprender import _core
from aprender.errors import DeviceError
import aprender
device = ctypes.CDLL({library!r})
device.ap_fake_fail.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
model = _core.Model(_core.File(aprender.canary()))
run = _core.Run(model, backend="cuda", mode={mode!r})
run.forward([1, 2, 3], [("lm_head", None)])
device.ap_fake_fail(b"kernel", {nth}, 700)
for act in (lambda: run.forward([4, 5], [("lm_head", None)]), lambda: run.forward([4], "all"), lambda: _core.Run(model, backend="cuda")):
    try:
        act()
    except DeviceError as problem:
        print(problem.stage, problem.layer, problem.code, problem)
    else:
        print("nothing raised")
device.ap_fake_reset()                      # the device may be well again; the process may not use it
try:
    _core.Run(model, backend="cuda")
except DeviceError as problem:
    print("still", problem)
print(len(_core.Run(model).forward([1], "all")))
"""


@BOTH
@pytest.mark.parametrize(("mode", "where"), [("checked", "in ffn_norm of layer 1"), ("eager", "at or before lm_head")])
def test_a_lost_device_is_refused_for_good(mode: str, where: str, fake: Fake) -> None:
    """An illegal address in a kernel: named with its breadcrumb; afterwards one clear error, and the CPU goes on."""
    layer = [step["stage"] for step in _core.Run(_core.Model(_core.File(CANARY / "canary.gguf"))).plan(2) if step["layer"] == 1]
    kernels = {"qkv_matmul": 3, "qkv_bias": 3}  # one for each of q, k and v; one for every other stage
    first = 2 + sum(kernels.get(stage, 1) for stage in layer)  # embedding, table, layer 0
    nth = first + sum(kernels.get(stage, 1) for stage in layer[: layer.index("ffn_norm") + 1])
    code = LOST.format(tests=str(ROOT / "tests"), library=str(fake.path), mode=mode, nth=nth)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    first_line, *more = done.stdout.splitlines()
    assert f"illegal memory access was encountered, {where}" in first_line
    assert "the device is lost to this process" in first_line
    assert first_line.startswith("ffn_norm 1 DEVICE" if mode == "checked" else "lm_head None DEVICE")
    assert [("was lost to this process earlier" in line) for line in more[:3]] == [True] * 3
    assert more[2].startswith("still")
    assert more[3] == "80"


@BOTH
def test_memory_is_planned_before_it_is_asked_for(fake: Fake, tiny_model: Maker) -> None:
    model = tiny_model(FULL, "safetensors")
    run = cuda(model)
    run.forward([1], [LOGITS])
    fake.memory(fake.live + 100_000)
    before = fake.calls("get")
    with pytest.raises(DeviceMemoryError, match=r"needs \d+\.\d MB \((\d+) bytes\).*where \d+\.\d MB \((\d+) bytes\).*are free") as caught:
        run.forward(IDS * 10, "all")
    assert (fake.calls("get"), caught.value.code, run.position) == (before, "DEVICE_MEMORY", 1)
    need, free = map(int, re.findall(r"\((\d+) bytes\)", str(caught.value)))
    assert need > free == 100_000
    assert isinstance(caught.value, MemoryError)
    assert len(run.forward([2, 3], [LOGITS])) == 1  # a smaller request runs
    fake.memory(fake.live + 1000)
    other = tiny_model(tiny.Shape("llama"), "gguf")
    with pytest.raises(DeviceMemoryError, match="needs"):
        cuda(other)


@BOTH
def test_a_write_beside_a_buffer_is_seen(fake: Fake, tiny_model: Maker) -> None:
    """Guards lie round every buffer; in checked mode they are looked at after each kernel."""
    run = cuda(tiny_model(FULL, "safetensors"), "checked")
    run.replay([1], "all")  # a replay stays where it is, so that no buffer grows and the newest one stays the newest
    for at, where in ((255, "before"), (-256, "behind")):  # the last byte of the guard before, the first of the one behind: 256 bytes each
        assert fake.scribble(at, 0) == 0xA5
        with pytest.raises(DeviceError, match=rf"wrote {where} the buffer of .*, in embedding"):
            run.replay([2], "all")
        assert fake.scribble(at, 0xA5) == 0
        run.replay([2], "all")


def plugin(folder: Path, code: str) -> Path:
    """A library made of a line of C."""
    (folder / "p.c").write_text(code)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "p.so", folder / "p.c"], check=True)
    return folder / "p.so"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (None, "built without it: there is no .*make cuda"),
        ("not a library", "cannot be loaded: .*invalid ELF header|file too short"),
        ("int x;", "has no ap_backend_cuda"),
        ("unsigned long ap_backend_cuda[4] = { 1 };", r"built from other tables \(0000000000000001, this extension has [0-9a-f]{16}\)"),
    ],
    ids=["missing", "no library", "another library", "other tables"],
)
def test_a_library_that_cannot_be_used(
    code: str | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    """One clear line within 2 s, and no CPU in its place."""
    path = tmp_path / "none.so"
    if code == "not a library":
        path.write_bytes(b"hello" * 20)
    elif code:
        path = plugin(tmp_path, code)
    monkeypatch.setenv("APRENDER_CUDA_LIBRARY", str(path))
    model, begun = tiny_model(tiny.Shape(), "gguf"), time.monotonic()
    with pytest.raises(DeviceError, match=says) as caught:
        cuda(model)
    assert (caught.value.code, caught.value.field) == ("DEVICE", "cuda")
    assert (_core.cuda()["built"], _core.cuda()["devices"]) == (False, [])
    with pytest.raises(DeviceError, match=says):
        open_side(f"cuda:{CANARY / 'canary.gguf'}")
    assert bisect.main([f"cuda:{CANARY / 'canary.gguf'}"]) == 3
    assert time.monotonic() - begun < 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)


@BOTH
def test_a_library_without_a_device(fake: Fake, tiny_model: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    """Built, and yet nothing to run on: two facts."""
    fake.devices(0)
    with pytest.raises(DeviceError, match="cuda: there is no device to use: no CUDA-capable device is detected"):
        cuda(tiny_model(tiny.Shape(), "gguf"))
    said = _core.cuda()
    assert (said["built"], said["devices"], said["reason"]) == (True, [], "no CUDA-capable device is detected")
    assert info.main([str(CANARY / "canary.gguf")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"CUDA backend +built", out)
    assert re.search(r"CUDA device +none: no CUDA-capable device is detected", out)
    fake.devices(1)
    assert _core.cuda()["reason"] is None


@pytest.mark.parametrize(("option", "value"), [("backend", "tpu"), ("mode", "fast")])
def test_unknown_options(option: str, value: str, tiny_model: Maker) -> None:
    with pytest.raises(UnknownName, match=f"no {option} {value}"):
        _core.Run(tiny_model(tiny.Shape(), "gguf"), **{option: value})
    with pytest.raises(UnknownName):
        OwnSide(CANARY / "canary.gguf", backend="tpu")


def test_bad_requests_are_refused_as_on_the_cpu(fake: Fake, tiny_model: Maker) -> None:
    run = cuda(tiny_model(FULL, "safetensors"))
    with pytest.raises(ArgumentError, match="vocabulary"):
        run.forward([112])
    with pytest.raises(ArgumentError):
        run.forward([])
    assert run.position == 0


# ---- as a side -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_canary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The canary as a GGUF in F32, as the engine of the story held it."""
    path = tmp_path_factory.mktemp("cuda") / "canary-F32.gguf"
    subprocess.run([sys.executable, "-m", "aprender.convert", CANARY, path, "--formats", "F32", "-q"], check=True, cwd=ROOT)
    return path


def test_manifest_names_device_and_path(fake: Fake) -> None:
    side = open_side(f"cuda:{CANARY / 'canary.gguf'}")
    said = side.capture_pieces([*PROMPT, 220, 17], [len(PROMPT), 1, 1]).manifest
    assert (said.backend, said.tier, said.profile, said.attestation) == ("cuda", "fake device in host memory sm_00", "exact-cuda", True)
    (note,) = said.notes
    assert re.search(r"7 tokens: (\d+) kernels, one by one; 2 times 1 token: a graph of \1 kernels$", note)
    assert side.generate(PROMPT, 8) == open_side(CANARY / "canary.gguf").generate(PROMPT, 8)
    side.close()


def test_what_nobody_has_measured_is_judged_by_noise_alone(fake: Fake) -> None:
    """One float32 step is wrong where every bit is declared, and noise where the row was not measured; 1e-3 is always wrong."""
    side = open_side(f"cuda:{CANARY / 'canary.gguf'}")
    made, model = side.capture(PROMPT), ModelData(**side.model_data())
    for key, relative, states in (
        (("ffn_up", 1), 2.0**-23, ("wrong", "noise")),
        (("ffn_up", 1), 1e-3, ("wrong", "wrong")),
        (("k_cache", 1), 2.0**-23, ("wrong", "wrong")),  # a copy: no arithmetic rounds it
        (("ffn_up", 1), 0.0, ("exact", "noise")),
    ):
        arrays = dict(made)
        arrays[key] = np.array(made[key])
        arrays[key][2, 5] *= np.float32(1 + relative)
        found = []
        for profile in ("exact", "exact-cuda"):
            (result,) = (r for r in local(Captures(arrays, made.manifest), model, arithmetic.profile(profile)) if r.key == key)
            found.append(result.state)
        assert tuple(found) == states, (key, relative)


def test_parity_is_a_command(fake: Fake, plain_canary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every stage of the prompt and of each decoded token, held against the CPU: all bits; the report says what ran."""
    report = bisection.compare(f"cuda:{plain_canary}", f"cpu:{plain_canary}", steps=4, answer=0)
    assert report.verdict == "agree"
    assert {row.operation for row in report.operations} == {row[0] for row in _core.OPS}
    assert all(row.equal == row.values > 0 for row in report.operations)
    rows = sum(row.tensors for row in report.operations)
    assert rows == len(stages.keys(OwnSide(plain_canary).model.flags, 4))
    assert any("arithmetic model not validated" in note for note in report.notes)
    assert any("graph of" in note for note in report.notes)
    assert any(f"of {rows} stages are the same bits on both" in note for note in report.notes)
    schema = (ROOT / "evidence" / "schema" / "bisect-1.json").read_text()
    jsonschema.Draft202012Validator(json.loads(schema)).validate(json.loads(json.dumps(report.to_json())))
    assert bisect.main([f"cuda:{plain_canary}", "--against", f"cpu:{plain_canary}", "--steps", "2", "--answer", "0"]) == 0
    assert re.search(r"MATMUL +21 +\d+ +\d+ +0", capsys.readouterr().out)


def test_parity_counts_bits(tiny_model: Maker, tmp_path: Path) -> None:
    """One bit of one value of token 4 is one value that differs, from token 4 on; NaN and NaN do not differ, NaN and a number do."""
    side = OwnSide(write_folder(tmp_path / "m", FULL))
    captures = side.capture(IDS)
    arrays = {key: np.array(captures[key]) for key in captures}
    arrays["ffn_silu", 1][4, 7] = np.nextafter(arrays["ffn_silu", 1][4, 7], np.float32(9))
    arrays["ffn_up", 0][2, 0] = np.nan
    other = Captures(arrays, captures.manifest)
    rows = {row.operation: row for row in parity.table(other, captures)}
    silu, mul, matmul = rows["SILU"], rows["MUL"], rows["MATMUL"]
    assert (silu.values - silu.equal, silu.token, silu.stage) == (1, 4, "1.ffn_silu")
    assert (mul.equal, mul.rel_l2, mul.stage, mul.token) == (mul.values, 0.0, None, None)
    assert (matmul.values - matmul.equal, matmul.token, matmul.stage, matmul.rel_l2) == (1, 2, "0.ffn_up", None)
    assert "2 of" in parity.sentence(parity.table(other, captures))
    assert "the first at token 2, in MATMUL, SILU" in parity.sentence(parity.table(other, captures))
    assert all(row.equal == row.values for row in parity.table(other, other))


# ---- faults that sit in kernels and graphs -------------------------------------------------------------------------------------------


def test_the_shipped_library_holds_no_fault(libraries: dict[str, Path]) -> None:
    switch = b"APRENDER_CUDA_FAULT"
    assert switch in libraries["fake_faults"].read_bytes()
    assert switch not in libraries["fake"].read_bytes()
    shipped = ROOT / "aprender" / "libaprender_cuda.so"
    assert not shipped.exists() or switch not in shipped.read_bytes()


def test_without_a_fault_the_test_library_is_right(faulty: Callable[[str | None], Fake], plain_canary: Path) -> None:
    faulty(None)
    report = bisection.compare(f"cuda:{plain_canary}", f"cpu:{plain_canary}", steps=2, answer=0)
    assert report.verdict == "agree"


LINEAR = ("qkv_matmul", "attn_out", "ffn_gate", "ffn_up", "ffn_out", "lm_head")


@pytest.mark.parametrize("stage", LINEAR)
def test_a_transposed_gemv_is_named(stage: str, faulty: Callable[[str | None], Fake], plain_canary: Path) -> None:
    """The story: the GEMV of float32 weights reads a matrix as [in, out]; one run names the stage and the kind."""
    faulty(f"transposed@{stage}")
    report = bisection.compare(f"cuda:{plain_canary}", answer=8 if stage == "lm_head" else 0)
    assert (report.verdict, report.first.stage if report.first else None) == ("divergence", stage)
    assert report.first is not None
    assert report.first.kind == "transposed"
    if stage == "lm_head":
        assert report.exit_code == 1
        assert dict(report.answers)["answer"] != "' 2+2 is 4.'"


@pytest.mark.parametrize("stage", ["attn_norm", "qkv_matmul", "attn_softmax", "ffn_out", "lm_head"])
def test_a_missing_barrier_is_named(stage: str, faulty: Callable[[str | None], Fake], plain_canary: Path) -> None:
    """The threads that read run before the one that writes; on a GPU one order or the other is a matter of luck."""
    faulty(f"race@{stage}").reverse(True)
    report = bisection.compare(f"cuda:{plain_canary}", f"cpu:{plain_canary}", answer=0)
    assert report.first is not None
    assert (report.verdict, report.first.side, report.first.stage) == ("divergence", "subject", stage)


@pytest.mark.parametrize("stage", ["qkv_matmul", "ffn_up", "ffn_out", "lm_head"])
def test_a_wrong_stride_at_a_tile_edge_is_named(stage: str, faulty: Callable[[str | None], Fake], tmp_path: Path) -> None:
    """Widths of 64 and 160 end inside a tile of 256 columns; one token alone has no second row to be misplaced."""
    path = tiny.save_gguf(tiny.Shape("qwen2"), tmp_path / "m.gguf")
    faulty(f"stride@{stage}")
    report = bisection.compare(f"cuda:{path}", f"cpu:{path}", prompt_ids=IDS, answer=0)
    assert report.first is not None
    assert (report.verdict, report.first.side, report.first.stage) == ("divergence", "subject", stage)
    assert bisection.compare(f"cuda:{path}", f"cpu:{path}", prompt_ids=IDS[:1], answer=0).verdict == "agree"


GRAPH_FAULTS = {
    "unrecorded@ffn_up": "ffn_up",
    "unrecorded@k_post_rope": "k_post_rope",
    "unrecorded@lm_head": "lm_head",
    "stale@rope_table": "rope_table",
    "stale@k_cache": "k_cache",
    "stale@attn_scores": "v_cache",  # writes where the scores of the token before lay, one key fewer: the end of what is kept before them
}
"""Fault to the stage that is wrong first."""


@pytest.mark.parametrize("fault", GRAPH_FAULTS)
def test_a_fault_of_the_graph_is_named(fault: str, faulty: Callable[[str | None], Fake], plain_canary: Path) -> None:
    """Seen only where single tokens are decoded: the prompt in one piece is right.  What the graph leaves is not what its kernels leave
    when they are run one by one, which is told first; then the stage.
    """
    faulty(fault)
    stage = GRAPH_FAULTS[fault]
    report = bisection.compare(f"cuda:{plain_canary}", f"cpu:{plain_canary}", steps=3, answer=0)
    assert (report.verdict, report.judged.finding) == ("divergence", "heisenbug")
    assert {(fault.side, fault.stage) for fault in report.judged.wrong[1:2]} == {("subject", stage)}
    assert f"{stage} of " in report.sentence
    assert bisection.compare(f"cuda:{plain_canary}", f"cpu:{plain_canary}", answer=0).verdict == "agree"


# ---- the first day with a device -----------------------------------------------------------------------------------------------------


def test_the_script_of_the_first_day_runs(libraries: dict[str, Path], tmp_path: Path) -> None:
    """On the fake device: what it will measure on a GPU comes out as declared, and the record is written."""
    words = [sys.executable, ROOT / "scripts" / "first_gpu_day.py", "build", "arithmetic", "--fake", "--out", tmp_path / "day"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = [json.loads(line) for line in (tmp_path / "day" / "arithmetic.jsonl").read_text().splitlines()]
    assert len(cases) == 7
    assert all(case["measured"] == case["declared"] != case["otherwise"] for case in cases)
    assert "| arithmetic | done |" in (tmp_path / "day" / "README.md").read_text()


# ---- where nvcc or a device is ---------------------------------------------------------------------------------------------------------

EXACT = re.compile(
    r"(add|sub|mul|fma|div|rcp|sqrt)\.rn\.f(32|64)|(neg|abs|mov)\.f(32|64)|setp\.\w+\.f(32|64)|selp\.f(32|64)|cvt\.(rn|rzi)?\.?\w+\.\w+"
)
"""Instructions of PTX on floating-point numbers that IEEE 754 defines to the bit: rounded to nearest, not flushed, not approximate."""
INEXACT = re.compile(r"\.ftz|\.approx|\.full|\.sat|^(atom|red|ex2|lg2|sin|cos|tanh|rsqrt)\b")


def instructions(ptx: str) -> set[str]:
    """Every instruction that occurs: of a line that ends in a semicolon the first word, less a predicate."""
    return {found[1] for line in ptx.splitlines() if (found := re.match(r"\s+(?:@!?%\w+\s+)?([a-z]\w*(?:\.\w+)+)\s", line)) and ";" in line}


def inexact(found: set[str]) -> set[str]:
    """Those that may give other bits than the CPU, or other bits each time."""
    floats = {name for name in found if re.search(r"\.f(16|32|64)\b", name) and not name.startswith(("ld.", "st.", "mov."))}
    return {name for name in found if INEXACT.search(name)} | {name for name in floats if not EXACT.fullmatch(name)}


def compiled(source: Path, folder: Path, *flags: str) -> str:
    """PTX of the oldest architecture: all that a compiler can say without a device."""
    words = [str(NVCC), *flags, "-ptx", "-arch=compute_80", source, "-o", folder / "out.ptx"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return (folder / "out.ptx").read_text()


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_nvcc_makes_exact_code_of_every_kernel(tmp_path: Path) -> None:
    """With the flags that the library is built with: no atomic, no approximation, no flush to zero, no contraction."""
    asked = subprocess.run(["make", "-s", "--eval=told:;@echo $(NVCC_FLAGS)", "told"], cwd=ROOT, capture_output=True, text=True, check=True)
    flags = [flag for flag in asked.stdout.split() if flag.startswith(("-std", "-O", "-fmad", "-ftz", "-prec"))]
    assert "-fmad=false" in flags
    ptx = compiled(ROOT / "csrc" / "cuda" / "all.cu", tmp_path, *flags)
    assert ptx.count(".entry") > 2 * len(_core.FORMATS)
    found = instructions(ptx)
    assert inexact(found) == set()
    assert {"fma.rn.f32", "sqrt.rn.f64", "div.rn.f64", "bar.sync"} <= found
    assert "fma.rn.f64" not in found  # float64 is never contracted: the CPU's has no fused operation either
    bodies = re.findall(r"\.entry [^(]*(el_silu|el_mul|rope_kernel)[^{]*\{(.*?)\n\}", ptx, re.DOTALL)
    assert len(bodies) == 3
    assert not any("fma" in body for _, body in bodies)


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize(
    ("line", "flags", "seen"),
    [
        ("atomicAdd(x, 1.0f);", (), r"(atom|red)\..*f32"),
        ("*x = __expf(*x);", (), r"ex2\.approx.*"),
        ("*x = *x / x[1];", ("-ftz=true", "-prec-div=false"), r"div.*(ftz|approx|full).*"),
        ("*x = *x + x[1];", ("-ftz=true",), r"add\.ftz\.f32"),
    ],
)
def test_inexact_code_would_be_seen(line: str, flags: tuple[str, ...], seen: str, tmp_path: Path) -> None:
    (tmp_path / "k.cu").write_text(f"__global__ void kernel(float *x) {{ {line} }}\n")
    assert any(re.match(seen, name) for name in inexact(instructions(compiled(tmp_path / "k.cu", tmp_path, *flags))))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """A real GPU, through the library that is shipped."""
    monkeypatch.delenv("APRENDER_CUDA_LIBRARY", raising=False)
    found = _core.cuda()
    if not found["built"]:
        pytest.skip("no nvcc has built the CUDA backend here: make cuda")
    if found["reason"] is not None:
        pytest.skip(f"no GPU: {found['reason']}")
    return found["devices"][0]


@pytest.mark.parametrize("mode", ["auto", "eager", "checked"])
@pytest.mark.parametrize("shape", tiny.SHAPES, ids=str)
def test_device_every_stage(shape: tiny.Shape, mode: str, device: str, tiny_model: Maker) -> None:
    model = tiny_model(shape, "safetensors")
    host, gpu = _core.Run(model), cuda(model, mode)
    for ids in PIECES:
        same(gpu.forward(ids, "all"), host.forward(ids, "all"), len(ids))


@pytest.mark.parametrize("row", _core.FORMATS, ids=lambda row: row[0])
def test_device_every_format(row: Any, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stored(row, tmp_path, monkeypatch)
    every = [list(range(int(model.hparams["vocab"]))), [("embedding", None)]]
    same(cuda(model).replay(*every), _core.Run(model).replay(*every))
    x = np.random.default_rng(1).normal(size=(11, int(model.hparams["dim"]))).astype(np.float32)
    for rows in (1, 11):
        feed = {("final_norm", None): x[:rows]}
        same(cuda(model).replay([0] * rows, [LOGITS], feed), _core.Run(model).replay([0] * rows, [LOGITS], feed), rows)


def test_device_parity(device: str, plain_canary: Path) -> None:
    for path in (plain_canary, CANARY / "canary.gguf"):
        report = bisection.compare(f"cuda:{path}", f"cpu:{path}", steps=8, answer=0, probe="all")
        assert report.verdict == "agree"
        assert all(row.equal == row.values for row in report.operations)


@pytest.mark.parametrize("fault", [f"transposed@{stage}" for stage in LINEAR] + list(GRAPH_FAULTS))
def test_device_faults(fault: str, device: str, plain_canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = BUILD / "libaprender_cuda_faults.so"
    if not library.exists():
        pytest.skip("no nvcc has built the faults here: make cuda-faults")
    monkeypatch.setenv("APRENDER_CUDA_LIBRARY", str(library))
    monkeypatch.setenv("APRENDER_CUDA_FAULT", fault)
    report = bisection.compare(f"cuda:{plain_canary}", f"cpu:{plain_canary}", steps=3, answer=0)
    assert report.verdict == "divergence"
    assert report.first is not None
    assert GRAPH_FAULTS.get(fault, fault.partition("@")[2]) in {wrong.stage for wrong in report.judged.wrong[:2]}
