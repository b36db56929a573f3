"""Hugging Face transformers on the CPU as a side: the oracle.

Owns the loading of a model from a local folder or the hub, what it is (flags, hyper-parameters, weights as loaded, after the cast), its
captures with path attestation, and greedy text.  Refuses what the stage table does not describe (by name), remote code, pickled weights,
checkpoints with missing or left-over tensors (transformers would fill the gaps with random numbers), and quantised checkpoints.  Threads,
torch settings and hub settings are left as they are.  Called by ``sides.open_side`` and the ``oracle`` command.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from logging import ERROR
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers.utils import cached_file, logging

from aprender import _core, arithmetic, stages
from aprender.captures import Captures
from aprender.errors import CannotRun, ConfigError, Error
from aprender.manifest import HELD, Manifest, TensorNote
from aprender.sides import hf_held, hf_pieces, torch_order
from aprender.sides.base import Progress, checked_ids
from aprender.sides.hf_record import EAGER, SDPA, TRACED, Recorder, Site, inside_attention, same_bits
from aprender.stages import Key, Selection
from aprender.text import Tokenizer, from_json

Array = NDArray[np.float32]

PROFILES: Mapping[str, str] = {"float32": "hf-f32", "float16": "hf-f16", "bfloat16": "hf-bf16"}
"""dtype to the row of :mod:`aprender.arithmetic` that eager attention has with it; that of sdpa has ``-sdpa`` after it."""

OPTIONS: Mapping[str, Callable[[Any], bool]] = {
    "UNTIED": lambda config: not config.tie_word_embeddings,
    "QKV_BIAS": lambda config: bool(getattr(config, "attention_bias", False)),
    "O_BIAS": lambda config: bool(getattr(config, "attention_bias", False)),
}
"""What decides a flag that an architecture leaves to config.json."""

# Entries of config.json that change the forward pass into one that the stage table does not describe: name, accepted, what it would mean.
REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("quantization_config", lambda value: value is None, "a checkpoint quantised by GPTQ, AWQ, bitsandbytes or FP8 blocks"),
    ("hidden_act", lambda value: value == "silu", "another activation"),
    ("layer_types", lambda value: value is None or set(value) == {"full_attention"}, "sliding-window attention"),
    ("rope_parameters", lambda value: value["rope_type"] == "default", "RoPE scaling"),
    ("partial_rotary_factor", lambda value: value in (None, 1, 1.0), "RoPE on a part of each head"),
    ("pretraining_tp", lambda value: value in (None, 1), "sliced projections"),
)


class HFSide:
    """A transformers model, its attention eager unless the declared arithmetic says sdpa (:meth:`declare`).

    Parameters
    ----------
    name : str
        Folder with config.json and safetensors, or a name on the hub (``Qwen/Qwen2.5-0.5B``).
    dtype : str
        ``float16``, ``bfloat16`` or ``float32``: weights are cast on loading, RoPE frequencies stay float32.
    spelling : str, optional
        How the user wrote it.

    Raises
    ------
    CannotRun
        The model is not there, or cannot be fetched.
    ConfigError
        An architecture, a configuration or a set of tensors that the stage table does not describe.
    """

    def __init__(self, name: str, dtype: str = "float16", spelling: str | None = None) -> None:
        self.name = name
        self.dtype = dtype
        self.spelling = spelling or f"hf:{name}@{dtype}"
        self.profile, self.attention = arithmetic.profile(PROFILES[dtype]), EAGER
        self.offline = _offline(name)
        self.config = _load_config(name, self.offline)
        self.arch, self.flags = _described(self.config, name)
        self.hparams = _hparams(self.config)
        self.model = _load_model(name, self.config, dtype, self.offline)
        self._names = _bound(self.model, self.flags, int(self.hparams["layers"]), name)

    # -- the forward pass --

    def declare(self, declared: arithmetic.Profile) -> None:
        """Run attention as a declared arithmetic of this dtype does, eager or as one kernel (sdpa); another eager row changes nothing here.

        Raises
        ------
        CannotRun
            One kernel, and of another dtype.
        """
        if PROFILES[self.dtype] not in (declared.name, declared.name.removesuffix(f"-{SDPA}")):
            if declared.fused:
                text = f"{self.spelling} cannot be run as {declared.name}: its numbers are {self.dtype}; open it in the other dtype"
                raise CannotRun(text, code="ARGUMENT", field="arithmetic")
            return
        self.profile, self.attention = declared, SDPA if declared.fused else EAGER
        self.model.set_attn_implementation(self.attention)

    def keys(self) -> list[Key]:
        """Every stage that it shows, in execution order: what is inside a fused kernel is not."""
        every = stages.keys(self.flags, int(self.hparams["layers"]))
        return every if self.attention == EAGER else [key for key in every if not inside_attention(stages.by_name[key[0]])]

    def capture(self, ids: Sequence[int], keep: Selection | None = None, progress: Progress | None = None) -> Captures:
        """Run a sequence in one go from position 0 and hand out the selected stages (all if not given).

        The pass is run twice: with hooks and the registered attention function, and as transformers runs it by itself, which is what makes
        the text.  Whether the logits of the two are bit-equal is the manifest's ``attestation``; which path of attention it was stands in
        its ``arithmetic``.  With sdpa the scores and the probabilities are never formed, and are not among the captures.

        Parameters
        ----------
        ids : sequence of int
        keep : callable, optional
            (stage, layer) to bool.
        progress : callable, optional
            Called with the share of layers done.

        Raises
        ------
        ArgumentError
            No ids, or one outside the vocabulary.
        """
        ids = checked_ids(ids, int(self.hparams["vocab"]))
        every = self.keys()
        wanted = frozenset(key for key in every if keep is None or keep(key))
        recorder = Recorder(self.model, wanted, self.flags, progress)
        with self._traced(), recorder:
            hooked = self._forward(ids)[0]
        attested = same_bits(hooked, self._forward(ids)[0])
        arrays, notes = self._arrays(recorder, [key for key in every if key in wanted], len(ids))
        return Captures(arrays, self._manifest(ids, notes, attested))

    def capture_pieces(self, ids: Sequence[int], sizes: Sequence[int]) -> Captures:
        """Run a sequence in pieces on transformers' own cache: all stages as one sequence, with the pieces kept."""
        return hf_pieces.capture_pieces(self, ids, sizes)

    def capture_end(self, ids: Sequence[int], count: int) -> Captures:
        """All stages of the last ``count`` ids, run on the cache of those before, whose keys and values are its past."""
        return hf_pieces.capture_end(self, ids, count)

    def capture_batch(self, rows: Sequence[Sequence[int]], padding: str, single: int = 0) -> tuple[Captures, ...]:
        """Run sequences as one batch padded ``left`` or ``right``; each is handed out by itself, its padding dropped."""
        return hf_pieces.capture_batch(self, rows, padding, single)

    def rotary_table(self, positions: Sequence[int]) -> Captures:
        """What the rotary module gives for any positions: a capture of that one stage."""
        return hf_pieces.rotary_table(self, positions)

    def _forward(self, ids: Sequence[int], past: Any = None) -> tuple[torch.Tensor, Any]:
        """Logits [T, V] of the ids, and the cache after them."""
        with torch.inference_mode():
            out = self.model(input_ids=torch.tensor([list(ids)]), past_key_values=past, use_cache=True)
        return out.logits[0], out.past_key_values

    @contextlib.contextmanager
    def _traced(self) -> Iterator[None]:
        """Run with the registered attention function in place of the model's own."""
        self.model.set_attn_implementation(TRACED[self.attention])
        try:
            yield
        finally:
            self.model.set_attn_implementation(self.attention)

    def _arrays(
        self, recorder: Recorder, keys: Sequence[Key], tokens: int, held: int | None = None
    ) -> tuple[dict[Key, Array], dict[Key, TensorNote]]:
        """What was recorded, widened to float32, with its notes; shapes are checked against the table (``held``: keys in the cache)."""
        arrays, notes = {}, {}
        for key in keys:
            row = stages.by_name[key[0]]
            value = recorder.values.pop(key, None)
            shape = row.dims(self.hparams, tokens, held)
            if value is None or tuple(value.shape) != shape:
                found = "was not computed" if value is None else f"has shape {list(value.shape)}, {list(shape)} is needed"
                raise ConfigError(f"{stages.spell(key)} {found} by {type(self.model).__name__}", code="SHAPE", stage=key[0], layer=key[1])
            arrays[key] = value.float().numpy()
            dtype, site = str(value.dtype).removeprefix("torch."), row.hf.replace("{i}", str(key[1]))
            notes[key] = TensorNote.of(arrays[key], dtype=dtype, origin=recorder.origins[key], site=site)
        return arrays, notes

    def _manifest(
        self, ids: tuple[int, ...], notes: dict[Key, TensorNote], attested: bool | None, arithmetic: dict[str, Any] | None = None
    ) -> Manifest:
        where = Path(self.name)
        tokenizer = self.tokenizer()
        return Manifest(
            side=f"hf:{where.resolve().name if where.is_dir() else self.name}@{self.dtype}",
            tokens=ids,
            producer="transformers",
            version=f"{transformers.__version__}, torch {torch.__version__}",
            backend="cpu",
            tier=torch.backends.cpu.get_cpu_capability(),
            profile=self.profile.name,
            threads=torch.get_num_threads(),
            model_digest=self.digest,
            tokenizer_digest=tokenizer.digest if tokenizer else None,
            arch=self.arch,
            flags=self.flags,
            hparams=dict(self.hparams),
            attestation=attested,
            arithmetic=(self.arithmetic(len(ids)) if arithmetic is None else arithmetic) | {HELD: hf_held.held(self.model)},
            tensors=notes,
        )

    def arithmetic(self, tokens: int) -> dict[str, Any]:
        """What this machine does with so many tokens, as plain data.

        ``matmul`` is the order of accumulation, probed; ``inv_freq`` the type of the rotary frequencies; ``attention_path`` what runs.

        In float16 and bfloat16 the order is left open: the rounding of each output hides it, and the sums are far below that rounding.
        """
        found: dict[str, Any] = {"matmul": "envelope"}
        if self.dtype == "float32":
            found["matmul"] = torch_order.identify(self._products(tokens))
        rotary = next(row for row in stages.STAGES if row.hf.startswith("rope:"))
        buffer = self.model.get_submodule(Site.parse(rotary.hf, None).where[0]).inv_freq
        return found | {"inv_freq": str(buffer.dtype).removeprefix("torch."), "attention_path": self.attention}

    def _products(self, tokens: int) -> list[tuple[torch_order.Product, int, int, int]]:
        """(product, T, K, N) of every kind of product in the model, each once."""
        linear = {tuple(module.weight.shape) for module in self.model.modules() if isinstance(module, torch.nn.Linear)}
        heads, head = int(self.hparams["heads"]), int(self.hparams["head"])
        attention = [(torch_order.scores(heads), tokens, head, tokens), (torch_order.mix(heads), tokens, tokens, head)]
        attention = attention if self.attention == EAGER else []  # one kernel shows no product of its own
        return [(torch_order.projection, tokens, k, n) for n, k in sorted(linear)] + attention

    # -- the model as held --

    def model_data(self) -> dict[str, Any]:
        """``arch``, ``flags``, ``hparams`` and ``weights`` as this side computes with them: after the cast to its dtype."""
        return {"arch": self.arch, "flags": self.flags, "hparams": dict(self.hparams), "weights": HeldWeights(self.model, self._names)}

    @functools.cached_property
    def origin(self) -> Path | None:
        """The folder that the parameters were loaded from: config.json's."""
        path = _file(self.name, "config.json", self.offline)
        return path.parent if path else None

    @functools.cached_property
    def digest(self) -> str | None:
        """SHA-256 of model.safetensors, hexadecimal (what ``sha256sum`` prints); None for a model in several files."""
        path = _file(self.name, "model.safetensors", self.offline)
        if path is None:
            return None
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer | None:
        path = _file(self.name, "tokenizer.json", self.offline)
        for name in ("generation_config.json", "tokenizer_config.json") if path else ():
            _file(self.name, name, self.offline)  # a model of the hub: fetched beside it, for the ids that end a text
        return from_json(path) if path else None

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer.json beside the weights; None if there is none."""
        return self._tokenizer

    # -- text --

    def generate(self, ids: Sequence[int], n: int, on_token: Callable[[int], None] | None = None) -> list[int]:
        """Greedy continuation with the KV cache: at most ``n`` ids, ended before an id that ends the text.

        Of equal logits the lowest id wins.  No sampling, no repetition penalty, whatever generation_config.json wants.

        Raises
        ------
        CannotRun
            The logits are not finite: there is no greatest one.
        """
        return self.answer(ids, n, on_token)[0]

    def answer(self, ids: Sequence[int], n: int, on_token: Callable[[int], None] | None = None) -> tuple[list[int], float | None]:
        """As :meth:`generate`, with the smallest gap between the two largest logits on the way (None for no steps)."""
        ends = self._ends()
        logits, past = self._forward(checked_ids(ids, int(self.hparams["vocab"])))
        out: list[int] = []
        margins: list[float] = []
        while len(out) < n:
            last = logits[-1].float().numpy()
            if not np.isfinite(last).all():
                raise CannotRun(f"{self.spelling}: logits that are not finite after {len(out)} tokens: no answer", code="NONFINITE")
            token = int(np.argmax(last))
            top = np.partition(last, -2)[-2:]
            margins.append(float(top[1] - top[0]))
            if token in ends:
                break
            out.append(token)
            if on_token:
                on_token(token)
            if len(out) < n:
                logits, past = self._forward([token], past)
        return out, min(margins, default=None)

    def _ends(self) -> frozenset[int]:
        """Ids that end a text: generation_config.json's, and those of the tokenizer."""
        said = self.model.generation_config.eos_token_id
        ids = frozenset(said if isinstance(said, list) else [] if said is None else [said])
        tokenizer = self.tokenizer()
        return ids | tokenizer.eos_ids if tokenizer else ids

    def logits(self, ids: Sequence[int]) -> Array:
        """Logits of every position, [T, V], by the path that makes the text."""
        found: Array = self._forward(checked_ids(ids, int(self.hparams["vocab"])))[0].float().numpy()
        return found

    def close(self) -> None:
        """Let go of the model's memory."""
        del self.model


