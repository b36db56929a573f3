"""The plain data between the recipes and the test: what an operation is given, and what it should have left.

Owns :class:`Operand`, :class:`Setting` and :class:`Prediction`.  Refuses any arithmetic of its own beyond the last rounding.  Made by
``judge.replay`` (settings) and ``judge.noise`` (predictions), read by ``judge.measure``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aprender.arithmetic import Format, Profile
from aprender.judge import witness
from aprender.judge.rounding import settle, to_format
from aprender.judge.sums import Dot, Index
from aprender.judge.witness import Float, HParams, Mask


@dataclass(frozen=True)
class Operand:
    """An input of an operation: the captured value, or an estimate with its variance where the stage was not captured."""

    value: Float
    variance: Float | None = None


@dataclass(frozen=True)
class Setting:
    """What an operation needs besides its inputs, as plain data.

    Attributes
    ----------
    profile : Profile
    hparams : mapping
    tokens, positions, keys : array
        Token ids, their positions, and the positions of the J keys.
    weights, biases : sequence of arrays
        The parts of the stage's weight group, in order; empty if it has none.
    stored : sequence of (str, array)
        Number format and bytes of each weight in its file, where the arithmetic depends on them.
    captured : array or None
        What the side captured of this stage; the RoPE table looks at it, to tell which neighbour each frequency is, and the mixing of
        values, to tell whether NaN of a forbidden key goes in.
    """

    profile: Profile
    hparams: HParams
    tokens: Sequence[int]
    positions: Index
    keys: Index
    weights: Sequence[ArrayLike] = field(default=(), repr=False)
    biases: Sequence[ArrayLike] = field(default=(), repr=False)
    captured: Float | None = field(default=None, repr=False)
    stored: Sequence[tuple[str, NDArray[np.uint8]]] = field(default=(), repr=False)

    @property
    def allowed(self) -> Mask:
        """The causal mask, [T, J]."""
        return witness.causal(self.positions, self.keys)

    @property
    def bias(self) -> Float | None:
        """The bias of all parts side by side."""
        return np.concatenate([np.asarray(b, np.float64) for b in self.biases]) if self.biases else None


@dataclass(frozen=True)
class Prediction:
    """What a correct side of this arithmetic leaves at a stage.

    Attributes
    ----------
    pre, sigma2 : array
        Replay before the last rounding, declared roundings emulated; variance of what it does not know.
    plain, variance : array
        Float64 with nothing emulated; variance of (captured - plain), without the row's common factor.
    format : Format
        The last rounding.
    certain : array of bool or bool
        Where the recipe is exact: the captured value must equal ``pre`` rounded, bit for bit.
    compared : array of bool or None
        Elements that mean anything (scores: where the mask allows); None is all.
    row : array or None
        Relative standard deviation of a factor that all elements of a row (last axis) share, [rows, 1] (``rows`` of length ``width``).
    width : int
        Length of such a row.
    expected : array or None
        Bits that the declared order of addition gives, where it was replayed.
    dot, added, gain, heads : Dot, array, float, int
        The sums inside, the part of both variances that :func:`sums.estimate` gave, the factor that it was multiplied with, and, if the
        result has heads side by side, how many: what is needed to do it again exactly.
    unrounded, cost : array or None
        Where the recipe emulates roundings of its inputs: float64 on the inputs as they are, and the variance that these roundings would
        bring if each were an independent one in a format whose exponents never end.  None: ``plain``, and nothing.
    shared : bool
        Part of the noise sits in an input, so that the elements of a row err together and count as one in a group.
    """

    pre: Float
    sigma2: Float
    plain: Float
    variance: Float
    format: Format
    certain: Mask | bool = False
    compared: Mask | None = None
    row: Float | None = None
    width: int = 0
    expected: Float | None = None
    dot: Dot | None = field(default=None, repr=False)
    added: Float | None = field(default=None, repr=False)
    gain: float = 1.0
    heads: int = 0
    unrounded: Float | None = field(default=None, repr=False)
    cost: Float | None = field(default=None, repr=False)
    shared: bool = False

    def bits(self) -> Float:
        """The value of the emulation: replayed bits where there are any, else ``pre`` rounded."""
        return to_format(self.pre, self.format) if self.expected is None else self.expected

    def unproven(self) -> Prediction:
        """The same for an arithmetic that nobody has measured: nothing emulated, no bit demanded; variances say what may be left.

        What no operation rounds (a copy) has no variance, and must still be equal.
        """
        return dataclasses.replace(self, pre=self.plain, sigma2=self.variance, certain=False, expected=None)

    def operand(self) -> Operand:
        """The stage as an input of the next, where it was not captured."""
        value, left = settle(self.pre, self.sigma2, self.format)
        return Operand(value, left if np.any(left > 0) else None)

    def dot_index(self, flat: Index) -> Index:
        """Flat index into this prediction as one into ``dot``'s result [B, T, N]."""
        if not self.heads:
            return flat
        tokens, columns = self.pre.shape
        t, c = np.divmod(flat, columns)
        size = columns // self.heads
        return np.asarray((c // size * tokens + t) * size + c % size)
