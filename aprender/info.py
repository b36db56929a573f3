"""``python -m aprender.info``: what is in a model file, as the file says it and as the engine will use it.

Owns the description of a file (container, real number formats, tensors, tokenizer), of the model bound from it (architecture, flags,
hyper-parameters with where each came from, the head), and of the plan.  Refuses to repair or to guess: a file that does not bind is
described as far as it goes, then the reason is given and the exit code is 3.  Called from the command line; :func:`describe` gives the same
as plain data.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aprender import _prompt, _show
from aprender._command import AGREE, Parser, command
from aprender.env import cuda_facts

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType
    from rich.table import Table

    from aprender import _core
    from aprender.errors import Error

SCHEMA = "aprender.info/1"

PLAN_WIDTH = 140
"""Columns of a plan where the output is not a terminal: one line for each step, whatever it reads."""

EXAMPLES = (
    f"python -m aprender.info {_prompt.CANARY}",
    f"python -m aprender.info {_prompt.CANARY} --filter 'blk.3.*'",
    f"python -m aprender.info {_prompt.CANARY} --plan",
    f"python -m aprender.info {_prompt.CANARY} --json | python -m json.tool",
)


# ---- the file --------------------------------------------------------------------------------------------------------------------------


def _count(shape: Iterable[int]) -> int:
    """Number of values of a shape."""
    total = 1
    for size in shape:
        total *= size
    return total


def _formats(tensors: Sequence[_core.TensorInfo]) -> list[dict[str, Any]]:
    """What the tensors are really stored as, most values first."""
    rows: dict[str, dict[str, Any]] = {}
    for tensor in tensors:
        row = rows.setdefault(tensor.format, {"format": tensor.format, "tensors": 0, "values": 0, "bytes": 0})
        row["tensors"] += 1
        row["values"] += _count(tensor.shape)
        row["bytes"] += tensor.nbytes
    values = sum(row["values"] for row in rows.values())
    for row in rows.values():
        row["share"] = row["values"] / values if values else 0.0
        row["bits_per_weight"] = 8 * row["bytes"] / row["values"] if row["values"] else None
    return sorted(rows.values(), key=lambda row: (-row["values"], row["format"]))


def _tensors(tensors: Sequence[_core.TensorInfo]) -> list[dict[str, Any]]:
    return [{"name": t.name, "format": t.format, "shape": list(t.shape), "bytes": t.nbytes, "offset": t.offset} for t in tensors]


def _chosen(tensors: Sequence[_core.TensorInfo], pattern: str | None) -> list[_core.TensorInfo]:
    """The tensors that a shell pattern selects; UnknownName if there are none."""
    from fnmatch import fnmatchcase

    from aprender.errors import UnknownName
    from aprender.stages import suggest

    found = [tensor for tensor in tensors if pattern is None or fnmatchcase(tensor.name, pattern)]
    if pattern is not None and not found:
        near = suggest(pattern, [tensor.name for tensor in tensors])
        raise UnknownName(
            f"no tensor of the file matches '{pattern}'{near or ', a shell pattern such as *norm*'}", code="LOOKUP", field="filter"
        )
    return found


def _declared(file: _core.File) -> dict[str, Any]:
    """What the file says about itself that the bytes need not agree with."""
    keys = ("general.architecture", "general.name", "general.file_type", "model_type", "architectures", "dtype", "torch_dtype")
    said = {key: _plain(file.get(key)) for key in keys}
    return {key: value for key, value in said.items() if value is not None}


def _plain(value: object) -> object:
    """A value of the metadata that JSON and people can read; of anything but a word, a number or a list of words only its kind is told."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return f"({type(value).__name__})"


# ---- the tokenizer ---------------------------------------------------------------------------------------------------------------------


def _tokenizer(file: _core.File) -> dict[str, Any] | None:
    """The container's own tokenizer in a few words; None if it has none.  One that cannot be used is described too, with the reason."""
    from aprender.errors import Error
    from aprender.text import for_model

    said = _json_tokenizer(file) if file.container == "safetensors" else _keys_tokenizer(file)
    if said is None:
        return None
    try:
        said["problem"] = None if for_model(file.path, file) else "not one that this package reads"
    except Error as problem:
        said["problem"] = " ".join(str(problem).split())
    return said


