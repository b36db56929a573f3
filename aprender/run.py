"""``python -m aprender.run``: continue a prompt, greedily, one token at a time.  Arguments and printing only: the text is the side's.

Owns the way from single tokens to text that can be printed as it comes: a token may hold half a character.  Called from the command line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from aprender import _prompt, _show
from aprender._command import AGREE, Parser, Usage, command, say

if TYPE_CHECKING:
    from aprender.sides.base import Side
    from aprender.text import Tokenizer

SCHEMA = "aprender.run/1"
UNFINISHED = "\N{REPLACEMENT CHARACTER}"

EXAMPLES = (
    f"python -m aprender.run {_prompt.CANARY} --prompt 'What is 2+2?'",
    f"python -m aprender.run {_prompt.CANARY} --prompt-ids 261,374,220,17,10,17,30 -n 4 -v",
    f"python -m aprender.run {_prompt.CANARY} --prompt 'What is 2+2?' --json",
)


class Stream:
    """Text of tokens as they come.

    A token may end inside a character; its text is held back until the character is whole.  Each piece is decoded together with the tokens
    before it, because some tokenizers drop a blank at the beginning of a text.

    Parameters
    ----------
    decode : callable
        Token ids to text, with U+FFFD for what is no UTF-8.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._before = self._told = 0  # ids[before:told] are context, ids[told:] have not been handed out

    def put(self, token: int) -> str:
        """The text that can be told now that this token is known; empty while a character is unfinished."""
        self._ids.append(token)
        text = self._text()
        if text.endswith(UNFINISHED):
            return ""
        self._before, self._told = self._told, len(self._ids)
        return text

    def end(self) -> str:
        """What is left at the end, with U+FFFD for a character that was never finished."""
        text = self._text()
        self._before = self._told = len(self._ids)
        return text

    def _text(self) -> str:
        known = self._decode(self._ids[self._before : self._told])
        return self._decode(self._ids[self._before :])[len(known) :]


def _parser() -> Parser:
    about = "Generate text: the greedy continuation of a prompt, up to the token that ends it. Exit codes: 0 done, 2 usage, 3 cannot run."
    parser = Parser("run", about, EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help=_prompt.SIDE_HELP)
    _prompt.add_prompt(parser)
    parser.add_argument("-n", metavar="N", type=int, default=64, help="most tokens to generate (default 64)")
    parser.add_argument("--json", action="store_true", help="one JSON object when done, instead of the text as it comes")
    parser.add_argument("-v", "--verbose", action="store_true", help="speed and token ids on stderr")
    return parser


def _generate(side: Side, tokenizer: Tokenizer | None, ids: Sequence[int], n: int, live: bool) -> tuple[list[int], str, list[float]]:
    """Generate, printing as it comes if ``live``.  Without a tokenizer the text is the ids, as ``--prompt-ids`` takes them.

    Returns
    -------
    list of int
        Generated ids.
    str
        Their text.
    list of float
        Seconds at the start and at each token.
    """
    stream = Stream(tokenizer.decode) if tokenizer else None
    told: list[str] = []
    times = [time.perf_counter()]

    def tell(text: str) -> None:
        told.append(text)
        if live and text:
            sys.stdout.write(text)
            sys.stdout.flush()

    def on_token(token: int) -> None:
        times.append(time.perf_counter())
        tell(stream.put(token) if stream else f"{',' if len(times) > 2 else ''}{token}")

    try:
        out = side.generate(ids, n, on_token)
        tell(stream.end() if stream else "")
    finally:
        if live and any(told):
            sys.stdout.write("\n")  # what comes next, a message or a shell, starts on its own line
    if live and not any(told):
        sys.stdout.write("\n")
    return out, "".join(told), times


def _speed(prompt: int, times: Sequence[float]) -> str:
    """How long it took, in words.  The first token is the prompt's; the speed is that of the others."""
    if len(times) < 2:
        return f"{_show.plural(prompt, 'prompt token')}, then the end at once"
    first, rest, span = times[1] - times[0], len(times) - 2, times[-1] - times[1]
    speed = f", then {rest / span:.1f} tokens per second" if rest and span > 0 else ""
    return f"first token after {first:.2f} s ({_show.plural(prompt, 'prompt token')}){speed}"


@command
def main(argv: list[str] | None = None) -> int:
    """Continue a prompt; returns the exit code."""
    options = _parser().parse_args(argv)
    if options.n < 1:
        raise Usage(f"-n {options.n}: at least one token is needed")
    _prompt.check_prompt(options)

    import json

    from aprender.sides import open_side

    side = open_side(options.model)
    ids = _prompt.prompt_ids(side, options)
    out, text, times = _generate(side, _prompt.tokenizer(side, options), ids, options.n, live=not options.json)
    end = "length" if len(out) == options.n else "eos"
    if options.json:
        said = {
            "schema": SCHEMA,
            "side": side.spelling,
            "prompt": options.prompt,
            "prompt_ids": list(ids),
            "ids": out,
            "text": text,
            "end": end,
        }
        print(json.dumps(said, ensure_ascii=False))
    if options.verbose:
        say(f"ids {','.join(map(str, out)) or 'none'} ({'as many as asked for' if end == 'length' else 'ended by the model'})")
        say(_speed(len(ids), times))
    _prompt.warn_beyond_context(side, len(ids) + len(out))
    return AGREE


if __name__ == "__main__":
    sys.exit(main())
