"""``python -m aprender.bisect``: find the first wrong operation.  Arguments and printing only; the hunt is ``aprender.bisection``."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aprender import _show
from aprender._command import CANNOT, Parser, Usage, command, say
from aprender._prompt import add_chat, parse_ids

if TYPE_CHECKING:
    import argparse

    from aprender.bisection import Report

EXAMPLES = (
    "python -m aprender.bisect                                  the embedded model against its recorded Hugging Face FP16 stages",
    "python -m aprender.bisect --plant transposed@lm_head       the same with a planted fault: exit 1",
    "python -m aprender.bisect --plant nan@0.ffn_out --plant gelu@1.ffn_silu    two faults in one run: both are named",
    "python -m aprender.bisect model.gguf --against hf:folder   our engine on a GGUF against Hugging Face FP16",
    "python -m aprender.bisect hf:folder@bfloat16 --against witness",
    "python -m aprender.bisect saved:stages --against hf:folder@float32 --jsonl",
    "python -m aprender.bisect model.gguf --probe all           decoding, chunks, causality, a second run … beyond the prompt",
    "python -m aprender.bisect large.gguf --closure             all of closure, whatever it costs; without it a large model is cut short",
    "python -m aprender.bisect hf:folder@float16 --against witness --arithmetic hf-f16-sdpa       attention as one kernel",
    "python -m aprender.bisect saved:stages --against witness:folder --arithmetic auto            which arithmetic are these numbers of?",
    "python -m aprender.bisect --prompts questions.txt -q       one prompt per line, one sentence each",
)
GIT_BISECT = {CANNOT: 125, 2: 128}
"""What ``git bisect run`` reads as "skip" and "stop" in place of 3 and 2."""


def _parser() -> Parser:
    parser = Parser(
        "bisect",
        "Name the first wrong operation of an engine, and tell it from rounding noise: every stage is replayed in float64 on the side's own"
        " captured inputs, under its own declared roundings. Exit codes: 0 agree, 1 divergence, 2 usage, 3 not comparable or cannot run.",
        EXAMPLES,
    )
    add = parser.add_argument
    add(
        "subject",
        nargs="?",
        metavar="SIDE",
        help="side to judge: model.gguf, folder/, hf:NAME[@dtype], llama.cpp:model.gguf[@f16], saved:folder (default: the embedded model)",
    )
    add(
        "--against",
        metavar="SIDE",
        help="reference: any side, or witness[:MODEL] (default: stages recorded beside the model, else the witness)",
    )
    add("--prompt", metavar="TEXT", help="raw text, special tokens as the tokenizer declares (default: 'What is 2+2?')")
    add("--prompt-ids", metavar="1,2,3", help="token ids instead of a text")
    add("--prompts", metavar="FILE", help="judge every line of a file")
    add_chat(parser)
    add("--same-ids", action="store_true", help="go on with the reference's token ids where the sides cut the text differently")
    add(
        "--closure",
        action="store_true",
        help="hold the whole free run against float64 passes with rounding noise, whatever it costs (a large model is cut short)",
    )
    add(
        "--steps",
        type=int,
        default=0,
        metavar="N",
        help="generate N tokens, the reference's drive both, and judge the first step that differs",
    )
    add(
        "--plant",
        action="append",
        metavar="NAME[@SELECTOR]",
        help="plant a catalogue fault in our own engine first: transposed@lm_head, eps@0.attn_norm; may be given several times",
    )
    add(
        "--probe",
        metavar="NAME|all",
        help="also run the subject in other ways: one short long decode ragged padded far keys causal repeat traced",
    )
    add("--list-faults", action="store_true", help="print the catalogue and stop")
    add(
        "--arithmetic",
        metavar="[subject=]NAME|auto[,reference=…]",
        help="judge a side under another arithmetic, hf-f16-sdpa runs it so; auto: the one that fits best",
    )
    add("--answer", type=int, default=None, metavar="N", help="tokens of the greedy answer to show (default 16; 0: none)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object")
    form.add_argument("--jsonl", action="store_true", help="one JSON line per stage")
    form.add_argument("-q", "--quiet", action="store_true", help="the sentence only")
    form.add_argument("-v", "--verbose", action="store_true", help="every layer of the table")
    add("--git-bisect", action="store_true", help="exit codes for git bisect run: 3 becomes 125, 2 becomes 128")
    return parser


def parse_profiles(text: str | None) -> dict[str, str]:
    """``NAME``, ``subject=NAME``, ``subject=NAME,reference=NAME``."""
    out: dict[str, str] = {}
    for part in text.split(",") if text else ():
        party, equals, name = part.partition("=")
        party, name = (party, name) if equals else ("subject", party)
        if party not in ("subject", "reference") or not name or party in out:
            raise Usage(f"--arithmetic {text!r}: give NAME, or subject=NAME,reference=NAME")
        out[party] = name
    return out


def _questions(args: argparse.Namespace) -> list[Any]:
    """The asks of a command line, in order."""
    from aprender.asking import Ask

    given = [name for name in ("prompt", "prompt_ids", "prompts") if getattr(args, name) is not None]
    if len(given) > 1:
        raise Usage(f"--{given[0].replace('_', '-')} and --{given[1].replace('_', '-')} exclude each other")
    if args.chat and (not given or args.prompt_ids is not None):
        raise Usage("--chat needs a text: --prompt or --prompts")
    if args.prompt_ids is not None:
        return [Ask(ids=parse_ids(args.prompt_ids), same_ids=args.same_ids)]
    if args.prompts is None:
        return [Ask(prompt=args.prompt, same_ids=args.same_ids, chat=args.chat)]
    with open(args.prompts, encoding="utf-8") as stream:
        lines = [line.rstrip("\n") for line in stream if line.strip()]
    if not lines:
        raise Usage(f"--prompts {args.prompts}: no line has text")
    return [Ask(prompt=line, same_ids=args.same_ids, chat=args.chat) for line in lines]


def _command_line(args: argparse.Namespace, argv: Sequence[str], prompt: str | None) -> str:
    """The command that makes one report again; of many prompts, just this one."""
    if args.prompts is None:
        return shlex.join(["python", "-m", "aprender.bisect", *argv])
    at = next(i for i, word in enumerate(argv) if word.startswith("--prompts"))
    rest = [*argv[:at], *argv[at + (1 if "=" in argv[at] else 2) :]]
    return shlex.join(["python", "-m", "aprender.bisect", *rest, "--prompt", prompt or ""])


def _list_faults() -> int:
    from aprender.judge import planting

    print(planting.listing())
    return 0


def _print(reports: Sequence[Report], args: argparse.Namespace) -> None:
    """Print in the form that was asked for."""
    from aprender.report.terminal import console, render

    if args.json:
        first = next((r for r in reports if r.verdict != "agree"), reports[0])
        data = first.to_json()
        if args.prompts is not None:
            data["prompts"] = [
                {"prompt": r.prompt, "verdict": r.verdict, "first": r.to_json()["first"], "compared": r.judged.compared} for r in reports
            ]
        print(json.dumps(data, ensure_ascii=False, allow_nan=False))
        return
    for report in reports:
        if args.jsonl:
            for row in report.to_json()["stages"]:
                print(
                    json.dumps(row | ({"prompt": report.prompt} if args.prompts is not None else {}), ensure_ascii=False, allow_nan=False)
                )
        elif args.quiet or (args.prompts is not None and not args.verbose and report.verdict == "agree"):
            print(f"{report.prompt!r}: {report.sentence}" if args.prompts is not None else report.sentence)
        else:
            console().print(render(report, args.verbose))


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        code = _run(words)
    except Exception as problem:  # the guard says it; only the code is another one for git
        if "--git-bisect" not in words:
            raise
        from aprender._command import describe

        say(f"aprender: {describe(problem)}")
        code = 2 if isinstance(problem, Usage) else CANNOT
    return GIT_BISECT.get(code, code) if "--git-bisect" in words else code


def _run(words: list[str]) -> int:
    args = _parser().parse_args(words)
    if args.list_faults:
        return _list_faults()
    profiles = parse_profiles(args.arithmetic)
    if args.steps < 0 or (args.answer is not None and args.answer < 0):
        raise Usage("--steps and --answer need a number that is not negative")

    from aprender import bisection, probes
    from aprender.errors import UnknownName

    asks = _questions(args)
    answer = args.answer if args.answer is not None else 0 if args.jsonl or args.quiet else bisection.ANSWER
    try:
        chosen = probes.parse(args.probe)
        opened = bisection.open_hunt(args.subject, args.against, args.plant, profiles, args.closure)
    except UnknownName as problem:  # a name that no side has to be opened for is the command line's fault
        raise Usage(str(problem)) from None
    reports = []
    for ask in asks:
        with _show.Progress("judging", args.quiet) as progress:
            report = bisection.hunt(opened, ask, answer, args.steps, progress, chosen)
        reports.append(bisection.with_command(report, _command_line(args, words, report.prompt)))
    _print(reports, args)
    return max((r.exit_code for r in reports), key=lambda code: (code == 1, code))


if __name__ == "__main__":
    sys.exit(main())
