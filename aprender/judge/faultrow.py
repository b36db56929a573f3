"""What a row of the catalogue of faults is, and the words that rows are written in.

Owns :class:`FaultRow` (where a bug can sit, what plants it there, what it leaves) and short spellings of the edits and changes that many
rows have.  Refuses to name a stage or a bug: the rows are ``judge.faults``, whose head lists the forms of an edit and of a change.  Called
by ``judge.faults``, and for its types by all that plant or recognize.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from aprender import _core, stages
from aprender.judge.witness import HParams
from aprender.stages import Key

Edit = Mapping[str, Any]
Change = Mapping[str, Any]
Flags = frozenset[str]
Sites = Mapping[str, tuple[Edit, ...]]
Possible = Callable[[Flags, HParams], bool]
Variant = tuple[str, tuple[Change, ...]]
"""The same kind of fault otherwise, for a diagnosis: what is other in words, and its changes."""

AGREE, REFUSED, HEALS = "agree", "refused", "heals"


def _always(flags: Flags, hparams: HParams) -> bool:
    return True


@dataclass(frozen=True)
class FaultRow:
    """One bug of the catalogue, or one control: a difference that is no bug.

    Attributes
    ----------
    name : str
        On the command line: ``--plant NAME[@SELECTOR]``.
    text : str
        What is done wrong, and where it was seen.
    at : mapping
        Stage where it first shows to the edits that plant it there.
    changes : mapping
        The same stages to the changes of the witness's arguments that predict the wrong stage from its captured inputs.
    variants : mapping
        Stage to the same fault otherwise (in one part of a group, with another number): recognized by this name, never planted.
    possible : callable
        Flags and hyper-parameters to whether the model can have it at all.
    also : tuple of str
        Stages of the same layer that are wrong too.
    shape : str
        What the residual looks like (``SCALE BIAS POS0 NORM= PERM HEADBLK TAIL LAST= DECODE BLOCK NAN CHAOS``).
    first_layer : int
        First layer that can have it.
    expect : str
        Empty for a fault; of a control, what must come out: ``agree``, ``refused`` or ``heals``.
    """

    name: str
    text: str
    at: Sites
    changes: Mapping[str, tuple[Change, ...]] = field(default_factory=dict)
    possible: Possible = _always
    also: tuple[str, ...] = ()
    shape: str = ""
    first_layer: int = 0
    expect: str = ""
    variants: Mapping[str, tuple[Variant, ...]] = field(default_factory=dict)

    def edits(self, stage: str, layer: int | None, flags: Flags) -> tuple[Edit, ...]:
        """What plants it at a stage; empty if it cannot sit there, or needs a weight that the model does not have."""
        if layer is not None and layer < self.first_layer:
            return ()
        made = [_sited(edit, stage, layer) for edit in self.at.get(stage, ())]
        return tuple(made) if all(edit["target"] != "weight" or _has(str(edit["weight"]), flags) for edit in made) else ()

    def prediction(self, stage: str) -> tuple[Change, ...]:
        """The changes that make the witness leave the same wrong stage; empty if it cannot sit there."""
        return self.changes.get(stage, ())

    def suspected(self, stage: str, layer: int | None, flags: Flags, hparams: HParams) -> Iterator[Variant]:
        """All changes by which a wrong stage can be recognized as this fault, that which is planted first."""
        if not self.possible(flags, hparams) or (layer is not None and layer < self.first_layer):
            return
        if stage in self.changes:
            yield self.text, self.changes[stage]
        for text, changes in self.variants.get(stage, ()):
            yield f"{self.text}: {text}", changes

    def sites(self, flags: Flags, hparams: HParams) -> list[Key]:
        """Where it can be planted in a model, in execution order."""
        if not self.possible(flags, hparams):
            return []
        return [key for key in stages.keys(flags, int(hparams["layers"])) if self.edits(*key, flags)]


def _sited(edit: Edit, stage: str, layer: int | None) -> Edit:
    """An edit with the layer of its site, and the stage where it says none; a weight belongs to no stage."""
    return {"layer": layer, **edit} if edit["target"] == "weight" else {"stage": stage, "layer": layer, **edit}


def _has(weight: str, flags: Flags) -> bool:
    """Whether a model with these flags has a weight, or another in its place."""
    (row,) = (row for row in _core.WEIGHTS if row[0] == weight)
    *_, otherwise, flag = row
    return flag == "ALWAYS" or flag in flags or bool(otherwise)


# ---- the words of the rows -----------------------------------------------------------------------------------------------------------


def grouped(flags: Flags, hparams: HParams) -> bool:
    """Several query heads to a key head, and several key heads: else tiling and repeating are one map."""
    return 1 < int(hparams["kv_heads"]) < int(hparams["heads"])


def untied(flags: Flags, hparams: HParams) -> bool:
    """A head of its own, beside the token table."""
    return "UNTIED" in flags


def step(name: str, **how: Any) -> Edit:
    """An edit of a field of the plan's step."""
    return {"target": "step", "field": name, **how}


