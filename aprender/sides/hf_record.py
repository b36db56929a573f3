"""The hooks that show Hugging Face's forward pass, made from the ``hf`` column of the stage table.

Owns the little language of that column (``out: pre: cat: rope: arg: ret: derived``), the registered attention and mask functions, and the
recorder that copies every value out at once, bits kept.  The attention function delegates to the module's own eager function: outputs are
the model's, not ours.  What the model never forms (a product before its fused bias) is recomputed here and marked *derived*.  Refuses a
module path that does not resolve and a site that fires twice.  Called by ``sides.hf`` only.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from aprender import _core, stages
from aprender.errors import CannotRun, ConfigError
from aprender.manifest import CAPTURED, DERIVED
from aprender.sides.base import Progress
from aprender.stages import Key

EAGER, SDPA = "eager", "sdpa"  # transformers' own names of its two attention paths on a CPU
ATTENTION = "aprender_traced"  # the names under which attention and its mask are registered with transformers: eager,
FUSED = "aprender_traced_sdpa"  # and one kernel
TRACED: Mapping[str, str] = {EAGER: ATTENTION, SDPA: FUSED}

_SOFTMAXES = (torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax)


@dataclass(frozen=True, slots=True)
class Site:
    """Where a stage shows: a kind, and what it applies to."""

    kind: str
    where: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, layer: int | None) -> Site:
        """``cat:model.layers.{i}.self_attn.q_proj,k_proj`` with the layer put in and the shared path spelled out."""
        kind, _, what = text.partition(":")
        first, *rest = what.replace("{i}", str(layer)).split(",")
        parent = first.rpartition(".")[0]
        return cls(kind, (first, *(f"{parent}.{name}" for name in rest)) if first else ())


class _SoftmaxInput(TorchFunctionMode):  # type: ignore[misc]  # torch is not followed
    """While active, remembers what the last softmax was given; changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SOFTMAXES and self.seen is None:
            self.seen = args[0]
        return func(*args, **(kwargs or {}))


_active: ContextVar[Recorder | None] = ContextVar("aprender_recorder", default=None)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    **more: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The registered attention function: the model's own eager one, with a look at what goes in and out."""
    home: Any = sys.modules[type(module).__module__]
    recorder = _active.get()
    softmax = _SoftmaxInput()
    with softmax if recorder else contextlib.nullcontext():
        out, weights = home.eager_attention_forward(module, query, key, value, mask, scaling=scaling, **more)
    if recorder is None:
        return out, weights
    shared = home.repeat_kv(key, module.num_key_value_groups)
    scores = torch.matmul(query, shared.transpose(2, 3)) * scaling
    recorder.attention(module.layer_idx, query, key, value, mask, scores, softmax.seen, weights)
    return out, weights


def _fused(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **more: Any
) -> tuple[torch.Tensor, None]:
    """The registered attention function of one kernel: transformers' own, with a look at what goes in."""
    recorder = _active.get()
    if recorder is not None:
        recorder.entered(module.layer_idx, query, key, value)
    out: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **more)
    return out


# A name without a mask function would make attention bidirectional without a word (tests/test_hf.py has that failure).
AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)
AttentionInterface.register(FUSED, _fused)
AttentionMaskInterface.register(FUSED, sdpa_mask)


def inside_attention(row: stages.Stage) -> bool:
    """Whether a stage lies inside attention, where a fused kernel forms no value: the scores and the probabilities."""
    return Site.parse(row.hf, 0).kind == "ret" or (row.hf == "derived" and _DERIVED[row.op] is _by_attention)


