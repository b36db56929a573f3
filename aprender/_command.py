"""What every command shares: the guard, the parser, exit codes and streams.

The result goes to stdout, everything else to stderr.  Exit codes: 0 agree or done, 1 a divergence was found, 2 usage, 3 not comparable or
cannot run.  An exception that no command expects is 3 with one line (``APRENDER_TRACEBACK=1`` prints the traceback): Python's own 1 would
read as "bad" to a bisecting script.  Called by the command modules only.
"""

from __future__ import annotations

import argparse
import functools
import io
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from typing import NoReturn, Protocol

AGREE, DIVERGENCE, USAGE, CANNOT = 0, 1, 2, 3


class Usage(Exception):
    """The command line is wrong; the text says how."""


class Parser(argparse.ArgumentParser):
    """An argument parser that shows real examples and fails in one line.

    Parameters
    ----------
    name : str
        The command, as in ``python -m aprender.<name>``.
    description : str
        First paragraph of ``--help``.
    examples : sequence of str
        Command lines that work, shown at the end of ``--help``.
    """

    def __init__(self, name: str, description: str, examples: Sequence[str]) -> None:
        super().__init__(
            prog=f"python -m aprender.{name}",
            description=textwrap.fill(description, 100),
            epilog="examples:\n" + "\n".join(f"  {line}" for line in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Report wrong usage in one line."""
        raise Usage(f"{message} (see {self.prog} --help)")


def one_line(text: object) -> str:
    """Text of an exception as a single line."""
    return " ".join(str(text).split()) or type(text).__name__


def say(text: str) -> None:
    """Print one line to stderr."""
    print(text, file=sys.stderr)


class Main(Protocol):
    """A command: the words after its name (those of the process if None) to an exit code."""

    def __call__(self, argv: list[str] | None = None) -> int:
        """Run it."""


def command(main: Main) -> Main:
    """Decorate a command's ``main(argv)`` with the guard that turns exceptions into exit codes."""

    @functools.wraps(main)
    def guarded(argv: list[str] | None = None) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a character that the terminal lacks must not look like a failure
        try:
            code = main(argv)
            sys.stdout.flush()
            return code
        except Usage as problem:
            say(f"aprender: {one_line(problem)}")
            return USAGE
        except KeyboardInterrupt:
            say("aprender: interrupted")
            return CANNOT
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; say nothing at exit
            return CANNOT
        except SystemExit as stop:  # argparse's --help
            return stop.code if isinstance(stop.code, int) else CANNOT
        except Exception as problem:
            if os.environ.get("APRENDER_TRACEBACK"):
                traceback.print_exc()
            say(f"aprender: {describe(problem)}")
            return CANNOT

    return guarded


def describe(problem: BaseException) -> str:
    """One line for an exception: our own as they are, foreign ones with their class."""
    from aprender.errors import Error

    if isinstance(problem, ImportError) and "_core" in str(problem):
        return f"the extension aprender._core cannot be loaded ({one_line(problem)}): build it with `make build` or reinstall aprender"
    if isinstance(problem, Error):
        return one_line(problem)
    if isinstance(problem, OSError):
        where = f"{problem.filename}: " if problem.filename and str(problem.filename) not in str(problem.strerror) else ""
        return f"{where}{one_line(problem.strerror or problem)}"
    return f"{type(problem).__name__}: {one_line(problem)}"
