"""How far two arrays are apart, with no opinion: cosine distance, relative L2, norm ratio.

Owns the free comparison, float64 NumPy, one pass per tensor.  Refuses to judge: errors accumulate along a free run, a cosine is blind to a
scale, and no number here says who is wrong.  Called by ``judge.verdict``, ``bisection``, ``diff`` and the reports.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

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
        1 - cosine of the angle between the two, from the difference of the unit vectors: good down to 1e-32, where 1 - cos would cancel.
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
    """The distance of two arrays of one shape."""
    a, b = np.asarray(subject, np.float64).ravel(), np.asarray(reference, np.float64).ravel()
    bad = (int(a.size - np.count_nonzero(np.isfinite(a))), int(b.size - np.count_nonzero(np.isfinite(b))))
    if a.size == 0 or any(bad):
        return Distance(a.size, None, None, None, bad)
    na, nb = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if nb == 0:
        return Distance(a.size, None, 0.0 if na == 0 else None, None, bad)
    cos = None if na == 0 else float(np.square(a / na - b / nb).sum() / 2)
    return Distance(a.size, cos, float(np.linalg.norm(a - b) / nb), na / nb, bad)


def compare(subject: Captures, reference: Captures) -> dict[Key, Distance]:
    """Every tensor that both captures hold, in execution order, after the views that the sample contract names.

    The contract is checked by the caller (:func:`aprender.captures.check_contract`).
    """
    return {key: distance(*aligned(subject, reference, key)) for key in subject if key in reference}
