"""What a loaded transformers model computes with besides its parameters: attributes of modules and buffers, which no checkpoint holds.

Owns the list of attributes and the way from a module to plain data for the manifest.  Refuses to know what is right: ``judge.loaded`` holds
it against config.json.  ``model.half()`` and ``model.to(bfloat16)`` cast the rotary frequencies, a buffer; ``from_pretrained(dtype=...)``
does not.  Called by ``sides.hf``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ATTRIBUTES: Mapping[str, str] = {
    "variance_epsilon": "eps",
    "scaling": "attention_scale",
    "num_key_value_groups": "groups",
    "sliding_window": "window",
    "attention_scaling": "rope_attention_scale",
}
"""Attribute of a module to the name of the parameter."""

BUFFER = "inv_freq"
"""The rotary frequencies."""


def held(model: Any) -> dict[str, dict[str, Any]]:
    """Parameters by name and by the first module that has each value.

    Parameters
    ----------
    model : PreTrainedModel

    Returns
    -------
    dict
        Name to module path to number; ``frequencies`` to a list of them.
    """
    out: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        for attribute, name in ATTRIBUTES.items():
            value = getattr(module, attribute, None)
            if isinstance(value, int | float) and not isinstance(value, bool) and value not in out.setdefault(name, {}).values():
                out[name][path] = value
        buffer = getattr(module, BUFFER, None)
        if buffer is not None:
            out.setdefault("frequencies", {})[path] = buffer.float().tolist()
    return out
