"""How far two arrays are apart, with no opinion: cosine distance, relative L2, norm ratio.

Owns the free comparison: sums in float64, one pass per tensor.  Refuses to judge: errors accumulate along a free run, a cosine is blind
to a scale, and no number here says who is wrong.  Called by ``judge.verdict``, ``judgement``, ``diff`` and the reports.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from aprender import _core
from aprender.captures import Captures, aligned
from aprender.stages import Key


@dataclass(frozen=True)
class Distance:
    """Subject against reference.

    Attributes
    ----------
    n : int
        Elements compared.
    cos_distance : float or None
        1 - cosine of the angle between the two, from the norm of the difference: good where 1 - cos would cancel.
    rel_l2 : float or None
        Norm of the difference over the norm of the reference.
    norm_ratio : float or None
        Norm of the subject over the norm of the reference.
    nonfinite : tuple of int
        NaN or infinite elements in each.  If there are any, or a norm is 0, a figure that does not exist is None.
    """

    n: int
    cos_distance: float | None
    rel_l2: float | None
    norm_ratio: float | None
    nonfinite: tuple[int, int] = (0, 0)


def distance(subject: ArrayLike, reference: ArrayLike) -> Distance:
    """The distance of two arrays of one shape; of float32 numbers by the core's one pass, of others in NumPy."""
    a, b = np.asarray(subject).ravel(), np.asarray(reference).ravel()
    if a.dtype == b.dtype == np.float32:
        said = _core.compare(a, b)
        if said["finite"] == a.size > 0:
            return _distance(a.size, said)
    a, b = a.astype(np.float64), b.astype(np.float64)
    bad = (int(a.size - np.count_nonzero(np.isfinite(a))), int(b.size - np.count_nonzero(np.isfinite(b))))
    if a.size == 0 or any(bad):
        return Distance(a.size, None, None, None, bad)
    d = a - b
    return _distance(a.size, {"aa": a @ a, "bb": b @ b, "dd": d @ d, "ab": d @ (a + b)})


def _distance(n: int, sums: Mapping[str, float]) -> Distance:
    """From the sums over all pairs of a^2, b^2, (a - b)^2 and (a - b)(a + b).

    ``2 (1 - cos) na nb = d^2 - (na - nb)^2`` with d the norm of the difference, and na - nb from na^2 - nb^2 without its cancellation.
    """
    na, nb, nd = (math.sqrt(sums[name]) for name in ("aa", "bb", "dd"))
    if nb == 0:
        return Distance(n, None, 0.0 if na == 0 else None, None)
    cos = None if na == 0 else max(sums["dd"] - (sums["ab"] / (na + nb)) ** 2, 0.0) / (2 * na * nb)
    return Distance(n, cos, nd / nb, na / nb)


def compare(subject: Captures, reference: Captures) -> dict[Key, Distance]:
    """Every tensor that both captures hold, in execution order, after the views that the sample contract names.

    The contract is checked by the caller (:func:`aprender.captures.check_contract`).
    """
    return {key: distance(*aligned(subject, reference, key)) for key in subject if key in reference}
