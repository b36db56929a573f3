"""``python -m aprender.env``: what to paste into a bug report: versions, CPU, CUDA, packages, and the variables that change what runs.

Owns that list.  Refuses to tell anything of the machine that does not change a number: no host or user name, no other variables.  Keeps
two facts apart that are often taken for one: whether the CUDA backend was built, and whether there is a device that it can use.  Called
from the command line; :func:`cuda_facts` by ``info`` too.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from aprender import _show
from aprender._command import AGREE, Parser, command

SCHEMA = "aprender.env/1"

EXAMPLES = (
    "python -m aprender.env",
    "python -m aprender.env --json | python -m json.tool",
)

PACKAGES = ("numpy", "tokenizers", "safetensors", "rich", "torch", "transformers", "accelerate", "gguf", "matplotlib")
"""Those that can change a number or a picture."""


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """The processor's name, as Linux has it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
            return next((line.partition(":")[2].strip() for line in stream if line.startswith("model name")), platform.machine())
    except OSError:
        return platform.machine()


def describe() -> dict[str, Any]:
    """Everything, as plain data."""
    from aprender import __version__, _core

    return {
        "schema": SCHEMA,
        "aprender": __version__,
        "extension": _core.__file__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, {' '.join(platform.libc_ver())}".strip(", "),
        "cpu": {"name": _cpu(), "cores": len(os.sched_getaffinity(0)), "tiers": [name for name, there in _core.TIERS if there]},
        "cuda": dict(_core.cuda()),
        "packages": {name: _version(name) for name in PACKAGES},
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith("APRENDER_")},
    }


def cuda_facts(cuda: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Label and text: whether the backend was built, then whether it has a device."""
    yield "CUDA backend", f"built ({cuda['compiler']}): {cuda['library']}" if cuda["built"] else f"not usable: {cuda['reason']}"
    if cuda["built"]:
        for device in cuda["devices"]:
            yield "CUDA device", device
        if not cuda["devices"]:
            yield "CUDA device", f"none: {cuda['reason']}"


def _facts(said: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    cpu = said["cpu"]
    yield "aprender", f"{said['aprender']} ({said['extension']})"
    yield "python", said["python"]
    yield "system", said["system"]
    yield "cpu", f"{cpu['name']}, {_show.plural(cpu['cores'], 'core')}, tiers {' '.join(cpu['tiers'])}"
    yield from cuda_facts(said["cuda"])
    for name, version in said["packages"].items():
        yield "packages", f"{name} {version or 'is not installed'}"
    for name, value in said["variables"].items():
        yield "variables", f"{name}={value}"


def _parser() -> Parser:
    about = "What to paste into a bug report: versions, CPU, whether the CUDA backend is built and whether it has a device. Exit code 0."
    parser = Parser("env", about, EXAMPLES)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    """Describe what would run here."""
    options = _parser().parse_args(argv)
    said = describe()
    if options.json:
        import json

        print(json.dumps(said, ensure_ascii=False, allow_nan=False))
    else:
        _show.show(_show.facts(_facts(said)))
    return AGREE


if __name__ == "__main__":
    sys.exit(main())