def _keys_tokenizer(file: _core.File) -> dict[str, Any] | None:
    """From the metadata of a GGUF or APR file."""
    from aprender.text.keys import APR, APR_TEMPLATE, GGUF, GGUF_TEMPLATE

    apr = file.container == "apr"

    def get(key: str) -> Any:
        return file.get(APR[key] if apr else GGUF + key)

    tokens, merges = get("tokens"), get("merges")
    if not isinstance(tokens, list):
        return None
    specials = {}
    for role in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        ident = get(f"{role}_token_id")
        if ident is not None:
            known = isinstance(ident, int) and 0 <= ident < len(tokens)
            specials[role] = {"id": _plain(ident), "piece": tokens[ident] if known else None}
    return {
        "source": f"{'tokenizer' if apr else 'tokenizer.ggml'}.* of the {file.container.upper()}",
        "kind": _plain(get("model")),
        "pre": _plain(get("pre")),
        "tokens": len(tokens),
        "merges": len(merges) if isinstance(merges, list) else None,
        "specials": specials,
        "add_bos": _plain(get("add_bos_token")),
        "chat_template": file.get(APR_TEMPLATE if apr else GGUF_TEMPLATE) is not None,
    }


def _json_tokenizer(file: _core.File) -> dict[str, Any] | None:
    """From ``tokenizer.json`` beside a safetensors file."""
    import json
    from pathlib import Path

    folder = Path(file.path).parent
    said: dict[str, Any] = {"source": "tokenizer.json", "kind": None, "pre": None, "tokens": None, "merges": None}
    try:
        data = json.loads((folder / "tokenizer.json").read_bytes())
        model = data["model"]
        added = {token["id"]: token["content"] for token in data.get("added_tokens") or ()}
        ids = {*model["vocab"].values(), *added} if isinstance(model["vocab"], dict) else {*range(len(model["vocab"])), *added}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return said | {"kind": "not readable", "specials": {}, "add_bos": None, "chat_template": False}
    roles = {role: file.get(f"{role}_token_id") for role in ("bos", "eos", "pad", "unk")}
    return said | {
        "kind": model.get("type"),
        "tokens": len(ids),
        "merges": len(model.get("merges") or ()) or None,
        "specials": {role: {"id": ident, "piece": added.get(ident)} for role, ident in roles.items() if isinstance(ident, int)},
        "add_bos": None,
        "chat_template": _has_template(folder),
    }


def _has_template(folder: Path) -> bool:
    """Whether the files beside the tokenizer hold a chat template."""
    import json

    if (folder / "chat_template.jinja").exists():
        return True
    try:
        return "chat_template" in json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError, TypeError):
        return False


# ---- the model and its plan ------------------------------------------------------------------------------------------------------------


def _head(model: _core.Model) -> dict[str, Any]:
    """Whether the head is the token table, and what says so."""
    from aprender import _core

    name, _, gguf, hf, *_, shared, _ = next(row for row in _core.WEIGHTS if row[6] is not None)
    key, container = "tie_word_embeddings", model.file.container
    if container != "gguf" and model.file.get(key) is not None:
        sign = f"{'config.json' if container == 'safetensors' else container.upper()} {key}"
    elif container == "safetensors":
        sign = f"{key} is not given: own matrix"
    else:
        sign = f"{gguf if container == 'gguf' else hf} is {'absent' if model.tied else 'there'}: there is no other sign"
    return {"weight": name, "tied": model.tied, "shared_with": shared if model.tied else None, "source": sign}


