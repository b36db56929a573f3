"""``python -m aprender.oracle``: record the stages of a Hugging Face model as a reference.

Owns the arguments, the order of work (what can fail cheaply comes first) and the summary.  The forward pass is ``sides.hf``, the folder is
``captures``.  An oracle in half precision is a weak truth, so the summary says how far its logits are from the same model in float32, and
which stages hold values that are not finite.  Called from the command line; :func:`record` is the same for scripts and notebooks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aprender import _show
from aprender._command import AGREE, DIVERGENCE, Parser, Usage, command, say
from aprender.arithmetic import DTYPES

if TYPE_CHECKING:
    import argparse

    from aprender.captures import Captures
    from aprender.manifest import Manifest
    from aprender.sides.base import Progress
    from aprender.stages import Selection

LARGE = 1 << 28  # bytes of captures from which on the size is announced before the work

EXAMPLES = (
    "python -m aprender.oracle Qwen/Qwen2.5-0.5B -o stages                    all stages of every layer, float16",
    "python -m aprender.oracle folder/ -o stages --dtype float32 --prompt 'Count: one two'",
    "python -m aprender.oracle folder/ -o stages --prompt-ids 1,2,3 --layers 0..2 --stages 'attn_*,*.ffn_out'",
    "python -m aprender.bisect model.gguf --against saved:stages              then judge against it",
)


def _parser() -> Parser:
    parser = Parser(
        "oracle",
        "Run a Hugging Face model once on the CPU (eager attention, hooks that change no bit) and save what every stage computes. Needs"
        " torch and transformers. Exit codes: 0 saved, 1 saved but the logits with and without hooks differ, 2 usage, 3 cannot run.",
        EXAMPLES,
    )
    add = parser.add_argument
    add("model", metavar="FOLDER_OR_NAME", help="folder with config.json and safetensors, or a name on the hub")
    add("-o", "--output", metavar="FOLDER", required=True, help="where the stages go; a capture that is there already is replaced")
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="number format of the forward pass (default: %(default)s)")
    add("--prompt", metavar="TEXT", help="raw text, special tokens as the tokenizer declares (default: 'What is 2+2?')")
    add("--prompt-ids", metavar="1,2,3", help="token ids instead of a text")
    add("--layers", metavar="A..B", help="these layers only, B exclusive; stages of the whole model stay")
    add("--stages", metavar="SELECTION", help="these stages only: 3.attn_*,*.ffn_out,lm_head")
    add("--aprt", action="store_true", help="write an APRT tree, layer-N/STAGE.bin: the stages that APRT has, of the logits the last token")
    add("--answer", type=int, default=16, metavar="N", help="tokens of the greedy answer to record (default: %(default)s)")
    add("--no-floor", action="store_true", help="do not run the model in float32 too (twice the memory) to say what the format costs")
    add("-q", "--quiet", action="store_true", help="print nothing but errors")
    return parser


def record(
    model: str,
    dtype: str = DTYPES[0],
    *,
    prompt: str | None = None,
    ids: Sequence[int] | None = None,
    layers: range | None = None,
    keep: Selection | None = None,
    answer: int = 0,
    floor: bool = True,
    progress: Progress | None = None,
) -> Captures:
    """The stages of a Hugging Face model, with its greedy answer and its own floor in the manifest.

    Parameters
    ----------
    model : str
        Folder, or name on the hub.
    dtype : str
        ``float16``, ``bfloat16`` or ``float32``.
    prompt : str, optional
        Raw text; the embedded default's if there are no ids either.
    ids : sequence of int, optional
        Token ids; the prompt's own if not given.
    layers : range, optional
        Layers to keep.
    keep : callable, optional
        Stages to keep.
    answer : int
        Tokens of the greedy answer.
    floor : bool
        Also run in float32 and record the relative L2 of the logits.
    progress : callable, optional
        Told the share of layers done.

    Raises
    ------
    CannotRun
        No such model, no torch, or a prompt for a model without tokenizer.
    ConfigError
        A model that the stage table does not describe.
    ArgumentError
        An empty prompt, an id outside the vocabulary, or a selection that keeps nothing.
    """
    from aprender.asking import PROMPT
    from aprender.captures import Captures
    from aprender.errors import CannotRun
    from aprender.sides import open_hf

    side: Any = open_hf(model, dtype)
    tokenizer = side.tokenizer()
    if ids is None:
        if tokenizer is None:
            raise CannotRun(f"{model}: there is no tokenizer.json; give --prompt-ids", code="TOKENIZER", path=model)
        prompt = PROMPT if prompt is None else prompt
        ids = tokenizer.encode(prompt)
    captures = side.capture(ids, _kept(side, layers, keep, len(ids)), progress)
    said, notes = _answer(side, captures.tokens, answer)
    logits = side.logits(ids) if floor and dtype != "float32" else None
    side.close()
    if logits is not None:
        said["floor"] = _floor(model, ids, logits)
    return Captures(captures, replace(captures.manifest, prompt=prompt, notes=notes, **said))


def _kept(side: Any, layers: range | None, keep: Selection | None, tokens: int) -> Selection:
    """Both selections as one; announces a large capture."""
    from aprender import stages
    from aprender.errors import ArgumentError

    have = int(side.hparams["layers"])
    if layers is not None and layers.stop > have:
        raise ArgumentError(f"layers {layers.start}..{layers.stop}: the model has {have} layers", code="ARGUMENT", field="layers")
    kept = frozenset(
        key
        for key in stages.keys(side.flags, have)
        if (keep is None or keep(key)) and (layers is None or key[1] is None or key[1] in layers)
    )
    if not kept:
        raise ArgumentError("the selection keeps no stage of this model", code="ARGUMENT", field="stages")
    size = 4 * sum(math.prod(stages.stage(key[0]).dims(side.hparams, tokens)) for key in kept)
    if size > LARGE:
        say(f"aprender: {_show.plural(len(kept), 'tensor')}, {_show.size(size)} in memory")
    return kept.__contains__


def _answer(side: Any, ids: Sequence[int], n: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Manifest entries of the greedy answer, and a note where there is none."""
    from aprender.errors import CannotRun

    if n < 1:
        return {}, ()
    try:
        answer, margin = side.answer(ids, n)
    except CannotRun as problem:
        return {}, (str(problem),)
    tokenizer = side.tokenizer()
    return {"answer": tokenizer.decode(answer) if tokenizer else None, "answer_ids": tuple(answer), "answer_margin": margin}, ()


