"""In which order this machine's torch adds the products of a float32 matrix product, found by experiment.

Owns the probe: two huge numbers that cancel are put at places i and j of an all-ones product; the ones that were added before they met
are lost, so the result counts the terms that joined later, and thereby shows where in the order of summation i and j meet.  From that the
length of the blocks that are each added in order is read off, and then *proved*: random products must come out bit for bit equal to that
order, with fused multiply-add, in every row.  What is not proved is not claimed.  Refuses to keep any machine's order as a constant.
Called by ``sides.hf``; the data it returns travel in the manifest and are read by :meth:`aprender.arithmetic.Profile.with_order`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float32]
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# 2^60 x 2^40 is far above any sum of ones that is kept beside it and far below float32's end.
HUGE_X, HUGE_W = 2.0**60, 2.0**40
COLUMNS = 16  # output columns compared with the emulation
WIDEST = 1024  # columns of the weight; a head of 150 000 rows is probed as one of 1024
LONGEST = 1 << 15  # of a dot product that is probed: float32 counts ones exactly up to 2^24, time is the limit


def identify(products: Iterable[tuple[Product, int, int, int]]) -> dict[str, Any] | str:
    """The order of accumulation for a set of products.

    Parameters
    ----------
    products : iterable of (product, T, K, N)
        The product takes x [T, K] and w [N, K] to x · wᵀ, by the way the model takes; all T alike.

    Returns
    -------
    dict or str
        ``{"Kc": {K: block or None}, "rows": T}``, a None where the order is unknown; ``"envelope"`` if none is known.
    """
    found: dict[int, int | None] = {}
    rows = 1
    for product, tokens, k, n in products:
        rows = tokens
        block = block_length(tokens, k, min(n, WIDEST), product)
        # one number per K: products of another width or kind that disagree leave it unknown
        found[k] = block if found.get(k, block) == block else None
    if not any(found.values()):
        return "envelope"
    return {"Kc": {str(k): block for k, block in sorted(found.items())}, "rows": rows}


def projection(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """X · Wᵀ as ``nn.Linear`` does it."""
    return torch.nn.functional.linear(x, w)


def scores(heads: int) -> Product:
    """X · Wᵀ as eager attention multiplies queries and keys: one batch per head, queries a transposed view."""

    def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        query = x[None, :, None].expand(1, -1, heads, -1).contiguous().transpose(1, 2)
        key = w[None, None].expand(1, heads, -1, -1).contiguous()
        return torch.matmul(query, key.transpose(2, 3))[0, -1]

    return product


def mix(heads: int) -> Product:
    """X · Wᵀ as eager attention multiplies probabilities and values: one batch per head, values [J, h]."""

    def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        probabilities = x[None, None].expand(1, heads, -1, -1).contiguous()
        value = w.T[None, None].expand(1, heads, -1, -1).contiguous()
        return torch.matmul(probabilities, value)[0, -1]

    return product


def block_length(tokens: int, k: int, n: int, product: Product) -> int | None:
    """Length of the blocks that are added in order, proved; None if the order is another one."""
    if k > LONGEST:
        return None
    if k == 1:
        return 1
    block = _in_order(tokens, k, n, product)
    # all in order may also be without fused multiply-add: each product rounded by itself, which is blocks of one
    candidates = () if block is None else (k, 1) if block == k else (block,)
    return next((length for length in candidates if _proved(tokens, k, n, length, product)), None)


def _lost(i: int, j: int, shape: tuple[int, int, int], product: Product) -> int:
    """How many terms are summed where terms i and j first meet, in the last row."""
    tokens, k, n = shape
    x, w = torch.ones(tokens, k), torch.ones(n, k)
    x[:, i], x[:, j] = HUGE_X, -HUGE_X
    w[:, [i, j]] = HUGE_W
    return k - round(float(product(x, w)[-1, 0]))


def _in_order(tokens: int, k: int, n: int, product: Product) -> int | None:
    """The first place at which the running order 0, 1, 2 … breaks: the candidate block length; None if it breaks at once."""
    shape = tokens, k, n
    if _lost(0, 1, shape, product) != 2:
        return None
    known, broken = 1, k  # terms 0 … known are added in order; term `broken` is not, or is past the end
    while broken - known > 1:
        middle = (known + broken) // 2
        # the last term of a later block looks in order by itself; the one before it does not
        if all(_lost(0, place, shape, product) == place + 1 for place in (middle, middle - 1)):
            known = middle
        else:
            broken = middle
    return broken


def emulate(x: Array, w: Array, block: int) -> Array:
    """X · Wᵀ with fused multiply-add in order within blocks of K, and the block sums added in order, in float32.

    A product of two float32 numbers is exact in float64; the sum is then rounded twice, which differs from one rounding once in 2^29.
    """
    wide_x, wide_w = x.astype(np.float64), w.astype(np.float64)
    total: Array | None = None
    for start in range(0, x.shape[1], block):
        part: Array = np.zeros((x.shape[0], w.shape[0]), np.float32)
        for place in range(start, min(start + block, x.shape[1])):
            part = (part + wide_x[:, place : place + 1] * wide_w[:, place]).astype(np.float32)
        total = part if total is None else total + part
    assert total is not None
    return total


def _proved(tokens: int, k: int, n: int, block: int, product: Product) -> bool:
    """Whether random products have exactly the bits of that order, in every row."""
    generator = np.random.default_rng(k)
    x = generator.standard_normal((tokens, k), dtype=np.float32)
    w = generator.standard_normal((n, k), dtype=np.float32)
    columns = np.unique(np.linspace(0, n - 1, COLUMNS).astype(int))
    theirs = product(torch.from_numpy(x), torch.from_numpy(w)).numpy()[:, columns]
    return bool(np.array_equal(theirs, emulate(x, w[columns], block)))