def _model(model: _core.Model) -> dict[str, Any]:
    """Architecture, flags, hyper-parameters and head of a bound model."""
    from aprender import _core

    klass = next(row[1] for row in _core.ARCHS if row[0] == model.arch)
    return {
        "arch": model.arch,
        "class": klass,
        "quirks": list(model.quirks),
        "flags": {name: text for name, text in _core.FLAGS if name in model.flags},
        "hparams": {name: {"value": value, "source": model.sources[name]} for name, value in model.hparams.items()},
        "head": _head(model),
    }


def _plan(model: _core.Model) -> list[dict[str, Any]]:
    """The steps of one token at position 0, every parameter of each, with the formats of the weights that it reads."""
    from aprender import _core

    formats = {(info.name, info.layer): info.format for info in model.weights}
    steps = []
    for step in _core.Run(model).plan(1):
        parts = [
            {"weight": weight, "bias": bias, "cols": cols, "formats": [formats[name, step["layer"]] for name in (weight, bias) if name]}
            for weight, bias, cols in step["weights"]
        ]
        steps.append({**step, "weights": parts})
    return steps


def describe(path: str, pattern: str | None = None, plan: bool = False, verify: bool = False) -> tuple[dict[str, Any], Error | None]:
    """What is in a model, as plain data.

    Parameters
    ----------
    path : str
        GGUF, APR or safetensors file, or a folder with ``model.safetensors`` (or its shards' index) and ``config.json``.
    pattern : str, optional
        Shell pattern: the tensors to list; all if not given.
    plan : bool
        Add the plan.
    verify : bool
        Read every byte against the container's checksum.

    Returns
    -------
    dict
        ``schema file formats tensors tokenizer model plan problem cuda``; those that there are not are None.
    Error or None
        Why the file does not bind.

    Raises
    ------
    OSError, FormatError
        The file cannot be read as any container.
    UnknownName
        No tensor matches the pattern.
    """
    from aprender import _core
    from aprender.errors import ConfigError, FormatError

    file = _core.File(path)
    said = {
        "schema": SCHEMA,
        "file": {
            "path": file.path, "container": file.container, "version": file.version, "bytes": file.nbytes, "tensors": len(file.tensors),
            "values": sum(_count(tensor.shape) for tensor in file.tensors), "declared": _declared(file), "parts": list(file.parts),
            "notes": list(file.notes), "verified": file.verify() if verify else None,
        },
        "formats": _formats(file.tensors),
        "tensors": _tensors(_chosen(file.tensors, pattern)),
        "tokenizer": _tokenizer(file),
        "model": None,
        "plan": None,
        "problem": None,
        "cuda": dict(_core.cuda()),
    }  # fmt: skip
    try:
        model = _core.Model(file)
    except (ConfigError, FormatError) as problem:
        return said | {"problem": " ".join(str(problem).split())}, problem
    return said | {"model": _model(model), "plan": _plan(model) if plan else None}, None


# ---- for people ------------------------------------------------------------------------------------------------------------------------


def _many(values: int) -> str:
    """A number of weights as people say it."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if values >= size:
            return f"{values / size:.3g} {word}"
    return f"{values:,}"


def _times(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _facts(said: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Label and text of everything that fits on a line."""
    file, model = said["file"], said["model"]
    yield "file", file["path"]
    version = f" version {file['version']}" if file["version"] else ""
    yield "container", f"{file['container']}{version}, {file['bytes']:,} bytes, {_show.plural(file['tensors'], 'tensor')}"
    if len(file["parts"]) > 1:
        names = [part.rpartition("/")[2] for part in file["parts"]]
        yield "files", f"{len(names):,}: {', '.join(names[:4])}{' …' * (len(names) > 4)}"
    for note in file["notes"]:
        yield "note", note
    if file["verified"] is not None:
        yield "checksum", "of the whole file: right" if file["verified"] else "this container has none"
    for key, value in file["declared"].items():
        if not model or value not in (model["arch"], model["class"]):  # said below
            yield "declared", f"{key} = {value}"
    if model:
        yield "architecture", f"{model['arch']} ({model['class']})"
        for flag, text in model["flags"].items():
            yield "flags", f"{flag}: {text}"
        for quirk in model["quirks"]:
            yield "quirks", f"{quirk}: undone when the weights are read, so that all containers give the same lanes"
        head = model["head"]
        yield "head", (f"shared with {head['shared_with']}" if head["tied"] else "its own matrix") + f" ({head['source']})"
    yield from _tokenizer_facts(said["tokenizer"])
    yield from cuda_facts(said["cuda"])


