"""What commands print besides verdicts: plain tables, facts in two columns, numbers that read well, and a progress line.

Owns only looks.  Refuses colour and trailing blanks where nobody watches (a pipe, ``NO_COLOR``).  Called by the command modules; importing
it loads nothing.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

WIDTH = 120
"""Columns where the output is not a terminal."""

PATIENCE = 1.0
"""Seconds before a progress line appears."""


def table(columns: str, rows: Iterable[Sequence[object]], last: Sequence[object] | None = None) -> Table:
    """A table without lines.

    Parameters
    ----------
    columns : str
        Names separated by two spaces; ``>`` before one that is aligned to the right, ``=`` before one on the left that is never folded.
    rows : iterable of sequences
        Cells; anything but a rich Text is shown as ``str``.
    last : sequence, optional
        A row of totals, set off.
    """
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns.split("  "):
        right = name.startswith(">")
        made.add_column(name.lstrip(">="), justify="right" if right else "left", overflow="fold", no_wrap=right or name.startswith("="))
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(visible(str(cell))) for cell in row))
    if last is not None:
        made.add_row(*(Text(visible(str(cell))) for cell in last), style="bold")
    return made


def facts(pairs: Iterable[tuple[str, object]]) -> Table:
    """Label and text in two columns; a label that repeats is shown once."""
    from rich.table import Table
    from rich.text import Text

    grid, before = Table.grid(padding=(0, 2)), None
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in pairs:
        grid.add_row("" if label == before else label, text if isinstance(text, Text) else Text(visible(str(text))))
        before = label
    return grid


def heading(text: str) -> RenderableType:
    """The line above a table."""
    from rich.text import Text

    return Text(text, style="bold")


def show(*parts: RenderableType, width: int = WIDTH) -> None:
    """Print to stdout, in colour on a terminal; elsewhere plain, ``width`` columns, without blanks at the ends of lines."""
    from rich.console import Console

    out = Console(highlight=False)
    if out.is_terminal:
        out.print(*parts, sep="\n")
        return
    plain = Console(highlight=False, no_color=True, color_system=None, width=width)
    with plain.capture() as captured:
        plain.print(*parts, sep="\n")
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def narrow() -> bool:
    """Whether a terminal watches that has fewer columns than a pipe would get."""
    return sys.stdout.isatty() and shutil.get_terminal_size().columns < WIDTH


def bar(share: float, length: int = 20) -> Text:
    """A bar for a share 0..1; cut where there is no room, never folded."""
    from rich.text import Text

    return Text("█" * round(length * share) or "▏", no_wrap=True, overflow="crop")


def number(value: float) -> str:
    """Shortest decimal text that gives the number back (as float32 if it is one), with thousands set apart."""
    import numpy as np

    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    narrow = np.float32(value)
    return str(narrow) if float(narrow) == value else f"{value:.9g}"


def plural(count: int, word: str) -> str:
    """``1 tensor``, ``2,000 tensors``."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def size(count: int) -> str:
    """Bytes as people read them."""
    from rich.filesize import decimal

    return decimal(count)


def spans(numbers: Iterable[int]) -> str:
    """Whole numbers in short: ``0–3, 5``."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


def visible(text: str) -> str:
    """A text with control characters and line ends spelled out: it stays on its line, and no file can send a terminal commands."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class Progress:
    """A line on stderr that says how far the work is: only on a terminal, and only after a second.

    Use as a context manager; inside, call it with the share done, 0..1.
    """

    def __init__(self, what: str, quiet: bool = False) -> None:
        self._what = what
        self._began = time.monotonic()
        self._live = not quiet and sys.stderr.isatty()
        self._shown = False

    def __enter__(self) -> Callable[[float], None]:
        return self._tell

    def _tell(self, share: float) -> None:
        past = time.monotonic() - self._began
        if not self._live or past < PATIENCE:
            return
        left = past / share - past if share > 0 else 0.0
        print(f"\r{self._what} {share:4.0%}, {left:.0f} s left \033[K", end="", file=sys.stderr, flush=True)
        self._shown = True

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