class HeldWeights(Mapping[Key, Array]):
    """The parameters of a loaded model as float32, widened when asked for and not kept: (row of ``weights.def``, layer) to [out, in]."""

    def __init__(self, model: Any, names: Mapping[Key, str]) -> None:
        self._model = model
        self._names = names

    def __getitem__(self, key: Key) -> Array:
        found: Array = self._model.get_parameter(self._names[key]).detach().float().numpy()
        return found

    def __iter__(self) -> Iterator[Key]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


# ---- loading -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _foreign(name: str, what: str) -> Iterator[None]:
    """Turn whatever transformers and the hub raise into one line; silence their bars and warnings meanwhile."""
    level, bars, hub = logging.get_verbosity(), logging.is_progress_bar_enabled(), huggingface_hub.logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity(ERROR)
    try:
        yield
    except Error:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CannotRun(f"{name}: {what}: {lines[0] if lines else type(error).__name__}", code="LOAD", path=name) from error
    finally:
        logging.set_verbosity(level)
        huggingface_hub.logging.set_verbosity(hub)
        if bars:
            logging.enable_progress_bar()


def _offline(name: str) -> bool:
    """Whether only what is on this machine can be had: a folder, or the hub's host has no address (asking would take half a minute)."""
    if Path(name).is_dir():
        return True
    if urllib.request.getproxies():
        return False
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT).hostname, None)
    except OSError:
        return True
    return False


