"""Population *own* of the fault matrix: every row of the catalogue planted in our own engine by its edits.

Owns which row sits where in which run; the planting is that of ``bisect --plant``.  The controls and an untouched run are cases too.
Called by ``fault_matrix``; the protocol is that of ``matrix_case``.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator

from matrix_case import CLEAN, Bench, Case, Judged
from matrix_models import MODES, data, gguf, models, prompt, reference, shape, some

from aprender.captures import Captures
from aprender.judge import faults
from aprender.judge.faultrow import Edit, FaultRow
from aprender.sides.own import OwnSide
from aprender.stages import Key

POPULATION = "own"


class Engine:
    """Our engine on one model, one prompt, run in one way."""

    def __init__(self, arch: str, fmt: str, mode: str, seed: int, whole: bool) -> None:
        self.arch, self.fmt, self.mode, self.seed, self.whole = arch, fmt, mode, seed, whole

    def capture(self, edits: tuple[Edit, ...] = ()) -> Captures:
        """Run it; an edit that says how the prompt is cut decides that."""
        cut = MODES[self.mode] and not any(edit["target"] == "pieces" for edit in edits)
        more = ({"target": "pieces", "value": MODES[self.mode]},) if cut else ()
        return OwnSide(gguf(self.arch, self.fmt, self.seed), edits=(*edits, *more), threads=1).capture(prompt(self.seed))

    @functools.cached_property
    def bench(self) -> Bench:
        """The untouched run."""
        path = gguf(self.arch, self.fmt, self.seed)
        return Bench(self.capture(), data(path), OwnSide(path).profile, reference(self.arch, self.seed), self.whole)

    def judge(self, row: FaultRow, key: Key) -> Judged:
        """Plant a row and judge."""
        return self.bench.judge(row.name, key, self.capture(row.edits(*key, shape(self.arch).flags)))

    def case(self, row: FaultRow | None, key: Key | None) -> Case:
        """One cell."""
        judge = (lambda: self.bench.untouched) if row is None or key is None else functools.partial(self.judge, row, key)
        return Case(POPULATION, CLEAN if row is None else row.name, key, self.arch, self.fmt, self.mode, self.seed, judge)


def fits(row: FaultRow, key: Key, arch: str, mode: str) -> bool:
    """Whether a row is run in a mode: one that says how the prompt is cut is, in the mode nearest to that."""
    cut = [int(edit["value"]) for edit in row.edits(*key, shape(arch).flags) if edit["target"] == "pieces"]
    return not cut or mode == ("decode" if cut[0] == 1 else "pieces")


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Every case that the arguments name."""
    for number, arch, fmt, mode, seed in models(args):
        engine, like = Engine(arch, fmt, mode, seed, args.whole), shape(arch)
        yield engine.case(None, None)
        for i, row in enumerate([*faults.FAULTS.values(), *faults.CONTROLS.values()]):
            sites = [key for key in row.sites(like.flags, like.hparams) if fits(row, key, arch, mode)]
            yield from (engine.case(row, key) for key in some(sites, args.sites, number + i))