def _tokenizer_facts(said: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    """Label and text of the tokenizer."""
    if said is None:
        yield "tokenizer", "none in the container: prompts are token ids"
        return
    pre = f", pre-tokenizer {said['pre']}" if said["pre"] else ""
    sizes = [_show.plural(said[what], what.rstrip("s")) for what in ("tokens", "merges") if said[what] is not None]
    yield "tokenizer", ", ".join([f"{said['kind']}{pre}", *sizes]) + f" ({said['source']})"
    specials = [f"{role} {special['id']} {special['piece'] or ''}".rstrip() for role, special in said["specials"].items()]
    if said["add_bos"] is not None:
        specials.append(f"bos is {'' if said['add_bos'] else 'not '}added to a prompt")
    if said["chat_template"]:
        specials.append("has a chat template")
    if specials:
        yield "tokenizer", " · ".join(specials)
    if said["problem"]:
        yield "tokenizer", f"cannot be used here: {said['problem']}"


def _formats_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What the numbers are stored as, with a bar for the share of values."""
    cells = []
    for row in rows:
        bits = "–" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.5g}"
        cells.append(
            (
                row["format"],
                f"{row['tensors']:,}",
                f"{row['values']:,}",
                f"{row['bytes']:,}",
                bits,
                f"{row['share']:.1%}",
                _show.bar(row["share"]),
            )
        )
    values, size = sum(row["values"] for row in rows), sum(row["bytes"] for row in rows)
    whole = f"{8 * size / values:.5g}" if values else "–"
    total = ("all", f"{sum(row['tensors'] for row in rows):,}", f"{values:,}", f"{size:,}", whole, "", "")
    return _show.table("=format  >tensors  >weights  >bytes  >bits each  >share  ", cells, total)


def _folded_table(tensors: Sequence[Mapping[str, Any]]) -> Table:
    """One line per kind of tensor: layers that store it alike are counted together."""
    rows: dict[tuple[str, str, str], list[tuple[int | None, int]]] = {}
    for tensor in tensors:
        layer = re.search(r"(?<=\.)\d{1,9}(?=\.)", tensor["name"])
        kind = tensor["name"] if layer is None else f"{tensor['name'][: layer.start()]}*{tensor['name'][layer.end() :]}"
        key = (kind, tensor["format"], _times(tensor["shape"]))
        rows.setdefault(key, []).append((int(layer[0]) if layer else None, tensor["bytes"]))
    cells = []
    for (kind, fmt, shape), members in rows.items():
        layers = _show.spans(layer for layer, _ in members if layer is not None)
        cells.append((kind, layers or "–", fmt, shape, f"{sum(size for _, size in members):,}"))
    return _show.table("name  layers  format  shape  >bytes", cells)


def _tensor_table(tensors: Sequence[Mapping[str, Any]]) -> Table:
    """One line per tensor."""
    cells = [(t["name"], t["format"], _times(t["shape"]), f"{t['bytes']:,}", f"{t['offset']:,}") for t in tensors]
    return _show.table("name  format  shape  >bytes  >offset", cells)


def _hparam_table(hparams: Mapping[str, Mapping[str, Any]]) -> Table:
    cells = [(name, _show.number(said["value"]), said["source"]) for name, said in hparams.items()]
    return _show.table("hyper-parameter  >value  from", cells)


_OWN = ("stage", "layer", "op", "rows", "cols", "k", "weights", "a", "b")
"""Entries of a step that have a column of their own; the rest are parameters, said once if all steps agree."""


def _plan_parts(steps: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    """The plan: what all steps share on one line, then a line for each step, which reads others by number (and name if there is room)."""
    narrow = _show.narrow()
    fields = [field for field in steps[0] if field not in _OWN]
    common = {field: steps[0][field] for field in fields if all(step[field] == steps[0][field] for step in steps)}
    cells = []
    for place, step in enumerate(steps):
        reads = " + ".join(str(at) if narrow else f"{at} {steps[at]['stage']}" for at in (step["a"], step["b"]) if at >= 0)
        own = [f"{field} {_show.number(step[field])}" for field in fields if field not in common]
        layer = "–" if step["layer"] is None else str(step["layer"])
        shape = f"{step['rows']}×{step['cols']}"
        cells.append((place, layer, step["stage"], step["op"], shape, step["k"] or "", reads, ", ".join([*_weights_of(step), *own])))
    yield _show.heading(f"Plan: {len(steps)} steps for one token at position 0")
    yield _show.facts([("all steps", ", ".join(f"{field} {_show.number(value)}" for field, value in common.items()))])
    yield _show.table(">step  >layer  =stage  =operation  =shape  >k  reads step  weights", cells)


def _weights_of(step: Mapping[str, Any]) -> list[str]:
    """The weights of a step, those of one format together: ``attn_q attn_k Q4_K``, ``attn_v Q6_K``."""
    together: dict[str, list[str]] = {}
    for part in step["weights"]:
        names = [name for name in (part["weight"], part["bias"]) if name]
        for name, fmt in zip(names, part["formats"], strict=True):
            together.setdefault(fmt, []).append(name)
    return [f"{' '.join(names)} {fmt}" for fmt, names in together.items()]


def _render(said: Mapping[str, Any], filtered: bool) -> Iterator[RenderableType]:
    """Everything, in reading order; an empty text is an empty line."""
    from rich.text import Text

    file, model = said["file"], said["model"]
    bits = f", {8 * sum(row['bytes'] for row in said['formats']) / file['values']:.3g} bits each" if file["values"] else ""
    what = f"A {model['arch']} model" if model else "A file"
    end = "" if model else ", which this engine does not run"
    yield Text(f"{what} of {_many(file['values'])} weights{bits}{end}.", style="bold green" if model else "bold red")
    yield Text()
    yield _show.facts(_facts(said))
    yield Text()
    if model:
        yield _hparam_table(model["hparams"])
        yield Text()
    yield _show.heading("Number formats, counted from the tensors")
    yield _formats_table(said["formats"])
    yield Text()
    if filtered:
        yield _show.heading(f"Tensors: {len(said['tensors'])} of {file['tensors']}")
        yield _tensor_table(said["tensors"])
    else:
        yield _show.heading("Tensors, alike layers together (--filter '*' lists each)")
        yield _folded_table(said["tensors"])
    if said["plan"]:
        yield Text()
        yield from _plan_parts(said["plan"])


def _parser() -> Parser:
    about = (
        "What is in this model: container, architecture, hyper-parameters and where each came from, real number formats, tensors,"
        " tokenizer, plan. Exit codes: 0 described, 2 usage, 3 not a model that can be read or run; what could be read is still described."
    )
    parser = Parser("info", about, EXAMPLES)
    parser.add_argument(
        "model", metavar="MODEL", help="GGUF, APR or safetensors file, or a folder with model.safetensors (or shards) and config.json"
    )
    parser.add_argument("--plan", action="store_true", help="every step of the forward pass with everything that it will use")
    parser.add_argument("--verify", action="store_true", help="read every byte against the container's checksum (APR has one)")
    parser.add_argument("--filter", metavar="GLOB", help="list the tensors whose names match, one by one")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    """Describe a model."""
    options = _parser().parse_args(argv)
    said, problem = describe(options.model, options.filter, options.plan, options.verify)
    if options.json:
        import json

        print(json.dumps(said, ensure_ascii=False, allow_nan=False))
    else:
        _show.show(*_render(said, options.filter is not None), width=PLAN_WIDTH if options.plan else _show.WIDTH)
    if problem:
        raise problem
    return AGREE


if __name__ == "__main__":
    sys.exit(main())
