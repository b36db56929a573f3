"""The catalogue of faults: real bugs of real engines, each as data that plants it and, later, as a prediction that recognises it.

Owns the rows: a name for the command line, the (stage, layer) pairs where the bug can sit, and the edits of plan data or weights that put
it there.  Refuses code that runs: an edit is a mapping that ``sides/own.py`` applies without knowing what it means, and no kernel has a
fault in it.  The witness knows none of this, so what plants a fault shares nothing with what finds it.  Called by ``bisection``
(``--plant``, ``--list-faults``) and by the fault matrix of the tests.

An edit is ``{"target": "step", "stage", "layer", "field", "value" or "factor"}`` or ``{"target": "weight", "weight", "layer",
"transform"}``.  A site is always the stage where the fault first shows; a fault that touches two stages of a layer has two sites.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from aprender import _core, stages
from aprender.errors import ArgumentError, UnknownName
from aprender.judge.witness import HParams
from aprender.stages import Key

Edit = Mapping[str, Any]
Flags = frozenset[str]


@dataclass(frozen=True)
class FaultRow:
    """One bug of the catalogue.

    Attributes
    ----------
    name : str
        On the command line: ``--plant NAME[@SELECTOR]``.
    text : str
        What is done wrong, and where it was seen.
    edits : callable
        Stage and layer to the edits that plant it there; empty if the bug cannot sit at that stage.
    possible : callable
        Flags and hyper-parameters to whether the model can have it at all.
    prediction : None
        The residual that it leaves (comes with the diagnosis).
    """

    name: str
    text: str
    edits: Callable[[str, int | None, Flags], tuple[Edit, ...]]
    possible: Callable[[Flags, HParams], bool] = lambda flags, hparams: True
    prediction: None = None

    def sites(self, flags: Flags, hparams: HParams) -> list[Key]:
        """Where it can be planted in a model, in execution order."""
        if not self.possible(flags, hparams):
            return []
        return [key for key in stages.keys(flags, int(hparams["layers"])) if self.edits(*key, flags)]


def _step(stage: str, layer: int | None, field: str, **how: float) -> Edit:
    return {"target": "step", "stage": stage, "layer": layer, "field": field, **how}


def _weight(weight: str, layer: int | None, transform: str) -> Edit:
    return {"target": "weight", "weight": weight, "layer": layer, "transform": transform}


LINEAR: Mapping[str, tuple[str, ...]] = {
    "qkv_matmul": ("attn_q", "attn_k", "attn_v"),
    "attn_out": ("attn_output",),
    "ffn_gate": ("ffn_gate",),
    "ffn_up": ("ffn_up",),
    "ffn_out": ("ffn_down",),
    "lm_head": ("output",),
}
BIASES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "qkv_bias": ("QKV_BIAS", ("attn_q_bias", "attn_k_bias", "attn_v_bias")),
    "attn_out": ("O_BIAS", ("attn_output_bias",)),
}
NORMS = ("attn_norm", "q_norm", "k_norm", "ffn_norm", "final_norm")
ROTATED = ("q_post_rope", "k_post_rope")
GROUPED = ("attn_scores", "attention")
RESIDUALS = ("post_attn_residual", "post_ffn_residual")


def _transposed(stage: str, layer: int | None, _: Flags) -> tuple[Edit, ...]:
    return tuple(_weight(name, layer, "transposed") for name in LINEAR.get(stage, ()))


def _eps(stage: str, layer: int | None, _: Flags) -> tuple[Edit, ...]:
    return (_step(stage, layer, "eps", factor=10.0),) if stage in NORMS else ()


def _rope_pairs(stage: str, layer: int | None, _: Flags) -> tuple[Edit, ...]:
    return (_step(stage, layer, "pairing", value=1),) if stage in ROTATED else ()


def _no_bias(stage: str, layer: int | None, flags: Flags) -> tuple[Edit, ...]:
    flag, names = BIASES.get(stage, ("", ()))
    return tuple(_weight(name, layer, "zero") for name in names) if flag in flags else ()


def _gqa_tile(stage: str, layer: int | None, _: Flags) -> tuple[Edit, ...]:
    return (_step(stage, layer, "kv_div", value=1),) if stage in GROUPED else ()


def _no_residual(stage: str, layer: int | None, _: Flags) -> tuple[Edit, ...]:
    return (_step(stage, layer, "a", value=-1),) if stage in RESIDUALS else ()


FAULTS: Mapping[str, FaultRow] = {
    row.name: row
    for row in (
        FaultRow("transposed", "a weight [out, in] read as if stored [in, out] (paiml/aprender#1651: lm_head)", _transposed),
        FaultRow("eps", "a norm's epsilon ten times too large, 1e-5 for 1e-6 (ggml-org/llama.cpp#2373)", _eps),
        FaultRow("rope-pairs", "rotates neighbours (2i, 2i+1), not halves (i, i + h/2) (ggml-org/llama.cpp#13260)", _rope_pairs),
        FaultRow("no-bias", "the bias of a projection is dropped (EricLBuehler/candle-vllm#167)", _no_bias),
        FaultRow(
            "gqa-tile",
            "query head n reads key head n mod KV, not n / (H/KV) (ekzhang/jax-js#180)",
            _gqa_tile,
            lambda flags, hparams: 1 < int(hparams["kv_heads"]) < int(hparams["heads"]),
        ),
        FaultRow("no-residual", "the residual is not added: the branch replaces the stream", _no_residual),
    )
}
"""Every fault, by name."""


@dataclass(frozen=True)
class Plant:
    """A fault at chosen sites of a model.

    Attributes
    ----------
    fault : FaultRow
    sites : tuple of Key
        In execution order; the first is what a bisection must name.
    edits : tuple of mapping
        What ``sides/own.py`` applies.
    """

    fault: FaultRow
    sites: tuple[Key, ...]
    edits: tuple[Edit, ...]


def plant(text: str, flags: Flags, hparams: HParams) -> Plant:
    """What ``--plant NAME[@SELECTOR]`` means for a model.

    Parameters
    ----------
    text : str
        Name of a fault; after ``@`` a selection of stages as everywhere (``transposed@lm_head``, ``eps@0.attn_norm``).  Without one, every
        site of the model.
    flags, hparams : frozenset, mapping
        The model.

    Raises
    ------
    UnknownName
        No such fault, or no such stage; the message suggests the nearest.
    ArgumentError
        The model has no such site; the message says which it has.
    """
    name, at, selector = text.partition("@")
    if name not in FAULTS:
        near = difflib.get_close_matches(name, list(FAULTS), n=1, cutoff=0.4)
        hint = f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(FAULTS)}"
        raise UnknownName(f"there is no fault '{name}'{hint}", code="LOOKUP", field="plant")
    row = FAULTS[name]
    everywhere = row.sites(flags, hparams)
    chosen = stages.parse_selection(selector) if at else lambda key: True
    sites = tuple(key for key in everywhere if chosen(key))
    if not sites:
        where = f"it can sit at {_several(everywhere)}" if everywhere else "this model has no place for it"
        raise ArgumentError(f"the fault '{text}' has no site in this model: {where}", code="ARGUMENT", field="plant")
    return Plant(row, sites, tuple(edit for key in sites for edit in row.edits(*key, flags)))


def _several(keys: Iterable[Key]) -> str:
    """Stages of some keys, each once."""
    return ", ".join(dict.fromkeys(key[0] for key in keys))


def listing(flags: Flags | None = None, hparams: HParams | None = None) -> str:
    """The catalogue for people: a line per fault, and below it the stages where this model (any, if none is given) can have it."""
    every = frozenset(name for name, _ in _core.FLAGS) if flags is None else flags
    shape: HParams = {"layers": 1, "heads": 4, "kv_heads": 2} if hparams is None else hparams
    width = max(map(len, FAULTS)) + 2
    lines = []
    for row in FAULTS.values():
        where = _several(row.sites(every, shape)) or "no place in this model"
        lines += [f"{row.name:{width}}{row.text}", f"{'':{width}}at {where}"]
    return "\n".join(lines)
