"""Builds ``aprender._core``.  Metadata is in pyproject.toml; this file owns only the compiler's command line.

Environment switches: ``APRENDER_WERROR=1`` makes warnings errors (tests and CI; an sdist must build on tomorrow's compiler),
``APRENDER_SANITIZE=address,undefined`` and ``APRENDER_COVERAGE=1`` instrument the extension, ``APRENDER_ONE_FILE=1`` compiles
``csrc/all.c`` alone.
"""

import os
from glob import glob

import numpy
from setuptools import Extension, setup

FLOORS = ("base", "quant", "measure", "file", "plan", "cpu", "run", "py")  # csrc/cuda is built by `make cuda` into its own library


def sources() -> list[str]:
    """Every C file of the extension, in floor order."""
    if os.environ.get("APRENDER_ONE_FILE"):
        return ["csrc/all.c"]
    return [path for floor in FLOORS for path in sorted(glob(f"csrc/{floor}/*.c"))]


def flags() -> tuple[list[str], list[str]]:
    """Compile and link arguments.  Contraction is off: every fused multiply-add in the source is explicit."""
    compile_args = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-ffp-contract=off", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]
    link_args = ["-pthread", "-lm", "-ldl"]
    if os.environ.get("APRENDER_WERROR"):
        compile_args += ["-Werror", "-Werror=implicit-function-declaration", "-Wshadow", "-Wstrict-prototypes"]
    if sanitize := os.environ.get("APRENDER_SANITIZE"):
        compile_args += [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined", "-g", "-O1"]
        link_args += [f"-fsanitize={sanitize}"]
    if os.environ.get("APRENDER_COVERAGE"):
        compile_args += ["--coverage", "-O0"]
        link_args += ["--coverage"]
    return compile_args, link_args


compile_args, link_args = flags()
setup(
    ext_modules=[
        Extension(
            "aprender._core",
            sources(),
            include_dirs=["csrc", numpy.get_include()],
            define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"), ("NPY_TARGET_VERSION", "NPY_2_0_API_VERSION")],
            depends=[*glob("csrc/*/*.h"), *glob("csrc/*/*.def"), *glob("csrc/*/*.c")],
            extra_compile_args=compile_args,
            extra_link_args=link_args,
        )
    ]
)
