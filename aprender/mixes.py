"""Which number format each weight of a converted model gets, and how much rounding to it may cost.

Owns the words of ``--formats``: a format for all matrices, ``keep``, or a recipe that gives more bits to some weights, then
``PATTERN=FORMAT`` for single ones.  Where a width does not fit a format's blocks another one is taken, as llama.cpp does, and that is said.
Refuses formats that the container does not have or that nobody here can write, and patterns that no matrix matches.  Norms and biases are
no matter of choice: they are float32, or stay what they are.  Called by conversion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from aprender import _core
from aprender.errors import ArgumentError, UnknownName
from aprender.stages import suggest
from aprender.writers import FORMATS

KEEP = "keep"
PLAIN = "F32"
"""What norms and biases are, and what a format becomes that the container does not have."""

WRITABLE: frozenset[str] = frozenset(row[0] for row in _core.FORMATS if row[8])

RECIPES: Mapping[str, tuple[str, str]] = {"Q4_K_M": ("Q4_K", "Q6_K")}
"""Name to the format of most matrices and that of those which get more bits."""

SMALLER: Sequence[str] = ("Q8_0", "F16")
"""What a matrix gets whose rows do not fit the blocks of the wanted format: the first that they do fit."""

GGUF_FILE_TYPES: Mapping[str, int] = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 14, "Q4_K_M": 15,
    "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32, "MXFP4": 38,
}  # fmt: skip
"""``general.file_type`` of a recipe, or of the format that most values have."""

UNKNOWN_FILE_TYPE = 1024

#: Format to (values that share a scale, steps from -largest to +largest, what rounding the scales themselves adds): see allowed_loss.
_ROUNDING: Mapping[str, tuple[float, float, float]] = {
    "F32": (1, float("inf"), 0), "F16": (1, 2**11, 0), "BF16": (1, 2**8, 0), "Q8_0": (32, 254, 2**-11), "APR_Q8": (float("inf"), 254, 1e-6),
    "Q6_K": (16, 32, 0.062), "Q4_K": (32, 15, 0.12), "Q4_0": (32, 8, 2**-11), "APR_Q4": (32, 14, 2**-11),
}  # fmt: skip


def allowed_loss(name: str, peak: float) -> float:
    """Largest relative RMS error that honest rounding to a format leaves.

    A block of n values with one scale and s steps between its extremes is off by at most peak/s each, and its own RMS is at least
    peak/sqrt(n); summed over the blocks, the tensor's error is at most sqrt(n)/s of its RMS.  Where the tensor's own peak is lower than
    sqrt(n) times its RMS, that bounds it too.

    Parameters
    ----------
    name : str
        A format.
    peak : float
        Largest magnitude of the tensor over its RMS.

    Returns
    -------
    float
        Infinity where no bound is known.
    """
    if name not in _ROUNDING:
        return float("inf")
    shared, steps, more = _ROUNDING[name]
    return float(min(shared**0.5, peak) / steps + more)


@dataclass(frozen=True, slots=True)
class Mix:
    """What ``--formats`` asked for.

    Attributes
    ----------
    base : str
        A format, a recipe or ``keep``.
    rules : tuple of (pattern, format)
        Later ones win.
    """

    base: str
    rules: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return ",".join([self.base, *(f"{pattern}={name}" for pattern, name in self.rules)])


def parse(text: str) -> Mix:
    """Read ``Q4_K,output=Q6_K,*.attn_v=Q8_0``; the first word may be missing and is ``keep`` then.

    Raises
    ------
    UnknownName
        A format or recipe that does not exist, or that cannot be written.
    ArgumentError
        A word in the wrong place.
    """
    base, rules = KEEP, []
    for place, word in enumerate(part.strip() for part in text.split(",")):
        pattern, given, name = word.partition("=")
        if given and pattern.strip() and name.strip():
            rules.append((pattern.strip(), _known(name.strip(), (KEEP,))))
        elif place == 0 and word and not given:
            base = _known(word, (KEEP, *RECIPES))
        else:
            raise ArgumentError(
                f"'{word}' in '{text}': a format or '{KEEP}' comes first, then PATTERN=FORMAT", code="ARGUMENT", field="formats"
            )
    return Mix(base, tuple(rules))


def _known(word: str, others: Sequence[str]) -> str:
    """A format that can be written, or one of the other words, as it is spelled here."""
    names = [*others, *sorted(WRITABLE, key=list(FORMATS).index)]
    for name in names:
        if name.lower() == word.lower():
            return name
    why = f"{word.upper()} can be read, not written" if word.upper() in FORMATS else f"there is no format '{word}'{suggest(word, names)}"
    raise UnknownName(f"{why}; formats: {', '.join(names)}", code="LOOKUP", field="formats")


# ---- a format for each weight ----------------------------------------------------------------------------------------------------------


def key(weight: _core.WeightInfo) -> str:
    """How patterns spell a weight: ``output``, ``3.attn_v``."""
    return weight.name if weight.layer is None else f"{weight.layer}.{weight.name}"


def choose(mix: Mix, weights: Sequence[_core.WeightInfo], container: str) -> tuple[list[str], list[str]]:
    """A format for each weight of a model.

    Parameters
    ----------
    mix : Mix
    weights : sequence of WeightInfo
        Each tensor of the source once.
    container : str
        What is written.

    Returns
    -------
    list of str
        The formats, one for each weight.
    list of str
        What was asked for and could not be had, in words.

    Raises
    ------
    UnknownName
        A pattern that no matrix matches.
    ArgumentError
        A format that the container does not have.
    """
    matrices = [weight for weight in weights if len(weight.shape) > 1]
    for pattern, _ in mix.rules:
        if not any(fnmatchcase(key(weight), pattern) for weight in matrices):
            near = suggest(pattern, {weight.name for weight in matrices})
            raise UnknownName(f"no matrix of the model matches '{pattern}'{near or ', see info MODEL'}", code="LOOKUP", field="formats")
    layers = 1 + max((weight.layer for weight in weights if weight.layer is not None), default=-1)
    more = _more_bits(matrices, layers)
    chosen, instead = [], dict[tuple[str, str, int], set[str]]()
    for weight in weights:
        wanted = _wanted(mix, weight, key(weight) in more, container)
        its = _fitting(wanted, weight, container)
        chosen.append(its)
        if its != wanted:
            instead.setdefault((its, wanted, weight.shape[-1]), set()).add(weight.name)
    notes = [
        f"{its} instead of {wanted} for {', '.join(sorted(names))}: rows of {width} are no multiple of {FORMATS[wanted].block}"
        for (its, wanted, width), names in instead.items()
    ]
    return chosen, notes


def _wanted(mix: Mix, weight: _core.WeightInfo, more: bool, container: str) -> str:
    """The format that the words ask for, before the width has a say."""
    name = mix.base
    for pattern, other in mix.rules:
        if len(weight.shape) > 1 and fnmatchcase(key(weight), pattern):
            name = other
    if name == KEEP:
        vector = len(weight.shape) == 1 and container == "gguf"  # llama.cpp wants norms and biases in float32
        same = has(container, weight.format) and _fitting(weight.format, weight, container) == weight.format
        return weight.format if same and not vector else PLAIN
    if len(weight.shape) == 1:
        return PLAIN
    if name in RECIPES:
        name = RECIPES[name][more]
    if not has(container, name):
        there = ", ".join(other for other in FORMATS if other in WRITABLE and has(container, other))
        raise ArgumentError(f"{key(weight)}: {container} has no format {name}; it has {there}", code="UNSUPPORTED", field="formats")
    return name


def has(container: str, name: str) -> bool:
    """Whether a container can hold a format."""
    return (FORMATS[name].gguf if container == "gguf" else FORMATS[name].apr) >= 0


def _fitting(name: str, weight: _core.WeightInfo, container: str) -> str:
    """The format, or the next one whose blocks the rows fill; APR fills the last block of a row with zeros instead."""
    if container != "gguf":
        return name
    return next(other for other in (name, *SMALLER) if weight.shape[-1] % FORMATS[other].block == 0)


def _more_bits(matrices: Sequence[_core.WeightInfo], layers: int) -> set[str]:
    """The weights that get more bits in llama.cpp's recipes of size M.

    They are the head, and the values and down projections of the first and the last eighth of the layers and of every third between.
    """
    head = "output" if any(weight.name == "output" for weight in matrices) else "token_embd"
    eighth = layers // 8
    chosen = {layer for layer in range(layers) if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2}
    return {key(w) for w in matrices if w.name == head or (w.name in ("attn_v", "ffn_down") and w.layer in chosen)}


def gguf_file_type(mix: Mix, sizes: Mapping[str, int]) -> int:
    """The number that ``general.file_type`` gives a mix.

    Parameters
    ----------
    mix : Mix
    sizes : mapping
        Format to how many values have it.
    """
    if mix.base in RECIPES:
        return GGUF_FILE_TYPES[mix.base]
    return GGUF_FILE_TYPES.get(max(sizes, key=lambda name: sizes[name]), UNKNOWN_FILE_TYPE)