def _file(name: str, file: str, offline: bool) -> Path | None:
    """A file of a model, local or of the hub; None if the model has none of that name."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    with _foreign(name, "cannot be fetched"):
        quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        found = cached_file(name, file, local_files_only=offline, **quiet)
    return Path(found) if found else None


def _load_config(name: str, offline: bool) -> Any:
    """The configuration; CannotRun where there is no such model."""
    where = Path(name)
    like_a_path = name.startswith((".", "~", os.sep)) or name.endswith(os.sep) or name.count("/") > 1
    if where.is_dir() and not (where / "config.json").is_file():
        raise CannotRun(f"{name}: the folder has no config.json", code="PATH", path=name)
    if where.exists() and not where.is_dir():
        raise CannotRun(f"{name}: is a file; a folder or a name on the hub is needed", code="PATH", path=name)
    if like_a_path and not where.exists():
        raise CannotRun(f"{name}: there is no such folder", code="PATH", path=name)
    with _foreign(name, "no folder here, and no model of that name can be reached" if not where.is_dir() else "cannot be read"):
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=offline)


def _described(config: Any, name: str) -> tuple[str, frozenset[str]]:
    """Architecture and flags, if the stage table describes the model; ConfigError if not."""
    row = next((row for row in _core.ARCHS if row[0] == config.model_type), None)
    if row is None:
        known = ", ".join(row[0] for row in _core.ARCHS)
        raise ConfigError(f"{name}: the architecture '{config.model_type}' is not known; {known} are", code="UNSUPPORTED", path=name)
    for entry, accepted, meaning in REFUSED:
        value = getattr(config, entry, None)
        if not accepted(value):
            raise ConfigError(f"{name}: {entry} = {value!r}: {meaning} is not supported", code="UNSUPPORTED", path=name, field=entry)
    return row[0], frozenset(row[2]) | {flag for flag in row[3] if OPTIONS[flag](config)}


def _hparams(config: Any) -> dict[str, int | float]:
    """The hyper-parameters as transformers holds them, by the names of ``hparams.def``."""
    found: dict[str, Any] = {}
    for field, kind, _, entries, *_ in _core.HPARAMS:
        value: Any = config
        for step in entries.split()[0].split("."):
            value = value.get(step) if isinstance(value, dict) else getattr(value, step, None)
        found[field] = value if value is None else (int if kind == "INT" else float)(value)
    found["kv_heads"] = found["kv_heads"] or found["heads"]
    found["head"] = found["head"] or found["dim"] // found["heads"]
    missing = [field for field, value in found.items() if value is None]
    if missing:
        raise ConfigError(f"config.json gives no {', '.join(missing)}", code="MISSING", field=missing[0])
    return found


def _load_model(name: str, config: Any, dtype: str, offline: bool) -> Any:
    """The model in a dtype, on the CPU, with every parameter from the checkpoint and no tensor of the checkpoint left over."""
    with _foreign(name, "cannot be loaded"):
        model, said = transformers.AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=getattr(torch, dtype), attn_implementation=EAGER, trust_remote_code=False, use_safetensors=True,
            local_files_only=offline, output_loading_info=True,
        )  # fmt: skip
    for kind, code, word in (
        ("missing_keys", "MISSING", "are missing from"),
        ("unexpected_keys", "LEFTOVER", "are left over in"),
        ("mismatched_keys", "SHAPE", "have the wrong shape in"),
    ):
        if said.get(kind):
            first = sorted(map(str, said[kind]))[0]
            raise ConfigError(f"{name}: {len(said[kind])} tensors {word} the checkpoint, {first} first", code=code, path=name, field=first)
    for key, value in model.named_parameters():
        if value.dtype != getattr(torch, dtype):
            raise ConfigError(f"{name}: {key} stayed {value.dtype}, {dtype} was asked for", code="TYPE", path=name, field=key)
    return model.eval()


def _bound(model: Any, flags: frozenset[str], layers: int, name: str) -> dict[Key, str]:
    """Row of ``weights.def`` and layer to the parameter's name: each row that is on has one, and no parameter is left over."""
    names: dict[Key, str] = {}
    held = {key for key, _ in model.named_parameters()}
    wanted = set()
    for weight, _, _, spelled, _, _, otherwise, flag in _core.WEIGHTS:
        on = flag == "ALWAYS" or flag in flags
        if not on and otherwise is None:
            continue
        source = spelled if on else next(row[3] for row in _core.WEIGHTS if row[0] == otherwise)
        for layer in range(layers) if "%d" in source else (None,):
            names[weight, layer] = source.replace("%d", str(layer))
            wanted.add(names[weight, layer])
    for found, code, word in ((wanted - held, "MISSING", "has no parameter"), (held - wanted, "LEFTOVER", "has what no stage reads:")):
        if found:
            raise ConfigError(f"{name}: {type(model).__name__} {word} {min(found)}", code=code, path=name, field=min(found))
    return names