def _floor(model: str, ids: Sequence[int], logits: Any) -> float | None:
    """Relative L2 of the logits against those of the same model in float32; None where one of them is not finite."""
    from aprender.judge.metrics import distance
    from aprender.sides import open_hf

    exact: Any = open_hf(model, "float32")
    found = distance(logits, exact.logits(ids)).rel_l2
    exact.close()
    return found


def _summary(manifest: Manifest, folder: str) -> list[tuple[str, object]]:
    """What was recorded, for people."""
    bad = {key: note.nonfinite for key, note in manifest.tensors.items() if note.nonfinite}
    worst = ", ".join(f"{'' if key[1] is None else f'{key[1]}.'}{key[0]} {count}" for key, count in list(bad.items())[:4])
    derived = sorted({key[0] for key, note in manifest.tensors.items() if note.origin == "derived"})
    dtype = manifest.side.rpartition("@")[2]
    shown = repr(manifest.answer) if manifest.answer is not None else ", ".join(map(str, manifest.answer_ids)) or "none"
    if manifest.answer_margin is not None:
        shown += f"   smallest margin {manifest.answer_margin:.3g}"
    floor = "not measured" if manifest.floor is None else f"logits {manifest.floor:.1e} (relative L2) from float32"
    return [
        ("recorded", f"{_show.plural(len(manifest.tensors), 'tensor')} of {_show.plural(len(manifest.tokens), 'token')} in {folder}"),
        ("by", f"{manifest.side}, {manifest.producer} {manifest.version}, profile {manifest.profile}"),
        ("answer", shown),
        ("own floor", "float32 is the measure" if dtype == "float32" else floor),
        ("not finite", f"{_show.plural(len(bad), 'tensor')}: {worst}{' …' if len(bad) > 4 else ''}" if bad else "none"),
        ("path", "hooked and unhooked logits are bit-equal" if manifest.attestation else "HOOKED AND UNHOOKED LOGITS DIFFER"),
        *([("derived", ", ".join(derived) + " (recomputed: the model never forms it)")] if derived else []),
        *(("note", note) for note in manifest.notes),
    ]


def _choices(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of :func:`record`, checked as far as they can be without a model."""
    from aprender import stages
    from aprender._prompt import parse_ids
    from aprender.errors import ArgumentError, UnknownName

    if args.prompt is not None and args.prompt_ids is not None:
        raise Usage("--prompt and --prompt-ids exclude each other")
    if args.answer < 0:
        raise Usage(f"--answer {args.answer}: a number of tokens cannot be negative")
    try:
        layers = None if args.layers is None else stages.parse_layers(args.layers)
        keep = None if args.stages is None else stages.parse_selection(args.stages)
    except (ArgumentError, UnknownName) as problem:
        raise Usage(str(problem)) from None
    ids = None if args.prompt_ids is None else parse_ids(args.prompt_ids)
    return {"prompt": args.prompt, "ids": ids, "layers": layers, "keep": keep, "answer": args.answer, "floor": not args.no_floor}


@command
def main(argv: list[str] | None = None) -> int:
    """Record, save, summarise."""
    args = _parser().parse_args(argv)
    choices = _choices(args)
    from aprender import aprt, captures

    (aprt.check if args.aprt else captures.check_folder)(args.output)
    with _show.Progress(f"{args.model} {args.dtype}", args.quiet) as progress:
        found = record(args.model.removeprefix("hf:"), args.dtype, progress=progress, **choices)
    manifest = (aprt.write_tree if args.aprt else captures.save)(found, args.output)
    if not args.quiet:
        _show.show(_show.facts(_summary(manifest, args.output)))
    return AGREE if manifest.attestation else DIVERGENCE


if __name__ == "__main__":
    raise SystemExit(main())