def vectors(rows: Mapping[str, str | tuple[str, ...]], transform: str, **how: Any) -> Sites:
    """An edit of every norm weight or bias."""
    named = {stage: (names,) if isinstance(names, str) else names for stage, names in rows.items()}
    return {
        stage: tuple({"target": "weight", "weight": name, "transform": transform, **how} for name in names)
        for stage, names in named.items()
    }


def each(names: Iterable[str], *edits: Any) -> Mapping[str, tuple[Any, ...]]:
    """The same edits, or changes, at each of some stages."""
    return dict.fromkeys(names, edits)


def weights(how: str, part: int | None = None, **more: Any) -> Change:
    """A change of a weight, or of one part of a group."""
    return {"of": "weights", "part": part, "as": how, **more}


def weight_rows(**how: Any) -> Change:
    """A change of the rows of a weight, spelled by keywords alone, as that of a bias is."""
    return {"of": "weights", **how}


def value(transform: str, **more: Any) -> Edit:
    """An edit of the stage's value."""
    return {"target": "value", "transform": transform, **more}


def output(how: str, **more: Any) -> Change:
    """A change of the right value."""
    return {"of": "output", "as": how, **more}


def biases(part: int | None = None, **how: Any) -> Change:
    """A change of a bias, or of one part of a group."""
    return {"of": "biases", "part": part, **how}


EVERYWHERE = 1 << 24
"""A mask offset beyond every position."""

STORED = "in the bytes of the file"
"""Of what is done to the codes of a quantized weight, not to its values."""


def by_part(stage: str, *changes: Change, text: str = "") -> Mapping[str, tuple[Variant, ...]]:
    """The changes in one part only of a group of q, k and v."""
    more = f", {text}" if text else ""
    return {stage: tuple((f"{name} only{more}", tuple({**c, "part": i} for c in changes)) for i, name in enumerate("qkv"))}


def paired(*kinds: Callable[..., Change]) -> tuple[Variant, ...]:
    """Rows of q and k in the other order, either way round, in both or in one: of their weights, their biases or both."""
    out = []
    for how, text in (("pairs", "interleaved"), ("halves", "taken apart")):
        for parts, names in (((0, 1), "q and k"), ((0,), "q"), ((1,), "k")):
            changes = tuple(kind(**{"part": i, "as": how, "size": "head"}) for kind in kinds for i in parts)
            more = " with their biases" if len(kinds) > 1 else ""
            out.append((f"rows of {names}{more} {text}", changes))
    return tuple(out)


def exchanged(of_weights: bool, of_biases: bool) -> tuple[Change, ...]:
    """The keys' in place of the values', and the other way round."""
    rows = ((1, "attn_v"), (2, "attn_k"))
    of = [weights("origin", i, origin=name) for i, name in rows] if of_weights else []
    return (*of, *(biases(i, **{"as": "origin", "origin": f"{name}_bias"}) for i, name in rows if of_biases))
