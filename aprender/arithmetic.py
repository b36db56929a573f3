"""What a side declares about its roundings: one :class:`Profile` row per arithmetic.

Owns the number formats that activations are rounded to, the order in which a dot product is added, and the rows themselves.  Refuses
tolerances: a profile says what an engine does, never how much error it may make; the judge derives that.  Called by the sides (each names
its row), by the judge (``judge.noise`` reads every column) and by the reports.

A row is per *side*, never per stage.  The order in which a foreign library adds is a fact of that library on that machine: no machine's
order is a constant here.  A side identifies it with probe products and passes it to :meth:`Profile.with_order`; until then the row holds
the envelope of ``judge.sums``, which no sensible order exceeds.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from aprender.errors import ArgumentError, UnknownName


@dataclass(frozen=True, slots=True)
class Format:
    """A binary floating-point format, round to nearest, ties to even.

    Attributes
    ----------
    name : str
    precision : int
        Bits of the significand, the hidden one included.
    least : int
        Smallest exponent e of a normal number m * 2^e with 1/2 <= m < 1; below it the spacing stays that of ``least``.
    overflow : float
        Magnitudes from here on round to infinity.
    """

    name: str
    precision: int
    least: int
    overflow: float

    @property
    def unit(self) -> float:
        """Largest relative error of one rounding: 2^-precision."""
        return 2.0**-self.precision


# overflow = (2 - 2^-precision) * 2^(largest exponent - 1): half a step above the largest number, 65520 for f16.
F32 = Format("f32", 24, -125, (2.0 - 2.0**-24) * 2.0**127)
F16 = Format("f16", 11, -13, (2.0 - 2.0**-11) * 2.0**15)
BF16 = Format("bf16", 8, -125, (2.0 - 2.0**-8) * 2.0**127)


DTYPES = ("float16", "bfloat16", "float32")
"""Number formats that a Hugging Face model can be run in; the first is the default."""


@dataclass(frozen=True, slots=True)
class Order:
    """How the products of a dot product of length K are added, in float32 with fused multiply-add.

    Attributes
    ----------
    lanes : int
        More than 0: that many virtual lanes, lane i adding elements i, i + lanes, ... in order, then a fixed tree that halves them
        (l with l + lanes/2, ...).  Every bit is declared.
    blocks : mapping of int to int
        K to the length of the blocks that are each added in order, from 0; the block sums are added in order.  Identified by probe.
    rows : int
        Fewest tokens for which ``blocks`` was identified; libraries use other kernels for one token than for many.
    """

    lanes: int = 0
    blocks: Mapping[int, int] = dataclasses.field(default_factory=dict)
    rows: int = 1

    def block(self, k: int, rows: int) -> int | None:
        """Identified block length for dot products of length ``k`` over ``rows`` tokens; None where only the envelope is known."""
        return self.blocks.get(k) if rows >= self.rows else None


@dataclass(frozen=True, slots=True)
class Ggml:
    """What differs between ggml's CPU variants; that a profile has one at all means the recipes of ``judge.ggml``.

    Attributes
    ----------
    fma : bool
        RoPE is contracted to fused multiply-adds.
    half_away : bool
        Activations of 8 bits are rounded by the reference rule (halves away from zero), not by the vectorised one.
    """

    fma: bool = True
    half_away: bool = False


@dataclass(frozen=True, slots=True)
class Fused:
    """Attention as one kernel: scores and probabilities have no value of their own, and inside it all is float32 but one thing.

    The unnormalised probabilities exp(s - max) are rounded to the activation format before they meet the values; their sum is not.

    Attributes
    ----------
    exp : float
        Relative standard deviation of the kernel's exponential, beyond what rounding in float32 makes.
    """

    exp: float


@dataclass(frozen=True, slots=True)
class Profile:
    """One arithmetic.

    Attributes
    ----------
    name, text : str
        Name on the command line; one line for people.
    activations : Format
        Every stage's value is rounded to it.  Inside an operation the arithmetic is float32.
    cache : Format
        What keys and values are rounded to when they are written to the cache.
    order : Order
        Accumulation of dot products.
    fused_bias : bool
        A projection's bias is added before the product is rounded to ``activations`` (the pre-bias value then does not exist).
    table_ulps : int
        How many float32 steps each rotary frequency may be from the correctly rounded definition: what the side's own power function does.
        The position product is one float32 rounding, cosine and sine are good to 1 ulp.
    wide : bool
        Inside every operation that is no dot product the arithmetic is float64 in a fixed order, rounded once to ``activations``; if
        not, it is float32 with the roundings of ``judge.noise``.
    band : float
        Largest rms z of a clean stage with this row, the order unknown (measured; ``judge.rule`` applies it).
    validated : bool
        Whether clean z and power were measured for the row.  If not, the reports say "arithmetic model not validated", and nothing is
        emulated: no bit is demanded and I is off; what predicted rounding does not explain is still wrong.
    ggml : Ggml or None
        Activations are rounded as the format of each weight wants, and the recipes are those of ``judge.ggml``.
    accumulator : Format
        What dot products are added in; if not float32 (whose order is ``order``), one product after the other by fused multiply-add.
    fused : Fused or None
        Attention is one kernel; None: scores, probabilities and their product with the values are each rounded and can be captured.
    """

    name: str
    text: str
    activations: Format
    cache: Format
    order: Order
    fused_bias: bool
    table_ulps: int
    wide: bool
    band: float
    validated: bool
    ggml: Ggml | None = None
    fused: Fused | None = None
    accumulator: Format = F32

    def with_order(self, data: Mapping[str, object] | None) -> Profile:
        """The row with the accumulation order that a side identified on its machine.

        Parameters
        ----------
        data : mapping or None
            What the side's probe found, as plain data (it travels in the manifest): ``{"matmul": "envelope"}``, or ``{"matmul": {"Kc":
            {K: block, ...}, "rows": fewest tokens}}``; keys may be strings, as JSON makes them.  Of ggml ``{"fma": ..., "half_away":
            ...}``, as its CPU variant does.  None: nothing is known.

        Returns
        -------
        Profile
            This row with that order; unchanged if the order stays unknown or is declared already.

        Raises
        ------
        ArgumentError
            The data are not of that form.
        """
        if self.ggml is not None and data is not None:
            said: dict[str, bool] = {}
            for name in (field.name for field in dataclasses.fields(Ggml) if field.name in data):
                value = data[name]
                if not isinstance(value, bool):
                    raise ArgumentError(f"what a CPU variant of ggml does: {name} is {value!r}, true or false is needed", code="ARGUMENT")
                said[name] = value
            return dataclasses.replace(self, ggml=dataclasses.replace(self.ggml, **said))
        found = None if data is None else data.get("matmul", "envelope")
        if found is None or found == "envelope" or self.order.lanes:
            return self
        table = found.get("Kc") if isinstance(found, Mapping) else None
        if not isinstance(found, Mapping) or not isinstance(table, Mapping):
            raise ArgumentError(f"an accumulation order is 'envelope' or {{'Kc': {{K: block}}}}, not {found!r}", code="ARGUMENT")
        blocks = {int(k): int(v) for k, v in table.items() if v is not None and v != "envelope"}
        if any(k < 1 or v < 1 for k, v in blocks.items()):
            raise ArgumentError(f"an accumulation order needs positive lengths, not {blocks}", code="ARGUMENT", field="matmul")
        return dataclasses.replace(self, order=Order(blocks=blocks, rows=int(found.get("rows", 1))))


def _ggml(name: str, text: str, cache: Format) -> Profile:
    """A row of llama.cpp on a CPU without flash attention: one number format for keys and values."""
    return Profile(
        name=name,
        text=f"llama.cpp on a CPU: activations rounded as the weight's format wants, {text}, no flash attention",
        activations=F32,
        cache=cache,
        order=Order(),
        fused_bias=False,
        table_ulps=0,
        wide=False,
        band=1.5,
        validated=True,
        ggml=Ggml(),
    )


def _hf(name: str, dtype: str, fmt: Format, band: float, fused: Fused | None = None) -> Profile:
    """A row of Hugging Face transformers on a CPU: one dtype, float32 inside each operation."""
    return Profile(
        name=name,
        text=f"Hugging Face transformers, {dtype}, {'eager' if fused is None else 'sdpa'} attention",
        activations=fmt,
        cache=fmt,
        order=Order(),
        fused_bias=True,
        table_ulps=2,
        wide=False,
        band=band,
        validated=True,
        fused=fused,
    )


def _exact(name: str, text: str, validated: bool) -> Profile:
    """A row of our own engine: every bit is declared, and is the same on every device."""
    return Profile(
        name=name,
        text=f"{text}: float32 dot products in 16 virtual lanes, all else float64 rounded once",
        activations=F32,
        cache=F32,
        order=Order(lanes=16),
        fused_bias=False,
        table_ulps=0,
        wide=True,
        band=1.5,
        validated=validated,
    )


# torch's vectorised exponentials of attention kernels on a CPU are polynomials (ATen/cpu/vec, exp_u20 and fexp_u20).  The figures are the
# rms of polynomial / exp - 1 over one period, by their coefficients: of fifth degree for float32, of third degree for 16-bit results (at
# most 1.1e-4 there).  tests/test_fused.py computes them again.
SDPA_WIDE, SDPA_SHORT = Fused(exp=6.0e-8), Fused(exp=5.5e-5)


PROFILES: Mapping[str, Profile] = {
    row.name: row
    for row in (
        _hf("hf-f32", "float32", F32, 1.5),
        _hf("hf-f16", "float16", F16, 1.15),
        _hf("hf-bf16", "bfloat16", BF16, 1.15),
        _exact("exact", "aprender", validated=True),
        _exact("exact-cuda", "aprender on a GPU", validated=False),  # until scripts/first_gpu_day.py has measured one
        _hf("hf-f32-sdpa", "float32", F32, 1.5, SDPA_WIDE),
        _hf("hf-f16-sdpa", "float16", F16, 1.15, SDPA_SHORT),
        _hf("hf-bf16-sdpa", "bfloat16", BF16, 1.15, SDPA_SHORT),
        dataclasses.replace(
            _hf("hf-f16", "float16", F16, 1.15), name="f16-sums", text="float16 throughout, the sums of dot products too", accumulator=F16
        ),
        _ggml("ggml-cpu", "float32 cache", F32),
        _ggml("ggml-cpu-f16", "float16 cache", F16),
    )
}
"""Every declared arithmetic, by name."""


def profile(name: str) -> Profile:
    """The row of a name.

    Raises
    ------
    UnknownName
        No row has that name; the message suggests the nearest.
    """
    if name in PROFILES:
        return PROFILES[name]
    near = difflib.get_close_matches(name, list(PROFILES), n=1, cutoff=0.4)
    hint = f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(PROFILES)}"
    raise UnknownName(f"there is no arithmetic profile '{name}'{hint}", code="LOOKUP", field="arithmetic")
