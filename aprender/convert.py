"""``python -m aprender.convert``: a model in another container, or in other number formats.  Arguments and printing only.

Owns the words of the command line and the summary of what was done.  Refuses an ending of OUT that names no container, and formats that do
not exist.  Called from the command line; ``conversion`` does the work.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aprender import _prompt, _show
from aprender._command import AGREE, Parser, Usage, command

if TYPE_CHECKING:
    from rich.console import RenderableType

    from aprender.conversion import Plan
    from aprender.mixes import Mix

SCHEMA = "aprender.convert/1"
CONTAINERS = ("apr", "gguf")
"""What can be written; the ending of OUT chooses."""

EXAMPLES = (
    f"python -m aprender.convert {_prompt.CANARY} canary.apr",
    "python -m aprender.convert folder/ model.gguf --formats Q4_K_M",
    "python -m aprender.convert folder/ model.gguf --formats 'Q4_K,output=Q6_K,*.attn_v=Q8_0' --force",
    "python -m aprender.convert model.gguf model.apr --json | python -m json.tool",
)


# ---- the command line ------------------------------------------------------------------------------------------------------------------


def _container(out: str) -> str:
    """What the ending of OUT asks for."""
    ending = Path(out).suffix.lstrip(".").lower()
    if ending not in CONTAINERS:
        raise Usage(f"OUT '{out}' must end in {' or '.join(f'.{name}' for name in CONTAINERS)}: the ending chooses what is written")
    return ending


def _mix(words: str) -> Mix:
    """What ``--formats`` says; Usage if it says nothing that can be done."""
    from aprender import mixes
    from aprender.errors import ArgumentError, UnknownName

    try:
        return mixes.parse(words)
    except (ArgumentError, UnknownName) as problem:
        raise Usage(f"--formats: {problem}") from None


# ---- the summary -----------------------------------------------------------------------------------------------------------------------


def summary(plan: Plan, out: Path, rows: Sequence[Mapping[str, Any]], mix: Mix, verified: bool, seconds: float) -> dict[str, Any]:
    """What was done, as plain data (the object that ``--json`` prints)."""
    bytes_in, bytes_out = plan.model.file.nbytes, plan.layout.nbytes
    return {
        "schema": SCHEMA, "source": plan.model.file.path, "source_container": plan.model.file.container, "out": str(out),
        "container": plan.container, "arch": plan.model.arch, "formats": str(mix), "tokenizer": plan.tokenizer,
        "bytes_in": bytes_in, "bytes_out": bytes_out, "ratio": bytes_out / bytes_in, "verified": verified, "seconds": seconds,
        "notes": list(plan.notes), "tensors": list(rows),
    }  # fmt: skip


def _rows_of(said: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    """One line per pair of formats: largest first."""
    together: dict[tuple[str, str, bool], list[Mapping[str, Any]]] = {}
    for row in said["tensors"]:
        together.setdefault((row["from"], row["to"], row["passed"]), []).append(row)
    for (source, target, passed), rows in sorted(together.items(), key=lambda item: -sum(row["bytes_out"] for row in item[1])):
        before, after = (sum(row[field] for row in rows) for field in ("bytes_in", "bytes_out"))
        worst = max(rows, key=lambda row: row["relative_rms"] or 0.0)
        loss = worst["relative_rms"]
        cost = "–" if loss is None else "0" if not loss else f"{loss:.3g} in {worst['name']}"
        how = "as it is" if passed else "encoded"
        yield source, target, how, f"{len(rows):,}", f"{before:,}", f"{after:,}", f"{after / before:.3f}", cost


def _sentence(said: Mapping[str, Any]) -> str:
    checked = "read back and verified" if said["verified"] else "not verified"
    ratio = f"{said['ratio']:.3f} of {_show.size(said['bytes_in'])}"
    return f"Wrote {_show.visible(said['out'])}: {_show.size(said['bytes_out'])}, {ratio}, {checked}."


def _render(said: Mapping[str, Any]) -> Iterator[RenderableType]:
    from rich.text import Text

    yield Text(_sentence(said), style="bold green")
    yield Text()
    facts = [("source", f"{said['source']} ({said['arch']}, {said['source_container']})"), ("formats", said["formats"])]
    facts += [("note", note) for note in said["notes"]]
    yield _show.facts(facts)
    yield Text()
    total = ("all", "", "", f"{len(said['tensors']):,}", f"{said['bytes_in']:,}", f"{said['bytes_out']:,}", f"{said['ratio']:.3f}", "")
    yield _show.table("from  to  =how  >tensors  >bytes in  >bytes out  >ratio  largest relative RMS error", _rows_of(said), total)


# ---- the command -----------------------------------------------------------------------------------------------------------------------


def _parser() -> Parser:
    about = (
        "Write a model as APR or GGUF, the ending of OUT says which, as it is or in other number formats. What both containers can hold "
        "goes through byte for byte. The result is read back and held against the source before it takes its name. Exit codes: 0 written, "
        "2 usage, 3 cannot be converted; then nothing is left behind."
    )
    parser = Parser("convert", about, EXAMPLES)
    parser.add_argument("source", metavar="IN", help="GGUF, APR or safetensors file, or a folder with model.safetensors and config.json")
    parser.add_argument("out", metavar="OUT", help="what to write: NAME.apr or NAME.gguf")
    parser.add_argument(
        "--formats", metavar="FORMATS", default="keep",
        help="keep (default), a format for all matrices, or Q4_K_M; then PATTERN=FORMAT for some: 'Q4_K,output=Q6_K,*.attn_v=Q8_0'",
    )  # fmt: skip
    parser.add_argument("--no-tokenizer", dest="tokenizer", action="store_false", help="leave the tokenizer out")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--verify", action="store_true", default=True, help="read the result back and hold it against the source (default)")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="do not")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("-q", "--quiet", action="store_true", help="one sentence, no progress line")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    """Convert a model; returns the exit code."""
    options = _parser().parse_args(argv)
    container, mix, out = _container(options.out), _mix(options.formats), Path(options.out)

    from aprender import _core
    from aprender.conversion import carry_out, check_apart, check_place, check_room, make_plan

    began = time.monotonic()
    check_place(out, options.force)
    file = _core.File(options.source)
    check_apart(out, file.parts)
    plan = make_plan(_core.Model(file), container, mix, options.tokenizer)
    check_room(out, plan.layout.nbytes)
    with _show.Progress("converting", options.quiet or options.json) as tell:
        rows = carry_out(plan, out, options.verify, tell)
    said = summary(plan, out, rows, mix, options.verify, time.monotonic() - began)
    if options.json:
        import json

        print(json.dumps(said, ensure_ascii=False, allow_nan=False))
    elif options.quiet:
        print(_sentence(said))
    else:
        _show.show(*_render(said))
    return AGREE


if __name__ == "__main__":
    sys.exit(main())
