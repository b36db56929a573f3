"""Which node of llama.cpp's graph is which stage, and the eval callback that copies it out.

Owns the sites (:class:`Sites`), the :class:`Recorder`, and the way of a node into our shape.  Refuses a tensor that does not read as the
library's own functions say, and a value whose shape is not the stage's.  Called by ``sides.llamacpp_worker`` only.

A node is recognised by its operation and by the parameter of the file that it reads (``blk.3.attn_output.weight``), because llama.cpp
names some nodes by number; a node without parameter is recognised by its operation and name.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from aprender import _core, stages
from aprender.errors import CannotRun, ConfigError
from aprender.manifest import HALVES, PAIRS
from aprender.sides.llamacpp_native import EVAL, TYPES, Array, Library, Tensor
from aprender.stages import Key, Stage

VIEW = "VIEW"
SOFT_MAX = "SOFT_MAX"
SCORES = "SCORES"
GIVEN: Mapping[str, tuple[tuple[str, int], ...]] = {
    "RMS_NORM": (("eps", 0),),
    "ROPE": (("theta", 5), ("rope_scale", 6), ("rope_extrapolation", 7), ("rope_attention_scale", 8)),
    SOFT_MAX: (("attention_scale", 0), ("alibi", 1)),
}
"""Operation to the parameters of its nodes that are held against the file, and where among op_params each float is."""

TRANSPOSED = frozenset({"cache_v"})  # without flash attention the values lie with the token as the fastest axis


@dataclass(frozen=True)
class Site:
    """A node that shows a stage, or a part of it."""

    key: Key
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Sites:
    """Where the wanted stages show: by (operation, parameter that the node reads), and by (operation, name of the node)."""

    by_parameter: Mapping[tuple[str, str], Site]
    by_name: Mapping[tuple[str, str], Site]

    @classmethod
    def of(cls, wanted: Iterable[Key], flags: frozenset[str]) -> Sites:
        """Those of the stages that the table says llama.cpp shows."""
        parameters: dict[tuple[str, str], Site] = {}
        names: dict[tuple[str, str], Site] = {}
        for stage, layer in wanted:
            row = stages.by_name[stage]
            if not row.node:
                continue
            name, op = row.node.split()
            read = _parameters(row, flags, layer)
            for part, parameter in enumerate(read):
                parameters[op, parameter] = Site((stage, layer), part, len(read))
            if not read:
                names[op, _spelled(name, op, layer)] = Site((stage, layer))
        return cls(parameters, names)

    def find(self, op: str, name: str, sources: Iterable[str]) -> Site | None:
        """The site of a node, if it is one."""
        found = (self.by_parameter.get((op, source)) for source in sources)
        return next((site for site in found if site is not None), None) or self.by_name.get((op, name))


def _parameters(row: Stage, flags: frozenset[str], layer: int | None) -> list[str]:
    """Names in the file of the parameters that a row's node reads: of several parts each."""
    group = row.weight or row.bias
    spelled = {weight: gguf for weight, _, gguf, *_ in _core.WEIGHTS}
    out = []
    for weight, member, _, _, _, _, otherwise, flag in _core.WEIGHTS:
        if group is not None and member == group:
            here = weight if flag == "ALWAYS" or flag in flags else otherwise
            out += [spelled[here].replace("%d", str(layer))] if here else []
    return out


def _spelled(name: str, op: str, layer: int | None) -> str:
    """A node's own name in a layer."""
    return f"{name}_l{layer} (view)" if op == VIEW else name if layer is None else f"{name}-{layer}"


def lanes(stage: str, model: _core.Model) -> str:
    """Order of the RoPE partners where llama.cpp shows a stage: as the rows of q and k lie in the file."""
    turned = model.quirks and stage in _TURNED
    return PAIRS if turned else HALVES


_TURNED = frozenset(row.name for row in stages.STAGES if row.shape[-1] in ("QKV", "Qd", "Kd") and row.out in ("QKV", "Q", "K", "KCACHE"))