@dataclass
class Recorder:
    """Collects the wanted stages of one forward pass; a context manager that puts the hooks on and takes them off.

    Attributes
    ----------
    model : module
    wanted : frozenset of Key
    flags : frozenset of str
    progress : callable, optional
    values : dict of Key to tensor
        Copies on the CPU in the model's own type, without the batch axis, two-dimensional where the stage is.
    origins : dict of Key to str
        ``captured`` or ``derived``.
    """

    model: Any
    wanted: frozenset[Key]
    flags: frozenset[str]
    progress: Progress | None = None
    values: dict[Key, torch.Tensor] = field(default_factory=dict)
    origins: dict[Key, str] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list)
    _token: Any = None

    def __enter__(self) -> Recorder:
        for key in self.wanted:
            row = stages.by_name[key[0]]
            site = Site.parse(row.hf, key[1])
            make = _HOOKS.get(site.kind) or _DERIVED.get(row.op)
            if make is not None:
                make(self, key, site)
        if self.progress:
            self._watch_progress(self.progress)
        self._token = _active.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _active.reset(self._token)
        for handle in self._handles:
            handle.remove()

    def module(self, path: str) -> Any:
        """The module of a path; ConfigError if the model has none there."""
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            raise ConfigError(f"{type(self.model).__name__} has no module '{path}'", code="MISSING", field=path) from None

    def put(self, key: Key, value: torch.Tensor, origin: str = CAPTURED) -> None:
        """Copy a value out, if it is wanted."""
        if key not in self.wanted:
            return
        if key in self.values:
            raise CannotRun(f"{stages.spell(key)} is computed more than once in one pass", code="CONFIG", stage=key[0], layer=key[1])
        self.values[key] = value.detach().to("cpu", copy=True)
        self.origins[key] = origin

    def after(self, path: str, then: Callable[[tuple[Any, ...], Any], None]) -> None:
        """Call ``then(inputs, output)`` after the module of a path."""
        self._handles.append(self.module(path).register_forward_hook(lambda _, args, output: then(args, output)))

    def before(self, path: str, then: Callable[[tuple[Any, ...]], None]) -> None:
        """Call ``then(inputs)`` before the module of a path."""
        self._handles.append(self.module(path).register_forward_pre_hook(lambda _, args: then(args)))

    def side_by_side(self, key: Key, paths: Iterable[str], make: Callable[[str, tuple[Any, ...], Any], torch.Tensor], origin: str) -> None:
        """Join what ``make`` gives for each of several modules along the last axis."""
        paths = tuple(paths)
        parts: dict[str, torch.Tensor] = {}

        def one(path: str, args: tuple[Any, ...], output: torch.Tensor) -> None:
            parts[path] = make(path, args, output)
            if len(parts) == len(paths):
                self.put(key, torch.cat([_flat(parts[path]) for path in paths], dim=-1), origin)

        for path in paths:
            self.after(path, functools.partial(one, path))

    def attention(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scores: torch.Tensor,
        consumed: torch.Tensor | None,
        weights: torch.Tensor,
    ) -> None:
        """What passed through the attention function of a layer.

        ``scores`` are recomputed; where the softmax was given the very same bits at every allowed place they count as captured.
        """
        self.entered(layer, query, key, value)
        for row in stages.STAGES:
            if row.hf == "ret:weights":
                self.put((row.name, layer), weights[0])
            elif row.hf == "derived" and _DERIVED[row.op] is _by_attention:
                allowed = torch.ones_like(scores, dtype=torch.bool) if mask is None else (mask[..., : key.shape[2]] == 0).expand_as(scores)
                proved = consumed is not None and same_bits(_numbers(scores[allowed]), _numbers(consumed[allowed]))
                # the mask is added: it hides a number, but not one that is none
                hidden = ~allowed & torch.isfinite(scores)
                self.put((row.name, layer), scores.masked_fill(hidden, 0)[0], CAPTURED if proved else DERIVED)

    def entered(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """What the attention function of a layer was given."""
        tokens = query.shape[2]
        shown = {
            "arg:query": _heads(query), "arg:key_now": _heads(key[:, :, -tokens:]), "arg:key": _heads(key), "arg:value": _heads(value),
        }  # fmt: skip
        for row in stages.STAGES:
            if row.hf in shown:
                self.put((row.name, layer), shown[row.hf])

    def _watch_progress(self, tell: Progress) -> None:
        """Tell the share of layers done after each layer."""
        layers = self.model.config.num_hidden_layers
        last = next(row for row in reversed(stages.STAGES) if row.per_layer)
        shares = ((i + 1) / layers for i in range(layers))  # layers finish in order
        for i in range(layers):
            self.after(Site.parse(last.hf, i).where[0], lambda _args, _output: tell(next(shares)))


def _flat(value: torch.Tensor) -> torch.Tensor:
    """[1, T, …] as [T, columns]."""
    return value[0].reshape(value.shape[1], -1)


def _heads(value: torch.Tensor) -> torch.Tensor:
    """[1, heads, T, h] as [T, heads x h]."""
    return _flat(value.transpose(1, 2))


def _numbers(value: torch.Tensor) -> torch.Tensor:
    """The same with one NaN for all and one zero: adding a mask of 0 may turn the sign of either."""
    return torch.where(torch.isnan(value), torch.nan, value) + 0.0


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and bool(torch.equal(a.contiguous().view(whole), b.contiguous().view(whole)))


# ---- one function per kind of site ---------------------------------------------------------------


def _out(recorder: Recorder, key: Key, site: Site) -> None:
    recorder.after(site.where[0], lambda _args, output: recorder.put(key, _flat(output)))


def _pre(recorder: Recorder, key: Key, site: Site) -> None:
    recorder.before(site.where[0], lambda args: recorder.put(key, _flat(args[0])))


def _cat(recorder: Recorder, key: Key, site: Site) -> None:
    recorder.side_by_side(key, site.where, lambda _path, _args, output: output, CAPTURED)


def _rope(recorder: Recorder, key: Key, site: Site) -> None:
    """The first half of the columns of cos, then of sin: the other half repeats them."""

    def table(_args: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        recorder.put(key, torch.cat([part[0, :, : part.shape[-1] // 2] for part in output], dim=-1))

    recorder.after(site.where[0], table)


def _by_attention(_recorder: Recorder, _key: Key, _site: Site) -> None:
    """Shown by the attention function, which is on for all layers."""


def _products(recorder: Recorder, key: Key, _site: Site) -> None:
    """Projections before their bias.  A model without bias shows them; one with bias fuses it, and the product is recomputed."""
    group = stages.by_name[key[0]].weight
    paths = [row[3].replace("%d", str(key[1])).removesuffix(".weight") for row in _core.WEIGHTS if row[1] == group]
    if all(recorder.module(path).bias is None for path in paths):
        recorder.side_by_side(key, paths, lambda _path, _args, output: output, CAPTURED)
    else:
        recorder.side_by_side(key, paths, lambda path, args, _: torch.nn.functional.linear(args[0], recorder.module(path).weight), DERIVED)


_HOOKS: Mapping[str, Callable[[Recorder, Key, Site], None]] = {
    "out": _out, "pre": _pre, "cat": _cat, "rope": _rope, "arg": _by_attention, "ret": _by_attention,
}  # fmt: skip
_DERIVED: Mapping[str, Callable[[Recorder, Key, Site], None]] = {"MATMUL": _products, "SCORES": _by_attention}
