"""Probes that compare the bits of two runs of one side: causality, repetition, watching.

Owns these three.  Refuses to estimate: a bit that moves is certain.  Rows of the table in ``probes``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aprender import stages
from aprender.captures import Array
from aprender.errors import CannotRun
from aprender.judge.verdict import Fault
from aprender.manifest import LAST
from aprender.probes.bench import AGREE, DIVERGENCE, HEISENBUG, NONDETERMINISTIC, OPERATION, Bench, Outcome, certain, same, unattested
from aprender.stages import LOGITS, Key


def told(probe: str, tokens: Sequence[int], finding: str, fault: Fault | None, well: str) -> Outcome:
    """The outcome of a comparison of bits."""
    if fault is None:
        return Outcome(probe, AGREE, well, tokens=tuple(tokens))
    return Outcome(probe, DIVERGENCE, fault.reason, finding, (fault,), tuple(tokens))


def _rows(array: Array, key: Key, count: int) -> Array:
    """The first rows of a stage, and of its keys the first ones."""
    for axis, name in enumerate(stages.stage(key[0]).shape):
        if name in "TJ":
            array = np.take(array, range(count), axis=axis)
    return array


def causal(probe: str, bench: Bench) -> Outcome:
    """Other last tokens: no earlier row may move."""
    ids = bench.lengthened(max(len(bench.whole.tokens), 4))
    early, vocab = len(ids) - max(1, len(ids) // 4), int(bench.hparams["vocab"])
    if early < 1:
        raise CannotRun("a context of one token has no earlier rows", code="PROBE")
    changed = (*ids[:early], *((token + 1 + vocab // 2) % vocab for token in ids[early:]))
    a, b = bench.captured(ids), bench.side.capture(changed)
    fault = None
    keys = [key for key in a if key in b and set(stages.stage(key[0]).shape) & {"T", "J"} and a.manifest.tensors[key].positions != LAST]
    if not keys:
        raise CannotRun("this side shows no stage of earlier tokens", code="PROBE")
    for key in keys:
        x, y = _rows(a[key], key, early), _rows(b[key], key, early)
        if not same(x, y):
            fault = certain(key, "not causal", f"rows of the first {early} tokens of {stages.spell(key)} move with the tokens after them")
            break
    return told(probe, changed, OPERATION, fault, f"the first {early} rows of {len(keys)} stages do not depend on later tokens")


def repeat(probe: str, bench: Bench) -> Outcome:
    """The same once more: the same bits."""
    first, again = bench.whole, bench.side.capture(bench.whole.tokens)
    key = next((key for key in first if key not in again or not same(first[key], again[key])), None)
    reason = "" if key is None else f"two runs of the same tokens differ, first at {stages.spell(key)}: no single run stands for this side"
    fault = None if key is None else certain(key, NONDETERMINISTIC, reason)
    return told(probe, first.tokens, NONDETERMINISTIC, fault, f"{len(first)} stages have the same bits in a second run")


def traced(probe: str, bench: Bench) -> Outcome:
    """Logits of the captured run against those of a run that captures nothing."""
    whole = bench.whole
    if LOGITS not in whole:
        raise CannotRun("this side shows no logits", code="PROBE")
    if hasattr(bench.side, "logits"):
        plain = bench.side.logits(whole.tokens)
    else:
        plain = bench.side.capture(whole.tokens, lambda key: key == LOGITS)[LOGITS]
    shown = whole[LOGITS]
    equal = same(shown, plain[-len(shown) :]) and whole.manifest.attestation is not False
    return told(probe, whole.tokens, HEISENBUG, None if equal else unattested(), "the logits are the same bits with and without capturing")
