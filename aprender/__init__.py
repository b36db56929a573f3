"""aprender names the first wrong operation of an LLM inference engine, and proves that it is wrong and not rounding noise.

Doors only; everything behind them is imported when first used.

>>> import aprender
>>> side = aprender.side("model.gguf")                    # doctest: +SKIP
>>> captures = side.capture([261, 374, 220])              # doctest: +SKIP
>>> captures["ffn_out", 3].shape                          # doctest: +SKIP
(3, 256)
>>> report = aprender.compare("model.gguf", "hf:folder")  # doctest: +SKIP
>>> report.verdict                                        # doctest: +SKIP
'agree'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from aprender._core import File as File
    from aprender._core import Model as Model
    from aprender._core import Run as Run
    from aprender.bisection import compare as compare
    from aprender.captures import Captures as Captures
    from aprender.captures import open_captures as open_captures
    from aprender.errors import Error as Error
    from aprender.sides import open_side as side

_DOORS = {
    "File": ("aprender._core", "File"),
    "Model": ("aprender._core", "Model"),
    "Run": ("aprender._core", "Run"),
    "Captures": ("aprender.captures", "Captures"),
    "open_captures": ("aprender.captures", "open_captures"),
    "side": ("aprender.sides", "open_side"),
    "compare": ("aprender.bisection", "compare"),
    "Error": ("aprender.errors", "Error"),
}

__all__ = ["Captures", "Error", "File", "Model", "Run", "__version__", "canary", "compare", "open_captures", "side"]


def canary(form: str = "canary.gguf") -> str:
    """Path of the embedded model: ``canary.gguf`` by default, ``""`` for the folder with its safetensors form and the recorded stages."""
    from importlib.resources import files

    return str(files("aprender").joinpath("data/canary", form))


def __getattr__(name: str) -> Any:
    if name not in _DOORS:
        raise AttributeError(f"module 'aprender' has no attribute '{name}'")
    module, attribute = _DOORS[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
