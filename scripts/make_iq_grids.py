"""Write ``csrc/quant/iq_grids.c``: the codebooks of the IQ formats, from the tables of the gguf package.

A point of a codebook is 4 or 8 levels; each level becomes its number, in 3 or 2 bits, the first value lowest. Needs the gguf package and
is run by hand, should a codebook be added:

    python scripts/make_iq_grids.py
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

TARGET = Path(__file__).resolve().parent.parent / "csrc" / "quant" / "iq_grids.c"

#: Format to the bits of one level.
BITS = {"IQ2_XXS": 2, "IQ2_XS": 2, "IQ2_S": 2, "IQ3_XXS": 3, "IQ3_S": 3, "IQ1_S": 2}

HEAD = """/*
** iq_grids.c: the codebooks of the IQ formats, the points that they can name.  Written by scripts/make_iq_grids.py; iq_grids.h says
** what a point means.  Owns nothing but these constants; the IQ decoders read them.
*/
#include "iq_grids.h"
"""


def points(name: str, bits: int) -> list[int]:
    kind = gguf.quants._type_traits[gguf.GGMLQuantizationType[name]]
    kind.init_grid()
    levels = kind.grid.reshape(kind.grid_shape)
    numbers = np.searchsorted(kind.grid_map, levels)
    return (numbers << bits * np.arange(levels.shape[1])).sum(1).tolist()


def main() -> None:
    text = HEAD
    for name, bits in BITS.items():
        made = points(name, bits)
        assert len(set(made)) == len(made), "every point once"
        text += f"\nAP_GRID uint16_t ap_{name.lower()}_grid[{len(made)}] = {{\n"
        for i in range(0, len(made), 16):
            text += "    " + ", ".join(f"0x{point:04X}" for point in made[i : i + 16]) + ",\n"
        text += "};\n"
    TARGET.write_text(text)


if __name__ == "__main__":
    main()
