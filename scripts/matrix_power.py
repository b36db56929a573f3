"""Whether a fault can be seen, said before the run: its prediction in place of the right value of an untouched run, put to the gates.

Owns :class:`Forecast`, what every row of the catalogue would leave at one stage of an untouched run.  A fault is visible if the
very tests of the judge call what its row predicts wrong; two rows are twins if they predict the same bits.  Refuses to look at a faulty
run.  Called by ``matrix_case``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from aprender.judge import faults
from aprender.judge.changes import Impossible
from aprender.judge.diagnose import _Search
from aprender.judge.faultrow import FaultRow
from aprender.judge.measure import measure
from aprender.judge.replay import Replay
from aprender.judge.rule import Gates
from aprender.judge.witness import Float
from aprender.stages import Key


@dataclass(frozen=True)
class Power:
    """What was predicted before the run: is the fault visible to this judge on these inputs?

    Attributes
    ----------
    visible : bool or None
        None where the row predicts nothing there (a control).
    twins : tuple of str
        Other rows of the catalogue that predict the same bits here: no judge can tell them apart.
    """

    visible: bool | None = None
    twins: tuple[str, ...] = ()


@dataclass
class Forecast:
    """What each row leaves at a stage, if it sits at a site.

    Parameters
    ----------
    replay : Replay
        Of the untouched run.
    shown : Key
        Where it shows.
    site : Key
        Where it sits: the same stage, or one of the region that is judged there.
    gates, band : Gates, float
    """

    replay: Replay
    shown: Key
    site: Key
    gates: Gates
    band: float
    _bits: Mapping[str, Float] = field(init=False, repr=False)

    @np.errstate(all="ignore")
    def __post_init__(self) -> None:
        self._search = _Search(self.replay, self.shown, self.gates, self.band)
        made = {row.name: self._predicted(row) for row in faults.ROWS}
        self._bits = {name: bits for name, bits in made.items() if bits is not None}

    def _predicted(self, row: FaultRow) -> Float | None:
        """The bits that a row predicts where it shows; None if it cannot sit there."""
        stage, layer = self.site
        if not row.prediction(stage) or not row.possible(self.replay.flags, self.replay.hparams) or (layer or 0) < row.first_layer:
            return None
        case = next((case for case in self._search.cases if stage in case.stages and case.key[1] == layer), None)
        try:
            recipes = None if case is None else self._search._recipes(case, row.prediction(stage))
            return None if not recipes else self._search.replayed(recipes).bits()
        except Impossible:
            return None

    @np.errstate(all="ignore")
    def power(self, fault: str) -> Power:
        """What is to be expected of a fault."""
        if fault not in self._bits:
            return Power()
        own = self._bits[fault]
        twins = tuple(name for name, bits in self._bits.items() if name != fault and np.array_equal(bits, own, equal_nan=True))
        return Power(bool(measure(own, self._search.right, self.gates, self.band).reasons), twins)
