"""``python -m aprender.trace``: run a prompt through a model and save its stages to a folder.

Owns the selection of what to keep and the summary; the run is the side's, the folder is that of ``captures`` or, with ``--aprt``, the tree
of ``aprt``.
Refuses a selection of which some part names nothing in the model: nothing less than what was asked for is saved.  Called from the command
line.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from aprender import _prompt, _show
from aprender._command import AGREE, DIVERGENCE, Parser, Usage, command, say

if TYPE_CHECKING:
    import argparse

    from rich.console import RenderableType

    from aprender.captures import Captures
    from aprender.sides.base import Side
    from aprender.stages import Selection

SCHEMA = "aprender.trace/1"
LARGE = 1 << 30
"""Bytes of captures from which on the user is told before the run."""

EXAMPLES = (
    f"python -m aprender.trace {_prompt.CANARY} --prompt 'What is 2+2?' -o stages",
    f"python -m aprender.trace {_prompt.CANARY} --prompt-ids 261,374 -o stages --stages '*.attn_*,lm_head'",
    f"python -m aprender.trace {_prompt.CANARY} --prompt 'What is 2+2?' -o stages --layers 0..2 --json",
    f"python -m aprender.trace {_prompt.CANARY} --prompt 'What is 2+2?' -o tree --aprt",
)


def _parser() -> Parser:
    about = (
        "Capture the stages of a forward pass to a folder. Exit codes: 0 saved, 1 saved but the logits with and without capturing differ,"
        " 2 usage, 3 cannot run."
    )
    parser = Parser("trace", about, EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help=_prompt.SIDE_HELP)
    _prompt.add_prompt(parser)
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="folder to write; a capture that is there is replaced")
    parser.add_argument(
        "--stages", metavar="SEL", help="patterns [LAYERS.]STAGE, separated by commas: 3.attn_*,*.ffn_out,lm_head (default: all)"
    )
    parser.add_argument("--layers", metavar="a..b", help="only these layers, b exclusive; whole-model stages stay")
    parser.add_argument(
        "--aprt", action="store_true", help="write an APRT tree, layer-N/STAGE.bin: the stages that APRT has, of the logits the last token"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("-q", "--quiet", action="store_true", help="one sentence")
    form.add_argument("--json", action="store_true", help="one JSON object")
    return parser


# ---- what to keep ----------------------------------------------------------------------------------------------------------------------


def _parts(options: argparse.Namespace) -> list[tuple[str, Selection]]:
    """The patterns of the command line, each with the keys that it means; Usage if one is malformed or names no stage of any model."""
    from aprender import stages
    from aprender.errors import ArgumentError, UnknownName

    try:
        layers = stages.parse_layers(options.layers) if options.layers is not None else None
        words = options.stages.split(",") if options.stages is not None else []
        parts = [(word.strip(), stages.parse_selection(word)) for word in words]
    except (ArgumentError, UnknownName) as problem:
        raise Usage(str(problem)) from None
    if layers is not None:
        parts = [(f"{text} of --layers {options.layers}", _within(one, layers)) for text, one in parts or [("stages", lambda _: True)]]
    if options.aprt:
        parts = [(f"{text} in an APRT tree", _held(one)) for text, one in parts or [("stages", lambda _: True)]]
    return parts


def _held(one: Selection) -> Selection:
    """The keys of a selection that an APRT tree has a file for."""
    from aprender import aprt

    return lambda key: one(key) and aprt.held(key)


def _within(one: Selection, layers: range) -> Selection:
    """The keys of a selection in these layers, and those of the whole model."""
    return lambda key: one(key) and (key[1] is None or key[1] in layers)


def _selection(side: Side, options: argparse.Namespace, parts: list[tuple[str, Selection]]) -> Selection | None:
    """Every part as one predicate, once it is known that each of them selects something; None for all.

    Raises
    ------
    CannotRun
        The model has none of the stages of a part, or not all layers of ``--layers``.
    """
    from aprender import stages
    from aprender.errors import CannotRun

    data = side.model_data()
    if data is not None:
        count = int(data["hparams"]["layers"])
        if options.layers is not None and stages.parse_layers(options.layers).stop > count:
            raise CannotRun(
                f"--layers {options.layers}: the model has layers 0..{count}, the end exclusive", code="ARGUMENT", field="layers"
            )
        keys = stages.keys(data["flags"], count)
        for text, one in parts:
            if not any(map(one, keys)):
                raise CannotRun(f"'{text}' is no stage of this model ({data['arch']}, {count} layers)", code="LOOKUP", field="stages")
    return (lambda key: any(one(key) for _, one in parts)) if parts else None


def _check_tree(side: Side, keep: Selection | None, tokens: int, folder: str) -> None:
    """Whether the tree that was asked for can be written, as far as that is known before the run."""
    from aprender import aprt, stages

    data = side.model_data()
    if data is not None:
        keys = [key for key in stages.keys(data["flags"], int(data["hparams"]["layers"])) if keep is None or keep(key)]
        aprt.check(folder, aprt.shapes(keys, data["hparams"], tokens))


def _warn_large(side: Side, keep: Selection | None, tokens: int) -> None:
    """Say what the captures will take, if that is much."""
    from aprender import stages

    data = side.model_data()
    if data is None:
        return
    keys = [key for key in stages.keys(data["flags"], int(data["hparams"]["layers"])) if keep is None or keep(key)]
    count = 0
    for name, _ in keys:
        values = 1
        for width in stages.by_name[name].dims(data["hparams"], tokens):
            values *= width
        count += 4 * values
    if count > LARGE:
        say(f"aprender: note: these captures take {_show.size(count)} of memory and of disk; --stages and --layers take fewer")


# ---- the summary -----------------------------------------------------------------------------------------------------------------------


def _rows(captures: Captures) -> list[dict[str, Any]]:
    """One row per tensor: what it is and two figures that show at a glance whether it is sane."""
    import numpy as np

    rows = []
    for stage, layer in captures:
        array, note = captures[stage, layer], captures.manifest.tensors[stage, layer]
        wide = np.abs(array[np.isfinite(array)], dtype=np.float64)
        rows.append({
            "layer": layer, "stage": stage, "shape": list(array.shape), "dtype": note.dtype, "origin": note.origin, "bytes": array.nbytes,
            "rms": float(np.sqrt(np.mean(wide * wide))) if wide.size else None,
            "largest": float(wide.max()) if wide.size else None, "nonfinite": note.nonfinite,
        })  # fmt: skip
    return rows


def summary(captures: Captures, folder: str, words: list[str] | None) -> dict[str, Any]:
    """What was traced, as plain data (the object that ``--json`` prints).

    Parameters
    ----------
    captures : Captures
    folder : str
        Where it was saved.
    words : list of str, optional
        What each token stands for.
    """
    said, rows = captures.manifest, _rows(captures)
    return {
        "schema": SCHEMA, "folder": folder, "side": said.side, "prompt": said.prompt, "tokens": list(said.tokens), "pieces": words,
        "arch": said.arch, "layers": said.hparams.get("layers"), "producer": said.producer, "version": said.version,
        "backend": said.backend, "tier": said.tier, "threads": said.threads, "profile": said.profile, "model_digest": said.model_digest,
        "attestation": said.attestation, "tensors": len(rows), "bytes": sum(row["bytes"] for row in rows), "stages": rows,
    }  # fmt: skip


def _sentence(said: dict[str, Any]) -> str:
    tokens, tensors = _show.plural(len(said["tokens"]), "token"), _show.plural(said["tensors"], "tensor")
    return f"Traced {tokens} through {said['arch']}: {tensors}, {_show.size(said['bytes'])} in {_show.visible(said['folder'])}."


ATTESTED = {
    True: "the logits with and without capturing are bit-equal",
    False: "the logits with and without capturing DIFFER: what was captured is not the path that makes the text",
    None: "not checked, because the logits were not captured",
}


def _facts(said: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Label and text of what fits on a line."""
    yield "model", f"{said['side']} ({said['arch']}, {_show.plural(said['layers'] or 0, 'layer')})"
    if said["model_digest"]:
        yield "sha256", said["model_digest"]
    place = " ".join(word for word in (said["backend"], said["tier"]) if word)
    threads = f", {_show.plural(said['threads'], 'thread')}" if said["threads"] else ""
    yield "engine", f"{said['producer']} {said['version']} on {place}{threads}, arithmetic {said['profile']}"
    if said["prompt"] is not None:
        yield "prompt", repr(said["prompt"])
    yield "tokens", _prompt.tokens_text(said["tokens"], said["pieces"])
    yield "attestation", ATTESTED[said["attestation"]]


