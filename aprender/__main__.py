"""``aprender NAME …`` and ``python -m aprender NAME …``: the commands by name.

Owns the table of commands; a command is a module of this package with a ``main``.  Refuses unknown names with the nearest one.  Called by
the console script.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Mapping

from aprender._command import AGREE, USAGE, Usage, command, say

COMMANDS: Mapping[str, str] = {
    "bisect": "find the first wrong operation",
    "trace": "capture the stages of a forward pass to a folder",
    "oracle": "make reference fixtures with Hugging Face",
    "diff": "compare two saved captures",
    "weights": "compare the weights of two models, tensor by tensor",
    "run": "generate text",
    "convert": "write a model as APR or GGUF, as it is or in other number formats",
    "info": "what is in a model: tensors, number formats, hyper-parameters, plan",
    "env": "what to paste into a bug report: versions, CPU, CUDA",
}
"""Every command with what it does, in the order of ``--help``."""


def available() -> dict[str, str]:
    """The commands whose modules are there."""
    return {name: text for name, text in COMMANDS.items() if importlib.util.find_spec(f"aprender.{name}")}


def _help() -> str:
    lines = [f"  {name:<8} {text}" for name, text in available().items()]
    return "\n".join([
        "usage: aprender COMMAND …   (or python -m aprender.COMMAND …)", "",
        "Names the first wrong operation of an LLM inference engine, and proves that it is wrong and not rounding noise.", "",
        "commands:", *lines, "",
        "aprender COMMAND --help explains one and shows examples; aprender bisect without arguments runs on the embedded model.",
        "Exit codes: 0 agree or done, 1 divergence found, 2 usage, 3 not comparable or cannot run.",
    ])  # fmt: skip


@command
def main(argv: list[str] | None = None) -> int:
    """Run a command by its name; returns its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words:
        say(_help())  # not a result: a script whose command got lost must not read "agree"
        return USAGE
    name, rest = words[0], words[1:]
    if name in ("-h", "--help"):
        print(_help())
        return AGREE
    if name == "--version":
        from aprender import __version__

        print(f"aprender {__version__}")
        return AGREE
    known = available()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        raise Usage(f"there is no command '{name}'" + (f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(known)}"))
    return int(importlib.import_module(f"aprender.{name}").main(rest))


if __name__ == "__main__":
    sys.exit(main())