class Recorder:
    """The eval callback: says which nodes are wanted, and copies them once they are computed.

    Attributes
    ----------
    values : dict of Key to list of arrays
        One array per piece of the prompt, in the shape of the stage.
    nodes : dict of Key to (str, str)
        Name of the node (of several parts the last), and its type.
    held : dict of str to (dict of str to float)
        Parameters that nodes were given: each value that occurs, with the first node that has it.
    """

    def __init__(self, library: Library, wanted: Iterable[Key], model: _core.Model) -> None:
        self.library, self.hparams = library, model.hparams
        self.sites = Sites.of(wanted, model.flags)
        self.values: dict[Key, list[Array]] = {}
        self.nodes: dict[Key, tuple[str, str]] = {}
        self.held: dict[str, dict[str, float]] = {}
        self.problem: Exception | None = None
        self.tokens = self.keys = 0
        self._parts: dict[Key, dict[int, Array]] = {}
        self._raw_scores: dict[str, tuple[Key, Array]] = {}
        self._checked = False
        self.callback = EVAL(self._called)

    def expect(self, tokens: int, keys: int) -> None:
        """Say how many tokens come next, and how many keys there are then."""
        self.tokens, self.keys = tokens, keys

    def _called(self, pointer: int, ask: bool, _: object) -> bool:
        """Called by the library twice per node; an exception must not cross it, so it is kept, and the run's caller raises it."""
        try:
            tensor = Tensor.from_address(pointer)
            if not self._checked:
                self._check(tensor, pointer)
            op = self.library.ggml_op_desc(pointer).decode()
            site = self._site(tensor, op)
            softmax = op == SOFT_MAX and bool(self._raw_scores)
            if ask:
                self._hold(tensor, op)
                return site is not None or op == SOFT_MAX
            if softmax:
                self._scale(tensor)
            if site is not None:
                self._take(site, tensor, pointer)
        except Exception as problem:
            self.problem = self.problem or problem
            return False
        return True

    def _check(self, tensor: Tensor, pointer: int) -> None:
        """Whether the struct of a tensor reads as the library's own functions do."""
        said = self.library.ggml_get_name(pointer), self.library.ggml_nelements(pointer)
        read = tensor.name, int(np.prod(tuple(tensor.ne)))
        if said != read:
            raise CannotRun(f"llama.cpp {self.library.version}: a tensor reads as {read}, it is {said}", code="BAD_VERSION")
        self._checked = True

    def _hold(self, tensor: Tensor, op: str) -> None:
        """Note what a node is given besides its inputs."""
        for name, at in GIVEN.get(op, ()):
            (value,) = struct.unpack("f", struct.pack("i", tensor.op_params[at]))
            places = self.held.setdefault(name, {})
            if value not in places.values():
                places[tensor.name.decode()] = value

    def _site(self, tensor: Tensor, op: str) -> Site | None:
        sources = [Tensor.from_address(source).name.decode() for source in tensor.src if source is not None]
        return self.sites.find(op, tensor.name.decode(), sources)

    def _take(self, site: Site, tensor: Tensor, pointer: int) -> None:
        """Copy a node out and bring it to the shape of its stage; parts side by side."""
        row = stages.by_name[site.key[0]]
        value = self._shaped(row, self.library.read(tensor, pointer))
        self.nodes[site.key] = tensor.name.decode(), TYPES[tensor.type]
        if row.op == SCORES:
            self._raw_scores[tensor.name.decode()] = site.key, value
            return
        parts = self._parts.setdefault(site.key, {})
        parts[site.part] = value
        if len(parts) == site.parts:
            self._put(site.key, np.concatenate([parts[i] for i in range(site.parts)], axis=-1))
            del self._parts[site.key]

    def _put(self, key: Key, value: Array) -> None:
        due = stages.by_name[key[0]].dims(self.hparams, self.tokens, self.keys)
        if value.shape != due:
            raise ConfigError(
                f"{stages.spell(key)} has shape {list(value.shape)} in llama.cpp, {list(due)} is needed",
                code="SHAPE",
                stage=key[0],
                layer=key[1],
            )
        self.values.setdefault(key, []).append(value)

    def _shaped(self, row: Stage, value: Array) -> Array:
        """[ne3, ne2, ne1, ne0] as the stage is shaped: heads side by side, padded keys cut off."""
        if row.shape[0] == "J":
            value = value.transpose(3, 2, 1, 0) if row.node.split()[0] in TRANSPOSED else value[0]
            return np.ascontiguousarray(value.reshape(value.shape[0], -1)[: self.keys])
        if row.shape[-1] == "J":
            return np.ascontiguousarray(value[0, :, :, : self.keys])
        return value.reshape(self.tokens, -1)

    def _scale(self, softmax: Tensor) -> None:
        """Scores as the softmax forms them: the product times the scale that this node was given, rounded; 0 for later keys, if finite.

        The engine's own mask shows in the probabilities, where the judge demands 0 for a key that may not be seen.
        """
        source = Tensor.from_address(softmax.src[0]).name.decode()
        if source not in self._raw_scores:
            return
        scale, slope = struct.unpack("ff", struct.pack("ii", *softmax.op_params[:2]))
        if slope:
            raise ConfigError(f"{source}: scores with a slope per head (ALiBi) are not a stage", code="UNSUPPORTED")
        key, raw = self._raw_scores.pop(source)
        first = self.keys - self.tokens
        seen = np.arange(self.keys)[None, :] <= first + np.arange(self.tokens)[:, None]
        scores = raw * np.float32(scale)
        self._put(key, np.where(seen | ~np.isfinite(scores), scores, np.float32(0)))  # the mask is added: it hides no NaN