def _stage_rows(said: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One line per stage, its layers together."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in said["stages"]:
        rows.setdefault((row["stage"], "×".join(map(str, row["shape"]))), []).append(row)
    for (stage, shape), members in rows.items():
        layers = _show.spans(row["layer"] for row in members if row["layer"] is not None)
        squares = [row["rms"] ** 2 for row in members if row["rms"] is not None]
        rms = f"{(sum(squares) / len(squares)) ** 0.5:.4g}" if squares else "–"
        worst = max((row for row in members if row["largest"] is not None), key=lambda row: row["largest"], default=None)
        largest = f"{worst['largest']:.4g}" if worst else "–"
        where = f"layer {worst['layer']}" if worst and len(members) > 1 else ""
        bad = sum(row["nonfinite"] for row in members)
        yield (
            stage,
            layers or "–",
            shape,
            f"{sum(row['bytes'] for row in members):,}",
            rms,
            largest,
            where,
            f"{bad:,} not finite" if bad else "",
        )


def _render(said: dict[str, Any]) -> Iterator[RenderableType]:
    """Everything, in reading order."""
    from rich.text import Text

    yield Text(_sentence(said), style="bold red" if said["attestation"] is False else "bold green")
    yield Text()
    yield _show.facts(_facts(said))
    yield Text()
    total = ("all", "", _show.plural(said["tensors"], "tensor"), f"{said['bytes']:,}", "", "", "", "")
    yield _show.table("stage  layers  shape  >bytes  >rms  >largest  in  ", _stage_rows(said), total)


# ---- the command -----------------------------------------------------------------------------------------------------------------------


def _capture(side: Side, options: argparse.Namespace, parts: list[tuple[str, Selection]]) -> tuple[Captures, list[str] | None]:
    """Run; the captures know their prompt and tokenizer."""
    from dataclasses import replace

    from aprender.captures import Captures

    ids = _prompt.prompt_ids(side, options)
    keep = _selection(side, options, parts)
    _warn_large(side, keep, len(ids))
    if options.aprt:
        _check_tree(side, keep, len(ids), options.output)
    _prompt.warn_beyond_context(side, len(ids))
    with _show.Progress("tracing", options.quiet) as progress:
        made = side.capture(ids, keep, progress)
    tokenizer = _prompt.tokenizer(side, options)
    digest = tokenizer.digest if tokenizer else None
    manifest = replace(made.manifest, prompt=options.prompt, tokenizer_digest=made.manifest.tokenizer_digest or digest)
    return Captures(made, manifest), _prompt.pieces(ids, tokenizer)


@command
def main(argv: list[str] | None = None) -> int:
    """Trace a model; returns the exit code."""
    options = _parser().parse_args(argv)
    _prompt.check_prompt(options)

    import json

    from aprender import aprt
    from aprender.captures import check_folder, save
    from aprender.sides import open_side

    parts = _parts(options)
    (aprt.check if options.aprt else check_folder)(options.output)
    captures, words = _capture(open_side(options.model), options, parts)
    if options.aprt:
        captures = aprt.exported(captures)
    (aprt.write_tree if options.aprt else save)(captures, options.output)
    said = summary(captures, options.output, words)
    if options.json:
        print(json.dumps(said, ensure_ascii=False, allow_nan=False))
    elif options.quiet:
        print(_sentence(said))
    else:
        _show.show(*_render(said))
    return DIVERGENCE if said["attestation"] is False else AGREE


if __name__ == "__main__":
    sys.exit(main())
