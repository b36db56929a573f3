"""Our engine on two devices, operation by operation: how many values are the same bits, and from which token on some are not.

Owns the rows of that table.  Refuses to say which side is wrong: that is ``judge.verdict``.  Called by ``bisection`` when both sides are
our own engine and run on different devices, so that one definition of each value, down to its bits, holds for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from aprender import stages
from aprender.captures import Array, Captures
from aprender.judge.metrics import distance
from aprender.stages import Key


@dataclass(frozen=True)
class Operation:
    """One operation of the forward pass, over all stages that it makes.

    Attributes
    ----------
    operation : str
        Row of ``ops.def``.
    tensors, values : int
        Compared.
    equal : int
        Values whose bits are the same; a NaN equals a NaN.
    rel_l2 : float or None
        Largest relative L2 of a tensor.
    stage : str or None
        The tensor that has it; None where all bits are the same.
    token : int or None
        Place of the first token at which a value differs.
    """

    operation: str
    tensors: int
    values: int
    equal: int
    rel_l2: float | None
    stage: str | None
    token: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def unequal(a: Array, b: Array) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Where two arrays differ in bits; NaN and NaN do not, whatever their payload."""
    x, y = np.ascontiguousarray(a), np.ascontiguousarray(b)
    found: np.ndarray[Any, np.dtype[np.bool_]] = (x.view(np.uint32) != y.view(np.uint32)) & ~(np.isnan(x) & np.isnan(y))
    return found


def _token(key: Key, differs: np.ndarray[Any, np.dtype[np.bool_]]) -> int | None:
    """The first token, or key of a cache, with a value that differs."""
    shape = stages.stage(key[0]).shape
    axis = next((axis for axis, name in enumerate(shape) if name in ("T", "J")), None)
    if axis is None:
        return None
    rows = differs.any(axis=tuple(other for other in range(differs.ndim) if other != axis))
    return int(np.argmax(rows)) if rows.any() else None


def _row(operation: str, keys: Mapping[Key, tuple[Array, Array]]) -> Operation:
    values = equal = 0
    worst: tuple[float, str] | None = None
    tokens = []
    for key, (a, b) in keys.items():
        differs = unequal(a, b)
        values, equal = values + differs.size, equal + differs.size - int(np.count_nonzero(differs))
        if not differs.any():
            continue
        tokens.append(_token(key, differs))
        size = distance(a, b).rel_l2
        size = float("inf") if size is None else size
        worst = max(worst or (-1.0, ""), (size, stages.spell(key)))
    first = min((token for token in tokens if token is not None), default=None)
    size = 0.0 if worst is None else worst[0] if np.isfinite(worst[0]) else None
    return Operation(operation, len(keys), values, equal, size, worst[1] if worst else None, first)


def table(subject: Captures, reference: Captures) -> tuple[Operation, ...]:
    """A row per operation, in the order in which they first run; tensors of different shapes are left to the sample contract."""
    together: dict[str, dict[Key, tuple[Array, Array]]] = {}
    for key in subject:
        if key in reference and subject[key].shape == reference[key].shape:
            together.setdefault(stages.stage(key[0]).op, {})[key] = (subject[key], reference[key])
    return tuple(_row(operation, keys) for operation, keys in together.items())


def sentence(rows: tuple[Operation, ...]) -> str:
    """The table in one sentence."""
    values, equal = sum(row.values for row in rows), sum(row.equal for row in rows)
    if values == equal:
        return f"devices: all {values} values of {sum(row.tensors for row in rows)} stages are the same bits on both"
    first = min(row.token for row in rows if row.token is not None) if any(row.token is not None for row in rows) else None
    where = "" if first is None else f", the first at token {first}"
    names = ", ".join(row.operation for row in rows if row.equal < row.values)
    return f"devices: {values - equal} of {values} values differ{where}, in {names}"
